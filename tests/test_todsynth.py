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
