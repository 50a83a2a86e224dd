"""The reference image of training: an augmented copy of the target, in the target's look but not its pixels.

TISynth's list of operations (Dong et al. 2025), a short one of Karras et al. 2022's: integer translation, isotropic
scale, rotation, fractional translation, each with a probability of its own. There six targets of ten stay as they are,
and a model can learn to copy its reference; here operations are drawn again until some pixel moves by one pixel.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as colors

__all__ = ["reference_affine", "reference_view"]

# The streams of a seed from 0 to 4 are those of `data.augment`.
_GEOMETRY, _COLOR = 5, 6
# Of the image's sides; as exponents of 2; of half a turn.
_TRANSLATION, _SCALE, _ROTATION = 0.125, 0.2, 0.1
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.2, 0.2, 0.3, 0.03


def reference_view(image: Tensor, seed: int, *, probability: float = 0.12, color: bool = False) -> Tensor:
    """A reference for the target `image`: never the target itself.

    Whatever comes from beyond the edges is the image mirrored there.

    Args:
        image: uint8 (3, H, W).
        seed: decides all draws, not negative.
        probability: of each operation, above 0.
        color: change brightness, contrast, saturation and hue too, each with the same probability, beside at least one
            operation of the list. Off as published: colours are most of what a reference tells, and a model that sees
            them change learns to make less of them.

    Returns:
        float32 (3, H, W) in [0, 1].
    """
    height, width = image.shape[-2:]
    matrix = torch.from_numpy(reference_affine(height, width, seed, probability))
    # The grid has coordinates from -1 to 1 along both sides, and says where each pixel comes from.
    sides = torch.tensor([2 / width, 2 / height, 1], dtype=matrix.dtype)
    theta = sides[:, None] * torch.linalg.inv(matrix) / sides
    grid = functional.affine_grid(theta[None, :2], [1, 3, height, width], align_corners=False).float()
    moved = functional.grid_sample(
        image[None].float() / 255, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )[0]
    return _recolored(moved, seed, probability) if color else moved


def reference_affine(height: int, width: int, seed: int, probability: float = 0.12) -> NDArray[np.float64]:
    """Where the pixels of the target go: a matrix (3, 3) on (x, y, 1), in pixels from the image's centre.

    Args:
        height: of the image.
        width: of the image.
        seed: decides all draws, not negative.
        probability: of each of the four operations, in (0, 1].
    """
    if not 0 < probability <= 1:
        raise ValueError(f"`probability` is {probability}, but must be above 0 and at most 1")
    random, sides = np.random.default_rng((seed, _GEOMETRY)), np.array([width, height])
    corners = np.array([[-width, width, -width, width], [-height, -height, height, height], [2, 2, 2, 2]]) / 2
    while True:
        whole, scaled, turned, shifted = random.random(4) < probability
        steps = np.round(random.uniform(-1, 1, 2) * _TRANSLATION * sides)
        scale = 2 ** (random.standard_normal() * _SCALE)
        angle = random.uniform(-1, 1) * math.pi * _ROTATION
        shift = random.standard_normal(2) * _TRANSLATION * sides
        matrix = np.eye(3)
        if whole:
            matrix[:2, 2] = steps
        if scaled:
            matrix[:2] *= scale
        if turned:
            cos, sin = math.cos(angle), math.sin(angle)
            matrix[:2] = np.array([[cos, -sin], [sin, cos]]) @ matrix[:2]
        if shifted:
            matrix[:2, 2] += shift
        # Of an affine map, a corner moves most.
        if np.linalg.norm((matrix @ corners - corners)[:2], axis=0).max() >= 1:
            return matrix


def _recolored(image: Tensor, seed: int, probability: float) -> Tensor:
    random = np.random.default_rng((seed, _COLOR))
    used = random.random(4) < probability
    strengths = 2 ** (random.standard_normal(3) * (_BRIGHTNESS, _CONTRAST, _SATURATION))
    hue = float(random.uniform(-_HUE, _HUE))
    operations = (colors.adjust_brightness, colors.adjust_contrast, colors.adjust_saturation, colors.adjust_hue)
    for apply, operation, strength in zip(used, operations, (*strengths.tolist(), hue), strict=True):
        if apply:
            image = operation(image, strength)
    return image
