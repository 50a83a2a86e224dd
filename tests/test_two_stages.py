"""Pairs that are painted small and then enlarged: both trainings, killed and gone on; what they paint, by the commands
that a user has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.folder import Tiles, load_synthetic, load_tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import PairsConfig, PairsSamplingConfig, Recipe, TrainConfig
from terrasynth.systems.pairs import PairViews, build_pairs, build_upscaler, fit_pairs, generate_pairs, load_pairs
from terrasynth.systems.satsynth import Given, SatSynthPipeline, halve

TRAIN = {"steps": 4, "batch_size": 2, "warmup_steps": 1, "checkpoint_every": 2, "evaluate_every": 4, "ema_decay": 0.9}
SIZES = {"patch_size": 2, "widths": [16, 16], "attention": [4], "train": TRAIN}
SAMPLING = ["--set", "pairs.sampling.steps=2", "--set", "pairs.sampling.batch_size=2"]


@pytest.fixture(scope="module")
def recipe(tiny_recipe) -> Recipe:
    values = tiny_recipe.model_dump(mode="json")
    values["pairs"] |= SIZES | {"two_stages": True, "upscaler": SIZES | {"patch_size": 4}}
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def written(recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    return str(path)


def invoke(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def run(written, tmp_path_factory):
    """The folder of a run whose pairs were trained by the command."""
    out = tmp_path_factory.mktemp("run")
    (folder,) = (Path(line) for line in invoke("train", written, "--what", "pairs", "--out", out).splitlines()[:1])
    assert folder.name == "model"
    return out


def model_of(run):
    (folder,) = run.glob("pairs-*/model")
    return folder


def weights(model):
    return [
        torch.cat([value.flatten() for value in SatSynthPipeline.from_pretrained(each).network.state_dict().values()])
        for each in (model, model / "upscaler")
    ]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The commands


def test_both_stages_are_trained_each_in_its_folder(run, recipe):
    model = model_of(run)
    sides = [SatSynthPipeline.from_pretrained(each).config for each in (model, model / "upscaler")]
    assert [(each.condition, each.image_size, each.patch_size) for each in sides] == [("none", 16, 2), ("half", 32, 4)]
    for folder in (model.parent, model.parent / "upscaler"):
        assert (folder / "log.jsonl").is_file()
        assert (folder / "previews" / "step-00000004.png").is_file()
        assert not (folder / "checkpoints").exists()


def test_what_is_painted_has_the_size_of_the_tiles(run, written, tmp_path):
    by_recipe = ["generate", written, "--run", run, "--pairs", 3, "--seed", 3, *SAMPLING]
    invoke(*by_recipe, "--out", tmp_path / "recipe")
    painted = load_synthetic(tmp_path / "recipe")
    assert painted.images.shape == (3, 3, 32, 32)
    assert "painted them and their masks" in (tmp_path / "recipe" / "README.md").read_text()
    invoke("generate", model_of(run), "--pairs", 3, "--seed", 3, *SAMPLING, "--out", tmp_path / "model")
    assert files(tmp_path / "model") == files(tmp_path / "recipe")
    assert len(list(run.glob("pairs-*"))) == 1, "nothing was trained again"


def test_what_is_wrong_is_said_before_anything_is_written(run, written, tmp_path):
    model, out = model_of(run), tmp_path / "out"
    for arguments, message in (
        (["generate", model / "upscaler", "--pairs", 1], "a second stage alone paints no pairs"),
        (["generate", model, "--masks", tmp_path], "paint with it by --pairs N"),
        (["generate", model, "--pairs", 1, "--set", "pairs.sampling.shares={lava: 0.2}"], "no such class to ask for"),
        (["generate", model, "--pairs", 1, "--set", "pairs.steps=2"], "expected: pairs.sampling.…\n"),
        (["generate", model, "--pairs", 1, "--set", "sampling.steps=2"], "expected: pairs.sampling.…\n"),
        (["generate", "terrasynth-tiny", "--pairs", 1], "can not paint layouts"),
        (["generate", tmp_path, "--pairs", 1], "not the folder of a model"),
        (["train", written, "--what", "pairs", "--set", "pairs.sampling.shares={lava: 0.2}"], "no such class"),
        (["train", written, "--what", "pairs", "--set", "data.image_size=36"], "expected: a multiple of 8"),
        (["train", written, "--what", "pairs", "--set", "pairs.base=terrasynth-tiny"], "a model of TODSynthPipeline"),
        (["train", written, "--what", "pairs", "--set", "pairs.upscaler.train.steps=1"], "pairs.upscaler.train.warmup"),
    ):
        result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(out)])
        assert (result.exit_code, message in result.stderr) == (2, True), (arguments, result.output)
        assert not list(tmp_path.rglob("model")), arguments
        shutil.rmtree(out, ignore_errors=True)


# The trainings


@pytest.mark.parametrize(
    ("name", "number", "left"),
    [
        ("training_loss", 4, 4),  # the second stage has begun
        ("training_loss", 7, 2),  # it has a checkpoint
        ("save_pretrained", 1, 0),  # the first is half saved
    ],
)
def test_killed_in_the_second_stage_it_goes_on_there(run, recipe, tmp_path, monkeypatch, killed, name, number, left):
    tiles = load_tiles(recipe.data, "train")
    assert killed(lambda: fit_pairs(tiles, recipe.pairs, tmp_path), SatSynthPipeline, name, number)
    assert not (tmp_path / "model").exists()
    real, calls = SatSynthPipeline.training_loss, []
    monkeypatch.setattr(
        SatSynthPipeline, "training_loss", lambda self, batch: calls.append(self.config.condition) or real(self, batch)
    )
    assert fit_pairs(tiles, recipe.pairs, tmp_path).finished
    assert calls == ["half"] * left
    for found, expected in zip(weights(tmp_path / "model"), weights(model_of(run)), strict=True):
        assert torch.equal(found, expected)


def test_no_time_is_left_for_the_second_stage(recipe, tmp_path):
    outcome = fit_pairs(load_tiles(recipe.data, "train"), recipe.pairs, tmp_path, max_minutes=0)
    assert not outcome.finished
    assert not (tmp_path / "model").exists()


def test_a_base_gives_both_stages_and_paints_in_the_size_of_the_tiles(run, recipe):
    schema = load_tiles(recipe.data, "train").schema
    config = recipe.pairs.model_copy(update={"base": str(model_of(run))})
    stages = build_pairs(config, schema, 64), build_upscaler(config, schema, 64)
    for stage, expected in zip(stages, weights(model_of(run)), strict=True):
        assert torch.equal(torch.cat([value.flatten() for value in stage.network.state_dict().values()]), expected)
    assert [stage.config.image_size for stage in stages] == [32, 64]
    with pytest.raises(TerraSynthError, match="second stage alone"):
        build_pairs(config.model_copy(update={"base": f"{model_of(run)}/upscaler"}), schema, 64)


def test_one_stage_has_the_identity_it_had():
    assert {"two_stages", "upscaler"} & PairsConfig().identity().keys() == set()
    assert {"two_stages", "upscaler"} <= PairsConfig(two_stages=True).identity().keys()


# Does it learn?

SCHEMA = LabelSchema(("land", "water", "road"), ((200, 150, 90), (20, 60, 160), (240, 240, 240)))
COLORS = torch.tensor(SCHEMA.colors, dtype=torch.uint8)


@pytest.fixture(scope="module")
def toy():
    """Tiles of 16 pixels whose upper part is of one class, and the rest of another; colours are constant."""
    generator = torch.Generator().manual_seed(0)
    upper, step = torch.randint(3, (256,), generator=generator), torch.randint(1, 3, (256,), generator=generator)
    cut = 2 * torch.randint(1, 8, (256, 1, 1), generator=generator)
    rows = torch.arange(16).view(1, 16, 1) < cut
    masks = torch.where(rows, upper.view(-1, 1, 1), (upper + step).remainder(3).view(-1, 1, 1)).expand(-1, 16, 16)
    ids = tuple(f"{index:03d}" for index in range(256))
    return Tiles(ids, COLORS[masks].movedim(-1, 1).contiguous(), masks.byte().contiguous(), SCHEMA)


def nearest(images):
    """The class of the nearest colour, pixel by pixel."""
    return (images.float().unsqueeze(1) - COLORS.float().view(1, 3, 3, 1, 1)).square().sum(2).argmin(1)


def test_halved_views_are_views_halved(toy):
    for seed in range(8):
        small, large = (PairViews(toy, 8, halved=halved)[3, seed] for halved in (True, False))
        image, mask = halve(large["image"][None], large["mask"][None], 3)
        assert torch.equal(small["image"], image[0])
        assert torch.equal(small["mask"], mask[0])
        assert small["mask"].shape == (8, 8)


def test_a_toy_is_painted_small_and_enlarged(toy, tmp_path):
    def steps(count):
        return TrainConfig(
            steps=count, batch_size=16, learning_rate=3e-3, warmup_steps=10, ema_decay=0.95, evaluate_every=count
        )

    sizes = {"patch_size": 2, "widths": (32, 48), "attention": (2,)}
    config = PairsConfig(
        **sizes, views=1, two_stages=True, train=steps(150), upscaler={**sizes, "train": steps(60)}, asks_classes=False
    )
    assert fit_pairs(toy, config, tmp_path).finished
    how = PairsSamplingConfig(steps=10, batch_size=48)
    painted = load_synthetic(generate_pairs(tmp_path / "model", tmp_path / "painted", how, count=48))
    assert painted.images.shape == (48, 3, 16, 16)
    agreement = (nearest(painted.images) == painted.masks).double().mean()
    # The second stage keeps to what the first painted: the same seeds without it.
    two = load_pairs(tmp_path / "model", "fp32")
    seeds = list(range(32))
    large, small = two(seeds=seeds, num_steps=10), two.first(seeds=seeds, num_steps=10)
    kept = (halve(large.images.float() / 255, large.masks, 3)[1] == small.masks).double().mean()
    print(f"\nclasses of the nearest colour {agreement:.3f}, classes kept {kept:.3f}")
    assert agreement > 0.9
    assert kept > 0.95

    # What is given has the size of the result: images under masks, and the lower part of tiles beside the upper one.
    images, masks = toy.images[:32], toy.masks[:32].long()
    under = two(seeds=seeds, masks=masks, num_steps=10)
    assert torch.equal(under.masks, masks.byte())
    known = (torch.arange(16).view(16, 1) < 9).expand(32, 16, 16)
    beside = two(seeds=seeds, images=images, known=known, masks=masks.where(known, SCHEMA.ignore_index), num_steps=10)
    assert torch.equal(beside.images[:, :, :9], images[:, :, :9])
    assert torch.equal(beside.masks[:, :9], masks[:, :9].byte())
    agreements = [(nearest(pairs.images) == pairs.masks).double().mean() for pairs in (under, beside)]
    alone = (nearest(large.images) == masks).double().mean()
    print(f"under masks {agreements[0]:.3f}, beside what is known {agreements[1]:.3f}, without {alone:.3f}")
    assert min(agreements) > 0.9 > 0.6 > alone


def test_given_parts_are_halved_where_all_of_it_is_known():
    images = torch.tensor([10, 20, 30, 40], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2).repeat(1, 1, 1, 2)
    known = torch.ones(1, 2, 4, dtype=torch.bool)
    known[0, 0, 3] = False
    masks = torch.tensor([[[1, 2, 255, 255], [2, 255, 255, 255]]])
    half = Given(images, known, masks).halved(3)
    assert torch.equal(half.images, torch.full((1, 3, 1, 2), 25, dtype=torch.uint8))
    assert half.known.tolist() == [[[True, False]]]
    assert half.masks.tolist() == [[[2, 255]]]
    assert Given().halved(3) == Given()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"masks": torch.zeros(1, 34, 34).long()}, "expected: multiples of 8"),
        ({"images": torch.zeros(1, 3, 32, 32)}, "the images are no bytes"),
        ({"masks": torch.zeros(1, 32, 32).long(), "images": torch.zeros(1, 3, 16, 16).byte()}, "does not fit"),
        ({"masks": torch.full((1, 32, 32), 99)}, "classes that the model does not know"),
    ],
)
def test_what_does_not_fit_two_stages_is_refused(run, given, message):
    with pytest.raises(TerraSynthError, match=message):
        load_pairs(model_of(run), "fp32")(seeds=[0], **given)
