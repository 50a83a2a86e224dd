"""More processes at the units of one study."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from terrasynth.recipe import Recipe
from terrasynth.study.run import Study
from terrasynth.training.units import OutOfTime

__all__ = ["workers"]


@contextmanager
def workers(count: int, recipe: Recipe, base: Path, out: Path, max_minutes: float | None = None) -> Iterator[None]:
    """`count` more processes do units of a study while this one does.

    The processors are shared out evenly. A small network is faster on one of them than on its share of two, so two
    processes of one thread each finish sooner than one of two. The processes end with the block, or with this process,
    whatever ends it.

    Args:
        count: more processes, 0 for none.
        recipe: as for `Study`.
        base: as for `Study`.
        out: as for `Study`.
        max_minutes: as for `Study`.
    """
    if sys.platform == "win32":
        count = 0  # no unit can be locked there
    before = torch.get_num_threads()
    threads = max(1, before // (count + 1))
    # Spawned, not forked: torch's threads and CUDA do not survive a fork.
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(recipe, base, out, max_minutes, threads)) for _ in range(count)]
    torch.set_num_threads(threads)
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()  # units survive it
            process.join()
        torch.set_num_threads(before)


def _work(recipe: Recipe, base: Path, out: Path, max_minutes: float | None, threads: int) -> None:
    """What such a process does; what fails here fails again, and is reported, in the process that started it."""
    os.environ["TERRASYNTH_QUIET"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one hears it too, and ends it
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with suppress(OutOfTime):
        Study(recipe, base, out, max_minutes=max_minutes).work()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
