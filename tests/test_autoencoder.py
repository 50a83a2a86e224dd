import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from terrasynth.models.autoencoder import PatchPCA, spatial_factor


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    coarse = torch.randn(8, 3, 8, 8)
    fine = torch.randn(8, 3, 32, 32)
    return (torch.nn.functional.interpolate(coarse, 32, mode="bilinear") + 0.2 * fine).clamp(-1, 1)


def test_all_components_reconstruct_exactly(images):
    vae = PatchPCA(patch_size=4, latent_channels=48).fit(images)
    restored = vae.decode(vae.encode(images).latent_dist.mode()).sample
    torch.testing.assert_close(restored, images, atol=1e-4, rtol=0)


def test_reconstruction_error_is_the_discarded_variance_as_numpys_svd_gives_it(images):
    vae = PatchPCA(patch_size=4, latent_channels=10).fit(images)
    restored = vae.decode(vae.encode(images).latent_dist.mode()).sample
    error = ((restored - images) ** 2).sum().item()
    patches = images.reshape(8, 3, 8, 4, 8, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 48).double().numpy()
    singular = np.linalg.svd(patches - patches.mean(0), compute_uv=False)
    assert error == pytest.approx((singular[10:] ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_latents_are_centred_with_unit_mean_variance_and_the_wanted_spread(images, whiten):
    vae = PatchPCA(4, 16, whiten=whiten).fit(images)
    z = vae.encode(images).latent_dist.mode().movedim(1, -1).flatten(0, -2)
    variance = z.var(0, correction=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    assert variance.mean().item() == pytest.approx(1, rel=1e-3)
    plain = PatchPCA(4, 16, whiten=0.0).fit(images)
    reference = plain.encode(images).latent_dist.mode().var((0, 2, 3), correction=0) ** (1 - whiten)
    torch.testing.assert_close(variance / variance[0], reference / reference[0], atol=1e-3, rtol=1e-3)


def test_saved_and_loaded_it_encodes_alike(images, tmp_path):
    vae = PatchPCA(4, 16).fit(images)
    vae.save_pretrained(tmp_path)
    again = PatchPCA.from_pretrained(tmp_path)
    assert torch.equal(vae.encode(images).latent_dist.mode(), again.encode(images).latent_dist.mode())
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()


def test_spatial_factor_is_what_encoding_does():
    kl = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    )
    for vae in (kl, PatchPCA(4, 4)):
        latents = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode()
        assert 32 // latents.shape[-1] == spatial_factor(vae)


# Refiner


def corrected(**changes):
    return PatchPCA(**{"patch_size": 4, "latent_channels": 12, "refiner_width": 8, "refiner_blocks": 2, **changes})


def scramble(vae):
    """Random values in the correction's zeros, as after some training."""
    with torch.no_grad():
        for parameter in vae.refiner.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vae


@pytest.mark.parametrize("blocks", [0, 2])
def test_an_untrained_correction_changes_no_bit(images, blocks):
    plain, vae = PatchPCA(4, 12).fit(images), corrected(refiner_blocks=blocks).fit(images)
    z = plain.encode(images).latent_dist.mode()
    assert torch.equal(vae.encode(images).latent_dist.mode(), z)
    z = z + 0.3 * torch.randn_like(z)
    assert torch.equal(vae.decode(z).sample, plain.decode(z).sample)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.decode(z).sample, plain.decode(z).sample)


def test_the_correction_adds_what_its_convolutions_say(images):
    plain, vae = PatchPCA(4, 12).fit(images), scramble(corrected().fit(images))
    z = plain.encode(images).latent_dist.mode()
    first, one, two, _, last = vae.refiner

    def conv(layer, x):  # as one matrix product with every pixel's 3 x 3 neighbours
        columns = torch.nn.functional.unfold(x, 3, padding=1)
        return (layer.weight.flatten(1) @ columns + layer.bias[:, None]).unflatten(-1, x.shape[-2:])

    def silu(x):
        return x / (1 + torch.exp(-x))

    x = conv(first, z)
    for block in (one, two):
        x = x + conv(block.conv2, silu(conv(block.conv1, silu(x))))
    correction = conv(last, silu(x))  # (B, 3 p^2, h, w): colour, row and column within the patch
    correction = correction.unflatten(1, (3, 4, 4)).permute(0, 1, 4, 2, 5, 3).reshape(images.shape)
    torch.testing.assert_close(vae.decode(z).sample, plain.decode(z).sample + correction, atol=1e-5, rtol=1e-4)


def test_a_corrected_decoding_is_differentiable_in_the_latents(images):
    vae = scramble(corrected(latent_channels=6).fit(images)).double()
    z = torch.randn(1, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z: vae.decode(z).sample, z)


def test_saved_and_loaded_with_its_correction_it_decodes_alike(images, tmp_path):
    vae = scramble(corrected().fit(images))
    vae.save_pretrained(tmp_path)
    again = PatchPCA.from_pretrained(tmp_path)
    z = torch.randn(2, 12, 8, 8)
    assert torch.equal(vae.decode(z).sample, again.decode(z).sample)
    assert not torch.equal(vae.decode(z).sample, PatchPCA(4, 12).fit(images).decode(z).sample)
