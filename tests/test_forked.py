"""The compiled kernels work in forked processes, which PyTorch's DataLoader uses, and beside PyTorch's threads."""

import subprocess
import sys

import pytest

pytest.importorskip("numba")

from polywhiten.cpu.runtime import parallel


def run(code, **kwargs):
    """Return what the code prints in a new Python process."""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


WHITEN = """
import signal
signal.alarm(240)  # ends the process if it waits forever
import numpy as np, polywhiten as pw
y = pw.iter_norm(np.random.default_rng(0).normal(size=(64, 64, 14, 14)))
assert abs(y.std() - 1) < 0.3
"""
OS_FORK = f"""
import os
child = os.fork()
if child == 0:
    try:
        exec({WHITEN!r})
        os._exit(0)
    finally:
        os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
LOADER = f"""
from torch.utils.data import DataLoader
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        exec({WHITEN!r}, {{}})
        return index
loader = DataLoader(Data(), num_workers=1, multiprocessing_context="fork")
print(*(batch.item() for batch in loader))
"""
TORCH_THREADS = """
import torch
torch.set_num_threads(2)
x = torch.ones(1000, 1000)
x * 2
x @ x
"""
NUMBA_THREADS = "import numba; numba.set_num_threads(2)"
BEFORE_FORKS = {
    "PyTorch's threads, os.fork": ("torch", TORCH_THREADS + OS_FORK),
    "PyTorch's threads, DataLoader": ("torch", TORCH_THREADS + LOADER),
    "Numba's threads, os.fork": ("numba", NUMBA_THREADS + OS_FORK),
}


@pytest.mark.skipif(sys.platform != "linux", reason="processes aren't forked here, or not with threads")
@pytest.mark.parametrize(("module", "code"), BEFORE_FORKS.values(), ids=BEFORE_FORKS)
def test_a_process_that_was_forked_before_the_import_whitens_too(module, code, monkeypatch):
    pytest.importorskip(module)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run(code) == "0\n"


STARTS = """
import multiprocessing, os, sys
from pathlib import Path

def forked():
    from polywhiten.cpu.runtime import fork
    fork._STAT = Path(sys.argv[1])
    return fork._was_forked()

if __name__ == "__main__":
    found = {}
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            found[method] = pool.apply(forked)
    child = os.fork()
    if child == 0:
        os._exit(forked())
    found["os.fork"] = bool(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(found, forked())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes aren't forked here, or not with threads")
@pytest.mark.parametrize("stat", ["/proc/self/stat", "/proc/none", "zeros"])
def test_processes_know_whether_they_were_forked(stat, tmp_path):
    """Linux tells them, or Python on systems where Linux doesn't, such as gVisor."""
    (tmp_path / "zeros").write_text(f"7 (a ) b) S {'0 ' * 40}")
    (tmp_path / "starts.py").write_text(STARTS)
    done = subprocess.run([sys.executable, "starts.py", stat], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "{'fork': True, 'spawn': False, 'os.fork': True} False\n", done.stderr


def test_numpy_has_no_more_threads_than_torch():
    torch = pytest.importorskip("torch")
    before, numbers = torch.get_num_threads(), parallel.numba.config.NUMBA_NUM_THREADS
    try:
        for number in (1, 2, 1000):
            torch.set_num_threads(number)
            assert parallel.num_threads() == min(number, numbers)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)


def test_numpy_has_numbas_threads_without_torch(monkeypatch):
    for module in (None, object()):  # torch can't be imported, or is only partly imported so far
        monkeypatch.setitem(sys.modules, "torch", module)
        assert parallel.num_threads() == parallel.numba.get_num_threads()
