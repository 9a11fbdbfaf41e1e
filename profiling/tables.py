"""Write the README's tables from the JSON under ``profiling/results``: python -m profiling.tables

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; a test checks that README and results agree.
"""

import json
import re

from advkd.evaluate import cells
from advkd.files import write_bytes
from advkd.report import seconds

from .harness import RESULTS, ROOT

README = ROOT / "README.md"


def results(name):
    """``[(device folder's result), ...]`` of a benchmark, by folder name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{name}.json"))]


def evaluation():
    """Distances of the shipped student, with floors and intervals."""
    lines = []
    for result in results("evaluation"):
        titles, *rows = cells(result)
        lines += [_row(*titles), _rule(len(titles)), *(_row(*row) for row in rows)]
    return lines


def ablation():
    """What each choice is worth."""
    lines = []
    for result in results("ablation"):
        score = result["runs"][0]["score"]
        titles = ("run", f"{score}, x floor (95 %)", "at infinity", "precision", "recall", "likeness", "CPU s")
        lines += [_row(*titles), _rule(len(titles))]
        for run in result["runs"]:
            low, high = (end / run["floor"] for end in run["frechet_interval"])
            figures = (f"{run['times_floor']:.1f} ({low:.1f} to {high:.1f})", f"{run['at_infinity']:.2f}")
            figures += (f"{run['precision']:.3f}", f"{run['recall']:.3f}", f"{run['correlation']:.3f}", seconds(run))
            lines.append(_row(run["name"], *figures))
        lines += ["", "<details><summary>The command of each row</summary>", "", "```sh"]
        lines += [line for run in result["runs"] for line in (f"# {run['name']}", run["command"])]
        lines += ["```", "", "</details>"]
    return lines


def speed():
    """Times of student and teacher, ours and others."""
    lines = []
    for student in results("bench_student"):
        place = student["provenance"]
        lines += [f"{place['device']}, {place['threads']} threads, torch {place['versions']['torch']}:", ""]
        lines += [_row("work", "images", "engine", "ms per call (p20 to p80)", "GFLOP/s"), _rule(5)]
        same = [r for r in results("bench_teacher") if r["provenance"]["device"] == place["device"]]
        for case in [*student["cases"], *(case for result in same for case in result["cases"])]:
            for entry in case["contestants"]:
                lines.append(_row(case["case"], case["images"], entry["name"], _time(entry), _rate(entry)))
        lines.append("")
    return lines[:-1]


def _time(entry):
    if "missing" in entry:
        return "cannot run here"
    if "seconds" not in entry:
        return f"off by {entry['parity']['error']:.1e}, not timed"
    median, p20, p80 = (1e3 * entry["seconds"][key] for key in ("median", "p20", "p80"))
    return f"{median:.2f} ({p20:.2f} to {p80:.2f})"


def _rate(entry):
    return f"{entry['flop_per_second'] / 1e9:.0f}" if "flop_per_second" in entry else ""


def _row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def _rule(columns):
    return "|" + "---|" * columns


TABLES = {"evaluation": evaluation, "ablation": ablation, "speed": speed}


def filled(text):
    """The README's text with every table made anew."""

    def replace(match):
        return f"<!-- table: {match[1]} -->\n" + "\n".join(TABLES[match[1]]()) + "\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.S)


if __name__ == "__main__":
    write_bytes(README, filled(README.read_text()).encode())
