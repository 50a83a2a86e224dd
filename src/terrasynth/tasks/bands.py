"""Where the boundaries of label maps are: contours, bands around them, edge maps, and the weighted F of edge maps.

A map here holds labels, int16 (H, W): the class index 0..K-1, K for a prediction that is no class, -1 where a pixel is
left out. What lies outside the frame, and what is left out, is unknown: no class ends there, so there is no boundary.

Windows around every pixel are looked at for all classes at once, on planes: one bit a label, uint8 (P, H, W) with
P = ceil((K + 1) / 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from terrasynth.errors import TerraSynthError

__all__ = [
    "LEFT_OUT",
    "Labels",
    "Tolerance",
    "as_labels",
    "contour",
    "count",
    "dilate",
    "disc",
    "edge_map",
    "ellipse",
    "mixed",
    "planes",
    "square",
    "weighted_f",
]

#: The label of pixels that are left out of everything.
LEFT_OUT = -1

Unit = Literal["px", "m", "diagonal"]
Labels = NDArray[np.int16]
Planes = NDArray[np.uint8]
_Mask = NDArray[np.bool_]
_Counts = NDArray[np.int64]

# Row v: the eight bits of v, the most significant first, as numpy packs them.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.int64)
# As many digits in base five as int32 can add up; see `edge_map`.
_DIGITS = 5 ** np.arange(13, dtype=np.int32)


@dataclass(frozen=True)
class Tolerance:
    """A distance within which boundaries agree.

    Attributes:
        value: how far, above 0.
        unit: `px`; `m`, metres on the ground; or `diagonal`, a share of the map's diagonal.

    Raises:
        TerraSynthError: the value is not above 0, or the unit is unknown.
    """

    value: float
    unit: Unit = "px"

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise TerraSynthError("a tolerance must be a distance", found=self.value, expected="a number above 0")
        if self.unit not in get_args(Unit):
            raise TerraSynthError("unknown unit", found=repr(self.unit), expected=" | ".join(get_args(Unit)))

    def pixels(self, shape: Sequence[int], gsd: float | None = None) -> float:
        """The distance in pixels of a map, at least 1.

        Args:
            shape: (H, W). A share of its diagonal counts as 1 pixel where it is less, as published.
            gsd: metres per pixel; needed for metres alone.

        Raises:
            TerraSynthError: metres without a GSD, or less than a pixel.
        """
        if self.unit == "diagonal":
            return max(1.0, self.value * math.hypot(*shape))
        if self.unit == "m" and not (gsd is not None and 0 < gsd < math.inf):
            raise TerraSynthError(
                "a tolerance in metres needs the size of a pixel",
                found=f"{self.value:g} m, and a GSD of {gsd}",
                expected="a GSD in metres per pixel, above 0",
                fix="give gsd, or the tolerance in pixels",
            )
        pixels = self.value / (gsd or 1) if self.unit == "m" else float(self.value)
        if pixels < 1 - 1e-9:
            raise TerraSynthError(
                "the tolerance is less than a pixel",
                found=f"{self.value:g} {self.unit} = {pixels:.3g} px",
                expected="at least 1 px",
                fix="allow more: maps of this GSD do not show boundaries any finer",
            )
        return pixels


def as_labels(values: NDArray[Any], num_classes: int, left_out: _Mask) -> Labels:
    """Class indices as labels: whatever is none of 0..K-1 becomes K, and -1 where `left_out`."""
    labels = np.full(values.shape, num_classes, dtype=np.int16)
    np.copyto(labels, values, where=(values >= 0) & (values < num_classes), casting="unsafe")
    labels[left_out] = LEFT_OUT
    return labels


# --- planes and windows ----------------------------------------------------------------------------------------------


def planes(labels: Labels, num_classes: int) -> Planes:
    """One bit for each of the K + 1 labels, (ceil((K + 1) / 8), H, W); none where left out."""
    onehot = np.eye(num_classes + 1, num_classes + 2, dtype=np.uint8)
    # The column of zeros is the last one, where the index -1 looks.
    return np.stack([row[labels] for row in np.packbits(onehot, axis=0)])


def count(bits: Planes, num_classes: int) -> _Counts:
    """How many pixels have each of the K + 1 bits, int64 (K + 1,)."""
    words = [np.bincount(word[word > 0], minlength=256) @ _BITS for word in bits]
    return np.concatenate(words)[: num_classes + 1]


def mixed(bits: Planes) -> _Mask:
    """Where there are two bits or more, (H, W)."""
    several: _Mask = np.bitwise_count(bits).sum(0, dtype=np.uint8) > 1
    return several


def disc(radius: float) -> list[int]:
    """How far each row of a disc reaches to either side, from its middle row outwards: Euclidean distance <= radius."""
    # A quotient such as 0.9 m / 0.3 m may fall a rounding short of a whole number.
    rows = range(math.floor(radius + 1e-9) + 1)
    return [math.floor(math.sqrt(max(radius**2 - row**2, 0)) + 1e-9) for row in rows]


def ellipse(radius: int) -> list[int]:
    """The same of OpenCV's `MORPH_ELLIPSE` of side 2 radius + 1, which rounds where a disc cuts off."""
    return [round(math.sqrt(radius**2 - row**2)) for row in range(radius + 1)]


def square(distance: int) -> list[int]:
    """The same of a square: Chebyshev distance <= distance."""
    return [distance] * (distance + 1)


def dilate(bits: Planes, half_widths: Sequence[int]) -> Planes:
    """Every bit that occurs in the window around a pixel.

    Args:
        bits: (P, H, W).
        half_widths: what `disc`, `ellipse` or `square` gives.
    """
    if len({*half_widths}) == 1:
        return _run(_run(bits, half_widths[0], axis=2), len(half_widths) - 1, axis=1)
    result = np.zeros_like(bits)
    rows, reach = bits, 0
    # From the outermost row inwards, because each one is the wider version of the one before.
    for offset, half_width in reversed([*enumerate(half_widths)]):
        rows, reach = _run(rows, half_width - reach, axis=2, reach=reach), half_width
        _add_shifted(result, rows, offset, axis=1)
    return result


def _run(bits: Planes, distance: int, *, axis: int, reach: int = 0) -> Planes:
    """Dilate along one axis by `distance`, what has been dilated by `reach` already."""
    while distance > 0:
        # Farther than this, a gap would open between the copy and where it came from.
        step = min(distance, 2 * reach + 1)
        wider = bits.copy()
        _add_shifted(wider, bits, step, axis=axis)
        bits, reach, distance = wider, reach + step, distance - step
    return bits


def _add_shifted(target: Planes, bits: Planes, offset: int, *, axis: int) -> None:
    """Add `bits`, shifted by `offset` both ways along an axis, to `target`."""
    target, bits = target.swapaxes(0, axis), bits.swapaxes(0, axis)
    length = len(bits) - offset
    if length > 0:
        target[offset:] |= bits[:length]
        target[:length] |= bits[offset:]


def contour(labels: Labels) -> _Mask:
    """The outermost pixels of every class, (H, W): those beside, above or below a pixel of another label."""
    found = np.zeros(labels.shape, dtype=np.bool_)
    for axis in (0, 1):
        a, b = labels.swapaxes(0, axis)[:-1], labels.swapaxes(0, axis)[1:]
        differ = (a != b) & (a != LEFT_OUT) & (b != LEFT_OUT)
        sides = found.swapaxes(0, axis)
        sides[:-1] |= differ
        sides[1:] |= differ
    return found


# --- weighted F ------------------------------------------------------------------------------------------------------


def edge_map(labels: Labels, num_classes: int, size: int = 3) -> _Mask:
    """The edges between classes, whichever these are, as IDGBR's "WF (3px)" draws them, (H, W).

    An edge is where the 3 x 3 Sobel gradient of some class's indicator is not zero, dilated by size x size; the frame
    mirrors what is inside. The published code takes the gradient of the stored values, in which edges between several
    classes may cancel out; this one is the same whatever the classes' numbers are. A neighbour that is left out counts
    as what its pixel is; pixels that are left out are no edges.

    Args:
        labels: the map.
        num_classes: K.
        size: odd; 3 gives edges that are 4 pixels wide.
    """
    known = labels != LEFT_OUT
    edges = np.zeros(labels.shape, dtype=np.bool_)
    across, down = (0, 0) if known.all() else _sobel((~known).astype(np.int32))
    for first in range(0, num_classes + 1, len(_DIGITS)):
        # Every class is a digit in base five. A class's gradient lies between -4 and 4, so that no digit can cancel
        # what others add up to, and one gradient is as good as one for every class.
        table = np.zeros(num_classes + 2, dtype=np.int32)
        table[first : num_classes + 1][: len(_DIGITS)] = _DIGITS[: num_classes + 1 - first]
        code = table[labels]
        x, y = _sobel(code)
        edges |= (x + code * across != 0) | (y + code * down != 0)
    wide = dilate((edges & known)[None].view(np.uint8), square(size // 2))[0].view(np.bool_)
    return wide & known


def _sobel(values: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    padded = np.pad(values, 1, mode="reflect")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]


def weighted_f(prediction: _Mask, truth: _Mask, known: _Mask | None = None) -> float:
    """The weighted F-measure of binary maps, in [0, 1] (Margolin et al. 2014, equations 4 to 9 with beta = 1).

    With G the truth, D the prediction and E = |G - D|: a missed pixel costs as much as the missed pixels around it, by
    a Gaussian of sigma 5 on 7 x 7 pixels, where a pixel outside G counts as the nearest one inside; a false one costs
    B = 2 - exp(ln(1/2) / 5 * distance to G). Then TP_w = sum(G) - missed, FP_w = false and ::

        R_w = 1 - missed / sum(G)    P_w = TP_w / (TP_w + FP_w)    F_w = 2 P_w R_w / (P_w + R_w)

    Args:
        prediction: (H, W).
        truth: (H, W).
        known: which pixels count, (H, W); all by default. The prediction at the others changes nothing.

    Returns:
        NaN where the truth is empty.
    """
    known = np.ones(truth.shape, dtype=np.bool_) if known is None else known
    truth = truth & known
    size = int(truth.sum())
    if not size:
        return math.nan
    error = truth & ~prediction
    y, x = ndimage.distance_transform_edt(~truth, return_distances=False, return_indices=True)
    # The weights fall off to both sides alike, so the 7 x 7 Gaussian is a column times a row. Outside the frame is 0.
    gauss = np.exp(-(np.arange(-3, 4) ** 2) / 50.0)
    gauss /= gauss.sum()
    spread = error[y, x].astype(np.float64)
    for axis in (0, 1):
        spread = ndimage.correlate1d(spread, gauss, axis=axis, mode="constant")
    missed = float(spread[error].sum())
    wrong = np.nonzero(prediction & ~truth & known)
    distance = np.hypot(y[wrong] - wrong[0], x[wrong] - wrong[1])
    false = float((2 - np.exp(math.log(0.5) / 5 * distance)).sum())
    hit = size - missed
    if hit <= 0:
        return 0.0
    recall, precision = hit / size, hit / (hit + false)
    return 2 * precision * recall / (precision + recall)
