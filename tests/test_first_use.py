"""The first use of a dtype compiles in several processes, once, and in its own process where others can't do it."""

import subprocess
import sys
import threading

import pytest

numba = pytest.importorskip("numba")

from numba import types  # noqa: E402
from numba.core import dispatcher  # noqa: E402

from polywhiten.cpu import ahead  # noqa: E402
from polywhiten.cpu.device import gradients, linked_code  # noqa: E402
from polywhiten.cpu.device.device_function import device_function  # noqa: E402
from polywhiten.cpu.runtime import cache, first_use  # noqa: E402
from polywhiten.cpu.runtime.folder_lock import folder_lock  # noqa: E402

ASKED = [gradients.gradient_terms]
SMALL = "gradient_terms", "scale_whitener"  # which take a moment each


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Keep kernels in an empty folder, have only two, and forget what this process knows of them."""
    numba.config.reload_config()  # or the next compilation does it, if an earlier test has changed the environment
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "KERNELS", {name: ahead.KERNELS[name] for name in SMALL})
    monkeypatch.setattr(ahead, "LOOPS", {})
    monkeypatch.setattr(ahead, "_tried", [])
    monkeypatch.setattr(ahead, "max_threads", lambda: 2)
    monkeypatch.setattr(first_use, "_explained", [])
    cache.kernel_address.cache_clear()
    yield tmp_path
    cache.kernel_address.cache_clear()


@pytest.fixture
def started(monkeypatch):
    """Return the commands of the processes that are started."""

    def popen(command, **kwargs):
        commands.append(command)
        return original(command, **kwargs)

    commands, original = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    return commands


@pytest.fixture
def compiled(monkeypatch):
    """Return the names of the kernels that this process compiles."""

    def compile_one(typingctx, targetctx, func, *args, **kwargs):
        names.append(func.__name__)
        return original(typingctx, targetctx, func, *args, **kwargs)

    names, original = [], dispatcher.compiler.compile_extra
    monkeypatch.setattr(dispatcher.compiler, "compile_extra", compile_one)
    return names


def kept(folder):
    return {name for name in SMALL if list(folder.rglob(f"*{name}_float32*.nbc"))}


def test_it_compiles_all_kernels_in_processes_and_later_calls_compile_nothing(folder, started, compiled):
    ahead.compile_at_first_use(ASKED, "float32")
    assert kept(folder) == set(SMALL)
    assert len(started) == 2
    assert cache.kernel_address(gradients.gradient_terms, "float32")
    cache.kernel_address.cache_clear()  # as in a later process
    ahead.compile_at_first_use(ASKED, "float32")
    assert len(started) == 2
    assert compiled == []


def test_evaluation_compiles_its_own_kernels_alone(folder, started, monkeypatch):
    monkeypatch.setattr(ahead, "_EVALUATION", {"gradient_terms"})
    ahead.compile_at_first_use(ASKED, "float32")
    assert kept(folder) == {"gradient_terms"}


def test_threads_that_begin_together_wait_for_the_one_that_compiles(started, compiled):
    def use():
        ahead.compile_at_first_use(ASKED, "float32")
        cache.kernel_address(gradients.gradient_terms, "float32")

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 2
    assert compiled == []


def no_process(monkeypatch, folder):
    def refuse(*args, **kwargs):
        raise PermissionError("no processes here")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def a_process_that_fails(monkeypatch, folder):
    python = folder / "python-fails"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))


def a_disk_that_is_full(monkeypatch, folder):
    monkeypatch.setattr(ahead, "compile_in_processes", lambda todo, number, stderr: iter(todo))


def another_process_that_holds_the_lock(monkeypatch, folder):
    monkeypatch.setattr(ahead, "_PATIENCE_SECONDS", 0.0)
    where = ahead.folder("float32")
    monkeypatch.setattr(ahead, "folder", lambda dtype: where)
    lock = folder_lock(where, 0.0)
    assert lock.__enter__()
    monkeypatch.setattr(ahead, "_held", lock, raising=False)  # keeps it until the test ends


FAILURES = [no_process, a_process_that_fails, a_disk_that_is_full, another_process_that_holds_the_lock]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
def test_where_processes_fail_this_one_compiles_and_does_not_try_again(failure, folder, compiled, monkeypatch, capfd):
    if failure is a_process_that_fails and sys.platform == "win32":
        pytest.skip("needs a shell")
    failure(monkeypatch, folder)
    ahead.compile_at_first_use(ASKED, "float32")
    assert kept(folder) == set()
    assert cache.kernel_address(gradients.gradient_terms, "float32")
    assert compiled[:1] == ["gradient_terms"]
    cache.kernel_address.cache_clear()
    monkeypatch.setattr(ahead, "compile_in_processes", None)
    ahead.compile_at_first_use([ahead.KERNELS["scale_whitener"]], "float32")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("executable", [None, "", "/usr/bin/blender"])
def test_a_program_that_is_not_python_is_not_started(executable, folder, started, monkeypatch):
    monkeypatch.setattr(sys, "executable", executable)
    ahead.compile_at_first_use(ASKED, "float32")
    assert started == []


def test_a_frozen_program_is_not_started(started, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    ahead.compile_at_first_use(ASKED, "float32")
    assert started == []


def test_one_thread_compiles_in_its_own_process(started, monkeypatch):
    monkeypatch.setattr(ahead, "max_threads", lambda: 1)
    ahead.compile_at_first_use(ASKED, "float32")
    assert started == []


def test_a_lock_ends_with_its_process_or_statement(tmp_path):
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from polywhiten.cpu.runtime.folder_lock import folder_lock\n"
        f"with folder_lock({str(tmp_path)!r}, 0.0) as locked: print(locked, flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "True\n"
        with folder_lock(str(tmp_path), 0.0) as locked:
            assert not locked
        other.kill()
    for _ in range(2):
        with folder_lock(str(tmp_path), 0.0) as locked:
            assert locked
    with folder_lock(str(tmp_path / "nowhere"), 0.0) as locked:
        assert not locked


# ---------------------------------------------------------------- functions that are only linked


def four_times(x):
    return twice(twice(x))


@device_function
def twice(x):
    return 2 * x


def library_of(function):
    return function.overloads[(types.int64,)].library


def test_what_kernels_call_gets_no_machine_code_of_its_own():
    kernel = cache.compiled_callback(four_times, "linked", types.int64(types.int64))
    assert kernel.ctypes(3) == 12
    assert "Linked" in type(library_of(twice)).__name__


@pytest.fixture
def other_numba(monkeypatch):
    """Let Numba's compiler not have what linking needs, as in another version."""

    def missing(self):
        raise AttributeError("no such attribute")

    monkeypatch.setattr(linked_code._Linked, "_optimize_functions", missing)
    linked_code.can_link.cache_clear()
    yield
    linked_code.can_link.cache_clear()


def test_another_version_of_numba_compiles_in_its_own_way(other_numba, monkeypatch):
    function = device_function(lambda x: 2 * x)
    monkeypatch.setitem(globals(), "twice", function)
    kernel = cache.compiled_callback(four_times, "numba", types.int64(types.int64))
    assert kernel.ctypes(3) == 12
    assert "Linked" not in type(library_of(function)).__name__
