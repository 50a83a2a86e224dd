"""Exports say what the dataset says, to readers that know nothing of TerraSynth."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from terrasynth.cli import ExportFormat
from terrasynth.data import export as module
from terrasynth.data.export import FORMATS, export
from terrasynth.data.schema import LabelSchema
from terrasynth.data.write import SyntheticWriter
from terrasynth.errors import TerraSynthError

# Unlabelled is not 255 here, and the first class is black.
SCHEMA = LabelSchema(("ground", 'it\'s "road"', "water"), ((0, 0, 0), (110, 193, 228), (226, 169, 41)), 7, ((9, 9, 9),))
SIZES = ((12, 20), (16, 16), (1, 1), (9, 5), (8, 8))
IDS = tuple(f"{index:06d}" for index in range(len(SIZES)))


def mask_of(index: int) -> np.ndarray:
    """Random classes and unlabelled pixels; the last two have one class alone, and nothing labelled."""
    values = np.array([0, 1, 2, 7], np.uint8)[np.random.default_rng(index).integers(0, 4, SIZES[index])]
    return np.full_like(values, {3: 2, 4: 7}[index]) if index > 2 else values


def expected(index: int) -> np.ndarray:
    return np.where(mask_of(index) == 7, 255, mask_of(index))


def paint(folder: Path, count: int = len(SIZES), schema: LabelSchema = SCHEMA, **arguments) -> Path:
    writer = SyntheticWriter(folder, schema, plan={"model": "0f1e", "sampling": {"steps": 4}}, **arguments)
    for index in range(count):
        image = np.random.default_rng(100 + index).integers(0, 256, (3, *SIZES[index]), dtype=np.uint8)
        row = {"seed": 2**62 + index, "prompt": "Übersicht\u2028two lines", "source_mask": f"tile{index}"}
        writer.add(IDS[index], torch.from_numpy(image), torch.from_numpy(mask_of(index)), row)
    return writer.finish()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return paint(tmp_path_factory.mktemp("painted") / "set", license="cc-by-4.0", title="Tiles of nowhere")


@pytest.fixture(scope="module")
def exports(dataset, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {to: export(dataset, to, folder / to, shard_size=2) for to in FORMATS}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


# --- what other tools read -------------------------------------------------------------------------------------------


def test_the_dataset_itself_is_read_by_hugging_face_datasets(dataset, tmp_path, monkeypatch):
    # Not in the extra `test`: with pyarrow and pandas it is heavier than the rest of that extra together.
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for arguments in ([str(dataset)], ["imagefolder", None, str(dataset)]):
        table = datasets.load_dataset(*arguments, split="train", cache_dir=str(tmp_path))
        assert {"image", "mask", "id", "seed", "prompt", "source_mask", "synthetic"} <= set(table.column_names)
        for index, row in enumerate(table):
            np.testing.assert_array_equal(np.asarray(row["mask"]), mask_of(index))
            assert np.asarray(row["image"]).shape == (*SIZES[index], 3)
            assert (row["id"], row["seed"], row["synthetic"]) == (IDS[index], 2**62 + index, True)


def test_mmsegmentation_finds_images_masks_and_classes(dataset, exports):
    folder = exports["mmseg"]
    # What mmengine does with a config: it fills in the folder, then runs it.
    names: dict = {}
    exec((folder / "dataset.py").read_text(encoding="utf-8").replace("{{ fileDirname }}", str(folder)), names)
    config = names["synthetic"]
    assert config["metainfo"]["classes"] == SCHEMA.names
    assert config["metainfo"]["palette"] == [list(color) for color in SCHEMA.colors]
    assert (config["reduce_zero_label"], config["ignore_index"]) == (False, 255)
    # What its BaseSegDataset does: an image's annotation has its name, with another suffix.
    images, masks = (Path(config["data_root"], config["data_prefix"][key]) for key in ("img_path", "seg_map_path"))
    found = sorted(path.name for path in images.iterdir() if path.name.endswith(config["img_suffix"]))
    assert found == [f"{id}.png" for id in IDS]
    for index, name in enumerate(found):
        mask = Image.open(masks / name.replace(config["img_suffix"], config["seg_map_suffix"]))
        assert mask.mode == "L", "a palette would be turned into colours by OpenCV"
        np.testing.assert_array_equal(np.asarray(mask), expected(index))
        assert (images / name).read_bytes() == (dataset / "images" / name).read_bytes()


def test_coco_panoptic_segments_cover_exactly_the_labelled_pixels(exports):
    folder = exports["coco-panoptic"]
    coco = json.loads((folder / "annotations/panoptic_train.json").read_text(encoding="utf-8"))
    categories = {category["id"]: category for category in coco["categories"]}
    assert [category["name"] for category in coco["categories"]] == list(SCHEMA.names)
    assert all(category["isthing"] == 0 for category in categories.values())
    images = {image["id"]: image for image in coco["images"]}
    assert len(images) == len(coco["annotations"]) == len(SIZES)
    for index, annotation in enumerate(coco["annotations"]):
        image = images[annotation["image_id"]]
        assert image["file_name"] == f"{IDS[index]}.png"
        with Image.open(folder / "train" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        rgb = np.asarray(Image.open(folder / "annotations/panoptic_train" / annotation["file_name"])).astype(int)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert set(np.unique(ids)) - {0} == segments.keys()
        rebuilt = np.full(ids.shape, 255)
        for number, segment in segments.items():
            name = categories[segment["category_id"]]["name"]
            rebuilt[ids == number] = SCHEMA.names.index(name)
            pixels = [(x, y) for y, line in enumerate(ids.tolist()) for x, value in enumerate(line) if value == number]
            left, top, right, bottom = (f(p[axis] for p in pixels) for f in (min, max) for axis in (0, 1))
            assert segment["area"] == len(pixels)
            assert segment["bbox"] == [left, top, right - left + 1, bottom - top + 1]
            assert segment["iscrowd"] == 0
        np.testing.assert_array_equal(rebuilt, expected(index))


def test_pycocotools_decodes_the_stuff_annotations_to_the_masks(exports, capsys):
    from pycocotools import mask as of_coco
    from pycocotools.coco import COCO

    folder = exports["coco-semantic"]
    coco = COCO(str(folder / "annotations/stuff_train.json"))
    assert len(coco.imgs) == len(SIZES)
    for index, image in enumerate(coco.loadImgs(sorted(coco.imgs))):
        assert (image["height"], image["width"]) == SIZES[index]
        rebuilt = np.full(SIZES[index], 255)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
            region = coco.annToMask(annotation).astype(bool)
            assert (rebuilt[region] == 255).all(), "no pixel has two classes"
            rebuilt[region] = SCHEMA.names.index(coco.cats[annotation["category_id"]]["name"])
            assert annotation["area"] == of_coco.area(coco.annToRLE(annotation))
            assert annotation["bbox"] == of_coco.toBbox(coco.annToRLE(annotation)).tolist()
        np.testing.assert_array_equal(rebuilt, expected(index))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_run_lengths_decode_to_the_region_in_pycocotools(height, width, data):
    from pycocotools import mask as of_coco

    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    region = np.array(bits).reshape(height, width)
    counts = module._run_lengths(region)
    assert sum(counts) == region.size
    code = of_coco.frPyObjects({"counts": counts, "size": [height, width]}, height, width)
    np.testing.assert_array_equal(of_coco.decode(code), region)


def test_the_webdataset_library_reads_the_shards(dataset, exports):
    import webdataset

    shards = sorted(exports["webdataset"].glob("*.tar"))
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    assert [len(members(shard)) for shard in shards] == [6, 6, 3]
    pipeline = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).decode("rgb8")
    samples = list(pipeline.to_tuple("image.png", "mask.png", "json"))
    assert len(samples) == len(SIZES)
    for index, (image, mask, row) in enumerate(samples):
        with Image.open(dataset / "images" / f"{IDS[index]}.png") as original:
            np.testing.assert_array_equal(image, np.asarray(original))
        np.testing.assert_array_equal(mask, np.repeat(expected(index)[..., None], 3, axis=2))
        assert (row["id"], row["seed"], row["synthetic"]) == (IDS[index], 2**62 + index, True)


def test_hugging_face_datasets_reads_the_shards(exports, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    table = datasets.load_dataset(str(exports["webdataset"]), split="train", cache_dir=str(tmp_path))
    for index, row in enumerate(table):
        np.testing.assert_array_equal(np.asarray(row["mask.png"]), expected(index))
        assert row["json"]["id"] == IDS[index]


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_shards_hold_as_many_samples_as_asked(dataset, tmp_path, size):
    shards = sorted(export(dataset, "webdataset", tmp_path / "out", shard_size=size).glob("*.tar"))
    counts = [len(members(shard)) // 3 for shard in shards]
    assert counts == [min(size, len(SIZES) - start) for start in range(0, len(SIZES), size)]


# --- what they say of themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_every_exported_image_says_that_it_is_synthetic(exports, to):
    if to == "webdataset":
        named = [pair for shard in exports[to].glob("*.tar") for pair in members(shard).items()]
        images = [content for name, content in named if name.endswith("image.png")]
    else:
        folder = exports[to] / ("img_dir/train" if to == "mmseg" else "train")
        images = [path.read_bytes() for path in folder.iterdir()]
    assert len(images) == len(SIZES)
    for image in images:
        text = Image.open(io.BytesIO(image)).text
        assert text["synthetic"] == "1"
        assert json.loads(text["terrasynth"])["seed"] >= 2**62


@pytest.mark.parametrize("to", ["coco-panoptic", "coco-semantic"])
def test_coco_files_say_so_too_and_name_the_licence(exports, to):
    (path,) = exports[to].glob("annotations/*.json")
    coco = json.loads(path.read_text(encoding="utf-8"))
    assert coco["info"]["synthetic"] is True
    assert [entry["name"] for entry in coco["licenses"]] == ["cc-by-4.0"]
    assert all(image["synthetic"] is True and image["license"] == 1 for image in coco["images"])


@pytest.mark.parametrize("to", FORMATS)
def test_the_card_goes_along_with_counts_classes_provenance_and_licence(exports, to):
    _, front, body = (exports[to] / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    values = yaml.safe_load(front)
    assert (values["license"], values["pretty_name"]) == ("cc-by-4.0", "Tiles of nowhere")
    assert "synthetic" in values["tags"]
    assert "These images are synthetic" in body
    assert "| sampling.steps | 4 |" in body
    masks = [expected(index) for index in range(len(SIZES))]
    pixels = np.concatenate([mask.ravel() for mask in masks])
    for value, name in [*enumerate(SCHEMA.names), (255, "(unlabelled)")]:
        tiles = sum((mask == value).any() for mask in masks)
        assert f"| {value} | {name} | {tiles} | {(pixels == value).mean():.2%} |" in body
    schema = LabelSchema.from_yaml(exports[to] / "schema.json")
    assert (schema.names, schema.colors, schema.ignore_index) == (SCHEMA.names, SCHEMA.colors, 255)


# --- interruption ----------------------------------------------------------------------------------------------------


MOMENTS = ("sample 0", "sample 2", "rename 0", "rename 1", "rename 2", "rename 3")


@pytest.mark.parametrize(
    ("to", "moment", "before"),
    [
        *((to, "sample 2", "nothing") for to in FORMATS),
        *(("webdataset", moment, before) for moment in MOMENTS for before in ("nothing", "an earlier export")),
    ],
)
def test_killed_at_any_moment_the_same_export_again_is_that_of_an_uninterrupted_one(
    dataset, exports, killed, tmp_path, to, moment, before
):
    out = tmp_path / "out"
    if before == "an earlier export":
        export(paint(tmp_path / "smaller", count=2), to, out)
    earlier = contents(out)
    what, number = moment.split()
    owner, name = (module, "_Sample") if what == "sample" else (Path, "replace")
    died = killed(lambda: export(dataset, to, out, shard_size=2), owner, name, int(number))
    # The classes, the marker and the folder are renamed; where there is an earlier export, that one before the folder.
    assert died == (moment != "rename 3" or before == "an earlier export")
    if moment != "rename 3":
        assert contents(out) == earlier, "half an export is never seen"
    export(dataset, to, out, shard_size=2)
    assert contents(out) == contents(exports[to])
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "smaller"}


def test_equal_datasets_make_equal_bytes_whenever_and_wherever(exports, tmp_path):
    again = paint(tmp_path / "again", license="cc-by-4.0", title="Tiles of nowhere")
    for path in again.rglob("*"):
        os.utime(path, (1e9, 1e9))
    for to in FORMATS:
        assert contents(export(again, to, tmp_path / to, shard_size=2)) == contents(exports[to])


def test_leftovers_of_other_exports_are_left_alone(dataset, tmp_path):
    (tmp_path / "other.incomplete-7").mkdir()
    (tmp_path / "out.incomplete-7").mkdir()
    export(dataset, "mmseg", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other.incomplete-7"}


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_folder_of_anything_else_is_left_alone(dataset, exports, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    shutil.copytree(exports["mmseg"], tmp_path / "changed")
    (tmp_path / "changed" / "my_config.py").write_text("hours of work")
    shutil.copytree(exports["mmseg"], tmp_path / "renamed")
    (tmp_path / "renamed" / "dataset.py").rename(tmp_path / "renamed" / "my_dataset.py")
    for name, message in (
        ("renamed", "of other names"),
        ("thesis", "thesis.txt"),
        ("file", "a file"),
        ("changed", "was changed by hand"),
        (exports["webdataset"], "an export to webdataset"),
        (dataset, "metadata.jsonl"),
    ):
        before = contents(tmp_path), contents(exports["webdataset"]), contents(dataset)
        with pytest.raises(TerraSynthError, match=re.escape(message)) as caught:
            export(dataset, "mmseg", tmp_path / name)
        assert "choose another --out" in caught.value.fix
        assert (contents(tmp_path), contents(exports["webdataset"]), contents(dataset)) == before


def test_all_damaged_samples_are_in_one_message_and_nothing_is_written(tmp_path):
    folder = paint(tmp_path / "set")
    for kind, id in (("images", IDS[0]), ("masks", IDS[1])):
        path = folder / kind / f"{id}.png"
        path.write_bytes(path.read_bytes()[:-30])
    for to in FORMATS:
        with pytest.raises(TerraSynthError, match="2 of 5 samples are damaged") as caught:
            export(folder, to, tmp_path / "out", shard_size=2)
        assert f"images/{IDS[0]}.png" in str(caught.value)
        assert f"masks/{IDS[1]}.png" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_is_no_finished_dataset_is_refused(dataset, exports, tmp_path):
    with pytest.raises(TerraSynthError, match="not a synthetic dataset"):
        export(exports["mmseg"], "mmseg", tmp_path / "out")
    with pytest.raises(TerraSynthError, match="unknown format"):
        export(dataset, "voc", tmp_path / "out")
    shutil.copytree(dataset, tmp_path / "set")
    (tmp_path / "set" / "README.md").write_text("---\nlicense: do what you like\n---\n")
    with pytest.raises(TerraSynthError, match="not the identifier of a licence"):
        export(tmp_path / "set", "mmseg", tmp_path / "out")


def test_the_command_offers_the_formats_there_are():
    assert list(ExportFormat) == list(FORMATS)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_one_sample_at_a_time_is_in_memory(tmp_path, to):
    size, count = 256, 20
    schema = LabelSchema(("a", "b"), ((1, 1, 1), (2, 2, 2)))
    writer = SyntheticWriter(tmp_path / "set", schema, plan={})
    noise = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    mask = torch.zeros(size, size, dtype=torch.uint8)
    mask[: size // 2] = 1
    for index in range(count):
        writer.add(f"{index:06d}", noise, mask, {})
    writer.finish()
    export(tmp_path / "set", to, tmp_path / "warm")
    tracemalloc.start()
    export(tmp_path / "set", to, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one = noise.numel() + mask.numel()
    assert peak < 8 * one < count * one / 2


def test_exports_hold_class_indices_whatever_the_masks_of_the_dataset_store(dataset, exports, tmp_path):
    stored = replace(SCHEMA, values=(200, 3, 0), ignore_values=(1, 2))
    other = paint(tmp_path / "set", schema=stored, license="cc-by-4.0", title="Tiles of nowhere")
    assert np.asarray(Image.open(other / "masks" / "000003.png"))[0, 0] == 0
    for to, folder in exports.items():
        assert contents(export(other, to, tmp_path / to, shard_size=2)) == contents(folder)
