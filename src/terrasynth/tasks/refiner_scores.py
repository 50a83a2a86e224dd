"""How a refiner stands while it is trained: what it makes of rough maps of validation tiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from terrasynth.data.folder import Tiles
from terrasynth.systems.idgbr import IDGBRPipeline
from terrasynth.tasks.boundary import BoundaryScores

__all__ = ["score_refiner"]

#: How many tiles are refined: this is done with every preview.
_SCORED = 16


@torch.no_grad()
def score_refiner(pipeline: IDGBRPipeline, tiles: Tiles, rough: Tensor) -> dict[str, float]:
    """Refine some of the tiles, spread over all.

    Args:
        pipeline: where and as precise as it computes.
        tiles: labelled.
        rough: uint8 (N, S, S), a rough map of each.

    Returns:
        `miou` and `boundary_iou` of what was refined, `rough/…` of the rough maps, and with an autoencoder `ceiling/…`
        of the true ones after the way to its latents and back, the best there can be. NaN where there is no boundary.
    """
    few = torch.linspace(0, len(tiles) - 1, min(_SCORED, len(tiles))).round().long().tolist()
    tiles, rough = tiles.take(few), rough[few]
    side = tiles.images.shape[-1] // pipeline.factor * pipeline.factor
    images, masks, rough = (x[..., :side, :side] for x in (tiles.images, tiles.masks, rough))
    found: dict[str, list[Tensor]] = {"rough/": list(rough), "": []}
    for row in range(len(tiles)):
        image, before = images[row : row + 1].float() / 255, rough[row : row + 1]
        after = pipeline.refine(image, before, seeds=[row], each_class=pipeline.config.each_class)
        found[""].append(after[0].cpu())
    if pipeline.vae is not None and not pipeline.config.each_class:
        known = masks.where(masks != tiles.schema.ignore_index, 0)
        device = pipeline.unet.device
        found["ceiling/"] = [pipeline.round_trip(mask[None].to(device))[0].cpu() for mask in known]
    values: dict[str, float] = {}
    for prefix, maps in found.items():
        scores = BoundaryScores(tiles.schema)
        for id_, one, mask in zip(tiles.ids, maps, masks, strict=True):
            scores.update(id_, one, mask)
        metrics = scores.metrics()
        for name, metric in (("miou", "iou"), ("boundary_iou", "boundary_iou")):
            values[prefix + name] = math.nan if (value := metrics[metric]) is None else value
    return values
