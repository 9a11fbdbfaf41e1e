"""The table of students and solvers from stored results."""

import pytest

from advkd.errors import InputError
from profiling import comparison_tables
from profiling.evidence import NOTHING


def row(name, distance, trainings=1, cost=None):
    figure = {"value": distance, "interval": [distance - 0.5, distance + 0.5], "spread": [distance - 0.1, distance + 0.1]}
    real = dict.fromkeys(("frechet", "at_infinity", "difference", "precision", "recall"), figure)
    return {
        **{"name": name, "kind": "student", "method": "progressive", "parameters": 12_345, "evaluations": 2, "num": 200},
        "real": real,
        "fine": dict.fromkeys(("frechet", "at_infinity", "times_floor"), figure),
        "seconds": {"median": 0.002, "p20": 0.0019, "p80": 0.0021, "repeats": 5},
        **{"cost": cost, "classes": None, "guidance": 0.0},
        "trainings": [{"known_unseen": True, "weights_sha256": name}] * trainings,
    }


RESULT = {
    "rows": [row("ddim 2", 3.0), row("a/2+b/2", 1.25, 2, {"forward": 12_000, "backward": 3_000})],
    **{"baseline": "ddim 2", "score": "FD-digits", "floor": 0.125, "floor_num": 100, "batch_size": 16},
    "config": {"fine_steps": 100},
    "provenance": {
        "commit": "0123456789",
        "device": "a processor",
        "versions": {"torch": "2.13.0"},
        "threads": 2,
        "dirty": False,
    },
    **{"path": "profiling/results/a/comparison.json", "changed": []},
}


def test_the_best_row_comes_first(monkeypatch):
    monkeypatch.setattr(comparison_tables, "stored", lambda name: [RESULT] if name == "comparison" else [])
    above, _, titles, _, best, other, _, reading = comparison_tables.lines()
    assert "[`comparison.json`](profiling/results/a/comparison.json): a processor" in above and "spread" in above
    assert "less ddim 2" in titles and "x floor at N = 100" in titles
    assert best.startswith("| `a/2+b/2` | progressive | 12,345 | 2 | 200 | 1.250 (0.750 to 1.750) [1.150 to 1.350] |")
    assert best.endswith("| 2 (1.9 to 2.1) | 12,000 / 3,000 |")
    # The brackets are for several trainings alone.
    assert other.startswith("| `ddim 2` |") and "[" not in other and other.endswith("| not recorded |")
    assert "0.1250" in reading and "in brackets" in reading


def test_nothing_without_a_result_and_no_result_of_changed_sources(monkeypatch):
    monkeypatch.setattr(comparison_tables, "stored", lambda name: [])
    assert comparison_tables.lines() == NOTHING
    dirty = {**RESULT, "provenance": {**RESULT["provenance"], "dirty": True}}
    monkeypatch.setattr(comparison_tables, "stored", lambda name: [dirty])
    with pytest.raises(InputError, match="measured on changed sources"):
        comparison_tables.lines()


def test_a_methods_rows_stand_above_the_baseline(monkeypatch):
    solver = {**row("ddim 2", 3.0), "method": "ddim", "kind": "solver"}
    result = {**RESULT, "rows": [solver, RESULT["rows"][1]]}
    monkeypatch.setattr(comparison_tables, "stored", lambda name: [result] if name == "comparison" else [])
    _, _, titles, _, own, base = comparison_tables.of_method("progressive")()
    assert titles.startswith("| row | evaluations | FD-digits to real images | at infinity | less ddim 2 |")
    assert own.startswith("| `a/2+b/2` | 2 |") and base.startswith("| `ddim 2` | 2 |")
    assert comparison_tables.of_method("rectified_flow")() == NOTHING


def test_a_row_of_two_results_stands_in_the_first_alone(monkeypatch):
    """One model may have another name in the second, and one name stand for another model."""
    solver = {**row("ddim 2", 3.0), "method": "ddim", "kind": "solver"}
    again = {**RESULT["rows"][1], "name": "the same"}
    other = {**row("a/2+b/2", 5.0), "trainings": [{"known_unseen": True, "weights_sha256": "another"}]}
    one = {"frechet": {"value": -1.0, "interval": [-2.0, 0.0]}}
    told = [{"row": "pairs", "less": "digits", "frechet": one["frechet"], "at_infinity": one["frechet"]}]
    rows = [{**row("pairs", 1.0), "evaluations": 1}, {**row("digits", 2.0), "evaluations": 1}]
    results = {
        "comparison": {**RESULT, "rows": [solver, RESULT["rows"][1], *rows], "differences": told},
        "budget": {**RESULT, "rows": [solver, again, other, *rows], "differences": told},
    }
    monkeypatch.setattr(comparison_tables, "stored", lambda name: [results[name]] if name in results else [])
    shown = [line for line in comparison_tables.of_method("progressive")() if line.startswith("| `") and "ddim 2" not in line]
    assert [line.split("|")[3].split()[0] for line in shown if "`a/2+b/2`" in line] == ["1.250", "5.000"]
    assert not any("the same" in line for line in shown)
    assert sum(line.startswith("| `pairs` | `digits`") for line in comparison_tables.differences()) == 1


def test_differences_are_those_of_the_pages_whichever_way_they_are_stored(monkeypatch):
    """Stored as the second less the first, a difference is turned: its sign, and the ends of its interval."""
    one = {"value": -1.0, "interval": [-1.25, -0.5]}
    turned = {"value": 0.75, "interval": [0.5, 1.5]}
    stored = [
        {"row": "pd/4", "less": "dpmpp-3m 4", "frechet": one, "at_infinity": one},
        {"row": "prototype/pd/4", "less": "pd/4", "frechet": turned, "at_infinity": turned},
    ]
    rows = [row(name, 1.0) for name in ("pd/4", "dpmpp-3m 4", "prototype/pd/4")]
    result = {**RESULT, "rows": rows, "differences": stored}
    monkeypatch.setattr(comparison_tables, "stored", lambda name: [result] if name == "comparison" else [])
    *_, first, second = comparison_tables.differences()
    assert first == "| `pd/4` | `dpmpp-3m 4` | -1.000 (-1.250 to -0.500) | -1.000 (-1.250 to -0.500) |"
    assert second == "| `pd/4` | `prototype/pd/4` | -0.750 (-1.500 to -0.500) | -0.750 (-1.500 to -0.500) |"


def test_a_row_for_each_model_and_a_column_for_each_number_of_evaluations(monkeypatch):
    """Students of several folders share a row, each training with its cost; solvers stand where they were allowed to."""
    cost = {"forward": 7_000, "backward": 5_000}
    students = [
        {**row("pd/1+other/pd", 3.0, 2, cost), "evaluations": 1},
        {**row("pd/4@2", 5.0), "evaluations": 2},
        {**row("pd/4", 2.0, 1, cost), "evaluations": 4},
        {**row("cd@1", 6.0, 1, cost), "evaluations": 1},
        {**row("cd", 7.0, 1, cost), "evaluations": 2},
        {**row("seed/1", 8.0, 1, cost), "evaluations": 1},  # its number is not one of a series
    ]
    solver = {**row("heun 3", 4.0), "method": "heun", "kind": "solver", "evaluations": 3}
    several = {**row("a@1+b@1", 1.0, 2, {"forward": 12_000, "backward": 3_000}), "evaluations": 1}
    config = {"students": "a b,c", "solvers": "", "evaluations": [4, 8], "fine_steps": 20, "num": 10_000, "num_long": 2_000}
    result = {**RESULT, "rows": [solver, several, *students], "config": config, "teacher": {"name": "digits"}}
    monkeypatch.setattr(comparison_tables, "stored", lambda name: [result] if name == "budget" else [])
    _, _, titles, _, *rows, _, below, _, _, made, _ = comparison_tables.budgets()
    told = "Rows of more than 8 evaluations have 2,000 images and the others 10,000: fewer images raise a distance."
    assert below.endswith(told)
    options = "--evaluations 4,8 --fine-steps 20 --num-long 2000"
    assert made == f"advkd compare --teacher digits --students 'a b,c' {options} --out comparison"
    assert titles == "| method | student | 1 evaluation | 2 evaluations | 4 evaluations | training |"
    assert rows == [
        f"| progressive | `a` | {of_two(1)} |  |  | 12,000 / 3,000 |",
        f"| progressive | `cd` | {cell(6)} | {cell(7)} |  | 7,000 / 5,000 |",
        f"| progressive | `pd` | {of_two(3)} |  | {cell(2)} | 1: 7,000 / 5,000<br>4: 7,000 / 5,000 |",
        f"| progressive | `pd/4` |  | {cell(5)} |  | not recorded |",
        f"| progressive | `seed/1` | {cell(8)} |  |  | 7,000 / 5,000 |",
        f"| heun | teacher |  |  | {cell(4)}<br>(with 3) |  |",
    ]


def cell(value):
    return f"{value:.3f} ({value - 0.5:.3f} to {value + 0.5:.3f})<br>{value:.3f} / {value:.3f}"


def of_two(value):
    distance, shares = cell(value).split("<br>")
    return f"{distance} [{value - 0.1:.3f} to {value + 0.1:.3f}]<br>{shares}<br>(2 trainings)"


def test_rows_of_one_name_are_refused(monkeypatch):
    rows = [{**row("cd@1", 1.0), "evaluations": 1}, {**row("cd", 2.0), "evaluations": 1}]
    result = {**RESULT, "rows": rows, "config": {"evaluations": [4]}}
    monkeypatch.setattr(comparison_tables, "stored", lambda name: [result])
    with pytest.raises(InputError, match="comparison.json: cd@1 and cd are both cd in column 1: name their folders otherwise"):
        comparison_tables.budgets()
