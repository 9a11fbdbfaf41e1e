"""Table of students and solvers from stored results of ``advkd compare``."""

from advkd.evaluation.comparison_page import cells, reading

from .evidence import NOTHING, markdown, source, stored


def lines():
    """The rows of every machine's comparison, the best at real images first, and how to read them."""
    found = []
    for result in stored("comparison"):
        rows = sorted(result["rows"], key=lambda row: row["real"]["at_infinity"]["value"])
        titles, *table = cells({**result, "rows": rows})
        above = source(result, [row["seconds"] for row in rows], "95 % intervals are in the table")
        found += [*above, *markdown(titles, [[f"`{row[0]}`", *row[1:]] for row in table]), "", reading(result), ""]
    return found[:-1] or NOTHING
