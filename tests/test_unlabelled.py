"""Windows of unlabelled images and pseudo-masks, against slices, block means and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.folder import load_tiles, unlabelled_windows
from terrasynth.data.schema import LabelSchema
from terrasynth.data.unlabelled import _kmeans, cut_windows, merged_schema, pseudo_masks
from terrasynth.data.world import WORLD_SCHEMA
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import DataConfig, SourceConfig

SIZE = 16


def ramp(height: int, width: int, blue: int = 0) -> np.ndarray:
    """An image whose red is the column and whose green is the row: every pixel says where it is."""
    rows, columns = np.indices((height, width), dtype=np.uint8)
    return np.dstack([columns, rows, np.full_like(rows, blue)])


def photograph(seed: int, height: int = 60, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def source(images: str = "*.png", **values) -> SourceConfig:
    return SourceConfig(images=images, **values)


def cut(root, **values) -> dict[str, np.ndarray]:
    names, windows = cut_windows(root, source(**values), SIZE)
    assert len(set(names)) == len(names)
    assert windows.dtype == torch.uint8
    assert windows.shape == (len(names), 3, SIZE, SIZE)
    return {name: window.permute(1, 2, 0).numpy() for name, window in zip(names, windows, strict=True)}


# --- windows ---------------------------------------------------------------------------------------------------------


def test_a_window_is_a_function_of_its_image_its_name_and_its_number_alone(tmp_path):
    for seed, name in enumerate(("b", "d")):
        save(tmp_path / "few" / f"{name}.png", photograph(seed))
        save(tmp_path / "many" / f"{name}.png", photograph(seed))
    for seed, name in enumerate(("a", "c", "e"), 5):
        save(tmp_path / "many" / f"{name}.png", photograph(seed, 90, 40))
    few, many = cut(tmp_path / "few", windows=3), cut(tmp_path / "many", windows=5)
    assert (len(few), len(many)) == (6, 25)
    for name, window in few.items():
        np.testing.assert_array_equal(window, many[name])
    assert len({window.tobytes() for window in many.values()}) == 25


def test_a_window_as_large_as_it_is_to_become_is_cut_out_exactly(tmp_path):
    save(tmp_path / "a.png", ramp(60, 50))
    corners = set()
    for window in cut(tmp_path, windows=200, scale=(1, 1)).values():
        left, top, _ = window[0, 0]
        np.testing.assert_array_equal(window, ramp(60, 50)[top : top + SIZE, left : left + SIZE])
        corners.add((int(top), int(left)))
    tops, lefts = (np.array(sorted(corners))[:, axis] for axis in (0, 1))
    # Everywhere, to the very edges.
    assert (tops.min(), tops.max()) == (0, 60 - SIZE)
    assert (lefts.min(), lefts.max()) == (0, 50 - SIZE)


def test_a_window_twice_as_large_is_the_mean_of_each_four_pixels(tmp_path):
    save(tmp_path / "a.png", ramp(60, 50))
    for window in cut(tmp_path, windows=20, scale=(2, 2)).values():
        # The mean of columns c and c + 1 is c + 1/2, rounded up.
        left, top, _ = window[0, 0].astype(int) - 1
        square = ramp(60, 50)[top : top + 2 * SIZE, left : left + 2 * SIZE].astype(int)
        np.testing.assert_array_equal(window, np.floor(square.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3)) + 0.5))


@pytest.mark.parametrize(
    ("scale", "shape", "smallest", "largest"),
    [((1.25, 3), (200, 150), 20, 48), ((1, 8), (70, 90), 16, 70), ((1.3, 1.3), (21, 40), 21, 21)],
    ids=["as asked", "no larger than the image", "an image just large enough"],
)
def test_sides_lie_between_the_scales_and_fit_the_image(tmp_path, scale, shape, smallest, largest):
    save(tmp_path / "a.png", ramp(*shape))
    sides = []
    for window in cut(tmp_path, windows=60, scale=scale).values():
        # On a ramp, neighbours differ by the reduction: away from the ends, which are resampled from fewer pixels.
        middle = window[4:-4, 4:-4].astype(float)
        steps = [np.polyfit(np.arange(8), middle.mean(1 - axis)[:, 1 - axis], 1)[0] for axis in (0, 1)]
        sides.append(np.array(steps) * SIZE)
    sides = np.array(sides)
    assert np.abs(sides[:, 0] - sides[:, 1]).max() < 2  # square
    assert sides.min() > smallest - 1.5
    assert sides.max() < largest + 1.5
    if smallest < largest:
        assert sides.min() < smallest + 0.15 * (largest - smallest)
        assert sides.max() > largest - 0.15 * (largest - smallest)


def test_images_of_every_kind_come_as_rgb(tmp_path):
    grey = ramp(SIZE, SIZE)[..., 0]
    save(tmp_path / "grey.png", grey)
    save(tmp_path / "opaque.png", np.dstack([ramp(SIZE, SIZE, 7), np.full_like(grey, 255)]))
    palette = Image.fromarray(grey)
    palette.putpalette(np.arange(768, dtype=np.uint32).astype(np.uint8).tobytes())
    palette.save(tmp_path / "palette.png")
    got = cut(tmp_path, images="*", windows=1, scale=(1, 1))
    np.testing.assert_array_equal(got["grey.png-000"], np.dstack([grey] * 3))
    np.testing.assert_array_equal(got["opaque.png-000"], ramp(SIZE, SIZE, 7))
    colors = np.arange(768, dtype=np.uint32).astype(np.uint8).reshape(256, 3)
    np.testing.assert_array_equal(got["palette.png-000"], colors[grey])


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((SIZE, SIZE), np.uint16), "not 8-bit"),
        (np.zeros((SIZE, SIZE, 4), np.uint8), "opaque alpha"),
        (np.zeros((SIZE - 1, 2 * SIZE, 3), np.uint8), "smaller than a window"),
        (b"text", "not an image"),
        (b"", "empty"),
    ],
    ids=["16 bits", "transparent", "too small", "no image", "empty"],
)
def test_an_image_that_can_not_be_used_is_named(tmp_path, pixels, message):
    save(tmp_path / "a.png", photograph(0))
    if isinstance(pixels, bytes):
        (tmp_path / "b.png").write_bytes(pixels)
    else:
        save(tmp_path / "b.png", pixels)
    with pytest.raises(TerraSynthError, match=message) as caught:
        cut(tmp_path, scale=(1, 2))
    assert caught.value.path == tmp_path / "b.png"
    assert caught.value.fix


def test_all_images_that_can_not_be_used_are_named_or_left_out(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TERRASYNTH_QUIET", "0")
    for index, name in enumerate(("a", "c")):
        save(tmp_path / f"{name}.png", photograph(index))
    good = cut_windows(tmp_path, source(), SIZE)
    (tmp_path / "b.png").write_bytes(b"text")
    (tmp_path / "d.png").write_bytes(b"")
    with pytest.raises(TerraSynthError, match=r"2 of 4 images of \*\.png can not be used") as caught:
        cut_windows(tmp_path, source(), SIZE)
    names, windows = cut_windows(tmp_path, source(), SIZE, skip_bad=True)
    said = capfd.readouterr().err
    for name in ("b", "d"):
        assert str(tmp_path / f"{name}.png") in str(caught.value)
        assert str(tmp_path / f"{name}.png") in said
    assert names == good[0]
    assert torch.equal(windows, good[1])


def test_a_truncated_image_is_named(tmp_path):
    save(tmp_path / "a.png", photograph(0))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(TerraSynthError, match="damaged"):
        cut(tmp_path)


@pytest.mark.parametrize("pattern", ["*.jpg", "none/*", "/etc/*", "", "a**", "notes.txt"])
def test_a_pattern_that_names_no_image_is_an_error(tmp_path, pattern):
    save(tmp_path / "a.png", photograph(0))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(TerraSynthError, match="no such images") as caught:
        cut(tmp_path, images=pattern)
    assert "data.unlabelled" in caught.value.fix


def test_hidden_and_other_files_are_passed_over_and_equal_stems_kept_apart(tmp_path):
    for name in ("x/a.png", "x/a.jpg", "y/a.png"):
        save(tmp_path / name, photograph(0))
    (tmp_path / "x" / "._a.png").write_bytes(b"what some systems leave beside a copy")
    (tmp_path / "x" / "a.tfw").write_text("0.5")
    assert list(cut(tmp_path, images="*/*", windows=1)) == ["x/a.jpg-000", "x/a.png-000", "y/a.png-000"]


# --- as tiles --------------------------------------------------------------------------------------------------------


def test_windows_beside_labelled_tiles_carry_their_sources_caption_and_no_label(tmp_path):
    save(tmp_path / "a.png", photograph(0))
    config = DataConfig(
        kind="folder",
        root=tmp_path,
        image_size=SIZE,
        unlabelled=(source(windows=2), source(windows=3, scale=(1, 1), caption="a photograph of land")),
    )
    schema = LabelSchema(("x", "y"), ((1, 1, 1), (2, 2, 2)), 200)
    tiles = unlabelled_windows(config, schema)
    assert tiles.captions() == ["a satellite image"] * 2 + ["a photograph of land"] * 3
    assert tiles.sample(4)["caption"] == "a photograph of land"
    assert len(set(tiles.ids)) == 5  # the same image twice
    assert (tiles.masks == 200).all()
    assert tiles.unlabelled == 5
    first, second = (cut_windows(tmp_path, s, SIZE)[1] for s in config.unlabelled)
    assert torch.equal(tiles.images, torch.cat([first, second]))
    assert unlabelled_windows(config.model_copy(update={"unlabelled": ()}), schema) is None
    again = config.model_copy(update={"unlabelled": (source(windows=2, caption="else"), config.unlabelled[1])})
    assert unlabelled_windows(config, schema).fingerprint() == tiles.fingerprint()
    assert unlabelled_windows(again, schema).fingerprint() != tiles.fingerprint()


def base_data(folder, **changes) -> DataConfig:
    values = {
        "kind": "unlabelled",
        "root": folder,
        "image_size": 32,
        "unlabelled": [{"images": "*.png", "windows": 3, "scale": [1, 1.5]}],
        "worlds": [{"train": 2, "gsd": 2.0, "seed": 5}, {"train": 1, "gsd": 2.0, "region": "arid"}],
        "clusters": 3,
        "caption": "a rendering of {classes}",
    }
    return DataConfig.model_validate({**values, **changes})


def test_a_base_model_learns_from_windows_under_pseudo_masks_and_from_scenes_under_their_own(tmp_path):
    save(tmp_path / "a.png", photograph(1))
    config = base_data(tmp_path)
    tiles = load_tiles(config, "train")
    worlds = WORLD_SCHEMA.num_classes
    assert tiles.schema.names == (*WORLD_SCHEMA.names, "cover 1", "cover 2", "cover 3")
    windows, covers = tiles.images[:3], tiles.masks[:3]
    masks, _ = pseudo_masks(windows, 3)
    assert torch.equal(covers, masks + worlds)
    expected = [
        load_tiles(DataConfig(image_size=32, world=world, caption=config.caption), "train") for world in config.worlds
    ]
    assert torch.equal(tiles.images[3:], torch.cat([world.images for world in expected]))
    assert torch.equal(tiles.masks[3:], torch.cat([world.masks for world in expected]))
    assert tiles.captions()[:3] == ["a satellite image"] * 3
    assert tiles.captions()[3:] == [caption for world in expected for caption in world.captions()]
    assert len(set(tiles.ids)) == len(tiles) == 6
    assert load_tiles(config, "train").fingerprint() == tiles.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"unlabelled": []}, "names no images"), ({"root": None}, "no data folder"), ({"root": "/nowhere"}, "no such")],
)
def test_a_base_models_data_must_be_there(tmp_path, changes, message):
    with pytest.raises(TerraSynthError, match=message):
        load_tiles(base_data(tmp_path, **changes), "train")


# --- pseudo-masks ----------------------------------------------------------------------------------------------------


def partitioned(colors, count: int, size: int = 96) -> tuple[torch.Tensor, np.ndarray]:
    """Images of four flat rectangles each, and which colour each pixel has."""
    random = np.random.default_rng(0)
    parts = np.zeros((count, size, size), int)
    for part in parts:
        row, column = random.integers(size // 3, 2 * size // 3, 2)
        for rows, columns in itertools.product((slice(row), slice(row, None)), (slice(column), slice(column, None))):
            part[rows, columns] = random.integers(len(colors))
    images = torch.from_numpy(np.array(colors, np.uint8)[parts]).permute(0, 3, 1, 2)
    return images.contiguous(), parts


def away_from_borders(parts: np.ndarray, margin: int) -> np.ndarray:
    values = torch.from_numpy(parts).float()[:, None]
    kernel = 2 * margin + 1
    highest, lowest = (sign * F.max_pool2d(sign * values, kernel, 1, margin) for sign in (1, -1))
    return (highest == lowest)[:, 0].numpy()


COLORS = [(20, 40, 200), (30, 180, 40), (230, 220, 210), (120, 60, 20)]


def test_separated_colours_are_found_again():
    images, parts = partitioned(COLORS, 8)
    masks, shown = pseudo_masks(images, 4)
    assert masks.dtype == torch.uint8
    assert masks.shape == (8, 96, 96)
    assert masks.max() == 3
    # Colours are smoothed over 7 pixels, and so are the votes: 3 pixels to either side each.
    inside = away_from_borders(parts, 6)
    assert inside.mean() > 0.6
    pairs = set(zip(masks.numpy()[inside].tolist(), parts[inside].tolist(), strict=True))
    assert len(pairs) == 4
    assert len(shown) == 4


def test_images_of_one_colour_each_are_told_apart_exactly():
    images = torch.tensor(COLORS * 2, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 20, 20).contiguous()
    masks, shown = pseudo_masks(images, 4)
    assert (masks == masks[:, :1, :1]).all()
    found = masks[:, 0, 0].tolist()
    assert found[:4] == found[4:]
    assert sorted(found[:4]) == [0, 1, 2, 3]
    assert [shown[k] for k in found[:4]] == COLORS


@pytest.mark.parametrize("value", [0, 127])
def test_nothing_to_tell_apart_is_one_region(value):
    masks, shown = pseudo_masks(torch.full((2, 3, 9, 9), value, dtype=torch.uint8), 3)
    assert len(masks.unique()) == 1
    assert shown[int(masks[0, 0, 0])] == (value,) * 3


def test_roughness_tells_regions_of_one_colour_apart():
    images = torch.full((1, 3, 48, 48), 127, dtype=torch.uint8)
    rows, columns = np.indices((48, 24))
    images[..., 24:] = torch.from_numpy(np.where((rows + columns) % 2, 60, 194))
    masks, _ = pseudo_masks(images, 2)
    smooth, grainy = masks[0, :, :18].unique(), masks[0, :, 30:].unique()
    assert len(smooth) == len(grainy) == 1
    assert smooth != grainy


def test_pseudo_masks_are_the_same_every_time_and_for_every_grouping():
    images, _ = partitioned(COLORS, 20)
    images = (images.float() + 20 * torch.randn(images.shape)).clamp(0, 255).byte()
    masks, shown = pseudo_masks(images, 5)
    again, shown_again = pseudo_masks(images, 5)
    assert torch.equal(masks, again)
    assert shown == shown_again


def lloyd(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Lloyd's algorithm to its end, by loops in float64."""
    while True:
        nearest = [min(range(len(centres)), key=lambda k: ((point - centres[k]) ** 2).sum()) for point in points]
        groups = [[p for p, n in zip(points, nearest, strict=True) if n == k] for k in range(len(centres))]
        moved = np.array([np.mean(group, 0) for group in groups])
        if np.allclose(moved, centres, atol=1e-12):
            return centres
        centres = moved


def test_k_means_ends_where_lloyds_algorithm_stands_still():
    points = torch.randn(80, 3)
    centres = _kmeans(points, 4, np.random.default_rng(0), rounds=100)
    still = lloyd(points.double().numpy(), centres.double().numpy())
    np.testing.assert_allclose(centres.numpy(), still, atol=1e-5)


def test_k_means_finds_the_best_of_all_partitions_of_a_few_separate_points():
    points = torch.tensor([[0.0, 0], [0, 1], [9, 9], [9, 8], [0, 20], [1, 20]])
    best = min(
        sum(((group - group.mean(0)) ** 2).sum().item() for group in groups)
        for labels in itertools.product(range(3), repeat=6)
        if len(groups := [points[torch.tensor(labels) == k] for k in set(labels)]) == 3
    )
    for seed in range(20):
        centres = _kmeans(points, 3, np.random.default_rng(seed))
        assert torch.cdist(points, centres).amin(1).square().sum().item() == pytest.approx(best)


def test_a_merged_schema_gives_every_cluster_a_colour_of_its_own():
    schema = LabelSchema(("x", "y"), ((9, 9, 254), (9, 9, 255)), 250, ((0, 0, 0), (0, 0, 1)))
    merged = merged_schema(schema, [(9, 9, 254), (0, 0, 0), (5, 5, 5), (5, 5, 5)])
    assert merged.names == ("x", "y", "cover 1", "cover 2", "cover 3", "cover 4")
    assert merged.colors == (*schema.colors, (9, 9, 0), (0, 0, 2), (5, 5, 5), (5, 5, 6))
    assert (merged.ignore_index, merged.ignore_colors) == (250, schema.ignore_colors)


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    for seed in range(2):
        save(tmp_path / "data" / f"{seed}.png", photograph(seed))
    save(tmp_path / "data" / "black.png", np.zeros((60, 60, 3), np.uint8))
    training = "{steps: 2, batch_size: 2, evaluate_every: 2, warmup_steps: 1}"
    (tmp_path / "base.yaml").write_text(f"""
        name: base
        data:
          kind: unlabelled
          image_size: 32
          unlabelled: [{{images: "*.png", windows: 2, scale: [1, 1.5]}}]
          worlds: [{{train: 2, gsd: 2.0}}]
          clusters: 3
        generator:
          width: 16
          heads: 2
          blocks: 1
          views: 1
          autoencoder: {{patch_size: 8, channels: 8, refiner_width: 8, refiner_blocks: 1, train: {training}}}
          patch_size: 1
          train: {training}
        sampling: {{steps: 2}}
    """)
    return [str(tmp_path / "base.yaml"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]


def test_a_base_model_is_trained_by_the_command_that_trains_others(recipe, tmp_path):
    from terrasynth.systems.generate import load_pipeline

    result = CliRunner().invoke(app, ["train", *recipe])
    assert result.exit_code == 0, result.output
    (model,) = tmp_path.glob("out/generator-*/model")
    assert str(model) in result.stdout
    pipeline = load_pipeline(model)
    assert pipeline.schema.names[-3:] == ("cover 1", "cover 2", "cover 3")
    assert pipeline.vae.refiner is not None
    assert not list(tmp_path.rglob("checkpoints"))  # which only serve to go on


def test_a_study_without_labels_is_refused_with_the_command_that_works(recipe, tmp_path):
    result = CliRunner().invoke(app, ["study", *recipe])
    assert result.exit_code == 2
    assert "there is no validation split" in result.stderr
    assert "terrasynth train" in result.stderr
    assert not list(tmp_path.glob("out/*-*"))


def test_without_a_scale_the_window_is_the_square_in_the_middle(tmp_path):
    pixels = ramp(48, 80)
    save(tmp_path / "a.png", pixels)
    ((_, window),) = cut(tmp_path, windows=1, scale=None).items()
    blocks = pixels[:, 16:64].reshape(16, 3, 16, 3, 3).mean((1, 3))
    assert window.shape == (16, 16, 3)
    assert np.abs(window.astype(float) - blocks).max() <= 0.5
