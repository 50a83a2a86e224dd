"""Numbers that a U-Net is told beside the timestep, as something to add to its time embedding."""

from __future__ import annotations

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

__all__ = ["ConditionEmbedding"]


class ConditionEmbedding(ModelMixin, ConfigMixin):
    """Two layers whose last starts at zero: at first the U-Net computes what it would without.

    For diffusers' `UNet2DModel` of `class_embed_type="identity"`, which adds `class_labels` to its time embedding.

    Args:
        features: how many numbers there are.
        width: D, of the time embedding.
    """

    @register_to_config
    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.layers = TimestepEmbedding(features, width)
        nn.init.zeros_(self.layers.linear_2.weight)
        nn.init.zeros_(self.layers.linear_2.bias)

    def forward(self, numbers: Tensor) -> Tensor:
        """(B, features) to (B, D)."""
        embedding: Tensor = self.layers(numbers.to(self.dtype))
        return embedding
