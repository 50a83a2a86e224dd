"""Augmentation in which a mask follows its image exactly.

Every function is pure in its arguments: the same sample with the same seed comes out the same, in whatever batch, order
or process. The draws come from NumPy's generator, which takes all 64 bits of a seed (PyTorch's on the CPU takes 32), so
they are independent of the noise that a loss draws from a `torch.Generator` with the same seed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["augment", "cutmix", "view"]

# Distinguish the streams of one seed from each other.
_AUGMENT, _VIEW, _CUTMIX = range(3)

_AREA = (0.5, 1.0)
_RATIO = (0.9, 1.1)
_JITTER = (0.8, 1.2)
_CUTMIX_PROBABILITY = 0.5
# Luma of ITU-R BT.601, the grey that saturation and contrast refer to in torchvision and Pillow.
_LUMA = torch.tensor([[0.299, 0.587, 0.114]])


def augment(image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Flip, turn, zoom and recolour one training sample.

    One of the eight symmetries of the square; a random crop of 0.5 to 1 of the area with aspect ratio 0.9 to 1.1,
    brought back to the tile's size (bilinear, the mask by nearest pixel); brightness, contrast and saturation each
    scaled by 0.8 to 1.2.

    Args:
        image: uint8 (3, S, S).
        mask: uint8 (S, S).
        seed: decides all draws, not negative.

    Returns:
        Image float32 (3, S, S) in [0, 1] and mask int64 (S, S).
    """
    random = np.random.default_rng((seed, _AUGMENT))
    element = int(random.integers(8))
    image, mask = _dihedral(image, element), _dihedral(mask, element)
    image, mask = _zoom(image.float() / 255, mask, random)
    return _jitter(image, random), mask.long()


def view(image: Tensor, mask: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """The `index`-th fixed view of a tile, without change of colour.

    Index 0 is the tile itself, 1 to 7 its other flips and quarter turns, without resampling; every further index is one
    of the eight with a zoom as in `augment`, both drawn from the index.

    Args:
        image: uint8 (3, S, S).
        mask: uint8 (S, S).
        index: which view, not negative.

    Returns:
        Image uint8 (3, S, S) and mask uint8 (S, S).
    """
    if index < 8:
        return _dihedral(image, index).contiguous(), _dihedral(mask, index).contiguous()
    random = np.random.default_rng((index, _VIEW))
    element = int(random.integers(8))
    zoomed, mask = _zoom(_dihedral(image, element).float(), _dihedral(mask, element), random)
    return zoomed.round().byte(), mask


def cutmix(images: Tensor, masks: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of another sample of the batch into about every second sample, in the masks alike.

    CutMix (Yun et al. 2019, section 3.1 and appendix A) for dense labels: lambda ~ U(0, 1); a rectangle of the
    sample's own aspect ratio and of 1 - lambda of its area, centred anywhere, cut at the border. Sample i receives it
    from sample i - 1, the first from the last. Whether and where is drawn from the sample's seed alone.

    Args:
        images: (B, C, H, W), any type.
        masks: (B, H, W), any type.
        seeds: int64 (B,), not negative.

    Returns:
        New tensors of the same shapes and types.
    """
    height, width = masks.shape[-2:]
    donors, donor_masks = images.roll(1, dims=0), masks.roll(1, dims=0)
    images, masks = images.clone(), masks.clone()
    for i, seed in enumerate(seeds.tolist()):
        random = np.random.default_rng((seed, _CUTMIX))
        apply, lam, y, x = random.random(4)
        if apply >= _CUTMIX_PROBABILITY:
            continue
        side = math.sqrt(1 - lam)
        rows = _clipped(y * height, side * height, height)
        columns = _clipped(x * width, side * width, width)
        images[i, :, rows, columns] = donors[i, :, rows, columns]
        masks[i, rows, columns] = donor_masks[i, rows, columns]
    return images, masks


def _dihedral(tensor: Tensor, element: int) -> Tensor:
    """One of the symmetries of the square, 0..7: `element % 4` quarter turns, mirrored from 4 on; 0 is the identity."""
    turned = torch.rot90(tensor, element % 4, dims=(-2, -1))
    return turned.flip(-1) if element >= 4 else turned


def _zoom(image: Tensor, mask: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Cut the same random rectangle out of both and bring it back to full size.

    The crop is never larger than the tile, so this only magnifies and needs no antialiasing. Its edges are whole
    pixels, and both interpolations sample at the same places: the nearest pixel of the mask is the one that weighs
    most in the image.
    """
    size = mask.shape[-1]
    side = math.sqrt(random.uniform(*_AREA)) * size
    stretch = math.sqrt(math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1]))))
    height, width = min(size, round(side / stretch)), min(size, round(side * stretch))
    top, left = int(random.integers(size - height + 1)), int(random.integers(size - width + 1))
    box = (slice(top, top + height), slice(left, left + width))
    image, mask = image[:, *box], mask[box]
    if (height, width) == (size, size):
        return image, mask
    magnified = functional.interpolate(image[None], size=(size, size), mode="bilinear", align_corners=False)
    followed = functional.interpolate(mask[None, None], size=(size, size), mode="nearest-exact")
    return magnified[0], followed[0, 0]


def _jitter(image: Tensor, random: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation, as one linear map of the colours, then clipped to [0, 1].

    Brightness b scales; contrast c blends with the mean grey; saturation s blends every pixel with its own grey:
    x -> s c b x + (1 - s) grey(c b x) + (1 - c) b mean grey.
    """
    brightness, contrast, saturation = random.uniform(*_JITTER, size=3).tolist()
    pixels = image.flatten(1)
    mean_grey = brightness * (_LUMA @ pixels.mean(1, keepdim=True))
    matrix = saturation * torch.eye(3) + (1 - saturation) * _LUMA.expand(3, 3)
    offset = ((1 - contrast) * mean_grey).expand(3, 1)
    mixed = torch.addmm(offset, matrix, pixels, alpha=contrast * brightness)
    return mixed.view_as(image).clamp_(0, 1)


def _clipped(centre: float, length: float, limit: int) -> slice:
    return slice(max(0, round(centre - length / 2)), min(limit, round(centre + length / 2)))
