"""What a recipe needs of a card: `terrasynth doctor --plan RECIPE`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from rich.table import Table
from rich.text import Text
from torch._subclasses.fake_tensor import unset_fake_temporarily

from terrasynth.data.world import WORLD_SCHEMA
from terrasynth.models.mmdit import Trainable
from terrasynth.planning.footprint import enter, flops_by_module, pretend, seconds
from terrasynth.planning.parts import branch, label_schema, modules, parameters, pipeline_of, segmentor_of
from terrasynth.planning.stages import Stage, Work, encode, paint, prompts, train
from terrasynth.progress import duration, track

if TYPE_CHECKING:
    from rich.console import Console

    from terrasynth.planning.cards import Card
    from terrasynth.recipe import Recipe
    from terrasynth.systems.todsynth import TODSynthPipeline

__all__ = ["Plan", "make_plan", "show_plan"]

_GIB = 2**30
#: Images of a preview.
_PREVIEWS = 4


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

    The parts are built from their configurations as tensors without memory, and the code of each stage runs on them.

    Args:
        recipe: its sizes, precisions and choices; no tile is read.
        base: folder that a relative label schema starts from.
        gpu: count as a GPU computes, else as this processor does.

    Raises:
        TerraSynthError: the base model's configuration is not here.
    """
    config = recipe.generator
    notes: list[str] = []
    schema = label_schema(recipe, base)
    if schema is None:
        schema = WORLD_SCHEMA
        notes.append(f"The classes are not known here, {schema.num_classes} were assumed")
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
        if config.train.offload_optimizer:
            notes.append(
                f"AdamW's moments, with weights and gradients, have {4 * stages[-1].gradients / _GIB:,.1f} GiB of main "
                "memory; the time of its update there is not counted"
            )
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
        return Plan(counts, stages, choices, parts, notes)


def _part_of(module: str) -> str:
    """The part of the network that a module's operations belong to."""
    _, _, name = module.partition(".")
    if not name or (name.rpartition(".")[2].isdigit() and name.count(".") == 1):
        return "joint attention"  # what a block does itself
    return branch(name)


def show_plan(recipe: Recipe, plan: Plan, cards: Sequence[Card], console: Console) -> None:
    """Print a plan, and whether it fits these cards."""
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
    lines = [
        "Of the network's operations: "
        + ", ".join(f"{part} {flops / sum(plan.parts.values()):.0%}" for part, flops in shares)
    ]
    step = next(stage for stage in plan.stages if stage.name == "training step")
    for card in cards:
        if card.speed is not None and step.peak <= card.memory:
            time = duration(train.steps * seconds(step.operations, card.speed))
            speed = "the speed measured just now" if card.measured else "the data sheet's speed"
            lines.append(f"All {train.steps:,} steps on {card.name}, at {speed}, so at least: {time}")
    lines += [
        *plan.notes,
        "Fits: in 92 % of the memory; drivers, kernels and gaps have the rest",
        "Tiles and prompts are encoded once; then the text encoders leave the card until painting",
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
