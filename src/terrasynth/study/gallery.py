"""Pictures of what a study painted: a sheet, and single files for its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from terrasynth.data.augment import view
from terrasynth.data.folder import Tiles
from terrasynth.data.sheet import contact_sheet
from terrasynth.io import atomic_write
from terrasynth.systems.generate import plan

__all__ = ["write_gallery", "write_pairs"]


def write_gallery(
    out: Path,
    labelled: Tiles,
    layouts: Tiles,
    seed: int,
    painted: Mapping[str, Tiles],
    count: int = 6,
    *,
    references: Tiles | None = None,
) -> list[dict[str, Any]]:
    """Masks, the real tiles under them, and their paintings of every kind, for report and README.

    Args:
        out: of the study; gets `paintings.png` and `gallery/`.
        labelled: the training tiles; all other masks are what segmentors read.
        layouts: the tiles whose masks were painted.
        seed: of the paintings.
        painted: the sets by kind, as long as each other.
        count: rows.
        references: those that the kinds `...-like` were painted like.

    Returns:
        Of each row its caption, whether a person labelled it, and its pictures: the entries of `gallery.json`.
    """
    total = min(map(len, painted.values()))
    shown = _spread(total, count)
    jobs = [plan(total, len(layouts), seed)[index] for index in shown]
    views = [view(layouts.images[job.source], layouts.masks[job.source], job.view) for job in jobs]
    masks = torch.stack([mask for _, mask in views])
    pictures = {"real": torch.stack([image for image, _ in views])}
    for kind, dataset in painted.items():
        if kind.endswith("-like") and references is not None and "reference" not in pictures:
            chosen = [plan(total, len(layouts), seed, len(references))[index].reference for index in shown]
            pictures["reference"] = references.images[chosen]
        pictures[kind] = dataset.images[shown]
    entries = _write(out, "paintings.png", "mask", pictures, masks, layouts, shown)
    for job, entry in zip(jobs, entries, strict=True):
        entry["labelled"] = layouts.ids[job.source] in labelled.ids
    return entries


def write_pairs(out: Path, pairs: Tiles, painted: Mapping[str, Tiles], count: int = 6) -> list[dict[str, Any]]:
    """Images and masks that were painted together, and what was painted under these masks.

    Args:
        out: of the study; gets `pairs.png` and `gallery/`.
        pairs: both.
        painted: sets by kind (`...-on-pairs`), whose first masks are the first of the pairs.
        count: rows.

    Returns:
        As `write_gallery`.
    """
    shown = _spread(min(map(len, (pairs, *painted.values()))), count)
    pictures = {"pairs": pairs.images[shown]} | {kind: tiles.images[shown] for kind, tiles in painted.items()}
    return _write(out, "pairs.png", "painted-mask", pictures, pairs.masks[shown], pairs, shown)


def _spread(total: int, count: int) -> list[int]:
    """Which are shown of so many: by the golden ratio, evenly spread and never in step with the number of layouts."""
    return sorted({int(i * 0.618034 % 1 * total) for i in range(count)})


def _write(
    out: Path, sheet: str, of_masks: str, pictures: Mapping[str, Tensor], masks: Tensor, tiles: Tiles, shown: list[int]
) -> list[dict[str, Any]]:
    """Write a sheet and single pictures of rows; what gives an entry each."""
    schema, entries = tiles.schema, []
    zoom = max(1, 128 // masks.shape[-1])
    picture = contact_sheet(pictures, masks, schema, columns=len(shown), zoom=zoom, legend=True)
    with atomic_write(out / sheet) as partial:
        picture.save(partial)
    for row, index in enumerate(shown):
        entry: dict[str, Any] = {"caption": schema.caption(masks[row])}
        colors = {of_masks: schema.to_color(masks[row])}
        for kind, pixels in (colors | {k: p[row].movedim(0, -1).numpy() for k, p in pictures.items()}).items():
            path = out / "gallery" / f"{index:06d}-{kind}.png"
            with atomic_write(path) as partial:
                Image.fromarray(pixels).save(partial)
            entry[kind] = path.relative_to(out).as_posix()
        entries.append(entry)
    return entries
