"""Diffusers' conditional U-Net in two halves.

One evaluation of the encoder then serves several decoders, as with and without what a guidance network adds, and a
U-Net that only reads a condition has no decoder at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any, NamedTuple, Self

import torch
from diffusers import UNet2DConditionModel

# Not used here, but a pipeline finds the loading methods of its parts by this name in their modules.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from torch import Tensor, nn

from terrasynth.errors import TerraSynthError

__all__ = ["Features", "UNetEncoder", "check_halves", "decode", "descend", "encode", "repeat_mean"]

#: What else diffusers' U-Net may be told than a timestep and a text, and what it then has in its configuration.
_FOREIGN = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "time_embedding_act_fn",
    "time_cond_proj_dim",
    "center_input_sample",
)


class Features(NamedTuple):
    """Feature maps of a U-Net's encoder, or what is to be added to them.

    Attributes:
        skips: for the skip connections, outermost first, each (B, C, h, w).
        middle: of the middle block, (B, C, h, w).
        time: the time embedding (B, D), which the decoder is told as well; None in what is to be added.
    """

    skips: tuple[Tensor, ...]
    middle: Tensor
    time: Tensor | None = None

    def plus(self, residuals: Features) -> Features:
        """The sum, with the time embedding of these."""
        skips = tuple(skip + residual for skip, residual in zip(self.skips, residuals.skips, strict=True))
        return Features(skips, self.middle + residuals.middle, self.time)

    def rows(self, index: Tensor) -> Features:
        """Those of some of the images, which may repeat."""
        time = None if self.time is None else self.time[index]
        return Features(tuple(skip[index] for skip in self.skips), self.middle[index], time)

    def times(self, factor: Tensor) -> Features:
        """Each image's maps times a number of its own, `factor` (B,)."""
        by_image = factor.view(-1, 1, 1, 1)
        return Features(tuple(skip * by_image for skip in self.skips), self.middle * by_image, self.time)


def descend(
    unet: UNet2DConditionModel, sample: Tensor, timestep: Tensor, text: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The encoder without the middle block.

    Args:
        unet: a U-Net that is told a timestep and a text, as Stable Diffusion's.
        sample: (B, C, h, w).
        timestep: (B,).
        text: prompt embeddings (B, L, D), or None for levels without cross-attention.

    Returns:
        The skip connections, of which the last is also what enters the middle block, and the time embedding (B, D).
    """
    time = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    x = unet.conv_in(sample)
    skips = (x,)
    for block in unet.down_blocks:
        x, outputs = block(x, time, **_seen(block, encoder_hidden_states=text))
        skips += outputs
    return skips, time


def encode(unet: UNet2DConditionModel, sample: Tensor, timestep: Tensor, text: Tensor | None = None) -> Features:
    """The encoder and the middle block; arguments as of `descend`."""
    skips, time = descend(unet, sample, timestep, text)
    middle = unet.mid_block(skips[-1], time, **_seen(unet.mid_block, encoder_hidden_states=text))
    return Features(skips, middle, time)


def decode(
    unet: UNet2DConditionModel,
    features: Features,
    text: Tensor | None = None,
    cross_attention_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """From what `encode` found to what the U-Net predicts, (B, C, h, w).

    `decode(unet, encode(unet, x, t, text), text)` is `unet(x, t, text).sample`; with `features.plus(residuals)` it is
    what the U-Net predicts beside a ControlNet with these residuals.
    """
    x, skips = features.middle, features.skips
    for block in unet.up_blocks:
        beside = skips[-len(block.resnets) :]
        skips = skips[: -len(block.resnets)]
        size = skips[-1].shape[2:] if skips else None  # where a side is odd, twice the half is another size
        seen = _seen(block, encoder_hidden_states=text, cross_attention_kwargs=cross_attention_kwargs)
        x = block(x, beside, features.time, upsample_size=size, **seen)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def _seen(block: nn.Module, **conditions: Any) -> dict[str, Any]:
    """What a block is told, if it has cross-attention."""
    return conditions if getattr(block, "has_cross_attention", False) else {}


def check_halves(unet: UNet2DConditionModel) -> None:
    """Refuse a U-Net that these halves would not evaluate as diffusers does.

    Raises:
        TerraSynthError: it is told other things than a timestep and a text, as that of Stable Diffusion XL.
    """
    foreign = [f"{name}: {unet.config[name]}" for name in _FOREIGN if unet.config.get(name) not in (None, False)]
    if unet.mid_block is None:
        foreign.append("no middle block")
    if foreign:
        raise TerraSynthError(
            "the base model's U-Net is of another kind",
            path=unet.config.get("_name_or_path") or None,
            found=", ".join(foreign),
            expected="one that is told a timestep and a text",
            fix="choose Stable Diffusion 1.5 as a base",
        )


class UNetEncoder(UNet2DConditionModel):
    """The encoder and the middle block alone: a U-Net that reads a condition.

    Its configuration and the names of its parameters are those of diffusers' U-Net.
    """

    _keys_to_ignore_on_load_unexpected = (r"^up_blocks\.", r"^conv_norm_out\.", r"^conv_out\.")

    @wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        del self.up_blocks, self.conv_norm_out, self.conv_act, self.conv_out

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None) -> Features:
        """What `encode` finds."""
        return encode(self, sample, timestep, encoder_hidden_states)

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, *, in_channels: int | None = None) -> Self:
        """A copy of a U-Net's encoder.

        Args:
            unet: whose weights are copied.
            in_channels: of the copy, if more than the U-Net's; the others weigh nothing at first.
        """
        channels, given = in_channels or unet.config.in_channels, unet.config.in_channels
        encoder = cls.from_config(unet.config, in_channels=channels)
        weights = {name: tensor for name, tensor in unet.state_dict().items() if name in encoder.state_dict()}
        widened = torch.zeros_like(encoder.conv_in.weight)
        widened[:, :given] = weights["conv_in.weight"]
        encoder.load_state_dict(weights | {"conv_in.weight": widened})
        # Not diffusers' own `to`, which warns about an empty list of layers to keep in float32.
        return nn.Module.to(encoder, unet.device, unet.dtype)


def repeat_mean(
    parameter: nn.Parameter, dim: int, before: int, after: int, *, group: int = 1, times: int = 1
) -> nn.Parameter:
    """The mean of a parameter's last channels, as often as there are channels now.

    Args:
        parameter: of a convolution.
        dim: of the channels.
        before: how many there were, in groups of `group` numbers; whatever stands before them is kept.
        after: how many there shall be.
        group: numbers a channel, as `pixel_unshuffle` makes them.
        times: how often such channels follow one another, each time with a mean of their own.
    """
    count = times * before * group
    kept, last = parameter.detach().split([parameter.shape[dim] - count, count], dim)
    means = last.unflatten(dim, (times, before, group)).mean(dim + 1, keepdim=True)
    repeated = torch.cat([means] * after, dim + 1).flatten(dim, dim + 2)
    return nn.Parameter(torch.cat([kept, repeated], dim), requires_grad=parameter.requires_grad)
