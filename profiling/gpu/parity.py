"""The parts that run GPU tests, in a few pytest processes side by side, and the gate of the benchmarks."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import torch

from advkd.ops import registry
from advkd.runtime.files import write_json

from ..cases import conv_block, gradient_penalty, norm_act, sampler_step, student
from ..evidence import ROOT, gpu_digests
from . import kept
from .kept import test_digest
from .parent import as_parent
from .part import NEEDS_DEVICE
from .tests import COLLECTED, forget, read_log

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
GATE_CASES = 2
"""Cases of a test function that a benchmark runs before it measures, where part ``tests`` has not been through."""
GATE = ["-m", "gpu"]
"""pytest's selection of the tests that need a GPU."""
HANG = 90.0
"""Seconds after which a test that has not ended is taken to hang."""
DRY = ["-p", "tests.gpu_dry_run", "--gpu-dry"]
"""pytest's words for a run of GPU tests up to the first launch of a kernel, without a GPU."""


def tests(part):
    """Every test that needs a GPU, in a few processes at a time; one that dies or hangs costs its own process alone.

    Tests that have passed on these sources before are not run again, nor those that the part before this one has run.
    """
    return run_tests(part, gpu_test_files())


def gate(part):
    """The parity tests of the benchmarks of a short run; a failure that is kept for these sources counts."""
    return run_tests(part, sorted({file for files in GATES.values() for file in files}))


def run_tests(part, files):
    """The GPU tests of some files as a part's result."""
    shards = part.processes(12)
    logs = [part.folder / f"tests-{i}.jsonl" for i in range(shards)]
    seen = _seen(part)
    write_json(part.folder / "seen.json", seen)
    words = [*GATE, f"--gpu-seen={part.folder / 'seen.json'}", f"--gpu-most={part.most}", *(DRY if part.rehearse else [])]
    words += ["--continue-on-collection-errors", *files]
    threads = str(max(1, (os.cpu_count() or 1) // shards))
    workers = [TestWorker(logs[i], [*words, f"--gpu-shard={i}/{shards}"], threads) for i in range(shards)]
    for log in logs:
        forget(log)
    try:
        while any([worker.poll() for worker in workers]) and part.left() > 3:
            time.sleep(0.5)
    finally:
        # Tests that are stopped here for want of time are not yet run.
        for worker in workers:
            running = worker.running()
            worker.stop()
            if running:
                forget(worker.log, running)
    return _told(part, [read_log(log) for log in logs], workers, seen)


def _told(part, known, workers, seen):
    """A part's result from the logs of its pytest processes."""
    own = {test: entry for log in known for test, entry in log.items() if test != COLLECTED}
    # A process that had no time to collect, or could not, has named none.
    late = sum(COLLECTED not in log for log in known)
    left = sorted({test for log in known for test in log.get(COLLECTED, {"tests": []})["tests"]} - set(own))
    if left or late:
        part.unfinished = f"no time for {len(left)} of {len(left) + len(own)} tests" + bool(late) * ", nor to collect a share"
    broken_off = [worker.log.with_suffix(".txt").name for worker in workers if worker.process.returncode in (2, 3, 4)]
    if broken_off:
        part.unfinished = f"pytest could not run: see {broken_off[0]}"
    found = {**seen, **{test: {**entry, "of": test_digest(test.partition("::")[0])} for test, entry in own.items()}}
    outcomes = [entry["outcome"] for entry in found.values()]
    counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    print(f"tests: {counts}, {len(seen)} of them before", flush=True)
    device, kinds = torch.device("cuda"), ("cuda", "triton")
    gaps = {kind: NEEDS_DEVICE if part.rehearse else registry.gap("sampler_step", kind, device) for kind in kinds}
    failures = sorted(test for test, entry in found.items() if entry["outcome"] in ("failed", "died"))
    part.red = bool(failures) or not counts.get("passed") or bool(broken_off)
    result = {"tests": found, "counts": counts, "failures": failures, "gaps": gaps, "processes": len(known)}
    return {**result, "left": left, "late": late}


def _seen(part):
    """``{test: entry}``: what has passed on these sources in an earlier run, and what the first tests of this run gave.

    Failures count too in a gate: a few other cases must not make it green.
    """
    outcomes = ("passed", "failed", "died") if part.name == "gate" else ("passed",)
    found = kept.known_tests(part.kept, outcomes) if part.kept else {}
    first = part.out / "gpu_first_tests.json"
    if part.name == "tests" and first.exists():
        found |= json.loads(first.read_text())["result"].get("tests", {})
    return found


def gpu_test_files():
    """The files that hold such tests, so that no other has to be imported."""
    paths = sorted((ROOT / "tests").glob("*/test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if re.search(r"mark\.gpu|import .*\bDEVICES\b", path.read_text())]


def parity_gate(files, part):
    """State of the GPU tests of these files: what ``gate`` or ``tests`` has found in the same tree, else a few of each now."""
    stored = [path for path in (part.out / "gpu_gate.json", part.out / "gpu_tests.json") if path.exists()]
    found = json.loads(stored[0].read_text()) if stored else None
    if found is None or found["kernels"] != gpu_digests() or "tests" not in found["result"]:
        log = part.folder / "gate.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "profiling.gpu.tests", f"--gpu-log={log}"]
        command += [*(DRY if part.rehearse else []), "--gpu-most=0" if part.full else f"--gpu-most={GATE_CASES}"]
        command += [file for file in files if (ROOT / file).exists()]
        subprocess.run(command, cwd=ROOT, timeout=part.left())
        known, through = {test: entry for test, entry in read_log(log).items() if test != COLLECTED}, True
    else:
        known = found["result"]["tests"]
        left = [test for test in found["result"]["left"] if test.partition("::")[0] in files]
        through = not left and not found["result"]["late"]
    outcomes = [entry["outcome"] for test, entry in known.items() if test.partition("::")[0] in files]
    bad = sum(outcome in ("failed", "died") for outcome in outcomes)
    state = "red" if bad else "none ran" if "passed" not in outcomes else "green" if through else "incomplete"
    return {"state": state, "passed": outcomes.count("passed"), "failed": bad}


class TestWorker:
    """pytest over one share of the tests, started again after a test that took its process along."""

    __test__ = False

    def __init__(self, log, arguments, threads="1", hang=HANG):
        self.log, self.hang, self.starts = log, hang, 0
        self.environment = {**os.environ, **as_parent(), "OMP_NUM_THREADS": threads}
        plugin = ["-p", "profiling.gpu.tests", f"--gpu-log={log}", "--gpu-end-with-parent"]
        self.command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--no-header", *plugin, *arguments]
        if not has_xdist():
            self.command = [word for word in self.command if word not in ("-n", "0")]
        self.process = None

    def poll(self):
        """Keep it going; whether there is anything left to wait for."""
        if self.process is None:
            return self._start()
        code = self.process.poll()
        if code is None:
            if self._hangs():
                print(f"a test hangs, its process is ended: {self.running()}", flush=True)
                self.stop()
            return True
        # pytest's own codes are 0 to 5; all others are deaths, and the rest of the tests needs another process.
        return False if 0 <= code <= 5 else self._start()

    def _start(self):
        if self.starts > 40:
            return False
        self.starts, self.started = self.starts + 1, time.time()
        with open(self.log.with_suffix(".txt"), "a") as output:
            options = {"env": self.environment, "stdout": output, "stderr": output, "start_new_session": True}
            self.process = subprocess.Popen(self.command, cwd=ROOT, **options)
        return True

    def running(self):
        """The test that the process is at, or None."""
        return self._running()[0]

    def _running(self):
        entries = read_log(self.log)
        test, entry = next(reversed(entries.items()), (None, {}))
        # The last line may still be of the test that the process before this one has died of.
        alive = self.process is not None and self.process.poll() is None
        begun = entry.get("begun", 0.0)
        return (test, begun) if alive and begun >= self.started else (None, None)

    def _hangs(self):
        test, begun = self._running()
        return test is not None and time.time() - begun > self.hang

    def stop(self):
        """End the process, which has a session of its own, and its children."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def has_xdist():
    """True if pytest knows ``-n``."""
    return importlib.util.find_spec("xdist") is not None
