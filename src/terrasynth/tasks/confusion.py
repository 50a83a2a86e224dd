"""One confusion matrix, from which every segmentation metric is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from terrasynth.errors import TerraSynthError

__all__ = ["Confusion"]


@dataclass(frozen=True, eq=False)
class Confusion:
    """Pixel counts by true and predicted class.

    With n[t, p] the pixels of true class t predicted as p, tp = n[k, k], and the row and column sums n[k, :], n[:, k]::

        IoU_k = tp / (n[k, :] + n[:, k] - tp)       F1_k = 2 tp / (n[k, :] + n[:, k])
        accuracy_k = tp / n[k, :]                   OA = sum_k tp / n

    A class absent from both prediction and target has no value (NaN) and leaves the means; a class that is predicted
    but nowhere true counts 0 in all three. All metrics are float64. Matrices of parts add up to that of the whole.

    Attributes:
        matrix: int64 (K, K) on the CPU; rows are the target, columns the prediction.
    """

    matrix: Tensor

    @classmethod
    def empty(cls, num_classes: int) -> Confusion:
        """A confusion matrix of no pixels."""
        return cls(torch.zeros(num_classes, num_classes, dtype=torch.int64))

    @property
    def num_classes(self) -> int:
        """K."""
        return self.matrix.shape[0]

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.matrix + other.matrix)

    def update(self, prediction: Tensor, target: Tensor, ignore_index: int) -> None:
        """Count the labelled pixels of a batch, in place.

        Args:
            prediction: integer (..., H, W), class indices 0..K-1.
            target: integer (..., H, W), class indices 0..K-1 or `ignore_index`, which is not counted.
            ignore_index: the value of unlabelled pixels.

        Raises:
            TerraSynthError: a target is neither a class nor `ignore_index`.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
        labelled = target != ignore_index
        truth, guess = target[labelled].long(), prediction[labelled].long()
        count = self.num_classes
        if truth.numel() and (int(truth.min()) < 0 or int(truth.max()) >= count):
            raise TerraSynthError(
                "the mask holds values that are no class",
                found=sorted(set(truth.unique().tolist()) - set(range(count))),
                expected=f"0 to {count - 1}, or {ignore_index} where unlabelled",
                fix="check the label schema and the coding of the masks",
            )
        cells = torch.bincount(truth * count + guess, minlength=count * count)
        self.matrix.add_(cells.reshape(count, count).cpu())

    def _true_positives(self) -> Tensor:
        return self.matrix.diagonal().double()

    def _either(self) -> tuple[Tensor, Tensor]:
        return self.matrix.sum(1).double(), self.matrix.sum(0).double()

    @property
    def iou(self) -> Tensor:
        """Intersection over union by class, float64 (K,); NaN where the class is absent from both."""
        true, predicted = self._either()
        return self._true_positives() / (true + predicted - self._true_positives())

    @property
    def f1(self) -> Tensor:
        """F1 score (Dice coefficient) by class, float64 (K,); NaN where the class is absent from both."""
        true, predicted = self._either()
        return 2 * self._true_positives() / (true + predicted)

    @property
    def accuracy(self) -> Tensor:
        """Share of each class's true pixels that are found, float64 (K,); NaN where the class is absent from both."""
        true, predicted = self._either()
        # tp = 0 where nothing is true, so a denominator of 1 gives the 0 of a class that is only predicted.
        return self._true_positives() / torch.where(predicted > 0, true.clamp_min(1), true)

    @property
    def overall_accuracy(self) -> float:
        """OA: share of the labelled pixels that are right; NaN without any."""
        return float(self._true_positives().sum() / self.matrix.sum())

    @property
    def mean_iou(self) -> float:
        """The mean of `iou` over the classes that have one; NaN without any."""
        return float(self.iou.nanmean())

    @property
    def mean_f1(self) -> float:
        """The mean of `f1` over the classes that have one; NaN without any."""
        return float(self.f1.nanmean())

    @property
    def mean_accuracy(self) -> float:
        """The mean of `accuracy` over the classes that have one; NaN without any."""
        return float(self.accuracy.nanmean())

    def metrics(self, class_names: Sequence[str] | None = None) -> dict[str, float | None]:
        """The headline numbers by name, JSON-able: None where a metric has no value.

        Returns:
            `oa`, and the means `miou`, `macc` and `f1`; with `class_names` (K) also `iou/NAME` and `f1/NAME` for every
            class.
        """
        values = {
            "oa": self.overall_accuracy,
            "miou": self.mean_iou,
            "macc": self.mean_accuracy,
            "f1": self.mean_f1,
        }
        if class_names is not None:
            for metric, by_class in (("iou", self.iou), ("f1", self.f1)):
                values |= {f"{metric}/{name}": x for name, x in zip(class_names, by_class.tolist(), strict=True)}
        return {name: None if math.isnan(value) else value for name, value in values.items()}
