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
    axes.plot([0], [0], MARKERS[0], color=arm_color(0), ms=4.8, label=baseline, zorder=3)
    ratios = sorted({0, *(ratio for line in lines for ratio, _ in line.points)})
    # Evenly spaced: a true scale would press the first ones together. What has one ratio stands side by side.
    place = {ratio: index for index, ratio in enumerate(ratios)}
    bare = [line for line in lines if not line.paints]
    beside = {id(line): -0.08 * (len(bare) - index) for index, line in enumerate(bare)}
    painting = [line for line in lines if line.paints]
    step = min(0.09, 0.5 / len(painting))
    beside |= {id(line): step * (index - (len(painting) - 1) / 2) for index, line in enumerate(painting)}
    for position, line in enumerate(lines, start=1):
        known = [(ratio, gain) for ratio, gain in line.points if gain.delta is not None]
        x = [place[ratio] + beside[id(line)] for ratio, _ in known]
        y = [PERCENT * (gain.delta or 0.0) for _, gain in known]
        color, marker = arm_color(position), MARKERS[position % len(MARKERS)]
        first = 0
        if line.begins is not None and known and known[0][0] == 0:
            # It begins at what it is without paintings: another arm, or the baseline itself.
            first = 1
            x[0] = next((beside[id(other)] for other in bare if other.name == line.begins), 0.0)
        axes.plot(x, y, color=color, lw=1.5)
        axes.plot(x[first:], y[first:], marker, color=color, ms=4.8, label=line.name, zorder=3)
        for at, (_, gain) in list(zip(x, known, strict=True))[first:]:
            _whisker(axes, at, gain.ci95, color)
    axes.set_xticks(range(len(ratios)), ["none" if ratio == 0 else f"1 : {ratio}" for ratio in ratios])
    axes.set_xlim(min(-0.25, -0.08 * len(bare) - 0.15), len(ratios) - 0.6)
    axes.grid(axis="y", color=HAIRLINE, lw=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("real : synthetic")
    axes.set_ylabel(f"mIoU, minus {baseline} (points)" if len(baseline) < 24 else "mIoU difference (points)")
    arm_legend(figure, width)


def _draw_frequencies(figure: Any, gains: ClassGains, classes: Sequence[tuple[str, Color]], width: float) -> None:
    axes = figure.add_subplot()
    axes.axhline(0, color=MUTED, lw=0.9)
    shown = [
        (PERCENT * share, gain, name, color)
        for share, gain, (name, color) in zip(gains.shares, gains.gains, classes, strict=True)
        if share is not None and gain.delta is not None
    ]
    shares, deltas = [share for share, *_ in shown], [PERCENT * (gain.delta or 0.0) for _, gain, *_ in shown]
    if gains.correlation is not None:
        slope, start = np.polyfit(shares, deltas, 1)
        ends = np.array([min(shares), max(shares)])
        axes.plot(ends, start + slope * ends, color=MUTED, lw=0.9, ls=(0, (4, 3)))
    for (share, gain, _, color), delta in zip(shown, deltas, strict=True):
        _whisker(axes, share, gain.ci95, MUTED)
        fill = tuple(channel / 255 for channel in color)
        axes.plot([share], [delta], "s", ms=7, mfc=fill, mec=INK, mew=0.6)
    axes.margins(x=0.09, y=0.12)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    # Names stand at the ends of the intervals, above or, where another is near, below.
    taken: list[tuple[float, float]] = []
    for share, gain, name, _ in shown:
        span = [PERCENT * end for end in gain.ci95 or (gain.delta or 0.0,) * 2]
        above, below = (((share - left) / (right - left), (end - low) / (high - low)) for end in (max(span), min(span)))
        near = any(abs(x - above[0]) < 70 / (72 * width) and abs(y - above[1]) < 0.07 for x, y in taken)
        taken.append(below if near else above)
        at = (share, min(span) if near else max(span))
        offset, side = ((0, -5), "top") if near else ((0, 5), "bottom")
        axes.annotate(name, at, offset, textcoords="offset points", ha="center", va=side)
    axes.grid(axis="y", color=HAIRLINE, lw=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("share of the training pixels (%)")
    axes.set_ylabel("IoU difference (points)")
    if gains.correlation is not None and width > 6:
        text = f"{gains.arm}: r = {gains.correlation.r:.2f}, p = {gains.correlation.p:.2g}".replace("= -", "= \u2212")
        axes.set_title(text, loc="right", fontsize=FONT_SIZE, color=MUTED)


def _whisker(axes: Any, x: float, interval: Interval | None, color: str) -> None:
    if interval is not None:
        axes.plot([x, x], [PERCENT * end for end in interval], color=color, lw=1.3, solid_capstyle="round")
