"""An autoencoder of pixel patches: a linear code fitted in closed form, and a small network that corrects its decoding.

For a generator from scratch there is no pretrained autoencoder, and training one costs more than the generator on a
small machine. Principal components of small patches (the optimal linear code, Eckart and Young 1936) take a second to
fit, invert exactly on their span and decode in one matrix product, which is what steering differentiates through.
What a linear code can not do is to look beyond its patch: the optional correction sees the neighbours, and takes away
the edges between patches and part of the noise that a generator leaves in its latents.
The interface is that of `diffusers.AutoencoderKL`, so either can stand in a pipeline.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

__all__ = ["Autoencoder", "PatchPCA", "decode_latents", "encode_images", "spatial_factor"]


class _Point:
    """A distribution on one point, with the two methods that callers of `latent_dist` use."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.mean


class _Correction(nn.Sequential):
    """Latents (B, C, h, w) to a correction of the pixels, (B, 3 p², h, w); at first zero."""

    def __init__(self, channels: int, width: int, blocks: int, patch_size: int) -> None:
        readout = nn.Conv2d(width, 3 * patch_size**2, 3, padding=1)
        nn.init.zeros_(readout.weight)
        nn.init.zeros_(readout.bias)  # type: ignore[arg-type]
        residuals = [_Residual(width) for _ in range(blocks)]
        super().__init__(nn.Conv2d(channels, width, 3, padding=1), *residuals, nn.SiLU(), readout)


class _Residual(nn.Module):
    """x + conv(SiLU(conv(SiLU(x)))), at first the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class PatchPCA(ModelMixin, ConfigMixin):
    """Principal components of `patch_size` x `patch_size` RGB patches as an autoencoder.

    Args:
        patch_size: side of a patch in pixels; the downsampling factor.
        latent_channels: components kept, at most 3 patch_size².
        whiten: exponent of each component's standard deviation that is divided out (0 none, 1 all).
        refiner_width: channels of the convolutions that correct the decoding; 0 for none. They are trained, not fitted.
        refiner_blocks: residual blocks of two convolutions each.
        scaling_factor: as in `AutoencoderKL`; 1 because `fit` already gives latents of unit mean variance.
        shift_factor: as in `AutoencoderKL`; 0 because `fit` already centres them.
    """

    mean: Tensor
    components: Tensor
    scale: Tensor
    std: Tensor

    @register_to_config
    def __init__(
        self,
        patch_size: int = 4,
        latent_channels: int = 16,
        whiten: float = 0.5,
        refiner_width: int = 0,
        refiner_blocks: int = 0,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        dim = 3 * patch_size**2
        if latent_channels > dim:
            raise ValueError(f"`latent_channels` is {latent_channels}, but a {patch_size}x{patch_size} patch has {dim}")
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("components", torch.eye(dim)[:latent_channels].clone())
        self.register_buffer("scale", torch.ones(latent_channels))
        self.register_buffer("std", torch.ones(latent_channels))  # of each latent channel on the images fitted
        self.refiner: nn.Module | None = None  # the correction, by the name that saved weights have for it
        if refiner_width:
            correction = _Correction(latent_channels, refiner_width, refiner_blocks, patch_size)
            # Twice as fast on a CPU.
            self.refiner = correction.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def fit(self, images: Tensor, max_patches: int = 500_000) -> PatchPCA:
        """Set the components from images (N, 3, H, W) in [-1, 1], evenly thinned out to `max_patches` patches."""
        patches = F.pixel_unshuffle(images, self.config.patch_size).movedim(1, -1).flatten(0, -2)
        patches = patches[:: max(1, len(patches) // max_patches)].double()
        mean = patches.mean(0)
        centred = patches - mean
        variance, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        order = variance.argsort(descending=True)[: self.config.latent_channels]
        # The sign of an eigenvector is arbitrary; fixing it makes equal data give equal latents everywhere.
        components = vectors[:, order].T
        components = components * components.sum(1, keepdim=True).sign().where(components.sum(1, keepdim=True) != 0, 1)
        std = variance[order].clamp_min(1e-8).sqrt()
        scale = std**self.config.whiten
        scale = scale * ((std / scale) ** 2).mean().sqrt()  # latents of unit mean variance
        self.mean.copy_(mean)
        self.components.copy_(components)
        self.scale.copy_(scale)
        self.std.copy_(std / scale)
        return self

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, H / p, W / p)."""
        weight = self.components / self.scale[:, None]
        patches = F.pixel_unshuffle(x, self.config.patch_size)
        z = F.conv2d(patches, weight[:, :, None, None], -weight @ self.mean)
        return AutoencoderKLOutput(latent_dist=_Point(z))

    def decode(self, z: Tensor) -> DecoderOutput:
        """Latents (B, C, h, w) to images (B, 3, h p, w p), about [-1, 1]."""
        weight = (self.components * self.scale[:, None]).T
        with torch.autocast(z.device.type, enabled=False):  # the linear part is exact at no cost
            patches = F.conv2d(z.to(weight.dtype), weight[:, :, None, None], self.mean)
        if self.refiner is not None:
            patches = patches + self.refiner(z.contiguous(memory_format=torch.channels_last)).to(patches.dtype)
        return DecoderOutput(sample=F.pixel_shuffle(patches, self.config.patch_size))


def spatial_factor(autoencoder: ConfigMixin) -> int:
    """Pixels per latent along one side, for `PatchPCA` and diffusers' autoencoders."""
    config = autoencoder.config
    if "patch_size" in config:
        return int(config.patch_size)
    return int(2 ** (len(config.block_out_channels) - 1))


Autoencoder: TypeAlias = AutoencoderKL | PatchPCA


@torch.no_grad()
def encode_images(vae: Autoencoder, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to latents (B, C, h, w) of about unit variance; the mode, not a sample."""
    with torch.autocast(images.device.type, enabled=False):
        z = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
    return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to images (B, 3, H, W) in [0, 1]; differentiable in the latents."""
    z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return (vae.decode(z.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
