"""From labelled tiles and rough maps of them to a trained refiner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from terrasynth.data.folder import Tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.data.sheet import contact_sheet
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_dir, atomic_write
from terrasynth.recipe import RefinerConfig
from terrasynth.systems.idgbr import IDGBRPipeline
from terrasynth.systems.loading import loading
from terrasynth.systems.rough import OneClass, RoughViews
from terrasynth.training.loop import Outcome, train
from terrasynth.training.processes import process_state

__all__ = ["build_refiner", "check_refiner", "fit_refiner", "from_base", "set_up"]

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: What a preview shows of a refiner of one class.
_ONE_CLASS = LabelSchema(("rest", "class"), ((60, 60, 60), (240, 200, 40)))


def build_refiner(config: RefinerConfig, schema: LabelSchema, image_size: int) -> IDGBRPipeline:
    """An untrained refiner of the classes of `schema`, or of any with `each_class`.

    Raises:
        TerraSynthError: there is no such base, or the settings do not fit it or the size of the images.
    """
    classes = None if config.each_class else schema
    if config.base is None:
        pipeline = IDGBRPipeline.from_scratch(
            classes,
            codes=config.codes,
            conditions=config.conditions,
            sees_rough=config.sees_rough,
            prediction_type=config.prediction_type or "sample",
            patch_size=config.patch_size,
            widths=config.widths,
            image_size=image_size,
            snap_rounds=config.snap_rounds,
            seed=config.seed,
        )
    else:
        with loading(config.base, IDGBRPipeline.EXPECTED):
            stored = IDGBRPipeline.load_config(config.base)
        load = partial(IDGBRPipeline.from_pretrained, config.base)
        pipeline = from_base(load, stored, config.base, config, schema, image_size)
    return set_up(pipeline, config, image_size)


def from_base(
    load: Callable[..., IDGBRPipeline],
    stored: Mapping[str, Any],
    base: str,
    config: RefinerConfig,
    schema: LabelSchema,
    image_size: int,
) -> IDGBRPipeline:
    """A refiner of the classes of `schema`, or of any with `each_class`, that starts from another or Stable Diffusion.

    Args:
        load: makes the pipeline of the base, given settings that are not as stored.
        stored: the configuration of that pipeline.
        base: where it lies.
        config: the settings.
        schema: the classes.
        image_size: side of the images it is trained on.

    Raises:
        TerraSynthError: the settings do not fit the base.
    """
    classes = None if config.each_class else schema
    settings: dict[str, Any] = {
        "conditions": config.conditions,
        "sees_rough": config.sees_rough,
        "prediction_type": config.prediction_type,
        "image_size": image_size,
    }
    if stored.get("_class_name") == IDGBRPipeline.__name__:
        # It has its own classes until it is adapted, and an encoder made for the rounds of its votes.
        _check_conditions(stored, base, config)
        return load(**settings).adapt(classes, config.codes)
    return load(
        **settings,
        label_schema=None if classes is None else classes.to_dict(),
        each_class=config.each_class,
        codes=config.codes,
        snap_rounds=config.snap_rounds,
    )


def set_up(pipeline: IDGBRPipeline, config: RefinerConfig, image_size: int) -> IDGBRPipeline:
    """Give a pipeline the settings of its training, and return it.

    Raises:
        TerraSynthError: they do not fit it or the size of the images.
    """
    if image_size % pipeline.factor:
        raise TerraSynthError(
            "the images that the refiner learns from do not divide into what it sees as one",
            found=f"{image_size} x {image_size} pixels",
            expected=f"a multiple of {pipeline.factor}",
            fix=f"set refiner.crop to {max(1, image_size // pipeline.factor) * pipeline.factor}",
        )
    pipeline.condition_dropout, pipeline.timesteps = config.condition_dropout, config.timesteps
    if config.rough_start is not None:
        pipeline.rough_start = config.rough_start
    pipeline.check_rough_start()
    if config.alignment is None:
        return pipeline
    return pipeline.align(config.alignment, config.alignment_weight, steps=config.alignment_steps)


def check_refiner(tiles: Tiles, config: RefinerConfig) -> None:
    """Build the refiner and compute its loss on one view: what can not be trained shows here, in seconds.

    Raises:
        TerraSynthError: as `build_refiner`.
    """
    pipeline = build_refiner(config, tiles.schema, _side(tiles, config))
    dataset = _views(tiles, tiles.masks, config)
    view = {name: value[None] for name, value in dataset[0, 0].items()}
    with torch.no_grad():
        pipeline.training_loss(view | {"seed": torch.tensor([0])})


def _check_conditions(stored: Mapping[str, Any], base: str, config: RefinerConfig) -> None:
    if stored["conditions"] != config.conditions:
        raise TerraSynthError(
            "the base is a refiner that reads its conditions otherwise than the recipe's",
            path=base,
            found=f"refiner.conditions: {config.conditions}",
            expected=f"refiner.conditions: {stored['conditions']}",
            fix=f"--set refiner.conditions={stored['conditions']}",
        )


def _side(tiles: Tiles, config: RefinerConfig) -> int:
    """Side of the views that a refiner learns from."""
    side = int(tiles.images.shape[-1])
    return min(config.crop or side, side)


def _views(tiles: Tiles, rough: Tensor, config: RefinerConfig) -> RoughViews | OneClass:
    views = RoughViews(tiles, rough, config.rough, config.crop)
    return OneClass(views) if config.each_class else views


def fit_refiner(
    tiles: Tiles,
    rough: Tensor,
    config: RefinerConfig,
    folder: Path,
    *,
    score: Callable[[IDGBRPipeline], Mapping[str, float]] | None = None,
    about: Mapping[str, Any] | None = None,
    max_minutes: float | None = None,
) -> Outcome:
    """Train a refiner on labelled tiles and rough maps of them, uint8 (N, H, W); `folder/model` is the result.

    Run again after an interruption it goes on from the last checkpoint; finished, it returns at once.

    Args:
        tiles: labelled.
        rough: a rough map of each, that was made without it.
        config: the refiner.
        folder: where checkpoints, previews and the log go.
        score: numbers for the log with every preview, as `tasks.refiner_scores` has them of validation tiles.
        about: what is known of the pixels, JSON-able; the model's `trained_on` has it, and what the tiles say.
        max_minutes: stop at a checkpoint after about so long.
    """
    pipeline = build_refiner(config, tiles.schema, _side(tiles, config)).place(_DEVICE, config.train.precision)
    dataset = _views(tiles, rough, config)
    schema = pipeline.schema or _ONE_CLASS

    def preview(step: int) -> dict[str, float]:
        items = [dataset[index, index] for index in range(min(4, len(tiles)))]  # the same views in every preview
        images, before, masks = (torch.stack([item[name] for item in items]) for name in ("image", "rough", "mask"))
        after = pipeline.refine(images, before, seeds=range(len(items))).cpu()
        rows = {"image": images, "rough": _colored(before, schema), "refined": _colored(after, schema)}
        with atomic_write(folder / "previews" / f"step-{step:08d}.png") as partial:
            contact_sheet(rows, masks, schema).save(partial)
        return {} if score is None else dict(score(pipeline))

    outcome = train(
        pipeline.network,
        pipeline.training_loss,
        dataset,
        config.train,
        folder,
        seed=config.seed,
        identity={"refiner": config.identity(), "data": tiles.fingerprint()},
        evaluate=preview,
        max_minutes=max_minutes,
        label="training the refiner",
    )
    if outcome.finished and process_state().is_main_process and not (folder / "model").is_dir():
        nn.Module.to(pipeline.network, "cpu", torch.float32)
        pipeline.register_to_config(trained_on=_trained_on(tiles, pipeline, about or {}))
        with atomic_dir(folder / "model") as partial:
            pipeline.save_pretrained(partial)
    return outcome


def _trained_on(tiles: Tiles, pipeline: IDGBRPipeline, about: Mapping[str, Any]) -> dict[str, Any]:
    """What the refiner learned from, JSON-able."""
    return {
        "tiles": len(tiles),
        "data": tiles.fingerprint(),
        "classes": list(tiles.schema.names),
        "size": pipeline.config.image_size,
        **about,
    }


def _colored(maps: Tensor, schema: LabelSchema) -> Tensor:
    """Class maps (N, H, W) as pictures, uint8 (N, 3, H, W)."""
    return torch.from_numpy(schema.to_color(maps)).movedim(-1, 1)
