"""IDGBR's conditioning guidance network: what conditions add to a diffusion U-Net's skip connections.

Wang, Hu, Guo, Li, Tao, TPAMI 2026, doi 10.1109/TPAMI.2026.3654243 (arXiv 2507.01573). There is one block a skip
connection and one for the middle. With feature maps F of the noisy U-Net and F_c of the conditions, joined along the
channels,

    R = Conv(F, F_c)      q = LN(Conv(R) + p)      k = LN(Conv(F_c) + p)
    x = k + MHA(LN(q), LN(k), LN(k))               x ← x + MLP(LN(x))
    out = R + Conv(LN(x))

where all convolutions are 1 x 1 and p is a table of positions. `out` is added to F on its way to the decoder. In the
released code every parameter starts at zero, so that all but the first convolution stay there: a product of zeros has
no gradient. Here the first and the last convolution alone start at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from terrasynth.models.unet import Features

__all__ = ["GuidanceBlock", "GuidanceNet", "QueryAttention"]


class QueryAttention(nn.Module):
    """The conditions, as seen from where the noisy features are: one transformer layer, (B, C, h, w) to the same.

    The queries come from R; keys, values and the residual path from the conditions.

    Args:
        channels: C, of R and of the output.
        condition_channels: of the conditions together.
        grid: side of the table of positions, which is interpolated to other sizes.
        width: of the tokens.
        heads: of the attention.
    """

    def __init__(self, channels: int, condition_channels: int, grid: int, width: int, heads: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(grid**2, width) * width**-0.5)
        self.to_query = nn.Conv2d(channels, width, 1, bias=False)
        self.to_key = nn.Conv2d(condition_channels, width, 1, bias=False)
        self.norm_query, self.norm_key = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn_norm_query, self.attn_norm_key, self.attn_norm_value = (nn.LayerNorm(width) for _ in range(3))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm_out = nn.LayerNorm(width)
        self.proj = nn.Conv2d(width, channels, 1, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, residual: Tensor, condition: Tensor) -> Tensor:
        """R (B, C, h, w) and the conditions (B, Cc, h, w) to what is added to R."""
        height, width = residual.shape[-2:]
        positions = self._positions(height, width)
        q = self.norm_query(_tokens(self.to_query(residual)) + positions)
        k = self.norm_key(_tokens(self.to_key(condition)) + positions)
        seen, _ = self.attn(self.attn_norm_query(q), self.attn_norm_key(k), self.attn_norm_value(k), need_weights=False)
        x = k + seen
        x = x + self.mlp_out(_quick_gelu(self.mlp_in(self.mlp_norm(x))))
        return self.proj(self.norm_out(x).mT.unflatten(2, (height, width)))

    def _positions(self, height: int, width: int) -> Tensor:
        """The table at another size, (h w, D)."""
        side = int(len(self.positions) ** 0.5)
        if (height, width) == (side, side):
            return self.positions
        table = self.positions.mT.unflatten(1, (side, side))[None]
        return F.interpolate(table.float(), (height, width), mode="bicubic").to(table.dtype)[0].flatten(1).mT


class GuidanceBlock(nn.Module):
    """What one feature map gets from the conditions, at first nothing.

    Args:
        channels: C, of the noisy features.
        condition_channels: of the conditions together.
        grid: see `QueryAttention`; 0 for a block without attention.
        width: see `QueryAttention`.
        heads: see `QueryAttention`.
    """

    def __init__(self, channels: int, condition_channels: int, grid: int, width: int, heads: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + condition_channels, channels, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.attn = QueryAttention(channels, condition_channels, grid, width, heads) if grid else None

    def forward(self, noisy: Tensor, condition: Tensor) -> Tensor:
        """Noisy features (B, C, h, w) and the conditions (B, Cc, h, w) to what is added to the former."""
        residual = self.conv(torch.cat([noisy, condition], dim=1))
        return residual if self.attn is None else residual + self.attn(residual, condition)


class GuidanceNet(ModelMixin, ConfigMixin):
    """One `GuidanceBlock` for every feature map of a U-Net's encoder; `forward` gives what is added to them.

    Args:
        channels: of every skip connection, outermost first, and of the middle block.
        grids: their sides at the size it is trained at.
        conditions: how many feature maps of the U-Net's widths the conditions are: 2 for an image and a rough map that
            were read apart, as published, 1 where they were read together.
        max_grid: blocks of up to this side have attention, whose cost grows with the fourth power of the side; 0 for
            none at all. Published blocks all have it, up to 64.
        width: of the attention's tokens.
        heads: of the attention.
    """

    @register_to_config
    def __init__(
        self,
        channels: tuple[int, ...] = (*[320] * 4, *[640] * 3, *[1280] * 6),
        grids: tuple[int, ...] = (*[64] * 3, *[32] * 3, *[16] * 3, *[8] * 4),
        conditions: int = 2,
        max_grid: int = 16,
        width: int = 512,
        heads: int = 8,
    ) -> None:
        super().__init__()
        blocks = [
            GuidanceBlock(size, conditions * size, grid if grid <= max_grid else 0, width, heads)
            for size, grid in zip(channels, grids, strict=True)
        ]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, noisy: Features, conditions: Sequence[Features]) -> Features:
        """What to add to the features of a noisy U-Net.

        Args:
            noisy: of the U-Net that denoises.
            conditions: of the encoders that read the conditions, in the order image, rough map.
        """
        joined = [torch.cat(maps, dim=1) for maps in zip(*(_maps(each) for each in conditions), strict=True)]
        *skips, middle = (
            block(of_noisy, of_conditions)
            for block, of_noisy, of_conditions in zip(self.blocks, _maps(noisy), joined, strict=True)
        )
        return Features(tuple(skips), middle)

    @classmethod
    def for_unet(cls, unet: UNet2DConditionModel, grid: int, **settings: int) -> Self:
        """One that fits a U-Net.

        Args:
            unet: the U-Net.
            grid: side of its input at the size it is trained at.
            settings: the other arguments of the class.
        """
        widths, layers = unet.config.block_out_channels, unet.config.layers_per_block
        channels, grids = [widths[0]], [grid]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            channels += [width] * (layers if last else layers + 1)
            grids += [grid] * layers
            if not last:
                grid = -(-grid // 2)  # as a convolution of stride 2 with padding
                grids.append(grid)
        return cls((*channels, widths[-1]), (*grids, grid), **settings)


def _maps(features: Features) -> tuple[Tensor, ...]:
    return (*features.skips, features.middle)


def _tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h w, C)."""
    return x.flatten(2).mT


def _quick_gelu(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel's x σ(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)
