"""Denoising diffusion probabilistic models (Ho et al. 2020, arXiv 2006.11239), in the paper's symbols and numbers.

    α_t = 1 − β_t        ᾱ_t = α_1 ⋯ α_t
    x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε                                    q(x_t | x_0)               (4)
    q(x_{t−1} | x_t, x_0) = N(μ̃_t, β̃_t I)                           forward posterior          (6)
    μ̃_t = √ᾱ_{t−1} β_t / (1 − ᾱ_t) x_0 + √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t) x_t                   (7)
    β̃_t = (1 − ᾱ_{t−1}) / (1 − ᾱ_t) β_t
    L   = E ‖ε − ε_θ(x_t, t)‖²                                       simple loss               (14)
    x_0 ≈ (x_t − √(1 − ᾱ_t) ε_θ) / √ᾱ_t                              clean estimate            (15)

A network predicts the noise ε, the clean sample x_0, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans and Ho 2022, appendix D):
`prediction_type` of the scheduler, in diffusers' names `epsilon`, `sample`, `v_prediction`. Of one error of x_0, the
simple losses of the three are ᾱ / (1 − ᾱ) : 1 : 1 / (1 − ᾱ).

Timesteps count from 0, nearly data, to 999, nearly noise; the paper's count from 1. Sampling may visit some of them
only. Then t − 1 is the one visited next, and α_t = ᾱ_t / ᾱ_{t−1} (Nichol and Dhariwal 2021, section 4). Beyond the last
ᾱ is 1, or the scheduler's `final_alpha_cumprod`. Models, conditions and decoders come in as callables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple, get_args

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from terrasynth.sampling.flow import seeded_generator

__all__ = [
    "DiffusionBatch",
    "Epsilon",
    "Prediction",
    "Timesteps",
    "Variance",
    "beta",
    "beta_tilde",
    "clean_estimate",
    "diffusion_batch",
    "min_snr",
    "mu_tilde",
    "q_sample",
    "sample_ancestral",
    "sample_ddim",
]

Epsilon = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents (B, C, h, w) and timesteps (B,) to the noise in them, (B, C, h, w), or what else is predicted."""
Prediction = Literal["sample", "epsilon", "v_prediction"]
Timesteps = Literal["uniform", "cubic"]
"""How often training sees which timestep; see `diffusion_batch`."""
Variance = Literal["beta", "posterior"]
"""Of a step of `sample_ancestral`."""
_Transition = Callable[[Tensor, Tensor, float, float], tuple[Tensor, float]]
"""x_0, x_t, ᾱ_t and ᾱ_{t−1} to mean and variance of x_{t−1}."""


def q_sample(x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t of clean x_0 and noise ε (equation 4); ᾱ_t is broadcast."""
    return alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * noise


def beta(alpha_bar: float, alpha_bar_prev: float) -> float:
    """β_t, the variance of the step from x_{t−1} to x_t."""
    return 1 - alpha_bar / alpha_bar_prev


def beta_tilde(alpha_bar: float, alpha_bar_prev: float) -> float:
    """β̃_t, the variance of x_{t−1} between x_0 and x_t (equation 7)."""
    return (1 - alpha_bar_prev) / (1 - alpha_bar) * beta(alpha_bar, alpha_bar_prev)


def mu_tilde(x_0: Tensor, x_t: Tensor, alpha_bar: float, alpha_bar_prev: float) -> Tensor:
    """μ̃_t, the mean of x_{t−1} between x_0 and x_t (equation 7)."""
    of_x_0 = alpha_bar_prev**0.5 * beta(alpha_bar, alpha_bar_prev) / (1 - alpha_bar)
    of_x_t = (alpha_bar / alpha_bar_prev) ** 0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return of_x_0 * x_0 + of_x_t * x_t


def clean_estimate(
    predicted: Tensor, x_t: Tensor, alpha_bar: Tensor, scheduler: DDPMScheduler | DDIMScheduler
) -> Tensor:
    """x_0 of what was predicted at x_t (equation 15), clipped where the scheduler has `clip_sample`.

    Raises:
        ValueError: x_t has no signal (ᾱ_t = 0), so that its noise says nothing of x_0; or the scheduler has
            `thresholding`, which is not done here.
    """
    config = scheduler.config
    if config.thresholding:
        raise ValueError("`thresholding` of the scheduler is not supported; use `clip_sample`")
    if config.prediction_type == "sample":
        x_0 = predicted
    elif config.prediction_type == "v_prediction":
        x_0 = alpha_bar**0.5 * x_t - (1 - alpha_bar) ** 0.5 * predicted
    elif alpha_bar == 0:
        raise ValueError("where no signal is left, noise says nothing of the clean sample: predict v or the sample")
    else:
        x_0 = (x_t - (1 - alpha_bar) ** 0.5 * predicted) / alpha_bar**0.5
    return x_0.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else x_0


class DiffusionBatch(NamedTuple):
    """What diffusion trains on: `model(noisy, timestep)` should be `target`, in mean squares (equation 14)."""

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
    alpha_bar = scheduler.alphas_cumprod.to(latents.device)[timestep].view(-1, *[1] * (latents.ndim - 1))
    latents = latents.float()
    noisy = q_sample(latents if start is None else start.float(), noise, alpha_bar)
    if kind == "v_prediction":
        target = alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * latents
    else:
        target = latents if kind == "sample" else noise
    return DiffusionBatch(noisy, target, timestep)


def min_snr(timestep: Tensor, scheduler: DDPMScheduler | DDIMScheduler, limit: float) -> Tensor:
    """How much the simple loss of each sample counts, so that an error e of x_0 counts min(SNR, limit) ‖e‖².

    SNR = ᾱ / (1 − ᾱ), and Hang et al. 2023 ("Efficient Diffusion Training via Min-SNR Weighting Strategy",
    arXiv 2303.09556, section 3.4) take 5 for the limit. What is nearly noise tells little of x_0, and what is nearly
    clean says what details look like.

    Args:
        timestep: int64 (B,).
        scheduler: has the noise schedule, and says of what the loss is.
        limit: γ, above 0.

    Returns:
        Weights, float32 (B,).
    """
    snr = compute_snr(scheduler, timestep)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":  # of which 1 / SNR times the error is that of x_0; SNR may be 0
        return (limit / snr).clamp(max=1)
    return snr.clamp(max=limit) / (snr + 1 if kind == "v_prediction" else 1)


@torch.no_grad()
def sample_ancestral(
    predict: Epsilon,
    latents: Tensor,
    scheduler: DDPMScheduler | DDIMScheduler,
    num_steps: int,
    *,
    seeds: Sequence[int],
    variance: Variance = "posterior",
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """From noise to data by the reverse process (algorithm 2), x_{t−1} = μ̃_t + σ_t z; the last step adds no noise.

    σ_t² is β̃_t of the posterior, right for data that are one point, or β_t, right for standard normal data: the limits
    of what data of unit variance need (section 3.2). With few steps β_t is too much for data of less variance.

    Args:
        predict: see `sample_ddim`.
        latents: the noise to start from, (B, C, h, w).
        scheduler: chooses the timesteps (`set_timesteps` is called on it).
        num_steps: number of steps; T for the paper's.
        seeds: one per sample: its z depend on nothing else. They go on where `seeded_noise` of the seed, which may be
            the latents, ends.
        variance: which of the two.
        callback: told each step's index and its estimate of the clean latents.

    Returns:
        The clean latents, float32.

    Raises:
        ValueError: there is no such variance, or not one seed per sample; or as of `clean_estimate`.
    """
    if variance not in get_args(Variance):
        raise ValueError(f"`variance` is {variance!r}, but there are {', '.join(get_args(Variance))}")
    sigma_squared = beta_tilde if variance == "posterior" else beta

    def transition(x_0: Tensor, x_t: Tensor, alpha_bar: float, alpha_bar_prev: float) -> tuple[Tensor, float]:
        return mu_tilde(x_0, x_t, alpha_bar, alpha_bar_prev), sigma_squared(alpha_bar, alpha_bar_prev)

    timesteps = _timesteps(scheduler, num_steps, 1.0)
    return _reverse(predict, latents.float(), scheduler, timesteps, transition, seeds, callback)


@torch.no_grad()
def sample_ddim(
    predict: Epsilon,
    latents: Tensor,
    scheduler: DDIMScheduler,
    num_steps: int,
    *,
    start: Tensor | None = None,
    strength: float = 1.0,
    eta: float = 0.0,
    seeds: Sequence[int] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """From noise to data by DDIM (Song et al. 2021, equations 12 and 16), in any number of steps.

        x_{t−1} = √ᾱ_{t−1} x_0 + √(1 − ᾱ_{t−1} − σ_t²) ε + σ_t z        σ_t = η √β̃_t

    η = 0 has no fresh noise z and follows the probability flow, η = 1 is `sample_ancestral`; the last step adds none
    anyway. With a strength s < 1 it starts from a clean estimate that is noised to timestep s T (Meng et al. 2022,
    SDEdit), and the steps are spread over what is left.

    Args:
        predict: predicts the noise at the latents and timesteps it is given, or what else the scheduler's
            `prediction_type` says.
        latents: the noise to start from, (B, C, h, w).
        scheduler: chooses the timesteps (`set_timesteps` is called on it); between two of them the step may have any
            length.
        num_steps: number of evaluations of `predict`, whatever the strength.
        start: the clean estimate, (B, C, h, w); with strength 1 it changes nothing.
        strength: s, above 0 and up to 1.
        eta: η, from 0 to 1.
        seeds: of z, see `sample_ancestral`; needed where η is not 0.
        callback: told each step's index and its estimate of the clean latents.

    Returns:
        The clean latents, float32.

    Raises:
        ValueError: the strength or η is out of its range; the strength has fewer timesteps than there are steps, or
            needs a `start`; there is not one seed per sample; or as of `clean_estimate`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` is {eta}, but it goes from 0 to 1")

    def transition(x_0: Tensor, x_t: Tensor, alpha_bar: float, alpha_bar_prev: float) -> tuple[Tensor, float]:
        epsilon = (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5
        variance = eta**2 * beta_tilde(alpha_bar, alpha_bar_prev)
        return alpha_bar_prev**0.5 * x_0 + (1 - alpha_bar_prev - variance) ** 0.5 * epsilon, variance

    x = latents.float()
    timesteps = _timesteps(scheduler, num_steps, strength)
    if strength < 1:
        if start is None:
            raise ValueError("a `strength` below 1 needs a clean estimate to `start` from")
        x = q_sample(start.float(), x, scheduler.alphas_cumprod[timesteps[0]])
    return _reverse(predict, x, scheduler, timesteps, transition, (seeds or ()) if eta else None, callback)


def _reverse(
    predict: Epsilon,
    x: Tensor,
    scheduler: DDPMScheduler | DDIMScheduler,
    timesteps: Tensor,
    transition: _Transition,
    seeds: Sequence[int] | None,
    callback: Callable[[int, Tensor], None] | None,
) -> Tensor:
    """From x at the first of the timesteps to the data, by one transition a timestep; no seeds, no noise."""
    if seeds is not None and len(seeds) != len(x):
        raise ValueError(f"there are {len(seeds)} seeds for the noise of {len(x)} samples")
    noises = islice(_noises(seeds or (), x), 1, None)  # `seeded_noise` makes the latents of the first.
    alpha_bars = [*scheduler.alphas_cumprod[timesteps], getattr(scheduler, "final_alpha_cumprod", torch.ones(()))]
    for i, t in enumerate(timesteps.to(x.device)):
        x_0 = clean_estimate(predict(x, t.expand(len(x))).float(), x, alpha_bars[i], scheduler)
        # In Python's floats, because β_t is the small difference of two numbers near 1.
        x, variance = transition(x_0, x, alpha_bars[i].item(), alpha_bars[i + 1].item())
        if seeds is not None and i + 1 < len(timesteps):
            x = x + variance**0.5 * next(noises)
        if callback is not None:
            callback(i, x_0)
    return x


def _noises(seeds: Sequence[int], latents: Tensor) -> Iterator[Tensor]:
    """Standard normal noise again and again, shaped as the latents; row i is the stream of `seeds[i]`."""
    generators = [seeded_generator(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(latents.device)


def _timesteps(scheduler: DDPMScheduler | DDIMScheduler, num_steps: int, strength: float) -> Tensor:
    """The scheduler's timesteps as if there were none beyond `strength` T."""
    # Rounded before it is cut: 0.29 · 100 is 28.999…
    total = int(round(strength * scheduler.config.num_train_timesteps, 6))
    if strength == 1 and not 1 <= num_steps <= total:
        raise ValueError(f"`num_steps` is {num_steps}, but there are 1 to {total}")
    if not (0 < strength <= 1 and 1 <= num_steps <= total):
        raise ValueError(f"`strength` {strength} and `num_steps` {num_steps} leave no timesteps to sample at")
    scheduler.set_timesteps(num_steps)
    if strength == 1:
        return scheduler.timesteps
    shorter = DDIMScheduler.from_config(scheduler.config, num_train_timesteps=total)
    shorter.set_timesteps(num_steps)
    return shorter.timesteps
