"""One image or mask file to pixels, and which coding the masks of a split have.

Nothing is guessed: a mask is read in every coding that it fits, and masks that fit two codings with different meanings
are an error that shows both. So is a mask whose colours or class names say that it has other classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError, combined, listed
from terrasynth.io import Pixels, open_image
from terrasynth.progress import say

__all__ = [
    "common_coding",
    "mask_readings",
    "nodata_is_class",
    "read_image",
    "read_mask",
    "read_prediction",
    "refuse_bad_files",
    "refuse_jpeg",
    "without_alpha",
    "without_recipe",
]

_Array = NDArray[np.uint8]
_Counts = NDArray[np.int64]
# Stored values, and how many pixels each of them stands for, to classes.
_Decoder = Callable[[_Array, _Counts | None], _Array]

_GREYS = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)


def read_image(path: Path) -> _Array:
    """Read an image as RGB, uint8 (H, W, 3)."""
    pixels = open_image(path)
    values = pixels.values
    if values.dtype != np.uint8:
        numbers = values[np.isfinite(values)]
        extent = f"values {numbers.min()} to {numbers.max()}" if numbers.size else "no values"
        lost = values.size - numbers.size
        raise TerraSynthError(
            "the image is not 8-bit",
            path=path,
            found=f"{values.dtype}, {extent}" + (f", and {lost} that are no numbers (NaN or infinity)" if lost else ""),
            expected="uint8",
            fix="convert it, with one range for all tiles, for example `gdal_translate -ot Byte -scale LOW HIGH 0 255`",
        )
    if pixels.palette is not None:
        return _palette(pixels, path)[values]
    values = without_alpha(values, path)
    if values.ndim == 2:
        return np.repeat(values[..., None], 3, axis=2)
    if values.shape[2] != 3:
        raise TerraSynthError(
            "the image is neither grey nor RGB",
            path=path,
            found=f"{values.shape[2]} bands",
            expected="1 or 3 bands",
            fix="choose three bands, for example `gdal_translate -b 1 -b 2 -b 3`",
        )
    return values


def without_alpha(values: NDArray[Any], path: Path) -> NDArray[Any]:
    """Drop the opaque alpha band of (H, W, 2) or (H, W, 4).

    Raises:
        TerraSynthError: it is not opaque everywhere.
    """
    if values.ndim == 2 or values.shape[2] not in (2, 4):
        return values
    if (values[..., -1] != 255).any():
        raise TerraSynthError(
            f"{values.shape[2]} bands, and the last is no opaque alpha band",
            path=path,
            found=f"{(values[..., -1] != 255).mean():.1%} of its pixels below 255",
            expected="1 or 3 bands, or an alpha band of 255 everywhere",
            fix="choose one or three bands, for example `gdal_translate -b 1 -b 2 -b 3`",
        )
    return values[..., 0] if values.shape[2] == 2 else values[..., :3]


def _palette(pixels: Pixels, path: Path) -> _Array:
    palette: _Array = np.asarray(pixels.palette)
    if pixels.values.max() >= len(palette):
        raise TerraSynthError(
            "the palette lacks colours", path=path, found=f"{len(palette)} colours, index {pixels.values.max()}"
        )
    return palette


def read_mask(path: Path, schema: LabelSchema, coding: str) -> dict[str, _Array]:
    """Read a mask in every coding that it fits ("index", "color", "grey"), each (H, W); at least one."""
    refuse_jpeg(path)
    return mask_readings(open_image(path), schema, coding, path)


def read_prediction(path: Path, schema: LabelSchema) -> _Array:
    """Read a predicted class map, of the values that the schema's mask files store, as class indices (H, W).

    Values that stand for no class are read as unlabelled: to be counted as wrong, instead of ending the evaluation. The
    values alone count, not the colours of a palette.

    Raises:
        TerraSynthError: the file can not be read, does not hold one band of whole numbers, or names other classes.
    """
    refuse_jpeg(path)
    pixels = open_image(path)
    values = pixels.values
    # Bands are left to the reader, which refuses colours; single values of them mean nothing.
    if values.ndim == 2 and values.dtype.kind in "iu":
        known = np.isin(values, schema.stored)
        pixels = replace(pixels, values=np.where(known, values, np.uint8(schema.stored_ignore[0])))
    try:
        return _as_named(mask_readings(pixels, schema, "index", path), pixels, schema, path)["index"]
    except TerraSynthError as error:
        raise without_recipe(error) from error


def refuse_jpeg(path: Path) -> None:
    """Refuse a mask that went through a compression with loss."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise TerraSynthError(
            "the mask is a JPEG, whose compression invents values",
            path=path,
            expected="PNG or TIFF",
            fix="export it again",
        )


def _as_named(readings: Mapping[str, _Array], pixels: Pixels, schema: LabelSchema, path: Path) -> dict[str, _Array]:
    """The readings that agree with the names that the file gives its classes; all if it gives none.

    Raises:
        TerraSynthError: none of them does.
    """
    values, names = pixels.values, pixels.class_names
    firsts = {value: int((values == value).argmax()) for value in names if (values == value).any()}
    meanings = {
        coding: {value: _meaning(schema, int(reading.flat[first])) for value, first in firsts.items()}
        for coding, reading in readings.items()
    }
    fit = {
        coding: readings[coding]
        for coding, meaning in meanings.items()
        if all(name.casefold() == names[value].casefold() for value, name in meaning.items())
    }
    if fit:
        return fit
    named = {value: names[value] for value in firsts}
    raise TerraSynthError(
        "the names of the classes in the mask are not those of the label schema",
        path=path,
        found=f"in the file: {_spelled(named)}; in the label schema: {_spelled(next(iter(meanings.values())))}",
        expected="a mask of the classes of the label schema",
        fix="correct the classes of the label schema; or set data.mask_coding: index if the names are wrong",
    )


def _meaning(schema: LabelSchema, index: int) -> str:
    return "unlabelled" if index == schema.ignore_index else schema.names[index]


def _spelled(meanings: Mapping[int, str]) -> str:
    return listed([f"{value} = {name}" for value, name in meanings.items()])


def without_recipe(error: TerraSynthError, path: Path | None = None) -> TerraSynthError:
    """The same error, with advice for a command that has no `data.mask_coding`; `path` is named instead of a folder."""
    fix = error.fix
    if "data.mask_coding" in (fix or ""):
        fix = (
            "give masks of the expected classes; if their values are right, export the masks as class indices, "
            "without a palette and class names"
        )
    return TerraSynthError(error.problem, path=path or error.path, found=error.found, expected=error.expected, fix=fix)


def mask_readings(
    pixels: Pixels, schema: LabelSchema, coding: str, path: Path, counts: _Counts | None = None
) -> dict[str, _Array]:
    """Read the pixels of a mask in every coding that they fit, as `read_mask` does.

    Args:
        pixels: the whole mask; or the different pixels that occur in it, whose readings are those of the mask.
        schema: the classes.
        coding: `auto`, or the only one to try.
        path: is only named in messages.
        counts: how often each of `pixels` occurs, (H, W), in messages; once, by default.

    Raises:
        TerraSynthError: they fit none; or, with `auto`, none in which they are the classes that the file names.
    """
    readings = _readings(pixels, schema, coding, path, counts)
    return _as_named(readings, pixels, schema, path) if coding == "auto" else readings


def _readings(
    pixels: Pixels, schema: LabelSchema, coding: str, path: Path, counts: _Counts | None
) -> dict[str, _Array]:
    values = without_alpha(pixels.values, path)
    if values.dtype.kind not in "iu":
        raise TerraSynthError(
            "the mask is not of whole numbers",
            path=path,
            found=values.dtype,
            expected="uint8",
            fix="convert it to uint8",
        )
    if values.ndim == 3 and values.shape[2] == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim == 3:
        if values.shape[2] != 3 or values.dtype != np.uint8 or coding == "index":
            raise TerraSynthError(
                "the mask has more than one band",
                path=path,
                found=f"{values.shape[2]} bands of {values.dtype}",
                expected="one band of class indices" + ("" if coding == "index" else ", or RGB colours in uint8"),
                fix="set data.mask_coding: color if these are colours" if coding == "index" else "export it again",
            )
        return {"color": schema.from_color(values, path=path, counts=counts)}
    if values.dtype != np.uint8:
        if coding == "color":
            raise TerraSynthError("the mask is not 8-bit colour", path=path, found=values.dtype, expected="uint8")
        index = {"index": schema.from_index(values, path=path, counts=counts)}
        return _without_data(index, values, pixels.nodata, schema, path)

    colors = _palette(pixels, path) if pixels.palette is not None else _GREYS
    decoders: dict[str, _Decoder] = {
        "index": lambda values, counts: schema.from_index(values, path=path, counts=counts),
        "color": lambda values, counts: schema.from_color(colors[values], path=path, counts=counts),
    }
    if coding != "auto":
        decoders = {coding: decoders[coding]}
    elif pixels.palette is None:
        decoders["grey"] = lambda values, counts: _from_grey(values, schema, path)
    present = np.flatnonzero(np.bincount(values.ravel(), minlength=256)).astype(np.uint8)
    tables = {}
    for name, decode in decoders.items():
        try:
            table = np.zeros(256, dtype=np.uint8)
            table[present] = decode(present, None)
            tables[name] = table
        except TerraSynthError:
            continue
    if not tables:
        raise _unreadable(decoders, values, counts, path)
    if coding == "auto" and pixels.palette is not None and [*tables] == ["index"]:
        _check_palette(present, tables["index"], colors, schema, path)
    readings = {name: table[values] for name, table in tables.items()}
    return _without_data(readings, values, pixels.nodata, schema, path)


def _check_palette(present: _Array, table: _Array, colors: _Array, schema: LabelSchema, path: Path) -> None:
    """Refuse class indices of which one has the colour of another class.

    Colours that are no class's say nothing: many programs give a mask any palette.

    Args:
        present: the values that occur, (n,).
        table: the class index of each of the 256 values.
        colors: of the values, (N, 3).
        schema: the classes.
        path: the file.
    """
    owners = dict(zip(schema.colors, schema.names, strict=True))
    shown = {value: tuple(colors[value].tolist()) for value in present.tolist()}
    by_index = {value: _meaning(schema, int(table[value])) for value in shown}
    labelled = [value for value in shown if table[value] != schema.ignore_index]
    if all(owners.get(shown[value], by_index[value]) == by_index[value] for value in labelled):
        return
    by_color = {value: owners.get(color, "none (#{:02X}{:02X}{:02X})".format(*color)) for value, color in shown.items()}
    raise TerraSynthError(
        "the palette of the mask contradicts its values",
        path=path,
        found=f"as class indices: {_spelled(by_index)}; by their colours: {_spelled(by_color)}",
        expected="a mask of the classes of the label schema",
        fix="correct the classes or colours of the label schema; or set data.mask_coding: index if the palette is "
        "wrong",
    )


def _without_data(
    readings: dict[str, _Array], values: NDArray[Any], nodata: float | None, schema: LabelSchema, path: Path
) -> dict[str, _Array]:
    """The readings under which pixels without data are unlabelled."""
    empty = np.flatnonzero(values == nodata)
    if not empty.size:
        return readings
    meanings = {coding: int(reading.flat[empty[0]]) for coding, reading in readings.items()}
    fit = {coding: readings[coding] for coding, value in meanings.items() if value == schema.ignore_index}
    if not fit:
        names = dict.fromkeys(schema.names[value] for value in meanings.values())
        raise nodata_is_class(f"{nodata:g}", " or ".join(names), schema, path)
    return fit


def nodata_is_class(nodata: str, name: str, schema: LabelSchema, path: Path) -> TerraSynthError:
    """What to say where the nodata value of a mask is also that of a class."""
    return TerraSynthError(
        "the nodata value of the mask is a class as well",
        path=path,
        found=f"nodata {nodata}, which is {name} in the label schema",
        expected="a nodata value that means unlabelled, or none",
        fix="if these pixels are of that class: `gdal_edit.py -unsetnodata FILE`; if they are unlabelled, give them "
        f"the value {schema.stored_ignore[0]}, or correct the label schema",
    )


def _unreadable(
    decoders: Mapping[str, _Decoder], values: _Array, counts: _Counts | None, path: Path
) -> TerraSynthError:
    """Why none of the codings fits."""
    errors = {}
    for name, decode in decoders.items():
        try:
            decode(values, counts)
        except TerraSynthError as error:
            errors[name] = error
    if "color" not in errors or "grey" in errors:
        return next(iter(errors.values()))
    if len(errors) == 1:
        return errors["color"]
    return TerraSynthError(
        "neither the values nor the palette colours of the mask are classes",
        path=path,
        found=f"values {errors['index'].found}; colours {errors['color'].found}",
        expected=f"values {errors['index'].expected}; or colours {errors['color'].expected}",
        fix="correct the mask or the label schema",
    )


def _from_grey(values: _Array, schema: LabelSchema, path: Path) -> _Array:
    """Read the 8-bit levels of `LabelSchema.to_grey`, exactly."""
    levels = schema.grey_levels.numpy().astype(np.uint8)
    if not np.isin(values, levels).all():
        raise TerraSynthError("values between the grey levels of the classes", path=path)
    classes = np.array([schema.ignore_index, *range(schema.num_classes)], dtype=np.uint8)
    return classes[np.searchsorted(levels, values)]


def common_coding(
    masks: Sequence[Mapping[str, _Array]],
    paths: Sequence[Path],
    schema: LabelSchema,
    *,
    chosen: str,
    pixels: Callable[[Path], Pixels] = open_image,
) -> str:
    """The coding that all masks fit.

    Args:
        masks: what `read_mask` or `mask_readings` gave for each.
        paths: their files.
        schema: the classes.
        chosen: `auto`, or the coding that was asked for.
        pixels: gives the pixels of one of the files again, for a message.

    Raises:
        TerraSynthError: there is none, or two that would mean different classes.
    """
    if chosen != "auto":
        return chosen
    common = set.intersection(*(set(readings) for readings in masks))
    if {"index", "color"} <= common:
        for readings, path in zip(masks, paths, strict=True):
            if not np.array_equal(readings["index"], readings["color"]):
                raise _ambiguity(pixels(path), path, schema)
    if "index" in common:
        if _seen(masks, "index") == {0, 255} and schema.stored[0] == 0 and 255 in schema.stored_ignore:
            raise TerraSynthError(
                "the masks are black and white, which can be read in two ways",
                path=paths[0].parent,
                found=f"only the values 0 and 255 in all masks: 255 is unlabelled, or it is {schema.names[1]}",
                expected="one meaning",
                fix="set data.mask_coding: index if 255 is unlabelled; otherwise set data.mask_coding: color and, in "
                'the label schema, the colours "#000000" and "#FFFFFF" for the two classes, another for ignore_colors',
            )
        return "index"
    if "color" in common:
        return "color"
    # Grey levels are only taken for what they are if all of them occur: two or three values fit too easily.
    if "grey" in common and _seen(masks, "grey") >= set(range(schema.num_classes)):
        return "grey"
    example = {" or ".join(sorted(readings)): path.name for readings, path in zip(masks, paths, strict=True)}
    raise TerraSynthError(
        "the masks fit no coding together",
        path=paths[0].parent,
        found="; ".join(f"{name} could be {fits}" for fits, name in example.items()),
        expected="class indices in all masks, or the colours of the label schema in all masks",
        fix="export the masks in one coding, or correct the colours of the label schema: a grey level v is [v, v, v]",
    )


def _seen(masks: Sequence[Mapping[str, _Array]], coding: str) -> set[int]:
    return {int(value) for readings in masks for value in np.flatnonzero(np.bincount(readings[coding].ravel()))}


def refuse_bad_files(problems: Sequence[TerraSynthError], total: int, what: str, *, skip_bad: bool) -> None:
    """Tell all bad files in one message; with `skip_bad`, on standard error, so that the others can be used.

    Args:
        problems: what is wrong with each of them.
        total: how many files there are, with the others.
        what: they are, in the plural.
        skip_bad: go on without them.

    Raises:
        TerraSynthError: there are some, and `skip_bad` is off or no other file is left.
    """
    if not problems:
        return
    if not skip_bad or len(problems) == total:
        raise combined(problems, f"{len(problems)} of {total} {what} can not be used")
    say("\n    ".join([f"left out: {len(problems)} of {total} {what}", *(error.line() for error in problems)]))


def _ambiguity(pixels: Pixels, path: Path, schema: LabelSchema) -> TerraSynthError:
    values = pixels.values if pixels.values.ndim == 2 else pixels.values[..., 0]
    readings = mask_readings(pixels, schema, "auto", path)

    def spell(coding: str) -> str:
        reading = readings[coding]
        return _spelled({int(value): _meaning(schema, reading[values == value][0]) for value in np.unique(values)})

    return TerraSynthError(
        "the mask can be read in two ways",
        path=path,
        found=f"as class indices: {spell('index')}; by their colours: {spell('color')}",
        expected="one meaning",
        fix="set data.mask_coding: index, or data.mask_coding: color",
    )
