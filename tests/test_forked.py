"""Processes that were forked before polywhiten was imported, as the workers of PyTorch's DataLoader may be."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes aren't forked here")

WORKER = """
import numpy as np
import torch
from torch.utils.data import DataLoader

torch.set_num_threads(2)
(torch.ones(600, 600) @ torch.ones(600, 600)).sum()  # by threads that no forked process has


class Rows:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        import polywhiten as pw
        from polywhiten.compiled import parallel

        x = np.random.default_rng(0).normal(size=(4000, 64))
        if {set_threads}:
            torch.set_num_threads(2)
        y = pw.iter_norm(x)
        return parallel.threads(), np.abs(y).max()


(threads, largest), = DataLoader(Rows(), batch_size=None, num_workers=1, multiprocessing_context="fork")
print(threads, bool(1 < largest < 100))
"""


@pytest.mark.parametrize("set_threads", [False, True], ids=["one thread, as PyTorch says", "PyTorch has more threads"])
def test_a_process_forked_before_the_import_whitens(set_threads):
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-P", "-c", WORKER.replace("{set_threads}", str(set_threads))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "True"]


def test_numpy_has_no_more_threads_than_pytorch():
    from polywhiten.compiled import parallel

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert parallel.threads() == 1
    finally:
        torch.set_num_threads(before)
