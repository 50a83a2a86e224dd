"""The correction's training: what it lowers, what it leaves alone, and that an interruption does not show."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from terrasynth.data.folder import Tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.autoencoder import PatchPCA
from terrasynth.recipe import AutoencoderConfig
from terrasynth.systems.autoencode import _Crops, fit_correction

SCHEMA = LabelSchema(("x", "y"), ((1, 1, 1), (2, 2, 2)))
BUFFERS = ("mean", "components", "scale", "std")


def made_tiles(seed: int, count: int = 6, size: int = 48) -> Tiles:
    """Smooth shades with sharp edges between them."""
    generator = torch.Generator().manual_seed(seed)
    shades = F.interpolate(torch.rand(count, 3, 5, 5, generator=generator), size, mode="bilinear")
    regions = F.interpolate(torch.rand(count, 3, 7, 7, generator=generator), size, mode="bilinear") > 0.5
    images = (255 * (0.5 * shades + 0.5 * regions)).byte()
    return Tiles(tuple(map(str, range(count))), images, torch.zeros(count, size, size, dtype=torch.uint8), SCHEMA)


def config(**train) -> AutoencoderConfig:
    return AutoencoderConfig.model_validate(
        {
            "patch_size": 4,
            "channels": 8,
            "refiner_width": 12,
            "refiner_blocks": 1,
            "refiner_noise": 0.5,
            "train": {"steps": 8, "batch_size": 4, "warmup_steps": 2, "checkpoint_every": 3, **train},
        }
    )


def fitted(tiles: Tiles) -> PatchPCA:
    torch.manual_seed(0)
    return PatchPCA(4, 8, refiner_width=12, refiner_blocks=1).fit(tiles.images.float() / 127.5 - 1)


def test_the_correction_decodes_noisy_latents_better_than_the_components_do_and_leaves_them_as_they_are(tmp_path):
    tiles, others = made_tiles(0), made_tiles(1)
    vae = fitted(tiles)
    before = {name: getattr(vae, name).clone() for name in BUFFERS}
    linear = PatchPCA(4, 8).fit(tiles.images.float() / 127.5 - 1)
    settings = config(steps=150, learning_rate=5e-3, warmup_steps=5, betas=(0.9, 0.99))
    assert fit_correction(vae, tiles, settings, tmp_path, seed=0).finished
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    for name, tensor in before.items():
        assert torch.equal(getattr(vae, name), tensor), name

    images = others.images.float() / 127.5 - 1  # never seen
    clean = linear.encode(images).latent_dist.mode()
    assert torch.equal(vae.encode(images).latent_dist.mode(), clean)
    for level, share in ((0.0, 1.0), (0.3, 0.93), (0.5, 0.88)):
        z = clean + level * torch.randn_like(clean)
        error, of_components = ((decoder.decode(z).sample - images).abs().mean() for decoder in (vae, linear))
        assert error < share * of_components, level


@pytest.mark.parametrize("train", [{}, {"precision": "bf16", "ema_decay": 0.9}])
def test_interrupted_it_trains_to_the_same_bits(tmp_path, train):
    tiles = made_tiles(0)
    straight, resumed = fitted(tiles), fitted(tiles)
    assert fit_correction(straight, tiles, config(**train), tmp_path / "straight", seed=3).finished
    outcome = fit_correction(resumed, tiles, config(**train), tmp_path / "resumed", seed=3, max_minutes=0)
    assert (outcome.step, outcome.finished) == (1, False)
    resumed = fitted(tiles)
    assert fit_correction(resumed, tiles, config(**train), tmp_path / "resumed", seed=3).finished
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    finished = fitted(tiles)  # a third sitting has nothing to do but to load it
    assert fit_correction(finished, tiles, config(**train), tmp_path / "resumed", seed=3).step == 8
    assert torch.equal(finished.refiner[-1].weight, straight.refiner[-1].weight)


def test_other_tiles_or_another_correction_are_another_training(tmp_path):
    tiles = made_tiles(0)
    fit_correction(fitted(tiles), tiles, config(), tmp_path, seed=0, max_minutes=0)
    with pytest.raises(TerraSynthError, match=r"identity\.data"):
        fit_correction(fitted(tiles), made_tiles(1), config(), tmp_path, seed=0)
    quieter = config().model_copy(update={"refiner_noise": 0.1})
    with pytest.raises(TerraSynthError, match=r"refiner_noise: 0\.5 -> 0\.1"):
        fit_correction(fitted(tiles), tiles, quieter, tmp_path, seed=0)


def test_the_loss_of_the_first_step_is_that_of_the_components_written_out(tmp_path):
    from terrasynth.sampling.flow import seeded_generator
    from terrasynth.training.keys import shuffled_keys

    tiles = made_tiles(0)
    vae = fitted(tiles)
    fit_correction(vae, tiles, config(log_every=1), tmp_path, seed=3, max_minutes=0)
    losses = []
    for key in shuffled_keys(len(tiles), 4, 3)(0):
        x = _Crops(tiles, 32)[key]["image"].double()
        generator = seeded_generator(key[1])
        level = 0.5 * torch.rand((), generator=generator)
        noise = level * torch.randn(8, 8, 8, generator=generator)
        patches = x.reshape(3, 8, 4, 8, 4).permute(0, 2, 4, 1, 3).reshape(48, 64)
        scale, components, mean = vae.scale.double(), vae.components.double(), vae.mean.double()[:, None]
        z = (components @ (patches - mean)) / scale[:, None] + noise.reshape(8, 64)
        decoded = components.T @ (scale[:, None] * z) + mean
        error = decoded.reshape(3, 4, 4, 8, 8).permute(0, 3, 1, 4, 2).reshape(3, 32, 32) - x
        rows, columns = error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1]
        losses.append(error.abs().mean() + rows.abs().mean() / 2 + columns.abs().mean() / 2)
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(float(sum(losses)) / 4, rel=1e-5)


def test_crops_are_pieces_of_their_tile_turned_or_flipped_anywhere_in_it():
    size = 20
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = torch.stack([rows, columns, 100 + rows + columns]).byte()[None]
    crops = _Crops(Tiles(("a",), images, torch.zeros(1, size, size, dtype=torch.uint8), SCHEMA), 8)
    corners, turns = set(), set()
    for seed in range(400):
        item = crops[(0, seed)]
        assert torch.equal(item["image"], crops[(0, seed)]["image"])
        pixels = ((item["image"] + 1) * 127.5).round().byte()
        top, left = pixels[0].min().item(), pixels[1].min().item()
        expected = images[0, :, top : top + 8, left : left + 8]
        views = [torch.rot90(flipped, k, (1, 2)) for flipped in (expected, expected.flip(2)) for k in range(4)]
        (turn,) = [i for i, one in enumerate(views) if torch.equal(pixels, one)]
        corners.add((top, left))
        turns.add(turn)
    assert {corner[axis] for corner in corners for axis in (0, 1)} == set(range(13))
    assert turns == set(range(8))
    assert _Crops(Tiles(("a",), images, images[:, 0], SCHEMA), 99)[(0, 1)]["image"].shape == (3, 20, 20)
