"""`affine="coloring"`: PyTorch's IterNorm multiplies the whitened channels of a group by a learned matrix."""

import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import reference  # noqa: E402
from test_torch_export import OLDER, in_onnxruntime, older_exporter  # noqa: E402

from polywhiten.torch import GroupWhitening, IterNorm, convert, fold  # noqa: E402

CHANNELS, SIZE = 7, 3  # the last group has one channel
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
each_path = pytest.mark.parametrize("compiled", [True, False], ids=["compiled kernels", "PyTorch's operations"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(**options):
    """Return a layer with nontrivial matrices, bias and running averages."""
    layer = IterNorm(CHANNELS, **{"affine": "coloring", "group_size": SIZE, "dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer(torch.randn(50, CHANNELS, dtype=torch.float64) * 2 + 1)
    return layer


def defined(z, layer):
    """Return the coloring of whitened channels (N, C, ...) by its definition, group by group."""
    matrices = layer.weight.detach().numpy()
    groups = [(i, z[:, i : i + SIZE]) for i in range(0, CHANNELS, SIZE)]
    colored = [
        np.einsum("ij,nj...->ni...", matrices[i // SIZE, : part.shape[1], : part.shape[1]], part) for i, part in groups
    ]
    bias = layer.bias.detach().numpy().reshape(-1, *[1] * (z.ndim - 2))
    return np.concatenate(colored, axis=1) + bias


@each_path
def test_output_in_training_is_that_of_the_definition(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("polywhiten.torch.cpu.is_available", lambda: False)
    layer, x = trained(), torch.randn(8, CHANNELS, 5, dtype=torch.float64)
    expected = defined(reference.iter_norm(x.numpy(), group_size=SIZE, method="newton"), layer)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-9)
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("track", ["whitener", "covariance"])
def test_output_in_evaluation_is_the_coloring_of_the_output_without_it(track):
    layer = trained(track=track).eval()
    plain = IterNorm(CHANNELS, affine=False, group_size=SIZE, track=track, dtype=torch.float64).eval()
    plain.load_state_dict(dict(layer.named_buffers()))
    x = torch.randn(8, CHANNELS, 5, dtype=torch.float64)
    np.testing.assert_allclose(layer(x).detach().numpy(), defined(plain(x).numpy(), layer), atol=1e-9)


@in_both_modes
@each_path
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_first_and_second_derivatives(training, compiled, bias, monkeypatch):
    if not compiled:
        monkeypatch.setattr("polywhiten.torch.cpu.is_available", lambda: False)
    layer = trained(bias=bias).train(training)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    arguments = torch.randn(5, CHANNELS, 2, dtype=torch.float64, requires_grad=True), *parameters
    assert torch.autograd.gradcheck(run, arguments, fast_mode=not compiled)
    assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True)


def test_the_unused_rest_of_a_smaller_groups_matrix_has_a_gradient_of_zero():
    layer = trained()
    layer(torch.randn(8, CHANNELS).double()).pow(3).sum().backward()
    rest = torch.ones(SIZE, SIZE, dtype=torch.bool)
    rest[0, 0] = False
    assert not layer.weight.grad[-1][rest].any()
    assert layer.weight.grad[-1, 0, 0] != 0


def test_a_new_layer_does_what_one_with_weights_does():
    layer, plain = IterNorm(CHANNELS, affine="coloring", group_size=SIZE), IterNorm(CHANNELS, group_size=SIZE)
    assert layer.weight.shape == (3, SIZE, SIZE)
    x = torch.randn(8, CHANNELS, 4)
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), plain.train(training)(x))
    trained_layer = trained()
    trained_layer.reset_parameters()
    torch.testing.assert_close(trained_layer.weight, torch.eye(SIZE).double().expand(3, -1, -1))


@pytest.mark.parametrize("axis", [1, -1])
def test_axis_and_mask(axis):
    layer, x, mask = trained(axis=axis), torch.randn(6, 8, CHANNELS, dtype=torch.float64), torch.rand(6, 8) < 0.7
    plain = trained()
    plain.load_state_dict(layer.state_dict())
    for training in (True, False):
        y = layer.train(training)(x.movedim(-1, axis), mask).movedim(axis, -1)
        torch.testing.assert_close(y[mask], plain.train(training)(x[mask]))


@in_both_modes
def test_memory_format_and_changes_in_place(training):
    layer = trained().train(training)
    x = torch.randn(5, CHANNELS, 4, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    results = [relu(layer(x.requires_grad_())) for relu in (torch.relu_, torch.relu)]
    gradients = [torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()]) for y in results]
    torch.testing.assert_close(*gradients)
    plain = x.detach().contiguous().requires_grad_()
    expected = layer(plain).relu()
    torch.testing.assert_close(results[0], expected)
    torch.testing.assert_close(gradients[0], torch.autograd.grad(expected.pow(3).sum(), [plain, *layer.parameters()]))
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    assert gradients[0][0].is_contiguous(memory_format=torch.channels_last)


@in_both_modes
def test_half_precision_and_autocast(training):
    layer = trained(dtype=torch.float32).train(training)
    x = torch.randn(50, CHANNELS, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.float().pow(2).mean().backward()
    assert (y.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), copy.deepcopy(layer)(x.float()), atol=0.05, rtol=0.02)


@pytest.mark.filterwarnings("error::UserWarning")
@in_both_modes
def test_compile_whole_graph(training):
    torch._dynamo.reset()
    layer = trained(iterations=2).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, twin):
        x = torch.linspace(-2, 3, 8 * CHANNELS, dtype=torch.float64).cos().reshape(8, CHANNELS).requires_grad_()
        y = run(x)
        results.append((y, torch.autograd.grad(y.pow(3).sum(), [x, *run.parameters()])))
    torch.testing.assert_close(*results)


def test_function_transforms():
    layer, xs = trained(), torch.randn(3, 6, CHANNELS, dtype=torch.float64)
    layer.track_running_stats = False  # a transform may not change the averages

    def loss(x):
        return layer(x).pow(3).sum()

    gradient = torch.func.grad(loss)
    torch.testing.assert_close(torch.vmap(gradient)(xs), torch.stack([gradient(x) for x in xs]))


def test_empty_batches_pass_with_gradients_of_zero():
    layer, x = trained(), torch.zeros(0, CHANNELS, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in layer.parameters())


def test_copies_and_saved_layers_are_the_same():
    layer, x, file = trained().eval(), torch.randn(4, CHANNELS, 3, dtype=torch.float64), io.BytesIO()
    assert "affine='coloring'" in repr(layer)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = trained().eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (loaded, copy.deepcopy(layer)):
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, CHANNELS])
def test_checkpoints_of_layers_with_weights_become_diagonal_matrices(channels):
    norm, x = torch.nn.BatchNorm1d(channels), torch.randn(8, channels) + 1
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    norm(x)
    plain, layer, twin = (
        IterNorm(channels, group_size=SIZE, affine=affine).eval() for affine in (True, "coloring", "coloring")
    )
    for each in (plain, layer):
        each.load_state_dict(norm.state_dict())
    twin.load_state_dict(layer.state_dict())
    for each in (plain, layer, twin):
        torch.testing.assert_close(each(x), norm.eval()(x), atol=1e-5, rtol=1e-5)


@older_exporter
def test_onnx():
    layer, x = trained(dtype=torch.float32).eval(), torch.randn(8, CHANNELS, 4)
    (result,) = in_onnxruntime(layer, x, [x], **OLDER)
    torch.testing.assert_close(result, layer(x).detach(), atol=1e-5, rtol=1e-5)


def test_conversion_says_that_no_other_layer_has_matrices():
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(CHANNELS), trained())
    converted = convert(network, "iter_norm")  # which it is already
    assert converted[1].affine == "coloring"
    for kind in ("batch_norm", "group_whitening"):
        with pytest.raises(ValueError, match=r"layer '1' has affine='coloring'"):
            convert(network, kind, inplace=True)
    assert isinstance(network[0], torch.nn.BatchNorm1d)


@pytest.mark.parametrize("place", ["before", "after", "alone"])
def test_folded_networks_evaluate_as_before(place):
    hosts = [torch.nn.Conv2d(CHANNELS, CHANNELS, 1, dtype=torch.float64)] * (place != "alone")
    network = torch.nn.Sequential(*hosts, trained()) if place == "before" else torch.nn.Sequential(trained(), *hosts)
    folded, x = fold(network.eval()), torch.randn(4, CHANNELS, 3, 2, dtype=torch.float64)
    assert not any(isinstance(module, IterNorm) for module in folded)
    torch.testing.assert_close(folded(x), network(x))


def test_wrong_use():
    with pytest.raises(ValueError, match="affine='matrix' is unknown: use one of 'coloring'"):
        IterNorm(4, affine="matrix")
    with pytest.raises(ValueError, match="affine='coloring': group whitening has one weight for each channel"):
        GroupWhitening(2, 4, affine="coloring")
