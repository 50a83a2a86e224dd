"""The report of a study: `results.json` read back, judged by fixed rules and written as one self-contained page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_write, open_image, read_json
from terrasynth.recipe import ArmConfig, PairsConfig, Recipe, SteeringConfig, TrainConfig
from terrasynth.study.canvas import Color, arm_color
from terrasynth.study.figures import class_figure, curve_figure, difference_figure
from terrasynth.study.statistics import Difference, Summary, compare, difference_text, points, summarise
from terrasynth.study.sweep import ClassGains, Line, class_gains, ratio_lines
from terrasynth.study.sweep_figures import frequency_figure, frequency_picture, ratio_figure, ratio_picture

__all__ = ["Results", "Verdict", "read_results", "verdict", "write_report"]

#: Widths of the charts in inches: for a page and for a phone.
_WIDE, _NARROW = 8.6, 3.7
#: Larger pictures of the gallery are shrunk to this, so that the page stays small enough to send.
_THUMBNAIL = 256
#: What an audit calls the painted tiles compared with each other (`curation.audit.AMONG`, which would load torch).
_AMONG = "one another"
_METRICS = (("miou", "mIoU"), ("oa", "OA"), ("macc", "mAcc"), ("f1", "F1"))
#: NaN is no JSON, but Python writes and reads it.
_Score = Annotated[float | None, AfterValidator(lambda value: None if value != value else value)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Metric(_Part):
    # Mean and interval stand in the file for other readers; here they are computed again from the same values.
    values: tuple[_Score, ...]


class _Arm(_Part):
    name: str
    metrics: dict[str, _Metric]

    def values(self, metric: str = "miou") -> tuple[_Score, ...]:
        return self.metrics[metric].values

    def summary(self, metric: str = "miou") -> Summary:
        return summarise(self.values(metric))

    def by_class(self, classes: Sequence[_Class]) -> list[tuple[_Score, ...]]:
        """IoU by seed of every class."""
        return [self.values(f"iou/{entry.name}") for entry in classes]

    def minus(self, other: _Arm, *, confidence: float = 0.95) -> Difference:
        return compare(self.values(), other.values(), confidence=confidence)


class _Class(_Part):
    name: str
    color: Color
    share: _Score = None
    """Of the labelled pixels of the training tiles."""


class _Data(_Part):
    train: int
    validation: int
    test: int
    image_size: int
    source: str
    unlabelled: int = 0
    left_out: int = 0


class _Curve(_Part):
    seed: int
    steps: tuple[int, ...]
    miou: tuple[_Score, ...]


class _Settings(_Part):
    arm: str
    learning_rate: float
    steps: int


class _Plateau(_Part):
    arm: str
    steps: int
    twice: int
    values: tuple[_Score, ...]
    """The arm trained for `twice` steps minus itself after `steps`, by seed."""

    @property
    def difference(self) -> Difference:
        changes = summarise(self.values)
        return Difference(changes.values, changes.mean, changes.ci95)


class _Duration(_Part):
    name: str
    seconds: float


class _Painted(_Part):
    count: int
    agreement: _Score


class _Labels(_Part):
    """Of painted pairs: the share of each class, and how far that is from the training tiles (total variation)."""

    shares: tuple[_Score, ...]
    distance: _Score


class _Nearest(_Part):
    painted: str
    id: str
    likeness: _Score


class _Set(_Part):
    name: str
    kind: str
    images: int
    # Earlier audits did not count them.
    too_plain: int | None = None
    too_small: int | None = None
    limit: _Score
    limit_measured: bool | None = None
    copies: int
    copies_under_own_mask: int | None
    leaks: int | None
    closest: _Nearest | None


class _Finding(_Part):
    painted: str
    set: str
    other: str
    how: str
    leak: bool


class _Audit(_Part):
    kind: str
    seed: int
    sheet: str
    painted: int
    too_plain: int
    sets: tuple[_Set, ...]
    findings: tuple[_Finding, ...]


class _LearnedFrom(_Part):
    name: str
    images: int
    too_plain: int
    copies: int


class _Splits(_Part):
    sheet: str
    sets: tuple[_LearnedFrom, ...]
    held_out: _Set
    findings: tuple[_Finding, ...]


class _Curated(_Part):
    used: _Score
    dropped: _Score


class Results(_Part):
    """`results.json`: everything a study measured. Scores are fractions in [0, 1]; the first arm is the baseline."""

    name: str
    recipe: Recipe
    other_arms: tuple[str, ...] = ()
    """Of the recipe, that were not asked for."""
    classes: tuple[_Class, ...]
    data: _Data
    arms: tuple[_Arm, ...] = Field(min_length=1)
    curves: dict[str, tuple[_Curve, ...]]
    plateaus: tuple[_Plateau, ...]
    settings: tuple[_Settings, ...]
    timing: tuple[_Duration, ...]
    total_seconds: float
    synthetic: dict[str, _Painted]
    labels: _Labels | None = None
    """Where masks were painted too, what is in them."""
    audit: tuple[_Audit, ...] = ()
    """Copies among the painted tiles, by kind and seed."""
    audit_of_splits: _Splits | None = None
    """Copies of validation and test tiles in what is learned from."""
    filtered: dict[str, dict[str, _Score]]
    """Of each arm with the filter: `dropped`, the share of painted pixels it dropped, and `dropped/NAME` of a class."""
    curated: dict[str, _Curated] = {}
    """Of each arm with rules: the shares of the tiles that are used, and of all painted pixels that are dropped."""
    environment: dict[str, Any]
    command: str

    @property
    def painted_arms(self) -> tuple[_Arm, ...]:
        """The arms with synthetic data."""
        painted = {arm.name for arm in self.recipe.study.arms if arm.synthetic != "none"}
        return tuple(arm for arm in self.arms[1:] if arm.name in painted)

    @property
    def scored_classes(self) -> list[_Class]:
        """The classes that the test tiles have a score for."""
        return [entry for entry in self.classes if f"iou/{entry.name}" in self.arms[0].metrics]

    @property
    def lines(self) -> list[Line]:
        """The arms by what they add, where one of them was given several numbers of paintings; else none."""
        lines = ratio_lines(self.recipe.study, {arm.name: arm.values() for arm in self.arms})
        return lines if any(len([1 for ratio, _ in line.points if ratio]) > 1 for line in lines) else []

    @property
    def class_gains(self) -> list[ClassGains]:
        """Of every arm but the baseline, where there are shares of the classes and a correlation can be told."""
        classes, baseline = self.scored_classes, self.arms[0]
        shares, theirs = [entry.share for entry in classes], baseline.by_class(classes)
        gains = [class_gains(arm.name, shares, arm.by_class(classes), theirs) for arm in self.arms[1:]]
        return [each for each in gains if each.correlation is not None]

    @property
    def under_masks(self) -> bool:
        """Whether anything was painted under masks, which a generator does."""
        return any(kind != "pairs" for kind in self.synthetic)

    @property
    def plateau(self) -> _Plateau | None:
        """The baseline's own."""
        return next((plateau for plateau in self.plateaus if plateau.arm == self.arms[0].name), None)

    @property
    def rivals(self) -> tuple[_Arm, ...]:
        """The arms that improve on the baseline without synthetic data."""
        painted = self.painted_arms
        return tuple(arm for arm in self.arms[1:] if arm not in painted)


@dataclass(frozen=True)
class Verdict:
    """What the study answers.

    Attributes:
        outcome: by the 95 % interval of the paired mIoU difference of the best synthetic arm to the baseline: above
            zero, below zero, or neither.
        reserved: it helps, but one of the cautions or a rival arm puts that in question.
        headline: the answer in one sentence, and in a second one that there are leaks, if the audit found some.
        best: name of the best synthetic arm; None without one.
        cautions: what else has to be known to read the answer rightly, a sentence or two each.
        notes: what was checked and gave no reason for caution.
    """

    outcome: Literal["helps", "does not help", "can not tell"]
    reserved: bool
    headline: str
    best: str | None
    cautions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The outcome in a few words."""
        return {"helps": "It helps", "does not help": "It does not help", "can not tell": "Can not tell"}[
            self.outcome
        ] + (", with reservations" if self.reserved else "")


def read_results(folder: Path) -> Results:
    """Read `results.json` of a study.

    Raises:
        TerraSynthError: it is missing, no JSON, or lacks something.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise TerraSynthError(
            "no results to report",
            path=path,
            fix="run the study to its end: terrasynth study RECIPE --out " + str(folder),
        )
    try:
        return Results.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise TerraSynthError(
            "not the results of a study",
            path=path,
            found=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            fix="run the study again with this version of terrasynth; finished work is reused",
        ) from error


def verdict(results: Results) -> Verdict:
    """Judge a study, by rules that are fixed before anyone sees the numbers.

    - The best synthetic arm (by mean test mIoU) is compared with the baseline, paired by seed. A 95 % interval above
      zero reads "helps", below zero "does not help", and "can not tell" otherwise or with one seed.
    - It is then compared with the best other arm without synthetic data: what helps but does not beat a cheap
      augmentation helps with reservations, and where that is as good, the headline gives the data no credit.
    - Several synthetic arms: the best was picked by these scores, which flatters it, so a "helps" is tested again at
      the Bonferroni level 1 - 0.05 / arms; if that interval includes zero, there are reservations.
    - Plateau: the baseline trained for twice the steps. If the interval of that change is above zero, or if the change
      is a point of mIoU or more, or more than half of the gain (three seeds can hide a change behind a wide interval),
      the comparison is not yet that of finished models, and there are reservations.
    - Leaks: painted tiles that the audit calls copies of validation or test tiles, or painted under their masks, and
      copies of these tiles in what is learned from. The headline tells that there are some, and there are reservations.
    """
    baseline = results.arms[0]
    cautions = _leaks(results)
    leaking = " The audit found leaks: the test may reward memory." if cautions else ""
    arms = [arm for arm in results.painted_arms if arm.minus(baseline).delta is not None]
    if not arms:
        headline = "No arm with synthetic data was scored, so the study can not tell whether it helps."
        return Verdict("can not tell", False, headline + leaking, None, tuple(cautions))
    best = max(arms, key=_rank)
    gain = best.minus(baseline)
    outcome: Literal["helps", "does not help", "can not tell"] = (
        "helps" if _above(gain) else "does not help" if _below(gain) else "can not tell"
    )
    headline = _headline(outcome, baseline.summary(), best.summary(), gain)
    doubts = [bool(cautions)]
    notes: list[str] = []

    if rival := max(results.rivals, key=_rank, default=None):
        over = best.minus(rival)
        if over.delta is not None and over.delta <= 0:
            # What raised it need not be the synthetic data: the arm may have what the rival has.
            headline = headline.replace("Synthetic data raised", "The best arm with synthetic data raised")
        headline += _rivalry(outcome, rival.name, over, rival.minus(best))
        doubts.append(not _above(over))
    if len(arms) > 1 and outcome == "helps":
        corrected = best.minus(baseline, confidence=1 - 0.05 / len(arms))
        (notes if _above(corrected) else cautions).append(_selection(len(arms), corrected))
        doubts.append(not _above(corrected))
    if (plateau := results.plateau) is not None and plateau.difference.delta is not None:
        moving = _still_moving(plateau.difference, gain)
        (cautions if moving else notes).append(_plateau_sentence(plateau, gain, moving))
        doubts.append(moving)
    reserved = outcome == "helps" and any(doubts)
    return Verdict(outcome, reserved, f"{headline}.{leaking}", best.name, tuple(cautions), tuple(notes))


def write_report(folder: Path) -> Path:
    """Write `report.html` of a study: one file that needs nothing else, from nowhere.

    Beside it, `ratio.png` and `frequency.png` have two of its charts, where it has them.

    Args:
        folder: holds `results.json` and, if anything was painted, `gallery.json` (a list of `mask`, `real`, `reference`
            and the kinds of painted tiles: picture files relative to `folder`, all but `mask` optional; and `caption`).

    Raises:
        TerraSynthError: the results are missing or unreadable, or a picture of the gallery is.
    """
    results = read_results(folder)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "tight": _tight,
        "duration": _duration,
        "points": points,
        "difference": difference_text,
        "score": _score,
        "kind": kind_name,
        "signed": lambda number: f"{number + 0.0:+.2f}".replace("-", "−"),
    }
    template = environment.from_string(files("terrasynth.study").joinpath("report.html.j2").read_text("utf-8"))
    page = template.render(_context(results, folder))
    _write_pictures(results, folder)
    report = folder / "report.html"
    with atomic_write(report) as partial:
        partial.write_text(page, encoding="utf-8")
    return report


def _write_pictures(results: Results, folder: Path) -> None:
    pictures: dict[str, bytes | None] = {"ratio.png": None, "frequency.png": None}
    if lines := results.lines:
        pictures["ratio.png"] = ratio_picture(lines, results.arms[0].name)
    if gains := _shown_gains(results, verdict(results)):
        classes = [(entry.name, entry.color) for entry in results.scored_classes]
        pictures["frequency.png"] = frequency_picture(gains, classes)
    for name, picture in pictures.items():
        if picture is None:
            (folder / name).unlink(missing_ok=True)
        else:
            with atomic_write(folder / name) as partial:
                partial.write_bytes(picture)


def _shown_gains(results: Results, answer: Verdict) -> ClassGains | None:
    """Of the synthetic arm of the answer, else of the first arm."""
    gains = results.class_gains
    return next((each for each in gains if each.arm == answer.best), next(iter(gains), None))


# --- the verdict's sentences -----------------------------------------------------------------------------------------


def _rank(arm: _Arm) -> float:
    mean = arm.summary().mean
    return -1.0 if mean is None else mean


def _above(difference: Difference) -> bool:
    return difference.ci95 is not None and difference.ci95[0] > 0


def _below(difference: Difference) -> bool:
    return difference.ci95 is not None and difference.ci95[1] < 0


def _headline(outcome: str, before: Summary, after: Summary, gain: Difference) -> str:
    change = f"from {points(before.mean, signed=False)} to {points(after.mean, signed=False)}"
    if gain.ci95 is None:
        return (
            f"One seed gives no interval, so whether synthetic data helps can not be told: test mIoU went {change} "
            f"({points(gain.delta)})"
        )
    seeds = sum(value is not None for value in gain.values)
    numbers = f"{change} ({points(gain.delta)}, 95 % interval {_span(gain)}, {seeds} seeds)"
    return {
        "helps": "Synthetic data raised test mIoU ",
        "does not help": "Synthetic data did not help: it lowered test mIoU ",
        "can not tell": "Whether synthetic data helps can not be told: test mIoU went ",
    }[outcome] + numbers


def _rivalry(outcome: str, rival: str, over: Difference, under: Difference) -> str:
    if over.delta is None:
        return ""
    if over.ci95 is None:
        return f"; against {rival}, which needs none, the difference is {points(over.delta)}"
    if _above(over):
        if outcome == "helps":
            return f", and by {difference_text(over)} over {rival}"
        return f"; the synthetic arm is better than {rival} by {difference_text(over)}"
    joined = ", but" if outcome == "helps" else ";"
    if _below(over):
        return f"{joined} {rival}, which needs none, is better by {difference_text(under)}"
    return f"{joined} against {rival}, which needs none, the difference of {difference_text(over)} may be chance"


def _selection(arms: int, corrected: Difference) -> str:
    return (
        f"The best of {arms} synthetic arms was picked by these very test scores, which flatters it. Corrected for "
        f"that (Bonferroni), the interval is {_span(corrected)} and "
        f"{'still excludes zero' if _above(corrected) else 'no longer excludes zero'}."
    )


def _still_moving(change: Difference, gain: Difference) -> bool:
    a_point = change.delta is not None and change.delta >= 0.01
    more_than_half = change.delta is not None and gain.delta is not None and 0 < gain.delta < 2 * change.delta
    return _above(change) or a_point or more_than_half


def _plateau_sentence(plateau: _Plateau, gain: Difference, moving: bool) -> str:
    change = plateau.difference
    facts = f"trained for {plateau.twice} instead of {plateau.steps} steps, it changes by {difference_text(change)}"
    if not moving:
        return f"No sign that the baseline lacks training: {facts}."
    finished = "had not" if _above(change) else "may not have"
    beyond = difference_text(compare(gain.values, change.values))
    return (
        f"The baseline {finished} learned all it can: {facts}. Over the baseline trained that long, the synthetic "
        f"arm's difference is {beyond}."
    )


def _leaks(results: Results) -> list[str]:
    """A sentence for what was painted, and one for what is learned from, where the audit found leaks."""
    told = []
    if painted := sum(len({found.painted for found in one.findings if found.leak}) for one in results.audit):
        told.append(f"Painted tiles that show validation or test tiles or their masks, by the audit: {painted}.")
    if results.audit_of_splits is not None and (copies := _learned_copies(results.audit_of_splits)):
        told.append(f"Copies of validation or test tiles in what is learned from, by the audit: {copies}.")
    return told


def _span(difference: Difference) -> str:
    assert difference.ci95 is not None
    return f"{points(difference.ci95[0])} to {points(difference.ci95[1])}"


# --- the page's contents ---------------------------------------------------------------------------------------------


def _context(results: Results, folder: Path) -> dict[str, Any]:
    answer = verdict(results)
    baseline = results.arms[0]
    summaries = {arm.name: arm.summary() for arm in results.arms}
    return {
        "results": results,
        "study": results.recipe.study,
        "verdict": answer,
        "tone": {"helps": "good", "does not help": "bad", "can not tell": "open"}[answer.outcome],
        "metrics": [(key, label) for key, label in _METRICS if key in baseline.metrics],
        "rows": [
            {
                "name": arm.name,
                "color": arm_color(position),
                "scores": {key: arm.summary(key) for key, _ in _METRICS if key in arm.metrics},
                "difference": arm.minus(baseline) if position else None,
                "seeds": summaries[arm.name].values,
                "best": arm.name == answer.best,
            }
            for position, arm in enumerate(results.arms)
        ],
        "class_rows": [
            (entry, [arm.summary(f"iou/{entry.name}") for arm in results.arms]) for entry in results.scored_classes
        ],
        "lines": results.lines,
        "ratios": sorted({ratio for line in results.lines for ratio, _ in line.points}),
        "class_gains": results.class_gains,
        "shown_gains": _shown_gains(results, answer),
        "figures": _figures(results, answer),
        "gallery": _gallery(folder),
        "labels": _labels(results),
        "steered": _any_steered(results),
        "audit": _audit(results, folder),
        "splits": _splits(results, folder),
        "setup": _setup(results),
        "touched": _touched(results),
        "recipe_yaml": yaml.safe_dump(results.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "longest": max((entry.seconds for entry in results.timing), default=1.0) or 1.0,
        "limitations": _limitations(results),
    }


def _figures(results: Results, answer: Verdict) -> dict[str, dict[str, Markup] | None]:
    baseline = results.arms[0]
    position = {arm.name: index for index, arm in enumerate(results.arms)}
    classes = results.scored_classes
    by_class = {arm.name: [arm.summary(f"iou/{entry.name}") for entry in classes] for arm in results.arms}
    differences = [(arm.name, arm.minus(baseline), position[arm.name]) for arm in results.arms[1:]]
    best = next((arm for arm in results.arms if arm.name == answer.best), None)
    rival = max(results.rivals, key=_rank, default=None)
    if best and rival:
        differences.append((f"{best.name}, minus {rival.name}", best.minus(rival), position[best.name]))
    differences += [
        (f"{plateau.arm}, twice the steps", plateau.difference, position[plateau.arm]) for plateau in results.plateaus
    ]
    curves = {name: [(curve.steps, curve.miou) for curve in seeds] for name, seeds in results.curves.items() if seeds}
    colors = [(entry.name, entry.color) for entry in classes]
    lines, gains = results.lines, _shown_gains(results, answer)
    return {
        "classes": _both(lambda width: class_figure(colors, by_class, width=width)) if classes else None,
        "differences": _both(lambda width: difference_figure(differences, width=width)) if differences else None,
        "ratios": _both(lambda width: ratio_figure(lines, baseline.name, width=width)) if lines else None,
        "frequencies": _both(lambda width: frequency_figure(gains, colors, width=width)) if gains else None,
        "curves": _both(lambda width: curve_figure(curves, width=width)) if curves else None,
    }


def _both(draw: Callable[[float], str]) -> dict[str, Markup]:
    # Inside a page the namespaces are implied. The charts escape the names in them; nothing else here is foreign.
    return {
        size: Markup(re.sub(r' xmlns(:\w+)?="[^"]*"', "", draw(width)))  # noqa: S704
        for size, width in (("wide", _WIDE), ("narrow", _NARROW))
    }


def _gallery(folder: Path) -> dict[str, Any] | None:
    """Column titles and rows of pictures (data URIs)."""
    if not (folder / "gallery.json").is_file():
        return None
    entries = read_json(folder / "gallery.json")
    titles = {
        "mask": "Mask",
        "read": "Mask, as teachers read it",
        "real": "Real tile",
        "plain": "Painted",
        "steered": "Painted, CRFM",
        "reference": "Reference",
        "plain-like": "Painted like it",
        "steered-like": "Painted like it, CRFM",
        "painted-mask": "Mask, painted",
        "pairs": "Painted with it",
        "plain-on-pairs": "Painted under it",
        "steered-on-pairs": "Painted under it, CRFM",
        "plain-like-on-pairs": "Painted under it, like another",
        "steered-like-on-pairs": "Painted under it, like another, CRFM",
    }
    # A mask that segmentors read is often wrong about the tile beside it; it must not pass for a label.
    for entry in entries:
        if not entry.get("labelled", True):
            entry["read"] = entry.pop("mask")
    kinds = [kind for kind in titles if any(entry.get(kind) for entry in entries)]
    rows = [
        {
            "caption": entry["caption"],
            "pictures": [(kind, titles[kind], _data_uri(folder, entry[kind])) for kind in kinds if entry.get(kind)],
        }
        for entry in entries
    ]
    return {"columns": max(len(row["pictures"]) for row in rows), "rows": rows} if rows else None


def _labels(results: Results) -> list[tuple[_Class, str, str]] | None:
    """Every class with its share of the pixels of the training tiles and of pairs, in percent."""
    if results.labels is None:
        return None
    shares = zip(results.classes, results.labels.shares, strict=True)
    return [(entry, points(entry.share, signed=False), points(painted, signed=False)) for entry, painted in shares]


def _audit(results: Results, folder: Path) -> dict[str, Any] | None:
    """What was compared with what, over all painted sets together, and the sheet of the one with most to see."""
    if not results.audit:
        return None
    own = [entry for one in results.audit for entry in one.sets if entry.kind == _AMONG]
    names = dict.fromkeys(entry.name for one in results.audit for entry in one.sets if entry.kind != _AMONG)
    groups = [[e for one in results.audit for e in one.sets if e.name == name and e.kind != _AMONG] for name in names]
    closest = max(
        results.audit,
        key=lambda one: (
            len(one.findings),
            max((entry.closest.likeness or 0.0 for entry in one.sets if entry.closest), default=0.0),
        ),
    )
    return {
        "painted": sum(one.painted for one in results.audit),
        "too_plain": sum(one.too_plain for one in results.audit),
        "unmeasured": any(entry.limit_measured is False for one in results.audit for entry in one.sets),
        "too_small": any(entry.too_small for one in results.audit for entry in one.sets),
        "rows": [_audit_row(group[0].name, group) for group in groups] + [_audit_row("one another", own)],
        "leaks": [(one, finding) for one in results.audit for finding in one.findings if finding.leak],
        "of": f"{closest.kind}, seed {closest.seed}",
        "sheet": _data_uri(folder, closest.sheet, thumbnail=None),
    }


def _splits(results: Results, folder: Path) -> dict[str, Any] | None:
    """What is learned from, compared with what must stay unseen."""
    splits = results.audit_of_splits
    if splits is None:
        return None
    return {
        "copies": _learned_copies(splits),
        "sets": splits.sets,
        "held_out": splits.held_out,
        "findings": splits.findings,
        "sheet": _data_uri(folder, splits.sheet, thumbnail=None),
    }


def _learned_copies(splits: _Splits) -> str:
    """How many copies there are of every kind: "2 training tiles and 1 unlabelled window"; empty if there are none."""
    names = {"train": ("training tile", "training tiles"), "unlabelled": ("unlabelled window", "unlabelled windows")}
    return " and ".join(f"{one.copies} {names[one.name][one.copies > 1]}" for one in splits.sets if one.copies)


def _audit_row(name: str, group: list[_Set]) -> dict[str, Any]:
    likeness = [entry.closest.likeness for entry in group if entry.closest and entry.closest.likeness is not None]
    return {
        "name": name,
        "images": group[0].images,
        # Of the painted tiles it is told above, of all sets together.
        "too_plain": group[0].too_plain if group[0].kind != _AMONG else None,
        "limit": group[0].limit,
        "measured": group[0].limit_measured is not False,
        "copies": sum(entry.copies for entry in group),
        "own": sum(entry.copies_under_own_mask or 0 for entry in group),
        "held_out": group[0].leaks is not None,
        "closest": max(likeness, default=None),
    }


def _data_uri(folder: Path, name: str, thumbnail: int | None = _THUMBNAIL) -> str:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise TerraSynthError("a picture outside the study's folder", path=folder, found=name, fix="use relative paths")
    picture = Image.fromarray(open_image(path).values)
    # Nearest keeps the exact colours of a mask.
    if thumbnail is not None:
        picture.thumbnail((thumbnail, thumbnail), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _setup(results: Results) -> list[tuple[str, str]]:
    """The recipe in words: what was done, part by part."""
    recipe, data = results.recipe, results.data
    study, segmentor, generator = recipe.study, recipe.segmentor, recipe.generator
    weights = f"weights {segmentor.weights}" if segmentor.weights else "from scratch"
    rows = [
        (
            "Data",
            f"{data.train} training, {data.validation} validation and {data.test} test tiles of {data.image_size} × "
            f"{data.image_size} pixels ({data.source}); {len(results.classes)} classes"
            + (f"; {data.unlabelled} windows of unlabelled images" if data.unlabelled else "")
            + (f"; left out, because they could not be used: {data.left_out} tiles" if data.left_out else ""),
        ),
        ("Segmentor", f"{segmentor.architecture}, {segmentor.encoder}, {weights}; {_segmentor_training(results)}"),
        (
            "Seeds",
            f"{', '.join(map(str, study.seeds))}; every arm is trained once under each, and compared seed by seed",
        ),
    ]
    if results.painted_arms:
        counts = ", ".join(f"{painted.count} ({kind_name(kind)})" for kind, painted in results.synthetic.items())
        rows.insert(
            1,
            (
                "Painted tiles",
                f"per seed {counts}; {100 * study.real_fraction:g} % of each training batch stays real"
                + "".join(f"; {exception}" for exception in _exceptions(results)),
            ),
        )
    if results.labels is not None:
        rows.insert(1, ("Pairs", _pairs(recipe.pairs)))
    if results.under_masks:
        sampling, steering = recipe.sampling, recipe.steering
        if generator.system == "tisynth":
            system = "U-Net with all-in-attention on mask and reference (TISynth)"
            sizes = f"levels of {', '.join(map(str, generator.unet.widths))} channels"
        else:
            system, sizes = "text-image-mask MM-DiT (TODSynth)", f"{generator.blocks} blocks of width {generator.width}"
        origin = generator.base or f"from scratch, {sizes}"
        referenced = any("-like" in kind for kind in results.synthetic)
        rows[1:1] = [
            ("Generator", f"{system}, {origin}; {_training(generator.train)}"),
            (
                "Sampling",
                f"{sampling.steps} steps ({sampling.solver if generator.system == 'todsynth' else 'DDIM'}"
                + ("" if sampling.shift is None else f", shift {sampling.shift:g}")
                + f"), guidance of the mask {sampling.mask_scale:g}, of the text "
                f"{sampling.text_scale:g}"
                + (f", of the reference {sampling.reference_scale:g}" if referenced else "")
                + (
                    ""
                    if sampling.guidance_interval == (0, 1)
                    else ", between the noise levels {:g} and {:g}".format(*sampling.guidance_interval)
                ),
            ),
        ]
        if _any_steered(results):
            rows.insert(
                3,
                (
                    "Steering",
                    f"control-rectify flow matching (CRFM) in {_steered(steering, sampling.steps)}, strength "
                    f"{steering.strength:g}, {steering.schedule}, normalisation: {steering.normalise}",
                ),
            )
    if results.painted_arms:
        if results.filtered:
            drops = "; ".join(
                f"{arm}: {points(shares['dropped'], signed=False)} % ({_by_class(shares)})"
                for arm, shares in results.filtered.items()
            )
            rows.insert(
                -2,
                (
                    "Filter",
                    "painted pixels whose loss under the teaching segmentor is above 1.25 times their class's mean "
                    f"on the training tiles are left unlabelled (FreeMask). {drops}",
                ),
            )
        if results.curated:
            rows.insert(-2, ("Curation", "; ".join(_curation(results, arm) for arm in study.arms if arm.curate)))
    return rows


def _exceptions(results: Results) -> list[str]:
    """How single arms use painted tiles otherwise than the others."""
    arms = [arm for arm in results.recipe.study.arms if arm.synthetic != "none"]
    fewer = [
        f"“{arm.name}” has the first {count} of them"
        for arm in arms
        if (count := (arm.ratio or results.recipe.study.ratio) * results.data.train) < results.synthetic[arm.kind].count
    ]
    first = [
        f"“{arm.name}” trains on painted tiles alone for the first half of its steps and on real ones for the second"
        for arm in arms
        if arm.synthetic_first
    ]
    return fewer + first


def _by_class(shares: dict[str, float | None]) -> str:
    return ", ".join(
        f"{name.removeprefix('dropped/')} {points(share, signed=False)}"
        for name, share in shares.items()
        if name != "dropped"
    )


def _pairs(pairs: PairsConfig) -> str:
    """What paints images and masks together, in words."""
    origin = pairs.base or f"from scratch, levels of {', '.join(map(str, pairs.widths))} channels"
    asked = ", ".join(f"{name} {points(share, signed=False)} %" for name, share in pairs.sampling.shares.items())
    second = f"at half the size, doubled by a second stage ({_training(pairs.upscaler.train)}); "
    stages = second if pairs.two_stages else ""
    return (
        f"pixel diffusion of image and mask together (SatSynth), {origin}; {_training(pairs.train)}; {stages}"
        f"{pairs.sampling.steps} steps (DDIM)" + (f", asked for {asked} of the pixels" if asked else "")
    )


def kind_name(kind: str) -> str:
    """How a report calls the painted tiles of a kind (`ArmConfig.kind`)."""
    if kind == "pairs":
        return "with their masks"
    bare = kind.removesuffix("-on-pairs")
    how = {"plain": "plain", "steered": "CRFM-steered"}[bare.removesuffix("-like")]
    name = how if not bare.endswith("-like") else "referenced" if how == "plain" else f"{how}, referenced"
    return name if bare == kind else f"{name}, under painted masks"


def _any_steered(results: Results) -> bool:
    return any(kind.startswith("steered") for kind in results.synthetic)


def _touched(results: Results) -> list[tuple[str, str]]:
    """Which tiles did what: the statement that no test tile leaked."""
    teacher = f"“{results.recipe.study.teacher or results.arms[0].name}”"
    compared = [
        *(["finished painted tiles with the tiles of all splits"] if results.audit else []),
        *(["what is learned from with validation and test tiles"] if results.audit_of_splits else []),
    ]
    audited = " but the audit" if compared else ""
    rows = [
        ("Training tiles", "train every segmentor"),
        (
            "Validation tiles",
            "choose the checkpoint of a segmentor"
            + (", and every arm's learning rate and steps," if results.recipe.study.search else ",")
            + " nothing else"
            + audited,
        ),
        ("Test tiles", f"score finished segmentors, once, and nothing else{audited}: no training, no selection"),
    ]
    if results.painted_arms:
        painters = " and ".join(
            name
            for name, there in (("the generator", results.under_masks), ("what paints pairs", results.labels))
            if there
        )
        of_masks = {kind for kind in results.synthetic if "pairs" not in kind}
        rows[0] = (
            "Training tiles",
            f"train every segmentor and {painters}" + ("; their masks are painted" if of_masks else ""),
        )
        rows.insert(
            1, ("Painted tiles", "train the segmentors of the arms with synthetic data, beside the training tiles")
        )
        rows[-1] = (
            "Test tiles",
            f"score finished segmentors, once, and nothing else{audited}: no training, no painting, no steering, "
            "no selection",
        )
    if results.data.unlabelled:
        uses = _self_training(results.recipe, teacher)
        if results.under_masks:
            uses.insert(
                0, f"train the generator beside the training tiles, under {_unlabelled_masks(results.recipe, teacher)}"
            )
        if any(arm.references for arm in results.recipe.study.arms):
            uses.append("tiles are painted like them")
        if not any(arm.pseudo_labels is not None for arm in results.recipe.study.arms):
            uses.append("no segmentor is trained on them")
        rows.insert(
            1 + bool(results.painted_arms),
            ("Unlabelled images", f"{results.data.unlabelled} windows of them " + "; ".join(uses)),
        )
    if compared:
        rows.append(("Audit", f"compares {', and '.join(compared)}, and only reports: nothing reads it"))
    if _any_steered(results):
        rows.append(
            ("Steering", f"the segmentor that steers the painting under a seed is that of {teacher}, same seed")
        )
    if results.filtered or results.curated:
        rows.append(
            ("Filter", f"the segmentor that filters painted tiles under a seed is that of {teacher}, same seed")
        )
    return rows


def _curation(results: Results, arm: ArmConfig) -> str:
    """The rules of an arm that are in force, and what they left."""
    assert arm.curate is not None
    rules = {key: value for key, value in arm.curate.model_dump(mode="json").items() if value is not None}
    for rule, setting in (("rare", "valid_share"), ("balance", "max_weight")):
        if rule not in rules:
            del rules[setting]
    used, dropped = (
        points(share, signed=False) for share in (results.curated[arm.name].used, results.curated[arm.name].dropped)
    )
    told = ", ".join(f"{key} {value}" for key, value in rules.items()) or "none"
    return f"{arm.name}: rules {told}; {used} % of the painted tiles are used, {dropped} % of all their pixels dropped"


def _self_training(recipe: Recipe, teacher: str) -> list[str]:
    """How the windows train segmentors, one clause an arm."""
    adapted = [f"“{arm.name}”" for arm in recipe.study.arms if arm.adapt]
    return [
        f"train the segmentors of “{arm.name}”, under {_read(arm.pseudo_labels, teacher)}"
        for arm in recipe.study.arms
        if arm.pseudo_labels is not None
    ] + ([f"give the batch norms of {', '.join(adapted)} their statistics"] if adapted else [])


def _read(confidence: float, teacher: str) -> str:
    return (
        f"the classes that the segmentors of {teacher}, all seeds together, read in them with a probability of "
        f"{confidence:g} or more"
    )


def _unlabelled_masks(recipe: Recipe, teacher: str) -> str:
    confidence = recipe.generator.pseudo_labels
    masks = "a wholly unlabelled mask" if confidence is None else _read(confidence, teacher)
    layouts = f"; the layouts that the segmentors of {teacher} read are painted as well"
    return masks if recipe.study.layouts == "labelled" else masks + layouts


def _steered(steering: SteeringConfig, total: int) -> str:
    last = min(steering.start + steering.steps, total)
    if last - steering.start == 1:
        return "the first step" if last == 1 else f"step {last}"
    return f"the first {last} steps" if steering.start == 0 else f"steps {steering.start + 1} to {last}"


def _training(train: TrainConfig) -> str:
    return (
        f"{train.steps} steps of {train.batch_size * train.accumulate} samples, AdamW, learning rate "
        f"{train.learning_rate:g}, {train.schedule}"
    )


def _segmentor_training(results: Results) -> str:
    search, train = results.recipe.study.search, results.recipe.segmentor.train
    if search is None:
        return _training(train)
    rates, steps = (", ".join(f"{value:g}" for value in values) for values in (search.learning_rates, search.steps))
    found = "; ".join(f"{entry.arm}: {entry.learning_rate:g}, {entry.steps}" for entry in results.settings)
    return (
        f"batches of {train.batch_size * train.accumulate} samples, AdamW, {train.schedule}; for every arm the "
        f"learning rate (of {rates}) and the steps (of {steps}) that reached the best validation mIoU under seed "
        f"{results.recipe.study.seeds[0]}: {found}"
    )


def _limitations(results: Results) -> list[str]:
    recipe, data = results.recipe, results.data
    seeds = len(recipe.study.seeds)
    limits = []
    if recipe.data.kind == "world":
        limits.append(
            "The tiles are procedural scenes, not imagery. They show what the method and its measurement do, not what "
            "would happen on your sensor and terrain."
        )
    if results.painted_arms:
        both = results.under_masks and results.labels is not None
        painters = "One generator and one painter of pairs painted" if both else "One generator painted"
        if not results.under_masks:
            painters = "One painter of pairs painted"
        painters += " for all seeds"
        limits.append(
            f"{painters}. The intervals contain what varies from seed to seed (the painted tiles and the training of "
            "the segmentor), not what another training of what paints would change."
        )
    if _self_training(recipe, "") or (
        results.painted_arms and (recipe.study.layouts == "all" or recipe.generator.pseudo_labels is not None)
    ):
        limits.append(
            "The segmentors of all seeds read the unlabelled images together, so the arms that learn from them share "
            "them: their scores vary less from seed to seed than those of studies that are independent throughout."
        )
    limits.append(
        f"All seeds share the same {data.train} training and {data.test} test tiles. The intervals do not say how the "
        "result would vary over other tiles, regions or dates."
    )
    if seeds > 1:
        limits.append(
            f"{seeds} seeds: a Student-t interval with {seeds - 1} degree{'s' * (seeds > 2)} of freedom, which takes "
            "the differences as roughly normal. More seeds make it narrower."
        )
    limits.append(
        f"One segmentor ({recipe.segmentor.architecture}, {recipe.segmentor.encoder}), with "
        + ("the same search for its settings" if recipe.study.search else "the same settings and number of steps")
        + " in every arm. Another one may rank the arms differently."
    )
    if results.plateau is None:
        limits.append("It was not checked whether the baseline had learned all it can in its number of steps.")
    return limits


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if seconds < 600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _score(summary: Summary) -> str:
    """Mean, and half the width of the interval: "43.0 ± 1.2"."""
    mean = points(summary.mean, signed=False)
    if summary.ci95 is None:
        return mean
    return f"{mean} ± {points((summary.ci95[1] - summary.ci95[0]) / 2, signed=False)}"


def _tight(sentence: str) -> str:
    """Numbers kept on one line with what belongs to them."""
    return sentence.replace(" %", "\u00a0%")
