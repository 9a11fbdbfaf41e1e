"""Findings of a run of ``python -m profiling.gpu``, as one page of Markdown made from the JSON of its parts."""

import json
from pathlib import Path

from ..evidence import spaced_markdown

BENCHMARKS = ("bench_student", "bench_conv_block", "bench_gradient_penalty", "bench_norm_act", "bench_sampler_step")
ERROR_TARGET = 2.0
"""Largest error of ours beside cuDNN's, where operands are rounded."""


def summary(folder, names):
    """The page; ``names``: of the parts, in order."""
    stored = {name: _read(Path(folder) / f"gpu_{name}.json") for name in names}
    known = {name: part for name, part in stored.items() if part}
    lines = ["# What ran", ""]
    if not known:
        return "\n".join([*lines, "Nothing yet.", ""])
    place = next(iter(known.values()))["provenance"]
    dirty = {True: ", with changes", False: "", None: ", unknown"}[place["dirty"]]
    lines += [
        f"{place['device']}, driver {place['driver']}, commit {place['commit']}{dirty}, torch {place['versions']['torch']}.",
        "",
    ]
    lines += spaced_markdown(("part", "state", "seconds", "what came of it"), [_part_row(name, stored[name]) for name in names])
    lines += _failures(known)
    for name in BENCHMARKS:
        if name in known:
            lines += ["", f"## {name}", "", *_benchmark(known[name])]
    lines += _targets(known)
    lines += _predictions(known)
    return "\n".join([*lines, ""])


def cases_of(part):
    """The cases that a benchmark has measured, in order: as a part of a run, or by its own command."""
    if "cases" in part:
        return part["cases"]
    items = part["result"]["items"]
    return [items[name] for name in part["result"].get("wanted", ()) if "contestants" in items.get(name, {})]


def green(name, stored):
    """A benchmark's stored results of GPUs whose parity tests were green: of the whole run, and of its own command."""
    runs = [result for result in stored(f"gpu_{name}") if result["result"].get("gate", {}).get("state") == "green"]
    return [*runs, *stored(f"{name}_cuda")]


def best(case, ours):
    """The fastest entry of ours, or of the others; None where none was timed."""
    entries = [e for e in case["contestants"] if "seconds" in e and e["kind"] != "floor" and (e["kind"] == "ours") == ours]
    return min(entries, key=lambda e: e["seconds"]["median"], default=None)


def reached(case):
    """Share of the floor that our fastest reaches, or None."""
    entry = best(case, True)
    return case["floor"]["seconds"] / entry["seconds"]["median"] if entry and "floor" in case else None


def error_ratio(case):
    """Our largest error by cuDNN's, or None."""
    errors = [e["parity"]["error"] for e in case["contestants"] if e["kind"] == "ours" and "parity" in e]
    return max(errors) / case["cudnn_error"] if errors and case.get("cudnn_error") else None


def _is_green(part):
    return part["result"].get("gate", {}).get("state") == "green"


def _read(path):
    return json.loads(path.read_text()) if path.exists() else None


def _part_row(name, part):
    if part is None:
        return name, "not run", "", ""
    return name, part["state"], f"{part['seconds']:.0f} of {part['limit']:.0f}", _said(name, part)


def _said(name, part):
    result = part["result"]
    notes = [result["error"]] if "error" in result else []
    notes += [result["unfinished"]] if "unfinished" in result else []
    if "counts" in result:
        notes.append(", ".join(f"{count} {outcome}" for outcome, count in result["counts"].items()))
    if name in BENCHMARKS:
        gate = result.get("gate", {"state": "unknown"})["state"]
        notes.append(f"{len(cases_of(part))} cases, parity tests {gate}")
    if name == "rates" and "rates" in result.get("items", {}) and "flops" in result["items"]["rates"]:
        rates = result["items"]["rates"]
        flops = ", ".join(f"{product} {value / 1e12:.0f}" for product, value in rates["flops"].items())
        notes.append(f"TFLOP/s: {flops}; copy {rates['bandwidth'] / 1e12:.2f} TB/s")
    if name == "first_image":
        items = result.get("items", {}).items()
        notes += [f"{k}: {v['first_seconds']:.1f} s, then {v['kept_seconds']:.1f} s" for k, v in items if "kept_seconds" in v]
    if name in ("memcheck", "racecheck"):
        notes += [
            f"{k}: {v['errors']} errors in {v['tests']} tests" for k, v in result.get("items", {}).items() if "errors" in v
        ]
    if name == "ncu" and result.get("ncu") == "not installed":
        notes.append("not installed")
    return "; ".join(notes).replace("|", "/").replace("\n", " ")


def _failures(known):
    lines = []
    for name, part in known.items():
        bad = part["result"].get("failures", []) + part["result"].get("failed_items", [])
        items = {**part["result"].get("items", {}), **part["result"].get("tests", {})}
        for item in bad[:30]:
            about = items.get(item, {})
            said = about.get("message") or about.get("error") or ""
            lines.append(f"- {name}: {item}: {said.strip().splitlines()[-1] if said.strip() else 'failed'}")
        if len(bad) > 30:
            lines.append(f"- {name}: and {len(bad) - 30} more")
    return ["", "## What failed", "", *lines] if lines else []


def _benchmark(part):
    if not _is_green(part):
        said = ["The parity tests are not green: these are no results.", ""]
    else:
        said = []
    titles = ("case", "ours, us", "fastest other, us", "ratio", "floor reached", "error by cuDNN's")
    rows = []
    for case in cases_of(part):
        ours, other = best(case, True), best(case, False)
        cells = [f"{e['name']}: {1e6 * e['seconds']['median']:.1f}" if e else "-" for e in (ours, other)]
        share, error = reached(case), error_ratio(case)
        figures = (_figure(case["ratio"], "{:.2f} x"), _figure(share, "{:.0%}"), _figure(error, "{:.2f} x"))
        rows.append((case["case"], *cells, *figures))
    missing = {f"{e['name']}: {e['missing']}" for case in cases_of(part) for e in case["contestants"] if "missing" in e}
    return [*said, *spaced_markdown(titles, rows), *[f"- cannot run: {text}" for text in sorted(missing)]]


def _targets(known):
    """Faster than every peer, and in rounded arithmetic at most twice cuDNN's error."""
    kept, missed = [], []
    for name in BENCHMARKS:
        for case in cases_of(known[name]) if name in known and _is_green(known[name]) else []:
            if case["ratio"] is not None:
                said = f"{name}, {case['case']}: {case['ratio']:.2f} x the fastest other"
                (kept if case["ratio"] >= 1 else missed).append(said)
            error = error_ratio(case)
            if error is not None:
                said = f"{name}, {case['case']}: error {error:.2f} x cuDNN's, at most {ERROR_TARGET:.0f}"
                (kept if error <= ERROR_TARGET else missed).append(said)
    if not kept and not missed:
        return []
    return ["", "## Targets missed", "", *_bullets(missed), "", "## Targets reached", "", *_bullets(kept)]


def _predictions(known):
    """Measured times beside those written down before."""
    rows = []
    for case in cases_of(known["bench_student"]) if "bench_student" in known else []:
        entry, predicted = best(case, True), case.get("predicted_microseconds")
        if entry and predicted:
            measured = 1e6 * entry["seconds"]["median"]
            rows.append((case["case"], f"{predicted:.1f}", f"{measured:.1f}", f"{measured / predicted:.2f} x"))
    titles = ("case", "predicted, us", "measured, us", "measured by predicted")
    return ["", "## Predictions against measurements", "", *spaced_markdown(titles, rows)] if rows else []


def _figure(value, form):
    return "-" if value is None else form.format(value)


def _bullets(lines):
    return [f"- {line}" for line in lines] or ["- none"]
