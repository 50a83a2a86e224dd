r"""Which stage loses what painted tiles could teach? The same added tiles, from real ones to painted ones.

    python benchmarks/ladder.py MODEL demo --out runs/ladder --more data.world.train=192 --more data.world.seed=4242

`--more` names other labelled tiles: settings of the recipe under which its training split is these. On every rung the
segmentor is trained on the recipe's own tiles with something added, and read on its test tiles:

    real only        nothing
    more, real       the other tiles as they are, mixed in as painted ones are: what perfect paintings would gain
    reconstructed    their images after the autoencoder
    painted          their masks, painted by MODEL
    repainted        as many paintings under turned and zoomed masks of the recipe's own tiles: what a study adds

The difference between two rungs is what the stage between them loses. The other tiles' labels are seen by no generator.
Rungs that are in OUT already are not computed again.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from terrasynth.data.folder import Tiles, check_splits, load_synthetic, load_tiles
from terrasynth.recipe import Recipe
from terrasynth.recipe_io import load_recipe
from terrasynth.systems.generate import Job, load_pipeline, model_digest, paint, plan
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.tasks.segmentation import Segmentor, fit
from terrasynth.training.units import Clock, Unit, do

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def painted(pipeline: TODSynthPipeline, model: str, recipe: Recipe, tiles: Tiles, jobs: list[Job], out: Path) -> Tiles:
    """The paintings of `jobs` under the masks of `tiles`."""
    inputs = {
        "model": model,
        "sampling": recipe.sampling.model_dump(mode="json"),
        "masks": tiles.fingerprint(),
        "caption": pipeline.config.caption,
        "jobs": [[job.seed, job.source, job.view] for job in jobs],
    }

    def work(folder: Path) -> None:
        at = folder / "dataset"
        paint(pipeline, tiles.masks, tiles.ids, jobs, recipe.sampling, at, provenance={"model": model})

    unit = do(out, "painted", inputs, Clock(), work, products=("dataset/metadata.jsonl",))
    return load_synthetic(unit.folder / "dataset")


def cell(recipe: Recipe, splits: dict[str, Tiles], added: Tiles | None, name: str, seed: int, out: Path) -> Unit:
    """The test metrics of one segmentor."""
    config, schema = recipe.segmentor, splits["train"].schema
    inputs = {
        "segmentor": config.model_dump(mode="json"),
        "tiles": {key: tiles.fingerprint() for key, tiles in splits.items()},
        "added": None if added is None else added.fingerprint(),
        "real_fraction": recipe.study.real_fraction,
        "seed": seed,
    }

    def work(folder: Path) -> dict[str, Any]:
        segmentor = Segmentor.build(config, schema.num_classes, schema.ignore_index, seed, class_names=schema.names).to(
            DEVICE
        )
        fit(
            segmentor,
            splits["train"],
            splits["validation"],
            config,
            folder / "training",
            seed=seed,
            synthetic=added,
            real_fraction=recipe.study.real_fraction,
            label=f"{name}, seed {seed}",
        )
        return segmentor.evaluate(splits["test"]).metrics(schema.names)

    return do(out, f"{name} seed {seed}", inputs, Clock(), work, scratch=("training/checkpoints",))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or `terrasynth-tiny`")
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--more", action="append", required=True, metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    loaded = load_recipe(arguments.recipe, arguments.set, data=arguments.data)
    recipe = loaded.recipe
    splits = {name: load_tiles(recipe.data, name, base=loaded.base) for name in ("train", "validation", "test")}
    other = load_recipe(arguments.recipe, arguments.set + arguments.more, data=arguments.data).recipe
    more = load_tiles(other.data, "train", base=loaded.base)
    known = {image.numpy().tobytes() for image in splits["train"].images}
    fresh = [i for i, image in enumerate(more.images) if image.numpy().tobytes() not in known]
    more = replace(more, ids=tuple(more.ids[i] for i in fresh), images=more.images[fresh], masks=more.masks[fresh])
    check_splits(more=more, validation=splits["validation"], test=splits["test"])

    pipeline = load_pipeline(arguments.model).to(DEVICE)
    if pipeline.schema.names != more.schema.names:
        pipeline.adapt(more.schema, recipe.data.caption)
    model = model_digest(arguments.model)
    one_each = [Job(f"{index:06d}", index, index, 0) for index in range(len(more))]
    rungs: dict[str, Tiles | None] = {
        "real only": None,
        "more, real": more,
        "reconstructed": replace(more, images=pipeline.reconstruct(more.images)),
        "painted": painted(pipeline, model, recipe, more, one_each, arguments.out),
        "repainted": painted(
            pipeline, model, recipe, splits["train"], plan(len(more), len(splits["train"]), 0), arguments.out
        ),
    }
    seeds = range(arguments.seeds)
    miou = {
        name: [cell(recipe, splits, added, name, seed, arguments.out).result["miou"] for seed in seeds]
        for name, added in rungs.items()
    }
    print(f"{len(splits['train'])} tiles, {len(more)} added; {len(splits['test'])} test tiles; {len(seeds)} seed(s)\n")
    print("| added | test mIoU | to real only |\n|---|---|---|")
    base = statistics.mean(miou["real only"])
    for name, values in miou.items():
        mean = statistics.mean(values)
        print(f"| {name} | {100 * mean:.1f} | {'–' if name == 'real only' else f'{100 * (mean - base):+.1f}'} |")


if __name__ == "__main__":
    main()
