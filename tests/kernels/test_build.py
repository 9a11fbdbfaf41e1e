"""Builds of the extension and of the wheel."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest

from advkd.runtime.extension import extension_gap

from ..conftest import ROOT, process_environment
from ..system.test_install import python


@pytest.mark.core
def test_the_cpu_object_is_there():
    assert extension_gap("cpu") is None


def test_wheel_holds_everything_and_works_alone(tmp_path):
    """Built from the sources, unpacked far from them: kernels inside the package, pretrained weights, the extension."""
    ignored = shutil.ignore_patterns(".*", "build", "demo", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "sources", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    # Speed does not matter here: less optimisation compiles sooner.
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} $(echo "$@" | sed "s/-O[23]/-O1/g")\n')
    compiler.chmod(0o755)
    environment = process_environment({"ADVKD_CUDA": "0", "ADVKD_CPU": "1", "CXX": str(compiler)})
    subprocess.run(command, cwd=tmp_path / "sources", env=environment, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "cp311-abi3" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    identity = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["source_identity"]("cpu")
    assert bytes.fromhex(identity) in (tmp_path / "site/advkd/_cpu.abi3.so").read_bytes()
    # The CUDA object has the same host code: nothing of one may be found from the other.
    symbols = ["nm", "--dynamic", "--defined-only", str(tmp_path / "site/advkd/_cpu.abi3.so")]
    assert subprocess.run(symbols, capture_output=True, text=True, check=True).stdout == ""
    names = {str(p.relative_to(tmp_path / "site")) for p in (tmp_path / "site").rglob("*")}
    expected = {"advkd/py.typed", "advkd/kernels/philox.py"}
    models = [path for path in (ROOT / "advkd" / "pretrained").rglob("*") if path.suffix in (".safetensors", ".json")]
    expected |= {str(path.relative_to(ROOT)) for path in models}
    assert sum(path.stat().st_size for path in models if path.suffix == ".safetensors") <= 16e6
    # The sources that CuPy compiles, and no others.
    device = [path.name for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h")]
    sources = {f"advkd/csrc/cuda/{name}" for name in device}
    assert {n for n in names if n.startswith("advkd/csrc/c") and "." in n} == sources | {"advkd/csrc/common/philox.h"}
    assert expected <= names and not any(name.startswith(("kernels", "tests", "profiling")) for name in names)
    code = (
        "import advkd, advkd.kernels.philox, torch; from advkd.ops import registry;"
        "import importlib, pkgutil; [importlib.import_module(m.name) for m in pkgutil.walk_packages(advkd.__path__, 'advkd.')"
        " if not m.name.endswith(('__main__', '_cpu', '_cuda')) and 'csrc' not in m.name];"
        "from advkd.runtime import sources; assert sources.folder().parent.name == 'advkd', sources.folder();"
        "print(advkd.__file__, advkd.kernels.philox.__file__, registry.gap('philox', 'cpu', torch.device('cpu')),"
        "len(advkd.Student.from_pretrained('digits').sample(3)))"
    )
    environment = process_environment({"PYTHONPATH": str(tmp_path / "site")})
    package, kernel, gap, images = python(code, env=environment, cwd=tmp_path)
    assert package.startswith(str(tmp_path)) and kernel.startswith(str(tmp_path / "site" / "advkd"))
    assert (gap, images) == ("None", "3")


def test_a_missing_compiler_is_a_warning_unless_the_build_is_demanded(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l")]
    environment = {"CXX": "no-such-compiler", "ADVKD_CUDA": "0"}
    result = subprocess.run(command, cwd=ROOT, env=process_environment(environment), capture_output=True, text=True)
    assert (
        result.returncode == 0 and "the cpu extension was not built, the other backends remain" in result.stdout + result.stderr
    )
    demanded = process_environment({**environment, "ADVKD_CPU": "1"})
    assert subprocess.run(command, cwd=ROOT, env=demanded, capture_output=True, text=True).returncode != 0


def program(path, *lines):
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)
    return str(path)


def test_a_failed_cuda_build_leaves_the_cpu_object_in_place(tmp_path):
    """Compilers that touch their output stand in for g++; nvcc fails."""
    sources = tmp_path / "sources"
    ignored = shutil.ignore_patterns(".*", "build", "demo", "*.so", "*.egg-info", "__pycache__", "profiling", "tests", "docs")
    shutil.copytree(ROOT, sources, ignore=ignored)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/nvcc", '[ "$1" = --list-gpu-code ] && echo sm_90 && exit 0', "echo no such macro >&2", "exit 1")
    compiler = program(tmp_path / "compiler", 'while [ $# -gt 1 ]; do [ "$1" = -o ] && touch "$2"; shift; done')
    environment = {"CXX": compiler, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "ADVKD_CPU": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    for demanded, code in (("1", 1), ("", 0)):
        changed = process_environment({**environment, "ADVKD_CUDA": demanded})
        result = subprocess.run(command, cwd=sources, env=changed, capture_output=True, text=True)
        assert result.returncode == code, result.stderr[-2000:]
        assert {path.name for path in (sources / "advkd").glob("*.so")} == {"_cpu.abi3.so"}
        (sources / "advkd/_cpu.abi3.so").unlink()


def test_a_unit_is_compiled_anew_only_where_something_of_it_changed(tmp_path, monkeypatch):
    shutil.copy(ROOT / "setup.py", tmp_path)
    sources = tmp_path / "csrc" / "cpu"
    sources.mkdir(parents=True)
    (sources / "neighbours.h").write_text("int last;\n")
    (sources / "companions.h").write_text('#include "cpu/neighbours.h"\n')
    for name in ("companions", "neighbours"):
        (sources / f"{name}.cpp").write_text('#include "cpu/companions.h"\n')
    (sources / "norm_act.cpp").write_text("int alone;\n")
    log = tmp_path / "log"
    commands = f'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo >> {log} && cat > "$2"; shift; done'
    monkeypatch.setenv("CXX", program(tmp_path / "compiler", '[ "$1" = --version ] && exit', commands))
    setup = runpy.run_path(str(tmp_path / "setup.py"), run_name="setup")

    def objects(machine="aarch64", flags=()):
        """Paths of the units' objects, and how many were compiled."""
        log.write_text("")
        units = setup["cpu_units"](setup["units"]("cpu", ".cpp"), machine)
        paths = setup["cpu_objects"]([unit._replace(flags=[*unit.flags, *flags]) for unit in units])
        assert all(path.is_file() for path in paths)
        return paths, len(log.read_text())

    (shared, kernels), compiled = objects()
    # One unit per folder, one per family of kernels; the compiler here keeps what it is given.
    assert compiled == 2 and shared.read_text() == '#include "cpu/companions.cpp"\n#include "cpu/neighbours.cpp"\n'
    assert objects() == ([shared, kernels], 0)
    levels, compiled = objects("x86_64")
    assert levels[:2] == [shared, kernels] and len(set(levels)) == 4 and compiled == 2
    flagged, compiled = objects(flags=["-DX"])
    assert compiled == 2 and not {shared, kernels} & set(flagged)
    (sources / "neighbours.h").write_text("int other;\n")
    (changed, kept), compiled = objects()
    assert compiled == 1 and changed != shared and kept == kernels
    (sources / "norm_act.cpp").write_text("int another;\n")
    assert objects()[1] == 1
    (sources / "neighbours.cpp").unlink()
    assert objects()[1] == 1
