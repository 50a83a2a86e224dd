"""Every tile is predicted by a segmentor that did not learn from it, and no work is done twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from terrasynth.data.folder import Tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import SegmentorConfig, TrainConfig
from terrasynth.tasks import folds
from terrasynth.tasks.confusion import Confusion
from terrasynth.tasks.folds import RoughMaps, divide, out_of_fold
from terrasynth.tasks.segmentation import Segmentor, fit
from terrasynth.training import checkpoint, units
from terrasynth.training.units import Clock, OutOfTime

SCHEMA = LabelSchema(names=("field", "lake"), colors=((90, 160, 60), (40, 70, 190)))
CONFIG = SegmentorConfig(
    encoder="tu-resnet10t",
    options={"encoder_depth": 3, "decoder_channels": [16, 8, 8]},
    train=TrainConfig(
        steps=4, batch_size=2, learning_rate=3e-3, warmup_steps=1, evaluate_every=2, checkpoint_every=2, log_every=2
    ),
)


def made_tiles(count: int, seed: int = 0, size: int = 32) -> Tiles:
    """A round lake in a field, in noise; the lowest rows are unlabelled."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    images, masks = [], []
    for y, x in random.uniform(8, size - 8, (count, 2)):
        mask = ((rows - y) ** 2 + (columns - x) ** 2 < 64).astype(np.uint8)
        image = np.array(SCHEMA.colors)[mask] + random.normal(0, 40, (size, size, 3))
        mask[-3:] = 255
        images.append(torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1))
        masks.append(torch.from_numpy(mask))
    return Tiles(tuple(f"made-{seed}-{i}" for i in range(count)), torch.stack(images), torch.stack(masks), SCHEMA)


TILES, VALIDATION = made_tiles(5), made_tiles(2, seed=1)


def predicted(root, **changes) -> RoughMaps:
    settings = {"folds": 2, "seed": 3, "clock": Clock()} | changes
    return out_of_fold(TILES, VALIDATION, CONFIG, root, **settings)


def contents(root) -> dict[str, bytes]:
    """Predictions, and whatever else holds no time."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root, looked = tmp_path_factory.mktemp("folds"), []
    rough = predicted(root, before=lambda: looked.append(list(root.glob("*/training"))))
    assert looked == [[]]  # once, before the first
    return rough, root


# --- the division ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("count", "number"), [(2, 2), (7, 2), (13, 5), (100, 7)])
def test_folds_are_of_equal_size_and_the_order_of_the_tiles_does_not_matter(count, number, seed):
    ids = [f"tile {i}" for i in range(count)]
    found = dict(zip(ids, divide(ids, number, seed), strict=True))
    sizes = Counter(found.values())
    assert sorted(sizes) == list(range(number))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert dict(zip(ids[::-1], divide(ids[::-1], number, seed), strict=True)) == found


def test_the_seed_decides_the_division():
    ids = [f"tile {i}" for i in range(30)]
    assert len({divide(ids, 3, seed) for seed in range(10)}) == 10


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_and_no_fold_is_larger_than_it_must_be(seed):
    random = np.random.default_rng(seed)
    groups = [f"scene {i}" for i, size in enumerate(random.integers(1, 9, 12)) for _ in range(size)]
    found = divide([f"tile {i}" for i in range(len(groups))], 4, seed, groups)
    assert len(set(zip(groups, found, strict=True))) == 12
    sizes = Counter(found)
    # Greedy, large groups first: the difference is that of the smallest group of the largest fold, at most.
    assert max(sizes.values()) - min(sizes.values()) <= max(Counter(groups).values())
    assert max(sizes.values()) <= 4 / 3 * max(np.ceil(len(groups) / 4), max(Counter(groups).values()))


@pytest.mark.parametrize(
    ("number", "groups", "said"), [(1, None, "1 folds of 4 tiles"), (5, None, "5 folds of 4"), (3, "aabb", "2 groups")]
)
def test_an_impossible_division_is_refused(number, groups, said):
    with pytest.raises(TerraSynthError, match="can not be divided") as caught:
        divide("wxyz", number, 0, groups)
    assert said in str(caught.value)


# --- the predictions -------------------------------------------------------------------------------------------------


def test_a_tile_is_predicted_by_a_segmentor_trained_on_the_other_folds_alone(finished, tmp_path):
    rough, _ = finished
    assert rough.folds == divide(TILES.ids, 2, 3)
    assert (rough.classes.dtype, rough.margins.dtype) == (torch.uint8, torch.uint8)
    for fold in range(2):
        held = [i for i in range(5) if rough.folds[i] == fold]
        others = [i for i in range(5) if rough.folds[i] != fold]
        segmentor = Segmentor.build(CONFIG, 2, seed=3)
        fit(segmentor, TILES.take(others), VALIDATION, CONFIG, tmp_path / str(fold), seed=3)
        images = TILES.images[held].float() / 255
        assert torch.equal(rough.classes[held].long(), segmentor.predict(images))
        logits = segmentor(images).detach().double().numpy()
        odds = np.exp(logits[:, 0] - logits[:, 1])
        expected = 255 * np.abs(odds - 1) / (odds + 1)
        assert np.abs(rough.margins[held].numpy() - expected).max() < 0.51
        # The labels of the fold serve to say how good the predictions are.
        confusion = Confusion.empty(2)
        confusion.update(rough.classes[held], TILES.masks[held], 255)
        assert rough.units[fold].result == confusion.metrics(SCHEMA.names)


def test_groups_are_predicted_together(finished, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(folds, "fit", lambda segmentor, train, *rest, **named: seen.append(train.ids) or _stop())
    groups = ["a", "b", "b", "c", "a"]
    with pytest.raises(OutOfTime):
        predicted(tmp_path, folds=3, groups=groups)
    fold_of = divide(TILES.ids, 3, 3, groups)
    assert fold_of[1] == fold_of[2] != fold_of[0] == fold_of[4]
    assert seen == [tuple(id_ for id_, fold in zip(TILES.ids, fold_of, strict=True) if fold != 0)]


def _stop():
    raise OutOfTime


# --- units of work ---------------------------------------------------------------------------------------------------


def test_a_finished_fold_is_not_computed_again_and_a_damaged_one_says_how(finished, monkeypatch):
    rough, root = finished
    monkeypatch.setattr(folds, "fit", _stop)
    again = predicted(root, clock=Clock(0), before=_stop)
    assert torch.equal(again.classes, rough.classes)
    assert torch.equal(again.margins, rough.margins)
    assert again.units == rough.units
    for other in ({"seed": 4}, {"folds": 3}):
        with pytest.raises(OutOfTime):
            predicted(root, clock=Clock(0), **other)
    path = rough.units[1].folder / "rough.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(TerraSynthError, match="delete this file") as caught:
        predicted(root)
    assert caught.value.path == path
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [(checkpoint, "save", 3), (folds, "store_tensors", 0), (units, "write_json", 1)],
    ids=["in the second training", "before the first predictions", "before the first stamp"],
)
def test_killed_at_any_time_it_goes_on_to_the_same_files(finished, tmp_path, killed, owner, name, number):
    _, root = finished
    assert killed(lambda: predicted(tmp_path), owner, name, number)
    predicted(tmp_path)
    expected = contents(root)
    assert len(expected) == 4  # predictions and best weights of each fold
    assert contents(tmp_path) == expected


def test_the_first_fold_reads_the_validation_tiles_as_well(finished):
    rough, _ = finished
    assert rough.validation.shape == VALIDATION.masks.shape
    assert (rough.validation < 2).all()
