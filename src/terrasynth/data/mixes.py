"""Augmentation that mixes the samples of a batch, masks alike: CutMix, mosaic, ClassMix, Copy-Paste.

About every second sample receives something from those before it in the batch, the first from the last. Whether, what
and where is drawn from the sample's own seed alone, as in `data.augment`, which offers these functions too.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terrasynth.data.components import connected

__all__ = ["check_batch", "classmix", "clipped", "copy_paste", "cutmix", "mosaic"]

# Streams of a seed; `data.augment` has 0, 1 and 16 to 19, `data.reference`, `data.perturb` and `systems.rough` 5 to 14.
_CUTMIX, _CLASSMIX, _COPY_PASTE, _MOSAIC = 2, 3, 4, 15

_MIX_PROBABILITY = 0.5
# The four tiles of a mosaic meet between these shares of its sides.
_CENTRE = (0.2, 0.8)
# Components that are pasted: at least so many pixels, at most so much of the tile.
_PASTED_PIXELS = 16
_PASTED_AREA = 0.25
# Where a class may lie: on classes that share so much of its border, under so much of an object; places that are tried.
_LEAST_BORDER = 0.05
_ON_GROUND = 0.9
_TRIES = 32


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

    Raises:
        ValueError: the shapes do not fit together.
    """
    check_batch(images, masks, seeds)
    height, width = masks.shape[-2:]
    mixed, mixed_masks = images.clone(), masks.clone()
    for i, seed in enumerate(seeds.tolist()):
        random = np.random.default_rng((seed, _CUTMIX))
        apply, lam, y, x = random.random(4)
        if apply >= _MIX_PROBABILITY:
            continue
        side = math.sqrt(1 - lam)
        rows = clipped(y * height, side * height, height)
        columns = clipped(x * width, side * width, width)
        mixed[i, :, rows, columns] = images[i - 1, :, rows, columns]
        mixed_masks[i, rows, columns] = masks[i - 1, rows, columns]
    return mixed, mixed_masks


def mosaic(images: Tensor, masks: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Lay about every second sample anew from windows of four samples of the batch, in the masks alike.

    Mosaic (YOLOv4, Bochkovskiy et al. 2020, section 3.3) for dense labels: four tiles meet at a point between 0.2 and
    0.8 of each side. Each part is a window of its size, anywhere in one of the samples i, i - 1, i - 2 and i - 3, in
    random order; nothing is scaled, as a pixel of every tile is as many metres. In a batch of fewer than four, samples
    come more than once. The draws are of the sample's seed alone.

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
    height, width = masks.shape[-2:]
    mixed, mixed_masks = images.clone(), masks.clone()
    for i, seed in enumerate(seeds.tolist()):
        random = np.random.default_rng((seed, _MOSAIC))
        if random.random() >= _MIX_PROBABILITY:
            continue
        y, x = (round(share * side) for share, side in zip(random.uniform(*_CENTRE, 2), (height, width), strict=True))
        donors = (i - random.permutation(4)) % len(images)
        parts = (
            (top, bottom, left, right) for top, bottom in ((0, y), (y, height)) for left, right in ((0, x), (x, width))
        )
        for donor, (top, bottom, left, right) in zip(donors.tolist(), parts, strict=True):
            down = int(random.integers(height - (bottom - top) + 1)) - top
            along = int(random.integers(width - (right - left) + 1)) - left
            window = (slice(top + down, bottom + down), slice(left + along, right + along))
            mixed[i, :, top:bottom, left:right] = images[donor, :, *window]
            mixed_masks[i, top:bottom, left:right] = masks[donor, *window]
    return mixed, mixed_masks


def classmix(images: Tensor, masks: Tensor, seeds: Tensor, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Paste half of the classes of another sample of the batch into about every second sample, in the masks alike.

    ClassMix (Olsson et al. 2021, section 3.1) with given labels in place of predicted ones: of the classes present in
    the donor, a random half (rounded down), each with all its pixels where they are. Sample i receives from sample
    i - 1, the first from the last. The draws are of the sample's seed alone; unlabelled pixels are never pasted.

    Args:
        images: (B, C, H, W), any type.
        masks: whole numbers (B, H, W), class indices, not negative, or `ignore_index`.
        seeds: int64 (B,), not negative.
        ignore_index: the value of unlabelled pixels.

    Returns:
        New tensors of the same shapes and types.

    Raises:
        ValueError: the shapes do not fit together.
    """
    check_batch(images, masks, seeds)
    labels, unlabelled = _labels(masks, ignore_index)
    pasted = np.zeros(labels.shape, dtype=bool)
    for i, seed in enumerate(seeds.tolist()):
        random = np.random.default_rng((seed, _CLASSMIX))
        if random.random() >= _MIX_PROBABILITY:
            continue
        counts = np.bincount(labels[i - 1].ravel())
        present = np.flatnonzero(counts)
        present = random.permutation(present[present != unlabelled])
        chosen = np.zeros(len(counts), dtype=bool)
        chosen[present[: len(present) // 2]] = True
        pasted[i] = chosen[labels[i - 1]]
    where = torch.from_numpy(pasted).to(masks.device)
    return torch.where(where[:, None], images.roll(1, dims=0), images), torch.where(where, masks.roll(1, dims=0), masks)


def copy_paste(
    images: Tensor,
    masks: Tensor,
    seeds: Tensor,
    ignore_index: int = 255,
    *,
    where: Literal["anywhere", "plausible"] = "anywhere",
) -> tuple[Tensor, Tensor]:
    """Paste objects of another sample of the batch into about every second sample, in the masks alike.

    Simple Copy-Paste (Ghiasi et al. 2021, section 3) for semantic masks, whose objects are the connected pixels (4
    neighbours) of one class, from 16 pixels to a quarter of the tile. One class of the donor is drawn with a chance in
    inverse proportion to its pixels in the batch, then a random number of its objects. Each is flipped or turned, in
    place of the paper's scale jitter (a pixel of every tile is as many metres), and put inside the tile, later ones
    over earlier ones. Sample i receives from sample i - 1, the first from the last. The draws are of the sample's seed
    alone; unlabelled pixels are never pasted.

    Objects need their context (Dvornik et al. 2018), and a mask tells it: the *ground* of a class are the other classes
    that share at least a twentieth of its border with labelled pixels, in the masks of the batch. `where="plausible"`
    draws up to 32 places for each object and takes the first where at least nine tenths of the pixels that it covers
    are of its ground and not of an object pasted before; if there is none, it is left out.

    Args:
        images: (B, C, H, W), any type.
        masks: whole numbers (B, H, W), class indices, not negative, or `ignore_index`.
        seeds: int64 (B,), not negative.
        ignore_index: the value of unlabelled pixels.
        where: objects lie: anywhere, or only where their class may.

    Returns:
        New tensors of the same shapes and types.

    Raises:
        ValueError: the shapes do not fit together, or there is no such `where`.
    """
    check_batch(images, masks, seeds)
    if where not in ("anywhere", "plausible"):
        raise ValueError(f"objects are pasted anywhere or plausible, not {where!r}")
    labels, unlabelled = _labels(masks, ignore_index)
    height, width = labels.shape[-2:]
    frequency = np.bincount(labels.ravel())
    grounds: dict[int, NDArray[np.bool_]] = {}
    # Which pixel of the donor lands on each pixel of the tile; -1 for none.
    origin = np.full((len(labels), height * width), -1)
    for i, seed in enumerate(seeds.tolist()):
        random = np.random.default_rng((seed, _COPY_PASTE))
        if random.random() >= _MIX_PROBABILITY:
            continue
        components, classes = connected(labels[i - 1])
        pixels = np.bincount(components.ravel())
        usable = (pixels >= _PASTED_PIXELS) & (pixels <= _PASTED_AREA * height * width) & (classes != unlabelled)
        if not usable.any():
            continue
        candidates = np.unique(classes[usable])
        chances = 1 / frequency[candidates]
        drawn = random.choice(candidates, p=chances / chances.sum())
        objects = random.permutation(np.flatnonzero(usable & (classes == drawn)))
        free = np.ones(height * width, dtype=bool)
        if where == "plausible":
            if drawn not in grounds:
                grounds[drawn] = _ground(labels, drawn, unlabelled)
            free = grounds[drawn][labels[i].ravel()]
        for component in objects[: random.integers(len(objects)) + 1]:
            rows, columns = np.nonzero(components == component)
            for _ in range(_TRIES):
                place = _placed(rows, columns, height, width, random)
                if free[place].mean() >= _ON_GROUND:
                    origin[i, place] = rows * width + columns
                    free[place] = where == "anywhere"
                    break
    source = torch.from_numpy(origin).view(masks.shape).to(masks.device)
    return _pasted(images, source[:, None]), _pasted(masks, source)


def check_batch(images: Tensor, masks: Tensor, seeds: Tensor) -> None:
    """Raise a ValueError unless these are images (B, C, H, W), masks (B, H, W) and whole numbers, seeds (B,)."""
    if images.ndim != 4 or masks.shape != (len(images), *images.shape[-2:]) or seeds.shape != images.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (images, masks, seeds))
        raise ValueError(f"images (B, C, H, W), masks (B, H, W) and seeds (B,) must fit together, not {shapes}")
    if seeds.is_floating_point():
        raise ValueError(f"seeds are whole numbers, not {seeds.dtype}")


def clipped(centre: float, length: float, limit: int) -> slice:
    """What of an interval lies in [0, limit), in whole pixels."""
    return slice(max(0, round(centre - length / 2)), min(limit, round(centre + length / 2)))


def _labels(masks: Tensor, ignore_index: int) -> tuple[NDArray[np.integer], int]:
    """The masks without negative numbers, and what unlabelled pixels have there.

    Raises:
        ValueError: they are no whole numbers, or there is a negative one beside the ignore index.
    """
    labels, unlabelled = masks.cpu().numpy(), ignore_index
    if labels.dtype.kind not in "iu":
        raise ValueError(f"masks are whole numbers, not {masks.dtype}")
    if ignore_index < 0:
        hidden, unlabelled = labels == ignore_index, int(labels.max(initial=0)) + 1
        # Wider, because the type of the masks may end at the largest class.
        labels = np.where(hidden, unlabelled, labels.astype(np.int64)) if hidden.any() else labels
    if labels.dtype.kind == "i" and (least := int(labels.min(initial=0))) < 0:
        raise ValueError(f"labels are from 0 on, but for the ignore index {ignore_index}; there is {least}")
    return labels, unlabelled


def _ground(labels: NDArray[np.integer], drawn: int, unlabelled: int) -> NDArray[np.bool_]:
    """Which classes a class may lie on: those along enough of its border in the masks (B, H, W)."""
    inside = labels == drawn
    border = np.zeros(int(labels.max()) + 1)
    for first, last in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :, 1:], np.s_[:, :, :-1])):
        for here, there in ((first, last), (last, first)):
            border += np.bincount(labels[there][inside[here] & ~inside[there]], minlength=len(border))
    border[unlabelled : unlabelled + 1] = 0
    return border >= _LEAST_BORDER * max(border.sum(), 1)


def _placed(
    rows: NDArray[np.intp], columns: NDArray[np.intp], height: int, width: int, random: np.random.Generator
) -> NDArray[np.intp]:
    """Where the pixels of an object go, as indices into the flat tile: turned at random, then anywhere inside it.

    It keeps to half turns where it would not fit otherwise.
    """
    transpose, down, right = random.integers(2, size=3)
    rows, columns = rows - rows.min(), columns - columns.min()
    if transpose and rows.max() < width and columns.max() < height:
        rows, columns = columns, rows
    rows = rows.max() - rows if down else rows
    columns = columns.max() - columns if right else columns
    return (rows + random.integers(height - rows.max())) * width + columns + random.integers(width - columns.max())


def _pasted(tensor: Tensor, source: Tensor) -> Tensor:
    """`tensor` (B, ..., H, W) with the pixels of its left neighbour in the batch where `source` has their indices."""
    pixels = source.clamp_min(0).expand_as(tensor).flatten(-2)
    moved = tensor.roll(1, dims=0).flatten(-2).gather(-1, pixels).view_as(tensor)
    return torch.where(source >= 0, moved, tensor)
