"""Every measured op beside what this machine allows: its ceilings, a plot, and a table with the fraction of the limit.

python -m profiling.roofline [--device cuda] [--out FOLDER]

Ceilings are measured here and now: the bandwidth of a copy too large for any cache, and products per second of each dtype, on a
CPU in registers by the project's own kernels and in a large matrix product by torch. Points come from the stored benchmarks of
this device, with the count of operations that defines the work; a kernel that makes fewer (Winograd, phases) may pass 100 %.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from advkd.files import replacing, write_json
from advkd.ops import backends
from advkd.timing import measure

from .harness import device_folder, provenance, read

BENCHMARKS = ("bench_student", "bench_teacher", "bench_sampler_step", "bench_norm_act")
COPY_BYTES, MATRIX = 2**28, 1536


@dataclass(frozen=True)
class Point:
    """One benchmark's case: its work, and what our fastest contestant made of it.

    Attributes:
        name: of the case.
        dtype: whose ceiling holds.
        flop, moved_bytes: that the work needs by definition; flop may be 0.
        seconds: median of a call.
    """

    name: str
    dtype: str
    flop: float
    moved_bytes: float
    seconds: float

    def fraction(self, ceilings):
        """Of the speed that the tighter of the two ceilings allows."""
        limit = max(self.flop / ceilings["flops"][self.dtype], self.moved_bytes / ceilings["bandwidth"])
        return limit / self.seconds

    def bound(self, ceilings):
        """Which ceiling that is."""
        wide = self.flop / ceilings["flops"][self.dtype] > self.moved_bytes / ceilings["bandwidth"]
        return "products" if wide else "memory"


def ceilings(device):
    """``{"flops": {dtype: per second}, "bandwidth": bytes per second}``, the best of several measurements."""
    if device != "cpu":
        from .gpu_timing import peaks

        found = peaks(device)
        names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
        return {"flops": {name: found["flops"][kind] for name, kind in names.items()}, "bandwidth": found["bandwidth"]}
    x = torch.randn(COPY_BYTES // 4)
    y = torch.empty_like(x)
    flops = {}
    for code, dtype in enumerate((torch.float32, torch.bfloat16)):
        a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
        rates = [2 * MATRIX**3 / measure({"product": lambda a=a, b=b: a @ b}, 5)["product"]["p20"]]
        if backends.extension_gap("cpu") is None:
            rates.append(2 * torch.ops.advkd_cpu.product_rate(code, 0.2))
        flops[str(dtype).removeprefix("torch.")] = max(rates)
    return {"flops": flops, "bandwidth": 2 * COPY_BYTES / measure({"copy": lambda: y.copy_(x)}, 10)["copy"]["p20"]}


def points(folder, known):
    """Every stored case of the device that has bytes, ours alone. ``known``: dtypes with a ceiling."""
    found = []
    for benchmark in BENCHMARKS:
        for case in (read(benchmark, folder) or {"cases": []})["cases"]:
            ours = [c["seconds"]["median"] for c in case["contestants"] if c["kind"] == "ours" and "seconds" in c]
            dtype = next((name for name in known if name in case["case"]), "float32")
            if ours and case["moved_bytes"]:
                name = f"{benchmark.removeprefix('bench_')}: {case['case']}"
                found.append(Point(name, dtype, case["flop"] or 0, case["moved_bytes"], min(ours)))
    return found


def plot(found, limits, paths, title):
    """Log-log: operations per second by operations per byte. What has no operations stands at the left edge, by its bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), constrained_layout=True)
    edge = 0.05
    right = max([10.0, *(2 * p.flop / p.moved_bytes for p in found)])
    for dtype, rate in limits["flops"].items():
        ridge = rate / limits["bandwidth"]
        axes.loglog([edge, ridge, right], [edge * limits["bandwidth"], rate, rate], "-", label=f"ceiling, {dtype}", lw=1)
    for benchmark in sorted({p.name.partition(":")[0] for p in found}):
        mine = [p for p in found if p.name.startswith(benchmark + ":")]
        x = [max(p.flop / p.moved_bytes, edge) for p in mine]
        y = [(p.flop or edge * p.moved_bytes) / p.seconds for p in mine]
        axes.loglog(x, y, "o", label=benchmark, ms=5)
    axes.set(xlabel="operations per byte that must move", ylabel="operations per second", title=title)
    axes.legend(fontsize=8)
    for path in paths:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110, format=path.suffix[1:])
    pyplot.close(figure)


def rows(result):
    """``[(name, bound, intensity, fraction), ...]`` of a stored result, as its table has them."""
    found = [Point(**point) for point in result["points"]]
    limits = result["ceilings"]
    return [(p.name, p.bound(limits), p.flop / p.moved_bytes, p.fraction(limits)) for p in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", help="folder for the results (default: profiling/results/<device>)")
    options = parser.parse_args()
    folder = device_folder(options.device)
    limits = ceilings(options.device)
    found = points(folder, limits["flops"])
    place = provenance(options.device)
    result = {"ceilings": limits, "points": [vars(p) for p in found], "provenance": place}
    out = Path(options.out or folder)
    write_json(out / "roofline.json", result)
    plot(found, limits, [out / "roofline.png", out / "roofline.svg"], f"{place['device']}, {place['threads']} threads")
    for name, bound, intensity, fraction in rows(result):
        print(f"{name:60} {bound:9} {intensity:9.1f} FLOP/B {100 * fraction:6.1f} %")


if __name__ == "__main__":
    main()
