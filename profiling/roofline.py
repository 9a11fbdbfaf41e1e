"""Every measured op beside what this machine allows: its ceilings, a plot, and a table with the fraction of the limit.

python -m profiling.roofline [--device cuda] [--out FOLDER]

Ceilings are measured here and now: the bandwidth of passes that only move memory, and products per second of each dtype, on a
CPU in registers by the project's own kernels and in a large matrix product by torch. Points come from the stored benchmarks of
this device, with the count of operations that defines the work; a kernel that makes fewer (Winograd, phases) may pass
100 %. The ops that no benchmark times alone are timed here, on 64 images of 64 channels and 64x64.
"""

import functools
from operator import itemgetter

import torch

from advkd.data.plots import panels
from advkd.ops import (
    StepCoefficients,
    image_gradient,
    interpolate,
    mask_mul,
    penalty_reduce,
    philox_normal,
    sampler_step,
)
from advkd.ops.conv_bias_act_mask import bias_act_mask
from advkd.ops.mask_mul import mask_bytes
from advkd.runtime.devices import keep_freed_memory
from advkd.runtime.extension import extension_gap
from advkd.runtime.timing import measure, percentiles

from .evidence import Table, changed, device_of, scaled
from .gpu import summary as gpu_summary
from .harness import Sweep, device_folder, main, peaks, provenance, read, timed

OPS = ("conv_bias_act_mask", "mask_mul", "penalty_reduce", "interpolate", "philox", "image_gradient")
PARITY_TESTS = [f"tests/ops/test_{name}.py" for name in OPS]
BENCHMARKS = ("bench_student", "bench_teacher", "bench_sampler_step", "bench_norm_act", "bench_gradient_penalty")
STREAM_BYTES, MATRIX = (2**28, 48 * 2**20), 1536
"""Bytes of the tensors that are moved, and rows of the matrices: larger than any cache, and as the ops' own benchmarks."""

SIDE = 64
"""Side of the images that single ops are timed on."""


def limited(point, limits):
    """A point with its tighter ceiling, the share of the speed that it allows, and operations per byte, None without bytes.

    A point is a benchmark's case and what our fastest contestant made of it: ``name``; ``dtype``, whose ceiling holds; ``flop``
    and ``moved_bytes`` that the work needs by definition, either 0 where there is none, or not counted beside so many
    operations; ``seconds`` of a call, as :func:`advkd.runtime.timing.measure` gives them.
    """
    products, memory = point["flop"] / limits["flops"][point["dtype"]], point["moved_bytes"] / limits["bandwidth"]
    figures = {
        "bound": "products" if products > memory else "memory",
        "fraction": max(products, memory) / point["seconds"]["median"],
    }
    return {**point, **figures, "intensity": point["flop"] / point["moved_bytes"] if point["moved_bytes"] else None}


def _point(name, dtype, flop, moved_bytes, seconds):
    return {"name": name, "dtype": dtype, "flop": flop, "moved_bytes": moved_bytes, "seconds": seconds}


def ceilings(device):
    """``{"flops": {dtype: per second}, "bandwidth": bytes per second}``, each the best of its ``samples``."""
    if device != "cpu":
        found = peaks(device)
        names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "TF32": "tf32"}
        return {**found, "flops": {name: found["flops"][kind] for name, kind in names.items()}}
    moving, flops = streams(), {}
    samples = measure({name: call for name, (_, call) in moving.items()}, 20, warmup=3)
    bandwidth = max(size / samples[name]["p20"] for name, (size, _) in moving.items())
    for code, dtype in enumerate((torch.float32, torch.bfloat16)):
        name = str(dtype).removeprefix("torch.")
        a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
        found = measure({f"product of matrices, {name}": lambda a=a, b=b: a @ b}, 10)
        if extension_gap("cpu") is None:
            rates = [2 * torch.ops.advkd_cpu.product_rate(code, 0.1) for _ in range(10)]
            found[f"products in registers, {name}"] = percentiles([2 * MATRIX**3 / rate for rate in rates])
        flops[name] = max(2 * MATRIX**3 / time["p20"] for time in found.values())
        samples |= found
    return {"flops": flops, "bandwidth": bandwidth, "samples": samples}


def streams():
    """``{name: (bytes that it moves, function)}`` of what does nothing but move memory.

    Torch's copy reads what it overwrites. The kernel of the sampler's step adds two tensors and writes past the caches.
    """
    found = {}
    for size in STREAM_BYTES:
        x, m, y = torch.randn(size // 4), torch.randn(size // 4), torch.empty(size // 4)
        found[f"copy of {size >> 20} MiB"] = 2 * size, lambda x=x, y=y: y.copy_(x)
        if extension_gap("cpu") is None:
            planes = [t.view(1, 1, 1, -1) for t in (x, m, y)]
            sum_of_two = functools.partial(sampler_step, *planes[:2], StepCoefficients(1.0, 1.0, 1.0), out=planes[2])
            found[f"two of {size >> 20} MiB into a third"] = 3 * size, sum_of_two
    return found


def points(folder, known):
    """Points of the device's stored cases whose work is counted (see :func:`limited`), ours alone, and their provenances.

    ``known``: dtypes with a ceiling. Cases of kernels that have changed since say so in their names.
    """
    found, places = [], []
    for benchmark in BENCHMARKS:
        for file, result in stored_cases(folder, benchmark):
            old = ", earlier kernels" if changed(file, result) else ""
            for case in result["cases"]:
                ours = [c["seconds"] for c in case["contestants"] if c["kind"] == "ours" and "seconds" in c]
                named = next((name for name in known if name in case["case"]), "float32")
                dtype = "TF32" if case.get("tf32") else named
                if ours and (case["moved_bytes"] or case["flop"]):
                    name = f"{benchmark.removeprefix('bench_')}: {case['case']}{old}"
                    work = case["flop"] or 0, case["moved_bytes"] or 0
                    found.append(_point(name, dtype, *work, min(ours, key=itemgetter("median"))))
                    places.append(case.get("provenance", result["provenance"]))
    return found, list({place["commit"]: place for place in places}.values())


def stored_cases(folder, benchmark):
    """``[(file's name, result with cases), ...]`` of a benchmark on this device, alone or as a part of a GPU's run."""
    found = []
    for name in (benchmark, f"{benchmark}_cuda", f"gpu_{benchmark}"):
        if result := read(name, folder):
            cases = result["cases"] if "cases" in result else gpu_summary.cases_of(result)
            found.append((name, {**result, "cases": cases}))
    return found


def op_points(device):
    """The ops between a critic's convolutions, its first convolution's data gradient, and noise alone; float32."""
    shape = (64, 64, SIDE, SIDE)
    x, g, y = (torch.randn(shape, device=device) for _ in range(3))
    bias, weight, a = (torch.rand(size, device=device) for size in ((64,), (64, 3, 4, 4), (64,)))
    indices = torch.arange(64, device=device)
    mask = torch.zeros(64, mask_bytes(x), dtype=torch.uint8, device=device)
    d, images = g.to(memory_format=torch.channels_last), (64, 3, 2 * SIDE, 2 * SIDE)
    size, gradient = x.nbytes, 16 * 64 * 3 * SIDE**2
    ops = {
        "bias_act_mask": (0, 2 * size + mask.nbytes, lambda: bias_act_mask(x, bias, 0.2, out=y)),
        "mask_mul": (0, 2 * size + mask.nbytes, lambda: mask_mul(x, mask, 0.2, out=y)),
        "penalty_reduce": (0, 2 * size, lambda: penalty_reduce(g, out=y)),
        "interpolate": (0, 3 * size, lambda: interpolate(x, g, a)),
        "philox_normal": (0, size, lambda: philox_normal(0, indices, shape[1:], stream="x_T")),
        "image_gradient": (2 * d.numel() * 48, size + gradient, lambda: image_gradient(d, weight, images, stride=2, padding=1)),
    }
    times = timed({name: call for name, (_, _, call) in ops.items()}, 15, device)
    return [_point(f"op: {name}", "float32", *ops[name][:2], times[name]) for name in ops]


def plot(result, path):
    """Log-log: operations per second by operations per byte.

    Points without operations stand at the left edge, by their bytes; those without bytes at the right one.
    """
    found, limits, place = result["points"], result["ceilings"], result["provenance"]
    title = f"{device_of(place)}, {place['threads']} threads"
    with panels(path, 5.0) as (axes,):
        edge = 0.05
        right = max([10.0, *(2 * p["flop"] / p["moved_bytes"] for p in found if p["moved_bytes"])])
        for dtype, rate in limits["flops"].items():
            ridge = rate / limits["bandwidth"]
            axes.loglog([edge, ridge, right], [edge * limits["bandwidth"], rate, rate], "-", label=f"ceiling, {dtype}", lw=1)
        for benchmark in sorted({p["name"].partition(":")[0] for p in found}):
            mine = [p for p in found if p["name"].startswith(benchmark + ":")]
            x = [max(p["flop"] / p["moved_bytes"], edge) if p["moved_bytes"] else right for p in mine]
            y = [(p["flop"] or edge * p["moved_bytes"]) / p["seconds"]["median"] for p in mine]
            axes.loglog(x, y, "o", label=benchmark, ms=5)
        axes.set(xlabel="operations per byte that must move", ylabel="operations per second", title=title)
        axes.legend()


def _ceilings(result):
    limits = result["ceilings"]
    rates = ", ".join(f"{1e-9 * rate:.0f} GFLOP/s {dtype}" for dtype, rate in limits["flops"].items())
    return [f"Ceilings: {rates}, {1e-9 * limits['bandwidth']:.1f} GB/s moving memory.", ""]


TABLE = Table(
    "roofline",
    {
        "case": "{name}",
        "bound by": "{bound}",
        "FLOP per byte": scaled("intensity", 1, "{:.1f}"),
        "of the limit": scaled("fraction", 100, "{:.0f} %"),
    },
    lambda result: [limited(point, result["ceilings"]) for point in result["points"]],
    lambda result: [*result["ceilings"]["samples"].values(), *(point["seconds"] for point in result["points"])],
    above=_ceilings,
)


def measured(device):
    """Ceilings, and the points of stored benchmarks and of ops timed here; ``cases`` names the commits of all points."""
    limits = ceilings(device)
    keep_freed_memory()
    found, places = points(device_folder(device), limits["flops"])
    found += op_points(device)
    cases = [{"provenance": place} for place in (provenance(device), *places)]
    return {"ceilings": limits, "points": found, "cases": cases}


SWEEPS = {"roofline": Sweep("roofline", measured, PARITY_TESTS, [TABLE], plot, {"device": "cpu"})}

if __name__ == "__main__":
    main(SWEEPS)
