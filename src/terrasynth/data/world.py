"""A procedural world seen from above: seeded scenes with exact masks.

The world is the sample that needs no download: images that are hard enough to learn from, masks that are right to the
pixel, as many as are wanted. A scene is planned in metres (roads cut the land into blocks, a block becomes houses,
farmland, wood, lake or open ground), drawn once into a map of *surfaces* and a map of *heights*, and both the mask and
the image are read off these two maps. Heights cast the shadows and shade the crowns, so a shadow falls from what is
really there, over whatever lies beside it, and never reaches the mask.

`field` is crops and grass; `bare ground` is soil, sand, gravel and yards; `tree` is crowns and forest floor; `road`
includes dirt tracks and the cars on them; `water` includes swimming pools.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError

__all__ = ["REGIONS", "WORLD_SCHEMA", "Cover", "Region", "render"]

Rgb = tuple[float, float, float]
Outline = list[tuple[float, float]]
Floats = NDArray[np.floating[Any]]
T = TypeVar("T", float, Floats)

WORLD_SCHEMA = LabelSchema(
    names=("bare ground", "field", "tree", "road", "building", "water"),
    colors=((214, 188, 140), (168, 208, 96), (38, 115, 58), (92, 92, 104), (208, 64, 54), (58, 128, 206)),
)
BARE, FIELD, TREE, ROAD, BUILDING, WATER = range(6)

#: Every scene is drawn this many times finer than it is delivered; a pixel's class is the one that fills most of it.
_FINER = 2
#: Ground sampling distances at which the shapes still make sense, in metres per pixel.
_GSD_RANGE = (0.1, 10.0)


@dataclass(frozen=True)
class Cover:
    """How a surface looks: two colours, and what mixes them.

    Attributes:
        dark: first colour, sRGB 0..255.
        light: second colour.
        patch: strength of the slow variation between both, over some 15 m.
        grain: relative brightness variation from one pixel to the next.
        rows: range of the distance between rows in metres; (0, 0) for none.
        contrast: how far rows go from one colour to the other, 0..1.
        tramlines: whether tractor tracks cross it every 12-24 m.
    """

    dark: Rgb
    light: Rgb
    patch: float = 0.2
    grain: float = 0.05
    rows: tuple[float, float] = (0.0, 0.0)
    contrast: float = 0.0
    tramlines: bool = False


@dataclass(frozen=True)
class Region:
    """The look of a part of the world. Colours are sRGB, lengths metres, shares 0..1.

    Attributes:
        land: what lies between parcels, and its class index.
        open: covers of bare ground.
        yard: covers around houses.
        lawn: grass in gardens and meadows.
        crops: covers of parcels.
        crowns: covers of trees.
        conifers: share of conifers among the trees of a wood.
        palms: share of palms among the trees; orchards are all palms where there are any.
        orchards: share of woods that are planted in rows.
        crown: range of the crown diameter.
        shrub: the same for shrubs on open ground.
        undergrowth: forest floor.
        roofs: covers of roofs.
        flat_roofs: share of flat roofs.
        house: range of the longer side of a house.
        house_width: range of the shorter side.
        lot: range of the width of a lot.
        asphalt: covers of paved roads.
        track: covers of dirt tracks.
        tracks: share of dirt tracks among the minor roads.
        dirt_streets: the same for the streets between houses.
        water: covers of rivers and lakes: `dark` deep, `light` along the shore.
        pool: cover of swimming pools.
        pools: share of lots that have one.
        lawns: share of lots covered with grass.
        garden_trees: mean number of trees on a lot.
        pivots: share of farm blocks that are circles irrigated from their centre.
        hedges: share of parcel borders with trees.
        rivers: share of scenes with a river.
        uses: weights of what a block becomes: houses, farm, wood, lake, ponds or open.
        haze: colour of the haze, and its largest share.
        elevation: range of the sun's elevation in degrees.
        gain: range of the sensor's gain.
    """

    land: tuple[Cover, int]
    open: tuple[Cover, ...]
    yard: tuple[Cover, ...]
    lawn: tuple[Cover, ...]
    crops: tuple[Cover, ...]
    crowns: tuple[Cover, ...]
    conifers: float
    palms: float
    orchards: float
    crown: tuple[float, float]
    shrub: tuple[float, float]
    undergrowth: Cover
    roofs: tuple[Cover, ...]
    flat_roofs: float
    house: tuple[float, float]
    house_width: tuple[float, float]
    lot: tuple[float, float]
    asphalt: tuple[Cover, ...]
    track: tuple[Cover, ...]
    tracks: float
    dirt_streets: float
    water: tuple[Cover, ...]
    pool: Cover
    pools: float
    lawns: float
    garden_trees: float
    pivots: float
    hedges: float
    rivers: float
    uses: Mapping[str, float]
    haze: tuple[Rgb, float]
    elevation: tuple[float, float]
    gain: tuple[float, float]


_TEMPERATE = Region(
    land=(Cover((86, 104, 56), (134, 140, 84), patch=0.2, grain=0.09), FIELD),
    open=(
        Cover((116, 94, 70), (160, 136, 106), patch=0.2, grain=0.06),
        Cover((138, 130, 116), (182, 174, 158), patch=0.2, grain=0.08),
        Cover((134, 108, 78), (176, 152, 112), patch=0.2, grain=0.06),
    ),
    yard=(
        Cover((128, 120, 108), (172, 164, 152), patch=0.25, grain=0.06),
        Cover((120, 102, 80), (158, 140, 114), patch=0.2, grain=0.07),
        Cover((140, 138, 134), (178, 174, 168), patch=0.2, grain=0.04),
    ),
    lawn=(
        Cover((74, 102, 50), (116, 136, 74), patch=0.2, grain=0.06),
        Cover((84, 106, 58), (138, 146, 86), patch=0.2, grain=0.06),
    ),
    crops=(
        Cover((64, 98, 46), (102, 134, 66), patch=0.2, grain=0.04, rows=(1.0, 1.8), contrast=0.2, tramlines=True),
        Cover((92, 118, 56), (132, 150, 82), patch=0.2, grain=0.04, rows=(1.0, 1.8), contrast=0.2, tramlines=True),
        Cover((164, 144, 88), (202, 184, 124), patch=0.2, grain=0.04, rows=(1.2, 2.4), contrast=0.3, tramlines=True),
        Cover((172, 156, 118), (198, 184, 148), patch=0.2, grain=0.05, rows=(2.4, 3.2), contrast=0.6),
        Cover((176, 168, 62), (212, 200, 92), patch=0.2, grain=0.05, rows=(1.2, 2.0), contrast=0.15, tramlines=True),
        Cover((100, 78, 60), (144, 118, 94), patch=0.2, grain=0.06, rows=(1.4, 2.4), contrast=0.6),
        Cover((56, 88, 44), (122, 112, 78), patch=0.15, grain=0.05, rows=(1.5, 2.6), contrast=0.75),
        Cover((82, 108, 54), (142, 148, 88), patch=0.25, grain=0.07),
    ),
    crowns=(
        Cover((40, 62, 32), (82, 106, 54), patch=0.2, grain=0.09),
        Cover((50, 70, 34), (102, 116, 62), patch=0.2, grain=0.09),
        Cover((34, 56, 36), (70, 94, 54), patch=0.2, grain=0.09),
        Cover((64, 72, 36), (116, 116, 62), patch=0.2, grain=0.09),
    ),
    conifers=0.3,
    palms=0.0,
    orchards=0.15,
    crown=(4.0, 9.0),
    shrub=(1.6, 3.4),
    undergrowth=Cover((34, 46, 28), (60, 68, 42), patch=0.2, grain=0.1),
    roofs=(
        Cover((140, 72, 54), (172, 96, 72)),
        Cover((152, 88, 64), (186, 116, 88)),
        Cover((108, 76, 62), (136, 100, 82)),
        Cover((86, 88, 94), (110, 112, 118)),
        Cover((62, 62, 68), (82, 82, 88)),
        Cover((126, 124, 122), (156, 154, 150)),
    ),
    flat_roofs=0.15,
    house=(11.0, 17.0),
    house_width=(8.5, 11.5),
    lot=(16.0, 22.0),
    asphalt=(
        Cover((88, 88, 92), (112, 112, 114), patch=0.25),
        Cover((106, 104, 104), (130, 128, 126), patch=0.25),
        Cover((74, 75, 80), (94, 95, 99), patch=0.25),
    ),
    track=(
        Cover((132, 114, 88), (174, 154, 124), patch=0.2, grain=0.07),
        Cover((146, 138, 122), (184, 174, 156), patch=0.2, grain=0.07),
    ),
    tracks=0.35,
    dirt_streets=0.0,
    water=(
        Cover((30, 48, 54), (66, 82, 74), patch=0.08, grain=0.03),
        Cover((38, 58, 50), (84, 94, 70), patch=0.08, grain=0.03),
        Cover((40, 64, 84), (78, 100, 104), patch=0.08, grain=0.03),
        Cover((70, 76, 62), (104, 102, 80), patch=0.08, grain=0.03),
    ),
    pool=Cover((72, 158, 184), (128, 198, 212)),
    pools=0.08,
    lawns=0.75,
    garden_trees=2.0,
    pivots=0.0,
    hedges=0.35,
    rivers=0.25,
    uses=MappingProxyType({"houses": 0.46, "farm": 0.24, "wood": 0.14, "lake": 0.09, "open": 0.07}),
    haze=((196, 206, 218), 0.14),
    elevation=(32.0, 60.0),
    gain=(1.04, 1.32),
)

_ARID = Region(
    land=(Cover((188, 158, 116), (222, 196, 152), patch=0.2, grain=0.05, rows=(5.0, 9.0), contrast=0.12), BARE),
    open=(
        Cover((186, 156, 114), (226, 200, 156), patch=0.2, grain=0.05, rows=(4.0, 9.0), contrast=0.25),
        Cover((160, 134, 104), (196, 170, 136), patch=0.2, grain=0.06),
        Cover((176, 136, 98), (208, 170, 128), patch=0.2, grain=0.05),
    ),
    yard=(
        Cover((178, 152, 116), (212, 188, 150), patch=0.2, grain=0.05),
        Cover((164, 144, 118), (196, 176, 150), patch=0.2, grain=0.06),
    ),
    lawn=(Cover((104, 118, 66), (150, 152, 96), patch=0.2, grain=0.06),),
    crops=(
        Cover((58, 100, 48), (96, 132, 66), patch=0.2, grain=0.04, rows=(1.4, 2.4), contrast=0.25),
        Cover((86, 118, 58), (128, 148, 80), patch=0.25, grain=0.05, rows=(1.4, 2.6), contrast=0.3),
        Cover((74, 104, 56), (178, 152, 110), patch=0.15, grain=0.05, rows=(2.0, 3.2), contrast=0.8),
        Cover((124, 132, 80), (168, 162, 108), patch=0.2, grain=0.06, rows=(1.8, 3.0), contrast=0.3),
        Cover((182, 164, 110), (212, 194, 140), patch=0.25, grain=0.05, rows=(1.8, 3.0), contrast=0.4),
        Cover((152, 122, 90), (184, 154, 118), patch=0.25, grain=0.06, rows=(1.5, 2.6), contrast=0.6),
    ),
    crowns=(
        Cover((56, 74, 42), (98, 110, 64), patch=0.2, grain=0.1),
        Cover((70, 82, 48), (116, 122, 76), patch=0.2, grain=0.1),
        Cover((48, 70, 44), (88, 104, 62), patch=0.2, grain=0.1),
    ),
    conifers=0.0,
    palms=1.0,
    orchards=1.0,
    crown=(4.5, 8.0),
    shrub=(1.8, 4.5),
    undergrowth=Cover((70, 78, 46), (116, 110, 70), patch=0.2, grain=0.1),
    roofs=(
        Cover((214, 206, 192), (236, 230, 218)),
        Cover((196, 178, 150), (218, 202, 174)),
        Cover((178, 160, 134), (204, 186, 160)),
        Cover((164, 158, 148), (188, 182, 172)),
        Cover((224, 220, 212), (244, 240, 234)),
    ),
    flat_roofs=0.94,
    house=(9.0, 18.0),
    house_width=(8.0, 13.0),
    lot=(13.0, 22.0),
    asphalt=(
        Cover((112, 106, 100), (136, 128, 120), patch=0.3),
        Cover((92, 89, 88), (116, 112, 108), patch=0.3),
    ),
    track=(
        Cover((176, 150, 114), (208, 182, 142), patch=0.2, grain=0.05),
        Cover((192, 170, 134), (222, 202, 166), patch=0.2, grain=0.05),
    ),
    tracks=0.5,
    dirt_streets=0.0,
    water=(
        Cover((28, 112, 126), (112, 186, 172), patch=0.08, grain=0.03),
        Cover((40, 128, 136), (136, 194, 176), patch=0.08, grain=0.03),
        Cover((34, 92, 110), (104, 160, 154), patch=0.08, grain=0.03),
        Cover((84, 116, 104), (150, 158, 126), patch=0.08, grain=0.03),
    ),
    pool=Cover((66, 166, 192), (124, 208, 220)),
    pools=0.2,
    lawns=0.4,
    garden_trees=2.2,
    pivots=0.45,
    hedges=0.2,
    rivers=0.2,
    uses=MappingProxyType({"houses": 0.38, "farm": 0.30, "wood": 0.18, "lake": 0.10, "open": 0.04}),
    haze=((226, 210, 184), 0.18),
    elevation=(42.0, 68.0),
    gain=(0.98, 1.2),
)

_TROPICAL = Region(
    land=(Cover((70, 112, 44), (122, 146, 68), patch=0.25, grain=0.1), FIELD),
    open=(
        Cover((146, 74, 46), (188, 112, 76), patch=0.25, grain=0.06),
        Cover((164, 92, 56), (204, 138, 94), patch=0.25, grain=0.06),
        Cover((124, 74, 54), (168, 118, 92), patch=0.25, grain=0.07),
    ),
    yard=(
        Cover((158, 92, 62), (198, 134, 98), patch=0.25, grain=0.06),
        Cover((136, 84, 62), (178, 126, 100), patch=0.25, grain=0.07),
        Cover((158, 132, 112), (194, 172, 150), patch=0.25, grain=0.05),
    ),
    lawn=(
        Cover((66, 116, 40), (116, 156, 66), patch=0.25, grain=0.08),
        Cover((88, 124, 44), (146, 160, 78), patch=0.25, grain=0.09),
    ),
    crops=(
        Cover((82, 140, 44), (132, 180, 72), patch=0.2, grain=0.04, rows=(1.4, 2.4), contrast=0.25),
        Cover((122, 160, 52), (172, 194, 84), patch=0.25, grain=0.04),
        Cover((44, 92, 36), (92, 136, 58), patch=0.15, grain=0.06, rows=(1.6, 2.6), contrast=0.7),
        Cover((52, 100, 40), (158, 88, 56), patch=0.15, grain=0.05, rows=(2.0, 3.4), contrast=0.75),
        Cover((138, 72, 48), (182, 108, 74), patch=0.2, grain=0.06, rows=(1.5, 2.6), contrast=0.6),
        Cover((84, 122, 60), (134, 156, 92), patch=0.4, grain=0.04),
        Cover((56, 112, 44), (112, 158, 72), patch=0.3, grain=0.12),
    ),
    crowns=(
        Cover((26, 66, 26), (70, 120, 46), patch=0.2, grain=0.1),
        Cover((36, 82, 30), (92, 142, 56), patch=0.2, grain=0.1),
        Cover((22, 56, 34), (58, 104, 58), patch=0.2, grain=0.1),
        Cover((66, 96, 32), (126, 150, 60), patch=0.2, grain=0.1),
    ),
    conifers=0.0,
    palms=0.35,
    orchards=0.45,
    crown=(4.0, 12.0),
    shrub=(1.8, 4.0),
    undergrowth=Cover((24, 50, 22), (50, 82, 36), patch=0.2, grain=0.1),
    roofs=(
        Cover((116, 64, 44), (164, 106, 80), patch=0.35, rows=(1.4, 2.4), contrast=0.35),
        Cover((122, 82, 64), (176, 160, 146), patch=0.45, rows=(1.4, 2.4), contrast=0.35),
        Cover((164, 166, 164), (206, 208, 206), patch=0.2, rows=(1.4, 2.4), contrast=0.3),
        Cover((66, 104, 146), (104, 140, 176), patch=0.15, rows=(1.4, 2.4), contrast=0.25),
        Cover((164, 78, 48), (198, 110, 76)),
        Cover((216, 214, 206), (240, 238, 232)),
        Cover((228, 226, 220), (246, 246, 242), patch=0.1, rows=(1.4, 2.4), contrast=0.2),
    ),
    flat_roofs=0.2,
    house=(8.5, 14.0),
    house_width=(7.0, 10.0),
    lot=(11.0, 16.0),
    asphalt=(
        Cover((118, 100, 90), (142, 122, 110), patch=0.3),
        Cover((86, 84, 84), (110, 106, 104), patch=0.3),
    ),
    track=(
        Cover((158, 88, 56), (198, 126, 88), patch=0.25, grain=0.07),
        Cover((172, 108, 74), (208, 148, 110), patch=0.25, grain=0.06),
    ),
    tracks=0.75,
    dirt_streets=0.7,
    water=(
        Cover((110, 90, 62), (146, 122, 88), patch=0.08, grain=0.02),
        Cover((142, 118, 88), (172, 146, 112), patch=0.08, grain=0.02),
        Cover((54, 68, 44), (92, 100, 68), patch=0.08, grain=0.02),
        Cover((122, 124, 110), (152, 146, 126), patch=0.08, grain=0.02),
    ),
    pool=Cover((70, 162, 176), (126, 202, 206)),
    pools=0.02,
    lawns=0.4,
    garden_trees=3.0,
    pivots=0.0,
    hedges=0.25,
    rivers=0.35,
    uses=MappingProxyType({"houses": 0.42, "farm": 0.22, "wood": 0.18, "ponds": 0.09, "lake": 0.04, "open": 0.05}),
    haze=((214, 214, 200), 0.3),
    elevation=(46.0, 74.0),
    gain=(0.98, 1.22),
)

#: The looks a scene can have, by name.
REGIONS: Mapping[str, Region] = MappingProxyType({"temperate": _TEMPERATE, "arid": _ARID, "tropical": _TROPICAL})


#: Sloping roofs rise in steps of at most this height, which cast no shadow, in metres.
_STEP = 0.5
#: How a dry season (+1) moves the colours of each class, sRGB.
_DRY: tuple[Rgb, ...] = ((6, 5, 3), (16, 6, -8), (12, 4, -6), (0, 0, 0), (0, 0, 0), (4, 4, -2))
_CONIFER = Cover((26, 46, 34), (60, 82, 54), patch=0.2, grain=0.09)
_SHEET = Cover((148, 150, 152), (186, 188, 190), patch=0.08, grain=0.03, rows=(1.6, 2.6), contrast=0.3)
_PANEL = Cover((24, 32, 54), (44, 56, 84), patch=0.1, rows=(1.0, 1.1), contrast=0.4)
_GLASS: Rgb = (44, 50, 58)
_PAINT = Cover((196, 196, 190), (222, 222, 216), patch=0.1)
_CARS: tuple[Rgb, ...] = ((226, 226, 226), (40, 42, 46), (150, 154, 160), (150, 40, 36), (44, 66, 110), (96, 98, 102))

# Columns of a surface's row.
_PATCH, _GRAIN, _ROW_U, _ROW_V, _CONTRAST, _TRAM, _RELIEF, _SPACING, _LABEL = range(6, 15)


# --- Noise -----------------------------------------------------------------------------------------------------------

_NOISE_SIDE = 512


@lru_cache(maxsize=32)
def _noise_bank(octave: int, *, fractal: bool) -> Floats:
    """Isotropic noise that tiles, (512, 512), zero mean, unit variance.

    Args:
        octave: its wavelength is 2**octave pixels.
        fractal: whether finer octaves join, each at 0.6 of the amplitude of the one above.
    """
    rng = np.random.default_rng(octave)
    frequency = np.hypot(np.fft.rfftfreq(_NOISE_SIDE)[None, :], np.fft.fftfreq(_NOISE_SIDE)[:, None])
    frequency[0, 0] = 2.0**-20
    pitch = np.log2(frequency) + octave
    spectrum = np.exp(-0.5 * ((np.minimum(pitch, 0) if fractal else pitch) / 0.45) ** 2)
    if fractal:
        # An octave's power is spread over four times as many frequencies as that of the one above: 0.6 / 2 per octave.
        spectrum *= np.exp2(-1.75 * pitch)
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((_NOISE_SIDE, _NOISE_SIDE))) * spectrum)
    return np.asarray(noise / noise.std(), dtype=np.float32)


def _noise(rng: np.random.Generator, side: int, wavelength: float, *, fractal: bool = True) -> Floats:
    """A (side, side) piece of noise of about `wavelength` pixels; it fades out where that is below two pixels."""
    octave = min(max(round(math.log2(wavelength)), 1), 7)
    bank = _noise_bank(octave, fractal=fractal)
    y, x = (rng.random(2) * _NOISE_SIDE).astype(int)
    if side <= _NOISE_SIDE // 2:
        # A view into one of the quarters is free; only larger pieces need to wrap.
        piece = bank[y // 2 : y // 2 + side, x // 2 : x // 2 + side]
    else:
        around = np.arange(side)
        piece = bank[np.ix_((y + around) % _NOISE_SIDE, (x + around) % _NOISE_SIDE)]
    return piece * np.float32(min(wavelength / 2, 1.0))


# --- The plan, in metres ---------------------------------------------------------------------------------------------


class _Cell(NamedTuple):
    """A rectangle of the plan's frame, in metres: u0 < u1, v0 < v1."""

    u0: float
    u1: float
    v0: float
    v1: float

    @property
    def sides(self) -> tuple[float, float]:
        return self.u1 - self.u0, self.v1 - self.v0

    @property
    def longer(self) -> int:
        """The axis of the longer side."""
        return int(self.sides[1] > self.sides[0])

    @property
    def middle(self) -> tuple[float, float]:
        return (self.u0 + self.u1) / 2, (self.v0 + self.v1) / 2

    def at(self, axis: int, share: float) -> float:
        """The coordinate that far along a side."""
        return self[2 * axis] + (self[2 * axis + 1] - self[2 * axis]) * share

    def inset(self, margin: float) -> _Cell:
        return _Cell(self.u0 + margin, self.u1 - margin, self.v0 + margin, self.v1 - margin)

    def cut(self, axis: int, at: float, gap: float = 0.0) -> tuple[_Cell, _Cell]:
        """The parts below and above coordinate `at` of `axis`, with a gap between them."""
        low, high = at - gap / 2, at + gap / 2
        if axis == 0:
            return self._replace(u1=low), self._replace(u0=high)
        return self._replace(v1=low), self._replace(v0=high)


def _along(axis: int, a0: float, a1: float, b0: float, b1: float) -> _Cell:
    """The cell that spans a0..a1 along `axis` and b0..b1 across it, in whatever order."""
    a, b = (min(a0, a1), max(a0, a1)), (min(b0, b1), max(b0, b1))
    return _Cell(*a, *b) if axis == 0 else _Cell(*b, *a)


def _uv(axis: int, along: T, across: T) -> tuple[T, T]:
    """Coordinates (u, v) of what is given along and across `axis`."""
    return (along, across) if axis == 0 else (across, along)


@lru_cache(maxsize=8)
def _outline(points: int) -> tuple[Floats, Floats]:
    """The outline of the unit square, with that many points a side."""
    t, zero = np.arange(points) / points, np.zeros(points)
    return np.concatenate((t, zero + 1, 1 - t, zero)), np.concatenate((zero, t, zero + 1, 1 - t))


class _Place(NamedTuple):
    """A point of the scene, and the direction of something that stands there."""

    x: float
    y: float
    dx: float
    dy: float

    def polygon(self, *points: tuple[float, float]) -> Outline:
        """Scene coordinates of points given as (along, across)."""
        return [(self.x + a * self.dx - b * self.dy, self.y + a * self.dy + b * self.dx) for a, b in points]

    def box(self, a0: float, a1: float, b0: float, b1: float) -> Outline:
        return self.polygon((a0, b0), (a1, b0), (a1, b1), (a0, b1))


class _Frame:
    """The bent coordinates the plan is drawn in: straight lines of (u, v) become the gentle curves of real roads.

    Two shears and a rotation: invertible in closed form, and areas stay what they are.
    """

    def __init__(self, rng: np.random.Generator, extent: float) -> None:
        angle = rng.random() * 2 * math.pi
        self.cos, self.sin = math.cos(angle), math.sin(angle)
        reach = min(max(extent, 80.0), 600.0)
        self.shears = [self._shear(rng, reach), self._shear(rng, reach)]

    @staticmethod
    def _shear(rng: np.random.Generator, reach: float) -> list[tuple[float, float, float]]:
        """Two waves as (amplitude, wave number, phase), with slopes of at most 0.2 and 0.06."""
        long, short = reach * (1.6 + 1.4 * rng.random()), reach * (0.5 + 0.3 * rng.random())
        slopes = 0.2 * rng.random(), 0.06 * rng.random()
        return [
            (slope * length / (2 * math.pi), 2 * math.pi / length, rng.random() * 2 * math.pi)
            for slope, length in zip(slopes, (long, short), strict=True)
        ]

    def _bend(self, which: int, at: Any) -> Any:
        # Zero at zero, so that the plan's origin stays in the middle of the tile.
        (a0, k0, p0), (a1, k1, p1) = self.shears[which]
        offset = a0 * math.sin(p0) + a1 * math.sin(p1)
        return a0 * np.sin(k0 * at + p0) + a1 * np.sin(k1 * at + p1) - offset

    def to_scene(self, u: Floats, v: Floats) -> tuple[Floats, Floats]:
        """Metres right of and below the middle of the tile."""
        u = u + self._bend(0, v)
        v = v + self._bend(1, u)
        return self.cos * u - self.sin * v, self.sin * u + self.cos * v

    def heading(self, u: float, v: float, axis: int) -> _Place:
        """Where a point of the plan is in the scene, and which way its `axis` runs there."""
        (a0, k0, p0), (a1, k1, p1) = self.shears[0]
        u += float(self._bend(0, v))
        bent = a0 * k0 * math.cos(k0 * v + p0) + a1 * k1 * math.cos(k1 * v + p1)
        v += float(self._bend(1, u))
        (a0, k0, p0), (a1, k1, p1) = self.shears[1]
        du, dv = (1.0, 0.0) if axis == 0 else (bent, 1.0)
        dv += du * (a0 * k0 * math.cos(k0 * u + p0) + a1 * k1 * math.cos(k1 * u + p1))
        norm = math.hypot(du, dv)
        du, dv = du / norm, dv / norm
        cos, sin = self.cos, self.sin
        return _Place(cos * u - sin * v, sin * u + cos * v, cos * du - sin * dv, sin * du + cos * dv)

    def to_plan(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """Inverse of `to_scene`."""
        u, v = self.cos * x + self.sin * y, self.cos * y - self.sin * x
        v = v - self._bend(1, u)
        return u - self._bend(0, v), v


class _Solid(NamedTuple):
    """A polygon of the scene, in metres; None leaves the surface or the height as it is."""

    outline: Outline
    surface: int | None
    height: float | None


class _Grove(NamedTuple):
    """Places (u, v) of plants that have something in common."""

    u: Floats
    v: Floats
    crown: tuple[float, float]
    needles: float
    palms: float
    only_floor: bool


class _Plan:
    """Everything there is in one scene, in metres, independent of the pixels it will be drawn with.

    Attributes:
        table: one row per surface: its two colours, then the columns named above.
        ground: cells of land, later ones on top.
        lanes: cells of each minor road; a road is listed before those that end at it.
        shapes: closed outlines (u, v) of water and whatever else is no cell, above the lanes.
        highways: cells of main roads, which bridge the water.
        solids: what stands on the ground.
        trees: rows of x, y, diameter, height, surface, kind, and whether it grows on forest floor only.
        pivots: middle (u, v), radius and first surface of the fields irrigated in circles.
    """

    def __init__(self, rng: np.random.Generator, region: Region, extent: float) -> None:
        self.rng, self.region, self.extent = rng, region, extent
        self.frame = _Frame(rng, extent)
        # What is further from the origin than any point of the tile is not built.
        edge = [extent * (side - 0.5) for side in _outline(8)]
        self.reach = float(np.hypot(*self.frame.to_plan(*edge)).max()) + 0.01 * extent + 4.0
        # Cars, markings and the like would be lost in a larger scene.
        self.detailed = extent < 500.0
        self.block = min(max(extent * self.between(1.0, 1.5), 60.0), 260.0)
        self.parcel = min(max(extent * self.between(0.35, 0.7), 26.0), 130.0)
        self.sun = self.between(0.0, 2 * math.pi), math.radians(self.between(*region.elevation))
        self.season = self.between(-1.0, 1.0)
        self.uses = dict(region.uses)

        self.table: list[tuple[float, ...]] = []
        self.ground: list[tuple[_Cell, int]] = []
        self.lanes: list[list[tuple[_Cell, int]]] = []
        self.shapes: list[tuple[Floats, Floats, int]] = []
        self.highways: list[list[tuple[_Cell, int]]] = []
        self.solids: list[_Solid] = []
        self.pivots: list[tuple[float, float, float, int]] = []
        self.groves: list[_Grove] = []

        land, label = region.land
        self.surface(label, land, skew=self.between(0, math.pi))
        self.soil, self.water = self.pick(region.open), self.pick(region.water)
        self.roofs = [self.pick(region.roofs) for _ in range(3)]
        self.paved = [self.surface(ROAD, self.pick(region.asphalt)) for _ in range(2)]
        self.paint = self.surface(ROAD, _PAINT)
        self.cars = [self.surface(ROAD, Cover(color, color, patch=0.0)) for color in (_GLASS, *_CARS)]
        self.lay_out()
        self.trees = self.grow()

    # Chance

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, options: tuple[Cover, ...]) -> Cover:
        return options[int(self.rng.random() * len(options))]

    # Surfaces

    def surface(
        self, label: int, cover: Cover, *, tone: float = 1.0, axis: int = 0, skew: float = 0.0, relief: float = 0.0
    ) -> int:
        """Register one instance of a cover, with a colour of its own, and return its number.

        Args:
            label: its class.
            cover: its look.
            tone: brightness of this instance.
            axis: the axis of the frame that its rows run along.
            skew: angle between rows and that axis, radians.
            relief: how much the slope of the height map shades it.
        """
        tone *= self.between(0.94, 1.06)
        shift = [self.between(-4.0, 4.0) + dry * self.season for dry in _DRY[label]]
        colors = [max(c * tone + shift[i], 4.0) for color in (cover.dark, cover.light) for i, c in enumerate(color)]
        spacing = self.between(*cover.rows)
        wave = 2 * math.pi / spacing if spacing else 0.0
        angle = skew + (math.pi / 2 if axis == 0 else 0.0)
        tramline = spacing / self.between(12.0, 24.0) if cover.tramlines else 0.0
        row = (*colors, cover.patch, cover.grain, wave * math.cos(angle), wave * math.sin(angle), cover.contrast)
        self.table.append((*row, tramline, relief, spacing, float(label)))
        return len(self.table) - 1

    def shaded(self, surface: int, factor: float) -> int:
        """A surface that differs from another in brightness alone."""
        row = self.table[surface]
        self.table.append((*(c * factor for c in row[:6]), *row[6:]))
        return len(self.table) - 1

    # The lie of the land

    def lay_out(self) -> None:
        extent, far = self.extent, self.reach + 0.5 * self.block
        cells = [_Cell(*(side * far * self.between(1.0, 1.3) for side in (-1, 1, -1, 1)))]
        if self.chance(0.7):
            cells = self.road(cells[0], 0, 0.35 * extent * self.between(-1, 1), main=True)
        if self.chance(self.region.rivers):
            if self.chance(0.65):
                # Across the main road, which gets a bridge.
                cells = self.river(cells, 1, 0.35 * extent * self.between(-1, 1))
            else:
                last = cells.pop()
                cells += self.river([last], 0, max(last.u0, -0.5 * extent) + extent * self.between(0.15, 0.5))
        for cell in cells:
            self.divide(cell)

    def outside(self, cell: _Cell) -> bool:
        return math.hypot(max(cell.u0, -cell.u1, 0.0), max(cell.v0, -cell.v1, 0.0)) > self.reach

    def divide(self, cell: _Cell) -> None:
        """Cut a cell by minor roads until it is a block, and give the block a use."""
        if self.outside(cell):
            return
        axis = cell.longer
        if cell.sides[axis] > self.block:
            for part in self.road(cell, axis, cell.at(axis, self.between(0.36, 0.64))):
                self.divide(part)
            return
        upto = list(accumulate(self.uses.values()))
        use = list(self.uses)[bisect(upto, self.rng.random() * upto[-1], hi=len(upto) - 1)]
        # What is there already becomes rarer, so that small scenes stay mixed.
        self.uses[use] *= 0.6
        build = {
            "houses": self.houses,
            "farm": self.farm,
            "wood": self.wood,
            "lake": self.lake,
            "ponds": self.ponds,
            "open": self.open,
        }
        build[use](cell)

    def road(self, cell: _Cell, axis: int, at: float, *, main: bool = False, street: bool = False) -> list[_Cell]:
        """Cut a cell by a road at coordinate `at` of `axis`, and return both sides."""
        dirt = 0.0 if main else self.region.dirt_streets if street else self.region.tracks
        track = dirt > 0 and self.chance(dirt)
        width = self.between(6.5, 9.5) if main else self.between(3.6, 4.6) if track else self.between(4.6, 6.2)
        verge = self.between(1.2, 2.5) if main or street else self.between(0.8, 1.8)
        paved, worn, edged = self.chance(0.5), self.between(0.9, 1.1), self.chance(0.35)
        run, half = 1 - axis, width / 2
        # As far as the middle of the verge of the road this one meets, or to the edge of the scene.
        low, high = max(cell[2 * run] - 3.5, -self.reach), min(cell[2 * run + 1] + 3.5, self.reach)
        if low < high and abs(at) < self.reach:
            layer: list[tuple[_Cell, int]] = []
            (self.highways if main else self.lanes).append(layer)

            def strip(w0: float, w1: float, surface: int, l0: float = low, l1: float = high) -> None:
                layer.append((_along(run, l0, l1, at + w0, at + w1), surface))

            if main or street or paved:
                pavement = self.region.yard if (main or street) and paved else (self.soil,)
                side = self.surface(BARE, self.pick(pavement))
                self.ground.append((_along(run, low, high, at - half - verge, at + half + verge), side))
            if track:
                rut = self.surface(ROAD, self.pick(self.region.track))
                strip(-half, half, self.shaded(rut, 1.08))
                for lane in (-0.9, 0.9):
                    strip(lane - 0.3, lane + 0.3, self.shaded(rut, 0.88))
            else:
                surface = self.paved[main]
                strip(-half, half, surface)
                tyres = self.shaded(surface, worn)
                for lane in (-half / 2 - 0.75, -half / 2 + 0.75, half / 2 - 0.75, half / 2 + 0.75):
                    strip(lane - 0.35, lane + 0.35, tyres)
                if self.detailed:
                    if main or edged:
                        for dash in np.arange(low + self.between(0, 7), high, 7.5).tolist():
                            strip(-0.09, 0.09, self.paint, dash, dash + 3.0)
                    if main:
                        for edge in (0.35 - half, half - 0.35):
                            strip(edge - 0.08, edge + 0.08, self.paint)
            if edged and (main or street):
                self.row_of_trees(run, at + half + verge + 1.0, low, high, self.between(9.0, 15.0), (4.0, 6.5))
            if self.detailed and not track:
                here, gap = low + 6.0 + self.between(0, 50), (14, 60) if main else (40, 130)
                while here < high - 6.0:
                    self.car(*_uv(run, here, at + half / 2 * (1 if self.chance(0.5) else -1)), run)
                    here += self.between(*gap)
        return list(cell.cut(axis, at, width + 2 * verge))

    def river(self, cells: list[_Cell], axis: int, at: float) -> list[_Cell]:
        """Cut cells by a river along coordinate `at` of `axis`, and return what is left of them."""
        half = min(max(self.extent * self.between(0.06, 0.13), 3.5), 30.0)
        bank, bend, phase = self.between(0.8, 3.0), half * self.between(0.2, 0.8), self.between(0, 7)
        wave = 2 * math.pi / (half * self.between(9, 16))
        along = np.linspace(-self.reach - 10, self.reach + 10, 72)
        middle = at + bend * np.sin(wave * along + phase) * np.cos(0.37 * wave * along + 2 * phase)
        widths = half * (1 + 0.18 * np.sin(1.7 * wave * along + phase) + 0.1 * np.sin(3.9 * wave * along))
        shore, water = self.surface(BARE, self.soil, tone=0.95), self.surface(WATER, self.water)
        for more, surface in ((bank, shore), (0.0, water)):
            outline = np.concatenate((middle - widths - more, (middle + widths + more)[::-1]))
            self.shapes.append((*_uv(1 - axis, np.concatenate((along, along[::-1])), outline), surface))
        for side in (-1, 1):
            if self.chance(0.6):
                count = int(2 * self.reach / self.between(4.0, 9.0))
                a = self.reach * (2 * self.rng.random(count) - 1)
                b = np.interp(a, along, middle + side * widths) + side * (bank + 3.0 * self.rng.random(count))
                self.plant(*_uv(1 - axis, a, b), self.region.crown)
        gap = 2 * (1.25 * half + 0.6 * bend + bank)
        return [part for cell in cells for part in cell.cut(axis, at, gap)]

    # What a block becomes

    def open(self, cell: _Cell) -> None:
        """Bare ground with patches of other ground and of grass."""
        region = self.region
        self.ground.append((cell, self.surface(BARE, self.pick(region.open), skew=self.between(0, math.pi))))
        for _ in range(int(self.between(1, 4))):
            bare = self.chance(0.6)
            cover = self.pick(region.open if bare else region.lawn)
            self.shapes.append((*self.blob(self.part(cell, 0.25, 0.7)), self.surface(BARE if bare else FIELD, cover)))
        self.scatter(cell, self.between(0.5, 4.0), region.shrub)
        if self.detailed and self.chance(0.35):
            u, v = self.part(cell, 0.1, 0.2).middle
            for i in range(int(self.between(2, 7))):
                self.car(u + 3.0 * i, v, 1)

    def lake(self, cell: _Cell) -> None:
        region = self.region
        self.meadow(cell)
        if min(cell.sides) < 18:
            self.scatter(cell, 3.0, region.crown)
            return
        u, v = self.blob(cell.inset(2.0))
        cu, cv = cell.middle
        shore = 1 + self.between(1.0, 4.0) / (0.5 * min(cell.sides))
        if self.chance(0.7):
            sand = self.surface(BARE, self.soil, tone=0.96)
            self.shapes.append((cu + (u - cu) * shore, cv + (v - cv) * shore, sand))
        self.shapes.append((u, v, self.surface(WATER, self.water)))
        if self.chance(0.25):
            off = 0.15 * cell.sides[0] * self.between(-1, 1), 0.15 * cell.sides[1] * self.between(-1, 1)
            island = self.surface(FIELD, self.pick(region.lawn))
            self.shapes.append((cu + off[0] + (u - cu) * 0.2, cv + off[1] + (v - cv) * 0.2, island))
        count = int(self.between(0.1, 0.35) * sum(cell.sides))
        spot, away = (self.rng.random(count) * len(u)).astype(int), 1.04 + 0.3 * self.rng.random(count)
        self.plant(cu + (u[spot] - cu) * away, cv + (v[spot] - cv) * away, region.crown)

    def meadow(self, cell: _Cell) -> None:
        """What the land is where nobody ploughs: grass, or soil."""
        label = self.region.land[1]
        cover = self.pick(self.region.lawn) if label == FIELD else self.soil
        self.ground.append((cell, self.surface(label, cover)))

    def ponds(self, cell: _Cell) -> None:
        """Fish ponds and paddies between dikes."""
        self.ground.append((cell, self.surface(BARE, self.soil)))
        self.basins(cell.inset(1.5))
        self.scatter(cell, 2.0, self.region.crown)

    def basins(self, cell: _Cell) -> None:
        if self.outside(cell) or min(cell.sides) < 2:
            return
        axis = cell.longer
        if cell.sides[axis] > 0.65 * self.parcel:
            for part in cell.cut(axis, cell.at(axis, self.between(0.35, 0.65)), self.between(1.2, 2.8)):
                self.basins(part)
            return
        pond = self.chance(0.6)
        cover = self.pick(self.region.water if pond else self.region.crops)
        self.ground.append((cell, self.surface(WATER if pond else FIELD, cover, axis=axis)))

    def wood(self, cell: _Cell) -> None:
        region = self.region
        self.meadow(cell)
        mean = sum(region.crown) / 2
        if region.orchards == 1 or self.chance(region.orchards):
            self.orchard(cell.inset(2.0), mean * self.between(0.95, 1.25), mean * 0.95)
            return
        cell = cell.inset(self.between(0.5, 2.5))
        self.ground.append((cell, self.surface(TREE, region.undergrowth, relief=0.3)))
        if self.chance(0.4):
            self.shapes.append((*self.blob(self.part(cell, 0.2, 0.5)), self.surface(FIELD, self.pick(region.lawn))))
        places = self.grid(cell, mean * self.between(0.62, 0.75), jitter=0.45)
        self.plant(*places, region.crown, needles=region.conifers * 2 * self.rng.random(), only_floor=True)

    def farm(self, cell: _Cell) -> None:
        if self.chance(self.region.pivots) and min(cell.sides) > 24:
            self.ground.append((cell, self.surface(BARE, self.soil, skew=self.between(0, 3))))
            self.pivot(*cell.middle, min(cell.sides) / 2 - 1.5)
            return
        if min(cell.sides) > 44 and self.chance(0.4):
            axis = cell.longer
            end, cell = cell.cut(axis, cell[2 * axis] + self.between(26, 34), 1.0)
            yard, rest = end.cut(1 - axis, end[2 - 2 * axis] + self.between(28, 38), 1.0)
            self.farmyard(yard)
            self.parcels(rest)
        self.parcels(cell)

    def parcels(self, cell: _Cell) -> None:
        if self.outside(cell) or min(cell.sides) < 1:
            return
        axis = cell.longer
        if cell.sides[axis] > self.parcel:
            at = cell.at(axis, self.between(0.35, 0.65))
            if self.chance(self.region.hedges):
                self.hedge(1 - axis, at, cell[2 - 2 * axis], cell[3 - 2 * axis])
            for part in cell.cut(axis, at, self.between(0.6, 2.0)):
                self.parcels(part)
        elif self.chance(0.14):
            self.ground.append((cell, self.surface(FIELD, self.pick(self.region.lawn))))
            self.orchard(cell.inset(2.5), self.between(5.0, 7.0), self.between(3.4, 4.8))
        else:
            skew = self.between(-0.2, 0.2) if self.chance(0.3) else 0.0
            self.ground.append((cell, self.surface(FIELD, self.pick(self.region.crops), axis=axis, skew=skew)))
            if self.chance(0.15):
                self.scatter(cell.inset(3.0), 0.5, self.region.crown)

    def pivot(self, cu: float, cv: float, radius: float) -> None:
        """A field irrigated by an arm that turns about its middle; sectors carry different crops."""
        self.pivots.append((cu, cv, radius, len(self.table)))
        start, sectors = self.between(0, 2 * math.pi), int(self.between(1, 4))
        for sector in range(sectors):
            turn = start + (np.linspace(0.0, 1.0, 97) + sector) * 2 * math.pi / sectors
            u, v = (np.append(middle + radius * wave(turn), middle) for middle, wave in ((cu, np.cos), (cv, np.sin)))
            outline = (u, v) if sectors > 1 else (u[:-1], v[:-1])
            self.shapes.append((*outline, self.surface(FIELD, self.pick(self.region.crops), axis=1)))
        cos, sin = math.cos(start), math.sin(start)
        a, b = np.array([0.0, radius, radius, 0.0]), np.array([-0.3, -0.3, 0.3, 0.3])
        self.shapes.append((cu + a * cos - b * sin, cv + a * sin + b * cos, self.surface(FIELD, _PAINT, tone=0.9)))

    def farmyard(self, cell: _Cell) -> None:
        self.ground.append((cell, self.surface(BARE, self.pick(self.region.yard))))
        axis = cell.longer
        long, wide = cell.sides[axis], cell.sides[1 - axis]
        for side, cover, share in ((-1, _SHEET, self.between(0.6, 0.85)), (1, self.pick(self.region.roofs), 0.5)):
            place = _uv(axis, cell.middle[axis], cell.middle[1 - axis] + side * 0.24 * wide)
            self.house(*place, axis, long * share, wide * 0.34, cover, flat=False if side < 0 else None)
        self.scatter(cell, 3.0, self.region.crown)

    def houses(self, cell: _Cell) -> None:
        """Lots along streets; a large block is cut by streets first."""
        if self.outside(cell):
            return
        axis = cell.longer
        if min(cell.sides) > 74 or max(cell.sides) > 150:
            for part in self.road(cell, axis, cell.at(axis, self.between(0.4, 0.6)), street=True):
                self.houses(part)
            return
        if self.chance(0.12) and min(cell.sides) > 24:
            self.works(cell)
            return
        self.ground.append((cell, self.surface(*self.garden())))
        depth = cell.sides[1 - axis]
        rows = 2 if depth > 34 else 1
        for row in range(rows):
            front, inward = cell[2 - 2 * axis + row], 1 - 2 * row
            here, end = cell[2 * axis], cell[2 * axis + 1]
            while end - here > 9.0:
                width = self.between(*self.region.lot)
                if end - here - width < 9.0:
                    width = end - here
                self.lot(axis, here, here + width, front, inward, min(depth / rows, 34.0))
                here += width

    def garden(self) -> tuple[int, Cover]:
        if self.chance(self.region.lawns):
            return FIELD, self.pick(self.region.lawn)
        return BARE, self.pick(self.region.yard)

    def lot(self, axis: int, start: float, stop: float, front: float, inward: int, depth: float) -> None:
        """A house and its garden, from start to stop along `axis` and `depth` metres from the street inwards."""
        region = self.region
        whole = _along(axis, start, stop, front, front + inward * depth)
        if self.outside(whole):
            return
        self.ground.append((whole.inset(0.25), self.surface(*self.garden())))
        setback, width = self.between(2.5, 6.5), stop - start
        long = min(self.between(*region.house), width - 2.5)
        wide = min(self.between(*region.house_width), depth - setback - 2.0, long)
        if wide < 5.0 or self.chance(0.05):
            self.scatter(whole.inset(2.0), 3.0, region.crown)
            return
        middle = (start + stop) / 2 + ((width - long) / 2 - 0.8) * self.between(-1, 1)
        centre = front + inward * (setback + wide / 2)
        drive = start + 2.1 if middle > (start + stop) / 2 else stop - 2.1
        paving = self.surface(BARE, self.pick(region.yard))
        door = front + inward * (setback + wide * 0.8)
        self.ground.append((_along(axis, drive - 1.6, drive + 1.6, front, door), paving))
        back = front + inward * (setback + wide)
        if self.chance(0.6):
            self.ground.append(
                (_along(axis, middle - long * 0.4, middle + long * 0.4, back, back + inward * 3), paving)
            )
        cover = self.roofs[int(self.rng.random() * 3)] if self.chance(0.8) else self.pick(region.roofs)
        turned = self.chance(0.25) and long < depth - setback - 2
        self.house(*_uv(axis, middle, centre), axis, *((wide, long) if turned else (long, wide)), cover)
        if self.detailed and self.chance(0.5):
            self.car(*_uv(axis, drive, front + inward * 3.0), 1 - axis)
        if depth - setback - wide > 9.0:
            if self.chance(region.pools):
                at = self.between(start + 2.0, stop - 8.0)
                pool = _along(axis, at, at + self.between(5, 7), back + inward * 3.2, back + inward * 6.8)
                self.ground += (pool.inset(-0.8), paving), (pool, self.surface(WATER, region.pool))
            elif self.detailed and self.chance(0.45):
                at = start + 3.0 if self.chance(0.5) else stop - 3.0
                where, shed = _uv(axis, at, front + inward * (depth - 2.8)), self.pick(region.roofs)
                self.house(*where, axis, self.between(3.0, 4.5), self.between(2.5, 3.5), shed)
        self.scatter(whole.inset(1.5), region.garden_trees, region.crown)
        if self.detailed and self.chance(0.4):
            self.hedge(1 - axis, start, *sorted((front, front + inward * depth)))

    def works(self, cell: _Cell) -> None:
        """Large halls on a paved yard."""
        self.ground.append((cell, self.surface(BARE, self.pick(self.region.yard))))
        axis, inner = cell.longer, cell.inset(4.0)
        halls = inner.cut(axis, inner.at(axis, self.between(0.4, 0.6)), 8.0) if max(inner.sides) > 50 else (inner,)
        for hall in halls:
            long, wide = (min(side, 60.0) * self.between(0.6, 0.9) for side in hall.sides)
            cover = _SHEET if self.chance(0.6) else self.pick(self.region.roofs)
            self.house(*hall.middle, 0, long, wide, cover, flat=True, eaves=self.between(6, 10))
        self.scatter(cell, 2.0, self.region.crown)

    # Things

    def part(self, cell: _Cell, smallest: float, largest: float) -> _Cell:
        """A part somewhere in a cell; each side is this share of the cell's."""
        (su, sv), (fu, fv) = cell.sides, (self.between(smallest, largest), self.between(smallest, largest))
        u, v = cell.u0 + su * (1 - fu) * self.rng.random(), cell.v0 + sv * (1 - fv) * self.rng.random()
        return _Cell(u, u + su * fu, v, v + sv * fv)

    def blob(self, cell: _Cell) -> tuple[Floats, Floats]:
        """A smooth closed outline that fills most of a cell."""
        turn = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        radius = np.ones_like(turn)
        for wave in (2, 3, 4, 5, 7):
            radius += 0.32 / wave * self.between(-1, 1) * np.sin(wave * turn + self.between(0, 7))
        # Between an ellipse and a rectangle.
        radius /= radius.max() * (np.abs(np.cos(turn)) ** 3 + np.abs(np.sin(turn)) ** 3) ** (1 / 3)
        (cu, cv), (su, sv) = cell.middle, cell.sides
        return cu + su / 2 * radius * np.cos(turn), cv + sv / 2 * radius * np.sin(turn)

    def car(self, u: float, v: float, axis: int) -> None:
        glass, *colors = self.cars
        place, body = self.frame.heading(u, v, axis), colors[int(self.rng.random() * len(colors))]
        self.solids.append(_Solid(place.box(-2.2, 2.2, -0.9, 0.9), body, 1.3))
        self.solids.append(_Solid(place.box(0.4, 1.0, -0.75, 0.75), glass, None))
        self.solids.append(_Solid(place.box(-1.7, -1.3, -0.75, 0.75), glass, None))

    def house(
        self,
        u: float,
        v: float,
        axis: int,
        long: float,
        wide: float,
        cover: Cover,
        *,
        flat: bool | None = None,
        eaves: float | None = None,
    ) -> None:
        """A building centred on (u, v), `long` metres along `axis` and `wide` across; the roof follows the longer."""
        if math.hypot(u, v) > self.reach + max(long, wide):
            return
        if long < wide:
            axis, long, wide = 1 - axis, wide, long
        place, a, b = self.frame.heading(u, v, axis), long / 2, wide / 2
        shed, tone = long < 6, self.between(0.88, 1.1)
        flat = self.chance(self.region.flat_roofs) if flat is None else flat
        eaves = eaves or (2.4 if shed else self.between(3.2, 6.5))

        def add(outline: Outline, brightness: float, height: float | None, look: Cover = cover) -> None:
            surface = self.surface(BUILDING, look, tone=tone * brightness, axis=1 - axis)
            self.solids.append(_Solid(outline, surface, height))

        if flat:
            add(place.box(-a, a, -b, b), 1.05, eaves + 0.5)
            add(place.box(0.45 - a, a - 0.45, 0.45 - b, b - 0.45), 0.94, eaves)
            if shed or not self.detailed:
                return
            if wide > 7 and self.chance(0.5):
                side, start = (1 if self.chance(0.5) else -1), self.between(1 - a, a - 4)
                add(place.box(start, start + 3.0, side * (b - 1.0), side * (b - 4.0)), 1.0, eaves + 2.6)
            for _ in range(int(self.between(0, 2 + long * wide / 90))):
                s, x, y = self.between(0.7, 1.6), self.between(1 - a, a - 2), self.between(1 - b, b - 2)
                add(place.box(x, x + s, y, y + s), self.between(0.75, 1.05), eaves + 1.2)
            return
        metal = cover.contrast > 0
        slope = math.radians(self.between(14, 20) if metal else self.between(28, 42))
        rise = b * math.tan(slope)
        hip = 0.0 if metal or self.chance(0.65) else min(b, 0.8 * a)
        ridge = a - hip
        for side in (1, -1):
            lit = self.sunlit(place, side, slope)
            add(place.polygon((-a, side * b), (a, side * b), (ridge, 0), (-ridge, 0)), lit, eaves)
        for end in (1, -1) if hip else ():
            lit = self.sunlit(place, 1 - end, slope)
            add(place.polygon((end * a, -b), (end * a, b), (end * ridge, 0)), lit, eaves)
        steps = math.ceil(rise / _STEP)
        for share in (step / steps for step in range(1, steps)):
            x, y = a - share * hip, b * (1 - share)
            self.solids.append(_Solid(place.box(-x, x, -y, y), None, eaves + rise * share))
        add(place.box(-ridge, ridge, -0.13, 0.13), 1.12, None)
        if shed or metal or not self.detailed:
            return
        if self.chance(0.7):
            x, y = self.between(-0.6 * a, 0.6 * a), self.between(-0.5 * b, 0.5 * b)
            add(place.box(x, x + 0.9, y, y + 0.9), 0.7, eaves + rise + 1.0)
        if self.chance(0.15):
            side, x = (1 if self.chance(0.5) else -1), 0.6 * a - 0.4 * hip
            add(place.box(-x, x, side * b * 0.3, side * b * 0.75), 1.0, None, _PANEL)

    def sunlit(self, place: _Place, turn: int, slope: float) -> float:
        """Brightness against level ground of a roof that falls towards quarter turn `turn` of the place's axis."""
        azimuth, elevation = self.sun
        facing = math.atan2(place.dy, place.dx) + turn * math.pi / 2 - azimuth
        beam = math.cos(slope) * math.sin(elevation) + math.sin(slope) * math.cos(elevation) * math.cos(facing)
        return (0.35 + 0.8 * max(beam, 0.0)) / (0.35 + 0.8 * math.sin(elevation))

    # Plants

    def plant(
        self,
        u: Floats,
        v: Floats,
        crown: tuple[float, float],
        *,
        needles: float = 0.0,
        palms: float | None = None,
        only_floor: bool = False,
    ) -> None:
        """Trees at these places.

        Args:
            u: places along the first axis of the frame, in metres.
            v: the same along the second.
            crown: range of the crown diameter.
            needles: share of conifers.
            palms: share of palms; None for that of the region.
            only_floor: keep them on forest floor.
        """
        self.groves.append(_Grove(u, v, crown, needles, self.region.palms if palms is None else palms, only_floor))

    def scatter(self, cell: _Cell, mean: float, crown: tuple[float, float]) -> None:
        """A few plants anywhere in a cell: `mean` of them on a lot of 500 m², more on larger ground."""
        if self.outside(cell):
            return
        (su, sv) = cell.sides
        count = int(mean * 2 * self.rng.random() * max(su * sv / 500.0, 1.0) ** 0.7 + 0.5)
        u, v = cell.u0 + su * self.rng.random(count), cell.v0 + sv * self.rng.random(count)
        self.plant(u, v, crown, needles=0.5 * self.region.conifers)

    def grid(self, cell: _Cell, spacing: float, jitter: float) -> tuple[Floats, Floats]:
        """Places on a grid, every other row offset where `jitter`, the largest shift per spacing, is large."""
        low = [max(c, -self.reach) for c in (cell.u0, cell.v0)]
        high = [min(c, self.reach) for c in (cell.u1, cell.v1)]
        u, v = np.meshgrid(np.arange(low[0], high[0], spacing), np.arange(low[1], high[1], spacing * 0.9))
        if jitter > 0.2:
            u[1::2] += spacing / 2
        shift = spacing * jitter * (2 * self.rng.random((2, u.size)) - 1)
        return u.ravel() + shift[0], v.ravel() + shift[1]

    def orchard(self, cell: _Cell, spacing: float, diameter: float) -> None:
        if self.region.palms:
            label, covers = (FIELD, self.region.lawn) if self.chance(0.5) else (BARE, self.region.open)
            self.ground.append((cell, self.surface(label, self.pick(covers))))
        self.plant(
            *self.grid(cell, spacing, jitter=0.06),
            (diameter * 0.85, diameter * 1.15),
            palms=math.ceil(self.region.palms),
        )

    def row_of_trees(
        self, axis: int, at: float, low: float, high: float, spacing: float, crown: tuple[float, float]
    ) -> None:
        along = np.arange(max(low, -self.reach), min(high, self.reach), spacing)
        across = at + 0.25 * crown[0] * (self.rng.random(len(along)) - 0.5)
        self.plant(*_uv(axis, along + 0.2 * spacing * self.rng.random(len(along)), across), crown)

    def hedge(self, axis: int, at: float, low: float, high: float) -> None:
        """Shrubs along a border, and now and then a tree."""
        if abs(at) < self.reach:
            self.row_of_trees(axis, at, low, high, self.between(1.5, 2.6), (1.8, 3.0))
            self.row_of_trees(axis, at, low, high, self.between(15, 30), self.region.crown)

    def grow(self) -> Floats:
        """All plants of the scene, as rows of `trees`."""
        region = self.region
        crowns = [
            self.surface(TREE, cover, tone=self.between(0.85, 1.15), relief=1.0)
            for cover in (*(self.pick(region.crowns) for _ in range(6)), _CONIFER, _CONIFER)
        ]
        sizes = [len(grove.u) for grove in self.groves]
        chance = self.rng.random((3, sum(sizes)))
        u = np.concatenate([np.empty(0), *(grove.u for grove in self.groves)])
        v = np.concatenate([np.empty(0), *(grove.v for grove in self.groves)])
        shared = [(*grove.crown, grove.needles, grove.palms, grove.only_floor) for grove in self.groves]
        low, high, needles, palms, only_floor = np.repeat(np.array(shared).reshape(-1, 5), sizes, axis=0).T
        conifer = chance[1] < needles
        kind = np.where(conifer, 1, np.where((chance[1] >= 1 - palms) & (low > 3.0), 2, 0))
        diameter = (low + (high - low) * chance[0] ** 1.3) * np.where(conifer, 0.75, 1.0)
        height = diameter * np.array([0.85, 1.8, 0.9])[kind] + np.where(diameter > 3, 1.5, 0.2)
        surface = np.take(crowns, np.where(conifer, 6 + 2 * chance[2], 6 * chance[2]).astype(int))
        return np.stack((*self.frame.to_scene(u, v), diameter, height, surface, kind, only_floor), axis=1)


# --- The drawing, in pixels ------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _crown(kind: int, diameter: int, variant: int) -> Floats:
    """Heights of one crown seen from above, (d, d), 0 outside, up to 1."""
    rng = np.random.default_rng((kind, variant))
    phases = rng.random(6) * 2 * math.pi
    at = (np.arange(diameter) + 0.5) / diameter * 2 - 1
    x, y = at[None, :] + 0.0 * at[:, None], at[:, None] + 0.0 * at[None, :]
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    if kind == 2:
        fronds = 8 + variant % 3
        reach = 0.62 + 0.36 * np.cos(fronds * angle + 1.2 * radius + phases[0]) + 0.08 * np.cos(2 * angle + phases[1])
        profile = 1 - 0.55 * radius
    elif kind == 1:
        reach = 0.88 + 0.1 * np.cos(9 * angle + phases[0]) + 0.06 * np.cos(4 * angle + phases[1])
        profile = 1 - 0.8 * radius / reach
    else:
        reach = 0.84 + sum(0.16 / k * np.cos(k * angle + phases[k]) for k in (2, 3, 5))
        profile = np.sqrt(np.clip(1 - 0.85 * (radius / reach) ** 2, 0, 1))
        # Branches: lumps on the dome.
        lumps = np.sin(5.2 * x + phases[0] + 2 * y) * np.sin(5.6 * y + phases[1] - 1.5 * x)
        lumps += 0.6 * np.sin(10.5 * x + phases[3] + 3 * y) * np.sin(10.1 * y + phases[5])
        profile *= 1 + 0.1 * lumps
    return np.where(radius < reach, np.clip(profile, 0.15, 1), 0).astype(np.float32)


class _Maps(NamedTuple):
    """What lies where in a drawn scene, (S, S) each."""

    surface: NDArray[np.int32]
    height: Floats
    u: Floats
    v: Floats


def _draw(plan: _Plan, side: int) -> _Maps:
    """Draw a plan with `side` pixels a side."""
    scale = side / plan.extent
    middle = side / 2
    frame = plan.frame

    surface = Image.new("I", (side, side), 0)
    height = Image.new("F", (side, side), 0.0)
    pen, lift = ImageDraw.Draw(surface), ImageDraw.Draw(height)

    def cells(group: list[tuple[_Cell, int]]) -> None:
        box = np.array([cell for cell, _ in group]).reshape(-1, 4)
        # A point every 16 m is enough for the curves of the frame; most cells need their corners only.
        pieces = np.ceil(np.maximum(box[:, 1] - box[:, 0], box[:, 3] - box[:, 2]) / 16.0)
        outlines: dict[int, list[float]] = {}
        for count in np.unique(pieces):
            those = np.flatnonzero(pieces == count)
            u0, u1, v0, v1 = box[those].T[..., None]
            a, b = _outline(int(count))
            points = np.stack(frame.to_scene(u0 + (u1 - u0) * a, v0 + (v1 - v0) * b), axis=-1) * scale + middle
            outlines.update(zip(those.tolist(), points.reshape(len(those), -1).tolist(), strict=True))
        for i, (_, number) in enumerate(group):
            pen.polygon(outlines[i], fill=number)

    cells(plan.ground)
    cells([cell for lane in reversed(plan.lanes) for cell in lane])
    for u, v, number in plan.shapes:
        points = np.stack(frame.to_scene(u, v), axis=-1) * scale + middle
        pen.polygon(points.ravel().tolist(), fill=number)
    cells([cell for highway in plan.highways for cell in highway])
    for corners, roof, top in plan.solids:
        outline = [c * scale + middle for corner in corners for c in corner]
        if roof is not None:
            pen.polygon(outline, fill=roof)
        if top is not None:
            lift.polygon(outline, fill=top)

    at = (np.arange(side, dtype=np.float32) + 0.5) / np.float32(scale) - np.float32(plan.extent / 2)
    u, v = frame.to_plan(at[None, :], at[:, None])
    maps = _Maps(np.array(surface), np.array(height), u, v)
    _plant(plan, maps, scale)
    return maps


def _plant(plan: _Plan, maps: _Maps, scale: float) -> None:
    """Stamp the crowns onto the surface and height maps, in place."""
    side = len(maps.surface)
    trees = plan.trees
    x, y = trees[:, 0] * scale + side / 2, trees[:, 1] * scale + side / 2
    radius = trees[:, 2] * scale / 2
    labels = np.array([row[_LABEL] for row in plan.table], dtype=np.uint8)
    foot = labels[maps.surface[np.clip(y, 0, side - 1).astype(int), np.clip(x, 0, side - 1).astype(int)]]
    grows = (foot == TREE) | ((foot <= FIELD) & (trees[:, 6] == 0))
    variants = plan.rng.integers(6, size=len(trees))
    sizes = np.maximum(np.rint(2 * radius), 1).astype(int)
    sizes = np.where(sizes > 24, sizes // 4 * 4, sizes)
    left, top = np.rint(x - sizes / 2).astype(int), np.rint(y - sizes / 2).astype(int)
    near = (left + sizes > 0) & (left < side) & (top + sizes > 0) & (top < side)
    # The forest floor is tree already; crowns too small to see would only cost time.
    seen = (sizes > 1) | (trees[:, 6] == 0)
    keep = np.flatnonzero(near & grows & seen)
    columns = (left, top, sizes, variants)
    for i, x_start, y_start, size, variant in zip(keep.tolist(), *(c[keep].tolist() for c in columns), strict=True):
        row = trees[i]
        x0, y0, x1, y1 = max(x_start, 0), max(y_start, 0), min(x_start + size, side), min(y_start + size, side)
        crown = _crown(int(row[5]), size, variant)[y0 - y_start : y1 - y_start, x0 - x_start : x1 - x_start]
        crown = crown * np.float32(row[3])
        window = maps.height[y0:y1, x0:x1]
        higher = crown > window
        np.copyto(window, crown, where=higher)
        np.copyto(maps.surface[y0:y1, x0:x1], int(row[4]), where=higher)


def _shadow(height: Floats, towards: tuple[float, float], drop: float) -> Floats:
    """How far each pixel lies below the sun's rays, in the unit of `height`; 0 in the sun.

    Args:
        height: height map, (S, S).
        towards: pixels (x, y) of one step towards the sun, at most one pixel.
        drop: how much a ray falls in one step.
    """
    # `cover` is the largest height on the first `steps` steps towards the sun, less the fall of the ray up to here.
    cover, steps, top = height.copy(), 1, float(height.max())
    while steps * drop < top and steps < len(height):
        dx, dy = round(steps * towards[0]), round(steps * towards[1])
        here, there = _shifted(len(cover), dx, dy)
        np.maximum(cover[here], cover[there] - np.float32(steps * drop), out=cover[here])
        steps *= 2
    return cover - height


def _shifted(side: int, dx: int, dy: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Index of the pixels that have a neighbour at (dx, dy), and of these neighbours."""
    here = (slice(max(-dy, 0), side - max(dy, 0)), slice(max(-dx, 0), side - max(dx, 0)))
    there = (slice(max(dy, 0), side + min(dy, 0)), slice(max(dx, 0), side + min(dx, 0)))
    return here, there


def _paint(plan: _Plan, maps: _Maps, labels: NDArray[np.uint8]) -> Floats:
    """The scene in sunlight and shadow, (3, S, S), sRGB 0..255, before the sensor."""
    rng, side = plan.rng, len(labels)
    scale = side / plan.extent
    table = np.array(plan.table, dtype=np.float32)
    # Rows finer than two pixels would alias.
    table[:, _CONTRAST] *= np.clip(table[:, _SPACING] * scale - 2.0, 0, 1)
    # Road markings are narrower than a pixel of the drawing: give them the part of its brightness that they have.
    table[plan.paint, :6] += (table[plan.paved[1], :6] - table[plan.paint, :6]) * (1 - min(0.18 * scale, 1))
    index = maps.surface.astype(np.intp)

    def of(column: int) -> Floats:
        return table[:, column].take(index)

    u, v = maps.u, maps.v
    for cu, cv, radius, first in plan.pivots:
        away = np.hypot(u - np.float32(cu), v - np.float32(cv))
        circle = (away < radius) & (index >= first)
        u, v = np.where(circle, away, u), np.where(circle, np.float32(0), v)

    slow = _noise(rng, side, 16.0 * scale)
    # Mixture of the two colours of each surface.
    mix = of(_PATCH) * slow
    mix += np.float32(0.06) * _noise(rng, side, 2.0 * scale)
    phase = of(_ROW_U) * u
    phase += of(_ROW_V) * v
    wobble = phase + np.float32(0.25) * slow
    mix += np.float32(0.5) * of(_CONTRAST) * np.sin(wobble)
    tracks = np.cos(of(_TRAM) * phase) > np.float32(0.93)
    mix += np.float32(0.35) * (tracks & (of(_TRAM) > 0))
    mix += np.float32(0.5)
    water = labels == WATER
    if water.any():
        mix += water * (_shallows(water, scale) - np.float32(0.45))
    np.clip(mix, 0, 1, out=mix)

    light = of(_GRAIN) * _noise(rng, side, 0.7 * scale)
    light += 1
    light += of(_RELIEF) * _relief(plan, maps.height, scale)
    azimuth, elevation = plan.sun
    cosine, sine = math.cos(azimuth), math.sin(azimuth)
    stride = 1 / max(abs(cosine), abs(sine))
    towards = cosine * stride, sine * stride
    below = _shadow(maps.height, towards, stride / scale * math.tan(elevation))
    below -= np.float32(_STEP + 0.05) * (labels == BUILDING)
    shade = np.clip(below * np.float32(2), 0, 1)
    # Light finds its way between leaves.
    shade *= 1 - np.float32(0.35) * (labels == TREE)
    depth = plan.between(0.4, 0.6)
    rgb = np.empty((3, side, side), dtype=np.float32)
    for channel, blue in enumerate((1.06, 1.0, 0.86)):
        dark, bright = table[:, channel], table[:, 3 + channel]
        plane = dark.take(index) + mix * (bright - dark).take(index)
        plane *= light
        plane *= 1 - np.float32(depth * blue) * shade
        rgb[channel] = plane
    return rgb


def _shallows(water: NDArray[np.bool_], scale: float) -> Floats:
    """1 along the shore, 0 some 6 m out."""
    radius = max(3.0 * scale / 4, 0.5)
    small = Image.fromarray(water.view(np.uint8) * np.uint8(255)).reduce(4 if len(water) >= 8 else 1)
    deep = small.filter(ImageFilter.BoxBlur(radius)).resize(water.shape, Image.Resampling.BILINEAR)
    return np.clip(np.float32(2) - np.asarray(deep, dtype=np.float32) / np.float32(127.5), 0, 1)


def _relief(plan: _Plan, height: Floats, scale: float) -> Floats:
    """Relative brightness of slopes: towards the sun brighter, away from it darker."""
    azimuth, _ = plan.sun
    slope = np.zeros_like(height)
    rise = height[:, 2:] - height[:, :-2]
    slope[:, 1:-1] = rise * np.float32(-math.cos(azimuth) * scale / 2)
    slope[1:-1] -= (height[2:] - height[:-2]) * np.float32(math.sin(azimuth) * scale / 2)
    # Bounded, as the cosine of the sun's angle is.
    return np.float32(0.38) * slope / np.sqrt(1 + slope * slope)


def _sense(plan: _Plan, scene: Floats) -> NDArray[np.uint8]:
    """What the sensor makes of the scene: haze, uneven light, point spread, noise; (S, S, 3) uint8."""
    rng, region = plan.rng, plan.region
    rgb = scene[:, ::2, ::2] + scene[:, 1::2, ::2] + scene[:, ::2, 1::2] + scene[:, 1::2, 1::2]
    side = rgb.shape[1]
    # One gain per band and scene: sun, season and calibration differ from one image to the next.
    gain = plan.between(*region.gain) * (1 + 0.03 * rng.standard_normal(3))
    color, most = region.haze
    haze = most * rng.random() ** 1.5
    light = 1 + np.float32(0.035) * _noise(rng, side, max(0.7 * side, 1.0), fractal=False)
    spread = plan.between(0.06, 0.16)
    grain = rng.standard_normal((3, side, side), dtype=np.float32)
    sigma = plan.between(1.5, 4.0)
    image = np.empty((side, side, 3), dtype=np.uint8)
    for band in range(3):
        plane = rgb[band] * (light * np.float32(gain[band] * (1 - haze) / 4)) + np.float32(color[band] * haze)
        for _ in range(2):
            padded = np.pad(plane, ((1, 1), (0, 0)), mode="edge")
            plane = ((1 - 2 * spread) * plane + spread * (padded[2:] + padded[:-2])).T
        plane += np.float32(sigma) * grain[band]
        image[..., band] = np.clip(plane + np.float32(0.5), 0, 255)
    return image


def _majority(fine: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The most frequent value of each 2 x 2 square; the first of them where no value is more frequent than another."""
    a, b, c, d = fine[::2, ::2], fine[::2, 1::2], fine[1::2, ::2], fine[1::2, 1::2]
    return np.where((a == b) | (a == c) | (a == d), a, np.where((b == c) | (b == d), b, np.where(c == d, c, a)))


def render(
    seed: int, *, size: int = 128, gsd: float = 0.5, region: str = "temperate"
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Render a scene and its mask.

    A pure function of its arguments: the same bits on every call, with the same versions of numpy and Pillow.

    The scene is planned from the seed, the region and the ground it covers (`size * gsd` metres): the same ground at
    another `gsd` is the same scene, seen more finely or more coarsely.

    Args:
        seed: which scene; not negative.
        size: side of the square tile in pixels.
        gsd: ground sampling distance in metres per pixel, 0.1 to 10.
        region: a name of `REGIONS`.

    Returns:
        The image, (size, size, 3) uint8, sRGB, and the mask, (size, size) uint8, class indices of `WORLD_SCHEMA`.

    Raises:
        TerraSynthError: the region is unknown, or a number is out of its range.
    """
    if region not in REGIONS:
        raise TerraSynthError(
            "no such region", found=region, expected=" or ".join(REGIONS), fix="choose one of these regions"
        )
    if size < 1:
        raise TerraSynthError("a tile needs pixels", found=f"size {size}", expected="at least 1", fix="raise the size")
    low, high = _GSD_RANGE
    if not low <= gsd <= high:
        raise TerraSynthError(
            "the ground sampling distance is out of range",
            found=f"{gsd} m per pixel",
            expected=f"{low:g} to {high:g} m per pixel",
            fix="choose a value in this range",
        )
    if seed < 0:
        raise TerraSynthError("a seed is not negative", found=seed, expected="0 or more", fix="choose another seed")
    plan = _Plan(np.random.default_rng(seed), REGIONS[region], size * gsd)
    maps = _draw(plan, _FINER * size)
    labels = np.array([row[_LABEL] for row in plan.table], dtype=np.uint8)[maps.surface]
    return _sense(plan, _paint(plan, maps, labels)), _majority(labels)
