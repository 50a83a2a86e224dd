"""At which frequencies are the errors of class maps, and which of them does refinement mend?

    python benchmarks/error_spectrum.py DATA --out OUT --picture FILE

`OUT` is that of `boundaries.py`. The error of a class is the difference of its predicted and its true mask, -1, 0 or 1;
what is shown is the power of these errors by radial frequency, over all classes, test tiles and seeds, and how much of
the rough map's is left. A wavelength of 16 px is a frequency of 1/16 a pixel: whole objects are to the left of it,
boundaries to the right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from boundaries import SEGMENTORS, data
from terrasynth.data.folder import Tiles
from terrasynth.io import atomic_write, read_json
from terrasynth.training.units import stored_tensors

#: Octaves of the wavelength, in pixels.
WAVELENGTHS = (128, 64, 32, 16, 8, 4, 2)


def spectrum(maps: Tensor, tiles: Tiles) -> NDArray[np.float64]:
    """Power of the errors at every whole frequency, in cycles a tile, over all classes.

    Its sum is the mean square of an error. Half a cycle a pixel is S / 2; what is beyond lies in the plane's corners.
    """
    size = tiles.masks.shape[-1]
    rows, columns = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    rings = np.rint(size * np.hypot(rows, columns)).astype(int)
    # rfft has one half of the plane: what lies inside counts for both.
    twice = np.where((columns == 0) | (columns == 0.5), 1.0, 2.0)
    power = np.zeros(rings.max() + 1)
    for found, truth in zip(maps.numpy(), tiles.masks.numpy(), strict=True):
        known = truth != tiles.schema.ignore_index
        for k in range(tiles.schema.num_classes):
            error = ((found == k).astype(np.float32) - (truth == k)) * known
            power += np.bincount(
                rings.ravel(), weights=(twice * np.abs(np.fft.rfft2(error)) ** 2).ravel(), minlength=len(power)
            )
    return power / len(maps) / size**4


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    tiles = data(options.data, "test", 256)
    results = read_json(options.out / "results.json")
    figure, axes = plt.subplots(2, len(SEGMENTORS), figsize=(10, 6), sharex=True, squeeze=False)
    for column, name in enumerate(SEGMENTORS):
        power = {
            what: np.mean(
                [spectrum(stored_tensors(Path(one["folder"]) / "maps.safetensors")["maps"], tiles) for one in seeds], 0
            )
            for what, seeds in results[name]["rows"].items()
            if "," not in what
        }
        # Beyond half a cycle a pixel there are the plane's corners alone.
        power = {what: values[: tiles.masks.shape[-1] // 2 + 1] for what, values in power.items()}
        frequency = np.arange(1, len(power["rough map"])) / tiles.masks.shape[-1]
        for what, values in power.items():
            style = {"color": "black"} if what == "rough map" else {"linewidth": 2.2 if what == "IDGBR" else 1}
            axes[0, column].loglog(frequency, values[1:], label=what, **style)
            axes[1, column].semilogx(frequency, values[1:] / power["rough map"][1:], **style)
        axes[0, column].set_title(f"rough maps of a {name}")
        axes[1, column].set_xticks([1 / w for w in WAVELENGTHS], [f"{w}" for w in WAVELENGTHS])
        axes[1, column].set_xlabel("wavelength in pixels")
        axes[1, column].set_xlim(right=0.5)
        axes[1, column].set_ylim(0, 1.5)
        axes[1, column].minorticks_off()
        print(f"\n| {name}, wavelength | {' | '.join(f'{2 * w}-{w}' for w in WAVELENGTHS)} |")
        print(f"|---|{'--:|' * len(WAVELENGTHS)}")
        for what, values in power.items():
            bands = [(frequency > 1 / (2 * w)) & (frequency <= 1 / w) for w in WAVELENGTHS]
            left = [values[1:][band].sum() / power["rough map"][1:][band].sum() for band in bands]
            print(f"| {what} | {' | '.join(f'{share:.2f}' for share in left)} |")
    axes[0, 0].set_ylabel("power of the error")
    axes[1, 0].set_ylabel("of the rough map's")
    lines, names = axes[0, -1].get_legend_handles_labels()
    figure.legend(lines, names, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    with atomic_write(options.picture) as partial:
        figure.savefig(partial, dpi=110, format="png")


if __name__ == "__main__":
    main()
