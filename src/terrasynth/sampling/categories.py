"""A flow from noise to class maps, learned by cross-entropy.

Each class is a point, √K times the one-hot code of K classes, so that its numbers have the mean square of the noise:

    z_σ = (1 − σ) √K e_k + σ ε        σ = 1: noise ε, σ = 0: the class k

The points being known, it is enough to predict which one it is (score interpolation, Dieleman et al. 2022, "Continuous
diffusion for categorical data", arXiv 2211.15089). By Bayes' rule, what the noisy pixel itself says is known too,

    log p(k | z) = f_k + log N(z; (1 − σ) √K e_k, σ²)

up to a constant; f_k is what the rest of the map says of the pixel, and all that is left for a network to learn. The
expected point z̄_0 = √K p gives the velocity (z − z̄_0) / σ for `flow.sample_flow`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["category_loss", "category_scores", "category_velocity", "to_codes", "to_points"]


#: Noise levels below it count as it, so that what a pixel says of itself stays a number.
_LEAST = 1e-4


def to_points(codes: Tensor) -> Tensor:
    """One-hot codes (B, K, H, W) as points of the flow, of the same shape; zero where nothing is labelled."""
    return codes * codes.shape[1] ** 0.5


def to_codes(points: Tensor) -> Tensor:
    """The way back; of noisy points, noisy codes."""
    return points / points.shape[1] ** 0.5


def category_scores(z: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
    """Logarithms of the probabilities of the classes up to a constant, float32 (B, K, H, W).

    Args:
        z: noisy points, (B, K, H, W).
        sigma: their noise levels, (B,).
        context: f, what a network makes of the whole map, (B, K, H, W).
    """
    s = sigma.float().clamp_min(_LEAST).view(-1, 1, 1, 1)
    return context.float() + (1 - s) / s**2 * to_points(z.float())


def category_velocity(z: Tensor, sigma: Tensor, scores: Tensor) -> Tensor:
    """The velocity that leads to the expected points, (B, K, H, W); arguments as of `category_scores`, σ above 0."""
    return (z - to_points(scores.softmax(1))) / sigma.view(-1, 1, 1, 1)


def category_loss(scores: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of each map, (B,), over its labelled pixels; zero where there are none.

    Args:
        scores: of `category_scores`, (B, K, H, W).
        masks: the true classes (B, H, W); other values than 0 to K − 1 are unlabelled.
    """
    masks = masks.long()
    labelled = (masks >= 0) & (masks < scores.shape[1])
    losses = F.cross_entropy(scores, masks.where(labelled, torch.zeros_like(masks)), reduction="none")
    return (losses * labelled).flatten(1).sum(1) / labelled.flatten(1).sum(1).clamp_min(1)
