"""Everything that is constant in a generator's training, encoded once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from terrasynth.data.augment import view
from terrasynth.data.folder import Tiles
from terrasynth.data.reference import reference_view
from terrasynth.io import atomic_write, digest
from terrasynth.models.autoencoder import PatchPCA
from terrasynth.progress import track
from terrasynth.training.keys import Key, hash63

if TYPE_CHECKING:
    from terrasynth.systems.generate import Pipeline

__all__ = ["EncodedViews", "JoinedViews", "Reference"]

Reference = Literal["view", "augmented", "recolored"]
#: Stream of a sample's seed: which other view is its reference.
_OTHER_VIEW = 11


class EncodedViews(Dataset[dict[str, Tensor]]):
    """Every tile under fixed augmentations, with its latents and prompt encoded once.

    Item (index, seed) has `latents` (C, h, w), `mask` (H, W) uint8, `prompt_embeds` (L, D), `pooled` (P,),
    `mask_latents` (C, h, w) where masks pass through the autoencoder, and `reference_latents` (C, h, w) where the
    generator learns to look at a reference.
    """

    def __init__(
        self, path: Path, prompts: Tensor, prompt_embeds: Tensor, pooled: Tensor, *, tiles: int, other_view: bool
    ) -> None:
        self._path = path
        self._tiles = tiles
        self._other_view = other_view
        self._prompts = prompts
        self._prompt_embeds = prompt_embeds
        self._pooled = pooled

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        index, seed = key
        item = {name: self._file.get_slice(name)[index] for name in self._names}
        if self._other_view:
            # The views of a tile are `tiles` rows apart.
            step = 1 + hash63(seed, _OTHER_VIEW) % (len(self) // self._tiles - 1)
            item["reference_latents"] = self._file.get_slice("latents")[(index + step * self._tiles) % len(self)]
        item |= {name: item[name].float() for name in ("latents", "reference_latents") if name in item}
        prompt = int(self._prompts[index])
        return {**item, "prompt_embeds": self._prompt_embeds[prompt], "pooled": self._pooled[prompt]}

    # Rows are read when they are asked for: at 512 px a few thousand tiles are more than fits in memory. Each process
    # opens the file for itself, so what is sent to a loader's worker has no open file.

    @cached_property
    def _file(self) -> Any:
        return safe_open(self._path, framework="pt")

    @cached_property
    def _names(self) -> list[str]:
        return list(self._file.keys())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_file", "_names")}

    @classmethod
    def encode(
        cls, pipeline: Pipeline, tiles: Tiles, views: int, folder: Path, reference: Reference | None = None
    ) -> EncodedViews:
        """Encode `views` augmentations of every tile, or read them back from `folder`."""
        encoder = pipeline.vae.buffers() if isinstance(pipeline.vae, PatchPCA) else pipeline.vae.parameters()
        weights = [float(p.detach().double().sum()) for p in encoder]
        copies = None if reference == "view" else reference
        name = digest(
            "views", tiles.fingerprint(), views, pipeline.config.mask_coding, weights, *([copies] if copies else [])
        )
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            with atomic_write(path) as partial:
                save_file(_encode_views(pipeline, tiles, views, copies), partial)
        with safe_open(path, framework="pt") as file:
            captions = [
                pipeline.schema.caption(mask, tiles.template(row % len(tiles)))
                for row, mask in enumerate(file.get_tensor("mask"))
            ]
        texts = sorted(set(captions))
        position = {text: i for i, text in enumerate(texts)}
        prompts = torch.tensor([position[caption] for caption in captions])
        return cls(path, prompts, *pipeline.prompts(texts), tiles=len(tiles), other_view=reference == "view")


def _encode_views(pipeline: Pipeline, tiles: Tiles, views: int, copies: Reference | None) -> dict[str, Tensor]:
    """Masks, and the latents of images (and of masks, where they pass the autoencoder), of every view of every tile.

    If asked, of an augmented copy of each view too.
    """
    jobs = [(tile, index) for index in range(views) for tile in range(len(tiles))]
    # An autoencoder's activations grow with the pixels: about 4 GB for four million.
    batch_size = max(1, 2**20 // tiles.images[0, 0].numel())
    rows: dict[str, list[Tensor]] = {"mask": [], "latents": []}
    with track(len(jobs), "encoding tiles", unit="views") as progress:
        for start in range(0, len(jobs), batch_size):
            pairs = [
                view(tiles.images[tile], tiles.masks[tile], index) for tile, index in jobs[start : start + batch_size]
            ]
            images, masks = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
            rows["mask"].append(masks)
            # Half precision: its rounding is far below the noise of the smallest timestep.
            latents = pipeline.encode_images(images.to(pipeline.vae.device).float() / 255)
            rows["latents"].append(latents.half().cpu())
            if copies is not None:
                color = copies == "recolored"
                moved = [reference_view(image, start + row, color=color) for row, image in enumerate(images)]
                latents = pipeline.encode_images(torch.stack(moved).to(pipeline.vae.device))
                rows.setdefault("reference_latents", []).append(latents.half().cpu())
            if pipeline.config.mask_coding == "grey":
                mask_latents = pipeline.encode_masks(masks.to(pipeline.vae.device))
                rows.setdefault("mask_latents", []).append(mask_latents.cpu())
            progress.advance(len(masks))
    return {name: torch.cat(tensors).contiguous() for name, tensors in rows.items()}


class JoinedViews(Dataset[dict[str, Tensor]]):
    """Two sets of views one behind the other."""

    def __init__(self, first: EncodedViews, second: EncodedViews) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        index, seed = key
        beyond = index - len(self.first)
        return self.first[(index, seed)] if beyond < 0 else self.second[(beyond, seed)]
