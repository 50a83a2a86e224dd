"""Files of class maps, written row by row: a run that was killed goes on, and ends with the same file.

Rows that are finished are kept in a folder beside the output until all are there:

    classes.tif.unfinished/run.json    what the run was begun with
    classes.tif.unfinished/rows.raw    finished rows, as the map stores them
    classes.tif.unfinished/.lock       held by the process that is at it
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import rasterio.shutil
from numpy.typing import DTypeLike, NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rasterio.windows import Window

from terrasynth.data.raster import Grid
from terrasynth.errors import TerraSynthError
from terrasynth.io import (
    IDENTITY_TAG,
    LOCK,
    TIFF_SUFFIXES,
    alone,
    atomic_write,
    digest,
    full_disk,
    gdal_environment,
    new_tiff,
    output_is_there,
    read_json,
    remove_incomplete,
    write_json,
)
from terrasynth.progress import say, track

__all__ = ["Legend", "Made", "alone_at", "append_rows", "is_finished", "open_rows", "tidy", "write_map"]

_MARKER = "run.json"
#: Rows written to the output at a time.
_ROWS = 512


@dataclass(frozen=True)
class Legend:
    """What the values of a class map mean.

    Attributes:
        nodata: of unlabelled pixels; None if the file is to name none.
        names: of the classes, by their values.
        palette: (N, 3), the colours of the values 0..N-1; None for a map without.
        dtype: of the values.
    """

    nodata: float | None
    names: Mapping[int, str]
    palette: NDArray[np.uint8] | None
    dtype: DTypeLike = np.uint8


@dataclass(frozen=True)
class Made:
    """What a class map is made of.

    Scenes are too large to be read for a digest: a file is known by its name and size, and as long as it is worked at
    by its time as well, which copies do not keep. A finished map must only be younger.

    Attributes:
        settings: the model, the classes, the windows: whatever the result depends on, JSON-able.
        sources: the files, by what messages call them.
    """

    settings: Mapping[str, Any]
    sources: Mapping[str, Path]

    @cached_property
    def files(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of every file that is there, as they were first asked for."""
        found = [(path.name, path.stat()) for path in self.sources.values() if path.exists()]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]

    @cached_property
    def identity(self) -> str:
        """What the finished map carries."""
        return digest(self.settings, [file[:2] for file in self.files])


def is_finished(target: Path, made: Made) -> bool:
    """Whether the map that is made of this is there.

    Raises:
        TerraSynthError: it was made of something else, or is older than one of the files.
    """
    if not output_is_there(target, made.identity):
        return False
    for name, source in made.sources.items():
        if target.stat().st_mtime < source.stat().st_mtime:
            raise TerraSynthError(
                f"the output is older than its {name}",
                path=target,
                found=source,
                fix="choose another --out, or delete it",
            )
    return True


# --- what is kept until a map is finished ----------------------------------------------------------------------------


def _work(target: Path) -> Path:
    return target.with_name(f"{target.name}.unfinished")


@contextmanager
def alone_at(target: Path) -> Iterator[Path]:
    """The folder beside a target where its rows are kept, for one process at a time; deleted if all goes well.

    Raises:
        TerraSynthError: another process is in it, it is not one of ours, or the disk is full.
    """
    work = _work(target)
    busy = TerraSynthError(
        "another process is at it", path=target, found=work, fix="wait until it is over, or choose another --out"
    )
    with full_disk(target):
        work.mkdir(parents=True, exist_ok=True)
        with alone(work, busy):
            # Nobody else is here, so whatever is half-written was left by a process that is gone.
            remove_incomplete(work)
            remove_incomplete(target.parent, target.stem, target.suffix)
            if not (work / _MARKER).exists() and any(path.name != LOCK for path in work.iterdir()):
                (work / LOCK).unlink()
                raise TerraSynthError(
                    "not a folder of this command", path=work, fix="choose another --out, or delete it"
                )
            yield work
            _clear(work)
            (work / LOCK).unlink()
            with suppress(OSError):  # not empty: another process has come in
                work.rmdir()


def tidy(target: Path) -> None:
    """Delete what a run left that was killed with the map in place."""
    work = _work(target)
    names = {path.name for path in work.iterdir()} if work.is_dir() else None
    if names is not None and (_MARKER in names or names <= {LOCK}):
        with alone_at(target):
            pass


def _clear(work: Path) -> None:
    """Delete the finished rows, the file that says what they are last."""
    for path in work.iterdir():
        if path.name not in (_MARKER, LOCK):
            path.unlink()
    (work / _MARKER).unlink(missing_ok=True)


def open_rows(work: Path, made: Made) -> Path:
    """The file of finished rows in a folder from `alone_at`; those that are made of something else are thrown away."""
    marker, rows = work / _MARKER, work / "rows.raw"
    begun = {**made.settings, "files": made.files}
    if marker.exists() and read_json(marker) != json.loads(json.dumps(begun)):
        say(f"{work} was begun with another model, other files or settings: starting anew")
        _clear(work)
    write_json(marker, begun)
    rows.touch()
    return rows


def append_rows(
    rows: Path,
    grid: Grid,
    legend: Legend,
    borders: Sequence[int],
    stripes: Callable[[int], Iterable[NDArray[Any]]],
    label: str,
) -> None:
    """Append the stripes that are missing to the file of finished rows.

    Args:
        rows: from `open_rows`.
        grid: of the map.
        legend: of the map.
        borders: the first row of every stripe, and the end of the last.
        stripes: gives the stripes from one of these rows on, (rows, W).
        label: names the progress bar.
    """
    row = grid.width * np.dtype(legend.dtype).itemsize
    # Whole stripes only: a killed run may have written a part of the last.
    top = max(border for border in borders if border * row <= rows.stat().st_size)
    os.truncate(rows, top * row)
    if top == grid.height:
        return
    with rows.open("ab") as file, track(grid.height, label, unit="rows", done=top) as progress:
        for stripe in stripes(top):
            file.write(stripe.astype(legend.dtype, copy=False).tobytes())
            file.flush()
            os.fsync(file.fileno())
            progress.advance(len(stripe))


# --- the map ---------------------------------------------------------------------------------------------------------


def write_map(
    target: Path, work: Path, rows: Path, grid: Grid, legend: Legend, made: Made, tags: Mapping[str, str]
) -> None:
    """Turn the finished rows into a cloud-optimised GeoTIFF, or a PNG.

    Args:
        target: the map. A PNG says nothing of place, unlabelled pixels and names.
        work: from `alone_at`.
        rows: all of them.
        grid: size and place.
        legend: what the values mean.
        made: what they are made of.
        tags: of the file; its identity and our version are added.

    Raises:
        TerraSynthError: the rows are more or less than the grid's, or the disk is full.
    """
    dtype = np.dtype(legend.dtype)
    expected = grid.height * grid.width * dtype.itemsize
    if rows.stat().st_size != expected:
        raise TerraSynthError(
            "the finished rows are not those of the scene",
            path=rows,
            found=f"{rows.stat().st_size:,} bytes",
            expected=f"{expected:,} bytes, {dtype.itemsize} for each of {grid.width} x {grid.height} pixels",
            fix=f"see that nothing else writes there, delete {work} and run again",
        )
    tags = {IDENTITY_TAG: made.identity, "software": f"TerraSynth {version('terrasynth')}", **tags}
    if target.suffix.lower() in TIFF_SUFFIXES:
        _write_tiff(target, work, rows, grid, legend, tags)
    else:
        _write_png(target, rows, grid, legend, tags)


def _write_tiff(target: Path, work: Path, rows: Path, grid: Grid, legend: Legend, tags: Mapping[str, str]) -> None:
    dtype = np.dtype(legend.dtype)
    profile = {
        "dtype": dtype.name,
        "count": 1,
        "width": grid.width,
        "height": grid.height,
        "crs": grid.crs,
        "transform": grid.transform,
        "nodata": legend.nodata,
        "photometric": "MINISBLACK" if legend.palette is None else "palette",
        "tiled": True,
        "BIGTIFF": "IF_SAFER",
    }
    whole = work / "map.tif"
    with (
        atomic_write(whole, durable=False) as partial,
        new_tiff(partial, **profile) as file,
        rows.open("rb") as finished,
    ):
        for top in range(0, grid.height, _ROWS):
            count = min(_ROWS, grid.height - top)
            part = np.fromfile(finished, dtype=dtype, count=count * grid.width).reshape(count, grid.width)
            file.write(part, 1, window=Window(0, top, grid.width, count))
        file.set_band_description(1, "class")
        file.update_tags(**tags)
        file.update_tags(1, **{f"class_{value}": name for value, name in legend.names.items()})
        if legend.palette is not None:
            file.write_colormap(1, {value: (*color, 255) for value, color in enumerate(legend.palette.tolist())})
    with atomic_write(target) as partial, gdal_environment():
        # Overviews by majority: a mean of class indices is another class.
        rasterio.shutil.copy(whole, partial, driver="COG", compress="deflate", overview_resampling="mode")


def _write_png(target: Path, rows: Path, grid: Grid, legend: Legend, tags: Mapping[str, str]) -> None:
    image = Image.fromarray(np.fromfile(rows, dtype=legend.dtype).reshape(grid.height, grid.width))
    if legend.palette is not None:
        # All 256 colours, or Pillow would store fewer bits, whatever the values are.
        image.putpalette(np.pad(legend.palette, ((0, 256 - len(legend.palette)), (0, 0))).tobytes())
    text = PngInfo()
    for name, value in tags.items():
        text.add_text(name, value)
    with atomic_write(target) as partial:
        image.save(partial, pnginfo=text)
