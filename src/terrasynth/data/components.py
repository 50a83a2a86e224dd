"""Connected components of a class map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["connected"]


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
