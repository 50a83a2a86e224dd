"""What goes wrong at users: each fault ends in a message that names the file and the remedy, and harms nothing.

The ids of the tests read as the list of faults: `pytest tests/test_faults.py -v`.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.export import FORMATS, export
from terrasynth.data.folder import load_masks, load_synthetic, load_tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.data.write import SyntheticWriter
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_write, write_json
from terrasynth.models.convert import load_published
from terrasynth.recipe import DataConfig, SamplingConfig, SegmentorConfig, SteeringConfig
from terrasynth.study.generate import generate
from terrasynth.study.report import write_report
from terrasynth.systems.build import build
from terrasynth.tasks.segmentation import Segmentor
from terrasynth.training.checkpoint import load_weights, save_weights

SIZE = 16
SCHEMA = LabelSchema(("building", "road", "water"), ((60, 16, 152), (110, 193, 228), (226, 169, 41)))
RANDOM = np.random.default_rng(0)


def run(*arguments) -> tuple[int, str]:
    """Exit code and message of a command."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def picture(seed: int = 0, size: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def labels(seed: int = 0, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, (size, size), dtype=np.uint8)


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiles(tmp_path):
    """A recipe and three training tiles a, b, c with index masks."""
    root = tmp_path / "tiles"
    for name in "abc":
        for kind, image in (("images", picture(ord(name))), ("masks", Image.fromarray(labels(ord(name))))):
            (root / kind / "train").mkdir(parents=True, exist_ok=True)
            image.save(root / kind / "train" / f"{name}.png")
    SCHEMA.to_yaml(root / "classes.yaml")
    (root / "train.txt").write_text("a\nb\nc\n")
    data = {"kind": "folder", "root": str(root), "label_schema": "classes.yaml", "image_size": SIZE}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "data": data}))
    return root


def write_tiff(path: Path, pixels: np.ndarray, driver: str = "GTiff", **options) -> None:
    shape = {"count": len(pixels), "height": pixels.shape[1], "width": pixels.shape[2], "dtype": pixels.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver=driver, **shape, **options) as file:
            file.write(pixels)


def png_header(side: int) -> bytes:
    """A PNG that claims to have so many rows and columns, and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def truncated_jpeg(root):
    picture(0, 64).save(root / "images/train/b.jpg")
    content = (root / "images/train/b.jpg").read_bytes()
    (root / "images/train/b.jpg").write_bytes(content[: len(content) // 2])
    (root / "images/train/b.png").unlink()


def float_tiff(value):
    def spoil(root):
        pixels = np.full((3, SIZE, SIZE), 0.5, np.float32)
        pixels[0, 0, 0] = value
        write_tiff(root / "images/train/b.tif", pixels)
        (root / "images/train/b.png").unlink()

    return spoil


def sparse_tiff(root):
    path = root / "images/train/b.tif"
    side = {"width": 200_000, "height": 200_000, "count": 3, "dtype": "uint8"}
    blocks = {"tiled": True, "blockxsize": 8192, "blockysize": 8192, "SPARSE_OK": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rasterio.open(path, "w", driver="GTiff", **side, **blocks).close()
    assert path.stat().st_size < 100_000
    (root / "images/train/b.png").unlink()


def no_label(root):
    for name in "abc":
        Image.fromarray(np.full((SIZE, SIZE), 255, np.uint8)).save(root / f"masks/train/{name}.png")


def unknown_color(root):
    colors = SCHEMA.to_color(labels())
    colors[0, 0] = (60, 16, 153)
    Image.fromarray(colors).save(root / "masks/train/b.png")


def fault(name, spoil, message, remedy, marks=()):
    """What was spoilt, how, how the message starts (after the data folder), and what it says to do."""
    return pytest.param(spoil, message, remedy, id=name, marks=marks)


def in_b(kind, content):
    """Put an image, bytes or text where the image or mask of tile b is."""

    def spoil(root):
        path = root / kind / "train" / "b.png"
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(content)

    return spoil


def one_pixel(root):
    picture(0, 1).save(root / "images/train/b.png")
    Image.fromarray(labels(0, 1)).save(root / "masks/train/b.png")


def nodata_tiff(root):
    pixels = np.full((3, SIZE, SIZE), 0.5, np.float32)
    pixels[:, 0] = -9999
    write_tiff(root / "images/train/b.tif", pixels, nodata=-9999)
    (root / "images/train/b.png").unlink()


def mask_with_nodata(value):
    def spoil(root):
        mask = labels(ord("b"))
        mask[0] = value
        write_tiff(root / "masks/train/b.tif", mask[None], nodata=value)
        (root / "masks/train/b.png").unlink()

    return spoil


not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


@pytest.mark.parametrize(
    ("spoil", "message", "remedy"),
    [
        fault("truncated JPEG", truncated_jpeg, "images/train/b.jpg: the image is damaged", "copy it again"),
        fault("empty file", in_b("images", b""), "images/train/b.png: the file is empty", "copy it again"),
        fault(
            "text file named .png",
            in_b("images", b"not an image"),
            "images/train/b.png: not an image that can be read",
            "check what the file really is",
        ),
        fault(
            "mask of another size",
            in_b("masks", Image.fromarray(labels()[:, :-1])),
            "masks/train/b.png: the mask is not as large as its image\n  found:    15 x 16, and 16 x 16",
            "export both from the same window",
        ),
        fault(
            "mask value outside the schema",
            in_b("masks", Image.fromarray(labels() + 9 * np.eye(SIZE, dtype=np.uint8))),
            "masks/train/b.png: mask values that are no class",
            "correct the mask, or the classes",
        ),
        fault(
            "RGB mask with an unknown colour",
            unknown_color,
            "masks/train/b.png: mask colours that are no class\n  found:    #3C1099 (1 px, nearest: building #3C1098)",
            "add the colours to the label schema",
        ),
        fault(
            "no label in any mask", no_label, "masks/train: no tile of the train split has a labelled pixel", "check"
        ),
        fault(
            "1 x 1 image among larger ones",
            one_pixel,
            "images/train/b.png: the tile is smaller than data.image_size\n  found:    1 x 1",
            "set data.image_size to at most 1",
        ),
        fault(
            "image of 20,000 x 20,000",
            in_b("images", png_header(20_000)),
            "images/train/b.png: the image is too large to decode in one piece",
            "cut it into tiles",
        ),
        fault(
            "PNG bomb of 112 GiB",
            in_b("images", png_header(200_000)),
            "images/train/b.png: the image is too large to decode in one piece",
            "cut it into tiles",
        ),
        fault(
            "sparse GeoTIFF of some kB that decodes to 112 GiB",
            sparse_tiff,
            "images/train/b.tif: the image is too large to decode in one piece\n"
            "  found:    200000 x 200000 = 40,000,000,000 pixels, 111.8 GiB decoded",
            "cut it into tiles",
        ),
        *(
            fault(
                f"{name} in a float TIFF",
                float_tiff(value),
                "images/train/b.tif: the image is not 8-bit\n"
                "  found:    float32, values 0.5 to 0.5, and 1 that are no numbers",
                "gdal_translate",
            )
            for name, value in (("NaN", np.nan), ("infinity", np.inf))
        ),
        fault(
            "nodata in a float TIFF",
            nodata_tiff,
            "images/train/b.tif: the image is not 8-bit\n  found:    float32, values -9999.0 to 0.5\n",
            "gdal_translate",
        ),
        fault(
            "nodata in a mask that is no class",
            mask_with_nodata(99),
            "masks/train/b.tif: mask values that are no class\n  found:    99 (16 px)",
            "correct the mask, or the classes",
        ),
        fault(
            "nodata in a mask that is a class as well",
            mask_with_nodata(1),
            "masks/train/b.tif: the nodata value of the mask is a class as well\n  found:    nodata 1, which is road",
            "gdal_edit.py -unsetnodata",
        ),
        fault(
            "image without a mask",
            lambda root: (root / "masks/train/b.png").unlink(),
            "images/train/b.png: the image has no mask",
            "give the mask the image's name",
        ),
        fault(
            "two images of one name",
            lambda root: picture().save(root / "images/train/b.jpg"),
            "images/train/b.jpg: several files with one name\n  found:    b.jpg, b.png",
            "keep one",
        ),
        fault(
            "name twice in the split list",
            lambda root: (root / "train.txt").write_text("a\nb\na.png\n"),
            "train.txt: the split list names tiles more than once\n  found:    a\n",
            "remove the repetitions",
        ),
        fault(
            "image that may not be read",
            lambda root: (root / "images/train/b.png").chmod(0),
            "images/train/b.png: the file can not be read\n  found:    Permission denied",
            "check its permissions",
            not_as_root,
        ),
        fault(
            "folder that may not be read",
            lambda root: (root / "images/train").chmod(0),
            "images/train: Permission denied",
            "mend",
            not_as_root,
        ),
    ],
)
def test_tiles_with(tiles, tmp_path, spoil, message, remedy):
    spoil(tiles)
    code, said = run("train", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    (tiles / "images/train").chmod(0o755)
    assert code == 2
    assert said.startswith(f"{tiles}/{message}"), said
    assert remedy in said.rpartition("to do:")[2]
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_split_list_leads_nowhere_else(tiles, tmp_path):
    (tiles / "train.txt").write_text("a\n../../masks/train/b\n")
    code, said = run("train", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert (code, said.splitlines()[0]) == (
        2,
        "../../masks/train/b: named in the split list, but there is no such image",
    )


@pytest.mark.parametrize(
    "what", ["one class in a tile", "one tile without labels", "tiles of 1 x 1", "nodata that is unlabelled"]
)
def test_not_a_fault_is(tiles, what):
    size = SIZE
    if what == "one class in a tile":
        Image.fromarray(np.full((SIZE, SIZE), 2, np.uint8)).save(tiles / "masks/train/b.png")
    elif what == "one tile without labels":
        Image.fromarray(np.full((SIZE, SIZE), 255, np.uint8)).save(tiles / "masks/train/b.png")
    elif what == "nodata that is unlabelled":
        mask_with_nodata(255)(tiles)
    else:
        size = 1
        for name in "abc":
            picture(ord(name), 1).save(tiles / f"images/train/{name}.png")
            Image.fromarray(np.full((1, 1), "abc".index(name), np.uint8)).save(tiles / f"masks/train/{name}.png")
    config = {"kind": "folder", "root": tiles, "label_schema": "classes.yaml", "image_size": size}
    loaded = load_tiles(DataConfig.model_validate(config), "train")
    for index, name in enumerate("abc"):
        (path,) = (tiles / "masks/train").glob(f"{name}.*")
        np.testing.assert_array_equal(loaded.masks[index], np.asarray(Image.open(path)))


# --- going on without them -------------------------------------------------------------------------------------------


def test_train_with_skip_bad_lists_what_it_leaves_out_and_trains_on_the_rest(tiles, tmp_path, monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "0")
    tiny = ("generator.width=16", "generator.heads=2", "generator.blocks=1", "generator.views=1", "sampling.steps=1")
    training = ("steps=2", "batch_size=2", "evaluate_every=2", "warmup_steps=1")
    options = [f"--set={one}" for one in (*tiny, *(f"generator.train.{one}" for one in training))]
    for name in "de":
        picture(ord(name)).save(tiles / f"images/train/{name}.png")
        Image.fromarray(labels(ord(name))).save(tiles / f"masks/train/{name}.png")
    (tiles / "train.txt").write_text("a\nc\n")
    code, said = run("train", tmp_path / "mine.yaml", "--out", tmp_path / "good", *options)
    assert code == 0, said
    assert "left out" not in said

    (tiles / "train.txt").write_text("a\nb\nc\nd\ne\n")
    truncated_jpeg(tiles)
    Image.fromarray(labels()[:, :-1]).save(tiles / "masks/train/d.png")
    (tiles / "masks/train/e.png").unlink()
    assert run("train", tmp_path / "mine.yaml", "--out", tmp_path / "all", *options)[0] == 2
    code, said = run("train", tmp_path / "mine.yaml", "--out", tmp_path / "all", "--skip-bad", *options)
    assert code == 0, said
    assert said.count("left out: 3 of 5 tiles of the train split\n") == 1
    for path, problem in (
        ("images/train/b.jpg", "the image is damaged"),
        ("masks/train/d.png", "the mask is not as large as its image"),
        ("images/train/e.png", "the image has no mask"),
    ):
        assert f"\n    {tiles / path}: {problem}" in said
    weights = {name: content for name, content in contents(tmp_path / "good").items() if name.endswith(".safetensors")}
    assert weights
    assert weights.items() <= contents(tmp_path / "all").items()


def test_skip_bad_leaves_something_or_ends(tiles, tmp_path):
    for path in (tiles / "images/train").iterdir():
        path.write_bytes(b"")
    code, said = run("train", tmp_path / "mine.yaml", "--out", tmp_path / "out", "--skip-bad")
    assert (code, said.splitlines()[0]) == (2, "3 of 3 tiles of the train split can not be used")


# --- archives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_is_never_unpacked_wherever_it_leads(tmp_path, kind):
    path = tmp_path / "in" / f"evil.{kind}"
    path.parent.mkdir()
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            tar.add(__file__, arcname="../evil.py")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(__file__, arcname="../evil.py")
    out = tmp_path / "out"
    for command in (
        ["train", "demo", "--data", path],
        ["generate", path, "--masks", tmp_path],
        ["generate", tmp_path, "--masks", path],
        ["export", path, "--to", "mmseg"],
    ):
        code, said = run(*command, "--out", out)
        assert code == 2
        assert "evil" in said
    for read in (load_synthetic, lambda path: load_masks(path, SCHEMA, SIZE)):
        with pytest.raises(TerraSynthError, match=f"evil.{kind}: "):
            read(path)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["demo", "--set", "sampling.stepps=3"], "did you mean `sampling.steps`?", id="key mistyped"),
        pytest.param(["dmeo"], "did you mean `demo`?", id="name mistyped"),
        pytest.param(["demo", "--set", "sampling.steps=many"], "found many, expected a valid integer", id="wrong type"),
        pytest.param(["demo", "--set", "study.seeds=[1"], "the value is not YAML", id="no YAML"),
    ],
)
def test_recipe_with(tmp_path, arguments, message):
    code, said = run("train", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert message in said
    assert not (tmp_path / "out").exists()


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_recipe, tmp_path_factory):
    """A model that paints tiles of 32 pixels of the procedural world, badly."""
    torch.manual_seed(0)
    pipeline = build(tiny_recipe.generator, tiny_recipe.data, load_tiles(tiny_recipe.data, "train"))
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def layouts(tmp_path):
    (tmp_path / "masks").mkdir()
    for index in range(3):
        Image.fromarray(labels(index, 32)).save(tmp_path / "masks" / f"{index}.png")
    return tmp_path / "masks"


def segmentor(folder: Path, names=("a", "b", "c")) -> Path:
    config = SegmentorConfig(options={"encoder_depth": 3, "decoder_channels": [16, 16, 8]})
    Segmentor.build(config, len(names), seed=0, class_names=names).save_pretrained(folder)
    return folder


def test_masks_smaller_than_the_model_paints(model, layouts, tmp_path):
    Image.fromarray(labels(0, 31)).save(layouts / "0.png")
    code, said = run("generate", model, "--masks", layouts, "--out", tmp_path / "out")
    assert (code, said.splitlines()[0]) == (2, f"{layouts}/0.png: the mask is smaller than the model paints")


def test_masks_of_other_classes_than_the_model_s(model, layouts, tmp_path):
    Image.fromarray(labels(0, 32) + 200).save(layouts / "0.png")
    code, said = run("generate", model, "--masks", layouts, "--out", tmp_path / "out")
    assert (code, said.splitlines()[0]) == (2, f"{layouts}/0.png: mask values that are no class")


def test_bad_masks_among_others_with_skip_bad(model, layouts, tmp_path, monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "0")
    settings = ("--set", "sampling.steps=1")
    assert run("generate", model, "--masks", layouts, "--out", tmp_path / "good", *settings)[0] == 0
    (layouts / "bad.png").write_bytes(b"")
    command = ("generate", model, "--masks", layouts, "--out", tmp_path / "out", *settings)
    code, said = run(*command)
    assert (code, said.splitlines()[0]) == (2, f"{layouts}/bad.png: the file is empty")
    code, said = run(*command, "--skip-bad")
    assert code == 0
    assert f"left out: 1 of 4 masks of {layouts}\n    {layouts}/bad.png: the file is empty\n" in said
    assert contents(tmp_path / "out") == contents(tmp_path / "good")


def test_segmentor_of_other_classes_that_is_to_steer(model, layouts, tmp_path):
    other = segmentor(tmp_path / "segmentor")
    code, said = run("generate", model, "--masks", layouts, "--steer", other, "--out", tmp_path / "out")
    assert code == 2
    assert said.startswith(
        "the labels are not those that the segmentor was made for\n  found:    number of classes: 3 -> 6"
    )
    assert not (tmp_path / "out").exists()


def test_weights_of_another_size(model, layouts, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    path = next((tmp_path / "model" / "transformer").glob("*.safetensors"))
    weights = load_file(path)
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in weights.items()}, path)
    code, said = run("generate", tmp_path / "model", "--masks", layouts, "--out", tmp_path / "out")
    assert (code, said.splitlines()[0]) == (2, f"{tmp_path}/model: the model can not be loaded")


# --- pickles ---------------------------------------------------------------------------------------------------------


class Evil:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def replace_weights(folder: Path, content: bytes, suffix: str) -> None:
    for path in folder.rglob("*.safetensors"):
        path.unlink()
        path.with_suffix(suffix).write_bytes(content)


def as_model(suffix):
    def offer(folder, content, model):
        shutil.copytree(model, folder / "model")
        replace_weights(folder / "model", content, suffix)
        for path in (folder / "model").rglob("diffusion_pytorch_model.bin"):
            shutil.copy(path, path.with_name("pytorch_model.bin"))
        generate(folder / "model", folder, folder / "out", sampling=SamplingConfig(), steering=SteeringConfig())

    return offer


def as_segmentor(suffix):
    def offer(folder, content, model):
        replace_weights(segmentor(folder / "segmentor"), content, suffix)
        Segmentor.from_pretrained(folder / "segmentor")

    return offer


def as_checkpoint(folder, content, model):
    (folder / "weights.safetensors").write_bytes(content)
    load_weights(torch.nn.Linear(2, 2), folder / "weights.safetensors")


def as_published_checkpoint(folder, content, model):
    (folder / "model.pt").write_bytes(content)
    load_published(folder / "model.pt", {})


def as_pretrained_encoder(folder, content, model):
    from transformers import SegformerConfig

    SegformerConfig(hidden_sizes=[8] * 4, depths=[1] * 4, decoder_hidden_size=8).save_pretrained(folder / "hub")
    (folder / "hub" / "pytorch_model.bin").write_bytes(content)
    config = SegmentorConfig(architecture="transformers/segformer", encoder=str(folder / "hub"), weights="own")
    Segmentor.build(config, 3, seed=0)


@pytest.mark.parametrize("form", ["plain", "as torch.save has it"])
@pytest.mark.parametrize(
    "offer",
    [
        pytest.param(as_model(".safetensors"), id="a model, under the name of safetensors"),
        pytest.param(as_model(".bin"), id="a model, as .bin"),
        pytest.param(as_segmentor(".safetensors"), id="a segmentor, under the name of safetensors"),
        pytest.param(as_segmentor(".bin"), id="a segmentor, as .bin"),
        pytest.param(as_checkpoint, id="a checkpoint"),
        pytest.param(as_published_checkpoint, id="a published checkpoint"),
        pytest.param(as_pretrained_encoder, id="a pretrained encoder"),
    ],
)
def test_a_pickle_offered_as(offer, form, model, tmp_path):
    trace = tmp_path / "trace"
    if form == "plain":
        content = pickle.dumps(Evil(trace))
        pickle.loads(content).close()
    else:
        torch.save(Evil(trace), tmp_path / "evil.pt")
        content = (tmp_path / "evil.pt").read_bytes()
        torch.load(tmp_path / "evil.pt", weights_only=False).close()
    assert trace.exists(), "it would leave a trace, if it were opened"
    trace.unlink()
    with pytest.raises(TerraSynthError) as caught:
        offer(tmp_path, content, model)
    assert caught.value.fix
    assert not trace.exists()


# --- a full disk -----------------------------------------------------------------------------------------------------

LIMIT = 15_000
NOISE = RANDOM.integers(0, 256, (3, 128, 128), dtype=np.uint8)


@contextmanager
def full_disk():
    """No file may grow beyond LIMIT bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def painted(folder: Path, count: int = 1, plan=None) -> SyntheticWriter:
    writer = SyntheticWriter(folder, SCHEMA, plan=plan or {})
    for index in range(count):
        mask = torch.zeros(4, 4, dtype=torch.uint8)
        writer.add(f"{index:06d}", mask.expand(3, -1, -1), mask, {"seed": index, "prompt": "x" * 400})
    return writer


def png_file(folder):
    with atomic_write(folder / "file.png") as partial:
        Image.fromarray(NOISE.transpose(1, 2, 0)).save(partial)


def pillow_file(suffix):
    def write(folder):
        with atomic_write(folder / f"file{suffix}") as partial:
            Image.fromarray(NOISE.transpose(1, 2, 0)).save(partial, quality=95)

    return write


def raster(driver="GTiff", **options):
    def write(folder):
        with atomic_write(folder / "file.tif") as partial:
            write_tiff(partial, NOISE, driver, **options)

    return write


def raster_whose_end_alone_does_not_fit(folder):
    """GDAL writes the last strip when the file is closed, and does not say that it could not."""
    rows = LIMIT // (128 * 3) + 1
    with atomic_write(folder / "file.tif") as partial:
        write_tiff(partial, NOISE[:, :rows])


#: Writers, and the name of the file that the message must give.
WRITERS = {
    "PNG": (png_file, "file.png"),
    "JPEG, which Pillow cuts off in silence": (pillow_file(".jpg"), "file.jpg"),
    "TIFF by Pillow, which cuts it off in silence": (pillow_file(".tif"), "file.tif"),
    "TIFF by GDAL": (raster(), "file.tif"),
    "tiled and compressed TIFF": (raster(tiled=True, blockxsize=64, blockysize=64, compress="deflate"), "file.tif"),
    "cloud-optimised TIFF": (raster("COG"), "file.tif"),
    "TIFF by GDAL, cut off in silence": (raster_whose_end_alone_does_not_fit, "file.tif"),
    "JSON": (lambda folder: write_json(folder / "file.json", ["x" * 100] * 1000), "file.json"),
    "YAML": (
        lambda folder: LabelSchema(
            tuple(f"{i} " + "x" * 200 for i in range(200)), tuple((i, 0, 1) for i in range(200))
        ).to_yaml(folder / "file.yaml"),
        "file.yaml",
    ),
    "weights": (lambda folder: save_weights(folder / "file.safetensors", torch.nn.Linear(99, 99)), "file.safetensors"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_under_a_file_of(writer, tmp_path):
    write, name = WRITERS[writer]
    (tmp_path / name).write_bytes(b"what was there before")
    with full_disk(), pytest.raises(TerraSynthError, match=r"no space to write|can not write the file") as caught:
        write(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert (tmp_path / name).read_bytes() == b"what was there before"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    write(tmp_path)
    assert (tmp_path / name).stat().st_size > LIMIT, "it did not fit"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_full_disk_under_the_rows_of_a_dataset(tmp_path):
    painted(tmp_path / "set", 2).finish()
    writer = painted(tmp_path / "set", 60)
    before = contents(tmp_path / "set")
    with full_disk(), pytest.raises(TerraSynthError, match=r"(README\.md|metadata\.jsonl): no space to write"):
        writer.finish()
    assert contents(tmp_path / "set")["metadata.jsonl"] == before["metadata.jsonl"]
    assert writer.finish()
    assert (tmp_path / "set" / "metadata.jsonl").stat().st_size > LIMIT


def test_a_full_disk_under_a_painted_image(tmp_path):
    writer = painted(tmp_path / "set", 1)
    before = contents(tmp_path / "set")
    with full_disk(), pytest.raises(TerraSynthError, match=r"(images|masks)/000001\.png: no space to write"):
        writer.add("000001", torch.from_numpy(NOISE), torch.zeros(128, 128, dtype=torch.uint8), {})
    assert writer.done() == {"000000"}
    assert {name: content for name, content in contents(tmp_path / "set").items() if name in before} == before


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_under_an_export_to(to, tmp_path):
    painted(tmp_path / "set", 30).finish()
    export(tmp_path / "set", to, tmp_path / "out")
    before = contents(tmp_path / "out")
    writer = painted(tmp_path / "set", 31)
    writer.add("000031", torch.from_numpy(NOISE), torch.zeros(128, 128, dtype=torch.uint8), {})
    writer.finish()
    with full_disk(), pytest.raises(TerraSynthError, match=r"out: no space to write"):
        export(tmp_path / "set", to, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "set"}


def test_a_full_disk_under_a_model(model, layouts, tmp_path):
    segmentor(tmp_path / "segmentor")
    before = contents(tmp_path / "segmentor")
    with full_disk(), pytest.raises(TerraSynthError, match=r"segmentor(/config\.json)?: no space to write"):
        segmentor(tmp_path / "segmentor")
    assert contents(tmp_path / "segmentor") == before


def test_a_full_disk_under_a_report(tmp_path):
    from test_report import FULL, study

    write_json(tmp_path / "results.json", study(FULL))
    (tmp_path / "report.html").write_text("what was there before")
    with full_disk(), pytest.raises(TerraSynthError, match=r"report\.html: no space to write"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "what was there before"


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [0, 3, 6, 9, 11])
def test_generate_killed_after_so_many_files_goes_on_to_the_same_dataset(model, layouts, killed, tmp_path, files):
    """Training and studies have tests of their own: test_training.py and test_study.py."""

    def paint(folder):
        settings = {"sampling": SamplingConfig(steps=2, batch_size=2), "steering": SteeringConfig()}
        return generate(model, layouts, folder, count=4, license="cc0-1.0", **settings)

    expected = contents(paint(tmp_path / "whole"))
    assert killed(lambda: paint(tmp_path / "killed"), Path, "replace", files)
    assert not (tmp_path / "killed" / "metadata.jsonl").exists()
    assert contents(paint(tmp_path / "killed")) == expected
    assert len(json.loads((tmp_path / "killed/metadata.jsonl").read_text().splitlines()[0])) > 10
