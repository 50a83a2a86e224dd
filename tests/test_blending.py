"""Windows whose weights sum to one, and have none where their context is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terrasynth.data.blending import cover
from terrasynth.errors import TerraSynthError


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 300), size=st.integers(1, 60), overlap=st.integers(0, 59))
def test_weights_sum_to_one_and_context_is_whole_where_there_is_weight(length, size, overlap):
    overlap = min(overlap, size - 1)
    axis = cover(length, size, overlap)
    total, covered = np.zeros(length), 0
    for i, (start, weights) in enumerate(zip(axis.starts, axis.weights, strict=True)):
        assert len(weights) == axis.size
        assert (weights >= 0).all()
        total[start : start + axis.size] += weights
        seen = np.flatnonzero(weights)
        # At the ends of the axis there is no more context to be had.
        if i > 0:
            assert seen[0] >= overlap // 4
            assert axis.starts[i - 1] + axis.size - start >= overlap
        if i + 1 < len(axis.starts):
            assert axis.size - 1 - seen[-1] >= overlap // 4
        covered = start + axis.size
    assert covered == length
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_an_axis_shorter_than_a_window_is_one_window():
    axis = cover(20, 64, 16)
    assert (axis.size, axis.starts) == (20, (0,))
    assert (axis.weights == 1).all()


def test_no_more_windows_than_needed():
    assert cover(1024, 512, 128).starts == (0, 256, 512)
    assert cover(896, 512, 128).starts == (0, 384)
    assert cover(512, 512, 128).starts == (0,)
    with pytest.raises(TerraSynthError, match="larger than their overlap"):
        cover(100, 16, 16)
