"""The folders of a boundary benchmark: small windows to learn from, whole tiles to be judged by.

    python benchmarks/boundary_data.py dubai OUT --source DUBAI
    python benchmarks/boundary_data.py kampala OUT --source BUILDINGS_KAMPALA

Written are images/ and masks/ of `train` (four windows of 128 px of every tile, as they are), `validation` and `test`
(tiles of 256 px), classes.yaml, and places.json: which training windows show the same ground. Dubai's tiles overlap
within a scene, Kampala's show the same places at three zoom levels. Kampala's come without a validation split: one of
its four training places is one here, with all zoom levels that show it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from terrasynth.data.read import read_image
from terrasynth.data.schema import LabelSchema
from terrasynth.io import write_json

SIDE = 128
SCHEMAS = {
    "dubai": LabelSchema(
        ("building", "land", "road", "vegetation", "water"),
        ((60, 16, 152), (132, 41, 246), (110, 193, 228), (254, 221, 58), (226, 169, 41)),
    ),
    "kampala": LabelSchema(("background", "building"), ((60, 60, 60), (240, 200, 40))),
}


def place(name: str) -> tuple[int, int]:
    """The zoom-19 parent of a web tile: `z20_619224_523267` lies in (309612, 261633)."""
    zoom, x, y = (int(part) for part in name.removeprefix("z").split("_"))
    return x >> (zoom - 19), y >> (zoom - 19)


def splits(what: str, source: Path) -> dict[str, list[str]]:
    """Names of the tiles of each split, and the folder they are in."""
    lists = {split: (source / f"{split}.txt").read_text().split() for split in ("train", "test")}
    if what == "dubai":
        return lists | {"validation": (source / "val.txt").read_text().split()}
    held = sorted({place(name) for name in lists["train"]})[0]
    return {
        "train": [name for name in lists["train"] if place(name) != held],
        "validation": [name for name in lists["train"] if place(name) == held],
        "test": lists["test"],
    }


def main() -> None:
    """Write one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(SCHEMAS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, required=True)
    options = parser.parse_args()
    places: dict[str, str] = {}
    for split, names in splits(options.what, options.source).items():
        for name in names:
            (path,) = options.source.glob(f"images/*/{name}.*")
            (mask,) = options.source.glob(f"masks/*/{name}.png")
            for kind, pixels in (("images", read_image(path)), ("masks", np.asarray(Image.open(mask)))):
                folder = options.out / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                if split != "train":
                    Image.fromarray(pixels).save(folder / f"{name}.png")
                    continue
                for corner in np.ndindex(pixels.shape[0] // SIDE, pixels.shape[1] // SIDE):
                    box = tuple(slice(SIDE * at, SIDE * (at + 1)) for at in corner)
                    window = f"{name}-{corner[0]}{corner[1]}"
                    Image.fromarray(pixels[box]).save(folder / f"{window}.png")
                    places[window] = name.split("_")[0] if options.what == "dubai" else str(place(name))
    SCHEMAS[options.what].to_yaml(options.out / "classes.yaml")
    write_json(options.out / "places.json", places)


if __name__ == "__main__":
    main()
