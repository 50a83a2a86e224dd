"""The charts of `study.sweep`: gain against the real : synthetic ratio, and against the frequency of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from terrasynth.study.canvas import (
    FONT_SIZE,
    HAIRLINE,
    INK,
    MARKERS,
    MUTED,
    PERCENT,
    Color,
    arm_color,
    arm_legend,
    canvas,
    png,
    svg,
)
from terrasynth.study.statistics import Interval
from terrasynth.study.sweep import ClassGains, Line

__all__ = ["frequency_figure", "frequency_picture", "ratio_figure", "ratio_picture"]

_PICTURE = 7.2


def ratio_figure(lines: Sequence[Line], baseline: str, *, width: float = 8.6) -> str:
    """Gain in mIoU against how much is painted: a line for arms that are alike in all else, and their intervals.

    Arms that paint nothing are points at 0.

    Args:
        lines: from `ratio_lines`.
        baseline: name of the arm that all are compared with.
        width: in inches.
    """
    with canvas(width, min(3.9, 0.85 * width)) as figure:
        _draw_ratios(figure, lines, baseline, width)
        return svg(figure, f"ratios-{width}")


def ratio_picture(lines: Sequence[Line], baseline: str) -> bytes:
    """The same as a PNG."""
    with canvas(_PICTURE, 3.9) as figure:
        _draw_ratios(figure, lines, baseline, _PICTURE)
        return png(figure)


def frequency_figure(gains: ClassGains, classes: Sequence[tuple[str, Color]], *, width: float = 8.6) -> str:
    """Gain in IoU of every class against its share of the training pixels, with intervals and the least-squares line.

    Args:
        gains: from `class_gains`.
        classes: names and colours.
        width: in inches.
    """
    with canvas(width, min(3.4, 0.85 * width)) as figure:
        _draw_frequencies(figure, gains, classes, width)
        return svg(figure, f"frequencies-{width}")


def frequency_picture(gains: ClassGains, classes: Sequence[tuple[str, Color]]) -> bytes:
    """The same as a PNG."""
    with canvas(_PICTURE, 3.4) as figure:
        _draw_frequencies(figure, gains, classes, _PICTURE)
        return png(figure)


def _draw_ratios(figure: Any, lines: Sequence[Line], baseline: str, width: float) -> None:
    axes = figure.add_subplot()
    axes.axhline(0, color=MUTED, lw=0.9)
    ratios = sorted({0, *(ratio for line in lines for ratio, _ in line.points)})
    # Evenly spaced, as what doubles: a true scale would press the first ones together. Intervals lie side by side.
    place = {ratio: index for index, ratio in enumerate(ratios)}
    step = min(0.09, 0.6 / max(1, len(lines)))
    for position, line in enumerate(lines, start=1):
        shift = step * (position - (len(lines) + 1) / 2)
        known = [(ratio, gain) for ratio, gain in line.points if gain.delta is not None]
        x = [place[ratio] + shift for ratio, _ in known]
        y = [PERCENT * (gain.delta or 0.0) for _, gain in known]
        color, marker = arm_color(position), MARKERS[position % len(MARKERS)]
        # Where a line begins without paintings, its point is another arm's, or the baseline itself.
        first = 1 if line.paints and known and known[0][0] == 0 else 0
        axes.plot(x, y, color=color, lw=1.5)
        axes.plot(x[first:], y[first:], marker, color=color, ms=4.8, label=line.name)
        for at, (_, gain) in list(zip(x, known, strict=True))[first:]:
            _whisker(axes, at, gain.ci95, color)
    axes.set_xticks(range(len(ratios)), ["none" if ratio == 0 else f"1 : {ratio}" for ratio in ratios])
    axes.set_xlim(-0.5, len(ratios) - 0.5)
    axes.grid(axis="y", color=HAIRLINE, lw=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("real : synthetic")
    axes.set_ylabel(f"mIoU, minus {baseline} (points)" if len(baseline) < 24 else "mIoU difference (points)")
    arm_legend(figure, width)


def _draw_frequencies(figure: Any, gains: ClassGains, classes: Sequence[tuple[str, Color]], width: float) -> None:
    axes = figure.add_subplot()
    axes.axhline(0, color=MUTED, lw=0.9)
    shown = [
        (PERCENT * share, PERCENT * gain.delta, gain.ci95, name, color)
        for share, gain, (name, color) in zip(gains.shares, gains.gains, classes, strict=True)
        if share is not None and gain.delta is not None
    ]
    shares, deltas = [each[0] for each in shown], [each[1] for each in shown]
    right = 1.16 * max(shares)
    if gains.correlation is not None:
        slope, start = np.polyfit(shares, deltas, 1)
        ends = np.array([min(shares), max(shares)])
        axes.plot(ends, start + slope * ends, color=MUTED, lw=0.9, ls=(0, (4, 3)))
    for share, delta, interval, name, color in shown:
        fill = tuple(channel / 255 for channel in color)
        _whisker(axes, share, interval, MUTED)
        axes.plot([share], [delta], "s", ms=7, mfc=fill, mec=INK, mew=0.6)
        # To the left at the right edge, where the name would leave the chart.
        left = share > 0.8 * right
        axes.annotate(
            name, (share, delta), (-8 if left else 8, 5), textcoords="offset points", ha="right" if left else "left"
        )
    axes.set_xlim(-0.03 * right, right)
    axes.grid(axis="y", color=HAIRLINE, lw=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("share of the training pixels (%)")
    axes.set_ylabel("IoU difference (points)")
    if gains.correlation is not None and width > 6:
        text = f"r = {gains.correlation.r:.2f}, p = {gains.correlation.p:.2g}".replace("-", "\u2212")
        axes.set_title(text, loc="right", fontsize=FONT_SIZE, color=MUTED)


def _whisker(axes: Any, x: float, interval: Interval | None, color: str) -> None:
    if interval is not None:
        axes.plot([x, x], [PERCENT * end for end in interval], color=color, lw=1.3, solid_capstyle="round")
