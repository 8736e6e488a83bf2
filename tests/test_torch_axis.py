"""PyTorch's layers whiten channels at any axis, as they do at axis 1."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import reference  # noqa: E402
from test_torch_export import OLDER, in_onnxruntime, older_exporter  # noqa: E402

from polywhiten.torch import GroupWhitening, IterNorm, convert, fold, track  # noqa: E402

AXES = {"sequences": ((7, 9, 6), -1), "middle": ((7, 9, 6, 2), 2), "last of four": ((7, 3, 2, 6), 3)}
LAYERS = {
    "iter_norm": lambda **k: IterNorm(6, group_size=4, **k),
    "group_whitening": lambda **k: GroupWhitening(3, 6, **k),
}
each_axis = pytest.mark.parametrize(("shape", "axis"), AXES.values(), ids=AXES)
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
each_path = pytest.mark.parametrize("compiled", [True, False], ids=["compiled kernels", "PyTorch's operations"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def with_affine(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
    return layer


def gradients(layer, x, dy):
    """Return the output, and the gradients of x, weight and bias."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)


@each_layer
@each_axis
@each_path
def test_output_gradients_and_averages_are_those_of_the_channels_at_axis_1(make, shape, axis, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("polywhiten.torch.cpu.is_available", lambda: False)
    layer = with_affine(make(axis=axis, dtype=torch.float64))
    twin = make(dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    x, dy = torch.randn(2, *shape, dtype=torch.float64)
    for training in (True, False):
        layer.train(training)
        twin.train(training)
        y, dx, *affine = gradients(layer, x, dy)
        expected, expected_dx, *expected_affine = gradients(twin, x.movedim(axis, 1), dy.movedim(axis, 1))
        torch.testing.assert_close(y.movedim(axis, 1), expected)
        torch.testing.assert_close(dx.movedim(axis, 1), expected_dx)
        torch.testing.assert_close(affine, expected_affine)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@each_axis
def test_outputs_are_those_of_the_plain_definitions(shape, axis):
    x = torch.randn(shape, dtype=torch.float64)
    for name, layer in {
        "iter_norm": IterNorm(6, group_size=4, axis=axis, dtype=torch.float64),
        "group_whiten": GroupWhitening(3, 6, axis=axis, dtype=torch.float64),
    }.items():
        weight, bias = (each.detach().numpy() for each in with_affine(layer).parameters())
        options = {"group_size": 4} if name == "iter_norm" else {"num_groups": 3}
        expected = getattr(reference, name)(x.numpy(), weight, bias, axis=axis, method="newton", **options)
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-10)


@each_layer
def test_gradients_of_sequences_are_those_of_finite_differences(make):
    layer = with_affine(make(axis=-1, dtype=torch.float64))
    assert torch.autograd.gradcheck(layer, torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True))


@each_layer
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_permuted_view_is_whitened_in_its_memory_order(make, training):
    """Such is the output of a convolution that the next layers take as (N, H, W, C): result and gradient stay so."""
    layer, twin = (make(axis=axis).train(training) for axis in (-1, 1))
    x = torch.randn(5, 6, 4, 3, requires_grad=True)
    y = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x)
    expected = twin(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.pow(3).sum(), x)[0])


@each_layer
def test_half_precision_and_autocast(make):
    layer, x = make(axis=-1), torch.randn(8, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), copy.deepcopy(layer)(x.bfloat16().float()), atol=0.05, rtol=0.01)


@each_layer
def test_compile_whole_graph(make):
    torch._dynamo.reset()
    layer = make(axis=-1, dtype=torch.float64, iterations=2)  # few operations, to be quick
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (5, 7):
        x = torch.randn(4, length, 6, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@each_layer
@older_exporter
def test_onnx_of_sequences(make):
    layer, x = make(axis=-1), torch.randn(8, 5, 6)
    layer(x)
    layer.eval()
    others = x, torch.randn(3, 5, 6)
    for other, result in zip(others, in_onnxruntime(layer, x, others, **OLDER), strict=True):
        torch.testing.assert_close(result, layer(other).detach(), atol=1e-5, rtol=1e-5)


def test_onnx_of_sequences_by_the_newer_exporter():
    pytest.importorskip("onnxscript")
    network = torch.nn.Sequential(IterNorm(6, group_size=4, axis=-1), GroupWhitening(3, 6, axis=-1)).eval()
    x, other = torch.randn(8, 5, 6), torch.randn(3, 7, 6)
    sizes = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)},)
    (result,) = in_onnxruntime(network, x, [other], dynamo=True, dynamic_shapes=sizes, verbose=False)
    torch.testing.assert_close(result, network(other).detach(), atol=1e-5, rtol=1e-5)


@each_layer
def test_tracking_measures_the_channels_of_the_layer(make):
    networks = [torch.nn.Sequential(make(axis=axis, method="eigh", eps=0.0)) for axis in (-1, 1)]
    x, rows = torch.randn(50, 9, 6), []
    for network, inputs in zip(networks, (x, x.transpose(1, 2)), strict=True):
        with track(network) as tracking:
            network(inputs)
        rows += tracking.rows
    measures = ([value for value in vars(row).values() if isinstance(value, float)] for row in rows)
    np.testing.assert_allclose(*measures, rtol=1e-3, atol=1e-6)


@each_layer
def test_samples_without_positions_pass_with_gradients_of_zero(make):
    layer, x = make(axis=-1), torch.zeros(4, 0, 6, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert all(torch.equal(parameter.grad, torch.zeros(6)) for parameter in layer.parameters())


def test_the_repr_has_the_axis():
    assert "axis=-1" in repr(IterNorm(6, axis=-1))
    assert "axis=-1" in repr(GroupWhitening(3, 6, axis=-1))


def test_conversion_keeps_the_axis_and_refuses_layers_without_one():
    network = torch.nn.Sequential(IterNorm(6, axis=-1))
    (converted,) = convert(network, "group_whitening", num_groups=3)
    assert converted.axis == -1
    (back,) = convert(torch.nn.Sequential(converted), "iter_norm")
    assert back.axis == -1
    for kind in ("batch_norm", "group_norm"):
        with pytest.raises(ValueError, match=r"layer '0' has its channels at axis=-1"):
            convert(network, kind)
    with pytest.raises(TypeError, match="axis=-1 is no argument"):
        convert(torch.nn.Sequential(torch.nn.BatchNorm2d(6)), "iter_norm", axis=-1)


def test_folding_leaves_layers_with_another_axis():
    network = torch.nn.Sequential(torch.nn.Linear(6, 6), IterNorm(6, axis=-1), IterNorm(6, axis=1)).eval()
    folded, report = fold(network, return_report=True)
    assert next(change.note for change in report) == "it has its channels at axis=-1"
    x = torch.randn(4, 6, 6)
    torch.testing.assert_close(folded(x), network(x))


WRONG = {
    "channels": (lambda: IterNorm(4, axis=-1)(torch.randn(2, 4, 3)), r"\(2, 4, 3\): num_features=4 .* at axis=-1"),
    "rank": (lambda: IterNorm(4, axis=-1)(torch.randn(4)), r"shape \(4,\): at least 2 dimensions"),
    "no such axis": (lambda: IterNorm(4, axis=3)(torch.randn(2, 3, 4)), r"axis=3 holds no channels .*: use 0 to 2"),
    "samples": (lambda: GroupWhitening(2, 4, axis=0)(torch.randn(4, 3)), r"axis=0 holds no channels .*: use 1 to 1"),
    "one sample": (lambda: IterNorm(4, axis=-1)(torch.randn(1, 1, 4)), r"\(1, 1, 4\) gives 1 samples a channel"),
}


@pytest.mark.parametrize(("use", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def test_an_axis_is_an_integer():
    with pytest.raises(TypeError, match=r"axis='last' must be an integer"):
        IterNorm(4, axis="last")
