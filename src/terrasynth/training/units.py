"""Units of work: done once for their inputs, by one process at a time, resumed when interrupted, timed."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from terrasynth.errors import OutOfTime, TerraSynthError
from terrasynth.io import alone, atomic_write, digest, read_json, remove_incomplete, write_json
from terrasynth.training.processes import agreed, process_state

__all__ = ["Busy", "Clock", "OutOfTime", "Unit", "do", "store_tensors", "stored_tensors"]

#: To be raised with every change of the code that gives other results for the same inputs: no finished unit may pass
#: for one of today's.
_RESULTS = 3


class Busy(TerraSynthError):
    """Another process works at this unit."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            "another run is working here", path=folder, fix="wait until it is over, or choose another --out"
        )
        self.folder = folder

    def over(self) -> bool:
        """Whether the other process has left it, finished or not."""
        try:
            with alone(self.folder, self):
                return True
        except Busy:
            return False


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
        seconds: how long it took, over all sittings but those that were killed outright: they leave no time behind.
    """

    folder: Path
    key: str
    result: Any
    seconds: float


def do(
    root: Path,
    name: str,
    inputs: Mapping[str, Any],
    clock: Clock,
    work: Callable[[Path], Any],
    *,
    products: tuple[str, ...] = (),
    scratch: tuple[str, ...] = (),
    together: bool = False,
) -> Unit:
    """Do `work(folder)` once for these inputs.

    The folder's name carries a digest of the inputs: changed inputs get a new folder and old results stay. `unit.json`
    appears last and makes the unit finished; until then `work` is called again and goes on from what the folder holds.

    Args:
        root: where the unit's folder goes.
        name: what people call the unit.
        inputs: everything that the result depends on, JSON-able.
        clock: what is left of the time allowed.
        work: fills the folder; what it returns, JSON-able, is the unit's result.
        products: files and folders that the result needs; where one has been deleted, the unit is done again.
        scratch: sub-folders that only serve to go on (checkpoints, caches). They are deleted once the unit is finished
            and never before, so that a kill at any time finds them whole or does not need them.
        together: all processes of one launch do the work, each its share (`training.loop` does that).

    Raises:
        OutOfTime: no time is left to begin.
        Busy: another process works in the folder.
        TerraSynthError: what the folder says of the unit is damaged, or it is not for several processes of one launch.
    """
    key = digest(_RESULTS, inputs)
    folder = root / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}-{key[:8]}"
    stamp = folder / "unit.json"

    def finished() -> bool:
        return stamp.is_file() and all((folder / product).exists() for product in products)

    process = process_state()
    if not agreed(finished()):
        if agreed(clock.left()) == 0:
            raise OutOfTime
        if process.num_processes > 1 and not together:
            raise TerraSynthError(
                "the processes of one launch can share the training of generator, refiner or pairs only, and this "
                "comes first",
                path=folder,
                found=f"{process.num_processes} processes",
                fix="run the same command without torchrun or accelerate until it says `training the generator`, "
                "`training the refiner` or `training what paints pairs`, stop it, and start this again",
            )
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder, Busy(folder)) if process.is_main_process else nullcontext():
            if not agreed(finished()):  # as it is if the process that was here before has just finished
                _finish(folder, stamp, {"name": name, "inputs": inputs}, work)
    stored = _read(stamp, "the unit is computed again")
    try:
        unit = Unit(folder, key, stored["result"], float(stored["seconds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(stamp, "no result and seconds", "the unit is computed again") from error
    if process.is_main_process:
        for part in scratch:
            shutil.rmtree(folder / part, ignore_errors=True)
    return unit


def store_tensors(path: Path, **tensors: Tensor) -> None:
    """Write tensors that a unit made: a safetensors file, whole or not at all."""
    with atomic_write(path) as partial:
        save_file(tensors, partial)


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `store_tensors` wrote.

    Raises:
        TerraSynthError: the file is damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TerraSynthError(
            "what a unit of work made can not be loaded",
            path=path,
            found=str(error),
            fix="delete this file and run the same command: it is made again",
        ) from error


def _finish(folder: Path, stamp: Path, about: Mapping[str, Any], work: Callable[[Path], Any]) -> None:
    """One sitting; if it comes to its end, the stamp."""
    process = process_state()
    if process.is_main_process:
        # Nobody else is here, so whatever is half-written was left by a process that is gone.
        for inside in sorted([folder, *folder.rglob("*/")], reverse=True):
            remove_incomplete(inside)
    process.wait_for_everyone()
    sittings = folder / "seconds.json"
    before = 0.0
    if sittings.is_file():
        before = _read(sittings, "only the time counted so far is lost")
        if not isinstance(before, int | float):
            raise _damaged(sittings, repr(before)[:40], "only the time counted so far is lost")
    begun = time.monotonic()
    try:
        result = work(folder)
    finally:
        seconds = before + time.monotonic() - begun
        if process.is_main_process:
            write_json(sittings, seconds)
    if process.is_main_process:
        write_json(stamp, {**about, "result": result, "seconds": seconds})
    process.wait_for_everyone()


def _read(path: Path, without: str) -> Any:
    try:
        return read_json(path)
    except TerraSynthError as error:
        raise _damaged(path, error.found, without) from error


def _damaged(path: Path, found: object, without: str) -> TerraSynthError:
    return TerraSynthError(
        "the record of a unit of work is damaged",
        path=path,
        found=found,
        fix=f"delete this file and run the same command again: {without}",
    )
