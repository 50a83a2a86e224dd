"""How much of a rough label map a refined one mends, and how much it spoils."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["COMPLETE", "repair_score"]

#: IDGBR's grades of a repair: complete from here on, an error below 0, partial between.
COMPLETE = 0.8


def repair_score(
    refined: NDArray[np.integer[Any]],
    rough: NDArray[np.integer[Any]],
    truth: NDArray[np.integer[Any]],
    num_classes: int,
    damage: float = 1.0,
) -> NDArray[np.float64]:
    """IDGBR's IoU_imp by class.

    With the masks M_t of a class in the truth and M_r in the rough map ::

        R_T = M_t and M_r    R_F = (M_t or M_r) - R_T    IoU_imp = IoU in R_F - k (1 - IoU in R_T)

    where IoU is that of refined and true mask. It is 1 for the truth, 0 for the rough map itself, and below 0 where
    more is spoiled than mended. What the refined map adds outside of both masks is not seen.

    R_F may hold nothing true, where the rough map has only too much: then the IoU in it is 1 if none of that is left,
    and 0 otherwise. Where R_T is empty, nothing can be spoiled.

    Args:
        refined: (H, W), class indices; other values are no class.
        rough: like it.
        truth: like it. Pixels that are to be left out have to be no class in all three.
        num_classes: K.
        damage: k, which is not published.

    Returns:
        float64 (K,), at most 1; NaN for classes of which nothing is wrong in the rough map.
    """
    scores = np.full(num_classes, math.nan)
    for k in range(num_classes):
        m, r, t = refined == k, rough == k, truth == k
        right, wrong = t & r, t ^ r
        if not wrong.any():
            continue
        union = np.count_nonzero((m | t) & wrong)
        mended = np.count_nonzero(m & t & wrong) / union if union else 1.0
        spoiled = 1 - np.count_nonzero(m & right) / np.count_nonzero(right) if right.any() else 0.0
        scores[k] = mended - damage * spoiled
    return scores
