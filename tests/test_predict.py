"""Class maps of whole scenes against the network on the whole scene, and files that GDAL's tools read."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.windows import Window
from torch import nn
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.raster import Stretch, open_raster
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import SegmentorConfig
from terrasynth.tasks import predict as module
from terrasynth.tasks.class_map import Made, open_rows
from terrasynth.tasks.predict import PredictSettings, blended, predict
from terrasynth.tasks.segmentation import Segmentor

SCHEMA = LabelSchema(("land", "road", "water"), ((60, 16, 152), (110, 193, 228), (226, 169, 41)), 255, ((0, 0, 0),))
CONFIG = SegmentorConfig.model_validate(
    {
        "encoder": "tu-resnet18",
        "options": {"encoder_depth": 2, "decoder_channels": [8, 8], "channels": [8, 8, 16, 16]},
        "train": {"steps": 1, "warmup_steps": 0},
    }
)
PLACE = {"crs": "EPSG:32640", "transform": Affine(0.5, 0, 300_000, 0, -0.5, 2_800_000)}
SETTINGS = PredictSettings(size=32, overlap=16, batch_size=3)


def tiff(path, bands, **options):
    shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", **shape, **options) as file:
            file.write(bands)
    return path


def noise(seed=0, count=3, height=70, width=101):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A segmentor of random weights, as `fit` leaves it."""
    segmentor = Segmentor.build(CONFIG, 3, class_names=SCHEMA.names)
    segmentor.schema = SCHEMA
    path = tmp_path_factory.mktemp("model") / "segmentor"
    segmentor.save_pretrained(path)
    return path


@pytest.fixture
def scene(tmp_path):
    return tiff(tmp_path / "scene.tif", noise(), **PLACE)


def small_network():
    """Fully convolutional; sees 3 pixels in every direction."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 5, padding=2))


def segmentor_of(network):
    return Segmentor(network, CONFIG, stride=1, num_classes=3, ignore_index=255, class_names=None).eval()


def shares(segmentor, path, settings=SETTINGS, top=0):
    with open_raster(path) as raster:
        parts = [(row, part.clone()) for row, part, _ in blended(segmentor, raster, Stretch(), settings, top=top)]
    return parts[0][0], torch.cat([part for _, part in parts], dim=1)


# --- what is predicted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(70, 101), (32, 33), (20, 90), (9, 11)])
def test_a_network_whose_context_fits_the_overlap_says_the_same_untiled(tmp_path, height, width):
    path = tiff(tmp_path / "a.tif", noise(height=height, width=width))
    segmentor = segmentor_of(small_network())
    with torch.inference_mode():
        whole = segmentor(torch.from_numpy(noise(height=height, width=width))[None].float() / 255)[0].softmax(0)
    row, tiled = shares(segmentor, path)
    assert row == 0
    torch.testing.assert_close(tiled, whole, atol=1e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 40), overlap=st.integers(0, 39),
    batch_size=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_each_pixel_comes_back_once_and_where_it_was(tmp_path, height, width, size, overlap, batch_size, seed):
    """A network that looks at one pixel alone, and a scene of colours by which it tells every class."""
    classes = np.random.default_rng(seed).integers(0, 3, (height, width))
    path = tiff(tmp_path / "a.tif", (np.eye(3, dtype=np.uint8)[classes] * 255).transpose(2, 0, 1))
    windows = PredictSettings(size=size, overlap=min(overlap, size - 1), batch_size=batch_size)
    row, tiled = shares(segmentor_of(nn.Identity()), path, windows)
    assert (row, tiled.shape) == (0, (3, height, width))
    np.testing.assert_array_equal(tiled.argmax(0).numpy(), classes)
    # Up to 33 x 33 windows count in a pixel.
    torch.testing.assert_close(tiled.sum(0), torch.ones(height, width), atol=5e-6, rtol=0)


def test_blended_probabilities_sum_to_one_where_the_context_does_not_fit(tmp_path, folder, scene):
    _, tiled = shares(Segmentor.from_pretrained(folder), scene)
    torch.testing.assert_close(tiled.sum(0), torch.ones(70, 101), atol=1e-5, rtol=0)
    _, alone = shares(Segmentor.from_pretrained(folder), scene, PredictSettings(size=32, overlap=16, batch_size=1))
    torch.testing.assert_close(tiled, alone, atol=1e-5, rtol=0)


def test_a_later_start_gives_the_same_rows_to_the_bit(folder, scene):
    segmentor = Segmentor.from_pretrained(folder)
    _, whole = shares(segmentor, scene)
    with open_raster(scene) as raster:
        starts = [row for row, _, _ in blended(segmentor, raster, Stretch(), SETTINGS)]
    assert len(starts) > 3
    for top in starts[1:]:
        row, rest = shares(segmentor, scene, top=top)
        assert row == top
        assert torch.equal(rest, whole[:, top:])


def test_the_map_has_the_place_the_colours_and_the_names(folder, scene, tmp_path):
    out = tmp_path / "maps" / "classes.tif"
    assert predict(folder, [scene], out, SETTINGS) == [out]
    _, expected = shares(Segmentor.from_pretrained(folder), scene)
    with rasterio.open(out) as file, rasterio.open(scene) as source:
        np.testing.assert_array_equal(file.read(1), expected.argmax(0).numpy())
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
        assert file.nodata == 255
        assert [file.colormap(1)[value][:3] for value in (0, 1, 2)] == list(SCHEMA.colors)
        assert {f"class_{k}": name for k, name in enumerate(SCHEMA.names)}.items() <= file.tags(1).items()
        assert file.descriptions == ("class",)
        assert file.tags()["source"] == "scene.tif"
    assert list(out.parent.iterdir()) == [out]


def test_the_map_is_a_valid_cloud_optimised_geotiff(folder, tmp_path):
    cogeo = pytest.importorskip("rio_cogeo.cogeo")
    scene = tiff(tmp_path / "large.tif", noise(height=600, width=700), **PLACE)
    predict(folder, [scene], tmp_path / "out.tif", PredictSettings(size=256, overlap=32))
    valid, errors, warned = cogeo.cog_validate(tmp_path / "out.tif", strict=True)
    assert (valid, errors, warned) == (True, [], [])
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.overviews(1) == [2]


def test_no_data_stays_without_class_and_is_not_computed(folder, tmp_path, monkeypatch):
    bands = noise(height=100, width=200)
    bands[:, :, 60:140] = 0
    scene = tiff(tmp_path / "a.tif", bands, nodata=0, **PLACE)
    seen, forward = [], Segmentor.forward
    monkeypatch.setattr(Segmentor, "forward", lambda self, images: (seen.append(len(images)), forward(self, images))[1])
    predict(folder, [scene], tmp_path / "out.tif", SETTINGS)
    with rasterio.open(tmp_path / "out.tif") as file:
        np.testing.assert_array_equal(file.read(1) == 255, (bands == 0).all(0))
    windows = len(list(range(0, 100 - 32 + 16, 16))) * len(list(range(0, 200 - 32 + 16, 16)))
    assert sum(seen) < 0.8 * windows


def test_values_are_those_that_the_schema_stores(folder, scene, tmp_path):
    stored = LabelSchema(SCHEMA.names, SCHEMA.colors, 255, ((0, 0, 0),), (1, 2, 9), (0,))
    predict(folder, [scene], tmp_path / "plain.tif", SETTINGS)
    predict(folder, [scene], tmp_path / "stored.tif", SETTINGS, schema=stored)
    with rasterio.open(tmp_path / "plain.tif") as plain, rasterio.open(tmp_path / "stored.tif") as file:
        np.testing.assert_array_equal(stored.from_index(file.read(1)), plain.read(1))
        assert (file.nodata, file.tags(1)["class_9"], file.colormap(1)[9][:3]) == (0, "water", SCHEMA.colors[2])
    other = LabelSchema(("land", "rail", "water"), SCHEMA.colors)
    with pytest.raises(TerraSynthError, match="not those that the segmentor was made for"):
        predict(folder, [scene], tmp_path / "other.tif", SETTINGS, schema=other)


def test_a_segmentor_saved_without_colours_maps_without_them(scene, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "")
    Segmentor.build(CONFIG, 3, class_names=SCHEMA.names).save_pretrained(tmp_path / "old")
    predict(tmp_path / "old", [scene], tmp_path / "out.tif", SETTINGS)
    assert "--labels" in capsys.readouterr().err
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.tags(1)["class_2"] == "water"
        assert file.nodata == 255


# --- stopped and started again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("syncs", [1, 2, 3, 5, 6, 7, 8])
def test_a_run_killed_after_any_stripe_ends_as_one_that_was_not(folder, scene, tmp_path, syncs):
    """Killed as what it began is written (1, 2), after a stripe (3 to 6), with the map written (7) and in place (8)."""
    predict(folder, [scene], tmp_path / "whole.tif", SETTINGS)
    out = tmp_path / "killed.tif"
    child = os.fork()
    if child == 0:
        fsync, count = os.fsync, 0

        def killing(descriptor):
            nonlocal count
            fsync(descriptor)
            count += 1
            if count == syncs:
                os.write(descriptor, b"half a row") if 3 < syncs < 7 else None
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = killing
        try:
            predict(folder, [scene], out, SETTINGS)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert out.exists() == (syncs == 8)
    (tmp_path / "other.incomplete-1.tif").touch()  # of another process, that writes beside this one
    predict(folder, [scene], out, SETTINGS)
    assert out.read_bytes() == (tmp_path / "whole.tif").read_bytes()
    (tmp_path / "other.incomplete-1.tif").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.tif", "scene.tif", "whole.tif"]


def test_a_file_is_known_by_its_name_and_size_and_while_it_is_worked_at_by_its_time(scene, tmp_path):
    def made(path, **settings):
        one = Made(settings, {"scene": path})
        return one.identity, open_rows(work, one).stat().st_size

    work = tmp_path / "work"
    work.mkdir()
    identity, _ = made(scene)
    (work / "rows.raw").write_bytes(b"rows")
    assert made(scene) == (identity, 4)
    assert made(tmp_path / "work" / ".." / scene.name) == (identity, 4)
    os.utime(scene, ns=(1, 1))
    assert made(scene) == (identity, 0)
    other = scene.rename(tmp_path / "other.tif")
    assert len({identity, made(other)[0], made(other, size=32)[0], made(tiff(other, noise(1, height=9)))[0]}) == 4


def test_rows_of_other_settings_are_thrown_away(folder, scene, tmp_path):
    work = tmp_path / "out.tif.unfinished"
    work.mkdir()
    (work / "run.json").write_text("{}")
    (work / "rows.raw").write_bytes(bytes(101 * 70))
    predict(folder, [scene], tmp_path / "out.tif", SETTINGS)
    predict(folder, [scene], tmp_path / "fresh.tif", SETTINGS)
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "fresh.tif").read_bytes()
    work.mkdir()
    (work / "thesis.doc").touch()
    (tmp_path / "out.tif").unlink()
    with pytest.raises(TerraSynthError, match="not a folder of this command"):
        predict(folder, [scene], tmp_path / "out.tif", SETTINGS)


@pytest.mark.parametrize("left", [("run.json", ".lock"), (".lock",), ()])
def test_what_a_run_left_that_was_killed_as_it_cleared_up_goes(folder, scene, tmp_path, left):
    out, work = tmp_path / "out.tif", tmp_path / "out.tif.unfinished"
    predict(folder, [scene], out, SETTINGS)
    finished = out.stat()
    work.mkdir()
    for name in left:
        (work / name).write_text("{}")
    predict(folder, [scene], out, SETTINGS)
    assert not work.exists()
    assert out.stat().st_mtime_ns == finished.st_mtime_ns


@pytest.mark.parametrize("syncs", [1, 4, 7])
def test_a_second_run_is_refused_while_the_first_lives_and_leaves_its_files(folder, scene, tmp_path, syncs):
    """The first waits as what it began is written (1), after a stripe (4), and with the map half in place (7)."""
    predict(folder, [scene], tmp_path / "whole.tif", SETTINGS)
    out = tmp_path / "both.tif"
    (waits, reached), (goes_on, go) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        fsync, count, code = os.fsync, 0, 1

        def waiting(descriptor):
            nonlocal count
            fsync(descriptor)
            count += 1
            if count == syncs:
                os.write(reached, b"!")
                os.read(goes_on, 1)

        os.fsync = waiting
        try:
            predict(folder, [scene], out, SETTINGS)
            code = 0
        finally:
            os._exit(code)
    try:
        assert os.read(waits, 1) == b"!"
        before = sorted(tmp_path.rglob("*"))
        if syncs != 4:
            assert any(f".incomplete-{child}" in path.name for path in before)
        with pytest.raises(TerraSynthError, match=r"both\.tif: another process is at it"):
            predict(folder, [scene], out, SETTINGS)
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        os.write(go, b"!")
        _, status = os.waitpid(child, 0)
        for descriptor in (waits, reached, goes_on, go):
            os.close(descriptor)
    assert status == 0
    assert out.read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.tif", "scene.tif", "whole.tif"]


def test_rows_that_somebody_else_wrote_into_become_no_map(folder, scene, tmp_path, monkeypatch):
    rows, out, fsync = tmp_path / "out.tif.unfinished" / "rows.raw", tmp_path / "out.tif", os.fsync

    def beside(descriptor):
        fsync(descriptor)
        if rows.exists():
            with rows.open("ab") as file:
                file.write(bytes(101))

    monkeypatch.setattr(os, "fsync", beside)
    with pytest.raises(TerraSynthError, match=r"rows\.raw: the finished rows .*\n.*\n.*7,070 bytes"):
        predict(folder, [scene], out, SETTINGS)
    assert not out.exists()


def test_a_full_disk_is_not_the_fault_of_the_scene(folder, tmp_path, monkeypatch):
    scene, out = tiff(tmp_path / "scene.tif", noise(height=300, width=301), **PLACE), tmp_path / "out.tif"
    windows = PredictSettings(size=128, overlap=16)
    predict(folder, [scene], tmp_path / "whole.tif", windows)

    def on_a_full_disk():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        # The rows take 90,300 bytes.
        resource.setrlimit(resource.RLIMIT_FSIZE, (68_000, limits[1]))
        try:
            with pytest.raises(TerraSynthError, match=r"no space to write|can not write the file") as caught:
                predict(folder, [scene], out, windows)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "scene.tif" not in str(caught.value)
        assert not out.exists()
        return caught.value.path

    assert on_a_full_disk() == str(out)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_map", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict(folder, [scene], out, windows)
    assert (tmp_path / "out.tif.unfinished" / "rows.raw").stat().st_size == 300 * 301
    assert on_a_full_disk() == str(tmp_path / "out.tif.unfinished" / "map.tif")
    predict(folder, [scene], out, windows)
    assert out.read_bytes() == (tmp_path / "whole.tif").read_bytes()


# --- which scenes, and what is refused -------------------------------------------------------------------------------


def test_several_scenes_and_folders_go_to_a_folder(folder, tmp_path):
    for name in ("a", "b", "c"):
        tiff(tmp_path / f"{name}.tif", noise(ord(name), height=33, width=40), **PLACE)
    (tmp_path / "more").mkdir()
    (tmp_path / "c.tif").rename(tmp_path / "more" / "c.tif")
    scenes = [tmp_path / "a.tif", tmp_path / "b.tif", tmp_path / "more"]
    out = tmp_path / "out"
    assert predict(folder, scenes, out, SETTINGS) == [out / "a.tif", out / "b.tif", out / "c.tif"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    predict(folder, scenes, out, SETTINGS)  # finished ones stay
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(TerraSynthError, match="can not go to one file"):
        predict(folder, scenes, tmp_path / "one.tif", SETTINGS)
    with pytest.raises(TerraSynthError, match="same name"):
        predict(folder, [tmp_path / "more", tmp_path / "more" / ".." / "more"], out, SETTINGS)


def test_nothing_is_overwritten(folder, scene, tmp_path):
    with pytest.raises(TerraSynthError, match="would replace the scene"):
        predict(folder, [scene], scene, SETTINGS)
    with pytest.raises(TerraSynthError, match="would replace the scene"):
        predict(folder, [scene], tmp_path, SETTINGS)
    with pytest.raises(TerraSynthError, match="would be one of the scenes of the next run"):
        predict(folder, [tmp_path], tmp_path / "classes.tif", SETTINGS)
    (tmp_path / "more").mkdir()
    tiff(tmp_path / "more" / "a.tif", noise())
    tiff(tmp_path / "more" / "b.png", noise())
    with pytest.raises(TerraSynthError, match="would be one of the scenes of the next run"):
        predict(folder, [scene, tmp_path / "more"], tmp_path / "more" / ".." / "more", SETTINGS)
    assert sorted(path.name for path in (tmp_path / "more").iterdir()) == ["a.tif", "b.png"]
    other = tiff(tmp_path / "other.tif", noise(5))
    with pytest.raises(TerraSynthError, match="was made of something else"):
        predict(folder, [scene], other, SETTINGS)
    predict(folder, [scene], tmp_path / "out.tif", SETTINGS)
    with pytest.raises(TerraSynthError, match="was made of something else"):
        predict(folder, [scene], tmp_path / "out.tif", PredictSettings(size=48, overlap=16))


def test_bad_scenes_are_told_together_before_anything_is_computed(folder, scene, tmp_path):
    deep = tiff(tmp_path / "deep.tif", noise().astype(np.uint16))
    five = tiff(tmp_path / "five.tif", noise(count=5))
    with pytest.raises(TerraSynthError) as caught:
        predict(folder, [scene, deep, five], tmp_path / "out", SETTINGS)
    assert "2 of 3 scenes" in str(caught.value)
    assert "--stretch" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_scene_too_wide_for_the_memory_is_told_from_its_header(folder, tmp_path):
    path, size = tmp_path / "wide.tif", 2_000_000
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "tiled": True, "SPARSE_OK": True, "compress": "deflate"}
    with rasterio.open(path, "w", width=size, height=512, **profile, **PLACE):
        pass
    with pytest.raises(TerraSynthError, match=r"too wide.*\n.*2000000 columns, 3 classes, windows of 512: 57.2 GiB"):
        predict(folder, [path], tmp_path / "out.tif", PredictSettings())


def test_no_numbers_in_a_float_scene_are_told_and_nodata_is_not(folder, tmp_path, monkeypatch):
    bands = noise().astype(np.float32)
    bands[:, 40, 50] = np.nan
    stretched = PredictSettings(size=32, overlap=16, stretch=Stretch(None, ((0.0, 255.0),)))
    a, c = tiff(tmp_path / "a.tif", bands, **PLACE), tiff(tmp_path / "c.tif", bands[:, ::-1], **PLACE)
    fine = tiff(tmp_path / "fine.tif", noise().astype(np.float32), **PLACE)
    # Before anything is computed, of all scenes.
    with monkeypatch.context() as patch:
        patch.setattr(Segmentor, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
        with pytest.raises(TerraSynthError) as caught:
            predict(folder, [fine, a, c], tmp_path / "out", stretched)
    assert "2 of 3 scenes can not be used" in str(caught.value)
    assert all(text in str(caught.value) for text in (str(a), "column 50, row 40", str(c), "column 50, row 29"))
    assert not (tmp_path / "out").exists()
    predict(folder, [tiff(tmp_path / "b.tif", bands, nodata=np.nan, **PLACE)], tmp_path / "b-out.tif", stretched)
    with rasterio.open(tmp_path / "b-out.tif") as file:
        assert np.argwhere(file.read(1) == 255).tolist() == [[40, 50]]


def test_sixteen_bits_are_stretched_as_asked(folder, tmp_path):
    eight = tiff(tmp_path / "eight.tif", noise(), **PLACE)
    deep = tiff(tmp_path / "deep.tif", noise().astype(np.uint16) * 10 + 100, **PLACE)
    predict(folder, [eight], tmp_path / "a.tif", SETTINGS)
    stretched = PredictSettings(size=32, overlap=16, batch_size=3, stretch=Stretch(None, ((100.0, 2650.0),)))
    predict(folder, [deep], tmp_path / "b.tif", stretched)
    with rasterio.open(tmp_path / "a.tif") as a, rasterio.open(tmp_path / "b.tif") as b:
        np.testing.assert_array_equal(a.read(1), b.read(1))


def test_windows_that_do_not_fit_are_refused_before_anything_is_read():
    with pytest.raises(TerraSynthError, match=r"larger than their overlap[^$]*windows of 32, overlap 32"):
        PredictSettings(size=32, overlap=32)
    with pytest.raises(TerraSynthError, match="larger than their overlap"):
        PredictSettings(size=32, overlap=-1)
    with pytest.raises(TerraSynthError, match="--batch-size"):
        PredictSettings(batch_size=0)


def test_scenes_and_outputs_are_checked_before_the_network_is_loaded(folder, scene, tmp_path, capsys, monkeypatch):
    out, deep = tmp_path / "out.tif", tiff(tmp_path / "deep.tif", noise().astype(np.uint16))
    predict(folder, [scene], out, SETTINGS)
    monkeypatch.setattr(Segmentor, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setenv("TERRASYNTH_QUIET", "")
    assert predict(folder, [scene], out, SETTINGS) == [out]
    assert capsys.readouterr().err == f"{out} is there already\n"
    with pytest.raises(TerraSynthError, match="was made of something else"):
        predict(folder, [scene], out, PredictSettings(size=48, overlap=16))
    with pytest.raises(TerraSynthError, match="--stretch"):
        predict(folder, [deep], tmp_path / "other.tif", SETTINGS)


def test_a_map_that_is_there_needs_none_of_the_libraries_of_networks(folder, scene, tmp_path):
    arguments = ["predict", str(folder), str(scene), "--out", str(tmp_path / "out.tif"), "--size", "32"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    script = (
        "import sys\nfrom terrasynth.cli import app\napp(sys.argv[1:], standalone_mode=False)\n"
        "print(*sorted({'diffusers', 'segmentation_models_pytorch', 'timm', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert run.stdout == f"{tmp_path / 'out.tif'}\n\n"


def test_the_stretch_is_that_of_the_training_and_not_of_these_scenes(folder, tmp_path):
    deep = tiff(tmp_path / "deep.tif", noise().astype(np.uint16))
    arguments = ["predict", str(folder), str(deep), "--out", str(tmp_path / "out.tif")]
    assert CliRunner().invoke(app, [*arguments, "--percentiles", "2,98"]).exit_code == 2
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--stretch LOW,HIGH; `terrasynth prepare --percentiles 2,98` finds and prints them" in result.stderr
    assert list(tmp_path.iterdir()) == [deep]


def test_the_command_writes_the_map_and_says_where(folder, scene, tmp_path):
    arguments = ["predict", str(folder), str(scene), "--out", str(tmp_path / "out.tif"), "--size", "32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out.tif'}\n"
    assert CliRunner().invoke(app, [*arguments, "--overlap", "32"]).exit_code == 2
    result = CliRunner().invoke(app, ["predict", str(tmp_path), str(scene), "--out", str(tmp_path / "x.tif")])
    assert (result.exit_code, "config.json" in result.stderr) == (2, True)


# --- from scenes to a map --------------------------------------------------------------------------------------------


def test_a_scene_is_prepared_learned_and_mapped_in_its_place(tmp_path, monkeypatch):
    """The whole way: a 16-bit scene with a colour mask in UTM, tiles, a short training, a map in UTM."""
    from terrasynth.data.folder import load_tiles
    from terrasynth.data.world import WORLD_SCHEMA, render
    from terrasynth.recipe_io import load_recipe
    from terrasynth.tasks.segmentation import fit

    monkeypatch.chdir(tmp_path)
    image, mask = render(3, size=192, gsd=1.0)
    for kind, bands in (
        ("images", np.moveaxis(image, -1, 0).astype(np.uint16) * 8 + 300),
        ("masks", np.moveaxis(WORLD_SCHEMA.to_color(mask), -1, 0)),
    ):
        (tmp_path / "area" / kind).mkdir(parents=True)
        tiff(tmp_path / "area" / kind / "a.tif", bands, **PLACE)
    WORLD_SCHEMA.to_yaml(tmp_path / "area" / "classes.yaml")
    options = ["--size", "32", "--split", "blocks", "--block", "64", "--stretch", "300,2340"]
    made = CliRunner().invoke(app, ["prepare", "area", "--out", "tiles", "--labels", "classes.yaml", *options])
    assert made.exit_code == 0, made.output

    loaded = load_recipe(tmp_path / "tiles" / "recipe.yaml")
    train, validation = (load_tiles(loaded.recipe.data, split, base=loaded.base) for split in ("train", "validation"))
    segmentor = Segmentor.build(CONFIG, WORLD_SCHEMA.num_classes)
    fit(segmentor, train, validation, CONFIG, tmp_path / "training", seed=0)
    segmentor.save_pretrained(tmp_path / "segmentor")

    options = ["--size", "64", "--stretch", "300,2340"]
    mapped = CliRunner().invoke(app, ["predict", "segmentor", "area/images", "--out", "maps", *options])
    assert mapped.exit_code == 0, mapped.output
    with rasterio.open(tmp_path / "maps" / "a.tif") as file:
        assert file.crs.to_epsg() == 32640
        assert file.transform == PLACE["transform"]
        assert file.tags(1)["class_5"] == "water"
        assert file.colormap(1)[5][:3] == WORLD_SCHEMA.colors[5]
        assert set(np.unique(file.read(1))) <= set(range(6))
        # A part is read by the place on the ground, as a GIS does.
        part = rasterio.windows.from_bounds(300_010, 2_799_950, 300_030, 2_799_970, file.transform)
        assert part == Window(20, 60, 40, 40)
        assert file.read(1, window=part).shape == (40, 40)
