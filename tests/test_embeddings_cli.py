"""The commands for embeddings: what they write, what they say, and what an interruption leaves."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

for _module in ("click", "rich", "pyarrow"):
    pytest.importorskip(_module)
import pyarrow as pa  # noqa: E402
from pyarrow import parquet  # noqa: E402

from polywhiten import Whitening  # noqa: E402
from polywhiten.cli import commands  # noqa: E402
from polywhiten.cli.embeddings import progress  # noqa: E402
from polywhiten.embeddings.files import memory, open_source  # noqa: E402

DIMENSION = 6
RANDOM = np.random.default_rng(0)
X = (RANDOM.normal(size=(200, DIMENSION)) @ RANDOM.normal(size=(DIMENSION, DIMENSION)) + 3).astype("float32")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)


@pytest.fixture
def small_batches(monkeypatch):
    """Let commands read 16 rows at once."""
    monkeypatch.setattr(memory, "BATCH_BYTES", 0)
    monkeypatch.setattr(memory, "BATCH_ROWS", 16)


def run(*args):
    return commands.run([str(arg) for arg in args])


def rows_of(path):
    return np.concatenate([batch.copy() for batch in open_source([path]).batches(1000)])


def one_line(capsys):
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("polywhiten: ")
    assert stderr.count("\n") == 1
    return stderr


def fitted(*args):
    assert run("fit", "x.npy", "--out", "w.npz", "--overwrite", *args) == 0
    return Whitening.load("w.npz")


# ---------------------------------------------------------------- fit and transform


@pytest.mark.usefixtures("small_batches")
def test_files_are_whitened_as_arrays_are(capsys):
    assert run("fit", "x.npy", "--out", "w.npz") == 0
    assert run("transform", "x.npy", "--whitening", "w.npz", "--out", "y.npy") == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    first, second = stdout.splitlines()
    assert re.fullmatch(r"w.npz: zca of 6 dimensions, fitted to 200 rows, in \d+\.\d s \([\d,]+ rows/s\)", first)
    assert re.fullmatch(r"y.npy: 200 rows of 6, in \d+\.\d s \([\d,]+ rows/s\)", second)
    expected = Whitening().fit(X)
    np.testing.assert_allclose(Whitening.load("w.npz").matrix_, expected.matrix_, rtol=1e-4)
    y = rows_of("y.npy")
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected.transform(X), rtol=1e-3, atol=1e-4)
    assert sorted(os.listdir()) == ["w.npz", "x.npy", "y.npy"]  # no checkpoint is left


def test_every_option_reaches_the_estimator():
    options = "--method pca --components 3 --eps 0.01 --absolute-eps --shrinkage ledoit_wolf --normalize --scale 2"
    whitening = fitted(*options.split(), "--skip-nonfinite")
    expected = {
        "method": "pca", "n_components": 3, "eps": 0.01, "relative_eps": False, "shrinkage": "ledoit_wolf",
        "normalize": True, "scale": 2.0, "on_nonfinite": "skip",
    }  # fmt: skip
    assert whitening.get_params() == Whitening(**expected).get_params()
    np.testing.assert_allclose(whitening.matrix_, Whitening(**expected).fit(X).matrix_, rtol=1e-4)
    assert fitted("--components", "0.5", "--method", "pca").n_components == 0.5
    assert fitted("--group-size", "2").group_size == 2
    assert fitted("--method", "newton", "--iterations", "3").iterations == 3


def test_components_of_a_zca_leave_the_number_of_dimensions():
    whitening = fitted("--components", 2)
    assert run("transform", "x.npy", "--whitening", "w.npz", "--out", "y.npy") == 0
    np.testing.assert_allclose(rows_of("y.npy"), whitening.transform(X), rtol=1e-3, atol=1e-4)
    assert rows_of("y.npy").shape == X.shape


def test_a_folder_of_outputs_has_one_for_each_input():
    os.mkdir("in")
    np.save("in/a.npy", X[:50].astype("float16"))
    np.savez("in/b.npz", x=X[50:120].astype("float64"))
    lists = pa.FixedSizeListArray.from_arrays(X[120:].reshape(-1), DIMENSION)
    parquet.write_table(pa.table({"id": np.arange(80), "vector": lists}), "in/c.parquet")
    fitted("--method", "pca", "--components", "4")
    expected = Whitening.load("w.npz").transform(X)
    assert run("transform", "in", "--whitening", "w.npz", "--out", "new/out") == 0
    assert sorted(os.listdir("new/out")) == ["a.npy", "b.npy", "c.parquet"]
    for name, part, dtype in (("a.npy", slice(50), "float16"), ("b.npy", slice(50, 120), "float64"),
                              ("c.parquet", slice(120, 200), "float32")):  # fmt: skip
        y = rows_of(f"new/out/{name}")
        assert y.dtype == dtype
        np.testing.assert_allclose(y, expected[part], atol=1e-2 if dtype == "float16" else 1e-4)
    assert parquet.read_schema("new/out/c.parquet").names == ["vector"]
    assert run("transform", "in", "--whitening", "w.npz", "--out", "all.parquet", "--dtype", "float32") == 0
    np.testing.assert_allclose(rows_of("all.parquet"), expected, atol=1e-2)


@pytest.mark.parametrize(("given", "dtype", "expected"), [("int8", None, "float32"), ("float16", "float32", "float32")])
def test_a_wider_output_is_computed_in_its_dtype(given, dtype, expected):
    narrow = (X * 10).astype(given)
    np.save("narrow.npy", narrow)
    assert run("fit", "narrow.npy", "--out", "w.npz") == 0
    args = ["--dtype", dtype] if dtype else []
    assert run("transform", "narrow.npy", "--whitening", "w.npz", "--out", "y.npy", *args) == 0
    y = rows_of("y.npy")
    assert y.dtype == expected
    np.testing.assert_allclose(y, Whitening.load("w.npz").transform(narrow.astype("float64")), atol=1e-4)


def test_rows_that_are_not_finite_are_named_or_skipped(capsys):
    y = X.copy()
    y[30, 2] = np.nan
    np.save("nan.npy", y)
    assert run("fit", "x.npy", "nan.npy", "--out", "w.npz") == 2
    assert "nan.npy, row 30 has NaN or infinity: correct it, or leave out such rows (--skip-nonfinite)" in one_line(
        capsys
    )
    assert run("fit", "x.npy", "nan.npy", "--out", "w.npz", "--skip-nonfinite") == 0
    out, err = capsys.readouterr()
    assert "fitted to 400 rows, 1 of them skipped" in out
    assert "going on after 200 rows" in err  # those before the row with NaN are the same
    assert run("fit", "x.npy", "--out", "w.npz", "--overwrite") == 0
    capsys.readouterr()
    assert run("transform", "nan.npy", "--whitening", "w.npz", "--out", "y.npy") == 2
    assert "nan.npy, row 30 has NaN" in one_line(capsys)
    assert run("transform", "nan.npy", "--whitening", "w.npz", "--out", "y.npy", "--skip-nonfinite") == 0
    assert np.flatnonzero(np.isnan(rows_of("y.npy")).any(1)).tolist() == [30]
    assert run("inspect", "nan.npy") == 2
    assert run("inspect", "nan.npy", "--skip-nonfinite") == 0


def test_warnings_are_lines(capsys):
    np.save("few.npy", X[:4])
    assert run("fit", "few.npy", "--out", "w.npz") == 0
    stderr = capsys.readouterr().err
    assert stderr.startswith("polywhiten: warning: 4 rows are few for 6 directions")
    assert stderr.endswith("Use more rows, --shrinkage ledoit_wolf, --eps 0.1, a --group-size, or fewer --components\n")
    assert stderr.count("\n") == 1


# ---------------------------------------------------------------- arguments that don't fit

BAD_FITS = {
    "no such file": (["y.npy"], ["INPUT", "y.npy doesn't exist"]),
    "another suffix": (["x.npy", "--out", "w.pkl"], ["--out", "w.pkl must end with .npz or .safetensors"]),
    "no such folder": (["x.npy", "--out", "no/w.npz"], ["no can't be written to"]),
    "too long a name": (["x.npy", "--out", f"{240 * 'w'}.npz"], [".npz.checkpoint can't be written", "too long"]),
    "unknown method": (["x.npy", "--method", "ica"], ["--method", "ica", "zca"]),
    "too many components": (["x.npy", "--method", "pca", "--components", "7"], ["--components 7", "6 dimensions"]),
    "components in words": (["x.npy", "--method", "pca", "--components", "all"], ["--components", "not a number"]),
    "iterations without newton": (["x.npy", "--iterations", "3"], ["--iterations 3", "--method newton"]),
    "negative eps": (["x.npy", "--eps", "-1"], ["--eps -1.0 must be 0 or more"]),
    "eps that is no number": (["x.npy", "--eps", "nan"], ["--eps", "nan is not a number"]),
    "shrinkage above 1": (["x.npy", "--shrinkage", "2"], ["--shrinkage 2.0 must be a number from 0 to 1"]),
    "little memory": (["x.npy", "--memory", "1MB"], ["--memory", "at least", "MiB are needed"]),
    "memory in words": (["x.npy", "--memory", "much"], ["--memory", "'much' is not a size", "2GiB"]),
    "an output that exists": (["x.npy", "--out", "old.npz"], ["--out", "old.npz exists", "--overwrite"]),
}


@pytest.mark.parametrize(("args", "words"), BAD_FITS.values(), ids=BAD_FITS)
def test_a_fit_that_cannot_be_is_one_line(args, words, capsys):
    Path("old.npz").write_text("earlier")
    assert run("fit", *args, *(() if "--out" in args else ("--out", "w.npz"))) == 2
    line = one_line(capsys)
    for word in words:
        assert word in line
    assert sorted(os.listdir()) == ["old.npz", "x.npy"]
    assert Path("old.npz").read_text() == "earlier"


BAD_TRANSFORMS = {
    "no whitening": (["x.npy", "--whitening", "no.npz"], ["--whitening", "no.npz can't be read (No such file"]),
    "something else": (["x.npy", "--whitening", "other.npz"], ["--whitening", "other.npz"]),
    "other dimension": (["z.npy", "--whitening", "w.npz"], ["w.npz is for rows of 6 numbers, and z.npy has 3"]),
    "an input": (["x.npy", "--whitening", "w.npz", "--out", "x.npy", "--overwrite"], ["x.npy is one of the inputs"]),
    "another suffix": (["x.npy", "--whitening", "w.npz", "--out", "y.csv"], ["y.csv must end with .npy or .parquet"]),
    "an output that exists": (["x.npy", "--whitening", "w.npz", "--out", "z.npy"], ["z.npy exists", "--overwrite"]),
    "two of one name": (["x.npy", "x.npz", "--whitening", "w.npz", "--out", "new"], ["x.npy and x.npz would both"]),
}


@pytest.mark.parametrize(("args", "words"), BAD_TRANSFORMS.values(), ids=BAD_TRANSFORMS)
def test_a_transform_that_cannot_be_is_one_line(args, words, capsys):
    Whitening().fit(X).save("w.npz")
    np.save("z.npy", X[:, :3])
    np.savez("other.npz", a=1)
    np.savez("x.npz", X)
    before = sorted(os.listdir())
    assert run("transform", *args, *(() if "--out" in args else ("--out", "y.npy"))) == 2
    line = one_line(capsys)
    for word in words:
        assert word in line
    assert sorted(os.listdir()) == before


def test_an_output_is_replaced_if_that_is_asked_for():
    Path("w.npz").write_text("earlier")
    Path("y.npy").write_text("earlier")
    assert run("fit", "x.npy", "--out", "w.npz", "--overwrite") == 0
    assert run("transform", "x.npy", "--whitening", "w.npz", "--out", "y.npy", "--overwrite") == 0
    assert rows_of("y.npy").shape == X.shape


def test_what_is_not_installed_is_named_when_it_is_needed(monkeypatch, capsys):
    """The commands work for .npy without the libraries that only other formats and pictures need."""
    path = "x.parquet"
    parquet.write_table(pa.table({"x": [[1.0, 2.0]]}), path)
    for module in ("pyarrow", "pyarrow.parquet", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "polywhiten.cli.embeddings.picture", raising=False)
    assert run("fit", "x.npy", "--out", "w.npz") == 0
    capsys.readouterr()
    for args, words in (
        (["fit", path, "--out", "v.npz"], ["x.parquet needs pyarrow", "polywhiten[embeddings]"]),
        (["transform", "x.npy", "--whitening", "w.npz", "--out", "y.parquet"], ["y.parquet needs pyarrow"]),
        (["inspect", "x.npy", "--plot", "s.png"], ["--plot", "matplotlib is needed", "polywhiten[embeddings]"]),
    ):
        assert run(*args) == 2
        line = one_line(capsys)
        for word in words:
            assert word in line
    assert sorted(os.listdir()) == ["w.npz", "x.npy", path]


# ---------------------------------------------------------------- interruptions


def ctrl_c():
    raise KeyboardInterrupt


def interrupted_after(monkeypatch, batches, interrupt=ctrl_c):
    """Interrupt `partial_fit` when it has had so many batches; return their lengths, a list that grows."""
    given, partial_fit = [], Whitening.partial_fit

    def partial(self, rows, *args):
        if len(rows) == 16 and len(given) == batches:
            interrupt()
        if len(rows) != 12:  # not those that load the kernels
            given.append(len(rows))
        return partial_fit(self, rows, *args)

    monkeypatch.setattr(Whitening, "partial_fit", partial)
    return given


@pytest.mark.usefixtures("small_batches")
def test_fit_goes_on_where_it_was_interrupted(monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupted_after(patched, 5)
        assert run("fit", "x.npy", "--out", "w.npz") == 130
    expected = "stopped: 80 of 200 rows are in w.npz.checkpoint, from which the same command goes on\n"
    assert one_line(capsys) == f"polywhiten: {expected}"
    assert sorted(os.listdir()) == ["w.npz.checkpoint", "x.npy"]
    given = interrupted_after(monkeypatch, 1000)
    assert run("fit", "x.npy", "--out", "w.npz", "--method", "pca", "--components", "3") == 0
    assert capsys.readouterr().err == "polywhiten: going on after 80 rows, from w.npz.checkpoint\n"
    assert sum(given) == 120
    assert sorted(os.listdir()) == ["w.npz", "x.npy"]
    found = Whitening.load("w.npz")
    assert found.n_samples_seen_ == 200
    np.testing.assert_allclose(found.matrix_, Whitening("pca", n_components=3).fit(X).matrix_, rtol=1e-4)


@pytest.mark.usefixtures("small_batches")
def test_skipped_rows_are_not_read_again(monkeypatch, capsys):
    y = X.copy()
    y[10, 2] = np.nan
    np.save("x.npy", y)
    with monkeypatch.context() as patched:
        interrupted_after(patched, 5)
        assert run("fit", "x.npy", "--out", "w.npz", "--skip-nonfinite") == 130
    assert run("fit", "x.npy", "--out", "w.npz", "--skip-nonfinite") == 0
    assert "going on after 80 rows" in capsys.readouterr().err
    found = Whitening.load("w.npz")
    assert (found.n_samples_seen_, found.n_skipped_) == (199, 1)
    np.testing.assert_allclose(found.mean_, np.delete(y, 10, 0).mean(0, dtype="float64"), rtol=1e-5)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("change", ["input", "scale", "shrinkage", "damage"])
def test_a_checkpoint_of_something_else_is_not_used(change, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupted_after(patched, 5)
        assert run("fit", "x.npy", "--out", "w.npz") == 130
    capsys.readouterr()
    args = {"scale": ["--scale", "2"], "shrinkage": ["--shrinkage", "ledoit_wolf"]}.get(change, [])
    if change == "input":
        np.save("x.npy", 2 * X[:190])
    if change == "damage":
        Path("w.npz.checkpoint").write_bytes(Path("w.npz.checkpoint").read_bytes()[:100])
    assert run("fit", "x.npy", "--out", "w.npz", *args) == 0
    reason = r"can't be read \(.*\)" if change == "damage" else "is of other inputs or parameters"
    assert re.fullmatch(rf"polywhiten: starting again: w.npz.checkpoint {reason}\n", capsys.readouterr().err)
    assert Whitening.load("w.npz").n_samples_seen_ == (190 if change == "input" else 200)


@pytest.mark.usefixtures("small_batches")
def test_an_error_after_the_statistics_keeps_them(capsys):
    """Another method whitens the same statistics, without the data being read again."""
    np.save("x.npy", X[:, [0, 1, 2, 0]])
    assert run("fit", "x.npy", "--out", "w.npz", "--method", "cholesky", "--eps", "0") == 2
    line = one_line(capsys)
    assert "--method cholesky" in line
    assert line.endswith("200 of 200 rows are in w.npz.checkpoint, from which the same command goes on\n")
    assert run("fit", "x.npy", "--out", "w.npz") == 0
    assert "going on after 200 rows" in capsys.readouterr().err


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (MemoryError, 2), (OSError(28, "full"), 2)])
def test_a_transform_that_ends_early_leaves_no_output(error, code, monkeypatch, capsys):
    fitted()
    os.mkdir("in")
    for name in "ab":
        np.save(f"in/{name}.npy", X)
    transform, calls = Whitening.transform, []

    def fails(self, rows):
        calls.append(len(rows))
        if len(calls) == 20:
            raise error
        return transform(self, rows)

    monkeypatch.setattr(Whitening, "transform", fails)
    capsys.readouterr()
    assert run("transform", "in", "--whitening", "w.npz", "--out", "out") == code
    assert one_line(capsys).endswith("1 of 2 outputs are complete\n")
    assert os.listdir("out") == ["a.npy"]
    assert rows_of("out/a.npy").shape == X.shape


SLOW = """
import sys, time
from polywhiten.cli import commands
from polywhiten.embeddings.files import memory
from polywhiten.embeddings.whitening import Whitening
memory.BATCH_BYTES, memory.BATCH_ROWS = 0, 16
partial_fit = Whitening.partial_fit
def slow(self, rows, *args):
    time.sleep(0.02)
    return partial_fit(self, rows, *args)
Whitening.partial_fit = slow
sys.exit(commands.run(sys.argv[1:]))
"""


def test_a_killed_fit_loses_no_more_than_the_time_between_checkpoints(capsys):
    rows = np.tile(X, (50, 1)).astype("float64")
    np.save("x.npy", rows)
    args = "fit", "x.npy", "--out", "w.npz", "--checkpoint-every", "0.1"
    process = subprocess.Popen([sys.executable, "-P", "-c", SLOW, *args])
    end = time.monotonic() + 120
    while not os.path.exists("w.npz.checkpoint") and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert not os.path.exists("w.npz")
    assert run(*args) == 0
    (after,) = re.findall(r"going on after ([\d,]+) rows", capsys.readouterr().err)
    assert int(after.replace(",", "")) > 16
    found = Whitening.load("w.npz")
    assert found.n_samples_seen_ == len(rows)
    np.testing.assert_allclose(found.matrix_, Whitening().fit(rows).matrix_, rtol=1e-9)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_scheduler_or_a_lost_terminal_stops_the_process_like_ctrl_c(monkeypatch, capsys, number):
    interrupted_after(monkeypatch, 5, lambda: os.kill(os.getpid(), number))
    inherited = signal.signal(number, signal.SIG_DFL)  # ignored if nohup has started the tests
    try:
        assert run("fit", "x.npy", "--out", "w.npz") == 130
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)
    assert "stopped: 80 of 200 rows are in w.npz.checkpoint" in one_line(capsys)


def test_a_process_that_ignores_lost_terminals_goes_on(monkeypatch):
    """As nohup starts it."""
    interrupted_after(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGHUP))
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("fit", "x.npy", "--out", "w.npz") == 0
    finally:
        signal.signal(signal.SIGHUP, earlier)


PEAK = """
import sys
from pathlib import Path
from polywhiten.cli import commands
limit = sys.argv[1]
for args in (
    "fit large.npy --out w.npz --method pca --components 16",
    "transform large.npy --whitening w.npz --out y.npy",
):
    if commands.run([*args.split(), "--memory", limit]):
        sys.exit(1)
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(peak.split()[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is not known here")
def test_a_file_larger_than_the_memory_is_read_within_it():
    rows, dimension, limit = 300_000, 256, 280
    block = RANDOM.normal(size=(3000, dimension)).astype("float32")
    with open("large.npy", "wb") as file:  # of 293 MiB
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(rows // len(block)):
            block.tofile(file)
    command = [sys.executable, "-P", "-c", PEAK, f"{limit}MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) / 1024 for line in done.stdout.splitlines() if line.isdecimal()]
    assert len(peaks) == 2
    assert max(peaks) < limit


# ---------------------------------------------------------------- progress


@pytest.mark.usefixtures("small_batches")
def test_progress_is_lines_without_a_terminal_and_a_bar_on_one(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    fitted("--quiet")
    assert capsys.readouterr().err == ""
    fitted()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12  # none for the last batch
    assert re.fullmatch(r"polywhiten: fit: 16 of 200 rows, [\d,]+ rows/s, \d+ s left", lines[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    fitted()
    stderr = capsys.readouterr().err
    assert "fit" in stderr
    assert "of 200 rows" in stderr
    assert "polywhiten:" not in stderr


# ---------------------------------------------------------------- inspect


def test_inspect_shows_a_table_and_a_command_that_works(capsys):
    assert run("inspect", "x.npy") == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    centred = X.astype("float64") - X.mean(0, dtype="float64")
    eigenvalues = np.linalg.eigvalsh(centred.T @ centred / len(X))
    for words in (
        r"Rows +200",
        rf"Largest variance of a direction +{eigenvalues[-1]:.3g} +0.9\d* ",
        "Condition number +",
    ):
        assert re.search(words, stdout)
    assert "Random pairs have a mean cosine of 0." in stdout
    (command,) = [line for line in stdout.splitlines() if line.startswith("  polywhiten fit")]
    assert commands.run(shlex.split(command)[1:]) == 0
    assert Whitening.load("whitening.npz").n_features_in_ == DIMENSION


def test_the_suggested_command_reads_a_file_whose_name_starts_with_a_dash(capsys):
    np.save("-x.npy", X)
    assert run("inspect", "--", "-x.npy") == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  polywhiten fit"))
    assert commands.run(shlex.split(command)[1:]) == 0


def test_inspect_measures_a_whitening_that_is_given(capsys):
    fitted("--method", "pca", "--components", "2")
    capsys.readouterr()
    assert run("inspect", "x.npy", "--whitening", "w.npz") == 0
    stdout = capsys.readouterr().out
    assert re.search(r"Dimension +6 +2\n", re.sub(r" +\n", "\n", stdout))


def test_inspect_draws_a_picture(capsys):
    pytest.importorskip("matplotlib")
    assert run("inspect", "x.npy", "--plot", "s.png") == 0
    assert Path("s.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    capsys.readouterr()
    for plot, words in (("s.txt", "must end with .png"), ("no/s.png", "folder no doesn't exist")):
        assert run("inspect", "x.npy", "--plot", plot) == 2
        assert words in one_line(capsys)


@pytest.mark.parametrize("rows", [np.ones((5, 3)), np.ones((1, 3))])
def test_rows_that_cannot_be_whitened_are_one_line(rows, capsys):
    np.save("bad.npy", rows)
    assert run("inspect", "bad.npy") == 2
    assert "bad.npy: X has" in one_line(capsys)
