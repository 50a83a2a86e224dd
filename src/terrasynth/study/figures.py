"""The charts of the report."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
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
    svg,
)
from terrasynth.study.statistics import Difference, Summary, difference_text

__all__ = ["class_figure", "curve_figure", "difference_figure"]


def class_figure(
    classes: Sequence[tuple[str, Color]], arms: Mapping[str, Sequence[Summary]], *, width: float = 8.6
) -> str:
    """Scores of every class: a point per arm, its interval as a line.

    Args:
        classes: name and colour, one row of the figure each.
        arms: by name, one summary per class (fractions in [0, 1]).
        width: in inches.
    """
    pitch, gap = 0.13, 0.19
    row = pitch * len(arms) + gap
    with canvas(width, row * len(classes) + 0.55) as figure:
        axes = figure.add_subplot()
        centres = [-position * row for position in range(len(classes))]
        for position, (name, summaries) in enumerate(arms.items()):
            offset = pitch * ((len(arms) - 1) / 2 - position)
            for centre, summary in zip(centres, summaries, strict=True):
                if summary.mean is not None:
                    _point(axes, summary.mean, summary.ci95, centre + offset, position)
            axes.plot([], [], MARKERS[position % len(MARKERS)], color=arm_color(position), ms=4.5, label=name)
        for centre, (_, color) in zip(centres, classes, strict=True):
            _swatch(axes, color, centre)
        for centre in centres[1:]:
            axes.axhline(centre + row / 2, color=HAIRLINE, lw=0.5)
        empty = [all(summaries[index].mean is None for summaries in arms.values()) for index in range(len(classes))]
        low, high = _limits(summary for summaries in arms.values() for summary in summaries)
        for centre, nothing in zip(centres, empty, strict=True):
            if nothing:
                axes.text(low, centre, " absent from the test tiles", color=MUTED, va="center", style="italic")
        axes.set_xlim(low, high)
        axes.set_ylim(centres[-1] - row / 2, row / 2)
        _row_labels(axes, centres, [name for name, _ in classes], width, row, gap=18)
        axes.set_xlabel("IoU (%)")
        arm_legend(figure, width)
        return svg(figure, f"classes-{width}")


def difference_figure(rows: Sequence[tuple[str, Difference, int]], *, width: float = 8.6) -> str:
    """Differences in mIoU with their intervals, and the single seeds as faint points.

    Args:
        rows: label, difference (fractions) and position of the arm (its colour).
        width: in inches.
    """
    wide = width > 6
    row = 0.42 if wide else 0.5
    with canvas(width, row * len(rows) + 0.6) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color=MUTED, lw=0.9)
        centres = [float(-position) for position in range(len(rows))]
        for centre, (_, difference, position) in zip(centres, rows, strict=True):
            seeds = [PERCENT * value for value in difference.values if value is not None]
            axes.plot(seeds, [centre - 0.24] * len(seeds), "|", color=arm_color(position), ms=5, mew=0.9, alpha=0.8)
            if difference.delta is not None:
                _point(axes, difference.delta, difference.ci95, centre, position, scale=1.35)
            if wide:
                axes.text(
                    1.02,
                    centre,
                    difference_text(difference),
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    color=INK,
                )
        axes.margins(x=0.06)
        axes.set_ylim(centres[-1] - 0.6, 0.6)
        _row_labels(axes, centres, [label for label, _, _ in rows], width, row)
        axes.set_xlabel("difference in test mIoU (percentage points)" if wide else "mIoU difference (points)")
        return svg(figure, f"differences-{width}")


def curve_figure(
    curves: Mapping[str, Sequence[tuple[Sequence[int], Sequence[float | None]]]], *, width: float = 8.6
) -> str:
    """Validation mIoU against the step: every seed faint, their mean bold.

    Args:
        curves: by arm, steps and mIoU (fractions) of every seed.
        width: in inches.
    """
    with canvas(width, min(3.4, 0.65 * width)) as figure:
        axes = figure.add_subplot()
        for position, (name, seeds) in enumerate(curves.items()):
            color = arm_color(position)
            by_step: dict[int, list[float]] = {}
            for steps, scores in seeds:
                drawn = [
                    (step, PERCENT * score) for step, score in zip(steps, scores, strict=True) if score is not None
                ]
                for step, score in drawn:
                    by_step.setdefault(step, []).append(score)
                axes.plot(*zip(*drawn, strict=True) if drawn else ([], []), color=color, lw=0.6, alpha=0.4)
            mean = {step: float(np.mean(by_step[step])) for step in sorted(by_step)}
            marker = MARKERS[position % len(MARKERS)]
            axes.plot(list(mean), list(mean.values()), marker=marker, color=color, lw=1.5, ms=3.2, label=name)
        axes.grid(axis="y", color=HAIRLINE, lw=0.5)
        axes.set_xlabel("training step")
        axes.set_ylabel("validation mIoU (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        arm_legend(figure, width)
        return svg(figure, f"curves-{width}")


def _point(
    axes: Any, mean: float, interval: tuple[float, float] | None, y: float, position: int, *, scale: float = 1.0
) -> None:
    color = arm_color(position)
    if interval is not None:
        axes.plot([PERCENT * end for end in interval], [y, y], color=color, lw=1.4 * scale, solid_capstyle="round")
    axes.plot([PERCENT * mean], [y], MARKERS[position % len(MARKERS)], color=color, ms=4 * scale)


def _swatch(axes: Any, color: Color, y: float) -> None:
    from matplotlib.transforms import ScaledTranslation

    left = ScaledTranslation(-9 / 72, 0, axes.figure.dpi_scale_trans)
    fill = tuple(channel / 255 for channel in color)
    place = axes.get_yaxis_transform() + left
    axes.plot([0], [y], "s", transform=place, clip_on=False, ms=8, mfc=fill, mec=MUTED, mew=0.5)


def _limits(summaries: Iterator[Summary]) -> tuple[float, float]:
    ends = [
        PERCENT * end
        for summary in summaries
        if summary.mean is not None
        for end in (summary.mean, *(summary.ci95 or ()))
    ]
    if not ends:
        return 0.0, 100.0
    # An interval of few seeds may reach beyond what an IoU can be.
    low, high = max(0.0, min(ends)), min(100.0, max(ends))
    pad = 0.03 * (high - low) + 0.5
    return max(-0.5, low - pad), min(100.5, high + pad)


def _row_labels(
    axes: Any, centres: Sequence[float], labels: Sequence[str], width: float, row: float, *, gap: float = 8
) -> None:
    from matplotlib.transforms import ScaledTranslation

    axes.set_yticks(centres, [""] * len(labels))
    axes.grid(axis="x", color=HAIRLINE, lw=0.5)
    axes.set_axisbelow(True)
    leading = 1.15 * FONT_SIZE
    for centre, label in zip(centres, labels, strict=True):
        lines = textwrap.wrap(
            label, 26 if width > 6 else 17, max_lines=max(1, int(row * 72 / leading)), placeholder="…"
        )
        for number, line in enumerate(lines):
            # A text of several lines would be placed by matplotlib's font, not by the reader's.
            down = (number - (len(lines) - 1) / 2) * leading
            shift = ScaledTranslation(-gap / 72, -down / 72, axes.figure.dpi_scale_trans)
            place = axes.get_yaxis_transform() + shift
            axes.text(0, centre, line, transform=place, ha="right", va="center_baseline", color=INK)
