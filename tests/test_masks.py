"""Masks by windows against `read_mask` of the whole file, in every coding."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.windows import Window

from terrasynth.data.masks import settle, survey
from terrasynth.data.raster import open_raster
from terrasynth.data.read import read_mask
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError

SCHEMA = LabelSchema(("land", "road", "water"), ((60, 16, 152), (110, 193, 228), (226, 169, 41)), 255, ((0, 0, 0),))
STORED = LabelSchema(SCHEMA.names, SCHEMA.colors, 255, ((0, 0, 0),), (1, 2, 9), (0,))
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _small_stripes(monkeypatch):
    monkeypatch.setattr("terrasynth.data.raster._STRIPE", 300)


def areas(height=40, width=50):
    """A mask of flat areas, with all classes and unlabelled pixels."""
    coarse = RANDOM.choice([0, 1, 2, 255], (height // 5, width // 5)).astype(np.uint8)
    coarse[0, :4] = 0, 1, 2, 255
    return np.kron(coarse, np.ones((5, 5), np.uint8))


def save(path, values, palette=None, **options):
    if path.suffix == ".png":
        image = Image.fromarray(values)
        if palette is not None:
            image.putpalette(palette.tobytes())
        image.save(path)
        return path
    bands = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
    if palette is not None:
        options["photometric"] = "palette"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", **{"blockysize": 4, **shape, **options}) as file:
            file.write(bands)
            if palette is not None:
                file.write_colormap(1, {value: tuple(color) for value, color in enumerate(palette.tolist())})
    return path


def settled(paths, schema=SCHEMA, coding="auto"):
    surveys = []
    for path in paths:
        with open_raster(path) as raster:
            surveys.append(survey(raster))
    return settle(surveys, schema, coding)


def windowed(path, lookup):
    with open_raster(path) as raster:
        whole = np.empty((raster.grid.height, raster.grid.width), np.uint8)
        for top in range(0, raster.grid.height, 7):
            for left in range(0, raster.grid.width, 11):
                window = Window(left, top, min(11, whole.shape[1] - left), min(7, whole.shape[0] - top))
                whole[window.toslices()] = lookup.read(raster, window)
    return whole


@pytest.mark.parametrize("suffix", [".tif", ".png"])
@pytest.mark.parametrize(
    ("encode", "coding"),
    [
        (lambda mask: (mask, None), "index"),
        (lambda mask: (np.dstack([mask] * 3), None), "index"),
        (lambda mask: (mask, SCHEMA.palette()), "index"),
        (lambda mask: (SCHEMA.to_color(mask), None), "color"),
        (lambda mask: (np.select([mask == 0, mask == 1, mask == 2], [2, 0, 1], 7).astype(np.uint8),
                       np.vstack([SCHEMA.palette()[[1, 2, 0]], np.zeros((253, 3), np.uint8)])), "color"),
        (lambda mask: (np.where(mask == 255, 0, np.array([85, 170, 255])[mask.clip(max=2)]).astype(np.uint8), None),
         "grey"),
    ],
    ids=["index", "index in three bands", "palette", "RGB", "palette in another order", "grey"],
)  # fmt: skip
def test_windows_read_as_the_whole_file_does(tmp_path, encode, coding, suffix):
    mask = areas()
    values, palette = encode(mask)
    path = save(tmp_path / f"a{suffix}", values, palette)
    found, lookups, faults = settled([path])
    assert (found, faults) == (coding, [])
    np.testing.assert_array_equal(read_mask(path, SCHEMA, "auto")[coding], mask)
    np.testing.assert_array_equal(windowed(path, lookups[path]), mask)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32])
def test_stored_values_of_any_integer_type(tmp_path, dtype):
    mask = areas()
    path = save(tmp_path / "a.tif", STORED.to_index(mask).astype(dtype))
    _, lookups, _ = settled([path], STORED)
    np.testing.assert_array_equal(windowed(path, lookups[path]), mask)


def test_a_window_of_one_grey_is_read_as_the_file_and_not_by_itself(tmp_path):
    schema = LabelSchema(("a", "b"), ((1, 1, 1), (200, 0, 0)), 255, ((0, 0, 0),))
    rgb = np.full((40, 50, 3), 1, np.uint8)
    rgb[35:] = 200, 0, 0
    path = save(tmp_path / "a.tif", rgb)
    coding, lookups, _ = settled([path], schema)
    assert coding == "color"  # as indices, [1, 1, 1] would be class b
    np.testing.assert_array_equal(windowed(path, lookups[path]), (np.arange(40) >= 35)[:, None] * np.ones(50))


def test_what_can_be_read_in_two_ways_shows_both(tmp_path):
    palette = SCHEMA.palette()
    palette[[0, 1]] = palette[[1, 0]]
    plain = save(tmp_path / "a.png", areas(), SCHEMA.palette())
    swapped = save(tmp_path / "b.png", areas(), palette)
    with pytest.raises(TerraSynthError) as caught:
        settled([plain, swapped])
    assert caught.value.path == swapped
    assert "as class indices: 0 = land, 1 = road" in caught.value.found
    assert "by their colours: 0 = road, 1 = land" in caught.value.found
    for coding in ("index", "color"):
        _, lookups, _ = settled([swapped], coding=coding)
        np.testing.assert_array_equal(windowed(swapped, lookups[swapped]), read_mask(swapped, SCHEMA, coding)[coding])


def test_pixels_without_meaning_are_counted_over_the_whole_file(tmp_path):
    mask = areas()
    mask[3:33, 20:25] = 77
    paths = [save(tmp_path / "a.tif", mask), save(tmp_path / "b.tif", areas())]
    coding, lookups, faults = settled(paths)
    assert (coding, list(lookups)) == ("index", [paths[1]])
    assert "77 (150 px)" in str(faults[0])
    rgb = SCHEMA.to_color(areas())
    rgb[10:20, 10:13] = 5, 6, 7
    _, _, faults = settled([save(tmp_path / "c.tif", rgb)])
    assert "#050607 (30 px" in str(faults[0])


def test_nodata_is_unlabelled_unless_it_is_a_class(tmp_path):
    mask = areas()
    as_nodata = save(tmp_path / "a.tif", np.where(mask == 255, 99, mask).astype(np.uint8), nodata=99)
    empty = save(tmp_path / "b.tif", np.full((9, 9), 99, np.uint8), nodata=99)
    black = save(tmp_path / "c.tif", SCHEMA.to_color(mask), nodata=0)
    for paths in ([as_nodata, empty], [black]):
        _, lookups, faults = settled(paths)
        assert faults == []
        np.testing.assert_array_equal(windowed(paths[0], lookups[paths[0]]), mask)
    _, lookups, _ = settled([empty])
    assert (windowed(empty, lookups[empty]) == 255).all()
    _, _, faults = settled([save(tmp_path / "d.tif", mask, nodata=0)])
    assert "nodata 0, which is land" in str(faults[0])
    assert "-unsetnodata" in str(faults[0])


@pytest.mark.parametrize("internal", [True, False], ids=["inside", "msk"])
@pytest.mark.parametrize("encode", [lambda mask: mask, SCHEMA.to_color], ids=["index", "RGB"])
def test_what_the_validity_mask_leaves_out_is_unlabelled_whatever_it_holds(tmp_path, internal, encode):
    mask, valid = areas(), np.kron(RANDOM.random((8, 10)) < 0.7, np.ones((5, 5), bool))
    mask[~valid & (mask != 255)] = 1
    hidden = encode(mask)
    hidden[3, 4], valid[3, 4] = 77, False  # no class at all
    path = save(tmp_path / "a.tif", hidden)
    empty = save(tmp_path / "b.tif", hidden)
    for file, there in ((path, valid), (empty, np.zeros_like(valid))):
        with warnings.catch_warnings(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
            warnings.simplefilter("ignore")
            with rasterio.open(file, "r+") as target:
                target.write_mask(there)
    assert (tmp_path / "a.tif.msk").exists() is not internal
    _, lookups, faults = settled([path, empty])
    assert faults == []
    np.testing.assert_array_equal(windowed(path, lookups[path]), np.where(valid, mask, 255))
    assert (windowed(empty, lookups[empty]) == 255).all()


def test_what_is_no_mask_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("terrasynth.data.masks._MOST", 500)
    many = save(tmp_path / "a.tif", RANDOM.integers(0, 256, (40, 50, 3)).astype(np.uint8))
    floats = save(tmp_path / "b.tif", areas().astype(np.float32))
    wide = save(tmp_path / "c.tif", np.dstack([areas()] * 5))
    # Rounded to whole numbers, as `gdal_translate -ot Byte` would, probabilities are no classes.
    shares = save(tmp_path / "d.tif", RANDOM.random((40, 50, 3)).astype(np.float32))
    for path, message in (
        (many, "JPEG"),
        (floats, "float32"),
        (floats, "if they are probabilities of one class, `gdal_calc.py"),
        (wide, "5 bands"),
        (shares, "store the number of the largest in each pixel"),
    ):
        with pytest.raises(TerraSynthError) as caught, open_raster(path) as raster:
            survey(raster)
        assert message in str(caught.value)
