"""Scenes and their masks in a folder: which files belong together, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from affine import Affine

from terrasynth.data.masks import Survey, survey
from terrasynth.data.raster import Grid, Raster, Stretch, open_raster
from terrasynth.data.read import refuse_jpeg
from terrasynth.data.schema import LabelSchema
from terrasynth.data.vector import VECTOR_SUFFIXES, Polygons, read_polygons
from terrasynth.errors import TerraSynthError, listed
from terrasynth.io import IMAGE_SUFFIXES, TIFF_SUFFIXES
from terrasynth.progress import say, track

__all__ = ["Checked", "PolygonFile", "Scene", "check_aligned", "check_scenes", "find_scenes"]


@dataclass(frozen=True)
class Scene:
    """An image and its mask.

    Attributes:
        name: distinct, fit for a file name.
        image: a raster file.
        mask: a raster or vector file.
    """

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Checked:
    """A scene of which every pixel was read once.

    Attributes:
        scene: the files.
        grid: where both lie.
        survey: the different pixels of a mask raster; None for a vector file.
    """

    scene: Scene
    grid: Grid
    survey: Survey | None


# --- finding the files -----------------------------------------------------------------------------------------------


def find_scenes(source: Path, images: str, masks: str, out: Path) -> tuple[list[Scene], list[TerraSynthError]]:
    """Every scene with its mask, by name, and what is wrong with the others.

    Args:
        source: folder that the patterns start from.
        images: pattern of the images. What its wildcards (`*`, `?`, `[abc]`, `**/`) stand for names the scene, up to
            the suffix.
        masks: pattern of the masks, where the wildcards stand for the same; or one vector file for all scenes.
        out: folder whose files are not looked at.

    Raises:
        TerraSynthError: there are no images or no masks at all.
    """
    if not source.is_dir():
        raise TerraSynthError("no such folder", path=source, fix="give the folder of the scenes and masks")
    image_files = _matching(source, images, IMAGE_SUFFIXES, "--images", out)
    mask_files = _matching(source, masks, (*IMAGE_SUFFIXES, *VECTOR_SUFFIXES), "--masks", out)
    shared = next(iter(mask_files.values()))[0] if list(mask_files) == [()] else None
    if shared is not None and shared.suffix.lower() not in VECTOR_SUFFIXES and list(image_files) != [()]:
        raise TerraSynthError(
            "one mask for several scenes",
            path=shared,
            expected="a vector file, or a pattern that finds one mask for each scene",
            fix="give --masks with a wildcard, as --masks 'masks/*.tif'",
        )
    found: dict[str, Scene] = {}
    bad = []
    for key, paths in image_files.items():
        partners = mask_files.get(key, []) if shared is None else [shared]
        name = re.sub(r"[^\w.-]+", "-", "-".join(part for part in key if part)) or paths[0].stem
        if len(paths) > 1 or len(partners) > 1:
            several = paths if len(paths) > 1 else partners
            names = listed([path.name for path in several])
            bad.append(TerraSynthError("several files with one name", path=several[0], found=names, fix="keep one"))
        elif not partners:
            problem = "the image has no mask"
            fix = f"give the mask the same name, or correct --masks {masks!r}"
            bad.append(TerraSynthError(problem, path=paths[0], found=f"no mask for {'/'.join(key)!r}", fix=fix))
        elif name in found:
            other = found[name].image
            fix = "rename one of them"
            bad.append(TerraSynthError(f"two scenes are called {name!r}", path=paths[0], found=f"and {other}", fix=fix))
        else:
            found[name] = Scene(name, paths[0], partners[0])
    if unused := len(mask_files.keys() - image_files.keys()) if shared is None else 0:
        say(f"masks without an image, not used: {unused}")
    return [found[name] for name in sorted(found)], bad


def _matching(
    source: Path, pattern: str, suffixes: Sequence[str], option: str, out: Path
) -> dict[tuple[str, ...], list[Path]]:
    """The files that fit a pattern, by what its wildcards stand for, without the suffix."""
    # As pathlib does it in what it finds: no `./`, no doubled or closing slash.
    pattern = PurePath(pattern).as_posix()
    try:
        found = sorted(source.glob(pattern))
    except (ValueError, NotImplementedError):  # as Python refuses "/x/*" and "a**"
        found = []
    files: dict[tuple[str, ...], list[Path]] = {}
    for path in found:
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or out.resolve() in path.resolve().parents:
            continue
        files.setdefault(_key(path.relative_to(source), pattern), []).append(path)
    if not files:
        there = sorted({p.relative_to(source).as_posix() + "/" * p.is_dir() for p in source.iterdir()})
        raise TerraSynthError(
            f"no file fits {option}",
            path=source / pattern,
            found=f"{source} has {listed(there)}" if there else f"{source} is empty",
            expected=f"{', '.join(suffixes)}, by a pattern under {source}, as 'images/*.tif' or '*/images_png/*'",
            fix=f"correct {option}",
        )
    return files


def _key(path: Path, pattern: str) -> tuple[str, ...]:
    """What the wildcards of a pattern stand for in a path that fits it, without the suffix."""
    folder, slash, name = pattern.rpartition("/")
    stem = f"{folder}{slash}{name.rpartition('.')[0] or name}"
    found = re.fullmatch(_regex(stem), path.with_suffix("").as_posix())
    if found is None:  # a dot in the pattern that begins no suffix, as in `tile.*`
        found = re.fullmatch(_regex(pattern), path.as_posix())
    if found is None:  # `**` beside other characters, which Python takes for `*`, or from 3.13 on for files
        raise TerraSynthError(
            "the pattern is not understood",
            found=pattern,
            expected="*, ? and [abc], and **/ for folders in folders",
            fix="write **/* for all files in all folders",
        )
    return tuple(part.removesuffix(path.suffix).strip("/").replace("/", "-") for part in found.groups())


def _regex(pattern: str) -> str:
    """A glob pattern as a regular expression, in which every wildcard is a group."""
    forms = {"**/": r"((?:[^/]+/)*)", "*": r"([^/]*)", "?": r"([^/])"}
    parts = re.split(r"(\*\*/|\*|\?|\[[^/]+?\])", pattern)
    sets = {part: f"({re.sub('^.!', '[^', part)})" for part in parts if part.startswith("[")}
    return "".join((forms | sets).get(part, re.escape(part)) for part in parts)


# --- checking them ---------------------------------------------------------------------------------------------------


class PolygonFile:
    """Reads the polygons of a scene's mask; those of the last file are kept, which may be one for all scenes.

    Args:
        schema: the classes.
        attribute: see `read_polygons`.
        background: name of the class of ground without polygon; None leaves it unlabelled.
    """

    def __init__(self, schema: LabelSchema, attribute: str | None, background: str | None) -> None:
        self._schema, self._attribute = schema, attribute
        self._last: Polygons | None = None
        self.ignore_index = self.background = schema.ignore_index
        if background is not None:
            if background not in schema.names:
                raise TerraSynthError("--background is no class", found=background, expected=", ".join(schema.names))
            self.background = schema.names.index(background)

    def of(self, path: Path) -> Polygons:
        """The polygons of a file; see `read_polygons`."""
        if self._last is None or self._last.path != path:
            self._last = read_polygons(path, self._schema, self._attribute)
        return self._last


def check_scenes(
    scenes: Sequence[Scene], size: int, stretch: Stretch, polygons: PolygonFile
) -> tuple[list[Checked], list[TerraSynthError]]:
    """Read every pixel of every scene once.

    Args:
        scenes: from `find_scenes`.
        size: the smallest side that a scene may have.
        stretch: how the images are to be shown.
        polygons: reads the vector files among the masks.

    Returns:
        The scenes that can be used, and what is wrong with the others.
    """
    checked, bad, unplaced, opaque = [], [], 0, 0
    without: dict[str, float] = {}
    with track(len(scenes), "checking scenes", unit="scenes") as progress:
        for scene in scenes:
            try:
                with open_raster(scene.image) as image:
                    grid, surveyed = _check_mask(scene, image, polygons)
                    if min(grid.width, grid.height) < size:
                        raise TerraSynthError(
                            "the scene is smaller than a tile",
                            path=scene.image,
                            found=f"{grid.width} x {grid.height}",
                            expected=f"at least {size} x {size}",
                            fix="lower --size",
                        )
                    stretch.chosen(image)
                    stripes, empty = list(image.stripes()), 0
                    with track(len(stripes), scene.name, unit="stripes") as part:
                        for stripe in stripes:
                            _, valid = stretch.rgb(image, stripe)
                            empty += valid.size - int(np.count_nonzero(valid))
                            part.advance()
                    if empty:
                        without[scene.name] = empty / (grid.width * grid.height)
                    opaque += stretch.bands is not None and image.alpha is not None
                    if surveyed is not None:
                        unplaced += image.grid.is_georeferenced != surveyed.grid.is_georeferenced
                checked.append(Checked(scene, grid, surveyed))
            except TerraSynthError as error:
                bad.append(error)
            progress.advance()
    if without:
        say("without data: " + listed([f"{share:.1%} of {name}" for name, share in without.items()]))
    if opaque:
        say(f"--bands is given, so an alpha band is taken for a colour and not for transparency: {opaque} scenes")
    if unplaced:
        say(f"a PNG or JPEG can not say where it lies, and is taken to lie on its partner: {unplaced} pairs")
    return checked, bad


def _check_mask(scene: Scene, image: Raster, polygons: PolygonFile) -> tuple[Grid, Survey | None]:
    """The grid of both, and the pixels of a mask raster; None for polygons."""
    if scene.mask.suffix.lower() in VECTOR_SUFFIXES:
        polygons.of(scene.mask).placed(image.grid, scene.image)
        return image.grid, None
    refuse_jpeg(scene.mask)
    with open_raster(scene.mask) as mask:
        return _common_grid(scene, image.grid, mask.grid), survey(mask)


def _common_grid(scene: Scene, image: Grid, mask: Grid) -> Grid:
    """Where both lie. A PNG or JPEG can not say it, so it is taken to lie on its partner; a TIFF is not."""
    files = ((image, scene.image), (mask, scene.mask))
    silent = [not grid.is_georeferenced and path.suffix.lower() not in TIFF_SUFFIXES for grid, path in files]
    if any(silent):
        image, mask = image.completed(mask), mask.completed(image)
    check_aligned(scene.image, image, scene.mask, mask)
    return image


def check_aligned(
    image: Path, its_grid: Grid, mask: Path, grid: Grid, *, name: str = "mask", other: str = "image"
) -> None:
    """Refuse an image and a mask that do not have the same pixels.

    Args:
        image: its file, named in messages.
        its_grid: where it lies.
        mask: its file.
        grid: where it lies.
        name: what messages call it.
        other: what they call the image.

    Raises:
        TerraSynthError: they differ in size, CRS, or by more than a hundredth of a pixel in place.
    """
    placed = its_grid.is_georeferenced and grid.is_georeferenced
    if (its_grid.width, its_grid.height) != (grid.width, grid.height):
        raise TerraSynthError(
            f"the {name} is not as large as its {other}",
            path=mask,
            found=f"{grid.width} x {grid.height}, and {its_grid.width} x {its_grid.height} in {image}",
            fix="export both from the same window" + (f"; or {_warp(mask, its_grid, name, other)}" if placed else ""),
        )
    if (its_grid.crs is None) != (grid.crs is None):
        without, known, its_file = (image, grid, mask) if its_grid.crs is None else (mask, its_grid, image)
        raise TerraSynthError(
            f"one of {other} and {name} has a CRS, the other has none",
            path=without,
            found=f"no CRS, and {known.crs} in {its_file}",
            fix="if they lie on the same pixels: `gdal_edit.py -a_srs EPSG:… -a_ullr LEFT TOP RIGHT BOTTOM FILE`",
        )
    if its_grid.crs != grid.crs:
        raise TerraSynthError(
            f"{other} and {name} have different CRSs",
            path=mask,
            found=f"{grid.crs}, and {its_grid.crs} in {image}",
            fix=_warp(mask, its_grid, name, other),
        )
    if not its_grid.coincides(grid):
        # Where the first pixel begins: of a mask stored in another order, the box on the ground is the same.
        (left, top), (its_left, its_top) = ((g.transform or Affine.identity()) * (0, 0) for g in (its_grid, grid))
        raise TerraSynthError(
            f"{other} and {name} do not lie on the same pixels",
            path=mask,
            found=f"upper left {its_left:.10g}, {its_top:.10g}, and {left:.10g}, {top:.10g} in {image}",
            expected="the same transform, to a hundredth of a pixel",
            fix=_warp(mask, its_grid, name, other),
        )


def _warp(mask: Path, grid: Grid, name: str, other: str) -> str:
    """The command that brings a mask to the pixels of an image."""
    crs, box = "…", "…"
    transform = grid.transform or Affine.identity()
    if grid.crs is not None and grid.crs.to_authority() is not None:
        crs = grid.crs.to_string()
    if transform.b == transform.d == 0 and transform.a > 0 > transform.e:  # as gdalwarp writes every raster
        box = " ".join(f"{value:.12g}" for value in grid.bounds())
    size = f"-ts {grid.width} {grid.height}"
    return f"warp the {name} to the {other}: `gdalwarp -t_srs {crs} -te {box} {size} -r near {mask} OUT`"
