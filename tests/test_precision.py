"""Which numbers are computed in, by the dtypes that come out."""

from __future__ import annotations

import pytest
import torch

from terrasynth.training.precision import autocast

CPU = torch.device("cpu")
QUESTIONS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def computed(precision, device=CPU):
    with autocast(device, precision):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def processor(monkeypatch, *answers):
    for question, answer in zip(QUESTIONS, answers, strict=True):
        if answer is None:
            monkeypatch.delattr(torch.cpu, question, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, question, lambda answer=answer: answer, raising=False)


@pytest.mark.parametrize("answers", [(True, True), (False, False)])
def test_a_precision_that_is_named_holds_on_every_processor(monkeypatch, answers):
    processor(monkeypatch, *answers)
    assert computed("fp32") == torch.float32
    assert computed("bf16") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("answers", "dtype"),
    [
        ((True, False), torch.bfloat16),
        ((False, True), torch.bfloat16),
        ((None, True), torch.bfloat16),  # as an older torch, which can not tell one of them
        ((False, False), torch.float32),
        ((None, None), torch.float32),
    ],
)
def test_automatic_is_bfloat16_where_the_processor_has_instructions_for_it(monkeypatch, answers, dtype):
    processor(monkeypatch, *answers)
    assert computed("auto") == dtype


@pytest.mark.parametrize(("capability", "enabled"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_automatic_asks_a_gpu_for_its_capability(monkeypatch, capability, enabled):
    processor(monkeypatch, not enabled, not enabled)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    # Without a GPU, torch switches a context for one off with a warning; what was asked for shows in its making.
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *args, enabled: asked.append((*args, enabled)))
    autocast(torch.device("cuda", 0), "auto")
    assert asked == [("cuda", torch.bfloat16, enabled)]


def test_gradients_of_weights_stay_in_float32():
    layer = torch.nn.Linear(4, 4)
    with autocast(CPU, "bf16"):
        out = layer(torch.ones(1, 4))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
