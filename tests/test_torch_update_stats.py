"""`update_stats` sets running averages to the statistics of all samples of a data set."""

import copy
import sys

import pytest

torch = pytest.importorskip("torch")

from processes import run_processes  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn  # noqa: E402

import polywhiten as pw  # noqa: E402
from polywhiten.torch import GroupWhitening, IterNorm, freeze_stats, update_stats  # noqa: E402

SIZES = [7, 30, 5, 19]  # of batches


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def batches(*shape, dtype=torch.float64, channels=6):
    """Return batches of correlated channels with different means; the means of the batches differ too."""
    mixing = torch.randn(channels, channels, dtype=dtype) / 3 + torch.eye(channels, dtype=dtype)
    found = []
    for size in SIZES:
        x = torch.randn(size, *shape, channels, dtype=dtype) @ mixing + torch.randn(channels, dtype=dtype) + 3
        found.append(x.movedim(-1, 1))
    return found


def network(channels=6, **arguments):
    """Return a network with two layers, in evaluation mode."""
    layers = [IterNorm(channels, group_size=4, **arguments), nn.ReLU(), nn.Linear(channels, 5), IterNorm(5)]
    return nn.Sequential(*layers).double().eval()


def statistics(x, layer):
    """Return the mean and the tracked matrices of all samples of x."""
    options = {name: getattr(layer, name) for name in ("group_size", "method", "iterations", "eps", "relative_eps")}
    stats = pw.whitening_stats(x, **options)
    return stats.mean, getattr(stats, layer.track)


def averages(layer):
    """Return the running averages of a layer."""
    return layer.running_mean, getattr(layer, f"running_{layer.track}")


def state(model):
    """Return a copy of all that `update_stats` may change in a model."""
    modes = [(m.training, getattr(m, "momentum", 0), getattr(m, "track_running_stats", 0)) for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    return copy.deepcopy(model.state_dict()), modes, hooks


def assert_same_state(new, old):
    torch.testing.assert_close(new[0], old[0], rtol=0, atol=0, equal_nan=True)
    assert new[1:] == old[1:]


@pytest.mark.parametrize("shape", [(), (3, 4)], ids=["vectors", "images"])
@pytest.mark.parametrize("track", ["whitener", "covariance"])
@pytest.mark.parametrize(
    "arguments", [{}, {"method": "eigh"}, {"relative_eps": True, "eps": 0.1, "momentum": None}], ids=str
)
def test_averages_are_those_of_all_samples(shape, track, arguments):
    layer = IterNorm(6, group_size=4, track=track, dtype=torch.float64, **arguments)
    layer(torch.randn(50, 6, dtype=torch.float64))  # what was averaged before has no influence
    data = batches(*shape)
    assert update_stats(layer, data) is None
    torch.testing.assert_close(averages(layer), statistics(torch.cat(data), layer), rtol=1e-11, atol=1e-11)
    assert layer.num_batches_tracked == len(data)


def test_a_mean_far_from_0_loses_no_digits():
    data = [x.float() + 1000 for x in batches(8)]
    layer = IterNorm(6, group_size=4, track="covariance")
    update_stats(layer, data)
    expected = statistics(torch.cat(data).double(), layer)[1]  # the batches' means have errors of 6e-5
    torch.testing.assert_close(layer.running_covariance.double(), expected, rtol=3e-4, atol=1e-4)


def test_a_layer_sees_what_the_network_computes_in_training():
    model, data = network(), batches()
    trained = copy.deepcopy(model).train()
    with torch.no_grad():
        inputs = torch.cat([trained[:3](x) for x in data])
    update_stats(model, data)
    torch.testing.assert_close(averages(model[3]), statistics(inputs, model[3]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", [lambda x: [x], lambda x: (x, torch.zeros(len(x)))], ids=["list", "tuple"])
def test_the_first_entry_of_a_batch_is_the_input(form):
    model, data = network(), batches()
    update_stats(model, (form(x) for x in data))
    torch.testing.assert_close(averages(model[0]), statistics(torch.cat(data), model[0]))


def test_inputs_are_moved_to_a_device():
    class Elsewhere:
        def to(self, device):
            return torch.randn(8, 6, device=device)

    layer = IterNorm(6)
    update_stats(layer, [Elsewhere(), Elsewhere()], device="cpu")
    assert layer.num_batches_tracked == 2


def test_batch_normalization_gets_what_update_bn_gives_it():
    model = nn.Sequential(nn.BatchNorm1d(6, momentum=0.3), nn.Dropout(0.5), IterNorm(6, momentum=0.7)).double()
    model[1].eval()  # every module gets its own mode back
    data = batches()
    expected = copy.deepcopy(model[:1])
    update_bn(data, expected)
    before = state(model)
    update_stats(model, data)
    torch.testing.assert_close(model[:1].state_dict(), expected.state_dict())
    assert state(model)[1:] == before[1:]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_all_is_as_before(error):
    def broken():
        yield from data
        raise error("no more")

    data = batches()
    model = nn.Sequential(nn.BatchNorm1d(6, momentum=0.3), network()).double()
    model.train()(data[0])
    model[0].eval()
    before = state(model)
    with pytest.raises(error, match="no more"):
        update_stats(model, broken())
    assert_same_state(state(model), before)


def test_a_batch_that_is_not_finite_is_left_out_with_a_warning():
    layer, data = network()[:1], batches()
    bad = data[1].clone()
    bad[3, 2] = float("nan")
    with pytest.warns(UserWarning, match=r"left out by layers '0' \(1 of 5\)") as warned:
        update_stats(layer, [data[0], bad, *data[1:]])
    assert warned[0].filename == __file__
    torch.testing.assert_close(averages(layer[0]), statistics(torch.cat(data), layer[0]))
    assert layer[0].num_batches_tracked == 4


def test_a_layer_may_raise_an_error_for_such_a_batch():
    model, data = network(on_nonfinite="raise"), batches()
    before = state(model)
    with pytest.raises(ValueError, match="layer '0' has NaN or infinity"):
        update_stats(model, [data[0], data[1] * float("inf"), data[2]])
    assert_same_state(state(model), before)


def test_averages_that_their_dtype_cannot_hold_are_an_error():
    model = nn.Sequential(nn.BatchNorm1d(6), IterNorm(6, affine=False, dtype=torch.float16))
    with torch.no_grad():
        model[0].bias.add_(1e5)
    before = state(model)
    with pytest.raises(ValueError, match=r"layer '1' would not be finite in torch.float16"):
        update_stats(model, [x.float() for x in batches()])
    assert_same_state(state(model), before)


def test_what_nothing_is_computed_from_is_an_error():
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match="loader yields no batches"):
        update_stats(model, [])
    with pytest.raises(TypeError, match="model is a"):
        update_stats([], model)
    with pytest.raises(TypeError, match="loader is a"):
        update_stats(model, model[0].eps)
    with pytest.raises(ValueError, match="num_features"):
        update_stats(model, [torch.randn(8, 7, dtype=torch.float64)])
    assert_same_state(state(model), before)


def test_a_model_without_averages_gives_a_warning():
    model = nn.Sequential(IterNorm(6, track_running_stats=False), GroupWhitening(2, 6))
    with pytest.warns(UserWarning, match="nothing to update") as warned:
        update_stats(model, batches())
    assert warned[0].filename == __file__


def test_a_layer_that_got_no_samples_keeps_its_averages():
    model = nn.Sequential(IterNorm(6), IterNorm(6)).double()
    model(batches()[1])
    before = copy.deepcopy(model[1].state_dict())
    model.forward = lambda x: model[0](x)
    with pytest.warns(UserWarning, match="got no samples, and keep their running averages: '1'") as warned:
        update_stats(model, batches())
    assert warned[0].filename == __file__
    torch.testing.assert_close(model[1].state_dict(), before)


def test_an_empty_batch_does_not_count():
    layer, data = IterNorm(6).double(), batches()
    update_stats(layer, [data[0][:0], *data])
    assert layer.num_batches_tracked == len(data)
    torch.testing.assert_close(averages(layer), statistics(torch.cat(data), layer))


def test_frozen_layers_stay_as_they_are():
    model = network()
    freeze_stats(model[0])
    before = copy.deepcopy(model[0].state_dict())
    update_stats(model, batches())
    torch.testing.assert_close(model[0].state_dict(), before)
    assert model[3].num_batches_tracked == len(SIZES)


def test_a_layer_that_is_called_twice_has_the_samples_of_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = IterNorm(6).double()

        def forward(self, x):
            return self.layer(x=x) + self.layer(2 * x)

    model, data = Twice(), batches()
    update_stats(model, data)
    everything = torch.cat([*data, *(2 * x for x in data)])
    torch.testing.assert_close(averages(model.layer), statistics(everything, model.layer))


def test_padded_positions_do_not_count_on_any_axis():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = IterNorm(6, group_size=4, axis=-1, shuffle=True).double()

        def forward(self, x):
            return self.layer(x, x[..., 0] != 0)

    model, data = Padded(), [x.movedim(1, -1).contiguous() for x in batches(5)]
    for x in data:
        x[:, 3:] = 0
    update_stats(model, [torch.zeros(3, 5, 6, dtype=torch.float64), *data])  # nothing counts in the first one
    everything = torch.cat(data)[:, :3].reshape(-1, 6)
    torch.testing.assert_close(averages(model.layer), statistics(everything, model.layer))
    assert model.layer.num_batches_tracked == len(data)


@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}], ids=["mean", "moving average"])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_of_weights(options, use_buffers):
    model, data = network(), batches()
    averaged = AveragedModel(model, use_buffers=use_buffers, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in data:
        model.train()(x).pow(3).mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    trained = copy.deepcopy(model.state_dict())
    update_stats(averaged, data)
    with torch.no_grad():
        inputs = torch.cat([averaged.module.train()[:3](x) for x in data])
    torch.testing.assert_close(averages(averaged.module[3]), statistics(inputs, model[3]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.state_dict(), trained)
    assert averaged.n_averaged == len(data)


def test_a_compiled_model_is_updated_too():
    model, data = nn.Sequential(IterNorm(6, group_size=4)).double(), batches()
    compiled = torch.compile(model, backend="eager")
    compiled(data[0])
    update_stats(compiled, data)
    torch.testing.assert_close(averages(model[0]), statistics(torch.cat(data), model[0]))


@pytest.mark.parametrize("on_terminal", [True, False])
def test_progress_is_shown_on_a_terminal(on_terminal, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: on_terminal)
    layer = IterNorm(6).double()
    update_stats(layer, batches(), progress=True)
    assert layer.num_batches_tracked == len(SIZES)
    shown = capsys.readouterr()
    assert ("update_stats" in shown.err) == on_terminal
    assert not shown.out


def test_progress_without_its_package_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ModuleNotFoundError, match="progress=True needs the package rich: pip install"):
        update_stats(IterNorm(6), batches(), progress=True)


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from polywhiten.torch import IterNorm, update_stats, whitening_stats

store, rank, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=number)
torch.manual_seed(0)
data = torch.randn(60, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
shares = (data[:8], data[8:22]), (data[22:22], data[22:])  # unequal ones, one of them empty
layer = IterNorm(6, group_size=4, process_group="world").double()
update_stats(layer, shares[rank])
stats = whitening_stats(data, group_size=4)
torch.testing.assert_close((layer.running_mean, layer.running_whitener), (stats.mean, stats.whitener))
assert layer.num_batches_tracked == 2
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is built without processes")
def test_processes_that_share_a_batch_get_the_statistics_of_all_their_samples(tmp_path):
    statuses, errors = run_processes(TWO_PROCESSES, 2, tmp_path / "store")
    assert statuses == [0, 0], errors
