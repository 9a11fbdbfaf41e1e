"""Sources of figures and their spread: without a stored result's commit, device, versions and spread none is written.

A *time* is ``{"median", "p20", "p80", ...}`` as :func:`advkd.runtime.timing.measure` gives it, or a list of at least two runs.
A result also holds digests of the kernels that it has measured: a table of kernels that have changed since says so.
"""

import ast
import functools
import hashlib
import json
import os
import re
import statistics
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from advkd.errors import InputError
from advkd.ops import cuda as cuda_kernels

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "profiling" / "results"
REQUIRED = ("commit", "device", "versions")


def environment(**changes):
    """The environment of another process: this one's, with the project before the folders on its ``PYTHONPATH``."""
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **changes}


def stored(name):
    """The results of that name, of every device, by folder; each with its ``path`` and the kernels ``changed`` since."""
    return [_read(path) for path in sorted(RESULTS.glob(f"*/{name}.json"))]


def _read(path):
    result = json.loads(path.read_text())
    return {**result, "path": path.relative_to(ROOT).as_posix(), "changed": changed(path.stem, result)}


def device_of(place):
    """A provenance's device; of a CPU with torch's instruction set, without which times of one name would differ twofold."""
    capability = None if place.get("cuda") else place.get("capability")
    return f"{place['device']}, {capability}" if capability else place["device"]


def link(result, text=None):
    """Markdown of a link to a stored result, from the root."""
    path = result["path"]
    return f"[{text or '`' + path.rpartition('/')[2] + '`'}]({path})"


def source(result, times, sure=""):
    """Lines above a table: the result's file, commit, device, versions and spread; whether kernels have changed since.

    Args:
        result: of :func:`stored`.
        times: those that the table shows.
        sure: how sure figures are that are no times ("intervals are in the table"); without it there must be times.

    Raises:
        InputError: something of that is not there.
    """
    place = checked(result)
    spread = [said for said in (sure, spread_of(times, result["path"])) if said]
    if not spread:
        raise InputError(f"{result['path']}: figures without spread are not shown; measure again with repeats")
    commits = list(dict.fromkeys(p["commit"][:8] for p in places(result)))
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items() if version)
    where = f"{device_of(place)}, {place['threads']} threads, {versions}; commit {', '.join(commits)}; {'; '.join(spread)}"
    return [f"{stale(result)}{link(result)}: {where}:", ""]


def markdown(titles, rows, rule="---"):
    """Lines of a table; ``rule``: what stands below each title."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (titles, *rows)]
    return [lines[0], "|" + f"{rule}|" * len(titles), *lines[1:]]


spaced_markdown = functools.partial(markdown, rule=" --- ")
NOTHING = ["Nothing has been measured yet."]


@dataclass(frozen=True)
class Table:
    """Specification of a page's tables: one of each stored result of a name, under its source.

    Attributes:
        name: of the results.
        columns: ``{title: cell}``, or a function of a result that gives that. A cell is a format of a row's values, such as
            ``"{batch} images"``, or a function of the row.
        rows: function of a result that gives the rows, as dictionaries.
        times: function of a result that gives the times whose spread stands in its source.
        sure: as in :func:`source`, for figures that are no times.
        above, below: functions of a result that give further lines.
    """

    name: str
    columns: object
    rows: object = itemgetter("cases")
    times: object = lambda result: [entry["seconds"] for entry in contestants(result) if "seconds" in entry]
    sure: str = ""
    above: object = lambda result: []
    below: object = lambda result: []

    def lines(self):
        """The tables in Markdown."""
        found = []
        for result in stored(self.name):
            found += [*source(result, list(self.times(result)), self.sure), *self.of(result), ""]
        return found[:-1] or NOTHING

    def of(self, result):
        """One result's table, without its source."""
        columns = self.columns(result) if callable(self.columns) else self.columns
        rows = [[_cell(cell, row) for cell in columns.values()] for row in self.rows(result)]
        return [*self.above(result), *markdown(columns, rows), *self.below(result)]


def _cell(cell, row):
    return cell.format_map(row) if isinstance(cell, str) else cell(row)


def contestants(result):
    """Rows of every case's contestants, with the case's own values."""
    return [{**case, **entry} for case in result["cases"] for entry in case["contestants"]]


def time_of(entry):
    """A cell: a contestant's milliseconds with their spread, or why there are none."""
    if "missing" in entry:
        return "cannot run here"
    if "seconds" not in entry:
        return f"off by {entry['parity']['error']:.1e}, not timed"
    median, p20, p80 = (1e3 * entry["seconds"][key] for key in ("median", "p20", "p80"))
    return f"{median:.2f} ({p20:.2f} to {p80:.2f})"


def scaled(path, factor, form, nothing="-"):
    """A cell: the value at a path such as ``"seconds/median"``, times a factor, in a format; ``nothing`` where it is None."""

    def cell(row):
        for key in path.split("/"):
            row = row[key]
        return nothing if row is None else form.format(factor * row)

    return cell


def stale(result):
    """The beginning of a line that says so, where kernels have changed since."""
    kernels = result.get("changed")
    return f"**Stale**, measured before the last change of {', '.join(kernels)}: " if kernels else ""


def device_alone(result, times, sure=""):
    """Instead of :func:`source`, for what has been measured just now and is not stored yet."""
    return [f"{device_of(result['provenance'])}:", ""]


def places(result):
    """The provenance of every case of a result, else its own."""
    return [case["provenance"] for case in result.get("cases", []) if "provenance" in case] or [result.get("provenance") or {}]


def checked(result):
    """A result's provenance, which must say where its figures come from."""
    for place in (result.get("provenance") or {}, *places(result)):
        gaps = [key for key in REQUIRED if not place.get(key)]
        if gaps or place.get("dirty"):
            why = f"does not say its {' and '.join(gaps)}" if gaps else "was measured on changed sources"
            raise InputError(f"{result['path']} {why}: measure again on a commit")
    return result["provenance"]


def spread_of(times, path):
    """In words how far times scatter; nothing of none."""
    ends = [_ends(time, path) for time in times]
    if not ends:
        return ""
    low, high = (100 * statistics.median(end[i] for end in ends) for i in (0, 1))
    worst = 100 * max(max(-end[0], end[1]) for end in ends)
    return f"spread (p20 to p80, or all runs) {low:+.0f} to {high:+.0f} % typically, {worst:.0f} % at most"


def _ends(time, path):
    if isinstance(time, dict) and {"median", "p20", "p80"} <= set(time):
        return time["p20"] / time["median"] - 1, time["p80"] / time["median"] - 1
    if isinstance(time, list) and len(time) > 1:
        return min(time) / statistics.mean(time) - 1, max(time) / statistics.mean(time) - 1
    raise InputError(f"{path}: a time without spread is not shown ({time}); measure again with repeats")


def figure(result, times, text):
    """A figure in a sentence, as a link to its result; refused like a table."""
    checked(result)
    if not spread_of(times, result["path"]):
        raise InputError(f"{result['path']}: {text!r} has no spread; measure again with repeats")
    return link(result, text) + (" (of earlier kernels)" if result.get("changed") else "")


STUDENT, STEP = ("conv_block", "student_forward"), ("sampler_step", "philox")
CRITIC = ("conv_bias_act_mask", "mask_mul", "penalty_reduce", "interpolate", "image_gradient")
MEASURED = {
    **dict.fromkeys(("bench_student", "layers", "scaling", "precision", "sample_scaling", "billion"), STUDENT),
    **dict.fromkeys(("bench_sampler_step", "step_scaling", "recording", "bench_teacher"), STEP),
    **dict.fromkeys(("bench_gradient_penalty", "penalty_scaling", "bench_pair_critic"), CRITIC),
    "bench_norm_act": ("norm_act",),
    "distillation": (*CRITIC, "norm_act"),
    **dict.fromkeys(("traces", "counters", "compare", "demo", "roofline"), (*STUDENT, *STEP, *CRITIC, "norm_act")),
}
"""Result's name -> the kernels in C++ that it measures."""
UNITS = {"conv_block": ("conv_block", "conv_direct", "conv_dot", "conv_pack", "conv_winograd")}
"""Kernel in C++ for CPUs -> the source files that it consists of, where there are several."""
ELSEWHERE = {"ncu": "trace.ncu", "first_image": "gpu.first_image", "ahead": "limits.ahead"}
"""Part of a GPU's run -> the module that measures it, where :func:`module_of` has no rule."""
ON_GPUS = {"conv_block": ("conv_block", "conv_pair", "student_stem"), "student_forward": ()}
"""Kernel in C++ for CPUs -> those that do its work on GPUs, where names differ."""


def module_of(name):
    """The module that measures a benchmark or another part of a GPU's run."""
    return "profiling." + ELSEWHERE.get(name, f"cases.{name.removeprefix('bench_')}")


def cpu_digests(read=lambda path: (ROOT / path).read_text()):
    """``{kernel: digest}`` of every kernel named in :data:`MEASURED`, each with the headers of the project that it includes.

    ``read``: the text of a path below the root, of this tree or of another commit.
    """
    names = sorted({name for kernels in MEASURED.values() for name in kernels})
    return {name: _digest([f"csrc/cpu/{unit}.cpp" for unit in UNITS.get(name, (name,))], read) for name in names}


def _digest(paths, read):
    seen, left = {}, list(paths)
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
    now = gpu_digests() if on_gpu else cpu_digests()
    names = [key for kernel in MEASURED.get(base, ()) for key in (_gpu_keys(kernel, now) if on_gpu else [kernel])]
    # A part of a GPU's run keeps them beside its provenance.
    stored = [result["kernels"]] if "kernels" in result else [place.get("kernels", {}) for place in places]
    return [key for key in names if any(kernels.get(key) != now[key] for kernels in stored)]


def _gpu_keys(kernel, known):
    keys = [f"{kind} {name}" for kind in KINDS for name in ON_GPUS.get(kernel, (kernel,))]
    return [key for key in keys if key in known]


KINDS = {"cuda": "CUDA C++", "triton": "Triton"}


@dataclass(frozen=True)
class Family:
    """The kernels of one source file.

    Attributes:
        kind: of :data:`KINDS`.
        name: of the op.
    """

    kind: str
    name: str

    @property
    def key(self):
        """Name of the family in results."""
        return f"{self.kind} {self.name}"

    @property
    def source(self):
        """Path below the root."""
        return f"csrc/cuda/{self.name}.cu" if self.kind == "cuda" else f"kernels/{self.name}.py"

    def digest(self):
        """Digest of device code and plans: the source with its headers or the kernels that it imports, and its host side."""
        text = cuda_kernels.source(self.name) if self.kind == "cuda" else "".join(_triton_sources(self.name))
        host = [path.read_text() for path in map(ROOT.joinpath, self.host_side()) if path.exists()]
        return hashlib.sha256("".join((text, *host)).encode()).hexdigest()[:16]

    def host_side(self):
        """Files that choose tiles and launches, as paths below the root."""
        if self.kind == "cuda":
            return [f"csrc/cuda/host/{name}" for name in (f"{self.name}.cpp", "host.h", "host.cpp")]
        return ["advkd/ops/triton_conv.py"] if self.name == "conv_block" else []

    def tested_by(self, test):
        """True if a GPU test, as pytest names it, runs these kernels."""
        file = test.partition("::")[0].rpartition("/")[2]
        other = "triton" if self.kind == "cuda" else "cuda"
        if file == f"test_training_{self.kind}.py":
            return self.name in test.partition("::")[2]
        own = f"test_{self.name}"
        if not (file == own + ".py" or file.startswith(own + "_")) or other in file:
            return False
        return self.kind == "cuda" or "gpu_sources" not in file


def families():
    """Every family, from the files that are there."""
    cuda = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
    triton = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if "@triton.jit" in path.read_text())
    return [*(Family("cuda", name) for name in cuda), *(Family("triton", name) for name in triton)]


def gpu_digests():
    """``{family's key: digest}`` of the sources as they are."""
    return {family.key: family.digest() for family in families()}


def _triton_sources(name, seen=None):
    """The text of a kernel file and of those beside it that it imports."""
    seen = set() if seen is None else seen
    path = ROOT / "kernels" / f"{name}.py"
    if name in seen or not path.exists():
        return []
    seen.add(name)
    text, texts = path.read_text(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for module in [node.module] if node.module else [alias.name for alias in node.names]:
                texts += _triton_sources(module, seen)
    return [text, *texts]


def last_run(family, folder=RESULTS):
    """Last run of the family's tests on a device: ``{device, commit, date, passed, failed, stale}``, or None."""
    found = []
    for path in sorted(Path(folder).glob("*/gpu_tests.json")):
        stored = json.loads(path.read_text())
        own = {t: o["outcome"] for t, o in stored["result"].get("tests", {}).items() if family.tested_by(t)}
        ran = [outcome for outcome in own.values() if outcome != "skipped"]
        if not ran or stored["result"]["gaps"].get(family.kind):
            continue
        where = stored["provenance"]
        found.append(
            {
                "device": where["device"],
                "commit": where["commit"],
                "date": stored["date"],
                "passed": ran.count("passed"),
                "failed": len(ran) - ran.count("passed"),
                "stale": stored["kernels"].get(family.key) != family.digest(),
            }
        )
    return max(found, key=lambda run: run["date"], default=None)
