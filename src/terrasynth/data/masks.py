"""Mask rasters of any size: their coding is settled over all of them first, then they are read by windows.

What a mask means follows from the different pixels that occur in it, and these fit in memory however large it is. So a
first pass collects them, `data.read` interprets them as it does a small mask, and every window is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from terrasynth.data.raster import Grid, Raster
from terrasynth.data.read import common_coding, mask_readings, nodata_is_class
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.io import Pixels

__all__ = ["Lookup", "Survey", "settle", "survey"]

#: More different pixels than this are no classes.
_MOST = 65_536


@dataclass(frozen=True)
class Survey:
    """The different pixels of a mask raster, without those that its validity mask leaves out.

    Attributes:
        path: the file.
        grid: its size and place.
        keys: int64 (n,), ascending: one number for each of them (the value, or the bytes of the bands).
        pixels: the same as an image of one row, (1, n) or (1, n, C), with the file's palette and class names.
        counts: int64 (1, n), how often each occurs.
        nodata: the nodata value as such an image, if it occurs; it is not one of `pixels`.
    """

    path: Path
    grid: Grid
    keys: NDArray[np.int64]
    pixels: Pixels
    counts: NDArray[np.int64]
    nodata: Pixels | None


@dataclass(frozen=True)
class Lookup:
    """What the pixels of a mask raster mean.

    Attributes:
        keys: as `Survey.keys`.
        classes: uint8 (n,), class index or `ignore_index` of each.
        ignore_index: what all other pixels mean: the nodata value, and what the file's validity mask leaves out.
    """

    keys: NDArray[np.int64]
    classes: NDArray[np.uint8]
    ignore_index: int

    def read(self, raster: Raster, window: Window) -> NDArray[np.uint8]:
        """Class indices of a window of the raster that was surveyed, (h, w)."""
        keys = _keys(raster.read(window))
        if not len(self.keys):
            return np.full(keys.shape, self.ignore_index, dtype=np.uint8)
        position = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        known = self.keys[position] == keys
        if (unmasked := raster.unmasked(window)) is not None:
            known &= unmasked
        return np.where(known, self.classes[position], np.uint8(self.ignore_index))


def survey(raster: Raster, windows: Iterator[Window] | None = None, *, name: str = "mask") -> Survey:
    """Collect the different pixels of a mask raster, a stripe at a time.

    Args:
        raster: the mask.
        windows: `raster.stripes()`, by default.
        name: what messages call it.

    Raises:
        TerraSynthError: it can not be read, or its pixels can not stand for classes.
    """
    if raster.dtype.kind not in "iu" or (raster.count > 1 and (raster.dtype != np.uint8 or raster.count > 4)):
        raise TerraSynthError(
            f"the {name} holds no class indices or colours",
            path=raster.path,
            found=f"{raster.count} {'band' if raster.count == 1 else 'bands'} of {raster.dtype}",
            expected="one band of whole numbers, or RGB colours in uint8",
            fix=_to_classes(raster),
        )
    keys, counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for window in windows or raster.stripes():
        found, unmasked = _keys(raster.read(window)), raster.unmasked(window)
        found = found.ravel() if unmasked is None else found[unmasked]
        if found.size:
            keys, counts = _counted(keys, counts, found)
        if len(keys) > _MOST:
            raise TerraSynthError(
                f"the {name} has too many different values to be one of classes",
                path=raster.path,
                found=f"more than {_MOST:,}",
                expected="one value or colour a class",
                fix=f"export it again: a {name} must not be compressed with loss (JPEG) or resized with interpolation",
            )
    nodata = None
    if raster.nodata is not None and raster.nodata == int(raster.nodata):
        empty = keys == _keys(np.full((raster.count, 1, 1), int(raster.nodata), dtype=np.int64))[0, 0]
        if empty.any():
            nodata = Pixels(_unpacked(keys[empty], raster), raster.palette)
            keys, counts = keys[~empty], counts[~empty]
    pixels = Pixels(_unpacked(keys, raster), raster.palette, class_names=raster.class_names)
    return Survey(raster.path, raster.grid, keys, pixels, counts[None], nodata)


def _to_classes(raster: Raster) -> str:
    """How a raster of other numbers becomes one of classes; `-ot Byte` alone would round probabilities to 0 or 1."""
    if raster.count == 1:
        return (
            "if its values are class indices, `gdal_translate -ot Int32 IN OUT` stores them as such; if they are "
            "probabilities of one class, `gdal_calc.py -A IN --calc='A > 0.5' --type=Byte --outfile=OUT` decides"
        )
    return "if its bands are probabilities of the classes, store the number of the largest in each pixel, in one band"


def _keys(values: NDArray[Any]) -> NDArray[np.int64]:
    """One number for every pixel of (C, h, w)."""
    keys = values[0].astype(np.int64)
    for band in values[1:]:
        keys = keys << 8 | band
    return keys


def _unpacked(keys: NDArray[np.int64], raster: Raster) -> NDArray[Any]:
    if raster.count == 1:
        return keys[None].astype(raster.dtype)
    shifts = 8 * np.arange(raster.count - 1, -1, -1)
    return (keys[None, :, None] >> shifts & 255).astype(np.uint8)


def _counted(
    keys: NDArray[np.int64], counts: NDArray[np.int64], more: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Merge the pixels `more` into keys and counts. Masks are flat areas, so runs of equal pixels are counted first."""
    starts = np.flatnonzero(np.r_[True, more[1:] != more[:-1]])
    lengths = np.diff(np.r_[starts, len(more)])
    merged, inverse = np.unique(np.r_[keys, more[starts]], return_inverse=True)
    return merged, np.bincount(inverse, weights=np.r_[counts, lengths]).astype(np.int64)


def settle(
    surveys: Sequence[Survey], schema: LabelSchema, coding: str
) -> tuple[str, dict[Path, Lookup], list[TerraSynthError]]:
    """What the masks mean, all in one coding.

    Args:
        surveys: of all masks of the run.
        schema: the classes.
        coding: `auto`, `index` or `color`.

    Returns:
        The coding; the meaning of every mask that can be read, by its path; what is wrong with the others.

    Raises:
        TerraSynthError: the masks fit no coding together, or two that would mean different classes.
    """
    readings, faults = {}, []
    for mask in surveys:
        try:
            if len(mask.keys):
                readings[mask.path] = mask_readings(mask.pixels, schema, coding, mask.path, mask.counts)
        except TerraSynthError as error:
            faults.append(error)
    pixels = {mask.path: mask.pixels for mask in surveys}
    common = "index"
    if readings:
        common = common_coding([*readings.values()], [*readings], schema, chosen=coding, pixels=pixels.__getitem__)
    lookups = {}
    for mask in surveys:
        try:
            _check_nodata(mask, schema, coding, common)
        except TerraSynthError as error:
            faults.append(error)
            continue
        if mask.path in readings or not len(mask.keys):
            classes = readings[mask.path][common][0] if len(mask.keys) else np.empty(0, dtype=np.uint8)
            lookups[mask.path] = Lookup(mask.keys, classes, schema.ignore_index)
    return common, lookups, faults


def _check_nodata(mask: Survey, schema: LabelSchema, coding: str, common: str) -> None:
    """Refuse a nodata value that is a class as well: are its pixels unlabelled, or of that class?"""
    if mask.nodata is None:
        return
    try:
        reading = mask_readings(mask.nodata, schema, coding, mask.path).get(common)
    except TerraSynthError:
        return  # It means nothing else.
    if reading is None or reading[0, 0] == schema.ignore_index:
        return
    value = ", ".join(map(str, np.ravel(mask.nodata.values).tolist()))
    raise nodata_is_class(value, schema.names[reading[0, 0]], schema, mask.path)
