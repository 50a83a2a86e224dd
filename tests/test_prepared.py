"""What is read of a folder that prepare wrote, against the scenes it was made of."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from affine import Affine

from terrasynth.data.folder import load_tiles
from terrasynth.data.prepare import PrepareSettings, prepare
from terrasynth.data.prepared import ground_groups, imagery
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import DataConfig
from terrasynth.recipe_io import load_recipe
from terrasynth.tasks.folds import divide

SCHEMA = LabelSchema(("land", "water"), ((60, 16, 152), (110, 193, 228)))


@pytest.fixture
def data(tmp_path):
    """Three scenes of 32 x 160 pixels of half a metre, as tiles of 16 that overlap by half."""
    random = np.random.default_rng(0)
    for number in range(3):
        place = {"crs": "EPSG:32640", "transform": Affine(0.5, 0, 300_000 + 500 * number, 0, -0.5, 2_800_000)}
        for kind, count, high in (("images", 3, 256), ("masks", 1, 2)):
            (tmp_path / "src" / kind).mkdir(parents=True, exist_ok=True)
            profile = {"count": count, "height": 32, "width": 160, "dtype": "uint8", **place}
            with rasterio.open(tmp_path / "src" / kind / f"s-{number}.tif", "w", driver="GTiff", **profile) as file:
                file.write(random.integers(0, high, (count, 32, 160), dtype=np.uint8))
    SCHEMA.to_yaml(tmp_path / "src" / "classes.yaml")
    settings = PrepareSettings(labels="classes.yaml", size=16, stride=8, fractions=(1, 0, 0), bands=(3, 2, 1))
    prepared = prepare(tmp_path / "src", tmp_path / "tiles", settings)
    return load_recipe(prepared.recipe).recipe.data


def test_tiles_of_one_scene_stay_together_and_of_few_scenes_those_of_one_square(data):
    tiles = load_tiles(data, "train")
    groups = ground_groups(data, tiles.ids, 16, 3)
    assert groups == [f"scene {id_.rpartition('-')[0].rpartition('-')[0]}" for id_ in tiles.ids]
    assert len(set(groups)) == 3
    assert len(set(divide(tiles.ids, 3, 0, groups))) == 3

    squares = ground_groups(data, tiles.ids, 16, 4)
    for id_, square in zip(tiles.ids, squares, strict=True):
        scene, row, column = id_.rsplit("-", 2)
        assert square == f"scene {scene} {int(row) // 64} {int(column) // 64}"
    assert len(set(squares)) == 9


def test_without_a_list_there_are_no_groups_and_what_it_does_not_name_is_by_itself(data):
    assert ground_groups(DataConfig(), ["a"], 16, 2) is None
    assert ground_groups(data, ["s-0-00000-00000", "mine"], 16, 2) == ["scene s-0", "tile mine"]
    path = data.root / "tiles.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(TerraSynthError, match="list of tiles is damaged"):
        ground_groups(data, ["a"], 16, 2)
    path.unlink()
    assert ground_groups(data, ["a"], 16, 2) is None


def test_bands_and_ground_sampling_distance_are_known(data):
    assert imagery(data) == {"bands": [3, 2, 1], "ranges": None, "gsd": 0.5}
    smaller = data.model_copy(update={"image_size": 8, "fit": "resize"})
    assert imagery(smaller)["gsd"] == 1.0
    assert imagery(DataConfig()) == {"gsd": 0.5}
    (data.root / ".terrasynth.json").unlink()
    assert imagery(data) == {}
