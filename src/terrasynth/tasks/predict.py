"""Class maps of scenes of any size, by a segmentor over overlapping windows: `terrasynth predict`.

Probabilities are blended where windows overlap. The scene is worked through from top to bottom, so that memory grows
with its width alone. Rows that are finished are kept beside the output until all are: a run that was killed goes on
there, and ends with the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor

from terrasynth.data.blending import cover
from terrasynth.data.raster import Raster, Stretch, open_raster
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError, combined
from terrasynth.io import IMAGE_SUFFIXES, TIFF_SUFFIXES, weights_digest
from terrasynth.progress import say, track
from terrasynth.tasks.class_map import Legend, Made, alone_at, append_rows, is_finished, open_rows, tidy, write_map
from terrasynth.tasks.description import Description
from terrasynth.tasks.stripes import Part, batches, blend, borders, check_width, highest

if TYPE_CHECKING:
    from terrasynth.tasks.segmentation import Segmentor

__all__ = ["PredictSettings", "blended", "predict"]


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
    made_of = {
        "segmentor": weights_digest(folder),
        "schema": None if schema is None else schema.to_dict(),
        "windows": [settings.size, settings.overlap, settings.batch_size],
        "stretch": [settings.stretch.bands, settings.stretch.ranges],
    }
    made = {scene: Made(made_of, {"scene": scene}) for scene in targets}
    todo = {scene: target for scene, target in targets.items() if not is_finished(target, made[scene])}
    for target in targets.values():
        if target not in todo.values():
            say(f"{target} is there already")
            tidy(target)
    _check_numbers(list(todo), settings.stretch)
    if todo:
        # The libraries of the networks take longer to load than all that was done so far.
        from terrasynth.tasks.segmentation import Segmentor

        segmentor = Segmentor.from_pretrained(folder, schema=schema)
        segmentor.to("cuda" if torch.cuda.is_available() else "cpu")
        for scene, target in todo.items():
            with alone_at(target) as work:
                # Another process may have finished it since.
                if not is_finished(target, made[scene]):
                    _predict_scene(segmentor, scene, target, work, settings, schema, made[scene])
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
    def by_header(raster: Raster) -> None:
        settings.stretch.chosen(raster)
        check_width(raster.path, raster.grid, settings.size, num_classes)

    _refuse(scenes, by_header)


def _check_numbers(scenes: Sequence[Path], stretch: Stretch) -> None:
    """Read scenes of floating-point numbers, so that a NaN shows before anything is computed.

    To mend it is to change the file, and with it all rows that were finished would be lost. Whole numbers are none, and
    are not read twice.
    """

    def whole(raster: Raster) -> None:
        if raster.dtype.kind == "f":
            stripes = list(raster.stripes())
            with track(len(stripes), f"checking {raster.path.name}", unit="stripes") as progress:
                for stripe in stripes:
                    stretch.rgb(raster, stripe)
                    progress.advance()

    _refuse(scenes, whole)


def _refuse(scenes: Sequence[Path], check: Callable[[Raster], None]) -> None:
    """Raise what is wrong with the scenes, all in one message."""
    bad = []
    for scene in scenes:
        try:
            with open_raster(scene) as raster:
                check(raster)
        except TerraSynthError as error:
            bad.append(error)
    if bad:
        raise combined(bad, f"{len(bad)} of {len(scenes)} scenes can not be used", shown=None)


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
    compute = partial(_parts, segmentor, raster, stretch, settings.batch_size)
    return blend(raster.grid, settings.size, settings.overlap, segmentor.num_classes, compute, top=top)


@torch.inference_mode()
def _parts(
    segmentor: Segmentor, raster: Raster, stretch: Stretch, batch_size: int, windows: Sequence[Window]
) -> Iterator[Part]:
    """The probabilities in the windows of a row."""
    for batch in batches(windows, batch_size):
        first, last = batch[0], batch[-1]
        # Read in one piece: the windows overlap.
        across = last.col_off + last.width - first.col_off
        rgb, has_data = stretch.rgb(raster, Window(first.col_off, first.row_off, across, first.height))
        pixels = torch.from_numpy(np.moveaxis(rgb, -1, 0))
        columns = {w.col_off: slice(w.col_off - first.col_off, w.col_off - first.col_off + w.width) for w in batch}
        seen = [left for left, inside in columns.items() if has_data[:, inside].any()]
        for left, inside in columns.items():
            if left not in seen:
                yield Part(left, has_data[:, inside], None)
        if not seen:
            continue
        images = torch.stack([pixels[:, :, columns[left]] for left in seen])
        logits = segmentor(images.to(segmentor.device).float().div_(255))
        for left, scores in zip(seen, logits, strict=True):
            share = scores.float().softmax(0).cpu()  # of a window alone, which the processor's cache holds
            yield Part(left, has_data[:, columns[left]], share)


def _predict_scene(
    segmentor: Segmentor,
    scene: Path,
    target: Path,
    work: Path,
    settings: PredictSettings,
    schema: LabelSchema | None,
    made: Made,
) -> None:
    legend = _legend(segmentor, schema)

    def stripes(top: int) -> Iterator[NDArray[np.uint8]]:
        for _, shares, valid in blended(segmentor, raster, settings.stretch, settings, top=top):
            classes = np.empty(valid.shape, dtype=np.uint8)
            for columns, _, likeliest in highest(shares):
                classes[:, columns] = torch.where(valid[:, columns], likeliest, segmentor.ignore_index).byte().numpy()
            yield classes if schema is None else schema.to_index(classes)

    with open_raster(scene) as raster:
        grid = raster.grid
        rows = open_rows(work, made)
        append_rows(rows, grid, legend, borders(grid, settings.size, settings.overlap), stripes, scene.name)
    tags = {"source": scene.name, "segmentor": made.settings["segmentor"]}
    write_map(target, work, rows, grid, legend, made, tags)


def _legend(segmentor: Segmentor, schema: LabelSchema | None) -> Legend:
    if schema is not None:
        names = dict(zip(schema.stored, schema.names, strict=True))
        return Legend(schema.stored_ignore[0], names, schema.palette())
    return Legend(segmentor.ignore_index, dict(enumerate(segmentor.class_names or ())), None)
