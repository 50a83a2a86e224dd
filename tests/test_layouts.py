"""Painting masks with the transformer that paints images under them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch.distributions import Normal
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.folder import load_synthetic, load_tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.io import weights_digest
from terrasynth.models.control import CONTROL_SCHEMES
from terrasynth.models.layout_head import LayoutHead
from terrasynth.models.mmdit import MaskMMDiT
from terrasynth.recipe import GeneratorConfig, PairsSamplingConfig, SamplingConfig
from terrasynth.sampling.categories import category_loss, category_scores, category_velocity, to_codes, to_points
from terrasynth.sampling.flow import sample_flow
from terrasynth.systems.build import build
from terrasynth.systems.fit import fit_generator
from terrasynth.systems.generate import load_pipeline
from terrasynth.systems.pairs import LayoutPainter, generate_pairs
from terrasynth.systems.todsynth import TODSynthPipeline

SCHEMA = LabelSchema(("land", "road", "water"), ((200, 150, 90), (90, 90, 90), (20, 60, 160)))
CAPTION = "a satellite image of {classes}"
SIZES = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "out_channels": 4,
    "pos_embed_max_size": 12,
    "mask_channels": 6,
}


def scrambled(model):
    """As after some training: no zero-initialised layer hides a fault."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def given(batch=2, side=8):
    return {
        "hidden_states": torch.randn(batch, 4, side, side),
        "timestep": torch.rand(batch) * 1000,
        "encoder_hidden_states": torch.randn(batch, 7, 12),
        "pooled_projections": torch.randn(batch, 10),
        "mask_latents": torch.randn(batch, 6, side, side),
    }


# The network


@torch.no_grad()
def test_the_packaged_model_that_learned_layouts_is_to_the_bit_the_same_under_given_masks():
    before, after = (TODSynthPipeline.from_pretrained("terrasynth-tiny") for _ in range(2))
    assert not before.paints_layouts
    assert after.add_layouts().paints_layouts
    new = {*after.transformer.state_dict()} - {*before.transformer.state_dict()}
    head = {f"mask_head.{name}" for name, _ in after.transformer.mask_head.named_parameters()}
    assert new == {"mask_time.0.weight", "mask_time.2.weight", "mask_out.weight", "mask_out.bias", *head}
    # Whatever they become in training.
    generator = torch.Generator().manual_seed(0)
    for name in sorted(new):
        parameter = after.transformer.get_parameter(name)
        parameter.add_(torch.randn(parameter.shape, generator=generator))
    embeds, pooled = before.encode_prompts(["a rendered image of field, water", "road"])
    inputs = {
        "hidden_states": torch.randn(2, 32, 16, 16),
        "timestep": torch.tensor([80.0, 900.0]),
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "mask_latents": before.encode_masks(torch.randint(0, 14, (2, 128, 128))),
    }
    expected = before.transformer(**inputs).sample
    assert torch.equal(after.transformer(**inputs).sample, expected)
    assert torch.equal(after.transformer(**inputs, mask_sigma=torch.zeros(2)).sample, expected)
    half_noised = after.transformer(**inputs, mask_sigma=torch.tensor([0.0, 0.5])).sample
    assert torch.equal(half_noised[0], expected[0])
    assert not torch.allclose(half_noised[1], expected[1])


@pytest.mark.parametrize("scheme", ["unified", "siamese"])
@torch.no_grad()
def test_an_untrained_readout_says_nothing_and_a_trained_one_hears_mask_noise_level_and_prompt(scheme):
    model, inputs, sigma = CONTROL_SCHEMES[scheme](**SIZES).add_layouts(1), given(), torch.tensor([0.3, 0.9])
    assert not model(**inputs, mask_sigma=sigma).layout.any()
    assert model(**inputs).layout is None
    scrambled(model)
    layout = model(**inputs, mask_sigma=sigma).layout
    assert layout.shape == inputs["mask_latents"].shape
    changes = [
        {"mask_latents": inputs["mask_latents"].flip(-1)},
        {"mask_sigma": sigma / 2},
        {"hidden_states": inputs["hidden_states"].flip(-1)},
        {"pooled_projections": torch.randn(2, 10)},
    ]
    for change in changes:
        other = model(**{**inputs, "mask_sigma": sigma, **change}).layout
        assert ((other - layout).abs().amax((1, 2, 3)) > 1e-3).all(), change.keys()


@torch.no_grad()
def test_a_token_is_read_out_where_it_lies_class_by_class():
    model = scrambled(MaskMMDiT(**SIZES).add_layouts(1))
    inputs, seen = given(), []
    model.mask_out.register_forward_hook(lambda module, arguments, result: seen.append(result))
    layout = model(**inputs, mask_sigma=torch.tensor([0.3, 0.9])).coarse
    for row in range(4):
        for column in range(4):
            token = seen[0][:, 4 * row + column].view(2, 6, 2, 2)
            assert torch.equal(layout[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2], token)


@torch.no_grad()
def test_pixels_are_told_what_those_around_say_across_tokens_and_each_class_alike():
    head, embedding = scrambled(LayoutHead(5)), torch.randn(2, 5)
    codes, context = torch.randn(2, 3, 24, 24), torch.randn(2, 3, 24, 24)
    said = head(codes, context, embedding)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(head(codes[:, order], context[:, order], embedding), said[:, order])
    for changed in (codes, context):
        before = changed[0, 1, 11, 9].item()
        changed[0, 1, 11, 9] += 1
        where = (head(codes, context, embedding) != said).nonzero()
        changed[0, 1, 11, 9] = before
        assert where.unique(dim=0)[:, :2].unique(dim=0).tolist() == [[0, 1]]
        assert where.amin(0)[2:].tolist() == [4, 2]
        assert where.amax(0)[2:].tolist() == [18, 16]
    assert ((head(codes, context, -embedding) - said).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("which", ["all", "mask"])
def test_every_new_parameter_has_a_gradient_by_the_second_step(which):
    model = MaskMMDiT(**SIZES).add_layouts(1).set_trainable(which)
    parts = ("mask_time.", "mask_out.", "mask_head.")
    new = {name: parameter for name, parameter in model.named_parameters() if name.startswith(parts)}
    optimizer = torch.optim.SGD(new.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        said = model(**given(), mask_sigma=torch.tensor([0.3, 0.9]))
        both = torch.stack([said.layout, said.coarse])
        F.mse_loss(both, torch.randn_like(both)).backward()
        optimizer.step()
    assert len(new) == 4 + 10
    for name, parameter in new.items():
        assert parameter.grad.flatten(1).abs().amax(1).min() > 0 if parameter.ndim > 1 else parameter.grad.all(), name


def test_what_pixels_say_teaches_nothing_that_tokens_say():
    model = scrambled(MaskMMDiT(**SIZES).add_layouts(1))
    said = model(**given(), mask_sigma=torch.tensor([0.3, 0.9]))
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    learns = {}
    for part in ("layout", "coarse"):
        loss = getattr(said, part).square().sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        learns[part] = {name for name, each in zip(names, gradients, strict=True) if each is not None and each.any()}
    head = {name for name in names if name.startswith("mask_head.")}
    time = {name for name in names if name.startswith("mask_time.")}  # its noise level is told to both
    assert learns["layout"] == head | time
    assert {"mask_out.weight", "mask_embed.proj.weight"} | time <= learns["coarse"]
    assert not head & learns["coarse"]


@pytest.mark.parametrize(("scheme", "blocks"), [("adapter", 3), ("controlnet", 3), ("unified", 1)])
def test_a_mask_that_no_block_updates_can_not_be_painted(scheme, blocks):
    with pytest.raises(TerraSynthError, match="can not learn to paint layouts"):
        CONTROL_SCHEMES[scheme](**{**SIZES, "num_layers": blocks}).add_layouts(1)


def test_noise_on_the_mask_of_a_model_without_layouts_is_refused():
    with pytest.raises(TerraSynthError, match="can not denoise masks"):
        MaskMMDiT(**SIZES)(**given(), mask_sigma=torch.zeros(2))
    with pytest.raises(TerraSynthError, match="masks that are not there"):
        MaskMMDiT(**SIZES).add_layouts(1)(**{**given(), "mask_latents": None}, mask_sigma=torch.zeros(2))


# The flow


def test_the_scores_are_those_of_bayes_and_the_context_is_the_prior():
    z, prior, sigma = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.95])
    probabilities = category_scores(z, sigma, prior).softmax(1)
    for b, s in enumerate(sigma.double().tolist()):
        joint = []
        for k in range(3):
            mean = torch.zeros(3, dtype=torch.float64)
            mean[k] = (1 - s) * 3**0.5
            likelihood = Normal(mean.view(3, 1, 1), s).log_prob(z[b].double()).sum(0).exp()
            joint.append(prior[b, k].double().exp() * likelihood)
        expected = torch.stack(joint) / sum(joint)
        torch.testing.assert_close(probabilities[b].double(), expected, atol=1e-5, rtol=1e-4)


def test_the_velocity_to_a_class_that_is_sure_is_noise_minus_its_point():
    codes, noise, sigma = F.one_hot(torch.tensor([[[1]], [[2]]]), 3).movedim(-1, 1), torch.randn(2, 3, 1, 1), 0.4
    points = to_points(codes.float())
    assert points[0, :, 0, 0].tolist() == [0, pytest.approx(3**0.5), 0]
    torch.testing.assert_close(to_codes(points), codes.float())
    z, level = (1 - sigma) * points + sigma * noise, torch.full((2,), sigma)
    torch.testing.assert_close(category_velocity(z, level, 100 * codes.float()), noise - points, atol=1e-5, rtol=1e-5)


def test_from_noise_the_flow_leads_to_classes_as_often_as_the_prior_has_them():
    # Pixels that know nothing of each other, so that the best context is known: the logarithm of their frequencies.
    frequencies = torch.tensor([0.6, 0.35, 0.05])
    context = frequencies.log().view(1, 3, 1, 1).expand(1, 3, 200, 200)

    def velocity(z, timestep):
        sigma = timestep / 1000
        return category_velocity(z, sigma, category_scores(z, sigma, context))

    z = sample_flow(velocity, torch.randn(1, 3, 200, 200), FlowMatchEulerDiscreteScheduler(shift=1.0), 100)
    found = torch.bincount(z.argmax(1).flatten(), minlength=3) / 200**2
    # Four standard deviations of the rarest are 0.0044; the steps of Euler add their own.
    torch.testing.assert_close(found, frequencies, atol=0.01, rtol=0)
    assert (to_codes(z).amax(1) > 0.9).float().mean() > 0.95


def test_the_loss_is_the_mean_over_labelled_pixels_and_others_have_no_gradient():
    scores, masks = torch.randn(3, 4, 2, 2, requires_grad=True), torch.randint(0, 4, (3, 2, 2)).byte()
    masks[0, 0], masks[1, 0, 0], masks[2] = 255, 4, 255
    losses = category_loss(scores, masks)
    for b, mask in enumerate(masks):
        log_p = scores[b].log_softmax(0)
        each = [-log_p[int(mask[i, j]), i, j] for i in range(2) for j in range(2) if mask[i, j] < 4]
        expected = sum(each) / len(each) if each else torch.tensor(0.0)
        torch.testing.assert_close(losses[b], expected)
    losses.sum().backward()
    assert torch.equal(scores.grad.abs().amax(1) > 0, masks < 4)


# The pipeline


def small_pipeline(layouts=True, blocks=2, **changes):
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(4, 3, 4, 4), 32, mode="bilinear")
    config = GeneratorConfig(width=32, heads=2, blocks=blocks, **changes)
    pipeline = TODSynthPipeline.from_scratch(config, images, SCHEMA, CAPTION, ["a satellite image of land"])
    if layouts:
        pipeline.add_layouts()
    scrambled(pipeline.transformer.eval())
    return pipeline


def some_batch(pipeline, count):
    masks = torch.randint(0, 3, (count, 32, 32))
    masks[0, :8], masks[1] = 255, 255
    embeds, pooled = pipeline.prompts([SCHEMA.caption(mask, CAPTION) for mask in masks])
    return {
        "latents": torch.randn(count, 16, 8, 8),
        "mask": masks.to(torch.uint8),
        "prompt_embeds": embeds,
        "pooled": pooled,
        "seed": torch.arange(count),
    }


def test_the_training_loss_is_that_of_a_plain_loop_over_images_and_layouts():
    pipeline = small_pipeline()
    pipeline.layout_share = pipeline.text_dropout = pipeline.mask_dropout = 0.4
    batch, kinds, losses = some_batch(pipeline, 24), [], []
    null_embeds, null_pooled = pipeline.encode_prompts([""])
    for i in range(24):
        generator, mask = torch.Generator().manual_seed(i), batch["mask"][i]
        u = torch.sigmoid(torch.randn((), generator=generator))
        noise = torch.randn(16, 8, 8, generator=generator)
        text, drop_mask = torch.rand(2, generator=generator).tolist()
        layout = torch.rand(1, generator=generator).item() < 0.4 and bool((mask < 3).any())
        u_mask = torch.rand((), generator=generator)
        mask_noise = torch.randn(3, 32, 32, generator=generator)
        drop_text = text < (0.5 if layout else 0.4)
        kinds.append((layout, drop_text))
        conditions = {
            "encoder_hidden_states": null_embeds if drop_text else batch["prompt_embeds"][i : i + 1],
            "pooled_projections": null_pooled if drop_text else batch["pooled"][i : i + 1],
        }
        if layout:
            s = 12 * u_mask / (1 + 11 * u_mask)  # shift 3, and 4 pixels a latent
            z = (1 - s) * 3**0.5 * SCHEMA.to_onehot(mask) + s * mask_noise
            said = pipeline.transformer(
                noise[None],
                timestep=torch.tensor([1000.0]),
                mask_latents=F.pixel_unshuffle(z[None] / 3**0.5, 4),
                mask_sigma=s[None],
                **conditions,
            )
            bayes, labels = 3**0.5 * (1 - s) / s**2 * z, mask[None].long()
            scores = [F.pixel_shuffle(context, 4) + bayes for context in (said.layout, said.coarse)]
            losses.append(sum(F.cross_entropy(each, labels, ignore_index=255) for each in scores))
            continue
        sigma = 3 * u / (1 + 2 * u)
        seen = torch.full_like(mask, 255) if drop_mask < 0.4 else mask
        predicted = pipeline.transformer(
            ((1 - sigma) * batch["latents"][i] + sigma * noise)[None],
            timestep=1000 * sigma[None],
            mask_latents=pipeline.encode_masks(seen[None]),
            **conditions,
        ).sample[0]
        losses.append(((predicted - (noise - batch["latents"][i])) ** 2).mean())
    assert len(set(kinds)) == 4
    torch.testing.assert_close(pipeline.training_loss(batch), torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_model_that_learns_no_layouts_has_the_loss_it_had_and_unlabelled_tiles_teach_none():
    pipeline, before = small_pipeline(), small_pipeline(layouts=False)
    before.transformer.load_state_dict(pipeline.transformer.state_dict(), strict=False)
    batch = some_batch(pipeline, 4)
    assert torch.equal(pipeline.training_loss(batch), before.training_loss(batch))
    unlabelled = {name: rows[1:2] for name, rows in batch.items()}
    pipeline.layout_share = 1.0
    torch.testing.assert_close(pipeline.training_loss(unlabelled), before.training_loss(unlabelled))


@torch.no_grad()
def test_a_sample_that_teaches_its_layout_sees_no_reference():
    pipeline = small_pipeline(reference="view", blocks=3)  # what an image sees reaches the next block's masks
    batch = some_batch(pipeline, 4)
    batch = {name: rows[2:] for name, rows in batch.items()}  # those that are labelled throughout
    one, other = ({**batch, "reference_latents": torch.randn(2, 16, 8, 8)} for _ in range(2))
    pipeline.reference_dropout = pipeline.layout_share = 0.0
    assert pipeline.training_loss(one) != pipeline.training_loss(other)
    pipeline.layout_share = 1.0
    assert pipeline.training_loss(one) == pipeline.training_loss(other)


def layouts(pipeline, prompts=None, seeds=(1, 2, 3), **options):
    return pipeline.layouts(prompts, seeds=seeds, num_inference_steps=4, **options)


@torch.no_grad()
def test_a_layout_is_that_of_a_plain_loop_from_noise_beside_an_image_of_noise():
    pipeline, steps = small_pipeline(blocks=3), 5
    times = FlowMatchEulerDiscreteScheduler(shift=12.0)  # 3 of the latents, times 4 pixels a latent
    times.set_timesteps(steps)
    embeds, pooled = pipeline.encode_prompts(["water"])
    expected = []
    for seed in (4, 5):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(1, 16, 8, 8, generator=generator)
        z = torch.randn(1, 3, 32, 32, generator=generator)
        for s, after in zip(times.sigmas[:-1], times.sigmas[1:], strict=True):
            said = pipeline.transformer(
                image,
                timestep=torch.tensor([1000.0]),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                mask_latents=F.pixel_unshuffle(z / 3**0.5, 4),
                mask_sigma=s[None],
            )
            posterior = (F.pixel_shuffle(said.layout, 4) + 3**0.5 * (1 - s) / s**2 * z).softmax(1)
            z = z + (after - s) * (z - 3**0.5 * posterior) / s
        expected.append(z.argmax(1))
    painted = pipeline.layouts(["water"] * 2, seeds=[4, 5], num_inference_steps=steps)
    assert (painted == torch.cat(expected)).float().mean() > 0.999  # rounding may decide between near classes


def test_a_layout_depends_on_its_own_seed_and_prompt_and_on_nothing_else():
    pipeline, prompts = small_pipeline(), ["a satellite image of land", "", "water"]
    together = layouts(pipeline, prompts, text_scale=2.0)
    assert (together.shape, together.dtype) == ((3, 32, 32), torch.uint8)
    assert together.max() < 3
    assert torch.equal(layouts(pipeline, prompts, text_scale=2.0), together)
    for i in (2, 0, 1):
        alone = layouts(pipeline, prompts[i : i + 1], seeds=[i + 1], text_scale=2.0)
        assert (alone[0] == together[i]).float().mean() > 0.999  # rounding may decide between near classes
    assert (together[0] != together[1]).any()
    other = layouts(pipeline, ["a satellite image of water", "", "land"], text_scale=2.0)
    assert (other != together).flatten(1).any(1).tolist() == [True, False, True]
    assert torch.equal(layouts(pipeline), layouts(pipeline, [""] * 3, text_scale=5.0))


def test_what_is_saved_paints_the_same_layouts(tmp_path):
    pipeline = small_pipeline()
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert again.paints_layouts
    assert torch.equal(layouts(again), layouts(pipeline))


@torch.no_grad()
def test_classes_known_by_name_are_read_out_as_before_whatever_their_order():
    pipeline, inputs = small_pipeline(), {"timestep": torch.full((2,), 1000.0), "mask_sigma": torch.tensor([0.5, 0.9])}
    z, inputs["hidden_states"] = torch.randn(2, 3, 32, 32), torch.randn(2, 16, 8, 8)
    inputs["encoder_hidden_states"], inputs["pooled_projections"] = pipeline.encode_prompts(["land", "water"])

    def context(z):
        said = pipeline.transformer(**inputs, mask_latents=F.pixel_unshuffle(z, 4))
        return F.pixel_shuffle(torch.cat([said.layout, said.coarse]), 4)

    before = context(z)
    pipeline.adapt(LabelSchema(("water", "lagoon", "land", "road"), ((1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4))))
    after = context(torch.stack([z[:, 2], torch.zeros(2, 32, 32), z[:, 0], z[:, 1]], dim=1))
    torch.testing.assert_close(after[:, [2, 3, 0]], before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after[2:, 1], before[2:].mean(1), atol=1e-4, rtol=1e-4)
    assert layouts(pipeline).max() <= 3


def test_what_can_not_paint_layouts_says_what_to_do(tmp_path):
    pipeline = small_pipeline(layouts=False)
    with pytest.raises(TerraSynthError, match=r"can not paint layouts[\s\S]*generator.layouts"):
        layouts(pipeline)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(TerraSynthError, match="can not paint layouts"):
        generate_pairs(tmp_path, tmp_path / "painted", PairsSamplingConfig(), count=1)
    with pytest.raises(TerraSynthError, match=r"can not learn to paint layouts[\s\S]*bits"):
        small_pipeline(layouts=False, mask_coding="bits").add_layouts()
    with pytest.raises(TerraSynthError, match="differ in number"):
        layouts(small_pipeline(), ["land"])
    with pytest.raises(TerraSynthError, match="is one text"):
        layouts(small_pipeline(), "abc")
    with pytest.raises(TerraSynthError, match="no seeds"):
        layouts(small_pipeline(), seeds=[])


def test_a_model_of_layouts_without_the_weights_for_them_is_refused(tmp_path):
    small_pipeline().save_pretrained(tmp_path)
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    save_file({name: each for name, each in load_file(file).items() if "mask_head" not in name}, file)
    with pytest.raises(TerraSynthError, match=r"transformer: the model lacks weights\n.*mask_head.*and 7 more"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": "tisynth", "reference": "view", "heads": 4}, "system: todsynth"),
        ({"mask_coding": "bits"}, "mask_coding: onehot"),
        ({"control": "adapter"}, "unified or siamese"),
        ({"blocks": 1}, "at least 2 blocks"),
    ],
)
def test_recipes_whose_generator_could_not_learn_layouts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(layouts=0.5, **changes)


def test_some_samples_are_left_to_learn_images_from():
    with pytest.raises(ValueError, match="less than 1"):
        GeneratorConfig(layouts=1.0)


def test_what_learns_no_layouts_has_the_identity_it_had():
    assert "layouts" not in GeneratorConfig().identity()
    assert GeneratorConfig(layouts=0.5).identity()["layouts"] == 0.5


# Training and datasets


@pytest.fixture(scope="module")
def tiles(tiny_recipe):
    return load_tiles(tiny_recipe.data, "train")


@pytest.fixture(scope="module")
def trained(tiny_recipe, tiles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_recipe.generator.model_copy(update={"layouts": 0.5})
    assert fit_generator(tiles, config, tiny_recipe.data, tiny_recipe.sampling, folder).finished
    return folder


def test_a_trained_generator_is_shown_with_its_layouts_and_paints_none_if_trained_on_without(
    trained, tiles, tiny_recipe, tmp_path
):
    names = {path.name for path in (trained / "previews").iterdir()}
    assert {"layouts-00000006.png", "step-00000006.png"} <= names
    pipeline = load_pipeline(trained / "model")
    assert pipeline.paints_layouts
    assert pipeline.transformer.mask_out.weight.any(), "it starts at zero"
    further = tiny_recipe.generator.model_copy(update={"base": str(trained / "model")})
    pipeline = build(further, tiny_recipe.data, tiles)
    assert not pipeline.paints_layouts
    pipeline.save_pretrained(tmp_path)
    assert not load_pipeline(tmp_path).paints_layouts
    pipeline = build(further.model_copy(update={"layouts": 0.5}), tiny_recipe.data, tiles)
    assert pipeline.layout_share == 0.5
    assert pipeline.transformer.mask_out.weight.requires_grad


def test_masks_and_images_are_painted_in_the_precision_that_is_asked_for(trained, monkeypatch):
    asked = []
    for name in ("__call__", "layouts"):
        method = getattr(TODSynthPipeline, name)

        def noted(*arguments, method=method, **options):
            asked.append(options["precision"])
            return method(*arguments, **options)

        monkeypatch.setattr(TODSynthPipeline, name, noted)
    LayoutPainter(load_pipeline(trained / "model"), SamplingConfig(steps=1))(seeds=[1], num_steps=1, precision="bf16")
    assert asked == ["bf16", "bf16"]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dataset_of_painted_layouts_and_images_under_them(trained, tmp_path):
    model, how = trained / "model", PairsSamplingConfig(steps=3, batch_size=2)
    images = SamplingConfig(steps=2, mask_scale=1.0)
    whole = generate_pairs(model, tmp_path / "whole", how, count=3, images=images, seed=3)
    painted = load_synthetic(whole)
    assert len(painted) == 3
    assert painted.masks.max() < 6
    asked = ["--set", "pairs.sampling.steps=3", "--set", "pairs.sampling.batch_size=2", "--set", "sampling.steps=2"]
    command = ["generate", str(model), "--pairs", "3", "--out", str(tmp_path / "command"), "--seed", "3", *asked]
    result = CliRunner().invoke(app, [*command, "--set", "sampling.mask_scale=1.0"])
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "command") == files(whole)
    with pytest.raises(TerraSynthError, match="another run"):
        generate_pairs(model, whole, how, count=3, images=SamplingConfig(steps=3), seed=3)
    shares = how.model_copy(update={"shares": {"road": 0.5}})
    with pytest.raises(TerraSynthError, match="can not be asked for shares"):
        generate_pairs(model, tmp_path / "asked", shares, count=1, images=images)


def test_a_recipe_whose_generator_learns_layouts_paints_pairs_with_it(trained, tiny_recipe, tmp_path):
    """It trains what is not trained yet, asks the generator and not `pairs`, and paints what its model paints."""
    values = tiny_recipe.model_dump(mode="json")
    values["generator"]["layouts"] = 0.5
    values["pairs"]["sampling"] |= {"steps": 3, "batch_size": 2}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    command = ["generate", str(tmp_path / "mine.yaml"), "--run", str(run), "--pairs", "3", "--seed", "3"]
    refused = CliRunner().invoke(app, [*command, "--set", "pairs.sampling.shares={road: 0.2}"])
    assert "can not be asked for shares" in refused.output
    assert not [*run.glob("generator-*")], "told before it is trained"
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    (model,) = run.glob("*/model")
    assert model.parent.name.startswith("generator-")
    assert weights_digest(model) == weights_digest(trained / "model"), "trained by the recipe as in Python"
    how, images = PairsSamplingConfig(steps=3, batch_size=2), tiny_recipe.sampling
    expected = generate_pairs(trained / "model", tmp_path / "expected", how, count=3, images=images, seed=3)
    assert first.stdout.split() == [str(model.parent / "synthetic")]
    assert files(model.parent / "synthetic") == files(expected)
    told = CliRunner().invoke(app, ["train", *command[1:2], "--out", str(run)]).stdout
    assert f"generate {model} --masks DIR, or --pairs N" in told


# Does it learn?

HALVES = torch.tensor([[0, 0, 2, 2], [2, 2, 0, 0], [0, 2, 0, 2], [2, 0, 2, 0]])


def toy(count, seed=0):
    """Masks of 8 x 8 pixels whose quarters are half land and half water, beside each other; in a fifth, one is road."""
    generator = torch.Generator().manual_seed(seed)
    quarters = HALVES[torch.randint(4, (count,), generator=generator)]
    rare = torch.rand(count, generator=generator) < 0.2
    where = torch.randint(4, (count,), generator=generator)
    quarters[rare, where[rare]] = 1
    return quarters.view(count, 2, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)


def quarters_of(masks):
    """The class that most pixels of every quarter have, (B, 4), and the share of pixels that have it."""
    quarters = masks.long().view(-1, 2, 4, 2, 4).permute(0, 1, 3, 2, 4).reshape(-1, 4, 16)
    most = quarters.mode(-1, keepdim=True).values
    return most.squeeze(-1), (quarters == most).float().mean().item()


def test_layouts_of_a_toy_are_learned_and_so_are_images_under_them():
    masks, colors = toy(256), torch.tensor(SCHEMA.colors) / 255
    images = (colors[masks].movedim(-1, 1) + 0.03 * torch.randn(256, 3, 8, 8)).clamp(0, 1)
    config = GeneratorConfig(width=64, heads=4, blocks=3, patch_size=1)
    pipeline = TODSynthPipeline.from_scratch(config, images, SCHEMA, CAPTION, [CAPTION]).add_layouts()
    pipeline.tokenizer.model_max_length = 16
    pipeline.layout_share, pipeline.text_dropout, pipeline.mask_dropout = 0.5, 0.1, 0.1
    latents = pipeline.encode_images(images)
    embeds, pooled = pipeline.prompts(pipeline.captions(masks))
    parameters = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    steps, size, rate = 280, 32, 3e-3
    optimizer = torch.optim.AdamW(parameters, rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
    for step in range(steps):
        rows = torch.randint(256, (size,), generator=torch.Generator().manual_seed(step))
        batch = {"latents": latents[rows], "mask": masks[rows].byte(), "seed": size * step + torch.arange(size)}
        loss = pipeline.training_loss({**batch, "prompt_embeds": embeds[rows], "pooled": pooled[rows]})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    painted = pipeline.layouts(seeds=range(128), num_inference_steps=20)
    most, smooth = quarters_of(painted)
    known = {tuple(each) for each in quarters_of(toy(2000, seed=1))[0].tolist()}
    valid = sum(tuple(each) in known for each in most.tolist()) / len(most)
    shares = torch.bincount(painted.flatten(), minlength=3) / painted.numel()
    distance = (shares - torch.bincount(masks.flatten()) / masks.numel()).abs().sum().item()
    asked, unasked = (
        (quarters_of(pipeline.layouts([text] * 64, seeds=range(64), num_inference_steps=20))[0] == 1).any(1)
        for text in ("a satellite image of land, road, water", "a satellite image of land, water")
    )
    images = pipeline(painted.long(), seeds=range(128), num_inference_steps=8, mask_scale=1.0, output_type="pt").images
    nearest = torch.cdist(images.movedim(1, -1).reshape(-1, 3), colors).argmin(1).view_as(painted)
    agreement = (nearest == painted).float().mean().item()
    roads = asked.float().mean().item(), unasked.float().mean().item()
    print(f"\nlayouts that there are {valid:.2f}, pixels of their quarter's class {smooth:.3f}")
    print(f"shares {[round(share, 3) for share in shares.tolist()]}, distance from the true ones {distance:.3f}")
    print(f"with a road, asked for {roads[0]:.2f} and not {roads[1]:.2f}; nearest colours agree {agreement:.3f}")
    # Of 81 choices of three classes 20 are layouts that there are, of 16 choices of land and water 4.
    assert valid > 0.45
    assert smooth > 0.9
    assert distance < 0.15
    assert roads[0] > roads[1] + 0.3
    assert agreement > 0.85
