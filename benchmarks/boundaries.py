"""Are boundaries better after refinement, and better than what else a user would pick? One evaluator for all.

    python benchmarks/boundary_data.py dubai DATA --source DUBAI
    python benchmarks/boundaries.py DATA --out OUT [--seeds 0 1 2] [--jobs ...]

For each seed two segmentors learn from the training windows; the rough maps are what they read in whole test tiles. A
refiner learns from the same windows and from what U-Nets read in those that they did not see (out of fold), and has
never met the other segmentor. Settings of rivals (`rivals.py`) and of the refiner's sampling are those that are best on
validation tiles, by the mean of boundary IoU and BF; nothing is chosen on test tiles.

    mIoU, boundary IoU, BF, WF, mBA    in percent; the last four as in `terrasynth.tasks.boundary`
    s/Mpx                              seconds for a million pixels, on this machine

`--ablations` trains the refiner's variants as well, and refines with other numbers of steps. Started again, it goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rivals import GRIDS
from terrasynth.data.folder import Tiles, load_tiles
from terrasynth.io import write_json
from terrasynth.progress import say, track
from terrasynth.recipe import DataConfig, RefinerConfig, SegmentorConfig, SplitConfig, TrainConfig
from terrasynth.study.statistics import compare, summarise
from terrasynth.systems.idgbr import IDGBRPipeline
from terrasynth.systems.refine import fit_refiner
from terrasynth.tasks.boundary import BoundaryScores
from terrasynth.tasks.confusion import Confusion
from terrasynth.tasks.folds import out_of_fold
from terrasynth.tasks.segmentation import Segmentor, fit
from terrasynth.training.units import Clock, OutOfTime, Unit, do, store_tensors, stored_tensors

_SLIM: dict[str, Any] = {
    "options": {"encoder_depth": 4, "decoder_channels": [32, 16, 16, 8], "channels": [16, 32, 64, 128]}
}
_TRAIN = TrainConfig(
    steps=1200, batch_size=8, learning_rate=3e-3, weight_decay=0.05, ema_decay=0.98, clip_norm=None,
    checkpoint_every=200, evaluate_every=200,
)  # fmt: skip
SEGMENTORS = {
    "U-Net": SegmentorConfig(architecture="unet", encoder="tu-resnet18", dice=1.0, train=_TRAIN, **_SLIM),
    "SegFormer": SegmentorConfig(
        architecture="transformers/segformer",
        encoder="tiny",
        dice=1.0,
        train=_TRAIN.model_copy(update={"learning_rate": 1e-3}),
    ),
}
#: Whose out-of-fold maps the refiner learns from.
FIRST = "U-Net"
REFINER = RefinerConfig(
    crop=None,
    train=TrainConfig(
        steps=1500, batch_size=8, learning_rate=2e-3, ema_decay=0.99, checkpoint_every=100, evaluate_every=500
    ),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "as above": {},
    "without the rough map": {"sees_rough": False, "rough_start": 0.0},
    "cubic timesteps": {"timesteps": "cubic"},
    "no boundary noise": {"rough": {"folds": 4, "noise": 0.0, "invented": 0.0}},
    "never starts at the rough map": {"rough_start": 0.0},
    "one-hot codes": {"codes": "onehot"},
}
#: Number of steps and strength, of which validation chooses; at most four evaluations.
SAMPLING = [(steps, strength) for steps in (1, 2, 4) for strength in (0.5, 1.0)]
STEPS = (1, 2, 4, 8, 25)
METRICS = {"miou": "mIoU", "boundary_iou": "boundary IoU", "bf": "BF", "wf": "WF", "mba": "mBA"}
#: How many validation tiles choose settings.
_TUNING = 24

Refine = Callable[[Tensor, Tensor, int], Tensor]
"""Image uint8 (3, H, W), rough map uint8 (H, W) and its number, to a map uint8 (H, W)."""


def data(root: Path, split: str, size: int) -> Tiles:
    """The tiles of a split."""
    where = {name: SplitConfig(folder=name, list=None) for name in ("train", "validation", "test")}
    config = DataConfig(kind="folder", root=root, label_schema=Path("classes.yaml"), image_size=size, **where)
    return load_tiles(config, split, base=root)


class Bench:
    """Trainings and scores of one data set, each a unit of work."""

    def __init__(self, root: Path, out: Path) -> None:
        self.out, self.clock = out, Clock()
        self.train = data(root, "train", 128)
        self.validation, self.test = data(root, "validation", 256), data(root, "test", 256)
        self.schema = self.train.schema

    def segmentor(self, name: str, seed: int) -> Unit:
        """A trained segmentor, and what it reads in validation and test tiles."""

        def work(folder: Path) -> dict[str, Any]:
            schema, config = self.schema, SEGMENTORS[name]
            model = Segmentor.build(config, schema.num_classes, schema.ignore_index, seed, class_names=schema.names)
            outcome = fit(
                model, self.train, self.validation, config, folder / "training", seed=seed, label=f"{name}, seed {seed}"
            )
            if not outcome.finished:
                raise OutOfTime
            model.save_pretrained(folder / "segmentor")
            maps = {}
            for split, tiles in (("validation", self.validation), ("test", self.test)):
                parts = tiles.images.split(8)
                maps[split] = torch.cat([model.predict(part.float() / 255).byte() for part in parts])
            store_tensors(folder / "maps.safetensors", **maps)
            return {}

        inputs = {
            "segmentor": SEGMENTORS[name].model_dump(mode="json"),
            "data": [tiles.fingerprint() for tiles in (self.train, self.validation, self.test)],
            "seed": seed,
        }
        made = {"products": ("segmentor", "maps.safetensors"), "scratch": ("training/checkpoints",)}
        return do(self.out / "segmentors", f"{name} seed {seed}", inputs, self.clock, work, **made)

    def rough(self, name: str, seed: int, split: str) -> Tensor:
        """What a segmentor reads in the tiles of a split."""
        return stored_tensors(self.segmentor(name, seed).folder / "maps.safetensors")[split]

    def refiner(self, variant: str, seed: int) -> Unit:
        """A trained refiner."""
        config = RefinerConfig.model_validate(REFINER.model_dump() | VARIANTS[variant] | {"seed": seed})
        folds = out_of_fold(
            self.train,
            self.validation,
            SEGMENTORS[FIRST],
            self.out / "folds",
            folds=config.rough.folds,
            seed=seed,
            clock=self.clock,
            groups=[name.rpartition("-")[0] for name in self.train.ids],
        )

        def work(folder: Path) -> None:
            if not fit_refiner(self.train, folds.classes, config, folder).finished:
                raise OutOfTime

        inputs = {
            "refiner": config.identity(),
            "train": self.train.fingerprint(),
            "rough": [fold.key for fold in folds.units],
        }
        made = {"products": ("model",), "scratch": ("checkpoints",)}
        return do(self.out / "refiners", f"{variant} seed {seed}", inputs, self.clock, work, **made)

    def scored(self, name: str, seed: int, split: str, what: str, refine: Refine, made_of: Any) -> dict[str, Any]:
        """Scores of refined maps, with seconds for a million pixels."""

        def work(folder: Path) -> dict[str, Any]:
            tiles, rough = getattr(self, split), self.rough(name, seed, split)
            tiles = tiles.first(_TUNING) if split == "validation" else tiles
            seconds, maps = 0.0, []
            with track(len(tiles), f"{what}, {name}, seed {seed}", unit="tiles") as progress:
                for number, (image, before) in enumerate(zip(tiles.images, rough, strict=False)):
                    began = time.perf_counter()
                    maps.append(refine(image, before, number))
                    seconds += time.perf_counter() - began
                    progress.advance()
            store_tensors(folder / "maps.safetensors", maps=torch.stack(maps))
            found = evaluate(maps, tiles, rough)
            return found | {"s/Mpx": 1e6 * seconds / tiles.masks[: len(maps)].numel()}

        inputs = {"segmentor": self.segmentor(name, seed).key, "split": split, "what": what, "made of": made_of}
        unit = do(
            self.out / "scores",
            f"{what} {name} {seed} {split}",
            inputs,
            self.clock,
            work,
            products=("maps.safetensors",),
        )
        return {**unit.result, "folder": str(unit.folder)}


def evaluate(maps: Sequence[Tensor], tiles: Tiles, rough: Tensor) -> dict[str, Any]:
    """All metrics, as fractions; `iou_imp` against the rough maps."""
    scores, confusion = BoundaryScores(tiles.schema), Confusion.empty(tiles.schema.num_classes)
    for index, found in enumerate(maps):
        scores.update(tiles.ids[index], found, tiles.masks[index], rough[index])
        confusion.update(found[None], tiles.masks[index][None], tiles.schema.ignore_index)
    return {"miou": confusion.mean_iou, **scores.metrics()}


def rival(name: str, settings: dict[str, Any], classes: int) -> Refine:
    """A rival with settings."""
    function = GRIDS[name][0]

    def refine(image: Tensor, rough: Tensor, number: int) -> Tensor:
        pixels = np.ascontiguousarray(image.movedim(0, -1).numpy())
        return torch.from_numpy(function(pixels, rough.numpy(), classes, **settings))

    return refine


def refined(pipeline: IDGBRPipeline, steps: int, strength: float) -> Refine:
    """A refiner with settings."""

    def refine(image: Tensor, rough: Tensor, number: int) -> Tensor:
        return pipeline.refine(
            image[None].float() / 255, rough[None], seeds=[number], num_steps=steps, strength=strength
        )[0].cpu()

    return refine


def worth(found: dict[str, Any]) -> float:
    """What settings are chosen by."""
    return float(found["boundary_iou"] + found["bf"])


def main() -> None:
    """Train, refine, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablations", action="store_true")
    options = parser.parse_args()
    bench = Bench(options.data, options.out)
    classes = bench.schema.num_classes
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in SEGMENTORS:
        rows: dict[str, list[dict[str, Any]]] = {}
        for seed in options.seeds:
            pipeline = IDGBRPipeline.from_pretrained(bench.refiner("as above", seed).folder / "model")
            key = bench.refiner("as above", seed).key
            tried = {
                setting: bench.scored(
                    name, seed, "validation", f"IDGBR {setting}", refined(pipeline, *setting), [key, setting]
                )
                for setting in SAMPLING
            }
            best = max(SAMPLING, key=lambda setting: worth(tried[setting]))
            say(f"{name}, seed {seed}: {best[0]} steps from strength {best[1]}")
            jobs: dict[str, tuple[Refine, Any]] = {"rough map": (lambda image, rough, number: rough, None)}
            for other, (_, grid) in GRIDS.items():
                # Chosen once a segmentor, on the maps of the first seed.
                first = [
                    bench.scored(
                        name,
                        options.seeds[0],
                        "validation",
                        f"{other} {number}",
                        rival(other, settings, classes),
                        settings,
                    )
                    for number, settings in enumerate(grid)
                ]
                settings = grid[max(range(len(grid)), key=lambda number: worth(first[number]))]
                jobs[other] = (rival(other, settings, classes), settings)
            jobs["IDGBR"] = (refined(pipeline, *best), [key, best])
            if options.ablations:
                for steps in STEPS:
                    jobs[f"IDGBR, {steps} steps"] = (refined(pipeline, steps, best[1]), [key, steps, best[1]])
                for variant in VARIANTS:
                    unit = bench.refiner(variant, seed)
                    of_variant = IDGBRPipeline.from_pretrained(unit.folder / "model")
                    strength = 1.0 if VARIANTS[variant].get("rough_start") == 0 else best[1]
                    jobs[f"IDGBR, {variant}"] = (refined(of_variant, best[0], strength), [unit.key, best[0], strength])
            for what, (refine, made_of) in jobs.items():
                rows.setdefault(what, []).append(bench.scored(name, seed, "test", what, refine, made_of))
        results[name] = rows
        report(name, rows)
    write_json(options.out / "results.json", results)


def report(name: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table; differences to the rough map are paired by seed."""
    print(f"\n| {name} | {' | '.join(METRICS.values())} | Δ boundary IoU | Δ BF | s/Mpx |")
    print(f"|---|{'--:|' * (len(METRICS) + 3)}")
    for what, seeds in rows.items():
        cells = [f"{100 * summarise([one[metric] for one in seeds]).mean:.1f}" for metric in METRICS]
        for metric in ("boundary_iou", "bf"):
            if what == "rough map" or len(seeds) < 2:
                cells.append("–")
                continue
            both = compare([one[metric] for one in seeds], [one[metric] for one in rows["rough map"]]).to_dict()
            low, high = both["ci95"]
            cells.append(f"{100 * both['delta']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        print(f"| {what} | {' | '.join(cells)} | {np.mean([one['s/Mpx'] for one in seeds]):.2f} |", flush=True)


if __name__ == "__main__":
    main()
