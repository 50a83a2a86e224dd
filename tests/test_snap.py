"""Maps that follow the colours of their image: `terrasynth.models.snap`."""

import math

import pytest
import torch

from terrasynth.models.snap import snap

RADII = (1, 2, 4, 8, 14, 22)


def by_hand(image, labels, num_classes, rounds):
    """The docstring's sums, pixel by pixel."""
    _, height, width = image.shape
    offsets = [(r * y, r * x) for r in RADII for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    votes = [
        [[0.0 if labels[y][x] >= num_classes else 1.0 if labels[y][x] == k else -1.0 for k in range(num_classes)]
         for x in range(width)] for y in range(height)
    ]  # fmt: skip
    for number in range(rounds):
        found = [[[0.0] * num_classes for _ in range(width)] for _ in range(height)]
        for y in range(height):
            for x in range(width):
                total = 0.0
                for dy, dx in offsets:
                    if not (0 <= y + dy < height and 0 <= x + dx < width):
                        continue
                    apart = sum(float(image[c, y, x] - image[c, y + dy, x + dx]) ** 2 for c in range(3))
                    weight = math.exp(-apart / (2 * 0.1**2) - (dy**2 + dx**2) / (2 * 20.0**2))
                    total += weight
                    for k in range(num_classes):
                        vote = votes[y + dy][x + dx][k]
                        found[y][x][k] += weight * (math.tanh(2 * vote) if number else vote)
                found[y][x] = [value / total for value in found[y][x]]
        votes = found
    return torch.tensor(votes).movedim(-1, 0)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_the_sum_that_is_written_down(classes, rounds):
    generator = torch.Generator().manual_seed(rounds)
    image = 0.5 + 0.1 * torch.randn(3, 7, 24, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (7, 24), generator=generator)
    labels[2:4, 5:9] = 255
    votes = by_hand(image, labels.tolist(), classes, rounds)
    expected = (1 + votes) / (1 + votes).sum(0) * (labels != 255)
    assert (expected.argmax(0) != labels)[labels != 255].float().mean() > 0.1
    found = snap(image[None].float(), labels[None], classes, rounds)[0]
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=0)


def test_a_boundary_goes_to_the_edge_in_the_image():
    truth = torch.zeros(1, 48, 48, dtype=torch.uint8)
    truth[:, :, 20:] = 1
    noise = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    image = 0.2 + 0.4 * truth.unsqueeze(1).float() + 0.03 * noise
    rough = truth.roll(6, 2)
    rough[:, :, :6] = 0
    rough[:, 10:13, 5:8] = 1
    found = snap(image, rough, 2, 16).argmax(1)
    assert (rough != truth).sum() > 250
    assert torch.equal(found, truth.long())


def test_no_rounds_and_one_class_change_nothing_and_unlabelled_pixels_stay():
    generator = torch.Generator().manual_seed(1)
    maps = torch.randint(4, (2, 16, 16), generator=generator, dtype=torch.uint8)
    image = torch.rand(2, 3, 16, 16, generator=generator)
    one_hot = torch.nn.functional.one_hot(maps.long(), 4).movedim(-1, 1).float()
    assert torch.equal(snap(image, maps, 4, 0), one_hot)
    assert torch.equal(snap(image, torch.full_like(maps, 3), 4, 8).argmax(1), torch.full_like(maps, 3).long())
    assert not snap(image, torch.full_like(maps, 255), 4, 8).any()
    found = snap(image, maps, 3, 8)
    assert torch.equal(found.sum(1) == 0, maps == 3)
    torch.testing.assert_close(snap(image[:1], maps[:1], 3, 8), found[:1])
    torch.testing.assert_close(snap(image, maps.where(maps < 3, 255), 5, 8)[:, :3], found)
