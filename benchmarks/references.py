r"""Which generator takes the look of a reference, and still obeys the mask? Equal budgets of operations.

    python benchmarks/transfer_data.py world DATA
    python benchmarks/transfer_data.py ruler RULER
    terrasynth study benchmarks/transfer.yaml --data RULER --set study.arms=[{name: ruler}] --set study.seeds=[0] \
        --set data.unlabelled=[] --set generator.reference=null --out RULED
    python benchmarks/references.py DATA --out OUT [--ruler RULED/cells/ruler-seed-0-*/segmentor] [--steps 600]

The labelled tiles and unlabelled images of a transfer study (`benchmarks/transfer.yaml`) train each generator; then
masks of the labelled place are painted in the look of images of the other. The first, terrasynth-tiny, has `--steps`
steps; the others as many as cost the same operations, forward and backward, counted.

    to reference    how far the mean colour of a painted tile is from its reference's, of 255
    to another      the same to the reference of another tile: references do nothing where both are the same
    KID to target, source    kernel distance of painted tiles from the images of both places, in whitened random
                    features of the target's
    agreement       mIoU of painted tiles against their masks, as the ruler reads them: a segmentor of other
                    scenes of both places

Started again, it goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from terrasynth.data.folder import Tiles, load_synthetic, load_tiles, unlabelled_windows
from terrasynth.planning.footprint import count, flops
from terrasynth.recipe import Recipe
from terrasynth.recipe_io import load_recipe
from terrasynth.study.quality import kid, random_features, whitening
from terrasynth.systems.build import build
from terrasynth.systems.fit import fit_generator
from terrasynth.systems.generate import load_pipeline, paint, plan
from terrasynth.tasks.segmentation import Segmentor

_TINY: dict[str, Any] = {"base": "terrasynth-tiny"}
_SCRATCH: dict[str, Any] = {"base": None, "autoencoder": {"channels": 16, "patch_size": 4}, "heads": 6}
GENERATORS: dict[str, dict[str, Any]] = {
    "terrasynth-tiny, references: view": _TINY | {"reference": "view"},
    "terrasynth-tiny, references: augmented": _TINY | {"reference": "augmented"},
    "terrasynth-tiny, no references": _TINY | {"reference": None},
    "MM-DiT from scratch, references: view": _SCRATCH | {"reference": "view"},
    "MM-DiT from scratch, references: augmented": _SCRATCH | {"reference": "augmented"},
    "TISynth's U-Net from scratch, references: view": _SCRATCH
    | {"system": "tisynth", "reference": "view", "heads": 8, "unet": {"widths": [64, 128, 256]}},
    "TISynth's U-Net from scratch, references: augmented": _SCRATCH
    | {"system": "tisynth", "reference": "augmented", "heads": 8, "unet": {"widths": [64, 128, 256]}},
}


def variant(recipe: Recipe, changes: dict[str, Any], steps: int) -> Recipe:
    """The recipe with another generator, without arms."""
    values = recipe.model_dump(mode="json")
    values["generator"] |= changes
    values["generator"]["train"] |= {"steps": steps, "evaluate_every": steps}
    values["study"]["arms"] = [{"name": "real"}]
    if changes.get("system") == "tisynth":
        values["sampling"] |= {"solver": "euler", "shift": None, "steps": 25}
    return Recipe.model_validate(values)


def step_flops(recipe: Recipe, tiles: Tiles) -> int:
    """Operations of a training step, forward and backward."""
    pipeline, size = build(recipe.generator, recipe.data, tiles), recipe.generator.train.batch_size
    images, masks = tiles.images[:size].float() / 255, tiles.masks[:size]
    embeds, pooled = pipeline.prompts(pipeline.captions(masks))
    latents = pipeline.encode_images(images)
    batch = {"latents": latents, "mask": masks, "prompt_embeds": embeds, "pooled": pooled, "seed": torch.arange(size)}
    if recipe.generator.reference is not None:
        batch["reference_latents"] = latents
    with count() as needs:
        pipeline.training_loss(batch).backward()
    return flops(needs.operations)


def saved(recipe: Recipe, tiles: Tiles) -> str:
    """What it saves in the MM-DiT to compute once what the images look at, instead of in every step."""
    pipeline = build(recipe.generator, recipe.data, tiles)
    masks, references = tiles.masks[:1].long(), tiles.images[:1].float() / 255
    with torch.no_grad(), count() as once:
        pipeline.network.reference_features(pipeline.encode_images(references))
    with count() as painting:
        arguments = pipeline.sampling_arguments(recipe.sampling)
        pipeline(masks, references=references, seeds=[0], output_type="pt", **arguments)
    steps, all_steps, features = recipe.sampling.steps, flops(painting.operations), flops(once.operations)
    anew = all_steps + (steps - 1) * features
    return (
        f"painting one tile in {steps} steps: {all_steps / 1e9:.1f} GFLOP, {features / 1e9:.2f} of them for what it "
        f"sees of the reference; computed anew in every step {anew / 1e9:.1f}, so {1 - all_steps / anew:.0%} is saved\n"
    )


def colors(images: torch.Tensor) -> torch.Tensor:
    """Mean colour of each, (N, 3)."""
    return images.float().mean((2, 3))


def main() -> None:
    """Train, paint, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ruler", type=Path, help="folder of a segmentor that reads what is painted")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--count", type=int, default=128, help="how many tiles are painted")
    parser.add_argument("--only", help="generators whose names have this in them")
    options = parser.parse_args()
    opened = load_recipe(str(Path(__file__).parent / "transfer.yaml"), [f"data.root={options.data}"])
    recipe = opened.recipe
    source = load_tiles(recipe.data, "train", base=opened.base)
    target = unlabelled_windows(recipe.data, source.schema)
    assert target is not None
    features = random_features(target.images)
    whiten = whitening(features)
    places = {"target": whiten(features), "source": whiten(random_features(source.images))}
    ruler = None if options.ruler is None else Segmentor.from_pretrained(options.ruler)

    print(saved(variant(recipe, GENERATORS["terrasynth-tiny, references: view"], options.steps), source))
    budget: int | None = None
    rows = []
    for name, changes in GENERATORS.items():
        each = step_flops(variant(recipe, changes, options.steps), source)
        budget = options.steps * each if budget is None else budget
        steps = round(budget / each)
        if options.only is not None and options.only not in name:
            continue
        own = variant(recipe, changes, steps)
        folder = options.out / name.replace(" ", "-").replace(":", "").replace(",", "")
        fit_generator(source, own.generator, own.data, own.sampling, folder, unlabelled=target)
        pipeline, looks = load_pipeline(folder / "model"), own.generator.reference is not None
        jobs = plan(options.count, len(source), 0, len(target))
        references = colors(torch.stack([target.images[job.reference or 0] for job in jobs]))
        # The same generator without the reference, too: what the reference itself does.
        for given, shown in ((target, name), (None, f"{name}, none given"))[: 2 if looks else 1]:
            painted = load_synthetic(
                paint(
                    pipeline,
                    source.masks,
                    source.ids,
                    jobs,
                    own.sampling,
                    folder / ("without" if looks and given is None else "painted"),
                    provenance={"generator": name},
                    references=given if looks else None,
                )
            )
            found = whiten(random_features(painted.images))
            rows.append(
                {
                    "generator": shown,
                    "parameters": sum(p.numel() for p in pipeline.network.parameters()),
                    "steps": steps,
                    "to_reference": (colors(painted.images) - references).abs().mean().item(),
                    "to_another": (colors(painted.images) - references.roll(1, 0)).abs().mean().item(),
                    "kid": {place: kid(there, found) for place, there in places.items()},
                    "agreement": None if ruler is None else ruler.evaluate(painted).mean_iou,
                }
            )
    print(
        "| generator | M parameters | steps | to reference | to another | KID to target | KID to source | agreement |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    for row in rows:
        near, far = (f"{value:.2f} ± {error:.2f}" for value, error in row["kid"].values())
        agreement = "–" if row["agreement"] is None else f"{100 * row['agreement']:.1f}"
        print(
            f"| {row['generator']} | {row['parameters'] / 1e6:.1f} | {row['steps']} | {row['to_reference']:.1f} | "
            f"{row['to_another']:.1f} | {near} | {far} | {agreement} |"
        )


if __name__ == "__main__":
    main()
