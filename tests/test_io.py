"""Reading within a budget, writing whole or not at all."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import rasterio
from PIL import Image

from terrasynth.errors import TerraSynthError
from terrasynth.io import (
    MAX_PIXELS,
    atomic_dir,
    atomic_write,
    digest,
    open_image,
    open_tiff,
    read_json,
    remove_incomplete,
    write_json,
)

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, color_type: int, data: bytes) -> bytes:
    """A PNG from its parts, for headers that no encoder would write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def tiff(path, *, width=64, height=48, count=3, dtype="uint8", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rasterio.open(path, "w", driver="GTiff", width=width, height=height, count=count, dtype=dtype, **options)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 3), (48, 64, 4), (48, 64, 2)])
def test_a_png_is_read_as_stored(tmp_path, shape):
    pixels = RANDOM.integers(0, 256, shape, dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encoded(pixels, "PNG"))
    read = open_image(tmp_path / "a.png")
    np.testing.assert_array_equal(read.values, pixels)
    assert read.palette is None


def test_a_jpeg_is_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(np.full((8, 8, 3), 77, np.uint8), "JPEG"))
    np.testing.assert_array_equal(open_image(tmp_path / "a.jpg").values, 77)


def test_a_palette_png_keeps_indices_and_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 2]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png")
    read = open_image(tmp_path / "a.png")
    np.testing.assert_array_equal(read.values, [[0, 1], [2, 2]])
    np.testing.assert_array_equal(read.palette[:3], [[10, 20, 30], [40, 50, 60], [70, 80, 90]])


def test_a_16_bit_grey_png_keeps_its_values(tmp_path):
    pixels = RANDOM.integers(0, 65536, (5, 7), dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = open_image(tmp_path / "a.png").values
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, pixels)


def test_a_16_bit_colour_png_is_refused_rather_than_halved(tmp_path):
    (tmp_path / "a.png").write_bytes(png(2, 2, 16, 2, b"".join(b"\0" + bytes(range(12)) for _ in range(2))))
    with pytest.raises(TerraSynthError, match="16-bit"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_tiff_is_read_as_stored(tmp_path, dtype, count):
    bands = RANDOM.integers(0, 250, (count, 48, 64)).astype(dtype)
    with tiff(tmp_path / "a.tif", count=count, dtype=dtype) as file:
        file.write(bands)
    expected = bands[0] if count == 1 else bands.transpose(1, 2, 0)
    read = open_image(tmp_path / "a.tif").values
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, expected)


def test_a_palette_tiff_keeps_indices_and_colours(tmp_path):
    with tiff(tmp_path / "a.tif", width=2, height=1, count=1) as file:
        file.write(np.array([[[0, 1]]], np.uint8))
        file.write_colormap(1, {0: (1, 2, 3, 255), 1: (4, 5, 6, 255)})
    read = open_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(read.values, [[0, 1]])
    np.testing.assert_array_equal(read.palette[:2], [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jpg", encoded(RGB, "JPEG")[:900], "damaged"),
        ("cut.png", encoded(RGB, "PNG")[:900], "damaged"),
        ("empty.png", b"", "empty"),
        ("empty.tif", b"", "empty"),
        ("text.png", b"not an image", "not an image"),
        ("text.tif", b"not an image", "can not be read"),
        ("gif.png", encoded(RGB[..., 0], "GIF"), "not an image"),
        ("png.tif", encoded(RGB, "PNG"), "can not be read"),
    ],
)
def test_what_is_no_whole_image_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TerraSynthError, match=message) as caught:
        open_image(tmp_path / name)
    assert name in str(caught.value)
    assert caught.value.fix


def test_a_cut_tiff_is_named(tmp_path):
    with tiff(tmp_path / "a.tif") as file:
        file.write(RGB.transpose(2, 0, 1))
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TerraSynthError, match="can not be read"):
        open_image(tmp_path / "a.tif")


def test_a_missing_file_and_a_folder_are_no_file(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(TerraSynthError, match="no such file"):
            open_image(path)


@pytest.mark.parametrize("side", [8193, 20_000, 200_000])
def test_a_png_bomb_is_refused_from_its_header(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png(side, side, 8, 2, bytes(1000)))
    with pytest.raises(TerraSynthError, match="too large"):
        open_image(tmp_path / "bomb.png")


def test_a_sparse_tiff_is_refused_from_its_header(tmp_path):
    tiff(tmp_path / "bomb.tif", width=100_000, height=100_000, tiled=True, SPARSE_OK=True).close()
    assert (tmp_path / "bomb.tif").stat().st_size < 10**7
    with pytest.raises(TerraSynthError, match="too large"):
        open_image(tmp_path / "bomb.tif")


def test_many_wide_bands_count_against_the_budget(tmp_path):
    tiff(tmp_path / "cube.tif", width=4000, height=4000, count=40, dtype="float64", tiled=True, SPARSE_OK=True).close()
    assert MAX_PIXELS > 4000 * 4000
    with pytest.raises(TerraSynthError, match="too large"):
        open_image(tmp_path / "cube.tif")


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with atomic_write(path) as partial:
        assert partial.suffix == ".txt"
        partial.write_text("old")
        assert not path.exists()
    assert path.read_text() == "old"

    def interrupted() -> None:
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_tiff_is_not_blamed_for_what_fails_beside_it(tmp_path):
    path = tmp_path / "a.tif"
    tiff(path).close()
    with pytest.raises(rasterio.errors.RasterioIOError), open_tiff(path):
        rasterio.open(tmp_path / "nowhere" / "b.tif", "w", driver="GTiff", width=1, height=1, count=1, dtype="uint8")


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    script = """
import resource, sys
from terrasynth.io import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
with atomic_write(sys.argv[1]) as partial:
    partial.write_bytes(bytes(1_000_000))
"""
    run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "TerraSynthError" in run.stderr
    assert "no space to write" in run.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_only_by_a_complete_one(tmp_path):
    path = tmp_path / "folder"
    with atomic_dir(path) as partial:
        (partial / "a").write_text("old")

    def interrupted() -> None:
        with atomic_dir(path) as partial:
            (partial / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path / "a").read_text() == "old"
    with atomic_dir(path) as partial:
        (partial / "b").write_text("new")
    assert [p.name for p in path.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_folder_survives_a_kill_between_the_renames_that_replace_it(tmp_path, renames):
    path = tmp_path / "folder"
    with atomic_dir(path) as partial:
        (partial / "a").write_text("old")
    script = f"""
import os, signal, sys
from pathlib import Path
from terrasynth.io import atomic_dir
rename, count = Path.replace, 0
def replace(self, target):
    global count
    if count == {renames}:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    return rename(self, target)
Path.replace = replace
with atomic_dir(sys.argv[1]) as partial:
    (partial / "a").write_text("new")
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", script, path], check=False)
    assert run.returncode == -signal.SIGKILL
    remove_incomplete(tmp_path)
    assert (path / "a").read_text() == ("new" if renames == 2 else "old")
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_go_and_nothing_else(tmp_path):
    (tmp_path / f"a.incomplete-{os.getpid()}.png").write_text("half")
    (tmp_path / "b.incomplete-7").mkdir()
    (tmp_path / "kept.png").write_text("whole")
    remove_incomplete(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.png"]


def test_json_round_trips_and_refuses_nan(tmp_path):
    value = {"b": [1, 2.5, None], "a": "größe"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(TerraSynthError, match=r"not a JSON file[\s\S]*delete it and run again"):
        read_json(tmp_path / "a.json")
    with pytest.raises(TerraSynthError, match="draw it again"):
        read_json(tmp_path / "a.json", fix="draw it again")


def test_digests_depend_on_values_not_on_key_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(1, 2) != digest(12)
    assert len(digest("x")) == 16
