"""References in the MM-DiT: what the image finds, against plain sums; what is computed once, against every step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.control import CONTROL_SCHEMES
from terrasynth.models.mmdit import JointBlock, MaskMMDiT
from terrasynth.recipe import GeneratorConfig
from terrasynth.sampling.flow import sample_flow, seeded_noise
from terrasynth.systems.todsynth import TODSynthPipeline

SIZES = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "out_channels": 4,
    "pos_embed_max_size": 12,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0, 1),
}
SCHEMA = LabelSchema(("land", "road", "water"), ((200, 150, 90), (90, 90, 90), (20, 60, 160)))
CAPTION = "a satellite image of {classes}"


@pytest.fixture(autouse=True)
def _fixed_numbers():
    torch.manual_seed(0)


def network(scheme="unified", open_gates=True, **changes):
    """Random values everywhere but, if asked, in the gates of the references."""
    model = CONTROL_SCHEMES[scheme](**SIZES, mask_channels=6, reference=True, **changes)
    for name, parameter in model.named_parameters():
        if open_gates or not name.endswith("reference_gate"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def given(batch=2):
    return {
        "hidden_states": torch.randn(batch, 4, 16, 16),
        "timestep": torch.rand(batch) * 1000,
        "encoder_hidden_states": torch.randn(batch, 7, 12),
        "pooled_projections": torch.randn(batch, 10),
        "mask_latents": torch.randn(batch, 6, 16, 16),
    }


@pytest.mark.parametrize("latent_std", [None, (0.5, 1.0, 1.5, 2.0)])
@pytest.mark.parametrize("scheme", CONTROL_SCHEMES)
@torch.no_grad()
def test_behind_closed_gates_and_where_it_is_not_seen_there_is_no_reference(scheme, latent_std):
    closed, opened = network(scheme, open_gates=False, latent_std=latent_std), network(scheme, latent_std=latent_std)
    inputs, latents = given(), torch.randn(2, 4, 16, 16)
    features = closed.reference_features(latents)
    assert torch.equal(closed(**inputs, reference=features).sample, closed(**inputs).sample)
    features, without = opened.reference_features(latents), opened(**inputs).sample
    nothing = [(key, torch.zeros_like(value)) for key, value in features]
    assert torch.equal(opened(**inputs, reference=nothing).sample, without)
    seen = opened(**inputs, reference=features).sample
    assert ((seen - without).abs().amax((1, 2, 3)) > 1e-3).all()
    one = opened(**inputs, reference=features, sees=torch.tensor([True, False])).sample
    torch.testing.assert_close(one, torch.stack([seen[0], without[1]]), atol=1e-6, rtol=1e-6)
    # Fewer references than images come in turn.
    twice = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}
    torch.testing.assert_close(
        opened(**twice, reference=features).sample, seen.repeat(2, 1, 1, 1), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_the_image_finds_what_a_plain_attention_finds():
    block = JointBlock(32, 4, last=False, dual_attention=False, qk_norm=None).double()
    conditioning, image, text = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((32,), (9, 32), (5, 32)))
    reference = [torch.randn(2, 6, 4, 8, dtype=torch.float64) for _ in range(2)]
    gate = torch.rand(4, dtype=torch.float64)
    block.reference_gate = torch.nn.Parameter(gate / 32)
    # After the attention, nothing but the output projection.
    scale, shift = torch.zeros(2, 32, dtype=torch.float64)
    block.norm1.linear.weight.zero_()
    block.norm1.linear.bias.copy_(torch.cat([shift, scale, torch.ones(32), torch.zeros(96)]))
    with_reference, _ = block(conditioning, image, text, reference=tuple(reference))
    without, _ = block(conditioning, image, text)
    query = block.attn.to_q(F.layer_norm(image, (32,), eps=1e-6)).view(2, 9, 4, 8)
    found = torch.zeros(2, 9, 4, 8, dtype=torch.float64)
    for b in range(2):
        for head in range(4):
            for i in range(9):
                scores = torch.stack([query[b, i, head] @ key for key in reference[0][b, :, head]]) / 8**0.5
                weights = scores.exp() / scores.exp().sum()
                found[b, i, head] = gate[head] * (weights[:, None] * reference[1][b, :, head]).sum(0)
    expected = found.flatten(2) @ block.attn.to_out[0].weight.T
    torch.testing.assert_close(with_reference - without, expected, atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_a_reference_passes_through_the_image_branch_by_itself_clean_and_without_a_prompt():
    model, latents = network(latent_std=(0.5, 1.0, 1.5, 2.0)), torch.randn(2, 4, 16, 16)
    features = model.reference_features(latents)
    # Attention among the image tokens alone is what a block does without text and mask.
    std = torch.tensor(model.config.latent_std).view(1, -1, 1, 1)
    tokens = model.pos_embed(latents / std)
    conditioning = F.silu(model.time_text_embed(torch.zeros(2), torch.zeros(2, 10)))
    for block, (key, value) in zip(model.transformer_blocks, features, strict=True):
        shift, scale = block.norm1.linear(conditioning)[:, None].split(32, dim=-1)[:2]
        normed = F.layer_norm(tokens, (32,), eps=1e-6) * (1 + scale) + shift
        torch.testing.assert_close(value, block.attn.to_v(normed).view(2, 64, 4, 8), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            key, block.attn.norm_k(block.attn.to_k(normed).view(2, 64, 4, 8)), atol=1e-5, rtol=1e-5
        )
        (tokens,) = block(conditioning, tokens)


def gradients(model, inputs, latents):
    model.zero_grad()
    velocity = model(**inputs, reference=model.reference_features(latents)).sample
    F.mse_loss(velocity, torch.ones_like(velocity)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("which", ["all", "image+mask", "mask"])
@pytest.mark.parametrize("scheme", CONTROL_SCHEMES)
def test_closed_gates_get_a_gradient_whatever_trains(scheme, which):
    model = network(scheme, open_gates=False).set_trainable(which)
    gates = {
        name: gradient
        for name, gradient in gradients(model, given(), torch.randn(2, 4, 16, 16)).items()
        if name.endswith("reference_gate")
    }
    assert len(gates) == 3
    assert all(gradient.abs().min() > 0 for gradient in gates.values())


@pytest.mark.parametrize("scheme", CONTROL_SCHEMES)
def test_gradient_checkpointing_changes_no_gradient(scheme):
    model, inputs, latents = network(scheme), given(), torch.randn(2, 4, 16, 16)
    plain = gradients(model, inputs, latents)
    model.enable_gradient_checkpointing()
    checkpointed, checkpoint = [], model._gradient_checkpointing_func
    model._gradient_checkpointing_func = lambda *given: checkpointed.append(given[0]) or checkpoint(*given)
    for name, gradient in gradients(model.train(), inputs, latents).items():
        assert torch.equal(gradient, plain[name]), name
    # Every block twice, for the reference and for the image; a ControlNet's control stream once.
    assert len(checkpointed) == 2 * 3 + (1 if scheme == "controlnet" else 0)


@torch.no_grad()
def test_offloading_brings_the_network_to_its_card_for_references_too():
    model = network()

    class Hook:
        calls = 0

        def pre_forward(self, module):
            self.calls += 1

    model._hf_hook = Hook()
    model.reference_features(torch.randn(1, 4, 16, 16))
    assert model._hf_hook.calls == 1


@torch.no_grad()
def test_stable_diffusion_learns_to_look_without_changing_what_it_paints():
    base = SD3Transformer2DModel(**SIZES)
    model = MaskMMDiT.from_sd3(base, mask_channels=6, mask_init="copy").add_reference()
    inputs = given()
    inputs.pop("mask_latents")
    seen = model(**inputs, reference=model.reference_features(torch.randn(2, 4, 16, 16))).sample
    assert torch.equal(seen, base(**inputs).sample)
    assert {*model.state_dict()} - {*base.state_dict()} >= {f"transformer_blocks.{i}.reference_gate" for i in range(3)}


# --- the pipeline ----------------------------------------------------------------------------------------------------


def small_pipeline(reference=True):
    images = F.interpolate(torch.rand(4, 3, 4, 4), 32, mode="bilinear")
    config = GeneratorConfig(width=32, heads=2, blocks=2)
    pipeline = TODSynthPipeline.from_scratch(config, images, SCHEMA, CAPTION, ["a satellite image of land"])
    if reference:
        pipeline.transformer.add_reference()
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return pipeline


def paint(pipeline, masks, **options):
    seeds = options.pop("seeds", list(range(len(masks))))
    return pipeline(masks, seeds=seeds, num_inference_steps=3, output_type="pt", **options).images


@pytest.fixture
def masks():
    return torch.randint(0, 3, (3, 32, 32))


def test_an_image_depends_on_its_own_reference(masks):
    pipeline, references = small_pipeline(), torch.rand(3, 3, 32, 48)
    options = {"text_scale": 2.0, "mask_scale": 3.0, "reference_scale": 1.5}
    together = paint(pipeline, masks, references=references, **options)
    for i in range(3):
        alone = paint(pipeline, masks[i : i + 1], references=references[i : i + 1], seeds=[i], **options)
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=0)
    other = paint(pipeline, masks, references=references.flip(1), **options)
    assert ((together - other).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, 1.0, 1.5), (2.0, 1.5, 3.0)])
def test_computed_once_it_is_what_is_computed_in_every_step(masks, scales):
    pipeline, references = small_pipeline(), torch.rand(3, 3, 32, 32)
    text_scale, reference_scale, mask_scale = scales
    embeds, pooled = pipeline.encode_prompts(pipeline.captions(masks))
    null_embeds, null_pooled = (null.expand(3, *null.shape[1:]) for null in pipeline.encode_prompts([""]))
    latents = pipeline.encode_images(references)

    @torch.no_grad()
    def velocity(z, timestep):
        def predict(text, reference, mask):
            return pipeline.transformer(
                z,
                timestep=timestep,
                encoder_hidden_states=embeds if text else null_embeds,
                pooled_projections=pooled if text else null_pooled,
                mask_latents=pipeline.encode_masks(masks if mask else torch.full_like(masks, 255)),
                reference=pipeline.transformer.reference_features(latents) if reference else None,
            ).sample

        nothing, text = predict(False, False, False), predict(True, False, False)
        look, everything = predict(True, True, False), predict(True, True, True)
        steps = text_scale * (text - nothing) + reference_scale * (look - text) + mask_scale * (everything - look)
        return nothing + steps

    expected = pipeline.decode(sample_flow(velocity, seeded_noise(range(3), (16, 8, 8)), pipeline.scheduler, 3))
    named = {"text_scale": text_scale, "reference_scale": reference_scale, "mask_scale": mask_scale}
    torch.testing.assert_close(paint(pipeline, masks, references=references, **named), expected, atol=1e-5, rtol=1e-5)


def test_a_dropped_reference_is_none_in_training(masks):
    pipeline = small_pipeline()
    embeds, pooled = pipeline.prompts(pipeline.captions(masks))
    batch = {
        "latents": torch.randn(3, 16, 8, 8),
        "mask": masks.to(torch.uint8),
        "prompt_embeds": embeds,
        "pooled": pooled,
        "seed": torch.arange(3),
    }
    plain = pipeline.training_loss(batch)
    batch["reference_latents"] = torch.randn(3, 16, 8, 8)
    seen = pipeline.training_loss(batch)
    pipeline.reference_dropout = 1.0
    assert torch.equal(pipeline.training_loss(batch), plain)
    assert (seen - plain).abs() > 1e-4


def test_saved_and_loaded_it_looks_as_before(masks, tmp_path):
    pipeline, references = small_pipeline(), torch.rand(3, 3, 32, 32)
    pipeline.save_pretrained(tmp_path)
    again = TODSynthPipeline.from_pretrained(tmp_path)
    expected = paint(pipeline, masks, references=references)
    assert torch.equal(paint(again, masks, references=references), expected)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (torch.rand(2, 3, 32, 32), "`references` and `masks` differ in number"),
        (torch.rand(3, 3, 30, 32), "the references do not fit the model"),
        (torch.rand(3, 1, 32, 32), "the references do not fit the model"),
        (torch.zeros(3, 3, 32, 32, dtype=torch.uint8), "the references do not fit the model"),
        (torch.rand(3, 3, 32, 4096), "the references do not fit the model"),
    ],
)
def test_references_that_do_not_fit_are_refused(masks, references, message):
    with pytest.raises(TerraSynthError, match=message):
        paint(small_pipeline(), masks, references=references)


def test_a_model_that_can_not_look_says_so(masks):
    with pytest.raises(TerraSynthError, match="the model can not look at references"):
        paint(small_pipeline(reference=False), masks, references=torch.rand(3, 3, 32, 32))
