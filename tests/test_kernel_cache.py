"""Damaged files of compiled kernels are replaced, and everything works if no file can be written or no folder found."""

import errno
import inspect
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import import_module
from pathlib import Path

import pytest

numba = pytest.importorskip("numba")

from numba import types  # noqa: E402
from numba.core import dispatcher  # noqa: E402
from numba.core.caching import IndexDataCacheFile  # noqa: E402

from polywhiten.cpu import ahead  # noqa: E402
from polywhiten.cpu.runtime import cache, first_use, kernel_files  # noqa: E402


def double(x):
    return 2 * x


COMPILED = {
    "callback": lambda: cache.compiled_callback(double, "d", types.int64(types.int64)).ctypes(21),
    "function": lambda: cache.compiled_function(double, "f", types.int64(types.int64))(21),
}


@pytest.fixture(params=COMPILED)
def doubled(request, tmp_path, monkeypatch):
    """Return a function that loads the kernel as a new process does, and calls it with 21."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    return COMPILED[request.param]


@pytest.fixture(autouse=True)
def _new_process(monkeypatch):
    """Forget what a process says only once, and what an earlier test has set in the environment."""
    numba.config.reload_config()  # or the next compilation does it, and undoes what the test sets
    kernel_files.warn_that_nothing_is_kept.cache_clear()
    monkeypatch.setattr(first_use, "_explained", [])


def files(folder, ending):
    return list(folder.rglob(f"*double*.{ending}"))


def full(self, path):
    """Fail to write, as on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def count_compilations(monkeypatch):
    """Return a list that gets an item for every function that Numba compiles."""

    def compile_one(*args, **kwargs):
        compiled.append(args)
        return original(*args, **kwargs)

    compiled, original = [], dispatcher.compiler.compile_extra
    monkeypatch.setattr(dispatcher.compiler, "compile_extra", compile_one)
    return compiled


def without_writing(monkeypatch, *folders):
    """Let no file be made in these folders, as in a file system that can only be read; root may write anywhere."""

    def refuse(*args, **kwargs):
        if str(kwargs["dir"]).startswith(tuple(map(str, folders))):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(*args, **kwargs)

    original = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "random": lambda content: os.urandom(len(content)),
    "another pickle": lambda content: b"\x80\x04K\x05.",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("ending", ["nbi", "nbc"], ids=["index", "machine code"])
def test_a_damaged_file_is_replaced_with_a_warning_that_names_it(doubled, tmp_path, ending, damage):
    assert doubled() == 42
    (file,) = files(tmp_path, ending)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert doubled() == 42
    if caught:  # a damaged index may look like one of another version of Numba, which is replaced without a warning
        (warning,) = caught
        assert str(file) in str(warning.message)
    else:
        assert ending == "nbi"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doubled() == 42
    assert len(files(tmp_path, "nbc")) == 1


def test_a_full_disk_keeps_nothing_and_says_so_once(doubled, tmp_path, monkeypatch):
    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", full)
    compiled = count_compilations(monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert doubled() == doubled() == 42
    (warning,) = caught
    assert "No space left on device" in str(warning.message)
    assert "NUMBA_CACHE_DIR" in str(warning.message)
    assert not files(tmp_path, "nb?")
    assert len(compiled) == 2  # once for each call


def test_a_damaged_file_that_can_not_be_replaced_says_so(doubled, tmp_path, monkeypatch):
    assert doubled() == 42
    (file,) = files(tmp_path, "nbc")
    file.write_bytes(b"")
    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert doubled() == 42


def test_a_folder_that_vanishes_is_no_error(doubled, tmp_path):
    assert doubled() == 42
    shutil.rmtree(tmp_path / "cache")
    assert doubled() == 42


def test_what_is_wrong_with_a_kernel_itself_is_raised():
    with pytest.raises(numba.TypingError):
        cache.compiled_callback(lambda x: x.nothing, "d", types.int64(types.int64))


# ---------------------------------------------------------------- folders


def test_a_folder_that_can_only_be_read_is_read(doubled, tmp_path, monkeypatch):
    """A container's image may hold compiled kernels, where the container has other rights than its build had."""
    assert doubled() == 42
    without_writing(monkeypatch, tmp_path, Path(__file__).parent)
    compiled = count_compilations(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doubled() == 42
    assert not compiled


def test_without_any_folder_everything_works_and_a_warning_says_what_to_do(doubled, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    without_writing(monkeypatch, tmp_path, Path(__file__).parent)
    with pytest.warns(RuntimeWarning, match=r"no folder can be written to.*NUMBA_CACHE_DIR"):
        assert doubled() == 42
    assert not files(tmp_path, "nb?")
    assert "polywhiten compile" not in caplog.text  # which can't help


def test_a_user_without_a_home_gets_no_folder_called_tilde(doubled, tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.cache")  # what Python makes of a home that nobody knows
    monkeypatch.chdir(tmp_path)
    without_writing(monkeypatch, Path(__file__).parent)
    with pytest.warns(RuntimeWarning, match="no folder can be written to"):
        assert doubled() == 42
    assert not list(tmp_path.iterdir())


def test_two_processes_may_compile_the_same_kernel_at_once(tmp_path):
    code = (
        "from numba import types; from kernel import double; from polywhiten.cpu.runtime import cache\n"
        "print(cache.compiled_callback(double, 'd', types.int64(types.int64)).ctypes(21))"
    )
    (tmp_path / "kernel.py").write_text("def double(x):\n    return 2 * x\n")
    code = f"import sys; sys.path[:] = {[str(tmp_path), *sys.path]!r}; {code}"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONWARNINGS": "error::RuntimeWarning"}
    start = [sys.executable, "-c", code]
    processes = [subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["42\n", "42\n"]
    assert len(files(tmp_path, "nbc")) == len(files(tmp_path, "nbi")) == 1


# ---------------------------------------------------------------- what the first use says


@pytest.fixture
def slow(monkeypatch):
    """Let compiling take long."""

    def wait(self, *args):
        time.sleep(0.1)
        return original(self, *args)

    original = kernel_files.KernelFiles.save_overload
    monkeypatch.setattr(kernel_files.KernelFiles, "save_overload", wait)
    monkeypatch.setattr(first_use, "PATIENCE_SECONDS", 0.05)


def test_the_first_use_says_once_what_takes_long_and_where_it_is_kept(doubled, tmp_path, caplog, slow):
    assert doubled() == 42
    shutil.rmtree(tmp_path / "cache")
    assert doubled() == 42
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("polywhiten", logging.WARNING)
    for words in ("compiles", "once", str(tmp_path / "cache"), "polywhiten compile"):
        assert words in record.getMessage()


def test_nothing_is_said_of_what_is_quick_or_kept(doubled, caplog, monkeypatch):
    assert doubled() == 42
    monkeypatch.setattr(first_use, "PATIENCE_SECONDS", 0.0)
    assert doubled() == 42
    assert not caplog.records


# ---------------------------------------------------------------- compiling ahead of time


def test_kernels_that_are_not_kept_are_found_without_compiling(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    cache.kernel_address.cache_clear()
    compiled = count_compilations(monkeypatch)
    jobs = [ahead.Job("gradient_terms", "float32"), ahead.Job("gradient_terms", "float64")]
    assert ahead.missing(jobs) == jobs
    assert not compiled
    jobs[0].run()
    cache.kernel_address.cache_clear()
    assert ahead.missing(jobs) == jobs[1:]


def test_what_is_loaded_beside_pytorch_starts_no_threads():
    """Numba's threads may be OpenMP's, which has one number for both."""
    assert ahead.Job("in_numba_threads") in ahead.jobs()
    names = {job.name for job in ahead.jobs(("float32",), beside_torch=True)}
    assert names == {*ahead.KERNELS, "openmp_region", "in_one_thread"}


def test_all_kernels_are_compiled_ahead():
    """A kernel is a function with these parameters."""
    modules = [import_module(f"polywhiten.cpu.device.{name}") for name in ahead_modules()]
    functions = {
        function
        for module in modules
        for function in vars(module).values()
        if inspect.isfunction(function) and [*inspect.signature(function).parameters] == KERNEL_PARAMETERS
    }
    assert functions == set(ahead.KERNELS.values())


KERNEL_PARAMETERS = ["packed", "workspace", "part", "num_parts"]


def ahead_modules():
    return [file.stem for file in Path(inspect.getfile(ahead)).parent.glob("device/*.py") if file.stem != "__init__"]


def test_processes_compile_for_this_one_and_one_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    job = ahead.Job("gradient_terms", "float32")
    assert list(ahead.compile_in_processes([job])) == [job]
    assert ahead.missing([job]) == []
    with pytest.raises(ahead.CompileError, match="ended at nothing, with exit code 1"):
        list(ahead.compile_in_processes([ahead.Job("nothing", "float32")]))
