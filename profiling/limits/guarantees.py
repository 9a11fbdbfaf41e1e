"""The tables of ``docs/pages/tried.md``: what each campaign tried, how often, and how it ended."""

from ..evidence import checked, link, markdown, stored
from .record import BAD

CAMPAIGNS = ("kills", "faults", "damaged_files", "calls")


def table(name):
    """The function that makes a campaign's lines of Markdown."""

    def lines():
        found = []
        for result in stored(f"limits-{name.replace('_', '-')}"):
            found += [*_source(result), *_rows("tried on", ((row["kind"], row) for row in result["rows"]))]
            if "modes" in result:
                found += ["", *_rows("way to call", result["modes"].items())]
            found.append("")
        return found[:-1] or ["Nothing has been tried yet."]

    return lines


def _rows(title, counts):
    """A table of ``(name, counts)``."""
    columns = ("tried", "right", "refused", *BAD)
    rows = [(name, *(f"{row[key]:,}" for key in columns)) for name, row in counts]
    return markdown((title, "cases", *columns[1:]), rows)


def _source(result):
    place = checked(result)
    cases = sum(row["tried"] for row in result["rows"])
    start = f" from number {result['first']:,} on" if result.get("first") else ""
    spent = f"{cases:,} cases of seed {result['seed']}{start} in {result['seconds'] / 60:.0f} min"
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items() if version)
    return [f"{link(result)}: {spent}; {place['device']}, {versions}; commit {place['commit'][:8]}:", ""]
