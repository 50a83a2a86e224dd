from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SD3Transformer2DModel

from terrasynth.errors import TerraSynthError
from terrasynth.models import mmdit
from terrasynth.models.mmdit import TEXT_BRANCH, MaskMMDiT

SD3 = {
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
}
SD35 = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
SD35_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
MASK_CHANNELS = 6


def scrambled(model):
    """Random values everywhere, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(config=SD35, batch=2, height=16, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {
        "hidden_states": noise(batch, config["in_channels"], height, width),
        "timestep": torch.rand(batch, generator=generator, dtype=dtype) * 1000,
        "encoder_hidden_states": noise(batch, 7, config["joint_attention_dim"]),
        "pooled_projections": noise(batch, config["pooled_projection_dim"]),
    }


def mask_code(batch=2, channels=MASK_CHANNELS, height=16, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=dtype)


def backward(model, **kwargs):
    model.zero_grad()
    velocity = model(**inputs(), **kwargs).sample
    F.mse_loss(velocity, torch.ones_like(velocity)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("config", [SD3, SD35, {**SD3, "dual_attention_layers": (2,)}, {**SD35, "patch_size": 1}])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (10, 12)])
@torch.no_grad()
def test_without_a_mask_it_is_the_sd3_transformer_to_the_bit(config, height, width):
    if config["patch_size"] == 1:
        height, width = height // 2, width // 2
    base = scrambled(SD3Transformer2DModel(**config))
    model = MaskMMDiT.from_sd3(base, mask_channels=MASK_CHANNELS, mask_init="random")
    given = inputs(config, height=height, width=width)
    assert torch.equal(model(**given).sample, base(**given).sample)


@pytest.mark.parametrize("config", [SD3, SD35])
@pytest.mark.parametrize("mask_channels", [4, MASK_CHANNELS])
@torch.no_grad()
def test_a_copied_mask_branch_leaves_the_base_model_as_it_is_to_the_bit(config, mask_channels):
    base = scrambled(SD3Transformer2DModel(**config))
    model = MaskMMDiT.from_sd3(base, mask_channels=mask_channels, mask_init="copy")
    given = inputs(config, height=10, width=12)
    mask = mask_code(channels=mask_channels, height=10, width=12)
    assert torch.equal(model(**given, mask_latents=mask).sample, base(**given).sample)


@torch.no_grad()
def test_a_copied_mask_branch_treats_the_mask_as_the_image_branch_treats_the_image():
    base = scrambled(SD3Transformer2DModel(**SD35))
    model = MaskMMDiT.from_sd3(base, mask_channels=4, mask_init="copy")
    given = inputs()
    image = model.pos_embed(given["hidden_states"])
    assert torch.allclose(model._embed_mask(given["hidden_states"]), image)
    conditioning = torch.randn(2, 32)
    for block in model.transformer_blocks:
        streams = block.streams()
        image_modulation, mask_modulation = streams[0].modulate(conditioning), streams[2].modulate(conditioning)
        for own, other in zip(mask_modulation, image_modulation, strict=False):
            assert torch.equal(own.shift, other.shift)
            assert torch.equal(own.scale, other.scale)
        for own, other in zip(streams[2].project(image), streams[0].project(image), strict=True):
            assert own is None or torch.equal(own, other)


@torch.no_grad()
def test_a_gate_of_one_is_the_unified_attention():
    gated = scrambled(MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS, mask_gate=True))
    plain = MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS)
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if not name.endswith(".gate")})
    for block in gated.transformer_blocks:
        block.mask.gate.fill_(1 / 32)
    given = inputs()
    expected = plain(**given, mask_latents=mask_code()).sample
    assert torch.equal(gated(**given, mask_latents=mask_code()).sample, expected)
    assert not torch.allclose(plain(**given).sample, expected, atol=1e-3)


@torch.no_grad()
def test_the_velocity_follows_the_equations_of_the_block():
    """Softmax attention over [image, text, mask], spelled out in float64 from the weights by name."""
    model = scrambled(MaskMMDiT(**{**SD3, "num_layers": 2}, mask_channels=MASK_CHANNELS)).double()
    given, mask = inputs(dtype=torch.float64), mask_code(dtype=torch.float64)
    w = model.state_dict()

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def heads(x):
        return x.reshape(2, -1, 4, 8).transpose(1, 2)

    def feed_forward(name, x):
        return linear(f"{name}.net.2", F.gelu(linear(f"{name}.net.0.proj", x), approximate="tanh"))

    def embed(name, x):
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)
        weight, bias = w[f"{name}.proj.weight"].flatten(1), w[f"{name}.proj.bias"]
        positions = w["pos_embed.pos_embed"].reshape(12, 12, 32)[2:10, 2:10].reshape(64, 32)
        return patches @ weight.T + bias + positions

    z, m = embed("pos_embed", given["hidden_states"]), embed("mask_embed", mask)
    t = linear("context_embedder", given["encoder_hidden_states"])
    embedding = model.time_text_embed(given["timestep"], given["pooled_projections"])
    c = F.silu(embedding)[:, None]
    for i in range(2):
        block = f"transformer_blocks.{i}"
        z_mod = linear(f"{block}.norm1.linear", c).chunk(6, -1)  # shift, scale, gate; attention, then feed-forward
        t_mod = linear(f"{block}.norm1_context.linear", c).chunk(6 if i == 0 else 2, -1)
        m_mod = linear(f"{block}.mask.modulation", c).chunk(6 if i == 0 else 2, -1)
        if i == 1:  # keys and values only: scale, shift
            t_mod, m_mod = t_mod[::-1], m_mod[::-1]
        hz, ht, hm = (norm(x) * (1 + mod[1]) + mod[0] for x, mod in ((z, z_mod), (t, t_mod), (m, m_mod)))
        attn, own = f"{block}.attn", f"{block}.mask"
        q = [linear(f"{attn}.to_q", hz), linear(f"{attn}.add_q_proj", ht)]
        if i == 0:
            q.append(linear(f"{own}.to_q", hm))
        k = [linear(f"{attn}.to_k", hz), linear(f"{attn}.add_k_proj", ht), linear(f"{own}.to_k", hm)]
        v = [linear(f"{attn}.to_v", hz), linear(f"{attn}.add_v_proj", ht), linear(f"{own}.to_v", hm)]
        q, k, v = (heads(torch.cat(x, dim=1)) for x in (q, k, v))
        o = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, -1, 32)
        z = z + z_mod[2] * linear(f"{attn}.to_out.0", o[:, :64])
        z = z + z_mod[5] * feed_forward(f"{block}.ff", norm(z) * (1 + z_mod[4]) + z_mod[3])
        if i == 0:
            t = t + t_mod[2] * linear(f"{attn}.to_add_out", o[:, 64:71])
            t = t + t_mod[5] * feed_forward(f"{block}.ff_context", norm(t) * (1 + t_mod[4]) + t_mod[3])
            m = m + m_mod[2] * linear(f"{own}.to_out", o[:, 71:])
            m = m + m_mod[5] * feed_forward(f"{own}.ff", norm(m) * (1 + m_mod[4]) + m_mod[3])
    scale, shift = linear("norm_out.linear", c).chunk(2, -1)
    patches = linear("proj_out", norm(z) * (1 + scale) + shift)  # (row, column, channel) within each patch
    columns = patches.reshape(2, 64, 4, 4).transpose(2, 3).reshape(2, 64, 16).transpose(1, 2)
    expected = F.fold(columns, 16, 2, stride=2)

    got = model(**given, mask_latents=mask).sample
    assert torch.allclose(got, expected, atol=1e-6)  # the timestep embedding inside diffusers is float32


@torch.no_grad()
def test_a_sample_depends_on_its_own_row_only():
    model = scrambled(MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS))
    given, mask = inputs(batch=3), mask_code(batch=3)
    together = model(**given, mask_latents=mask).sample
    alone = model(**{name: value[1:2] for name, value in given.items()}, mask_latents=mask[1:2]).sample
    assert torch.allclose(together[1:2], alone, atol=1e-5)


def test_a_mask_of_another_shape_is_refused():
    model = MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS)
    with pytest.raises(TerraSynthError, match=r"\(2, 6, 16, 16\)"):
        model(**inputs(), mask_latents=mask_code(height=8))


@pytest.mark.parametrize("modulation", ["own", "image"])
@pytest.mark.parametrize("config", [SD3, SD35])
def test_from_scratch_every_parameter_gets_a_gradient_by_the_third_backward(config, modulation):
    torch.manual_seed(0)
    model = MaskMMDiT(**config, mask_channels=MASK_CHANNELS, mask_mlp_modulation=modulation).initialize_from_scratch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert not model(**inputs(config), mask_latents=mask_code()).sample.any()
    for _ in range(3):
        gradients = backward(model, mask_latents=mask_code())
        assert all(gradient is not None for gradient in gradients.values())
        optimizer.step()
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


@pytest.mark.parametrize("which", ["all", "image+mask", "mask", "lora"])
def test_from_sd3_every_trainable_parameter_gets_a_gradient_by_the_second_backward(which):
    base = scrambled(SD3Transformer2DModel(**SD35))
    torch.manual_seed(0)
    model = MaskMMDiT.from_sd3(base, mask_channels=MASK_CHANNELS, mask_init="copy").set_trainable(which, lora_rank=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        gradients = backward(model, mask_latents=mask_code())
        assert all(gradient is not None for gradient in gradients.values())
        optimizer.step()
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


def test_the_only_parameters_that_never_train_are_the_last_text_queries():
    model = MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS).set_trainable("all")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    attn = "transformer_blocks.2.attn"
    assert frozen == {f"{attn}.add_q_proj.weight", f"{attn}.add_q_proj.bias", f"{attn}.norm_added_q.weight"}


def test_image_and_mask_training_freezes_the_text_branch_alone():
    model = MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS).set_trainable("image+mask")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != any(part in name for part in TEXT_BRANCH)
    assert all(p.requires_grad for p in (*model.proj_out.parameters(), *model.norm_out.parameters()))


def test_mask_training_trains_what_sd3_does_not_have():
    model = MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS).set_trainable("mask")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(model.state_dict()) - set(SD3Transformer2DModel(**SD35).state_dict())


def test_sd35_medium_has_the_published_parameters_less_the_dead_ones():
    # Published: 906 trainable tensors. In the last block the mask's query (2, and its norm 1), output (2) and
    # feed-forward (4) change nothing; here they do not exist.
    with torch.device("meta"):
        model = MaskMMDiT(**SD35_MEDIUM, mask_mlp_modulation="own").set_trainable("image+mask")
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 906 - 9
    width = 1536
    dead = 2 * (width * width + width) + 64 + (8 * width * width + 5 * width) + 4 * (width * width + width)
    assert sum(p.numel() for p in model.parameters()) + dead == pytest.approx(3263.0e6, abs=0.05e6)
    assert sum(p.numel() for p in trainable) + dead == pytest.approx(2259.4e6, abs=0.05e6)


def test_an_unknown_choice_of_branches_is_refused():
    with pytest.raises(TerraSynthError, match=r"image\+mask"):
        MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS).set_trainable("text")


def test_lora_adapts_the_image_branch_and_is_saved_merged(tmp_path):
    model = scrambled(MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS)).set_trainable("lora", lora_rank=2)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    layers = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"]
    layers_dual = [layer.replace("attn.", "attn2.") for layer in layers[:4]]
    assert adapted == {
        f"transformer_blocks.{i}.{layer}" for i in range(3) for layer in layers + (layers_dual if i < 2 else [])
    }
    scrambled(model)
    given = inputs()
    with torch.no_grad():
        expected = model(**given, mask_latents=mask_code()).sample
        model.save_pretrained(tmp_path)
        assert torch.equal(model(**given, mask_latents=mask_code()).sample, expected)
        loaded = MaskMMDiT.from_pretrained(tmp_path)
        assert set(loaded.state_dict()) == set(MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS).state_dict())
        assert torch.allclose(loaded(**given, mask_latents=mask_code()).sample, expected, atol=1e-5)


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TerraSynthError, match=r"terrasynth\[peft\]"):
        MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS).set_trainable("lora")


def test_gradient_checkpointing_changes_no_gradient():
    model = scrambled(MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS, mask_gate=True))
    plain = {name: gradient.clone() for name, gradient in backward(model, mask_latents=mask_code()).items()}
    model.enable_gradient_checkpointing()
    for name, gradient in backward(model, mask_latents=mask_code()).items():
        assert torch.allclose(gradient, plain[name], atol=1e-6), name


def test_bfloat16_autocast_trains_every_parameter():
    model = scrambled(MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS, mask_gate=True))
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(**inputs(), mask_latents=mask_code()).sample
    velocity.float().pow(2).mean().backward()
    expected = model(**inputs(), mask_latents=mask_code()).sample
    assert torch.allclose(velocity.float(), expected, atol=0.05 * expected.abs().max().item())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


class Pipeline(DiffusionPipeline):
    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)


@torch.no_grad()
def test_a_saved_model_loads_equal_alone_and_in_a_pipeline_folder(tmp_path):
    model = scrambled(MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS, mask_mlp_modulation="image", mask_gate=True))
    Pipeline(model).save_pretrained(tmp_path)
    assert sorted(p.name for p in (tmp_path / "transformer").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert json.loads((tmp_path / "transformer" / "config.json").read_text())["num_layers"] == 3
    expected = model(**inputs(), mask_latents=mask_code()).sample
    for loaded in (
        MaskMMDiT.from_pretrained(tmp_path, subfolder="transformer"),
        Pipeline.from_pretrained(tmp_path).transformer,
    ):
        assert torch.equal(loaded(**inputs(), mask_latents=mask_code()).sample, expected)
        trainable = [p.requires_grad for p in model.parameters()]
        assert [p.requires_grad for p in loaded.parameters()] == trainable


@torch.no_grad()
def test_an_sd3_checkpoint_is_a_subset_of_the_state_dict():
    base = SD3Transformer2DModel(**SD35)
    result = MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS).load_state_dict(base.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all(name.startswith("mask_embed.") or ".mask." in name for name in result.missing_keys)


def test_preconditioning_is_the_best_linear_prediction_of_the_velocity():
    # Gaussian latents: regress the velocity on the noisy latents, channel by channel, in float64.
    std = (3.0, 0.5)
    model = MaskMMDiT(**{**SD35, "in_channels": 2, "out_channels": 2}, mask_channels=MASK_CHANNELS, latent_std=std)
    for sigma in (0.05, 0.5, 0.95):
        x0 = torch.randn(200_000, 2, 1, 1, dtype=torch.float64) * torch.tensor(std).view(1, 2, 1, 1)
        noise = torch.randn_like(x0)
        x, v = (1 - sigma) * x0 + sigma * noise, noise - x0
        scale_in, skip, scale_out = model._precondition(torch.tensor([1000 * sigma]), x)
        slope = (x * v).mean((0, 2, 3)) / (x * x).mean((0, 2, 3))
        torch.testing.assert_close(skip.flatten(), slope, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close((scale_in * x).std((0, 2, 3)), torch.ones(2).double(), atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(
            ((v - skip * x) / scale_out).std((0, 2, 3)), torch.ones(2).double(), atol=1e-2, rtol=1e-2
        )


def test_an_untrained_preconditioned_model_predicts_the_linear_part_alone():
    config = {**SD35, "latent_std": [2.0] * SD35["in_channels"]}
    model = MaskMMDiT(**config, mask_channels=MASK_CHANNELS).initialize_from_scratch()
    x, t = torch.randn(2, SD35["in_channels"], 8, 8), torch.tensor([900.0, 100.0])
    velocity = model(
        x,
        timestep=t,
        encoder_hidden_states=torch.randn(2, 3, SD35["joint_attention_dim"]),
        pooled_projections=torch.randn(2, SD35["pooled_projection_dim"]),
    ).sample
    torch.testing.assert_close(velocity, model._precondition(t, x)[1] * x)


# Attention in bfloat16 on a CPU


def plain_double(q, k, v):
    """softmax(Q Kᵀ / √d) V, all (B, N, heads, d), in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


def error(got, expected):
    """Root mean square of the difference, relative to what is expected."""
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width"),
    [(1, 1, 1, 1, 8), (3, 37, 53, 3, 20), (2, 65, 65, 5, 64), (5, 17, 40, 1, 12)],
)
# All images at once; two, so that three and five do not divide; one.
@pytest.mark.parametrize("room", [10**9, 2, 0])
def test_attention_in_bfloat16_is_attention(monkeypatch, batch, queries, keys, heads, width, room):
    monkeypatch.setattr(mmdit, "_SCORES", room * queries * keys if room < 10**9 else room)
    shapes = ((batch, queries, heads, width), (batch, keys, heads, width), (batch, keys, heads, width))
    exact = [torch.randn(shape, requires_grad=True) for shape in shapes]
    inputs = [x.detach().clone().requires_grad_() for x in exact]
    with torch.autocast("cpu", torch.bfloat16):
        got = mmdit.attention(*inputs)
    assert got.dtype == torch.bfloat16
    assert got.shape == shapes[0]
    expected = plain_double(*exact)
    assert error(got, expected) < 2**-6  # bfloat16 has eight bits
    weight = torch.randn(shapes[0])
    (got.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, reference in zip(inputs, exact, strict=True):
        # With one key alone, the scores have no gradient at all.
        if reference.grad.norm() > 1e-6:
            assert F.cosine_similarity(ours.grad.flatten(), reference.grad.flatten(), dim=0) > 0.999
            assert ours.grad.norm().item() == pytest.approx(reference.grad.norm().item(), rel=0.02)


def test_attention_in_bfloat16_is_as_exact_as_pytorchs_own():
    q, k, v = (torch.randn(2, 130, 3, 32) for _ in range(3))
    halves = [x.bfloat16() for x in (q, k, v)]
    expected = plain_double(*halves)
    fused = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in halves)).transpose(1, 2)
    assert error(mmdit.attention(*halves), expected) < 2 * error(fused, expected)
    # Above so many queries, it is PyTorch's.
    long = [torch.randn(1, mmdit.PLAIN_ATTENTION + 1, 1, 8).bfloat16() for _ in range(3)]
    fused = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in long)).transpose(1, 2)
    assert torch.equal(mmdit.attention(*long), fused)


def test_attention_in_float32_is_pytorchs_own():
    q, k, v = (torch.randn(2, 30, 3, 16) for _ in range(3))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.equal(mmdit.attention(q, k, v), expected)


def test_training_in_bfloat16_descends_in_the_direction_of_float32():
    model = scrambled(MaskMMDiT(**SD35, mask_channels=MASK_CHANNELS, mask_gate=True))
    expected = {name: gradient.clone() for name, gradient in backward(model, mask_latents=mask_code()).items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = backward(model, mask_latents=mask_code())
    whole = [torch.cat([gradient.flatten() for gradient in which.values()]) for which in (got, expected)]
    assert F.cosine_similarity(*whole, dim=0) > 0.999


# Other classes


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2])
def test_masks_of_renamed_classes_are_embedded_as_before(patch_size):
    classes, factor = 3, 4
    config = {**SD35, "patch_size": patch_size, "sample_size": 8}
    model = scrambled(MaskMMDiT(**config, mask_channels=classes * factor**2))
    before = copy.deepcopy(model)
    masks = torch.randint(0, classes, (2, 32, 32))
    masks[:, :5] = 255  # unlabelled: no class at all

    def code(masks, classes):
        onehot = torch.stack([masks == k for k in range(classes)], dim=1).float()
        return F.pixel_unshuffle(onehot, factor)

    def velocity(model, code):
        return model(**inputs(config, height=8, width=8), mask_latents=code).sample

    expected = velocity(before, code(masks, classes))
    same = copy.deepcopy(model).remap_mask_classes(classes, [0, 1, 2])
    assert torch.equal(velocity(same, code(masks, classes)), expected)

    # New classes: 0 is unknown, 1...3 are the old 2, 0, 1.
    model.remap_mask_classes(classes, [None, 2, 0, 1])
    assert model.config.mask_channels == 4 * factor**2
    new = torch.where(masks == 255, 255, torch.tensor([2, 3, 1])[masks.clamp_max(2)])
    torch.testing.assert_close(velocity(model, code(new, 4)), expected, atol=1e-5, rtol=1e-5)
    nothing = torch.full_like(masks, 255)
    torch.testing.assert_close(
        velocity(model, code(nothing, 4)), velocity(before, code(nothing, 3)), atol=1e-5, rtol=1e-5
    )
    # The embedding of an unknown class is the mean of those of the old ones at the same pixels.
    unknown = torch.where(masks == 255, 255, 0)
    old = [before.mask_embed(code(torch.where(masks == 255, 255, k), 3)) for k in range(3)]
    torch.testing.assert_close(model.mask_embed(code(unknown, 4)), sum(old) / 3, atol=1e-5, rtol=1e-5)


def test_other_classes_train_and_are_saved(tmp_path):
    model = scrambled(MaskMMDiT(**SD35, mask_channels=6)).remap_mask_classes(3, [None, 0])
    assert model.config.mask_channels == 4
    gradients = backward(model, mask_latents=mask_code(channels=4))
    assert gradients["mask_embed.proj.weight"].any()
    model.save_pretrained(tmp_path)
    again = MaskMMDiT.from_pretrained(tmp_path)
    with torch.no_grad():
        given = {**inputs(), "mask_latents": mask_code(channels=4)}
        assert torch.equal(again(**given).sample, model(**given).sample)
