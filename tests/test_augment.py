"""A mask follows its image, and a sample depends on its seed alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional

from terrasynth.data.augment import augment, classmix, copy_paste, cutmix, dihedral, view
from terrasynth.data.components import connected

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


@pytest.mark.parametrize("function", [augment, view])
def test_several_maps_move_as_one(function):
    image, mask = random_tile()
    maps = torch.stack([mask, mask.roll(3, 1), random_tile(1)[1], torch.arange(SIZE * SIZE).view(SIZE, SIZE).byte()])
    for seed in (*range(40), 2**62):
        moved, together = function(image, maps, seed)
        alone = [function(image, one, seed) for one in maps]
        assert together.dtype == alone[0][1].dtype
        assert torch.equal(together, torch.stack([followed for _, followed in alone]))
        assert all(torch.equal(moved, pixels) for pixels, _ in alone)


@pytest.mark.parametrize("index", range(8))
def test_several_maps_turn_and_flip_as_torch_does(index):
    image, _ = random_tile()
    maps = torch.stack([random_tile(seed)[1] for seed in range(3)])
    turned, followed = view(image, maps, index)
    for before, after in ((image, turned), (maps, followed)):
        expected = torch.rot90(before, index % 4, dims=(1, 2))
        assert torch.equal(after, torch.flip(expected, dims=(2,)) if index >= 4 else expected)


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


# --- ClassMix and Copy-Paste -----------------------------------------------------------------------------------------

IGNORE = 255
MIXES = pytest.mark.parametrize("mix", [classmix, copy_paste])


def scenes(count: int, size: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Blobs of five unequally frequent classes, some unlabelled; images say which class, tile and place they show."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    masks = np.zeros((count, size, size), dtype=np.int64)
    for mask in masks:
        for _ in range(14):
            y, x, radius = *random.uniform(0, size, 2), random.uniform(1, 6)
            value = random.choice([0, 1, 2, 3, 4, IGNORE], p=[0.25, 0.3, 0.2, 0.1, 0.05, 0.1])
            mask[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = value
    numbers = np.broadcast_to(np.arange(count)[:, None, None], masks.shape)
    places = np.broadcast_to(rows * size + columns, masks.shape)
    return torch.from_numpy(np.stack([masks, numbers, places], 1)).float(), torch.from_numpy(masks)


def flooded(mask: np.ndarray) -> list[tuple[int, set[tuple[int, int]]]]:
    """Brute force: class and pixels of every connected component, by flood fill."""
    left = {(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1])}
    found = []
    while left:
        front = [min(left)]
        value, component = mask[front[0]], set()
        while front:
            y, x = front.pop()
            if (y, x) in left and mask[y, x] == value:
                left.remove((y, x))
                component.add((y, x))
                front += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        found.append((int(value), component))
    return found


def spiral(size: int) -> np.ndarray:
    """One winding path of class 1, as wide as the path of class 0 between its turns."""
    mask, (y, x), (dy, dx) = np.zeros((size, size), dtype=np.int64), (0, 0), (0, 1)
    mask[0, 0] = 1
    for length in [size - 1, *np.repeat(np.arange(size - 1, 0, -2), 2)]:
        for _ in range(length):
            y, x = y + dy, x + dx
            mask[y, x] = 1
        dy, dx = dx, -dy
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        *scenes(6)[1].numpy(),
        *np.random.default_rng(0).integers(0, 2, (4, 24, 31)),
        *(np.random.default_rng(1).random((4, 24, 31)) < 0.6).astype(np.int64),
        spiral(33),
        spiral(32).T,
        np.zeros((5, 7), dtype=np.int64),
        np.indices((6, 5)).sum(0) % 2,
    ],
)
def test_components_are_those_of_a_flood_fill(mask):
    components, classes = connected(mask)
    ours = {
        (int(classes[c]), frozenset(zip(*map(np.ndarray.tolist, np.nonzero(components == c)), strict=True)))
        for c in range(len(classes))
    }
    assert ours == {(value, frozenset(pixels)) for value, pixels in flooded(mask)}
    assert components.max() + 1 == len(classes)


@MIXES
def test_a_mix_moves_image_and_mask_alike_and_pastes_nothing_unlabelled(mix):
    images, masks = scenes(64)
    before = images.clone(), masks.clone()
    mixed, mixed_masks = mix(images, masks, torch.arange(64))
    assert (mixed.dtype, mixed_masks.dtype) == (images.dtype, masks.dtype)
    assert torch.equal(mixed[:, 0], mixed_masks.float())
    own = torch.arange(64).view(-1, 1, 1)
    pasted = mixed[:, 1] != own
    assert torch.equal(mixed[:, 1][pasted], ((own - 1) % 64).expand_as(pasted)[pasted].float())
    assert torch.equal(mixed_masks[~pasted], masks[~pasted])
    assert not (mixed_masks[pasted] == IGNORE).any()
    assert torch.equal(images, before[0])
    assert torch.equal(masks, before[1])
    assert 0.3 < pasted.flatten(1).any(1).float().mean() <= 0.6


@MIXES
def test_a_mix_is_a_function_of_the_seed_and_of_what_it_mixes(mix):
    images, masks = scenes(6)
    images, masks = images.repeat(4, 1, 1, 1), masks.repeat(4, 1, 1)
    seeds = (torch.arange(24) * 2**40) + 5
    mixed = mix(images, masks, seeds)[0]
    # Every neighbour stays: the same pairs in the other half of the batch.
    turned = mix(images, masks, seeds.roll(12))[0]
    assert torch.equal(turned, mixed.roll(12, dims=0))
    assert not torch.equal(mix(images, masks, seeds + 1)[0], mixed)
    low = mix(images, masks, torch.arange(24))[0]
    assert not torch.equal(mix(images, masks, torch.arange(24) + 2**32)[0], low)


def test_classmix_pastes_half_of_the_classes_of_the_neighbour_with_all_their_pixels():
    images, masks = scenes(400)
    mixed, _ = classmix(images, masks, torch.arange(400))
    pasted = mixed[:, 1] != torch.arange(400).view(-1, 1, 1)
    applied = 0
    for i in range(400):
        donor = masks[i - 1]
        present = sorted(set(donor.unique().tolist()) - {IGNORE})
        classes = donor[pasted[i]].unique().tolist()
        if classes:
            applied += 1
            assert len(classes) == len(present) // 2
            assert torch.equal(pasted[i], torch.isin(donor, torch.tensor(classes)))
            assert torch.equal(mixed[i, 2], images[i, 2])  # in their places
    assert abs(applied / 400 - 0.5) < 0.08


def test_classmix_draws_every_pair_of_four_classes_equally_often():
    masks = torch.arange(4).repeat(2000, 2, 1)
    _, mixed = classmix(masks[:, None], masks + 4 * (torch.arange(2000) % 2).view(-1, 1, 1), torch.arange(2000))
    drawn = Counter(
        tuple(row) for row in ((mixed[:, 0] // 4) != (torch.arange(2000) % 2)[:, None]).tolist() if any(row)
    )
    assert abs(sum(drawn.values()) - 1000) < 70
    assert len(drawn) == 6
    assert all(abs(count - 167) < 45 for count in drawn.values())


def test_classmix_from_a_tile_of_one_class_changes_nothing():
    images, masks = batch(64)
    assert torch.equal(classmix(images, masks, torch.arange(64))[1], masks)


def symmetric(pixels: set[tuple[int, int]]) -> list[frozenset[tuple[int, int]]]:
    """The shape in its eight positions, each moved into the corner."""
    shapes = []
    for turn in range(4):
        for mirror in (1, -1):
            points = [(y, mirror * x) for y, x in pixels]
            for _ in range(turn):
                points = [(x, -y) for y, x in points]
            top, left = min(y for y, _ in points), min(x for _, x in points)
            shapes.append(frozenset((y - top, x - left) for y, x in points))
    return shapes


def test_copy_paste_puts_whole_objects_of_one_class_turned_somewhere_in_the_tile():
    size = 32
    images, masks = scenes(200, size)
    mixed, mixed_masks = copy_paste(images, masks, torch.arange(200))
    whole = positions = 0
    for i in range(200):
        pasted = (mixed[i, 1] != i).numpy()
        if not pasted.any():
            continue
        assert len(mixed_masks[i][pasted].unique()) == 1
        drawn = int(mixed_masks[i][pasted][0])
        objects = [pixels for value, pixels in flooded(masks[i - 1].numpy()) if value == drawn]
        # Every pasted pixel tells where in its donor it was.
        landed = {divmod(int(mixed[i, 2, y, x]), size): (y, x) for y, x in zip(*np.nonzero(pasted), strict=True)}
        assert landed.keys() <= set().union(*objects)
        for pixels in objects:
            there = {landed[p] for p in pixels if p in landed}
            if there:
                assert 16 <= len(pixels) <= size**2 / 4
            if len(there) == len(pixels):  # not partly under a later one
                whole += 1
                top, left = min(y for y, _ in there), min(x for _, x in there)
                shapes = symmetric(pixels)
                assert frozenset((y - top, x - left) for y, x in there) in shapes
                positions += len(set(shapes)) > 1 and there != pixels
    assert whole > 50
    assert positions > 40


def test_copy_paste_draws_rare_classes_more_often():
    """A square of class 1 and one of class 2 on class 0 in every tile; class 2 also fills half of every other tile."""
    masks = torch.zeros(1000, 32, 32, dtype=torch.int64)
    masks[:, 2:7, 2:7], masks[:, 20:25, 20:25] = 1, 2
    masks[::2, :, 14:] = 2
    _, mixed = copy_paste(masks[:, None].float(), masks, torch.arange(1000))
    # Tiles whose donor has both as small objects, as class 0 and the filled half are too large.
    receivers = [i for i in range(1000) if i % 2 == 0]
    drawn = Counter()
    for i in receivers:
        grown = [(mixed[i] == c).sum() > (masks[i] == c).sum() for c in (1, 2)]
        changed = mixed[i] != masks[i]
        if changed.any():
            drawn[int(mixed[i][changed][0])] += 1
        assert not all(grown)
    counts = torch.bincount(masks.flatten())
    expected = float((1 / counts[1]) / (1 / counts[1] + 1 / counts[2]))
    assert expected > 0.9
    assert abs(drawn[1] / sum(drawn.values()) - expected) < 0.05


def test_objects_land_anywhere_in_every_position():
    """An L of 17 pixels: eight positions, all places inside the tile."""
    masks = torch.zeros(2, 32, 32, dtype=torch.int64)
    masks[0, 3:15, 4] = 1
    masks[0, 14, 4:9] = 1
    images = masks[:, None].float()
    corners, shapes = set(), Counter()
    for seed in range(600):
        _, mixed = copy_paste(images, masks, torch.tensor([10**6, seed]))
        points = (mixed[1] == 1).nonzero()
        if len(points):
            corner = points.min(0).values
            corners.add((int(corner[0]), int(corner[1])))
            shapes[frozenset(map(tuple, (points - corner).tolist()))] += 1
    assert len(shapes) == 8
    assert min(shapes.values()) > 18
    tops, lefts = {y for y, _ in corners}, {x for _, x in corners}
    assert tops == lefts == set(range(28))


def test_every_symmetry_of_the_square_is_taken_back_by_its_inverse():
    tensor = torch.randn(2, 3, 5, 5)
    seen = set()
    for element in range(8):
        turned = dihedral(tensor, element)
        seen.add(turned.numpy().tobytes())
        assert torch.equal(dihedral(turned, element, inverse=True), tensor)
    assert len(seen) == 8
