import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from terrasynth.data import reference
from terrasynth.data.reference import reference_affine, reference_view


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(0)
    return (F.interpolate(torch.rand(1, 3, 6, 8), (24, 32), mode="bicubic").clamp(0, 1)[0] * 255).byte()


def mirrored(coordinate, size):
    """A coordinate reflected at the outer edges of the first and last pixel, as often as it takes."""
    folded = (coordinate + 0.5) % (2 * size)
    return (folded if folded < size else 2 * size - folded) - 0.5


def moved(image, matrix):
    """Brute force in float64: where each pixel comes from, and the four pixels around that place."""
    _, height, width = image.shape
    source, centre = np.linalg.inv(matrix), np.array([(width - 1) / 2, (height - 1) / 2])
    result = np.empty(image.shape)
    for row in range(height):
        for column in range(width):
            x, y = (source @ [column - centre[0], row - centre[1], 1])[:2] + centre
            x, y = mirrored(x, width), mirrored(y, height)
            left, top = math.floor(x), math.floor(y)
            columns, rows = np.clip([left, left + 1], 0, width - 1), np.clip([top, top + 1], 0, height - 1)
            weights = np.outer([top + 1 - y, y - top], [left + 1 - x, x - left])
            result[:, row, column] = (image[:, rows][:, :, columns] * weights).sum((1, 2))
    return result


@pytest.mark.parametrize("seed", range(6))
def test_a_reference_is_the_target_moved_with_its_mirror_image_beyond_the_edges(image, seed):
    matrix = reference_affine(24, 32, seed, probability=0.7)
    expected = moved(image.double().numpy() / 255, matrix)
    found = reference_view(image, seed, probability=0.7)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)


def test_a_reference_is_never_the_target_but_a_function_of_its_seed(image):
    target = image.float() / 255
    views = [reference_view(image, seed) for seed in range(300)]
    assert min((view - target).abs().max() for view in views) > 0.01
    assert torch.equal(views[7], reference_view(image, 7))
    assert len({view.numpy().tobytes() for view in views}) > 250  # there are few whole steps in so small an image
    assert all(view.min() >= 0 and view.max() <= 1 for view in views)


def test_operations_have_the_published_strengths_and_their_share_of_what_is_not_nothing():
    matrices = np.stack([reference_affine(256, 512, seed) for seed in range(4000)])
    scales = np.sqrt(np.linalg.det(matrices))
    angles = np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0])
    scaled, turned = np.abs(scales - 1) > 1e-9, np.abs(angles) > 1e-9
    share = 0.12 / (1 - 0.88**4)  # four standard errors are 0.03
    assert abs(scaled.mean() - share) < 0.03
    assert abs(turned.mean() - share) < 0.03
    assert abs(np.log2(scales[scaled]).std() - 0.2) < 0.02
    assert np.abs(angles).max() <= math.pi * 0.1
    assert abs(angles[turned].std() - math.pi * 0.1 / math.sqrt(3)) < 0.01
    shifts = matrices[~scaled & ~turned][:, :2, 2]
    whole = (shifts == shifts.round()).all(1)
    assert np.abs(shifts[whole]).max(0).tolist() == [64, 32]
    # Among the others, few have both kinds of translation; they move them apart a little more.
    assert np.abs(shifts[~whole].std(0) / (64, 32) - 1).max() < 0.1


def test_colours_are_left_alone_unless_asked_for(image):
    flat = torch.tensor([200, 90, 40], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16)
    colour = flat[:, :1, :1] / 255
    for seed in range(20):
        torch.testing.assert_close(reference_view(flat, seed), colour.expand(3, 16, 16))
    recoloured = [reference_view(flat, seed, color=True)[:, 0, 0] for seed in range(200)]
    changed = [not torch.allclose(found, colour.flatten(), atol=1e-3) for found in recoloured]
    assert 0.25 < sum(changed) / 200 < 0.55  # 1 - 0.88^4 = 0.40
    # The geometry is that of the same seed without colours.
    assert torch.equal(reference_view(image, 3), reference_view(image, 3, color=True)) or changed[3]


def test_every_draw_moves_some_pixel_by_a_pixel():
    corners = np.array([[x, y, 1] for x in (-16, 16) for y in (-12, 12)])
    for seed in range(300):
        moves = corners @ reference_affine(24, 32, seed).T - corners
        assert np.hypot(moves[:, 0], moves[:, 1]).max() >= 1


@pytest.mark.parametrize("probability", [0, -0.1, 1.2])
def test_a_probability_that_never_changes_anything_is_refused(probability):
    with pytest.raises(ValueError, match="probability"):
        reference_affine(8, 8, 0, probability)


def test_streams_of_a_seed_are_its_own():
    from terrasynth.data import augment, mixes, perturb
    from terrasynth.systems import rough

    names = {
        augment: ("_AUGMENT", "_VIEW", "_TURN", "_ZOOM", "_JITTER", "_CUTOUT"),
        mixes: ("_CUTMIX", "_CLASSMIX", "_COPY_PASTE", "_MOSAIC"),
        reference: ("_GEOMETRY", "_COLOR"),
        perturb: ("_CHOICE", "_DROP", "_STAMP", "_GROW", "_WARP", "_COARSEN"),
        rough: ("_CROP", "_CLASS"),
    }
    streams = [getattr(module, name) for module, used in names.items() for name in used]
    assert sorted(streams) == list(range(len(streams)))
