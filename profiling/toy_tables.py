"""Table of the plane's samples from stored results of ``advkd toy``."""

import math

from advkd.evaluation.toy.data import DATA

from .evidence import NOTHING, markdown, source, stored


def lines():
    """A row for every picture of samples, with modes, share of good samples and width for each data set."""
    found = []
    for result in stored("toy"):
        num, data = result["config"]["samples"], result["data"]
        error = 50 / math.sqrt(num)
        took = " and ".join(f"{one['seconds'] / 60:.1f}" for one in data.values())
        sure = f"{num:,} samples a row, so that standard errors of shares are at most {error:.1f} %"
        found += source(result, [], f"{sure}; the rows of {' and '.join(data)} took {took} minutes, a thread each")
        titles = ["row", "samples", "evaluations"]
        titles += [f"{name}: modes, within, width" for name in data]
        rows, totals = zip(*(each["rows"] for each in data.values()), strict=True), [DATA[name]().total for name in data]
        found += [*markdown(titles, [_cells(same, totals) for same in rows]), ""]
    return found[:-1] or NOTHING


def _cells(rows, totals):
    first = rows[0]
    measured = [
        f"{round(row['modes'] * total)} of {total}, {row['within']:.0%}, {row['width']:.2f}"
        for row, total in zip(rows, totals, strict=True)
    ]
    return [f"`{first['row']}`", first["samples"], first["evaluations"] or "-", *measured]
