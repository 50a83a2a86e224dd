from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from terrasynth.errors import TerraSynthError
from terrasynth.models.convert import load_published

PUBLISHED = Path(__file__).parent / "fixtures" / "published_crfm"
FROZEN = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added", "_context", "time_text", "context_emb")


@pytest.fixture(scope="module")
def config():
    return json.loads((PUBLISHED / "transformer_config.json").read_text())


@pytest.fixture(scope="module")
def weights():
    return load_file(PUBLISHED / "transformer.safetensors")


@pytest.fixture(scope="module")
def forward():
    tensors = load_file(PUBLISHED / "forward.safetensors")
    names = {
        "hidden_states": "latents",
        "timestep": "timestep",
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
    }
    return tensors, {ours: tensors[theirs] for ours, theirs in names.items()}


@torch.no_grad()
def test_the_published_velocity_is_reproduced_with_and_without_mask(config, forward):
    tensors, given = forward
    model = load_published(PUBLISHED / "transformer.safetensors", config)
    with_mask = model(**given, mask_latents=tensors["mask_latents"]).sample
    assert torch.allclose(with_mask, tensors["velocity"], rtol=0, atol=1e-5)
    assert torch.allclose(model(**given).sample, tensors["velocity_without_mask"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_checkpoint_of_the_trained_tensors_takes_the_text_branch_from_the_base_model(
    config, weights, forward, tmp_path
):
    tensors, given = forward
    base = SD3Transformer2DModel(**config)
    text = {
        name.replace("sd3_transformer.", "").replace("mmdit_blocks", "transformer_blocks").replace(".sd3_", "."): value
        for name, value in weights.items()
        if any(part in name for part in FROZEN)
    }
    text = {name.replace(".attn.attn.", ".attn.").replace(".block.", "."): value for name, value in text.items()}
    assert base.load_state_dict(text, strict=False).unexpected_keys == []
    trained = {
        name: value
        for name, value in weights.items()
        if not any(part in name for part in FROZEN) and not name.endswith(".pos_embed")
    }
    folder = tmp_path / "checkpoint-4000"
    folder.mkdir()
    save_file(trained, folder / "model.safetensors")
    model = load_published(folder, base)
    with_mask = model(**given, mask_latents=tensors["mask_latents"]).sample
    assert torch.allclose(with_mask, tensors["velocity"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_own_modulation_takes_the_rows_that_the_published_code_ignores(config, weights, forward):
    tensors, given = forward
    own = load_published(weights, config, mask_mlp_modulation="own")
    borrowed = load_published(weights, config)
    published = weights["mmdit_blocks.1.norm1.linear.weight"]
    assert torch.equal(own.transformer_blocks[1].mask.modulation.weight, published)
    assert torch.equal(borrowed.transformer_blocks[1].mask.modulation.weight, published[: 3 * 64])
    velocity = own(**given, mask_latents=tensors["mask_latents"]).sample
    assert not torch.allclose(velocity, tensors["velocity"], atol=1e-4)
    # The mask's feed-forward aside, nothing changes: without mask the two agree.
    assert torch.equal(own(**given).sample, borrowed(**given).sample)


def test_missing_tensors_are_named(config, weights):
    lacking = {name: value for name, value in weights.items() if name != "mmdit_blocks.2.attn.to_k.bias"}
    with pytest.raises(TerraSynthError, match=r"missing tensors[\s\S]*transformer_blocks\.2\.mask\.to_k\.bias"):
        load_published(lacking, config)


def test_a_partial_checkpoint_needs_the_base_model_not_its_configuration(config, weights):
    lacking = {name: value for name, value in weights.items() if "time_text_embed" not in name}
    with pytest.raises(TerraSynthError, match="base model"):
        load_published(lacking, config)


def test_foreign_tensors_are_named(config, weights):
    foreign = {**weights, "mmdit_blocks.1.attn.extra.weight": torch.zeros(1), "module.x": torch.zeros(1)}
    with pytest.raises(TerraSynthError, match=r"foreign[\s\S]*mmdit_blocks\.1\.attn\.extra\.weight, module\.x"):
        load_published(foreign, config)


def test_tensors_of_another_size_are_named_with_both_sizes(config, weights):
    with pytest.raises(TerraSynthError, match=r"proj_out\.weight \(16, 64\) -> \(8, 64\)"):
        load_published(weights, {**config, "out_channels": 2})


def test_a_checkpoint_of_another_depth_is_refused(config, weights):
    with pytest.raises(TerraSynthError, match="foreign"):
        load_published(weights, {**config, "num_layers": 3})


def test_another_layout_is_refused(config):
    with pytest.raises(TerraSynthError, match=r"msk_pos_embed\.proj\.weight"):
        load_published(SD3Transformer2DModel(**config).state_dict(), config)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickled_checkpoints_are_refused(tmp_path, config, suffix):
    torch.save({}, tmp_path / f"model{suffix}")
    with pytest.raises(TerraSynthError, match="safetensors"):
        load_published(tmp_path / f"model{suffix}", config)


def test_a_missing_or_damaged_file_is_refused(tmp_path, config):
    with pytest.raises(TerraSynthError, match="no such file"):
        load_published(tmp_path, config)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(TerraSynthError, match="damaged"):
        load_published(tmp_path, config)
