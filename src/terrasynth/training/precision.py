"""Which numbers to compute in."""

from __future__ import annotations

import torch

from terrasynth.recipe import Precision

__all__ = ["autocast"]


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """A context that computes in bfloat16 where `precision` says so.

    `auto` asks the processor: bfloat16 if it has instructions for it (CUDA from compute capability 8.0 on; x86 with
    AVX512-BF16 or AMX, where matrix products run at several times the rate of float32), else float32.
    """
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16" or (precision == "auto" and _native(device))
    )


def _native(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Asked by name: older versions of torch do not have all of these.
    return any(
        getattr(torch.cpu, question, lambda: False)()
        for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
