"""How much synthetic data is enough, and for which classes: what the scores of a study's arms say of both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from terrasynth.recipe import ArmConfig, StudyConfig
from terrasynth.study.statistics import Correlation, Difference, compare, correlate

__all__ = ["ClassGains", "Line", "class_gains", "ratio_lines"]

Scores = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """Arms that are alike but for how much is painted.

    Attributes:
        name: what their names have in common.
        points: painted tiles per real tile, and the paired difference to the baseline, from the fewest on. The first is
            that of 0 where the study has the same arm without paintings; it is the only one of an arm that paints
            nothing.
        begins: the name of that arm, where there is one.
    """

    name: str
    points: tuple[tuple[int, Difference], ...]
    begins: str | None = None

    @property
    def paints(self) -> bool:
        """Whether any of the arms has painted tiles."""
        return self.points[-1][0] > 0


def ratio_lines(study: StudyConfig, scores: Mapping[str, Scores]) -> list[Line]:
    """The arms of a study by what they add, but for the baseline: first those that paint nothing.

    Args:
        study: its arms and ratio.
        scores: of every arm, one value a seed.
    """
    baseline = study.arms[0]
    bare = {arm.group: arm for arm in study.arms if arm.synthetic == "none"}
    groups: dict[str, list[ArmConfig]] = {}
    for arm in study.arms:
        if arm.synthetic != "none":
            groups.setdefault(arm.group, []).append(arm)

    def point(arm: ArmConfig) -> tuple[int, Difference]:
        ratio = 0 if arm.synthetic == "none" else arm.ratio or study.ratio
        return ratio, compare(scores[arm.name], scores[baseline.name])

    lines = [Line(arm.name, (point(arm),)) for arm in bare.values() if arm is not baseline]
    for arms in groups.values():
        start = bare.get(_without_paintings(arms[0]).group)
        points = sorted(map(point, arms), key=lambda each: each[0])
        common = _common([arm.name for arm in arms])
        lines.append(Line(common, (point(start), *points), start.name) if start else Line(common, (*points,)))
    return lines


def _without_paintings(arm: ArmConfig) -> ArmConfig:
    return ArmConfig(name="", mix=arm.mix, pseudo_labels=arm.pseudo_labels, adapt=arm.adapt)


def _common(names: Sequence[str]) -> str:
    """What names have in common that end in ratios; else the first."""
    bare = {re.sub(r"\s*\(?1\s*:\s*\d+\)?$", "", name) for name in names}
    return bare.pop() if len(names) > len(bare) == 1 else names[0]


@dataclass(frozen=True)
class ClassGains:
    """What an arm gains in each class, against how frequent the class is.

    Attributes:
        arm: its name.
        shares: of the pixels of the training tiles that have each class.
        gains: paired differences in test IoU to the baseline.
        correlation: of both; None where there are too few classes to tell.
    """

    arm: str
    shares: tuple[float | None, ...]
    gains: tuple[Difference, ...]
    correlation: Correlation | None


def class_gains(arm: str, shares: Scores, scores: Sequence[Scores], baseline: Sequence[Scores]) -> ClassGains:
    """Args: the arm's name, and of every class its share, the arm's scores (one a seed) and the baseline's."""
    gains = tuple(compare(ours, theirs) for ours, theirs in zip(scores, baseline, strict=True))
    return ClassGains(arm, tuple(shares), gains, correlate(shares, [gain.delta for gain in gains]))
