"""An optimiser in main memory, for a card that has no room for its state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Twins"]


class Twins:
    """Copies in main memory of a model's trained parameters, for an optimiser to update there.

    What AdamW computes is the same wherever it does so; the moments, twice the size of the trained weights, leave the
    card, and its gradients and the new weights cross the bus once a step. Of parameters in main memory the twins are
    the parameters themselves.

    Attributes:
        named: the twins by the names of the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.named = {name: nn.Parameter(_to_main_memory(p.detach())) for name, p in self._parameters.items()}

    def take_gradients(self) -> None:
        """Give the twins the gradients of the parameters, which keep none."""
        for name, p in self._parameters.items():
            self.named[name].grad = None if p.grad is None else _to_main_memory(p.grad)
            p.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Give the parameters the weights of the twins."""
        for name, p in self._parameters.items():
            p.copy_(self.named[name])

    @torch.no_grad()
    def take_weights(self) -> None:
        """Give the twins the weights of the parameters, which a checkpoint brought back."""
        for name, p in self._parameters.items():
            self.named[name].copy_(p)


def _to_main_memory(tensor: Tensor) -> Tensor:
    # Not pinned: that comes in powers of two, here half as much again.
    return tensor.cpu()
