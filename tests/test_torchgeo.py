"""Datasets of torchgeo become tiles as they are, and a synthetic dataset becomes one of torchgeo's."""

from __future__ import annotations

import dataclasses
import re
import resource
import warnings

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset

# Not in the extra `test`: it brings lightning, geopandas and more.
pytest.importorskip("torchgeo", reason="pip install 'terrasynth[torchgeo]'")
from torchgeo.datasets import LoveDA, NonGeoDataset, Potsdam2D, RasterDataset, Vaihingen2D, stack_samples
from torchgeo.samplers import GridGeoSampler

from terrasynth.data.folder import load_synthetic, load_tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.data.torchgeo import SyntheticTiles, from_torchgeo
from terrasynth.data.write import SyntheticWriter
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import DataConfig

NAMES = ("background", "building", "road", "water", "barren", "forest", "agriculture")
SCHEMA = LabelSchema(NAMES, tuple((index + 1, 0, 0) for index in range(7)))
SIZE = 16


def from_zero(sample):
    """LoveDA's masks hold class + 1, and 0 where there is no data."""
    return {**sample, "mask": torch.where(sample["mask"] == 0, 255, sample["mask"] - 1)}


@pytest.fixture
def loveda(tmp_path):
    """The folder that torchgeo's LoveDA expects, with three tiles a scene of 16 pixels."""
    random = np.random.default_rng(0)
    for scene in ("Urban", "Rural"):
        for number in range(3):
            for kind, pixels in (
                ("images_png", random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)),
                ("masks_png", random.integers(0, 8, (SIZE, SIZE), dtype=np.uint8)),
            ):
                folder = tmp_path / "loveda" / "Train" / scene / kind
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{scene}{number}.png")
    return LoveDA(tmp_path / "loveda", "train", transforms=from_zero, download=False, checksum=False)


def load(folder, split="train"):
    config = {"kind": "folder", "root": folder, "label_schema": "classes.yaml", "image_size": SIZE}
    return load_tiles(DataConfig.model_validate(config), split)


class Samples(Dataset):
    """What a torchgeo dataset yields, made up."""

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def sample(image=None, mask=None):
    image = torch.linspace(0, 255, 3 * SIZE * SIZE).view(3, SIZE, SIZE) if image is None else image
    return {"image": image, "mask": torch.zeros(SIZE, SIZE, dtype=torch.long) if mask is None else mask}


@pytest.mark.parametrize(("parent", "name"), [(Potsdam2D, "potsdam"), (Vaihingen2D, "vaihingen")])
def test_clutter_is_not_lost(tmp_path, parent, name):
    class Made(Samples, parent):
        transforms = None

    mask = torch.arange(SIZE * SIZE).view(SIZE, SIZE) % 6
    dataset, schema = Made(sample(mask=mask)), LabelSchema.load(name)
    with pytest.raises(TerraSynthError, match="clutter as 0") as caught:
        from_torchgeo(dataset, schema, tmp_path / "tiles", value_range=(0, 255))
    mended = eval(caught.value.fix, {"dataclasses": dataclasses, "schema": schema})
    from_torchgeo(dataset, mended, tmp_path / "tiles", value_range=(0, 255))
    read = load(tmp_path / "tiles").masks[0]
    assert torch.equal(read.long(), torch.where(mask == 0, schema.names.index("clutter"), mask - 1))


def convert(tmp_path, *samples, **arguments):
    return from_torchgeo(Samples(*samples), SCHEMA, tmp_path / "tiles", **{"value_range": (0, 255), **arguments})


def failure(tmp_path, *samples, **arguments):
    with pytest.raises(TerraSynthError) as caught:
        convert(tmp_path, *samples, **arguments)
    assert not (tmp_path / "tiles" / "train.txt").exists()
    assert not list(tmp_path.rglob("*.png"))
    return str(caught.value)


# --- from torchgeo ---------------------------------------------------------------------------------------------------


def test_loveda_becomes_the_tiles_of_a_recipe(loveda, tmp_path):
    from_torchgeo(loveda, SCHEMA, tmp_path / "tiles", value_range=(0, 255))
    tiles = load(tmp_path / "tiles")
    assert len(tiles) == len(loveda) == 6
    assert tiles.schema == SCHEMA
    for index, files in enumerate(loveda.files):
        np.testing.assert_array_equal(tiles.images[index].permute(1, 2, 0), np.asarray(Image.open(files["image"])))
        stored = np.asarray(Image.open(files["mask"])).astype(int)
        np.testing.assert_array_equal(tiles.masks[index], np.where(stored == 0, 255, stored - 1))


def test_loveda_as_it_is_fits_the_packaged_schema(loveda, tmp_path):
    """Its masks store class + 1, which the schema knows; so do the tiles that are written."""
    loveda.transforms = None
    from_torchgeo(loveda, LabelSchema.load("loveda"), tmp_path / "tiles", value_range=(0, 255))
    tiles = load(tmp_path / "tiles")
    for index, files in enumerate(loveda.files):
        stored = np.asarray(Image.open(files["mask"])).astype(int)
        np.testing.assert_array_equal(tiles.masks[index], np.where(stored == 0, 255, stored - 1))
        written = Image.open(tmp_path / "tiles" / "masks" / "train" / f"{index:06d}.png")
        np.testing.assert_array_equal(np.asarray(written), stored)


def test_splits_share_a_folder_and_a_second_call_changes_nothing(loveda, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "0")
    for split in ("train", "val", "train"):
        from_torchgeo(loveda, SCHEMA, tmp_path / "tiles", split, value_range=(0, 255))
    assert "train.txt is there already" in capfd.readouterr().err
    assert torch.equal(load(tmp_path / "tiles").images, load(tmp_path / "tiles", "validation").images)
    with pytest.raises(TerraSynthError, match=r"value_range: \[0, 255\] -> \[0, 256\]"):
        from_torchgeo(loveda, SCHEMA, tmp_path / "tiles", value_range=(0, 256))


@pytest.mark.parametrize("scale", [1, 255, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_scaled_linearly_from_the_stated_range(tmp_path, scale, dtype):
    image = torch.rand(3, SIZE, SIZE, dtype=torch.float64).mul(scale).to(dtype)
    convert(tmp_path, sample(image), value_range=(0, scale))
    expected = np.rint(image.numpy().astype(np.float64) / scale * 255)
    np.testing.assert_array_equal(load(tmp_path / "tiles").images[0], expected)


def test_eight_bits_are_kept_exactly_whatever_type_they_have(tmp_path):
    for number, dtype in enumerate((torch.uint8, torch.int16, torch.int32, torch.float16, torch.float32)):
        image = torch.arange(256).repeat(3).view(3, SIZE, SIZE).to(dtype)
        convert(tmp_path / str(number), sample(image))
        np.testing.assert_array_equal(load(tmp_path / str(number) / "tiles").images[0], image.to(torch.uint8))


def test_values_outside_the_range_are_refused_or_cut_off_on_request(tmp_path):
    image = torch.linspace(-500, 4000, 3 * SIZE * SIZE).view(3, SIZE, SIZE)
    message = failure(tmp_path, sample(image), value_range=(0, 3000))
    assert "found:    -500 to 4000\n  expected: 0 to 3000" in message
    assert "clip=True" in message
    convert(tmp_path / "clipped", sample(image), value_range=(0, 3000), clip=True)
    expected = np.rint(np.clip(image.numpy().astype(np.float64), 0, 3000) / 3000 * 255)
    np.testing.assert_array_equal(load(tmp_path / "clipped" / "tiles").images[0], expected)


def test_after_a_refusal_the_right_range_is_taken_in_the_same_folder(tmp_path):
    failure(tmp_path, sample(), value_range=(0, 1))
    convert(tmp_path, sample())
    (tmp_path / "tiles" / "train.txt").unlink()  # to convert again, with other settings
    convert(tmp_path, sample(), value_range=(0, 510))
    assert load(tmp_path / "tiles").images.max() == 128


def test_fractions_under_the_range_of_bytes_are_not_taken_for_night(tmp_path):
    message = failure(tmp_path, sample(torch.rand(3, SIZE, SIZE)))
    assert "all images would come out black" in message
    assert "(0, 1) for fractions" in message


def test_the_bands_that_are_asked_for_are_taken_in_that_order(tmp_path):
    image = torch.arange(5).view(5, 1, 1).expand(5, SIZE, SIZE) * 50
    assert "pass bands=(3, 2, 1)" in failure(tmp_path, sample(image))
    assert "three numbers from 0 to 4" in failure(tmp_path / "a", sample(image), bands=(0, 1, 5))
    assert "three numbers from 0 to 4" in failure(tmp_path / "b", sample(image), bands=(0, 1))
    convert(tmp_path / "c", sample(image), bands=(3, 2, 1))
    assert load(tmp_path / "c" / "tiles").images[0, :, 0, 0].tolist() == [150, 100, 50]
    assert "pass bands=(0, 0, 0)" in failure(tmp_path / "d", sample(image[4:]))
    convert(tmp_path / "e", sample(image[4:]), bands=(0, 0, 0))
    assert load(tmp_path / "e" / "tiles").images[0, :, 0, 0].tolist() == [200, 200, 200]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("lead", [(), (1,)])
def test_masks_come_with_and_without_a_band_in_any_type(tmp_path, dtype, lead):
    mask = torch.randint(0, 8, (SIZE, SIZE))
    mask[mask == 7] = 255
    convert(tmp_path, sample(mask=mask.to(dtype).view(*lead, SIZE, SIZE)))
    assert torch.equal(load(tmp_path / "tiles").masks[0].long(), mask)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (sample(mask=torch.full((SIZE, SIZE), 9)), "mask values that are no class"),
        (sample(mask=torch.full((SIZE, SIZE), 0.5)), "not of whole numbers"),
        (sample(mask=torch.zeros(SIZE, SIZE + 1)), "not as large as its image"),
        (sample(mask=torch.zeros(2, SIZE, SIZE)), "not as large as its image"),
        (sample(torch.full((3, SIZE, SIZE), torch.nan)), "no numbers"),
        (sample(torch.zeros(2, 3, SIZE, SIZE)), "not of bands, rows and columns"),
        ({"image": torch.zeros(3, SIZE, SIZE), "label": torch.tensor(1)}, "the sample has no mask"),
    ],
)
def test_samples_that_do_not_fit_are_all_named(tmp_path, bad, message):
    said = failure(tmp_path, sample(), bad, bad)
    assert "2 of 3 tiles of the train split can not be used" in said
    assert re.search(f"sample 1: .*{message}", said)
    assert "sample 2: " in said


def test_a_folder_with_tiles_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "tiles" / "images" / "train").mkdir(parents=True)
    assert "has a train split already" in failure(tmp_path, sample())
    LabelSchema(("a", "b"), ((1, 1, 1), (2, 2, 2))).to_yaml(tmp_path / "other" / "tiles" / "classes.yaml")
    assert "tiles of other classes" in failure(tmp_path / "other", sample())


def test_an_interrupted_conversion_ends_as_one_that_was_not(loveda, tmp_path):
    class Killed(BaseException):
        pass

    class Fragile(LoveDA):
        left = 4

        def __getitem__(self, index):
            if not self.left:
                raise Killed
            self.left -= 1
            return super().__getitem__(index)

    fragile = Fragile(loveda.root, "train", transforms=from_zero)
    arguments = {"value_range": (0, 255)}
    with pytest.raises(Killed):
        from_torchgeo(fragile, SCHEMA, tmp_path / "tiles", **arguments)
    with pytest.raises(TerraSynthError):
        load(tmp_path / "tiles")
    (tmp_path / "tiles" / "images").mkdir(exist_ok=True)
    (tmp_path / "tiles" / "images" / "train.incomplete-7").mkdir()
    fragile.left = 6
    from_torchgeo(fragile, SCHEMA, tmp_path / "tiles", **arguments)
    assert [path.name for path in (tmp_path / "tiles" / "images").iterdir()] == ["train"]
    fragile.left = 6
    from_torchgeo(fragile, SCHEMA, tmp_path / "whole", **arguments)
    whole, again = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("whole", "tiles")
    )
    assert whole == again


def test_a_full_disk_leaves_no_tiles_behind(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = torch.randint(0, 256, (3, 128, 128))
    samples = [sample(), sample(large, torch.zeros(128, 128))]
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
    try:
        with pytest.raises(TerraSynthError, match="images/train: no space to write"):
            convert(tmp_path, *samples)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in (tmp_path / "tiles").rglob("*") if path.is_file()]
    convert(tmp_path, *samples)
    assert (tmp_path / "tiles" / "train.txt").read_text() == "000000\n000001\n"


# --- with a place on Earth -------------------------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path):
    """An orthophoto and a map of 40 x 24 pixels in UTM, in files as a RasterDataset reads them."""
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (3, 40, 24), dtype=np.uint8)
    mask = random.integers(0, 7, (1, 40, 24), dtype=np.uint8)
    transform = rasterio.transform.from_origin(412_345.5, 5_678_901.25, 0.25, 0.25)
    for kind, bands in (("image", image), ("mask", mask)):
        (tmp_path / kind).mkdir()
        profile = {"height": 40, "width": 24, "count": len(bands), "dtype": "uint8", "crs": "EPSG:32633"}
        with rasterio.open(tmp_path / kind / "a.tif", "w", driver="GTiff", transform=transform, **profile) as file:
            file.write(bands)

    class Map(RasterDataset):
        is_image = False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RasterDataset(tmp_path / "image") & Map(tmp_path / "mask"), image, mask[0], transform


def test_windows_of_a_geodataset_keep_their_place_on_earth(scene, tmp_path):
    dataset, image, mask, transform = scene
    sampler = GridGeoSampler(dataset, size=SIZE, stride=8)
    from_torchgeo(dataset, SCHEMA, tmp_path / "tiles", value_range=(0, 255), sampler=sampler)
    tiles = load(tmp_path / "tiles")
    assert len(tiles) == len(sampler) > 4
    for index, name in enumerate(tiles.ids):
        for kind in ("images", "masks"):
            with rasterio.open(tmp_path / "tiles" / kind / "train" / f"{name}.tif") as file:
                assert file.crs.to_epsg() == 32633
                assert file.res == (0.25, 0.25)
                row, column = rasterio.transform.rowcol(transform, file.bounds.left, file.bounds.top, op=float)
        assert (column % 1, row % 1) == pytest.approx((0, 0), abs=1e-6)
        window = (slice(round(row), round(row) + SIZE), slice(round(column), round(column) + SIZE))
        np.testing.assert_array_equal(tiles.images[index], image[:, *window])
        np.testing.assert_array_equal(tiles.masks[index], mask[window])


def test_a_geodataset_needs_to_be_told_which_windows(scene, tmp_path):
    with pytest.raises(TerraSynthError, match="sampler=GridGeoSampler"):
        from_torchgeo(scene[0], SCHEMA, tmp_path / "tiles", value_range=(0, 255))


# --- to torchgeo -----------------------------------------------------------------------------------------------------


@pytest.fixture
def painted(tmp_path):
    writer = SyntheticWriter(tmp_path / "set", SCHEMA, plan={})
    for index in range(4):
        image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)
        mask = torch.randint(0, 7, (SIZE, SIZE), dtype=torch.uint8)
        mask[0] = 255
        writer.add(f"{index:06d}", image, mask, {})
    return writer.finish()


def test_a_synthetic_dataset_is_one_of_torchgeos(painted, loveda):
    dataset, tiles = SyntheticTiles(painted), load_synthetic(painted)
    assert isinstance(dataset, NonGeoDataset)
    assert len(dataset) == 4
    assert dataset.classes == NAMES
    for index in range(4):
        assert torch.equal(dataset[index]["image"], tiles.images[index].float())
        assert torch.equal(dataset[index]["mask"], tiles.masks[index].long())
    real = loveda[0]
    assert {key: (value.dtype, value.ndim) for key, value in dataset[0].items()} == {
        key: (value.dtype, value.ndim) for key, value in real.items()
    }
    loader = DataLoader(ConcatDataset([loveda, dataset]), batch_size=5, collate_fn=stack_samples)
    batches = [batch["image"].shape for batch in loader]
    assert batches == [(5, 3, SIZE, SIZE)] * 2
    with pytest.raises(IndexError):
        dataset[4]


def test_transforms_are_applied_and_a_damaged_file_is_named(painted):
    dataset = SyntheticTiles(painted, transforms=lambda sample: {**sample, "image": sample["image"] / 255})
    assert dataset[0]["image"].max() <= 1
    path = painted / "images" / "000002.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert len(dataset[1]["mask"]) == SIZE
    with pytest.raises(TerraSynthError, match=r"000002\.png"):
        dataset[2]
    with pytest.raises(TerraSynthError, match="not a synthetic dataset"):
        SyntheticTiles(painted.parent)
