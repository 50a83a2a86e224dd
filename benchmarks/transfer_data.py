"""The folders of a transfer study: labels in one place, the map wanted in another.

    python benchmarks/transfer_data.py dubai OUT --source DUBAI --target DRONEDEPLOY
    python benchmarks/transfer_data.py world OUT [--seed 100]
    python benchmarks/transfer_data.py ruler OUT

`dubai`: satellite tiles of Dubai (MBRSC) to drone tiles of DroneDeploy's benchmark, in the four classes that both have;
clutter and cars are left unlabelled. Dubai's pixels are about half a metre (0.3 to 1 m), DroneDeploy's 0.1 m: of
Dubai's tiles come two windows as they are, DroneDeploy's are shrunk, so that a pixel is about the same ground.
`world`: procedural scenes of a temperate region to those of a tropical one, which the packaged base model has never
seen. `ruler`: labelled scenes of both regions, none of them in `world`, for a segmentor that judges what is painted.

Written are images/ and masks/ of `train` and `validation` (source) and `test` (target), the target's unlabelled images
in images/target, and classes.yaml. No label of the target leaves `test`. `benchmarks/transfer.yaml` reads both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from terrasynth.data.folder import Tiles, load_tiles
from terrasynth.data.read import read_image
from terrasynth.data.schema import LabelSchema
from terrasynth.recipe import DataConfig, WorldConfig

CLASSES = LabelSchema(
    ("building", "ground", "vegetation", "water"), ((60, 16, 152), (230, 210, 170), (80, 160, 60), (60, 120, 220))
)
#: Indices of both data sets to those of `CLASSES`; all others are unlabelled.
COMMON = {"dubai": {0: 0, 1: 1, 2: 1, 3: 2, 4: 3}, "dronedeploy": {0: 0, 4: 1, 2: 2, 3: 3}}
#: Side of scenes and windows; other tiles are shrunk to it.
SIDE = 64
#: Of the windows on the diagonal of a tile of Dubai.
CORNERS = (32, 160)
#: Region, how many, seed, folder, and whether the labels are written.
SCENES = {
    "world": (
        ("temperate", 64, 0, "train", True),
        ("temperate", 48, 1, "validation", True),
        ("tropical", 256, 2, "target", False),
        ("tropical", 128, 3, "test", True),
    ),
    "ruler": (
        ("temperate", 128, 4, "train", True),
        ("tropical", 128, 5, "train", True),
        ("temperate", 32, 6, "validation", True),
        ("tropical", 32, 7, "validation", True),
        ("temperate", 64, 8, "test", True),
        ("tropical", 64, 9, "test", True),
    ),
}


def copy(
    root: Path,
    names: Sequence[str],
    split: str,
    folder: str,
    out: Path,
    common: dict[int, int] | None,
    corners: Sequence[int] | None,
) -> None:
    """Copy tiles, or windows of `SIDE` pixels at `corners`; with `common`, their masks too, in other indices."""
    lookup = np.full(256, CLASSES.ignore_index, np.uint8)
    for old, new in (common or {}).items():
        lookup[old] = new
    for name in names:
        (path,) = (root / "images" / split).glob(f"{name}.*")
        pixels = {"images": read_image(path)}
        if common is not None:
            pixels["masks"] = lookup[np.asarray(Image.open(root / "masks" / split / f"{name}.png"))]
        for kind, values in pixels.items():
            for number, corner in enumerate(corners or [0]):
                window = values if corners is None else values[corner : corner + SIDE, corner : corner + SIDE]
                save(out / kind / folder / f"{name}{'' if corners is None else f'-{number}'}.png", window)


def save(path: Path, pixels: np.ndarray) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def scenes(region: str, count: int, seed: int) -> Tiles:
    """Procedural scenes."""
    world = WorldConfig(region=region, gsd=1.0, train=count, seed=seed)
    return load_tiles(DataConfig(kind="world", image_size=SIDE, world=world), "train")


def main() -> None:
    """Write one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("dubai", *SCENES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, help="folder of the Dubai tiles")
    parser.add_argument("--target", type=Path, help="folder of the DroneDeploy tiles")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other scenes of the same regions")
    options = parser.parse_args()
    if options.what == "dubai":
        if options.source is None or options.target is None:
            parser.error("dubai needs --source and --target")
        for root, name, split, folder, labelled in (
            (options.source, "dubai", "train", "train", True),
            (options.source, "dubai", "val", "validation", True),
            (options.target, "dronedeploy", "train", "target", False),
            (options.target, "dronedeploy", "test", "test", True),
        ):
            names = (root / f"{split}.txt").read_text().split()
            # Half a metre a pixel in both: tiles of 0.1 m are shrunk whole, to a fifth.
            corners = CORNERS if name == "dubai" else None
            copy(root, names, split, folder, options.out, COMMON[name] if labelled else None, corners)
        CLASSES.to_yaml(options.out / "classes.yaml")
        return
    for region, count, seed, folder, labelled in SCENES[options.what]:
        tiles = scenes(region, count, options.seed + seed)
        prefix = f"{region}-" if options.what == "ruler" else ""  # both regions in one folder
        for name, image, mask in zip(tiles.ids, tiles.images.movedim(1, -1), tiles.masks, strict=True):
            save(options.out / "images" / folder / f"{prefix}{name}.png", image.numpy())
            if labelled:
                save(options.out / "masks" / folder / f"{prefix}{name}.png", mask.numpy())
        tiles.schema.to_yaml(options.out / "classes.yaml")


if __name__ == "__main__":
    main()
