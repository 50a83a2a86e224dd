"""Stable Diffusion 1.5's U-Net whose decoder looks at a mask and at a reference image: all-in-attention.

TISynth (Dong et al. 2025, doi 10.1016/j.inffus.2025.103839) reads each condition by an encoder of its own, a copy of
the U-Net's (a ControlNet, Zhang et al. 2023, arXiv 2302.05543). Its feature maps are not added to the skip connections:
they are keys and values of the transformers of the decoder and of the middle block. With image tokens x, feature maps
R of the reference and M of the mask, and text T, one block is

    x ← x + Attention(LN(x), R)        x ← x + Attention(LN(x), M)
    x ← x + Attention(LN(x), LN(x))    x ← x + Attention(LN(x), T)      x ← x + FF(LN(x))

A decoder's transformer sees the feature maps of the resolution and place of the skip connection that precedes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self, get_args

import torch
from diffusers import ControlNetModel, Transformer2DModel, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

# Not used here, but a pipeline finds the loading methods of its parts by this name in their modules.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from terrasynth.errors import TerraSynthError
from terrasynth.models.unet import Features, decode, descend

__all__ = ["AllInAttentionBlock", "AllInAttentionUNet", "Branches"]

Branches = Literal["all", "branches"]


class AllInAttentionBlock(BasicTransformerBlock):
    """A transformer block that looks at the reference and at the mask before it does what diffusers' block does.

    The feature maps come in as `cross_attention_kwargs`: lists `reference` and `mask` of tensors (B, C, h, w), of which
    this block takes those at its `place`.

    Args:
        block: the block whose sizes are taken, not its weights.
        feature_dim: C, channels of both feature maps.
        place: which ones of the lists.
    """

    def __init__(self, block: BasicTransformerBlock, feature_dim: int, place: int) -> None:
        sizes = {"dim": block.dim, "cross_attention_dim": block.cross_attention_dim}
        heads, head_dim = block.num_attention_heads, block.attention_head_dim
        super().__init__(num_attention_heads=heads, attention_head_dim=head_dim, **sizes)
        self.place = place
        self.reference_norm = nn.LayerNorm(block.dim)
        self.reference_attn = Attention(block.dim, feature_dim, heads=heads, dim_head=head_dim)
        self.mask_norm = nn.LayerNorm(block.dim)
        self.mask_attn = Attention(block.dim, feature_dim, heads=heads, dim_head=head_dim)
        for attention in (self.reference_attn, self.mask_attn):
            # Features start at zero, and so does what is found in them: the untrained block is the base model's.
            nn.init.zeros_(attention.to_out[0].bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Image tokens (B, N, D) to image tokens; arguments as of diffusers' block."""
        assert cross_attention_kwargs is not None
        reference, mask = (cross_attention_kwargs[name][self.place] for name in ("reference", "mask"))
        x = hidden_states
        x = x + self.reference_attn(self.reference_norm(x), reference.flatten(2).mT)
        x = x + self.mask_attn(self.mask_norm(x), mask.flatten(2).mT)
        return super().forward(x, encoder_hidden_states=encoder_hidden_states)


class AllInAttentionUNet(UNet2DConditionModel):
    """The noise in latents, given text, a mask and a reference image.

    Parameter names are those of diffusers' U-Net, so a Stable Diffusion 1.5 checkpoint is a subset; the branches are
    `mask_hint`, `mask_encoder`, `reference_hint`, `reference_encoder` and, in the decoder's transformer blocks,
    `mask_norm`, `mask_attn`, `reference_norm`, `reference_attn`.

    Args:
        sample_size: side of the latents it is trained on.
        in_channels: C, channels of the latents, also of the reference.
        out_channels: channels of the prediction.
        down_block_types: as in `UNet2DConditionModel`.
        up_block_types: the same, from the middle outwards; those without transformers come first.
        block_out_channels: width of every level.
        layers_per_block: residual blocks of a level.
        norm_num_groups: groups of the group norms; divides every width.
        cross_attention_dim: width of the prompt embeddings.
        attention_head_dim: the number of heads (the name is diffusers').
        mask_channels: Cm, channels of the mask code, at the resolution of the image.
        hint_channels: widths of the convolutions that bring the mask down to the latents' resolution, which is
            1 / 2^(n - 1) of the image's for n of them; those of the reference have no strides.
        timestep_free: the encoders see the conditions and the text, but neither the noisy latents nor the timestep, so
            that their feature maps are the same in all steps of a sampling. Published encoders see both.

    Raises:
        TerraSynthError: the levels of the decoder that have transformers are not its outer ones.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        out_channels: int = 4,
        down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types: tuple[str, ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        cross_attention_dim: int = 768,
        attention_head_dim: int = 8,
        mask_channels: int = 3,
        hint_channels: tuple[int, ...] = (16, 32, 96, 256),
        timestep_free: bool = False,
    ) -> None:
        sizes = {
            "in_channels": in_channels,
            "down_block_types": down_block_types,
            "block_out_channels": block_out_channels,
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "cross_attention_dim": cross_attention_dim,
            "attention_head_dim": attention_head_dim,
        }
        super().__init__(sample_size=sample_size, out_channels=out_channels, up_block_types=up_block_types, **sizes)
        hint = {"conditioning_embedding_channels": block_out_channels[0], "block_out_channels": hint_channels}
        self.mask_hint = ControlNetConditioningEmbedding(conditioning_channels=mask_channels, **hint)
        self.reference_hint = ControlNetConditioningEmbedding(conditioning_channels=in_channels, **hint)
        for layer in self.reference_hint.blocks:
            layer.stride = (1, 1)  # latents have the resolution already

        places = dict(self._places())
        if sorted(places.values()) != list(range(len(places))) or not places:
            raise TerraSynthError(
                "the levels of the decoder that have transformers are not its outer ones",
                found=", ".join(up_block_types),
                expected="UpBlock2D any number of times, then CrossAttnUpBlock2D",
                fix="change up_block_types",
            )
        self.mask_encoder = _condition_encoder(len(places), sizes)
        self.reference_encoder = _condition_encoder(len(places), sizes)
        channels = [layer.out_channels for layer in self.mask_encoder.controlnet_down_blocks]
        for transformer, place in places.items():
            _look_at_features(transformer, channels[place], place)
        _look_at_features(self.mid_block.attentions[0], block_out_channels[-1], len(places))
        self.set_trainable("all")

    # What else diffusers' U-Net can be asked for: it has the default here, and would only fill the configuration.
    ignore_for_config = sorted(
        {*inspect.signature(UNet2DConditionModel.__init__).parameters} - {*inspect.signature(__init__).parameters}
    )

    def _places(self) -> Iterator[tuple[Transformer2DModel, int]]:
        """The transformers of the decoder, and which skip connection comes before each, as the encoder counts them."""
        place = sum(len(block.resnets) for block in self.up_blocks)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                place -= 1
                if hasattr(block, "attentions"):
                    yield block.attentions[i], place

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        mask: Tensor,
        reference: Tensor,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            sample: noisy latents, (B, C, h, w).
            timestep: 0 to 999, (B,).
            encoder_hidden_states: prompt embeddings, (B, L, cross_attention_dim).
            mask: mask code, (B, Cm, H, W), at the resolution of the image.
            reference: latents of the reference image, (B, C, h, w).
            return_dict: return a `UNet2DConditionOutput`, else a tuple.

        Returns:
            `sample`, the noise, (B, C, h, w).
        """
        seen = sample, timestep, encoder_hidden_states
        hints = self.hints(mask, reference)
        noise = self.denoise(
            *seen,
            self.features(self.mask_encoder, hints["mask"], *seen),
            self.features(self.reference_encoder, hints["reference"], *seen),
        )
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    @apply_forward_hook
    def hints(self, mask: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Of mask codes and latents of references, as in `forward`: what their encoders see, each (B, D, h, w).

        They are the same in all steps of a sampling.
        """
        return {"mask": self.mask_hint(mask), "reference": self.reference_hint(reference)}

    @apply_forward_hook
    def features(
        self, encoder: ControlNetModel, hint: Tensor, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> list[Tensor]:
        """Feature maps of a condition: one a skip connection that the decoder's transformers ask for, then the middle.

        Args:
            encoder: `mask_encoder` or `reference_encoder`.
            hint: of `hints`, (B, D, h, w).
            sample: as in `forward`, as are the others. With `timestep_free` it and the timestep change nothing.
            timestep: see `forward`.
            encoder_hidden_states: see `forward`.
        """
        if self.config.timestep_free:
            sample, timestep = torch.zeros_like(sample), torch.zeros_like(timestep)
        outer, middle = encoder(sample, timestep, encoder_hidden_states, hint, return_dict=False)
        return [*outer, middle]

    @apply_forward_hook
    def denoise(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        mask_features: Sequence[Tensor],
        reference_features: Sequence[Tensor],
    ) -> Tensor:
        """Predict the noise from what `features` found in mask and reference; else as `forward`."""
        conditions = {"mask": mask_features, "reference": reference_features}
        skips, time = descend(self, sample, timestep, encoder_hidden_states)
        x = self.mid_block(
            skips[-1], time, encoder_hidden_states=encoder_hidden_states, cross_attention_kwargs=conditions
        )
        return decode(self, Features(skips, x, time), encoder_hidden_states, conditions)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        *,
        mask_channels: int,
        hint_channels: Sequence[int] = (16, 32, 96, 256),
        timestep_free: bool = False,
    ) -> Self:
        """Add the branches to the U-Net of a Stable Diffusion 1.x, whose weights are copied.

        Both encoders start as copies of the U-Net's. Through layers that start at zero, the untrained model predicts
        what the base model does.

        Args:
            unet: the base model.
            mask_channels: Cm, channels of the mask code.
            hint_channels: see the class.
            timestep_free: see the class.

        Raises:
            TerraSynthError: the U-Net is of another kind, such as that of Stable Diffusion 2 or XL.
        """
        ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (cls, UNet2DConditionModel))
        config = {name: value for name, value in unet.config.items() if name in ours}
        foreign = {
            name: unet.config[name]
            for name, parameter in theirs.items()
            if name not in ours and name in unet.config and unet.config[name] != parameter.default
        }
        if not isinstance(unet.config.attention_head_dim, int):
            foreign["attention_head_dim"] = unet.config.attention_head_dim
        if foreign:
            raise TerraSynthError(
                "the base model's U-Net is of another kind",
                path=unet.config.get("_name_or_path") or None,
                found=", ".join(f"{name}: {value}" for name, value in foreign.items()),
                expected="the configuration of Stable Diffusion 1.x, at any size",
                fix="choose Stable Diffusion 1.5 as a base",
            )
        model = cls(
            **config, mask_channels=mask_channels, hint_channels=tuple(hint_channels), timestep_free=timestep_free
        )
        weights = unet.state_dict()
        model.load_state_dict(weights, strict=False)
        for encoder in (model.mask_encoder, model.reference_encoder):
            encoder.load_state_dict(
                {name: weights[name] for name in encoder.state_dict() if not name.startswith("controlnet_")},
                strict=False,
            )
        # Not diffusers' own `to`, which warns about an empty list of layers to keep in float32.
        return nn.Module.to(model, unet.device, unet.dtype)

    def set_trainable(self, which: Branches) -> Self:
        """Choose which parameters train, and return self.

        Args:
            which: "all", or "branches" for the encoders of both conditions and the attentions on them, as published
                (where the mask's encoder and the middle block were left out by mistake).
        """
        if which not in get_args(Branches):
            raise TerraSynthError(
                "no such choice of parameters", found=which, expected=", ".join(get_args(Branches)), fix="choose one"
            )
        for name, parameter in self.named_parameters():
            branch = name.startswith(("mask_", "reference_")) or ".mask_" in name or ".reference_" in name
            parameter.requires_grad_(which == "all" or branch)
        if self.config.timestep_free:
            for encoder in (self.mask_encoder, self.reference_encoder):
                encoder.conv_in.weight.requires_grad_(False)  # what it weighs is zero
        return self


def _condition_encoder(features: int, sizes: dict[str, Any]) -> ControlNetModel:
    """A ControlNet without its hint, which is the same in every step, and of so many feature maps beside the middle's.

    The innermost levels of the decoder have no transformers, so nobody would look at theirs.
    """
    encoder = ControlNetModel(**sizes)
    encoder.controlnet_cond_embedding = nn.Identity()
    encoder.controlnet_down_blocks = encoder.controlnet_down_blocks[:features]
    return encoder


def _look_at_features(transformer: Transformer2DModel, feature_dim: int, place: int) -> None:
    blocks = [AllInAttentionBlock(block, feature_dim, place) for block in transformer.transformer_blocks]
    transformer.transformer_blocks = nn.ModuleList(blocks)
