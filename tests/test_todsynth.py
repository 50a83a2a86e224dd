import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import GeneratorConfig
from terrasynth.sampling.rectify import ControlRectify
from terrasynth.systems.todsynth import TODSynthPipeline

SCHEMA = LabelSchema(("land", "road", "water"), ((200, 150, 90), (90, 90, 90), (20, 60, 160)))
CAPTION = "a satellite image of {classes}"


def small_pipeline(**changes):
    config = GeneratorConfig(width=32, heads=2, blocks=2, **changes)
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(4, 3, 4, 4), 32, mode="bilinear")
    pipeline = TODSynthPipeline.from_scratch(config, images, SCHEMA, CAPTION, ["a satellite image of land"])
    # As after some training: no zero-initialised layer hides a fault.
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return pipeline.transformer.eval() and pipeline


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture
def masks():
    masks = torch.randint(0, 3, (3, 32, 32))
    masks[0, :8] = 255
    return masks


def paint(pipeline, masks, seeds, **options):
    return pipeline(masks, seeds=seeds, num_inference_steps=3, output_type="pt", **options).images


@pytest.mark.parametrize("coding", ["onehot", "bits"])
def test_lossless_codings_give_the_mask_back_from_the_mask_latents(coding, masks):
    pipeline = small_pipeline(mask_coding=coding)
    latents = pipeline.encode_masks(masks)
    assert latents.shape[-2:] == (8, 8)
    code = F.pixel_shuffle(latents, pipeline.factor)
    assert torch.equal(SCHEMA.decode(code, coding).long(), masks)


def test_grey_masks_pass_the_autoencoder_like_images(masks):
    pipeline = small_pipeline(mask_coding="grey")
    image = SCHEMA.encode(masks, "grey")
    expected = pipeline.vae.encode(image).latent_dist.mode()
    torch.testing.assert_close(pipeline.encode_masks(masks), expected)
    assert paint(pipeline, masks, [1, 2, 3]).shape == (3, 3, 32, 32)


def test_a_painting_depends_on_its_own_row_only(pipeline, masks):
    together = paint(pipeline, masks, [5, 6, 7], text_scale=2.0, mask_scale=3.0)
    alone = torch.cat([paint(pipeline, masks[i : i + 1], [5 + i], text_scale=2.0, mask_scale=3.0) for i in (2, 0, 1)])
    torch.testing.assert_close(together, alone[[1, 2, 0]], atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.05


def test_mask_prompt_and_seed_each_change_the_painting(pipeline, masks):
    mask = masks[:1]
    reference = paint(pipeline, mask, [1])
    assert torch.equal(reference, paint(pipeline, mask, [1]))
    for other in (
        paint(pipeline, mask, [2]),
        paint(pipeline, mask.flip(-1), [1]),
        paint(pipeline, mask, [1], prompts=["a satellite image of water"]),
    ):
        assert (reference - other).abs().max() > 1e-3


def test_guidance_is_the_weighted_sum_of_separate_forward_passes(pipeline, masks):
    seen = {}
    pipeline(
        masks,
        seeds=[1, 2, 3],
        num_inference_steps=1,
        text_scale=2.0,
        mask_scale=3.0,
        callback=lambda step, clean: seen.update(clean=clean),
        output_type="pt",
    )
    from terrasynth.sampling.flow import seeded_noise

    z = seeded_noise([1, 2, 3], (16, 8, 8))
    captions = [SCHEMA.caption(mask, CAPTION) for mask in masks]

    def velocity(prompts, masks):
        embeds, pooled = pipeline.encode_prompts(prompts)
        with torch.no_grad():
            return pipeline.transformer(
                z,
                timestep=torch.full((3,), 1000.0),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                mask_latents=pipeline.encode_masks(masks),
            ).sample

    empty, unlabelled = [""] * 3, torch.full_like(masks, 255)
    v00, vt0, vtm = velocity(empty, unlabelled), velocity(captions, unlabelled), velocity(captions, masks)
    torch.testing.assert_close(seen["clean"], z - (v00 + 2 * (vt0 - v00) + 3 * (vtm - vt0)), atol=1e-4, rtol=1e-4)


def test_steering_lowers_the_loss_it_is_given(pipeline, masks):
    target = torch.full((3, 3, 32, 32), 0.8)

    def loss(images, target):
        return ((images - target) ** 2).mean((1, 2, 3))

    steering = ControlRectify(loss=loss, targets=target, steps=3, strength=0.3, schedule="constant")
    plain = paint(pipeline, masks, [1, 2, 3])
    steered = paint(pipeline, masks, [1, 2, 3], steering=steering)
    assert (loss(steered, target) < loss(plain, target)).all()
    assert all(p.grad is None for p in pipeline.transformer.parameters())


def test_training_loss_is_the_flow_matching_loss_of_a_plain_loop(pipeline, masks):
    pipeline.text_dropout, pipeline.mask_dropout = 0.5, 0.5
    embeds, pooled = pipeline.prompts([SCHEMA.caption(mask, CAPTION) for mask in masks] * 4)
    batch = {
        "latents": torch.randn(12, 16, 8, 8),
        "mask": masks.to(torch.uint8).repeat(4, 1, 1),
        "prompt_embeds": embeds,
        "pooled": pooled,
        "seed": torch.arange(12),
    }
    dropped, losses = [], []
    for i in range(12):
        generator = torch.Generator().manual_seed(i)
        u = torch.sigmoid(torch.randn((), generator=generator))
        noise = torch.randn(16, 8, 8, generator=generator)
        drop_text, drop_mask = (torch.rand(2, generator=generator) < 0.5).tolist()
        dropped.append((drop_text, drop_mask))
        sigma = 3 * u / (1 + 2 * u)
        null_embeds, null_pooled = pipeline.encode_prompts([""])
        mask = torch.full((1, 32, 32), 255) if drop_mask else batch["mask"][i : i + 1]
        predicted = pipeline.transformer(
            ((1 - sigma) * batch["latents"][i] + sigma * noise)[None],
            timestep=1000 * sigma[None],
            encoder_hidden_states=null_embeds if drop_text else embeds[i : i + 1],
            pooled_projections=null_pooled if drop_text else pooled[i : i + 1],
            mask_latents=pipeline.encode_masks(mask),
        ).sample[0]
        losses.append(((predicted - (noise - batch["latents"][i])) ** 2).mean())
    assert len(set(dropped)) == 4  # every combination of dropped conditions was met
    torch.testing.assert_close(pipeline.training_loss(batch), torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    pipeline.text_dropout = pipeline.mask_dropout = 0.0


def test_saved_and_loaded_it_paints_the_same_picture(pipeline, masks, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = TODSynthPipeline.from_pretrained(tmp_path)
    assert again.schema == SCHEMA
    assert torch.equal(paint(pipeline, masks, [1, 2, 3]), paint(again, masks, [1, 2, 3]))
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


@pytest.mark.parametrize("coding", ["onehot", "grey"])
def test_stable_diffusion_loads_by_the_same_call_and_paints_what_the_base_paints(sd3_folder, coding, tmp_path):
    pipeline = TODSynthPipeline.from_pretrained(sd3_folder, label_schema=SCHEMA.to_dict(), mask_coding=coding)
    base = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    base.tokenizer_max_length = base.tokenizer.model_max_length
    masks, prompts = torch.randint(0, 3, (2, 16, 16)), ["a satellite image of land", "water"]
    from terrasynth.sampling.flow import seeded_noise

    expected = base(
        prompts,
        latents=seeded_noise([3, 4], (4, 8, 8)),
        height=16,
        width=16,
        num_inference_steps=3,
        guidance_scale=1.0,
        output_type="pt",
        max_sequence_length=256,
    ).images
    images = pipeline(masks, prompts, seeds=[3, 4], num_inference_steps=3, mask_scale=1.0, output_type="pt").images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)

    pipeline.save_pretrained(tmp_path / "extended")
    again = TODSynthPipeline.from_pretrained(tmp_path / "extended")
    images = again(masks, prompts, seeds=[3, 4], num_inference_steps=3, mask_scale=1.0, output_type="pt").images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_the_shift_of_a_painting_is_that_of_a_scheduler_with_it_and_leaves_the_models_own(sd3_folder):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = TODSynthPipeline.from_pretrained(sd3_folder, label_schema=SCHEMA.to_dict())
    masks, options = torch.randint(0, 3, (1, 16, 16)), {"seeds": [3], "num_inference_steps": 3, "output_type": "pt"}
    usual = pipeline(masks, **options).images
    shifted = pipeline(masks, shift=1.0, **options).images
    assert torch.equal(pipeline(masks, **options).images, usual)
    assert not torch.allclose(shifted, usual, atol=1e-4)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert torch.equal(pipeline(masks, **options).images, shifted)


def test_a_reconstruction_is_each_image_by_itself_through_the_autoencoder_whatever_the_batch(sd3_folder):
    pipeline = TODSynthPipeline.from_pretrained(sd3_folder, label_schema=SCHEMA.to_dict())
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    found = pipeline.reconstruct(images, batch_size=2)
    assert (found.dtype, found.shape) == (torch.uint8, images.shape)
    for image, decoded in zip(images, found, strict=True):
        with torch.no_grad():
            latents = pipeline.vae.encode(image[None] / 127.5 - 1).latent_dist.mode()
            expected = (pipeline.vae.decode(latents).sample[0] / 2 + 0.5).clamp(0, 1) * 255
        assert (decoded.float() - expected).abs().max() <= 0.51


def test_a_base_model_without_classes_is_refused(sd3_folder):
    with pytest.raises(TerraSynthError, match="label_schema="):
        TODSynthPipeline.from_pretrained(sd3_folder)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 30, 32), {}, "multiples of 8"),
        ((32, 32), {}, "multiples of 8"),
        ((2, 32, 32), {"prompts": ["one"]}, "`prompts` and `masks` differ"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(pipeline, shape, options, message):
    with pytest.raises(TerraSynthError, match=message):
        pipeline(torch.zeros(shape, dtype=torch.long), seeds=[1, 2], **options)


# Other classes, other precisions

OTHER = LabelSchema(("lagoon", "water", "land", "road"), ((1, 2, 3), (20, 60, 160), (200, 150, 90), (4, 5, 6)), 200)


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder)
    return folder


def test_classes_known_by_name_are_painted_as_before_whatever_their_order(pipeline, saved, masks):
    prompts = [SCHEMA.caption(mask, CAPTION) for mask in masks]
    other = TODSynthPipeline.from_pretrained(
        saved, label_schema=OTHER.to_dict(), caption="seen from above: {classes}", image_size=64, mask_coding="bits"
    )
    assert other.schema == OTHER
    assert other.config.label_schema == OTHER.to_dict()
    assert (other.config.caption, other.config.image_size) == ("seen from above: {classes}", 64)
    assert other.config.mask_coding == "onehot"
    renamed = torch.where(masks == 255, 200, torch.tensor([2, 3, 1])[masks.clamp_max(2)])
    expected = paint(pipeline, masks, [1, 2, 3], prompts=prompts, mask_scale=2.0)
    torch.testing.assert_close(
        paint(other, renamed, [1, 2, 3], prompts=prompts, mask_scale=2.0), expected, atol=1e-4, rtol=0
    )


def test_a_model_with_other_classes_is_saved_with_them(saved, masks, tmp_path):
    other = TODSynthPipeline.from_pretrained(saved, label_schema=OTHER.to_dict(), image_size=64)
    other.save_pretrained(tmp_path)
    again = TODSynthPipeline.from_pretrained(tmp_path)
    assert again.schema == OTHER
    assert (again.config.caption, again.config.image_size) == (CAPTION, 64)
    masks = masks.clamp_max(3)
    assert torch.equal(paint(other, masks, [1, 2, 3]), paint(again, masks, [1, 2, 3]))


def test_the_classes_it_has_change_nothing(pipeline, saved, masks):
    recoloured = LabelSchema(SCHEMA.names, ((1, 1, 1), (2, 2, 2), (3, 3, 3)))
    again = TODSynthPipeline.from_pretrained(saved, label_schema=recoloured.to_dict())
    assert again.schema == recoloured
    assert again.config.image_size == pipeline.config.image_size == 32
    assert again.config.caption == CAPTION
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, again.transformer.state_dict()[name]), name
    assert torch.equal(paint(pipeline, masks, [1, 2, 3]), paint(again, masks, [1, 2, 3]))


def test_an_adapted_model_forgets_the_mask_without_labels_it_had(masks):
    pipeline = small_pipeline()
    schema = LabelSchema(("sand", "land"), ((1, 1, 1), (2, 2, 2)))
    paint(pipeline, masks, [1, 2, 3], mask_scale=2.0)
    assert pipeline.adapt(schema) is pipeline
    assert paint(pipeline, masks.clamp_max(1), [1, 2, 3], mask_scale=2.0).shape == (3, 3, 32, 32)


@pytest.mark.parametrize("coding", ["grey", "bits"])
def test_classes_that_are_not_told_apart_in_the_weights_can_not_be_changed(coding, masks, tmp_path):
    pipeline = small_pipeline(mask_coding=coding)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(TerraSynthError, match="can not be given other classes") as caught:
        TODSynthPipeline.from_pretrained(tmp_path, label_schema=OTHER.to_dict())
    assert coding in str(caught.value.found)
    assert caught.value.fix
    again = TODSynthPipeline.from_pretrained(tmp_path, label_schema=SCHEMA.to_dict())
    assert torch.equal(paint(pipeline, masks, [1, 2, 3]), paint(again, masks, [1, 2, 3]))


def test_a_label_schema_that_is_none_is_refused(saved):
    with pytest.raises(TerraSynthError, match="two classes"):
        TODSynthPipeline.from_pretrained(saved, label_schema={"classes": [{"name": "a", "color": [1, 1, 1]}]})


def test_hub_options_reach_both_looks_at_the_model(saved, monkeypatch):
    seen = []
    load = TODSynthPipeline.load_config.__func__

    def spy(cls, name, **options):
        seen.append(options)
        return load(cls, name, **options)

    monkeypatch.setattr(TODSynthPipeline, "load_config", classmethod(spy))
    options = {"revision": "v2", "token": "secret", "local_files_only": True}
    TODSynthPipeline.from_pretrained(saved, label_schema=OTHER.to_dict(), **options)
    assert options.items() <= seen[0].items()


def parts(pipeline):
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def dtypes(pipeline):
    tensors = [t for part in parts(pipeline) for t in (*part.parameters(), *part.buffers())]
    return {t.dtype for t in tensors if t.is_floating_point()}


def test_half_precision_files_are_computed_in_float32_unless_asked_otherwise(masks, tmp_path):
    pipeline = small_pipeline()
    expected = paint(pipeline, masks, [1, 2, 3])
    pipeline.to(torch.float16, silence_dtype_warnings=True).save_pretrained(tmp_path)
    again = TODSynthPipeline.from_pretrained(tmp_path)
    assert dtypes(again) == {torch.float32}
    torch.testing.assert_close(paint(again, masks, [1, 2, 3]), expected, atol=0.02, rtol=0)
    adapted = TODSynthPipeline.from_pretrained(tmp_path, label_schema=OTHER.to_dict())
    assert dtypes(adapted) == {torch.float32}
    assert dtypes(TODSynthPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)) == {torch.bfloat16}


def test_painting_in_bfloat16_is_nearly_painting_in_float32(pipeline, masks):
    expected = paint(pipeline, masks, [1, 2, 3])
    got = paint(pipeline, masks, [1, 2, 3], precision="bf16")
    assert got.dtype == torch.float32
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0)


def test_conditions_that_are_kept_are_those_of_full_precision_whatever_was_painted_in(masks):
    plain, half = (small_pipeline(mask_coding="grey") for _ in range(2))
    paint(plain, masks, [1, 2, 3])
    paint(half, masks, [1, 2, 3], precision="bf16")
    assert torch.equal(half.null_mask_latents(masks[:1]), plain.null_mask_latents(masks[:1]))
    for kept, expected in zip(half.prompts([""]), plain.prompts([""]), strict=True):
        assert torch.equal(kept, expected)


def test_a_mask_beyond_the_grid_of_positions_is_refused(pipeline):
    assert paint(pipeline, torch.zeros(1, 64, 32, dtype=torch.long), [1]).shape == (1, 3, 64, 32)
    with pytest.raises(TerraSynthError, match="at most 64"):
        paint(pipeline, torch.zeros(1, 72, 32, dtype=torch.long), [1])
