"""Boundary noise: true class maps as a segmentor might have drawn them, to train what refines such maps.

CascadePSP (Cheng et al. 2020) and SegRefiner (Wang et al. 2023) disturb the mask of one object at a time; here all
classes of a map are disturbed at once.

Whatever moves boundaries gives a pixel a label that lies within some distance of it. So the distances of several
operations add up, and a pixel that is farther than their sum from every other class keeps its own. Unlabelled pixels
stay as they are and lend nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import groupby
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from terrasynth.data.components import connected

__all__ = ["Operation", "coarsen", "drop", "grow", "perturb", "stamp", "warp"]

Operation = Literal["drop", "stamp", "grow", "warp", "coarsen"]
_OPERATIONS: tuple[Operation, ...] = get_args(Operation)
_MOVING: tuple[Operation, ...] = ("grow", "warp", "coarsen")

# `data.mixes` lists the other streams of a seed.
_CHOICE, _DROP, _STAMP, _GROW, _WARP, _COARSEN = range(7, 13)
_PROBABILITY = 0.5
#: One spurious disc at most for so many pixels of a map.
_PIXELS_PER_DISC = 64**2
#: Side of the cells between which the growth of a class changes, in pixels.
_REGION = 48.0
#: The same of a displacement, as multiples of its length, so that boundaries do not fold; and in pixels, at least.
_WAVES, _SHORTEST_WAVE = (4.0, 16.0), 8.0
_COARSEST = 8


def perturb(
    masks: Tensor,
    seeds: Tensor,
    strength: float,
    *,
    ignore_index: int = 255,
    operations: Collection[Operation] = _OPERATIONS,
) -> Tensor:
    """Rough versions of true maps.

    Every map undergoes each of the operations with a chance of one half, in this order:

    - `drop`: of the regions no larger than a disc of radius `strength`, about half vanish in what surrounds them;
    - `stamp`: discs, up to as large, of the class across a boundary appear within twice `strength` of it;
    - `grow`: every class grows over those of lower rank, by distances that differ from class to class and from place to
      place; ranks are drawn anew for every map, so any class may grow or shrink;
    - `warp`: a smooth random field displaces the boundaries;
    - `coarsen`: the map goes through a raster of pixels 2 to 8 times as large.

    Those of the last three that a map undergoes, one at least if any is allowed, share `strength` at random: they
    change no pixel that is farther than that from every other class.

    Args:
        masks: whole numbers (B, H, W) from 0 to 255, class indices or `ignore_index`, on any device.
        seeds: int64 (B,), not negative.
        strength: in pixels, above 0.
        ignore_index: the value of unlabelled pixels. They stay unlabelled, and no others become so.
        operations: those that may be used.

    Returns:
        A new tensor of the same shape, type and device. Each map is a function of its own mask and seed.
    """
    if not 0 < strength < math.inf or not set(operations) <= set(_OPERATIONS):
        raise ValueError(f"strength {strength}, operations {operations}")
    rough, size = masks.to(torch.uint8, copy=True), (masks.shape[-2], masks.shape[-1])
    numbers = seeds.tolist()
    shares = [_shares(seed, strength, operations) for seed in numbers]
    for operation in _OPERATIONS:
        rows = [row for row, share in enumerate(shares) if operation in share]
        if not rows:
            continue
        own = [(numbers[row], shares[row][operation]) for row in rows]
        maps = rough[rows]
        match operation:
            case "drop":
                maps = drop(maps, [seed for seed, _ in own], strength, ignore_index)
            case "stamp":
                maps = stamp(maps, *_discs(maps, [seed for seed, _ in own], strength, ignore_index), ignore_index)
            case "grow":
                maps = grow(maps, *_growth(maps, own, ignore_index), ignore_index)
            case "warp":
                maps = warp(
                    maps, torch.stack([_wind(seed, share, size, maps.device) for seed, share in own]), ignore_index
                )
            case "coarsen":
                grids = torch.tensor([_grid(seed, share) for seed, share in own], device=maps.device)
                maps = coarsen(maps, grids[:, 0], grids[:, 1:], ignore_index)
        rough[rows] = maps
    return rough.to(masks.dtype)


def _shares(seed: int, strength: float, operations: Collection[Operation]) -> dict[Operation, float]:
    """The operations that a map undergoes, and the distance each may move a label, in pixels."""
    random = np.random.default_rng((seed, _CHOICE))
    drawn = dict(zip(_OPERATIONS, random.random(len(_OPERATIONS)).tolist(), strict=True))
    used = [name for name in _OPERATIONS if name in operations and drawn[name] < _PROBABILITY]
    moving = [name for name in _MOVING if name in used]
    if not moving and (allowed := [name for name in _MOVING if name in operations]):
        moving = [min(allowed, key=drawn.__getitem__)]
    parts = random.dirichlet(np.ones(len(moving))) * strength if moving else ()
    return dict.fromkeys(used, 0.0) | dict(zip(moving, map(float, parts), strict=True))


# --- regions ---------------------------------------------------------------------------------------------------------


def drop(masks: Tensor, seeds: list[int], radius: float, ignore_index: int = 255) -> Tensor:
    """Small regions vanish, about every second one: they take the class of most of their border.

    Regions are found on the CPU.

    Args:
        masks: uint8 (B, H, W).
        seeds: of each map.
        radius: regions (4 neighbours) have at most the area of such a disc.
        ignore_index: the value of unlabelled pixels.
    """
    dropped = []
    for mask, seed in zip(masks.cpu().numpy(), seeds, strict=True):
        random = np.random.default_rng((seed, _DROP))
        regions, labels = connected(mask)
        small = (np.bincount(regions.ravel()) <= math.pi * radius**2) & (labels != ignore_index)
        small &= random.random(len(labels)) < _PROBABILITY
        dropped.append(_surrounding(regions, labels, small, ignore_index)[regions])
    return torch.from_numpy(np.stack(dropped)).to(masks.device)


def _surrounding(
    regions: NDArray[np.intp], labels: NDArray[np.integer], chosen: NDArray[np.bool_], ignore_index: int
) -> NDArray[np.integer]:
    """The labels of all regions where the chosen ones have that of most of their border, if it has any."""
    across = regions[:, :-1], regions[:, 1:]
    down = regions[:-1], regions[1:]
    inside, outside = (
        np.concatenate([side.ravel() for side in sides])
        for sides in zip(across, across[::-1], down, down[::-1], strict=True)
    )
    border = chosen[inside] & (inside != outside) & (labels[outside] != ignore_index)
    pairs, lengths = np.unique(inside[border] * 256 + labels[outside[border]], return_counts=True)
    result = labels.copy()
    # The longest comes last, and stays; of equal ones that of the smaller class.
    for pair in pairs[np.lexsort((-pairs, lengths))]:
        result[pair // 256] = pair % 256
    return result


def stamp(masks: Tensor, centres: Tensor, radii: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Put discs on maps, later ones over earlier ones; unlabelled pixels stay as they are.

    Args:
        masks: uint8 (B, H, W).
        centres: row and column of N discs each, int64 (B, N, 2); may lie outside.
        radii: float (B, N); a disc has the pixels within it of its centre, none where it is negative.
        labels: uint8 (B, N).
        ignore_index: the value of unlabelled pixels.
    """
    height, width = masks.shape[-2:]
    reach = max(0, math.floor(radii.max()))
    steps = torch.arange(-reach, reach + 1, device=masks.device)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    y, x = y.flatten(), x.flatten()
    # What is not to be seen goes to one pixel more.
    canvas = torch.cat([masks.flatten(1), masks.new_zeros(len(masks), 1)], 1)
    for centre, radius, label in zip(centres.unbind(1), radii.unbind(1), labels.unbind(1), strict=True):
        rows, columns = centre[:, :1] + y, centre[:, 1:] + x
        seen = (y**2 + x**2).sqrt() <= radius[:, None]
        seen &= (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        places = torch.where(seen, rows * width + columns, height * width)
        canvas.scatter_(1, places, label[:, None].expand_as(places))
    return torch.where(masks == ignore_index, masks, canvas[:, :-1].view_as(masks))


def _discs(masks: Tensor, seeds: list[int], radius: float, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, radii and labels for `stamp`: near boundaries, of the class on their other side."""
    height, width = masks.shape[-2:]
    most = max(1, height * width // _PIXELS_PER_DISC)
    draws = np.stack([np.random.default_rng((seed, _STAMP)).random((5, most), np.float32) for seed in seeds])
    place, turn, length, size, number = torch.from_numpy(draws).to(masks.device).unbind(1)
    # Boundaries: pixels whose right or lower neighbour has another class.
    labelled = masks != ignore_index
    right, lower = masks.roll(-1, 2), masks.roll(-1, 1)
    beside = (right != masks) & (right != ignore_index) & labelled
    below = (lower != masks) & (lower != ignore_index) & labelled
    beside[:, :, -1] = False
    below[:, -1] = False
    # The n-th boundary pixel of each map, n drawn.
    order = (beside | below).flatten(1).cumsum(1)
    count = order[:, -1:]
    number_of = torch.minimum((place * count).long(), count - 1)  # rounding may end at the count itself
    at = torch.searchsorted(order, number_of + 1).clamp_max(height * width - 1)
    here, there = (labels.flatten(1).gather(1, at) for labels in (masks, torch.where(beside, right, lower)))
    direction = torch.stack([(2 * math.pi * turn).sin(), (2 * math.pi * turn).cos()], 2)
    shift = direction * (2 * radius * length)[..., None]
    centres = torch.stack([at // width, at % width], 2) + shift.trunc().long()
    inside = centres[..., 0].clamp(0, height - 1) * width + centres[..., 1].clamp(0, width - 1)
    labels = torch.where(masks.flatten(1).gather(1, inside) == here, there, here)
    # How many: any number from one up is as likely.
    wanted = (number[:, :1] * most).floor() >= torch.arange(most, device=masks.device)
    return centres, torch.where(wanted & (count > 0), size * radius, -1.0), labels


# --- what moves boundaries -------------------------------------------------------------------------------------------


def grow(masks: Tensor, ranks: Tensor, reach: Tensor, ignore_index: int = 255) -> Tensor:
    """Every label grows over those of lower rank, as far as it reaches: dilation of some classes, erosion of others.

    Args:
        masks: uint8 (B, H, W).
        ranks: of each of the 256 values, uint8 (B, 256), all different.
        reach: how far the label of a pixel grows from there, in pixels, float (B, H, W).
        ignore_index: the value of unlabelled pixels.

    Returns:
        Of the labels that reach a pixel, that of the highest rank, its own among them.
    """
    height, width = masks.shape[-2:]
    labelled = masks != ignore_index
    ranked = ranks.gather(1, masks.flatten(1).long()).view_as(masks)
    highest = ranked.clone()
    radius = min(math.floor(reach.max()), max(height, width) - 1)
    steps = range(-radius, radius + 1)
    offsets = sorted((y * y + x * x, y, x) for y in steps for x in steps)
    for square, ring in groupby(offsets, key=lambda offset: offset[0]):
        reaching = torch.where((reach**2 >= square) & labelled, ranked, 0)
        for _, y, x in ring:
            target = highest[:, max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)]
            source = reaching[:, max(-y, 0) : height - max(y, 0), max(-x, 0) : width - max(x, 0)]
            torch.maximum(target, source, out=target)
    grown = ranks.argsort(1).to(torch.uint8).gather(1, highest.flatten(1).long()).view_as(masks)
    return torch.where(labelled, grown, masks)


def _growth(masks: Tensor, own: list[tuple[int, float]], ignore_index: int) -> tuple[Tensor, Tensor]:
    """Ranks and reach for `grow`: up to the share of each map, for a third of the labels and at half of the places."""
    height, width = masks.shape[-2:]
    cells = math.ceil(height / _REGION) + 1, math.ceil(width / _REGION) + 1
    ranks, lengths, fields = [], [], []
    for seed, share in own:
        random = np.random.default_rng((seed, _GROW))
        ranks.append(np.insert(random.permutation(255).astype(np.uint8) + 1, ignore_index, 0))
        lengths.append(share * random.uniform(0, 1.5, 256).clip(max=1))
        fields.append(random.uniform(0.5, 1.5, (1, *cells)))
    label_reach = torch.from_numpy(np.stack(lengths)).float().to(masks.device)
    field = _smooth(torch.from_numpy(np.stack(fields)).float().to(masks.device), (height, width))[:, 0].clamp_max(1)
    reach = label_reach.gather(1, masks.flatten(1).long()).view_as(field) * field
    return torch.from_numpy(np.stack(ranks)).to(masks.device), reach


def warp(masks: Tensor, offsets: Tensor, ignore_index: int = 255) -> Tensor:
    """Every pixel takes the label that lies `offsets` away, or at the edge of the map before that.

    Args:
        masks: uint8 (B, H, W).
        offsets: rows down and columns right, int64 (B, 2, H, W).
        ignore_index: the value of unlabelled pixels.
    """
    height, width = masks.shape[-2:]
    rows = torch.arange(height, device=masks.device)[:, None] + offsets[:, 0]
    columns = torch.arange(width, device=masks.device) + offsets[:, 1]
    return _taken(masks, rows, columns, ignore_index)


def _wind(seed: int, share: float, size: tuple[int, int], device: torch.device) -> Tensor:
    """A smooth field of offsets for `warp`, int64 (2, H, W), none longer than `share`."""
    random = np.random.default_rng((seed, _WARP))
    wave = max(_SHORTEST_WAVE, share * math.exp(random.uniform(*np.log(_WAVES))))
    cells = math.ceil(size[0] / wave) + 1, math.ceil(size[1] / wave) + 1
    angle, length = random.uniform(0, 2 * math.pi, cells), share * np.sqrt(random.random(cells))
    corners = torch.from_numpy(length * np.stack([np.sin(angle), np.cos(angle)])).float().to(device)
    field = _smooth(corners[None], size)[0]
    whole = field.round()
    return torch.where(whole.square().sum(0) <= share**2, whole, field.trunc()).long()


def coarsen(masks: Tensor, factors: Tensor, origins: Tensor, ignore_index: int = 255) -> Tensor:
    """Every square of pixels takes the label in its middle.

    Args:
        masks: uint8 (B, H, W).
        factors: sides of the squares, int64 (B,), from 1.
        origins: rows and columns of the first square that lie outside the map, int64 (B, 2), less than the factor.
        ignore_index: the value of unlabelled pixels.
    """

    def middles(length: int, origin: Tensor) -> Tensor:
        squares = (torch.arange(length, device=masks.device) + origin[:, None]) // factors[:, None]
        return squares * factors[:, None] + (factors // 2 - origin)[:, None]

    rows, columns = (middles(length, origins[:, axis]) for axis, length in enumerate(masks.shape[-2:]))
    return _taken(masks, rows[:, :, None], columns[:, None], ignore_index)


def _grid(seed: int, share: float) -> list[int]:
    """Factor and origin for `coarsen`: no middle is farther than `share` from a pixel of its square."""
    random = np.random.default_rng((seed, _COARSEN))
    largest = min(_COARSEST, 2 * math.floor(share / math.sqrt(2)) + 1)
    factor = int(random.integers(min(2, largest), largest + 1))
    return [factor, *random.integers(factor, size=2).tolist()]


def _smooth(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Fields (B, C, H, W) that are bilinear between values (B, C, h, w): nowhere larger than the largest of these."""
    return functional.interpolate(corners, size=size, mode="bilinear", align_corners=True)


def _taken(masks: Tensor, rows: Tensor, columns: Tensor, ignore_index: int) -> Tensor:
    """Labels from other places, cut off at the edges of the map, where both these and the pixels are labelled."""
    height, width = masks.shape[-2:]
    batch = torch.arange(len(masks), device=masks.device)[:, None, None]
    taken = masks[batch, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return torch.where((masks == ignore_index) | (taken == ignore_index), masks, taken)
