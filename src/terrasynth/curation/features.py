"""What an image looks like, as numbers that need no weights and no network connection."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["random_features"]

# What `random_features` is: another value here makes another ruler, whose distances are not comparable.
_SEED = 2020
_WIDTHS = (27, 64)
_SCALES = 4
_FLOOR, _MIDDLE = 0.03, 0.08


@torch.no_grad()
def random_features(images: Tensor, batch_size: int = 32) -> Tensor:
    """Colours and textures of images, by a fixed random network: no weights to download, the same on every machine.

    Two convolutions of 3 x 3 with ReLU, with 27 and 64 orthonormal filters, see the image at full, half, quarter and
    eighth size. Some filters average, the others have zero sum: in a wholly random filter brightness would drown
    everything else. The first layer's are a complete basis of 3 x 3 colour patches. Of every map the mean and the
    standard deviation over the image are taken, as log((x + 0.03) / 0.08): a ratio of contrasts counts alike in bright
    and in dull images, what is far below 8 grey levels counts little, and photographs lie around 0.

    Random networks are an established embedding for such comparisons (Naeem et al. 2020, "Reliable fidelity and
    diversity metrics for generative models", section 4), and statistics of multi-scale random filters pin down a
    texture (Ustyuzhaninov et al. 2017, "What does it take to generate natural textures?").

    They see colours, contrast, sharpness, noise, and texture and its direction up to about 40 pixels. They do not see
    where in the image something is, nor what it means (a road that leads nowhere), and hardly see faint edges on a grid
    (that is what `edge_ratio` is for). Distances are comparable with each other, for images of one size and ground
    sampling distance, and with nothing else: not with distances in Inception features.

    Args:
        images: uint8 (N, 3, H, W), sides of at least 8.
        batch_size: images computed together.

    Returns:
        float32 (N, 728) on the CPU.
    """
    return torch.cat([_features(batch.float() / 255 - 0.5) for batch in images.split(batch_size)]).cpu()


def _features(images: Tensor) -> Tensor:
    statistics = []
    for scale in range(_SCALES):
        x = F.avg_pool2d(images, 2**scale)
        for weight in _filters():
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight.to(x)).relu()
            # By the sum of squares it is several times as fast as `Tensor.std`, and exact enough beside _FLOOR.
            mean, square = x.mean((2, 3)), torch.linalg.vector_norm(x, dim=(2, 3)) ** 2 / x[0, 0].numel()
            statistics += [mean, (square - mean**2).clamp_min(0).sqrt()]
    return ((torch.cat(statistics, 1) + _FLOOR) / _MIDDLE).log()


@lru_cache(maxsize=1)
def _filters() -> tuple[Tensor, ...]:
    """The convolutions' weights, (27, 3, 3, 3) and (64, 27, 3, 3): orthonormal, then scaled by sqrt(2) for the ReLU."""
    # The legacy generator of NumPy is the one whose numbers are promised never to change.
    random = np.random.RandomState(_SEED)
    filters, channels = [], 3
    for width in _WIDTHS:
        averaging = channels if channels == 3 else width // 4
        mean = _orthonormal(random.standard_normal((channels, averaging)))
        detail = random.standard_normal((channels, 9, width - averaging))
        detail = _orthonormal((detail - detail.mean(1, keepdims=True)).reshape(channels * 9, -1))
        both = np.concatenate([np.repeat(mean / 3, 9, axis=0), detail], axis=1)
        weight = np.sqrt(2) * both.T.reshape(width, channels, 3, 3)
        filters.append(torch.from_numpy(np.ascontiguousarray(weight)).float())
        channels = width
    return tuple(filters)


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    q, r = np.linalg.qr(columns)
    return q * np.sign(np.diag(r))  # a decomposition is unique up to signs
