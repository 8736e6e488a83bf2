"""Layers recorded as graphs."""

import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from polywhiten.torch import GroupWhitening, IterNorm  # noqa: E402

LAYERS = {
    "whitener": lambda **k: IterNorm(12, group_size=5, **k),
    "covariance": lambda **k: IterNorm(12, group_size=5, track="covariance", **k),
    "no averages": lambda **k: IterNorm(12, group_size=5, track_running_stats=False, **k),
    "group whitening": lambda **k: GroupWhitening(3, 12, **k),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Activated(IterNorm):
    """What users make of a layer."""

    def forward(self, x):
        return super().forward(x).relu()


def test_fx_records_a_layer_as_one_call():
    network = nn.Sequential(nn.Linear(12, 12), IterNorm(12, group_size=5), GroupWhitening(3, 12), Activated(12))
    called = []
    network[1].register_forward_hook(lambda *args: called.append(args))
    graph = torch.fx.symbolic_trace(network)
    nodes = [(node.op, node.target) for node in graph.graph.nodes]
    assert nodes[1:-1] == [("call_module", name) for name in "0123"]
    assert not called, "as of PyTorch's own layers, hooks are called when the graph runs"
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
    graph = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(network)))  # with layers of its own
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
