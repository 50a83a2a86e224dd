"""Every coding of a mask decodes to the mask it came from, and bad schemas and masks are explained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from terrasynth.data.schema import LabelSchema, packaged_labels
from terrasynth.errors import TerraSynthError

CODINGS = ("onehot", "bits", "grey")
LAND = LabelSchema(("building", "road", "water"), ((60, 16, 152), (110, 193, 228), (226, 169, 41)))


def schema_of(num_classes: int, ignore_index: int = 255) -> LabelSchema:
    colors = tuple((index + 1, 7 * index % 256, 255 - index) for index in range(num_classes))
    return LabelSchema(tuple(f"class {i}" for i in range(num_classes)), colors, ignore_index)


def all_values(schema: LabelSchema) -> torch.Tensor:
    """A mask (1, 1, K + 1) with every class and an unlabelled pixel."""
    return torch.tensor([[[*range(schema.num_classes), schema.ignore_index]]])


@st.composite
def schemas_and_masks(draw: st.DrawFn) -> tuple[LabelSchema, torch.Tensor]:
    num_classes = draw(st.integers(2, 40))
    schema = schema_of(num_classes, draw(st.integers(num_classes, 255)))
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)))
    values = st.sampled_from([*range(num_classes), schema.ignore_index])
    mask = draw(st.lists(values, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return schema, torch.tensor(mask, dtype=torch.uint8).view(shape)


# --- codings for networks --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(schemas_and_masks(), st.sampled_from(CODINGS))
def test_every_coding_round_trips(schema_and_mask, coding):
    schema, mask = schema_and_mask
    code = schema.encode(mask, coding)
    assert code.dtype == torch.float32
    assert code.shape == (len(mask), schema.channels(coding), *mask.shape[1:])
    decoded = schema.decode(code, coding)
    assert decoded.dtype == torch.int64
    assert torch.equal(decoded, mask.long())


@pytest.mark.parametrize("num_classes", [*range(2, 41), 255])
@pytest.mark.parametrize("coding", CODINGS)
def test_every_number_of_classes_round_trips_with_unlabelled_pixels(num_classes, coding):
    schema = schema_of(num_classes)
    mask = all_values(schema)
    assert torch.equal(schema.decode(schema.encode(mask, coding), coding), mask)


@settings(deadline=None)
@given(st.integers(2, 40), st.sampled_from(CODINGS), st.integers(0, 2**31), st.floats(0, 3))
def test_decoding_takes_the_nearest_code_whatever_the_noise(num_classes, coding, seed, scale):
    schema = schema_of(num_classes)
    generator = torch.Generator().manual_seed(seed)
    values = all_values(schema).flatten()
    codes = schema.encode(values.view(1, 1, -1), coding)[0, :, 0].T.double()
    noisy = scale * torch.randn(50, codes.shape[1], generator=generator).double()
    distances = torch.cdist(noisy, codes)
    nearest, second = distances.topk(2, largest=False).values.T
    decoded = schema.decode(noisy.T[None, :, None, :], coding)[0, 0]
    clear = second - nearest > 1e-6
    assert torch.equal(decoded[clear], values[distances.argmin(1)][clear])


@pytest.mark.parametrize("coding", CODINGS)
def test_a_small_disturbance_does_not_change_the_mask(coding):
    schema = schema_of(9)
    mask = all_values(schema)
    code = schema.encode(mask, coding)
    noise = torch.rand(code.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    assert torch.equal(schema.decode(code + 0.2 * noise, coding), mask)


def test_onehot_is_zero_where_unlabelled():
    code = LAND.to_onehot(torch.tensor([[2, 255]]))
    assert torch.equal(code[:, 0, 0], torch.tensor([0.0, 0, 1]))
    assert torch.equal(code[:, 0, 1], torch.zeros(3))


@pytest.mark.parametrize(("num_classes", "bits"), [(2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (40, 6)])
def test_bits_spell_the_class_plus_one(num_classes, bits):
    schema = schema_of(num_classes)
    assert schema.channels("bits") == bits == int(np.ceil(np.log2(num_classes + 1)))
    code = schema.to_bits(all_values(schema))[0, :, 0]
    assert set(code.unique().tolist()) == {-1.0, 1.0}
    spelled = ((code > 0) * 2 ** torch.arange(bits - 1, -1, -1)[:, None]).sum(0)
    assert spelled.tolist() == [*range(1, num_classes + 1), 0]


def test_a_bit_pattern_beyond_the_classes_becomes_the_code_nearest_to_it():
    # K = 4: 0 to 4 are valid; 7 = 111 differs in one bit from 3 = 011 only.
    assert schema_of(4).from_bits(torch.ones(3, 1, 1)).item() == 2


@pytest.mark.parametrize("num_classes", range(2, 41))
def test_grey_levels_are_whole_distinct_and_span_the_range(num_classes):
    schema = schema_of(num_classes)
    grey = (schema.to_grey(all_values(schema))[0] + 1) * 127.5
    assert torch.equal(grey[0], grey[1])
    levels = grey[0, 0].round().int().tolist()
    torch.testing.assert_close(grey[0, 0], torch.tensor(levels).float(), atol=1e-4, rtol=0)
    assert len(set(levels)) == num_classes + 1
    assert (min(levels), max(levels)) == (0, 255)
    assert levels[-1] == 0
    assert max(np.diff(sorted(levels))) - min(np.diff(sorted(levels))) <= 1


@pytest.mark.parametrize("coding", CODINGS)
def test_leading_dimensions_are_kept(coding):
    mask = torch.tensor([[0, 1], [2, 255]])
    assert torch.equal(LAND.decode(LAND.encode(mask, coding), coding), mask)
    assert LAND.encode(mask.expand(4, 5, 2, 2), coding).shape == (4, 5, LAND.channels(coding), 2, 2)


def test_an_unknown_coding_is_explained():
    with pytest.raises(TerraSynthError, match=r"onehot \| bits \| grey"):
        LAND.encode(torch.zeros(1, 1), "one-hot")


# --- codings in files ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(schemas_and_masks())
def test_colours_and_palette_round_trip(schema_and_mask):
    schema, mask = schema_and_mask
    array = mask[0].numpy()
    color = schema.to_color(mask[0])
    assert color.dtype == np.uint8
    assert color.shape == (*array.shape, 3)
    np.testing.assert_array_equal(schema.from_color(color), array)
    picture = Image.fromarray(array)
    picture.putpalette(schema.palette().tobytes())
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), color)
    np.testing.assert_array_equal(schema.from_index(np.asarray(picture)), array)


def test_every_ignore_colour_reads_as_unlabelled():
    schema = LabelSchema(("a", "b"), ((1, 1, 1), (2, 2, 2)), 9, ((0, 0, 0), (155, 155, 155)))
    rgb = np.array([[[155, 155, 155], [0, 0, 0], [2, 2, 2]]], np.uint8)
    np.testing.assert_array_equal(schema.from_color(rgb), [[9, 9, 1]])
    np.testing.assert_array_equal(schema.to_color(np.array([[9]])), [[[0, 0, 0]]])


def test_unknown_colours_are_counted_and_the_nearest_class_is_named():
    rgb = np.full((3, 4, 3), LAND.colors[1], np.uint8)
    rgb[0, :2] = (61, 16, 152)
    with pytest.raises(TerraSynthError) as caught:
        LAND.from_color(rgb, path="m.png")
    assert caught.value.path == "m.png"
    assert caught.value.found == "#3D1098 (2 px, nearest: building #3C1098)"


def test_unknown_indices_are_counted():
    with pytest.raises(TerraSynthError) as caught:
        LAND.from_index(np.array([[0, 3], [-1, 3]], np.int32), path="m.tif")
    assert caught.value.found == "-1 (1 px), 3 (2 px)"
    assert "building, road, water" in str(caught.value.expected)


# --- captions --------------------------------------------------------------------------------------------------------


def test_a_caption_names_the_classes_present_most_pixels_first():
    mask = torch.tensor([[2, 2, 2, 0], [255, 255, 255, 255]])
    assert LAND.caption(mask) == "a satellite image of water, building"
    assert LAND.caption(mask.numpy(), "{classes} from above") == "water, building from above"


def test_shares_are_of_all_pixels_most_first_and_none_is_rounded_away():
    masks = torch.full((1, 10, 100), 2, dtype=torch.uint8)
    masks[0, 0, :20], masks[0, 1:5], masks[0, 9, 99] = 0, LAND.ignore_index, 1
    first, second, third = LAND.names
    assert LAND.shares(masks) == f"{third} 58 %, unlabelled 40 %, {first} 2 %, {second} < 1 %"


def test_a_caption_of_an_unlabelled_mask_names_no_class():
    assert LAND.caption(torch.full((2, 2), 255)) == "a satellite image of unlabelled terrain"


# --- the schema itself -----------------------------------------------------------------------------------------------


def test_yaml_round_trips(tmp_path):
    schema = LabelSchema(("bâtiment", "no"), ((1, 2, 3), (4, 5, 6)), 7, ((9, 9, 9), (8, 8, 8)))
    schema.to_yaml(tmp_path / "s.yaml")
    assert LabelSchema.from_yaml(tmp_path / "s.yaml") == schema
    assert LabelSchema.from_dict(schema.to_dict()) == schema


def test_yaml_has_defaults_and_two_ways_to_write_a_colour(tmp_path):
    (tmp_path / "s.yaml").write_text('classes: [{name: a, color: "#3c1098"}, {name: b, color: [1, 2, 3]}]')
    schema = LabelSchema.from_yaml(tmp_path / "s.yaml")
    assert schema == LabelSchema(("a", "b"), ((60, 16, 152), (1, 2, 3)), 255, ((0, 0, 0),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clases: []", "did you mean `classes`"),
        ("ignore_index: 3", "no `classes`"),
        ("[1, 2]", "must be a mapping"),
        ("classes: {building: 1}", "must be a list"),
        ('classes: [{name: a, colour: "#000001"}]', "did you mean `color`"),
        ("classes: [{name: a}]", "no `color`"),
        ("classes: [{name: a, color: #112233}]", "not a YAML file"),
        ("classes:\n  - name: a\n    color: #112233", "put it in quotes"),
        ("classes: [{name: a, color: 112233}]", "put it in quotes"),
        ('classes: [{name: a, color: "#112233"}]', "at least two classes"),
        ('classes: [{name: a, color: "#111111"}, {name: a, color: "#222222"}]', "names must be distinct"),
        ('classes: [{name: a, color: "#111111"}, {name: b, color: "#111111"}]', "#111111 for a and b"),
        ('classes: [{name: a, color: "#000000"}, {name: b, color: "#111111"}]', "unlabelled"),
        ('classes: [{name: no, color: "#111111"}, {name: b, color: "#222222"}]', "in quotes"),
        ('classes: [{name: a, color: [1, 2, 256]}, {name: b, color: "#222222"}]', "0..255"),
        ('{classes: [{name: a, color: "#111111"}, {name: b, color: "#222222"}], ignore_index: 1}', "not be a class"),
        ('{classes: [{name: a, color: "#111111"}, {name: b, color: "#222222"}], ignore_index: 256}', "2 to 255"),
        ("classes: []\nclasses: []", "`classes` is given twice"),
        ('{classes: [{name: a, color: "#111111"}, {name: b, color: "#222222"}], ignore_colors: "#000000"}', "a list"),
        ('{classes: [{name: a, color: "#111111"}, {name: b, color: "#222222"}], ignore_colors: []}', "need a colour"),
    ],
)
def test_a_bad_schema_is_explained(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(TerraSynthError, match=message) as caught:
        LabelSchema.from_yaml(tmp_path / "s.yaml")
    assert "s.yaml" in str(caught.value)


def test_too_many_classes_are_counted_and_not_listed():
    with pytest.raises(TerraSynthError, match="at most 255") as caught:
        LabelSchema(tuple(f"c{i}" for i in range(300)), tuple((i % 256, i // 256, 9) for i in range(300)))
    assert "c17" not in str(caught.value)


def test_a_missing_schema_file_shows_what_one_looks_like(tmp_path):
    with pytest.raises(TerraSynthError, match="classes:"):
        LabelSchema.from_yaml(tmp_path / "s.yaml")


# --- stored values ---------------------------------------------------------------------------------------------------

STORED = LabelSchema(("land", "water"), ((0, 255, 0), (0, 0, 255)), 255, ((0, 0, 0),), (3, 1), (0, 9))


def test_stored_values_are_read_and_written():
    stored = np.array([[3, 1, 0], [9, 1, 3]], np.uint16)
    mask = STORED.from_index(stored)
    np.testing.assert_array_equal(mask, [[0, 1, 255], [255, 1, 0]])
    np.testing.assert_array_equal(STORED.to_index(mask), [[3, 1, 0], [0, 1, 3]])
    # A file is shown in the same colours, whatever it stores.
    np.testing.assert_array_equal(STORED.palette()[STORED.to_index(mask)], STORED.to_color(mask))
    assert LabelSchema.from_dict(STORED.to_dict()) == STORED


def test_without_stored_values_files_hold_the_class_indices():
    mask = np.array([[0, 1, 2, 255]], np.uint8)
    np.testing.assert_array_equal(LAND.to_index(mask), mask)
    assert set(LAND.to_dict()) == {"classes", "ignore_index", "ignore_colors"}
    assert set(LAND.to_dict()["classes"][0]) == {"name", "color"}
    with pytest.raises(TerraSynthError, match="no class"):
        LAND.to_index(np.array([[3]]))


def test_a_stored_value_without_meaning_is_counted():
    with pytest.raises(TerraSynthError) as caught:
        STORED.from_index(np.array([[2, 2, 1]]), path="m.tif")
    assert caught.value.found == "2 (2 px)"
    assert caught.value.expected == "3 (land), 1 (water) or 0 or 9 (unlabelled)"
    with pytest.raises(TerraSynthError) as caught:
        STORED.from_index(np.array([2, 1]), counts=np.array([70, 5]))
    assert caught.value.found == "2 (70 px)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{name: a, color: '#000001', value: 1}, {name: b, color: '#000002'}]", "every class needs a value, or none"),
        ("[{name: a, color: '#000001', value: 1}, {name: b, color: '#000002', value: 1}]", "1 for a and b"),
        (
            "[{name: a, color: '#000001', value: 255}, {name: b, color: '#000002', value: 1}]",
            "255 for a and unlabelled",
        ),
        ("[{name: a, color: '#000001', value: 256}, {name: b, color: '#000002', value: 1}]", "256"),
        ("[{name: a, color: '#000001', value: x}, {name: b, color: '#000002', value: 1}]", "'x'"),
        ("[{name: a, color: '#000001'}, {name: b, color: '#000002'}]\nignore_values: [1]", "1 for b and unlabelled"),
        ("[{name: a, color: '#000001'}, {name: b, color: '#000002'}]\nignore_values: 7", "must be a list"),
    ],
)
def test_bad_stored_values_are_explained(tmp_path, text, message):
    (tmp_path / "classes.yaml").write_text(f"classes: {text}\n")
    with pytest.raises(TerraSynthError) as caught:
        LabelSchema.from_yaml(tmp_path / "classes.yaml")
    assert message in str(caught.value)


# --- packaged schemas ------------------------------------------------------------------------------------------------

# What mmsegmentation and torchgeo list for these data sets, in the order of their indices.
PUBLISHED = {
    "loveda": [(255, 255, 255), (255, 0, 0), (255, 255, 0), (0, 0, 255), (159, 129, 183), (0, 255, 0), (255, 195, 128)],
    "potsdam": [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)],
    "vaihingen": [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)],
    "deepglobe": [(0, 255, 255), (255, 255, 0), (255, 0, 255), (0, 255, 0), (0, 0, 255), (255, 255, 255)],
    "openearthmap": [
        (128, 0, 0), (0, 255, 36), (148, 148, 148), (255, 255, 255), (34, 97, 38), (0, 69, 255), (75, 181, 73),
        (222, 31, 7),
    ],
    "isaid": [
        (0, 0, 0), (0, 0, 63), (0, 63, 63), (0, 63, 0), (0, 63, 127), (0, 63, 191), (0, 63, 255), (0, 127, 63),
        (0, 127, 127), (0, 0, 127), (0, 0, 191), (0, 0, 255), (0, 191, 127), (0, 127, 191), (0, 127, 255),
        (0, 100, 155),
    ],
    "gid-15": [
        (200, 0, 0), (250, 0, 150), (200, 150, 150), (250, 150, 150), (0, 200, 0), (150, 250, 0), (150, 200, 150),
        (200, 0, 200), (150, 0, 250), (150, 150, 250), (250, 200, 0), (200, 200, 0), (0, 0, 200), (0, 150, 200),
        (0, 200, 250),
    ],
}  # fmt: skip


def test_packaged_schemas_have_the_published_colours():
    assert {*PUBLISHED, "dubai", "fusu", "five-billion-pixels"} == set(packaged_labels())
    for name, colors in PUBLISHED.items():
        assert list(LabelSchema.load(name).colors) == colors
    # Classes that both have, in the same colours.
    gid, five = (LabelSchema.load(name) for name in ("gid-15", "five-billion-pixels"))
    for name in {*gid.names} & {*five.names}:
        assert gid.colors[gid.names.index(name)] == five.colors[five.names.index(name)]
    assert [LabelSchema.load(name).num_classes for name in ("fusu", "five-billion-pixels")] == [17, 24]


def test_a_schema_is_found_by_path_or_by_name(tmp_path):
    assert LabelSchema.load("loveda") == LabelSchema.load("labels/loveda.yaml")
    LAND.to_yaml(tmp_path / "mine.yaml")
    assert LabelSchema.load(tmp_path / "mine.yaml") == LabelSchema.load("mine.yaml", [tmp_path]) == LAND
    with pytest.raises(TerraSynthError) as caught:
        LabelSchema.load("LovDA")
    assert caught.value.fix == "did you mean `loveda`?"
    assert "potsdam" in str(caught.value)
