"""Which numbers to compute in."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn

from terrasynth.recipe import Precision

__all__ = ["autocast", "computes_in_bfloat16", "round_linear"]


def autocast(device: torch.device, precision: Precision, *, keep_casts: bool = True) -> torch.autocast:
    """A context that computes in bfloat16 where `precision` says so; see `computes_in_bfloat16`.

    Without `keep_casts`, trained weights are rounded anew at every use, in place of being held in bfloat16 too until
    the context ends: half the memory of the weights, for one more pass over them.
    """
    enabled = computes_in_bfloat16(device, precision)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=keep_casts)


def computes_in_bfloat16(device: torch.device, precision: Precision) -> bool:
    """Whether `precision` means bfloat16 on a device.

    `auto` asks the processor: bfloat16 if it has instructions for it (CUDA from compute capability 8.0 on; x86 with
    AVX512-BF16 or AMX, where matrix products run at several times the rate of float32), else float32.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"`precision` is {precision!r}, but there are {', '.join(get_args(Precision))}")
    return precision == "bf16" or (precision == "auto" and _native(device))


def round_linear(network: nn.Module) -> dict[nn.Linear, Tensor]:
    """Keep the frozen weights of linear layers in bfloat16, in place.

    Under `autocast` they are rounded to it at every use, so nothing that the network computes there changes, to the
    bit; without, it no longer computes.

    Returns:
        What the weights were, where they were.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    exact = {layer: layer.weight.data for layer in layers if not layer.weight.requires_grad}
    for layer, weight in exact.items():
        layer.weight.data = weight.bfloat16()
    return exact


def _native(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Asked by name: older versions of torch do not have all of these.
    return any(
        getattr(torch.cpu, question, lambda: False)()
        for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
