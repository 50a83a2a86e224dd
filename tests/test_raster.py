"""Windows of rasters against rasterio's own reading of the whole, and what is refused from a header."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from terrasynth.data.raster import Grid, Stretch, open_raster, percentile_ranges
from terrasynth.errors import TerraSynthError

RANDOM = np.random.default_rng(0)
PLACE = {"crs": "EPSG:32640", "transform": Affine(0.5, 0, 300_000, 0, -0.5, 2_800_000)}


def tiff(path, bands, **options):
    bands = np.asarray(bands)
    shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", dtype=bands.dtype, **shape, **options) as file:
            file.write(bands)
    return path


def noise(count=3, height=70, width=90, dtype=np.uint8, high=256):
    return RANDOM.integers(0, high, (count, height, width)).astype(dtype)


def rgb(path, window=None, **stretch):
    with open_raster(path) as raster:
        return Stretch(**stretch).rgb(raster, window or Window(0, 0, raster.grid.width, raster.grid.height))


def refused(path, **stretch):
    with pytest.raises(TerraSynthError) as caught:
        rgb(path, **stretch)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_window_is_that_part_of_the_file(tmp_path, suffix):
    bands, path = noise(), tmp_path / f"a{suffix}"
    if suffix == ".tif":
        tiff(path, bands, tiled=True, blockxsize=16, blockysize=32)
    else:
        Image.fromarray(np.moveaxis(bands, 0, -1)).save(path)
    for window in (Window(0, 0, 90, 70), Window(17, 5, 30, 41), Window(89, 69, 1, 1)):
        pixels, valid = rgb(path, window)
        rows, columns = window.toslices()
        np.testing.assert_array_equal(pixels, np.moveaxis(bands[:, rows, columns], 0, -1))
        assert valid.all()


def test_the_header_says_what_rasterio_says(tmp_path):
    path = tiff(tmp_path / "a.tif", noise(4, dtype=np.uint16), nodata=7, **PLACE)
    with open_raster(path) as raster:
        assert (raster.count, raster.dtype, raster.nodata, raster.palette) == (4, np.uint16, 7, None)
        assert raster.grid == Grid(90, 70, rasterio.crs.CRS.from_epsg(32640), PLACE["transform"])
        assert raster.grid.bounds() == (300_000, 2_799_965, 300_045, 2_800_000)
        with rasterio.open(path) as source:
            assert raster.grid.bounds() == tuple(source.bounds)
            assert raster.grid.part(Window(3, 4, 5, 6)).transform == source.window_transform(Window(3, 4, 5, 6))


@pytest.mark.parametrize(
    "turned",
    [Affine.scale(1, -1), Affine.scale(-1, 1), Affine.scale(-1, -1), Affine.rotation(30), Affine.rotation(200)],
    ids=["south-up", "mirrored", "both", "rotated", "rotated over"],
)
def test_bounds_enclose_every_pixel_however_the_rows_run(turned):
    grid = Grid(90, 70, None, Affine.translation(300_000, 2_800_000) * turned * Affine.scale(0.5, -0.25))
    corners = np.array([grid.transform * (x, y) for x in range(91) for y in range(71)])
    np.testing.assert_allclose(grid.bounds(), [*corners.min(0), *corners.max(0)], rtol=0, atol=1e-6)


def test_stripes_cover_every_pixel_once(tmp_path, monkeypatch):
    monkeypatch.setattr("terrasynth.data.raster._STRIPE", 900)
    for options in ({"tiled": True, "blockxsize": 32, "blockysize": 16}, {"blockysize": 1}, {"blockysize": 70}):
        path = tiff(tmp_path / "a.tif", noise(1), compress="deflate", **options)
        seen = np.zeros((70, 90), int)
        with open_raster(path) as raster:
            for window in raster.stripes():
                seen[window.toslices()] += 1
                block = options["blockysize"] * options.get("blockxsize", 90)
                assert window.width * window.height <= max(900, block)
        assert (seen == 1).all()


def test_grids_coincide_up_to_a_hundredth_of_a_pixel():
    transform = PLACE["transform"]
    grid = Grid(90, 70, None, transform)
    assert grid.coincides(Grid(90, 70, None, transform * Affine.translation(0.009, 0)))
    assert not grid.coincides(Grid(90, 70, None, transform * Affine.translation(0, 0.02)))
    assert not grid.coincides(Grid(90, 70, None, transform * Affine.scale(1.001)))
    assert not grid.coincides(Grid(90, 71, None, transform))


# --- as it is shown --------------------------------------------------------------------------------------------------


def test_bands_are_chosen_or_there_are_one_or_three(tmp_path):
    five = tiff(tmp_path / "five.tif", five_bands := noise(5))
    np.testing.assert_array_equal(rgb(five, bands=(5, 1, 2))[0], np.moveaxis(five_bands[[4, 0, 1]], 0, -1))
    np.testing.assert_array_equal(rgb(five, bands=(4,))[0], np.dstack([five_bands[3]] * 3))
    grey = tiff(tmp_path / "grey.tif", grey_band := noise(1))
    np.testing.assert_array_equal(rgb(grey)[0], np.dstack([grey_band[0]] * 3))
    assert "--bands" in refused(five)
    assert "band 6 of 5" in refused(five, bands=(6, 1, 2))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64, np.int32])
def test_a_stretch_is_linear_and_clipped_in_every_type(tmp_path, dtype):
    bands = noise(3, dtype=dtype, high=120) * 10 if dtype != np.uint8 else noise(3)
    ranges = ((100.0, 900.0), (50.0, 1000.0), (0.0, 255.0))
    shown, _ = rgb(tiff(tmp_path / "a.tif", bands), ranges=ranges)
    for band, (low, high) in enumerate(ranges):
        exact = (bands[band].astype(np.float64) - low) / (high - low) * 255
        assert np.abs(shown[..., band] - exact.clip(0, 255)).max() <= 0.5 + 1e-4
    one, _ = rgb(tmp_path / "a.tif", ranges=((0.0, 500.0),))
    exact = np.moveaxis(bands, 0, -1).astype(np.float64) / 500 * 255
    assert np.abs(one - exact.clip(0, 255)).max() <= 0.5 + 1e-4


def test_a_palette_is_shown_in_its_colours(tmp_path):
    indices = noise(1, high=7)
    path = tiff(tmp_path / "a.tif", indices, photometric="palette")
    colors = RANDOM.integers(0, 256, (7, 3))
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {i: tuple(color) for i, color in enumerate(colors.tolist())})
    np.testing.assert_array_equal(rgb(path)[0], colors[indices[0]])


# --- where there is no data ------------------------------------------------------------------------------------------


def test_whole_numbers_have_no_data_where_all_shown_bands_say_so(tmp_path):
    bands = noise(4, high=3)
    shown, valid = rgb(tiff(tmp_path / "a.tif", bands, nodata=0), bands=(1, 2, 4))
    np.testing.assert_array_equal(valid, (bands[[0, 1, 3]] != 0).any(0))
    assert (shown[~valid] == 0).all()
    np.testing.assert_array_equal(shown, np.moveaxis(bands[[0, 1, 3]], 0, -1))


@pytest.mark.parametrize("nodata", [np.nan, -9999.0])
def test_floats_have_no_data_where_one_shown_band_says_so(tmp_path, nodata):
    bands = noise(3, dtype=np.float32)
    bands[RANDOM.random(bands.shape) < 0.1] = nodata
    shown, valid = rgb(tiff(tmp_path / "a.tif", bands, nodata=nodata), ranges=((0.0, 255.0),))
    holes = np.isnan(bands) if np.isnan(nodata) else bands == nodata
    np.testing.assert_array_equal(valid, ~holes.any(0))
    np.testing.assert_array_equal(shown, np.where(valid[..., None], np.moveaxis(bands, 0, -1), 0))


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_transparent_pixels_have_no_data(tmp_path, suffix):
    bands, path = noise(4), tmp_path / f"a{suffix}"
    bands[3] = RANDOM.choice([0, 255], bands[3].shape)
    if suffix == ".png":
        Image.fromarray(np.moveaxis(bands, 0, -1)).save(path)
    else:
        colors = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
        tiff(path, bands, photometric="RGB")
        with rasterio.open(path, "r+") as file:
            file.colorinterp = colors
    shown, valid = rgb(path)
    np.testing.assert_array_equal(valid, bands[3] != 0)
    if suffix == ".tif":  # a nodata value beside an alpha band: both are heard
        with rasterio.open(path, "r+") as file:
            file.nodata = bands[0, 0, 0]
        np.testing.assert_array_equal(rgb(path)[1], (bands[3] != 0) & (bands[:3] != bands[0, 0, 0]).any(0))
    np.testing.assert_array_equal(shown, np.where(valid[..., None], np.moveaxis(bands[:3], 0, -1), 0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("nodata", [None, -1.0])
def test_no_numbers_outside_nodata_make_a_bad_file(tmp_path, value, nodata):
    bands = noise(3, dtype=np.float32)
    bands[1, 30, 40] = value
    path = tiff(tmp_path / "a.tif", bands, nodata=nodata)
    assert "column 40, row 30" in refused(path, ranges=((0.0, 255.0),))
    assert rgb(path, bands=(1,), ranges=((0.0, 255.0),))[1].all()  # in a band that is not shown it does no harm


# --- one stretch for all ---------------------------------------------------------------------------------------------


def test_percentiles_are_those_of_all_scenes_together(tmp_path):
    first = RANDOM.normal(1000, 100, (3, 60, 50)).astype(np.float32)
    second = RANDOM.normal(3000, 300, (3, 20, 40)).astype(np.float32)
    second[:, 5:9] = np.nan
    paths = [tiff(tmp_path / "a.tif", first), tiff(tmp_path / "b.tif", second, nodata=np.nan)]
    joined = np.concatenate([first.reshape(3, -1), second[:, ~np.isnan(second).any(0)].reshape(3, -1)], axis=1)
    expected = np.percentile(joined.astype(np.float64), (2, 98), axis=1).T
    np.testing.assert_allclose(percentile_ranges(paths, None, (2, 98)), expected, rtol=1e-6)


def test_percentiles_of_large_scenes_come_from_every_kth_pixel(tmp_path, monkeypatch):
    monkeypatch.setattr("terrasynth.data.raster._SAMPLED", 2000)
    rows, columns = np.mgrid[:200, :300]
    ramp = (rows * 5 + columns * 2).astype(np.uint16)[None]
    path = tiff(tmp_path / "a.tif", ramp, blockysize=7)
    monkeypatch.setattr("terrasynth.data.raster._STRIPE", 4000)  # stripes of 13 rows
    ((low, high),) = percentile_ranges([path], None, (2, 98))
    np.testing.assert_allclose([low, high], np.percentile(ramp[0, ::6, ::6], (2, 98)))


def test_a_single_value_has_no_percentiles(tmp_path):
    path = tiff(tmp_path / "a.tif", np.full((3, 5, 5), 7, np.uint16))
    with pytest.raises(TerraSynthError, match="--stretch"):
        percentile_ranges([path], None, (2, 98))


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_fourth_band_that_may_be_a_colour_is_not_taken_for_transparency(tmp_path, suffix):
    """GDAL calls the fourth of four 8-bit bands alpha, unless told otherwise: near infrared is 0 over water."""
    bands, path = noise(4), tmp_path / f"a{suffix}"
    bands[3, 10:30] = 0
    if suffix == ".png":
        Image.fromarray(np.moveaxis(bands, 0, -1)).save(path)
    else:
        with rasterio.open(tiff(path, bands)) as file:
            assert file.colorinterp[3] is ColorInterp.alpha
    message = refused(path)
    assert "is band 4 transparency, or a colour" in message
    assert "--bands 1,2,3" in message
    assert ("-colorinterp_4 undefined" in message) == (suffix == ".tif")
    for chosen in ((1, 2, 3), (4, 1, 2)):
        pixels, valid = rgb(path, bands=chosen)
        assert valid.all()
        np.testing.assert_array_equal(pixels, np.moveaxis(bands[np.array(chosen) - 1], 0, -1))
    low, high = np.percentile(bands[:3].reshape(3, -1), (2, 98), axis=1)
    np.testing.assert_allclose(percentile_ranges([path], (1, 2, 3), (2, 98)), np.stack([low, high], 1))
    with pytest.raises(TerraSynthError, match="transparency"):
        percentile_ranges([path], None, (2, 98))
    if suffix == ".tif":  # what `gdal_edit.py -colorinterp_4 undefined` does
        with rasterio.open(path, "r+") as file:
            file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined]
        assert "which bands are red, green and blue?" in refused(path)
        assert rgb(path, bands=(1, 2, 3))[1].all()


def test_an_alpha_band_of_16_bits_may_end_at_either(tmp_path):
    bands = noise(4, dtype=np.uint16)
    for opaque in (255, 65535):
        bands[3] = RANDOM.choice([0, opaque], bands[3].shape)
        path = tiff(tmp_path / f"{opaque}.tif", bands, photometric="RGB", ALPHA="YES")
        np.testing.assert_array_equal(rgb(path, ranges=((0, 255),))[1], bands[3] != 0)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_more_than_8_bits_need_a_stated_range(tmp_path):
    message = refused(tiff(tmp_path / "a.tif", noise(dtype=np.uint16)))
    assert "--stretch LOW,HIGH" in message
    assert "--percentiles 2,98" in message


def test_complex_numbers_are_refused(tmp_path):
    assert "complex64" in refused(tiff(tmp_path / "a.tif", noise(dtype=np.complex64)), ranges=((0.0, 1.0),))


def test_vrt_remote_and_foreign_files_are_not_opened(tmp_path):
    tiff(tmp_path / "real.tif", noise())
    vrt = tmp_path / "a.tif"
    band = '<VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>real.tif</SourceFilename>'
    vrt.write_text(f'<VRTDataset rasterXSize="9" rasterYSize="9">{band}</SimpleSource></VRTRasterBand></VRTDataset>')
    assert "can not be read" in refused(vrt)
    for name in ("/vsicurl/http://127.0.0.1:9/a.tif", "zip://a.zip!a.tif", "http://127.0.0.1:9/a.tif"):
        with pytest.raises(TerraSynthError, match="no such file"), open_raster(name):
            pass


def test_a_truncated_file_is_named(tmp_path):
    path = tiff(tmp_path / "a.tif", noise(height=400, width=400), compress="deflate")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "can not be read" in refused(path)


def test_a_scene_with_ground_control_points_alone_is_refused(tmp_path):
    path = tiff(tmp_path / "a.tif", noise())
    with rasterio.open(path, "r+") as file:
        file.gcps = [rasterio.control.GroundControlPoint(0, 0, 50.0, 20.0)] * 3, "EPSG:4326"
    assert "gdalwarp" in refused(path)


def test_blocks_and_windows_beyond_the_budget_are_refused_from_the_header(tmp_path):
    options = {"driver": "GTiff", "count": 3, "dtype": "uint8", "SPARSE_OK": True, "compress": "deflate"}
    with rasterio.open(
        tmp_path / "one.tif",
        "w",
        width=40_000,
        height=40_000,
        tiled=True,
        blockxsize=30_000,
        blockysize=30_000,
        **options,
        **PLACE,
    ):
        pass
    assert "TILED=YES" in refused(tmp_path / "one.tif", window=Window(0, 0, 9, 9))
    with rasterio.open(tmp_path / "tiles.tif", "w", width=200_000, height=200_000, tiled=True, **options, **PLACE):
        pass
    assert "too large to decode in one piece" in refused(tmp_path / "tiles.tif")


def test_a_bomb_is_read_by_windows_in_little_memory(tmp_path):
    """120 GB of nothing in a file of some kilobytes: a pass over it must not hold more than a few stripes."""
    path, size = tmp_path / "sparse.tif", 347_000
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=size,
        height=size,
        count=1,
        dtype="uint8",
        SPARSE_OK=True,
        tiled=True,
        blockxsize=8192,
        blockysize=8192,
        compress="deflate",
        BIGTIFF="YES",
        **PLACE,
    ):
        pass  # fmt: skip
    assert path.stat().st_size < 100_000
    assert size**2 > 120e9
    program = (
        "import resource, sys, itertools; from terrasynth.data.raster import Stretch, open_raster\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with open_raster(sys.argv[1]) as raster:\n"
        "    for window in itertools.islice(raster.stripes(), 20): raster.read(window)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    environment = {**os.environ, "GDAL_CACHEMAX": "64"}
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, env=environment)
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 400 * 2**20


def test_the_mask_of_a_tiff_is_heard(tmp_path):
    path, bands = tmp_path / "a.tif", noise()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiff(path, bands)
        with rasterio.open(path, "r+") as file:
            file.write_mask(bands[0] > 100)
    np.testing.assert_array_equal(rgb(path)[1], bands[0] > 100)
