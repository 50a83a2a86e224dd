"""How much synthetic data is enough, and for which classes: numbers that are known, and what is drawn of them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from terrasynth.recipe import StudyConfig
from terrasynth.study.canvas import canvas
from terrasynth.study.statistics import compare, correlate
from terrasynth.study.sweep import class_gains, ratio_lines
from terrasynth.study.sweep_figures import (
    _draw_frequencies,
    _draw_ratios,
    frequency_figure,
    frequency_picture,
    ratio_figure,
    ratio_picture,
)

STUDY = StudyConfig(
    ratio=3,
    arms=[
        {"name": "real"},
        {"name": "ClassMix", "mix": "classmix"},
        {"name": "pairs", "synthetic": "pairs", "ratio": [5, 1]},
        {"name": "usual pairs", "synthetic": "pairs"},
        {"name": "both (1:3)", "synthetic": "pairs", "mix": "classmix"},
        {"name": "both (1:5)", "synthetic": "pairs", "mix": "classmix", "ratio": 5},
        {"name": "anew", "synthetic": "plain", "layouts": "pairs"},
        {"name": "filtered", "synthetic": "pairs", "filter": True},
    ],
)
SCORES = {arm.name: [0.4 + 0.01 * i, 0.43, 0.41 + 0.02 * (i % 3)] for i, arm in enumerate(STUDY.arms)}
CLASSES = [("road", (110, 193, 228)), ("land", (132, 41, 246)), ("water", (226, 169, 41)), ("tree", (20, 120, 60))]
SHARES = [0.04, 0.6, 0.25, 0.11]
OURS = [[0.30, 0.34, 0.31], [0.70, 0.71, 0.72], [0.62, 0.60, 0.64], [0.45, 0.47, 0.44]]
THEIRS = [[0.25, 0.26, 0.27], [0.71, 0.70, 0.71], [0.60, 0.60, 0.61], [0.40, 0.44, 0.43]]


def minus_real(arm):
    return compare(SCORES[arm], SCORES["real"])


def test_arms_that_differ_in_their_ratio_alone_are_one_line():
    lines = {line.name: line.points for line in ratio_lines(STUDY, SCORES)}
    zero = compare(SCORES["real"], SCORES["real"])
    assert zero.delta == 0
    assert lines == {
        "ClassMix": ((0, minus_real("ClassMix")),),
        # The one without a ratio has that of the study; the first gives the name where they have none in common.
        "pairs 1:5": (
            (0, zero),
            (1, minus_real("pairs 1:1")),
            (3, minus_real("usual pairs")),
            (5, minus_real("pairs 1:5")),
        ),
        "both": ((0, minus_real("ClassMix")), (3, minus_real("both (1:3)")), (5, minus_real("both (1:5)"))),
        "anew": ((0, zero), (3, minus_real("anew"))),
        "filtered": ((0, zero), (3, minus_real("filtered"))),
    }


def test_a_line_begins_at_the_same_arm_without_paintings():
    begins = {line.name: line.begins for line in ratio_lines(STUDY, SCORES)}
    assert begins == {"ClassMix": None, "pairs 1:5": "real", "both": "ClassMix", "anew": "real", "filtered": "real"}


def test_the_correlation_of_gain_and_frequency_is_pearsons():
    gains = class_gains("pairs", SHARES, OURS, THEIRS)
    deltas = [np.mean(np.subtract(ours, theirs)) for ours, theirs in zip(OURS, THEIRS, strict=True)]
    assert [gain.delta for gain in gains.gains] == pytest.approx(deltas)
    found = gains.correlation
    r = np.corrcoef(SHARES, deltas)[0, 1]
    assert found.r == pytest.approx(r)
    assert r < -0.5
    # Student's t with n - 2 degrees of freedom, and Fisher's z.
    t = r * math.sqrt(2 / (1 - r**2))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 2))
    z = math.atanh(r) + np.array([-1, 1]) * stats.norm.ppf(0.975) / math.sqrt(4 - 3)
    assert found.ci95 == pytest.approx(np.tanh(z))
    assert found.pairs == 4


def test_classes_without_a_score_are_left_out_and_too_few_tell_nothing():
    assert correlate([1, 2, None, 4, 7], [2.0, 1.0, 3.0, float("nan"), 5.0]).pairs == 3
    assert correlate([1, 2, 3], [None, 1.0, 2.0]) is None
    assert correlate([1, 2, 3], [1.0, 1.0, 1.0]) is None
    assert correlate([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]).ci95 == (-1, 1)


def drawn(draw, *arguments):
    """What lies on the axes: the single points and the whole lines, as (x, y)."""
    with canvas(8.6, 3.9) as figure:
        draw(figure, *arguments, 8.6)
        return [tuple(map(list, line.get_data())) for line in figure.axes[0].get_lines()]


def intervals(lines):
    """The upright ones."""
    return sorted(tuple(y) for x, y in lines if len(x) == 2 and x[0] == x[1])


def test_the_intervals_that_are_drawn_are_those_of_the_statistics():
    lines = ratio_lines(STUDY, SCORES)
    expected = [
        tuple(100 * end for end in gain.ci95)
        for line in lines
        for ratio, gain in line.points
        if ratio or not line.paints
    ]
    shown = drawn(_draw_ratios, lines, "real")
    np.testing.assert_allclose(intervals(shown), sorted(expected))
    # A line begins at the arm that it is without paintings, or at the baseline.
    (start,) = [(x[0], y[0]) for x, y in shown if y == [100 * gain.delta for _, gain in lines[2].points]]
    assert start[1] == pytest.approx(100 * minus_real("ClassMix").delta)
    assert ([start[0]], [start[1]]) in shown
    (start,) = [(x[0], y[0]) for x, y in shown if y == [100 * gain.delta for _, gain in lines[1].points]]
    assert start == (0, 0)


def test_every_class_is_drawn_at_its_share_and_gain():
    gains = class_gains("pairs", SHARES, OURS, THEIRS)
    shown = drawn(_draw_frequencies, gains, CLASSES)
    points = [(x[0], y[0]) for x, y in shown if len(x) == 1]
    expected = [(100 * share, 100 * gain.delta) for share, gain in zip(SHARES, gains.gains, strict=True)]
    np.testing.assert_allclose(points, expected)
    expected_ends = sorted(tuple(100 * end for end in gain.ci95) for gain in gains.gains)
    np.testing.assert_allclose(intervals(shown), expected_ends)
    # The dashed line is the least-squares one: through the means, with the slope r s_y / s_x.
    x, y = np.array(expected).T
    slope = gains.correlation.r * y.std() / x.std()
    ((ends, heights),) = [line for line in shown if len(line[0]) == 2 and line[0][0] == min(x) and line[0][1] == max(x)]
    assert heights == pytest.approx([y.mean() + slope * (end - x.mean()) for end in ends])


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_charts_are_svg_for_the_page_and_pictures_in_the_light_theme(seeds):
    lines = ratio_lines(STUDY, {name: values[:seeds] for name, values in SCORES.items()})
    gains = class_gains("pairs", SHARES, *([v[:seeds] for v in side] for side in (OURS, THEIRS)))
    for width in (3.7, 8.6):
        text = ratio_figure(lines, "real", width=width) + frequency_figure(gains, CLASSES, width=width)
        assert all(name in text for name in ("both", "1 : 5", "road", "share of the training pixels"))
        assert "var(--hairline" in text
    for picture in (ratio_picture(lines, "real"), frequency_picture(gains, CLASSES)):
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).reshape(-1, 3)
        colors, counts = np.unique(pixels, axis=0, return_counts=True)
        assert tuple(colors[counts.argmax()]) == (255, 255, 255)
        there = set(map(tuple, colors.tolist()))
        assert (0xDC, 0xDC, 0xD6) in there  # grid
        assert not there & {(1, 2, 3), (4, 5, 6), (7, 8, 9)}  # what stands for colours until they are replaced
