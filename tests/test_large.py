"""Pictures larger than the model: the blended velocity against a sum by hand, and the file in the mask's place."""

from __future__ import annotations

import os
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.blending import cover
from terrasynth.data.world import WORLD_SCHEMA, render
from terrasynth.errors import TerraSynthError
from terrasynth.models.text import PromptCache
from terrasynth.recipe import SamplingConfig
from terrasynth.sampling.tiles import blended_velocity, patches
from terrasynth.systems.generate import load_pipeline, model_digest
from terrasynth.systems.large import paint_large, paint_like

SAMPLING = SamplingConfig(steps=2, batch_size=4)
PLACE = {"crs": "EPSG:32640", "transform": Affine(0.5, 0, 300_000, 0, -0.5, 2_800_000)}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("terrasynth-tiny")


@pytest.fixture(scope="module")
def layout():
    return torch.from_numpy(render(11, size=100)[1][:70])


def test_patches_weigh_one_everywhere_and_keep_it_when_scaled():
    windows = patches(cover(9, 4, 2), cover(14, 5, 1))
    for factor in (1, 3):
        total = torch.zeros(9 * factor, 14 * factor)
        for window in (window.scaled(factor) for window in windows):
            total[window.rows, window.columns] += window.weight
        torch.testing.assert_close(total, torch.ones_like(total))


def test_the_blended_velocity_is_the_weighted_sum_over_windows():
    windows = patches(cover(9, 4, 2), cover(14, 5, 1))
    seen = []

    def velocity(latents, timestep):
        seen.append(timestep.tolist())
        return latents.flip(-1) * torch.arange(1, len(latents) + 1).view(
            -1, 1, 1, 1
        )  # looks around, differs in a batch

    latents = torch.randn(1, 3, 9, 14)
    found = blended_velocity([(windows[:5], velocity), (windows[5:], velocity)])(latents, torch.tensor([700.0]))
    expected = np.zeros((3, 9, 14))
    for position, window in enumerate(windows):
        rank = position % 5 + 1 if position < 5 else position - 4
        for row in range(window.rows.start, window.rows.stop):
            for column in range(window.columns.start, window.columns.stop):
                weight = window.weight[row - window.rows.start, column - window.columns.start]
                mirrored = window.columns.start + window.columns.stop - 1 - column
                expected[:, row, column] += weight.item() * rank * latents[0, :, row, mirrored].numpy()
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)
    assert seen == [[700.0] * 5, [700.0] * (len(windows) - 5)]


def test_a_mask_of_the_model_size_is_painted_as_by_the_pipeline(pipeline):
    mask = torch.from_numpy(render(3, size=128)[1])
    alone = pipeline(mask[None].long(), seeds=[5], output_type="pt", **pipeline.sampling_arguments(SAMPLING)).images[0]
    large = paint_large(pipeline, mask, seed=5, sampling=SAMPLING)
    torch.testing.assert_close(large, (alone * 255).round().byte(), atol=1, rtol=0)


def test_a_larger_one_depends_on_the_seed_and_not_on_the_batch(pipeline):
    mask, four = torch.from_numpy(render(11, size=180)[1][:140]), SamplingConfig(steps=1, batch_size=4)
    image = paint_large(pipeline, mask, seed=5, sampling=four)
    assert image.shape == (3, 140, 180)
    assert torch.equal(image, paint_large(pipeline, mask, seed=5, sampling=four))
    one = paint_large(pipeline, mask, seed=5, sampling=SamplingConfig(steps=1, batch_size=1))
    assert (image.int() - one.int()).abs().max() <= 1
    other = paint_large(pipeline, mask, seed=6, sampling=four)
    assert (image.int() - other.int()).abs().float().mean() > 3


def test_all_prompts_are_read_before_the_first_window(pipeline, monkeypatch):
    reads = []
    encode = pipeline.encode_prompts
    monkeypatch.setattr(
        pipeline, "prompts", PromptCache(lambda prompts: reads.append(prompts) or encode(prompts), None, "")
    )
    mask = torch.from_numpy(render(11, size=300)[1])
    paint_large(pipeline, mask[:130], seed=5, sampling=SamplingConfig(steps=2, batch_size=2))
    assert len(reads) == 1
    assert "" in reads[0]


def test_the_conditions_of_one_batch_are_in_memory_at_a_time(pipeline, monkeypatch):
    alive, most, original = weakref.WeakSet(), [], type(pipeline).encode_masks

    def encode_masks(self, masks):
        encoded = original(self, masks)
        if masks.amin() < WORLD_SCHEMA.num_classes:  # the unlabelled mask of the guidance is kept
            alive.add(encoded)
            most.append(len(alive))
        return encoded

    monkeypatch.setattr(type(pipeline), "encode_masks", encode_masks)
    mask = torch.from_numpy(render(11, size=300)[1])
    paint_large(pipeline, mask[:130], seed=5, sampling=SamplingConfig(steps=1, batch_size=2))
    assert len(most) == len(cover(17, 16, 8).starts) * len(cover(38, 16, 8).starts) / 2
    assert max(most) == 1


def test_every_window_of_every_step_is_told_with_the_time_that_is_left(pipeline, layout, monkeypatch, capsys):
    monkeypatch.delenv("TERRASYNTH_QUIET", raising=False)
    monkeypatch.setattr("terrasynth.progress._LINE_EVERY", 0.0)
    paint_large(pipeline, layout.repeat(2, 2), seed=5, sampling=SAMPLING)
    windows = len(cover(18, 16, 8).starts) * len(cover(25, 16, 8).starts)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert lines[0].startswith(f"painting: 4/{2 * windows} windows, ")
    assert lines[-1].startswith(f"painting: {2 * windows}/{2 * windows} windows, ")


def test_there_is_no_seam_where_windows_begin(pipeline):
    """Neighbouring pixels differ no more where windows begin or end than where other tokens do."""
    flat = torch.full((128, 320), WORLD_SCHEMA.names.index("field"), dtype=torch.uint8)
    image = paint_large(pipeline, flat, seed=1, sampling=SamplingConfig(steps=4)).float()
    steps = (image[:, :, 1:] - image[:, :, :-1]).abs().mean((0, 1))
    starts = cover(40, 16, 8).starts
    borders = [start * 8 - 1 for start in starts[1:]] + [(start + 16) * 8 - 1 for start in starts[:-1]]
    assert steps[borders].mean() < 1.2 * steps[7::8].mean()


def test_the_picture_lies_where_the_mask_lies_and_says_that_it_is_synthetic(tmp_path, layout):
    mask = tmp_path / "mask.tif"
    rgb = np.moveaxis(WORLD_SCHEMA.to_color(layout), -1, 0)
    with rasterio.open(mask, "w", driver="GTiff", count=3, dtype="uint8", width=100, height=70, **PLACE) as file:
        file.write(rgb)
    out = tmp_path / "painted.tif"
    options = ["--seed", "5", "--set", "sampling.steps=2", "--set", "sampling.batch_size=4"]
    result = CliRunner().invoke(app, ["generate", "terrasynth-tiny", "--like", str(mask), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    with rasterio.open(out) as file:
        assert (file.crs.to_epsg(), file.transform, file.shape) == (32640, PLACE["transform"], (70, 100))
        tags = file.tags()
        assert (tags["synthetic"], tags["seed"], tags["source_mask"]) == ("1", "5", "mask.tif")
        assert tags["model"] == model_digest("terrasynth-tiny")
        expected = paint_large(load_pipeline("terrasynth-tiny"), layout, seed=5, sampling=SAMPLING)
        np.testing.assert_array_equal(file.read(), expected.numpy())


@pytest.fixture
def mask(tmp_path, layout):
    path = tmp_path / "mask.tif"
    with rasterio.open(path, "w", driver="GTiff", count=1, dtype="uint8", width=100, height=70, **PLACE) as file:
        file.write(layout.numpy(), 1)
    return path


@pytest.mark.parametrize("moment", ["fsync 1", "replace 1", "fsync 2"])
def test_a_run_killed_ends_as_one_that_was_not(tmp_path, mask, killed, moment):
    """Killed before the file is complete, before it is in its place, and right after."""
    whole, out = tmp_path / "whole.tif", tmp_path / "out.tif"
    paint_like("terrasynth-tiny", mask, whole, sampling=SAMPLING, seed=5)
    name, number = moment.split()

    def again():
        paint_like("terrasynth-tiny", mask, out, sampling=SAMPLING, seed=5)

    assert killed(again, os if name == "fsync" else Path, name, int(number) - 1)
    assert out.exists() == (moment == "fsync 2")
    assert len(list(tmp_path.iterdir())) == 3  # the mask, the whole one, and the new one or a part of it
    paint_like("terrasynth-tiny", mask, out, sampling=SAMPLING, seed=5)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.tif", "out.tif", "whole.tif"]


def test_the_same_command_leaves_its_picture_and_another_is_refused(tmp_path, mask, layout):
    out = tmp_path / "out.tif"
    for _ in range(2):
        paint_like("terrasynth-tiny", mask, out, sampling=SAMPLING, seed=5)
    before = out.stat().st_mtime_ns
    paint_like("terrasynth-tiny", mask, out, sampling=SAMPLING, seed=5)
    assert out.stat().st_mtime_ns == before
    for changes in ({"seed": 6}, {"sampling": SamplingConfig(steps=3, batch_size=4)}):
        with pytest.raises(TerraSynthError, match="was made of something else"):
            paint_like("terrasynth-tiny", mask, out, **{"sampling": SAMPLING, "seed": 5, **changes})
    with pytest.raises(TerraSynthError, match="was made of something else"):
        paint_like("terrasynth-tiny", mask, mask, sampling=SAMPLING, seed=5)
    with rasterio.open(mask, "r+") as file:
        file.write(1 - layout.numpy().clip(max=1), 1)
    with pytest.raises(TerraSynthError, match="was made of something else"):
        paint_like("terrasynth-tiny", mask, out, sampling=SAMPLING, seed=5)


def test_a_mask_without_a_place_and_one_with_nodata(tmp_path, layout):
    values = layout.numpy().copy()
    values[:20, :30] = 99
    for name, options in (("plain", {}), ("placed", PLACE)):
        path = tmp_path / f"{name}.tif"
        profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "width": 100, "height": 70, "nodata": 99}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, "w", **profile, **options) as file:
                file.write(values, 1)
            paint_like("terrasynth-tiny", path, tmp_path / f"{name}-out.tif", sampling=SAMPLING)
    values[:20, :30] = WORLD_SCHEMA.ignore_index
    expected = paint_large(load_pipeline("terrasynth-tiny"), torch.from_numpy(values), seed=0, sampling=SAMPLING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "plain-out.tif") as plain, rasterio.open(tmp_path / "placed-out.tif") as placed:
            assert (plain.crs, placed.crs.to_epsg()) == (None, 32640)
            np.testing.assert_array_equal(plain.read(), expected.numpy())
            np.testing.assert_array_equal(placed.read(), expected.numpy())


def test_it_is_said_how_a_mask_is_read(tmp_path, mask, layout, capsys, monkeypatch):
    monkeypatch.delenv("TERRASYNTH_QUIET", raising=False)
    paint_like("terrasynth-tiny", mask, tmp_path / "a.tif", sampling=SAMPLING)
    counts = np.bincount(layout.numpy().ravel(), minlength=6) / layout.numel() * 100
    largest = int(counts.argmax())
    assert f"read as: {WORLD_SCHEMA.names[largest]} {counts[largest]:.0f} %, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("colors", "names", "message"),
    [
        ([WORLD_SCHEMA.colors[3], (1, 2, 3), (4, 5, 6)], {}, "0 = bare ground, 1 = field; by their colours: 0 = road"),
        ([], {0: "building", 1: "land"}, "0 = building, 1 = land; in the label schema: 0 = bare ground, 1 = field"),
    ],
    ids=["colours", "names"],
)
def test_a_mask_of_other_classes_is_refused(tmp_path, colors, names, message):
    mask = tmp_path / "mask.tif"
    with rasterio.open(mask, "w", driver="GTiff", count=1, dtype="uint8", width=100, height=70, **PLACE) as file:
        file.write(np.arange(7000).reshape(1, 70, 100).astype(np.uint8) % 2)
        if colors:
            file.write_colormap(1, dict(enumerate(colors)))
        file.update_tags(1, **{f"class_{value}": name for value, name in names.items()})
    with pytest.raises(TerraSynthError, match=message) as caught:
        paint_like("terrasynth-tiny", mask, tmp_path / "a.tif", sampling=SAMPLING)
    assert caught.value.path == mask
    assert "data.mask_coding" not in caught.value.fix


def test_what_can_not_be_painted_is_explained(tmp_path, monkeypatch):
    mask = tmp_path / "mask.tif"
    with rasterio.open(mask, "w", driver="GTiff", count=1, dtype="uint8", width=100, height=70, **PLACE) as file:
        file.write(np.full((1, 70, 100), 77, np.uint8))
    for arguments, message in (
        (["--like", str(mask), "--out", str(tmp_path / "a.png")], "a name that ends in .tif"),
        (["--like", str(mask)], "--out"),
        (["--like", str(mask), "--out", "a.tif", "--count", "3"], "--masks, --count, --steer"),
    ):
        result = CliRunner().invoke(app, ["generate", "terrasynth-tiny", *arguments])
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    with pytest.raises(TerraSynthError, match="mask values that are no class"):
        paint_like("terrasynth-tiny", mask, tmp_path / "a.tif", sampling=SAMPLING)
    monkeypatch.setattr("terrasynth.systems.large.MAX_PIXELS", 100)
    with pytest.raises(TerraSynthError, match="too large to paint"):
        paint_like("terrasynth-tiny", mask, tmp_path / "a.tif", sampling=SAMPLING)
