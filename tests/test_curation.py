"""Curation against loops over single pixels, closed forms and brute force; scores that survive kills and growth."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.curation.curate import curate
from terrasynth.curation.filter import class_mean_losses, filter_pixels, loss_codes
from terrasynth.curation.score import score_dataset
from terrasynth.curation.select import (
    Table,
    balanced,
    hardness,
    histogram,
    rare_classes,
    resampled,
    select,
    times_used,
    wanted_shares,
    worth_keeping,
)
from terrasynth.data.export import export
from terrasynth.data.folder import join, load_synthetic, load_tiles
from terrasynth.data.scores import ClassStatistics, read_codes
from terrasynth.data.write import SyntheticWriter, read_manifest
from terrasynth.errors import TerraSynthError
from terrasynth.io import alone, read_json
from terrasynth.recipe import CurationConfig
from terrasynth.recipe_io import curation_config, explain
from terrasynth.tasks.segmentation import Segmentor
from terrasynth.training.keys import mixed_keys, shuffled_keys

IGNORE = 255


# --- codes -----------------------------------------------------------------------------------------------------------


def test_a_code_says_for_every_margin_what_the_filter_does():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(4, (2, 40, 40), generator=generator, dtype=torch.uint8)
    masks[0, :3] = IGNORE
    means = torch.tensor([0.3, 1.7, 0.0, math.inf], dtype=torch.float64)
    losses = 3 * torch.rand(masks.shape, generator=generator) ** 3
    # At the limits themselves, and at their neighbours among the numbers.
    limits = (torch.arange(255).double() / 64 * 0.3).float()
    masks[1, :20] = 0
    around = torch.cat([limits, torch.nextafter(limits, limits + 1), torch.nextafter(limits, limits - 1)])
    losses[1, :20] = torch.cat([around, torch.zeros(800 - len(around))]).reshape(20, 40)
    codes = loss_codes(masks, losses, means)
    assert codes.dtype == torch.uint8
    for k in range(255):
        dropped = (filter_pixels(masks, losses, means, k / 64, IGNORE) == IGNORE) & (masks != IGNORE)
        assert torch.equal(codes > k, dropped), k
    assert not codes[masks == IGNORE].any()
    assert not codes[masks == 3].any()


# --- hardness --------------------------------------------------------------------------------------------------------


def test_hardness_is_the_mean_of_the_class_losses_over_the_pixels():
    random = np.random.default_rng(0)
    pixels, losses = random.integers(0, 50, (7, 4)), np.array([0.2, 1.5, 0.7, math.inf])
    pixels[3] = [0, 0, 0, 9]
    for counts, value in zip(pixels, hardness(pixels, losses), strict=True):
        values = [losses[c] for c in range(3) for _ in range(counts[c])]
        assert value == pytest.approx(sum(values) / len(values) if values else 0)


def test_hard_masks_are_used_as_often_as_published():
    assert times_used(5, 20) == [5, 9, 13, 17, 20]
    assert times_used(3, 20) == [8, 14, 20]
    assert times_used(1, 20) == [20]
    for count in (2, 7, 100, 3000):
        assert times_used(count, 20) == [min(1 + round(20 * (i + 1) / count), 20) for i in range(count)]


@pytest.mark.parametrize("painted", [1, 6, 20, 30])
def test_a_masks_paintings_are_used_so_often_together_however_many_there_are(painted):
    # Five masks, harder and harder, painted alike often; in the file in another order.
    names = [(f"mask{m}", f"{m + 5 * p:06d}") for p in range(painted) for m in (3, 1, 4, 0, 2)]
    hard = np.array([float(source[4:]) for source, _ in names])
    weights = resampled(names, hard, np.full(len(names), 100), 20, seed=1)
    for mask, uses in enumerate(times_used(5, 20)):
        mine = np.array([w for (source, _), w in zip(names, weights, strict=True) if source == f"mask{mask}"])
        assert mine.sum() == pytest.approx(uses)
        assert (mine > 0).sum() == min(uses, painted)
        assert len(set(mine[mine > 0])) == 1
    assert np.array_equal(weights, resampled(names, hard, np.full(len(names), 100), 20, seed=1))
    if painted == 20:
        assert not np.array_equal(weights, resampled(names, hard, np.full(len(names), 100), 20, seed=2))


# --- rare classes ----------------------------------------------------------------------------------------------------


def test_rare_is_less_than_half_of_an_even_share():
    assert rare_classes(np.array([124, 125, 251, 500])).tolist() == [0]
    assert rare_classes(np.array([0, 10, 10])).tolist() == [0]
    assert rare_classes(np.array([10, 10])).tolist() == []


def test_a_sample_stays_for_a_rare_pixel_or_enough_labels():
    kept = np.array([[81, 0, 0], [80, 0, 0], [0, 1, 0], [40, 41, 0], [0, 0, 0]])
    sizes = np.full(5, 100)
    assert worth_keeping(kept, sizes, np.array([1]), 0.8).tolist() == [True, False, True, True, False]
    assert worth_keeping(kept, sizes, np.array([], dtype=int), 0.8).tolist() == [True, False, False, True, False]


# --- balance ---------------------------------------------------------------------------------------------------------


def divergence(wanted, pixels, weights):
    h = histogram(pixels, weights)
    return sum(t * math.log(t / x) for t, x in zip(wanted, h, strict=True) if t > 0)


@pytest.mark.parametrize("max_weight", [1.5, 3.0])
def test_balanced_weights_are_as_good_as_the_best_of_a_fine_grid(max_weight):
    random = np.random.default_rng(3)
    for wanted in (np.full(3, 1 / 3), np.array([0.7, 0.3, 0.0])):
        pixels = random.integers(0, 90, (4, 3)) + np.array([[200, 0, 0], [100, 9, 0], [0, 60, 20], [50, 0, 5]])
        shares = pixels.sum(1) / pixels.sum()
        weights = balanced(pixels, wanted, np.ones(4), max_weight)
        assert (weights @ shares) == pytest.approx(1)
        assert weights.min() >= 1 / max_weight - 1e-9
        assert weights.max() <= max_weight + 1e-9
        grid = np.linspace(1 / max_weight, max_weight, 41)
        candidates = np.array(list(itertools.product(grid, repeat=3)))
        last = (1 - candidates @ shares[:3]) / shares[3]
        candidates = np.column_stack([candidates, last])[(last >= 1 / max_weight) & (last <= max_weight)]
        best = min(divergence(wanted, pixels, w) for w in candidates)
        assert divergence(wanted, pixels, weights) <= best + 1e-4


def test_a_histogram_that_can_be_had_is_had():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 1000, (60, 5))
    wanted = histogram(pixels, random.uniform(0.5, 2, 60))
    got = histogram(pixels, balanced(pixels, wanted, np.ones(60), 8.0))
    # By Pinsker's inequality and the bound at which it ends.
    assert np.abs(got - wanted).sum() <= math.sqrt(2 * 1e-4)


def test_weights_that_are_balanced_already_stay():
    pixels = np.array([[30, 10], [10, 30], [20, 20]])
    np.testing.assert_allclose(balanced(pixels, np.array([0.5, 0.5]), np.ones(3), 4.0), np.ones(3))
    np.testing.assert_allclose(balanced(pixels, np.array([0.9, 0.1]), np.array([5.0, 1, 1]), 1.0), np.ones(3))


def test_a_class_that_nobody_painted_leaves_its_share_to_the_others():
    pixels = np.array([[90, 10, 0], [10, 90, 0]])
    weights = balanced(pixels, np.array([0.2, 0.2, 0.6]), np.array([1.7, 0.3]), 4.0)
    np.testing.assert_allclose(histogram(pixels, weights), [0.5, 0.5, 0], atol=0.01)


def test_shares_that_are_not_named_are_divided_as_they_are():
    now, real, names = np.array([0.1, 0.6, 0.3]), np.array([1, 1, 2]), ("field", "lake", "road")
    assert wanted_shares("uniform", now, real, names).tolist() == pytest.approx([1 / 3] * 3)
    assert wanted_shares("real", now, real, names).tolist() == [0.25, 0.25, 0.5]
    assert wanted_shares({"field": 0.4}, now, real, names).tolist() == pytest.approx([0.4, 0.4, 0.2])
    with pytest.raises(TerraSynthError, match="names a class that there is not"):
        wanted_shares({"feild": 0.4}, now, real, names)


# --- the rules together ----------------------------------------------------------------------------------------------


def table() -> Table:
    return Table(
        ids=tuple("abcdef"),
        sources=("m0", "m1", "m0", "m1", "m2", "m2"),
        sizes=np.full(6, 100),
        pixels=np.array([[100, 0], [50, 50], [100, 0], [50, 50], [0, 100], [0, 0]]),
        kept=np.array([[90, 0], [40, 20], [70, 0], [0, 0], [0, 60], [0, 0]]),
        accuracy=np.array([0.9, 0.6, 0.7, 0.1, 0.6, math.nan]),
        miou=np.array([0.8, 0.4, 0.5, 0.1, 0.3, math.nan]),
        mean_losses=np.array([0.5, 2.0]),
        real_pixels=np.array([900, 100]),
    )


def used(**rules) -> dict[str, float]:
    weights = select(table(), CurationConfig(**rules), ("field", "lake"), seed=0).weights
    labels = table().kept.sum(1)
    assert (weights @ labels) / labels[weights > 0].sum() == pytest.approx(1)
    return {id: weight for id, weight in zip("abcdef", weights, strict=True) if weight}


def test_the_rules_leave_out_what_they_say():
    assert used() == dict.fromkeys("abce", 1.0)
    assert used(min_accuracy=0.7) == dict.fromkeys("ac", 1.0)
    assert used(min_miou=0.4) == dict.fromkeys("abc", 1.0)
    assert used(rare="auto") == dict.fromkeys("abe", 1.0)
    assert used(rare=("field",)) == dict.fromkeys("abc", 1.0)
    assert used(rare=("lake",), valid_share=0.5) == dict.fromkeys("abce", 1.0)
    # Among three masks of which m0 is the easiest: 8, 14 and 20 uses, of two, one and one paintings.
    weights = used(resample=20)
    assert [weights[id] / weights["a"] for id in "cbe"] == pytest.approx([1, 14 / 4, 20 / 4])
    assert len(used(resample=1)) == 3
    assert used(balance="uniform")["e"] > 1


def test_hard_is_a_mask_and_not_what_the_filter_leaves_of_it():
    # The second mask has more of the hard class; the filter leaves more of it in the first.
    two = replace(
        table(),
        ids=("a", "b"),
        sources=("m0", "m1"),
        sizes=np.full(2, 100),
        pixels=np.array([[60, 40], [40, 60]]),
        kept=np.array([[10, 40], [40, 10]]),
        accuracy=np.full(2, 0.5),
        miou=np.full(2, 0.5),
    )
    easy, hard = select(two, CurationConfig(resample=20), ("field", "lake"), seed=0).weights
    assert hard / easy == pytest.approx(20 / 11)


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"min_accuracy": 0.95}, "no sample is left"),
        ({"rare": ("lake", "sea")}, "`rare` names a class that there is not\n  found:    sea"),
    ],
)
def test_rules_that_leave_nothing_or_name_nothing_are_told(rules, told):
    with pytest.raises(TerraSynthError, match=told):
        used(**rules)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"margin": "1.3"}, "1.3 is no multiple of 1/64; near it is 1.296875 or 1.3125"),
        ({"margin": "4"}, "margin: found '4', expected less than or equal to 3.96875"),
        ({"min_miou": 2.0, "resample": 0}, "min_miou: found 2.0, .*\n  resample: found 0"),
        ({"balance": "unifrm"}, "balance: found unifrm, expected 'uniform' or 'real'"),
        ({"balance": "a=0.7,b=0.6"}, "sum to 1.3, more than 1"),
        ({"valid_share": 0.5}, "--valid-share is a part of --rare, which is not given"),
        ({"max_weight": 2.0, "rare": "auto"}, "--max-weight is a part of --balance"),
    ],
)
def test_rules_that_can_not_be_are_refused(options, told):
    with pytest.raises(TerraSynthError, match=told):
        curation_config(**options)


def test_options_become_rules():
    config = curation_config(margin="none", rare="a, b", balance="a=0.2,b=.3", resample=None)
    assert config == CurationConfig(margin=None, rare=("a", "b"), balance={"a": 0.2, "b": 0.3})


# --- drawing by weights ----------------------------------------------------------------------------------------------


def test_samples_are_drawn_by_their_weights_and_evenly():
    weights = [0.0, 0.25, 1.0, 2.5, 1.25, 0.0, 3.0, 0.0]
    keys = shuffled_keys(8, 8, seed=5, weights=weights)
    epochs = [Counter(index for index, _ in keys(step)) for step in range(400)]
    for index, weight in enumerate(weights):
        assert {epoch[index] for epoch in epochs} <= {math.floor(weight), math.ceil(weight)}
        # Of the starts of 400 epochs, hashes: five standard deviations of a binomial.
        assert sum(epoch[index] for epoch in epochs) / 400 == pytest.approx(weight, abs=0.13)
    assert all(sum(epoch.values()) == 8 for epoch in epochs)


def test_equal_weights_draw_as_none_do():
    for step in range(7):
        plain = mixed_keys(5, 9, 4, 0.5, seed=3)(step)
        assert mixed_keys(5, 9, 4, 0.5, seed=3, weights=[0.3] * 9)(step) == plain
        heavy = mixed_keys(5, 9, 4, 0.5, seed=3, weights=[1.0] + [0.0] * 8)(step)
        assert [index for index, _ in heavy] == [plain[0][0], plain[1][0], 5, 5]


# --- a dataset -------------------------------------------------------------------------------------------------------

PLAN = {"model": "0f1e"}


@pytest.fixture(scope="module")
def real(tiny_recipe):
    return load_tiles(tiny_recipe.data, "train")


@pytest.fixture(scope="module")
def segmentor(tiny_recipe, real, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("segmentor") / "segmentor"
    network = Segmentor.build(tiny_recipe.segmentor, real.schema.num_classes, class_names=real.schema.names)
    # Surer than a new one is, so that its losses differ.
    with torch.no_grad():
        for weights in network.network.segmentation_head.parameters():
            weights.mul_(20)
    network.save_pretrained(folder)
    return folder


def paint(folder: Path, real, count: int = 5) -> Path:
    """Real tiles under masks of which some are another's; two paintings of a mask."""
    writer = SyntheticWriter(folder, real.schema, plan=PLAN)
    done = writer.done()
    for index in range(count):
        mask = real.masks[index // 2 % 4].clone()
        mask[:2] = real.schema.ignore_index
        if f"{index:06d}" not in done:
            writer.add(f"{index:06d}", real.images[index % 4], mask, {"seed": index, "source_mask": f"m{index // 2}"})
    return writer.finish()


@pytest.fixture(scope="module")
def scored(real, segmentor, tmp_path_factory) -> Path:
    folder = paint(tmp_path_factory.mktemp("scored") / "set", real)
    score_dataset(folder, segmentor, real)
    return folder


@pytest.fixture(scope="module")
def viewed(scored, tmp_path_factory) -> Path:
    """With a view called `view`, of some of the samples."""
    folder = shutil.copytree(scored, tmp_path_factory.mktemp("viewed") / "set")
    curate(folder, "view", CurationConfig(margin=1.0, resample=1, balance="uniform"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(folder: Path) -> list[dict]:
    return list(read_manifest(folder)[1])


def test_scores_are_what_the_segmentor_finds_pixel_by_pixel(scored, segmentor, real):
    network = Segmentor.from_pretrained(segmentor)
    means = class_mean_losses(network.pixel_losses(real), real.masks, real.schema.num_classes)
    statistics = ClassStatistics.read(scored)
    np.testing.assert_allclose(statistics.mean_losses, means.tolist(), rtol=1e-6)
    assert list(statistics.pixels) == real.masks.flatten().bincount(minlength=real.schema.num_classes).tolist()
    tiles = load_synthetic(scored)
    for row, image, mask in zip(rows_of(scored), tiles.images, tiles.masks, strict=True):
        with torch.no_grad():
            odds = network(image[None].float() / 255)[0].double().log_softmax(0)
        codes = np.asarray(Image.open(scored / "scores" / f"{row['id']}.png"))
        right, losses, pixels = 0, [], [0] * real.schema.num_classes
        overlap = [[0, 0] for _ in pixels]
        for y, x in itertools.product(range(32), repeat=2):
            label, guess = int(mask[y, x]), int(odds[:, y, x].argmax())
            if label == IGNORE:
                assert codes[y, x] == 0
                continue
            losses.append(-odds[label, y, x].item())
            right += label == guess
            pixels[label] += 1
            for c in {label, guess}:
                overlap[c][0] += label == guess
                overlap[c][1] += 1
            assert codes[y, x] == pytest.approx(min(255, math.ceil(64 * losses[-1] / means[label].item())), abs=1)
        found = row["curation"]
        assert found["pixels"] == pixels
        assert found["accuracy"] == pytest.approx(right / len(losses))
        assert found["miou"] == pytest.approx(np.mean([i / u for i, u in overlap if u]))
        assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert found["statistics"] == statistics.key


def test_a_view_has_the_labels_that_the_filter_leaves(scored, segmentor, real, tmp_path):
    folder = shutil.copytree(scored, tmp_path / "set")
    everything, network = load_synthetic(folder), Segmentor.from_pretrained(segmentor)
    means = torch.tensor(ClassStatistics.read(folder).mean_losses, dtype=torch.float64)
    pairs = zip(everything.images, everything.masks, strict=True)
    losses = torch.cat([network.compare(image[None], mask[None])[0] for image, mask in pairs])
    before = contents(folder)
    for name, margin in (("published", 1.25), ("everything", None)):
        view = curate(folder, name, CurationConfig(margin=margin))
        tiles = load_synthetic(folder, view=name)
        masks = everything.masks if margin is None else filter_pixels(everything.masks, losses, means, margin)
        stays = [index for index, mask in enumerate(masks) if (mask != IGNORE).any()]
        assert torch.equal(tiles.masks, masks[stays])
        assert torch.equal(tiles.images, everything.images[stays])
        assert tiles.weights == pytest.approx([1.0] * len(stays))
        dropped = 1 - (masks != IGNORE).sum().item() / (everything.masks != IGNORE).sum().item()
        assert view.summary["labels_dropped"] == pytest.approx(dropped, abs=1e-6)
        assert (0 < dropped < 1) == (margin is not None)
        assert Image.open(folder / "views" / f"{name}.png").size[0] > 1000
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        f"views/{name}.{kind}" for name in ("published", "everything") for kind in ("json", "png")
    }


def test_views_and_pictures_are_the_same_every_time(scored, tmp_path):
    rules = CurationConfig(resample=2, balance="uniform")
    made = []
    for name in ("a", "b"):
        folder = shutil.copytree(scored, tmp_path / name)
        curate(folder, "view", rules, seed=3)
        made.append(contents(folder / "views"))
    assert made[0] == made[1]
    view = read_json(tmp_path / "a" / "views" / "view.json")
    assert view["settings"] == {**rules.model_dump(mode="json"), "seed": 3}
    tiles = load_synthetic(tmp_path / "a", view="view")
    assert dict(zip(tiles.ids, tiles.weights, strict=True)) == view["weights"]
    assert tiles.first(2).weights == tiles.weights[:2]
    assert join([tiles, replace(tiles, weights=None)]).weights == (*tiles.weights, *[1.0] * len(tiles))
    assert tiles.fingerprint() != replace(tiles, weights=None).fingerprint()


def test_scoring_killed_at_any_rename_ends_as_if_it_was_not(real, segmentor, scored, killed, tmp_path):
    # The statistics, five samples, the rows; the last run comes to its end.
    for renames in (0, 1, 4, 6, 7):
        folder = paint(tmp_path / str(renames), real)
        died = killed(lambda folder=folder: score_dataset(folder, segmentor, real), Path, "replace", renames)
        assert died == (renames < 7)
        score_dataset(folder, segmentor, real)
        assert contents(folder) == contents(scored)


def test_two_processes_do_not_curate_one_dataset(real, segmentor, viewed, tmp_path):
    folder = shutil.copytree(viewed, tmp_path / "set")
    before = contents(folder)
    with alone(folder, TerraSynthError("not expected")):  # a lock belongs to an open file: a second one stays out
        for attempt in (lambda: score_dataset(folder, segmentor, real), lambda: curate(folder, "b", CurationConfig())):
            with pytest.raises(TerraSynthError, match="another process is curating this dataset"):
                attempt()
    assert contents(folder) == before
    curate(folder, "b", CurationConfig())


def test_a_dataset_that_grows_keeps_its_scores_and_gets_those_it_lacks(real, segmentor, viewed, tmp_path):
    whole = paint(tmp_path / "whole", real, 8)
    score_dataset(whole, segmentor, real)
    folder = shutil.copytree(viewed, tmp_path / "set")
    first = {row["id"]: row["curation"] for row in rows_of(folder)}
    early = load_synthetic(folder, view="view")
    paint(folder, real, 8)
    assert {row["id"]: row["curation"] for row in rows_of(folder) if "curation" in row} == first
    assert load_synthetic(folder, view="view").fingerprint() == early.fingerprint()
    with pytest.raises(TerraSynthError, match=r"changed since\n  found:    3 of 8: 000005, 000006, 000007"):
        curate(folder, "late", CurationConfig())
    score_dataset(folder, segmentor, real)
    shutil.rmtree(folder / "views")
    assert contents(folder) == contents(whole)


def test_a_sample_that_was_painted_anew_is_scored_anew(real, segmentor, scored, viewed, tmp_path):
    folder = shutil.copytree(viewed, tmp_path / "set")
    chosen = load_synthetic(folder, view="view").ids[0]
    writer = SyntheticWriter(folder, real.schema, plan=PLAN)
    writer.add(chosen, real.images[2], real.masks[1], {"seed": 9, "source_mask": "m0"})
    writer.finish()
    assert [row["id"] for row in rows_of(folder) if "curation" not in row] == [chosen]
    with pytest.raises(TerraSynthError, match=rf"gone, or were painted again since\n  found:    {chosen}"):
        load_synthetic(folder, view="view")
    score_dataset(folder, segmentor, real)
    now = {row["id"]: row["curation"]["loss"] for row in rows_of(folder)}
    was = {row["id"]: row["curation"]["loss"] for row in rows_of(scored)}
    assert [id for id in now if now[id] != was[id]] == [chosen]


def test_a_mask_that_was_changed_has_no_scores(viewed, segmentor, real, tmp_path):
    folder = shutil.copytree(viewed, tmp_path / "set")
    chosen = load_synthetic(folder, view="view").ids[0]
    mask = folder / "masks" / f"{chosen}.png"
    Image.fromarray(np.full_like(Image.open(mask), 255)).save(mask)
    with pytest.raises(TerraSynthError, match=r"scores of another image or mask.*\n.*terrasynth curate DATASET"):
        load_synthetic(folder, view="view")
    with pytest.raises(TerraSynthError, match=rf"were changed since\n  found:    1 of \d: {chosen}"):
        curate(folder, "view", CurationConfig())
    score_dataset(folder, segmentor, real)
    assert chosen not in load_synthetic(folder, view=curate(folder, "view", CurationConfig()).name).ids


def test_damaged_or_missing_scores_are_told_and_mended(viewed, segmentor, real, tmp_path):
    folder = shutil.copytree(viewed, tmp_path / "set")
    whole = contents(folder)
    first, second = (folder / "scores" / f"{id}.png" for id in load_synthetic(folder, view="view").ids[:2])
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    second.unlink()
    for path in (first, second):
        with pytest.raises(TerraSynthError, match=rf"{path.name}: .*missing or damaged(.|\n)*score it again"):
            read_codes(folder, path.stem, (1, 1))
    with pytest.raises(TerraSynthError, match=r"score it again"):
        load_synthetic(folder, view="view")
    with pytest.raises(TerraSynthError, match="samples have no scores yet"):
        curate(folder, "view", CurationConfig())
    # Rows of the manifest that somebody edited mean nothing.
    rows = [{**row, "curation": ["damaged"]} for row in rows_of(folder)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_dataset(folder, segmentor, real)
    assert contents(folder) == whole


def test_scores_of_another_segmentor_or_by_other_tiles_are_not_mixed(real, segmentor, viewed, tiny_recipe, tmp_path):
    folder = shutil.copytree(viewed, tmp_path / "set")
    other = Segmentor.build(tiny_recipe.segmentor, real.schema.num_classes, class_names=real.schema.names, seed=7)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(TerraSynthError, match=r"scores of another segmentor.*\n  found:    segmentor: "):
        score_dataset(folder, tmp_path / "other", real)
    with pytest.raises(TerraSynthError, match=r"scores of another segmentor.*\n  found:    real: "):
        score_dataset(folder, segmentor, real.first(2))
    shutil.rmtree(folder / "scores")
    with pytest.raises(TerraSynthError, match="made of other scores than the dataset has"):
        load_synthetic(folder, view="view")
    with pytest.raises(TerraSynthError, match="no scores yet"):
        curate(folder, "view", CurationConfig())
    score_dataset(folder, tmp_path / "other", real)
    with pytest.raises(TerraSynthError, match="made of other scores than the dataset has"):
        load_synthetic(folder, view="view")
    curate(folder, "view", CurationConfig())
    load_synthetic(folder, view="view")


def test_other_classes_are_refused(real, segmentor, tmp_path):
    renamed = replace(real.schema, names=("sand", *real.schema.names[1:]))
    folder = paint(tmp_path / "set", replace(real, schema=renamed))
    with pytest.raises(TerraSynthError, match="other classes than the synthetic dataset"):
        score_dataset(folder, segmentor, real)
    with pytest.raises(TerraSynthError, match="not those that the segmentor was made for"):
        score_dataset(folder, segmentor, replace(real, schema=renamed))
    assert not (folder / "scores").exists()


def test_views_that_are_not_there_or_damaged_are_told(scored, viewed, tmp_path):
    folder = shutil.copytree(viewed, tmp_path / "set")
    with pytest.raises(TerraSynthError, match=r"no such view of this dataset\n  to do"):
        load_synthetic(scored, view="mine")
    with pytest.raises(TerraSynthError, match="not a name for a view"):
        curate(folder, "../mine", CurationConfig())
    path = folder / "views" / "view.json"
    with pytest.raises(TerraSynthError, match=r"no such view.*\n  expected: view\n"):
        load_synthetic(folder, view="yours")
    values = read_json(path)
    for change in ({"margin": 1.3}, {"weights": {}}, {"weights": {"000000": -1}}, {"of": None}):
        path.write_text(json.dumps(values | change))
        with pytest.raises(TerraSynthError, match="the view is damaged"):
            load_synthetic(folder, view="view")
    path.write_text(json.dumps(values))
    lost = folder / "scores" / f"{next(iter(values['weights']))}.png"
    lost.unlink()
    with pytest.raises(TerraSynthError, match=rf"{lost}: .*missing or damaged\n  found:    no such file"):
        load_synthetic(folder, view="view")


def test_exports_take_the_samples_and_labels_of_a_view(viewed, tmp_path):
    tiles = load_synthetic(viewed, view="view")
    assert 0 < len(tiles) < 5
    out = export(viewed, "mmseg", tmp_path / "out", view="view")
    assert sorted(path.stem for path in (out / "ann_dir" / "train").iterdir()) == list(tiles.ids)
    for id, mask in zip(tiles.ids, tiles.masks, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(out / "ann_dir" / "train" / f"{id}.png")), mask.numpy())
    assert read_json(out / "weights.json") == dict(zip(tiles.ids, tiles.weights, strict=True))
    assert "| view.margin | 1.0 |" in (out / "README.md").read_text()
    assert not (export(viewed, "mmseg", tmp_path / "all") / "weights.json").exists()


def test_hugging_face_datasets_still_reads_the_folder(real, viewed, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = shutil.copytree(viewed, tmp_path / "set")
    paint(folder, real, 7)  # two of them without scores
    table = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == 7
    assert table[0]["curation"]["accuracy"] == rows_of(viewed)[0]["curation"]["accuracy"]


def test_torchgeo_takes_a_view(viewed):
    pytest.importorskip("torchgeo", reason="pip install 'terrasynth[torchgeo]'")
    from terrasynth.data.torchgeo import SyntheticTiles

    tiles, dataset = load_synthetic(viewed, view="view"), SyntheticTiles(viewed, view="view")
    assert dataset.weights == list(tiles.weights)
    assert torch.equal(torch.stack([dataset[index]["mask"] for index in range(len(dataset))]), tiles.masks.long())
    assert SyntheticTiles(viewed).weights == [1.0] * 5


def test_the_command_scores_once_and_then_needs_no_model(real, segmentor, scored, tiny_recipe, tmp_path):
    folder, recipe = paint(tmp_path / "set", real), tmp_path / "tiny.yaml"
    recipe.write_text(explain(tiny_recipe), encoding="utf-8")
    scoring = ["--segmentor", str(segmentor), "--real", str(recipe)]
    done = CliRunner().invoke(app, ["curate", str(folder), *scoring], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == str(folder / "views" / "curated.png")
    assert contents(folder / "scores") == contents(scored / "scores")
    done = CliRunner().invoke(app, ["curate", str(folder), "--view", "mine", "--margin", "none", "--rare", "auto"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("5 of 5 samples, worth 5 of equal weight; 0.0% of all labels dropped\n")
    for wrong, told in ((["--real", "demo"], "needs a segmentor"), (["--data", str(tmp_path)], "belong to --real")):
        done = CliRunner().invoke(app, ["curate", str(folder), *wrong])
        assert (done.exit_code, told in done.stderr) == (2, True)
