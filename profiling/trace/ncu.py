"""DRAM bytes, achieved FLOP/s and bandwidth, occupancy and what the warps of the largest kernels wait for, by Nsight Compute.

python -m profiling.trace.ncu [--device cuda] [--only student] [--out FOLDER]

Writes ``counters.json``. Nsight Compute runs every kernel of one unit of work several times, each time from cold caches: bytes
are those of a kernel on its own. Two steps of the teacher's trajectory stand for all. Without it the unit's direct count of
operations (by torch's formulas, of the plain variant) over its measured time is all there is: bytes need ncu. The command ends
with 3 where the tool or the device's counters fail, and with 1 where the variants differ.
"""

import csv
import re
import shutil
import subprocess
from collections import defaultdict
from operator import itemgetter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from advkd.errors import InputError
from advkd.runtime.hub import reason
from advkd.runtime.timing import measure

from ..evidence import source
from .nsys import drive, given, options
from .timeline import TOP, failures, label, number, short, table
from .workloads import FAILURES, LIMIT, VARIANTS, command, finished, last_words, prepare

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
_INSTRUCTIONS = "smsp__sass_thread_inst_executed_op_{}_pred_on.sum"
_TENSOR = "sm__ops_path_tensor_src_{}.sum"
FLOP = {
    **{_INSTRUCTIONS.format(name): weight for name, weight in (("fadd", 1), ("fmul", 1), ("ffma", 2))},
    # Halves come in pairs.
    **{_INSTRUCTIONS.format(name): weight for name, weight in (("hadd", 2), ("hmul", 2), ("hfma", 4))},
    **{_TENSOR.format(name): 1 for name in ("bf16_dst_fp32", "fp16", "fp16_dst_fp16", "fp16_dst_fp32", "tf32_dst_fp32")},
}
"""Counters of executed operations by what one counts; architectures have different ones of tensor cores."""
NCU = "Nsight Compute"
MOST = 4000
"""Kernels of a unit that are counted at most."""
TEACHER_STEPS = 2
REPEATS = 5


def metrics(known):
    """Names of what is asked for: of FLOP, those among ``known`` (``--query-metrics``' text), or all where that is empty.

    Where the card counts half-precision tensor operations by what they add to, the sum of both is left out.
    """
    chosen = [name for name in FLOP if not known or name.partition(".")[0] in known]
    if known and any(_TENSOR.format(f"fp16_dst_{kind}") in chosen for kind in ("fp16", "fp32")):
        chosen = [name for name in chosen if name != _TENSOR.format("fp16")]
    return [*METRICS.values(), *chosen]


def ncu_command(names, options, work):
    """The command line that counts what a process's command line does."""
    wanted = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--target-processes", "all"]
    return ["ncu", *wanted, *options, "--metrics", ",".join(names), *work]


def unit_command(name, variant, device, size, names):
    """The command line that counts the kernels of one unit of work."""
    steps = [f"--steps={TEACHER_STEPS}"] if name == "teacher" else []
    work = command(name, variant, device, size, "--repeats=1", *steps)
    return ncu_command(names, ["--profile-from-start", "off", "--launch-count", str(MOST)], work)


def launches_of(words, what, limit=LIMIT):
    """Run a command line of :func:`ncu_command`; returns the launches that it counted, and its output.

    Raises:
        InputError: there are none, in ncu's own words, such as that counters are for administrators alone.
    """
    done = finished(words, what, limit, ADVKD_RANGES="")
    if launches := read(done.stdout):
        return launches, done.stdout
    raise InputError(f"{what} has counted nothing: {last_words(done)}")


def count(name, variant, device, size):
    """A row of ``counters.json``, by Nsight Compute."""
    said, what = subprocess.run(["ncu", "--query-metrics"], capture_output=True, text=True), f"{name}, {variant}: ncu"
    known = set(said.stdout.split()) if said.returncode == 0 else set()
    row = {"workload": name, "size": size, "device": str(device), "variant": variant, "tool": NCU}
    try:
        launches, _ = launches_of(unit_command(name, variant, device, size, metrics(known)), what)
        if len(launches) >= MOST:
            raise InputError(f"{what}: more than {MOST} kernels in a unit")
        figures = {**counted_launches(launches), "kernels": by_kernel(launches)}
    except FAILURES as error:
        return {**row, "error": reason(error)}
    return {**row, **figures, **({"steps": TEACHER_STEPS} if name == "teacher" else {})}


def read(text):
    """Launches of ``--csv --page raw``: names of columns, their units, then one line per launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    titles, units, *table = [*csv.reader(lines), [], []][: max(len(lines), 2)]
    if any(len(cells) != len(titles) for cells in table) or (table and "Kernel Name" not in titles):
        raise InputError("Nsight Compute's table is cut off or another one: count again with --csv --page raw")
    return [_launch(dict(zip(titles, zip(cells, units, strict=True), strict=True))) for cells in table]


def _launch(cells):
    """A launch's figures, the reasons why its warps wait, and executed operations where they were counted."""
    row = {name: _number(*cells.get(metric, ("", ""))) for name, metric in METRICS.items()}
    waits = {name: row.pop(name) for name in STALLS}
    counts = [FLOP[name] * value for name in FLOP if (value := _number(*cells.get(name, ("", "")))) is not None]
    stalls = {name: value for name, value in waits.items() if value}
    top = max(waits, key=lambda name: waits[name] or 0.0)
    row = {"kernel": cells["Kernel Name"][0], **row, "top_stall": top, "stalls": stalls}
    return {**row, "flop": sum(counts) if counts else None}


def _number(text, unit):
    """A cell in units of one; None for what is no number."""
    number = re.fullmatch(r"[\d.,]+(e[+-]?\d+)?", text)
    return float(text.replace(",", "")) * UNITS.get(unit.lower(), 1) if number else None


def counted_launches(launches):
    """:func:`totals`, of launches with counters."""
    found = totals(launches)
    if found["seconds"] is None:
        raise InputError(
            "Nsight Compute's launches have no counters: the device has none, or they are for administrators alone"
        )
    return found


def totals(launches):
    """Sums of launches and the rates that they reach; None where a figure is missing."""
    figures = {"launches": len(launches)}
    figures |= {name: _sum(launches, name) for name in ("seconds", "dram_bytes", "flop")}
    for name, rate in (("flop", "flop_per_second"), ("dram_bytes", "bytes_per_second")):
        both = [(row[name], row["seconds"]) for row in launches if row[name] is not None and row["seconds"]]
        figures[rate] = sum(count for count, _ in both) / sum(time for _, time in both) if both else None
    figures["occupancy_percent"] = _mean(launches, lambda row: row["occupancy_percent"])
    return figures


def _sum(launches, name):
    values = [row[name] for row in launches if row[name] is not None]
    return sum(values) if values else None


def _mean(launches, of):
    """Mean by time."""
    pairs = [(row["seconds"], of(row)) for row in launches if row["seconds"] and of(row) is not None]
    return sum(time * value for time, value in pairs) / sum(time for time, _ in pairs) if pairs else None


def by_kernel(launches):
    """The kernels that take most time, each with its rates and the three largest reasons to wait, in cycles per issue."""
    groups = defaultdict(list)
    for row in launches:
        groups[row["kernel"]].append(row)
    rows = []
    for kernel, group in groups.items():
        names = {name for row in group for name in row["stalls"]}
        waits = {name: _mean(group, lambda row, name=name: row["stalls"].get(name, 0.0)) for name in names}
        largest = sorted((item for item in waits.items() if item[1]), key=lambda item: -item[1])[:3]
        rows.append({"kernel": kernel, **totals(group), "stalls": dict(largest)})
    return sorted(rows, key=lambda row: -(row["seconds"] or 0.0))[:TOP]


class _Counted(TorchDispatchMode):
    """Operations of what torch has formulas for.

    torch's own FlopCounterMode also names modules, by hooks that autograd's double backward refuses.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords, formula = keywords or {}, flop_registry.get(function._overloadpacket)
        if formula is None:
            with self:
                result = function.decompose(*arguments, **keywords)
            if result is not NotImplemented:
                return result
        result = function(*arguments, **keywords)
        self.total += formula(*arguments, **keywords, out_val=result) if formula else 0
        return result


def counted(call):
    """Operations of a call by torch's formulas; this project's own ops have none."""
    call()
    with _Counted() as counter:
        call()
    return counter.total


def direct(name, device, size):
    """Figures without Nsight Compute: the direct count of the plain variant over each variant's measured time."""
    calls = {variant: prepare(name, variant, device, size) for variant in VARIANTS}
    flop, times = counted(calls["baseline"]), measure(calls, REPEATS, warmup=1, device=device)
    return {
        variant: {"seconds": t["median"], "times": t, "flop": flop, "flop_per_second": flop / t["median"], "dram_bytes": None}
        for variant, t in times.items()
    }


def missing(device):
    """Why Nsight Compute cannot count here, or None."""
    if torch.device(device).type != "cuda":
        return "the work is on a CPU"
    return None if shutil.which("ncu") else "ncu is not on PATH"


def rows_of(name, device, size):
    """Both variants' rows of a workload; a variant that ncu cannot count has its error."""
    if why := missing(device):
        place = {"workload": name, "size": size, "device": str(device)}
        note = {"tool": f"torch's formulas ({torch.__version__})", "not_ncu": why}
        return [{**place, "variant": variant, **note, **row} for variant, row in direct(name, device, size).items()]
    return [count(name, variant, device, size) for variant in VARIANTS]


def main():
    drive(given(options(__doc__.splitlines()[0])), rows_of, "counters.json", lines)


def lines(results, above=source):
    """Markdown of stored counts: units of work, and below them the largest kernels."""
    found = []
    for result in results:
        rows = [row for row in result["rows"] if "error" not in row]
        tools = sorted({row["tool"] for row in rows})
        sure = "counters are of one launch of each kernel" if any(row["tool"] == NCU for row in rows) else ""
        times = [row["times"] for row in rows if "times" in row]
        found += [*above(result, times, sure), f"Counted by {' and '.join(tools)}.", ""]
        found += [*tables_of(rows), *failures(result, "counted")]
    return found[:-1]


def tables_of(rows):
    """Markdown of units of work, and below them of their largest kernels."""
    kernels = [{**row, **kernel} for row in rows for kernel in row.get("kernels", [])]
    return [*table(UNIT_COLUMNS, rows), "", *([*table(KERNEL_COLUMNS, kernels), ""] if kernels else [])]


PLACE = {
    "workload": lambda row: label(row) + (f", {row['steps']} steps" if "steps" in row else ""),
    "variant": itemgetter("variant"),
}
RATES = {"GFLOP/s": number("flop_per_second", 1e-9), "GB/s": number("bytes_per_second", 1e-9)}
OCCUPANCY = {"occupancy": number("occupancy_percent", 1, "{:.0f} %")}
UNIT_COLUMNS = {
    **PLACE,
    "ms": number("seconds", 1e3),
    "GFLOP": number("flop", 1e-9),
    "GFLOP/s": RATES["GFLOP/s"],
    "DRAM MB": number("dram_bytes", 1e-6, nothing="needs ncu"),
    "GB/s": RATES["GB/s"],
    **OCCUPANCY,
}
KERNEL_COLUMNS = {
    **PLACE,
    "kernel": lambda row: short(row["kernel"]),
    "launches": itemgetter("launches"),
    "ms": number("seconds", 1e3, "{:.3g}"),
    **RATES,
    **OCCUPANCY,
    "waits for": lambda row: ", ".join(f"{name} {value:.1f}" for name, value in row["stalls"].items()),
}


if __name__ == "__main__":
    main()
