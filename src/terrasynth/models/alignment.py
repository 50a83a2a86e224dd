"""Representation alignment: features of a network in training are to say what a frozen backbone sees in the image.

    loss = −mean cos(MLP(f), g)        over places, f of the student, g of the teacher

(Yu et al. 2025, REPA, equation 8. In IDGBR the student is what the guidance adds to the deepest skip connection, and
the teacher DINOv2 ViT-g/14.)
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Alignment"]

#: Side of what a transformer sees as one token, in pixels of the image: 512 pixels are 32 x 32 tokens, as published.
_PIXELS_PER_TOKEN = 16


class Alignment(nn.Module):
    """The loss, with a teacher that is never trained and a projector that is.

    Args:
        channels: C, of the student's features.
        teacher: a name of `timm.list_models()`, `hf-hub:NAME`, or `local-dir:FOLDER` as written by
            `timm.models.save_for_hf`; published is `vit_giant_patch14_dinov2`.
        pretrained: load its published weights, which may mean a download.
        width: of the projector's hidden layers.
        settings: other arguments of `timm.create_model`, such as the `checkpoint_path` of weights that are at hand.

    Raises:
        ValueError: the backbone has no feature maps to align to, which shows in one evaluation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, channels: int, teacher: str, *, pretrained: bool = True, width: int = 2048, **settings: Any
    ) -> None:
        super().__init__()
        settings |= {"pretrained": pretrained, "num_classes": 0}
        self.patch_size: int | None = None
        try:
            self.teacher = timm.create_model(teacher, dynamic_img_size=True, **settings)
            self.patch_size = self.teacher.patch_embed.patch_size[0]
        except TypeError:  # convolutions take any size without being asked
            self.teacher = timm.create_model(teacher, **settings)
        self.teacher.eval().requires_grad_(False)
        config = timm.data.resolve_model_data_config(self.teacher)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)
        #: Height and width of what it sees, where it sees one size alone.
        self.size: list[int] | None = None
        self._settle(teacher, list(config["input_size"][-2:]))
        sizes = (channels, width, width, self.teacher.num_features)
        linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for layer in linear:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.projector = nn.Sequential(linear[0], nn.SiLU(), linear[1], nn.SiLU(), linear[2])

    def _settle(self, name: str, published: list[int]) -> None:
        """Find out, by an image that is neither square nor of the published size, whether the teacher takes any."""
        image = self.mean.expand(3, 96, 64)[None]
        for self.size in (None, published):
            try:
                if self.see(image).ndim == 4:
                    return
            except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
                continue
        raise ValueError(f"{name} gives no feature maps (timm's forward_intermediates)")

    def train(self, mode: bool = True) -> Alignment:
        """Switch the projector alone: a teacher's batch norms are to stay as they are."""
        self.projector.train(mode)
        return self

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """The loss of every image, float32 (B,), from −1 to 1.

        Places where the student's vector is zero are left out, as all are before the first step.

        Args:
            features: of the student, (B, C, h, w).
            images: (B, 3, H, W) in [0, 1].
        """
        teacher = self.see(images)
        student = self.projector(features.movedim(1, -1)).movedim(-1, 1).float()
        student = F.interpolate(student, teacher.shape[-2:], mode="bilinear", align_corners=False)
        seen = torch.linalg.vector_norm(student, dim=1, keepdim=True) > 1e-6
        # Not the cosine of a zero vector, whose gradient is huge.
        cosine = F.cosine_similarity(torch.where(seen, student, teacher), teacher, dim=1)
        seen = seen.squeeze(1)
        return -(cosine * seen).sum((1, 2)) / seen.sum((1, 2)).clamp_min(1)

    @torch.no_grad()
    def see(self, images: Tensor) -> Tensor:
        """What the teacher finds in images (B, 3, H, W) in [0, 1]: its last feature maps, float32 (B, D, h, w).

        One that sees a single size alone is shown images that were brought to it.
        """
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False)
        elif self.patch_size is not None:
            size = [max(1, side // _PIXELS_PER_TOKEN) * self.patch_size for side in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bicubic", align_corners=False)
        images = ((images - self.mean) / self.std).to(next(self.teacher.parameters()).dtype)
        return self.teacher.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0].float()
