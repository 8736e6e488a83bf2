"""What is special about PyTorch: double backward, transforms, compilation, memory formats, and serialization."""

import copy
import functools
import inspect
import io
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad  # noqa: E402

import polywhiten as pw  # noqa: E402
from polywhiten.analysis import InfeasibleWarning  # noqa: E402
from polywhiten.torch import GroupWhitening, IterNorm, averages  # noqa: E402

METHODS = ("newton", "eigh", "minimax")
LAYERS = {
    "iter_norm": lambda **k: IterNorm(6, group_size=4, **k),
    "group_whitening": lambda **k: GroupWhitening(3, 6, **k),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
each_method = pytest.mark.parametrize("method", METHODS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(layer, training):
    """Return the layer in training or evaluation mode, with nontrivial running statistics and affine map."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
        layer.train()(torch.randn(8, 6, 4).to(next(layer.parameters(), torch.empty(0)).dtype) * 2 + 1)
    return layer.train(training)


@each_layer
@each_method
@in_both_modes
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_first_and_second_derivatives(make, method, training, affine):
    layer = trained(make(method=method, affine=affine, dtype=torch.float64), training)
    names, parameters = zip(*layer.named_parameters(), strict=True) if affine else ((), ())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    arguments = torch.randn(5, 6, 3, dtype=torch.float64, requires_grad=True), *parameters
    assert torch.autograd.gradcheck(run, arguments)
    assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True)


def test_second_derivative_with_equal_eigenvalues():
    """Two channels are constant, for which PyTorch's derivative of eigh is NaN."""
    x = torch.randn(8, 4, 3, dtype=torch.float64)
    x[:, 2:] = 1
    x.requires_grad_()
    (dx,) = torch.autograd.grad(pw.iter_norm(x, method="eigh", eps=0.1).pow(3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.pow(2).sum(), x)
    assert torch.isfinite(ddx).all()


def test_statistics_are_differentiable():
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(pw.whitening_stats(x, group_size=3)), x)
    assert torch.autograd.gradcheck(lambda x: pw.inverse_sqrt(x @ x.T + 5 * torch.eye(9)), x)


def test_tangents_of_forward_mode():
    """Compiled kernels don't know tangents, and must not be used where they would lose them."""
    layer = trained(IterNorm(6, group_size=4, dtype=torch.float64), False).requires_grad_(False)
    for run, x in ((layer, torch.randn(5, 6).double()), (pw.inverse_sqrt, torch.eye(3).double() + 1)):
        dx = torch.randn_like(x)
        with torch.no_grad(), forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(x, dx))).tangent
        torch.testing.assert_close(tangent, (run(x + 1e-6 * dx) - run(x - 1e-6 * dx)) / 2e-6, rtol=1e-6, atol=1e-6)


def test_running_averages_that_a_users_graph_needs_are_known_to_have_changed():
    layer, weight = IterNorm(6), torch.ones(6, requires_grad=True)
    y = weight * layer.running_mean
    layer(torch.randn(5, 6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


CHANGES = {
    "a step of training": lambda layer: layer.train()(7 * torch.randn(50, 6)),
    "reset_running_stats": lambda layer: layer.reset_running_stats(),
    "load_state_dict": lambda layer: layer.load_state_dict(IterNorm(6, group_size=4, track=layer.track).state_dict()),
    "in place": lambda layer: [each.mul_(2) for each in layer.buffers()],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("track", ["whitener", "covariance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_an_evaluation_is_that_of_its_own_statistics(change, track, dtype):
    """Changes of the running averages before backward make no difference."""
    layer = trained(IterNorm(6, group_size=4, track=track, dtype=dtype), False)
    x = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    leaves = x, *layer.parameters()
    expected = torch.autograd.grad(layer(x).pow(2).sum(), leaves)
    loss = layer(x).pow(2).sum()
    _, pullback = torch.func.vjp(layer, x.detach())
    (of_ones,) = torch.autograd.grad(layer(x).sum(), x)
    change(layer)
    for found, wanted in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(pullback(torch.ones(5, 6, dtype=dtype))[0], of_ones)


def test_evaluation_without_a_graph_copies_no_statistics(monkeypatch):
    layer = trained(IterNorm(6, group_size=4), False).requires_grad_(False)
    copied = []
    monkeypatch.setattr(torch.Tensor, "clone", copied.append)
    layer(torch.randn(5, 6))
    layer.requires_grad_()
    with torch.no_grad():
        layer(torch.randn(5, 6))
    assert not copied


def test_backward_keeps_the_input_and_no_copy_of_it():
    x = torch.randn(16, 32, 20, 20, requires_grad=True)
    kept = []
    for run in (
        lambda x: pw.iter_norm(x, group_size=16, iterations=50),
        lambda x: pw.group_whiten(x, num_groups=8, iterations=50, weight=torch.ones(32), bias=torch.ones(32)),
        IterNorm(32),
        GroupWhitening(8, 32),
    ):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            run(x)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        assert storages.pop(x.untyped_storage().data_ptr()) == x.nbytes
        assert sum(storages.values()) < 0.02 * x.nbytes


@each_method
def test_function_transforms(method):
    xs = torch.randn(3, 5, 6, 4, dtype=torch.float64)
    for run in (
        lambda x: pw.iter_norm(x, group_size=4, method=method).pow(3).sum(),
        lambda x: pw.group_whiten(x, num_groups=3, method=method).pow(3).sum(),
    ):
        gradient = torch.func.grad(run)
        leaf = xs[0].clone().requires_grad_()
        run(leaf).backward()
        torch.testing.assert_close(gradient(xs[0]), leaf.grad)
        torch.testing.assert_close(torch.vmap(gradient)(xs), torch.stack([gradient(x) for x in xs]))
        hessian = torch.autograd.functional.hessian(run, xs[0])
        torch.testing.assert_close(torch.func.jacrev(gradient)(xs[0]), hessian)


@each_method
def test_gradients_in_batches(method):
    """`is_grads_batched` uses an older `vmap`, which supports fewer operations."""
    x = torch.randn(5, 6, 4, dtype=torch.float64, requires_grad=True)
    for y in (
        pw.iter_norm(x, group_size=3, method=method),
        pw.group_whiten(x, num_groups=3, method=method),
    ):
        directions = torch.randn(2, *y.shape, dtype=y.dtype)
        one_by_one = [torch.autograd.grad(y, x, direction, retain_graph=True)[0] for direction in directions]
        (found,) = torch.autograd.grad(y, x, directions, is_grads_batched=True)
        torch.testing.assert_close(found, torch.stack(one_by_one))


@each_layer
@in_both_modes
@pytest.mark.filterwarnings("error::UserWarning")
def test_compile_whole_graph_with_dynamic_batch(make, training):
    torch._dynamo.reset()
    layer = trained(make(method="minimax"), training).double()  # eager code uses other kernels, which round differently
    twin = copy.deepcopy(layer)
    graphs = 0

    def backend(graph, _inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for batch in (5, 7, 9, 11):
        a = torch.randn(batch, 6, 4, dtype=torch.float64, requires_grad=True)
        b = a.detach().clone().requires_grad_()
        y, expected = compiled(a), twin(b)
        y.pow(3).sum().backward()
        expected.pow(3).sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(a.grad, b.grad)
    assert graphs == 2, "one graph for the first batch size, one for all others"
    for ours, theirs in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


@each_method
@pytest.mark.filterwarnings("error::UserWarning")
def test_compile_functions(method):
    torch._dynamo.reset()
    x = torch.randn(5, 6, 4)
    for run in (
        lambda x: pw.iter_norm(x, group_size=4, method=method),
        lambda x: pw.group_whiten(x, num_groups=3, method=method),
        lambda x: pw.apply_whitening(x, pw.whitening_stats(x, group_size=4, method=method)),
    ):
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_compile_with_inductor():
    torch._dynamo.reset()
    layer = IterNorm(6, group_size=4)
    x, twin = torch.randn(5, 6, 4, 4, requires_grad=True), copy.deepcopy(layer)
    y, expected = torch.compile(layer, fullgraph=True)(x), twin(x)
    torch.testing.assert_close(y, expected)
    (dx,), (wanted,) = (torch.autograd.grad(out.pow(3).sum(), x) for out in (y, expected))
    torch.testing.assert_close(dx, wanted, atol=1e-4, rtol=1e-4)


@each_layer
@in_both_modes
def test_export_with_dynamic_batch(make, training):
    layer = trained(make(), training)
    x = torch.randn(5, 6, 4, 4)
    program = torch.export.export(copy.deepcopy(layer), (x,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2)}})
    other = torch.randn(9, 6, 4, 4)
    torch.testing.assert_close(program.module()(other), layer(other))


@each_layer
@in_both_modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_computes_statistics_in_float32(make, training, dtype):
    layer = make(method="eigh")
    x = (torch.randn(64, 6, 5) @ torch.randn(5, 5) + 30).to(dtype)
    layer.momentum = 1.0
    layer(x.float())
    layer.train(training)
    weight_gradients = []
    for automatic in (True, False):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=automatic):
            y = copy.deepcopy(layer)(x)
            assert layer(x.float()).dtype == torch.float32
            loss = layer(x).float().pow(3).mean()
        loss.backward()
        assert y.dtype == dtype
        weight_gradients.append(layer.weight.grad.clone())
        torch.testing.assert_close(y.float(), copy.deepcopy(layer)(x.float()), atol=0.05, rtol=0.01)
    torch.testing.assert_close(*weight_gradients)
    assert all(p.dtype == torch.float32 for p in layer.state_dict().values() if p.is_floating_point())


@each_layer
@in_both_modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_layer_of_another_dtype(make, training, dtype):
    layer = trained(make().to(dtype), training)
    y = layer(torch.randn(8, 6, 4, dtype=dtype))
    assert y.dtype == dtype
    assert torch.isfinite(y).all()


FORMATS = {
    "channels_last": ((5, 6, 4, 3), torch.channels_last),
    "channels_last_3d": ((5, 6, 4, 3, 2), torch.channels_last_3d),
    "contiguous 2d": ((5, 6, 4, 3), torch.contiguous_format),
    "contiguous 3d": ((5, 6, 4, 3, 2), torch.contiguous_format),
}


@each_layer
@in_both_modes
@pytest.mark.parametrize(("shape", "memory_format"), FORMATS.values(), ids=FORMATS)
def test_output_and_gradient_keep_the_memory_format(make, training, shape, memory_format):
    layer = trained(make(), training)
    x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x)
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)
    plain = x.detach().contiguous().requires_grad_()
    expected = layer(plain)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.pow(3).sum(), plain)[0], atol=1e-4, rtol=1e-4)


@each_layer
@in_both_modes
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_output_can_be_changed_in_place(make, training, affine, channels_last):
    layer = make(affine=affine).train(training)
    x = torch.randn(5, 6, 4, 4)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    gradients = [torch.autograd.grad(relu(layer(x)).sum(), x)[0] for relu in (torch.relu_, torch.relu)]
    torch.testing.assert_close(*gradients)


@each_layer
def test_output_without_gradients_is_no_view(make):
    """A view couldn't be changed in place by tensors with gradients, as in the block of a reentrant checkpoint."""
    with torch.no_grad():
        y = make()(torch.randn(5, 6, 4, 4))
    y += torch.ones((), requires_grad=True)
    assert y.requires_grad


@each_layer
@in_both_modes
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2],
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.flip(0).transpose(2, 3),
        lambda x: x[:, :, :1, :1].expand(-1, -1, 4, 4),
        lambda x: x.permute(0, 1, 3, 2),
        lambda x: x[:, :, 0],
        lambda x: x[:, :, 0, 0],
        lambda x: x.unsqueeze(-1),
    ],
)
def test_any_stride_and_rank(make, training, view):
    layer = trained(make(dtype=torch.float64), training)
    x = torch.randn(8, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    y, expected = layer(view(x)), layer(view(x).contiguous())
    torch.testing.assert_close(y, expected)
    (dx,), (wanted,) = (torch.autograd.grad(out.pow(3).sum(), x) for out in (y, expected))
    torch.testing.assert_close(dx, wanted)


@in_both_modes
def test_empty_batch(training):
    layer = trained(IterNorm(6, group_size=4), False)
    assert layer(torch.zeros(0, 6, 4, 4)).shape == (0, 6, 4, 4)
    assert GroupWhitening(3, 6).train(training)(torch.zeros(0, 6, 4, 4)).shape == (0, 6, 4, 4)


@each_layer
@in_both_modes
@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 4, 4), (4, 6, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_has_no_samples_passes_with_gradients_of_zero_and_changes_no_average(make, training, shape, dtype):
    """One process of a distributed run may get a batch without samples."""
    layer = trained(make(), training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    y = torch.relu_(layer(x))
    assert (y.shape, y.dtype) == (shape, dtype)
    y.sum().backward()
    assert x.grad.shape == shape
    for parameter in layer.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros(6))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@each_layer
def test_evaluation_has_gradients_of_everything(make):
    layer = trained(make(), False)
    x = torch.randn(4, 6, 3, requires_grad=True)
    layer(x).pow(3).sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (x, *layer.parameters()))


@each_layer
def test_copies_and_saved_layers_are_the_same(make):
    layer, x = trained(make(method="eigh"), False), torch.randn(4, 6, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = make(method="eigh").eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
        assert repr(twin) == repr(layer)


def test_state_has_the_names_of_batch_norm():
    assert list(IterNorm(4).state_dict()) == [
        "weight",
        "bias",
        "running_mean",
        "running_whitener",
        "num_batches_tracked",
    ]
    assert "running_covariance" in IterNorm(4, track="covariance").state_dict()
    assert list(IterNorm(4, affine=False, track_running_stats=False).state_dict()) == []
    assert list(GroupWhitening(2, 4).state_dict()) == list(torch.nn.GroupNorm(2, 4).state_dict())


def test_arguments_in_the_order_of_batch_norm_and_group_norm():
    ours, theirs = IterNorm(4, 1e-3, 0.2, False, False), torch.nn.BatchNorm2d(4, 1e-3, 0.2, False, False)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        assert getattr(ours, name) == getattr(theirs, name)
    ours, theirs = GroupWhitening(2, 4, 1e-3, False), torch.nn.GroupNorm(2, 4, 1e-3, False)
    for name in ("num_groups", "num_channels", "eps", "affine"):
        assert getattr(ours, name) == getattr(theirs, name)


PAIRS = {
    "BatchNorm": (torch.nn.BatchNorm2d, IterNorm, (6,)),
    "GroupNorm": (torch.nn.GroupNorm, GroupWhitening, (3, 6)),
}


@pytest.mark.parametrize(("theirs", "ours", "sizes"), PAIRS.values(), ids=PAIRS)
def test_every_argument_of_pytorchs_own_layer_is_taken(theirs, ours, sizes):
    wanted = inspect.signature(theirs).parameters
    assert wanted.keys() <= inspect.signature(ours).parameters.keys()


@pytest.mark.parametrize(("theirs", "ours", "sizes"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_a_layer_without_a_bias_has_the_weight_alone(theirs, ours, sizes, affine):
    layer = ours(*sizes, affine=affine, bias=False)
    if "bias" in inspect.signature(theirs).parameters:  # since PyTorch 2.13
        norm = theirs(*sizes, affine=affine, bias=False)
        assert [name for name, _ in layer.named_parameters()] == [name for name, _ in norm.named_parameters()]
    assert layer.bias is None
    assert (layer.weight is not None) == affine
    assert f"affine={affine}, bias=False" in repr(layer)
    assert "affine=True, bias=True" in repr(ours(*sizes))
    layer.reset_parameters()
    x = torch.randn(8, 6, 5, requires_grad=True)
    torch.testing.assert_close(layer(x), ours(*sizes)(x))
    if affine:
        layer(x).pow(3).sum().backward()
        assert layer.weight.grad.abs().sum() > 0
    layer.eval()(x)


def test_no_momentum_is_the_plain_average():
    x, layer = torch.randn(16, 5, 4, dtype=torch.float64), IterNorm(5, momentum=None, dtype=torch.float64)
    for shift in (1.0, 2.0, 6.0):
        layer(x + shift)
    torch.testing.assert_close(layer.running_mean, x.mean(dim=(0, 2)) + 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_batches_raise_an_error_on_demand(bad):
    x = torch.randn(16, 5, 4)
    x[3, 4, 1] = bad
    with pytest.raises(ValueError, match="on_nonfinite='raise'"):
        IterNorm(5, group_size=3, on_nonfinite="raise")(x)


@pytest.mark.parametrize("track", ["whitener", "covariance"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_running_averages_stay_finite_in_their_own_dtype(dtype, track):
    """They stay finite even if the statistics' dtype can hold larger values."""
    layer, x = IterNorm(6, track=track, dtype=dtype, momentum=0.5), torch.randn(40, 6, dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    large = x * 1e25 + 1e39
    assert torch.isfinite(layer(large)).all()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer(x)
    assert layer.num_batches_tracked == 1
    layer.on_nonfinite = "raise"
    with pytest.raises(ValueError, match=r"too large .* of the running averages"):
        layer(large)


def test_running_averages_take_what_they_can_hold():
    """A variance of 1e5 is above the largest float16, but the averaged tenth of it isn't, nor are means of 4e4."""
    noise = torch.randn(400, 6)
    for momentum, x in ((0.1, 316 * noise), (1.0, 200 * noise + 4e4)):
        layers = [IterNorm(6, track="covariance", momentum=momentum, dtype=t) for t in (torch.float16, torch.float32)]
        for layer in layers:
            layer(x)
            assert layer.num_batches_tracked == 1
        torch.testing.assert_close(
            layers[0].running_covariance.float(), layers[1].running_covariance, rtol=2e-3, atol=1
        )


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
def test_no_arithmetic_of_running_averages_makes_finite_numbers_infinite(momentum, monkeypatch):
    largest = torch.finfo(torch.float32).max
    for compiled in (averages.cpu.update_averages, lambda *arguments: None):
        monkeypatch.setattr(averages.cpu, "update_averages", compiled)
        running, count = torch.tensor([-largest, 1.0]), torch.tensor(1)
        averages.update_averages((running,), (torch.tensor([largest, 2.0]),), (), count, momentum)
        assert torch.isfinite(running).all()


def test_without_running_statistics_every_input_is_whitened_by_itself():
    x, layer = torch.randn(16, 5, 4), IterNorm(5, track_running_stats=False)
    assert not list(layer.buffers())
    torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=0, atol=0)


@pytest.mark.parametrize("track", ["whitener", "covariance"])
def test_averages_set_to_none_are_those_of_batch_norm(track):
    """Evaluation then uses the batch's statistics, and training averages nothing but counts the batches."""
    x, layer = torch.randn(16, 6, 4), trained(IterNorm(6, track=track), False)
    layer.running_mean = None
    for use in (lambda: layer.train()(x), lambda: layer.eval()(x)):
        with pytest.raises(ValueError, match=f"running_mean is None and running_{track} isn't: set both to None"):
            use()
    setattr(layer, f"running_{track}", None)
    torch.testing.assert_close(layer.eval()(x), layer.train()(x))
    assert layer.num_batches_tracked == 2
    layer.num_batches_tracked = None
    torch.testing.assert_close(layer.eval()(x), layer.train()(x))
    layer.reset_running_stats()
    assert not list(layer.buffers())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_averages_without_a_count_are_those_of_batch_norm(momentum):
    """With a momentum they are updated; without one, the plain average can't be."""
    x, norm, layer = torch.randn(16, 6) + 3, torch.nn.BatchNorm1d(6, momentum=momentum), IterNorm(6, momentum=momentum)
    norm.num_batches_tracked = layer.num_batches_tracked = None
    for each in (norm, layer):
        each(x)
    torch.testing.assert_close(layer.running_mean, norm.running_mean)
    layer.eval()(x)
    layer.reset_running_stats()
    torch.testing.assert_close(layer.running_mean, torch.zeros(6))


def test_a_layer_that_no_longer_tracks_evaluates_by_its_averages_as_batch_norm_does():
    x, norm, layer = torch.randn(16, 1) + 3, torch.nn.BatchNorm1d(1), IterNorm(1, method="eigh", momentum=0.0)
    for each in (norm, layer):
        each.track_running_stats = False
        each(x)
    torch.testing.assert_close(layer.eval()(x), norm.eval()(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.running_mean, norm.running_mean)


def test_reset_forgets():
    layer = trained(IterNorm(6, group_size=4), True)
    layer.reset_parameters()
    for name, value in IterNorm(6, group_size=4).state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_meta_device_then_to_empty():
    layer = IterNorm(6, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(4, 6, 2))).all()


@each_layer
def test_warnings_name_the_line_of_the_layers_call(make):
    layer, x = make(), torch.randn(2, 6, 1)
    with pytest.warns(InfeasibleWarning) as warned:
        layer(x)
    assert warned[0].filename == __file__


WRONG = {
    "num_features": (lambda: IterNorm(0), ValueError, "num_features=0 must be 1 or more"),
    "track": (lambda: IterNorm(4, track="variance"), ValueError, "track='variance' is unknown: use one of 'whitener'"),
    "nonfinite": (lambda: IterNorm(4, on_nonfinite="warn"), ValueError, "on_nonfinite='warn' is unknown"),
    "momentum": (lambda: IterNorm(4, momentum=-1), ValueError, "momentum=-1.0 must be from 0 to 1, or None"),
    "momentum type": (lambda: IterNorm(4, momentum="0.1"), TypeError, "momentum='0.1' must be a number"),
    "eps": (lambda: IterNorm(4, eps=-1), ValueError, "eps=-1.0 must be 0 or more"),
    "groups": (lambda: GroupWhitening(32, 48), ValueError, "num_groups=32 doesn't divide 48 channels: use one of 1, 2"),
    "channels": (lambda: IterNorm(4)(torch.randn(2, 5, 3)), ValueError, r"x has shape \(2, 5, 3\): \(N, 4, ...\)"),
    "channels gw": (lambda: GroupWhitening(2, 4)(torch.randn(4)), ValueError, r"x has shape \(4,\): \(N, 4, ...\)"),
    "integers": (lambda: IterNorm(4)(torch.ones(3, 4, dtype=torch.int64)), TypeError, "x has dtype torch.int64"),
    "one sample": (lambda: IterNorm(4)(torch.randn(1, 4)), ValueError, r"\(1, 4\) gives 1 samples a channel"),
    "weight": (
        lambda: pw.iter_norm(torch.randn(3, 4), weight=np.ones(4)),
        TypeError,
        "weight is a numpy.ndarray: pass",
    ),
    "module": (lambda: pw.iter_norm(torch.nn.Linear(2, 2)), TypeError, "x is a torch.* pass an array"),
    "no array": (lambda: IterNorm(4)(np.ones((3, 4))), TypeError, "x is a numpy.ndarray: .* torch.as_tensor"),
}


@pytest.mark.parametrize(("use", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use(use, error, message):
    with pytest.raises(error, match=message):
        use()


class Block(torch.nn.Module):
    """A residual block that calls `norm_layer(channels)`, as those of torchvision and timm do."""

    def __init__(self, inputs, outputs, stride, norm_layer):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            norm_layer(outputs),
            torch.nn.ReLU(inplace=True),
            torch.nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            norm_layer(outputs),
        )
        self.skip = torch.nn.Sequential(torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm_layer(outputs))

    def forward(self, x):
        return (self.body(x) + self.skip(x)).relu_()


@pytest.mark.parametrize(
    "norm_layer",
    [IterNorm, functools.partial(GroupWhitening, 32), functools.partial(IterNorm, eps=1e-3, momentum=0.01)],
    ids=["IterNorm", "GroupWhitening", "keywords"],
)
def test_as_norm_layer_of_a_resnet(norm_layer):
    network = torch.nn.Sequential(
        Block(3, 64, 1, norm_layer),
        Block(64, 96, 2, norm_layer),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(96, 10),
    )
    x, labels = torch.randn(16, 3, 12, 12), torch.arange(16) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.isfinite(network.eval()(x)).all()
