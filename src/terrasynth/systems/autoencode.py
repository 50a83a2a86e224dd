"""Training of the network that corrects what the autoencoder's components decode to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from terrasynth.data.augment import view
from terrasynth.data.folder import Tiles
from terrasynth.models.autoencoder import PatchPCA
from terrasynth.recipe import AutoencoderConfig
from terrasynth.sampling.flow import seeded_generator
from terrasynth.training.keys import Key
from terrasynth.training.loop import Outcome, train

__all__ = ["fit_correction"]

#: Side of the crops trained on, in patches: enough to see what the convolutions see.
_CROP = 8


class _Crops(Dataset[dict[str, Tensor]]):
    """Random crops of the tiles' images, flipped and turned; item (index, seed) is float32 (3, s, s) in [-1, 1]."""

    def __init__(self, tiles: Tiles, side: int) -> None:
        self.images, self.masks, self.side = tiles.images, tiles.masks, min(side, tiles.images.shape[-1])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        index, seed = key
        generator = seeded_generator(seed)
        room = self.images.shape[-1] - self.side + 1
        top, left, element = (int(torch.randint(n, (), generator=generator)) for n in (room, room, 8))
        rows, columns = slice(top, top + self.side), slice(left, left + self.side)
        crop, _ = view(self.images[index, :, rows, columns], self.masks[index, rows, columns], element)
        return {"image": crop.float() / 127.5 - 1}


def fit_correction(
    autoencoder: PatchPCA,
    tiles: Tiles,
    config: AutoencoderConfig,
    folder: Path,
    *,
    seed: int,
    max_minutes: float | None = None,
) -> Outcome:
    """Train the correction of a fitted autoencoder in place; the components stay as they are.

    The loss is the mean absolute error of the pixels and of their differences to the neighbours, of latents with noise
    of a deviation drawn from U(0, `refiner_noise`).
    """
    assert config.train is not None
    autoencoder.requires_grad_(False)
    assert autoencoder.refiner is not None
    autoencoder.refiner.requires_grad_(True)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        images = batch["image"]
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            latents = autoencoder.encode(images).latent_dist.mode()
        noise = []
        for s in batch["seed"].tolist():
            generator = seeded_generator(s)
            level = config.refiner_noise * torch.rand((), generator=generator)
            noise.append(level * torch.randn(latents.shape[1:], generator=generator))
        decoded = autoencoder.decode(latents + torch.stack(noise).to(latents.device)).sample
        error = decoded.float() - images
        rows, columns = error.diff(dim=-2), error.diff(dim=-1)
        return error.abs().mean() + (rows.abs().mean() + columns.abs().mean()) / 2

    outcome = train(
        autoencoder,
        loss,
        _Crops(tiles, _CROP * autoencoder.config.patch_size),
        config.train,
        folder,
        seed=seed,
        identity={"autoencoder": config.model_dump(mode="json", exclude={"train"}), "data": tiles.fingerprint()},
        max_minutes=max_minutes,
        label="training the autoencoder",
    )
    autoencoder.requires_grad_(False)
    return outcome
