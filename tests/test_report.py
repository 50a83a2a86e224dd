"""The report: what it says is decided by rules, and it needs nothing but itself."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from terrasynth.data.schema import LabelSchema
from terrasynth.data.sheet import contact_sheet
from terrasynth.errors import TerraSynthError
from terrasynth.io import write_json
from terrasynth.recipe import ArmConfig, DataConfig, Recipe, StudyConfig
from terrasynth.study.figures import class_figure, curve_figure, difference_figure
from terrasynth.study.read import Results, read_results
from terrasynth.study.report import write_report
from terrasynth.study.statistics import compare, summarise
from terrasynth.study.verdict import verdict

ARMS = {"real": "none", "CutMix": "none", "plain": "plain", "CRFM": "steered"}
CLASSES = ("road", "water")


def study(miou, *, plateau=None, classes=CLASSES, class_scores=None, name="study"):
    """`results.json` of the arms in `miou` (a list over seeds each); `plateau` is a list of differences over seeds."""
    seeds = range(len(next(iter(miou.values()))))
    arms, comparisons = [], []
    for arm, values in miou.items():
        metrics = dict.fromkeys(("oa", "miou", "macc", "f1"), values)
        metrics |= {f"{key}/{entry}": class_scores or values for key in ("iou", "f1") for entry in classes}
        arms.append({"name": arm, "metrics": {key: summarise(v).to_dict() for key, v in metrics.items()}})
        if arm != "real":
            difference = compare(values, miou["real"]).to_dict()
            comparisons.append({"arm": arm, "baseline": "real", "metric": "miou", **difference})
    recipe = Recipe(
        name=name,
        data=DataConfig(kind="world"),
        study=StudyConfig(
            seeds=tuple(seeds), arms=tuple(ArmConfig(name=arm, synthetic=ARMS.get(arm, "none")) for arm in miou)
        ),
    )
    return {
        "recipe": recipe.model_dump(mode="json"),
        "name": name,
        "task": "segmentation",
        "classes": [{"name": entry, "color": [40 * i % 256, 90, 200]} for i, entry in enumerate(classes)],
        "data": {"train": 16, "validation": 16, "test": 64, "image_size": 64, "source": "procedural world"},
        "arms": arms,
        "comparisons": comparisons,
        "curves": {arm: [{"seed": s, "steps": [10, 20], "miou": [None, 0.3]} for s in seeds] for arm in miou},
        "plateaus": []
        if plateau is None
        else [{"arm": "real", "steps": 300, "twice": 600, **compare(plateau, [0] * len(plateau)).to_dict()}],
        "settings": [{"arm": name, "learning_rate": 1e-3, "steps": 300} for name in miou],
        "timing": [{"name": "train the generator", "seconds": 63.1}, {"name": "paint", "seconds": 4000}],
        "total_seconds": 4063.1,
        "synthetic": {
            kind: {"count": 48, "agreement": 0.61, "folder": "synthetic"}
            for arm, kind in ARMS.items()
            if arm in miou and kind != "none"
        },
        "filtered": {},
        "environment": {"terrasynth": "0.1.0", "torch": "2", "threads": 2},
        "command": "terrasynth study sample --out runs/sample",
    }


def judge(miou, **options):
    return verdict(Results.model_validate(study(miou, **options)))


REAL = [0.40, 0.42, 0.44]
# Differences to REAL with a narrow interval, and with one that holds zero.
CLEARLY = np.array([0.000, 0.002, 0.001])
PERHAPS = np.array([-0.03, 0.00, 0.04])


def shifted(by, spread=CLEARLY):
    return [float(value) for value in np.array(REAL) + by + spread]


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_interval_above_zero_reads_helps_with_the_numbers():
    answer = judge({"real": REAL, "plain": shifted(0.02)})
    assert (answer.outcome, answer.reserved, answer.label) == ("helps", False, "It helps")
    assert answer.headline == (
        "Synthetic data raised test mIoU from 42.0 to 44.1 (+2.1, 95 % interval +1.9 to +2.3, 3 seeds)."
    )
    assert not answer.cautions


def test_interval_below_zero_reads_does_not_help():
    answer = judge({"real": REAL, "plain": shifted(-0.02)})
    assert answer.outcome == "does not help"
    assert answer.headline.startswith("Synthetic data did not help: it lowered test mIoU from 42.0 to 40.1 (−1.9, 95 %")


def test_interval_around_zero_reads_can_not_tell():
    answer = judge({"real": REAL, "plain": shifted(0.01, PERHAPS)})
    assert answer.outcome == "can not tell"
    assert answer.headline.startswith("Whether synthetic data helps can not be told: test mIoU went from 42.0 to 43.3")


def test_one_seed_can_not_tell_however_large_the_gain():
    answer = judge({"real": [0.4], "CutMix": [0.5], "plain": [0.6]})
    assert answer.outcome == "can not tell"
    assert answer.headline == (
        "One seed gives no interval, so whether synthetic data helps can not be told: test mIoU went from 40.0 to 60.0 "
        "(+20.0); against CutMix, which needs none, the difference is +10.0."
    )


@pytest.mark.parametrize("miou", [{"real": REAL}, {"real": REAL, "CutMix": REAL}, {"real": REAL, "plain": [None] * 3}])
def test_without_a_scored_synthetic_arm_there_is_no_answer(miou):
    answer = judge(miou)
    assert (answer.outcome, answer.best) == ("can not tell", None)


def test_gain_over_the_other_augmentation_is_stated():
    answer = judge({"real": REAL, "CutMix": shifted(0.01), "plain": shifted(0.02, 2 * CLEARLY)})
    assert answer.headline.endswith(", and by +1.1 (+0.9 to +1.3) over CutMix.")
    assert not answer.reserved


def test_gain_that_does_not_beat_the_other_augmentation_is_reserved():
    answer = judge({"real": REAL, "CutMix": shifted(0.02, PERHAPS), "plain": shifted(0.02)})
    assert (answer.outcome, answer.reserved) == ("helps", True)
    assert ", but against CutMix, which needs none, the difference of −0.2 (" in answer.headline
    assert answer.headline.endswith(") may be chance.")


def test_other_augmentation_that_is_better_is_named():
    answer = judge({"real": REAL, "CutMix": shifted(0.03, 2 * CLEARLY), "plain": shifted(0.02)})
    assert answer.reserved
    assert answer.headline.startswith("The best arm with synthetic data raised test mIoU from 42.0 to 44.1")
    assert answer.headline.endswith(", but CutMix, which needs none, is better by +1.1 (+0.9 to +1.3).")


def test_the_answer_is_about_the_best_synthetic_arm():
    answer = judge({"real": REAL, "plain": shifted(0.01), "CRFM": shifted(0.02)})
    assert answer.best == "CRFM"


def test_several_synthetic_arms_are_corrected_for():
    firm = judge({"real": REAL, "plain": shifted(0.01), "CRFM": shifted(0.02)})
    assert "Bonferroni" in firm.notes[0]
    assert firm.notes[0].endswith("still excludes zero.")
    assert not firm.reserved
    # Differences whose 95 % interval is above zero and whose 97.5 % interval is not.
    weak = judge({"real": REAL, "plain": REAL, "CRFM": shifted(0.02, np.array([-0.007, 0, 0.007]))})
    assert weak.outcome == "helps"
    assert weak.cautions[0].endswith("no longer excludes zero.")
    assert weak.reserved


def test_baseline_that_still_learns_is_a_caution():
    answer = judge({"real": REAL, "plain": shifted(0.02)}, plateau=[0.004, 0.005, 0.006])
    assert answer.reserved
    assert answer.cautions == (
        "The baseline had not learned all it can: trained for 600 instead of 300 steps, it changes by +0.5 (+0.3 to "
        "+0.7). Over the baseline trained that long, the synthetic arm's difference is +1.6 (+1.4 to +1.8).",
    )


def test_change_of_more_than_half_the_gain_is_a_caution_even_within_its_interval():
    answer = judge({"real": REAL, "plain": shifted(0.02)}, plateau=[-0.01, 0.015, 0.04])
    assert answer.cautions[0].startswith("The baseline may not have learned all it can")


@pytest.mark.parametrize("gain", [-0.015, 0.2])
def test_a_baseline_that_still_gains_points_is_a_caution_whatever_the_gain(gain):
    answer = judge({"real": REAL, "plain": shifted(gain)}, plateau=[0.02, 0.037, 0.05])
    assert any("may not have learned all it can" in c or "had not learned" in c for c in answer.cautions)


@pytest.mark.parametrize("plateau", [[-0.003, 0.001, 0.004], [-0.02, -0.021, -0.019]])
def test_baseline_that_has_levelled_off_is_a_note(plateau):
    answer = judge({"real": REAL, "plain": shifted(0.02)}, plateau=plateau)
    assert not answer.cautions
    assert not answer.reserved
    assert answer.notes[0].startswith("No sign that the baseline lacks training")


LEAKING = "The audit found leaks: the test may reward memory."


def test_leaks_into_painted_tiles_are_a_caution(tmp_path):
    results = study({"real": REAL, "plain": shifted(0.02)})
    clean = verdict(Results.model_validate({**results, "audit": audited(tmp_path, leaks=0)}))
    assert (clean.label, clean.cautions) == ("It helps", ())
    assert "leaks" not in clean.headline
    answer = verdict(Results.model_validate({**results, "audit": audited(tmp_path, leaks=1)}))
    assert answer.label == "It helps, with reservations"
    assert answer.headline == f"{clean.headline} {LEAKING}"
    assert answer.cautions == ("Painted tiles that show validation or test tiles or their masks, by the audit: 2.",)


@pytest.mark.parametrize("miou", [{"real": REAL}, {"real": REAL, "plain": shifted(-0.02)}])
def test_copies_in_what_is_learned_from_are_a_caution_whatever_the_answer(tmp_path, miou):
    results = study(miou)
    clean = verdict(Results.model_validate({**results, "audit_of_splits": splits(tmp_path, copies=0)}))
    leaking = {**results, "audit_of_splits": splits(tmp_path, copies=1)}
    answer = verdict(Results.model_validate(leaking))
    assert answer.headline == f"{clean.headline} {LEAKING}"
    assert answer.cautions[0].endswith("in what is learned from, by the audit: 1 unlabelled window.")
    assert LEAKING in written(tmp_path, leaking)


# --- the file --------------------------------------------------------------------------------------------------------

FULL = {"real": REAL, "CutMix": shifted(0.01), "plain": shifted(0.015), "CRFM": shifted(0.02)}


def written(folder, results, gallery=None):
    write_json(folder / "results.json", results)
    if gallery is not None:
        write_json(folder / "gallery.json", gallery)
    return write_report(folder).read_text(encoding="utf-8")


def test_tiles_that_were_left_out_are_counted(tmp_path):
    results = study(FULL)
    results["data"]["left_out"] = 3
    assert "left out, because they could not be used: 3 tiles" in written(tmp_path, results)


def painted_gallery(folder):
    (folder / "gallery").mkdir()
    entry = {"caption": "roads & water"}
    for kind in ("mask", "real", "plain", "steered"):
        pixels = np.full((300, 300, 3), len(entry) * 40, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "gallery" / f"{kind}.png")
        entry[kind] = f"gallery/{kind}.png"
    return [entry, {"caption": "no reference", "mask": "gallery/mask.png", "real": None, "plain": "gallery/plain.png"}]


class _Page(HTMLParser):
    """Tags, their attributes, and whether every opened tag is closed in order."""

    _VOID = frozenset({"meta", "img", "br", "hr", "path", "use", "rect"})

    def __init__(self, text):
        super().__init__()
        self.tags, self._open = [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


def test_report_is_self_contained_and_well_formed(tmp_path):
    text = written(tmp_path, study(FULL, plateau=[0.001, -0.001, 0.0]), painted_gallery(tmp_path))
    page = _Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "http" not in re.sub(r"http-equiv", "", text)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert sum(tag == "img" for tag, _ in page.tags) == 6
    for fact in ("terrasynth study sample --out runs/sample", "1 h 8 min", "roads &amp; water", "seed 2"):
        assert fact in text


def audited(folder, leaks):
    Image.new("RGB", (1131, 600)).save(folder / "audit.png")
    leak = {"painted": "000007", "set": "test", "other": "t<1>", "how": "near copy", "likeness": 0.9, "leak": True}
    real = {"kind": "held out", "images": 64, "too_plain": 7, "limit": 0.6, "copies": leaks, "copies_under_own_mask": 0}
    own = {"kind": "one another", "images": 48, "limit": 0.6, "copies": 2, "copies_under_own_mask": 1, "leaks": None}
    closest = {"painted": "000001", "id": "t2", "likeness": 0.4321}
    sets = [{"name": "test", **real, "leaks": leaks, "closest": closest}, {"name": "x", **own, "closest": None}]
    found = {"painted": 48, "too_plain": 5, "sets": sets, "findings": [leak] * leaks}
    return [{"kind": "plain", "seed": seed, "sheet": "audit.png", **found} for seed in (0, 1)]


def test_report_shows_the_audit(tmp_path):
    text = written(tmp_path, {**study(FULL), "audit": audited(tmp_path, leaks=0)})
    _Page(text)
    assert "No painted tile is a copy of a validation or test tile" in text
    assert "96 painted tiles were compared; 10 of them are too plain" in " ".join(text.split())
    row = re.search(r"<th scope=.row.>test</th>(.*?)</tr>", text).group(1)
    assert re.findall(r"<td>(.*?)</td>", row) == ["64", "7", "0", "0", "0.43", "0.60"]
    row = re.search(r"<th scope=.row.>one another</th>(.*?)</tr>", text).group(1)
    assert re.findall(r"<td>(.*?)</td>", row) == ["48", "–", "4", "2", "–", "0.60"]
    assert "32 pixels" not in text
    assert "Not measured" not in text


def test_report_marks_a_limit_that_was_not_measured(tmp_path):
    audits = audited(tmp_path, leaks=0)
    for one in audits:
        one["sets"][0]["limit_measured"] = False
    text = written(tmp_path, {**study(FULL), "audit": audits})
    assert re.findall(r"<td>(0\.60\*?)</td></tr>", text) == ["0.60*", "0.60"]
    assert "* Not measured" in text


def test_report_says_where_tiles_are_too_small_to_tell_copies(tmp_path):
    audits = audited(tmp_path, leaks=0)
    audits[1]["sets"] = [audits[1]["sets"][0] | {"too_small": 64}, *audits[1]["sets"][1:]]
    assert "with a side below 32 pixels" in written(tmp_path, {**study(FULL), "audit": audits})


def test_report_tells_leaks_first(tmp_path):
    text = " ".join(written(tmp_path, {**study(FULL), "audit": audited(tmp_path, leaks=1)}).split())
    assert "2 painted tiles are copies of" in text
    assert "plain, seed 1: 000007 ~ test/t&lt;1&gt; (near copy)" in text
    assert "2 (leak)" in text


def splits(folder, copies):
    Image.new("RGB", (1131, 600)).save(folder / "splits.png")
    leak = {
        "painted": "unlabelled/s<0>",
        "set": "validation and test",
        "other": "test/t1",
        "how": "near copy",
        "leak": True,
    }
    sets = [
        {"name": "train", "images": 16, "too_plain": 3, "copies": 0},
        {"name": "unlabelled", "images": 9, "too_plain": 1, "copies": copies},
    ]
    other = {"name": "validation and test", "kind": "held out", "images": 80, "too_plain": 7, "limit": 0.75}
    other |= {"copies": copies, "copies_under_own_mask": 0, "leaks": copies}
    other["closest"] = {"painted": "train/1", "id": "test/t2", "likeness": 0.4321}
    return {"sheet": "splits.png", "sets": sets, "held_out": other, "findings": [leak] * copies}


def test_report_says_whether_what_is_learned_from_has_copies_of_held_out_tiles(tmp_path):
    results = study({"real": REAL})
    assert "learned from" not in written(tmp_path, results)
    clean = written(tmp_path, {**results, "audit_of_splits": splits(tmp_path, copies=0)})
    _Page(clean)
    assert "Nothing that is learned from is a copy of a validation or test tile" in clean
    assert "Compared with 80 validation and test tiles, of which 7 are too plain" in clean
    assert "a likeness of 0.43; from 0.75 on it is a copy." in clean
    assert "compares what is learned from with validation and test tiles" in clean
    row = re.search(r"<th scope=.row.>unlabelled</th>(.*?)</tr>", clean).group(1)
    assert re.findall(r"<td>(.*?)</td>", row) == ["9", "1", "0"]
    leaking = written(tmp_path, {**results, "audit_of_splits": splits(tmp_path, copies=2)})
    _Page(leaking)
    assert "2 unlabelled windows, by likeness copies of validation or test tiles" in leaking
    assert "unlabelled/s&lt;0&gt; ~ test/t1 (near copy)" in leaking


def test_charts_of_one_page_share_no_identifier(tmp_path):
    text = written(tmp_path, study(FULL, plateau=[0.001, -0.001, 0.0]))
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(identifiers)
    assert set(re.findall(r'xlink:href="#([^"]+)"', text)) <= set(identifiers)


def test_same_results_give_the_same_report(tmp_path):
    assert written(tmp_path, study(FULL)) == written(tmp_path, study(FULL))


def test_foreign_names_are_escaped_everywhere(tmp_path):
    evil = "<script>alert('&')</script> $x_1$"
    miou = {"real": REAL, f"arm {evil}": shifted(0.01)}
    results = study(miou, classes=(evil, "road"), name=evil)
    results["environment"][evil] = evil
    results["timing"][0]["name"] = evil
    results["command"] = evil
    text = written(tmp_path, results, [])
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 10
    _Page(text)


@pytest.mark.parametrize(
    "results",
    [
        study({"real": [0.4]}),
        study({"real": [0.4], "plain": [0.5]}, plateau=[0.1]),
        study({"real": REAL}),
        study({"real": REAL, "plain": shifted(-0.02)}, plateau=[None, 0.1, None]),
        study({"real": REAL, "plain": [None] * 3}, class_scores=[None] * 3),
        study(FULL, classes=tuple(f"a class with a rather long name, number {i}, and more" for i in range(25))),
        study({"real": REAL} | {f"arm {i}": shifted(i / 100) for i in range(10)}),
    ],
    ids=["one-cell", "one-seed", "one-arm", "lower", "no-scores", "25-classes", "11-arms"],
)
def test_report_copes_with(results, tmp_path):
    text = written(tmp_path, results)
    _Page(text)
    assert not re.search(r"\bnan\b|None", text)


def test_nan_is_read_as_no_value(tmp_path):
    nan = float("nan")
    results = study({"real": REAL, "plain": shifted(0.01)}, plateau=[0.1, 0.2, 0.1])
    results["arms"][0]["metrics"]["iou/road"] = {"values": [nan, 0.2, 0.3], "mean": nan, "ci95": None}
    results["curves"]["real"][0]["miou"] = [nan, 0.2]
    results["plateaus"][0]["values"] = [nan, 0.2, 0.1]
    results["synthetic"]["plain"]["agreement"] = nan
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert not re.search(r"\bnan\b", write_report(tmp_path).read_text(encoding="utf-8"))
    assert read_results(tmp_path).arms[0].values("iou/road") == (None, 0.2, 0.3)


def test_report_says_what_the_filter_dropped_where_there_is_one(tmp_path):
    results = study({"real": REAL, "plain": shifted(0.01)})
    assert "Filter" not in written(tmp_path, results)
    results["filtered"] = {"plain": {"dropped": 0.123, "dropped/road": 0.04, "dropped/water": None}}
    assert "(FreeMask). plain: 12.3 % (road 4.0, water –)" in written(tmp_path, results)


def test_results_survive_the_file(tmp_path):
    results = study(FULL, plateau=[0.001, -0.001, 0.0])
    write_json(tmp_path / "results.json", results)
    assert read_results(tmp_path) == Results.model_validate(results)
    assert read_results(tmp_path).recipe == Recipe.model_validate(results["recipe"])


def test_missing_results_say_which_command_makes_them(tmp_path):
    with pytest.raises(TerraSynthError, match="terrasynth study"):
        write_report(tmp_path)


def test_incomplete_results_say_what_is_missing(tmp_path):
    results = study(FULL)
    del results["timing"]
    write_json(tmp_path / "results.json", results)
    with pytest.raises(TerraSynthError, match="timing: Field required"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_gallery_reads_no_picture_outside_the_study(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "private.png")
    with pytest.raises(TerraSynthError, match="outside"):
        written(folder, study(FULL), [{"caption": "", "mask": "../private.png"}])


# --- charts and sheets -----------------------------------------------------------------------------------------------


def test_charts_stand_alone_as_svg_with_real_text():
    summary, difference = summarise([0.4, 0.5]), compare([0.4, 0.5], [0.3, 0.45])
    charts = {
        "water": class_figure([("water", (0, 0, 255))], {"real": [summary]}),
        "CutMix": difference_figure([("CutMix", difference, 1)]),
        "training step": curve_figure({"real": [([1, 2], [0.1, None])]}),
    }
    for text, svg in charts.items():
        root = ET.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert text in {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert "var(--ink" in svg


def test_contact_sheet_holds_the_tiles_unchanged():
    schema = LabelSchema(("road", "water"), ((200, 10, 10), (10, 10, 200)))
    masks = torch.arange(3).view(3, 1, 1).expand(3, 8, 8) % 2
    images = torch.full((3, 3, 8, 8), 77, dtype=torch.uint8)
    sheet = np.asarray(contact_sheet({"painted": images, "as float": images / 255}, masks, schema, columns=2, zoom=3))
    colors, counts = np.unique(sheet.reshape(-1, 3), axis=0, return_counts=True)
    found = {tuple(color): count for color, count in zip(colors.tolist(), counts.tolist(), strict=True)}
    assert found[200, 10, 10] == 2 * 24 * 24
    assert found[10, 10, 200] == 24 * 24
    assert found[77, 77, 77] >= 2 * 3 * 24 * 24


def test_contact_sheet_grows_by_its_legend():
    schema = LabelSchema(("road", "water"), ((200, 10, 10), (10, 10, 200)))
    masks = torch.zeros(1, 64, 64, dtype=torch.long)
    plain, named = (contact_sheet({}, masks, schema, legend=legend) for legend in (False, True))
    assert named.width == plain.width
    assert named.height > plain.height
