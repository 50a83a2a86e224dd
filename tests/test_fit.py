import pickle

import pytest
import torch

from terrasynth.data.folder import load_tiles
from terrasynth.errors import TerraSynthError
from terrasynth.systems.fit import EncodedViews, build, fit_generator
from terrasynth.systems.generate import load_pipeline


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


def test_words_the_base_does_not_know_are_refused(tiles, tiny_recipe, tmp_path):
    build(tiny_recipe.generator, tiny_recipe.data, tiles).save_pretrained(tmp_path)
    data = tiny_recipe.data.model_copy(update={"caption": "a zeppelin's view of {classes}"})
    with pytest.raises(TerraSynthError, match="words that the base model does not know"):
        build(changed(tiny_recipe.generator, base=str(tmp_path)), data, tiles)
