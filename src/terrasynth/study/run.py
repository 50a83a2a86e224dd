"""The study: does synthetic data help? Arms x seeds, each a unit of work that is never done twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from terrasynth.curation.audit import Layouts, audit, audit_splits
from terrasynth.curation.filter import dropped
from terrasynth.curation.images import from_tiles, read_painted
from terrasynth.data.folder import Tiles, check_splits, join, load_tiles, unlabelled_windows
from terrasynth.data.prepared import ground_groups, imagery
from terrasynth.packaged import packaged_or
from terrasynth.recipe import HARMLESS, KINDS, ArmConfig, Recipe, SegmentorConfig
from terrasynth.study import paintings
from terrasynth.study.products import (
    AUDIT,
    chosen_tiles,
    filtered_tiles,
    painted_tiles,
    remade,
    segmentor_of,
    stored_audit,
    validation_curve,
)
from terrasynth.study.quality import histogram_distance, label_histogram
from terrasynth.study.report import write_report
from terrasynth.study.results import write_results
from terrasynth.systems.fit import fit_generator
from terrasynth.systems.generate import model_digest
from terrasynth.systems.pairs import UPSCALER, check_pairs, fit_pairs
from terrasynth.systems.refine import check_refiner, fit_refiner
from terrasynth.systems.satsynth import check_shares
from terrasynth.tasks.folds import out_of_fold
from terrasynth.tasks.refiner_scores import score_refiner
from terrasynth.tasks.segmentation import Segmentor, adapt, batch_norms, fit, label
from terrasynth.training.units import Busy, Clock, OutOfTime, Unit, do, store_tensors, stored_tensors

__all__ = ["Study", "Task"]

_MASKS = "masks.safetensors"
#: To be raised when audits tell otherwise: these are made again, which takes seconds, and no training is.
_AUDITED = 3
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Task(NamedTuple):
    """Something to be done under a seed, or once for all: a unit of work, with all that it needs."""

    group: str
    seed: int | None
    work: Callable[[], object]


class Study:
    """A recipe's units of work under one folder; whatever is finished there is not computed again.

    Test tiles are only read by the final evaluation of a finished segmentor, and by the audit, which nothing reads: no
    training, selection or steering sees them.

    Args:
        recipe: everything the results depend on.
        base: folder that relative paths in the recipe start from.
        out: where the units, `results.json` and `report.html` go.
        max_minutes: stop at a checkpoint after about this long, with `OutOfTime`; the same call goes on from there.
        others: names of the arms that the recipe has beside these, for the report.

    Raises:
        TerraSynthError: bad data, tiles shared between splits, or an impossible recipe.
    """

    def __init__(
        self, recipe: Recipe, base: Path, out: Path, *, max_minutes: float | None = None, others: Sequence[str] = ()
    ) -> None:
        self.recipe = recipe
        self.others = others
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

    def unit(
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
        return self.unit("train the generator", "", "generator", inputs, work, together=True, **made)

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
        return self.unit("train the refiner", "", "refiner", inputs, work, together=True, **made)

    @cached_property
    def pairs(self) -> Unit:
        """What paints images and masks together, trained on the training tiles."""
        config = self.recipe.pairs
        check_shares(config.sampling.shares, self.train.schema)  # before hours of training
        inputs = {
            "pairs": config.identity(),
            "base": None if config.base is None else model_digest(config.base),
            "train": self.train.fingerprint(),
        }

        def work(folder: Path) -> None:
            if not fit_pairs(self.train, config, folder, max_minutes=self.clock.left()).finished:
                raise OutOfTime

        made = {"products": ("model",), "scratch": ("checkpoints", f"{UPSCALER}/checkpoints")}
        return self.unit("train what paints pairs", "", "pairs", inputs, work, together=True, **made)

    @property
    def teachers(self) -> list[Unit]:
        """The segmentors that read unlabelled images together: those of the teaching arm, of all seeds."""
        return [self.cell(self.teacher, seed) for seed in self.recipe.study.seeds]

    def reading(self, confidence: float) -> Unit:
        """What the teachers read in the unlabelled images together: one mask a window.

        Pixels that they read with less than this probability are left unlabelled.
        """
        windows, teachers = self.windows, self.teachers
        inputs = {
            "windows": windows.fingerprint(),
            "teachers": [teacher.key for teacher in teachers],
            "confidence": confidence,
        }

        def work(folder: Path) -> None:
            store_tensors(
                folder / _MASKS, masks=label([segmentor_of(teacher) for teacher in teachers], windows, confidence)
            )

        group, name = "read unlabelled images", f"at least {confidence:g}"
        return self.unit(group, "readings", name, inputs, work, products=(_MASKS,))

    def read(self, confidence: float) -> Tiles:
        """The unlabelled images under what the teachers read in them."""
        masks = stored_tensors(self.reading(confidence).folder / _MASKS)["masks"]
        return replace(self.windows, masks=masks, caption=self.train.caption)

    @property
    def windows(self) -> Tiles:
        """The unlabelled images of a recipe that needs some."""
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
            confusion = segmentor_of(cell).evaluate(self.test)
            return {"metrics": confusion.metrics(self.test.schema.names), "confusion": confusion.matrix.tolist()}

        inputs = {"segmentor": cell.key, "test": self.test.fingerprint()}
        name = cell.folder.name.rpartition("-")[0]
        metrics: dict[str, float] = self.unit("test", "scores", name, inputs, work).result["metrics"]
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
            synthetic = None if painted is None else painted_tiles(painted).first(count)
            shares = None
            used: dict[str, float] = {}
            if synthetic is not None and painted is not None and judge is not None:
                before, stored = synthetic, folder / "filtered" / _MASKS
                if arm.curate is None:
                    synthetic = filtered_tiles(synthetic, self.train, judge, stored)
                else:
                    synthetic = chosen_tiles(synthetic, painted, self.train, judge, arm.curate, seed, stored)
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
            return {"curve": validation_curve(folder / "training" / "log.jsonl"), "filter": shares, **used}

        name = f"{arm.name} seed {seed}{suffix}"
        made = {"products": ("segmentor",), "scratch": ("training/checkpoints", "filtered")}
        return self.unit(group, "cells", name, inputs, work, **made)

    def _adapted(self, arm: ArmConfig, seed: int, config: SegmentorConfig, group: str) -> Unit:
        """The segmentor of the same arm without `adapt`, adapted: it is trained once for both."""
        self._adaptable  # noqa: B018 (before anything is trained)
        plain = arm.model_copy(update={"adapt": False})
        twins = (other for other in self.recipe.study.arms if other.model_copy(update={"name": arm.name}) == plain)
        trained = self._cell(next(twins, plain), seed, config, group)

        def work(folder: Path) -> Any:
            segmentor = segmentor_of(trained)
            adapt(segmentor, self.windows.images)
            segmentor.save_pretrained(folder / "segmentor")
            return trained.result

        inputs = {"segmentor": trained.key, "adapt": self.windows.fingerprint()}
        name = f"{arm.name} seed {seed}{self._suffix(config)}"
        return self.unit("adapt", "cells", name, inputs, work, products=("segmentor",))

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
        """The tiles whose masks are painted, but for those of pairs."""
        return paintings.layouts(self, "plain", seed)

    def painted(self, kind: str, seed: int) -> Unit:
        """The synthetic dataset of one seed and kind (`ArmConfig.kind`)."""
        return paintings.painted(self, kind, seed)

    def count(self, kind: str) -> int:
        """How many tiles are painted per seed: as many as the arm that wants most, or whose masks are these pairs'."""
        study = self.recipe.study
        wanted = (arm for arm in study.arms if arm.kind == kind or (kind == "pairs" and arm.layouts == "pairs"))
        return len(self.train) * max(arm.ratio or study.ratio for arm in wanted)

    def agreement(self, kind: str, seed: int) -> float:
        """The mIoU at which the teacher of a seed finds the masks in what was painted under them."""
        painted, teacher, count = self.painted(kind, seed), self.cell(self.teacher, seed), self.count(kind)

        def work(folder: Path) -> float:
            return segmentor_of(teacher).evaluate(painted_tiles(painted).first(count)).mean_iou

        inputs = {"painted": painted.key, "count": count, "segmentor": teacher.key}
        agreement: float = self.unit("test", "scores", f"agreement {kind} seed {seed}", inputs, work).result
        return agreement

    def label_shares(self, seed: int) -> dict[str, Any]:
        """What share of the pixels of pairs each class has, and how far that is from the training tiles."""
        painted, count = self.painted("pairs", seed), self.count("pairs")

        def work(folder: Path) -> dict[str, Any]:
            masks, num_classes = painted_tiles(painted).first(count).masks, self.train.schema.num_classes
            return {
                "shares": label_histogram(masks, num_classes).tolist(),
                "distance": histogram_distance(self.train.masks, masks, num_classes),
            }

        inputs = {"painted": painted.key, "count": count, "train": self.train.fingerprint()}
        shares: dict[str, Any] = self.unit("audit", "scores", f"labels pairs seed {seed}", inputs, work).result
        return shares

    @property
    def learned(self) -> dict[str, Tiles]:
        """All real tiles that something is trained on."""
        used = any(arm.adds_tiles or arm.adapt for arm in self.recipe.study.arms)
        return {"train": self.train} | ({} if self.unlabelled is None or not used else {"unlabelled": self.unlabelled})

    def audited_splits(self) -> Unit:
        """Copies of validation and test tiles in what is trained on, that were scaled or compressed again.

        Equal ones are refused before anything is trained; likeness is no proof, so these are only reported. Nothing
        depends on this unit.
        """
        learned, held_out = self.learned, {"validation": self.validation, "test": self.test}

        def work(folder: Path) -> dict[str, Any]:
            found = audit_splits(*([from_tiles(*split) for split in side.items()] for side in (learned, held_out)))
            return stored_audit(found, folder)

        inputs: dict[str, Any] = {
            "audit": _AUDITED,
            "learned": {name: tiles.fingerprint() for name, tiles in learned.items()},
            "held out": {name: tiles.fingerprint() for name, tiles in held_out.items()},
        }
        return self.unit("audit", "audits", "splits", inputs, work, products=(AUDIT, "audit.json"))

    def audited(self, kind: str, seed: int) -> Unit:
        """Copies in what was painted under a seed, of training tiles, of references, and of what must stay unseen.

        Nothing depends on this unit: it reads validation and test tiles only to report.
        """
        painted, count = self.painted(kind, seed), self.count(kind)
        splits = {"validation": self.validation, "test": self.test}
        learned = self.learned

        def work(folder: Path) -> dict[str, Any]:
            with remade(painted):
                dataset = read_painted(painted.folder / "dataset", count, name=f"{kind}, seed {seed}")
            found = audit(
                dataset,
                [from_tiles(name, tiles) for name, tiles in learned.items()],
                [from_tiles(name, tiles) for name, tiles in splits.items()],
                [Layouts(f"masks of {name}", tiles.ids, tiles.masks) for name, tiles in splits.items()],
            )
            return stored_audit(found, folder)

        inputs = {
            "painted": painted.key,
            "count": count,
            "audit": _AUDITED,
            **{name: tiles.fingerprint() for name, tiles in {**learned, **splits}.items()},
        }
        return self.unit("audit", "audits", f"{kind} seed {seed}", inputs, work, products=(AUDIT, "audit.json"))

    def timing(self) -> dict[str, list[float]]:
        """Seconds of the finished units that were asked for, by groups of work."""
        seconds: dict[str, list[float]] = {}
        for group, unit in self._used.values():
            seconds.setdefault(group, []).append(unit.seconds)
        return seconds

    def check_clock(self) -> None:
        """Stop, where no time is left."""
        if self.clock.left() == 0:
            raise OutOfTime

    # The whole

    def tasks(self) -> list[Task]:
        """All that is to be done, in this order; what is done costs nothing."""
        study = self.recipe.study
        teachers = [*dict.fromkeys((study.arms[0], self.teacher))]  # a list: not every arm can be hashed
        tasks = [
            Task(f"train: {arm.name}", seed, partial(self.cell, arm, seed)) for arm in teachers for seed in study.seeds
        ]
        if any(kind != "pairs" for kind in self.kinds):
            tasks.append(Task("train the generator", None, lambda: self.generator))
        kinds = self.kinds
        if self.paints_pairs:
            tasks.append(Task("train what paints pairs", None, lambda: self.pairs))
            kinds = list(dict.fromkeys(["pairs", *kinds]))  # whose masks others are painted under

        def each(group: str, work: Callable[[Any, int], object], names: Sequence[Any], **named: Any) -> None:
            for name in names:
                label = group.format(getattr(name, "name", name))
                tasks.extend(Task(label, seed, partial(work, name, seed, **named)) for seed in study.seeds)

        each("paint ({})", self.painted, kinds)
        for arm in study.arms:
            each("test" if arm in teachers else "train: {}", self.metrics, [arm])
        each("plateau check", self.metrics, self.checked, times=2)
        each("test", self.agreement, self.kinds)
        each("audit", self.audited, self.kinds)
        if self.paints_pairs:
            tasks += [Task("audit", seed, partial(self.label_shares, seed)) for seed in study.seeds]
        return [*tasks, Task("audit", None, self.audited_splits)]

    def work(self) -> None:
        """Do every unit that is not done. What another process is at is left to it: several share the work."""
        self.test  # noqa: B018 (before anything is trained: no tile is in two splits)
        if self.paints_pairs:
            check_pairs(self.recipe.pairs, self.train.schema, self.recipe.data.image_size)
        tasks = self.tasks()
        while tasks:
            left: list[tuple[Task, Busy]] = []
            for task in tasks:
                try:
                    task.work()
                except Busy as busy:
                    left.append((task, busy))
            while len(left) == len(tasks) and not any(busy.over() for _, busy in left):
                self.check_clock()
                time.sleep(0.5)
            tasks = [task for task, _ in left]

    def left(self) -> list[Task]:
        """What is still to be done; nothing is computed. `timing` then tells the times of what is done."""
        clock, self.clock = self.clock, Clock(0.0)
        left = []
        try:
            for task in self.tasks():
                try:
                    task.work()
                except (OutOfTime, Busy):
                    left.append(task)
        finally:
            self.clock = clock
        return left

    @property
    def kinds(self) -> list[str]:
        """What painted tiles the arms ask for."""
        asked = {arm.kind for arm in self.recipe.study.arms}
        return [kind for kind in KINDS if kind in asked]

    @property
    def paints_pairs(self) -> bool:
        """Whether anything is made of pairs."""
        return any("pairs" in kind for kind in self.kinds)

    @property
    def checked(self) -> tuple[ArmConfig, ...]:
        """The arms that are trained for twice the steps as well."""
        study = self.recipe.study
        return {"none": (), "baseline": study.arms[:1], "all": study.arms}[study.plateau_check]

    def run(self, command: str = "") -> Path:
        """Do every unit that is not done, write `results.json` and return the path of `report.html`."""
        self.work()
        write_results(self, command)
        return write_report(self.out)


def _with(config: SegmentorConfig, **train: Any) -> SegmentorConfig:
    """The settings with others for their training."""
    return config.model_copy(update={"train": config.train.model_copy(update=train)})
