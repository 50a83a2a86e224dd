"""Images without labels: windows of them, and pseudo-masks to learn the following of masks from.

Two uses: a base model is trained on nothing but such windows and procedural scenes (`kind: unlabelled`); a generator
that is fitted to a few labelled tiles may see them too, under a wholly unlabelled mask or one that a segmentor reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from terrasynth.data.read import read_image, refuse_bad_files
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.io import IMAGE_SUFFIXES, digest
from terrasynth.progress import track
from terrasynth.recipe import SourceConfig

__all__ = ["cut_windows", "find_images", "merged_schema", "pseudo_masks"]

_SMOOTH = 7
#: Features that vary less than this (of 1) are not stretched to unit deviation: that would be rounding.
_LEAST_DEVIATION = 0.01
_SAMPLED_PIXELS = 100_000
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


def find_images(root: Path, source: SourceConfig) -> list[Path]:
    """The image files of a source, sorted.

    Raises:
        TerraSynthError: there are none.
    """
    try:
        found = sorted(root.glob(source.images))
    except (ValueError, NotImplementedError):  # as Python refuses "/x/*" and "a**"
        found = []
    paths = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    if not paths:
        raise TerraSynthError(
            "no such images",
            path=root / source.images,
            expected="a pattern under the data folder, as `images/train/*.jpg`",
            fix="correct data.unlabelled, or --data",
        )
    return paths


def cut_windows(root: Path, source: SourceConfig, size: int, *, skip_bad: bool = False) -> tuple[list[str], Tensor]:
    """Square windows of every image of a source, brought to one size.

    The side of a window is drawn between `scale[0]` and `scale[1]` times `size` (and the shorter side of the image),
    its place anywhere; both derive from the image's name and the window's number alone. Without `scale`, the window is
    the square in the middle of the image.

    Args:
        root: folder that `source.images` starts from.
        source: which images, how many windows of each, how large.
        size: S.
        skip_bad: leave out images that can not be used, and list them on standard error.

    Returns:
        N names and uint8 images (N, 3, S, S).

    Raises:
        TerraSynthError: there are no such images, or some can not be read or are too small: all in one message.
    """
    paths = find_images(root, source)
    names, windows = [], []
    problems: list[TerraSynthError] = []
    with track(len(paths), f"cutting {source.images}", unit="images") as progress:
        for path in paths:
            try:
                image = read_image(path)
                least = round((source.scale or (1, 1))[0] * size)
                if min(image.shape[:2]) < least:
                    raise TerraSynthError(
                        "the image is smaller than a window",
                        path=path,
                        found=f"{image.shape[1]} x {image.shape[0]}",
                        expected=f"at least {least} on both sides",
                        fix="lower the `scale` of its source in data.unlabelled",
                    )
            except TerraSynthError as error:
                problems.append(error)
            else:
                for index in range(source.windows):
                    seed = int(digest("window", path.name, index), 16)
                    windows.append(_window(image, source.scale, size, seed))
                    names.append(f"{path.relative_to(root).as_posix()}-{index:03d}")
            progress.advance()
    refuse_bad_files(problems, len(paths), f"images of {source.images}", skip_bad=skip_bad)
    return names, torch.from_numpy(np.stack(windows)).permute(0, 3, 1, 2).contiguous()


def _window(image: NDArray[np.uint8], scale: tuple[float, float] | None, size: int, seed: int) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    if scale is None:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
    else:
        random = np.random.default_rng(seed)
        side = round(min(random.uniform(*scale) * size, height, width))
        top, left = int(random.integers(height - side + 1)), int(random.integers(width - side + 1))
    window = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(
        window.resize((size, size), Image.Resampling.BOX if side % size == 0 else Image.Resampling.LANCZOS)
    )


def pseudo_masks(images: Tensor, clusters: int, seed: int = 0) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Masks of regions that look alike: k-means of every pixel's surrounding colour and roughness, then smoothed.

    Args:
        images: uint8 (N, 3, S, S).
        clusters: K.
        seed: of the pixels that k-means starts from.

    Returns:
        uint8 masks (N, S, S) with values below K, and the mean colour of each cluster.
    """
    random = np.random.default_rng(seed)
    per_image = max(1, _SAMPLED_PIXELS // len(images))
    sample, colors = [], []
    for image in images:
        pixels = torch.from_numpy(random.integers(image[0].numel(), size=per_image))
        sample.append(_features(image[None])[0].flatten(1)[:, pixels].T)
        colors.append(image.flatten(1)[:, pixels].T.float())
    features = torch.cat(sample)
    mean, std = features.mean(0), features.std(0).clamp_min(_LEAST_DEVIATION)
    centres = _kmeans((features - mean) / std, clusters, random)
    nearest = torch.cdist((features - mean) / std, centres).argmin(1)
    shown = [torch.cat(colors)[nearest == k].mean(0).nan_to_num().round().int().tolist() for k in range(clusters)]
    masks = torch.cat(
        [_assign((_features(part) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), centres) for part in images.split(16)]
    )
    return masks, [(r, g, b) for r, g, b in shown]


def _features(images: Tensor) -> Tensor:
    """Smoothed colour and smoothed local deviation of the luma, float (N, 4, S, S)."""
    images = images.float() / 255
    luma = (images * _LUMA).sum(1, keepdim=True)
    rough = (_blur(luma**2) - _blur(luma) ** 2).clamp_min(0).sqrt()
    return torch.cat([_blur(images), _blur(rough)], dim=1)


def _blur(x: Tensor) -> Tensor:
    return functional.avg_pool2d(functional.pad(x, [_SMOOTH // 2] * 4, mode="replicate"), _SMOOTH, stride=1)


def _kmeans(points: Tensor, clusters: int, random: np.random.Generator, rounds: int = 30) -> Tensor:
    """Centres (K, D) after Lloyd's rounds from k-means++ seeds (Arthur and Vassilvitskii 2007)."""
    centres = points[random.integers(len(points), size=1)]
    for _ in range(clusters - 1):
        odds = torch.cdist(points, centres).amin(1).double().square().cumsum(0)
        pick = torch.searchsorted(odds, random.uniform(0, odds[-1].item()), right=True)
        centres = torch.cat([centres, points[pick.clamp_max(len(points) - 1)][None]])
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = nearest.bincount(minlength=clusters)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


def _assign(features: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre's number, by majority of the surroundings, uint8 (N, S, S)."""
    n, _, height, width = features.shape
    nearest = torch.cdist(features.movedim(1, -1).reshape(n, -1, features.shape[1]), centres).argmin(-1)
    votes = functional.one_hot(nearest, len(centres)).view(n, height, width, -1).movedim(-1, 1).float()
    return _blur(votes).argmax(1).byte()


def merged_schema(schema: LabelSchema, colors: Sequence[tuple[int, int, int]]) -> LabelSchema:
    """A schema's classes, then one class per cluster, in its colour or the next one that is free."""
    taken = {*schema.colors, *schema.ignore_colors}
    distinct = []
    for r, g, b in colors:
        while (r, g, b) in taken:
            b = (b + 1) % 256
        taken.add((r, g, b))
        distinct.append((r, g, b))
    return replace(
        schema,
        names=(*schema.names, *(f"cover {k + 1}" for k in range(len(colors)))),
        colors=(*schema.colors, *distinct),
    )
