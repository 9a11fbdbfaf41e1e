"""A workload under torch.profiler, where Nsight Systems is missing: CUPTI's records on a GPU, dispatched operators on a CPU.

It writes a Chrome trace (chrome://tracing, ui.perfetto.dev), which :func:`read` reads.
"""

import gzip
import json
import zlib

import torch

from advkd.errors import InputError
from advkd.runtime.hub import reason
from advkd.runtime.ranges import name_ranges

from .timeline import COPY, KERNEL, SET, Activity, Span, Trace
from .workloads import WARMUP, command, finished, run_units, synchronize

PREFIX = "advkd: "
"""Prefix of the ranges that :mod:`advkd.runtime.ranges` names for torch.profiler."""
KINDS = {"kernel": KERNEL, "gpu_memcpy": COPY, "gpu_memset": SET}
"""Categories of a GPU's work in the trace."""
CALLS = ("cuda_runtime", "cuda_driver")


def tool(device):
    """Name of the tool, for the page."""
    recorder = "CPU" if torch.device(device).type == "cpu" else "CUPTI"
    return f"torch.profiler {torch.__version__} ({recorder})"


def record(name, variant, device, size, repeats, path):
    """One workload in a process of its own; returns its :class:`Trace`, whose file stays at ``path``."""
    words = command(name, variant, device, size, f"--repeats={repeats}", f"--trace={path}")
    finished(words, f"{name}, {variant}: torch.profiler", ADVKD_RANGES="")
    trace = read(path)
    if torch.device(device).type == "cuda" and not trace.on_gpu:
        raise InputError(f"{name}, {variant}: torch.profiler recorded no work of the GPU (CUPTI may not be allowed to)")
    return trace


def profile(call, repeats, device, path):
    """Warm up, then record so many units of work into a Chrome trace."""
    for _ in range(WARMUP):
        call()
    synchronize(device)
    gpu = torch.device(device).type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
    name_ranges("torch")
    try:
        with torch.profiler.profile(activities=activities) as recorded:
            run_units(call, repeats, device)
    finally:
        name_ranges("")
    recorded.export_chrome_trace(str(path))


def read(path):
    """The :class:`~profiling.trace.timeline.Trace` of a Chrome trace, compressed or not."""
    trace = Trace()
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
            for event in json.load(file)["traceEvents"]:
                if event.get("ph") == "X":
                    _add(trace, event, event.get("cat", "").lower())
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a whole Chrome trace ({reason(error)}): record it again") from error
    trace.on_gpu = bool(trace.activities)
    return trace


def _add(trace, event, category):
    start, name, more = 1e3 * event["ts"], event["name"], event.get("args", {})
    end = start + 1e3 * event.get("dur", 0)
    if category == "user_annotation" and name.startswith(PREFIX):
        trace.ranges.append(Span(start, end, name.removeprefix(PREFIX), thread=event["tid"]))
    elif category == "cpu_op" and not name.startswith(PREFIX):
        trace.operators.append(Span(start, end, name, thread=event["tid"]))
    elif category in CALLS and "correlation" in more:
        correlation = more["correlation"]
        trace.calls[0, correlation] = min(start, trace.calls.get((0, correlation), start))
    elif category in KINDS:
        kind, size = KINDS[category], more.get("bytes", 0)
        trace.activities.append(Activity(start, end, name, kind, more.get("correlation", -1), bytes=size))
