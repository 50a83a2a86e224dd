"""The refiner and the painter of pairs without weights, and what the stages of their runs do."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import CLIPTextConfig, CLIPTextModel

from terrasynth.models import snap
from terrasynth.models.autoencoder import PatchPCA
from terrasynth.models.condition import ConditionEmbedding
from terrasynth.models.guidance_net import GuidanceNet
from terrasynth.models.label_codes import LabelCodes
from terrasynth.models.unet import UNetEncoder
from terrasynth.planning.footprint import enter
from terrasynth.planning.parts import configurations, modules, on_card
from terrasynth.planning.stages import Work, step, tensors
from terrasynth.sampling.guidance import guidance_chain
from terrasynth.systems import satsynth
from terrasynth.systems.idgbr import IDGBRPipeline
from terrasynth.systems.pairs import UPSCALER, build_pairs, build_upscaler
from terrasynth.systems.refine import build_refiner, from_base, set_up
from terrasynth.systems.satsynth import SatSynthPipeline
from terrasynth.training.precision import autocast

if TYPE_CHECKING:
    from terrasynth.data.schema import LabelSchema
    from terrasynth.recipe import PairsConfig, Precision, Recipe, RefinerConfig, TrainConfig

__all__ = ["Diffuses", "paint", "parameters", "pipeline_of", "pretended", "refine", "train", "training"]

Diffuses = Literal["refiner", "pairs", "upscaler"]

_SHARED = (AutoencoderKL, PatchPCA, GuidanceNet, LabelCodes, ConditionEmbedding, UNet2DModel, UNet2DConditionModel)
#: What the parts of a base may be; an encoder of conditions says of itself that it is a U-Net.
_MODELS: dict[str, type[Any]] = {cls.__name__: cls for cls in (*_SHARED, UNetEncoder)}
_REFINER = ("unet", "scheduler", "vae", "text_encoder", "condition_encoder", "guidance_net", "label_codes")
_PAIRS = ("unet", "scheduler", "label_codes", "embedding")


def pipeline_of(recipe: Recipe, schema: LabelSchema, what: Diffuses) -> IDGBRPipeline | SatSynthPipeline:
    """The recipe's refiner, painter of pairs or what enlarges these, as it is trained, on torch's default device.

    Raises:
        TerraSynthError: the configuration of its base is not here, or the settings do not fit it or the tiles.
    """
    size = recipe.data.image_size
    if what != "refiner":
        return _pairs(recipe.pairs, schema, size, upscaler=what == "upscaler")
    config, side = recipe.refiner, min(recipe.refiner.crop or size, size)
    plain = config.model_copy(update={"alignment": None})
    pipeline = build_refiner(plain, schema, side) if config.base is None else _refiner(plain, config.base, schema, side)
    if config.alignment is not None:
        pipeline.align(config.alignment, config.alignment_weight, steps=config.alignment_steps, pretrained=False)
    return pipeline


def _pairs(config: PairsConfig, schema: LabelSchema, size: int, *, upscaler: bool) -> SatSynthPipeline:
    base = config.base
    if upscaler and base is not None:
        base = str(inside) if (inside := Path(base, UPSCALER)).is_dir() else None
    if base is None:
        build = build_upscaler if upscaler else build_pairs
        return build(config.model_copy(update={"base": None}), schema, size)
    side = size // 2 if config.two_stages and not upscaler else size
    pipeline: SatSynthPipeline = _based(SatSynthPipeline, base, _PAIRS, label_schema=schema.to_dict(), image_size=side)
    return pipeline


def _refiner(config: RefinerConfig, base: str, schema: LabelSchema, side: int) -> IDGBRPipeline:
    stored = configurations(base, _REFINER)
    load = partial(_based, IDGBRPipeline, base, _REFINER, tokenizer=None)
    pipeline = from_base(load, stored, base, config, schema, side)
    if pipeline.text_encoder is not None:
        text = pipeline.text_encoder.config
        pipeline._empty_text = torch.zeros(1, text.max_position_embeddings, text.hidden_size)
    return set_up(pipeline, config, side)


def _based(cls: type[Any], base: str, names: tuple[str, ...], **given: Any) -> Any:
    """A pipeline of a base's configurations; `given` is as `from_pretrained` takes it."""
    known = configurations(base, names)
    accepted = inspect.signature(cls).parameters
    parts = {name: _part(name, known[name]) for name in names if name in known}
    return cls(
        **parts, **{name: value for name, value in known.items() if name in accepted and name not in names} | given
    )


def _part(name: str, configuration: dict[str, Any]) -> Any:
    if name == "scheduler":
        return DDIMScheduler.from_config(configuration)
    if name == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**configuration))
    return _MODELS["UNetEncoder" if name == "condition_encoder" else configuration["_class_name"]].from_config(
        configuration
    )


def pretended(recipe: Recipe, schema: LabelSchema, what: Diffuses) -> IDGBRPipeline | SatSynthPipeline:
    """The same without memory; to be called within `pretend`."""
    with unset_fake_temporarily(), torch.device("meta"):
        pipeline = pipeline_of(recipe, schema, what)
    for part in _networks(pipeline):
        enter(part)
    pipeline.noising.alphas_cumprod = torch.zeros(pipeline.noising.config.num_train_timesteps)
    if isinstance(pipeline, IDGBRPipeline) and pipeline._empty_text is not None:
        pipeline._empty_text = torch.zeros(pipeline._empty_text.shape)
    return pipeline


def _networks(pipeline: IDGBRPipeline | SatSynthPipeline) -> list[nn.Module]:
    alignment = getattr(pipeline, "alignment", None)
    return [*modules(pipeline), *([] if alignment is None else [alignment])]


def train(
    recipe: Recipe, pipeline: IDGBRPipeline | SatSynthPipeline, *, gpu: bool, offload: bool | None = None
) -> Work:
    """A step of the training, as `stages.train` has that of the generator."""
    config, side = training(recipe, pipeline), int(pipeline.config.image_size)
    count = config.batch_size
    with unset_fake_temporarily():
        seeds = torch.arange(count)  # real, because they are read
    masks = torch.zeros(count, side, side, dtype=torch.long)
    batch = {"image": torch.zeros(count, 3, side, side), "rough": masks, "mask": masks.clone(), "seed": seeds}
    weights = tensors(*_networks(pipeline))
    work = step(pipeline.network, pipeline.training_loss, batch, config, weights, gpu=gpu, offload=offload)
    return replace(work, around=_unread)


def training(recipe: Recipe, pipeline: IDGBRPipeline | SatSynthPipeline) -> TrainConfig:
    """The settings of a pipeline's training."""
    if isinstance(pipeline, IDGBRPipeline):
        return recipe.refiner.train
    return recipe.pairs.upscaler.train if pipeline.config.condition == "half" else recipe.pairs.train


@contextmanager
def _unread() -> Iterator[None]:
    """Without what depends on numbers, which pretended tensors do not have.

    Pairs are given nothing; the network sees as much. Class maps have all classes, which is the most that they can.
    """

    def nothing(size: Sequence[int], dropout: float, generator: torch.Generator) -> Tensor:
        return torch.zeros(2, *size, dtype=torch.bool)

    def everything(first: Tensor) -> list[Tensor]:
        return [torch.arange(first.shape[1])] * len(first)

    given, present = satsynth._given, snap._present
    satsynth._given, snap._present = nothing, everything
    try:
        yield
    finally:
        satsynth._given, snap._present = given, present


def parameters(pipeline: IDGBRPipeline | SatSynthPipeline) -> dict[str, tuple[int, int]]:
    """How many parameters every part has, and how many of them are trained."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    if isinstance(pipeline, IDGBRPipeline) and pipeline.alignment is not None:
        parts["alignment"] = pipeline.alignment
    counts = {
        name.replace("_", " "): [(p.numel(), p.requires_grad) for p in part.parameters()]
        for name, part in parts.items()
    }
    return {
        name: (sum(n for n, _ in each), sum(n for n, trained in each if trained))
        for name, each in counts.items()
        if each
    }


def refine(pipeline: IDGBRPipeline, windows: int, steps: int, precision: Precision, *, gpu: bool) -> Work:
    """Windows of a class map, by all steps; of a refiner of one class against the rest, those of one class."""
    side = pipeline.config.image_size
    images = torch.zeros(windows, 3, side, side)
    maps = torch.zeros(windows, side, side, dtype=torch.long)

    @torch.no_grad()
    def follow() -> Tensor:
        shares = snap.snap(images, maps, pipeline.num_classes, pipeline.config.snap_rounds)
        return pipeline.rough_codes(shares, maps)

    @torch.no_grad()
    def look() -> list[Tensor]:
        start = pipeline.start_of(codes)
        return [start, *(tensor for seen in pipeline.read(images, codes) for tensor in (*seen.skips, seen.middle))]

    @torch.no_grad()
    def evaluate() -> None:
        predict(latents, timestep)

    @torch.no_grad()
    def decode() -> None:
        pipeline.label_codes.scores(pipeline.decode_labels(latents))

    @contextmanager
    def around() -> Iterator[None]:
        with _unread(), autocast(torch.device("cpu"), on_card(precision, gpu=gpu)):
            yield

    with around():
        codes = follow()
        seen, predict = look(), pipeline.denoiser(images, codes)
    latents, timestep = torch.zeros(seen[0].shape), torch.zeros(windows, dtype=torch.long)
    parts = [(follow, 1), (look, 1), (evaluate, steps), (decode, 1)]
    return Work(parts, tensors(*modules(pipeline)), others=[images, maps, codes, latents, *seen], around=around)


def paint(
    recipe: Recipe, pipeline: SatSynthPipeline, pairs: int, steps: int, precision: Precision, *, gpu: bool
) -> Work:
    """Pairs, by all steps, asked for and guided as the recipe has it; or enlarged."""
    sampling, side, kind = recipe.pairs.sampling, int(pipeline.config.image_size), pipeline.config.condition
    terms = len(guidance_chain({"told": sampling.guidance_scale if sampling.shares and kind != "half" else 1.0}))
    images = torch.zeros(pairs, 3, side, side, dtype=torch.uint8)
    masks, known = torch.zeros(pairs, side, side, dtype=torch.long), torch.zeros(pairs, side, side, dtype=torch.bool)
    joint = pipeline.encode(images.float(), masks)
    # Seen and where it is given; or seen, and the noise of both it and the pair.
    given = (joint, torch.cat([joint, joint])) if kind == "half" else pipeline.see(joint, known, known)
    seen = None if kind == "none" else given[0]
    told = torch.zeros(terms * pairs, 1 if kind == "half" else 2 * pipeline.num_classes)
    latents, clean, timestep = torch.zeros_like(joint), torch.zeros_like(joint), torch.zeros(pairs, dtype=torch.long)

    @torch.no_grad()
    def evaluate() -> None:
        x = latents.repeat(terms, 1, 1, 1)
        condition = None if seen is None else seen.repeat(terms, 1, 1, 1)
        pipeline._evaluate(x, timestep.repeat(terms), condition, None if pipeline.embedding is None else told)

    @torch.no_grad()
    def decode() -> None:
        pipeline.decode(latents)

    return Work(
        [(evaluate, steps), (decode, 1)],
        tensors(*modules(pipeline)),
        others=[images, masks, known, joint, *given, told, latents, clean],
        around=lambda: autocast(torch.device("cpu"), on_card(precision, gpu=gpu)),
    )
