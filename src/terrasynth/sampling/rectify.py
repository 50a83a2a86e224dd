"""Control-rectify flow matching (CRFM): a segmentor, or any loss on images, corrects the velocity of the first steps.

Yang et al. 2026 ("TODSynth", arXiv 2512.16740). The velocity is changed rather than the latents, and the gradient goes
through the decoder and the loss only, never through the generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from terrasynth.errors import TerraSynthError
from terrasynth.sampling.flow import Decode, FlowStep

__all__ = ["ControlRectify"]


@dataclass(frozen=True, eq=False)
class ControlRectify:
    """Steers a flow sampler down the gradient of a loss on the image that each step heads for.

    In each of K steps, by default the first ones, `repeats` times:

        z_0 = z − σ v                    where the step heads
        L   = Σ_b loss_b(decode(z_0))    a sum, so that the strength does not depend on the batch size
        g   = ∂L / ∂v                    normalised per image
        v   ← (1 − α if blend else 1) v − α g

    The settings are those of `recipe.SteeringConfig`, name for name. Images whose gradient is zero (nothing is wrong)
    keep their velocity. Gradient memory is the decoder's and the loss's activations; parameters get no gradient.

    Args:
        loss: maps images (B, 3, H, W) in [0, 1] and `targets` to one differentiable loss per image, (B,).
        targets: handed to `loss` as they are.
        steps: K.
        start: how many steps are left alone before; 0 as published.
        strength: α, the largest step.
        schedule: α at step i of N: `constant` α; `increasing` α (i + 1) / N; `decreasing` α (1 − (i + 1) / N).
        normalise: `none`; `unit` g / ‖g‖ (published as "l2_norm"); `velocity` g ‖v‖ / ‖g‖; `x0` g ‖z_0‖ / (σ ‖g‖). As
            ∂L/∂v = −σ ∂L/∂z_0, a step on the velocity is a step of σ times its length on the clean estimate z_0, down
            z_0's own gradient: the last moves z_0 by α of its norm.
        blend: shrink the velocity by 1 − α first (published as "is_synth").
        repeats: rectifications per step.
        clamp: clip the velocity to ± this afterwards; the published code always clips at 1.
    """

    loss: Callable[[Tensor, Any], Tensor]
    targets: Any
    steps: int = 4
    start: int = 0
    strength: float = 0.1
    schedule: Literal["constant", "increasing", "decreasing"] = "decreasing"
    normalise: Literal["none", "unit", "velocity", "x0"] = "velocity"
    blend: bool = False
    repeats: int = 1
    clamp: float | None = None

    def __call__(self, velocity: Tensor, latents: Tensor, step: FlowStep, decode: Decode) -> Tensor:
        """Return the rectified velocity.

        Args:
            velocity: v, (B, C, h, w).
            latents: z at noise level `step.sigma`, (B, C, h, w).
            step: where the sampler is.
            decode: latents to images (B, 3, H, W) in [0, 1], differentiable.

        Raises:
            TerraSynthError: if the loss does not give one value per image.
        """
        if not self.start <= step.index < self.start + self.steps:
            return velocity
        v, alpha = velocity, self.step_size(step)
        for _ in range(self.repeats):
            g = self._gradient(v, latents, step.sigma, decode)
            norm = _norm(g)
            if self.normalise != "none":
                g = g / (norm + 1e-10)
            if self.normalise == "velocity":
                g = g * _norm(v)
            elif self.normalise == "x0":
                g = g * _norm(latents - step.sigma * v) / step.sigma
            rectified = (v * (1 - alpha) if self.blend else v) - alpha * g
            if self.clamp is not None:
                rectified = rectified.clamp(-self.clamp, self.clamp)
            v = torch.where(norm == 0, v, rectified)
        return v

    def step_size(self, step: FlowStep) -> float:
        """The step α_i along the gradient under the schedule, whether or not `step` is among the K."""
        progress = (step.index + 1) / step.total
        return self.strength * {"constant": 1.0, "increasing": progress, "decreasing": 1 - progress}[self.schedule]

    def _gradient(self, velocity: Tensor, latents: Tensor, sigma: float, decode: Decode) -> Tensor:
        """The gradient of the summed loss by the velocity alone; callers may be under `no_grad` or `inference_mode`."""
        with torch.inference_mode(False), torch.enable_grad():
            v = velocity.detach().clone().requires_grad_()
            losses = self.loss(decode(latents - sigma * v), self.targets)
            if losses.shape != velocity.shape[:1]:
                raise TerraSynthError(
                    "the steering loss must give one value per image",
                    found=f"shape {tuple(losses.shape)}",
                    expected=f"shape {tuple(velocity.shape[:1])}",
                    fix="reduce the loss over pixels, not over the batch",
                )
            return torch.autograd.grad(losses.sum(), v)[0]


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of each image, (B, 1, 1, 1)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
