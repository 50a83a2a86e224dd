"""Masks from polygons: GeoJSON, and with `terrasynth[vector]` GeoPackage, Shapefile and FlatGeobuf.

A pixel belongs to a polygon if its centre lies inside. Where polygons overlap, the one that comes later in the file
counts.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.features import bounds, is_valid_geom, rasterize
from rasterio.warp import transform_geom
from rasterio.windows import Window

from terrasynth.data.raster import NO_TRANSFORM, Grid, crs_name
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.io import gdal_environment, read_json

__all__ = ["VECTOR_SUFFIXES", "PlacedPolygons", "Polygons", "read_polygons"]

_GEOJSON = (".geojson", ".json")
# What such a file begins with: GDAL opens a file by its content, and would follow what a VRT in disguise names.
_MAGIC = {".gpkg": b"SQLite format 3\x00", ".shp": b"\x00\x00\x27\x0a", ".fgb": b"fgb"}
VECTOR_SUFFIXES = (*_GEOJSON, *_MAGIC)
#: Largest vector file, in bytes: all of its polygons are in memory.
_MAX_BYTES = 512 * 1024 * 1024
_LONGITUDES_LATITUDES = CRS.from_string("OGC:CRS84")

Geometry = Mapping[str, Any]


@dataclass(frozen=True)
class Polygons:
    """The labelled areas of one vector file.

    Attributes:
        path: the file.
        crs: of the coordinates.
        geometries: n GeoJSON polygons or multipolygons.
        classes: uint8 (n,), the class of each.
    """

    path: Path
    crs: CRS
    geometries: tuple[Geometry, ...]
    classes: NDArray[np.uint8]

    def placed(self, grid: Grid, path: Path) -> PlacedPolygons:
        """The polygons in the pixels of a scene; only their corners are moved, so long edges should have several.

        Args:
            grid: of the scene.
            path: of the scene, for messages.

        Raises:
            TerraSynthError: the scene has no place, or the polygons can not be brought to it.
        """
        if grid.crs is None or grid.transform is None:
            raise TerraSynthError(
                "the scene has no place, so polygons have none in it",
                path=path,
                found="no CRS" if grid.crs is None else "no transform",
                expected=f"a georeferenced TIFF, for the polygons of {self.path}",
                fix="set them, for example with `gdal_edit.py -a_srs EPSG:32640 -a_ullr LEFT TOP RIGHT BOTTOM FILE`",
            )
        geometries: Sequence[Geometry] = self.geometries
        if geometries and self.crs != grid.crs:
            try:
                with gdal_environment():
                    geometries = transform_geom(self.crs, grid.crs, list(self.geometries))
            except NO_TRANSFORM as error:
                raise TerraSynthError(
                    "the polygons can not be brought to the CRS of the scene",
                    path=self.path,
                    found=f"{crs_name(self.crs)} to {crs_name(grid.crs)} of {path}",
                    fix="correct the CRS of the one or the other, for example with `gdal_edit.py -a_srs EPSG:… FILE`",
                ) from error
        boxes = np.array([bounds(geometry) for geometry in geometries], dtype=np.float64).reshape(-1, 4)
        if not np.isfinite(boxes).all():
            first = int(np.flatnonzero(~np.isfinite(boxes).all(1))[0])
            raise TerraSynthError(
                "a polygon lies where the CRS of the scene has no coordinates",
                path=self.path,
                found=f"polygon {first}, counted from 0, in {grid.crs} of {path}",
                fix="correct its coordinates, or the CRS of the file",
            )
        return PlacedPolygons(grid, tuple(geometries), self.classes, _pixel_boxes(boxes, grid.transform))


@dataclass(frozen=True)
class PlacedPolygons:
    """Polygons in the CRS of a scene.

    Attributes:
        grid: of the scene.
        geometries: n GeoJSON geometries.
        classes: uint8 (n,).
        boxes: (n, 4): left, top, right, bottom of each, in pixels of the scene.
    """

    grid: Grid
    geometries: tuple[Geometry, ...]
    classes: NDArray[np.uint8]
    boxes: NDArray[np.float64]

    def read(self, window: Window, background: int) -> NDArray[np.uint8]:
        """Class indices of a window, (h, w); `background` where there is no polygon."""
        mask = np.full((int(window.height), int(window.width)), background, dtype=np.uint8)
        left, top, right, bottom = self.boxes.T
        near = (left < window.col_off + window.width) & (right > window.col_off)
        near &= (top < window.row_off + window.height) & (bottom > window.row_off)
        shapes = [(self.geometries[i], int(self.classes[i])) for i in np.flatnonzero(near)]
        if shapes:
            rasterize(shapes, out=mask, transform=self.grid.part(window).transform)
        return mask


def _pixel_boxes(boxes: NDArray[np.float64], transform: Affine) -> NDArray[np.float64]:
    inverse = ~transform
    xs, ys = boxes[:, [0, 0, 2, 2]], boxes[:, [1, 3, 1, 3]]
    columns = inverse.a * xs + inverse.b * ys + inverse.c
    rows = inverse.d * xs + inverse.e * ys + inverse.f
    return np.stack([columns.min(1), rows.min(1), columns.max(1), rows.max(1)], axis=1)


def read_polygons(path: Path, schema: LabelSchema, attribute: str | None) -> Polygons:
    """Read the polygons of a vector file and their classes.

    Args:
        path: GeoJSON, or a GeoPackage, Shapefile or FlatGeobuf with one layer.
        schema: the classes.
        attribute: holds the name of the class of each polygon, or its value in mask files.

    Raises:
        TerraSynthError: the file is missing, foreign or too large, has no CRS, no such attribute or anything but
            polygons, or an attribute names no class.
    """
    if not path.is_file():
        raise TerraSynthError("no such file", path=path, fix="correct --masks")
    if path.stat().st_size > _MAX_BYTES:
        raise TerraSynthError(
            "the vector file is too large to hold in memory",
            path=path,
            found=f"{path.stat().st_size / 2**20:.0f} MiB",
            expected=f"at most {_MAX_BYTES // 2**20} MiB",
            fix="cut it into one file a scene, for example with `ogr2ogr -clipsrc`",
        )
    reader = _read_geojson if path.suffix.lower() in _GEOJSON else _read_with_pyogrio
    crs, geometries, properties = reader(path, attribute)
    classes = _classes(path, properties, schema, attribute)
    for number, geometry in enumerate(geometries):
        if geometry.get("type") not in ("Polygon", "MultiPolygon") or not is_valid_geom(geometry):
            raise TerraSynthError(
                "not a polygon",
                path=path,
                found=f"{geometry.get('type')} (feature {number}, counted from 0)",
                expected="polygons and multipolygons with closed rings",
                fix="leave it out, or draw it as an area",
            )
    return Polygons(path, crs, tuple(geometries), classes)


def _classes(
    path: Path, properties: Sequence[Mapping[str, Any]], schema: LabelSchema, attribute: str | None
) -> NDArray[np.uint8]:
    names = sorted({name for of_one in properties for name in of_one})
    if attribute is None or (properties and attribute not in names):
        near = difflib.get_close_matches(attribute or "", names, n=1)
        raise TerraSynthError(
            "which attribute holds the class?" if attribute is None else f"no polygon has the attribute {attribute!r}",
            path=path,
            found=f"attributes {', '.join(names) or '(none)'}",
            fix=f"did you mean {near[0]!r}?" if near else "name it with --class-attribute",
        )
    known: dict[object, int] = {name: index for index, name in enumerate(schema.names)}
    known |= {value: index for index, value in enumerate(schema.stored)}
    known |= dict.fromkeys(schema.stored_ignore, schema.ignore_index)
    values = [of_one.get(attribute) for of_one in properties]
    # 3.0 is 3, but true is not 1.
    keys = [None if isinstance(value, bool | list | dict) else value for value in values]
    wrong = Counter(repr(value) for value, key in zip(values, keys, strict=True) if key not in known)
    if wrong:
        shown = ", ".join(f"{value} ({count} polygons)" for value, count in wrong.most_common(5))
        near = difflib.get_close_matches(wrong.most_common(1)[0][0].strip("'"), schema.names, n=1, cutoff=0.5)
        raise TerraSynthError(
            f"the attribute {attribute!r} names no class",
            path=path,
            found=shown + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
            expected=f"{', '.join(schema.names)}, or their values in mask files",
            fix=f"did you mean {near[0]!r}? Rename it, or correct the label schema"
            if near
            else "rename them, or correct the label schema",
        )
    return np.array([known[key] for key in keys], dtype=np.uint8)


_Read = tuple[CRS, list[Geometry], list[Mapping[str, Any]]]


def _read_geojson(path: Path, attribute: str | None) -> _Read:
    document = read_json(path, fix="write it again with `ogr2ogr -lco RFC7946=YES OUT.geojson IN`, or repair it")
    if not isinstance(document, dict) or document.get("type") not in ("FeatureCollection", "Feature"):
        found = document.get("type", "an object without `type`") if isinstance(document, dict) else type(document)
        raise TerraSynthError(
            "not GeoJSON with features", path=path, found=found, expected='{"type": "FeatureCollection", "features": …}'
        )
    features = document.get("features") if document["type"] == "FeatureCollection" else [document]
    if not isinstance(features, list) or not all(isinstance(feature, dict) for feature in features):
        raise TerraSynthError("not GeoJSON with features", path=path, found="`features` is no list of objects")
    # A feature may have no place (RFC 7946, section 3.2).
    placed = [feature for feature in features if feature.get("geometry") is not None]
    geometries = [feature["geometry"] for feature in placed]
    if not all(isinstance(geometry, dict) for geometry in geometries):
        raise TerraSynthError("not GeoJSON with features", path=path, found="a `geometry` that is no object")
    crs = _geojson_crs(document, path)
    if "crs" not in document:
        _check_degrees(geometries, path)
    return crs, geometries, [feature.get("properties") or {} for feature in placed]


def _geojson_crs(document: Mapping[str, Any], path: Path) -> CRS:
    """Longitude and latitude (RFC 7946), unless a named `crs` says otherwise, as the 2008 format allowed."""
    if "crs" not in document:
        return _LONGITUDES_LATITUDES
    named = document["crs"]
    try:
        return CRS.from_user_input(named["properties"]["name"])
    except (CRSError, TypeError, KeyError) as error:
        raise TerraSynthError(
            "the `crs` of the GeoJSON is not understood",
            path=path,
            found=named,
            expected='no `crs` (longitude and latitude), or {"type": "name", "properties": {"name": "EPSG:32640"}}',
            fix="write it again with `ogr2ogr -lco RFC7946=YES OUT.geojson IN`",
        ) from error


def _check_degrees(geometries: Sequence[Geometry], path: Path) -> None:
    for number, geometry in enumerate(geometries):
        if not is_valid_geom(geometry):
            continue  # is told by its type
        west, south, east, north = bounds(geometry)
        if not (-180 <= west <= east <= 180 and -90 <= south <= north <= 90) or math.isnan(west + south):
            raise TerraSynthError(
                "the coordinates are no longitudes and latitudes, and the file names no CRS",
                path=path,
                found=f"x {west:g} to {east:g}, y {south:g} to {north:g} (feature {number}, counted from 0)",
                expected="degrees, as GeoJSON without `crs` has (RFC 7946)",
                fix="write it again with `ogr2ogr -s_srs EPSG:… -t_srs EPSG:4326 OUT.geojson IN`",
            )


def _read_with_pyogrio(path: Path, attribute: str | None) -> _Read:
    magic = _MAGIC[path.suffix.lower()]
    with path.open("rb") as file:
        if (start := file.read(len(magic))) != magic:
            raise TerraSynthError(
                f"not a {path.suffix} file", path=path, found=f"a file that starts with {start!r}", expected=repr(magic)
            )
    try:
        import pyogrio
        import shapely
    except ImportError as error:
        raise TerraSynthError(
            f"reading {path.suffix} needs two more packages",
            path=path,
            found=f"no {error.name}",
            fix="pip install 'terrasynth[vector]', or convert it: `ogr2ogr -lco RFC7946=YES OUT.geojson IN`",
        ) from error
    try:
        layers = [str(name) for name, geometry in pyogrio.list_layers(path) if geometry is not None]
        if len(layers) != 1:
            raise TerraSynthError(
                "which layer holds the polygons?",
                path=path,
                found=", ".join(layers) or "no layer with geometries",
                expected="one layer",
                fix="take it out: `ogr2ogr OUT.gpkg IN LAYER`",
            )
        fields = pyogrio.read_info(path, layer=layers[0])["fields"].tolist()
        wanted = [attribute] if attribute in fields else fields
        meta, _, shapes, columns = pyogrio.raw.read(path, layer=layers[0], columns=wanted)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, ValueError) as error:
        raise TerraSynthError("the vector file can not be read", path=path, found=error) from error
    if not meta["crs"]:
        raise TerraSynthError(
            "the vector file names no CRS",
            path=path,
            expected="one (for a Shapefile, in a .prj file beside it)",
            fix="set it: `ogr2ogr -a_srs EPSG:32640 OUT.gpkg IN`",
        )
    geometries = [None if shape is None else shapely.geometry.mapping(shapely.from_wkb(shape)) for shape in shapes]
    properties = [
        {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in zip(wanted, row, strict=True)
        }
        for row in zip(*columns, strict=True)
    ]
    there = [i for i, geometry in enumerate(geometries) if geometry is not None]
    return (
        CRS.from_user_input(meta["crs"]),
        [geometry for geometry in geometries if geometry is not None],
        [properties[i] for i in there],
    )
