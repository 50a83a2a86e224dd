"""What a refiner learns from: views of labelled tiles, each with a rough map of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from terrasynth.data.augment import augment
from terrasynth.data.folder import Tiles
from terrasynth.data.perturb import perturb
from terrasynth.recipe import RoughConfig
from terrasynth.training.keys import Key

__all__ = ["OneClass", "RoughViews"]

#: Streams of a sample's seed, apart from those of `data.augment` and `data.perturb`.
_CROP, _CLASS = 13, 14
#: How often, and by how much of the strength, a map that a segmentor read is moved too.
_MOVED, _SHARE = 0.5, 0.25


class RoughViews(Dataset[dict[str, Tensor]]):
    """Labelled tiles with rough maps, augmented and cut.

    Item (index, seed) has `image` float32 (3, S, S) in [0, 1], `mask` int64 (S, S), class indices or the ignore index,
    and `rough` alike. They are flipped, turned and zoomed as one. The rough map is now and then the true one with moved
    boundaries (`RoughConfig.invented`), which is unlabelled where that is; else it has a class wherever the tile's has.

    Args:
        tiles: labelled.
        rough: uint8 (N, H, W), a rough map of every tile: one that was made without it (`tasks.folds`).
        config: how rough maps are varied.
        crop: S, the side of the squares cut; at most that of the tiles, which None takes.
    """

    def __init__(self, tiles: Tiles, rough: Tensor, config: RoughConfig, crop: int | None = None) -> None:
        if rough.shape != tiles.masks.shape:
            raise ValueError(f"rough maps {tuple(rough.shape)} for masks {tuple(tiles.masks.shape)}")
        self.tiles, self.rough, self.config = tiles, rough, config
        self.side = min(crop or tiles.images.shape[-1], tiles.images.shape[-1])

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        index, seed = key
        maps = torch.stack([self.tiles.masks[index], self.rough[index]])
        image, maps = augment(self.tiles.images[index], maps, seed)
        random = np.random.default_rng((seed, _CROP))
        room = image.shape[-1] - self.side + 1
        top, left = random.integers(room, size=2).tolist()
        image, (mask, rough) = (x[..., top : top + self.side, left : left + self.side] for x in (image, maps))
        invented, moved = random.random(2)
        if invented < self.config.invented and self.config.noise:
            rough = self._moved(mask, seed, 1.0)
        elif moved < _MOVED and self.config.noise:
            rough = self._moved(rough, seed, _SHARE)
        return {"image": image.contiguous(), "mask": mask.contiguous(), "rough": rough.contiguous()}

    def _moved(self, mask: Tensor, seed: int, share: float) -> Tensor:
        ignore, strength = self.tiles.schema.ignore_index, share * self.config.noise
        return perturb(mask[None], torch.tensor([seed]), strength, ignore_index=ignore)[0]


class OneClass(Dataset[dict[str, Tensor]]):
    """The same views as one class against the rest, drawn among those of the view: 1 where a map has it, 0 elsewhere.

    What learns from them refines maps of any classes, one after the other. Unlabelled pixels stay so.
    """

    def __init__(self, views: RoughViews) -> None:
        self.views, self.ignore_index = views, views.tiles.schema.ignore_index

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        item = self.views[key]
        # Of either map: what is missing, or should not be there, is to be mended too.
        there = [k for k in torch.cat([item["mask"], item["rough"]]).unique().tolist() if k != self.ignore_index]
        chosen = there[int(np.random.default_rng((key[1], _CLASS)).integers(len(there)))] if there else 0
        for name in ("mask", "rough"):
            item[name] = torch.where(item[name] == self.ignore_index, item[name], (item[name] == chosen).long())
        return item
