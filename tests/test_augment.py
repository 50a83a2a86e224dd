"""A mask follows its image, and a sample depends on its seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from terrasynth.data.augment import augment, cutmix, view

SIZE = 64


def patches(seed: int = 0, classes: int = 4, size: int = SIZE) -> torch.Tensor:
    """A mask of large blocks, uint8 (size, size), with some unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, classes + 1, (size // 16, size // 16), generator=generator)
    mask = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return torch.where(mask == classes, 255, mask).byte()


def painted(mask: torch.Tensor) -> torch.Tensor:
    """An image that is its mask: channel 0 has a grey per class, the others are constant."""
    grey = torch.where(mask == 255, 250, mask.int() * 60).byte()
    return torch.stack([grey, torch.full_like(grey, 100), torch.full_like(grey, 50)])


def interior(mask: torch.Tensor) -> torch.Tensor:
    """Pixels whose 5 x 5 neighbourhood is of one class."""
    padded = functional.pad(mask[None, None].float(), (2, 2, 2, 2), mode="replicate")
    largest, smallest = functional.max_pool2d(padded, 5, 1), -functional.max_pool2d(-padded, 5, 1)
    return (largest == smallest)[0, 0]


def random_tile(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return image, torch.randint(0, 5, (SIZE, SIZE), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("seed", range(20))
def test_augmented_masks_lie_on_their_images(seed):
    mask = patches(seed)
    image, followed = augment(painted(mask), mask, seed)
    assert (image.dtype, followed.dtype) == (torch.float32, torch.int64)
    assert image.shape == (3, SIZE, SIZE)
    inside = interior(followed)
    assert inside.any()
    # One colour per class in the image: the jitter changes which, not how many.
    for value in followed[inside].unique():
        colors = image[:, inside & (followed == value)]
        assert (colors.amax(1) - colors.amin(1)).max() < 1e-5


@pytest.mark.parametrize("index", range(8, 40))
def test_zoomed_views_have_masks_that_lie_on_their_images(index):
    mask = patches(index)
    image, followed = view(painted(mask), mask, index)
    assert (image.dtype, followed.dtype) == (torch.uint8, torch.uint8)
    inside = interior(followed)
    assert torch.equal(image[:, inside], painted(followed)[:, inside])


def test_the_image_crosses_half_way_between_two_classes_where_the_mask_switches():
    mask = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    mask[:, SIZE // 2 :] = 1
    image = (mask * 200).expand(3, -1, -1)
    for index in range(8, 60):
        pixels, followed = view(image, mask, index)
        apart = (pixels[0] > 100) != (followed == 1)
        assert (pixels[0][apart] == 100).all()


@pytest.mark.parametrize("index", range(8))
def test_the_first_views_are_the_eight_symmetries_exactly(index):
    image, mask = random_tile()
    turned, followed = view(image, mask, index)
    array = np.rot90(image.numpy(), index % 4, axes=(1, 2))
    expected = array[:, :, ::-1] if index >= 4 else array
    np.testing.assert_array_equal(turned.numpy(), expected)
    both = torch.cat([image, mask[None]])
    again = view(both, mask, index)[0]
    assert torch.equal(again[3], followed)


def test_the_first_views_are_all_different_and_the_first_is_the_tile():
    image, mask = random_tile()
    views = [view(image, mask, index)[0] for index in range(8)]
    assert torch.equal(views[0], image)
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


@pytest.mark.parametrize("function", [augment, view])
def test_a_sample_is_a_function_of_its_seed(function):
    image, mask = random_tile()
    before = image.clone(), mask.clone()
    for seed in (8, 9, 2**32 + 8, 2**62):
        first, second = function(image, mask, seed), function(image, mask, seed)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    assert not torch.equal(function(image, mask, 8)[0], function(image, mask, 9)[0])
    assert not torch.equal(function(image, mask, 8)[0], function(image, mask, 8 + 2**32)[0])
    assert torch.equal(image, before[0])
    assert torch.equal(mask, before[1])


def test_augmented_images_stay_in_range_and_keep_their_look():
    image, mask = random_tile()
    means = []
    for seed in range(100):
        augmented, _ = augment(image, mask, seed)
        assert augmented.min() >= 0
        assert augmented.max() <= 1
        means.append(augmented.mean())
    assert abs(torch.stack(means).mean() - image.float().mean() / 255) < 0.02
    assert 0.02 < torch.stack(means).std() < 0.1


def test_every_symmetry_is_drawn_about_equally():
    marked = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    marked[: SIZE // 2, : SIZE // 4] = 1
    marked[: SIZE // 4, : SIZE // 2] = 1
    marked[:8, 40:] = 2
    image = marked.expand(3, -1, -1)
    symmetries = [view(image, marked, index)[1].float() for index in range(8)]
    counts = torch.zeros(8)
    for seed in range(240):
        _, followed = augment(image, marked, seed)
        counts[torch.stack([(followed - s).abs().mean() for s in symmetries]).argmin()] += 1
    assert counts.min() > 12
    assert counts.max() < 54


# --- CutMix ----------------------------------------------------------------------------------------------------------


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every image and mask is filled with its position."""
    numbers = torch.arange(size)
    return (
        numbers.float().view(-1, 1, 1, 1).repeat(1, 3, 40, 60),
        numbers.view(-1, 1, 1).repeat(1, 40, 60),
    )


def test_cutmix_pastes_one_rectangle_of_the_neighbour_and_the_masks_alike():
    images, masks = batch(300)
    mixed, mixed_masks = cutmix(images, masks, torch.arange(300))
    assert torch.equal(mixed, mixed_masks[:, None].float().expand_as(mixed))
    assert torch.equal(images, batch(300)[0])
    for i, mask in enumerate(mixed_masks):
        assert set(mask.unique().tolist()) <= {i, (i - 1) % 300}
        pasted = (mask != i).nonzero()
        if len(pasted):
            (top, left), (bottom, right) = pasted.min(0).values, pasted.max(0).values
            assert len(pasted) == (bottom - top + 1) * (right - left + 1)


def test_cutmix_has_the_published_area():
    """Brute force: lambda ~ U(0, 1), centre ~ U, side sqrt(1 - lambda), clipped, half of the time."""
    images, masks = batch(4000)
    _, mixed = cutmix(images[:, :1], masks, torch.arange(4000))
    share = (mixed != masks).flatten(1).float().mean(1)
    random = np.random.default_rng(0)
    side, y, x = np.sqrt(1 - random.random(10**5)), random.random(10**5), random.random(10**5)
    expected = np.ones(10**5)
    for centre in (y, x):
        expected *= np.clip(centre + side / 2, 0, 1) - np.clip(centre - side / 2, 0, 1)
    assert abs((share > 0).float().mean() - 0.5) < 0.03
    assert abs(share.mean() - expected.mean() / 2) < 0.01


def test_a_cutmix_box_depends_on_the_seed_alone():
    images, masks = batch(12)
    seeds = torch.arange(12) + 100
    boxes = cutmix(images, masks, seeds)[1] != masks
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    permuted = cutmix(images[order], masks[order], seeds[order])[1] != masks[order]
    assert torch.equal(permuted, boxes[order])
    alone = torch.cat([cutmix(*batch(2), torch.stack([seed, seed]))[1][:1] != 0 for seed in seeds])
    assert torch.equal(alone, boxes)


def test_cutmix_of_a_single_sample_changes_nothing():
    image, mask = random_tile()
    for seed in range(10):
        mixed, mixed_mask = cutmix(image[None], mask[None], torch.tensor([seed]))
        assert torch.equal(mixed[0], image)
        assert torch.equal(mixed_mask[0], mask)
