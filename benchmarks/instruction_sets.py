"""Restricts a process, and the libraries that it loads, to an older instruction set than its processor has.

An Intel or AMD processor with AVX-512 can so stand in for one without.
"""

import os
import subprocess
import sys

INSTRUCTION_SETS = ("avx2",)
# All of these are read when the library is loaded. On AMD's processors MKL uses AVX2 anyway.
_VARIABLES = {
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}
_NEWER_FEATURES = "avx512", "avx10", "amx"  # how LLVM's names of features beyond AVX2 begin


def run_again_restricted() -> None:
    """End this process with what the same command gives restricted to AVX2, unless it is restricted already.

    Raises
    ------
    ValueError
        The processor has no AVX2.
    """
    wanted = _avx2_variables()
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | wanted, check=False).returncode)


def _avx2_variables() -> dict[str, str]:
    """Return the environment variables that restrict libraries to AVX2."""
    from llvmlite import binding  # imported here because it comes with Numba, which not all backends need

    features = binding.get_host_cpu_features()
    if not features.get("avx2"):
        raise ValueError("this processor has no AVX2")
    for name in features:
        if name.startswith(_NEWER_FEATURES):
            features[name] = False
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_max_isa" not in flags:
        flags = f"{flags} --xla_cpu_max_isa=AVX2".strip()
    return _VARIABLES | {"NUMBA_CPU_FEATURES": features.flatten(), "XLA_FLAGS": flags}
