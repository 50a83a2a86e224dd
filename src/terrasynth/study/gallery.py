"""Pictures of what a study painted: a sheet, and single files for its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from terrasynth.data.augment import view
from terrasynth.data.folder import Tiles
from terrasynth.data.sheet import contact_sheet
from terrasynth.io import atomic_write, write_json
from terrasynth.systems.generate import plan

__all__ = ["write_gallery"]


def write_gallery(
    out: Path,
    labelled: Tiles,
    layouts: Tiles,
    seed: int,
    painted: Mapping[str, Tiles],
    count: int = 6,
    *,
    references: Tiles | None = None,
) -> None:
    """Masks, the real tiles under them, and their paintings of every kind, for report and README.

    Args:
        out: of the study; gets `paintings.png`, `gallery/` and `gallery.json`.
        labelled: the training tiles; all other masks are what segmentors read.
        layouts: the tiles whose masks were painted.
        seed: of the paintings.
        painted: the sets by kind, as long as each other.
        count: rows.
        references: those that the kinds `...-like` were painted like.
    """
    total = min(map(len, painted.values()))
    # By the golden ratio: evenly spread, and never in step with the number of layouts.
    shown = sorted({int(i * 0.618034 % 1 * total) for i in range(count)})
    jobs = [plan(total, len(layouts), seed)[index] for index in shown]
    views = [view(layouts.images[job.source], layouts.masks[job.source], job.view) for job in jobs]
    masks = torch.stack([mask for _, mask in views])
    pictures = {"real": torch.stack([image for image, _ in views])}
    for kind, dataset in painted.items():
        if kind.endswith("-like") and references is not None and "reference" not in pictures:
            chosen = [plan(total, len(layouts), seed, len(references))[index].reference for index in shown]
            pictures["reference"] = references.images[chosen]
        pictures[kind] = dataset.images[shown]
    zoom = max(1, 128 // masks.shape[-1])
    sheet = contact_sheet(pictures, masks, layouts.schema, columns=count, zoom=zoom, legend=True)
    with atomic_write(out / "paintings.png") as partial:
        sheet.save(partial)
    entries = []
    for row, index in enumerate(shown):
        entry: dict[str, Any] = {
            "caption": layouts.schema.caption(masks[row]),
            "labelled": layouts.ids[jobs[row].source] in labelled.ids,
        }
        colors = {"mask": layouts.schema.to_color(masks[row])}
        for kind, pixels in (colors | {k: p[row].movedim(0, -1).numpy() for k, p in pictures.items()}).items():
            path = out / "gallery" / f"{index:06d}-{kind}.png"
            with atomic_write(path) as partial:
                Image.fromarray(pixels).save(partial)
            entry[kind] = path.relative_to(out).as_posix()
        entries.append(entry)
    write_json(out / "gallery.json", entries)
