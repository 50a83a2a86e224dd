"""How well the boundaries of class maps in files lie: `terrasynth boundaries`.

The metrics are those of `tasks.boundary`. Here files are paired, seen to lie on the same pixels, and told in a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from terrasynth.data.folder import files_by_name
from terrasynth.data.raster import Grid, crs_name, open_raster
from terrasynth.data.read import refuse_bad_files, without_recipe
from terrasynth.data.scenes import check_aligned
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.tasks.boundary import BoundaryScores, BoundarySettings, Tolerance, evaluate_maps

__all__ = ["as_json", "score_files", "table"]

#: How far the GSDs of maps may differ that are scored together.
_SAME_GSD = 0.01


def score_files(
    prediction: Path, truth: Path, schema: LabelSchema, tolerance: Tolerance | None = None
) -> BoundaryScores:
    """Score predicted class maps against true masks.

    Args:
        prediction: a raster of the values that the schema's mask files store, or a folder of such.
        truth: a mask raster, coded as masks may be; or a folder, which has a prediction of the same name for each.
        schema: the classes.
        tolerance: within which distance boundary IoU, BF and the trimap look; their own by default.

    Raises:
        TerraSynthError: a prediction is missing or does not have the pixels of its truth, a file can not be read, or
            the tolerance is in metres, and the size of the pixels is not known in metres or differs.
    """
    predictions, truths = _paired(prediction, truth)
    grids: dict[Path, Grid] = {}
    problems = []
    for name in [name for name in truths if name in predictions]:  # the others are told with the rest
        try:
            grids[truths[name]] = _common_grid(predictions[name], truths[name])
        except TerraSynthError as error:
            problems.append(error)
    refuse_bad_files(problems, len(truths), "maps", skip_bad=False)
    metres = tolerance is not None and tolerance.unit == "m"
    settings = BoundarySettings() if tolerance is None else BoundarySettings(tolerance, tolerance, tolerance)
    gsd = _common_gsd(grids, settings.trimap) if metres and grids else None
    try:
        return evaluate_maps(predictions, truths, schema, settings=settings, gsd=gsd)
    except TerraSynthError as error:
        raise without_recipe(error) from error


def _paired(prediction: Path, truth: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    if prediction.is_dir() != truth.is_dir():
        folder, file = (prediction, truth) if prediction.is_dir() else (truth, prediction)
        raise TerraSynthError(
            "PREDICTION and TRUTH are two files or two folders",
            found=f"the folder {folder} and the file {file}",
            fix="give the folder of both, or one file of both",
        )
    if prediction.is_dir():
        return files_by_name(prediction, "PREDICTION"), files_by_name(truth, "TRUTH")
    return {truth.stem: prediction}, {truth.stem: truth}


def _common_grid(prediction: Path, truth: Path) -> Grid:
    """Where both lie. What one of them does not say about its place is taken from the other."""
    with open_raster(prediction) as predicted, open_raster(truth) as true:
        grid = true.grid.completed(predicted.grid)
        its = predicted.grid.completed(true.grid)
    check_aligned(truth, grid, prediction, its, name="prediction", other="truth")
    return grid


def _common_gsd(grids: Mapping[Path, Grid], tolerance: Tolerance) -> float:
    known = {path: grid.gsd for path, grid in grids.items()}
    if without := [path for path, gsd in known.items() if gsd is None]:
        grid = grids[without[0]]
        raise TerraSynthError(
            "the tolerance is in metres, and the size of the pixels is not known in metres",
            path=without[0],
            found=f"{crs_name(grid.crs)}{'' if grid.transform is not None else ', no transform'}",
            expected="a projected CRS",
            fix=f"give --tolerance in pixels, as --tolerance {max(1, round(tolerance.value))}px",
        )
    sizes = {path: gsd for path, gsd in known.items() if gsd is not None}
    finest, coarsest = (choice(sizes, key=sizes.__getitem__) for choice in (min, max))
    if sizes[coarsest] > (1 + _SAME_GSD) * sizes[finest]:
        raise TerraSynthError(
            "a tolerance in metres needs maps of one GSD",
            path=coarsest,
            found=f"{sizes[coarsest]:g} m, and {sizes[finest]:g} m in {finest}",
            fix="score the maps of each GSD by themselves, or give --tolerance in pixels",
        )
    return sizes[finest]


# --- what is told ----------------------------------------------------------------------------------------------------

_COLUMNS = {"iou": "IoU", "boundary_iou": "boundary IoU", "bf": "BF", "mba": "mBA", "trimap_iou": "trimap IoU"}


def table(scores: BoundaryScores) -> str:
    """One line a class, then all of them together, then what is no class's."""
    values, settings = scores.metrics(), scores.settings
    lines = [("", *_COLUMNS.values())]
    for label, ending in (*((name, f"/{name}") for name in scores.schema.names), ("all", "")):
        lines.append((label, *(_shown(values[f"{key}{ending}"]) for key in _COLUMNS)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join([first.ljust(widths[0]), *(text.rjust(w) for text, w in zip(others, widths[1:], strict=True))])
        for first, *others in lines
    ]
    within = {"boundary IoU": settings.band, "BF": settings.contour, "trimap IoU": settings.trimap}
    count = len(scores.maps)
    said = [
        f"{count} map{'' if count == 1 else 's'}; "
        + ", ".join(f"{name} within {_spelled(distance)}" for name, distance in within.items()),
        "",
        *rows,
        "",
        f"weighted F of edges ({settings.edge_size} px): {_shown(values['wf/edge'])}",
    ]
    if share := values["no_class"]:
        said.append(f"pixels predicted as no class, which count as wrong: {100 * share:.2g} %")
    return "\n".join(said)


def as_json(scores: BoundaryScores) -> dict[str, Any]:
    """The same and every other metric, JSON-able; None where a metric has no value."""
    settings = scores.settings
    distances = {"boundary_iou": settings.band, "bf": settings.contour, "trimap_iou": settings.trimap}
    return {
        "maps": len(scores.maps),
        "within": {name: _spelled(distance) for name, distance in distances.items()},
        "gsd": scores.gsd,
        "metrics": scores.metrics(),
    }


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _spelled(tolerance: Tolerance) -> str:
    if tolerance.unit == "diagonal":
        return f"{100 * tolerance.value:g} % of the diagonal"
    return f"{tolerance.value:g} {tolerance.unit}"
