"""How well the boundaries of predicted label maps lie, by class and over a data set.

Every metric is read from counts by map and class. *Pooled* means: the counts of all maps are added up first, so that a
map weighs as much as it has boundary. *Averaged* means: the metric of every map that has one is averaged, by class.

==============  ===========================================================================================  ========
metric          source                                                                                       default
==============  ===========================================================================================  ========
boundary IoU    Cheng et al. 2021, "Boundary IoU": the inner bands of width d of both masks, d = 2 % of the  pooled
                map's diagonal; Chebyshev distance, as in its code
BF              Csurka et al. 2013, "What is a good evaluation measure ...?"; F of Perazzi et al. 2016       averaged
                (DAVIS): contour pixels within a tolerance of the other contour, Euclidean distance
mBA             Cheng et al. 2020, "CascadePSP": accuracy around the true boundary, mean over five radii     averaged
                1 + floor(i / 5 * ((H + W) / 300 - 1)), i = 0..4
trimap IoU      Kohli et al. 2009, Krähenbühl and Koltun 2011: IoU within a distance of the true boundary    pooled
weighted F      IDGBR's "WF (3px)": Margolin et al. 2014 on edge maps; `bands.edge_map`, `bands.weighted_f`  averaged
IoU_imp         IDGBR's repair score; `repair.repair_score`                                                  averaged
==============  ===========================================================================================  ========

Three rules hold for all of them:

- A true pixel that is unlabelled is left out, whatever is predicted there, and so is the border of a class with it:
  nobody knows where that class ends. The frame of a map is no boundary either, for it cuts scenes anywhere
  (`BoundarySettings.frame` has boundary IoU's original rule, under which objects end at the frame).
- A predicted pixel that is no class is wrong; it is never left out.
- A class without boundary in both, or one that a metric can not see, has no value (NaN), and leaves the means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from terrasynth.data.folder import files_by_name
from terrasynth.data.read import common_coding, read_mask, read_prediction, refuse_bad_files
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError, listed
from terrasynth.progress import say, track
from terrasynth.tasks.bands import (
    LEFT_OUT,
    Labels,
    Tolerance,
    as_labels,
    contour,
    count,
    dilate,
    disc,
    edge_map,
    ellipse,
    mixed,
    planes,
    square,
    weighted_f,
)
from terrasynth.tasks.repair import COMPLETE, repair_score

__all__ = ["BoundaryCounts", "BoundaryScores", "BoundarySettings", "Tolerance", "evaluate_maps"]

_Counts = NDArray[np.int64]
_Values = NDArray[np.float64]
_Map = NDArray[Any] | Tensor
#: Maps by name: a folder of files, or class indices (H, W) or a file for every name.
Maps = str | Path | Mapping[str, _Map | Path]

#: How many radii mBA looks at.
_RADII = 5


@dataclass(frozen=True)
class BoundarySettings:
    """What the metrics leave open.

    Attributes:
        band: d of boundary IoU; rounded to whole pixels.
        contour: the tolerance of BF. Csurka et al. took 0.75 % of the diagonal, DAVIS 0.8 %.
        trimap: how far the trimap reaches to either side of the true boundary.
        edge_size: of the weighted F, odd; its edges are one pixel wider. The published results are of 3.
        frame: whether a class ends at the frame, in boundary IoU, as in its published code.
        damage: k of IoU_imp, what a pixel of the rough map that was right and is lost costs. It is not published.

    Raises:
        TerraSynthError: `edge_size` is even or below 1.
    """

    band: Tolerance = field(default=Tolerance(0.02, "diagonal"))
    contour: Tolerance = field(default=Tolerance(0.0075, "diagonal"))
    trimap: Tolerance = field(default=Tolerance(3))
    edge_size: int = 3
    frame: bool = False
    damage: float = 1.0

    def __post_init__(self) -> None:
        if self.edge_size < 1 or self.edge_size % 2 == 0:
            raise TerraSynthError("edge_size must be odd", found=self.edge_size, expected="1, 3, 5, ...")


@dataclass(frozen=True, eq=False)
class BoundaryCounts:
    """What is counted in one map.

    Attributes:
        band: pixels of class k in both inner bands, in the true and in the predicted one; int64 (3, K).
        contour: pixels of the predicted contour of class k that are near the true one, all of them, pixels of the true
            one near the predicted, all of them; int64 (4, K).
        accuracy: pixels around the true boundary of class k that are right about k, and all of them, at five radii; and
            last the same around all boundaries, where only the true class is right; int64 (2, 5, K + 1).
        confusion: labelled pixels by true class and by predicted class, K where it is none; int64 (K, K + 1).
        trimap: the same of the pixels of the trimap.
        weighted_f: of the non-edge and of the edge; float64 (2,), NaN where the truth has none.
        repair: IoU_imp by class; float64 (K,), NaN without a rough map.
        labelled: true pixels that are labelled, and how many of them are predicted as no class; int64 (2,).
    """

    band: _Counts
    contour: _Counts
    accuracy: _Counts
    confusion: _Counts
    trimap: _Counts
    weighted_f: _Values
    repair: _Values
    labelled: _Counts


@dataclass
class BoundaryScores:
    """The boundary metrics of a data set, filled map by map.

    Attributes:
        schema: the K classes.
        settings: what the metrics leave open.
        gsd: metres per pixel of all maps; needed for tolerances in metres.
        maps: what was counted, by the maps' names.

    Raises:
        TerraSynthError: a tolerance is below a pixel, or in metres without a GSD.
    """

    schema: LabelSchema
    settings: BoundarySettings = field(default_factory=BoundarySettings)
    gsd: float | None = None
    maps: dict[str, BoundaryCounts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Before any map is read; only shares of the diagonal depend on the map, and these always mean something.
        for tolerance in (self.settings.band, self.settings.contour, self.settings.trimap):
            tolerance.pixels((0, 0), self.gsd)

    def update(
        self, name: str, prediction: _Map, truth: _Map, rough: _Map | None = None, *, path: str | Path | None = None
    ) -> None:
        """Count one map.

        Args:
            name: distinct; named in messages.
            prediction: integer (H, W) on the CPU, class indices; any other value is wrong where the truth is labelled.
            truth: integer (H, W), class indices or the schema's `ignore_index`.
            rough: the map that the prediction refines, like it; for IoU_imp.
            path: of the prediction; is named in messages about it.

        Raises:
            TerraSynthError: the maps differ in size or hold no whole numbers, the truth has a value that is no class,
                or the name was there before.
        """
        if name in self.maps:
            raise TerraSynthError("scored twice", path=name, fix="give every map its own name")
        classes, true = self.schema.num_classes, np.asarray(truth)
        left_out = true == self.schema.ignore_index

        def labels(values: _Map, what: str) -> Labels:
            _check(np.asarray(values), what, true, path or name if what == "prediction" else name)
            return as_labels(np.asarray(values), classes, left_out)

        truth_labels = labels(true, "truth")
        if (wrong := truth_labels == classes).any():
            raise TerraSynthError(
                "the truth holds values that are no class",
                path=name,
                found=listed([str(value) for value in np.unique(true[wrong])]),
                expected=f"0 to {classes - 1}, or {self.schema.ignore_index} where unlabelled",
                fix="check the label schema and the coding of the masks",
            )
        predicted = labels(prediction, "prediction")
        repair = np.full(classes, math.nan)
        if rough is not None:
            repair = repair_score(predicted, labels(rough, "rough map"), truth_labels, classes, self.settings.damage)
        self.maps[name] = _count(predicted, truth_labels, classes, self.settings, self.gsd, repair)

    def iou(self, *, pooled: bool = True) -> _Values:
        """IoU by class, float64 (K,), of all labelled pixels; what boundary metrics are read beside."""
        return self._over("confusion", _confusion_iou, pooled)

    def boundary_iou(self, *, pooled: bool = True) -> _Values:
        """Boundary IoU by class, float64 (K,); 0 for a class that has a boundary in one of the two only.

        The original averages over objects; over classes of maps, pooling keeps a stray pixel of a class that is
        nowhere in a map from counting as much as all of a city's houses.
        """
        return self._over("band", _band_iou, pooled)

    def bf(self, *, pooled: bool = False) -> _Values:
        """BF, the F-measure of contours, by class, float64 (K,); 0 for a class with a contour in one of the two only.

        Csurka et al. average over the classes of a map and then over maps; here a class is averaged over maps first.
        """
        return self._over("contour", _contour_f, pooled)

    def mba(self, *, pooled: bool = False) -> _Values:
        """Mean boundary accuracy, float64 (K + 1,): by class, and last of all at once, as CascadePSP's for several.

        It looks around true boundaries alone: a class that is only predicted has no value, and lowers that of others.
        """
        return self._over("accuracy", _band_accuracy, pooled)

    def trimap_iou(self, *, pooled: bool = True) -> _Values:
        """IoU by class within the trimap, float64 (K,)."""
        return self._over("trimap", _confusion_iou, pooled)

    def weighted_f(self) -> _Values:
        """Weighted F of non-edges and of edges, float64 (2,), averaged over the maps whose truth has them."""
        return self._over("weighted_f", lambda values: values, False)

    def repair(self) -> _Values:
        """IoU_imp by class, float64 (K,), averaged over the maps whose rough map had something to repair."""
        return self._over("repair", lambda values: values, False)

    def _over(self, name: str, metric: Callable[[Any], _Values], pooled: bool) -> _Values:
        if not self.maps:
            raise TerraSynthError("there is nothing to score", found="no maps", expected="at least one")
        counts = np.stack([getattr(one, name) for one in self.maps.values()])
        return metric(counts.sum(0)) if pooled else _mean(metric(counts))

    def metrics(self) -> dict[str, float | None]:
        """The headline numbers by name, JSON-able: None where a metric has no value.

        Returns:
            `iou`, `boundary_iou`, `bf`, `trimap_iou`: means over classes, pooled or averaged over maps as in their
            methods; of every class as `bf/NAME`. `mba`: of all classes at once, and `mba/NAME`. `wf`: the lesser of the
            weighted F of edges and non-edges that is above 0, as published; `wf/edge` and `wf/non-edge`. `no_class`:
            the share of labelled pixels that are predicted as no class. If there were rough maps, `iou_imp`,
            `iou_imp/NAME`, and of all classes of all maps the shares whose repair is `repair/complete` (IoU_imp >=
            0.8), `repair/partial` or `repair/error` (< 0).

        Raises:
            TerraSynthError: no map was counted.
        """
        names = self.schema.names
        rows = {
            "iou": self.iou(),
            "boundary_iou": self.boundary_iou(),
            "bf": self.bf(),
            "trimap_iou": self.trimap_iou(),
        }
        values: dict[str, float] = {name: float(_mean(row)) for name, row in rows.items()}
        mba = self.mba()
        values["mba"] = float(mba[-1])
        non_edge, edge = self.weighted_f().tolist()
        # The minimum as published, which skips exact zeros: that of the edges is told by its name as well.
        values["wf"] = min((x for x in (non_edge, edge) if x > 0), default=float(_mean(np.array([non_edge, edge]))))
        values |= {"wf/edge": edge, "wf/non-edge": non_edge}
        total, strange = np.stack([one.labelled for one in self.maps.values()]).sum(0).tolist()
        values["no_class"] = strange / total if total else math.nan
        rows["mba"] = mba[:-1]
        scores = np.stack([one.repair for one in self.maps.values()])
        if (scores := scores[~np.isnan(scores)]).size:
            rows["iou_imp"] = self.repair()
            values["iou_imp"] = float(_mean(rows["iou_imp"]))
            grades = {"complete": scores >= COMPLETE, "error": scores < 0}
            grades["partial"] = ~grades["complete"] & ~grades["error"]
            values |= {f"repair/{grade}": float(of_it.mean()) for grade, of_it in grades.items()}
        for metric, row in rows.items():
            values |= {f"{metric}/{name}": x for name, x in zip(names, row.tolist(), strict=True)}
        return {name: None if math.isnan(value) else value for name, value in values.items()}


def evaluate_maps(
    predictions: Maps,
    truths: Maps,
    schema: LabelSchema,
    *,
    rough: Maps | None = None,
    settings: BoundarySettings | None = None,
    gsd: float | None = None,
    coding: str = "auto",
) -> BoundaryScores:
    """Score predicted class maps against true ones of the same names (without suffix).

    Args:
        predictions: what is scored. Files store what the schema says for index-coded masks; values that are no class
            are wrong. What has no truth is not scored, and is counted on standard error.
        truths: a prediction is needed for every one of them.
        schema: the classes.
        rough: the maps that the predictions refine, one for every truth, read like them; for IoU_imp.
        settings: what the metrics leave open.
        gsd: metres per pixel of all maps; needed for tolerances in metres.
        coding: of the files of true masks, as `data.mask_coding`. `auto` holds all of them in memory to tell.

    Raises:
        TerraSynthError: a prediction or rough map is missing or not as large as its truth, a file can not be read, or
            as in `BoundaryScores.update`. All bad files are in one message.
    """
    scores = BoundaryScores(schema, settings or BoundarySettings(), gsd)
    true, predicted = _by_name(truths, "truths"), _by_name(predictions, "predictions")
    before = None if rough is None else _by_name(rough, "rough")
    _refuse_missing(true, predicted, predictions, "prediction")
    if before is not None:
        _refuse_missing(true, before, rough, "rough map")
    if unused := len(predicted.keys() - true.keys()):
        say(f"predictions without a truth, not scored: {unused}")
    if coding == "auto" and (paths := [value for value in true.values() if isinstance(value, Path)]):
        coding = _coding(paths, schema)

    def pixels(value: _Map | Path) -> _Map:
        return read_prediction(value, schema) if isinstance(value, Path) else value

    problems: list[TerraSynthError] = []
    with track(len(true), "scoring boundaries", unit="maps") as progress:
        for name, value in true.items():
            file = predicted[name]
            try:
                truth = read_mask(value, schema, coding)[coding] if isinstance(value, Path) else value
                rough_map = None if before is None else pixels(before[name])
                scores.update(name, pixels(file), truth, rough_map, path=file if isinstance(file, Path) else None)
            except TerraSynthError as error:
                problems.append(error)
            progress.advance()
    refuse_bad_files(problems, len(true), "maps", skip_bad=False)
    return scores


def _by_name(maps: Maps, key: str) -> Mapping[str, _Map | Path]:
    return maps if isinstance(maps, Mapping) else files_by_name(maps, key)


def _coding(paths: list[Path], schema: LabelSchema) -> str:
    readings, problems = [], []
    for path in paths:
        try:
            readings.append(read_mask(path, schema, "auto"))
        except TerraSynthError as error:
            problems.append(error)
    refuse_bad_files(problems, len(paths), "true masks", skip_bad=False)
    return common_coding(readings, paths, schema, chosen="auto")


def _refuse_missing(truths: Mapping[str, Any], maps: Mapping[str, Any], source: Any, what: str) -> None:
    missing = [name for name in truths if name not in maps]
    if not truths or missing:
        raise TerraSynthError(
            f"{len(missing)} of {len(truths)} truths have no {what}" if truths else "there are no truths",
            path=None if isinstance(source, Mapping) else source,
            found=f"none for {listed(missing)}" if missing else None,
            expected=f"a {what} of the same name for every truth",
            fix=f"make them, or score without these truths: a missing {what} is never skipped",
        )


def _check(values: NDArray[Any], what: str, truth: NDArray[Any], where: str | Path) -> None:
    if values.shape != truth.shape or truth.ndim != 2:
        raise TerraSynthError(
            f"the {what} is not as large as its truth" if truth.ndim == 2 else "the truth is no map",
            path=where,
            found=f"(height, width) = {values.shape}",
            expected=f"{truth.shape}" if truth.ndim == 2 else "one number a pixel, (height, width)",
            fix="give both in the same grid",
        )
    if values.dtype.kind not in "iu":
        raise TerraSynthError(
            f"the {what} is not of whole numbers",
            path=where,
            found=values.dtype,
            expected="class indices",
            fix="take the most probable class",
        )


# --- counting one map ------------------------------------------------------------------------------------------------


def _count(
    labels: Labels, truth: Labels, classes: int, settings: BoundarySettings, gsd: float | None, repair: _Values
) -> BoundaryCounts:
    shape = truth.shape
    known = truth != LEFT_OUT
    bits, true_bits = planes(labels, classes), planes(truth, classes)

    def by_class(where: NDArray[np.bool_], of: Labels) -> _Counts:
        return np.bincount(of[where], minlength=classes + 1)[:classes]

    # Boundary IoU. A pixel is in its class's inner band if the window around it has another label, too.
    distance = round(settings.band.pixels(shape, gsd))
    inner, true_inner = (_inner(x, distance, known, frame=settings.frame) for x in (bits, true_bits))
    both = inner & true_inner & (labels == truth)
    band = np.stack([by_class(both, truth), by_class(true_inner, truth), by_class(inner, labels)])

    # BF.
    window = disc(settings.contour.pixels(shape, gsd))
    line, true_line = bits * contour(labels), true_bits * contour(truth)
    near, true_near = line & dilate(true_line, window), true_line & dilate(line, window)
    lines = np.stack([count(x, classes)[:classes] for x in (near, line, true_near, true_line)])

    # mBA. Around the boundary of k are pixels whose window has k and another label.
    right = labels == truth
    swapped = bits ^ true_bits
    accuracy = np.zeros((2, _RADII, classes + 1), dtype=np.int64)
    seen: dict[int, _Counts] = {}
    for index, radius in enumerate(_mba_radii(*shape)):
        if radius not in seen:
            around = dilate(true_bits, ellipse(radius))
            anywhere = mixed(around) & known
            around *= anywhere
            total = count(around, classes)
            correct = total - count(around & swapped, classes)
            total[-1], correct[-1] = anywhere.sum(), (anywhere & right).sum()
            seen[radius] = np.stack([correct, total])
        accuracy[:, index] = seen[radius]

    # Trimap.
    trimap = mixed(dilate(true_bits, disc(settings.trimap.pixels(shape, gsd)))) & known

    def confusion(where: NDArray[np.bool_]) -> _Counts:
        cells = truth[where].astype(np.int64) * (classes + 1) + labels[where]
        return np.bincount(cells, minlength=classes * (classes + 1)).reshape(classes, classes + 1)

    edges, true_edges = (edge_map(x, classes, settings.edge_size) for x in (labels, truth))
    return BoundaryCounts(
        band,
        lines,
        accuracy,
        confusion(known),
        confusion(trimap),
        np.array([weighted_f(~edges, ~true_edges, known), weighted_f(edges, true_edges, known)]),
        repair,
        np.array([known.sum(), (labels == classes).sum()]),
    )


def _inner(bits: NDArray[np.uint8], distance: int, known: NDArray[np.bool_], *, frame: bool) -> NDArray[np.bool_]:
    inner = mixed(dilate(bits, square(distance)))
    if frame:
        for side in (inner, inner.T):
            side[:distance] = True
            side[-distance:] = True
    return inner & known


def _mba_radii(height: int, width: int) -> list[int]:
    # Towards zero, so that it is 1 for maps that are too small for any other.
    return [1 + int(((height + width) / 300 - 1) / _RADII * i) for i in range(_RADII)]


# --- from counts to metrics; any number of axes before those of the counts --------------------------------------------


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> _Values:
    """NaN where there is nothing."""
    return np.where(whole > 0, part, math.nan) / np.maximum(whole, 1)


def _mean(values: _Values) -> _Values:
    """Over the first axis, of what has a value; NaN where nothing has."""
    there = ~np.isnan(values)
    return _ratio(np.where(there, values, 0).sum(0), there.sum(0))


def _band_iou(band: _Counts) -> _Values:
    both, true, predicted = np.moveaxis(band, -2, 0)
    return _ratio(both, true + predicted - both)


def _contour_f(lines: _Counts) -> _Values:
    near, line, true_near, true_line = np.moveaxis(lines, -2, 0)
    precision, recall = near / np.maximum(line, 1), true_near / np.maximum(true_line, 1)
    total = precision + recall
    f = 2 * precision * recall / np.where(total > 0, total, 1)
    return np.where(line + true_line > 0, f, math.nan)


def _band_accuracy(accuracy: _Counts) -> _Values:
    right, total = np.moveaxis(accuracy, -3, 0)
    values: _Values = _ratio(right, total).mean(-2)
    return values


def _confusion_iou(matrix: _Counts) -> _Values:
    hit = np.diagonal(matrix, axis1=-2, axis2=-1)
    return _ratio(hit, matrix.sum(-1) + matrix.sum(-2)[..., :-1] - hit)
