"""The schemes by which a mask can control an MM-DiT, beside unified triple attention.

TODSynth (Yang et al. 2025, arXiv 2512.16740) compares four. Here they differ in how the mask reaches the image tokens
and in nothing else: embeddings, positions, initialisation, preconditioning and read-out are those of `MaskMMDiT`, and
without a mask each is the same SD3 transformer. In one block, with image tokens Z, text T and mask M,

    unified      one joint attention of Z, T and M
    Siamese      a joint attention of Z and T, and one of Z and M; Z takes the sum of what it finds in both
    adapter      a joint attention of Z and T; Z adds what it finds in features of the mask
    ControlNet   a joint attention of Z and T; Z adds W times a control stream, SD3's blocks over Z + M and T

At equal width and depth, the first two have equally many parameters, and the ControlNet, with a control stream half as
deep as the transformer, about as many. An adapter is smaller by nature: its mask has no stream. An encoder of the mask
that made it as large made it worse in short trainings, since the image finds the mask below it later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers.models.attention import JointTransformerBlock

# Not used here, but a pipeline finds the loading methods of its parts by this name in their modules.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from terrasynth.models.mmdit import (
    Block,
    JointBlock,
    MaskMMDiT,
    Projected,
    Stream,
    TripleBlock,
    attention,
    joint_attention,
    opened,
)

__all__ = ["CONTROL_SCHEMES", "AdapterMMDiT", "ControlNetMMDiT", "SiameseMMDiT"]

_EPS = 1e-6


class SiameseBlock(TripleBlock):
    """Two joint attentions side by side: of image and text as in SD3, and of image and mask.

    The image brings the same queries, keys and values to both (the twins share its weights), and takes the sum of what
    it finds. In the second it sees no token of the text, and in neither do text and mask see each other; within a block
    the mask knows of the text only what modulates all streams, the pooled prompt.
    """

    def _attend(self, projected: list[Projected]) -> list[Tensor]:
        beside_text = joint_attention(projected[:2])
        if len(projected) < 3:
            return beside_text
        beside_mask = joint_attention([projected[0], projected[2]])
        if self.mask.gate is not None:
            beside_mask[0] = opened(self.mask.gate, beside_mask[0]) * beside_mask[0]
        return [beside_text[0] + beside_mask[0], *beside_text[1:], *beside_mask[1:]]


class SiameseMMDiT(MaskMMDiT):
    """Siamese MM-attention (after SiamLayout, Zhang et al. 2024, arXiv 2412.03859); arguments as in `MaskMMDiT`.

    The mask's tokens are updated block by block in a tower of their own, with the weights of `MaskMMDiT`'s mask stream.
    """

    _no_split_modules = ["SiameseBlock"]  # noqa: RUF012 - diffusers' own declaration

    def _make_block(self, **sizes: Any) -> JointBlock:
        modulation, gated = self.config.mask_mlp_modulation, self.config.mask_gate
        return SiameseBlock(**sizes, mlp_modulation=modulation, gated=gated)


class AdapterBranch(nn.Module):
    """Keys and values of the mask features in one block."""

    def __init__(self, width: int, heads: int, *, qk_norm: str | None, gated: bool) -> None:
        super().__init__()
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_k = RMSNorm(width // heads, _EPS) if qk_norm else None
        self.gate = nn.Parameter(torch.zeros(heads)) if gated else None

    def copy_image_branch(self, block: JointTransformerBlock) -> None:
        """Start from the weights of the block's image stream."""
        self.to_k.load_state_dict(block.attn.to_k.state_dict())
        self.to_v.load_state_dict(block.attn.to_v.state_dict())
        if self.norm_k is not None:
            self.norm_k.load_state_dict(block.attn.norm_k.state_dict())


class AdapterBlock(JointBlock):
    """SD3's block, whose image tokens look at the mask features by a cross-attention of its own.

    Text tokens do not see the features, and the features are not updated.
    """

    def __init__(
        self, width: int, heads: int, *, last: bool, dual_attention: bool, qk_norm: str | None, gated: bool
    ) -> None:
        super().__init__(width, heads, last=last, dual_attention=dual_attention, qk_norm=qk_norm)
        self.mask = AdapterBranch(width, heads, qk_norm=qk_norm, gated=gated)

    def streams(self) -> tuple[Stream, ...]:
        """Image, text and mask features, which provide keys and values and are modulated by nothing."""
        features = Stream(
            heads=self.heads,
            modulation=None,
            query=None,
            key=self.mask.to_k,
            value=self.mask.to_v,
            query_norm=None,
            key_norm=self.mask.norm_k,
            out=None,
            feed_forward=None,
        )
        return (*super().streams(), features)

    def _attend(self, projected: list[Projected]) -> list[Tensor]:
        found = joint_attention(projected[:2])
        query = projected[0][0]
        if len(projected) == 3 and query is not None:
            _, key, value = projected[2]
            adapted = attention(query, key, value)
            if self.mask.gate is not None:
                adapted = opened(self.mask.gate, adapted) * adapted
            found[0] = found[0] + adapted
        return found


class AdapterMMDiT(MaskMMDiT):
    """A mask adapter (after IP-Adapter, Ye et al. 2023, arXiv 2308.06721); arguments as in `MaskMMDiT`.

    The features are the mask's embedded patches with their positions: timestep, text and image do not enter, so they
    are the same in all blocks and in all steps of a sampling. Nothing modulates them, `mask_mlp_modulation` has no
    effect.
    """

    _no_split_modules = ["AdapterBlock"]  # noqa: RUF012 - diffusers' own declaration

    def _make_block(self, **sizes: Any) -> JointBlock:
        return AdapterBlock(**sizes, gated=self.config.mask_gate)

    def _through_blocks(
        self,
        conditioning: Tensor,
        image: Tensor,
        text: Tensor,
        mask: Tensor | None,
        blocks: Sequence[Block],
    ) -> tuple[Tensor, Tensor | None]:
        features = () if mask is None else (mask,)
        tokens: tuple[Tensor, ...] = (image, text)
        for block in blocks:
            tokens = self._run(block, conditioning, *tokens, *features)
        return tokens[0], None


class ControlNetMMDiT(MaskMMDiT):
    """A ControlNet (Zhang et al. 2023, arXiv 2302.05543; the form for SD3 is diffusers' `SD3ControlNetModel`).

    Arguments as in `MaskMMDiT`. A control stream, half as many of SD3's blocks, reads the image tokens plus the mask's
    and the text. Through linear layers that start at zero, each of its blocks is added to the image tokens after two or
    more blocks of the main stream. As in diffusers, the last block takes none. The embeddings of timestep and text are
    the main stream's: they would be trained to be the same. The zero layers are the gates, so `mask_gate` and
    `mask_mlp_modulation` have no effect.
    """

    _no_split_modules = ["JointBlock"]  # noqa: RUF012 - diffusers' own declaration

    def _make_block(self, **sizes: Any) -> JointBlock:
        return JointBlock(**sizes)

    def _add_blocks(self, count: int) -> None:
        super()._add_blocks(count)
        control = max(1, count // 2)
        self.mask_blocks = nn.ModuleList(JointBlock(**self._sizes(i, control)) for i in range(control))
        self.mask_outputs = nn.ModuleList(nn.Linear(self.inner_dim, self.inner_dim) for _ in range(control))
        self._close()

    @torch.no_grad()
    def _close(self) -> None:
        for parameter in self.mask_outputs.parameters():
            parameter.zero_()

    def _embed_mask(self, mask_latents: Tensor) -> Tensor:
        return self.mask_embed(mask_latents)  # the image tokens that these are added to have the positions

    def _through_blocks(
        self,
        conditioning: Tensor,
        image: Tensor,
        text: Tensor,
        mask: Tensor | None,
        blocks: Sequence[Block],
    ) -> tuple[Tensor, Tensor | None]:
        residuals = []
        if mask is not None:
            tokens: tuple[Tensor, ...] = (image + mask, text)
            for control, output in zip(self.mask_blocks, self.mask_outputs, strict=True):
                tokens = self._run(control, conditioning, *tokens)
                residuals.append(output(tokens[0]))
        count = len(self.transformer_blocks)
        tokens = (image, text)
        for i, block in enumerate(blocks):
            tokens = self._run(block, conditioning, *tokens)
            if residuals and i < count - 1:
                tokens = (tokens[0] + residuals[i * len(residuals) // count], *tokens[1:])
        return tokens[0], None

    @torch.no_grad()
    def initialize_from_scratch(self) -> Self:
        """As in `MaskMMDiT`; what the control stream adds starts at zero."""
        super().initialize_from_scratch()
        self._close()
        return self

    @torch.no_grad()
    def _copy_image_branch(self) -> None:
        for copy, block in zip(self.mask_blocks, self.transformer_blocks, strict=False):
            weights = block.state_dict()
            if copy.context_pre_only:
                # Its text only provides keys and values: SD3 stores scale and shift there, elsewhere shift, scale, ...
                for name in ("norm1_context.linear.weight", "norm1_context.linear.bias"):
                    shift, scale = weights[name][: 2 * self.inner_dim].chunk(2)
                    weights[name] = torch.cat([scale, shift])
            copy.load_state_dict(weights, strict=False)
        # At first the copy sees what it was trained to see.
        nn.init.zeros_(self.mask_embed.proj.weight)
        nn.init.zeros_(self.mask_embed.proj.bias)


#: The network of each `generator.control`.
CONTROL_SCHEMES: dict[str, type[MaskMMDiT]] = {
    "unified": MaskMMDiT,
    "siamese": SiameseMMDiT,
    "adapter": AdapterMMDiT,
    "controlnet": ControlNetMMDiT,
}
