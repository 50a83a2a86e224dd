from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch.nn import functional

from terrasynth.errors import TerraSynthError
from terrasynth.recipe import SteeringConfig
from terrasynth.sampling.flow import FlowStep, sample_flow, seeded_noise
from terrasynth.sampling.rectify import ControlRectify

PUBLISHED = Path(__file__).parent / "fixtures" / "published_crfm"
FIRST = FlowStep(0, 23, 0.9)


# The published step


def small_autoencoder() -> AutoencoderKL:
    vae = AutoencoderKL.from_config(json.loads((PUBLISHED / "vae_config" / "config.json").read_text()))
    vae.load_state_dict(load_file(PUBLISHED / "vae.safetensors"))
    return vae.eval()


def decoder(vae: AutoencoderKL):
    def decode(latents):
        images = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)

    return decode


def segment(images, weight, bias):
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=images.dtype).view(2, 3, 1, 1)
    return functional.conv2d((images - mean) / std, weight, bias, padding=1)


def wrong_pixel_loss(logits, target):
    pixel_losses = functional.cross_entropy(logits, target, ignore_index=255, reduction="none")
    wrong = (target != 255) & (logits.argmax(1) != target)
    return (wrong * pixel_losses).sum((1, 2)) / (wrong.sum((1, 2)) + 1e-10)


@pytest.mark.parametrize(
    ("output", "settings"),
    [
        ("rectified_plain", {"normalise": "none"}),
        ("rectified_l2", {"normalise": "unit"}),
        ("rectified_l2_synth", {"normalise": "unit", "blend": True}),
    ],
)
def test_rectification_equals_the_published_code(output, settings):
    numbers = load_file(PUBLISHED / "rectify.safetensors")

    def loss(images, target):
        logits = segment(images, numbers["segmentor_weight"], numbers["segmentor_bias"])
        return wrong_pixel_loss(logits, target) / len(images)  # the published loss is a mean over the batch

    rectify = ControlRectify(loss, numbers["target"], strength=0.2, schedule="constant", clamp=1.0, **settings)
    step = FlowStep(0, 23, numbers["sigmas"][0].item())
    actual = rectify(numbers["velocity"], numbers["latents"], step, decoder(small_autoencoder()))
    torch.testing.assert_close(actual, numbers[output], rtol=0, atol=1e-5)
    assert not torch.allclose(numbers["velocity"].clamp(-1, 1), numbers[output], rtol=0, atol=1e-4)


# The gradient


def linear_decoder(dtype=torch.float64):
    matrix = torch.randn(3 * 6 * 6, 2 * 4 * 4, generator=torch.Generator().manual_seed(0), dtype=dtype) / 6
    return matrix, lambda latents: (latents.flatten(1) @ matrix.T).view(-1, 3, 6, 6)


def quadratic_loss(images, targets):
    return (images - targets).square().sum((1, 2, 3)) / 2


def random_case(batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    latents, velocity = torch.randn(2, batch, 2, 4, 4, generator=generator, dtype=dtype)
    return latents, velocity, torch.randn(batch, 3, 6, 6, generator=generator, dtype=dtype)


def closed_form_gradient(matrix, latents, velocity, targets, sigma):
    """∂/∂v ½‖D(z − σv) − y‖² = −σ Dᵀ (D(z − σv) − y)."""
    residual = (latents - sigma * velocity).flatten(1) @ matrix.T - targets.flatten(1)
    return (-sigma * residual @ matrix).view_as(latents)


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("normalise", ["none", "unit", "velocity"])
def test_linear_decoder_and_quadratic_loss_give_the_closed_form(normalise, blend):
    (matrix, decode), (latents, velocity, targets) = linear_decoder(), random_case()
    rectify = ControlRectify(
        quadratic_loss, targets, strength=0.3, schedule="constant", normalise=normalise, blend=blend
    )
    direction = closed_form_gradient(matrix, latents, velocity, targets, 0.9)
    if normalise != "none":
        direction = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    if normalise == "velocity":
        direction = direction * velocity.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = (0.7 if blend else 1) * velocity - 0.3 * direction
    torch.testing.assert_close(rectify(velocity, latents, FIRST, decode), expected, rtol=1e-9, atol=1e-9)


def test_gradient_through_autoencoder_and_segmentor_equals_finite_differences():
    numbers = {
        name: x.double() if x.is_floating_point() else x
        for name, x in load_file(PUBLISHED / "rectify.safetensors").items()
    }
    decode, velocity, latents = decoder(small_autoencoder().double()), numbers["velocity"], numbers["latents"]

    def loss(images, target):
        logits = segment(images, numbers["segmentor_weight"], numbers["segmentor_bias"])
        return functional.cross_entropy(logits, target, ignore_index=255, reduction="none").mean((1, 2))

    rectify = ControlRectify(loss, numbers["target"], strength=1.0, schedule="constant", normalise="none")
    gradient = velocity - rectify(velocity, latents, FIRST, decode)

    def along(direction, h=1e-6):
        with torch.no_grad():
            ahead, behind = (
                loss(decode(latents - 0.9 * (velocity + s * h * direction)), numbers["target"]) for s in (1, -1)
            )
        return (ahead - behind) / (2 * h)

    for seed in range(4):
        direction = seeded_noise([seed, seed], velocity.shape[1:]).double()
        torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), along(direction), rtol=1e-5, atol=1e-8)


def test_parameters_get_no_gradient_and_none_is_computed():
    vae, computed = small_autoencoder().requires_grad_(True), []
    for parameter in vae.parameters():
        parameter.register_hook(computed.append)
    velocity, latents = seeded_noise([0], (4, 8, 8)).requires_grad_(), seeded_noise([1], (4, 8, 8)).requires_grad_()
    rectify = ControlRectify(lambda images, targets: images.square().mean((1, 2, 3)), None)
    rectified = rectify(velocity, latents, FIRST, decoder(vae))
    assert not torch.equal(rectified, velocity)
    assert not computed
    assert all(leaf.grad is None for leaf in [velocity, latents, *vae.parameters()])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_found_where_the_caller_has_switched_them_off(context):
    (_, decode), (latents, velocity, targets) = linear_decoder(), random_case()
    rectify = ControlRectify(quadratic_loss, targets)
    expected = rectify(velocity, latents, FIRST, decode)
    with context():
        actual = rectify(velocity * 1, latents * 1, FIRST, decode)
    assert torch.equal(actual, expected)
    assert not actual.requires_grad


# Images and batches


@pytest.mark.parametrize("normalise", ["none", "unit", "velocity"])
def test_strength_does_not_depend_on_the_batch_size(normalise):
    (_, decode), (latents, velocity, targets) = linear_decoder(), random_case(batch=4)
    together = ControlRectify(quadratic_loss, targets, normalise=normalise)(velocity, latents, FIRST, decode)
    for i in range(4):
        one = slice(i, i + 1)
        alone = ControlRectify(quadratic_loss, targets[one], normalise=normalise)
        torch.testing.assert_close(alone(velocity[one], latents[one], FIRST, decode), together[one])


@pytest.mark.parametrize("normalise", ["none", "unit", "velocity"])
def test_images_without_a_wrong_pixel_stay_unchanged(normalise):
    numbers = load_file(PUBLISHED / "rectify.safetensors")
    decode, velocity, latents = decoder(small_autoencoder()), numbers["velocity"], numbers["latents"]

    def loss(images, target):
        logits = segment(images, numbers["segmentor_weight"], numbers["segmentor_bias"])
        return wrong_pixel_loss(logits, target)

    with torch.no_grad():
        images = decode(latents - 0.9 * velocity)
    target = segment(images, numbers["segmentor_weight"], numbers["segmentor_bias"]).argmax(1)
    target[1] = (target[1] + 1) % 5
    rectify = ControlRectify(loss, target, normalise=normalise, blend=True, clamp=1.0)
    rectified = rectify(velocity, latents, FIRST, decode)
    assert torch.equal(rectified[0], velocity[0])
    assert rectified[1].isfinite().all()
    assert not torch.equal(rectified[1], velocity[1])


def test_a_loss_reduced_over_the_batch_is_refused():
    (_, decode), (latents, velocity, targets) = linear_decoder(), random_case()
    rectify = ControlRectify(lambda images, targets: quadratic_loss(images, targets).mean(), targets)
    with pytest.raises(TerraSynthError, match="one value per image"):
        rectify(velocity, latents, FIRST, decode)


# Schedule and settings


@pytest.mark.parametrize(
    ("schedule", "step_sizes"),
    [
        ("constant", [0.1, 0.1, 0.1, 0.1]),
        ("increasing", [0.1 / 23, 0.2 / 23, 0.3 / 23, 0.4 / 23]),
        ("decreasing", [0.0957, 0.0913, 0.0870, 0.0826]),
    ],
)
def test_step_sizes_follow_the_schedule(schedule, step_sizes):
    rectify = ControlRectify(quadratic_loss, None, schedule=schedule)
    assert [rectify.step_size(FlowStep(i, 23, 0.9)) for i in range(4)] == pytest.approx(step_sizes, abs=5e-5)


def test_only_the_first_steps_are_rectified():
    (_, decode), (latents, velocity, targets) = linear_decoder(), random_case()
    rectify = ControlRectify(quadratic_loss, targets, steps=4)
    changed = [not torch.equal(rectify(velocity, latents, FlowStep(i, 23, 0.9), decode), velocity) for i in range(23)]
    assert changed == [True] * 4 + [False] * 19


def test_repeats_equal_rectifying_again():
    (_, decode), (latents, velocity, targets) = linear_decoder(), random_case()
    once = ControlRectify(quadratic_loss, targets)
    twice = once(once(velocity, latents, FIRST, decode), latents, FIRST, decode)
    assert torch.equal(ControlRectify(quadratic_loss, targets, repeats=2)(velocity, latents, FIRST, decode), twice)


def test_with_velocity_normalisation_the_strength_is_relative():
    (_, decode), (latents, velocity, targets) = linear_decoder(), random_case()
    rectify = ControlRectify(quadratic_loss, targets, strength=0.2, schedule="constant", normalise="velocity")
    change = rectify(velocity, latents, FIRST, decode) - velocity
    torch.testing.assert_close(change.flatten(1).norm(dim=1), 0.2 * velocity.flatten(1).norm(dim=1))


def test_clamp_is_off_unless_asked_for():
    (_, decode), (latents, velocity, targets) = linear_decoder(), random_case()
    velocity = 3 * velocity
    assert ControlRectify(quadratic_loss, targets)(velocity, latents, FIRST, decode).abs().max() > 1
    assert ControlRectify(quadratic_loss, targets, clamp=1.0)(velocity, latents, FIRST, decode).abs().max() == 1


def test_settings_are_those_of_the_recipe():
    config = SteeringConfig()
    settings = config.model_dump(exclude={"wrong_pixels_only"})
    rectify = ControlRectify(quadratic_loss, None, **settings)
    assert settings == {f.name: getattr(rectify, f.name) for f in fields(rectify) if f.name not in {"loss", "targets"}}
    assert all(f.default == settings[f.name] for f in fields(rectify) if f.name in settings)


# With the sampler


def test_steering_lowers_the_loss_of_the_sample_and_leaves_the_input_alone():
    (_, decode), (_, _, targets) = linear_decoder(torch.float32), random_case(dtype=torch.float32)
    noise, scheduler = seeded_noise([0, 1, 2], (2, 4, 4)), FlowMatchEulerDiscreteScheduler(shift=3.0)
    untouched = noise.clone()

    def velocity(latents, timestep):
        return torch.tanh(latents) + 0.5

    def paint(**options):
        return quadratic_loss(decode(sample_flow(velocity, noise, scheduler, 23, **options)), targets)

    plain = paint()
    losses = [
        paint(steering=ControlRectify(quadratic_loss, targets, steps=steps), decode=decode) for steps in (0, 4, 12)
    ]
    assert torch.equal(losses[0], plain)
    assert (losses[1] < plain).all()
    assert (losses[2] < losses[1]).all()
    assert torch.equal(noise, untouched)


def test_a_steered_sample_does_not_depend_on_its_batch():
    vae, numbers = small_autoencoder(), load_file(PUBLISHED / "rectify.safetensors")
    targets = torch.randint(0, 5, (3, 16, 16), generator=torch.Generator().manual_seed(0))

    def loss(images, target):
        logits = segment(images, numbers["segmentor_weight"], numbers["segmentor_bias"])
        return wrong_pixel_loss(logits, target)

    def paint(rows):
        steering = ControlRectify(loss, targets[rows], steps=2, strength=0.3)
        noise = seeded_noise(rows, (4, 8, 8))
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return sample_flow(lambda x, t: torch.tanh(x), noise, scheduler, 4, steering=steering, decode=decoder(vae))

    together = paint([0, 1, 2])
    torch.testing.assert_close(paint([2, 0]), together[[2, 0]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(paint([1]), together[[1]], rtol=1e-4, atol=1e-4)
