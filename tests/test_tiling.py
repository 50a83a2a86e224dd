"""Tiles against a count of every pixel, and splits that never share one."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from terrasynth.data.raster import Grid
from terrasynth.data.tiling import SPLITS, assign, regions, tiles
from terrasynth.errors import TerraSynthError

UTM = CRS.from_epsg(32640)


def at(x, y=0.0, width=400, height=300, crs=UTM, pixel=0.5):
    return Grid(width, height, crs, Affine(pixel, 0, 300_000 + x, 0, -pixel, 2_800_000 + y))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 30), stride=st.integers(1, 30),
    edges=st.sampled_from(["shift", "drop"]),
)  # fmt: skip
def test_tiles_are_inside_and_miss_what_is_stated(width, height, size, stride, edges):
    stride = min(stride, size)
    seen = np.zeros((height, width), int)
    corners = []
    for tile in tiles(Window(7, 9, width, height), size, stride, edges):
        left, top = tile.col_off - 7, tile.row_off - 9
        assert 0 <= left <= width - size
        assert 0 <= top <= height - size
        seen[top : top + size, left : left + size] += 1
        corners.append((top, left))
    assert len(set(corners)) == len(corners)
    if min(width, height) < size:
        assert corners == []
    elif edges == "shift":
        assert (seen > 0).all()
    else:
        # All tiles are steps of the stride from the corner, and no further one would fit.
        assert {(top % stride, left % stride) for top, left in corners} == {(0, 0)}
        assert len(corners) == ((width - size) // stride + 1) * ((height - size) // stride + 1)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), split=st.sampled_from(["scene", "blocks"]), stride=st.integers(4, 10), seed=st.integers(0, 99))
def test_no_pixel_of_the_ground_is_in_two_splits(data, split, stride, seed):
    """Several dates of two places, overlapping tiles: every pixel is marked with the splits that see it."""
    places = [at(0, width=70, height=55), at(1000, width=64, height=90)]
    scenes = {f"{place}-{date}": places[place] for place in (0, 1) for date in range(data.draw(st.integers(1, 3)))}
    parts = regions(scenes, split, 20)
    cut = [(part, tiles(part.window, 10, stride, "shift")) for part in parts]
    weights = defaultdict(int)
    for part, windows in cut:
        weights[part.unit] += len(windows)
    fractions = (0.5, 0.25, 0.25) if split == "blocks" else (0.5, 0.5, 0.0)
    splits = assign(weights, fractions, seed)
    ground = {place: np.zeros((90, 70, 3), bool) for place in ("0", "1")}
    for part, windows in cut:
        for window in windows:
            rows, columns = window.toslices()
            ground[part.scene[0]][rows, columns, SPLITS.index(splits[part.unit])] = True
    assert all(seen.sum(-1).max() == 1 for seen in ground.values())
    assert len(set(splits.values())) == sum(fraction > 0 for fraction in fractions)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), block=st.integers(1, 100), size=st.integers(1, 12))
def test_blocks_and_the_tiles_in_them_give_each_pixel_back_once(width, height, block, size):
    """Every pixel has its own number; tiles side by side bring each back once, where less than a tile is left never."""
    scene = np.arange(width * height).reshape(height, width)
    blocks = [part.window for part in regions({"a": at(0, width=width, height=height)}, "blocks", block)]
    assert sorted(np.concatenate([scene[b.toslices()].ravel() for b in blocks])) == list(range(width * height))
    for one in blocks:
        assert one.width >= min(block, width)
        assert one.height >= min(block, height)
        inside = scene[one.toslices()]
        whole = inside[: inside.shape[0] // size * size, : inside.shape[1] // size * size]
        back = [scene[tile.toslices()].ravel() for tile in tiles(one, size, size, "drop")]
        assert sorted(np.concatenate([*back, []])) == sorted(whole.ravel())


def test_scenes_that_overlap_stay_together_and_neighbours_do_not():
    scenes = {
        "a": at(0),  # 200 m wide
        "b": at(200),  # shares a border with a
        "c": at(350),  # overlaps b
        "d": at(500, pixel=0.25),  # overlaps c
        "e": at(0, -150),  # below a
        "plain": Grid(400, 300),
        "other": Grid(400, 300),
    }
    units = {part.scene: part.unit for part in regions(scenes, "scene", 0)}
    assert units == {"a": "a", "b": "b", "c": "b", "d": "b", "e": "e", "plain": "plain", "other": "other"}


def turned(grid, x=1, y=1):
    """The same ground, stored from right to left (x = -1) or from south to north (y = -1)."""
    corner = Affine.translation(grid.width * (x < 0), grid.height * (y < 0))
    return Grid(grid.width, grid.height, grid.crs, grid.transform * corner * Affine.scale(x, y))


@pytest.mark.parametrize(("x", "y"), [(1, -1), (-1, 1), (-1, -1)], ids=["south-up", "mirrored", "both"])
@pytest.mark.parametrize("both", [True, False])
def test_scenes_overlap_however_their_rows_are_stored(x, y, both):
    other = [turned(at(moved), x, y) if both else at(moved) for moved in (150, 300)]
    scenes = {"a": turned(at(0), x, y), "b": other[0], "c": turned(at(0, -150), x, y), "d": turned(at(900), x, y)}
    units = {part.scene: part.unit for part in regions(scenes, "scene", 0)}
    assert units == {"a": "a", "b": "a", "c": "c", "d": "d"}  # 200 m wide, 150 m high: c lies below a
    same = {"a": turned(at(0), x, y), "b": turned(at(0), x, y) if both else at(0)}
    if both:
        blocks = regions(same, "blocks", 100)
        assert {part.unit for part in blocks if part.scene == "a"} == {
            part.unit for part in blocks if part.scene == "b"
        }
    else:
        with pytest.raises(TerraSynthError, match="pixels do not coincide"):
            regions(same, "blocks", 100)


def test_rotated_scenes_and_flat_pixels_overlap_by_their_boxes():
    centre = Affine.translation(300_100, 2_799_925)
    rotated = Grid(400, 300, UTM, centre * Affine.rotation(120) * Affine.scale(0.5) * Affine.translation(-200, -150))
    flat = Grid(4, 3, UTM, Affine(50, 0, 300_000, 0, -0.5, 2_799_900))  # pixels a hundred times as wide as high
    units = {part.scene: part.unit for part in regions({"a": at(0), "b": rotated, "c": flat}, "scene", 0)}
    assert units == {"a": "a", "b": "a", "c": "a"}


def test_scenes_in_two_crs_are_compared():
    west, south, east, north = transform_bounds(UTM, "EPSG:4326", *at(100).bounds())
    degrees = Grid(100, 100, CRS.from_epsg(4326), Affine((east - west) / 100, 0, west, 0, (south - north) / 100, north))
    units = {part.scene: part.unit for part in regions({"a": at(0), "b": degrees, "c": at(9000)}, "scene", 0)}
    assert units == {"a": "a", "b": "a", "c": "c"}


def test_blocks_of_scenes_that_overlap_on_other_pixels_are_refused():
    with pytest.raises(TerraSynthError, match="pixels do not coincide"):
        regions({"a": at(0), "b": at(50)}, "blocks", 100)


def test_shares_come_out_and_the_seed_decides():
    weights = {f"block {i}": 10 for i in range(200)}
    first = assign(weights, (0.7, 0.2, 0.1), 0)
    counts = {split: sum(value == split for value in first.values()) for split in SPLITS}
    assert counts == {"train": 140, "val": 40, "test": 20}
    assert assign(dict(reversed(weights.items())), (0.7, 0.2, 0.1), 0) == first
    assert assign(weights, (0.7, 0.2, 0.1), 1) != first
    with pytest.raises(TerraSynthError, match="too little to split"):
        assign({"a": 1, "b": 2}, (0.7, 0.2, 0.1), 0)
    assert set(assign({"a": 1, "b": 2}, (0.7, 0.3, 0), 0).values()) == {"train", "val"}
