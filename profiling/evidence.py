"""Where a figure comes from and how sure it is: without a stored result's commit, device, versions and spread none is written.

A *time* is ``{"median", "p20", "p80", ...}`` as :func:`advkd.runtime.timing.measure` gives it, or a list of at least two runs.
"""

import json
import re
import statistics

from advkd.errors import InputError

from . import kernel_digests
from .paths import RESULTS, ROOT

REQUIRED = ("commit", "device", "versions")


def stored(name):
    """The results of that name, of every device, by folder; each with its ``path`` and the kernels ``changed`` since."""
    return [_read(path) for path in sorted(RESULTS.glob(f"*/{name}.json"))]


def _read(path):
    result = json.loads(path.read_text())
    return {**result, "path": path.relative_to(ROOT).as_posix(), "changed": kernel_digests.changed(path.stem, result)}


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
    lines = [
        f"{place['device']}, {place['threads']} threads, {versions}; commit {', '.join(commits)}; {'; '.join(spread)}:",
        "",
    ]
    lines[0] = f"{link(result)}: {lines[0]}"
    return [*stale(result), *lines]


def stale(result):
    """A line that says so, where kernels have changed since."""
    changed = result.get("changed")
    return [f"**Stale**: measured before the last change of {', '.join(changed)}.", ""] if changed else []


def device_alone(result, times, sure=""):
    """Instead of :func:`source`, for what has been measured just now and is not stored yet."""
    return [f"{result['provenance']['device']}:", ""]


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


NUMBERS = "one|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|fifty|(a )?hundred|a|an|several|some"
UNITS = (
    r"(ms|us|s|min|h|x|%|×|(micro|milli)?seconds?|minutes?|hours?|times|percent|fps|[GMKT]?(B|FLOP|FLOPS|OP)/s|/s|"
    r"images?(/s| per second| a second)|(ms|us|s|seconds?|joules?)(/| per | an? )image)(?![\w])"
)
FIGURE = re.compile(
    rf"(?<![\w.])(\d[\d,.]*\s?{UNITS}|({NUMBERS}) {UNITS})"
    r"|\b(faster|slower|quicker|fastest|outpaces?|speed-?ups?|gains?|twice|half the|double the|factor of"
    r"|as (fast|quick|slow)|(a|one|two) (half|thirds?|quarters?|fifths?|sixths?|tenths?)|minutes|at the speed of)\b"
)
"""A figure of performance, or a comparison, also in words."""
LINK = re.compile(r"\]\(([^)]*results/[^)]*\.json)\)")


def unsupported(text, folder=ROOT):
    """Sentences of a page in ``folder`` that state performance and link to no result; tables are the generator's own."""
    text = re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->|^```.*?^```", "", text, flags=re.S | re.M)
    text = re.sub(r"<!--.*?-->", "", text)
    blocks = [re.sub(r"\s+", " ", re.sub(r"^> ?", "", block, flags=re.M)) for block in re.split(r"\n\s*\n", text)]
    sentences = [s for block in blocks for s in re.split(r"(?<=[.:;!?])\s+(?=[A-Z`*\[])", block)]
    return [s for s in sentences if FIGURE.search(re.sub(r"`[^`]*`|\]\([^)]*\)", "", s)) and not _is_linked(s, folder)]


def _is_linked(sentence, folder):
    links = LINK.findall(sentence)
    return bool(links) and all((folder / path).is_file() for path in links)
