"""Runs the compiled kernels as an ARM processor would: LLVM's code for it, in Unicorn's emulation.

`python tests/arm_emulator.py` whitens NumPy's arrays that way, and fails where the plain kernels give something else.
Numba is told that the processor has no features, so that vectors have 16 bytes as ARM's have.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

os.environ |= {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}

import array_api_compat.numpy as xp
import numba
import numpy as np
import unicorn
from llvmlite import binding
from numba import types
from numba.core.ccallback import CFunc
from unicorn import arm64_const as arm

from polywhiten.blocks import ChannelGroups, SampleGroups
from polywhiten.cpu import launches
from polywhiten.cpu.device import simd
from polywhiten.cpu.implementation import CpuImplementation
from polywhiten.cpu.numpy_library import NumPyLibrary
from polywhiten.cpu.runtime.workers import Job
from polywhiten.kernels import Kernels
from polywhiten.reference import Reference
from polywhiten.solvers import solver_for
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS

TRIPLE = "aarch64-unknown-linux-gnu"
CODE, STACK, STOP = 1 << 24, 1 << 27, 1 << 20  # addresses where the process itself has nothing
STACK_BYTES, PAGE = 1 << 22, 4096
# what compiled code expects of a C library; `pow` is called for square roots only
LIBRARY = """
define ptr @memset(ptr %target, i32 %value, i64 %n) {
  %byte = trunc i32 %value to i8
  br label %test
test:
  %i = phi i64 [0, %0], [%next, %body]
  %go = icmp ult i64 %i, %n
  br i1 %go, label %body, label %end
body:
  %place = getelementptr i8, ptr %target, i64 %i
  store i8 %byte, ptr %place
  %next = add i64 %i, 1
  br label %test
end:
  ret ptr %target
}
define ptr @memcpy(ptr %target, ptr %source, i64 %n) {
  br label %test
test:
  %i = phi i64 [0, %0], [%next, %body]
  %go = icmp ult i64 %i, %n
  br i1 %go, label %body, label %end
body:
  %from = getelementptr i8, ptr %source, i64 %i
  %byte = load i8, ptr %from
  %place = getelementptr i8, ptr %target, i64 %i
  store i8 %byte, ptr %place
  %next = add i64 %i, 1
  br label %test
end:
  ret ptr %target
}
declare double @llvm.sqrt.f64(double)
define double @pow(double %x, double %half) {
  %root = call double @llvm.sqrt.f64(double %x)
  ret double %root
}
"""


def arm_code(text: str) -> bytes:
    """Return LLVM's object file for a module of the host."""
    target = binding.Target.from_triple(TRIPLE)
    machine = target.create_target_machine(cpu="cortex-a72", opt=3, reloc="static", codemodel="small")
    module = binding.parse_assembly("\n".join(line for line in text.split("\n") if not line.startswith("target ")))
    module.triple, module.data_layout = TRIPLE, str(machine.target_data)
    module.link_in(_library(machine))
    module.verify()
    return machine.emit_object(module)


def _library(machine: binding.TargetMachine) -> binding.ModuleRef:
    module = binding.parse_assembly(LIBRARY)
    module.triple, module.data_layout = TRIPLE, str(machine.target_data)
    return module


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


class _Linked(NamedTuple):
    """Code and data as they are in memory from CODE on, and the addresses of its symbols."""

    image: bytearray
    symbols: dict[str, int]


def link(code: bytes) -> _Linked:
    """Link an object file; calls of functions that it lacks end the emulation with an error."""
    (begin,), (number,) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<H", code, 60)
    sections = [_Section(*struct.unpack_from("<IIQQQQIIQQ", code, begin + 64 * i)) for i in range(number)]
    image, starts = bytearray(PAGE), {}
    for i, section in enumerate(sections):
        if section.flags & 2:  # it is in memory
            image += bytes(-len(image) % max(section.alignment, 1))
            starts[i] = CODE + len(image)
            image += bytes(section.size) if section.kind == 8 else code[section.offset : section.offset + section.size]
    image += bytes(-len(image) % 8)
    table = next(section for section in sections if section.kind == 2)
    names, symbols, places = sections[table.link].offset, {}, []
    for at in range(table.offset, table.offset + table.size, 24):
        name, _, _, index, value, _ = struct.unpack_from("<IBBHQQ", code, at)
        text = code[names + name : code.index(b"\0", names + name)].decode()
        places.append(starts.get(index, 0) + value if index in starts else 0)  # at 0 there is no memory
        symbols[text] = places[-1]
    for section in sections:
        if section.kind == 4 and section.info in starts:
            for at in range(section.offset, section.offset + section.size, 24):
                offset, info, addend = struct.unpack_from("<QQq", code, at)
                _relocate(image, starts[section.info] + offset, info & 0xFFFFFFFF, places[info >> 32] + addend)
    return _Linked(image, symbols)


def _relocate(image: bytearray, place: int, kind: int, value: int) -> None:
    """Write an address, or the part of it that an instruction has."""
    at = place - CODE
    if kind == 257:  # ABS64
        struct.pack_into("<Q", image, at, value)
        return
    if kind == 261:  # PREL32, in tables that nothing reads here
        return
    (word,) = struct.unpack_from("<I", image, at)
    if kind in (311, 312):  # an entry of the global offset table, made here
        if kind == 311:
            image += struct.pack("<Q", value)
        entry = CODE + len(image) - 8
        kind, value = (275, entry) if kind == 311 else (286, entry)
    if kind in (282, 283):  # JUMP26, CALL26
        word |= (value - place >> 2) & 0x3FFFFFF
    elif kind == 275:  # ADR_PREL_PG_HI21
        pages = (value >> 12) - (place >> 12)
        word |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    else:  # the last 12 bits, for an addition or for loads of 1 to 16 bytes
        shift = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}[kind]
        word |= ((value & 0xFFF) >> shift) << 10
    struct.pack_into("<I", image, at, word)


class Emulator:
    """A kernel for a dtype, on an emulated processor that has this process' memory."""

    def __init__(self, kernel: Callable[..., None], dtype: str) -> None:
        pointers = types.CPointer(types.int64), types.CPointer(numba.from_dtype(np.dtype(dtype)))
        arguments = *pointers, types.int64, types.int64
        callback = CFunc(kernel, (arguments, types.void), locals={}, options={"error_model": "numpy"})
        callback.compile()
        linked = link(arm_code(callback._library.get_llvm_str()))
        self._begin, self._machine = linked.symbols[callback.native_name], unicorn.Uc(unicorn.UC_ARCH_ARM64, 0)
        self._machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # allow vectors
        self._machine.mem_map(CODE, -(-len(linked.image) // PAGE) * PAGE)
        self._machine.mem_write(CODE, bytes(linked.image))
        self._machine.mem_map(STACK, STACK_BYTES)
        self._machine.mem_map(STOP, PAGE)
        self._machine.hook_add(unicorn.UC_HOOK_MEM_READ_UNMAPPED | unicorn.UC_HOOK_MEM_WRITE_UNMAPPED, _share_page)

    def call(self, *arguments: int) -> None:
        for i, value in enumerate(arguments):
            self._machine.reg_write(arm.UC_ARM64_REG_X0 + i, value)
        self._machine.reg_write(arm.UC_ARM64_REG_SP, STACK + STACK_BYTES - PAGE)
        self._machine.reg_write(arm.UC_ARM64_REG_LR, STOP)
        self._machine.emu_start(self._begin, STOP)


def _share_page(machine: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
    """Give the emulated processor a page of this process' memory."""
    page = address // PAGE * PAGE
    assert page > 1 << 28, f"the kernel reads or writes at {address:#x}"
    machine.mem_map_ptr(page, PAGE, unicorn.UC_PROT_ALL, page)
    return True


_EMULATORS: list[Emulator] = []


@cache
def emulator_index(kernel: Callable[..., None], dtype: str) -> int:
    """Return what stands for the kernel's address in a job."""
    _EMULATORS.append(Emulator(kernel, dtype))
    return len(_EMULATORS) - 1


def run(data: array[int], num_workers: int, waits: bool) -> None:
    """Run a job as `polywhiten.cpu.runtime.parallel.run` does, one part after another."""
    job, address = Job(*data[: len(Job._fields)]), data.buffer_info()[0]
    order = [(launch, part) for launch in range(job.end_launch) for part in range(job.num_parts)]
    for launch, part in order if waits else sorted(order, key=lambda pair: pair[1]):
        kernel, args = data[len(job) + 2 * launch :][:2]
        workspace = job.workspace + (part if waits else 0) * job.workspace_stride
        _EMULATORS[kernel].call(address + 8 * args, workspace, part, job.num_parts)


def check(spec: WhiteningSpec, x: np.ndarray, dy: np.ndarray) -> None:
    """Compare both passes with those of the plain kernels in float64."""
    weight, bias = np.random.default_rng(2).normal(size=(2, x.shape[1])).astype(x.dtype)
    plain = Kernels(xp)
    emulated, reference = CpuImplementation.over(NumPyLibrary(), plain), Reference(plain)
    y, stats = emulated.forward(spec, x, weight, bias)
    exact = [a.astype("float64") for a in (x, weight, bias, dy)]
    wanted, expected = reference.forward(spec, *exact[:3])
    found = [y, *stats, *emulated.backward(spec, x, weight, bias, NO_STATISTICS, dy)]
    for a, b in zip(found, [wanted, *expected, *reference.backward(spec, *exact[:3], expected, exact[3])], strict=True):
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < {"float32": 2e-5, "float64": 1e-12}[str(x.dtype)], (spec, x.shape, error)


def main() -> None:
    assert simd.VECTOR_BYTES == 16
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    launches.kernel_address, launches.run = emulator_index, run
    newton, random = solver_for("newton", 5), np.random.default_rng(0)
    for dtype in ("float32", "float64"):
        x, dy = random.normal(size=(2, 5, 40, 6, 7)).astype(dtype)
        for order in ((0, 1, 2, 3), (0, 2, 3, 1)):  # channels first and last
            arrays = [np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order)) for a in (x + 3, dy)]
            for blocks in (ChannelGroups(1, 20), SampleGroups(1, 4)):
                check(WhiteningSpec(blocks, newton, 1e-3), *arrays)
        print(dtype, "is right: kernels", len(_EMULATORS))


if __name__ == "__main__":
    main()
