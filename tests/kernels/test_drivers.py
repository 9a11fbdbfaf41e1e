"""The Torch-free drivers: every kernel under sanitizers on each instruction set, and the portable code on 64-bit Arm."""

import functools
import os
import shutil
import subprocess
import sys

import pytest

from ..conftest import ROOT

SCRIPT = ROOT / "csrc" / "driver" / "build.py"
CASES = {
    "conv": "522 cases, 0 failures",
    "step": "322 cases, 0 failures",
    "critic": "660 cases, 0 failures",
    "norm": "96 cases, 0 failures",
}
ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
KERNELS = [(name, isa) for name in CASES for isa in ISAS if name == "conv" or isa != "avx512bf16"]
"""Instruction sets that a driver's kernels are compiled for: bfloat16's products serve the convolutions alone."""


def run(command, **environment):
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def build(name, path, *flags, **environment):
    done = run([sys.executable, SCRIPT, name, path, *flags], **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return path


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Builds a driver with address and undefined-behaviour sanitizers, of which any finding aborts, once."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "probe.cpp").write_text("int main() {}")
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if run(["g++", *flags, folder / "probe.cpp", "-o", folder / "probe"]).returncode:
        pytest.skip("this compiler has no sanitizers")
    return functools.cache(lambda name: build(name, folder / name, "-g1", "-O1", *flags, ISAS="native"))


@pytest.mark.parametrize("name, isa", KERNELS)
def test_sanitizers_pass_on_every_kernel(sanitized, name, isa):
    done = run([sanitized(name)], ADVKD_ISA=isa)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    if not done.stdout.startswith(isa):
        pytest.skip(f"this processor has no {isa}: {done.stdout.split(':')[0]} was run")
    assert done.stdout.strip() == f"{isa}: {CASES[name]}"


KINDS = {
    "thread": ["-fsanitize=thread", "-g1", "-O1"],
    "address,undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1"],
    "not on Linux": ["-U__linux__"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_companions_run_every_task_once(kind, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    (tmp_path / "probe.cpp").write_text("int main() {}")
    if (
        run(["g++", *KINDS[kind], tmp_path / "probe.cpp", "-o", tmp_path / "probe"]).returncode
        or run([tmp_path / "probe"]).returncode
    ):
        pytest.skip(f"this compiler has no {kind} sanitizer")
    driver = build("threads", tmp_path / "driver", *KINDS[kind])
    for share in "01":
        done = run([driver], ADVKD_SHARE=share, TSAN_OPTIONS="die_after_fork=0")
        assert done.returncode == 0 and done.stdout == "269 cases, 0 failures\n", (done.stdout + done.stderr)[-2000:]


# An emulator takes minutes for the convolutions.
EMULATED = [pytest.param(name, marks=pytest.mark.slow if name == "conv" else []) for name in CASES]


@pytest.mark.parametrize("name", EMULATED)
def test_the_portable_code_is_right_on_64_bit_arm(name, tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    # The extension's own options compile slowly and gain nothing under emulation.
    driver = build(name, tmp_path / "driver", "-static", "-O2", CXX=compiler)
    done = run([emulator, driver])
    assert done.returncode == 0 and done.stdout.strip() == f"baseline: {CASES[name]}", (done.stdout + done.stderr)[-2000:]
