import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from terrasynth.sampling.diffusion import diffusion_batch, sample_ddim
from terrasynth.sampling.flow import seeded_generator

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
DDIM = SCHEDULE | {"set_alpha_to_one": False, "steps_offset": 1}
#: Latent diffusion's schedule in float64: betas whose roots are evenly spaced.
ALPHA_BARS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def test_latents_are_noised_to_uniform_timesteps_that_depend_on_the_seed_alone():
    latents = torch.randn(64, 3, 4, 4)
    batch = diffusion_batch(latents, list(range(64)), DDPMScheduler(**SCHEDULE))
    alpha_bar = torch.from_numpy(ALPHA_BARS[batch.timestep.numpy()]).view(-1, 1, 1, 1)
    expected = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * batch.target
    torch.testing.assert_close(batch.noisy.double(), expected, atol=1e-5, rtol=0)
    alone = diffusion_batch(latents[5:6], [5], DDPMScheduler(**SCHEDULE))
    assert torch.equal(alone.noisy[0], batch.noisy[5])
    many = diffusion_batch(torch.zeros(4000, 1, 1, 1), list(range(4000)), DDPMScheduler(**SCHEDULE))
    assert (many.timestep.min(), many.timestep.max()) == pytest.approx((0, 999), abs=5)
    assert abs(many.timestep.double().mean() - 499.5) < 4 * 288.7 / 4000**0.5
    assert abs(many.target.std() - 1) < 0.05


def test_a_generator_continues_its_stream():
    generator = seeded_generator(3)
    given = diffusion_batch(torch.zeros(1, 2, 2, 2), [generator], DDPMScheduler(**SCHEDULE))
    assert torch.equal(given.target, diffusion_batch(torch.zeros(1, 2, 2, 2), [3], DDPMScheduler(**SCHEDULE)).target)
    assert not torch.equal(torch.rand(2, generator=generator), torch.rand(2, generator=seeded_generator(3)))


@pytest.mark.parametrize("steps", [5, 50])
def test_sampling_is_ddim_on_latent_diffusions_timesteps(steps):
    """Against the update written out in float64, on the timesteps that the published sampler has."""
    torch.manual_seed(0)
    noise = torch.randn(2, 3, 4, 4)

    def epsilon(x, t):
        return torch.tanh(x * (1 + t.view(-1, 1, 1, 1) / 1000)) * 0.9

    timesteps = np.arange(0, 1000, 1000 // steps) + 1
    x, told = noise.double(), []
    for i, t in reversed(list(enumerate(timesteps))):
        before = ALPHA_BARS[timesteps[i - 1]] if i else ALPHA_BARS[0]
        e = epsilon(x, torch.full((2,), float(t), dtype=torch.float64))
        x0 = (x - (1 - ALPHA_BARS[t]) ** 0.5 * e) / ALPHA_BARS[t] ** 0.5
        x = before**0.5 * x0 + (1 - before) ** 0.5 * e
        told.append(x0)
    estimates = []
    found = sample_ddim(
        epsilon, noise, DDIMScheduler(**DDIM), steps, callback=lambda i, estimate: estimates.append((i, estimate))
    )
    torch.testing.assert_close(found.double(), x, atol=2e-5, rtol=1e-4)
    assert [i for i, _ in estimates] == list(range(steps))
    torch.testing.assert_close(estimates[-1][1].double(), told[-1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_target_is_what_the_scheduler_says(kind):
    latents, seeds = torch.randn(8, 2, 4, 4), range(8)
    noise = diffusion_batch(latents, seeds, DDPMScheduler(**SCHEDULE)).target.double()
    batch = diffusion_batch(latents, seeds, DDPMScheduler(**SCHEDULE, prediction_type=kind))
    alpha_bar = torch.from_numpy(ALPHA_BARS[batch.timestep.numpy()]).view(-1, 1, 1, 1)
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    expected = {"epsilon": noise, "sample": latents.double(), "v_prediction": velocity}[kind]
    torch.testing.assert_close(batch.target.double(), expected, atol=1e-5, rtol=0)


def test_cubic_timesteps_are_mostly_late():
    """Against the closed form P(t <= s) = 1 − (1 − s / T)^(1/3)."""
    batch = diffusion_batch(torch.zeros(4000, 1, 1, 1), range(4000), DDPMScheduler(**SCHEDULE), timesteps="cubic")
    t = np.sort(batch.timestep.numpy())
    assert 2 <= t.min() <= 50
    assert t.max() == 999
    # Kolmogorov and Smirnov: 1.95 / √n is exceeded once in a thousand seeds. Whole timesteps add at most 0.1.
    expected = 1 - (1 - np.minimum(t + 1, 1000) / 1000) ** (1 / 3)
    late = t < 900
    assert np.abs(np.arange(1, 4001) / 4000 - expected)[late].max() < 1.95 / 4000**0.5 + 0.01
    assert abs(t.mean() - 750) < 15


def test_a_rough_start_is_noised_in_place_of_the_truth():
    truth, rough = torch.randn(2, 8, 2, 4, 4)
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type="sample")
    batch = diffusion_batch(truth, range(8), scheduler, start=rough)
    assert torch.equal(batch.noisy, diffusion_batch(rough, range(8), scheduler).noisy)
    assert torch.equal(batch.target, truth)
    with pytest.raises(ValueError, match="prediction_type is sample"):
        diffusion_batch(truth, range(8), DDPMScheduler(**SCHEDULE), start=rough)


def test_unknown_timesteps_are_refused():
    with pytest.raises(ValueError, match="uniform, cubic"):
        diffusion_batch(torch.zeros(1, 1, 1, 1), [0], DDPMScheduler(**SCHEDULE), timesteps="logit-normal")


def bounded(x, t):
    return torch.tanh(x * (1 + t.view(-1, 1, 1, 1) / 1000)) * 0.9


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("of", "steps"), [(8, 8), (8, 4), (10, 3), (7, 3), (40, 12)])
def test_a_start_at_some_strength_is_diffusers_image_to_image(kind, spacing, of, steps):
    """The last steps of more, from the clean estimate at the first one's noise: diffusers' own loop and update."""
    scheduler = DDIMScheduler(**DDIM, prediction_type=kind, timestep_spacing=spacing)
    noise, start = torch.randn(2, 2, 3, 4, 4)
    scheduler.set_timesteps(of)
    timesteps = scheduler.timesteps[of - steps :]
    x = scheduler.add_noise(start, noise, timesteps[:1]) if steps < of else noise
    for t in timesteps:
        x = scheduler.step(bounded(x, t.expand(2)), t, x).prev_sample
    found = sample_ddim(bounded, noise, scheduler, steps, start=start, strength=steps / of)
    # Where T is no multiple of the steps, diffusers ends a step one timestep away from where it begins the next.
    close = 2e-5 if spacing == "leading" or 1000 % of == 0 else 0.02
    torch.testing.assert_close(found, x, atol=close, rtol=1e-4)


@pytest.mark.parametrize(("steps", "strength", "first"), [(1, 0.7, 699), (4, 0.3, 299), (3, 0.57, 569), (2, 1.0, 999)])
def test_every_strength_has_as_many_evaluations_as_asked_for(steps, strength, first):
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type="sample", timestep_spacing="trailing")
    seen, truth = [], torch.full((1, 1, 2, 2), 3.0)

    def predict(x, t):
        seen.append((t.item(), x.clone()))
        return truth

    noise, start = torch.randn(2, 1, 1, 2, 2)
    found = sample_ddim(predict, noise, scheduler, steps, start=start, strength=strength)
    torch.testing.assert_close(found, truth)
    assert [t for t, _ in seen] == sorted((t for t, _ in seen), reverse=True)
    assert (len(seen), seen[0][0]) == (steps, first)
    alpha_bar = ALPHA_BARS[first] if strength < 1 else 0
    expected = alpha_bar**0.5 * start.double() + (1 - alpha_bar) ** 0.5 * noise.double()
    torch.testing.assert_close(seen[0][1].double(), expected, atol=1e-5, rtol=0)


def test_a_terminal_signal_of_zero_can_be_sampled_from():
    scheduler = DDIMScheduler(
        **SCHEDULE, prediction_type="sample", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    found = sample_ddim(lambda x, t: torch.ones_like(x), torch.randn(1, 1, 2, 2), scheduler, 4)
    torch.testing.assert_close(found, torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize(
    "given", [{"strength": 0.5}, {"strength": 0, "start": torch.zeros(1)}, {"strength": 1.5}, {"strength": 0.001}]
)
def test_a_strength_that_can_not_be_is_refused(given):
    with pytest.raises(ValueError, match="strength"):
        sample_ddim(bounded, torch.zeros(1, 1, 2, 2), DDIMScheduler(**DDIM), 2, **given)
