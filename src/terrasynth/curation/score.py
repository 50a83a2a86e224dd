"""Asking a segmentor, once, what it finds in every painted sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terrasynth.curation.filter import class_sums, loss_codes
from terrasynth.curation.select import Table, select
from terrasynth.data.folder import Tiles, read_samples
from terrasynth.data.scores import ClassStatistics, busy, read_score, write_score
from terrasynth.data.view import code_limit
from terrasynth.data.write import read_manifest, write_rows
from terrasynth.errors import TerraSynthError, changes
from terrasynth.io import alone, remove_incomplete, weights_digest
from terrasynth.progress import say, track
from terrasynth.recipe import CurationConfig
from terrasynth.tasks.confusion import Confusion
from terrasynth.tasks.segmentation import Segmentor

__all__ = ["class_statistics", "curated_tiles", "found_in", "score_dataset"]

_BATCH = 16


def score_dataset(dataset: Path, segmentor_folder: Path, real: Tiles) -> ClassStatistics:
    """Score every sample of a dataset that has no scores yet; run again, it goes on from there.

    Samples are computed one by one, so that the scores of each are the same whatever else was to do.

    Args:
        dataset: finished, of `data.write.SyntheticWriter`; gets `scores/`, and the numbers in `metadata.jsonl`.
        segmentor_folder: of a segmentor trained on real tiles.
        real: the labelled training tiles that losses are measured by; never validation or test tiles.

    Raises:
        TerraSynthError: classes differ, the dataset has scores of another segmentor or of other tiles, or another
            process is at it.
    """
    with alone(dataset, busy(dataset)):
        return _score_dataset(dataset, segmentor_folder, real)


def _score_dataset(dataset: Path, segmentor_folder: Path, real: Tiles) -> ClassStatistics:
    schema, rows = read_manifest(dataset)
    if real.schema.names != schema.names or real.schema.ignore_index != schema.ignore_index:
        raise TerraSynthError(
            "the real tiles have other classes than the synthetic dataset",
            path=dataset,
            found=f"{', '.join(schema.names)} -> {', '.join(real.schema.names)}; ignore index {schema.ignore_index} -> "
            f"{real.schema.ignore_index}",
            expected="the same classes in the same order, and the same ignore index",
            fix="give the recipe whose training tiles the generator learned from",
        )
    size = real.masks.shape[-1]
    if other := next((row for row in rows if (row["width"], row["height"]) != (size, size)), None):
        say(
            f"the real tiles have {size} x {size} pixels, {dataset / other['file_name']} {other['width']} x "
            f"{other['height']}: their losses compare only if a pixel covers the same ground in both"
        )
    segmentor = Segmentor.from_pretrained(segmentor_folder, schema=schema)
    segmentor.to("cuda" if torch.cuda.is_available() else "cpu")
    about = {"segmentor": weights_digest(segmentor_folder), "real": real.fingerprint()[:16]}
    statistics = ClassStatistics.read(dataset)
    if statistics is None:
        statistics = class_statistics(segmentor, real, about)
        statistics.write(dataset)
    elif was := changes({key: getattr(statistics, key) for key in about}, about):
        raise TerraSynthError(
            "the dataset has scores of another segmentor, or by other real tiles",
            path=dataset / "scores",
            found=", ".join(was),
            expected="one segmentor and one set of training tiles for all samples",
            fix=f"give those, or delete {dataset / 'scores'} to score anew (views have to be made again then)",
        )
    remove_incomplete(dataset / "scores")
    remove_incomplete(dataset, "metadata")
    missing = [row for row in rows if read_score(dataset, row["id"], statistics) is None]
    means = torch.tensor(statistics.mean_losses, dtype=torch.float64)
    with track(len(rows), "scoring", unit="images", done=len(rows) - len(missing)) as progress:
        for row, image, mask in read_samples(dataset, schema, missing):
            codes, numbers = _score(segmentor, torch.tensor(image).permute(2, 0, 1), torch.tensor(mask), means)
            write_score(dataset, row["id"], codes.numpy(), numbers, statistics)
            progress.advance()
    write_rows(dataset, list(rows))
    return statistics


def curated_tiles(
    tiles: Tiles, sources: Sequence[str], real: Tiles, segmentor: Segmentor, config: CurationConfig, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `score_dataset` and `curate` do to a dataset, for N painted tiles in memory.

    Args:
        tiles: painted.
        sources: the mask that each was painted under, by name.
        real: labelled training tiles.
        segmentor: trained on real tiles.
        config: the rules.
        seed: of what they draw.

    Returns:
        Positions of the M tiles used, int64 (M,); their masks without the labels that are dropped, uint8 (M, S, S);
        their weights, float64 (M,).

    Raises:
        TerraSynthError: a class is unknown, or nothing is left.
    """
    statistics = class_statistics(segmentor, real, {"segmentor": "", "real": ""})
    means, masks, scores = torch.tensor(statistics.mean_losses, dtype=torch.float64), tiles.masks.clone(), []
    with track(len(tiles), "scoring", unit="images") as progress:
        for image, mask in zip(tiles.images, masks, strict=True):
            codes, numbers = _score(segmentor, image, mask, means)
            if config.margin is not None:
                mask[codes > code_limit(config.margin)] = segmentor.ignore_index
            kept = mask[mask != segmentor.ignore_index].flatten().bincount(minlength=segmentor.num_classes)
            scores.append({**numbers, "size": mask.numel(), "kept": kept.tolist()})
            progress.advance()
    table = Table.of(tiles.ids, sources, scores, statistics)
    weights = torch.from_numpy(select(table, config, tiles.schema.names, seed).weights)
    used = weights.nonzero().flatten()
    return used, masks[used], weights[used]


def _score(segmentor: Segmentor, image: Tensor, mask: Tensor, means: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Codes, uint8 (H, W), and numbers of one sample: uint8 (3, H, W), and its mask (H, W)."""
    losses, classes = segmentor.compare(image[None], mask[None])
    numbers = found_in(mask, losses[0], classes[0], segmentor.num_classes, segmentor.ignore_index)
    return loss_codes(mask, losses[0], means), numbers


def class_statistics(segmentor: Segmentor, real: Tiles, about: Mapping[str, str]) -> ClassStatistics:
    """What the segmentor does on real tiles, class by class.

    Args:
        segmentor: trained on them.
        real: labelled training tiles.
        about: `segmentor` and `real`, the digests.

    Raises:
        TerraSynthError: the classes differ, or losses are no numbers.
    """
    segmentor.check_schema(real.schema)
    classes, ignore = real.schema.num_classes, real.schema.ignore_index
    sums, counts = torch.zeros(classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.int64)
    with track(len(real), "reading real tiles", unit="images") as progress:
        for images, masks in zip(real.images.split(_BATCH), real.masks.split(_BATCH), strict=True):
            losses, _ = segmentor.compare(images, masks)
            batch_sums, batch_counts = class_sums(losses, masks, classes, ignore)
            sums, counts = sums + batch_sums, counts + batch_counts
            progress.advance(len(images))
    if not sums.isfinite().all():
        raise TerraSynthError(
            "the segmentor's losses are no numbers", found="NaN or infinity", fix="train the segmentor again"
        )
    means = torch.where(counts > 0, sums / counts, torch.inf).tolist()
    return ClassStatistics(**about, classes=real.schema.names, pixels=tuple(counts.tolist()), mean_losses=tuple(means))


def found_in(mask: Tensor, losses: Tensor, classes: Tensor, num_classes: int, ignore_index: int) -> dict[str, Any]:
    """What a segmentor found in one sample, JSON-able.

    Args:
        mask: (H, W), class indices or `ignore_index`.
        losses: float (H, W).
        classes: integer (H, W), as the segmentor reads the image.
        num_classes: K.
        ignore_index: the value of unlabelled pixels.

    Returns:
        `accuracy` and `miou` of the reading, and the mean `loss`, over the labelled pixels (None without any), and
        `pixels`, how many each of the K classes has.
    """
    confusion = Confusion.empty(num_classes)
    confusion.update(classes, mask, ignore_index)
    metrics = confusion.metrics()
    sums, counts = class_sums(losses, mask, num_classes, ignore_index)
    total = int(counts.sum())
    return {
        "accuracy": metrics["oa"],
        "miou": metrics["miou"],
        "loss": float(sums.sum()) / total if total else None,
        "pixels": counts.tolist(),
    }
