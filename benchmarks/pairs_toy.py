"""What SatSynth learns of a toy: docs/systems/satsynth.md, "Does it learn?".

    python benchmarks/pairs_toy.py [--steps 400] [--only NAME]

Tiles of 8 x 8 pixels of two constant colours, which are the classes; one tile in ten has the rare one. U-Nets that were
trained in the ways of `VARIANTS` paint pairs, images under masks, masks of images and right halves beside left ones.
Printed is in how many pixels mask and class of the nearest colour agree, and which share of the pixels the rare class
has (5 % in the tiles), unasked and asked for. A minute of one core each.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from terrasynth.data.schema import LabelSchema
from terrasynth.systems.satsynth import Pairs, SatSynthPipeline

SCHEMA = LabelSchema(("land", "water", "road"), ((200, 150, 90), (20, 60, 160), (240, 240, 240)))
COLORS = torch.tensor(SCHEMA.colors, dtype=torch.uint8)
SIDE, RARE, PAINTED = 8, 2, 64

#: Those after the first were not trained to see what is given, and are kept to it.
VARIANTS: dict[str, dict[str, Any]] = {
    "sees the given": {"condition": "given"},
    "kept to it": {},
    "v_prediction": {"prediction_type": "v_prediction"},
    "epsilon": {"prediction_type": "epsilon"},
    "epsilon, pixels": {"prediction_type": "epsilon", "patch_size": 1, "attention": (4,)},
    "onehot": {"codes": "onehot"},
}


def toy_tiles(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images uint8 (B, 3, 8, 8) and masks int64 (B, 8, 8): an upper or left part of one class, the rest of another."""
    generator = torch.Generator().manual_seed(seed)
    rare, swapped, turned = torch.rand(3, count, generator=generator) < torch.tensor([[0.1], [0.5], [0.5]])
    one, other = torch.zeros(count, dtype=torch.long), torch.where(rare, RARE, 1)
    cut = torch.randint(2, SIDE - 1, (count, 1, 1), generator=generator)
    first, second = (each.view(-1, 1, 1) for each in (one.where(swapped, other), other.where(swapped, one)))
    masks = first.where(torch.arange(SIDE).view(1, -1, 1) < cut, second).expand(-1, SIDE, SIDE)
    masks = torch.where(turned.view(-1, 1, 1), masks.mT, masks)
    return COLORS[masks].movedim(-1, 1), masks


def trained(steps: int, batch_size: int = 32, **settings: Any) -> SatSynthPipeline:
    """After so many steps of AdamW."""
    small = {"patch_size": 2, "widths": (32, 48), "attention": (2,), "image_size": SIDE}
    pipeline = SatSynthPipeline.from_scratch(SCHEMA, **small | settings)
    images, masks = toy_tiles(512, 0)
    rate = 3e-3
    optimizer = torch.optim.AdamW(pipeline.network.parameters(), rate)
    for step in range(steps):
        seeds = torch.arange(step * batch_size, (step + 1) * batch_size)
        rows = seeds % len(masks)
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10, 2 * (1 - step / steps))
        optimizer.zero_grad()
        pipeline.training_loss({"image": images[rows].float() / 255, "mask": masks[rows], "seed": seeds}).backward()
        torch.nn.utils.clip_grad_norm_(pipeline.network.parameters(), 1.0)
        optimizer.step()
    pipeline.network.eval()
    return pipeline


def agreement(pairs: Pairs) -> float:
    """Share of the pixels whose mask is the class of the nearest colour."""
    distances = (pairs.images.float().unsqueeze(1) - COLORS.float().view(1, 3, 3, 1, 1)).square().sum(2)
    return (distances.argmin(1) == pairs.masks).double().mean().item()


def measured(pipeline: SatSynthPipeline) -> dict[str, float]:
    """What a set of 64 pairs of 20 steps shows, by the rows of the table."""
    images, masks = toy_tiles(PAINTED, 9)

    def paint(**options: Any) -> Pairs:
        return pipeline(seeds=range(PAINTED), num_steps=20, **options)

    def rare(**options: Any) -> float:
        return (paint(**options).masks == RARE).double().mean().item()

    left = (torch.arange(SIDE) < SIDE // 2).expand(PAINTED, SIDE, SIDE)
    beside = paint(images=images, known=left, masks=masks.where(left, SCHEMA.ignore_index))
    follows = (masks == masks[:, :, :1]).flatten(1).all(1)
    asked = pipeline.ask({"road": 0.5}, PAINTED)
    return {
        "pairs": agreement(paint()),
        "images under masks": agreement(paint(masks=masks)),
        "masks of images": agreement(paint(images=images)),
        "right half, where it follows from the left one": (beside.masks == masks)[follows][..., SIDE // 2 :]
        .double()
        .mean()
        .item(),
        "share of the rare class, unasked": rare(),
        "the same, half asked for": rare(shares=asked),
        "the same, guidance scale 2": rare(shares=asked, guidance_scale=2.0),
    }


def main() -> None:
    """Print a table for each variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    options = parser.parse_args()
    for name in options.only:
        print(name, flush=True)
        for what, value in measured(trained(options.steps, **VARIANTS[name])).items():
            print(f"  {what:48s} {value:.3f}", flush=True)


if __name__ == "__main__":
    main()
