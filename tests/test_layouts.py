"""Painting masks with the transformer that paints images under them."""

import math

import pytest
import torch
import torch.nn.functional as F

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.control import CONTROL_SCHEMES
from terrasynth.models.mmdit import MaskMMDiT
from terrasynth.recipe import GeneratorConfig
from terrasynth.sampling.categories import category_loss, category_scores, category_velocity, to_codes, to_points
from terrasynth.systems.todsynth import TODSynthPipeline

SCHEMA = LabelSchema(("land", "road", "water"), ((200, 150, 90), (90, 90, 90), (20, 60, 160)))
CAPTION = "a satellite image of {classes}"
SIZES = {
    "sample_size": 8,
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
    "mask_channels": 6,
}


def scrambled(model):
    """As after some training: no zero-initialised layer hides a fault."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def given(batch=2, side=8):
    return {
        "hidden_states": torch.randn(batch, 4, side, side),
        "timestep": torch.rand(batch) * 1000,
        "encoder_hidden_states": torch.randn(batch, 7, 12),
        "pooled_projections": torch.randn(batch, 10),
        "mask_latents": torch.randn(batch, 6, side, side),
    }


# The network


@torch.no_grad()
def test_the_packaged_model_that_learned_layouts_is_to_the_bit_the_same_under_given_masks():
    before, after = (TODSynthPipeline.from_pretrained("terrasynth-tiny") for _ in range(2))
    assert not before.paints_layouts
    assert after.add_layouts().paints_layouts
    new = {*after.transformer.state_dict()} - {*before.transformer.state_dict()}
    assert new == {"mask_time.0.weight", "mask_time.2.weight", "mask_out.weight", "mask_out.bias"}
    # Whatever they become in training.
    for name in new:
        after.transformer.get_parameter(name).add_(torch.randn(()))
    embeds, pooled = before.encode_prompts(["a rendered image of field, water", "road"])
    inputs = {
        "hidden_states": torch.randn(2, 32, 16, 16),
        "timestep": torch.tensor([80.0, 900.0]),
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "mask_latents": before.encode_masks(torch.randint(0, 14, (2, 128, 128))),
    }
    expected = before.transformer(**inputs).sample
    assert torch.equal(after.transformer(**inputs).sample, expected)
    assert torch.equal(after.transformer(**inputs, mask_sigma=torch.zeros(2)).sample, expected)
    half_noised = after.transformer(**inputs, mask_sigma=torch.tensor([0.0, 0.5])).sample
    assert torch.equal(half_noised[0], expected[0])
    assert not torch.allclose(half_noised[1], expected[1])


@pytest.mark.parametrize("scheme", ["unified", "siamese"])
@torch.no_grad()
def test_an_untrained_readout_says_nothing_and_a_trained_one_hears_mask_noise_level_and_prompt(scheme):
    model, inputs, sigma = CONTROL_SCHEMES[scheme](**SIZES).add_layouts(), given(), torch.tensor([0.3, 0.9])
    assert not model(**inputs, mask_sigma=sigma).layout.any()
    assert model(**inputs).layout is None
    scrambled(model)
    layout = model(**inputs, mask_sigma=sigma).layout
    assert layout.shape == inputs["mask_latents"].shape
    changes = [
        {"mask_latents": inputs["mask_latents"].flip(-1)},
        {"mask_sigma": sigma / 2},
        {"hidden_states": inputs["hidden_states"].flip(-1)},
        {"pooled_projections": torch.randn(2, 10)},
    ]
    for change in changes:
        other = model(**{**inputs, "mask_sigma": sigma, **change}).layout
        assert ((other - layout).abs().amax((1, 2, 3)) > 1e-3).all(), change.keys()


@torch.no_grad()
def test_a_token_is_read_out_where_it_lies_class_by_class():
    model = scrambled(MaskMMDiT(**SIZES).add_layouts())
    inputs, seen = given(), []
    model.mask_out.register_forward_hook(lambda module, arguments, result: seen.append(result))
    layout = model(**inputs, mask_sigma=torch.tensor([0.3, 0.9])).layout
    for row in range(4):
        for column in range(4):
            token = seen[0][:, 4 * row + column].view(2, 6, 2, 2)
            assert torch.equal(layout[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2], token)


@pytest.mark.parametrize("which", ["all", "mask"])
def test_every_new_parameter_has_a_gradient_by_the_second_step(which):
    model = MaskMMDiT(**SIZES).add_layouts().set_trainable(which)
    new = [parameter for name, parameter in model.named_parameters() if name.startswith(("mask_time", "mask_out"))]
    optimizer = torch.optim.SGD(new, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layout = model(**given(), mask_sigma=torch.tensor([0.3, 0.9])).layout
        F.mse_loss(layout, torch.randn_like(layout)).backward()
        optimizer.step()
    assert len(new) == 4
    for parameter in new:
        assert parameter.grad.flatten(1).abs().amax(1).min() > 0 if parameter.ndim > 1 else parameter.grad.all()


@pytest.mark.parametrize(("scheme", "blocks"), [("adapter", 3), ("controlnet", 3), ("unified", 1)])
def test_a_mask_that_no_block_updates_can_not_be_painted(scheme, blocks):
    with pytest.raises(TerraSynthError, match="can not learn to paint layouts"):
        CONTROL_SCHEMES[scheme](**{**SIZES, "num_layers": blocks}).add_layouts()


def test_noise_on_the_mask_of_a_model_without_layouts_is_refused():
    with pytest.raises(TerraSynthError, match="can not denoise masks"):
        MaskMMDiT(**SIZES)(**given(), mask_sigma=torch.zeros(2))
