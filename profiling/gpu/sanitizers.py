"""The parts that run Compute Sanitizer over a few parity tests."""

import os
import re
import shutil
import subprocess
import sys

from ..evidence import ROOT
from .parity import DRY
from .tests import read_log, settle

SANITIZED = (
    "tests/kernels/test_conv_block_cuda.py",
    "tests/kernels/test_conv_pair.py",
    "tests/kernels/test_student_stem.py",
    "tests/kernels/test_training_cuda.py",
)
SANITIZED_TOO = ("tests/kernels/test_conv_block_triton.py", "tests/ops/test_sampler_step.py")
"""Files of a short run, and those that a long one adds: Triton compiles for minutes under the tool."""
SELECTED = {False: "nvcc and not capt", True: "not captured and not graph and not beyond and not launch and not every"}
"""pytest's selection by whether the run is long: nothing is captured, profiled or gigabytes large under the tool."""
SANITIZERS = {"memcheck": ["--padding", "32"], "racecheck": []}
"""Compute Sanitizer's tools with their options: accesses out of bounds, and races in shared memory."""


def sanitizer(name):
    """A part that runs one of :data:`SANITIZERS` over a few parity tests of each file of :data:`SANITIZED`."""

    def run(part):
        tool = shutil.which("compute-sanitizer")
        if tool is None and not part.rehearse:
            raise RuntimeError(
                "compute-sanitizer is not on PATH: it comes with the CUDA toolkit (its bin folder, or compute-sanitizer/)"
            )
        found = part.run(name, lambda: _sanitize(part, tool, name, SANITIZERS[name]))
        selection = f"{part.most} cases of every GPU test function of {', '.join(sanitized(part))}; {SELECTED[part.full]}"
        said = {"said": f"{found['errors']} errors in {found['tests']} tests"} if "errors" in found else {}
        return {"selection": selection, **said}

    return run


def sanitized(part):
    """The files that a part's tool runs over."""
    return [*SANITIZED, *(SANITIZED_TOO if part.full else ())]


def _sanitize(part, tool, name, options):
    log, output = part.folder / f"{name}.jsonl", part.folder / f"{name}.txt"
    log.unlink(missing_ok=True)
    command = [tool, "--tool", name, *options, "--error-exitcode", "99", "--target-processes", "all"]
    if part.rehearse:
        command = []
    command += [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "gpu and not slow", "-k", SELECTED[part.full]]
    command += ["-p", "profiling.gpu.tests", *(DRY if part.rehearse else [])]
    command += [f"--gpu-log={log}", f"--gpu-most={part.most}", *sanitized(part)]
    # Every tensor is an allocation of its own, so that padding stands between any two; nothing can be captured that way.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    stopped = None
    with open(output, "w") as file:
        try:
            limit = max(part.left() - 2, 1)
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=limit).returncode
        except subprocess.TimeoutExpired as error:
            code, stopped = None, error
    settle(log, code)
    text = output.read_text(errors="replace")
    verdict = sanitizer_verdict(text, code, read_log(log))
    if stopped and not verdict["errors"] and not verdict["failures"]:
        print(f"{name}: stopped at its limit, {verdict['tests']} tests without an error", flush=True)
        raise stopped
    if part.rehearse:
        return {"code": code, "red": bool(code) or bool(stopped), "tail": text[-2000:]}
    return {"code": code, **verdict}


FINDINGS = r"========= (?:Invalid|Misaligned|Race reported|Error: |Program hit)"


def sanitizer_verdict(text, code, log):
    """Errors that the tool counted and tests that ran; red unless the tool reported, found nothing, and every test passed.

    ``code``: None for a tool that was stopped at its limit: it has counted nothing, what it has printed counts.
    """
    summary = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    errors = sum(int(a or b) for a, b in summary) if summary else len(re.findall(FINDINGS, text))
    outcomes = [entry["outcome"] for entry in log.values()]
    bad = [test for test, entry in log.items() if entry["outcome"] in ("failed", "died")]
    told = code is None or (code == 0 and summary)
    red = not told or errors > 0 or "passed" not in outcomes or "failed" in outcomes
    return {"errors": errors, "tests": len(outcomes), "failures": bad, "red": red, "tail": text[-2000:] if red else ""}
