"""The study: does synthetic data help? Arms x seeds, each a unit of work that is never done twice."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import terrasynth
from terrasynth.curation.audit import Audit, Layouts, audit, audit_splits
from terrasynth.curation.filter import class_mean_losses, dropped, filter_pixels
from terrasynth.curation.images import from_tiles, read_painted
from terrasynth.curation.score import curated_tiles
from terrasynth.data.folder import Tiles, check_splits, join, load_synthetic, load_tiles, unlabelled_windows
from terrasynth.data.prepared import ground_groups, imagery
from terrasynth.data.write import read_manifest
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_write, digest, write_json
from terrasynth.recipe import HARMLESS, KINDS, ArmConfig, CurationConfig, Recipe, SegmentorConfig
from terrasynth.sampling.flow import seeded_generator
from terrasynth.study.gallery import write_gallery
from terrasynth.study.report import write_report
from terrasynth.study.statistics import compare, summarise
from terrasynth.systems.fit import fit_generator
from terrasynth.systems.generate import load_pipeline, model_digest, paint, plan, steering_for
from terrasynth.systems.pairs import fit_pairs
from terrasynth.systems.refine import check_refiner, fit_refiner
from terrasynth.systems.todsynth import packaged_or
from terrasynth.tasks.folds import out_of_fold
from terrasynth.tasks.refiner_scores import score_refiner
from terrasynth.tasks.segmentation import Segmentor, adapt, batch_norms, fit, label
from terrasynth.training.units import Busy, Clock, OutOfTime, Unit, do, store_tensors, stored_tensors

__all__ = ["Study"]

_MASKS = "masks.safetensors"
_AUDIT = "audit.png"
#: To be raised when audits tell otherwise: these are made again, which takes seconds, and no training is.
_AUDITED = 3
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Study:
    """A recipe's units of work under one folder; whatever is finished there is not computed again.

    Test tiles are only read by the final evaluation of a finished segmentor, and by the audit, which nothing reads: no
    training, selection or steering sees them.

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
        self.teacher = next((arm for arm in recipe.study.arms if arm.name == recipe.study.teacher), self.baseline)
        if recipe.generator.base is not None:
            packaged_or(recipe.generator.base)  # a mistyped name shows before anything is trained
        self.base = base
        self._settings: dict[str, SegmentorConfig] = {}
        self._used: dict[Path, tuple[str, Unit]] = {}

    # Splits are read when they are first needed: a generator that is told no pseudo-labels needs no held-out tiles,
    # and no unit but the scores and the audits needs the test tiles.

    @cached_property
    def train(self) -> Tiles:
        """The labelled training tiles."""
        return load_tiles(self.recipe.data, "train", base=self.base)

    @cached_property
    def unlabelled(self) -> Tiles | None:
        """The unlabelled images that the generator may see too, if there are any."""
        if self.recipe.data.kind != "folder":
            return None
        return unlabelled_windows(self.recipe.data, self.train.schema)

    @cached_property
    def validation(self) -> Tiles:
        """The validation tiles, after a check that none is a training tile or an unlabelled image."""
        tiles: Tiles = load_tiles(self.recipe.data, "validation", base=self.base)
        check_splits(train=self.train, validation=tiles)
        self._check_unlabelled(validation=tiles)
        return tiles

    @cached_property
    def test(self) -> Tiles:
        """The test tiles, after a check that none is in another split."""
        others = {"train": self.train, "validation": self.validation}
        tiles: Tiles = load_tiles(self.recipe.data, "test", base=self.base)
        check_splits(**others, test=tiles)
        self._check_unlabelled(test=tiles)
        return tiles

    def _check_unlabelled(self, **held_out: Tiles) -> None:
        # Training tiles may be among the unlabelled images.
        if self.unlabelled is not None:
            check_splits(unlabelled=self.unlabelled, **held_out)

    # Units

    def _do(
        self, group: str, place: str, name: str, inputs: Mapping[str, Any], work: Callable[[Path], Any], **made: Any
    ) -> Unit:
        """A unit under `out/place`, whose time is counted under `group`."""
        unit = do(self.out / place, name, inputs, self.clock, work, **made)
        self._used[unit.folder] = (group, unit)
        return unit

    @cached_property
    def generator(self) -> Unit:
        """The generator, trained on the training tiles; one for all seeds."""
        recipe = self.recipe
        inputs: dict[str, Any] = {
            "generator": recipe.generator.identity(),
            "base": None if recipe.generator.base is None else model_digest(recipe.generator.base),
            "caption": recipe.data.caption,
            "train": self.train.fingerprint(),
            "unlabelled": None if self.unlabelled is None else self.unlabelled.fingerprint(),
        }
        # Only named where it is asked for: other generators depend on no segmentor.
        confidence = recipe.generator.pseudo_labels
        if confidence is not None:
            inputs["pseudo-labels"] = self.reading(confidence).key

        def work(folder: Path) -> None:
            outcome = fit_generator(
                self.train,
                recipe.generator,
                recipe.data,
                recipe.sampling,
                folder,
                unlabelled=self.unlabelled if confidence is None else self.read(confidence),
                max_minutes=self.clock.left(),
            )
            if not outcome.finished:
                raise OutOfTime

        made = {"products": ("model",), "scratch": ("checkpoints", "cache", "autoencoder/checkpoints")}
        return self._do("train the generator", "", "generator", inputs, work, together=True, **made)

    @cached_property
    def refiner(self) -> Unit:
        """What sharpens class maps, trained on what segmentors read in tiles that they did not see."""
        config = self.recipe.refiner
        rough = out_of_fold(
            self.train,
            self.validation,
            self.recipe.segmentor,
            self.out / "folds",
            folds=config.rough.folds,
            seed=config.seed,
            clock=self.clock,
            groups=ground_groups(self.recipe.data, self.train.ids, self.recipe.data.image_size, config.rough.folds),
            # Before hours of segmentors that would be for nothing; where they are there, the training itself refuses.
            before=partial(check_refiner, self.train, config),
        )
        inputs = {
            "refiner": config.identity(),
            "base": None if config.base is None else model_digest(config.base),
            "train": self.train.fingerprint(),
            "rough": [fold.key for fold in rough.units],
        }

        read = rough.validation
        score = None if read is None else partial(score_refiner, tiles=self.validation, rough=read)

        def work(folder: Path) -> None:
            outcome = fit_refiner(
                self.train,
                rough.classes,
                config,
                folder,
                score=score,
                about=imagery(self.recipe.data),
                max_minutes=self.clock.left(),
            )
            if not outcome.finished:
                raise OutOfTime

        made = {"products": ("model",), "scratch": ("checkpoints",)}
        return self._do("train the refiner", "", "refiner", inputs, work, together=True, **made)

    @cached_property
    def pairs(self) -> Unit:
        """What paints images and masks together, trained on the training tiles."""
        config = self.recipe.pairs
        inputs = {
            "pairs": config.identity(),
            "base": None if config.base is None else model_digest(config.base),
            "train": self.train.fingerprint(),
        }

        def work(folder: Path) -> None:
            if not fit_pairs(self.train, config, folder, max_minutes=self.clock.left()).finished:
                raise OutOfTime

        made = {"products": ("model",), "scratch": ("checkpoints",)}
        return self._do("train what paints pairs", "", "pairs", inputs, work, together=True, **made)

    @property
    def teachers(self) -> list[Unit]:
        """The segmentors that read unlabelled images together: those of the teaching arm, of all seeds."""
        return [self.cell(self.teacher, seed) for seed in self.recipe.study.seeds]

    def reading(self, confidence: float) -> Unit:
        """What the teachers read in the unlabelled images together: one mask a window.

        Pixels that they read with less than this probability are left unlabelled.
        """
        windows, teachers = self._windows, self.teachers
        inputs = {
            "windows": windows.fingerprint(),
            "teachers": [teacher.key for teacher in teachers],
            "confidence": confidence,
        }

        def work(folder: Path) -> None:
            store_tensors(
                folder / _MASKS, masks=label([_segmentor(teacher) for teacher in teachers], windows, confidence)
            )

        group, name = "read unlabelled images", f"at least {confidence:g}"
        return self._do(group, "readings", name, inputs, work, products=(_MASKS,))

    def read(self, confidence: float) -> Tiles:
        """The unlabelled images under what the teachers read in them."""
        masks = stored_tensors(self.reading(confidence).folder / _MASKS)["masks"]
        return replace(self._windows, masks=masks, caption=self.train.caption)

    @property
    def _windows(self) -> Tiles:
        assert self.unlabelled is not None, "the recipe was checked"
        return self.unlabelled

    def cell(self, arm: ArmConfig, seed: int, *, times: int = 1) -> Unit:
        """The segmentor of one arm and seed, trained for `times` the arm's steps."""
        config = self.settings(arm)
        group = f"train: {arm.name}" if times == 1 else "plateau check"
        return self._cell(arm, seed, _with(config, steps=times * config.train.steps), group)

    def metrics(self, arm: ArmConfig, seed: int, *, times: int = 1) -> dict[str, float]:
        """The scores of a cell's segmentor on the test tiles."""
        cell = self.cell(arm, seed, times=times)

        def work(folder: Path) -> dict[str, Any]:
            confusion = _segmentor(cell).evaluate(self.test)
            return {"metrics": confusion.metrics(self.test.schema.names), "confusion": confusion.matrix.tolist()}

        inputs = {"segmentor": cell.key, "test": self.test.fingerprint()}
        name = cell.folder.name.rpartition("-")[0]
        metrics: dict[str, float] = self._do("test", "scores", name, inputs, work).result["metrics"]
        return metrics

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
            first = self.recipe.study.seeds[0]
            tried = [self._cell(arm, first, config, "search") for config in candidates]
            best = [max(unit.result["curve"]["miou"]) for unit in tried]
            self._settings[arm.name] = candidates[best.index(max(best))]
        return self._settings[arm.name]

    def _cell(self, arm: ArmConfig, seed: int, config: SegmentorConfig, group: str) -> Unit:
        if arm.adapt:
            return self._adapted(arm, seed, config, group)
        study = self.recipe.study
        painted = None if arm.synthetic == "none" else self.painted(arm.kind, seed)
        count = (arm.ratio or study.ratio) * len(self.train)
        judge = self.cell(self.teacher, seed) if arm.filter or arm.curate else None
        confidence = arm.pseudo_labels
        inputs: dict[str, Any] = {
            "segmentor": config.model_dump(mode="json", exclude={"train": HARMLESS}),
            # First: where there are none, that is said before others are read.
            "validation": self.validation.fingerprint(),
            "train": self.train.fingerprint(),
            "mix": arm.mix,
            "synthetic": None if painted is None else [painted.key, count, study.real_fraction, arm.synthetic_first],
            "filter": None if judge is None else judge.key,
            "seed": seed,
        }
        if arm.curate is not None:  # only named where it is asked for, as below
            inputs["curate"] = arm.curate.model_dump(mode="json")
        if confidence is not None:
            inputs["pseudo-labels"] = [self.reading(confidence).key, study.real_fraction, arm.synthetic_first]

        suffix = self._suffix(config)

        def work(folder: Path) -> dict[str, Any]:
            schema = self.train.schema
            synthetic = None if painted is None else _tiles(painted).first(count)
            shares = None
            used: dict[str, float] = {}
            if synthetic is not None and painted is not None and judge is not None:
                before, stored = synthetic, folder / "filtered" / _MASKS
                if arm.curate is None:
                    synthetic = _filtered(synthetic, self.train, judge, stored)
                else:
                    synthetic = _curated(synthetic, painted, self.train, judge, arm.curate, seed, stored)
                    used = {"used": len(synthetic) / len(before)}
                shares = dropped(before.masks, synthetic.masks, schema.names, schema.ignore_index)
            added = [] if synthetic is None else [synthetic]
            if confidence is not None:
                added.append(self.read(confidence))
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
                self.validation,
                config,
                folder / "training",
                seed=seed,
                synthetic=join(added) if added else None,
                real_fraction=study.real_fraction,
                synthetic_first=arm.synthetic_first,
                mix=arm.mix,
                max_minutes=self.clock.left(),
                label=f"{arm.name}, seed {seed}{suffix}",
            )
            if not outcome.finished:
                raise OutOfTime
            segmentor.save_pretrained(folder / "segmentor")
            return {"curve": _curve(folder / "training" / "log.jsonl"), "filter": shares, **used}

        name = f"{arm.name} seed {seed}{suffix}"
        made = {"products": ("segmentor",), "scratch": ("training/checkpoints", "filtered")}
        return self._do(group, "cells", name, inputs, work, **made)

    def _adapted(self, arm: ArmConfig, seed: int, config: SegmentorConfig, group: str) -> Unit:
        """The segmentor of the same arm without `adapt`, adapted: it is trained once for both."""
        self._adaptable  # noqa: B018 (before anything is trained)
        plain = arm.model_copy(update={"adapt": False})
        twins = (other for other in self.recipe.study.arms if other.model_copy(update={"name": arm.name}) == plain)
        trained = self._cell(next(twins, plain), seed, config, group)

        def work(folder: Path) -> Any:
            segmentor = _segmentor(trained)
            adapt(segmentor, self._windows.images)
            segmentor.save_pretrained(folder / "segmentor")
            return trained.result

        inputs = {"segmentor": trained.key, "adapt": self._windows.fingerprint()}
        name = f"{arm.name} seed {seed}{self._suffix(config)}"
        return self._do("adapt", "cells", name, inputs, work, products=("segmentor",))

    @cached_property
    def _adaptable(self) -> None:
        batch_norms(Segmentor.build(self.recipe.segmentor, self.train.schema.num_classes))

    def _suffix(self, config: SegmentorConfig) -> str:
        """How the name of a cell tells settings that are not the recipe's."""
        differs = config.train.learning_rate != self.recipe.segmentor.train.learning_rate
        suffix = f" at {config.train.learning_rate:g}" if differs else ""
        if config.train.steps != self.recipe.segmentor.train.steps:
            suffix += f" {config.train.steps} steps"
        return suffix

    def layouts(self, seed: int) -> Tiles:
        """The tiles whose masks are painted: the labelled ones or, with `layouts: all`, these and the windows in turn.

        The windows come in an order of the seed's own; what there is less of comes again.
        """
        if self.recipe.study.layouts == "labelled":
            return self.train
        windows = self.read(0.0)
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
        """The synthetic dataset of one seed and kind: `plain`, or `steered` by the teacher of the same seed.

        The kinds that end in `-like` have references.

        How many are painted is not among its inputs: when more are asked for, the dataset is continued.
        """
        study, count = self.recipe.study, self.count(kind)
        steers = self.cell(self.teacher, seed) if kind.startswith("steered") else None
        references = self._windows if kind.endswith("-like") else None
        inputs: dict[str, Any] = {
            "generator": self.generator.key,
            "sampling": self.recipe.sampling.model_dump(
                mode="json", exclude=set() if kind.endswith("-like") else {"reference_scale"}
            ),
            "steering": None if steers is None else self.recipe.steering.model_dump(mode="json"),
            "segmentor": None if steers is None else steers.key,
            "seed": seed,
            "layouts": self.reading(0.0).key if study.layouts == "all" else None,
        }
        if references is not None:  # only named where there are any
            inputs["references"] = references.fingerprint()

        def work(folder: Path) -> None:
            layouts = self.layouts(seed)
            with _remade(self.generator):
                pipeline = load_pipeline(self.generator.folder / "model").place(_DEVICE, self.recipe.sampling.precision)
            paint(
                pipeline,
                layouts.masks,
                layouts.ids,
                plan(count, len(layouts), seed, 0 if references is None else len(references)),
                self.recipe.sampling,
                folder / "dataset",
                provenance={
                    # Of the settings that the samples depend on: others may change while they are painted.
                    "recipe": digest(inputs),
                    "run_seed": seed,
                    **{name: inputs[name] for name in ("generator", "segmentor", "sampling", "steering")},
                },
                between=self._check_clock,
                references=references,
                steering=None if steers is None else steering_for(self.recipe.steering, _segmentor(steers).loss),
                label=f"painting {kind}, seed {seed}",
            )

        products = ("dataset/metadata.jsonl", f"dataset/images/{count - 1:06d}.png")
        return self._do(f"paint ({kind})", "synthetic", f"{kind} seed {seed}", inputs, work, products=products)

    def count(self, kind: str) -> int:
        """How many tiles are painted per seed: as many as the arm that wants most."""
        study = self.recipe.study
        return len(self.train) * max(arm.ratio or study.ratio for arm in study.arms if arm.kind == kind)

    def agreement(self, kind: str, seed: int) -> float:
        """The mIoU at which the teacher of a seed finds the masks in what was painted under them."""
        painted, teacher, count = self.painted(kind, seed), self.cell(self.teacher, seed), self.count(kind)

        def work(folder: Path) -> float:
            return _segmentor(teacher).evaluate(_tiles(painted).first(count)).mean_iou

        inputs = {"painted": painted.key, "count": count, "segmentor": teacher.key}
        agreement: float = self._do("test", "scores", f"agreement {kind} seed {seed}", inputs, work).result
        return agreement

    @property
    def _learned(self) -> dict[str, Tiles]:
        """All real tiles that something is trained on."""
        used = any(arm.adds_tiles or arm.adapt for arm in self.recipe.study.arms)
        return {"train": self.train} | ({} if self.unlabelled is None or not used else {"unlabelled": self.unlabelled})

    def audited_splits(self) -> Unit:
        """Copies of validation and test tiles in what is trained on, that were scaled or compressed again.

        Equal ones are refused before anything is trained; likeness is no proof, so these are only reported. Nothing
        depends on this unit.
        """
        learned, held_out = self._learned, {"validation": self.validation, "test": self.test}

        def work(folder: Path) -> dict[str, Any]:
            found = audit_splits(*([from_tiles(*split) for split in side.items()] for side in (learned, held_out)))
            return _audited(found, folder)

        inputs: dict[str, Any] = {
            "audit": _AUDITED,
            "learned": {name: tiles.fingerprint() for name, tiles in learned.items()},
            "held out": {name: tiles.fingerprint() for name, tiles in held_out.items()},
        }
        return self._do("audit", "audits", "splits", inputs, work, products=(_AUDIT, "audit.json"))

    def audited(self, kind: str, seed: int) -> Unit:
        """Copies in what was painted under a seed, of training tiles, of references, and of what must stay unseen.

        Nothing depends on this unit: it reads validation and test tiles only to report.
        """
        painted, count = self.painted(kind, seed), self.count(kind)
        splits = {"validation": self.validation, "test": self.test}
        learned = self._learned

        def work(folder: Path) -> dict[str, Any]:
            with _remade(painted):
                dataset = read_painted(painted.folder / "dataset", count, name=f"{kind}, seed {seed}")
            found = audit(
                dataset,
                [from_tiles(name, tiles) for name, tiles in learned.items()],
                [from_tiles(name, tiles) for name, tiles in splits.items()],
                [Layouts(f"masks of {name}", tiles.ids, tiles.masks) for name, tiles in splits.items()],
            )
            return _audited(found, folder)

        inputs = {
            "painted": painted.key,
            "count": count,
            "audit": _AUDITED,
            **{name: tiles.fingerprint() for name, tiles in {**learned, **splits}.items()},
        }
        return self._do("audit", "audits", f"{kind} seed {seed}", inputs, work, products=(_AUDIT, "audit.json"))

    def _sheet(self, audit: Unit) -> str:
        return (audit.folder / _AUDIT).relative_to(self.out).as_posix()

    def _check_clock(self) -> None:
        if self.clock.left() == 0:
            raise OutOfTime

    # The whole

    def work(self) -> None:
        """Do every unit that is not done. What another process is at is left to it: several share the work."""
        study = self.recipe.study
        self.test  # noqa: B018 (before anything is trained: no tile is in two splits)
        tasks: list[Callable[[], object]] = [
            partial(self.cell, arm, seed)
            for arm in dict.fromkeys((study.arms[0], self.teacher))
            for seed in study.seeds
        ]
        if self._kinds:
            tasks.append(lambda: self.generator)
        tasks += [partial(self.painted, kind, seed) for kind in self._kinds for seed in study.seeds]
        tasks += [partial(self.metrics, arm, seed) for arm in study.arms for seed in study.seeds]
        tasks += [partial(self.metrics, arm, seed, times=2) for arm in self._checked for seed in study.seeds]
        tasks += [partial(self.agreement, kind, seed) for kind in self._kinds for seed in study.seeds]
        tasks += [partial(self.audited, kind, seed) for kind in self._kinds for seed in study.seeds]
        tasks.append(self.audited_splits)
        while tasks:
            left: list[tuple[Callable[[], object], Busy]] = []
            for task in tasks:
                try:
                    task()
                except Busy as busy:
                    left.append((task, busy))
            while len(left) == len(tasks) and not any(busy.over() for _, busy in left):
                self._check_clock()
                time.sleep(0.5)
            tasks = [task for task, _ in left]

    @property
    def _kinds(self) -> list[str]:
        asked = {arm.kind for arm in self.recipe.study.arms}
        return [kind for kind in KINDS if kind in asked]

    @property
    def _checked(self) -> tuple[ArmConfig, ...]:
        """The arms that are trained for twice the steps as well."""
        study = self.recipe.study
        return {"none": (), "baseline": study.arms[:1], "all": study.arms}[study.plateau_check]

    def run(self, command: str = "") -> Path:
        """Do every unit that is not done, write `results.json` and return the path of `report.html`."""
        self.work()
        study, schema, kinds = self.recipe.study, self.train.schema, self._kinds
        tiles = {"train": self.train, "validation": self.validation, "test": self.test}
        painted = {kind: [self.painted(kind, seed) for seed in study.seeds] for kind in kinds}
        cells = {arm.name: [self.cell(arm, seed) for seed in study.seeds] for arm in study.arms}
        metrics = {arm.name: [self.metrics(arm, seed) for seed in study.seeds] for arm in study.arms}
        twice = {arm.name: [self.metrics(arm, seed, times=2) for seed in study.seeds] for arm in self._checked}
        agreement = {kind: [self.agreement(kind, seed) for seed in study.seeds] for kind in kinds}
        audits = {kind: [self.audited(kind, seed) for seed in study.seeds] for kind in kinds}
        of_splits = self.audited_splits()
        seconds: dict[str, float] = {}
        for group, unit in self._used.values():
            seconds[group] = seconds.get(group, 0.0) + unit.seconds
        if kinds:
            shown: dict[str, Tiles] = {
                kind: _tiles(units[0]).first(self.count(kind)) for kind, units in painted.items()
            }
            write_gallery(
                self.out, self.train, self.layouts(study.seeds[0]), study.seeds[0], shown, references=self.unlabelled
            )
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
                    **{name: len(split) for name, split in tiles.items()},
                    "unlabelled": len(self._learned.get("unlabelled", ())),
                    "left_out": sum(split.left_out for split in tiles.values()),
                    "image_size": self.recipe.data.image_size,
                    "source": "procedural world" if self.recipe.data.kind == "world" else "image and mask folders",
                },
                **_statistics(metrics, study.arms[0].name),
                "curves": {
                    name: [
                        {"seed": seed, **unit.result["curve"]} for seed, unit in zip(study.seeds, units, strict=True)
                    ]
                    for name, units in cells.items()
                },
                "plateaus": [
                    _plateau(arm.name, metrics[arm.name], twice[arm.name], self.settings(arm).train.steps)
                    for arm in self._checked
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
                    kind: {"count": self.count(kind), "agreement": sum(values) / len(values)}
                    for kind, values in agreement.items()
                },
                "audit": [
                    {"kind": kind, "seed": seed, "sheet": self._sheet(unit)} | unit.result
                    for kind, units in audits.items()
                    for seed, unit in zip(study.seeds, units, strict=True)
                ],
                "audit_of_splits": {"sheet": self._sheet(of_splits)} | of_splits.result,
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
        return write_report(self.out)


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


def _plateau(arm: str, once: list[dict[str, float]], twice: list[dict[str, float]], steps: int) -> dict[str, Any]:
    """How much twice the steps move an arm."""
    before, after = ([metrics["miou"] for metrics in seeds] for seeds in (once, twice))
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
    with _remade(painted):
        return load_synthetic(painted.folder / "dataset")


def _filtered(painted: Tiles, real: Tiles, judge: Unit, stored: Path) -> Tiles:
    """The painted tiles without the labels that the judge, a teacher, finds implausible."""

    def masks() -> Tensor:
        segmentor, ignore = _segmentor(judge), real.schema.ignore_index
        means = class_mean_losses(segmentor.pixel_losses(real), real.masks, real.schema.num_classes, ignore)
        return filter_pixels(painted.masks, segmentor.pixel_losses(painted), means, ignore_index=ignore)

    # Kept for the next sittings: where the rounding is another, a pixel near the limit may fall on its other side, and
    # the work would no longer be the one that began.
    if not stored.is_file():
        store_tensors(stored, masks=masks())
    return replace(painted, masks=stored_tensors(stored)["masks"])


def _curated(
    tiles: Tiles, painted: Unit, real: Tiles, judge: Unit, config: CurationConfig, seed: int, stored: Path
) -> Tiles:
    """What the rules leave of painted tiles, by what the judge, a teacher, finds in them, with their weights."""
    if not stored.is_file():  # kept as those of `_filtered`
        rows = islice(read_manifest(painted.folder / "dataset")[1], len(tiles))
        sources = [row["source_mask"] for row in rows]
        used, masks, weights = curated_tiles(tiles, sources, real, _segmentor(judge), config, seed)
        store_tensors(stored, masks=masks, used=used, weights=weights)
    kept = stored_tensors(stored)
    ids = tuple(tiles.ids[index] for index in kept["used"])
    return Tiles(ids, tiles.images[kept["used"]], kept["masks"], tiles.schema, weights=tuple(kept["weights"].tolist()))


def _audited(found: Audit, folder: Path) -> dict[str, Any]:
    """What was found, as files and, but for the nearest of every single image, as the result of a unit."""
    write_json(folder / "audit.json", found.report)
    with atomic_write(folder / _AUDIT) as partial:
        found.sheet.save(partial)
    return {name: value for name, value in found.report.items() if name != "images"}


def _segmentor(cell: Unit) -> Segmentor:
    """The segmentor of a finished cell."""
    with _remade(cell):
        return Segmentor.from_pretrained(cell.folder / "segmentor").to(_DEVICE)


@contextmanager
def _remade(unit: Unit) -> Iterator[None]:
    """Where a product of a unit is damaged, say how to have it made again."""
    try:
        yield
    except TerraSynthError as error:
        again = f"delete {unit.folder / 'unit.json'} and what is damaged, then run the same command: it is made again"
        raise TerraSynthError(error.problem, path=error.path, found=error.found, fix=again) from error


def _mean_shares(units: list[Unit]) -> dict[str, float | None]:
    """What the filter dropped, all in all and of every class, on average over the seeds."""
    # A class may be absent from the paintings of one seed.
    names = dict.fromkeys(name for unit in units for name in unit.result["filter"])
    return {name: summarise([unit.result["filter"].get(name) for unit in units]).mean for name in names}
