from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from diffusers.utils.torch_utils import randn_tensor

from terrasynth.sampling.flow import (
    FlowStep,
    flow_batch,
    sample_flow,
    seeded_generator,
    seeded_noise,
)
from terrasynth.sampling.guidance import condition_or_null, guided_velocity


@pytest.fixture(autouse=True)
def _fixed_numbers():
    torch.manual_seed(0)


def tiny_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
    ).eval()


def tiny_pipeline(shift: float) -> StableDiffusion3Pipeline:
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        **dict.fromkeys(
            ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Noise


def test_noise_of_a_sample_depends_on_its_seed_alone():
    together = seeded_noise([3, 1, 2], (4, 8, 8))
    assert torch.equal(seeded_noise([2, 3], (4, 8, 8)), together[[2, 0]])
    assert torch.equal(seeded_noise([1], (4, 8, 8))[0], together[1])


def test_noise_equals_diffusers_with_one_generator_per_image():
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    assert torch.equal(seeded_noise([7, 8], (4, 6, 5)), randn_tensor((2, 4, 6, 5), generator=generators))


def test_noise_does_not_change_with_the_dtype():
    noise = seeded_noise([5], (4, 8, 8), dtype=torch.bfloat16)
    assert torch.equal(noise, seeded_noise([5], (4, 8, 8)).bfloat16())


def test_seeds_that_differ_in_high_bits_only_give_different_noise():
    seeds = [5, 5 + 2**32, 5 + 2**40, 5 + 2**62]
    noise = seeded_noise(seeds, (64,))
    assert len({tuple(row) for row in noise.tolist()}) == len(seeds)


# The sampler


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_sampler_equals_the_stable_diffusion_3_pipeline_of_diffusers(shift, scale):
    pipeline = tiny_pipeline(shift)
    noise, text, null = seeded_noise([0, 1], (4, 8, 8)), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    pooled, null_pooled = torch.randn(2, 12), torch.randn(2, 12)
    expected = pipeline(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=null,
        negative_pooled_prompt_embeds=null_pooled,
        latents=noise,
        height=8,
        width=8,
        num_inference_steps=5,
        guidance_scale=scale,
        output_type="latent",
    ).images

    def predict(latents, timestep, uses):
        prompt = condition_or_null(uses["text"], text, null)
        summary = condition_or_null(uses["text"], pooled, null_pooled)
        return pipeline.transformer(latents, prompt, summary, timestep).sample

    velocity = guided_velocity(predict, {"text": scale})
    actual = sample_flow(velocity, noise, FlowMatchEulerDiscreteScheduler(shift=shift), 5)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_steps_equal_those_of_the_scheduler_bit_for_bit():
    scheduler, other = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    noise = seeded_noise([0, 1, 2], (4, 8, 8))

    def velocity(latents, timestep):
        return torch.sin(3 * latents) + timestep.view(-1, 1, 1, 1) / 1000

    other.set_timesteps(23)
    expected = noise
    for timestep in other.timesteps:
        expected = other.step(velocity(expected, timestep.expand(3)), timestep, expected, return_dict=False)[0]
    assert torch.equal(sample_flow(velocity, noise, scheduler, 23), expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "order", "within"), [("euler", 1, 0.1), ("adams", 2, 0.4)])
def test_sampler_converges_to_the_exact_flow_of_gaussian_data_at_the_order_of_the_solver(solver, order, within, shift):
    mean, std = 0.7, 0.4

    def velocity(x, timestep):
        sigma = timestep.view(-1, 1, 1, 1) / 1000
        spread = (1 - sigma) ** 2 * std**2 + sigma**2
        return -mean + (sigma - (1 - sigma) * std**2) / spread * (x - (1 - sigma) * mean)

    noise = seeded_noise(range(4), (1, 16, 16))
    exact = mean + std * noise
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    errors = [
        (sample_flow(velocity, noise, scheduler, n, solver=solver) - exact).square().mean().sqrt().item()
        for n in (20, 40, 80, 160)
    ]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert errors[-1] < 0.01
    assert orders[-1] == pytest.approx(order, abs=within)


def test_adams_is_the_two_step_method_written_out():
    noise, scheduler = seeded_noise([0, 1], (4, 8, 8)), FlowMatchEulerDiscreteScheduler(shift=3.0)

    def velocity(latents, timestep):
        return torch.sin(3 * latents) + timestep.view(-1, 1, 1, 1) / 1000

    z = sample_flow(velocity, noise, scheduler, 3, solver="adams")
    s = scheduler.sigmas.tolist()
    t = scheduler.timesteps
    v0 = velocity(noise, t[0].expand(2))
    z1 = noise + (s[1] - s[0]) * v0
    v1 = velocity(z1, t[1].expand(2))
    z2 = z1 + (s[2] - s[1]) * v1 + (s[2] - s[1]) ** 2 / 2 * (v1 - v0) / (s[1] - s[0])
    v2 = velocity(z2, t[2].expand(2))
    z3 = z2 + (s[3] - s[2]) * v2 + (s[3] - s[2]) ** 2 / 2 * (v2 - v1) / (s[2] - s[1])
    torch.testing.assert_close(z, z3, rtol=0, atol=1e-5)


def test_what_steering_adds_to_a_step_is_not_taken_back_by_the_next():
    noise, scheduler = seeded_noise([0], (4, 8, 8)), FlowMatchEulerDiscreteScheduler()

    def once(velocity, latents, step, decode):
        return velocity + 1 if step.index == 1 else velocity

    options = {"solver": "adams", "decode": lambda x: x}
    plain = sample_flow(lambda x, t: torch.zeros_like(x), noise, scheduler, 4, **options)
    steered = sample_flow(lambda x, t: torch.zeros_like(x), noise, scheduler, 4, steering=once, **options)
    h = scheduler.sigmas[2] - scheduler.sigmas[1]
    torch.testing.assert_close(steered - plain, h.expand_as(noise))


def test_callback_sees_every_step_and_the_exact_data_where_the_flow_is_straight():
    data, noise, seen = torch.randn(2, 4, 8, 8), seeded_noise([0, 1], (4, 8, 8)), []
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    result = sample_flow(
        lambda latents, timestep: noise - data, noise, scheduler, 6, callback=lambda *told: seen.append(told)
    )
    torch.testing.assert_close(result, data, rtol=0, atol=1e-5)
    assert [step for step, _ in seen] == [FlowStep(i, 6, s) for i, s in enumerate(scheduler.sigmas[:-1].tolist())]
    for _, clean in seen:
        torch.testing.assert_close(clean, data, rtol=0, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch():
    transformer = tiny_transformer()
    text, pooled = torch.randn(4, 5, 16), torch.randn(4, 12)

    def paint(rows):
        def velocity(latents, timestep):
            return transformer(latents, text[rows], pooled[rows], timestep).sample

        return sample_flow(velocity, seeded_noise(rows, (4, 8, 8)), FlowMatchEulerDiscreteScheduler(shift=3.0), 4)

    together = paint([0, 1, 2, 3])
    torch.testing.assert_close(paint([2, 0]), together[[2, 0]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(paint([3]), together[[3]], rtol=1e-4, atol=1e-5)


def test_steering_replaces_the_velocity_and_is_told_step_and_latents():
    noise, seen = seeded_noise([0], (4, 8, 8)), []

    def steering(velocity, latents, step, decode):
        seen.append((step.index, decode(latents)))
        return 2 * velocity

    scheduler = FlowMatchEulerDiscreteScheduler()
    steered = sample_flow(lambda x, t: x, noise, scheduler, 3, steering=steering, decode=lambda x: x + 1)
    assert torch.equal(steered, sample_flow(lambda x, t: 2 * x, noise, scheduler, 3))
    assert [index for index, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[0][1], noise + 1)


def test_steering_without_a_way_to_images_is_refused():
    with pytest.raises(ValueError, match="decode"):
        sample_flow(
            lambda x, t: x, torch.zeros(1, 4, 8, 8), FlowMatchEulerDiscreteScheduler(), 2, steering=lambda v, *_: v
        )


def test_a_solver_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="euler, adams"):
        sample_flow(lambda x, t: x, torch.zeros(1, 4, 8, 8), FlowMatchEulerDiscreteScheduler(), 2, solver="heun")


def test_sampling_keeps_no_graph():
    transformer = tiny_transformer()
    text, pooled = torch.randn(1, 5, 16), torch.randn(1, 12)
    result = sample_flow(
        lambda x, t: transformer(x, text, pooled, t).sample,
        seeded_noise([0], (4, 8, 8)),
        FlowMatchEulerDiscreteScheduler(),
        2,
    )
    assert not result.requires_grad


def test_reduced_precision_is_integrated_in_float32():
    noise = seeded_noise([0], (4, 8, 8)).bfloat16()

    def velocity(latents, timestep):
        assert latents.dtype == timestep.dtype == torch.float32
        return (latents / 2).bfloat16()

    result = sample_flow(velocity, noise, FlowMatchEulerDiscreteScheduler(), 8)
    assert result.dtype == torch.float32


# Training


def test_noisy_latents_lie_on_the_path_from_data_to_noise():
    x0 = torch.randn(4, 4, 8, 8)
    batch = flow_batch(x0, [0, 1, 2, 3], shift=3.0)
    sigma = batch.sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.noisy - sigma * batch.velocity, x0)
    noise = batch.noisy + (1 - sigma) * batch.velocity
    assert noise.mean().item() == pytest.approx(0, abs=0.15)
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(batch.timestep, 1000 * batch.sigma)


def test_noisy_latents_equal_those_of_the_scheduler():
    x0, scheduler = torch.randn(2, 4, 8, 8), FlowMatchEulerDiscreteScheduler(shift=3.0)
    batch = flow_batch(x0, [4, 9], shift=3.0)
    scheduler.timesteps, scheduler.sigmas = batch.timestep, batch.sigma
    expected = scheduler.scale_noise(x0, batch.timestep, batch.velocity + x0)
    torch.testing.assert_close(batch.noisy, expected)


def test_training_samples_do_not_depend_on_batch_or_order():
    x0 = torch.randn(3, 4, 8, 8)
    together, other = flow_batch(x0, [5, 6, 7]), flow_batch(x0[[2, 0]], [7, 5])
    for a, b in zip(together, other, strict=True):
        assert torch.equal(a[[2, 0]], b)


def test_a_generator_continues_its_stream():
    x0 = torch.randn(1, 4, 8, 8)
    fresh, used = seeded_generator(5), seeded_generator(5)
    torch.rand(1, generator=used)
    assert torch.equal(flow_batch(x0, [fresh]).noisy, flow_batch(x0, [5]).noisy)
    assert not torch.equal(flow_batch(x0, [used]).noisy, flow_batch(x0, [5]).noisy)


QUANTILES = torch.linspace(0.05, 0.95, 19)


def training_sigmas(**settings) -> torch.Tensor:
    return flow_batch(torch.zeros(20_000, 1, 1, 1), range(20_000), **settings).sigma


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_density_of_times_is_that_of_diffusers(density):
    u = compute_density_for_timestep_sampling(
        density, 200_000, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=torch.Generator().manual_seed(0)
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = scheduler.timesteps[(u * 1000).long()] / 1000  # what diffusers' training scripts do
    actual = training_sigmas(density=density, shift=3.0)
    torch.testing.assert_close(actual.quantile(QUANTILES), expected.quantile(QUANTILES), rtol=0, atol=0.015)


def test_logit_mean_has_the_sign_of_the_paper_which_indexing_descending_timesteps_reverses():
    u = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, logit_mean=0.8, logit_std=0.6, generator=torch.Generator().manual_seed(0)
    )
    indexed = FlowMatchEulerDiscreteScheduler().timesteps[(u * 1000).long()] / 1000
    actual = training_sigmas(density="logit_normal", logit_mean=-0.8, logit_std=0.6)
    normal = NormalDist(-0.8, 0.6)
    exact = torch.sigmoid(torch.tensor([normal.inv_cdf(q) for q in QUANTILES.tolist()]))
    assert actual.median() < 0.5  # negative: towards the data
    torch.testing.assert_close(actual.quantile(QUANTILES), exact, rtol=0, atol=0.015)
    torch.testing.assert_close(indexed.quantile(QUANTILES), exact, rtol=0, atol=0.015)


def test_shift_moves_the_uniform_density_as_published():
    sigma = training_sigmas(density="uniform", shift=3.0)
    quartiles = sigma.quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([0.5, 0.75, 0.9]), rtol=0, atol=0.01)
