import pytest
import torch
from diffusers import UNet2DConditionModel

from terrasynth.models.guidance_net import GuidanceBlock, GuidanceNet
from terrasynth.models.unet import UNetEncoder, decode, encode

SMALL = {"width": 16, "heads": 2}


def small_unet():
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def loss_of(unet, encoder, net, target):
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 900])
    found = encode(unet, x, t)
    conditions = [encoder(image, torch.ones(2)) for image in target]
    return (decode(unet, found.plus(net(found, conditions))) - target[0]).square().mean()


def test_nothing_is_added_at_first_and_every_parameter_has_a_gradient_in_the_second_step():
    unet = small_unet()
    encoder, net = UNetEncoder.from_unet(unet), GuidanceNet.for_unet(unet, 8, max_grid=8, **SMALL)
    target = torch.randn(2, 2, 4, 8, 8)
    found = encode(unet, target[0], torch.tensor([5, 900]))
    added = net(found, [encoder(image, torch.ones(2)) for image in target])
    assert [skip.shape for skip in added.skips] == [skip.shape for skip in found.skips]
    assert not any(residual.any() for residual in (*added.skips, added.middle))

    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    without = []
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(unet, encoder, net, target).backward()
        without.append([name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()])
        optimizer.step()
    assert any(".attn." in name for name in without[0])
    assert without[1] == []


def test_where_everything_starts_at_zero_the_attention_never_trains():
    """The released initialisation, which is why it is not ours."""
    block = GuidanceBlock(4, 8, 4, 16, 2)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    noisy, condition, target = torch.randn(2, 4, 4, 4), torch.randn(2, 8, 4, 4), torch.randn(2, 4, 4, 4)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        (block(noisy, condition) - target).square().mean().backward()
        optimizer.step()
    assert [name for name, parameter in block.named_parameters() if parameter.any()] == ["conv.weight", "conv.bias"]


def test_the_published_size():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        published, plain = (GuidanceNet.for_unet(unet, 64, max_grid=side) for side in (64, 0))
        default = GuidanceNet()
    assert published.config.channels == default.config.channels
    assert published.config.grids == default.config.grids
    counts = [sum(p.numel() for p in net.parameters()) for net in (published, plain)]
    assert counts == [106_135_680, 34_417_280]


@pytest.mark.parametrize(("max_grid", "with_attention"), [(0, 0), (4, 3), (8, 5)])
def test_attention_is_only_where_the_grid_is_small(max_grid, with_attention):
    net = GuidanceNet.for_unet(small_unet(), 8, max_grid=max_grid, **SMALL)
    assert net.config.grids == (8, 8, 4, 4, 4)
    assert sum(block.attn is not None for block in net.blocks) == with_attention


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (10, 6)])
@pytest.mark.parametrize("conditions", [1, 2])
def test_it_takes_other_sizes_than_it_was_made_for(conditions, size):
    unet = small_unet()
    net = GuidanceNet.for_unet(unet, 8, max_grid=8, conditions=conditions, **SMALL)
    for parameter in net.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    found = encode(unet, torch.randn(1, 4, *size), torch.tensor([5]))
    added = net(found, [found] * conditions)
    assert all(a.shape == b.shape and a.any() for a, b in zip(added.skips, found.skips, strict=True))


@torch.no_grad()
def test_a_place_is_told_apart_by_its_position_alone():
    """With all features alike, what is added differs from place to place, and at another size smoothly so."""
    block = GuidanceBlock(4, 8, 4, 16, 2)
    block.attn.proj.weight.normal_()
    found = block(torch.ones(1, 4, 4, 4), torch.ones(1, 8, 4, 4))
    assert found.flatten(2).std(2).min() > 0.01
    block.attn.positions.copy_(block.attn.positions[:1].expand(16, -1))
    found = block(torch.ones(1, 4, 9, 7), torch.ones(1, 8, 9, 7))
    assert found.flatten(2).std(2).max() < 1e-4


@torch.no_grad()
def test_the_order_of_the_conditions_counts():
    unet = small_unet()
    net = GuidanceNet.for_unet(unet, 8, max_grid=0)
    torch.nn.init.normal_(net.blocks[0].conv.weight)
    image, rough = (encode(unet, torch.randn(1, 4, 8, 8), torch.tensor([1])) for _ in range(2))
    noisy = encode(unet, torch.randn(1, 4, 8, 8), torch.tensor([500]))
    joined = torch.cat([noisy.skips[0], image.skips[0], rough.skips[0]], 1)
    expected = torch.einsum("oc,bchw->bohw", net.blocks[0].conv.weight[:, :, 0, 0], joined)
    torch.testing.assert_close(net(noisy, [image, rough]).skips[0], expected)
    assert not torch.allclose(net(noisy, [rough, image]).skips[0], expected)


@torch.no_grad()
def test_a_saved_one_is_the_same(tmp_path):
    unet = small_unet()
    net = GuidanceNet.for_unet(unet, 8, max_grid=4, **SMALL)
    torch.nn.init.normal_(net.blocks[3].attn.proj.weight)
    net.save_pretrained(tmp_path)
    found = encode(unet, torch.randn(1, 4, 8, 8), torch.tensor([5]))
    loaded = GuidanceNet.from_pretrained(tmp_path)
    assert torch.equal(loaded(found, [found, found]).skips[3], net(found, [found, found]).skips[3])
