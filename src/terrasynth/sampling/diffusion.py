"""Denoising diffusion: noising, what a network may predict, and deterministic sampling.

    x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε

(Ho et al. 2020, equation 4), with t from 0, nearly data, to 999, nearly noise. A network predicts the noise ε, the
clean sample x_0, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans and Ho 2022, appendix D): `prediction_type` of the scheduler,
in diffusers' names `epsilon`, `sample`, `v_prediction`. Models, conditions and decoders come in as callables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from terrasynth.sampling.flow import seeded_generator

__all__ = ["DiffusionBatch", "Epsilon", "Timesteps", "diffusion_batch", "sample_ddim"]

Epsilon = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents (B, C, h, w) and timesteps (B,) to the noise in them, (B, C, h, w), or what else is predicted."""
Timesteps = Literal["uniform", "cubic"]
"""How often training sees which timestep; see `diffusion_batch`."""


class DiffusionBatch(NamedTuple):
    """What diffusion trains on: `model(noisy, timestep)` should be `target`."""

    noisy: Tensor
    target: Tensor
    timestep: Tensor


def diffusion_batch(
    latents: Tensor,
    seeds: Sequence[int | torch.Generator],
    scheduler: DDPMScheduler,
    *,
    timesteps: Timesteps = "uniform",
    start: Tensor | None = None,
) -> DiffusionBatch:
    """Noise latents to random timesteps.

    The timesteps are uniform, or cubic (Wang et al. 2025, arXiv 2507.01573): t = T (1 − (u / T)³) with u uniform, three
    quarters of T on average.

    Args:
        latents: clean latents x_0, (B, C, h, w).
        seeds: one per sample: its timestep and noise depend on nothing else. A CPU generator instead of a number
            continues its stream (see `sampling.flow.flow_batch`).
        scheduler: has the noise schedule, and says what the target is.
        timesteps: how they are drawn.
        start: what is noised, where that is not x_0 but a rough estimate of it, (B, C, h, w); the target is still x_0.

    Returns:
        Noisy latents and the target, float32 and shaped as the latents; timesteps, int64 (B,).

    Raises:
        ValueError: there is no such way to draw timesteps; or there is a `start` and the target is not `sample`. The
            noise that leads from x_t to another x_0 than it was made of grows beyond all bounds for small t.
    """
    kind = scheduler.config.prediction_type
    if timesteps not in get_args(Timesteps):
        raise ValueError(f"`timesteps` is {timesteps!r}, but there are {', '.join(get_args(Timesteps))}")
    if start is not None and kind != "sample":
        raise ValueError(f"`start` needs a scheduler whose prediction_type is sample, but it is {kind}")
    total = scheduler.config.num_train_timesteps
    drawn, noises = [], []
    for seed in seeds:
        generator = seed if isinstance(seed, torch.Generator) else seeded_generator(seed)
        drawn.append(torch.randint(total, (), generator=generator))
        noises.append(torch.randn(latents.shape[1:], generator=generator))
    timestep, noise = torch.stack(drawn).to(latents.device), torch.stack(noises).to(latents.device)
    if timesteps == "cubic":
        timestep = (total * (1 - (timestep.double() / total) ** 3)).long().clamp(max=total - 1)
    latents = latents.float()
    noisy = scheduler.add_noise(latents if start is None else start.float(), noise, timestep)
    if kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timestep)
    else:
        target = latents if kind == "sample" else noise
    return DiffusionBatch(noisy, target, timestep)


@torch.no_grad()
def sample_ddim(
    predict: Epsilon,
    latents: Tensor,
    scheduler: DDIMScheduler,
    num_steps: int,
    *,
    start: Tensor | None = None,
    strength: float = 1.0,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """From noise to data by DDIM without fresh noise (Song et al. 2021, equation 12 with σ = 0).

        x_0 = (x − √(1 − ᾱ) ε) / √ᾱ        x ← √ᾱ_next x_0 + √(1 − ᾱ_next) ε

    With a strength s < 1 it starts from a clean estimate that is noised to timestep s T (Meng et al. 2022, SDEdit), and
    the steps are spread over what is left.

    Args:
        predict: predicts the noise at the latents and timesteps it is given, or what else the scheduler's
            `prediction_type` says.
        latents: the noise to start from, (B, C, h, w).
        scheduler: chooses the timesteps (`set_timesteps` is called on it); between two of them the step may have any
            length.
        num_steps: number of evaluations of `predict`, whatever the strength.
        start: the clean estimate, (B, C, h, w); with strength 1 it changes nothing.
        strength: s, above 0 and up to 1.
        callback: told each step's index and its estimate of the clean latents.

    Returns:
        The clean latents, float32.

    Raises:
        ValueError: the strength is out of its range, has fewer timesteps than there are steps, or needs a `start`.
    """
    x = latents.float()
    timesteps = _timesteps(scheduler, num_steps, strength).to(x.device)
    if strength < 1:
        if start is None:
            raise ValueError("a `strength` below 1 needs a clean estimate to `start` from")
        x = scheduler.add_noise(start.float(), x, timesteps[:1])
    alpha_bars = [scheduler.alphas_cumprod[t].item() for t in timesteps.tolist()]
    for i, t in enumerate(timesteps):
        alpha_bar, following = alpha_bars[i], (*alpha_bars[1:], scheduler.final_alpha_cumprod.item())[i]
        predicted = predict(x, t.expand(len(x))).float()
        x_0 = scheduler.step(predicted, t, x).pred_original_sample
        epsilon = (x - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5
        x = following**0.5 * x_0 + (1 - following) ** 0.5 * epsilon
        if callback is not None:
            callback(i, x_0)
    return x


def _timesteps(scheduler: DDIMScheduler, num_steps: int, strength: float) -> Tensor:
    """The scheduler's timesteps as if there were none beyond `strength` T."""
    # Rounded before it is cut: 0.29 · 100 is 28.999…
    total = int(round(strength * scheduler.config.num_train_timesteps, 6))
    if not (0 < strength <= 1 and 1 <= num_steps <= total):
        raise ValueError(f"`strength` {strength} and `num_steps` {num_steps} leave no timesteps to sample at")
    scheduler.set_timesteps(num_steps)
    if strength == 1:
        return scheduler.timesteps
    shorter = DDIMScheduler.from_config(scheduler.config, num_train_timesteps=total)
    shorter.set_timesteps(num_steps)
    return shorter.timesteps
