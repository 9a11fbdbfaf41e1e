"""The plot of solvers' orders: which solvers it has, that their errors fall as it says, and the file."""

import pytest

from advkd.diffusion.solvers import METHODS
from profiling import solver_orders

RUNS = {name: method.order for name, method in METHODS.items() if method.order} | {"dpmpp-3m": 2, "deis-3": 2, "unipc-3": 3}
"""Orders of whole runs, whose first step is of first order."""

DRAWN = {name: slopes for names, slopes in solver_orders.PANELS.values() for name in names}


def test_every_deterministic_solver_has_a_curve():
    shared = {name for label in solver_orders.SAME.values() for name in label.split(", ")}
    assert {*DRAWN} | shared == {*RUNS} and {*solver_orders.SAME} <= {*DRAWN}


@pytest.mark.parametrize("name", solver_orders.SAME["ddim"].split(", ")[1:])
def test_curves_that_are_one(name):
    (_, shared), (_, found) = (solver_orders.errors(n, 2) for n in ("ddim", name))
    assert found == pytest.approx(shared, rel=1e-9)


@pytest.mark.parametrize("name", DRAWN)
def test_errors_fall_with_the_order(name):
    counts, found = solver_orders.errors(name)
    assert counts == [METHODS[name].evaluations * steps for steps in solver_orders.COUNTS]
    assert abs(solver_orders.fitted_order(counts, found) - RUNS[name]) <= 0.15 and RUNS[name] in DRAWN[name]


def test_the_plot_is_a_picture(tmp_path):
    solver_orders.plot(tmp_path / "orders.png")
    assert (tmp_path / "orders.png").read_bytes()[:4] == b"\x89PNG"
