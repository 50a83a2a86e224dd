"""How fast `terrasynth.data.augment` is beside kornia and albumentations, and what they refuse.

    pip install kornia albumentations
    python benchmarks/augment.py [--size 256] [--batch 16] [--rounds 15]

A row is a ratio: their time over ours, on the same tiles with the same sizes of squares, crops and factors, in
processor time on one thread. Ours and theirs alternate, and the median of the rounds counts. kornia augments batches of
float images, and ours get the same beside it; albumentations takes one uint8 tile after the other, and ours get them as
a batch. Mosaic and ClassMix are applied to half of the tiles on both sides.

The second table calls the operations of others with image and mask and prints what happens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for its newest version

import albumentations as A
import cv2
import kornia
import kornia.augmentation as K
import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from terrasynth.data import augment
from terrasynth.data.world import render

Call = Callable[[], object]
IGNORE = 255


def tiles(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Procedural scenes, uint8 (B, 3, S, S), and masks, uint8 (B, S, S)."""
    pairs = [render(seed, size=size) for seed in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in pairs])).movedim(-1, 1).contiguous()
    return images, torch.from_numpy(np.stack([mask for _, mask in pairs]))


def beside_kornia(images: Tensor, masks: Tensor, seeds: Tensor) -> dict[str, tuple[Call, Call]]:
    """Ours and kornia's of the same operation."""
    size = images.shape[-1]
    images, masks = images.float() / 255, masks.long()
    float_masks = masks[:, None].float()  # what its geometry takes

    def moved(*operations: Any) -> Call:
        both = K.AugmentationSequential(*operations, data_keys=["input", "mask"])
        return lambda: both(images, float_masks)

    flips = (K.RandomHorizontalFlip(p=0.5), K.RandomVerticalFlip(p=0.5), K.RandomRotation90(times=(0, 3), p=1.0))
    crop = K.RandomResizedCrop((size, size), scale=(0.5, 1.0), ratio=(0.9, 1.1), p=1.0, cropping_mode="slice")
    colors = K.ColorJiggle(0.2, 0.2, 0.2, 0.0, p=1.0)
    classes = K.RandomTransplantation(p=0.5)
    cutmix = K.RandomCutMixV2(p=1.0)  # a chance is of the batch as a whole
    return {
        "flips and turns": (lambda: augment.turn(images, masks, seeds), moved(*flips)),
        "zoom": (lambda: augment.zoom(images, masks, seeds), moved(crop)),
        "colour": (lambda: augment.jitter(images, seeds), lambda: colors(images)),
        "Cutout": (
            lambda: augment.cutout(images, masks, seeds),
            moved(K.RandomErasing(scale=(0.25, 0.25), ratio=(1.0, 1.0), value=0.5, p=1.0)),
        ),
        "CutMix (theirs: images alone)": (
            lambda: augment.cutmix(images, masks, seeds),
            lambda: cutmix(images, masks[:, 0, 0]),
        ),
        "ClassMix": (lambda: augment.classmix(images, masks, seeds), lambda: classes(images, masks)),
    }


def beside_albumentations(images: Tensor, masks: Tensor, seeds: Tensor) -> dict[str, tuple[Call, Call]]:
    """Ours and albumentations' of the same operation."""
    size = images.shape[-1]
    pairs = [
        {"image": np.ascontiguousarray(image.movedim(0, -1).numpy()), "mask": mask.numpy()}
        for image, mask in zip(images, masks, strict=True)
    ]

    def each(operation: Any) -> Call:
        return lambda: [operation(**pair) for pair in pairs]

    hole = {"hole_height_range": (0.5, 0.5), "hole_width_range": (0.5, 0.5)}
    mosaic = A.Compose([A.Mosaic(grid_yx=(2, 2), target_size=(size, size), cell_shape=(size, size), p=0.5)])
    others = [[pairs[(i - k) % len(pairs)] for k in (1, 2, 3)] for i in range(len(pairs))]
    return {
        "flips and turns": (lambda: augment.turn(images, masks, seeds), each(A.D4(p=1.0))),
        "zoom": (
            lambda: augment.zoom(images, masks, seeds),
            each(A.RandomResizedCrop((size, size), scale=(0.5, 1.0), ratio=(0.9, 1.1), p=1.0)),
        ),
        "colour": (
            lambda: augment.jitter(images, seeds),
            each(A.ColorJitter((0.8, 1.2), (0.8, 1.2), (0.8, 1.2), (0.0, 0.0), p=1.0)),
        ),
        "Cutout": (
            lambda: augment.cutout(images, masks, seeds),
            each(A.CoarseDropout(num_holes_range=(1, 1), **hole, fill=128, fill_mask=IGNORE, p=1.0)),
        ),
        "mosaic": (
            lambda: augment.mosaic(images, masks, seeds),
            lambda: [mosaic(**pair, mosaic_metadata=three) for pair, three in zip(pairs, others, strict=True)],
        ),
    }


def seconds(call: Call) -> float:
    """Processor time of one call."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def ratio(ours: Call, theirs: Call, rounds: int) -> tuple[float, float, float]:
    """Median of theirs over ours, and the medians of both in seconds."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return (
        statistics.median(b / a for a, b in pairs),
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
    )


def refusals(images: Tensor, masks: Tensor) -> dict[str, Call]:
    """Operations of others, called with image and mask; each returns whether the mask has followed, or how."""
    images, masks = images.float() / 255, masks.long()
    pair = images[0], tv_tensors.Mask(masks[0])

    def followed(operation: Any) -> Call:
        return lambda: not torch.equal(operation(*pair)[1], pair[1])

    def sequential(operation: Any) -> Call:
        both = K.AugmentationSequential(operation, data_keys=["input", "mask"])
        return lambda: not torch.equal(both(images, masks[:, None].float())[1], masks[:, None].float())

    def erased() -> str:
        both = K.AugmentationSequential(K.RandomErasing(scale=(0.25, 0.25), p=1.0), data_keys=["input", "mask"])
        labelled = masks[:, None].float() + 1
        after = both(images, labelled)[1]
        return f"what is hidden gets the label {after[after != labelled].unique().tolist()}"

    transplantation = K.RandomTransplantation(p=1.0)
    return {
        "torchvision RandomErasing": followed(v2.RandomErasing(p=1.0, scale=(0.25, 0.25))),
        "torchvision CutMix": lambda: v2.CutMix(num_classes=8)(images, masks),
        "torchvision MixUp": lambda: v2.MixUp(num_classes=8)(images, masks),
        "torchvision RandAugment": lambda: v2.RandAugment()((images[0] * 255).byte(), pair[1]),
        "kornia RandomErasing": erased,
        "kornia RandomCutMixV2": sequential(K.RandomCutMixV2(p=1.0, data_keys=["input", "mask"])),
        "kornia RandomMixUpV2": sequential(K.RandomMixUpV2(p=1.0, data_keys=["input", "mask"])),
        "kornia RandomMosaic": sequential(K.RandomMosaic(p=1.0, data_keys=["input", "mask"])),
        "kornia RandomTransplantation": lambda: not torch.equal(transplantation(images, masks)[1], masks),
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    warnings.filterwarnings("ignore")
    images, masks = tiles(options.batch, options.size)
    seeds = torch.arange(options.batch)
    print(f"kornia {kornia.__version__}, albumentations {A.__version__}, torchvision {torchvision.__version__}")
    print(f"{options.batch} tiles of {options.size} x {options.size} pixels, median of {options.rounds} rounds\n")
    print(f"{'operation':32s} {'beside':16s} theirs/ours    ours ms  theirs ms")
    for peer, rows in (("kornia", beside_kornia), ("albumentations", beside_albumentations)):
        for name, (ours, theirs) in rows(images, masks, seeds).items():
            times, mine, other = ratio(ours, theirs, options.rounds)
            print(f"{name:32s} {peer:16s} {times:11.2f} {1000 * mine:10.2f} {1000 * other:10.2f}", flush=True)
    print("\nimage and mask together")
    for name, call in refusals(images, masks).items():
        try:
            result = call()
            if isinstance(result, bool):
                result = "the mask follows" if result else "the image changes, the mask stays as it was"
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            result = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90] if str(error) else ''}"
        print(f"{name:30s} {result}", flush=True)


if __name__ == "__main__":
    main()
