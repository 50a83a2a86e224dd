"""The machines that a recipe may run on: their memory, and how fast they are."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from terrasynth.errors import TerraSynthError
from terrasynth.planning.footprint import Speed

__all__ = ["CARDS", "Card", "here", "named"]

_GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A machine.

    Attributes:
        name: what it is called.
        memory: bytes that tensors can have.
        speed: None if nothing is known of it.
        measured: whether its speed is measured, not that of a data sheet, which no program reaches.
        gpu: whether it is one.
    """

    name: str
    memory: float
    speed: Speed | None
    measured: bool = False
    gpu: bool = True


def _card(name: str, gib: float, float32: float, bfloat16: float, gigabytes: float) -> Card:
    # The rest of the memory is the driver's, the kernels' workspaces and gaps.
    return Card(name, 0.92 * gib * _GIB, Speed(1e12 * float32, 1e12 * bfloat16, 1e9 * gigabytes))


#: Memory in GiB as PyTorch reports it, TFLOP/s in single and (dense) in half precision and GB/s, of the data sheets.
CARDS = {
    re.sub(r"\W", "", card.name.lower()): card
    for card in (
        _card("RTX 3090", 23.6, 35.6, 71, 936),
        _card("RTX 4090", 23.5, 82.6, 165, 1008),
        _card("A100", 79.2, 19.5, 312, 2039),
        _card("H100", 79.2, 67, 989, 3350),
        _card("H200", 139.8, 67, 989, 4800),
    )
}


def named(name: str) -> Card:
    """The card of a name, or one of so many GiB.

    Raises:
        TerraSynthError: it is neither.
    """
    key = re.sub(r"\W", "", name.lower())
    if key in CARDS:
        return CARDS[key]
    try:
        gib = float(re.sub(r"(?i)\s*gi?b?$", "", name.strip()))
    except ValueError:
        gib = 0.0
    if not 0 < gib < 2**20:
        raise TerraSynthError(
            "no such card",
            found=name,
            expected=f"{', '.join(card.name for card in CARDS.values())}, or its memory in GiB",
            fix="give its memory: --card 48",
        )
    return Card(f"{gib:g} GiB", 0.92 * gib * _GIB, None)


def here() -> list[Card]:
    """The GPUs of this machine, one of each kind; without any, its processor."""
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        return [Card("this processor", 0.92 * memory, _measured("cpu"), measured=True, gpu=False)]
    cards = {}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        if about.name not in cards:
            cards[about.name] = Card(about.name, 0.92 * about.total_memory, _measured(f"cuda:{index}"), measured=True)
    return list(cards.values())


def _measured(device: str) -> Speed:
    """Matrix products of 1024 (on a GPU 8192) squared, and sums of vectors of 256 MB."""
    size = 1024 if device == "cpu" else 8192

    def products(dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        return 2 * size**3 / _seconds(lambda: matrix @ matrix)

    vector = torch.ones(2**26, device=device)
    traffic = 3 * vector.nbytes / _seconds(lambda: torch.add(vector, vector, out=vector))
    return Speed(products(torch.float32), products(torch.bfloat16), traffic)


def _seconds(function: Callable[[], torch.Tensor], repeats: int = 10) -> float:
    """Shortest time of one call."""
    taken = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        function().flatten()[0].item()  # waits for the device
        taken.append(time.perf_counter() - begun)
    return min(taken[1:])
