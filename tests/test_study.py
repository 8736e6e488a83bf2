"""Tests of the study with tiny runs: what a run records, how runs resume, verdicts, and the page."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

for _module in ("torch", "click", "rich", "sklearn", "matplotlib"):
    pytest.importorskip(_module)

import torch  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from rich.console import Console  # noqa: E402

FOLDER = Path(__file__).parent.parent / "benchmarks"  # a folder of scripts that isn't installed
QUIET = Console(quiet=True)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return lambda name: import_module(f"study.{name}")


@pytest.fixture
def source(study, tmp_path):
    return study("pictures").Source(pictures(tmp_path / "pictures.npz"), "cpu")


def pictures(path, train=256, test=64):
    rng = np.random.default_rng(0)
    sets = {"train": train, "test": test}
    images = {f"x_{name}": rng.integers(0, 255, (count, 16, 16, 3), dtype=np.uint8) for name, count in sets.items()}
    labels = {f"y_{name}": np.arange(count) % 10 for name, count in sets.items()}
    np.savez(path, **images, **labels)
    return path


def made(study, source, experiment, wanted, path):
    """Return the number of runs made, and all rows in the file afterwards."""
    runs = study("runs")
    count = runs.resume(
        experiment, wanted, path, lambda *given: experiment.perform(*given, source=source, device="cpu"), "cpu", QUIET
    )
    return count, runs.rows_of(experiment, path)


def some(experiment):
    """Return the settings of a few runs of a plan, with different norms."""
    plan = experiment.plan("tiny", 1)
    return plan[:: max(1, len(plan) // 2)][:2]


@pytest.mark.parametrize("name", ["disturbance", "conditioning", "training", "groups", "resnet"])
def test_a_run_is_a_row_and_is_made_once(study, source, tmp_path, name):
    experiment = study(name).EXPERIMENT
    wanted, path = some(experiment), tmp_path / f"{name}.csv"
    count, rows = made(study, source, experiment, wanted, path)
    assert (count, [experiment.settings_of(row) for row in rows]) == (2, wanted)
    assert all(row.seconds > 0 for row in rows)
    assert made(study, source, experiment, wanted, path) == (0, rows)


def test_a_killed_study_goes_on_where_it_was(study, tmp_path):
    runs, groups = study("runs"), study("groups").EXPERIMENT
    wanted, path, started = groups.plan("tiny", 1)[:4], tmp_path / "groups.csv", []

    def perform(settings, progress, stop_at=None):
        started.append(settings)
        if len(started) == stop_at:
            raise KeyboardInterrupt
        return {
            "train_losses": (2.0, 1.5),
            "train_accuracies": (0.1, 0.2),
            "test_accuracies": (0.1, 0.3),
            "ms_per_step": 1.0,
        }

    with pytest.raises(KeyboardInterrupt):
        runs.resume(groups, wanted, path, lambda *given: perform(*given, stop_at=3), "cpu", QUIET)
    with path.open("a") as file:
        file.write("bn,,,,mlp,12")  # a row that wasn't completely written
    started.clear()
    assert runs.resume(groups, wanted, path, perform, "cpu", QUIET) == 2
    assert started == wanted[2:]
    assert [groups.settings_of(row) for row in runs.rows_of(groups, path)] == wanted


def test_columns_that_changed_are_refused(study, tmp_path):
    runs, groups = study("runs"), study("groups").EXPERIMENT
    (tmp_path / "groups.csv").write_text("norm,seed\nbn,0\n")
    with pytest.raises(ValueError, match="other columns"):
        runs.rows_of(groups, tmp_path / "groups.csv")


@pytest.mark.parametrize("norm", ["bn", "dbn"])
def test_what_diverges_is_recorded(study, source, tmp_path, norm):
    experiment = study("training").EXPERIMENT
    first = next(settings for settings in experiment.plan("tiny", 1) if settings.norm == norm)
    _, (row,) = made(study, source, experiment, [replace(first, lr=1e38)], tmp_path / "training.csv")
    assert row.diverged
    assert study("claims").accuracy(row) == 10
    assert study("claims").train_loss(row) == pytest.approx(np.log(10))


def test_all_norms_start_from_the_same_weights(study):
    training, fitting = study("training"), study("fitting")
    plan = training.EXPERIMENT.plan("tiny", 1)
    first, *others = (fitting.network(settings, 10)[0].weight for settings in plan)
    assert all(torch.equal(first, weight) for weight in others)


def test_every_network_has_the_norm_it_is_asked_for(study):
    norms, networks = study("norms"), study("networks")
    network = networks.resnet(lambda channels: norms.layer(norms.gw(4), channels, 4), 8, 2, 10)
    blocks = [part for part in network if isinstance(part, networks.Bottleneck)]
    assert [[type(part).__name__ for part in block.residual][1::3] for block in blocks] == [
        ["BatchNorm2d", "GroupWhitening", "BatchNorm2d"]
    ] * 6


def test_gauss_newton_matrix_is_the_hessian_of_a_linear_model(study):
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3
    weight = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    loss = lambda w: torch.nn.functional.cross_entropy(x @ w.reshape(3, 4).T, y)
    hessian = torch.autograd.functional.hessian(loss, weight.detach().flatten())
    found = study("conditioning").gauss_newton(x @ weight.T, [weight])
    torch.testing.assert_close(found, hessian)


@pytest.mark.parametrize(
    ("values", "verdict"), [([1.0, 1.2, 1.1], "held"), ([-1.0, -1.2, -1.1], "not held"), ([1.0, -1.2, 0.4], "unclear")]
)
def test_verdicts_are_of_differences_seed_by_seed(study, values, verdict):
    claims = study("claims")
    base = {0: 50.0, 1: 70.0, 2: 60.0}  # the differences between seeds are larger than those between norms
    better = {seed: base[seed] + value for seed, value in enumerate(values)}
    (found,) = claims.compared("claim", better | {3: 0.0}, base, lambda value: value)
    assert found.verdict == verdict
    assert not [*claims.compared("claim", {0: 1.0}, {0: 2.0}, lambda value: value)]  # one seed gives no verdict


def test_report_has_a_picture_and_tables_of_what_is_there(study, source, tmp_path):
    commands, runs = study("commands"), study("runs")
    seeds = {"resnet": 2, "disturbance": 1, "groups": 1}
    for experiment in commands.EXPERIMENTS:
        if experiment.name in seeds:
            wanted = experiment.plan("tiny", seeds[experiment.name])[:4]
            made(study, source, experiment, wanted, experiment.path(tmp_path, "tiny"))
    page = tmp_path / "README.md"
    page.write_text((FOLDER / "study" / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ["report", "--results", str(tmp_path), "--page", str(page), "--size", "tiny"]
    result = CliRunner().invoke(commands.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {f"{name}-tiny.png" for name in seeds}
    text = page.read_text(encoding="utf-8")
    assert "| A residual network with GW" in text
    assert "](resnet-tiny.png) |" in text
    assert "](training-tiny.png)" not in text
    assert runs.about("cpu") in text


def test_commands_say_what_is_wrong(study, tmp_path):
    main = study("commands").main
    data = pictures(tmp_path / "pictures.npz", train=16)
    for arguments, message in (
        (["training"], "--data"),
        (["training", "--data", str(data), "--size", "tiny"], "--out"),
        (["training", "--data", str(data), "--size", "tiny", "--out", str(tmp_path)], "needs 256 square colour images"),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code != 0
        assert message in result.output
