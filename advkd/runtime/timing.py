"""Wall-clock times and their provenance."""

import importlib.metadata
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

VERSIONED = ("torch", "diffusers", "triton", "torchmetrics", "onnxruntime", "openvino", "ncnn", "nvidia-cudnn-frontend")


def measure(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int = 10,
    warmup: int = 1,
    device: str | torch.device = "cpu",
    settle: float = 0.0,
) -> dict[str, dict[str, float]]:
    """Time functions in turn, in a new random order each round, so that changes of the machine's speed affect all alike.

    Args:
        calls: ``{name: function}``, functions without arguments.
        repeats: timed rounds.
        warmup: untimed rounds before them.
        device: of their work; a GPU is synchronized.
        settle: seconds of rest before each timed call, followed by an untimed one, so that the spinning threads of the engine
            before it take no core away.

    Returns:
        ``{name: {"median": s, "p20": s, "p80": s, "repeats": n}}`` in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffler, device = random.Random(0), torch.device(device)
    for i in range(warmup + repeats):
        for name in shuffler.sample(list(calls), len(calls)):
            if settle:
                time.sleep(settle)
                calls[name]()
            _synchronize(device)
            begin = time.perf_counter()
            calls[name]()
            _synchronize(device)
            if i >= warmup:
                times[name].append(time.perf_counter() - begin)
    return {name: percentiles(values) for name, values in times.items()}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of some numbers, and their count."""
    p20, median, p80 = torch.quantile(
        torch.tensor(values, dtype=torch.float64, device="cpu"),
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64, device="cpu"),
    ).tolist()
    return {"median": median, "p20": p20, "p80": p80, "repeats": len(values)}


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def provenance(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Commit, dirty flag, device, threads and versions, as a JSON-ready dict. Unknown ones are None."""
    device = torch.device(device)
    gpu = device.type == "cuda"
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _dirty(),
        "device": torch.cuda.get_device_name(device) if gpu else processor(),
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONED},
    }


def _git(*arguments):
    """Output of git in the checkout of this package; None for an installed copy."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _dirty():
    # New sources count, new results do not.
    status = _git("status", "--porcelain", "--", "advkd", "kernels", "csrc", "setup.py", "profiling/*.py")
    return None if status is None else bool(status)


def processor_identity() -> str:
    """Model, family, stepping and cache size: virtual machines often name very different processors alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    x86 = ("cpu family", "model", "stepping", "cache size")
    arm = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part")
    return " ".join([processor(), *(f"{values[name]}" for name in (*x86, *arm) if name in values)])


def processor() -> str:
    """The system's name for the processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver():
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
