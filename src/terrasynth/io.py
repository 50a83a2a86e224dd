"""Reading images within a pixel budget, and writing files that appear whole or not at all.

Every room reads pixels through `open_image` and writes through `atomic_write` or `atomic_dir`;
there is no second way.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from terrasynth.errors import TerraSynthError

if TYPE_CHECKING:
    import rasterio
    from rasterio.io import DatasetReader, DatasetWriter

if sys.platform != "win32":
    import fcntl

__all__ = [
    "IDENTITY_TAG",
    "IMAGE_SUFFIXES",
    "LOCK",
    "MAX_BYTES",
    "MAX_PIXELS",
    "TIFF_SUFFIXES",
    "Pixels",
    "alone",
    "atomic_dir",
    "atomic_write",
    "damaged_tiff",
    "digest",
    "file_digest",
    "full_disk",
    "gdal_environment",
    "new_tiff",
    "open_image",
    "open_tiff",
    "output_is_there",
    "read_json",
    "remove_incomplete",
    "tiff_class_names",
    "tiff_palette",
    "weights_digest",
    "write_json",
]

#: Largest image that is decoded in one piece; larger ones are read by windows.
MAX_PIXELS = 64 * 1024 * 1024
# Sixteen bytes hold four bands of 32 bits.
_BYTES_PER_PIXEL = 16
#: Most bytes that one image, one window or one block of a TIFF may decode to.
MAX_BYTES = MAX_PIXELS * _BYTES_PER_PIXEL
TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", *TIFF_SUFFIXES)
# A short list on purpose: Pillow and GDAL know dozens of formats nobody asked for, some of them remote or scripted.
_PILLOW_FORMATS = ("PNG", "JPEG")
_GDAL_DRIVER = "GTiff"
# A row of tiles of a wide scene, so that none of it is decoded twice.
_CACHE_MIB = 256
_COPY_AGAIN = "copy it again from its source, or leave it out"
_INCOMPLETE = ".incomplete"
#: Tag of a TIFF, or text of a PNG, that says what it was made of.
IDENTITY_TAG = "terrasynth_identity"
#: Of the file by which a process keeps others out of a folder.
LOCK = ".lock"
_RETIRED = f"{_INCOMPLETE}-old"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Bytes that need a new block of any file system.
_ROOM = 65536


@dataclass(frozen=True)
class Pixels:
    """Decoded pixels, as stored.

    Attributes:
        values: (H, W) for one band or palette indices, (H, W, C) otherwise; the file's own dtype.
        palette: (N, 3) uint8 colours when `values` are palette indices, else None.
        nodata: the value that a TIFF names for pixels without data, else None.
        class_names: what the values of its only band mean, as far as the tags of a TIFF say it.
    """

    values: np.ndarray
    palette: np.ndarray | None = None
    nodata: float | None = None
    class_names: Mapping[int, str] = field(default_factory=dict)


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode a PNG, JPEG or TIFF file as stored, without conversion.

    The size is checked from the header, before any pixel is decoded, for Pillow and rasterio alike.

    Raises:
        TerraSynthError: the file is missing, empty, no image, damaged, larger than `max_pixels` or than the memory.
    """
    path = _file_with_content(path)
    try:
        return (_read_tiff if path.suffix.lower() in TIFF_SUFFIXES else _open_pillow)(path, max_pixels)
    except MemoryError as error:
        raise TerraSynthError(
            "not enough memory to decode the image",
            path=path,
            found=f"a file of {path.stat().st_size:,} bytes",
            fix=f"if that is little, the file is damaged: {_COPY_AGAIN}. Otherwise cut it into tiles",
        ) from error


def _file_with_content(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise TerraSynthError("no such file", path=path, fix="check the path and the split list that names it")
    if path.stat().st_size == 0:
        raise TerraSynthError("the file is empty", path=path, fix=_COPY_AGAIN)
    return path


def _check_size(path: Path, width: int, height: int, max_pixels: int, bytes_per_pixel: int = 4) -> None:
    size = width * height * bytes_per_pixel
    if width * height > max_pixels or size > max_pixels * _BYTES_PER_PIXEL:
        raise TerraSynthError(
            "the image is too large to decode in one piece",
            path=path,
            found=f"{width} x {height} = {width * height:,} pixels, {size / 2**30:.1f} GiB decoded",
            expected=f"at most {max_pixels:,} pixels and {max_pixels * _BYTES_PER_PIXEL / 2**30:.1f} GiB",
            fix="cut it into tiles first",
        )


def _open_pillow(path: Path, max_pixels: int) -> Pixels:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Our own budget is checked below from the same header.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_PILLOW_FORMATS) as image:
                _check_size(path, *image.size, max_pixels)
                _check_depth(path, image.format)
                image.load()
                if image.mode == "1":
                    return Pixels(np.asarray(image).astype(np.uint8))
                if image.mode == "CMYK":
                    raise TerraSynthError(
                        "the image is CMYK", path=path, expected="RGB or grey", fix="convert it to RGB"
                    )
                palette = None
                if image.mode == "P":
                    palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
                return Pixels(np.asarray(image), palette)
    except Image.DecompressionBombError as error:
        raise TerraSynthError(
            "the image is too large to decode in one piece", path=path, found=str(error), fix="cut it into tiles first"
        ) from error
    except UnidentifiedImageError as error:
        raise TerraSynthError(
            "not an image that can be read",
            path=path,
            found=f"a file that starts with {path.open('rb').read(8)!r}",
            expected="PNG, JPEG or TIFF content",
            fix="check what the file really is (`file NAME`) and convert it",
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # what a decoder says has no number
            raise TerraSynthError(
                "the file can not be read", path=path, found=error.strerror, fix="check its permissions and the disk"
            ) from error
        raise TerraSynthError(
            "the image is damaged",
            path=path,
            found=str(error),
            fix=_COPY_AGAIN,
        ) from error


def _check_depth(path: Path, file_format: str | None) -> None:
    """Refuse 16-bit colour PNGs: Pillow would drop the lower byte of every value without a word."""
    if file_format != "PNG":
        return
    with path.open("rb") as file:
        depth, color_type = file.read(26)[24:]
    if depth == 16 and color_type != 0:
        raise TerraSynthError(
            "a 16-bit colour PNG can not be read",
            path=path,
            found="16 bits per band",
            expected="8 bits per band, or TIFF",
            fix="convert it to 8 bits, with one range for all tiles, or to TIFF",
        )


def gdal_environment() -> rasterio.Env:
    """GDAL with a cache of fixed size, unless GDAL_CACHEMAX says otherwise: its own takes a share of all memory."""
    import rasterio

    return rasterio.Env(**({} if "GDAL_CACHEMAX" in os.environ else {"GDAL_CACHEMAX": _CACHE_MIB}))


@contextmanager
def open_tiff(path: str | Path) -> Iterator[DatasetReader]:
    """Open a local TIFF with rasterio; nothing is decoded yet. GDAL's other drivers and remote paths are off.

    What goes wrong inside the `with` need not be the file's fault: read it under `damaged_tiff`.

    Raises:
        TerraSynthError: the file is missing, empty or no TIFF.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    path = _file_with_content(path)
    with gdal_environment():
        with damaged_tiff(path), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            source = rasterio.open(path.absolute(), driver=_GDAL_DRIVER)
        with source:
            yield source


@contextmanager
def damaged_tiff(path: Path) -> Iterator[None]:
    """Turn what rasterio raises where a TIFF can not be read into an error that names `path`."""
    from rasterio.errors import RasterioError

    try:
        yield
    except RasterioError as error:
        raise TerraSynthError(
            "the TIFF can not be read",
            path=path,
            # rasterio chains what GDAL said.
            found=str(error.__cause__ or error),
            fix=_COPY_AGAIN,
        ) from error


def _read_tiff(path: Path, max_pixels: int) -> Pixels:
    with open_tiff(path) as source:
        # Complex integers are NumPy's complex64.
        dtypes = ["complex64" if dtype == "complex_int16" else dtype for dtype in source.dtypes]
        bytes_per_pixel = sum(np.dtype(dtype).itemsize for dtype in dtypes)
        _check_size(path, source.width, source.height, max_pixels, bytes_per_pixel)
        with damaged_tiff(path):
            bands = source.read()
        palette, nodata, names = tiff_palette(source), source.nodata, tiff_class_names(source)
    return Pixels(bands[0] if bands.shape[0] == 1 else np.moveaxis(bands, 0, -1), palette, nodata, names)


@contextmanager
def new_tiff(path: str | Path, **profile: Any) -> Iterator[DatasetWriter]:
    """Create a GeoTIFF of `profile`, as rasterio takes it, at a path from `atomic_write`; it may lie nowhere."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with gdal_environment():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            target = rasterio.open(path, "w", driver=_GDAL_DRIVER, **profile)
        with target:
            yield target


def output_is_there(path: Path, identity: str) -> bool:
    """Whether a TIFF or PNG exists; it has to carry this identity, as a tag or text `IDENTITY_TAG`.

    Raises:
        TerraSynthError: it exists and was made of something else.
    """
    if not path.exists():
        return False
    if _identity(path) != identity:
        raise TerraSynthError(
            "the output exists, and was made of something else",
            path=path,
            expected="no such file, or one that the same command wrote",
            fix="choose another --out, or delete it",
        )
    return True


def _identity(path: Path) -> str | None:
    if path.suffix.lower() in TIFF_SUFFIXES:
        with open_tiff(path) as source:
            return source.tags().get(IDENTITY_TAG)
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.info.get(IDENTITY_TAG)
    except (OSError, SyntaxError, ValueError):  # no PNG, or a damaged one
        return None


def tiff_palette(source: DatasetReader) -> np.ndarray | None:
    """The colours of a TIFF whose only band holds palette indices, (N, 3) uint8; else None."""
    from rasterio.enums import ColorInterp

    if source.count != 1 or source.colorinterp[0] is not ColorInterp.palette:
        return None
    table = source.colormap(1)
    return np.array([table[i][:3] for i in range(len(table))], dtype=np.uint8)


def tiff_class_names(source: DatasetReader) -> dict[int, str]:
    """What the values of a TIFF's only band mean, by its tags, as `terrasynth predict` writes them."""
    tags = source.tags(1) if source.count == 1 else {}
    return {int(key.removeprefix("class_")): name for key, name in tags.items() if re.fullmatch(r"class_\d{1,3}", key)}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk(path: str | Path, partial: Path | None = None) -> Iterator[None]:
    """Turn what a full disk ends in, which each library words in its own way, into an error that names `path`.

    Args:
        path: what is written.
        partial: the file or folder that is written to until it becomes `path`.
    """
    try:
        yield
    except TerraSynthError:
        raise
    except Exception as error:
        # safetensors tells the number in its text only, and GDAL not at all.
        told = re.search(r"os error (\d+)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        full = number in _FULL or (partial is not None and not _has_room(partial))
        # Its driver for cloud-optimised files has deleted them by now, so that there is room again.
        if not full and not type(error).__module__.startswith("rasterio"):
            raise
        raise TerraSynthError(
            "no space to write" if full else "GDAL can not write the file",
            # By the name that it would have had: a file may lie in a folder that is itself incomplete.
            path=re.sub(rf"{re.escape(_INCOMPLETE)}-\d+", "", str(path)),
            found=os.strerror(number) if number in _FULL else str(error),
            fix=f"{'free some' if full else 'look for'} space and run again; what was there before is unchanged",
        ) from error


def _has_room(partial: Path) -> bool:
    try:
        if partial.is_dir():
            with tempfile.TemporaryFile(dir=partial) as file:
                file.write(bytes(_ROOM))
        elif partial.is_file():
            _refuse_torn(partial)
    except OSError as error:
        return error.errno not in _FULL
    return True


def _refuse_torn(path: Path) -> None:
    """Raise if a file can not grow: where the disk is full, GDAL and Pillow may cut a TIFF or JPEG off in silence."""
    if path.stat().st_nlink > 1:  # a link to a finished file, which must not change even for a moment
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        try:
            grown = os.write(descriptor, bytes(_ROOM))
        finally:
            os.ftruncate(descriptor, size)
        if grown < _ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a sibling path to write to; on success it replaces `path` in one step, on failure `path` stays as it was.

    Args:
        path: the file.
        durable: wait for the disk, so that a power failure does not undo it. With thousands of small files that takes
            most of the time; without it, whoever goes on from such files has to see whether they decode.

    Raises:
        TerraSynthError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: Pillow, rasterio and numpy choose the format by it.
    partial = path.with_name(f"{path.stem}{_INCOMPLETE}-{os.getpid()}{path.suffix}")
    try:
        with full_disk(path, partial):
            # Some libraries make files that only their owner may read (safetensors); these keep the usual permissions.
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)
            _refuse_torn(partial)
            if durable:
                _fsync(partial)
            partial.replace(path)
            if durable:
                _fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield a new sibling folder to fill; on success it becomes `path`, on failure nothing is left.

    A folder already at `path` is replaced only after the new one is complete.

    Raises:
        TerraSynthError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{_INCOMPLETE}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    readable = partial.stat().st_mode & 0o666
    try:
        with full_disk(path, partial):
            yield partial
            # Together they share the commits of the disk: of a thousand small files, in a tenth of the time.
            with ThreadPoolExecutor(16) as pool:
                for _ in pool.map(lambda inside: _settle(inside, readable), list(partial.rglob("*"))):
                    pass
            _fsync(partial)
            if path.is_dir():
                retired = path.with_name(f"{path.name}{_RETIRED}-{os.getpid()}")
                # A run killed between these two renames leaves no `path`; `remove_incomplete` brings the old one back.
                path.replace(retired)
                partial.replace(path)
                shutil.rmtree(retired)
            else:
                partial.replace(path)
            _fsync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settle(path: Path, readable: int) -> None:
    if path.is_file():
        path.chmod(readable)
        _refuse_torn(path)
    _fsync(path)


@contextmanager
def alone(folder: Path, busy: TerraSynthError) -> Iterator[None]:
    """Keep other processes out of a folder; the system unlocks it when this process ends, however it ends.

    Args:
        folder: gets a file `LOCK`, which may be deleted only in here, and the folder with it.
        busy: raised if another process is in there.
    """
    try:
        file = (folder / LOCK).open("a")
    except FileNotFoundError as error:  # deleted with its folder, by who was here until now
        raise busy from error
    with file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise busy from error
            except OSError as error:
                warnings.warn(
                    f"{folder} can not be locked ({error.strerror}): start no second run with this --out", stacklevel=3
                )
            if os.fstat(file.fileno()).st_nlink == 0:  # deleted since it was opened, by who was here until now
                raise busy
        yield


def remove_incomplete(folder: str | Path, name: str | None = None, suffix: str = "") -> None:
    """Delete what a killed run left half-written directly in `folder`, and bring back what it was about to replace.

    Args:
        folder: where to look; one that is not there has nothing.
        name: without suffix, of the one file or folder whose leftovers go, where others may be at work beside it; None
            takes all.
        suffix: of that file, where one of another suffix may be written beside it.
    """
    stem, ending = "*" if name is None else glob.escape(name), f"{glob.escape(suffix)}*" if suffix else ""
    for leftover in Path(folder).glob(f"{stem}{_INCOMPLETE}-*{ending}"):
        target = leftover.with_name(leftover.name.partition(_INCOMPLETE)[0])
        if f"{_RETIRED}-" in leftover.name and not target.exists():
            leftover.replace(target)
        elif leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, *, fix: str = "delete it and run again") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        fix: what to do if it is not JSON; by default as for a file that TerraSynth wrote.

    Raises:
        TerraSynthError: the file is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TerraSynthError("no such file", path=path, fix="check the path") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TerraSynthError("not a JSON file", path=path, found=str(error), fix=fix) from error


def digest(*values: Any) -> str:
    """Short SHA-256 (16 hex digits) of JSON-able values; equal values give equal digests on every machine."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """Short SHA-256 (16 hex digits) of what a file holds."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def weights_digest(folder: str | Path) -> str:
    """Digest of all safetensors files under a folder and their names: which model this is, wherever it lies."""
    hashes = []
    for path in sorted(Path(folder).rglob("*.safetensors")):
        with path.open("rb") as file:
            hashes.append([path.relative_to(folder).as_posix(), hashlib.file_digest(file, "sha256").hexdigest()])
    return digest(hashes)
