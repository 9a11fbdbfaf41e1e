"""GPU code compiled on a machine without a GPU: Triton for three architectures, CUDA by nvcc and by NVRTC."""

import ctypes
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from advkd.ops import cuda

from ..conftest import ROOT, process_environment

# Runs in a process of its own: Triton's compiler and its interpreter exclude each other. Pointers and sizes are aligned as
# usual tensors are; a tensor that a variant lacks is a constant None.
COMPILE = """
import json, re, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from advkd.kernels import philox, sampler_step as step

TYPES = {"table": "*fp32", "indices": "*i64", "steps": "*i64", "flags": "*i32", "key": "i64"}
def compile(kernel, constants, **types):
    types = {**{name: "i32" for name in kernel.arg_names}, **TYPES, **types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature)
               if signature[name] != "constexpr" and name not in kernel.do_not_specialize}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"enable_fp_fusion": False} if "table" in signature else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    ptx = compiled.asm["ptx"]
    wide = [len(re.findall(way + r"\\.global\\S*\\.v4\\.b32", ptx)) for way in ("ld", "st")]
    print("KERNEL " + json.dumps([len(compiled.asm["cubin"]), compiled.metadata.shared, *wide]))

def step_kernel(kernel, element, absent, **constants):
    tensors = dict.fromkeys(("x", "m", "previous_x0", "history", "noise", "out", "x0", "pooled"), "*" + element)
    extended = "history" not in absent
    compile(kernel, {**constants, "EXTENDED": extended, **dict.fromkeys(absent)}, **tensors)

compile(philox.words_kernel, {"BLOCK": philox.BLOCK}, out="*i64", stream_step="i32", count="i64", tiles="i64")
compile(philox.normal_kernel, {"BLOCK": philox.BLOCK}, out="*fp32", stream_step="i32", count="i64", tiles="i64")
flat = {"CHANNELS_LAST": False, "INDEX": tl.int32, "BLOCK": step.BLOCK}
plain = ("previous_x0", "history", "noise", "indices", "steps", "x0", "flags")
step_kernel(step.flat_kernel, "fp32", plain, **flat)
step_kernel(step.flat_kernel, "fp32", ("history", "noise"), **flat)
step_kernel(step.flat_kernel, "bf16", ("history", "noise", "steps"), **flat)
step_kernel(step.flat_kernel, "fp32", ("indices", "steps"), **flat)
step_kernel(step.flat_kernel, "bf16", ("noise", "steps"), **flat)
step_kernel(step.flat_kernel, "fp32", ("history", "noise", "steps"), **{**flat, "CHANNELS_LAST": True, "INDEX": tl.int64})
pool = {"POOL": 4, **step.pool_tile(256, 4), "CHANNELS_LAST": False}
step_kernel(step.pool_kernel, "fp32", plain, **pool)
step_kernel(step.pool_kernel, "fp32", ("history", "noise", "steps"), **pool)
step_kernel(step.pool_kernel, "fp32", ("noise", "steps"), **pool)
pool = {"POOL": 3, **step.pool_tile(255, 3), "CHANNELS_LAST": True}
step_kernel(step.pool_kernel, "fp16", ("history", "noise", "previous_x0"), **pool)
"""
# 16-byte loads and stores per kernel: BLOCK * 4 elements on 128 threads are two vectors of four per tensor in float32,
# one of eight in bfloat16; words and normals, and strided and odd variants, promise none.
WIDE = [None, None, (4, 2), (6, 4), (3, 2), (10, 4), (4, 2), None, (4, 2), (6, 4), (8, 4), None]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_triton_kernels_compile(architecture, tmp_path):
    environment = process_environment({"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DUMP_PTXAS_LOG": "1"})
    result = subprocess.run([sys.executable, "-c", COMPILE, str(architecture)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in re.findall(r"^KERNEL (.*)$", result.stdout, re.M)]
    assert len(kernels) == len(WIDE)
    for (size, shared, *wide), expected in zip(kernels, WIDE):
        assert size > 1000 and shared <= 160 * 1024
        assert expected is None or (wide[0] >= expected[0] and wide[1] >= expected[1]), (wide, expected)
    log = result.stdout + result.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    assert len(spills) == 2 * len(kernels) and sum(spills) == 0
    assert all(int(n) <= 128 for n in re.findall(r"Used (\d+) registers", log))


def cuda_kernels(source, folder, architecture):
    """Bytes spilled, registers and PTX for each entry point of a CUDA source; compiled once."""
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        f"-arch={architecture}",
        "-Xptxas",
        "-v",
        f"-I{ROOT / 'csrc'}",
        "--keep",
        "--keep-dir",
        ".",
    ]
    command += ["-cubin", str(ROOT / "csrc/cuda" / source), "-o", "kernels.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stderr
    ptx = next(Path(folder).glob("*.ptx")).read_text()
    for part in report.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        body = re.search(rf"\.entry {name}\(.*?^}}", ptx, re.S | re.M)[0]
        yield (
            name,
            sum(map(int, re.findall(r"(\d+) bytes spill", part))),
            int(re.search(r"Used (\d+) registers", part)[1]),
            body,
        )


def known_to_nvcc(architecture):
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if architecture.rstrip("a") not in known:
        pytest.skip(f"this nvcc does not know {architecture}")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_nvcc_spills_nothing(architecture, tmp_path):
    known_to_nvcc(architecture)
    kernels = {name: rest for name, *rest in cuda_kernels("philox.cu", tmp_path, architecture)}
    assert sorted(kernels) == ["advkd_philox_normal", "advkd_philox_words"]
    assert all(spilled == 0 and registers <= 64 for spilled, registers, _ in kernels.values())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_nvcc_sampler_step(architecture, tmp_path):
    """Nothing spills, and four blocks of 256 threads (pooled: three) fit on a multiprocessor; of extended steps one less.

    Aligned tensors are read and written in vectors; without a pooled copy nothing is divided.
    """
    known_to_nvcc(architecture)
    kernels = list(cuda_kernels("sampler_step.cu", tmp_path, architecture))
    dtypes = ("f32", "bf16", "f16")
    names = itertools.product(("flat", "pool"), ("tensor", "draw"), dtypes, dtypes, ("plain", "extended"))
    assert sorted(name for name, *_ in kernels) == sorted("advkd_step_" + "_".join(name) for name in names)
    for name, spilled, registers, ptx in kernels:
        flat, draw, extended = "flat" in name, "draw" in name, "extended" in name
        most = (80 if extended else 64) if flat else (128 if extended else 80)
        assert spilled == 0 and registers <= most and ".local" not in ptx, name
        assert not flat or not re.search(r"\b(div|rem)\.", ptx), name
        loads, stores = (len(re.findall(way + r"\.global\S*\.v4\.", ptx)) for way in ("ld", "st"))
        # x, m, previous_x0, history of extended steps and, as a tensor, noise; the next state and what is stored. The flat
        # kernel of plain steps has two of each, except for draws.
        times = 3 if flat and not draw and not extended else 1
        assert loads >= times * (3 + extended + (not draw)) and stores == times * 2, name


# Entry points of the training ops' sources, and the 16-byte loads and stores of one in 16-bit storage.
TRAINING = {
    "conv_bias_act_mask": {"conv_bias_act_mask": (2, 1)},
    "mask_mul": {"mask_mul": (1, 1)},
    "interpolate": {"interpolate": (2, 3)},
    "penalty_reduce": {"penalty_sums": (1, 0), "penalty_apply": (1, 1)},
    "norm_act": {
        **{f"norm_moments_{layout}": (1, 0) for layout in ("planes", "last")},
        # Single pixels and groups of four; where channels are neighbours, their constants as vectors too.
        "norm_act_planes": (1, 5),
        "norm_act_last": (1 + 8, 5),
        "norm_sums_planes": (1 + 5, 1),
        "norm_sums_last": (1 + 5 + 8, 1),
        "norm_backward_planes": (1 + 5, 1),
        "norm_backward_last": (1 + 5 + 12, 1),
    },
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("source", TRAINING)
def test_nvcc_training_ops(source, architecture, tmp_path):
    """Nothing spills, three blocks of 256 threads fit on a multiprocessor, aligned tensors are read and written in vectors."""
    known_to_nvcc(architecture)
    kernels = {name: rest for name, *rest in cuda_kernels(f"{source}.cu", tmp_path, architecture)}
    assert all(spilled == 0 and registers <= 80 and ".local" not in ptx for spilled, registers, ptx in kernels.values())
    for name, expected in TRAINING[source].items():
        for dtype in ("f32", "bf16", "f16"):
            *_, ptx = kernels.pop(f"advkd_{name}_{dtype}")
            wide = [len(re.findall(way + r"\.global\S*\.v4\.", ptx)) for way in ("ld", "st")]
            # float32 has a channel's constants in fewer vectors, and elements in more.
            loads = 1 if dtype == "f32" else expected[0]
            assert wide[0] >= loads and wide[1] >= expected[1], (name, dtype, wide)
    assert sorted(kernels) == (["advkd_norm_finish_moments", "advkd_norm_finish_sums"] if source == "norm_act" else [])


def nvrtc_library():
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations) if spec else []
    return next((path for folder in folders for path in Path(folder).rglob("libnvrtc.so.*")), None)


DEVICE_SOURCES = sorted(p.name for p in (ROOT / "csrc/cuda").glob("*.cu"))


@pytest.mark.parametrize("source", DEVICE_SOURCES)
def test_every_kernel_is_in_the_object_s_list(source):
    """The CUDA object finds its kernels by name."""
    command = ["g++", "-E", "-P", "-DADVKD_CUDA_OBJECT", "-x", "c++", f"-I{ROOT / 'csrc'}", ROOT / "csrc/cuda" / source]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kernels = re.findall(r"\b(advkd_\w+)\([^()]*\bp\w*\) \{", text)
    assert kernels == re.findall(r"\bkernel_(\w+)\(", text) and len(set(kernels)) == len(kernels) > 0


@pytest.mark.parametrize("source", DEVICE_SOURCES)
def test_nvrtc_compiles_every_device_source(source):
    """The device sources need neither Torch nor the standard library: CuPy compiles them as they are."""
    path = nvrtc_library()
    if path is None:
        pytest.skip("NVRTC is not installed (the test extra brings it)")
    nvrtc = ctypes.CDLL(str(path))
    program = ctypes.c_void_p()
    text = cuda.source(source.removesuffix(".cu")).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), 0, None, None) == 0
    # Options that the launchers pass, and those that CuPy adds.
    variant = "bf16, f32, extended" if source == "sampler_step.cu" else "bf16"
    options = [
        *cuda.OPTIONS,
        f"-DADVKD_VARIANTS(EACH)=EACH({variant})",
        "-ftz=true",
        "--device-as-default-execution-space",
        "-arch=sm_80",
    ]
    options = [option.encode() for option in options]
    code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert code == 0, log.value.decode()
