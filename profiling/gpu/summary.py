"""Findings of a run of ``python -m profiling.gpu``, as one page of Markdown made from the JSON of its parts."""

import json
from pathlib import Path

from ..evidence import spaced_markdown

BENCHMARKS = ("bench_student", "bench_conv_block", "bench_gradient_penalty", "bench_norm_act", "bench_sampler_step")
ERROR_TARGET = 2.0
"""Largest error of ours beside cuDNN's, where operands are rounded."""


def read_json(path, absent):
    """The value of a JSON file; ``absent`` where there is none, or one that is torn."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return absent


def summary(folder, names):
    """The page; ``names``: of the parts, in order."""
    found = {name: read_json(Path(folder) / f"gpu_{name}.json", None) for name in names}
    known = {name: stored for name, stored in found.items() if stored}
    if not known:
        return "# What ran\n\nNothing yet.\n"
    place = next(iter(known.values()))["provenance"]
    dirty = {True: ", with changes", False: "", None: ", unknown"}[place["dirty"]]
    commit, versions = f"commit {place['commit']}{dirty}", f"torch {place['versions']['torch']}"
    lines = ["# What ran", "", f"{place['device']}, driver {place['driver']}, {commit}, {versions}.", ""]
    rows = [_row(name, known[name]) if name in known else (name, "not run", "", "") for name in names]
    lines += [*spaced_markdown(("part", "state", "seconds", "what came of it"), rows), *_failures(known)]
    for name in BENCHMARKS:
        if name in known:
            cases = cases_of(known[name])
            missing = {f"{e['name']}: {e['missing']}" for case in cases for e in case["contestants"] if "missing" in e}
            lines += ["", f"## {name}", "", *([] if _is_green(known[name]) else [RED, ""]), *case_table(cases)]
            lines += [f"- cannot run: {text}" for text in sorted(missing)]
    return "\n".join([*lines, ""])


RED = "The parity tests are not green: these are no results."


def _row(name, part):
    said = "; ".join(part["result"][key] for key in ("error", "unfinished", "said") if key in part["result"])
    return name, part["state"], f"{part['seconds']:.0f} of {part['limit']:.0f}", said.replace("|", "/").replace("\n", " ")


def _failures(known, most=30):
    lines = []
    for name, part in known.items():
        result = part["result"]
        bad = [*result.get("failures", ()), *result.get("failed_items", ())]
        for item in bad[:most]:
            entry = {**result["items"], **result.get("tests", {})}.get(item, {})
            said = (entry.get("message") or entry.get("error") or "").strip()
            lines.append(f"- {name}: {item}: {said.splitlines()[-1] if said else 'failed'}")
        lines += [f"- {name}: and {len(bad) - most} more"] if len(bad) > most else []
    return ["", "## What failed", "", *lines] if lines else []


def cases_of(part):
    """The cases that a benchmark has measured, in order: as a part of a run, or by its own command."""
    if "cases" in part:
        return part["cases"]
    items = part["result"]["items"]
    return [items[name] for name in part["result"].get("wanted", ()) if "contestants" in items.get(name, {})]


def green(name, stored):
    """A benchmark's stored results of GPUs whose parity tests were green: of the whole run, and of its own command."""
    return [*filter(_is_green, stored(f"gpu_{name}")), *stored(f"{name}_cuda")]


def _is_green(part):
    return part["result"].get("gate", {}).get("state") == "green"


def case_table(cases):
    """Markdown of cases; in bold what misses a target: every other beaten, at most :data:`ERROR_TARGET` times cuDNN's error."""
    titles = ("work", "advkd, us", "predicted, us", "fastest other, us", "ratio", "floor reached", "error by cuDNN's")
    return spaced_markdown(titles, map(_cells, cases))


def _cells(case):
    ours, other = fastest(case, True), fastest(case, False)
    times = [f"{entry['name']}: {1e6 * entry['seconds']['median']:.1f}" if entry else "-" for entry in (ours, other)]
    reached = case["floor"]["seconds"] / ours["seconds"]["median"] if ours and "floor" in case else None
    errors = [e["parity"]["error"] for e in case["contestants"] if e["kind"] == "ours" and "parity" in e]
    error = max(errors) / case["cudnn_error"] if errors and case.get("cudnn_error") else None
    predicted, ratio = _figure(case.get("predicted_microseconds"), "{:.1f}"), case["ratio"]
    error = _figure(error, "**{:.2f} x**" if error and error > ERROR_TARGET else "{:.2f} x")
    ratio = _figure(ratio, "**{:.2f} x**" if ratio and ratio < 1 else "{:.2f} x")
    return case["case"], times[0], predicted, times[1], ratio, _figure(reached, "{:.0%}"), error


def fastest(case, ours):
    """The fastest entry of ours, or of the others; None where none was timed."""
    entries = [e for e in case["contestants"] if "seconds" in e and e["kind"] != "floor" and (e["kind"] == "ours") == ours]
    return min(entries, key=lambda e: e["seconds"]["median"], default=None)


def _figure(value, form):
    return "-" if value is None else form.format(value)
