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

from advkd.files import cache_folder, write_json
from advkd.hub import reason
from advkd.ops import backends
from advkd.timing import provenance

from . import bench_student, gpu_kept, gpu_predictions
from .gpu_kept import test_digest
from .gpu_kernels import digests
from .gpu_test_log import BROKEN, COLLECTED, broken, forget_begun, read_log
from .gpu_timing import peaks
from .harness import ROOT, absent_package, format_case, is_green, run_case
from .parent import end_with_parent

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

    def keep_partly(self, name, found):
        """What is known of an item that goes on."""
        self._keep(name, {"state": "begun", **found})

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
    if objects_are_current() and part.journal.run("prebuilt", lambda: _load(part))["state"] == "done":
        return {"prebuilt": True}
    part.journal.items.pop("prebuilt", None)
    environment = {**os.environ, "ADVKD_CPU": "1", "ADVKD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": flag}
    part.journal.run("compile", lambda: _logged([sys.executable, "setup.py", "build_ext", "--inplace"], part, environment))
    part.journal.run("load", lambda: _load(part))
    return {"prebuilt": False, "architectures": flag}


REHEARSED = "9.0a"
"""The architecture that a rehearsal builds for."""

LOADS = """
import sys
from advkd.ops.backends import extension_gap
gaps = [gap for gap in map(extension_gap, sys.argv[1:]) if gap]
print(*gaps, sep="\\n")
sys.exit(bool(gaps))
"""


def _load(part):
    """Load the objects in a fresh process; without a GPU that of the CPU alone."""
    kinds = ("cpu",) if part.rehearse else ("cuda", "cpu")
    return _logged([sys.executable, "-c", LOADS, *kinds], part)


def objects_are_current(root=ROOT):
    """Whether both objects are there and were linked from the sources as they are."""
    identity = runpy.run_path(str(root / "setup.py"), run_name="setup")["source_identity"]
    paths = {kind: root / "advkd" / f"_{kind}.abi3.so" for kind in ("cpu", "cuda")}
    return all(path.exists() and bytes.fromhex(identity(kind)) in path.read_bytes() for kind, path in paths.items())


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
    shards = part.processes(12)
    logs = [part.folder / f"tests-{i}.jsonl" for i in range(shards)]
    seen = _seen(part)
    (part.folder / "seen.json").write_text(json.dumps(seen))
    gate = [*GATE, f"--gpu-seen={part.folder / 'seen.json'}", f"--gpu-most={part.most}", *(DRY if part.rehearse else [])]
    gate += ["--continue-on-collection-errors", *gpu_test_files()]
    threads = str(max(1, (os.cpu_count() or 1) // shards))
    hang = min(HANG, 0.6 * part.left())
    workers = [TestWorker(logs[i], [*gate, f"--gpu-shard={i}/{shards}"], threads, hang) for i in range(shards)]
    for log in logs:
        forget_begun(log)
    try:
        while any([worker.poll() for worker in workers]) and part.left() > 3:
            time.sleep(0.5)
    finally:
        # Tests that are stopped here for want of time are not yet run.
        stopped = {worker.running() for worker in workers}
        for worker in workers:
            worker.stop()
    known = [read_log(log) for log in logs]
    found = {test: entry for log in known for test, entry in log.items() if test not in (COLLECTED, *stopped)}
    # A process that had no time to collect has named none.
    late = sum(COLLECTED not in log for log in known)
    left = sorted({test for log in known for test in log.get(COLLECTED, {"tests": []})["tests"]} - set(found))
    broken_off = [i for i, worker in enumerate(workers) if worker.process.returncode in (2, 3, 4)]
    if broken_off:
        raise RuntimeError(f"pytest could not run: see {logs[broken_off[0]].with_suffix('.txt')}")
    if left or late:
        part.unfinished = f"no time for {len(left)} of {len(left) + len(found)} tests" + late * ", nor to collect a share"
    found = {**seen, **{test: {**entry, "of": test_digest(test.partition("::")[0])} for test, entry in found.items()}}
    outcomes = [entry["outcome"] for entry in found.values()]
    counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    print(f"tests: {counts}, {len(seen)} of them before", flush=True)
    gaps = {kind: backends.gap("sampler_step", kind, torch.device("cuda")) for kind in ("cuda", "triton")}
    failures = [test for test, entry in found.items() if entry["outcome"] in ("failed", "died")]
    part.red = bool(failures) or not counts.get("passed")
    return {"tests": found, "counts": counts, "failures": sorted(failures), "gaps": gaps, "left": left, "late": late, "processes": shards}


DRY = ["-p", "tests.gpu_dry_run", "--gpu-dry"]
"""pytest's words for a run of GPU tests up to the first launch of a kernel, without a GPU."""


def _seen(part):
    """``{test: entry}``: what has passed on these sources in an earlier run, and what the first tests of this run gave."""
    found = gpu_kept.passed_tests(part.kept) if part.kept else {}
    first = part.out / "gpu_first_tests.json"
    if part.name == "tests" and first.exists():
        found |= json.loads(first.read_text())["result"].get("tests", {})
    return found


def gpu_test_files():
    """The files that hold such tests, so that no other has to be imported."""
    paths = sorted((ROOT / "tests").glob("*/test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if re.search(r"mark\.gpu|import .*\bDEVICES\b", path.read_text())]


class TestWorker:
    """pytest over one share of the tests, started again after a test that took its process along."""

    __test__ = False

    def __init__(self, log, arguments, threads="1", hang=HANG):
        self.log, self.hang, self.starts, self.environment = log, hang, 0, {**os.environ, "OMP_NUM_THREADS": threads}
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
    "tests/ops/test_conv_block_triton.py",
    "tests/ops/test_training_cuda.py",
    "tests/ops/test_sampler_step.py",
)
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
        return {"selection": f"{part.most} cases of every GPU test function of {', '.join(SANITIZED)}"}

    return run


def _sanitize(part, tool, name, options):
    log = part.folder / f"{name}.jsonl"
    log.unlink(missing_ok=True)
    files = [file for file in SANITIZED if (ROOT / file).exists()]
    command = [tool, "--tool", name, *options, "--error-exitcode", "99", "--target-processes", "all"]
    if part.rehearse:
        command = []
    command += [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "gpu and not slow", "-k", "not captured and not graph"]
    command += ["-p", "profiling.gpu_test_log", *(DRY if part.rehearse else [])]
    command += [f"--gpu-log={log}", f"--gpu-most={part.most}", *files]
    # Every tensor is an allocation of its own, so that padding stands between any two; nothing can be captured that way.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=part.left())
    if part.rehearse:
        return {"code": done.returncode, "red": bool(done.returncode), "tail": done.stdout[-2000:]}
    return {"code": done.returncode, **sanitizer_verdict(done.stdout + done.stderr, done.returncode, read_log(log))}


def sanitizer_verdict(text, code, log):
    """Errors that the tool counted and tests that ran; red unless the tool reported, found nothing, and every test passed."""
    summary = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    errors = sum(int(a or b) for a, b in summary)
    outcomes = [entry["outcome"] for test, entry in log.items() if test != COLLECTED]
    bad = [test for test, entry in log.items() if entry["outcome"] in ("failed", "died")]
    red = code != 0 or errors > 0 or not summary or "passed" not in outcomes
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
"""What a rehearsal says of a step that it cannot do."""


def rates(part):
    """The card's own rates, which floors are counted with."""
    return part.journal.run("rates", peaks if not part.rehearse else lambda: {NEEDS_DEVICE: "rates"})


def bench(name):
    """A part that runs a benchmark's cases."""

    def run(part):
        module = importlib.import_module(f"profiling.{name}")
        cases = module.cases("cuda") if part.full or not hasattr(module, "quick_cases") else module.quick_cases()
        chosen = REHEARSED_CASES.get(name, QUICK[name]) if part.rehearse else QUICK[name]
        wanted = list(cases) if part.full else [case for case in chosen if case in cases]
        _use_measured_rates(part)
        gate = parity_gate(module.PARITY_TESTS, part)
        print(f"parity tests: {gate}", flush=True)
        known = gpu_kept.cases(part.kept, name) if part.kept else {}
        for case in wanted:
            if part.left() < 5:
                break
            work = functools.partial(_measured, part, case, cases[case])
            part.journal.run(case, lambda case=case, work=work: known[case] if case in known else work())
        missing = [case for case in wanted if case not in part.journal.items]
        if missing:
            part.unfinished = f"no time for {len(missing)} cases: {', '.join(missing)}"
        if gate["state"] == "incomplete":
            part.unfinished = part.unfinished or "the parity tests are not through yet"
        part.red |= gate["state"] in ("red", "none ran")
        done = [value for value in part.journal.items.values() if value["state"] == "done"]
        cases_found = [{k: v for k, v in value.items() if k not in ("state", "red", "item_seconds")} for value in done]
        return {"benchmark": name, "cases": cases_found, "gate": gate, "parity_tests": module.PARITY_TESTS, "wanted": wanted}

    return run


def _use_measured_rates(part):
    """Floors are counted with the card's own rates where part ``rates`` has them."""
    path = part.out / "gpu_rates.json"
    found = json.loads(path.read_text())["result"].get("items", {}).get("rates", {}) if path.exists() else {}
    if "flops" in found:
        bench_student.MEASURED_RATES[:] = [gpu_predictions.H200.measured(found["flops"], found["bandwidth"])]


def _measured(part, name, build_case):
    begin = time.monotonic()
    if part.rehearse:
        from tests import gpu_dry_run

        with gpu_dry_run.stand_in(most_bytes=2**30):
            return rehearsed(build_case())
    result = _described(run_case(build_case(), keep=lambda found: part.journal.keep_partly(name, _described(found))))
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
    """Whether the GPU tests of these files pass: what part ``tests`` has found in the same tree, else a few of each now."""
    stored = part.out / "gpu_tests.json"
    found = json.loads(stored.read_text()) if stored.exists() else None
    if found is None or found["kernels"] != digests() or "tests" not in found["result"]:
        log = part.folder / "gate.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "profiling.gpu_test_log", f"--gpu-log={log}"]
        command += ["--gpu-most=0" if part.full else f"--gpu-most={GATE_CASES}", *(f for f in files if (ROOT / f).exists())]
        subprocess.run(command, cwd=ROOT, timeout=part.left())
        known, through = read_log(log), True
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
    failed = part.journal.failed()
    result = {**found, "failed_items": failed}
    if "cases" not in result and "tests" not in result:
        result["items"] = part.journal.items
    elif failed:
        result["errors"] = {name: part.journal.items[name].get("error", "red") for name in failed}
    if part.unfinished:
        result["unfinished"] = part.unfinished
    return result, 3 if part.unfinished else int(bool(failed or part.red))


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
