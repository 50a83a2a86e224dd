"""Boundary noise against brute force: what each operation does to a map, and how far from a boundary it reaches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from terrasynth.data.perturb import coarsen, drop, grow, perturb, stamp, warp

IGNORE = 255
MOVING = ("grow", "warp", "coarsen")
ALL = ("drop", "stamp", *MOVING)


def scenes(count: int, size: tuple[int, int] = (48, 40), seed: int = 0, unlabelled: bool = True) -> torch.Tensor:
    """Blobs, stripes and single pixels of five classes, some unlabelled; uint8 (count, *size)."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    masks = np.zeros((count, *size), dtype=np.uint8)
    for mask in masks:
        for value in random.permutation([0, 1, 1, 2, 2, 3, 4, IGNORE if unlabelled else 3]):
            y, x, radius = random.uniform(0, size[0]), random.uniform(0, size[1]), random.uniform(1, 9)
            mask[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = value
        mask[:, random.integers(size[1])] = 3
        mask[random.integers(size[0], size=9), random.integers(size[1], size=9)] = random.integers(5, size=9)
    return torch.from_numpy(masks)


def distance_to_others(mask: np.ndarray) -> np.ndarray:
    """From every labelled pixel to the nearest one of another class; infinite where there is none."""
    result = np.full(mask.shape, np.inf)
    for value in set(np.unique(mask)) - {IGNORE}:
        others = (mask != value) & (mask != IGNORE)
        if others.any():
            inside = mask == value
            result[inside] = ndimage.distance_transform_edt(~others)[inside]
    return result


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1, 3, 7.3])
@pytest.mark.parametrize("operations", [MOVING, *((name,) for name in MOVING)], ids=" ".join)
def test_nothing_farther_than_the_strength_from_another_class_changes(operations, strength):
    masks = scenes(30)
    changed = perturb(masks, torch.arange(30), strength, operations=operations) != masks
    distances = np.stack([distance_to_others(mask) for mask in masks.numpy()])
    assert distances[changed.numpy()].max(initial=0) <= strength
    if strength >= 3:
        # What is left is used: not all noise is weak.
        assert distances[changed.numpy()].max() > strength / 2
        assert changed.flatten(1).any(1).all()


@pytest.mark.parametrize("strength", [2, 5])
def test_regions_and_discs_change_nothing_far_away_either(strength):
    masks = scenes(30, unlabelled=False)
    rough = perturb(masks, torch.arange(30), strength, operations=("drop", "stamp"))
    for mask, changed in zip(masks.numpy(), (rough != masks).numpy(), strict=True):
        # A disc's centre is within 2 strengths, its edge within 1 more. Small regions are small.
        assert distance_to_others(mask)[changed].max(initial=0) <= 3 * strength + 1


@pytest.mark.parametrize("ignore", [0, 3, IGNORE])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_unlabelled_pixels_stay_and_no_others_become_so(ignore, dtype):
    masks = scenes(40).to(dtype)
    before = masks.clone()
    rough = perturb(masks, torch.arange(40), 6, ignore_index=ignore)
    assert rough.dtype == dtype
    assert torch.equal(rough == ignore, masks == ignore)
    assert torch.equal(masks, before)
    for mask, own in zip(masks, rough, strict=True):
        assert set(own.unique().tolist()) <= set(mask.unique().tolist())


@pytest.mark.parametrize("operations", [ALL, *((name,) for name in ALL)], ids=" ".join)
def test_a_map_is_a_function_of_its_mask_and_seed(operations):
    masks = scenes(24)
    seeds = torch.arange(24) + 2**40
    rough = perturb(masks, seeds, 5, operations=operations)
    order = torch.randperm(24)
    assert torch.equal(perturb(masks[order], seeds[order], 5, operations=operations), rough[order])
    for row in range(24):
        assert torch.equal(perturb(masks[row : row + 1], seeds[row : row + 1], 5, operations=operations)[0], rough[row])
    assert not torch.equal(perturb(masks, seeds - 2**40, 5, operations=operations), rough)


def test_every_operation_may_be_left_out_and_all_do_something():
    masks = scenes(30, (64, 64))
    assert torch.equal(perturb(masks, torch.arange(30), 5, operations=()), masks)
    shares = {name: (perturb(masks, torch.arange(30), 5, operations=(name,)) != masks).float().mean() for name in ALL}
    assert min(shares.values()) > 0.001, shares
    assert max(shares.values()) < 0.5, shares


def test_stronger_noise_changes_more():
    masks = scenes(40, (64, 64))
    shares = [float((perturb(masks, torch.arange(40), s) != masks).float().mean()) for s in (1, 2, 4, 8)]
    assert shares == sorted(shares)
    assert shares[-1] > 1.5 * shares[2] > 2 * shares[0]


def test_uniform_and_wholly_unlabelled_maps_stay():
    masks = torch.stack([torch.full((20, 30), value, dtype=torch.uint8) for value in (0, 7, IGNORE)]).repeat(10, 1, 1)
    assert torch.equal(perturb(masks, torch.arange(30), 6), masks)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (5, 4)])
def test_maps_smaller_than_the_noise_are_taken(size):
    masks = torch.randint(0, 3, (20, *size)).byte()
    assert perturb(masks, torch.arange(20), 8).shape == masks.shape


def test_impossible_settings_are_refused():
    for strength, operations in ((0, ALL), (math.nan, ALL), (math.inf, ALL), (1, ("shrink",))):
        with pytest.raises(ValueError, match="strength"):
            perturb(scenes(1), torch.arange(1), strength, operations=operations)


# --- one by one ------------------------------------------------------------------------------------------------------


def disc(radius: float) -> np.ndarray:
    reach = math.floor(radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return y**2 + x**2 <= radius**2


@pytest.mark.parametrize("seed", range(4))
def test_growing_is_a_dilation_of_every_class_by_its_own_disc_in_the_order_of_ranks(seed):
    random = np.random.default_rng(seed)
    masks = scenes(3, seed=seed)
    ranks = torch.from_numpy(np.stack([np.insert(random.permutation(255) + 1, IGNORE, 0) for _ in range(3)])).byte()
    radii = torch.from_numpy(random.uniform(0, 6, (3, 256)))
    grown = grow(masks, ranks, radii.gather(1, masks.flatten(1).long()).view_as(masks))
    for mask, rank, radius, found in zip(masks.numpy(), ranks.numpy(), radii.numpy(), grown.numpy(), strict=True):
        expected = mask.copy()
        for value in sorted(set(np.unique(mask)) - {IGNORE}, key=lambda value: rank[value]):
            reached = ndimage.binary_dilation(mask == value, disc(radius[value]))
            expected[reached & (rank[value] > rank[mask])] = value
        # Each later class covers the earlier ones, but for those that rank higher by themselves.
        expected[mask == IGNORE] = IGNORE
        np.testing.assert_array_equal(found, expected)


def test_of_two_classes_one_is_dilated_and_the_other_eroded_by_the_same_disc():
    masks = scenes(5, unlabelled=False).clamp_max(1)
    ranks = torch.arange(256).byte().expand(5, -1)
    up, down = (
        grow(masks, order, torch.full(masks.shape, 2.5))
        for order in (ranks, ranks.index_copy(1, torch.tensor([0, 1]), torch.tensor([[1, 0]] * 5).byte()))
    )
    for mask, dilated, eroded in zip(masks.numpy(), up.numpy(), down.numpy(), strict=True):
        np.testing.assert_array_equal(dilated, ndimage.binary_dilation(mask, disc(2.5)))
        np.testing.assert_array_equal(eroded, ndimage.binary_erosion(mask, disc(2.5), border_value=1))


def test_reach_may_differ_from_pixel_to_pixel():
    masks, random = scenes(2, (20, 16)), np.random.default_rng(0)
    reach = random.uniform(0, 4, masks.shape)
    ranks = torch.arange(256).byte().expand(2, -1)
    grown = grow(masks, ranks, torch.from_numpy(reach))
    for mask, radius, found in zip(masks.numpy(), reach, grown.numpy(), strict=True):
        for y, x in np.ndindex(mask.shape):
            near = np.hypot(*(np.indices(mask.shape) - np.array([[[y]], [[x]]]))) <= radius
            reached = mask[near & (mask != IGNORE)].max(initial=0)
            assert found[y, x] == (IGNORE if mask[y, x] == IGNORE else max(reached, mask[y, x]))


def test_warping_takes_labels_from_where_the_offsets_point():
    masks = scenes(4)
    offsets = torch.randint(-6, 7, (4, 2, *masks.shape[1:]))
    warped = warp(masks, offsets)
    for mask, offset, found in zip(masks.numpy(), offsets.numpy(), warped.numpy(), strict=True):
        for y, x in np.ndindex(mask.shape):
            row = min(max(y + offset[0, y, x], 0), mask.shape[0] - 1)
            column = min(max(x + offset[1, y, x], 0), mask.shape[1] - 1)
            lost = IGNORE in (mask[y, x], mask[row, column])
            assert found[y, x] == (mask[y, x] if lost else mask[row, column])


@pytest.mark.parametrize("factor", range(1, 9))
def test_coarsening_is_sampling_and_repeating(factor):
    size = (7 * factor, 5 * factor)
    masks = scenes(3, size, unlabelled=False)
    coarse = coarsen(masks, torch.full((3,), factor), torch.zeros(3, 2, dtype=torch.int64))
    middle = masks[:, factor // 2 :: factor, factor // 2 :: factor]
    assert torch.equal(coarse, middle.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
    if factor > 1:
        # Another origin is another raster, cut off by the frame.
        padded = torch.nn.functional.pad(masks, (1, 0, 1, 0))
        whole = padded[:, : (len(padded[0]) // factor) * factor, : (len(padded[0, 0]) // factor) * factor]
        middle = whole[:, factor // 2 :: factor, factor // 2 :: factor]
        expected = middle.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, 1:, 1:]
        moved = coarsen(masks, torch.full((3,), factor), torch.ones(3, 2, dtype=torch.int64))
        inside = moved[:, : expected.shape[1], : expected.shape[2]]
        assert torch.equal(inside, expected)


def test_small_regions_take_the_class_of_most_of_their_border():
    mask = torch.zeros(20, 20, dtype=torch.uint8)
    mask[:, 10:] = 1
    mask[3:5, 9:12] = 2  # three pixels of six touch class 0 or 1 each side: 1 has the longer border
    mask[10:16, 2:8] = 3  # 36 pixels
    mask[18:, :2] = 4
    mask[17, :2] = IGNORE
    found = drop(mask.expand(40, -1, -1), list(range(40)), 2.0)
    vanished = {value: float((found[:, mask == value] != value).all(1).float().mean()) for value in range(5)}
    assert vanished[0] == vanished[1] == vanished[3] == 0
    assert 0.25 < vanished[2] < 0.75
    assert 0.25 < vanished[4] < 0.75
    gone = found[(found[:, 3, 9] != 2)][0]
    assert (gone[3:5, 9:12] == 1).all()
    gone = found[(found[:, 19, 0] != 4)][0]
    assert (gone[18:, :2] == 0).all()
    # With unlabelled pixels all round there is nothing to take.
    island = torch.full((1, 9, 9), IGNORE, dtype=torch.uint8)
    island[0, 4, 4] = 1
    assert all(torch.equal(drop(island, [seed], 5.0), island) for seed in range(8))


def test_which_regions_are_small_is_a_matter_of_area():
    masks = scenes(20, (64, 64))
    found = drop(masks, list(range(20)), 3.0)
    for mask, dropped in zip(masks.numpy(), found.numpy(), strict=True):
        for value in set(np.unique(mask)) - {IGNORE}:
            regions, count = ndimage.label(mask == value)
            for region in range(1, count + 1):
                now = np.unique(dropped[regions == region])
                # A region vanishes as a whole or stays as it is.
                assert len(now) == 1
                assert now[0] == value or (regions == region).sum() <= math.pi * 9


def test_discs_are_drawn_one_over_the_other_inside_the_frame():
    random = np.random.default_rng(0)
    masks = scenes(4)
    centres = random.integers(-5, 53, (4, 6, 2))
    radii, labels = random.uniform(-1, 6, (4, 6)), random.integers(0, 5, (4, 6)).astype(np.uint8)
    stamped = stamp(masks, *map(torch.from_numpy, (centres, radii, labels)))
    rows, columns = np.indices(masks.shape[1:])
    for mask, own, found in zip(masks.numpy(), zip(centres, radii, labels, strict=True), stamped.numpy(), strict=True):
        expected = mask.copy()
        for (y, x), radius, label in zip(*own, strict=True):
            expected[(np.hypot(rows - y, columns - x) <= radius) & (mask != IGNORE)] = label
        np.testing.assert_array_equal(found, expected)


def test_stamped_discs_have_the_class_across_the_boundary_and_lie_near_it():
    masks = torch.zeros(60, 96, 96, dtype=torch.uint8)
    masks[:, :, 40:] = 1
    rough = perturb(masks, torch.arange(60), 4, operations=("stamp",))
    changed = rough != masks
    assert changed[:, :, :40].any()
    assert changed[:, :, 40:].any()
    columns = changed.nonzero()[:, 2]
    assert columns.min() >= 40 - 3 * 4 - 1
    assert columns.max() <= 40 + 3 * 4
    # Some are islands: farther away than what touches the boundary.
    assert any(ndimage.label(own == value)[1] > 1 for own in rough.numpy() for value in (0, 1))
