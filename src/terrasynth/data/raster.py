"""Scenes of any size: windows of a raster at constant memory, and how its bands become 8-bit RGB.

A GeoTIFF is decoded window by window. PNG and JPEG can not be, so they are decoded whole, within the budget of
`io.open_image`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Interleaving, MaskFlags
from rasterio.errors import CRSError, RasterioError
from rasterio.windows import Window
from rasterio.windows import transform as window_transform

from terrasynth.errors import TerraSynthError
from terrasynth.io import (
    MAX_BYTES,
    TIFF_SUFFIXES,
    Pixels,
    damaged_tiff,
    open_image,
    open_tiff,
    tiff_class_names,
    tiff_palette,
)
from terrasynth.progress import track

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

__all__ = [
    "NO_TRANSFORM",
    "Grid",
    "Raster",
    "Stretch",
    "check_percentiles",
    "crs_name",
    "open_raster",
    "percentile_ranges",
]

#: What rasterio raises where there is no way from one CRS to another; the last has no public name.
NO_TRANSFORM = (RasterioError, CRSError, CPLE_BaseError)
#: Pixels of one stripe: a pass over a whole raster holds this many at a time.
_STRIPE = 2 * 1024 * 1024
#: Pixels that percentiles are taken from, over all scenes together.
_SAMPLED = 4 * 1024 * 1024
_CONVERT = "for example `gdal_translate -b 1 -b 2 -b 3`"


@dataclass(frozen=True)
class Grid:
    """Where the pixels of a raster lie.

    Attributes:
        width, height: in pixels.
        crs: coordinate reference system; None if the file names none.
        transform: pixel (column, row) to map coordinates; None if the file has none.
    """

    width: int
    height: int
    crs: CRS | None = None
    transform: Affine | None = None

    @property
    def is_georeferenced(self) -> bool:
        """Whether the file says anything about where it lies."""
        return self.crs is not None or self.transform is not None

    @property
    def gsd(self) -> float | None:
        """Metres per pixel, of pixels that are not square by their area; None without a projected CRS and a place."""
        if self.crs is None or not self.crs.is_projected or self.transform is None:
            return None
        return float(math.sqrt(abs(self.transform.determinant)) * self.crs.linear_units_factor[1])

    def completed(self, other: Grid) -> Grid:
        """With the CRS and transform of another file as large as this one, where this one names none."""
        if (self.width, self.height) != (other.width, other.height):
            return self
        return Grid(self.width, self.height, self.crs or other.crs, self.transform or other.transform)

    def part(self, window: Window) -> Grid:
        """The grid of a window."""
        moved = None if self.transform is None else window_transform(window, self.transform)
        return Grid(int(window.width), int(window.height), self.crs, moved)

    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north of the smallest upright box around the raster, in its CRS."""
        transform = self.transform or Affine.identity()
        # A scene may be stored south-up, mirrored or rotated, so no corner is known to be the upper left one.
        xs, ys = zip(*(transform * (x, y) for x in (0, self.width) for y in (0, self.height)), strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def coincides(self, other: Grid) -> bool:
        """Whether all four corners of the two lie within a hundredth of a pixel of each other; the CRS may differ."""
        a, b = self.transform or Affine.identity(), other.transform or Affine.identity()
        to_pixels = ~a
        corners = [(x, y) for x in (0, self.width) for y in (0, self.height)]
        moved = [to_pixels * (b * corner) for corner in corners]
        return (self.width, self.height) == (other.width, other.height) and all(
            math.dist(corner, there) < 0.01 for corner, there in zip(corners, moved, strict=True)
        )


def crs_name(crs: CRS | None) -> str:
    """As EPSG:32640; of a CRS without a number, the kind and the name."""
    text = "no CRS" if crs is None else crs.to_string()
    found = re.match(r'(\w+)\["([^"]*)"', text)
    return text if found is None else f"{found[1]} {found[2]!r}"


class Raster:
    """An open image or mask file, as `open_raster` yields it.

    Attributes:
        path: the file.
        grid: its size and place.
        count: how many bands it has.
        dtype: of all bands together.
        nodata: the value of pixels without data; None if the file names none.
        palette: (N, 3) uint8 colours when its only band holds palette indices, else None.
        alpha: the number of the band that says which pixels are transparent; None if there is none.
        class_names: what the values of its only band mean, as far as the file says it.
    """

    def __init__(self, path: Path, source: DatasetReader | Pixels) -> None:
        self.path = path
        self._source = source
        self.nodata: float | None = None
        self.alpha: int | None = None
        self._has_mask = False
        if isinstance(source, Pixels):
            self._values = source.values[None] if source.values.ndim == 2 else np.moveaxis(source.values, -1, 0)
            self.count, height, width = self._values.shape
            self.grid = Grid(width, height)
            self.dtype = self._values.dtype
            self.palette, self.class_names = source.palette, source.class_names
            self.alpha = self.count if self.count in (2, 4) else None
            return
        self.count = source.count
        placed = source.transform != Affine.identity()
        self.grid = Grid(source.width, source.height, source.crs, source.transform if placed else None)
        dtypes = {"complex64" if dtype == "complex_int16" else dtype for dtype in source.dtypes}
        self.dtype = np.result_type(*dtypes)
        self.palette, self.class_names = tiff_palette(source), tiff_class_names(source)
        # One value for all bands is the TIFF's rule.
        self.nodata = source.nodata
        # An alpha band and a nodata value count as masks to GDAL; here they are heard by themselves.
        self._has_mask = not {MaskFlags.all_valid, MaskFlags.alpha, MaskFlags.nodata} & {*source.mask_flag_enums[0]}
        if ColorInterp.alpha in source.colorinterp:
            self.alpha = source.colorinterp.index(ColorInterp.alpha) + 1
        if not placed and source.gcps[0]:
            raise TerraSynthError(
                "the scene is not rectified",
                path=path,
                found=f"{len(source.gcps[0])} ground control points, and no transform",
                expected="a raster whose pixels have a place in a CRS",
                fix="rectify it first, for example with `gdalwarp -tps`",
            )
        rows, columns = source.block_shapes[0]
        bands = self.count if source.interleaving is Interleaving.pixel else 1
        if rows * columns * bands * self.dtype.itemsize > MAX_BYTES:
            raise TerraSynthError(
                "the blocks of the TIFF are too large to decode",
                path=path,
                found=f"blocks of {columns} x {rows} pixels, {bands} bands of {self.dtype}",
                expected=f"at most {MAX_BYTES / 2**30:.1f} GiB a block",
                fix="store it in tiles: `gdal_translate -co TILED=YES IN OUT`",
            )

    def read(self, window: Window, bands: Sequence[int] | None = None) -> NDArray[Any]:
        """Decode a window as stored, (B, h, w).

        Args:
            window: inside the raster.
            bands: numbers of the bands, counted from 1; all by default.

        Raises:
            TerraSynthError: the file is damaged there, or the window exceeds `MAX_BYTES`.
        """
        bands = list(bands or range(1, self.count + 1))
        size = window.height * window.width * len(bands) * self.dtype.itemsize
        if size > MAX_BYTES:
            raise TerraSynthError(
                "the window is too large to decode in one piece",
                path=self.path,
                found=f"{window.width} x {window.height} pixels, {len(bands)} bands of {self.dtype}: "
                f"{size / 2**30:.1f} GiB",
                expected=f"at most {MAX_BYTES / 2**30:.1f} GiB",
                fix="choose smaller windows",
            )
        if isinstance(self._source, Pixels):
            return self._values[[band - 1 for band in bands], *window.toslices()]
        with damaged_tiff(self.path):
            return self._source.read(bands, window=window)

    def unmasked(self, window: Window) -> NDArray[np.bool_] | None:
        """Where the validity mask of a TIFF (inside, or beside it as .msk) says that there is data, (h, w).

        None if there is no such mask; an alpha band and the nodata value are none.
        """
        if isinstance(self._source, Pixels) or not self._has_mask:
            return None
        with damaged_tiff(self.path):
            valid: NDArray[np.bool_] = self._source.read_masks(1, window=window) != 0
        return valid

    def valid(self, values: NDArray[Any], window: Window, *, transparency: bool = True) -> NDArray[np.bool_] | None:
        """Which pixels of a window have data, (h, w); None if all of the file's do, by its header.

        In whole numbers a pixel has no data where all bands read have the nodata value (0 in one of them is a dark
        pixel); in floating point where one of them has it. What the validity mask leaves out has none either.

        Args:
            values: what `read` gave for the window.
            window: inside the raster.
            transparency: whether transparent pixels have no data; if not, the alpha band is one as any other.

        Raises:
            TerraSynthError: the alpha band holds more than transparent and opaque, so it may be a colour band: many
                writers call every fourth band alpha.
        """
        found = []
        if self.nodata is not None:
            there = ~np.isnan(values) if math.isnan(self.nodata) else values != self.nodata
            found.append(there.all(0) if values.dtype.kind == "f" else there.any(0))
        if self.alpha is not None and transparency:
            alpha = self.read(window, [self.alpha])[0]
            self._check_alpha(alpha)
            found.append(alpha != 0)
        if (unmasked := self.unmasked(window)) is not None:
            found.append(unmasked)
        return np.logical_and.reduce(found) if found else None

    def _check_alpha(self, alpha: NDArray[Any]) -> None:
        opaque = (255, np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1)
        between = alpha[(alpha != 0) & (alpha != opaque[0]) & (alpha != opaque[1])]
        if not between.size:
            return
        colors = [band for band in range(1, self.count + 1) if band != self.alpha]
        example = ",".join(map(str, colors[: 3 if len(colors) >= 3 else 1]))
        mark = f" (`gdal_edit.py -colorinterp_{self.alpha} undefined FILE` says so in the file)"
        raise TerraSynthError(
            f"is band {self.alpha} transparency, or a colour such as near infrared?",
            path=self.path,
            found="called alpha in the file, as many writers do unasked, with values such as "
            + ", ".join(f"{value:g}" for value in np.unique(between)[:3]),
            expected=f"in an alpha band, 0 where there is no data, and else {opaque[0]}",
            fix=f"if it is a colour: choose the bands, as --bands {example}, which switches transparency off"
            + ("" if isinstance(self._source, Pixels) else mark)
            + f"; if it is transparency: make it 0 and {opaque[0]}",
        )

    def stripes(self) -> Iterator[Window]:
        """Windows that cover the raster from top to bottom, of about two million pixels, along the file's blocks."""
        height, width = self.grid.height, self.grid.width
        rows, columns = (height, width) if isinstance(self._source, Pixels) else self._source.block_shapes[0]
        across = min(width, max(1, _STRIPE // (rows * columns)) * columns)
        down = max(1, _STRIPE // (rows * across)) * rows
        for top in range(0, height, down):
            for left in range(0, width, across):
                yield Window(left, top, min(across, width - left), min(down, height - top))


@contextmanager
def open_raster(path: str | Path) -> Iterator[Raster]:
    """Open a TIFF, PNG or JPEG file to be read by windows.

    Raises:
        TerraSynthError: the file is missing, empty, damaged, of another format, a PNG or JPEG too large to decode, a
            TIFF with blocks too large to decode, or a scene that is not rectified.
    """
    path = Path(path)
    if path.suffix.lower() in TIFF_SUFFIXES:
        with open_tiff(path) as source:
            yield Raster(path, source)
    else:
        yield Raster(path, open_image(path))


@dataclass(frozen=True)
class Stretch:
    """How the bands of a scene become 8-bit RGB; the same for all scenes of a run.

    Attributes:
        bands: three band numbers for red, green and blue, or one for grey, counted from 1; None takes the only one or
            the only three that are not alpha. Bands that are given switch transparency off: an alpha band is then one
            as any other.
        ranges: the stored values that become 0 and 255, one pair for all bands or one for each; values between are
            scaled linearly, others are clipped. None leaves 8-bit bands as they are, and refuses any other.

    Raises:
        TerraSynthError: the bands or ranges are no such thing.
    """

    bands: tuple[int, ...] | None = None
    ranges: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        if self.bands is not None and (len(self.bands) not in (1, 3) or min(self.bands) < 1):
            raise TerraSynthError(
                "--bands are three band numbers, or one, counted from 1",
                found=",".join(map(str, self.bands)),
                expected="as 4,3,2 or 1",
            )
        shown = 3 if self.bands is None else len(self.bands)
        if self.ranges is not None and (
            len(self.ranges) not in (1, shown) or any(not low < high for low, high in self.ranges)
        ):
            raise TerraSynthError(
                "--stretch is the stored values that become black and white: LOW,HIGH for all bands, or for each",
                found=",".join(f"{value:g}" for pair in self.ranges for value in pair),
                expected=f"2 numbers, or {2 * shown} for {shown} bands, each LOW below its HIGH",
            )

    def options(self) -> str:
        """The same as options of the command line; empty if bands are left as they are."""
        bands = [] if self.bands is None else [f"--bands {','.join(map(str, self.bands))}"]
        numbers = [f"{value:.10g}" for pair in self.ranges or () for value in pair]
        return " ".join([*bands, *([f"--stretch {','.join(numbers)}"] if numbers else [])])

    def chosen(self, raster: Raster) -> tuple[int, ...]:
        """The bands of `raster` that are shown.

        Raises:
            TerraSynthError: they are not clear or not there, or their values need a range.
        """
        colors = tuple(band for band in range(1, raster.count + 1) if band != raster.alpha)
        bands = colors if self.bands is None else self.bands
        if self.bands is None and len(colors) not in (1, 3):
            raise TerraSynthError(
                "which bands are red, green and blue?",
                path=raster.path,
                found=f"{raster.count} bands" + (", one of them alpha" if raster.alpha else ""),
                expected="1 or 3 bands beside alpha",
                fix="choose them with --bands R,G,B, counted from 1, for example --bands 4,3,2",
            )
        if max(bands) > raster.count:
            raise TerraSynthError(
                "no such band",
                path=raster.path,
                found=f"band {max(bands)} of {raster.count}",
                expected=f"1 to {raster.count}",
                fix="correct --bands",
            )
        if raster.dtype.kind not in "iuf":
            raise TerraSynthError(
                "the values are no numbers on a line",
                path=raster.path,
                found=raster.dtype,
                expected="integers or floats",
            )
        if self.ranges is None and raster.dtype != np.uint8:
            raise TerraSynthError(
                "the image is not 8-bit, and no range is given",
                path=raster.path,
                found=raster.dtype,
                expected="the values that become black and white, the same for all scenes",
                fix="give them with --stretch LOW,HIGH; `terrasynth prepare --percentiles 2,98` finds and prints them",
            )
        return bands

    def rgb(self, raster: Raster, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Decode a window as it is shown.

        Returns:
            uint8 (h, w, 3), black where there is no data, and bool (h, w): where there is.

        Raises:
            TerraSynthError: as `chosen`, `Raster.read` and `Raster.valid`; or there is NaN or infinity where there
                should be data.
        """
        bands = self.chosen(raster)
        values = raster.read(window, bands)
        valid = raster.valid(values, window, transparency=self.bands is None)
        if valid is None:
            valid = np.ones(values.shape[1:], dtype=bool)
        if values.dtype.kind == "f" and (wrong := (valid & ~np.isfinite(values).all(0))).any():
            raise _not_finite(raster, window, wrong)
        if raster.palette is not None:
            if values.max() >= len(raster.palette):
                raise TerraSynthError(
                    "the palette lacks colours",
                    path=raster.path,
                    found=f"{len(raster.palette)} colours, index {values.max()}",
                )
            values = np.moveaxis(raster.palette[values[0]], -1, 0)
        missing = None if valid.all() else ~valid
        if missing is not None:
            values = np.where(valid, values, 0)
        if self.ranges is not None:
            values = self._scaled(values)
            if missing is not None:
                values[:, missing] = 0
        return np.moveaxis(values if len(values) == 3 else values.repeat(3, axis=0), 0, -1), valid

    def _scaled(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        # 24 bits hold every stored value of 16 bits exactly.
        real = np.float32 if values.dtype.itemsize <= 2 or values.dtype == np.float32 else np.float64
        low, high = np.array(self.ranges, dtype=real).T[:, :, None, None]
        # In place: a pass over memory takes as long as the arithmetic.
        scaled: NDArray[Any] = values.astype(real)
        scaled -= low
        scaled /= high - low
        scaled.clip(0, 1, out=scaled)
        scaled *= 255
        return np.rint(scaled, out=scaled).astype(np.uint8)


def _not_finite(raster: Raster, window: Window, wrong: NDArray[np.bool_]) -> TerraSynthError:
    row, column = (int(index[0]) for index in np.nonzero(wrong))
    return TerraSynthError(
        "values that are no numbers, outside nodata",
        path=raster.path,
        found=f"NaN or infinity in {wrong.sum()} pixels of a window, first at column {window.col_off + column}, "
        f"row {window.row_off + row}; "
        + ("no nodata value" if raster.nodata is None else f"the nodata value is {raster.nodata:g}"),
        expected="numbers, or the nodata value",
        fix="if NaN means nodata, say so in the file: `gdal_edit.py -a_nodata nan FILE`; otherwise repair it",
    )


def check_percentiles(percentiles: Sequence[float]) -> None:
    """Refuse anything but two numbers between 0 and 100, the smaller first."""
    if len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise TerraSynthError(
            "--percentiles are two numbers between 0 and 100, the smaller first",
            found=",".join(f"{value:g}" for value in percentiles),
            expected="as 2,98",
        )


def percentile_ranges(
    paths: Sequence[Path], bands: tuple[int, ...] | None, percentiles: tuple[float, float]
) -> tuple[tuple[float, float], ...]:
    """The range of each band for `Stretch`: two percentiles of its values over all scenes together.

    They are taken from every k-th row and column, with one k for all scenes, so that every scene counts by its size;
    about four million pixels altogether. Pixels without data do not count.

    Raises:
        TerraSynthError: a scene can not be read, has no such bands, or a band has one single value.
    """
    check_percentiles(percentiles)
    stretch = Stretch(bands, ((0.0, 1.0),))
    total = 0
    for path in paths:
        with open_raster(path) as raster:
            total += raster.grid.width * raster.grid.height
    step = max(1, math.ceil(math.sqrt(total / _SAMPLED)))
    samples: list[NDArray[Any]] = []
    with track(len(paths), "percentiles", unit="scenes") as progress:
        for path in paths:
            with open_raster(path) as raster:
                samples.append(_sampled(raster, stretch.chosen(raster), step, bands is None))
            progress.advance()
    if len({len(sample) for sample in samples}) > 1:
        raise TerraSynthError(
            "the scenes have different numbers of bands",
            path=paths[0].parent,
            found=", ".join(f"{len(sample)} in {path.name}" for sample, path in zip(samples, paths, strict=True)),
            fix="choose the bands with --bands",
        )
    joined = np.concatenate(samples, axis=1)
    if not joined.size:
        raise TerraSynthError("no scene has data", path=paths[0].parent, fix="check the nodata value of the scenes")
    ranges = [(float(low), float(high)) for low, high in np.percentile(joined, percentiles, axis=1).T]
    for number, (low, high) in enumerate(ranges, 1):
        if low >= high:
            raise TerraSynthError(
                f"percentiles {percentiles[0]:g} and {percentiles[1]:g} of the {number}. shown band are the same",
                path=paths[0].parent,
                found=f"{low:g}",
                fix="give the range with --stretch LOW,HIGH",
            )
    return tuple(ranges)


def _sampled(raster: Raster, bands: tuple[int, ...], step: int, transparency: bool) -> NDArray[Any]:
    """The pixels with data of every `step`-th row and column, (B, n)."""
    stripes, samples = list(raster.stripes()), []
    with track(len(stripes), raster.path.name, unit="stripes") as progress:
        for stripe in stripes:
            values = raster.read(stripe, bands)
            valid = raster.valid(values, stripe, transparency=transparency)
            picked = np.s_[-stripe.row_off % step :: step, -stripe.col_off % step :: step]
            kept = np.isfinite(values[:, *picked]).all(0)
            if valid is not None:
                kept &= valid[picked]
            samples.append(values[:, *picked][:, kept])
            progress.advance()
    return np.concatenate(samples, axis=1)
