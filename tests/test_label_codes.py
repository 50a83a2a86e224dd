import numpy as np
import pytest
import torch

from terrasynth.errors import TerraSynthError
from terrasynth.models.label_codes import LabelCodes

KINDS = pytest.mark.parametrize(
    ("kind", "channels"), [("bits", None), ("bits", 3), ("onehot", None), ("onehot", 9), ("learned", None)]
)


@KINDS
@pytest.mark.parametrize("num_classes", [2, 3, 5, 8])
def test_every_class_comes_back(kind, channels, num_classes):
    codes = LabelCodes(num_classes, kind, channels)
    masks = torch.arange(num_classes).expand(2, 3, -1)
    encoded = codes.encode(masks)
    assert encoded.shape == (2, codes.channels, 3, num_classes)
    assert torch.equal(codes.decode(encoded), masks.byte())


@pytest.mark.parametrize(("num_classes", "channels"), [(2, 1), (3, 2), (8, 3), (9, 4), (255, 8)])
def test_bits_are_the_binary_digits(num_classes, channels):
    table = LabelCodes(num_classes).table
    digits = [[2 * int(digit) - 1 for digit in f"{k:0{channels}b}"] for k in range(num_classes)]
    assert table.tolist() == digits


def test_bits_come_back_for_every_number_of_classes_and_other_codes_go_to_the_nearest_class():
    """All codes there are, against Hamming distances by brute force; of several nearest classes the first."""
    for num_classes in range(2, 257):
        codes = LabelCodes(num_classes)
        values = np.arange(2**codes.channels)
        assert 2 ** (codes.channels - 1) < num_classes <= 2**codes.channels
        shifts = np.arange(codes.channels - 1, -1, -1)
        bits = torch.from_numpy(2.0 * (values[:, None] >> shifts & 1) - 1).float().T[None, :, None]
        distances = np.bitwise_count(values[:, None] ^ np.arange(num_classes))
        found = codes.decode(bits)[0, 0].numpy()
        assert (found == distances.argmin(1)).all()
        assert (found[:num_classes] == values[:num_classes]).all()


def test_where_there_is_no_class_the_code_is_zero():
    masks = torch.tensor([[[0, 2, 255]]])
    assert LabelCodes(2).encode(masks).tolist() == [[[[-1, 0, 0]]]]


@KINDS
def test_scores_are_largest_for_the_nearest_point_and_affine(kind, channels):
    """Against distances by brute force, in float64."""
    codes = LabelCodes(6, kind, channels)
    x, y = torch.randn(2, 2, codes.channels, 4, 5)
    distances = (x.double().unsqueeze(1) - codes.table.double().view(1, 6, -1, 1, 1)).square().sum(2)
    assert torch.equal(codes.decode(x).long(), distances.argmin(1))
    mean = (codes.scores(x) + codes.scores(y)) / 2
    torch.testing.assert_close(mean, codes.scores((x + y) / 2))
    if kind != "learned":
        agreement = ((1 + x.unsqueeze(1) * codes.table.view(1, 6, -1, 1, 1)) / 2).mean(2)
        torch.testing.assert_close(codes.scores(x), agreement)
        assert codes.scores(x.clamp(-1, 1)).aminmax() == (pytest.approx(0.5, abs=0.5), pytest.approx(0.5, abs=0.5))


def test_saved_points_are_the_same(tmp_path):
    codes = LabelCodes(4, "learned")
    codes.save_pretrained(tmp_path)
    assert torch.equal(LabelCodes.from_pretrained(tmp_path).table, codes.table)


@pytest.mark.parametrize(("num_classes", "kind"), [(9, "bits"), (4, "onehot")])
def test_more_classes_than_the_channels_hold_are_refused(num_classes, kind):
    with pytest.raises(TerraSynthError, match="do not fit"):
        LabelCodes(num_classes, kind, 3)


def test_an_unknown_kind_is_refused():
    with pytest.raises(TerraSynthError, match="bits, onehot, learned"):
        LabelCodes(2, "grey")
