"""Which painted samples are used, and how often: rules on the numbers of `Table`, without any model.

Everything here is a function of its arguments; what is drawn is drawn by hashes of a seed and a sample's id, so that no
sample's lot depends on the others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terrasynth.data.scores import ClassStatistics
from terrasynth.errors import TerraSynthError
from terrasynth.io import digest
from terrasynth.recipe import CurationConfig

__all__ = [
    "Selection",
    "Table",
    "balanced",
    "hardness",
    "histogram",
    "rare_classes",
    "resampled",
    "select",
    "times_used",
    "wanted_shares",
    "worth_keeping",
]

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]

#: An update of weights ends when no others could bring the divergence further down than this, in nats.
_GAP = 1e-4
_UPDATES = 20_000
#: In place of 0 for a sample without a wanted class, which goes to its lower bound at once.
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Table:
    """What is known of N painted samples of K classes.

    Attributes:
        ids: N names.
        sources: the mask that each was painted under, by name.
        sizes: int64 (N,), pixels of the tile.
        pixels: int64 (N, K), labelled pixels of each class in the mask as painted.
        kept: int64 (N, K), those that keep their label.
        accuracy: float64 (N,), share of the labelled pixels that the segmentor finds as in the mask; NaN without any.
        miou: float64 (N,), mIoU of the same.
        mean_losses: float64 (K,), of the segmentor on real tiles; infinite for classes that these do not have.
        real_pixels: int64 (K,), of the real tiles.
    """

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    sizes: _Ints
    pixels: _Ints
    kept: _Ints
    accuracy: _Floats
    miou: _Floats
    mean_losses: _Floats
    real_pixels: _Ints

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        sources: Sequence[str],
        scores: Sequence[Mapping[str, Any]],
        statistics: ClassStatistics,
    ) -> Table:
        """From the numbers of N samples: `size`, `pixels`, `kept`, and `accuracy` and `miou` (None without labels)."""
        return cls(
            ids=tuple(ids),
            sources=tuple(sources),
            sizes=np.array([score["size"] for score in scores], dtype=np.int64),
            pixels=np.array([score["pixels"] for score in scores], dtype=np.int64),
            kept=np.array([score["kept"] for score in scores], dtype=np.int64),
            # None becomes NaN, which no threshold lets pass.
            accuracy=np.array([score["accuracy"] for score in scores], dtype=np.float64),
            miou=np.array([score["miou"] for score in scores], dtype=np.float64),
            mean_losses=np.array(statistics.mean_losses),
            real_pixels=np.array(statistics.pixels, dtype=np.int64),
        )


@dataclass(frozen=True, eq=False)
class Selection:
    """What is used of N samples.

    Attributes:
        weights: float64 (N,), how often each is drawn: 0 for one that is left out, 1 on average over the labels kept.
        rare: int64, the classes that were taken for rare; None if no rule asks.
        wanted: float64 (K,), the class histogram that was asked for; None if none was.
    """

    weights: _Floats
    rare: _Ints | None
    wanted: _Floats | None


def select(table: Table, config: CurationConfig, class_names: Sequence[str], seed: int) -> Selection:
    """Apply the rules.

    Samples are left out first, for want of agreement or of rare classes; masks are resampled among what is left; then
    the weights are balanced.

    Raises:
        TerraSynthError: a class is none of the data set, or nothing is left.
    """
    rare = wanted = None
    stays = table.kept.sum(1) > 0
    if config.min_accuracy is not None:
        stays &= table.accuracy >= config.min_accuracy
    if config.min_miou is not None:
        stays &= table.miou >= config.min_miou
    if config.rare is not None:
        rare = (
            rare_classes(table.real_pixels)
            if config.rare == "auto"
            else np.array([_index(name, class_names, "rare") for name in config.rare], dtype=np.int64)
        )
        stays &= worth_keeping(table.kept, table.sizes, rare, config.valid_share)
    if not stays.any():
        raise TerraSynthError(
            "no sample is left",
            found=f"{len(table.ids)} samples; accuracy {_span(table.accuracy)}, mIoU {_span(table.miou)}, "
            f"{table.kept.sum() / max(1, table.pixels.sum()):.0%} of the labels kept",
            fix="ask for less agreement (min_accuracy, min_miou), a larger margin, or more classes in `rare`",
        )
    weights = stays.astype(np.float64)
    chosen = np.flatnonzero(stays)
    if config.resample is not None:
        hard = hardness(table.pixels, table.mean_losses)
        names = [(table.sources[i], table.ids[i]) for i in chosen]
        weights[chosen] = resampled(names, hard[chosen], table.pixels[chosen].sum(1), config.resample, seed)
        chosen = np.flatnonzero(weights)
    if config.balance is not None:
        wanted = wanted_shares(config.balance, histogram(table.kept, weights), table.real_pixels, class_names)
        weights[chosen] = balanced(table.kept[chosen], wanted, weights[chosen], config.max_weight)
    else:
        labels = table.kept.sum(1)
        weights *= labels[chosen].sum() / (weights @ labels)
    return Selection(weights, rare, wanted)


# --- FreeMask: hardness ----------------------------------------------------------------------------------------------


def hardness(pixels: _Ints, mean_losses: _Floats) -> _Floats:
    """How hard the classes of a mask are: H = Σ_c n_c L_c / Σ_c n_c (FreeMask, Yang et al. 2023).

    Args:
        pixels: (N, K), n_c of every mask.
        mean_losses: (K,), L_c. Classes without (infinite) do not count.

    Returns:
        (N,); 0 for a mask of which nothing is known.
    """
    known = np.isfinite(mean_losses)
    counts = pixels[:, known]
    return (counts @ mean_losses[known]) / np.maximum(counts.sum(1), 1)


def times_used(count: int, most: int) -> list[int]:
    """How often the paintings of each of `count` masks are used, from the easiest to the hardest mask.

    n_i = min(1 + round(most (i + 1) / count), most), for i = 0 ... count - 1 (FreeMask's code, with 20).
    """
    return [min(1 + round(most * (i + 1) / count), most) for i in range(count)]


def resampled(names: Sequence[tuple[str, str]], hard: _Floats, pixels: _Ints, most: int, seed: int) -> _Floats:
    """How often each painting is used, so that a mask's paintings are used n_i times together (`times_used`).

    Where a mask has more paintings than that, n_i of them are drawn; where it has fewer, all are used more often.

    Args:
        names: the mask and the id of each of N paintings.
        hard: (N,), hardness of the mask as painted. A mask may be painted under several views: its hardness is the mean
            by pixels.
        pixels: (N,), labelled pixels of each.
        most: of the hardest mask.
        seed: of the draw.

    Returns:
        (N,), 0 for paintings that are not drawn.
    """
    paintings: dict[str, list[int]] = {}
    for position, (source, _) in enumerate(names):
        paintings.setdefault(source, []).append(position)
    of_mask = {
        source: float(np.average(hard[found], weights=np.maximum(pixels[found], 1)))
        for source, found in paintings.items()
    }
    ranked = sorted(paintings, key=lambda source: (of_mask[source], source))
    weights = np.zeros(len(names))
    for source, uses in zip(ranked, times_used(len(ranked), most), strict=True):
        drawn = sorted(paintings[source], key=lambda position: digest("resample", seed, names[position][1]))[:uses]
        weights[drawn] = uses / len(drawn)
    return weights


# --- TISynth: rare classes -------------------------------------------------------------------------------------------


def rare_classes(real_pixels: _Ints) -> _Ints:
    """The classes with less than half of an even share of the labelled pixels of the real tiles, as indices."""
    return np.flatnonzero(2 * len(real_pixels) * real_pixels < real_pixels.sum())


def worth_keeping(kept: _Ints, sizes: _Ints, rare: _Ints, valid_share: float) -> NDArray[np.bool_]:
    """Whether a sample has any pixel of a rare class left, or else more than `valid_share` of its pixels labelled.

    Args:
        kept: (N, K), labels after filtering.
        sizes: (N,), pixels of the tiles; the unlabelled ones of the mask itself count too.
        rare: indices of classes.
        valid_share: published: 0.8.
    """
    return kept[:, rare].any(1) | (kept.sum(1) > valid_share * sizes)


# --- balance ---------------------------------------------------------------------------------------------------------


def histogram(pixels: _Ints, weights: _Floats) -> _Floats:
    """Shares of the classes among the labelled pixels of samples drawn by their weights, float64 (K,), summing to 1."""
    drawn = weights @ pixels
    return drawn / drawn.sum()


def wanted_shares(
    balance: str | Mapping[str, float], now: _Floats, real_pixels: _Ints, class_names: Sequence[str]
) -> _Floats:
    """The class histogram that `balance` asks for, float64 (K,), summing to 1.

    Args:
        balance: `uniform`, `real`, or shares by name; the classes that are not named divide the rest as they do now.
        now: (K,), the histogram as it is.
        real_pixels: (K,), of the real tiles.
        class_names: K names.

    Raises:
        TerraSynthError: a name is none of them.
    """
    if balance == "uniform":
        return np.full(len(now), 1 / len(now))
    if isinstance(balance, str):
        return real_pixels / real_pixels.sum()
    named = {_index(name, class_names, "balance"): share for name, share in balance.items()}
    others = np.array([index not in named for index in range(len(now))])
    rest = now * others if (now * others).any() else others.astype(np.float64)
    wanted = rest * max(0.0, 1 - sum(named.values())) / max(rest.sum(), 1e-300)
    for index, share in named.items():
        wanted[index] = share
    return wanted / wanted.sum()


def balanced(pixels: _Ints, wanted: _Floats, start: _Floats, max_weight: float) -> _Floats:
    """Weights that bring the class histogram of the drawn samples as near to a wanted one as they can.

    With u_i the share of the drawn labels that comes from sample i, and p_ic the share of class c among its labels, the
    histogram is h_c = Σ_i u_i p_ic. Sought is the minimum of KL(t ‖ h) over all u with Σ_i u_i = 1 and b_i / W ≤ u_i ≤
    W b_i, where b_i is that share at equal weights: a convex problem. The weights are w_i = u_i / b_i. One step of
    expectation-maximisation for the proportions of a mixture multiplies::

        u_i ← λ u_i Σ_c t_c p_ic / h_c, cut to its bounds,     λ such that Σ_i u_i = 1,

    which never increases the divergence. It ends when Frank and Wolfe's gap, a bound on what is left to gain, is small.
    Wanted classes of which no sample has a pixel can not be had: their share goes to the others in proportion.

    Args:
        pixels: (N, K), at least one label a sample.
        wanted: (K,), t, summing to 1.
        start: (N,), weights above 0 to start from: among those that do equally well, near ones are found.
        max_weight: W, at least 1.

    Returns:
        (N,), from 1 / W to W, with a mean of 1 over all labels.
    """
    labels = pixels.sum(1)
    p, b = pixels / labels[:, None], labels / labels.sum()
    wanted = np.where(pixels.any(0), wanted, 0)
    if not wanted.any():
        return start / (start @ b)
    wanted = wanted / wanted.sum()
    least, most = b / max_weight, b * max_weight
    u = _within(start * b, least, most)
    for _ in range(_UPDATES):
        h = u @ p
        gradient = p @ np.divide(wanted, h, out=np.zeros_like(h), where=wanted > 0)
        if _best(gradient, least, most) - gradient @ u < _GAP:
            break
        u = _within(u * np.maximum(gradient, _TINY), least, most)
    return u / b


def _within(amounts: _Floats, least: _Floats, most: _Floats) -> _Floats:
    """λ amounts, cut to what is allowed, with the λ that makes them sum to 1."""
    # The sum rises with λ in straight lines: each amount counts from where it passes `least` to where it meets `most`.
    turns = np.concatenate([least / amounts, most / amounts])
    order = np.argsort(turns, kind="stable")
    turns, slopes = turns[order], np.cumsum(np.concatenate([amounts, -amounts])[order])
    sums = least.sum() + np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(turns))])
    return np.clip(np.interp(1, sums, turns) * amounts, least, most)


def _best(gradient: _Floats, least: _Floats, most: _Floats) -> float:
    """The largest Σ gradient v over all v with Σ v = 1 and least ≤ v ≤ most: the steepest ones are filled first."""
    order = np.argsort(-gradient, kind="stable")
    filled = np.minimum(np.cumsum((most - least)[order]), 1 - least.sum())
    return float(gradient @ least + gradient[order] @ np.diff(filled, prepend=0))


def _index(name: str, class_names: Sequence[str], key: str) -> int:
    if name not in class_names:
        raise TerraSynthError(
            f"`{key}` names a class that there is not", found=name, expected=", ".join(class_names), fix="correct it"
        )
    return list(class_names).index(name)


def _span(values: _Floats) -> str:
    known = values[np.isfinite(values)]
    return f"{known.min():.2f} to {known.max():.2f}" if known.size else "of none known"
