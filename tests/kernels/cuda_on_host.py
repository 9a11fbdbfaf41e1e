"""CUDA kernels without a GPU.

They are compiled for the host with ``cuda_on_host.h``, and started by the CuPy launchers through a stand-in for CuPy, the
fixture ``cupy_on_host``.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import re
import subprocess

import numpy

from advkd.ops import cuda

from ..conftest import ROOT

# Device code that g++ cannot parse, and its equivalent on the host.
HOST_CODE = {
    'asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));': "x = half_to_float(bits);",
    'asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));': "bits = float_to_half(x);",
}
ENTRY = """
extern "C" void run_on_host(void (*kernel)(advkd::STRUCT), unsigned blocks, unsigned threads, unsigned shared_bytes,
                            unsigned cluster, void** arguments) {
  const auto p = *static_cast<advkd::STRUCT*>(arguments[0]);
  on_host::run(blocks, threads, [=] { kernel(p); }, shared_bytes, cluster);
}
"""
HEADER = ROOT / "tests/kernels/cuda_on_host.h"
# A vector that is not aligned stops a GPU; here it stops the process.
ALIGNED = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
COMPILE = ("g++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", *ALIGNED)
STAND_INS = {"csrc/cuda/warp.cuh": "warp_on_host.h", "csrc/cuda/cluster.cuh": "cluster_on_host.h"}
"""Sources of instructions that only PTX has, and the file that replaces each as a whole."""


class HostModule:
    """Stand-in for ``cupy.RawModule``: compiled by the host's compiler; arguments go by value, as in CuPy."""

    libraries: dict = {}

    def __init__(self, code, options, folder):
        assert options[0] == "--std=c++17"
        # The kernels of all variants are compiled at once here, but only those asked for may be called.
        self.variant = ""
        if options[1:]:
            names = re.fullmatch(r"-DADVKD_VARIANTS\(EACH\)=EACH\((\w+(?:, \w+)*)\)", options[1])[1]
            self.variant = "_" + "_".join(names.split(", "))
        if code not in self.libraries:
            self.libraries[code] = ctypes.CDLL(str(compiled(code, folder)))
        self.library = self.libraries[code]

    def get_function(self, name):
        assert name.endswith(self.variant) or "_finish_" in name
        # A kernel's cluster size is fixed when it is compiled.
        cluster = int(match[1]) if (match := re.search(r"_cluster(\d+)_", name)) else 1

        def call(grid, block, arguments, shared_mem=0):
            assert shared_mem <= max(48 * 1024, call.max_dynamic_shared_size_bytes) <= 227 * 1024
            # CuPy's rule: an array of one element is its bytes.
            assert all(isinstance(a, numpy.ndarray) and a.size == 1 for a in arguments) and len(grid) == len(block) == 1
            pointers = (ctypes.c_void_p * len(arguments))(*(a.ctypes.data for a in arguments))
            kernel = ctypes.cast(getattr(self.library, name), ctypes.c_void_p)
            self.library.run_on_host(kernel, *grid, *block, shared_mem, cluster, pointers)

        call.max_dynamic_shared_size_bytes = 0
        return call


def compiled(code, folder):
    """The library of a device source; processes that share ``folder`` compile it once."""
    struct = re.findall(r"^struct (\w+Parameters)", code, re.M)[-1]
    for device, host in STAND_INS.items():
        code = code.replace((ROOT / device).read_text(), (ROOT / "tests/kernels" / host).read_text())
    for device, host in HOST_CODE.items():
        assert struct == "DrawParameters" or code.count(device) == 1
        code = code.replace(device, host)
    text = f'#include "{HEADER}"\n{code}{ENTRY.replace("STRUCT", struct)}'
    digest = hashlib.sha256("\n".join((HEADER.read_text(), text, *COMPILE)).encode()).hexdigest()
    stem = folder / digest[:16]
    source, library = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    with open(stem, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            source.write_text(text)
            part = stem.with_suffix(".part")
            subprocess.run([*COMPILE, str(source), "-o", str(part)], check=True, capture_output=True, text=True)
            part.rename(library)
    return library


@contextlib.contextmanager
def only_last_block(name, blocks, variant=""):
    """Within this context, the kernels of ``csrc/cuda/<name>.cu`` run only the last of ``blocks`` blocks."""
    first = ctypes.c_uint.in_dll(cuda.compiled(name, variant).library, "first_block")
    first.value = blocks - 1
    try:
        yield
    finally:
        first.value = 0


@contextlib.contextmanager
def in_order(order, name, variant=""):
    """Within this context, ``csrc/cuda/<name>.cu`` runs its warps in another order: see ``order`` in ``cuda_on_host.h``."""
    value = ctypes.c_uint.in_dll(cuda.compiled(name, variant).library, "order")
    value.value = order
    try:
        yield
    finally:
        value.value = 0
