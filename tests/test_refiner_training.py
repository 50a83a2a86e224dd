"""A refiner is trained, stopped and trained on, and learns."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from terrasynth.data.folder import Tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import RefinerConfig, RoughConfig, TrainConfig
from terrasynth.study import run
from terrasynth.study.run import Study
from terrasynth.systems.idgbr import IDGBRPipeline
from terrasynth.systems.refine import build_refiner, check_refiner, fit_refiner
from terrasynth.tasks.boundary import BoundaryScores
from terrasynth.tasks.confusion import Confusion
from terrasynth.tasks.refiner_scores import score_refiner

SCHEMA = LabelSchema(("ground", "house"), ((200, 200, 200), (200, 40, 40)))


@pytest.fixture
def tiles():
    """Houses that are seen in the image."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(8, 32, 32, dtype=torch.uint8)
    for mask in masks:
        top, left = torch.randint(4, 14, (2,), generator=generator).tolist()
        mask[top : top + 12, left : left + 14] = 1
    images = (60 + 140 * masks)[:, None].expand(-1, 3, -1, -1).clone()
    return Tiles(tuple("abcdefgh"), images, masks, SCHEMA)


def config(steps=4, learning_rate=2e-3, **changes):
    often = {"checkpoint_every": steps // 2, "evaluate_every": steps}
    train = TrainConfig(steps=steps, batch_size=4, learning_rate=learning_rate, warmup_steps=2, **often)
    values = {"widths": (16, 16), "patch_size": 4, "crop": 24, "train": train} | changes
    return RefinerConfig(rough=RoughConfig(noise=3, invented=0.5), **values)


def weights(folder):
    pipeline = IDGBRPipeline.from_pretrained(folder / "model")
    return torch.cat([value.flatten() for value in pipeline.network.state_dict().values()])


def test_interrupted_and_gone_on_it_is_the_same_refiner(tiles, tmp_path):
    rough = tiles.masks.roll(2, -1)
    assert fit_refiner(tiles, rough, config(), tmp_path / "whole").finished
    with pytest.MonkeyPatch.context() as patch:
        real = IDGBRPipeline.training_loss
        calls = []

        def loss(self, batch):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(self, batch)

        patch.setattr(IDGBRPipeline, "training_loss", loss)
        with pytest.raises(KeyboardInterrupt):
            fit_refiner(tiles, rough, config(), tmp_path / "parts")
    assert not (tmp_path / "parts" / "model").exists()
    assert fit_refiner(tiles, rough, config(), tmp_path / "parts").finished
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert [path.name for path in (tmp_path / "whole" / "previews").iterdir()] == ["step-00000004.png"]


def test_it_learns_to_move_boundaries_to_where_the_image_has_them(tiles, tmp_path):
    rough = tiles.masks.roll(2, -1)
    assert fit_refiner(tiles, rough, config(100, learning_rate=5e-3), tmp_path).finished
    pipeline = IDGBRPipeline.from_pretrained(tmp_path / "model")
    refined = pipeline.refine(tiles.images.float() / 255, rough, seeds=range(8), num_steps=1)
    before, after = (rough != tiles.masks).float().mean(), (refined != tiles.masks).float().mean()
    assert after < before * 0.7, (before, after)


def test_a_refiner_of_one_class_refines_maps_of_several(tiles, tmp_path):
    assert fit_refiner(tiles, tiles.masks, config(each_class=True), tmp_path).finished
    pipeline = IDGBRPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.schema is None
    rough = torch.randint(0, 5, (1, 32, 32), dtype=torch.uint8)
    scores = pipeline.scores(tiles.images[:1].float() / 255, rough, seeds=[0], num_steps=1, each_class=True)
    assert scores.shape == (1, 5, 32, 32)


def test_settings_reach_the_pipeline(tiles):
    changes = {"condition_dropout": 0.3, "rough_start": 0.2, "timesteps": "cubic", "codes": "onehot"}
    pipeline = build_refiner(config(**changes), SCHEMA, 24)
    assert (pipeline.condition_dropout, pipeline.rough_start, pipeline.timesteps) == (0.3, 0.2, "cubic")
    assert (pipeline.config.codes, pipeline.config.image_size, pipeline.factor) == ("onehot", 24, 4)
    assert not build_refiner(config(sees_rough=False), SCHEMA, 24).config.sees_rough


def test_rough_starts_are_where_they_can_be(tiles):
    assert build_refiner(config(), SCHEMA, 24).rough_start == 0.5
    assert build_refiner(config(sees_rough=False), SCHEMA, 24).rough_start == 0
    noise = build_refiner(config(prediction_type="epsilon"), SCHEMA, 24)
    assert (noise.config.prediction_type, noise.rough_start) == ("epsilon", 0)
    for changes in ({"sees_rough": False}, {"prediction_type": "epsilon"}):
        with pytest.raises(ValueError, match=r"rough_start \(0\.5\)"):
            config(rough_start=0.5, **changes)


def test_on_stable_diffusion_the_defaults_can_be_trained(sd15, tiles):
    folder, _ = sd15
    based = RefinerConfig(base=str(folder), crop=None)
    check_refiner(tiles, based)
    assert build_refiner(based, SCHEMA, 32).rough_start == 0
    clean = build_refiner(RefinerConfig(base=str(folder), prediction_type="sample"), SCHEMA, 32)
    assert (clean.config.prediction_type, clean.rough_start) == ("sample", 0.5)
    with pytest.raises(TerraSynthError, match="clean code"):
        check_refiner(tiles, RefinerConfig(base=str(folder), rough_start=0.5))
    with pytest.raises(TerraSynthError, match=r"(?s)multiple of 4.*refiner\.crop to 28"):
        check_refiner(tiles, RefinerConfig(base=str(folder), crop=30))


def test_a_base_that_the_settings_do_not_fit_is_refused(tiles, tmp_path):
    small = {"widths": (8, 8), "patch_size": 4, "image_size": 24, "guidance_width": 8}
    base = IDGBRPipeline.from_scratch(SCHEMA, conditions="separate", codes="onehot", **small)
    base.save_pretrained(tmp_path)
    with pytest.raises(TerraSynthError, match=r"--set refiner\.conditions=separate"):
        check_refiner(tiles, RefinerConfig(base=str(tmp_path)))
    check_refiner(tiles, RefinerConfig(base=str(tmp_path), codes="onehot", conditions="separate"))
    with pytest.raises(ValueError, match="widths is of refiners from scratch"):
        RefinerConfig(base=str(tmp_path), widths=(99, 99))


def test_a_crop_that_does_not_divide_is_refused(tiles):
    with pytest.raises(ValueError, match=r"crop \(30\) must be a multiple of patch_size"):
        config(crop=30)
    with pytest.raises(TerraSynthError, match=r"(?s)32 x 32.*multiple of 5"):
        check_refiner(tiles, config(crop=None, patch_size=5))


def test_validation_is_scored_with_every_preview_and_the_model_says_what_it_learned_from(tiles, tmp_path):
    validation = replace(tiles, ids=tuple("ijklmnop"))
    about = {"gsd": 0.5, "bands": [3, 2, 1]}
    score = partial(score_refiner, tiles=validation, rough=tiles.masks.roll(1, -1))
    fit_refiner(tiles, tiles.masks.roll(2, -1), config(), tmp_path, score=score, about=about)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    moved, scores = Confusion.empty(2), BoundaryScores(SCHEMA)
    moved.update(tiles.masks.roll(1, -1), tiles.masks, 255)
    for id_, mask in zip(tiles.ids, tiles.masks, strict=True):
        scores.update(id_, mask.roll(1, -1), mask)
    assert line["rough/miou"] == pytest.approx(moved.mean_iou)
    assert line["rough/boundary_iou"] == pytest.approx(scores.metrics()["boundary_iou"])
    pipeline = IDGBRPipeline.from_pretrained(tmp_path / "model")
    refined = Confusion.empty(2)
    for row in range(8):
        image, before = tiles.images[row : row + 1].float() / 255, tiles.masks[row : row + 1].roll(1, -1)
        refined.update(pipeline.refine(image, before, seeds=[row]), tiles.masks[row : row + 1], 255)
    assert line["miou"] == pytest.approx(refined.mean_iou)
    assert pipeline.config.trained_on == {
        "tiles": 8, "data": tiles.fingerprint(), "classes": ["ground", "house"], "size": 24, **about,
    }  # fmt: skip


def test_in_latents_the_ceiling_is_what_the_autoencoder_leaves_of_the_true_maps(sd15, tiles):
    pipeline = IDGBRPipeline.from_pretrained(sd15[0], label_schema=SCHEMA.to_dict(), image_size=32)
    two = tiles.take([0, 7])
    found = score_refiner(pipeline, two, two.masks)
    left = Confusion.empty(2)
    left.update(pipeline.round_trip(two.masks), two.masks, 255)
    assert found["ceiling/miou"] == pytest.approx(left.mean_iou)
    assert found["rough/miou"] == 1
    assert "ceiling/miou" not in score_refiner(build_refiner(config(), SCHEMA, 24), two, two.masks)


def study_of(recipe, out, **refiner):
    changes = {"widths": (16, 16), "train": config().train} | refiner
    return Study(recipe.model_copy(update={"refiner": RefinerConfig(**changes)}), out, out)


def test_what_can_not_be_trained_is_refused_before_the_folds(tiny_recipe, tmp_path):
    with pytest.raises(TerraSynthError, match=r"(?s)32 x 32.*multiple of 5"):
        _ = study_of(tiny_recipe, tmp_path, crop=None, patch_size=5).refiner
    assert not list(tmp_path.glob("folds/*/training"))


def test_folds_are_told_which_tiles_are_of_one_ground(tiny_recipe, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(run, "ground_groups", lambda config, ids, size, least: [ids, size, least])
    monkeypatch.setattr(run, "out_of_fold", lambda *tiles, **given: seen.update(given) or 1 / 0)
    study = study_of(tiny_recipe, tmp_path, crop=None)
    with pytest.raises(ZeroDivisionError):
        _ = study.refiner
    assert seen["groups"] == [study.train.ids, 32, 4]


def test_alignment_is_computed_in_as_many_steps_as_the_recipe_says(tiles, tmp_path, monkeypatch):
    real, seen = IDGBRPipeline.align, []

    def align(self, teacher, weight, *, steps):
        real(self, teacher, weight, steps=steps, pretrained=False, width=8)
        self.alignment.register_forward_hook(lambda *_: seen.append(weight))
        return self

    monkeypatch.setattr(IDGBRPipeline, "align", align)
    asked = config(alignment="test_resnet", alignment_weight=0.3, alignment_steps=3)
    assert fit_refiner(tiles, tiles.masks, asked, tmp_path).finished
    assert seen == [0.3] * 3
