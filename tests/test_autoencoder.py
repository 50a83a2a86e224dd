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
