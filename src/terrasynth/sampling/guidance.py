"""Classifier-free guidance by several conditions, as arithmetic on predictions of a velocity or of noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Guided", "Predict", "condition_or_null", "guidance_chain", "guided_velocity", "is_guided"]

Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""Latents (n B, C, h, w), timesteps (n B,) and, for each condition, whether a row sees it, boolean (n B,), to
predictions (n B, C, h, w). Row k B + b is image b under term k; `condition_or_null` makes the conditions that fit."""


class Guided(NamedTuple):
    """One evaluation in a guided prediction: its coefficient, and the conditions that it sees."""

    coefficient: float
    sees: frozenset[str]


def guidance_chain(scales: Mapping[str, float]) -> list[Guided]:
    """Classifier-free guidance by conditions, each with its own scale (after Brooks et al. 2023, equation 3).

        v = v(∅) + s_1 (v(c_1) − v(∅)) + s_2 (v(c_1, c_2) − v(c_1)) + …

    where a condition that is not seen is its null: the empty prompt, the wholly unlabelled mask, no reference. Terms
    whose coefficient is zero are left out: with all scales 1 one evaluation is left, with equal scales two.

    Args:
        scales: s_k of each condition, in the order in which they come in.
    """
    names, weights = list(scales), [1.0, *scales.values(), 0.0]
    terms = [Guided(weights[k] - weights[k + 1], frozenset(names[:k])) for k in range(len(names) + 1)]
    return [term for term in terms if term.coefficient != 0]


def is_guided(sigma: float, interval: tuple[float, float]) -> bool:
    """Whether the noise level σ lies within an interval of guidance, low < σ <= high."""
    low, high = interval
    return low < sigma <= high


def guided_velocity(
    predict: Predict, scales: Mapping[str, float], interval: tuple[float, float] = (0.0, 1.0)
) -> Callable[[Tensor, Tensor], Tensor]:
    """The weighted sum of the velocities of `guidance_chain`, evaluated in one forward pass.

    Outside the interval of noise levels the conditions are followed without guidance, in one evaluation (Kynkäänniemi
    et al. 2024): at high noise guidance moves all colours away from the average image's, at low noise it changes
    little.

    Args:
        predict: see `Predict`.
        scales: of each condition, in the order in which they come in.
        interval: see `is_guided`; σ is that of the first image.
    """
    inside, outside = guidance_chain(scales), guidance_chain(dict.fromkeys(scales, 1.0))

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        terms = inside if is_guided(timestep[0].item() / 1000, interval) else outside
        n, count, device = len(terms), len(latents), latents.device
        uses = {
            name: torch.tensor([name in term.sees for term in terms], device=device).repeat_interleave(count)
            for name in scales
        }
        v = predict(latents.repeat(n, *[1] * (latents.ndim - 1)), timestep.repeat(n), uses).float()
        coefficients = torch.tensor([term.coefficient for term in terms], device=device)
        return (coefficients.view(n, *[1] * latents.ndim) * v.unflatten(0, (n, count))).sum(0)

    return velocity


def condition_or_null(use: Tensor, condition: Tensor, null: Tensor) -> Tensor:
    """Each image's condition where `use` says so, else the null condition.

    Args:
        use: boolean (n B,): once through the batch per guidance term, or (B,) for dropout in training.
        condition: (B, ...), one row an image.
        null: the same, or one row for all.

    Returns:
        (n B, ...), in the row order of `Predict`.
    """
    ones = [1] * (condition.ndim - 1)
    n = len(use) // len(condition)
    return torch.where(use.view(-1, *ones), condition.repeat(n, *ones), null.expand_as(condition).repeat(n, *ones))
