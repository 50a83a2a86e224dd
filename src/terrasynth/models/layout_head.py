"""What the pixels of a noisy class map say of each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LayoutHead"]

_WIDTH = 8
_DILATIONS = (2, 4)


class LayoutHead(nn.Module):
    """Adds to what a transformer's tokens say of the pixels what the pixels around them say.

    One token reads and tells a square of pixels, so what it tells ends at its edges. Convolutions over 15 x 15 pixels
    know no such edges. They see one class at a time, its noisy code and what the tokens say of it, all classes with the
    same weights, so they fit any classes. What they add starts at zero, and no gradient passes to the tokens but in
    the embedding of noise levels: the tokens have a loss of their own, since with what is near explained to them they
    learned less of what is far.

    Args:
        embedding: width of the embedding of noise levels.
    """

    def __init__(self, embedding: int) -> None:
        super().__init__()
        self.read = nn.Conv2d(2, _WIDTH, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * _WIDTH)
        self.around = nn.ModuleList(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=d, dilation=d) for d in _DILATIONS)
        self.write = nn.Conv2d(_WIDTH, 1, 1)
        nn.init.zeros_(self.write.weight)
        self.write.bias = nn.Parameter(torch.zeros(1))

    def forward(self, codes: Tensor, context: Tensor, embedding: Tensor) -> Tensor:
        """What all say of every pixel, (B, K, H, W).

        Args:
            codes: noisy codes of K classes, (B, K, H, W).
            context: what the tokens say, (B, K, H, W); no gradient passes to it.
            embedding: of the noise levels, (B, D).
        """
        batch, classes = codes.shape[:2]
        context = context.detach()
        each = torch.stack([codes, context], dim=2).flatten(0, 1)
        scale, shift = self.modulation(embedding).repeat_interleave(classes, 0)[..., None, None].chunk(2, dim=1)
        features = (1 + scale) * self.read(each) + shift
        for layer in self.around:
            features = features + layer(F.silu(features))
        return context + self.write(F.silu(features)).view(batch, classes, *codes.shape[2:])
