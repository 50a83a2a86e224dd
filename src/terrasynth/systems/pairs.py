"""Images and masks that are painted together: from labelled tiles to a model, and from it to a dataset.

One diffusion paints them in the size of the tiles, or two: the first in half of it, the second doubles that.
The dataset may also be painted by a generator that learned layouts (`generator.layouts`): first the masks, then images
under them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from terrasynth.data.augment import view
from terrasynth.data.card import check_license
from terrasynth.data.folder import Tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.data.sheet import contact_sheet
from terrasynth.data.write import SyntheticWriter
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_dir, atomic_write, digest
from terrasynth.packaged import packaged_or
from terrasynth.progress import say, track
from terrasynth.recipe import PairsConfig, PairsSamplingConfig, Precision, SamplingConfig, TrainConfig, UpscalerConfig
from terrasynth.systems.generate import load_pipeline, model_class, model_digest
from terrasynth.systems.loading import paints_no_layouts, paints_no_numbers, takes_no_shares
from terrasynth.systems.satsynth import Given, Pairs, SatSynthPipeline, check_shares, halve
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.training.keys import Key
from terrasynth.training.loop import Outcome, train
from terrasynth.training.processes import process_state
from terrasynth.training.units import Clock

__all__ = [
    "UPSCALER",
    "LayoutPainter",
    "PairViews",
    "TwoStages",
    "build_pairs",
    "build_upscaler",
    "check_pairs",
    "first_stage",
    "fit_pairs",
    "generate_pairs",
    "load_pairs",
    "paint_pairs",
]

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Paintings in a preview, and their steps.
PREVIEW = 8, 20
#: Folder of the second stage, in that of a training and in that of a model.
UPSCALER = "upscaler"


class PairViews(Dataset[dict[str, Tensor]]):
    """Labelled tiles under `views` fixed flips, quarter turns and zooms, which do not change colours.

    Item (index, seed) has `image` float32 (3, S, S) in [0, 1] and `mask` int64 (S, S), class indices or the ignore
    index; S is the tiles' or, where they are `halved`, half of that.
    """

    def __init__(self, tiles: Tiles, views: int, *, halved: bool = False) -> None:
        self.tiles, self.views, self.halved = tiles, views, halved

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        index, seed = key
        image, mask = view(self.tiles.images[index], self.tiles.masks[index], seed % self.views)
        image, mask = image.float() / 255, mask.long()
        if self.halved:
            images, masks = halve(image[None], mask[None], self.tiles.schema.num_classes)
            image, mask = images[0], masks[0]
        return {"image": image, "mask": mask}


def check_pairs(config: PairsConfig, schema: LabelSchema, image_size: int) -> None:
    """Refuse what training, or painting after it, would refuse: before other work that would be for nothing.

    Raises:
        TerraSynthError: as of `build_pairs`; or shares of classes that the schema does not have.
    """
    check_shares(config.sampling.shares, schema)
    if config.base is not None:  # from scratch, the recipe has been checked
        build_pairs(config, schema, image_size)
        if config.two_stages:
            build_upscaler(config, schema, image_size)


def build_pairs(config: PairsConfig, schema: LabelSchema, image_size: int) -> SatSynthPipeline:
    """What a recipe trains on tiles of this size, untrained or the `base` that it starts from; the first of two stages.

    Raises:
        TerraSynthError: the base is a second stage, or was trained with other settings or classes; or the tiles do not
            divide into the levels of the network.
    """
    side = image_size // 2 if config.two_stages else image_size
    if config.base is None:
        pipeline = _from_scratch(config, config, schema, side, asks_classes=config.asks_classes)
    else:
        pipeline = first_stage(config.base, image_size=side)
        _check_base(config, pipeline, schema)
        pipeline.schema = schema  # the names are the same, colours may differ
        pipeline.register_to_config(label_schema=schema.to_dict())
    pipeline.class_dropout, pipeline.given_dropout = config.class_dropout, config.given_dropout
    pipeline.min_snr = config.min_snr
    least = pipeline.multiple * (2 if config.two_stages else 1)
    return _divides(pipeline, image_size, least)


def _check_base(config: PairsConfig, pipeline: SatSynthPipeline, schema: LabelSchema) -> None:
    """Refuse settings and classes that a base has otherwise: an ablation would train what it had."""
    if Path(config.base or "", UPSCALER).is_dir() and not config.two_stages:
        raise TerraSynthError(
            "pairs.base has two stages, and only one would be trained",
            path=config.base,
            found="pairs.two_stages false",
            fix="set pairs.two_stages=true",
        )
    if pipeline.schema.names != schema.names:
        raise TerraSynthError(
            "pairs.base was trained with other classes, or in another order",
            path=config.base,
            found=", ".join(pipeline.schema.names),
            expected=", ".join(schema.names),
            fix="start from another base, or from scratch",
        )
    names = {
        "codes": "codes",
        "prediction": "prediction_type",
        "condition": "condition",
        "asks_classes": "asks_classes",
    }
    for name, of_base in names.items():
        wanted, has = getattr(config, name), pipeline.config[of_base]
        if wanted != has:
            raise TerraSynthError(
                f"pairs.base was trained with another pairs.{name}",
                path=config.base,
                found=wanted,
                expected=has,
                fix=f"set pairs.{name}={str(has).lower()}, or start from another base",
            )


def build_upscaler(config: PairsConfig, schema: LabelSchema, image_size: int) -> SatSynthPipeline:
    """The second stage of a recipe, untrained or its base's; arguments and errors as of `build_pairs`."""
    base = None if config.base is None else Path(config.base, UPSCALER)
    if base is None or not base.is_dir():
        pipeline = _from_scratch(config, config.upscaler, schema, image_size, condition="half")
    else:
        pipeline = SatSynthPipeline.from_pretrained(base, label_schema=schema.to_dict(), image_size=image_size)
    pipeline.min_snr = config.min_snr
    return _divides(pipeline, image_size, pipeline.multiple)


def _from_scratch(
    config: PairsConfig, sizes: PairsConfig | UpscalerConfig, schema: LabelSchema, side: int, **options: Any
) -> SatSynthPipeline:
    sides = [side // sizes.patch_size // 2**level for level in range(len(sizes.widths))]
    if sizes.attention and not set(sides) & set(sizes.attention):
        some = " or ".join(map(str, sizes.attention))
        say(f"what paints pairs has no self-attention: its feature maps have sides of {sides}, none {some} (attention)")
    return SatSynthPipeline.from_scratch(
        schema,
        codes=config.codes,
        prediction_type=config.prediction,
        patch_size=sizes.patch_size,
        widths=sizes.widths,
        layers=sizes.layers,
        attention=sizes.attention,
        image_size=side,
        seed=config.seed,
        **({"condition": config.condition} | options),
    )


def _divides(pipeline: SatSynthPipeline, image_size: int, least: int) -> SatSynthPipeline:
    if image_size % least:
        raise TerraSynthError(
            "the tiles do not divide into the levels of what paints pairs",
            found=f"data.image_size {image_size}",
            expected=f"a multiple of {least}",
            fix="change data.image_size, or patch_size or widths",
        )
    return pipeline


def first_stage(model: str | Path, **options: Any) -> SatSynthPipeline:
    """What paints pairs, loaded; options as of `SatSynthPipeline.from_pretrained`.

    Raises:
        TerraSynthError: there is none, or it is something else or a second stage.
    """
    if Path(packaged_or(model)).is_dir() and (kind := model_class(model)) != "SatSynthPipeline":
        raise TerraSynthError(
            "not the folder of what paints images and masks together",
            path=model,
            found=f"a model of {kind}",
            expected="what `terrasynth train --what pairs` printed",
        )
    pipeline = SatSynthPipeline.from_pretrained(model, **options)
    if pipeline.config.condition == "half":
        raise TerraSynthError(
            "a second stage alone paints no pairs, it enlarges them",
            path=model,
            expected="what `terrasynth train --what pairs` printed",
            fix=f"give the folder that `{UPSCALER}` lies in",
        )
    return pipeline


def fit_pairs(tiles: Tiles, config: PairsConfig, folder: Path, *, max_minutes: float | None = None) -> Outcome:
    """Train on labelled tiles what paints images and masks together; `folder/model` is the result.

    Of two stages the second is trained in `folder/upscaler`, and lies in `folder/model/upscaler`. Run again after an
    interruption it goes on from the last checkpoint; finished, it returns at once.
    """
    clock, identity = Clock(max_minutes), config.identity()
    size, schema = tiles.images.shape[-1], tiles.schema
    first = build_pairs(config, schema, size)
    second = build_upscaler(config, schema, size) if config.two_stages else None
    outcome = _fit(
        first,
        PairViews(tiles, config.views, halved=config.two_stages),
        config.train,
        folder,
        seed=config.seed,
        identity={"pairs": {name: value for name, value in identity.items() if name not in ("train", "upscaler")}},
        max_minutes=clock.left(),
        label="training what paints pairs",
    )
    if second is not None and outcome.finished:
        outcome = _fit(
            second,
            PairViews(tiles, config.views),
            config.upscaler.train,
            folder / UPSCALER,
            seed=config.seed,
            identity={"upscaler": {name: value for name, value in identity.items() if name != "train"}},
            max_minutes=clock.left(),
            label="training what enlarges pairs",
        )
    if outcome.finished and process_state().is_main_process and not (folder / "model").is_dir():
        with atomic_dir(folder / "model") as partial:
            first.save_pretrained(partial)
            if second is not None:
                second.save_pretrained(partial / UPSCALER)
    return outcome


def _fit(
    pipeline: SatSynthPipeline,
    views: PairViews,
    config: TrainConfig,
    folder: Path,
    *,
    identity: Mapping[str, object],
    **options: Any,
) -> Outcome:
    """Train one stage; its weights are on the processor afterwards."""
    pipeline.place(_DEVICE, config.precision)

    def preview(step: int) -> dict[str, float]:
        with atomic_write(folder / "previews" / f"step-{step:08d}.png") as partial:
            _show(pipeline, views.tiles).save(partial)
        return {}

    outcome = train(
        pipeline.network,
        pipeline.training_loss,
        views,
        config,
        folder,
        identity={**identity, "data": views.tiles.fingerprint()},
        evaluate=preview,
        **options,
    )
    nn.Module.to(pipeline.network, "cpu", torch.float32)
    return outcome


def _show(pipeline: SatSynthPipeline, tiles: Tiles) -> Image:
    """What a stage paints; the second enlarges the first tiles from half their size."""
    count, steps = PREVIEW
    if pipeline.config.condition != "half":
        painted = pipeline(seeds=range(count), num_steps=steps)
        return contact_sheet({"painted": painted.images.cpu()}, painted.masks.cpu(), tiles.schema)
    real = tiles.first(count)
    images, masks = halve(real.images.float() / 255, real.masks, tiles.schema.num_classes)
    large = pipeline.upscale((images * 255).round().byte(), masks, seeds=range(len(real)), num_steps=steps)
    return contact_sheet({"real": real.images, "enlarged": large.images.cpu()}, large.masks.cpu(), tiles.schema)


class TwoStages:
    """A pair of half the size, then twice as large: two pipelines as one that paints pairs.

    Args:
        first: paints.
        second: enlarges, a pipeline with the condition `half`.
    """

    def __init__(self, first: SatSynthPipeline, second: SatSynthPipeline) -> None:
        self.first, self.second = first, second
        self.schema, self.ask = first.schema, first.ask

    def __call__(
        self,
        *,
        seeds: Sequence[int],
        shares: Tensor | None = None,
        images: Tensor | None = None,
        known: Tensor | None = None,
        masks: Tensor | None = None,
        size: tuple[int, int] | None = None,
        guidance_scale: float = 1.0,
        num_steps: int = 50,
        precision: Precision | None = None,
    ) -> Pairs:
        """Paint pairs, or what is missing of pairs, as `SatSynthPipeline` does; `num_steps` are those of each stage.

        What is given has the size of the result, and the first stage is given its half.
        """
        given = Given(images, known, masks)
        if size is None and not any(each is not None for each in given):
            size = (2 * self.first.config.image_size,) * 2
        both = math.lcm(2 * self.first.multiple, self.second.multiple)
        height, width = self.first.check(seeds, shares, given, size, both)
        small = self.first(
            seeds=seeds,
            shares=shares,
            **given.halved(self.first.num_classes)._asdict(),
            size=(height // 2, width // 2),
            guidance_scale=guidance_scale,
            num_steps=num_steps,
            precision=precision,
        )
        # Other seeds: the noise of both stages would begin with the same numbers.
        others = [int(digest(int(seed), "upscale"), 16) >> 1 for seed in seeds]
        return self.second.upscale(*small, seeds=others, given=given, num_steps=num_steps, precision=precision)


def load_pairs(model: str | Path, precision: Precision) -> SatSynthPipeline | TwoStages:
    """What `fit_pairs` saved, of one stage or two, where it computes.

    Raises:
        TerraSynthError: it is something else, or damaged.
    """
    first = first_stage(model).place(_DEVICE, precision)
    if not (upscaler := Path(model, UPSCALER)).is_dir():
        return first
    return TwoStages(first, SatSynthPipeline.from_pretrained(upscaler).place(_DEVICE, precision))


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
        raise takes_no_shares(shares)

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
            raise paints_no_numbers()
        return Pairs((images * 255).round().byte(), masks)


def paint_pairs(
    pipeline: SatSynthPipeline | TwoStages | LayoutPainter,
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
    size = sampling.batch_size
    asked = pipeline.ask(sampling.shares, size) if sampling.shares else None
    writer = SyntheticWriter(folder, pipeline.schema, plan=plan, license=license)
    done = writer.done()
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
                shares=None if asked is None else asked[: len(batch)],
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
    painter: SatSynthPipeline | TwoStages | LayoutPainter
    if model_class(model) == "SatSynthPipeline":
        painter = load_pairs(model, sampling.precision)
    else:
        images = SamplingConfig() if images is None else images
        generator = load_pipeline(model)
        if not isinstance(generator, TODSynthPipeline) or not generator.paints_layouts:
            raise paints_no_layouts()
        painter = LayoutPainter(generator.place(_DEVICE, sampling.precision), images)
        provenance["sampling"] = images.model_dump(mode="json", exclude={"batch_size", "precision"})
    return paint_pairs(painter, count, sampling, folder, seed=seed, provenance=provenance, license=license)
