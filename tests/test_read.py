"""Every coding of a mask survives its file, and no file, however broken, ends in anything but pixels or a message."""

from __future__ import annotations

import io
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.io import MemoryFile

from terrasynth.data.read import read_image, read_mask
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.io import open_image

RANDOM = np.random.default_rng(0)
GIB = 2**30


def png(pixels: np.ndarray | Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, colormap=None, **options) -> bytes:
    bands = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
    with MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with memory.open(driver="GTiff", **shape, **options) as file:
            file.write(bands)
            if colormap is not None:
                file.write_colormap(1, dict(enumerate(map(tuple, colormap.tolist()))))
        return memory.read()


def indexed(values: np.ndarray, palette: np.ndarray) -> Image.Image:
    picture = Image.fromarray(values)
    picture.putpalette(palette.tobytes())
    return picture


# --- codings through files -------------------------------------------------------------------------------------------


@st.composite
def schemas_and_masks(draw: st.DrawFn) -> tuple[LabelSchema, np.ndarray]:
    """Any colours, greys and black among them, and any place for unlabelled pixels."""
    count = draw(st.integers(2, 12) | st.just(255))
    value = st.integers(0, 255)
    channels = st.tuples(value, value, value) | value.map(lambda grey: (grey,) * 3)
    extra = draw(st.integers(1, 3))
    if count == 255:
        colors = [(index, 255 - index, 7) for index in range(255)] + [(7, 7, index) for index in range(extra)]
    else:
        colors = draw(st.lists(channels, min_size=count + extra, max_size=count + extra, unique=True))
    names = tuple(f"class {index}" for index in range(count))
    ignore_index = draw(st.integers(count, 255))
    schema = LabelSchema(names, tuple(colors[:count]), ignore_index, tuple(colors[count:]))
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    values = st.sampled_from([*range(count), ignore_index])
    mask = draw(st.lists(values, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return schema, np.array(mask, np.uint8).reshape(shape)


def shuffled(schema: LabelSchema, mask: np.ndarray) -> Image.Image:
    """A palette in another order than the classes."""
    colors, values = np.unique(schema.to_color(mask).reshape(-1, 3), axis=0, return_inverse=True)
    return indexed(values.reshape(mask.shape).astype(np.uint8), colors)


FILES = {
    "index.png": ("index", lambda schema, mask: png(mask)),
    "index-16.png": ("index", lambda schema, mask: png(mask.astype(np.uint16))),
    "index.tif": ("index", lambda schema, mask: tiff(mask)),
    "index-i2.tif": ("index", lambda schema, mask: tiff(mask.astype(np.int16), compress="deflate")),
    "palette.png": ("index", lambda schema, mask: png(indexed(mask, schema.palette()))),
    "palette.tif": ("index", lambda schema, mask: tiff(mask, schema.palette())),
    "palette-by-colour.png": ("color", lambda schema, mask: png(indexed(mask, schema.palette()))),
    "palette-by-colour.tif": ("color", lambda schema, mask: tiff(mask, schema.palette())),
    "shuffled.png": ("color", lambda schema, mask: png(shuffled(schema, mask))),
    "colour.png": ("color", lambda schema, mask: png(schema.to_color(mask))),
    "colour.tif": ("color", lambda schema, mask: tiff(schema.to_color(mask), compress="lzw")),
    "grey.png": (
        "grey",
        lambda schema, mask: png(((schema.to_grey(torch.from_numpy(mask))[0] + 1) * 127.5).round().byte().numpy()),
    ),
}


@pytest.mark.parametrize("name", FILES)
@settings(deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema_and_mask=schemas_and_masks())
def test_a_mask_comes_back_from_every_kind_of_file(tmp_path, name, schema_and_mask):
    schema, mask = schema_and_mask
    coding, encode = FILES[name]
    path = tmp_path / name
    path.write_bytes(encode(schema, mask))
    for chosen in ("auto", *([] if coding == "grey" else [coding])):
        read = read_mask(path, schema, chosen)[coding]
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, mask)


@settings(deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema_and_mask=schemas_and_masks(), wrong=st.integers(0, 255))
def test_a_value_that_is_no_class_never_becomes_one(tmp_path, schema_and_mask, wrong):
    schema, mask = schema_and_mask
    assume(schema.num_classes <= wrong != schema.ignore_index)
    mask.flat[0] = wrong
    (tmp_path / "a.png").write_bytes(png(mask))
    with pytest.raises(TerraSynthError, match=rf"{wrong} \(1 px\)"):
        read_mask(tmp_path / "a.png", schema, "index")


# --- masks of other classes ------------------------------------------------------------------------------------------

LAND = LabelSchema(("land", "road", "water"), ((60, 16, 152), (110, 193, 228), (226, 169, 41)))
FOREIGN = (17, 34, 51)


def palette_of(*colors: tuple[int, int, int]) -> np.ndarray:
    return np.array(colors, dtype=np.uint8)


@pytest.mark.parametrize("encode", [lambda m, p: png(indexed(m, p)), tiff], ids=["png", "tif"])
def test_a_palette_with_the_colour_of_another_class_is_refused_and_both_readings_are_shown(tmp_path, encode):
    path = tmp_path / ("a.tif" if encode is tiff else "a.png")
    path.write_bytes(encode(np.array([[0, 1, 2]], np.uint8), palette_of(LAND.colors[1], FOREIGN, LAND.colors[2])))
    with pytest.raises(TerraSynthError, match="contradicts its values") as caught:
        read_mask(path, LAND, "auto")
    assert caught.value.found == (
        "as class indices: 0 = land, 1 = road, 2 = water; by their colours: 0 = road, 1 = none (#112233), 2 = water"
    )
    assert "mask_coding: index" in caught.value.fix
    np.testing.assert_array_equal(read_mask(path, LAND, "index")["index"], [[0, 1, 2]])


@pytest.mark.parametrize(
    "palette",
    [
        RANDOM.integers(0, 256, (256, 3), dtype=np.uint8),
        np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1),
        # The colour of another class, of a value that does not occur, and of the unlabelled one.
        np.array([FOREIGN] * 3 + [LAND.colors[0]] * 253, dtype=np.uint8),
        np.array([LAND.colors[0]] + [FOREIGN] * 255, dtype=np.uint8),
    ],
    ids=["random", "grey", "elsewhere", "partly"],
)
def test_a_palette_that_says_nothing_leaves_class_indices(tmp_path, palette):
    mask = np.array([[0, 1, 2, 255]], np.uint8)
    (tmp_path / "a.png").write_bytes(png(indexed(mask, palette)))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", LAND, "auto")["index"], mask)


def named_tiff(path: Path, mask: np.ndarray, names: dict[int, str], colormap=None) -> Path:
    """With the tags of `terrasynth predict`."""
    path.write_bytes(tiff(mask, colormap))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = rasterio.open(path, "r+")
    with file:
        file.update_tags(1, **{f"class_{value}": name for value, name in names.items()})
    return path


def test_names_of_other_classes_in_the_tags_are_refused_and_both_readings_are_shown(tmp_path):
    path = named_tiff(tmp_path / "a.tif", np.array([[0, 2, 255]], np.uint8), {0: "building", 1: "road", 2: "water"})
    with pytest.raises(TerraSynthError, match="names of the classes") as caught:
        read_mask(path, LAND, "auto")
    assert caught.value.found == "in the file: 0 = building, 2 = water; in the label schema: 0 = land, 2 = water"
    np.testing.assert_array_equal(read_mask(path, LAND, "index")["index"], [[0, 2, 255]])


def test_names_of_the_same_classes_or_of_values_that_do_not_occur_are_no_matter(tmp_path):
    mask = np.array([[0, 2, 255]], np.uint8)
    path = named_tiff(tmp_path / "a.tif", mask, {0: "Land", 1: "street", 2: "water", 3: "tree"})
    np.testing.assert_array_equal(read_mask(path, LAND, "auto")["index"], mask)


def test_names_decide_between_two_readings(tmp_path):
    """Colours in another order than the classes: alone they are as good as the indices."""
    mask, palette = np.array([[0, 1]], np.uint8), palette_of(LAND.colors[1], LAND.colors[0])
    path = named_tiff(tmp_path / "a.tif", mask, {}, palette)
    assert set(read_mask(path, LAND, "auto")) == {"index", "color"}
    path = named_tiff(tmp_path / "a.tif", mask, {0: "road", 1: "land"}, palette)
    assert {coding: mask.tolist() for coding, mask in read_mask(path, LAND, "auto").items()} == {"color": [[1, 0]]}


# --- broken files ----------------------------------------------------------------------------------------------------

RGB = RANDOM.integers(0, 256, (24, 32, 3), dtype=np.uint8)
MASK = RANDOM.integers(0, 3, (24, 32), dtype=np.uint8)
PALETTE = np.arange(9, dtype=np.uint8).reshape(3, 3)
SCHEMA = LabelSchema(("a", "b", "c"), ((0, 1, 2), (3, 4, 5), (6, 7, 8)), 255, ((9, 9, 9),))

WHOLE = [
    (".png", png(RGB)),
    (".png", png(MASK)),
    (".png", png(np.dstack([RGB, MASK]))),
    (".png", png(np.dstack([MASK, MASK]))),
    (".png", png(MASK.astype(np.uint16) * 9999)),
    (".png", png(indexed(MASK, PALETTE), bits=2)),
    (".png", png(Image.fromarray(MASK > 1))),
    (".jpg", png(RGB, "JPEG")),
    (".jpg", png(MASK, "JPEG")),
    (".jpeg", png(RGB, "JPEG", progressive=True)),
    (".jpg", png(Image.fromarray(RGB).convert("CMYK"), "JPEG")),
    (".tif", tiff(RGB)),
    (".tif", tiff(MASK)),
    (".tif", tiff(MASK, PALETTE)),
    (".tif", tiff(RGB, compress="lzw")),
    (".tif", tiff(RGB, compress="deflate", tiled=True, blockxsize=16, blockysize=16)),
    (".tif", tiff(RGB, compress="jpeg", photometric="ycbcr")),
    (".tif", tiff(MASK, nbits=2)),
    (".tiff", tiff(MASK.astype(np.float32))),
    (".tif", tiff(MASK.astype(np.complex64))),
    (".tif", tiff(MASK.astype(np.uint16), compress="deflate", predictor=2)),
    (".tif", png(Image.fromarray(MASK > 1), "TIFF", compression="group4")),
]


@st.composite
def broken_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A whole file cut short, with a piece missing, or with some bytes changed, mostly in its header; or no image."""
    suffix, content = draw(st.sampled_from(WHOLE))
    data = bytearray(content)
    damage = draw(st.sampled_from(["cut", "gap", "bits", "header", "end", "noise", "suffix"]))
    place = st.integers(0, len(data) - 1)
    if damage == "cut":
        del data[draw(place) :]
    elif damage == "gap":
        start, end = sorted((draw(place), draw(place)))
        del data[start:end]
    elif damage == "noise":
        data = bytearray(draw(st.binary(max_size=64)))
    elif damage == "suffix":
        suffix = draw(st.sampled_from([".png", ".jpg", ".jpeg", ".tif", ".tiff", ".PNG", ".TIF"]))
    else:
        reach = {"bits": place, "header": st.integers(0, min(len(data), 200) - 1)}
        where = reach.get(damage, st.integers(max(0, len(data) - 300), len(data) - 1))
        for position in draw(st.lists(where, min_size=1, max_size=4)):
            data[position] ^= draw(st.integers(1, 255))
    return suffix, bytes(data)


@pytest.fixture
def one_more_gib():
    """No more than a GiB of memory beyond what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(read, path):
    """What reading gives, or what it is refused with; no other exception passes."""
    try:
        return read(path), None
    except TerraSynthError as error:
        return None, error


@settings(
    deadline=None, derandomize=True, max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(file=broken_files())
def test_a_broken_file_is_pixels_or_one_clear_message(tmp_path, one_more_gib, file):
    suffix, content = file
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    for read in (open_image, read_image, lambda path: read_mask(path, SCHEMA, "auto")):
        result, error = outcome(read, path)
        if error is not None:
            assert str(path) in str(error)
            assert error.fix
            continue
        arrays = result.values() if isinstance(result, dict) else [getattr(result, "values", result)]
        assert all(isinstance(array, np.ndarray) and array.size for array in arrays)


@pytest.mark.parametrize("index", range(len(WHOLE)))
def test_the_files_that_were_broken_were_whole(tmp_path, index):
    suffix, content = WHOLE[index]
    path = tmp_path / f"whole{suffix}"
    path.write_bytes(content)
    pixels, error = outcome(open_image, path)
    if error is not None:
        assert error.problem == "the image is CMYK"
        return
    if suffix.startswith(".tif"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with rasterio.open(path) as file:
                expected = file.read().transpose(1, 2, 0).squeeze()
    else:
        expected = np.asarray(Image.open(path))
    np.testing.assert_array_equal(pixels.values, expected)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_file_that_asks_for_more_than_the_memory_is_named(tmp_path, one_more_gib):
    content = bytearray(png(RGB))
    # The length of the first chunk of pixels: 2 GiB.
    start = content.index(b"IDAT") - 4
    content[start : start + 4] = (2**31 - 1).to_bytes(4, "big")
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(TerraSynthError, match=r"a\.png: (not enough memory|the image is damaged)"):
        open_image(path)
