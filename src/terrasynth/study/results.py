"""`results.json`: everything that a study measured, for its report and for other readers."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

import terrasynth
from terrasynth.io import write_json
from terrasynth.study import paintings
from terrasynth.study.gallery import write_gallery, write_pairs
from terrasynth.study.products import AUDIT, painted_tiles
from terrasynth.study.quality import label_histogram
from terrasynth.study.statistics import compare, summarise
from terrasynth.study.sweep import class_gains

if TYPE_CHECKING:
    from terrasynth.study.run import Study
    from terrasynth.training.units import Unit

__all__ = ["write_results"]

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write_results(of: Study, command: str) -> None:
    """Write `results.json` and the pictures of a study; what is not finished of it is done first."""
    study, schema, kinds = of.recipe.study, of.train.schema, of.kinds
    tiles = {"train": of.train, "validation": of.validation, "test": of.test}
    cells = {arm.name: [of.cell(arm, seed) for seed in study.seeds] for arm in study.arms}
    metrics = {arm.name: [of.metrics(arm, seed) for seed in study.seeds] for arm in study.arms}
    twice = {arm.name: [of.metrics(arm, seed, times=2) for seed in study.seeds] for arm in of.checked}
    agreement = {kind: [of.agreement(kind, seed) for seed in study.seeds] for kind in kinds}
    audits = {kind: [of.audited(kind, seed) for seed in study.seeds] for kind in kinds}
    of_splits = of.audited_splits()
    shares = label_histogram(of.train.masks, schema.num_classes).tolist()
    labels = [of.label_shares(seed) for seed in study.seeds] if of.paints_pairs else None
    seconds = {group: sum(each) for group, each in of.timing().items()}
    _write_galleries(of)
    write_json(
        of.out / "results.json",
        {
            "name": of.recipe.name,
            "task": "segmentation",
            "recipe": of.recipe.model_dump(mode="json"),
            "other_arms": list(of.others),
            "classes": [
                {"name": name, "color": list(color), "share": share}
                for name, color, share in zip(schema.names, schema.colors, shares, strict=True)
            ],
            "data": {
                **{name: len(split) for name, split in tiles.items()},
                "unlabelled": len(of.learned.get("unlabelled", ())),
                "left_out": sum(split.left_out for split in tiles.values()),
                "image_size": of.recipe.data.image_size,
                "source": "procedural world" if of.recipe.data.kind == "world" else "image and mask folders",
            },
            **_statistics(metrics, study.arms[0].name),
            "curves": {
                name: [{"seed": seed, **unit.result["curve"]} for seed, unit in zip(study.seeds, units, strict=True)]
                for name, units in cells.items()
            },
            "class_gains": _class_gains(metrics, study.arms[0].name, dict(zip(schema.names, shares, strict=True))),
            "plateaus": [
                _plateau(arm.name, metrics[arm.name], twice[arm.name], of.settings(arm).train.steps)
                for arm in of.checked
            ],
            "settings": [
                {
                    "arm": arm.name,
                    "learning_rate": of.settings(arm).train.learning_rate,
                    "steps": of.settings(arm).train.steps,
                }
                for arm in study.arms
            ],
            "timing": [{"name": name, "seconds": value} for name, value in seconds.items()],
            "total_seconds": sum(seconds.values()),
            "synthetic": {
                kind: {"count": of.count(kind), "agreement": sum(values) / len(values)}
                for kind, values in agreement.items()
            },
            "labels": labels
            and {
                "shares": torch.tensor([one["shares"] for one in labels]).mean(0).tolist(),
                "distance": summarise([one["distance"] for one in labels]).mean,
            },
            "audit": [
                {"kind": kind, "seed": seed, "sheet": _sheet(of, unit)} | unit.result
                for kind, units in audits.items()
                for seed, unit in zip(study.seeds, units, strict=True)
            ],
            "audit_of_splits": {"sheet": _sheet(of, of_splits)} | of_splits.result,
            "filtered": {arm.name: _mean_shares(cells[arm.name]) for arm in study.arms if arm.filter},
            "curated": {
                arm.name: {
                    "used": summarise([unit.result["used"] for unit in cells[arm.name]]).mean,
                    "dropped": _mean_shares(cells[arm.name])["dropped"],
                }
                for arm in study.arms
                if arm.curate
            },
            "environment": {
                "terrasynth": terrasynth.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": torch.cuda.get_device_name() if _DEVICE == "cuda" else f"{os.cpu_count()} CPU cores",
            },
            "command": command,
        },
    )


def _sheet(of: Study, audit: Unit) -> str:
    return (audit.folder / AUDIT).relative_to(of.out).as_posix()


def _write_galleries(of: Study) -> None:
    """Pictures of what was painted under the first seed."""
    seed, entries = of.recipe.study.seeds[0], []
    shown = {kind: painted_tiles(of.painted(kind, seed)).first(of.count(kind)) for kind in of.kinds}
    under_masks = {kind: tiles for kind, tiles in shown.items() if "pairs" not in kind}
    if under_masks:
        layouts = of.layouts(seed)
        entries += write_gallery(of.out, of.train, layouts, seed, under_masks, references=of.unlabelled)
    if of.paints_pairs:
        anew = {kind: tiles for kind, tiles in shown.items() if kind.endswith("-on-pairs")}
        entries += write_pairs(of.out, paintings.layouts(of, "pairs", seed), anew)
    if entries:
        write_json(of.out / "gallery.json", entries)
    stale = {"paintings.png": under_masks, "pairs.png": of.paints_pairs, "gallery.json": entries}
    for name, shows in stale.items():  # of a study of the same folder that had other arms
        if not shows:
            (of.out / name).unlink(missing_ok=True)


def _statistics(metrics: Mapping[str, list[dict[str, float]]], baseline: str) -> dict[str, Any]:
    """Mean and interval of every metric of every arm, and every arm's paired difference to the baseline."""
    values = {arm: {name: [one[name] for one in seeds] for name in seeds[0]} for arm, seeds in metrics.items()}
    return {
        "arms": [
            {"name": arm, "metrics": {name: summarise(v).to_dict() for name, v in scores.items()}}
            for arm, scores in values.items()
        ],
        "comparisons": [
            {"arm": arm, "baseline": baseline, "metric": name, **compare(v, values[baseline][name]).to_dict()}
            for arm, scores in values.items()
            if arm != baseline
            for name, v in scores.items()
        ],
    }


def _class_gains(
    metrics: Mapping[str, list[dict[str, float]]], baseline: str, shares: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Of every arm but the baseline, how its gains correlate with the classes' shares of the training pixels."""
    names = [name for name in shares if f"iou/{name}" in metrics[baseline][0]]

    def by_class(arm: str) -> list[list[float]]:
        return [[seed[f"iou/{name}"] for seed in metrics[arm]] for name in names]

    gains = [
        class_gains(arm, [shares[name] for name in names], by_class(arm), by_class(baseline))
        for arm in metrics
        if arm != baseline
    ]
    return [{"arm": each.arm, **each.correlation.to_dict()} for each in gains if each.correlation is not None]


def _plateau(arm: str, once: list[dict[str, float]], twice: list[dict[str, float]], steps: int) -> dict[str, Any]:
    """How much twice the steps move an arm."""
    before, after = ([metrics["miou"] for metrics in seeds] for seeds in (once, twice))
    return {"arm": arm, "steps": steps, "twice": 2 * steps, **compare(after, before).to_dict()}


def _mean_shares(units: list[Unit]) -> dict[str, float | None]:
    """What the filter dropped, all in all and of every class, on average over the seeds."""
    # A class may be absent from the paintings of one seed.
    names = dict.fromkeys(name for unit in units for name in unit.result["filter"])
    return {name: summarise([unit.result["filter"].get(name) for unit in units]).mean for name in names}
