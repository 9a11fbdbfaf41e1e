"""Write the tables of README and site from the JSON under ``profiling/results``: python -m profiling.tables.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, a figure within a sentence between
``<!-- figure: NAME -->`` and ``<!-- end -->``; a test checks that pages and results agree.
"""

import functools
import os
import re
import statistics
from operator import itemgetter

from advkd.errors import InputError
from advkd.runtime.files import write_bytes

from . import billion, comparison_tables, front, roofline, solver_tables, toy_tables
from .cases import cascade, glyphs, guidance, guided, neighbours, recovery, score_error, straightness
from .cases import tables as cases
from .evidence import NOTHING, ROOT, checked, device_of, figure, link, source, stale, stored
from .gpu import tables as gpu
from .limits import guarantees, instruction_counts
from .pictures import PLOTS
from .trace import compare, demo, ncu, timeline

SITE = ROOT / "docs" / "pages"
CARD_FILES = sorted((ROOT / "advkd" / "pretrained").glob("*/README.md"))
BILLION = SITE / "speed" / "billion.md"
PAGES = (ROOT / "README.md", *CARD_FILES, *(path for path in sorted(SITE.rglob("*.md")) if path != BILLION))


def counts():
    """Instructions of every C++ kernel."""
    summary = '<details markdown="1"><summary>Instructions per element of every C++ kernel</summary>'
    return [summary, "", *instruction_counts.table(), "", "</details>"]


def plots(name, caption):
    """The plots of a kind of result, each under its source."""

    def lines():
        found = []
        for result in stored(name):
            checked(result)
            path = result["path"].removesuffix(".json") + ".png"
            found += [f"![{caption}]({path})", "", f"{stale(result)}{link(result)}: {device_of(result['provenance'])}.", ""]
        return found[:-1] or NOTHING

    return lines


def recorded(name, lines):
    """The lines that a profiler's module makes of its stored results."""
    return lambda: lines(stored(name)) or NOTHING


def demo_parts():
    """Parts of a demo, by time."""
    lines = []
    for result in stored("demo"):
        lines += [*source(result, [result["seconds"]]), *demo.lines(result), ""]
    return lines[:-1] or NOTHING


def _results(name):
    results = stored(name)
    if not results:
        raise InputError(f"a page states a figure of {name}.json, which no device has: restore it or measure again")
    return results


def _figures(name, value, text):
    """A figure of every result of that name, with its device."""

    def linked():
        found = [(figure(r, [value(r)], text(value(r))), device_of(r["provenance"])) for r in _results(name)]
        return " and ".join(f"{made} ({device})" for made, device in found)

    return linked


def _said(name, value, text):
    """A sentence about every result of that name, of figures that are no times, each with a link to the result."""

    def linked():
        return "; ".join(f"{text(value(r))} ({link(r, device_of(checked(r)))})" for r in _results(name))

    return linked


FIGURES = {
    "demo_seconds": _figures("demo", itemgetter("seconds"), lambda runs: f"{statistics.mean(runs):.0f} seconds"),
    "demo_times_faster": _figures("demo", itemgetter("times_faster"), lambda runs: f"{statistics.mean(runs):.0f} times faster"),
    "step_overhead": _figures(
        "step_scaling",
        lambda result: result["overhead"]["deterministic"],
        lambda time: f"{1e6 * time['median']:.0f} microseconds",
    ),
    "gpu_state": front.gpu_state,
    "guided_digits": guidance.sentence,
    "demo_recognised": _said("demo", itemgetter("recognised"), lambda runs: f"{100 * min(runs):.0f} of 100 images"),
    **{f"glyphs_{part}": _said("glyphs", *value_and_text) for part, value_and_text in glyphs.SENTENCES.items()},
    **{f"quality_of_{name}": front.quality_of(*rows) for name, rows in front.CARD_FIGURES.items()},
}
"""Name of a figure in a sentence -> what makes its link."""
TABLES = {
    **{name: table.lines for name, table in {**cases.TABLES, **front.TABLES_OF_METHODS}.items()},
    "speed": front.speed,
    "quality": front.quality,
    "methods": front.methods,
    "solvers": solver_tables.solvers,
    "solver_quality": solver_tables.quality,
    "comparison": comparison_tables.lines,
    "differences": comparison_tables.differences,
    "budgets": comparison_tables.budgets,
    "latents": functools.partial(comparison_tables.lines, "latent"),
    "codes": functools.partial(comparison_tables.lines, "latent_codes"),
    **{f"students_of_{name}": comparison_tables.of_method(name) for name in comparison_tables.METHODS},
    "guidance": guidance.lines,
    "guided": guided.lines,
    "glyphs": glyphs.lines,
    "straightness": straightness.lines,
    "recovery": recovery.lines,
    "cascade": cascade.lines,
    "toy": toy_tables.lines,
    "score_error": score_error.lines,
    "roofline": roofline.TABLE.lines,
    "counts": counts,
    "neighbours": neighbours.TABLE.lines,
    "neighbours_idle": neighbours.IDLE_TABLE.lines,
    **{f"limits_{name}": guarantees.table(name) for name in guarantees.CAMPAIGNS},
    "demo": demo_parts,
    **{f"{name}_plot": plots(name, caption) for name, (_, caption) in PLOTS.items()},
    **{name: recorded(name, module.lines) for name, module in (("traces", timeline), ("counters", ncu), ("compare", compare))},
    "gpu_benchmarks": gpu.gpu_benchmarks,
    "gpu_kernels": gpu.gpu_kernels_state,
    "predictions": gpu.predictions,
    "ahead": gpu.ahead,
}


def filled(text, page=PAGES[0]):
    """A page's text with every table, and every figure in a sentence, made anew."""

    def table(match):
        made = "\n".join(TABLES[match[1]]())
        return f"<!-- table: {match[1]} -->\n{placed(made, page)}\n<!-- end -->"

    def sentence(match):
        return f"<!-- figure: {match[1]} -->{placed(FIGURES[match[1]](), page)}<!-- end -->"

    text = re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)
    return re.sub(r"<!-- figure: (\w+) -->.*?<!-- end -->", sentence, text, flags=re.S)


def placed(text, page):
    """Links from the root as the page needs them."""

    def relative(match):
        return f"]({os.path.relpath(ROOT / match[1], page.parent)}"

    return re.sub(r"\]\(((?:profiling|docs)/[^)#]+)", relative, text)


def pages():
    """``{path: text}`` of every generated page."""
    found = {path: filled(path.read_text(), path) for path in PAGES}
    if measured := stored("billion"):
        found[BILLION] = placed(billion.page(measured), BILLION)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        write_bytes(path, text.encode())
