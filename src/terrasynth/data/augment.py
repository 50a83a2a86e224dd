"""Augmentation in which a mask follows its image exactly.

Every function is pure in its arguments: the same sample with the same seed comes out the same, in whatever batch, order
or process. The draws come from NumPy's generator, which takes all 64 bits of a seed (PyTorch's on the CPU takes 32), so
they are independent of the noise that a loss draws from a `torch.Generator` with the same seed.

`augment` and `view` take one sample; `turn`, `zoom`, `jitter` and `cutout` are their steps and one more for a batch,
each sample by its own seed; the mixes (`data.mixes`) let the samples of a batch lend each other something. All work
where their tensors are, and return new ones there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from terrasynth.data.mixes import check_batch, classmix, clipped, copy_paste, cutmix, mosaic

__all__ = [
    "augment",
    "classmix",
    "copy_paste",
    "cutmix",
    "cutout",
    "dihedral",
    "jitter",
    "mosaic",
    "turn",
    "view",
    "zoom",
]

# Distinguish the streams of one seed from each other; `data.mixes` lists the others.
_AUGMENT, _VIEW = 0, 1
_TURN, _ZOOM, _JITTER, _CUTOUT = 16, 17, 18, 19

_AREA = (0.5, 1.0)
_RATIO = (0.9, 1.1)
_FACTOR = (0.8, 1.2)
_CUTOUT_SIDE = 0.5
# Luma of ITU-R BT.601, the grey that saturation and contrast refer to in torchvision and Pillow.
_LUMA = torch.tensor([[0.299, 0.587, 0.114]])
_EYE = torch.eye(3)


def augment(image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Flip, turn, zoom and recolour one training sample.

    One of the symmetries of the tile (`turn`); a random crop of 0.5 to 1 of the area brought back to the tile's size
    (`zoom`); brightness, contrast and saturation each scaled by 0.8 to 1.2 (`jitter`).

    Args:
        image: (3, H, W), uint8, or float in [0, 1].
        mask: whole numbers (H, W); or several maps of the tile, (M, H, W), which move as one.
        seed: decides all draws, not negative.

    Returns:
        Image float32 (3, H, W) in [0, 1] and mask int64, of its own shape.

    Raises:
        ValueError: the image has other than three channels, another type, or another size than the mask.
    """
    _check_colors(image)
    _check_sides(image, mask)
    random = np.random.default_rng((seed, _AUGMENT))
    element = _element(mask, random)
    image, mask = dihedral(image, element), dihedral(mask, element)
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    image, mask = _zoom(image, mask, random)
    return _jitter(image, random), mask.long()


def view(image: Tensor, mask: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """The `index`-th fixed view of a tile, without change of colour.

    Index 0 is the tile itself, 1 to 7 its other flips and quarter turns, without resampling; every further index is one
    of the eight with a zoom as in `augment`, both drawn from the index.

    Args:
        image: uint8 (3, S, S).
        mask: uint8 (S, S); or several maps of the tile, uint8 (M, S, S), which move as one.
        index: which view, not negative.

    Returns:
        Image uint8 (3, S, S) and mask uint8, of its own shape.

    Raises:
        ValueError: image and mask differ in size.
    """
    _check_sides(image, mask)
    if index < 8:
        return dihedral(image, index).contiguous(), dihedral(mask, index).contiguous()
    random = np.random.default_rng((index, _VIEW))
    element = _element(mask, random)
    zoomed, mask = _zoom(dihedral(image, element).float(), dihedral(mask, element), random)
    return zoomed.round().byte(), mask


def turn(images: Tensor, masks: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Flip or turn every sample, in the masks alike: one of the eight symmetries of the square, all alike likely.

    From above there is no up and no down. Tiles that are not square have four: the tile itself, its two flips and the
    half turn.

    Args:
        images: (B, C, H, W), any type.
        masks: (B, H, W), any type.
        seeds: int64 (B,), not negative.

    Returns:
        New tensors of the same shapes and types.

    Raises:
        ValueError: the shapes do not fit together.
    """
    check_batch(images, masks, seeds)
    turned, turned_masks = torch.empty_like(images), torch.empty_like(masks)
    for i, random in enumerate(_generators(seeds, _TURN)):
        element = _element(masks, random)
        turned[i], turned_masks[i] = dihedral(images[i], element), dihedral(masks[i], element)
    return turned, turned_masks


def zoom(images: Tensor, masks: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Magnify a random window of every sample to the size of the tile, in the masks alike.

    A random resized crop (Szegedy et al. 2015) in measure: 0.5 to 1 of the area, sides stretched against each other by
    0.9 to 1.1. The image is interpolated bilinearly, the mask takes the nearest pixel, so there are no labels between
    two classes.

    Args:
        images: (B, C, H, W), uint8 or float.
        masks: (B, H, W), any type.
        seeds: int64 (B,), not negative.

    Returns:
        New tensors of the same shapes and types.

    Raises:
        ValueError: the shapes do not fit together.
    """
    check_batch(images, masks, seeds)
    zoomed, zoomed_masks = torch.empty_like(images), torch.empty_like(masks)
    for i, random in enumerate(_generators(seeds, _ZOOM)):
        zoomed[i], zoomed_masks[i] = _zoom(images[i], masks[i], random)
    return zoomed, zoomed_masks


def jitter(images: Tensor, seeds: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation of every sample, each by 0.8 to 1.2.

    Contrast is about the mean grey of the sample, saturation about the grey of each pixel. Masks have no colour.

    Args:
        images: (B, 3, H, W), uint8, or float in [0, 1]: of a sample with one pixel that is NaN all would be, as the
            mean is.
        seeds: int64 (B,), not negative.

    Returns:
        A new tensor of the same shape and type.

    Raises:
        ValueError: the shapes do not fit together, there are other than three channels, or of another type.
    """
    if images.ndim != 4 or seeds.shape != images.shape[:1]:
        raise ValueError(
            f"images (B, 3, H, W) and seeds (B,) must fit together, not {tuple(images.shape)}, {tuple(seeds.shape)}"
        )
    _check_colors(images)
    jittered = torch.empty(images.shape, dtype=images.dtype, device=images.device)
    if images.dtype == torch.uint8:
        # Memory that is asked for anew for each tile costs more than what is done in it.
        pixels, mixed = torch.empty((2, *images.shape[1:]), device=images.device)
        for i, random in enumerate(_generators(seeds, _JITTER)):
            jittered[i] = _bytes(_jitter(pixels.copy_(images[i]), random, 255, mixed).round_())
    else:
        for i, random in enumerate(_generators(seeds, _JITTER)):
            _jitter(images[i], random, out=jittered[i])
    return jittered


def cutout(images: Tensor, masks: Tensor, seeds: Tensor, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Hide a square of every sample: its pixels become the sample's mean colour, its labels the ignore index.

    Cutout (DeVries and Taylor 2017, section 3.2): a square of fixed size, here half the shorter side, centred on any
    pixel, cut at the border. The paper fills it with 0 after normalisation, which is the mean colour of the data set;
    the mean of the sample itself needs no statistics and fits any band, sensor and normalisation. What can not be seen
    can not be labelled: with its labels left as they are, a segmentor would learn to guess.

    Args:
        images: (B, C, H, W), any type.
        masks: whole numbers (B, H, W).
        seeds: int64 (B,), not negative.
        ignore_index: the value of unlabelled pixels.

    Returns:
        New tensors of the same shapes and types.

    Raises:
        ValueError: the shapes do not fit together, or masks are no whole numbers, or of a type that can not hold the
            ignore index.
    """
    check_batch(images, masks, seeds)
    if masks.is_floating_point() or masks.dtype == torch.bool:
        raise ValueError(f"masks are whole numbers, not {masks.dtype}")
    if not torch.iinfo(masks.dtype).min <= ignore_index <= torch.iinfo(masks.dtype).max:
        raise ValueError(f"masks of type {masks.dtype} can not hold the ignore index {ignore_index}")
    height, width = masks.shape[-2:]
    side = _CUTOUT_SIDE * min(height, width)
    means = _means(images)
    hidden, hidden_masks = images.clone(), masks.clone()
    for i, random in enumerate(_generators(seeds, _CUTOUT)):
        rows, columns = (clipped(int(random.integers(limit)) + 0.5, side, limit) for limit in (height, width))
        hidden[i, :, rows, columns] = means[i]
        hidden_masks[i, rows, columns] = ignore_index
    return hidden, hidden_masks


def dihedral(tensor: Tensor, element: int, *, inverse: bool = False) -> Tensor:
    """One of the symmetries of the square, 0..7: `element % 4` quarter turns, mirrored from 4 on; 0 is the identity.

    Args:
        tensor: (..., H, W); quarter turns swap height and width.
        element: which one.
        inverse: the symmetry that takes it back, instead.
    """
    turns, mirrored = element % 4, element >= 4
    if inverse:
        return torch.rot90(tensor.flip(-1) if mirrored else tensor, -turns, dims=(-2, -1))
    turned = torch.rot90(tensor, turns, dims=(-2, -1))
    return turned.flip(-1) if mirrored else turned


def _generators(seeds: Tensor, stream: int) -> Iterator[np.random.Generator]:
    return (np.random.default_rng((seed, stream)) for seed in seeds.tolist())


def _element(mask: Tensor, random: np.random.Generator) -> int:
    """Draw a symmetry that keeps the shape of the tile, (..., H, W)."""
    if mask.shape[-2] == mask.shape[-1]:
        return int(random.integers(8))
    return 2 * int(random.integers(4))


def _zoom(image: Tensor, mask: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Cut the same random rectangle out of both and bring it back to full size.

    The crop is never larger than the tile, so this only magnifies and needs no antialiasing. Its edges are whole
    pixels, and both interpolations sample at the same places: the nearest pixel of the mask is the one that weighs
    most in the image.
    """
    size = height, width = mask.shape[-2:]
    side = math.sqrt(random.uniform(*_AREA))
    stretch = math.sqrt(math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1]))))
    rows, columns = min(height, round(side * height / stretch)), min(width, round(side * width * stretch))
    top, left = int(random.integers(height - rows + 1)), int(random.integers(width - columns + 1))
    box = (slice(top, top + rows), slice(left, left + columns))
    image, mask = image[:, *box], mask[..., *box]
    if (rows, columns) == size:
        return image, mask
    if image.dtype == torch.uint8 and not image.is_cuda:
        # Bytes are interpolated to the same, and faster, where the channels of a pixel lie together; NumPy puts them
        # so in a third of PyTorch's time.
        image = torch.from_numpy(np.stack(tuple(image.numpy()), axis=-1)).movedim(-1, 0)
    magnified = functional.interpolate(image[None], size=size, mode="bilinear", align_corners=False)
    # NumPy takes any type, and takes it several times faster than `interpolate`.
    followed = mask.cpu().numpy()[..., _nearest(rows, height), :].take(_nearest(columns, width), -1, mode="clip")
    return magnified[0], torch.from_numpy(followed).to(mask.device)


@lru_cache(maxsize=4096)
def _nearest(length: int, size: int) -> NDArray[np.int64]:
    """Which of `length` pixels is nearest to each of `size` that cover the same: where `interpolate` finds them."""
    places = torch.arange(length, dtype=torch.float32)
    return functional.interpolate(places[None, None], size=size, mode="nearest-exact").long().flatten().numpy()


def _check_colors(images: Tensor) -> None:
    """Raise a ValueError unless these are images (…, 3, H, W) in numbers that the jitter of colours knows."""
    if images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"an image has three channels, (3, H, W), not {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"colours are uint8, or float in [0, 1], not {images.dtype}")


def _check_sides(image: Tensor, mask: Tensor) -> None:
    if image.shape[-2:] != mask.shape[-2:]:
        raise ValueError(f"an image of {tuple(image.shape)} and a mask of {tuple(mask.shape)} differ in size")


def _means(images: Tensor) -> Tensor:
    """The mean of every channel of every sample, (B, C, 1, 1), of the type of the images."""
    if images.is_floating_point():
        # Sample by sample: how a mean is summed may depend on how many there are.
        means = images.new_empty(images.shape[:2])
        for i, image in enumerate(images):
            means[i] = image.mean((-2, -1))
    else:
        # Sums of whole numbers are exact, and NumPy's are several times as fast as PyTorch's.
        numbers = images.cpu().numpy()
        sums = np.add.reduce(numbers, axis=-1, dtype=np.uint32 if images.dtype == torch.uint8 else None)
        means = torch.from_numpy((sums.mean(-1) / images.shape[-1]).round())
    return means[..., None, None].to(images)


def _jitter(image: Tensor, random: np.random.Generator, most: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Brightness, contrast and saturation, as one linear map of the colours, then clipped to [0, most].

    Brightness b scales; contrast c blends with the mean grey; saturation s blends every pixel with its own grey:
    x -> s c b x + (1 - s) grey(c b x) + (1 - c) b mean grey.
    """
    brightness, contrast, saturation = random.uniform(*_FACTOR, size=3).tolist()
    luma, pixels = _LUMA.to(image), image.flatten(1)
    mean_grey = brightness * (luma @ pixels.mean(1, keepdim=True))
    matrix = saturation * _EYE.to(image) + (1 - saturation) * luma.expand(3, 3)
    offset = ((1 - contrast) * mean_grey).expand(3, 1)
    flat = None if out is None else out.flatten(1)
    mixed = torch.addmm(offset, matrix, pixels, alpha=contrast * brightness, out=flat)
    return mixed.view_as(image).clamp_(0, most)


def _bytes(pixels: Tensor) -> Tensor:
    """Whole numbers from 0 to 255 as uint8. On the CPU, NumPy converts twice as fast as PyTorch."""
    return pixels.byte() if pixels.is_cuda else torch.from_numpy(pixels.numpy().astype(np.uint8))
