"""Images and masks that are painted together: from labelled tiles to a model, and from it to a dataset.

The dataset may also be painted by a generator that learned layouts (`generator.layouts`): first the masks, then images
under them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from terrasynth.data.augment import view
from terrasynth.data.card import check_license
from terrasynth.data.folder import Tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.data.sheet import contact_sheet
from terrasynth.data.write import SyntheticWriter
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_dir, atomic_write, digest, read_json
from terrasynth.progress import say, track
from terrasynth.recipe import PairsConfig, PairsSamplingConfig, Precision, SamplingConfig
from terrasynth.systems.generate import load_pipeline, model_digest
from terrasynth.systems.loading import paints_no_layouts
from terrasynth.systems.satsynth import Pairs, SatSynthPipeline
from terrasynth.systems.todsynth import TODSynthPipeline, packaged_or
from terrasynth.training.keys import Key
from terrasynth.training.loop import Outcome, train
from terrasynth.training.processes import process_state

__all__ = ["LayoutPainter", "PairViews", "build_pairs", "fit_pairs", "generate_pairs", "paint_pairs"]

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Paintings in a preview, and their steps.
PREVIEW = 8, 20


class PairViews(Dataset[dict[str, Tensor]]):
    """Labelled tiles under `views` fixed flips, quarter turns and zooms, which do not change colours.

    Item (index, seed) has `image` float32 (3, S, S) in [0, 1] and `mask` int64 (S, S), class indices or the ignore
    index.
    """

    def __init__(self, tiles: Tiles, views: int) -> None:
        self.tiles, self.views = tiles, views

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        index, seed = key
        image, mask = view(self.tiles.images[index], self.tiles.masks[index], seed % self.views)
        return {"image": image.float() / 255, "mask": mask.long()}


def build_pairs(config: PairsConfig, schema: LabelSchema, image_size: int) -> SatSynthPipeline:
    """An untrained pipeline of a recipe, or the `base` that it starts from."""
    if config.base is None:
        pipeline = SatSynthPipeline.from_scratch(
            schema,
            codes=config.codes,
            prediction_type=config.prediction,
            patch_size=config.patch_size,
            widths=config.widths,
            layers=config.layers,
            attention=config.attention,
            asks_classes=config.asks_classes,
            condition=config.condition,
            image_size=image_size,
            seed=config.seed,
        )
    else:
        pipeline = SatSynthPipeline.from_pretrained(config.base, label_schema=schema.to_dict())
    pipeline.class_dropout, pipeline.given_dropout = config.class_dropout, config.given_dropout
    return pipeline


def fit_pairs(tiles: Tiles, config: PairsConfig, folder: Path, *, max_minutes: float | None = None) -> Outcome:
    """Train on labelled tiles what paints images and masks together; `folder/model` is the result.

    Run again after an interruption it goes on from the last checkpoint; finished, it returns at once.
    """
    pipeline = build_pairs(config, tiles.schema, tiles.images.shape[-1])
    pipeline.place(_DEVICE, config.train.precision)

    shown, steps = PREVIEW

    def preview(step: int) -> dict[str, float]:
        painted = pipeline(seeds=range(shown), num_steps=steps)
        with atomic_write(folder / "previews" / f"step-{step:08d}.png") as partial:
            contact_sheet({"painted": painted.images.cpu()}, painted.masks.cpu(), tiles.schema).save(partial)
        return {}

    outcome = train(
        pipeline.network,
        pipeline.training_loss,
        PairViews(tiles, config.views),
        config.train,
        folder,
        seed=config.seed,
        identity={
            "pairs": {name: value for name, value in config.identity().items() if name != "train"},
            "data": tiles.fingerprint(),
        },
        evaluate=preview,
        max_minutes=max_minutes,
        label="training what paints pairs",
    )
    if outcome.finished and process_state().is_main_process and not (folder / "model").is_dir():
        nn.Module.to(pipeline.network, "cpu", torch.float32)
        with atomic_dir(folder / "model") as partial:
            pipeline.save_pretrained(partial)
    return outcome


class LayoutPainter:
    """A generator that learned layouts as what paints pairs: a mask, then the image under it, from the same seed.

    Args:
        pipeline: on its device.
        sampling: of the images, but for batch size and precision.
    """

    def __init__(self, pipeline: TODSynthPipeline, sampling: SamplingConfig) -> None:
        self.pipeline, self.schema = pipeline, pipeline.schema
        self._arguments = pipeline.sampling_arguments(sampling)

    def ask(self, shares: Mapping[str, float], count: int) -> Tensor:
        """Refuse: it is told of classes by prompts alone."""
        raise TerraSynthError(
            "the model can not be asked for shares of classes",
            found=dict(shares),
            expected="what `terrasynth train --what pairs` trained",
            fix="leave out pairs.sampling.shares; in Python, name classes: `pipeline.layouts(prompts, seeds=…)`",
        )

    def __call__(
        self,
        *,
        seeds: Sequence[int],
        shares: Tensor | None = None,
        guidance_scale: float = 1.0,
        num_steps: int = 50,
        precision: Precision | None = None,
    ) -> Pairs:
        """Paint pairs, as `SatSynthPipeline` does; `num_steps` are those of the masks."""
        masks = self.pipeline.layouts(seeds=seeds, num_inference_steps=num_steps, precision=precision)
        arguments = {**self._arguments, "precision": precision}
        images = self.pipeline(masks, seeds=seeds, output_type="pt", **arguments).images
        if not images.isfinite().all():
            raise TerraSynthError(
                "the model paints values that are no numbers", found="NaN or infinity", fix="train it again"
            )
        return Pairs((images * 255).round().byte(), masks)


def paint_pairs(
    pipeline: SatSynthPipeline | LayoutPainter,
    count: int,
    sampling: PairsSamplingConfig,
    folder: Path,
    *,
    seed: int = 0,
    provenance: Mapping[str, Any],
    license: str | None = None,
    between: Callable[[], None] | None = None,
    label: str = "painting pairs",
) -> Path:
    """Write a synthetic dataset of `count` pairs to `folder`; run again, it paints only what is missing.

    Pair i derives from the seed and i alone (and, to rounding, from the batch), so a larger dataset begins with the
    smaller one.

    Args:
        pipeline: paints.
        count: how many.
        sampling: steps, what is asked for, batch size.
        folder: new, or begun by the same call.
        seed: of the run.
        provenance: recorded with every pair: model, recipe.
        license: identifier of the licence of the images, for the dataset card; None leaves what the card says.
        between: called before every batch; may raise to stop in good order.
        label: names the progress bar.

    Raises:
        TerraSynthError: the folder holds another dataset; the model can not be asked, or paints no numbers.
    """
    settings = sampling.model_dump(mode="json", exclude={"batch_size"})
    plan = {**provenance, "run_seed": seed, "pairs": settings}
    writer = SyntheticWriter(folder, pipeline.schema, plan=plan, license=license)
    done, size = writer.done(), sampling.batch_size
    if len(done) > count:
        say(f"{folder} has {len(done)} pairs already, more than the {count} asked for: it is left as it is")
    jobs = [(f"{index:06d}", int(digest(seed, index, "pair"), 16) >> 1) for index in range(count)]
    with track(count, label, unit="pairs", done=len(done)) as progress:
        # Batches are cut at fixed places: an interrupted run paints the same batches again, to the bit.
        for batch in (jobs[start : start + size] for start in range(0, count, size)):
            missing = {id for id, _ in batch} - done
            if not missing:
                continue
            if between is not None:
                between()
            pairs = pipeline(
                seeds=[each for _, each in batch],
                shares=pipeline.ask(sampling.shares, len(batch)) if sampling.shares else None,
                guidance_scale=sampling.guidance_scale,
                num_steps=sampling.steps,
                precision=sampling.precision,
            )
            for (id, each), image, mask in zip(batch, pairs.images.cpu(), pairs.masks.cpu(), strict=True):
                if id in missing:
                    batching = {"device": _DEVICE.type, "batch_size": size}
                    writer.add(id, image, mask, {**provenance, **batching, "seed": each, "pairs": settings})
            progress.advance(len(missing))
    return writer.finish()


def generate_pairs(
    model: Path,
    folder: Path,
    sampling: PairsSamplingConfig,
    *,
    count: int,
    images: SamplingConfig | None = None,
    seed: int = 0,
    license: str | None = None,
) -> Path:
    """Paint a dataset of pairs with a trained model: `terrasynth generate --pairs`. Arguments as of `paint_pairs`.

    `images` says how a generator paints under the masks that it painted, but for batch size and precision, which are
    those of `sampling`; what paints both at once does without.

    Raises:
        TerraSynthError: the model is something else, or a generator that did not learn to paint layouts.
    """
    if license is not None:
        check_license(license)  # before the model is loaded
    provenance: dict[str, Any] = {"model": model_digest(model)}
    painter: SatSynthPipeline | LayoutPainter
    if _is_generator(model):
        images = SamplingConfig() if images is None else images
        generator = load_pipeline(model)
        if not isinstance(generator, TODSynthPipeline) or not generator.paints_layouts:
            raise paints_no_layouts()
        painter = LayoutPainter(generator.place(_DEVICE, sampling.precision), images)
        provenance["sampling"] = images.model_dump(mode="json", exclude={"batch_size", "precision"})
    else:
        painter = SatSynthPipeline.from_pretrained(model).place(_DEVICE, sampling.precision)
    return paint_pairs(painter, count, sampling, folder, seed=seed, provenance=provenance, license=license)


def _is_generator(model: Path) -> bool:
    """Whether a folder, or a packaged name, is that of a model that paints under masks."""
    index = Path(packaged_or(model)) / "model_index.json"
    known = read_json(index, fix="copy or train the model again") if index.is_file() else None
    return isinstance(known, dict) and known.get("_class_name") in ("TODSynthPipeline", "TISynthPipeline")
