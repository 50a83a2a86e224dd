"""FreeMask's filter against loops over single pixels."""

import math

import pytest
import torch

from terrasynth.curation.filter import class_mean_losses, dropped, filter_pixels

K = 4
IGNORE = 255


def losses_and_masks(seed=0, tiles=3, classes=K):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(classes + 1, (tiles, 9, 7), generator=generator)
    masks = torch.where(masks == classes, IGNORE, masks).byte()
    # Losses differ by class; where unlabelled they may be anything.
    losses = torch.rand(masks.shape, generator=generator) * (1 + masks.float())
    return losses.masked_fill(masks == IGNORE, float("nan")), masks


def test_class_means_are_over_all_labelled_pixels_of_the_class():
    losses, masks = losses_and_masks()
    means = class_mean_losses(losses, masks, K, IGNORE)
    for c in range(K):
        values = [losses[i, y, x].item() for i in range(3) for y in range(9) for x in range(7) if masks[i, y, x] == c]
        assert means[c].item() == pytest.approx(math.fsum(values) / len(values), rel=1e-12)


def test_a_class_without_real_pixels_has_no_limit():
    losses, masks = losses_and_masks(classes=K - 1)
    means = class_mean_losses(losses, masks, K, IGNORE)
    assert means.isinf().tolist() == [False] * (K - 1) + [True]
    painted = torch.full((1, 2, 2), K - 1, dtype=torch.uint8)
    assert torch.equal(filter_pixels(painted, torch.full((1, 2, 2), 1e9), means), painted)


@pytest.mark.parametrize("margin", [1.25, 0.5, 1.75])
def test_labels_above_the_margin_of_their_class_are_dropped_and_no_others(margin):
    means = class_mean_losses(*losses_and_masks(1), K, IGNORE)
    losses, masks = losses_and_masks(2)
    before = masks.clone()
    filtered = filter_pixels(masks, losses, means, margin, IGNORE)
    assert (filtered.dtype, filtered.shape) == (masks.dtype, masks.shape)
    assert torch.equal(masks, before)
    for i in range(3):
        for y in range(9):
            for x in range(7):
                label = masks[i, y, x].item()
                implausible = label != IGNORE and losses[i, y, x].item() > margin * means[label].item()
                assert filtered[i, y, x] == (IGNORE if implausible else label)
    assert (filtered != masks).any()


def test_the_published_margin_is_the_default_and_a_loss_at_the_limit_stays():
    masks = torch.zeros(1, 1, 3, dtype=torch.uint8)
    losses = torch.tensor([[[2.4, 2.5, 2.6]]])
    assert filter_pixels(masks, losses, torch.tensor([2.0])).tolist() == [[[0, 0, IGNORE]]]


def test_shares_dropped_are_of_what_was_labelled():
    before = torch.tensor([[[0, 0, 0, 0], [1, 1, IGNORE, IGNORE]]], dtype=torch.uint8)
    after = torch.tensor([[[0, 0, 0, IGNORE], [IGNORE, IGNORE, IGNORE, IGNORE]]], dtype=torch.uint8)
    shares = dropped(before, after, ("field", "lake", "road"), IGNORE)
    assert shares == {"dropped": 0.5, "dropped/field": 0.25, "dropped/lake": 1.0}
