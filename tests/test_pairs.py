"""What paints pairs is trained, stopped and trained on; its datasets are painted, stopped and painted on."""

from __future__ import annotations

import pytest
import torch

from terrasynth.data.folder import Tiles, load_synthetic
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import PairsConfig, PairsSamplingConfig, TrainConfig
from terrasynth.systems.pairs import PairViews, build_pairs, build_upscaler, fit_pairs, generate_pairs, paint_pairs
from terrasynth.systems.satsynth import SatSynthPipeline

SCHEMA = LabelSchema(("land", "water", "road"), ((200, 150, 90), (20, 60, 160), (240, 240, 240)))
TRAIN = TrainConfig(steps=4, batch_size=2, warmup_steps=1, checkpoint_every=2, evaluate_every=4, ema_decay=0.9)
CONFIG = PairsConfig(patch_size=2, widths=(16, 16), attention=(4,), train=TRAIN)
SAMPLING = PairsSamplingConfig(steps=2, batch_size=2)


@pytest.fixture(scope="module")
def tiles():
    masks = torch.randint(0, 3, (4, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    masks[0, :4] = 255
    images = torch.tensor([*SCHEMA.colors, (9, 9, 9)]).byte()[masks.long().clamp(max=3)].movedim(-1, 1)
    return Tiles(tuple("abcd"), images.contiguous(), masks, SCHEMA)


@pytest.fixture(scope="module")
def trained(tiles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert fit_pairs(tiles, CONFIG, folder).finished
    return folder


def weights(folder):
    pipeline = SatSynthPipeline.from_pretrained(folder / "model")
    return torch.cat([value.flatten() for value in pipeline.network.state_dict().values()])


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stopped_and_gone_on_it_is_the_same_model(tiles, trained, tmp_path, monkeypatch):
    real, calls = SatSynthPipeline.training_loss, []

    def loss(self, batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(SatSynthPipeline, "training_loss", loss)
    with pytest.raises(KeyboardInterrupt):
        fit_pairs(tiles, CONFIG, tmp_path)
    assert not (tmp_path / "model").exists()
    assert fit_pairs(tiles, CONFIG, tmp_path).finished
    assert torch.equal(weights(tmp_path), weights(trained))
    assert [path.name for path in (trained / "previews").iterdir()] == ["step-00000004.png"]


def test_stopped_and_gone_on_it_is_the_same_dataset(trained, tmp_path, monkeypatch):
    whole = generate_pairs(trained / "model", tmp_path / "whole", SAMPLING, count=5, seed=3)
    real, calls = SatSynthPipeline.__call__, []

    def call(self, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SatSynthPipeline, "__call__", call)
        with pytest.raises(KeyboardInterrupt):
            generate_pairs(trained / "model", tmp_path / "cut", SAMPLING, count=5, seed=3)
    (tmp_path / "cut" / "images" / "000001.png").unlink()
    assert files(generate_pairs(trained / "model", tmp_path / "cut", SAMPLING, count=5, seed=3)) == files(whole)
    painted = load_synthetic(whole)
    assert len(painted) == 5
    assert painted.masks.max() < 3
    # Sample by sample what the pipeline paints; a larger dataset begins with the smaller one.
    assert not torch.equal(painted.images[0], painted.images[1])
    before = files(whole / "images")
    generate_pairs(trained / "model", whole, SAMPLING, count=7, seed=3)
    after = files(whole / "images")
    assert len(after) == 7
    assert before.items() <= after.items()
    with pytest.raises(TerraSynthError, match="another run"):
        generate_pairs(trained / "model", whole, SAMPLING, count=7, seed=4)


def test_what_is_asked_for_reaches_the_model(trained, tmp_path, monkeypatch):
    pipeline = SatSynthPipeline.from_pretrained(trained / "model")
    asked = []
    real = SatSynthPipeline.__call__
    monkeypatch.setattr(
        SatSynthPipeline, "__call__", lambda self, **options: asked.append(options) or real(self, **options)
    )
    sampling = SAMPLING.model_copy(update={"shares": {"road": 0.25}, "guidance_scale": 2.0})
    paint_pairs(pipeline, 1, sampling, tmp_path, provenance={})
    assert asked[0]["shares"][0, 2] == 0.25
    assert asked[0]["shares"][0, :2].isnan().all()
    assert asked[0]["guidance_scale"] == 2


def test_views_move_image_and_mask_as_one_and_keep_colours(tiles):
    views = PairViews(tiles, 8)
    for seed in range(8):
        item = views[1, seed]
        colors = torch.tensor(SCHEMA.colors)[item["mask"]].movedim(-1, 0)
        assert torch.equal((item["image"] * 255).round().long(), colors)
    assert torch.equal(views[1, 3]["mask"], views[1, 11]["mask"])


def test_settings_reach_the_pipeline(trained):
    changes = {"codes": "onehot", "prediction": "epsilon", "condition": "given", "class_dropout": 0.3, "min_snr": 2.0}
    pipeline = build_pairs(CONFIG.model_copy(update=changes), SCHEMA, 16)
    assert (pipeline.config.codes, pipeline.config.prediction_type) == ("onehot", "epsilon")
    assert (pipeline.config.condition, pipeline.class_dropout, pipeline.config.image_size) == ("given", 0.3, 16)
    assert pipeline.min_snr == build_upscaler(CONFIG.model_copy(update=changes), SCHEMA, 16).min_snr == 2.0
    further = build_pairs(CONFIG.model_copy(update={"base": str(trained / "model")}), SCHEMA, 16)
    assert torch.equal(torch.cat([v.flatten() for v in further.network.state_dict().values()]), weights(trained))


@pytest.mark.parametrize(
    ("name", "value"),
    [("codes", "onehot"), ("prediction", "v_prediction"), ("condition", "given"), ("asks_classes", False)],
)
def test_a_base_that_was_trained_otherwise_is_refused_before_it_is_trained(name, value, tmp_path):
    other = CONFIG.model_copy(update={name: value})
    build_pairs(other, SCHEMA, 16).save_pretrained(tmp_path)
    with pytest.raises(TerraSynthError, match=rf"another pairs\.{name}[\s\S]*set pairs\.{name}={str(value).lower()}"):
        build_pairs(CONFIG.model_copy(update={"base": str(tmp_path)}), SCHEMA, 16)
    build_pairs(other.model_copy(update={"base": str(tmp_path)}), SCHEMA, 16)


def test_a_base_of_the_same_classes_in_another_order_is_refused_and_colours_are_those_of_the_tiles(tmp_path):
    build_pairs(CONFIG, SCHEMA, 16).save_pretrained(tmp_path)
    config = CONFIG.model_copy(update={"base": str(tmp_path)})
    turned = LabelSchema(SCHEMA.names[::-1], SCHEMA.colors[::-1])
    with pytest.raises(TerraSynthError, match="other classes, or in another order"):
        build_pairs(config, turned, 16)
    colored = LabelSchema(SCHEMA.names, SCHEMA.colors[::-1])
    assert build_pairs(config, colored, 16).schema == colored
    build_pairs(config, colored, 16).save_pretrained(tmp_path / "further")
    assert SatSynthPipeline.from_pretrained(tmp_path / "further").schema == colored


def test_of_a_base_of_two_stages_none_is_left_behind(tmp_path):
    build_pairs(CONFIG, SCHEMA, 16).save_pretrained(tmp_path)
    build_upscaler(CONFIG, SCHEMA, 32).save_pretrained(tmp_path / "upscaler")
    with pytest.raises(TerraSynthError, match=r"set pairs\.two_stages=true"):
        build_pairs(CONFIG.model_copy(update={"base": str(tmp_path)}), SCHEMA, 16)


def test_attention_that_is_nowhere_is_told(capsys, monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "")
    build_pairs(CONFIG.model_copy(update={"attention": (5,)}), SCHEMA, 16)
    assert "no self-attention" in capsys.readouterr().err
    build_pairs(CONFIG.model_copy(update={"attention": (4, 5)}), SCHEMA, 16)
    assert not capsys.readouterr().err


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="asks_classes"):
        PairsConfig(asks_classes=False, sampling={"shares": {"road": 0.1}})
    with pytest.raises(ValueError, match="class_dropout"):
        PairsConfig(class_dropout=0, sampling={"guidance_scale": 2, "shares": {"road": 0.1}})
    with pytest.raises(ValueError, match="nothing is: name shares"):
        PairsSamplingConfig(guidance_scale=2)
    with pytest.raises(ValueError, match="more than 1"):
        PairsSamplingConfig(shares={"road": 0.7, "water": 0.7})
    with pytest.raises(ValueError, match="less than or equal to 1000"):
        PairsSamplingConfig(steps=1001)
