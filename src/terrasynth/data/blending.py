"""Overlapping windows along an axis, and weights by which what is computed in each of them becomes one whole.

What a network says near the edge of its window lacks half of its surroundings. So neighbours overlap; in the outer
quarters of an overlap only the one counts that sees further, and between them the weight passes over linearly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from terrasynth.errors import TerraSynthError

__all__ = ["Axis", "cover"]


@dataclass(frozen=True)
class Axis:
    """Windows of one size along an axis.

    Attributes:
        size: of each window.
        starts: where they begin, ascending.
        weights: float32 (n, size); over all windows the weights of a position sum to one.
    """

    size: int
    starts: tuple[int, ...]
    weights: NDArray[np.float32]


def cover(length: int, size: int, overlap: int) -> Axis:
    """Spread windows evenly over an axis; neighbours share at least `overlap` positions.

    Args:
        length: of the axis; if it is less than `size`, there is one window as long as the axis.
        size: of a window.
        overlap: less than `size`. Context of up to a quarter of it is complete wherever a window has weight.

    Raises:
        TerraSynthError: the overlap is not less than the size.
    """
    if not 0 <= overlap < size:
        raise TerraSynthError(
            "windows must be larger than their overlap",
            found=f"windows of {size}, overlap {overlap}",
            fix="lower --overlap, or raise --size",
        )
    if length <= size:
        return Axis(length, (0,), np.ones((1, length), dtype=np.float32))
    count = math.ceil((length - size) / (size - overlap)) + 1
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
    weights = np.ones((count, size))
    for i in range(count - 1):
        shared = starts[i] + size - starts[i + 1]
        passed = (((np.arange(shared) + 0.5) / max(1, shared) - 0.25) / 0.5).clip(0, 1)
        weights[i, size - shared :] *= 1 - passed
        weights[i + 1, :shared] *= passed
    total = np.zeros(length)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + size] += row
    normalised = [row / total[start : start + size] for start, row in zip(starts, weights, strict=True)]
    return Axis(size, tuple(starts), np.array(normalised, dtype=np.float32))
