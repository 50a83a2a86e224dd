import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from terrasynth.errors import TerraSynthError
from terrasynth.io import open_image
from terrasynth.recipe import ArmConfig, Recipe, SearchConfig
from terrasynth.study.read import read_results
from terrasynth.study.results import write_results
from terrasynth.study.run import Study
from terrasynth.study.verdict import verdict
from terrasynth.study.workers import workers
from terrasynth.training.units import Clock, OutOfTime, do


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    Study(tiny_recipe, Path(), out).run("terrasynth study tiny")
    return out


def stamps(out):
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("unit.json")}


def scores(out):
    """What must not depend on how often the study was interrupted: everything but times."""
    results = json.loads((out / "results.json").read_text())
    return {name: value for name, value in results.items() if name not in ("timing", "total_seconds", "command")}


def test_results_have_every_arm_paired_by_seed(finished, tiny_recipe):
    results = json.loads((finished / "results.json").read_text())
    names = [arm.name for arm in tiny_recipe.study.arms]
    assert [arm["name"] for arm in results["arms"]] == names
    values = {arm["name"]: arm["metrics"]["miou"] for arm in results["arms"]}
    assert all(len(v["values"]) == 2 and v["ci95"][0] <= v["mean"] <= v["ci95"][1] for v in values.values())
    comparisons = {c["arm"]: c for c in results["comparisons"] if c["metric"] == "miou"}
    assert set(comparisons) == set(names[1:])
    for name, comparison in comparisons.items():
        differences = [a - b for a, b in zip(values[name]["values"], values["real"]["values"], strict=True)]
        assert comparison["delta"] == pytest.approx(sum(differences) / 2)
    assert results["plateaus"][0]["twice"] == 2 * tiny_recipe.segmentor.train.steps


def test_metrics_are_those_of_the_saved_segmentor_on_the_test_tiles(finished, tiny_recipe):
    from terrasynth.data.folder import load_tiles
    from terrasynth.tasks.segmentation import Segmentor

    test = load_tiles(tiny_recipe.data, "test")
    results = json.loads((finished / "results.json").read_text())
    (cell,) = finished.glob("cells/real-seed-1-????????")
    miou = Segmentor.from_pretrained(cell / "segmentor").evaluate(test).mean_iou
    (real,) = [arm for arm in results["arms"] if arm["name"] == "real"]
    assert real["metrics"]["miou"]["values"][1] == pytest.approx(miou, abs=1e-6)


def test_every_arm_and_seed_trains_as_many_steps_on_the_same_real_tiles(finished, tiny_recipe):
    logs = list(finished.glob("cells/*/training/log.jsonl"))
    assert len(logs) == 2 * len(tiny_recipe.study.arms) + 2
    for log in logs:
        last = json.loads(log.read_text().splitlines()[-1])
        twice = "-8-steps-" in log.parent.parent.name
        assert last["step"] == tiny_recipe.segmentor.train.steps * (2 if twice else 1)


def test_the_test_tiles_change_nothing_but_the_scores(finished, tiny_recipe, tmp_path):
    world = tiny_recipe.data.world.model_copy(update={"test": 3})
    other = tiny_recipe.model_copy(update={"data": tiny_recipe.data.model_copy(update={"world": world})})
    study = Study(other, Path(), tmp_path)
    assert study.test.fingerprint() != Study(tiny_recipe, Path(), tmp_path).test.fingerprint()
    study.painted("steered", 0)
    made = [
        "cells/real-seed-0-*/segmentor",
        "generator-*/model/transformer",
        "synthetic/steered-seed-0-*/dataset/images",
    ]
    for pattern in made:
        (before,), (after,) = (
            [f for f in folder.glob(pattern) if "-steps-" not in str(f)] for folder in (finished, tmp_path)
        )
        for file in after.rglob("*.safetensors"):
            assert file.read_bytes() == (before / file.relative_to(after)).read_bytes()
        for file in after.rglob("*.png"):
            assert np.array_equal(open_image(file).values, open_image(before / file.relative_to(after)).values)


def test_nor_do_they_where_unlabelled_images_teach(semi_supervised, tmp_path):
    values = semi_supervised.model_dump(mode="json")
    values["generator"] |= {"reference": "view"}
    everything = {"references": True, "pseudo_labels": 0.0, "adapt": True, "curate": {"resample": 2}}
    arms = [{"name": "real"}, {"name": "all", "synthetic": "plain", "ratio": 1, **everything}]
    values["study"] |= {"seeds": [0], "arms": arms, "teacher": "real"}
    root, made = Path(values["data"]["root"]), []
    for kind in ("images", "masks"):
        (root / kind / "other").mkdir()
        tile = sorted((root / kind / "test").iterdir())[1]
        shutil.copy(tile, root / kind / "other" / tile.name)
    for folder in ("test", "other"):
        values["data"]["test"]["folder"] = folder
        study = Study(Recipe.model_validate(values), Path(), tmp_path / folder)
        assert len(study.test) == (2 if folder == "test" else 1)
        segmentor = study.cell(study.recipe.study.arms[1], 0).folder / "segmentor"
        made.append((segmentor / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_every_painted_set_is_audited_against_every_split(finished, tiny_recipe):
    audits = json.loads((finished / "results.json").read_text())["audit"]
    assert [(one["kind"], one["seed"]) for one in audits] == [(k, s) for k in ("plain", "steered") for s in (0, 1)]
    for one in audits:
        named = {entry["name"]: (entry["images"], entry["leaks"]) for entry in one["sets"]}
        assert {"train": (4, None), "validation": (2, 0), "test": (2, 0)}.items() <= named.items()
        assert named["masks of test"] == (2, 0)
        assert one["painted"] == 4
        assert (finished / one["sheet"]).is_file()


def test_what_is_learned_from_is_audited_once_against_the_held_out_tiles(finished):
    of_splits = json.loads((finished / "results.json").read_text())["audit_of_splits"]
    assert [(one["name"], one["images"]) for one in of_splits["sets"]] == [("train", 4)]
    assert of_splits["held_out"]["images"] == 4
    assert (finished / of_splits["sheet"]).is_file()
    assert len(list(finished.glob("audits/splits-*"))) == 1
    assert "What is learned from" in (finished / "report.html").read_text()


def test_finished_units_are_not_computed_again(finished, tiny_recipe):
    before, scored = stamps(finished), scores(finished)
    Study(tiny_recipe, Path(), finished).run()
    assert stamps(finished) == before
    assert scores(finished) == scored


def test_only_what_depends_on_a_change_is_computed_again(finished, tiny_recipe):
    before = stamps(finished)
    steering = tiny_recipe.steering.model_copy(update={"strength": 0.2})
    Study(tiny_recipe.model_copy(update={"steering": steering}), Path(), finished).work()
    after = stamps(finished)
    assert {name: after[name] for name in before} == before
    new = {name.rsplit("-", 1)[0] for name in after.keys() - before.keys()}
    assert new == {
        *(f"synthetic/steered-seed-{seed}" for seed in (0, 1)),
        *(f"{place}/real-synthetic-crfm-seed-{seed}" for place in ("cells", "scores") for seed in (0, 1)),
        *(f"scores/agreement-steered-seed-{seed}" for seed in (0, 1)),
        *(f"audits/steered-seed-{seed}" for seed in (0, 1)),
    }


def done(study):
    """Do a study but for its page, which takes longer than most units, and read its scores."""
    study.work()
    write_results(study, "")
    return scores(study.out)


def dies_before(run, number, made):
    """`run()` in a process that is killed right before its change `number`, counted from 0, that puts a finished file
    or folder with a path like `made` in its place. Whether it came so far."""
    child = os.fork()
    if child == 0:
        changes = itertools.count()

        def watch(event, arguments):
            if event == "os.rename" and re.search(made, str(arguments[1])) and next(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            torch.set_num_threads(1)
            run()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


#: How often a study came so far, in every kind of unit, before it was killed.
KILLS = [
    (1, "cells/real-.*/training/checkpoints"),
    (0, "cells/real-.*/segmentor$"),
    (0, "cells/real-.*/unit.json"),
    (1, "generator-.*/checkpoints"),
    (0, "generator-.*/unit.json"),
    (2, "synthetic/.*/images/"),
    (0, "synthetic/.*/unit.json"),
    (0, "scores/.*/unit.json"),
    (0, "audits/"),
]


def test_killed_at_any_time_it_ends_with_the_results_of_an_uninterrupted_run(finished, tiny_recipe, tmp_path):
    for number, made in KILLS:
        assert dies_before(Study(tiny_recipe, Path(), tmp_path).work, number, made), made
    assert done(Study(tiny_recipe, Path(), tmp_path)) == scores(finished)


def decided(study):
    """Make the baseline's segmentors surer than a few steps do, so that their losses differ enough to filter by."""
    for file in study.glob("cells/real-seed-*-????????/segmentor/model.safetensors"):
        weights = load_file(file)
        weights["segmentation_head.0.weight"] *= 20
        save_file(weights, file)


def test_a_filtered_arm_trains_on_painted_tiles_without_their_implausible_labels(finished, tiny_recipe, tmp_path):
    from terrasynth.curation.filter import class_mean_losses, filter_pixels
    from terrasynth.data.folder import load_synthetic, load_tiles
    from terrasynth.tasks.segmentation import Segmentor

    shutil.copytree(finished, tmp_path / "study")
    decided(tmp_path / "study")
    arms = (tiny_recipe.study.arms[0], ArmConfig(name="filtered", synthetic="plain", filter=True))
    update = {"arms": arms, "plateau_check": "none"}
    recipe = tiny_recipe.model_copy(update={"study": tiny_recipe.study.model_copy(update=update)})
    Study(recipe, Path(), tmp_path / "study").run()

    made = {name.rsplit("-", 1)[0] for name in stamps(tmp_path / "study").keys() - stamps(finished).keys()}
    assert made == {f"{place}/filtered-seed-{seed}" for place in ("cells", "scores") for seed in (0, 1)}
    shares = []
    for seed in (0, 1):
        (judge,) = (tmp_path / "study").glob(f"cells/real-seed-{seed}-????????/segmentor")
        (dataset,) = finished.glob(f"synthetic/plain-seed-{seed}-*/dataset")
        (cell,) = (tmp_path / "study").glob(f"cells/filtered-seed-{seed}-*")
        segmentor, real, painted = (
            Segmentor.from_pretrained(judge),
            load_tiles(recipe.data, "train"),
            load_synthetic(dataset),
        )
        means = class_mean_losses(segmentor.pixel_losses(real), real.masks, real.schema.num_classes)
        masks = filter_pixels(painted.masks, segmentor.pixel_losses(painted), means)
        share = (masks != painted.masks).float().mean().item()
        assert 0 < share < 1
        result = json.loads((cell / "unit.json").read_text())["result"]
        assert result["filter"]["dropped"] == pytest.approx(share)
        road = painted.masks == real.schema.names.index("road")
        assert result["filter"]["dropped/road"] == pytest.approx((masks != painted.masks)[road].float().mean().item())
        shares.append(share)
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert results["filtered"].keys() == {"filtered"}
    assert results["filtered"]["filtered"]["dropped"] == pytest.approx(sum(shares) / 2)
    assert "left unlabelled" in (tmp_path / "study" / "report.html").read_text()


def test_an_interrupted_filtered_cell_goes_on_with_the_masks_it_began_with(finished, tiny_recipe, tmp_path):
    class Hurry(Clock):
        def left(self):
            return 1e-9

    shutil.copytree(finished, tmp_path / "study")
    arm = ArmConfig(name="filtered", synthetic="plain", filter=True)
    decided(tmp_path / "study")
    study = Study(tiny_recipe, Path(), tmp_path / "study")
    whole = study.cell(arm, 0)
    assert not (whole.folder / "filtered").exists()
    shutil.rmtree(whole.folder)

    study.clock = Hurry()
    with pytest.raises(OutOfTime):
        study.cell(arm, 0)
    # As if another machine rounded otherwise: the losses move, and with them what the filter would drop.
    decided(tmp_path / "study")
    study.clock = Clock()
    assert study.cell(arm, 0).result == whole.result


def test_a_curated_arm_trains_on_what_the_rules_leave(finished, tiny_recipe, tmp_path):
    from terrasynth.curation.curate import curate
    from terrasynth.curation.score import score_dataset
    from terrasynth.data.folder import join, load_synthetic, load_tiles
    from terrasynth.recipe import CurationConfig

    class Hurry(Clock):
        def left(self):
            return 1e-9

    shutil.copytree(finished, tmp_path / "study")
    decided(tmp_path / "study")
    rules = CurationConfig(margin=1.5, resample=2, balance="uniform")
    arms = (tiny_recipe.study.arms[0], ArmConfig(name="curated", synthetic="plain", curate=rules))
    update = {"arms": arms, "plateau_check": "none", "seeds": (0, 1)}
    recipe = tiny_recipe.model_copy(update={"study": tiny_recipe.study.model_copy(update=update)})
    study = Study(recipe, Path(), tmp_path / "study")
    study.clock = Hurry()
    with pytest.raises(OutOfTime):
        study.cell(arms[1], 1)
    state = next((tmp_path / "study").glob("cells/curated-seed-1-*/training/checkpoints/*/state.json"))
    trained_on = json.loads(state.read_text())["identity"]["data"]["painted"]
    Study(recipe, Path(), tmp_path / "study").run()
    assert (
        "rules margin 1.5, resample 2, balance uniform, max_weight 4.0"
        in (tmp_path / "study" / "report.html").read_text()
    )

    # The same by the way of the command: scores in the dataset, and a view of it.
    (teacher,) = (tmp_path / "study").glob("cells/real-seed-1-????????/segmentor")
    (painted,) = (tmp_path / "study").glob("synthetic/plain-seed-1-*/dataset")
    score_dataset(painted, teacher, load_tiles(recipe.data, "train"))
    curate(painted, "view", rules, seed=1)
    view, everything = load_synthetic(painted, view="view"), load_synthetic(painted)
    assert trained_on == join([view]).fingerprint()
    (cell,) = (tmp_path / "study").glob("cells/curated-seed-1-*")
    result = json.loads((cell / "unit.json").read_text())["result"]
    assert result["used"] == len(view) / len(everything)
    labelled = [(tiles.masks != 255).sum().item() for tiles in (view, everything)]
    assert result["filter"]["dropped"] == pytest.approx(1 - labelled[0] / labelled[1])


def test_an_arm_that_filters_nothing_is_refused():
    with pytest.raises(ValueError, match="needs painted tiles"):
        ArmConfig(name="real, filtered", filter=True)
    with pytest.raises(ValueError, match="so filter must be false"):
        ArmConfig(name="twice", synthetic="plain", filter=True, curate={})


def test_the_report_is_there_and_answers(finished):
    page = (finished / "report.html").read_text()
    assert verdict(read_results(finished)).headline.split(".")[0] in page
    assert "<script" not in page


def test_another_process_does_the_units_and_what_it_is_at_is_waited_for(finished, tiny_recipe, tmp_path):
    with workers(1, tiny_recipe, Path(), tmp_path):
        for _ in range(1200):
            if stamps(tmp_path):
                break
            time.sleep(0.1)
        assert stamps(tmp_path)
        assert done(Study(tiny_recipe, Path(), tmp_path)) == scores(finished)
    assert stamps(tmp_path).keys() <= stamps(finished).keys()  # where other tests leave theirs


def test_a_process_that_starts_beside_another_takes_other_units(tiny_recipe, tmp_path):
    real, mixed = tiny_recipe.study.arms[:2]
    update = {"arms": (real, mixed), "plateau_check": "none"}
    recipe = tiny_recipe.model_copy(update={"study": tiny_recipe.study.model_copy(update=update)})
    first = Study(recipe, Path(), tmp_path).cell(real, 0).folder
    (first / "unit.json").unlink()
    ended = []
    thread = threading.Thread(target=lambda: ended.append(Study(recipe, Path(), tmp_path).work()))
    with (first / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        for _ in range(1200):
            if len(stamps(tmp_path)) == 7:
                break
            time.sleep(0.1)
        # Three other cells and their scores, and the audit of the splits; the last is still somebody else's.
        assert len(stamps(tmp_path)) == 7
        assert not ended
    thread.join(120)
    assert ended
    assert len(stamps(tmp_path)) == 9


def test_out_of_time_stops_and_the_same_call_goes_on(tiny_recipe, tmp_path):
    with pytest.raises(OutOfTime):
        Study(tiny_recipe, Path(), tmp_path, max_minutes=0.0).run()
    assert not (tmp_path / "results.json").exists()


def test_a_unit_is_done_once_and_its_time_adds_up_over_sittings(tmp_path):
    calls = []

    def work(folder):
        calls.append(folder)
        if len(calls) == 1:
            time.sleep(0.2)
            raise RuntimeError("killed")
        return {"answer": 42}

    with pytest.raises(RuntimeError):
        do(tmp_path, "A unit!", {"x": 1}, Clock(), work)
    unit = do(tmp_path, "A unit!", {"x": 1}, Clock(), work)
    assert unit == do(tmp_path, "A unit!", {"x": 1}, Clock(), work)
    assert len(calls) == 2
    assert calls[0] == calls[1] == unit.folder
    assert unit.folder.name.startswith("a-unit-")
    assert unit.seconds >= 0.2
    assert do(tmp_path, "A unit!", {"x": 2}, Clock(), lambda folder: None).folder != unit.folder


def test_a_unit_whose_product_was_deleted_is_done_again(tmp_path):
    def work(folder):
        (folder / "model").mkdir()

    unit = do(tmp_path, "unit", {}, Clock(), work, products=("model",))
    (unit.folder / "model").rmdir()
    assert (do(tmp_path, "unit", {}, Clock(), work, products=("model",)).folder / "model").is_dir()


def test_a_piece_missing_from_a_painted_dataset_is_named_with_the_way_out(finished, tiny_recipe, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    image = next((tmp_path / "copy").glob("synthetic/plain-seed-0-*/dataset/images/000001.png"))
    image.unlink()
    with pytest.raises(TerraSynthError, match=r"delete .*unit\.json"):
        Study(tiny_recipe, Path(), tmp_path / "copy").run()
    (image.parents[2] / "unit.json").unlink()
    assert done(Study(tiny_recipe, Path(), tmp_path / "copy")) == scores(finished)


def test_more_painted_tiles_continue_the_set_and_change_no_arm_that_takes_fewer(finished, tiny_recipe, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    before = stamps(tmp_path / "study")
    (dataset,) = (tmp_path / "study").glob("synthetic/plain-seed-0-*/dataset")
    first = (dataset / "images" / "000003.png").read_bytes()
    arms = (tiny_recipe.study.arms[0], tiny_recipe.study.arms[2], ArmConfig(name="more", synthetic="plain", ratio=2))
    study = tiny_recipe.study.model_copy(update={"arms": arms, "plateau_check": "none"})
    Study(tiny_recipe.model_copy(update={"study": study}), Path(), tmp_path / "study").run()
    assert len(list((dataset / "images").iterdir())) == 8
    assert (dataset / "images" / "000003.png").read_bytes() == first
    after = stamps(tmp_path / "study")
    changed = {name.rsplit("-", 1)[0] for name, stamp in after.items() if before.get(name) != stamp}
    assert changed == {
        f"{place}-seed-{seed}"
        for place in ("synthetic/plain", "cells/more", "scores/more", "scores/agreement-plain", "audits/plain")
        for seed in (0, 1)
    }
    page = (tmp_path / "study" / "report.html").read_text()
    assert "“real + synthetic” has the first 4 of them" in page


def test_the_search_gives_every_arm_its_best_settings_and_trains_no_cell_twice(finished, tiny_recipe, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    usual = tiny_recipe.segmentor.train
    update = {
        "arms": tiny_recipe.study.arms[:2],
        "plateau_check": "none",
        "search": SearchConfig(learning_rates=(usual.learning_rate, 1e-6), steps=(usual.steps, 5)),
    }
    recipe = tiny_recipe.model_copy(update={"study": tiny_recipe.study.model_copy(update=update)})
    study = Study(recipe, Path(), tmp_path / "study")
    study.run()
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    trained = 0
    for arm, settings in zip(recipe.study.arms, results["settings"], strict=True):
        slug = arm.name.replace(" + ", "-").lower()
        cells = (tmp_path / "study" / "cells").glob(f"{slug}-seed-0*/unit.json")
        units = [unit for unit in map(json.loads, (c.read_text() for c in cells)) if "8 steps" not in unit["name"]]
        assert len(units) == 4
        best = max(max(unit["result"]["curve"]["miou"]) for unit in units)
        chosen = [
            unit
            for unit in units
            if all(unit["inputs"]["segmentor"]["train"][key] == settings[key] for key in ("learning_rate", "steps"))
        ]
        assert len(chosen) == 1
        assert max(chosen[0]["result"]["curve"]["miou"]) == best
        trained += sum(unit["seconds"] for unit in units)
    assert results["total_seconds"] > trained
    page = (tmp_path / "study" / "report.html").read_text()
    assert "learning rate and steps" in page


def test_a_baseline_with_synthetic_data_is_refused(tiny_recipe):
    recipe = tiny_recipe.model_dump()
    recipe["study"]["arms"] = recipe["study"]["arms"][::-1]
    with pytest.raises(ValueError, match="is the baseline, so it may add no tiles: its synthetic must be none"):
        Recipe.model_validate(recipe)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("study", {"real_fraction": 0.01}, "leaves no place for real ones"),
        ("study", {"real_fraction": 1.0}, "leaves no place for added ones"),
        (
            "study",
            {"search": {"learning_rates": [1e-3], "steps": [4, 1]}},
            r"less than each of study.search.steps \(1\)",
        ),
        ("steering", {"start": 3}, r"steering.start \(3\) must be less than sampling.steps \(3\)"),
    ],
)
def test_a_recipe_that_can_only_fail_late_or_mean_something_else_is_refused(tiny_recipe, section, settings, message):
    recipe = tiny_recipe.model_dump()
    recipe[section] |= settings
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(recipe)


def test_another_base_model_under_the_same_name_trains_another_generator(tiny_recipe, finished, tmp_path):
    (model,) = finished.glob("generator-*/model")
    shutil.copytree(model, tmp_path / "base")
    generator = tiny_recipe.generator.model_copy(update={"base": str(tmp_path / "base")})
    recipe = tiny_recipe.model_copy(update={"generator": generator})
    first = Study(recipe, Path(), tmp_path / "out").generator
    assert Study(recipe, Path(), tmp_path / "out").generator == first
    file = next((tmp_path / "base" / "transformer").glob("*.safetensors"))
    save_file({name: 0 * value for name, value in load_file(file).items()}, file)
    assert Study(recipe, Path(), tmp_path / "out").generator.key != first.key


def test_a_mistyped_base_model_is_named_before_anything_is_trained(tiny_recipe, tmp_path):
    generator = tiny_recipe.generator.model_copy(update={"base": "terrasynth-tinny"})
    with pytest.raises(TerraSynthError, match="did you mean `terrasynth-tiny`"):
        Study(tiny_recipe.model_copy(update={"generator": generator}), Path(), tmp_path)


# Unlabelled images under what the teachers read in them


@pytest.fixture(scope="module")
def semi_supervised(tiny_recipe, tmp_path_factory):
    """The tiny study on folders, with unlabelled images beside the labelled tiles."""
    from PIL import Image

    from terrasynth.data.folder import load_tiles

    root = tmp_path_factory.mktemp("tiles")
    for split in ("train", "validation", "test"):
        tiles = load_tiles(tiny_recipe.data, split)
        for kind, arrays in (("images", tiles.images.movedim(1, -1)), ("masks", tiles.masks)):
            (root / kind / split).mkdir(parents=True)
            for id_, array in zip(tiles.ids, arrays.numpy(), strict=True):
                Image.fromarray(array).save(root / kind / split / f"{id_}.png")
    world = tiny_recipe.data.world.model_copy(update={"train": 3, "seed": 5})
    more = load_tiles(tiny_recipe.data.model_copy(update={"world": world}), "train")
    (root / "more").mkdir()
    for id_, array in zip(more.ids, more.images.movedim(1, -1).numpy(), strict=True):
        Image.fromarray(array).save(root / "more" / f"{id_}.png")
    more.schema.to_yaml(root / "classes.yaml")
    splits = {name: {"folder": name, "list": None} for name in ("train", "validation", "test")}
    recipe = tiny_recipe.model_dump(mode="json")
    recipe["data"] |= {"kind": "folder", "root": str(root), "label_schema": "classes.yaml", **splits}
    recipe["data"]["unlabelled"] = [{"images": "more/*.png", "windows": 1, "scale": [1.0, 1.0]}]
    recipe["generator"] |= {"pseudo_labels": 0.18}
    arms = [
        {"name": "real"},
        {"name": "mixed", "mix": "cutmix"},
        {"name": "painted", "synthetic": "plain", "ratio": 2},
    ]
    recipe["study"] |= {"layouts": "all", "seeds": [0, 1], "arms": arms, "plateau_check": "none", "teacher": "mixed"}
    return Recipe.model_validate(recipe)


@pytest.fixture(scope="module")
def taught(semi_supervised, tmp_path_factory):
    """Its folder when it is done, and the unlabelled tiles that its generator was trained on."""
    from terrasynth.study import run

    out, seen, fit_generator = tmp_path_factory.mktemp("taught"), [], run.fit_generator

    def spy(*arguments, **named):
        seen.append(named["unlabelled"])
        return fit_generator(*arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "fit_generator", spy)
        Study(semi_supervised, Path(), out).run()
    return out, seen


def test_generator_and_layouts_take_what_the_teachers_read_in_unlabelled_images(semi_supervised, taught):
    from terrasynth.data.augment import view
    from terrasynth.data.folder import load_synthetic
    from terrasynth.systems.generate import plan
    from terrasynth.tasks.segmentation import Segmentor, label

    out, seen = taught
    study = Study(semi_supervised, Path(), out)
    cells = [study.cell(study.recipe.study.arms[1], seed) for seed in (0, 1)]
    teachers = [Segmentor.from_pretrained(cell.folder / "segmentor") for cell in cells]
    assert torch.equal(seen[0].masks, label(teachers, study.unlabelled, 0.18))
    assert seen[0].captions() == [study.train.schema.caption(mask, study.train.caption) for mask in seen[0].masks]

    unsure = (seen[0].masks == study.train.schema.ignore_index).float().mean()
    assert 0 < unsure < 1

    labels = label(teachers, study.unlabelled)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0)).tolist()
    read = [labels[order[i % 3]] for i in range(4)]
    layouts = [mask for pair in zip(study.train.masks, read, strict=True) for mask in pair]
    painted = load_synthetic(study.painted("plain", 0).folder / "dataset")
    assert len(painted) == 8
    for job, mask in zip(plan(8, 8, 0), painted.masks, strict=True):
        assert torch.equal(mask, view(study.train.images[0], layouts[job.source], job.view)[1])
    page = (out / "report.html").read_text()
    assert "the segmentors of “mixed”, all seeds together, read in them with a probability of 0.18 or more" in page
    assert "Mask, as teachers read it" in page
    assert len(list((out / "readings").glob("*/unit.json"))) == 2


def test_an_arm_trains_on_the_unlabelled_images_themselves(semi_supervised, tmp_path, monkeypatch):
    from terrasynth.data.folder import join, load_synthetic
    from terrasynth.study import run

    added = {}

    def spy(*args, **kwargs):
        added[kwargs["label"]] = kwargs["synthetic"]
        return fit(*args, **kwargs)

    fit = run.fit
    monkeypatch.setattr(run, "fit", spy)
    values = semi_supervised.model_dump(mode="json")
    values["study"]["seeds"] = [0]
    values["study"]["arms"][2] = {"name": "read", "pseudo_labels": 0.18}
    study = Study(Recipe.model_validate(values), Path(), tmp_path)
    page = study.run().read_text()
    assert not (tmp_path / "synthetic").exists()
    assert not list(tmp_path.glob("generator-*"))
    read = study.read(0.18)
    assert added["real, seed 0"] is None
    assert added["read, seed 0"].fingerprint() == join([read]).fingerprint()
    assert "3 windows of them train the segmentors of “read”, under the classes that the segmentors of “mixed”" in page
    assert "no segmentor is trained on them" not in page

    values["study"]["arms"] += [{"name": "both", "pseudo_labels": 0.18, "synthetic": "plain", "ratio": 2}]
    study = Study(Recipe.model_validate(values), Path(), tmp_path)
    page = study.run().read_text()
    painted = load_synthetic(study.painted("plain", 0).folder / "dataset")
    assert torch.equal(added["both, seed 0"].images, torch.cat([painted.images, read.images]))
    assert torch.equal(added["both, seed 0"].masks, torch.cat([painted.masks, read.masks]))
    assert "train the generator beside the training tiles" in page


@pytest.mark.parametrize(
    ("arms", "teacher", "message"),
    [
        ([{"name": "read", "pseudo_labels": 0.5}], None, "may add no tiles"),
        ([{"name": "real"}, {"name": "read", "pseudo_labels": 0.5}], "read", "without added tiles: real"),
    ],
)
def test_what_reads_is_not_trained_on_what_it_read(semi_supervised, arms, teacher, message):
    values = semi_supervised.model_dump(mode="json")
    values["study"] |= {"arms": arms, "teacher": teacher}
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(values)


def test_damaged_readings_are_named_with_the_way_out(semi_supervised, taught, tmp_path):
    shutil.copytree(taught[0], tmp_path / "study")
    study = Study(semi_supervised, Path(), tmp_path / "study")
    masks = study.reading(0.0).folder / "masks.safetensors"
    masks.write_bytes(masks.read_bytes()[:20])
    with pytest.raises(TerraSynthError, match="delete this file"):
        study.layouts(0)
    masks.unlink()
    assert len(study.layouts(0)) == 8


def test_an_arm_is_painted_like_unlabelled_images(semi_supervised, taught, tmp_path, monkeypatch):
    from terrasynth.data.folder import load_synthetic

    values = semi_supervised.model_dump(mode="json")
    values["generator"] |= {"reference": "view", "pseudo_labels": None}
    arms = [{"name": "real"}, {"name": "mixed", "mix": "cutmix"}, {"name": "painted", "synthetic": "plain"}]
    arms.append({"name": "like", "synthetic": "plain", "references": True})
    values["study"] |= {"seeds": [0], "arms": arms, "layouts": "labelled", "ratio": 2}
    shutil.copytree(taught[0] / "cells", tmp_path / "cells")  # of real tiles alone they are the same
    study = Study(Recipe.model_validate(values), Path(), tmp_path)
    page = study.run().read_text()
    plain, like = (study.painted(kind, 0).folder / "dataset" for kind in ("plain", "plain-like"))
    rows = [json.loads(line) for line in (like / "metadata.jsonl").read_text().splitlines()]
    assert {row["reference"] for row in rows} <= set(study.unlabelled.ids)
    assert len({row["reference"] for row in rows}) > 1
    # The same masks under the same seeds, another look.
    before, after = load_synthetic(plain), load_synthetic(like)
    assert before.masks.equal(after.masks)
    assert not before.images.equal(after.images)
    assert {"Reference", "Painted like it"} <= set(re.findall(r"<div>([\w ]+)<img", page))
    assert "tiles are painted like them" in page
    assert "8 (plain), 8 (referenced)" in page
    # Guidance by the reference is a matter of what is painted like one.
    values["sampling"]["reference_scale"] = 1.5
    other = Study(Recipe.model_validate(values), Path(), tmp_path)
    assert other.painted("plain", 0).key == study.painted("plain", 0).key
    keys = []
    monkeypatch.setattr(other, "unit", lambda group, place, name, inputs, work, **made: keys.append(inputs))
    other.painted("plain-like", 0)
    assert keys[-1]["sampling"]["reference_scale"] == 1.5


def test_a_study_of_tisynth(semi_supervised, taught, tmp_path):
    values = semi_supervised.model_dump(mode="json")
    unet = {"widths": [16, 32], "layers": 1}
    values["generator"] |= {"system": "tisynth", "reference": "augmented", "pseudo_labels": None, "unet": unet}
    arms = [{"name": "real"}, {"name": "mixed", "mix": "cutmix"}]
    arms.append({"name": "like", "synthetic": "plain", "references": True, "ratio": 1})
    values["study"] |= {"seeds": [0], "arms": arms, "layouts": "labelled"}
    shutil.copytree(taught[0] / "cells", tmp_path / "cells")
    page = Study(Recipe.model_validate(values), Path(), tmp_path).run().read_text()
    assert "TISynth" in page
    assert "TODSynth" not in page

    values["sampling"]["solver"] = "adams"
    values["study"]["arms"][2]["synthetic"] = "steered"
    with pytest.raises(ValueError, match=r"sampling\.solver is TODSynth's alone") as error:
        Recipe.model_validate(values)
    assert "the arm 'like' is steered, and generator.system: tisynth can not be" in str(error.value)


def test_an_arm_is_adapted_to_unlabelled_images(semi_supervised, tmp_path, monkeypatch):
    from terrasynth.data.folder import unlabelled_windows
    from terrasynth.study import run
    from terrasynth.tasks.segmentation import Segmentor, adapt

    values = semi_supervised.model_dump(mode="json")
    values["generator"] |= {"pseudo_labels": None}
    arms = [{"name": "real"}, {"name": "mixed", "mix": "cutmix"}, {"name": "adapted", "adapt": True}]
    values["study"] |= {"seeds": [0], "arms": arms, "layouts": "labelled"}
    study = Study(Recipe.model_validate(values), Path(), tmp_path)
    trained, fit = [], run.fit
    monkeypatch.setattr(run, "fit", lambda *a, **k: trained.append(k["label"]) or fit(*a, **k))
    page = study.run().read_text()
    assert trained == ["real, seed 0", "mixed, seed 0"]  # and none for the adapted one
    plain, adapted = (
        Segmentor.from_pretrained(study.cell(study.recipe.study.arms[i], 0).folder / "segmentor") for i in (0, 2)
    )
    changed = {
        name.rpartition(".")[2]
        for (name, a), b in zip(plain.state_dict().items(), adapted.state_dict().values(), strict=True)
        if not torch.equal(a, b)
    }
    assert {"running_mean", "running_var"} <= changed <= {"running_mean", "running_var", "num_batches_tracked"}
    adapt(plain, unlabelled_windows(study.recipe.data, study.train.schema).images)
    # Beside it, what the test tiles would have made of it.
    other = Segmentor.from_pretrained(study.cell(study.recipe.study.arms[0], 0).folder / "segmentor")
    adapt(other, study.test.images)
    assert not all(torch.equal(a, b) for a, b in zip(other.buffers(), adapted.buffers(), strict=True))
    for one, other in zip(plain.state_dict().values(), adapted.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert "give the batch norms of “adapted” their statistics" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator": {"reference": None}}, "generator that learned to look at them: generator.reference"),
        (
            {"generator": {"reference_dropout": 0.0}, "sampling": {"reference_scale": 2.0}},
            "generator.reference_dropout",
        ),
        ({"data": {"unlabelled": []}}, "references of an arm needs unlabelled images"),
    ],
)
def test_references_that_can_not_be_are_refused(semi_supervised, changes, message):
    values = semi_supervised.model_dump(mode="json")
    values["generator"] |= {"reference": "view", "pseudo_labels": None}
    values["study"] |= {"layouts": "labelled"}
    values["study"]["arms"][2]["references"] = True
    Recipe.model_validate(values)
    for section, settings in changes.items():
        values[section] |= settings
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(values)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("changed", [lambda image: image, np.fliplr, np.rot90], ids=["copied", "flipped", "turned"])
def test_an_unlabelled_image_that_is_a_copy_of_a_held_out_tile_is_refused(semi_supervised, tmp_path, split, changed):
    from PIL import Image

    shutil.copytree(semi_supervised.data.root, tmp_path / "tiles")
    copied = next((tmp_path / "tiles" / "images" / split).iterdir())
    Image.fromarray(changed(open_image(copied).values)).save(tmp_path / "tiles" / "more" / "another-name.png")
    values = semi_supervised.model_dump(mode="json")
    values["data"]["root"] = str(tmp_path / "tiles")
    with pytest.raises(TerraSynthError, match=rf"unlabelled/.*another-name.* = {split}/"):
        Study(Recipe.model_validate(values), Path(), tmp_path / "out").test  # noqa: B018


def test_near_copies_of_held_out_tiles_in_what_is_trained_on_are_reported(semi_supervised, tmp_path):
    """Scaled and compressed again, so that no digest and no name tells them."""
    from PIL import Image

    shutil.copytree(semi_supervised.data.root, tmp_path / "tiles")
    test, validation = (
        Image.open(next((tmp_path / "tiles" / "images" / split).iterdir())) for split in ("test", "validation")
    )
    test.resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "tiles" / "more" / "larger.png")
    validation.rotate(90).save(tmp_path / "tiles" / "images" / "train" / "compressed.jpg", quality=80)
    mask = next((tmp_path / "tiles" / "masks" / "train").iterdir())
    shutil.copy(mask, mask.with_name("compressed.png"))
    values = semi_supervised.model_dump(mode="json")
    values["data"]["root"] = str(tmp_path / "tiles")
    values["data"]["unlabelled"] = [{"images": "more/*.png", "windows": 1, "scale": None}]
    unit = Study(Recipe.model_validate(values), Path(), tmp_path / "out").audited_splits()
    copies = {(one["painted"], one["other"]) for one in unit.result["findings"]}
    assert copies == {
        ("unlabelled/source-0-more/larger.png-000", "test/test-00000"),
        ("train/compressed", "validation/validation-00000"),
    }
    assert [(one["name"], one["copies"]) for one in unit.result["sets"]] == [("train", 1), ("unlabelled", 1)]
    assert (unit.folder / "audit.png").is_file()

    # Where no arm takes the unlabelled images, nothing is learned from them.
    values["study"] |= {"arms": [{"name": "real"}], "layouts": "labelled", "teacher": None}
    values["generator"]["pseudo_labels"] = None
    unit = Study(Recipe.model_validate(values), Path(), tmp_path / "out").audited_splits()
    assert [(one["name"], one["copies"]) for one in unit.result["sets"]] == [("train", 1)]


def test_killed_while_it_learns_from_unlabelled_images_it_ends_with_the_same_results(semi_supervised, taught, tmp_path):
    def beside_another():
        with workers(1, semi_supervised, Path(), tmp_path):
            before = len(stamps(tmp_path))
            for _ in range(1200):
                if len(stamps(tmp_path)) > before:
                    break
                time.sleep(0.1)
            Study(semi_supervised, Path(), tmp_path).work()

    for number, made in ((0, "readings/.*/masks"), (0, "readings/.*/unit.json"), (1, "generator-.*/checkpoints")):
        assert dies_before(Study(semi_supervised, Path(), tmp_path).work, number, made), made
    # The other process ends with it, wherever it is.
    assert dies_before(beside_another, 0, str(tmp_path))
    assert done(Study(semi_supervised, Path(), tmp_path)) == scores(taught[0])


@pytest.mark.parametrize(
    ("pattern", "data"),
    [
        ("images/*/*.png", {}),
        ("images/test/*.png", {"images": "./images/{split}/"}),
        ("images/train/../test/*.png", {}),
        ("images/validation/*.png", {"validation": {"folder": "./validation", "list": None}}),
        ("link/*.png", {}),
    ],
)
@pytest.mark.parametrize("pseudo_labels", [None, 0.18])
def test_no_generator_sees_validation_or_test_tiles(semi_supervised, tmp_path, pattern, data, pseudo_labels):
    shutil.copytree(semi_supervised.data.root, tmp_path / "tiles")
    (tmp_path / "tiles" / "link").symlink_to(tmp_path / "tiles" / "images" / "test")
    values = semi_supervised.model_dump(mode="json")
    values["data"] |= {"root": str(tmp_path / "tiles"), **data}
    values["data"]["unlabelled"] = [{"images": pattern, "windows": 1, "scale": [1.0, 1.0]}]
    values["generator"]["pseudo_labels"] = pseudo_labels
    values["study"]["layouts"] = "labelled"
    with pytest.raises(TerraSynthError, match="validation or test tiles"):
        Study(Recipe.model_validate(values), Path(), tmp_path / "out").generator  # noqa: B018


@pytest.mark.parametrize("teacher", ["painted", "nobody"])
def test_a_teacher_that_is_no_arm_of_real_tiles_is_refused(semi_supervised, teacher):
    values = semi_supervised.model_dump(mode="json")
    values["study"]["teacher"] = teacher
    with pytest.raises(ValueError, match=f"teacher \\('{teacher}'\\) must be an arm without added tiles: real, mixed"):
        Recipe.model_validate(values)


def test_pseudo_labels_without_unlabelled_images_are_refused(tiny_recipe):
    arms = [{"name": "real"}, {"name": "read", "pseudo_labels": 0.18}]
    for section, setting in (
        ("generator", {"pseudo_labels": 0.18}),
        ("study", {"layouts": "all"}),
        ("study", {"arms": arms}),
    ):
        values = tiny_recipe.model_dump(mode="json")
        values[section] |= setting
        with pytest.raises(ValueError, match="needs unlabelled images"):
            Recipe.model_validate(values)
