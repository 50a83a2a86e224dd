"""Is one image a copy of another? Nearest images that are found turned, zoomed, brightened or compressed again.

Two steps. Candidates: the images whose thumbnail, or whose features, come nearest under any of the eight flips and
turns. Then each candidate is laid over the image, at several zooms and all shifts, and what counts is how far their
details agree there. Images of different ground do not agree in detail, however alike they look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from terrasynth.curation.features import random_features
from terrasynth.data.augment import dihedral

__all__ = [
    "HIGHEST_LIMIT",
    "LEAST_DETAIL",
    "LEAST_IMAGES",
    "LEAST_SIDE",
    "SIDE",
    "Nearest",
    "detail",
    "likeness",
    "limit",
    "nearest_images",
    "shrink",
]

#: Side of the thumbnails that everything is computed from: an image of any size costs 12 KiB of memory.
SIDE = 64
#: Less detail than this (see `detail`) is too plain to tell a copy by: still water, sand, snow, cloud, also
#: with one straight shore.
LEAST_DETAIL = 0.4
# What real images of different ground reach, and what a copy loses at most: the limit lies between (see `limit`).
_LOWEST_LIMIT, HIGHEST_LIMIT, _QUANTILE = 0.6, 0.75, 0.99
#: A limit is measured by as many images as this; with fewer it is the highest: chance must not pass for a leak.
LEAST_IMAGES = 20

_TURNS = 8
# Sides at which candidates are looked for (by detail, by features) and compared; the comparison covers the middle.
_COARSE, _FEATURED, _FINE, _MIDDLE = 16, 24, 32, 24
#: A smaller image has not the detail that copies are told by.
LEAST_SIDE = _FINE
_WINDOW = 7
# Contrast that counts half, in grey levels: what is left of a plain surface after compression is below.
_HALF = 3.0
# Share of the other image's side that the image shows.
_ZOOMS = (1.0, 0.96, 0.92, 0.87, 0.82, 0.76)
_CANDIDATES = 2
_BLOCK, _PAIRS = 256, 64


def shrink(image: NDArray[np.uint8]) -> Tensor:
    """The square in the middle of an image, uint8 (H, W, 3), as a thumbnail, uint8 (3, SIDE, SIDE)."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    way = Image.Resampling.BOX if side >= SIDE else Image.Resampling.BICUBIC
    return torch.from_numpy(np.array(square.resize((SIDE, SIDE), way))).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Nearest:
    """For each of N images, what comes nearest in a set of M.

    Attributes:
        likeness: float (N,), of the most alike candidate: 1 is the same image; -1 where there is none.
        position: int64 (N,), which it is.
        turn: int64 (N,), how the set's image lies as the image does (`data.augment.dihedral`).
        distance: float (N,), in features, to the nearest: root mean square over the features; infinite where there is
            none.
        by_features: int64 (N,), which that is.
    """

    likeness: Tensor
    position: Tensor
    turn: Tensor
    distance: Tensor
    by_features: Tensor

    def split(self, count: int) -> tuple[Nearest, Nearest]:
        """The same of the first `count` images, and of the others."""
        parts = [getattr(self, entry.name).tensor_split([count]) for entry in fields(self)]
        first, rest = zip(*parts, strict=True)
        return Nearest(*first), Nearest(*rest)


@torch.no_grad()
def nearest_images(
    images: Tensor,
    others: Tensor,
    *,
    itself: Tensor | None = None,
    between: Callable[[int], object] = lambda done: None,
) -> Nearest:
    """The nearest of `others` for every image, under flips, turns, zooms, shifts and changes of brightness.

    Memory does not grow with N x M: the others are taken in blocks.

    Args:
        images: thumbnails, uint8 (N, 3, SIDE, SIDE).
        others: thumbnails, uint8 (M, 3, SIDE, SIDE).
        itself: int64 (N,), which of the others an image is, and so does not count; -1 where it is none of them. By
            default no image is one of them.
        between: is called with how many of the N + M images have been looked at since the last call.
    """
    count = min(_CANDIDATES, len(others))
    best = {way: _Best(len(images), count) for way in ("detail", "features")}
    own = torch.cat([torch.cat(_descriptions(block), 1) for block in images.split(_BLOCK)])
    for start in range(0, len(others), _BLOCK):
        block = others[start : start + _BLOCK]
        turned = [torch.cat(_descriptions(dihedral(block, turn).contiguous()), 1) for turn in range(_TURNS)]
        for rows in torch.arange(len(images)).split(_BLOCK):
            for way, columns, similarity in (("detail", _DETAIL, _cosine), ("features", _FEATURES, _nearness)):
                values, turn = torch.stack([similarity(own[rows, columns], t[:, columns]) for t in turned]).max(0)
                if itself is not None:
                    values[itself[rows, None] == start + torch.arange(len(block))] = -torch.inf
                best[way].update(rows, values, turn, start)
        between(len(block))

    found = torch.full((len(images),), -1.0)
    position, turn = torch.zeros(len(images), dtype=torch.long), torch.zeros(len(images), dtype=torch.long)
    for rows in torch.arange(len(images)).split(_PAIRS):
        for which in best.values():
            for rank in range(count):
                candidates, turns = which.position[rows, rank], which.turn[rows, rank]
                pairs = zip(others[candidates], turns.tolist(), strict=True)
                value = likeness(images[rows], torch.stack([dihedral(other, t) for other, t in pairs]))
                # An image itself is a candidate only for want of others.
                better = (value > found[rows]) & (which.value[rows, rank] > -torch.inf)
                found[rows[better]] = value[better]
                position[rows[better]], turn[rows[better]] = candidates[better], turns[better]
        between(len(rows))
    features = best["features"]
    return Nearest(found, position, turn, -features.value[:, 0], features.position[:, 0])


class _Best:
    """The highest values of each row so far, and where they were."""

    def __init__(self, rows: int, count: int) -> None:
        self.value = torch.full((rows, count), -torch.inf)
        self.position, self.turn = (torch.zeros(rows, count, dtype=torch.long) for _ in range(2))

    def update(self, rows: Tensor, values: Tensor, turn: Tensor, start: int) -> None:
        positions = (start + torch.arange(values.shape[1])).expand_as(values)
        everything = torch.cat([self.value[rows], values], 1)
        self.value[rows], top = everything.topk(self.value.shape[1], 1)
        self.position[rows] = torch.cat([self.position[rows], positions], 1).gather(1, top)
        self.turn[rows] = torch.cat([self.turn[rows], turn], 1).gather(1, top)


_DETAIL, _FEATURES = slice(0, 3 * _COARSE**2), slice(3 * _COARSE**2, None)


def _descriptions(images: Tensor) -> tuple[Tensor, Tensor]:
    """What candidates are found by: float (N, 3 * 16 * 16) of norm 1, and features of images of equal brightness."""
    fine = _local_contrast(F.adaptive_avg_pool2d(images.float(), _COARSE))[0].flatten(1)
    x = F.adaptive_avg_pool2d(images.float(), _FEATURED)
    middle = x.mean((2, 3), keepdim=True)
    contrast = (x - middle).square().mean((1, 2, 3), keepdim=True).sqrt()
    even = 128 + 48 * (x - middle) / (contrast + _HALF)
    return F.normalize(fine), random_features(even.round().clamp(0, 255).byte())


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def _nearness(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cdist(a, b) / a.shape[1] ** 0.5


def _local_contrast(x: Tensor) -> tuple[Tensor, Tensor]:
    """Images without what is smooth, every part with about the same contrast; and how much contrast each part had.

    A dark lake or a bright shore would outweigh everything else; here each part of the image has its say, but for those
    that have no detail above noise.

    Args:
        x: float (N, C, S, S) in grey levels.

    Returns:
        float (N, C, S, S), mostly within +-1, and float (N, 1, S, S) from 0, none, to 1.
    """

    def smooth(x: Tensor) -> Tensor:
        return _means(F.pad(x, [_WINDOW // 2] * 4, mode="reflect"), _WINDOW)

    fine = x - smooth(x)
    deviation = smooth(fine.square().mean(1, keepdim=True)).clamp_min(0).sqrt()
    return fine / (deviation + _HALF), deviation / (deviation + _HALF)


def _means(x: Tensor, side: int) -> Tensor:
    """Of every window of side x side; one direction after the other, which is several times as fast as both at once."""
    return F.avg_pool2d(F.avg_pool2d(x, (side, 1), stride=1), (1, side), stride=1)


def _resized(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images.float().mean(1, keepdim=True), (side, side), mode="bilinear", antialias=True)


def _middle(images: Tensor) -> tuple[Tensor, Tensor]:
    """Local contrast of the middle in grey, and how much there was of it, both (N, 1, 24, 24)."""
    edge = (_FINE - _MIDDLE) // 2
    evened, contrast = _local_contrast(_resized(images, _FINE))
    return evened[..., edge:-edge, edge:-edge], contrast[..., edge:-edge, edge:-edge]


def detail(images: Tensor) -> Tensor:
    """How much there is to tell a copy by, float (N,): 0 for one colour, a gradient or a single edge, 1 for a texture.

    The lower quartile over the image of c / (c + 3), c the local contrast in grey levels: three quarters of the image
    have as much.

    Args:
        images: thumbnails, uint8 (N, 3, SIDE, SIDE).
    """
    return torch.cat([_middle(batch)[1].flatten(1).quantile(0.25, 1) for batch in images.split(_BLOCK)])


def likeness(images: Tensor, others: Tensor) -> Tensor:
    """How far the middle of each image agrees in detail with some part of the other, float (N,), at most 1.

    The normalised cross-correlation (as in template matching) of their local contrast at a side of 32 pixels, at the
    best of all shifts and of six zooms by up to 1 / 0.76.

    Args:
        images: thumbnails, uint8 (N, 3, SIDE, SIDE).
        others: the same, each turned as its image lies.
    """
    template, _ = _middle(images)
    norm = template.square().sum((1, 2, 3)).sqrt()
    best = torch.full((len(images),), -1.0)
    for zoom in _ZOOMS:
        side = round(_FINE / zoom)
        x, _ = _local_contrast(_resized(others, side))
        spectrum = torch.fft.rfft2(x) * torch.fft.rfft2(template, s=(side, side)).conj()
        shifts = side - _MIDDLE + 1  # beyond them the template would leave the image
        product = torch.fft.irfft2(spectrum, s=(side, side))[:, 0, :shifts, :shifts]
        energy = _means(x.square(), _MIDDLE)[:, 0] * _MIDDLE**2
        correlation = product / (energy.clamp_min(0).sqrt() * norm[:, None, None]).clamp_min(1e-3)
        best = torch.maximum(best, correlation.flatten(1).amax(1))
    return best


def limit(among_real: Tensor) -> float:
    """From which likeness on an image counts as a copy, by what real images do among themselves.

    The 99th percentile of the likeness of real images to their nearest other one, but at least 0.6, which images of
    different ground hardly reach (see docs/audit.md), and at most 0.75, which copies that were changed a little still
    do: real images that overlap on the ground must not make copies pass.

    Args:
        among_real: float (N,), of one set against itself; plain images are left out. With fewer than 20
            nothing is measured and it is 0.75.
    """
    if len(among_real) < LEAST_IMAGES:
        return HIGHEST_LIMIT
    return float(among_real.quantile(_QUANTILE).clamp(_LOWEST_LIMIT, HIGHEST_LIMIT))
