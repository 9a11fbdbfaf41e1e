"""Measurement of every speed claim of this project: parity first, then peers and ours in turn, then JSON with provenance.

A benchmark is a list of cases. A case names the work, gives the float64 oracle's output and the contestants that do the work:
ours, the baseline, and the best configuration of the best peers. A contestant whose output is off is not timed and the command
fails; one that is not installed is recorded with the reason. Times are of whole calls in one process, contestants in turn.
On a GPU a call stands beside the same work as a captured CUDA graph, which costs no Python.
"""

import argparse
import functools
import importlib.util
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from advkd.runtime import timing
from advkd.runtime.files import write_json
from advkd.runtime.hub import reason
from advkd.runtime.timing import measure

from .evidence import RESULTS, ROOT, cpu_digests, device_of, gpu_digests, time_of

SETTLE = 0.1
"""Seconds of rest before each timed call: other engines' idle threads spin for some of that."""


SEED = 1
"""Seed of torch's generator at the beginning of a call that is checked."""


@dataclass
class Contestant:
    """One way to do a case's work.

    Attributes:
        name: what the tables call it.
        prepare: function without arguments that gives the function to time (which returns a tensor, or a list of the
            images of one). A peer whose
            preparation fails is recorded with the reason (not installed, no compiler, no export); ours may only lack an
            optional package.
        kind: ``ours``, ``baseline``, ``peer``, or ``floor``: other work that moves as many bytes, neither compared nor beaten.
        oracle: its own float64 result, where it differs from the case's (it draws other noise, say).
        captured: its call replays a CUDA graph over tensors that stay where they are.
        costly: its preparation takes minutes; it comes when all others have been timed.
    """

    name: str
    prepare: object
    kind: str = "peer"
    oracle: object = None
    captured: bool = False
    costly: bool = False


SAMPLE = 2e-3
"""Seconds that one sample takes at least: so many calls in a row that an event's resolution and the host do not count."""
MOST = 200
"""Calls of a sample at most."""


def measure_events(calls, repeats=20, warmup=3, device="cuda"):
    """Time functions in turn, in a new random order each round: seconds per call of calls in a row.

    Args:
        calls: ``{name: function}``; a function's attribute ``units`` says how many calls one is (a graph of several, say).
        repeats: timed rounds.
        warmup: calls of each before them.
        device: whose current stream they run on.

    Returns:
        As :func:`advkd.runtime.timing.measure`, with ``calls``: how many a sample holds.
    """
    counts = {name: _calls_per_sample(call, warmup, device) for name, call in calls.items()}
    times, shuffler = {name: [] for name in calls}, random.Random(0)
    for _ in range(repeats):
        for name in shuffler.sample(list(calls), len(calls)):
            times[name].append(_sample(calls[name], counts[name], device) / getattr(calls[name], "units", 1))
    return {name: {**timing.percentiles(values), "calls": counts[name]} for name, values in times.items()}


def _calls_per_sample(call, warmup, device):
    _sample(call, max(warmup, 1), device)
    return max(1, min(MOST, round(SAMPLE / max(_sample(call, 3, device), 1e-7))))


def _sample(call, count, device):
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


class Replay:
    """``function(i)`` for i = 0 .. units - 1, captured as one CUDA graph; a call replays it and returns the first result.

    With inputs that together exceed the second-level cache, no call finds its own there.

    Args:
        function: whatever it reads stays where it is; what it draws from torch's default generator is new in every replay.
        units: calls in the graph.
        grad: record gradients inside, for functions that differentiate.

    Raises:
        RuntimeError: something inside cannot be captured.
    """

    def __init__(self, function, units=1, grad=False):
        self.units = units
        caller, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(caller)
        with torch.cuda.stream(stream), torch.set_grad_enabled(grad):
            # Algorithms are chosen, kernels compiled and loaded before anything is captured.
            for _ in range(3):
                function(0)
        caller.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=stream), torch.set_grad_enabled(grad):
                self.results = [function(i) for i in range(units)]
        finally:
            # A capture that fails leaves its own stream behind as the current one.
            torch.cuda.set_stream(caller)
        # Numbers that a replay does not write are not mistaken for its result.
        poison(self.results)

    def __call__(self):
        self.graph.replay()
        return self.results[0]


def poison(results):
    """Fill tensors of floating-point numbers, and those in lists and tuples, with NaN."""
    if isinstance(results, (list, tuple)):
        for result in results:
            poison(result)
    elif isinstance(results, torch.Tensor) and results.is_floating_point():
        with torch.no_grad():
            results.fill_(float("nan"))


def captures(device):
    """True if work on the device can be captured as a CUDA graph."""
    return torch.device(device).type == "cuda"


def sets_beyond_cache(moved_bytes, device="cuda", most=64):
    """Number of sets of inputs and outputs, of so many bytes each, that exceed the second-level cache three times."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(most, -(-3 * cache // moved_bytes)))


def peaks(device="cuda"):
    """Rates of the card on random numbers, a matrix product's and a copy's.

    Returns:
        ``{"flops": {product: per second}, "bandwidth": bytes per second, "samples": {what: seconds}}``.
    """
    flops, samples = {}, {}
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("f16", torch.float16, False), ("tf32", torch.float32, True)):
        set_tf32(tf32)
        n = 8192 if dtype.itemsize == 2 else 4096
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        samples |= measure_events({f"product, {name}": lambda a=a, b=b: a @ b}, 10)
        flops[name] = 2 * n**3 / samples[f"product, {name}"]["median"]
    set_tf32(False)
    # Full float32 on tensor cores is three products of TensorFloat-32.
    flops["f32"] = flops["tf32"] / 3
    x = torch.randn(2**29, device=device)
    y = torch.empty_like(x)
    samples |= measure_events({"copy": lambda: y.copy_(x)}, 10)
    return {"flops": flops, "bandwidth": 2 * x.nbytes / samples["copy"]["median"], "samples": samples}


def set_tf32(allowed):
    """torch's switches, for everyone: TensorFloat-32 or full float32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


CAPTURED = ", captured"
"""Ends the name of a contestant that is another one's work as a CUDA graph."""


def with_captured(contestants, device, grad=False, leave=()):
    """On a GPU each contestant, and behind it the same work captured as a CUDA graph; elsewhere the contestants.

    Args:
        contestants: their calls read and write tensors that stay where they are.
        device: where they run.
        grad: they differentiate.
        leave: names of those whose work is not captured: it depends on the host.
    """
    if not captures(device):
        return contestants
    found = []
    for contestant in contestants:
        contestant = replace(contestant, prepare=functools.cache(contestant.prepare))
        found += [contestant] if contestant.name in leave else [contestant, _captured(contestant, grad)]
    return found


def _captured(contestant, grad):
    def prepare():
        call = contestant.prepare()
        return Replay(lambda i: call(), grad=grad)

    kind = "peer" if contestant.kind == "baseline" else contestant.kind
    return replace(contestant, name=contestant.name + CAPTURED, prepare=prepare, kind=kind, captured=True)


def copying(name, moved_bytes, device):
    """A floor: a copy that reads and writes so many bytes together."""
    source, target = (torch.ones(-(-moved_bytes // 8), device=device) for _ in range(2))
    return Contestant(name, lambda: lambda: target.copy_(source), "floor")


@dataclass
class Case:
    """One piece of work.

    Attributes:
        name: of the case, unique in its benchmark.
        oracle: function without arguments that gives the float64 result.
        tolerance: largest absolute difference from the oracle.
        contestants: of the case.
        images: images per call.
        flop: floating-point operations per call (direct count), or None.
        moved_bytes: bytes that a call must at least read and write, or None.
        repeats: timed calls of each contestant.
        device: where the work is done. On a GPU ours that cannot run is recorded instead of raised, and the others are timed;
            the gate is red all the same.
        notes: other figures of the case, for its JSON.
    """

    name: str
    oracle: object
    tolerance: float
    contestants: list = field(default_factory=list)
    images: int = 1
    flop: int | None = None
    moved_bytes: int | None = None
    repeats: int = 20
    device: str = "cpu"
    notes: dict = field(default_factory=dict)


def provenance(device="cpu"):
    """:func:`advkd.runtime.timing.provenance`, and the kernels as they are."""
    return {**timing.provenance(device), "kernels": {**cpu_digests(), **gpu_digests()}}


def device_folder(device="cpu"):
    """The results' folder for this machine's device."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_of(provenance(device)).lower()).strip("-")


def run(name, cases, parity_tests, out=None, device="cpu"):
    """Run the parity tests, then every case; write ``<name>.json`` and return whether all gates were green.

    On a GPU it is ``<name>_cuda.json``: other contestants, other tables.

    Args:
        name: of the benchmark.
        cases: functions without arguments that give a :class:`Case` (built one after the other, to bound memory).
        parity_tests: pytest arguments (files below the root); they must pass before anything is timed.
        out: folder, default :func:`device_folder`.
        device: where the cases run.
    """
    if not gate(name, parity_tests):
        return False
    name += "" if torch.device(device).type == "cpu" else "_cuda"
    green, path = True, Path(out or device_folder(device)) / f"{name}.json"
    for build in cases:
        result = run_case(build())
        result["provenance"] = provenance(device)
        green &= is_green(result)
        print(format_case(result), flush=True)
        kept = [c for c in (read(name, path.parent) or {"cases": []})["cases"] if c["case"] != result["case"]]
        stored = {"benchmark": name, "cases": [*kept, result], "parity_tests": parity_tests, "provenance": provenance(device)}
        write_json(path, stored)
    return green


def is_green(result):
    """True if every contestant that ran passed parity and ours ran: all of ours but those that :data:`EXCUSES` excuse."""
    entries = result["contestants"]
    ours = [e for e in entries if e["kind"] == "ours"]
    broken = [e for e in ours if "missing" in e and not any(excuse in e for excuse in EXCUSES)]
    ran = not ours or any("parity" in e for e in ours)
    return ran and not broken and all(e["parity"]["passed"] for e in entries if "parity" in e)


EXCUSES = ("absent", "pending")
"""Keys of an entry without a time that is no failure: the optional package that is not installed, or no time as yet."""


def gate(name, parity_tests):
    """True if pytest passes on these arguments, with at least one test that ran; otherwise it says so."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *parity_tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    print("\n".join([*(line for line in lines if line.startswith(("FAILED", "ERROR"))), *lines[-1:]]), flush=True)
    green = done.returncode == 0 and re.search(r"\b[1-9]\d* passed", done.stdout) is not None
    if not green:
        print(f"{name}: the parity tests failed or none ran, nothing was timed", file=sys.stderr)
    return green


def run_case(case, costly=True):
    """Check and time one case; returns its JSON.

    Args:
        case: the :class:`Case`.
        costly: prepare the costly contestants, too; without them their entries are ``pending``.
    """
    wanted = case.oracle().to(case.device)
    entries = [_entry(contestant) for contestant in case.contestants]
    pairs, calls = zip(case.contestants, entries, strict=True), {}
    for contestant, entry in sorted(pairs, key=lambda pair: pair[0].costly):
        if costly or not contestant.costly:
            _prepare(case, contestant, entry, wanted, calls)
    return _result(case, entries, calls)


def _entry(contestant):
    entry = {"name": contestant.name, "kind": contestant.kind, "missing": "not prepared yet", "pending": True}
    return {**entry, "captured": True} if contestant.captured else entry


def _prepare(case, contestant, entry, wanted, calls):
    """Add the contestant's call to those that are timed, or the reason why it is not to its entry."""
    del entry["missing"], entry["pending"]
    try:
        call = contestant.prepare()
        torch.manual_seed(SEED)
        found = call()
    except Exception as error:
        absent = absent_package(error)
        if contestant.kind == "ours" and not captures(case.device) and not absent:
            raise
        entry["missing"] = f"{type(error).__name__}: {reason(error)}"
        if absent:
            entry["absent"] = absent
        return
    if contestant.kind != "floor":
        error = largest_difference(found, contestant.oracle() if contestant.oracle else wanted)
        entry["parity"] = {"error": error, "tolerance": case.tolerance, "passed": bool(error <= case.tolerance)}
        if not entry["parity"]["passed"]:
            return
    calls[contestant.name] = call


def absent_package(error):
    """The optional package that an import failed for because it is not installed, or None: anything else is a fault."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    own = name in ("", "advkd", "kernels", "profiling", "tests")
    return None if own or importlib.util.find_spec(name) else name


def largest_difference(found, wanted):
    """Largest absolute difference in float64 on the device of ``found``, or of its images; infinite where shapes differ."""
    found = torch.stack([torch.as_tensor(part) for part in found]) if isinstance(found, list) else torch.as_tensor(found)
    if found.shape != wanted.shape:
        return float("inf")
    return (found.double() - wanted.to(found.device).double()).abs().max().item()


def _result(case, entries, calls):
    entries, times = [dict(entry) for entry in entries], timed(calls, case.repeats, case.device)
    for entry in entries:
        if entry["name"] in times:
            entry["seconds"] = times[entry["name"]]
            if case.flop:
                entry["flop_per_second"] = case.flop / entry["seconds"]["median"]
    figures = {"images": case.images, "flop": case.flop, "moved_bytes": case.moved_bytes}
    ratios = {"ratio": _ratio(entries)}
    if any("captured" in entry for entry in entries):
        ways = {"calls": False, "captured": True}
        ratios["ratios"] = {way: _ratio([e for e in entries if ("captured" in e) == graph]) for way, graph in ways.items()}
    return {"case": case.name, **figures, **case.notes, "contestants": entries, **ratios}


def timed(calls, repeats, device):
    """Times of functions in turn, by events on a GPU: :func:`advkd.runtime.timing.measure`'s figures by name."""
    if torch.device(device).type == "cuda":
        return measure_events(calls, repeats, device=device)
    return measure(calls, repeats, warmup=3, device=device, settle=SETTLE)


def _ratio(entries):
    """Time of the fastest that is not ours by the time of our fastest; a floor counts for neither."""
    timed = [
        (entry["kind"] == "ours", entry["seconds"]["median"])
        for entry in entries
        if "seconds" in entry and entry["kind"] != "floor"
    ]
    ours, others = ([seconds for own, seconds in timed if own == side] for side in (True, False))
    return min(others) / min(ours) if ours and others else None


def format_case(result):
    """A case's result as text."""
    entries = [(e["name"], f"cannot run: {e['missing']}" if "missing" in e else time_of(e)) for e in result["contestants"]]
    return "\n".join([f"{result['case']} ({result['images']} images), ms", *(f"  {name:32} {said}" for name, said in entries)])


@dataclass(frozen=True)
class Sweep:
    """Figures without contestants: of one piece of work by batch, size, threads, processes or engine.

    Attributes:
        name: of ``<name>.json``, and of its plot.
        measure: function of the options that gives the result.
        parity_tests: pytest arguments; they must pass before anything is timed.
        tables: :class:`profiling.evidence.Table` of the result, for the terminal.
        plot: function of the result and a path, or None.
        options: ``{name: default}`` of the values that ``measure`` takes, which the command line takes too; ``device`` is that
            of the result.
    """

    name: str
    measure: Callable
    parity_tests: list
    tables: tuple = ()
    plot: Callable | None = None
    options: dict = field(default_factory=dict)

    def run(self, out=None, **options):
        """Measure and store; returns whether the parity tests were green.

        Args:
            out: folder, default :func:`device_folder`.
            options: those that differ from their defaults.
        """
        if not gate(self.name, self.parity_tests):
            return False
        options = {**self.options, **options}
        device = options.get("device", "cpu")
        path = Path(out or device_folder(device)) / f"{self.name}.json"
        result = {**self.measure(**options), "parity_tests": self.parity_tests, "provenance": provenance(device)}
        write_json(path, result)
        if self.plot:
            self.plot(result, path.with_suffix(".png"))
        shown = {**result, "path": str(path)}
        print(path, *(line for table in self.tables for line in table.of(shown)), sep="\n", flush=True)
        return True


def main(sweeps=None, name="", cases=None, parity_tests=()):
    """The command line of what is measured: a benchmark's cases and, on a CPU, the sweeps that follow them.

    Args:
        sweeps: ``{name: }`` :class:`Sweep`.
        name: of the benchmark.
        cases: function of the device that gives a dict.
        parity_tests: of the cases.
    """
    sweeps, options = sweeps or {}, {"device": "cpu"}
    for sweep in sweeps.values():
        options |= sweep.options
    parser = argparse.ArgumentParser(description="Parity first, then times, as JSON.")
    parser.add_argument("--out", help="folder for the JSON (default: profiling/results/<device>)")
    parser.add_argument("--only", default="", help="what is measured: cases and sweeps whose name holds this text")
    for key in sweeps:
        parser.add_argument(f"--{key}", dest="only", action="store_const", const=key, help=f"the same as --only {key}")
    for option, default in options.items():
        parser.add_argument(f"--{option}", type=type(default), default=default, help=f"default: {default}")
    given = parser.parse_args()
    known = cases(given.device) if cases else {}
    behind = {key: sweep for key, sweep in sweeps.items() if given.device == "cpu" or "device" in sweep.options}
    builds, chosen = ({key: work for key, work in works.items() if given.only in key} for works in (known, behind))
    if not builds and not chosen:
        names = ", ".join([*known, *behind]) or "none, see --device"
        parser.error(f"--only {given.only}: no such case on {given.device} (known: {names})")
    green = not builds or run(name, builds.values(), parity_tests, given.out, given.device)
    for sweep in chosen.values():
        green &= sweep.run(given.out, **{option: getattr(given, option) for option in sweep.options})
    sys.exit(0 if green else 1)


def read(name, folder=None):
    """A benchmark's stored result, or None."""
    path = Path(folder or device_folder()) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
