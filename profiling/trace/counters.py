"""Counters of kernels as Nsight Compute prints them, ``--csv --page raw``."""

import csv
import re

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
