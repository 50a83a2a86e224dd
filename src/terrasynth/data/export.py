"""Exports of a finished synthetic dataset to the layouts that other tools read.

Image files are copied byte for byte, so each still says `synthetic=1` in its PNG text. Masks become grey PNGs whose
values are class indices, with 255 for unlabelled pixels whatever the schema has: no reader turns those into colours.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from terrasynth.data.card import Contents, dataset_card, front_matter
from terrasynth.data.folder import read_samples
from terrasynth.data.schema import LabelSchema
from terrasynth.data.view import View
from terrasynth.data.write import Rows, read_manifest, read_plan
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_dir, digest, read_json, remove_incomplete, write_json
from terrasynth.progress import track

__all__ = ["FORMATS", "export"]

#: The value of unlabelled pixels in every export; a schema has at most 255 classes, so it is never one of them.
_IGNORE = 255
_MARKER = ".terrasynth-export.json"


@dataclass(frozen=True)
class _Dataset:
    """What is exported; iterating reads one sample at a time."""

    folder: Path
    schema: LabelSchema
    rows: Rows | Sequence[Mapping[str, Any]]
    view: View | None
    title: str
    license: str
    contents: Contents

    def __iter__(self) -> Iterator[_Sample]:
        with track(len(self.rows), f"exporting {self.folder}", unit="images") as progress:
            for row, _, mask in read_samples(self.folder, self.schema, self.rows, self.view):
                mask = np.where(mask == self.schema.ignore_index, np.uint8(_IGNORE), mask)
                self.contents.add(row, mask)
                yield _Sample(row["id"], row, self.folder / row["file_name"], mask)
                progress.advance()


@dataclass(frozen=True)
class _Sample:
    id: str
    row: Mapping[str, Any]
    image: Path
    mask: NDArray[np.uint8]


def export(
    dataset: str | Path, to: str, folder: str | Path, *, shard_size: int = 1000, view: str | None = None
) -> Path:
    """Write a synthetic dataset in another layout.

    The result depends on the dataset, the view, the format and the shard size alone, and appears whole or not at all.
    One sample at a time is in memory.

    Args:
        dataset: finished, of `data.write.SyntheticWriter`.
        to: a key of `FORMATS`.
        folder: new, empty, or an earlier export to the same format, which is replaced.
        shard_size: samples per tar file (`webdataset`).
        view: name of a view of `terrasynth curate`: its samples and labels; their weights are in `weights.json`.

    Returns:
        The folder.

    Raises:
        TerraSynthError: the dataset is unfinished or damaged, or the folder holds something else.
    """
    if to not in FORMATS:
        raise TerraSynthError("unknown format", found=to, expected=" | ".join(FORMATS))
    folder = Path(folder)
    target = folder.resolve()
    schema, all_rows = read_manifest(dataset)
    chosen = None if view is None else View.read(dataset, view)
    rows = all_rows if chosen is None else chosen.rows(all_rows)
    front = front_matter(dataset)
    _claim(target, to)
    remove_incomplete(target.parent, target.name)
    title = str(front.get("pretty_name", "Synthetic remote-sensing tiles"))
    source = _Dataset(Path(dataset), schema, rows, chosen, title, front.get("license", "unknown"), Contents())
    plan = read_plan(dataset)
    if chosen is not None:
        plan["view"] = {"name": chosen.name, **chosen.settings}
    with atomic_dir(target) as partial:
        about = FORMATS[to](source, partial, shard_size)
        exported = replace(schema, ignore_index=_IGNORE, values=None, ignore_values=())
        write_json(partial / "schema.json", exported.to_dict())
        if chosen is not None:
            write_json(partial / "weights.json", chosen.weights)
        card = dataset_card(source.contents, exported, plan, title=title, license=source.license, **about)
        (partial / "README.md").write_text(card, encoding="utf-8")
        write_json(partial / _MARKER, {"format": "terrasynth export", "version": 1, "to": to, **_files(partial)})
    return folder


def _claim(folder: Path, to: str) -> None:
    """Refuse a folder with anything but an export to the same format, complete and without additions."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    marker = folder / _MARKER
    was = read_json(marker) if marker.is_file() else {}
    if was.get("to") != to:
        raise TerraSynthError(
            "the output folder is in use",
            path=folder,
            found=f"an export to {was['to']}" if "to" in was else _some(folder),
            expected=f"a new or empty folder, or an earlier export to {to}",
            fix="choose another --out",
        )
    there = _files(folder)
    if there != {key: was.get(key) for key in there}:
        raise TerraSynthError(
            "the earlier export was changed by hand, and would be replaced",
            path=folder,
            found=f"{there['files']} files" + (", of other names" if there["files"] == was.get("files") else ""),
            expected=f"the {was.get('files')} files that were exported",
            fix="choose another --out, or move away what was added",
        )


def _files(folder: Path) -> dict[str, Any]:
    """How many files an export has beside its marker, and a digest of their names."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name != _MARKER]
    return {"files": len(names), "names": digest(names)}


def _some(folder: Path) -> str:
    if not folder.is_dir():
        return "a file"
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _png(mask: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


# --- MMSegmentation --------------------------------------------------------------------------------------------------

_MMSEG_CONFIG = """\
# Synthetic training tiles for MMSegmentation 1.x.
synthetic = dict(
    type="BaseSegDataset",
    data_root="{{{{ fileDirname }}}}",  # the folder of this file; mmengine fills it in
    data_prefix=dict(img_path="img_dir/train", seg_map_path="ann_dir/train"),
    img_suffix=".png",
    seg_map_suffix=".png",
    # 0 is the first class, and unlabelled is {ignore}. With reduce_zero_label=True the first class would become
    # unlabelled, and every other one its neighbour.
    reduce_zero_label=False,
    ignore_index={ignore},
    metainfo=dict(
        classes={classes!r},
        palette={palette!r},
    ),
    # As they are. Beside real tiles, give them the pipeline of those.
    pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="PackSegInputs"),
    ],
)
"""


def _mmseg(dataset: _Dataset, folder: Path, shard_size: int) -> dict[str, Any]:
    images, annotations = folder / "img_dir" / "train", folder / "ann_dir" / "train"
    for kind in (images, annotations):
        kind.mkdir(parents=True)
    for sample in dataset:
        shutil.copyfile(sample.image, images / f"{sample.id}.png")
        (annotations / f"{sample.id}.png").write_bytes(_png(sample.mask))
    palette = [list(color) for color in dataset.schema.colors]
    config = _MMSEG_CONFIG.format(ignore=_IGNORE, classes=dataset.schema.names, palette=palette)
    (folder / "dataset.py").write_text(config, encoding="utf-8")
    return {
        "files": "Each is an image (`img_dir/train/`) and a mask of its name (`ann_dir/train/`, 8-bit class indices; "
        f"{_IGNORE} is unlabelled).",
        "loading": "In MMSegmentation, with the `synthetic` of `dataset.py`; `reduce_zero_label` stays `False`.",
    }


# --- COCO ------------------------------------------------------------------------------------------------------------


def _coco_panoptic(dataset: _Dataset, folder: Path, shard_size: int) -> dict[str, Any]:
    """COCO panoptic: every class is stuff, one segment per image, whose id is that of its category."""
    pngs = folder / "annotations" / "panoptic_train"
    pngs.mkdir(parents=True)

    def annotations() -> Iterator[dict[str, Any]]:
        for number, sample in enumerate(_with_images(dataset, folder), 1):
            # The id of a segment is R + 256 G + 65536 B, and 0 is unlabelled.
            red = np.where(sample.mask == _IGNORE, np.uint8(0), sample.mask + np.uint8(1))
            (pngs / f"{sample.id}.png").write_bytes(_png(np.dstack([red, np.zeros_like(red), np.zeros_like(red)])))
            segments = [
                {"id": index + 1, "category_id": index + 1, **_extent(region), "iscrowd": 0}
                for index, region in _regions(sample.mask)
            ]
            yield {"image_id": number, "file_name": f"{sample.id}.png", "segments_info": segments}

    _write_coco(dataset, folder / "annotations" / "panoptic_train.json", annotations())
    return {
        "files": "Each is an image (`train/`) with an entry in `annotations/panoptic_train.json` and a PNG of segments "
        "(`annotations/panoptic_train/`, id = R + 256 G + 65536 B, 0 is unlabelled). Every class is stuff.",
        "loading": "With any reader of COCO panoptic segmentation, such as panopticapi or detectron2.",
    }


def _coco_semantic(dataset: _Dataset, folder: Path, shard_size: int) -> dict[str, Any]:
    """COCO stuff: one annotation per class and image, run-length encoded."""

    def annotations() -> Iterator[dict[str, Any]]:
        numbers = count(1)
        for image, sample in enumerate(_with_images(dataset, folder), 1):
            for index, region in _regions(sample.mask):
                segmentation = {"counts": _run_lengths(region), "size": list(region.shape)}
                keys = {"id": next(numbers), "image_id": image, "category_id": index + 1}
                yield {**keys, "segmentation": segmentation, **_extent(region), "iscrowd": 0}

    (folder / "annotations").mkdir()
    _write_coco(dataset, folder / "annotations" / "stuff_train.json", annotations())
    return {
        "files": "Each is an image (`train/`) with one annotation per class in `annotations/stuff_train.json`, "
        "run-length encoded; unlabelled pixels have none.",
        "loading": '```python\nfrom pycocotools.coco import COCO\n\ncoco = COCO("annotations/stuff_train.json")\n'
        "mask = coco.annToMask(coco.anns[1])\n```",
    }


def _with_images(dataset: _Dataset, folder: Path) -> Iterator[_Sample]:
    (folder / "train").mkdir()
    for sample in dataset:
        shutil.copyfile(sample.image, folder / "train" / f"{sample.id}.png")
        yield sample


def _regions(mask: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """The classes present, and where."""
    for index in np.unique(mask[mask != _IGNORE]).tolist():
        yield index, mask == index


def _extent(region: NDArray[np.bool_]) -> dict[str, Any]:
    """Area in pixels, and the bounding box: x, y, width, height."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {"area": int(region.sum()), "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]}


def _run_lengths(region: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of equal pixels down the columns, the first one outside the region."""
    flat = region.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    lengths: list[int] = np.diff(changes, prepend=0, append=flat.size).tolist()
    return lengths


def _write_coco(dataset: _Dataset, path: Path, annotations: Iterable[Mapping[str, Any]]) -> None:
    """Write the JSON entry by entry: the annotations are never in memory together."""
    head = {
        "info": {"description": dataset.title, "contributor": "TerraSynth", "synthetic": True},
        "licenses": [{"id": 1, "name": dataset.license, "url": ""}],
        "categories": [
            {"id": index + 1, "name": name, "supercategory": "stuff", "isthing": 0, "color": list(color)}
            for index, (name, color) in enumerate(zip(dataset.schema.names, dataset.schema.colors, strict=True))
        ],
    }
    images = (
        {
            "id": number,
            "file_name": f"{row['id']}.png",
            "width": row["width"],
            "height": row["height"],
            "license": 1,
            "synthetic": True,
        }
        for number, row in enumerate(dataset.rows, 1)
    )
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head).removesuffix("}"))
        for key, entries in (("images", images), ("annotations", annotations)):
            file.write(f', "{key}": [')
            for position, entry in enumerate(entries):
                file.write((",\n" if position else "\n") + json.dumps(entry))
            file.write("\n]")
        file.write("}\n")


# --- WebDataset ------------------------------------------------------------------------------------------------------

_WEBDATASET_LOADING = """\
```python
import webdataset

shards = webdataset.WebDataset("{shards}", shardshuffle=False).decode("rgb8")
for image, mask, row in shards.to_tuple("image.png", "mask.png", "json"):
    mask = mask[..., 0]                                # class indices; {ignore} is unlabelled
```"""


def _webdataset(dataset: _Dataset, folder: Path, shard_size: int) -> dict[str, Any]:
    shards = -(-len(dataset.rows) // shard_size)
    samples = enumerate(dataset)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            # The last one reads to the end, where damaged samples are told.
            for number, sample in islice(samples, shard_size if shard < shards - 1 else None):
                # What follows the first dot of a member's name is its kind, so an id with dots can not be the key.
                row = {key: value for key, value in sample.row.items() if not key.endswith("file_name")}
                _add(tar, f"{number:06d}.image.png", sample.image.read_bytes())
                _add(tar, f"{number:06d}.mask.png", _png(sample.mask))
                _add(tar, f"{number:06d}.json", json.dumps(row, ensure_ascii=False).encode())
    names = "000000.tar" if shards == 1 else f"{{000000..{shards - 1:06d}}}.tar"
    return {
        "files": f"They are in `{names}`, each as `NNNNNN.image.png`, `NNNNNN.mask.png` (8-bit class indices; "
        f"{_IGNORE} is unlabelled) and `NNNNNN.json`.",
        "loading": _WEBDATASET_LOADING.format(shards=names, ignore=_IGNORE),
        "front": {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}]},
    }


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # A fresh TarInfo has neither time nor owner, so that equal samples make equal files.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


#: What `export` writes: (dataset, empty folder, samples per shard) -> what is special about the card.
FORMATS: Mapping[str, Callable[[_Dataset, Path, int], dict[str, Any]]] = {
    "mmseg": _mmseg,
    "coco-panoptic": _coco_panoptic,
    "coco-semantic": _coco_semantic,
    "webdataset": _webdataset,
}
