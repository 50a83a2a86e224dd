"""What finished units made, read back; where it is damaged, how to have it made again is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terrasynth.curation.audit import Audit
from terrasynth.curation.filter import class_mean_losses, filter_pixels
from terrasynth.curation.score import curated_tiles
from terrasynth.data.folder import Tiles, load_synthetic
from terrasynth.data.write import read_manifest
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_write, write_json
from terrasynth.recipe import CurationConfig
from terrasynth.tasks.segmentation import Segmentor
from terrasynth.training.units import Unit, store_tensors, stored_tensors

__all__ = [
    "AUDIT",
    "chosen_tiles",
    "filtered_tiles",
    "painted_tiles",
    "remade",
    "segmentor_of",
    "stored_audit",
    "validation_curve",
]

#: The sheet of an audit.
AUDIT = "audit.png"
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def validation_curve(log: Path) -> dict[str, list[float]]:
    """Validation mIoU against step from the log of a training."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    points = [line for line in lines if "miou" in line]
    return {"steps": [line["step"] for line in points], "miou": [line["miou"] for line in points]}


def painted_tiles(painted: Unit) -> Tiles:
    """The dataset of a finished unit."""
    with remade(painted):
        return load_synthetic(painted.folder / "dataset")


def filtered_tiles(painted: Tiles, real: Tiles, judge: Unit, stored: Path) -> Tiles:
    """The painted tiles without the labels that the judge, a teacher, finds implausible."""

    def masks() -> Tensor:
        segmentor, ignore = segmentor_of(judge), real.schema.ignore_index
        means = class_mean_losses(segmentor.pixel_losses(real), real.masks, real.schema.num_classes, ignore)
        return filter_pixels(painted.masks, segmentor.pixel_losses(painted), means, ignore_index=ignore)

    # Kept for the next sittings: where the rounding is another, a pixel near the limit may fall on its other side, and
    # the work would no longer be the one that began.
    if not stored.is_file():
        store_tensors(stored, masks=masks())
    return replace(painted, masks=stored_tensors(stored)["masks"])


def chosen_tiles(
    tiles: Tiles, painted: Unit, real: Tiles, judge: Unit, config: CurationConfig, seed: int, stored: Path
) -> Tiles:
    """What the rules leave of painted tiles, by what the judge, a teacher, finds in them, with their weights."""
    if not stored.is_file():  # kept as those of `filtered_tiles`
        rows = islice(read_manifest(painted.folder / "dataset")[1], len(tiles))
        sources = [row.get("source_mask", row["id"]) for row in rows]
        used, masks, weights = curated_tiles(tiles, sources, real, segmentor_of(judge), config, seed)
        store_tensors(stored, masks=masks, used=used, weights=weights)
    kept = stored_tensors(stored)
    ids = tuple(tiles.ids[index] for index in kept["used"])
    return Tiles(ids, tiles.images[kept["used"]], kept["masks"], tiles.schema, weights=tuple(kept["weights"].tolist()))


def stored_audit(found: Audit, folder: Path) -> dict[str, Any]:
    """What was found, as files and, but for the nearest of every single image, as the result of a unit."""
    write_json(folder / "audit.json", found.report)
    with atomic_write(folder / AUDIT) as partial:
        found.sheet.save(partial)
    return {name: value for name, value in found.report.items() if name != "images"}


def segmentor_of(cell: Unit) -> Segmentor:
    """The segmentor of a finished cell."""
    with remade(cell):
        return Segmentor.from_pretrained(cell.folder / "segmentor").to(_DEVICE)


@contextmanager
def remade(unit: Unit) -> Iterator[None]:
    """Where a product of a unit is damaged, say how to have it made again."""
    try:
        yield
    except TerraSynthError as error:
        again = f"delete {unit.folder / 'unit.json'} and what is damaged, then run the same command: it is made again"
        raise TerraSynthError(error.problem, path=error.path, found=error.found, fix=again) from error
