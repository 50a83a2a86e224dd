"""Which mask coding makes the generator obey its masks? The default of `generator.mask_coding` is chosen by this.

The same procedural tiles, budget and seeds for every coding; only the coding differs. A segmentor trained on many other
tiles of the same world (it is a ruler here, and steers nothing) reads every painted tile; its mIoU against the mask
that was painted is the agreement. On real tiles that it has not seen the same segmentor gives the ceiling.

A last row has the default coding with SD3's positional table in place of ours.

    python benchmarks/mask_coding.py --seeds 2 --steps 600
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from diffusers.models.embeddings import PatchEmbed
from torch import Tensor

from terrasynth.data.folder import load_synthetic, load_tiles
from terrasynth.models import mmdit
from terrasynth.recipe_io import load_recipe
from terrasynth.systems.fit import fit_generator
from terrasynth.systems.generate import load_pipeline, paint, plan
from terrasynth.tasks.segmentation import Segmentor, fit

OURS = mmdit._position_table
ROWS = ("onehot", "bits", "grey", "onehot, SD3's positions")


def sd3_positions(side: int, width: int) -> Tensor:
    """The table of diffusers' `PatchEmbed` for a positional grid twice as large as the latents, as SD3 has it."""
    embed = PatchEmbed(height=side // 2, width=side // 2, patch_size=1, embed_dim=width, pos_embed_max_size=side)
    return embed.pos_embed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--count", type=int, default=64, help="painted tiles per coding and seed")
    arguments = parser.parse_args()

    recipe = load_recipe(Path(__file__).with_name("scratch.yaml")).recipe
    tiles = load_tiles(recipe.data, "train")
    validation = load_tiles(recipe.data, "validation")
    many = recipe.data.model_copy(update={"world": recipe.data.world.model_copy(update={"train": 512, "seed": 1})})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = recipe.segmentor.model_copy(
            update={"train": recipe.segmentor.train.model_copy(update={"steps": 1000, "batch_size": 16})}
        )
        ruler = Segmentor.build(config, tiles.schema.num_classes, seed=0, class_names=tiles.schema.names)
        fit(ruler, load_tiles(many, "train"), validation, config, root / "ruler", seed=0, label="training the ruler")
        known = 100 * ruler.evaluate(validation).mean_iou
        print(f"\nagreement of the ruler with the validation tiles, which chose its best step: {known:.1f}\n")
        print("| mask coding | agreement, mIoU % (each seed) | mean | training s |\n|---|---|---|---|")
        for row in ROWS:
            coding = row.partition(",")[0]
            mmdit._position_table = sd3_positions if coding != row else OURS
            scores, begun = [], time.monotonic()
            for seed in range(arguments.seeds):
                train = recipe.generator.train.model_copy(
                    update={"steps": arguments.steps, "evaluate_every": arguments.steps}
                )
                generator = recipe.generator.model_copy(update={"mask_coding": coding, "seed": seed, "train": train})
                run = root / f"{ROWS.index(row)}-{seed}"
                fit_generator(tiles, generator, recipe.data, recipe.sampling, run)
                jobs = plan(arguments.count, len(tiles), seed)
                pipeline = load_pipeline(run / "model")
                paint(pipeline, tiles.masks, tiles.ids, jobs, recipe.sampling, run / "set", provenance={})
                scores.append(100 * ruler.evaluate(load_synthetic(run / "set")).mean_iou)
            each = ", ".join(f"{score:.1f}" for score in scores)
            seconds = (time.monotonic() - begun) / arguments.seeds
            print(f"| {row} | {each} | {sum(scores) / len(scores):.1f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
