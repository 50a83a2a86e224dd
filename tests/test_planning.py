"""What a recipe is said to need, against closed forms, against the same code at work, and against the training loop."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.world import WORLD_SCHEMA
from terrasynth.errors import TerraSynthError
from terrasynth.planning import cards, parts, stages
from terrasynth.planning.footprint import Speed, count, enter, flops, flops_by_module, pretend, seconds
from terrasynth.planning.plan import make_plan
from terrasynth.recipe import Recipe
from terrasynth.recipe_io import load_recipe
from terrasynth.systems.generate import load_pipeline
from terrasynth.systems.todsynth import packaged_or
from terrasynth.training.loop import train

MIB = 2**20


@pytest.fixture
def recipe(tiny_recipe) -> Recipe:
    """A generator whose weights and activations outweigh whatever else a step holds."""
    values = tiny_recipe.model_dump(mode="json")
    values["data"]["image_size"] = 64
    values["generator"] |= {"width": 96, "heads": 3, "blocks": 2}
    return Recipe.model_validate(values)


def pretended(recipe, trainable="all"):
    """To be called within `pretend`."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("meta"):
        pipeline = parts.pipeline_of(recipe, WORLD_SCHEMA, trainable, gpu=False)
    for part in parts.modules(pipeline):
        enter(part)
    return pipeline


def test_bytes_are_those_of_storages_that_somebody_holds():
    x = torch.zeros(MIB)  # 4 MiB
    with count([x]) as needs:
        y = x + 1
        z = y.view(2, -1).T  # the same storage
        del y
        w = z * 2
        del z, w
        x[0] = 3
    assert needs.peak == pytest.approx(12 * MIB, rel=1e-4)
    assert needs.now == pytest.approx(4 * MIB, rel=1e-4)


def test_a_product_takes_its_arithmetic_or_its_traffic_whichever_is_longer():
    a, b = torch.zeros(64, 32), torch.zeros(32, 16)
    with count() as needs:
        a @ b
    traffic = 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert flops(needs.operations) == 2 * 64 * 32 * 16
    assert seconds(needs.operations, Speed(1e3, 1, 1e12)) == pytest.approx(2 * 64 * 32 * 16 / 1e3)
    assert seconds(needs.operations, Speed(1e12, 1, 1e3)) == pytest.approx(traffic / 1e3)
    with count() as needs, torch.autocast("cpu", torch.bfloat16):
        a @ b
    assert seconds(needs.operations, Speed(1e12, 1e3, 1e12)) == pytest.approx(2 * 64 * 32 * 16 / 1e3, rel=1e-3)


def test_the_networks_operations_are_those_counted_by_hand(recipe):
    pipeline = parts.pipeline_of(recipe, WORLD_SCHEMA, "all", gpu=False)
    config, schema = pipeline.transformer.config, WORLD_SCHEMA
    width, blocks, image = 96, 2, (64 // 4 // 2) ** 2
    text, prompt = pipeline.prompts([""])[0].shape[1:]
    token = 12 * width**2  # q k v out, and the feed-forward four times as wide
    linear = (
        image * 4 * config.in_channels * width + image * 4 * 16 * schema.num_classes * width + text * prompt * width
    )
    linear += (blocks - 1) * (2 * image + text) * token + image * token + 2 * image * width**2 + 3 * text * width**2
    linear += image * width * 4 * config.in_channels
    everything = 2 * image + text
    attention = 2 * width * everything * ((blocks - 1) * everything + image + text)
    modulation = width**2 * ((blocks - 1) * 18 + 6 + 2 + 2 + 2)  # of three streams; two of the last only look
    embedding = 256 * width + width**2 + config.pooled_projection_dim * width + width**2
    evaluate, steps = stages.paint(recipe, pipeline, 1, gpu=False).parts[0]
    assert steps == recipe.sampling.steps
    with count() as needs:
        evaluate()
    rows = 2  # guidance by the mask
    assert flops(needs.operations) == 2 * rows * (linear + attention + modulation + embedding)
    by_part = flops_by_module(evaluate, lambda name: name.split(".")[-1])
    assert sum(by_part.values()) == flops(needs.operations)


def with_training(recipe, **changes):
    train = recipe.generator.train.model_copy(update=changes)
    return recipe.model_copy(update={"generator": recipe.generator.model_copy(update={"train": train})})


@pytest.mark.parametrize(
    ("trainable", "checkpointing", "train"),
    [("all", False, {}), ("mask", True, {}), ("mask", True, {"precision": "bf16", "offload_optimizer": True})],
)
def test_a_pretended_step_needs_what_the_same_step_needs_at_work(recipe, checkpointing, trainable, train):
    recipe = with_training(recipe, **train)
    with pretend(gpu=False):
        said = stages.train(recipe, pretended(recipe, trainable), checkpointing=checkpointing, gpu=False).count("")
    pipeline = parts.pipeline_of(recipe, WORLD_SCHEMA, trainable, gpu=False)
    done = stages.train(recipe, pipeline, checkpointing=checkpointing, gpu=False).count("")
    assert said.flops == done.flops > 0
    assert said.peak == pytest.approx(done.peak, rel=0.01)
    assert said.activations == pytest.approx(done.activations, rel=0.02)
    assert said.weights + said.gradients + said.optimizer + said.average < said.peak


def test_a_generator_that_learns_layouts_is_planned_with_what_that_takes(recipe):
    layouts = recipe.model_copy(update={"generator": recipe.generator.model_copy(update={"layouts": 0.5})})
    needs = []
    for each in (recipe, layouts):
        with pretend(gpu=False):
            said = stages.train(each, pretended(each), checkpointing=False, gpu=False).count("")
        pipeline = parts.pipeline_of(each, WORLD_SCHEMA, "all", gpu=False)
        assert said.flops == stages.train(each, pipeline, checkpointing=False, gpu=False).count("").flops
        needs.append(said)
    tokens, width, numbers = (64 // 8) ** 2, 96, 64 * WORLD_SCHEMA.num_classes
    rows = recipe.generator.train.batch_size
    readout, time = tokens * width * numbers, 256 * width + width**2
    pixels = WORLD_SCHEMA.num_classes * 64**2
    around, read = pixels * (2 * 9 * 8 * 8 + 8) + width * 16, pixels * 9 * 2 * 8
    # Forward, and gradients of inputs and weights; nothing asks for those of the frequencies and of what pixels read.
    assert needs[1].flops - needs[0].flops == 2 * rows * (3 * (readout + time + around) - 256 * width + 2 * read)


def test_what_makes_a_step_smaller(recipe):
    with pretend(gpu=False):
        whole = stages.train(recipe, pretended(recipe, "mask"), checkpointing=True, gpu=False).count("")
        recipe = with_training(recipe, precision="bf16", offload_optimizer=True)
        pipeline = pretended(recipe, "mask")
        less = stages.train(recipe, pipeline, checkpointing=True, gpu=False).count("")
    frozen = [p for p in pipeline.transformer.parameters() if not p.requires_grad and p.dtype == torch.bfloat16]
    assert whole.weights - less.weights == 2 * sum(p.numel() for p in frozen) > 0.2 * whole.weights
    assert less.optimizer == 0 < whole.optimizer
    assert less.gradients == whole.gradients
    # Nothing holds the trained weights in bfloat16 beside what they are.
    trained = sum(p.numel() for p in pipeline.transformer.parameters() if p.requires_grad)
    assert less.activations < whole.activations + 0.2 * 2 * trained


def test_operations_outside_the_interval_of_guidance_are_those_without(recipe):
    sampling = recipe.sampling.model_copy(update={"steps": 8, "mask_scale": 2.0, "shift": 1.0})
    guided, within = (
        recipe.model_copy(update={"sampling": sampling.model_copy(update={"guidance_interval": interval})})
        for interval in ((0.0, 1.0), (0.2, 0.8))
    )
    with pretend(gpu=True):
        pipeline = pretended(guided, None)
        everywhere = stages.paint(guided, pipeline, 2, gpu=True).count("")
        inside = stages.paint(within, pipeline, 2, gpu=True).count("")
    pipeline = parts.pipeline_of(within, WORLD_SCHEMA, None, gpu=False)
    with count() as needs:
        masks, arguments = (
            torch.zeros(2, 64, 64, dtype=torch.long),
            pipeline.sampling_arguments(within.sampling),
        )
        pipeline(masks, seeds=[0, 1], output_type="pt", **arguments)
    assert inside.flops == flops(needs.operations)
    assert 0.6 < inside.flops / everywhere.flops < 0.9


def test_checkpointing_saves_memory_and_costs_a_forward_pass(recipe):
    with pretend(gpu=False):
        pipeline = pretended(recipe)
        plain, saving = (stages.train(recipe, pipeline, checkpointing=on, gpu=False).count("") for on in (False, True))
        with torch.no_grad(), count() as forward:
            pipeline.training_loss(stages._batch(recipe, pipeline, recipe.generator.train.batch_size))
    assert saving.activations < 0.8 * plain.activations
    # All but the blocks runs once: embeddings and read-out, a few per cent.
    assert flops(forward.operations) * 0.9 < saving.flops - plain.flops < flops(forward.operations)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_training_loop_needs_what_was_said(recipe, tmp_path, accumulate):
    config = recipe.generator.train.model_copy(
        update={"accumulate": accumulate, "steps": 2, "checkpoint_every": 99, "evaluate_every": 99}
    )
    generator = recipe.generator.model_copy(update={"train": config})
    recipe = recipe.model_copy(update={"generator": generator})
    with pretend(gpu=False):
        said = stages.train(recipe, pretended(recipe), checkpointing=False, gpu=False).count("")
    pipeline = parts.pipeline_of(recipe, WORLD_SCHEMA, "all", gpu=False)
    row = {name: tensor[0] for name, tensor in stages._batch(recipe, pipeline, 1).items() if name != "seed"}

    class Rows:
        def __len__(self):
            return 8

        def __getitem__(self, key):
            return row

    held = [x for part in (pipeline.transformer, pipeline.vae) for x in (*part.parameters(), *part.buffers())]
    with count(held) as needs:
        train(pipeline.transformer, pipeline.training_loss, Rows(), config, tmp_path, seed=0)
    assert said.peak == pytest.approx(needs.peak, rel=0.03)
    # The loop counts gradient norms as we do not, in no matrix product.
    assert flops(needs.operations) == 2 * said.flops


def test_painting_needs_what_was_said(recipe):
    with pretend(gpu=False):
        pipeline = pretended(recipe, None)
        said = stages.paint(recipe, pipeline, 2, gpu=False).count("")
    pipeline = parts.pipeline_of(recipe, WORLD_SCHEMA, None, gpu=False)
    masks = torch.zeros(2, 64, 64, dtype=torch.long)
    held = [x for part in parts.modules(pipeline) for x in (*part.parameters(), *part.buffers())]
    with count(held) as needs:
        pipeline(masks, ["", ""], seeds=[0, 1], num_inference_steps=recipe.sampling.steps, output_type="pt")
    assert said.peak == pytest.approx(needs.peak, rel=0.1)
    assert said.flops == flops(needs.operations)


def test_references_are_read_once_and_looked_at_in_every_step(recipe):
    values = recipe.model_dump(mode="json")
    values["generator"]["reference"] = "view"
    values["data"] |= {"kind": "folder", "label_schema": "dubai", "unlabelled": [{"images": "*"}]}
    values["study"]["arms"] = [{"name": "real"}, {"name": "like", "synthetic": "plain", "references": True}]
    looking = Recipe.model_validate(values)
    pipeline = parts.pipeline_of(looking, WORLD_SCHEMA, None, gpu=False)
    with pretend(gpu=False):
        said = stages.paint(looking, pretended(looking, None), 2, gpu=False).count("")
        plain = stages.paint(recipe, pretended(recipe, None), 2, gpu=False).count("")
    masks, references = torch.zeros(2, 64, 64, dtype=torch.long), torch.zeros(2, 3, 64, 64)
    held = [x for part in parts.modules(pipeline) for x in (*part.parameters(), *part.buffers())]
    with count(held) as needs:
        steps = recipe.sampling.steps
        pipeline(masks, ["", ""], references, seeds=[0, 1], num_inference_steps=steps, output_type="pt")
    assert said.flops == flops(needs.operations) > plain.flops
    assert said.peak == pytest.approx(needs.peak, rel=0.1)

    assert {"image", "mask", "text"} <= set(make_plan(looking, Path(), gpu=False).parts)
    guided = {"reference_scale": 2.0, "mask_scale": 1.5}
    more = looking.model_copy(update={"sampling": looking.sampling.model_copy(update=guided)})
    with pretend(gpu=False):
        three = stages.paint(more, pretended(more, None), 2, gpu=False).count("")
    with count() as needs:
        pipeline(masks, ["", ""], references, seeds=[0, 1], num_inference_steps=steps, output_type="pt", **guided)
    assert three.flops == flops(needs.operations) > said.flops

    with pretend(gpu=False):
        step = stages.train(looking, pretended(looking), checkpointing=True, gpu=False).count("")
        without = stages.train(recipe, pretended(recipe), checkpointing=True, gpu=False).count("")
    done = stages.train(
        looking, parts.pipeline_of(looking, WORLD_SCHEMA, "all", gpu=False), checkpointing=True, gpu=False
    ).count("")
    assert step.flops == done.flops > 1.1 * without.flops
    assert step.peak == pytest.approx(done.peak, rel=0.01)


def test_the_published_base_has_the_published_number_of_parameters():
    with torch.device("meta"):
        pipeline = parts.pipeline_of(load_recipe("sd35").recipe, WORLD_SCHEMA, "image+mask", gpu=True)
    # Those of the files on the hub: autoencoder, CLIP-L, OpenCLIP-G, T5-XXL.
    assert sum(p.numel() for p in pipeline.vae.parameters()) == 83_819_683
    encoders = [sum(p.numel() for p in encoder.parameters()) for encoder in pipeline.text_encoders]
    assert encoders == [123_650_304, 694_659_840, 4_762_310_656]
    counted = parts.parameters(pipeline)
    transformer = sum(counted[f"transformer, {name}"][0] for name in ("image", "text"))
    assert transformer == pytest.approx(2.24e9, rel=0.01)
    assert counted["transformer, text"][1] == 0
    assert counted["transformer, mask"][0] == counted["transformer, mask"][1]


def test_cards_are_found_by_name_and_by_memory():
    assert cards.named("rtx-4090") is cards.CARDS["rtx4090"]
    assert cards.named("48").memory == cards.named("48 GiB").memory == 0.92 * 48 * 2**30
    with pytest.raises(TerraSynthError, match=r"(?s)found:\s+H1000.*RTX 4090.*--card 48"):
        cards.named("H1000")
    for nonsense in ("nan", "inf", "-3", "0", ""):
        with pytest.raises(TerraSynthError):
            cards.named(nonsense)


def test_the_doctor_prints_every_stage_and_where_it_fits(recipe, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    command = ["doctor", "--plan", str(path), "--card", "H100", "--card", "0.001", "--set", "generator.trainable=lora"]
    command += ["--set", "generator.blocks=1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    stages_of = "encode tiles, prompts|training step|preview|encode prompts to paint|paint 2|paint 2, steered|"
    stages_of += "with gradient checkpointing|checkpointing, offload_optimizer"
    assert len(re.findall(rf"^  (?:{stages_of}) .* s +too large$", result.stdout, re.MULTILINE)) == 8
    assert "All 6 steps on H100, at the data sheet's speed, so at least" in result.stdout


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """What `terrasynth-tiny` says of itself, but with two blocks instead of six: every operation, a third as often."""
    folder = tmp_path_factory.mktemp("base") / "shallow"
    shutil.copytree(packaged_or("terrasynth-tiny"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 2}))
    return folder


def test_the_packaged_base_is_planned_with_the_weights_it_has(recipe):
    based = recipe.model_copy(update={"generator": recipe.generator.model_copy(update={"base": "terrasynth-tiny"})})
    with torch.device("meta"):
        planned = parts.pipeline_of(based, WORLD_SCHEMA, None, gpu=False)
    loaded = load_pipeline("terrasynth-tiny")
    loaded.adapt(WORLD_SCHEMA)
    shapes = [
        [{name: tuple(value.shape) for name, value in part.state_dict().items()} for part in parts.modules(pipeline)]
        for pipeline in (planned, loaded)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("trained", "painted"), [("bf16", "fp32"), ("fp32", "bf16"), ("auto", "auto")])
@pytest.mark.parametrize("gpu", [True, False])
def test_every_mixture_of_precisions_is_planned(recipe, shallow, trained, painted, gpu):
    """Frozen weights are in bfloat16 where the training is, all weights where the painting is."""
    values = with_training(recipe, precision=trained).model_dump(mode="json")
    values["generator"] |= {"base": str(shallow), "trainable": "mask"}
    values["sampling"] |= {"precision": painted}
    plan = make_plan(Recipe.model_validate(values), Path(), gpu=gpu)
    assert [stage.name for stage in plan.stages][1:4] == ["training step", "preview", "encode prompts to paint"]
    assert min(plan.parts.values()) > 0


def test_the_doctor_refuses_what_it_can_not_plan():
    result = CliRunner().invoke(app, ["doctor", "--plan", "sd35", "--card", "48", "--set", "generator.base=some/one"])
    assert result.exit_code == 2
    assert "the configuration of the base model is not here" in result.stderr
    assert CliRunner().invoke(app, ["doctor", "--card", "H100"]).exit_code == 2


def test_what_is_pretended_leaves_nothing_behind():
    layer = nn.Linear(2, 2)
    with pretend(gpu=True):
        pass
    assert type(layer(torch.zeros(1, 2))) is torch.Tensor
