"""Networks: the text-image-mask MM-DiT, import of published checkpoints, autoencoders and text encoders."""

from __future__ import annotations

from terrasynth.models.convert import load_published
from terrasynth.models.mmdit import MaskMMDiT

__all__ = ["MaskMMDiT", "load_published"]
