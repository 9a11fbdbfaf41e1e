"""Instructions of every C++ kernel, by valgrind's callgrind: equal from run to run, where times are not.

python -m profiling.limits.instruction_counts [--update]      (about 25 s of CPU time once the extension is built)

The Torch-free drivers link the extension's objects; each of their kernels runs once, on one thread, at a small size, in
its portable form and in that for AVX2 (valgrind knows no AVX-512). Counts depend on the compiler: the committed baseline has a
list for each. A test compares with it: under the same compiler no count may be more than 5 % above the baseline. A commit
that makes a kernel take more on purpose, or adds or removes one, brings a new baseline (--update).
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from advkd.runtime.files import read_json, write_json
from advkd.runtime.timing import provenance

from ..evidence import RESULTS, ROOT, checked

BASELINE = RESULTS / "instruction-counts.json"
UPDATE = "python -m profiling.limits.instruction_counts --update"
DRIVERS = ("conv", "critic", "norm", "step")
FORMS = {"portable": "baseline", "avx2": "avx2"}
"""The forms of a kernel, and what ``ADVKD_ISA`` calls them."""
GROWTH = 0.05
"""By how much of itself a count may exceed the baseline."""


def measure():
    """Build the drivers and count all kernels: a list of ``{"op", "form", "instructions", "elements"}``."""
    with tempfile.TemporaryDirectory() as folder:
        drivers = build(folder)
        return [entry for driver in drivers.values() for form in FORMS for entry in count(driver, form)]


def obstacle():
    """Why nothing can be counted here, or None."""
    missing = [tool for tool in (_cxx(), "valgrind") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}" if missing else None


def compiler():
    """The compiler's version and the machine it compiles for."""
    done = subprocess.run([_cxx(), "--version"], capture_output=True, text=True, check=True)
    return f"{done.stdout.splitlines()[0]}, {platform.machine()}"


def _cxx():
    return os.environ.get("CXX", "g++")


def build(folder):
    """Build the drivers into a folder; returns ``{name: path}``."""
    paths = {name: Path(folder) / name for name in DRIVERS}
    environment = {**os.environ, "ISAS": " ".join(FORMS.values())}
    for name, path in paths.items():
        _run([sys.executable, ROOT / "csrc" / "driver" / "build.py", name, path], environment)
    return paths


def count(driver, form, environment=None):
    """Run a driver's kernels under callgrind; an empty list where this processor lacks the form."""
    isa = FORMS[form]
    # Symbols are bound before the kernels run, not within the first one that needs them.
    environment = {**os.environ, **(environment or {}), "ADVKD_ISA": isa, "LD_BIND_NOW": "1"}
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        collect = ["--toggle-collect=advkd_counted", "--dump-after=advkd_counted", "--combine-dumps=yes"]
        command = ["valgrind", "-q", "--tool=callgrind", *collect, f"--callgrind-out-file={profile}", driver, "count"]
        found, *names = _run(command, environment).splitlines()
        return _entries(names, profile.read_text(), form) if found == isa else []


def _entries(names, profile, form):
    """Lines that the driver printed, beside the profile's parts: one per kernel, and the rest at the end."""
    *totals, rest = map(int, re.findall(r"^totals: (\d+)$", profile, re.M))
    if not names or len(totals) != len(names) or rest:
        raise RuntimeError(
            f"callgrind counted {len(totals)} kernels and {rest} instructions elsewhere; the driver ran {len(names)}"
        )
    pairs = zip(totals, (name.split(" ", 1) for name in names))
    return [{"op": op, "form": form, "instructions": total, "elements": int(elements)} for total, (elements, op) in pairs]


def _run(command, environment):
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def stored(path=BASELINE):
    """The committed baseline: ``{compiler: {"counts": [...], "provenance": {...}}}``."""
    return read_json(path, "baseline") if Path(path).exists() else {}


def update(found, name, path=BASELINE):
    """Replace a compiler's counts; those of a form that this processor lacks are kept."""
    baseline = stored(path)
    forms = {entry["form"] for entry in found}
    kept = [entry for entry in baseline.get(name, {"counts": []})["counts"] if entry["form"] not in forms]
    tools = {"valgrind": _run(["valgrind", "--version"], os.environ).strip(), "libc": " ".join(platform.libc_ver())}
    counts = sorted([*found, *kept], key=lambda entry: (entry["op"], entry["form"]))
    write_json(path, {**baseline, name: {"counts": counts, "provenance": {**provenance(), **tools}}})


@dataclass
class Verdict:
    """Outcome of a comparison with the baseline.

    Attributes:
        baseline: the compiler whose counts were compared with, or None.
        failures: what may not be committed as it is, as lines of text.
        notes: what else is worth a line.
    """

    baseline: str | None
    failures: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def judge(found, name, baseline):
    """Compare counts with a compiler's baseline; under a compiler without one, with another's, and then only report."""
    if name in baseline:
        return Verdict(name, *compare(found, baseline[name]["counts"]))
    alike = [other for other in sorted(baseline) if other.endswith(f", {platform.machine()}")]
    note = f"no baseline of {name}; `{UPDATE}` adds one"
    if not alike:
        return Verdict(None, notes=[note])
    failures, notes = compare(found, baseline[alike[-1]]["counts"])
    return Verdict(alike[-1], notes=[f"{note}. Against that of {alike[-1]}:", *failures, *notes])


def compare(found, known):
    """``(failures, notes)`` of counts against a baseline's, both as lines of text.

    A kernel at another size is another entry. Forms that were not counted are left out.
    """
    forms = {entry["form"] for entry in found}
    before = {_key(entry): entry["instructions"] for entry in known if entry["form"] in forms}
    now = {_key(entry): entry["instructions"] for entry in found}
    failures = [f"{_title(key)}: {now[key]:,} instructions, not in the baseline" for key in now if key not in before]
    failures += [f"{_title(key)}: in the baseline, but not counted any more" for key in before if key not in now]
    notes = []
    for key in [key for key in now if key in before]:
        line = f"{_title(key)}: {now[key]:,} instructions, {before[key]:,} in the baseline ({_change(now[key], before[key])})"
        if now[key] > (1 + GROWTH) * before[key]:
            failures.append(line)
        elif now[key] < (1 - GROWTH) * before[key]:
            notes.append(f"{line}: fewer, a new baseline would keep them so")
    return failures, notes


def _key(entry):
    return entry["op"], entry["form"], entry["elements"]


def _title(key):
    op, form, elements = key
    return f"{op} ({form}, {elements} elements)"


def _change(now, before):
    return f"{100 * (now / before - 1):+.1f} %"


def table():
    """The baseline as Markdown lines: instructions per element of each kernel, in both forms."""
    lines = []
    for name, kept in sorted(stored().items()):
        checked({"path": BASELINE.name, "provenance": kept["provenance"]})
        lines += [
            f"[`{BASELINE.name}`](profiling/results/{BASELINE.name}): {name}, instructions per element, which repeat exactly:",
            "",
            "| kernel | elements | portable | AVX2 | ratio |",
            "|---|---|---|---|---|",
        ]
        rows = {}
        for entry in kept["counts"]:
            rows.setdefault((entry["op"], entry["elements"]), {})[entry["form"]] = entry["instructions"]
        for (op, elements), counts in rows.items():
            each = [f"{counts[form] / elements:.2f}" if form in counts else "-" for form in FORMS]
            ratio = f"{counts['portable'] / counts['avx2']:.1f} x" if counts.keys() == FORMS.keys() else "-"
            lines.append(f"| {op} | {elements} | {' | '.join(each)} | {ratio} |")
        lines.append("")
    return lines[:-1]


def _print(found, known):
    before = {_key(entry): entry["instructions"] for entry in known}
    print(f"{'kernel':58} {'form':8} {'instructions':>12} {'per element':>11}  against the baseline")
    for entry in found:
        now, kept = entry["instructions"], before.get(_key(entry))
        change = _change(now, kept) if kept else "not in it"
        print(f"{entry['op']:58} {entry['form']:8} {now:12,} {now / entry['elements']:11.2f}  {change}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write the counts to {BASELINE.relative_to(ROOT)}")
    options = parser.parse_args()
    if reason := obstacle():
        sys.exit(reason)
    found, name, baseline = measure(), compiler(), stored()
    verdict = judge(found, name, baseline)
    print(name)
    _print(found, baseline[verdict.baseline]["counts"] if verdict.baseline else [])
    if options.update:
        update(found, name)
        return
    print("\n".join([*verdict.failures, *verdict.notes]))
    if verdict.failures:
        sys.exit(f"if that is meant: {UPDATE}")


if __name__ == "__main__":
    main()
