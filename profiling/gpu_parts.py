"""The work of each part of ``python -m profiling.gpu``, in a process of its own: python -m profiling.gpu_parts NAME ...

A part keeps a journal of its items (benchmark cases, sanitizer tools, ...): what is finished is not done again, and what a
process died of is not tried a second time. It ends with 0, with 1 where something failed, with :data:`BROKEN` where the
device's context is unusable and the rest wants a fresh process.
"""

import argparse
import csv
import functools
import importlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from advkd.ops import registry
from advkd.runtime.files import write_json
from advkd.runtime.folders import cache_folder
from advkd.runtime.hub import reason
from advkd.runtime.timing import provenance

from . import (
    bench_conv_block,
    bench_gradient_penalty,
    bench_norm_act,
    bench_sampler_step,
    bench_student,
    gpu_kept,
    gpu_predictions,
)
from .gpu_kept import test_digest
from .gpu_kernels import digests
from .gpu_test_log import BROKEN, COLLECTED, broken, forget, read_log
from .gpu_timing import peaks
from .harness import ROOT, absent_package, format_case, is_green, run_case
from .parent import as_parent, end_with_parent

QUICK = {
    "bench_student": [
        "paper-256, batch 8, bfloat16",
        "pyramid-256, batch 1, bfloat16",
        "digits, batch 1, bfloat16",
        "paper-256, batch 1, bfloat16",
        "pyramid-256, batch 8, bfloat16",
        "digits, batch 64, bfloat16",
        "paper-256, batch 64, bfloat16",
        "pyramid-256, batch 64, bfloat16",
        "paper-256, batch 8, float32",
        "paper-256, batch 8, bfloat16, max-autotune",
        "pyramid-256, batch 1, bfloat16, max-autotune",
    ],
    "bench_conv_block": [
        "128 to 128 at 256, batch 8, bfloat16",
        "128 to 128 up to 256, batch 8, bfloat16",
        "48 to 48 up to 128, and at 128, batch 8, bfloat16",
        "32 to 32 at 256, to 3, batch 8, bfloat16",
        "the stem of pyramid-256 up to 16, batch 1, bfloat16",
        "144 to 144 at 8, batch 1, bfloat16",
        "128 to 3 at 256, batch 8, bfloat16",
        "128 to 128 at 128, batch 8, float32",
    ],
    "bench_sampler_step": ["deterministic, float32", "with noise, float32", "pooled by 4, float32"],
    "bench_gradient_penalty": ["penalty, narrow, 64, 64", "update, narrow, 64, 64"],
    "bench_norm_act": ["with up-sampling, bfloat16", "without up-sampling, float32"],
}
"""The cases that a short run measures, the most telling first; ``--full`` takes all."""

STUDENT_TESTS = [f"tests/ops/test_{name}.py" for name in ("conv_block_cuda", "conv_block_triton", "conv_pair", "student_stem")]
TRAINING_TESTS = ["tests/ops/test_training_cuda.py", "tests/ops/test_training_triton.py"]
GATES = {
    "bench_student": [*bench_student.PARITY_TESTS, *STUDENT_TESTS, "tests/system/test_fused_student_gpu.py"],
    "bench_conv_block": bench_conv_block.PARITY_TESTS,
    "bench_sampler_step": [*bench_sampler_step.PARITY_TESTS, "tests/ops/test_sampler_step_gpu_sources.py"],
    "bench_gradient_penalty": [*bench_gradient_penalty.PARITY_TESTS, *TRAINING_TESTS],
    "bench_norm_act": [*bench_norm_act.PARITY_TESTS, *TRAINING_TESTS],
}
"""The test files whose GPU tests must pass before a benchmark's times count."""

REHEARSED_CASES = {"bench_student": ["digits, batch 1, bfloat16", "digits, batch 64, bfloat16"]}
"""Cases that a rehearsal enters, where the others take a processor minutes."""

GATE_CASES = 2
"""Cases of a test function that a benchmark runs before it measures, where part ``tests`` has not been through."""
GATE = ["-m", "gpu"]
"""pytest's selection of the tests that want a GPU."""
HANG = 90.0
"""Seconds after which a test that has not ended is taken to hang."""


class OutOfTime(Exception):
    """The item that it names was stopped at the part's limit, and is done again next time."""


class Journal:
    """Items of a part with their results, in a file that is whole at any time."""

    def __init__(self, path):
        self.path = Path(path)
        self.items = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, name, work):
        """Do an item and keep its result, unless it is kept already; returns the result. An error is a result."""
        if name in self.items:
            known = self.items[name]
            return known if known.get("state") != "begun" else self._keep(name, {"state": "died", "error": "the process died"})
        self._keep(name, {"state": "begun"})
        begin = time.monotonic()
        try:
            found = {"state": "done", **work()}
        except subprocess.TimeoutExpired:
            self.forget_begun()
            raise OutOfTime(name) from None
        except Exception as error:
            found = {"state": "error", "error": f"{type(error).__name__}: {reason(error)}"}
        found["item_seconds"] = round(time.monotonic() - begin, 2)
        self._keep(name, found)
        if found["state"] == "error" and broken():
            sys.exit(BROKEN)
        return found

    def _keep(self, name, value):
        self.items[name] = value
        write_json(self.path, self.items)
        return value

    def forget_begun(self):
        """An item that was stopped from outside is done again."""
        self.items = {name: value for name, value in self.items.items() if value.get("state") != "begun"}
        write_json(self.path, self.items)

    def failed(self):
        """Items that did not end well."""
        return [name for name, value in self.items.items() if value.get("state") != "done" or value.get("red")]


def build(part):
    """Objects of these sources that load are used; else both are built, for this card's architecture alone."""
    flag = architecture(torch.cuda.get_device_capability()) if torch.cuda.is_available() else REHEARSED
    stale = stale_objects()
    if not stale and part.journal.run("prebuilt", lambda: _load(part))["state"] == "done":
        return {"prebuilt": True}
    part.journal.items.pop("prebuilt", None)
    # Where no new one can be built, none is better than one whose tests would stand for other sources.
    for path in stale:
        path.unlink(missing_ok=True)
    part.journal.run("compile", lambda: _logged(BUILD, part, build_environment(flag)))
    part.journal.run("load", lambda: _load(part))
    return {"prebuilt": False, "architectures": flag}


BUILD = [sys.executable, "setup.py", "build_ext", "--inplace"]
REHEARSED = "9.0a"
"""The architecture that a rehearsal builds for."""


def build_environment(architectures):
    """Environment in which :data:`BUILD` must build both objects; ``architectures``: as in TORCH_CUDA_ARCH_LIST."""
    return {**os.environ, "ADVKD_CPU": "1", "ADVKD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}


LOADS = """
import sys
from advkd.runtime.extension import extension_gap
gaps = [gap for gap in map(extension_gap, sys.argv[1:]) if gap]
print(*gaps, sep="\\n")
sys.exit(bool(gaps))
"""


def _load(part):
    """Load the objects in a fresh process; without a GPU that of the CPU alone."""
    kinds = ("cpu",) if part.rehearse else ("cuda", "cpu")
    return _logged([sys.executable, "-c", LOADS, *kinds], part)


def stale_objects(root=ROOT):
    """Paths of the objects that are not there, or were linked from other sources than those that are."""
    identity = runpy.run_path(str(root / "setup.py"), run_name="setup")["source_identity"]
    paths = {kind: root / "advkd" / f"_{kind}.abi3.so" for kind in ("cpu", "cuda")}
    return [path for kind, path in paths.items() if not _is_of(path, identity(kind))]


def _is_of(path, identity):
    return path.exists() and bytes.fromhex(identity) in path.read_bytes()


def architecture(capability):
    """A card's entry of TORCH_CUDA_ARCH_LIST."""
    major, minor = capability
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def _logged(command, part, environment=None):
    """Run a command whose output is part of this part's log; an error where it fails."""
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=part.left())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {done.returncode}")
    return {}


def warm(part):
    """Triton's kernels compiled by many processes at a time, so that no plan has to wait for them one by one."""
    if part.rehearse:
        return {NEEDS_DEVICE: "warm"}
    count = part.processes(12)
    commands = [[sys.executable, "-m", "profiling.gpu_warm", f"{i}/{count}"] for i in range(count)]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    codes = []
    try:
        for process in processes:
            codes.append(process.wait(max(part.left() - 1, 0.1)))
    except subprocess.TimeoutExpired:
        part.unfinished = "not everything is compiled yet"
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    part.red = any(codes)
    return {"processes": count}


def tests(part):
    """Every test that wants a GPU, in a few processes at a time; one that dies or hangs costs its own process alone.

    What has passed on these sources before is not run again, nor what the part before this one has seen.
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

    Of a gate also what has failed: a few other cases must not make it green.
    """
    outcomes = ("passed", "failed", "died") if part.name == "gate" else ("passed",)
    found = gpu_kept.known_tests(part.kept, outcomes) if part.kept else {}
    first = part.out / "gpu_first_tests.json"
    if part.name == "tests" and first.exists():
        found |= json.loads(first.read_text())["result"].get("tests", {})
    return found


DRY = ["-p", "tests.gpu_dry_run", "--gpu-dry"]
"""pytest's words for a run of GPU tests up to the first launch of a kernel, without a GPU."""


def gpu_test_files():
    """The files that hold such tests, so that no other has to be imported."""
    paths = sorted((ROOT / "tests").glob("*/test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if re.search(r"mark\.gpu|import .*\bDEVICES\b", path.read_text())]


class TestWorker:
    """pytest over one share of the tests, started again after a test that took its process along."""

    __test__ = False

    def __init__(self, log, arguments, threads="1", hang=HANG):
        self.log, self.hang, self.starts = log, hang, 0
        self.environment = {**os.environ, **as_parent(), "OMP_NUM_THREADS": threads}
        plugin = ["-p", "profiling.gpu_test_log", f"--gpu-log={log}", "--gpu-end-with-parent"]
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
        # pytest's own codes are 0 to 5; all others are deaths, and the rest of the tests wants another process.
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
    """Whether pytest knows ``-n``."""
    return importlib.util.find_spec("xdist") is not None


SANITIZED = (
    "tests/ops/test_conv_block_cuda.py",
    "tests/ops/test_conv_pair.py",
    "tests/ops/test_student_stem.py",
    "tests/ops/test_training_cuda.py",
)
SANITIZED_TOO = ("tests/ops/test_conv_block_triton.py", "tests/ops/test_sampler_step.py")
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
        part.journal.run(name, lambda: _sanitize(part, tool, name, SANITIZERS[name]))
        said = f"{part.most} cases of every GPU test function of {', '.join(sanitized(part))}"
        return {"selection": f"{said}; {SELECTED[part.full]}"}

    return run


def sanitized(part):
    """The files that a part's tool runs over."""
    return [file for file in (*SANITIZED, *(SANITIZED_TOO if part.full else ())) if (ROOT / file).exists()]


def _sanitize(part, tool, name, options):
    log, output = part.folder / f"{name}.jsonl", part.folder / f"{name}.txt"
    log.unlink(missing_ok=True)
    command = [tool, "--tool", name, *options, "--error-exitcode", "99", "--target-processes", "all"]
    if part.rehearse:
        command = []
    command += [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "gpu and not slow", "-k", SELECTED[part.full]]
    command += ["-p", "profiling.gpu_test_log", *(DRY if part.rehearse else [])]
    command += [f"--gpu-log={log}", f"--gpu-most={part.most}", *sanitized(part)]
    # Every tensor is an allocation of its own, so that padding stands between any two; nothing can be captured that way.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with open(output, "w") as file:
        try:
            limit = max(part.left() - 2, 1)
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            part.unfinished, code = f"{name} was stopped at its limit", None
    text = output.read_text(errors="replace")
    if part.rehearse:
        return {"code": code, "red": bool(code), "tail": text[-2000:]}
    return {"code": code, **sanitizer_verdict(text, code, read_log(log))}


FINDINGS = r"========= (?:Invalid|Misaligned|Race reported|Error: |Program hit)"


def sanitizer_verdict(text, code, log):
    """Errors that the tool counted and tests that ran; red unless the tool reported, found nothing, and every test passed.

    ``code``: None for a tool that was stopped at its limit: it has counted nothing, what it has printed counts.
    """
    summary = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    errors = sum(int(a or b) for a, b in summary) if summary else len(re.findall(FINDINGS, text))
    outcomes = [entry["outcome"] for test, entry in log.items() if test != COLLECTED]
    bad = [test for test, entry in log.items() if entry["outcome"] in ("failed", "died")]
    told = code is None or (code == 0 and summary)
    red = not told or errors > 0 or "passed" not in outcomes or "failed" in outcomes
    print(f"{errors} errors in {len(outcomes)} tests, {len(bad)} of which failed", flush=True)
    return {"errors": errors, "tests": len(outcomes), "failures": bad, "red": red, "tail": text[-2000:] if red else ""}


FIRST_IMAGE = """
import sys, time
import torch, advkd
from advkd import Student
torch.cuda.init()
begin = time.perf_counter()
preset, backend = sys.argv[1:]
student = Student.from_pretrained(preset) if preset in Student.embedded else Student.from_preset(preset).eval()
fused = student.cuda().fuse(backend=backend, dtype=torch.bfloat16)
image = fused(fused.latents(1, seed=0))
torch.cuda.synchronize()
assert torch.isfinite(image.float()).all()
print("SECONDS", time.perf_counter() - begin)
"""


def first_image(part):
    """Seconds from the end of the imports to the first image, with what is compiled and measured kept from before.

    Each is asked of two processes one after the other: the second one must leave every cache as it is.
    """
    for preset in ("digits", "pyramid-256"):
        for backend in ("auto", "cuda"):
            part.journal.run(f"{preset}, {backend}", lambda p=preset, b=backend: _first(part, p, b))
    return {"caches": list(map(str, caches()))}


def caches():
    """Where compilers and the engine keep what they have made."""
    home = Path.home()
    usual = {
        "TRITON_CACHE_DIR": home / ".triton/cache",
        "CUPY_CACHE_DIR": home / ".cupy/kernel_cache",
        "CUDA_CACHE_PATH": home / ".nv/ComputeCache",
    }
    return [cache_folder(), *(Path(os.environ.get(name, path)) for name, path in usual.items())]


def _kept():
    return {(str(path), path.stat().st_mtime_ns) for folder in caches() for path in folder.rglob("*") if path.is_file()}


FIRST_IMAGE_SECONDS = 3.0
"""From the end of import to the first image, everything kept: what is promised."""


def _first(part, preset, backend):
    seconds, kept = [], []
    for _ in range(2):
        command = [sys.executable, "-c", FIRST_IMAGE, preset, backend]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=part.left())
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"ended with {done.returncode}")
        seconds.append(float(re.search(r"SECONDS (\S+)", done.stdout)[1]))
        kept.append(_kept())
    again = sorted(path for path, _ in kept[1] - kept[0])
    print(f"{preset}, {backend}: {seconds[0]:.2f} s, then {seconds[1]:.2f} s, {len(again)} files written then", flush=True)
    return {
        "first_seconds": seconds[0],
        "kept_seconds": seconds[1],
        "compiled_again": again[:20],
        "red": bool(again) or seconds[1] >= FIRST_IMAGE_SECONDS,
    }


NEEDS_DEVICE = "needs a device"
"""A rehearsal's word for a step that it cannot do."""


def rates(part):
    """The card's own rates, which floors are counted with."""
    return part.journal.run("rates", peaks if not part.rehearse else lambda: {NEEDS_DEVICE: "rates"})


def bench(name):
    """A part that runs a benchmark's cases: all of them without their costly contestants first, then with all."""

    def run(part):
        module = importlib.import_module(f"profiling.{name}")
        cases = module.cases("cuda") if part.full or not hasattr(module, "quick_cases") else module.quick_cases()
        chosen = REHEARSED_CASES.get(name, QUICK[name]) if part.rehearse else QUICK[name]
        wanted = list(cases) if part.full else [case for case in chosen if case in cases]
        _use_measured_rates(part)
        gate = parity_gate(GATES[name], part)
        print(f"parity tests: {gate}", flush=True)
        known = gpu_kept.cases(part.kept, name) if part.kept else {}
        for case in wanted:
            work = functools.partial(_measured, part, cases[case], False)
            _run_case(part, case, lambda case=case, work=work: known[case] if case in known else work())
            # A part that is ended from outside has its gate and its cases all the same.
            write_json(part.folder / "result.json", result_of(_benchmark(part, name, gate, wanted), part))
        for case in wanted:
            if any("pending" in entry for entry in part.journal.items.get(case, {}).get("contestants", ())):
                _run_case(part, case + ALL, functools.partial(_measured, part, cases[case], True))
                write_json(part.folder / "result.json", result_of(_benchmark(part, name, gate, wanted), part))
        return _benchmark(part, name, gate, wanted)

    return run


ALL = ", with costly peers"
"""Ends the journal's name of a case that is measured once more with all contestants."""


def _run_case(part, name, work):
    if part.left() > 5:
        part.journal.run(name, work)


def _benchmark(part, name, gate, wanted):
    """A benchmark's result so far; a case with all its contestants stands for the one with fewer."""
    items = part.journal.items
    done = {case: value for case, value in items.items() if value["state"] == "done"}
    best = {case.removesuffix(ALL): value for case, value in sorted(done.items(), key=lambda item: item[0].endswith(ALL))}
    own = ("state", "red", "item_seconds")
    found = [{k: v for k, v in best[case].items() if k not in own} for case in wanted if case in best]
    pending = [case for case, value in best.items() if any("pending" in entry for entry in value.get("contestants", ()))]
    missing = [case for case in wanted if case not in items]
    notes = [f"no time for {len(missing)} cases: {', '.join(missing)}"] if missing else []
    notes += [f"no time for the costly peers of {', '.join(pending)}"] if pending else []
    notes += ["the parity tests are not through yet"] if gate["state"] == "incomplete" else []
    part.unfinished = "; ".join(notes) or None
    part.red = gate["state"] in ("red", "none ran")
    return {"benchmark": name, "cases": found, "gate": gate, "parity_tests": GATES[name], "wanted": wanted}


def _use_measured_rates(part):
    """Floors are counted with the card's own rates where part ``rates`` has them."""
    path = part.out / "gpu_rates.json"
    found = json.loads(path.read_text())["result"].get("items", {}).get("rates", {}) if path.exists() else {}
    if "flops" in found:
        bench_student.MEASURED_RATES[:] = [gpu_predictions.H200.measured(found["flops"], found["bandwidth"])]


def _measured(part, build_case, costly):
    begin = time.monotonic()
    if part.rehearse:
        from tests import gpu_dry_run

        with gpu_dry_run.stand_in(most_bytes=2**30):
            return rehearsed(build_case())
    result = _described(run_case(build_case(), costly=costly or part.full))
    print(format_case(result) + f"\n  ({time.monotonic() - begin:.0f} s)", flush=True)
    torch.cuda.empty_cache()
    return {**result, "red": not is_green(result)}


def rehearsed(case):
    """How far a case's contestants go on a stand-in for a GPU; red where one of them stops for another reason than a device."""
    from tests import gpu_dry_run

    entries, red = [], False
    for contestant in case.contestants:
        how, error = gpu_dry_run.how_far(lambda: contestant.prepare()())
        absent = error is not None and absent_package(error)
        said = f"needs {absent}, which is not installed" if absent else how
        entries.append({"name": contestant.name, "kind": contestant.kind, "missing": said})
        red |= error is not None and not absent
        print(f"  {case.name}: {contestant.name}: {said}", flush=True)
    return {"case": case.name, "moved_bytes": None, "ratio": None, "contestants": entries, "red": red}


def _described(result):
    """A case's result with its provenance and a floor."""
    result = {**result, "provenance": provenance("cuda")}
    if "floor" not in result and result["moved_bytes"]:
        seconds = result["moved_bytes"] / bench_student.gpu_rates().bandwidth
        result["floor"] = {"seconds": seconds, "bytes": result["moved_bytes"]}
    return result


def parity_gate(files, part):
    """State of the GPU tests of these files: what ``gate`` or ``tests`` has found in the same tree, else a few of each now."""
    stored = [path for path in (part.out / "gpu_gate.json", part.out / "gpu_tests.json") if path.exists()]
    found = json.loads(stored[0].read_text()) if stored else None
    if found is None or found["kernels"] != digests() or "tests" not in found["result"]:
        log = part.folder / "gate.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "profiling.gpu_test_log", f"--gpu-log={log}"]
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


STALLS = (
    "long_scoreboard",
    "short_scoreboard",
    "barrier",
    "math_pipe_throttle",
    "mio_throttle",
    "lg_throttle",
    "wait",
    "not_selected",
    "no_instruction",
    "membar",
    "sleeping",
    "tex_throttle",
    "dispatch_stall",
)
PROFILED = (
    "128 to 128 at 256",
    "128 to 128 up to 256",
    "128 to 3 at 256",
    "48 to 48 up to 128, and at 128",
    "32 to 32 at 256, to 3",
    "the stem of pyramid-256 up to 16",
)
"""The chains of layers whose kernels Nsight Compute looks at, one process each."""
METRICS = {
    "seconds": "gpu__time_duration.sum",
    "dram_bytes": "dram__bytes.sum",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "tensor_percent": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    **{name: f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS},
}
UNITS = {"nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3, "second": 1, "s": 1}
UNITS |= {"byte": 1, "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9}


def ncu(part):
    """Nsight Compute on one launch of each kernel: time, traffic, rate, occupancy, what its warps wait for."""
    tool = shutil.which("ncu")
    if part.rehearse:
        return {NEEDS_DEVICE: "ncu"}
    if tool is None:
        print("ncu is not installed", flush=True)
        return {"ncu": "not installed"}
    for name in PROFILED:
        part.journal.run(name, lambda name=name: _profiled(part, tool, name))
    return {"ncu": tool}


def _profiled(part, tool, chain):
    work = [sys.executable, "-m", "profiling.gpu_launches", chain]
    options = ["--csv", "--page", "raw", "--clock-control", "none", "--print-units", "base", "--target-processes", "all"]
    command = [
        tool,
        *options,
        "--kernel-name",
        "regex:advkd|conv_kernel|image_kernel|descriptor_kernel",
        "--metrics",
        ",".join(METRICS.values()),
        *work,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=part.left())
    rows = ncu_rows(done.stdout)
    if done.returncode or not rows:
        raise RuntimeError((done.stdout + done.stderr).strip().splitlines()[-1])
    marks = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("LAUNCH ")]
    for i, row in enumerate(rows):
        if len(marks) == len(rows):
            row |= marks[i]
            row["flop_per_second"] = row["flop"] / row["seconds"]
        print(
            f"  {row['kernel'][:60]}: {1e6 * row['seconds']:.1f} us, {row['dram_bytes'] / 1e6:.1f} MB, {row['top_stall']}",
            flush=True,
        )
    return {"launches": rows}


def ncu_rows(text):
    """Kernels of ``--csv --page raw``: names of columns, their units, then one line per launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    titles, units, *launches = csv.reader(lines)
    found = []
    for launch in launches:
        cells = dict(zip(titles, zip(launch, units)))
        row = {"kernel": cells["Kernel Name"][0]}
        for name, metric in METRICS.items():
            value, unit = cells.get(metric, ("", ""))
            number = re.fullmatch(r"[\d.,]+(e[+-]?\d+)?", value)
            row[name] = float(value.replace(",", "")) * UNITS.get(unit.lower(), 1) if number else None
        waits = {name: row.pop(name) for name in STALLS}
        row["top_stall"] = max(waits, key=lambda name: waits[name] or 0.0)
        row["stalls"] = {name: value for name, value in waits.items() if value}
        found.append(row)
    return found


def ahead(part):
    """What the compilers say about the kernels for this card's architecture."""
    name = "sm_" + architecture(torch.cuda.get_device_capability()).replace(".", "") if torch.cuda.is_available() else None
    command = [sys.executable, "-m", "profiling.ahead", "--out", str(part.folder / "ahead")]
    part.journal.run("compile", lambda: _logged([*command, *(["--architectures", name] if name else [])], part))
    return {"file": "ahead/ahead.json"}


PARTS = {
    "build": build,
    "rates": rates,
    "warm": warm,
    "first_tests": tests,
    "tests": tests,
    "gate": gate,
    **{name: sanitizer(name) for name in SANITIZERS},
    "first_image": first_image,
    **{name: bench(name) for name in QUICK},
    "ncu": ncu,
    "ahead": ahead,
}


class Part:
    """What a part's function is given: its folders, its journal, its time.

    Attributes:
        out, folder: folders of all results, and of this part's own files.
        full: measure all cases.
        name: of the part.
        most: cases of a test function at most; 0 for all.
        kept: folder of results that stand for their sources, or None.
        rehearse: there is no GPU: do all that needs none.
    """

    def __init__(self, out, folder, seconds, full=False, name="", most=0, kept=None, rehearse=False):
        self.out, self.folder, self.full = Path(out), Path(folder), full
        self.name, self.most, self.kept, self.rehearse = name, most, kept, rehearse
        self.end = time.monotonic() + seconds
        self.journal = Journal(self.folder / "journal.json")
        self.red, self.unfinished = False, None

    def left(self):
        """Seconds until the part is ended from outside."""
        return max(self.end - time.monotonic(), 0.0)

    def processes(self, most):
        """How many processes the part may start side by side: one on a small machine, some cores left on a large one."""
        return max(1, min(most, (os.cpu_count() or 1) - 4))


def run(function, part):
    """Do a part; returns its JSON for ``result.json`` and the process's code."""
    try:
        found = function(part)
    except OutOfTime as item:
        found, part.unfinished = {}, f"no time for {item}"
    except Exception as error:
        found, part.red = {"error": f"{type(error).__name__}: {reason(error)}"}, True
        print(found["error"], file=sys.stderr, flush=True)
    return result_of(found, part), 3 if part.unfinished else int(bool(part.journal.failed() or part.red))


def result_of(found, part):
    """A part's JSON: what its function has found, and what did not end well or was not begun."""
    failed = part.journal.failed()
    result = {**found, "failed_items": failed}
    if "cases" not in result and "tests" not in result:
        result["items"] = part.journal.items
    elif failed:
        result["errors"] = {name: part.journal.items[name].get("error", "red") for name in failed}
    if part.unfinished:
        result["unfinished"] = part.unfinished
    return result


def main(known=None):
    known = PARTS if known is None else known
    parser = argparse.ArgumentParser(description="One part of python -m profiling.gpu.")
    parser.add_argument("name", choices=known)
    parser.add_argument("--out", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--most", type=int, default=0)
    parser.add_argument("--kept")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--restarted", action="store_true", help="what the last process did not end has killed it")
    options = parser.parse_args()
    end_with_parent()
    # Whatever was started is ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    words = {name: getattr(options, name) for name in ("full", "name", "most", "kept", "rehearse")}
    part = Part(options.out, options.folder, options.seconds, **words)
    if not options.restarted:
        part.journal.forget_begun()
    result, code = run(known[options.name], part)
    write_json(Path(options.folder) / "result.json", result)
    sys.exit(code)


if __name__ == "__main__":
    main()
