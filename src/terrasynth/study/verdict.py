"""The answer of a study: whether synthetic data helped, by rules that are fixed before anyone sees the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from terrasynth.study.read import Plateau, Results
from terrasynth.study.statistics import Difference, Summary, compare, difference_text, points

__all__ = ["Verdict", "verdict"]


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
    best = max(arms, key=lambda arm: arm.rank)
    gain = best.minus(baseline)
    outcome: Literal["helps", "does not help", "can not tell"] = (
        "helps" if _above(gain) else "does not help" if _below(gain) else "can not tell"
    )
    headline = _headline(outcome, baseline.summary(), best.summary(), gain)
    doubts = [bool(cautions)]
    notes: list[str] = []

    if rival := results.best_rival:
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


def _plateau_sentence(plateau: Plateau, gain: Difference, moving: bool) -> str:
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
    if results.audit_of_splits is not None and (copies := results.audit_of_splits.copies):
        told.append(f"Copies of validation or test tiles in what is learned from, by the audit: {copies}.")
    return told


def _span(difference: Difference) -> str:
    assert difference.ci95 is not None
    return f"{points(difference.ci95[0])} to {points(difference.ci95[1])}"
