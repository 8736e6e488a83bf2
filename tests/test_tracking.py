"""Tracking measures the layers' inputs and outputs, and leaves the model as it is."""

import copy
import csv
import math
import sys
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from polywhiten.analysis.conditioning import block_covariances  # noqa: E402
from polywhiten.analysis.tracking import Record  # noqa: E402
from polywhiten.blocks import ChannelGroups, SampleGroups  # noqa: E402
from polywhiten.torch import GroupWhitening, IterNorm, track  # noqa: E402

X = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 6, 5, 5)))


def with_covariance(cov, samples=64):
    """Return an array (samples, d) with mean 3 and exactly this covariance."""
    x = np.random.default_rng(0).normal(size=(samples, len(cov)))
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / samples)).T
    return white @ np.linalg.cholesky(np.asarray(cov, float)).T + 3


def network(norm=lambda channels: IterNorm(channels, group_size=4)):
    torch.manual_seed(0)
    layers = nn.Conv2d(6, 10, 3), norm(10), nn.ReLU(inplace=True), nn.Conv2d(10, 6, 1), GroupWhitening(3, 6)
    return nn.Sequential(*layers, nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.Dropout()).double()


def hooks(model):
    return [
        hook for module in model.modules() for kind in vars(module) if "hooks" in kind for hook in vars(module)[kind]
    ]


# ---------------------------------------------------------------- measures


def test_known_covariances_give_their_measures():
    """The measures are of the input and of the exactly whitened output."""
    cov = np.diag([9.0, 4.0, 1.0])
    cov[0, 1] = cov[1, 0] = 3
    low, high = np.linalg.eigvalsh(cov)[[0, 2]]
    model = nn.Sequential(IterNorm(3, eps=0, method="eigh")).double()
    with track(model) as tracking:
        model(torch.from_numpy(with_covariance(cov)))
    (row,) = tracking.rows
    assert (row.step, row.layer, row.kind) == (0, "0", "IterNorm")
    assert row.input_condition_number == pytest.approx(high / low)
    assert row.input_whitening_error == pytest.approx(math.sqrt((8**2 + 3**2 + 2 * 3**2) / 3))
    assert row.input_correlation == pytest.approx(3 / 6 / 3)  # one of three pairs is correlated
    assert row.output_condition_number == pytest.approx(1)
    assert row.output_whitening_error == pytest.approx(0, abs=1e-10)
    assert row.output_correlation == pytest.approx(0, abs=1e-10)


def test_batch_normalization_is_measured_in_the_blocks_of_iternorm():
    """It makes variances 1 and leaves correlations unchanged."""
    x = torch.from_numpy(with_covariance([[4, 1], [1, 1]]))
    model = nn.Sequential(nn.BatchNorm1d(2, eps=1e-12)).double()
    with track(model) as tracking:
        model(x)
    (row,) = tracking.rows
    assert row.kind == "BatchNorm1d"
    assert (row.input_correlation, row.output_correlation) == pytest.approx((0.5, 0.5))
    assert row.output_condition_number == pytest.approx(1.5 / 0.5)
    assert row.output_whitening_error == pytest.approx(0.5)
    wide = torch.randn(256, 80)
    assert [cov.shape for cov in block_covariances(wide, ChannelGroups(1, 64))] == [(1, 64, 64), (1, 16, 16)]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_blocks_are_those_of_the_layers(memory):
    x = X.contiguous(memory_format=memory)
    one, rest = block_covariances(x, ChannelGroups(1, 4))
    rows = X.transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(one, [np.cov(rows[:4], bias=True)])
    np.testing.assert_allclose(rest, [np.cov(rows[4:], bias=True)])
    (samples,) = block_covariances(x, SampleGroups(1, 3))
    np.testing.assert_allclose(samples, [np.cov(sample.reshape(3, -1), bias=True) for sample in X])


def covariances_of(*blocks):
    return [np.cov(block, bias=True) for block in blocks]


CHANNELS, SAMPLES = X.transpose(0, 1).flatten(1).numpy(), X.numpy()
BLOCKS = {
    "IterNorm": (lambda: IterNorm(6, group_size=4), covariances_of(CHANNELS[:4], CHANNELS[4:])),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), covariances_of(CHANNELS)),
    "GroupWhitening": (lambda: GroupWhitening(3, 6), covariances_of(*SAMPLES.reshape(8, 3, 50))),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), covariances_of(*SAMPLES.reshape(8, 2, 75))),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_kind_of_layer_is_measured_in_its_blocks(kind):
    make, covariances = BLOCKS[kind]
    model = nn.Sequential(make().double())
    with track(model) as tracking:
        model(X)
    assert tracking.rows[0].kind == kind
    assert tracking.rows[0].input_condition_number == pytest.approx(np.median([np.linalg.cond(c) for c in covariances]))


def test_a_row_has_the_medians_over_the_blocks():
    record = Record()
    covariances = [np.stack([np.diag([1.0, value]) for value in (9, 4, 1)])]
    record._add(0, "a", "Layer", covariances, [np.diag([2.0, 0.0])[None], np.eye(3)[None], np.eye(3)[None]])
    assert record.rows[0].input_condition_number == pytest.approx(4)
    assert record.rows[0].output_condition_number == pytest.approx(1)


def test_values_that_are_not_finite_make_a_row_of_nan():
    model = nn.Sequential(IterNorm(6))
    with warnings.catch_warnings(action="error"), track(model) as tracking:
        model(torch.where(X > 3, torch.inf, X).float())
    assert all(map(math.isnan, [tracking.rows[0].input_condition_number, tracking.rows[0].output_correlation]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_measured_in_float32(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 1), IterNorm(6))
    with track(model) as tracking, torch.autocast("cpu", dtype):
        y = model[0](X.float())
        model(X.float())
    expected = np.cov(y.detach().double().transpose(0, 1).flatten(1).numpy(), bias=True)
    assert y.dtype is dtype
    assert tracking.rows[0].input_condition_number == pytest.approx(np.linalg.cond(expected), rel=1e-3)


# ---------------------------------------------------------------- which steps and layers are measured


def test_every_few_training_passes_are_measured():
    model = network()
    with track(model, every=3) as tracking:
        for _ in range(7):
            model.eval()(X)
            model.train()(X)
            model[1](model[0](X))  # this isn't a forward pass of the model
    names = ["1", "4", "5", "6"]
    assert [(row.step, row.layer) for row in tracking.rows] == [(step, name) for step in (0, 3, 6) for name in names]
    assert [row.kind for row in tracking.rows[:4]] == ["IterNorm", "GroupWhitening", "BatchNorm2d", "GroupNorm"]


def test_evaluation_passes_are_steps_if_wanted():
    model = network().eval()
    with track(model, every=2, evaluation=True) as tracking, torch.inference_mode():
        for _ in range(3):
            model(X)
    assert [row.step for row in tracking.rows if row.layer == "1"] == [0, 2]


def test_layers_are_chosen_by_name():
    model = nn.Sequential(network(), IterNorm(6)).double()
    with track(model, layers=["1", "0.4"]) as tracking:
        model(X)
    assert {row.layer for row in tracking.rows} == {"1", "0.4"}


def test_a_layer_used_twice_has_a_row_for_each_call():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = IterNorm(6)

        def forward(self, x):
            return self.norm(x=self.norm(x) + 0.5 * x.flip(1))

    model = Shared().double()
    with track(model, every=1) as tracking:
        model(X)
        model(X)
    assert [(row.step, row.layer) for row in tracking.rows] == [
        (0, "norm"),
        (0, "norm (2)"),
        (1, "norm"),
        (1, "norm (2)"),
    ]
    assert tracking.rows[0].input_condition_number != tracking.rows[1].input_condition_number
    assert tracking.rows[0] != tracking.rows[2]


def test_a_layer_may_be_the_model():
    layer = IterNorm(6).double()
    with track(layer) as tracking:
        layer(X)
    assert [row.layer for row in tracking.rows] == ["IterNorm"]


def test_layers_that_backward_calls_again_are_no_step():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model = Checkpointed()
    with track(model, every=1) as tracking:
        model(X.clone().requires_grad_()).sum().backward()
    assert [row.layer for row in tracking.rows] == ["inner.1", "inner.4", "inner.5", "inner.6"]


def test_a_copy_of_the_model_is_not_tracked():
    model = network()
    with track(model, every=2) as tracking:
        average = copy.deepcopy(model)
        for _ in range(3):
            model(X)
            average(X)
    assert [row.step for row in tracking.rows if row.layer == "1"] == [0, 2]


WRONG = {
    "no model": (lambda: track(lambda x: x), TypeError, "model is a builtins.function: pass a torch.nn.Module"),
    "no layers": (lambda: track(nn.Linear(2, 2)), ValueError, "model has no layer to track: an IterNorm, Group"),
    "every": (lambda: track(network(), every=0), ValueError, "every=0 must be 1 or more"),
    "unknown layer": (
        lambda: track(network(), layers=["1", "0"]),
        ValueError,
        "layers has '0', which can't be tracked: use names of '1', '4', '5', '6'",
    ),
    "one name": (lambda: track(network(), layers="1"), TypeError, r"layers='1' must be a sequence .* \['1'\]"),
}


@pytest.mark.parametrize(("use", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use(use, error, message):
    with pytest.raises(error, match=message):
        use()


# ---------------------------------------------------------------- tracking has no effect on training


def trained(steps=3, tracked=False):
    """Return outputs, gradients, parameters and running averages after some steps."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with track(model, every=1) if tracked else warnings.catch_warnings():
        for _ in range(steps):
            x = X.clone().requires_grad_()
            y = model(x)
            optimizer.zero_grad()
            y.pow(3).sum().backward()
            optimizer.step()
            seen += [y.detach(), x.grad, *(p.grad for p in model.parameters())]
    return [*seen, *model.state_dict().values()]


def test_tracking_changes_nothing():
    for a, b in zip(trained(tracked=True), trained(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_no_hook_is_left():
    model = network()
    before = hooks(model)
    tracking = track(model)
    assert len(hooks(model)) > len(before)
    tracking.remove()
    tracking.remove()  # removing twice does no harm
    assert hooks(model) == before == []
    with pytest.raises(KeyError), track(model):
        raise KeyError
    assert hooks(model) == []


def test_a_pass_that_fails_is_followed_by_others():
    model = network()
    with track(model, every=1) as tracking:
        with pytest.raises(RuntimeError):
            model(X.float())
        model(X)
        model.eval()(X)
    assert {row.step for row in tracking.rows} == {1}


def test_compiled_models():
    """A model that is tracked before it is compiled has rows until tracking ends; tracking it later only warns."""
    model = network()
    compiled = torch.compile(model, backend="eager")
    with track(model, every=2) as tracking:
        for _ in range(3):
            compiled(X)
    assert [row.step for row in tracking.rows if row.layer == "1"] == [0, 2]
    rows = len(tracking.rows)
    compiled(X)
    assert len(tracking.rows) == rows
    torch.compiler.reset()
    compiled(X)
    with track(compiled), pytest.warns(UserWarning, match="call track before the first pass of a compiled model"):
        compiled(X)


# ---------------------------------------------------------------- results


def record(layers=3, steps=5):
    rng, made = np.random.default_rng(0), Record()
    for step in range(steps):
        for layer in range(layers):
            x = rng.normal(size=(1, 3, 9))
            made._add(step, f"layer {layer}", "IterNorm", [x @ x.mT], [np.diag([1.0, 1.0, layer])[None]])
    return made


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_plot_has_a_line_a_layer_in_every_panel(tmp_path, count):
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings(action="error"):
        figure = record(count).plot(tmp_path / "plot.png", title="$title")
    assert (tmp_path / "plot.png").stat().st_size > 0
    panels = {panel.get_title(): panel.get_lines() for panel in figure.axes}
    lines = {title: [line for line in lines if line.get_marker() == "."] for title, lines in panels.items()}
    assert [len(own) for own in lines.values()] == [count] * 6
    np.testing.assert_allclose(lines["output: whitening error"][-1].get_ydata(), [abs(count - 2) / math.sqrt(3)] * 5)
    assert list(lines["output: whitening error"][0].get_xdata()) == [0, 1, 2, 3, 4]
    triangles = {
        title: sum(len(line.get_xdata()) for line in lines if line.get_marker() == "^")
        for title, lines in panels.items()
    }
    assert {title: number for title, number in triangles.items() if number} == {"output: condition number": 5}


@pytest.mark.parametrize("cov", [np.full((2, 2), np.nan), np.zeros((2, 2)), np.eye(2)], ids=["nan", "zero", "white"])
def test_a_plot_of_hardly_anything(cov, tmp_path):
    pytest.importorskip("matplotlib")
    made = Record()
    made._add(0, "layer", "IterNorm", [cov[None]], [np.eye(2)[None]])
    with warnings.catch_warnings(action="error"):
        made.plot(tmp_path / "plot.png")


def test_there_has_to_be_something_to_plot():
    with pytest.raises(ValueError, match="nothing was measured yet"):
        Record().plot()


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"polywhiten\[plot\]\""):
        record().plot()


def test_the_table_has_the_rows(tmp_path):
    made = record()
    made.write_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(made.rows)
    assert rows[4]["layer"] == made.rows[4].layer
    assert float(rows[4]["input_condition_number"]) == made.rows[4].input_condition_number
