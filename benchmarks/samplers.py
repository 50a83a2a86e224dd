r"""How few evaluations of the network paint as well as the published 23 steps of Euler?

    python benchmarks/samplers.py MODEL demo --set data.world.validation=64 --ruler SEGMENTOR

The same masks, those of the validation tiles, and the same seeds for every row. The ruler, a segmentor trained on many
real tiles, reads the paintings: its mIoU against the masks is the agreement. KID is the kernel distance to the real
tiles (whitened random features), sharpness the deviation of every pixel from its 3 x 3 surroundings, relative to the
real tiles; colour is how far the mean grey value of a class is from its own in the real tiles, of 255, averaged over
the classes. The last rows are real tiles after the autoencoder, and as they are. Evaluations count guidance.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from terrasynth.data.folder import load_tiles
from terrasynth.recipe_io import load_recipe
from terrasynth.sampling.flow import Solver
from terrasynth.sampling.guidance import guidance_chain, is_guided
from terrasynth.study.quality import kid, random_features, whitening
from terrasynth.systems.generate import load_pipeline
from terrasynth.tasks.confusion import Confusion
from terrasynth.tasks.segmentation import Segmentor


class Row(NamedTuple):
    """Settings of a sampling."""

    solver: Solver
    steps: int
    shift: float
    mask_scale: float
    interval: tuple[float, float] = (0.0, 1.0)


ROWS = (
    Row("euler", 23, 3.0, 1.5),
    Row("euler", 8, 3.0, 1.5),
    Row("adams", 8, 3.0, 1.5),
    Row("adams", 8, 1.0, 1.5),
    Row("adams", 6, 1.0, 1.5),
    Row("adams", 12, 1.0, 1.5),
    Row("adams", 23, 1.0, 1.5),
    Row("adams", 8, 1.0, 1.0),
    Row("adams", 8, 1.0, 2.0),
    Row("adams", 8, 1.0, 2.0, (0.2, 0.8)),
    Row("adams", 6, 1.0, 2.0, (0.2, 0.8)),
    Row("adams", 5, 1.0, 2.0, (0.2, 0.8)),
    Row("adams", 8, 1.0, 3.0, (0.2, 0.8)),
    Row("adams", 6, 1.0, 3.0, (0.2, 0.8)),
    Row("adams", 5, 1.0, 3.0, (0.2, 0.8)),
    Row("adams", 4, 1.0, 3.0, (0.2, 0.8)),
)


def detail(images: Tensor) -> float:
    """Deviation of grey values (0..255) from the mean of their 3 x 3 surroundings."""
    grey = images.float().mean(1, keepdim=True)
    return (grey - F.avg_pool2d(F.pad(grey, [1] * 4, mode="replicate"), 3, 1)).std().item()


def shades(images: Tensor, masks: Tensor, classes: int) -> Tensor:
    """Mean grey value (0..255) of every class; NaN where it is absent."""
    grey = images.float().mean(1)
    return torch.stack([grey[masks == k].mean() for k in range(classes)])


@torch.no_grad()
def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ruler", type=Path, required=True)
    arguments = parser.parse_args()
    loaded = load_recipe(arguments.recipe, arguments.set, data=arguments.data)
    tiles = load_tiles(loaded.recipe.data, "validation", base=loaded.base)
    ruler = Segmentor.from_pretrained(arguments.ruler, schema=tiles.schema)
    pipeline = load_pipeline(arguments.model)
    ruler.check_schema(pipeline.schema)
    batch_size, every = loaded.recipe.sampling.batch_size, torch.arange(len(tiles))
    real = random_features(tiles.images)
    whiten = whitening(real)

    def measured(images: Tensor) -> str:
        confusion = Confusion.empty(ruler.num_classes)
        for pixels, masks in zip(images.split(16), tiles.masks.split(16), strict=True):
            confusion.update(ruler.predict(pixels.float() / 255), masks, tiles.schema.ignore_index)
        value, error = kid(whiten(real), whiten(random_features(images)), every, every)
        distance = "–" if images is tiles.images else f"{value:.2f} ± {error:.2f}"
        shift = [shades(pictures, tiles.masks, ruler.num_classes) for pictures in (images, tiles.images)]
        colour = (shift[0] - shift[1]).abs().nanmean()
        sharpness = detail(images) / detail(tiles.images)
        return f"{100 * confusion.mean_iou:.1f} | {distance} | {sharpness:.2f} | {colour:.1f}"

    print("| solver | steps | shift | guidance | evaluations | agreement | KID | sharpness | colour | tiles/s |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for row in ROWS:
        levels: list[float] = []
        begun = time.perf_counter()
        painted = [
            pipeline(
                tiles.masks[rows].long(),
                seeds=rows.tolist(),
                num_inference_steps=row.steps,
                solver=row.solver,
                shift=row.shift,
                mask_scale=row.mask_scale,
                guidance_interval=row.interval,
                callback=lambda step, _, levels=levels: levels.append(step.sigma),
                precision="auto",
                output_type="pt",
            ).images
            for rows in every.split(batch_size)
        ]
        speed = len(tiles) / (time.perf_counter() - begun)
        guided = sum(is_guided(sigma, row.interval) for sigma in levels[: row.steps])
        evaluations = row.steps + guided * (len(guidance_chain({"text": 1.0, "mask": row.mask_scale})) - 1)
        within = "" if row.interval == (0, 1) else " within {:g}–{:g}".format(*row.interval)
        settings = f"{row.solver} | {row.steps} | {row.shift:g} | {row.mask_scale:g}{within} | {evaluations}"
        print(f"| {settings} | {measured((torch.cat(painted) * 255).round().byte())} | {speed:.1f} |", flush=True)
    print(f"| real, reconstructed | | | | | {measured(pipeline.reconstruct(tiles.images))} | |")
    print(f"| real | | | | | {measured(tiles.images)} | |")


if __name__ == "__main__":
    main()
