"""Does the audit find copies of real tiles, and does it raise no alarm on tiles that are none?

Copies of training tiles are planted: flipped or turned at random, zoomed (so much of the side is cut off, anywhere),
brightened by a tenth and compressed as JPEG of quality 70. The alarms that must not be are test tiles against training
tiles, and training tiles against test tiles at the limit that is for real ones. Then the time of one audit.

    python benchmarks/audit.py dubai16 --data tiles/dubai --set data.train.list=train.txt
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from terrasynth.curation.copies import HIGHEST_LIMIT, LEAST_DETAIL, detail, limit, nearest_images, shrink
from terrasynth.data.augment import dihedral
from terrasynth.data.folder import load_tiles
from terrasynth.recipe_io import load_recipe


def copy(image: Tensor, zoom: float, seed: int) -> Tensor:
    """A copy in disguise, as a thumbnail; `image` is uint8 (3, S, S)."""
    random = np.random.default_rng(seed)
    turned = dihedral(image, int(random.integers(8))).permute(1, 2, 0).contiguous().numpy()
    size = len(turned)
    left, top = random.uniform(0, zoom * size, 2)
    box = (left, top, left + (1 - zoom) * size, top + (1 - zoom) * size)
    zoomed = np.asarray(Image.fromarray(turned).resize((size, size), Image.Resampling.BICUBIC, box))
    file = io.BytesIO()
    Image.fromarray((zoomed * 1.1).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=70)
    return shrink(np.asarray(Image.open(file)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    loaded = load_recipe(arguments.recipe, arguments.set, data=arguments.data)
    train, test = (load_tiles(loaded.recipe.data, split, base=loaded.base) for split in ("train", "test"))
    real, unseen = (torch.stack([shrink(i.permute(1, 2, 0).numpy()) for i in tiles.images]) for tiles in (train, test))
    able = detail(real) >= LEAST_DETAIL
    among = nearest_images(real, real, itself=torch.arange(len(real)))
    bound = limit(among.likeness[able & able[among.position]])
    print(f"{len(real)} training tiles, {int((~able).sum())} too plain; limit {bound:.2f}\n")

    print(f"| cut off the side | too plain | of the others, found | at {HIGHEST_LIMIT} |\n|---|---|---|---|")
    originals = torch.arange(len(real))
    for zoom in (0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3):
        copies = torch.stack([copy(image, zoom, seed) for seed, image in enumerate(train.images)])
        found = nearest_images(copies, real)
        judged = (detail(copies) >= LEAST_DETAIL) & able
        right = [(found.position == originals) & (found.likeness >= lowest) for lowest in (bound, HIGHEST_LIMIT)]
        shares = " | ".join(f"{hit[judged].float().mean():.1%}" for hit in right)
        print(f"| {zoom:.0%} | {1 - judged.float().mean():.1%} | {shares} |")

    for name, images, others, lowest in (("test", unseen, real, bound), ("training", real, unseen, HIGHEST_LIMIT)):
        found = nearest_images(images, others)
        judged = (detail(images) >= LEAST_DETAIL) & (detail(others) >= LEAST_DETAIL)[found.position]
        values = found.likeness[judged].sort(descending=True).values
        alarms, plain = int((values >= lowest).sum()), int((~judged).sum())
        print(f"\n{name} tiles: {len(images)}, too plain or near to a plain one {plain}; alarms {alarms}")
        print("likeness of the closest:", ", ".join(f"{value:.2f}" for value in values[:5].tolist()))

    paintings = real[torch.arange(640) % len(real)]
    begun, burned = time.monotonic(), time.process_time()
    together = torch.cat([paintings, real])
    nearest_images(together, real, itself=torch.cat([torch.full((640,), -1), torch.arange(len(real))]))
    nearest_images(paintings, paintings, itself=torch.arange(640))
    spent = time.monotonic() - begun, time.process_time() - burned
    print(f"\n640 images against {len(real)} and each other: {spent[0]:.0f} s ({spent[1]:.0f} s of processor)")


if __name__ == "__main__":
    main()
