"""The table of the plane's samples from stored results."""

import pytest

from profiling import toy_tables
from profiling.evidence import NOTHING


def row(modes, within, evaluations=1):
    return {
        "row": "pairs",
        "samples": "one evaluation",
        "evaluations": evaluations,
        "modes": modes,
        "within": within,
        "width": 1.5,
    }


def test_a_row_has_the_measures_of_every_data_set(monkeypatch):
    place = {"commit": "0123456789", "device": "a processor", "versions": {"torch": "2"}, "threads": 2, "dirty": False}
    data = {
        "25-gaussians": {"rows": [row(24 / 25, 0.5), row(0.0, 0.0, 0)], "seconds": 90.0},
        "two-moons": {"rows": [row(1.0, 0.25), row(0.5, 1.0, 0)], "seconds": 123.0},
    }
    result = {
        "config": {"samples": 2500},
        "data": data,
        "provenance": place,
        "path": "profiling/results/a/toy.json",
        "changed": [],
    }
    monkeypatch.setattr(toy_tables, "stored", lambda name: [result] if name == "toy" else [])
    above, _, titles, _, first, second = toy_tables.lines()
    assert "2,500 samples a row, so that standard errors of shares are at most 1.0 %" in above
    assert "the rows of 25-gaussians and two-moons took 1.5 and 2.0 minutes, a thread each:" in above
    assert titles == "| row | samples | evaluations | 25-gaussians: modes, within, width | two-moons: modes, within, width |"
    assert first == "| `pairs` | one evaluation | 1 | 24 of 25, 50%, 1.50 | 16 of 16, 25%, 1.50 |"
    assert second == "| `pairs` | one evaluation | - | 0 of 25, 0%, 1.50 | 8 of 16, 100%, 1.50 |"
    data["two-moons"]["rows"].pop()
    with pytest.raises(ValueError, match="shorter"):
        toy_tables.lines()
    monkeypatch.setattr(toy_tables, "stored", lambda name: [])
    assert toy_tables.lines() == NOTHING
