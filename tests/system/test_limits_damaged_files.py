"""A short run of the campaign of damaged files: each kind of file is damaged in several ways, and every mutation is tried."""

import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from profiling.limits import damaged_files
from profiling.limits.damage import STRUCTURES, mutations
from profiling.limits.damaged_files import ROUND, case_of
from profiling.limits.file_kinds import KINDS, Kind

from ..conftest import process_environment

CASES = range(len(ROUND))


def test_the_cases_try_every_kind_and_every_mutation():
    tried = [case_of(0, number)[:2] for number in CASES]
    assert {name for name, _ in tried} == set(KINDS)
    assert {mutation for _, mutation in tried} == {mutation for form in STRUCTURES for mutation in mutations(form)}
    assert {kind.form for kind in KINDS.values()} == set(STRUCTURES)


def test_a_case_is_the_same_in_every_run():
    for number in CASES:
        (name, mutation, draw), again = case_of(7, number), case_of(7, number)
        assert (name, mutation, draw.random()) == (*again[:2], again[2].random())


@pytest.mark.parametrize("whole", ({"preset": None}, {}))
def test_nothing_does_not_equal_an_undamaged_file_that_was_not_read(whole, monkeypatch, tmp_path):
    monkeypatch.setitem(KINDS, "preset", Kind("tables/preset.json", lambda place: None))
    outcome, _ = damaged_files._outcome(SimpleNamespace(whole=whole, case=tmp_path), "preset", "truncated")
    assert outcome == "wrong"


SCRIPT = """
import json
import sys
from pathlib import Path
from profiling.limits.damaged_files import Workplace, run_in
from profiling.limits.record import Campaign

place, campaign = Workplace(Path(sys.argv[1])), Campaign("damaged-files", 0)
run_in(place, campaign, range(int(sys.argv[2])))
read = [name for name, found in place.whole.items() if found is not None]
Path(sys.argv[1], "found.json").write_text(json.dumps([read, campaign.rows(), campaign.failures]))
"""


def test_damaged_files_are_refused_or_read_as_they_stand(tmp_path):
    """In a process of its own: forked ones must not have been left by threads. All undamaged files but Inception's are read."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(len(CASES))]
    ended = subprocess.run(command, capture_output=True, text=True, env=process_environment({"OMP_NUM_THREADS": "1"}))
    assert ended.returncode == 0, ended.stderr[-2000:]
    read, rows, failures = json.loads((tmp_path / "found.json").read_text())
    assert failures == [] and set(read) == set(KINDS) - {"Inception's weights"}
    assert {row["kind"]: row["tried"] for row in rows} == Counter(ROUND)
