import re

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint, convert_ldm_unet_checkpoint
from safetensors.torch import save_file

from terrasynth.errors import TerraSynthError
from terrasynth.models.all_in_attention import AllInAttentionUNet
from terrasynth.models.convert_ldm import load_published_tisynth

NEW = {
    "reference_attn": "attn00_ls_trainable",
    "reference_norm": "norm00_trainable",
    "mask_attn": "attn01_ssl_trainable",
    "mask_norm": "norm01_trainable",
}
CONFIG = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 24, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
PER_LEVEL = CONFIG["layers_per_block"] + 1


def published_name(name):
    """Latent diffusion's name of a tensor of ours: the way back, written by hand from its code's layout."""
    if match := re.match(r"(mask|reference)_(hint|encoder)\.(.+)", name):
        prefix = {"mask": "control_model.", "reference": "ssl_stage_model."}[match[1]]
        rest = match[3]
        if match[2] == "hint":
            layer, parameter = rest.rsplit(".", 1)
            index = {"conv_in": 0, "conv_out": 14}.get(layer) if "blocks" not in layer else 2 * int(layer[7:]) + 2
            return f"{prefix}input_hint_block.{index}.{parameter}"
    else:
        prefix, rest = "model.diffusion_model.", name
    for ours, theirs in NEW.items():
        rest = rest.replace(ours, theirs)
    for ours, theirs in (
        ("controlnet_mid_block", "middle_block_out.0"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("conv_in", "input_blocks.0.0"),
        ("mid_block.resnets.0", "middle_block.0"),
        ("mid_block.resnets.1", "middle_block.2"),
        ("mid_block.attentions.0", "middle_block.1"),
    ):
        rest = re.sub(rf"^{re.escape(ours)}\.", f"{theirs}.", rest)
    rest = re.sub(r"controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", rest)
    if match := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", rest):
        way, level, kind, layer, tail = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            rest = f"input_blocks.{1 + PER_LEVEL * level + 2}.0.op.{tail.removeprefix('conv.')}"
        elif kind == "upsamplers":
            rest = f"output_blocks.{PER_LEVEL * level + 2}.{1 if level == 0 else 2}.{tail}"
        else:
            start = f"input_blocks.{1 + PER_LEVEL * level + layer}" if way == "down" else ""
            start = start or f"output_blocks.{PER_LEVEL * level + layer}"
            rest = f"{start}.{0 if kind == 'resnets' else 1}.{tail}"
    for ours, theirs in (
        (".norm1.", ".in_layers.0."),
        (".conv1.", ".in_layers.2."),
        (".time_emb_proj.", ".emb_layers.1."),
        (".norm2.", ".out_layers.0."),
        (".conv2.", ".out_layers.3."),
        (".conv_shortcut.", ".skip_connection."),
    ):
        if "transformer_blocks" not in rest:
            rest = rest.replace(ours, theirs)
    return prefix + rest


def published(**config):
    """A random checkpoint in the published layout, with all that is in the file beside the network."""
    torch.manual_seed(0)
    model = AllInAttentionUNet(**config)
    state = {published_name(name): torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    for encoder in ("control_model", "ssl_stage_model"):
        for place in range(len(model.mask_encoder.controlnet_down_blocks), PER_LEVEL * len(model.down_blocks)):
            width = model.config.block_out_channels[(place - 1) // PER_LEVEL]
            state[f"{encoder}.zero_convs.{place}.0.weight"] = torch.randn(width, width, 1, 1)
            state[f"{encoder}.zero_convs.{place}.0.bias"] = torch.randn(width)
    apart = ("betas", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "posterior_mean_coef1", "logvar")
    apart += ("first_stage_model.decoder.conv_in.weight", "cond_stage_model.transformer.text_model.x", "lvlb_weights")
    # Among them every buffer that latent diffusion registers for its schedule.
    apart += ("alphas_cumprod", "sqrt_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped")
    apart += ("alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "sqrt_recip_alphas_cumprod")
    return state | {name: torch.zeros(1) for name in apart}


@pytest.fixture(scope="module")
def checkpoint():
    return published(**CONFIG)


def stripped(state, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def test_the_unet_is_converted_as_diffusers_does(checkpoint):
    expected = convert_ldm_unet_checkpoint(checkpoint, CONFIG)
    for ours, theirs in NEW.items():
        expected = {name.replace(theirs, ours): tensor for name, tensor in expected.items()}
    model = load_published_tisynth(checkpoint, CONFIG).state_dict()
    decoder = {name: t for name, t in model.items() if not name.startswith(("mask_", "reference_"))}
    assert decoder.keys() == expected.keys()
    assert set(UNet2DConditionModel(**CONFIG).state_dict()) < expected.keys()
    assert all(torch.equal(decoder[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("branch", "theirs"), [("mask", "control_model."), ("reference", "ssl_stage_model.")])
def test_the_encoders_are_converted_as_diffusers_does(checkpoint, branch, theirs):
    expected = convert_controlnet_checkpoint(stripped(checkpoint, theirs), CONFIG)
    model = load_published_tisynth(checkpoint, CONFIG)
    hint = stripped(model.state_dict(), f"{branch}_hint.")
    ours = stripped(model.state_dict(), f"{branch}_encoder.")
    ours |= {f"controlnet_cond_embedding.{name}": tensor for name, tensor in hint.items()}
    # At the innermost level, three zero convolutions whose output the published decoder throws away.
    unused = {f"controlnet_down_blocks.{i}.{kind}" for i in (6, 7, 8) for kind in ("weight", "bias")}
    assert ours.keys() == expected.keys() - unused
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    channels = {"conditioning_channels": 3 if branch == "mask" else 4}
    sizes = {name: value for name, value in CONFIG.items() if name not in ("sample_size", "up_block_types")}
    ControlNetModel(**sizes, **channels).load_state_dict(expected)


def test_a_published_checkpoint_has_as_many_tensors_as_sd15_two_controlnets_and_the_new_attentions():
    with torch.device("meta"):
        names = [published_name(name) for name in AllInAttentionUNet().state_dict()]
    counts = [sum(name.startswith(prefix) for name in names) for prefix in ("model.", "control_", "ssl_stage_")]
    new = sum("trainable" in name for name in names)
    # 686 tensors in Stable Diffusion 1.5's U-Net and 340 in its ControlNets, less three unused zero convolutions.
    assert counts == [686 + new, 334, 334]
    assert new == 10 * 2 * (5 + 2)
    for name in (
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn00_ls_trainable.to_q.weight",
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm01_trainable.bias",
        "control_model.input_hint_block.14.weight",
        "ssl_stage_model.zero_convs.8.0.weight",
    ):
        assert name in names


def test_a_file_is_read_like_a_state_dict(checkpoint, tmp_path):
    save_file(checkpoint, tmp_path / "model.safetensors")
    loaded = [load_published_tisynth(source, CONFIG) for source in (tmp_path, checkpoint)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in loaded), strict=True))


@pytest.mark.parametrize(
    "name", ["output_blocks.4.1.transformer_blocks.0.attn01_ssl_trainable.to_k.weight", "out.2.bias"]
)
def test_missing_tensors_are_named(checkpoint, name):
    lacking = {k: t for k, t in checkpoint.items() if k != f"model.diffusion_model.{name}"}
    with pytest.raises(TerraSynthError, match=r"missing tensors[\s\S]*(mask_attn\.to_k\.weight|conv_out\.bias)"):
        load_published_tisynth(lacking, CONFIG)


@pytest.mark.parametrize(
    "name", ["control_model.zero_convs.9.0.weight", "model.diffusion_model.output_blocks.4.1.extra.weight", "module.x"]
)
def test_foreign_tensors_are_named(checkpoint, name):
    with pytest.raises(TerraSynthError, match=rf"foreign[\s\S]*{re.escape(name)}"):
        load_published_tisynth(checkpoint | {name: torch.zeros(1)}, CONFIG)


def test_tensors_of_another_size_are_named_with_both_sizes(checkpoint):
    with pytest.raises(TerraSynthError, match=r"attn2\.to_k\.weight \(\d+, 12\) -> \(\d+, 16\)"):
        load_published_tisynth(checkpoint, CONFIG | {"cross_attention_dim": 16})


def test_another_layout_is_refused(checkpoint):
    controlnet = {name: t for name, t in checkpoint.items() if not name.startswith("ssl_stage_model.")}
    with pytest.raises(TerraSynthError, match=r"ssl_stage_model"):
        load_published_tisynth(controlnet, CONFIG)


def test_the_released_pickle_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "GID_model.ckpt")
    with pytest.raises(TerraSynthError, match="only safetensors"):
        load_published_tisynth(tmp_path / "GID_model.ckpt")
