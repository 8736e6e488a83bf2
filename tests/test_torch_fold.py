"""`fold` puts normalization layers into convolutions and linear layers, and networks evaluate as before."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from polywhiten.torch import GroupWhitening, IterNorm, fold  # noqa: E402
from polywhiten.torch.networks.channel_map import ChannelMap  # noqa: E402
from polywhiten.torch.norm_layers import NormAct  # noqa: E402

IMAGES, SERIES, VOLUMES, ROWS = (4, 8, 9, 8), (16, 8, 9), (4, 8, 4, 3, 5), (64, 8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def warmed(network, shape, dtype=torch.float64):
    """Return the network in evaluation mode, with nontrivial parameters and running averages."""
    network = network.to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-1, 1)
        for _ in range(2):
            network.train()(torch.randn(shape, dtype=dtype) + 1)
    return network.eval()


def check(network, shape, *after, note=None):
    """Check what becomes of the layers, and that outputs are the same; return the folded network."""
    x = torch.randn(shape, dtype=torch.float64)
    expected = network(x.clone())
    folded, report = fold(network, return_report=True)
    assert [change.after for change in report] == [*after]
    if note is not None:
        assert note in report[0].note
    torch.testing.assert_close(folded(x.clone()), expected, rtol=1e-12, atol=1e-12)
    return folded


def conv(*arguments, **options):
    return nn.Conv2d(8, 8, 3, *arguments, **options)


BEFORE = {
    "Conv1d": (SERIES, lambda: nn.Conv1d(8, 12, 3, padding=1), 12, 64),
    "Conv2d": (IMAGES, lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), 12, 64),
    "Conv3d": (VOLUMES, lambda: nn.Conv3d(8, 12, 2), 12, 4),
    "ConvTranspose1d": (SERIES, lambda: nn.ConvTranspose1d(8, 12, 3, 2, 1, 1, bias=False), 12, 64),
    "ConvTranspose2d": (IMAGES, lambda: nn.ConvTranspose2d(8, 12, 2, 3, groups=2), 12, 3),
    "ConvTranspose3d": (VOLUMES, lambda: nn.ConvTranspose3d(8, 12, 2), 12, 64),
    "Linear": (ROWS, lambda: nn.Linear(8, 12), 12, 64),
    "a smaller last group": (IMAGES, lambda: nn.Conv2d(8, 10, 3), 10, 4),
    "grouped": (IMAGES, lambda: conv(groups=2), 8, 4),
    "a subclass": (IMAGES, lambda: type("Convolution", (nn.Conv2d,), {})(8, 12, 3), 12, 64),
    "depthwise": (IMAGES, lambda: conv(groups=8), 8, 1),
}


@pytest.mark.parametrize(("shape", "make", "channels", "group_size"), BEFORE.values(), ids=BEFORE)
def test_the_layer_before(shape, make, channels, group_size):
    network = warmed(nn.Sequential(make(), IterNorm(channels, group_size=group_size), nn.ReLU()), shape)
    folded = check(network, shape, "folded into 0")
    assert folded[0].bias is not None
    assert not any(isinstance(module, IterNorm) for module in folded.modules())


def without_offset():
    layer = IterNorm(8, affine=False)
    layer.register_forward_pre_hook(lambda layer, _: layer.running_mean.zero_())
    return layer


AFTER = {
    "Conv1d": (SERIES, lambda: nn.Conv1d(8, 12, 3)),
    "Conv2d": (IMAGES, lambda: nn.Conv2d(8, 12, 3, stride=2, bias=False)),
    "Conv3d": (VOLUMES, lambda: nn.Conv3d(8, 12, 2)),
    "padded by inputs": (IMAGES, lambda: conv(padding=1, padding_mode="reflect")),
    "padded to the same size, 1 x 1": (IMAGES, lambda: nn.Conv2d(8, 12, 1, padding="same")),
    "not padded, by name": (IMAGES, lambda: conv(padding="valid")),
    "transposed, 1 x 1": (IMAGES, lambda: nn.ConvTranspose2d(8, 12, 1, groups=2)),
    "grouped": (IMAGES, lambda: conv(groups=2)),
    "Linear": (ROWS, lambda: nn.Linear(8, 12)),
}


@pytest.mark.parametrize(("shape", "make"), AFTER.values(), ids=AFTER)
def test_the_layer_after(shape, make):
    check(warmed(nn.Sequential(IterNorm(8, group_size=4), make()), shape), shape, "folded into 1")


PADDED = {
    "Conv2d": lambda: conv(padding=1),
    "Conv2d, same size": lambda: conv(padding="same"),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 12, 3, groups=2),
    "ConvTranspose2d, 1 x 1 with gaps": lambda: nn.ConvTranspose2d(8, 12, 1, stride=2),
}


@pytest.mark.parametrize("make", PADDED.values(), ids=PADDED)
def test_zeros_around_the_layer_after(make):
    """They stay zeros only if the map has no offset."""
    network = warmed(nn.Sequential(IterNorm(8, group_size=4, bias=False), make()), IMAGES)
    check(network, IMAGES, "1 x 1 convolution", note="1 after it pads its input with zeros")
    network[0].running_mean.zero_()
    check(network, IMAGES, "folded into 1")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(8),
        lambda: nn.SyncBatchNorm(8),
        lambda: nn.BatchNorm2d(8, affine=False),
        lambda: IterNorm(8, track="covariance", method="eigh"),
        lambda: IterNorm(8, affine=False),
        lambda: IterNorm(8, bias=False),
    ],
)
def test_kinds_of_layers(make):
    network = nn.Sequential(conv(groups=4), nn.BatchNorm2d(8), conv(), nn.ReLU())
    network = warmed(network, IMAGES)
    layer = make().double()
    network[1] = layer
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 2)
            elif tensor.ndim == 3:  # a positive definite matrix
                tensor.add_(0.1 * torch.ones_like(tensor))
    network.eval()
    check(network, IMAGES, "folded into 0" if isinstance(layer, nn.modules.batchnorm._BatchNorm) else "folded into 2")


def test_several_layers_in_a_row():
    network = nn.Sequential(conv(), IterNorm(8), nn.Identity(), IterNorm(8), conv(), nn.BatchNorm2d(8))
    check(warmed(network, IMAGES), IMAGES, "folded into 0", "folded into 0", "folded into 4")
    network = nn.Sequential(nn.ReLU(), IterNorm(8), nn.Identity(), conv(), nn.BatchNorm2d(8))
    check(warmed(network, IMAGES), IMAGES, "folded into 3", "folded into 3")


@pytest.mark.parametrize("shape", [ROWS, SERIES, IMAGES, VOLUMES, (4, 8, 2, 3, 2, 2), (0, 8, 3, 3)])
@pytest.mark.parametrize(("group_size", "columns"), [(1, 1), (4, 4), (5, 5), (64, 8)])
def test_a_convolution_of_its_own(shape, group_size, columns):
    """Inputs may have any number of axes, and the last group may be smaller."""
    layer = warmed(IterNorm(8, group_size=group_size), (16, 8, 6))
    folded = check(layer, shape, "1 x 1 convolution", note="it is the whole model")
    assert type(folded) is ChannelMap
    assert folded.weight.shape == (8, columns)
    assert not folded.training


def test_a_convolution_of_its_own_has_the_smallest_groups():
    """Whiteners may have more zeros than their groups, such as those of converted batch normalization."""
    layer = IterNorm(12, group_size=8).eval()
    layer.running_whitener[0, 1, 0] = layer.running_whitener[0, 0, 1] = 0.5
    assert fold(layer).weight.shape == (12, 2)


def test_networks_with_a_convolution_of_its_own_can_be_traced_exported_and_pickled():
    network = fold(warmed(nn.Sequential(nn.ReLU(), IterNorm(8, group_size=4)), IMAGES))
    x = torch.randn(IMAGES, dtype=torch.float64)
    exported = torch.export.export(network, (x,))
    assert any(node.target is torch.ops.aten.conv2d.default for node in exported.graph.nodes)
    for same in (torch.fx.symbolic_trace(network), exported.module(), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(same(x), network(x))
    assert network.float().half()(x.half()).dtype == torch.half
    assert network.float()(x.half()).dtype == torch.half  # as the layer did


@pytest.mark.parametrize("norm", [IterNorm, nn.BatchNorm2d])
def test_activations_stay(norm):
    network = nn.Sequential(conv(), NormAct(norm(8), nn.Dropout(), nn.ReLU(inplace=True)), conv())
    folded = check(warmed(network, IMAGES), IMAGES, "folded into 0")
    assert [type(module) for module in folded[1]] == [nn.Identity, nn.Dropout, nn.ReLU]
    before = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), NormAct(norm(8), nn.Identity(), nn.ReLU()), conv())
    check(warmed(before, IMAGES), IMAGES, "folded into 0", "1 x 1 convolution" if norm is IterNorm else "")
    behind = nn.Sequential(conv(), NormAct(norm(8), nn.Identity(), nn.ReLU()), IterNorm(8), nn.ReLU())
    check(warmed(behind, IMAGES), IMAGES, "folded into 0", "1 x 1 convolution")
    without = nn.Sequential(NormAct(norm(8), nn.Identity(), nn.Identity()), conv())
    check(warmed(without, IMAGES), IMAGES, "folded into 1")


class Uses(nn.Module):
    """A network that is one function of its layers `conv`, `norm` and `next`, and of x."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.conv, self.norm, self.next = conv(padding=1), IterNorm(8), conv()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.relu())


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x, *parameters):
        return super()._conv_forward(x.relu(), *parameters)


def plain(net, x):
    return net.norm(net.conv(x)).relu()


def two_users(net, x):
    y = net.conv(x)
    return net.norm(y) + y


def called_twice(net, x):
    return net.norm(net.conv(net.conv(x))).relu()


def norm_called_twice(net, x):
    return net.norm(net.norm(net.conv(x))).relu()


def weight_read(net, x):
    return net.norm(net.conv(x)) + nn.functional.conv2d(x, net.conv.weight, padding=1)


def activated(net, x):
    return net.norm(net.conv(x).relu()).relu()


def changed_between(net, x):
    x = x + 1
    y = net.norm(x)
    x.relu_()
    return net.next(y)


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


def replaced_forward(layer):
    layer.forward = lambda x: type(layer).forward(layer, x) + 1
    return layer


def parametrized():
    return torch.nn.utils.parametrizations.weight_norm(conv(padding=1))


def hooked_weight():
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(conv(padding=1))


FORBIDDEN = {
    "its output has other uses": (two_users, {}, "conv before it has an output that is used elsewhere, too"),
    "called twice": (called_twice, {}, "conv before it is used more than once"),
    "layer called twice": (norm_called_twice, {}, "it is used more than once"),
    "weight read": (weight_read, {}, "conv before it is used more than once"),
    "activation between": (activated, {}, "no convolution or linear layer is next to it"),
    "changed in place": (changed_between, {}, "next after it does not follow at once"),
    "forward of a subclass": (
        plain,
        {"conv": lambda: OwnForward(8, 8, 3, padding=1)},
        "conv before it has a class, OwnForward, with a forward of its own",
    ),
    "convolution of a subclass": (
        plain,
        {"conv": lambda: OwnConvolution(8, 8, 3)},
        "conv before it has a class, OwnConvolution, with a forward of its own",
    ),
    "forward of an object": (plain, {"conv": lambda: replaced_forward(conv())}, "conv before it has a forward of"),
    "parametrizations": (plain, {"conv": parametrized}, "conv before it has parametrizations"),
    "hooks": (plain, {"conv": lambda: hooked(conv())}, "conv before it has hooks"),
    "hook on an identity between": (
        lambda net, x: net.norm(net.next(net.conv(x))).relu(),
        {"next": lambda: hooked(nn.Identity())},
        "no convolution or linear layer is next to it",
    ),
    "groups are too small": (plain, {"conv": lambda: conv(groups=4)}, "conv before it has groups of 2 channels"),
}


@pytest.mark.parametrize(("forward", "parts", "note"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_where_folding_would_change_the_network(forward, parts, note):
    network = Uses(forward, **{name: make() for name, make in parts.items()})
    check(warmed(network, IMAGES), IMAGES, "1 x 1 convolution", note=note)


def test_weight_norm_by_hooks():
    network = warmed(Uses(plain, conv=hooked_weight()), IMAGES)
    _, report = fold(network, inplace=True, return_report=True)
    assert report[0].note == "conv before it has hooks"


def test_layers_with_two_names():
    network = Uses(plain)
    network.other = network.conv
    check(warmed(network, IMAGES), IMAGES, "1 x 1 convolution", note="has several names, conv and other")
    network = Uses(plain)
    network.other = network.norm
    folded = check(warmed(network, IMAGES), IMAGES, *["1 x 1 convolution"] * 2, note="it has several names")
    assert folded.other is folded.norm


def test_rows_only():
    """A linear layer maps the last axis, and normalization the second one: more axes would give other outputs."""
    network = warmed(nn.Sequential(nn.Linear(8, 8), IterNorm(8)), ROWS)
    folded = fold(network)
    network(torch.randn(2, 8, 8).double())
    with pytest.raises(ValueError, match=r"x has shape \(2, 8, 8\), .* exact only for inputs \(N, C\)"):
        folded(torch.randn(2, 8, 8).double())


def test_weights_that_the_dtype_cannot_represent():
    network = nn.Sequential(nn.Conv2d(8, 8, 1), IterNorm(8, group_size=1)).half().eval()
    nn.init.constant_(network[0].weight, 1000)
    network[1].running_whitener.fill_(100)
    _, report = fold(network, return_report=True)
    assert report[0].note == "0 before it would get weights that are not finite in torch.float16"


class Branches(nn.Module):
    """A network that torch.fx can't trace: its `part` can be."""

    def __init__(self):
        super().__init__()
        self.part = Uses(plain)
        self.conv, self.norm = conv(padding=1), IterNorm(8)

    def forward(self, x):
        self.last = x.detach()
        if x.sum() > 0:
            x = x * 2
        return self.norm(self.conv(self.part(x)))


def test_networks_that_cannot_be_traced():
    network = warmed(Branches(), IMAGES)
    check(network, IMAGES, "folded into part.conv", "1 x 1 convolution")
    folded, report = fold(network, return_report=True)
    assert isinstance(folded.last, torch.Tensor)  # as before, and nothing that tracing has left
    assert report[1].note == "the code that torch.fx can trace doesn't call it"


def test_a_part_that_cannot_be_traced_is_one_call_of_the_whole():
    network = nn.Sequential(conv(padding=1), IterNorm(8), Branches(), conv(), IterNorm(8))
    expected = "folded into 0", "folded into 2.part.conv", "1 x 1 convolution", "folded into 3"
    check(warmed(network, IMAGES), IMAGES, *expected)


class Undecided(Uses):
    """A network that can be traced only up to the question how often the output of `conv` is used."""

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return z + y if z.sum() > -1e9 else z


def test_what_is_traced_before_tracing_fails_counts_for_nothing():
    network = nn.Sequential(nn.ReLU(), Undecided(None), nn.ReLU())
    check(warmed(network, IMAGES), IMAGES, "1 x 1 convolution", note="the code that torch.fx can trace doesn't call it")


class Scaled(Uses):
    """A network whose part can't be traced, and reads a parameter that the network reads afterwards."""

    def __init__(self, part=None):
        super().__init__(None)
        self.part, self.scale = part, nn.Parameter(torch.ones(())) if part is None else part.scale

    def forward(self, x):
        if self.part is not None:
            return self.norm(self.conv(self.part(x))) * self.scale
        y = x * self.scale
        return y + 1 if y.sum() > 0 else y


def test_parameters_that_are_read_before_tracing_fails_and_afterwards():
    check(warmed(Scaled(Scaled()), IMAGES), IMAGES, "folded into conv", "1 x 1 convolution")


class Wrapper(Uses):
    __module__ = "torch.nn.parallel"  # where nn.DataParallel is, whose calls torch.fx doesn't trace into


def test_containers_of_pytorch_are_looked_into():
    network = nn.Sequential(Wrapper(plain), nn.ReLU())
    check(warmed(network, IMAGES), IMAGES, "folded into 0.conv")


def test_what_new_parameters_keep():
    network = warmed(nn.Sequential(conv(bias=False), IterNorm(8), conv(), nn.ReLU(), IterNorm(8)), IMAGES)
    network.to(torch.bfloat16, memory_format=torch.channels_last)[0].weight.requires_grad_(False)
    folded = fold(network)
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    for parameter in (folded[0].weight, folded[0].bias):
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad
    assert folded[4].weight.dtype == torch.bfloat16
    assert folded[4].weight.requires_grad
    assert not any(module.training for module in folded.modules())


def test_weights_of_other_layers_do_not_change():
    network = nn.Sequential(conv(padding=1), IterNorm(8), conv())
    network[2].weight = network[0].weight
    check(warmed(network, IMAGES), IMAGES, "folded into 0")


def test_in_place_or_as_a_copy():
    network = warmed(Uses(plain), IMAGES)
    state = copy.deepcopy(network.state_dict())
    folded = fold(network)
    assert type(folded) is Uses
    assert isinstance(network.norm, IterNorm)
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)
    assert fold(network, inplace=True) is network
    torch.testing.assert_close(network.state_dict(), folded.state_dict(), rtol=0, atol=0)


def test_a_failure_leaves_the_network_as_it_was():
    network = warmed(nn.Sequential(conv(), IterNorm(8), conv(), IterNorm(8)), IMAGES)
    state = copy.deepcopy(network.state_dict())
    network[3].train()
    with pytest.raises(ValueError, match=r"layer '3', IterNorm\(8, group_size=64\), is in training mode.*model.eval"):
        fold(network, inplace=True)
    assert isinstance(network[1], IterNorm)
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.ones(3), TypeError, "model is a torch.Tensor: pass a torch.nn.Module"),
        (lambda: torch.jit.script(nn.Sequential(conv())), TypeError, "compiled by TorchScript"),
        (lambda: nn.Sequential(conv(), nn.LazyBatchNorm2d()).eval(), ValueError, "'1' is a LazyBatchNorm2d.*call the"),
        (lambda: nn.Sequential(conv(), IterNorm(8, device="meta")).eval(), ValueError, "layer '1', .*meta device"),
        (lambda: nn.Sequential(NormAct(IterNorm(8), nn.ReLU(), nn.ReLU())), ValueError, "'0', NormAct.*training mode"),
    ],
)
def test_wrong_models(make, error, message):
    with pytest.raises(error, match=message):
        fold(make())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.LayerNorm(6), "it has no layers that fold knows"),
        (lambda: GroupWhitening(4, 8), "1: it normalizes each sample by itself"),
        (lambda: nn.GroupNorm(4, 8), "1: it normalizes each sample by itself"),
        (lambda: IterNorm(8, track_running_stats=False), "1: it has no running averages"),
        (lambda: nn.BatchNorm2d(8, track_running_stats=False), "1: it has no running averages"),
        (lambda: hooked(IterNorm(8)), "1: it has hooks"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_to_fold(make, reason, training):
    network = nn.Sequential(conv(), make()).train(training)
    with pytest.warns(UserWarning, match=f"fold leaves Sequential as it is: {reason}"):
        folded, report = fold(network, return_report=True)
    assert not report.replaced
    assert repr(folded) == repr(network)


def test_batch_normalization_stays_where_no_layer_takes_it():
    network = warmed(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(), nn.BatchNorm2d(8)), IMAGES)
    folded = check(network, IMAGES, "", "folded into 2", note="no convolution or linear layer is next to it")
    assert type(folded[0]) is nn.BatchNorm2d


class Branching(nn.Module):
    """A network whose code may do something else than `torch.fx` sees, and stores its inputs."""

    def __init__(self, branch):
        super().__init__()
        self.conv, self.norm, self.branch = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), branch
        self.inputs = []

    def forward(self, x, skip=None):
        self.inputs.append(x)
        y = self.conv(x)
        if self.branch == "on a default" and skip is None:
            y = y.relu()
        if self.branch == "on a type" and isinstance(x, torch.Tensor):
            y = y.relu()
        return self.norm(y)


def branching(branch):
    network = warmed(Branching(branch), (8, 3, 5, 5))
    network.inputs.clear()
    return network, torch.randn(8, 3, 5, 5, dtype=torch.float64)


def test_code_is_traced_with_the_defaults_of_its_arguments():
    network, x = branching("on a default")
    with pytest.warns(UserWarning, match="fold leaves Branching as it is"):
        torch.testing.assert_close(fold(network)(x), network(x))


def test_an_example_shows_what_tracing_cannot_see():
    network, x = branching("on a type")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="outputs of Branching for example_inputs would change by"):
        fold(network, example_inputs=x, inplace=True)
    assert type(network.norm) is nn.BatchNorm2d
    torch.testing.assert_close(network.state_dict(), before)
    network, x = branching("never")
    torch.testing.assert_close(fold(network, example_inputs=(x,))(x), network(x))


def test_tracing_leaves_nothing_in_the_network():
    """Neither in what its code stores, nor in what hooks store."""
    part, _ = branching("never")
    network, outputs = nn.Sequential(part), []
    part.register_forward_hook(lambda module, args, y: outputs.append(y))
    fold(network, inplace=True)
    assert type(part.norm) is nn.Identity
    assert not part.inputs
    assert not outputs


def test_layers_in_plain_lists_are_left():
    network = warmed(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), (8, 3, 5, 5))
    network.order = [network[1]]
    with pytest.warns(UserWarning, match="it is also in the attribute order"):
        fold(network)
    network.order = [("first", network[0])]
    network.order.append(network.order)
    with pytest.warns(UserWarning, match="0 before it is also in the attribute order"):
        fold(network)
