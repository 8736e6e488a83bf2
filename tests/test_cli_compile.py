"""The commands that compile kernels ahead of time, and that complete what users type."""

import os
import signal
import subprocess
import sys
import time

import pytest

for _module in ("click", "numba", "rich"):
    pytest.importorskip(_module)

import numba  # noqa: E402

from polywhiten.cli import commands, compile  # noqa: E402
from polywhiten.cpu import ahead  # noqa: E402
from polywhiten.cpu.runtime import cache, kernel_files  # noqa: E402


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Keep kernels in an empty folder, and compile only one of them, which takes a moment."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "KERNELS", {"gradient_terms": ahead.KERNELS["gradient_terms"]})
    monkeypatch.setattr(ahead, "LOOPS", {})
    cache.kernel_address.cache_clear()
    return tmp_path


def test_compile_says_what_it_did_and_does_it_once(folder, capsys):
    assert commands.run(["compile"]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith("Kernels that were compiled: 2, in ")
    assert "\nKernels that were there already: 0\nThey are kept in " in stdout
    assert str(folder) in stdout
    assert stderr.count("\n") == 1
    assert "compiling 2 kernels" in stderr
    assert len(list(folder.rglob("*gradient_terms*.nbc"))) == 2
    cache.kernel_address.cache_clear()
    assert commands.run(["compile"]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith("Kernels that were compiled: 0\nKernels that were there already: 2\n")
    assert stderr == ""


def test_compile_for_one_dtype(folder, capsys):
    assert commands.run(["compile", "--dtype", "float64", "--dtype", "FLOAT64"]) == 0
    assert capsys.readouterr().out.startswith("Kernels that were compiled: 1, in ")
    assert [file.name for file in folder.rglob("*float*.nbc")] == [file.name for file in folder.rglob("*float64*.nbc")]


def one_line(capsys, *words):
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    last = stderr.splitlines()[-1]
    assert last.startswith("polywhiten: ")
    for word in words:
        assert word in last


def test_a_dtype_without_kernels_is_one_line(capsys):
    assert commands.run(["compile", "--dtype", "float16"]) == 2
    one_line(capsys, "--dtype", "float16", "float32", "float64")


def test_no_folder_to_write_to_is_one_line(capsys, monkeypatch):
    def nowhere(function):
        raise RuntimeError("cannot cache function")

    monkeypatch.setattr(kernel_files, "KernelFiles", nowhere)
    assert commands.run(["compile"]) == 2
    one_line(capsys, "no folder can be written to", "NUMBA_CACHE_DIR")


def test_kernels_that_can_not_be_kept_are_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(ahead, "compile_in_processes", lambda todo: iter(todo))
    assert commands.run(["compile"]) == 2
    one_line(capsys, "2 of 2 compiled kernels can't be kept", str(folder), "NUMBA_CACHE_DIR")


def test_a_process_that_ends_early_is_one_line(capsys, monkeypatch):
    def fail(todo):
        raise ahead.CompileError("a process that compiles has ended at moments, with exit code -9")
        yield

    monkeypatch.setattr(ahead, "compile_in_processes", fail)
    assert commands.run(["compile"]) == 2
    one_line(capsys, "has ended at moments, with exit code -9")
    compile.compile_for_demo()  # training compiles them then
    assert capsys.readouterr() == ("", "")


def test_without_numba_there_is_nothing_to_compile(capsys, monkeypatch):
    monkeypatch.setattr(compile, "is_installed", lambda module: False)
    assert commands.run(["compile"]) == 2
    one_line(capsys, "Numba", 'pip install "polywhiten[numba]"')
    compile.compile_for_demo()  # trains without compiled kernels
    assert capsys.readouterr() == ("", "")


def test_a_demo_compiles_only_what_is_not_kept(folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(ahead, "compile_in_processes", lambda todo: compiled.extend(todo) or iter(todo))
    compile.compile_for_demo()
    assert compiled == [ahead.Job("gradient_terms", "float32")]
    compiled[0].run()
    compile.compile_for_demo()
    assert len(compiled) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process")
def test_ctrl_c_ends_all_processes(folder):
    code = (
        f"import signal, sys; sys.path[:] = {sys.path!r}; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from polywhiten.cli.commands import run; sys.exit(run(['compile']))"
    )
    environment = os.environ | {"NUMBA_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=pipe, stderr=pipe, text=True)
    assert "compiling" in process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)  # the processes would hold standard error open
    assert (process.returncode, stdout, stderr) == (130, "", "polywhiten: stopped\n")
    assert not list(folder.rglob("*cross_moments*.nbc"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(shell, capsys):
    assert commands.run(["completion", shell]) == 0
    assert f"_POLYWHITEN_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_the_values_of_options_are_completed(capsys, monkeypatch):
    for name, value in (("_POLYWHITEN_COMPLETE", "bash_complete"), ("COMP_CWORD", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_WORDS", "polywhiten compile --dtype ")
    with pytest.raises(SystemExit):
        commands.run([])
    assert capsys.readouterr().out.split() == ["plain,float32", "plain,float64"]


def test_a_shell_without_completion_is_one_line(capsys):
    assert commands.run(["completion", "csh"]) == 2
    one_line(capsys, "csh", "bash", "zsh", "fish")
