"""The layers work in torchvision's and timm's networks: as `norm_layer=`, with `convert`, `fold` and torch.fx."""

import functools
import importlib.util
import pickle
from collections import Counter

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("timm") is None:
    pytest.skip("needs torchvision and timm", allow_module_level=True)

from torch import nn  # noqa: E402

from polywhiten.torch import GroupWhitening, IterNorm, convert, fold, track  # noqa: E402
from polywhiten.torch.norm_layers import GroupWhiteningLayer, NormAct, group_whitening_act, iter_norm_act  # noqa: E402

from vision import torchvision  # noqa: E402 isort: skip

import timm  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::polywhiten.analysis.InfeasibleWarning")  # the images are few and small

OURS = (IterNorm, GroupWhitening)
THEIRS = (nn.BatchNorm2d, nn.GroupNorm)
WITHOUT_ACTIVATION = {
    "IterNorm": IterNorm,
    "IterNorm with arguments": functools.partial(IterNorm, group_size=16),
    "GroupWhitening": functools.partial(GroupWhiteningLayer, num_groups=4, eps=1e-3),
}
WITH_ACTIVATION = {
    "IterNorm": functools.partial(iter_norm_act, group_size=16),
    "GroupWhitening": functools.partial(group_whitening_act, num_groups=4, eps=1e-3),
}
# Small networks of the families that the README names, with the activation of each.
FAMILIES = {
    "EfficientNet": (functools.partial(timm.create_model, "test_efficientnet"), "silu"),
    "RegNet": (
        lambda **k: timm.models.RegNet(timm.models.regnet.RegNetCfg(depth=4, w0=16, wa=8, wm=1.4, group_size=8, **k)),
        nn.ReLU,
    ),
    "ResNetV2": (functools.partial(timm.models.ResNetV2, [1, 1], (128, 256), stem_chs=32), "relu"),
    "DenseNet": (functools.partial(timm.models.DenseNet, growth_rate=8, block_config=(2, 2)), "relu"),
}
without_activation = pytest.mark.parametrize("norm_layer", WITHOUT_ACTIVATION.values(), ids=WITHOUT_ACTIVATION)
with_activation = pytest.mark.parametrize("norm_layer", WITH_ACTIVATION.values(), ids=WITH_ACTIVATION)
each_family = pytest.mark.parametrize(("make", "activation"), FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small_resnet(norm_layer):
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 10, norm_layer=norm_layer)


def count(network, kinds):
    return sum(isinstance(module, kinds) for module in network.modules())


def activations(network):
    """Count the activations of each kind."""
    kinds = nn.ReLU, nn.SiLU
    return Counter(type(module).__name__ for module in network.modules() if isinstance(module, kinds))


def check_training(network):
    """Check that a training step reduces the loss, and that the network can be evaluated afterwards."""
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    loss = nn.functional.cross_entropy(network(x), labels)
    loss.backward()
    torch.optim.SGD(network.parameters(), lr=0.01).step()
    assert nn.functional.cross_entropy(network(x), labels) < loss
    assert torch.isfinite(network.eval()(x)).all()


@pytest.mark.parametrize(
    "norm_layer",
    [*WITHOUT_ACTIVATION.values(), functools.partial(GroupWhitening, 4)],
    ids=[*WITHOUT_ACTIVATION, "GroupWhitening by position"],
)
def test_torchvision(norm_layer):
    network = small_resnet(norm_layer)
    assert count(network, OURS) == count(small_resnet(nn.BatchNorm2d), THEIRS)
    check_training(network)


@without_activation
def test_timm(norm_layer):
    network = timm.create_model("test_resnet", norm_layer=norm_layer)
    assert count(network, OURS) == count(timm.create_model("test_resnet"), THEIRS)
    check_training(network)


@each_family
@with_activation
def test_timm_where_normalization_layers_activate(make, activation, norm_layer):
    """The network has as many normalization layers and activations as by default, at the same places."""
    default, network = make(), make(norm_layer=functools.partial(norm_layer, act_layer=activation))
    assert count(network, OURS) == count(default, THEIRS) > 0
    assert not count(network, THEIRS)
    assert activations(network) == activations(default)
    places = {name for name, module in default.named_modules() if isinstance(module, THEIRS)}
    assert {name for name, module in network.named_modules() if isinstance(module, NormAct)} == places
    check_training(network)


@pytest.mark.parametrize("make", [iter_norm_act, group_whitening_act])
def test_arguments_that_timm_gives_normalization_layers_with_activation(make):
    x = torch.randn(8, 32, 6, 6)
    activated = make(32, act_layer="leaky_relu", act_kwargs={"negative_slope": 0.5}, drop_layer=nn.Dropout)
    assert activated.act.negative_slope == 0.5
    assert activated.act.inplace
    assert isinstance(activated.drop, nn.Dropout)
    assert not make(32, act_layer=nn.ReLU, inplace=False).act.inplace
    for plain in (make(32, act_layer=nn.ReLU, apply_act=False), make(32, act_layer=None)):
        assert plain(x).min() < 0
        torch.testing.assert_close(plain.eval()(x), plain.norm(x))
    assert plain.weight is plain.norm.weight
    assert plain.bias is plain.norm.bias


@pytest.mark.parametrize("norm_layer", [iter_norm_act, group_whitening_act])
def test_activation_is_asked_for(norm_layer):
    """A default would silently replace the activation of the network."""
    with pytest.raises(TypeError, match="act_layer"):
        timm.create_model("test_efficientnet", norm_layer=norm_layer)


@each_family
@without_activation
def test_timm_rejects_a_layer_without_activation_if_the_network_would_lose_its_own(make, activation, norm_layer):
    with pytest.raises(AssertionError, match="No equivalent norm_act layer"):
        make(norm_layer=norm_layer)


@pytest.mark.parametrize("norm_layer", [*WITHOUT_ACTIVATION.values(), *WITH_ACTIVATION.values()])
def test_norm_layers_can_be_pickled_with_their_networks(norm_layer):
    assert repr(pickle.loads(pickle.dumps(norm_layer))) == repr(norm_layer)


def evaluated(network):
    """Return the network in evaluation mode, with nontrivial parameters and running averages."""
    for module in network.modules():
        if isinstance(module, (*THEIRS, *OURS)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.randn(8, 3, 32, 32))
    return network.eval()


def frozen_resnet():
    network = small_resnet(torchvision.ops.FrozenBatchNorm2d)
    for module in network.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            for buffer in (module.weight, module.bias, module.running_var):
                buffer.uniform_(0.5, 2)
    return network


def small_resnext():
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], 10, groups=32, width_per_group=4)


def small_efficientnet():
    blocks = [torchvision.models.efficientnet.MBConvConfig(4, 3, stride, 16, 16, 1) for stride in (1, 2)]
    return torchvision.models.EfficientNet(blocks, 0.2, num_classes=10)


CONVERTED = {
    "torchvision's ResNet": lambda: small_resnet(nn.BatchNorm2d),
    "torchvision's frozen ResNet": frozen_resnet,
    "torchvision's MobileNet": lambda: torchvision.models.MobileNetV2(width_mult=0.25),
    "timm's ResNet": lambda: timm.create_model("test_resnet"),
    **{f"timm's {name}": make for name, (make, _) in FAMILIES.items() if name != "ResNetV2"},  # has GroupNorm
}


@pytest.mark.parametrize("make", CONVERTED.values(), ids=CONVERTED)
def test_a_converted_network_evaluates_as_before_and_trains(make):
    """To IterNorm and back, with the activations of timm's layers."""
    network, x = evaluated(make()), torch.randn(4, 3, 32, 32)
    kinds = (*THEIRS, torchvision.ops.FrozenBatchNorm2d)
    new, expected = convert(network, "iter_norm", group_size=8), network(x)
    assert count(new, OURS) == count(network, kinds) > 0
    assert not count(new, kinds)
    tolerance = {"atol": 1e-5 * expected.abs().max().item(), "rtol": 0}
    torch.testing.assert_close(new(x), expected, **tolerance)
    torch.testing.assert_close(convert(new, "batch_norm")(x), expected, **tolerance)
    check_training(new.train())


def test_frozen_layers_stay_without_gradients():
    new, report = convert(frozen_resnet(), "iter_norm", return_report=True)
    assert not any(p.requires_grad for module in new.modules() if isinstance(module, OURS) for p in module.parameters())
    assert {change.note for change in report} == {
        "weight and bias stay without gradients, but in training the statistics are those of the batch"
    }


# How many layers aren't folded: of IterNorm those behind small groups, of both those behind activations or timm's
# own convolutions.
FOLDED = {
    "torchvision's ResNet": (lambda: small_resnet(nn.BatchNorm2d), 0, 0),
    "torchvision's frozen ResNet": (frozen_resnet, 0, 0),
    "torchvision's ResNeXt": (small_resnext, 1, 0),
    "torchvision's MobileNetV2": (lambda: torchvision.models.MobileNetV2(width_mult=0.25), 17, 0),
    "torchvision's MobileNetV3": (lambda: torchvision.models.mobilenet_v3_small(width_mult=0.25), 11, 0),
    "torchvision's EfficientNet": (small_efficientnet, 2, 0),
    "torchvision's DenseNet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16), 6, 6),
    "timm's ResNet": (lambda: timm.create_model("test_resnet"), 0, 0),
    "timm's EfficientNet": (lambda: timm.create_model("test_efficientnet"), 2, 0),
    "timm's EfficientNet, padded by code": (lambda: timm.create_model("test_efficientnet", pad_type="same"), 5, 5),
    "timm's DenseNet": (FAMILIES["DenseNet"][0], 6, 6),
}


@pytest.mark.parametrize("kind", ["iter_norm", "batch_norm"])
@pytest.mark.parametrize(("make", "whitening", "normalizing"), FOLDED.values(), ids=FOLDED)
def test_a_folded_network_evaluates_as_before(make, whitening, normalizing, kind):
    network, x = make(), torch.randn(4, 3, 64, 64)
    network = evaluated(convert(network, kind, group_size=8) if kind == "iter_norm" else network)
    expected = network(x)
    folded, report = fold(network, return_report=True)
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    others = [change for change in report if not change.after.startswith("folded into")]
    assert len(others) == (whitening if kind == "iter_norm" else normalizing)
    assert all(change.note for change in others)
    assert count(folded, OURS) == 0
    assert count(folded, THEIRS) == (0 if kind == "iter_norm" else normalizing)


def test_timm_layers_keep_their_activations():
    network = timm.create_model("test_efficientnet")
    new = convert(network, "group_whitening", num_groups=4)
    for old, norm in zip(
        (m for m in network.modules() if isinstance(m, THEIRS)),
        (m for m in new.modules() if isinstance(m, NormAct)),
        strict=True,
    ):
        assert (type(norm.act), type(norm.drop)) == (type(old.act), type(old.drop))
    back = convert(new, "group_norm")
    assert count(back, NormAct) == count(network, THEIRS)


@pytest.mark.parametrize("make", [torchvision.models.resnet50, torchvision.models.resnext50_32x4d])
def test_places_of_the_papers(make):
    """IterNorm's authors replace the first layer or all, those of group whitening the middle one of every block."""
    with torch.device("meta"):
        network = make()
    blocks = [f"layer{i}.{j}" for i, depth in enumerate((3, 4, 6, 3), 1) for j in range(depth)]
    everywhere = {"bn1", *(f"{block}.bn{i}" for block in blocks for i in (1, 2, 3))}
    everywhere |= {f"layer{i}.0.downsample.1" for i in (1, 2, 3, 4)}
    places = {"all": everywhere, "first": {"bn1"}, "middle": {f"{block}.bn2" for block in blocks}}
    for where, names in places.items():
        new = convert(network, "group_whitening", where=where)
        assert {name for name, module in new.named_modules() if isinstance(module, GroupWhitening)} == names


def test_a_network_with_nothing_to_replace_says_so():
    with torch.device("meta"):
        network = torchvision.models.convnext_tiny()
    with pytest.warns(UserWarning, match=r"replaces no layer of ConvNeXt.* 18 LayerNorm, 5 LayerNorm2d"):
        convert(network, "iter_norm")


def test_tracking_measures_what_is_white_and_not_what_is_activated():
    network = nn.Sequential(nn.Conv2d(3, 16, 3), iter_norm_act(16, act_layer="relu", method="eigh"))
    with track(network, every=1) as tracking:
        network(torch.randn(32, 3, 8, 8))
    (row,) = tracking.rows
    assert row.output_condition_number < 1.1


@pytest.mark.parametrize("norm_layer", [IterNorm, functools.partial(GroupWhitening, 16)], ids=["IterNorm", "GW"])
def test_torchvision_extracts_features_of_a_resnet(norm_layer):
    network = torchvision.models.resnet18(norm_layer=norm_layer)
    names, _ = get_graph_node_names(network)
    assert {"bn1", "layer1.0.bn1", "layer2.0.downsample.1", "layer4.1.bn2"} <= set(names)
    wanted = ["layer1.0.bn2", "layer3", "fc"]
    extractor, found = create_feature_extractor(network, wanted), {}
    for name in wanted:  # hooks get outputs before later layers change them in place
        network.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: found.update({name: y.clone()}))
    x = torch.randn(4, 3, 32, 32)
    extractor.train()(x)["fc"].sum().backward()
    assert extractor.get_submodule("layer1.0.bn1").weight.grad.abs().sum() > 0
    features = extractor.eval()(x)
    network.eval()(x)
    for name in wanted:
        torch.testing.assert_close(features[name], found[name])


@pytest.mark.parametrize(
    ("name", "norm_layer"),
    [("test_resnet", IterNorm), ("test_efficientnet", functools.partial(iter_norm_act, act_layer="silu"))],
)
def test_timm_extracts_features(name, norm_layer):
    network = timm.create_model(name, norm_layer=norm_layer)
    extractor = timm.models.FeatureGraphNet(network, out_indices=(1, 3)).eval()
    x = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(extractor(x), network.eval().forward_intermediates(x, [1, 3], intermediates_only=True))
