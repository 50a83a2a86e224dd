"""What systems have in common: how those that are stored whole are loaded, and what paints under masks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.autoencoder import decode_latents, encode_images
from terrasynth.systems.loading import cast, check_whole, loading

if TYPE_CHECKING:
    from terrasynth.recipe import Precision

__all__ = ["MaskPipeline", "SavedPipeline", "check_choice"]


class MaskPipeline(DiffusionPipeline):
    """A diffusers pipeline that knows classes (`schema`) and paints in the latents of its `vae`."""

    schema: LabelSchema

    @classmethod
    def known_classes(cls, label_schema: dict[str, Any] | None) -> LabelSchema:
        """The classes of `LabelSchema.to_dict()`.

        Raises:
            TerraSynthError: there are none: a base model that knows no classes was loaded without `label_schema=`.
        """
        if label_schema is None:
            raise TerraSynthError(
                "the pipeline has no label schema",
                found="a base model that knows no classes",
                expected="`label_schema=`, as LabelSchema.to_dict() gives it",
                fix=f"{cls.__name__}.from_pretrained(NAME, label_schema=LabelSchema.from_yaml(FILE).to_dict())",
            )
        return LabelSchema.from_dict(label_schema)

    def captions(self, masks: Iterable[Tensor]) -> list[str]:
        """The default prompt of every mask (H, W): the names of its classes."""
        return [self.schema.caption(mask.cpu(), self.config.caption) for mask in masks]

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to latents (B, C, h, w) of about unit variance; the mode, not a sample."""
        return encode_images(self.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) in [0, 1]; differentiable in the latents."""
        return decode_latents(self.vae, latents)


class SavedPipeline(DiffusionPipeline):
    """A diffusers pipeline that loads in float32, and says in one message why not; `EXPECTED` is what it loads."""

    EXPECTED: str

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a folder or hub name; see `DiffusionPipeline.from_pretrained`. Only safetensors are read.

        Everything is float32 unless a precision is asked for, however it is stored.

        Raises:
            TerraSynthError: there is no such model, a part of it is missing or damaged, or does not fit the arguments.
        """
        with loading(pretrained_model_name_or_path, cls.EXPECTED):
            pipeline = super().from_pretrained(str(pretrained_model_name_or_path), use_safetensors=True, **kwargs)
            check_whole(pipeline, pretrained_model_name_or_path)
            if not kwargs.keys() & {"torch_dtype", "dtype", "device_map"}:
                cast(pipeline, torch.float32)  # text encoders come in the precision of their files
            return pipeline

    def place(self, device: str | torch.device, precision: Precision) -> Self:
        """Bring the networks where they compute, in `precision` from now on, and return self."""
        self._precision = precision
        for part in self.components.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part, device)  # not the pipeline's `to`, which warns
        return self


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse an argument that is none of a `Literal`'s values.

    Raises:
        TerraSynthError: with all of them.
    """
    if value not in get_args(choices):
        raise TerraSynthError(f"no such `{name}`", found=value, expected=", ".join(get_args(choices)))
