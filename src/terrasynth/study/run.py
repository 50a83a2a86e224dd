"""The study: does synthetic data help? Arms x seeds, each a unit of work that is never done twice."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import terrasynth
from terrasynth.curation.filter import class_mean_losses, dropped, filter_pixels
from terrasynth.data.augment import view
from terrasynth.data.folder import Split, Tiles, check_splits, load_synthetic, load_tiles, unlabelled_windows
from terrasynth.data.sheet import contact_sheet
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_write, digest, write_json
from terrasynth.recipe import ArmConfig, Recipe, SegmentorConfig
from terrasynth.sampling.flow import seeded_generator
from terrasynth.study.report import write_report
from terrasynth.study.statistics import compare, summarise
from terrasynth.study.units import Clock, OutOfTime, Unit, do
from terrasynth.systems.fit import fit_generator
from terrasynth.systems.generate import load_pipeline, paint, plan, steering_for
from terrasynth.tasks.segmentation import Segmentor, fit, label

__all__ = ["Study"]

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Study:
    """A recipe's units of work under one folder; whatever is finished there is not computed again.

    Test tiles are only read by the final evaluation of a finished segmentor: no training, selection or steering sees
    them.

    Args:
        recipe: everything the results depend on.
        base: folder that relative paths in the recipe start from.
        out: where the units, `results.json` and `report.html` go.
        max_minutes: stop at a checkpoint after about this long, with `OutOfTime`; the same call goes on from there.

    Raises:
        TerraSynthError: bad data, tiles shared between splits, or an impossible recipe.
    """

    def __init__(self, recipe: Recipe, base: Path, out: Path, *, max_minutes: float | None = None) -> None:
        self.recipe = recipe
        self.out = out
        self.clock = Clock(max_minutes)
        self.baseline = recipe.study.arms[0]
        if self.baseline.synthetic != "none":
            raise TerraSynthError(
                "the baseline is an arm with synthetic data",
                found=f"study.arms[0] = {self.baseline.name!r} with synthetic: {self.baseline.synthetic}",
                expected="an arm with synthetic: none",
                fix="put the real-only arm first",
            )
        self.teacher = next((arm for arm in recipe.study.arms if arm.name == recipe.study.teacher), self.baseline)
        self._base = base
        self._settings: dict[str, SegmentorConfig] = {}

    # Splits are read when they are first needed: a generator that is told no pseudo-labels needs no held-out tiles.

    @cached_property
    def train(self) -> Tiles:
        """The labelled training tiles."""
        return load_tiles(self.recipe.data, "train", base=self._base)

    @cached_property
    def unlabelled(self) -> Tiles | None:
        """The unlabelled images that the generator may see too, if there are any."""
        if self.recipe.data.kind != "folder":
            return None
        return unlabelled_windows(self.recipe.data, self.train.schema)

    @cached_property
    def held_out(self) -> dict[Split, Tiles]:
        """The validation and test tiles, after a check that no tile is in two splits."""
        validation: Tiles = load_tiles(self.recipe.data, "validation", base=self._base)
        test: Tiles = load_tiles(self.recipe.data, "test", base=self._base)
        check_splits(train=self.train, validation=validation, test=test)
        self._check_unlabelled(validation=validation, test=test)
        return {"validation": validation, "test": test}

    def _check_unlabelled(self, **held_out: Tiles) -> None:
        """Refuse unlabelled images that are validation or test tiles."""
        data = self.recipe.data
        folders = {"validation": data.validation.folder, "test": data.test.folder}
        kept = {
            f"{data.images.format(split=folders[name])}/{id_}" for name, tiles in held_out.items() for id_ in tiles.ids
        }
        # As `unlabelled_windows` names them: source-0-images/train/a.png-000
        windows = () if self.unlabelled is None else self.unlabelled.ids
        images = {id_.split("-", 2)[2].rpartition(".")[0] for id_ in windows}
        if shared := sorted(images & kept):
            raise TerraSynthError(
                "unlabelled images are validation or test tiles",
                path=data.root,
                found=f"{len(shared)} of them, as {shared[0]}",
                expected="images of the training split, or others",
                fix="narrow the pattern in data.unlabelled",
            )

    # Units

    @cached_property
    def generator(self) -> Unit:
        """The generator, trained on the training tiles; one for all seeds."""
        recipe = self.recipe
        inputs: dict[str, Any] = {
            "generator": recipe.generator.model_dump(mode="json"),
            "caption": recipe.data.caption,
            "train": self.train.fingerprint(),
            "unlabelled": None if self.unlabelled is None else self.unlabelled.fingerprint(),
        }
        # Only named where it is asked for: other generators depend on no segmentor.
        confidence = recipe.generator.pseudo_labels
        if confidence is not None:
            inputs["pseudo-labels"] = [teacher.key for teacher in self.teachers]

        def work(folder: Path) -> None:
            unlabelled = self.unlabelled
            if unlabelled is not None and confidence is not None:
                unlabelled = self._read(unlabelled, confidence, folder / "pseudo" / "masks.safetensors")
            outcome = fit_generator(
                self.train,
                recipe.generator,
                recipe.data,
                recipe.sampling,
                folder,
                unlabelled=unlabelled,
                max_minutes=self.clock.left(),
            )
            if not outcome.finished:
                raise OutOfTime

        made = {"products": ("model",), "scratch": ("checkpoints", "cache", "pseudo", "autoencoder/checkpoints")}
        return do(self.out, "generator", inputs, self.clock, work, **made)

    @property
    def teachers(self) -> list[Unit]:
        """The segmentors that read unlabelled images together: those of the teaching arm, of all seeds."""
        return [self.cell(self.teacher, seed) for seed in self.recipe.study.seeds]

    def cell(self, arm: ArmConfig, seed: int, *, times: int = 1) -> Unit:
        """The segmentor of one arm and seed, trained for `times` the arm's steps, and its metrics on test."""
        config = self.settings(arm)
        return self._cell(arm, seed, _with(config, steps=times * config.train.steps), f" x{times}" if times > 1 else "")

    def settings(self, arm: ArmConfig) -> SegmentorConfig:
        """The recipe's segmentor, with the learning rate and steps of the arm where they are searched for.

        Validation alone decides. The candidates are cells of the first seed, so the best of them is not trained twice.
        """
        recipe, search = self.recipe.segmentor, self.recipe.study.search
        if search is None:
            return recipe
        if arm.name not in self._settings:
            candidates = [
                _with(recipe, learning_rate=rate, steps=steps)
                for rate in search.learning_rates
                for steps in search.steps
            ]
            tried = [
                self._cell(
                    arm, self.recipe.study.seeds[0], config, f" {config.train.learning_rate:g} {config.train.steps}"
                )
                for config in candidates
            ]
            best = [max(unit.result["curve"]["miou"]) for unit in tried]
            self._settings[arm.name] = candidates[best.index(max(best))]
        return self._settings[arm.name]

    def _cell(self, arm: ArmConfig, seed: int, config: SegmentorConfig, suffix: str) -> Unit:
        study = self.recipe.study
        painted = None if arm.synthetic == "none" else self.painted(arm.synthetic, seed)
        count = (arm.ratio or study.ratio) * len(self.train)
        judge = self.cell(self.teacher, seed) if arm.filter else None
        inputs = {
            "segmentor": config.model_dump(mode="json"),
            # The held-out tiles first: where there are none, that is said before the others are read.
            "validation": self.held_out["validation"].fingerprint(),
            "test": self.held_out["test"].fingerprint(),
            "train": self.train.fingerprint(),
            "mix": arm.mix,
            "synthetic": None if painted is None else [painted.key, count, study.real_fraction, arm.synthetic_first],
            "filter": None if judge is None else judge.key,
            "seed": seed,
        }

        def work(folder: Path) -> dict[str, Any]:
            schema = self.train.schema
            synthetic = None if painted is None else _tiles(painted).first(count)
            shares = None
            if synthetic is not None and judge is not None:
                labels = synthetic.masks
                synthetic = _filtered(synthetic, self.train, judge, folder / "filtered" / "masks.safetensors")
                shares = dropped(labels, synthetic.masks, schema.names, schema.ignore_index)
            segmentor = Segmentor.build(
                config,
                schema.num_classes,
                seed=seed,
                ignore_index=schema.ignore_index,
                class_names=schema.names,
            ).to(_DEVICE)
            outcome = fit(
                segmentor,
                self.train,
                self.held_out["validation"],
                config,
                folder / "training",
                seed=seed,
                synthetic=synthetic,
                real_fraction=study.real_fraction,
                synthetic_first=arm.synthetic_first,
                mix=arm.mix,
                max_minutes=self.clock.left(),
                label=f"{arm.name}, seed {seed}{suffix}",
            )
            if not outcome.finished:
                raise OutOfTime
            segmentor.save_pretrained(folder / "segmentor")
            confusion = segmentor.evaluate(self.held_out["test"])
            return {
                "metrics": confusion.metrics(schema.names),
                "confusion": confusion.matrix.tolist(),
                "curve": _curve(folder / "training" / "log.jsonl"),
                "filter": shares,
            }

        name = f"{arm.name} seed {seed}{suffix}"
        made = {"products": ("segmentor",), "scratch": ("training/checkpoints", "filtered")}
        return do(self.out / "cells", name, inputs, self.clock, work, **made)

    def _read(self, tiles: Tiles, confidence: float, stored: Path) -> Tiles:
        """Unlabelled tiles under the masks that the teachers read in them, kept in `stored` for the next sittings."""

        def masks() -> Tensor:
            return label([_segmentor(teacher) for teacher in self.teachers], tiles, confidence)

        return replace(tiles, masks=_stored(stored, masks), caption=self.train.caption)

    def layouts(self, seed: int, stored: Path) -> Tiles:
        """The tiles whose masks are painted: the labelled ones or, with `layouts: all`, these and the windows in turn.

        The windows come in an order of the seed's own; what there is less of comes again.
        """
        if self.unlabelled is None or self.recipe.study.layouts == "labelled":
            return self.train
        windows = self._read(self.unlabelled, 0.0, stored)
        order = torch.randperm(len(windows), generator=seeded_generator(seed))
        turns = torch.arange(max(len(windows), len(self.train)))
        pairs = [(self.train, turns % len(self.train)), (windows, order[turns % len(windows)])]
        return Tiles(
            tuple(tiles.ids[rows[turn]] for turn in turns for tiles, rows in pairs),
            torch.stack([tiles.images[rows] for tiles, rows in pairs], 1).flatten(0, 1),
            torch.stack([tiles.masks[rows] for tiles, rows in pairs], 1).flatten(0, 1),
            self.train.schema,
            self.train.caption,
        )

    def painted(self, kind: str, seed: int) -> Unit:
        """The synthetic dataset of one seed, `plain` or `steered` by the teacher of the same seed."""
        steers = self.cell(self.teacher, seed)
        study = self.recipe.study
        count = len(self.train) * max(arm.ratio or study.ratio for arm in study.arms if arm.synthetic == kind)
        steered = kind == "steered"
        inputs: dict[str, Any] = {
            "generator": self.generator.key,
            "sampling": self.recipe.sampling.model_dump(mode="json"),
            "steering": self.recipe.steering.model_dump(mode="json") if steered else None,
            "segmentor": steers.key,
            "count": count,
            "seed": seed,
            "layouts": None,
        }
        if self.unlabelled is not None and study.layouts == "all":
            inputs["layouts"] = [self.unlabelled.fingerprint(), *(teacher.key for teacher in self.teachers)]

        def work(folder: Path) -> dict[str, Any]:
            segmentor = _segmentor(steers)
            layouts = self.layouts(seed, folder / "layouts.safetensors")
            paint(
                load_pipeline(self.generator.folder / "model").to(_DEVICE),
                layouts.masks,
                layouts.ids,
                plan(count, len(layouts), seed),
                self.recipe.sampling,
                folder / "dataset",
                provenance={
                    # Of the settings that the samples depend on: others may change while they are painted.
                    "recipe": digest(inputs),
                    "run_seed": seed,
                    **{name: inputs[name] for name in ("generator", "segmentor", "sampling", "steering")},
                },
                between=self._check_clock,
                steering=steering_for(self.recipe.steering, segmentor.loss) if steered else None,
                label=f"painting {kind}, seed {seed}",
            )
            painted = load_synthetic(folder / "dataset")
            return {"agreement": segmentor.evaluate(painted).mean_iou, "count": len(painted)}

        name = f"{kind} seed {seed}"
        return do(self.out / "synthetic", name, inputs, self.clock, work, products=("dataset/metadata.jsonl",))

    def _check_clock(self) -> None:
        if self.clock.left() == 0:
            raise OutOfTime

    # The whole

    def run(self, command: str = "") -> Path:
        """Do every unit that is not done, write `results.json` and return the path of `report.html`."""
        study = self.recipe.study
        for arm in dict.fromkeys((self.baseline, self.teacher)):
            for seed in study.seeds:
                self.cell(arm, seed)
        kinds = [kind for kind in ("plain", "steered") if kind in {arm.synthetic for arm in study.arms}]
        painted = {kind: [self.painted(kind, seed) for seed in study.seeds] for kind in kinds}
        cells = {arm.name: [self.cell(arm, seed) for seed in study.seeds] for arm in study.arms}
        checked = {"none": (), "baseline": study.arms[:1], "all": study.arms}[study.plateau_check]
        twice = {arm.name: [self.cell(arm, seed, times=2) for seed in study.seeds] for arm in checked}

        timing = {"train the generator": [self.generator]} if kinds else {}
        timing |= {f"paint ({kind})": units for kind, units in painted.items()}
        timing |= {f"train: {name}": units for name, units in cells.items()}
        timing |= {"plateau check": [unit for units in twice.values() for unit in units]} if twice else {}
        seconds = {name: sum(unit.seconds for unit in units) for name, units in timing.items()}
        schema = self.train.schema
        if kinds:
            shown: dict[str, Unit] = {kind: units[0] for kind, units in painted.items()}
            stored = painted[kinds[0]][0].folder / "layouts.safetensors"
            _gallery(self.out, self.layouts(study.seeds[0], stored), study.seeds[0], shown)
        else:
            (self.out / "gallery.json").unlink(missing_ok=True)
        write_json(
            self.out / "results.json",
            {
                "name": self.recipe.name,
                "task": "segmentation",
                "recipe": self.recipe.model_dump(mode="json"),
                "classes": [
                    {"name": name, "color": list(color)}
                    for name, color in zip(schema.names, schema.colors, strict=True)
                ],
                "data": {
                    "train": len(self.train),
                    "validation": len(self.held_out["validation"]),
                    "test": len(self.held_out["test"]),
                    "unlabelled": 0 if self.unlabelled is None or not kinds else len(self.unlabelled),
                    "image_size": self.recipe.data.image_size,
                    "source": "procedural world" if self.recipe.data.kind == "world" else "image and mask folders",
                },
                **_statistics(cells, self.baseline.name),
                "curves": {
                    name: [
                        {"seed": seed, **unit.result["curve"]} for seed, unit in zip(study.seeds, units, strict=True)
                    ]
                    for name, units in cells.items()
                },
                "plateaus": [
                    _plateau(arm.name, cells[arm.name], twice[arm.name], self.settings(arm).train.steps)
                    for arm in checked
                ],
                "settings": [
                    {
                        "arm": arm.name,
                        "learning_rate": self.settings(arm).train.learning_rate,
                        "steps": self.settings(arm).train.steps,
                    }
                    for arm in study.arms
                ],
                "timing": [{"name": name, "seconds": value} for name, value in seconds.items()],
                "total_seconds": sum(seconds.values()),
                "synthetic": {
                    kind: {
                        "count": units[0].result["count"],
                        "agreement": sum(unit.result["agreement"] for unit in units) / len(units),
                    }
                    for kind, units in painted.items()
                },
                "filtered": {arm.name: _mean_shares(cells[arm.name]) for arm in study.arms if arm.filter},
                "environment": {
                    "terrasynth": terrasynth.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                    "device": torch.cuda.get_device_name() if _DEVICE == "cuda" else f"{os.cpu_count()} CPU cores",
                },
                "command": command,
            },
        )
        return write_report(self.out)


def _statistics(cells: Mapping[str, list[Unit]], baseline: str) -> dict[str, Any]:
    """Mean and interval of every metric of every arm, and every arm's paired difference to the baseline."""
    values = {
        arm: {name: [unit.result["metrics"][name] for unit in units] for name in units[0].result["metrics"]}
        for arm, units in cells.items()
    }
    return {
        "arms": [
            {"name": arm, "metrics": {name: summarise(v).to_dict() for name, v in metrics.items()}}
            for arm, metrics in values.items()
        ],
        "comparisons": [
            {"arm": arm, "baseline": baseline, "metric": name, **compare(v, values[baseline][name]).to_dict()}
            for arm, metrics in values.items()
            if arm != baseline
            for name, v in metrics.items()
        ],
    }


def _plateau(arm: str, once: list[Unit], twice: list[Unit], steps: int) -> dict[str, Any]:
    """How much twice the steps move an arm."""
    before, after = ([unit.result["metrics"]["miou"] for unit in units] for units in (once, twice))
    return {"arm": arm, "steps": steps, "twice": 2 * steps, **compare(after, before).to_dict()}


def _with(config: SegmentorConfig, **train: Any) -> SegmentorConfig:
    """The settings with others for their training."""
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def _curve(log: Path) -> dict[str, list[float]]:
    """Validation mIoU against step from the log of a training."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    points = [line for line in lines if "miou" in line]
    return {"steps": [line["step"] for line in points], "miou": [line["miou"] for line in points]}


def _tiles(painted: Unit) -> Tiles:
    """The dataset of a finished unit."""
    try:
        return load_synthetic(painted.folder / "dataset")
    except TerraSynthError as error:
        again = f"delete {painted.folder / 'unit.json'} and run the same command: what is missing is painted again"
        raise TerraSynthError(error.problem, path=error.path, found=error.found, fix=again) from error


def _filtered(painted: Tiles, real: Tiles, judge: Unit, stored: Path) -> Tiles:
    """The painted tiles without the labels that the judge, a teacher, finds implausible."""

    def masks() -> Tensor:
        segmentor, ignore = _segmentor(judge), real.schema.ignore_index
        means = class_mean_losses(segmentor.pixel_losses(real), real.masks, real.schema.num_classes, ignore)
        return filter_pixels(painted.masks, segmentor.pixel_losses(painted), means, ignore_index=ignore)

    return replace(painted, masks=_stored(stored, masks))


def _segmentor(cell: Unit) -> Segmentor:
    """The segmentor of a finished cell."""
    return Segmentor.from_pretrained(cell.folder / "segmentor").to(_DEVICE)


def _stored(path: Path, masks: Callable[[], Tensor]) -> Tensor:
    """The masks that finished segmentors make, kept in a file for the next sittings.

    Where the rounding is another, a pixel near the limit may fall on its other side, and the work would no longer be
    the one that began.
    """
    if not path.is_file():
        made = masks()
        with atomic_write(path) as partial:
            save_file({"masks": made}, partial)
    return load_file(path)["masks"]


def _mean_shares(units: list[Unit]) -> dict[str, float | None]:
    """What the filter dropped, all in all and of every class, on average over the seeds."""
    # A class may be absent from the paintings of one seed.
    names = dict.fromkeys(name for unit in units for name in unit.result["filter"])
    return {name: summarise([unit.result["filter"].get(name) for unit in units]).mean for name in names}


def _gallery(out: Path, tiles: Tiles, seed: int, painted: Mapping[str, Unit], count: int = 6) -> None:
    """Masks, the real tiles under them, and their paintings with and without steering, for report and README."""
    from PIL import Image

    sets = {kind: _tiles(unit) for kind, unit in painted.items()}
    total = len(next(iter(sets.values())))
    shown = sorted({round(i * (total - 1) / (count - 1)) for i in range(count)})
    jobs = [plan(total, len(tiles), seed)[index] for index in shown]
    views = [view(tiles.images[job.source], tiles.masks[job.source], job.view) for job in jobs]
    masks = torch.stack([mask for _, mask in views])
    pictures = {"real": torch.stack([image for image, _ in views])}
    pictures |= {kind: dataset.images[shown] for kind, dataset in sets.items()}
    zoom = max(1, 128 // masks.shape[-1])
    sheet = contact_sheet(pictures, masks, tiles.schema, columns=count, zoom=zoom, legend=True)
    with atomic_write(out / "paintings.png") as partial:
        sheet.save(partial)
    entries = []
    for row, index in enumerate(shown):
        entry = {"caption": tiles.schema.caption(masks[row])}
        colors = {"mask": tiles.schema.to_color(masks[row])}
        for kind, pixels in (colors | {k: p[row].movedim(0, -1).numpy() for k, p in pictures.items()}).items():
            path = out / "gallery" / f"{index:06d}-{kind}.png"
            with atomic_write(path) as partial:
                Image.fromarray(pixels).save(partial)
            entry[kind] = path.relative_to(out).as_posix()
        entries.append(entry)
    write_json(out / "gallery.json", entries)
