"""One velocity for a field larger than the model's: averaged over windows that overlap, in every sampling step.

    v(z) = Σ_i w_i · v_i(z restricted to window i)        Σ_i w_i = 1 everywhere

(MultiDiffusion, Bar-Tal et al. 2023, section 3, for the velocity of a flow.) The windows see parts of one field of
noise and of one estimate, so they agree where they overlap, and nothing is pasted afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from terrasynth.data.blending import Axis
from terrasynth.sampling.flow import Velocity

__all__ = ["Patch", "blended_velocity", "patches"]


@dataclass(frozen=True)
class Patch:
    """A window of a field.

    Attributes:
        rows, columns: where it is.
        weight: float32 (h, w).
    """

    rows: slice
    columns: slice
    weight: Tensor

    def scaled(self, factor: int) -> Patch:
        """The same window of a field with `factor` times as many rows and columns."""
        rows, columns = (slice(s.start * factor, s.stop * factor) for s in (self.rows, self.columns))
        return Patch(rows, columns, self.weight.repeat_interleave(factor, 0).repeat_interleave(factor, 1))

    def to(self, device: torch.device) -> Patch:
        """The same window, its weight on a device."""
        return Patch(self.rows, self.columns, self.weight.to(device))


def patches(down: Axis, across: Axis) -> list[Patch]:
    """The windows of two axes, row by row; over all of them, the weights of a place sum to one."""
    return [
        Patch(
            slice(top, top + down.size),
            slice(left, left + across.size),
            torch.outer(torch.from_numpy(down.weights[i]), torch.from_numpy(across.weights[j])),
        )
        for i, top in enumerate(down.starts)
        for j, left in enumerate(across.starts)
    ]


def blended_velocity(parts: Sequence[tuple[Sequence[Patch], Velocity]]) -> Velocity:
    """The velocity of one large field from those of batches of its windows.

    Args:
        parts: for each batch its B windows, all of one size and on the device of the latents, and the velocity that
            takes their latents (B, C, h, w).

    Returns:
        A velocity of latents (1, C, H, W).
    """

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        total = torch.zeros_like(latents)
        for windows, of_windows in parts:
            cut = torch.cat([latents[:, :, window.rows, window.columns] for window in windows])
            found = of_windows(cut, timestep.expand(len(windows)))
            for window, v in zip(windows, found, strict=True):
                total[0, :, window.rows, window.columns] += window.weight * v
        return total

    return velocity
