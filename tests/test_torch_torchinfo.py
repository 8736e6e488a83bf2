"""torchinfo lists the layers with their shapes and parameters, as PyTorch's own."""

import pytest

torch = pytest.importorskip("torch")
torchinfo = pytest.importorskip("torchinfo")

from torch import nn  # noqa: E402

from polywhiten.torch import GroupWhitening, IterNorm  # noqa: E402


def summary(*norms):
    """Return the rows of a network's summary with the class of each module, and the summary."""
    layers = [module for norm in norms for module in (nn.Conv2d(8, 8, 3, padding=1), norm, nn.ReLU())]
    found = torchinfo.summary(nn.Sequential(*layers), input_size=(4, 8, 6, 6), verbose=0)
    return [row for row in found.summary_list if row.depth == 1], found


def test_the_summary_is_that_of_pytorch_layers():
    rows, found = summary(IterNorm(8), GroupWhitening(4, 8))
    expected_rows, expected = summary(nn.BatchNorm2d(8), nn.GroupNorm(4, 8))
    assert [row.class_name for row in rows if "Norm" in row.class_name or "Whiten" in row.class_name] == [
        "IterNorm",
        "GroupWhitening",
    ]
    for row, wanted in zip(rows, expected_rows, strict=True):
        assert (row.input_size, row.output_size) == (wanted.input_size, wanted.output_size)
        assert (row.num_params, row.trainable_params) == (wanted.num_params, wanted.trainable_params)
    for name in ("total_params", "trainable_params", "total_output_bytes", "total_mult_adds"):
        assert getattr(found, name) == getattr(expected, name), name


def test_a_summary_changes_no_running_average():
    layer = IterNorm(8)
    torchinfo.summary(layer, input_size=(4, 8, 6, 6), mode="eval", verbose=0)
    assert layer.num_batches_tracked == 0
    assert layer.training
