"""Augmentation in which a mask follows its image exactly.

Every function is pure in its arguments: the same sample with the same seed comes out the same, in whatever batch, order
or process. The draws come from NumPy's generator, which takes all 64 bits of a seed (PyTorch's on the CPU takes 32), so
they are independent of the noise that a loss draws from a `torch.Generator` with the same seed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

__all__ = ["augment", "classmix", "connected", "copy_paste", "cutmix", "dihedral", "view"]

# Distinguish the streams of one seed from each other.
_AUGMENT, _VIEW, _CUTMIX, _CLASSMIX, _COPY_PASTE = range(5)

_AREA = (0.5, 1.0)
_RATIO = (0.9, 1.1)
_JITTER = (0.8, 1.2)
_MIX_PROBABILITY = 0.5
# Components that are pasted: at least so many pixels, at most so much of the tile.
_PASTED_PIXELS = 16
_PASTED_AREA = 0.25
# Luma of ITU-R BT.601, the grey that saturation and contrast refer to in torchvision and Pillow.
_LUMA = torch.tensor([[0.299, 0.587, 0.114]])


def augment(image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Flip, turn, zoom and recolour one training sample.

    One of the eight symmetries of the square; a random crop of 0.5 to 1 of the area with aspect ratio 0.9 to 1.1,
    brought back to the tile's size (bilinear, the mask by nearest pixel); brightness, contrast and saturation each
    scaled by 0.8 to 1.2.

    Args:
        image: uint8 (3, S, S).
        mask: uint8 (S, S); or several maps of the tile, uint8 (M, S, S), which move as one.
        seed: decides all draws, not negative.

    Returns:
        Image float32 (3, S, S) in [0, 1] and mask int64, of its own shape.
    """
    random = np.random.default_rng((seed, _AUGMENT))
    element = int(random.integers(8))
    image, mask = dihedral(image, element), dihedral(mask, element)
    image, mask = _zoom(image.float() / 255, mask, random)
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
    """
    if index < 8:
        return dihedral(image, index).contiguous(), dihedral(mask, index).contiguous()
    random = np.random.default_rng((index, _VIEW))
    element = int(random.integers(8))
    zoomed, mask = _zoom(dihedral(image, element).float(), dihedral(mask, element), random)
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
        if apply >= _MIX_PROBABILITY:
            continue
        side = math.sqrt(1 - lam)
        rows = _clipped(y * height, side * height, height)
        columns = _clipped(x * width, side * width, width)
        images[i, :, rows, columns] = donors[i, :, rows, columns]
        masks[i, rows, columns] = donor_masks[i, rows, columns]
    return images, masks


def classmix(images: Tensor, masks: Tensor, seeds: Tensor, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Paste half of the classes of another sample of the batch into about every second sample, in the masks alike.

    ClassMix (Olsson et al. 2021, section 3.1) with given labels in place of predicted ones: of the classes present in
    the donor, a random half (rounded down), each with all its pixels where they are. Sample i receives from sample
    i - 1, the first from the last. The draws are of the sample's seed alone; unlabelled pixels are never pasted.

    Args:
        images: (B, C, H, W), any type.
        masks: whole numbers (B, H, W), class indices or `ignore_index`, not negative.
        seeds: int64 (B,), not negative.
        ignore_index: the value of unlabelled pixels.

    Returns:
        New tensors of the same shapes and types.
    """
    labels = masks.cpu().numpy()
    pasted = np.zeros(labels.shape, dtype=bool)
    for i, seed in enumerate(seeds.tolist()):
        random = np.random.default_rng((seed, _CLASSMIX))
        if random.random() >= _MIX_PROBABILITY:
            continue
        counts = np.bincount(labels[i - 1].ravel())
        present = np.flatnonzero(counts)
        present = random.permutation(present[present != ignore_index])
        chosen = np.zeros(len(counts), dtype=bool)
        chosen[present[: len(present) // 2]] = True
        pasted[i] = chosen[labels[i - 1]]
    where = torch.from_numpy(pasted).to(masks.device)
    return torch.where(where[:, None], images.roll(1, dims=0), images), torch.where(where, masks.roll(1, dims=0), masks)


def copy_paste(images: Tensor, masks: Tensor, seeds: Tensor, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Paste objects of another sample of the batch into about every second sample, in the masks alike.

    Simple Copy-Paste (Ghiasi et al. 2021, section 3) for semantic masks, whose objects are the connected pixels (4
    neighbours) of one class, from 16 pixels to a quarter of the tile. One class of the donor is drawn with a chance in
    inverse proportion to its pixels in the batch, then a random number of its objects. Each is flipped or turned, in
    place of the paper's scale jitter (a pixel of every tile is as many metres), and put anywhere inside the tile, later
    ones over earlier ones. Sample i receives from sample i - 1, the first from the last. The draws are of the sample's
    seed alone; unlabelled pixels are never pasted.

    Args:
        images: (B, C, S, S), any type.
        masks: whole numbers (B, S, S), class indices or `ignore_index`, not negative.
        seeds: int64 (B,), not negative.
        ignore_index: the value of unlabelled pixels.

    Returns:
        New tensors of the same shapes and types.
    """
    labels = masks.cpu().numpy()
    size = labels.shape[-1]
    frequency = np.bincount(labels.ravel())
    # Which pixel of the donor lands on each pixel of the tile; -1 for none.
    origin = np.full((len(labels), size * size), -1)
    for i, seed in enumerate(seeds.tolist()):
        random = np.random.default_rng((seed, _COPY_PASTE))
        if random.random() >= _MIX_PROBABILITY:
            continue
        components, classes = connected(labels[i - 1])
        pixels = np.bincount(components.ravel())
        usable = (pixels >= _PASTED_PIXELS) & (pixels <= _PASTED_AREA * size**2) & (classes != ignore_index)
        if not usable.any():
            continue
        candidates = np.unique(classes[usable])
        chances = 1 / frequency[candidates]
        drawn = random.choice(candidates, p=chances / chances.sum())
        objects = random.permutation(np.flatnonzero(usable & (classes == drawn)))
        for component in objects[: random.integers(len(objects)) + 1]:
            rows, columns = np.nonzero(components == component)
            origin[i, _placed(rows, columns, size, random)] = rows * size + columns
    source = torch.from_numpy(origin).view(masks.shape).to(masks.device)
    return _pasted(images, source[:, None]), _pasted(masks, source)


def connected(mask: NDArray[np.integer]) -> tuple[NDArray[np.intp], NDArray[np.integer]]:
    """Connected pixels of equal value (4 neighbours): a number for each pixel, (H, W), and the value of each number.

    Runs of equal pixels in a row are nodes, and runs that touch across two rows are edges. Every root is hooked to the
    smallest root that it touches, then all paths are compressed, until nothing moves (Shiloach and Vishkin 1982).
    """
    starts = np.ones(mask.shape, dtype=bool)
    starts[:, 1:] = mask[:, 1:] != mask[:, :-1]
    runs = np.cumsum(starts).reshape(mask.shape) - 1
    # Two runs that touch do so first where one of them starts.
    touching = (mask[1:] == mask[:-1]) & (starts[1:] | starts[:-1])
    above, below = runs[:-1][touching], runs[1:][touching]
    root = np.arange(runs[-1, -1] + 1)
    while (apart := root[above] != root[below]).any():
        above, below = above[apart], below[apart]
        ends = np.stack([root[above], root[below]])
        np.minimum.at(root, ends.max(0), ends.min(0))
        while (root[root] != root).any():
            root = root[root]
    numbers = np.cumsum(root == np.arange(len(root))) - 1
    components = numbers[root][runs]
    values = np.empty(numbers[-1] + 1, dtype=mask.dtype)
    values[components] = mask
    return components, values


def _placed(
    rows: NDArray[np.intp], columns: NDArray[np.intp], size: int, random: np.random.Generator
) -> NDArray[np.intp]:
    """Where the pixels of an object go, as indices into the flat tile: turned at random, then anywhere inside it."""
    transpose, down, right = random.integers(2, size=3)
    rows, columns = rows - rows.min(), columns - columns.min()
    if transpose:
        rows, columns = columns, rows
    rows = rows.max() - rows if down else rows
    columns = columns.max() - columns if right else columns
    return (rows + random.integers(size - rows.max())) * size + columns + random.integers(size - columns.max())


def _pasted(tensor: Tensor, source: Tensor) -> Tensor:
    """`tensor` (B, ..., S, S) with the pixels of its left neighbour in the batch where `source` has their indices."""
    pixels = source.clamp_min(0).expand_as(tensor).flatten(-2)
    moved = tensor.roll(1, dims=0).flatten(-2).gather(-1, pixels).view_as(tensor)
    return torch.where(source >= 0, moved, tensor)


def dihedral(tensor: Tensor, element: int, *, inverse: bool = False) -> Tensor:
    """One of the symmetries of the square, 0..7: `element % 4` quarter turns, mirrored from 4 on; 0 is the identity.

    Args:
        tensor: (..., S, S).
        element: which one.
        inverse: the symmetry that takes it back, instead.
    """
    turns, mirrored = element % 4, element >= 4
    if inverse:
        return torch.rot90(tensor.flip(-1) if mirrored else tensor, -turns, dims=(-2, -1))
    turned = torch.rot90(tensor, turns, dims=(-2, -1))
    return turned.flip(-1) if mirrored else turned


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
    image, mask = image[:, *box], mask[..., *box]
    if (height, width) == (size, size):
        return image, mask
    magnified = functional.interpolate(image[None], size=(size, size), mode="bilinear", align_corners=False)
    maps = mask.reshape(1, -1, height, width)
    followed = functional.interpolate(maps, size=(size, size), mode="nearest-exact")
    return magnified[0], followed.reshape(*mask.shape[:-2], size, size)


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
