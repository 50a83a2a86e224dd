"""Boundary metrics of files: as of the arrays in them, on the same pixels only, and nothing left out."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.schema import LabelSchema
from terrasynth.tasks.boundary import BoundarySettings, Tolerance, evaluate_maps

SCHEMA = LabelSchema(("land", "road", "deep water"), ((0, 200, 0), (200, 0, 0), (0, 0, 200)))
HALF_A_METRE = {"crs": "EPSG:32640", "transform": Affine(0.5, 0, 300_000, 0, -0.5, 2_800_000)}


@pytest.fixture(scope="module")
def maps():
    """Predictions and truths of two sizes; the truths are unlabelled in a corner."""
    noise, truths, predictions = np.random.default_rng(0), {}, {}
    for name, shape in {"a": (40, 52), "b": (31, 33)}.items():
        smooth = ndimage.gaussian_filter(noise.normal(size=(*shape, 3)), (3, 3, 0))
        predictions[name] = smooth.argmax(2).astype(np.uint8)
        truths[name] = np.roll(predictions[name], (2, 1), (0, 1))
        truths[name][:4, :9] = 255
    return predictions, truths


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "classes.yaml"
    colors = ["#{:02X}{:02X}{:02X}".format(*color) for color in SCHEMA.colors]
    classes = [{"name": name, "color": color} for name, color in zip(SCHEMA.names, colors, strict=True)]
    path.write_text(yaml.safe_dump({"classes": classes}))
    return path


def tiff(path, values, **options):
    path.parent.mkdir(exist_ok=True)
    shape = {"count": 1, "height": values.shape[0], "width": values.shape[1], "dtype": values.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", **{**HALF_A_METRE, **shape, **options}) as file:
            file.write(values[None])
    return path


def boundaries(*arguments):
    return CliRunner().invoke(app, ["boundaries", *map(str, arguments)])


def refused(*arguments):
    result = boundaries(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr


def test_two_rasters_score_as_what_is_in_them(tmp_path, maps, labels):
    prediction, truth = ({"a": some["a"]} for some in maps)
    paths = tiff(tmp_path / "refined.tif", prediction["a"]), tiff(tmp_path / "truth.tif", truth["a"], nodata=255)
    result = boundaries(*paths, "--labels", labels, "--tolerance", "1m", "--json", tmp_path / "scores.json")
    assert result.exit_code == 0, result.output
    two = Tolerance(2)  # pixels of half a metre
    expected = evaluate_maps(prediction, truth, SCHEMA, settings=BoundarySettings(two, two, two)).metrics()
    assert 0.2 < expected["boundary_iou"] < 0.95
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["metrics"] == expected
    assert (found["maps"], found["gsd"], found["within"]["bf"]) == (1, 0.5, "1 m")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("1 map; boundary IoU within 1 m, BF within 1 m")
    rows = {name: line for name in (*SCHEMA.names, "all") for line in lines if line.startswith(f"{name} ")}
    for name, row in rows.items():
        ending = "" if name == "all" else f"/{name}"
        numbers = [expected[f"{key}{ending}"] for key in ("iou", "boundary_iou", "bf", "mba", "trimap_iou")]
        assert row.removeprefix(name).split() == [f"{number:.4f}" for number in numbers]
    assert len(rows) == 4
    assert f"weighted F of edges (3 px): {expected['wf/edge']:.4f}" in lines


def test_folders_are_paired_by_name_and_scored_together(tmp_path, maps, labels):
    predictions, truths = maps
    for name in ("a", "b"):
        tiff(tmp_path / "predicted" / f"{name}.tif", predictions[name])
    tiff(tmp_path / "predicted" / "c.tif", predictions["a"])  # without a truth
    (tmp_path / "masks").mkdir()
    Image.fromarray(SCHEMA.to_color(truths["a"])).save(tmp_path / "masks" / "a.png")  # lies where its prediction does
    Image.fromarray(SCHEMA.to_color(truths["b"])).save(tmp_path / "masks" / "b.png")
    asked = [tmp_path / "predicted", tmp_path / "masks", "--labels", labels, "--json", tmp_path / "scores.json"]
    found = {}
    for tolerance in (None, "3px", "1.5m"):
        result = boundaries(*asked, *([] if tolerance is None else ["--tolerance", tolerance]))
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("2 maps; ")
        found[tolerance] = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert found[None] == evaluate_maps(predictions, truths, SCHEMA).metrics()
    three = BoundarySettings(Tolerance(3), Tolerance(3), Tolerance(3))
    assert found["3px"] == found["1.5m"] == evaluate_maps(predictions, truths, SCHEMA, settings=three).metrics()


def test_what_is_no_class_is_wrong_and_told(tmp_path, maps, labels):
    prediction, truth = maps[0]["a"].copy(), maps[1]["a"]
    prediction[20:] = 9
    paths = tiff(tmp_path / "p.tif", prediction), tiff(tmp_path / "t.tif", truth, nodata=255)
    result = boundaries(*paths, "--labels", labels)
    share = 100 * (prediction[truth != 255] == 9).mean()
    assert f"predicted as no class, which count as wrong: {share:.2g} %" in result.stdout


def test_missing_and_misplaced_predictions_are_errors(tmp_path, maps, labels):
    for name in ("a", "b"):
        tiff(tmp_path / "masks" / f"{name}.tif", maps[1][name], nodata=255)
    one = tiff(tmp_path / "predicted" / "a.tif", maps[0]["a"])
    options = ("--labels", labels, "--json", tmp_path / "scores.json")
    message = refused(tmp_path / "predicted", tmp_path / "masks", *options)
    assert "1 of 2 truths have no prediction" in message
    assert "none for b" in message
    assert "two files or two folders" in refused(one, tmp_path / "masks", *options)
    moved = Affine.translation(300_000.5, 2_800_000) @ Affine.scale(0.5, -0.5)
    for place, text in (
        ({"transform": moved}, "truth and prediction do not lie on the same pixels"),
        ({"crs": "EPSG:32639"}, "truth and prediction have different CRSs"),
    ):
        message = refused(tiff(tmp_path / "p.tif", maps[0]["a"], **place), tmp_path / "masks" / "a.tif", *options)
        assert text in message
        assert "warp the prediction to the truth: `gdalwarp" in message
    message = refused(tmp_path / "masks" / "b.tif", tmp_path / "masks" / "a.tif", *options)
    assert "the prediction is not as large as its truth" in message
    assert not (tmp_path / "scores.json").exists()


def test_metres_need_pixels_of_one_known_size(tmp_path, maps, labels):
    degrees = {"crs": "EPSG:4326", "transform": Affine(1e-5, 0, 54, 0, -1e-5, 25)}
    paths = [tiff(tmp_path / f"{n}.tif", some["a"], **degrees) for n, some in zip("pt", maps, strict=True)]
    message = refused(*paths, "--labels", labels, "--tolerance", "2m")
    assert "the size of the pixels is not known in metres" in message
    assert "EPSG:4326" in message
    assert "as --tolerance 2px" in message
    assert boundaries(*paths, "--labels", labels, "--tolerance", "2px").exit_code == 0
    for name, pixel in (("a", 0.5), ("b", 1.0)):
        place = {"transform": Affine(pixel, 0, 3e5, 0, -pixel, 2.8e6)}
        for folder, some in zip(("predicted", "masks"), maps, strict=True):
            tiff(tmp_path / folder / f"{name}.tif", some[name], **place)
    message = refused(tmp_path / "predicted", tmp_path / "masks", "--labels", labels, "--tolerance", "2m")
    assert "needs maps of one GSD" in message
    assert "1 m, and 0.5 m in" in message
    assert "less than a pixel" in refused(paths[0], paths[1], "--labels", labels, "--tolerance", "0.5")
