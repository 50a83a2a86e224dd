"""Painting a whole synthetic dataset: resumable, every sample a function of its own row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terrasynth.data.augment import view
from terrasynth.data.folder import Tiles
from terrasynth.data.write import SyntheticWriter
from terrasynth.io import digest
from terrasynth.progress import track
from terrasynth.recipe import SamplingConfig, SteeringConfig
from terrasynth.sampling.flow import Steering
from terrasynth.sampling.rectify import ControlRectify
from terrasynth.systems.todsynth import TODSynthPipeline

__all__ = ["Job", "paint", "plan", "steering_for"]

#: Views 0...7 are the tile itself, flipped and turned; from here on each is another zoom.
_FIRST_ZOOM = 8


@dataclass(frozen=True)
class Job:
    """One sample to paint: which tile's mask, under which view, from which seed."""

    id: str
    seed: int
    source: int
    view: int


def plan(count: int, tiles: int, seed: int) -> list[Job]:
    """The jobs of a run: every tile's mask in turn, each time zoomed and turned anew.

    A job derives from the run's seed and its own index alone, so a longer plan begins with the shorter one.
    """
    jobs = []
    for index in range(count):
        sample_seed = int(digest(seed, index), 16) >> 1
        jobs.append(Job(f"{index:06d}", sample_seed, index % tiles, _FIRST_ZOOM + sample_seed % 1_000_000))
    return jobs


def steering_for(
    config: SteeringConfig, sampling: SamplingConfig, loss: Callable[[Tensor, Tensor, str], Tensor]
) -> Callable[[Tensor], Steering]:
    """CRFM by a task's loss: maps the masks of a batch to its steering.

    Args:
        config: strength, schedule and the rest.
        sampling: for the number of steps.
        loss: `Task.loss(images, targets, reduction)`; with reduction "wrong" or "image" it gives one value per image.
    """
    reduction = "wrong" if config.wrong_pixels_only else "image"

    def steering(masks: Tensor) -> Steering:
        return ControlRectify(
            loss=lambda images, targets: loss(images, targets, reduction),
            targets=masks,
            **config.model_dump(exclude={"wrong_pixels_only"}),
        )

    return steering


def paint(
    pipeline: TODSynthPipeline,
    tiles: Tiles,
    jobs: Sequence[Job],
    sampling: SamplingConfig,
    folder: Path,
    *,
    provenance: Mapping[str, Any],
    steering: Callable[[Tensor], Steering] | None = None,
    label: str = "painting",
) -> Path:
    """Write the synthetic dataset of `jobs` to `folder`; run again, it paints only what is missing.

    Args:
        pipeline: paints.
        tiles: their masks are painted.
        jobs: what to paint, from `plan`.
        sampling: steps, guidance scales, batch size.
        folder: new, or begun by the same call.
        provenance: recorded with every sample: model, recipe and steering digests.
        steering: makes the steering of a batch from its masks, from `steering_for`.
        label: names the progress bar.
    """
    writer = SyntheticWriter(
        folder,
        tiles.schema,
        plan={**provenance, "jobs": digest([vars(job) for job in jobs]), "tiles": tiles.fingerprint()},
    )
    done = writer.done()
    with track(len(jobs), label, unit="images", done=len(done)) as progress:
        # Batches are cut at fixed places: an interrupted run paints the same batches again, to the bit.
        for start in range(0, len(jobs), sampling.batch_size):
            batch = jobs[start : start + sampling.batch_size]
            missing = [job for job in batch if job.id not in done]
            if not missing:
                continue
            masks = torch.stack([view(tiles.images[job.source], tiles.masks[job.source], job.view)[1] for job in batch])
            prompts = [pipeline.schema.caption(mask, pipeline.config.caption) for mask in masks]
            device_masks = masks.long().to(pipeline.transformer.device)
            images = pipeline(
                device_masks,
                prompts,
                seeds=[job.seed for job in batch],
                num_inference_steps=sampling.steps,
                text_scale=sampling.text_scale,
                mask_scale=sampling.mask_scale,
                steering=None if steering is None else steering(device_masks),
                output_type="pt",
            ).images
            pixels = (images * 255).round().byte().cpu()
            for job, image, mask, prompt in zip(batch, pixels, masks, prompts, strict=True):
                if job in missing:
                    source = {"source_mask": tiles.ids[job.source], "view": job.view}
                    writer.add(job.id, image, mask, {"seed": job.seed, **source, "prompt": prompt, **provenance})
            progress.advance(len(missing))
    return writer.finish()
