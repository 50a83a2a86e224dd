from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

from terrasynth.data.folder import Tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import Mix, SegmentorConfig, TrainConfig
from terrasynth.tasks.confusion import Confusion
from terrasynth.tasks.segmentation import Segmentor, adapt, fit, label

K = 3
IGNORE = 255
SCHEMA = LabelSchema(names=("field", "lake", "road"), colors=((90, 160, 60), (40, 70, 190), (200, 200, 200)))

UNET = SegmentorConfig(
    encoder="resnet18",
    options={"encoder_depth": 3, "decoder_channels": [32, 16, 8]},
    train=TrainConfig(
        steps=60, batch_size=4, learning_rate=3e-3, warmup_steps=5, evaluate_every=20, checkpoint_every=30, log_every=10
    ),
)
SEGFORMER = SegmentorConfig(architecture="transformers/segformer", encoder="tiny")
UPERNET = SegmentorConfig(architecture="transformers/upernet", encoder="tiny")


def with_train(config: SegmentorConfig, **changes) -> SegmentorConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def made_tiles(count: int, size: int = 32, seed: int = 0) -> Tiles:
    """Fields with a round lake and a straight road in the schema's colours, noisy, the lowest two rows unlabelled."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    images, masks = [], []
    for _ in range(count):
        mask = np.zeros((size, size), dtype=np.uint8)
        y, x = random.uniform(0.2, 0.8, 2) * size
        mask[(rows - y) ** 2 + (columns - x) ** 2 < (size / 4) ** 2] = 1
        start = int(random.integers(size - 5))
        mask[:, start : start + 5] = 2
        image = np.array(SCHEMA.colors)[mask] + random.normal(0, 15, (size, size, 3))
        mask[-2:] = IGNORE
        images.append(torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1))
        masks.append(torch.from_numpy(mask))
    return Tiles(tuple(f"made-{seed}-{i}" for i in range(count)), torch.stack(images), torch.stack(masks), SCHEMA)


def images_and_targets(batch: int = 2, height: int = 32, width: int = 32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(K, (batch, height, width), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORE
    return torch.rand(batch, 3, height, width, generator=generator, dtype=dtype), targets


def unet(seed: int = 0, **options) -> Segmentor:
    config = UNET.model_copy(update={"options": {**UNET.options, **options}})
    return Segmentor.build(config, K, IGNORE, seed, class_names=SCHEMA.names)


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        UNET,
        SegmentorConfig(architecture="fpn", encoder="tu-resnet10t", options={"encoder_depth": 4}),
        SegmentorConfig(architecture="DeepLabV3Plus", encoder="resnet18"),
        SegmentorConfig(architecture="segformer", encoder="mit_b0"),
        SEGFORMER,
        UPERNET,
    ],
    ids=lambda config: f"{config.architecture}-{config.encoder}",
)
@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_every_architecture_gives_logits_at_the_size_of_the_image(config, size):
    segmentor = Segmentor.build(config, K)
    images, targets = images_and_targets(2, *size)
    assert segmentor(images).shape == (2, K, *size)
    segmentor.train()
    segmentor.loss(images, targets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in segmentor.parameters())


def test_the_logits_are_those_of_the_plain_library_model_on_normalised_images():
    segmentor = unet()
    plain = smp.create_model("unet", "resnet18", None, classes=K, **UNET.options).eval()
    plain.load_state_dict(segmentor.network.state_dict(), strict=False)
    images, _ = images_and_targets()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = plain((images - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(segmentor(images), expected, rtol=1e-4, atol=1e-5)


def test_stages_that_the_encoder_depth_cuts_off_leave_no_weights():
    plain = smp.create_model("unet", "resnet18", None, classes=K, **UNET.options)
    cut = {name for name in plain.state_dict() if name.startswith(("encoder.layer3.", "encoder.layer4."))}
    assert set(unet().network.state_dict()) == set(plain.state_dict()) - cut


def test_an_odd_size_is_the_crop_of_the_edge_padded_image():
    segmentor = unet()
    images, _ = images_and_targets(1, 29, 35)
    padded = F.pad(images, (0, 5, 0, 3), mode="replicate")
    torch.testing.assert_close(segmentor(images), segmentor(padded)[..., :29, :35])


def test_the_seed_decides_the_initial_weights_and_leaves_the_global_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = unet(3), unet(3), unet(4)
    assert torch.equal(torch.get_rng_state(), before)
    images, _ = images_and_targets()
    assert torch.equal(first(images), again(images))
    assert not torch.equal(first(images), other(images))


def test_evaluation_mode_has_no_randomness_and_does_not_depend_on_the_rest_of_the_batch():
    segmentor = Segmentor.build(SegmentorConfig(architecture="fpn", options={"encoder_depth": 4}), K)
    images, targets = images_and_targets(4)
    assert torch.equal(segmentor.loss(images, targets, "image"), segmentor.loss(images, targets, "image"))
    alone = torch.cat([segmentor.loss(images[i : i + 1], targets[i : i + 1], "image") for i in range(4)])
    torch.testing.assert_close(segmentor.loss(images, targets, "image"), alone)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (SegmentorConfig(architecture="unett"), "unett"),
        (SegmentorConfig(encoder="resnet19"), "resnet19"),
        (SegmentorConfig(encoder="tu-nothing"), "nothing"),
        (SegmentorConfig(options={"encoder_dept": 4}), "encoder_dept"),
        (SegmentorConfig(options={"aux_params": {"classes": 4}}), "aux_params"),
        (SegmentorConfig(options={"encoder_depth": 4}), "4"),
        (SegmentorConfig(weights="nothing"), "nothing"),
        (SEGFORMER.model_copy(update={"options": {"hidden_size": [1]}}), "hidden_size"),
        (SEGFORMER.model_copy(update={"weights": "pretrained"}), "tiny"),
    ],
)
def test_an_impossible_segmentor_is_refused_with_what_is_wrong(config, found):
    with pytest.raises(TerraSynthError) as caught:
        Segmentor.build(config, K)
    assert found in str(caught.value)
    assert caught.value.fix


# --- the loss --------------------------------------------------------------------------------------------------------


def by_hand(logits, targets):
    """Loss of every pixel, and the reductions, one pixel at a time."""
    log = logits - logits.exp().sum(1, keepdim=True).log()
    losses = torch.zeros(targets.shape, dtype=torch.float64)
    image, wrong = [], []
    for b in range(len(targets)):
        all_losses, wrong_losses = [], []
        for y in range(targets.shape[1]):
            for x in range(targets.shape[2]):
                t = int(targets[b, y, x])
                if t == IGNORE:
                    continue
                losses[b, y, x] = -log[b, t, y, x]
                all_losses.append(float(losses[b, y, x]))
                if int(logits[b, :, y, x].argmax()) != t:
                    wrong_losses.append(float(losses[b, y, x]))
        image.append(sum(all_losses) / max(1, len(all_losses)))
        wrong.append(sum(wrong_losses) / (len(wrong_losses) + 1e-10))
    mean = losses.sum() / (targets != IGNORE).sum()
    return {
        "none": losses,
        "mean": mean,
        "image": torch.tensor(image, dtype=torch.float64),
        "wrong": torch.tensor(wrong, dtype=torch.float64),
    }


@pytest.mark.parametrize("reduction", ["none", "mean", "image", "wrong"])
def test_every_reduction_equals_a_sum_by_hand(reduction):
    segmentor = unet().double()
    images, targets = images_and_targets(3, 16, 16, torch.float64)
    targets[1] = IGNORE
    expected = by_hand(segmentor(images).detach(), targets)[reduction]
    loss = segmentor.loss(images, targets, reduction)
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)


def test_wrong_is_zero_where_every_pixel_is_right():
    segmentor = unet()
    images, _ = images_and_targets()
    assert torch.equal(segmentor.loss(images, segmentor.predict(images), "wrong"), torch.zeros(2))


@pytest.mark.parametrize("reduction", ["none", "mean", "image", "wrong"])
def test_without_labels_loss_and_gradient_are_zero_not_nan(reduction):
    segmentor = unet()
    images, targets = images_and_targets()
    images.requires_grad_()
    loss = segmentor.loss(images, torch.full_like(targets, IGNORE), reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    assert loss.abs().sum() == 0
    assert gradient.abs().sum() == 0


@pytest.mark.parametrize("reduction", ["mean", "image", "wrong"])
def test_the_gradient_of_the_images_equals_finite_differences_and_leaves_no_gradient_in_the_weights(reduction):
    segmentor = unet().double()
    images, targets = images_and_targets(2, 16, 16, torch.float64)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(segmentor.loss(images, targets, reduction).sum(), images)
    assert all(p.grad is None for p in segmentor.parameters())
    direction = gradient / gradient.norm()
    step = 1e-6
    with torch.no_grad():
        up, down = (segmentor.loss(images + sign * step * direction, targets, reduction).sum() for sign in (1, -1))
    assert float((up - down) / (2 * step)) == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_the_training_loss_is_cross_entropy_and_dice_by_hand():
    images, targets = images_and_targets()
    targets[:, :9] = IGNORE
    segmentor = unet()
    share, labelled = segmentor(images).double().softmax(1), targets != IGNORE
    dice = 0.0
    for k in range(segmentor.num_classes):
        true = (targets == k).double()
        predicted = share[:, k] * labelled
        overlap = 2 * (predicted * true).sum() / (predicted.sum() + true.sum())
        dice += (1 - overlap) / segmentor.num_classes if true.any() else 0.0
    expected = segmentor.loss(images, targets).double() + 0.5 * dice
    torch.testing.assert_close(segmentor.training_loss(images, targets, 0.5).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(segmentor.training_loss(images, targets), segmentor.loss(images, targets))


def test_another_ignore_index_is_respected():
    images, targets = images_and_targets()
    usual = unet()
    other = Segmentor.build(UNET, K, 7, 0)
    renamed = torch.where(targets == IGNORE, 7, targets)
    assert torch.equal(usual.loss(images, targets), other.loss(images, renamed))


# --- predict and evaluate --------------------------------------------------------------------------------------------


def test_prediction_is_the_largest_logit_and_keeps_the_mode():
    segmentor = unet()
    images, _ = images_and_targets()
    expected = segmentor(images).argmax(1)
    segmentor.train()
    prediction = segmentor.predict(images)
    assert segmentor.training
    assert prediction.dtype == torch.int64
    assert torch.equal(prediction, expected)
    assert not prediction.is_inference()


def test_evaluation_counts_every_labelled_pixel_in_whatever_batches():
    segmentor = unet()
    tiles = made_tiles(5)
    whole = segmentor.evaluate(tiles)
    assert torch.equal(whole.matrix, segmentor.evaluate(tiles, batch_size=2).matrix)
    expected = Confusion.empty(K)
    expected.update(segmentor.predict(tiles.images / 255), tiles.masks, IGNORE)
    assert torch.equal(whole.matrix, expected.matrix)
    assert int(whole.matrix.sum()) == int((tiles.masks != IGNORE).sum())


def test_tiles_of_other_classes_are_refused():
    tiles = made_tiles(1)
    swapped = replace(tiles, schema=replace(SCHEMA, names=("lake", "field", "road")))
    with pytest.raises(TerraSynthError, match="field, lake, road -> lake, field, road"):
        unet().evaluate(swapped)


# --- save and load ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [UNET, SEGFORMER, UPERNET], ids=lambda config: config.architecture)
def test_a_saved_segmentor_comes_back_bit_for_bit(tmp_path, config):
    segmentor = Segmentor.build(config, K, IGNORE, 3, class_names=SCHEMA.names)
    images, targets = images_and_targets(2, 33, 31)
    segmentor.train()
    segmentor.loss(images, targets).backward()  # moves the statistics of the batch norms
    segmentor.eval()
    segmentor.save_pretrained(tmp_path / "segmentor")
    assert sorted(path.name for path in (tmp_path / "segmentor").iterdir()) == ["config.json", "model.safetensors"]
    loaded = Segmentor.from_pretrained(tmp_path / "segmentor", schema=SCHEMA)
    assert not loaded.training
    assert loaded.class_names == SCHEMA.names
    assert torch.equal(loaded(images), segmentor(images))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "segmentor" / name).read_bytes()


def test_loading_names_what_the_labels_were_and_are(tmp_path):
    unet().save_pretrained(tmp_path)
    with pytest.raises(TerraSynthError, match="field, lake, road -> field, lake, rail"):
        Segmentor.from_pretrained(tmp_path, schema=replace(SCHEMA, names=("field", "lake", "rail")))


def test_a_damaged_folder_is_refused(tmp_path):
    unet().save_pretrained(tmp_path / "segmentor")
    weights = tmp_path / "segmentor" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(TerraSynthError, match="can not be loaded"):
        Segmentor.from_pretrained(tmp_path / "segmentor")
    weights.write_bytes(content)
    config = tmp_path / "segmentor" / "config.json"
    config.write_text(config.read_text().replace('"num_classes": 3', '"num_classes": 4'))
    with pytest.raises(TerraSynthError, match="size mismatch"):
        Segmentor.from_pretrained(tmp_path / "segmentor")
    config.write_text("{}")
    with pytest.raises(TerraSynthError, match="not the folder of a segmentor"):
        Segmentor.from_pretrained(tmp_path / "segmentor")
    with pytest.raises(TerraSynthError, match=r"no config\.json"):
        Segmentor.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("config", [SEGFORMER, UPERNET], ids=lambda config: config.architecture)
def test_a_transformers_folder_gives_sizes_or_pretrained_weights(tmp_path, config):
    source = Segmentor.build(config, 5, seed=1)
    source.network.save_pretrained(tmp_path)
    stored = config.model_copy(update={"encoder": str(tmp_path)})
    scratch = Segmentor.build(stored, K)
    pretrained = Segmentor.build(stored.model_copy(update={"weights": "pretrained"}), K)
    images, _ = images_and_targets()
    assert scratch(images).shape == pretrained(images).shape == (2, K, 32, 32)
    for name, value in source.network.named_parameters():
        if value.ndim == 4 and "classifier" not in name:
            assert torch.equal(pretrained.network.get_parameter(name), value)
            assert not torch.equal(scratch.network.get_parameter(name), value)


# --- fit -------------------------------------------------------------------------------------------------------------


def curve(folder) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["miou"] for line in lines if "miou" in line}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short training on four tiles, which are its validation too."""
    folder = tmp_path_factory.mktemp("trained")
    segmentor = Segmentor.build(UNET, K)
    outcome = fit(segmentor, made_tiles(4), made_tiles(4), UNET, folder, seed=0)
    return segmentor, outcome, folder


def test_four_tiles_are_learned_by_heart(trained):
    segmentor, outcome, _ = trained
    assert outcome.finished
    assert segmentor.class_names == SCHEMA.names
    assert segmentor.evaluate(made_tiles(4)).mean_iou > 0.9


def test_the_same_seed_gives_the_same_segmentor_bit_for_bit(trained, tmp_path):
    segmentor, _, folder = trained
    again = Segmentor.build(UNET, K)
    torch.rand(7)  # the global random state is not among the inputs
    fit(again, made_tiles(4), made_tiles(4), UNET, tmp_path, seed=0)
    assert curve(tmp_path) == curve(folder)
    images, _ = images_and_targets()
    assert torch.equal(again(images), segmentor(images))


def test_the_best_weights_on_the_validation_tiles_are_restored(tmp_path):
    # A learning rate far too high from the warm-up's end on: the last weights are not the best ones.
    config = with_train(UNET, steps=24, learning_rate=1.0, schedule="constant", warmup_steps=12, evaluate_every=4)
    segmentor = Segmentor.build(config, K)
    validation = made_tiles(3, seed=1)
    fit(segmentor, made_tiles(4), validation, config, tmp_path, seed=0)
    scores = curve(tmp_path)
    assert len(set(scores.values())) > 1
    assert segmentor.evaluate(validation).mean_iou == pytest.approx(max(scores.values()), abs=1e-6)


@pytest.mark.parametrize("config", [SEGFORMER, UPERNET], ids=lambda config: config.architecture)
def test_the_transformers_architectures_train(tmp_path, config):
    config = config.model_copy(update={"train": UNET.train.model_copy(update={"steps": 6, "evaluate_every": 3})})
    segmentor = Segmentor.build(config, K)
    assert fit(segmentor, made_tiles(4), made_tiles(2, seed=1), config, tmp_path, seed=0).finished


def test_painted_tiles_and_mixes_enter_the_batches(tmp_path, trained):
    config = with_train(UNET, steps=8, evaluate_every=4)
    arms = {
        "real": {},
        **{mix: {"mix": mix} for mix in get_args(Mix) if mix != "none"},
        "painted": {"synthetic": made_tiles(6, seed=2)},
        "both": {"synthetic": made_tiles(6, seed=2), "mix": "cutmix", "real_fraction": 0.25},
    }
    images, _ = images_and_targets()
    logits = []
    for name, options in arms.items():
        segmentor = Segmentor.build(config, K)
        fit(segmentor, made_tiles(4), made_tiles(2, seed=1), config, tmp_path / name, seed=0, **options)
        logits.append(segmentor(images))
    assert all(not torch.equal(a, b) for i, a in enumerate(logits) for b in logits[:i])


def test_the_running_statistics_are_those_of_real_tiles_alone(tmp_path):
    config = with_train(UNET, steps=3, learning_rate=1e-12, evaluate_every=3)
    painted = made_tiles(6, seed=2)
    statistics = []
    for name, factor in (("dark", 0.25), ("bright", 1.0)):
        segmentor = Segmentor.build(config, K)
        synthetic = replace(painted, images=(painted.images * factor).byte())
        fit(segmentor, made_tiles(4), made_tiles(2, seed=1), config, tmp_path / name, seed=0, synthetic=synthetic)
        norms = [m for m in segmentor.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert all(norm.momentum == 0.1 for norm in norms)
        statistics.append(torch.cat([torch.cat([norm.running_mean, norm.running_var]) for norm in norms]))
    untouched = Segmentor.build(config, K)
    first = next(m for m in untouched.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert not torch.allclose(statistics[0][: len(first.running_mean)], first.running_mean)
    torch.testing.assert_close(statistics[0], statistics[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alone", [True, False])
def test_pseudo_masks_turn_with_the_tile_and_leave_out_what_is_unsure(trained, alone):
    segmentor, tiles = trained[0], made_tiles(3)
    together = [segmentor] if alone else [segmentor, Segmentor.build(UNET, K, seed=9)]
    masks = label(together, tiles)
    turned = replace(tiles, images=tiles.images.rot90(1, (-2, -1)).flip(-1))
    assert (label(together, turned) == masks.rot90(1, (-2, -1)).flip(-1)).float().mean() > 0.999
    share = torch.zeros(3, segmentor.num_classes, 32, 32)
    with torch.no_grad():
        for flip in (False, True):
            for turns in range(4):
                x = (tiles.images.flip(-2) if flip else tiles.images).rot90(turns, (-2, -1)).float() / 255
                for reader in together:
                    back = reader.eval()(x).softmax(1).rot90(-turns, (-2, -1))
                    share += (back.flip(-2) if flip else back) / 8 / len(together)
    assert (masks == share.argmax(1)).float().mean() > 0.999
    sure = share.amax(1)
    limit = sure.median().item()
    kept = label(together, tiles, limit) != IGNORE
    assert (kept == (sure >= limit)).float().mean() > 0.99
    assert 0.4 < kept.float().mean() < 0.6


def test_pixel_losses_are_those_of_the_tiles_whatever_the_batch(trained):
    segmentor, tiles = trained[0], made_tiles(5, seed=4)
    losses = segmentor.pixel_losses(tiles, batch_size=2)
    assert (losses.dtype, losses.shape) == (torch.float32, tiles.masks.shape)
    assert (losses[tiles.masks == IGNORE] == 0).all()
    for i in range(5):
        sample = tiles.sample(i)
        with torch.no_grad():
            probabilities = segmentor.eval()(sample["image"][None])[0].double().softmax(0)
        for y, x in ((0, 0), (7, 19), (29, 31)):
            expected = -probabilities[sample["mask"][y, x], y, x].log()
            assert losses[i, y, x] == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)


def test_training_tiles_without_labels_are_refused(tmp_path):
    empty = replace(made_tiles(2), masks=torch.full((2, 32, 32), IGNORE, dtype=torch.uint8))
    with pytest.raises(TerraSynthError, match="validation tiles have no labelled pixel"):
        fit(Segmentor.build(UNET, K), made_tiles(2), empty, UNET, tmp_path, seed=0)


@pytest.mark.parametrize("count", [20, 32, 33])
def test_adapting_takes_the_statistics_of_other_images_and_no_weight(count):
    torch.manual_seed(0)
    segmentor = Segmentor.build(UNET, 3).eval()
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    weights = {name: parameter.clone() for name, parameter in segmentor.named_parameters()}
    first = next(module for module in segmentor.modules() if isinstance(module, torch.nn.BatchNorm2d))
    momentum, seen = first.momentum, []
    hook = first.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        segmentor(images.float() / 255)
    hook.remove()
    adapt(segmentor, images)
    batches = seen[0].tensor_split(max(1, count // 16))
    expected = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(first.running_mean, expected, atol=1e-5, rtol=1e-4)
    assert first.momentum == momentum
    assert not any(module.training for module in segmentor.modules())
    for name, parameter in segmentor.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_adapting_twice_is_adapting_once_where_training_drops_some():
    config = SegmentorConfig(architecture="deeplabv3plus", encoder="resnet18")
    segmentor = Segmentor.build(config, 3)
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in segmentor.modules())
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    adapt(segmentor, images)
    once = {name: value.clone() for name, value in segmentor.state_dict().items()}
    adapt(segmentor, images)
    for name, value in segmentor.state_dict().items():
        assert torch.equal(value, once[name]), name
    with pytest.raises(TerraSynthError, match="one image has no statistics"):
        adapt(segmentor, images[:1])


def test_without_batch_norms_there_is_nothing_to_adapt():
    segmentor = Segmentor.build(SEGFORMER, 3)
    for parent in list(segmentor.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, torch.nn.BatchNorm2d):
                setattr(parent, name, torch.nn.Identity())
    with pytest.raises(TerraSynthError, match="no batch norms to adapt"):
        adapt(segmentor, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
