from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.image.kid import poly_mmd
from torchvision.transforms.v2.functional import gaussian_blur

from terrasynth.data.folder import load_tiles
from terrasynth.data.world import render
from terrasynth.study.quality import (
    edge_ratio,
    histogram_distance,
    kid,
    label_histogram,
    mean_distances,
    nearest,
    psnr,
    random_features,
    share_nearer,
    ssim,
    thumbnails,
    whitening,
)
from terrasynth.systems.fit import fit_generator
from terrasynth.tasks.segmentation import Segmentor

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def scenes():
    """64 procedural scenes, uint8 (64, 3, 64, 64)."""
    images = [torch.from_numpy(render(seed, size=64, gsd=1.0, region="temperate")[0]) for seed in range(64)]
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def features(scenes):
    return random_features(scenes)


def noisy(images, deviation):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + deviation * noise).round().clamp(0, 255).byte()


def shuffled_blocks(images, side=8):
    generator = torch.Generator().manual_seed(0)
    blocks = functional.unfold(images.float(), side, stride=side)
    mixed = torch.stack([b[:, torch.randperm(b.shape[1], generator=generator)] for b in blocks])
    return functional.fold(mixed, images.shape[-2:], side, stride=side).byte()


# --- features


def test_features_are_the_same_on_every_machine():
    ramp = torch.arange(3 * 16 * 16).reshape(1, 3, 16, 16).mul(37).remainder(256).byte()
    features = random_features(ramp)[0]
    assert features.shape == (728,)
    torch.testing.assert_close(
        features[[0, 100, 300, 500, 727]],
        torch.tensor([0.75013, 0.77189, 0.18962, -0.28583, -0.87317]),
        atol=1e-4,
        rtol=0,
    )


def test_features_depend_on_their_own_image_only(scenes):
    torch.testing.assert_close(random_features(scenes[:7], batch_size=3), random_features(scenes[:9])[:7])


def test_features_do_not_touch_the_global_random_state(scenes):
    state = torch.get_rng_state()
    random_features(scenes[:1])
    assert torch.equal(state, torch.get_rng_state())


def test_features_do_not_see_where_something_is(scenes):
    shifted = scenes[:8].roll((16, 16), dims=(-2, -1))
    features = random_features(scenes[:8])
    near, positions = nearest(random_features(shifted), features)
    assert torch.equal(positions, torch.arange(8))
    assert near.mean() < mean_distances(features, torch.arange(8))[1] / 2


# --- distance of sets


def test_kid_of_different_sources_is_the_published_formula():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 7))

    def k(a, b):
        return (float(a @ b) / 6 + 1) ** 3

    xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (9 * 8)
    yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (7 * 6)
    xy = sum(k(a, b) for a in x for b in y) / (9 * 7)
    assert kid(x, y)[0] == pytest.approx(xx + yy - 2 * xy, rel=1e-10)


def test_kid_equals_torchmetrics_on_sets_of_one_size():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(20, 5, generator=generator, dtype=torch.float64) + shift for shift in (0, 0.5))
    assert kid(x, y)[0] == pytest.approx(float(poly_mmd(x, y, degree=3, gamma=None, coef=1.0)), rel=1e-10)


def test_kid_leaves_out_pairs_of_one_source_and_its_error_is_the_jackknifes():
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 8))
    of_x, of_y = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1, 1, 2, 2, 7, 7, 8, 9])

    def brute(keep):
        def mean(a, of_a, b, of_b):
            values = [
                (float(p @ q) / 4 + 1) ** 3
                for p, i in zip(a, of_a.tolist(), strict=True)
                for q, j in zip(b, of_b.tolist(), strict=True)
                if i != j and i in keep and j in keep
            ]
            return sum(values) / len(values)

        return mean(x, of_x, x, of_x) + mean(y, of_y, y, of_y) - 2 * mean(x, of_x, y, of_y)

    everything = {0, 1, 2, 3, 4, 7, 8, 9}
    variance = 0.0
    for group in ({0, 3, 4}, {7, 8, 9}, {1, 2}):
        values = torch.tensor([brute(everything - {source}) for source in group], dtype=torch.float64)
        variance += (len(values) - 1) / len(values) * float((values - values.mean()).square().sum())
    value, error = kid(x, y, of_x, of_y)
    assert value == pytest.approx(brute(everything), rel=1e-10)
    assert error == pytest.approx(variance**0.5, rel=1e-8)


def test_kid_of_twins_is_not_biased():
    """A painting resembles the tile whose mask it has: with these pairs counted, the distance falls below zero."""
    generator = torch.Generator().manual_seed(3)
    paired, counted = [], []
    for _ in range(200):
        x = torch.randn(12, 8, generator=generator)
        y = (x + 0.3 * torch.randn(12, 8, generator=generator)) / 1.09**0.5
        paired.append(kid(x, y, torch.arange(12), torch.arange(12))[0])
        counted.append(kid(x, y)[0])
    paired, counted = torch.tensor(paired), torch.tensor(counted)
    standard_error = paired.std() / 200**0.5
    assert paired.mean().abs() < 3 * standard_error
    assert counted.mean() < -10 * standard_error


def test_the_error_of_kid_is_how_much_it_varies():
    generator = torch.Generator().manual_seed(4)
    runs = [
        kid(torch.randn(30, 5, generator=generator), 1 + torch.randn(20, 5, generator=generator)) for _ in range(200)
    ]
    values, errors = torch.tensor(runs).T
    assert 0.85 < errors.mean() / values.std() < 1.35


def test_whitening_gives_the_reference_unit_variance_and_no_correlation(features):
    components = whitening(features, 8)(features)
    assert components.shape == (64, 8)
    torch.testing.assert_close(components.T @ components / 64, torch.eye(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(components.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    assert whitening(features)(features).shape == (64, 64 // 3)


def test_kid_of_scenes_of_one_world_is_zero(features):
    components = whitening(features)(features)
    value, error = kid(components[::2], components[1::2])
    assert abs(value) < 2 * error


@pytest.mark.parametrize(
    "worse_and_worse",
    [
        lambda x: [gaussian_blur(x, [5, 5], [0.7, 0.7]), gaussian_blur(x, [13, 13], [2.0, 2.0])],
        lambda x: [noisy(x, 10), noisy(x, 40)],
        lambda x: [(x.float() + s * torch.tensor([1.0, 0, -1]).view(3, 1, 1)).clamp(0, 255).byte() for s in (10, 40)],
        lambda x: [x // 2 + 64, x // 4 + 96],
        lambda x: [x.float().mean(1, keepdim=True).expand_as(x).byte()],
        lambda x: [shuffled_blocks(x)],
    ],
    ids=["blurred", "noisy", "wrong colours", "low contrast", "grey", "shuffled blocks"],
)
def test_kid_grows_with_what_is_wrong(scenes, features, worse_and_worse):
    whiten = whitening(features)
    real, value, error = whiten(features[::2]), *kid(whiten(features[::2]), whiten(features[1::2]))
    for images in worse_and_worse(scenes[1::2]):
        worse, worse_error = kid(real, whiten(random_features(images)))
        assert worse - value > 2 * max(error, worse_error)
        value, error = worse, worse_error


# --- reconstruction


def test_psnr_and_ssim_equal_torchmetrics(scenes):
    images, references = noisy(scenes[:6], 12), scenes[:6]
    x, y = images.float() / 255, references.float() / 255
    expected = torch.stack([PeakSignalNoiseRatio(data_range=1.0)(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(psnr(images, references).float(), expected, atol=1e-4, rtol=0)
    # torchmetrics pads and averages over everything; here, as published, over the windows that lie in the image.
    _, everywhere = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none", return_full_image=True)
    expected = everywhere[..., 5:-5, 5:-5].mean((1, 2, 3))
    torch.testing.assert_close(ssim(images, references), expected, atol=1e-4, rtol=0)


def test_equal_images_have_infinite_psnr_and_ssim_one(scenes):
    assert psnr(scenes[:2], scenes[:2]).isinf().all()
    torch.testing.assert_close(ssim(scenes[:2], scenes[:2]), torch.ones(2))


def test_edge_ratio_sees_a_grid_that_is_hardly_visible(scenes):
    assert edge_ratio(scenes, 8) == pytest.approx(1, abs=0.05)
    steps = torch.randn(len(scenes), 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 6
    blocky = (scenes + functional.interpolate(steps, scale_factor=8)).clamp(0, 255).byte()
    assert edge_ratio(blocky, 8) > 1.2


def test_edge_ratio_by_hand():
    image = torch.tensor([0, 1, 5, 6]).expand(1, 3, 4, 4).byte()  # rows equal; columns step 1, 4 (on the grid), 1
    # Neighbours across a line of the grid: 4 in each of 4 rows, and 0 in each of 4 columns.
    assert edge_ratio(image, 2) == pytest.approx((4 / 2) / (1 / 2))


# --- diversity and copying


def test_mean_distances_by_hand():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0], [0.0, 0.0]])
    within, between = mean_distances(points, torch.tensor([0, 0, 1, 1]))
    assert within == pytest.approx((5 + 8) / 2 / 2**0.5)
    assert between == pytest.approx((8 + 0 + 5 + 5) / 4 / 2**0.5)


def test_real_tiles_have_no_distance_within_a_mask(features):
    within, between = mean_distances(features, torch.arange(len(features)))
    assert within != within
    assert between > 0


def test_a_copy_is_found_however_it_is_turned(scenes):
    training = scenes[:16]
    turned = torch.cat([training.rot90(k, dims=(-2, -1)) for k in range(4)])
    copies = noisy(training[[3, 11]], 5).rot90(1, dims=(-2, -1))
    distances, positions = nearest(thumbnails(copies), thumbnails(turned))
    assert (positions % 16).tolist() == [3, 11]
    held_out, _ = nearest(thumbnails(scenes[16:]), thumbnails(turned))
    assert share_nearer(distances, held_out) == 1
    assert share_nearer(held_out, held_out) == pytest.approx(0.01, abs=1 / len(held_out))


def test_the_nearest_is_the_nearest(scenes):
    points, training = torch.randn(70, 5), torch.randn(11, 5)
    distances, positions = nearest(points, training)
    every = (points[:, None] - training).square().mean(2).sqrt()
    torch.testing.assert_close(distances, every.min(1).values)
    assert torch.equal(positions, every.argmin(1))


# --- all of it, for a model


@pytest.fixture(scope="module")
def measured(tiny_recipe, tmp_path_factory):
    """A tiny model, measured twice by the command line; the second time there is nothing left to paint."""
    folder = tmp_path_factory.mktemp("quality")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe.model_dump(mode="json")))
    train = load_tiles(tiny_recipe.data, "train")
    fit_generator(train, tiny_recipe.generator, tiny_recipe.data, tiny_recipe.sampling, folder)
    steering = Segmentor.build(tiny_recipe.segmentor, 6, seed=5, class_names=train.schema.names)
    steering.save_pretrained(folder / "steering")
    more = ["data.world.validation=4", "data.world.test=6"]
    command = [str(folder / "model"), str(recipe), "--out", str(folder / "out"), "--steering", str(folder / "steering")]
    command += [f"--set={setting}" for setting in more] + ["--ruler=data.world.train=8", "--ruler=data.world.seed=1"]
    main = runpy.run_path(str(BENCHMARK))["main"]
    main(command)
    painted = {path: path.stat().st_mtime_ns for path in folder.glob("out/*/dataset/images/*")}
    first = json.loads((folder / "out" / "quality.json").read_text())
    main([*command, "--seeds", "0", "1"])
    assert painted == {path: path.stat().st_mtime_ns for path in folder.glob("out/*/dataset/images/*")}
    return first, json.loads((folder / "out" / "quality.json").read_text()), folder / "out"


def test_a_model_is_measured_by_one_command(measured):
    results, _, out = measured
    sets = results["sets"]
    assert {name: found["count"] for name, found in sets.items()} == {
        "real": 10,
        "training": 8,
        "reconstructed": 10,
        "painted": 20,
        "steered": 20,
    }
    assert sets["reconstructed"]["psnr"] > 20
    assert len(sets["painted"]["agreement"]["miou_by_seed"]) == 2
    assert sets["real"]["differences"]["pixels"]["within"] is None
    assert sets["painted"]["differences"]["pixels"]["within"] > 0
    assert (out / "quality.png").is_file()
    table = (out / "quality.md").read_text().splitlines()
    assert table[0].count("|") == table[1].count("|") == table[-1].count("|") == 7


def test_measuring_again_gives_the_same_numbers_without_painting(measured):
    first, again, _ = measured
    assert first["sets"] == again["sets"]


def test_too_few_unseen_tiles_are_refused(tmp_path, tiny_recipe, measured):
    *_, out = measured
    with pytest.raises(SystemExit, match="too few unseen tiles"):
        runpy.run_path(str(BENCHMARK))["main"](
            [str(out.parent / "model"), str(out.parent / "tiny.yaml"), "--out", str(tmp_path), "--count", "3"]
        )


# --- labels


def test_label_histograms_are_as_far_apart_as_pixels_would_have_to_change():
    """Against counts by hand: 8 labelled pixels each, of which 3 have to change."""
    real = torch.tensor([[[0, 0, 1, 255], [2, 2, 2, 2]], [[0, 255, 255, 255], [255] * 4]]).byte()
    painted = torch.tensor([[[0, 0, 1, 1], [1, 1, 2, 2]]])
    assert label_histogram(real, 3).tolist() == [3 / 8, 1 / 8, 4 / 8]
    assert histogram_distance(real, painted, 3) == pytest.approx(3 / 8)
    assert histogram_distance(painted, real, 3) == pytest.approx(3 / 8)
    assert histogram_distance(real, real.flip(0), 3) == 0
    assert histogram_distance(torch.zeros(1, 2, 2), torch.ones(1, 3, 3), 3) == 1
    # Two binomials in closed form: |p − q|.
    p, q = (torch.arange(100).lt(n).long().view(1, 10, 10) for n in (13, 40))
    assert histogram_distance(p, q, 2) == pytest.approx(0.27)
