"""Views of tiles with rough maps, against doing it by hand."""

from __future__ import annotations

import pytest
import torch

from terrasynth.data.augment import augment
from terrasynth.data.folder import Tiles
from terrasynth.data.perturb import perturb
from terrasynth.data.schema import LabelSchema
from terrasynth.recipe import RoughConfig
from terrasynth.systems.rough import OneClass, RoughViews

SCHEMA = LabelSchema(("a", "b", "c"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
STILL = RoughConfig(invented=0, noise=0)


@pytest.fixture
def tiles():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 3, (3, 6, 6), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2).byte()
    masks[0, :5] = 255
    # An image that tells its mask and its place.
    images = torch.stack([60 * masks, torch.arange(48).expand(3, 48, 48), torch.arange(48)[:, None].expand(3, 48, 48)])
    return Tiles(("x", "y", "z"), images.movedim(0, 1).byte().contiguous(), masks, SCHEMA)


def rough_of(tiles):
    return (tiles.masks.where(tiles.masks != 255, torch.tensor(0, dtype=torch.uint8)) + 1) % 3


def test_image_mask_and_rough_map_move_as_one_and_are_cut_alike(tiles):
    views = RoughViews(tiles, rough_of(tiles), STILL, crop=20)
    for seed in range(20):
        item = views[1, seed]
        assert item["image"].shape == (3, 20, 20)
        assert item["mask"].dtype == item["rough"].dtype == torch.int64
        assert torch.equal(item["rough"], (item["mask"] + 1) % 3)
        whole, mask = augment(tiles.images[1], tiles.masks[1], seed)
        places = [
            (top, left)
            for top in range(29)
            for left in range(29)
            if torch.equal(whole[:, top : top + 20, left : left + 20], item["image"])
        ]
        assert any(torch.equal(mask[t : t + 20, left : left + 20], item["mask"]) for t, left in places)


def test_crops_are_everywhere_and_a_visit_is_a_function_of_its_key(tiles):
    views = RoughViews(tiles, rough_of(tiles), RoughConfig(), crop=16)
    seen = {tuple(views[2, seed]["image"][:, 0, 0].tolist()) for seed in range(40)}
    assert len(seen) > 30
    again = RoughViews(tiles, rough_of(tiles), RoughConfig(), crop=16)
    for name, value in views[0, 7].items():
        assert torch.equal(value, again[0, 7][name])


def test_no_crop_takes_the_whole_tile(tiles):
    assert RoughViews(tiles, rough_of(tiles), STILL)[0, 0]["mask"].shape == (48, 48)
    assert RoughViews(tiles, rough_of(tiles), STILL, crop=99)[0, 0]["mask"].shape == (48, 48)


@pytest.mark.parametrize("invented", [0.0, 0.3, 1.0])
def test_a_share_of_the_rough_maps_is_the_true_one_with_moved_boundaries(tiles, invented):
    config = RoughConfig(invented=invented, noise=4)
    views, plain = RoughViews(tiles, rough_of(tiles), config), RoughViews(tiles, rough_of(tiles), STILL)
    from_true = from_read = as_read = 0
    for seed in range(60):
        mask, rough = plain[1, seed]["mask"], plain[1, seed]["rough"]
        found = views[1, seed]["rough"]
        moved, nudged = (
            perturb(x[None], torch.tensor([seed]), strength)[0] for x, strength in ((mask, 4.0), (rough, 1.0))
        )
        from_true += torch.equal(found, moved)
        as_read += torch.equal(found, rough)
        from_read += torch.equal(found, nudged)
        assert torch.equal(found, moved) or torch.equal(found, nudged) or torch.equal(found, rough)
    assert abs(from_true / 60 - invented) < 0.2
    if invented < 1:
        assert 0.3 < as_read / (60 - from_true) < 0.8  # a strength below a pixel may move nothing


def test_without_noise_no_rough_map_is_the_true_one(tiles):
    views = RoughViews(tiles, rough_of(tiles), RoughConfig(invented=1, noise=0))
    for seed in range(10):
        item = views[1, seed]
        assert torch.equal(item["rough"], (item["mask"] + 1) % 3)


def test_an_invented_rough_map_is_unlabelled_where_the_true_one_is(tiles):
    views = RoughViews(tiles, rough_of(tiles), RoughConfig(invented=1, noise=2))
    item = views[0, 0]
    unlabelled = item["mask"] == 255
    assert unlabelled.any()
    assert torch.equal(item["rough"] == 255, unlabelled)


def test_rough_maps_of_other_tiles_are_refused(tiles):
    with pytest.raises(ValueError, match="rough maps"):
        RoughViews(tiles, rough_of(tiles)[:2], STILL)


def test_one_class_against_the_rest_is_drawn_of_those_there(tiles):
    views = RoughViews(tiles, rough_of(tiles), STILL, crop=24)
    one = OneClass(views)
    drawn = set()
    for seed in range(40):
        plain, item = views[0, seed], one[0, seed]
        unlabelled = plain["mask"] == 255
        assert torch.equal(item["mask"] == 255, unlabelled)
        fits = [
            k
            for k in range(3)
            if torch.equal(item["rough"], (plain["rough"] == k).long())
            and torch.equal(item["mask"][~unlabelled], (plain["mask"] == k).long()[~unlabelled])
        ]
        assert fits
        assert item["image"].equal(plain["image"])
        drawn.update(fits)
        assert (item["rough"] == 1).any() or (item["mask"] == 1).any()
    assert drawn == {0, 1, 2}
