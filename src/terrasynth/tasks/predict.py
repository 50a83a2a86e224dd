"""Class maps of scenes of any size, by a segmentor over overlapping windows: `terrasynth predict`.

Probabilities are blended where windows overlap. The scene is worked through from top to bottom, so that memory grows
with its width alone. Rows that are finished are kept beside the output until all are: a run that was killed goes on
there, and ends with the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio.shutil
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor

from terrasynth.data.blending import Axis, cover
from terrasynth.data.raster import Grid, Raster, Stretch, open_raster
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError, combined
from terrasynth.io import (
    IDENTITY_TAG,
    IMAGE_SUFFIXES,
    LOCK,
    MAX_BYTES,
    TIFF_SUFFIXES,
    alone,
    atomic_write,
    digest,
    full_disk,
    gdal_environment,
    new_tiff,
    read_json,
    remove_incomplete,
    tiff_is_there,
    weights_digest,
    write_json,
)
from terrasynth.progress import say, track
from terrasynth.tasks.description import Description

if TYPE_CHECKING:
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

    Raises:
        TerraSynthError: they do not fit together.
    """

    size: int = 512
    overlap: int = 128
    batch_size: int = 8
    stretch: Stretch = field(default_factory=Stretch)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise TerraSynthError("--batch-size is the number of windows computed together", found=self.batch_size)
        cover(self.size, self.size, self.overlap)


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
            output exists that was made of something else; or another process is at one.
    """
    saved = Description.read(folder)
    schema = schema or saved.schema
    if schema is None:
        say("the segmentor was saved without colours: --labels would add them")
    targets = _targets(scenes, out)
    _check_scenes(list(targets), settings, saved.num_classes)
    identity = {
        "segmentor": weights_digest(folder),
        "schema": None if schema is None else schema.to_dict(),
        "windows": [settings.size, settings.overlap, settings.batch_size],
        "stretch": [settings.stretch.bands, settings.stretch.ranges],
    }
    todo = {scene: target for scene, target in targets.items() if not _is_finished(scene, target, identity)}
    for target in targets.values():
        if target not in todo.values():
            say(f"{target} is there already")
            _tidy(target)
    if todo:
        # The libraries of the networks take longer to load than all that was done so far.
        from terrasynth.tasks.segmentation import Segmentor

        segmentor = Segmentor.from_pretrained(folder, schema=schema)
        segmentor.to("cuda" if torch.cuda.is_available() else "cpu")
        for scene, target in todo.items():
            with _alone_at(target) as work:
                # Another process may have finished it since.
                if not _is_finished(scene, target, identity):
                    _predict_scene(segmentor, scene, target, work, settings, schema, identity)
    return list(targets.values())


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
    folders = {scene.resolve() for scene in scenes if scene.is_dir()}
    seen: dict[Path, Path] = {}
    for file, target in targets.items():
        if target.resolve() == file.resolve():
            raise TerraSynthError("the output would replace the scene", path=file, fix="choose another --out")
        if target.resolve().parent in folders:
            raise TerraSynthError(
                "the output would be one of the scenes of the next run",
                path=target,
                fix="choose an --out outside the folders of the scenes",
            )
        if target in seen:
            raise TerraSynthError(
                "two scenes have the same name", path=file, found=f"and {seen[target]}", fix="rename one of them"
            )
        seen[target] = file
    return targets


def _check_scenes(scenes: Sequence[Path], settings: PredictSettings, num_classes: int) -> None:
    bad = []
    for scene in scenes:
        try:
            with open_raster(scene) as raster:
                settings.stretch.chosen(raster)
                _check_width(raster, settings.size, num_classes)
        except TerraSynthError as error:
            bad.append(error)
    if bad:
        raise combined(bad, f"{len(bad)} of {len(scenes)} scenes can not be used", shown=None)


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
    logits = segmentor(images.to(segmentor.device).float().div_(255))
    for column, scores in zip(seen, logits, strict=True):
        share = scores.float().softmax(0).cpu()  # of a window alone, which the processor's cache holds
        weights = torch.from_numpy(np.outer(down.weights[row], across.weights[column]))
        start = across.starts[column]
        total[:, :, start : start + across.size].addcmul_(share, weights)


def _predict_scene(
    segmentor: Segmentor,
    scene: Path,
    target: Path,
    work: Path,
    settings: PredictSettings,
    schema: LabelSchema | None,
    identity: dict[str, Any],
) -> None:
    with open_raster(scene) as raster:
        grid = raster.grid
        rows = _open_rows(work, {**identity, "scene": [scene.name, scene.stat().st_size, scene.stat().st_mtime_ns]})
        _predict_rows(segmentor, raster, rows, settings, schema)
    if rows.stat().st_size != grid.height * grid.width:
        raise TerraSynthError(
            "the finished rows are not those of the scene",
            path=rows,
            found=f"{rows.stat().st_size:,} bytes",
            expected=f"{grid.height * grid.width:,} bytes, one for each of {grid.width} x {grid.height} pixels",
            fix=f"see that nothing else writes there, delete {work} and run again",
        )
    tags = {
        IDENTITY_TAG: digest(identity, scene.name, scene.stat().st_size),
        "software": f"TerraSynth {version('terrasynth')}",
        "source": scene.name,
        "segmentor": identity["segmentor"],
    }
    _write_map(target, work, rows, grid, _Legend.of(segmentor, schema), tags)


def _predict_rows(
    segmentor: Segmentor, raster: Raster, rows: Path, settings: PredictSettings, schema: LabelSchema | None
) -> None:
    """Append the stripes that are missing to the file of finished rows."""
    grid = raster.grid
    # Whole stripes only: a killed run may have written a part of the last.
    borders = [0, *cover(grid.height, settings.size, settings.overlap).starts[1:], grid.height]
    top = max(border for border in borders if border * grid.width <= rows.stat().st_size)
    os.truncate(rows, top * grid.width)
    if top == grid.height:
        return
    with rows.open("ab") as file, track(grid.height, raster.path.name, unit="rows", done=top) as progress:
        for _, shares, valid in blended(segmentor, raster, settings.stretch, settings, top=top):
            # With the classes last in memory the search is several times faster.
            likeliest = shares.movedim(0, -1).contiguous().argmax(-1)
            classes = torch.where(valid, likeliest, segmentor.ignore_index).byte().numpy()
            file.write((classes if schema is None else schema.to_index(classes)).tobytes())
            file.flush()
            os.fsync(file.fileno())
            progress.advance(len(classes))


# --- what is kept until a map is finished ----------------------------------------------------------------------------


def _work(target: Path) -> Path:
    return target.with_name(f"{target.stem}.unfinished")


@contextmanager
def _alone_at(target: Path) -> Iterator[Path]:
    """The folder beside a target where its rows are kept, for one process at a time; deleted if all goes well."""
    work = _work(target)
    busy = TerraSynthError(
        "another process is at it", path=target, found=work, fix="wait until it is over, or choose another --out"
    )
    with full_disk(target):
        work.mkdir(parents=True, exist_ok=True)
        with alone(work, busy):
            # Nobody else is here, so whatever is half-written was left by a process that is gone.
            remove_incomplete(work)
            remove_incomplete(target.parent, target.stem)
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


def _tidy(target: Path) -> None:
    """Delete what a run left that was killed with the map in place."""
    work = _work(target)
    names = {path.name for path in work.iterdir()} if work.is_dir() else None
    if names is not None and (_MARKER in names or names <= {LOCK}):
        with _alone_at(target):
            pass


def _clear(work: Path) -> None:
    """Delete the finished rows, the file that says what they are last."""
    for path in work.iterdir():
        if path.name not in (_MARKER, LOCK):
            path.unlink()
    (work / _MARKER).unlink(missing_ok=True)


def _open_rows(work: Path, begun: Mapping[str, Any]) -> Path:
    """The file of finished rows; those of an earlier run with other settings are thrown away."""
    marker, rows = work / _MARKER, work / "rows.raw"
    if marker.exists() and read_json(marker) != json.loads(json.dumps(begun)):
        say(f"{work} was begun with another segmentor, scene or settings: starting anew")
        _clear(work)
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
