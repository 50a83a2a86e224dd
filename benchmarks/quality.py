r"""How good are a model's paintings, under masks that it has never seen?

A segmentor trained on all real labels, the ruler, reads real tiles, the same tiles after the autoencoder, and paintings
under their masks without and with steering: where its mIoU falls, that stage lost something of the masks. Beside it
stand the distance of the paintings to real tiles (KID), what the autoencoder loses (PSNR, SSIM), how visible the edges
of tokens are, how different two paintings of one mask are, and whether they are copies of training images. A painting
may be easier to read than the real tile: an mIoU above that of real tiles speaks for obedience, not for realism.

    python benchmarks/quality.py MODEL dubai16 --data tiles/dubai --out runs/quality --steering SEGMENTOR \
        --ruler data.train.list=train.txt --ruler segmentor.train.steps=1200

Prints one Markdown table; OUT gets it too, with `quality.json` and `quality.png`. Interrupted, the same command goes
on. The ruler takes its last step, so validation and test tiles are equally unseen; it never steers.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import terrasynth
from terrasynth.data.augment import view
from terrasynth.data.folder import Tiles, check_splits, load_synthetic, load_tiles, unlabelled_windows
from terrasynth.data.sheet import contact_sheet
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_write, write_json
from terrasynth.progress import track
from terrasynth.recipe import Recipe, SegmentorConfig
from terrasynth.recipe_io import load_recipe
from terrasynth.study.quality import (
    edge_ratio,
    kid,
    mean_distances,
    nearest,
    psnr,
    random_features,
    share_nearer,
    ssim,
    thumbnails,
    whitening,
)
from terrasynth.systems.generate import Job, load_pipeline, model_digest, paint, steering_for
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.tasks.confusion import Confusion
from terrasynth.tasks.segmentation import Segmentor, fit
from terrasynth.training.units import Clock, Unit, do

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAST = 8  # tiles: with fewer, the distances have no error to speak of
COLUMNS = {
    "real": "real, unseen",
    "training": "real, training",
    "reconstructed": "reconstructed",
    "painted": "painted",
    "steered": "painted, CRFM",
}


# --- what is made ----------------------------------------------------------------------------------------------------


def ruler_unit(config: SegmentorConfig, tiles: Tiles, validation: Tiles, out: Path) -> Unit:
    """The segmentor that measures, trained on `tiles`."""
    # One evaluation, after the last step: no tile has a say in which step is taken.
    train = config.train.model_copy(update={"evaluate_every": config.train.steps})
    config = config.model_copy(update={"train": train})
    schema = tiles.schema

    def work(folder: Path) -> None:
        ruler = Segmentor.build(config, schema.num_classes, schema.ignore_index, class_names=schema.names).to(DEVICE)
        fit(ruler, tiles, validation, config, folder / "training", seed=0, label="training the ruler")
        ruler.save_pretrained(folder / "segmentor")

    inputs = {"segmentor": config.model_dump(mode="json"), "train": tiles.fingerprint()}
    return do(out, "ruler", inputs, Clock(), work, products=("segmentor",), scratch=("training/checkpoints",))


def painted_unit(
    pipeline: TODSynthPipeline, model: str, recipe: Recipe, tiles: Tiles, seed: int, steering: Path | None, out: Path
) -> Unit:
    """One painting under every mask of `tiles`, as it stands."""
    inputs = {
        "model": model,
        "sampling": recipe.sampling.model_dump(mode="json"),
        "steering": None if steering is None else recipe.steering.model_dump(mode="json"),
        "segmentor": None if steering is None else model_digest(steering),
        "masks": tiles.fingerprint(),
        "seed": seed,
    }
    name = f"{'painted' if steering is None else 'steered'} seed {seed}"

    def work(folder: Path) -> None:
        steer = None
        if steering is not None:
            segmentor = Segmentor.from_pretrained(steering, schema=pipeline.schema).to(DEVICE)
            steer = steering_for(recipe.steering, segmentor.loss)
        jobs = [Job(f"{index:06d}", seed * 1_000_003 + index, index, 0) for index in range(len(tiles))]
        at = folder / "dataset"
        paint(
            pipeline, tiles.masks, tiles.ids, jobs, recipe.sampling, at, provenance=inputs, steering=steer, label=name
        )

    return do(out, name, inputs, Clock(), work, products=("dataset/metadata.jsonl",))


# --- what is measured ------------------------------------------------------------------------------------------------


def features_of(images: Tensor) -> Tensor:
    """`random_features`, with a progress bar."""
    parts = []
    with track(len(images), "looking at images", unit="images") as progress:
        for batch in images.split(32):
            parts.append(random_features(batch.to(DEVICE)))
            progress.advance(len(batch))
    return torch.cat(parts)


def agreement(ruler: Segmentor, tiles: Tiles, paintings: Sequence[Tensor]) -> dict[str, Any]:
    """How well the ruler finds the masks of `tiles` again in each of several sets of images."""
    parts = [ruler.evaluate(replace(tiles, images=images)) for images in paintings]
    whole = sum(parts, Confusion.empty(ruler.num_classes))
    return {"miou_by_seed": [part.mean_iou for part in parts], **whole.metrics(tiles.schema.names)}


def differences(images: Tensor, features: Tensor, sources: Tensor) -> dict[str, dict[str, float | None]]:
    """Mean distance of two images of one source and of two sources, in features and in grey levels."""
    spaces = {"features": features, "pixels": images.flatten(1).float()}
    found = {space: mean_distances(points, sources) for space, points in spaces.items()}
    return {
        space: {"within": None if within != within else within, "between": between}
        for space, (within, between) in found.items()
    }


class Copies:
    """Looks for every image's nearest among the images that the generator was trained on."""

    def __init__(self, names: Sequence[str], images: Tensor, real: Tensor, features_of_real: Tensor) -> None:
        self.names, self.images = names, images
        self.features = features_of(images)
        shrunk = thumbnails(images).reshape(len(images), 3, 16, 16)
        self.thumbnails = torch.cat([view(shrunk, shrunk[:, 0], turn)[0] for turn in range(8)]).flatten(1)
        self.of_real = self.distances(real, features_of_real)

    def distances(self, images: Tensor, features: Tensor) -> dict[str, Tensor]:
        """To the nearest, in thumbnails under all flips and turns, and in features."""
        return {
            "pixels": nearest(thumbnails(images), self.thumbnails)[0],
            "features": nearest(features, self.features)[0],
        }

    def measure(self, ids: Sequence[str], images: Tensor, features: Tensor) -> dict[str, Any]:
        """How near the images are to training images, and which five are nearest."""
        found = self.distances(images, features)
        closest = found["pixels"].argsort()[:5]
        _, positions = nearest(thumbnails(images[closest]), self.thumbnails)
        return {
            "median": {space: float(values.median()) for space, values in found.items()},
            "share_nearer": {space: share_nearer(values, self.of_real[space]) for space, values in found.items()},
            "closest": [
                {"image": ids[i], "training": self.names[p % len(self.names)], "grey levels": float(found["pixels"][i])}
                for i, p in zip(closest.tolist(), positions.tolist(), strict=True)
            ],
        }

    def originals(self, images: Tensor) -> Tensor:
        """The nearest training image of every image, turned as it lies nearest."""
        _, positions = nearest(thumbnails(images), self.thumbnails)
        chosen = [(self.images[p % len(self.images)], p // len(self.images)) for p in positions.tolist()]
        return torch.stack([view(image, image[0], turn)[0] for image, turn in chosen])


def seen_by_generator(arguments: argparse.Namespace, recipe: Recipe, train: Tiles) -> tuple[list[str], Tensor]:
    """The training images as the generator and its base met them, but for flips and turns, with their names."""
    # Views 1...7 are the flips and turns.
    views = [0, *range(8, recipe.generator.views)]
    names = [f"{id_}, view {index}" for index in views for id_ in train.ids]
    tiles = list(zip(train.images, train.masks, strict=True))
    images = [view(image, mask, index)[0] for index in views for image, mask in tiles]
    sources = [recipe.data]
    if arguments.base is not None:
        sources.append(load_recipe(arguments.base, data=arguments.base_data).recipe.data)
    for source in sources:
        windows = unlabelled_windows(source, train.schema)
        if windows is not None:
            names += windows.ids
            images += windows.images
    return names, torch.stack(images)


def joined(validation: Tiles, test: Tiles) -> Tiles:
    """Both splits as one."""
    return Tiles(
        (*(f"validation/{id_}" for id_ in validation.ids), *(f"test/{id_}" for id_ in test.ids)),
        torch.cat([validation.images, test.images]),
        torch.cat([validation.masks, test.masks]),
        test.schema,
    )


def picked(tiles: Tiles, chosen: Tensor) -> Tiles:
    """Some of the tiles."""
    ids = tuple(tiles.ids[index] for index in chosen.tolist())
    return replace(tiles, ids=ids, images=tiles.images[chosen], masks=tiles.masks[chosen])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make what is missing and measure everything; the picture is written here, too."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    settings = ["sampling.precision=auto", *arguments.set]
    loaded = load_recipe(arguments.recipe, settings, data=arguments.data)
    recipe = loaded.recipe
    train = load_tiles(recipe.data, "train", base=loaded.base)
    validation = load_tiles(recipe.data, "validation", base=loaded.base)
    test = load_tiles(recipe.data, "test", base=loaded.base)
    of_ruler = load_recipe(arguments.recipe, [*settings, *arguments.ruler], data=arguments.data)
    labelled = load_tiles(of_ruler.recipe.data, "train", base=of_ruler.base)
    for tiles in (train, labelled):
        check_splits(train=tiles, validation=validation, test=test)
    unseen = joined(validation, test)
    count = min(arguments.count or len(unseen), len(unseen))
    if count < LEAST:
        raise TerraSynthError(
            "too few unseen tiles to measure with", found=count, expected=f"at least {LEAST}", fix="raise --count"
        )
    chosen = torch.arange(count) * len(unseen) // count
    tiles = picked(unseen, chosen)

    pipeline, model = load_pipeline(arguments.model).to(DEVICE), model_digest(arguments.model)
    fitted = ruler_unit(of_ruler.recipe.segmentor, labelled, validation, out)
    ruler = Segmentor.from_pretrained(fitted.folder / "segmentor", schema=pipeline.schema).to(DEVICE)
    kinds = {"painted": None} if arguments.steering is None else {"painted": None, "steered": arguments.steering}
    units = {
        kind: [painted_unit(pipeline, model, recipe, tiles, seed, by, out) for seed in arguments.seeds]
        for kind, by in kinds.items()
    }
    # One tensor a seed.
    images = {"reconstructed": [pipeline.reconstruct(tiles.images)]}
    images |= {kind: [load_synthetic(unit.folder / "dataset").images for unit in made] for kind, made in units.items()}

    real, everything = features_of(unseen.images), torch.arange(len(unseen))
    copies = Copies(*seen_by_generator(arguments, recipe, train), unseen.images, real)
    side = pipeline.factor * pipeline.transformer.config.patch_size
    whiten = whitening(real)
    known = whiten(real)
    halves = torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).chunk(2)
    sets: dict[str, dict[str, Any]] = {
        "real": {
            "count": len(unseen),
            "agreement": agreement(ruler, tiles, [tiles.images]),
            "kid": kid(*(known[half] for half in halves)),
            "edges": edge_ratio(unseen.images, side),
            "differences": differences(unseen.images, real, everything),
            "copies": copies.measure(unseen.ids, unseen.images, real),
        },
        "training": {"count": len(labelled), "kid": kid(known, whiten(features_of(labelled.images)))},
    }
    for kind, parts in images.items():
        together, sources = torch.cat(parts), chosen.repeat(len(parts))
        features = features_of(together)
        seeds = [f", seed {seed}" for seed in arguments.seeds] if kind in kinds else [""]
        ids = [f"{id_}{seed}" for seed in seeds for id_ in tiles.ids]
        sets[kind] = {
            "count": len(together),
            "agreement": agreement(ruler, tiles, parts),
            "kid": kid(known, whiten(features), everything, sources),
            "edges": edge_ratio(together, side),
            "differences": differences(together, features, sources),
            "copies": copies.measure(ids, together, features),
        }
    decoded = images["reconstructed"][0]
    sets["reconstructed"] |= {
        "psnr": float(psnr(decoded, tiles.images).mean()),
        "ssim": float(ssim(decoded, tiles.images).mean()),
    }

    shown = torch.arange(min(8, count)) * count // min(8, count)
    rows = {"real": tiles.images, "reconstructed": decoded}
    rows |= {f"painted, seed {s}": part for s, part in zip(arguments.seeds[:2], images["painted"][:2], strict=True)}
    if "steered" in kinds:
        rows[f"CRFM, seed {arguments.seeds[0]}"] = images["steered"][0]
    rows = {label: pixels[shown] for label, pixels in rows.items()}
    rows["nearest in training"] = copies.originals(images["painted"][0][shown])
    zoom = max(1, 128 // tiles.masks.shape[-1])
    with atomic_write(out / "quality.png") as partial:
        contact_sheet(rows, tiles.masks[shown], tiles.schema, zoom=zoom, legend=True).save(partial)
    return {
        "sets": sets,
        "classes": list(tiles.schema.names),
        "seeds": arguments.seeds,
        "ruler": {
            "tiles": len(labelled),
            "steps": of_ruler.recipe.segmentor.train.steps,
            "test": agreement(ruler, test, [test.images]),
        },
        "training_views": len(copies.names),
        "model": model,
        "steering": None if arguments.steering is None else model_digest(arguments.steering),
        "recipe": recipe.model_dump(mode="json"),
        "seconds": {
            "ruler": fitted.seconds,
            **{kind: sum(unit.seconds for unit in made) for kind, made in units.items()},
        },
        "environment": {
            "terrasynth": terrasynth.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"{os.cpu_count()} CPU cores",
        },
    }


# --- saying it -------------------------------------------------------------------------------------------------------


def table(sets: Mapping[str, Mapping[str, Any]], class_names: Sequence[str]) -> str:
    """Markdown: a row a measure, a column a set."""
    columns = [name for name in COLUMNS if name in sets]
    apart = {space: values["between"] for space, values in sets["real"]["differences"].items()}
    lines = [f"| | {' | '.join(COLUMNS[name] for name in columns)} |", f"|---|{'---|' * len(columns)}"]

    def row(label: str, key: str, text: Callable[[Any], str]) -> None:
        cells = [text(sets[name][key]) if key in sets[name] else "–" for name in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    def miou(found: Mapping[str, Any]) -> str:
        each = found["miou_by_seed"]
        seeds = f" ({', '.join(percent(value) for value in each)})" if len(each) > 1 else ""
        return percent(sum(each) / len(each)) + seeds

    row("images", "count", str)
    row("mIoU of the ruler under the painted masks, % (each seed)", "agreement", miou)
    for name in class_names:
        row(f"IoU {name}, %", "agreement", lambda found, name=name: percent(found[f"iou/{name}"]))
    row("KID to real, unseen ± standard error", "kid", lambda pair: f"{pair[0]:.3f} ± {pair[1]:.3f}")
    row("PSNR, dB", "psnr", lambda value: f"{value:.1f}")
    row("SSIM", "ssim", lambda value: f"{value:.3f}")
    row("steps at edges of tokens, over those elsewhere", "edges", lambda value: f"{value:.2f}")
    for which, masks in (("within", "one mask"), ("between", "two masks")):
        for space in ("features", "pixels"):

            def relative(found: Any, which: str = which, space: str = space) -> str:
                value = found[space][which]
                return percent(None if value is None else value / apart[space])

            row(f"difference of two under {masks}, {space}, % of real", "differences", relative)
    row("nearest training image, median, grey levels", "copies", lambda found: f"{found['median']['pixels']:.1f}")
    for space in ("pixels", "features"):
        label = f"nearer to training than 99 % of real, unseen: {space}, %"
        row(label, "copies", lambda found, space=space: percent(found["share_nearer"][space]))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("recipe", help="recipe that it was trained by: data, sampling, steering, segmentor")
    parser.add_argument("--data", type=Path, help="folder of the tiles")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, help="unseen masks, spread evenly (default: all of validation and test)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="paintings of every mask (default: 0 1)")
    parser.add_argument("--steering", type=Path, help="segmentor for CRFM, trained on no more than the model was")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--ruler", action="append", default=[], metavar="KEY=VALUE", help="change it for the ruler")
    parser.add_argument("--base", help="recipe of the model's base, whose windows are training images, too")
    parser.add_argument("--base-data", type=Path, help="folder of these images")
    arguments = parser.parse_args(argv)
    try:
        results = measure(arguments)
    except TerraSynthError as error:
        sys.exit(str(error))
    write_json(arguments.out / "quality.json", results)
    text = table(results["sets"], results["classes"])
    with atomic_write(arguments.out / "quality.md") as partial:
        partial.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
