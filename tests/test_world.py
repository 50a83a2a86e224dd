"""The procedural world: seeded, exact, scaled by its ground sampling distance, and varied enough to learn from."""

from __future__ import annotations

from itertools import combinations
from typing import get_args

import numpy as np
import pytest

from terrasynth.data import world
from terrasynth.data.world import REGIONS, WORLD_SCHEMA, render
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import WorldConfig

CLASS = {name: index for index, name in enumerate(WORLD_SCHEMA.names)}


@pytest.fixture(scope="module")
def scenes():
    """64 scenes of 64 pixels a region, as (images, masks)."""
    rendered = {r: [render(seed, size=64, gsd=1.0, region=r) for seed in range(64)] for r in REGIONS}
    return {r: tuple(np.stack(part) for part in zip(*tiles, strict=True)) for r, tiles in rendered.items()}


def test_a_recipe_can_name_every_region():
    assert get_args(WorldConfig.model_fields["region"].annotation) == tuple(REGIONS)


@pytest.mark.parametrize("region", REGIONS)
def test_equal_arguments_give_equal_bits_whatever_was_rendered_before(region):
    image, mask = render(7, region=region)
    render(8, size=37, gsd=2.0)
    np.random.default_rng(0).random()
    again, mask_again = render(7, region=region)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(mask, mask_again)


def test_every_seed_is_another_scene(scenes):
    images, masks = scenes["temperate"]
    assert len({image.tobytes() for image in images}) == len(images)
    assert len({mask.tobytes() for mask in masks}) == len(masks)


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize(("size", "gsd"), [(1, 0.1), (1, 10.0), (2, 0.5), (37, 0.3), (128, 3.0), (300, 0.5)])
def test_any_size_and_gsd_gives_an_image_and_class_indices(size, gsd, region):
    image, mask = render(3, size=size, gsd=gsd, region=region)
    assert image.shape == (size, size, 3)
    assert mask.shape == (size, size)
    assert image.dtype == mask.dtype == np.uint8
    assert mask.max() < WORLD_SCHEMA.num_classes


@pytest.mark.parametrize("region", REGIONS)
def test_every_class_has_its_share_and_a_tile_shows_several(scenes, region):
    _, masks = scenes[region]
    share = np.stack([(masks == c).mean(axis=(1, 2)) for c in range(WORLD_SCHEMA.num_classes)], axis=1)
    assert share.mean(axis=0).min() > 0.03
    assert share.mean(axis=0).max() < 0.45
    assert ((share > 0.01).sum(axis=1) >= 3).mean() > 0.95


def test_regions_differ_in_the_colours_of_their_classes(scenes):
    for home, away in combinations(REGIONS, 2):
        (images, m), (others, n) = scenes[home], scenes[away]
        apart = [
            np.linalg.norm(images[m == c].mean(axis=0) - others[n == c].mean(axis=0))
            for c in (CLASS["bare ground"], CLASS["building"], CLASS["water"])
        ]
        assert min(apart) > 20


def test_a_class_is_not_given_away_by_its_colour_alone(scenes):
    """The best rule from colour (16 levels a band) to class, learned on half of the tiles of a region, falls short on
    the rest of them, and further short in the other regions."""
    levels = {r: (images // 16).astype(int) @ np.array([256, 16, 1]) for r, (images, _) in scenes.items()}
    for home in REGIONS:
        votes = np.zeros((4096, WORLD_SCHEMA.num_classes))
        np.add.at(votes, (levels[home][:32].ravel(), scenes[home][1][:32].ravel()), 1)
        rule = votes.argmax(axis=1)
        right = {r: (rule[levels[r][32:]] == scenes[r][1][32:]).mean() for r in REGIONS}
        at_home = right.pop(home)
        assert 0.4 < at_home < 0.8
        assert np.mean(list(right.values())) < at_home - 0.1


@pytest.mark.parametrize("region", REGIONS)
def test_image_and_mask_are_drawn_from_one_geometry(region):
    """Class means explain the image best where the mask lies: any shift of it explains less."""
    unexplained = dict.fromkeys(((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)), 0.0)
    for seed in range(8):
        image, mask = render(seed, region=region)
        inner = image[4:-4, 4:-4].astype(float)
        for shift in unexplained:
            moved = np.roll(mask, shift, axis=(0, 1))[4:-4, 4:-4]
            for c in np.unique(moved):
                unexplained[shift] += ((inner[moved == c] - inner[moved == c].mean(axis=0)) ** 2).sum()
    assert min(unexplained, key=unexplained.get) == (0, 0)


def test_water_is_bluer_than_roofs_but_carries_soil_in_the_tropics(scenes):
    for region, (images, masks) in scenes.items():
        blueness = images[..., 2].astype(float) - images[..., 0]
        water, roofs = (blueness[masks == CLASS[name]].mean() for name in ("water", "building"))
        if region == "tropical":
            assert water < roofs - 10
        else:
            assert water > roofs + 20


def test_shadows_darken_the_image_and_leave_the_mask_alone(monkeypatch):
    image, mask = render(4)
    monkeypatch.setattr(world, "_shadow", lambda height, towards, drop: np.zeros_like(height))
    bright, mask_without = render(4)
    np.testing.assert_array_equal(mask, mask_without)
    # Blur reaches two pixels, noise is the same in both: nothing gets darker without shadows.
    assert (bright >= image).all()
    assert 0.02 < (bright > image + 20.0).any(axis=2).mean() < 0.6


def test_a_shadow_is_what_a_walk_towards_the_sun_finds():
    height = np.where(np.random.default_rng(0).random((24, 24)) < 0.05, 7.0, 0.0).astype(np.float32)
    drop = 0.6
    walked = np.zeros_like(height)
    for y in range(24):
        for x in range(24):
            walked[y, x] = max(height[y, x + k] - k * drop for k in range(24 - x)) - height[y, x]
    np.testing.assert_allclose(world._shadow(height, (1.0, 0.0), drop), walked, atol=1e-5)


@pytest.mark.parametrize("region", REGIONS)
def test_the_same_ground_at_half_the_gsd_is_the_same_scene(region):
    """Class by class: the finer mask, a vote of 2 x 2 pixels, against the coarser one."""
    agreement = []
    for seed in range(8):
        _, coarse = render(seed, size=64, gsd=1.0, region=region)
        _, fine = render(seed, size=128, gsd=0.5, region=region)
        agreement.append((world._majority(fine) == coarse).mean())
    assert np.mean(agreement) > 0.95


def test_buildings_keep_their_size_in_metres():
    """Mean length of the runs of building pixels along the rows: halving the GSD doubles it."""
    runs = {}
    for gsd in (0.25, 0.5, 1.0):
        masks = [render(seed, size=round(96 / gsd), gsd=gsd)[1] for seed in range(12)]
        inside = [np.pad(mask == CLASS["building"], ((0, 0), (1, 1))).astype(int) for mask in masks]
        starts = sum((np.diff(mask, axis=1) == 1).sum() for mask in inside)
        runs[gsd] = sum(mask.sum() for mask in inside) / starts
        assert 5.0 < runs[gsd] * gsd < 16.0
    assert runs[0.25] / runs[0.5] == pytest.approx(2.0, rel=0.1)
    assert runs[0.5] / runs[1.0] == pytest.approx(2.0, rel=0.1)


def test_the_majority_is_the_most_frequent_value_of_each_square():
    fine = np.random.default_rng(1).integers(0, 3, size=(40, 40), dtype=np.uint8)
    coarse = world._majority(fine)
    for y in range(20):
        for x in range(20):
            counts = np.bincount(fine[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel(), minlength=3)
            assert counts[coarse[y, x]] == counts.max()


def test_the_bent_frame_is_inverted_exactly_and_keeps_areas():
    frame = world._Frame(np.random.default_rng(5), 64.0)
    u, v = np.random.default_rng(6).uniform(-50, 50, size=(2, 1000))
    np.testing.assert_allclose(frame.to_plan(*frame.to_scene(u, v)), (u, v), atol=1e-9)
    h = 1e-5
    x, y = frame.to_scene(np.array([u, u + h, u]), np.array([v, v, v + h]))
    (xu, yu), (xv, yv) = ((x[i] - x[0], y[i] - y[0]) for i in (1, 2))
    np.testing.assert_allclose((xu * yv - xv * yu) / h**2, 1.0, atol=1e-4)
    place = frame.heading(3.0, -7.0, 1)
    ahead, _ = frame.to_scene(np.array([3.0, 3.0]), np.array([-7.0, -7.0 + h])), None
    np.testing.assert_allclose((place.x, place.y), (ahead[0][0], ahead[1][0]))
    np.testing.assert_allclose(
        np.array([place.dx, place.dy]), np.diff(ahead)[:, 0] / np.linalg.norm(np.diff(ahead)), atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"region": "lunar"}, ("lunar", "temperate", "arid", "tropical")),
        ({"size": 0}, ("size 0", "at least 1")),
        ({"size": -5}, ("size -5", "at least 1")),
        ({"gsd": 0.0}, ("0.0 m per pixel", "0.1 to 10")),
        ({"gsd": 11.0}, ("11.0 m per pixel", "0.1 to 10")),
        ({"gsd": float("nan")}, ("nan m per pixel",)),
        ({"seed": -1}, ("-1", "seed")),
    ],
)
def test_a_wrong_argument_is_named_with_what_would_be_right(change, words):
    with pytest.raises(TerraSynthError) as caught:
        render(**{"seed": 0, **change})
    for word in words:
        assert word in str(caught.value)
