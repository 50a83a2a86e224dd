import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from pydantic import ValidationError

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.control import CONTROL_SCHEMES, AdapterMMDiT, ControlNetMMDiT, SiameseMMDiT
from terrasynth.models.mmdit import MaskMMDiT
from terrasynth.recipe import GeneratorConfig
from terrasynth.systems.todsynth import TODSynthPipeline

MASK_CHANNELS = 6
SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "out_channels": 4,
    "pos_embed_max_size": 12,
}
SD35 = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
SCHEMES = [SiameseMMDiT, AdapterMMDiT, ControlNetMMDiT]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def scrambled(model, seed=1):
    """Random values everywhere, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(seed=2, batch=2, height=16, width=16):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": noise(batch, 4, height, width),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "encoder_hidden_states": noise(batch, 7, 12),
        "pooled_projections": noise(batch, 10),
    }


def mask_code(seed=3, batch=2, channels=MASK_CHANNELS, height=16, width=16):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def backward(model):
    model.zero_grad()
    velocity = model(**inputs(), mask_latents=mask_code()).sample
    F.mse_loss(velocity, torch.ones_like(velocity)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@every_scheme
@pytest.mark.parametrize(("config", "height", "width"), [(SD3, 16, 16), (SD35, 10, 12)])
@torch.no_grad()
def test_without_a_mask_it_is_the_sd3_transformer_to_the_bit_and_with_one_it_is_not(scheme, config, height, width):
    base = scrambled(SD3Transformer2DModel(**config))
    model = scheme.from_sd3(base, mask_channels=MASK_CHANNELS, mask_init="random")
    given = inputs(height=height, width=width)
    expected = base(**given).sample
    assert torch.equal(model(**given).sample, expected)
    model.load_state_dict(scrambled(scheme(**config, mask_channels=MASK_CHANNELS)).state_dict())
    velocity = model(**given, mask_latents=mask_code(height=height, width=width)).sample
    assert velocity.shape == expected.shape
    assert velocity.isfinite().all()
    assert not torch.allclose(velocity, model(**given).sample, atol=1e-2)


@every_scheme
@pytest.mark.parametrize(("config", "mask_channels"), [(SD3, MASK_CHANNELS), (SD35, 4)])
@torch.no_grad()
def test_a_scheme_that_starts_from_sd3_leaves_it_as_it_is_to_the_bit(scheme, config, mask_channels):
    base = scrambled(SD3Transformer2DModel(**config))
    model = scheme.from_sd3(base, mask_channels=mask_channels, mask_init="copy")
    mask = mask_code(channels=mask_channels)
    assert torch.equal(model(**inputs(), mask_latents=mask).sample, base(**inputs()).sample)


@every_scheme
def test_from_sd3_every_parameter_gets_a_gradient_by_the_second_backward(scheme):
    torch.manual_seed(0)
    model = scheme.from_sd3(scrambled(SD3Transformer2DModel(**SD35)), mask_channels=MASK_CHANNELS, mask_init="copy")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        gradients = backward(model)
        assert all(gradient is not None for gradient in gradients.values())
        optimizer.step()
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


@every_scheme
@pytest.mark.parametrize("config", [SD3, {**SD35, "latent_std": (1.5, 1.0, 0.5, 0.2)}])
def test_from_scratch_every_parameter_gets_a_gradient_by_the_third_backward(scheme, config):
    torch.manual_seed(0)
    model = scheme(**config, mask_channels=MASK_CHANNELS).initialize_from_scratch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):  # the read-out is zero, then what a ControlNet adds
        gradients = backward(model)
        assert all(gradient is not None for gradient in gradients.values())
        optimizer.step()
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


@every_scheme
def test_from_scratch_the_schemes_share_positions_preconditioning_and_the_zero_read_out(scheme):
    config = {**SD35, "mask_channels": MASK_CHANNELS, "latent_std": (1.5, 1.0, 0.5, 0.2)}
    model, unified = scheme(**config).initialize_from_scratch(), MaskMMDiT(**config).initialize_from_scratch()
    assert torch.equal(model.pos_embed.pos_embed, unified.pos_embed.pos_embed)
    given = inputs()
    expected = unified(**given, mask_latents=mask_code()).sample
    assert expected.any()
    assert torch.equal(model(**given, mask_latents=mask_code()).sample, expected)


@pytest.mark.parametrize("blocks", [2, 4, 6])
def test_the_schemes_have_about_equally_many_parameters_and_the_adapter_fewer(blocks):
    config = {**SD3, "num_layers": blocks, "attention_head_dim": 32, "caption_projection_dim": 128}
    sizes = {
        name: sum(p.numel() for p in scheme(**config, mask_channels=MASK_CHANNELS).parameters())
        for name, scheme in CONTROL_SCHEMES.items()
    }
    assert sizes["siamese"] == sizes["unified"]
    assert sizes["controlnet"] == pytest.approx(sizes["unified"], rel=0.05)
    assert 0.65 * sizes["unified"] < sizes["adapter"] < sizes["unified"]


@every_scheme
@torch.no_grad()
def test_a_sample_depends_on_its_own_row_only(scheme):
    model = scrambled(scheme(**SD35, mask_channels=MASK_CHANNELS))
    given, mask = inputs(batch=3), mask_code(batch=3)
    together = model(**given, mask_latents=mask).sample
    alone = model(**{name: value[1:2] for name, value in given.items()}, mask_latents=mask[1:2]).sample
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


@every_scheme
def test_gradient_checkpointing_changes_no_gradient(scheme):
    model = scrambled(scheme(**SD35, mask_channels=MASK_CHANNELS, mask_gate=True))
    plain = {name: gradient.clone() for name, gradient in backward(model).items()}
    model.enable_gradient_checkpointing()
    for name, gradient in backward(model).items():
        assert torch.allclose(gradient, plain[name], atol=1e-6), name


@every_scheme
def test_bfloat16_autocast_trains_every_parameter(scheme):
    model = scrambled(scheme(**SD35, mask_channels=MASK_CHANNELS))
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(**inputs(), mask_latents=mask_code()).sample
    velocity.float().pow(2).mean().backward()
    expected = model(**inputs(), mask_latents=mask_code()).sample
    assert torch.allclose(velocity.float(), expected, atol=0.05 * expected.abs().max().item())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_scheme
def test_mask_training_trains_what_sd3_does_not_have(scheme):
    model = scheme(**SD35, mask_channels=MASK_CHANNELS).set_trainable("mask")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    own = set(model.state_dict()) - set(SD3Transformer2DModel(**SD35).state_dict())
    # The query of a last block's text tokens is stored by SD3 and read by nobody.
    assert own - trainable == {
        n for n in own if "mask_blocks.1.attn.add_q" in n or "mask_blocks.1.attn.norm_added_q" in n
    }
    assert trainable <= own


@every_scheme
def test_a_mask_of_another_shape_is_refused(scheme):
    with pytest.raises(TerraSynthError, match=r"\(2, 6, 16, 16\)"):
        scheme(**SD35, mask_channels=MASK_CHANNELS)(**inputs(), mask_latents=mask_code(height=8))


# One block against its equations, in float64 and from the weights by name


class Reference:
    """The pieces of a block spelled out, for width 32 and 4 heads."""

    def __init__(self, block):
        self.w = {name: value.double() for name, value in block.state_dict().items()}

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def heads(self, name, x, norm=None):
        x = self.linear(name, x).reshape(*x.shape[:2], 4, 8)
        if norm is not None:
            x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{norm}.weight"]
        return x.transpose(1, 2)

    def feed_forward(self, name, x):
        return self.linear(f"{name}.net.2", F.gelu(self.linear(f"{name}.net.0.proj", x), approximate="tanh"))

    def image(self, x):
        layers = (("to_q", "attn.norm_q"), ("to_k", "attn.norm_k"), ("to_v", None))
        return [self.heads(f"attn.{layer}", x, norm) for layer, norm in layers]

    def text(self, x):
        layers = (("add_q_proj", "attn.norm_added_q"), ("add_k_proj", "attn.norm_added_k"), ("add_v_proj", None))
        return [self.heads(f"attn.{layer}", x, norm) for layer, norm in layers]

    def update(self, x, found, modulation, out, ff):
        x = x + modulation[2] * self.linear(out, found.transpose(1, 2).flatten(2))
        return x + modulation[5] * self.feed_forward(ff, normed(x) * (1 + modulation[4]) + modulation[3])


def normed(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def attend(q, keys, values):
    return (q @ torch.cat(keys, dim=2).mT / 8**0.5).softmax(-1) @ torch.cat(values, dim=2)


def block_and_tokens(scheme):
    block = scrambled(scheme(**{**SD3, "qk_norm": "rms_norm"}, mask_channels=MASK_CHANNELS)).double()
    generator = torch.Generator().manual_seed(4)
    tokens = [torch.randn(2, n, 32, generator=generator, dtype=torch.float64) for n in (9, 5, 9)]
    return block.transformer_blocks[1], torch.randn(2, 32, generator=generator, dtype=torch.float64), tokens


@torch.no_grad()
def test_a_siamese_block_adds_the_two_attentions_of_the_image():
    block, conditioning, (z, t, m) = block_and_tokens(SiameseMMDiT)
    ref = Reference(block)
    z_mod, t_mod, m_mod = (
        ref.linear(name, conditioning[:, None]).chunk(6, -1)
        for name in ("norm1.linear", "norm1_context.linear", "mask.modulation")
    )
    hz, ht, hm = (normed(x) * (1 + mod[1]) + mod[0] for x, mod in ((z, z_mod), (t, t_mod), (m, m_mod)))
    (zq, zk, zv), (tq, tk, tv) = ref.image(hz), ref.text(ht)
    mq, mk = ref.heads("mask.to_q", hm, "mask.norm_q"), ref.heads("mask.to_k", hm, "mask.norm_k")
    mv = ref.heads("mask.to_v", hm)
    image = attend(zq, (zk, tk), (zv, tv)) + attend(zq, (zk, mk), (zv, mv))
    expected = (
        ref.update(z, image, z_mod, "attn.to_out.0", "ff"),
        ref.update(t, attend(tq, (zk, tk), (zv, tv)), t_mod, "attn.to_add_out", "ff_context"),
        ref.update(m, attend(mq, (zk, mk), (zv, mv)), m_mod, "mask.to_out", "mask.ff"),
    )
    for got, wanted in zip(block(conditioning, z, t, m), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)  # diffusers' RMS norm is float32


@torch.no_grad()
def test_in_a_siamese_block_text_and_mask_do_not_see_each_other():
    block, conditioning, (z, t, m) = block_and_tokens(SiameseMMDiT)
    image, text, mask = block(conditioning, z, t, m)
    image_1, text_1, _ = block(conditioning, z, t, torch.randn_like(m))
    image_2, _, mask_2 = block(conditioning, z, torch.randn_like(t), m)
    assert torch.equal(text, text_1)
    assert torch.equal(text, block(conditioning, z, t)[1])
    assert torch.equal(mask, mask_2)
    # The image sees both, and the pooled prompt and the timestep modulate all of them.
    for other in (image_1, image_2):
        assert not torch.allclose(image, other, atol=1e-2)
    for tokens, others in zip((image, text, mask), block(2 * conditioning, z, t, m), strict=True):
        assert not torch.allclose(tokens, others, atol=1e-2)


@torch.no_grad()
def test_an_adapter_block_adds_cross_attention_to_the_features():
    block, conditioning, (z, t, features) = block_and_tokens(AdapterMMDiT)
    ref = Reference(block)
    z_mod, t_mod = (
        ref.linear(name, conditioning[:, None]).chunk(6, -1) for name in ("norm1.linear", "norm1_context.linear")
    )
    hz, ht = (normed(x) * (1 + mod[1]) + mod[0] for x, mod in ((z, z_mod), (t, t_mod)))
    (zq, zk, zv), (tq, tk, tv) = ref.image(hz), ref.text(ht)
    mk, mv = ref.heads("mask.to_k", normed(features), "mask.norm_k"), ref.heads("mask.to_v", normed(features))
    image = attend(zq, (zk, tk), (zv, tv)) + attend(zq, (mk,), (mv,))
    expected = (
        ref.update(z, image, z_mod, "attn.to_out.0", "ff"),
        ref.update(t, attend(tq, (zk, tk), (zv, tv)), t_mod, "attn.to_add_out", "ff_context"),
    )
    for got, wanted in zip(block(conditioning, z, t, features), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)  # diffusers' RMS norm is float32


@pytest.mark.parametrize("block", [0, 3])
@torch.no_grad()
def test_the_features_of_an_adapter_come_from_the_mask_alone(block):
    model = scrambled(AdapterMMDiT(**SD35, mask_channels=MASK_CHANNELS))
    seen = []
    for layer in model.transformer_blocks[block].mask.children():  # keys, values, and the norm of the keys
        layer.register_forward_hook(lambda module, arguments, output: seen.append(output))
    for seed, mask_seed in ((5, 7), (6, 7), (5, 8)):
        model(**inputs(seed), mask_latents=mask_code(mask_seed))
    for once, again, other in zip(seen[:3], seen[3:6], seen[6:], strict=True):
        assert torch.equal(once, again)
        assert not torch.allclose(once, other, atol=1e-2)


@torch.no_grad()
def test_a_controlnet_changes_nothing_before_it_is_trained():
    model = ControlNetMMDiT(**SD35, mask_channels=MASK_CHANNELS)
    zeros = {name: value.clone() for name, value in model.mask_outputs.state_dict().items()}
    scrambled(model).mask_outputs.load_state_dict(zeros)
    assert torch.equal(model(**inputs(), mask_latents=mask_code()).sample, model(**inputs()).sample)


@pytest.mark.parametrize("config", [SD3, SD35, {**SD35, "num_layers": 5}, {**SD3, "num_layers": 2}])
@torch.no_grad()
def test_the_controlnet_is_diffusers_own_with_shared_embeddings(config):
    model = scrambled(ControlNetMMDiT(**config, mask_channels=MASK_CHANNELS))
    weights = model.state_dict()
    base = SD3Transformer2DModel(**config)
    base.load_state_dict({name: value for name, value in weights.items() if not name.startswith("mask_")})
    control = SD3ControlNetModel(
        **{**config, "num_layers": config["num_layers"] // 2}, extra_conditioning_channels=MASK_CHANNELS - 4
    )
    own = control.state_dict()
    for name in own:
        source = name.replace("controlnet_blocks.", "mask_outputs.").replace("transformer_blocks.", "mask_blocks.")
        source = source.replace("pos_embed_input.", "mask_embed.")
        if source not in weights:  # diffusers computes what the last block's text finds, and drops it
            continue
        value = weights[source]
        if value.shape != own[name].shape:  # its scale and shift, without gates, are stored the other way round
            scale, shift = value.chunk(2)
            value = torch.cat([shift, scale, torch.zeros_like(own[name][64:])])
        own[name] = value
    control.load_state_dict(own)
    given, mask = inputs(), mask_code()
    residuals = control(controlnet_cond=mask, **given, return_dict=False)[0]
    expected = base(**given, block_controlnet_hidden_states=residuals).sample
    torch.testing.assert_close(model(**given, mask_latents=mask).sample, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(base(**given).sample, expected, atol=1e-2)


# In the pipeline

SCHEMA = LabelSchema(("land", "road", "water"), ((200, 150, 90), (90, 90, 90), (20, 60, 160)))


def small_pipeline(control):
    config = GeneratorConfig(width=32, heads=2, blocks=2, control=control)
    images = F.interpolate(torch.rand(4, 3, 4, 4), 32, mode="bilinear")
    caption = "a satellite image of {classes}"
    pipeline = TODSynthPipeline.from_scratch(config, images, SCHEMA, caption, ["a satellite image of land"])
    scrambled(pipeline.transformer).eval()
    return pipeline


@pytest.mark.parametrize("control", CONTROL_SCHEMES)
def test_a_pipeline_of_each_scheme_is_saved_and_loaded_and_paints_the_same(control, tmp_path):
    pipeline = small_pipeline(control)
    assert type(pipeline.transformer) is CONTROL_SCHEMES[control]
    masks = torch.randint(0, 3, (2, 32, 32))
    masks[0, :8] = 255

    def paint(pipeline, masks, **options):
        return pipeline(masks, seeds=[1, 2], num_inference_steps=2, output_type="pt", **options).images

    painted = paint(pipeline, masks, mask_scale=2.0, text_scale=1.5)
    pipeline.save_pretrained(tmp_path)
    loaded = TODSynthPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is CONTROL_SCHEMES[control]
    assert torch.equal(paint(loaded, masks, mask_scale=2.0, text_scale=1.5), painted)
    assert (paint(pipeline, masks) - paint(pipeline, masks.flip(-1))).abs().max() > 1e-3
    unlabelled = torch.full_like(masks, 255)
    torch.testing.assert_close(paint(pipeline, unlabelled, mask_scale=3.0), paint(pipeline, unlabelled, mask_scale=1.0))


@pytest.mark.parametrize("control", ["siamese", "adapter", "controlnet"])
def test_each_scheme_trains_with_dropped_masks(control):
    pipeline = small_pipeline(control)
    pipeline.text_dropout = pipeline.mask_dropout = 0.5
    embeds, pooled = pipeline.prompts(["a satellite image of land"] * 6)
    batch = {
        "latents": torch.randn(6, 16, 8, 8),
        "mask": torch.randint(0, 3, (6, 32, 32), dtype=torch.uint8),
        "prompt_embeds": embeds,
        "pooled": pooled,
        "seed": torch.arange(6),
    }
    optimizer = torch.optim.AdamW(pipeline.transformer.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = pipeline.training_loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_controlnet_of_one_block_is_refused():
    with pytest.raises(ValidationError, match="at least 2 blocks"):
        GeneratorConfig(control="controlnet", blocks=1)
