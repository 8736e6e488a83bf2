"""Checkpoints of batch normalization and of the papers' authors' layers give the same outputs in evaluation."""

import copy
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from polywhiten.torch import GroupWhitening, IterNorm  # noqa: E402
from polywhiten.torch.norm_layers import NormAct  # noqa: E402

CHANNELS, SIZE = 10, 4
SIZES = {"equal groups": [5, 5], "a smaller last group": [4, 4, 2], "one group": [10]}
EPS = 1e-3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def matrices(sizes, least=0.5):
    """Return a symmetric positive definite matrix for each group."""
    factors = [torch.randn(d, 2 * d, dtype=torch.float64) for d in sizes]
    return [a @ a.mT / a.shape[1] + least * torch.eye(len(a), dtype=a.dtype) for a in factors]


def affine(channels=CHANNELS, rank=4):
    shape = (1, channels) + (1,) * (rank - 2)
    return {"weight": torch.rand(shape, dtype=torch.float64) + 0.5, "bias": torch.randn(shape, dtype=torch.float64)}


def by_group(state, *names, collection="iterNorm_Groups"):
    """Return lists of the entries of these names, one entry for each group."""
    groups = range(sum(key.endswith(names[0]) for key in state))
    return [[state[f"{collection}.{i}.{name}"] for i in groups] for name in names]


def joined(sizes, name="running_wm"):
    return {"running_mean": torch.randn(len(sizes), sizes[0], 1).double(), name: torch.stack(matrices(sizes))}


def separate(sizes, collection="iterNorm_Groups", name="running_wm"):
    state = {}
    for i, matrix in enumerate(matrices(sizes)):
        state[f"{collection}.{i}.running_mean"] = torch.randn(len(matrix), 1).double()
        state[f"{collection}.{i}.{name}"] = matrix
    return state


def batch_norm_state(channels=CHANNELS):
    layer = nn.BatchNorm2d(channels, dtype=torch.float64)
    for value in layer.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5 if value.ndim else torch.tensor(7))
    return layer.state_dict()


def evaluated(x, state, whiteners, means):
    """Return weight W (x - mean) + bias of each group of channels, as NumPy computes it."""
    whiteners, means = ([np.asarray(each) for each in arrays] for arrays in (whiteners, means))
    w = np.zeros((CHANNELS, CHANNELS))
    start = 0
    for block in whiteners:
        w[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    mean = np.concatenate([each.reshape(-1) for each in means])
    y = np.einsum("ij,njhw->nihw", w, x.numpy() - mean.reshape(-1, 1, 1))
    return torch.from_numpy(y) * state["weight"].view(-1, 1, 1) + state["bias"].view(-1, 1, 1)


def inverse_sqrt(matrix):
    values, vectors = np.linalg.eigh(np.asarray(matrix))
    return vectors / np.sqrt(values) @ vectors.T


def newton(matrix, iterations=5):
    """Return the whitener of the IterNorm paper."""
    matrix = np.asarray(matrix)
    p, s = np.eye(len(matrix)), matrix / np.trace(matrix)
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * p @ p @ p @ s
    return p / np.sqrt(np.trace(matrix))


def iter_norm(**arguments):
    return IterNorm(CHANNELS, **{"eps": EPS, "group_size": SIZE, "dtype": torch.float64} | arguments)


def check(layer, state, expected, x):
    """Check the outputs of a layer that loads a checkpoint, of one in a network, and of one on no device by assign."""
    before = {name: value.clone() for name, value in state.items()}
    network = nn.Sequential(nn.Identity(), copy.deepcopy(layer))
    nowhere = copy.deepcopy(layer).to("meta")
    layer.load_state_dict(state)
    network.load_state_dict({f"1.{name}": value for name, value in state.items()})
    nowhere.load_state_dict(state, assign=True)
    for loaded in (layer, network, nowhere):
        torch.testing.assert_close(loaded.eval()(x), expected)
    layer.train()(x).sum().backward()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    nowhere.train()(x).sum().backward()  # assigned tensors share memory with the checkpoint, and can be written


@pytest.fixture
def x():
    return torch.randn(6, CHANNELS, 3, 2, dtype=torch.float64)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_whiteners_of_the_authors_iter_norm_with_an_entry_for_each_group(sizes, x):
    state = separate(sizes) | affine()
    expected = evaluated(x, state, *by_group(state, "running_wm", "running_mean"))
    check(iter_norm(group_size=sizes[0]), state, expected, x)


@pytest.mark.parametrize("rank", [2, 4, 5])
def test_whiteners_of_the_authors_iter_norm_in_one_entry(rank, x):
    state = joined([5, 5]) | affine(rank=rank)
    check(iter_norm(group_size=5), state, evaluated(x, state, state["running_wm"], state["running_mean"]), x)


def test_memory_that_all_groups_share_becomes_memory_of_each(x):
    """The authors' buffer begins as an expanded identity matrix, in which writing is an error."""
    state = joined([5, 5]) | affine()
    state["running_wm"] = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    check(iter_norm(group_size=5), state, evaluated(x, state, state["running_wm"], state["running_mean"]), x)


@pytest.mark.parametrize("relative_eps", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_covariances_of_the_authors_iter_norm(sizes, relative_eps, x):
    """They contain eps already, which the layer adds again."""
    state = separate(sizes) | affine()
    covariances, means = by_group(state, "running_wm", "running_mean")
    layer = iter_norm(group_size=sizes[0], track="covariance", relative_eps=relative_eps, eps=0.1)
    check(layer, state, evaluated(x, state, map(newton, covariances), means), x)


@pytest.mark.parametrize(
    ("collection", "track", "whitener"),
    [("DBN_Groups", "whitener", np.asarray), ("DBNSigma_Groups", "covariance", inverse_sqrt)],
)
def test_decorrelated_batch_normalization_with_an_entry_for_each_group(collection, track, whitener, x):
    sizes = [4, 4, 2]
    state = separate(sizes, collection, "running_projection") | affine()
    projections, means = by_group(state, "running_projection", "running_mean", collection=collection)
    check(iter_norm(track=track, method="eigh"), state, evaluated(x, state, map(whitener, projections), means), x)


@pytest.mark.parametrize(("track", "whitener"), [("whitener", np.asarray), ("covariance", inverse_sqrt)])
def test_decorrelated_batch_normalization_whose_groups_share_statistics(track, whitener, x):
    (matrix,), mean = matrices([5]), torch.randn(5, 1).double()
    state = {"running_mean": mean, "running_projection": matrix} | affine()
    expected = evaluated(x, state, [whitener(matrix)] * 2, [mean] * 2)
    check(iter_norm(group_size=5, track=track, method="eigh"), state, expected, x)


@pytest.mark.parametrize("track", ["whitener", "covariance"])
@pytest.mark.parametrize("group_size", [1, 4, 64])
def test_batch_normalization(group_size, track, x):
    state = batch_norm_state()
    expected = evaluated(x, state, (state["running_var"] + EPS).rsqrt().view(-1, 1, 1), state["running_mean"])
    check(iter_norm(group_size=group_size, track=track, method="eigh"), state, expected, x)


def test_the_number_of_batches_is_kept_or_becomes_0():
    (layer := iter_norm(group_size=5)).load_state_dict(batch_norm_state())
    assert layer.num_batches_tracked == 7
    layer.load_state_dict(joined([5, 5]) | affine())
    assert layer.num_batches_tracked == 0
    assert layer.num_batches_tracked.dtype == torch.long


def test_the_identity_fills_a_smaller_last_group():
    """It is what `reset_running_stats` fills it with, so that checkpoints of equal layers are equal."""
    for state in (batch_norm_state(), separate([4, 4, 2]) | affine()):
        (layer := iter_norm()).load_state_dict(state)
        last = layer.running_whitener[-1]
        torch.testing.assert_close(last, torch.block_diag(last[:2, :2], torch.eye(2, dtype=last.dtype)))


def test_group_whitening_of_the_authors():
    """It has no averages, and its affine map has the input's dimensions."""
    state, x = affine(), torch.randn(3, CHANNELS, 4, 4, dtype=torch.float64)
    layer = GroupWhitening(5, CHANNELS, eps=0.0, dtype=torch.float64)
    blocks = x.numpy().reshape(3, 5, -1)
    centred = blocks - blocks.mean(2, keepdims=True)
    whitened = torch.from_numpy(np.stack([newton(c @ c.T / c.shape[1]) @ c for c in centred])).view_as(x)
    check(layer, state, whitened * state["weight"] + state["bias"], x)


def test_a_layer_with_an_activation_loads_what_one_layer_has_saved(x):
    """timm's `BatchNormAct2d` has the parameters itself that `NormAct` has in `norm`."""
    state = batch_norm_state()
    layer = NormAct(iter_norm(), nn.Identity(), nn.PReLU(dtype=torch.float64))
    expected = evaluated(x, state, (state["running_var"] + EPS).rsqrt().view(-1, 1, 1), state["running_mean"])
    check(
        layer,
        state | {"act.weight": torch.tensor([0.1]).double()},
        torch.where(expected < 0, 0.1 * expected, expected),
        x,
    )


@pytest.mark.parametrize("track", ["whitener", "covariance"])
def test_own_checkpoints_load_as_they_are(track):
    saved, loaded = (iter_norm(track=track, momentum=None) for _ in range(2))
    saved(torch.randn(32, CHANNELS).double())
    state = saved.state_dict()
    loaded.load_state_dict(state)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(state), rtol=0, atol=0)
    part = {name: state[name] * 2 for name in ("weight", f"running_{track}")}
    missing, unexpected = loaded.load_state_dict(part, strict=False)
    assert (missing, unexpected) == (["bias", "running_mean", "num_batches_tracked"], [])
    torch.testing.assert_close(loaded.state_dict()[f"running_{track}"], 2 * state[f"running_{track}"])


def test_hooks_rename_entries_before_they_are_converted():
    old = nn.BatchNorm1d(CHANNELS)
    nn.init.uniform_(old.running_var, 0.5, 2)
    layer, calls = IterNorm(CHANNELS, group_size=1), []

    def rename(module, state, prefix, *rest):
        calls.append(prefix)
        for key in [key for key in state if key.startswith("old_")]:
            state[key.removeprefix("old_")] = state.pop(key)

    layer.register_load_state_dict_pre_hook(rename)
    for _ in range(2):
        layer.load_state_dict({f"old_{key}": value for key, value in old.state_dict().items()})
    assert calls == ["", ""]
    x = torch.randn(20, CHANNELS)
    torch.testing.assert_close(layer.eval()(x), old.eval()(x))


def test_strict_reports_what_is_missing_and_what_is_too_much():
    state = batch_norm_state()
    del state["bias"], state["running_mean"]
    network = nn.Sequential(iter_norm())
    entries = {f"0.{name}": value for name, value in state.items()} | {"0.other": torch.ones(1)}
    message = (
        r'Missing key\(s\) in state_dict: "0.bias", "0.running_mean".*Unexpected key\(s\) in state_dict: "0.other"'
    )
    with pytest.raises(RuntimeError, match=re.compile(message, re.DOTALL)):
        network.load_state_dict(entries)
    network.load_state_dict(entries, strict=False)
    assert network[0].running_whitener[0, 0, 0] == (state["running_var"][0] + EPS).rsqrt()


@pytest.mark.parametrize("layer", [iter_norm(track_running_stats=False), GroupWhitening(5, CHANNELS).double()])
def test_a_layer_without_averages_takes_weight_and_bias_alone(layer):
    state = batch_norm_state()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "running_mean", "running_var"'):
        layer.load_state_dict(state)
    layer.load_state_dict(state, strict=False)
    torch.testing.assert_close(layer.weight.detach(), state["weight"])


WRONG = {
    "larger groups": (
        lambda: joined([10]),
        "the checkpoint has groups of 10 channels, and the layer has group_size=4: create the layer with group_size=10",
    ),
    "own larger groups": (lambda: IterNorm(CHANNELS, group_size=5).state_dict(), "create the layer with group_size=5"),
    "smaller groups": (lambda: separate([3, 3, 3, 1]), "create the layer with group_size=3"),
    "groups of several sizes": (lambda: separate([2, 4, 4]), r"groups of \[2, 4, 4\] channels: only the last"),
    "other channels": (lambda: separate([4, 4]), "is for 8 channels, and the layer has num_features=10"),
    "other channels of batch normalization": (lambda: batch_norm_state(6), "is for 6 channels"),
    "covariances": (
        lambda: separate([4, 4, 2], "DBNSigma_Groups", "running_projection"),
        "has averages of the covariance, and the layer has track='whitener': create the layer with track='covariance'",
    ),
    "own covariances": (lambda: iter_norm(track="covariance").state_dict(), "create the layer with track='covariance'"),
    "no square matrices": (lambda: {"running_wm": torch.ones(3, 4)}, r"running_wm has shape \(3, 4\)"),
    "an incomplete group": (
        lambda: {k: v for k, v in separate([4, 4, 2]).items() if k != "iterNorm_Groups.1.running_wm"},
        "has iterNorm_Groups.0.running_mean, but not iterNorm_Groups.1.running_wm",
    ),
}


@pytest.mark.parametrize(("state", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("strict", [True, False])
def test_what_does_not_fit_is_an_error_that_names_the_layer(state, message, strict):
    network = nn.Sequential(iter_norm())
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match=f"layer '0': .*{message}"):
        network.load_state_dict({f"0.{name}": value for name, value in state().items()}, strict=strict)
    torch.testing.assert_close(dict(network.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("state", "arguments", "message"),
    [
        (
            lambda: joined([5, 5]),
            {"method": "eigh"},
            "method='newton', .*'eigh': training continues differently",
        ),
        (
            lambda: joined([5, 5], "running_projection"),
            {"track": "covariance"},
            "method='eigh', .* method='newton': outputs in evaluation change",
        ),
        (batch_norm_state, {"track": "covariance"}, "batch normalization, .* outputs in evaluation change"),
    ],
)
def test_another_method_than_the_checkpoint_has_is_a_warning(state, arguments, message):
    network = nn.ModuleList(iter_norm(group_size=5, **arguments) for _ in range(3))
    entries = {f"{i}.{name}": value for i in range(3) for name, value in (affine() | state()).items()}
    with pytest.warns(UserWarning, match=message) as warned:
        network.load_state_dict(entries)
    assert len({str(warning.message) for warning in warned}) == 1, "Python shows equal warnings once"
