"""`terrasynth predict` against the bare network, reading tiles against bare rasterio and Pillow, and the memory taken.

    python benchmarks/predict.py [--side 4000] [--classes 6] [--rounds 3]

Everything works on scenes of noise in a temporary folder. A scene is mapped; the bare network computes the same windows
in the same batches. Windows of the scene are read as `terrasynth prepare` reads them, and by rasterio alone; tiles in
PNG by `io.open_image`, and by Pillow alone. Each pair alternates, so that a busy machine slows both; the ratio is that
of the fastest rounds, once by wall time and once by CPU time, which other work on the machine hardly changes. The
segmentor is the one of `dubai16-tiny`, with random weights: its time does not depend on them. Memory is the most that
the process held: after one batch of the bare network, and after the first scene.
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
from PIL import Image
from rasterio.windows import Window

from terrasynth.data.blending import Axis, cover
from terrasynth.data.raster import Stretch, open_raster
from terrasynth.data.tiling import tiles
from terrasynth.io import gdal_environment, open_image
from terrasynth.recipe_io import load_recipe
from terrasynth.tasks.predict import PredictSettings, predict
from terrasynth.tasks.segmentation import Segmentor

_TILE = 256


def fastest(rounds: int, *calls: Callable[[], object]) -> list[tuple[float, float]]:
    """The least wall and CPU seconds of each of several calls that take turns."""
    taken: list[list[tuple[float, float]]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, taken, strict=True):
            wall, processor = time.perf_counter(), time.process_time()
            call()
            seconds.append((time.perf_counter() - wall, time.process_time() - processor))
    return [(min(wall for wall, _ in seconds), min(processor for _, processor in seconds)) for seconds in taken]


def peak() -> float:
    """The most memory that this process held so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def write_scene(path: Path, side: int, dtype: str, **profile: object) -> None:
    """Noise in stripes of 512 rows, stored in blocks of 512 x 512."""
    random = np.random.default_rng(0)
    profile |= {"width": side, "height": side, "count": 3, "dtype": dtype, "photometric": "RGB", "tiled": True}
    profile |= {"blockxsize": 512, "blockysize": 512, "crs": "EPSG:32640", "transform": Affine(1, 0, 9, 0, -1, 9)}
    with rasterio.open(path, "w", driver="GTiff", **profile) as file:
        for top in range(0, side, 512):
            rows = min(512, side - top)
            # Smooth along rows, or it could not be compressed at all.
            noise = random.integers(0, 256, (3, rows, -(-side // 8))).repeat(8, axis=2)[:, :, :side]
            file.write(noise.astype(dtype), window=Window(0, top, side, rows))


def row(name: str, unit: str, count: int, ours: tuple[float, float], bare: tuple[float, float]) -> str:
    """A line of the table."""
    rates = " | ".join(f"{count / wall:.1f} {unit}/s" for wall, _ in (ours, bare))
    return f"| {name} | {rates} | {bare[0] / ours[0]:.2f} | {bare[1] / ours[1]:.2f} |"


def predicting(folder: Path, options: argparse.Namespace) -> str:
    """The line of `terrasynth predict`, and one on memory."""
    settings = PredictSettings(size=options.size, overlap=options.size // 4)
    segmentor = Segmentor.build(load_recipe("dubai16-tiny").recipe.segmentor, options.classes)
    segmentor.save_pretrained(folder / "segmentor")
    batch = torch.rand(settings.batch_size, 3, settings.size, settings.size)
    axis: Axis = cover(options.side, settings.size, settings.overlap)
    full, rest = divmod(len(axis.starts), settings.batch_size)
    batches = ([settings.batch_size] * full + [rest] * (rest > 0)) * len(axis.starts)

    def bare() -> None:
        with torch.inference_mode():
            for images in batches:
                segmentor(batch[:images])

    def ours() -> None:
        (folder / "map.tif").unlink(missing_ok=True)
        predict(folder / "segmentor", [folder / "8.tif"], folder / "map.tif", settings)

    with torch.inference_mode():
        segmentor(batch)
    before = peak()
    ours()
    memory = f"memory: {before:.0f} MiB with one batch of the network, {peak():.0f} MiB with the scene"
    line = row("predict, against the network", "windows", len(axis.starts) ** 2, *fastest(options.rounds, ours, bare))
    return f"{line}\n{{}}\n\n{memory}"


def reading(path: Path, options: argparse.Namespace, stretch: Stretch, name: str) -> str:
    """The line of the windows of a GeoTIFF."""
    windows = tiles(Window(0, 0, options.side, options.side), _TILE, _TILE, "drop")

    def ours() -> None:
        with open_raster(path) as raster:
            for window in windows:
                stretch.rgb(raster, window)

    def bare() -> None:
        with gdal_environment(), rasterio.open(path) as source:
            for window in windows:
                source.read(window=window)

    return row(name, "tiles", len(windows), *fastest(options.rounds, ours, bare))


def decoding(folder: Path, options: argparse.Namespace) -> str:
    """The line of tiles in PNG."""
    with open_raster(folder / "8.tif") as raster:
        shown = [Stretch().rgb(raster, Window(_TILE * i, 0, _TILE, _TILE))[0] for i in range(options.side // _TILE)]
    paths = [folder / f"{i}.png" for i in range(len(shown))]
    for path, pixels in zip(paths, shown, strict=True):
        Image.fromarray(pixels).save(path)

    def ours() -> None:
        for path in paths:
            _ = open_image(path).values

    def bare() -> None:
        for path in paths:
            with Image.open(path) as image:
                np.asarray(image)

    return row("PNG tiles, against Pillow", "tiles", len(paths), *fastest(10 * options.rounds, ours, bare))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4000, help="of the scene, in pixels")
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--size", type=int, default=512, help="of the windows that are predicted")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scene(folder / "8.tif", options.side, "uint8", compress="deflate")
        write_scene(folder / "16.tif", options.side, "uint16", compress="deflate")
        mapped = predicting(folder, options)
        read = [
            reading(folder / "8.tif", options, Stretch(), "8-bit GeoTIFF windows, against rasterio"),
            reading(
                folder / "16.tif", options, Stretch(None, ((0.0, 255.0),)), "16-bit, stretched, against rasterio alone"
            ),
            decoding(folder, options),
        ]
    print(
        f"{options.side} x {options.side} pixels, windows of {options.size}, tiles of {_TILE}, "
        f"{options.classes} classes, {torch.get_num_threads()} thread(s), best of {options.rounds}\n"
    )
    print("| | TerraSynth | bare | ratio | of CPU time |\n|---|--:|--:|--:|--:|")
    print(mapped.format("\n".join(read)))


if __name__ == "__main__":
    main()
