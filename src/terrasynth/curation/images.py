"""The images that an audit compares: read one after the other, kept as thumbnails and digests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terrasynth.curation.copies import SIDE, shrink
from terrasynth.data.folder import Tiles, read_samples, turn_digest
from terrasynth.data.read import read_image, refuse_bad_files
from terrasynth.data.schema import LabelSchema
from terrasynth.data.write import read_manifest
from terrasynth.errors import TerraSynthError, listed
from terrasynth.io import IMAGE_SUFFIXES, file_digest
from terrasynth.progress import track

__all__ = ["Images", "Labelled", "from_tiles", "joined", "read_folder", "read_painted"]

_Array = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Images:
    """A set of images: what is compared, and how to see one of them whole again.

    Attributes:
        name: of the set.
        ids: N names.
        tiles: the names of the tiles that they show, as `source_mask` of a painted one has them.
        thumbnails: uint8 (N, 3, 64, 64).
        files: digests of the files' bytes; None where there is no file.
        pixels: digests of the pixels, the same for all flips and turns; None for an image of one colour.
        sides: the shorter one of every image, in pixels.
        open: the image at an index, uint8 (H, W, 3).
    """

    name: str
    ids: tuple[str, ...]
    tiles: tuple[str, ...]
    thumbnails: Tensor
    files: tuple[str | None, ...]
    pixels: tuple[str | None, ...]
    sides: tuple[int, ...]
    open: Callable[[int], _Array]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Labelled(Images):
    """A synthetic dataset, the beginning of one, or a split.

    Attributes:
        schema: its classes.
        open_mask: the mask at an index, uint8 (H, W).
        views: of its source mask, which each mask is (`data.augment.view`); None where the metadata do not say it.
        sources: the names of the source masks; None where there are none.
    """

    schema: LabelSchema
    open_mask: Callable[[int], _Array]
    views: tuple[int | None, ...]
    sources: tuple[str | None, ...]


def read_painted(folder: str | Path, count: int | None = None, *, name: str | None = None) -> Labelled:
    """The images of a synthetic dataset, read one after the other.

    Args:
        folder: of the dataset.
        count: how many, from the first; None takes all.
        name: what to call them; by default as the folder.

    Raises:
        TerraSynthError: it is no such dataset, is unfinished, or samples are damaged.
    """
    folder = Path(folder)
    schema, manifest = read_manifest(folder)
    rows = list(manifest)[:count]
    with track(len(rows), f"reading {folder.name}", unit="images") as progress:

        def each() -> Iterator[tuple[str, Path, _Array]]:
            for row, image, _ in read_samples(folder, schema, rows):
                yield row["id"], folder / row["file_name"], image
                progress.advance()

        ids, thumbnails, files, pixels, sides = _described(each())
    views = [row.get("view") for row in rows]
    return Labelled(
        name or folder.name,
        ids,
        ids,
        thumbnails,
        files,
        pixels,
        sides,
        lambda index: read_image(folder / rows[index]["file_name"]),
        schema,
        lambda index: next(read_samples(folder, schema, [rows[index]]))[2],
        tuple(shown if isinstance(shown, int) and shown >= 0 else None for shown in views),
        tuple(row.get("source_mask") for row in rows),
    )


def read_folder(folder: str | Path, name: str | None = None, without: Path | None = None) -> Images:
    """The images that lie directly in a folder, of any size, read one after the other.

    Args:
        folder: of PNG, JPEG or TIFF images of 8 bits a band.
        name: what to call the set; by default as the folder.
        without: a file that is passed over, if it is there.

    Raises:
        TerraSynthError: there are none, or some can not be used: all in one message.
    """
    folder = Path(folder)
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    paths = [path for path in paths if path.resolve() != without]
    if not paths:
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise TerraSynthError(
            "no images here",
            path=folder,
            found=f"the folders {listed(inside)}" if inside else "nothing to compare with",
            expected=f"images directly in the folder: {', '.join(IMAGE_SUFFIXES)}",
            fix="name the folder of the images themselves",
        )
    problems: list[TerraSynthError] = []
    with track(len(paths), f"reading {folder.name}", unit="images") as progress:

        def each() -> Iterator[tuple[str, Path, _Array]]:
            for path in paths:
                try:
                    image = read_image(path)
                except TerraSynthError as error:
                    problems.append(error)
                else:
                    yield path.name, path, image
                progress.advance()

        ids, thumbnails, files, pixels, sides = _described(each())
    # None is left out: what was not compared may be the leak.
    refuse_bad_files(problems, len(paths), f"images of {folder}", skip_bad=False)
    tiles = tuple(Path(id_).stem for id_ in ids)
    return Images(
        name or folder.name,
        ids,
        tiles,
        thumbnails,
        files,
        pixels,
        sides,
        lambda index: read_image(folder / ids[index]),
    )


def from_tiles(name: str, tiles: Tiles) -> Labelled:
    """A split in memory."""
    ids, thumbnails, _, pixels, sides = _described(
        (id_, None, image.permute(1, 2, 0).numpy()) for id_, image in zip(tiles.ids, tiles.images, strict=True)
    )
    nothing = (None,) * len(ids)
    return Labelled(
        name,
        ids,
        ids,
        thumbnails,
        nothing,
        pixels,
        sides,
        lambda index: tiles.images[index].permute(1, 2, 0).numpy(),
        tiles.schema,
        lambda index: tiles.masks[index].numpy(),
        nothing,
        nothing,
    )


def joined(sets: Sequence[Labelled]) -> Labelled:
    """All images of several sets of the same classes as one, each called `SET/NAME`."""
    places = [(of, index) for of in sets for index in range(len(of))]

    def one(name: str) -> tuple[Any, ...]:
        return tuple(getattr(of, name)[index] for of, index in places)

    return Labelled(
        " and ".join(of.name for of in sets),
        tuple(f"{of.name}/{of.ids[index]}" for of, index in places),
        one("tiles"),
        torch.cat([of.thumbnails for of in sets]),
        one("files"),
        one("pixels"),
        one("sides"),
        lambda index: places[index][0].open(places[index][1]),
        sets[0].schema,
        lambda index: places[index][0].open_mask(places[index][1]),
        one("views"),
        one("sources"),
    )


def _described(
    images: Iterable[tuple[str, Path | None, _Array]],
) -> tuple[tuple[str, ...], Tensor, tuple[str | None, ...], tuple[str | None, ...], tuple[int, ...]]:
    ids: list[str] = []
    thumbnails: list[Tensor] = []
    files: list[str | None] = []
    pixels: list[str | None] = []
    sides: list[int] = []
    for id_, path, image in images:
        ids.append(id_)
        thumbnails.append(shrink(image))
        files.append(None if path is None else file_digest(path))
        # Blank tiles are alike everywhere.
        pixels.append(turn_digest(image) if (image != image[:1, :1]).any() else None)
        sides.append(min(image.shape[:2]))
    stacked = torch.stack(thumbnails) if thumbnails else torch.empty(0, 3, SIDE, SIDE, dtype=torch.uint8)
    return tuple(ids), stacked, tuple(files), tuple(pixels), tuple(sides)
