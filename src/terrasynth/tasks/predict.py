"""Class maps of scenes of any size, by a segmentor over overlapping windows: `terrasynth predict`.

Probabilities are blended where windows overlap. The scene is worked through from top to bottom, so that memory grows
with its width alone. Rows that are finished are kept beside the output until all are: a run that was killed goes on
there, and ends with the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import rasterio.shutil
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor

from terrasynth.data.blending import Axis, cover
from terrasynth.data.raster import Grid, Raster, Stretch, open_raster, percentile_ranges
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError, combined
from terrasynth.io import (
    IDENTITY_TAG,
    IMAGE_SUFFIXES,
    MAX_BYTES,
    TIFF_SUFFIXES,
    atomic_write,
    digest,
    gdal_environment,
    new_tiff,
    read_json,
    remove_incomplete,
    tiff_is_there,
    weights_digest,
    write_json,
)
from terrasynth.progress import say, track
from terrasynth.tasks.segmentation import Segmentor

__all__ = ["PredictSettings", "blended", "predict"]

_MARKER = "run.json"
#: Rows written to the output at a time.
_ROWS = 512
#: Most bytes that the probabilities of a stripe as wide as the scene may take.
_MAX_STRIPE = 8 * MAX_BYTES


@dataclass(frozen=True)
class PredictSettings:
    """How scenes are predicted.

    Attributes:
        size: side of the windows in pixels.
        overlap: pixels that neighbours share; a segmentor that sees further than a quarter of it is cut short there.
        batch_size: windows computed together.
        stretch: how the bands become RGB; as in training.
        percentiles: instead of `stretch.ranges`, two percentiles of each band over all scenes.
    """

    size: int = 512
    overlap: int = 128
    batch_size: int = 8
    stretch: Stretch = field(default_factory=Stretch)
    percentiles: tuple[float, float] | None = None


def predict(
    folder: Path, scenes: Sequence[Path], out: Path, settings: PredictSettings, *, schema: LabelSchema | None = None
) -> list[Path]:
    """Predict the class of every pixel of every scene.

    Args:
        folder: of a segmentor.
        scenes: raster files, or folders of them.
        out: a TIFF file for a single scene; otherwise a folder, where each has the name of its scene.
        settings: how.
        schema: colours and stored values of the classes, if the segmentor was saved without or others are wanted.

    Returns:
        The files: cloud-optimised GeoTIFFs with the scene's CRS and transform, the unlabelled value as nodata, the
        colours of the classes, and their names as tags.

    Raises:
        TerraSynthError: anything that is wrong with the scenes, all in one message before anything is computed; or an
            output exists that was made of something else.
    """
    segmentor = Segmentor.from_pretrained(folder, schema=schema)
    schema = schema or segmentor.schema
    if schema is None:
        say("the segmentor was saved without colours: --labels would add them")
    targets = _targets(scenes, out)
    stretch = _common_stretch(list(targets), settings, segmentor.num_classes)
    identity = {
        "segmentor": weights_digest(folder),
        "schema": None if schema is None else schema.to_dict(),
        "windows": [settings.size, settings.overlap, settings.batch_size],
        "stretch": [stretch.bands, stretch.ranges],
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    segmentor.to(device)
    written = []
    for scene, target in targets.items():
        remove_incomplete(target.parent, target.stem)
        if _is_finished(scene, target, identity):
            _discard(_work(target))
        else:
            with open_raster(scene) as raster:
                _predict_scene(segmentor, raster, target, stretch, settings, schema, identity)
        written.append(target)
    return written


# --- which scenes, and where their class maps go ---------------------------------------------------------------------


def _targets(scenes: Sequence[Path], out: Path) -> dict[Path, Path]:
    files: list[Path] = []
    for scene in scenes:
        if not scene.is_dir():
            files.append(scene)
            continue
        inside = [p for p in sorted(scene.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != "."]
        if not inside:
            raise TerraSynthError("no scenes here", path=scene, expected=", ".join(IMAGE_SUFFIXES))
        files += inside
    if len(files) == 1 and out.suffix.lower() in TIFF_SUFFIXES:
        targets = {files[0]: out}
    elif out.suffix.lower() in TIFF_SUFFIXES:
        raise TerraSynthError("several scenes can not go to one file", path=out, fix="give a folder as --out")
    else:
        targets = {file: out / f"{file.stem}.tif" for file in files}
    seen: dict[Path, Path] = {}
    for file, target in targets.items():
        if target.resolve() == file.resolve():
            raise TerraSynthError("the output would replace the scene", path=file, fix="choose another --out")
        if target in seen:
            raise TerraSynthError(
                "two scenes have the same name", path=file, found=f"and {seen[target]}", fix="rename one of them"
            )
        seen[target] = file
    return targets


def _common_stretch(scenes: Sequence[Path], settings: PredictSettings, num_classes: int) -> Stretch:
    stretch = settings.stretch
    if settings.percentiles is not None:
        if stretch.ranges is not None:
            raise TerraSynthError("--stretch and --percentiles exclude each other", fix="give one of them")
        stretch = Stretch(stretch.bands, percentile_ranges(scenes, stretch.bands, settings.percentiles))
        say(f"shown with {stretch.options()}")
    bad = []
    for scene in scenes:
        try:
            with open_raster(scene) as raster:
                stretch.chosen(raster)
                _check_width(raster, settings.size, num_classes)
        except TerraSynthError as error:
            bad.append(error)
    if bad:
        raise combined(bad, f"{len(bad)} of {len(scenes)} scenes can not be used", shown=None)
    return stretch


def _check_width(raster: Raster, size: int, num_classes: int) -> None:
    width = raster.grid.width
    needed = 4 * num_classes * min(size, raster.grid.height) * width
    if needed > _MAX_STRIPE:
        raise TerraSynthError(
            "the scene is too wide: the probabilities of a row of windows do not fit in memory",
            path=raster.path,
            found=f"{width} columns, {num_classes} classes, windows of {size}: {needed / 2**30:.1f} GiB",
            expected=f"at most {_MAX_STRIPE / 2**30:.1f} GiB",
            fix="lower --size, or cut the scene, for example with `gdal_translate -srcwin`",
        )


def _is_finished(scene: Path, target: Path, identity: dict[str, Any]) -> bool:
    if not tiff_is_there(target, digest(identity, scene.name, scene.stat().st_size)):
        return False
    if target.stat().st_mtime < scene.stat().st_mtime:
        raise TerraSynthError(
            "the output is older than its scene", path=target, found=scene, fix="choose another --out, or delete it"
        )
    say(f"{target} is there already")
    return True


# --- one scene -------------------------------------------------------------------------------------------------------


def blended(
    segmentor: Segmentor, raster: Raster, stretch: Stretch, settings: PredictSettings, *, top: int = 0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Probabilities of the classes, from top to bottom.

    Args:
        segmentor: on its device.
        raster: the scene.
        stretch: how its bands become RGB.
        settings: windows and batch size.
        top: the first row that is wanted; one where an earlier call yielded.

    Yields:
        The first row; float32 (K, rows, W), which sum to one over the classes except where there is no data; and bool
        (rows, W), where there is. Both are overwritten in the next step.
    """
    grid = raster.grid
    down = cover(grid.height, settings.size, settings.overlap)
    across = cover(grid.width, settings.size, settings.overlap)
    total = torch.zeros(segmentor.num_classes, down.size, grid.width)
    valid = torch.zeros(down.size, grid.width, dtype=torch.bool)
    rows = [row for row, start in enumerate(down.starts) if start + down.size > top]
    for row in rows:
        start = down.starts[row]
        for columns in _batches(len(across.starts), settings.batch_size):
            _add_windows(segmentor, raster, stretch, down, row, across, columns, total, valid)
        end = down.starts[row + 1] if row + 1 < len(down.starts) else grid.height
        done = end - start
        if end > top:
            yield start, total[:, :done], valid[:done]
        kept = down.size - done
        total[:, :kept] = total[:, done:].clone()
        total[:, kept:] = 0
        valid[:kept] = valid[done:].clone()


def _batches(count: int, size: int) -> list[range]:
    return [range(first, min(count, first + size)) for first in range(0, count, size)]


@torch.inference_mode()
def _add_windows(
    segmentor: Segmentor,
    raster: Raster,
    stretch: Stretch,
    down: Axis,
    row: int,
    across: Axis,
    columns: range,
    total: Tensor,
    valid: Tensor,
) -> None:
    """Add the weighted probabilities of neighbouring windows to a stripe."""
    left, right = across.starts[columns[0]], across.starts[columns[-1]] + across.size
    # Read in one piece: the windows overlap.
    rgb, has_data = stretch.rgb(raster, Window(left, down.starts[row], right - left, down.size))
    valid[:, left:right] = torch.from_numpy(has_data)
    starts = {column: across.starts[column] - left for column in columns}
    seen = [column for column, start in starts.items() if has_data[:, start : start + across.size].any()]
    if not seen:
        return
    pixels = torch.from_numpy(np.moveaxis(rgb, -1, 0))
    images = torch.stack([pixels[:, :, starts[column] : starts[column] + across.size] for column in seen])
    shares = segmentor(images.to(segmentor.device).float() / 255).float().softmax(1).cpu()
    for column, share in zip(seen, shares, strict=True):
        weights = torch.from_numpy(np.outer(down.weights[row], across.weights[column]))
        start = across.starts[column]
        total[:, :, start : start + across.size].addcmul_(share, weights)


def _predict_scene(
    segmentor: Segmentor,
    raster: Raster,
    target: Path,
    stretch: Stretch,
    settings: PredictSettings,
    schema: LabelSchema | None,
    identity: dict[str, Any],
) -> None:
    scene, grid = raster.path, raster.grid
    work = _work(target)
    begun = {**identity, "scene": [scene.name, scene.stat().st_size, scene.stat().st_mtime_ns]}
    rows = _open_rows(work, json.loads(json.dumps(begun)))
    # Whole stripes only: a killed run may have written a part of the last.
    borders = [0, *cover(grid.height, settings.size, settings.overlap).starts[1:], grid.height]
    top = max(border for border in borders if border * grid.width <= rows.stat().st_size)
    os.truncate(rows, top * grid.width)
    with rows.open("ab") as file, track(grid.height, scene.name, unit="rows", done=top) as progress:
        if top < grid.height:
            for _, shares, valid in blended(segmentor, raster, stretch, settings, top=top):
                # With the classes last in memory the search is several times faster.
                likeliest = shares.movedim(0, -1).contiguous().argmax(-1)
                classes = torch.where(valid, likeliest, segmentor.ignore_index).byte().numpy()
                file.write((classes if schema is None else schema.to_index(classes)).tobytes())
                file.flush()
                os.fsync(file.fileno())
                progress.advance(len(classes))
    tags = {
        IDENTITY_TAG: digest(identity, scene.name, scene.stat().st_size),
        "software": f"TerraSynth {version('terrasynth')}",
        "source": scene.name,
        "segmentor": identity["segmentor"],
    }
    _write_map(target, work, rows, grid, _Legend.of(segmentor, schema), tags)
    _discard(work)


def _work(target: Path) -> Path:
    return target.with_name(f"{target.stem}.unfinished")


def _discard(work: Path) -> None:
    """Delete the folder of finished rows, the file that says what it is last."""
    if (work / _MARKER).exists():
        for path in work.iterdir():
            if path.name != _MARKER:
                path.unlink()
        (work / _MARKER).unlink()
        work.rmdir()


def _open_rows(work: Path, begun: dict[str, Any]) -> Path:
    """The file of finished rows; those of an earlier run with other settings are thrown away."""
    marker, rows = work / _MARKER, work / "rows.raw"
    remove_incomplete(work)
    if marker.exists():
        if read_json(marker) != begun:
            say(f"{work} was begun with another segmentor, scene or settings: starting anew")
            _discard(work)
    elif work.exists() and any(work.iterdir()):
        raise TerraSynthError("not a folder of this command", path=work, fix="choose another --out, or delete it")
    work.mkdir(parents=True, exist_ok=True)
    write_json(marker, begun)
    rows.touch()
    return rows


@dataclass(frozen=True)
class _Legend:
    """What the values of a class map mean."""

    nodata: int
    names: dict[int, str]
    palette: NDArray[np.uint8] | None

    @classmethod
    def of(cls, segmentor: Segmentor, schema: LabelSchema | None) -> _Legend:
        if schema is not None:
            names = dict(zip(schema.stored, schema.names, strict=True))
            return cls(schema.stored_ignore[0], names, schema.palette())
        return cls(segmentor.ignore_index, dict(enumerate(segmentor.class_names or ())), None)


def _write_map(target: Path, work: Path, rows: Path, grid: Grid, legend: _Legend, tags: dict[str, str]) -> None:
    """Turn the finished rows into a cloud-optimised GeoTIFF."""
    profile = {
        "dtype": "uint8",
        "count": 1,
        "width": grid.width,
        "height": grid.height,
        "crs": grid.crs,
        "transform": grid.transform,
        "nodata": legend.nodata,
        "photometric": "MINISBLACK" if legend.palette is None else "palette",
        "compress": "deflate",
        "tiled": True,
        "BIGTIFF": "IF_SAFER",
    }
    whole = work / "map.tif"
    with new_tiff(whole, **profile) as file, rows.open("rb") as finished:
        for top in range(0, grid.height, _ROWS):
            count = min(_ROWS, grid.height - top)
            part = np.fromfile(finished, dtype=np.uint8, count=count * grid.width).reshape(count, grid.width)
            file.write(part, 1, window=Window(0, top, grid.width, count))
        file.set_band_description(1, "class")
        file.update_tags(**tags)
        file.update_tags(1, **{f"class_{value}": name for value, name in legend.names.items()})
        if legend.palette is not None:
            file.write_colormap(1, {value: (*color, 255) for value, color in enumerate(legend.palette.tolist())})
    with atomic_write(target) as partial, gdal_environment():
        # Overviews by majority: a mean of class indices is another class.
        rasterio.shutil.copy(whole, partial, driver="COG", compress="deflate", overview_resampling="mode")
