"""A short run of the campaign of damaged files: each kind of file is damaged in several ways, and every mutation is tried."""

import json
import subprocess
import sys
from collections import Counter

from profiling.limits.damage import STRUCTURES, mutations
from profiling.limits.damaged_files import ROUND, case_of
from profiling.limits.file_kinds import KINDS

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


SCRIPT = """
import json
import sys
from pathlib import Path
from profiling.limits.damaged_files import Workplace

whole = Workplace(Path(sys.argv[1])).whole
print(json.dumps([name for name, found in whole.items() if found is not None]))
"""


def test_the_undamaged_file_of_every_kind_is_read(tmp_path):
    """All but Inception's weights, whose own are not here."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, env=process_environment({"OMP_NUM_THREADS": "1"}))
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert set(json.loads(ended.stdout.splitlines()[-1])) == set(KINDS) - {"Inception's weights"}


def test_damaged_files_are_refused_or_read_as_they_stand(tmp_path):
    """In a process of its own: forked ones must not have been left by threads."""
    command = [sys.executable, "-m", "profiling.limits.damaged_files", "--count", str(len(CASES)), "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, env=process_environment({"OMP_NUM_THREADS": "1"}))
    result = json.loads((tmp_path / "limits-damaged-files.json").read_text())
    assert result["failures"] == [] and ended.returncode == 0, ended.stderr[-2000:]
    assert {row["kind"]: row["tried"] for row in result["rows"]} == Counter(ROUND)
