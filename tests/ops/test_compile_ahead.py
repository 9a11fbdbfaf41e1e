"""GPU code compiled on a machine without a GPU: Triton for three architectures, CUDA by nvcc and by NVRTC."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import ROOT, process_environment

# Runs in a process of its own: Triton's compiler and its interpreter exclude each other.
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from advkd.kernels import philox
kernel, element = (philox.words_kernel, "*i64") if sys.argv[1] == "words" else (philox.normal_kernel, "*fp32")
types = {"indices": "*i64", "out": element, "key": "i64", "stream_step": "i32", "count": "i64", "tiles": "i64"}
source = ASTSource(kernel, {**types, "BLOCK": "constexpr"}, {"BLOCK": philox.BLOCK})
compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[2]), 32))
print(len(compiled.asm["cubin"]), compiled.metadata.shared)
"""


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["words", "normal"])
def test_triton_kernels_compile(kernel, architecture, tmp_path):
    environment = process_environment({"TRITON_CACHE_DIR": str(tmp_path)})
    command = [sys.executable, "-c", COMPILE, kernel, str(architecture)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    size, shared = map(int, result.stdout.split())
    assert size > 1000 and shared <= 160 * 1024


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_nvcc_spills_nothing(architecture, tmp_path):
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if architecture.rstrip("a") not in known:
        pytest.skip(f"this nvcc does not know {architecture}")
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += ["-cubin", str(ROOT / "csrc/cuda/philox.cu"), "-o", str(tmp_path / "philox.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    assert sorted(kernels) == ["advkd_philox_normal", "advkd_philox_words"]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert len(spills) == 2 * len(kernels) and sum(spills) == 0
    assert all(int(n) <= 64 for n in re.findall(r"Used (\d+) registers", report))


def nvrtc_library():
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations) if spec else []
    return next((path for folder in folders for path in Path(folder).rglob("libnvrtc.so.*")), None)


@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc/cuda").glob("*.cu") if p.name != "register.cu"))
def test_nvrtc_compiles_every_device_source(source):
    """The device sources need neither Torch nor the standard library, so that CuPy can compile them."""
    path = nvrtc_library()
    if path is None:
        pytest.skip("NVRTC is not installed (the test extra brings it)")
    nvrtc = ctypes.CDLL(str(path))
    program = ctypes.c_void_p()
    text = (ROOT / "csrc/cuda" / source).read_bytes()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), 0, None, None) == 0
    options = [b"--gpu-architecture=compute_80", b"--std=c++17", f"-I{ROOT / 'csrc'}".encode()]
    code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert code == 0, log.value.decode()
