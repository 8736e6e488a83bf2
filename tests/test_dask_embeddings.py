"""Embeddings in Dask's arrays, and in files that Dask's workers read."""

import logging
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

import polywhiten as pw

da = pytest.importorskip("dask.array")
dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")

from slow_files import SlowFile, readers  # noqa: E402

from polywhiten.dask import ClusterError, connected, fit_files, transform_files  # noqa: E402
from polywhiten.embeddings.files import FileError, open_source, pieces  # noqa: E402

ROWS, DIMENSION = 1500, 6


@pytest.fixture
def x():
    random = np.random.default_rng(0)
    return random.normal(size=(ROWS, DIMENSION)) @ random.normal(size=(DIMENSION, DIMENSION)) + 10


@pytest.fixture
def no_computation():
    def refuse(*_args, **_kwargs):
        raise AssertionError("computed before the user asked")

    with dask.config.set(scheduler=refuse):
        yield


@pytest.fixture(scope="module")
def cluster():
    options = {
        "threads_per_worker": 1,
        "dashboard_address": ":0",
        "host": "127.0.0.1",
        "silence_logs": logging.CRITICAL,
    }
    # or a result that was copied to another worker, where it is added, may stay there alone, and be lost with it
    one_owner = {"distributed.scheduler.active-memory-manager.start": False}
    with (
        dask.config.set(one_owner),
        distributed.LocalCluster(n_workers=3, memory_limit=None, **options) as cluster,
    ):
        yield cluster


@pytest.fixture
def client(cluster):
    with connected(cluster.scheduler_address) as client:
        yield client


@pytest.fixture
def files(x, tmp_path):
    """Three files, which have the rows of x together."""
    for index, part in enumerate(np.split(x, 3)):
        np.save(tmp_path / f"{index}.npy", part)
    return open_source([tmp_path])


def assert_equal_fits(actual, expected):
    assert actual.n_samples_seen_ == expected.n_samples_seen_
    for name in ("mean_", "covariance_", "matrix_"):
        wanted = getattr(expected, name)
        np.testing.assert_allclose(
            getattr(actual, name), wanted, rtol=0, atol=1e-12 * np.abs(wanted).max(), err_msg=name
        )


@pytest.mark.parametrize("chunks", [(400, 4), (7, 5), (2, 6)])  # the last are smaller than their moments
@pytest.mark.parametrize("parameters", [{}, {"shrinkage": "ledoit_wolf"}, {"method": "pca", "n_components": 3}])
def test_a_dask_array_is_whitened_as_the_array_is(x, chunks, parameters):
    weights = np.random.default_rng(1).uniform(size=ROWS)
    lazy = da.from_array(x, chunks=chunks)
    expected = pw.Whitening(**parameters).fit(x, sample_weight=weights)
    actual = pw.Whitening(**parameters).fit(lazy, sample_weight=da.from_array(weights, chunks=70))
    assert_equal_fits(actual, expected)
    white = expected.transform(x)
    np.testing.assert_allclose(actual.transform(lazy), white, atol=1e-11)
    restored = actual.inverse_transform(da.from_array(white, chunks=(400, 2)))
    np.testing.assert_allclose(restored, expected.inverse_transform(white), atol=1e-11)


def test_batches_of_dask_arrays_add_up(x):
    whitening = pw.Whitening()
    for part in (x[:700], x[700:]):
        whitening.partial_fit(da.from_array(part, chunks=200))
    assert_equal_fits(whitening, pw.Whitening().fit(x))


@pytest.mark.parametrize(("dtype", "result"), [("float16", "float16"), ("float32", "float32"), ("int8", "float32")])
def test_transform_keeps_chunks_and_dtype_and_computes_nothing(x, no_computation, dtype, result):
    whitening = pw.Whitening(method="pca", n_components=2).fit(x)
    lazy = da.from_array(x.astype(dtype), chunks=(400, 4))
    for y, columns in ((white := whitening.transform(lazy), 2), (whitening.inverse_transform(white), DIMENSION)):
        assert isinstance(y, da.Array)
        assert y.dtype == result
        assert y.chunks == ((400, 400, 400, 300), (columns,))


def test_transform_gives_what_it_says(x):
    whitening = pw.Whitening(normalize=True, scale=0.5).fit(x)
    y = whitening.transform(da.from_array(x.astype("int8"), chunks=(400, 4)))
    block = y.blocks[1].compute()
    assert block.dtype == y.dtype
    np.testing.assert_allclose(block, whitening.transform(x[400:800].astype("int8")), atol=1e-6)


def test_chunks_may_have_unknown_numbers_of_rows_and_be_empty(x):
    x[:700, 0] = -100
    lazy = da.from_array(x, chunks=(300, 4))
    lazy, x = lazy[lazy[:, 0] > -100], x[700:]
    expected, actual = pw.Whitening().fit(x), pw.Whitening().fit(lazy)
    assert_equal_fits(actual, expected)
    np.testing.assert_allclose(actual.transform(lazy), expected.transform(x), atol=1e-11)
    with pytest.raises(ValueError, match="sample_weight needs an X of a known number of rows"):
        actual.fit(lazy, sample_weight=np.ones(len(x)))


def test_columns_must_be_known(x):
    lazy = da.from_array(x, chunks=(300, 4))
    with pytest.raises(ValueError, match=r"X .*unknown number of columns.*compute_chunk_sizes"):
        pw.Whitening().fit(lazy[:, da.from_array(x[0] > 0)])


def test_rows_with_nan_are_counted_in_the_whole_array(x):
    fitted = pw.Whitening().fit(x)
    x[1234, 3] = np.nan
    lazy = da.from_array(x, chunks=(400, 4))
    with pytest.raises(ValueError, match="row 1234"):
        pw.Whitening().fit(lazy)
    with pytest.raises(ValueError, match="row 1234"):
        fitted.transform(lazy).compute()
    whitening = pw.Whitening(on_nonfinite="skip").fit(lazy)
    assert whitening.n_skipped_ == 1
    assert np.flatnonzero(np.isnan(whitening.transform(lazy).compute()[:, 0])).tolist() == [1234]


def test_a_failure_leaves_the_estimator_as_it_was(x):
    whitening = pw.Whitening().fit(x)
    before = whitening.matrix_.copy()
    x[1400] = np.inf
    for fit in (whitening.fit, whitening.partial_fit):
        with pytest.raises(ValueError, match="infinity"):
            fit(da.from_array(x, chunks=400))
    np.testing.assert_array_equal(whitening.matrix_, before)


def test_arrays_are_whitened_on_a_cluster(x, client, tmp_path):
    lazy = da.from_array(x, chunks=(100, 4))
    expected = pw.Whitening().fit(x)
    whitening = pw.Whitening().fit(lazy)
    assert_equal_fits(whitening, expected)
    da.to_npy_stack(tmp_path / "white", whitening.transform(lazy))
    np.testing.assert_allclose(da.from_npy_stack(tmp_path / "white"), expected.transform(x), atol=1e-11)


@pytest.mark.parametrize("scheduler", ["threads", "a cluster"])
def test_files_are_whitened_piece_by_piece(x, files, tmp_path, request, scheduler):
    if scheduler == "a cluster":
        request.getfixturevalue("client")
    parts, fitted, written = pieces(files, 70), [], []
    whitening = fit_files(pw.Whitening(), parts, report=fitted.append)
    expected = pw.Whitening().fit(x)
    assert_equal_fits(whitening, expected)
    (tmp_path / "out").mkdir()
    outputs = transform_files(whitening, parts, tmp_path / "out", dtype="float32", report=written.append)
    assert sorted(fitted) == sorted(written) == list(range(len(parts)))
    assert sorted((tmp_path / "out").iterdir()) == outputs
    y = np.concatenate([np.load(path) for path in outputs])
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected.transform(x), atol=1e-5)


def test_errors_name_the_file_and_the_worker(x, files, client, tmp_path):
    whitening, parts = pw.Whitening().fit(x), pieces(files, 70)
    with pytest.raises(FileError, match=r"on .*: .*nowhere doesn't exist: all workers need"):
        transform_files(whitening, parts[:11], tmp_path / "nowhere")
    x[600, 2] = np.nan
    np.save(tmp_path / "1.npy", x[500:1000])
    with pytest.raises(ValueError, match=r"1\.npy, row 100 has NaN or infinity"):
        fit_files(whitening, parts)
    (tmp_path / "1.npy").unlink()
    with pytest.raises(FileError, match=r"on .*: .*1\.npy doesn't exist: all workers need the inputs"):
        fit_files(whitening, parts)
    assert whitening.n_samples_seen_ == ROWS  # as before
    end = time.monotonic() + 10
    while any(client.processing().values()):  # what was running when it was cancelled
        assert time.monotonic() < end, "other pieces are cancelled"
        time.sleep(0.05)


def test_a_cluster_must_be_there():
    with (
        pytest.raises(ClusterError, match=r"nowhere isn't the address of a scheduler, such as tcp://"),
        connected("nowhere"),
    ):
        pass


def test_a_killed_worker_costs_its_own_pieces_alone(x, files, client, tmp_path):
    log, killed = tmp_path / "log", []
    parts = [
        replace(piece, file=SlowFile(**vars(piece.file), number=number, log=log))
        for number, piece in enumerate(pieces(files, 20))
    ]

    def kill_in_the_middle():
        while len(readers(log)) < len(parts) // 2:
            time.sleep(0.005)
        ((process, _),) = Counter(process for _, process in readers(log)).most_common(1)
        os.kill(process, signal.SIGKILL)
        killed.append(process)

    killer = threading.Thread(target=kill_in_the_middle, daemon=True)
    killer.start()
    whitening = fit_files(pw.Whitening(), parts)
    killer.join()
    assert_equal_fits(whitening, pw.Whitening().fit(x))
    processes = defaultdict(list)
    for number, process in readers(log):
        processes[number].append(process)
    repeated = {number for number, each in processes.items() if len(each) > 1}
    of_killed = {number for number, each in processes.items() if killed[0] in each}
    assert 5 <= len(repeated) < len(parts) / 2
    assert repeated <= of_killed, "no other worker's pieces are read again"
    assert max(map(len, processes.values())) == 2


def command(*args):
    """Run a command of `polywhiten`, and return its exit code."""
    for module in ("click", "rich"):
        pytest.importorskip(module)
    from polywhiten.cli import commands

    return commands.run([str(arg) for arg in args])


def test_commands_use_a_cluster(x, files, cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the workers are in another folder
    inputs, whitening, white = ("0.npy", "1.npy", "2.npy"), "whitening.npz", tmp_path / "white"
    options = ("--scheduler", cluster.scheduler_address, "--quiet", "--memory", 4 * 100 * DIMENSION * 8)
    assert command("fit", *inputs, "--out", whitening, *options) == 0
    assert "fitted to 1,500 rows" in capsys.readouterr().out
    assert_equal_fits(pw.Whitening.load(whitening), expected := pw.Whitening().fit(x))
    transform = ("transform", *inputs, "--whitening", whitening, "--out", white, *options)
    assert command(*transform) == 0
    assert "15 files in" in capsys.readouterr().out
    y = np.concatenate([np.load(path) for path in sorted(white.iterdir())])
    np.testing.assert_allclose(y, expected.transform(x), atol=1e-11)
    assert command(*transform) == 2
    assert "part-00.npy exists: name another folder, or replace it with --overwrite" in capsys.readouterr().err
    assert command(*transform[:-1], 2**20, "--overwrite") == 0
    assert [path.name for path in sorted(white.iterdir())] == ["part-0.npy", "part-1.npy", "part-2.npy"]


def test_commands_report_errors_of_a_cluster_in_one_line(x, files, cluster, tmp_path, capsys):
    options = ("--out", tmp_path / "w.npz", "--scheduler", cluster.scheduler_address, "--quiet")
    x[600, 2] = np.nan
    np.save(tmp_path / "1.npy", x[500:1000])
    assert command("fit", tmp_path, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / '1.npy'}, row 100 has NaN or infinity" in line
    assert command("fit", tmp_path, *options[:-2], "nowhere") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--scheduler': nowhere isn't the address of a scheduler" in line
    assert not (tmp_path / "w.npz").exists()
