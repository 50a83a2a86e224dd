"""What a segmentor found in the samples of a synthetic dataset, kept beside them so that it is asked only once.

    scores/classes.json    the segmentor, and what it does on real tiles of each class
    scores/ID.png          8 bits a pixel: its loss relative to the mean of the pixel's class on real tiles
    metadata.jsonl         the numbers of each sample, as `curation` of its row

A code counts the multiples of 1/64 of the class's mean that the loss is above::

    code = |{ k in 0 ... 254 : loss > k/64 · L_c }|

so `code > 64 m` says exactly whether the loss is above m times the mean, for every m = 0, 1/64, ..., 254/64. Unlabelled
pixels, and those of classes that real tiles do not have, get 0: nothing is above.

The numbers travel inside the PNG, with digests of what they are about, so that rows are put together again whenever the
dataset grows, and never from the scores of another segmentor or of a sample that was painted anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_write, digest, file_digest, open_image, read_json, write_json

__all__ = [
    "AGAIN",
    "PNG_KEY",
    "STEPS",
    "ClassStatistics",
    "add_scores",
    "busy",
    "read_codes",
    "read_png_row",
    "read_score",
    "write_score",
]

#: Codes per multiple of a class's mean loss.
STEPS = 64
#: Of the text chunk of a PNG that holds JSON about it.
PNG_KEY = "terrasynth"
_KEY = "curation"
#: What adds missing scores.
AGAIN = "terrasynth curate DATASET --segmentor DIR --real RECIPE"


def busy(dataset: Path) -> TerraSynthError:
    """What is raised while another process scores a dataset, or makes a view of it."""
    return TerraSynthError("another process is curating this dataset", path=dataset, fix="wait until it is over")


@dataclass(frozen=True)
class ClassStatistics:
    """What a segmentor does on the real training tiles.

    Attributes:
        segmentor: digest of its weights.
        real: fingerprint of the tiles.
        classes: K names.
        pixels: how many labelled pixels of each class the tiles have.
        mean_losses: the mean cross-entropy over these; infinite for a class without any.
    """

    segmentor: str
    real: str
    classes: tuple[str, ...]
    pixels: tuple[int, ...]
    mean_losses: tuple[float, ...]

    @cached_property
    def key(self) -> str:
        """Digest of all of this: scores of equal keys may be compared."""
        return digest(self._plain())

    def _plain(self) -> dict[str, Any]:
        # Infinity is not JSON.
        return asdict(self) | {"mean_losses": [None if math.isinf(loss) else loss for loss in self.mean_losses]}

    def write(self, dataset: Path) -> None:
        """Keep it in a dataset."""
        write_json(_classes_file(dataset), self._plain())

    @classmethod
    def read(cls, dataset: Path) -> ClassStatistics | None:
        """That of a dataset; None if it has no scores.

        Raises:
            TerraSynthError: the file is damaged.
        """
        path = _classes_file(dataset)
        if not path.is_file():
            return None
        again = f"delete {path.parent} and run `{AGAIN}`"
        values = read_json(path, fix=again)
        try:
            losses = [math.inf if loss is None else float(loss) for loss in values.pop("mean_losses")]
            classes, pixels = tuple(values.pop("classes")), tuple(values.pop("pixels"))
            return cls(**values, classes=classes, pixels=pixels, mean_losses=tuple(losses))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TerraSynthError(
                "the class statistics are damaged", path=path, found=repr(error), fix=again
            ) from error


def _classes_file(dataset: Path) -> Path:
    return dataset / "scores" / "classes.json"


def _score_file(dataset: Path, id: str) -> Path:
    return dataset / "scores" / f"{id}.png"


def _sample_digest(dataset: Path, id: str) -> str:
    return digest(*(file_digest(dataset / kind / f"{id}.png") for kind in ("images", "masks")))


def read_png_row(path: Path) -> dict[str, Any] | None:
    """The JSON inside a PNG that TerraSynth wrote; None if it has none, or is damaged before its pixels."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return dict(json.loads(image.info[PNG_KEY]))
    except (UnidentifiedImageError, OSError, SyntaxError, KeyError, TypeError, ValueError):
        return None


def write_score(
    dataset: Path, id: str, codes: NDArray[np.uint8], numbers: Mapping[str, Any], statistics: ClassStatistics
) -> None:
    """Keep the codes (H, W) and the JSON-able numbers of one sample; they appear together."""
    about = {"statistics": statistics.key, "sample": _sample_digest(dataset, id)}
    text = PngInfo()
    text.add_text(PNG_KEY, json.dumps({**about, **numbers}, allow_nan=False))
    # Not durable: what a power failure leaves is checked when it is read, and computed again.
    with atomic_write(_score_file(dataset, id), durable=False) as partial:
        Image.fromarray(codes).save(partial, pnginfo=text)


def read_score(dataset: Path, id: str, statistics: ClassStatistics) -> dict[str, Any] | None:
    """The numbers of one sample; None if there are none of these statistics for the files as they are."""
    path = _score_file(dataset, id)
    values = read_png_row(path)
    if values is None or values.get("statistics") != statistics.key:
        return None
    if values.pop("sample", None) != _sample_digest(dataset, id):
        return None
    try:
        open_image(path)  # a power failure may have left a part
    except TerraSynthError:
        return None
    return values


def read_codes(dataset: Path, id: str, shape: Sequence[int]) -> NDArray[np.uint8]:
    """The codes of one sample, (H, W).

    Raises:
        TerraSynthError: they are missing, damaged, or of another image or mask than the dataset has now.
    """
    path = _score_file(dataset, id)
    try:
        codes = open_image(path).values
    except TerraSynthError as error:
        raise TerraSynthError(
            "the scores of this sample are missing or damaged",
            path=path,
            found=error.problem,
            fix=f"score it again: {AGAIN}",
        ) from error
    about = read_png_row(path) or {}
    if codes.shape != tuple(shape) or about.get("sample") != _sample_digest(dataset, id):
        raise TerraSynthError(
            "these are the scores of another image or mask: it was changed since",
            path=path,
            fix=f"score it again: {AGAIN}; then make the view again",
        )
    return codes


def add_scores(dataset: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the scores that there are; those of older rows are dropped."""
    statistics = ClassStatistics.read(dataset)
    whole = []
    for row in rows:
        plain = {key: value for key, value in row.items() if key != _KEY}
        score = None if statistics is None else read_score(dataset, row["id"], statistics)
        whole.append(plain if score is None else {**plain, _KEY: score})
    return whole
