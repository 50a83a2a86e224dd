import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor

from terrasynth.sampling.diffusion import (
    beta,
    beta_tilde,
    clean_estimate,
    diffusion_batch,
    min_snr,
    mu_tilde,
    q_sample,
    sample_ancestral,
    sample_ddim,
)
from terrasynth.sampling.flow import seeded_generator, seeded_noise

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


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_weighted_losses_of_one_error_of_the_clean_sample_are_the_same_whatever_is_predicted(kind):
    timestep = torch.tensor([0, 100, 400, 999])
    alpha_bar = torch.from_numpy(ALPHA_BARS[timestep.numpy()])
    clean, noise, error = torch.randn(3, 4, dtype=torch.float64)
    noisy = q_sample(clean, noise, alpha_bar)

    def predicted(x_0):
        epsilon = (noisy - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        velocity = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x_0
        return {"sample": x_0, "epsilon": epsilon, "v_prediction": velocity}[kind]

    loss = (predicted(clean + error) - predicted(clean)).square()
    weight = min_snr(timestep, DDPMScheduler(**SCHEDULE, prediction_type=kind), 5.0)
    expected = (alpha_bar / (1 - alpha_bar)).clamp(max=5) * error.square()
    torch.testing.assert_close(weight.double() * loss, expected, rtol=1e-4, atol=0)


def test_where_no_signal_is_left_the_weight_of_an_error_of_the_noise_is_one():
    without = DDPMScheduler(**SCHEDULE, rescale_betas_zero_snr=True)
    assert min_snr(torch.tensor([999]), without, 5.0).tolist() == [1]


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


# Gaussian data, of which every quantity is known

KINDS = ["epsilon", "sample", "v_prediction"]
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
MU = np.array([0.5, -1.0, 0.2])
_ROOT = np.array([[0.7, 0.0, 0.0], [0.5, 0.4, 0.0], [-0.3, 0.2, 1.1]])
SIGMA = _ROOT @ _ROOT.T


def alpha_bars_of(schedule, T=1000, first=1e-4, last=0.02, zero_snr=False):
    """ᾱ in float64: Ho et al., section 4; latent diffusion; Nichol and Dhariwal, equation 17, with β at most 0.999."""
    if schedule == "squaredcos_cap_v2":
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    else:
        power = {"linear": 1, "scaled_linear": 2}[schedule]
        betas = np.linspace(first ** (1 / power), last ** (1 / power), T) ** power
    found = np.cumprod(1 - betas)
    if zero_snr:  # Lin et al. 2024, algorithm 1
        roots = np.sqrt(found)
        found = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return found


def best(kind, alpha_bars, mu=MU, sigma=SIGMA):
    """What predicts with the least error for N(μ, Σ): E[x_0 | x_t] by linear regression, and ε and v by definition."""
    eigenvalues, axes = np.linalg.eigh(sigma)

    def predict(x_t, t):
        a = alpha_bars[t.numpy()][:, None]
        x = x_t.flatten(1).double().numpy()
        gain = a**0.5 * eigenvalues / (a * eigenvalues + 1 - a)
        x_0 = mu + ((x - a**0.5 * mu) @ axes * gain) @ axes.T
        epsilon = (x - a**0.5 * x_0) / (1 - a) ** 0.5
        v = a**0.5 * epsilon - (1 - a) ** 0.5 * x_0
        return torch.from_numpy({"epsilon": epsilon, "sample": x_0, "v_prediction": v}[kind]).view(x_t.shape)

    return predict


def normal(count, generator, mu=MU, root=_ROOT):
    return torch.from_numpy(mu + generator.standard_normal((count, 3)) @ root.T).view(count, 3, 1, 1).float()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_least_simple_loss_is_that_of_the_closed_form(kind, schedule):
    """Cov(x_0 | x_t) has the eigenvalues λ (1 − ᾱ) / (ᾱ λ + 1 − ᾱ); those of ε and v follow from their definitions."""
    alpha_bars = alpha_bars_of(schedule)
    latents = normal(3000, np.random.default_rng(0))
    batch = diffusion_batch(latents, range(3000), DDPMScheduler(beta_schedule=schedule, prediction_type=kind))
    predicted = best(kind, alpha_bars)(batch.noisy, batch.timestep)
    losses = (predicted - batch.target).square().flatten(1).mean(1)
    eigenvalues, a = np.linalg.eigvalsh(SIGMA), alpha_bars[:, None]
    weight = {"sample": 1, "epsilon": a / (1 - a), "v_prediction": 1 / (1 - a)}[kind]
    by_timestep = (weight * eigenvalues * (1 - a) / (a * eigenvalues + 1 - a)).mean(1)
    # Timestep by timestep, so that the error is that of the noise alone.
    excess = losses.numpy() - by_timestep[batch.timestep.numpy()]
    error = excess.std() / 3000**0.5
    assert error < 0.04 * by_timestep.mean()
    assert abs(excess.mean()) < 4 * error


def reverse_step(alpha_bar, before, kind_of_variance, mu, sigma):
    """x_{t−1} = M x_t + c + s z, by Bayes' rule from q(x_{t−1} | x_0) and q(x_t | x_{t−1}), and E[x_0 | x_t]."""
    one, a = np.eye(3), alpha_bar / before
    gain = alpha_bar**0.5 * sigma @ np.linalg.inv(alpha_bar * sigma + (1 - alpha_bar) * one)
    if before == 1:
        return gain, mu - gain @ (alpha_bar**0.5 * mu), 0.0
    variance = 1 / (a / (1 - a) + 1 / (1 - before))
    of_x_t, of_x_0 = variance * a**0.5 / (1 - a), variance * before**0.5 / (1 - before)
    s = {"posterior": variance, "beta": 1 - a}[kind_of_variance] ** 0.5
    return of_x_t * one + of_x_0 * gain, of_x_0 * (mu - gain @ (alpha_bar**0.5 * mu)), s


def moments(sample, start_mean, start_root, steps):
    """Mean and covariance of x after each step of a sampler that is affine in its noise.

    `sample(latents, seeds, predict)` is asked for many seeds; regression on all the noise that went in gives its map.
    """
    seeds = range(4 * steps + 40)
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.cat([torch.randn(3, 1, 1, generator=g) for _ in range(steps)]) for g in streams])
    noise = noise.flatten(1).double().numpy()
    latents = start_mean + noise[:, :3] @ start_root.T
    seen = []
    final = sample(torch.from_numpy(latents).view(-1, 3, 1, 1), seeds, seen)
    inputs = np.hstack([np.ones((len(noise), 1)), noise])
    for x in [*seen[1:], final]:
        x = x.flatten(1).double().numpy()
        affine = np.linalg.lstsq(inputs, x)[0]
        np.testing.assert_allclose(inputs @ affine, x, atol=1e-5)
        yield affine[0], affine[1:].T @ affine[1:]


def spied(predict, seen):
    return lambda x, t: seen.append(x) or predict(x, t)


SHORT = {"first": 0.02, "last": 0.5, "T": 8}
STANDARD = np.zeros(3), np.eye(3)


def ancestral_moments(kind, variance, steps, mu, sigma, start=STANDARD, zero_snr=False):
    """Those of `sample_ancestral` on a chain of 8 timesteps, and ᾱ after each step."""
    alpha_bars = alpha_bars_of("linear", zero_snr=zero_snr, **SHORT)
    scheduler = DDPMScheduler(
        num_train_timesteps=8,
        beta_start=0.02,
        beta_end=0.5,
        clip_sample=False,
        prediction_type=kind,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_snr,
    )

    def sample(latents, seeds, seen):
        predict = spied(best(kind, alpha_bars, mu, sigma), seen)
        return sample_ancestral(predict, latents, scheduler, steps, seeds=seeds, variance=variance)

    visited = alpha_bars[7 :: -(8 // steps)]
    return list(moments(sample, *start, steps)), visited, [*visited[1:], 1.0]


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("steps", [8, 4, 2, 1])
@pytest.mark.parametrize(
    ("kind", "zero_snr"), [*((kind, False) for kind in KINDS), ("sample", True), ("v_prediction", True)]
)
def test_ancestral_sampling_has_the_mean_and_covariance_of_the_closed_form_after_each_step(
    kind, zero_snr, steps, variance
):
    found, visited, following = ancestral_moments(kind, variance, steps, MU, SIGMA, zero_snr=zero_snr)
    mean, covariance = np.zeros(3), np.eye(3)
    for (found_mean, found_covariance), alpha_bar, before in zip(found, visited, following, strict=True):
        M, c, s = reverse_step(alpha_bar, before, variance, MU, SIGMA)
        mean, covariance = M @ mean + c, M @ covariance @ M.T + s**2 * np.eye(3)
        np.testing.assert_allclose(found_mean, mean, atol=1e-5)
        np.testing.assert_allclose(found_covariance, covariance, atol=1e-5)


def test_beta_keeps_standard_normal_data_standard_normal():
    """Ho et al., section 3.2. The last step has no noise, so that it alone shrinks them, to α_1."""
    found, visited, _ = ancestral_moments("epsilon", "beta", 8, np.zeros(3), np.eye(3))
    for i, (mean, covariance) in enumerate(found):
        np.testing.assert_allclose(mean, np.zeros(3), atol=1e-5)
        np.testing.assert_allclose(covariance, np.eye(3) * (1 if i < 7 else visited[-1]), atol=1e-5)
    less, _, _ = ancestral_moments("epsilon", "posterior", 8, np.zeros(3), np.eye(3))
    assert all((np.diag(small) < np.diag(right)).all() for (_, small), (_, right) in zip(less, found, strict=True))


def test_the_posterior_variance_keeps_a_single_point_on_the_forward_process():
    """Ho et al., section 3.2: from q(x_T | x_0), each x_t has the distribution q(x_t | x_0)."""
    nothing = np.zeros((3, 3))
    a = alpha_bars_of("linear", **SHORT)[-1]
    start = a**0.5 * MU, (1 - a) ** 0.5 * np.eye(3)
    found, _, following = ancestral_moments("sample", "posterior", 8, MU, nothing, start)
    more, _, _ = ancestral_moments("sample", "beta", 8, MU, nothing, start)
    for (mean, covariance), (_, wide), after in zip(found, more, following, strict=True):
        np.testing.assert_allclose(mean, after**0.5 * MU, atol=1e-5)
        np.testing.assert_allclose(covariance, (1 - after) * np.eye(3), atol=1e-5)
        assert after == 1 or (np.diag(wide) > np.diag(covariance) + 0.01).all()


@pytest.mark.parametrize(("alpha_bar", "before"), [(0.9, 0.99), (0.3, 0.31), (0.01, 0.5), (0.0, 0.2), (0.7, 1.0)])
def test_the_variances_are_those_of_a_point_and_of_standard_normal_data(alpha_bar, before):
    """Of data N(0, λ), x_t has variance V = ᾱ λ + 1 − ᾱ, and x_{t−1} given x_t the variance β V_{t−1} / V_t."""
    step = 1 - alpha_bar / before
    exact = [step * (before * x + 1 - before) / (alpha_bar * x + 1 - alpha_bar) for x in np.linspace(0, 1, 5)]
    assert beta_tilde(alpha_bar, before) == pytest.approx(exact[0], rel=1e-12)
    assert beta(alpha_bar, before) == pytest.approx(exact[-1], rel=1e-12)
    assert exact == sorted(exact)
    # A step from q(x_t | x_0) to q(x_{t−1} | x_0), whatever x_0 is: mean and variance add up.
    x_0 = torch.tensor([0.3, -2.0], dtype=torch.float64)
    mean = mu_tilde(x_0, alpha_bar**0.5 * x_0, alpha_bar, before)
    torch.testing.assert_close(mean, before**0.5 * x_0)
    of_noise = mu_tilde(0 * x_0, torch.ones_like(x_0), alpha_bar, before) ** 2 * (1 - alpha_bar)
    torch.testing.assert_close(of_noise + beta_tilde(alpha_bar, before), torch.full_like(x_0, 1 - before))


@pytest.mark.parametrize(("kind", "schedule"), zip(KINDS, SCHEDULES, strict=True))
def test_ddim_converges_to_the_probability_flow_in_first_order(kind, schedule):
    """Which carries quantiles of q(x_T) to quantiles of the data: x_0 = μ + Σ^½ (ᾱ Σ + 1 − ᾱ)^−½ (x_T − √ᾱ μ)."""
    alpha_bars = alpha_bars_of(schedule)
    scheduler = DDIMScheduler(
        beta_schedule=schedule, clip_sample=False, prediction_type=kind, timestep_spacing="trailing"
    )
    a = alpha_bars[-1]
    eigenvalues, axes = np.linalg.eigh(SIGMA)
    flow = axes * np.sqrt(eigenvalues / (a * eigenvalues + 1 - a)) @ axes.T
    x = np.vstack([np.zeros(3), np.eye(3)])
    exact = MU + (x - a**0.5 * MU) @ flow
    latents, errors = torch.from_numpy(x).view(4, 3, 1, 1), []
    for steps in (50, 100, 200):
        found = sample_ddim(best(kind, alpha_bars), latents, scheduler, steps).flatten(1).double().numpy()
        errors.append(np.abs(found - exact).max())
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert orders == pytest.approx([1, 1], abs=0.02)
    assert errors[-1] < 0.011


@pytest.mark.parametrize("zero_snr", [False, True])
def test_what_is_left_of_the_data_in_the_end(zero_snr):
    """KL(q(x_T) ‖ N(0, I)) against the closed form, and that of one sample, which is 10⁻⁵ bits in section 4."""
    a = alpha_bars_of("linear", zero_snr=zero_snr)[-1]
    alpha_bar = DDPMScheduler(rescale_betas_zero_snr=zero_snr).alphas_cumprod[-1].double()
    zero, one = torch.zeros(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    of_data, of_noise = q_sample(one, zero, alpha_bar), q_sample(zero, one, alpha_bar)
    mu, sigma = torch.from_numpy(MU), torch.from_numpy(SIGMA)
    q = torch.distributions.MultivariateNormal(of_data @ mu, of_data @ sigma @ of_data.T + of_noise @ of_noise.T)
    prior = torch.distributions.MultivariateNormal(zero[0], one)
    v = a * np.linalg.eigvalsh(SIGMA) + 1 - a
    expected = (v + a * MU**2 - 1 - np.log(v)).sum() / 2
    assert torch.distributions.kl_divergence(q, prior).item() == pytest.approx(expected, rel=1e-3, abs=1e-12)
    # Bits a dimension of pixels that are uniform in [-1, 1], whose mean square is a third.
    bits = (a / 3 - a - np.log1p(-a)) / 2 / np.log(2)
    assert bits == pytest.approx(0 if zero_snr else 1e-5, rel=0.1)


# Against diffusers


@pytest.mark.parametrize(("kind", "schedule"), zip(KINDS, SCHEDULES, strict=True))
def test_noising_equals_diffusers_bit_for_bit_and_is_undone(kind, schedule):
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=kind, clip_sample=False)
    latents, seeds = torch.randn(3000, 2, 1, 1, generator=torch.Generator().manual_seed(0)), range(3000)
    noise = diffusion_batch(latents, seeds, DDPMScheduler()).target
    noisy, target, t = diffusion_batch(latents, seeds, scheduler)
    assert (t.min(), t.max()) == (0, 999)
    assert torch.equal(noisy, scheduler.add_noise(latents, noise, t))
    velocity = scheduler.get_velocity(latents, noise, t)
    assert torch.equal(target, {"epsilon": noise, "sample": latents, "v_prediction": velocity}[kind])
    for row in (t.argmin(), (t - 500).abs().argmin(), t.argmax()):
        alpha_bar = scheduler.alphas_cumprod[t[row]]
        found = clean_estimate(target[row], noisy[row], alpha_bar, scheduler)
        torch.testing.assert_close(found, latents[row], rtol=0, atol=5e-7 / alpha_bar.item() ** 0.5)


def assert_close_together(found, expected, close=2e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=close * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_ancestral_steps_are_those_of_diffusers_with_the_same_noise(kind, schedule, variance, spacing, clip):
    scheduler = DDPMScheduler(
        beta_schedule=schedule,
        prediction_type=kind,
        timestep_spacing=spacing,
        clip_sample=clip,
        variance_type={"beta": "fixed_large", "posterior": "fixed_small"}[variance],
    )
    predict, seen = best(kind, alpha_bars_of(schedule)), []
    found = sample_ancestral(
        spied(predict, seen), seeded_noise([3, 8], (3, 1, 1)), scheduler, 5, seeds=[3, 8], variance=variance
    )
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    x = randn_tensor((2, 3, 1, 1), generator=generators)
    for t, ours in zip(scheduler.timesteps, seen, strict=True):
        assert_close_together(ours, x)
        step = scheduler.step(predict(x, t.expand(2)).float(), t, x, generator=generators)
        x = step.prev_sample
    # The last one's noise is left out by diffusers only where the last timestep is 0.
    assert_close_together(found, step.pred_original_sample)
    if spacing == "leading":
        assert_close_together(found, x)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_steps_are_those_of_diffusers_with_the_same_noise(kind, schedule, eta, spacing, clip):
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type=kind, timestep_spacing=spacing, clip_sample=clip)
    predict, seen = best(kind, alpha_bars_of(schedule)), []
    noise = seeded_noise([3, 8], (3, 1, 1))
    found = sample_ddim(spied(predict, seen), noise, scheduler, 5, eta=eta, seeds=[3, 8] if eta else None)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    x = randn_tensor((2, 3, 1, 1), generator=generators)
    # From almost no signal all is fresh noise, and in float32 diffusers takes the root of a 1 − ᾱ − σ² that is but
    # rounding, on some processors below zero.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    for t, ours in zip(scheduler.timesteps, seen, strict=True):
        assert_close_together(ours, x)
        predicted = predict(x.float(), t.expand(2)).float()
        x = scheduler.step(predicted, t, x, eta, use_clipped_model_output=True, generator=generators).prev_sample
    assert_close_together(found, x)


# The two samplers


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize(("kind", "zero_snr"), [("epsilon", False), ("v_prediction", True)])
def test_ddim_with_all_of_the_noise_is_ancestral_sampling(kind, zero_snr, set_alpha_to_one):
    alpha_bars = alpha_bars_of("linear", zero_snr=zero_snr)
    scheduler = DDIMScheduler(
        clip_sample=False,
        prediction_type=kind,
        set_alpha_to_one=set_alpha_to_one,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_snr,
    )
    noise, predict = seeded_noise(range(4), (3, 1, 1)), best(kind, alpha_bars)
    ancestral = sample_ancestral(predict, noise, scheduler, 20, seeds=range(4))
    ddim = sample_ddim(predict, noise, scheduler, 20, eta=1, seeds=range(4))
    torch.testing.assert_close(ddim, ancestral, atol=1e-5, rtol=0)
    assert (ddim - sample_ddim(predict, noise, scheduler, 20)).abs().max() > 0.1


def samplers():
    yield lambda *given, **seeds: sample_ancestral(*given, variance="beta", **seeds)
    yield sample_ancestral
    yield lambda *given, **seeds: sample_ddim(*given, eta=0.5, **seeds)


@pytest.mark.parametrize("sample", samplers())
def test_a_sample_depends_on_its_own_seed_and_its_last_step_on_none(sample):
    scheduler = DDIMScheduler(**DDIM)
    noise = seeded_noise([4, 2**40, 6], (3, 2, 2))
    together = sample(bounded, noise, scheduler, 5, seeds=[4, 2**40, 6])
    alone = sample(bounded, noise[1:2], scheduler, 5, seeds=[2**40])
    torch.testing.assert_close(alone, together[1:2], atol=1e-6, rtol=1e-6)
    other = sample(bounded, noise, scheduler, 5, seeds=[4, 5, 6])
    assert [torch.equal(a, b) for a, b in zip(together, other, strict=True)] == [True, False, True]
    assert torch.equal(
        sample(bounded, noise, scheduler, 1, seeds=[1, 2, 3]), sample(bounded, noise, scheduler, 1, seeds=[4, 5, 6])
    )


def test_the_callback_of_ancestral_sampling_is_told_of_clean_estimates():
    told = []
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    found = sample_ancestral(
        lambda x, t: x / 2, torch.ones(1, 1, 2, 2), scheduler, 3, seeds=[0], callback=lambda *given: told.append(given)
    )
    assert [i for i, _ in told] == [0, 1, 2]
    assert torch.equal(told[0][1], torch.full((1, 1, 2, 2), 0.5))
    torch.testing.assert_close(told[-1][1], found)


def test_what_can_not_be_sampled_is_refused():
    x, ddpm = torch.zeros(2, 1, 2, 2), DDPMScheduler(**SCHEDULE)
    with pytest.raises(ValueError, match="beta, posterior"):
        sample_ancestral(bounded, x, ddpm, 2, seeds=[0, 1], variance="fixed_small")
    with pytest.raises(ValueError, match="1 seeds for the noise of 2"):
        sample_ancestral(bounded, x, ddpm, 2, seeds=[0])
    with pytest.raises(ValueError, match="0 seeds for the noise of 2"):
        sample_ddim(bounded, x, DDIMScheduler(**DDIM), 2, eta=0.5)
    with pytest.raises(ValueError, match="from 0 to 1"):
        sample_ddim(bounded, x, DDIMScheduler(**DDIM), 2, eta=1.5, seeds=[0, 1])
    with pytest.raises(ValueError, match="no signal is left"):
        sample_ancestral(
            bounded,
            x,
            DDPMScheduler(**SCHEDULE, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            2,
            seeds=[0, 1],
        )
    with pytest.raises(ValueError, match="thresholding"):
        sample_ancestral(bounded, x, DDPMScheduler(**SCHEDULE, thresholding=True), 2, seeds=[0, 1])
