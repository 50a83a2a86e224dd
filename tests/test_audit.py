"""Copies and leaks are found however they are disguised, and nothing else is."""

import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.curation.audit import AMONG, Layouts, audit, audit_folders, audit_splits
from terrasynth.curation.copies import LEAST_DETAIL, detail, likeness, limit, nearest_images, shrink
from terrasynth.curation.images import from_tiles, read_folder, read_painted
from terrasynth.data.augment import dihedral, view
from terrasynth.data.folder import Tiles, turn_digest
from terrasynth.data.world import WORLD_SCHEMA, render
from terrasynth.data.write import SyntheticWriter
from terrasynth.errors import TerraSynthError
from terrasynth.study.report import _AMONG

SIZE = 64


def tiles(seeds):
    scenes = [render(seed, size=SIZE, gsd=1.0, region="temperate") for seed in seeds]
    images = torch.stack([torch.from_numpy(scene[0]) for scene in scenes]).permute(0, 3, 1, 2).contiguous()
    masks = torch.stack([torch.from_numpy(scene[1]) for scene in scenes])
    return Tiles(tuple(map(str, seeds)), images, masks, WORLD_SCHEMA)


def disguised(image, *, turn=0, zoom=0.0, brightness=1.0, quality=None):
    """A copy, uint8 (3, S, S): by Pillow, of which the search uses nothing but the shrinking."""
    pixels = dihedral(image, turn).permute(1, 2, 0).contiguous().numpy()
    edge = zoom * SIZE
    picture = Image.fromarray(pixels).resize(
        (SIZE, SIZE), Image.Resampling.BICUBIC, (0.8 * edge, 0, SIZE - 0.2 * edge, SIZE - edge)
    )
    picture = Image.fromarray((np.asarray(picture) * brightness).clip(0, 255).astype(np.uint8))
    if quality is not None:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        picture = Image.open(file)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


DISGUISES = {
    "turned": {"turn": 3},
    "mirrored": {"turn": 6},
    "zoomed": {"zoom": 0.06},
    "brighter": {"brightness": 1.2},
    "darker": {"brightness": 0.7},
    "JPEG": {"quality": 50},
    "all at once": {"turn": 5, "zoom": 0.04, "brightness": 1.15, "quality": 70},
}


@pytest.fixture(scope="module")
def real():
    return {"train": tiles(range(100, 124)), "test": tiles(range(200, 224))}


@pytest.fixture(scope="module")
def folders(real, tmp_path_factory):
    """`images/SPLIT` and `masks/SPLIT` of the real tiles."""
    root = tmp_path_factory.mktemp("tiles")
    for split, of in real.items():
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for id_, image, mask in zip(of.ids, of.images, of.masks, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "images" / split / f"{id_}.png")
            Image.fromarray(mask.numpy()).save(root / "masks" / split / f"{id_}.png")
    return root


def written(folder, images, masks, rows=None):
    """A synthetic dataset of these images."""
    writer = SyntheticWriter(folder, WORLD_SCHEMA, plan={"generator": "none"})
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        row = {"seed": index, "source_mask": f"own-{index}", "view": 8}
        writer.add(f"{index:06d}", image, mask, row | (rows or {}).get(index, {}))
    return writer.finish()


@pytest.fixture(scope="module")
def independent():
    return tiles(range(300, 312))


@pytest.fixture(scope="module")
def planted(real, independent, tmp_path_factory):
    """Twelve images of their own, but for a copy of a training tile, three leaks and a duplicate."""
    images, masks = independent.images.clone(), independent.masks.clone()
    everything = DISGUISES["all at once"]
    images[1] = disguised(real["train"].images[5], **everything)
    images[2] = disguised(real["test"].images[7], **everything)
    images[3] = dihedral(real["test"].images[8], 2)
    _, masks[4] = view(real["test"].images[9], real["test"].masks[9], 1234)
    images[6] = disguised(images[0], **everything)
    return written(tmp_path_factory.mktemp("set") / "planted", images, masks, {4: {"view": 1234}})


def told(findings):
    return {(found["painted"], found["set"], found["other"], found["how"], found["leak"]) for found in findings}


# --- the search


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_a_copy_is_found_in_disguise(real, disguise):
    copies = torch.stack([disguised(image, **disguise) for image in real["train"].images[:8]])
    found = nearest_images(copies, real["train"].images)
    assert found.position.tolist() == list(range(8))
    assert found.likeness.min() > 0.75


def test_images_of_different_ground_are_far_below_the_limit(real):
    found = nearest_images(real["test"].images, real["train"].images)
    assert found.likeness.max() < 0.5


def test_the_turn_lays_the_other_image_as_the_image_lies(real):
    turns = torch.arange(8)
    copies = torch.stack([dihedral(real["train"].images[turn], turn) for turn in turns.tolist()])
    found = nearest_images(copies, real["train"].images)
    assert torch.equal(found.turn, turns)
    torch.testing.assert_close(found.likeness, torch.ones(8))


def test_likeness_is_the_best_correlation_of_all_shifts_and_zooms(real):
    """Against NumPy, one window at a time in float64."""
    images, others = real["train"].images[:2], real["test"].images[:2]

    def means(x, side):
        windows = np.lib.stride_tricks.sliding_window_view(x, (side, side))
        return windows.mean((-2, -1))

    def evened(image, side):
        grey = image.double().mean(0)[None, None]
        x = functional.interpolate(grey, (side, side), mode="bilinear", antialias=True)[0, 0].numpy()
        fine = x - means(np.pad(x, 3, mode="reflect"), 7)
        return fine / (np.sqrt(means(np.pad(fine**2, 3, mode="reflect"), 7)) + 3)

    expected = []
    for image, other in zip(images, others, strict=True):
        template = evened(image, 32)[4:28, 4:28]
        best = -1.0
        for zoom in (1.0, 0.96, 0.92, 0.87, 0.82, 0.76):
            x = evened(other, round(32 / zoom))
            for window in np.lib.stride_tricks.sliding_window_view(x, (24, 24)).reshape(-1, 24, 24):
                best = max(best, (window * template).sum() / np.sqrt((window**2).sum() * (template**2).sum()))
        expected.append(best)
    torch.testing.assert_close(likeness(images, others), torch.tensor(expected).float(), atol=1e-4, rtol=0)


def test_what_is_found_does_not_depend_on_the_blocks(real, monkeypatch):
    everything = torch.cat([real["train"].images, real["test"].images])
    itself = torch.arange(len(everything))
    whole = nearest_images(everything, everything, itself=itself)
    monkeypatch.setattr("terrasynth.curation.copies._BLOCK", 5)
    monkeypatch.setattr("terrasynth.curation.copies._PAIRS", 3)
    parts = nearest_images(everything, everything, itself=itself)
    assert torch.equal(whole.position, parts.position)
    assert torch.equal(whole.by_features, parts.by_features)
    torch.testing.assert_close(whole.likeness, parts.likeness)
    assert (whole.position != itself).all()


def test_an_image_alone_has_no_nearest(real):
    found = nearest_images(real["train"].images[:1], real["train"].images[:1], itself=torch.tensor([0]))
    assert found.likeness.tolist() == [-1]
    assert found.distance.isinf().all()


def plain_tiles(kind, seed):
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    base = {"one colour": 90 + 0 * x, "noise": random.normal(90, 1.5, x.shape), "gradient": 60 + 90 * x + 20 * y}
    base["shore"] = np.where(x + 0.2 * y < 0.5 + 0.1 * random.random(), 40, 190)
    return torch.from_numpy(np.repeat(base[kind][None], 3, 0).round().astype(np.uint8))


@pytest.mark.parametrize("kind", ["one colour", "noise", "gradient", "shore"])
def test_plain_tiles_are_set_apart(kind):
    images = torch.stack([plain_tiles(kind, seed) for seed in range(4)])
    assert detail(images).max() < LEAST_DETAIL


def test_procedural_scenes_have_detail(real):
    assert (detail(real["train"].images) > LEAST_DETAIL).float().mean() > 0.9


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.1] * 100, 0.6), ([0.95] * 100, 0.75), ([0.05] * 19, 0.75), (np.linspace(0, 0.7, 101).tolist(), 0.693)],
)
def test_the_limit_is_the_99th_percentile_of_real_images_within_bounds(values, expected):
    assert limit(torch.tensor(values)) == pytest.approx(expected, abs=1e-5)


def test_a_digest_of_pixels_is_the_same_for_all_turns_and_no_other_image(real):
    image, other = (real["train"].images[index, :, :40] for index in (0, 1))
    ways = [torch.rot90(side, turns, (1, 2)) for side in (image, image.flip(2)) for turns in range(4)]
    assert len({turn_digest(way.permute(1, 2, 0).numpy()) for way in ways}) == 1
    assert turn_digest(other.permute(1, 2, 0).numpy()) != turn_digest(image.permute(1, 2, 0).numpy())


def test_larger_and_oblong_images_are_compared_by_their_middle(real):
    image = real["train"].images[0].permute(1, 2, 0).numpy()
    large = np.kron(image, np.ones((4, 4, 1), np.uint8))
    oblong = np.concatenate([np.zeros((256, 50, 3), np.uint8), large, np.zeros((256, 50, 3), np.uint8)], 1)
    assert torch.equal(shrink(oblong), shrink(image))


# --- the audit


def test_planted_copies_and_leaks_are_told_and_nothing_else(planted, folders):
    done, _, _ = audit_folders(
        planted, [folders / "images" / "test"], [folders / "images" / "train"], [folders / "masks" / "test"]
    )
    assert told(done.report["findings"]) == {
        ("000001", "images/train", "105.png", "near copy", False),
        ("000002", "images/test", "207.png", "near copy", True),
        ("000003", "images/test", "208.png", "same pixels", True),
        ("000004", "masks/test", "209", "painted under this mask", True),
        ("000006", "planted", "000000", "near copy", False),
    }
    assert [entry["copies"] for entry in done.report["sets"]] == [1, 2, 1, 1]


def test_a_leak_by_bytes_is_told_as_one(independent, folders, tmp_path):
    dataset = written(tmp_path / "painted", independent.images[:3], independent.masks[:3])
    shutil.copytree(folders / "images" / "test", tmp_path / "test")
    shutil.copy(dataset / "images" / "000001.png", tmp_path / "test" / "zzz.png")
    done, _, _ = audit_folders(dataset, [tmp_path / "test"])
    assert told(done.leaks) == {("000001", "test", "zzz.png", "same file", True)}


def test_no_alarm_on_independent_images_and_the_pictures_are_there(independent, folders, tmp_path):
    dataset = written(tmp_path / "painted", independent.images, independent.masks)
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    masks = [folders / "masks" / "test"]
    done, (report, sheet), remarks = audit_folders(
        dataset, [folders / "images" / "test"], [folders / "images" / "train"], masks
    )
    assert done.report["findings"] == []
    assert remarks == []
    assert json.loads(report.read_text()) == done.report
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before
    assert Image.open(sheet).height > 3 * 128, "the closest pairs are shown even if nothing is found"
    first = done.report["images"][0]
    assert set(first["nearest"]) == {"images/train", "images/test", "painted"}


def test_plain_paintings_raise_no_alarm_and_are_counted(independent, tmp_path):
    plain = torch.stack([plain_tiles(kind, seed) for seed in range(2) for kind in ("one colour", "noise", "shore")])
    dataset = written(tmp_path / "painted", torch.cat([independent.images[:4], plain]), independent.masks[:10])
    (tmp_path / "test").mkdir()
    for seed in range(2, 6):
        for kind in ("one colour", "noise", "shore"):
            pixels = plain_tiles(kind, seed).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / "test" / f"{kind}-{seed}.png")
    done, _, _ = audit_folders(dataset, [tmp_path / "test"])
    assert done.leaks == []
    assert done.report["too_plain"] == 6
    assert [(entry["images"], entry["too_plain"]) for entry in done.report["sets"]] == [(12, 12), (10, 6)]
    assert re.search(r"test \(held out\) +12 +12 ", done.table())


def test_a_limit_that_was_not_measured_is_marked(real, independent, tmp_path):
    dataset = read_painted(written(tmp_path / "painted", independent.images[:3], independent.masks[:3]))
    few, many = from_tiles("few", real["test"].first(19)), from_tiles("many", tiles(range(40)))
    done = audit(dataset, [few, many], [])
    measured = {entry["name"]: entry["limit_measured"] for entry in done.report["sets"]}
    assert measured == {"few": False, "many": True, "painted": True}
    assert re.search(r"few \(training\) .* 0\.75\* ", done.table())
    assert "* not measured" in done.table()
    assert "*" not in audit(dataset, [many], [few]).table()
    assert audit(dataset, [], []).report["sets"][0]["limit_measured"] is False


def test_a_likeness_that_a_measured_limit_calls_a_copy_is_no_leak_below_the_highest(real, independent, tmp_path):
    """A tile shines through until it is like itself as 0.6 to 0.9: of a hundred paintings one may be so by chance."""
    tile, other = real["test"].images[0].float(), independent.images[0].float()
    mixed = torch.stack([(a * tile + (1 - a) * other).round().byte() for a in torch.linspace(0.3, 0.9, 20)])
    dataset = read_painted(written(tmp_path / "painted", mixed, independent.masks[:1].expand(20, -1, -1)))
    tiles = from_tiles("tiles", real["test"])

    def told(done):
        return sorted(one["likeness"] for one in done.report["findings"] if one["set"] == "tiles")

    copies, leaks = told(audit(dataset, [tiles], [])), told(held_out := audit(dataset, [], [tiles]))
    assert 0.6 <= copies[0] < 0.7
    assert leaks == [likeness for likeness in copies if likeness >= 0.75] != []
    assert len(held_out.leaks) == len(leaks)


def test_images_that_are_too_small_to_tell_are_remarked(independent, real, tmp_path):
    dataset = written(tmp_path / "painted", independent.images[:3], independent.masks[:3])
    (tmp_path / "test").mkdir()
    for index, side in enumerate((1, 4, 31, 32)):
        pixels = Image.fromarray(real["test"].images[index].permute(1, 2, 0).numpy()).resize((side + 9, side))
        pixels.save(tmp_path / "test" / f"{side}.png")
    done, _, remarks = audit_folders(dataset, [tmp_path / "test"])
    assert done.report["sets"][0]["too_small"] == 3
    assert [remark.split(";")[0] for remark in remarks] == ["test: 3 of 4 images have a side below 32 pixels"]


def test_only_masks_with_something_in_them_can_leak(independent, real, tmp_path):
    masks = independent.masks[:3].clone()
    masks[0] = real["test"].masks[0].flip(0)
    masks[1] = 2
    plain = torch.full((1, SIZE, SIZE), 2, dtype=torch.uint8)
    dataset = written(tmp_path / "painted", independent.images[:3], masks)
    layouts = Layouts("masks", ("blank", *real["test"].ids), torch.cat([plain, real["test"].masks]))
    done = audit(read_painted(dataset), [], [], [layouts])
    assert told(done.leaks) == {("000000", "masks", real["test"].ids[0], "painted under this mask", True)}


def test_copies_under_the_mask_of_their_tile_are_counted_apart(real, independent, tmp_path):
    copies = torch.stack([disguised(image, turn=2) for image in real["train"].images[:2]])
    rows = {0: {"source_mask": real["train"].ids[0]}}
    dataset = written(tmp_path / "painted", copies, independent.masks[:2], rows)
    done = audit(read_painted(dataset), [from_tiles("train", real["train"])], [])
    (summary, _) = done.report["sets"]
    assert (summary["copies"], summary["copies_under_own_mask"]) == (2, 1)
    assert done.leaks == []


def test_a_set_of_one_image_is_compared(real, independent, tmp_path):
    dataset = written(tmp_path / "painted", real["test"].images[:1], independent.masks[:1])
    done = audit(read_painted(dataset), [], [from_tiles("test", real["test"].first(1))])
    assert told(done.leaks) == {("000000", "test", real["test"].ids[0], "same pixels", True)}


def test_a_dataset_with_the_name_of_another_folder_is_told_from_it(independent, folders, tmp_path):
    dataset = written(tmp_path / "test", independent.images[:3], independent.masks[:3])
    done, _, _ = audit_folders(dataset, [folders / "images" / "test"])
    assert set(done.report["images"][0]["nearest"]) == {"test", "test (painted)"}


def test_the_audits_own_sheet_is_not_one_of_the_images(independent, real, tmp_path):
    for id_, image in zip(real["test"].ids, real["test"].images[:3], strict=False):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{id_}.png")
    dataset = written(tmp_path / "painted", independent.images[:3], independent.masks[:3])
    first, (_, sheet), _ = audit_folders(dataset, [tmp_path])
    assert sheet.parent == tmp_path
    again, _, _ = audit_folders(dataset, [tmp_path])
    assert again.report == first.report
    assert again.report["sets"][0]["images"] == 3


def test_real_tiles_that_are_copies_of_held_out_ones_are_told_whatever_set_they_are_in(real):
    learned, unlabelled, validation = tiles(range(400, 408)), tiles(range(420, 428)), tiles(range(440, 448))
    learned.images[1] = disguised(real["test"].images[7], **DISGUISES["all at once"])
    unlabelled.images[2] = disguised(validation.images[3], quality=50)
    unlabelled.images[5] = dihedral(real["test"].images[8], 5)
    sides = {"train": learned, "unlabelled": unlabelled}, {"validation": validation, "test": real["test"]}
    done = audit_splits(*([from_tiles(*split) for split in side.items()] for side in sides))
    assert {(found["painted"], found["other"], found["how"]) for found in done.leaks} == {
        ("train/401", "test/207", "near copy"),
        ("unlabelled/422", "validation/443", "near copy"),
        ("unlabelled/425", "test/208", "same pixels"),
    }
    assert [(entry["name"], entry["images"], entry["copies"]) for entry in done.report["sets"]] == [
        ("train", 8, 1),
        ("unlabelled", 8, 2),
    ]
    assert (done.report["held_out"]["images"], done.report["held_out"]["leaks"]) == (32, 3)


def test_real_tiles_are_compared_at_the_highest_limit(real):
    """What real tiles do among themselves would make an alarm of a hundredth of them."""
    pair = real["test"].images[7].float(), real["train"].images[0].float()
    alike = torch.stack([(share * pair[0] + (1 - share) * pair[1]).byte() for share in (0.4, 0.5)])
    nearly, rather = likeness(alike, real["test"].images[7].expand(2, -1, -1, -1)).tolist()
    assert 0.6 < nearly < 0.75 < rather
    learned = [from_tiles("train", replace(real["train"].first(2), images=alike))]
    done = audit_splits(learned, [from_tiles("test", real["test"])])
    assert [(found["painted"], found["other"]) for found in done.leaks] == [("train/101", "test/207")]


def test_the_command_ends_with_1_on_a_leak_and_0_without(planted, independent, folders, tmp_path):
    leaking = CliRunner().invoke(app, ["audit", str(planted), "--against", str(folders / "images" / "test")])
    assert leaking.exit_code == 1
    assert "LEAK  000003 ~ test/208.png: same pixels" in leaking.output
    dataset = written(tmp_path / "painted", independent.images[:4], independent.masks[:4], {0: {"source_mask": "203"}})
    clean = CliRunner().invoke(app, ["audit", str(dataset), "--against", str(folders / "images" / "test")])
    assert clean.exit_code == 0
    assert "LEAK" not in clean.output
    assert "1 painted images name a source mask" in clean.output


def test_the_report_knows_what_an_audit_calls_the_painted_tiles():
    assert _AMONG == AMONG


# --- what can not be used


def test_a_folder_that_is_no_dataset_is_refused(folders):
    with pytest.raises(TerraSynthError, match="not a synthetic dataset"):
        audit_folders(folders / "images" / "train", [folders / "images" / "test"])


def test_a_folder_without_images_says_what_is_inside(folders):
    with pytest.raises(TerraSynthError, match=r"no images here(.|\n)*test, train"):
        read_folder(folders / "images")


def test_all_images_that_can_not_be_read_are_named_together(real, tmp_path):
    Image.fromarray(real["test"].images[0].permute(1, 2, 0).numpy()).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(TerraSynthError, match="2 of 3 images") as error:
        read_folder(tmp_path)
    assert all(name in str(error.value) for name in ("broken.png", "deep.png", "not 8-bit"))


def test_a_painted_image_that_can_not_be_read_is_named(independent, folders, tmp_path):
    dataset = written(tmp_path / "painted", independent.images[:2], independent.masks[:2])
    (dataset / "images" / "000001.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(TerraSynthError, match=r"000001\.png"):
        audit_folders(dataset, [folders / "images" / "test"])
