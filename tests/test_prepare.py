"""Scenes to tiles, against rasterio's own reading of the scenes; and everything that can be wrong with the files."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.windows
import torch
import yaml
from affine import Affine
from PIL import Image
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.folder import check_splits, load_tiles
from terrasynth.data.prepare import PrepareSettings, prepare
from terrasynth.data.scenes import _key
from terrasynth.data.schema import LabelSchema
from terrasynth.data.sheet import contact_sheet
from terrasynth.errors import TerraSynthError
from terrasynth.recipe_io import load_recipe

SCHEMA = LabelSchema(("land", "road", "water"), ((60, 16, 152), (110, 193, 228), (226, 169, 41)), 255, ((0, 0, 0),))
SIZE, HEIGHT, WIDTH = 16, 40, 50
SPLITS = {"train": "train", "val": "validation", "test": "test"}


def place(number=0):
    return {"crs": "EPSG:32640", "transform": Affine(0.5, 0, 300_000 + 100 * number, 0, -0.5, 2_800_000)}


def noise(seed, count=3, dtype=np.uint8, high=256, height=HEIGHT, width=WIDTH):
    return np.random.default_rng(seed).integers(0, high, (count, height, width)).astype(dtype)


def areas(seed, height=HEIGHT, width=WIDTH):
    coarse = np.random.default_rng(seed).choice([0, 1, 2, 255], (-(-height // 5), -(-width // 5))).astype(np.uint8)
    coarse[0, :4] = 0, 1, 2, 255
    return np.kron(coarse, np.ones((5, 5), np.uint8))[:height, :width]


def tiff(path, bands, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = bands[None] if bands.ndim == 2 else bands
    shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", **shape, **options) as file:
            file.write(bands)
    return path


@pytest.fixture
def source(tmp_path):
    """Four georeferenced scenes with index masks."""
    folder = tmp_path / "src"
    for number in range(4):
        tiff(folder / "images" / f"s{number}.tif", noise(number), **place(number))
        tiff(folder / "masks" / f"s{number}.tif", areas(number), **place(number))
    SCHEMA.to_yaml(folder / "classes.yaml")
    return folder


def cut(source, out=None, **changes):
    settings = {"labels": "classes.yaml", "size": SIZE, **changes}
    return prepare(source, out or source.parent / "out", PrepareSettings(**settings))


def failure(source, **changes):
    out = source.parent / "out"
    with pytest.raises(TerraSynthError) as caught:
        cut(source, **changes)
    assert not out.exists(), "nothing is written before everything was read"
    return str(caught.value)


def rows(out):
    return [json.loads(line) for line in (out / "tiles.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_class_names_in_a_masks_tags_are_believed(source):
    """As `terrasynth predict` writes them: of other classes the values would be read without a word."""
    names, path = dict(enumerate(SCHEMA.names)), source / "masks" / "s1.tif"

    def tag(names):
        with rasterio.open(path, "r+") as file:
            file.update_tags(1, **{f"class_{value}": name for value, name in names.items()})

    tag(names)
    assert sum(cut(source).counts.values()) == 48
    shutil.rmtree(source.parent / "out")
    tag({0: names[2], 1: names[1], 2: names[0]})
    message = failure(source)
    assert "the names of the classes in the mask are not those of the label schema" in message
    assert str(path) in message
    assert f"in the file: 0 = {names[2]}" in message
    assert "--mask-coding index if the names are wrong" in message
    assert sum(cut(source, mask_coding="index").counts.values()) == 48


# --- what comes out --------------------------------------------------------------------------------------------------


def test_tiles_are_windows_of_the_scenes_with_their_place(source):
    out = cut(source).recipe.parent
    assert {split: sum(row["split"] == split for row in rows(out)) for split in SPLITS} == {
        "train": 24,
        "val": 12,
        "test": 12,
    }
    for row in rows(out):
        window = rasterio.windows.Window(row["column"], row["row"], SIZE, SIZE)
        for kind, band in (("images", None), ("masks", 1)):
            with rasterio.open(out / kind / row["split"] / f"{row['id']}.tif") as tile:
                with rasterio.open(source / kind / f"{row['scene']}.tif") as scene:
                    np.testing.assert_array_equal(tile.read(band), scene.read(band, window=window))
                    assert tile.crs == scene.crs
                    assert tile.transform == scene.window_transform(window)
                if kind == "masks":
                    assert tile.nodata == 255
                    assert [tile.colormap(1)[value][:3] for value in (0, 1, 2, 255)] == [*SCHEMA.colors, (0, 0, 0)]


def test_the_recipe_loads_what_was_written(source, tmp_path, monkeypatch):
    out = cut(source).recipe.parent
    monkeypatch.chdir(tmp_path)  # from wherever a study is started
    loaded = load_recipe(out / "recipe.yaml")
    splits = {}
    for name, split in SPLITS.items():
        splits[split] = load_tiles(loaded.recipe.data, split, base=loaded.base)
        of_split = {row["id"]: row for row in rows(out) if row["split"] == name}
        assert set(splits[split].ids) == set(of_split)
        for id_, image, mask, caption in zip(
            splits[split].ids, splits[split].images, splits[split].masks, splits[split].captions(), strict=True
        ):
            with rasterio.open(out / "images" / name / f"{id_}.tif") as file:
                np.testing.assert_array_equal(image.numpy(), file.read())
            assert caption == of_split[id_]["caption"]
            counts = {SCHEMA.names[k]: int((mask == k).sum()) for k in range(3) if (mask == k).any()}
            assert counts == of_split[id_]["pixels"]
    check_splits(**splits)
    assert splits["train"].schema == SCHEMA


def test_the_histogram_counts_every_pixel(source):
    made = cut(source, split="scene", stride=11)
    table = list(csv.DictReader((made.recipe.parent / "classes.csv").open()))
    for split in SPLITS:
        masks = [rasterio.open(p).read(1) for p in (made.recipe.parent / "masks" / split).iterdir()]
        for name, value in (*zip(SCHEMA.names, range(3), strict=True), ("(unlabelled)", 255)):
            (line,) = [line for line in table if (line["split"], line["class"]) == (split, name)]
            assert int(line["pixels"]) == sum((mask == value).sum() for mask in masks)
            assert int(line["tiles"]) == sum((mask == value).any() for mask in masks)
    assert [line.split()[0] for line in made.histogram.splitlines()[1:]] == [*SCHEMA.names, "(unlabelled)", "tiles"]
    with Image.open(made.recipe.parent / "sheet.png") as sheet:
        sheet.load()


def test_scenes_without_a_place_become_png(source):
    for number in range(4):
        for kind, band in (("images", None), ("masks", 1)):
            path = source / kind / f"s{number}.tif"
            values = rasterio.open(path).read(band)
            Image.fromarray(np.moveaxis(values, 0, -1) if band is None else values).save(path.with_suffix(".png"))
            path.unlink()
    out = cut(source).recipe.parent
    for row in rows(out):
        mask = Image.open(out / "masks" / row["split"] / f"{row['id']}.png")
        assert mask.getpalette()[:9] == list(np.ravel(SCHEMA.colors))
        rect = np.s_[row["row"] : row["row"] + SIZE, row["column"] : row["column"] + SIZE]
        np.testing.assert_array_equal(np.asarray(mask), areas(int(row["scene"][1]))[rect])


def test_masks_are_written_as_the_schema_stores_them(source):
    stored = LabelSchema(SCHEMA.names, SCHEMA.colors, 255, ((0, 0, 0),), (1, 2, 9), (0,))
    stored.to_yaml(source / "classes.yaml")
    for number in range(4):
        rgb = np.moveaxis(SCHEMA.to_color(areas(number)), -1, 0)
        tiff(source / "masks" / f"s{number}.tif", rgb, **place(number))
    out = cut(source).recipe.parent
    loaded = load_recipe(out / "recipe.yaml")
    tiles = load_tiles(loaded.recipe.data, "train", base=loaded.base)
    values = set()
    for id_, mask in zip(tiles.ids, tiles.masks, strict=True):
        with rasterio.open(out / "masks" / "train" / f"{id_}.tif") as file:
            np.testing.assert_array_equal(file.read(1), stored.to_index(mask.numpy()))
            assert file.nodata == 0
            values |= set(np.unique(file.read(1)).tolist())
    assert values == {0, 1, 2, 9}


def test_no_data_is_black_and_unlabelled_and_one_stretch_holds_for_all(source):
    for number in range(4):
        bands = noise(number, 4, np.uint16, 900) + 100 * (number + 1)
        bands[:, :5, :7] = 0
        tiff(source / "images" / f"s{number}.tif", bands, nodata=0, photometric="MINISBLACK", **place(number))
    made = cut(source, bands=(4, 2, 1), percentiles=(5, 95))
    scenes = [rasterio.open(source / "images" / f"s{number}.tif").read([4, 2, 1]) for number in range(4)]
    shown = np.concatenate([bands[:, (bands != 0).any(0)] for bands in scenes], axis=1)
    low, high = np.percentile(shown, (5, 95), axis=1)
    assert made.stretch == "--bands 4,2,1 --stretch " + ",".join(f"{v:.10g}" for v in np.ravel([low, high], order="F"))
    for row in rows(made.recipe.parent):
        window = rasterio.windows.Window(row["column"], row["row"], SIZE, SIZE)
        with rasterio.open(source / "images" / f"{row['scene']}.tif") as scene:
            values = scene.read([4, 2, 1], window=window).astype(np.float64)
        empty = (values == 0).all(0)
        exact = (values - low[:, None, None]) / (high - low)[:, None, None] * 255
        with rasterio.open(made.recipe.parent / "images" / row["split"] / f"{row['id']}.tif") as tile:
            assert np.abs(tile.read() - np.where(empty, 0, exact.clip(0, 255))).max() < 0.51
        with rasterio.open(made.recipe.parent / "masks" / row["split"] / f"{row['id']}.tif") as tile:
            assert (tile.read(1)[empty] == 255).all()
    again = cut(source, source.parent / "again", bands=(4, 2, 1), ranges=tuple(zip(low, high, strict=True)))
    images = {name: data for name, data in contents(made.recipe.parent).items() if name.startswith("images")}
    assert images == {name: data for name, data in contents(again.recipe.parent).items() if name.startswith("images")}


def test_near_infrared_that_the_file_calls_alpha_loses_no_ground(source, capsys, monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "")
    for number in range(4):
        bands = noise(number, 4)
        bands[3, :, :20] = 0  # water
        tiff(source / "images" / f"s{number}.tif", bands, **place(number))
    text = failure(source)
    assert text.startswith("4 of 4 scenes can not be used")
    assert all(part in text for part in ("near infrared", "--bands 1,2,3", "-colorinterp_4 undefined"))
    capsys.readouterr()
    out = cut(source, bands=(1, 2, 3)).recipe.parent
    assert "not for transparency: 4 scenes" in capsys.readouterr().err
    for row in rows(out):
        rect = np.s_[row["row"] : row["row"] + SIZE, row["column"] : row["column"] + SIZE]
        assert row["unlabelled"] == (areas(int(row["scene"][1]))[rect] == 255).sum()


def test_masks_and_alpha_bands_leave_pixels_unlabelled_and_the_share_is_said(source, capsys, monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "")
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[:, :40] = True  # four fifths
    for number in range(4):
        bands = np.concatenate([noise(number), np.where(inside, 255, 0)[None].astype(np.uint8)])
        tiff(source / "images" / f"s{number}.tif", bands if number < 3 else noise(3), **place(number))
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(source / "masks" / f"s{number}.tif", "r+") as f:
            f.write_mask(np.arange(HEIGHT)[:, None] + np.zeros(WIDTH) < 30)
    made = cut(source)
    assert "without data: 20.0% of s0, 20.0% of s1, 20.0% of s2\n" in capsys.readouterr().err
    for row in rows(made.recipe.parent):
        rect = np.s_[row["row"] : row["row"] + SIZE, row["column"] : row["column"] + SIZE]
        expected = np.where(inside | (row["scene"] == "s3"), areas(int(row["scene"][1])), 255)
        expected[30:] = 255
        with rasterio.open(made.recipe.parent / "masks" / row["split"] / f"{row['id']}.tif") as tile:
            np.testing.assert_array_equal(tile.read(1), expected[rect])


def test_polygons_in_one_file_for_all_scenes(source):
    import shapely
    from rasterio.warp import transform_geom

    box = shapely.box(300_004, 2_799_985, 300_021, 2_799_996)  # in the first scene
    geometry = transform_geom("EPSG:32640", "EPSG:4326", shapely.geometry.mapping(box))
    feature = {"type": "Feature", "properties": {"cover": "water"}, "geometry": geometry}
    (source / "cover.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    out = cut(source, masks="cover.geojson", class_attribute="cover", background="land").recipe.parent
    seen = {f"s{n}": np.full((HEIGHT, WIDTH), 99) for n in range(4)}
    for row in rows(out):
        with rasterio.open(out / "masks" / row["split"] / f"{row['id']}.tif") as tile:
            seen[row["scene"]][row["row"] : row["row"] + SIZE, row["column"] : row["column"] + SIZE] = tile.read(1)
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[8:30, 8:42] = 2
    np.testing.assert_array_equal(seen["s0"], expected)
    assert all((seen[f"s{n}"] == 0).all() for n in (1, 2, 3))


def test_wildcards_pair_images_with_masks(source):
    for number in range(4):
        folder = source / "area" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (source / "images" / f"s{number}.tif").rename(folder / f"top_{number}_RGB.tif")
        (source / "masks" / f"s{number}.tif").rename(folder / f"top_{number}_label.tif")
    out = cut(source, images="area/*/top_*_RGB.tif", masks="area/*/top_*_label.tif").recipe.parent
    assert {row["scene"] for row in rows(out)} == {"0-0", "1-1", "0-2", "1-3"}
    again = cut(source, source.parent / "b", images="**/*_RGB.tif", masks="**/*_label.tif").recipe.parent
    assert {row["scene"] for row in rows(again)} == {f"area-{n % 2}-top_{n}" for n in range(4)}


@pytest.mark.parametrize(
    ("pattern", "path", "key"),
    [
        ("images/*", "images/a.tif", ("a",)),
        ("images/*.tif", "images/a.tif", ("a",)),
        ("images/*.*", "images/a.b.tif", ("a.b",)),
        ("*_sat.*", "a_sat.jpg", ("a",)),
        ("*/*_?.ome.tif", "x/a_1.ome.tif", ("x", "a", "1")),
        ("**/*.tif", "x/y/a.tif", ("x-y", "a")),
        ("**/*.tif", "a.tif", ("", "a")),
        ("tile.*", "tile.5.tif", ("5",)),
        ("labels.gpkg", "labels.gpkg", ()),
        ("area[0-9]/*_[!m]*.tif", "area3/a_rgb.tif", ("3", "a", "r", "gb")),
    ],
)
def test_a_key_is_what_the_wildcards_stand_for(pattern, path, key):
    assert _key(Path(path), pattern) == key


def test_patterns_are_tidied_as_paths_are_and_odd_ones_explained(source):
    first = contents(cut(source).recipe.parent / "images")
    out = cut(source, source.parent / "b", images="./images//*", masks="masks/*/").recipe.parent
    assert contents(out / "images") == first
    with pytest.raises(TerraSynthError, match=r"not understood|no file fits"):
        cut(source, source.parent / "c", images="images**")


def test_blocks_of_one_scene_and_tiles_that_overlap(tmp_path):
    folder = tmp_path / "src"
    tiff(folder / "images" / "a.tif", noise(0, height=130, width=140), **place())
    tiff(folder / "masks" / "a.tif", areas(0, 130, 140), **place())
    SCHEMA.to_yaml(folder / "classes.yaml")
    with pytest.raises(TerraSynthError, match="--split blocks"):
        cut(folder)
    out = cut(folder, split="blocks", block=40, stride=10, fractions=(0.6, 0.2, 0.2)).recipe.parent
    seen = np.zeros((3, 130, 140), bool)
    for row in rows(out):
        rect = np.s_[row["row"] : row["row"] + SIZE, row["column"] : row["column"] + SIZE]
        seen[list(SPLITS).index(row["split"])][rect] = True
    assert (seen.sum(0) == 1).all()


def test_unlabelled_tiles_are_left_out_only_if_asked(source):
    for number in range(4):
        mask = areas(number)
        mask[:, :32] = 255
        tiff(source / "masks" / f"s{number}.tif", mask, **place(number))
    every, some = cut(source), cut(source, source.parent / "b", skip_unlabelled=True)
    assert sum(every.counts.values()) == 48
    kept = {row["id"] for row in rows(every.recipe.parent) if row["pixels"]}
    assert {row["id"] for row in rows(some.recipe.parent)} == kept
    assert len(kept) < 48


# --- stopped and started again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("renames", [0, 1, 2, 24, 98, 101])
def test_a_run_killed_at_any_rename_ends_as_one_that_was_not(source, killed, renames):
    cut(source, source.parent / "whole")
    (source.parent / "whole").rename(source.parent / "aside")
    died = killed(lambda: cut(source, source.parent / "whole"), Path, "replace", renames)
    # The marker, two files for each of 48 tiles, the rows, the histogram, the schema, the sheet, the recipe.
    assert died == (renames < 1 + 96 + 5)
    assert not (source.parent / "whole" / "recipe.yaml").exists()
    cut(source, source.parent / "whole")
    assert contents(source.parent / "whole") == contents(source.parent / "aside")


def test_a_tile_that_a_power_failure_left_in_part_is_written_again(source):
    out = cut(source).recipe.parent
    before = contents(out)
    images, masks = (sorted((out / kind / "train").iterdir()) for kind in ("images", "masks"))
    images[3].write_bytes(b"")
    masks[5].write_bytes(masks[5].read_bytes()[:100])
    cut(source)
    assert contents(out) == before


def test_other_settings_and_other_files_are_told_apart(source):
    cut(source)
    with pytest.raises(TerraSynthError, match=r"settings.seed: 0 -> 1"):
        cut(source, seed=1)
    size = (source / "images" / "s0.tif").stat().st_size
    tiff(source / "images" / "s0.tif", noise(9), **place())
    assert (source / "images" / "s0.tif").stat().st_size == size
    with pytest.raises(TerraSynthError, match=r"scenes.s0.contents"):
        cut(source)
    (source.parent / "mine").mkdir()
    (source.parent / "mine" / "thesis.doc").touch()
    with pytest.raises(TerraSynthError, match=r"not empty.*\n.*thesis.doc"):
        cut(source, source.parent / "mine")


SIDECARS = {
    "a validity mask": (lambda s: write_msk(s / "images" / "s0.tif"), r"image\.\.tif\.msk: \(not set\) -> "),
    "a validity mask of the mask": (lambda s: write_msk(s / "masks" / "s0.tif"), r"mask\.\.tif\.msk: \(not set\) -> "),
    "a nodata value in GDAL's notes": (
        lambda s: (s / "images" / "s0.tif.aux.xml").write_text(
            "<PAMDataset>"
            + "".join(f'<PAMRasterBand band="{n}"><NoDataValue>7</NoDataValue></PAMRasterBand>' for n in (1, 2, 3))
            + "</PAMDataset>"
        ),
        r"image\.nodata: None -> 7\.0",
    ),
    "a world file": (
        lambda s: [(s / kind / "s0.tfw").write_text("0.5\n0\n0\n0.5\n4\n5\n") for kind in ("images", "masks")],
        r"scenes\.s0\.transform: None -> \[0\.5, 0\.0, 3\.75, 0\.0, 0\.5, 4\.75\]",
    ),
}


def write_msk(path):
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as file:
        file.write_mask(np.eye(HEIGHT, WIDTH) > 0)


@pytest.mark.parametrize("sidecar", SIDECARS)
def test_files_beside_a_scene_that_change_it_are_noticed(source, sidecar):
    add, message = SIDECARS[sidecar]
    if sidecar == "a world file":  # is read for a TIFF without a place only
        for kind, bands in (("images", noise(0)), ("masks", areas(0))):
            tiff(source / kind / "s0.tif", bands)
    cut(source)
    (source / "images" / "s0.tif.ovr").touch()  # a neighbour that changes nothing
    (source / "images" / "s0.txt").touch()
    cut(source)
    add(source)
    with pytest.raises(TerraSynthError, match=message):
        cut(source)


def test_the_legend_of_the_sheet_has_unlabelled_ground_if_there_is_some():
    grey = (120, 121, 122)
    schema = LabelSchema(SCHEMA.names, SCHEMA.colors, 255, (grey,))
    images = {"image": torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)}
    for values, there in (((0, 1), False), ((0, 255), True)):
        masks = torch.tensor(values, dtype=torch.uint8)[:, None, None].expand(2, SIZE, SIZE)
        tiles, sheet = contact_sheet(images, masks, schema), contact_sheet(images, masks, schema, legend=True)
        legend = np.asarray(sheet)[tiles.height - 12 :]  # below the tiles and their margin
        assert (legend == grey).all(-1).any() == there
        assert (legend == schema.colors[2]).all(-1).any()  # a class that no tile has


def test_the_scenes_themselves_are_no_place_for_tiles(source):
    with pytest.raises(TerraSynthError, match="--out is SRC"):
        cut(source, source.parent / "other" / ".." / "src")


# --- what is wrong with the files ------------------------------------------------------------------------------------


def shifted(number, columns):
    return {"crs": "EPSG:32640", "transform": place(number)["transform"] * Affine.translation(columns, 0)}


def without_earth(source, number):
    """Put a scene and its mask in a CRS that says nothing about where on Earth it is."""
    local = 'LOCAL_CS["building site",UNIT["metre",1]]'
    for kind, bands in (("images", noise(number)), ("masks", areas(number))):
        tiff(source / kind / f"s{number}.tif", bands, **{**place(number), "crs": local})


BAD = {
    "s3.tif: the CRS of the scene can not be compared with that of the others (": lambda s: without_earth(s, 3),
    "s0.tif: image and mask have different CRSs (EPSG:32639, and EPSG:32640": lambda s: tiff(
        s / "masks" / "s0.tif", areas(0), **{**place(), "crs": "EPSG:32639"}
    ),
    "s0.tif: image and mask do not lie on the same pixels (upper left 300000.5, 2800000, and 300000, 2800000": (
        lambda s: tiff(s / "masks" / "s0.tif", areas(0), **shifted(0, 1))
    ),
    "masks/s0.tif: one of image and mask has a CRS, the other has none (no CRS, and EPSG:32640": lambda s: tiff(
        s / "masks" / "s0.tif", areas(0), transform=place()["transform"]
    ),
    "images/s0.tif: one of image and mask has a CRS, the other has none": lambda s: tiff(
        s / "images" / "s0.tif", noise(0)
    ),
    "s0.tif: the mask is not as large as its image (49 x 40, and 50 x 40": lambda s: tiff(
        s / "masks" / "s0.tif", areas(0)[:, :-1], **place()
    ),
    "s0.tif: the image has no mask (no mask for 's0')": lambda s: (s / "masks" / "s0.tif").unlink(),
    "s0.png: several files with one name (s0.png, s0.tif)": lambda s: Image.new("RGB", (50, 40)).save(
        s / "images" / "s0.png"
    ),
    "s0.tif: mask values that are no class (7 (2000 px))": lambda s: tiff(
        s / "masks" / "s0.tif", np.full((HEIGHT, WIDTH), 7, np.uint8), **place()
    ),
    "s0.tif: the TIFF can not be read": lambda s: (s / "images" / "s0.tif").write_bytes(
        (s / "images" / "s0.tif").read_bytes()[:3000]
    ),
    "s0.tif: the file is empty": lambda s: (s / "masks" / "s0.tif").write_bytes(b""),
    "s0.tif: values that are no numbers, outside nodata": lambda s: tiff(
        s / "images" / "s0.tif", np.where(noise(0) > 3, noise(0), np.nan).astype(np.float32), **place()
    ),
    "s0.tif: the scene is smaller than a tile (50 x 15)": lambda s: [
        tiff(s / "images" / "s0.tif", noise(0)[:, :15], **place()),
        tiff(s / "masks" / "s0.tif", areas(0)[:15], **place()),
    ],
    "s0.jpg: the mask is a JPEG": lambda s: (
        Image.fromarray(areas(0)).save(s / "masks" / "s0.jpg"),
        (s / "masks" / "s0.tif").unlink(),
    ),
    "s0.tif: the nodata value of the mask is a class as well (nodata 0": lambda s: tiff(
        s / "masks" / "s0.tif", areas(0), nodata=0, **place()
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_told_before_anything_is_written_or_skipped_and_listed(source, message):
    BAD[message](source)
    ranges = ((0.0, 255.0),) if "no numbers" in message else None
    assert message.split(" (")[0].partition(": ")[2] in failure(source, ranges=ranges)
    made = cut(source, skip_bad=True, ranges=ranges)
    bad = Path(message.partition(":")[0]).stem
    assert {row["scene"] for row in rows(made.recipe.parent)} == {"s0", "s1", "s2", "s3"} - {bad}
    assert message in (made.recipe.parent / "bad_files.txt").read_text()


def test_all_bad_files_are_in_one_message(source):
    for number in range(3):
        (source / "masks" / f"s{number}.tif").write_bytes(b"")
    text = failure(source)
    assert text.startswith("3 of 4 scenes can not be used")
    assert all(f"masks/s{number}.tif: the file is empty" in text for number in range(3))
    with pytest.raises(TerraSynthError, match="too little to split"):
        cut(source, skip_bad=True)


def test_scenes_that_are_all_in_one_local_crs_are_compared(source):
    for number in range(4):
        without_earth(source, number)
    assert sum(cut(source).counts.values()) == 48
    tiff(source / "masks" / "s0.tif", areas(0), **place(0))
    tiff(source / "images" / "s0.tif", noise(0), **place(0))
    with pytest.raises(TerraSynthError, match=r"3 of 4 scenes[\s\S]*'building site', and EPSG:32640 in the first"):
        cut(source, source.parent / "b")


def test_a_png_takes_the_place_of_its_partner_and_this_is_said(source, capsys, monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "")
    for number in range(4):
        (source / "masks" / f"s{number}.tif").unlink()
        Image.fromarray(areas(number)).save(source / "masks" / f"s{number}.png")
    out = cut(source).recipe.parent
    assert "taken to lie on its partner: 4 pairs" in capsys.readouterr().err
    with rasterio.open(next((out / "masks" / "val").iterdir())) as tile:
        assert tile.crs.to_epsg() == 32640


def test_masks_that_can_be_read_in_two_ways_are_told_by_their_option(source):
    for number in range(4):
        mask = areas(number)
        with rasterio.open(
            tiff(source / "masks" / f"s{number}.tif", mask, photometric="palette", **place(number)), "r+"
        ) as f:
            swapped = {0: SCHEMA.colors[1], 1: SCHEMA.colors[0], 2: SCHEMA.colors[2], 255: (0, 0, 0)}
            f.write_colormap(1, swapped)
    text = failure(source)
    assert "as class indices: 0 = land" in text
    assert "--mask-coding index, or --mask-coding color" in text
    assert cut(source, mask_coding="color")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "pictures/*"}, "no file fits --images"),
        ({"images": "/etc/*"}, "no file fits --images"),
        ({"masks": "masks/s0.tif"}, "one mask for several scenes"),
        ({"labels": "lovda"}, "did you mean `loveda`?"),
        ({"background": "sky"}, "--background is no class"),
        ({"ranges": ((1, 2),), "percentiles": (2, 98)}, "exclude each other"),
        ({"percentiles": (98, 2)}, "--percentiles are"),
        ({"ranges": ((2, 1),)}, "--stretch is"),
        ({"bands": (0, 1, 2)}, "--bands are"),
        ({"stride": 17}, "leaves gaps"),
        ({"block": 64}, "--split blocks"),
        ({"fractions": (0.5, 0.5, 0.5)}, "sum to 1"),
        ({"bands": (5, 1, 1)}, "band 5 of 3"),
    ],
)
def test_settings_that_do_not_fit_are_explained(source, changes, message):
    assert message in failure(source, **changes)


def test_the_command_prints_the_histogram_and_what_comes_next(source):
    out = source.parent / "my tiles"
    result = CliRunner().invoke(
        app, ["prepare", str(source), "--out", str(out), "--labels", "classes.yaml", "--size", "16"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["train", "val", "test"]
    assert result.stdout.splitlines()[-1] == f"Next: terrasynth study '{out}/recipe.yaml'"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["name"] == "my tiles"
    bad = CliRunner().invoke(
        app, ["prepare", str(source), "--out", str(out), "--labels", "classes.yaml", "--stretch", "1"]
    )
    assert (bad.exit_code, "LOW,HIGH" in bad.stderr) == (2, True)
