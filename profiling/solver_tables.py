"""Tables of the teacher's solvers: what is known of each, and the distance of its images by network evaluations."""

from advkd.diffusion.solvers import METHODS, Solver

from .evidence import NOTHING, markdown, source, stored


def solvers():
    """Every solver: order, evaluations of a step, whether it adds noise, and its paper."""
    rows = [
        (
            f"`{name}`",
            method.order or "-",
            method.whole or "-",
            method.evaluations,
            "yes" if Solver(name).stochastic else "no",
            method.paper,
        )
        for name, method in METHODS.items()
    ]
    return markdown(("solver", "order", "order of whole runs", "evaluations of a step", "adds noise", "paper"), rows)


def quality():
    """Distances by solver and evaluations, of every machine that has measured them."""
    lines = []
    for result in stored("solvers"):
        lines += [*source(result, [], "95 % intervals are in the table"), *_rows(result), ""]
    return lines[:-1] or NOTHING


def _rows(result):
    fine = f"unipc-2, {result['config']['fine_steps']} steps"
    titles = ("solver", "evaluations", "N", "FD to real digits", f"less {result['baseline']}", "at infinity")
    titles += (f"FD to {fine}", "at infinity")
    rows = []
    for row in sorted(result["rows"], key=lambda row: (row["evaluations"], row["real"]["at_infinity"])):
        real, other = row["real"], row["fine"]
        rows.append(
            (f"`{row['solver']}`", row["evaluations"], f"{real['num']:,}", f"{real['frechet']:.3f}")
            + (_with_interval(real["difference"], real["difference_interval"], "+"),)
            + (_with_interval(real["at_infinity"], real["at_infinity_interval"]), f"{other['frechet']:.3f}")
            + (_with_interval(other["at_infinity"], other["at_infinity_interval"]),)
        )
    return markdown(titles, rows)


def _with_interval(value, interval, sign=""):
    low, high = interval
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
