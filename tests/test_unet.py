import pytest
import torch
from diffusers import UNet2DConditionModel

from terrasynth.errors import TerraSynthError
from terrasynth.models.unet import Features, UNetEncoder, check_halves, decode, encode

SMALL = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4}


def with_text(**changes):
    return UNet2DConditionModel(
        **SMALL,
        block_out_channels=(8, 16, 16),
        cross_attention_dim=6,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **changes,
    ).eval()


def without_text():
    return UNet2DConditionModel(
        **SMALL,
        block_out_channels=(8, 16),
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


UNETS = pytest.mark.parametrize("unet", [with_text(), without_text()], ids=["with text", "without text"])


def inputs(unet, size=(8, 8)):
    text = torch.randn(2, 5, 6) if unet.config.cross_attention_dim == 6 else None
    return torch.randn(2, 4, *size), torch.tensor([3, 700]), text


@torch.no_grad()
@UNETS
@pytest.mark.parametrize("size", [(8, 8), (9, 14)])
def test_the_halves_are_the_whole(unet, size):
    sample, timestep, text = inputs(unet, size)
    expected = unet(sample, timestep, text).sample
    assert torch.equal(decode(unet, encode(unet, sample, timestep, text), text), expected)


@torch.no_grad()
@UNETS
def test_residuals_are_added_as_a_controlnets_are(unet):
    sample, timestep, text = inputs(unet)
    found = encode(unet, sample, timestep, text)
    residuals = Features(tuple(torch.randn_like(skip) for skip in found.skips), torch.randn_like(found.middle))
    expected = unet(
        sample,
        timestep,
        text,
        down_block_additional_residuals=residuals.skips,
        mid_block_additional_residual=residuals.middle,
    ).sample
    assert torch.equal(decode(unet, found.plus(residuals), text), expected)
    first = decode(unet, found.plus(residuals.times(torch.tensor([1.0, 0.0]))), text)
    torch.testing.assert_close(first[0], expected[0])
    torch.testing.assert_close(first[1], unet(sample, timestep, text).sample[1])


@torch.no_grad()
@UNETS
def test_an_encoder_is_the_half_of_its_unet(unet, tmp_path):
    encoder = UNetEncoder.from_unet(unet)
    given = inputs(unet)
    for found, expected in zip(encoder(*given).skips, encode(unet, *given).skips, strict=True):
        assert torch.equal(found, expected)
    decoder = {name for name in unet.state_dict() if name.startswith(("up_blocks", "conv_norm_out", "conv_out"))}
    assert set(encoder.state_dict()) == set(unet.state_dict()) - decoder
    assert decoder
    encoder.save_pretrained(tmp_path)
    loaded = UNetEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(*given).middle, encode(unet, *given).middle)


@torch.no_grad()
def test_a_wider_encoder_at_first_sees_what_the_unet_does():
    unet = with_text()
    encoder = UNetEncoder.from_unet(unet, in_channels=7)
    sample, timestep, text = inputs(unet)
    found = encoder(torch.cat([sample, torch.randn(2, 3, 8, 8)], 1), timestep, text)
    torch.testing.assert_close(found.middle, encode(unet, sample, timestep, text).middle)
    assert encoder.config.in_channels == encoder.conv_in.in_channels == 7


def test_a_unet_that_is_told_more_is_refused():
    check_halves(with_text())
    with pytest.raises(TerraSynthError, match="addition_embed_type: text"):
        check_halves(with_text(addition_embed_type="text", addition_embed_type_num_heads=2))
