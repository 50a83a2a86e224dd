"""Several processes at one training: what `torchrun` and `accelerate launch` start.

They hold the same model and share the samples of every step (`training.loop`). The main process alone writes, prints
and evaluates. They wait for each other in every step, so where one ends, all must: the launcher sees to that, and what
was wrong is said once, by the process that met it first.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed

__all__ = ["agreed", "enter", "last_words", "leave", "left_alone", "process_state"]

T = TypeVar("T")
#: How long processes wait for one that encodes tiles or paints a preview by itself.
_PATIENCE = timedelta(hours=6)


def process_state() -> PartialState:
    """How many processes there are, which of them this one is, and its device."""
    # Without a GPU, accelerate would have every process train by itself unless it is told to use the processor.
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=together and not torch.accelerator.is_available(), timeout=_PATIENCE)


def agreed(value: T) -> T:
    """The main process's value, in every process."""
    shared: list[Any] = broadcast_object_list([value])
    return shared[0]


def enter() -> PartialState:
    """Join the other processes of the launch; all but the main one are silent from here on."""
    process = process_state()
    if not process.is_main_process:
        os.environ["TERRASYNTH_QUIET"] = "1"
        warnings.simplefilter("ignore")
    _on_sigterm(lambda: _stop(process.process_index))
    return process


def leave() -> None:
    """Part in good order: a process that is gone while others still write to it makes them fail."""
    process = process_state()
    process.wait_for_everyone()
    process.destroy_process_group()


def left_alone(error: BaseException) -> bool:
    """Whether the error is that another process has gone in the middle of a sum over all."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def last_words(text: str) -> None:
    """Print why this process ends, unless another has said why it did: then this is only what follows from that."""
    try:
        store = distributed.distributed_c10d._get_default_store()
        if store.add("terrasynth/failed", 1) > 1:
            # The launcher ends all as soon as one is gone: not before it has spoken.
            store.wait(["terrasynth/said"], timedelta(seconds=5))
            return
    except (RuntimeError, ValueError):
        store = None  # whoever kept it is gone, or never spoke
    print(text, file=sys.stderr, flush=True)
    if store is not None:
        store.set("terrasynth/said", "1")


def _stop(process: int) -> None:
    fix = "the same command goes on from the last checkpoint"
    last_words(f"Process {process} was told to stop (SIGTERM), and with it all; {fix}.")
    os._exit(128 + signal.SIGTERM)


def _on_sigterm(action: Callable[[], object]) -> None:
    """Act on SIGTERM in a thread of its own: the main one may wait in a sum over processes that never comes."""
    heard, tells = socket.socketpair()
    tells.setblocking(False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        # `tells` is named to be kept: closed, nothing would be told.
        while signal.SIGTERM not in heard.recv(64) or tells is None:
            pass
        action()

    threading.Thread(target=listen, daemon=True).start()
