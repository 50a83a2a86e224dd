"""Denoising diffusion: noising and deterministic sampling.

    x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε

(Ho et al. 2020, equation 4), with t from 0, nearly data, to 999, nearly noise. Models, conditions and decoders come in
as callables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from terrasynth.sampling.flow import seeded_generator

__all__ = ["DiffusionBatch", "Epsilon", "diffusion_batch", "sample_ddim"]

Epsilon = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents (B, C, h, w) and timesteps (B,) to the noise in them, (B, C, h, w)."""


class DiffusionBatch(NamedTuple):
    """What diffusion trains on: `model(noisy, timestep)` should be `noise`."""

    noisy: Tensor
    noise: Tensor
    timestep: Tensor


def diffusion_batch(
    latents: Tensor, seeds: Sequence[int | torch.Generator], scheduler: DDPMScheduler
) -> DiffusionBatch:
    """Noise clean latents to uniformly random timesteps.

    Args:
        latents: clean latents x_0, (B, C, h, w).
        seeds: one per sample: its timestep and noise depend on nothing else. A CPU generator instead of a number
            continues its stream (see `sampling.flow.flow_batch`).
        scheduler: has the noise schedule.

    Returns:
        Noisy latents and noise, float32 and shaped as the latents; timesteps, int64 (B,).
    """
    timesteps, noises = [], []
    for seed in seeds:
        generator = seed if isinstance(seed, torch.Generator) else seeded_generator(seed)
        timesteps.append(torch.randint(scheduler.config.num_train_timesteps, (), generator=generator))
        noises.append(torch.randn(latents.shape[1:], generator=generator))
    timestep, noise = torch.stack(timesteps).to(latents.device), torch.stack(noises).to(latents.device)
    return DiffusionBatch(scheduler.add_noise(latents.float(), noise, timestep), noise, timestep)


@torch.no_grad()
def sample_ddim(
    epsilon: Epsilon,
    latents: Tensor,
    scheduler: DDIMScheduler,
    num_steps: int,
    *,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """From noise to data by DDIM without fresh noise (Song et al. 2021, equation 12 with σ = 0).

        x_0 = (x − √(1 − ᾱ) ε) / √ᾱ        x ← √ᾱ_next x_0 + √(1 − ᾱ_next) ε

    Args:
        epsilon: predicts the noise at the latents and timesteps it is given.
        latents: the noise to start from, (B, C, h, w).
        scheduler: chooses the timesteps (`set_timesteps` is called on it).
        num_steps: number of evaluations of `epsilon`.
        callback: told each step's index and its estimate of the clean latents.

    Returns:
        The clean latents, float32.
    """
    scheduler.set_timesteps(num_steps, device=latents.device)
    x = latents.float()
    for i, t in enumerate(scheduler.timesteps):
        step = scheduler.step(epsilon(x, t.expand(len(x))).float(), t, x)
        x = step.prev_sample
        if callback is not None:
            callback(i, step.pred_original_sample)
    return x
