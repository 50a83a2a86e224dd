import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from terrasynth.errors import TerraSynthError
from terrasynth.models.convert_idgbr import load_published_codes, load_published_guidance
from terrasynth.models.guidance_net import GuidanceNet

PUBLISHED = Path(__file__).parent / "fixtures" / "published_idgbr"
#: Published names, written by hand from the layout, of C channels, r² positions and width W.
LAYOUT = {
    "conv.weight": "C,3C,1,1",
    "conv.bias": "C",
    "attn.positional_embedding": "R,W",
    "attn.conv1_q.weight": "W,C,1,1",
    "attn.conv1_k.weight": "W,2C,1,1",
    "attn.proj.weight": "C,W,1,1",
    "attn.transformer.resblocks.0.attn.in_proj_weight": "3W,W",
    "attn.transformer.resblocks.0.attn.in_proj_bias": "3W",
    "attn.transformer.resblocks.0.attn.out_proj.weight": "W,W",
    "attn.transformer.resblocks.0.attn.out_proj.bias": "W",
    "attn.transformer.resblocks.0.mlp.c_fc.weight": "4W,W",
    "attn.transformer.resblocks.0.mlp.c_fc.bias": "4W",
    "attn.transformer.resblocks.0.mlp.c_proj.weight": "W,4W",
    "attn.transformer.resblocks.0.mlp.c_proj.bias": "W",
}
for norm in ("ln_pre_q", "ln_pre_k", "ln_post", *(f"transformer.resblocks.0.ln_{i}" for i in ("1q", "1k", "1v", "2"))):
    LAYOUT |= {f"attn.{norm}.weight": "W", f"attn.{norm}.bias": "W"}


def published(channels=(8, 8, 12, 12), grids=(6, 6, 3, 3), width=16):
    """A random checkpoint in the published layout; the last of the blocks is the middle's."""
    torch.manual_seed(0)
    state = {}
    for i, (c, r) in enumerate(zip(channels, grids, strict=True)):
        prefix = "attn_blocks_mid." if i == len(channels) - 1 else f"attn_blocks_down.{i}."
        sizes = {"C": c, "R": r * r, "W": width}
        for name, shape in LAYOUT.items():
            parts = [part if part[-1] in sizes else f"{part}C" for part in shape.replace("1,1", "").split(",") if part]
            sides = [int(part[:-1] or 1) * sizes[part[-1]] for part in parts]
            state[prefix + name] = torch.randn(*sides, *([1, 1] if shape.endswith("1,1") else []))
    return state


@pytest.fixture(scope="module")
def checkpoint():
    return published()


@torch.no_grad()
@pytest.mark.parametrize("size", ["", "_other_size"])
def test_the_published_block_is_reproduced(size):
    weights, numbers = (load_file(PUBLISHED / f"{name}.safetensors") for name in ("block_fp16", "forward"))
    config = json.loads((PUBLISHED / "config.json").read_text())
    model = load_published_guidance(
        {f"attn_blocks_{place}.{name}": tensor for place in ("down.0", "mid") for name, tensor in weights.items()}
    )
    assert model.config.channels == (config["channels"],) * 2
    assert (model.config.width, model.config.heads) == (config["width"], config["heads"])
    noise, image, rough = (numbers[f"{name}_features{size}"] for name in ("noise", "image", "rough"))
    found = model.blocks[0](noise, torch.cat([image, rough], 1))
    worst = (found - numbers[f"output{size}"]).abs().max().item()
    print(f"largest difference {worst:.1e} of numbers up to {numbers[f'output{size}'].abs().max():.1f}")
    assert worst < 1e-4


def test_every_tensor_has_its_place(checkpoint):
    model = load_published_guidance(checkpoint)
    assert model.config.channels == (8, 8, 12, 12)
    assert model.config.grids == (6, 6, 3, 3)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == sum(map(torch.numel, checkpoint.values()))
    for ours, theirs in (
        ("blocks.2.conv.weight", "attn_blocks_down.2.conv.weight"),
        ("blocks.3.attn.positions", "attn_blocks_mid.attn.positional_embedding"),
        ("blocks.0.attn.attn_norm_value.bias", "attn_blocks_down.0.attn.transformer.resblocks.0.ln_1v.bias"),
        ("blocks.0.attn.norm_key.weight", "attn_blocks_down.0.attn.ln_pre_k.weight"),
    ):
        assert torch.equal(model.state_dict()[ours], checkpoint[theirs])


def test_the_published_layout_has_364_tensors():
    with torch.device("meta"):
        assert len(GuidanceNet(max_grid=64).state_dict()) == 13 * len(LAYOUT) == 364


@torch.no_grad()
def test_attention_that_is_zero_is_left_out_and_changes_nothing(checkpoint):
    dead = {name: tensor.clone().mul_(".attn." not in name) for name, tensor in checkpoint.items()}
    model, plain = load_published_guidance(checkpoint), load_published_guidance(dead)
    assert all(block.attn is None for block in plain.blocks)
    for block in model.blocks:
        for parameter in block.attn.parameters():
            torch.nn.init.zeros_(parameter)
    noisy, condition = torch.randn(1, 8, 6, 6), torch.randn(1, 16, 6, 6)
    assert torch.equal(plain.blocks[1](noisy, condition), model.blocks[1](noisy, condition))
    one = dead | {"attn_blocks_mid.attn.ln_post.bias": torch.ones(16)}
    assert load_published_guidance(one).blocks[0].attn is not None


def test_a_folder_is_read_like_a_state_dict(checkpoint, tmp_path):
    save_file(checkpoint, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = [load_published_guidance(source) for source in (tmp_path, checkpoint)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in loaded), strict=True))


def test_missing_foreign_and_resized_tensors_are_named(checkpoint):
    name = "attn_blocks_down.1.attn.ln_post.bias"
    with pytest.raises(TerraSynthError, match=r"missing tensors[\s\S]*blocks\.1\.attn\.norm_out\.bias"):
        load_published_guidance({k: t for k, t in checkpoint.items() if k != name})
    with pytest.raises(TerraSynthError, match=r"foreign[\s\S]*attn_blocks_down\.0\.extra"):
        load_published_guidance(checkpoint | {"attn_blocks_down.0.extra": torch.zeros(1)})
    with pytest.raises(TerraSynthError, match=r"norm_out\.bias \(3,\) -> \(16,\)"):
        load_published_guidance(checkpoint | {name: torch.zeros(3)})


def test_another_layout_is_refused(checkpoint):
    without_middle = {name: tensor for name, tensor in checkpoint.items() if "mid" not in name}
    for other in (without_middle, {"conv_in.weight": torch.zeros(1)}):
        with pytest.raises(TerraSynthError, match="published IDGBR layout"):
            load_published_guidance(other)


def test_the_published_codes_are_points_between_minus_one_and_one(tmp_path):
    table = torch.randn(8, 3)
    save_file({"embedding_table.weight": table, "embedding_conv.0.bias": torch.zeros(128)}, tmp_path / "x.safetensors")
    codes = load_published_codes(tmp_path / "x.safetensors")
    torch.testing.assert_close(codes.table.double(), 2 / (1 + torch.exp(-table.double())) - 1, atol=1e-6, rtol=0)
    assert torch.equal(codes.decode(codes.encode(torch.arange(8).view(1, 2, 4))), torch.arange(8).byte().view(1, 2, 4))
    with pytest.raises(TerraSynthError, match="no label codes"):
        load_published_codes({"embedding_conv.0.bias": torch.zeros(128)})
