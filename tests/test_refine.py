"""Refined maps against the refiner on the whole raster, bands against distances, files as the maps they come from."""

from __future__ import annotations

import itertools
import math
import os
import signal
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from affine import Affine
from PIL import Image
from scipy import ndimage
from torch import nn
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.blending import cover
from terrasynth.data.raster import Stretch
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.packaged import packaged_or
from terrasynth.tasks import refine as module
from terrasynth.tasks.bands import Tolerance
from terrasynth.tasks.refine import Confidence, RefineSettings, load_refiner, refine

SCHEMA = LabelSchema(("land", "road", "water"), ((60, 16, 152), (110, 193, 228), (226, 169, 41)), 255, ((0, 0, 0),))
PLACE = {"crs": "EPSG:32640", "transform": Affine(0.5, 0, 300_000, 0, -0.5, 2_800_000)}
SETTINGS = RefineSettings(size=32, overlap=16, batch_size=3, band=Tolerance(4))
EVERYWHERE = RefineSettings(size=32, overlap=16, batch_size=3, band=None)


# --- refiners that can be computed by hand ---------------------------------------------------------------------------


@dataclass
class Blurred:
    """Which class a pixel looks most like, and which is most around it; sees two pixels in every direction."""

    identity: str = "blurred"
    num_classes: int | None = None
    schema: LabelSchema | None = None
    batches: list = field(default_factory=list)
    image_size: int = 32
    factor: int = 1

    def scores(self, images, rough, *, num_classes, seeds):
        assert images.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        assert rough.dtype == torch.int64
        self.batches.append((rough.clone(), list(seeds)))
        levels = torch.linspace(0.1234, 0.8765, num_classes).view(1, -1, 1, 1)
        likeness = -(images.mean(1, keepdim=True) - levels).abs()
        return likeness + self.around(rough, num_classes)

    def around(self, rough, num_classes):
        onehot = F.one_hot(rough.clamp(max=num_classes), num_classes + 1).movedim(-1, 1)[:, :num_classes]
        return 0.37 * F.avg_pool2d(onehot.float(), 5, stride=1, padding=2)


@dataclass
class Next(Blurred):
    """Every pixel is of the class after its own."""

    identity: str = "next"

    def scores(self, images, rough, *, num_classes, seeds):
        super().scores(images, rough, num_classes=num_classes, seeds=seeds)
        return F.one_hot((rough + 1) % num_classes, num_classes).movedim(-1, 1).float()


@dataclass
class Noise(Blurred):
    """What the seeds say, and the map."""

    identity: str = "noise"

    def scores(self, images, rough, *, num_classes, seeds):
        scores = super().scores(images, rough, num_classes=num_classes, seeds=seeds)
        noise = [torch.randn(scores.shape[1:], generator=torch.Generator().manual_seed(s % 2**31)) for s in seeds]
        return scores + 0.2 * torch.stack(noise)


# --- rasters ---------------------------------------------------------------------------------------------------------


def tiff(path, bands, palette=None, tags=None, mask=None, **options):
    bands = bands[None] if bands.ndim == 2 else bands
    shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
    if palette is not None:
        options["photometric"] = "palette"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(path, "w", driver="GTiff", **{"blockysize": 16, **shape, **options}) as file,
        ):
            file.write(bands)
            if palette is not None:
                file.write_colormap(1, {value: tuple(color) for value, color in enumerate(palette.tolist())})
            if tags:
                file.update_tags(1, **tags)
            if mask is not None:
                file.write_mask(mask)
    return path


def picture(height=70, width=101):
    noise = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    return ndimage.uniform_filter(noise, (1, 3, 3))


def areas(height=70, width=101, values=(0, 1, 2, 255), side=14):
    """Flat areas of the values, the last of which is unlabelled."""
    coarse = np.random.default_rng(1).choice(
        len(values), (-(-height // side), -(-width // side)), p=(0.4, 0.3, 0.2, 0.1)
    )
    coarse.flat[:4] = range(4)
    return np.kron(np.array(values)[coarse], np.ones((side, side), int))[:height, :width]


def read(path):
    with rasterio.open(path) as file:
        return file.read(1)


@pytest.fixture
def image(tmp_path):
    return tiff(tmp_path / "image.tif", picture(), **PLACE)


@pytest.fixture
def rough(tmp_path):
    tags = {f"class_{value}": name for value, name in enumerate(SCHEMA.names)}
    return tiff(tmp_path / "rough.tif", areas().astype(np.uint8), SCHEMA.palette(), tags, nodata=255, **PLACE)


def by_hand(refiner, bands, classes, band, num_classes=3, size=None):
    """The refined classes of a whole raster, in one window, by float64 distances."""
    height, width = classes.shape
    size = size or (height, width)
    pad = ((0, size[0] - height), (0, size[1] - width))
    images = torch.from_numpy(np.pad(bands, ((0, 0), *pad), mode="reflect"))[None].float() / 255
    whole = torch.from_numpy(np.pad(classes, pad, mode="reflect").astype(np.int64))[None]
    scores = refiner.scores(images, whole, num_classes=num_classes, seeds=[0])[0, :, :height, :width].numpy()
    may = classes != 255
    if band is not None:
        may &= distance_to_another(classes) <= band
    return np.where(may, scores.argmax(0), classes), may


def distance_to_another(classes):
    """From every labelled pixel to the nearest one of another class."""
    found = np.full(classes.shape, np.inf)
    for k in set(np.unique(classes).tolist()) - {255}:
        others = (classes != k) & (classes != 255)
        if others.any():
            found[classes == k] = ndimage.distance_transform_edt(~others)[classes == k]
    return found


# --- what changes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("band", [1, 3.5, 8, None])
@pytest.mark.parametrize(("height", "width"), [(70, 101), (32, 33), (20, 90), (50, 11), (15, 15)])
def test_windows_say_what_the_refiner_says_of_the_whole_raster(tmp_path, height, width, band):
    bands, classes = picture(height, width), areas(height, width, side=10 if height > 15 else 5)
    image = tiff(tmp_path / "image.tif", bands, **PLACE)
    rough = tiff(tmp_path / "rough.tif", classes.astype(np.uint8), nodata=255, **PLACE)
    settings = RefineSettings(size=32, overlap=16, batch_size=3, band=band and Tolerance(band))
    refine(image, rough, tmp_path / "out.tif", Blurred(), settings)
    expected, may = by_hand(Blurred(), bands, classes, band, size=(max(height, 32), max(width, 32)))
    found = read(tmp_path / "out.tif")
    np.testing.assert_array_equal(found, expected)
    assert (found != classes).any()
    assert (may & (found == classes)).any()


@pytest.mark.parametrize("columns", [1, 7, 101])
def test_however_many_columns_are_decided_at_a_time(tmp_path, image, rough, monkeypatch, columns):
    monkeypatch.setattr("terrasynth.tasks.stripes._COLUMNS", columns)
    refine(image, rough, tmp_path / "out.tif", Blurred(), SETTINGS)
    expected, _ = by_hand(Blurred(), picture(), areas(), 4)
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), expected)


@pytest.mark.parametrize("band", [1, 1.5, 2, 4, 9.9])
def test_the_band_reaches_as_far_as_asked_and_nothing_else_changes(tmp_path, image, band):
    # Windows begin at rows 0, 19 and 38, and the bands at row 34 end in the last, which does not see the boundary.
    classes = np.where(np.arange(70)[:, None] < 34, areas(side=25), 2)
    rough = tiff(tmp_path / "rough.tif", classes.astype(np.uint8), nodata=255, **PLACE)
    settings = RefineSettings(size=32, overlap=8, band=Tolerance(band))
    refine(image, rough, tmp_path / "out.tif", Next(), settings)
    near = distance_to_another(classes) <= band
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), np.where(near, (classes + 1) % 3, classes))


def test_a_band_in_metres_goes_by_the_size_of_the_pixels(tmp_path, image, rough):
    for name, band in (("pixels", Tolerance(8)), ("metres", Tolerance(4, "m"))):
        refine(image, rough, tmp_path / f"{name}.tif", Next(), RefineSettings(size=32, overlap=8, band=band))
    np.testing.assert_array_equal(read(tmp_path / "pixels.tif"), read(tmp_path / "metres.tif"))
    # Feet of the US survey, and pixels of 10 x 5 of them.
    feet = {"crs": "EPSG:2263", "transform": Affine(10, 0, 9e5, 0, -5, 2e5)}
    pixel = np.sqrt(10 * 5) * 1200 / 3937
    tiff(tmp_path / "rough.tif", areas().astype(np.uint8), nodata=255, **feet)
    tiff(tmp_path / "image.tif", picture(), **feet)
    band = Tolerance(2.5 * pixel, "m")
    refine(image, rough, tmp_path / "feet.tif", Next(), RefineSettings(size=32, overlap=8, band=band))
    changed = read(tmp_path / "feet.tif") != areas()
    np.testing.assert_array_equal(changed, distance_to_another(areas()) <= 2.5)


def test_windows_in_which_nothing_may_change_are_not_computed(tmp_path):
    classes = np.zeros((200, 300), np.uint8)
    classes[:, 150:] = 1
    image = tiff(tmp_path / "image.tif", picture(200, 300), **PLACE)
    rough = tiff(tmp_path / "rough.tif", classes, **PLACE)
    banded, everywhere = Next(), Next()
    refine(image, rough, tmp_path / "banded.tif", banded, SETTINGS)
    refine(image, rough, tmp_path / "everywhere.tif", everywhere, EVERYWHERE)
    windows = {name: sum(len(s) for _, s in r.batches) for name, r in (("b", banded), ("e", everywhere))}
    assert 0 < windows["b"] < 0.2 * windows["e"]
    np.testing.assert_array_equal(read(tmp_path / "everywhere.tif"), 1 - classes)
    changed = np.zeros(classes.shape, bool)
    changed[:, 146:154] = True
    np.testing.assert_array_equal(read(tmp_path / "banded.tif"), np.where(changed, 1 - classes, classes))


@pytest.mark.parametrize("kind", ["float", "byte"])
@pytest.mark.parametrize("band", [4, None])
def test_pixels_that_the_map_is_sure_of_stay(tmp_path, image, rough, kind, band):
    sure = ndimage.uniform_filter(np.random.default_rng(2).random((70, 101)), 9).astype(np.float32)
    sure[:40, :60] = 0.9  # a window and more
    if kind == "float":
        below, sure[50, 40:50], sure[60:, 50:] = 0.5, np.nan, -9999.0
        raster = tiff(tmp_path / "sure.tif", sure, nodata=-9999.0, **PLACE)
    else:
        below, sure = 128, (255 * sure).astype(np.uint8)
        raster = tiff(tmp_path / "sure.tif", sure)  # lies where the map lies
    settings = RefineSettings(size=32, overlap=16, band=band and Tolerance(band))
    refiner, everywhere = Next(), Next()
    refine(image, rough, tmp_path / "out.tif", refiner, settings, confidence=Confidence(raster, below))
    may = (areas() != 255) & ~(sure >= below) & (band is None or distance_to_another(areas()) <= band)
    assert 0.02 < may.mean() < 0.6
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), np.where(may, (areas() + 1) % 3, areas()))
    refine(image, rough, tmp_path / "all.tif", everywhere, settings)
    assert sum(len(s) for _, s in refiner.batches) < sum(len(s) for _, s in everywhere.batches)
    for other in (None, Confidence(raster, below + 1)):
        assert "made of something else" in refused(
            image, rough, tmp_path / "out.tif", settings=settings, confidence=other
        )


def test_a_confidence_of_other_pixels_is_refused(tmp_path, image, rough):
    moved = {**PLACE, "transform": PLACE["transform"] @ Affine.translation(1, 0)}
    sure = np.ones((70, 101), np.float32)
    for name, bands, place, text in (
        ("moved", sure, moved, "class map and confidence do not lie on the same pixels"),
        ("small", sure[1:], PLACE, "the confidence is not as large as its class map"),
        ("all", np.stack([sure] * 3), PLACE, "3 bands of float32"),
    ):
        raster = tiff(tmp_path / f"{name}.tif", bands, **place)
        assert text in refused(image, rough, tmp_path / "out.tif", confidence=Confidence(raster, 0.5))
    assert "would replace the confidence" in refused(image, rough, raster, confidence=Confidence(raster, 0.5))


def test_ground_without_data_in_the_image_stays(tmp_path, rough):
    bands = picture()
    bands[:, 20:40, 30:60] = 0
    image = tiff(tmp_path / "image.tif", bands, nodata=0, **PLACE)
    refine(image, rough, tmp_path / "out.tif", Next(), EVERYWHERE)
    stays = (bands == 0).all(0) | (areas() == 255)
    assert stays[20:40, 30:60].all()
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), np.where(stays, areas(), (areas() + 1) % 3))


def test_no_class_is_invented_and_of_equals_the_rough_one_stays(tmp_path, image):
    values = areas(values=(0, 2, 3, 255))
    rough = tiff(tmp_path / "rough.tif", values.astype(np.uint8), nodata=255, **PLACE)

    class One(Blurred):
        def scores(self, images, rough, *, num_classes, seeds):
            scores = torch.zeros(len(rough), num_classes, *rough.shape[1:])
            scores[:, 1] = 1  # a class that the map does not have
            return scores

    refine(image, rough, tmp_path / "out.tif", One("one", 4), EVERYWHERE)
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), values)


@dataclass
class ClassByClass(Noise):
    """Scores of the classes that a window has, as the seeds say, and nothing about others."""

    identity: str = "class by class"
    absent: float = math.nan

    def scores(self, images, rough, *, num_classes, seeds):
        scores = super().scores(images, rough, num_classes=num_classes, seeds=seeds)
        there = F.one_hot(rough.clamp(max=num_classes), num_classes + 1).flatten(1, 2).any(1)[:, :num_classes]
        return torch.where(there[..., None, None], 2 * scores, self.absent)  # above 0 where a class is likely


@pytest.mark.parametrize(("size", "overlap"), [(32, 16), (24, 17), (32, 4)])
def test_a_class_has_the_mean_of_the_windows_that_were_asked_about_it(tmp_path, size, overlap):
    bands, classes = picture(70, 101), areas(values=(0, 1, 2, 3))
    classes[:40, :30], classes[20:, 60:] = 3, classes[20:, 60:] % 2
    image = tiff(tmp_path / "image.tif", bands, **PLACE)
    rough = tiff(tmp_path / "rough.tif", classes.astype(np.uint8), **PLACE)
    settings = RefineSettings(size=size, overlap=overlap, batch_size=3, band=None)
    # Window by window, in float64.
    down, across = cover(70, size, overlap), cover(101, size, overlap)
    sums, weights = np.zeros((4, 70, 101)), np.zeros((4, 70, 101))
    for top, vertical in zip(down.starts, down.weights.astype(float), strict=True):
        for left, horizontal in zip(across.starts, across.weights.astype(float), strict=True):
            place = np.s_[top : top + size, left : left + size]
            shown = torch.from_numpy(bands[:, *place])[None].float() / 255
            seed = int(module.digest(0, top, left), 16) >> 1
            map_ = torch.from_numpy(classes[place])[None]
            found = ClassByClass().scores(shown, map_, num_classes=4, seeds=[seed])[0].numpy()
            weight = np.outer(vertical, horizontal)
            for k in np.unique(classes[place]):
                sums[k][place] += weight * found[k]
                weights[k][place] += weight
    with np.errstate(invalid="ignore"):
        means = np.where(weights > 0, sums / weights, -np.inf)
    refine(image, rough, tmp_path / "out.tif", ClassByClass(), settings)
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), means.argmax(0))
    # What a class loses if windows that were not asked count as 0.
    assert (sums.argmax(0) != means.argmax(0)).mean() > 0.01


def test_equals_stay_equal_where_windows_overlap(tmp_path, image, rough):
    class Ones(ClassByClass):
        def scores(self, *given, **options):
            scores = super().scores(*given, **options)
            return torch.where(scores.isnan(), scores, 0.7)

    for size, overlap in ((32, 16), (24, 17), (32, 4)):
        settings = RefineSettings(size=size, overlap=overlap, band=None)
        refine(image, rough, out := tmp_path / f"{size} {overlap}.tif", Ones(), settings)
        np.testing.assert_array_equal(read(out), areas())


def test_a_refiner_says_nothing_about_a_class_that_a_window_has_not(folder):
    images, rough = torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
    rough[0, 8:20, 4:16], rough[1, 16:], rough[1, :4] = 2, 3, 255
    refiner = load_refiner(folder, steps=1)
    found = refiner.scores(images, rough, num_classes=5, seeds=[0, 1])
    assert (~found.isnan()).flatten(2).all(2).tolist() == [
        [True, False, True, False, False],
        [True] + [False] * 2 + [True, False],
    ]
    plain = refiner.pipeline.scores(images, rough, seeds=[0, 1], num_steps=1, each_class=True, num_classes=5)
    assert torch.equal(found.nan_to_num(0), plain)


# --- the same whatever happens ---------------------------------------------------------------------------------------


def test_the_result_depends_on_seed_and_place_and_not_on_the_batches(tmp_path, image, rough):
    def run(name, **changed):
        refiner = Noise()
        settings = RefineSettings(**{"size": 32, "overlap": 16, "batch_size": 3, "band": Tolerance(4), **changed})
        return read(refine(image, rough, tmp_path / f"{name}.tif", refiner, settings)), refiner

    found, refiner = run("three")
    alone, by_one = run("one", batch_size=1)
    np.testing.assert_array_equal(found, alone)
    np.testing.assert_array_equal(found, run("many", batch_size=50)[0])
    assert (found != run("other", seed=1)[0]).any()
    seeds = [seed for _, batch in by_one.batches for seed in batch]
    assert len(set(seeds)) == len(seeds) > 20
    assert {len(batch) for _, batch in refiner.batches} <= {1, 2, 3}
    assert seeds == [seed for _, batch in refiner.batches for seed in batch]
    everywhere, _ = run("everywhere", band=None)
    near = distance_to_another(areas()) <= 4
    np.testing.assert_array_equal(found[near], everywhere[near])


@pytest.mark.parametrize("syncs", [1, 2, 3, 5, 6, 7, 8])
def test_a_run_killed_after_any_stripe_ends_as_one_that_was_not(image, rough, tmp_path, syncs):
    """Killed as what it began is written (1, 2), after a stripe (3 to 6), with the map written (7) and in place (8)."""
    refine(image, rough, tmp_path / "whole.tif", Noise(), SETTINGS)
    out = tmp_path / "killed.tif"
    child = os.fork()
    if child == 0:
        fsync, count = os.fsync, itertools.count(1)

        def killing(descriptor):
            fsync(descriptor)
            if next(count) == syncs:
                os.write(descriptor, b"half a row") if 3 < syncs < 7 else None
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = killing
        try:
            refine(image, rough, out, Noise(), SETTINGS)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert out.exists() == (syncs == 8)
    rest = Noise()
    refine(image, rough, out, rest, SETTINGS)
    assert out.read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.tif", "killed.tif", "rough.tif", "whole.tif"]
    if syncs == 6:  # the rows are all there
        assert len(rest.batches) == 0


def test_a_refiner_that_fails_leaves_its_rows_to_the_next_run(image, rough, tmp_path):
    class Failing(Noise):
        def scores(self, images, rough, **options):
            if len(self.batches) == 7:
                raise KeyboardInterrupt
            return super().scores(images, rough, **options)

    whole, rest = Noise(), Noise()
    refine(image, rough, tmp_path / "whole.tif", whole, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        refine(image, rough, tmp_path / "out.tif", Failing(), SETTINGS)
    kept = (tmp_path / "out.tif.unfinished" / "rows.raw").stat().st_size
    assert 0 < kept < 70 * 101
    assert kept % 101 == 0
    refine(image, rough, tmp_path / "out.tif", rest, SETTINGS)
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert 0 < len(rest.batches) < len(whole.batches)


def test_rows_of_another_map_or_refiner_are_thrown_away(image, rough, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out.tif"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_map", stop)
        with pytest.raises(KeyboardInterrupt):
            refine(image, rough, out, Next(), SETTINGS)
    monkeypatch.setenv("TERRASYNTH_QUIET", "")
    refine(image, rough, out, Blurred(), SETTINGS)
    assert "starting anew" in capsys.readouterr().err
    refine(image, rough, tmp_path / "fresh.tif", Blurred(), SETTINGS)
    assert out.read_bytes() == (tmp_path / "fresh.tif").read_bytes()


def test_a_finished_map_stays(image, rough, tmp_path, capsys, monkeypatch):
    out = refine(image, rough, tmp_path / "out.tif", Blurred(), SETTINGS)
    finished, again = out.stat(), Blurred()
    monkeypatch.setenv("TERRASYNTH_QUIET", "")
    refine(image, rough, out, again, SETTINGS)
    assert capsys.readouterr().err == f"{out} is there already\n"
    assert (out.stat().st_mtime_ns, again.batches) == (finished.st_mtime_ns, [])
    os.utime(rough, ns=(finished.st_mtime_ns + 10**9,) * 2)
    with pytest.raises(TerraSynthError, match="older than its class map"):
        refine(image, rough, out, again, SETTINGS)


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_refined_map_is_the_rough_one_in_everything_else(image, rough, tmp_path):
    refine(image, rough, tmp_path / "out.tif", Blurred(), SETTINGS)
    with rasterio.open(tmp_path / "out.tif") as file, rasterio.open(rough) as source:
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
        assert (file.dtypes, file.nodata, file.count) == (source.dtypes, source.nodata, 1)
        assert [file.colormap(1)[v][:3] for v in range(256)] == [source.colormap(1)[v][:3] for v in range(256)]
        assert {f"class_{k}": name for k, name in enumerate(SCHEMA.names)}.items() <= file.tags(1).items()
        assert (file.tags()["source"], file.tags()["image"], file.tags()["refiner"]) == (
            "rough.tif",
            "image.tif",
            "blurred",
        )
        np.testing.assert_array_equal(file.read(1) == 255, source.read(1) == 255)


def test_the_map_is_a_valid_cloud_optimised_geotiff(tmp_path):
    cogeo = pytest.importorskip("rio_cogeo.cogeo")
    image = tiff(tmp_path / "image.tif", picture(600, 700), **PLACE)
    rough = tiff(tmp_path / "rough.tif", areas(600, 700, side=100).astype(np.uint8), nodata=255, **PLACE)
    refine(image, rough, tmp_path / "out.tif", Blurred(), RefineSettings(size=256, overlap=32))
    assert cogeo.cog_validate(tmp_path / "out.tif", strict=True) == (True, [], [])
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.overviews(1) == [2]


CODES = (111, 112, -3, -9999)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float64])
def test_values_of_any_size_stay_what_they_are(image, tmp_path, dtype):
    rough = tiff(tmp_path / "rough.tif", areas(values=CODES).astype(dtype), nodata=-9999, **PLACE)
    if dtype == np.float64:
        with pytest.raises(TerraSynthError, match="the class map holds no class indices or colours"):
            refine(image, rough, tmp_path / "out.tif", Blurred(), SETTINGS)
        return
    refine(image, rough, tmp_path / "out.tif", Next(), EVERYWHERE)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert (file.dtypes, file.nodata) == ((np.dtype(dtype).name,), -9999)
        # In the order of the values.
        following = {-3: 111, 111: 112, 112: -3, -9999: -9999}
        np.testing.assert_array_equal(file.read(1), np.vectorize(following.get)(areas(values=CODES)))


def test_what_a_validity_mask_leaves_out_gets_a_nodata_value(image, tmp_path):
    classes, mask = areas(values=(0, 1, 255, 0)).astype(np.uint8), np.ones((70, 101), bool)
    mask[10:30, 40:80] = False
    rough = tiff(tmp_path / "rough.tif", classes, mask=mask, **PLACE)
    refine(image, rough, tmp_path / "out.tif", Next(), EVERYWHERE)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.nodata == 254
        expected = np.where(mask, np.array([1, 255, *[0] * 254])[classes], 254)
        np.testing.assert_array_equal(file.read(1), expected)


def test_a_nodata_value_that_no_pixel_can_have_is_none(image, tmp_path):
    rough = tiff(tmp_path / "rough.tif", areas(values=(0, 1, 2, 0)).astype(np.uint8), **PLACE)
    text = "<PAMDataset><PAMRasterBand band='1'><NoDataValue>-9999</NoDataValue></PAMRasterBand></PAMDataset>"
    (tmp_path / "rough.tif.aux.xml").write_text(text)
    refine(image, rough, tmp_path / "out.tif", Next(), EVERYWHERE)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.nodata is None
        np.testing.assert_array_equal(file.read(1), (read(rough) + 1) % 3)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("nodata", [None, 0])
def test_colours_come_back_as_a_palette(image, tmp_path, alpha, nodata):
    rgb = np.moveaxis(SCHEMA.to_color(areas()), -1, 0)
    bands = np.concatenate([rgb, np.full_like(rgb[:1], 255)]) if alpha else rgb
    nodata = None if alpha else nodata
    rough = tiff(tmp_path / "rough.tif", bands, photometric="RGB", nodata=nodata, **PLACE)
    refine(image, rough, tmp_path / "out.tif", Blurred(), RefineSettings(size=32, overlap=8, band=Tolerance(1)))
    with rasterio.open(tmp_path / "out.tif") as file:
        assert (file.nodata, file.dtypes) == (255, ("uint8",))
        colors = np.array([file.colormap(1)[value][:3] for value in range(256)], np.uint8)[file.read(1)]
        unlabelled = file.read(1) == 255
    classes = np.where(areas() == 255, 255 if nodata == 0 else 3, areas())
    np.testing.assert_array_equal(unlabelled, classes == 255)
    far = distance_to_another(classes) > 1
    np.testing.assert_array_equal(colors[far], SCHEMA.to_color(areas())[far])
    assert (colors[~far] != SCHEMA.to_color(areas())[~far]).any()
    assert {*map(tuple, np.unique(colors.reshape(-1, 3), axis=0).tolist())} <= {*SCHEMA.colors, (0, 0, 0)}


@pytest.mark.parametrize("coding", ["index", "palette", "grey", "rgb"])
def test_label_schemas_say_what_is_unlabelled_and_what_the_classes_are(image, tmp_path, coding):
    stored = LabelSchema(SCHEMA.names, SCHEMA.colors, 7, ((0, 0, 0),), (1, 2, 9), (0,))
    classes = areas()
    codes = stored.to_index(np.where(classes == 255, 7, classes))
    bands, palette = {
        "index": (codes, None),
        # As a program numbers colours that it finds.
        "palette": (np.array([2, 3, 0])[classes % 255].astype(np.uint8), None),
        "grey": (stored.grey_levels.numpy().astype(np.uint8)[(classes + 1) % 256], None),
        "rgb": (np.moveaxis(SCHEMA.to_color(classes), -1, 0), None),
    }[coding]
    if coding == "palette":
        bands[classes == 255] = 1
        palette = np.array([SCHEMA.colors[2], (0, 0, 0), SCHEMA.colors[0], SCHEMA.colors[1]], np.uint8)
    rough = tiff(tmp_path / "rough.tif", bands, palette, **PLACE)
    refine(image, rough, tmp_path / "out.tif", Blurred(), SETTINGS, schema=stored)
    expected, _ = by_hand(Blurred(), picture(), classes, 4)
    with rasterio.open(tmp_path / "out.tif") as file:
        values = file.read(1)
        if coding in ("index", "rgb"):
            np.testing.assert_array_equal(stored.from_index(values), np.where(expected == 255, 7, expected))
            assert file.colormap(1)[9][:3] == SCHEMA.colors[2]
            assert file.tags(1)["class_9"] == "water"
            assert file.nodata == (None if coding == "index" else 0)
        else:
            meanings = {k: bands[classes == k][0] for k in (0, 1, 2, 255)}
            np.testing.assert_array_equal(values, np.vectorize(meanings.get)(expected))
    # A refiner that was made for these classes.
    refine(image, rough, tmp_path / "three.tif", Blurred("three", 3, stored), SETTINGS)
    np.testing.assert_array_equal(read(tmp_path / "three.tif"), values)


@pytest.mark.parametrize("coding", ["index", "palette", "rgb"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_png_becomes_a_png_or_a_tiff(tmp_path, coding, suffix):
    classes = areas(values=(0, 1, 2, 1)).astype(np.uint8)
    Image.fromarray(np.moveaxis(picture(), 0, -1)).save(tmp_path / "image.png")
    drawn = Image.fromarray(SCHEMA.to_color(classes) if coding == "rgb" else classes)
    if coding == "palette":
        drawn.putpalette(SCHEMA.palette()[:3].tobytes())
    drawn.save(tmp_path / "rough.png")
    out = tmp_path / f"out{suffix}"
    assert refine(tmp_path / "image.png", tmp_path / "rough.png", out, Blurred(), SETTINGS) == out
    expected, _ = by_hand(Blurred(), picture(), classes, 4)
    if suffix == ".tif":
        with rasterio.open(out) as file:
            assert (file.crs, file.nodata) == (None, 255 if coding == "rgb" else None)
            np.testing.assert_array_equal(file.read(1), expected)
        return
    with Image.open(out) as file:
        assert file.mode == ("L" if coding == "index" else "P")
        if coding == "index":
            np.testing.assert_array_equal(np.asarray(file), expected)
        else:
            np.testing.assert_array_equal(np.asarray(file.convert("RGB")), SCHEMA.to_color(expected))
    finished, again = out.read_bytes(), Blurred()
    refine(tmp_path / "image.png", tmp_path / "rough.png", out, again, SETTINGS)
    assert (out.read_bytes(), again.batches) == (finished, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "out.png", "rough.png"]


def test_a_map_without_a_place_lies_on_its_image(image, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "")
    rough = tiff(tmp_path / "bare.tif", areas().astype(np.uint8), nodata=255)
    refine(image, rough, tmp_path / "out.tif", Blurred(), SETTINGS)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert (file.crs.to_epsg(), file.transform) == (32640, PLACE["transform"])
    said = capsys.readouterr().err
    assert f"{rough} does not say where it lies, and is taken to lie on {image}" in said
    assert "read as: value 0 34 %, value 1 34 %, value 2 19 %, unlabelled 12 %" in said


def test_sixteen_bits_are_stretched_as_asked(rough, image, tmp_path):
    deep = tiff(tmp_path / "deep.tif", picture().astype(np.uint16) * 10 + 100, **PLACE)
    with pytest.raises(TerraSynthError, match="--stretch"):
        refine(deep, rough, tmp_path / "deep-out.tif", Blurred(), SETTINGS)
    stretch = Stretch(None, ((100.0, 2650.0),))
    settings = RefineSettings(size=32, overlap=16, band=Tolerance(4), stretch=stretch)
    refine(deep, rough, tmp_path / "deep-out.tif", Blurred(), settings)
    refine(image, rough, tmp_path / "out.tif", Blurred(), SETTINGS)
    np.testing.assert_array_equal(read(tmp_path / "deep-out.tif"), read(tmp_path / "out.tif"))


def test_no_numbers_in_a_float_image_are_told_before_anything_is_computed(rough, tmp_path):
    bands = picture().astype(np.float32)
    bands[1, 68, 97] = np.nan  # in the last windows
    settings = RefineSettings(size=32, overlap=16, band=Tolerance(4), stretch=Stretch(None, ((0.0, 255.0),)))
    image = tiff(tmp_path / "float.tif", bands, **PLACE)
    message = refused(image, rough, tmp_path / "out.tif", settings=settings)
    assert f"{image}: values that are no numbers, outside nodata" in message
    assert "column 97, row 68" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float.tif", "rough.tif"]
    # Where no window looks, it does no harm; and as nodata neither.
    classes = np.where(np.arange(70)[:, None] < 10, areas(), 0).astype(np.uint8)
    above = tiff(tmp_path / "above.tif", classes, nodata=255, **PLACE)
    refine(image, above, tmp_path / "above-out.tif", Next(), settings)
    near = (classes != 255) & (distance_to_another(classes) <= 4)
    np.testing.assert_array_equal(read(tmp_path / "above-out.tif"), np.where(near, (classes + 1) % 3, classes))
    told = tiff(tmp_path / "told.tif", bands, nodata=np.nan, **PLACE)
    refine(told, rough, tmp_path / "out.tif", Next(), settings)
    near = (areas() != 255) & (distance_to_another(areas()) <= 4)
    near[68, 97] = False
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), np.where(near, (areas() + 1) % 3, areas()))


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(*arguments, refiner=None, settings=SETTINGS, **options):
    refiner = refiner or Blurred()
    with pytest.raises(TerraSynthError) as caught:
        refine(*arguments, refiner, settings, **options)
    assert not refiner.batches
    return str(caught.value)


def test_nothing_is_overwritten(image, rough, tmp_path):
    assert "the output would replace the image" in refused(image, rough, image)
    (tmp_path / "more").mkdir()
    assert "the output would replace the class map" in refused(image, rough, tmp_path / "more" / ".." / "rough.tif")
    other = tiff(tmp_path / "other.tif", areas().astype(np.uint8))
    assert "was made of something else" in refused(image, rough, other)
    out = refine(image, rough, tmp_path / "out.tif", Blurred(), SETTINGS)
    assert "was made of something else" in refused(image, rough, out, settings=EVERYWHERE)
    assert "was made of something else" in refused(image, rough, out, refiner=Blurred("other"))
    assert "a TIFF, or a PNG if the class map is one" in refused(image, rough, tmp_path / "out.png")
    Image.fromarray(areas().astype(np.uint8)).save(tmp_path / "rough.png")
    for suffix in (".jpg", ".jp2", ""):
        assert "ends in .tif or .tiff or .png" in refused(image, tmp_path / "rough.png", tmp_path / f"out{suffix}")
    for content in (b"", b"no image"):
        (tmp_path / "there.png").write_bytes(content)
        assert "was made of something else" in refused(image, tmp_path / "rough.png", tmp_path / "there.png")
    Image.new("L", (9, 9)).save(tmp_path / "there.png")
    assert "was made of something else" in refused(image, tmp_path / "rough.png", tmp_path / "there.png")


def test_a_second_run_is_refused_while_the_first_lives(image, rough, tmp_path):
    out, second = tmp_path / "out.tif", []

    class Meanwhile(Blurred):
        def scores(self, images, rough_windows, **options):
            if not second:
                second.append(refused(image, rough, out))
            return super().scores(images, rough_windows, **options)

    refine(image, rough, out, Meanwhile(), SETTINGS)
    assert "out.tif: another process is at it" in second[0]
    assert not (tmp_path / "out.tif.unfinished").exists()


def test_maps_that_differ_in_their_suffix_alone_do_not_meet(tmp_path):
    Image.fromarray(np.moveaxis(picture(), 0, -1)).save(tmp_path / "image.png")
    classes = areas(values=(0, 1, 2, 1)).astype(np.uint8)
    Image.fromarray(classes).save(tmp_path / "rough.png")
    files, begun = (tmp_path / "image.png", tmp_path / "rough.png"), []

    class Meanwhile(Next):
        def scores(self, images, rough, **options):
            if not begun:
                begun.append(tmp_path / "out.incomplete-1.tif")  # of the first, as if it were writing its file
                begun[0].touch()
                refine(*files, tmp_path / "out.png", Blurred(), SETTINGS)
                assert begun[0].exists()
            return super().scores(images, rough, **options)

    refine(*files, tmp_path / "out.tif", Meanwhile(), EVERYWHERE)
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), (classes + 1) % 3)
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "out.png")), by_hand(Blurred(), picture(), classes, 4)[0]
    )
    assert not list(tmp_path.glob("*.unfinished"))


def test_another_place_is_told_with_the_command_that_mends_it(image, rough, tmp_path):
    out, classes = tmp_path / "out.tif", areas().astype(np.uint8)
    command = "gdalwarp -t_srs EPSG:32640 -te 300000 2799965 300050.5 2800000 -ts 101 70 -r near"
    small = tiff(tmp_path / "small.tif", classes[:-1], **PLACE)
    message = refused(image, small, out)
    assert "the class map is not as large as its image" in message
    assert "101 x 69, and 101 x 70" in message
    assert f"`{command} {small} OUT`" in message
    moved = tiff(
        tmp_path / "moved.tif", classes, **{**PLACE, "transform": PLACE["transform"] @ Affine.translation(1, 0)}
    )
    message = refused(image, moved, out)
    assert "do not lie on the same pixels" in message
    assert "upper left 300000.5, 2800000, and 300000, 2800000" in message
    assert command in message
    zone = tiff(tmp_path / "zone.tif", classes, **{**PLACE, "crs": "EPSG:32639"})
    message = refused(image, zone, out)
    assert "image and class map have different CRSs" in message
    assert f"EPSG:32639, and EPSG:32640 in {image}" in message
    assert command in message
    bare = tiff(tmp_path / "bare.tif", classes[:-1])
    assert "gdalwarp" not in refused(image, bare, out)


def test_maps_that_are_none_are_refused(image, tmp_path):
    out = tmp_path / "out.tif"
    Image.fromarray(areas().astype(np.uint8)).save(tmp_path / "a.jpg")
    assert "is a JPEG" in refused(image, tmp_path / "a.jpg", out)
    values = np.arange(70 * 101, dtype=np.int32).reshape(70, 101)
    assert "too many different values" in refused(image, tiff(tmp_path / "a.tif", values, **PLACE), out)
    message = refused(image, tiff(tmp_path / "b.tif", picture(), **PLACE), out)
    assert "too many different colours" in message
    assert "--labels" in message
    empty = tiff(tmp_path / "c.tif", np.full((70, 101), 3, np.uint8), nodata=3, **PLACE)
    assert "no labelled pixel" in refused(image, empty, out)
    transparent = np.concatenate([picture() // 200, np.full((1, 70, 101), 9, np.uint8)])
    assert "no opaque alpha band" in refused(image, tiff(tmp_path / "d.tif", transparent, **PLACE), out)
    assert "no such file" in refused(image, tmp_path / "e.tif", out)
    strange = tiff(tmp_path / "f.tif", areas(values=(0, 1, 8, 255)).astype(np.uint8), **PLACE)
    assert "mask values that are no class" in refused(image, strange, out, schema=SCHEMA)
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_refiner_for_other_classes_is_refused(image, rough, tmp_path):
    out = tmp_path / "out.tif"
    message = refused(image, rough, out, refiner=Blurred("two", 2))
    assert "not those that the refiner was made for" in message
    assert "3: land, road, water" in message
    assert "--labels" in message
    assert "not those" in refused(image, rough, out, refiner=Blurred("four", 4), schema=SCHEMA)
    ones = tiff(tmp_path / "ones.tif", areas(values=(1, 2, 3, 255)).astype(np.uint8), nodata=255, **PLACE)
    assert "as the values 0 to 2" in refused(image, ones, out, refiner=Blurred("three", 3))
    rgb = tiff(tmp_path / "rgb.tif", np.moveaxis(SCHEMA.to_color(areas(values=(0, 1, 2, 0))), -1, 0), **PLACE)
    assert "not those" in refused(image, rgb, out, refiner=Blurred("three", 3))
    refine(image, rough, out, Blurred("five", 5), SETTINGS)
    expected, _ = by_hand(Blurred(), picture(), areas(), 4, num_classes=5)
    assert set(np.unique(read(out))) == {0, 1, 2, 255}  # two of five are nowhere in the rough map
    sure = expected < 3
    assert sure.mean() > 0.5
    np.testing.assert_array_equal(read(out)[sure], expected[sure])


def test_a_band_in_metres_needs_pixels_in_metres(tmp_path):
    settings = RefineSettings(size=32, overlap=16, band=Tolerance(4, "m"))
    for name, place in {
        "degrees": {"crs": "EPSG:4326", "transform": Affine(1e-5, 0, 54, 0, -1e-5, 25)},
        "nowhere": {},
    }.items():
        image = tiff(tmp_path / f"{name}-image.tif", picture(), **place)
        rough = tiff(tmp_path / f"{name}.tif", areas().astype(np.uint8), **place)
        message = refused(image, rough, tmp_path / "out.tif", settings=settings)
        assert "the size of the pixels is not known in metres" in message
        assert "as --band 4" in message
        assert ("EPSG:4326" in message) == (name == "degrees")


@pytest.mark.parametrize("fault", ["nan", "shape"])
def test_scores_that_are_none_end_the_run(image, rough, tmp_path, fault):
    class Broken(Blurred):
        def scores(self, images, rough, **options):
            scores = Blurred().scores(images, rough, **options)
            return scores * float("nan") if fault == "nan" else scores[:, 1:]

    message = refused(image, rough, tmp_path / "out.tif", refiner=Broken())
    assert "the refiner gives no scores" in message
    assert not (tmp_path / "out.tif").exists()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(TerraSynthError, match="larger than their overlap"):
        RefineSettings(size=64, overlap=64)
    with pytest.raises(TerraSynthError, match="--batch-size"):
        RefineSettings(batch_size=0)


def test_a_raster_too_wide_for_the_memory_is_told_from_its_header(tmp_path, monkeypatch):
    # Beside the scores, in float32, are classes, bands and copies.
    monkeypatch.setattr("terrasynth.tasks.stripes._MAX_STRIPE", (4 * 3 + 48) * 32 * 100)
    image = tiff(tmp_path / "image.tif", picture(), **PLACE)
    rough = tiff(tmp_path / "rough.tif", areas().astype(np.uint8), nodata=255, **PLACE)
    assert "101 columns, 3 classes, windows of 32" in refused(image, rough, tmp_path / "out.tif")


# --- refiners from files, and the command ----------------------------------------------------------------------------


def saved(path, schema=None, **options):
    """A refiner of random weights, which sees image and map."""
    from terrasynth.systems.idgbr import IDGBRPipeline

    options = {"patch_size": 4, "image_size": 32, **options}
    pipeline = IDGBRPipeline.from_scratch(schema, widths=(8, 8), guidance_width=8, **options)
    torch.manual_seed(0)
    for parameter in pipeline.guidance_net.parameters():  # of which the last begin at zero
        nn.init.normal_(parameter, std=0.3)
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for any class against the rest."""
    return saved(tmp_path_factory.mktemp("model") / "refiner")


def by_pipeline(folder, bands, classes, seed=0, band=3, **sampling):
    """What a refiner makes of a map of one window."""
    from terrasynth.systems.idgbr import IDGBRPipeline

    pipeline = IDGBRPipeline.from_pretrained(folder)
    ignored = classes == 255
    return (
        pipeline.refine(
            torch.from_numpy(bands)[None].float() / 255,
            torch.from_numpy(np.where(ignored, pipeline.ignore_index, classes))[None],
            band=torch.from_numpy(~ignored & (distance_to_another(classes) <= band))[None],
            seeds=[int(module.digest(seed, 0, 0), 16) >> 1],
            each_class=pipeline.config.each_class,
            precision="auto",
            **sampling,
        )[0]
        .numpy()
        .astype(int)
    )


def command(*arguments):
    return CliRunner().invoke(app, ["refine", *map(str, arguments)])


def test_the_command_refines_as_the_pipeline_does(tmp_path, folder):
    bands, classes = picture(32, 32), areas(32, 32, side=8)
    image = tiff(tmp_path / "image.tif", bands, **PLACE)
    rough = tiff(tmp_path / "rough.tif", classes.astype(np.uint8), nodata=255, **PLACE)
    options = ["--model", folder, "--steps", 2, "--band", "1.5m", "--seed", 3]
    result = command(image, rough, "--out", tmp_path / "out.tif", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out.tif'}\n"
    refined = by_pipeline(folder, bands, classes, 3, num_steps=2)
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), refined)
    assert (refined != classes).any()
    again = command(image, rough, "--out", tmp_path / "out.tif", *options[:-1], 4)
    assert (again.exit_code, "was made of something else" in again.stderr) == (2, True)
    other = command(image, rough, "--out", tmp_path / "other.tif", *options[:-3], "1.5", "--everywhere")
    assert other.exit_code == 2
    assert command(image, rough, "--out", tmp_path / "other.tif", *options[:4], "--band", "0").exit_code == 2
    alone = command(image, rough, "--out", tmp_path / "other.tif", *options[:4], "--below", "0.5")
    assert (alone.exit_code, "one needs the other" in alone.stderr) == (2, True)


def test_the_command_starts_from_the_map_and_exaggerates_as_the_pipeline_does(tmp_path, folder):
    bands, classes = picture(32, 32), areas(32, 32, side=8)
    image = tiff(tmp_path / "image.tif", bands, **PLACE)
    rough = tiff(tmp_path / "rough.tif", classes.astype(np.uint8), nodata=255, **PLACE)
    found = []
    for name, options in {
        "plain": {},
        "strength": {"strength": 0.4},
        "guidance": {"guidance_scale": 3.0},
    }.items():
        flags = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", value)]
        asked = [image, rough, "--model", folder, "--steps", 3, "--band", "3px", *flags]
        assert command(*asked, "--out", tmp_path / f"{name}.tif").exit_code == 0
        found.append(read(tmp_path / f"{name}.tif"))
        np.testing.assert_array_equal(found[-1], by_pipeline(folder, bands, classes, num_steps=3, **options))
        if options:
            again = command(*asked, "--out", tmp_path / "plain.tif")
            assert (again.exit_code, "was made of something else" in again.stderr) == (2, True)
            assert (found[-1] != found[0]).any()


def test_without_a_model_the_packages_own_sharpens(tmp_path):
    """A disc brighter than its ground, whose map is a square: 20 pixels of another size than any that it learned."""
    row, column = np.mgrid[:64, :64]
    disc = np.hypot(row - 31.5, column - 31.5) < 18
    bands = np.where(disc, 170, 90) + np.random.default_rng(0).normal(0, 5, (3, 64, 64))
    image = tiff(tmp_path / "image.tif", bands.round().astype(np.uint8), **PLACE)
    square = (np.abs(row - 31.5) < 16) & (np.abs(column - 31.5) < 16)
    rough = tiff(tmp_path / "rough.tif", square.astype(np.uint8), **PLACE)
    result = command(image, rough, "--out", tmp_path / "out.tif")
    assert result.exit_code == 0, result.output
    refined = read(tmp_path / "out.tif")
    assert (square != disc).sum() > 150
    assert (refined != disc).sum() < 0.3 * (square != disc).sum()
    # It is the one that is named so, and it is small.
    assert command(image, rough, "--out", tmp_path / "out.tif", "--model", "terrasynth-refiner").exit_code == 0
    folder = packaged_or("terrasynth-refiner")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 10e6
    assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


@pytest.mark.parametrize("ignore_index", [3, 9])
def test_unlabelled_pixels_are_so_to_a_refiner_with_another_ignore_index(tmp_path, ignore_index):
    schema = LabelSchema(SCHEMA.names, SCHEMA.colors, ignore_index)
    folder = saved(tmp_path / "refiner", schema)
    bands, classes = picture(32, 32), areas(32, 32, side=8)
    image = tiff(tmp_path / "image.tif", bands, **PLACE)
    stored = np.where(classes == 255, ignore_index, classes)
    assert (classes == 255).any()
    rough = tiff(tmp_path / "rough.tif", stored.astype(np.uint8), nodata=ignore_index, **PLACE)
    settings = RefineSettings(size=32, overlap=8, band=Tolerance(3))
    refine(image, rough, tmp_path / "out.tif", load_refiner(folder, steps=2), settings)
    refined = by_pipeline(folder, bands, classes, num_steps=2)
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), refined)
    assert (refined != stored).any()


def test_windows_are_as_large_as_the_refiner_was_trained_on(image, rough, tmp_path):
    folder = saved(tmp_path / "refiner", image_size=30)
    out = [image, rough, "--model", folder, "--steps", 1, "--out", tmp_path / "out.tif"]
    assert command(*out).exit_code == 0
    assert command(*out, "--size", 32).exit_code == 0  # 30, in whole patches of 4: it is there already
    other = command(*out[:-1], tmp_path / "other.tif", "--size", 34)
    assert other.exit_code == 2
    assert "a multiple of 4" in other.stderr
    assert "give --size 36" in other.stderr


def test_numbers_that_leave_nothing_to_sample_are_told_by_their_options(image, rough, tmp_path, folder):
    asked = [image, rough, "--model", folder, "--out", tmp_path / "out.tif"]
    many = command(*asked, "--steps", 2000)
    assert (many.exit_code, "--steps 2000 at --strength 1" in many.stderr) == (2, True)
    assert "at most 1000" in many.stderr
    few = command(*asked, "--strength", 0.005, "--steps", 6)
    assert (few.exit_code, "at most 5" in few.stderr) == (2, True)
    none = command(*asked, "--strength", 0)
    assert (none.exit_code, "--strength is above 0" in none.stderr) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.tif", "rough.tif"]


def test_options_that_say_nothing_are_told_and_leave_nothing_behind(image, rough, tmp_path, folder):
    asked = [image, rough, "--model", folder, "--out", tmp_path / "out.tif"]
    confidence = tiff(tmp_path / "sure.tif", np.ones_like(areas(), np.float32), **PLACE)
    for below in ("nan", "inf"):
        result = command(*asked, "--confidence", confidence, "--below", below)
        assert (result.exit_code, "--below is a number" in result.stderr) == (2, True)
    result = command(*asked, "--strength", 0.0001)
    assert (result.exit_code, "raise --strength" in result.stderr) == (2, True)
    assert command(*asked, "--guidance-scale", 0).exit_code == 2
    assert command(*asked, "--size", 100_000).exit_code == 2
    assert not list(tmp_path.glob("out*"))
    result = command(image, rough, "--out", tmp_path / "out.tif", "--model", "terrasynth-refine")
    assert (result.exit_code, "did you mean `terrasynth-refiner`?" in result.stderr) == (2, True)


def test_a_model_that_is_no_refiner_is_refused_at_once(image, rough, tmp_path, sd15):
    for model, found in ((sd15[0], "a model of StableDiffusionPipeline"), ("terrasynth-tiny", "a model of")):
        result = command(image, rough, "--model", model, "--out", tmp_path / "out.tif")
        assert (result.exit_code, "not the folder of a refiner" in result.stderr) == (2, True)
        assert found in result.stderr
    assert not (tmp_path / "out.tif").exists()


@pytest.mark.parametrize("schema", [None, SCHEMA])
def test_a_map_of_one_class_is_told_with_what_may_be_wrong(image, tmp_path, schema, capsys, monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "")
    # As a map of one class against the rest, whose rest its writer called nodata.
    binary = (areas() == 1).astype(np.uint8)
    rough = tiff(tmp_path / "rough.tif", binary, nodata=0, **PLACE)
    if schema is None:
        refine(image, rough, tmp_path / "out.tif", Next(), SETTINGS)
        said = " ".join(capsys.readouterr().err.split())
        assert "has pixels of value 1 alone: there is no boundary to refine" in said
        assert "Its nodata value, 0, counts as unlabelled" in said
        assert f"`gdal_edit.py -unsetnodata {rough}`" in said
        np.testing.assert_array_equal(read(tmp_path / "out.tif"), binary)
    else:
        assert "nodata value of the mask is a class as well" in refused(
            image, rough, tmp_path / "out.tif", schema=schema
        )
    whole = tiff(tmp_path / "whole.tif", np.ones_like(binary), **PLACE)
    refine(image, whole, tmp_path / "same.tif", Next(), SETTINGS, schema=schema)
    said = capsys.readouterr().err
    assert "there is no boundary to refine" in said
    assert "unsetnodata" not in said


def test_a_map_of_the_first_class_alone_is_not_one_of_black_pixels(image, tmp_path):
    zeros = np.zeros_like(areas())
    rough = tiff(tmp_path / "rough.tif", zeros, **PLACE)
    refine(image, rough, tmp_path / "out.tif", Next(), SETTINGS, schema=SCHEMA)
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), zeros)


def test_a_refiner_knows_its_classes(tmp_path, folder):
    from terrasynth.systems.idgbr import IDGBRPipeline

    one = load_refiner(folder)
    assert (one.num_classes, one.schema) == (None, None)
    IDGBRPipeline.from_scratch(SCHEMA, widths=(8, 8), patch_size=4, image_size=32).save_pretrained(tmp_path / "three")
    three = load_refiner(tmp_path / "three", steps=1)
    assert (three.num_classes, three.schema) == (3, SCHEMA)
    assert len({one.identity, three.identity, load_refiner(folder, steps=1).identity}) == 3
    with pytest.raises(TerraSynthError, match="not the folder of a refiner"):
        load_refiner(tmp_path)


def test_two_classes_without_names_are_not_one_against_the_rest(image, rough, tmp_path, folder):
    from terrasynth.systems.idgbr import IDGBRPipeline

    IDGBRPipeline.from_pretrained(folder, each_class=False).save_pretrained(tmp_path / "two")
    two = load_refiner(tmp_path / "two", steps=2)
    assert (two.num_classes, two.schema) == (2, None)
    with pytest.raises(TerraSynthError, match=r"(?s)not those that the refiner was made for.*values 0 to 1"):
        refine(image, rough, tmp_path / "out.tif", two, SETTINGS)
    bands, classes = picture(32, 32), areas(32, 32, values=(0, 1, 0, 1), side=8)
    image = tiff(tmp_path / "small.tif", bands, **PLACE)
    rough = tiff(tmp_path / "binary.tif", classes.astype(np.uint8), **PLACE)
    refine(image, rough, tmp_path / "out.tif", two, RefineSettings(size=32, overlap=8, band=Tolerance(3)))
    expected = by_pipeline(tmp_path / "two", bands, classes, num_steps=2)
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), expected)
    assert (expected != classes).any()


def test_what_is_wrong_with_the_files_shows_before_the_refiner_is_loaded(image, rough, tmp_path, folder, monkeypatch):
    from terrasynth.systems.idgbr import IDGBRPipeline

    monkeypatch.setattr(IDGBRPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    moved = tiff(tmp_path / "moved.tif", areas().astype(np.uint8), crs="EPSG:32639", transform=PLACE["transform"])
    result = command(image, moved, "--out", tmp_path / "out.tif", "--model", folder)
    assert (result.exit_code, "different CRSs" in result.stderr) == (2, True)
