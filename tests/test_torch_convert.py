"""`convert` replaces the normalization layers of a network, and keeps what they have learnt."""

import copy
import re
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from polywhiten.analysis import InfeasibleWarning  # noqa: E402
from polywhiten.torch import GroupWhitening, IterNorm, convert, freeze_stats  # noqa: E402

INPUTS = {1: (40, 6, 3), 2: (12, 6, 3, 4), 3: (12, 6, 2, 3, 2)}
BATCH_NORMS = {
    "1d": (1, lambda: nn.BatchNorm1d(6)),
    "2d": (2, lambda: nn.BatchNorm2d(6, eps=1e-2, momentum=None)),
    "3d": (3, lambda: nn.BatchNorm3d(6)),
    "synchronized": (2, lambda: nn.SyncBatchNorm(6)),
    "without affine map": (2, lambda: nn.BatchNorm2d(6, affine=False)),
    "without bias": (2, lambda: nn.BatchNorm2d(6, bias=False)),
    "double": (2, lambda: nn.BatchNorm2d(6, dtype=torch.float64)),
}
each_batch_norm = pytest.mark.parametrize(("dimensions", "make"), BATCH_NORMS.values(), ids=BATCH_NORMS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(network, *inputs):
    """Return the network in evaluation mode, with nontrivial parameters and running averages."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(0.5, 2)
        for x in inputs:
            network.train()(x)
    return network.eval()


def data(dimensions, dtype=torch.float32):
    """Return inputs with different means and scales in each channel."""
    scale = torch.arange(1, 7, dtype=dtype).reshape(1, 6, *[1] * dimensions)
    return torch.randn(INPUTS[dimensions], dtype=dtype) * scale + scale


def bottleneck(channels=8):
    """Return a block with three normalization layers."""
    return nn.Sequential(
        *[module for _ in range(3) for module in (nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(8))]
    )


@each_batch_norm
@pytest.mark.parametrize("group_size", [1, 4, 64])
def test_iter_norm_evaluates_as_the_batch_norm_that_it_replaces(dimensions, make, group_size):
    old = make()
    x = data(dimensions, old.running_mean.dtype)
    old = trained(old, x, data(dimensions, x.dtype))
    new = convert(old, "iter_norm", group_size=group_size)
    assert type(new) is IterNorm
    assert (new.eps, new.momentum, new.group_size) == (old.eps, old.momentum, group_size)
    torch.testing.assert_close(new(x), old(x))
    assert new.num_batches_tracked == old.num_batches_tracked == 2


@each_batch_norm
def test_batch_norm_returns_from_iter_norm_as_it_was(dimensions, make):
    old = make()
    x = data(dimensions, old.running_mean.dtype)
    old = trained(old, x)
    back = convert(convert(old, "iter_norm", group_size=4), "batch_norm", dimensions=dimensions)
    assert type(back) is {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions]
    torch.testing.assert_close(back.state_dict(), old.state_dict())
    assert (back.eps, back.momentum) == (old.eps, old.momentum)
    torch.testing.assert_close(back(x), old(x))


def test_a_tracked_covariance_is_that_of_batch_norm():
    x = data(2)
    old = trained(nn.BatchNorm2d(6), x)
    new = convert(old, "iter_norm", group_size=4, track="covariance", method="eigh")
    torch.testing.assert_close(new(x), old(x))
    _, report = convert(old, "iter_norm", track="covariance", return_report=True)
    assert "outputs in evaluation change" in report[0].note, "five of Newton's steps don't invert this covariance"


def test_batch_norm_gets_the_variances_of_whitened_data():
    x = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    old = trained(IterNorm(6, group_size=4, momentum=None, method="eigh", dtype=torch.float64), x)
    new, report = convert(old, "batch_norm", dimensions=1, return_report=True)
    torch.testing.assert_close(new.running_var, x.var(0, correction=0))
    assert "without correlations" in report[0].note


@pytest.mark.parametrize("to", ["iter_norm", "group_whitening", "group_norm"])
def test_parameters_are_the_same_objects(to):
    """So an optimizer that was made before goes on with them."""
    network = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)).train()
    weight, bias = network[1].weight, network[1].bias.requires_grad_(False)
    assert convert(network, to, inplace=True, num_groups=3) if to != "iter_norm" else convert(network, to, inplace=True)
    assert network[1].weight is weight
    assert network[1].bias is bias
    assert not bias.requires_grad


def test_modes_dtypes_and_devices_are_kept():
    network = nn.Sequential(
        nn.BatchNorm1d(4).eval(), nn.BatchNorm1d(4, dtype=torch.float16), nn.BatchNorm1d(4, device="meta")
    )
    new = convert(network, "iter_norm")
    assert [layer.training for layer in new] == [False, True, True]
    assert new[1].weight.dtype == new[1].running_mean.dtype == new[1].running_whitener.dtype == torch.float16
    assert new[2].weight.is_meta
    assert new[2].running_whitener.is_meta


def test_batch_norm_without_running_averages():
    new, report = convert(nn.BatchNorm2d(6, track_running_stats=False), "iter_norm", return_report=True)
    assert report[0].note == "normalizes every input by itself: outputs change"
    assert not new.track_running_stats
    assert new.running_mean is None
    new, report = convert(
        nn.BatchNorm2d(6, track_running_stats=False), "iter_norm", track_running_stats=True, return_report=True
    )
    assert new.running_mean is not None
    assert report[0].note == "has no statistics yet: outputs change"


def test_group_norm_and_group_whitening():
    old = trained(nn.GroupNorm(3, 6, eps=1e-2))
    new = convert(old, "group_whitening", method="eigh")
    assert (new.num_groups, new.eps, new.method) == (3, 1e-2, "eigh")
    back = convert(new, "group_norm")
    assert (back.num_groups, back.eps) == (3, 1e-2)
    torch.testing.assert_close(back.state_dict(), old.state_dict())


@pytest.mark.parametrize("to", ["iter_norm", "batch_norm"])
def test_normalization_within_samples_has_no_statistics_to_keep(to):
    new, report = convert(nn.GroupNorm(3, 6), to, return_report=True)
    assert new.running_mean.abs().sum() == 0
    assert report[0].note == "has no statistics yet: outputs change"


def test_dimensions_are_those_of_the_example():
    network = nn.Sequential(IterNorm(6), nn.Flatten(), IterNorm(24, group_size=2))
    new = convert(network, "batch_norm", example_inputs=torch.randn(5, 6, 2, 2))
    assert [type(layer) for layer in new] == [nn.BatchNorm2d, nn.Flatten, nn.BatchNorm1d]


WHERE = {
    "all of them": (None, ["0", "1.1", "1.3", "1.5", "2"]),
    "a pattern": ("1.*", ["1.1", "1.3", "1.5"]),
    "two patterns": (["1.?", "2"], ["1.1", "1.3", "1.5", "2"]),
    "a predicate": (lambda name, layer: name != "0" and layer.eps > 1e-4, ["2"]),
    "all": ("all", ["0", "1.1", "1.3", "1.5", "2"]),
    "first": ("first", ["0"]),
    "middle": ("middle", ["1.3"]),
}


@pytest.mark.parametrize(("where", "names"), WHERE.values(), ids=WHERE)
def test_where(where, names):
    network = nn.Sequential(nn.BatchNorm2d(8), bottleneck(), nn.BatchNorm2d(8, eps=1e-3))
    new, report = convert(network, "iter_norm", where=where, return_report=True)
    assert [change.name for change in report.replaced] == names
    assert [name for name, module in new.named_modules() if isinstance(module, IterNorm)] == names


def test_where_that_chooses_nothing_says_what_there_is():
    network = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match=r"where='bn\*' matches none of the network's 2 normalization layers.* 0, 1"):
        convert(network, "iter_norm", where=["0", "bn*"])
    with pytest.raises(ValueError, match=r"Sequential has no block with three: use patterns"):
        convert(network, "iter_norm", where="middle")
    for wrong in (3, nn.BatchNorm2d):
        with pytest.raises(TypeError, match=re.escape(f"where={wrong!r} is neither")):
            convert(network, "iter_norm", where=wrong)
    with pytest.warns(UserWarning, match=r"replaces no layer of Sequential. Its normalization layers: 2 BatchNorm2d"):
        convert(network, "iter_norm", where=lambda *_: False)


def test_a_layer_that_a_network_has_twice_is_replaced_by_one():
    shared = nn.BatchNorm2d(8)
    new, report = convert(nn.Sequential(shared, nn.ReLU(), shared), "iter_norm", return_report=True)
    assert new[0] is new[2]
    assert len(report.replaced) == 2


def test_a_copy_leaves_the_model_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    assert convert(network, "iter_norm") is not network
    assert type(network[1]) is nn.BatchNorm2d
    assert convert(network, "iter_norm", inplace=True) is network
    assert type(network[1]) is IterNorm


def snapshot(network):
    return [(name, module, [*module.parameters()], module.training) for name, module in network.named_modules()]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "warnings are errors"])
def test_a_failed_conversion_leaves_the_model_as_it_was(strict):
    network = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(6).eval())
    before = snapshot(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfeasibleWarning)
        with pytest.raises(ValueError if strict else InfeasibleWarning, match=r"num_groups=3 instead of 4 in 1$"):
            convert(network, "group_whitening", num_groups=4, inplace=True, strict=strict)
    assert snapshot(network) == before
    with pytest.raises(RuntimeError):
        convert(network, "iter_norm", example_inputs=torch.randn(2, 3, 4, 4), inplace=True)
    assert snapshot(network) == before
    assert not network[0]._forward_pre_hooks


def test_infeasible_groups_get_the_nearest_feasible_value():
    network = nn.Sequential(nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(64)).train()
    x = torch.randn(16, 64, 8, 8)
    with pytest.warns(InfeasibleWarning, match=r"the nearest: group_size=29 instead of 64 in 2$") as caught:
        new = convert(network, "iter_norm", example_inputs=x)
    assert caught[0].message.layers == {"2": "group_size=29 instead of 64"}
    assert (new[0].group_size, new[2].group_size) == (64, 29)
    with pytest.warns(
        InfeasibleWarning, match=r"num_groups=8 instead of 32 in 2$"
    ):  # 16 groups have more than 64 equations
        new = convert(network, "group_whitening", example_inputs=x)
    assert (new[0].num_groups, new[2].num_groups) == (32, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the layers have nothing to object to in training
        new.train()(x)
    assert network.training
    assert network[2].training


def test_example_inputs_are_all_arguments_of_the_model():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(64)

        def forward(self, a, b):
            return self.norm(a + b)

    with pytest.warns(InfeasibleWarning):
        new = convert(Sum(), "iter_norm", example_inputs=(torch.randn(4, 64), torch.randn(4, 64)))
    assert new.norm.group_size == 5


def test_layers_that_compute_something_else_are_left():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Renamed(nn.BatchNorm2d):
        """Computes the same as its base class."""

    network = nn.Sequential(Doubled(8), Renamed(8), nn.LayerNorm(8), nn.InstanceNorm2d(8))
    new = convert(network, "iter_norm")
    assert [type(layer) for layer in new] == [Doubled, IterNorm, nn.LayerNorm, nn.InstanceNorm2d]


def test_layers_of_the_wanted_kind_are_left_and_reported():
    network = nn.Sequential(IterNorm(8, group_size=2), nn.BatchNorm2d(8))
    new, report = convert(network, "iter_norm", group_size=4, return_report=True)
    assert [layer.group_size for layer in new] == [2, 4]
    assert [change.name for change in report.left] == ["0"]
    assert str(report).splitlines()[2:] == [
        "0      IterNorm(8, group_size=2)  (left)                     is of this kind already",
        "1      BatchNorm2d(8)             IterNorm(8, group_size=4)",
    ]


def test_frozen_statistics_that_batch_normalization_does_not_keep_are_reported():
    network = freeze_stats(nn.Sequential(nn.Linear(8, 8), IterNorm(8)))
    _, report = convert(network, "batch_norm", return_report=True)
    assert "in training the statistics are those of the batch" in str(report)


@pytest.mark.parametrize(
    "held",
    [
        lambda layer: [layer],
        lambda layer: [("norm", layer)],
        lambda layer: {"stage": [nn.ReLU(), (layer,)]},
        lambda layer: layer.forward,
    ],
    ids=["list", "pairs", "nested", "method"],
)
def test_a_layer_in_a_plain_container_is_refused(held):
    """The network's code could go on calling it there."""
    network = nn.Sequential(nn.BatchNorm2d(8))
    network.order = held(network[0])
    with pytest.raises(ValueError, match=r"layer '0' is also in the attribute 'order'.* torch.nn.ModuleList"):
        convert(network, "iter_norm", inplace=True)
    assert type(network[0]) is nn.BatchNorm2d


def test_copies_of_recorded_graphs_stay_in_evaluation():
    """`copy.deepcopy` of a `torch.fx.GraphModule` is in training mode."""
    network = torch.fx.symbolic_trace(trained(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))))
    x = torch.randn(4, 3, 5, 5)
    network.train()(x)
    new = convert(network.eval(), "iter_norm")
    assert not any(module.training for module in new.modules())
    torch.testing.assert_close(new(x), network(x))


def test_an_example_runs_on_a_copy():
    """A module that changes itself in evaluation mode, as some merge weights, is left as it was."""

    class Merging(nn.BatchNorm2d):
        merged = False

        def train(self, mode=True):
            self.merged = self.merged or not mode
            return super().train(mode)

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.auxiliary = Merging(8), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.main(x) + (self.auxiliary(x) if self.training else 0)

    network = Auxiliary()
    _, report = convert(network, "iter_norm", example_inputs=torch.randn(4, 8, 5, 5), return_report=True)
    assert not network.main.merged
    assert [change.note for change in report] == ["", "the example doesn't reach it"]


def test_synchronized_layers_stay_synchronized():
    new, report = convert(nn.Sequential(nn.SyncBatchNorm(8), nn.BatchNorm2d(8)), "iter_norm", return_report=True)
    assert [layer.process_group for layer in new] == ["world", None]
    assert report[0].note == ""
    assert convert(nn.SyncBatchNorm(8), "iter_norm", process_group=None).process_group is None
    _, report = convert(IterNorm(8, process_group="world"), "batch_norm", return_report=True)
    assert report[0].note == "each process takes statistics of its own batch"


def test_a_converted_network_goes_on_training():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    convert(network, "iter_norm", inplace=True)
    x, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 2
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert network[1].weight.grad.abs().sum() > 0
    assert torch.count_nonzero(network[1].running_whitener) == 64


ERRORS = {
    "no module": (
        lambda: convert("resnet", "iter_norm"),
        TypeError,
        r"model is a builtins.str: pass a torch.nn.Module",
    ),
    "kind": (lambda: convert(nn.BatchNorm2d(8), "layer_norm"), ValueError, "to='layer_norm'.*iter_norm"),
    "argument": (
        lambda: convert(nn.BatchNorm2d(8), "iter_norm", num_groups=4),
        TypeError,
        "num_groups=4 is no argument for to='iter_norm', which accepts .*group_size",
    ),
    "taken from the layer": (lambda: convert(nn.BatchNorm2d(8), "iter_norm", affine=False), TypeError, "affine=False"),
    "size": (lambda: convert(nn.BatchNorm2d(8), "iter_norm", group_size=0), ValueError, "group_size=0"),
    "dimensions": (lambda: convert(IterNorm(8), "batch_norm", dimensions=4), ValueError, "dimensions=4 is not one of"),
    "lazy": (
        lambda: convert(nn.Sequential(nn.LazyBatchNorm2d()), "iter_norm"),
        ValueError,
        "layer '0' is a LazyBatchNorm2d without parameters yet: call the network once first",
    ),
    "parametrized": (
        lambda: convert(nn.Sequential(parametrized(nn.BatchNorm2d(8))), "iter_norm"),
        ValueError,
        "layer '0' has parametrizations.*remove_parametrizations",
    ),
}


def parametrized(layer):
    return nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_what_is_wrong_and_what_would_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_models_of_torchscript_are_refused():
    with pytest.raises(TypeError, match="compiled by TorchScript"):
        convert(torch.jit.script(nn.Sequential(nn.BatchNorm2d(8))), "iter_norm")


def test_a_copy_has_parameters_of_its_own():
    network = nn.Sequential(nn.BatchNorm2d(8))
    new = convert(network, "group_whitening", num_groups=2)
    assert type(new[0]) is GroupWhitening
    assert new[0].weight is not network[0].weight
    assert copy.deepcopy(new)[0].num_groups == 2
