from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex

from terrasynth.errors import TerraSynthError
from terrasynth.tasks.confusion import Confusion

K = 4
IGNORE = 255


def confusion(prediction, target, ignore_index=IGNORE) -> Confusion:
    result = Confusion.empty(K)
    result.update(torch.as_tensor(prediction), torch.as_tensor(target), ignore_index)
    return result


shapes = hnp.array_shapes(min_dims=2, max_dims=3, max_side=6)
pairs = shapes.flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.int64, shape, elements=st.integers(0, K - 1)),
        hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 2, 3, IGNORE])),
    )
)


def by_hand(prediction, target):
    """Every metric from sets of pixels, one class at a time."""
    pixels = [(p, t) for p, t in zip(prediction.ravel().tolist(), target.ravel().tolist(), strict=True) if t != IGNORE]
    iou, f1, accuracy = [], [], []
    for k in range(K):
        true = {i for i, (_, t) in enumerate(pixels) if t == k}
        found = {i for i, (p, _) in enumerate(pixels) if p == k}
        hit = len(true & found)
        absent = not (true | found)
        iou.append(math.nan if absent else hit / len(true | found))
        f1.append(math.nan if absent else 2 * hit / (len(true) + len(found)))
        accuracy.append(math.nan if absent else hit / len(true) if true else 0.0)
    overall = sum(p == t for p, t in pixels) / len(pixels) if pixels else math.nan
    return overall, iou, f1, accuracy


@settings(max_examples=150, deadline=None)
@given(pairs)
def test_every_metric_equals_a_brute_force_count(pair):
    prediction, target = pair
    result = confusion(prediction, target)
    overall, iou, f1, accuracy = by_hand(prediction, target)
    np.testing.assert_allclose(result.overall_accuracy, overall, rtol=1e-14)
    for values, expected in ((result.iou, iou), (result.f1, f1), (result.accuracy, accuracy)):
        assert values.dtype == torch.float64
        np.testing.assert_allclose(values, expected, rtol=1e-14)
    for mean, values in ((result.mean_iou, iou), (result.mean_f1, f1), (result.mean_accuracy, accuracy)):
        defined = [value for value in values if not math.isnan(value)]
        np.testing.assert_allclose(mean, sum(defined) / len(defined) if defined else math.nan, rtol=1e-14)


@settings(max_examples=50, deadline=None)
@given(pairs)
def test_the_means_equal_those_of_torchmetrics(pair):
    prediction, target = (torch.as_tensor(array).long() for array in pair)
    if not (target != IGNORE).any():
        return
    result = confusion(prediction, target)

    def reference(metric, **options):
        return float(metric(num_classes=K, ignore_index=IGNORE, **options)(prediction, target))

    assert result.overall_accuracy == pytest.approx(reference(MulticlassAccuracy, average="micro"), rel=1e-5)
    assert result.mean_accuracy == pytest.approx(reference(MulticlassAccuracy, average="macro"), rel=1e-5)
    assert result.mean_f1 == pytest.approx(reference(MulticlassF1Score, average="macro"), rel=1e-5)
    assert result.mean_iou == pytest.approx(reference(MulticlassJaccardIndex, average="macro"), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(pairs, min_size=1, max_size=4))
def test_matrices_of_parts_add_up_to_that_of_the_whole(parts):
    whole = Confusion.empty(K)
    total = Confusion.empty(K)
    for prediction, target in parts:
        whole.update(torch.as_tensor(prediction), torch.as_tensor(target), IGNORE)
        total = total + confusion(prediction, target)
    assert torch.equal(whole.matrix, total.matrix)
    assert int(whole.matrix.sum()) == sum(int((target != IGNORE).sum()) for _, target in parts)


def test_rows_are_the_target():
    result = confusion(torch.tensor([[2, 2]]), torch.tensor([[1, 2]]))
    assert result.matrix[1, 2] == 1
    assert result.matrix[2, 2] == 1


def test_addition_leaves_its_terms_unchanged():
    first = confusion(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64))
    assert int((first + first).matrix.sum()) == 8
    assert int(first.matrix.sum()) == 4


def test_an_ignore_index_among_the_classes_is_left_out():
    result = confusion(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), ignore_index=0)
    assert result.matrix.tolist()[0] == [0, 0, 0, 0]
    assert result.overall_accuracy == 1.0


def test_without_labelled_pixels_every_metric_is_none_in_json():
    result = confusion(torch.zeros(3, 3, dtype=torch.int64), torch.full((3, 3), IGNORE))
    metrics = result.metrics(["a", "b", "c", "d"])
    assert set(metrics.values()) == {None}
    json.dumps(metrics, allow_nan=False)


def test_metrics_name_the_headline_numbers_and_the_classes():
    result = confusion(torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 1, 1, IGNORE]]))
    assert result.metrics(["a", "b", "c", "d"]) == {
        "oa": pytest.approx(2 / 3),
        "miou": pytest.approx(0.5),
        "macc": pytest.approx(0.5),
        "f1": pytest.approx((1 + 2 / 3) / 3),
        "iou/a": 1.0,
        "iou/b": 0.5,
        "iou/c": 0.0,
        "iou/d": None,
        "f1/a": 1.0,
        "f1/b": pytest.approx(2 / 3),
        "f1/c": 0.0,
        "f1/d": None,
    }
    assert list(result.metrics()) == ["oa", "miou", "macc", "f1"]


def test_a_target_that_is_no_class_is_named():
    with pytest.raises(TerraSynthError, match="no class") as caught:
        confusion(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 4, 200]]))
    assert caught.value.found == [4, 200]
