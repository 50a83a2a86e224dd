"""Painting a whole synthetic dataset: resumable, every sample a function of its own row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from terrasynth.data.augment import view
from terrasynth.data.folder import Tiles
from terrasynth.data.write import SyntheticWriter
from terrasynth.errors import TerraSynthError
from terrasynth.io import digest, read_json, weights_digest
from terrasynth.packaged import packaged_or
from terrasynth.progress import say, track
from terrasynth.recipe import SamplingConfig, SteeringConfig
from terrasynth.sampling.flow import Steering
from terrasynth.sampling.rectify import ControlRectify
from terrasynth.systems.loading import blind, paints_no_numbers
from terrasynth.systems.tisynth import TISynthPipeline
from terrasynth.systems.todsynth import TODSynthPipeline

__all__ = [
    "Job",
    "Pipeline",
    "generator_class",
    "load_pipeline",
    "model_class",
    "model_digest",
    "paint",
    "plan",
    "steering_for",
]

Pipeline = TODSynthPipeline | TISynthPipeline
"""What paints."""
#: Views 0...7 are the tile itself, flipped and turned; from here on each is another zoom.
_FIRST_ZOOM = 8


@dataclass(frozen=True)
class Job:
    """One sample to paint: which tile's mask, under which view, from which seed, like which reference if any."""

    id: str
    seed: int
    source: int
    view: int
    reference: int | None = None


def plan(count: int, tiles: int, seed: int, references: int = 0, *, turned: bool = True) -> list[Job]:
    """The jobs of a run: every tile's mask in turn, each time zoomed and turned anew, and like any of the references.

    A job derives from the run's seed and its own index alone, so a longer plan begins with the shorter one. Masks that
    are not `turned` are painted as they are.
    """
    jobs = []
    for index in range(count):
        sample_seed = int(digest(seed, index), 16) >> 1
        like = int(digest(seed, index, "reference"), 16) % references if references else None
        turn = _FIRST_ZOOM + sample_seed % 1_000_000 if turned else 0
        jobs.append(Job(f"{index:06d}", sample_seed, index % tiles, turn, like))
    return jobs


def steering_for(
    config: SteeringConfig, loss: Callable[[Tensor, Tensor, Literal["wrong", "image"]], Tensor]
) -> Callable[[Tensor], Steering]:
    """CRFM by a task's loss: maps the masks of a batch to its steering.

    Args:
        config: strength, schedule and the rest.
        loss: `Task.loss(images, targets, reduction)`; with reduction "wrong" or "image" it gives one value per image.
    """
    reduction: Literal["wrong", "image"] = "wrong" if config.wrong_pixels_only else "image"

    def steering(masks: Tensor) -> Steering:
        return ControlRectify(
            loss=lambda images, targets: loss(images, targets, reduction),
            targets=masks,
            **config.model_dump(exclude={"wrong_pixels_only"}),
        )

    return steering


def paint(
    pipeline: Pipeline,
    masks: Tensor,
    ids: Sequence[str],
    jobs: Sequence[Job],
    sampling: SamplingConfig,
    folder: Path,
    *,
    provenance: Mapping[str, Any],
    layouts: str | None = None,
    references: Tiles | None = None,
    steering: Callable[[Tensor], Steering] | None = None,
    license: str | None = None,
    between: Callable[[], None] | None = None,
    label: str = "painting",
) -> Path:
    """Write the synthetic dataset of `jobs` to `folder`; run again, it paints only what is missing.

    Args:
        pipeline: paints.
        masks: uint8 (N, S, S), the layouts.
        ids: their N names, recorded with every sample.
        jobs: what to paint, from `plan`.
        sampling: steps, guidance scales, batch size.
        folder: new, or begun by the same call.
        provenance: recorded with every sample: model, recipe, steering.
        layouts: what tells the masks from others, where more of them may be added at the end; by default a digest.
        references: the images, at the model's size, that the jobs name.
        steering: makes the steering of a batch from its masks, from `steering_for`.
        license: identifier of the licence of the images, for the dataset card; None leaves what the card says.
        between: called before every batch; may raise to stop in good order.
        label: names the progress bar.

    Raises:
        TerraSynthError: the folder holds another dataset; the model paints no numbers, can not be steered, can not look
            at references, or does not know settings of the sampling.
    """
    if steering is not None and not isinstance(pipeline, TODSynthPipeline):
        raise TerraSynthError(
            "the model can not be steered",
            found=type(pipeline).__name__,
            expected="TODSynth, whose steps CRFM rectifies",
            fix="paint without steering",
        )
    if references is not None and not pipeline.looks:
        raise blind()
    arguments = pipeline.sampling_arguments(sampling)
    writer = SyntheticWriter(
        folder,
        pipeline.schema,
        # Not the number of jobs: a finished dataset may be continued.
        plan={
            **provenance,
            "masks": _hash(masks) if layouts is None else layouts,
            **({} if references is None else {"references": _hash(references.images)}),
        },
        license=license,
    )
    done = writer.done()
    if len(done) > len(jobs):
        say(f"{folder} has {len(done)} images already, more than the {len(jobs)} asked for: it is left as it is")
    device = pipeline.network.device
    # Batches are cut at fixed places: an interrupted run paints the same batches again, to the bit.
    cut = [jobs[start : start + sampling.batch_size] for start in range(0, len(jobs), sampling.batch_size)]
    batches = [batch for batch in cut if any(job.id not in done for job in batch)]
    if any(encoder.device != device for encoder in pipeline.text_encoders):
        # They are brought to the card once, not for each batch with a new prompt.
        with track(sum(map(len, batches)), "reading masks", unit="masks") as progress:
            coming = [""] if batches else []
            for job in chain.from_iterable(batches):
                coming += pipeline.captions([view_mask(masks[job.source], job.view)])
                progress.advance()
        pipeline.prompts.prepare(coming)
    with track(len(jobs), label, unit="images", done=len(done)) as progress:
        for batch in batches:
            missing = [job for job in batch if job.id not in done]
            if between is not None:
                between()
            targets = torch.stack([view_mask(masks[job.source], job.view) for job in batch])
            prompts = pipeline.captions(targets)
            options: dict[str, Any] = dict(arguments)
            if steering is not None:
                options["steering"] = steering(targets.long().to(device))
            images = pipeline(
                targets.long().to(device),
                prompts,
                None if references is None else _looks(references.images, batch).to(device),
                seeds=[job.seed for job in batch],
                output_type="pt",
                **options,
            ).images
            if not images.isfinite().all():
                raise paints_no_numbers()
            pixels = (images * 255).round().byte().cpu()
            for job, image, mask, prompt in zip(batch, pixels, targets, prompts, strict=True):
                if job in missing:
                    row = {"seed": job.seed, "source_mask": ids[job.source], "view": job.view, "prompt": prompt}
                    if references is not None and job.reference is not None:
                        row["reference"] = references.ids[job.reference]
                    batching = {"device": device.type, "batch_size": sampling.batch_size}
                    writer.add(job.id, image, mask, {**provenance, **batching, **row})
            progress.advance(len(missing))
    return writer.finish()


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def _looks(images: Tensor, jobs: Sequence[Job]) -> Tensor:
    return torch.stack([images[job.reference] for job in jobs if job.reference is not None]).float() / 255


def view_mask(mask: Tensor, index: int) -> Tensor:
    """The view of a mask alone, uint8 (S, S); see `data.augment.view`."""
    return view(mask.expand(3, -1, -1), mask, index)[1]


def load_pipeline(model: str | Path) -> Pipeline:
    """Load what `terrasynth train` made, or a model that comes with the package, by its name.

    Raises:
        TerraSynthError: the folder is something else, or damaged.
    """
    folder = Path(packaged_or(model))
    if generator_class(model) == "TISynthPipeline":
        return TISynthPipeline.from_pretrained(folder)
    return TODSynthPipeline.from_pretrained(folder)


def generator_class(model: str | Path) -> str | None:
    """As `model_class`, of what paints under masks.

    Raises:
        TerraSynthError: the folder is none of a model, or of one that does something else.
    """
    kind = model_class(model)
    if kind in ("SatSynthPipeline", "IDGBRPipeline"):
        paints = kind == "SatSynthPipeline"
        raise TerraSynthError(
            "not the folder of a generator, which paints under masks",
            path=packaged_or(model),
            found="what paints images and masks together" if paints else "a refiner",
            fix="paint with it by --pairs N, or set pairs.base to it"
            if paints
            else "refine class maps with it: `terrasynth refine`, or set refiner.base to it",
        )
    return kind


def model_class(model: str | Path) -> str | None:
    """Of which class of pipeline a model's folder says that it is; `model` may be a packaged name.

    Raises:
        TerraSynthError: the folder is none of a model, or damaged.
    """
    folder = Path(packaged_or(model))
    if not (folder / "model_index.json").is_file():
        raise TerraSynthError(
            "not the folder of a model",
            path=folder,
            found="no model_index.json",
            expected="a pipeline that `terrasynth train` saved",
            fix="give the folder called `model` that `terrasynth train` printed",
        )
    index = read_json(folder / "model_index.json", fix="copy or train the model again")
    return index.get("_class_name") if isinstance(index, dict) else None


def model_digest(model: str | Path) -> str:
    """Digest of the safetensors files of a model's folder or packaged name: what made a sample, wherever it is.

    Of a name on the hub, whose files may not be here, the name.
    """
    folder = Path(packaged_or(model))
    if not folder.is_dir():
        return digest(str(model))
    return weights_digest(folder)
