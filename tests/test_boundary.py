from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from safetensors.numpy import load_file
from scipy import ndimage

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.tasks.bands import as_labels, dilate, disc, edge_map, ellipse, planes, square, weighted_f
from terrasynth.tasks.boundary import BoundaryScores, BoundarySettings, Tolerance, evaluate_maps
from terrasynth.tasks.repair import repair_score

PUBLISHED = Path(__file__).parent / "fixtures" / "published_idgbr" / "weighted_f.safetensors"
K = 3
IGNORE = 255
STRANGE = 7
SCHEMA = LabelSchema(("land", "road", "water"), ((0, 200, 0), (200, 0, 0), (0, 0, 200)), ignore_index=IGNORE)
SETTINGS = BoundarySettings(Tolerance(2), Tolerance(1.5), Tolerance(2.3))


def score(prediction, truth, options=SETTINGS, *, schema=SCHEMA, rough=None, gsd=None) -> BoundaryScores:
    result = BoundaryScores(schema, options, gsd)
    result.update("a", np.asarray(prediction), np.asarray(truth), None if rough is None else np.asarray(rough))
    return result


def equal(values, expected):
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)


shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=7)


def maps(*values):
    # Few different values and a fill: patches with boundaries between them, not noise alone.
    return lambda shape: hnp.arrays(np.uint8, shape, elements=st.sampled_from(values), fill=st.sampled_from(values))


truths = maps(0, 1, 2, IGNORE)
predictions = maps(0, 1, 2, STRANGE, IGNORE)
pairs = shapes.flatmap(lambda shape: st.tuples(predictions(shape), truths(shape)))
triples = shapes.flatmap(lambda shape: st.tuples(predictions(shape), predictions(shape), truths(shape)))


# --- brute force -----------------------------------------------------------------------------------------------------


class ByHand:
    """Every metric from sets of pixels, one pixel and one class at a time."""

    def __init__(self, prediction, truth):
        self.pixels = [(int(y), int(x)) for y, x in np.argwhere(truth != IGNORE)]
        self.truth = {p: int(truth[p]) for p in self.pixels}
        # "none" is equal to itself alone: all strange values are the same.
        self.guess = {p: int(prediction[p]) if prediction[p] < K else "none" for p in self.pixels}

    def window(self, p, inside):
        return [q for q in self.pixels if inside(abs(q[0] - p[0]), abs(q[1] - p[1]))]

    def border(self, labels, p, inside):
        return any(labels[q] != labels[p] for q in self.window(p, inside))

    def boundary_iou(self, d):
        def band(labels, k):
            return {p for p in self.pixels if labels[p] == k and self.border(labels, p, lambda y, x: max(y, x) <= d)}

        for k in range(K):
            a, b = band(self.truth, k), band(self.guess, k)
            yield len(a & b) / len(a | b) if a | b else math.nan

    def bf(self, tolerance):
        def line(labels, k):
            return [p for p in self.pixels if labels[p] == k and self.border(labels, p, lambda y, x: y + x <= 1)]

        def near(some, others):
            return sum(any(math.dist(p, q) <= tolerance for q in others) for p in some) / len(some) if some else 0

        for k in range(K):
            a, b = line(self.truth, k), line(self.guess, k)
            precision, recall = near(b, a), near(a, b)
            f = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
            yield f if a or b else math.nan

    def mba(self):
        # Maps this small have the radius 1 five times; OpenCV's ellipse of side 3 is a cross.
        for k in range(K):
            true, guess = ({p: x == k for p, x in labels.items()} for labels in (self.truth, self.guess))
            band = [p for p in self.pixels if self.border(true, p, lambda y, x: y + x <= 1)]
            yield sum(true[p] == guess[p] for p in band) / len(band) if band else math.nan
        band = [p for p in self.pixels if self.border(self.truth, p, lambda y, x: y + x <= 1)]
        yield sum(self.truth[p] == self.guess[p] for p in band) / len(band) if band else math.nan

    def iou(self):
        for k in range(K):
            a, b = ({p for p in self.pixels if labels[p] == k} for labels in (self.truth, self.guess))
            yield len(a & b) / len(a | b) if a | b else math.nan

    def trimap_iou(self, distance):
        band = [p for p in self.pixels if self.border(self.truth, p, lambda y, x: math.hypot(y, x) <= distance)]
        for k in range(K):
            a, b = ({p for p in band if labels[p] == k} for labels in (self.truth, self.guess))
            yield len(a & b) / len(a | b) if a | b else math.nan


@settings(max_examples=80, deadline=None)
@given(pairs)
def test_every_metric_by_class_equals_a_brute_force_count(pair):
    result, by_hand = score(*pair), ByHand(*pair)
    for pooled in (False, True):  # of one map it is the same
        equal(result.boundary_iou(pooled=pooled), [*by_hand.boundary_iou(2)])
        equal(result.bf(pooled=pooled), [*by_hand.bf(1.5)])
        equal(result.mba(pooled=pooled), [*by_hand.mba()])
        equal(result.trimap_iou(pooled=pooled), [*by_hand.trimap_iou(2.3)])
        equal(result.iou(pooled=pooled), [*by_hand.iou()])


@settings(max_examples=40, deadline=None)
@given(triples, st.sampled_from([0.5, 1.0, 2.0]))
def test_the_repair_score_equals_a_brute_force_count(triple, damage):
    refined, rough, truth = triple
    result = score(refined, truth, BoundarySettings(damage=damage), rough=rough).repair()
    for k, value in enumerate(result.tolist()):
        m, r, t = ({p for p in np.ndindex(truth.shape) if a[p] == k and truth[p] != IGNORE} for a in triple)
        right = t & r
        wrong = (t | r) - right
        if not wrong:
            assert math.isnan(value)
            continue
        in_wrong = len(m & t & wrong) / len((m | t) & wrong) if (m | t) & wrong else 1.0
        in_right = len(m & t & right) / len((m | t) & right) if right else 1.0
        assert value == pytest.approx(in_wrong - damage * (1 - in_right), abs=1e-12)


def edges_by_hand(labels, num_classes, size):
    """One Sobel gradient for each class, neighbour by neighbour."""
    height, width = labels.shape
    kernel = {(y, x): x * (2 - abs(y)) for y, x in itertools.product((-1, 0, 1), repeat=2)}

    def mirrored(i, n):
        return 0 if n == 1 else n - 1 - abs(n - 1 - abs(i))

    edge = set()
    for y, x in np.argwhere(labels >= 0).tolist():
        for k in range(num_classes + 1):
            gradient = [0, 0]
            for (dy, dx), weight in kernel.items():
                value = labels[mirrored(y + dy, height), mirrored(x + dx, width)]
                there = (labels[y, x] if value < 0 else value) == k
                gradient[0] += weight * there
                value = labels[mirrored(y + dx, height), mirrored(x + dy, width)]
                there = (labels[y, x] if value < 0 else value) == k
                gradient[1] += weight * there
            if gradient != [0, 0]:
                edge.add((y, x))
    found = np.zeros(labels.shape, dtype=bool)
    for (y, x), dy, dx in itertools.product(
        edge, range(-(size // 2), size // 2 + 1), range(-(size // 2), size // 2 + 1)
    ):
        if 0 <= y + dy < height and 0 <= x + dx < width:
            found[y + dy, x + dx] = True
    return found & (labels >= 0)


@settings(max_examples=30, deadline=None)
@given(
    shapes.flatmap(lambda shape: hnp.arrays(np.int16, shape, elements=st.integers(-1, 25), fill=st.integers(-1, 25))),
    st.sampled_from([1, 3, 5]),
)
def test_edge_maps_equal_a_brute_force_gradient(labels, size):
    # 26 labels take two rounds of thirteen digits.
    np.testing.assert_array_equal(edge_map(labels, 25, size), edges_by_hand(labels, 25, size))


@pytest.mark.parametrize(
    "labels",
    [
        # In the gradient of the indices, 2 * 2 on the left is as much as 1 + 2 * 1 + 1 on the right.
        [[0, 0, 1], [2, 0, 1], [0, 0, 1]],
        # The same with 1, 2 and 4 in place of 0, 1 and 2.
        [[2, 0, 0], [0, 0, 1], [0, 1, 1]],
    ],
)
def test_edges_between_several_classes_do_not_cancel_out(labels):
    assert edge_map(np.array(labels, dtype=np.int16), 3, 1)[1, 1]


@settings(max_examples=30, deadline=None)
@given(shapes.flatmap(lambda shape: st.tuples(*[hnp.arrays(np.bool_, shape)] * 3)))
def test_weighted_f_equals_a_brute_force_sum(arrays):
    prediction, truth, known = arrays
    value = weighted_f(prediction, truth, known)
    inside = [tuple(p) for p in np.argwhere(truth & known).tolist()]
    if not inside:
        assert math.isnan(value)
        return
    # Which of several nearest pixels is meant is scipy's choice, as it is in the published code.
    nearest = ndimage.distance_transform_edt(~(truth & known), return_distances=False, return_indices=True)
    weights = {o: math.exp(-(o[0] ** 2 + o[1] ** 2) / 50) for o in itertools.product(range(-3, 4), repeat=2)}
    total = sum(weights.values())
    missed = false = 0.0
    for p in np.ndindex(truth.shape):
        if p in inside and not prediction[p]:
            for offset, weight in weights.items():
                q = (p[0] + offset[0], p[1] + offset[1])
                if 0 <= q[0] < truth.shape[0] and 0 <= q[1] < truth.shape[1]:
                    missed += weight / total * (not prediction[tuple(nearest[:, q[0], q[1]])])
        elif known[p] and prediction[p] and p not in inside:
            distance = min(math.dist(p, q) for q in inside)
            false += 2 - 0.5 ** (distance / 5)
    recall = 1 - missed / len(inside)
    hit = len(inside) - missed
    precision = hit / (hit + false)
    assert value == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(pairs, st.integers(1, 9))
def test_with_frame_the_bands_are_those_of_the_published_erosion(pair, d):
    prediction, truth = pair
    truth = np.where(truth == IGNORE, 0, truth)  # the original has no unlabelled pixels
    result = score(prediction, truth, BoundarySettings(band=Tolerance(d), frame=True)).boundary_iou()

    def band(mask):
        return mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=d, border_value=0)

    for k, value in enumerate(result.tolist()):
        a, b = band(truth == k), band(prediction == k)
        equal(value, (a & b).sum() / (a | b).sum() if (a | b).any() else math.nan)


def test_windows_are_what_their_names_say():
    bits = np.zeros((1, 61, 61), dtype=np.uint8)
    bits[0, 30, 30] = 1
    y, x = np.abs(np.mgrid[-30:31, -30:31])
    for radius in (1, 1.5, 2, 2.3, 5, 7.1, 13, 25.5, 29):
        np.testing.assert_array_equal(dilate(bits, disc(radius))[0], y**2 + x**2 <= radius**2)
        np.testing.assert_array_equal(dilate(bits, square(int(radius)))[0], np.maximum(y, x) <= int(radius))
    # Rows of cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), from the middle outwards.
    assert ellipse(1) == [1, 0]
    assert ellipse(2) == [2, 2, 0]
    assert ellipse(6) == [6, 6, 6, 5, 4, 3, 0]
    for radius in (1, 2, 6, 21):
        inside = np.array(
            [[column <= ellipse(radius)[row] if row <= radius else False for column in x[0]] for row in y[:, 0]]
        )
        np.testing.assert_array_equal(dilate(bits, ellipse(radius))[0], inside)


def test_planes_hold_every_label_of_a_schema_of_255_classes():
    labels = np.arange(-1, 256, dtype=np.int16)[None]
    bits = np.unpackbits(planes(labels, 255), axis=0)
    assert bits.shape == (256, 1, 257)
    np.testing.assert_array_equal(bits[:, 0, 0], 0)
    np.testing.assert_array_equal(bits[:, 0, 1:], np.eye(256))


# --- as published ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_the_published_edge_maps_and_weighted_f_are_reproduced(index):
    tensors = load_file(PUBLISHED)
    classes = 2 if index < 2 else 5
    schema = LabelSchema(tuple("abcde"[:classes]), tuple((k + 1, 0, 0) for k in range(classes)))
    label, prediction = tensors[f"label_{index}"], tensors[f"pred_{index}"]
    for values, name in ((label, "label"), (prediction, "pred")):
        edges = edge_map(as_labels(values, classes, np.zeros(values.shape, dtype=bool)), classes)
        np.testing.assert_array_equal(edges, tensors[f"{name}_edge_{index}"])
    result = score(prediction, label, schema=schema)
    np.testing.assert_allclose(result.weighted_f(), tensors[f"wf_{index}"], rtol=0, atol=1e-9)
    metrics = result.metrics()
    assert metrics["wf"] == pytest.approx(min(tensors[f"wf_{index}"]), abs=1e-9)
    assert [metrics["wf/non-edge"], metrics["wf/edge"]] == result.weighted_f().tolist()


def test_the_least_weighted_f_skips_an_exact_zero_and_the_edge_tells_it():
    _, truth = squares()
    scores = score(np.zeros_like(truth), truth)
    # Around an edge that is missed everywhere, the Gaussian sees errors alone.
    assert scores.weighted_f()[1] == pytest.approx(0, abs=1e-12)
    scores.maps["a"].weighted_f[1] = 0.0
    metrics = scores.metrics()
    assert metrics["wf/edge"] == 0.0
    assert metrics["wf"] == metrics["wf/non-edge"] > 0.9
    scores.maps["a"].weighted_f[0] = 0.0
    assert scores.metrics()["wf"] == 0.0


def test_mba_looks_around_the_boundary_at_the_published_radii():
    rng = np.random.default_rng(0)
    truth = (ndimage.gaussian_filter(rng.normal(size=(30, 1290)), 3) > 0).astype(np.uint8)
    prediction = np.where(rng.random(truth.shape) < 0.1, 1 - truth, np.roll(truth, 2, axis=1))
    # (30 + 1290) / 300 = 4.4: the radii are 1 + [0, 0.68, 1.36, 2.04, 2.72] cut off.
    elements = {1: ["010", "111", "010"], 2: ["00100", "11111", "11111", "11111", "00100"]}
    elements[3] = ["0001000", "0111110", "1111111", "1111111", "1111111", "0111110", "0001000"]
    accuracies = []
    for radius in (1, 1, 2, 3, 3):
        element = np.array([[c == "1" for c in row] for row in elements[radius]])
        outer = ndimage.binary_dilation(truth == 1, element)
        inner = ndimage.binary_erosion(truth == 1, element, border_value=1)
        accuracies.append((prediction == truth)[outer & ~inner].mean())
    expected = np.mean(accuracies)
    equal(score(prediction, truth).mba(), [expected, expected, math.nan, expected])


# --- closed forms ----------------------------------------------------------------------------------------------------


def squares():
    truth = np.zeros((60, 60), dtype=np.uint8)
    prediction = truth.copy()
    truth[20:40, 20:40] = 1
    prediction[20:40, 23:43] = 1
    return prediction, truth


def test_a_square_that_lies_three_pixels_off():
    prediction, truth = squares()
    # Rings of width 2: 20^2 - 16^2 pixels, which share 17 columns of the upper and of the lower side.
    result = score(prediction, truth, BoundarySettings(Tolerance(2), Tolerance(1), Tolerance(2)))
    assert result.boundary_iou()[1] == pytest.approx(68 / (2 * 144 - 68))
    # Of 76 contour pixels, 18 of the upper and of the lower side, and the one below and above them, are near.
    assert result.bf()[1] == pytest.approx(38 / 76)
    assert score(prediction, truth, BoundarySettings(contour=Tolerance(2.99))).bf()[1] < 1
    assert score(prediction, truth, BoundarySettings(contour=Tolerance(3))).bf()[1] == 1


def test_a_straight_boundary_that_lies_three_pixels_off():
    truth = np.zeros((20, 20), dtype=np.uint8)
    prediction = truth.copy()
    truth[:, 10:] = 1
    prediction[:, 13:] = 1
    result = score(prediction, truth, BoundarySettings(Tolerance(4), Tolerance(2), Tolerance(3)))
    # Of land, columns 6 to 9 are the true band and 9 to 12 the predicted one; of road, 10 to 13 and 13 to 16.
    equal(result.boundary_iou(), [1 / 7, 1 / 7, math.nan])
    equal(result.bf(), [0, 0, math.nan])
    # Within 1 of the boundary are columns 9 and 10, the second of which is wrong.
    equal(result.mba(), [0.5, 0.5, math.nan, 0.5])
    # The trimap is columns 7 to 12, the right half of which is land instead of road.
    equal(result.trimap_iou(), [0.5, 0, math.nan])


def test_one_stray_pixel_of_a_class_that_is_nowhere_true_is_a_zero_and_not_nothing():
    truth = np.zeros((20, 20), dtype=np.uint8)
    truth[:, 10:] = 1
    prediction = truth.copy()
    prediction[10, 10] = 2
    result = score(prediction, truth)
    assert result.boundary_iou()[2] == result.bf()[2] == result.trimap_iou()[2] == 0
    assert math.isnan(result.mba()[2])  # it looks around true boundaries alone


def test_the_repair_score_of_the_truth_the_rough_map_and_a_worse_one():
    truth = np.zeros((10, 10), dtype=np.uint8)
    truth[:, 5:] = 1
    rough = truth.copy()
    rough[:, 5] = 0
    rough[0, 0:2] = 2
    half = rough.copy()
    half[:5, 5] = 1
    worse = rough.copy()
    worse[:, 6:] = 0

    def of(refined):
        return score(refined, truth, rough=rough)

    equal(of(truth).repair(), [1, 1, 1])
    equal(of(rough).repair(), [0, 0, 0])
    # Half of the missing column is road again; of land, the five pixels too much and the two missing are left.
    equal(of(half).repair(), [0, 0.5, 0])
    equal(of(worse).repair(), [0, -1, 0])
    assert of(truth).metrics()["repair/complete"] == 1
    half[:8, 5] = 1  # 0.8 of it
    assert of(half).metrics()["repair/complete"] == pytest.approx(1 / 3)
    metrics = of(worse).metrics()
    assert [metrics[f"repair/{grade}"] for grade in ("complete", "partial", "error")] == pytest.approx(
        [0, 2 / 3, 1 / 3]
    )
    assert metrics["iou_imp"] == pytest.approx(-1 / 3)
    assert metrics["iou_imp/road"] == -1
    equal(repair_score(worse, rough, truth, K, damage=0.25), [0, -0.25, 0])
    # Nothing is wrong, so there is nothing to repair, and no such metric.
    assert "iou_imp" not in score(truth, truth, rough=truth).metrics()
    assert "iou_imp" not in score(truth, truth).metrics()


@settings(max_examples=30, deadline=None)
@given(pairs)
def test_a_perfect_map_has_1_everywhere(pair):
    _, truth = pair
    metrics = score(truth, truth).metrics()
    assert metrics.pop("no_class") in (0, None)
    assert all(value is None or value == pytest.approx(1, abs=1e-12) for value in metrics.values())
    present = set(np.unique(truth).tolist()) - {IGNORE}
    assert all(metrics[f"boundary_iou/{SCHEMA.names[k]}"] is None for k in set(range(K)) - present)


# --- codings ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(pairs, st.permutations(range(K)))
def test_other_numbers_for_the_classes_change_nothing(pair, order):
    prediction, truth = pair
    table = np.arange(256, dtype=np.uint8)
    table[:K] = order
    result, renumbered = score(prediction, truth), score(table[prediction], table[truth])
    for metric in ("boundary_iou", "bf", "trimap_iou"):
        equal(getattr(renumbered, metric)()[list(order)], getattr(result, metric)())
    equal(renumbered.mba()[[*order, K]], result.mba())
    equal(renumbered.weighted_f(), result.weighted_f())


def write(folder, masks, coding=lambda mask: mask):
    folder.mkdir(parents=True)
    for name, mask in masks.items():
        Image.fromarray(coding(mask)).save(folder / f"{name}.png")
    return folder


def world(seed=0, count=3, size=48):
    rng = np.random.default_rng(seed)
    truth, prediction = {}, {}
    for index in range(count):
        noise = ndimage.gaussian_filter(rng.normal(size=(size, size, K)), (3, 3, 0))
        truth[f"t{index}"] = noise.argmax(2).astype(np.uint8)
        truth[f"t{index}"][:4, :9] = IGNORE
        shifted = np.roll(truth[f"t{index}"], (2, 1), axis=(0, 1))
        prediction[f"t{index}"] = np.where(shifted == IGNORE, 1, shifted)
    return prediction, truth


def test_what_files_store_for_the_classes_changes_nothing(tmp_path):
    schema = LabelSchema(SCHEMA.names, SCHEMA.colors, IGNORE, values=(9, 255, 40), ignore_values=(0,))
    prediction, truth = world()
    expected = evaluate_maps(prediction, truth, SCHEMA).metrics()
    assert 0.1 < expected["wf"] < 0.95
    plain = evaluate_maps(write(tmp_path / "p", prediction), write(tmp_path / "t", truth), SCHEMA)
    assert plain.metrics() == expected
    coded = evaluate_maps(
        write(tmp_path / "cp", prediction, schema.to_index), write(tmp_path / "ct", truth, schema.to_index), schema
    )
    assert coded.metrics() == expected
    assert coded.maps.keys() == {"t0", "t1", "t2"}
    colours = write(tmp_path / "colours", truth, SCHEMA.to_color)
    assert evaluate_maps(tmp_path / "p", colours, SCHEMA, coding="color").metrics() == expected
    assert evaluate_maps(tmp_path / "p", colours, SCHEMA).metrics() == expected
    mixed = {name: tmp_path / "p" / f"{name}.png" for name in prediction}
    tensors = {name: torch.from_numpy(mask) for name, mask in truth.items()}
    assert evaluate_maps(mixed, tensors, SCHEMA).metrics() == expected


def test_binary_masks_of_0_and_255_score_as_those_of_0_and_1(tmp_path):
    # The published evaluation gives a perfect prediction 0.643 here.
    _, truth = squares()
    stored = LabelSchema(("land", "road"), ((0, 0, 0), (255, 255, 255)), 2, ((1, 2, 3),), values=(0, 255))
    folder = write(tmp_path / "t", {"a": truth}, lambda mask: mask * 255)
    metrics = evaluate_maps({"a": truth}, folder, stored).metrics()
    assert {metrics[name] for name in ("wf", "wf/edge", "boundary_iou", "bf", "mba", "trimap_iou")} == {1}


# --- predictions that are no class -----------------------------------------------------------------------------------


def test_predicted_pixels_that_are_no_class_are_wrong(tmp_path):
    prediction, truth = world(count=1)
    strange = prediction["t0"].copy()
    strange[24:] = STRANGE
    whole, half = (
        evaluate_maps(prediction, truth, SCHEMA).metrics(),
        score(strange, truth["t0"], BoundarySettings()).metrics(),
    )
    labelled = truth["t0"] != IGNORE
    assert half["no_class"] == pytest.approx((strange == STRANGE)[labelled].mean())
    assert whole["no_class"] == 0
    for name in ("boundary_iou", "bf", "mba", "trimap_iou", "wf/edge"):
        assert half[name] < whole[name] * 0.8
    # In a file they are what the schema does not know, or unlabelled; that is the same.
    folder = write(tmp_path / "p", {"t0": strange})
    unlabelled = write(tmp_path / "u", {"t0": np.where(strange == STRANGE, IGNORE, strange).astype(np.uint8)})
    assert evaluate_maps(folder, truth, SCHEMA).metrics() == half
    assert evaluate_maps(unlabelled, truth, SCHEMA).metrics() == half


# --- what is left out ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(pairs, st.integers(0, 2**32 - 1))
def test_what_is_predicted_at_unlabelled_pixels_changes_nothing(pair, seed):
    prediction, truth = pair
    other = np.random.default_rng(seed).choice(np.array([0, 1, 2, STRANGE], dtype=np.uint8), truth.shape)
    other = np.where(truth == IGNORE, other, prediction)
    assert score(prediction, truth).metrics() == score(other, truth).metrics()


def test_the_border_of_a_class_with_unlabelled_pixels_and_with_the_frame_is_no_boundary():
    truth = np.zeros((30, 30), dtype=np.uint8)
    truth[10:20, 5:25] = IGNORE
    metrics = score(truth, truth).metrics()
    assert metrics.pop("no_class") == 0
    assert metrics.pop("wf") == metrics.pop("wf/non-edge") == 1
    assert metrics.pop("iou") == metrics.pop("iou/land") == 1
    assert set(metrics.values()) == {None}
    framed = score(truth, truth, BoundarySettings(band=Tolerance(2), frame=True))
    assert framed.maps["a"].band[:, 0].tolist() == [30**2 - 26**2] * 3


def test_boundaries_end_at_unlabelled_pixels():
    truth = np.zeros((30, 30), dtype=np.uint8)
    truth[:, 15:] = 1
    truth[10:20, 5:25] = IGNORE
    counts = score(truth, truth, BoundarySettings(Tolerance(2), Tolerance(1), Tolerance(2))).maps["a"]
    # Twenty rows are left of a boundary of thirty. Bands look across: none of their pixels is unlabelled.
    assert counts.contour.tolist() == [[20, 20, 0]] * 4
    assert counts.band.tolist() == [[40, 40, 0]] * 3
    assert counts.trimap.sum() == 80
    assert counts.labelled.tolist() == [700, 0]


def test_without_a_labelled_pixel_every_metric_is_none_in_json():
    metrics = score(np.zeros((5, 5), dtype=np.uint8), np.full((5, 5), IGNORE, dtype=np.uint8)).metrics()
    assert set(metrics.values()) == {None}
    json.dumps(metrics, allow_nan=False)


# --- a data set ------------------------------------------------------------------------------------------------------


def test_counts_are_pooled_and_scores_are_averaged():
    prediction, truth = world()
    scores = evaluate_maps(prediction, truth, SCHEMA, settings=SETTINGS)
    alone = [score(prediction[name], truth[name]) for name in truth]
    for metric in ("boundary_iou", "bf", "mba", "trimap_iou"):
        single = [getattr(one, metric)() for one in alone]
        equal(getattr(scores, metric)(pooled=False), np.nanmean(single, axis=0))
    equal(scores.weighted_f(), np.mean([one.weighted_f() for one in alone], axis=0))
    # Side by side, and so far apart that no window reaches across, maps have the counts of all.
    gap = np.full((48, 20), IGNORE, dtype=np.uint8)
    strip = [np.hstack([part for name in truth for part in (side[name], gap)]) for side in (prediction, truth)]
    together = score(*strip)
    for metric in ("boundary_iou", "bf", "trimap_iou"):
        equal(getattr(scores, metric)(pooled=True), getattr(together, metric)())
    equal(scores.boundary_iou(), scores.boundary_iou(pooled=True))
    equal(scores.bf(), scores.bf(pooled=False))
    equal(scores.mba(), scores.mba(pooled=False))
    equal(scores.trimap_iou(), scores.trimap_iou(pooled=True))
    assert not np.allclose(scores.boundary_iou(), scores.boundary_iou(pooled=False))


def test_a_map_without_a_class_leaves_the_mean_of_the_class():
    prediction, truth = squares()
    scores = BoundaryScores(SCHEMA, SETTINGS)
    scores.update("a", prediction, truth)
    before = scores.bf()
    scores.update("b", np.zeros_like(truth), np.zeros_like(truth))
    equal(scores.bf(), before)
    assert math.isnan(scores.bf()[2])
    metrics = scores.metrics()
    assert metrics["bf/water"] is None
    assert metrics["bf"] == pytest.approx(before[:2].mean())
    assert metrics["mba"] == scores.mba()[-1]
    assert list(metrics)[:5] == ["iou", "boundary_iou", "bf", "trimap_iou", "mba"]


# --- tolerances ------------------------------------------------------------------------------------------------------


def test_a_tolerance_in_metres_is_one_in_pixels_over_the_gsd():
    prediction, truth = world(count=1)
    pixels = [Tolerance(3), Tolerance(2), Tolerance(7)]
    metres = [Tolerance(0.9, "m"), Tolerance(0.6, "m"), Tolerance(2.1, "m")]  # 2.1 / 0.3 is a rounding above 7
    a, b = prediction["t0"], truth["t0"]
    expected = score(a, b, BoundarySettings(*pixels)).metrics()
    assert score(a, b, BoundarySettings(*metres), gsd=0.3).metrics() == expected
    assert score(a, b, BoundarySettings(*metres), gsd=0.15).metrics() != expected
    assert evaluate_maps(prediction, truth, SCHEMA, settings=BoundarySettings(*metres), gsd=0.3).metrics() == expected
    # A rounding below 3 is 3.
    assert disc(0.3 * 3 / 0.3 - 1e-15) == disc(3)
    assert disc(2.9999999999999996) == disc(3)
    assert disc(2.99) != disc(3)


def test_a_share_of_the_diagonal_is_of_each_map_and_at_least_a_pixel():
    assert Tolerance(0.02, "diagonal").pixels((300, 400)) == pytest.approx(10)
    assert Tolerance(0.02, "diagonal").pixels((3, 4)) == 1
    prediction, truth = squares()
    default = score(prediction, truth, BoundarySettings())
    # The diagonal is 84.9 pixels: d is 1.7, which the original rounds.
    equal(default.boundary_iou(), score(prediction, truth, BoundarySettings(band=Tolerance(2))).boundary_iou())
    equal(default.bf(), score(prediction, truth, BoundarySettings(contour=Tolerance(1))).bf())


@pytest.mark.parametrize(
    ("tolerance", "gsd", "message"),
    [
        (lambda: Tolerance(0), None, "must be a distance"),
        (lambda: Tolerance(math.nan), None, "must be a distance"),
        (lambda: Tolerance(1, "km"), None, "unknown unit"),
        (lambda: Tolerance(2, "m"), None, "needs the size of a pixel"),
        (lambda: Tolerance(2, "m"), 0.0, "needs the size of a pixel"),
        (lambda: Tolerance(2, "m"), 10.0, "less than a pixel"),
        (lambda: Tolerance(0.5), None, "less than a pixel"),
        (lambda: BoundarySettings(edge_size=2).band, None, "must be odd"),
    ],
)
def test_tolerances_that_mean_nothing_are_refused(tolerance, gsd, message):
    with pytest.raises(TerraSynthError, match=message):
        BoundaryScores(SCHEMA, BoundarySettings(contour=tolerance()), gsd)


# --- what is wrong with the files ------------------------------------------------------------------------------------


def test_a_missing_prediction_is_fatal_and_named(tmp_path):
    prediction, truth = world()
    folder = write(tmp_path / "p", {"t0": prediction["t0"], "more": prediction["t1"]})
    with pytest.raises(TerraSynthError, match="2 of 3 truths have no prediction") as caught:
        evaluate_maps(folder, truth, SCHEMA)
    assert caught.value.path == folder
    assert "t1, t2" in str(caught.value)
    with pytest.raises(TerraSynthError, match="1 of 3 truths have no rough map"):
        evaluate_maps(prediction, truth, SCHEMA, rough={"t0": truth["t0"], "t1": truth["t1"]})
    with pytest.raises(TerraSynthError, match="there are no truths"):
        evaluate_maps(prediction, {}, SCHEMA)
    with pytest.raises(TerraSynthError, match="no such folder"):
        evaluate_maps(tmp_path / "nowhere", truth, SCHEMA)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TerraSynthError, match="no images here"):
        evaluate_maps(prediction, tmp_path / "empty", SCHEMA)
    Image.fromarray(prediction["t0"]).save(folder / "t0.tif")
    with pytest.raises(TerraSynthError, match="several files with one name"):
        evaluate_maps(folder, truth, SCHEMA)


def test_predictions_without_a_truth_are_told_and_not_scored(monkeypatch, capsys):
    monkeypatch.setenv("TERRASYNTH_QUIET", "0")
    prediction, truth = world()
    del truth["t1"]
    assert evaluate_maps(prediction, truth, SCHEMA).maps.keys() == {"t0", "t2"}
    assert "predictions without a truth, not scored: 1" in capsys.readouterr().err


def test_all_bad_files_are_in_one_message(tmp_path):
    prediction, truth = world()
    prediction["t0"] = prediction["t0"][:40]
    folder = write(tmp_path / "p", prediction)
    (folder / "t2.png").write_bytes(b"no image")
    with pytest.raises(TerraSynthError, match="2 of 3 maps can not be used") as caught:
        evaluate_maps(folder, truth, SCHEMA)
    assert f"{folder / 't0.png'}: the prediction is not as large as its truth ((height, width) = (40, 48))" in str(
        caught.value
    )
    assert f"{folder / 't2.png'}: not an image" in str(caught.value)
    assert "(48, 48)" in str(caught.value)
    masks = write(tmp_path / "t", truth)
    for name in ("t0", "t1"):
        (masks / f"{name}.png").write_bytes(b"")
    with pytest.raises(TerraSynthError, match="2 of 3 true masks can not be used"):
        evaluate_maps(truth, masks, SCHEMA)


def write_tiff(path, values, **tags):
    path.parent.mkdir()
    options = {"height": values.shape[0], "width": values.shape[1], "count": 1, "dtype": values.dtype}
    with rasterio.open(
        path, "w", driver="GTiff", crs="EPSG:32632", transform=rasterio.Affine(0.5, 0, 0, 0, -0.5, 0), **options
    ) as file:
        file.write(values, 1)
        file.update_tags(1, **tags)
    return path.parent


def test_predictions_in_colours_or_of_other_classes_are_refused(tmp_path):
    prediction, truth = world(count=1)
    with pytest.raises(TerraSynthError, match="more than one band"):
        evaluate_maps(write(tmp_path / "p", prediction, SCHEMA.to_color), truth, SCHEMA)
    # None of the three numbers of this colour is a class, so that all of them could be taken for wrong ones.
    folder = write(tmp_path / "c", prediction, lambda mask: np.full((*mask.shape, 3), [10, 20, 30], dtype=np.uint8))
    with pytest.raises(TerraSynthError, match="more than one band"):
        evaluate_maps(folder, truth, SCHEMA)
    folder = write(tmp_path / "j", {})
    Image.fromarray(prediction["t0"]).save(folder / "t0.jpg")
    with pytest.raises(TerraSynthError, match="JPEG"):
        evaluate_maps(folder, truth, SCHEMA)
    folder = write_tiff(tmp_path / "named" / "t0.tif", prediction["t0"], class_0="land", class_1="sea", class_2="road")
    with pytest.raises(TerraSynthError, match="names of the classes in the mask are not those"):
        evaluate_maps(folder, truth, SCHEMA)
    folder = write_tiff(tmp_path / "float" / "t0.tif", prediction["t0"].astype(np.float32))
    with pytest.raises(TerraSynthError, match="not of whole numbers"):
        evaluate_maps(folder, truth, SCHEMA)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32])
def test_predictions_may_be_of_any_whole_numbers(tmp_path, dtype):
    prediction, truth = world(count=1)
    values = prediction["t0"].astype(dtype)
    values[30:] = np.iinfo(dtype).max
    names = {f"class_{k}": name for k, name in enumerate(SCHEMA.names)}
    folder = write_tiff(tmp_path / "p" / "t0.tif", values, **names)
    expected = evaluate_maps({"t0": values}, truth, SCHEMA).metrics()
    assert evaluate_maps(folder, truth, SCHEMA).metrics() == expected
    assert expected["no_class"] == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (np.zeros((4, 4)), np.zeros((4, 4), dtype=int), "the prediction is not of whole numbers"),
        (np.zeros((4, 4), dtype=int), np.zeros((4, 4)), "the truth is not of whole numbers"),
        (np.zeros((1, 4, 4), dtype=int), np.zeros((1, 4, 4), dtype=int), "the truth is no map"),
        (np.zeros((4, 5), dtype=int), np.zeros((4, 4), dtype=int), "the prediction is not as large"),
        (np.zeros((4, 4), dtype=int), np.full((4, 4), 3), "the truth holds values that are no class"),
        (np.zeros((4, 4), dtype=int), np.full((4, 4), -1), "the truth holds values that are no class"),
    ],
)
def test_maps_that_do_not_fit_are_refused_by_name(prediction, truth, message):
    with pytest.raises(TerraSynthError, match=message) as caught:
        score(prediction, truth)
    assert caught.value.path == "a"


def test_a_map_is_scored_once_and_nothing_scores_nothing():
    prediction, truth = squares()
    scores = BoundaryScores(SCHEMA)
    with pytest.raises(TerraSynthError, match="nothing to score"):
        scores.metrics()
    scores.update("a", prediction, truth)
    with pytest.raises(TerraSynthError, match="scored twice"):
        scores.update("a", prediction, truth)
