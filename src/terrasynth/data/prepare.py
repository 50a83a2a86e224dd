"""Scenes and their masks, of any size, to tiles that a study can be run on: `terrasynth prepare`.

    .terrasynth.json        whose folder this is: settings, stretch, scenes and splits; written first
    images/SPLIT/NAME.tif   8-bit RGB; GeoTIFF with the scene's CRS and transform, or PNG if the scene has none
    masks/SPLIT/NAME.tif    what the label schema stores, with its colours as palette
    tiles.jsonl             one line a tile: scene, place, caption, pixels of each class
    classes.csv             pixels and tiles of each class and split
    classes.yaml            the label schema
    sheet.png               some of the training tiles
    bad_files.txt           what was skipped, and why
    recipe.yaml             a recipe for `terrasynth study`; written last

Nothing is written before every pixel of every scene was read once: what is wrong with the files is said together.
Memory does not grow with the scenes, but for a line a tile. A tile exists once its image does, and the mask is written
first, so a run that was killed goes on where it stopped and ends with the same files.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rasterio.windows import Window

from terrasynth.data.masks import Lookup, settle
from terrasynth.data.raster import Grid, Stretch, check_percentiles, open_raster, percentile_ranges
from terrasynth.data.scenes import Checked, PolygonFile, check_scenes, find_scenes
from terrasynth.data.schema import LabelSchema
from terrasynth.data.sheet import contact_sheet
from terrasynth.data.tiling import SPLITS, apart, assign, regions, tiles
from terrasynth.errors import TerraSynthError, changes, combined, listed
from terrasynth.io import (
    TIFF_SUFFIXES,
    atomic_write,
    file_digest,
    new_tiff,
    open_image,
    open_tiff,
    read_json,
    remove_incomplete,
    write_json,
)
from terrasynth.progress import say, track

__all__ = ["PrepareSettings", "Prepared", "prepare"]

_MARKER = ".terrasynth.json"
_SHEET_TILES, _SHEET_SIDE = 16, 128
_Array = NDArray[np.uint8]


@dataclass(frozen=True)
class PrepareSettings:
    """What `prepare` does; recorded in the folder.

    Attributes:
        labels: name of a packaged label schema, or the path of a YAML file.
        images: pattern of the scenes under the source folder. What its wildcards stand for is the scene's name.
        masks: pattern of the masks, of which the wildcards of a scene's mask stand for the same; or one vector file.
        size: side of the tiles in pixels. Nothing is resampled: a tile has the scene's own ground sampling distance.
        stride: pixels from one tile to the next; None is `size`, tiles side by side. Smaller, they overlap.
        edges: what is left at the right and lower edge of a scene or block, less than a tile: covered by one more tile
            that is shifted back (`shift`), or dropped (`drop`).
        bands: numbers of the bands that are red, green and blue, or one that is grey.
        ranges: stored values that become black and white, one pair for all bands or one each.
        percentiles: instead of `ranges`, two percentiles of each band over all scenes.
        mask_coding: of mask rasters, as in a recipe.
        class_attribute: of vector masks, what holds the class of a polygon.
        background: name of the class of ground without polygon; None leaves it unlabelled.
        split: whole scenes go to the splits, or `blocks` of each.
        block: side of a block in pixels; None is four tiles.
        fractions: share of the tiles for training, validation and test.
        seed: of the order in which scenes or blocks are assigned.
        caption: template of the captions.
        skip_unlabelled: leave out tiles without a labelled pixel.
        skip_bad: leave out scenes with something wrong, and list them.

    Raises:
        TerraSynthError: they do not fit together.
    """

    labels: str
    images: str = "images/*"
    masks: str = "masks/*"
    size: int = 256
    stride: int | None = None
    edges: Literal["shift", "drop"] = "shift"
    bands: tuple[int, ...] | None = None
    ranges: tuple[tuple[float, float], ...] | None = None
    percentiles: tuple[float, float] | None = None
    mask_coding: Literal["auto", "index", "color"] = "auto"
    class_attribute: str | None = None
    background: str | None = None
    split: Literal["scene", "blocks"] = "scene"
    block: int | None = None
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    seed: int = 0
    caption: str = "a satellite image of {classes}"
    skip_unlabelled: bool = False
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.ranges is not None and self.percentiles is not None:
            raise TerraSynthError("--stretch and --percentiles exclude each other", fix="give one of them")
        if self.percentiles is not None:
            check_percentiles(self.percentiles)
        if not 0 < (self.stride or self.size) <= self.size:
            raise TerraSynthError(
                "--stride leaves gaps between tiles", found=self.stride, expected=f"1 to {self.size} (--size)"
            )
        if self.block is not None and (self.split == "scene" or self.block < self.size):
            raise TerraSynthError(
                "--block is the side of a block, of at least one tile",
                found=f"{self.block}, with --split {self.split} and --size {self.size}",
                fix="give --split blocks, and a --block of several tiles",
            )
        if (
            len(self.fractions) != 3
            or min(self.fractions) < 0
            or self.fractions[0] <= 0
            or abs(sum(self.fractions) - 1) > 1e-6
        ):
            raise TerraSynthError(
                "--fractions are shares of the tiles for training, validation and test",
                found=", ".join(map(str, self.fractions)),
                expected="three numbers that sum to 1, the first more than 0",
            )
        Stretch(self.bands, self.ranges)


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made.

    Attributes:
        recipe: path of the recipe.
        counts: tiles of each split.
        histogram: the share of each class in each split, as a table to print.
        stretch: how bands became RGB, as options of the command line; empty if they were left as they are.
    """

    recipe: Path
    counts: Mapping[str, int]
    histogram: str
    stretch: str


def prepare(source: str | Path, out: str | Path, settings: PrepareSettings) -> Prepared:
    """Cut scenes and masks into tiles, split by scene or block, with everything a study needs.

    Args:
        source: folder of the scenes and masks.
        out: new, empty, or begun by the same call.
        settings: how.

    Raises:
        TerraSynthError: anything that is wrong with the files, all in one message, unless `skip_bad`; `out` is
            `source`, or holds something else; or too little is left to split.
    """
    source, out = Path(source), Path(out)
    if out.resolve() == source.resolve():
        raise TerraSynthError(
            "--out is SRC, the folder of the scenes",
            path=out,
            fix=f"choose another, as --out {out.resolve().name}-tiles",
        )
    schema = LabelSchema.load(settings.labels, [Path(), source])
    polygons = PolygonFile(schema, settings.class_attribute, settings.background)
    scenes, bad = find_scenes(source, settings.images, settings.masks, out)
    total = len(scenes) + len(bad)
    # With percentiles the range is not known yet, and any will do to look for what is wrong.
    trial = Stretch(settings.bands, settings.ranges if settings.percentiles is None else ((0.0, 1.0),))
    checked, faults = check_scenes(scenes, settings.size, trial, polygons)
    bad += faults
    coding, lookups, faults = _settle(checked, schema, settings)
    bad += faults
    checked = [one for one in checked if one.survey is None or one.survey.path in lookups]
    faults = apart({one.scene.image: one.grid for one in checked})
    bad += faults
    checked = [one for one in checked if one.scene.image not in {fault.path for fault in faults}]
    if bad and (not settings.skip_bad or not checked):
        hint = " (--skip-bad goes on without them)" if checked else ""
        raise combined(bad, f"{len(bad)} of {total} scenes can not be used{hint}", shown=None)

    stretch = Stretch(settings.bands, settings.ranges)
    if settings.percentiles is not None:
        images = [one.scene.image for one in checked]
        stretch = Stretch(settings.bands, percentile_ranges(images, settings.bands, settings.percentiles))
    weights: Counter[str] = Counter()
    cut: dict[str, list[tuple[str, Window]]] = {one.scene.name: [] for one in checked}
    for part in regions(
        {one.scene.name: one.grid for one in checked}, settings.split, settings.block or 4 * settings.size
    ):
        windows = tiles(part.window, settings.size, settings.stride or settings.size, settings.edges)
        weights[part.unit] += len(windows)
        cut[part.scene] += [(part.unit, window) for window in windows]
    splits = assign(weights, settings.fractions, settings.seed)

    _claim(out, _plan(source, settings, schema, stretch, coding, checked, splits, bad))
    for kind in ("images", "masks"):
        for split in SPLITS:
            (out / kind / split).mkdir(parents=True, exist_ok=True)
            remove_incomplete(out / kind / split)
    remove_incomplete(out)

    rows: list[dict[str, Any]] = []
    with track(weights.total(), "writing tiles", unit="tiles") as progress:
        for one in checked:
            with _reader(one, stretch, lookups, polygons) as read:
                for unit, window in cut[one.scene.name]:
                    row = _write_tile(out, splits[unit], one, window, read, schema, settings)
                    rows += [] if row is None else [row]
                    progress.advance()
    return _finish(out, rows, schema, stretch, settings, bad)


# --- settling what they mean -----------------------------------------------------------------------------------------


def _settle(
    checked: Sequence[Checked], schema: LabelSchema, settings: PrepareSettings
) -> tuple[str, dict[Path, Lookup], list[TerraSynthError]]:
    try:
        surveys = [one.survey for one in checked if one.survey is not None]
        coding, lookups, faults = settle(surveys, schema, settings.mask_coding)
    except TerraSynthError as error:
        raise _of_the_command_line(error) from error
    return coding, lookups, [_of_the_command_line(fault) for fault in faults]


def _of_the_command_line(error: TerraSynthError) -> TerraSynthError:
    fix = None if error.fix is None else error.fix.replace("data.mask_coding:", "--mask-coding")
    return TerraSynthError(error.problem, path=error.path, found=error.found, expected=error.expected, fix=fix)


# --- writing ---------------------------------------------------------------------------------------------------------


def _plan(
    source: Path,
    settings: PrepareSettings,
    schema: LabelSchema,
    stretch: Stretch,
    coding: str,
    checked: Sequence[Checked],
    splits: Mapping[str, str],
    bad: Sequence[TerraSynthError],
) -> dict[str, Any]:
    """Everything that the tiles depend on."""
    files = {path for one in checked for path in (one.scene.image, one.scene.mask)}
    with track(len(files), "digests", unit="files") as progress:
        stored = {}
        for path in files:
            stored[path] = _stored(path)
            progress.advance()
    scenes = {
        one.scene.name: {
            "image": one.scene.image.relative_to(source).as_posix(),
            "mask": one.scene.mask.relative_to(source).as_posix(),
            "contents": {"image": stored[one.scene.image], "mask": stored[one.scene.mask]},
            "size": [one.grid.width, one.grid.height],
            "crs": None if one.grid.crs is None else one.grid.crs.to_string(),
            "transform": None if one.grid.transform is None else list(one.grid.transform[:6]),
        }
        for one in checked
    }
    plan = {
        "format": "terrasynth tiles",
        "version": 1,
        "settings": asdict(settings),
        "stretch": asdict(stretch),
        "mask_coding": coding,
        "schema": schema.to_dict(),
        "scenes": scenes,
        "splits": splits,
        "bad_files": [error.line() for error in bad],
    }
    value: dict[str, Any] = json.loads(json.dumps(plan))
    return value


def _stored(path: Path) -> dict[str, Any]:
    """What is read as one file: the digest of each of its parts by suffix, and the nodata value."""
    if path.suffix.lower() not in TIFF_SUFFIXES:
        # A Shapefile has its attributes and its CRS in others.
        suffixes = (".shp", ".dbf", ".prj", ".cpg") if path.suffix.lower() == ".shp" else (path.suffix,)
        parts = [part for suffix in suffixes if (part := path.with_suffix(suffix)).exists()]
        return {part.name.removeprefix(path.stem): file_digest(part) for part in parts}
    with open_tiff(path) as source:
        # GDAL says which of its neighbours it reads as well: a mask, a world file, its own notes. Overviews
        # are smaller copies, which nothing here reads.
        parts = sorted({path.absolute(), *map(Path, source.files)})
        digests = {part.name.removeprefix(path.stem): file_digest(part) for part in parts if part.suffix != ".ovr"}
        return {**digests, "nodata": None if source.nodata is None else str(source.nodata)}


def _claim(out: Path, plan: Mapping[str, Any]) -> None:
    marker = out / _MARKER
    if marker.exists():
        was = read_json(marker)
        if was != plan:
            raise TerraSynthError(
                "the output folder holds tiles of another run",
                path=out,
                found="what changed (was -> now):\n    " + listed(changes(was, plan), "\n    "),
                expected="the same settings and the same files",
                fix=f"choose another --out, or delete {out}",
            )
        return
    if out.is_dir() and (
        foreign := sorted(path.name for path in out.iterdir() if not path.name.startswith(".terrasynth"))
    ):
        raise TerraSynthError(
            "the output folder is not empty, and holds no tiles",
            path=out,
            found=listed(foreign),
            fix="choose another --out",
        )
    write_json(marker, plan)


_Read = Callable[[Window], tuple[_Array, _Array]]


@contextmanager
def _reader(one: Checked, stretch: Stretch, lookups: Mapping[Path, Lookup], polygons: PolygonFile) -> Iterator[_Read]:
    """Yield a function from a window to its image (h, w, 3) and mask (h, w), unlabelled where the image has no data."""

    def read(window: Window) -> tuple[_Array, _Array]:
        rgb, valid = stretch.rgb(image, window)
        return rgb, np.where(valid, mask_of(window), np.uint8(polygons.ignore_index))

    with open_raster(one.scene.image) as image:
        if one.survey is None:
            placed = polygons.of(one.scene.mask).placed(one.grid, one.scene.image)
            mask_of: Callable[[Window], _Array] = lambda window: placed.read(window, polygons.background)  # noqa: E731
            yield read
        else:
            lookup = lookups[one.scene.mask]
            with open_raster(one.scene.mask) as mask:
                mask_of = lambda window: lookup.read(mask, window)  # noqa: E731
                yield read


def _write_tile(
    out: Path, split: str, one: Checked, window: Window, read: _Read, schema: LabelSchema, settings: PrepareSettings
) -> dict[str, Any] | None:
    """Write one tile, or take the one that is there; its row, or None if it is left out."""
    column, row = int(window.col_off), int(window.row_off)
    id_ = f"{one.scene.name}-{row:05d}-{column:05d}"
    suffix = ".tif" if one.grid.is_georeferenced else ".png"
    image_path, mask_path = (out / kind / split / f"{id_}{suffix}" for kind in ("images", "masks"))
    mask = _written(image_path, mask_path, schema)
    if mask is None:
        image, mask = read(window)
        if settings.skip_unlabelled and (mask == schema.ignore_index).all():
            return None
        grid = one.grid.part(window)
        _write_picture(mask_path, schema.to_index(mask), grid, schema)
        _write_picture(image_path, image, grid, schema)
    counts = np.bincount(mask.ravel(), minlength=256)
    return {
        "id": id_,
        "split": split,
        "scene": one.scene.name,
        "column": column,
        "row": row,
        "caption": schema.caption(mask, settings.caption),
        "pixels": {name: int(counts[index]) for index, name in enumerate(schema.names) if counts[index]},
        "unlabelled": int(counts[schema.ignore_index]),
    }


def _written(image_path: Path, mask_path: Path, schema: LabelSchema) -> _Array | None:
    """The mask of a tile that an earlier run wrote; None if it did not, or a power failure left a part of it."""
    if not (image_path.exists() and mask_path.exists()):
        return None
    try:
        open_image(image_path)
        return schema.from_index(open_image(mask_path).values)
    except TerraSynthError:
        return None


def _write_picture(path: Path, pixels: _Array, grid: Grid, schema: LabelSchema) -> None:
    """Write an image (h, w, 3), or a mask (h, w) as the schema stores it, with its palette."""
    palette = None if pixels.ndim == 3 else schema.palette()
    with atomic_write(path, durable=False) as partial:
        if path.suffix == ".png":
            picture = Image.fromarray(pixels)
            if palette is not None:
                picture.putpalette(palette.tobytes())
            picture.save(partial)
            return
        profile: dict[str, Any] = {"photometric": "RGB", "count": 3}
        if palette is not None:
            profile = {"photometric": "palette", "count": 1, "nodata": schema.stored_ignore[0]}
        profile |= {"dtype": "uint8", "compress": "deflate", "crs": grid.crs, "transform": grid.transform}
        with new_tiff(partial, width=grid.width, height=grid.height, **profile) as file:
            file.write(pixels[None] if palette is not None else np.moveaxis(pixels, -1, 0))
            if palette is not None:
                file.write_colormap(1, {value: (*color, 255) for value, color in enumerate(palette.tolist())})


def _finish(
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    schema: LabelSchema,
    stretch: Stretch,
    settings: PrepareSettings,
    bad: Sequence[TerraSynthError],
) -> Prepared:
    if not any(row["split"] == "train" and row["pixels"] for row in rows):
        raise TerraSynthError(
            "no training tile has a labelled pixel",
            path=out,
            found=f"{len(rows)} tiles",
            fix=f"check the masks and the label schema, then delete {out}; or choose another --seed",
        )
    _write_text(out / "tiles.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    counts = {split: sum(row["split"] == split for row in rows) for split in SPLITS}
    table = _class_table(rows, schema)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([("split", "class", "pixels", "share", "tiles"), *table])
    _write_text(out / "classes.csv", buffer.getvalue())
    schema.to_yaml(out / "classes.yaml")
    if bad:
        _write_text(out / "bad_files.txt", "".join(error.line() + "\n" for error in bad))
        say(f"left out: {len(bad)} scenes, listed in {out / 'bad_files.txt'}")
    sheet = _sheet(out, rows, schema)
    with atomic_write(out / "sheet.png") as partial:
        sheet.save(partial)
    for split, name, pixels, _, _ in table:
        if counts[split] and not pixels and any(row["pixels"].get(name) for row in rows):
            say(f"no pixel of {name} in {split}: another --seed, or smaller blocks, may give it some")
    recipe = out / "recipe.yaml"
    _write_text(recipe, _recipe(out, counts, settings))
    return Prepared(recipe, counts, _histogram(table, schema, counts), stretch.options())


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _class_table(rows: Sequence[Mapping[str, Any]], schema: LabelSchema) -> list[tuple[str, str, int, str, int]]:
    """Split, class, pixels, share of the split's pixels, tiles."""
    table = []
    for split in SPLITS:
        of_split = [row for row in rows if row["split"] == split]
        pixels = {name: sum(row["pixels"].get(name, 0) for row in of_split) for name in schema.names}
        pixels["(unlabelled)"] = sum(row["unlabelled"] for row in of_split)
        total = max(1, sum(pixels.values()))
        for name, count in pixels.items():
            having = sum(
                bool(row["pixels"].get(name, 0) if name in schema.names else row["unlabelled"]) for row in of_split
            )
            table.append((split, name, count, f"{count / total:.4f}", having))
    return table


def _histogram(table: Sequence[tuple[str, str, int, str, int]], schema: LabelSchema, counts: Mapping[str, int]) -> str:
    shares = {(split, name): float(share) for split, name, _, share, _ in table}
    width = max(len(name) for name in (*schema.names, "(unlabelled)"))
    lines = [f"{'':<{width}}" + "".join(f"{split:>10}" for split in SPLITS)]
    lines += [
        f"{name:<{width}}" + "".join(f"{shares[split, name]:>10.1%}" for split in SPLITS)
        for name in (*schema.names, "(unlabelled)")
    ]
    lines.append(f"{'tiles':<{width}}" + "".join(f"{counts[split]:>10}" for split in SPLITS))
    return "\n".join(lines)


def _sheet(out: Path, rows: Sequence[Mapping[str, Any]], schema: LabelSchema) -> Image.Image:
    """Up to sixteen training tiles with labels, spread evenly over all, every k-th pixel."""
    labelled = [row["id"] for row in rows if row["split"] == "train" and row["pixels"]]
    images, masks = [], []
    for position in np.linspace(0, len(labelled) - 1, min(_SHEET_TILES, len(labelled))).round().astype(int):
        image, mask = (next((out / kind / "train").glob(f"{labelled[position]}.*")) for kind in ("images", "masks"))
        values = open_image(image).values
        step = -(-values.shape[0] // _SHEET_SIDE)
        images.append(torch.from_numpy(np.moveaxis(values[::step, ::step], -1, 0).copy()))
        masks.append(torch.from_numpy(schema.from_index(open_image(mask).values[::step, ::step])))
    return contact_sheet({"image": torch.stack(images)}, torch.stack(masks), schema, legend=True)


_RECIPE = """\
# Tiles of `terrasynth prepare`. Start with: terrasynth study {recipe}
# Moved to another place, give the folder with --data. `terrasynth recipe demo` prints every key with its description.
name: {name}

data:
  kind: folder
  root: {root}
  train: {{folder: train, list: null}}
  validation: {{folder: val, list: null}}
  test: {{folder: test, list: null}}{missing}
  label_schema: classes.yaml
  mask_coding: index
  image_size: {size}
  fit: crop
  caption: {caption}
{generator}"""


def _recipe(out: Path, counts: Mapping[str, int], settings: PrepareSettings) -> str:
    empty = [split for split in SPLITS if not counts[split]]
    # The base model that comes with the package was trained at 128 pixels; larger tiles are left to one from scratch.
    small = settings.size <= 128 and settings.size % 8 == 0
    return _RECIPE.format(
        recipe=json.dumps(str(out / "recipe.yaml")),
        name=json.dumps(out.resolve().name, ensure_ascii=False),
        root=json.dumps(str(out.resolve()), ensure_ascii=False),
        missing="".join(f"\n  # no {split} tiles: a study needs some" for split in empty),
        size=settings.size,
        caption=json.dumps(settings.caption, ensure_ascii=False),
        generator="\ngenerator:\n  base: terrasynth-tiny\n" if small else "",
    )
