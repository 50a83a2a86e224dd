"""The tables and numbers of docs/results/ratio.md, from finished studies of `ratio.yaml`.

    python benchmarks/ratio_tables.py runs/ratio16 runs/ratio64 runs/ratio395

The arms are those of the first study; others may have only some of them. Everything in percent or points. Intervals are
Student-t ones over the seeds; in bold where they leave out zero, with a star where p < 0.05. What is compared, is
compared seed by seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from terrasynth.study.read import Results, read_results
from terrasynth.study.statistics import Difference, compare, difference_text, points

RATIOS = (1, 3, 5)
DRAWN, PAINTED_TOO = "TODSynth, real masks", "TODSynth, SatSynth masks"


def with_interval(difference: Difference) -> str:
    text, interval = difference_text(difference), difference.ci95
    return f"**{text}**" if interval is not None and (interval[0] > 0 or interval[1] < 0) else text


def table(first: str, columns: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> None:
    columns = list(columns)
    print(f"\n| {first} | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
    for name, cells in rows:
        print(f"| {name} | {' | '.join(cells)} |")


def mean_and_half(study: Results, name: str) -> str:
    summary = next((arm.summary() for arm in study.arms if arm.name == name), None)
    if summary is None or summary.mean is None or summary.ci95 is None:
        return "–"
    low, high = summary.ci95
    return f"{100 * summary.mean:.1f} ± {50 * (high - low):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+")
    folders = parser.parse_args().studies
    studies = [read_results(folder) for folder in folders]
    columns = [folder.name for folder in folders]
    names = [arm.name for arm in studies[0].arms]
    for study in studies:
        if study.arms[0].name != names[0] or not values(study).keys() <= set(names):
            parser.error("the studies have other arms")

    table(
        "arm",
        [column for name in columns for column in (name, "Δ")],
        (
            (
                name,
                [
                    cell
                    for study in studies
                    for cell in (
                        mean_and_half(study, name),
                        "–" if name == names[0] else difference_or_dash(study, name, names[0]),
                    )
                ],
            )
            for name in names
        ),
    )
    common = [arm.name for arm in studies[0].painted_arms if all(arm.name in values(study) for study in studies)]
    table(
        "painted arms that all have",
        columns,
        [(f"mean Δ of {len(common)}", [mean(study, common) for study in studies])],
    )

    correlations = [
        {gains.arm: gains.correlation for gains in study.class_gains if gains.correlation is not None}
        for study in studies
    ]
    table(
        "arm: r of gain and share of the classes",
        columns,
        (
            (
                name,
                [
                    f"{each[name].r:+.2f}".replace("-", "−") + "*" * (each[name].p < 0.05) if name in each else "–"
                    for each in correlations
                ],
            )
            for name in names[1:]
        ),
    )

    def differences(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
        return [
            (f"{one} − {other}", [difference_or_dash(study, one, other) for study in studies]) for one, other in pairs
        ]

    best = [max(study.painted_arms, key=lambda arm: arm.rank).name for study in studies]
    table(
        "arm − arm",
        columns,
        differences(
            [(f"{PAINTED_TOO} 1:{ratio}", f"{DRAWN} 1:{ratio}") for ratio in RATIOS]
            + [(f"ClassMix + SatSynth 1:{ratio}", "ClassMix") for ratio in RATIOS]
            + [(painted, rival.name) for painted in dict.fromkeys(best) for rival in studies[0].rivals]
        ),
    )
    better = [
        value
        for study in studies
        for ratio in RATIOS
        if {one := f"{PAINTED_TOO} 1:{ratio}", other := f"{DRAWN} 1:{ratio}"} <= values(study).keys()
        for value in difference(study, one, other).values
        if value is not None
    ]
    print(f"\n{PAINTED_TOO} are better than {DRAWN} in {sum(value > 0 for value in better)} of {len(better)}.")

    table(
        "class: mean gain of the arms with painted tiles",
        columns,
        (
            (entry.name, [points(class_gain(study, entry.name)) for study in studies])
            for entry in studies[0].scored_classes
        ),
    )

    kinds = list(studies[0].synthetic)
    rows = [
        (f"mIoU a segmentor of real tiles reads in {kind}", [agreement(study, kind) for study in studies])
        for kind in kinds
    ]
    rows += [("distance of painted to real classes", [distance(study) for study in studies])]
    rows += [
        (f"near copies of training tiles in {kind}, by seed", [copies(study, kind) for study in studies])
        for kind in kinds
    ]
    rows += [("hours of all units", [f"{sum(part.seconds for part in study.timing) / 3600:.1f}" for study in studies])]
    table("of what was painted", columns, rows)


def values(study: Results) -> dict[str, tuple[float | None, ...]]:
    return {arm.name: arm.values() for arm in study.arms}


def difference(study: Results, one: str, other: str) -> Difference:
    return compare(values(study)[one], values(study)[other])


def difference_or_dash(study: Results, one: str, other: str) -> str:
    """As it is printed, or a dash where the study has not both arms."""
    return with_interval(difference(study, one, other)) if {one, other} <= values(study).keys() else "–"


def mean(study: Results, names: Iterable[str]) -> str:
    """Of the differences of these arms to the baseline."""
    deltas = [difference(study, name, study.arms[0].name).delta for name in names]
    return points(float(np.mean([delta for delta in deltas if delta is not None])))


def class_gain(study: Results, name: str) -> float:
    """Of one class, over the arms with painted tiles and the seeds, in fractions."""
    baseline = study.arms[0].values(f"iou/{name}")
    gains = [compare(arm.values(f"iou/{name}"), baseline).delta for arm in study.painted_arms]
    return float(np.mean([gain for gain in gains if gain is not None]))


def agreement(study: Results, kind: str) -> str:
    value = study.synthetic[kind].agreement
    return "–" if value is None else f"{100 * value:.0f}"


def distance(study: Results) -> str:
    return "–" if study.labels is None or study.labels.distance is None else f"{100 * study.labels.distance:.1f}"


def copies(study: Results, kind: str) -> str:
    audits = sorted((audit for audit in study.audit if audit.kind == kind), key=lambda audit: audit.seed)
    found = [str(part.copies) for audit in audits for part in audit.sets if part.name == "train"]
    return f"{', '.join(found)} of {audits[0].painted}" if audits else "–"


if __name__ == "__main__":
    main()
