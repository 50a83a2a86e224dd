"""What the charts of a study are drawn on: SVG for a page, PNG for everything else.

The SVG has real text, and its neutral colours are CSS variables with a light fallback, so that a chart inside the
report follows its light or dark theme, and the same file on its own is readable too.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "ARM_COLORS",
    "FONT_SIZE",
    "HAIRLINE",
    "INK",
    "MARKERS",
    "MUTED",
    "PERCENT",
    "Color",
    "arm_color",
    "arm_legend",
    "canvas",
    "png",
    "svg",
]

Color = tuple[int, int, int]

#: Distinguishable without colour vision, and on white as on black; the baseline is the grey one.
ARM_COLORS = ("#868e96", "#3f86c7", "#d9902f", "#c2476b", "#3c9a78", "#8a6bc4", "#7f9a2e", "#2aa3b5", "#7d5a44")
# Ten beside nine colours: a pair of both comes back after ninety arms.
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p", "<", "h")
#: matplotlib knows no CSS variables: it draws in these colours, which are replaced in the SVG.
INK, MUTED, HAIRLINE = "#010203", "#040506", "#070809"
_THEME = {INK: ("ink", "#1c2023"), MUTED: ("muted", "#687076"), HAIRLINE: ("hairline", "#dcdcd6")}
PERCENT = 100
FONT_SIZE = 9


def arm_color(position: int) -> str:
    """Colour of the arm at `position` in the study, as #rrggbb."""
    return ARM_COLORS[position % len(ARM_COLORS)]


@contextmanager
def canvas(width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches in the style of the report."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": FONT_SIZE,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": HAIRLINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.labelsize": FONT_SIZE,
        "xtick.labelsize": FONT_SIZE - 0.5,
        "ytick.labelsize": FONT_SIZE - 0.5,
        "legend.fontsize": FONT_SIZE,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.unicode_minus": True,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        # The reader's own font draws the text; that matplotlib's lacks a glyph does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03))
        yield figure


def svg(figure: Any, salt: str) -> str:
    """The chart as SVG, for a page or alone."""
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
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for color, (name, light) in _THEME.items():
        text = text.replace(color, f"var(--{name}, {light})")
    return text.replace("'DejaVu Sans', sans-serif", "system-ui, 'DejaVu Sans', sans-serif")


def png(figure: Any) -> bytes:
    """The chart as a picture in the light theme."""
    from matplotlib.colors import to_hex
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    figure.draw_without_rendering()  # makes the ticks
    for artist in figure.findobj(lambda artist: isinstance(artist, Line2D | Patch | Text)):
        for part in ("color", "edgecolor", "markeredgecolor"):
            if hasattr(artist, f"get_{part}"):
                color = to_hex(getattr(artist, f"get_{part}")())
                if color in _THEME:
                    getattr(artist, f"set_{part}")(_THEME[color][1])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def arm_legend(figure: Any, width: float) -> None:
    """Name the arms above the chart, which keeps its own height."""
    characters = int(width * 72 / (0.62 * FONT_SIZE))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    labels = [textwrap.shorten(label, characters - 8, placeholder="…") for label in labels]
    one_row = sum(len(label) + 6 for label in labels) <= characters
    columns = len(labels) if one_row else max(1, min(4, characters // (max(map(len, labels)) + 6)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 1.35 * FONT_SIZE / 72 * rows)
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.4,
    )
