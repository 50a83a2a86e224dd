"""FreeMask's filter: pixels of painted tiles that a segmentor of the real tiles finds implausible lose their label.

Where a generator did not follow its mask, the label is wrong, and the segmentor's loss is high. What is high depends on
the class: a hard one has high losses on real tiles too, so each class is measured by its own mean there (Yang et al.
2023, "FreeMask", NeurIPS).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from terrasynth.data.scores import STEPS

__all__ = ["class_mean_losses", "class_sums", "dropped", "filter_pixels", "loss_codes"]


def class_mean_losses(losses: Tensor, masks: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Mean loss of each class over the labelled pixels of real tiles: L_c = Σ_{p: y_p = c} l_p / N_c.

    Args:
        losses: float (N, H, W), the segmentor's cross-entropy at each pixel; any value where unlabelled.
        masks: class indices or `ignore_index`, (N, H, W).
        num_classes: K.
        ignore_index: the value of unlabelled pixels.

    Returns:
        float64 (K,); infinite for a class without a pixel, by which nothing can be judged.
    """
    sums, counts = class_sums(losses, masks, num_classes, ignore_index)
    return torch.where(counts > 0, sums / counts, torch.inf)


def class_sums(losses: Tensor, masks: Tensor, num_classes: int, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Σ_{p: y_p = c} l_p, float64 (K,), and N_c, int64 (K,): sums of parts add up to those of the whole."""
    labelled = masks != ignore_index
    classes, values = masks[labelled].long(), losses[labelled].double()
    counts = torch.bincount(classes, minlength=num_classes)
    return torch.bincount(classes, weights=values, minlength=num_classes), counts


def filter_pixels(
    masks: Tensor, losses: Tensor, class_means: Tensor, margin: float = 1.25, ignore_index: int = 255
) -> Tensor:
    """Masks of painted tiles without the labels whose loss is more than `margin` times their class's mean.

    Args:
        masks: class indices or `ignore_index`, (N, H, W), any type.
        losses: float (N, H, W), the segmentor's cross-entropy at each pixel; any value where unlabelled.
        class_means: (K,), of the same segmentor on real tiles (`class_mean_losses`).
        margin: how much more than the mean is tolerated (published: 1.25).
        ignore_index: what the pixel becomes.

    Returns:
        A new tensor like `masks`.
    """
    filtered = masks.clone()
    for index, mean in enumerate(class_means.tolist()):
        filtered[(masks == index) & (losses > margin * mean)] = ignore_index
    return filtered


def loss_codes(masks: Tensor, losses: Tensor, class_means: Tensor) -> Tensor:
    """Losses relative to their class's mean, as 8-bit codes (`data.scores`).

    For every margin m = k/64, k in 0...254, `code > k` exactly where `filter_pixels` drops the label.

    Args:
        masks: class indices or the ignore index, (N, H, W), any type.
        losses: float (N, H, W), the segmentor's cross-entropy at each pixel; any value where unlabelled.
        class_means: (K,), of the same segmentor on real tiles; infinite where nothing can be judged.

    Returns:
        uint8 (N, H, W), 0 where unlabelled or not to be judged.
    """
    codes = torch.zeros(masks.shape, dtype=torch.uint8)
    multiples = torch.arange(255, dtype=torch.float64) / STEPS
    for index, mean in enumerate(class_means.tolist()):
        if mean < torch.inf:
            here = masks == index
            # In the type of the losses, in which `filter_pixels` compares them.
            limits = (multiples * mean).to(losses.dtype)
            codes[here] = torch.bucketize(losses[here], limits).to(torch.uint8)
    return codes


def dropped(before: Tensor, after: Tensor, class_names: Sequence[str], ignore_index: int = 255) -> dict[str, float]:
    """How much a filter dropped, by name, JSON-able.

    Args:
        before: masks, class indices or `ignore_index`, (N, H, W).
        after: the same, filtered.
        class_names: K names in the order of the indices.
        ignore_index: the value of unlabelled pixels.

    Returns:
        `dropped`, the share of all labelled pixels, and `dropped/NAME`, that of each class that has any.
    """
    counts, kept = (
        torch.bincount(masks[masks != ignore_index].long(), minlength=len(class_names)).tolist()
        for masks in (before, after)
    )
    shares = {"dropped": 1 - sum(kept) / max(1, sum(counts))}
    return shares | {f"dropped/{name}": 1 - k / n for name, k, n in zip(class_names, kept, counts, strict=True) if n}
