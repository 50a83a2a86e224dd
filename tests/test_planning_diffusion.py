"""What refiner and painter of pairs are said to need, against the same at work and against the training loop."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.world import WORLD_SCHEMA
from terrasynth.errors import TerraSynthError
from terrasynth.planning import diffusion
from terrasynth.planning.footprint import count, flops, pretend
from terrasynth.recipe import Recipe
from terrasynth.systems.idgbr import IDGBRPipeline
from terrasynth.systems.refine import build_refiner
from terrasynth.training.loop import train

SIZE = 32
SMALL = {"widths": [16, 32], "train": {"steps": 2, "batch_size": 3, "warmup_steps": 1, "ema_decay": 0.9}}
#: Of either: the settings of the paper, and those that change what is computed.
KINDS = [
    ("refiner", {}),
    ("refiner", {"conditions": "separate", "each_class": True, "prediction_type": "epsilon"}),
    ("refiner", {"alignment": "test_resnet"}),
    ("refiner", {"base": "sd15"}),
    ("pairs", {}),
    ("pairs", {"asks_classes": False, "condition": "given"}),
    ("upscaler", {}),
]


@pytest.fixture
def recipe_of(tiny_recipe, sd15):
    def make(what, changes):
        values = tiny_recipe.model_dump(mode="json")
        values["data"]["image_size"] = SIZE
        if what == "upscaler":
            values["pairs"] |= {"two_stages": True, "upscaler": SMALL}
            what = "pairs"
        values[what] |= SMALL | changes
        if "base" in changes:
            values[what] |= {"base": str(sd15[0]), "widths": Recipe.model_fields[what].default.widths}
        return Recipe.model_validate(values)

    return make


def at_work(recipe, what):
    torch.manual_seed(0)
    return diffusion.pipeline_of(recipe, WORLD_SCHEMA, what)


def maps(pipeline, *count):
    """Class maps that have all classes."""
    return torch.arange(SIZE**2).view(SIZE, SIZE).remainder(pipeline.num_classes).expand(*count, SIZE, SIZE)


def held(pipeline):
    return [x for part in diffusion._networks(pipeline) for x in (*part.parameters(), *part.buffers())]


@pytest.mark.parametrize(("what", "changes"), KINDS)
def test_a_pretended_step_needs_what_the_training_loop_needs(recipe_of, tmp_path, what, changes):
    recipe = recipe_of(what, changes)
    with pretend(gpu=False):
        said = diffusion.train(recipe, diffusion.pretended(recipe, WORLD_SCHEMA, what), gpu=False).count("")
    assert said.weights + said.gradients + said.optimizer + said.average < said.peak

    pipeline = at_work(recipe, what)
    config = diffusion.training(recipe, pipeline)
    mask = maps(pipeline)
    row = {"image": torch.zeros(3, SIZE, SIZE), "rough": mask, "mask": mask}

    class Rows:
        def __len__(self):
            return 9

        def __getitem__(self, key):
            return row

    with diffusion._unread(), count(held(pipeline)) as needs:
        train(pipeline.network, pipeline.training_loss, Rows(), config, tmp_path, seed=0)
    assert flops(needs.operations) == 2 * said.flops > 0
    assert said.peak == pytest.approx(needs.peak, rel=0.05)


@pytest.mark.parametrize(("what", "changes"), [kind for kind in KINDS if kind[0] == "refiner"])
def test_refining_needs_what_was_said(recipe_of, what, changes):
    recipe = recipe_of(what, changes)
    with pretend(gpu=False):
        said = diffusion.refine(diffusion.pretended(recipe, WORLD_SCHEMA, what), 2, 3, "fp32", gpu=False).count("")
    pipeline = at_work(recipe, what)
    images, rough = torch.zeros(2, 3, SIZE, SIZE), maps(pipeline, 2)
    with count(held(pipeline)) as needs:
        pipeline.scores(images, rough, seeds=[0, 1], num_steps=3)
    assert said.flops == flops(needs.operations)
    assert said.peak == pytest.approx(needs.peak - nbytes_of_alignment(pipeline), rel=0.1)


def nbytes_of_alignment(pipeline):
    """It serves the training alone."""
    part = pipeline.alignment
    return 0 if part is None else sum(4 * x.numel() for x in (*part.parameters(), *part.buffers()))


@pytest.mark.parametrize(("changes", "scale"), [({}, 1.0), ({}, 2.0), (KINDS[5][1], None)])
def test_painting_pairs_needs_what_was_said(recipe_of, changes, scale):
    shares = None if scale is None else {WORLD_SCHEMA.names[1]: 0.2}
    sampling = {"steps": 3} if shares is None else {"steps": 3, "shares": shares, "guidance_scale": scale}
    recipe = recipe_of("pairs", changes | {"sampling": sampling})
    with pretend(gpu=False):
        pipeline = diffusion.pretended(recipe, WORLD_SCHEMA, "pairs")
        said = diffusion.paint(recipe, pipeline, 2, 3, "fp32", gpu=False).count("")
    pipeline = at_work(recipe, "pairs")
    given = {} if shares is None else {"shares": pipeline.ask(shares, 2), "guidance_scale": scale}
    with count(held(pipeline)) as needs:
        pipeline(seeds=[0, 1], num_steps=3, **given)
    assert said.flops == flops(needs.operations)
    assert said.peak == pytest.approx(needs.peak, rel=0.1)


def test_enlarging_pairs_needs_what_was_said(recipe_of):
    recipe = recipe_of("upscaler", {"sampling": {"shares": {WORLD_SCHEMA.names[1]: 0.2}, "guidance_scale": 2.0}})
    with pretend(gpu=False):
        pipeline = diffusion.pretended(recipe, WORLD_SCHEMA, "upscaler")
        said = diffusion.paint(recipe, pipeline, 2, 3, "fp32", gpu=False).count("")
    pipeline, side = at_work(recipe, "upscaler"), SIZE // 2
    images, masks = torch.zeros(2, 3, side, side, dtype=torch.uint8), torch.zeros(2, side, side, dtype=torch.long)
    with count(held(pipeline)) as needs:
        pipeline.upscale(images, masks, seeds=[0, 1], num_steps=3)
    assert said.flops == flops(needs.operations)
    assert said.peak == pytest.approx(needs.peak, rel=0.1)


def test_what_is_built_of_a_base_is_what_loads(recipe_of, sd15, tmp_path):
    recipe = recipe_of("refiner", {"base": "sd15"})
    loaded = build_refiner(recipe.refiner, WORLD_SCHEMA, SIZE)
    assert loaded.config.snap_rounds == recipe.refiner.snap_rounds > 0
    loaded.save_pretrained(tmp_path)

    def shapes(pipeline):
        return {name: tuple(value.shape) for name, value in pipeline.network.state_dict().items()}

    expected = shapes(loaded)
    assert shapes(at_work(recipe, "refiner")) == expected
    again = recipe.model_copy(update={"refiner": recipe.refiner.model_copy(update={"base": str(tmp_path)})})
    assert shapes(at_work(again, "refiner")) == expected
    other = again.model_copy(update={"refiner": again.refiner.model_copy(update={"conditions": "separate"})})
    with pytest.raises(TerraSynthError, match=r"--set refiner\.conditions=joint"):
        at_work(other, "refiner")


def test_a_base_of_other_classes_is_planned_as_it_is_trained(recipe_of, tmp_path):
    base = IDGBRPipeline.from_scratch(widths=(8, 8), guidance_width=8, image_size=SIZE)
    base.save_pretrained(tmp_path)
    recipe = recipe_of("refiner", {})
    refiner = recipe.refiner.model_copy(update={"base": str(tmp_path), "codes": "onehot"})
    trained = build_refiner(refiner, WORLD_SCHEMA, SIZE)
    planned = at_work(recipe.model_copy(update={"refiner": refiner}), "refiner")
    assert planned.num_classes == trained.num_classes == WORLD_SCHEMA.num_classes
    assert planned.unet.conv_in.weight.shape == trained.unet.conv_in.weight.shape
    assert planned.condition_encoder.conv_in.weight.shape == trained.condition_encoder.conv_in.weight.shape


def test_stable_diffusion_has_the_published_number_of_parameters(tiny_recipe):
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    refiner = tiny_recipe.refiner.model_copy(update={"base": base, "crop": None, "conditions": "separate"})
    with torch.device("meta"):
        pipeline = diffusion.pipeline_of(tiny_recipe.model_copy(update={"refiner": refiner}), WORLD_SCHEMA, "refiner")
    counts = diffusion.parameters(pipeline)
    # Those of the files on the hub.
    assert counts["unet"] == (859_520_964, 859_520_964)
    assert (counts["vae"], counts["text encoder"]) == ((83_653_863, 0), (123_060_480, 0))
    assert counts["condition encoder"][1] == 0


def test_the_doctor_plans_what_is_asked_for(recipe_of, tmp_path):
    path = tmp_path / "mine.yaml"
    saving = SMALL["train"] | {"precision": "bf16", "offload_optimizer": True}
    for what, uses, trained, expected in (
        ("refiner", "offload_optimizer|refine 8 windows", SMALL["train"], 4),
        ("pairs", "paint [0-9]+", saving, 3),
        ("upscaler", "offload_optimizer|paint [0-9]+", SMALL["train"], 8),
    ):
        path.write_text(recipe_of(what, {"train": trained}).model_dump_json(), encoding="utf-8")
        command = ["doctor", "--plan", str(path), "--card", "H100", "--what", what.replace("upscaler", "pairs")]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        rows = re.findall(rf"^  (?:training step|preview|{uses}) .* s$", result.stdout, re.MULTILINE)
        assert len(rows) == expected
        assert ("steps (2x) on H100" in result.stdout) == (what == "upscaler")
        assert ("time of its update there is not counted" in " ".join(result.stdout.split())) == (trained is saving)
        assert "steps on H100, at the data sheet's speed, so at least" in result.stdout
    assert CliRunner().invoke(app, ["doctor", "--what", "pairs"]).exit_code == 2
