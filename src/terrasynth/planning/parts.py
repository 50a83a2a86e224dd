"""A recipe's pipeline and segmentor from their configurations alone, without any weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from terrasynth.data.schema import LabelSchema, find_labels
from terrasynth.data.world import WORLD_SCHEMA
from terrasynth.errors import TerraSynthError
from terrasynth.io import read_json
from terrasynth.models.autoencoder import PatchPCA
from terrasynth.models.control import CONTROL_SCHEMES
from terrasynth.models.mmdit import TEXT_BRANCH, Trainable
from terrasynth.models.text import word_encoder, word_tokenizer
from terrasynth.packaged import packaged_or
from terrasynth.systems.build import check_divides, check_positions
from terrasynth.systems.todsynth import (
    TODSynthPipeline,
    mask_channels,
    untrained_autoencoder,
    untrained_transformer,
)
from terrasynth.tasks.segmentation import Segmentor
from terrasynth.training.precision import computes_in_bfloat16, round_linear

if TYPE_CHECKING:
    from terrasynth.recipe import Precision, Recipe

__all__ = [
    "PUBLISHED",
    "branch",
    "configurations",
    "label_schema",
    "length",
    "modules",
    "on_card",
    "parameters",
    "pipeline_of",
    "segmentor_of",
]

#: Configurations of base models that are known without a download.
PUBLISHED = Path(__file__).parents[1] / "models" / "published"
_HUB = ("stabilityai/stable-diffusion-3.5-medium", "stable-diffusion-v1-5/stable-diffusion-v1-5")
_MODELS = {cls.__name__: cls for cls in (SD3Transformer2DModel, AutoencoderKL, PatchPCA, *CONTROL_SCHEMES.values())}
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_PARTS = ("transformer", "vae", *_TEXT_ENCODERS)
_T5_TOKENS = 256


def label_schema(recipe: Recipe, base: Path) -> LabelSchema | None:
    """The classes of a recipe; None if their file is not here.

    `base` is the folder that a relative path starts from.
    """
    data = recipe.data
    if data.kind != "folder":
        return WORLD_SCHEMA
    if data.label_schema is None:
        return None
    file = find_labels(data.label_schema, (base, data.root or base))
    return None if file is None else LabelSchema.from_yaml(file)


def pipeline_of(recipe: Recipe, schema: LabelSchema, trainable: Trainable | None, *, gpu: bool) -> TODSynthPipeline:
    """The recipe's pipeline as it is trained, or (None) as it is placed for painting, on a GPU or on this processor.

    It is built on torch's default device; all prompts have the same embedding, zero.

    Raises:
        TerraSynthError: the base model's configuration is not here, or is no Stable Diffusion 3; the size of the tiles
            does not fit the model.
    """
    config, size = recipe.generator, recipe.data.image_size
    if config.system != "todsynth" or config.mask_coding == "ids":
        raise TerraSynthError(
            "plans are made for TODSynth alone",
            found=f"generator.system: {config.system}",
            fix="try it: `terrasynth train` with a few steps",
        )
    options: dict[str, Any] = {
        "label_schema": schema.to_dict(),
        "mask_coding": config.mask_coding,
        "mask_init": config.mask_init,
    }
    if config.base is None:
        check_divides(size, config.autoencoder.patch_size * config.patch_size)
        vae = untrained_autoencoder(config).requires_grad_(False)
        text = word_encoder(word_tokenizer())
        transformer = untrained_transformer(
            config,
            size,
            text.config,
            mask_channels=mask_channels(schema, config.mask_coding, vae),
            latent_std=[1.0] * config.autoencoder.channels,
        )
        parts: dict[str, Any] = {"transformer": transformer, "vae": vae, "text_encoder": text}
    else:
        known = configurations(config.base)
        if known.get("label_schema") is not None:
            options |= {name: known[name] for name in ("label_schema", "mask_coding")}
        missing = [name for name in _PARTS[:3] if name not in known]
        unknown = {known[name].get("_class_name") for name in _PARTS[:2] if name in known} - _MODELS.keys()
        if missing or unknown:
            raise TerraSynthError(
                "the base model is not one that TerraSynth trains",
                path=config.base,
                found=f"no config.json of {', '.join(missing)}" if missing else ", ".join(map(str, unknown)),
                expected="Stable Diffusion 3 or 3.5, or a pipeline that TerraSynth saved",
                fix="choose another generator.base",
            )
        parts = {name: _build(name, known[name]) if name in known else None for name in _PARTS}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=config.shift)
    pipeline = TODSynthPipeline(**parts, tokenizer=None, scheduler=scheduler, **options)
    if config.base is not None:
        check_divides(size, pipeline.factor * pipeline.transformer.config.patch_size)
        check_positions(size, pipeline, config.base)
    if pipeline.config.mask_coding == "onehot":
        pipeline.adapt(schema)
    if config.reference is not None:
        pipeline.transformer.add_reference()
    if config.layouts:
        pipeline.add_layouts().layout_share = config.layouts
    pipeline.prompts = partial(_prompts, pipeline)  # type: ignore[assignment]
    if trainable is None:
        pipeline.transformer.requires_grad_(False)
    else:
        pipeline.transformer.set_trainable(trainable, lora_rank=config.lora_rank)
    trained, painted = (
        computes_in_bfloat16(torch.device("cpu"), on_card(precision, gpu=gpu))
        for precision in (config.train.precision, recipe.sampling.precision)
    )
    if painted if trainable is None else trained:
        round_linear(pipeline.transformer)
        if config.base is not None and trained:
            for encoder in pipeline.text_encoders:
                encoder.to(torch.bfloat16)
    return pipeline


def segmentor_of(recipe: Recipe, schema: LabelSchema) -> Segmentor:
    """The recipe's segmentor, untrained."""
    config = recipe.segmentor.model_copy(update={"weights": None})
    return Segmentor.build(config, schema.num_classes).requires_grad_(False)


def on_card(precision: Precision, *, gpu: bool) -> Precision:
    """What a recipe's precision means on the GPU that is planned for: today's all have bfloat16."""
    return "bf16" if precision == "auto" and gpu else precision


def modules(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The networks of a pipeline."""
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def length(encoder: Any) -> int:
    """Tokens that a text encoder reads."""
    return _T5_TOKENS if isinstance(encoder, T5EncoderModel) else int(encoder.config.max_position_embeddings)


def parameters(pipeline: TODSynthPipeline) -> dict[str, tuple[int, int]]:
    """How many parameters every part has, and how many of them are trained."""
    counts: dict[str, tuple[int, int]] = {}

    def add(part: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            total, trained = counts.get(part, (0, 0))
            counts[part] = (total + tensor.numel(), trained + tensor.numel() * tensor.requires_grad)

    for name, parameter in pipeline.transformer.named_parameters():
        add(f"transformer, {branch(name)}", [parameter])
    add("autoencoder", [*pipeline.vae.parameters(), *pipeline.vae.buffers()])
    for encoder in pipeline.text_encoders:
        add("text encoders", encoder.parameters())
    return counts


def branch(name: str) -> str:
    """The branch of the transformer that a parameter or a module belongs to, by its name."""
    if name.startswith("mask_") or ".mask." in f".{name}.":
        return "mask"
    return "text" if any(part in f".{name}." or name.startswith(part) for part in TEXT_BRANCH) else "image"


def _prompts(pipeline: TODSynthPipeline, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    transformer = pipeline.transformer
    encoders = pipeline.text_encoders
    # The tokens of the CLIP encoders share their places; T5's follow.
    tokens = length(encoders[0]) + sum(length(encoder) for encoder in encoders if isinstance(encoder, T5EncoderModel))
    shapes = (
        (len(texts), tokens, transformer.config.joint_attention_dim),
        (
            len(texts),
            transformer.config.pooled_projection_dim,
        ),
    )
    embeds, pooled = (torch.zeros(shape, device=transformer.device) for shape in shapes)
    return embeds, pooled


def configurations(base: str, names: Sequence[str] = _PARTS) -> dict[str, Any]:
    """The configurations of a base model's parts, by their names, and what its index says besides.

    Args:
        base: a folder, a packaged name, or a name on a hub whose configurations are known (`PUBLISHED`).
        names: of the parts.

    Raises:
        TerraSynthError: they are not here.
    """
    published = PUBLISHED / f"{base.rpartition('/')[2]}.json"
    if base in _HUB and published.is_file():
        return dict(json.loads(published.read_text(encoding="utf-8")))
    folder = Path(packaged_or(base))
    if not (folder / "model_index.json").is_file():
        known = ", ".join(_HUB)
        raise TerraSynthError(
            "the configuration of the base model is not here",
            path=base,
            found="a folder without model_index.json" if folder.is_dir() else "a name on a hub",
            expected=f"{known}, or a folder of a pipeline that diffusers or TerraSynth saved",
            fix="download the base model and give its folder as `base`",
        )
    index = read_json(folder / "model_index.json")
    files = {
        name: folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json") for name in names
    }
    about = {name: value for name, value in index.items() if name not in names}
    return about | {name: read_json(path) for name, path in files.items() if path.is_file()}


def _build(name: str, configuration: dict[str, Any]) -> nn.Module:
    if name == "text_encoder_3":
        return T5EncoderModel(T5Config(**configuration)).requires_grad_(False)
    if name in _TEXT_ENCODERS:
        return CLIPTextModelWithProjection(CLIPTextConfig(**configuration)).requires_grad_(False)
    model = _MODELS[configuration["_class_name"]].from_config(configuration)
    return model.requires_grad_(name == "transformer")
