"""What a recipe needs of a card, told before anything is downloaded or trained: `terrasynth doctor --plan RECIPE`.

No formula stands for the code. The parts are built from their configurations as tensors without memory, and the code of
each stage runs on them once while its bytes and operations are counted (`footprint`): the encoders, the training loss
with its optimiser and average, the sampler's network, the decoder and the segmentor under steering.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from terrasynth.data.schema import LabelSchema
from terrasynth.data.world import WORLD_SCHEMA
from terrasynth.errors import TerraSynthError
from terrasynth.footprint import checkpoint, count, enter, flops_by_module, nbytes, pretend
from terrasynth.io import read_json
from terrasynth.models.autoencoder import PatchPCA
from terrasynth.models.control import CONTROL_SCHEMES
from terrasynth.models.mmdit import TEXT_BRANCH, Trainable
from terrasynth.models.text import word_encoder, word_tokenizer
from terrasynth.progress import track
from terrasynth.sampling.flow import FlowStep, guidance_terms
from terrasynth.systems.generate import steering_for
from terrasynth.systems.todsynth import (
    TODSynthPipeline,
    mask_channels,
    packaged_or,
    untrained_autoencoder,
    untrained_transformer,
)
from terrasynth.tasks.segmentation import Segmentor
from terrasynth.training.loop import Average, make_optimizer
from terrasynth.training.precision import autocast

if TYPE_CHECKING:
    from rich.console import Console

    from terrasynth.recipe import Precision, Recipe

__all__ = ["CARDS", "Plan", "Stage", "Stages", "Work", "make_plan", "show_plan"]

#: Memory of common cards, in GiB.
CARDS = (24.0, 80.0, 141.0)
#: Share of a card's memory that tensors can have: the rest is the driver's, the kernels' workspaces and gaps.
_USABLE = 0.92
_GIB = 2**30
#: Configurations of base models that are known without a download.
_PUBLISHED = Path(__file__).parent / "models" / "published"
_MODELS = {cls.__name__: cls for cls in (SD3Transformer2DModel, AutoencoderKL, PatchPCA, *CONTROL_SCHEMES.values())}
_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_T5_TOKENS = 256
#: Prompts that are encoded together, and images of a preview.
_PROMPTS, _PREVIEWS = 32, 4


@dataclass(frozen=True)
class Stage:
    """What one stage of a run needs at its peak, in bytes, and its operations.

    Attributes:
        name: what happens.
        weights: everything that lies on the card, trained or not.
        gradients: of the trained parameters.
        optimizer: its state.
        average: the moving average.
        activations: the rest: what the computation itself holds at the peak.
        flops: floating-point operations; of training, of one step.
    """

    name: str
    weights: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0
    flops: int = 0

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations

    def fits(self, card: float) -> bool:
        """Whether a card of so many GiB is large enough."""
        return self.peak <= _USABLE * card * _GIB


@dataclass(frozen=True)
class Plan:
    """What a recipe needs.

    Attributes:
        parameters: of every part: how many, and how many of them are trained.
        stages: in the order of a run.
        choices: the training step under other settings than the recipe's.
        parts: operations of one evaluation of the network by its parts.
        notes: what was assumed.
    """

    parameters: dict[str, tuple[int, int]]
    stages: list[Stage]
    choices: list[Stage]
    parts: dict[str, int]
    notes: list[str]


def make_plan(recipe: Recipe, base: Path, *, gpu: bool = True) -> Plan:
    """Count what every stage of a recipe needs.

    Args:
        recipe: its sizes, precisions and choices; no tile is read.
        base: folder that a relative label schema starts from.
        gpu: count as a GPU computes, else as this processor does.

    Raises:
        TerraSynthError: the base model's configuration is not here.
    """
    config, train = recipe.generator, recipe.generator.train
    others = [which for which in get_args(Trainable) if which != config.trainable]
    stages = Stages(recipe, base, gpu=gpu)
    with pretend(gpu=gpu), track(6 + len(others), "planning", unit="stages") as progress:

        def counted(name: str, stage: Work) -> Stage:
            progress.advance()
            return stage.count(name)

        pipeline = _pretended(stages, config.trainable)
        parameters = _parameters(pipeline)
        run = [counted("encode tiles and prompts", stages.encode(pipeline))]
        step = counted("training step", stages.train(pipeline, checkpointing=train.gradient_checkpointing))
        preview = counted("preview", stages.paint(pipeline, _PREVIEWS, text=False))
        run += [step, replace(preview, optimizer=step.optimizer, average=step.average)]
        other = stages.train(pipeline, checkpointing=not train.gradient_checkpointing)
        without = "without" if train.gradient_checkpointing else "with"
        choices = [counted(f"{without} gradient checkpointing", other)]
        for which in others:
            other = stages.train(_pretended(stages, which), checkpointing=True)
            choices.append(counted(f"trainable: {which}, with gradient checkpointing", other))
        pipeline = _pretended(stages, None)
        parts = flops_by_module(lambda: stages.evaluate(pipeline, 1), _part_of)
        images = recipe.sampling.batch_size
        run.append(counted(f"paint {images}", stages.paint(pipeline, images)))
        if recipe.steering.steps:
            with unset_fake_temporarily(), torch.device("meta"):
                segmentor = stages.segmentor()
            enter(segmentor)
            run.append(counted(f"paint {images}, steered", stages.paint(pipeline, images, segmentor)))
        return Plan(parameters, run, choices, parts, stages.notes)


def _pretended(stages: Stages, trainable: Trainable | None) -> TODSynthPipeline:
    with unset_fake_temporarily(), torch.device("meta"):
        pipeline = stages.build(trainable)
    for part in _modules(pipeline):
        enter(part)
    return pipeline


@dataclass(frozen=True)
class Work:
    """Something that a stage does, and what lies in memory meanwhile.

    Attributes:
        do: does it, as often as it is called.
        weights: of everything on the card.
        gradients: of trained parameters.
        optimizer: its state.
        average: the moving average.
        others: more tensors that are held.
        repeats: how often the operations of `do` are done in the stage, and those of `once` in addition.
    """

    do: Callable[[], object]
    weights: Sequence[Tensor]
    gradients: int = 0
    optimizer: Sequence[Tensor] = ()
    average: Sequence[Tensor] = ()
    others: Sequence[Tensor] = ()
    repeats: int = 1
    once: Sequence[tuple[Callable[[], object], int]] = ()

    def count(self, name: str) -> Stage:
        """Do it, and count."""
        held = [*self.weights, *self.optimizer, *self.average, *self.others]
        peak = flops = 0
        for function, times in ((self.do, self.repeats), *self.once):
            with count(held) as needs:
                function()
            peak, flops = max(peak, needs.peak), flops + times * needs.flops
        known = {"gradients": self.gradients, "optimizer": nbytes(self.optimizer), "average": nbytes(self.average)}
        weights = nbytes(self.weights)
        return Stage(name, weights, **known, activations=peak - weights - sum(known.values()), flops=flops)


class Stages:
    """A recipe's parts without their weights, and what its stages do with them.

    Parts are built on the default device; the stages compute where the parts are.
    """

    def __init__(self, recipe: Recipe, base: Path, *, gpu: bool) -> None:
        self.recipe, self.gpu = recipe, gpu
        self.notes: list[str] = []
        self.schema = self._schema(base)
        self.size = recipe.data.image_size

    def _schema(self, base: Path) -> LabelSchema:
        data = self.recipe.data
        if data.kind == "folder" and data.label_schema is not None:
            for folder in (base, data.root or base, Path(__file__).parent / "recipes"):
                if (folder / data.label_schema).is_file():
                    return LabelSchema.from_yaml(folder / data.label_schema)
        if data.kind == "folder":
            self.notes.append(f"the classes are not known, {WORLD_SCHEMA.num_classes} were assumed")
        return WORLD_SCHEMA

    def build(self, trainable: Trainable | None) -> TODSynthPipeline:
        """The recipe's pipeline as it is trained, or (None) as it is loaded for painting."""
        config = self.recipe.generator
        options: dict[str, Any] = {
            "label_schema": self.schema.to_dict(),
            "mask_coding": config.mask_coding,
            "mask_init": config.mask_init,
        }
        if config.base is None:
            vae = untrained_autoencoder(config).requires_grad_(False)
            text = word_encoder(word_tokenizer())
            transformer = untrained_transformer(
                config,
                self.size,
                text.config,
                mask_channels=mask_channels(self.schema, config.mask_coding, vae),
                latent_std=[1.0] * config.autoencoder.channels,
            )
            parts: dict[str, Any] = {"transformer": transformer, "vae": vae, "text_encoder": text}
        else:
            known = _configurations(config.base)
            if known.get("label_schema") is not None:
                options |= {name: known[name] for name in ("label_schema", "mask_coding")}
            parts = {name: _build(name, known[name]) if name in known else None for name in _PARTS}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=config.shift)
        pipeline = TODSynthPipeline(**parts, tokenizer=None, scheduler=scheduler, **options)
        if pipeline.config.mask_coding == "onehot":
            pipeline.adapt(self.schema)
        pipeline.prompts = partial(_prompts, pipeline)
        if trainable is not None:
            pipeline.transformer.set_trainable(trainable, lora_rank=config.lora_rank)
            for name in _PARTS[2:]:
                part = getattr(pipeline, name)
                if part is not None and config.base is not None and config.train.precision == "bf16":
                    part.to(torch.bfloat16)
        return pipeline

    def segmentor(self) -> Segmentor:
        """The recipe's segmentor, untrained."""
        config = self.recipe.segmentor.model_copy(update={"weights": None})
        return Segmentor.build(config, self.schema.num_classes).requires_grad_(False)

    def _autocast(self, pipeline: TODSynthPipeline, precision: Precision) -> torch.autocast:
        automatic = precision == "auto" and self.gpu  # today's cards all have bfloat16
        return autocast(pipeline.transformer.device, "bf16" if automatic else precision)

    def _masks(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.size, self.size, dtype=torch.long)

    def _latents(self, pipeline: TODSynthPipeline, batch: int) -> Tensor:
        side = self.size // pipeline.factor
        return torch.zeros(batch, pipeline.transformer.config.in_channels, side, side)

    def encode(self, pipeline: TODSynthPipeline) -> Work:
        """Tiles and prompts, once, with everything on the card."""
        batch = max(1, 2**20 // self.size**2)
        images, masks = torch.zeros(batch, 3, self.size, self.size), self._masks(batch)
        texts = [
            (encoder, torch.zeros(_PROMPTS, _length(encoder), dtype=torch.long))
            for name in _PARTS[2:]
            if (encoder := getattr(pipeline, name)) is not None
        ]

        @torch.no_grad()
        def encode() -> None:
            pipeline.encode_images(images)
            if pipeline.config.mask_coding == "grey":
                pipeline.encode_masks(masks)
            for encoder, tokens in texts:
                encoder(tokens)

        return Work(encode, _tensors(*_modules(pipeline)), others=[images, masks, *(tokens for _, tokens in texts)])

    def train(self, pipeline: TODSynthPipeline, *, checkpointing: bool) -> Work:
        """A step of the training, as `training.loop` takes it."""
        config, model = self.recipe.generator.train, pipeline.transformer
        if checkpointing:
            model.enable_gradient_checkpointing(checkpoint)
        else:
            model.disable_gradient_checkpointing()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(model, config)
        average = Average(model, config.ema_decay) if config.ema_decay else None
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        optimizer.step()  # its state is there from the second step on
        kept = gradients if config.accumulate > 1 else []  # of the micro-batches before
        if not kept:
            optimizer.zero_grad()
        batch = self._batch(pipeline, config.batch_size)

        def micro_batch() -> None:
            with self._autocast(pipeline, config.precision):
                loss = pipeline.training_loss(batch) / config.accumulate
            loss.backward()

        def step() -> None:
            micro_batch()
            nn.utils.clip_grad_norm_(trained, config.clip_norm or 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update(0)

        return Work(
            step,
            _tensors(model, pipeline.vae),
            gradients=nbytes(gradients),
            optimizer=[value for state in optimizer.state.values() for value in state.values()],
            average=[] if average is None else list(average.values.values()),
            others=[*kept, *batch.values()],
            repeats=config.accumulate,
        )

    def _batch(self, pipeline: TODSynthPipeline, size: int) -> dict[str, Tensor]:
        masks = self._masks(size)
        embeds, pooled = pipeline.prompts([""] * size)
        with unset_fake_temporarily():
            seeds = torch.arange(size)  # real, because they are read
        batch = {"latents": self._latents(pipeline, size), "mask": masks.byte(), "seed": seeds}
        if pipeline.config.mask_coding == "grey":
            batch["mask_latents"] = pipeline.encode_masks(masks)
            pipeline.null_mask_latents(masks[:1])
        return {**batch, "prompt_embeds": embeds, "pooled": pooled}

    def evaluate(self, pipeline: TODSynthPipeline, images: int) -> None:
        """The velocity, as the sampler asks for it in one step."""
        sampling = self.recipe.sampling
        rows = images * len(guidance_terms(sampling.text_scale, sampling.mask_scale))
        embeds, pooled = pipeline.prompts([""] * rows)
        mask_latents = pipeline.null_mask_latents(self._masks(1)).repeat(rows, 1, 1, 1)
        with torch.no_grad(), self._autocast(pipeline, sampling.precision):
            pipeline.transformer(
                hidden_states=self._latents(pipeline, rows),
                timestep=torch.zeros(rows),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                mask_latents=mask_latents,
            )

    def paint(
        self, pipeline: TODSynthPipeline, images: int, segmentor: Segmentor | None = None, *, text: bool = True
    ) -> Work:
        """A batch of images: all steps, those that the segmentor steers, and the decoding.

        `text` says whether the text encoders are on the card.
        """
        sampling, config = self.recipe.sampling, self.recipe.steering
        velocity, latents, masks = *(self._latents(pipeline, images) for _ in range(2)), self._masks(images)
        pipeline.null_mask_latents(masks[:1])

        def decode() -> None:
            with torch.no_grad(), self._autocast(pipeline, sampling.precision):
                pipeline.decode(latents)

        once: list[tuple[Callable[[], object], int]] = [(decode, 1)]
        modules = _modules(pipeline) if text else [pipeline.transformer, pipeline.vae]
        if segmentor is not None:
            modules.append(segmentor)
            steering = steering_for(config, segmentor.loss)(masks)

            def steer() -> None:
                with torch.no_grad(), self._autocast(pipeline, sampling.precision):
                    steering(velocity, latents, FlowStep(config.start, sampling.steps, sigma=1.0), pipeline.decode)

            once.append((steer, config.steps))
        others = [velocity, latents, masks]
        evaluate = partial(self.evaluate, pipeline, images)
        return Work(evaluate, _tensors(*modules), others=others, repeats=sampling.steps, once=once)


def _prompts(pipeline: TODSynthPipeline, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings of prompts, all zero."""
    sizes = pipeline.transformer.config
    encoders = [getattr(pipeline, name) for name in _PARTS[2:]]
    # The tokens of the CLIP encoders share their places; T5's follow.
    tokens = _length(encoders[0]) + (0 if encoders[2] is None else _length(encoders[2]))
    embeds = torch.zeros(len(texts), tokens, sizes.joint_attention_dim)
    return embeds, torch.zeros(len(texts), sizes.pooled_projection_dim)


def _length(encoder: nn.Module) -> int:
    """Tokens that a text encoder reads."""
    return _T5_TOKENS if isinstance(encoder, T5EncoderModel) else int(encoder.config.max_position_embeddings)


def show_plan(recipe: Recipe, plan: Plan, cards: Sequence[float], speed: tuple[str, float], console: Console) -> None:
    """Print a plan.

    Args:
        recipe: what was planned.
        plan: from `make_plan`.
        cards: sizes of cards in GiB.
        speed: where matrix products were timed, and their operations a second.
        console: where to.
    """
    generator, train = recipe.generator, recipe.generator.train
    about = (
        f"{recipe.name}: {generator.base or 'from scratch'}",
        f"{recipe.data.image_size} px",
        f"{train.batch_size} x {train.accumulate} samples a step",
        train.precision,
        f"trainable: {generator.trainable}",
        f"gradient checkpointing {'on' if train.gradient_checkpointing else 'off'}",
    )
    console.print(", ".join(about), highlight=False)
    table = _table("parameters", "millions", "trained")
    for part, (total, trained) in plan.parameters.items():
        table.add_row(part, f"{total / 1e6:,.1f}", f"{trained / 1e6:,.1f}" if trained else "")
    console.print("", table)

    columns = ("weights", "gradients", "optimiser", "average", "the rest", "all")
    table = _table("GiB at the peak", *columns, *(f"{card:g} GiB" for card in cards))
    for heading, stages in (("as the recipe has it", plan.stages), ("the training step otherwise", plan.choices)):
        table.add_row(Text(heading, "bold"))
        for stage in stages:
            parts = (stage.weights, stage.gradients, stage.optimizer, stage.average, stage.activations, stage.peak)
            fits = (Text("fits", "green") if stage.fits(card) else Text("no", "red") for card in cards)
            table.add_row(f"  {stage.name}", *(f"{part / _GIB:,.1f}" if part else "" for part in parts), *fits)
    console.print("", table)

    where, rate = speed
    table = _table("operations", "TFLOP", "seconds, at least")
    for stage in plan.stages:
        if stage.name == "training step" or stage.name.startswith("paint"):
            table.add_row(stage.name, f"{stage.flops / 1e12:,.2f}", f"{stage.flops / rate:,.2f}")
    console.print("", table, "")
    step = next(stage for stage in plan.stages if stage.name == "training step")
    shares = sorted(plan.parts.items(), key=lambda part: -part[1])
    about = (
        "Of the network: " + ", ".join(f"{part} {flops / sum(plan.parts.values()):.0%}" for part, flops in shares),
        f"At least: at the {rate / 1e12:,.2f} TFLOP/s of matrix products on {where}. All {train.steps:,} steps: "
        f"{train.steps * step.flops / rate / 3600:,.1f} hours",
        *plan.notes,
        f"Fits: {_USABLE:.0%} of a card is taken to be there for tensors; kernels and the driver have the rest",
        "Tiles and prompts are encoded once; then the text encoders leave the card until painting",
        "Optimisers of 8 bits are not supported",
    )
    console.print("\n".join(f"{line}." for line in about), highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _configurations(base: str) -> dict[str, Any]:
    """The configurations of a base model's parts, by their names."""
    published = _PUBLISHED / f"{base.rpartition('/')[2]}.json"
    if base.startswith("stabilityai/") and published.is_file():
        return dict(json.loads(published.read_text(encoding="utf-8")))
    folder = Path(packaged_or(base))
    if not (folder / "model_index.json").is_file():
        raise TerraSynthError(
            "the configuration of the base model is not here",
            path=base,
            found="a name on a hub",
            expected=f"stabilityai/{', '.join(sorted(path.stem for path in _PUBLISHED.glob('*.json')))}, or a folder",
            fix="download the base model and give its folder",
        )
    index = read_json(folder / "model_index.json")
    parts = {name: folder / name / "config.json" for name in _PARTS}
    about = {name: value for name, value in index.items() if name not in _PARTS}
    return about | {name: read_json(path) for name, path in parts.items() if path.is_file()}


def _build(name: str, configuration: dict[str, Any]) -> nn.Module:
    if name == "text_encoder_3":
        return T5EncoderModel(T5Config(**configuration)).requires_grad_(False)
    if name.startswith("text_encoder"):
        return CLIPTextModelWithProjection(CLIPTextConfig(**configuration)).requires_grad_(False)
    model = _MODELS[configuration["_class_name"]].from_config(configuration)
    return model.requires_grad_(name == "transformer")


def _modules(pipeline: TODSynthPipeline) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def _tensors(*modules: nn.Module) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _parameters(pipeline: TODSynthPipeline) -> dict[str, tuple[int, int]]:
    """How many parameters every part has, and how many of them are trained."""
    counts: dict[str, tuple[int, int]] = {}

    def add(part: str, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            total, trained = counts.get(part, (0, 0))
            counts[part] = (total + p.numel(), trained + p.numel() * p.requires_grad)

    for name, p in pipeline.transformer.named_parameters():
        add(f"transformer, {_branch(name)}", [p])
    add("autoencoder", [*pipeline.vae.parameters(), *(nn.Parameter(b, False) for b in pipeline.vae.buffers())])
    for name in _PARTS[2:]:
        if getattr(pipeline, name) is not None:
            add("text encoders", getattr(pipeline, name).parameters())
    return counts


def _branch(parameter: str) -> str:
    if parameter.startswith("mask_") or ".mask." in parameter:
        return "mask"
    return "text" if any(part in f".{parameter}." or parameter.startswith(part) for part in TEXT_BRANCH) else "image"


def _part_of(module: str) -> str:
    """The part of the network that a module's operations belong to."""
    _, _, name = module.partition(".")
    last = name.rpartition(".")[2]
    if not name or (last.isdigit() and name.count(".") == 1):
        return "joint attention"  # what a block does itself
    return _branch(f"{name}.")
