"""Run CUDA kernels on NumPy arrays, without a device. g++ compiles them, and each launch is checked for races."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import shuffle
from types import ModuleType
from typing import Any

import array_api_compat.numpy
import numpy as np

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
GUARD = 64  # elements


class GuardedNumPy(ModuleType):
    """NumPy, except that `empty` arrays hold NaN, and have guards around them that show if a kernel writes there."""

    def __init__(self) -> None:
        super().__init__("guarded_numpy")
        self.buffers: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(array_api_compat.numpy, name)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape))
        self.buffers.append(np.full(size + 2 * GUARD, np.nan, dtype))
        return self.buffers[-1][GUARD : GUARD + size].reshape(shape)

    def check(self) -> None:
        for buffer in self.buffers:
            assert np.all(np.isnan(buffer[:GUARD]) & np.isnan(buffer[-GUARD:])), "a kernel wrote beside an array"


class CpuLauncher:
    """Launches the kernels `names` of each file in a folder of CUDA sources; processes may share the folder `build`."""

    multiprocessors = 2
    max_shared_memory = 227 * 1024

    def __init__(self, xp: GuardedNumPy, sources: Path, names: dict[str, list[str]], build: Path) -> None:
        self._xp, self._sources, self._build = xp, sources, build
        self._kernels: dict[str, Any] = {}
        self._counters = np.zeros(0, np.uint32)
        libraries = [(f"{file}.{half}", file, all_[half::2]) for file, all_ in names.items() for half in (0, 1)]
        shuffle(libraries)  # so that each of several processes compiles some, and finds the others
        with ThreadPoolExecutor(4) as pool:
            for kernels in pool.map(lambda library: self._compile(*library), libraries):
                self._kernels |= kernels

    def counters(self, count: int) -> np.ndarray:
        if count > self._counters.size:
            self._counters = np.zeros(count, np.uint32)
        return self._counters

    def __call__(
        self, file: str, name: str, thread_blocks: int, threads: int, args: tuple[Any, ...], shared: int = 0
    ) -> None:
        assert shared <= self.max_shared_memory
        kernel = self._kernels[name]
        values = [_argument(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        results = []
        for other_order in (False, True):
            error = kernel(thread_blocks, threads, other_order, pointers)
            assert not error, "some threads end while others wait for them"
            assert not self._counters.any(), f"{name} leaves counters that are not 0"
            results.append([a.tobytes() for a in args if isinstance(a, np.ndarray)])
        assert results[0] == results[1], f"{name} depends on the order of the threads or of the thread blocks"
        self._xp.check()

    def _compile(self, library_name: str, file: str, names: list[str]) -> dict[str, Any]:
        library = self._build / f"{library_name}.so"
        if not library.exists():
            exports = "\n".join(
                f'extern "C" int kernel_{i}(unsigned thread_blocks, unsigned threads, bool other_order, void** args) '
                f"{{ return emulator::launch({name}, thread_blocks, threads, other_order, args); }}"
                for i, name in enumerate(names)
            )
            unfinished = self._build / f"{library_name}.{os.getpid()}"
            source = self._build / f"{unfinished.name}.cpp"
            source.write_text(f'#include "{HERE / "cuda.h"}"\n{self._text(file)}\n{exports}\n')
            options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-extern-tls-init"]
            options += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # misaligned access is fatal
            subprocess.run([COMPILER, *options, source, "-o", unfinished], check=True)
            unfinished.replace(library)
        loaded = ctypes.CDLL(str(library))
        return {name: loaded[f"kernel_{i}"] for i, name in enumerate(names)}

    def _text(self, file: str) -> str:
        path = HERE / file if (HERE / file).exists() else self._sources / file
        return re.sub(r'^#include "(.+)"$', lambda match: self._text(match[1]), path.read_text(), flags=re.MULTILINE)


def _argument(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.names:  # a structure, by value
        return (ctypes.c_char * value.nbytes).from_buffer_copy(value)
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_longlong(value)
