"""The dataset card: what a synthetic dataset, or an export of one, says of itself in its README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError, flat
from terrasynth.recipe_io import load_yaml

__all__ = ["Contents", "check_license", "dataset_card", "front_matter"]

_UNKNOWN = "unknown"
_UNKNOWN_LICENSE = (
    "not stated. It follows from the licences of the training tiles and of the base model: state it before sharing."
)
_CARD = """\
---
{front}---
# {title}

**These images are synthetic.** A generative model painted them {masks}; they show no real place. Every image
says so in its PNG text (`synthetic=1`), together with its seed and what it was made from (`terrasynth`).

{count} samples. {files}

Painted by {versions}. Licence: {license}

| value | class | tiles | pixels |
|---|---|---|---|
{classes}

## Settings
| setting | value |
|---|---|
{provenance}

## Loading
{loading}
"""


class Contents:
    """What is in a dataset, counted sample by sample.

    Attributes:
        count: samples so far.
        tiles: int64 (256,), in how many masks each value occurs.
        pixels: int64 (256,), how many pixels have it.
        versions: of the libraries that painted, by name.
    """

    def __init__(self) -> None:
        self.count = 0
        self.tiles = np.zeros(256, dtype=np.int64)
        self.pixels = np.zeros(256, dtype=np.int64)
        self.versions: dict[str, set[str]] = {}

    def add(self, row: Mapping[str, Any], mask: NDArray[np.uint8]) -> None:
        """Count one sample: its row of `metadata.jsonl`, and its mask (H, W)."""
        self.count += 1
        counts = np.bincount(mask.ravel(), minlength=256)
        self.pixels += counts
        self.tiles += counts > 0
        for name, number in row["versions"].items():
            self.versions.setdefault(name, set()).add(number)


def dataset_card(
    contents: Contents,
    schema: LabelSchema,
    plan: Mapping[str, Any],
    *,
    title: str,
    license: str,
    files: str,
    loading: str,
    front: Mapping[str, Any] | None = None,
) -> str:
    """The text of a README.md with Hugging Face front matter.

    Args:
        contents: what was counted.
        schema: the classes.
        plan: everything that the samples depend on.
        title: heading.
        license: SPDX or Hugging Face identifier, or `unknown`.
        files: a sentence that says which files there are.
        loading: how to read them, in Markdown.
        front: more front matter.
    """
    names = [*zip(schema.stored, schema.names, strict=True), (schema.stored_ignore[0], "(unlabelled)")]
    share = contents.pixels / max(1, contents.pixels.sum())
    settings = {key: value for key, value in plan.items() if key != "schema"}
    head = {
        "license": license,
        "pretty_name": title,
        "task_categories": ["image-segmentation"],
        "tags": ["synthetic", "remote-sensing", "terrasynth"],
        "size_categories": [_size_category(contents.count)],
        **(front or {}),
    }
    return _CARD.format(
        front=yaml.safe_dump(head, sort_keys=False),
        title=title,
        count=contents.count,
        masks="and their masks" if "pairs" in plan else "from label masks",
        files=files,
        versions=", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in contents.versions.items()),
        license=_UNKNOWN_LICENSE if license == _UNKNOWN else license,
        classes="\n".join(f"| {i} | {_cell(name)} | {contents.tiles[i]} | {share[i]:.2%} |" for i, name in names),
        provenance="\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in flat(settings).items()),
        loading=loading,
    )


def front_matter(folder: str | Path) -> dict[str, Any]:
    """What the card in `folder` states in its front matter, by key; nothing if there is no card yet.

    Raises:
        TerraSynthError: the card has no front matter that can be read, or its licence is none.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        values = load_yaml(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise TerraSynthError(
            "the dataset card has no front matter",
            path=path,
            expected="lines of `key: value` between two lines `---` at its beginning",
            fix="mend it, or delete the file and run the command that painted again: it writes a new one",
        )
    if "license" in values:
        check_license(values["license"], path)
    return values


def check_license(license: Any, path: str | Path | None = None) -> None:
    """Refuse what is no identifier of a licence. `path` is only named in the message.

    Raises:
        TerraSynthError: it is none.
    """
    if not isinstance(license, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        raise TerraSynthError(
            "not the identifier of a licence",
            path=path,
            found=repr(license),
            expected="an SPDX or Hugging Face identifier, as cc-by-4.0, cc0-1.0, odbl, other",
            fix="look it up on spdx.org/licenses",
        )


def _cell(value: object) -> str:
    """A value inside a cell of a Markdown table."""
    return " ".join(str(value).replace("|", r"\|").splitlines())


def _size_category(count: int) -> str:
    """Of those that the hub knows."""
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
    return next((name for power, name in enumerate(names, 3) if count < 10**power), "1B<n<10B")
