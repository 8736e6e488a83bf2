"""Layers can be recorded as graphs: by torch.fx, by TorchScript's tracing, and by both ONNX exporters."""

import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from polywhiten.torch import GroupWhitening, IterNorm  # noqa: E402

METHODS = ("newton", "eigh", "minimax")
LAYERS = {
    "whitener": lambda **k: IterNorm(12, group_size=5, **k),
    "covariance": lambda **k: IterNorm(12, group_size=5, track="covariance", **k),
    "no averages": lambda **k: IterNorm(12, group_size=5, track_running_stats=False, **k),
    "group whitening": lambda **k: GroupWhitening(3, 12, **k),
}
SHAPES = {"rows": (8, 12), "pictures": (8, 12, 5, 4), "few positions": (8, 12, 3, 1), "volumes": (8, 12, 2, 3, 2)}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
each_method = pytest.mark.parametrize("method", METHODS)
traced = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(layer, shape):
    """Return the layer in evaluation mode, with nontrivial averages and affine map."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
        layer(torch.randn(64, *shape[1:]) * 2 + 1)
    return layer.eval()


class Activated(IterNorm):
    """A subclass of a layer, as users write it."""

    def forward(self, x):
        return super().forward(x).relu()


def test_fx_records_a_layer_as_one_call():
    network = nn.Sequential(nn.Linear(12, 12), IterNorm(12, group_size=5), GroupWhitening(3, 12), Activated(12))
    called = []
    network[1].register_forward_hook(lambda *args: called.append(args))
    graph = torch.fx.symbolic_trace(network)
    nodes = [(node.op, node.target) for node in graph.graph.nodes]
    assert nodes[1:-1] == [("call_module", name) for name in "0123"]
    assert not called, "hooks are called when the graph runs, as with PyTorch's own layers"
    x = torch.randn(64, 12)
    torch.testing.assert_close(graph(x), network(x))
    assert len(called) == 2


def test_fx_records_arguments_by_keyword():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = IterNorm(12)

        def forward(self, x):
            return self.norm(x=x)

    (node,) = [node for node in torch.fx.symbolic_trace(Network()).graph.nodes if node.op == "call_module"]
    assert node.target == "norm"
    assert [*node.kwargs] == ["x"]


@each_layer
def test_fx_graph_trains_and_evaluates_as_the_original(make):
    network = nn.Sequential(nn.Linear(12, 12), make(), nn.Linear(12, 2))
    graph = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(network)))  # with copies of the layers
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (network, graph)]
    x = torch.randn(64, 12)
    for _ in range(3):
        for each, optimizer in zip((network, graph), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(graph.state_dict(), network.state_dict())
    torch.testing.assert_close(graph.eval()(x), network.eval()(x))


@pytest.mark.parametrize("layer", [IterNorm(12), GroupWhitening(4, 12)], ids=["IterNorm", "GroupWhitening"])
def test_fx_of_a_layer_by_itself_says_what_would_do(layer):
    with pytest.raises(TypeError, match=r"as one call .* trace that module, or torch.nn.Sequential"):
        torch.fx.symbolic_trace(layer)


@each_layer
@each_method
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@traced
def test_saved_traces_have_outputs_and_gradients_of_the_layer(make, method, training):
    layer = trained(make(method=method, dtype=torch.float64).double(), SHAPES["pictures"]).train(training)
    trace, file = torch.jit.trace(layer, torch.randn(SHAPES["pictures"]).double(), check_trace=False), io.BytesIO()
    torch.jit.save(trace, file)
    file.seek(0)
    x = torch.randn(11, *SHAPES["pictures"][1:], dtype=torch.float64, requires_grad=True)
    (y, dx), (expected, wanted) = (
        (out := run(x), torch.autograd.grad(out.pow(3).sum(), x)[0]) for run in (torch.jit.load(file), layer)
    )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, wanted)


@traced
def test_a_trace_of_eigh_has_a_gradient_where_eigenvalues_are_equal():
    """PyTorch's derivative of the eigendecomposition is NaN for equal eigenvalues."""
    layer, x = GroupWhitening(4, 12, method="eigh", eps=0.1, dtype=torch.float64), torch.randn(3, 12, 5).double()
    x[:, 6:] = 1  # two groups are constant
    x.requires_grad_()
    gradients = [torch.autograd.grad(run(x).pow(3).sum(), x)[0] for run in (torch.jit.trace(layer, x), layer)]
    torch.testing.assert_close(*gradients)


def in_onnxruntime(model, x, others, **options):
    """Return what an exported model computes for other inputs."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    program = torch.onnx.export(model, (x,), None if options["dynamo"] else file, input_names=["x"], **options)
    if options["dynamo"]:
        program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    return [torch.from_numpy(session.run(None, {"x": other.numpy()})[0]) for other in others]


def check_onnx(network, shape, memory_format=torch.preserve_format, **options):
    inputs = [torch.randn(batch, *shape[1:]).contiguous(memory_format=memory_format) for batch in (8, 5)]
    for x, result in zip(inputs, in_onnxruntime(network, inputs[0], inputs, **options), strict=True):
        torch.testing.assert_close(result, network(x).detach(), atol=1e-5, rtol=1e-5)


older_exporter = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)
OLDER = {"dynamo": False, "dynamic_axes": {"x": {0: "batch"}}}


@each_layer
@each_method
@older_exporter
def test_onnx_by_the_older_exporter(make, method):
    check_onnx(trained(make(method=method), SHAPES["pictures"]), SHAPES["pictures"], **OLDER)


@each_layer
@pytest.mark.parametrize("shape", [SHAPES["rows"], SHAPES["few positions"], SHAPES["volumes"]], ids=str)
@older_exporter
def test_onnx_of_every_shape(make, shape):
    check_onnx(trained(make(eps=0.1), shape), shape, **OLDER)


@each_layer
@older_exporter
def test_onnx_of_channels_last_memory(make):
    shape = SHAPES["pictures"]
    check_onnx(trained(make(), shape), shape, torch.channels_last, **OLDER)


@older_exporter
def test_onnx_by_the_newer_exporter():
    """One model has layers of every method, because this exporter takes seconds."""
    pytest.importorskip("onnxscript")
    shape = SHAPES["pictures"]
    combinations = ("whitener", "newton"), ("covariance", "eigh"), ("group whitening", "eigh")

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(trained(LAYERS[name](method=method), shape) for name, method in combinations)

        def forward(self, x):
            return torch.stack([layer(x) for layer in self.layers])

    dimensions = ({0: torch.export.Dim("batch", min=2)},)
    check_onnx(Network().eval(), shape, dynamo=True, dynamic_shapes=dimensions, verbose=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("condition", [1e1, 1e4, 1e7])
@traced
def test_a_trace_of_eigh_is_as_exact_as_eigh(dtype, condition):
    """A trace replaces eigh by products, also for the worst condition numbers that the dtype can represent."""
    layer = IterNorm(32, track="covariance", method="eigh", eps=0.0, dtype=dtype).eval()
    vectors = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q
    cov = vectors * torch.logspace(3, 3 - torch.tensor(condition).log10().item(), 32, dtype=torch.float64) @ vectors.mT
    layer.running_covariance.copy_(cov)
    exact = (vectors * torch.linalg.eigvalsh(cov).flip(0).rsqrt()) @ vectors.mT
    x = torch.eye(32, dtype=dtype)
    errors = [(run(x).double() - exact).abs().max() / exact.max() for run in (torch.jit.trace(layer, x), layer)]
    assert errors[0] < 10 * torch.finfo(dtype).eps * condition
    assert errors[0] < 5 * errors[1]
