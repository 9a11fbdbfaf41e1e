"""The part that measures the time to a first image in a fresh process."""

import os
import re
import subprocess
import sys
from pathlib import Path

from advkd.runtime.folders import cache_folder

from ..evidence import ROOT

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
FIRST_IMAGE_SECONDS = 3.0
"""Promised time from the end of the imports to the first image, with everything kept."""


def first_image(part):
    """Seconds from the end of the imports to the first image, with what is compiled and measured kept from before.

    Each is asked of two processes one after the other: the second one must leave every cache as it is.
    """
    for preset in ("digits", "pyramid-256"):
        for backend in ("auto", "cuda"):
            part.run(f"{preset}, {backend}", lambda p=preset, b=backend: _first(part, p, b))
    done = {name: item for name, item in part.items.items() if "kept_seconds" in item}
    said = [f"{name}: {item['first_seconds']:.1f} s, then {item['kept_seconds']:.1f} s" for name, item in done.items()]
    return {"caches": list(map(str, caches())), "said": "; ".join(said)}


def caches():
    """Folders in which compilers and the engine keep their results."""
    home = Path.home()
    usual = {
        "TRITON_CACHE_DIR": home / ".triton/cache",
        "CUPY_CACHE_DIR": home / ".cupy/kernel_cache",
        "CUDA_CACHE_PATH": home / ".nv/ComputeCache",
    }
    return [cache_folder(), *(Path(os.environ.get(name, path)) for name, path in usual.items())]


def _kept():
    return {(str(path), path.stat().st_mtime_ns) for folder in caches() for path in folder.rglob("*") if path.is_file()}


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
    return {
        "first_seconds": seconds[0],
        "kept_seconds": seconds[1],
        "compiled_again": again[:20],
        "red": bool(again) or seconds[1] >= FIRST_IMAGE_SECONDS,
    }
