"""From a recipe to an untrained generator: its base model, extended, or a network from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from terrasynth.data.folder import Tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.packaged import packaged_or
from terrasynth.progress import say
from terrasynth.systems.generate import Pipeline, generator_class
from terrasynth.systems.loading import loading
from terrasynth.systems.tisynth import TISynthPipeline
from terrasynth.systems.todsynth import TODSynthPipeline, untrained_autoencoder
from terrasynth.training.precision import computes_in_bfloat16

if TYPE_CHECKING:
    from terrasynth.recipe import DataConfig, GeneratorConfig

__all__ = ["build", "check_divides", "check_positions"]

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_divides(image_size: int, token: int) -> None:
    """Refuse tiles that do not divide into tokens of so many pixels."""
    if image_size % token:
        raise TerraSynthError(
            "the tiles do not divide into tokens",
            found=f"data.image_size {image_size}",
            expected=f"a multiple of {token} (pixels per latent x latents per token)",
            fix="change data.image_size",
        )


def check_positions(image_size: int, pipeline: TODSynthPipeline, base: str) -> None:
    """Refuse tiles that are larger than the base model's grid of positions."""
    transformer = pipeline.transformer.config
    most = pipeline.factor * transformer.patch_size * transformer.pos_embed_max_size
    if image_size > most:
        raise TerraSynthError(
            "the tiles are larger than the base model's grid of positions",
            path=base,
            found=f"data.image_size {image_size}",
            expected=f"at most {most}",
            fix="lower data.image_size",
        )


def build(config: GeneratorConfig, data: DataConfig, tiles: Tiles) -> Pipeline:
    """The untrained pipeline of a recipe: from its base model, or from scratch.

    Raises:
        TerraSynthError: the sizes, the mask coding or the words of the captions do not fit the model.
    """
    pipeline: Pipeline
    if config.system == "tisynth":
        pipeline = _build_tisynth(config, data, tiles)
    else:
        pipeline = _build_todsynth(config, data, tiles)
        if config.layouts:
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                pipeline.add_layouts().layout_share = config.layouts
    pipeline.text_dropout, pipeline.mask_dropout = config.text_dropout, config.mask_dropout
    pipeline.reference_dropout = config.reference_dropout
    return pipeline


def _build_todsynth(config: GeneratorConfig, data: DataConfig, tiles: Tiles) -> TODSynthPipeline:
    captions = sorted(set(tiles.captions()))
    if config.base is None:
        factor, patch_size = config.autoencoder.patch_size, config.patch_size
    else:
        if Path(packaged_or(config.base)).is_dir():
            generator_class(config.base)  # else diffusers tells of parts that it expected
        # The text encoders, most of the weights, are never trained and need no more than bfloat16.
        text = torch.bfloat16 if computes_in_bfloat16(_DEVICE, config.train.precision) else torch.float32
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # what the base does not have starts at random
            pipeline = TODSynthPipeline.from_pretrained(
                config.base,
                dtype={"transformer": torch.float32, "vae": torch.float32, "default": text},
                label_schema=tiles.schema.to_dict(),
                mask_coding=config.mask_coding,
                mask_init=config.mask_init,
                caption=data.caption,
                image_size=data.image_size,
            )
            if config.reference is not None:
                pipeline.transformer.add_reference()
            pipeline.transformer.set_trainable(config.trainable, lora_rank=config.lora_rank)
        factor, patch_size = pipeline.factor, pipeline.transformer.config.patch_size
    check_divides(data.image_size, factor * patch_size)
    if config.base is None:
        images = tiles.images.float() / 255
        pipeline = TODSynthPipeline.from_scratch(config, images, tiles.schema, data.caption, captions)
        pipeline.transformer.set_trainable(config.trainable, lora_rank=config.lora_rank)
        pipeline.density = config.density
        return pipeline
    if config.reference is None:
        for name, parameter in pipeline.transformer.named_parameters():
            if name.endswith("reference_gate"):
                parameter.requires_grad_(False)  # it keeps what the base learned of references, which are not shown
    if not config.layouts:
        pipeline.transformer.drop_layouts()  # what the base has of them is read from blocks that change now
    check_positions(data.image_size, pipeline, config.base)
    _check_base(pipeline, config, captions)
    pipeline.density = config.density
    return pipeline


def _build_tisynth(config: GeneratorConfig, data: DataConfig, tiles: Tiles) -> TISynthPipeline:
    captions = sorted(set(tiles.captions()))
    if config.base is None:
        vae = untrained_autoencoder(config)
        check_divides(data.image_size, config.autoencoder.patch_size * 2 ** (len(config.unet.widths) - 1))
        vae.fit(tiles.images.float() / 255 * 2 - 1)
        pipeline = TISynthPipeline.from_scratch(
            vae,
            tiles.schema,
            captions,
            caption=data.caption,
            image_size=data.image_size,
            heads=config.heads,
            mask_coding=config.mask_coding,
            seed=config.seed,
            **config.unet.model_dump(),
        )
    else:
        base = packaged_or(config.base)
        with loading(base, TISynthPipeline.EXPECTED):
            known = TISynthPipeline.load_config(base)
        if known.get("_class_name") == "TODSynthPipeline":
            raise TerraSynthError(
                "the base model is of another system",
                path=config.base,
                found="TODSynth",
                expected=TISynthPipeline.EXPECTED,
                fix="set generator.base to null or to one of these",
            )
        options: dict[str, Any] = {"label_schema": tiles.schema.to_dict()}
        if "label_schema" not in known:
            options |= {"mask_coding": config.mask_coding, "timestep_free": config.unet.timestep_free}
        elif (names := LabelSchema.from_dict(known["label_schema"]).names) != tiles.schema.names:
            raise TerraSynthError(
                "the base model was trained with other classes",
                path=config.base,
                found=", ".join(names),
                expected=", ".join(tiles.schema.names),
                fix="start from Stable Diffusion 1.5, or from scratch",
            )
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # what the base does not have starts at random
            pipeline = TISynthPipeline.from_pretrained(
                base, **options, caption=data.caption, image_size=data.image_size
            )
        check_divides(data.image_size, pipeline.factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1))
        _check_base(pipeline, config, captions)
    pipeline.unet.set_trainable("branches" if config.trainable == "mask" else "all")
    return pipeline


def _check_base(pipeline: Pipeline, config: GeneratorConfig, captions: Sequence[str]) -> None:
    """Refuse a base model that reads masks otherwise, or can not spell the captions."""
    if pipeline.config.mask_coding != config.mask_coding:
        raise TerraSynthError(
            "the base model was trained with another mask coding",
            path=config.base,
            found=pipeline.config.mask_coding,
            expected=config.mask_coding,
            fix=f"set generator.mask_coding to {pipeline.config.mask_coding}",
        )
    tokens = {caption: pipeline.tokenizer(caption).input_ids for caption in captions}
    unknown = [caption for caption, ids in tokens.items() if pipeline.tokenizer.unk_token_id in ids]
    if pipeline.tokenizer.unk_token == "<unk>" and unknown:
        raise TerraSynthError(
            "the captions have words that the base model can not spell",
            path=config.base,
            found="; ".join(unknown[:3]),
            expected="words in the Latin script",
            fix="change data.caption or the class names",
        )
    longest, room = max(captions, key=lambda caption: len(tokens[caption])), pipeline.tokenizer.model_max_length
    if len(tokens[longest]) > room:
        say(f"the base model reads {room} tokens of a caption; cut off: {longest!r} ({len(tokens[longest])} tokens)")
