import json
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch.utils.flop_counter import FlopCounterMode

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.autoencoder import encode_images
from terrasynth.models.guidance_net import GuidanceNet
from terrasynth.models.label_codes import LabelCodes
from terrasynth.models.snap import snap
from terrasynth.models.unet import Features, decode, encode
from terrasynth.recipe import TrainConfig
from terrasynth.sampling.flow import seeded_generator, seeded_noise
from terrasynth.systems.idgbr import IDGBRPipeline, decide
from terrasynth.training.loop import train
from test_convert_idgbr import published

SCHEMA = LabelSchema(("land", "road", "water"), ((200, 150, 90), (90, 90, 90), (20, 60, 160)))
SMALL = {"widths": (8,), "guidance_width": 8, "image_size": 16, "patch_size": 2, "snap_rounds": 0}
LAYOUTS = pytest.mark.parametrize("conditions", ["joint", "separate"])


def shaken(pipeline):
    """As after some training: no zero-initialised layer hides a fault."""
    torch.manual_seed(1)
    for parameter in pipeline.network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    pipeline.network.eval()
    return pipeline


def small_pipeline(schema=SCHEMA, **changes):
    return shaken(IDGBRPipeline.from_scratch(schema, **SMALL | changes))


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture
def images():
    return F.interpolate(torch.rand(3, 3, 4, 4), 16, mode="bilinear")


@pytest.fixture
def rough():
    rough = torch.randint(0, 3, (3, 4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    rough[0, :3] = 255
    return rough


def batch(images, rough):
    mask = rough.roll(1, 2)
    mask[1, 5:9] = 255
    return {"image": images, "rough": rough, "mask": mask, "seed": torch.tensor([3, 4, 2**40 + 5])}


# Refinement


def test_a_refinement_depends_on_its_own_row_only(pipeline, images, rough):
    options = {"num_steps": 3, "strength": 0.7, "guidance_scale": 1.5}
    together = pipeline.scores(images, rough, seeds=[5, 6, 7], **options)
    rows = [slice(i, i + 1) for i in (2, 0, 1)]
    alone = torch.cat([pipeline.scores(images[r], rough[r], seeds=[5 + r.start], **options) for r in rows])
    torch.testing.assert_close(together, alone[[1, 2, 0]], atol=1e-4, rtol=0)
    assert together.shape == (3, 3, 16, 16)
    assert 0 <= together.min() < together.max() <= 1


def test_image_rough_map_and_seed_each_change_the_scores(pipeline, images, rough):
    def scores(images, rough, seed, **options):
        return pipeline.scores(images[1:2], rough[1:2], seeds=[seed], num_steps=2, **options)

    first = scores(images, rough, 1)
    assert torch.equal(first, scores(images, rough, 1))
    for other in (
        scores(images, rough, 2),
        scores(1 - images, rough, 1),
        scores(images, rough.flip(1), 1),
        scores(images, rough, 1, strength=0.5),
        scores(images, rough, 1, guidance_scale=2.0),
    ):
        assert (first - other).abs().max() > 1e-3


def test_without_the_rough_map_the_image_alone_is_seen(images, rough):
    for conditions in ("joint", "separate"):
        blind = small_pipeline(sees_rough=False, conditions=conditions)
        assert blind.rough_start == 0
        maps = [blind.scores(images, given, seeds=[1, 2, 3], num_steps=1) for given in (rough, rough.flip(1))]
        assert torch.equal(*maps)
        assert (maps[0] - blind.scores(1 - images, rough, seeds=[1, 2, 3], num_steps=1)).abs().max() > 1e-3


@contextmanager
def computed_as_released(pipeline):
    """Everything in every step, and by whole U-Nets of diffusers' with and without guidance."""

    def denoiser(images, rough, guidance_scale, of_image=None):
        text = pipeline._text(len(images))

        def predict(x, timestep):
            residuals = pipeline.guidance_net(encode(pipeline.unet, x, timestep, text), pipeline.read(images, rough))
            added = {
                "down_block_additional_residuals": residuals.skips,
                "mid_block_additional_residual": residuals.middle,
            }
            seen, unseen = (pipeline.unet(x, timestep, text, **more).sample for more in (added, {}))
            if pipeline.config.corrects:
                seen = seen + pipeline.start_of(rough)
            return unseen + guidance_scale * (seen - unseen)

        return predict

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "denoiser", denoiser)
        yield


def evaluations(pipeline, run):
    """How many images each encoder, the guidance and the decoder see."""
    counts = {}
    parts = {"encoder": pipeline.unet.conv_in, "decoder": pipeline.unet.conv_out}
    parts |= {"conditions": pipeline.condition_encoder.conv_in, "guidance": pipeline.guidance_net.blocks[0]}
    hooks = [
        part.register_forward_hook(
            lambda module, given, output, name=name: counts.__setitem__(name, counts.get(name, 0) + len(output))
        )
        for name, part in parts.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return counts


@LAYOUTS
def test_what_is_computed_once_changes_nothing(conditions, images, rough):
    """Against the released way: conditions in every step, and whole U-Nets of diffusers' with and without guidance."""
    pipeline = small_pipeline(conditions=conditions)
    found = {}
    for cache in (True, False):
        for scale in (1.0, 3.0):

            def run(cache=cache, scale=scale):
                options = {"num_steps": 4, "guidance_scale": scale}
                with nullcontext() if cache else computed_as_released(pipeline):
                    found[cache, scale] = pipeline.scores(images, rough, seeds=[1, 2, 3], **options)

            counts = evaluations(pipeline, run)
            read = 3 if conditions == "joint" else 6
            if cache:
                expected = {"conditions": read, "encoder": 12, "guidance": 12, "decoder": 12 if scale == 1 else 24}
            else:
                expected = {"conditions": 4 * read, "encoder": 36, "guidance": 12, "decoder": 24}
            assert counts == expected
    for scale in (1.0, 3.0):
        torch.testing.assert_close(found[True, scale], found[False, scale], atol=1e-5, rtol=0)
        within = (found[True, scale] > 0) & (found[True, scale] < 1)
        assert within.double().mean() > 0.3  # what is cut off would be equal in any case


@torch.no_grad()
def test_refinement_needs_a_third_of_the_operations_of_the_released_code(monkeypatch):
    """Counted at the published size, where the released guidance has attention that adds nothing."""

    def operations(run):
        with FlopCounterMode(display=False) as counter:
            found = run()
        return found, counter.get_total_flops()

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, *_, **__: tensor)  # slow, and of no use here
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        x, t, text = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
        features, encoder = operations(lambda: encode(unet, x, t, text))
        _, decoder = operations(lambda: decode(unet, features, text))
        nets = [GuidanceNet(max_grid=side) for side in (64, 0)]
        guidance = [operations(partial(net, features, [features] * 2))[1] for net in nets]
    released = 25 * (2 * encoder + encoder + guidance[0] + 2 * (encoder + decoder))
    for scale, decoders, least in (("without", 1, 3.1), ("with", 2, 1.9)):
        ours = 2 * encoder + 25 * (encoder + guidance[1] + decoders * decoder)
        print(f"{scale} guidance in 25 steps: {released / 1e12:.1f} and {ours / 1e12:.1f} · 10¹²")
        assert released / ours > least


@pytest.mark.parametrize("strength", [0.25, 0.7])
def test_it_starts_from_the_rough_map_under_as_much_noise_as_asked_for(pipeline, images, rough, strength):
    seen = []
    hook = pipeline.unet.conv_in.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pipeline.scores(images, rough, seeds=[1, 2, 3], num_steps=2, strength=strength)
    hook.remove()
    bits = torch.tensor([[-1, -1], [-1, 1], [1, -1]]).float()  # of classes 0, 1, 2
    code = torch.where((rough < 3).unsqueeze(-1), bits[rough.where(rough < 3, 0)], 0).movedim(-1, 1)
    start = F.pixel_unshuffle(code, 2)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    noise = seeded_noise([1, 2, 3], (8, 8, 8))
    expected = scheduler.add_noise(start, noise, torch.full((3,), int(1000 * strength) - 1))
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], expected)


def test_only_the_band_may_change(pipeline, images, rough):
    band = torch.rand(3, 16, 16) < 0.3
    found = pipeline.refine(images, rough, seeds=[1, 2, 3], band=band)
    everywhere = pipeline.refine(images, rough, seeds=[1, 2, 3])
    assert found.dtype == torch.uint8
    assert torch.equal(found[~band], rough[~band].byte())
    assert torch.equal(found[band], everywhere[band])
    assert (everywhere != rough).any()


def test_the_highest_score_decides_and_the_rough_map_where_none_is_higher():
    scores = torch.tensor([[0.2, 0.7, 0.7], [0.5, 0.5, 0.1], [0.0, 0.0, 0.0], [0.3, 0.1, 0.2]]).T.view(1, 3, 2, 2)
    rough = torch.tensor([[[2, 1], [2, 255]]])
    assert decide(scores, rough).tolist() == [[[2, 1], [2, 0]]]
    assert decide(scores, torch.zeros(1, 2, 2)).tolist() == [[[1, 0], [0, 0]]]
    band = torch.tensor([[[True, True], [True, False]]])
    assert decide(scores, rough, band).tolist() == [[[2, 1], [2, 255]]]


@torch.no_grad()
@pytest.mark.parametrize("codes", ["bits", "onehot"])
def test_what_is_refined_is_what_follows_the_colors(codes, images, rough):
    """In refinement and in training conditions are the mean code of the shares of votes, and the map as it is."""
    rough = rough.where(rough != 255, 1)
    pipeline = small_pipeline(codes=codes, snap_rounds=3)
    table = pipeline.label_codes.table
    expected = torch.einsum("kc,bkhw->bchw", table, snap(images, rough, 3, 3))
    as_it_is = LabelCodes(3, codes).encode(rough)
    assert (expected - as_it_is).abs().max() > 0.5
    seen = []
    pipeline.condition_encoder.conv_in.register_forward_pre_hook(lambda module, given: seen.append(given[0][:, 12:]))
    pipeline.scores(images, rough, seeds=[1, 2, 3], num_steps=1)
    pipeline.training_loss(batch(images, rough))
    for labels in seen:
        torch.testing.assert_close(F.pixel_shuffle(labels, 2), torch.cat([expected, as_it_is], dim=1))
    assert len(seen) == 2


@pytest.mark.parametrize("each_class", [False, True])
def test_without_a_step_the_votes_are_the_scores(images, rough, each_class):
    pipeline, classes = small_pipeline(None if each_class else SCHEMA, snap_rounds=3), SCHEMA.num_classes
    options = {"each_class": True, "num_classes": classes} if each_class else {}
    found = pipeline.scores(images, rough, seeds=[1, 2, 3], num_steps=0, **options)
    assert torch.equal(found, snap(images, rough, classes, 3))
    assert (found.argmax(1) != rough)[rough != 255].any()


@torch.no_grad()
def test_class_by_class_the_map_of_all_classes_follows_the_colors_once(images, rough):
    rough = rough.where(rough != 255, 1)
    pipeline = small_pipeline(None, snap_rounds=3)
    seen = []
    pipeline.condition_encoder.conv_in.register_forward_pre_hook(lambda module, given: seen.append(given[0][:, 12:]))
    pipeline.scores(images, rough, seeds=[1, 2, 3], num_steps=1, each_class=True, num_classes=3)
    shares = snap(images, rough, 3, 3)
    for k, labels in enumerate(seen):
        there = (rough == k).flatten(1).any(1)
        both = [2 * shares[there, k : k + 1] - 1, 2.0 * (rough[there].unsqueeze(1) == k) - 1]
        torch.testing.assert_close(F.pixel_shuffle(labels, 2), torch.cat(both, dim=1))


def test_from_scratch_it_begins_with_the_rough_map(images, rough):
    pipeline = IDGBRPipeline.from_scratch(SCHEMA, **SMALL)
    found = pipeline.refine(images, rough, seeds=[1, 2, 3], num_steps=2)
    assert (found == rough)[rough != 255].double().mean() > 0.97
    with pytest.raises(TerraSynthError, match="corrects"):
        IDGBRPipeline(**pipeline.components, prediction_type="epsilon", patch_size=2, image_size=16, corrects=True)
    with pytest.raises(TerraSynthError, match="sees_rough false"):  # it would show what is not to be seen
        IDGBRPipeline(**pipeline.components, sees_rough=False, patch_size=2, image_size=16, corrects=True)


@LAYOUTS
def test_class_by_class_is_every_class_against_the_rest(conditions, images, rough):
    pipeline = small_pipeline(None, conditions=conditions)
    rough[1] = rough[1].where(rough[1] != 2, 0)  # so that not every map has every class
    found = pipeline.scores(images, rough, seeds=[1, 2, 3], num_steps=2, each_class=True, num_classes=5)
    assert found.shape == (3, 5, 16, 16)
    for row in range(3):
        for k in range(5):
            binary = torch.where(rough == 255, 255, (rough == k).long())[row : row + 1]
            if not (binary == 1).any():
                assert not found[row, k].any()
                continue
            alone = pipeline.scores(images[row : row + 1], binary, seeds=[row + 1], num_steps=2)[0, 1]
            torch.testing.assert_close(found[row, k], alone, atol=1e-4, rtol=0)
    refined = pipeline.refine(images, rough, seeds=[1, 2, 3], num_steps=2, each_class=True)
    assert torch.equal(refined, decide(found[:, :3], rough))
    with computed_as_released(pipeline):
        uncached = pipeline.scores(images, rough, seeds=[1, 2, 3], num_steps=2, each_class=True)
    torch.testing.assert_close(uncached, found[:, :3], atol=1e-5, rtol=0)


def test_a_map_without_a_class_stays_without(images):
    pipeline, nothing = small_pipeline(None), torch.full((3, 16, 16), 255)
    assert not pipeline.scores(images, nothing, seeds=[1, 2, 3], each_class=True, num_classes=4).any()


# Training


@torch.no_grad()
@LAYOUTS
@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_the_loss_is_the_mean_squared_error_over_labelled_pixels(conditions, prediction, images, rough):
    pipeline = small_pipeline(conditions=conditions, prediction_type=prediction)
    pipeline.condition_dropout = pipeline.rough_start = 0.0
    given = batch(images, rough)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    codes = LabelCodes(3, "bits", None if conditions == "joint" else 3)

    def patches(x):
        return F.pixel_unshuffle(x, 2)

    losses = []
    for i, seed in enumerate(given["seed"].tolist()):
        generator = seeded_generator(seed)
        torch.rand(2, generator=generator)
        t = torch.randint(1000, (), generator=generator)[None]
        mask, coarse = given["mask"][i : i + 1], rough[i : i + 1]
        truth = patches(codes.encode(torch.where(mask == 255, coarse, mask)))
        noise = torch.randn(truth.shape[1:], generator=generator)[None]
        noisy = scheduler.add_noise(truth, noise, t)
        image, labels = patches(images[i : i + 1] * 2 - 1), patches(codes.encode(coarse))
        seen = [torch.cat([image, labels], 1)] if conditions == "joint" else [image, labels]
        read = [pipeline.condition_encoder(each, torch.ones(1)) for each in seen]
        residuals = pipeline.guidance_net(encode(pipeline.unet, noisy, t), read)
        predicted = pipeline.unet(
            noisy,
            t,
            None,
            down_block_additional_residuals=residuals.skips,
            mid_block_additional_residual=residuals.middle,
        ).sample
        if prediction == "sample":  # it is the rough map's code that is corrected
            predicted = predicted + labels
        target = {"sample": truth, "epsilon": noise, "v_prediction": scheduler.get_velocity(truth, noise, t)}
        error = F.pixel_shuffle((predicted - target[prediction]).square(), 2)
        losses.append(error[(mask != 255).unsqueeze(1).expand_as(error)].mean())
    torch.testing.assert_close(pipeline.training_loss(given), torch.stack(losses).mean())


def test_ignored_pixels_carry_no_loss(pipeline, images, rough):
    given = batch(images, rough)
    seen = []
    hook = pipeline.unet.conv_out.register_forward_hook(
        lambda module, given, output: output.retain_grad() or seen.append(output)
    )
    pipeline.training_loss(given).backward()
    hook.remove()
    pipeline.network.zero_grad()
    reached = F.pixel_shuffle(seen[0].grad, 2).abs().sum(1) > 0
    assert torch.equal(reached, given["mask"] != 255)
    assert pipeline.training_loss(given | {"mask": torch.full_like(rough, 255)}) == 0


@torch.no_grad()
def test_dropped_conditions_are_the_other_side_of_guidance(images, rough):
    pipeline = small_pipeline()
    given = batch(images, rough)
    whole = pipeline.training_loss(given)
    pipeline.condition_dropout = 1.0
    dropped = pipeline.training_loss(given)
    pipeline.condition_dropout = 0.0
    for block in pipeline.guidance_net.blocks:
        block.forward = lambda noisy, condition: torch.zeros_like(noisy)
    pipeline.register_to_config(corrects=False)
    torch.testing.assert_close(pipeline.training_loss(given), dropped)
    assert not torch.isclose(dropped, whole)


@torch.no_grad()
def test_conditions_are_dropped_and_starts_are_rough_as_often_as_asked(images, rough, monkeypatch):
    pipeline = small_pipeline()
    pipeline.condition_dropout, pipeline.rough_start = 0.25, 0.5
    many = {name: tensor[2:].expand(300, *tensor.shape[1:]) for name, tensor in batch(images, rough).items()}
    many["seed"] = torch.arange(300)
    seen = {}
    pipeline.unet.conv_in.register_forward_pre_hook(lambda module, given: seen.update(noisy=given[0]))
    monkeypatch.setattr(Features, "times", lambda self, keep: seen.update(keep=keep) or self)
    pipeline.training_loss(many)

    generators = [seeded_generator(seed) for seed in range(300)]
    dropped, starts_rough = (
        torch.stack([torch.rand(2, generator=g) for g in generators]).lt(torch.tensor([0.25, 0.5])).unbind(1)
    )
    assert torch.equal(seen["keep"] == 0, dropped)
    assert abs(dropped.double().mean() - 0.25) < 0.1
    assert abs(starts_rough.double().mean() - 0.5) < 0.1
    assert abs(torch.corrcoef(torch.stack([dropped, starts_rough]).double())[0, 1]) < 0.2
    # The noise and timestep of every sample, over what it starts from.
    start = F.pixel_unshuffle(
        LabelCodes(3).encode(torch.where(starts_rough.view(-1, 1, 1), many["rough"], many["mask"])), 2
    )
    t = torch.stack([torch.randint(1000, (), generator=g) for g in generators if True])
    noise = torch.stack([torch.randn(start.shape[1:], generator=g) for g in generators])
    torch.testing.assert_close(
        seen["noisy"], DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(start, noise, t)
    )


def test_rough_starts_need_a_network_that_predicts_the_clean_code(images, rough):
    pipeline = small_pipeline(prediction_type="epsilon")
    assert pipeline.rough_start == 0
    pipeline.rough_start = 0.5
    with pytest.raises(TerraSynthError, match="clean code"):
        pipeline.training_loss(batch(images, rough))


def test_a_backbone_of_a_folder_aligns_and_one_that_is_not_there_is_one_message(tmp_path):
    backbone = timm.create_model("test_resnet")
    save_for_hf(backbone, tmp_path / "backbone", safe_serialization=True)
    pipeline = IDGBRPipeline.from_scratch(SCHEMA, **SMALL).align(f"local-dir:{tmp_path / 'backbone'}", width=8)
    teacher = pipeline.alignment.teacher.state_dict()
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in backbone.state_dict().items() if name in teacher)
    assert "conv1.0.weight" in teacher
    for missing in ("no_such_backbone", f"local-dir:{tmp_path / 'nowhere'}"):
        with pytest.raises(TerraSynthError, match=f"(?s){missing}: the model can not be loaded.*of timm"):
            pipeline.align(missing)


def test_alignment_is_added_to_the_loss_and_trains_a_projector(images, rough):
    pipeline = small_pipeline()
    given = batch(images, rough)
    plain = pipeline.training_loss(given)
    assert pipeline.align("test_resnet", 0.25, pretrained=False, width=8) is pipeline
    seen = []
    pipeline.alignment.register_forward_hook(lambda module, given, output: seen.append((given, output)))
    total = pipeline.training_loss(given)
    (features, shown), losses = seen[0]
    assert features.shape == (3, 8, 8, 8)
    assert torch.equal(shown, images)
    torch.testing.assert_close(total, plain + 0.25 * losses.mean())
    total.backward()
    assert all(parameter.grad.any() for parameter in pipeline.network["projector"].parameters())
    assert not any("teacher" in name for name, _ in pipeline.network.named_parameters())


def test_alignment_ends_after_as_many_steps_as_asked_for(images, rough):
    pipeline = small_pipeline()
    given = batch(images, rough)
    plain = pipeline.training_loss(given)
    pipeline.align("test_resnet", 0.25, steps=2, pretrained=False, width=8)
    for step, ends in ((0, False), (1, False), (2, True), (9, True)):
        total = pipeline.training_loss(given | {"step": step})
        assert torch.isclose(total, plain) == ends
    total.backward()
    assert all(parameter.grad is not None for parameter in pipeline.network["projector"].parameters())


class Tiles:
    """One tile a key, as `train` reads a dataset."""

    def __init__(self, rows):
        self.rows = {name: tensor for name, tensor in rows.items() if name != "seed"}

    def __len__(self):
        return 3

    def __getitem__(self, key):
        index, _ = key
        return {name: tensor[index] for name, tensor in self.rows.items()}


def test_the_training_loop_trains_every_parameter_and_goes_on_after_an_interruption(images, rough, tmp_path):
    config = TrainConfig(steps=3, batch_size=2, warmup_steps=1, evaluate_every=100, checkpoint_every=1)

    def untrained():
        # Two channels in a group: of one, the norm would take away what a bias adds.
        return IDGBRPipeline.from_scratch(SCHEMA, **SMALL | {"widths": (16,)}).align(
            "test_resnet", pretrained=False, width=8
        )

    def trained(folder, **stop):
        torch.manual_seed(2)
        pipeline = untrained()
        tiles = Tiles(batch(images, rough))
        return pipeline, train(pipeline.network, pipeline.training_loss, tiles, config, folder, seed=0, **stop)

    whole, _ = trained(tmp_path / "whole")
    _, outcome = trained(tmp_path / "interrupted", max_minutes=0)
    assert outcome.step == 1
    resumed, _ = trained(tmp_path / "interrupted")
    torch.manual_seed(2)
    before, after = dict(untrained().network.named_parameters()), dict(resumed.network.named_parameters())
    assert [name for name, tensor in after.items() if torch.equal(before[name], tensor)] == []
    assert all(torch.equal(tensor, after[name]) for name, tensor in whole.network.named_parameters())


def squares(count, generator):
    """Bright squares on dark ground, under noise; their masks, and rough maps in which they are moved by up to 2 px."""
    size = torch.randint(6, 12, (count, 1, 1), generator=generator)
    place = torch.randint(3, 10, (2, count, 1, 1), generator=generator)
    move = torch.randint(-2, 3, (2, count, 1, 1), generator=generator)
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")

    def draw(top, left):
        return ((y >= top) & (y < top + size) & (x >= left) & (x < left + size)).long()

    mask, rough = draw(*place), draw(*(place + move))
    images = 0.3 + 0.4 * mask.unsqueeze(1) + 0.1 * torch.randn(count, 3, 24, 24, generator=generator)
    return images.clamp(0, 1), rough, mask


@pytest.mark.parametrize(("corrects", "steps", "left"), [(False, 70, 1 / 3), (True, 140, 2 / 3)])
def test_it_learns_to_mend_boundaries_and_from_the_rough_map_as_well_as_from_noise(corrects, steps, left):
    """By the network alone, without votes, which mend nearly all of these maps; to correct is learned more slowly."""
    pipeline = IDGBRPipeline.from_scratch(widths=(32,), guidance_width=16, image_size=24, snap_rounds=0)
    pipeline.register_to_config(corrects=corrects)
    generator, rate = torch.Generator().manual_seed(0), 4e-3
    optimizer = torch.optim.AdamW(pipeline.network.parameters(), lr=rate, fused=True)
    for step in range(steps):
        images, rough, mask = squares(16, generator)
        seeds = torch.arange(16) + 16 * step
        optimizer.zero_grad()
        pipeline.training_loss({"image": images, "rough": rough, "mask": mask, "seed": seeds}).backward()
        torch.nn.utils.clip_grad_norm_(pipeline.network.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    pipeline.network.eval()
    images, rough, mask = squares(48, torch.Generator().manual_seed(1))
    before = (rough != mask).double().mean()

    def error(**sampling):
        return (pipeline.refine(images, rough, seeds=range(48), **sampling) != mask).double().mean()

    from_noise = error(num_steps=2)
    print(f"wrong pixels: rough {before:.2%}, refined {from_noise:.2%}")
    assert from_noise < before * left
    # Without training on rough starts it is worse by a third from little noise.
    for num_steps, strength in ((1, 0.15), (1, 0.5), (2, 0.5), (4, 0.5)):
        found = error(num_steps=num_steps, strength=strength)
        print(f"  {num_steps} steps at strength {strength}: {found:.2%}")
        assert found < 1.15 * from_noise


# As files


@pytest.mark.parametrize(
    "changes",
    [{}, {"conditions": "separate", "codes": "onehot"}, {"schema": None, "codes": "learned", "sees_rough": False}],
)
def test_a_saved_pipeline_refines_the_same(changes, images, rough, tmp_path):
    pipeline = small_pipeline(**changes)
    pipeline.save_pretrained(tmp_path)
    weights = [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert weights == []
    loaded = IDGBRPipeline.from_pretrained(tmp_path)
    assert loaded.config.image_size == 16
    assert loaded.rough_start == pipeline.rough_start
    assert set(loaded.network) == set(pipeline.network) == {"unet", "guidance_net", "condition_encoder"}
    given = rough.clamp(max=1)
    scores = (each.scores(images, given, seeds=[1, 2, 3], num_steps=2) for each in (loaded, pipeline))
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)


def test_whether_it_refines_class_by_class_is_stored_and_was_so_without_names_before(images, rough, tmp_path):
    pipeline = small_pipeline(None)
    assert pipeline.config.each_class
    assert not small_pipeline().config.each_class
    pipeline.save_pretrained(tmp_path)
    assert IDGBRPipeline.from_pretrained(tmp_path).config.each_class
    stored = tmp_path / "model_index.json"
    before = json.loads(stored.read_text())
    del before["each_class"]
    stored.write_text(json.dumps(before))
    assert IDGBRPipeline.from_pretrained(tmp_path).config.each_class
    stored.write_text(json.dumps(before | {"each_class": False}))
    with pytest.raises(TerraSynthError, match="loads with `each_class=True`"):
        IDGBRPipeline.from_pretrained(tmp_path).scores(images, rough, seeds=[1, 2, 3], each_class=True)
    two = LabelSchema(("a", "b"), ((1, 1, 1), (2, 2, 2))).to_dict()
    with pytest.raises(TerraSynthError, match="2 classes with names"):
        IDGBRPipeline.from_pretrained(tmp_path, label_schema=two, each_class=True)


def test_other_classes_than_the_models_are_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    two = LabelSchema(("a", "b"), ((1, 1, 1), (2, 2, 2))).to_dict()
    with pytest.raises(TerraSynthError, match="classes do not fit"):
        IDGBRPipeline.from_pretrained(tmp_path, label_schema=two)


@pytest.mark.parametrize("codes", ["bits", "onehot", "learned"])
@pytest.mark.parametrize("patch_size", [1, 4])
def test_pixels_lose_nothing_on_the_way_to_codes_and_back(codes, patch_size, rough):
    pipeline = IDGBRPipeline.from_scratch(SCHEMA, **SMALL | {"codes": codes, "patch_size": patch_size})
    known = rough.clamp(max=2)
    assert torch.equal(pipeline.round_trip(known), known.byte())


def test_a_refiner_from_scratch_has_five_million_parameters_and_costs_15_gflop_a_training_step():
    pipeline = IDGBRPipeline.from_scratch()
    count = sum(parameter.numel() for parameter in pipeline.network.parameters())
    for part in pipeline.network.values():
        part.to("meta")
    x, condition, t = (torch.empty(1, *shape, device="meta") for shape in ((16, 64, 64), (80, 64, 64), ()))
    with FlopCounterMode(display=False) as counter:
        found = encode(pipeline.unet, x, t)
        decode(pipeline.unet, found.plus(pipeline.guidance_net(found, [pipeline.condition_encoder(condition, t)])))
    operations = 3 * counter.get_total_flops()  # a backward pass is two forward passes
    print(f"{count / 1e6:.2f} million parameters, {operations / 1e9:.1f} · 10⁹ operations")
    assert 4.5e6 < count < 5.5e6
    assert operations < 15e9


# On Stable Diffusion 1.5


@pytest.fixture
def sd15_maps():
    rough = torch.randint(0, 3, (2, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return torch.rand(2, 3, 32, 32), rough


@torch.no_grad()
def test_on_sd15_conditions_add_nothing_at_first_and_only_a_joint_encoder_trains(sd15, sd15_maps):
    folder, base = sd15
    images, rough = sd15_maps
    text = base.encode_prompt([""] * 2, "cpu", 1, False)[0]
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([900, 20])
    for conditions in ("separate", "joint"):
        pipeline = IDGBRPipeline.from_pretrained(
            folder, label_schema=SCHEMA.to_dict(), conditions=conditions, image_size=32
        )
        assert pipeline.config.prediction_type == "epsilon"
        predict = pipeline.denoiser(images, pipeline.label_codes.encode(rough))
        torch.testing.assert_close(predict(x, t), base.unet(x, t, text).sample, atol=1e-5, rtol=0)
        trains = {name for name, part in pipeline.components.items() if trains_at_all(part)}
        assert trains == {"unet", "guidance_net"} | ({"condition_encoder"} if conditions == "joint" else set())
        assert trains == set(pipeline.network)
        read = pipeline.read(images, pipeline.label_codes.encode(rough))
        assert len(read) == (2 if conditions == "separate" else 1)
        # The copy sees the image as the base's U-Net does; of a joint one, the rough map weighs nothing yet.
        latents = encode_images(base.vae, images)
        expected = encode(base.unet, latents, torch.ones(2), text)
        torch.testing.assert_close(read[0].middle, expected.middle, atol=1e-5, rtol=0)


def trains_at_all(part):
    return isinstance(part, torch.nn.Module) and any(p.requires_grad for p in part.parameters())


def test_on_sd15_it_trains_saves_and_refines_in_latents(sd15, sd15_maps, tmp_path):
    images, rough = sd15_maps
    pipeline = IDGBRPipeline.from_pretrained(
        sd15[0], label_schema=SCHEMA.to_dict(), prediction_type="sample", image_size=32
    )
    shaken(pipeline)
    mask = rough.clone()
    mask[:, :9, :9] = 255
    given = {"image": images, "rough": rough, "mask": mask, "seed": torch.tensor([1, 2])}
    pipeline.condition_dropout = 0.0
    pipeline.training_loss(given).backward()
    gradients = [name for name, p in pipeline.network.named_parameters() if p.grad is not None and p.grad.any()]
    assert {name.split(".")[0] for name in gradients} == {"unet", "guidance_net"}
    # Of the latents, those that see a pixel without a label carry no loss.
    weight = pipeline._weight(mask < 3, torch.zeros(2, 4, 8, 8))
    assert weight[0, 0].tolist() == [[0.0] * 3 + [1.0] * 5] * 3 + [[1.0] * 8] * 5

    assert pipeline.round_trip(rough).shape == rough.shape
    options = {"seeds": [1, 2], "num_steps": 2, "strength": 0.5, "guidance_scale": 2.0}
    found = pipeline.scores(images, rough, **options)
    with computed_as_released(pipeline):
        released = pipeline.scores(images, rough, **options)
    torch.testing.assert_close(found, released, atol=1e-4, rtol=0)
    pipeline.save_pretrained(tmp_path)
    loaded = IDGBRPipeline.from_pretrained(tmp_path)
    assert loaded.config.trains_conditions is False
    torch.testing.assert_close(loaded.scores(images, rough, **options), found, atol=1e-4, rtol=0)


# The released layout


def released_run(sd15, folder, finished):
    """A run of the released code on a small Stable Diffusion, with random weights."""
    _, base = sd15
    unet = UNet2DConditionModel.from_config(base.unet.config)
    unet.save_pretrained(folder / "unet_gen")
    (folder / "interact_net").mkdir()
    (folder / "label_embed_net").mkdir()
    channels, grids = (16, 16, 16, 32, 32), (4, 4, 2, 2, 2)
    weights = published(channels, grids)
    save_file(weights, folder / "interact_net" / "diffusion_pytorch_model.safetensors")
    table = {"embedding_table.weight": torch.randn(4, 3), "embedding_conv.0.bias": torch.zeros(128)}
    save_file(table, folder / "label_embed_net" / "diffusion_pytorch_model.safetensors")
    if finished:
        base.save_pretrained(folder)
        (folder / "unet").rename(folder / "unet_ori")
    return unet, weights, table["embedding_table.weight"]


@torch.no_grad()
@pytest.mark.parametrize(("finished", "sees_rough"), [(True, True), (False, True), (True, False)])
def test_a_released_run_is_computed_as_released(sd15, sd15_maps, tmp_path, finished, sees_rough):
    """From the images on: ImageNet's statistics, Stable Diffusion's encoder at timestep 1, the guidance, the U-Net.

    Without the rough map, the same encoder reads zeros in place of its latents.
    """
    folder, base = sd15
    images, rough = sd15_maps
    unet, weights, table = released_run(sd15, tmp_path, finished)
    pipeline = IDGBRPipeline.from_published(
        tmp_path, None if finished else folder, label_schema=SCHEMA.to_dict(), sees_rough=sees_rough
    )
    torch.testing.assert_close(pipeline.label_codes.table, 2 / (1 + torch.exp(-table[:3])) - 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    text = base.encode_prompt([""] * 2, "cpu", 1, False)[0]

    def latents(pixels):
        return base.vae.encode(pixels).latent_dist.mode() * base.vae.config.scaling_factor

    codes = pipeline.label_codes.encode(rough)
    shown = [latents((images - mean) / std), latents(codes) if sees_rough else torch.zeros(2, 4, 8, 8)]
    read = [encode(base.unet, of_it, torch.ones(2), text) for of_it in shown]
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 20])
    found = encode(unet, x, t, text)
    residuals = pipeline.guidance_net(found, read)
    assert torch.equal(pipeline.guidance_net.blocks[1].conv.weight, weights["attn_blocks_down.1.conv.weight"])
    seen = unet(
        x,
        t,
        text,
        down_block_additional_residuals=residuals.skips,
        mid_block_additional_residual=residuals.middle,
    ).sample
    unseen = unet(x, t, text).sample
    predicted = pipeline.denoiser(images, codes, 3.0)(x, t)
    torch.testing.assert_close(predicted, unseen + 3 * (seen - unseen), atol=1e-3, rtol=1e-4)
    assert pipeline.network.keys() == {"unet", "guidance_net"}
    assert (pipeline.config.each_class, pipeline.config.sees_rough) == (False, sees_rough)
    again = pipeline.denoiser(images, pipeline.label_codes.encode(rough.flip(-1)), 3.0)(x, t)
    assert torch.equal(again, predicted) != sees_rough


def test_a_checkpoint_without_its_base_is_one_message(sd15, tmp_path):
    released_run(sd15, tmp_path, finished=False)
    with pytest.raises(TerraSynthError, match="can not be loaded"):
        IDGBRPipeline.from_published(tmp_path)


# What does not fit


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": torch.rand(3, 3, 8, 16)}, "not RGB images"),
        ({"images": torch.zeros(3, 3, 16, 16, dtype=torch.uint8)}, "divide bytes by 255"),
        ({"images": torch.rand(3, 3, 15, 16), "rough": torch.zeros(3, 15, 16)}, "multiples of 2"),
        ({"seeds": [1]}, "differ in number"),
        ({"rough": torch.full((3, 16, 16), 3)}, "does not know"),
        ({"band": torch.ones(3, 8, 8) > 0}, "band does not fit"),
        ({"each_class": True}, "refiner of one class against the rest"),
    ],
)
def test_what_does_not_fit_is_refused(pipeline, images, rough, given, message):
    with pytest.raises(TerraSynthError, match=message):
        pipeline.refine(**{"images": images, "rough": rough, "seeds": [1, 2, 3]} | given)


def test_a_refiner_of_two_classes_says_how_it_refines_more(images, rough):
    with pytest.raises(TerraSynthError, match="set `each_class`"):
        small_pipeline(None).refine(images, rough, seeds=[1, 2, 3])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"conditions": "both"}, "joint, separate"),
        ({"prediction_type": "flow"}, "sample, epsilon, v_prediction"),
        ({"codes": "grey"}, "bits, onehot, learned"),
    ],
)
def test_unknown_choices_are_refused(given, message):
    with pytest.raises(TerraSynthError, match=message):
        small_pipeline(**given)


def test_other_conditions_than_the_encoders_are_refused(tmp_path):
    small_pipeline(snap_rounds=2).save_pretrained(tmp_path)
    assert IDGBRPipeline.from_pretrained(tmp_path, snap_rounds=3).config.snap_rounds == 3
    for changes in ({"snap_rounds": 0}, {"conditions": "separate"}):
        with pytest.raises(TerraSynthError, match="was made for others"):
            IDGBRPipeline.from_pretrained(tmp_path, **changes)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_model_that_can_not_be_loaded_is_one_message(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TerraSynthError, match="can not be loaded"):
        IDGBRPipeline.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(("codes", "channels"), [("bits", 2), ("onehot", 3)])
def test_other_classes_start_as_what_one_against_the_rest_has_learned(codes, channels, tmp_path):
    """Every channel is refined as that one was, if all have the same code."""
    small = {"widths": (8, 8), "patch_size": 4, "image_size": 16, "guidance_width": 8}
    one = IDGBRPipeline.from_scratch(None, **small)
    with torch.no_grad():
        for parameter in one.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    one.save_pretrained(tmp_path / "one")
    three = LabelSchema(("a", "b", "c"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)))
    many = IDGBRPipeline.from_pretrained(tmp_path / "one").adapt(three, codes)
    assert many.label_codes.channels == channels
    image, code = torch.rand(2, 3, 16, 16), torch.randn(2, 2, 16, 16)  # after votes, and as it is
    noisy = torch.randn(2, 1, 16, 16)

    def predicted(pipeline, count):
        x, rough = pipeline.encode_labels(noisy.expand(-1, count, -1, -1)), code.repeat_interleave(count, 1)
        time = torch.tensor([700, 30])
        encoded = encode(pipeline.unet, x, time, None)
        guided = encoded.plus(pipeline.guidance_net(encoded, pipeline.read(image, rough)))
        return pipeline.decode_labels(decode(pipeline.unet, guided, None))

    with torch.no_grad():
        torch.testing.assert_close(predicted(many, channels), predicted(one, 1).expand(-1, channels, -1, -1))
    many.save_pretrained(tmp_path / "many")
    again = IDGBRPipeline.from_pretrained(tmp_path / "many")
    assert (again.schema, again.config.each_class, again.num_classes) == (three, False, 3)
    with torch.no_grad():
        assert torch.equal(predicted(again, channels), predicted(many, channels))
    back = again.adapt(None)
    assert (back.schema, back.config.each_class, back.label_codes.channels) == (None, True, 1)
    with torch.no_grad():
        torch.testing.assert_close(predicted(back, 1), predicted(one, 1))


def test_other_classes_keep_the_channels_of_an_autoencoder(tmp_path):
    separate = IDGBRPipeline.from_scratch(None, conditions="separate", widths=(8, 8), image_size=16, guidance_width=8)
    weights = separate.unet.conv_in.weight.clone()
    separate.adapt(LabelSchema(("a", "b", "c"), ((1, 1, 1), (2, 2, 2), (3, 3, 3))))
    assert torch.equal(separate.unet.conv_in.weight, weights)
    with pytest.raises(TerraSynthError, match="9 classes as bits, 4 channels"):
        separate.adapt(LabelSchema(tuple("abcdefghi"), tuple((i, i, i) for i in range(1, 10))))
