"""Where the tiles of a scene lie, and which split each belongs to: by scene or by block of ground, never at random.

Tiles that touch show the same roofs and fields, so a split of random tiles would test memory. Here whole scenes, or
blocks of several tiles, go to one split, and no tile reaches over the border of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from rasterio.crs import CRS
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from terrasynth.data.raster import NO_TRANSFORM, Grid, crs_name
from terrasynth.errors import TerraSynthError
from terrasynth.io import digest, gdal_environment

__all__ = ["SPLITS", "Region", "apart", "assign", "regions", "tiles"]

#: Name of each split, as its folder is called.
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Region:
    """A part of a scene that goes to one split as a whole.

    Attributes:
        unit: regions of one unit show the same ground, so they go to the same split.
        scene: name of the scene.
        window: in pixels of the scene.
    """

    unit: str
    scene: str
    window: Window


def tiles(region: Window, size: int, stride: int, edges: Literal["shift", "drop"]) -> list[Window]:
    """The tiles of a region, row by row.

    They start every `stride` pixels. What is left at the right and lower edge, less than a tile, is dropped or covered
    by one more tile that is shifted back to end with the region.
    """
    return [
        Window(region.col_off + column, region.row_off + row, size, size)
        for row in _starts(int(region.height), size, stride, edges)
        for column in _starts(int(region.width), size, stride, edges)
    ]


def _starts(length: int, size: int, stride: int, edges: Literal["shift", "drop"]) -> list[int]:
    starts = list(range(0, length - size + 1, stride))
    if edges == "shift" and starts and starts[-1] + size < length:
        starts.append(length - size)
    return starts


def regions(scenes: Mapping[str, Grid], split: Literal["scene", "blocks"], block: int) -> list[Region]:
    """The parts of the scenes that are assigned to splits.

    By `scene`, each is one region; scenes that overlap on the ground are one unit. By `blocks`, each is cut into
    squares of `block` pixels, of which the last ones of a row and column are larger; in scenes with the same grid, as
    several dates of one place, blocks at the same position are one unit.

    Raises:
        TerraSynthError: blocks are wanted of scenes that overlap on different grids.
    """
    groups = _groups(scenes)
    if split == "scene":
        return [Region(groups[name], name, Window(0, 0, grid.width, grid.height)) for name, grid in scenes.items()]
    for name, grid in scenes.items():
        first = scenes[groups[name]]
        if groups[name] != name and not (grid.crs == first.crs and grid.coincides(first)):
            raise TerraSynthError(
                "the scenes overlap on the ground, and their pixels do not coincide",
                found=f"{name} and {groups[name]}",
                expected="scenes apart, or several on one grid",
                fix="use --split scene, which keeps them together; or warp them to one grid (`gdalwarp -te … -tr …`)",
            )
    return [
        Region(f"{groups[name]} {top} {left}", name, Window(left, top, right - left, bottom - top))
        for name, grid in scenes.items()
        for top, bottom in pairwise(_borders(grid.height, block))
        for left, right in pairwise(_borders(grid.width, block))
    ]


def _borders(length: int, block: int) -> list[int]:
    return [*(i * block for i in range(max(1, length // block))), length]


def _groups(scenes: Mapping[str, Grid]) -> dict[str, str]:
    """For each scene, the first of those that it overlaps on the ground, directly or by way of others; or itself.

    Boxes of scenes in other CRSs than the first's are brought to that one, where they become somewhat larger. Scenes
    without a place overlap nothing.
    """
    root = {name: name for name in scenes}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    order = {name: position for position, name in enumerate(scenes)}
    common = _common_crs(scenes.values())
    boxes = sorted((*_box(grid, common), name) for name, grid in scenes.items() if grid.transform is not None)
    near: list[tuple[float, float, float, float, str]] = []
    for west, south, east, north, name in boxes:  # from west to east: only neighbours are compared
        near = [box for box in near if box[2] > west]
        for _, its_south, _, its_north, its_name in near:
            comparable = (scenes[name].crs is None) == (scenes[its_name].crs is None)
            if comparable and min(north, its_north) > max(south, its_south):
                first, second = sorted((find(name), find(its_name)), key=order.__getitem__)
                root[second] = first
        near.append((west, south, east, north, name))
    return {name: find(name) for name in scenes}


def _common_crs(grids: Iterable[Grid]) -> CRS | None:
    return next((grid.crs for grid in grids if grid.crs is not None), None)


def apart(scenes: Mapping[Path, Grid]) -> list[TerraSynthError]:
    """What is wrong with the scenes whose CRS can not be brought to that of the first: nobody knows what they overlap.

    Args:
        scenes: their places by their files.
    """
    common, faults = _common_crs(scenes.values()), []
    for path, grid in scenes.items():
        if grid.transform is None:
            continue
        try:
            _box(grid, common)
        except NO_TRANSFORM:
            faults.append(
                TerraSynthError(
                    "the CRS of the scene can not be compared with that of the others",
                    path=path,
                    found=f"{crs_name(grid.crs)}, and {crs_name(common)} in the first scene",
                    expected="CRSs between which coordinates can be transformed, so that scenes that overlap are known",
                    fix="correct the CRS (`gdal_edit.py -a_srs EPSG:… FILE`), or prepare these scenes by themselves",
                )
            )
    return faults


def _box(grid: Grid, crs: CRS | None) -> tuple[float, float, float, float]:
    """West, south, east and north without half a pixel all round: neighbours that share a border do not overlap."""
    transform = grid.transform
    assert transform is not None
    west, south, east, north = grid.bounds()
    x, y = (abs(transform.a) + abs(transform.b)) / 2, (abs(transform.d) + abs(transform.e)) / 2
    box = west + x, south + y, east - x, north - y
    if grid.crs in (None, crs):
        return box
    with gdal_environment():
        west, south, east, north = transform_bounds(grid.crs, crs, *box)
    return west, south, east, north


def assign(weights: Mapping[str, int], fractions: Sequence[float], seed: int) -> dict[str, str]:
    """A split for every unit.

    In an order that derives from the seed and their names, the first units go to one split each; every further one goes
    to the split that lacks most tiles.

    Args:
        weights: tiles of each unit.
        fractions: share of the tiles for each of `SPLITS`; a split with 0 gets none.
        seed: of the order.

    Raises:
        TerraSynthError: there are fewer units than splits.
    """
    wanted = {split: fraction for split, fraction in zip(SPLITS, fractions, strict=True) if fraction}
    order = sorted(weights, key=lambda unit: digest(seed, unit))
    if len(order) < len(wanted):
        raise TerraSynthError(
            "there is too little to split",
            found=f"{len(order)} scene{'s' * (len(order) != 1)} (or groups of scenes that overlap) or blocks",
            expected=f"at least {len(wanted)}, one for each of {', '.join(wanted)}",
            fix="split by blocks (--split blocks, smaller ones with --block), or set shares to 0 (--fractions)",
        )
    total = sum(weights.values()) / sum(wanted.values())
    lacking = {split: fraction * total for split, fraction in wanted.items()}
    found = {}
    for number, unit in enumerate(order):
        split = list(wanted)[number] if number < len(wanted) else max(lacking, key=lacking.__getitem__)
        lacking[split] -= weights[unit]
        found[unit] = split
    return found
