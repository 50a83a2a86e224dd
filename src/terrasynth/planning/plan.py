"""What a recipe needs of a card: `terrasynth doctor --plan RECIPE`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from rich.table import Table
from rich.text import Text
from torch._subclasses.fake_tensor import unset_fake_temporarily

from terrasynth.data.world import WORLD_SCHEMA
from terrasynth.models.mmdit import Trainable
from terrasynth.planning import diffusion
from terrasynth.planning.footprint import enter, flops_by_module, pretend, seconds
from terrasynth.planning.parts import branch, label_schema, modules, parameters, pipeline_of, segmentor_of
from terrasynth.planning.stages import Stage, Work, encode, paint, prompts, train
from terrasynth.progress import duration, track
from terrasynth.systems.idgbr import IDGBRPipeline
from terrasynth.systems.pairs import PREVIEW

if TYPE_CHECKING:
    from rich.console import Console

    from terrasynth.data.schema import LabelSchema
    from terrasynth.planning.cards import Card
    from terrasynth.planning.diffusion import Diffuses
    from terrasynth.recipe import Recipe, TrainConfig
    from terrasynth.systems.todsynth import TODSynthPipeline

__all__ = ["Plan", "make_plan", "show_plan"]

_GIB = 2**30
#: Images of a preview.
_PREVIEWS = 4
#: Windows that `terrasynth refine` computes together, and its steps.
_WINDOWS, _REFINING = 8, 4


@dataclass(frozen=True)
class Plan:
    """What a recipe needs.

    Attributes:
        about: what it trains, in words.
        steps: how many optimiser steps, by the name of the stage that is one.
        parameters: of every part: how many, and how many of them are trained.
        stages: in the order of a run.
        choices: the training step under other settings than the recipe's.
        parts: operations of one evaluation of the network by its parts; empty if they were not counted.
        notes: what was assumed.
    """

    about: list[str]
    steps: dict[str, int]
    parameters: dict[str, tuple[int, int]]
    stages: list[Stage]
    choices: list[Stage]
    parts: dict[str, int]
    notes: list[str]


def make_plan(
    recipe: Recipe, base: Path, *, gpu: bool = True, what: Literal["generator", "refiner", "pairs"] = "generator"
) -> Plan:
    """Count what every stage of a recipe needs.

    The parts are built from their configurations as tensors without memory, and the code of each stage runs on them.

    Args:
        recipe: its sizes, precisions and choices; no tile is read.
        base: folder that a relative label schema starts from.
        gpu: count as a GPU computes, else as this processor does.
        what: is trained, as `terrasynth train --what`.

    Raises:
        TerraSynthError: the base model's configuration is not here.
    """
    notes: list[str] = []
    schema = label_schema(recipe, base)
    if schema is None:
        schema = WORLD_SCHEMA
        notes.append(f"The classes are not known here, {schema.num_classes} were assumed")
    if what != "generator":
        return _plan_diffusion(recipe, schema, what, notes, gpu=gpu)
    config = recipe.generator
    every = list(get_args(Trainable))  # from most to least
    others = every[every.index(config.trainable) + 1 :]
    if importlib.util.find_spec("peft") is None:
        others = [which for which in others if which != "lora"]
    steered = recipe.steering.steps > 0

    def pipeline_for(trainable: Trainable | None) -> TODSynthPipeline:
        with unset_fake_temporarily(), torch.device("meta"):
            pipeline = pipeline_of(recipe, schema, trainable, gpu=gpu)
        for part in modules(pipeline):
            enter(part)
        return pipeline

    count = 6 + len(others) + steered + (not config.train.offload_optimizer)
    with pretend(gpu=gpu), track(count, "planning", unit="stages") as progress:

        def counted(name: str, work: Work) -> Stage:
            stage = work.count(name)
            progress.advance()
            return stage

        pipeline, images = pipeline_for(config.trainable), recipe.sampling.batch_size
        counts, step = parameters(pipeline), partial(train, recipe, gpu=gpu)
        stages = [counted("encode tiles, prompts", encode(recipe, pipeline))]
        on = config.train.gradient_checkpointing
        stages.append(counted("training step", step(pipeline, checkpointing=on)))
        notes += _offloaded(config.train, stages[-1])
        # In the precision of the training, as its weights are.
        seen = recipe.sampling.model_copy(update={"precision": config.train.precision})
        shown, looks = recipe.model_copy(update={"sampling": seen}), recipe.generator.reference is not None
        preview = counted("preview", paint(shown, pipeline, _PREVIEWS, gpu=gpu, looks=looks))
        stages.append(replace(preview, optimizer=stages[-1].optimizer, average=stages[-1].average))
        other = step(pipeline, checkpointing=not on)
        choices = [counted(f"{'without' if on else 'with'} gradient checkpointing", other)]
        if not config.train.offload_optimizer:
            other = step(pipeline, checkpointing=True, offload=True)
            choices.append(counted("checkpointing, offload_optimizer", other))
        for which in others:
            other = step(pipeline_for(which), checkpointing=True)
            choices.append(counted(f"checkpointing, trainable: {which}", other))
        pipeline = pipeline_for(None)
        stages.append(counted("encode prompts to paint", prompts(pipeline)))
        painting = paint(recipe, pipeline, images, gpu=gpu)
        with painting.around():
            parts = flops_by_module(painting.parts[0][0], _part_of)
        stages.append(counted(f"paint {images}", painting))
        if steered:
            with unset_fake_temporarily(), torch.device("meta"):
                segmentor = segmentor_of(recipe, schema)
            enter(segmentor)
            work = paint(recipe, pipeline, images, segmentor, gpu=gpu)
            stages.append(counted(f"paint {images}, steered", work))
        notes.append("Tiles and prompts are encoded once; then the text encoders leave the card until painting")
        about = [
            f"trainable: {config.trainable}",
            f"gradient checkpointing {'on' if on else 'off'}",
        ]
        about = _about(recipe, config.base, recipe.data.image_size, config.train) + about
        return Plan(about, {"training step": config.train.steps}, counts, stages, choices, parts, notes)


def _plan_diffusion(
    recipe: Recipe, schema: LabelSchema, what: Literal["refiner", "pairs"], notes: list[str], *, gpu: bool
) -> Plan:
    """The plan of a refiner or a painter of pairs, of which everything is on the card all the time."""
    plan = _plan_stage(recipe, schema, what, gpu=gpu)
    if what == "pairs" and recipe.pairs.two_stages:
        second = _plan_stage(recipe, schema, "upscaler", gpu=gpu)
        both = plan.stages[-1].weights + second.stages[-1].weights  # where pairs are painted
        for each in (plan, second):
            each.stages[-1] = replace(each.stages[-1], weights=both)
        plan = Plan(
            [*plan.about, "painted at half the size, then enlarged (2x)"],
            plan.steps | {f"{name} (2x)": steps for name, steps in second.steps.items()},
            plan.parameters | {f"{name} (2x)": counts for name, counts in second.parameters.items()},
            plan.stages + [replace(stage, name=f"{stage.name} (2x)") for stage in second.stages],
            plan.choices + [replace(stage, name=f"{stage.name} (2x)") for stage in second.choices],
            {},
            [*plan.notes, *(f"2x: {note}" for note in second.notes)],
        )
    return replace(plan, notes=notes + plan.notes)


def _plan_stage(recipe: Recipe, schema: LabelSchema, what: Diffuses, *, gpu: bool) -> Plan:
    """The plan of one training and its use."""
    with pretend(gpu=gpu), track(4, "planning", unit="stages") as progress:
        pipeline = diffusion.pretended(recipe, schema, what)
        config = diffusion.training(recipe, pipeline)
        notes: list[str] = []

        def counted(name: str, work: Work) -> Stage:
            stage = work.count(name)
            progress.advance()
            return stage

        stages = [counted("training step", diffusion.train(recipe, pipeline, gpu=gpu))]
        choices = []
        if not config.offload_optimizer:
            choices = [counted("offload_optimizer", diffusion.train(recipe, pipeline, gpu=gpu, offload=True))]
        notes += _offloaded(config, stages[0])
        if isinstance(pipeline, IDGBRPipeline):
            base, steps, count = recipe.refiner.base, _REFINING, _WINDOWS
            shown = diffusion.refine(pipeline, _PREVIEWS, steps, config.precision, gpu=gpu)
            used, name = diffusion.refine(pipeline, count, steps, "auto", gpu=gpu), f"refine {count} windows"
            if pipeline.config.each_class:
                notes.append("A window is refined once for every class in it; told is what one of them takes")
        else:
            base, sampling = recipe.pairs.base, recipe.pairs.sampling
            count, precision = sampling.batch_size, sampling.precision
            shown = diffusion.paint(recipe, pipeline, *PREVIEW, config.precision, gpu=gpu)
            used, name = diffusion.paint(recipe, pipeline, count, sampling.steps, precision, gpu=gpu), f"paint {count}"
        preview = replace(counted("preview", shown), optimizer=stages[0].optimizer, average=stages[0].average)
        stages += [preview, counted(name, used)]
        about = _about(recipe, base, int(pipeline.config.image_size), config)
        return Plan(about, {"training step": config.steps}, diffusion.parameters(pipeline), stages, choices, {}, notes)


def _about(recipe: Recipe, base: str | None, size: int, train: TrainConfig) -> list[str]:
    samples = f"{train.batch_size} x {train.accumulate} samples a step"
    return [f"{recipe.name}: {base or 'from scratch'}", f"{size} px", samples, train.precision]


def _offloaded(config: TrainConfig, step: Stage) -> list[str]:
    if not config.offload_optimizer:
        return []
    return [
        f"AdamW's moments, with weights and gradients, have {4 * step.gradients / _GIB:,.1f} GiB of main memory; the "
        "time of its update there is not counted"
    ]


def _part_of(module: str) -> str:
    """The part of the network that a module's operations belong to."""
    _, _, name = module.partition(".")
    if not name or (name.rpartition(".")[2].isdigit() and name.count(".") == 1):
        return "joint attention"  # what a block does itself
    return branch(name)


def show_plan(plan: Plan, cards: Sequence[Card], console: Console) -> None:
    """Print a plan, and whether it fits these cards."""
    console.print(", ".join(plan.about), highlight=False)
    table = _table("parameters", "millions", "trained")
    for part, (total, trained) in plan.parameters.items():
        table.add_row(part, f"{total / 1e6:,.1f}", f"{trained / 1e6:,.1f}" if trained else "")
    console.print("", table)

    headed = (("as the recipe has it", plan.stages), ("the training step otherwise", plan.choices))
    table = _table("GiB at the peak", "weights", "grads", "optim.", "EMA", "rest", "all")
    for heading, stages in headed:
        table.add_row(Text(heading, "bold"))
        for stage in stages:
            sizes = (stage.weights, stage.gradients, stage.optimizer, stage.average, stage.activations, stage.peak)
            table.add_row(f"  {stage.name}", *(f"{size / _GIB:,.2f}" if size else "" for size in sizes))
    console.print("", table)

    table = _table("least time, where it fits", "TFLOP", *(card.name for card in cards))
    for heading, stages in headed:
        table.add_row(Text(heading, "bold"))
        for stage in stages:
            cells = (_cell(stage, card) for card in cards)
            table.add_row(f"  {stage.name}", f"{stage.flops / 1e12:,.2f}", *cells)
    console.print("", table, "")
    shares = sorted(plan.parts.items(), key=lambda part: -part[1])
    said = ", ".join(f"{part} {flops / sum(plan.parts.values()):.0%}" for part, flops in shares)
    lines = [f"Of the network's operations: {said}"] if said else []
    for step in (stage for stage in plan.stages if stage.name in plan.steps):
        steps = plan.steps[step.name]
        for card in cards:
            if card.speed is not None and step.peak <= card.memory:
                time = duration(steps * seconds(step.operations, card.speed))
                speed = "the speed measured just now" if card.measured else "the data sheet's speed"
                which = step.name.removeprefix("training step")
                lines.append(f"All {steps:,} steps{which} on {card.name}, at {speed}, so at least: {time}")
    lines += [
        *plan.notes,
        "Fits: in 92 % of the memory; drivers, kernels and gaps have the rest",
    ]
    console.print("\n".join(f"{line}." for line in lines), highlight=False)


def _cell(stage: Stage, card: Card) -> Text:
    if stage.peak > card.memory:
        return Text("too large", "red")
    return Text("fits" if card.speed is None else f"{seconds(stage.operations, card.speed):,.3g} s", "green")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    return table
