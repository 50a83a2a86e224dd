"""Operations on batches: a mask follows its image pixel for pixel, and each is what brute force makes of it."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torchvision.transforms.v2 import functional as torchvision

from terrasynth.data.augment import (
    augment,
    classmix,
    copy_paste,
    cutmix,
    cutout,
    dihedral,
    jitter,
    mosaic,
    turn,
    view,
    zoom,
)

IGNORE = 255


def plausible(images, masks, seeds, ignore_index=IGNORE):
    return copy_paste(images, masks, seeds, ignore_index, where="plausible")


ALONE = [turn, zoom, cutout]
MIXES = [cutmix, mosaic, classmix, copy_paste, plausible]
EVERY = pytest.mark.parametrize("operation", [*ALONE, *MIXES], ids=lambda operation: operation.__name__)


def blobs(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Discs of five unequally frequent classes and some unlabelled, int64 (count, height, width)."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    masks = np.zeros((count, height, width), dtype=np.int64)
    for mask in masks:
        for _ in range(height * width // 70):
            y, x, radius = random.uniform(0, height), random.uniform(0, width), random.uniform(1, 6)
            value = random.choice([0, 1, 2, 3, 4, IGNORE], p=[0.25, 0.3, 0.2, 0.1, 0.05, 0.1])
            mask[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = value
    return torch.from_numpy(masks)


def told(masks: torch.Tensor) -> torch.Tensor:
    """Images that say which class, sample, row and column each pixel shows, float (B, 4, H, W)."""
    count, height, width = masks.shape
    places = torch.meshgrid(*map(torch.arange, (count, height, width)), indexing="ij")
    return torch.stack([masks, *places], 1).float()


def calm(masks: torch.Tensor) -> torch.Tensor:
    """Pixels whose 5 x 5 neighbourhood is of one class."""
    padded = functional.pad(masks[:, None].float(), (2, 2, 2, 2), mode="replicate")
    return (functional.max_pool2d(padded, 5, 1) == -functional.max_pool2d(-padded, 5, 1))[:, 0]


@pytest.mark.parametrize("operation", [*ALONE, *MIXES], ids=lambda operation: operation.__name__)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    count=st.integers(1, 6),
    height=st.integers(9, 40),
    width=st.none() | st.integers(9, 40),
    image_type=st.sampled_from([torch.uint8, torch.float32, torch.float64]),
    mask_type=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    seed=st.integers(0, 2**62),
)
def test_image_and_mask_move_alike(operation, count, height, width, image_type, mask_type, seed):
    masks = blobs(count, height, width or height, seed % 1000).to(mask_type)
    images = masks[:, None].expand(-1, 2, -1, -1).to(image_type)
    before = images.clone(), masks.clone()
    seeds = (seed + torch.arange(count)) % 2**62
    moved, followed = operation(images, masks, seeds)
    assert (moved.shape, moved.dtype) == (images.shape, image_type)
    assert (followed.shape, followed.dtype) == (masks.shape, mask_type)
    assert torch.equal(images, before[0])
    assert torch.equal(masks, before[1])
    assert set(followed.unique().tolist()) <= {*masks.unique().tolist(), IGNORE}
    # What is interpolated says its class inside it, what is hidden says none.
    settled = calm(followed) if operation is zoom else torch.ones_like(masks, dtype=torch.bool)
    settled &= (followed != IGNORE) | (operation is not cutout)
    difference = (moved.double() - followed[:, None]).abs().amax(1)
    assert difference[settled].max().item() < (1e-4 if operation is zoom else 1e-12) if settled.any() else True
    if operation in (classmix, copy_paste, plausible):
        assert not ((followed == IGNORE) & (masks != IGNORE)).any()


@pytest.mark.parametrize("operation", ALONE, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("width", [32, 20])
def test_a_sample_comes_out_the_same_in_any_batch(operation, width):
    masks = blobs(6, 32, width)
    images, seeds = torch.rand(6, 3, 32, width), torch.arange(6) * 2**40 + 3
    together = operation(images, masks, seeds)
    order = torch.tensor([4, 0, 5, 2])
    for whole, some in zip(together, operation(images[order], masks[order], seeds[order]), strict=True):
        assert torch.equal(some, whole[order])
    for i in range(6):
        one = operation(images[i : i + 1], masks[i : i + 1], seeds[i : i + 1])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(one, together, strict=True))
    assert not torch.equal(operation(images, masks, seeds + 2**32)[0], together[0])


@pytest.mark.parametrize("mix", MIXES, ids=lambda operation: operation.__name__)
def test_a_mix_is_a_function_of_the_seed_and_of_what_it_mixes(mix):
    masks = blobs(6, 32, 32).repeat(4, 1, 1)
    images, seeds = torch.rand(6, 3, 32, 32).repeat(4, 1, 1, 1), torch.arange(24) * 2**40 + 5
    mixed = mix(images, masks, seeds)
    # Every neighbour stays: the same samples in the other half of the batch.
    for ours, theirs in zip(mixed, mix(images, masks, seeds.roll(12)), strict=True):
        assert torch.equal(theirs, ours.roll(12, dims=0))
    assert not torch.equal(mix(images, masks, seeds + 2**32)[0], mixed[0])
    untouched = (mixed[0] == images).flatten(1).all(1)
    assert 4 <= untouched.sum() <= 22


@EVERY
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_an_empty_batch_stays_one(operation, kind):
    masks = torch.zeros(0, 16, 16, dtype=torch.uint8)
    images, masks = operation(torch.zeros(0, 3, 16, 16, dtype=kind), masks, torch.zeros(0, dtype=torch.int64))
    assert (images.shape, images.dtype, masks.shape) == ((0, 3, 16, 16), kind, (0, 16, 16))


@EVERY
def test_shapes_that_do_not_fit_are_refused(operation):
    images, masks, seeds = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64), torch.arange(2)
    for wrong in (
        (images, masks[:1], seeds),
        (images, masks[..., :7], seeds),
        (images[0], masks, seeds),
        (images, masks[:, None], seeds),
        (images, masks, seeds[:1]),
        (images, masks, seeds[:, None]),
    ):
        with pytest.raises(ValueError, match=r"must fit together, not \(.*\)"):
            operation(*wrong)
    with pytest.raises(ValueError, match="non-negative"):
        operation(images, masks, seeds - 2)


@pytest.mark.parametrize("mix", [classmix, copy_paste])
def test_masks_that_are_no_class_indices_are_refused(mix):
    images, seeds = torch.zeros(2, 3, 8, 8), torch.arange(2)
    with pytest.raises(ValueError, match="whole numbers, not"):
        mix(images, torch.zeros(2, 8, 8), seeds)
    with pytest.raises(ValueError, match="for the ignore index 255; there is -1"):
        mix(images, torch.full((2, 8, 8), -1), seeds)
    mix(images, torch.full((2, 8, 8), -1), seeds, ignore_index=-1)


@pytest.mark.parametrize("mix", [classmix, copy_paste])
def test_bytes_with_a_sign_hold_the_largest_class_beside_unlabelled_pixels(mix):
    masks = blobs(6, 32, 32).long()
    masks[masks == IGNORE], masks[masks == 2] = -1, 127
    images, seeds = torch.rand(6, 3, 32, 32), torch.arange(6)
    expected = mix(images, masks, seeds, ignore_index=-1)
    found = mix(images, masks.to(torch.int8), seeds, ignore_index=-1)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].long(), expected[1])
    assert (masks == 127).any()


def test_what_does_not_fit_is_told():
    image, mask = torch.zeros(3, 16, 16).byte(), torch.zeros(8, 8).byte()
    for function in (augment, view):
        with pytest.raises(ValueError, match="differ in size"):
            function(image, mask, 3)
    images, seeds = torch.zeros(2, 3, 8, 8), torch.arange(2)
    for kind in (torch.bool, torch.float32):
        with pytest.raises(ValueError, match=f"whole numbers, not {kind}"):
            cutout(images, torch.zeros(2, 8, 8, dtype=kind), seeds)
    with pytest.raises(ValueError, match="seeds are whole numbers"):
        turn(images, torch.zeros(2, 8, 8), seeds.float())


def test_colors_in_other_numbers_are_refused():
    mask = torch.zeros(8, 8).byte()
    for image, wrong in ((torch.zeros(3, 8, 8).short(), "not torch.int16"), (torch.zeros(4, 8, 8), "three channels")):
        with pytest.raises(ValueError, match=wrong):
            augment(image, mask, 0)
        with pytest.raises(ValueError, match=wrong):
            jitter(image[None], torch.zeros(1).long())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY
def test_what_comes_from_a_gpu_stays_there_and_is_the_same(operation):
    masks = blobs(6, 32, 32)
    images, seeds = torch.rand(6, 3, 32, 32), torch.arange(6)
    there = operation(images.cuda(), masks.cuda(), seeds)
    assert all(tensor.is_cuda for tensor in there)
    for ours, theirs in zip(operation(images, masks, seeds), there, strict=True):
        assert torch.allclose(ours, theirs.cpu(), atol=1e-5)
    colors = jitter(images.cuda(), seeds)
    assert torch.allclose(colors.cpu(), jitter(images, seeds), atol=1e-5)


# --- What a seed gave, it gives --------------------------------------------------------------------------------------


def digest(*tensors: torch.Tensor) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return whole.hexdigest()[:16]


@pytest.fixture(scope="module")
def pinned() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    images, masks = [], []
    for seed in range(32):
        random = np.random.default_rng(seed)
        mask = random.integers(0, 5, (6, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        mask[mask == 4] = IGNORE
        images.append(torch.from_numpy(random.integers(0, 256, (3, 48, 48), dtype=np.uint8)))
        masks.append(torch.from_numpy(mask))
    return torch.stack(images), torch.stack(masks), [number * 2**35 + 7 for number in range(32)]


def test_trained_models_saw_what_augment_gives(pinned):
    """Digests of version 0.1: whole numbers exactly, and pixels by sums over random weights."""
    pairs = [augment(*sample) for sample in zip(*pinned, strict=True)]
    assert digest(*(mask for _, mask in pairs)) == "35093e4cb39d1ea0"
    weights = torch.from_numpy(np.random.default_rng(99).random((3, 48, 48)))
    sums = [float((image.double() * weights).sum()) for image, _ in pairs[:8]]
    expected = [1542.3586, 1519.4188, 1863.8828, 1770.3862, 2023.0773, 1443.9194, 1942.9631, 1978.3398]
    assert sums == pytest.approx(expected, abs=2e-3)


def test_augment_is_bit_for_bit_these_steps(pinned):
    """As it was first written, so that resumed runs go on bit for bit on any machine."""
    luma = torch.tensor([[0.299, 0.587, 0.114]])
    for image, mask, seed in zip(*pinned, strict=True):
        random = np.random.default_rng((seed, 0))
        element = int(random.integers(8))
        turned, labels = (torch.rot90(tensor, element % 4, dims=(-2, -1)) for tensor in (image, mask))
        if element >= 4:
            turned, labels = turned.flip(-1), labels.flip(-1)
        pixels = turned.float() / 255
        side = math.sqrt(random.uniform(0.5, 1.0)) * 48
        stretch = math.sqrt(math.exp(random.uniform(math.log(0.9), math.log(1.1))))
        height, width = min(48, round(side / stretch)), min(48, round(side * stretch))
        top, left = int(random.integers(48 - height + 1)), int(random.integers(48 - width + 1))
        box = (slice(top, top + height), slice(left, left + width))
        pixels, labels = pixels[:, *box], labels[box]
        if (height, width) != (48, 48):
            pixels = functional.interpolate(pixels[None], size=(48, 48), mode="bilinear", align_corners=False)[0]
            labels = functional.interpolate(labels[None, None], size=(48, 48), mode="nearest-exact")[0, 0]
        brightness, contrast, saturation = random.uniform(0.8, 1.2, size=3).tolist()
        pixels = pixels.flatten(1)
        grey = brightness * (luma @ pixels.mean(1, keepdim=True))
        matrix = saturation * torch.eye(3) + (1 - saturation) * luma.expand(3, 3)
        mixed = torch.addmm(((1 - contrast) * grey).expand(3, 1), matrix, pixels, alpha=contrast * brightness)
        ours, followed = augment(image, mask, seed)
        assert torch.equal(ours, mixed.view(3, 48, 48).clamp(0, 1))
        assert torch.equal(followed, labels.long())


def test_views_and_mixes_give_what_they_gave(pinned):
    images, masks, seeds = pinned
    views = [view(image, mask, 3 * i) for i, (image, mask) in enumerate(zip(images, masks, strict=True))]
    assert digest(*(mask for _, mask in views)) == "0a71ef055d5972c0"
    expected = {cutmix: "531e556c9c88d71d", classmix: "76d132ed51d49eb0", copy_paste: "5b248f16244602cc"}
    for mix, was in expected.items():
        assert digest(*mix(images, masks.long(), torch.tensor(seeds))) == was


def test_augment_takes_float_images_and_tiles_that_are_not_square():
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    mask = blobs(1, 24, 24)[0]
    for seed in range(8):
        ours, theirs = augment(image, mask, seed), augment(image.float() / 255, mask, seed)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    wide = blobs(1, 24, 40)[0]
    for seed in range(40):
        moved, followed = augment(wide.expand(3, -1, -1).float() / 255, wide, seed)
        assert moved.shape == (3, 24, 40)
        inside = calm(followed[None])[0]
        for value in followed[inside].unique():
            colors = moved[:, inside & (followed == value)]
            assert (colors.amax(1) - colors.amin(1)).max() < 1e-5


# --- Flips and turns, zooms, colours ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "shapes"), [(10, 8), (14, 4)])
def test_turns_are_the_symmetries_that_keep_the_shape_equally_often(width, shapes):
    mask = torch.arange(10 * width).view(1, 10, width).repeat(800, 1, 1)
    turned, followed = turn(mask[:, None], mask, torch.arange(800))
    square = mask[0].numpy()
    symmetries = [np.rot90(one, turns) for one in (square, square[:, ::-1]) for turns in range(4)]
    expected = {np.ascontiguousarray(one).tobytes() for one in symmetries if one.shape == square.shape}
    counts = Counter(one.tobytes() for one in followed.numpy())
    assert counts.keys() == expected
    assert len(counts) == shapes
    assert all(abs(number - 800 / shapes) < 50 for number in counts.values())
    assert torch.equal(turned[:, 0], followed)


def window(ramp: torch.Tensor) -> tuple[int, int]:
    """First pixel and length of what was magnified to `ramp`, which tells places along a line."""
    size = len(ramp)
    step = float(ramp[size // 2 + 1] - ramp[size // 2])
    first = float(ramp[size // 2]) + 0.5 - step * (size // 2 + 0.5)
    assert first == pytest.approx(round(first), abs=1e-3)
    assert step * size == pytest.approx(round(step * size), abs=1e-3)
    return round(first), round(step * size)


@pytest.mark.parametrize("width", [32, 44])
def test_a_zoom_is_what_every_pixel_reads_at_its_place(width):
    """Brute force in float64: pixel centres, and the window's edge repeated."""
    count, height = 12, 32
    masks = blobs(count, height, width)
    images = torch.cat([torch.rand(count, 1, height, width), told(masks)[:, 2:]], 1)
    zoomed, followed = zoom(images, masks, torch.arange(count))
    areas = []
    for i in range(count):
        (top, rows), (left, columns) = window(zoomed[i, 1, :, 0]), window(zoomed[i, 2, 0])
        assert 0.9 - 0.1 < rows / height / (columns / width) < 1.1 + 0.1
        areas.append(rows * columns / (height * width))
        for y in range(0, height, 3):
            for x in range(0, width, 3):
                v, u = (y + 0.5) * rows / height, (x + 0.5) * columns / width
                assert followed[i, y, x] == masks[i, top + int(v), left + int(u)]
                v0, u0 = max(v - 0.5, 0), max(u - 0.5, 0)
                value = 0.0
                for down in (0, 1):
                    for along in (0, 1):
                        weight = abs(1 - down - v0 % 1) * abs(1 - along - u0 % 1)
                        place = min(int(v0) + down, rows - 1), min(int(u0) + along, columns - 1)
                        value += weight * float(images[i, 0, top + place[0], left + place[1]])
                assert float(zoomed[i, 0, y, x]) == pytest.approx(value, abs=1e-4)
    assert 0.45 < min(areas) < 0.7 < max(areas) <= 1


def test_a_zoom_of_whole_numbers_is_the_rounded_one():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    masks, seeds = blobs(8, 32, 32), torch.arange(8)
    whole, exact = zoom(images, masks, seeds)[0], zoom(images.double(), masks, seeds)[0]
    assert (whole.double() - exact).abs().max() <= 1


def test_jitter_is_torchvisions_brightness_contrast_and_saturation():
    images = 0.35 + 0.3 * torch.rand(30, 3, 16, 16)  # nothing is clipped
    ours = jitter(images, torch.arange(30))
    for i, image in enumerate(images):
        brightness, contrast, saturation = np.random.default_rng((i, 18)).uniform(0.8, 1.2, 3)
        theirs = torchvision.adjust_brightness(image, brightness)
        theirs = torchvision.adjust_saturation(torchvision.adjust_contrast(theirs, contrast), saturation)
        # Its weights of the colours have four digits.
        assert torch.allclose(ours[i], theirs, atol=5e-4)
    whole = jitter((images * 255).byte(), torch.arange(30))
    assert whole.dtype == torch.uint8
    assert (whole.float() - 255 * jitter((images * 255).byte().float() / 255, torch.arange(30))).abs().max() <= 0.5001
    assert torch.equal(jitter(images[3:5], torch.tensor([3, 4])), ours[3:5])
    bright = jitter(torch.rand(50, 3, 8, 8), torch.arange(50))
    assert bright.min() >= 0
    assert bright.max() <= 1
    with pytest.raises(ValueError, match="must fit together"):
        jitter(images, torch.arange(3))


# --- Cutout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 25)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_cutout_hides_one_square_cut_at_the_border_and_its_labels(height, width, kind):
    count, side = 600, min(height, width) // 2
    masks = torch.randint(0, 4, (count, height, width))
    images = (255 * torch.rand(count, 2, height, width)).to(kind)
    hidden, hidden_masks = cutout(images, masks, torch.arange(count), -1)
    centres = Counter()
    for i in range(count):
        gone = hidden_masks[i] == -1
        points = gone.nonzero()
        (top, left), (bottom, right) = points.min(0).values.tolist(), (points.max(0).values + 1).tolist()
        assert len(points) == (bottom - top) * (right - left)
        for first, last, limit in ((top, bottom, height), (left, right, width)):
            assert last - first <= side + 1
            assert last - first >= side or first == 0 or last == limit
        assert torch.equal(hidden[i][:, ~gone], images[i][:, ~gone])
        assert torch.equal(hidden_masks[i][~gone], masks[i][~gone])
        for channel in range(2):
            mean = images[i, channel].double().mean()
            assert (hidden[i, channel][gone].double() - mean).abs().max() <= (0.5 if kind == torch.uint8 else 1e-4)
        centres[(top + bottom > height, left + right > width)] += 1
    assert len(centres) == 4
    # Brute force over all centres, with the rounding of a half to the even.
    lengths = [
        np.mean([min(limit, round(c + 0.5 + s / 2)) - max(0, round(c + 0.5 - s / 2)) for c in range(limit)])
        for limit, s in ((height, min(height, width) / 2), (width, min(height, width) / 2))
    ]
    assert (hidden_masks == -1).flatten(1).sum(1).float().mean() == pytest.approx(np.prod(lengths), rel=0.04)


def test_cutout_refuses_masks_that_can_not_say_unlabelled():
    with pytest.raises(ValueError, match="can not hold the ignore index -100"):
        cutout(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.arange(1), -100)


# --- Mosaic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [30, 20])
def test_a_mosaic_is_four_windows_of_four_samples_around_a_point(width):
    count, height = 400, 30
    masks = blobs(8, height, width).repeat(count // 8, 1, 1)
    mixed, _ = mosaic(told(masks), masks, torch.arange(count))
    sample, y, x = mixed[:, 1].long(), mixed[:, 2].long(), mixed[:, 3].long()
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    first, cuts, positions = Counter(), [], Counter()
    for i in range(count):
        if torch.equal(sample[i], torch.full_like(rows, i)):
            continue
        down, along = (sample[i, :, 0].diff() != 0).nonzero(), (sample[i, 0].diff() != 0).nonzero()
        assert len(down) == len(along) == 1
        cut = int(down[0]) + 1, int(along[0]) + 1
        cuts.append((cut[0] / height, cut[1] / width))
        donors = []
        for part in (
            (slice(0, cut[0]), slice(0, cut[1])),
            (slice(0, cut[0]), slice(cut[1], width)),
            (slice(cut[0], height), slice(0, cut[1])),
            (slice(cut[0], height), slice(cut[1], width)),
        ):
            # One sample, and every pixel as far from where it was.
            assert len(sample[i][part].unique()) == 1
            assert len((y[i][part] - rows[part]).unique()) == len((x[i][part] - columns[part]).unique()) == 1
            donors.append((i - int(sample[i][part][0, 0])) % count)
            positions[bool((y[i][part] - rows[part]).any())] += 1
        assert sorted(donors) == [0, 1, 2, 3]
        first[donors[0]] += 1
    assert abs(len(cuts) - count / 2) < 40
    assert min(first.values()) > 30
    assert positions[True] > positions[False]
    shares = np.array(cuts)
    assert shares.min() >= 0.18
    assert shares.max() <= 0.82
    assert np.abs(shares.mean(0) - 0.5).max() < 0.05


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_mosaic_of_fewer_than_four_samples_repeats_them(count):
    masks = blobs(count, 20, 20)
    for seed in range(20):
        mixed, followed = mosaic(told(masks), masks, torch.full((count,), seed))
        assert torch.equal(mixed[:, 0], followed.float())
        assert set(mixed[:, 1].unique().tolist()) <= set(range(count))


@pytest.mark.parametrize("mix", [cutmix, classmix], ids=lambda operation: operation.__name__)
def test_one_sample_has_nothing_to_receive(mix):
    masks = blobs(1, 20, 20)
    for seed in range(10):
        assert torch.equal(mix(told(masks), masks, torch.tensor([seed]))[0], told(masks))


# --- ClassMix and Copy-Paste -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [classmix, copy_paste, plausible], ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("ignore_index", [-100, -1, 5])
def test_any_number_may_say_unlabelled(mix, ignore_index):
    masks = blobs(16, 24, 24)
    others = torch.where(masks == IGNORE, ignore_index, masks)
    mixed, mixed_masks = mix(told(masks), masks, torch.arange(16))
    theirs, their_masks = mix(told(masks), others, torch.arange(16), ignore_index)
    assert torch.equal(mixed, theirs)
    assert torch.equal(torch.where(mixed_masks == IGNORE, ignore_index, mixed_masks), their_masks)


def pasted_objects(mixed: torch.Tensor, i: int) -> torch.Tensor:
    return mixed[i, 1] != i


def test_objects_that_are_long_keep_inside_a_narrow_tile():
    masks = torch.zeros(2, 12, 40, dtype=torch.int64)
    masks[0, 5, 3:33] = 1
    shapes = set()
    for seed in range(60):
        mixed, followed = copy_paste(told(masks), masks, torch.tensor([10**6, seed]))
        points = pasted_objects(mixed, 1).nonzero()
        if len(points):
            assert len(points) == 30
            assert (followed[1] == 1).sum() == 30
            shapes.add(tuple((points.max(0).values - points.min(0).values).tolist()))
    assert shapes == {(0, 29)}


def two_grounds() -> torch.Tensor:
    """A tile with a 5 x 5 house (2) on land (0) beside water (1), whose ship (3) is 3 x 6; and one without either."""
    masks = torch.zeros(2, 32, 32, dtype=torch.int64)
    masks[:, :, 16:] = 1
    masks[0, 4:9, 4:9] = 2
    masks[0, 20:23, 20:26] = 3
    return masks


def test_plausible_objects_lie_on_what_borders_on_their_class_and_anywhere_on_it():
    masks = two_grounds()
    images = told(masks)
    houses, ships = Counter(), 0
    for seed in range(700):
        mixed, followed = plausible(images, masks, torch.tensor([10**6, seed]))
        pasted = pasted_objects(mixed, 1)
        if not pasted.any():
            continue
        drawn = int(followed[1][pasted][0])
        covered = masks[1][pasted]
        if drawn == 2:
            assert pasted.sum() == 25
            # A tenth may reach over the shore: no whole row of five does.
            assert (covered == 1).sum() == 0
            houses[tuple(pasted.nonzero()[0].tolist())] += 1
        else:
            ships += 1
            assert (covered == 1).float().mean() >= 0.9
    rows, columns = zip(*houses, strict=True)
    assert set(columns) == set(range(12))
    assert len(set(rows)) > 24
    assert max(houses.values()) <= 9  # of some 160 in 336 places
    assert ships > 80


def test_objects_are_left_out_where_their_class_can_not_lie():
    masks = two_grounds()
    masks[1] = 1  # water alone
    counts = Counter()
    for seed in range(60):
        for name, mix in (("plausible", plausible), ("anywhere", copy_paste)):
            mixed, followed = mix(told(masks), masks, torch.tensor([10**6, seed]))
            counts[name, *followed[1][pasted_objects(mixed, 1)].unique().tolist()] += 1
    assert counts["anywhere", 2] > 10
    assert counts["plausible", 2] == 0
    assert counts["plausible", 3] == counts["anywhere", 3] > 10


def grounds(masks: torch.Tensor) -> dict[int, set[int]]:
    """Brute force: classes on at least a twentieth of each class's border with labelled pixels."""
    contacts: Counter[tuple[int, int]] = Counter()
    for mask in masks.tolist():
        for y, row in enumerate(mask):
            for x, one in enumerate(row):
                for v, u in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                    if 0 <= v < len(mask) and 0 <= u < len(row) and IGNORE not in (one, mask[v][u]) != (one, one):
                        contacts[one, mask[v][u]] += one != mask[v][u]
    classes = {one for one, _ in contacts}
    total = {one: sum(number for (a, _), number in contacts.items() if a == one) for one in classes}
    return {a: {b for b in classes if contacts[a, b] >= 0.05 * max(total[a], 1)} for a in classes}


def test_plausible_objects_have_their_ground_in_any_scene():
    masks = blobs(60, 32, 32, seed=4)
    allowed = grounds(masks)
    assert any(len(found) < 4 for found in allowed.values()), "or everything is plausible"
    mixed, followed = plausible(told(masks), masks, torch.arange(60))
    anywhere, _ = copy_paste(told(masks), masks, torch.arange(60))
    applied, shares = 0, Counter()
    for i in range(60):
        pasted = pasted_objects(mixed, i)
        if not pasted.any():
            continue
        applied += 1
        classes = followed[i][pasted].unique().tolist()
        assert len(classes) == 1
        ground = torch.isin(masks[i], torch.tensor(sorted(allowed[classes[0]])))
        # Each object by itself has nine tenths; a hundredth of what is seen may lie under a later one.
        assert ground[pasted].float().mean() >= 0.88
        free = pasted_objects(anywhere, i)
        if free.any():
            shares["plausible"] += float(ground[pasted].float().mean())
            shares["anywhere"] += float(ground[free].float().mean())
    assert applied > 15
    assert shares["plausible"] > shares["anywhere"]


def test_there_are_two_places_for_objects():
    with pytest.raises(ValueError, match="anywhere or plausible"):
        copy_paste(torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.arange(1), where="sea")


def test_symmetries_of_a_tile_that_is_not_square_come_back():
    tensor = torch.randn(2, 3, 5, 7)
    for element in range(8):
        assert torch.equal(dihedral(dihedral(tensor, element), element, inverse=True), tensor)
