"""Intervals over seeds, against the tables and against brute force."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from terrasynth.study.statistics import compare, difference_text, points, summarise, t_quantile


@pytest.mark.parametrize(
    ("degrees", "confidence", "tabulated"),
    [
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.95, 3.182),
        (4, 0.95, 2.776),
        (9, 0.95, 2.262),
        (30, 0.95, 2.042),
        (10_000, 0.95, 1.960),
        (1, 0.99, 63.657),
        (2, 0.975, 6.205),
        (7, 0.80, 1.415),
    ],
)
def test_t_quantile_is_the_tabulated_one(degrees, confidence, tabulated):
    assert t_quantile(degrees, confidence) == pytest.approx(tabulated, abs=6e-4)


@pytest.mark.parametrize("degrees", [1, 2, 5, 8])
def test_t_quantile_inverts_the_integral_of_the_density(degrees):
    t = np.linspace(0, t_quantile(degrees), 200_001)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    density = np.exp(log_scale) * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    assert 2 * np.trapezoid(density, t) == pytest.approx(0.95, abs=1e-8)


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_interval_covers_the_truth_95_times_in_100(seeds):
    draws = np.random.default_rng(seeds).normal(0.4, 0.02, (6000, seeds))
    intervals = np.array([summarise(values).ci95 for values in draws.tolist()])
    covered = (intervals[:, 0] <= 0.4) & (intervals[:, 1] >= 0.4)
    assert covered.mean() == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 6000))


def test_summary_is_mean_and_t_interval():
    summary = summarise([0.40, 0.42, 0.47])
    assert summary.mean == pytest.approx(0.43)
    half = 4.302653 * np.std([0.40, 0.42, 0.47], ddof=1) / math.sqrt(3)
    assert summary.ci95 == pytest.approx((0.43 - half, 0.43 + half))


def test_one_value_has_a_mean_and_no_interval():
    summary = summarise([0.4])
    assert (summary.mean, summary.ci95) == (0.4, None)
    assert json.loads(json.dumps(summary.to_dict())) == {"values": [0.4], "mean": 0.4, "ci95": None}


def test_missing_values_leave_the_mean_and_stay_missing():
    assert summarise([None, 0.2, math.nan, 0.4]).values == (None, 0.2, None, 0.4)
    assert summarise([None, 0.2, math.nan, 0.4]).mean == pytest.approx(0.3)
    assert summarise([None, math.nan]).mean is None
    assert summarise([]).ci95 is None


def test_comparison_is_paired_by_seed():
    # The seeds differ far more than the arms do: only pairing sees the difference.
    baseline = [0.20, 0.40, 0.60]
    arm = [0.22, 0.43, 0.62]
    difference = compare(arm, baseline)
    assert difference.values == pytest.approx((0.02, 0.03, 0.02))
    assert difference.delta == pytest.approx(0.07 / 3)
    assert difference.ci95[0] > 0
    apart = summarise(arm), summarise(baseline)
    assert apart[0].ci95[0] < apart[1].ci95[1]


def test_comparison_leaves_out_seeds_that_lack_either_value():
    difference = compare([0.5, None, 0.4, 0.7], [0.4, 0.1, math.nan, 0.5])
    assert difference.values == (pytest.approx(0.1), None, None, pytest.approx(0.2))
    assert difference.delta == pytest.approx(0.15)


def test_comparison_refuses_arms_of_different_length():
    with pytest.raises(ValueError, match="zip"):
        compare([0.1, 0.2], [0.1])


def test_higher_confidence_is_wider():
    narrow, wide = (compare([0.5, 0.6, 0.8], [0.4, 0.4, 0.4], confidence=c).ci95 for c in (0.95, 0.975))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.0182, "+1.8"),
        (-0.0182, "−1.8"),
        (0.0, "0.0"),
        (-0.0, "0.0"),
        (0.0004, "+0.04"),
        (-0.00002, "−0.002"),
        (1e-17, "0.0"),
        (None, "–"),
    ],
)
def test_points_show_the_sign_and_never_a_false_zero(fraction, text):
    assert points(fraction) == text


def test_difference_text_shows_the_interval_where_there_is_one():
    assert difference_text(compare([0.43, 0.45], [0.41, 0.42])) == "+2.5 (−3.9 to +8.9)"
    assert difference_text(compare([0.43], [0.41])) == "+2.0"
    assert difference_text(compare([None], [0.41])) == "–"
