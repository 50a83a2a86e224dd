"""Views of a synthetic dataset: which samples are used, how often, and which of their pixels count. Nothing is deleted.

    views/NAME.json    the settings, the weight of every sample used, and what came of it

The labels of a view are derived when it is read, from the masks and the scores beside them (`data.scores`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terrasynth.data.scores import AGAIN, STEPS, ClassStatistics, read_codes
from terrasynth.errors import TerraSynthError, listed
from terrasynth.io import read_json, write_json
from terrasynth.progress import say

__all__ = ["View", "code_limit", "view_file"]


@dataclass(frozen=True)
class View:
    """Samples of a dataset, weighted.

    Attributes:
        dataset: its folder.
        name: of the view.
        statistics: key of the class statistics that the scores are relative to.
        margin: a label is dropped where the loss is above this many times its class's mean, a multiple of 1/64; None
            keeps all.
        weights: of every sample used, by id, above 0: how often it is drawn compared with the others.
        of: how many samples the dataset had.
        settings: what it was made by, JSON-able.
        summary: what came of it, JSON-able.
    """

    dataset: Path
    name: str
    statistics: str
    margin: float | None
    weights: Mapping[str, float]
    of: int
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]

    def write(self) -> Path:
        """Write `views/NAME.json`, and return its path."""
        path = view_file(self.dataset, self.name)
        keys = ("statistics", "margin", "of", "settings", "summary", "weights")
        head = {"format": "terrasynth view", "version": 1}
        write_json(path, head | {key: getattr(self, key) for key in keys})
        return path

    @classmethod
    def read(cls, dataset: str | Path, name: str) -> View:
        """Read a view, and check that the scores are still those that it was made of.

        Raises:
            TerraSynthError: there is no such view, it is damaged, or the dataset has other scores by now.
        """
        dataset, path = Path(dataset), view_file(Path(dataset), name)
        if not path.is_file():
            there = sorted(file.stem for file in path.parent.glob("*.json"))
            raise TerraSynthError(
                "no such view of this dataset",
                path=path,
                expected=", ".join(there) or None,
                fix=f"make it: terrasynth curate DATASET --view {name}",
            )
        again = f"make the view again: terrasynth curate DATASET --view {name}"
        values = read_json(path, fix=again)
        try:
            margin = values["margin"]
            view = cls(
                dataset=dataset,
                name=name,
                statistics=values["statistics"],
                margin=None if margin is None else float(margin),
                weights={str(id): float(weight) for id, weight in values["weights"].items()},
                of=int(values["of"]),
                settings=dict(values["settings"]),
                summary=dict(values["summary"]),
            )
            if not view.weights or not all(0 < weight < math.inf for weight in view.weights.values()):
                raise ValueError("weights that are not above 0")
            view.limit  # noqa: B018 (raises)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TerraSynthError("the view is damaged", path=path, found=repr(error), fix=again) from error
        now = ClassStatistics.read(dataset)
        if now is None or now.key != view.statistics:
            raise TerraSynthError(
                "the view was made of other scores than the dataset has",
                path=path,
                found="no scores" if now is None else f"scores {now.key}",
                expected=f"scores {view.statistics}",
                fix=again if now else f"`{AGAIN}`, then {again}",
            )
        return view

    @property
    def limit(self) -> int | None:
        """The highest code that keeps its label; None keeps all."""
        return None if self.margin is None else code_limit(self.margin)

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The rows of the samples used.

        Raises:
            TerraSynthError: the dataset has lost a sample, or has painted it again since.
        """
        total, chosen, changed = 0, [], set(self.weights)
        for row in rows:
            total += 1
            if row["id"] in self.weights:
                chosen.append(row)
                if (row.get("curation") or {}).get("statistics") == self.statistics:
                    changed.discard(row["id"])
        if changed:
            raise TerraSynthError(
                "samples of the view are gone, or were painted again since",
                path=self.dataset,
                found=listed(sorted(changed)),
                fix=f"`{AGAIN} --view {self.name}` scores what has no scores, and makes the view again",
            )
        if total > self.of:
            say(f"the view {self.name} was made when {self.dataset} had {self.of} of its {total} samples")
        return chosen

    def filtered(self, id: str, mask: NDArray[np.uint8], ignore_index: int) -> NDArray[np.uint8]:
        """The mask (H, W) of a sample without the labels that are dropped.

        Raises:
            TerraSynthError: its codes are missing or damaged.
        """
        if self.limit is None:
            return mask
        return np.where(read_codes(self.dataset, id, mask.shape) > self.limit, np.uint8(ignore_index), mask)


def view_file(dataset: Path, name: str) -> Path:
    """Where a view is kept.

    Raises:
        TerraSynthError: the name can be no file's.
    """
    if not re.fullmatch(r"\w[\w.-]*", name, flags=re.ASCII):
        raise TerraSynthError(
            "not a name for a view",
            found=repr(name),
            expected="letters, digits, `.`, `_` and `-`",
            fix="choose another",
        )
    return dataset / "views" / f"{name}.json"


def code_limit(margin: float) -> int:
    """The highest code (`data.scores`) that is not above `margin` times the mean."""
    limit = round(margin * STEPS)
    if limit != margin * STEPS or not 0 <= limit < 255:
        raise ValueError(f"a margin of {margin:g} is no multiple of 1/{STEPS} from 0 to {254 / STEPS}")
    return limit
