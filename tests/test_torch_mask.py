"""A mask leaves padded positions out of the statistics of PyTorch's IterNorm."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import reference  # noqa: E402

from polywhiten.torch import IterNorm, fold, track  # noqa: E402
from polywhiten.torch.backend import BACKEND  # noqa: E402

CHANNELS = 5
OPTIONS = {
    "newton": {},
    "eigh of covariances": {"track": "covariance", "method": "eigh"},
    "plain average": {"momentum": None},
    "no affine map": {"affine": False},
}
AXES = {"channels first": 1, "channels last": -1}
each_axis = pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
each_path = pytest.mark.parametrize("compiled", [True, False], ids=["compiled kernels", "PyTorch's operations"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def padded(*shape, dtype=torch.float64):
    """Return sequences of different lengths, with large values at the padded positions, and their mask."""
    x = torch.randn(*shape, CHANNELS, dtype=dtype)
    mask = torch.rand(shape) < 0.7
    x[~mask] += 100
    return x, mask


def trained(**options):
    layer = IterNorm(CHANNELS, **{"group_size": 3, "dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
    return layer


def gradients(layer, x, dy, *mask):
    x = x.detach().requires_grad_()
    y = layer(x, *mask)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_axis
@each_path
def test_masked_positions_leave_no_trace(options, axis, compiled, monkeypatch):
    """Output, gradients and averages are those of two steps on the unmasked positions alone."""
    if not compiled:
        monkeypatch.setattr("polywhiten.torch.cpu.is_available", lambda: False)
    masked = trained(axis=axis, **options)
    plain = trained(**options)
    plain.load_state_dict(masked.state_dict())
    for _ in range(2):
        x, mask = padded(6, 7)
        dy = torch.randn_like(x) * mask[..., None]
        y, dx, *affine = gradients(masked, x.movedim(-1, axis), dy.movedim(-1, axis), mask)
        expected, expected_dx, *expected_affine = gradients(plain, x[mask], dy[mask])
        dx = dx.movedim(axis, -1)
        torch.testing.assert_close(y.movedim(axis, -1)[mask], expected)
        torch.testing.assert_close(dx[mask], expected_dx)
        torch.testing.assert_close(affine, expected_affine)
        assert not dx[~mask].any()
    with torch.no_grad():
        y, expected = masked(x.movedim(-1, axis), mask), plain(x[mask])
    torch.testing.assert_close(y.movedim(axis, -1)[mask], expected)
    torch.testing.assert_close(masked.state_dict(), plain.state_dict())


def test_all_positions_are_whitened_by_the_statistics_of_the_unmasked_ones():
    """So are the padded ones, as in Keras' layer; the statistics are those of the plain definitions."""
    (x, mask), layer = padded(6, 7), IterNorm(CHANNELS, group_size=3, axis=-1, dtype=torch.float64)
    y, rows = layer(x, mask).detach().numpy(), x.numpy()[mask.numpy()]
    mean = rows.mean(axis=0)
    for part in (slice(0, 3), slice(3, 5)):
        cov = np.cov(rows[:, part].T, bias=True) + 1e-5 * np.eye(part.stop - part.start)
        whitener = reference.inverse_sqrt(cov, "newton")
        np.testing.assert_allclose(y[..., part], (x.numpy() - mean)[..., part] @ whitener, rtol=1e-8, atol=1e-10)


@each_axis
def test_first_and_second_derivatives(axis):
    layer, (x, mask) = trained(axis=axis, method="eigh", eps=0.1), padded(3, 4)
    x = (x - 100 * ~mask[..., None]).movedim(-1, axis).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, mask), x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, mask), x, fast_mode=True)


@pytest.mark.parametrize("shape", [(8,), (4, 5, 3), (2, 3, 2, 2)], ids=str)
def test_a_mask_has_the_shape_of_the_input_without_its_channels(shape):
    layer, (x, mask) = IterNorm(CHANNELS, axis=-1, dtype=torch.float64), padded(*shape)
    plain = copy.deepcopy(layer)
    torch.testing.assert_close(layer(x, mask)[mask], plain(x[mask]))


def test_a_mask_that_leaves_nothing_out_changes_nothing():
    layer, x = trained(axis=-1), torch.randn(6, 7, CHANNELS, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    torch.testing.assert_close(layer(x, torch.ones(6, 7, dtype=torch.bool)), plain(x))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


def test_evaluation_by_running_averages_ignores_the_mask():
    layer, (x, mask) = trained(axis=-1), padded(6, 7)
    layer(x, mask)
    layer.eval()
    torch.testing.assert_close(layer(x, mask), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_without_running_averages_every_batch_is_whitened_by_its_unmasked_positions(training):
    layer, (x, mask) = trained(axis=-1, track_running_stats=False).train(training), padded(6, 7)
    torch.testing.assert_close(layer(x, mask)[mask], layer(x[mask]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("number", [0, 1], ids=["no position", "one position"])
def test_what_has_no_covariance_is_not_averaged(number, on_nonfinite, options):
    layer, x = trained(axis=-1, on_nonfinite=on_nonfinite, **options), torch.randn(4, 3, CHANNELS).double()
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[0, :number] = True
    before = copy.deepcopy(layer.state_dict())
    y = layer(x.requires_grad_(), mask)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_nonfinite_unmasked_positions_raise_an_error_on_demand_and_masked_ones_do_not():
    layer, (x, mask) = trained(axis=-1, on_nonfinite="raise"), padded(6, 7)
    x[~mask] = torch.nan
    assert torch.isfinite(layer(x, mask)[mask]).all()
    x[mask] = torch.inf
    with pytest.raises(ValueError, match="on_nonfinite='raise'"):
        layer(x, mask)
    assert layer.num_batches_tracked == 1


def test_an_empty_batch_passes():
    layer = trained(axis=-1)
    assert layer(torch.zeros(0, 7, CHANNELS), torch.zeros(0, 7, dtype=torch.bool)).shape == (0, 7, CHANNELS)
    assert layer.num_batches_tracked == 0


def test_joined_launches_which_know_no_mask_are_not_asked(monkeypatch):
    monkeypatch.setattr(type(BACKEND), "whiten_and_average", lambda *arguments: pytest.fail("it ignores the mask"))
    layer, (x, mask) = trained(axis=-1), padded(6, 7)
    layer(x, mask)
    assert layer.num_batches_tracked == 1


@pytest.mark.filterwarnings("error::UserWarning")
def test_compile_whole_graph_with_dynamic_lengths():
    torch._dynamo.reset()
    layer = trained(axis=-1, iterations=2, group_size=CHANNELS)  # few operations, to be quick
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (5, 7):
        x, mask = padded(6, length)
        y, dx, *affine = gradients(compiled, x, x, mask)
        expected, expected_dx, *expected_affine = gradients(twin, x, x, mask)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dx, expected_dx)
        torch.testing.assert_close(affine, expected_affine)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_half_precision_and_autocast_compute_statistics_in_float32():
    layer, (x, mask) = IterNorm(CHANNELS, axis=-1), padded(20, 7, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, mask)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), copy.deepcopy(layer)(x.float(), mask), atol=0.05, rtol=0.01)
    torch.testing.assert_close(layer.running_mean, 0.1 * x[mask].float().mean(dim=0))


def test_channels_last_memory():
    layer, mask = trained(), torch.rand(6, 4, 3) < 0.7
    x = torch.randn(6, CHANNELS, 4, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    y = layer(x.requires_grad_(), mask)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    plain = x.detach().contiguous().requires_grad_()
    expected = layer(plain, mask)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.pow(3).sum(), plain)[0])


def test_output_can_be_changed_in_place():
    layer, (x, mask) = trained(axis=-1), padded(6, 7)
    x.requires_grad_()
    gradients = [torch.autograd.grad(relu(layer(x, mask)).sum(), x)[0] for relu in (torch.relu_, torch.relu)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        y = layer(x, mask)
    y += torch.ones((), requires_grad=True)
    assert y.requires_grad


def test_fx_records_a_mask_by_keyword():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = trained(axis=-1)

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    network, (x, mask) = Network(), padded(6, 7)
    graph = torch.fx.symbolic_trace(copy.deepcopy(network))
    (node,) = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert [*node.kwargs] == ["mask"]
    torch.testing.assert_close(graph(x, mask), network(x, mask))


def test_folded_networks_are_called_with_a_mask_as_before():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.before = torch.nn.Conv1d(CHANNELS, CHANNELS, 1, dtype=torch.float64)
            self.norm = trained()
            self.after = torch.nn.Conv1d(CHANNELS, CHANNELS, 1, dtype=torch.float64)

        def forward(self, x, mask):
            return self.after(self.norm(self.before(x), mask))

    network, (x, mask) = Network().eval(), padded(6, 7)
    folded = fold(network)
    torch.testing.assert_close(folded(x.transpose(1, 2), mask), network(x.transpose(1, 2), mask))


@pytest.mark.parametrize("by_name", [False, True])
@each_axis
def test_tracking_measures_the_unmasked_positions(by_name, axis):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = IterNorm(CHANNELS, axis=axis, method="eigh", eps=0.0, dtype=torch.float64)

        def forward(self, x, mask):
            return self.norm(mask=mask, x=x) if by_name else self.norm(x, mask)

    network, (x, mask) = Network(), padded(20, 7)
    with track(network) as tracking:
        network(x.movedim(-1, axis), mask)
    (row,) = tracking.rows
    assert row.output_whitening_error < 1e-6
    assert row.input_whitening_error < 5  # with the padded positions it is above 1000


def test_a_mask_gives_no_warning_of_too_few_samples(recwarn):
    """The number of positions is known to the device alone, which a warning would have to wait for."""
    layer, (x, mask) = trained(axis=-1), padded(2, 2)
    layer(x, mask)
    assert not recwarn.list


WRONG = {
    "shape": (torch.ones(4, 6, dtype=torch.bool), ValueError, r"mask has shape \(4, 6\): \(4, 5\) is needed"),
    "of every value": (torch.ones(4, 5, 6, dtype=torch.bool), ValueError, r"\(4, 5, 6\): \(4, 5\) .* x, \(4, 5, 6\)"),
    "numbers": (torch.ones(4, 5), TypeError, r"mask has dtype torch.float32: booleans .* mask.bool\(\)"),
    "no tensor": (np.ones((4, 5), bool), TypeError, r"mask is a numpy.ndarray: .* torch.as_tensor"),
    "device": (torch.ones(4, 5, dtype=torch.bool, device="meta"), ValueError, r"mask is on meta and x on cpu"),
}


@pytest.mark.parametrize(("mask", "error", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_wrong_masks(mask, error, message, training):
    layer = IterNorm(6, axis=-1).train(training)
    with pytest.raises(error, match=message):
        layer(torch.randn(4, 5, 6), mask)
    assert layer.num_batches_tracked == 0
