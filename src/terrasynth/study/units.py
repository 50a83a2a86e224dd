"""Units of work: done once for their inputs, resumed when interrupted, timed over all sittings."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import terrasynth
from terrasynth.io import digest, read_json, remove_incomplete, write_json

__all__ = ["Clock", "OutOfTime", "Unit", "do"]


class OutOfTime(Exception):
    """The minutes allowed are over; everything done so far is kept."""


@dataclass
class Clock:
    """What is left of the time allowed."""

    max_minutes: float | None = None
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float | None:
        """Minutes left, at least 0; None without a limit."""
        if self.max_minutes is None:
            return None
        return max(0.0, self.max_minutes - (time.monotonic() - self.started) / 60)


@dataclass(frozen=True)
class Unit:
    """A finished unit of work.

    Attributes:
        folder: what it made.
        key: digest of its inputs, for the inputs of units that build on it.
        result: what it measured, JSON-able.
        seconds: how long it took, over all sittings.
    """

    folder: Path
    key: str
    result: Any
    seconds: float


def do(root: Path, name: str, inputs: Mapping[str, Any], clock: Clock, work: Callable[[Path], Any]) -> Unit:
    """Do `work(folder)` once for these inputs.

    The folder's name carries a digest of the inputs: changed inputs get a new folder and old results stay. `unit.json`
    appears last and makes the unit finished; until then `work` is called again and goes on from what the folder holds.

    Raises:
        OutOfTime: no time is left to begin.
    """
    key = digest(terrasynth.__version__, inputs)
    folder = root / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}-{key[:8]}"
    stamp = folder / "unit.json"
    if not stamp.is_file():
        if clock.left() == 0:
            raise OutOfTime
        folder.mkdir(parents=True, exist_ok=True)
        remove_incomplete(folder)
        sittings = folder / "seconds.json"
        before = read_json(sittings) if sittings.is_file() else 0.0
        begun = time.monotonic()
        try:
            result = work(folder)
        finally:
            seconds = before + time.monotonic() - begun
            write_json(sittings, seconds)
        write_json(stamp, {"name": name, "inputs": inputs, "result": result, "seconds": seconds})
    stored = read_json(stamp)
    return Unit(folder, key, stored["result"], stored["seconds"])
