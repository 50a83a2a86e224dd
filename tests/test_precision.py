"""Which numbers are computed in, by the dtypes that come out; what may be rounded, by what does not change."""

from __future__ import annotations

import pytest
import torch

from terrasynth.data.schema import LabelSchema
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.training.precision import autocast, round_linear

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
    with pytest.raises(ValueError, match="'fp8', but there are fp32, bf16, auto"):
        computed("fp8")


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
    monkeypatch.setattr(torch, "autocast", lambda *args, enabled, **_: asked.append((*args, enabled)))
    autocast(torch.device("cuda", 0), "auto")
    assert asked == [("cuda", torch.bfloat16, enabled)]


def test_gradients_of_weights_stay_in_float32():
    layer = torch.nn.Linear(4, 4)
    with autocast(CPU, "bf16"):
        out = layer(torch.ones(1, 4))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.fixture
def extended(sd3_folder):
    def load(trainable):
        schema = LabelSchema(("land", "road", "water"), ((200, 150, 90), (90, 90, 90), (20, 60, 160)))
        torch.manual_seed(0)
        pipeline = TODSynthPipeline.from_pretrained(sd3_folder, label_schema=schema.to_dict())
        pipeline.transformer.set_trainable(trainable, lora_rank=2)
        for parameter in pipeline.transformer.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # no zero-initialised layer hides a fault
        return pipeline

    return load


def frozen(pipeline):
    return {name: p.dtype for name, p in pipeline.transformer.named_parameters() if not p.requires_grad and p.ndim == 2}


@pytest.mark.parametrize("trainable", ["image+mask", "mask", "lora"])
def test_rounded_weights_train_the_same_to_the_bit(extended, trainable):
    embeds, pooled = (x[0] for x in extended("mask").prompts([""]))
    item = {"latents": torch.randn(4, 8, 8), "mask": torch.randint(0, 3, (16, 16)).byte()}
    batch = {name: torch.stack([x, x]) for name, x in {**item, "prompt_embeds": embeds, "pooled": pooled}.items()}

    def step(rounded):
        pipeline = extended(trainable)
        if rounded:
            round_linear(pipeline.transformer)
            assert set(frozen(pipeline).values()) == {torch.bfloat16}
        with autocast(CPU, "bf16", keep_casts=not rounded):
            loss = pipeline.training_loss({**batch, "seed": torch.tensor([1, 2])})
        loss.backward()
        gradients = {name: p.grad for name, p in pipeline.transformer.named_parameters() if p.grad is not None}
        return loss, gradients

    (loss, gradients), (same, others) = step(rounded=False), step(rounded=True)
    assert torch.equal(loss, same)
    assert gradients.keys() == others.keys()
    assert sum(gradient.abs().sum() > 0 for gradient in gradients.values()) > 20
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, others[name]), name


def test_a_pipeline_that_was_placed_paints_the_same_to_the_bit(extended):
    masks = torch.randint(0, 3, (2, 32, 32))

    def paint(pipeline):
        pipeline.prompts.prepare(["", *pipeline.captions(masks)])  # before the text encoders are rounded
        return (
            pipeline,
            lambda: pipeline(masks, seeds=[1, 2], num_inference_steps=2, precision="bf16", output_type="pt").images,
        )

    _, plainly = paint(extended("mask"))
    pipeline, placed = paint(extended("mask"))
    pipeline.place("cpu", "bf16")
    assert set(frozen(pipeline).values()) == {torch.bfloat16}
    assert torch.equal(plainly(), placed())


def test_a_placed_pipeline_computes_in_what_it_was_placed_for(extended):
    masks = torch.randint(0, 3, (1, 32, 32))
    pipeline = extended("mask").place("cpu", "bf16")
    calls = ({}, {"precision": "bf16"})
    painted = [pipeline(masks, seeds=[1], num_inference_steps=2, output_type="pt", **given).images for given in calls]
    assert torch.equal(*painted)


def test_text_encoders_paint_in_what_they_were_stored_in(sd3_folder, extended, tmp_path):
    pipeline = extended("mask")
    for encoder in pipeline.text_encoders:
        encoder.to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        loaded = TODSynthPipeline.from_pretrained(tmp_path).place("cpu", precision)
        assert {p.dtype for encoder in loaded.text_encoders for p in encoder.parameters()} == {dtype}
    assert {encoder.dtype for encoder in extended("mask").place("cpu", "bf16").text_encoders} == {torch.float32}


def test_text_encoders_stay_where_they_were(extended):
    pipeline = extended("mask").place("meta", "fp32")
    assert {pipeline.transformer.device.type, pipeline.vae.device.type} == {"meta"}
    assert {encoder.device.type for encoder in pipeline.text_encoders} == {"cpu"}


def test_in_full_precision_nothing_is_rounded(extended):
    pipeline = extended("mask").place("cpu", "fp32")
    networks = (pipeline.transformer, pipeline.vae, *pipeline.text_encoders)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}


def test_text_encoders_come_to_the_card_for_new_prompts_alone(extended, monkeypatch):
    pipeline, moves = extended("mask"), []
    monkeypatch.setattr(type(pipeline.vae), "device", torch.device("cuda", 0))
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(pipeline, name)
        monkeypatch.setattr(encoder, "to", lambda device, name=name: moves.append((name, str(device))))
    pipeline.prompts(["a", "b", "a"])
    every = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert moves == [(name, device) for device in ("cuda:0", "cpu") for name in every]
    pipeline.prompts(["b", "a"])
    assert len(moves) == 6
    pipeline.prompts.prepare(["a", "c", "c"])
    assert len(moves) == 12


def test_a_prompt_is_encoded_the_same_whatever_others_are(extended):
    pipeline, texts = extended("mask"), ["a satellite image of water", "", "road", "land, road and water"]
    for embeds, pooled, text in zip(*pipeline.encode_prompts(texts), texts, strict=True):
        alone = pipeline.encode_prompts([text])
        assert torch.equal(embeds, alone[0][0])
        assert torch.equal(pooled, alone[1][0])
