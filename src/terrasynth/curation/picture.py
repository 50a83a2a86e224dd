"""Before and after a view: the samples that agree least and most with their masks, and the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terrasynth.data.folder import read_samples
from terrasynth.data.schema import LabelSchema
from terrasynth.data.scores import STEPS, read_codes
from terrasynth.data.view import View, view_file
from terrasynth.io import atomic_write

__all__ = ["draw_view"]

#: Samples of either kind.
_SHOWN = 5
_ROWS = ("painted", "mask", "labels kept", "loss")
_COLORS = {"real": "#868e96", "painted": "#d9902f", "view": "#3f86c7", "wanted": "#c2476b"}


def draw_view(view: View, schema: LabelSchema, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `views/NAME.png`.

    Args:
        view: need not be written yet.
        schema: the classes.
        rows: of scored samples, those that agree least with their masks first.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [*rows[:_SHOWN], *rows[_SHOWN:][-_SHOWN:]]
    least = min(_SHOWN, len(rows))
    # In inches. An automatic layout would take several times as long as the drawing.
    columns, side, gap, left, top, bars = 2 * _SHOWN, 1.2, 0.08, 1.6, 1.2, 0.28 * schema.num_classes
    width, height = left + columns * (side + gap), top + len(_ROWS) * (side + gap) + 0.3 + bars + 0.6
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)

    def place(x: float, y: float, across: float, down: float) -> Any:
        """Axes by their upper left corner and size in inches."""
        return figure.add_axes((x / width, 1 - (y + down) / height, across / width, down / height))

    grid = np.array(
        [
            [place(left + column * (side + gap), top + row * (side + gap), side, side) for column in range(columns)]
            for row in range(len(_ROWS))
        ]
    )
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
    for label, row in zip(_ROWS, grid, strict=True):
        row[0].set_ylabel(label, fontsize=9)
    for column, (row, image, mask) in enumerate(read_samples(view.dataset, schema, shown)):
        codes = read_codes(view.dataset, row["id"], mask.shape)
        kept = view.filtered(row["id"], mask, schema.ignore_index)
        pictures = (image, schema.to_color(mask), schema.to_color(kept), _heat(codes, mask == schema.ignore_index))
        for axes, picture in zip(grid[:, column], pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
        weight, score = view.weights.get(row["id"]), row["curation"]
        use = "left out" if weight is None else f"weight {weight:.2f}"
        grid[0, column].set_title(
            f"{row['id']}\naccuracy {score['accuracy']:.2f}\nmIoU {score['miou']:.2f}\n{use}", fontsize=7
        )
    figure.text(
        left / width,
        1 - 0.1 / height,
        f"{view.name}: the {least} samples that agree least with their masks"
        + (f", and the {len(shown) - least} that agree most" if len(shown) > least else "")
        + "\nloss: of each pixel, relative to its class's mean on real tiles, from 0 (dark) to 2 and more (yellow)",
        fontsize=9,
        va="top",
    )
    _histogram(place(left, height - bars - 0.6, columns * (side + gap), bars), view.summary["classes"], schema)
    with atomic_write(view_file(view.dataset, view.name).with_suffix(".png")) as partial:
        # Without the library's version, so that equal views have equal pictures.
        figure.savefig(partial, metadata={"Software": None})


def _heat(codes: NDArray[np.uint8], unlabelled: NDArray[np.bool_]) -> NDArray[np.uint8]:
    from matplotlib import colormaps

    colors = colormaps["inferno"](np.minimum(codes / (2 * STEPS), 1))[..., :3]
    heat: NDArray[np.uint8] = np.rint(255 * colors).astype(np.uint8)
    heat[unlabelled] = 128
    return heat


def _histogram(axes: Any, classes: Mapping[str, Mapping[str, float]], schema: LabelSchema) -> None:
    columns = list(next(iter(classes.values())))
    height = 0.8 / len(columns)
    places = np.arange(len(classes))
    for position, column in enumerate(columns):
        shares = [100 * shares[column] for shares in classes.values()]
        axes.barh(places + (position + 0.5) * height - 0.4, shares, height, color=_COLORS[column], label=column)
    axes.set_yticks(places, list(classes), fontsize=8)
    for name, color in zip(axes.get_yticklabels(), schema.colors, strict=True):
        name.set_bbox({"facecolor": "none", "edgecolor": tuple(value / 255 for value in color), "pad": 2})
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("share of the labelled pixels (%)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
