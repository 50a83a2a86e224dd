import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from terrasynth.data.folder import load_synthetic, load_tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.text import PromptCache
from terrasynth.recipe import SamplingConfig, SteeringConfig
from terrasynth.study.generate import generate
from terrasynth.systems.build import build
from terrasynth.systems.generate import load_pipeline, paint, plan, steering_for, view_mask
from terrasynth.tasks.segmentation import Segmentor

SAMPLING = SamplingConfig(steps=2, batch_size=2)


@pytest.fixture(scope="module")
def tiles(tiny_recipe):
    return load_tiles(tiny_recipe.data, "train")


@pytest.fixture(scope="module")
def model(tiny_recipe, tiles, tmp_path_factory):
    torch.manual_seed(0)
    pipeline = build(tiny_recipe.generator, tiny_recipe.data, tiles)
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_job_derives_from_seed_and_index_alone():
    short, long = plan(5, tiles=3, seed=7), plan(9, tiles=3, seed=7)
    assert long[:5] == short
    assert [job.source for job in long] == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    seeds = {job.seed for run in range(50) for job in plan(100, tiles=3, seed=run)}
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_interrupted_painting_ends_as_an_uninterrupted_one(model, tiles, tmp_path):
    pipeline = load_pipeline(model)
    jobs = plan(5, len(tiles), seed=0)
    paint(pipeline, tiles.masks, tiles.ids, jobs, SAMPLING, tmp_path / "whole", provenance={"model": "x"})

    class Killed(BaseException):
        pass

    calls = 0
    original = pipeline.decode

    def fail_in_the_third_batch(latents):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return original(latents)

    pipeline.decode = fail_in_the_third_batch
    with pytest.raises(Killed):
        paint(pipeline, tiles.masks, tiles.ids, jobs, SAMPLING, tmp_path / "cut", provenance={"model": "x"})
    assert not (tmp_path / "cut" / "metadata.jsonl").exists()
    # As if the kill had come between two samples of one batch.
    (tmp_path / "cut" / "images" / "000003.png").unlink()
    pipeline.decode = original
    paint(pipeline, tiles.masks, tiles.ids, jobs, SAMPLING, tmp_path / "cut", provenance={"model": "x"})
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_references_are_drawn_by_seed_and_index_alone():
    short, long = plan(5, tiles=3, seed=7, references=4), plan(400, tiles=3, seed=7, references=4)
    assert long[:5] == short
    counts = [sum(job.reference == k for job in long) for k in range(4)]
    assert sum(counts) == 400
    assert min(counts) > 70
    assert [job.seed for job in plan(5, tiles=3, seed=7)] == [job.seed for job in short]
    assert [job.reference for job in plan(2, tiles=3, seed=7)] == [None, None]


@pytest.fixture(scope="module")
def looking(tiny_recipe, tiles, tmp_path_factory):
    """A model that looks at references."""
    torch.manual_seed(0)
    pipeline = build(tiny_recipe.generator.model_copy(update={"reference": "view"}), tiny_recipe.data, tiles)
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("looking")
    pipeline.save_pretrained(folder)
    return folder


def test_every_sample_is_painted_like_the_reference_that_its_row_names(looking, tiles, tmp_path):
    images = {f"{i}": torch.randint(0, 256, (64, 80, 3), dtype=torch.uint8).numpy() for i in range(3)}
    (tmp_path / "looks").mkdir()
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / "looks" / f"{name}.png")
    options = {"sampling": SAMPLING, "steering": SteeringConfig(), "count": 5, "references": tmp_path / "looks"}
    folder = generate(looking, tiles, tmp_path / "out", **options)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len({row["reference"] for row in rows}) > 1
    painted, pipeline = load_synthetic(folder), load_pipeline(looking)
    for row, image, mask in zip(rows, painted.images, painted.masks, strict=True):
        square = Image.fromarray(images[row["reference"]][:, 8:72])
        look = torch.from_numpy(np.asarray(square.resize((32, 32), Image.Resampling.BOX)).copy())
        expected = pipeline(
            mask[None].long(),
            references=look.movedim(-1, 0)[None].float() / 255,
            seeds=[row["seed"]],
            num_inference_steps=2,
            output_type="pt",
        ).images[0]
        assert (image.float() / 255 - expected).abs().max() < 0.6 / 255

    # Other references are another dataset; a folder of none, and images that are too small, are told.
    (tmp_path / "looks" / "0.png").unlink()
    with pytest.raises(TerraSynthError, match="references"):
        generate(looking, tiles, tmp_path / "out", **options)
    Image.new("RGB", (20, 40)).save(tmp_path / "looks" / "small.png")
    with pytest.raises(TerraSynthError, match="smaller than the model paints"):
        generate(looking, tiles, tmp_path / "other", **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TerraSynthError, match="no images here"):
        generate(looking, tiles, tmp_path / "other", **options | {"references": tmp_path / "empty"})


def test_text_encoders_that_are_elsewhere_read_all_prompts_at_once(model, tiles, tmp_path, monkeypatch):
    pipeline, reads, jobs = load_pipeline(model), [], plan(6, len(tiles), seed=0)
    monkeypatch.setattr(type(pipeline.text_encoder), "device", torch.device("meta"))
    monkeypatch.setattr(type(pipeline), "_execution_device", torch.device("cpu"))

    def paint_all():
        reads.clear()
        pipeline.prompts = PromptCache(
            lambda prompts: reads.append(prompts) or pipeline.encode_prompts(prompts), None, ""
        )
        paint(pipeline, tiles.masks, tiles.ids, jobs, SAMPLING, tmp_path / "set", provenance={})

    paint_all()
    assert len(reads) == 1
    assert set(reads[0]) == {"", *pipeline.captions(view_mask(tiles.masks[job.source], job.view) for job in jobs)}
    before = files(tmp_path / "set")
    paint_all()
    assert reads == []
    (tmp_path / "set" / "images" / f"{jobs[3].id}.png").unlink()
    paint_all()  # the whole batch of the missing one
    assert len(reads) == 1
    assert files(tmp_path / "set") == before


def test_the_dataset_says_where_every_sample_comes_from(model, tiles, tmp_path):
    folder = generate(model, tiles, tmp_path / "out", sampling=SAMPLING, steering=SteeringConfig(), count=3, seed=4)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [job.seed for job in plan(3, len(tiles), 4)]
    assert {row["source_mask"] for row in rows} <= set(tiles.ids)
    assert all(row["prompt"].startswith("a satellite image of ") and row["steering"] is None for row in rows)
    painted = load_synthetic(folder)
    assert painted.images.shape == (3, 3, 32, 32)
    assert painted.schema == tiles.schema


def test_masks_of_a_folder_are_painted_in_any_coding(model, tiles, tmp_path):
    from PIL import Image

    for i, mask in enumerate(tiles.masks[:2]):
        (tmp_path / "index").mkdir(exist_ok=True)
        (tmp_path / "color").mkdir(exist_ok=True)
        Image.fromarray(mask.numpy()).save(tmp_path / "index" / f"{i}.png")
        Image.fromarray(tiles.schema.to_color(mask)).save(tmp_path / "color" / f"{i}.png")
    made = [
        generate(model, tmp_path / name, tmp_path / f"out-{name}", sampling=SAMPLING, steering=SteeringConfig())
        for name in ("index", "color")
    ]
    first, second = map(load_synthetic, made)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.masks, second.masks)


def test_it_is_said_how_the_masks_of_a_folder_are_read(model, tiles, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TERRASYNTH_QUIET", raising=False)
    (tmp_path / "masks").mkdir()
    mask = tiles.masks[0].numpy().copy()
    mask[: len(mask) // 2] = 3
    mask[len(mask) // 2 :] = 1
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    generate(model, tmp_path / "masks", tmp_path / "out", sampling=SAMPLING, steering=SteeringConfig())
    names = tiles.schema.names
    assert f"read as: {names[1]} 50 %, {names[3]} 50 %\n" in capsys.readouterr().err


def test_steering_by_a_segmentor_lowers_its_loss(model, tiles, tiny_recipe, tmp_path):
    segmentor = Segmentor.build(tiny_recipe.segmentor, tiles.schema.num_classes, seed=0)
    strong = SteeringConfig(steps=2, strength=0.5, schedule="constant")
    losses = []
    for steering in (None, steering_for(strong, segmentor.loss)):
        folder = tmp_path / str(steering is None)
        jobs = plan(4, len(tiles), seed=0)
        paint(load_pipeline(model), tiles.masks, tiles.ids, jobs, SAMPLING, folder, provenance={}, steering=steering)
        painted = load_synthetic(folder)
        with torch.no_grad():
            losses.append(segmentor.loss(painted.images.float() / 255, painted.masks.long(), "image").mean().item())
    assert losses[1] < losses[0]


def test_a_segmentor_of_other_classes_does_not_steer(model, tiles, tiny_recipe, tmp_path):
    schema = LabelSchema(("a", "b"), ((1, 1, 1), (2, 2, 2)))
    Segmentor.build(tiny_recipe.segmentor, 2, seed=0, class_names=schema.names).save_pretrained(tmp_path / "other")
    with pytest.raises(TerraSynthError, match=r"was|classes"):
        generate(
            model, tiles, tmp_path / "out", sampling=SAMPLING, steering=SteeringConfig(), segmentor=tmp_path / "other"
        )


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(TerraSynthError, match="not the folder of a model"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", b"\x00" * 100),
        ("model_index.json", b"{"),
        ("model_index.json", b"{}"),
        ("vae/config.json", None),
        ("text_encoder/model.safetensors", None),
    ],
)
def test_a_damaged_model_is_one_clear_error(model, tmp_path, file, content):
    shutil.copytree(model, tmp_path / "model")
    if content is None:
        (tmp_path / "model" / file).unlink()
    else:
        (tmp_path / "model" / file).write_bytes(content)
    with pytest.raises(TerraSynthError, match=r"can not be loaded|not a JSON file"):
        load_pipeline(tmp_path / "model")


def test_a_model_of_nan_paints_nothing(model, tiles, tmp_path):
    pipeline = load_pipeline(model)
    pipeline.transformer.proj_out.weight.data.fill_(float("nan"))
    with pytest.raises(TerraSynthError, match="no numbers"):
        paint(pipeline, tiles.masks, tiles.ids, plan(2, 4, 0), SAMPLING, tmp_path / "out", provenance={})


def test_a_model_that_can_not_look_is_told_before_anything_is_written(model, tiles, tmp_path):
    options = {"sampling": SAMPLING, "steering": SteeringConfig(), "count": 1}
    (tmp_path / "looks").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "looks" / "a.png")
    with pytest.raises(TerraSynthError, match="can not look at references"):
        generate(model, tiles, tmp_path / "out", references=tmp_path / "looks", **options)
    assert len(load_synthetic(generate(model, tiles, tmp_path / "out", **options))) == 1
