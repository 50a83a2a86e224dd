"""What the classes are called, what colours they have, and how a mask is coded, in files and for networks.

A mask holds one class index per pixel, 0..K-1, and `ignore_index` where a pixel is unlabelled. Every coding here keeps
the unlabelled pixels apart from every class, and every coding decodes to exactly the mask it came from. Mask files may
store other values than the indices (`values`): whatever is read or written as a file follows the schema.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_write
from terrasynth.recipe_io import load_yaml

__all__ = ["Coding", "Color", "LabelSchema", "find_labels", "packaged_labels"]

Color = tuple[int, int, int]
#: How a mask enters a network; `LabelSchema.encode` and `LabelSchema.decode` take the name.
Coding = Literal["onehot", "bits", "grey"]

#: In place of class names where a mask has no labelled pixel.
_NOTHING_LABELLED = "unlabelled terrain"
_FOLDER = Path(__file__).parents[1] / "recipes"
_EXAMPLE = 'classes: [{name: building, color: "#3C1098"}, {name: road, color: "#6EC1E4"}]'


def packaged_labels() -> list[str]:
    """Names of the label schemas that come with TerraSynth."""
    return sorted(path.stem for path in (_FOLDER / "labels").glob("*.yaml"))


def find_labels(name: str | Path, folders: Sequence[Path] = (Path(),)) -> Path | None:
    """The file that `LabelSchema.load` reads for these arguments; None if there is none."""
    # The packaged recipes name their schemas by path, and are copied and changed.
    paths = [*(folder / name for folder in (*folders, _FOLDER)), _FOLDER / "labels" / f"{name}.yaml"]
    return next((path for path in paths if path.is_file()), None)


@dataclass(frozen=True)
class LabelSchema:
    """The classes of a data set.

    Attributes:
        names: K distinct class names, K >= 2; the position is the class index.
        colors: K distinct RGB colours, 0..255.
        ignore_index: the mask value of unlabelled pixels: 0..255, and no class index.
        ignore_colors: the RGB colours of unlabelled pixels in colour-coded files, none of them a class colour; the
            first is the one that is written.
        values: K distinct values, 0..255, that stand for the classes in index-coded files; None if these are the class
            indices.
        ignore_values: the values of unlabelled pixels in index-coded files, none of them a class's; the first is the
            one that is written. None of them means `ignore_index` alone.

    Raises:
        TerraSynthError: any of the above does not hold.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore_index: int = 255
    ignore_colors: tuple[Color, ...] = ((0, 0, 0),)
    values: tuple[int, ...] | None = None
    ignore_values: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) > 255:
            raise TerraSynthError(
                "a label schema has at most 255 classes: a mask has 8 bits, and one value is for unlabelled pixels",
                found=f"{len(self.names)} classes",
                expected="2 to 255 classes",
                fix="merge some of them",
            )
        if len(self.names) < 2:
            raise TerraSynthError(
                "a label schema needs at least two classes",
                found=f"{len(self.names)}: {', '.join(map(str, self.names)) or 'none'}",
                expected="2 to 255 classes",
                fix="name the background as a class of its own",
            )
        if len(self.colors) != len(self.names):
            raise TerraSynthError(
                "every class needs a colour",
                found=f"{len(self.names)} names and {len(self.colors)} colours",
                fix="give one RGB colour per class",
            )
        for name in self.names:
            if not isinstance(name, str) or not name.strip():
                raise TerraSynthError("a class name must be text", found=repr(name), fix="write the name in quotes")
        if repeated := _repeated(self.names):
            raise TerraSynthError(
                "class names must be distinct",
                found=f"{repeated!r} more than once",
                fix="rename or merge these classes",
            )
        for color in (*self.colors, *self.ignore_colors):
            if len(color) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in color):
                raise TerraSynthError("not an RGB colour", found=color, expected="three whole numbers in 0..255")
        if not self.ignore_colors:
            raise TerraSynthError(
                "unlabelled pixels need a colour", fix='set ignore_colors, for example ignore_colors: ["#000000"]'
            )
        if (repeated_color := _repeated((*self.colors, *self.ignore_colors))) is not None:
            owners = [name for name, color in zip(self.names, self.colors, strict=True) if color == repeated_color]
            owners += ["unlabelled (ignore_colors)"] * self.ignore_colors.count(repeated_color)
            raise TerraSynthError(
                "colours must be distinct",
                found=f"{_hex(repeated_color)} for {' and '.join(owners)}",
                fix='choose another colour for one of them; unlabelled is "#000000" unless ignore_colors says so',
            )
        if not self.num_classes <= self.ignore_index <= 255:
            raise TerraSynthError(
                "ignore_index must not be a class index",
                found=self.ignore_index,
                expected=f"{self.num_classes} to 255 (the {self.num_classes} classes are 0 to {self.num_classes - 1})",
                fix="set ignore_index: 255",
            )
        self._check_stored()

    def _check_stored(self) -> None:
        if len(self.stored) != self.num_classes:
            raise TerraSynthError(
                "every class needs a value, or none",
                found=f"{self.num_classes} names and {len(self.stored)} values",
                fix="give each class its `value` in the mask files",
            )
        for value in (*self.stored, *self.ignore_values):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
                raise TerraSynthError("not a value of an 8-bit mask", found=repr(value), expected="0 to 255")
        if (repeated := _repeated((*self.stored, *self.stored_ignore))) is not None:
            owners = [name for name, value in zip(self.names, self.stored, strict=True) if value == repeated]
            owners += ["unlabelled"] * self.stored_ignore.count(repeated)
            raise TerraSynthError(
                "the values in mask files must be distinct",
                found=f"{repeated} for {' and '.join(owners)}",
                fix="correct `value` of the classes, or ignore_values (ignore_index, if that is not given)",
            )

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.names)

    @property
    def stored(self) -> tuple[int, ...]:
        """What index-coded files store for the K classes."""
        return tuple(range(self.num_classes)) if self.values is None else self.values

    @property
    def stored_ignore(self) -> tuple[int, ...]:
        """What index-coded files store for unlabelled pixels; the first is written."""
        return self.ignore_values or (self.ignore_index,)

    # --- as a file -------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, value: Any, *, path: str | Path | None = None) -> LabelSchema:
        """Read the form that `to_dict` writes.

        That is `classes` (a name and a colour each, and a `value` each if the files do not store the class indices),
        `ignore_index`, `ignore_colors` and `ignore_values`. A colour is `"#RRGGBB"` or `[R, G, B]`. `path` is only
        named in messages.

        Raises:
            TerraSynthError: a key or value is missing, unknown or invalid.
        """
        try:
            return cls._from_dict(value)
        except TerraSynthError as error:
            if path is None:
                raise
            raise TerraSynthError(
                error.problem, path=path, found=error.found, expected=error.expected, fix=error.fix
            ) from error

    @classmethod
    def _from_dict(cls, value: Any) -> LabelSchema:
        known = ("classes", "ignore_index", "ignore_colors", "ignore_values")
        _check_keys(value, known, required=("classes",), where="the label schema")
        classes = value["classes"]
        if not isinstance(classes, Sequence) or isinstance(classes, str):
            raise TerraSynthError("`classes` must be a list", found=repr(classes), expected=_EXAMPLE)
        names, colors = [], []
        for index, entry in enumerate(classes):
            _check_keys(entry, ("name", "color", "value"), required=("name", "color"), where=f"class {index}")
            names.append(entry["name"])
            colors.append(_parse_color(entry["color"], where=f"`color` of class {index} ({entry['name']})"))
        ignore_index = value.get("ignore_index", 255)
        if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
            raise TerraSynthError("`ignore_index` must be a whole number", found=repr(ignore_index), expected="255")
        ignore_colors = value.get("ignore_colors", ["#000000"])
        if not isinstance(ignore_colors, Sequence) or isinstance(ignore_colors, str):
            raise TerraSynthError(
                "`ignore_colors` must be a list", found=repr(ignore_colors), expected='ignore_colors: ["#000000"]'
            )
        ignore_values = value.get("ignore_values", [])
        if not isinstance(ignore_values, Sequence) or isinstance(ignore_values, str):
            raise TerraSynthError(
                "`ignore_values` must be a list", found=repr(ignore_values), expected="ignore_values: [0]"
            )
        values = tuple(entry["value"] for entry in classes if "value" in entry)
        return cls(
            names=tuple(names),
            colors=tuple(colors),
            ignore_index=ignore_index,
            ignore_colors=tuple(_parse_color(color, where="`ignore_colors`") for color in ignore_colors),
            values=values or None,
            ignore_values=tuple(ignore_values),
        )

    def to_dict(self) -> dict[str, Any]:
        """The schema as JSON-able values; `from_dict` reads it back."""
        classes: list[dict[str, Any]] = [
            {"name": name, "color": _hex(color)} for name, color in zip(self.names, self.colors, strict=True)
        ]
        for entry, value in zip(classes, self.values or (), strict=False):
            entry["value"] = value
        return {
            "classes": classes,
            "ignore_index": self.ignore_index,
            "ignore_colors": [_hex(color) for color in self.ignore_colors],
            **({"ignore_values": list(self.ignore_values)} if self.ignore_values else {}),
        }

    @classmethod
    def load(cls, name: str | Path, folders: Sequence[Path] = (Path(),)) -> LabelSchema:
        """Read a label schema by the path of its YAML file, or a packaged one by its name (`loveda`).

        Args:
            name: a path, or a name of `packaged_labels`; a file of that name comes first.
            folders: where a relative path may start.

        Raises:
            TerraSynthError: there is no such file and no such name, or it is no label schema.
        """
        if (file := find_labels(name, folders)) is not None:
            return cls.from_yaml(file)
        candidates = [folder / name for folder in (*folders, _FOLDER)]
        known = packaged_labels()
        near = difflib.get_close_matches(Path(name).stem.lower(), known, n=1)
        raise TerraSynthError(
            "the label schema is missing",
            path=name,
            expected=f"a file {' or '.join(dict.fromkeys(str(candidate) for candidate in candidates))}, or one of the "
            f"packaged label schemas: {', '.join(known)}",
            fix=f"did you mean `{near[0]}`?" if near else "correct the name, or write the file",
        )

    @classmethod
    def from_yaml(cls, path: str | Path) -> LabelSchema:
        """Read a YAML (or JSON) file in the form of `to_dict`.

        Raises:
            TerraSynthError: the file is missing, no YAML, or no schema.
        """
        path = Path(path)
        try:
            value = load_yaml(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            raise TerraSynthError(
                "no such file", path=path, expected=f"a label schema, for example\n    {_EXAMPLE}", fix="write one"
            ) from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise TerraSynthError("not a YAML file", path=path, found=error, expected=_EXAMPLE) from error
        return cls.from_dict(value, path=path)

    def to_yaml(self, path: str | Path) -> None:
        """Write the schema as YAML, atomically."""
        with atomic_write(path) as partial:
            text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
            partial.write_text(text, encoding="utf-8")

    # --- in image files (numpy, uint8) ------------------------------------------------------------------------------

    def from_index(
        self,
        values: NDArray[Any],
        *,
        path: str | Path | None = None,
        counts: NDArray[np.integer] | None = None,
    ) -> NDArray[np.uint8]:
        """Read the values that an index-coded file stores, of any integer type, as class indices of the same shape.

        Args:
            values: (H, W).
            path: is only named in messages.
            counts: how many pixels each element of `values` stands for, in messages; one, by default.

        Raises:
            TerraSynthError: a value stands neither for a class nor for unlabelled pixels.
        """
        found, inverse, times = np.unique(values, return_inverse=True, return_counts=True)
        if counts is not None:
            times = np.bincount(inverse.ravel(), weights=counts.ravel()).astype(np.int64)
        known = {value: index for index, value in enumerate(self.stored)}
        known |= dict.fromkeys(self.stored_ignore, self.ignore_index)
        wrong = [(v, n) for v, n in zip(found.tolist(), times.tolist(), strict=True) if v not in known]
        if wrong:
            raise TerraSynthError(
                "mask values that are no class",
                path=path,
                found=_some([f"{value} ({count} px)" for value, count in wrong]),
                expected=self._stored_meanings(),
                fix="correct the mask, or the classes and ignore_index of the label schema",
            )
        classes = np.array([known[value] for value in found.tolist()], dtype=np.uint8)
        return classes[inverse].reshape(values.shape)

    def _stored_meanings(self) -> str:
        unlabelled = " or ".join(map(str, self.stored_ignore))
        if self.values is None:
            return f"0 to {self.num_classes - 1} ({', '.join(self.names)}) or {unlabelled} (unlabelled)"
        meanings = [f"{value} ({name})" for value, name in zip(self.values, self.names, strict=True)]
        return f"{', '.join(meanings)} or {unlabelled} (unlabelled)"

    def to_index(self, mask: NDArray[Any]) -> NDArray[np.uint8]:
        """What an index-coded file stores for a mask (H, W) of class indices; `from_index` reads it back.

        Raises:
            TerraSynthError: an element is neither a class index nor `ignore_index`.
        """
        plain = replace(self, values=None, ignore_values=())
        table = np.zeros(256, dtype=np.uint8)
        table[: self.num_classes] = self.stored
        table[self.ignore_index] = self.stored_ignore[0]
        return table[plain.from_index(mask)]

    def to_color(self, mask: NDArray[Any] | Tensor) -> NDArray[np.uint8]:
        """Colour a mask (H, W) -> (H, W, 3)."""
        return self._color_table[np.asarray(mask, dtype=np.uint8)]

    def from_color(
        self,
        rgb: NDArray[np.uint8],
        *,
        path: str | Path | None = None,
        counts: NDArray[np.integer] | None = None,
    ) -> NDArray[np.uint8]:
        """Read colours (..., 3) as class indices (...).

        Args:
            rgb: the colours.
            path: is only named in messages.
            counts: how many pixels each colour stands for, in messages; one, by default.

        Raises:
            TerraSynthError: a colour is neither a class's nor one of `ignore_colors`.
        """
        keys = _color_keys(rgb)
        known, indices = self._sorted_keys
        position = np.searchsorted(known, keys).clip(max=len(known) - 1)
        unknown = known[position] != keys
        if unknown.any():
            weights = None if counts is None else counts[unknown]
            raise self._unknown_colors(keys[unknown], weights, path)
        return indices[position]

    def palette(self) -> NDArray[np.uint8]:
        """The colours of all 256 values of an index-coded file, (256, 3); values that mean nothing are black."""
        table = np.zeros((256, 3), dtype=np.uint8)
        table[list(self.stored)] = self.colors
        table[list(self.stored_ignore)] = self.ignore_colors[0]
        return table

    def _unknown_colors(
        self, keys: NDArray[np.int32], weights: NDArray[np.integer] | None, path: str | Path | None
    ) -> TerraSynthError:
        found, inverse = np.unique(keys, return_inverse=True)
        counts = np.bincount(inverse, weights=weights).astype(np.int64)
        names = (*self.names, *["unlabelled"] * len(self.ignore_colors))
        colors = np.array((*self.colors, *self.ignore_colors))
        lines = []
        for index in np.argsort(-counts, kind="stable")[:5]:
            color = np.array([found[index] >> 16, found[index] >> 8 & 255, found[index] & 255])
            nearest = int(((colors - color) ** 2).sum(1).argmin())
            near = f"nearest: {names[nearest]} {_hex(colors[nearest])}"
            lines.append(f"{_hex(color)} ({counts[index]} px, {near})")
        return TerraSynthError(
            "mask colours that are no class",
            path=path,
            found=_some(lines, total=len(found)),
            expected=", ".join(f"{name} {_hex(color)}" for name, color in zip(names, colors, strict=True)),
            fix="add the colours to the label schema (ignore_colors, if unlabelled); masks must not be stored as JPEG "
            "or resized with interpolation",
        )

    @cached_property
    def _color_table(self) -> NDArray[np.uint8]:
        table = np.zeros((256, 3), dtype=np.uint8)
        table[: self.num_classes] = self.colors
        table[self.ignore_index] = self.ignore_colors[0]
        return table

    @cached_property
    def _sorted_keys(self) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        keys = _color_keys(np.array((*self.colors, *self.ignore_colors), dtype=np.uint8))
        indices = np.array([*range(self.num_classes), *[self.ignore_index] * len(self.ignore_colors)], dtype=np.uint8)
        order = np.argsort(keys)
        return keys[order], indices[order]

    # --- for networks (torch) ----------------------------------------------------------------------------------------
    # In all of them a value that is no class counts as unlabelled: masks are checked where they are read.

    def channels(self, coding: Coding) -> int:
        """How many channels `encode` yields."""
        _check_coding(coding)
        return {"onehot": self.num_classes, "bits": self.num_classes.bit_length(), "grey": 3}[coding]

    def encode(self, mask: Tensor, coding: Coding) -> Tensor:
        """Code a mask (..., H, W) -> float32 (..., `channels(coding)`, H, W)."""
        _check_coding(coding)
        return {"onehot": self.to_onehot, "bits": self.to_bits, "grey": self.to_grey}[coding](mask)

    def decode(self, code: Tensor, coding: Coding) -> Tensor:
        """The mask (..., H, W), int64, whose code is nearest to `code` (..., C, H, W)."""
        _check_coding(coding)
        return {"onehot": self.from_onehot, "bits": self.from_bits, "grey": self.from_grey}[coding](code)

    def to_onehot(self, mask: Tensor) -> Tensor:
        """One-hot: (..., H, W) -> float32 (..., K, H, W) in {0, 1}; all zero where unlabelled."""
        classes = torch.arange(self.num_classes, device=mask.device).view(-1, 1, 1)
        return (mask.unsqueeze(-3) == classes).float()

    def from_onehot(self, code: Tensor) -> Tensor:
        """The largest channel, (..., K, H, W) -> int64 (..., H, W); unlabelled where none exceeds 1/2.

        At 1/2 a class's code and the zero code are equally near.
        """
        largest, mask = code.max(dim=-3)
        return torch.where(largest > 0.5, mask, self.ignore_index)

    def to_bits(self, mask: Tensor) -> Tensor:
        """Analog bits of class + 1, (..., H, W) -> float32 (..., ceil(log2(K + 1)), H, W) in {-1, +1}; 0 is unlabelled.

        Chen et al. 2023, "Analog Bits", section 2.1. The first channel is the most significant bit.
        """
        codes = self._bit_codes.to(mask.device)
        return codes[self._ranks(mask)].movedim(-1, -3)

    def from_bits(self, code: Tensor) -> Tensor:
        """The nearest code that means something, (..., n_bits, H, W) -> int64 (..., H, W).

        That is each bit's sign, unless the signs spell a number beyond K.
        """
        # All codes have the same length, so the nearest has the largest inner product.
        nearness = torch.einsum("nc,...chw->...nhw", self._bit_codes.to(code), code)
        return self._classes(nearness.argmax(dim=-3))

    def to_grey(self, mask: Tensor) -> Tensor:
        """K + 1 evenly spaced grey levels, (..., H, W) -> float32 (..., 3, H, W) in [-1, 1]; unlabelled is black.

        The levels are whole 8-bit numbers, round(255 (class + 1) / K), so that they survive a PNG file.
        """
        grey = (self.grey_levels.to(mask.device)[self._ranks(mask)] / 127.5 - 1).unsqueeze(-3)
        return grey.expand(*grey.shape[:-3], 3, *grey.shape[-2:]).contiguous()

    def from_grey(self, code: Tensor) -> Tensor:
        """The nearest grey level to the mean of the channels, (..., 3, H, W) -> int64 (..., H, W)."""
        grey = (code.mean(dim=-3) + 1) * 127.5
        levels = self.grey_levels.to(code)
        midpoints = (levels[1:] + levels[:-1]) / 2
        return self._classes(torch.bucketize(grey, midpoints))

    @cached_property
    def grey_levels(self) -> Tensor:
        """The 8-bit levels of `to_grey`, float32 (K + 1,): unlabelled, class 0, class 1, ..."""
        return (torch.arange(self.num_classes + 1) * 255 / self.num_classes).round()

    @cached_property
    def _bit_codes(self) -> Tensor:
        shifts = torch.arange(self.num_classes.bit_length() - 1, -1, -1)
        return (torch.arange(self.num_classes + 1).unsqueeze(1) >> shifts & 1).float() * 2 - 1

    def _ranks(self, mask: Tensor) -> Tensor:
        """0 where unlabelled, class + 1 elsewhere."""
        mask = mask.long()
        return torch.where((mask >= 0) & (mask < self.num_classes), mask + 1, 0)

    def _classes(self, ranks: Tensor) -> Tensor:
        return torch.where(ranks > 0, ranks - 1, self.ignore_index)

    # --- in words ----------------------------------------------------------------------------------------------------

    def caption(self, mask: NDArray[Any] | Tensor, template: str = "a satellite image of {classes}") -> str:
        """Put the names of the classes present into `template`, most pixels first, joined by commas."""
        counts = np.bincount(np.asarray(mask).ravel(), minlength=self.num_classes)[: self.num_classes]
        present = [self.names[index] for index in np.argsort(-counts, kind="stable") if counts[index]]
        return template.replace("{classes}", ", ".join(present) or _NOTHING_LABELLED)

    def shares(self, masks: Tensor) -> str:
        """How much of uint8 masks, of any shape, is of which class: `road 63 %, water 37 %`, most pixels first."""
        counts = torch.bincount(masks.flatten(), minlength=256).tolist()
        names = {**dict(enumerate(self.names)), self.ignore_index: "unlabelled"}
        present = sorted((index for index in names if counts[index]), key=lambda index: -counts[index])
        percent = {index: 100 * counts[index] / masks.numel() for index in present}
        return ", ".join(f"{names[k]} {percent[k]:.0f} %" if percent[k] >= 1 else f"{names[k]} < 1 %" for k in present)


def _hex(color: Sequence[int] | NDArray[Any]) -> str:
    return "#{:02X}{:02X}{:02X}".format(*color)


def _color_keys(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Each colour as one number, 0xRRGGBB."""
    wide = rgb.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _some(items: Sequence[str], *, total: int | None = None) -> str:
    total = len(items) if total is None else total
    shown = items[:5]
    return ", ".join(shown) + (f" and {total - len(shown)} more" if total > len(shown) else "")


_T = TypeVar("_T")


def _repeated(values: Sequence[_T]) -> _T | None:
    return next((value for index, value in enumerate(values) if value in values[:index]), None)


def _check_coding(coding: str) -> None:
    if coding not in get_args(Coding):
        raise TerraSynthError("unknown mask coding", found=repr(coding), expected=" | ".join(get_args(Coding)))


def _check_keys(value: Any, known: Sequence[str], *, required: Sequence[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise TerraSynthError(
            f"{where} must be a mapping with {', '.join(required)}", found=repr(value), expected=_EXAMPLE
        )
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise TerraSynthError(
                f"{where} has an unknown key",
                found=repr(key),
                expected=" | ".join(known),
                fix=f"did you mean `{near[0]}`?" if near else "remove it",
            )
    for key in required:
        if key not in value:
            raise TerraSynthError(f"{where} has no `{key}`", found=repr(dict(value)), expected=_EXAMPLE)


def _parse_color(value: Any, *, where: str) -> Color:
    if isinstance(value, str) and re.fullmatch(r"#?[0-9a-fA-F]{6}", value):
        digits = value.removeprefix("#")
        return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3:
        red, green, blue = value
        return red, green, blue
    raise TerraSynthError(
        f"{where} is not a colour",
        found="nothing" if value is None else repr(value),
        expected='"#RRGGBB" or [R, G, B]',
        # In YAML an unquoted # starts a comment, and an unquoted 102030 is a number.
        fix='put it in quotes: "#3C1098"',
    )
