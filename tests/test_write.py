"""A synthetic dataset says what it is, and is the same however often its writing was interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from terrasynth.data.card import Contents, dataset_card
from terrasynth.data.folder import load_synthetic
from terrasynth.data.schema import LabelSchema
from terrasynth.data.write import SyntheticWriter, read_manifest
from terrasynth.errors import TerraSynthError
from terrasynth.io import read_json

SCHEMA = LabelSchema(("building", "road", "water"), ((60, 16, 152), (110, 193, 228), (226, 169, 41)))
PLAN = {"model": "0f1e", "recipe": "demo", "steering": {"steps": 4, "strength": 0.1}}
COUNT = 5
SIZE = 8


def sample(index: int) -> tuple[str, torch.Tensor, torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(index)
    image = torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    mask = torch.randint(0, 4, (SIZE, SIZE), generator=generator, dtype=torch.uint8)
    row = {
        "seed": 2**62 + index,
        "source_mask": f"tile{index}",
        "prompt": "a satellite image of größe",
        "model": "0f1e",
        "steering": {"steps": 4, "strength": 0.1},
        "scores": {"loss": index / 3},
    }
    return f"{index:06d}", image, torch.where(mask == 3, 255, mask).byte(), row


def write(folder, *, until: int = COUNT, plan=PLAN) -> None:
    """What a painting run does: only what is missing."""
    writer = SyntheticWriter(folder, SCHEMA, plan=plan)
    done = writer.done()
    for index in range(until):
        name, image, mask, row = sample(index)
        if name not in done:
            writer.add(name, image, mask, row)
    if until == COUNT:
        writer.finish()


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what is written -------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path / "set")
    tiles = load_synthetic(tmp_path / "set")
    assert tiles.schema == SCHEMA
    assert tiles.ids == tuple(f"{index:06d}" for index in range(COUNT))
    for index in range(COUNT):
        _, image, mask, _ = sample(index)
        assert torch.equal(tiles.images[index], image)
        assert torch.equal(tiles.masks[index], mask)


def test_the_folder_is_an_image_folder(tmp_path):
    write(tmp_path / "set")
    lines = (tmp_path / "set" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == COUNT
    for index, line in enumerate(lines):
        row = json.loads(line)
        _, image, mask, given = sample(index)
        assert given.items() <= row.items()
        assert row["id"] == f"{index:06d}"
        assert (row["width"], row["height"], row["synthetic"]) == (SIZE, SIZE, True)
        assert set(row["versions"]) == {"terrasynth", "torch", "diffusers"}
        picture = Image.open(tmp_path / "set" / row["file_name"])
        np.testing.assert_array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())
        with Image.open(tmp_path / "set" / row["mask_file_name"]) as label:
            assert label.mode == "P"
            np.testing.assert_array_equal(np.asarray(label), mask.numpy())
            np.testing.assert_array_equal(np.asarray(label.convert("RGB")), SCHEMA.to_color(mask))


def test_every_painted_file_says_that_it_is_synthetic(tmp_path):
    write(tmp_path / "set")
    for index, path in enumerate(sorted((tmp_path / "set" / "images").iterdir())):
        with Image.open(path) as image:
            assert image.text["synthetic"] == "1"
            assert image.text["Software"].startswith("TerraSynth ")
            assert image.text["seed"] == str(2**62 + index)


def test_the_card_has_front_matter_classes_and_provenance(tmp_path):
    write(tmp_path / "set")
    text = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["license"] == "unknown"
    assert "synthetic" in values["tags"]
    assert values["task_categories"] == ["image-segmentation"]
    assert values["size_categories"] == ["n<1K"]
    assert "These images are synthetic" in body
    masks = torch.stack([sample(index)[2] for index in range(COUNT)])
    for index, name in [*enumerate(SCHEMA.names), (255, "(unlabelled)")]:
        tiles = int((masks == index).flatten(1).any(1).sum())
        assert f"| {index} | {name} | {tiles} | {(masks == index).double().mean():.2%} |" in body
    assert "| steering.strength | 0.1 |" in body


def license_of(folder) -> str:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])["license"]


def test_the_licence_is_stated_at_any_time_and_changes_nothing_but_the_card(tmp_path, uninterrupted):
    write(tmp_path / "set")
    writer = SyntheticWriter(tmp_path / "set", SCHEMA, plan=PLAN, license="cc-by-4.0")
    writer.finish()
    assert license_of(tmp_path / "set") == "cc-by-4.0"
    now = contents(tmp_path / "set")
    assert {name for name in now if now[name] != uninterrupted[name]} == {"README.md"}
    # Whoever adds samples later need not say it again; by hand it is stated in the card.
    write(tmp_path / "set")
    assert license_of(tmp_path / "set") == "cc-by-4.0"
    card = tmp_path / "set" / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("license: cc-by-4.0", "license: odbl"), encoding="utf-8")
    write(tmp_path / "set")
    assert license_of(tmp_path / "set") == "odbl"


@pytest.mark.parametrize(
    "text", ["no card", "---\n[1\n---\n", "---\nlicense: CC BY 4.0\n---\n", "---\nlicense:\n---\n"]
)
def test_a_card_that_states_no_licence_is_named_before_anything_is_painted(tmp_path, text):
    write(tmp_path / "set", until=1)
    (tmp_path / "set" / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(TerraSynthError, match=r"README\.md: (the dataset card has no|not the identifier)") as caught:
        SyntheticWriter(tmp_path / "set", SCHEMA, plan=PLAN)
    assert caught.value.fix


@pytest.mark.parametrize("license", ["CC BY 4.0", "", "a\nb", "https://x.org"])
def test_a_licence_that_is_no_identifier_is_refused_and_nothing_is_begun(tmp_path, license):
    with pytest.raises(TerraSynthError, match="not the identifier of a licence"):
        SyntheticWriter(tmp_path / "set", SCHEMA, plan=PLAN, license=license)
    assert not list(tmp_path.iterdir())


def test_the_classes_are_beside_the_masks(tmp_path):
    write(tmp_path / "set")
    assert LabelSchema.from_dict(read_json(tmp_path / "set" / "schema.json")) == SCHEMA


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "set"
    write(folder)
    return contents(folder)


@pytest.mark.parametrize("until", range(COUNT))
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, uninterrupted, until):
    write(tmp_path / "set", until=until)
    with pytest.raises(TerraSynthError, match="not finished"):
        load_synthetic(tmp_path / "set")
    (tmp_path / "set" / "images" / "000003.incomplete-7.png").write_bytes(b"half")
    (tmp_path / "set" / "masks" / "000003.incomplete-7.png").write_bytes(b"half")
    (tmp_path / "set" / "metadata.incomplete-7.jsonl").write_bytes(b"half")
    write(tmp_path / "set")
    assert contents(tmp_path / "set") == uninterrupted


@pytest.mark.parametrize("renames", range(15))
def test_a_run_killed_at_any_rename_ends_as_one_that_was_not(tmp_path, uninterrupted, killed, renames):
    """Every file appears by a rename; the process dies before the given one."""
    died = killed(lambda: write(tmp_path / "set"), Path, "replace", renames)
    # The marker, the schema, two files a sample, the card and the rows.
    assert died == (renames < 2 + 2 * COUNT + 2)
    write(tmp_path / "set")
    assert contents(tmp_path / "set") == uninterrupted


def test_running_a_finished_set_again_changes_nothing(tmp_path, uninterrupted):
    write(tmp_path / "set")
    write(tmp_path / "set")
    assert contents(tmp_path / "set") == uninterrupted


@pytest.mark.parametrize("damage", ["cut", "cut pixels", "gone", "mask gone", "mask empty", "not ours"])
def test_a_damaged_sample_is_painted_again(tmp_path, uninterrupted, damage):
    write(tmp_path / "set")
    image, mask = (tmp_path / "set" / kind / "000002.png" for kind in ("images", "masks"))
    if damage == "cut":
        image.write_bytes(image.read_bytes()[:60])
    elif damage == "cut pixels":
        image.write_bytes(image.read_bytes()[:-60])
    elif damage == "mask empty":
        mask.write_bytes(b"")
    elif damage == "gone":
        image.unlink()
    elif damage == "mask gone":
        mask.unlink()
    else:
        Image.new("RGB", (SIZE, SIZE)).save(image)
    write(tmp_path / "set")
    assert contents(tmp_path / "set") == uninterrupted


def test_a_mask_whose_image_never_came_goes_when_fewer_are_wanted(tmp_path, uninterrupted):
    write(tmp_path / "set", until=COUNT - 1)
    orphan = tmp_path / "set" / "masks" / f"{COUNT - 1:06d}.png"
    shutil.copy(tmp_path / "set" / "masks" / "000000.png", orphan)
    SyntheticWriter(tmp_path / "set", SCHEMA, plan=PLAN).finish()
    assert not orphan.exists()
    assert len(load_synthetic(tmp_path / "set")) == COUNT - 1
    write(tmp_path / "set")
    assert contents(tmp_path / "set") == uninterrupted


# --- whose folder ----------------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(TerraSynthError, match=r"thesis\.txt"):
        SyntheticWriter(tmp_path, SCHEMA, plan=PLAN)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_plan_is_refused_with_what_changed(tmp_path):
    write(tmp_path / "set", until=2)
    before = contents(tmp_path / "set")
    plan = {"model": "0f1e", "recipe": "demo", "steering": {"steps": 4, "strength": 0.2}, "tiles": "77"}
    with pytest.raises(TerraSynthError) as caught:
        write(tmp_path / "set", plan=plan)
    assert "steering.strength: 0.1 -> 0.2" in str(caught.value)
    assert "tiles: (not set) -> 77" in str(caught.value)
    assert "steps" not in str(caught.value)
    assert "choose another --out" in caught.value.fix
    assert contents(tmp_path / "set") == before


def test_other_classes_are_another_plan(tmp_path):
    write(tmp_path / "set", until=1)
    with pytest.raises(TerraSynthError, match="was -> now"):
        SyntheticWriter(tmp_path / "set", LabelSchema(("a", "b"), ((1, 1, 1), (2, 2, 2))), plan=PLAN)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_sample_outside_the_schema_is_refused_whole(tmp_path):
    writer = SyntheticWriter(tmp_path / "set", SCHEMA, plan=PLAN)
    name, image, mask, row = sample(0)
    with pytest.raises(TerraSynthError, match="no class"):
        writer.add(name, image, mask + 1, row)
    for bad in ("../x", "", ".hidden", "a b"):
        with pytest.raises(ValueError, match="file name"):
            writer.add(bad, image, mask, row)
    with pytest.raises(ValueError, match="belong together"):
        writer.add(name, image[:, 1:], mask, row)
    assert writer.done() == set()
    with pytest.raises(TerraSynthError, match="nothing was painted"):
        writer.finish()


def test_a_dataset_that_lost_or_gained_files_is_refused(tmp_path):
    write(tmp_path / "set")
    (tmp_path / "set" / "masks" / "000001.png").rename(tmp_path / "set" / "masks" / "x.png")
    with pytest.raises(TerraSynthError, match="1 missing, 1 unknown"):
        load_synthetic(tmp_path / "set")


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {**row, "id": "../../elsewhere"},
        lambda row: {**row, "file_name": "images/../../elsewhere.png"},
        lambda row: {**row, "id": "000000", "file_name": "images/000000.png", "mask_file_name": "masks/000000.png"},
    ],
    ids=["id", "path", "one sample twice"],
)
def test_rows_that_lead_elsewhere_are_refused(tmp_path, change):
    write(tmp_path / "set")
    path = tmp_path / "set" / "metadata.jsonl"
    *lines, last = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines, json.dumps(change(json.loads(last))) + "\n"]), encoding="utf-8")
    with pytest.raises(TerraSynthError, match=r"metadata\.jsonl: the rows are damaged"):
        read_manifest(tmp_path / "set")


def test_a_damaged_image_or_row_is_named(tmp_path):
    write(tmp_path / "set")
    path = tmp_path / "set" / "images" / "000001.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TerraSynthError, match=r"000001\.png"):
        load_synthetic(tmp_path / "set")
    (tmp_path / "set" / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(TerraSynthError, match="rows are damaged"):
        read_manifest(tmp_path / "set")


def test_a_folder_that_is_no_synthetic_dataset_is_named(tmp_path):
    with pytest.raises(TerraSynthError, match="not a synthetic dataset"):
        load_synthetic(tmp_path)


def test_masks_are_written_as_the_schema_stores_them(tmp_path):
    schema = LabelSchema.load("loveda")
    writer = SyntheticWriter(tmp_path / "out", schema, plan={})
    mask = torch.tensor([[0, 6], [255, 2]], dtype=torch.uint8)
    writer.add("a", torch.zeros(3, 2, 2, dtype=torch.uint8), mask, {"seed": 1})
    writer.finish()
    assert np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png")).tolist() == [[1, 7], [0, 3]]
    assert torch.equal(load_synthetic(tmp_path / "out").masks[0], mask)
    assert "| 7 | agricultural | 1 | 25.00% |" in (tmp_path / "out" / "README.md").read_text()


def test_a_setting_with_bars_and_line_ends_stays_one_cell_of_the_card():
    plan = {"caption": "roofs | roads\nand fields", "seed": 3}
    text = dataset_card(Contents(), SCHEMA, plan, title="T", license="cc0-1.0", files="", loading="")
    assert "| caption | roofs \\| roads and fields |\n| seed | 3 |\n" in text


@pytest.mark.parametrize(
    ("count", "category"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (999_999, "100K<n<1M"), (1_000_000, "1M<n<10M"), (10**7, "10M<n<100M")],
)
def test_the_size_category_is_one_of_the_hub(count, category):
    contents = Contents()
    contents.count = count
    text = dataset_card(contents, SCHEMA, {}, title="T", license="cc0-1.0", files="", loading="")
    assert f"size_categories:\n- {category}\n" in text
