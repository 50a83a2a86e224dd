"""Writing a synthetic dataset so that a killed run loses nothing and a finished one says what it is.

The folder is a Hugging Face image folder (`load_dataset(folder)` gives columns `image`, `mask` and the fields of the
row), and stays one while it grows:

    .terrasynth.json    whose folder this is: the settings that every sample depends on
    schema.json         the classes
    masks/ID.png        what the schema stores for the classes (their indices, usually), with its colours as palette
    images/ID.png       RGB; its text chunks say `synthetic=1` and hold the sample's row
    metadata.jsonl      the rows, and
    README.md           the dataset card: written by `finish`

A sample exists once its image does: the mask is written first, each file appears whole or not at all, and the row
travels inside the image. So whenever a run is killed, the same run started again yields the same files as one that was
not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError, changes, flat
from terrasynth.io import atomic_write, open_image, read_json, remove_incomplete, write_json

__all__ = ["SyntheticWriter", "read_manifest"]

_MARKER = ".terrasynth.json"
_ROW = "terrasynth"
_REBUILD = "run the command that painted it again: it adds what is missing"


class SyntheticWriter:
    """Writes one synthetic dataset, sample by sample.

    Args:
        folder: new, empty, or begun with the same `plan` and `schema`.
        schema: the classes of the masks.
        plan: everything that the samples depend on, as JSON-able values; shown in the dataset card.
        title: heading of the dataset card.
        license: SPDX or Hugging Face identifier of the licence of the images, for the card.

    Raises:
        TerraSynthError: the folder holds something else, or samples of another plan.
    """

    def __init__(
        self,
        folder: str | Path,
        schema: LabelSchema,
        *,
        plan: Mapping[str, Any],
        title: str = "Synthetic remote-sensing tiles",
        license: str = "unknown",
    ) -> None:
        self.folder = Path(folder)
        self.schema = schema
        self.plan = json.loads(json.dumps({**plan, "schema": schema.to_dict()}))
        self.title = title
        self.license = license
        self._versions = {name: version(name) for name in ("terrasynth", "torch", "diffusers")}
        self._whole: set[str] = set()
        self._claim()
        write_json(self.folder / "schema.json", schema.to_dict())
        for folder in (self.folder, self.folder / "images", self.folder / "masks"):
            folder.mkdir(exist_ok=True)
            remove_incomplete(folder)

    def _claim(self) -> None:
        marker = self.folder / _MARKER
        if self.folder.is_dir() and not marker.exists():
            foreign = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(".terrasynth"))
            if foreign:
                raise TerraSynthError(
                    "the output folder is not empty, and not a synthetic dataset",
                    path=self.folder,
                    found=", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else ""),
                    fix="choose another --out",
                )
        if marker.exists():
            was = read_json(marker).get("plan", {})
            if was != self.plan:
                raise TerraSynthError(
                    "the output folder holds samples of another run",
                    path=self.folder,
                    found="settings that changed (was -> now):\n    " + "\n    ".join(changes(was, self.plan)),
                    expected="the same settings",
                    fix=f"choose another --out, or delete {self.folder}",
                )
        else:
            write_json(marker, {"format": "terrasynth synthetic dataset", "version": 1, "plan": self.plan})

    def done(self) -> set[str]:
        """The ids of the samples that are complete: image and mask decode, and belong together.

        A pair of which a file does not decode is deleted, so that it is painted again. A sample is decoded once in the
        life of the writer.
        """
        there = {path.stem for path in (self.folder / "images").glob("*.png")}
        self._whole &= there
        self._whole |= {id for id in there - self._whole if self._check(id)}
        return set(self._whole)

    def _check(self, id: str) -> bool:
        image, mask = (self.folder / kind / f"{id}.png" for kind in ("images", "masks"))
        if not mask.is_file():
            return False
        try:
            shapes = [open_image(path).values.shape[:2] for path in (image, mask)]
        except TerraSynthError as error:
            # A file that the system refuses to give may be whole; what a decoder says has no number.
            if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
                raise
            image.unlink()
            mask.unlink()
            return False
        return shapes[0] == shapes[1] and _read_row(image) is not None

    def add(self, id: str, image: Tensor, mask: Tensor, row: Mapping[str, Any]) -> None:
        """Commit one sample: image, mask and row appear together.

        Args:
            id: file name without suffix: letters, digits, `.`, `_`, `-`.
            image: uint8 (3, H, W).
            mask: uint8 (H, W), class index or the schema's `ignore_index`.
            row: what the sample came from, JSON-able: seed, source mask, prompt, model, recipe, steering, scores, ...
        """
        if not re.fullmatch(r"\w[\w.-]*", id, flags=re.ASCII):
            raise ValueError(f"not a file name: {id!r}")
        if image.shape[0] != 3 or image.shape[1:] != mask.shape:
            raise ValueError(f"image {tuple(image.shape)} and mask {tuple(mask.shape)} do not belong together")
        indices = self.schema.to_index(mask.cpu().numpy())
        height, width = mask.shape
        names = {"file_name": f"images/{id}.png", "mask_file_name": f"masks/{id}.png", "id": id}
        sizes = {"width": width, "height": height, "versions": self._versions, "synthetic": True}
        full_row = {**names, **row, **sizes}

        picture = Image.fromarray(indices)
        picture.putpalette(self.schema.palette().tobytes())
        with atomic_write(self.folder / names["mask_file_name"]) as partial:
            picture.save(partial)
        text = PngInfo()
        text.add_text("synthetic", "1")
        text.add_text("Software", f"TerraSynth {self._versions['terrasynth']}")
        text.add_text("seed", str(row.get("seed", "")))
        text.add_text(_ROW, json.dumps(full_row, allow_nan=False))
        with atomic_write(self.folder / names["file_name"]) as partial:
            Image.fromarray(image.movedim(0, -1).cpu().numpy()).save(partial, pnginfo=text)
        self._whole.add(id)

    def finish(self) -> Path:
        """Write the dataset card and `metadata.jsonl` for all samples there are, in the order of their ids.

        Returns:
            The folder.
        """
        rows = [row for id in sorted(self.done()) if (row := _read_row(self.folder / "images" / f"{id}.png"))]
        if not rows:
            raise TerraSynthError("nothing was painted", path=self.folder)
        with atomic_write(self.folder / "README.md") as partial:
            partial.write_text(self._card(rows), encoding="utf-8")
        # Last: a folder with this file is a finished one.
        with atomic_write(self.folder / "metadata.jsonl") as partial:
            partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return self.folder

    def _card(self, rows: list[dict[str, Any]]) -> str:
        pixels, tiles = np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64)
        for row in rows:
            counts = np.bincount(open_image(self.folder / row["mask_file_name"]).values.ravel(), minlength=256)
            pixels += counts
            tiles += counts > 0
        names = [*zip(self.schema.stored, self.schema.names, strict=True)]
        names += [(value, "(unlabelled)") for value in self.schema.stored_ignore[:1]]
        classes = "\n".join(
            f"| {value} | {name} | {tiles[value]} | {pixels[value] / pixels.sum():.2%} |" for value, name in names
        )
        settings = {key: value for key, value in self.plan.items() if key != "schema"}
        provenance = "\n".join(f"| {key} | {value} |" for key, value in flat(settings).items())
        front = {
            "license": self.license,
            "pretty_name": self.title,
            "task_categories": ["image-segmentation"],
            "tags": ["synthetic", "remote-sensing", "terrasynth"],
            "size_categories": [_size_category(len(rows))],
            "configs": [{"config_name": "default", "data_files": _DATA_FILES}],
        }
        return _CARD.format(
            front=yaml.safe_dump(front, sort_keys=False),
            title=self.title,
            count=len(rows),
            versions=", ".join(f"{name} {number}" for name, number in self._versions.items()),
            classes=classes,
            ignore=self.schema.stored_ignore[0],
            provenance=provenance,
            license=_UNKNOWN_LICENSE if self.license == "unknown" else self.license,
        )


_DATA_FILES = [{"split": "train", "path": ["metadata.jsonl", "images/*.png", "masks/*.png"]}]
_UNKNOWN_LICENSE = (
    "not stated. It follows from the licences of the training tiles and of the base model: state it before sharing."
)
_CARD = """\
---
{front}---
# {title}

**These images are synthetic.** A generative model painted them from label masks; they show no real place. Every image
says so in its PNG text (`synthetic=1`), together with its seed and its row of `metadata.jsonl`.

{count} samples, each an image (`images/`), its mask (`masks/`, 8-bit values of the classes with a palette; {ignore} is
unlabelled) and a row. Written by {versions}. Licence: {license}

| value | class | tiles | pixels |
|---|---|---|---|
{classes}

## Settings
| setting | value |
|---|---|
{provenance}

## Loading
```python
from datasets import load_dataset                      # columns image, mask, and the row

dataset = load_dataset("path/to/this/folder", split="train")

from terrasynth.data.folder import load_synthetic      # tensors

tiles = load_synthetic("path/to/this/folder")
```
"""


def read_manifest(folder: str | Path) -> tuple[LabelSchema, list[dict[str, Any]]]:
    """The classes and the rows of a finished synthetic dataset.

    Raises:
        TerraSynthError: the folder is no such dataset, is unfinished, or its files and rows do not match.
    """
    folder = Path(folder)
    if not (folder / _MARKER).is_file():
        raise TerraSynthError(
            "not a synthetic dataset", path=folder, expected=f"a folder that TerraSynth wrote, with {_MARKER}"
        )
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise TerraSynthError("the synthetic dataset is not finished", path=folder, fix=_REBUILD)
    try:
        rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
        names = {
            kind: {row[key] for row in rows} for kind, key in (("images", "file_name"), ("masks", "mask_file_name"))
        }
        rows[0]["id"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise TerraSynthError("the rows are damaged", path=metadata, found=repr(error), fix=_REBUILD) from error
    for kind, named in names.items():
        there = {f"{kind}/{path.name}" for path in (folder / kind).glob("*.png")}
        if there != named:
            raise TerraSynthError(
                f"the {kind} and the rows do not match",
                path=folder,
                found=f"{len(named - there)} missing, {len(there - named)} unknown: "
                + ", ".join(sorted(there ^ named)[:5]),
                fix=_REBUILD,
            )
    return LabelSchema.from_dict(read_json(folder / "schema.json"), path=folder / "schema.json"), rows


def _read_row(path: Path) -> dict[str, Any] | None:
    """The row inside a painted PNG; None if it has none, or is damaged before its pixels."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return json.loads(image.info[_ROW])
    except (UnidentifiedImageError, OSError, SyntaxError, KeyError, ValueError):
        return None


def _size_category(count: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if count < limit:
            return name
    return "100K<n<1M"
