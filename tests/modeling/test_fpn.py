import pytest
import torch
from torch.nn.functional import conv2d, interpolate, relu

from fiber_d2.modeling import AnchorGrid, FeaturePyramid

SIZES = [(9, 12), (5, 6), (3, 3)]


def maps(channels):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, c, *size, generator=generator) for c, size in zip(channels, SIZES)]


def test_levels_follow_their_definition():
    torch.manual_seed(0)
    neck = FeaturePyramid(in_channels=(4, 6, 8), out_channels=5, drop_block=0.0)
    features = maps((4, 6, 8))
    levels = neck(features)
    weights = neck.state_dict()

    def conv(name, x, **options):
        return conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    c3, c4, c5 = (conv(f"laterals.{i}", x) for i, x in enumerate(features))
    c4 = c4 + interpolate(c5, size=c4.shape[-2:], mode="nearest")
    c3 = c3 + interpolate(c4, size=c3.shape[-2:], mode="nearest")
    expected = [conv(f"outputs.{i}", x, padding=1) for i, x in enumerate((c3, c4, c5))]
    expected.append(conv("p6", expected[-1], stride=2, padding=1))
    expected.append(conv("p7", relu(expected[-1]), stride=2, padding=1))
    assert len(levels) == len(expected)
    for found, wanted in zip(levels, expected):
        torch.testing.assert_close(found, wanted)


def test_numbers_of_levels_have_to_agree():
    neck = FeaturePyramid(in_channels=(4, 6, 8), out_channels=5)
    with pytest.raises(ValueError, match="5 levels, but there are 3 anchor strides"):
        AnchorGrid(strides=(8, 16, 32), sizes=(32, 64, 128))(neck(maps((4, 6, 8))))
