"""What a recipe needs of a card, told before anything is downloaded or trained: `terrasynth doctor --plan RECIPE`.

No formula stands for the code. The parts are built from their configurations as tensors without memory, and the code of
each stage runs on them once while its bytes and operations are counted (`footprint`): the encoders, the training loss
with its optimiser and average, the sampler's network, the decoder and the segmentor under steering.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
from terrasynth.footprint import Needs, checkpoint, count, enter, flops_by_module, nbytes, pretend
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

__all__ = ["CARDS", "Plan", "Stage", "make_plan", "show_plan"]

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
        gradients: of the trained parameters, which they have at the peak or soon.
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
        work: operations of one evaluation of the network by its parts.
        notes: what was assumed.
    """

    parameters: dict[str, tuple[int, int]]
    stages: list[Stage]
    choices: list[Stage]
    work: dict[str, int]
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
    return _Planner(recipe, base, gpu).plan()


class _Planner:
    """The pretended parts of a recipe, and its stages on them."""

    def __init__(self, recipe: Recipe, base: Path, gpu: bool) -> None:
        self.recipe, self.gpu = recipe, gpu
        self.notes: list[str] = []
        self.schema = self._schema(base)
        self.size = recipe.data.image_size

    def plan(self) -> Plan:
        config, train = self.recipe.generator, self.recipe.generator.train
        others = [which for which in get_args(Trainable) if which != config.trainable]
        steers = self.recipe.steering.steps > 0
        with pretend(gpu=self.gpu), track(5 + len(others) + steers, "planning", unit="stages") as progress:

            def done(stage: Stage, **changes: Any) -> Stage:
                progress.advance()
                return replace(stage, **changes)

            pipeline = self._pipeline(config.trainable)
            parameters = _parameters(pipeline)
            encode = done(self._encode(pipeline))
            step = self._train(pipeline, checkpointing=train.gradient_checkpointing)
            stages = [encode, done(step), done(self._preview(pipeline, step))]
            other = self._train(pipeline, checkpointing=not train.gradient_checkpointing)
            without = "without" if train.gradient_checkpointing else "with"
            choices = [done(other, name=f"{without} gradient checkpointing")]
            for which in others:
                pipeline = self._pipeline(which)
                other = self._train(pipeline, checkpointing=True)
                choices.append(done(other, name=f"trainable: {which}, with gradient checkpointing"))
            pipeline = self._pipeline(None)
            work = flops_by_module(lambda: self._network(pipeline, 1), _part_of)
            stages.append(done(self._paint(pipeline)))
            if steers:
                stages.append(done(self._steer(pipeline)))
        return Plan(parameters, stages, choices, work, self.notes)

    # Parts

    def _schema(self, base: Path) -> LabelSchema:
        data = self.recipe.data
        if data.kind == "folder" and data.label_schema is not None:
            for folder in (base, data.root or base, Path(__file__).parent / "recipes"):
                if (folder / data.label_schema).is_file():
                    return LabelSchema.from_yaml(folder / data.label_schema)
        if data.kind == "folder":
            self.notes.append(f"the classes are not known: {WORLD_SCHEMA.num_classes} were assumed")
        return WORLD_SCHEMA

    def _pipeline(self, trainable: Trainable | None) -> TODSynthPipeline:
        """The recipe's pipeline for a training, or (None) as it is loaded for painting."""
        with unset_fake_temporarily(), torch.device("meta"):
            pipeline = self._build(trainable)
        for part in _modules(pipeline):
            enter(part)
        pipeline.prompts = self._prompts(pipeline)
        return pipeline

    def _build(self, trainable: Trainable | None) -> TODSynthPipeline:
        config = self.recipe.generator
        parts: dict[str, Any] = {}
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
            parts = {"transformer": transformer, "vae": vae, "text_encoder": text}
        else:
            known = _configurations(config.base)
            if known.get("label_schema") is not None:
                options |= {name: known[name] for name in ("label_schema", "mask_coding")}
            for name in _PARTS:
                parts[name] = _build(name, known[name]) if name in known else None
        pipeline = TODSynthPipeline(
            **parts, tokenizer=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift), **options
        )
        if pipeline.config.mask_coding == "onehot":
            pipeline.adapt(self.schema)
        if trainable is None:
            return pipeline
        pipeline.transformer.set_trainable(trainable, lora_rank=config.lora_rank)
        for name in _PARTS[2:]:
            part = getattr(pipeline, name)
            if part is not None and config.base is not None and config.train.precision == "bf16":
                part.to(torch.bfloat16)
        return pipeline

    def _prompts(self, pipeline: TODSynthPipeline) -> Any:
        sizes = pipeline.transformer.config
        tokens = pipeline.text_encoder.config.max_position_embeddings
        tokens += _T5_TOKENS if pipeline.text_encoder_3 is not None else 0

        def prompts(texts: list[str]) -> tuple[Tensor, Tensor]:
            embeds = torch.zeros(len(texts), tokens, sizes.joint_attention_dim)
            return embeds, torch.zeros(len(texts), sizes.pooled_projection_dim)

        return prompts

    def _precision(self, precision: Precision) -> torch.autocast:
        automatic = precision == "auto" and self.gpu  # today's cards all have bfloat16
        return autocast(torch.device("cpu"), "bf16" if automatic else precision)

    # Stages

    def _masks(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.size, self.size, dtype=torch.long)

    @torch.no_grad()
    def _encode(self, pipeline: TODSynthPipeline) -> Stage:
        """Tiles and prompts, once."""
        held = _tensors(*_modules(pipeline))
        batch = max(1, 2**20 // self.size**2)
        with count(held) as needs:
            pipeline.encode_images(torch.zeros(batch, 3, self.size, self.size))
            if pipeline.config.mask_coding == "grey":
                pipeline.encode_masks(self._masks(batch))
            for name in _PARTS[2:]:
                encoder = getattr(pipeline, name)
                if encoder is not None:
                    length = _T5_TOKENS if name == "text_encoder_3" else encoder.config.max_position_embeddings
                    encoder(torch.zeros(_PROMPTS, length, dtype=torch.long))
        return _stage("encode tiles and prompts, once", needs, held)

    def _train(self, pipeline: TODSynthPipeline, *, checkpointing: bool) -> Stage:
        """One step of the training loop."""
        config, model = self.recipe.generator.train, pipeline.transformer
        if checkpointing:
            model.enable_gradient_checkpointing(checkpoint)
        else:
            model.disable_gradient_checkpointing()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, average = make_optimizer(model, config), Average(model, config.ema_decay)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = nbytes(parameter.grad for parameter in trained if parameter.grad is not None)
        optimizer.step()  # its state is there from the second step on
        if config.accumulate == 1:
            optimizer.zero_grad()
        batch = self._batch(pipeline, config.batch_size)
        pipeline.training_loss(batch)  # encodes the null mask
        resident = _tensors(model, pipeline.vae)
        states = [value for state in optimizer.state.values() for value in state.values()]
        averages = list(average.values.values()) if config.ema_decay else []
        grads = [parameter.grad for parameter in trained if parameter.grad is not None]
        with count([*resident, *states, *averages, *grads, *batch.values()]) as needs:
            with self._precision(config.precision):
                loss = pipeline.training_loss(batch) / config.accumulate
            loss.backward()
            nn.utils.clip_grad_norm_(trained, config.clip_norm or 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if averages:
                average.update(0)
        stage = _stage(
            "training step", needs, resident, gradients=gradients, optimizer=nbytes(states), average=nbytes(averages)
        )
        return replace(stage, flops=config.accumulate * stage.flops)

    def _batch(self, pipeline: TODSynthPipeline, size: int) -> dict[str, Tensor]:
        masks = self._masks(size)
        embeds, pooled = pipeline.prompts([""] * size)
        with unset_fake_temporarily():
            seeds = torch.arange(size)  # real, because they are read
        batch = {
            "latents": self._latents(pipeline, size),
            "mask": masks.byte(),
            "prompt_embeds": embeds,
            "pooled": pooled,
            "seed": seeds,
        }
        if pipeline.config.mask_coding == "grey":
            batch["mask_latents"] = pipeline.encode_masks(masks)
        return batch

    def _latents(self, pipeline: TODSynthPipeline, batch: int) -> Tensor:
        side = self.size // pipeline.factor
        return torch.zeros(batch, pipeline.transformer.config.in_channels, side, side)

    @torch.no_grad()
    def _network(self, pipeline: TODSynthPipeline, batch: int) -> None:
        """One evaluation of the velocity, as the sampler asks for it."""
        sampling = self.recipe.sampling
        rows = batch * len(guidance_terms(sampling.text_scale, sampling.mask_scale))
        embeds, pooled = pipeline.prompts([""] * rows)
        with self._precision(sampling.precision):
            pipeline.transformer(
                hidden_states=self._latents(pipeline, rows),
                timestep=torch.zeros(rows),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                mask_latents=pipeline.encode_masks(self._masks(rows)),
            )

    @torch.no_grad()
    def _decode(self, pipeline: TODSynthPipeline, batch: int) -> None:
        with self._precision(self.recipe.sampling.precision):
            pipeline.decode(self._latents(pipeline, batch))

    def _preview(self, pipeline: TODSynthPipeline, step: Stage) -> Stage:
        """Painted in the middle of the training."""
        held = _tensors(pipeline.transformer, pipeline.vae)
        with count(held) as needs:
            self._network(pipeline, _PREVIEWS)
            self._decode(pipeline, _PREVIEWS)
        return replace(
            _stage("preview", needs, held), optimizer=step.optimizer, average=step.average, flops=0
        )

    def _paint(self, pipeline: TODSynthPipeline) -> Stage:
        sampling, held = self.recipe.sampling, _tensors(*_modules(pipeline))
        with count(held) as network:
            self._network(pipeline, sampling.batch_size)
        with count(held) as decoder:
            self._decode(pipeline, sampling.batch_size)
        needs = max(network, decoder, key=lambda needs: needs.peak)
        flops = sampling.steps * network.flops + decoder.flops
        return replace(_stage(f"paint {sampling.batch_size}", needs, held), flops=flops)

    def _steer(self, pipeline: TODSynthPipeline) -> Stage:
        """Painting in which the first steps are rectified."""
        sampling, config = self.recipe.sampling, self.recipe.segmentor.model_copy(update={"weights": None})
        with unset_fake_temporarily(), torch.device("meta"):
            segmentor = Segmentor.build(config, self.schema.num_classes).requires_grad_(False)
        enter(segmentor)
        plain, held = self._paint(pipeline), _tensors(*_modules(pipeline), segmentor)
        steering = steering_for(self.recipe.steering, segmentor.loss)(self._masks(sampling.batch_size))
        velocity, latents = (self._latents(pipeline, sampling.batch_size) for _ in range(2))
        start = FlowStep(self.recipe.steering.start, sampling.steps, sigma=1.0)
        with count(held) as needs, torch.no_grad(), self._precision(sampling.precision):
            steering(velocity, latents, start, pipeline.decode)
        stage = _stage(f"paint {sampling.batch_size}, steered", needs, held)
        least = plain.activations - stage.activations
        flops = plain.flops + self.recipe.steering.steps * needs.flops
        return replace(stage, activations=stage.activations + max(0, least), flops=flops)


def show_plan(recipe: Recipe, plan: Plan, cards: Sequence[float], speed: tuple[str, float] | None, console: Console) -> None:
    """Print a plan.

    Args:
        recipe: what was planned.
        plan: from `make_plan`.
        cards: sizes of cards in GiB.
        speed: where matrix products were timed in the training's precision, and their operations a second.
        console: where to.
    """
    generator, train = recipe.generator, recipe.generator.train
    console.print(
        f"{recipe.name}: {generator.base or 'from scratch'}, {recipe.data.image_size} px, {train.batch_size} x "
        f"{train.accumulate} samples a step, {train.precision}, trainable: {generator.trainable}, gradient checkpointing "
        f"{'on' if train.gradient_checkpointing else 'off'}\n"
    )
    table = Table("parameters", "millions", "trained", box=None, pad_edge=False)
    for part, (total, trained) in plan.parameters.items():
        table.add_row(part, f"{total / 1e6:,.1f}", f"{trained / 1e6:,.1f}" if trained else "")
    _print(table, console)

    table = Table("GiB at the peak", "weights", "gradients", "optimiser", "average", "the rest", "all", box=None, pad_edge=False)
    for card in cards:
        table.add_column(f"{card:g}")
    for heading, stages in (("as the recipe has it", plan.stages), ("training step otherwise", plan.choices)):
        table.add_row(Text(heading, "bold"))
        for stage in stages:
            parts = (stage.weights, stage.gradients, stage.optimizer, stage.average, stage.activations, stage.peak)
            fits = (Text("fits", "green") if stage.fits(card) else Text("no", "red") for card in cards)
            table.add_row(f"  {stage.name}", *(f"{part / _GIB:,.1f}" if part else "" for part in parts), *fits)
    _print(table, console)

    step = next(stage for stage in plan.stages if stage.name == "training step")
    parts, total = sorted(plan.work.items(), key=lambda part: -part[1]), sum(plan.work.values())
    shares = ", ".join(f"{part} {flops / total:.0%}" for part, flops in parts)
    table = Table("operations", "TFLOP", box=None, pad_edge=False, show_edge=False)
    work = {f"a training step ({shares})": step.flops}
    work |= {f"{stage.name} images": stage.flops for stage in plan.stages if stage.name.startswith("paint")}
    if speed is not None:
        table.add_column(f"seconds, at least, at the {speed[1] / 1e12:,.2f} TFLOP/s of {speed[0]}")
    for name, flops in work.items():
        times = [] if speed is None else [f"{flops / speed[1]:,.2f}"]
        table.add_row(name, f"{flops / 1e12:,.2f}", *times)
    _print(table, console)
    if speed is not None:
        hours = train.steps * step.flops / speed[1] / 3600
        console.print(f"All {train.steps:,} steps: at least {hours:,.1f} hours on one such device.")
    for note in plan.notes:
        console.print(f"Note: {note}.")
    console.print(
        f"Not counted: what kernels and the driver take; a card is taken to have {_USABLE:.0%} of its memory for tensors. "
        "Prompts and tiles are encoded once; the text encoders then leave the card until painting. Optimisers of 8 bits "
        "are not supported."
    )


def _print(table: Table, console: Console) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print()


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


def _stage(name: str, needs: Needs, resident: Iterable[Tensor], **others: int) -> Stage:
    weights = nbytes(resident)
    return Stage(name, weights, **others, activations=needs.peak - weights - sum(others.values()), flops=needs.flops)


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
