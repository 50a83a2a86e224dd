"""To and from torchgeo: its datasets as tiles for a study, and synthetic datasets among its datasets.

`from_torchgeo` writes the tiles of a dataset, and `SyntheticTiles` is a dataset:

    from_torchgeo(LoveDA("loveda", "train"), schema, "tiles", "train", value_range=(0, 255))
    ConcatDataset([LoveDA("loveda", "train"), SyntheticTiles("painted")])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from terrasynth.data.folder import read_samples
from terrasynth.data.schema import LabelSchema
from terrasynth.data.view import View
from terrasynth.data.write import read_manifest
from terrasynth.errors import TerraSynthError, changes, combined
from terrasynth.io import atomic_dir, atomic_write, new_tiff, read_json, remove_incomplete, write_json
from terrasynth.progress import say, track

try:
    from torchgeo.datasets import GeoDataset, NonGeoDataset, Potsdam2D, Vaihingen2D
except ImportError as error:
    raise TerraSynthError(
        "torchgeo is not installed", found=str(error), fix="pip install 'terrasynth[torchgeo]'"
    ) from error

__all__ = ["SyntheticTiles", "from_torchgeo"]

#: A split whose brightest level is below this was surely given the range of other data.
_DARK = 8
_Place = tuple[Any, tuple[float, float, float, float]]


class SyntheticTiles(NonGeoDataset):
    """A synthetic dataset of `terrasynth generate` as a torchgeo dataset.

    Samples are those of torchgeo's own datasets: `image` float32 (3, H, W) in 0..255, `mask` int64 (H, W), class
    indices or the `ignore_index` of `schema`.

    Attributes:
        schema: the classes.
        classes: their names.
        weights: how often each sample is to be drawn compared with the others (`torch.utils.data.WeightedRandomSampler`
            takes them); 1 without a view.

    Args:
        root: folder of the dataset.
        transforms: takes a sample and returns it changed.
        view: name of a view of `terrasynth curate`: its samples and labels.

    Raises:
        TerraSynthError: the folder is no such dataset, is unfinished, a file is missing or damaged, or there is no such
            view.
    """

    def __init__(
        self,
        root: str | Path,
        transforms: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        *,
        view: str | None = None,
    ) -> None:
        self.root = Path(root)
        self.schema, rows = read_manifest(root)
        self.classes = self.schema.names
        self.transforms = transforms
        self._view = None if view is None else View.read(root, view)
        self._rows = list(rows) if self._view is None else self._view.rows(rows)
        self.weights = [1.0 if self._view is None else self._view.weights[row["id"]] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ((_, image, mask),) = read_samples(self.root, self.schema, [self._rows[index]], self._view)
        sample = {"image": torch.tensor(image).permute(2, 0, 1).float(), "mask": torch.tensor(mask).long()}
        return sample if self.transforms is None else self.transforms(sample)


def from_torchgeo(
    dataset: Any,
    schema: LabelSchema,
    folder: str | Path,
    split: str = "train",
    *,
    value_range: tuple[float, float],
    clip: bool = False,
    bands: Sequence[int] | None = None,
    sampler: Iterable[Any] | None = None,
) -> Path:
    """Write a torchgeo dataset as one split of labelled tiles, where `load_tiles` and every recipe find them.

    That is `images/SPLIT/`, `masks/SPLIT/`, `SPLIT.txt` and `classes.yaml`: PNG files, or GeoTIFF with the place on
    Earth for a `GeoDataset`. The recipe needs no more than `data.root`, `kind: folder` and `label_schema:
    classes.yaml`. Killed and called again, it starts again; called for a finished split, it does nothing.

    Args:
        dataset: its samples have `image`, real (C, H, W), and `mask`, whole numbers (H, W) or (1, H, W).
        schema: the classes, and the values that stand for them in the masks (`LabelSchema.load("loveda")`, say).
        folder: of the tiles; the same for every split.
        split: `train`, `val` or `test`, as recipes call them.
        value_range: the values that become 0 and 255: (0, 255) or (0, 1) for images, (0, 3000) for reflectance times
            10,000, say. Nothing tells them apart from the outside.
        clip: cut values outside `value_range` off, instead of refusing them.
        bands: red, green and blue, counted from 0; needed unless there are three.
        sampler: which windows of a `GeoDataset`, as `GridGeoSampler(dataset, size=256)`.

    Returns:
        The folder.

    Raises:
        TerraSynthError: anything of this does not fit the samples, with all of them in one message; or the folder has
            such a split of other settings.
    """
    if isinstance(dataset, GeoDataset) and sampler is None:
        raise TerraSynthError(
            "a GeoDataset has no tiles of its own",
            found=f"a {type(dataset).__name__}",
            fix="say which windows to cut: sampler=GridGeoSampler(dataset, size=256)",
        )
    _refuse_lost_clutter(dataset, schema)
    folder = Path(folder)
    keys = list(range(len(dataset)) if sampler is None else sampler)
    finished, record = folder / f"{split}.txt", folder / f".terrasynth-{split}.json"
    settings = {
        "dataset": type(dataset).__name__,
        "samples": len(keys),
        "value_range": list(value_range),
        "clip": clip,
        "bands": None if bands is None else list(bands),
        "schema": schema.to_dict(),
    }
    if record.is_file() and finished.is_file():
        _check_settings(record, finished, settings)
        say(f"{finished} is there already: the split is left as it is")
        return folder
    _refuse_foreign(folder, split, schema, ours=record.is_file())
    images, masks = folder / "images" / split, folder / "masks" / split
    for kind in (images, masks):
        remove_incomplete(kind.parent, split)
    problems: list[TerraSynthError] = []
    ids, brightest = [], 0
    with (
        track(len(keys), f"converting {split}", unit="tiles") as progress,
        atomic_dir(masks) as partial_masks,
        atomic_dir(images) as partial_images,
    ):
        for number, key in enumerate(keys):
            sample = dataset[key]
            name = f"sample {number}"
            try:
                pixels = _image(sample, value_range, clip, bands, name)
                mask = _mask(sample, schema, pixels.shape[:2], name)
            except TerraSynthError as error:
                problems.append(error)
            else:
                place = _place(dataset, key) if isinstance(dataset, GeoDataset) else None
                ids.append(f"{number:06d}")
                brightest = max(brightest, int(pixels.max()))
                _save(partial_images / ids[-1], pixels, place)
                _save(partial_masks / ids[-1], schema.to_index(mask), place, schema.palette())
            progress.advance()
        if problems:
            raise combined(problems, f"{len(problems)} of {len(keys)} tiles of the {split} split can not be used")
        _refuse_darkness(brightest, value_range)
        write_json(record, settings)  # from here on what appears is known to be ours
    schema.to_yaml(folder / "classes.yaml")
    with atomic_write(finished) as partial:
        partial.write_text("".join(f"{id}\n" for id in ids), encoding="utf-8")
    return folder


def _refuse_lost_clutter(dataset: Any, schema: LabelSchema) -> None:
    """Refuse a schema under which 0 is unlabelled where torchgeo counts from clutter = 0."""
    if isinstance(dataset, Potsdam2D | Vaihingen2D) and dataset.transforms is None and 0 in schema.stored_ignore:
        raise TerraSynthError(
            f"the masks of torchgeo's {type(dataset).__name__} hold clutter as 0, which would become unlabelled",
            found="0 = unlabelled in the label schema",
            expected="0 = clutter, 1 to 5 as in the packaged schemas",
            fix="dataclasses.replace(schema, values=(1, 2, 3, 4, 5, 0), ignore_values=())",
        )


def _check_settings(record: Path, finished: Path, settings: Mapping[str, Any]) -> None:
    if changed := changes(read_json(record), settings):
        raise TerraSynthError(
            "these tiles were converted with other settings",
            path=finished,
            found="\n    " + "\n    ".join(changed),
            expected="the same settings",
            fix=f"choose another folder, or delete {finished} to convert again",
        )


def _refuse_foreign(folder: Path, split: str, schema: LabelSchema, *, ours: bool) -> None:
    taken = [path for path in (f"images/{split}", f"masks/{split}", f"{split}.txt") if (folder / path).exists()]
    if taken and not ours:
        raise TerraSynthError(
            f"the folder has a {split} split already", path=folder, found=", ".join(taken), fix="choose another folder"
        )
    classes = folder / "classes.yaml"
    if classes.is_file() and LabelSchema.from_yaml(classes) != schema:
        raise TerraSynthError("the folder has tiles of other classes", path=classes, fix="choose another folder")


def _image(
    sample: Mapping[str, Any], value_range: tuple[float, float], clip: bool, bands: Sequence[int] | None, name: str
) -> NDArray[np.uint8]:
    """The image of a sample, (H, W, 3)."""
    image = _tensor(sample, "image", name)
    if image.ndim != 3:
        raise TerraSynthError(
            "the image is not of bands, rows and columns",
            path=name,
            found=f"a shape of {tuple(image.shape)}",
            expected="(C, H, W)",
            fix="pick one date or frame with the dataset's `transforms`",
        )
    if len(image) != 3 and bands is None:
        raise TerraSynthError(
            "which bands are red, green and blue?",
            path=name,
            found=f"{len(image)} bands",
            fix="pass bands=(0, 0, 0)" if len(image) == 1 else "pass bands=(3, 2, 1), say, counted from 0",
        )
    if bands is not None:
        if len(bands) != 3 or not all(0 <= band < len(image) for band in bands):
            raise TerraSynthError(
                "there are no such bands",
                path=name,
                found=f"bands={tuple(bands)}",
                expected=f"three numbers from 0 to {len(image) - 1}",
            )
        image = image[list(bands)]
    low, high = value_range
    numbers = image.double()
    least, most = numbers.min().item(), numbers.max().item()
    if not numbers.isfinite().all():
        raise TerraSynthError(
            "the image has pixels that are no numbers",
            path=name,
            found="NaN or infinity",
            fix="fill them with the dataset's `transforms`",
        )
    if not clip and (least < low or most > high):
        raise TerraSynthError(
            "the image has values outside value_range",
            path=name,
            found=f"{least:g} to {most:g}",
            expected=f"{low:g} to {high:g}",
            fix="pass the value_range=(low, high) of the data, or clip=True to cut off what is outside",
        )
    levels = ((numbers - low) / (high - low)).clamp(0, 1) * 255
    return levels.round().byte().permute(1, 2, 0).contiguous().numpy()


def _mask(
    sample: Mapping[str, Any],
    schema: LabelSchema,
    size: tuple[int, ...],
    name: str,
) -> NDArray[np.uint8]:
    """The mask of a sample, (H, W), as class indices of the schema."""
    mask = _tensor(sample, "mask", name)
    if mask.ndim == 3 and len(mask) == 1:
        mask = mask[0]
    if mask.shape != size:
        raise TerraSynthError(
            "the mask is not as large as its image",
            path=name,
            found=f"a shape of {tuple(mask.shape)}",
            expected=f"{tuple(size)}, one class per pixel",
            fix="make them fit with the dataset's `transforms`",
        )
    stored = mask.cpu().numpy()
    if stored.dtype.kind == "f" and (stored != np.rint(stored)).any():
        raise TerraSynthError(
            "the mask is not of whole numbers",
            path=name,
            found=str(stored.dtype),
            fix="check what the dataset yields as `mask`: it may be a regression target",
        )
    return schema.from_index(stored.astype(np.int64), path=name)


def _tensor(sample: Mapping[str, Any], key: str, name: str) -> Tensor:
    value = sample.get(key)
    if not isinstance(value, Tensor):
        raise TerraSynthError(
            f"the sample has no {key}",
            path=name,
            found=", ".join(map(str, sample)),
            expected="image and mask",
            fix="take a split with masks, of a dataset for semantic segmentation",
        )
    return value


def _refuse_darkness(brightest: int, value_range: tuple[float, float]) -> None:
    if brightest < _DARK:
        low, high = value_range
        most = low + brightest / 255 * (high - low)
        raise TerraSynthError(
            "all images would come out black",
            found=f"no value above about {most:.3g}, with value_range=({low:g}, {high:g})",
            fix="pass the value_range=(low, high) of the data: (0, 1) for fractions, (0, 255) for 8 bits",
        )


def _place(dataset: Any, key: tuple[slice, slice, slice]) -> _Place:
    # Of the key, not of the sample: there the bounds are in float32, which is off by half a metre in UTM.
    x, y, _ = key
    return dataset.crs, (x.start, y.start, x.stop, y.stop)


def _save(
    path: Path, values: NDArray[np.uint8], place: _Place | None, palette: NDArray[np.uint8] | None = None
) -> None:
    """Write (H, W) or (H, W, 3) as PNG, or as GeoTIFF where the place is known.

    With its palette a mask of one class alone can not be taken for grey levels.
    """
    if place is None:
        picture = Image.fromarray(values)
        if palette is not None:
            picture.putpalette(palette.tobytes())
        picture.save(path.with_suffix(".png"))
        return
    from rasterio.crs import CRS
    from rasterio.transform import from_bounds

    crs, bounds = place
    height, width = values.shape[:2]
    bands = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    with new_tiff(
        path.with_suffix(".tif"),
        width=width,
        height=height,
        count=len(bands),
        dtype="uint8",
        crs=CRS.from_wkt(crs.to_wkt()),
        transform=from_bounds(*bounds, width, height),
        compress="deflate",
    ) as file:
        file.write(bands)
        if palette is not None:
            file.write_colormap(1, {value: tuple(color) for value, color in enumerate(palette.tolist())})
