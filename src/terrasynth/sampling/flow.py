"""Rectified flow: the path between data and noise, and its samplers.

    x_σ = (1 − σ) x_0 + σ ε        v = dx/dσ = ε − x_0        σ = 1: noise ε, σ = 0: data x_0

(Liu et al. 2023; Esser et al. 2024, section 2). A model is told the time as the timestep 1000 σ. Models, conditions and
decoders come in as callables.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

__all__ = [
    "Decode",
    "FlowBatch",
    "FlowStep",
    "Solver",
    "Steering",
    "Velocity",
    "flow_batch",
    "sample_flow",
    "seeded_generator",
    "seeded_noise",
]

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Latents (B, C, h, w) and timesteps (B,) to velocities (B, C, h, w)."""
Solver = Literal["euler", "adams"]
"""The methods of `sample_flow`."""
Decode = Callable[[Tensor], Tensor]
"""Latents (B, C, h, w) to images (B, 3, H, W) in [0, 1], differentiable."""


@dataclass(frozen=True)
class FlowStep:
    """Where a sampler is: step `index` of `total`, at noise level `sigma`."""

    index: int
    total: int
    sigma: float


class Steering(Protocol):
    """Changes the velocity of a step, knowing where it leads: `decode(latents − σ velocity)` estimates the image."""

    def __call__(self, velocity: Tensor, latents: Tensor, step: FlowStep, decode: Decode) -> Tensor:
        """Return the velocity to take instead, float32 (B, C, h, w)."""


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator that hears every bit of a non-negative `seed`.

    PyTorch's own reads the lowest 32 bits only, so longer seeds are hashed to 32 bits first.

    Raises:
        TypeError: the seed is no whole number.
    """
    seed = operator.index(seed)  # of a tensor or an array as well
    if seed >= 2**32:
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


def seeded_noise(
    seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise (B, *shape) in which row i depends on `seeds[i]` alone.

    Drawn in float32 on the CPU whatever the device and dtype, so that these do not change it.
    """
    noise = [torch.randn(shape, generator=seeded_generator(seed)) for seed in seeds]
    return torch.stack(noise).to(device, dtype)


@torch.no_grad()
def sample_flow(
    velocity: Velocity,
    latents: Tensor,
    scheduler: FlowMatchEulerDiscreteScheduler,
    num_steps: int,
    *,
    solver: Solver = "euler",
    steering: Steering | None = None,
    decode: Decode | None = None,
    callback: Callable[[FlowStep, Tensor], None] | None = None,
) -> Tensor:
    """From noise to data along the flow, one evaluation of the velocity a step.

        euler    z ← z + h v                                     h = σ_next − σ
        adams    z ← z + h (v + h / (2 h_last) (v − v_last))     Adams-Bashforth of second order

    Adams takes its first step as Euler does, and needs far fewer steps for the same accuracy.

    Args:
        velocity: predicts v at the latents and timesteps it is given.
        latents: the noise to start from, (B, C, h, w).
        scheduler: chooses the noise levels (`set_timesteps` is called on it).
        num_steps: N, the number of evaluations of `velocity`.
        solver: which of the two.
        steering: replaces the velocity of each step by the one it returns; needs `decode`.
        decode: latents to images, for the steering.
        callback: told each step and its estimate of the clean latents, z − σ v.

    Returns:
        The clean latents, float32.
    """
    if steering is not None and decode is None:
        raise ValueError("steering needs `decode`, the way from latents to images")
    if solver not in get_args(Solver):
        raise ValueError(f"`solver` is {solver!r}, but there are {', '.join(get_args(Solver))}")
    if num_steps < 1:
        raise ValueError(f"`num_steps` is {num_steps}; at least one evaluation leads from noise to data")
    scheduler.set_timesteps(num_steps, device=latents.device)
    sigmas = scheduler.sigmas.tolist()
    z = latents.float()
    last: tuple[Tensor, float] | None = None
    for i, timestep in enumerate(scheduler.timesteps):
        step, h = FlowStep(i, num_steps, sigmas[i]), sigmas[i + 1] - sigmas[i]
        v = velocity(z, timestep.expand(len(z))).float()
        # The slope of the flow itself: from steered velocities it would take half of the last correction back.
        bend = 0.0 if last is None else h / (2 * last[1]) * (v - last[0])
        if solver == "adams":
            last = v, h
        if steering is not None and decode is not None:
            v = steering(v, z, step, decode)
        if callback is not None:
            callback(step, z - step.sigma * v)
        z = z + h * (v + bend)
    return z


class FlowBatch(NamedTuple):
    """What flow matching trains on: `model(noisy, timestep)` should be `velocity`."""

    noisy: Tensor
    velocity: Tensor
    sigma: Tensor
    timestep: Tensor


def flow_batch(
    latents: Tensor,
    seeds: Sequence[int | torch.Generator],
    *,
    density: Literal["uniform", "logit_normal", "mode"] = "logit_normal",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    shift: float = 1.0,
) -> FlowBatch:
    """Noise clean latents to random times.

        σ = s u / (1 + (s − 1) u)        x_σ = (1 − σ) x_0 + σ ε        v = ε − x_0

    Args:
        latents: clean latents x_0, (B, C, h, w).
        seeds: one per sample: its time u and noise ε depend on nothing else. A CPU generator instead of a number
            continues its stream: hand over the one that the sample's other choices were drawn from, because a second
            generator of the same seed would repeat them.
        density: of u in [0, 1]: `uniform`; `logit_normal` (Esser et al. 2024, equation 19); `mode` (equation 20 with
            scale 1.29, which favours the middle).
        logit_mean: of the logit-normal. As in the paper, negative favours data (σ → 0) and positive noise. Training
            scripts that use u as an index into diffusers' *descending* timesteps have the opposite sign.
        logit_std: spread of the logit-normal.
        shift: s, moves times towards noise (equation 23); the scheduler's `shift`.

    Returns:
        Noisy latents and target velocity, shaped as the latents; σ and the model's timestep 1000 σ, (B,). All float32.
    """
    times, noises = [], []
    for seed in seeds:
        generator = seed if isinstance(seed, torch.Generator) else seeded_generator(seed)
        times.append(_draw_time(density, logit_mean, logit_std, generator))
        noises.append(torch.randn(latents.shape[1:], generator=generator))
    u = torch.stack(times).to(latents.device)
    noise = torch.stack(noises).to(latents.device)
    sigma = shift * u / (1 + (shift - 1) * u)
    x0, s = latents.float(), sigma.view(-1, *[1] * (latents.ndim - 1))
    return FlowBatch((1 - s) * x0 + s * noise, noise - x0, sigma, 1000 * sigma)


def _draw_time(density: str, logit_mean: float, logit_std: float, generator: torch.Generator) -> Tensor:
    if density == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * torch.randn((), generator=generator))
    u = torch.rand((), generator=generator)
    if density == "mode":
        u = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    return u
