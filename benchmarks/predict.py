"""How much of the time of `terrasynth predict` is the network, and how much memory a scene needs.

    python benchmarks/predict.py [--side 4000] [--classes 6]

A scene of 8-bit noise is written to a temporary folder and mapped; then the bare network computes the same windows in
the same batches. The segmentor is the one of `dubai16-tiny`, with random weights: its time does not depend on them. One
thread; times are CPU times, so that other work on the machine does not count. Memory is the most that the process held:
after one batch of the bare network, and after the whole scene.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TERRASYNTH_QUIET", "1")

import numpy as np
import rasterio
import torch
from affine import Affine

from terrasynth.data.blending import cover
from terrasynth.recipe_io import load_recipe
from terrasynth.tasks.predict import PredictSettings, predict
from terrasynth.tasks.segmentation import Segmentor


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def peak() -> float:
    """The most memory that this process held so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def write_scene(path: Path, side: int) -> None:
    """Noise in stripes of 512 rows, stored in blocks of 512 x 512."""
    random = np.random.default_rng(0)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "tiled": True}
    profile |= {"blockxsize": 512, "blockysize": 512, "crs": "EPSG:32640", "transform": Affine(1, 0, 9, 0, -1, 9)}
    with rasterio.open(path, "w", **profile) as file:
        for top in range(0, side, 512):
            rows = min(512, side - top)
            window = rasterio.windows.Window(0, top, side, rows)
            file.write(random.integers(0, 256, (3, rows, side), dtype=np.uint8), window=window)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=4000, help="of the scene, in pixels")
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = PredictSettings(size=options.size, overlap=options.size // 4)
    config = load_recipe("dubai16-tiny").recipe.segmentor
    with tempfile.TemporaryDirectory() as name:
        folder, scene = Path(name), Path(name, "scene.tif")
        segmentor = Segmentor.build(config, options.classes)
        segmentor.save_pretrained(folder / "segmentor")
        write_scene(scene, options.side)
        batch = torch.rand(settings.batch_size, 3, settings.size, settings.size)

        def bare(images: int) -> None:
            with torch.inference_mode():
                segmentor(batch[:images])

        bare(settings.batch_size)
        before = peak()
        mapped = seconds(lambda: predict(folder / "segmentor", [scene], folder / "map.tif", settings))
        after = peak()
        axis = cover(options.side, settings.size, settings.overlap)
        full, rest = divmod(len(axis.starts), settings.batch_size)
        row = [settings.batch_size] * full + [rest] * (rest > 0)
        network = seconds(lambda: [bare(images) for images in row * len(axis.starts)])
    windows = len(axis.starts) ** 2
    print(f"{options.side} x {options.side} pixels, {windows} windows of {settings.size}, {options.classes} classes")
    print(f"terrasynth predict  {mapped:7.1f} s  {windows / mapped:6.2f} windows/s")
    print(f"bare network        {network:7.1f} s  {windows / network:6.2f} windows/s")
    print(f"ratio of the rates  {network / mapped:7.2f}")
    print(f"memory              {before:7.0f} MiB with one batch, {after:.0f} MiB with the scene")


if __name__ == "__main__":
    main()
