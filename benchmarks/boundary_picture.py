"""The picture of `docs/results/boundaries.md`: maps before and after, of test tiles that nobody picked.

    python benchmarks/boundary_picture.py DATA --out OUT --picture FILE [--segmentor U-Net] [--rival DenseCRF]

`OUT` is that of `boundaries.py`. The middle of test tiles is shown, at twice its size, of the first seed. Of the tiles
whose middle has no class on more than nine tenths of it, put in order by how many more pixels are right afterwards than
before, it is those that a tenth, a third, a half, two thirds and nine tenths of them are not above.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from boundaries import SEGMENTORS, data
from terrasynth.data.sheet import contact_sheet
from terrasynth.io import atomic_write, read_json
from terrasynth.systems.satsynth import class_shares
from terrasynth.training.units import stored_tensors

QUANTILES = (0.1, 1 / 3, 0.5, 2 / 3, 0.9)
SIDE = 128
#: A middle of which a class has more has next to no boundary to look at.
MOST = 0.9


def main() -> None:
    """Choose and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--segmentor", choices=tuple(SEGMENTORS), default="U-Net")
    parser.add_argument("--rival", default="DenseCRF")
    options = parser.parse_args()
    tiles = data(options.data, "test", 256)
    rows = read_json(options.out / "results.json")[options.segmentor]["rows"]
    maps: dict[str, Tensor] = {
        what: stored_tensors(Path(rows[what][0]["folder"]) / "maps.safetensors")["maps"]
        for what in ("rough map", options.rival, "IDGBR")
    }
    known = tiles.masks != tiles.schema.ignore_index
    right = {what: ((found == tiles.masks) & known).flatten(1).sum(1) for what, found in maps.items()}
    edge = (tiles.masks.shape[-1] - SIDE) // 2
    middle = slice(edge, edge + SIDE)
    varied = class_shares(tiles.masks[:, middle, middle], tiles.schema.num_classes).amax(1) <= MOST
    order = (right["IDGBR"] - right["rough map"]).argsort(stable=True)
    order = order[varied[order]]
    shown = [int(order[round(quantile * (len(order) - 1))]) for quantile in QUANTILES]
    pictures = {"image": tiles.images[shown][..., middle, middle]}
    for what, found in maps.items():
        colored = torch.from_numpy(tiles.schema.to_color(found[shown][..., middle, middle]))
        pictures[what] = colored.movedim(-1, 1)
    captions = [
        f"{100 * int(right['rough map'][row]) / int(known[row].sum()):.1f} % right -> "
        f"{100 * int(right['IDGBR'][row]) / int(known[row].sum()):.1f} %"
        for row in shown
    ]
    sheet = contact_sheet(
        pictures, tiles.masks[shown][..., middle, middle], tiles.schema, zoom=2, legend=True, captions=captions
    )
    with atomic_write(options.picture) as partial:
        sheet.save(partial, format="png")


if __name__ == "__main__":
    main()
