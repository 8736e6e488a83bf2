"""The demo in Keras trains through `fit` as the demo in PyTorch does, on the current backend."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
from rows import Library

for _module in ("click", "rich", "sklearn", "matplotlib"):
    pytest.importorskip(_module)

ROW = next((b for b in Library if b.value.keras_backend == os.environ.get("KERAS_BACKEND", "tensorflow")), None)
if ROW is None or ROW.value.missing:
    pytest.skip(ROW.value.missing if ROW else "no row for Keras' backend", allow_module_level=True)

import keras  # noqa: E402

from polywhiten.cli import commands  # noqa: E402
from polywhiten.cli.demo.data import prepare  # noqa: E402
from polywhiten.cli.demo.training import NORMS, Settings, batches  # noqa: E402
from polywhiten.keras import GroupWhitening, IterNorm  # noqa: E402
from polywhiten.keras import demo as keras_demo  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*__array__:DeprecationWarning")

SETTINGS = Settings(epochs=100, batch_size=8, lr=0.05, seed=3, device="cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Use one thread: on a busy machine, several would mostly wait for each other in networks this small."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 1
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(threads)


def pictures(shape=(8, 8), train=25, test=6):
    """Return bright and dark images."""
    rng = np.random.default_rng(0)
    made = {}
    for name, n in (("train", train), ("test", test)):
        made[f"y_{name}"] = y = np.arange(n) % 2
        made[f"x_{name}"] = rng.integers(0, 100, (n, *shape)) + 100 * y.reshape(-1, *[1] * len(shape))
    return made


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.npz"
    np.savez(path, **pictures())
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def demo(*args):
    return commands.run(["demo", "--framework", "keras", *map(str, args)])


def rows(out):
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_norm_is_trained_and_reported(small, out, capsys):
    assert demo("--data", small, "--epochs", 1, "--batch-size", 8, "--out", out) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    assert stdout.startswith("small.npz: 25 training")  # without a terminal, no progress is shown
    assert f"Keras on {keras_demo.BACKEND}\n" in stdout
    assert [(row["norm"], row["epoch"]) for row in rows(out)] == [(norm, "1") for norm in NORMS]
    assert all(np.isfinite(float(row[key])) for row in rows(out) for key in ("train_loss", "test_loss"))
    assert all(float(row["ms_per_step"]) > 0 for row in rows(out))
    assert (out / "curves.png").stat().st_size > 0


def test_what_is_shown_on_a_terminal_and_elsewhere_and_that_the_seed_decides_all_numbers(
    small, tmp_path, capsys, monkeypatch
):
    """One run is in a new process, where no startup messages of a framework appear, and one on a terminal."""

    def args(name):
        return "--data", small, "--norm", "bn", "--epochs", 2, "--batch-size", 8, "--out", tmp_path / name

    def losses(name):
        return [[float(row[c]) for c in ("train_loss", "test_loss", "test_accuracy")] for row in rows(tmp_path / name)]

    code = "from polywhiten.__main__ import main\nmain()"
    command = [sys.executable, "-P", "-c", code, "demo", "--framework", "keras", *map(str, args("a"))]
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    environment |= {"KERAS_BACKEND": keras_demo.BACKEND, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("small.npz: 25 training")

    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    keras.random.normal((1,))  # random numbers that the program drew before make no difference
    assert demo(*args("b")) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    shown = ["\nBN\n", "Epoch 1/2", "3/3", "val_accuracy", "Epoch 2/2", "small.npz"]
    places = [stdout.index(word) for word in shown]
    assert places == sorted(places)
    np.testing.assert_allclose(losses("b"), losses("a"), rtol=1e-4)


def test_every_norm_starts_from_the_same_weights_in_its_own_layer():
    data = prepare("", **pictures((8, 8, 3)))
    networks = {norm: keras_demo.network(norm, data, seed=3) for norm in NORMS}

    def weights(model):
        own = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)]
        return np.concatenate([value.ravel() for layer in own for value in layer.get_weights()])

    first = weights(networks["bn"])
    for model in networks.values():
        np.testing.assert_array_equal(weights(model), first)
    assert not np.isclose(weights(keras_demo.network("bn", data, seed=4)), first).any()
    kernel, *_ = networks["bn"].layers[0].get_weights()  # initialized as in PyTorch
    assert 0.95 * 27**-0.5 < np.abs(kernel).max() < 27**-0.5
    layers = {norm: model.layers[1] for norm, model in networks.items()}
    assert isinstance(layers["bn"], keras.layers.BatchNormalization)
    assert isinstance(layers["gn"], keras.layers.GroupNormalization)
    assert isinstance(layers["gw"], GroupWhitening)
    assert all(isinstance(layers[norm], IterNorm) for norm in ("iternorm", "dbn"))
    assert (layers["iternorm"].method, layers["dbn"].method, layers["dbn"].group_size) == ("newton", "eigh", 16)
    assert {layer.epsilon for layer in layers.values()} == {1e-5}


@pytest.mark.skipif(keras_demo.BACKEND != "torch", reason="PyTorch isn't the backend")
@pytest.mark.parametrize("norm", NORMS)
def test_an_epoch_is_that_of_pytorch(norm, monkeypatch):
    """The losses are the same from the same weights, because batches, steps and layers are the same."""
    import torch

    from polywhiten.torch import demo as torch_demo

    data = prepare("", **pictures())
    theirs = torch_demo.network(norm, data, 0)
    ours = keras_demo.network(norm, data, SETTINGS.seed)
    given = [layer for layer in theirs if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    taken = [layer for layer in ours.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)]
    for layer, source in zip(given, taken, strict=True):
        kernel, *bias = source.get_weights()
        values = [kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T, *bias]
        layer.load_state_dict(dict(zip(("weight", "bias"), map(torch.from_numpy, values), strict=False)))
    monkeypatch.setattr(torch_demo, "network", lambda *args: theirs)
    a, b = (next(module.train(norm, data, SETTINGS, lambda: None)) for module in (torch_demo, keras_demo))
    np.testing.assert_allclose(b.train_loss, a.train_loss, rtol=2e-3)
    if norm != "bn":  # PyTorch averages the unbiased variance
        np.testing.assert_allclose(b.test_loss, a.test_loss, rtol=2e-3)


def test_the_batches_are_those_of_every_framework(monkeypatch):
    asked = []

    class Spy(keras_demo._Batches):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            asked.append((index, batch))
            return batch

    monkeypatch.setattr(keras_demo, "_Batches", Spy)
    data = prepare("", **pictures())
    steps = []
    training = keras_demo.train("bn", data, SETTINGS, lambda: steps.append(1))
    for epoch in (1, 2):
        asked.clear()
        next(training)
        assert len(steps) == 3 * epoch
        assert [index for index, _ in asked[-3:]] == [0, 1, 2]
        for (_, (x, y)), chosen in zip(asked[-3:], batches(data, SETTINGS, epoch), strict=True):
            np.testing.assert_array_equal(x, data.x_train[chosen])
            np.testing.assert_array_equal(y, data.y_train[chosen])


def test_a_run_that_diverges_is_shown_as_such(small, out, capsys):
    """DBN diverges on every backend. XLA's ReLU on CPUs turns NaN into 0, but not the NaN in eigh's derivative."""
    args = "--norm", "dbn", "--epochs", 3, "--batch-size", 4, "--lr", "1e30"
    assert demo("--data", small, *args, "--out", out) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    assert "diverged in epoch 1" in stdout
    (row,) = rows(out)  # the run ends after it has diverged
    assert not np.isfinite(float(row["train_loss"]))


def test_the_digits_are_learnt(out):
    """Guessing has an accuracy of 10 %."""
    assert demo("--norm", "iternorm", "--epochs", 1, "--out", out) == 0
    assert float(rows(out)[0]["test_accuracy"]) > 0.5


@pytest.mark.parametrize("device", ["abacus", "gpu:77", "cpu:5", "meta"])
def test_a_device_that_is_not_there_is_one_line(device, small, out, capsys):
    assert demo("--data", small, "--device", device, "--out", out) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("polywhiten: Invalid value for '--device'")
    assert f"can't compute on '{device}'" in stderr
    assert stderr.count("\n") == 1
    assert not out.exists()
