"""Studies whose training tiles are painted together with their masks, or under masks that were painted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.folder import load_synthetic, load_tiles
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import Recipe, StudyConfig
from terrasynth.recipe_io import choose_arms
from terrasynth.study.left import outlook
from terrasynth.study.results import write_results
from terrasynth.study.run import Study
from terrasynth.systems.satsynth import SatSynthPipeline

PAIRS = {
    "patch_size": 4,
    "widths": [16, 16],
    "attention": [4],
    "train": {"steps": 4, "batch_size": 2, "warmup_steps": 1, "checkpoint_every": 2, "evaluate_every": 4},
    "sampling": {"steps": 2, "batch_size": 4},
}
ARMS = [
    {"name": "real"},
    {"name": "pairs", "synthetic": "pairs", "ratio": [1, 2]},
    {"name": "ClassMix + pairs", "mix": "classmix", "synthetic": "pairs"},
    {"name": "painted masks", "synthetic": "plain", "layouts": "pairs"},
]


def with_arms(recipe, arms, **study):
    values = recipe.model_dump(mode="json")
    values["pairs"] |= PAIRS
    values["study"] |= {"arms": arms, "seeds": [0, 1], "plateau_check": "none", "ratio": 1, **study}
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    return with_arms(tiny_recipe, ARMS)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    Study(recipe, Path(), out).run("terrasynth study pairs")
    return out


def dataset(out, name):
    (folder,) = out.glob(f"synthetic/{name}-????????/dataset")
    return folder


def results_of(out):
    return json.loads((out / "results.json").read_text())


def test_a_list_of_ratios_is_an_arm_of_each(recipe):
    arms = recipe.study.arms
    assert [arm.name for arm in arms[1:3]] == ["pairs 1:1", "pairs 1:2"]
    assert [arm.ratio for arm in arms] == [None, 1, 2, None, None]
    assert [arm.kind for arm in arms] == ["none", "pairs", "pairs", "pairs", "plain-on-pairs"]
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    values = recipe.model_dump(mode="json", include={"study"})["study"]
    values["arms"] = [arms[0].model_dump(), {"name": "pairs", "synthetic": "pairs", "ratio": [1.0, 3]}]
    assert [arm.name for arm in StudyConfig.model_validate(values).arms[1:]] == ["pairs 1:1", "pairs 1:3"]
    values["arms"][1]["ratio"] = [1, 1]
    with pytest.raises(ValueError, match="two called 'pairs 1:1'"):
        StudyConfig.model_validate(values)
    values["arms"][1]["ratio"] = [None, 2]
    with pytest.raises(ValueError, match="each ratio of the arm 'pairs' must be a number"):
        StudyConfig.model_validate(values)
    values["arms"][1] |= {"ratio": None}
    values |= {"ratio": 3, "arms": [*values["arms"], {"name": "again", "synthetic": "pairs", "ratio": 3}]}
    with pytest.raises(ValueError, match="'pairs' and 'again' differ in nothing but their names"):
        StudyConfig.model_validate(values)


def test_a_base_that_can_not_be_asked_is_told_before_anything_is_trained(recipe, tmp_path):
    schema = load_tiles(recipe.data, "train").schema
    base = SatSynthPipeline.from_scratch(schema, widths=(16, 16), image_size=recipe.data.image_size, asks_classes=False)
    base.save_pretrained(tmp_path / "base")
    values = recipe.model_dump(mode="json")
    values["pairs"] |= {"base": str(tmp_path / "base"), "sampling": {"shares": {schema.names[0]: 0.5}}}
    with pytest.raises(TerraSynthError, match=r"another pairs\.asks_classes"):
        Study(Recipe.model_validate(values), Path(), tmp_path / "out").run()
    assert not list((tmp_path / "out").rglob("unit.json"))


def test_one_model_of_the_training_tiles_paints_the_pairs_of_every_seed(finished, recipe):
    (unit,) = finished.glob("pairs-*/unit.json")
    train = load_tiles(recipe.data, "train")
    assert json.loads(unit.read_text())["inputs"]["train"] == train.fingerprint()
    pipeline = SatSynthPipeline.from_pretrained(unit.parent / "model")
    for seed in (0, 1):
        rows = [json.loads(line) for line in (dataset(finished, f"pairs-seed-{seed}") / "metadata.jsonl").open()]
        assert len(rows) == 8
        painted = load_synthetic(dataset(finished, f"pairs-seed-{seed}"))
        # As the pipeline alone paints them, to rounding.
        again = pipeline(seeds=[row["seed"] for row in rows[:4]], num_steps=2)
        assert (again.images.int() - painted.images[:4].int()).abs().max() <= 1
        assert (again.masks != painted.masks[:4]).float().mean() < 0.01
    one, other = (load_synthetic(dataset(finished, f"pairs-seed-{seed}")) for seed in (0, 1))
    assert not torch.equal(one.images, other.images)


def test_segmentors_learn_from_the_first_of_them(finished):
    for name, count in (("pairs-1-1", 4), ("pairs-1-2", 8), ("classmix-pairs", 4)):
        for seed in (0, 1):
            (unit,) = finished.glob(f"cells/{name}-seed-{seed}-????????/unit.json")
            key, taken, _, _ = json.loads(unit.read_text())["inputs"]["synthetic"]
            assert taken == count
            assert key[:8] == dataset(finished, f"pairs-seed-{seed}").parent.name[-8:]


def test_the_generator_paints_each_painted_mask_once_and_as_it_is(finished):
    for seed in (0, 1):
        pairs = load_synthetic(dataset(finished, f"pairs-seed-{seed}"))
        folder = dataset(finished, f"plain-on-pairs-seed-{seed}")
        anew = load_synthetic(folder)
        assert torch.equal(anew.masks, pairs.masks[:4])
        assert not torch.equal(anew.images, pairs.images[:4])
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").open()]
        assert [row["source_mask"] for row in rows] == [f"pairs/{id_}" for id_ in pairs.ids[:4]]


def test_more_of_them_continue_both_sets_and_change_nothing_that_was_painted(finished, tiny_recipe, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    arms = [*ARMS[:1], {**ARMS[3], "ratio": [1, 3]}]
    before = {path: path.read_bytes() for path in (tmp_path / "study" / "synthetic").glob("*/dataset/*/*.png")}
    study = Study(with_arms(tiny_recipe, arms), Path(), tmp_path / "study")
    for seed in (0, 1):
        folder = study.painted("plain-on-pairs", seed).folder / "dataset"
        assert len(list((folder / "images").iterdir())) == 12
        pairs = load_synthetic(study.painted("pairs", seed).folder / "dataset")
        assert len(pairs) == 12
        assert torch.equal(load_synthetic(folder).masks, pairs.masks)
    assert all(path.read_bytes() == content for path, content in before.items())
    # Painted at once, the first are the same to rounding, and so are the masks below the others.
    whole = Study(with_arms(tiny_recipe, arms), Path(), tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    for model in ("pairs-*", "generator-*"):
        (folder,) = finished.glob(model)
        shutil.copytree(folder, tmp_path / "whole" / folder.name)
    at_once, in_two = (load_synthetic(s.painted("pairs", 0).folder / "dataset") for s in (whole, study))
    assert (at_once.masks != in_two.masks).float().mean() < 0.01
    assert (at_once.images.int() - in_two.images.int()).abs().max() <= 1


def test_what_is_in_painted_masks_is_told(finished, recipe):
    labels = results_of(finished)["labels"]
    real = load_tiles(recipe.data, "train").masks
    count = recipe.data.image_size**2
    shares = []
    for seed in (0, 1):
        masks = load_synthetic(dataset(finished, f"pairs-seed-{seed}")).masks
        assert len(masks) == 8
        shares.append([(masks == k).sum().item() / (8 * count) for k in range(len(labels["shares"]))])
    assert labels["shares"] == pytest.approx([sum(pair) / 2 for pair in zip(*shares, strict=True)])
    of_real = [(real == k).sum().item() / (4 * count) for k in range(len(labels["shares"]))]
    assert [entry["share"] for entry in results_of(finished)["classes"]] == pytest.approx(of_real)
    distances = [sum(abs(p - q) for p, q in zip(of_real, one, strict=True)) / 2 for one in shares]
    assert labels["distance"] == pytest.approx(sum(distances) / 2)


def test_the_report_shows_pairs_with_their_masks_and_the_audit_compares_them(finished):
    page = (finished / "report.html").read_text()
    assert {"Mask, painted", "Painted with it", "Painted under it"} <= set(re.findall(r"<div>([\w ,]+)<img", page))
    assert "What is in painted masks" in page
    assert re.search(r"an mIoU of\s+[\d.]+ \(with their masks\), [\d.]+ \(plain, under painted masks\)\.", page)
    assert "8 (with their masks), 4 (plain, under painted masks)" in page
    assert "“pairs 1:1” has the first 4 of them" in page
    assert "pixel diffusion of image and mask together (SatSynth), from scratch, levels of 16, 16 channels" in page
    assert "train every segmentor and the generator and what paints pairs" in page
    assert (finished / "pairs.png").is_file()
    assert not (finished / "paintings.png").exists()
    audits = results_of(finished)["audit"]
    assert [(one["kind"], one["seed"], one["painted"]) for one in audits] == [
        *(("pairs", seed, 8) for seed in (0, 1)),
        *(("plain-on-pairs", seed, 4) for seed in (0, 1)),
    ]
    assert all({"train", "validation", "test"} <= {entry["name"] for entry in one["sets"]} for one in audits)


def test_a_study_of_pairs_alone_trains_no_generator(finished, tiny_recipe, tmp_path):
    shutil.copytree(finished, tmp_path / "study", ignore=shutil.ignore_patterns("generator-*", "scores", "audits"))
    Study(with_arms(tiny_recipe, ARMS[:2]), Path(), tmp_path / "study").run()
    assert not list((tmp_path / "study").glob("generator-*"))
    page = (tmp_path / "study" / "report.html").read_text()
    assert "One painter of pairs painted for all seeds" in page
    assert "TODSynth" not in page
    assert "second stage" not in page


def test_pairs_of_two_stages_have_the_size_of_the_tiles(finished, tiny_recipe, tmp_path):
    keep = shutil.ignore_patterns("generator-*", "pairs-*", "synthetic", "audits")
    shutil.copytree(finished, tmp_path / "study", ignore=keep)
    values = with_arms(tiny_recipe, [ARMS[0], {"name": "pairs", "synthetic": "pairs"}], seeds=[0]).model_dump(
        mode="json"
    )
    second = {name: PAIRS[name] for name in ("patch_size", "widths", "attention", "train")}
    values["pairs"] |= {"two_stages": True, "upscaler": second}
    Study(Recipe.model_validate(values), Path(), tmp_path / "study").run()
    assert load_synthetic(dataset(tmp_path / "study", "pairs-seed-0")).masks.shape == (4, 32, 32)
    assert "doubled by a second stage" in (tmp_path / "study" / "report.html").read_text()


def test_pairs_are_filtered_by_the_teacher_as_other_paintings(finished, tiny_recipe, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    arms = [
        *ARMS[:1],
        {"name": "filtered", "synthetic": "pairs", "filter": True},
        {"name": "curated", "synthetic": "pairs", "curate": {"resample": 2}},
    ]
    study = Study(with_arms(tiny_recipe, arms, seeds=[0]), Path(), tmp_path / "study")
    study.work()
    write_results(study, "")
    results = results_of(tmp_path / "study")
    assert 0 <= results["filtered"]["filtered"]["dropped"] < 1
    assert results["curated"]["curated"]["used"] > 0


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"synthetic": "pairs", "references": True}, "references needs .* plain or steered"),
        ({"synthetic": "pairs", "layouts": "pairs"}, "layouts needs .* plain or steered"),
        ({"layouts": "pairs"}, "layouts needs painted tiles"),
        ({"synthetic": "pairs", "ratio": []}, "ratio"),
    ],
)
def test_arms_that_can_not_be_are_refused(tiny_recipe, arm, message):
    with pytest.raises(ValueError, match=message):
        with_arms(tiny_recipe, [{"name": "real"}, {"name": "other", **arm}])


def test_a_size_that_pairs_can_not_have_is_refused_before_anything_is_trained(tiny_recipe):
    values = with_arms(tiny_recipe, ARMS).model_dump(mode="json")
    values["pairs"]["patch_size"] = 3
    with pytest.raises(ValueError, match=r"image_size \(32\) must be a multiple of 6"):
        Recipe.model_validate(values)


# Parts of a study


def test_some_arms_are_run_alone_and_the_report_names_the_others(finished, recipe, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("unit.json")}
    some, others = choose_arms(recipe, ["pairs"])
    assert [arm.name for arm in some.study.arms] == ["real", "pairs 1:1", "pairs 1:2"]
    assert others == ("ClassMix + pairs", "painted masks")
    study = Study(some, Path(), tmp_path / "study", others=others)
    assert study.left() == []
    study.run()
    # As many pairs as before, so nothing is done again; what other arms made stays.
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("unit.json")} == stamps
    results = results_of(tmp_path / "study")
    assert [arm["name"] for arm in results["arms"]] == ["real", "pairs 1:1", "pairs 1:2"]
    assert results["other_arms"] == ["ClassMix + pairs", "painted masks"]
    assert "It has 2 more: ClassMix + pairs; painted masks." in (tmp_path / "study" / "report.html").read_text()
    assert results["arms"][1] == results_of(finished)["arms"][1]
    assert (tmp_path / "study" / "pairs.png").is_file()
    Study(choose_arms(recipe, ["real"])[0], Path(), tmp_path / "study").run()
    assert not [name for name in ("pairs.png", "gallery.json") if (tmp_path / "study" / name).exists()]


def test_one_ratio_the_baseline_and_the_teacher_may_be_all(recipe):
    values = recipe.model_dump(mode="json")
    values["study"]["arms"].append({"name": "teacher", "mix": "cutmix"})
    values["study"]["teacher"] = "teacher"
    some, others = choose_arms(Recipe.model_validate(values), ["pairs 1:2"])
    assert [arm.name for arm in some.study.arms] == ["real", "pairs 1:2", "teacher"]
    assert len(others) == 3
    with pytest.raises(TerraSynthError, match="no such arm"):
        choose_arms(recipe, ["pair"])


def test_what_is_left_is_told_with_the_times_of_what_is_done(finished, recipe, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    study = Study(recipe, Path(), tmp_path / "study")
    assert outlook(study) == "All is done but the report."
    seconds = []
    for path in (tmp_path / "study" / "cells").glob("*/unit.json"):
        if path.parent.name.startswith("pairs-1-1-seed-1"):
            path.unlink()
        else:
            seconds.append(json.loads(path.read_text())["seconds"])
    study = Study(recipe, Path(), tmp_path / "study", max_minutes=5)
    assert [(task.group, task.seed) for task in study.left()] == [("train: pairs 1:1", 1)]
    told = outlook(study)
    assert "train: pairs 1:1, seed 1: about" in told
    assert told.endswith("given are 5 min.")
    (time,) = re.findall(r"By the times of what is done: about (\d+) s;", told)
    # The other seed's; every cell here takes about as long.
    assert int(time) <= round(max(seconds)) + 1


def test_where_teachers_are_trained_only_their_tests_are_left(finished, recipe, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    for path in (tmp_path / "study" / "scores").glob("real-seed-*/unit.json"):
        path.unlink()
    study = Study(recipe, Path(), tmp_path / "study")
    assert [(task.group, task.seed) for task in study.left()] == [("test", 0), ("test", 1)]
    assert "\n  test, seeds 0, 1: about" in outlook(study)


def test_arms_of_any_settings_have_tasks(tiny_recipe, tmp_path):
    curated = {"name": "curated", "synthetic": "pairs", "curate": {"balance": {"road": 0.2}}}
    tasks = Study(with_arms(tiny_recipe, [ARMS[0], curated]), Path(), tmp_path).tasks()
    groups = [task.group for task in tasks]
    assert (groups.count("train: real"), groups.count("train: curated")) == (2, 2)


def test_out_of_minutes_the_command_says_what_is_left_and_how_to_go_on(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    options = ["--out", str(tmp_path / "out"), "--max-minutes", "0", "--arms", "painted masks"]
    done = CliRunner().invoke(app, ["study", str(file), *options])
    assert done.exit_code == 75
    for line in (
        "train: real, seeds 0, 1: not known yet",
        "train what paints pairs: not known",
        "To go on: terrasynth",
    ):
        assert line in done.stderr
    assert "ClassMix" not in done.stderr
    assert not list((tmp_path / "out").rglob("unit.json"))
