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


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return lambda name: import_module(f"study.{name}")


@pytest.fixture
def place(study, tmp_path):
    source = study("pictures").Source(pictures(tmp_path / "pictures.npz"), "cpu")
    return study("runs").Place(source, "cpu", tmp_path / "checkpoints")


def pictures(path, train=256, test=64):
    rng = np.random.default_rng(0)
    sets = {"train": train, "test": test}
    images = {f"x_{name}": rng.integers(0, 255, (count, 16, 16, 3), dtype=np.uint8) for name, count in sets.items()}
    labels = {f"y_{name}": np.arange(count) % 10 for name, count in sets.items()}
    np.savez(path, **images, **labels)
    return path


def made(study, place, experiment, wanted, folder, report=lambda update: None, deadline=float("inf")):
    """Make runs as a command does, and return the file of rows afterwards."""
    jobs, recording = study("jobs"), study("recording")
    rows = {experiment.name: study("runs").Rows(experiment, folder, "tiny")}
    left = [
        jobs.Job(experiment.name, (settings,)) for settings in wanted if not rows[experiment.name].finished(settings)
    ]
    with recording.Recorder(rows, left, place, Console(quiet=True)) as recorder:

        def both(update):
            recorder.update(update)
            report(update)

        jobs.Maker(place, deadline, None, both).make(left, 1)
    recorder.summarize()
    return study("runs").Rows(experiment, folder, "tiny")


def some(experiment):
    """Return the settings of a few runs of a plan, with different norms."""
    plan = experiment.wanted("tiny", 1)
    return plan[:: max(1, len(plan) // 2)][:2]


@pytest.mark.parametrize("name", ["disturbance", "conditioning", "training", "evaluation", "groups", "resnet", "steps"])
def test_a_run_is_a_row_and_is_made_once(study, place, tmp_path, name):
    experiment, updates = study("experiments").BY_NAME[name], []
    wanted = some(experiment)
    rows = made(study, place, experiment, wanted, tmp_path)
    assert all(rows.finished(settings) and rows.get(settings).seconds > 0 for settings in wanted)
    made(study, place, experiment, wanted, tmp_path, updates.append)
    assert not updates
    finished = [rows.get(settings) for settings in wanted]
    assert study("figures").FIGURES[name](finished, "tiny").axes
    assert wanted[0].label in study("tables").tables(name, finished, "tiny", [])


def test_a_killed_run_goes_on_after_its_last_epoch(study, place, tmp_path):
    experiment = study("training").EXPERIMENT
    wanted = [experiment.wanted("tiny", 1)[1]]  # IterNorm, whose other averages are kept too
    whole = made(study, replace(place, checkpoints=None), experiment, wanted, tmp_path / "whole").get(wanted[0])

    def kill(update):
        if update.results is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(study, place, experiment, wanted, tmp_path / "killed", kill)
    rows = study("runs").Rows(experiment, tmp_path / "killed", "tiny")
    assert not rows.finished(wanted[0])
    assert rows.get(wanted[0]).test_accuracies == whole.test_accuracies[:1]
    fractions = []
    row = made(study, place, experiment, wanted, tmp_path / "killed", lambda u: fractions.append(u.fraction)).get(
        wanted[0]
    )
    assert fractions[:2] == [0, 0.5]  # the checkpoint's epoch isn't trained again
    measured = "seconds", "ms_per_step"
    assert replace(row, **{name: getattr(whole, name) for name in measured}) == whole
    assert not [*place.checkpoints.iterdir()]


def test_after_the_deadline_no_run_begins(study, place, tmp_path):
    experiment, updates = study("training").EXPERIMENT, []
    made(study, place, experiment, some(experiment), tmp_path, updates.append, deadline=0)
    assert not updates


def test_what_a_killed_process_left_is_made_again(study):
    from concurrent.futures.process import BrokenProcessPool

    jobs = study("jobs")
    done, begun, between, unbegun = (jobs.Job("groups", (number, number + 1)) for number in (0, 10, 20, 30))
    current = {1: jobs.Update("groups", 10, 0.5), 2: jobs.Update("groups", 20, 1.0, ended=True)}
    broken = BrokenProcessPool()
    left, interrupted = jobs.left_of([done, begun, between, unbegun], [None, broken, broken, broken], current)
    assert left == [unbegun]
    assert interrupted == [begun, jobs.Job("groups", (21,))]
    with pytest.raises(BrokenProcessPool):  # no process could begin, so others couldn't either
        jobs.left_of([begun], [broken], {})


def test_a_checkpoint_that_is_being_written_does_not_replace_the_last_one(study, tmp_path, monkeypatch):
    checkpoints, path = study("checkpoints"), tmp_path / "run.pt"
    checkpoints.save(path, {"epochs": [1]})

    def killed(state, to):
        to.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(path, {"epochs": [1, 2]})
    assert checkpoints.load(path, "cpu") == {"epochs": [1]}


def test_the_first_rounds_of_all_experiments_come_first(study, tmp_path):
    commands, runs = study("commands"), study("runs")
    rows = {each.name: runs.Rows(each, tmp_path, "gpu") for each in commands.EXPERIMENTS}
    jobs = commands.missing(commands.EXPERIMENTS, rows, "gpu", None)
    names = [job.experiment for job in jobs]
    fits = [job.settings[0] for job in jobs if job.experiment in ("training", "resnet")]
    assert list(dict.fromkeys(names)) == ["training", "resnet", "groups", "disturbance", "steps"]
    assert names.count("disturbance") == 1  # one process makes all its runs, which share a trained network
    assert [fit.seed for fit in fits] == 9 * [0] + 9 * [1] + 9 * [2] + 6 * [0]


def test_what_a_smaller_size_has_made_is_not_made_again(study, tmp_path):
    training, runs = study("training").EXPERIMENT, study("runs")
    first, second, *_ = training.wanted("gpu", 1)
    results = dict.fromkeys(("train_losses", "train_accuracies", "test_accuracies"), (0.5,) * first.epochs)
    common = {"seconds": 1.0, "device": "cuda", "about": "a GPU", "ms_per_step": 1.0}
    runs.Rows(training, tmp_path, "gpu").add(training.row(**vars(first), **results, **common))
    large = runs.Rows(training, tmp_path, "large")
    assert first in training.wanted("large", 1)
    assert large.finished(first)
    assert not large.finished(second)


def test_columns_that_changed_are_refused(study, tmp_path):
    (tmp_path / "groups-tiny.csv").write_text("norm,seed\nbn,0\n")
    with pytest.raises(ValueError, match="other columns"):
        study("runs").Rows(study("groups").EXPERIMENT, tmp_path, "tiny")


@pytest.mark.parametrize("norm", ["bn", "dbn"])
def test_what_diverges_is_recorded(study, place, tmp_path, norm):
    experiment = study("training").EXPERIMENT
    first = next(settings for settings in experiment.wanted("tiny", 1) if settings.norm == norm)
    settings = replace(first, lr=1e38, warmup=0.0)
    row = made(study, place, experiment, [settings], tmp_path).get(settings)
    assert row.diverged
    assert study("findings").accuracy(row) == 10
    assert study("findings").train_loss(row) == pytest.approx(np.log(10))


def test_all_norms_start_from_the_same_weights(study):
    training, fitting = study("training"), study("fitting")
    plan = training.EXPERIMENT.wanted("tiny", 1)
    first, *others = (fitting.network(settings, 10)[0].weight for settings in plan)
    assert all(torch.equal(first, weight) for weight in others)


@pytest.mark.parametrize(
    ("where", "first", "block"),
    [
        ("middle", "BatchNorm2d", ["BatchNorm2d", "GroupWhitening", "BatchNorm2d"]),
        ("first", "GroupWhitening", 3 * ["BatchNorm2d"]),
    ],
)
def test_a_residual_network_has_its_norm_at_the_place_it_is_asked_for(study, where, first, block):
    norms, networks = study("norms"), study("networks")
    network = norms.converted(networks.resnet(8, 2, 10), norms.gw(4), where)
    blocks = [part for part in network if isinstance(part, networks.Bottleneck)]
    assert type(network[1]).__name__ == first
    assert [[type(part).__name__ for part in each.residual][1::3] for each in blocks] == 6 * [block]


@pytest.mark.parametrize("norm", ["bn", "iternorm", "dbn"])
def test_comparing_averages_does_not_change_training(study, place, tmp_path, norm):
    experiment = study("training").EXPERIMENT
    settings = next(each for each in experiment.wanted("tiny", 1) if each.norm == norm)
    one = replace(settings, recomputed_over=0)
    rows = made(study, place, experiment, [settings, one], tmp_path)
    compared, plain = rows.get(settings), rows.get(one)
    assert compared.train_losses == plain.train_losses
    assert compared.test_accuracies == plain.test_accuracies
    assert len(compared.recomputed_accuracies) == 2
    assert len(compared.covariance_accuracies) == (2 if norm == "iternorm" else 0)


def test_averages_of_covariances_are_those_of_a_layer_that_tracks_them(study):
    averages, iter_norm = study("averages"), import_module("polywhiten.torch").IterNorm
    layer, expected = iter_norm(4, group_size=2), iter_norm(4, group_size=2, track="covariance")
    own = averages.CovarianceAverages(layer)
    with own.following():
        for x in torch.randn(3, 16, 4):
            layer(x), expected(x)
    layer.eval()
    x = torch.randn(16, 4)
    before = layer(x)
    with own.evaluating():
        torch.testing.assert_close(layer(x), expected.eval()(x))
    torch.testing.assert_close(layer(x), before)


def test_augmentation_shifts_and_flips_each_picture(study, place):
    data = place.source.pictures(16, 256, 64)
    moves = torch.tensor([[1, 1, 0], [2, 1, 0], [1, 0, 1]])  # unchanged; up by one; flipped, and moved by one
    found = data.augmented(torch.tensor([5, 6, 7]), moves, 1)
    black = data.standardized(torch.zeros(1, 1, 1, 3, dtype=torch.uint8))
    plain = data.standardized(data.x_train[5:8])
    torch.testing.assert_close(found[0], plain[0])
    torch.testing.assert_close(found[1][:, :-1], plain[1][:, 1:])
    torch.testing.assert_close(found[1][:, -1:], black[0].expand(3, 1, 16))
    torch.testing.assert_close(found[2][..., :-1], plain[2].flip(-1)[..., 1:])


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
    compared = study("findings").compared
    base = {0: 50.0, 1: 70.0, 2: 60.0}  # the differences between seeds are larger than those between norms
    better = {seed: base[seed] + value for seed, value in enumerate(values)}
    (found,) = compared("claim", "here", better | {3: 0.0}, base, lambda value: value)
    assert found.verdict == verdict
    (single,) = compared("claim", "here", {0: 2.0}, {0: 1.0}, lambda value: value)
    assert (single.measured, single.verdict) == ("+1.0 points", "one seed")


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        (["held", "held"], "held"),
        (["held", "one seed"], "held"),
        (["held", "not held"], "held in part"),
        (["not held", "unclear"], "not held"),
        (["one seed"], "one seed"),
    ],
)
def test_several_findings_give_one_verdict(study, verdicts, together):
    findings = study("findings")
    assert findings.verdict_of(findings.Finding("", "", "", verdict) for verdict in verdicts) == together


@pytest.mark.parametrize(
    ("at_larger", "verdict"), [("held", "held"), ("one seed", "not held at the small scale")], ids=["seeds", "one seed"]
)
def test_a_claim_is_stated_once_and_the_larger_scale_decides(study, at_larger, verdict):
    """One seed decides nothing, so the verdict is then that of the small scale, and says so."""
    findings, report = study("findings"), study("report")
    small = [("5,000 images", findings.Finding("It works", "VGG", "-1 points", "not held"))]
    large = [("50,000 images", findings.Finding("It works", "VGG", "+2 points", at_larger))]
    *_, line = report.claims({"It works": {"small": small, "gpu": large}})
    assert line == f"| It works | *5,000 images.* VGG: -1 points. | *50,000 images.* VGG: +2 points. | {verdict} |"


def test_report_has_a_picture_and_tables_of_what_is_there(study, place, tmp_path):
    commands, seeds = study("commands"), {"resnet": 2, "disturbance": 1}
    for experiment in commands.EXPERIMENTS:
        if experiment.name in seeds:
            made(study, place, experiment, experiment.wanted("tiny", seeds[experiment.name])[:5], tmp_path)
    page = tmp_path / "README.md"
    page.write_text((FOLDER / "study" / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ["report", "--results", str(tmp_path), "--page", str(page), "--size", "tiny"]
    result = CliRunner().invoke(commands.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {f"{name}-tiny.png" for name in seeds}
    text = page.read_text(encoding="utf-8")
    assert text.count("| A residual network with GW in its blocks improves over BN's |") == 1
    assert "](training-tiny.png)" not in text
    assert study("runs").about("cpu") in text


def test_commands_say_what_is_wrong(study, tmp_path):
    main = study("commands").main
    data = pictures(tmp_path / "pictures.npz", train=16)
    for arguments, message in (
        (["training"], "--data"),
        (["training", "--data", str(data), "--size", "tiny"], "--out"),
        (["conditioning", "--size", "gpu"], "sizes tiny, small, large"),
        (["training", "--data", str(data), "--size", "tiny", "--out", str(tmp_path)], "needs 256 square colour images"),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code != 0
        assert message in result.output
