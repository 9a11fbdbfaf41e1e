"""Baseline against fused, side by side: time, launches, bytes, FLOP, peak memory, and joules where the device reports them.

python -m profiling.trace.compare [--device cuda] [--only student] [--repeats 30] [--out FOLDER]

Ends with 1 and says which, where a fused variant is slower than its baseline, gives something else, or cannot run; with 3 where
a profiler that is there fails. Times are of calls in turn in one process; launches are those of a recording, memory is a fresh
process's, bytes are Nsight Compute's.
"""

import json
import sys
import time

from advkd.errors import InputError
from advkd.runtime.devices import keep_freed_memory
from advkd.runtime.files import write_json
from advkd.runtime.hub import reason
from advkd.runtime.timing import measure

from ..evidence import ROOT, device_alone, source, spaced_markdown
from ..harness import provenance
from . import ncu, nsys, power
from .timeline import label
from .workloads import FAILURES, MORE_VARIANTS, SIZES, VARIANTS, command, finished, gate, positive, prepare, synchronize


def compared(name, device, size, repeats):
    """One workload's parity, times, operations and energy; nothing is timed where the parity is off."""
    row = {"workload": name, "size": size, "device": str(device)}
    try:
        row["parity"] = gate(name, device, size)
        if not row["parity"]["passed"]:
            return row
        variants = (*VARIANTS, *MORE_VARIANTS.get(name, ()))
        calls = {variant: prepare(name, variant, device, size) for variant in variants}
        row["seconds"] = measure(calls, repeats, warmup=2, device=device)
        row["flop"] = ncu.counted(calls["baseline"])
        row["joules"] = joules({v: calls[v] for v in VARIANTS}, device, row["seconds"])
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {reason(error)}"
    return row


def joules(calls, device, seconds):
    """Joules of a unit by variant, or the reason why there are none."""
    try:
        read = power.meter(device)
        return {variant: _energy(call, device, read, seconds[variant]["median"]) for variant, call in calls.items()}
    except InputError as error:
        return {"missing": str(error)}


def _energy(call, device, read, seconds):
    units, begin = max(1, round(power.SHORTEST / seconds)), read()
    for _ in range(units):
        call()
    synchronize(device)
    return (read() - begin) / units


def beside(name, device, size, folder):
    """Figures from processes of their own: peak memory, launches, DRAM bytes; each by variant, or with its reason."""
    peaks = {variant: _peak(name, variant, device, size) for variant in VARIANTS}
    recordings = {variant: nsys.recorded(name, variant, device, size, 1, folder) for variant in VARIANTS}
    kinds = {row["launched"] for row in recordings.values() if "launched" in row}
    launches = {variant: row.get("launches") for variant, row in recordings.items()}
    errors = [f"{variant}: {row['error']}" for variant, row in recordings.items() if "error" in row]
    figures = {"peak_bytes": peaks, "launches": launches, "launched": min(kinds, default=None), "not_recorded": errors}
    return {**figures, **_bytes(name, device, size)}


def _peak(name, variant, device, size):
    return json.loads(finished(command(name, variant, device, size, "--peak"), f"{name}, {variant}: its memory").stdout)


def _bytes(name, device, size):
    why = ncu.missing(device)
    if why:
        return {"dram_bytes": {"missing": f"needs ncu: {why}"}}
    rows = {variant: ncu.count(name, variant, device, size) for variant in VARIANTS}
    if errors := [row["error"] for row in rows.values() if "error" in row]:
        return {"dram_bytes": {"missing": errors[0], "failed": True}}
    return {"dram_bytes": {variant: _dram_bytes(row, size) for variant, row in rows.items()}}


def _dram_bytes(counted, size):
    """Those of a whole unit: of the teacher's trajectory ncu counts some of the steps, which are all alike."""
    share = SIZES[size].steps / counted["steps"] if "steps" in counted else 1
    return None if counted["dram_bytes"] is None else share * counted["dram_bytes"]


def complaints(rows):
    """Why the command ends with 1, a line each."""
    found = []
    for row in rows:
        if "error" in row:
            found.append(f"{label(row)}: cannot run: {row['error']}")
        elif not row["parity"]["passed"]:
            errors = ", ".join(f"{variant} {error:.2e}" for variant, error in row["parity"]["errors"].items())
            found.append(f"{label(row)}: off ({errors}; at most {row['parity']['tolerance']:.2e})")
        elif row["seconds"]["fused"]["median"] > row["seconds"]["baseline"]["median"]:
            times = " against ".join(f"{1e3 * row['seconds'][variant]['median']:.4g}" for variant in reversed(VARIANTS))
            found.append(f"{label(row)}: the fused variant is slower: {times} ms")
    return found


def tool_failures(rows):
    """Why the command ends with 3, a line each."""
    found = [f"{label(row)}: {why}" for row in rows for why in row.get("not_recorded", [])]
    bytes_of = [(row, row.get("dram_bytes", {})) for row in rows]
    return found + [f"{label(row)}: ncu: {found['missing']}" for row, found in bytes_of if found.get("failed")]


def main():
    parser = nsys.options(__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=positive, default=30, help="timed calls of each variant")
    parser.add_argument("--traces", default=str(ROOT / "build" / "traces"), help="folder for traces to look at")
    values = nsys.given(parser)
    keep_freed_memory()
    rows, begin = [], time.monotonic()
    for name, size in values.work:
        row = compared(name, values.device, size, values.repeats)
        if "seconds" in row and "error" not in row:
            try:
                row |= beside(name, values.device, size, nsys.made(values.traces))
            except FAILURES as error:
                row["error"] = reason(error)
        rows.append(row)
        print(f"{label(row)}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    found = complaints(rows)
    result = {"rows": rows, "complaints": found, "provenance": provenance(values.device)}
    if values.folder:
        write_json(values.folder / "compare.json", result)
    failed = tool_failures(rows)
    print("\n".join(lines([result], device_alone)))
    print("\n".join([*found, *failed]), file=sys.stderr)
    sys.exit(nsys.FAILED if failed else 1 if found else 0)


def lines(results, above=source):
    """Markdown of stored comparisons: a column pair per figure, baseline first."""
    found = []
    for result in results:
        times = [time for row in result["rows"] for time in row.get("seconds", {}).values()]
        found += [
            *above(result, times, "" if times or not result["rows"] else "nothing was timed"),
            "Each cell: baseline, fused.",
            "",
        ]
        titles = ("workload", "ms", "ratio", "launches", "GFLOP, direct", "DRAM MB", "peak MB", "joules", "largest error")
        found += [*spaced_markdown(titles, map(_cells, result["rows"])), ""]
        found += [said for row in result["rows"] for said in _beside(row)]
        found += [f"{what}: {why}." for what, why in sorted(_missing(result["rows"]).items())]
        found += [f"Not recorded: {label(row)}, {why}." for row in result["rows"] for why in row.get("not_recorded", [])]
        found += ["", *(f"**{line}**" for line in result["complaints"]), ""] if result["complaints"] else [""]
    return found[:-1]


def _cells(row):
    if "seconds" not in row:
        return label(row), *["-"] * 7, "off" if "parity" in row else "cannot run"
    medians = {variant: row["seconds"][variant]["median"] for variant in VARIANTS}
    ratio = f"{medians['baseline'] / medians['fused']:.2f} x"
    launches = _pair(row.get("launches"), 1, ".0f") + (f" {row['launched']}" if row.get("launched") else "")
    flop = f"{1e-9 * row['flop']:.4g}" if "flop" in row else "-"
    others = _pair(row.get("dram_bytes"), 1e-6), _pair(row.get("peak_bytes"), 1e-6, ".0f"), _pair(row.get("joules"), 1)
    errors = ", ".join(f"{error:.1e}" for error in row["parity"]["errors"].values())
    return label(row), _pair(medians, 1e3), ratio, launches, flop, *others, errors


def _pair(values, scale, form=".4g"):
    if not values or "missing" in values:
        return "-"
    return ", ".join("-" if values[v] is None else format(scale * values[v], form) for v in VARIANTS)


def _beside(row):
    """Times of the further baselines."""
    others = {name: time["median"] for name, time in row.get("seconds", {}).items() if name not in VARIANTS}
    fused = row["seconds"]["fused"]["median"] if others else 0.0
    return [
        f"{label(row)}, baseline in {name}: {1e3 * median:.4g} ms, {median / fused:.2f} x." for name, median in others.items()
    ]


def _missing(rows):
    """Rows that have a reason instead of figures."""
    names = {"dram_bytes": "DRAM bytes", "joules": "Joules"}
    return {text: row[key]["missing"] for row in rows for key, text in names.items() if "missing" in row.get(key, {})}


if __name__ == "__main__":
    main()
