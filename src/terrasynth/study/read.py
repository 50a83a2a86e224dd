"""`results.json` of a study read back: what the verdict and the report are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from terrasynth.errors import TerraSynthError
from terrasynth.io import read_json
from terrasynth.recipe import Recipe
from terrasynth.study.canvas import Color
from terrasynth.study.statistics import Difference, Summary, compare, summarise
from terrasynth.study.sweep import ClassGains, Line, class_gains, ratio_lines

__all__ = ["AuditedSet", "ClassEntry", "Plateau", "Results", "read_results"]

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

    def by_class(self, classes: Sequence[ClassEntry]) -> list[tuple[_Score, ...]]:
        """IoU by seed of every class."""
        return [self.values(f"iou/{entry.name}") for entry in classes]

    @property
    def rank(self) -> float:
        """Mean mIoU; below all others without a score."""
        mean = self.summary().mean
        return -1.0 if mean is None else mean

    def minus(self, other: _Arm, *, confidence: float = 0.95) -> Difference:
        return compare(self.values(), other.values(), confidence=confidence)


class ClassEntry(_Part):
    """A class of the label schema, and how much of it there is."""

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


class Plateau(_Part):
    """An arm trained for twice the steps."""

    arm: str
    steps: int
    twice: int
    values: tuple[_Score, ...]
    """The arm trained for `twice` steps minus itself after `steps`, by seed."""

    @property
    def difference(self) -> Difference:
        """What the rest of the steps changed, with its interval over the seeds."""
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


class AuditedSet(_Part):
    """What the painted tiles were compared with, and what the audit found there."""

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
    sets: tuple[AuditedSet, ...]
    findings: tuple[_Finding, ...]


class _LearnedFrom(_Part):
    name: str
    images: int
    too_plain: int
    copies: int


class _Splits(_Part):
    sheet: str
    sets: tuple[_LearnedFrom, ...]
    held_out: AuditedSet
    findings: tuple[_Finding, ...]

    @property
    def copies(self) -> str:
        """How many there are of every kind: "2 training tiles and 1 unlabelled window"; empty if there are none."""
        names = {
            "train": ("training tile", "training tiles"),
            "unlabelled": ("unlabelled window", "unlabelled windows"),
        }
        return " and ".join(f"{one.copies} {names[one.name][one.copies > 1]}" for one in self.sets if one.copies)


class _Curated(_Part):
    used: _Score
    dropped: _Score


class Results(_Part):
    """`results.json`: everything a study measured. Scores are fractions in [0, 1]; the first arm is the baseline."""

    name: str
    recipe: Recipe
    other_arms: tuple[str, ...] = ()
    """Of the recipe, that were not asked for."""
    classes: tuple[ClassEntry, ...]
    data: _Data
    arms: tuple[_Arm, ...] = Field(min_length=1)
    curves: dict[str, tuple[_Curve, ...]]
    plateaus: tuple[Plateau, ...]
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
    def scored_classes(self) -> list[ClassEntry]:
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
    def steered(self) -> bool:
        """Whether a segmentor steered any painting."""
        return any(kind.startswith("steered") for kind in self.synthetic)

    @property
    def plateau(self) -> Plateau | None:
        """The baseline's own."""
        return next((plateau for plateau in self.plateaus if plateau.arm == self.arms[0].name), None)

    @property
    def rivals(self) -> tuple[_Arm, ...]:
        """The arms that improve on the baseline without synthetic data."""
        painted = self.painted_arms
        return tuple(arm for arm in self.arms[1:] if arm not in painted)

    @property
    def best_rival(self) -> _Arm | None:
        """Of the rivals, the one with the highest mean mIoU."""
        return max(self.rivals, key=lambda arm: arm.rank, default=None)


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
