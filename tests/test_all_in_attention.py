import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file

from terrasynth.errors import TerraSynthError
from terrasynth.models.all_in_attention import AllInAttentionBlock, AllInAttentionUNet

PUBLISHED = Path(__file__).parent / "fixtures" / "published_tisynth"
NAMES = {
    "attn00_ls_trainable": "reference_attn",
    "attn01_ssl_trainable": "mask_attn",
    "norm00_trainable": "reference_norm",
    "norm01_trainable": "mask_norm",
}
SIZES = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 24, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
HINTS = {"mask_channels": 5, "hint_channels": (6, 8, 10)}  # a quarter of the image's resolution


def unet(**changes):
    torch.manual_seed(0)
    return AllInAttentionUNet(**(SIZES | HINTS | changes))


def shaken(model):
    """As after some training: no zero-initialised layer hides a fault."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def inputs(batch=2, side=8):
    torch.manual_seed(1)
    given = torch.randn(batch, 4, side, side), torch.tensor([7, 801])[:batch], torch.randn(batch, 5, 12)
    mask = F.one_hot(torch.randint(5, (batch, 4 * side, 4 * side)), 5).movedim(-1, 1).float()
    return given, {"mask": mask, "reference": torch.randn(batch, 4, side, side)}


@pytest.fixture(scope="module")
def model():
    return shaken(unet())


@torch.no_grad()
def test_the_published_block_is_reproduced():
    config = json.loads((PUBLISHED / "config.json").read_text())
    weights, tensors = (load_file(PUBLISHED / f"{name}.safetensors") for name in ("block", "forward"))
    transformer = Transformer2DModel(
        config["heads"], config["head_dim"], config["channels"], cross_attention_dim=config["text_dim"]
    )
    block = AllInAttentionBlock(transformer.transformer_blocks[0], config["feature_dim"], 0)
    transformer.transformer_blocks = torch.nn.ModuleList([block])
    for theirs, ours in NAMES.items():
        weights = {name.replace(theirs, ours): tensor for name, tensor in weights.items()}
    transformer.load_state_dict(weights)
    features = {"reference": [tensors["reference_features"]], "mask": [tensors["mask_features"]]}
    output = transformer(tensors["x"], tensors["text"], cross_attention_kwargs=features, return_dict=False)[0]
    error = (output - tensors["output"]).abs().max()
    print(f"largest difference from the published block: {error:.1e}")
    assert error < 1e-5


def test_the_decoder_asks_for_the_published_feature_maps_in_the_sd15_configuration():
    with torch.device("meta"):
        model = AllInAttentionUNet()
    # Spec of the published decoder: (query, feature) channels of output blocks 3...11 and of the middle block.
    published = [(1280, 1280)] * 2 + [(1280, 640)] + [(640, 640)] * 2 + [(640, 320)] + [(320, 320)] * 3 + [(1280, 1280)]
    for branch in ("mask_attn", "reference_attn"):
        keys = [p.shape for name, p in model.named_parameters() if f"{branch}.to_k" in name]
        assert [tuple(shape) for shape in keys] == published
    # The three maps at an eighth of the latents' resolution are asked for by nobody, and there is no layer for them.
    for encoder in (model.mask_encoder, model.reference_encoder):
        assert [layer.out_channels for layer in encoder.controlnet_down_blocks] == [320] * 4 + [640] * 3 + [1280] * 2
    strides = [layer.stride for layer in model.mask_hint.blocks]
    assert strides == [(1, 1), (2, 2)] * 3
    assert {layer.stride for layer in model.reference_hint.blocks} == {(1, 1)}


@torch.no_grad()
def test_every_transformer_sees_the_features_of_its_own_skip_connection(model):
    """The published decoder's bookkeeping, feature maps popped from the end of a list, written out by hand."""
    given, conditions = inputs()
    sample, timestep, text = given
    taken = {}
    for name, encoder, hint, condition in (
        ("mask", model.mask_encoder, model.mask_hint, conditions["mask"]),
        ("reference", model.reference_encoder, model.reference_hint, conditions["reference"]),
    ):
        taken[name] = model.features(encoder, hint(condition), *given)
    temb = model.time_embedding(model.time_proj(timestep))
    x = model.conv_in(sample)
    skips = [x]
    for block in model.down_blocks:
        for i, resnet in enumerate(block.resnets):
            x = resnet(x, temb)
            if hasattr(block, "attentions"):
                x = block.attentions[i](x, text, return_dict=False)[0]
            skips.append(x)
        if block.downsamplers:
            x = block.downsamplers[0](x)
            skips.append(x)

    def transformer(module, x):
        mask, reference = (taken[name].pop() for name in ("mask", "reference"))
        place = module.transformer_blocks[0].place
        # Wherever the block looks, it finds these.
        found = {"mask": [mask] * (place + 1), "reference": [reference] * (place + 1)}
        return module(x, text, cross_attention_kwargs=found, return_dict=False)[0]

    x = model.mid_block.resnets[0](x, temb)
    x = model.mid_block.resnets[1](transformer(model.mid_block.attentions[0], x), temb)
    for block in model.up_blocks:
        for i, resnet in enumerate(block.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
            if hasattr(block, "attentions"):
                x = transformer(block.attentions[i], x)
        if block.upsamplers:
            x = block.upsamplers[0](x)
    assert skips == taken["mask"] == taken["reference"] == []
    expected = model.conv_out(F.silu(model.conv_norm_out(x)))
    torch.testing.assert_close(model(*given, **conditions).sample, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_features_are_those_of_a_controlnet(model):
    given, conditions = inputs()
    controlnet = ControlNetModel(
        **{name: value for name, value in SIZES.items() if name not in ("sample_size", "up_block_types")},
        conditioning_channels=5,
        conditioning_embedding_out_channels=HINTS["hint_channels"],
    )
    weights = model.mask_encoder.state_dict()
    weights |= {f"controlnet_cond_embedding.{name}": w for name, w in model.mask_hint.state_dict().items()}
    assert controlnet.load_state_dict(weights, strict=False).unexpected_keys == []
    outer, middle = controlnet(*given, conditions["mask"], return_dict=False)
    features = model.features(model.mask_encoder, model.mask_hint(conditions["mask"]), *given)
    assert len(features) == 7
    for ours, theirs in zip(features, [*outer[:6], middle], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@torch.no_grad()
def test_an_extended_base_model_predicts_at_first_what_it_did(model):
    base = shaken(UNet2DConditionModel(**SIZES))
    extended = AllInAttentionUNet.from_unet(base, **HINTS)
    given, conditions = inputs()
    assert torch.equal(extended(*given, **conditions).sample, base(*given).sample)
    for encoder in (extended.mask_encoder, extended.reference_encoder):
        for name, parameter in encoder.named_parameters():
            if not name.startswith("controlnet_"):
                assert torch.equal(parameter, base.get_parameter(name))


@pytest.mark.parametrize("other", [{"use_linear_projection": True}, {"attention_head_dim": [1, 2, 2]}])
def test_a_base_model_of_another_kind_is_refused(other):
    with pytest.raises(TerraSynthError, match=next(iter(other))):
        AllInAttentionUNet.from_unet(UNet2DConditionModel(**SIZES | other), **HINTS)


def test_a_decoder_whose_outer_level_has_no_transformers_is_refused():
    with pytest.raises(TerraSynthError, match="UpBlock2D any number of times, then CrossAttnUpBlock2D"):
        unet(up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))


@pytest.mark.parametrize("timestep_free", [False, True])
def test_every_parameter_gets_a_gradient_as_soon_as_zero_initialised_layers_allow(timestep_free):
    model = unet(timestep_free=timestep_free)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    given, conditions = inputs()
    target = torch.randn(2, 4, 8, 8)
    without = []
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(*given, **conditions).sample, target).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        without.append({name for name, p in trained.items() if p.grad is None or not p.grad.any()})
        optimizer.step()

    first, second, third = without
    branches = {name for name in trained if "mask_" in name or "reference_" in name}
    # At first the feature maps are zero. What gets a gradient: the layers that make them and the output's bias.
    wakes = {name for name in branches if ".controlnet_" in name or "attn.to_out.0.bias" in name}
    assert first == branches - wakes
    # Then everything but the hints' inner layers, which are behind a second zero-initialised one.
    assert second == {name for name in branches if "_hint." in name and ".conv_out." not in name}
    assert third == set()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == (
        {"mask_encoder.conv_in.weight", "reference_encoder.conv_in.weight"} if timestep_free else set()
    )


def test_published_training_keeps_the_base_model():
    model = unet().set_trainable("branches")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(dict(UNet2DConditionModel(**SIZES).named_parameters()))
    assert all(p.requires_grad for p in model.set_trainable("all").parameters())
    with pytest.raises(TerraSynthError, match="all, branches"):
        model.set_trainable("mask")


def test_gradient_checkpointing_changes_no_gradient():
    given, conditions = inputs()
    gradients = []
    for checkpointing in (False, True):
        model = shaken(unet()).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)
        model(*given, **conditions).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_without_timestep_features_depend_on_condition_and_text_only():
    model = shaken(unet(timestep_free=True))
    (sample, timestep, text), conditions = inputs()
    hint = model.mask_hint(conditions["mask"])
    features = model.features(model.mask_encoder, hint, sample, timestep, text)
    again = model.features(model.mask_encoder, hint, sample.flip(0), timestep.flip(0), text)
    other = model.features(model.mask_encoder, hint.flip(0), sample, timestep, text)
    assert all(torch.equal(a, b) for a, b in zip(features, again, strict=True))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(features, other, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("side", [7, 10])
def test_latents_that_halve_to_odd_sides_are_predicted_too(model, side):
    given, conditions = inputs(side=side)
    assert model(*given, **conditions).sample.shape == (2, 4, side, side)


@torch.no_grad()
def test_a_saved_model_predicts_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    given, conditions = inputs()
    loaded = AllInAttentionUNet.from_pretrained(tmp_path)
    assert loaded.config.mask_channels == 5
    assert "time_embedding_type" not in loaded.config
    assert torch.equal(loaded(*given, **conditions).sample, model(*given, **conditions).sample)
