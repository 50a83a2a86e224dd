"""How good are paintings? Fidelity, diversity and copying, by numbers that need no network connection.

Pure functions over tensors; `benchmarks/quality.py` puts them together for a model. Whether a painting obeys its mask
is not measured here but by a segmentor trained on real tiles, with `Segmentor.evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from terrasynth.curation.features import random_features

__all__ = [
    "edge_ratio",
    "histogram_distance",
    "kid",
    "label_histogram",
    "mean_distances",
    "nearest",
    "psnr",
    "random_features",
    "share_nearer",
    "ssim",
    "thumbnails",
    "whitening",
]


def whitening(reference: Tensor, components: int = 64) -> Callable[[Tensor], Tensor]:
    """Fit a map from features to principal components of unit variance over a reference set.

    Nearly all variance of `random_features` between photographs is in a few directions, brightness and contrast before
    all: they would hide what paintings do wrong in the others. `kid` is far more sensitive after this map.

    Args:
        reference: float (N, D), the features of unseen real tiles.
        components: how many, at most N / 3, so that the variances are known well enough.

    Returns:
        A function from float (M, D) to float (M, C).
    """
    mean = reference.double().mean(0)
    _, deviations, directions = torch.linalg.svd(reference.double() - mean, full_matrices=False)
    kept = max(1, min(components, len(reference) // 3))
    scaled = directions[:kept].T / (deviations[:kept] / len(reference) ** 0.5)
    return lambda features: ((features.double() - mean) @ scaled).float()


# --- fidelity --------------------------------------------------------------------------------------------------------


def kid(
    real: Tensor, painted: Tensor, real_sources: Tensor | None = None, painted_sources: Tensor | None = None
) -> tuple[float, float]:
    """Kernel distance of two sets of features (see `whitening`), and its standard error.

    The unbiased squared maximum mean discrepancy under the cubic kernel (Bińkowski et al. 2018, "Demystifying MMD
    GANs", equation 3)::

        k(x, y) = (x · y / D + 1)³
        KID = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)

    over all pairs of different sources: 0 on average for two sets of one distribution, and sometimes negative. The
    usual mean over random subsets saves memory; this is what it converges to. A real tile, its reconstruction and the
    paintings under its mask have one source and resemble each other by construction; pairs of them would make the
    distance too small, and are left out (as in the one-sample statistic of Gretton et al. 2012, "A kernel two-sample
    test", lemma 6).

    The standard error is the jackknife's over sources, which is too large rather than too small (Efron and Stein 1981)
    if sources are independent; tiles cut from one image are not quite.

    Args:
        real: float (N, D).
        painted: float (M, D).
        real_sources: int64 (N,), where each comes from; by default every one of the N + M from elsewhere.
        painted_sources: int64 (M,).

    Returns:
        The distance and its standard error.
    """
    if real_sources is None or painted_sources is None:
        real_sources, painted_sources = torch.arange(len(real) + len(painted)).split([len(real), len(painted)])
    _, labels = torch.cat([real_sources, painted_sources]).unique(return_inverse=True)
    of_real, of_painted = labels.split([len(real), len(painted)])
    count = int(labels.max()) + 1
    x, y = real.double(), painted.double()
    xx, without_xx = _kernel_mean(x, x, of_real, of_real, count)
    yy, without_yy = _kernel_mean(y, y, of_painted, of_painted, count)
    xy, without_xy = _kernel_mean(x, y, of_real, of_painted, count)
    without = without_xx + without_yy - 2 * without_xy
    # Tiles, paintings and pairs of both are samples of their own, each with its own size.
    group = torch.bincount(of_real, minlength=count).clamp_max(1)
    group += 2 * torch.bincount(of_painted, minlength=count).clamp_max(1)
    variance = sum(
        (len(values) - 1) * values.var(correction=0) for values in (without[group == g] for g in group.unique())
    )
    return float(xx + yy - 2 * xy), float(torch.as_tensor(variance).sqrt())


def _kernel_mean(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean of k over all pairs of different sources, and (count,) the same without each one source."""
    different = (of_x[:, None] != of_y).double()
    kernel = (x @ y.T / x.shape[1] + 1) ** 3 * different

    def total_and_by_source(pairs: Tensor) -> tuple[Tensor, Tensor]:
        by_source = pairs.new_zeros(count).index_add(0, of_x, pairs.sum(1)).index_add(0, of_y, pairs.sum(0))
        return pairs.sum(), by_source

    (total, of_source), (pairs, pairs_of_source) = total_and_by_source(kernel), total_and_by_source(different)
    return total / pairs, (total - of_source) / (pairs - pairs_of_source)


def label_histogram(masks: Tensor, num_classes: int) -> Tensor:
    """What share of all labelled pixels of masks (N, H, W) each class has, float64 (K,); NaN if none is labelled."""
    values = masks.flatten().long()
    counts = torch.bincount(values[(values >= 0) & (values < num_classes)], minlength=num_classes).double()
    return counts / counts.sum()


def histogram_distance(real: Tensor, painted: Tensor, num_classes: int) -> float:
    """How far the label histograms of two sets of masks (N, H, W) are apart: their total variation, Σ |p_k − q_k| / 2.

    The share of pixels whose class would have to change for both to be alike: 0 for equal histograms, 1 for sets that
    share no class. A system that paints its own masks may forget rare classes, which hardly shows here: look at the
    histograms themselves (`label_histogram`) too.
    """
    p, q = (label_histogram(masks, num_classes) for masks in (real, painted))
    return float((p - q).abs().sum() / 2)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, float (N,), of uint8 (N, 3, H, W); infinite where equal."""
    error = (images.double() - references.double()).square().mean((1, 2, 3))
    return 10 * (255**2 / error).log10()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each image, float (N,), of uint8 (N, 3, H, W) with sides of at least 11.

    Wang et al. 2004, "Image quality assessment", equation 13: Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01,
    K2 = 0.03; the mean over all whole windows of the three colour channels.
    """
    window = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).to(images.device)

    def blur(x: Tensor) -> Tensor:
        rows = F.conv2d(x.flatten(0, 1)[:, None], window[None, None, :, None])
        return F.conv2d(rows, window[None, None, None]).unflatten(0, x.shape[:2])[:, :, 0]

    x, y = images.float() / 255, references.float() / 255
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def edge_ratio(images: Tensor, side: int) -> float:
    """How much stronger the steps between neighbouring pixels are on a grid than elsewhere.

    The mean absolute difference across the lines of a grid of `side` pixels, over that between all other neighbours: 1
    for images that know nothing of the grid, more where a generator's tokens or patches are visible.

    Args:
        images: uint8 (N, 3, H, W).
        side: of a token or patch in pixels, at least 2.
    """
    on, off = [], []
    for dim in (-2, -1):
        steps = images.float().diff(dim=dim).abs().transpose(dim, -1)
        on_grid = torch.arange(1, images.shape[dim]) % side == 0
        on.append(steps[..., on_grid].flatten())
        off.append(steps[..., ~on_grid].flatten())
    return float(torch.cat(on).mean() / torch.cat(off).mean())


# --- diversity and copying -------------------------------------------------------------------------------------------


def mean_distances(points: Tensor, sources: Tensor) -> tuple[float, float]:
    """Mean distance of two points of one source, and of two points of different sources; NaN where there are none.

    Paintings under one mask with several seeds have one source: the first number is how different they are, the second
    how different paintings are at all. Both are to be compared with the second number of real tiles.

    Args:
        points: float (N, D), features or pixels; the distance is the root mean square over the D.
        sources: int64 (N,).
    """
    distances = torch.cdist(points, points) / points.shape[1] ** 0.5
    same = sources[:, None] == sources
    within = same & ~torch.eye(len(points), dtype=torch.bool)
    return float(distances[within].mean()), float(distances[~same].mean())


def thumbnails(images: Tensor, size: int = 16) -> Tensor:
    """Images uint8 (N, 3, H, W) shrunk by area and laid flat, float32 (N, 3 size²) in grey levels.

    Small enough that a copy is near its original even if it is shifted a little or has lost its fine detail.
    """
    return F.adaptive_avg_pool2d(images.float(), size).flatten(1)


def nearest(points: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest training point of every point: distances, float (N,), and which, int64 (N,).

    Args:
        points: float (N, D), features or flat thumbnails; the distance is the root mean square over the D.
        training: float (M, D).
    """
    found = [
        # Not by products: those lose what is left of the difference between an image and its copy.
        torch.cdist(batch, training, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        for batch in points.split(64)
    ]
    distances, positions = (torch.cat(parts) for parts in zip(*found, strict=True))
    return distances / points.shape[1] ** 0.5, positions


def share_nearer(distances: Tensor, held_out: Tensor, quantile: float = 0.01) -> float:
    """Share of `distances` below the quantile of `held_out`.

    Both are distances to the nearest training image, of paintings and of real tiles that the generator never saw. A
    generator that copies exceeds `quantile`; so does, to a lesser degree, one whose images are flat, since flat images
    are near to everything: look at the pairs.
    """
    return float((distances < held_out.quantile(quantile)).float().mean())
