"""Which kernels a result has measured, as digests of their sources: a table of kernels that have changed since says so."""

import hashlib
import re

from . import gpu_kernels
from .paths import ROOT

STUDENT, STEP = ("conv_block", "student_forward"), ("sampler_step", "philox")
CRITIC = ("conv_bias_act_mask", "mask_mul", "penalty_reduce", "interpolate", "image_gradient")
MEASURED = {
    **dict.fromkeys(("bench_student", "layers", "scaling", "precision", "sample_scaling", "billion"), STUDENT),
    **dict.fromkeys(("bench_sampler_step", "step_scaling", "recording", "bench_teacher"), STEP),
    **dict.fromkeys(("bench_gradient_penalty", "penalty_scaling"), CRITIC),
    "bench_norm_act": ("norm_act",),
    "distillation": (*CRITIC, "norm_act"),
    **dict.fromkeys(("traces", "counters", "compare", "demo", "roofline"), (*STUDENT, *STEP, *CRITIC, "norm_act")),
}
"""Result's name -> the kernels in C++ that it measures."""
ELSEWHERE = {
    "sample_scaling": "cases.sampling",
    "demo": "trace.demo",
    "traces": "trace.nsys",
    "counters": "trace.ncu",
    "compare": "trace.compare",
    "ncu": "gpu.launches",
    "ahead": "limits.ahead",
    "roofline": "roofline",
    "billion": "billion",
}
"""Result's name -> the module that measures it, where :func:`module_of` has no rule."""
ON_GPUS = {"conv_block": ("conv_block", "conv_pair", "student_stem"), "student_forward": ()}
"""Kernel in C++ for CPUs -> those that do its work on GPUs, where names differ."""


def module_of(name):
    """The module that measures the results of this name; ``python -m`` runs it."""
    return "profiling." + ELSEWHERE.get(name, f"cases.{name.removeprefix('bench_')}")


def kernel_digests(read=lambda path: (ROOT / path).read_text()):
    """``{kernel: digest}`` of every kernel named in :data:`MEASURED`, each with the headers of the project that it includes.

    ``read``: the text of a path below the root, of this tree or of another commit.
    """
    names = sorted({name for kernels in MEASURED.values() for name in kernels})
    return {name: _digest(f"csrc/cpu/{name}.cpp", read) for name in names}


def _digest(path, read):
    seen, left = {}, [path]
    while left:
        name = left.pop()
        if name not in seen:
            seen[name] = read(name)
            left += [f"csrc/{header}" for header in re.findall(r'^#include "([^"]+)"$', seen[name], re.M)]
    return hashlib.sha256("".join(seen[name] for name in sorted(seen)).encode()).hexdigest()[:12]


def changed(name, result):
    """Kernels of a stored result whose sources are others now; a result without digests has all of them."""
    base = name.removeprefix("gpu_").removesuffix("_cuda")
    places = [result["provenance"], *(case["provenance"] for case in result.get("cases", []) if "provenance" in case)]
    on_gpu = name != base or any(place.get("driver") for place in places)
    now = gpu_kernels.digests() if on_gpu else kernel_digests()
    names = [key for kernel in MEASURED.get(base, ()) for key in (_gpu_keys(kernel, now) if on_gpu else [kernel])]
    # A part of a GPU's run keeps them beside its provenance.
    stored = [result["kernels"]] if "kernels" in result else [place.get("kernels", {}) for place in places]
    return [key for key in names if any(kernels.get(key) != now[key] for kernels in stored)]


def _gpu_keys(kernel, known):
    keys = [f"{kind} {name}" for kind in gpu_kernels.KINDS for name in ON_GPUS.get(kernel, (kernel,))]
    return [key for key in keys if key in known]
