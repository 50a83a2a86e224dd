"""Guidance: the stated sums, in as few evaluations as they need."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from terrasynth.sampling.guidance import condition_or_null, guidance_chain, guided_velocity

SCALES = [0.0, 0.5, 1.0, 1.5, 4.0]


@pytest.fixture(autouse=True)
def _fixed_numbers():
    torch.manual_seed(0)


@pytest.mark.parametrize("mask_scale", SCALES)
@pytest.mark.parametrize("text_scale", SCALES)
def test_guided_velocity_is_the_stated_sum_in_one_forward_pass(text_scale, mask_scale):
    latents, timestep = torch.randn(3, 4, 6, 6), torch.tensor([900.0, 500.0, 100.0])
    text, mask = torch.randn(3, 1, 1, 1), torch.randn(3, 1, 1, 1)
    null_text, null_mask = torch.tensor(0.3), torch.tensor(-0.2)
    calls = []

    def model(x, t, text, mask):
        return torch.tanh(x * text + mask + t.view(-1, 1, 1, 1) / 1000 + x * text * mask)

    def predict(x, t, uses):
        calls.append(len(x))
        seen = condition_or_null(uses["text"], text, null_text), condition_or_null(uses["mask"], mask, null_mask)
        return model(x, t, *seen)

    actual = guided_velocity(predict, {"text": text_scale, "mask": mask_scale})(latents, timestep)
    v_00 = model(latents, timestep, null_text, null_mask)
    v_t0 = model(latents, timestep, text, null_mask)
    v_tm = model(latents, timestep, text, mask)
    torch.testing.assert_close(actual, v_00 + text_scale * (v_t0 - v_00) + mask_scale * (v_tm - v_t0))
    needed = (text_scale != 1) + (text_scale != mask_scale) + (mask_scale != 0)
    assert calls == [3 * needed]


@pytest.mark.parametrize(
    ("text_scale", "mask_scale", "evaluations"), [(1, 1, 1), (1, 1.5, 2), (3, 3, 2), (1, 0, 1), (0, 0, 1), (3, 1.5, 3)]
)
def test_guidance_evaluates_no_more_than_it_needs(text_scale, mask_scale, evaluations):
    terms = guidance_chain({"text": text_scale, "mask": mask_scale})
    assert len(terms) == evaluations
    assert sum(term.coefficient for term in terms) == pytest.approx(1)


def test_guidance_is_left_out_outside_its_interval():
    latents, calls = torch.randn(2, 4, 6, 6), []

    def predict(x, t, uses):
        calls.append(len(x))
        return x * (1 + uses["mask"].float().view(-1, 1, 1, 1)) + uses["text"].float().view(-1, 1, 1, 1)

    velocity = guided_velocity(predict, {"text": 1, "mask": 3}, (0.2, 0.8))
    plain, guided = 2 * latents + 1, 4 * latents + 1
    for timestep, expected, images in ((801, plain, 2), (800, guided, 4), (201, guided, 4), (200, plain, 2)):
        torch.testing.assert_close(velocity(latents, torch.full((2,), float(timestep))), expected)
        assert calls.pop() == images


def test_without_guidance_the_velocity_is_the_model_itself():
    v = torch.randn(2, 4, 6, 6)
    velocity = guided_velocity(lambda x, t, uses: v, {"text": 1, "mask": 1})
    assert torch.equal(velocity(torch.zeros_like(v), torch.zeros(2)), v)


def test_condition_dropout_takes_the_null_condition_row_by_row():
    condition, null = torch.randn(3, 5, 16), torch.randn(1, 5, 16)
    dropped = condition_or_null(torch.tensor([True, False, True]), condition, null)
    assert torch.equal(dropped, torch.stack([condition[0], null[0], condition[2]]))


@pytest.mark.parametrize("scales", product([0.0, 1.0, 1.5, 9.0], repeat=3))
def test_guidance_is_a_chain_of_differences(scales):
    names = ("mask", "reference", "text")
    value = {frozenset(names[:k]): v for k, v in enumerate((0.3, -1.2, 2.5, 0.7))}
    expected = value[frozenset()]
    for k, scale in enumerate(scales):
        expected += scale * (value[frozenset(names[: k + 1])] - value[frozenset(names[:k])])
    terms = guidance_chain(dict(zip(names, scales, strict=True)))
    assert sum(term.coefficient * value[term.sees] for term in terms) == pytest.approx(expected)
    assert len(terms) == 1 + sum(a != b for a, b in zip((1.0, *scales), (*scales, 0.0), strict=True)) - 1


def test_published_guidance_is_by_text_beside_the_same_mask_and_reference():
    terms = guidance_chain({"mask": 1.0, "reference": 1.0, "text": 9.0})
    assert terms == [(-8.0, {"mask", "reference"}), (9.0, {"mask", "reference", "text"})]
