"""Making a view of a scored dataset: the rules, what came of them, and a picture. No model is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrasynth.curation.picture import draw_view
from terrasynth.curation.select import Selection, Table, histogram, select
from terrasynth.data.folder import read_samples
from terrasynth.data.scores import AGAIN, ClassStatistics, add_scores, busy, read_codes
from terrasynth.data.view import View, code_limit, view_file
from terrasynth.data.write import read_manifest
from terrasynth.errors import TerraSynthError, listed
from terrasynth.io import alone, remove_incomplete
from terrasynth.progress import track
from terrasynth.recipe import CurationConfig

__all__ = ["curate", "report"]


def curate(dataset: Path, name: str, config: CurationConfig, *, seed: int = 0) -> View:
    """Write the view `name` of a scored dataset, and its picture: `views/NAME.json` and `views/NAME.png`.

    The view depends on the dataset, its scores, the settings and the seed alone. A view of that name is replaced.

    Raises:
        TerraSynthError: samples have no scores, a class is unknown, nothing is left, or another process is at it.
    """
    with alone(dataset, busy(dataset)):
        return _curate(dataset, name, config, seed)


def _curate(dataset: Path, name: str, config: CurationConfig, seed: int) -> View:
    view_file(dataset, name)  # a name that is none shows at once
    schema, manifest = read_manifest(dataset)
    statistics = ClassStatistics.read(dataset)
    # From the scores' own files, which say of which image and mask they are.
    rows = add_scores(dataset, list(manifest))
    missing = [row["id"] for row in rows if "curation" not in row]
    if statistics is None or missing:
        raise TerraSynthError(
            "samples have no scores yet, or were changed since",
            path=dataset,
            found=f"{len(missing)} of {len(rows)}: {listed(missing, shown=5)}",
            fix=f"score them: {AGAIN}",
        )
    scores = [{**row["curation"], "kept": row["curation"]["pixels"]} for row in rows]
    limit = None if config.margin is None else code_limit(config.margin)
    if limit is not None:
        with track(len(rows), "reading scores", unit="images") as progress:
            for score, (row, _, mask) in zip(scores, read_samples(dataset, schema, rows), strict=True):
                labels = mask[read_codes(dataset, row["id"], mask.shape) <= limit]
                score["kept"] = np.bincount(labels, minlength=256)[: schema.num_classes]
                progress.advance()
    for score, row in zip(scores, rows, strict=True):
        score["size"] = row["width"] * row["height"]
    sources = [str(row.get("source_mask", row["id"])) for row in rows]
    table = Table.of([row["id"] for row in rows], sources, scores, statistics)
    selection = select(table, config, schema.names, seed)
    used = zip(table.ids, selection.weights.tolist(), strict=True)
    view = View(
        dataset=dataset,
        name=name,
        statistics=statistics.key,
        margin=config.margin,
        weights={id: weight for id, weight in used if weight > 0},
        of=len(rows),
        settings={**config.model_dump(mode="json"), "seed": seed},
        summary=_summary(table, selection, schema.names),
    )
    remove_incomplete(dataset / "views", name)
    # The picture first: a view that is there has one.
    least_first = np.argsort(table.accuracy, kind="stable")[: np.isfinite(table.accuracy).sum()]
    draw_view(view, schema, [rows[index] for index in least_first])
    view.write()
    return view


def _summary(table: Table, selection: Selection, class_names: Sequence[str]) -> dict[str, Any]:
    weights = selection.weights
    columns = {
        "real": table.real_pixels / max(1, table.real_pixels.sum()),
        "painted": histogram(table.pixels, np.ones(len(weights))),
        "view": histogram(table.kept, weights),
        **({} if selection.wanted is None else {"wanted": selection.wanted}),
    }
    return {
        "used": int((weights > 0).sum()),
        # So many samples of equal weight would vary as much (Kish 1965).
        "effective": round(float(weights.sum() ** 2 / (weights @ weights)), 1),
        "labels_dropped": round(1 - float(table.kept.sum() / table.pixels.sum()), 6),
        **({} if selection.rare is None else {"rare": [class_names[index] for index in selection.rare]}),
        "classes": {
            name: {column: float(shares[index]) for column, shares in columns.items()}
            for index, name in enumerate(class_names)
        },
    }


def report(view: View) -> str:
    """What came of a view, in a few lines."""
    summary = view.summary
    classes = summary["classes"]
    columns = list(next(iter(classes.values())))
    head = "share of the labels"
    width = max(map(len, [head, *classes]))
    table = [f"  {head:<{width}}  " + "  ".join(f"{column:>8}" for column in columns)]
    table += [
        f"  {name:<{width}}  " + "  ".join(f"{shares[column]:8.1%}" for column in columns)
        for name, shares in classes.items()
    ]
    return "\n".join(
        [
            f"{summary['used']} of {view.of} samples, worth {summary['effective']:g} of equal weight; "
            f"{summary['labels_dropped']:.1%} of all labels dropped",
            *table,
            *([f"rare: {', '.join(summary['rare']) or 'none'}"] if "rare" in summary else []),
            str(view_file(view.dataset, view.name)),
            str(view_file(view.dataset, view.name).with_suffix(".png")),
        ]
    )
