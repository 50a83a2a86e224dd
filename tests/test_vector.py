"""Burnt polygons against a test of every pixel's centre, and the rules of GeoJSON about coordinates."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import shapely
from affine import Affine
from rasterio.crs import CRS
from rasterio.warp import transform_geom
from rasterio.windows import Window

from terrasynth.data.raster import Grid
from terrasynth.data.schema import LabelSchema
from terrasynth.data.vector import read_polygons
from terrasynth.errors import TerraSynthError

SCHEMA = LabelSchema(("land", "road", "water"), ((60, 16, 152), (110, 193, 228), (226, 169, 41)))
UTM = CRS.from_epsg(32640)
GRID = Grid(60, 50, UTM, Affine(0.5, 0, 300_000, 0, -0.5, 2_800_000))
BOX = shapely.box(300_003.3, 2_799_985.2, 300_020.1, 2_799_997.7)
RING = shapely.Point(300_018, 2_799_985).buffer(9).difference(shapely.Point(300_018, 2_799_985).buffer(4))
TWO = shapely.union(
    shapely.box(300_001, 2_799_976, 300_004, 2_799_979), shapely.box(300_026, 2_799_990, 300_040, 2_800_010)
)
AREAS = [(BOX, "land"), (RING, "water"), (TWO, "road")]


def geojson(path, areas=AREAS, crs="EPSG:4326", key="kind", **more):
    features = [
        {
            "type": "Feature",
            "properties": {key: kind},
            "geometry": transform_geom(UTM, crs, shapely.geometry.mapping(area)),
        }
        for area, kind in areas
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **more}))
    return path


def expected(areas=AREAS, background=255, grid=GRID):
    """The last polygon that the centre of each pixel lies in."""
    mask = np.full((grid.height, grid.width), background, np.uint8)
    columns, rows = np.meshgrid(np.arange(grid.width) + 0.5, np.arange(grid.height) + 0.5)
    xs, ys = grid.transform * (columns, rows)
    for area, kind in areas:
        mask[shapely.contains_xy(area, xs, ys)] = SCHEMA.names.index(kind)
    return mask


def burnt(path, attribute="kind", background=255, grid=GRID, step=13):
    placed = read_polygons(path, SCHEMA, attribute).placed(grid, path)
    mask = np.zeros((grid.height, grid.width), np.uint8)
    for top in range(0, grid.height, step):
        for left in range(0, grid.width, step):
            window = Window(left, top, min(step, grid.width - left), min(step, grid.height - top))
            mask[window.toslices()] = placed.read(window, background)
    return mask


def refused(path, attribute="kind", grid=GRID):
    with pytest.raises(TerraSynthError) as caught:
        read_polygons(path, SCHEMA, attribute).placed(grid, path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- what is burnt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [13, 60])
def test_a_pixel_belongs_to_the_last_polygon_that_its_centre_is_in(tmp_path, step):
    path = geojson(tmp_path / "a.geojson")
    np.testing.assert_array_equal(burnt(path, step=step), expected())
    np.testing.assert_array_equal(burnt(path, background=0), expected(background=0))
    reversed_path = geojson(tmp_path / "b.geojson", AREAS[::-1])
    assert (expected(AREAS[::-1]) != expected()).any()
    np.testing.assert_array_equal(burnt(reversed_path), expected(AREAS[::-1]))


def test_a_rotated_scene(tmp_path):
    grid = Grid(60, 50, UTM, GRID.transform * Affine.rotation(25))
    np.testing.assert_array_equal(burnt(geojson(tmp_path / "a.geojson"), grid=grid), expected(grid=grid))


def test_coordinates_are_degrees_unless_the_file_names_a_crs(tmp_path):
    named = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32640"}}
    np.testing.assert_array_equal(burnt(_with_crs(tmp_path / "a.json", UTM, named)), expected())
    degrees = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}
    np.testing.assert_array_equal(burnt(_with_crs(tmp_path / "b.json", "EPSG:4326", degrees)), expected())
    assert "no longitudes and latitudes" in refused(geojson(tmp_path / "c.json", crs=UTM))
    link = {"type": "link", "properties": {"href": "http://example.com/crs.json"}}
    assert "not understood" in refused(_with_crs(tmp_path / "d.json", UTM, link))


def _with_crs(path, crs, named):
    document = json.loads(geojson(path, crs=crs).read_text())
    path.write_text(json.dumps({**document, "crs": named}))
    return path


def test_classes_are_named_or_given_by_their_values(tmp_path):
    values = [(area, SCHEMA.names.index(kind)) for area, kind in AREAS]
    np.testing.assert_array_equal(burnt(geojson(tmp_path / "a.geojson", values)), expected())
    stored = LabelSchema(SCHEMA.names, SCHEMA.colors, 255, ((0, 0, 0),), (10, 20, 30), (0,))
    path = geojson(tmp_path / "b.geojson", [(BOX, 30.0), (RING, 0)])
    assert read_polygons(path, stored, "kind").classes.tolist() == [2, 255]


def test_features_without_a_place_are_passed_over(tmp_path):
    path = geojson(tmp_path / "a.geojson")
    document = json.loads(path.read_text())
    document["features"].insert(1, {"type": "Feature", "properties": None, "geometry": None})
    path.write_text(json.dumps(document))
    np.testing.assert_array_equal(burnt(path), expected())
    path.write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    assert (burnt(path) == 255).all()


@pytest.mark.parametrize(("suffix", "driver"), [(".gpkg", "GPKG"), (".shp", "ESRI Shapefile"), (".fgb", "FlatGeobuf")])
@pytest.mark.parametrize("crs", ["EPSG:32640", "EPSG:4326"])
def test_other_formats_give_the_same(tmp_path, suffix, driver, crs):
    pyogrio = pytest.importorskip("pyogrio")
    path = tmp_path / f"a{suffix}"
    shapes = np.array([shapely.to_wkb(shapely.geometry.shape(transform_geom(UTM, crs, shapely.geometry.mapping(area))))
                       for area, _ in AREAS], dtype=object)  # fmt: skip
    kinds = [np.array([kind for _, kind in AREAS], dtype=object)]
    pyogrio.raw.write(
        path, shapes, kinds, ["kind"], driver=driver, geometry_type="MultiPolygon", promote_to_multi=True, crs=crs,
        **({"SPATIAL_INDEX": "NO"} if suffix == ".fgb" else {}),
    )  # fmt: skip
    np.testing.assert_array_equal(burnt(path), expected())
    if suffix == ".shp":
        path.with_suffix(".prj").unlink()
        assert "names no CRS" in refused(path)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_attributes_and_classes_that_are_not_there_are_told_with_those_that_are(tmp_path):
    path = geojson(tmp_path / "a.geojson")
    assert "attributes kind" in refused(path, attribute=None)
    assert "did you mean 'kind'?" in refused(path, attribute="knd")
    message = refused(geojson(tmp_path / "b.geojson", [(BOX, "watr"), (RING, "watr"), (TWO, True)]))
    assert "'watr' (2 polygons), True (1 polygons)" in message
    assert "did you mean 'water'?" in message


LAND = '"type": "Feature", "properties": {"kind": "land"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "not GeoJSON"),
        ('{"type": "Topology"}', "Topology"),
        ('{"type": "FeatureCollection", "features": [3]}', "no list of objects"),
        (f'{{{LAND}, "geometry": {{"type": "Point", "coordinates": [1, 2]}}}}', "Point"),
        (f'{{{LAND}, "geometry": {{"type": "Polygon", "coordinates": [[[1, 2]]]}}}}', "not a polygon"),
        (f'{{{LAND}, "geometry": [1]}}', "no object"),
    ],
)
def test_what_is_no_geojson_of_polygons_is_explained(tmp_path, text, message):
    (tmp_path / "a.geojson").write_text(text)
    assert message in refused(tmp_path / "a.geojson")


def test_a_broken_file_of_the_user_is_not_to_be_deleted(tmp_path):
    path = geojson(tmp_path / "a.geojson")
    path.write_text(path.read_text()[:-40])
    message = refused(path)
    assert "ogr2ogr" in message
    assert "delete" not in message


def test_a_scene_that_lies_nowhere_on_earth_is_explained(tmp_path):
    local = CRS.from_wkt('LOCAL_CS["building site",UNIT["metre",1]]')
    message = refused(geojson(tmp_path / "a.geojson"), grid=Grid(60, 50, local, GRID.transform))
    assert "OGC:CRS84 to LOCAL_CS 'building site' of" in message


def test_a_scene_without_a_place_has_none_for_polygons(tmp_path):
    path = geojson(tmp_path / "a.geojson")
    assert "no CRS" in refused(path, grid=Grid(60, 50))
    assert "no transform" in refused(path, grid=Grid(60, 50, UTM))


def test_a_foreign_file_under_the_name_of_a_geopackage_is_not_opened(tmp_path):
    (tmp_path / "a.gpkg").write_text("<OGRVRTDataSource><OGRVRTLayer name='x'/></OGRVRTDataSource>")
    assert "starts with b'<OGRVRTDataSourc" in refused(tmp_path / "a.gpkg")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyogrio", None)
    (tmp_path / "a.gpkg").write_bytes(b"SQLite format 3\x00")
    assert "pip install 'terrasynth[vector]'" in refused(tmp_path / "a.gpkg")


def test_a_file_beyond_the_budget_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("terrasynth.data.vector._MAX_BYTES", 100)
    assert "too large" in refused(geojson(tmp_path / "a.geojson"))
