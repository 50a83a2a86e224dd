"""Sharper boundaries in a class map of any size and any model: `terrasynth refine`.

A refiner sees image and rough map in overlapping windows, and its scores are blended. They count near the boundaries
between classes; every other pixel keeps its value to the bit. Rows that are finished are kept beside the output until
all are, so a run that was killed goes on, and ends with the same file.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor

from terrasynth.data.blending import cover
from terrasynth.data.raster import Grid, Raster, Stretch, crs_name, open_raster
from terrasynth.data.scenes import check_aligned
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.io import TIFF_SUFFIXES, digest, read_json, weights_digest
from terrasynth.packaged import PACKAGED, packaged_or
from terrasynth.progress import say, track
from terrasynth.tasks.bands import Tolerance, as_labels, dilate, disc, mixed, planes
from terrasynth.tasks.class_map import Made, alone_at, append_rows, is_finished, open_rows, tidy, write_map
from terrasynth.tasks.rough_map import UNLABELLED, RoughMap, read_rough_map
from terrasynth.tasks.stripes import Part, batches, blend, borders, check_width, highest, rows_of_windows

if TYPE_CHECKING:
    from terrasynth.systems.idgbr import IDGBRPipeline

__all__ = ["Confidence", "RefineSettings", "Refiner", "load_refiner", "refine"]

#: Scores that differ by less are equal.
_EQUAL = 1e-6


class Refiner(Protocol):
    """What sharpens the boundaries in windows of a class map."""

    @property
    def identity(self) -> str:
        """Of its weights and settings: two of the same identity give the same scores."""

    @property
    def num_classes(self) -> int | None:
        """How many classes it was made for; None if it refines any."""

    @property
    def schema(self) -> LabelSchema | None:
        """The classes it was made for; None if it refines any, or does not know them by name."""

    @property
    def image_size(self) -> int:
        """Side of the windows that it was trained on, in pixels."""

    @property
    def factor(self) -> int:
        """Sides of windows must be multiples of it."""

    def scores(self, images: Tensor, rough: Tensor, *, num_classes: int, seeds: Sequence[int]) -> Tensor:
        """Scores of the classes; the highest wins. Those of a window depend on its own image, map and seed alone.

        Args:
            images: float32 (B, 3, H, W) in [0, 1], on the CPU.
            rough: int64 (B, H, W), class indices or `UNLABELLED`.
            num_classes: K.
            seeds: of each window.

        Returns:
            float (B, K, H, W), on any device. Where windows overlap their mean counts, so probabilities are best. NaN
            throughout a class says nothing about it: its mean is that of other windows.
        """


@dataclass(frozen=True)
class _IDGBR:
    """A refiner of `systems.idgbr`, which is loaded when something is asked of it."""

    folder: Path
    index: Mapping[str, Any]
    steps: int
    strength: float
    guidance_scale: float

    @cached_property
    def identity(self) -> str:
        return digest(weights_digest(self.folder), self.index, self.steps, self.strength, self.guidance_scale)

    @cached_property
    def pipeline(self) -> IDGBRPipeline:
        # The libraries of the networks take longer to load than all that is done before.
        from terrasynth.systems.idgbr import IDGBRPipeline

        pipeline = IDGBRPipeline.from_pretrained(self.folder)
        most = math.floor(self.strength * pipeline.scheduler.config.num_train_timesteps + 1e-6)
        if self.steps > most:
            raise TerraSynthError(
                "more steps than the model has timesteps",
                path=self.folder,
                found=f"--steps {self.steps} at --strength {self.strength:g}",
                expected=f"at most {most}",
                fix="lower --steps; a few are enough" if most else "raise --strength",
            )
        return pipeline.place("cuda" if torch.cuda.is_available() else "cpu", "auto")

    @property
    def num_classes(self) -> int | None:
        return None if self.pipeline.config.each_class else self.pipeline.num_classes

    @property
    def schema(self) -> LabelSchema | None:
        return self.pipeline.schema

    @property
    def image_size(self) -> int:
        # Of the index alone, so that nothing is loaded before the files are looked at.
        size, patch = (int(self.index.get(key) or least) for key, least in (("image_size", 256), ("patch_size", 1)))
        return -(-size // patch) * patch

    @property
    def factor(self) -> int:
        return self.pipeline.factor

    def scores(self, images: Tensor, rough: Tensor, *, num_classes: int, seeds: Sequence[int]) -> Tensor:
        each_class = self.pipeline.config.each_class
        scores = self.pipeline.scores(
            images,
            rough.where(rough != UNLABELLED, self.pipeline.ignore_index),
            seeds=seeds,
            num_steps=self.steps,
            strength=self.strength,
            guidance_scale=self.guidance_scale,
            each_class=each_class,
            num_classes=num_classes,
        )
        if each_class:
            # It was not asked about a class that a window has not; its 0 would count against a neighbour's score.
            there = torch.stack([(rough == k).flatten(1).any(1) for k in range(num_classes)], dim=1)
            scores[~there.to(scores.device)] = math.nan
        return scores


def load_refiner(model: str | Path, *, steps: int = 2, strength: float = 1.0, guidance_scale: float = 1.0) -> Refiner:
    """An IDGBR refiner that TerraSynth saved, or one that comes with the package, by its name.

    It computes in bfloat16 where the processor has instructions for it, else in float32.

    Args:
        model: a folder or a name.
        steps: evaluations of the network for every window; 0 for the votes that it begins with.
        strength: how much noise it starts from: 1 for noise alone, below for the rough map under so much noise.
        guidance_scale: by how much image and map are exaggerated against none; 1 is off.

    Raises:
        TerraSynthError: the folder is no refiner's, or the strength is not above 0 and up to 1. What is wrong with its
            parts shows when it is used.
    """
    folder = Path(packaged_or(model) if str(model) in PACKAGED else model)
    path = folder / "model_index.json"
    index = read_json(path, fix="copy the folder again") if path.is_file() else None
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(index, dict) or kind != "IDGBRPipeline":
        near = [] if folder.exists() else difflib.get_close_matches(str(model), PACKAGED, n=1)
        there = "no model_index.json" if folder.exists() else "no such folder"
        raise TerraSynthError(
            "not the folder of a refiner",
            path=folder,
            found=there if index is None else f"a model of {kind}",
            expected="a refiner that `terrasynth train --what refiner` or IDGBRPipeline.save_pretrained wrote",
            fix=f"did you mean `{near[0]}`?"
            if near
            else "correct --model; Stable Diffusion must be trained to refine first",
        )
    if not 0 < strength <= 1:
        raise TerraSynthError("--strength is above 0 and up to 1", found=strength)
    return _IDGBR(folder, index, steps, strength, guidance_scale)


@dataclass(frozen=True)
class RefineSettings:
    """How a class map is refined.

    Attributes:
        size: side of the windows in pixels.
        overlap: pixels that neighbours share.
        batch_size: windows computed together.
        stretch: how the bands of the image become RGB; as in the refiner's training.
        band: pixels may change that have one of another class this near; None for all pixels, everywhere.
        seed: of the run; that of a window derives from it and the window's place.

    Raises:
        TerraSynthError: they do not fit together.
    """

    size: int = 256
    overlap: int = 64
    batch_size: int = 8
    stretch: Stretch = field(default_factory=Stretch)
    band: Tolerance | None = field(default=Tolerance(8))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise TerraSynthError("--batch-size is the number of windows computed together", found=self.batch_size)
        cover(self.size, self.size, self.overlap)

    def to_dict(self) -> dict[str, Any]:
        """What the result depends on, JSON-able."""
        return {
            "windows": [self.size, self.overlap, self.batch_size],
            "stretch": [self.stretch.bands, self.stretch.ranges],
            "band": None if self.band is None else [self.band.value, self.band.unit],
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Confidence:
    """How sure a class map is of its pixels.

    Attributes:
        path: raster of the same pixels, one band of numbers that grow with it: the probability of the map's class, or
            its margin over the next.
        below: pixels may change whose number is below this one, and those without a number.

    Raises:
        TerraSynthError: the latter is no finite number.
    """

    path: Path
    below: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.below):
            raise TerraSynthError("--below is a number", found=self.below, fix="leave out --confidence and --below")


def refine(
    image: Path,
    rough: Path,
    out: Path,
    refiner: Refiner,
    settings: RefineSettings | None = None,
    *,
    schema: LabelSchema | None = None,
    confidence: Confidence | None = None,
) -> Path:
    """Refine the boundaries of a class map.

    Args:
        image: raster of the same pixels as the map.
        rough: class map of any model: values in one band, with a palette or without, or RGB colours.
        out: a TIFF; or a PNG, if the map is one.
        refiner: says what lies where.
        settings: how.
        schema: the classes of the map; by default those that the refiner was made for, and without such, every value or
            colour that occurs is a class.
        confidence: leaves pixels as they are that the map is sure of, within the band as well.

    Returns:
        The file: a cloud-optimised GeoTIFF with the CRS, transform, values, nodata value, colours and class names of
        the map (of RGB colours, the palette); or a PNG of its values and colours. Unlabelled pixels stay unlabelled,
        no pixel gets a class that the map does not have, and pixels that change nothing keep their values.

    Raises:
        TerraSynthError: the map can not be read, or image and map do not have the same pixels; there is NaN in the
            image where a window will see it; the output is one of them, or exists and was made of something else; or
            another process is at it.
    """
    settings = settings or RefineSettings()
    sources = {"image": image, "class map": rough} | ({} if confidence is None else {"confidence": confidence.path})
    _check_output(sources, out)
    made_of = {
        "refiner": refiner.identity,
        "schema": None if schema is None else schema.to_dict(),
        **settings.to_dict(),
        "below": None if confidence is None else confidence.below,
    }
    made = Made(made_of, sources)
    if is_finished(out, made):
        say(f"{out} is there already")
        tidy(out)
        return out
    with ExitStack() as opened:
        picture, raster, *sure = (opened.enter_context(open_raster(path)) for path in sources.values())
        grid = _common_grid(picture, raster)
        for other in sure:
            _check_confidence(other, raster, grid)
        reach = None if settings.band is None else _pixels(settings.band, grid, rough)
        settings.stretch.chosen(picture)
        mapped = read_rough_map(raster, schema or refiner.schema, refiner.num_classes)
        _check_factor(settings.size, refiner.factor)
        check_width(rough, grid, settings.size, mapped.num_classes)
        say(f"read as: {mapped.shares()}")
        if (mapped.counts > 0).sum() == 1:
            say(_nothing_to_refine(mapped))
        where = _Where(mapped, reach, *((sure[0], confidence.below) if confidence is not None else ()))
        _check_numbers(picture, where, settings)
        with alone_at(out) as work:
            # Another process may have finished it since.
            if is_finished(out, made):
                return out
            rows = open_rows(work, made)
            stripes = partial(_stripes, refiner, picture, where, settings)
            edges = borders(grid, settings.size, settings.overlap)
            append_rows(rows, grid, mapped.legend, edges, lambda top: stripes(top=top), rough.name)
            tags = {"source": rough.name, "image": image.name, "refiner": refiner.identity}
            write_map(out, work, rows, grid, mapped.legend, made, tags)
    return out


# --- what is given ---------------------------------------------------------------------------------------------------


def _check_output(sources: Mapping[str, Path], out: Path) -> None:
    for what, path in sources.items():
        if out.resolve() == path.resolve():
            raise TerraSynthError(f"the output would replace the {what}", path=path, fix="choose another --out")
    suffixes = (*TIFF_SUFFIXES, ".png") if sources["class map"].suffix.lower() == ".png" else TIFF_SUFFIXES
    if out.suffix.lower() not in suffixes:
        raise TerraSynthError(
            "a refined map is a TIFF, or a PNG if the class map is one",
            path=out,
            expected=f"a name that ends in {' or '.join(suffixes)}",
            fix="choose another --out",
        )


def _common_grid(image: Raster, rough: Raster) -> Grid:
    """Where both lie. What one of them does not say about its place is taken from the other."""
    grid = rough.grid.completed(image.grid)
    check_aligned(image.path, image.grid.completed(rough.grid), rough.path, grid, name="class map")
    for raster, other in ((image, rough), (rough, image)):
        if other.grid.is_georeferenced and not raster.grid.is_georeferenced:
            say(f"{raster.path} does not say where it lies, and is taken to lie on {other.path}")
    return grid


def _check_confidence(confidence: Raster, rough: Raster, grid: Grid) -> None:
    its = confidence.grid.completed(grid)
    check_aligned(rough.path, grid.completed(its), confidence.path, its, name="confidence", other="class map")
    if confidence.count > 1 or confidence.dtype.kind not in "iuf":
        raise TerraSynthError(
            "not a confidence of the class map",
            path=confidence.path,
            found=f"{confidence.count} {'band' if confidence.count == 1 else 'bands'} of {confidence.dtype}",
            expected="one band of numbers: the probability of the map's class in each pixel, or its margin",
            fix="of the probabilities of all classes, store the largest",
        )


def _check_factor(size: int, factor: int) -> None:
    if size % factor:
        raise TerraSynthError(
            "the windows do not divide into what the refiner sees as one",
            found=f"--size {size}",
            expected=f"a multiple of {factor}",
            fix=f"give --size {-(-size // factor) * factor}",
        )


def _nothing_to_refine(rough: RoughMap) -> str:
    """What to say of a map of one class."""
    path = rough.raster.path
    text = f"{path} has pixels of {rough.names[int(rough.counts.argmax())]} alone: there is no boundary to refine."
    if rough.raster.nodata is None or rough.counts.sum() == rough.raster.grid.width * rough.raster.grid.height:
        return text
    return (
        f"{text} Its nodata value, {rough.raster.nodata:g}, counts as unlabelled; if these pixels are a class as well, "
        f"`gdal_edit.py -unsetnodata {path}` says so"
    )


def _pixels(band: Tolerance, grid: Grid, path: Path) -> float:
    """How far a band reaches, in pixels."""
    if band.unit == "m" and grid.gsd is None:
        raise TerraSynthError(
            "the band is in metres, and the size of the pixels is not known in metres",
            path=path,
            found=f"{crs_name(grid.crs)}{'' if grid.transform is not None else ', no transform'}",
            expected="a projected CRS",
            fix=f"give --band in pixels, as --band {max(1, round(band.value))}",
        )
    return band.pixels((grid.height, grid.width), grid.gsd)


# --- what changes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Where:
    """Which pixels of a map may change: those with another class within `reach`, of which it is not sure."""

    rough: RoughMap
    reach: float | None
    confidence: Raster | None = None
    below: float = math.inf

    def may_change(self, top: int, height: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The classes of some rows, whole width, and which of their pixels may change."""
        rough, grid = self.rough, self.rough.raster.grid
        margin = 0 if self.reach is None else len(disc(self.reach)) - 1
        first, end = max(0, top - margin), min(grid.height, top + height + margin)
        classes = rough.classes(Window(0, first, grid.width, end - first))
        may = classes != UNLABELLED
        if self.reach is not None:
            labels = as_labels(classes, rough.num_classes, ~may)
            may &= mixed(dilate(planes(labels, rough.num_classes), disc(self.reach)))
        rows = slice(top - first, top - first + height)
        classes, may = classes[rows], may[rows]
        if self.confidence is not None:
            window = Window(0, top, grid.width, height)
            values = self.confidence.read(window)
            known = self.confidence.valid(values, window)
            sure = values[0] >= self.below  # NaN is not
            may &= ~(sure if known is None else sure & known)
        return classes, may


def _check_numbers(image: Raster, where: _Where, settings: RefineSettings) -> None:
    """Read what will be seen of an image of floating-point numbers, so that a NaN shows before anything is computed.

    To mend it is to change the file, and with it all rows that were finished would be lost. Whole numbers are none, and
    are not read twice.
    """
    if image.dtype.kind != "f":
        return
    rows = rows_of_windows(image.grid, settings.size, settings.overlap)
    with track(len(rows), f"checking {image.path.name}", unit="rows of windows") as progress:
        for windows in rows:
            _, wanted = where.may_change(windows[0].row_off, windows[0].height)
            for window in windows:
                if wanted[:, window.col_off : window.col_off + window.width].any():
                    settings.stretch.rgb(image, window)
            progress.advance()


def _stripes(
    refiner: Refiner, image: Raster, where: _Where, settings: RefineSettings, *, top: int
) -> Iterator[NDArray[Any]]:
    """The rows of the refined map, as stored."""
    rough = where.rough
    grid = rough.raster.grid
    absent = torch.from_numpy(rough.counts == 0)
    compute = partial(_parts, refiner, image, where, settings)
    for first, scores, valid in blend(grid, settings.size, settings.overlap, rough.num_classes, compute, top=top):
        window = Window(0, first, grid.width, valid.shape[0])
        classes = rough.classes(window)
        stored = rough.stored(window, classes)
        scores[absent] = -math.inf
        for columns, score, best in highest(scores):
            own = torch.from_numpy(classes[:, columns]).long().clamp_(max=rough.num_classes - 1)
            # Of equals, what is there already; where windows overlap, equals differ by rounding.
            better = valid[:, columns] & (scores[..., columns].gather(0, own[None])[0] + _EQUAL < score)
            stored[:, columns] = np.where(better.numpy(), rough.written[best.numpy()], stored[:, columns])
        yield stored


@torch.inference_mode()
def _parts(
    refiner: Refiner,
    image: Raster,
    where: _Where,
    settings: RefineSettings,
    windows: Sequence[Window],
) -> Iterator[Part]:
    """The scores in the windows of a row; one in which no pixel may change is not computed."""
    top, height, width = windows[0].row_off, windows[0].height, windows[0].width
    classes, wanted = where.may_change(top, height)
    columns = {window.col_off: slice(window.col_off, window.col_off + width) for window in windows}
    todo = []
    for window in windows:
        if (inside := wanted[:, columns[window.col_off]]).any():
            todo.append(window)
        else:
            yield Part(window.col_off, inside, None)
    for batch in batches(todo, settings.batch_size):
        shown = [settings.stretch.rgb(image, window) for window in batch]
        images = np.stack([_padded(rgb, settings.size) for rgb, _ in shown])
        maps = np.stack([_padded(classes[:, columns[window.col_off]], settings.size) for window in batch])
        scores = refiner.scores(
            torch.from_numpy(images).movedim(-1, 1).float().div_(255),
            torch.from_numpy(maps).long(),
            num_classes=where.rough.num_classes,
            # Of the place alone, so that it is the same whatever else is computed.
            seeds=[int(digest(settings.seed, window.row_off, window.col_off), 16) >> 1 for window in batch],
        )
        expected = (len(batch), where.rough.num_classes, settings.size, settings.size)
        asked = ~scores.isnan().flatten(2).all(2) if scores.shape == expected else None
        if asked is None or not asked.any(1).all() or not scores[asked].isfinite().all():
            raise TerraSynthError(
                "the refiner gives no scores",
                found=f"shape {tuple(scores.shape)}" if asked is None else "NaN or infinity",
                expected=f"numbers of shape {expected}",
                fix="train it again, or take another",
            )
        for window, (_, has_data), score, of_classes in zip(batch, shown, scores, asked.cpu(), strict=True):
            valid = wanted[:, columns[window.col_off]] & has_data
            score = score[:, :height, :width].float().nan_to_num(0).cpu()
            yield Part(window.col_off, valid, score, of_classes)


def _padded(values: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Mirrored to the right and below, where the raster is smaller than a window."""
    height, width = values.shape[:2]
    if height == width == size:
        return values
    return np.pad(values, ((0, size - height), (0, size - width), *[(0, 0)] * (values.ndim - 2)), mode="reflect")
