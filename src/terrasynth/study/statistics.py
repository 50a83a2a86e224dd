"""Means, intervals and paired differences over seeds.

Every number of a study is a small sample: one value per seed. Two arms are trained under the same seeds, so they are
compared seed by seed, which removes what the seeds have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

__all__ = [
    "Correlation",
    "Difference",
    "Interval",
    "Summary",
    "compare",
    "correlate",
    "difference_text",
    "points",
    "summarise",
    "t_quantile",
]

Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """One metric of one arm.

    Attributes:
        values: one value per seed, in the order of the seeds; None where the seed has none (a class without pixels).
        mean: over the seeds that have a value; None without any.
        ci95: Student-t interval of the mean; None for fewer than two values.
    """

    values: tuple[float | None, ...]
    mean: float | None
    ci95: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """As in `results.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """An arm minus another, seed by seed.

    Attributes:
        values: one difference per seed; None where either arm has no value.
        delta: their mean; None without any.
        ci95: Student-t interval of `delta`; None for fewer than two differences.
    """

    values: tuple[float | None, ...]
    delta: float | None
    ci95: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """As in `results.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation of two quantities.

    Attributes:
        r: within ±1.
        p: how often as strong a correlation would come by chance, if there were none (two-sided, normal quantities).
        ci95: Fisher's interval of `r`; ±1 for three pairs, which tell nothing.
        pairs: of how many.
    """

    r: float
    p: float
    ci95: Interval
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """As in `results.json`."""
        return asdict(self)


def correlate(x: Sequence[float | None], y: Sequence[float | None]) -> Correlation | None:
    """Pearson's correlation over pairs that have both values; None for fewer than three, or if either is constant."""
    from scipy.stats import pearsonr

    pairs = [(a, b) for a, b in zip(summarise(x).values, summarise(y).values, strict=True) if None not in (a, b)]
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    found = pearsonr(*zip(*pairs, strict=True))
    low, high = found.confidence_interval(0.95)
    return Correlation(float(found.statistic), float(found.pvalue), (float(low), float(high)), len(pairs))


def summarise(values: Sequence[float | None], *, confidence: float = 0.95) -> Summary:
    """Mean and interval over seeds; None and NaN mean "no value"."""
    present = tuple(None if value is None or math.isnan(value) else float(value) for value in values)
    return Summary(present, *_mean_interval(present, confidence))


def compare(
    values: Sequence[float | None], baseline: Sequence[float | None], *, confidence: float = 0.95
) -> Difference:
    """Paired difference `values - baseline`; both are in the same order of seeds."""
    pairs = zip(summarise(values).values, summarise(baseline).values, strict=True)
    differences = tuple(None if a is None or b is None else a - b for a, b in pairs)
    return Difference(differences, *_mean_interval(differences, confidence))


def difference_text(difference: Difference) -> str:
    """A difference in percentage points, with its interval: "+1.8 (+0.6 to +3.0)"."""
    if difference.ci95 is None:
        return points(difference.delta)
    return f"{points(difference.delta)} ({points(difference.ci95[0])} to {points(difference.ci95[1])})"


def points(fraction: float | None, *, signed: bool = True) -> str:
    """A fraction times 100, with one decimal, or up to three if a number that is not zero would read 0.0."""
    if fraction is None:
        return "–"
    value = 100 * fraction
    digits = next((digits for digits in (1, 2, 3) if round(value, digits)), 1)
    value = round(value, digits) + 0.0  # no negative zero
    return f"{value:{'+' if signed and value else ''}.{digits}f}".replace("-", "−")


@cache
def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """The t with P(-t < T < t) = `confidence`, for Student's distribution with `degrees` >= 1 degrees of freedom."""
    # In the angle theta = atan(t / sqrt(degrees)) the probability is smooth and theta bounded, so bisection is exact to
    # rounding whatever the tails.
    low, high = 0.0, math.pi / 2
    for _ in range(64):
        middle = (low + high) / 2
        if _central_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _central_probability(theta: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan theta): Abramowitz and Stegun, equations 26.7.3 and 26.7.4, for whole degrees."""
    odd = degrees % 2
    # The series' coefficients are the running products of 2/3, 4/5, ... (odd) or 1/2, 3/4, ... (even).
    upper = np.arange(1 + odd, degrees - 2, 2)
    coefficients = np.concatenate(([1.0], np.cumprod(upper / (upper + 1))))
    powers = math.cos(theta) ** np.arange(odd, degrees - 1, 2)
    if not odd:
        return math.sin(theta) * float(coefficients @ powers)
    series = 0.0 if degrees == 1 else float(coefficients @ powers)
    return 2 / math.pi * (theta + math.sin(theta) * series)


def _mean_interval(values: Sequence[float | None], confidence: float) -> tuple[float | None, Interval | None]:
    sample = np.array([value for value in values if value is not None])
    if sample.size == 0:
        return None, None
    mean = float(sample.mean())
    if sample.size == 1:
        return mean, None
    half = t_quantile(sample.size - 1, confidence) * float(sample.std(ddof=1)) / math.sqrt(sample.size)
    return mean, (mean - half, mean + half)
