"""The parts that run GPU tests, in a few processes side by side, and the gate of the benchmarks.

pytest-xdist shares the tests out and replaces a process that one has taken along, such as one that hung. A machine without it
runs them in one process, which is started again after such a test.
"""

import importlib.util
import os
import re
import sys

import torch

from advkd.ops import registry
from advkd.runtime.files import write_json

from ..cases import conv_block, gradient_penalty, norm_act, sampler_step, student
from ..evidence import ROOT, gpu_digests
from . import kept
from .kept import test_digest
from .part import NEEDS_DEVICE
from .processes import run_session
from .summary import read_json
from .tests import collected, read_log, running, settle

STUDENT_TESTS = [
    f"tests/kernels/test_{name}.py" for name in ("conv_block_cuda", "conv_block_triton", "conv_pair", "student_stem")
]
TRAINING_TESTS = ["tests/kernels/test_training_cuda.py", "tests/kernels/test_training_triton.py"]
GATES = {
    "bench_student": [*student.PARITY_TESTS, *STUDENT_TESTS, "tests/kernels/test_fused_student_gpu.py"],
    "bench_conv_block": conv_block.PARITY_TESTS,
    "bench_sampler_step": [*sampler_step.PARITY_TESTS, "tests/kernels/test_sampler_step_gpu_sources.py"],
    "bench_gradient_penalty": [*gradient_penalty.PARITY_TESTS, *TRAINING_TESTS],
    "bench_norm_act": [*norm_act.PARITY_TESTS, *TRAINING_TESTS],
}
"""The test files whose GPU tests must pass before a benchmark's times count."""
GATE = ["-m", "gpu"]
"""pytest's selection of the tests that need a GPU."""
HANG = 90.0
"""Seconds after which a test that has not ended is taken to hang."""
STARTS = 40
"""Number of processes that tests may take along."""
DRY = ["-p", "tests.gpu_dry_run", "--gpu-dry"]
"""pytest's words for a run of GPU tests up to the first launch of a kernel, without a GPU."""


def tests(part):
    """Every test that needs a GPU, in a few processes at a time; one that dies or hangs costs its own process alone."""
    return run_tests(part, gpu_test_files())


def gate(part):
    """The parity tests of the benchmarks of a short run; a failure that is kept for these sources counts."""
    return run_tests(part, sorted({file for files in GATES.values() for file in files}))


def run_tests(part, files):
    """The GPU tests of some files as a part's result."""
    log, seen = part.folder / "tests.jsonl", _seen(part)
    code = run_pytest(part, log, [f"--gpu-most={part.most}", "--continue-on-collection-errors", *files], seen)
    return _told(part, read_log(log), collected(log), code, seen)


def run_pytest(part, log, words, seen=()):
    """Run GPU tests that are neither seen nor in the log; returns pytest's code, None at the part's limit.

    Tests that are stopped at the limit are dropped from the log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes(part)))}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *GATE, "-p", "profiling.gpu.tests", f"--gpu-log={log}"]
    command += [f"--gpu-seen={part.folder / 'seen.json'}", f"--gpu-parent={os.getpid()}", f"--gpu-hang={HANG}"]
    command += [*_workers(part), *(DRY if part.rehearse else []), *words]
    settle(log, None)
    for _ in range(STARTS):
        write_json(part.folder / "seen.json", {**dict(seen), **read_log(log)})
        code = run_session(command, log.with_suffix(".txt"), part.left() - 3, environment)
        # pytest's own codes are 0 to 5; a process that dies before it has collected does so again.
        again = running(log) or (code not in range(6) and collected(log) is not None)
        settle(log, code)
        if code is None or not again:
            break
    return code


def _workers(part):
    """pytest's words for processes side by side, where the package for them is there."""
    words = ["-n", str(processes(part)), "--maxschedchunk=1", f"--max-worker-restart={STARTS}"]
    return words if importlib.util.find_spec("xdist") else []


def processes(part):
    """Number of processes that run tests side by side."""
    return part.processes(12) if importlib.util.find_spec("xdist") else 1


def _told(part, log, chosen, code, seen):
    """A part's result from the log of its tests and those that were chosen."""
    left = None if chosen is None else sorted(set(chosen) - set(log))
    if left != []:
        part.result["unfinished"] = f"no time for {len(left)} of {len(left) + len(log)} tests" if left else "no time to collect"
    if stopped := code in (2, 3, 4):
        part.result["unfinished"] = "pytest could not run: see tests.txt"
    found = {**seen, **{test: {**entry, "of": test_digest(test.partition("::")[0])} for test, entry in log.items()}}
    outcomes = [entry["outcome"] for entry in found.values()]
    counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + f", {len(seen)} of them before" * bool(seen)
    device, kinds = torch.device("cuda"), ("cuda", "triton")
    gaps = {kind: NEEDS_DEVICE if part.rehearse else registry.gap("sampler_step", kind, device) for kind in kinds}
    failures = sorted(test for test, entry in found.items() if entry["outcome"] in ("failed", "died"))
    part.red = bool(failures) or not counts.get("passed") or stopped
    result = {"tests": found, "failures": failures, "gaps": gaps, "processes": processes(part)}
    return {**result, "left": left, "said": said}


def _seen(part):
    """``{test: entry}`` of what has passed on these sources in an earlier run, and is not run again.

    Failures count too in a gate: a few other cases must not make it green.
    """
    outcomes = ("passed", "failed", "died") if part.name == "gate" else ("passed",)
    return kept.known_tests(part.kept, outcomes) if part.kept else {}


def gpu_test_files():
    """The files that hold such tests, so that no other has to be imported."""
    paths = sorted((ROOT / "tests").glob("*/test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if re.search(r"mark\.gpu|import .*\bDEVICES\b", path.read_text())]


def parity_gate(files, part):
    """State of the GPU tests of these files for these kernels, by part ``tests``; by ``gate`` where that is undecided."""
    stored = [read_json(part.out / f"gpu_{name}.json", {}) for name in ("tests", "gate")]
    states = [_state_of(files, found["result"]) for found in stored if found.get("kernels") == gpu_digests()]
    states.append({"state": "none ran", "passed": 0, "failed": 0})
    return next((state for state in states if state["state"] in ("green", "red")), states[0])


def _state_of(files, found):
    """State of the tests of these files in a part's result."""
    own, left = (lambda test: test.partition("::")[0] in files), found.get("left")
    outcomes = [entry["outcome"] for test, entry in found.get("tests", {}).items() if own(test)]
    bad = sum(outcome in ("failed", "died") for outcome in outcomes)
    through = "incomplete" if left is None or any(map(own, left)) else "green"
    state = "red" if bad else through if "passed" in outcomes else "none ran"
    return {"state": state, "passed": outcomes.count("passed"), "failed": bad}
