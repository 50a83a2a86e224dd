"""The study: does synthetic data help? Arms x seeds, each a unit of work that is never done twice."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import terrasynth
from terrasynth.data.folder import Tiles, check_splits, load_synthetic, load_tiles
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_write, digest, read_json, remove_incomplete, write_json
from terrasynth.recipe import ArmConfig, Recipe
from terrasynth.study.report import write_report
from terrasynth.study.statistics import compare, summarise
from terrasynth.systems.fit import fit_generator
from terrasynth.systems.generate import paint, plan, steering_for
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.tasks.segmentation import Segmentor, fit

__all__ = ["OutOfTime", "run_study"]


class OutOfTime(Exception):  # noqa: N818 - not an error: the same command goes on from here
    """`--max-minutes` is over before the study is."""


@dataclass
class _Clock:
    """Seconds of every unit, and what is left of the time allowed."""

    max_minutes: float | None
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float | None:
        """Minutes left, or None without a limit."""
        if self.max_minutes is None:
            return None
        return max(0.0, self.max_minutes - (time.monotonic() - self.started) / 60)

    def check(self) -> None:
        if self.left() == 0:
            raise OutOfTime


@dataclass(frozen=True)
class _Unit:
    """A finished unit of work: its folder, what it measured, how long it took."""

    folder: Path
    key: str
    result: dict[str, Any]
    seconds: float


def _unit(root: Path, name: str, inputs: Mapping[str, Any], clock: _Clock, work: Callable[[Path], Any]) -> _Unit:
    """Do `work(folder)` once for these inputs.

    The folder's name carries a digest of the inputs: changed inputs get a new folder, old results stay. `unit.json`
    appears last and makes the unit finished; before that, work in the folder goes on where it stopped.
    """
    key = digest(terrasynth.__version__, inputs)
    folder = root / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}-{key[:8]}"
    stamp = folder / "unit.json"
    if not stamp.is_file():
        clock.check()
        folder.mkdir(parents=True, exist_ok=True)
        remove_incomplete(folder)
        # Time of earlier, interrupted sittings counts too.
        clocked = folder / "seconds.json"
        before = read_json(clocked) if clocked.is_file() else 0.0
        begun = time.monotonic()
        try:
            result = work(folder)
        finally:
            seconds = before + time.monotonic() - begun
            write_json(clocked, seconds)
        write_json(stamp, {"name": name, "inputs": inputs, "result": result, "seconds": seconds})
    stored = read_json(stamp)
    return _Unit(folder, key, stored["result"] or {}, stored["seconds"])


def run_study(
    recipe: Recipe, base: Path, out: Path, *, command: str = "", max_minutes: float | None = None
) -> Path:
    """Run (or go on with) a study and write `results.json` and `report.html`.

    Order of work: the baseline's cells, whose segmentors steer; the generator; painted tiles per seed; all other cells;
    the plateau check. Test tiles are only read by the final evaluation of a finished segmentor.

    Args:
        recipe: everything the results depend on.
        base: folder that relative paths in the recipe start from.
        out: results go here; finished units found here are not computed again.
        command: shown in the report.
        max_minutes: stop after about this long, at a checkpoint.

    Returns:
        Path of the report.

    Raises:
        TerraSynthError: bad data or an impossible recipe.
        OutOfTime: `max_minutes` are over; the same call goes on from there.
    """
    study = recipe.study
    baseline = study.arms[0]
    if baseline.synthetic != "none":
        raise TerraSynthError(
            "the baseline is an arm with synthetic data",
            found=f"study.arms[0] = {baseline.name!r} with synthetic: {baseline.synthetic}",
            expected="an arm with synthetic: none, whose segmentors also steer",
            fix="put the real-only arm first",
        )
    clock = _Clock(max_minutes)
    train_tiles = load_tiles(recipe.data, "train", base=base)
    validation = load_tiles(recipe.data, "validation", base=base)
    test = load_tiles(recipe.data, "test", base=base)
    check_splits(train=train_tiles, validation=validation, test=test)
    data = {"train": train_tiles.fingerprint(), "validation": validation.fingerprint()}

    def cell(arm: ArmConfig, seed: int, steps: int | None = None) -> _Unit:
        """Train and evaluate the segmentor of one arm and seed."""
        config = recipe.segmentor
        if steps is not None:
            config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
        painted = None if arm.synthetic == "none" else synthetic(arm.synthetic, seed)
        inputs = {
            "segmentor": config.model_dump(mode="json"),
            "data": {**data, "test": test.fingerprint()},
            "cutmix": arm.cutmix,
            "synthetic": None if painted is None else painted.key,
            "real_fraction": None if painted is None else study.real_fraction,
            "seed": seed,
        }

        def work(folder: Path) -> dict[str, Any]:
            segmentor = Segmentor.build(config, train_tiles.schema.num_classes, train_tiles.schema.ignore_index, seed)
            outcome = fit(
                segmentor,
                train_tiles,
                validation,
                config,
                folder / "training",
                seed=seed,
                synthetic=None if painted is None else load_synthetic(painted.folder / "dataset"),
                real_fraction=study.real_fraction,
                cutmix=arm.cutmix,
                max_minutes=clock.left(),
                label=f"{arm.name}, seed {seed}" + ("" if steps is None else ", twice the steps"),
            )
            if not outcome.finished:
                raise OutOfTime
            segmentor.save_pretrained(folder / "segmentor")
            metrics = segmentor.evaluate(test).metrics(train_tiles.schema.names)
            curve = _curve(folder / "training" / "log.jsonl")
            # The optimiser's state is of no use any more, and it is most of the space.
            shutil.rmtree(folder / "training" / "checkpoints")
            return {"metrics": metrics, "curve": curve}

        return _unit(out / "cells", f"{arm.name} seed {seed}" + ("" if steps is None else " x2"), inputs, clock, work)

    def generator() -> _Unit:
        inputs = {
            "generator": recipe.generator.model_dump(mode="json"),
            "caption": recipe.data.caption,
            "data": data["train"],
        }

        def work(folder: Path) -> dict[str, Any]:
            outcome = fit_generator(
                train_tiles, recipe.generator, recipe.data, recipe.sampling, folder, max_minutes=clock.left()
            )
            if not outcome.finished:
                raise OutOfTime
            shutil.rmtree(folder / "checkpoints")
            return {"model": "model"}

        return _unit(out, "generator", inputs, clock, work)

    def synthetic(kind: str, seed: int) -> _Unit:
        model = generator()
        steers = cell(baseline, seed)
        inputs = {
            "generator": model.key,
            "sampling": recipe.sampling.model_dump(mode="json"),
            "steering": recipe.steering.model_dump(mode="json") if kind == "steered" else None,
            "segmentor": steers.key,
            "count": study.ratio * len(train_tiles),
            "seed": seed,
        }

        def work(folder: Path) -> dict[str, Any]:
            pipeline = TODSynthPipeline.from_pretrained(model.folder / "model")
            pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
            segmentor = Segmentor.from_pretrained(steers.folder / "segmentor").to(pipeline.device)
            paint(
                pipeline,
                train_tiles,
                plan(study.ratio * len(train_tiles), len(train_tiles), seed),
                recipe.sampling,
                folder / "dataset",
                provenance={"model": model.key, "recipe": recipe.name, "steering": inputs["steering"]},
                steering=steering_for(recipe.steering, recipe.sampling, segmentor.loss) if kind == "steered" else None,
                label=f"painting {kind}, seed {seed}",
            )
            painted = load_synthetic(folder / "dataset")
            return {"agreement": segmentor.evaluate(painted).metrics(painted.schema.names)["miou"], "count": len(painted)}

        return _unit(out / "synthetic", f"{kind} seed {seed}", inputs, clock, work)

    for seed in study.seeds:
        cell(baseline, seed)
    kinds = sorted({arm.synthetic for arm in study.arms} - {"none"})
    painted = {kind: {seed: synthetic(kind, seed) for seed in study.seeds} for kind in kinds}
    cells = {arm.name: [cell(arm, seed) for seed in study.seeds] for arm in study.arms}
    twice = [cell(baseline, seed, 2 * recipe.segmentor.train.steps) for seed in study.seeds] if study.plateau_check else []

    timing = [{"name": "train the generator", "seconds": generator().seconds}] if kinds else []
    timing += [
        {"name": f"paint ({kind})", "seconds": sum(unit.seconds for unit in units.values())}
        for kind, units in painted.items()
    ]
    timing += [{"name": f"train: {name}", "seconds": sum(u.seconds for u in units)} for name, units in cells.items()]
    if twice:
        timing.append({"name": "plateau check", "seconds": sum(unit.seconds for unit in twice)})

    results = {
        "name": recipe.name,
        "task": "segmentation",
        "recipe": recipe.model_dump(mode="json"),
        "classes": [
            {"name": name, "color": list(color)}
            for name, color in zip(train_tiles.schema.names, train_tiles.schema.colors, strict=True)
        ],
        "data": {
            "train": len(train_tiles),
            "validation": len(validation),
            "test": len(test),
            "image_size": recipe.data.image_size,
            "source": "procedural world" if recipe.data.kind == "world" else "image and mask folders",
        },
        **_statistics(cells, baseline.name),
        "curves": {
            name: [{"seed": seed, **unit.result["curve"]} for seed, unit in zip(study.seeds, units, strict=True)]
            for name, units in cells.items()
        },
        "plateau": _plateau(cells[baseline.name], twice, baseline.name, recipe.segmentor.train.steps),
        "timing": timing,
        "total_seconds": sum(entry["seconds"] for entry in timing),
        "synthetic": {
            kind: {
                "count": next(iter(units.values())).result["count"],
                "agreement": sum(u.result["agreement"] for u in units.values()) / len(units),
            }
            for kind, units in painted.items()
        },
        "environment": {
            "terrasynth": terrasynth.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        },
        "command": command,
    }
    _gallery(out, train_tiles, {kind: units[study.seeds[0]] for kind, units in painted.items()})
    write_json(out / "results.json", results)
    return write_report(out)


def _statistics(cells: Mapping[str, list[_Unit]], baseline: str) -> dict[str, Any]:
    """Mean and interval of every metric of every arm, and every arm's paired difference to the baseline."""
    values = {
        arm: {name: [unit.result["metrics"][name] for unit in units] for name in units[0].result["metrics"]}
        for arm, units in cells.items()
    }
    arms = [
        {"name": arm, "metrics": {name: summarise(v).to_dict() for name, v in metrics.items()}}
        for arm, metrics in values.items()
    ]
    comparisons = []
    others = [arm for arm in values if arm != baseline]
    for arm in others:
        for name in values[arm]:
            comparison = compare(values[arm][name], values[baseline][name])
            comparisons.append({"arm": arm, "baseline": baseline, "metric": name, **comparison.to_dict()})
    return {"arms": arms, "comparisons": comparisons}


def _plateau(once: list[_Unit], twice: list[_Unit], baseline: str, steps: int) -> dict[str, Any] | None:
    """How much twice the steps move the baseline."""
    if not twice:
        return None
    before, after = ([unit.result["metrics"]["miou"] for unit in units] for units in (once, twice))
    difference = compare(after, before).to_dict()
    return {"baseline": baseline, "steps": steps, "twice": 2 * steps, "values": after, **difference}


def _curve(log: Path) -> dict[str, list[float]]:
    """Validation mIoU against step from the log of a training."""
    import json

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    points = [line for line in lines if "miou" in line]
    return {"steps": [line["step"] for line in points], "miou": [line["miou"] for line in points]}


def _gallery(out: Path, tiles: Tiles, painted: Mapping[str, _Unit], count: int = 6) -> None:
    """Masks with their paintings, the same job with and without steering, for the report."""
    from PIL import Image

    if not painted:
        return
    sets = {kind: load_synthetic(unit.folder / "dataset") for kind, unit in painted.items()}
    first = next(iter(sets.values()))
    shown = [round(i * (len(first) - 1) / max(1, count - 1)) for i in range(min(count, len(first)))]
    entries = []
    for index in shown:
        pictures = {"mask": tiles.schema.to_color(first.masks[index].numpy())}
        for kind, dataset in sets.items():
            pictures[kind] = dataset.images[index].movedim(0, -1).numpy()
        entry: dict[str, str] = {"caption": tiles.schema.caption(first.masks[index])}
        for kind, pixels in pictures.items():
            path = out / "gallery" / f"{index:06d}-{kind}.png"
            with atomic_write(path) as partial:
                Image.fromarray(pixels).save(partial)
            entry[kind] = str(path.relative_to(out))
        entries.append(entry)
    write_json(out / "gallery.json", entries)
