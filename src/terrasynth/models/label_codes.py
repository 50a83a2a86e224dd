"""Class maps as something that diffusion can noise: each class is a point, and a prediction means the nearest.

With the code x̂ that was predicted and the points c_k, in C channels, the score of class k is

    s_k = 3/4 + (2 ⟨x̂, c_k⟩ − |c_k|²) / 4C

which is largest for the nearest point and affine in x̂: to average the scores of overlapping windows is to average
their codes. For points of ±1 it is the mean of (1 + c_k x̂) / 2 over the channels, the probability that one agrees.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from terrasynth.errors import TerraSynthError

__all__ = ["CodeKind", "LabelCodes"]

CodeKind = Literal["bits", "onehot", "learned"]


class LabelCodes(ModelMixin, ConfigMixin):
    """The points of K classes.

    Args:
        num_classes: K.
        kind: `bits` for the bits of the class index as ±1 (Chen et al. 2023, "Analog Bits"), most significant first;
            `onehot` for one channel a class, ±1; `learned` for a table of points in (−1, 1), as published, which is
            random until it is loaded. Nothing here trains: what is trained to predict points must not move them.
        channels: C, if not as many as the kind needs (of a table, 3); with more, channels are repeated.

    Raises:
        TerraSynthError: there is no such kind, or there are not enough channels.
    """

    table: Tensor

    @register_to_config
    # Not a Literal: diffusers checks the types of what it loads, and can not read these.
    def __init__(self, num_classes: int = 2, kind: Any = "bits", channels: int | None = None) -> None:
        super().__init__()
        if kind not in get_args(CodeKind):
            raise TerraSynthError("no such label codes", found=kind, expected=", ".join(get_args(CodeKind)))
        least = {"bits": max(1, (num_classes - 1).bit_length()), "onehot": num_classes, "learned": 1}[kind]
        channels = (3 if kind == "learned" else least) if channels is None else channels
        if channels < least:
            raise TerraSynthError(
                "the classes do not fit into the channels of their codes",
                found=f"{num_classes} classes as {kind}, {least} channels",
                expected=f"at most {channels} channels",
                fix="choose other codes, or refine class by class with a refiner of two classes",
            )
        if kind == "learned":
            table = torch.randn(num_classes, channels).sigmoid() * 2 - 1
        elif kind == "onehot":
            table = torch.eye(num_classes) * 2 - 1
        else:
            shifts = torch.arange(least - 1, -1, -1)
            table = (torch.arange(num_classes).unsqueeze(1) >> shifts & 1).float() * 2 - 1
        self.register_buffer("table", table[:, torch.arange(channels) % table.shape[1]])

    @property
    def channels(self) -> int:
        """C."""
        return self.table.shape[1]

    def encode(self, masks: Tensor) -> Tensor:
        """Class indices (B, H, W) to codes float32 (B, C, H, W); zero where the value is no class."""
        masks = masks.long()
        known = (masks >= 0) & (masks < self.config.num_classes)
        codes = self.table.float()[masks.where(known, 0)] * known.unsqueeze(-1)
        return codes.movedim(-1, -3)

    def mean(self, shares: Tensor) -> Tensor:
        """Shares of the classes (B, K, H, W) to the mean of their points, float32 (B, C, H, W)."""
        with torch.autocast(shares.device.type, enabled=False):
            return torch.einsum("kc,bkhw->bchw", self.table.float(), shares.float())

    def scores(self, codes: Tensor) -> Tensor:
        """Codes (B, C, H, W) to the score of every class, float32 (B, K, H, W); 0 to 1 for codes within ±1."""
        table = self.table.float()
        with torch.autocast(codes.device.type, enabled=False):  # in bfloat16, near scores would be equal
            products = torch.einsum("kc,bchw->bkhw", 2 * table, codes.float())
        return 0.75 + (products - table.square().sum(1).view(-1, 1, 1)) / (4 * self.channels)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, C, H, W) to the classes of the nearest points, uint8 (B, H, W)."""
        return self.scores(codes).argmax(1).to(torch.uint8)
