"""Whole networks in evaluation can be exported, for any batch and image size, and compute the same elsewhere."""

import functools
import importlib.util
import io
import itertools
import shutil

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("torchvision") is None:
    pytest.skip("needs torchvision", allow_module_level=True)

from torch import nn  # noqa: E402
from vision import torchvision  # noqa: E402

from polywhiten.torch import GroupWhitening, IterNorm  # noqa: E402
from polywhiten.torch.norm_layers import GroupWhiteningLayer  # noqa: E402

GROUP_WHITENING = functools.partial(GroupWhiteningLayer, num_groups=8)
# What torchvision's networks call for one layer after another.
NORM_LAYERS = {
    "IterNorm": [IterNorm],
    "GroupWhitening": [GROUP_WHITENING],
    "mixed": [nn.BatchNorm2d, IterNorm, nn.BatchNorm2d, GROUP_WHITENING],
}
EXAMPLE = 2, 3, 64, 64
# Larger images have more positions than a group has channels, in layers where the example has fewer, and reversely.
OTHERS = [(5, 3, 128, 160), (3, 3, 40, 48)]
SIZES = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)

pytestmark = [
    pytest.mark.filterwarnings("ignore::polywhiten.analysis.InfeasibleWarning"),  # the images are few and small
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


def small_resnet(norm_layers):
    """Return a small network in evaluation mode, whose running averages have seen batches."""
    torch.manual_seed(0)
    turns = itertools.cycle(norm_layers)
    network = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 10, norm_layer=lambda channels: next(turns)(channels)
    )
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(8, 3, 64, 64))
    return network.eval()


def check(run, network):
    """Check outputs for inputs of several sizes, relative to the scale of the output."""
    for shape in (EXAMPLE, *OTHERS):
        x = torch.randn(shape)
        expected = network(x).detach()
        assert (run(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_saved_exported_programs():
    """One network is enough, because the exporter takes seconds; the tests below export others."""
    network, file = small_resnet(NORM_LAYERS["IterNorm"]), io.BytesIO()
    torch.export.save(torch.export.export(network, (torch.randn(EXAMPLE),), dynamic_shapes=SIZES), file)
    file.seek(0)
    check(torch.export.load(file).module(), network)


@pytest.mark.parametrize("name", NORM_LAYERS)
def test_saved_traces(name):
    network, file = small_resnet(NORM_LAYERS[name]), io.BytesIO()
    torch.jit.save(torch.jit.trace(network, torch.randn(EXAMPLE), check_trace=False), file)
    file.seek(0)
    check(torch.jit.load(file), network)


def test_onnx():
    """One network has both layers and few of them, because the exporter takes seconds."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    network, file = small_resnet(NORM_LAYERS["mixed"]), io.BytesIO()
    options = {"input_names": ["x"], "dynamic_shapes": SIZES, "dynamo": True, "verbose": False}
    torch.onnx.export(network, (torch.randn(EXAMPLE),), **options).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    check(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), network)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_packages_that_are_compiled_ahead_of_time(tmp_path):
    """The network is as small as possible, because the compiler takes long. IterNorm has groups of 12 and 4."""
    network = nn.Sequential(nn.Conv2d(3, 16, 3), IterNorm(16, group_size=12), GroupWhitening(4, 16)).eval()
    program = torch.export.export(network, (torch.randn(EXAMPLE),), dynamic_shapes=SIZES)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
    check(torch._inductor.aoti_load_package(path), network)
