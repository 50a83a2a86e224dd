"""Scores of classes over a raster of any size: its windows overlap, and where they do, what they say is blended.

The raster is worked through from top to bottom, one row of windows after the other, so that memory grows with its width
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor

from terrasynth.data.blending import cover
from terrasynth.data.raster import Grid
from terrasynth.errors import TerraSynthError
from terrasynth.io import MAX_BYTES

__all__ = ["Part", "batches", "blend", "borders", "check_width", "highest", "rows_of_windows"]

#: Most bytes that a stripe as wide as the raster may take.
_MAX_STRIPE = 8 * MAX_BYTES
#: Bytes that a pixel of it takes beside its scores, as measured in refinement: classes, bands, copies.
_BESIDE = 48
#: Columns that are decided at a time.
_COLUMNS = 4096


@dataclass(frozen=True)
class Part:
    """What was computed for one window.

    Attributes:
        left: its first column.
        valid: bool (h, w): the pixels that the scores are about, the same in all windows that they are in.
        scores: float32 (K, h, w), on the CPU; None for a window without such pixels.
        asked: bool (K,), the classes that the window has an opinion of, 0 in the scores of others; None for all.
    """

    left: int
    valid: NDArray[np.bool_]
    scores: Tensor | None
    asked: Tensor | None = None


def blend(
    grid: Grid,
    size: int,
    overlap: int,
    num_classes: int,
    compute: Callable[[Sequence[Window]], Iterable[Part]],
    *,
    top: int = 0,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Scores of the classes, from top to bottom.

    Args:
        grid: of the raster.
        size: side of the windows; they are as large as the raster where that is smaller.
        overlap: pixels that neighbours share, at least.
        num_classes: K.
        compute: gives the part of every window of a row; gets them from left to right.
        top: the first row that is wanted; one of `borders`.

    Yields:
        The first row; float32 (K, rows, W), the mean of what the windows say by their weights (`data.blending`), for
        each class of those that were asked, -inf where none was; and bool (rows, W), the pixels that it is about. Both
        are overwritten in the next step.
    """
    down, across = cover(grid.height, size, overlap), cover(grid.width, size, overlap)
    rows = rows_of_windows(grid, size, overlap)
    total = torch.zeros(num_classes, down.size, grid.width)
    valid = torch.zeros(down.size, grid.width, dtype=torch.bool)
    weights = dict(zip(across.starts, across.weights, strict=True))
    ends = [*down.starts[1:], grid.height]
    heard: list[_Heard] = []
    for windows, end, weight in zip(rows, ends, down.weights, strict=True):
        start = windows[0].row_off
        if start + down.size <= top:
            continue
        heard = [row for row in heard if row.top + down.size > start]
        heard.append(_Heard(start, torch.from_numpy(weight), torch.zeros(num_classes, grid.width)))
        for part in compute(windows):
            columns = slice(part.left, part.left + across.size)
            valid[:, columns] = torch.from_numpy(part.valid)
            if part.scores is not None:
                total[:, :, columns].addcmul_(part.scores, torch.from_numpy(np.outer(weight, weights[part.left])))
                asked = slice(None) if part.asked is None else part.asked
                heard[-1].shares[asked, columns] += torch.from_numpy(weights[part.left])
        done = end - start
        if end > top:
            _divide(total[:, :done], start, heard)
            yield start, total[:, :done], valid[:done]
        kept = down.size - done
        for plane in total:  # one after the other, because what moves is copied
            plane[:kept] = plane[done:].clone()
            plane[kept:] = 0


@dataclass(frozen=True)
class _Heard:
    """The weight with which a row of windows has spoken: in column x of class k, `down[y - top] * shares[k, x]`."""

    top: int
    down: Tensor
    shares: Tensor


def _divide(total: Tensor, top: int, heard: Sequence[_Heard]) -> None:
    """Turn sums into means in place, if not all classes have all the weight; (K, rows, W) from row `top` on."""
    if all((row.shares == row.shares[0]).all() for row in heard):
        return
    for k, plane in enumerate(total):  # one after the other, to hold one plane of weights
        weight = torch.zeros_like(plane)
        for row in heard:
            down = row.down[top - row.top :][: len(plane)]
            weight[: len(down)].addr_(down, row.shares[k])
        plane.div_(weight).masked_fill_(weight == 0, -math.inf)


def highest(scores: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The highest score of every pixel and its class, some columns at a time.

    Args:
        scores: (K, rows, W).

    Yields:
        The columns; the score and the class, int64, both (rows, columns).
    """
    for left in range(0, scores.shape[-1], _COLUMNS):
        columns = slice(left, left + _COLUMNS)
        # With the classes last in memory the search is several times faster.
        value, best = scores[..., columns].movedim(0, -1).contiguous().max(-1)
        yield columns, value, best


def rows_of_windows(grid: Grid, size: int, overlap: int) -> list[list[Window]]:
    """The windows of `blend`, row by row from top to bottom, from left to right."""
    down, across = cover(grid.height, size, overlap), cover(grid.width, size, overlap)
    return [[Window(left, top, across.size, down.size) for left in across.starts] for top in down.starts]


def borders(grid: Grid, size: int, overlap: int) -> list[int]:
    """The rows where `blend` yields a stripe, and the end of the last."""
    return [0, *cover(grid.height, size, overlap).starts[1:], grid.height]


def batches(windows: Sequence[Window], size: int) -> list[Sequence[Window]]:
    """Neighbours that are computed together."""
    return [windows[first : first + size] for first in range(0, len(windows), size)]


def check_width(path: Path, grid: Grid, size: int, num_classes: int) -> None:
    """Refuse a raster that is too wide for memory.

    Raises:
        TerraSynthError: a row of windows would take more than 8 GiB, the networks aside.
    """
    needed = (4 * num_classes + _BESIDE) * min(size, grid.height) * grid.width
    if needed > _MAX_STRIPE:
        raise TerraSynthError(
            "the scene is too wide: a row of windows does not fit in memory",
            path=path,
            found=f"{grid.width} columns, {num_classes} classes, windows of {size}: {needed / 2**30:.1f} GiB",
            expected=f"at most {_MAX_STRIPE / 2**30:.1f} GiB",
            fix="lower --size, or cut the scene, for example with `gdal_translate -srcwin`",
        )
