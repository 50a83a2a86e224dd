"""One synthetic dataset from a trained model, a folder of masks and perhaps a segmentor: `terrasynth generate`."""

from __future__ import annotations

from pathlib import Path

import torch

from terrasynth.data.card import check_license
from terrasynth.data.folder import Tiles, load_masks, load_references
from terrasynth.progress import say
from terrasynth.recipe import SamplingConfig, SteeringConfig
from terrasynth.systems.generate import load_pipeline, model_digest, paint, plan, steering_for
from terrasynth.tasks.segmentation import Segmentor

__all__ = ["generate"]


def generate(
    model: Path,
    masks: Path | Tiles,
    folder: Path,
    *,
    sampling: SamplingConfig,
    steering: SteeringConfig,
    segmentor: Path | None = None,
    references: Path | None = None,
    count: int | None = None,
    seed: int = 0,
    license: str | None = None,
    skip_bad: bool = False,
) -> Path:
    """Paint a synthetic dataset with a trained model: `terrasynth generate`.

    Args:
        model: folder of a pipeline.
        masks: folder of mask files, or tiles whose masks are painted.
        folder: of the dataset.
        sampling: steps, guidance scales, batch size.
        steering: settings of CRFM, used with a `segmentor`.
        segmentor: folder of the segmentor that steers; None paints without steering.
        references: folder of images; each sample is painted like one of them. None paints without.
        count: how many images; by default one per mask.
        seed: of the run.
        license: identifier of the licence of the images, for the dataset card; None leaves what the card says.
        skip_bad: leave out mask files that can not be used, and list them on standard error.

    Raises:
        TerraSynthError: anything of this is not what it should be.
    """
    if license is not None:
        check_license(license)  # before the model is loaded
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(model).place(device, sampling.precision)
    if isinstance(masks, Path):
        size = pipeline.config.image_size or pipeline.network.config.sample_size * pipeline.factor
        ids, layouts = load_masks(masks, pipeline.schema, size, skip_bad=skip_bad)
        say(f"read as: {pipeline.schema.shares(layouts)}")
    else:
        ids, layouts = masks.ids, masks.masks
    looks = None
    if references is not None:
        looks = load_references(references, pipeline.schema, layouts.shape[-1], skip_bad=skip_bad)
    steer = None
    if segmentor is not None:
        steer = steering_for(steering, Segmentor.from_pretrained(segmentor, schema=pipeline.schema).to(device).loss)
    return paint(
        pipeline,
        layouts,
        ids,
        plan(count or len(ids), len(ids), seed, 0 if looks is None else len(looks)),
        sampling,
        folder,
        provenance={
            "run_seed": seed,
            "model": model_digest(model),
            "sampling": sampling.model_dump(mode="json", exclude={"batch_size"}),
            "steering": None if segmentor is None else steering.model_dump(mode="json"),
            "segmentor": None if segmentor is None else model_digest(segmentor),
        },
        references=looks,
        steering=steer,
        license=license,
    )
