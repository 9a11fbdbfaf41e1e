"""One self-contained page of every method and solver on a plane: pictures, each with a reading of what was measured."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...diffusion.solvers import METHODS as SOLVERS
from ...methods import METHODS, method_class
from ...methods.rectified_flow import straightness
from ..html_page import figure, table_of
from . import pictures, readings
from .data import FAIR, REACH
from .laboratory import EXACT, Laboratory, Outcome
from .methods import LEFT_OUT, ROWS
from .readings import Measured

ARROWS_AT = (0.2, 1.0)
"""Noise levels at which scores are drawn as arrows."""
TWO_SCORES = ("diff-instruct", "diff-instruct-pairs")
"""Rows that have measured their score network."""
FLOWS = {"reparametrize": "v network", "rectified-flow": "first rectified flow", "reflow": "reflow"}
"""Rows that are flows, and what the plot of straightness calls them."""
BESIDE = ("guided", "score-distillation")
"""Rows of another kind than samples of the whole distribution, which the summary's plot leaves out."""


class Section:
    """The part of the page about one data set.

    Args:
        lab: with the outcomes of ``teacher``, ``solvers`` and of rows of :data:`~advkd.evaluation.toy.methods.ROWS`.
        folder: of the pictures.
    """

    def __init__(self, lab: Laboratory, folder: Path):
        self.lab, self.data, self.outcomes, self._folder = lab, lab.data, lab.outcomes, folder
        self._rows = [name for name in ROWS if name in self.outcomes]

    def body(self) -> list[str]:
        """HTML of the section; its pictures are written."""
        parts = [f"<h2>{html.escape(self.data.name)}</h2>", f"<p>{html.escape(self._introduction())}</p>"]
        parts += [*self._row("teacher", "The exact teacher, and DDPM"), *self._solvers()]
        for name in self._rows:
            parts += self._row(name, ROWS[name].title)
        return [*parts, *self._straightness(), *self._scores(), *self._summary()]

    def measured(self) -> list[Measured]:
        """Measures of all samples of teacher and methods."""
        return [
            Measured(name, title, self.outcomes[name].evaluations[title], self.data.measured(points))
            for name in ("teacher", *self._rows)
            for title, points in self.outcomes[name].samples.items()
        ]

    def _introduction(self):
        data = self.data
        return (
            f"{len(data.teacher.means)} Gaussians of deviation {data.deviation:.3f}; a mode is a {data.what}, and there are "
            f"{data.total}. A sample is within if the nearest centre is at most {REACH:g} deviations away (blue; others are "
            f"orange). A mode is kept if {FAIR:.0%} of its fair share of all samples are within it. Width is the deviation of "
            "those within from the mean of those with the same nearest centre, over the data's; spread is the root mean "
            "square distance of all samples from their mean, over the data's. Paths are drawn in "
            "tau x + (1 - tau) z, where a straight flow has straight lines; all begin at the same noise."
        )

    def _picture(self, name: str, draw: Callable[[Path], None], reading: str) -> str:
        path = self._folder / f"{self.data.name}-{name}.png"
        draw(path)
        pictures.shrink(path)
        return figure(path, reading)

    def _row(self, name, title):
        outcome = self.outcomes[name]
        samples, paths = self._beside(name)
        samples, paths = samples | outcome.samples, (paths if outcome.paths else {}) | outcome.paths
        reading = (
            readings.guided_reading(self.data, outcome) if name == "guided" else readings.samples_reading(self.data, samples)
        )
        drawn = self._picture(name, lambda path: pictures.save_samples(self.data, samples, paths, path), reading)
        return [f"<h3>{html.escape(title)}</h3>", drawn]

    def _beside(self, name):
        """Samples and paths that are shown beside a row's own."""
        samples, paths = {}, {}
        for beside in ROWS[name].beside if name in ROWS else ():
            other, _, wanted = beside.partition(": ")
            outcome = self.outcomes[other]
            shown = wanted or next(iter(outcome.samples))
            title = ", ".join(dict.fromkeys((EXACT if other == "teacher" else other, shown)))
            samples[title] = outcome.samples[shown]
            if shown in outcome.paths:
                paths[title] = outcome.paths[shown]
        return samples, paths

    def _solvers(self):
        solvers = self.outcomes["solvers"]
        numbers = {key: {name: found[name] for name in SOLVERS if name in found} for key, found in solvers.numbers.items()}
        drawn = (solvers.samples, solvers.paths)
        return [
            "<h3>Solvers on the exact teacher</h3>",
            self._picture("orders", lambda path: pictures.save_orders(numbers["order"], path), readings.order_reading(solvers)),
            self._picture("shares", lambda path: pictures.save_shares(numbers["whole"], path), readings.whole_reading(solvers)),
            self._picture(
                "solvers", lambda path: pictures.save_samples(self.data, *drawn, path), readings.paths_reading(solvers)
            ),
        ]

    def _straightness(self):
        found = {EXACT: straightness(self.lab.teacher, self.lab.noise().double())}
        found |= {title: self.outcomes[name].numbers["straightness"] for name, title in FLOWS.items() if name in self._rows}
        reading = readings.straightness_reading(found)
        drawn = self._picture("straightness", lambda path: pictures.save_bars(found, "straightness S", path), reading)
        return ["<h3>Straightness</h3>", drawn]

    def _scores(self):
        curves, said = {}, []
        if "reparametrize" in self._rows:
            errors = self.outcomes["reparametrize"].numbers["errors"]
            curves["v network"] = {"from the exact teacher": errors}
            said.append(readings.score_reading(errors))
        for name in (name for name in TWO_SCORES if name in self._rows):
            numbers, title = self.outcomes[name].numbers, ROWS[name].title
            labels = {"errors": "error of q", "floor": "two sets of points", "signal": "signal: exact less teacher's"}
            curves[f"q of {title}"] = {label: numbers[key] for key, label in labels.items()}
            said.append(readings.two_scores_reading(self.outcomes[name], title))
        if not curves:
            return []
        drawn = self._picture("errors", lambda path: pictures.save_errors(curves, path), " ".join(said))
        return ["<h3>Learned and exact scores</h3>", drawn, *self._arrows()]

    def _arrows(self):
        if "reparametrize" not in self._rows:
            return []
        model = self.lab.model(self.lab.network("reparametrize"))
        found = {sigma: pictures.arrows(self.data, model, sigma) for sigma in ARROWS_AT}
        reading = readings.arrows_reading(found)
        return [self._picture("scores", lambda path: pictures.save_scores(self.data, found, path), reading)]

    def _summary(self):
        measured = [row for row in self.measured() if row.name not in BESIDE and not row.title.startswith(EXACT)]
        reading = readings.summary_reading(self.data, [row for row in measured if row.name != "teacher"])
        picture = self._picture("summary", lambda path: pictures.save_summary(measured, path), reading)
        return ["<h3>All methods</h3>", picture, self._table()]

    def _table(self):
        titles = ("row", "samples", "evaluations", "modes kept", "within", "width", "spread", "training: forward / backward")
        return table_of(titles, [self._cells(row) for row in self.measured()])

    def _cells(self, row):
        cost = " / ".join(f"{value:,.0f}" for value in self.outcomes[row.name].cost)
        kept = f"{round(row.found['modes'] * self.data.total)} of {self.data.total}"
        shares = (f"{row.found['within']:.1%}", f"{row.found['width']:.2f}", f"{row.found['spread']:.2f}")
        return (row.name, row.title, str(row.evaluations or "-"), kept, *shares, cost)


def left_out(rows: Sequence[str]) -> str:
    """A paragraph about methods that the page does not show.

    Args:
        rows: those that it shows.
    """
    shown = {ROWS[name].method for name in rows}
    names = [name for name in METHODS if method_class(name).distils and name not in shown]
    said = [f"{name} ({LEFT_OUT[name]})" if name in LEFT_OUT else name for name in names]
    return f"<p>Not shown: {html.escape('; '.join(said))}.</p>" if said else ""


def numbers_of(section: Section) -> dict[str, Any]:
    """Measures of one data set, and the seconds that its rows took one thread, as JSON values.

    Args:
        section: its part of the page.
    """
    rows = [{"row": row.name, "samples": row.title, "evaluations": row.evaluations, **row.found} for row in section.measured()]
    outcomes: dict[str, Outcome] = section.outcomes
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    return {
        "rows": rows,
        "seconds": seconds,
        **{name: outcome.numbers for name, outcome in outcomes.items() if outcome.numbers},
    }
