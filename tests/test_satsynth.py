"""Images and masks from one diffusion: its arithmetic, and what a toy of constant colours shows that it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from pairs_toy import SCHEMA, agreement, toy_tiles, trained
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.label_codes import LabelCodes
from terrasynth.sampling.diffusion import sample_ddim
from terrasynth.sampling.flow import seeded_generator, seeded_noise
from terrasynth.study.quality import histogram_distance
from terrasynth.systems.satsynth import PUBLISHED, SatSynthPipeline, class_shares, halve

TINY = {"patch_size": 2, "widths": (16, 16), "attention": (2,), "image_size": 8}


def shaken(pipeline):
    """As after some training: no zero-initialised layer hides a fault."""
    torch.manual_seed(1)
    for parameter in pipeline.network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    pipeline.network.eval()
    return pipeline


def tiny(**changes):
    return shaken(SatSynthPipeline.from_scratch(SCHEMA, **TINY | changes))


@pytest.fixture(scope="module")
def toy():
    return trained(400, condition="given")


@pytest.fixture
def batch():
    masks = torch.randint(0, 3, (3, 8, 8))
    masks[1, 2:5] = 255
    return {"image": torch.rand(3, 3, 8, 8), "mask": masks, "seed": torch.tensor([3, 4, 2**40 + 5])}


# The toy


def test_painted_pairs_agree_and_have_the_classes_of_what_was_learned(toy):
    pairs = toy(seeds=range(96), num_steps=15)
    assert agreement(pairs) > 0.95
    _, real = toy_tiles(512, 0)
    assert histogram_distance(real, pairs.masks, 3) < 0.15
    assert (pairs.masks == 2).float().mean() < 0.15


def test_a_rare_class_comes_when_it_is_asked_for_and_stays_away_when_it_is_not_wanted(toy):
    def road(share, **options):
        return toy(seeds=range(32), num_steps=15, shares=toy.ask({"road": share}, 32), **options)

    asked, guided, none = road(0.5), road(0.5, guidance_scale=2.0), road(0.0)
    shares = [(pairs.masks == 2).double().mean().item() for pairs in (none, asked, guided)]
    print("road, in tiles of which it has 0.05:", shares)
    assert shares[0] < 0.05
    assert shares[1] > 0.2
    assert shares[2] > 0.4
    assert agreement(asked) > 0.9


def test_what_is_given_stays_and_what_is_missing_fits(toy):
    images, masks = toy_tiles(32, 9)
    of_masks = toy(seeds=range(32), num_steps=15, masks=masks)
    assert torch.equal(of_masks.masks, masks.byte())
    assert agreement(of_masks) > 0.95
    of_images = toy(seeds=range(32), num_steps=15, images=images)
    assert torch.equal(of_images.images, images)
    assert agreement(of_images) > 0.95
    known = torch.zeros(32, 8, 8, dtype=torch.bool)
    known[:, :, :4] = True
    parts = toy(seeds=range(32), num_steps=15, images=images, known=known, masks=masks.where(known, 255))
    assert torch.equal(parts.masks[known], masks[known].byte())
    assert torch.equal(parts.images.movedim(1, -1)[known], images.movedim(1, -1)[known])
    assert agreement(parts) > 0.9
    across = (masks == masks[:, :, :1]).flatten(1).all(1)  # their right half follows from the left one
    assert (parts.masks[across] == masks[across]).double().mean() > 0.9


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_velocity_are_learned_as_well(prediction):
    images, masks = toy_tiles(64, 7)
    batch = {"image": images.float() / 255, "mask": masks, "seed": torch.arange(64)}
    before, after = (
        trained(steps, 16, prediction_type=prediction, asks_classes=False).training_loss(batch) for steps in (0, 50)
    )
    assert after < 0.7 * before, (before, after)


def test_a_larger_pair_is_that_of_the_smaller_one():
    pipeline = trained(60, 16, condition="half")
    images, masks = toy_tiles(16, 5)
    small = halve(images.float() / 255, masks, 3)
    larger = pipeline.upscale((small[0] * 255).round().byte(), small[1], seeds=range(16), num_steps=10)
    assert larger.images.shape == (16, 3, 8, 8)
    assert agreement(larger) > 0.95
    again = halve(larger.images.float() / 255, larger.masks, 3)
    assert (again[1] == small[1]).double().mean() > 0.95
    assert (again[0] - small[0]).abs().mean() < 0.06


# The arithmetic


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("codes", ["bits", "onehot"])
def test_the_loss_is_the_mean_squared_error_over_what_is_known(prediction, codes, batch):
    """Written out sample by sample, in float64, with the closed form of the cosine schedule."""
    pipeline = tiny(prediction_type=prediction, codes=codes, asks_classes=False)
    pipeline.network.double()
    steps = torch.arange(1001).double() / 1000
    bar = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
    alpha_bars = (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0)
    table = {"bits": [[-1, -1], [-1, 1], [1, -1]], "onehot": [[1, -1, -1], [-1, 1, -1], [-1, -1, 1]]}[codes]
    losses, weights = [], []
    for image, mask, seed in zip(batch["image"].double(), batch["mask"], batch["seed"].tolist(), strict=True):
        code = torch.tensor([[table[k] if k < 3 else [0] * len(table[0]) for k in row] for row in mask.tolist()])
        clean = torch.cat([2 * image - 1, code.double().movedim(-1, 0)])
        known = torch.cat([torch.ones(3, 8, 8), (mask < 3).expand(len(table[0]), 8, 8)])
        generator = seeded_generator(seed)
        t = torch.randint(1000, (), generator=generator)
        clean, known = F.pixel_unshuffle(clean, 2), F.pixel_unshuffle(known, 2)
        noise = torch.randn(clean.shape, generator=generator).double()
        a, b = alpha_bars[t].sqrt(), (1 - alpha_bars[t]).sqrt()
        predicted = pipeline.unet((a * clean + b * noise)[None], t[None]).sample[0]
        target = {"sample": clean, "epsilon": noise, "v_prediction": a * noise - b * clean}[prediction]
        losses.append((known * (predicted - target) ** 2).sum() / known.sum())
        snr, clean_error = (a / b) ** 2, {"sample": 1, "epsilon": (b / a) ** 2, "v_prediction": b**2}[prediction]
        weights.append(snr.clamp(max=0.5) * clean_error)
    found, losses = pipeline.training_loss(batch), torch.stack(losses)
    torch.testing.assert_close(found.double(), losses.mean(), atol=1e-4, rtol=1e-4)
    pipeline.min_snr = 0.5
    found, expected = pipeline.training_loss(batch), losses * torch.stack(weights)
    assert not torch.allclose(expected.mean(), losses.mean(), rtol=0.1)
    torch.testing.assert_close(found.double(), expected.mean(), atol=1e-4, rtol=1e-4)


def gradients(pipeline, given):
    """Where what the network predicts carries a loss, (B, 3 + C, H, W)."""
    kept = []
    hook = pipeline.unet.conv_out.register_forward_hook(
        lambda module, inputs, output: output.retain_grad() or kept.append(output)
    )
    pipeline.training_loss(given).backward()
    hook.remove()
    return F.pixel_shuffle(kept[0].grad, 2) != 0


def test_unlabelled_pixels_teach_colours_alone(batch):
    learned = gradients(tiny(), batch)
    assert learned[:, :3].all()
    assert torch.equal(learned[:, 3:], (batch["mask"] != 255).unsqueeze(1).expand(-1, 2, -1, -1))


def test_what_is_given_carries_no_loss_and_is_what_the_network_sees(batch):
    pipeline = tiny(condition="given")
    pipeline.given_dropout = 0.0
    inputs = []
    pipeline.unet.conv_in.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    many = {name: tensor[:2].repeat(8, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}
    many["seed"] = torch.arange(16)
    learned = gradients(pipeline, many)
    condition = F.pixel_shuffle(inputs[0][:, 20:], 2)
    image_given, mask_given = condition[:, 5].bool(), condition[:, 6].bool()
    labelled = many["mask"] != 255
    assert not (mask_given & ~labelled).any()
    assert torch.equal(learned[:, :3], ~image_given[:, None].expand(-1, 3, -1, -1))
    assert torch.equal(learned[:, 3:], (labelled & ~mask_given)[:, None].expand(-1, 2, -1, -1))
    clean = torch.cat([many["image"] * 2 - 1, LabelCodes(3).encode(many["mask"])], 1)
    flags = torch.cat([image_given[:, None].expand(-1, 3, -1, -1), mask_given[:, None].expand(-1, 2, -1, -1)], 1)
    assert torch.equal(condition[:, :5], clean * flags)
    assert 0.2 < image_given.double().mean() < 0.8
    assert not (image_given & mask_given).flatten(1).all(1).any()
    pipeline.given_dropout = 1.0
    inputs.clear()
    gradients(pipeline, many)
    assert not inputs[0][:, 20:].any()


@torch.no_grad()
def test_shares_are_those_of_labelled_pixels_and_are_left_out_as_often_as_asked(batch, monkeypatch):
    shares = class_shares(batch["mask"], 3)
    for row, mask in zip(shares, batch["mask"], strict=True):
        known = mask[mask != 255]
        torch.testing.assert_close(row, torch.stack([(known == k).float().mean() for k in range(3)]))
    assert class_shares(torch.full((1, 2, 2), 255), 3).isnan().all()
    pipeline = tiny()
    told = []
    pipeline.embedding.register_forward_pre_hook(lambda module, given: told.append(given[0]))
    many = {name: tensor[:1].expand(400, *tensor.shape[1:]) for name, tensor in batch.items()}
    many["seed"] = torch.arange(400)
    monkeypatch.setattr(
        pipeline, "_evaluate", lambda x, *rest: pipeline.embedding(rest[-1]).sum() * torch.zeros_like(x)
    )
    pipeline.training_loss(many)
    known, roots = told[0].chunk(2, 1)
    torch.testing.assert_close(roots, known * shares[0].sqrt())
    # Besides, of classes told with probability u, none is with E (1 − u)³ = 1 / 4; for each, E u = 1 / 2.
    nothing = (known == 0).all(1).double().mean()
    assert abs(nothing - (0.2 + 0.8 / 4)) < 0.08
    assert abs(known.double().mean() - 0.8 / 2) < 0.08


def test_a_pair_depends_on_its_own_row_only():
    pipeline = tiny(condition="given")
    _, masks = toy_tiles(3, 2)
    shares = pipeline.ask({"water": 0.3}, 3)
    options = {"num_steps": 2, "guidance_scale": 1.5}
    together = pipeline(seeds=[5, 6, 7], shares=shares, masks=masks, **options)
    for i in (2, 0):
        row = slice(i, i + 1)
        alone = pipeline(seeds=[5 + i], shares=shares[row], masks=masks[row], **options)
        difference = (alone.images[0].int() - together.images[i].int()).abs()
        assert difference.max() <= 1
    assert not torch.equal(together.images[0], together.images[1])


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_what_is_kept_goes_the_path_of_its_noise(prediction):
    """Known-region replacement at every noise level: x_t is what the forward process makes of the given code."""
    pipeline = tiny(prediction_type=prediction, asks_classes=False)
    clean, noise = torch.rand(2, 20, 4, 4) * 2 - 1, seeded_noise([1, 2], (20, 4, 4))
    given = torch.rand(2, 20, 4, 4) < 0.5
    visited = []
    predict = pipeline.denoiser(kept=(clean, given))

    def watched(x, timestep):
        visited.append((x, timestep))
        return predict(x, timestep)

    found = sample_ddim(watched, noise, pipeline.scheduler, 4)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    for x, timestep in visited[1:]:
        expected = scheduler.add_noise(clean, noise, timestep)
        torch.testing.assert_close(x[given], expected[given], atol=1e-3, rtol=0)
    torch.testing.assert_close(found[given], clean[given], atol=1e-3, rtol=0)
    assert (found[~given] - clean[~given]).abs().mean() > 0.1


def test_halves_are_means_and_majorities():
    images = torch.rand(2, 3, 4, 4)
    masks = torch.tensor([[0, 1, 2, 255], [1, 1, 255, 255], [255, 255, 0, 0], [255, 255, 2, 2]]).expand(2, 4, 4)
    small, classes = halve(images, masks, 3)
    torch.testing.assert_close(small, images.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5)))
    assert classes[0].tolist() == [[1, 2], [255, 0]]


def test_noise_on_the_smaller_pair_is_told_and_keeps_its_variance():
    pipeline = tiny(condition="half")
    images, masks = torch.rand(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    noise = torch.randn(1, 5, 8, 8)
    without, half = (pipeline.enlarge(images, masks, torch.tensor([s]), noise) for s in (0.0, 0.5))
    pixels = F.pixel_shuffle(without, 2)
    assert torch.equal(pixels[:, 3:, ::2, 1::2], LabelCodes(3).encode(masks))
    torch.testing.assert_close(F.pixel_shuffle(half, 2), 0.75**0.5 * pixels + 0.5 * noise)
    options = {"seeds": [1], "num_steps": 1}
    bytes_ = (images * 255).byte()
    found = [pipeline.upscale(bytes_, masks, augmentation=s, **options).images.int() for s in (0.0, 0.3)]
    assert (found[0] - found[1]).abs().max() > 1


# Files


def test_saved_and_loaded_it_paints_the_same_bits(tmp_path):
    for condition in ("given", "half"):
        pipeline = tiny(condition=condition)
        pipeline.save_pretrained(tmp_path / condition)
        loaded = SatSynthPipeline.from_pretrained(tmp_path / condition)
        assert not list((tmp_path / condition).rglob("*.bin"))
        for name, tensor in pipeline.network.state_dict().items():
            assert torch.equal(loaded.network.state_dict()[name], tensor)
        images, masks = toy_tiles(2, 3)

        def paint(pipeline, condition=condition, images=images, masks=masks):
            if condition == "half":
                return pipeline.upscale(images, masks, seeds=[1, 2], num_steps=2)
            return pipeline(seeds=[1, 2], shares=pipeline.ask({"road": 0.5}, 2), masks=masks, num_steps=2)

        assert all(torch.equal(*pair) for pair in zip(paint(pipeline), paint(loaded), strict=True))


@pytest.fixture
def foreign():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(
        8, 5, 5, block_out_channels=(16, 16), norm_num_groups=8, layers_per_block=1, **blocks
    )  # RGB and two bits


@pytest.mark.parametrize("asks", [False, True])
def test_weights_of_a_plain_unet_predict_what_they_did(foreign, asks, tmp_path):
    foreign.save_pretrained(tmp_path / "unet-alone")
    DDPMPipeline(foreign, DDPMScheduler(beta_end=0.03)).save_pretrained(tmp_path / "pipeline")
    x, t = torch.randn(2, 5, 8, 8), torch.tensor([3, 700])
    for name in ("unet-alone", "pipeline"):
        pipeline = SatSynthPipeline.from_unet(tmp_path / name, SCHEMA, asks_classes=asks)
        told = torch.rand(2, 6) if asks else None
        with torch.no_grad():
            assert torch.equal(pipeline.denoiser(told=told)(x, t), foreign(x, t).sample)
        assert pipeline(seeds=[0], num_steps=2).masks.max() < 3
    assert pipeline.scheduler.config.beta_end == 0.03
    assert pipeline.config.prediction_type == "epsilon"


def test_a_unet_of_other_channels_is_refused_with_the_numbers(foreign, tmp_path):
    foreign.save_pretrained(tmp_path)
    nine = LabelSchema(tuple("abcdefghi"), tuple((i + 1, 0, 0) for i in range(9)))
    with pytest.raises(TerraSynthError, match=r"5 in, 5 out\n.*7 in, 7 out"):
        SatSynthPipeline.from_unet(tmp_path, nine)
    with pytest.raises(TerraSynthError, match="can not be loaded"):
        SatSynthPipeline.from_unet(tmp_path / "nothing", SCHEMA)


def test_a_scheduler_that_says_nothing_of_the_pair_is_refused_and_values_are_clipped_in_one_way(foreign, tmp_path):
    DDPMPipeline(foreign, DDIMScheduler(rescale_betas_zero_snr=True)).save_pretrained(tmp_path / "none")
    with pytest.raises(TerraSynthError, match="no signal is left"):
        SatSynthPipeline.from_unet(tmp_path / "none", SCHEMA)
    assert SatSynthPipeline.from_unet(tmp_path / "none", SCHEMA, prediction_type="v_prediction")
    DDPMPipeline(foreign, DDIMScheduler(thresholding=True)).save_pretrained(tmp_path / "clipped")
    assert SatSynthPipeline.from_unet(tmp_path / "clipped", SCHEMA)(seeds=[0], num_steps=2).masks.max() < 3


def test_a_model_without_all_of_its_weights_or_of_no_folder_is_refused(foreign, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    foreign.save_pretrained(tmp_path / "foreign")
    for folder in (tmp_path / "model" / "unet", tmp_path / "foreign"):
        (file,) = folder.glob("*.safetensors")
        save_file({name: each for name, each in load_file(file).items() if name != "conv_out.weight"}, file)
    lacks = r"unet: the model lacks weights\n.*none for conv_out.weight"
    with pytest.raises(TerraSynthError, match=lacks):
        SatSynthPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(TerraSynthError, match=lacks):
        SatSynthPipeline.from_unet(tmp_path / "foreign", SCHEMA)
    with pytest.raises(TerraSynthError, match="no such folder"):
        SatSynthPipeline.from_pretrained(tmp_path / "nowhere")


@torch.no_grad()
def test_codes_that_are_no_numbers_are_no_class():
    pipeline = tiny(prediction_type="sample")
    pipeline.unet.conv_out.bias[-1] = torch.nan
    with pytest.raises(TerraSynthError, match="no numbers"):
        pipeline(seeds=[0], num_steps=1)


def test_points_that_would_be_learned_are_refused():
    with pytest.raises(TerraSynthError, match=r"(?s)learned.*bits or onehot"):
        tiny(codes="learned")


# Sizes


def test_the_default_costs_ten_gigaflop_a_step_of_eight_tiles_and_the_published_size_is_built(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, *_, **__: tensor)  # slow, and of no use here

    def operations(schema, **settings):
        with torch.device("meta"):
            pipeline = SatSynthPipeline.from_scratch(schema, **settings)
            unet, side = pipeline.unet, pipeline.unet.config.sample_size
            told = None if pipeline.embedding is None else torch.empty(8, unet.time_embedding.linear_2.out_features)
            with FlopCounterMode(display=False) as counter:
                unet(torch.empty(8, unet.config.in_channels, side, side), torch.empty(8), told).sample.sum().backward()
        return counter.get_total_flops() / 1e9, unet

    six = LabelSchema(tuple("abcdef"), tuple((i + 1, 0, 0) for i in range(6)))
    small, _ = operations(six)
    published, unet = operations(six, **PUBLISHED)
    print(f"a training step of eight tiles: {small:.1f} and, as published, {published:.0f} · 10⁹")
    assert small < 10.5
    assert (unet.config.in_channels, unet.config.sample_size) == (6, 128)
    assert unet.config.block_out_channels == (128, 128, 256, 384, 512)
    attends = ["Attn" in kind for kind in unet.config.down_block_types]
    assert attends == [False, False, False, True, True]  # maps of 16 and 8
    assert published > 1000


# Faults


@pytest.mark.parametrize(
    ("condition", "call", "match"),
    [
        ("none", {"size": (6, 8)}, "multiples of 4"),
        ("none", {"masks": torch.zeros(1, 8, 8)}, "does not fit the seeds"),
        ("none", {"images": torch.rand(2, 3, 8, 8)}, "no bytes"),
        ("none", {"known": torch.ones(2, 8, 8).bool()}, "there are none"),
        ("none", {"images": torch.zeros(2, 3, 8, 8).byte(), "known": torch.ones(2, 8, 8)}, "yes or no"),
        ("none", {"masks": torch.full((2, 8, 8), 0.7)}, "whole numbers"),
        ("none", {"size": (0, 0)}, "multiples of 4"),
        ("none", {"guidance_scale": float("nan")}, "no number"),
        ("none", {"masks": torch.full((2, 8, 8), 3)}, "does not know"),
        ("none", {"masks": torch.full((2, 8, 8), -1)}, "class -1"),
        ("none", {"shares": torch.zeros(2, 4)}, "do not fit seeds and classes"),
        ("none", {"shares": torch.tensor([[0.2, torch.nan, 0.1], [-0.1, 0.0, torch.nan]])}, "no shares"),
        ("none", {"shares": torch.tensor([[0.2, torch.nan, 0.1], [0.6, torch.nan, 0.5]])}, "no shares"),
        ("half", {}, "call `upscale`"),
    ],
)
def test_what_can_not_be_painted_is_refused(condition, call, match):
    with pytest.raises(TerraSynthError, match=match):
        tiny(condition=condition)(seeds=[0, 1], **call)


def test_no_seeds_and_steps_that_are_not_there_are_refused():
    with pytest.raises(TerraSynthError, match="nothing to paint"):
        tiny()(seeds=[])
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=rf"`num_steps` is {steps}, but there are 1 to 1000"):
            tiny()(seeds=[0], num_steps=steps)


def test_seeds_may_be_of_a_tensor():
    pipeline = tiny()
    some, same = pipeline(seeds=torch.tensor([3, 4]), num_steps=2), pipeline(seeds=[3, 4], num_steps=2)
    assert torch.equal(some.images, same.images)


def test_a_fraction_is_no_seed():
    with pytest.raises(TypeError, match="integer"):
        tiny()(seeds=[0.5], num_steps=2)


@pytest.mark.parametrize("sizes", [{"patch_size": 0}, {"widths": ()}, {"widths": (8, 0)}])
def test_sizes_of_no_network_are_refused(sizes):
    with pytest.raises(TerraSynthError, match="no U-Net is so small"):
        tiny(**sizes)


def test_what_was_not_learned_can_not_be_asked_for():
    pipeline = tiny(asks_classes=False)
    with pytest.raises(TerraSynthError, match="can not be asked"):
        pipeline(seeds=[0], shares=pipeline.ask({}, 1))
    with pytest.raises(TerraSynthError, match="not trained to enlarge"):
        pipeline.upscale(torch.zeros(1, 3, 4, 4).byte(), torch.zeros(1, 4, 4).byte(), seeds=[0])
    with pytest.raises(TerraSynthError, match="no such noise"):
        tiny(condition="half").upscale(
            torch.zeros(1, 3, 4, 4).byte(), torch.zeros(1, 4, 4).byte(), seeds=[0], augmentation=1.0
        )
    with pytest.raises(TerraSynthError, match="no such class"):
        pipeline.ask({"lava": 0.5}, 1)
    with pytest.raises(TerraSynthError, match="no shares"):
        pipeline.ask({"road": 0.7, "water": 0.5}, 1)
