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
    expected = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * batch.noise
    torch.testing.assert_close(batch.noisy.double(), expected, atol=1e-5, rtol=0)
    alone = diffusion_batch(latents[5:6], [5], DDPMScheduler(**SCHEDULE))
    assert torch.equal(alone.noisy[0], batch.noisy[5])
    many = diffusion_batch(torch.zeros(4000, 1, 1, 1), list(range(4000)), DDPMScheduler(**SCHEDULE))
    assert (many.timestep.min(), many.timestep.max()) == pytest.approx((0, 999), abs=5)
    assert abs(many.timestep.double().mean() - 499.5) < 4 * 288.7 / 4000**0.5
    assert abs(many.noise.std() - 1) < 0.05


def test_a_generator_continues_its_stream():
    generator = seeded_generator(3)
    given = diffusion_batch(torch.zeros(1, 2, 2, 2), [generator], DDPMScheduler(**SCHEDULE))
    assert torch.equal(given.noise, diffusion_batch(torch.zeros(1, 2, 2, 2), [3], DDPMScheduler(**SCHEDULE)).noise)
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
