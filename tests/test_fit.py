import dataclasses
import pickle

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from terrasynth.data.folder import Tiles, load_tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import AutoencoderConfig, GeneratorConfig
from terrasynth.systems import fit as fit_module
from terrasynth.systems.build import build
from terrasynth.systems.fit import fit_generator
from terrasynth.systems.generate import load_pipeline
from terrasynth.systems.satsynth import SatSynthPipeline
from terrasynth.systems.tisynth import TISynthPipeline
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.systems.views import EncodedViews


@pytest.fixture(scope="module")
def tiles(tiny_recipe):
    return load_tiles(tiny_recipe.data, "train")


def changed(config, **changes):
    train = config.train.model_copy(update=changes.pop("train", {}))
    return config.model_copy(update={**changes, "train": train})


@pytest.mark.parametrize(
    ("trainable", "coding", "init", "train"),
    [
        ("lora", "onehot", "copy", {}),
        ("image+mask", "grey", "random", {"precision": "bf16", "gradient_checkpointing": True}),
        ("mask", "bits", "copy", {}),
    ],
)
def test_every_way_to_extend_a_base_model_trains_resumes_saves_and_paints(
    sd3_folder, tiles, tiny_recipe, tmp_path, trainable, coding, init, train
):
    config = changed(
        tiny_recipe.generator,
        base=str(sd3_folder),
        trainable=trainable,
        mask_coding=coding,
        mask_init=init,
        train={"steps": 2, "batch_size": 2, "checkpoint_every": 1, "evaluate_every": 2, "warmup_steps": 1, **train},
    )

    def run(name, **options):
        return fit_generator(tiles, config, tiny_recipe.data, tiny_recipe.sampling, tmp_path / name, **options)

    assert run("whole").finished
    # A limit of no time still makes one step, so that every sitting gets on.
    assert not run("parts", max_minutes=0.0).finished
    assert run("parts").finished
    whole, parts = (load_pipeline(tmp_path / name / "model") for name in ("whole", "parts"))
    for (name, a), b in zip(
        whole.transformer.state_dict().items(), parts.transformer.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    images = whole(tiles.masks[:1].long(), seeds=[0], num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)
    assert torch.isfinite(images).all()


def test_views_are_encoded_once_and_read_back_row_by_row(tiles, tiny_recipe, tmp_path):
    from terrasynth.data.augment import view

    pipeline = build(tiny_recipe.generator, tiny_recipe.data, tiles)
    dataset = EncodedViews.encode(pipeline, tiles, 3, tmp_path)
    assert len(dataset) == 12
    image, mask = view(tiles.images[2], tiles.masks[2], 1)
    item = dataset[(4 + 2, 0)]
    assert torch.equal(item["mask"], mask)
    expected = pipeline.encode_images(image[None].float() / 255)[0]
    torch.testing.assert_close(item["latents"], expected, atol=2e-3, rtol=2e-3)
    embeds, pooled = pipeline.prompts([tiles.schema.caption(mask)])
    assert torch.equal(item["prompt_embeds"], embeds[0])
    assert torch.equal(item["pooled"], pooled[0])

    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    again = pickle.loads(
        pickle.dumps(EncodedViews.encode(pipeline, tiles, 3, tmp_path))
    )  # as a loader's worker gets it
    assert file.stat().st_mtime_ns == before
    assert torch.equal(again[(6, 0)]["latents"], item["latents"])


def test_tiles_that_do_not_divide_into_tokens_are_refused(sd3_folder, tiles, tiny_recipe):
    data = tiny_recipe.data.model_copy(update={"image_size": 30})
    for config in (tiny_recipe.generator, changed(tiny_recipe.generator, base=str(sd3_folder))):
        with pytest.raises(TerraSynthError, match="divide into tokens"):
            build(config, data, tiles)


def test_a_base_of_another_mask_coding_is_refused(tiles, tiny_recipe, tmp_path):
    build(tiny_recipe.generator, tiny_recipe.data, tiles).save_pretrained(tmp_path)
    with pytest.raises(TerraSynthError, match="another mask coding"):
        build(changed(tiny_recipe.generator, base=str(tmp_path), mask_coding="bits"), tiny_recipe.data, tiles)


def test_a_base_that_paints_pairs_is_refused(tiles, tiny_recipe, tmp_path):
    SatSynthPipeline.from_scratch(tiles.schema, widths=(16, 16), image_size=32).save_pretrained(tmp_path)
    with pytest.raises(TerraSynthError, match=r"not the folder of a generator[\s\S]*images and masks together"):
        build(changed(tiny_recipe.generator, base=str(tmp_path)), tiny_recipe.data, tiles)


def test_words_the_base_can_not_spell_are_refused(tiles, tiny_recipe, tmp_path):
    build(tiny_recipe.generator, tiny_recipe.data, tiles).save_pretrained(tmp_path)
    config = changed(tiny_recipe.generator, base=str(tmp_path))
    build(config, tiny_recipe.data, captioned(tiles, "a zeppelin's view of {classes}"))
    with pytest.raises(TerraSynthError, match="can not spell") as caught:
        build(config, tiny_recipe.data, captioned(tiles, "вид {classes}"))
    assert "вид" in caught.value.found


def test_a_caption_that_is_cut_off_is_said(tiles, tiny_recipe, tmp_path, monkeypatch, capfd):
    build(tiny_recipe.generator, tiny_recipe.data, tiles).save_pretrained(tmp_path)
    config = changed(tiny_recipe.generator, base=str(tmp_path))
    monkeypatch.setenv("TERRASYNTH_QUIET", "0")
    build(config, tiny_recipe.data, tiles)
    assert "cut off" not in capfd.readouterr().err
    build(config, tiny_recipe.data, captioned(tiles, "antidisestablishmentarianism zeppelins {classes}"))
    assert "reads 32 tokens of a caption; cut off: 'antidisestablishmentarianism" in capfd.readouterr().err


def test_tiles_beyond_the_bases_grid_of_positions_are_refused(tiles, tiny_recipe, tmp_path):
    build(tiny_recipe.generator, tiny_recipe.data, tiles).save_pretrained(tmp_path)
    config = changed(tiny_recipe.generator, base=str(tmp_path))
    assert build(config, tiny_recipe.data.model_copy(update={"image_size": 64}), tiles).config.image_size == 64
    with pytest.raises(TerraSynthError, match="grid of positions") as caught:
        build(config, tiny_recipe.data.model_copy(update={"image_size": 72}), tiles)
    assert "at most 64" in str(caught.value)


# Other classes, unlabelled images, a refiner, half precision


def captioned(tiles, caption):
    return dataclasses.replace(tiles, caption=caption)


def equal_models(first, second):
    for part in ("transformer", "vae"):
        ours, theirs = (getattr(load_pipeline(folder / "model"), part).state_dict() for folder in (first, second))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), f"{part} {name}"


@pytest.fixture(scope="module")
def renamed(tiles):
    """The same tiles, with other classes in another order."""
    names, colors = tiles.schema.names, tiles.schema.colors
    schema = LabelSchema((names[1], "lagoon", names[0], *names[3:]), ((1, 2, 3), *colors[1:]))
    table = torch.arange(256, dtype=torch.uint8)
    table[:3] = torch.tensor([2, 0, 1])
    return dataclasses.replace(tiles, masks=table[tiles.masks.long()], schema=schema)


@pytest.fixture
def windows(tiles):
    images = tiles.images.roll(5, -1).flip(0)[:3]
    return Tiles(
        ("u", "v", "w"), images, torch.full((3, 32, 32), 255, dtype=torch.uint8), tiles.schema, ("a view",) * 3
    )


def fit(recipe, tiles, folder, *, sittings=False, unlabelled=None, **changes):
    """Train a generator, in two sittings or in one."""
    config = changed(recipe.generator, **changes)
    arguments = (tiles, config, recipe.data, recipe.sampling, folder)
    if sittings:
        assert not fit_generator(*arguments, unlabelled=unlabelled, max_minutes=0.0).finished
    assert fit_generator(*arguments, unlabelled=unlabelled).finished
    return folder


SHORT = {"steps": 3, "checkpoint_every": 2, "evaluate_every": 3, "warmup_steps": 1}


def test_a_base_with_other_classes_keeps_what_it_knew_trains_and_resumes(tiles, renamed, tiny_recipe, tmp_path):
    base = fit(tiny_recipe, tiles, tmp_path / "base") / "model"
    started = build(changed(tiny_recipe.generator, base=str(base)), tiny_recipe.data, renamed)
    assert started.schema == renamed.schema
    known = renamed.masks[:1].long()
    known[known == 1] = 255  # the class that is new
    as_it_was = torch.tensor([1, 255, 0, *range(3, 256)])[known]
    options = {"seeds": [3], "prompts": ["a satellite image of water"], "output_type": "pt"}
    torch.testing.assert_close(
        started(known, **options).images, load_pipeline(base)(as_it_was, **options).images, atol=1e-4, rtol=0
    )
    whole = fit(tiny_recipe, renamed, tmp_path / "whole", base=str(base), train=SHORT)
    parts = fit(tiny_recipe, renamed, tmp_path / "parts", base=str(base), train=SHORT, sittings=True)
    equal_models(whole, parts)
    trained = load_pipeline(whole / "model")
    assert trained.schema == renamed.schema
    embeddings = (pipeline.transformer.mask_embed.proj.weight for pipeline in (trained, started))
    assert not torch.equal(*embeddings)


def test_unlabelled_windows_have_their_share_of_every_batch(tiles, windows, tiny_recipe, tmp_path, monkeypatch):
    batches = []
    loss = TODSynthPipeline.training_loss

    def spy(self, batch):
        batches.append(batch)
        return loss(self, batch)

    monkeypatch.setattr(TODSynthPipeline, "training_loss", spy)
    fit(tiny_recipe, tiles, tmp_path, unlabelled=windows, labelled_fraction=0.25)
    pipeline = load_pipeline(tmp_path / "model")
    images = (*windows.images, *(image.rot90(k, (1, 2)) for image in windows.images for k in (1, 2, 3)))
    images = (*images, *(image.flip(2) for image in images))
    known = pipeline.encode_images(torch.stack(images).float() / 255)
    embeds, _ = pipeline.prompts(["a view"])
    assert len(batches) == 6
    for batch in batches:
        nothing = (batch["mask"] == 255).flatten(1).all(1)
        assert nothing.tolist() == [False, True, True, True]
        assert torch.equal(batch["prompt_embeds"][1:], embeds.expand(3, -1, -1))
        # Each is a window as it is, turned or flipped.
        distances = torch.cdist(batch["latents"][1:].flatten(1), known.flatten(1))
        assert distances.amin(1).max() < 0.05
        assert torch.cdist(batch["latents"][:1].flatten(1), known.flatten(1)).min() > 1


def test_training_with_unlabelled_windows_goes_on_as_what_it_was(tiles, windows, tiny_recipe, tmp_path):
    whole = fit(tiny_recipe, tiles, tmp_path / "whole", unlabelled=windows, train=SHORT)
    parts = fit(tiny_recipe, tiles, tmp_path / "parts", unlabelled=windows, train=SHORT, sittings=True)
    equal_models(whole, parts)
    without = fit(tiny_recipe, tiles, tmp_path / "without", train=SHORT)
    with pytest.raises(AssertionError, match="transformer"):
        equal_models(whole, without)
    others = dataclasses.replace(windows, caption=("another view",) * 3)
    for unlabelled in (None, others):
        with pytest.raises(TerraSynthError, match=r"identity\.unlabelled"):
            fit(tiny_recipe, tiles, whole, unlabelled=unlabelled, train=SHORT)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_share_that_leaves_one_side_out_is_refused(tiles, windows, tiny_recipe, tmp_path, fraction):
    with pytest.raises(TerraSynthError, match="can not be mixed"):
        fit(tiny_recipe, tiles, tmp_path, unlabelled=windows, labelled_fraction=fraction)


def test_a_refiner_is_trained_first_and_saved_with_the_generator(tiles, tiny_recipe, tmp_path):
    autoencoder = AutoencoderConfig.model_validate(
        {"refiner_width": 8, "refiner_blocks": 1, "train": {**SHORT, "batch_size": 2, "learning_rate": 0.01}}
    )
    whole = fit(tiny_recipe, tiles, tmp_path / "whole", autoencoder=autoencoder, train=SHORT)
    folder, settings = tmp_path / "parts", changed(tiny_recipe.generator, autoencoder=autoencoder, train=SHORT)
    arguments = (tiles, settings, tiny_recipe.data, tiny_recipe.sampling, folder)
    sittings = [fit_generator(*arguments, max_minutes=0.0) for _ in range(2)]
    assert [outcome.finished for outcome in sittings] == [False, False]
    assert not (folder / "checkpoints").exists()  # it is the refiner that was stopped
    assert (folder / "autoencoder" / "checkpoints").is_dir()
    assert fit_generator(*arguments).finished
    equal_models(whole, folder)
    vae = load_pipeline(folder / "model").vae
    assert vae.refiner[-1].weight.any()
    assert torch.equal(vae.components, build(settings, tiny_recipe.data, tiles).vae.components)


def test_a_generator_saved_in_half_precision_paints_nearly_the_same_from_half_the_bytes(tiles, tiny_recipe, tmp_path):
    full = fit(tiny_recipe, tiles, tmp_path / "full") / "model"
    half = fit(tiny_recipe, tiles, tmp_path / "half", save_precision="fp16") / "model"
    files = sorted(path.relative_to(full) for path in full.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        stored = {t.dtype for t in load_file(half / file).values() if t.is_floating_point()}
        assert stored == {torch.float16}, file
        assert {t.dtype for t in load_file(full / file).values() if t.is_floating_point()} == {torch.float32}, file
        for name, tensor in load_file(half / file).items():
            assert torch.equal(tensor, load_file(full / file)[name].to(tensor.dtype)), name
    pipelines = [load_pipeline(folder) for folder in (full, half)]
    assert {p.dtype for p in pipelines[1].transformer.parameters()} == {torch.float32}
    assert {p.dtype for p in pipelines[1].text_encoder.parameters()} == {torch.float32}
    painted = [p(tiles.masks.long(), seeds=[0, 1, 2, 3], output_type="pt").images for p in pipelines]
    torch.testing.assert_close(*painted, atol=0.02, rtol=0)
    # And it is one to start from.
    build(changed(tiny_recipe.generator, base=str(half)), tiny_recipe.data, tiles)


@pytest.mark.parametrize("trainable", ["mask", "lora"])
def test_frozen_weights_are_rounded_in_training_and_saved_as_they_were(
    sd3_folder, tiles, tiny_recipe, tmp_path, monkeypatch, trainable
):
    seen, train = [], fit_module.train

    def watched(model, *arguments, **options):
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        seen.append({(module.weight.dtype, module.weight.requires_grad) for module in linear})
        return train(model, *arguments, **options)

    monkeypatch.setattr(fit_module, "train", watched)
    settings = {**SHORT, "steps": 1, "warmup_steps": 0, "precision": "bf16"}
    folder = fit(tiny_recipe, tiles, tmp_path, base=str(sd3_folder), trainable=trainable, train=settings)
    assert seen == [{(torch.bfloat16, False), (torch.float32, True)}]
    base = StableDiffusion3Pipeline.from_pretrained(sd3_folder).transformer.state_dict()
    saved = load_pipeline(folder / "model").transformer.state_dict()
    same = [torch.equal(saved[name], weight) for name, weight in base.items()]
    # Adapters are merged into the image branch: there the text branch alone is as it was.
    assert all(same) if trainable == "mask" else sum(same) > 30


def test_no_prompt_is_encoded_once_training_began(sd3_folder, tiles, tiny_recipe, tmp_path, monkeypatch):
    """The text encoders have left the card by then. Previews have other prompts than tiles with their own captions."""
    calls, train, encode = [], fit_module.train, TODSynthPipeline.encode_prompts
    monkeypatch.setattr(
        fit_module, "train", lambda *given, **options: calls.append("train") or train(*given, **options)
    )
    monkeypatch.setattr(
        TODSynthPipeline, "encode_prompts", lambda self, prompts: calls.append(prompts) or encode(self, prompts)
    )
    named = dataclasses.replace(tiles, caption=[f"tile {i}" for i in range(len(tiles))])
    fit(tiny_recipe, named, tmp_path, base=str(sd3_folder), trainable="mask", train={**SHORT, "evaluate_every": 1})
    assert calls[-1] == "train"
    assert len(calls) > 1


def test_the_text_encoders_of_a_base_are_saved_as_they_were_computed(sd3_folder, tiles, tiny_recipe, tmp_path):
    train = {**SHORT, "steps": 1, "warmup_steps": 0, "precision": "bf16"}
    model = fit(tiny_recipe, tiles, tmp_path, base=str(sd3_folder), trainable="mask", train=train) / "model"
    stored = {}
    for part in ("text_encoder_3", "transformer", "vae"):
        (file,) = (model / part).glob("*.safetensors")
        (stored[part],) = {tensor.dtype for tensor in load_file(file).values()}
    assert stored == {"text_encoder_3": torch.bfloat16, "transformer": torch.float32, "vae": torch.float32}


def test_a_reference_is_another_view_of_the_same_tile(tiles, tiny_recipe, tmp_path):
    pipeline = build(tiny_recipe.generator, tiny_recipe.data, tiles)
    dataset = EncodedViews.encode(pipeline, tiles, 5, tmp_path, "view")
    for row in (2, 4 + 2, 16 + 2):
        own = [dataset[(view * 4 + 2, 0)]["latents"] for view in range(5) if view * 4 + 2 != row]
        seen = [dataset[(row, seed)]["reference_latents"] for seed in range(60)]
        counts = [sum(torch.equal(latents, reference) for reference in seen) for latents in own]
        assert sum(counts) == 60
        assert min(counts) > 4
        assert torch.equal(dataset[(row, 7)]["reference_latents"], seen[7])
    assert "reference_latents" not in EncodedViews.encode(pipeline, tiles, 5, tmp_path)[(0, 0)]


@pytest.mark.parametrize("reference", ["augmented", "recolored"])
def test_an_augmented_reference_is_that_of_its_view(tiles, tiny_recipe, tmp_path, reference):
    from terrasynth.data.augment import view
    from terrasynth.data.reference import reference_view

    pipeline = build(tiny_recipe.generator, tiny_recipe.data, tiles)
    item = EncodedViews.encode(pipeline, tiles, 3, tmp_path, reference)[(4 + 2, 9)]
    image, _ = view(tiles.images[2], tiles.masks[2], 1)
    expected = pipeline.encode_images(reference_view(image, 6, color=reference == "recolored")[None])[0]
    torch.testing.assert_close(item["reference_latents"], expected, atol=2e-3, rtol=2e-3)
    assert item["reference_latents"].dtype == torch.float32


@pytest.mark.parametrize("reference", ["view", "augmented"])
def test_a_generator_learns_to_look_at_references_and_resumes(tiles, tiny_recipe, tmp_path, reference):
    config = changed(tiny_recipe.generator, reference=reference)

    def run(name, **options):
        return fit_generator(tiles, config, tiny_recipe.data, tiny_recipe.sampling, tmp_path / name, **options)

    assert run("whole").finished
    assert not run("parts", max_minutes=0.0).finished
    assert run("parts").finished
    whole, parts = (load_pipeline(tmp_path / name / "model") for name in ("whole", "parts"))
    for (name, a), b in zip(
        whole.transformer.state_dict().items(), parts.transformer.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert all(block.reference_gate.abs().max() > 0 for block in whole.transformer.transformer_blocks)

    # A model that can look serves as a base of one that is not to learn it: what it knows of that stays.
    config = changed(tiny_recipe.generator, base=str(tmp_path / "whole" / "model"))
    assert run("plain").finished
    plain = load_pipeline(tmp_path / "plain" / "model").transformer
    for old, new in zip(whole.transformer.transformer_blocks, plain.transformer_blocks, strict=True):
        assert torch.equal(old.reference_gate, new.reference_gate)
        assert not torch.equal(old.attn.to_q.weight, new.attn.to_q.weight)


# --- TISynth ---------------------------------------------------------------------------------------------------------


def tisynth(tiny_recipe, **changes):
    values = tiny_recipe.generator.model_dump(mode="json")
    values |= {"system": "tisynth", "reference": "augmented", "unet": {"widths": [16, 32], "layers": 1}, **changes}
    return GeneratorConfig.model_validate(values)


@pytest.mark.parametrize("changes", [{}, {"trainable": "mask", "reference": "view", "mask_coding": "ids"}])
def test_tisynth_trains_resumes_saves_and_paints(tiles, tiny_recipe, tmp_path, changes):
    config = tisynth(tiny_recipe, **changes)

    def run(name, **options):
        return fit_generator(tiles, config, tiny_recipe.data, tiny_recipe.sampling, tmp_path / name, **options)

    assert run("whole").finished
    assert not run("parts", max_minutes=0.0).finished
    assert run("parts").finished
    whole, parts = (load_pipeline(tmp_path / name / "model") for name in ("whole", "parts"))
    assert isinstance(whole, TISynthPipeline)
    start = build(config, tiny_recipe.data, tiles).unet.state_dict()
    moved = set()
    for (name, a), b in zip(whole.unet.state_dict().items(), parts.unet.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        moved |= {name} if not torch.equal(a, start[name]) else set()
    assert any("reference_attn" in name for name in moved)
    assert any(name.startswith("down_blocks") for name in moved) == (config.trainable == "all")
    references = tiles.images[:1].float() / 255
    options = {"seeds": [0], "output_type": "pt", **whole.sampling_arguments(tiny_recipe.sampling)}
    images = whole(tiles.masks[:1].long(), references=references, **options).images
    assert images.shape == (1, 3, 32, 32)
    assert torch.isfinite(images).all()
    assert (tmp_path / "whole" / "previews").is_dir()


def test_tisynth_goes_on_from_what_it_saved_with_the_same_classes(tiles, tiny_recipe, tmp_path):
    config = tisynth(tiny_recipe)
    build(config, tiny_recipe.data, tiles).save_pretrained(tmp_path)
    again = build(tisynth(tiny_recipe, base=str(tmp_path)), tiny_recipe.data, tiles)
    first = build(config, tiny_recipe.data, tiles)
    for (name, a), b in zip(first.unet.state_dict().items(), again.unet.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    schema = dataclasses.replace(tiles.schema, names=("other", *tiles.schema.names[1:]))
    with pytest.raises(TerraSynthError, match="trained with other classes"):
        build(tisynth(tiny_recipe, base=str(tmp_path)), tiny_recipe.data, dataclasses.replace(tiles, schema=schema))
    with pytest.raises(TerraSynthError, match="another mask coding"):
        build(tisynth(tiny_recipe, base=str(tmp_path), mask_coding="bits"), tiny_recipe.data, tiles)
    with pytest.raises(TerraSynthError, match="can not be loaded"):
        build(tisynth(tiny_recipe, base=str(tmp_path / "nothing")), tiny_recipe.data, tiles)
    with pytest.raises(TerraSynthError, match="the base model is of another system"):
        build(tisynth(tiny_recipe, base="terrasynth-tiny"), tiny_recipe.data, tiles)
    with pytest.raises(TerraSynthError, match="no such settings of its sampling"):
        first.sampling_arguments(tiny_recipe.sampling.model_copy(update={"guidance_interval": (0.2, 0.8)}))
    with pytest.raises(TerraSynthError, match=r"1 to 1000"):
        first.sampling_arguments(tiny_recipe.sampling.model_copy(update={"steps": 1001}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": None}, "system: tisynth needs a reference"),
        ({"trainable": "lora"}, "system: tisynth trains all or mask, not lora"),
        ({"unet": {"widths": [16, 30]}, "heads": 4}, r"unet.widths \(30\) must be multiples of heads \(4\)"),
        ({"system": "todsynth", "mask_coding": "ids"}, "mask_coding: ids is that of system: tisynth"),
    ],
)
def test_settings_of_the_other_system_are_refused(tiny_recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        tisynth(tiny_recipe, **changes)
