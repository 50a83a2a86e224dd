"""What a study paints: a dataset for every kind of painted tiles and seed, continued when more are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from terrasynth.data.folder import Tiles
from terrasynth.io import digest
from terrasynth.sampling.flow import seeded_generator
from terrasynth.study.products import painted_tiles, remade, segmentor_of
from terrasynth.systems.generate import load_pipeline, paint, plan, steering_for
from terrasynth.systems.pairs import load_pairs, paint_pairs
from terrasynth.training.units import Unit

if TYPE_CHECKING:
    from terrasynth.study.run import Study

__all__ = ["layouts", "painted"]

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layouts(study: Study, kind: str, seed: int) -> Tiles:
    """The tiles whose masks are painted.

    Those of pairs are painted masks. Others are the labelled tiles or, with `layouts: all`, these and the windows in
    turn. The windows come in an order of the seed's own; what there is less of comes again.
    """
    if "pairs" in kind:
        pairs = painted_tiles(study.painted("pairs", seed)).first(study.count(kind))
        ids = tuple(f"pairs/{id_}" for id_ in pairs.ids)
        return Tiles(ids, pairs.images, pairs.masks, study.train.schema, study.train.caption)
    if study.recipe.study.layouts == "labelled":
        return study.train
    windows = study.read(0.0)
    order = torch.randperm(len(windows), generator=seeded_generator(seed))
    turns = torch.arange(max(len(windows), len(study.train)))
    sides = [(study.train, turns % len(study.train)), (windows, order[turns % len(windows)])]
    return Tiles(
        tuple(tiles.ids[rows[turn]] for turn in turns for tiles, rows in sides),
        torch.stack([tiles.images[rows] for tiles, rows in sides], 1).flatten(0, 1),
        torch.stack([tiles.masks[rows] for tiles, rows in sides], 1).flatten(0, 1),
        study.train.schema,
        study.train.caption,
    )


def painted(study: Study, kind: str, seed: int) -> Unit:
    """The synthetic dataset of one seed and kind (`ArmConfig.kind`).

    How many are painted is not among its inputs: when more are asked for, the dataset is continued.
    """
    return _pairs(study, seed) if kind == "pairs" else _under_masks(study, kind, seed)


def _pairs(study: Study, seed: int) -> Unit:
    """Images with their masks, by what was trained on the training tiles."""
    sampling, count = study.recipe.pairs.sampling, study.count("pairs")
    inputs = {
        "pairs": study.pairs.key,
        "sampling": sampling.model_dump(mode="json", exclude={"batch_size"}),
        "seed": seed,
    }

    def work(folder: Path) -> None:
        with remade(study.pairs):
            painter = load_pairs(study.pairs.folder / "model", sampling.precision)
        paint_pairs(
            painter,
            count,
            sampling,
            folder / "dataset",
            seed=seed,
            provenance={"recipe": digest(inputs), "model": study.pairs.key},
            between=study.check_clock,
            label=f"painting pairs, seed {seed}",
        )

    return study.unit("paint (pairs)", "synthetic", f"pairs seed {seed}", inputs, work, products=_products(count))


def _under_masks(study: Study, kind: str, seed: int) -> Unit:
    """Images under masks, `steered` by the teacher of the same seed or `plain`; `-like` have references."""
    recipe, count = study.recipe, study.count(kind)
    referenced, on_pairs = "-like" in kind, kind.endswith("-on-pairs")
    steers = study.cell(study.teacher, seed) if kind.startswith("steered") else None
    references = study.windows if referenced else None
    of_masks = study.reading(0.0).key if recipe.study.layouts == "all" else None
    if on_pairs:
        of_masks = study.painted("pairs", seed).key
    inputs: dict[str, Any] = {
        "generator": study.generator.key,
        "sampling": recipe.sampling.model_dump(
            mode="json", exclude={"batch_size"} | (set() if referenced else {"reference_scale"})
        ),
        "steering": None if steers is None else recipe.steering.model_dump(mode="json"),
        "segmentor": None if steers is None else steers.key,
        "seed": seed,
        "layouts": of_masks,
    }
    if references is not None:  # only named where there are any
        inputs["references"] = references.fingerprint()

    def work(folder: Path) -> None:
        masks = layouts(study, kind, seed)
        with remade(study.generator):
            pipeline = load_pipeline(study.generator.folder / "model").place(_DEVICE, recipe.sampling.precision)
        paint(
            pipeline,
            masks.masks,
            masks.ids,
            plan(count, len(masks), seed, 0 if references is None else len(references), turned=not on_pairs),
            recipe.sampling,
            folder / "dataset",
            provenance={
                # Of the settings that the samples depend on: others may change while they are painted.
                "recipe": digest(inputs),
                "run_seed": seed,
                **{name: inputs[name] for name in ("generator", "segmentor", "sampling", "steering")},
            },
            # More pairs bring more masks, behind the ones that were painted.
            layouts=of_masks if on_pairs else None,
            between=study.check_clock,
            references=references,
            steering=None if steers is None else steering_for(recipe.steering, segmentor_of(steers).loss),
            label=f"painting {kind}, seed {seed}",
        )

    return study.unit(f"paint ({kind})", "synthetic", f"{kind} seed {seed}", inputs, work, products=_products(count))


def _products(count: int) -> tuple[str, ...]:
    return "dataset/metadata.jsonl", f"dataset/images/{count - 1:06d}.png"
