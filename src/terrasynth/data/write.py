"""Writing a synthetic dataset so that a killed run loses nothing and a finished one says what it is.

The folder is a Hugging Face image folder (`load_dataset(folder)` gives columns `image`, `mask` and the fields of the
row), and stays one while it grows:

    .terrasynth.json    whose folder this is: the settings that every sample depends on
    schema.json         the classes
    masks/ID.png        what the schema stores for the classes (their indices, usually), with its colours as palette
    images/ID.png       RGB; its text chunks say `synthetic=1` and hold the sample's row
    metadata.jsonl      the rows, and
    README.md           the dataset card: written by `finish`
    scores/, views/     what `terrasynth curate` adds (`data.scores`, `data.view`)

A sample exists once its image does: the mask is written first, each file appears whole or not at all, and the row
travels inside the image. So whenever a run is killed, the same run started again yields the same files as one that was
not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from terrasynth.data.card import Contents, check_license, dataset_card, front_matter
from terrasynth.data.schema import LabelSchema
from terrasynth.data.scores import PNG_KEY, add_scores, read_png_row
from terrasynth.errors import TerraSynthError, changes
from terrasynth.io import atomic_write, open_image, read_json, remove_incomplete, write_json

__all__ = ["Rows", "SyntheticWriter", "read_manifest", "read_plan", "write_rows"]

_MARKER = ".terrasynth.json"
_REBUILD = "run the command that painted it again: it adds what is missing"


class SyntheticWriter:
    """Writes one synthetic dataset, sample by sample.

    Args:
        folder: new, empty, or begun with the same `plan` and `schema`.
        schema: the classes of the masks.
        plan: everything that the samples depend on, as JSON-able values; shown in the dataset card.
        title: heading of the dataset card.
        license: SPDX or Hugging Face identifier of the licence of the images, for the card; None leaves what the card
            says, `unknown` in a new one. No sample depends on it.

    Raises:
        TerraSynthError: the folder holds something else, or samples of another plan; or that is no identifier.
    """

    def __init__(
        self,
        folder: str | Path,
        schema: LabelSchema,
        *,
        plan: Mapping[str, Any],
        title: str = "Synthetic remote-sensing tiles",
        license: str | None = None,
    ) -> None:
        if license is not None:
            check_license(license)
        self.folder = Path(folder)
        self.schema = schema
        self.plan = json.loads(json.dumps({**plan, "schema": schema.to_dict()}))
        self.title = title
        self._versions = {name: version(name) for name in ("terrasynth", "torch", "diffusers")}
        self._whole: set[str] = set()
        self._claim()
        # Now, and not after hours of painting, because this reads what somebody may have edited.
        self.license = license or front_matter(self.folder).get("license", "unknown")
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
        return shapes[0] == shapes[1] and read_png_row(image) is not None

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
        names = _names(id)
        sizes = {"width": width, "height": height, "versions": self._versions, "synthetic": True}
        full_row = {**names, "id": id, **row, **sizes}

        picture = Image.fromarray(indices)
        picture.putpalette(self.schema.palette().tobytes())
        with atomic_write(self.folder / names["mask_file_name"]) as partial:
            picture.save(partial)
        text = PngInfo()
        text.add_text("synthetic", "1")
        text.add_text("Software", f"TerraSynth {self._versions['terrasynth']}")
        text.add_text("seed", str(row.get("seed", "")))
        text.add_text(PNG_KEY, json.dumps(full_row, allow_nan=False))
        with atomic_write(self.folder / names["file_name"]) as partial:
            Image.fromarray(image.movedim(0, -1).cpu().numpy()).save(partial, pnginfo=text)
        self._whole.add(id)

    def finish(self) -> Path:
        """Write the dataset card and `metadata.jsonl` for all samples there are, in the order of their ids.

        Returns:
            The folder.
        """
        rows = [row for id in sorted(self.done()) if (row := read_png_row(self.folder / "images" / f"{id}.png"))]
        if not rows:
            raise TerraSynthError("nothing was painted", path=self.folder)
        for mask in (self.folder / "masks").glob("*.png"):
            # Left by a kill before its image came, and never painted since: the run after that asked for fewer.
            if not (self.folder / "images" / mask.name).is_file():
                mask.unlink()
        contents = Contents()
        for row in rows:
            contents.add(row, open_image(self.folder / row["mask_file_name"]).values)
        card = dataset_card(
            contents,
            self.schema,
            self.plan,
            title=self.title,
            license=self.license,
            files=_FILES.format(ignore=self.schema.stored_ignore[0]),
            loading=_LOADING,
            front={"configs": [{"config_name": "default", "data_files": _DATA_FILES}]},
        )
        with atomic_write(self.folder / "README.md") as partial:
            partial.write_text(card, encoding="utf-8")
        # Last: a folder with this file is a finished one.
        write_rows(self.folder, rows)
        return self.folder


_DATA_FILES = [{"split": "train", "path": ["metadata.jsonl", "images/*.png", "masks/*.png"]}]
_FILES = (
    "Each is an image (`images/`), its mask (`masks/`, 8-bit values of the classes with a palette; {ignore} is "
    "unlabelled) and a row of `metadata.jsonl`."
)
_LOADING = """\
```python
from datasets import load_dataset                      # columns image, mask, and the row

dataset = load_dataset("path/to/this/folder", split="train")

from terrasynth.data.folder import load_synthetic      # tensors

tiles = load_synthetic("path/to/this/folder")
```"""


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `metadata.jsonl`: what each sample came from, and what a segmentor found in it, as far as it was asked."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in add_scores(folder, rows)]
    with atomic_write(folder / "metadata.jsonl") as partial:
        partial.write_text("".join(lines), encoding="utf-8")


class Rows:
    """The rows of a finished dataset, in the order of their ids, read from the file whenever they are iterated."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = sum(1 for _ in self)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            # Not str.splitlines: a prompt may hold the other line ends of Unicode.
            with self._path.open(encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    row = json.loads(line)
                    for key, name in _names(row["id"]).items():
                        if row[key] != name:
                            raise ValueError(f"{key} of {row['id']} is {row[key]}, not {name}")
                    yield row
        except (ValueError, KeyError, TypeError) as error:
            raise TerraSynthError("the rows are damaged", path=self._path, found=repr(error), fix=_REBUILD) from error


def _names(id: str) -> dict[str, str]:
    return {"file_name": f"images/{id}.png", "mask_file_name": f"masks/{id}.png"}


def read_manifest(folder: str | Path) -> tuple[LabelSchema, Rows]:
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
    rows = Rows(metadata)
    named = {row["id"] for row in rows}
    if len(named) < max(1, len(rows)):
        raise TerraSynthError(
            "the rows are damaged", path=metadata, found=f"{len(rows)} rows of {len(named)} samples", fix=_REBUILD
        )
    for kind in ("images", "masks"):
        there = {path.stem for path in (folder / kind).glob("*.png")}
        if there != named:
            raise TerraSynthError(
                f"the {kind} and the rows do not match",
                path=folder,
                found=f"{len(named - there)} missing, {len(there - named)} unknown: "
                + ", ".join(f"{kind}/{id}.png" for id in sorted(there ^ named)[:5]),
                fix=_REBUILD,
            )
    return LabelSchema.from_dict(read_json(folder / "schema.json"), path=folder / "schema.json"), rows


def read_plan(folder: str | Path) -> dict[str, Any]:
    """Everything that the samples of a dataset depend on: what `SyntheticWriter` was given as `plan`."""
    return dict(read_json(Path(folder) / _MARKER)["plan"])
