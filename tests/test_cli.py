"""The command line and the demo, for users who type wrong arguments, stop a run, or repeat it."""

import csv
import errno
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

for _module in ("torch", "click", "rich", "sklearn", "matplotlib"):
    pytest.importorskip(_module)

import polywhiten  # noqa: E402
from polywhiten import gpu_launches  # noqa: E402
from polywhiten.cli import commands, info  # noqa: E402
from polywhiten.cli.demo import data as demo_data  # noqa: E402
from polywhiten.cli.demo import frameworks  # noqa: E402
from polywhiten.cli.demo.data import DataError, load_digits, prepare  # noqa: E402
from polywhiten.cli.demo.report import add_result, curves, start_results, table  # noqa: E402
from polywhiten.cli.demo.training import NORMS, Epoch, Settings, batches  # noqa: E402
from polywhiten.cpu import is_available  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"
COLUMNS = ["norm", "epoch", "train_loss", "test_loss", "test_accuracy", "ms_per_step"]


def pictures(shape=(8, 8), train=24, test=6, seed=0):
    """Return a tiny data set in Keras' layout, of bright and dark pictures."""
    rng = np.random.default_rng(seed)
    labels = {"y_train": np.arange(train) % 2, "y_test": np.arange(test) % 2}
    images = {
        key.replace("y", "x"): np.uint8(rng.integers(0, 100, (len(y), *shape)) + 100 * y.reshape(-1, *[1] * len(shape)))
        for key, y in labels.items()
    }
    return labels | images


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.npz"
    np.savez(path, **pictures())
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Use one thread: on a busy machine, several would mostly wait for each other in networks this small."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def demo(*args):
    return commands.run(["demo", *map(str, args)])


def rows(out):
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def main_in_new_process(*args, before="", **kwargs):
    """Start `polywhiten ARGS` in another interpreter, after the statements `before`."""
    code = f"{before}\nfrom polywhiten.__main__ import main\nmain()"
    # -P, because the working folder may hold sources, without polywhiten.torch
    command = [sys.executable, "-P", "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


# ---------------------------------------------------------------- a good run


def test_every_norm_is_trained_and_reported(small, out, capsys):
    assert demo("--data", small, "--epochs", 2, "--batch-size", 8, "--out", out) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""  # without a terminal, no progress is shown
    for name in ("small.npz", "; PyTorch\n", *NORMS.values(), "Test accuracy", "Best epoch", "ms per step"):
        assert name in stdout
    assert str(out / "curves.png") in stdout
    assert str(out / "results.csv") in stdout
    assert [(row["norm"], row["epoch"]) for row in rows(out)] == [(norm, str(e)) for norm in NORMS for e in (1, 2)]
    assert list(rows(out)[0]) == COLUMNS
    assert all(float(row["ms_per_step"]) > 0 for row in rows(out))
    assert (out / "curves.png").read_bytes().startswith(PNG)


def test_the_digits_are_the_default_and_are_learnt(out, capsys):
    """After one epoch of the default run, the accuracy is far above 10 %, which guessing has."""
    assert demo("--norm", "iternorm", "--epochs", 1, "--out", out) == 0
    assert "scikit-learn's digits" in capsys.readouterr().out
    assert float(rows(out)[0]["test_accuracy"]) > 0.5


def test_a_demo_compiles_before_it_trains(small, out, capsys, monkeypatch):
    """Only layers of polywhiten need kernels."""

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "compile_for_demo", interrupted)
    args = "--data", small, "--epochs", 1, "--batch-size", 8, "--out", out
    assert demo(*args, "--norm", "bn", "--norm", "gw") == 130
    assert not out.exists()
    assert demo(*args, "--norm", "bn") == 0


def test_norms_are_chosen_in_any_case_and_once_each(small, out):
    args = "--norm", "GW", "--norm", "bn", "--norm", "gw"
    assert demo(*args, "--data", small, "--epochs", 1, "--batch-size", 8, "--out", out) == 0
    assert [row["norm"] for row in rows(out)] == ["gw", "bn"]


def test_a_seed_decides_everything_but_the_times(small, tmp_path):
    """A norm that is trained alone also starts from the same weights as among others."""

    def losses(name, *args):
        assert demo("--data", small, "--epochs", 2, "--batch-size", 8, "--out", tmp_path / name, *args) == 0
        return {(row["norm"], row["epoch"]): [row[column] for column in COLUMNS[2:5]] for row in rows(tmp_path / name)}

    both = losses("a", "--norm", "bn", "--norm", "gw")
    assert losses("b", "--norm", "bn", "--norm", "gw") == both
    assert losses("c", "--norm", "gw") == {key: value for key, value in both.items() if key[0] == "gw"}
    other = losses("d", "--norm", "bn", "--norm", "gw", "--seed", "1")
    assert all(other[key] != both[key] for key in both)


def test_every_norm_starts_from_the_same_weights_in_its_own_layer():
    import torch

    from polywhiten.torch import GroupWhitening, IterNorm
    from polywhiten.torch.demo import network

    data = prepare("", **pictures((8, 8, 3)))
    networks = {norm: network(norm, data, seed=3) for norm in NORMS}
    for model in networks.values():
        for ours, theirs in zip(model, networks["bn"], strict=True):
            if isinstance(ours, torch.nn.Conv2d | torch.nn.Linear):
                assert torch.equal(ours.weight, theirs.weight)
    torch.rand(1)  # random numbers that the program drew before make no difference
    assert torch.equal(network("bn", data, seed=3)[0].weight, networks["bn"][0].weight)
    assert not torch.equal(network("bn", data, seed=4)[0].weight, networks["bn"][0].weight)
    layers = {norm: model[1] for norm, model in networks.items()}
    assert isinstance(layers["bn"], torch.nn.BatchNorm2d)
    assert isinstance(layers["gn"], torch.nn.GroupNorm)
    assert isinstance(layers["gw"], GroupWhitening)
    assert all(isinstance(layers[norm], IterNorm) for norm in ("iternorm", "dbn"))
    assert (layers["iternorm"].method, layers["dbn"].method, layers["dbn"].group_size) == ("newton", "eigh", 16)


def test_no_step_sees_a_smaller_batch_and_all_pictures_get_their_turn():
    """A last batch of one picture would have no statistics."""
    data = prepare("", **pictures(train=25))
    settings = Settings(epochs=20, batch_size=8, lr=0.1, seed=0, device="cpu")
    epochs = [batches(data, settings, epoch) for epoch in range(20)]
    assert {len(batch) for epoch in epochs for batch in epoch} == {8}
    assert set(np.concatenate([np.concatenate(epoch) for epoch in epochs])) == set(range(25))


def test_a_run_that_diverges_is_shown_as_such(small, out, capsys):
    assert demo("--data", small, "--epochs", 3, "--batch-size", 4, "--lr", "1e30", "--out", out) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    assert stdout.count("diverged in epoch") == len(NORMS)
    assert [row["norm"] for row in rows(out)] == list(NORMS)  # a run ends after it has diverged
    assert not np.isfinite([float(row["train_loss"]) for row in rows(out)]).any()


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (9, 7, 3), (1, 1), (32, 32, 3)], ids=str)
def test_pictures_of_any_size_grey_or_colour_are_trained_on(shape, tmp_path, out):
    np.savez(tmp_path / "x.npz", **pictures(shape))
    assert demo("--data", tmp_path / "x.npz", "--epochs", 1, "--batch-size", 8, "--out", out) == 0
    assert np.isfinite([float(row["train_loss"]) for row in rows(out)]).all()


# ---------------------------------------------------------------- what users may type


BAD_OPTIONS = {
    "unknown norm": (["--norm", "batch"], ["--norm", "batch", "iternorm"]),
    "unknown framework": (["--framework", "jax"], ["--framework", "jax", "torch", "keras"]),
    "no epochs": (["--epochs", "0"], ["--epochs", "0", "x>=1"]),
    "epochs in words": (["--epochs", "many"], ["--epochs", "many", "valid integer"]),
    "batch of one": (["--batch-size", "1"], ["--batch-size", "1", "x>=2"]),
    "batch larger than the data": (["--batch-size", "25"], ["--batch-size", "25", "2 to 24"]),
    "no learning rate": (["--lr", "0"], ["--lr", "0", "above 0"]),
    "infinite learning rate": (["--lr", "inf"], ["--lr", "inf", "above 0"]),
    "learning rate not a number": (["--lr", "nan"], ["--lr", "nan", "above 0"]),
    "negative seed": (["--seed", "-1"], ["--seed", "-1", "0<=x<=4294967295"]),
    "seed too large for PyTorch": (["--seed", str(2**64)], ["--seed", str(2**64), "0<=x<=4294967295"]),
    "unknown device": (["--device", "abacus"], ["--device", "abacus", "cpu"]),
    "device that holds no values": (["--device", "meta"], ["--device", "meta", "cpu"]),
    "a file name that is too long": (["--data", "x" * 5000], ["--data", "xxx", "can't be read"]),
    "an escape sequence in a file name": (["--data", "\x1b[2J.npz"], ["--data", r"\x1b[2J.npz"]),
    "a file name of two lines": (["--data", "no\nsuch.npz"], ["--data", "no such.npz"]),
    "unknown option": (["--epoch", "1"], ["--epoch", "--epochs", "polywhiten demo --help"]),
    "option without a value": (["--epochs"], ["--epochs"]),
    "argument that is none": (["bn"], ["(bn)", "polywhiten demo --help"]),
}


@pytest.mark.parametrize(("args", "words"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_leaves_earlier_results(args, words, small, out, capsys):
    out.mkdir()
    (out / "results.csv").write_text("earlier")
    assert demo("--data", small, "--out", out, *args) == 2
    check_one_line(capsys, words)
    assert [path.name for path in out.iterdir()] == ["results.csv"]
    assert (out / "results.csv").read_text() == "earlier"


def test_an_accelerator_that_is_not_there_is_one_line(small, out, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert demo("--data", small, "--out", out, "--device", "cuda") == 2
    check_one_line(capsys, ["--device", "cuda", "use cpu"])


def npz_with(**changes):
    return {key: value for key, value in (pictures() | changes).items() if value is not None}


OBJECTS = np.array([[1], [2, 3]], dtype=object)
FAR_APART = np.full((24, 8, 8), -3e38)
FAR_APART[0] = 3e38
MANY_FIELDS = [(f"a_field_with_a_long_name_{i}", "u1") for i in range(400)]
BAD_ARRAYS = {
    "a missing key": (npz_with(x_test=None, y_test=None), ["x_test", "y_test", "holds", "x_train"]),
    "objects": (npz_with(x_train=OBJECTS), ["x_train", "dtype object", "numbers"]),
    "objects as labels": (npz_with(y_test=OBJECTS), ["y_test", "dtype object", "numbers"]),
    "flat pictures": (npz_with(x_train=np.zeros((24, 64))), ["x_train", "(24, 64)", "(N, height, width)"]),
    "two channels": (npz_with(x_test=np.zeros((6, 8, 8, 2))), ["x_test", "(6, 8, 8, 2)", "(N, height, width, 3)"]),
    "channels first": (npz_with(x_train=np.zeros((24, 3, 8, 8))), ["x_train", "(24, 3, 8, 8)"]),
    "no pictures": (npz_with(x_test=np.zeros((0, 8, 8))), ["x_test", "(0, 8, 8)"]),
    "other pictures in the test": (npz_with(x_test=np.zeros((6, 9, 8))), ["x_test", "9 x 8 x 1", "8 x 8 x 1"]),
    "text as pictures": (npz_with(x_train=np.full((24, 8, 8), "a")), ["x_train", "<U1", "real numbers"]),
    "complex pictures": (npz_with(x_train=np.zeros((24, 8, 8), complex)), ["x_train", "complex128", "real numbers"]),
    "a NaN": (npz_with(x_train=np.full((24, 8, 8), np.nan)), ["x_train", "not finite"]),
    "too large for float32": (npz_with(x_test=np.full((6, 8, 8), 1e300)), ["x_test", "not finite"]),
    "fewer labels than pictures": (npz_with(y_train=np.zeros(23, int)), ["y_train", "23 labels", "24 pictures"]),
    "too far apart for float32": (npz_with(x_train=FAR_APART), ["x_train", "too far"]),
    "a label that is no int64": (npz_with(y_train=np.arange(24, dtype="u8") + 2**63), ["y_train", str(2**63 + 23)]),
    "a header that NumPy would have trusted": (npz_with(x_train=np.zeros(24, MANY_FIELDS)), ["x_train", "numbers"]),
    "fields": (npz_with(x_train=np.zeros((24, 8, 8), "u1,u1")), ["x_train", "real numbers"]),
    "labels that are measures": (npz_with(y_train=np.linspace(0, 1, 24)), ["y_train", "float64", "integer"]),
    "one-hot labels": (npz_with(y_train=np.eye(24, dtype=int)), ["y_train", "(24, 24)", "(N,)"]),
    "one class": (npz_with(y_train=np.full(24, 7)), ["y_train", "7", "2 classes"]),
    "a class that isn't trained": (npz_with(y_test=np.full(6, 5)), ["y_test", "5", "y_train"]),
}


@pytest.mark.parametrize(("arrays", "words"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays_are_one_line(arrays, words, tmp_path, out, capsys):
    np.savez(tmp_path / "bad.npz", **arrays)
    assert demo("--data", tmp_path / "bad.npz", "--out", out) == 2
    check_one_line(capsys, ["--data", *words])
    assert not out.exists()


class Unpickled:
    """An object in a file that runs code when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def write_truncated(path):
    np.savez_compressed(path, **pictures())
    content = path.read_bytes()
    path.write_bytes(content[:2000] + bytes(400) + content[2400:])


def write_foreign(path):
    with zipfile.ZipFile(path, "w") as file:
        for key in ("x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy"):
            file.writestr(key, "no array")


def write_lying(path, shape, **others):
    """Write a file whose x_train has a header of this shape, but few values."""
    np.savez(path, **npz_with(x_train=None, **others))
    with zipfile.ZipFile(path, "a") as file, file.open("x_train.npy", "w") as member:
        header = {"shape": shape, "fortran_order": False, "descr": "|u1"}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(100))


def write_many(path):
    np.savez(path, **{f"array_{i}": np.zeros(1) for i in range(30)})


BAD_FILES = {
    "more values in the header than in the file": (
        lambda path: write_lying(path, (10**15, 8, 8)),
        ["x_train", "damaged", "100 bytes", str(64 * 10**15)],
    ),
    "a negative size": (lambda path: write_lying(path, (-24, 8, 8)), ["x_train", "damaged"]),
    "many other arrays": (write_many, ["array_7 and 22 more", "x_train"]),
    "no file": (lambda path: None, ["doesn't exist", ".npz"]),
    "a folder": (Path.mkdir, ["not a file", ".npz"]),
    "nothing in it": (Path.touch, [".npz format"]),
    "text": (lambda path: path.write_text("x_train,y_train\n"), [".npz format"]),
    "a single array": (lambda path: np.save(path.open("wb"), np.zeros(3)), [".npz format"]),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Unpickled())), [".npz format"]),
    "a pickle in an array": (lambda path: np.savez(path, **npz_with(x_train=[Unpickled()])), ["x_train", "numbers"]),
    "a damaged file": (write_truncated, ["can't be read"]),
    "a zip file of other things": (write_foreign, ["x_train", "not an array"]),
}


@pytest.mark.parametrize(("write", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_one_line_and_never_unpickled(write, words, tmp_path, out, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "bad.npz")
    assert demo("--data", tmp_path / "bad.npz", "--out", out) == 2
    check_one_line(capsys, ["--data", *words])
    assert not out.exists()
    assert not (tmp_path / "unpickled").exists()


def test_a_file_of_gigabytes_is_refused_by_its_headers(tmp_path, out, capsys):
    """The small file would unpack to 64 MB of zeros, of a shape that doesn't fit."""
    np.savez_compressed(tmp_path / "bomb.npz", **npz_with(x_train=np.zeros((1, 64, 2**20), "u1")))
    tracemalloc.start()
    try:
        assert demo("--data", tmp_path / "bomb.npz", "--out", out) == 2
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    check_one_line(capsys, ["--data", "x_test has pictures of 8 x 8 x 1, x_train of 64 x 1048576 x 1"])


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="this system doesn't tell its memory")
def test_more_pictures_than_the_memory_holds_are_one_line(small, out, capsys, monkeypatch):
    pages = {"SC_PAGE_SIZE": 100, "SC_PHYS_PAGES": 110}  # 24 + 6 pictures take 9600 bytes, their labels 360
    sysconf = os.sysconf
    with monkeypatch.context() as patched:
        patched.setattr(os, "sysconf", lambda name: pages.get(name) or sysconf(name))
        assert demo("--data", small, "--batch-size", 8, "--norm", "bn", "--epochs", 1, "--out", out) == 0
        capsys.readouterr()
        pages["SC_PHYS_PAGES"] = 90
        assert demo("--data", small, "--out", out) == 2
    check_one_line(capsys, ["--data", "GiB", "fewer or smaller pictures"])


@pytest.mark.parametrize("step", ["read_npz", "_pictures", "_labels", "_standardize"])
def test_no_memory_left_is_one_line(step, small, out, capsys, monkeypatch):
    def full(*args):
        raise MemoryError

    monkeypatch.setattr(demo_data, step, full)
    assert demo("--data", small, "--out", out) == 2
    check_one_line(capsys, ["--data", "more memory", "fewer or smaller pictures"])


def test_an_output_folder_that_is_a_file_is_one_line(small, out, capsys):
    out.write_text("mine")
    assert demo("--data", small, "--out", out) == 2
    check_one_line(capsys, ["--out", str(out), "folder"])
    assert out.read_text() == "mine"


def test_an_output_folder_that_can_not_be_made_is_one_line(small, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert demo("--data", small, "--batch-size", 8, "--out", tmp_path / "file" / "out") == 2
    check_one_line(capsys, ["--out", str(tmp_path / "file" / "out"), "folder"])


def test_an_output_folder_of_too_long_a_name_is_one_line(small, capsys):
    assert demo("--data", small, "--batch-size", 8, "--out", "x" * 5000) == 2
    check_one_line(capsys, ["--out", "xxx", "name another folder"])


@pytest.mark.parametrize("name", ["results.csv", "curves.png"])
def test_files_that_can_not_be_written_are_found_out_before_the_training(name, small, out, capsys):
    (out / name).mkdir(parents=True)
    assert demo("--data", small, "--epochs", 10**9, "--batch-size", 8, "--out", out) == 2
    check_one_line(capsys, ["--out", str(out / name), "name another folder"])


class FullDisk:
    """A csv.writer on a disk with room for the header and two epochs."""

    rows = 0

    def __init__(self, file):
        pass

    def writerow(self, row):
        FullDisk.rows += 1
        if FullDisk.rows > 3:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_in_the_middle_leaves_the_table(small, out, capsys, monkeypatch):
    monkeypatch.setattr(csv, "writer", FullDisk)
    monkeypatch.setattr(FullDisk, "rows", 0)
    args = "--data", small, "--norm", "bn", "--norm", "gn", "--epochs", 2, "--batch-size", 8
    assert demo(*args, "--out", out) == 2
    stdout, stderr = capsys.readouterr()
    assert stderr.count("\n") == 1
    for words in (str(out / "results.csv"), "No space left on device", "3 of 4 epochs are in the table"):
        assert words in stderr
    assert "BN" in stdout
    assert "GN" in stdout
    assert "The curves are in" not in stdout


def test_training_that_fails_keeps_what_was_done(small, out, capsys, monkeypatch):
    import polywhiten.torch.demo

    def train(norm, *args):
        yield Epoch(norm, 1, 0.5, 0.5, 0.75, 2.0)
        if norm == "gn":
            raise RuntimeError("out of memory\n  in many lines")

    monkeypatch.setattr(polywhiten.torch.demo, "train", train)
    args = "--data", small, "--norm", "bn", "--norm", "gn", "--norm", "gw", "--epochs", 1, "--batch-size", 8
    assert demo(*args, "--out", out) == 2
    stdout, stderr = capsys.readouterr()
    assert stderr.count("\n") == 1
    assert "training failed after 2 of 3 epochs (RuntimeError: out of memory): " in stderr
    assert str(out / "results.csv") in stderr
    assert stdout.count("75.00%") == 4
    assert [row["norm"] for row in rows(out)] == ["bn", "gn"]
    assert (out / "curves.png").read_bytes().startswith(PNG)


def test_a_command_that_is_none_is_one_line(capsys):
    assert commands.run(["train"]) == 2
    check_one_line(capsys, ["train", "polywhiten --help"])


def check_one_line(capsys, words):
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("polywhiten: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    assert "allow_pickle" not in stderr  # NumPy's advice is dangerous for a file from others
    for word in words:
        assert word in stderr


def test_help_and_version_are_no_errors(capsys):
    for option in ("--version", "-V"):
        assert commands.run([option]) == 0
        assert capsys.readouterr().out == f"polywhiten {polywhiten.__version__}\n"
    for args in ([], ["--help"], ["demo", "--help"]):
        assert commands.run(args) == 0
        stdout = capsys.readouterr().out
        assert stdout.startswith("Usage: polywhiten")
        assert "..." not in stdout.partition("Commands:")[2]  # descriptions are short enough to be shown in full


# ---------------------------------------------------------------- what it writes to


def main_with_streams(redirection, *args, **kwargs):
    """Run `polywhiten ARGS REDIRECTION` in a shell."""
    code = "from polywhiten.__main__ import main\nmain()"
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-P", "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **kwargs)


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@needs_dev_full
@pytest.mark.parametrize(
    ("args", "redirection", "reason"),
    [
        (["--version"], ">/dev/full", "No space left on device"),
        (["--version"], ">&-", "Bad file descriptor"),
        (["recommend", "32", "80"], ">/dev/full", "No space left on device"),
        (["recommend", "32", "80"], "<&- >&-", "Bad file descriptor"),
        (["info"], ">/dev/full", "No space left on device"),
    ],
)
def test_standard_output_that_is_full_or_closed_is_one_line(args, redirection, reason):
    done = main_with_streams(redirection, *args)
    assert done.stderr == f"polywhiten: standard output can't be written to ({reason})\n"
    assert (done.returncode, done.stdout) == (2, "")


@needs_dev_full
@pytest.mark.parametrize(
    ("args", "redirection", "code", "output"),
    [
        (["train"], "2>/dev/full", 2, ""),
        (["train"], "2>&-", 2, ""),
        (["--version"], ">&- 2>&-", 2, ""),
        (["--version"], ">/dev/full 2>/dev/full", 2, ""),
        (["--version"], "2>&-", 0, f"polywhiten {polywhiten.__version__}\n"),
    ],
)
def test_standard_error_that_is_full_or_closed_leaves_the_exit_code(args, redirection, code, output):
    done = main_with_streams(redirection, *args)
    assert (done.returncode, done.stdout, done.stderr) == (code, output, "")


@needs_dev_full
@pytest.mark.parametrize("redirection", [">/dev/full", "<&- >&- 2>&-"])
def test_the_files_are_kept_when_the_table_can_not_be_written(redirection, small, out):
    args = "demo", "--data", small, "--norm", "bn", "--epochs", 1, "--batch-size", 8, "--out", out
    assert main_with_streams(redirection, *args).returncode == 2
    assert [(row["norm"], row["epoch"]) for row in rows(out)] == [("bn", "1")]
    assert (out / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way")
def test_a_reader_that_is_gone_is_no_reason_for_messages():
    read, write = os.pipe()
    os.close(read)
    code = "from polywhiten.__main__ import main\nmain()"
    command = [sys.executable, "-P", "-c", code, "--version"]
    with os.fdopen(write, "wb") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"caf\xc3\xa9.npz", "caf\u00e9.npz"), (b"caf\xe9.npz", "caf\ufffd.npz"), ("\u6587.npz".encode(), "\u6587.npz")],
    ids=["not ASCII", "not UTF-8", "not in the picture's font"],
)
def test_a_file_of_any_name_gets_its_picture(name, shown, small, out, capsys):
    file = small.rename(small.with_name(os.fsdecode(name)))
    assert demo("--data", file, "--norm", "bn", "--epochs", 1, "--batch-size", 8, "--out", out) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith(f"{shown}: 24 training")
    assert stderr == ""
    assert (out / "curves.png").read_bytes().startswith(PNG)


def test_names_that_the_locale_can_not_write_are_no_reason_to_fail(small, tmp_path):
    """Neither the C locale without Python's UTF-8 mode nor Latin-1 has these letters."""
    file = small.rename(small.with_name("caf\u00e9 \u6587.npz"))
    out = tmp_path / "\u6587"
    args = "demo", "--data", file, "--norm", "bn", "--epochs", 1, "--batch-size", 8, "--out", out
    for encoding in (
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "1"},
    ):
        process = main_in_new_process(*args, env=os.environ | encoding, errors="replace")
        stdout, stderr = process.communicate(timeout=120)
        assert (process.returncode, stderr) == (0, "")
        assert "24 training" in stdout
        assert (out / "curves.png").read_bytes().startswith(PNG)
        (out / "curves.png").unlink()


def test_a_narrow_terminal_cuts_off_no_number(small, out, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert demo("--data", small, "--norm", "bn", "--epochs", 1, "--batch-size", 8, "--out", out) == 0
    stdout = capsys.readouterr().out
    assert "\u2026" not in stdout
    for word in ("Test accuracy", "ms per step", f"{float(rows(out)[0]['test_accuracy']):.2%}"):
        assert word in stdout


# ---------------------------------------------------------------- stopping it


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process")
def test_ctrl_c_keeps_what_was_done(small, out):
    # children inherit that SIGINT is ignored, as it is in the background of some shells
    before = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    args = "demo", "--data", small, "--norm", "bn", "--epochs", 10**6, "--batch-size", 8, "--out", out
    process = main_in_new_process(*args, before=before)
    try:
        deadline = time.monotonic() + 60
        while not (out / "results.csv").exists() or len(rows(out)) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.count("\n") == 1
    kept = rows(out)
    assert f"stopped after {len(kept)} of 1000000 epochs" in stderr
    assert str(out / "results.csv") in stderr
    assert [int(row["epoch"]) for row in kept] == list(range(1, len(kept) + 1))
    assert all(None not in row.values() for row in kept)
    assert (out / "curves.png").read_bytes().startswith(PNG)


def test_stopping_before_the_first_epoch_leaves_no_picture_of_an_earlier_run(small, out, capsys, monkeypatch):
    import polywhiten.torch.demo

    def interrupted(*args):
        raise KeyboardInterrupt

    out.mkdir()
    (out / "curves.png").touch()
    monkeypatch.setattr(polywhiten.torch.demo, "train", interrupted)
    assert demo("--data", small, "--batch-size", 8, "--out", out) == 130
    check_one_line(capsys, ["stopped after 0 of 100 epochs"])
    assert [path.name for path in out.iterdir()] == ["results.csv"]


def test_ctrl_c_anywhere_else_is_one_line(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "report", interrupted)
    assert commands.run(["info"]) == 130
    check_one_line(capsys, ["stopped"])


# ---------------------------------------------------------------- what may be missing or broken


@pytest.mark.parametrize("module", ["click", "rich"])
def test_without_the_extra_the_command_names_it(module):
    process = main_in_new_process("info", before=f"import sys; sys.modules[{module!r}] = None")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert stderr == f'polywhiten: the command line needs {module}: pip install "polywhiten[cli]"\n'


@pytest.mark.parametrize(("module", "extras"), [("torch", "demo,torch"), ("matplotlib", "demo")])
def test_without_its_extra_the_demo_names_it(module, extras, out):
    process = main_in_new_process("demo", "--out", out, before=f"import sys; sys.modules[{module!r}] = None")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.count("\n") == 1
    assert f"the demo needs {module}" in stderr
    assert f'pip install "polywhiten[{extras}]"' in stderr
    assert not out.exists()


@pytest.fixture
def keras_of(tmp_path, monkeypatch):
    """Return `keras_of(*installed, named=..., configured=...)`: it hides Keras, and all backends but those."""
    for name in ("KERAS_BACKEND", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores the value, which the demo changes
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "polywhiten.keras.demo", None)

    def given(*installed, named="", configured=None):
        monkeypatch.setattr(frameworks, "is_installed", lambda name: name in installed)
        monkeypatch.setenv("KERAS_BACKEND", named)
        if configured is not None:
            (tmp_path / "keras.json").write_text(configured)

    return given


KERAS_BACKENDS = {
    "only one": (["torch"], {}, "torch"),
    "the first of several": (["jax", "torch"], {}, "jax"),
    "the one that is named": (["tensorflow", "jax", "torch"], {"named": "torch"}, "torch"),
    "the configured one": (["tensorflow", "jax"], {"configured": '{"backend": "jax"}'}, "jax"),
    "the named one of two": (["jax", "torch"], {"named": "torch", "configured": '{"backend": "jax"}'}, "torch"),
    "configured, not installed": (["jax"], {"configured": '{"backend": "tensorflow"}'}, "jax"),
    "configured, can't train": (["torch"], {"configured": '{"backend": "numpy"}'}, "torch"),
    "no configuration": (["torch"], {"configured": "{"}, "torch"),
}


@pytest.mark.parametrize(("installed", "wanted", "backend"), KERAS_BACKENDS.values(), ids=KERAS_BACKENDS)
def test_keras_takes_the_backend_that_is_wanted_or_one_that_is_installed(
    installed, wanted, backend, keras_of, out, capsys
):
    keras_of(*installed, **wanted)
    assert demo("--framework", "keras", "--out", out) == 2
    check_one_line(capsys, ["the demo needs keras", f'pip install "polywhiten[demo,keras,{backend}]"'])
    assert os.environ["KERAS_BACKEND"] == backend
    assert not out.exists()


KERAS_ERRORS = {
    "no backend": ([], "", ["tensorflow, jax or torch", 'pip install "polywhiten[demo,keras,tensorflow]"']),
    "not the named one": (["torch"], "jax", ["jax", 'pip install "polywhiten[demo,keras,jax]"', "set it to torch"]),
    "one that can't train": (["torch"], "numpy", ["'numpy'", "KERAS_BACKEND", "tensorflow, jax or torch"]),
}


@pytest.mark.parametrize(("installed", "named", "words"), KERAS_ERRORS.values(), ids=KERAS_ERRORS)
def test_a_keras_backend_that_is_missing_is_one_line(installed, named, words, keras_of, out, capsys):
    keras_of(*installed, named=named)
    assert demo("--framework", "keras", "--out", out) == 2
    check_one_line(capsys, words)
    assert not out.exists()


def test_scikit_learn_is_needed_for_its_digits_alone(small, out, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert demo("--out", out) == 2
    check_one_line(capsys, ["scikit-learn", 'pip install "polywhiten[demo]"'])
    assert demo("--data", small, "--norm", "bn", "--epochs", 1, "--batch-size", 8, "--out", out) == 0


def fake(folder, name, code):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def test_info_reports_broken_frameworks_in_a_line_each(tmp_path, monkeypatch):
    fake(tmp_path, "jax", "raise ImportError('libfoo.so is missing\\n  in twelve places')")
    fake(tmp_path, "cupy", "import os; os._exit(3)")
    fake(tmp_path, "tensorflow", "raise SystemExit(0)")
    fake(tmp_path, "keras", "raise RuntimeError")
    monkeypatch.setattr(info, "FOLDERS", ("cpu", "jax", "cupy", "tensorflow", "keras"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    lines = {line.split()[0]: line for line in info.report() if line}
    assert np.__version__ in lines["numpy"]
    assert lines["jax"].endswith("installed but broken: ImportError: libfoo.so is missing")
    assert lines["cupy"].endswith("installed but broken: its import ends the process with exit code 3")
    assert "installed but broken" in lines["tensorflow"]
    assert lines["keras"].endswith("installed but broken: RuntimeError: no reason given")


FAKE_KERAS = "\n__version__ = '0'\nclass backend: backend = lambda: 'beads'"
ODD = {
    "an error without a message": (
        "class Odd(Exception):\n def __str__(self): raise ValueError\nraise Odd",
        "installed but broken: Odd: no reason given",
    ),
    "what is no Exception": (
        "class Odd(BaseException): pass\nraise Odd('first\\nsecond')",
        "installed but broken: Odd: first",
    ),
    "no version": ("", "installed but broken: AttributeError: module 'keras' has no attribute '__version__'"),
    "a version that is no text": (f"{FAKE_KERAS}\n__version__ = None", "those of beads"),
    "bytes that are no text": (f"import os{FAKE_KERAS}\nos.write(1, bytes([255]))", "those of beads"),
    "a message at the end": (f"import atexit{FAKE_KERAS}\natexit.register(print, 'bye')", "those of beads"),
    "a message at the start": (f"print('hello'){FAKE_KERAS}", "those of beads"),
}


@pytest.mark.parametrize(("code", "end"), ODD.values(), ids=ODD)
def test_info_has_a_line_on_a_framework_that_does_odd_things(code, end, tmp_path, monkeypatch):
    fake(tmp_path, "keras", code)
    monkeypatch.setattr(info, "FOLDERS", ("keras",))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = [line for line in info.report() if line.startswith("keras")]
    assert line.endswith(end)


@pytest.mark.parametrize("name", ["torch", "matplotlib"])
@pytest.mark.parametrize("error", ["RuntimeError('binary\\nincompatible')", "SystemExit('binary')"])
def test_a_broken_installation_is_one_line_in_the_demo(name, error, tmp_path, out):
    fake(tmp_path, name, f"raise {error}")
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    process = main_in_new_process("demo", "--out", out, before=before)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.count("\n")) == (2, "", 1)
    assert f"{name} is installed but broken ({error.partition('(')[0]}: binary)" in stderr
    assert not out.exists()


def test_info_is_not_misled_by_a_folder_of_a_framework_s_name(tmp_path, monkeypatch):
    (tmp_path / "slate").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not info.is_installed("slate")
    monkeypatch.setattr(info, "is_installed", lambda module: module == "numpy")
    lines = {line.split()[0]: line for line in info.report() if line}
    assert lines["cupy"].endswith('not installed: pip install "polywhiten[cupy13]" or "polywhiten[cupy12]"')
    assert np.__version__ in lines["numpy"]


def test_info_names_versions_devices_and_kernels(capsys):
    import torch

    assert commands.run(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"polywhiten {polywhiten.__version__}, Python ")
    (line,) = [line for line in lines if line.startswith("torch ")]
    assert line.split()[1:3] == [torch.__version__, "cpu" + "," * torch.accelerator.is_available()]
    assert line.endswith("array API")
    assert ("Numba" in line) == is_available()
    (line,) = [line for line in lines if line.startswith("numpy ")]
    assert line.split()[2:] == ["cpu", *["Numba,"] * is_available(), "array", "API"]


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        (None, "Kernels on a GPU have separate launches (the default); POLYWHITEN_GPU_LAUNCHES=joined "),
        ("joined", "Kernels on a GPU have joined launches; POLYWHITEN_GPU_LAUNCHES=separate "),
        ("many", "POLYWHITEN_GPU_LAUNCHES='many' is unknown: use one of 'separate', 'joined'"),
    ],
)
def test_info_says_which_gpu_kernels_there_are_and_how_to_choose(chosen, line, monkeypatch):
    monkeypatch.setattr(info, "FOLDERS", ())
    monkeypatch.delenv("POLYWHITEN_GPU_LAUNCHES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("POLYWHITEN_GPU_LAUNCHES", chosen)
    monkeypatch.setattr(gpu_launches, "_wanted", gpu_launches._wanted.__wrapped__)
    *_, last = info.report()
    assert last.startswith(line)


# ---------------------------------------------------------------- recommendations


def test_recommend_says_what_both_layers_can_do_with_a_shape(capsys):
    for args in (["32", "80", "2", "2"], ["32", "2", "2", "80", "--axis", "-1"]):
        assert commands.run(["recommend", *args]) == 0
        batch, group = capsys.readouterr().out.splitlines()
        assert batch.startswith("IterNorm: group_size=16: an eighth of the 128 samples")
        assert group.startswith(
            "GroupWhitening: num_groups=16: for no more equations than half of a sample's 320 values"
        )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["32"], ["axis=1 holds no channels in shape=(32,)", "polywhiten recommend --help"]),
        (["32", "x"], ["'x' is not a valid integer"]),
        (["32", "1" + 23 * "0"], [23 * "0" + " is not in the range 1<=x<=100000000"]),
        (["1", "8"], ["shape=(1, 8) gives 1 sample a channel"]),
        ([], ["SIZE"]),
    ],
)
def test_a_shape_that_has_no_groups_is_one_line(args, words, capsys):
    assert commands.run(["recommend", *args]) == 2
    check_one_line(capsys, words)


# ---------------------------------------------------------------- data and report


def test_layouts_of_the_same_pictures_are_the_same_data():
    flat = pictures((8, 8))
    column = {key: value[..., None] for key, value in flat.items()}  # (N, 8, 8, 1) and (N, 1), as Keras has CIFAR-10's
    a, b = prepare("", **flat), prepare("", **column)
    for name in flat:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_pictures_are_standardized_by_the_training_ones_and_labels_counted_from_0():
    arrays = pictures((8, 8, 3), train=50, test=20)
    arrays["x_train"][..., 2] = 9  # a constant channel has no deviation to divide by
    arrays["x_test"][..., 2] = 9
    arrays["y_train"], arrays["y_test"] = 40 - 10 * arrays["y_train"], 40 - 10 * arrays["y_test"]
    data = prepare("", **arrays)
    np.testing.assert_allclose(data.x_train.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(data.x_train.std((0, 1, 2)), [1, 1, 0], atol=1e-5)
    mean, deviation = arrays["x_train"][..., 0].mean(), arrays["x_train"][..., 0].std()
    np.testing.assert_allclose(data.x_test[..., 0], (arrays["x_test"][..., 0] - mean) / deviation, rtol=1e-4, atol=1e-5)
    assert data.classes == 2
    assert set(data.y_train) == {0, 1}
    np.testing.assert_array_equal(data.y_test, (arrays["y_test"] - 30) // 10)


def test_labels_of_all_integer_types_are_compared_as_integers():
    """Float64 rounds these labels to the same number."""
    arrays = pictures()
    arrays["y_train"] = np.uint64(2**60) + arrays["y_train"].astype("u8")
    arrays["y_test"] = 2**60 + arrays["y_test"].astype("i8")
    data = prepare("", **arrays)
    np.testing.assert_array_equal(data.y_test, arrays["y_test"] - 2**60)
    with pytest.raises(DataError, match=f"label {2**60 + 2}"):
        prepare("", **(arrays | {"y_test": arrays["y_test"] + 1}))


@pytest.mark.filterwarnings("error")
def test_values_too_small_for_a_deviation_are_constant():
    arrays = {key: value * np.float32(0) if key[0] == "x" else value for key, value in pictures().items()}
    arrays["x_train"][0, 0, 0] = 1e-45
    data = prepare("", **arrays)
    assert abs(data.x_train).max() < 1e-44
    assert (data.x_test == 0).all()


def test_the_digits_split_is_fixed():
    data = load_digits()
    assert (data.x_train.shape, data.x_test.shape) == ((1438, 8, 8, 1), (359, 8, 8, 1))
    assert data.y_test[:5].tolist() == [4, 9, 4, 9, 4]
    assert np.bincount(data.y_test).min() > 20


def test_arrays_that_are_checked_are_not_changed():
    arrays = {key: value.astype("float32") if key[0] == "x" else value for key, value in pictures().items()}
    copies = {key: value.copy() for key, value in arrays.items()}
    prepare("", **arrays)
    for key, value in arrays.items():
        np.testing.assert_array_equal(value, copies[key])
    with pytest.raises(DataError, match="y_train"):
        prepare("", **(arrays | {"y_train": arrays["y_train"] / 2}))


@pytest.mark.filterwarnings("error")
def test_a_report_of_one_good_and_one_diverged_epoch(tmp_path):
    """A title with dollar signs isn't read as a formula, and a run without finite losses causes no warning."""
    epochs = [Epoch("bn", 1, 0.5, 0.6, 0.9, 2.0), Epoch("gw", 1, float("nan"), float("nan"), 0.1, 2.0)]
    for some in (epochs, epochs[:1], epochs[1:]):
        curves(some, "a_$b^{.$npz").savefig(tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    (legend,) = curves(epochs, "").legends
    assert [text.get_text() for text in legend.get_texts()] == ["BN", "GW (diverged)"]
    columns = [list(column.cells) for column in table(epochs).columns]
    assert columns == [
        ["BN", "GW"],
        ["90.00%", "diverged in epoch 1"],
        ["90.00%", "-"],
        ["1", "-"],
        ["2.0", "2.0"],
    ]


def test_every_epoch_is_on_disk_at_once(tmp_path):
    """A run that is killed leaves its epochs."""
    path = tmp_path / "results.csv"
    start_results(path)
    assert path.read_text() == ",".join(COLUMNS) + "\n"
    add_result(path, Epoch("gw", 7, 0.25, 0.5, 0.125, 3.0))
    assert path.read_text().splitlines()[1] == "gw,7,0.25,0.5,0.125,3"


def test_the_best_epoch_is_the_first_of_the_best():
    epochs = [Epoch("bn", n, 0.1, 0.1, accuracy, ms) for n, accuracy, ms in [(1, 0.8, 9), (2, 0.9, 2), (3, 0.9, 1)]]
    assert [next(iter(column.cells)) for column in table(epochs).columns] == ["BN", "90.00%", "90.00%", "2", "2.0"]
