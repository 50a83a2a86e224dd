"""What sharpens a class map without learning: DenseCRF, guided filter, majority, random walker.

    pip install pydensecrf2 opencv-contrib-python-headless scikit-image

Each takes an image, uint8 (H, W, 3), a class map of it, uint8 (H, W), and the number of classes K, and returns a class
map. `GRIDS` has the settings among which `boundaries.py` chooses on validation tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydensecrf.densecrf import DenseCRF2D
from pydensecrf.utils import unary_from_labels, unary_from_softmax
from scipy.ndimage import distance_transform_edt
from skimage.segmentation import random_walker as walk

__all__ = ["GRIDS", "dense_crf", "guided_filter", "majority", "random_walker"]

Map = NDArray[np.uint8]


def dense_crf(
    image: Map,
    rough: Map,
    classes: int,
    *,
    shares: NDArray[np.float32] | None = None,
    confidence: float = 0.7,
    space: float = 40,
    color: float = 8,
    weight: float = 5,
    iterations: int = 5,
) -> Map:
    """Krähenbühl and Koltun 2011: fully connected, with a smoothness and an appearance kernel, by mean field.

    `confidence` is how probable the class of the map is; with `shares`, (K, H, W), these count instead of the map.
    `space` and `color` are the deviations of the appearance kernel in pixels and grey values, `weight` its weight;
    smoothness has 3 pixels and 3, as published.
    """
    height, width = rough.shape
    if shares is None:
        unary = unary_from_labels(rough, classes, gt_prob=confidence, zero_unsure=False)
    else:
        unary = unary_from_softmax(shares.reshape(classes, -1))
    field = DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(unary))
    field.addPairwiseGaussian(sxy=3, compat=3)
    field.addPairwiseBilateral(sxy=space, srgb=color, rgbim=image.copy(order="C"), compat=weight)
    found = np.asarray(field.inference(iterations)).reshape(classes, height, width)
    return found.argmax(0).astype(np.uint8)


def guided_filter(image: Map, rough: Map, classes: int, *, radius: int = 4, softness: float = 1e-3) -> Map:
    """He et al. 2010: the indicator of every class, as a locally linear function of the image; the largest wins."""
    guide = image.astype(np.float32) / 255
    planes = [
        cv2.ximgproc.guidedFilter(guide, (rough == k).astype(np.float32), radius, softness) for k in range(classes)
    ]
    return np.stack(planes).argmax(0).astype(np.uint8)


def majority(image: Map, rough: Map, classes: int, *, radius: int = 2) -> Map:
    """The most frequent class of the square around a pixel; of equally frequent ones the first."""
    side = 2 * radius + 1
    counts = [cv2.boxFilter((rough == k).astype(np.float32), -1, (side, side), normalize=False) for k in range(classes)]
    return np.stack(counts).argmax(0).astype(np.uint8)


def random_walker(image: Map, rough: Map, classes: int, *, margin: float = 4, stiffness: float = 130) -> Map:
    """Grady 2006: pixels further than `margin` from a boundary are seeds, those between go to the nearest in looks."""
    seeds = np.zeros(rough.shape, np.int64)
    for k in range(classes):
        inside = rough == k
        if not inside.any():
            continue
        depth = distance_transform_edt(inside)
        # A region that is thinner than the margin keeps its middle.
        seeds[inside & (depth >= min(margin, depth.max()))] = k + 1
    there = np.unique(seeds[seeds > 0])
    if len(there) < 2 or (seeds > 0).all():
        return rough
    # It wants labels 1 to n.
    small = np.searchsorted(there, seeds) + 1
    small[seeds == 0] = 0
    found = walk(image.astype(np.float64) / 255, small, beta=stiffness, mode="cg_j", tol=1e-3, channel_axis=-1)
    return np.where(found > 0, there[np.maximum(found, 1) - 1] - 1, rough).astype(np.uint8)


Refine = Callable[..., Map]
#: Of every rival, what to choose from.
GRIDS: dict[str, tuple[Refine, Sequence[dict[str, Any]]]] = {
    "DenseCRF": (
        dense_crf,
        [
            {"space": space, "color": color, "weight": weight, "confidence": confidence}
            for space in (10, 40)
            for color in (5, 13)
            for weight in (3, 10)
            for confidence in (0.6, 0.9)
        ],
    ),
    "DenseCRF (probabilities)": (
        dense_crf,
        [
            {"space": space, "color": color, "weight": weight}
            for space in (10, 40)
            for color in (5, 13)
            for weight in (3, 10)
        ],
    ),
    "guided filter": (
        guided_filter,
        [{"radius": radius, "softness": softness} for radius in (2, 4, 8) for softness in (1e-4, 1e-3, 1e-2)],
    ),
    "majority": (majority, [{"radius": radius} for radius in (1, 2, 3, 5)]),
    "random walker": (
        random_walker,
        [{"margin": margin, "stiffness": stiffness} for margin in (2, 4, 6) for stiffness in (30, 130, 500)],
    ),
}
