"""Rough maps as they really are: what segmentors predict on labelled tiles that they did not learn from.

On its own training tiles a segmentor is far better than anywhere else, so what learns to refine such maps learns to
leave them as they are. Here every tile is predicted by a segmentor that learned from the others (out of fold).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terrasynth.data.folder import Tiles
from terrasynth.errors import TerraSynthError
from terrasynth.io import digest
from terrasynth.recipe import HARMLESS, SegmentorConfig
from terrasynth.tasks.confusion import Confusion
from terrasynth.tasks.segmentation import Segmentor, fit
from terrasynth.training.units import Clock, OutOfTime, Unit, do, store_tensors, stored_tensors

__all__ = ["RoughMaps", "divide", "out_of_fold"]

_ROUGH = "rough.safetensors"


@dataclass(frozen=True, eq=False)
class RoughMaps:
    """The predictions on N tiles, in the tiles' order.

    Attributes:
        classes: uint8 (N, S, S), the likeliest class everywhere, unlabelled pixels of the masks included.
        margins: uint8 (N, S, S), by how much it is more probable than the second, 0..1 as 0..255: small along
            boundaries that are uncertain.
        folds: the fold of each tile, from 0.
        validation: uint8 (V, S, S), what the segmentor of the first fold reads in the validation tiles, to follow a
            refiner's training by; None of folds that were made before this was kept.
        units: of each fold; their results are the metrics on its labelled pixels, their keys say what the maps derive
            from.
    """

    classes: Tensor
    margins: Tensor
    folds: tuple[int, ...]
    units: tuple[Unit, ...]
    validation: Tensor | None = None


def divide(ids: Sequence[str], folds: int, seed: int, groups: Sequence[str] | None = None) -> tuple[int, ...]:
    """Folds that have as many tiles each as groups allow; without groups they differ by one at most.

    A tile's fold depends on the names and the seed, not on the order of the tiles.

    Args:
        ids: distinct names of the tiles.
        folds: how many, from 2.
        seed: of the order in which the groups are dealt out, large ones before small ones.
        groups: of each tile, what must stay together. Tiles that overlap or touch show the same roofs and fields, and
            `Tiles` does not know which do: `tiles.jsonl` of `terrasynth prepare` has the `scene` of each. None: every
            tile is by itself.

    Returns:
        The fold of each tile, from 0.

    Raises:
        TerraSynthError: there are fewer than two folds, or fewer groups than folds.
    """
    members = Counter(ids if groups is None else groups)
    if members.total() != len(ids):
        raise ValueError(f"{members.total()} groups for {len(ids)} tiles")
    if not 2 <= folds <= len(members):
        raise TerraSynthError(
            "the tiles can not be divided so",
            found=f"{folds} folds of {len(members)} {'tiles' if groups is None else 'groups of tiles'}",
            expected="from 2 folds to one for each",
            fix="ask for another number of folds, or add tiles",
        )
    sizes, fold_of = [0] * folds, {}
    for group in sorted(members, key=lambda group: (-members[group], digest(seed, group))):
        fold_of[group] = sizes.index(min(sizes))
        sizes[fold_of[group]] += members[group]
    return tuple(fold_of[group] for group in (ids if groups is None else groups))


def out_of_fold(
    tiles: Tiles,
    validation: Tiles,
    config: SegmentorConfig,
    root: Path,
    *,
    folds: int,
    seed: int,
    clock: Clock,
    groups: Sequence[str] | None = None,
    before: Callable[[], object] = lambda: None,
) -> RoughMaps:
    """Predict every tile by a segmentor that was trained on the tiles of the other folds.

    Every fold is a unit of work under `root`: one that is finished is never computed again, one that was interrupted
    goes on from its checkpoint, with the same result.

    Args:
        tiles: labelled.
        validation: chooses the best step of each segmentor. Tiles of the fold may not do that: they would be predicted
            better than unseen ones.
        config: the segmentors.
        root: folder of the units.
        folds: how many; each segmentor learns from all tiles but about one in `folds`.
        seed: of the division, and of every training.
        clock: what is left of the time allowed.
        groups: of each tile; see `divide`.
        before: called once before a segmentor is trained; not at all if every fold is finished.

    Raises:
        OutOfTime: no time is left; the same call goes on.
        TerraSynthError: the tiles can not be divided so, the sets do not fit together, what was stored is damaged, or
            another process works at a fold.
    """
    fold_of = torch.tensor(divide(tiles.ids, folds, seed, groups))
    read: Tensor | None = None
    once = cache(before)
    classes, margins, units = torch.empty_like(tiles.masks), torch.empty_like(tiles.masks), []
    for fold in range(folds):
        held, others = ((fold_of == fold).nonzero().flatten(), (fold_of != fold).nonzero().flatten())
        known, unseen = tiles.take(others.tolist()), tiles.take(held.tolist())
        unit = _fold(known, unseen, validation, config, root, fold, seed, clock, once)
        found = stored_tensors(unit.folder / _ROUGH)
        classes[held], margins[held] = found["classes"], found["margins"]
        read = found.get("validation") if fold == 0 else read
        units.append(unit)
    return RoughMaps(classes, margins, tuple(fold_of.tolist()), tuple(units), read)


def _fold(
    train: Tiles,
    held: Tiles,
    validation: Tiles,
    config: SegmentorConfig,
    root: Path,
    fold: int,
    seed: int,
    clock: Clock,
    before: Callable[[], object],
) -> Unit:
    """One fold: a segmentor learns from `train` and predicts `held`."""
    schema = train.schema

    def work(folder: Path) -> dict[str, Any]:
        before()
        segmentor = Segmentor.build(config, schema.num_classes, schema.ignore_index, seed, class_names=schema.names).to(
            "cuda" if torch.cuda.is_available() else "cpu"
        )
        outcome = fit(
            segmentor,
            train,
            validation,
            config,
            folder / "training",
            seed=seed,
            max_minutes=clock.left(),
            label=f"fold {fold}, seed {seed}",
        )
        if not outcome.finished:
            raise OutOfTime
        classes, margins = _predicted(segmentor, held.images)
        others = {} if fold else {"validation": _predicted(segmentor, validation.images)[0]}
        store_tensors(folder / _ROUGH, classes=classes, margins=margins, **others)
        confusion = Confusion.empty(schema.num_classes)
        confusion.update(classes, held.masks, schema.ignore_index)
        return confusion.metrics(schema.names)

    inputs = {
        "segmentor": config.model_dump(mode="json", exclude={"train": HARMLESS}),
        "train": train.fingerprint(),
        "validation": validation.fingerprint(),
        "predict": held.fingerprint(),
        "seed": seed,
    }
    name = f"fold {fold} seed {seed}"
    return do(root, name, inputs, clock, work, products=(_ROUGH,), scratch=("training/checkpoints",))


@torch.no_grad()
def _predicted(segmentor: Segmentor, images: Tensor, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """Classes and margins of uint8 images (N, 3, S, S), both uint8 (N, S, S) on the CPU."""
    classes, margins = [], []
    for batch in images.split(batch_size):
        shares = segmentor(batch.to(segmentor.device).float() / 255).float().softmax(1)
        first, second = shares.topk(2, dim=1).values.unbind(1)
        classes.append(shares.argmax(1).byte().cpu())
        margins.append((255 * (first - second)).round().byte().cpu())
    return torch.cat(classes), torch.cat(margins)
