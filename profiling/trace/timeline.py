"""Records of a profiler, whichever it was, and the figures made of them: launches, busy fraction, time by range.

:mod:`profiling.trace.nsys` and :mod:`profiling.trace.torch_trace` read their tools' files into a :class:`Trace`. Times are
nanoseconds.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter

from advkd.errors import InputError

from ..evidence import source, spaced_markdown
from .workloads import UNIT

KERNEL, COPY, SET = "kernel", "copy", "set"
TOP = 5
"""Kernels, or operators, that a row names."""


@dataclass(frozen=True)
class Span:
    """A stretch of time of the host: a named range, or an operator."""

    start: float
    end: float
    name: str
    process: int = 0
    thread: int = 0


@dataclass(frozen=True)
class Activity:
    """Work of a GPU; ``correlation`` leads to the call that launched it."""

    start: float
    end: float
    name: str
    kind: str
    correlation: int
    process: int = 0
    bytes: int = 0


@dataclass
class Trace:
    """A recording.

    Attributes:
        ranges: named ones, :data:`~profiling.trace.workloads.UNIT` around each unit of work.
        calls: ``{(process, correlation): start}`` of the CUDA runtime's and the driver's calls.
        activities: of the GPU.
        operators: that PyTorch dispatched, where the tool records them.
        on_gpu: whether the work was a GPU's.
    """

    ranges: list = field(default_factory=list)
    calls: dict = field(default_factory=dict)
    activities: list = field(default_factory=list)
    operators: list = field(default_factory=list)
    on_gpu: bool = True


def summary(trace):
    """Figures of a unit of work, as JSON values.

    ``seconds`` is the host's, from a unit's start until the device has done all of it. ``busy`` is the share of that time in
    which the GPU works at anything, copies included, however many kernels run at once; None on a CPU. A range's ``seconds``
    are those of what was launched inside it, on a CPU its own on the host; ``own_seconds`` leaves out the ranges inside, so
    that they add up to the whole. Work of a GPU counts to the ranges that were open when it was launched, also from another
    thread: autograd's backward passes launch from one of theirs, while the thread that opened the range waits.
    """
    units = [span for span in trace.ranges if span.name == UNIT]
    if not units:
        raise InputError(f"the recording holds no range {UNIT!r}: nothing was named, or the capture was empty")
    launched = trace.activities if trace.on_gpu else trace.operators
    open_at = _open_ranges(trace, launched)
    inside = [(item, names) for item, names in zip(launched, open_at) if UNIT in names]
    if trace.on_gpu and not inside:
        raise InputError("the recording holds no work of the GPU inside the units of work: nothing was captured; record again")
    host = sum(unit.end - unit.start for unit in units)
    figures = {
        "units": len(units),
        "seconds": 1e-9 * host / len(units),
        "unit_seconds": [1e-9 * (unit.end - unit.start) for unit in units],
        "launched": "kernels" if trace.on_gpu else "operators",
        "launches": sum(_is_launch(item) for item, _ in inside) / len(units),
        "busy": None,
        "ranges": _by_range(trace, inside, units),
        "top": _top(trace, inside, len(units)),
    }
    if trace.on_gpu:
        figures["busy"] = busy_time([item for item, _ in inside], units) / host
        copies = [item for item, _ in inside if item.kind == COPY]
        figures |= {"copies": len(copies) / len(units), "copied_bytes": sum(item.bytes for item in copies) / len(units)}
    return figures


def _is_launch(item):
    return getattr(item, "kind", KERNEL) == KERNEL


def _open_ranges(trace, items):
    """For each item the names of the ranges that were open when it was launched, outermost first."""
    starts = [_launched_at(trace, item) for item in items]
    order = sorted((i for i, start in enumerate(starts) if start is not None), key=lambda i: starts[i])
    found = [()] * len(items)
    # The longer one of ranges that start together is outside.
    waiting = sorted(trace.ranges, key=lambda span: (-span.start, span.end))
    opened = []
    for i in order:
        while waiting and waiting[-1].start <= starts[i]:
            opened.append(waiting.pop())
        opened = [span for span in opened if span.end > starts[i]]
        found[i] = tuple(span.name for span in opened if span.process == items[i].process)
    return found


def _launched_at(trace, item):
    if isinstance(item, Span):
        return item.start
    return trace.calls.get((item.process, item.correlation))


def busy_time(activities, units):
    """Nanoseconds of the units in which at least one activity runs."""
    total, activities = 0, sorted(activities, key=lambda item: item.start)
    for unit in units:
        end = unit.start
        for item in activities:
            total += max(0, min(item.end, unit.end) - max(item.start, end))
            end = max(end, item.end)
    return total


def own_times(spans):
    """For each span its time less that of the spans of its thread directly inside."""
    own = [span.end - span.start for span in spans]
    threads = defaultdict(list)
    for i, span in enumerate(spans):
        threads[span.process, span.thread].append(i)
    for indices in threads.values():
        outer = []
        for i in sorted(indices, key=lambda i: (spans[i].start, -spans[i].end)):
            while outer and spans[outer[-1]].end <= spans[i].start:
                outer.pop()
            if outer:
                own[outer[-1]] -= spans[i].end - spans[i].start
            outer.append(i)
    return own


COLUMNS = ("calls", "launches", "own_launches", "seconds", "own_seconds", "host_seconds")


def _by_range(trace, inside, units):
    """A row per name, in order of first appearance."""
    spans = [span for span in trace.ranges if any(unit.start <= span.start < unit.end for unit in units)]
    spans.sort(key=lambda span: (span.start, -span.end))
    rows = {span.name: dict.fromkeys(COLUMNS, 0) for span in spans}
    for span, own in zip(spans, own_times(spans)):
        row, host = rows[span.name], 1e-9 * (span.end - span.start)
        row["calls"] += 1
        row["host_seconds"] += host
        if not trace.on_gpu:
            row["seconds"] += host
            row["own_seconds"] += 1e-9 * own
    for item, names in inside:
        seconds = 1e-9 * (item.end - item.start) if trace.on_gpu else 0.0
        # A range that was open before the first unit is not of it.
        for name in set(names) & set(rows):
            rows[name]["launches"] += _is_launch(item)
            rows[name]["seconds"] += seconds
        own = next(name for name in reversed(names) if name in rows)
        rows[own]["own_launches"] += _is_launch(item)
        rows[own]["own_seconds"] += seconds
    return [{"range": name, **{key: value / len(units) for key, value in row.items()}} for name, row in rows.items()]


def _top(trace, inside, units):
    """The kernels, or operators, that take most time of their own."""
    items = [item for item, _ in inside if _is_launch(item)]
    own = [item.end - item.start for item in items] if trace.on_gpu else own_times(items)
    rows = defaultdict(lambda: {"launches": 0, "seconds": 0.0})
    for item, time in zip(items, own):
        rows[item.name]["launches"] += 1 / units
        rows[item.name]["seconds"] += 1e-9 * time / units
    largest = sorted(rows.items(), key=lambda row: -row[1]["seconds"])[:TOP]
    return [{"name": name, **figures} for name, figures in largest]


def lines(results, above=source):
    """Markdown of stored recordings: one table of whole units, one of ranges; which tool made them stands above."""
    found = []
    for result in results:
        rows = [row for row in result["rows"] if "seconds" in row]
        tools = sorted({row["tool"] for row in rows})
        found += [*above(result, [row["unit_seconds"] for row in rows]), f"Recorded by {' and '.join(tools)}.", ""]
        found += [
            *table(UNITS, rows),
            "",
            *spaced_markdown(("workload", "range", "baseline ms", "fused ms", "baseline launches", "fused"), _ranges(rows)),
            "",
        ]
        found += failures(result, "recorded")
    return found[:-1]


def failures(result, done):
    """Rows of a result that are not in its tables, and why, a line each."""
    errors = [f"Not {done}: {label(row)}, {row['variant']}: {row['error']}." for row in result["rows"] if "error" in row]
    gates = result.get("parity", {}).items()
    off = [f"Not {done}: {work}: the variants differ." for work, gate in gates if not gate["passed"]]
    return [*errors, *off, ""] if errors or off else []


def table(columns, rows):
    """Markdown of rows; ``columns``: functions of a row, by title."""
    return spaced_markdown(columns, [[cell(row) for cell in columns.values()] for row in rows])


def number(key, factor, form="{:.4g}", nothing="-"):
    """A cell: a figure times a factor, in a format; ``nothing`` where there is none."""
    return lambda row: nothing if row.get(key) is None else form.format(factor * row[key])


def label(row):
    """Name of a workload of a size, in tables."""
    return f"{row['workload']}, {row['size']}"


def short(name, most=48):
    """A kernel's name in a table."""
    # A template's arguments would make columns of hundreds of letters.
    name = name.partition("<")[0].removeprefix("void ")
    return f"`{name if len(name) <= most else name[: most - 3] + '...'}`"


UNITS = {
    "workload": label,
    "variant": itemgetter("variant"),
    "ms": number("seconds", 1e3),
    "launches": lambda row: f"{row['launches']:.0f} {row['launched']}",
    "GPU busy": number("busy", 100, "{:.0f} %", "n/a"),
    "copied MB": number("copied_bytes", 1e-6, "{:.3g}", "n/a"),
    "largest": lambda row: "".join(f"{short(top['name'])} {1e3 * top['seconds']:.3g} ms" for top in row["top"][:1]),
}
"""Columns of whole units."""


def _ranges(rows):
    """A row per workload and range, own times of both variants side by side."""
    cells = {}
    for row in rows:
        for part in row["ranges"]:
            cells.setdefault((label(row), part["range"]), {})[row["variant"]] = part
    for (work, name), parts in cells.items():
        times = [f"{1e3 * parts[v]['own_seconds']:.4g}" if v in parts else "-" for v in ("baseline", "fused")]
        launches = [f"{parts[v]['own_launches']:.0f}" if v in parts else "-" for v in ("baseline", "fused")]
        yield work, "outside of ranges" if name == UNIT else name, *times, *launches
