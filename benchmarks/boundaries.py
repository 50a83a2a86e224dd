"""Are boundaries better after refinement, and better than what else a user would pick? One evaluator for all.

    python benchmarks/boundary_data.py dubai DATA --source DUBAI
    python benchmarks/boundaries.py DATA --out OUT [--seeds 0 1 2] [--base REFINER | --ablations]

For each seed two segmentors learn from the training windows; the rough maps are what they read in whole test tiles. A
refiner learns from the same windows and from what U-Nets read in places that they did not see (out of fold, once for
all seeds), and has never met the other segmentor. It starts from scratch, or with `--base` from a refiner of one class
against the rest, and then stays one. Settings of rivals (`rivals.py`) and of the refiner's sampling are those that are
best on validation tiles, by the mean of boundary IoU and BF, with the maps of the first seed; nothing is chosen on test
tiles. The intervals are over seeds: how much the choice of places matters they do not tell.

`the package's refiner` is `terrasynth-refiner` as it comes, with the steps and the band that `terrasynth refine`
has, in one window a tile.
`votes of alike pixels alone` is what the refiner begins with (`models/snap.py`): what is above it was learned.

    mIoU, boundary IoU, BF, WF, mBA    in percent; the last four as in `terrasynth.tasks.boundary`, WF that of edges
    s/Mpx                              seconds for a million pixels: medians of tiles that all methods take in turn

`--ablations` trains the refiner's variants as well, and refines with other numbers of steps. Started again, it goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from diffusers.utils.logging import disable_progress_bar
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from timm.models import save_for_hf
from torch import Tensor

import rivals
from terrasynth.data.folder import Tiles, load_tiles
from terrasynth.io import weights_digest, write_json
from terrasynth.models.snap import snap
from terrasynth.packaged import packaged_or
from terrasynth.progress import say, track
from terrasynth.recipe import DataConfig, RefinerConfig, RoughConfig, SegmentorConfig, SplitConfig, TrainConfig
from terrasynth.study.statistics import compare, summarise
from terrasynth.systems.idgbr import IDGBRPipeline
from terrasynth.systems.refine import fit_refiner
from terrasynth.tasks.boundary import BoundaryScores
from terrasynth.tasks.confusion import Confusion
from terrasynth.tasks.folds import out_of_fold
from terrasynth.tasks.segmentation import Segmentor, fit
from terrasynth.training.units import Clock, OutOfTime, Unit, do, store_tensors, stored_tensors

_SLIM: dict[str, Any] = {
    "options": {"encoder_depth": 5, "decoder_channels": [64, 32, 16, 16, 8], "channels": [16, 32, 64, 128]}
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
    codes="onehot",
    timesteps="cubic",
    rough=RoughConfig(folds=3),  # Kampala has three places to learn from
    train=TrainConfig(
        steps=800, batch_size=8, learning_rate=7e-4, ema_decay=0.99, checkpoint_every=100, evaluate_every=400
    ),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "without the rough map": {"sees_rough": False, "rough_start": 0.0},
    "rough maps as they are": {"snap_rounds": 0},
    "uniform timesteps": {"timesteps": "uniform"},
    "no boundary noise": {"rough": {"folds": 3, "noise": 0.0, "invented": 0.0}},
    "never starts at the rough map": {"rough_start": 0.0},
    "codes of bits": {"codes": "bits"},
    "aligned to the segmentor's encoder": {},
}
#: What of `VARIANTS` is no setting of a recipe: the backbone is the segmentor's own.
_ALIGNED = "aligned to the segmentor's encoder"
#: Number of steps and strength, of which validation chooses; at most four evaluations.
SAMPLING = [(steps, strength) for steps in (1, 2, 4) for strength in (0.5, 1.0)]
STEPS = (1, 2, 4, 8, 25)
#: Those with which `terrasynth refine` uses the refiner of the package, whatever the data.
PACKAGE = 2, 1.0
METRICS = {"miou": "mIoU", "boundary_iou": "boundary IoU", "bf": "BF", "wf/edge": "WF", "mba": "mBA"}
#: How many validation tiles choose settings, how many are timed, and how near to a boundary is near, in pixels.
_TUNING, _TIMED, _NEAR = 24, 5, 8

Refine = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Image uint8 (3, H, W), rough map uint8 (H, W), the segmentor's probabilities (K, H, W) and the tile's number, to a
map, uint8 (H, W)."""
Made = tuple[Refine, Any]
"""What refines, and what it is made of, JSON-able."""


def data(root: Path, split: str, size: int) -> Tiles:
    """The tiles of a split."""
    where = {name: SplitConfig(folder=name, list=None) for name in ("train", "validation", "test")}
    config = DataConfig(kind="folder", root=root, label_schema=Path("classes.yaml"), image_size=size, **where)
    return load_tiles(config, split, base=root)


def spread(count: int) -> list[int]:
    """`_TUNING` places of a list, as far apart as can be; all of a shorter one."""
    return torch.linspace(0, count - 1, _TUNING).round().long().unique().tolist()


class Bench:
    """Trainings and scores of one data set, each a unit of work."""

    def __init__(self, root: Path, out: Path, seeds: Sequence[int], base: Path | None = None) -> None:
        self.out, self.clock, self.seeds, self.base = out, Clock(), seeds, base
        self.train = data(root, "train", 128)
        self.test = data(root, "test", 256)
        validation = data(root, "validation", 256)
        # Spread over the places: neighbours in the list are neighbours on the ground.
        self.validation = validation.take(spread(len(validation)))
        self.schema = self.train.schema
        places = json.loads((root / "places.json").read_text())
        self.places = [places[name] for name in self.train.ids]

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
            shares = {}
            for split in ("validation", "test"):
                with torch.no_grad():
                    parts = [model.eval()(part.float() / 255) for part in getattr(self, split).images.split(8)]
                shares[split] = torch.cat(parts).softmax(1).half()
            store_tensors(folder / "shares.safetensors", **shares)
            return {}

        inputs = {
            "segmentor": SEGMENTORS[name].model_dump(mode="json"),
            "data": [tiles.fingerprint() for tiles in (self.train, self.validation, self.test)],
            "seed": seed,
        }
        made = {"products": ("segmentor", "shares.safetensors"), "scratch": ("training/checkpoints",)}
        return do(self.out / "segmentors", f"{name} seed {seed}", inputs, self.clock, work, **made)

    def shares(self, name: str, seed: int, split: str) -> Tensor:
        """How probable a segmentor holds each class in the tiles of a split, float16 (N, K, H, W)."""
        return stored_tensors(self.segmentor(name, seed).folder / "shares.safetensors")[split]

    def refiner(self, variant: str | None, seed: int, steps: int) -> Unit:
        """A trained refiner."""
        changes = {} if variant is None else VARIANTS[variant]
        if self.base is not None:
            changes = {"base": str(self.base), "each_class": True}
        config = RefinerConfig.model_validate(REFINER.model_dump() | changes | {"seed": seed})
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
        if variant == _ALIGNED:
            config = config.model_copy(update={"alignment": f"local-dir:{self.backbone(seed).folder / 'backbone'}"})
        folds = out_of_fold(
            self.train,
            self.validation,
            SEGMENTORS[FIRST],
            self.out / "folds",
            folds=config.rough.folds,
            seed=self.seeds[0],
            clock=self.clock,
            groups=self.places,
        )

        def work(folder: Path) -> None:
            if not fit_refiner(self.train, folds.classes, config, folder).finished:
                raise OutOfTime

        inputs = {
            "refiner": config.identity() | ({} if self.base is None else {"base": weights_digest(self.base)}),
            "train": self.train.fingerprint(),
            "rough": [fold.key for fold in folds.units],
        }
        made = {"products": ("model",), "scratch": ("checkpoints",)}
        return do(self.out / "refiners", f"{variant} {steps} seed {seed}", inputs, self.clock, work, **made)

    def backbone(self, seed: int) -> Unit:
        """The encoder of a trained U-Net as a backbone of timm, in place of one that is nowhere to be had offline."""
        trained = self.segmentor(FIRST, seed)

        def work(folder: Path) -> None:
            options = {"channels": _SLIM["options"]["channels"], "num_classes": 0}
            backbone = timm.create_model("resnet18", **options)
            encoder = Segmentor.from_pretrained(trained.folder / "segmentor").network.encoder.state_dict()
            backbone.load_state_dict({name.removeprefix("model."): tensor for name, tensor in encoder.items()})
            save_for_hf(backbone, folder / "backbone", model_args=options, safe_serialization=True)

        return do(self.out / "backbones", f"seed {seed}", {"of": trained.key}, self.clock, work, products=("backbone",))

    def scored(self, name: str, seed: int, split: str, what: str, made: Made) -> dict[str, Any]:
        """Scores of refined maps."""
        refine, made_of = made

        def work(folder: Path) -> dict[str, Any]:
            tiles, shares = getattr(self, split), self.shares(name, seed, split)
            rough, maps = shares.argmax(1).byte(), []
            with track(len(tiles), f"{what}, {name}, seed {seed}", unit="tiles") as progress:
                for number, (image, before) in enumerate(zip(tiles.images, rough, strict=True)):
                    maps.append(refine(image, before, shares[number].float(), number))
                    progress.advance()
            store_tensors(folder / "maps.safetensors", maps=torch.stack(maps))
            return evaluate(maps, tiles, rough)

        inputs = {
            "segmentor": self.segmentor(name, seed).key,
            "split": split,
            "what": what,
            "made of": made_of,
            "rivals": hashlib.sha256(Path(rivals.__file__).read_bytes()).hexdigest(),
        }
        products = ("maps.safetensors",)
        unit = do(self.out / "scores", f"{what} {name} {seed} {split}", inputs, self.clock, work, products=products)
        return {**unit.result, "folder": str(unit.folder)}

    def best(self, name: str, what: str, choices: Sequence[Made]) -> Any:
        """What those of `choices` is made of that is best on validation tiles with the maps of the first seed."""
        found = [
            self.scored(name, self.seeds[0], "validation", f"{what} {number}", made)
            for number, made in enumerate(choices)
        ]
        return choices[max(range(len(choices)), key=lambda number: worth(found[number]))][1]

    def timed(self, name: str, jobs: dict[str, Made]) -> dict[str, float]:
        """Seconds for a million pixels: the methods take the same tiles in turn, the first of which only warms up."""
        shares = self.shares(name, self.seeds[0], "test")[: _TIMED + 1]
        seconds: dict[str, list[float]] = {what: [] for what in jobs}
        for number, probable in enumerate(shares):
            given = self.test.images[number], probable.argmax(0).byte(), probable.float(), number
            for what, (refine, _) in jobs.items():
                began = time.perf_counter()
                refine(*given)
                seconds[what].append(time.perf_counter() - began)
        pixels = self.test.masks[0].numel()
        return {what: 1e6 * float(np.median(each[1:])) / pixels for what, each in seconds.items()}


def evaluate(maps: Sequence[Tensor], tiles: Tiles, rough: Tensor) -> dict[str, Any]:
    """All metrics, as fractions; `iou_imp` against the rough maps."""
    scores, confusion = BoundaryScores(tiles.schema), Confusion.empty(tiles.schema.num_classes)
    for index, found in enumerate(maps):
        scores.update(tiles.ids[index], found, tiles.masks[index], rough[index])
        confusion.update(found[None], tiles.masks[index][None], tiles.schema.ignore_index)
    return {"miou": confusion.mean_iou, **scores.metrics()}


def rival(name: str, settings: dict[str, Any], classes: int) -> Made:
    """A rival with settings."""
    function = rivals.GRIDS[name][0]
    probabilities = name.endswith("(probabilities)")

    def refine(image: Tensor, rough: Tensor, shares: Tensor, number: int) -> Tensor:
        pixels = np.ascontiguousarray(image.movedim(0, -1).numpy())
        given = {"shares": shares.numpy()} if probabilities else {}
        return torch.from_numpy(function(pixels, rough.numpy(), classes, **given, **settings))

    return refine, settings


def refined(folder: Path, key: str, steps: int, strength: float, *, near: bool = False) -> Made:
    """A refiner with settings; `near` changes nothing that is far from the rough map's boundaries."""
    pipeline = IDGBRPipeline.from_pretrained(folder)

    def refine(image: Tensor, rough: Tensor, shares: Tensor, number: int) -> Tensor:
        band = torch.from_numpy(near_boundaries(rough.numpy(), _NEAR))[None] if near else None
        sampling = {"num_steps": steps, "strength": strength, "each_class": pipeline.config.each_class}
        images = image[None].float() / 255
        return pipeline.refine(images, rough[None], seeds=[number], band=band, **sampling)[0].cpu()

    return refine, [key, steps, strength]


def voted(classes: int) -> Made:
    """What a refiner from scratch begins with, before it has learned anything."""

    def refine(image: Tensor, rough: Tensor, shares: Tensor, number: int) -> Tensor:
        return snap(image[None].float() / 255, rough[None], classes, REFINER.snap_rounds).argmax(1)[0].byte()

    return refine, REFINER.snap_rounds


def near_boundaries(rough: NDArray[np.uint8], distance: float) -> NDArray[np.bool_]:
    """Which pixels have another class within `distance` pixels."""
    near = np.zeros(rough.shape, bool)
    for k in np.unique(rough):
        near |= (rough == k) & (distance_transform_edt(rough == k) <= distance)
    return near if len(np.unique(rough)) > 1 else np.zeros_like(near)


def worth(found: dict[str, Any]) -> float:
    """What settings are chosen by; a metric that has no value is worth nothing."""
    return float(found["boundary_iou"] or 0) + float(found["bf"] or 0)


def main() -> None:
    """Train, refine, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800, help="of a refiner's training")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--base", type=Path, help="refiner of one class against the rest to start from")
    how.add_argument("--ablations", action="store_true")
    options = parser.parse_args()
    disable_progress_bar()  # of loading a pipeline, which is done some hundred times
    bench = Bench(options.data, options.out, options.seeds, options.base)
    classes = bench.schema.num_classes
    folder = Path(packaged_or("terrasynth-refiner"))
    package = folder, weights_digest(folder)
    results: dict[str, Any] = {}

    def trained(variant: str | None, seed: int) -> tuple[Path, str]:
        unit = bench.refiner(variant, seed, options.steps)
        return unit.folder / "model", unit.key

    for name in SEGMENTORS:
        settings = {
            other: bench.best(name, other, [rival(other, each, classes) for each in grid])
            for other, (_, grid) in rivals.GRIDS.items()
        }

        def choices(variant: str | None, seed: int) -> list[Made]:
            model = trained(variant, seed)
            return [refined(*model, *each) for each in SAMPLING if each[1] == 1 or may_start(variant)]

        variants = [None, *VARIANTS] if options.ablations else [None]
        sampling = {
            variant: bench.best(name, f"IDGBR {variant or ''}", choices(variant, options.seeds[0]))[1:]
            for variant in variants
        }
        rows: dict[str, list[dict[str, Any]]] = {}
        for seed in options.seeds:
            jobs: dict[str, Made] = {"rough map": (lambda image, rough, shares, number: rough, None)}
            jobs["votes of alike pixels alone"] = voted(classes)
            jobs |= {other: rival(other, each, classes) for other, each in settings.items()}
            main_one = trained(None, seed)
            jobs["IDGBR"] = refined(*main_one, *sampling[None])
            jobs["IDGBR, near boundaries"] = refined(*main_one, *sampling[None], near=True)
            jobs["the package's refiner, near boundaries"] = refined(*package, *PACKAGE, near=True)
            for variant in variants[1:]:
                jobs[f"IDGBR, {variant}"] = refined(*trained(variant, seed), *sampling[variant])
            for steps in STEPS if options.ablations else ():
                jobs[f"IDGBR, {steps} steps"] = refined(*main_one, steps, sampling[None][1])
            for what, made in jobs.items():
                rows.setdefault(what, []).append(bench.scored(name, seed, "test", what, made))
        seconds = bench.timed(name, jobs)
        results[name] = {"rows": rows, "seconds": seconds, "settings": settings, "sampling": sampling[None]}
        report(name, rows, seconds)
        say(f"chosen on validation tiles: {settings}; steps and strength of IDGBR: {sampling[None]}")
    kind = "ablations" if options.ablations else "results" if options.base is None else "based"
    write_json(options.out / f"{kind}.json", results)


def may_start(variant: str | None) -> bool:
    """Whether a variant has learned to start from the rough map."""
    return variant is None or VARIANTS[variant].get("rough_start") != 0


def report(name: str, rows: dict[str, list[dict[str, Any]]], seconds: dict[str, float]) -> None:
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
        print(f"| {what} | {' | '.join(cells)} | {seconds[what]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
