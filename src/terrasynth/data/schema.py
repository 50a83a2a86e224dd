"""What the classes are called, what colours they have, and how a mask is coded, in files and for networks.

A mask holds one class index per pixel, 0..K-1, and `ignore_index` where a pixel is unlabelled. Every coding here keeps
the unlabelled pixels apart from every class, and every coding decodes to exactly the mask it came from.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

__all__ = ["Coding", "Color", "LabelSchema"]

Color = tuple[int, int, int]
#: How a mask enters a network; `LabelSchema.encode` and `LabelSchema.decode` take the name.
Coding = Literal["onehot", "bits", "grey"]

#: In place of class names where a mask has no labelled pixel.
_NOTHING_LABELLED = "unlabelled terrain"
_EXAMPLE = 'classes: [{name: building, color: "#3C1098"}, {name: road, color: "#6EC1E4"}]'


@dataclass(frozen=True)
class LabelSchema:
    """The classes of a data set.

    Attributes:
        names: K distinct class names, K >= 2; the position is the class index.
        colors: K distinct RGB colours, 0..255.
        ignore_index: the mask value of unlabelled pixels: 0..255, and no class index.
        ignore_colors: the RGB colours of unlabelled pixels in colour-coded files, none of them a class colour; the
            first is the one that is written.

    Raises:
        TerraSynthError: any of the above does not hold.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore_index: int = 255
    ignore_colors: tuple[Color, ...] = ((0, 0, 0),)

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

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.names)

    # --- as a file -------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, value: Any, *, path: str | Path | None = None) -> LabelSchema:
        """Read the form that `to_dict` writes: `classes` (name and colour each), `ignore_index`, `ignore_colors`.

        A colour is `"#RRGGBB"` or `[R, G, B]`. `path` is only named in messages.

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
        _check_keys(
            value, ("classes", "ignore_index", "ignore_colors"), required=("classes",), where="the label schema"
        )
        classes = value["classes"]
        if not isinstance(classes, Sequence) or isinstance(classes, str):
            raise TerraSynthError("`classes` must be a list", found=repr(classes), expected=_EXAMPLE)
        names, colors = [], []
        for index, entry in enumerate(classes):
            _check_keys(entry, ("name", "color"), required=("name", "color"), where=f"class {index}")
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
        return cls(
            names=tuple(names),
            colors=tuple(colors),
            ignore_index=ignore_index,
            ignore_colors=tuple(_parse_color(color, where="`ignore_colors`") for color in ignore_colors),
        )

    def to_dict(self) -> dict[str, Any]:
        """The schema as JSON-able values; `from_dict` reads it back."""
        return {
            "classes": [
                {"name": name, "color": _hex(color)} for name, color in zip(self.names, self.colors, strict=True)
            ],
            "ignore_index": self.ignore_index,
            "ignore_colors": [_hex(color) for color in self.ignore_colors],
        }

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

    def from_index(self, values: NDArray[Any], *, path: str | Path | None = None) -> NDArray[np.uint8]:
        """Check stored class indices (H, W) of any integer type; returns them as uint8.

        Raises:
            TerraSynthError: a value is neither a class index nor `ignore_index`. `path` is only named in messages.
        """
        found, counts = np.unique(values, return_counts=True)
        wrong = [
            (value, count)
            for value, count in zip(found.tolist(), counts.tolist(), strict=True)
            if not 0 <= value < self.num_classes and value != self.ignore_index
        ]
        if wrong:
            raise TerraSynthError(
                "mask values that are no class",
                path=path,
                found=_some([f"{value} ({count} px)" for value, count in wrong]),
                expected=f"0 to {self.num_classes - 1} ({', '.join(self.names)}) or {self.ignore_index} (unlabelled)",
                fix="correct the mask, or the classes and ignore_index of the label schema",
            )
        return values.astype(np.uint8)

    def to_color(self, mask: NDArray[Any] | Tensor) -> NDArray[np.uint8]:
        """Colour a mask (H, W) -> (H, W, 3)."""
        return self._color_table[np.asarray(mask, dtype=np.uint8)]

    def from_color(self, rgb: NDArray[np.uint8], *, path: str | Path | None = None) -> NDArray[np.uint8]:
        """Read colours (..., 3) as class indices (...).

        Raises:
            TerraSynthError: a colour is neither a class's nor one of `ignore_colors`. `path` is only named in messages.
        """
        keys = _color_keys(rgb)
        known, indices = self._sorted_keys
        position = np.searchsorted(known, keys).clip(max=len(known) - 1)
        unknown = known[position] != keys
        if unknown.any():
            raise self._unknown_colors(keys[unknown], path)
        return indices[position]

    def palette(self) -> NDArray[np.uint8]:
        """The colours of all 256 values of an indexed PNG, (256, 3); values that mean nothing are black."""
        return self._color_table.copy()

    def _unknown_colors(self, keys: NDArray[np.int32], path: str | Path | None) -> TerraSynthError:
        found, counts = np.unique(keys, return_counts=True)
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
