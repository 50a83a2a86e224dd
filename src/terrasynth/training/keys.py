"""The stream of training keys: which samples, with which seeds, enter step n. A pure function of (run seed, step).

That is why a resumed run needs no sampler state, and why the stream is the same for any number of processes, workers
or micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from terrasynth.errors import TerraSynthError

__all__ = ["Key", "KeyedDataset", "hash63", "mixed_keys", "sequenced_keys", "shuffled_keys"]

#: (index of the sample in its dataset, seed of everything random about this visit to it).
Key = tuple[int, int]

# One purpose, one stream: the same (seed, step) must not give related numbers to two uses.
_ORDER, _SAMPLE, _SYNTHETIC, _START = 1, 2, 3, 4


def _hash64(*values: int | np.ndarray) -> np.ndarray:
    """Chain SplitMix64's finaliser (Steele, Lea & Flood 2014) over non-negative integers; arrays broadcast."""
    state = np.zeros(1, dtype=np.uint64)
    for value in values:
        state = (state ^ np.asarray(value, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def hash63(*values: int) -> int:
    """Well-mixed hash of non-negative integers below 2^64, in [0, 2^63): fits torch's seeds and int64."""
    return int(_hash64(*values)[0] >> np.uint64(1))


def _order(n: int, seed: int, stream: int, weights: Sequence[float] | None = None) -> Callable[[int, int], np.ndarray]:
    """`(first, count)` -> `count` indices from position `first` of an endless row of permutations of range(n).

    With weights an epoch still has n places, of which sample i gets n w_i / Σ w on average, and in every epoch the
    whole number below or above that (systematic sampling, Madow 1949); equal weights give permutations.
    """
    if weights is not None and (len(weights) != n or min(weights) < 0 or max(weights) == 0):
        raise ValueError(f"{len(weights)} weights for {n} samples, from {min(weights)} to {max(weights)}")
    if weights is not None and min(weights) == max(weights):
        weights = None
    known: tuple[int, np.ndarray] | None = None

    def permutation(epoch: int) -> np.ndarray:
        nonlocal known
        if known is None or known[0] != epoch:
            # Sorting hashes, not a library's shuffle: the order outlives every version of numpy and torch.
            order = np.argsort(_hash64(seed, stream, epoch, np.arange(n)), kind="stable")
            known = epoch, order if weights is None else members(epoch)[order]
        return known[1]

    def members(epoch: int) -> np.ndarray:
        shares = np.cumsum(np.asarray(weights, dtype=np.float64))
        start = int(_hash64(seed, stream, _START, epoch)[0]) / 2**64
        places = (np.arange(n) + start) / n * shares[-1]
        # Rounding may put the last place at the very end.
        return np.searchsorted(shares, np.minimum(places, np.nextafter(shares[-1], 0)), side="right")

    def take(first: int, count: int) -> np.ndarray:
        positions = np.arange(first, first + count)
        epochs = positions // n
        return np.concatenate([permutation(int(epoch))[positions[epochs == epoch] % n] for epoch in np.unique(epochs)])

    return take


def _with_seeds(indices: np.ndarray, seed: int, step: int) -> list[Key]:
    seeds = _hash64(seed, _SAMPLE, step, np.arange(len(indices))) >> np.uint64(1)
    return list(zip(indices.tolist(), seeds.tolist(), strict=True))


def shuffled_keys(n: int, batch: int, seed: int, weights: Sequence[float] | None = None) -> Callable[[int], list[Key]]:
    """Keys of a dataset of `n` samples: every epoch visits each once, in an order of its own; batches span epochs.

    Args:
        n: number of samples, may be smaller than `batch`.
        batch: keys per step (the global batch: over all processes and micro-batches).
        seed: the run's seed.
        weights: how often samples are drawn compared with each other, at least 0 each; None draws all alike.

    Returns:
        `step -> [(index, sample seed), ...]`, `batch` of them; a sample seed hashes (seed, step, position) to 63 bits.

    Raises:
        TerraSynthError: `n` is 0.
    """
    if n < 1:
        raise TerraSynthError("there is nothing to train on", found="0 samples", fix="check the split list of `train`")
    order = _order(n, seed, _ORDER, weights)

    def keys(step: int) -> list[Key]:
        return _with_seeds(order(step * batch, batch), seed, step)

    return keys


def mixed_keys(
    n_real: int,
    n_synthetic: int,
    batch: int,
    real_fraction: float,
    seed: int,
    weights: Sequence[float] | None = None,
) -> Callable[[int], list[Key]]:
    """Keys of real tiles (indices below `n_real`) followed by synthetic ones, in fixed proportion in every batch.

    Either part is shuffled as by `shuffled_keys`, and runs through its own epochs. The real ones come first in the
    list; `train` deals a step's keys out like cards, so every process and micro-batch gets its share of both.

    `weights`, at least 0 each, say how often the synthetic ones are drawn compared with each other.

    Returns:
        `step -> keys` with round(real_fraction * batch) real ones in every step.

    Raises:
        TerraSynthError: a part that should enter every batch would never do so.
    """
    real = round(real_fraction * batch)
    if real == 0 or n_real == 0 or (real < batch and n_synthetic == 0) or (real == batch and real_fraction < 1):
        raise TerraSynthError(
            "the batches can not be mixed as asked",
            found=f"{n_real} real and {n_synthetic} synthetic tiles, {real} of {batch} places in a batch for real ones",
            expected="tiles of both kinds, and at least one place for each",
            fix="raise `batch_size`, or move `real_fraction` away from its ends",
        )
    real_order = _order(n_real, seed, _ORDER)
    synthetic_order = _order(max(n_synthetic, 1), seed, _SYNTHETIC, weights)

    def keys(step: int) -> list[Key]:
        indices = real_order(step * real, real)
        if real < batch:
            synthetic = batch - real
            indices = np.concatenate([indices, n_real + synthetic_order(step * synthetic, synthetic)])
        return _with_seeds(indices, seed, step)

    return keys


class KeyedDataset:
    """Any `dataset[(index, seed)] -> dict`, with the seed itself under `seed` (int64 once collated).

    It lives beside the keys and not in the loop so that a data-loading process imports nothing heavier than numpy.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return {**self.dataset[key], "seed": key[1]}


def sequenced_keys(
    n_real: int, n_synthetic: int, batch: int, switch: int, seed: int, weights: Sequence[float] | None = None
) -> Callable[[int], list[Key]]:
    """Keys of synthetic tiles (indices from `n_real` on) before step `switch`, of real ones from there on.

    `weights` are those of `mixed_keys`.
    """
    real, synthetic = shuffled_keys(n_real, batch, seed), shuffled_keys(n_synthetic, batch, seed, weights)

    def keys(step: int) -> list[Key]:
        if step < switch:
            return [(n_real + index, sample_seed) for index, sample_seed in synthetic(step)]
        return real(step)

    return keys
