"""Builds the C++ extensions against LibTorch's stable ABI: ``_cpu`` always, ``_cuda`` where nvcc is.

Environment: ``ADVKD_CPU=1`` demands the CPU object (without it a missing compiler is a warning), ``ADVKD_CUDA=1`` demands the
CUDA object, ``ADVKD_CUDA=0`` skips it, ``TORCH_CUDA_ARCH_LIST`` chooses architectures ("8.0;9.0a+PTX").
"""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI the extensions use: 2.10.
TARGET_VERSION = "0x020a000000000000"


def find_torch():
    """The folder of an installed torch, without importing it; a build environment may hide the one that pip installs into."""
    candidates = [*sys.path, *(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))]
    for folder in candidates:
        torch = Path(folder) / "torch"
        if (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file() and _is_new(torch):
            return torch
    return None


def _is_new(torch):
    """Whether it is torch 2.10 or newer (the stable ABI's version that the sources are written for)."""
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    return version is not None and (int(version[1]), int(version[2])) >= (2, 10)


TORCH = find_torch()


FOLDERS = {"cpu": ("cpu", "cpu/torch", "cuda/host"), "cuda": ("cuda", "cuda/host")}
"""Folders of ``csrc`` whose units an object is built from."""


def files(folders, suffixes):
    """Files of folders of ``csrc`` with one of these suffixes."""
    found = [path for folder in folders for path in (ROOT / "csrc" / folder).glob("*") if path.suffix in suffixes]
    return sorted(found)


def units(kind, *suffixes):
    """An object's units, as paths relative to the root, as setuptools takes them."""
    return [str(path.relative_to(ROOT)) for path in files(FOLDERS[kind], suffixes)]


def source_identity(kind):
    """SHA-1 of all that an object is built from, 40 hexadecimal digits: the build ID that its linker writes into it."""
    sha = hashlib.sha1(usedforsecurity=False)
    code = files((*FOLDERS[kind], "common"), (".cpp", ".cu", ".cuh", ".h"))
    # The host side of the CUDA kernels reads their headers.
    for path in sorted({ROOT / "setup.py", *code, *files(("cuda",), (".h",))}):
        sha.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return sha.hexdigest()


def cuda_compiler():
    """nvcc's path, or None where it is missing or ADVKD_CUDA=0."""
    wish = os.environ.get("ADVKD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"ADVKD_CUDA must be 0, 1 or unset, got {wish!r}")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if wish == "1" and nvcc is None:
        raise SystemExit("ADVKD_CUDA=1, but there is no nvcc on PATH or under CUDA_HOME")
    return None if wish == "0" else nvcc


def architecture_flags(nvcc):
    """``-gencode`` flags: TORCH_CUDA_ARCH_LIST, or sm_80, sm_90a and sm_100 where nvcc knows them, plus PTX of the newest."""
    known = set(re.findall(r"sm_(\d+a?)", subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout))
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        found = [a for a in ("8.0", "9.0a", "10.0") if a.replace(".", "") in known or a == "9.0a" and "90" in known]
        wanted = [*found[:-1], found[-1] + "+PTX"]
    flags = []
    for architecture in wanted:
        number = architecture.replace("+PTX", "").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildExtensions(build_ext):
    """g++ and nvcc by hand: two shared objects without Python symbols."""

    def run(self):
        # An object of an earlier build with other switches must not slip into this one.
        for path in Path(self.build_lib, "advkd").glob("_*.so"):
            path.unlink()
        self.failures = []
        super().run()
        # The other object is in its place by now: one that fails takes no other with it.
        if self.failures:
            raise self.failures[0]

    def build_extension(self, extension):
        kind = extension.name.rpartition("_")[2]
        try:
            if TORCH is None:
                raise RuntimeError("torch >= 2.10 is not installed where the extension is built")
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            {"cpu": self._build_cpu, "cuda": self._build_cuda}[kind](extension.sources, target)
        except Exception as error:
            if os.environ.get(f"ADVKD_{kind.upper()}") == "1":
                self.failures.append(error)
            else:
                self.warn(f"the {kind} extension was not built, the other backends remain ({error})")

    def get_outputs(self):
        # An extension that could not be built is not installed.
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):
        self.extensions = [e for e in self.extensions if Path(self.get_ext_fullpath_in_build(e)).exists()]
        super().copy_extensions_to_source()

    def get_ext_fullpath_in_build(self, extension):
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(extension.name)))

    def _build_cpu(self, files, target):
        objects = cpu_objects(list(cpu_units(files)))
        self._link([cpu_compiler(), "-shared", *map(str, objects)], target, "cpu")
        # Those of a day ago or more: another build may be about to link what is newer.
        for path in set(OBJECTS.iterdir()) - set(objects):
            if path.stat().st_mtime < time.time() - 86400:
                path.unlink(missing_ok=True)

    def _build_cuda(self, files, target):
        nvcc = cuda_compiler()
        host = ",".join(HOST_FLAGS)
        flags = [
            "-std=c++20",
            "-O3",
            "--threads=0",
            "-DUSE_CUDA",
            "-DADVKD_CUDA_OBJECT",
            f"-I{ROOT / 'csrc'}",
            *torch_flags(),
            *architecture_flags(nvcc),
            "-Xcompiler",
            host,
        ]
        # nvcc itself takes a core per architecture.
        with ThreadPoolExecutor(max(1, os.cpu_count() // 4)) as threads:
            objects = list(threads.map(lambda s: self._compile([nvcc, *flags], s, object_name(s) + ".cuda.o"), files))
        self._link([nvcc, "-shared", "-cudart=static", *objects], target, "cuda")

    def _compile(self, command, source, name):
        output = str(Path(self.build_temp) / name)
        self.spawn([*command, "-c", str(ROOT / source), "-o", output])
        return output

    def _link(self, command, target, kind):
        # torch is loaded before the extension: its libraries are found by name, none is written into the object. All are kept
        # (some linkers drop "unused" ones): CUDA symbols are found through libtorch.
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        libraries = [f"-L{TORCH / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        # Both objects hold the host code of the CUDA kernels: neither may find the other's.
        symbols = Path(self.build_temp, "symbols.map")
        symbols.parent.mkdir(parents=True, exist_ok=True)
        symbols.write_text("{ local: *; };")
        local = ["-Xlinker", f"--version-script={symbols}"]
        # The object names the sources that it is of.
        identity = ["-Xlinker", f"--build-id=0x{source_identity(kind)}"]
        self.spawn([*command, *libraries, *local, *identity, "-o", str(temporary)])
        os.replace(temporary, target)


def object_name(source):
    """``cpu.torch.philox`` for ``csrc/cpu/torch/philox.cpp``: units of several folders share their names."""
    return ".".join(Path(source).with_suffix("").parts[1:])


def torch_flags():
    return [f"-I{TORCH / 'include'}", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]


# No contraction: every instruction set gives the same bits.
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-O3", "-Wall"]
CPU_FLAGS = [*HOST_FLAGS, "-std=c++20", "-pthread", f"-I{ROOT / 'csrc'}"]


AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"]
LEVELS = {
    "": [],
    ".avx2": ["-mavx2", "-mfma"],
    ".avx512": AVX512,
    ".avx512bf16": [*AVX512, "-mavx512bf16", "-DADVKD_BFLOAT16_ALONE"],
}
AVX, BFLOAT16 = (".avx2", ".avx512"), (".avx2", ".avx512", ".avx512bf16")
KERNELS = {
    "conv": (BFLOAT16, ("conv_block", "conv_direct", "conv_dot", "conv_pack", "conv_winograd")),
    "critic": (AVX, ()),
    "norm": (AVX, ("norm_act",)),
    "philox": (AVX, ("philox",)),
    "step": (AVX, ("sampler_step",)),
}
"""Units of kernels: the levels that each is compiled for beside the baseline, and its files in ``csrc/cpu``.

``critic`` has all kernels that are not named here: those of a critic's update, and new ones.
"""


class Unit(NamedTuple):
    """Sources that are compiled as one, so that the headers they share are read once."""

    name: str
    suffix: str
    sources: list
    flags: list

    def text(self):
        """Text given to the compiler; paths are relative to ``csrc``."""
        return "".join(f'#include "{Path(source).relative_to("csrc")}"\n' for source in self.sources)


def unit_of(source):
    """The name of the unit that a source belongs to: its kernel's, or for code that knows no instruction set its folder's."""
    folder, stem = ".".join(Path(source).parts[1:-1]), Path(source).stem
    if folder != "cpu":
        return folder
    named = next((name for name, (_, stems) in KERNELS.items() if stem in stems), None)
    return named or ("critic" if "namespace advkd::ADVKD_ISA" in (ROOT / source).read_text() else folder)


def cpu_units(files, machine=None):
    """Kernels are compiled once per instruction set, everything else once.

    Baseline code first: of an inline function that several objects hold the linker keeps the first copy, which every processor
    must be able to run.
    """
    x86 = (machine or platform.machine()).lower() in ("x86_64", "amd64")
    for suffix in LEVELS if x86 else ("",):
        for name in dict.fromkeys(map(unit_of, files)):
            if suffix in ("", *KERNELS.get(name, [()])[0]):
                yield Unit(name, suffix, [source for source in files if unit_of(source) == name], _unit_flags(name, suffix))


def _unit_flags(name, suffix):
    if name in KERNELS:
        return [*LEVELS[suffix], f"-DADVKD_ISA=isa_{suffix[1:] or 'baseline'}"]
    # No loops over elements here: what -O3 does more is not worth its time.
    return ["-O2", *(torch_flags() if name == "cpu.torch" else [])]


OBJECTS = ROOT / "build" / "objects"
"""Compiled units of the CPU object, named after a digest of all that they are made of: what is there is not built anew."""


def cpu_objects(units):
    """Paths of the units' objects, in their order, compiled where they are missing."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        # Long units first, so that none is left alone at the end.
        by_length = sorted(units, key=lambda unit: sum((ROOT / s).stat().st_size for s in unit.sources), reverse=True)
        jobs = {unit[:2]: threads.submit(_cpu_object, unit) for unit in by_length}
    return [jobs[unit[:2]].result() for unit in units]


def cpu_compiler():
    return os.environ.get("CXX", "g++")


@functools.cache
def _compiler_version(compiler):
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _cpu_object(unit):
    command = [cpu_compiler(), *CPU_FLAGS, *unit.flags]
    torch = (TORCH / "version.py").read_text() if TORCH else ""
    versions = [_compiler_version(cpu_compiler()), torch]
    parts = [*versions, *command, unit.text(), *(path.read_text() for path in included(unit.text()))]
    digest = hashlib.sha1("\n".join(parts).encode(), usedforsecurity=False).hexdigest()
    path = OBJECTS / f"{unit.name}{unit.suffix}.{digest[:16]}.o"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}")
        compile_unit(command, unit, temporary)
        os.replace(temporary, path)
    return path


def compile_unit(command, unit, output):
    """Compile a unit; its text comes by the standard input, as it is nobody's file."""
    subprocess.run([*command, "-x", "c++", "-c", "-", "-o", output], input=unit.text(), text=True, check=True)


def included(text):
    """All files of ``csrc`` that a text includes, and that those do."""
    found, left = set(), {text}
    while left:
        names = {name for text in left for name in re.findall(r'^#include "(.+)"$', text, re.M)}
        new = {ROOT / "csrc" / name for name in names} - found
        found |= new
        left = {path.read_text() for path in new}
    return sorted(found)


def extensions():
    """The CPU object, and the CUDA one where there is a compiler for it."""
    found = [Extension("advkd._cpu", units("cpu", ".cpp"), py_limited_api=True)]
    if cuda_compiler():
        # A unit has all the device code that its kernels call: none needs to be linked with another's.
        found.append(Extension("advkd._cuda", units("cuda", ".cu", ".cpp"), py_limited_api=True))
    return found


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtensions},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
        # Where no torch is at hand, pip's isolated build fetches one of its own (the binary then fits any torch from 2.10 on);
        # a bare "python setup.py" says what is missing instead of fetching gigabytes.
        setup_requires=[] if TORCH or "build_ext" in sys.argv else ["torch>=2.10,<3"],
    )
