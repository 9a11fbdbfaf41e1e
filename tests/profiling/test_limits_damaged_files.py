"""A short run of the campaign of damaged files: each kind of file is damaged in several ways, and every mutation is tried."""

import contextlib
import json
import random
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from profiling.limits import damaged_files
from profiling.limits.damage import STRUCTURES, damage, mutations
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


def test_damage_changes_the_contents():
    """An equal file in its place, or the same JSON laid out another way, is no damage."""
    for number in range(300):
        draw = random.Random(number)
        for data, form in ((b'{"a": 1}', "json"), (b"a = 1\n", "toml"), (bytes(64), "image")):
            mutation, found = damage(draw, data, form, draw.choice(mutations(form)), [data, data + b"x"])
            assert found != data and mutation in mutations(form)
            if form == "json":
                with contextlib.suppress(ValueError, RecursionError):
                    assert json.loads(found, object_pairs_hook=repr) != json.loads(data, object_pairs_hook=repr)


@pytest.mark.parametrize(
    ("said", "outcome"), (("{case}/tables/preset.json is bad", "refused"), ("--out {case}/out is bad", "crashed"))
)
def test_a_refusal_names_the_file(said, outcome, tmp_path):
    """The folder that all cases write to does not count as a name."""
    refused = damaged_files.Refused(2, f"advkd: {said.format(case=tmp_path)}")
    assert damaged_files._refusal(KINDS["preset"], refused, SimpleNamespace(case=tmp_path))[0] == outcome


def test_a_resumed_run_equals_a_whole_one(monkeypatch, tmp_path):
    """A resumption that gives only zeros would always equal itself."""
    for weights, fault in ((torch.ones(2), None), (torch.zeros(2), "though nothing is damaged")):
        kind = Kind("tables/preset.json", lambda case, weights=weights: weights, expected=lambda samples: torch.ones(2))
        monkeypatch.setitem(KINDS, "preset", kind)
        place = SimpleNamespace(lay_out=lambda kind: None, case=tmp_path, samples=tmp_path)
        with pytest.raises(RuntimeError, match=fault) if fault else contextlib.nullcontext():
            damaged_files.Workplace._read_whole(place, "preset")


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
    """Run in a process of its own, as a process with threads must not fork. All undamaged files but Inception's are read."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(len(CASES))]
    ended = subprocess.run(command, capture_output=True, text=True, env=process_environment({"OMP_NUM_THREADS": "1"}))
    assert ended.returncode == 0, ended.stderr[-2000:]
    read, rows, failures = json.loads((tmp_path / "found.json").read_text())
    assert failures == [] and set(read) == set(KINDS) - {"Inception's weights"}
    assert {row["kind"]: row["tried"] for row in rows} == Counter(ROUND)
