"""The picture of docs/rasters.md: a mask, its windows painted apart, and painted with `--like`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from terrasynth.data.world import WORLD_SCHEMA, render
from terrasynth.io import atomic_write
from terrasynth.recipe import SamplingConfig
from terrasynth.systems.generate import load_pipeline
from terrasynth.systems.large import paint_large

_SEED = 3
_ROWS, _COLUMNS = 2, 3
_GAP = 6


def main() -> None:
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("docs/images/like.png"))
    arguments = parser.parse_args()
    pipeline = load_pipeline("terrasynth-tiny").to("cuda" if torch.cuda.is_available() else "cpu")
    sampling = SamplingConfig(steps=arguments.steps)
    side = pipeline.config.image_size
    mask = torch.from_numpy(render(_SEED, size=side * _COLUMNS)[1][: side * _ROWS])
    apart = torch.zeros(3, *mask.shape, dtype=torch.uint8)
    for number in range(_ROWS * _COLUMNS):
        row, column = (side * index for index in divmod(number, _COLUMNS))
        window = mask[row : row + side, column : column + side].contiguous()
        apart[:, row : row + side, column : column + side] = paint_large(
            pipeline, window, seed=number, sampling=sampling
        )
    together = paint_large(pipeline, mask, seed=0, sampling=sampling)
    panels = [WORLD_SCHEMA.to_color(mask), *(image.permute(1, 2, 0).numpy() for image in (apart, together))]
    gap = np.full((side * _ROWS, _GAP, 3), 255, dtype=np.uint8)
    row = np.hstack([panels[0], gap, panels[1], gap, panels[2]])
    with atomic_write(arguments.out) as partial:
        Image.fromarray(row).save(partial, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
