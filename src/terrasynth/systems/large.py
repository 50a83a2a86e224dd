"""One picture under a mask of any size, as a GeoTIFF in the mask's place: `terrasynth generate --like`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from rasterio.windows import Window
from torch import Tensor

from terrasynth.data.blending import cover
from terrasynth.data.masks import settle, survey
from terrasynth.data.raster import Grid, open_raster
from terrasynth.data.read import without_recipe
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.io import (
    IDENTITY_TAG,
    MAX_PIXELS,
    TIFF_SUFFIXES,
    atomic_write,
    digest,
    file_digest,
    new_tiff,
    output_is_there,
    remove_incomplete,
)
from terrasynth.progress import Tracker, say, track
from terrasynth.recipe import SamplingConfig
from terrasynth.sampling.flow import Velocity, sample_flow, seeded_noise
from terrasynth.sampling.tiles import Patch, blended_velocity, patches
from terrasynth.systems.generate import load_pipeline, model_digest
from terrasynth.systems.loading import paints_no_numbers
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.training.precision import autocast

__all__ = ["paint_large", "paint_like"]

#: Share of a window that neighbours have in common.
_OVERLAP = 0.5


def paint_like(model: Path, mask: Path, out: Path, *, sampling: SamplingConfig, seed: int = 0) -> Path:
    """Paint a mask raster: `terrasynth generate --like`.

    Args:
        model: folder of a pipeline, or a packaged name.
        mask: index, palette or colour raster with the classes of the model.
        out: a TIFF file.
        sampling: steps, guidance scales, windows painted together.
        seed: of the noise.

    Returns:
        The file: 8-bit RGB with the CRS and transform of the mask. Its tags say `synthetic=1`, the seed and the model.
        One that the same call wrote stays as it is.

    Raises:
        TerraSynthError: the mask can not be read, has other classes or is too large; `out` is no TIFF, or exists and
            was made of something else.
    """
    if out.suffix.lower() not in TIFF_SUFFIXES:
        raise TerraSynthError("a painted scene is a TIFF", path=out, expected="a name that ends in .tif")
    identity = digest(model_digest(model), file_digest(mask), mask.name, sampling.model_dump(mode="json"), seed)
    remove_incomplete(out.parent, out.stem)
    if output_is_there(out, identity):
        say(f"{out} is there already")
        return out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(model)
    if not isinstance(pipeline, TODSynthPipeline):
        raise TerraSynthError(
            "the model paints at its own size alone",
            path=model,
            found=type(pipeline).__name__,
            expected="TODSynth, whose windows are blended in every step",
            fix="choose another model",
        )
    pipeline.place(device, sampling.precision)
    layout, grid = _read_mask(mask, pipeline.schema)
    image = paint_large(pipeline, layout, seed=seed, sampling=sampling)
    tags = {
        IDENTITY_TAG: identity,
        "synthetic": "1",
        "software": f"TerraSynth {version('terrasynth')}",
        "seed": str(seed),
        "model": model_digest(model),
        "source_mask": mask.name,
    }
    profile = {"count": 3, "dtype": "uint8", "width": grid.width, "height": grid.height, "photometric": "RGB"}
    profile |= {"compress": "deflate", "tiled": True, "crs": grid.crs, "transform": grid.transform}
    with atomic_write(out) as partial, new_tiff(partial, **profile) as file:
        file.write(image.numpy())
        file.update_tags(**tags)
    return out


def _read_mask(path: Path, schema: LabelSchema) -> tuple[Tensor, Grid]:
    with open_raster(path) as raster:
        grid = raster.grid
        if grid.width * grid.height > MAX_PIXELS:
            raise TerraSynthError(
                "the mask is too large to paint in one piece",
                path=path,
                found=f"{grid.width} x {grid.height} pixels",
                expected=f"at most {MAX_PIXELS:,} pixels",
                fix="cut it, for example with `gdal_translate -srcwin`",
            )
        try:
            _, lookups, faults = settle([survey(raster)], schema, "auto")
            if faults:
                raise faults[0]
            lookup = lookups[path]
        except TerraSynthError as error:
            raise without_recipe(error, path) from error
        layout = torch.from_numpy(lookup.read(raster, Window(0, 0, grid.width, grid.height)))
    say(f"read as: {schema.shares(layout)}")
    return layout, grid


@torch.no_grad()
def paint_large(pipeline: TODSynthPipeline, mask: Tensor, *, seed: int, sampling: SamplingConfig) -> Tensor:
    """Paint one image under a mask of any size.

    The windows have the size that the model was trained at, overlap by half, and each has the caption of its own
    classes. A mask no larger than that is painted as by the pipeline itself. Beside mask, noise and picture, one batch
    of windows is in memory at a time.

    Args:
        pipeline: on its device.
        mask: uint8 (H, W), class indices or `ignore_index`.
        seed: of the noise, which is one field for the whole image.
        sampling: steps, guidance scales, windows computed together.

    Returns:
        uint8 (3, H, W), on the CPU.
    """
    device = pipeline.transformer.device
    patch = pipeline.transformer.config.patch_size
    token = pipeline.factor * patch
    height, width = mask.shape
    padded = F.pad(mask, (0, -width % token, 0, -height % token), value=pipeline.schema.ignore_index)
    trained = pipeline.config.image_size or pipeline.transformer.config.sample_size * pipeline.factor
    size = trained // token
    axes = [cover(length // token, size, min(size - 1, round(_OVERLAP * size))) for length in padded.shape]
    windows = [window.scaled(patch).to(device) for window in patches(*axes)]
    batches = [windows[i : i + sampling.batch_size] for i in range(0, len(windows), sampling.batch_size)]

    pixels = (window.scaled(pipeline.factor) for window in windows)
    pipeline.prompts.prepare(["", *pipeline.captions(padded[window.rows, window.columns] for window in pixels)])

    def velocity_of(batch: list[Patch], progress: Tracker) -> Velocity:
        def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
            # Encoded again in every step: the conditions of all windows together would be many times the picture.
            pixels = [window.scaled(pipeline.factor) for window in batch]
            masks = torch.stack([padded[window.rows, window.columns] for window in pixels]).to(device).long()
            guided = pipeline.velocity(
                masks,
                text_scale=sampling.text_scale,
                mask_scale=sampling.mask_scale,
                guidance_interval=sampling.guidance_interval,
            )
            found = guided(latents, timestep)
            progress.advance(len(batch))
            return found

        return velocity

    shape = (pipeline.transformer.config.in_channels, *(side // pipeline.factor for side in padded.shape))
    evaluations = sampling.steps * len(windows)
    with track(evaluations, "painting", unit="windows") as progress, autocast(device, sampling.precision):
        latents = sample_flow(
            blended_velocity([(batch, velocity_of(batch, progress)) for batch in batches]),
            seeded_noise([seed], shape).to(device),
            pipeline.shifted(sampling.shift),
            sampling.steps,
            solver=sampling.solver,
        )
        image = torch.zeros(3, *padded.shape)
        for batch in batches:
            decoded = pipeline.decode(torch.cat([latents[:, :, window.rows, window.columns] for window in batch]))
            for window, part in zip(batch, decoded.float(), strict=True):
                place = window.scaled(pipeline.factor)
                image[:, place.rows, place.columns] += (place.weight * part).cpu()
    if not image.isfinite().all():
        raise paints_no_numbers()
    return image[:, :height, :width].clamp_(0, 1).mul_(255).round_().byte()
