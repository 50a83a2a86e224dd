"""What `terrasynth prepare` wrote beside its tiles: which scene each is of, and what their pixels are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from affine import Affine
from rasterio.crs import CRS

from terrasynth.data.raster import Grid
from terrasynth.errors import TerraSynthError
from terrasynth.io import read_json
from terrasynth.recipe import DataConfig

__all__ = ["ground_groups", "imagery"]

#: Tiles along the side of a square of ground, as prepare's blocks have by default.
_BLOCK = 4


def ground_groups(config: DataConfig, ids: Sequence[str], image_size: int, least: int) -> list[str] | None:
    """For each training tile the ground that it is of: tiles that touch or overlap show the same roofs and fields.

    That is its scene, or where there are too few of them the square of four by four tiles of its scene. A tile that
    `tiles.jsonl` does not name is by itself.

    Args:
        config: where the tiles are.
        ids: of the training tiles.
        image_size: side of a tile, in pixels.
        least: how many groups are needed.

    Returns:
        A name for each tile; None where there is no `tiles.jsonl`.

    Raises:
        TerraSynthError: the file is damaged.
    """
    folder = _folder(config)
    path = None if folder is None else folder / "tiles.jsonl"
    if path is None or not path.is_file():
        return None
    try:
        rows = {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        block = _BLOCK * image_size
        scenes = {id_: f"scene {rows[id_]['scene']}" if id_ in rows else f"tile {id_}" for id_ in ids}
        if len(set(scenes.values())) >= least:
            return [scenes[id_] for id_ in ids]
        return [
            f"{scenes[id_]} {rows[id_]['row'] // block} {rows[id_]['column'] // block}" if id_ in rows else scenes[id_]
            for id_ in ids
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise TerraSynthError(
            "the list of tiles is damaged",
            path=path,
            found=f"{type(error).__name__}: {error}",
            expected="a line of JSON a tile, with id, scene, row and column",
            fix="run `terrasynth prepare` again, or delete the file: every tile then counts as a place of its own",
        ) from error


def imagery(config: DataConfig) -> dict[str, Any]:
    """What is known of the pixels of tiles, JSON-able.

    Returns:
        `gsd`: metres per pixel, of the procedural world, or of scenes in a metric CRS that agree to a percent. `bands`
        and `ranges`: how bands became RGB, null where they were left as they were. What is not known is left out.
    """
    if config.kind == "world":
        return {"gsd": config.world.gsd}
    folder = _folder(config)
    marker = None if folder is None else folder / ".terrasynth.json"
    if marker is None or not marker.is_file():
        return {}
    plan = read_json(marker)
    known: dict[str, Any] = dict(plan.get("stretch", {}))
    gsd = [_gsd(scene.get("crs"), scene.get("transform")) for scene in plan.get("scenes", {}).values()]
    metres = [side for side in gsd if side is not None]
    if metres and len(metres) == len(gsd) and max(metres) <= 1.01 * min(metres):
        size = plan["settings"]["size"]
        known["gsd"] = metres[0] * (size / config.image_size if config.fit == "resize" else 1)
    return known


def _folder(config: DataConfig) -> Path | None:
    if config.kind != "folder" or config.root is None:
        return None
    return config.root.expanduser() / (config.train.root or "")


def _gsd(crs: str | None, transform: Sequence[float] | None) -> float | None:
    """Metres per pixel; None if the CRS is not metric."""
    if crs is None or transform is None:
        return None
    gsd = Grid(1, 1, CRS.from_string(crs), Affine(*transform)).gsd
    return None if gsd is None else round(gsd, 6)
