"""Class maps that follow the colours of their image.

In a few rounds neighbours vote for the class of every pixel, the more alike their colours the louder. After PAMR
(Araslanov and Roth 2020, "Single-Stage Semantic Segmentation from Image Labels", arXiv 2005.08104), which asks
neighbours in eight directions at a few distances. Of pixel i with colour I_i and position p_i, in each round

    a_ij ∝ exp(−|I_i − I_j|² / 2σ² − |p_i − p_j|² / 2s²)        Σ_j a_ij = 1
    v_i = Σ_j a_ij tanh(2 v_j)

where v has a channel for each class; at first, without the hyperbolic tangent, 1 for the class of the map, −1 for every
other and 0 where it is unlabelled. In place of PAMR's spread of the colours nearby, σ is the same everywhere; nearness
counts, as in Krähenbühl and Koltun 2011; and the hyperbolic tangent keeps votes from fading.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["snap"]

#: Distances of the neighbours that are asked, in pixels along either axis.
_RADII = (1, 2, 4, 8, 14, 22)
_OFFSETS = [(r * y, r * x) for r in _RADII for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
#: σ, of colours in [0, 1], and s, in pixels.
_COLOR, _SPACE = 0.1, 20.0
_GAIN = 2.0


@torch.no_grad()
def snap(images: Tensor, maps: Tensor, num_classes: int, rounds: int) -> Tensor:
    """The shares of the classes in the votes for every pixel; the largest is that of a map that follows the image.

    Args:
        images: (B, 3, H, W) in [0, 1].
        maps: class indices (B, H, W); every other value is unlabelled, and at first has no vote.
        num_classes: K.
        rounds: how often neighbours are asked; 0 gives 1 to the class of the map. In each, a boundary moves by at most
            22 pixels.

    Returns:
        float32 (B, K, H, W), from 0 to 1 with sum 1, or 0 where the map is unlabelled; 0 of classes that it does not
        have.
    """
    first = maps.long().unsqueeze(1) == torch.arange(num_classes, device=maps.device).view(-1, 1, 1)
    known, shares = first.any(1), first.float()
    if not rounds:
        return shares
    # One map after the other, of the classes that it has: others have no share, and votes of one do not change another.
    for number, there in enumerate(_present(first)):
        if len(there) > 1:
            some = first[number : number + 1, there]
            votes = (2.0 * some - 1) * known[number]
            votes = (1 + _voted(images[number : number + 1].float(), votes, rounds)).clamp_min(0) * known[number]
            shares[number, there] = (votes / votes.sum(1, keepdim=True).clamp_min(1e-6))[0]
    return shares


def _present(first: Tensor) -> list[Tensor]:
    """Of every map, the indices of the classes that it has; `first` is (B, K, H, W), whether a pixel is of a class."""
    return [there.nonzero().flatten() for there in first.flatten(2).any(2)]


def _voted(image: Tensor, votes: Tensor, rounds: int) -> Tensor:
    """Votes (1, K, H, W) after so many rounds."""
    weights = _weights(image)
    for number in range(rounds):
        if number:
            votes = torch.tanh(_GAIN * votes)
        found = torch.zeros_like(votes)
        for weight, near in zip(weights, _neighbours(votes), strict=True):
            found.addcmul_(weight, near)
        votes = found
    return votes


def _weights(images: Tensor) -> Tensor:
    """a_ij for the neighbours at every offset, (O, B, 1, H, W); zero beyond the frame."""
    frame = _neighbours(torch.ones_like(images[:1, :1]))
    found = []
    for (dy, dx), near, there in zip(_OFFSETS, _neighbours(images), frame, strict=True):
        apart = (near - images).square().sum(1, keepdim=True) / (2 * _COLOR**2)
        found.append(torch.exp(-apart - (dy**2 + dx**2) / (2 * _SPACE**2)) * there)
    weights = torch.stack(found)
    return weights / weights.sum(0).clamp_min(1e-6)


def _neighbours(x: Tensor) -> list[Tensor]:
    """Views of (B, C, H, W) as the neighbours at `_OFFSETS` have it; zero beyond the frame."""
    most, (height, width) = max(_RADII), x.shape[-2:]
    padded = F.pad(x, [most] * 4)
    return [padded[..., most + dy : most + dy + height, most + dx : most + dx + width] for dy, dx in _OFFSETS]
