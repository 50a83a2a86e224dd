"""Tiles come out as they are on disk, and whatever is wrong with the files is said in one message."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from terrasynth.data.folder import Tiles, check_splits, load_masks, load_tiles, turn_digest, unlabelled_windows
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import DataConfig, SplitConfig, WorldConfig

SCHEMA = LabelSchema(
    ("building", "road", "water"), ((60, 16, 152), (110, 193, 228), (226, 169, 41)), 255, ((0, 0, 0), (155, 155, 155))
)
SIZE = 16


def random_mask(seed: int, size: int = SIZE) -> np.ndarray:
    values = np.array([0, 1, 2, 255], np.uint8)
    mask = values[np.random.default_rng(seed).integers(0, 4, (size, size))]
    mask[0, :4] = values
    return mask


def random_image(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def save(path, pixels, palette=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        bands = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
            with rasterio.open(path, "w", driver="GTiff", dtype=bands.dtype, **shape) as file:
                file.write(bands)
        return
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(np.asarray(palette, np.uint8).tobytes())
    image.save(path)


@pytest.fixture
def root(tmp_path):
    """Three training tiles, one test tile, index masks."""
    SCHEMA.to_yaml(tmp_path / "classes.yaml")
    for split, names in (("train", ("a", "b", "c")), ("test", ("d",))):
        for name in names:
            save(tmp_path / "images" / split / f"{name}.png", random_image(ord(name)))
            save(tmp_path / "masks" / split / f"{name}.png", random_mask(ord(name)))
        (tmp_path / f"{split}.txt").write_text("\n".join(names) + "\n")
    return tmp_path


def config(folder, **changes) -> DataConfig:
    values = {"kind": "folder", "root": folder, "label_schema": "classes.yaml", "image_size": SIZE}
    return DataConfig.model_validate({**values, **changes})


def failure(folder, **changes) -> TerraSynthError:
    with pytest.raises(TerraSynthError) as caught:
        load_tiles(config(folder, **changes), "train")
    assert caught.value.fix, "the message must say what to do"
    return caught.value


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_tiles_are_what_is_on_disk_in_the_order_of_the_list(root):
    (root / "train.txt").write_text("\ufeffc\r\na.png\n\n  b\n", encoding="utf-8")
    tiles = load_tiles(config(root), "train")
    assert tiles.ids == ("c", "a", "b")
    assert (tiles.images.dtype, tiles.masks.dtype) == (torch.uint8, torch.uint8)
    for id_, image, mask in zip(tiles.ids, tiles.images, tiles.masks, strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), random_image(ord(id_)))
        np.testing.assert_array_equal(mask.numpy(), random_mask(ord(id_)))


def test_a_sample_has_the_agreed_form(root):
    tiles = load_tiles(config(root, caption="{classes} seen from above"), "train")
    sample = tiles.sample(1)
    assert sample["image"].dtype == torch.float32
    assert sample["image"].shape == (3, SIZE, SIZE)
    assert torch.equal(sample["image"], tiles.images[1] / 255)
    assert sample["mask"].dtype == torch.int64
    assert torch.equal(sample["mask"], tiles.masks[1].long())
    assert sample["id"] == "b"
    assert sample["caption"] == tiles.captions()[1]
    assert set(sample["caption"].removesuffix(" seen from above").split(", ")) == set(SCHEMA.names)


def test_without_a_list_every_image_of_the_folder_is_taken(root):
    (root / "images" / "train" / ".hidden.png").write_text("")
    (root / "images" / "train" / "notes.txt").write_text("")
    train = {"folder": "train", "list": None}
    assert load_tiles(config(root, train=train), "train").ids == ("a", "b", "c")


def test_image_and_mask_may_have_different_suffixes(root):
    (root / "images" / "train" / "a.png").unlink()
    (root / "masks" / "train" / "b.png").unlink()
    save(root / "images" / "train" / "a.tif", random_image(ord("a")))
    save(root / "masks" / "train" / "b.tif", random_mask(ord("b")).astype(np.uint16))
    tiles = load_tiles(config(root), "train")
    np.testing.assert_array_equal(tiles.images[0].permute(1, 2, 0).numpy(), random_image(ord("a")))
    np.testing.assert_array_equal(tiles.masks[1].numpy(), random_mask(ord("b")))


def test_the_schema_is_sought_beside_the_recipe_then_in_the_root(root, tmp_path_factory):
    base = tmp_path_factory.mktemp("recipe")
    assert load_tiles(config(root), "train", base=base).schema == SCHEMA
    other = LabelSchema(("x", "y", "z"), SCHEMA.colors)
    other.to_yaml(base / "classes.yaml")
    assert load_tiles(config(root), "train", base=base).schema == other


def test_grey_palette_and_opaque_images_become_rgb(root):
    folder = root / "images" / "train"
    grey = random_image(1)[..., 0]
    save(folder / "a.png", grey)
    save(folder / "b.png", np.dstack([random_image(2), np.full((SIZE, SIZE), 255, np.uint8)]))
    palette = np.random.default_rng(0).integers(0, 256, (256, 3))
    save(folder / "c.png", grey, palette)
    images = load_tiles(config(root), "train").images.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(images[0], np.dstack([grey] * 3))
    np.testing.assert_array_equal(images[1], random_image(2))
    np.testing.assert_array_equal(images[2], palette[grey])


def test_fingerprints_depend_on_content_alone(root):
    first = load_tiles(config(root), "train")
    assert first.fingerprint() == load_tiles(config(root), "train").fingerprint()
    for index in range(3):
        name = "abc"[index]
        (root / "masks" / "train" / f"{name}.png").unlink()
        save(root / "masks" / "train" / f"{name}.tif", random_mask(ord(name)))
    assert first.fingerprint() == load_tiles(config(root), "train").fingerprint()
    images, masks = first.images.clone(), first.masks.clone()
    images[1, 2, 3, 4] ^= 1
    masks[0, 1, 1] = (masks[0, 1, 1] + 1) % 2
    renamed = LabelSchema(("building", "street", "water"), SCHEMA.colors)
    others = [
        Tiles(first.ids, images, first.masks, SCHEMA),
        Tiles(first.ids, first.images, masks, SCHEMA),
        Tiles(("a", "b", "x"), first.images, first.masks, SCHEMA),
        Tiles(first.ids, first.images, first.masks, renamed),
    ]
    assert len({tiles.fingerprint() for tiles in (first, *others)}) == 5


# --- size ------------------------------------------------------------------------------------------------------------


def test_shrinking_averages_the_image_by_area_and_takes_the_most_frequent_class(root):
    image, mask = random_image(0, 4 * SIZE), random_mask(0, 4 * SIZE)
    save(root / "images" / "train" / "a.png", image)
    save(root / "masks" / "train" / "a.png", mask)
    tiles = load_tiles(config(root), "train")
    expected = image.reshape(SIZE, 4, SIZE, 4, 3).mean((1, 3))
    # Pillow rounds twice, after the rows and after the columns.
    assert np.abs(tiles.images[0].permute(1, 2, 0).numpy() - expected).max() <= 1
    for row in range(SIZE):
        for column in range(SIZE):
            values, counts = np.unique(mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4], return_counts=True)
            winners = values[counts == counts.max()]
            middle = mask[4 * row + 2, 4 * column + 2]
            chosen = tiles.masks[0, row, column].item()
            assert chosen in winners
            assert chosen == middle or middle not in winners


def test_a_shrunk_mask_stays_on_its_shrunk_image(root):
    # A disc, at a factor that is not whole: the image's half-way line is the mask's edge, within a pixel.
    y, x = np.mgrid[:40, :40]
    disc = (np.hypot(y - 17, x - 22) < 11).astype(np.uint8)
    for name in "abc":
        save(root / "images" / "train" / f"{name}.png", np.dstack([disc * 200] * 3))
        save(root / "masks" / "train" / f"{name}.png", disc)
    tiles = load_tiles(config(root), "train")
    bright = tiles.images[0, 0] > 100
    assert (bright != (tiles.masks[0] == 1)).float().mean() < 0.05
    assert (tiles.masks[0].float().mean() - disc.mean()).abs() < 0.02


def test_cropping_takes_the_centre_of_both(root):
    image, mask = random_image(0, SIZE + 10), random_mask(0, SIZE + 10)
    save(root / "images" / "train" / "a.png", image)
    save(root / "masks" / "train" / "a.png", mask)
    tiles = load_tiles(config(root, fit="crop"), "train")
    np.testing.assert_array_equal(tiles.images[0].permute(1, 2, 0).numpy(), image[5:-5, 5:-5])
    np.testing.assert_array_equal(tiles.masks[0].numpy(), mask[5:-5, 5:-5])


@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_a_tile_that_is_not_square_is_cut_to_its_centre(root, fit):
    image, mask = random_image(0, 30)[:SIZE], random_mask(0, 30)[:SIZE]
    save(root / "images" / "train" / "a.png", image)
    save(root / "masks" / "train" / "a.png", mask)
    tiles = load_tiles(config(root, fit=fit), "train")
    np.testing.assert_array_equal(tiles.images[0].permute(1, 2, 0).numpy(), image[:, 7:-7])
    np.testing.assert_array_equal(tiles.masks[0].numpy(), mask[:, 7:-7])


@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_a_tile_that_is_too_small_is_an_error_with_both_sizes(root, fit):
    error = failure(root, image_size=SIZE + 1, fit=fit)
    assert f"{SIZE} x {SIZE}" in str(error)
    assert f"at least {SIZE + 1} x {SIZE + 1}" in str(error)


# --- how masks are coded ---------------------------------------------------------------------------------------------


def recode(root, encode, suffix=".png", palette=None) -> None:
    for path in (root / "masks" / "train").iterdir():
        path.unlink()
    for name in "abc":
        save(root / "masks" / "train" / f"{name}{suffix}", encode(random_mask(ord(name))), palette)


def grey_levels(mask: np.ndarray) -> np.ndarray:
    return ((SCHEMA.to_grey(torch.from_numpy(mask))[0] + 1) * 127.5).round().byte().numpy()


def scramble(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A palette image of the mask whose indices are other classes than its colours."""
    indices = np.select([mask == 0, mask == 1, mask == 2], [2, 0, 1], 255).astype(np.uint8)
    palette = np.zeros((256, 3), np.uint8)
    palette[[2, 0, 1]] = SCHEMA.colors
    return indices, palette


@pytest.mark.parametrize(
    ("encode", "suffix", "codings"),
    [
        (lambda mask: mask, ".png", ("auto", "index")),
        (lambda mask: np.dstack([mask] * 3), ".png", ("auto", "index")),
        (lambda mask: mask.astype(np.int32), ".tif", ("auto", "index")),
        (SCHEMA.to_color, ".png", ("auto", "color")),
        (SCHEMA.to_color, ".tif", ("auto", "color")),
        (lambda mask: np.dstack([SCHEMA.to_color(mask), np.full_like(mask, 255)]), ".png", ("auto", "color")),
        (grey_levels, ".png", ("auto",)),
    ],
    ids=["index", "index in RGB", "index int32", "RGB", "RGB tiff", "RGBA", "grey levels"],
)
def test_masks_are_read_in_every_coding(root, encode, suffix, codings):
    recode(root, encode, suffix)
    for coding in codings:
        masks = load_tiles(config(root, mask_coding=coding), "train").masks.numpy()
        np.testing.assert_array_equal(masks, np.stack([random_mask(ord(name)) for name in "abc"]))


def test_an_indexed_png_in_the_order_of_the_schema_is_read_whatever_the_coding(root):
    recode(root, lambda mask: mask, palette=SCHEMA.palette())
    for coding in ("auto", "index", "color"):
        masks = load_tiles(config(root, mask_coding=coding), "train").masks.numpy()
        np.testing.assert_array_equal(masks, np.stack([random_mask(ord(name)) for name in "abc"]))


def test_a_palette_with_other_colours_leaves_the_indices(root):
    recode(root, lambda mask: mask, palette=np.random.default_rng(0).integers(0, 256, (256, 3)))
    masks = load_tiles(config(root), "train").masks.numpy()
    np.testing.assert_array_equal(masks, np.stack([random_mask(ord(name)) for name in "abc"]))


def test_a_palette_in_another_order_is_refused_until_the_coding_is_chosen(root):
    recode(root, lambda mask: scramble(mask)[0], palette=scramble(random_mask(0))[1])
    error = failure(root)
    assert "as class indices: 0 = building, 1 = road, 2 = water" in str(error.found)
    assert "by their colours: 0 = road, 1 = water, 2 = building" in str(error.found)
    assert "data.mask_coding" in error.fix
    masks = np.stack([random_mask(ord(name)) for name in "abc"])
    np.testing.assert_array_equal(load_tiles(config(root, mask_coding="color"), "train").masks.numpy(), masks)
    raw = np.stack([scramble(mask)[0] for mask in masks])
    np.testing.assert_array_equal(load_tiles(config(root, mask_coding="index"), "train").masks.numpy(), raw)


def test_a_palette_whose_indices_are_no_classes_is_read_by_colour(root):
    indices = {0: 7, 1: 9, 2: 30, 255: 0}
    palette = np.zeros((256, 3), np.uint8)
    palette[[7, 9, 30]] = SCHEMA.colors
    recode(root, np.vectorize(indices.get, otypes=[np.uint8]), palette=palette)
    masks = load_tiles(config(root), "train").masks.numpy()
    np.testing.assert_array_equal(masks, np.stack([random_mask(ord(name)) for name in "abc"]))


def test_black_and_white_masks_are_refused_until_the_coding_is_chosen(root):
    recode(root, lambda mask: np.where(mask == 1, 255, 0).astype(np.uint8))
    error = failure(root)
    assert "0 and 255" in str(error)
    assert "#FFFFFF" in error.fix
    schema = LabelSchema(("rest", "road"), ((0, 0, 0), (255, 255, 255)), 255, ((9, 9, 9),))
    schema.to_yaml(root / "classes.yaml")
    assert "two ways" in str(failure(root))
    masks = load_tiles(config(root, mask_coding="color"), "train").masks.numpy()
    np.testing.assert_array_equal(masks, np.stack([random_mask(ord(name)) == 1 for name in "abc"]))
    assert set(np.unique(load_tiles(config(root, mask_coding="index"), "train").masks)) == {0, 255}


def test_masks_in_several_codings_are_refused(root):
    save(root / "masks" / "train" / "b.png", SCHEMA.to_color(random_mask(1)))
    error = failure(root)
    assert "a.png could be index" in str(error) or "c.png could be index" in str(error)
    assert "b.png could be color" in str(error)


def test_values_that_are_no_class_are_named(root):
    mask = random_mask(0)
    mask[3, 3:5] = 7
    save(root / "masks" / "train" / "b.png", mask)
    error = failure(root)
    assert error.path == root / "masks" / "train" / "b.png"
    assert "7 (2 px)" in str(error.found)
    assert "building, road, water" in str(error.expected)


def test_colours_that_are_no_class_are_named(root):
    recode(root, SCHEMA.to_color)
    rgb = SCHEMA.to_color(random_mask(0))
    rgb[5, 5] = (61, 16, 152)
    save(root / "masks" / "train" / "b.png", rgb)
    error = failure(root)
    assert "b.png" in str(error)
    assert "#3D1098 (1 px, nearest: building #3C1098)" in str(error)


def test_a_palette_of_neither_shows_values_and_colours(root):
    recode(root, lambda mask: np.where(mask == 2, 9, mask).astype(np.uint8), palette=np.full((256, 3), 99))
    error = str(failure(root, train=SplitConfig(folder="train")))
    assert "values 9 (" in error
    assert "#636363" in error


def test_a_jpeg_mask_is_refused(root):
    (root / "masks" / "train" / "b.png").unlink()
    Image.fromarray(random_mask(0)).save(root / "masks" / "train" / "b.jpg")
    assert "JPEG" in str(failure(root))


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_masks_of_fractions_are_refused(root, dtype):
    (root / "masks" / "train" / "b.png").unlink()
    save(root / "masks" / "train" / "b.tif", np.zeros((SIZE, SIZE), dtype))
    assert "whole numbers" in str(failure(root))


def test_the_chosen_coding_is_the_only_one_tried(root):
    assert "colours that are no class" in str(failure(root, mask_coding="color", train=SplitConfig(folder="train")))
    recode(root, SCHEMA.to_color)
    assert "more than one band" in str(failure(root, mask_coding="index"))


# --- unlabelled tiles ------------------------------------------------------------------------------------------------


def test_unlabelled_tiles_are_counted_and_allowed_unless_all_are(root):
    empty = np.full((SIZE, SIZE), 255, np.uint8)
    save(root / "masks" / "train" / "b.png", empty)
    assert load_tiles(config(root), "train").unlabelled == 1
    for name in "ac":
        save(root / "masks" / "train" / f"{name}.png", empty)
    assert "no tile of the train split has a labelled pixel" in str(failure(root))


# --- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((SIZE, SIZE, 3), np.uint16), "not 8-bit"),
        (np.zeros((SIZE, SIZE, 5), np.uint8), "5 bands"),
        (np.zeros((SIZE, SIZE, 4), np.uint8), "opaque alpha"),
        (np.zeros((SIZE, SIZE, 2), np.uint8), "opaque alpha"),
    ],
)
def test_images_that_need_conversion_are_refused(root, pixels, message):
    (root / "images" / "train" / "b.png").unlink()
    save(root / "images" / "train" / "b.tif", pixels)
    error = failure(root)
    assert message in str(error)
    assert "b.tif" in str(error)


def test_a_transparent_png_is_refused(root):
    save(root / "images" / "train" / "b.png", np.dstack([random_image(0), np.full((SIZE, SIZE), 254, np.uint8)]))
    assert "opaque alpha" in str(failure(root))


def test_all_bad_files_are_in_one_message(root):
    (root / "images" / "train" / "a.png").write_bytes(b"text")
    (root / "masks" / "train" / "b.png").unlink()
    save(root / "masks" / "train" / "c.png", np.full((SIZE, SIZE), 9, np.uint8))
    (root / "train.txt").write_text("a\nb\nc\nnowhere\n")
    error = failure(root)
    assert "4 of 4 tiles of the train split" in str(error)
    for part in ("a.png: not an image", "b.png: the image has no mask", "c.png: mask values", "nowhere: named in"):
        assert part in str(error)


def test_a_long_list_of_bad_files_is_cut_to_ten(root):
    (root / "train.txt").write_text("\n".join(f"tile{index}" for index in range(25)))
    assert "and 15 more" in str(failure(root))


def test_a_mask_of_another_name_is_pointed_at(root):
    (root / "masks" / "train" / "b.png").rename(root / "masks" / "train" / "b_mask.png")
    assert "b_mask.png" in str(failure(root))


def test_two_layouts_of_one_name_are_refused(root):
    save(root / "masks" / "train" / "a.tif", random_mask(0))
    schema = LabelSchema.from_yaml(root / "classes.yaml")
    with pytest.raises(TerraSynthError, match="several files with one name"):
        load_masks(root / "masks" / "train", schema, SIZE)


def test_layouts_that_can_be_read_in_two_ways_need_no_recipe_to_be_mended(tmp_path):
    save(tmp_path / "a.png", np.full((8, 8), 255, np.uint8) * (np.arange(8) > 3).astype(np.uint8))
    schema = LabelSchema(("no", "yes"), ((1, 1, 1), (2, 2, 2)))
    with pytest.raises(TerraSynthError, match="black and white") as caught:
        load_masks(tmp_path, schema, 8)
    assert "export the masks as class indices" in caught.value.fix


def test_a_layout_whose_palette_contradicts_its_values_is_refused_without_advice_for_recipes(tmp_path):
    schema = LabelSchema(("no", "yes", "maybe"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)))
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3)
    picture.putpalette([2, 2, 2, 9, 9, 9, 8, 8, 8])
    picture.save(tmp_path / "a.png")
    with pytest.raises(TerraSynthError, match=r"0 = no, 1 = yes, 2 = maybe; by their colours: 0 = yes") as caught:
        load_masks(tmp_path, schema, 8)
    assert "data.mask_coding" not in caught.value.fix


def test_masks_without_an_image_are_counted(root, capfd, monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "0")
    save(root / "masks" / "train" / "more.png", random_mask(0))
    load_tiles(config(root, train={"folder": "train", "list": None}), "train")
    assert "train split: masks without an image, not used: 1" in capfd.readouterr().err


def test_repeated_and_empty_lists_are_refused(root):
    (root / "train.txt").write_text("a\nb\na.png\n")
    assert "more than once" in str(failure(root))
    (root / "train.txt").write_text("\n")
    assert "the train split is empty" in str(failure(root))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": None}, "--data DIR"),
        ({"root": "/no/such/folder"}, "no such folder"),
        ({"label_schema": None}, "names no label schema"),
        ({"label_schema": "none.yaml"}, "label schema is missing"),
        ({"train": {"folder": "train", "list": "none.txt"}}, "split list is missing"),
        ({"train": {"folder": "train", "list": "images"}}, "split list can not be read"),
        ({"train": {"folder": "trian"}}, "has test, train"),
        ({"masks": "labels/{split}"}, "data.masks"),
    ],
)
def test_missing_parts_are_named(root, changes, message):
    assert message in str(failure(root, **changes))


# --- leaks -----------------------------------------------------------------------------------------------------------


def tiles_of(images: dict[str, np.ndarray]) -> Tiles:
    pixels = torch.from_numpy(np.stack(list(images.values()))).permute(0, 3, 1, 2).contiguous()
    return Tiles(tuple(images), pixels, torch.zeros(len(images), SIZE, SIZE, dtype=torch.uint8), SCHEMA)


def test_splits_that_share_a_tile_are_refused():
    first = tiles_of({"a": random_image(1), "b": random_image(2)})
    second = tiles_of({"c": random_image(3), "d": random_image(2)})
    with pytest.raises(TerraSynthError, match="train/b = test/d"):
        check_splits(train=first, validation=tiles_of({"e": random_image(9)}), test=second)


def flipped_and_turned(image):
    return [np.rot90(side, turns) for side in (image, image[:, ::-1]) for turns in range(4)]


@pytest.mark.parametrize("way", range(8))
def test_splits_that_share_a_tile_flipped_or_turned_are_refused(way):
    turned = flipped_and_turned(random_image(2))[way]
    with pytest.raises(TerraSynthError, match="train/b = test/d"):
        check_splits(train=tiles_of({"a": random_image(1), "b": random_image(2)}), test=tiles_of({"d": turned}))


@pytest.mark.parametrize("border", [0, 1, 4])
def test_one_digest_of_all_flips_and_turns_and_of_nothing_else(border):
    """Where all borders are of one colour too, and the first row of no way comes first."""
    images = [np.pad(random_image(seed)[:9, :7], ((border, border), (border, border), (0, 0))) for seed in (1, 2)]
    digests = [{turn_digest(way) for way in flipped_and_turned(image)} for image in images]
    assert [len(each) for each in digests] == [1, 1]
    assert digests[0] != digests[1]
    assert turn_digest(images[0].reshape(images[0].shape[1], -1, 3)) not in digests[0]


def test_a_copy_that_was_compressed_again_is_found_by_its_name():
    noisy = np.clip(random_image(2).astype(int) + np.random.default_rng(0).integers(-9, 10, (SIZE, SIZE, 3)), 0, 255)
    with pytest.raises(TerraSynthError, match="train/b ~ test/b"):
        check_splits(train=tiles_of({"b": random_image(2)}), test=tiles_of({"b": noisy.astype(np.uint8)}))


def test_equal_names_and_blank_tiles_are_no_leak():
    blank = np.zeros((SIZE, SIZE, 3), np.uint8)
    check_splits(train=tiles_of({"0": random_image(1), "1": blank}), test=tiles_of({"0": random_image(2), "7": blank}))


# --- the procedural world --------------------------------------------------------------------------------------------


def test_the_world_gives_every_split_its_own_tiles_again_and_again():
    settings = DataConfig(image_size=32, world=WorldConfig(train=3, validation=2, test=4))
    splits = {split: load_tiles(settings, split) for split in ("train", "validation", "test")}
    assert [len(tiles) for tiles in splits.values()] == [3, 2, 4]
    assert splits["train"].images.shape == (3, 3, 32, 32)
    assert splits["train"].masks.max() < splits["train"].schema.num_classes
    check_splits(**splits)
    assert load_tiles(settings, "train").fingerprint() == splits["train"].fingerprint()
    more = settings.model_copy(update={"world": settings.world.model_copy(update={"train": 5})})
    assert torch.equal(load_tiles(more, "train").images[:3], splits["train"].images)
    other = settings.model_copy(update={"world": settings.world.model_copy(update={"seed": 1})})
    assert not torch.equal(load_tiles(other, "train").images, splits["train"].images)


def test_a_packaged_schema_reads_what_its_data_set_stores(root):
    stored = np.random.default_rng(0).integers(0, 8, (SIZE, SIZE)).astype(np.uint8)
    for name in "abc":
        save(root / "masks" / "train" / f"{name}.png", stored)
    tiles = load_tiles(config(root, label_schema="loveda"), "train")
    np.testing.assert_array_equal(tiles.masks[0].numpy(), np.where(stored == 0, 255, stored.astype(int) - 1))
    assert tiles.schema.names[2] == "road"  # stored as 3


def test_a_split_may_lie_apart(root, tmp_path_factory):
    """Tiles of another place, prepared by themselves."""
    parent = tmp_path_factory.mktemp("places")
    shutil.copytree(root, parent / "there")
    (parent / "classes.yaml").write_bytes((root / "classes.yaml").read_bytes())
    split = {"folder": "train", "list": "train.txt", "root": "there"}
    apart = load_tiles(config(parent, train=split), "train")
    assert apart.fingerprint() == load_tiles(config(root), "train").fingerprint()

    # And it is held out where it lies.
    source = {"images": "there/images/train/*", "windows": 1, "scale": None}
    with pytest.raises(TerraSynthError, match="validation or test tiles"):
        unlabelled_windows(config(parent, test=split, unlabelled=[source]), SCHEMA)


def test_tiles_are_taken_with_everything_that_is_theirs(root):
    tiles = replace(load_tiles(config(root), "train"), caption=("1 {classes}", "2", "3"), weights=(1.0, 2.0, 3.0))
    taken = tiles.take([2, 0, 2])
    assert (taken.ids, taken.caption, taken.weights) == (("c", "a", "c"), ("3", "1 {classes}", "3"), (3.0, 1.0, 3.0))
    for position, index in enumerate([2, 0, 2]):
        ours, theirs = taken.sample(position), tiles.sample(index)
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["mask"], theirs["mask"])
        assert ours["caption"] == theirs["caption"]
    assert tiles.take(range(3)).fingerprint() == tiles.fingerprint()
    plain = load_tiles(config(root), "train")
    assert (
        plain.take([1]).fingerprint()
        == replace(plain, ids=("b",), images=plain.images[1:2], masks=plain.masks[1:2]).fingerprint()
    )
    assert len(plain.take([])) == 0
