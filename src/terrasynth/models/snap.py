"""Class maps that follow the colours of their image.

In a few rounds neighbours vote for the class of every pixel, the more alike their colours the louder. After PAMR
(Araslanov and Roth 2020, "Single-Stage Semantic Segmentation from Image Labels", arXiv 2005.08104), which asks
neighbours in eight directions at a few distances. Of pixel i with colour I_i and position p_i, in each round

    a_ij ∝ exp(−|I_i − I_j|² / 2σ² − |p_i − p_j|² / 2s²)        Σ_j a_ij = 1, less for a pixel like none of them
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
_REACH = max(_RADII)
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
    # Of two classes one has the votes of the other with the other sign, to the last bit.
    two = votes.shape[1] == 2
    found = votes[:, :1] if two else votes
    padded = F.pad(found, [_REACH] * 4)
    middle, near = _shifted(padded, 0, 0), [_shifted(padded, dy, dx) for dy, dx in _OFFSETS]
    for number in range(rounds):
        if number:
            middle.copy_(found.mul_(_GAIN).tanh_())
        found = torch.zeros_like(found)
        for weight, asked in zip(weights, near, strict=True):
            found.addcmul_(weight, asked)
    return torch.cat([found, -found], dim=1) if two else found


def _weights(image: Tensor) -> Tensor:
    """a_ij of (1, 3, H, W) for the neighbours at every offset, (O, 1, 1, H, W); zero beyond the frame."""
    padded, frame = (F.pad(x, [_REACH] * 4) for x in (image, torch.ones_like(image[:, :1])))
    found: dict[tuple[int, int], Tensor] = {}
    for dy, dx in _OFFSETS:
        if (-dy, -dx) in found:  # the other of two neighbours has looked already
            found[dy, dx] = _shifted(F.pad(found[-dy, -dx], [_REACH] * 4), dy, dx)
            continue
        apart = (_shifted(padded, dy, dx) - image).square().sum(1, keepdim=True) / (2 * _COLOR**2)
        found[dy, dx] = torch.exp(-apart - (dy**2 + dx**2) / (2 * _SPACE**2)) * _shifted(frame, dy, dx)
    weights = torch.stack(list(found.values()))
    return weights / weights.sum(0).clamp_min(1e-6)


def _shifted(padded: Tensor, dy: int, dx: int) -> Tensor:
    """A view of (B, C, H, W) that was padded by `_REACH`: what lies `dy` below every pixel, `dx` to its right."""
    top, left = _REACH + dy, _REACH + dx
    return padded[..., top : top + padded.shape[-2] - 2 * _REACH, left : left + padded.shape[-1] - 2 * _REACH]
