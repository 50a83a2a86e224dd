"""The picture of `docs/augment.md`: what each operation makes of one procedural scene and its mask.

python benchmarks/augment_picture.py --out docs/images/augment.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from terrasynth.data import augment
from terrasynth.data.sheet import contact_sheet
from terrasynth.data.world import BUILDING, WORLD_SCHEMA, render
from terrasynth.io import atomic_write

Operation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
#: The scenes; the second is shown, and what is lent to it comes from the first.
SCENES = (3, 11, 20, 7)
SHOWN = 1
ANYWHERE, PLAUSIBLE = "copy_paste", 'where="plausible"'


def operations() -> dict[str, Operation]:
    """All of them, by what stands below."""
    return {
        "turn": augment.turn,
        "zoom": augment.zoom,
        "jitter": lambda images, masks, seeds: (augment.jitter(images, seeds), masks),
        "cutout": partial(augment.cutout, ignore_index=WORLD_SCHEMA.ignore_index),
        "cutmix": augment.cutmix,
        "mosaic": augment.mosaic,
        "classmix": augment.classmix,
        ANYWHERE: augment.copy_paste,
        PLAUSIBLE: partial(augment.copy_paste, where="plausible"),
    }


def telling(images: Tensor, masks: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The scene after each operation, under the first seed that changes a good part of it."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for seed in range(200):
        for name, operation in operations().items():
            changed, labels = (of[SHOWN] for of in operation(images, masks, torch.full((len(images),), seed)))
            much = (changed != images[SHOWN]).any(0).float().mean() > 0.12
            # Objects whose place tells: houses.
            houses = (labels == BUILDING).sum() > (masks[SHOWN] == BUILDING).sum()
            if name not in found and much and (houses or name not in (ANYWHERE, PLAUSIBLE)):
                found[name] = changed, labels
    return {name: found[name] for name in operations()}


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    scenes = [render(seed, size=128, gsd=0.5) for seed in SCENES]
    images = torch.from_numpy(np.stack([image for image, _ in scenes])).movedim(-1, 1).contiguous()
    masks = torch.from_numpy(np.stack([mask for _, mask in scenes]))
    shown = {"tile": (images[SHOWN], masks[SHOWN]), "the one before it": (images[SHOWN - 1], masks[SHOWN - 1])}
    shown |= telling(images, masks)
    sheet = contact_sheet(
        {"image": torch.stack([image for image, _ in shown.values()])},
        torch.stack([mask for _, mask in shown.values()]),
        WORLD_SCHEMA,
        columns=6,
        legend=True,
        captions=list(shown),
    )
    with atomic_write(options.out) as partly:
        sheet.save(partly, optimize=True)


if __name__ == "__main__":
    main()
