import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler

from terrasynth.data.reference import reference_view
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.autoencoder import PatchPCA
from terrasynth.models.convert_ldm import load_published_tisynth
from terrasynth.recipe import TrainConfig
from terrasynth.sampling.flow import seeded_generator, seeded_noise
from terrasynth.systems.tisynth import TISynthPipeline
from terrasynth.training.loop import train

SCHEMA = LabelSchema(("land", "road", "water"), ((200, 150, 90), (90, 90, 90), (20, 60, 160)))


def small_pipeline(**changes):
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(4, 3, 4, 4), 32, mode="bilinear")
    vae = PatchPCA(latent_channels=6).fit(images * 2 - 1)
    pipeline = TISynthPipeline.from_scratch(
        vae, SCHEMA, ["a satellite image of land"], image_size=32, widths=(16, 32), heads=2, layers=1, **changes
    )
    # As after some training: no zero-initialised layer hides a fault.
    for parameter in pipeline.unet.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return pipeline.unet.eval() and pipeline


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture
def masks():
    masks = torch.randint(0, 3, (3, 32, 32))
    masks[0, :8] = 255
    return masks


@pytest.fixture
def references():
    return F.interpolate(torch.rand(3, 3, 4, 4), 32, mode="bilinear")


def paint(pipeline, masks, references, seeds, **options):
    return pipeline(
        masks, references=references, seeds=seeds, num_inference_steps=3, output_type="pt", **options
    ).images


def test_a_painting_depends_on_its_own_row_only(pipeline, masks, references):
    scales = {"text_scale": 2.0, "mask_scale": 3.0, "reference_scale": 1.5}
    together = paint(pipeline, masks, references, [5, 6, 7], **scales)
    rows = [slice(i, i + 1) for i in (2, 0, 1)]
    alone = torch.cat([paint(pipeline, masks[r], references[r], [5 + r.start], **scales) for r in rows])
    torch.testing.assert_close(together, alone[[1, 2, 0]], atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.05


def test_mask_reference_prompt_and_seed_each_change_the_painting(pipeline, masks, references):
    mask, reference = masks[:1], references[:1]
    first = paint(pipeline, mask, reference, [1])
    assert torch.equal(first, paint(pipeline, mask, reference, [1]))
    for other in (
        paint(pipeline, mask, reference, [2]),
        paint(pipeline, mask.flip(-1), reference, [1]),
        paint(pipeline, mask, 1 - reference, [1]),
        paint(pipeline, mask, None, [1]),
        paint(pipeline, mask, reference, [1], prompts=["a satellite image of water"]),
        paint(pipeline, mask, reference, [1], reference_scale=2.0),
    ):
        assert (first - other).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("timestep_free", [False, True])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (9.0, 1.0, 1.0), (3.0, 1.5, 2.0), (2.0, 2.0, 2.0)])
def test_what_is_computed_once_an_image_changes_nothing(masks, references, timestep_free, scales):
    """Against the network called afresh for every term of the guidance and in every step."""
    pipeline = small_pipeline(timestep_free=timestep_free)
    text_scale, mask_scale, reference_scale = scales
    embeds, null = (pipeline.prompts(texts)[0] for texts in (pipeline.captions(masks), [""]))
    code, no_code = (pipeline.encode_masks(m) for m in (masks, torch.full_like(masks, 255)))
    latents = pipeline.encode_images(references)

    def network(x, t, text, mask, reference):
        return pipeline.unet(x, t, text, mask=mask, reference=reference).sample

    cached = pipeline.epsilon(masks, None, references, *scales)
    for timestep in (981, 501, 1):
        x, t = torch.randn(3, 6, 8, 8), torch.full((3,), timestep)
        nothing = network(x, t, null.expand_as(embeds), no_code, torch.zeros_like(latents))
        by_mask = network(x, t, null.expand_as(embeds), code, torch.zeros_like(latents))
        by_both = network(x, t, null.expand_as(embeds), code, latents)
        everything = network(x, t, embeds, code, latents)
        expected = nothing + mask_scale * (by_mask - nothing) + reference_scale * (by_both - by_mask)
        expected += text_scale * (everything - by_both)
        torch.testing.assert_close(cached(x, t), expected, atol=1e-5 * max(scales), rtol=0)


def evaluations(pipeline, masks, references, **options):
    """How many images each encoder, hint and denoiser of the network saw in three steps."""
    counts = {}
    unet = pipeline.unet
    parts = {"denoiser": unet.conv_out, "mask": unet.mask_encoder.conv_in, "hint": unet.mask_hint.conv_out}
    parts |= {"reference": unet.reference_encoder.conv_in, "reference hint": unet.reference_hint.conv_out}
    hooks = [
        part.register_forward_hook(
            lambda module, given, output, name=name: counts.__setitem__(name, counts.get(name, 0) + len(output))
        )
        for name, part in parts.items()
    ]
    paint(pipeline, masks, references, [1, 2, 3], **options)
    for hook in hooks:
        hook.remove()
    return counts


def test_nothing_is_computed_twice(pipeline, masks, references):
    hints = {"hint": 4, "reference hint": 4}  # three images and no condition, whatever the number of steps
    plain = {"mask_scale": 1.0}
    assert evaluations(pipeline, masks, references, **plain) == {"denoiser": 9, "mask": 9, "reference": 9} | hints
    guided = {"text_scale": 2.0, "mask_scale": 3.0, "reference_scale": 1.5}
    # Four terms; each encoder sees three different pairs of its condition and text.
    assert evaluations(pipeline, masks, references, **guided) == {"denoiser": 36, "mask": 27, "reference": 27} | hints
    free = small_pipeline(timestep_free=True)
    assert evaluations(free, masks, references, **guided) == {"denoiser": 36, "mask": 9, "reference": 9} | hints


def batch(pipeline, masks, references):
    embeds, _ = pipeline.prompts(pipeline.captions(masks))
    views = torch.stack([reference_view((image * 255).byte(), i) for i, image in enumerate(references)])
    return {
        "latents": pipeline.encode_images(references),
        "reference_latents": pipeline.encode_images(views),
        "mask": masks.byte(),
        "prompt_embeds": embeds,
        "seed": torch.tensor([3, 4, 2**40 + 5]),
    }


@torch.no_grad()
def test_the_loss_is_the_mean_squared_error_of_the_noise(pipeline, masks, references):
    given = batch(pipeline, masks, references)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    errors = []
    for i, seed in enumerate(given["seed"].tolist()):
        generator = seeded_generator(seed)
        t = torch.randint(1000, (), generator=generator)
        noise = torch.randn(6, 8, 8, generator=generator)[None]
        predicted = pipeline.unet(
            scheduler.add_noise(given["latents"][i : i + 1], noise, t[None]),
            t[None],
            given["prompt_embeds"][i : i + 1],
            mask=SCHEMA.to_onehot(masks[i : i + 1]),
            reference=given["reference_latents"][i : i + 1],
        ).sample
        errors.append((predicted - noise).square().mean())
    torch.testing.assert_close(pipeline.training_loss(given), torch.stack(errors).mean())


@torch.no_grad()
@pytest.mark.parametrize("condition", ["text", "mask", "reference"])
def test_a_dropped_condition_is_the_other_side_of_guidance(masks, references, condition):
    pipeline = small_pipeline()
    given = batch(pipeline, masks, references)
    whole = pipeline.training_loss(given)
    setattr(pipeline, f"{condition}_dropout", 1.0)
    dropped = pipeline.training_loss(given)
    assert not torch.isclose(dropped, whole)
    setattr(pipeline, f"{condition}_dropout", 0.0)
    nothing = {
        "text": {"prompt_embeds": pipeline.prompts([""] * 3)[0]},
        "mask": {"mask": torch.full_like(given["mask"], 255)},
        "reference": {"reference_latents": torch.zeros_like(given["latents"])},
    }
    torch.testing.assert_close(pipeline.training_loss(given | nothing[condition]), dropped)


@torch.no_grad()
def test_conditions_are_dropped_independently_and_as_often_as_asked(masks, references, monkeypatch):
    pipeline = small_pipeline()
    pipeline.text_dropout, pipeline.mask_dropout, pipeline.reference_dropout = 0.5, 0.25, 0.1
    one = {name: tensor[:1] for name, tensor in batch(pipeline, masks, references).items()}
    many = {name: tensor.expand(400, *tensor.shape[1:]) for name, tensor in one.items()}
    seen = {}

    def network(noisy, timestep, text, *, mask, reference, return_dict):
        seen["text"] = (text == one["prompt_embeds"]).flatten(1).all(1)
        seen["mask"] = mask.flatten(1).any(1)
        seen["reference"] = reference.flatten(1).any(1)
        return (noisy,)

    network.dtype = torch.float32
    pipeline.unet = network
    pipeline.training_loss(many | {"seed": torch.arange(400)})
    shares = torch.stack([seen[name] for name in ("text", "mask", "reference")]).double()
    assert (shares.mean(1) - torch.tensor([0.5, 0.75, 0.9])).abs().max() < 0.1
    assert torch.corrcoef(shares).sub(torch.eye(3)).abs().max() < 0.2


class Tiles:
    """One tile a key, as `train` reads a dataset."""

    def __init__(self, rows):
        self.rows = {name: tensor for name, tensor in rows.items() if name != "seed"}

    def __len__(self):
        return 3

    def __getitem__(self, key):
        index, _ = key
        return {name: tensor[index].detach() for name, tensor in self.rows.items()}


def test_the_training_loop_trains_every_branch_and_goes_on_after_an_interruption(masks, references, tmp_path):
    config = TrainConfig(steps=3, batch_size=2, warmup_steps=1, evaluate_every=100, checkpoint_every=1)

    def trained(folder, **stop):
        pipeline = small_pipeline()
        pipeline.text_dropout = pipeline.mask_dropout = pipeline.reference_dropout = 0.3
        tiles = Tiles(batch(pipeline, masks, references))
        return pipeline, train(pipeline.unet, pipeline.training_loss, tiles, config, folder, seed=0, **stop)

    whole, _ = trained(tmp_path / "whole")
    _, outcome = trained(tmp_path / "interrupted", max_minutes=0)
    assert outcome.step == 1
    resumed, _ = trained(tmp_path / "interrupted")
    before = dict(small_pipeline().unet.named_parameters())
    after = dict(resumed.unet.named_parameters())
    assert [name for name, tensor in after.items() if torch.equal(before[name], tensor)] == []
    assert all(torch.equal(tensor, after[name]) for name, tensor in whole.unet.named_parameters())


@pytest.mark.parametrize(("coding", "channels"), [("onehot", 3), ("bits", 2), ("grey", 3), ("ids", 3)])
def test_masks_enter_by_any_coding(coding, channels, masks, references):
    pipeline = small_pipeline(mask_coding=coding)
    code = pipeline.encode_masks(masks)
    assert code.shape == (3, channels, 32, 32)
    if coding == "ids":
        assert torch.equal(code[:, 2], masks / 255)
    else:
        assert torch.equal(code, SCHEMA.encode(masks, coding))
    assert paint(pipeline, masks, references, [1, 2, 3]).shape == (3, 3, 32, 32)


def test_a_saved_pipeline_paints_the_same(pipeline, masks, references, tmp_path):
    pipeline.save_pretrained(tmp_path)
    weights = [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert weights == []
    loaded = TISynthPipeline.from_pretrained(tmp_path)
    assert loaded.config.image_size == 32
    paintings = (paint(each, masks, references, [1, 2, 3]) for each in (loaded, pipeline))
    torch.testing.assert_close(*paintings, atol=1e-5, rtol=0)
    with pytest.raises(TerraSynthError, match="classes do not fit"):
        TISynthPipeline.from_pretrained(
            tmp_path, label_schema=LabelSchema(("a", "b"), ((1, 1, 1), (2, 2, 2))).to_dict()
        )


# On Stable Diffusion 1.5


def test_an_untrained_pipeline_on_sd15_paints_as_sd15_does(sd15, masks, references):
    folder, base = sd15
    pipeline = TISynthPipeline.from_pretrained(folder, label_schema=SCHEMA.to_dict())
    noise = seeded_noise([1, 2, 3], (4, 8, 8))
    settings = {"clip_sample": False, "set_alpha_to_one": False}
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config, **settings)
    base.set_progress_bar_config(disable=True)
    prompts = ["land", "water", "a satellite image of road"]
    options = {"num_inference_steps": 5, "output_type": "pt"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = base(prompts, latents=noise, guidance_scale=4.0, **options).images
    found = pipeline(masks, prompts, references, seeds=[1, 2, 3], text_scale=4.0, mask_scale=1.0, **options).images
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_sd15_without_a_label_schema_is_refused(sd15):
    with pytest.raises(TerraSynthError, match="label_schema"):
        TISynthPipeline.from_pretrained(sd15[0])


def test_a_base_that_predicts_something_else_is_refused(sd15):
    _, base = sd15
    parts = {name: base.components[name] for name in ("unet", "vae", "text_encoder", "tokenizer")}
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(TerraSynthError, match="v_prediction"):
        TISynthPipeline(**parts, scheduler=scheduler, label_schema=SCHEMA.to_dict())


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_model_that_can_not_be_loaded_is_one_message(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TerraSynthError, match="can not be loaded"):
        TISynthPipeline.from_pretrained(tmp_path / name)


def test_an_imported_network_paints_beside_the_parts_of_its_base(sd15, masks, references):
    from test_convert_ldm import CONFIG, published

    config = CONFIG | {"cross_attention_dim": 16, "hint_channels": (16, 32, 96)}
    unet = load_published_tisynth(published_state(published, config), config)
    parts = {name: part for name, part in sd15[1].components.items() if name in ("vae", "text_encoder", "tokenizer")}
    pipeline = TISynthPipeline(unet, sd15[1].scheduler, **parts, label_schema=SCHEMA.to_dict(), mask_coding="ids")
    assert paint(pipeline, masks, references, [1, 2, 3], text_scale=9.0, mask_scale=1.0).isfinite().all()


def published_state(published, config):
    state = published(**config)
    # The hint of an autoencoder with 4 x 4 pixels a latent has two convolutions less, so its last has another number.
    return {name.replace("hint_block.14", "hint_block.10"): tensor / 10 for name, tensor in state.items()}


# What does not fit


def test_masks_that_do_not_divide_into_latents_are_refused(pipeline):
    with pytest.raises(TerraSynthError, match="multiples of 4"):
        pipeline(torch.zeros(1, 30, 32, dtype=torch.long), seeds=[1])


@pytest.mark.parametrize("given", [{"seeds": [1, 2]}, {"seeds": [1], "prompts": ["a", "b"]}])
def test_different_numbers_of_conditions_are_refused(pipeline, masks, given):
    with pytest.raises(TerraSynthError, match="differ in number"):
        pipeline(masks[:1], **given)


def test_references_of_another_size_or_type_are_refused(pipeline, masks):
    with pytest.raises(TerraSynthError, match=r"\(3, 16, 16\)[\s\S]*\(3, 32, 32\)"):
        pipeline(masks[:1], references=torch.rand(1, 3, 16, 16), seeds=[1])
    with pytest.raises(TerraSynthError, match=r"uint8[\s\S]*divide bytes by 255"):
        pipeline(masks[:1], references=torch.zeros(1, 3, 32, 32, dtype=torch.uint8), seeds=[1])


@pytest.mark.parametrize("patch_size", [3, 16])
def test_an_autoencoder_that_the_hints_can_not_follow_is_refused(patch_size):
    with pytest.raises(TerraSynthError, match=f"{patch_size} x {patch_size}"):
        TISynthPipeline.from_scratch(PatchPCA(patch_size=patch_size), SCHEMA, [], widths=(16, 32), heads=2)


def test_an_unknown_mask_coding_is_refused():
    with pytest.raises(TerraSynthError, match="onehot, bits, grey, ids"):
        small_pipeline(mask_coding="palette")
