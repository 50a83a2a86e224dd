"""What the stages of a run do, on a pipeline without weights or with random ones.

No formula stands for the code: the code of each stage runs, once, while its bytes and operations are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from terrasynth.models.mmdit import Feature
from terrasynth.planning.footprint import Operations, checkpoint, count, flops, nbytes
from terrasynth.planning.parts import length, modules, on_card
from terrasynth.sampling.flow import FlowStep
from terrasynth.sampling.guidance import guidance_chain, is_guided
from terrasynth.systems.generate import steering_for
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.tasks.segmentation import Segmentor
from terrasynth.training.loop import Average, make_optimizer
from terrasynth.training.precision import autocast

if TYPE_CHECKING:
    from terrasynth.recipe import Precision, Recipe, TrainConfig

__all__ = ["Stage", "Work", "encode", "paint", "prompts", "step", "tensors", "train"]


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
        operations: of training, those of one step.
    """

    name: str
    weights: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0
    operations: Operations = field(default_factory=Operations)

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return flops(self.operations)


@dataclass(frozen=True)
class Work:
    """Something that a stage does, and what lies in memory meanwhile.

    Attributes:
        parts: what is done, in this order, and how often the stage does it.
        weights: of everything on the card.
        gradients: bytes, of trained parameters.
        optimizer: its state.
        average: the moving average.
        others: more tensors that are held.
        around: what is entered while all is done.
    """

    parts: Sequence[tuple[Callable[[], object], int]]
    weights: Sequence[Tensor]
    gradients: int = 0
    optimizer: Sequence[Tensor] = ()
    average: Sequence[Tensor] = ()
    others: Sequence[Tensor] = ()
    around: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self) -> None:
        """Do it all."""
        with self.around():
            for part, times in self.parts:
                for _ in range(times):
                    part()

    def count(self, name: str) -> Stage:
        """Do each part once, and count."""
        operations = Operations()
        kept = [tensor.grad for tensor in self.weights if tensor.grad is not None]
        with count([*self.weights, *self.optimizer, *self.average, *self.others, *kept]) as needs, self.around():
            for part, times in self.parts:
                needs.operations.clear()
                part()
                operations.update({operation: times * number for operation, number in needs.operations.items()})
        known = {"gradients": self.gradients, "optimizer": nbytes(self.optimizer), "average": nbytes(self.average)}
        weights = nbytes(self.weights)
        rest = needs.peak - weights - sum(known.values())
        return Stage(name, weights, **known, activations=rest, operations=operations)


def encode(recipe: Recipe, pipeline: TODSynthPipeline) -> Work:
    """Some tiles and a prompt, as each is once, before the transformer comes to the card."""
    size, device = recipe.data.image_size, pipeline.transformer.device
    batch = max(1, 2**20 // size**2)
    images, masks = torch.zeros(batch, 3, size, size, device=device), _masks(recipe, pipeline, batch)
    read, tokens = _reading(pipeline)

    @torch.no_grad()
    def look() -> None:
        pipeline.encode_images(images)
        if recipe.generator.reference in ("augmented", "recolored"):
            pipeline.encode_images(images)
        if pipeline.config.mask_coding == "grey":
            pipeline.encode_masks(masks)

    parts = [part for part in modules(pipeline) if part is not pipeline.transformer]
    return Work([(look, 1), (read, 1)], tensors(*parts), others=[images, masks, *tokens])


def prompts(pipeline: TODSynthPipeline) -> Work:
    """A prompt of what is to be painted, with everything on the card."""
    read, tokens = _reading(pipeline)
    return Work([(read, 1)], tensors(*modules(pipeline)), others=tokens)


def _reading(pipeline: TODSynthPipeline) -> tuple[Callable[[], None], list[Tensor]]:
    """What encodes a prompt, and its tokens."""
    device = pipeline.transformer.device
    tokens = [torch.zeros(1, length(encoder), dtype=torch.long, device=device) for encoder in pipeline.text_encoders]

    @torch.no_grad()
    def read() -> None:
        for encoder, given in zip(pipeline.text_encoders, tokens, strict=True):
            encoder(given)

    return read, tokens


def train(
    recipe: Recipe, pipeline: TODSynthPipeline, *, checkpointing: bool, gpu: bool, offload: bool | None = None
) -> Work:
    """A step of the training, as `training.loop` takes it from the second step on.

    Where the optimiser is in main memory (`offload`; None: as the recipe has it), it needs nothing of the card.
    """
    config, model = recipe.generator.train, pipeline.transformer
    if checkpointing:
        model.enable_gradient_checkpointing(checkpoint)
    else:
        model.disable_gradient_checkpointing()
    config = config.model_copy(update={"gradient_checkpointing": checkpointing})
    batch = _batch(recipe, pipeline, config.batch_size)
    return step(model, pipeline.training_loss, batch, config, tensors(model, pipeline.vae), gpu=gpu, offload=offload)


def step(
    network: nn.Module,
    loss: Callable[[dict[str, Tensor]], Tensor],
    batch: dict[str, Tensor],
    config: TrainConfig,
    weights: Sequence[Tensor],
    *,
    gpu: bool,
    offload: bool | None = None,
) -> Work:
    """A step of any training, from the second on; `weights` are those of everything on the card."""
    offload = config.offload_optimizer if offload is None else offload
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = None if offload else make_optimizer(network.named_parameters(), config)
    average = Average(network, config.ema_decay) if config.ema_decay else None
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    gradients = nbytes(p.grad for p in trained if p.grad is not None)
    if optimizer is not None:
        optimizer.step()  # makes its state
    if config.accumulate == 1:
        network.zero_grad()
    device, precision = weights[0].device, on_card(config.precision, gpu=gpu)

    def micro_batch() -> None:
        with autocast(device, precision, keep_casts=not config.gradient_checkpointing):
            mean = loss(batch) / config.accumulate
        mean.backward()

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, config.clip_norm or torch.inf)
        if optimizer is not None:
            optimizer.step()
        network.zero_grad()
        if average is not None:
            average.update(0)

    return Work(
        [(micro_batch, config.accumulate), (update, 1)],
        weights,
        gradients=gradients,
        optimizer=[value for state in optimizer.state.values() for value in state.values()] if optimizer else [],
        average=[] if average is None else list(average.values.values()),
        others=list(batch.values()),
    )


def paint(
    recipe: Recipe,
    pipeline: TODSynthPipeline,
    images: int,
    segmentor: Segmentor | None = None,
    *,
    gpu: bool,
    looks: bool | None = None,
) -> Work:
    """A batch of images: all steps, those that the segmentor steers, and the decoding.

    `looks` says whether they are painted like references; None: if an arm of the study is.
    """
    looks = any(arm.references for arm in recipe.study.arms) if looks is None else looks
    sampling, config = recipe.sampling, recipe.steering
    velocity, latents = (_latents(recipe, pipeline, images) for _ in range(2))
    masks = _masks(recipe, pipeline, images)
    scales = {"text": sampling.text_scale, "reference": sampling.reference_scale, "mask": sampling.mask_scale}
    if not looks:
        scales.pop("reference")
    rows = images * len(guidance_chain(scales))
    embeds, pooled = pipeline.prompts([""] * rows)
    given = {
        "hidden_states": _latents(recipe, pipeline, rows),
        "timestep": torch.zeros(rows, device=masks.device),
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "mask_latents": pipeline.null_mask_latents(masks[:1]).repeat(rows, 1, 1, 1),
    }
    features: list[Feature] | None = None
    if looks:
        with torch.no_grad(), _autocast(pipeline, sampling.precision, gpu=gpu):
            features = pipeline.transformer.reference_features(latents)
    # On a GPU the text encoders are not there any more.
    networks = [pipeline.transformer, pipeline.vae] if gpu else modules(pipeline)

    with unset_fake_temporarily():
        scheduler = pipeline.shifted(sampling.shift)
        scheduler.set_timesteps(sampling.steps)
        guided = sum(is_guided(t / 1000, sampling.guidance_interval) for t in scheduler.timesteps.tolist())

    @torch.no_grad()
    def evaluate(rows: int) -> None:
        sees = None if features is None else torch.ones(rows, dtype=torch.bool, device=masks.device)
        some = {name: tensor[:rows] for name, tensor in given.items()}
        pipeline.transformer(**some, reference=features, sees=sees)

    @torch.no_grad()
    def look() -> None:
        size = recipe.data.image_size
        references = torch.zeros(images, 3, size, size, device=masks.device)
        pipeline.transformer.reference_features(pipeline.encode_images(references))

    @torch.no_grad()
    def decode() -> None:
        pipeline.decode(latents)

    evaluations = [(partial(evaluate, rows), guided), (partial(evaluate, images), sampling.steps - guided)]
    parts: list[tuple[Callable[[], object], int]] = [*(part for part in evaluations if part[1]), (decode, 1)]
    if looks:
        parts.append((look, 1))
    if segmentor is not None:
        networks.append(segmentor)
        steering = steering_for(config, segmentor.loss)(masks)
        first = FlowStep(config.start, sampling.steps, sigma=1.0)

        @torch.no_grad()
        def steer() -> None:
            steering(velocity, latents, first, pipeline.decode)

        parts.append((steer, min(config.steps, max(0, sampling.steps - config.start))))
    return Work(
        parts,
        tensors(*networks),
        others=[velocity, latents, masks, *given.values(), *chain.from_iterable(features or ())],
        around=lambda: _autocast(pipeline, sampling.precision, gpu=gpu),
    )


def _batch(recipe: Recipe, pipeline: TODSynthPipeline, size: int) -> dict[str, Tensor]:
    masks = _masks(recipe, pipeline, size)
    embeds, pooled = pipeline.prompts([""] * size)
    with unset_fake_temporarily():
        seeds = torch.arange(size)  # real, because they are read
    batch = {"latents": _latents(recipe, pipeline, size), "mask": masks.byte(), "seed": seeds}
    if pipeline.config.mask_coding == "grey":
        batch["mask_latents"] = pipeline.encode_masks(masks)
        pipeline.null_mask_latents(masks[:1])
    if recipe.generator.reference is not None:
        batch["reference_latents"] = _latents(recipe, pipeline, size)
    return {**batch, "prompt_embeds": embeds, "pooled": pooled}


def _masks(recipe: Recipe, pipeline: TODSynthPipeline, batch: int) -> Tensor:
    size = recipe.data.image_size
    return torch.zeros(batch, size, size, dtype=torch.long, device=pipeline.transformer.device)


def _latents(recipe: Recipe, pipeline: TODSynthPipeline, batch: int) -> Tensor:
    transformer, side = pipeline.transformer, recipe.data.image_size // pipeline.factor
    return torch.zeros(batch, transformer.config.in_channels, side, side, device=transformer.device)


def _autocast(pipeline: TODSynthPipeline, precision: Precision, *, gpu: bool) -> torch.autocast:
    return autocast(pipeline.transformer.device, on_card(precision, gpu=gpu))


def tensors(*networks: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
