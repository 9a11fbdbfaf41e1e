"""Compilers' figures of the GPU kernels, on a machine without a GPU.

python -m profiling.limits.ahead [--out FOLDER]

Every CUDA source is compiled by nvcc and every configuration of the convolutions' Triton kernels by Triton, for each
architecture; of each kernel the registers, local memory, shared memory, tensor-core instructions and resident blocks are kept,
and of each preset's plan which kernel takes which layer, its bytes and operations, and the prediction (gpu_predictions.py).
Needs nvcc and Triton, whose package brings the disassembler. ``--architectures sm_90a`` and ``--only conv`` take less time.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from advkd.ops.conv_layer import output_sides
from advkd.ops.gpu_storage import input_channels, padded
from advkd.ops.student_steps import cuda_launch, pack_gpu
from advkd.runtime.extension import extension_gap
from advkd.runtime.files import write_json
from advkd.runtime.timing import provenance

from ..evidence import RESULTS, ROOT, Family, environment, families, gpu_digests
from . import predictions

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
FOLDER = RESULTS / "ahead-of-time"

REGISTERS, ROUNDED, PER_WARP = 65536, 256, 32
"""Registers of a multiprocessor, of which a warp takes a multiple, and threads of a warp."""
RESIDENT = {
    80: (2048, 32, 164),
    86: (1536, 16, 100),
    89: (1536, 24, 100),
    90: (2048, 32, 228),
    100: (2048, 32, 228),
    120: (1536, 24, 100),
}
"""Per multiprocessor: threads, blocks, KB of shared memory (CUDA C++ programming guide, technical specifications)."""
RESERVED = 1024
"""Bytes of shared memory that the system takes of each block."""

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "f32": torch.float32}
"""How products store their factors."""

TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")
"""Tensor-core instructions: of a warp, of a group of four, and those of sm_100."""


def resident_blocks(architecture, registers, threads, shared):
    """Number of blocks that a multiprocessor holds at a time; None for an architecture that is not in :data:`RESIDENT`.

    Args:
        registers: per thread.
        shared: bytes per block.
    """
    limits = RESIDENT.get(int(re.sub(r"\D", "", architecture)))
    if limits is None:
        return None
    most_threads, most, kilobytes = limits
    warps = -(-threads // PER_WARP)
    of_warp = -(-registers * PER_WARP // ROUNDED) * ROUNDED
    # A warp's registers lie in one of four parts of the file.
    by_registers = 4 * (REGISTERS // 4 // of_warp) // warps
    by_shared = kilobytes * 1024 // (-(-shared // 128) * 128 + RESERVED)
    return min(most, most_threads // threads, by_registers, by_shared)


def tool(name):
    """A disassembler: on PATH, or the one that Triton's package has."""
    if found := shutil.which(name):
        return found
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        raise SystemExit(f"profiling.limits.ahead: there is no {name}, neither on PATH nor in Triton's package")
    return str(path)


def kernels_of(cubin):
    """``[{entry, registers, stack, local, shared, threads, instructions, ...}, ...]`` of a compiled file."""
    shown = subprocess.run(
        [tool("cuobjdump"), "-res-usage", "-elf", "-sass", cubin], capture_output=True, text=True, check=True
    )
    return read_kernels(shown.stdout)


def read_kernels(text):
    """The same from what cuobjdump prints."""
    usage = re.findall(r"^ *Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text, re.M)
    threads = {}
    for part in re.split(r"^\.nv\.info\.", text, flags=re.M)[1:]:
        limit = re.match(
            r"(\S+)\n(?:.*\n)*?\s*Attribute:\s+EIATTR_(?:MAX_THREADS|REQNTID).*\n.*\n\s*Value:\s+0x([0-9a-f]+)", part
        )
        if limit:
            threads[limit[1]] = int(limit[2], 16)
    code = {part.split("\n", 1)[0].strip(): part for part in re.split(r"^\s*Function :", text, flags=re.M)[1:]}
    found = []
    for name, registers, stack, shared, local in usage:
        words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code.get(name, ""))
        found.append(
            {
                "entry": name,
                "registers": int(registers),
                "stack": int(stack),
                "local": int(local),
                "shared": int(shared),
                "threads": threads.get(name),
                "instructions": len(words),
                "local_accesses": sum(word in ("LDL", "STL") for word in words),
                "tensor": {kind: words.count(kind) for kind in TENSOR if kind in words},
            }
        )
    return sorted(found, key=lambda kernel: kernel["entry"])


def compile_cuda(family, architecture):
    """The entry points of one source for one architecture."""
    number = architecture.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/kernels.cubin"
        command = ["nvcc", "-std=c++20", "-O3", f"-gencode=arch=compute_{number},code=sm_{number}", f"-I{ROOT / 'csrc'}"]
        subprocess.run(
            [*command, "-cubin", str(ROOT / family.source), "-o", target], check=True, capture_output=True, text=True
        )
        kernels = kernels_of(target)
    for kernel in kernels:
        # The system's share is counted apart; the part that a plan asks for at the launch is not in the file (see the plans).
        kernel["shared"] = max(0, kernel["shared"] - RESERVED)
        kernel["blocks"] = resident_blocks(architecture, kernel["registers"], kernel["threads"] or 256, kernel["shared"])
    return kernels


# Runs in a process of its own: Triton's compiler and its interpreter exclude each other. Arguments are aligned as usual tensors
# are, channels whole units.
COMPILE_TRITON = """
import json, sys, tempfile
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from advkd.kernels import conv_block as kernels, conv_tiles
from profiling.limits.ahead import kernels_of

capability = int(sys.argv[1])

def compiled(kernel, element, constants, warps, stages, **boxes):
    tensors = {"x": "*" + element, "weights": "*" + element, "bias": "*fp32", "out": "*" + element, **boxes}
    types = {**{name: "i32" for name in kernel.arg_names}, **tensors, "slope": "fp32", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature)
               if signature[name].startswith("*") or name == "pitch"}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        (found,) = kernels_of(file.name)
    return {**found, "shared": done.metadata.shared, "threads": 32 * warps}

def show(name, config, element, precision, found):
    said = {"entry": name, "config": str(config), "dtype": element, "precision": precision}
    print("KERNEL " + json.dumps({**found, **said}), flush=True)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
for element, precision in (("bf16", "tf32"), ("fp32", "tf32"), ("fp32", "tf32x3"), ("fp32", "ieee")):
    table = conv_tiles.table(DTYPES[element], precision, 128)
    common = {"PRECISION": precision, "UPCAST": False, "ACTIVATION": 1}
    for config in table:
        for upsample in (False, True):
            c_in, c_out = 128, max(config.columns, 16)
            # Float32 weights for tensor cores have the summed index fastest in memory.
            swapped = element == "fp32" and precision != "ieee"
            steps = {"IN_STEP": 1, "OUT_STEP": c_in} if swapped else {"IN_STEP": c_out, "OUT_STEP": 1}
            blocks = {"BLOCK_M": config.pixels, "BLOCK_N": config.columns, "BLOCK_K": config.inner}
            constants = {**common, **steps, **blocks, "C_IN": c_in, "C_OUT": c_out, "UPSAMPLE": upsample}
            found = compiled(kernels.conv_kernel, element, constants, config.warps, config.stages)
            show("conv_kernel, phases" if upsample else "conv_kernel", config, element, precision, found)
    for config in conv_tiles.image_table(DTYPES[element], precision, 128):
        swapped = element == "fp32" and precision != "ieee"
        steps = {"IN_STEP": 1, "OUT_STEP": 128} if swapped else {"IN_STEP": 16, "OUT_STEP": 1}
        tile = {"ROWS": config.rows, "COLUMNS": config.columns, "BLOCK_N": 16, "BLOCK_K": config.inner}
        constants = {**common, **steps, **tile, "ACTIVATION": 2, "C_IN": 128, "C_OUT": 16, "CHANNELS": 3}
        show("image_kernel", config, element, precision, compiled(kernels.image_kernel, element, constants, config.warps, 1))

here = not conv_tiles.descriptor_gap(torch.bfloat16, divmod(capability, 10))
for config in conv_tiles.descriptor_table(128) if here else ():
    for upsample in (False, True):
        boxes = {"x": (1, config.rows, config.columns, config.inner), "weights": (1, config.inner, config.channels)}
        boxes = {name: f"tensordesc<bf16[{','.join(map(str, box))}]>" for name, box in boxes.items()}
        tile = {"ROWS": config.rows, "COLUMNS": config.columns, "BLOCK_N": config.channels, "BLOCK_K": config.inner}
        constants = {"C_IN": 128, "C_OUT": config.channels, "UPSAMPLE": upsample, "ACTIVATION": 1, "UPCAST": False, **tile}
        found = compiled(kernels.descriptor_kernel, "bf16", constants, config.warps, config.stages, **boxes)
        show("descriptor_kernel, phases" if upsample else "descriptor_kernel", config, "bf16", "tf32", found)
"""


def compile_triton(architecture):
    """Every configuration of the convolutions' Triton kernels for one architecture that it has, on 128 channels."""
    number = re.sub(r"\D", "", architecture)
    with tempfile.TemporaryDirectory() as folder:
        changed = environment(TRITON_CACHE_DIR=folder)
        changed.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-c", COMPILE_TRITON, number]
        done = subprocess.run(command, capture_output=True, text=True, env=changed, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"profiling.limits.ahead: Triton does not compile for {architecture}:\n{done.stderr[-2000:]}")
    kernels = [json.loads(line) for line in re.findall(r"^KERNEL (.*)$", done.stdout, re.M)]
    for kernel in kernels:
        kernel["blocks"] = resident_blocks(architecture, kernel["registers"], kernel["threads"], kernel["shared"])
    return kernels


def known_architectures(wanted):
    """Those of ``wanted`` that this nvcc knows."""
    listed = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in wanted if name in listed or name.rstrip("a") in listed]


def entry_of(step, layers, product, batch, limits):
    """The CUDA entry point of a step and the shared memory that its plan asks for: ``{"entry", "shared", "grid"}``."""
    last, dtype, empty = layers[step.first + step.count - 1], DTYPES[product], torch.empty
    with torch.device("meta"):
        x = empty(batch, layers[step.first].height, layers[step.first].width, input_channels(layers[step.first]), dtype=dtype)
        sides = output_sides(last)
        shape = (last.c_out, *sides) if step.first + step.count == len(layers) else (*sides, padded(last.c_out))
        out = empty(batch, *shape, dtype=dtype)
        packed, biases = [None] * len(layers), [None] * len(layers)
        for i in range(step.first, step.first + step.count):
            weight, bias = empty(layers[i].c_out, layers[i].c_in, 3, 3), empty(layers[i].c_out)
            form = step.form(i, len(layers) - 1)
            packed[i], biases[i] = pack_gpu(weight, bias, layers[i], dtype, form, product)
    name, arguments = cuda_launch(step, layers, x, packed, biases, out, 0.2, product)
    if reason := extension_gap("cpu"):
        raise RuntimeError(f"the CPU extension plans the launches: {reason}")
    device = [limits.multiprocessors, limits.shared, limits.capability[0]]
    _, names, numbers = getattr(torch.ops.advkd_cpu, f"cuda_{name}")(*arguments, device=device)
    return {"entry": names[2], "shared": numbers[4], "grid": numbers[2]}


def planned_layers(compiled, device=predictions.H200):
    """Predicted plans of every preset, batch and dtype, with each launch's entry point and what was compiled of it."""
    kernels = {kernel["entry"]: kernel for kernel in compiled}
    found = []
    for name, prediction in predictions.read_predictions().items():
        if prediction["dtype"] not in ("bfloat16", "float32"):
            continue
        preset, product = prediction["preset"], predictions.PRODUCTS[prediction["dtype"]]
        layers = predictions.convolutions(predictions.PRESETS[preset])
        for row, step in zip(prediction["steps"], predictions.stored_steps(prediction)):
            launch = entry_of(step, layers, product, prediction["batch"], device.limits)
            kernel = kernels.get(launch["entry"])
            if kernel:
                shape = (kernel["registers"], kernel["threads"] or 256, launch["shared"])
                launch |= {"registers": kernel["registers"], "blocks": resident_blocks(device.architecture, *shape)}
            own = [predictions.layer_name(layer) for layer in layers[step.first : step.first + step.count]]
            place = {"case": name, "preset": preset, "batch": prediction["batch"], "dtype": prediction["dtype"], "layers": own}
            found.append({**place, **row, **launch})
    return found


def compile_all(architectures, only, workers):
    """``{architecture: {"cuda": {source: kernels}, "triton": kernels}}``."""
    chosen = [family for family in families() if only in family.name]
    cuda = [family for family in chosen if family.kind == "cuda"]
    jobs = [(family, name) for name in architectures for family in cuda]
    with ThreadPoolExecutor(workers) as pool:
        compiled = list(pool.map(lambda job: _announced(*job), jobs))
    found = {name: {"cuda": {}, "triton": []} for name in architectures}
    for (family, name), kernels in zip(jobs, compiled):
        found[name]["cuda"][family.name] = kernels
    if Family("triton", "conv_block") in chosen:
        with ThreadPoolExecutor(workers) as pool:
            for name, kernels in zip(architectures, pool.map(compile_triton, architectures)):
                found[name]["triton"] = kernels
    return found


def _announced(family, architecture):
    try:
        kernels = compile_cuda(family, architecture)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"profiling.limits.ahead: {family.source} does not compile for {architecture}:\n{error.stderr[-2000:]}"
        ) from None
    print(f"{family.source} for {architecture}: {len(kernels)} entry points", flush=True)
    return kernels


def versions():
    """Versions of the two compilers."""
    import triton

    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return {"nvcc": re.search(r"V([\d.]+)", text)[1], "triton": triton.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--only", default="", help="sources whose name holds this text")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("profiling.limits.ahead: there is no nvcc on PATH")
    wanted = options.architectures.split(",")
    architectures = known_architectures(wanted)
    compiled = compile_all(architectures, options.only, options.workers)
    main_architecture = predictions.H200.architecture if predictions.H200.architecture in compiled else architectures[0]
    entries = [kernel for kernels in compiled[main_architecture]["cuda"].values() for kernel in kernels]
    result = {
        "compiled": compiled,
        "unknown_to_nvcc": sorted(set(wanted) - set(architectures)),
        "plans": planned_layers(entries) if not options.only else [],
        "assumptions": predictions.assumptions(),
        "kernels": gpu_digests(),
        "versions": versions(),
        "provenance": provenance(),
    }
    write_json(options.out / "ahead.json", result)
    spilled = [
        k["entry"] for a in compiled.values() for k in (*sum(a["cuda"].values(), []), *a["triton"]) if k["local_accesses"]
    ]
    print(f"{options.out / 'ahead.json'}: {len(entries)} entry points; with local memory: {len(spilled)}", flush=True)


if __name__ == "__main__":
    main()
