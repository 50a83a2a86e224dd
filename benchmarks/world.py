"""How many tiles of the procedural world one core renders in a second.

    python benchmarks/world.py

Times are CPU times, so that other work on the machine does not count. The yardstick, Gaussian noise and a Gaussian blur
at the same size, is measured in the same run: the ratio to it travels between machines better than a rate does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from terrasynth.data.world import REGIONS, render


def seconds_per_call(call: Callable[[int], object], count: int) -> float:
    """CPU seconds per call over `count` calls, the smallest of three rounds."""
    rounds = []
    for _ in range(3):
        start = time.process_time()
        for seed in range(count):
            call(seed)
        rounds.append((time.process_time() - start) / count)
    return min(rounds)


def yardstick(seed: int, size: int) -> np.ndarray:
    """Blurred noise, (size, size, 3) uint8."""
    noise = np.random.default_rng(seed).normal(128, 40, size=(size, size, 3)).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.0)))


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--gsd", type=float, default=0.5)
    parser.add_argument("--count", type=int, default=100, help="tiles per round")
    options = parser.parse_args()
    # The noise and the crowns that all tiles share are made once.
    for region in REGIONS:
        for seed in range(10):
            render(10_000 + seed, size=options.size, gsd=options.gsd, region=region)
    base = seconds_per_call(lambda seed: yardstick(seed, options.size), options.count)
    print(f"{options.size} x {options.size} pixels, {options.gsd} m per pixel, one core, CPU time")
    print(f"{'blurred noise':14s} {1 / base:8.0f} tiles/s")
    for region in REGIONS:
        each = seconds_per_call(
            lambda seed, region=region: render(seed, size=options.size, gsd=options.gsd, region=region), options.count
        )
        print(f"{region:14s} {1 / each:8.0f} tiles/s  {each / base:6.1f} x the time of blurred noise")


if __name__ == "__main__":
    main()
