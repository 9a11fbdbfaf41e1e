"""Builds a Torch-free driver of CPU kernels: conv, step, critic, norm or threads.

python csrc/driver/build.py DRIVER OUTPUT [FLAGS...]

Without flags the driver links the extension's own objects, which are compiled where they are missing; with flags everything is
compiled anew. ISAS chooses the instruction sets to compile for: "baseline avx2", or "native" for those of this processor.

    python csrc/driver/build.py step driver -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
    CXX=aarch64-linux-gnu-g++ python csrc/driver/build.py conv driver -static && qemu-aarch64 ./driver
    ISAS="baseline avx2" python csrc/driver/build.py conv driver && ADVKD_ISA=avx2 ./driver
"""

import os
import re
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
UNITS = {
    "conv": ("conv", "cpu"),
    "step": ("step", "philox"),
    "critic": ("critic",),
    "norm": ("norm",),
    "threads": ("cpu",),
}
"""The units that a driver links, by their names in ``setup.py``."""


def main(name, output, *flags):
    compiler = SETUP["cpu_compiler"]()
    kernels = units(name, compiler)
    driver = SETUP["Unit"](f"{name}_driver", "", [f"csrc/driver/{name}_driver.cpp"], [])
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *SETUP["CPU_FLAGS"], "-Wextra"]
        objects = SETUP["cpu_objects"](kernels) if not flags else []
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            left = [driver, *(kernels if flags else ())]
            own = threads.map(lambda unit: compile_into(folder, [*command, *unit.flags, *flags], unit), left)
            objects = [*own, *objects]
        if os.environ.get("ISAS"):
            objects.append(stand_ins(f"{folder}/left_out.s", kernels, objects))
        subprocess.run([compiler, "-pthread", *flags, *objects, "-o", output], check=True)


def units(name, compiler):
    """The driver's kernels for the instruction sets in ISAS, or for all."""
    machine = run(compiler, "-dumpmachine").partition("-")[0]
    isas = os.environ.get("ISAS", "").split()
    files = [source for source in SETUP["units"]("cpu", ".cpp") if SETUP["unit_of"](source) in UNITS[name]]
    found = SETUP["cpu_units"](files, machine)
    if isas == ["native"]:
        known = run(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
        return [
            unit for unit in found if all(f"__{flag[2:].upper()}__ " in known for flag in unit.flags if flag.startswith("-m"))
        ]
    return [unit for unit in found if not isas or unit.name not in SETUP["KERNELS"] or (unit.suffix[1:] or "baseline") in isas]


def stand_ins(path, kernels, objects):
    """Assembly that defines the kernels of instruction sets that were left out, which are never called."""
    left_out = set(SETUP["LEVELS"]) - {unit.suffix for unit in kernels if unit.name in SETUP["KERNELS"]}
    spaces = [f"isa_{suffix[1:] or 'baseline'}" for suffix in left_out]
    prefix = "|".join(f"_ZN5advkd{len(space)}{space}" for space in spaces)
    names = sorted(set(re.findall(rf" U ((?:{prefix})\w+)$", run("nm", *objects), re.M))) if spaces else []
    lines = [".section .note.GNU-stack", ".data", *(f".globl {name}\n{name}:" for name in names), ".quad 0"]
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_into(folder, command, unit):
    output = f"{folder}/{unit.name}{unit.suffix}.o"
    SETUP["compile_unit"](command, unit, output)
    return output


if __name__ == "__main__":
    main(*sys.argv[1:])
