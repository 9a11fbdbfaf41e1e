"""Table of students and solvers from stored results of ``advkd compare``."""

import re
import shlex
from collections import Counter

from advkd.errors import InputError
from advkd.evaluation.compare import FEW, CompareConfig
from advkd.evaluation.comparison_page import cells, cost_of, reading, said

from .evidence import NOTHING, markdown, source, stored

OF_A_METHOD = (0, 3, 5, 6, 7, 8, 9, 12, 14)
"""Columns of a method's own table."""

METHODS = (
    "adv_kd",
    "reparametrize",
    "progressive",
    "guided",
    "features",
    "rectified_flow",
    "pairs",
    "consistency",
    "diff_instruct",
    "dpdm",
    "ddgan",
)
"""Methods with rows, as the tables of their pages name them."""


def of_method(name):
    """The rows of one method's students, each of the first result that has it, and that table's baseline below them."""

    def rows_of():
        found, shown = [], set()
        for result in (*stored("comparison"), *stored("budget")):
            own = [row for row in result["rows"] if row["method"] == name.replace("_", "-") and row["name"] != "digits"]
            rows = [row for row in own if _model_of(row) not in shown]
            shown.update(map(_model_of, own))
            base = [row for row in result["rows"] if row["name"] == result["baseline"]]
            if rows:
                titles, *table = [[line[i] for i in OF_A_METHOD] for line in cells({**result, "rows": [*rows, *base]})]
                above = source(result, [row["seconds"] for row in rows], "95 % intervals are in the table")
                found += [*_told(result), *above, *markdown(titles, [[f"`{row[0]}`", *row[1:]] for row in table]), ""]
        return found[:-1] or NOTHING

    return rows_of


BUDGET = (
    "Rows of the [same-budget table](docs/pages/index.md#methods-by-evaluations) that no other comparison has; "
    "one whose name stands in another is of another training:"
)
"""Line above rows of ``budget.json``, whose folders may be named as those of other trainings."""


def _told(result):
    return [BUDGET, ""] if result["path"].endswith("budget.json") else []


def _model_of(row):
    """Method, evaluations and weights of a row: what it is, whatever its name."""
    return row["method"], row["evaluations"], *(training["weights_sha256"] for training in row["trainings"])


V, DDGAN, DI_GAN = (
    f"{first}+seed-1/{other}+seed-2/{other}" for first, other in (("v@8", "v@8"), ("ddgan/1", "ddgan"), ("di-gan", "di-gan"))
)
"""Rows of three trainings."""

DIFFERENCES = (
    ("pd/4", "dpmpp-3m 4"),
    ("pairs", "ddim 10"),
    ("pairs", "rf2-1"),
    ("pairs", "digits"),
    ("rf2-1", "rf2@1"),
    *((row, f"prototype/{row}") for row in ("pd/4", "pd/1", "pairs", "rf2", "rf2@1", "cd", "cd@1", "di")),
    ("cd-2", "cd@1"),
    ("ct", "ct@1"),
    ("cd@1", "ct@1"),
    ("di", "digits"),
    ("prototype/di", "digits"),
    ("di-gan", "di"),
    ("di-gan", "digits"),
    ("di-gan-2", "di-gan"),
    ("dpdm", "dpdm@4"),
    ("dpdm", "unipc-2 8"),
    ("simulated/1", "levels/uniform"),
    ("simulated/3", "simulated/3@4"),
    ("simulated/3", "unipc-2 8"),
    ("cfd/1", "pd-on/1"),
    ("cfd/2", "pd-on/2"),
    ("ddgan/4", "ddgan/1"),
    ("ddgan/4", "ddgan/4@1"),
    ("ddgan/4", "pd/4"),
    ("ddgan/1", "digits"),
    ("ddgan/1", "di-gan"),
    ("ddgan/4", DDGAN),
    (DDGAN, "ddgan/c1"),
    (DDGAN, DI_GAN),
    (DDGAN, "digits"),
    (DI_GAN, "digits"),
    *((V, solver) for solver in ("unipc-2 8", "dpm-2 7", "ddpm 50", "unipc-2 50")),
    ("paper-long", "paper"),
    ("paper-long", "digits"),
)
"""Pairs of rows that the pages speak of."""


def differences():
    """Paired differences of distances to real images, below 0 where the first row is better; each of the first result."""
    found, shown = [], set()
    for result in (*stored("comparison"), *stored("budget")):
        known = {(one["row"], one["less"]): one for one in result["differences"]}
        models, rows = {row["name"]: _model_of(row) for row in result["rows"]}, []
        for pair in DIFFERENCES:
            one = known.get(pair) or _turned(known.get(pair[::-1]))
            if one and (both := tuple(map(models.get, pair))) not in shown:
                shown.add(both)
                rows.append(
                    (*(f"`{name}`" for name in pair), *(said(one[key], 3, sign="+") for key in ("frechet", "at_infinity")))
                )
        if rows:
            above = source(result, [row["seconds"] for row in result["rows"]], "95 % intervals are in the table")
            titles = ("row", "less", f"{result['score']} to real images, difference", "at infinity, difference")
            found += [*_told(result), *above, *markdown(titles, rows), ""]
    return found[:-1] or NOTHING


def _turned(one):
    """A difference the other way round."""
    if one is None:
        return None
    keys = ("frechet", "at_infinity")
    return {key: {"value": -one[key]["value"], "interval": [-end for end in reversed(one[key]["interval"])]} for key in keys}


def lines(name="comparison"):
    """The rows of every machine's comparison, the best at real images first, and how to read them."""
    found = []
    for result in stored(name):
        rows = sorted(result["rows"], key=lambda row: row["real"]["at_infinity"]["value"])
        titles, *table = cells({**result, "rows": rows})
        above = source(result, [row["seconds"] for row in rows], "95 % intervals are in the table")
        found += [*above, *markdown(titles, [[f"`{row[0]}`", *row[1:]] for row in table]), "", reading(result), ""]
    return found[:-1] or NOTHING


def budgets():
    """A row for each student and solver, a column for each number of evaluations: distance, and precision and recall."""
    found = []
    for result in stored("budget"):
        columns, models, series = set(), {}, _series(result["rows"])
        for row in result["rows"]:
            column = _column(row, result["config"]["evaluations"])
            name = _model(row["name"], row["evaluations"], series)
            cells_of = models.setdefault((row["kind"] == "solver", row["method"], name), {})
            if column in cells_of:
                both = f"{cells_of[column]['name']} and {row['name']}"
                raise InputError(f"{result['path']}: {both} are both {name} in column {column}: name their folders otherwise")
            cells_of[column] = row
            columns.add(column)
        table = [_budget(*model, models[model], sorted(columns)) for model in sorted(models)]
        titles = ["method", "student", *(f"{count} evaluation{'s' * (count > 1)}" for count in sorted(columns)), "training"]
        above = source(result, [row["seconds"] for row in result["rows"]], "95 % intervals are in the table")
        below = reading(result) + _shorter(result["config"])
        found += [*above, *markdown(titles, table), "", below, "", "```sh", command(result), "```", ""]
    return found[:-1] or NOTHING


def _shorter(config):
    """A sentence about rows with fewer images, if there are any: their distances are not those of the others."""
    if not config["num_long"]:
        return ""
    more = f"Rows of more than {FEW} evaluations have {config['num_long']:,} images and the others {config['num']:,}"
    return f" {more}: fewer images raise a distance."


def _column(row, evaluations):
    """The number of evaluations that a row was allowed: some solvers take fewer than they are given."""
    allowed = [count for count in evaluations if count >= row["evaluations"]]
    return min(allowed) if row["kind"] == "solver" and allowed else row["evaluations"]


def _series(rows):
    """Folders of which several students, named by their evaluations, have a row: ``pd`` of ``pd/1`` and ``pd/2``."""
    names = [(row["name"].partition("+")[0], f"/{row['evaluations']}") for row in rows]
    folders = Counter(name.removesuffix(end) for name, end in names if name.endswith(end))
    return {folder for folder, count in folders.items() if count > 1}


def _model(name, evaluations, series):
    """A row's name without its number of evaluations; of several trainings the first one's."""
    first = name.partition("+")[0]
    folder = first.removesuffix(f"/{evaluations}")
    return folder if folder in series else re.sub(r"(@\d+| \d+)$", "", first)


def command(result):
    """The command that makes a result, with the options that are not the default."""
    config, plain = result["config"], CompareConfig()
    given = {name: value for name, value in config.items() if value not in (getattr(plain, name), list(plain.evaluations))}
    text = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in given.items()}
    options = " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in text.items())
    return f"advkd compare --teacher {result['teacher']['name']} {options} --out comparison"


def _budget(solver, method, name, rows, columns):
    cells = [_quality(rows[count], count) if count in rows else "" for count in columns]
    return [method, "teacher" if solver else f"`{name}`", *cells, "" if solver else _costs(rows)]


def _costs(rows):
    """The cost of a student's training, or of the one behind each number of evaluations."""
    costs = {}
    for _, row in sorted(rows.items()):
        costs.setdefault(row["name"].partition("@")[0], []).append(row)
    if len(costs) == 1:
        return cost_of(next(iter(rows.values())))
    return "<br>".join(f"{own[0]['evaluations']}: {cost_of(own[0])}" for own in costs.values())


def _quality(row, column):
    """Distance to real images with its interval, precision and recall, its trainings, and evaluations other than allowed."""
    real, trainings = row["real"], len(row["trainings"])
    shares = " / ".join(f"{real[name]['value']:.3f}" for name in ("precision", "recall"))
    fewer = f"<br>(with {row['evaluations']})" if row["evaluations"] != column else ""
    several = f"<br>({trainings} trainings)" if trainings > 1 else ""
    return f"{said(real['frechet'], 3, bool(several))}<br>{shares}{several}{fewer}"
