"""The charts of the report.

The charts are SVG with real text. Their neutral colours are CSS variables with a light fallback, so that a chart inside
the report follows its light or dark theme, and the same file on its own is readable too.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from terrasynth.study.statistics import Difference, Summary, difference_text

__all__ = [
    "ARM_COLORS",
    "Color",
    "arm_color",
    "class_figure",
    "curve_figure",
    "difference_figure",
]

Color = tuple[int, int, int]

#: Distinguishable without colour vision, and on white as on black; the baseline is the grey one.
ARM_COLORS = ("#868e96", "#3f86c7", "#d9902f", "#c2476b", "#3c9a78", "#8a6bc4", "#7f9a2e", "#2aa3b5", "#7d5a44")
# Ten beside nine colours: a pair of both comes back after ninety arms.
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p", "<", "h")
#: matplotlib knows no CSS variables: it draws in these colours, which are replaced in the SVG.
_INK, _MUTED, _HAIRLINE = "#010203", "#040506", "#070809"
_THEME = {_INK: "var(--ink, #1c2023)", _MUTED: "var(--muted, #687076)", _HAIRLINE: "var(--hairline, #dcdcd6)"}
_PERCENT = 100
_FONT_SIZE = 9


def arm_color(position: int) -> str:
    """Colour of the arm at `position` in the study, as #rrggbb."""
    return ARM_COLORS[position % len(ARM_COLORS)]


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
    with _figure(width, row * len(classes) + 0.55) as figure:
        axes = figure.add_subplot()
        centres = [-position * row for position in range(len(classes))]
        for position, (name, summaries) in enumerate(arms.items()):
            offset = pitch * ((len(arms) - 1) / 2 - position)
            for centre, summary in zip(centres, summaries, strict=True):
                if summary.mean is not None:
                    _point(axes, summary.mean, summary.ci95, centre + offset, position)
            axes.plot([], [], _MARKERS[position % len(_MARKERS)], color=arm_color(position), ms=4.5, label=name)
        for centre, (_, color) in zip(centres, classes, strict=True):
            _swatch(axes, color, centre)
        for centre in centres[1:]:
            axes.axhline(centre + row / 2, color=_HAIRLINE, lw=0.5)
        empty = [all(summaries[index].mean is None for summaries in arms.values()) for index in range(len(classes))]
        low, high = _limits(summary for summaries in arms.values() for summary in summaries)
        for centre, nothing in zip(centres, empty, strict=True):
            if nothing:
                axes.text(low, centre, " absent from the test tiles", color=_MUTED, va="center", style="italic")
        axes.set_xlim(low, high)
        axes.set_ylim(centres[-1] - row / 2, row / 2)
        _row_labels(axes, centres, [name for name, _ in classes], width, row, gap=18)
        axes.set_xlabel("IoU (%)")
        _arm_legend(figure, width)
        return _svg(figure, f"classes-{width}")


def difference_figure(rows: Sequence[tuple[str, Difference, int]], *, width: float = 8.6) -> str:
    """Differences in mIoU with their intervals, and the single seeds as faint points.

    Args:
        rows: label, difference (fractions) and position of the arm (its colour).
        width: in inches.
    """
    wide = width > 6
    row = 0.42 if wide else 0.5
    with _figure(width, row * len(rows) + 0.6) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color=_MUTED, lw=0.9)
        centres = [float(-position) for position in range(len(rows))]
        for centre, (_, difference, position) in zip(centres, rows, strict=True):
            seeds = [_PERCENT * value for value in difference.values if value is not None]
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
                    color=_INK,
                )
        axes.margins(x=0.06)
        axes.set_ylim(centres[-1] - 0.6, 0.6)
        _row_labels(axes, centres, [label for label, _, _ in rows], width, row)
        axes.set_xlabel("difference in test mIoU (percentage points)" if wide else "mIoU difference (points)")
        return _svg(figure, f"differences-{width}")


def curve_figure(
    curves: Mapping[str, Sequence[tuple[Sequence[int], Sequence[float | None]]]], *, width: float = 8.6
) -> str:
    """Validation mIoU against the step: every seed faint, their mean bold.

    Args:
        curves: by arm, steps and mIoU (fractions) of every seed.
        width: in inches.
    """
    with _figure(width, min(3.4, 0.65 * width)) as figure:
        axes = figure.add_subplot()
        for position, (name, seeds) in enumerate(curves.items()):
            color = arm_color(position)
            by_step: dict[int, list[float]] = {}
            for steps, scores in seeds:
                drawn = [
                    (step, _PERCENT * score) for step, score in zip(steps, scores, strict=True) if score is not None
                ]
                for step, score in drawn:
                    by_step.setdefault(step, []).append(score)
                axes.plot(*zip(*drawn, strict=True) if drawn else ([], []), color=color, lw=0.6, alpha=0.4)
            mean = {step: float(np.mean(by_step[step])) for step in sorted(by_step)}
            marker = _MARKERS[position % len(_MARKERS)]
            axes.plot(list(mean), list(mean.values()), marker=marker, color=color, lw=1.5, ms=3.2, label=name)
        axes.grid(axis="y", color=_HAIRLINE, lw=0.5)
        axes.set_xlabel("training step")
        axes.set_ylabel("validation mIoU (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _arm_legend(figure, width)
        return _svg(figure, f"curves-{width}")


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": _FONT_SIZE,
        "text.color": _INK,
        "axes.labelcolor": _MUTED,
        "axes.edgecolor": _HAIRLINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.labelsize": _FONT_SIZE,
        "xtick.labelsize": _FONT_SIZE - 0.5,
        "ytick.labelsize": _FONT_SIZE - 0.5,
        "legend.fontsize": _FONT_SIZE,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.unicode_minus": True,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        # The reader's own font draws the text; that matplotlib's lacks a glyph does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03))
        yield figure


def _svg(figure: Any, salt: str) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    # One salt a chart: equal inputs give equal files, and identifiers of two charts in one page do not collide.
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for color, variable in _THEME.items():
        svg = svg.replace(color, variable)
    return svg.replace("'DejaVu Sans', sans-serif", "system-ui, 'DejaVu Sans', sans-serif")


def _point(
    axes: Any, mean: float, interval: tuple[float, float] | None, y: float, position: int, *, scale: float = 1.0
) -> None:
    color = arm_color(position)
    if interval is not None:
        axes.plot([_PERCENT * end for end in interval], [y, y], color=color, lw=1.4 * scale, solid_capstyle="round")
    axes.plot([_PERCENT * mean], [y], _MARKERS[position % len(_MARKERS)], color=color, ms=4 * scale)


def _swatch(axes: Any, color: Color, y: float) -> None:
    from matplotlib.transforms import ScaledTranslation

    left = ScaledTranslation(-9 / 72, 0, axes.figure.dpi_scale_trans)
    fill = tuple(channel / 255 for channel in color)
    place = axes.get_yaxis_transform() + left
    axes.plot([0], [y], "s", transform=place, clip_on=False, ms=8, mfc=fill, mec=_MUTED, mew=0.5)


def _limits(summaries: Iterator[Summary]) -> tuple[float, float]:
    ends = [
        _PERCENT * end
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
    axes.grid(axis="x", color=_HAIRLINE, lw=0.5)
    axes.set_axisbelow(True)
    leading = 1.15 * _FONT_SIZE
    for centre, label in zip(centres, labels, strict=True):
        lines = textwrap.wrap(
            label, 26 if width > 6 else 17, max_lines=max(1, int(row * 72 / leading)), placeholder="…"
        )
        for number, line in enumerate(lines):
            # A text of several lines would be placed by matplotlib's font, not by the reader's.
            down = (number - (len(lines) - 1) / 2) * leading
            shift = ScaledTranslation(-gap / 72, -down / 72, axes.figure.dpi_scale_trans)
            place = axes.get_yaxis_transform() + shift
            axes.text(0, centre, line, transform=place, ha="right", va="center_baseline", color=_INK)


def _arm_legend(figure: Any, width: float) -> None:
    """Name the arms above the chart, which keeps its own height."""
    characters = int(width * 72 / (0.62 * _FONT_SIZE))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    labels = [textwrap.shorten(label, characters - 8, placeholder="…") for label in labels]
    one_row = sum(len(label) + 6 for label in labels) <= characters
    columns = len(labels) if one_row else max(1, min(4, characters // (max(map(len, labels)) + 6)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 1.35 * _FONT_SIZE / 72 * rows)
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.4,
    )
