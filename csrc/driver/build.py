"""Builds a Torch-free driver of CPU kernels: conv, step, critic, norm or threads.

python csrc/driver/build.py DRIVER OUTPUT [FLAGS...]

Without flags the driver links the extension's own objects, which are compiled where they are missing; with flags everything is
compiled anew. ISAS chooses the instruction sets to compile for: "baseline avx2", or "native" for those of this processor.

    python csrc/driver/build.py step driver -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
    CXX=aarch64-linux-gnu-g++ python csrc/driver/build.py conv driver -static && qemu-aarch64 ./driver
    ISAS="baseline avx2" python csrc/driver/build.py conv driver && ADVKD_ISA=avx2 ./driver
"""

import os
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
KERNELS = {
    "conv": "conv_block conv_direct conv_winograd conv_dot conv_pack student_forward",
    "step": "sampler_step philox",
    "critic": "conv_bias_act_mask mask_mul penalty_reduce interpolate image_gradient",
    "norm": "norm_act",
    "threads": "companions neighbours",
}


def main(name, output, *flags):
    compiler = SETUP["cpu_compiler"]()
    kernels = units(name, compiler)
    driver = (f"csrc/driver/{name}_driver.cpp", "", [])
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *SETUP["CPU_FLAGS"], "-Wextra"]
        # Kernels of an instruction set that was left out are never called.
        link = ["-Wl,--unresolved-symbols=ignore-all"] if os.environ.get("ISAS") else []
        objects = SETUP["cpu_objects"](kernels) if not flags else []
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            left = [driver, *(kernels if flags else ())]
            own = threads.map(lambda unit: compile_into(folder, [*command, *unit[2], *flags], *unit[:2]), left)
            subprocess.run([compiler, "-pthread", *flags, *own, *objects, *link, "-o", output], check=True)


def units(name, compiler):
    """The driver's kernels for the instruction sets in ISAS, or for all."""
    machine = run(compiler, "-dumpmachine").partition("-")[0]
    isas = os.environ.get("ISAS", "").split()
    found = SETUP["cpu_units"]([f"csrc/cpu/{kernel}.cpp" for kernel in KERNELS[name].split()], machine)
    if isas == ["native"]:
        known = run(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
        return [unit for unit in found if all(f"__{flag[2:].upper()}__ " in known for flag in unit[2] if flag.startswith("-m"))]
    return [unit for unit in found if not isas or not unit[2] or (unit[1][1:] or "baseline") in isas]


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_into(folder, command, source, suffix):
    output = f"{folder}/{SETUP['object_name'](source)}{suffix}.o"
    subprocess.run([*command, "-c", ROOT / source, "-o", output], check=True)
    return output


if __name__ == "__main__":
    main(*sys.argv[1:])
