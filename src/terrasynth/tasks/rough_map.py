"""A class map of any model, to be refined: which classes its pixels stand for, and how they are written again.

The classes come from a label schema. Without one, every value is a class, or every colour; the file's nodata value and
what its validity mask leaves out are unlabelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from terrasynth.data.masks import Lookup, Survey, settle, survey
from terrasynth.data.raster import Raster
from terrasynth.data.read import mask_readings, refuse_jpeg, without_alpha, without_recipe
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError, listed
from terrasynth.tasks.class_map import Legend

__all__ = ["UNLABELLED", "RoughMap", "read_rough_map"]

#: The class index of unlabelled pixels.
UNLABELLED = 255


@dataclass(frozen=True)
class RoughMap:
    """A class map that is open.

    Attributes:
        raster: the file.
        lookup: what its pixels mean.
        names: of the K classes.
        counts: int64 (K,), how many pixels each has.
        written: (256,), what is written for each class that occurs, and for `UNLABELLED`.
        legend: of what is written.
    """

    raster: Raster
    lookup: Lookup
    names: tuple[str, ...]
    counts: NDArray[np.int64]
    written: NDArray[Any]
    legend: Legend

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.names)

    def classes(self, window: Window) -> NDArray[np.uint8]:
        """Class indices and `UNLABELLED`, (h, w)."""
        return self.lookup.read(self.raster, window)

    def stored(self, window: Window, classes: NDArray[np.uint8]) -> NDArray[Any]:
        """How a window is written again, (h, w): values as they are, colours as what stands for their class.

        Args:
            window: of the map.
            classes: what `classes` gave for it.
        """
        if self.raster.count > 1:
            return self.written[classes]
        values, unmasked = self.raster.read(window)[0], self.raster.unmasked(window)
        return values if unmasked is None else np.where(unmasked, values, self.written[UNLABELLED])

    def shares(self) -> str:
        """How much of the map is of which class: `road 63 %, water 37 %`, most pixels first."""
        total = self.raster.grid.width * self.raster.grid.height
        found = {self.names[k]: int(self.counts[k]) for k in np.argsort(-self.counts, kind="stable") if self.counts[k]}
        found["unlabelled"] = total - int(self.counts.sum())
        percent = {name: 100 * count / total for name, count in found.items() if count}
        return listed([f"{name} {share:.0f} %" if share >= 1 else f"{name} < 1 %" for name, share in percent.items()])


def read_rough_map(raster: Raster, schema: LabelSchema | None, num_classes: int | None) -> RoughMap:
    """Find the classes of a map, in one pass over it.

    Args:
        raster: the file: values in one band, with a palette or without, or RGB colours.
        schema: the classes; None takes every value or colour for one.
        num_classes: how many classes are expected, if these and no others can be refined; without a schema, the values
            of the map must then be their indices.

    Raises:
        TerraSynthError: the map can not be read so, or has no labelled pixel or other classes.
    """
    refuse_jpeg(raster.path)
    found = survey(raster, name="class map")
    if not len(found.keys):
        raise TerraSynthError("the class map has no labelled pixel", path=raster.path, fix="check its nodata value")
    if schema is not None:
        rough = _by_schema(raster, found, schema)
    elif raster.count > 1:
        rough = _by_color(raster, found)
    else:
        rough = _by_value(raster, found)
    if num_classes is None:
        return rough
    if schema is None and raster.count == 1 and found.keys[0] >= 0 and found.keys[-1] < num_classes:
        return _by_index(raster, found, num_classes)
    if schema is None or schema.num_classes != num_classes:
        raise TerraSynthError(
            "the classes of the map are not those that the refiner was made for",
            path=raster.path,
            found=f"{rough.num_classes}: {listed(rough.names)}",
            expected=f"{num_classes} classes, by their label schema or as the values 0 to {num_classes - 1}",
            fix="give their label schema with --labels, or take a refiner for any classes",
        )
    return rough


def _by_schema(raster: Raster, found: Survey, schema: LabelSchema) -> RoughMap:
    try:
        coding, lookups, faults = settle([found], schema, _coding(found, schema))
        if faults:
            raise faults[0]
    except TerraSynthError as error:
        raise without_recipe(error, raster.path) from error
    meant = lookups[raster.path].classes
    classes = np.where(meant == schema.ignore_index, np.uint8(UNLABELLED), meant)
    if raster.count == 1:
        named = dict(zip(schema.stored, schema.names, strict=True)) if coding == "index" else {}
        palette = schema.palette() if coding == "index" and raster.dtype == np.uint8 else None
        nodata = schema.stored_ignore[0] if coding == "index" else None
        return _as_it_is(raster, found, classes, schema.names, Legend(nodata, named, palette))
    written = np.zeros(256, dtype=np.uint8)
    written[: schema.num_classes] = schema.stored
    written[UNLABELLED] = schema.stored_ignore[0]
    named = dict(zip(schema.stored, schema.names, strict=True))
    legend = Legend(schema.stored_ignore[0], named, schema.palette())
    return _rough_map(raster, found, classes, schema.names, written, legend)


def _coding(found: Survey, schema: LabelSchema) -> str:
    """`index` where the colours alone would leave nothing labelled, as of zeros where black is unlabelled."""
    readings = mask_readings(found.pixels, schema, "auto", found.path, found.counts)
    labelled = {coding for coding, classes in readings.items() if (classes != schema.ignore_index).any()}
    return "index" if "index" in labelled and "color" in readings.keys() - labelled else "auto"


def _by_value(raster: Raster, found: Survey) -> RoughMap:
    _check_number(raster, found)
    names = tuple(raster.class_names.get(value, f"value {value}") for value in found.keys.tolist())
    return _as_it_is(raster, found, np.arange(len(names), dtype=np.uint8), names, Legend(None, {}, None))


def _by_index(raster: Raster, found: Survey, num_classes: int) -> RoughMap:
    names = tuple(raster.class_names.get(index, f"value {index}") for index in range(num_classes))
    return _as_it_is(raster, found, found.keys.astype(np.uint8), names, Legend(None, {}, None))


def _by_color(raster: Raster, found: Survey) -> RoughMap:
    _check_number(raster, found)
    palette = np.zeros((256, 3), dtype=np.uint8)
    colors = without_alpha(found.pixels.values, raster.path)[0]
    palette[: len(colors)] = colors.reshape(len(colors), -1)
    if found.nodata is not None:
        palette[UNLABELLED] = found.nodata.values[0, 0, 0]  # the same in all bands
    names = tuple("#{:02X}{:02X}{:02X}".format(*color) for color in palette[: len(colors)].tolist())
    order = np.arange(256, dtype=np.uint8)
    return _rough_map(raster, found, order[: len(colors)], names, order, Legend(UNLABELLED, {}, palette))


def _check_number(raster: Raster, found: Survey) -> None:
    if len(found.keys) > UNLABELLED:
        raise TerraSynthError(
            f"the map has too many different {'values' if raster.count == 1 else 'colours'} for each to be a class",
            path=raster.path,
            found=len(found.keys),
            expected=f"at most {UNLABELLED}",
            fix="give the label schema with --labels; a map must not be compressed with loss or resized with "
            "interpolation",
        )


def _as_it_is(
    raster: Raster, found: Survey, classes: NDArray[np.uint8], names: tuple[str, ...], chosen: Legend
) -> RoughMap:
    """A map of one band, whose values stay; `chosen` says what the file itself leaves open."""
    written = np.zeros(256, dtype=raster.dtype)
    # Of several values that mean the same, the first: the last that is set here.
    written[classes[::-1]] = found.keys[::-1]
    # A nodata value that no pixel can have is none.
    nodata = raster.nodata if raster.nodata is not None and _fits(raster.nodata, raster.dtype) else None
    if nodata is None and raster.unmasked(Window(0, 0, 1, 1)) is not None:
        # A class map has a nodata value instead of a validity mask.
        free = set(range(256 if raster.dtype != np.int8 else 128)) - {*found.keys.tolist()}
        nodata = chosen.nodata if chosen.nodata in free else max(free)
    written[UNLABELLED] = nodata or 0
    palette = chosen.palette if raster.palette is None else raster.palette
    legend = Legend(nodata, raster.class_names or chosen.names, palette, raster.dtype)
    return _rough_map(raster, found, classes, names, written, legend)


def _fits(value: float, dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return limits.min <= value <= limits.max and value == int(value)


def _rough_map(
    raster: Raster,
    found: Survey,
    classes: NDArray[np.uint8],
    names: tuple[str, ...],
    written: NDArray[Any],
    legend: Legend,
) -> RoughMap:
    counts = np.bincount(classes, weights=found.counts[0], minlength=256)[: len(names)].astype(np.int64)
    return RoughMap(raster, Lookup(found.keys, classes, UNLABELLED), names, counts, written, legend)
