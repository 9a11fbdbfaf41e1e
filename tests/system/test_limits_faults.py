"""Kills, and faults of the file system and the clock: a few cases of the campaigns of ``profiling/limits``."""

import json
import subprocess
import sys
from unittest import mock

import pytest

pytest.importorskip("diffusers")

from profiling.limits import kills  # noqa: E402
from profiling.limits.commands import Command  # noqa: E402
from profiling.limits.record import Campaign, main  # noqa: E402
from tests.conftest import ROOT, process_environment  # noqa: E402

SCRIPT = """
import json
import sys
from pathlib import Path
from profiling.limits import faults, kills
from profiling.limits.commands import prepare
from profiling.limits.record import Campaign

faults.preload()
out = Path(sys.argv[1])
commands = list(prepare(out / "in").values())
chosen = [commands[1], commands[0], commands[4]]
campaigns = {name: Campaign(name, 0) for name in ("kills", "faults")}
plans = [kills.plan(0, case, 0) for case in range(100)]
killed = [case for case, plan in enumerate(plans) if not plan["fresh"] and len(plan["kills"]) == 1][:5]
kills.run_commands(campaigns["kills"], killed, chosen, out / "kills")
trials = faults.make_trials(campaigns["faults"], chosen, out / "faults")
kinds = len(faults.KINDS)
numbers = [kind + kinds * (kind % len(chosen) + len(chosen) * (faults.KINDS[kind][1] != 1)) for kind in range(kinds)]
faults.run_trials(campaigns["faults"], numbers, trials)
first = faults.existing(trials)
counts = [faults.exists(trials, number) for number in range(kinds * len(chosen) * 200)]
(out / "result.json").write_text(json.dumps({
    "rows": {name: campaign.rows() for name, campaign in campaigns.items()},
    "failures": [campaign.failures for campaign in campaigns.values()],
    "existing": [sum(counts), sum(1 for _ in first)],
    "kinds": [name for name, _, _ in faults.KINDS],
}))
"""


def test_kills_and_faults_lose_nothing(tmp_path):
    """Runs that are killed or meet a fault end by a line or a signal; repeated, they equal runs that were left alone."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "out")]
    environment = process_environment({"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["failures"] == [[], []]
    killed, faulty = result["rows"]["kills"], result["rows"]["faults"]
    assert sum(row["tried"] for row in killed) == 5
    assert not any(row["kind"].startswith("ended before") for row in killed)
    # Mounts need rights that are not always there.
    tried = {
        row["kind"].split(", ")[0] if "two processes" not in row["kind"] else row["kind"].rpartition(", ")[0] for row in faulty
    }
    assert set(result["kinds"]) - tried <= {"full tmpfs", "read-only mount"}
    assert sum(row["refused"] for row in faulty) >= 4
    assert result["existing"][0] == result["existing"][1] > 0


def test_a_kill_lands_or_is_counted_apart(tmp_path):
    """Signals that come after the end of all processes are no kills."""

    def attempt(landed):
        return lambda *_: (landed.pop(0), "right", "")

    command = Command("some", ())
    for landed, kind in (([False, True], "some"), ([False] * kills.ATTEMPTS, "ended before the signal, some")):
        campaign = Campaign("kills", 0)
        with mock.patch.object(kills, "_attempt", attempt(landed)):
            kills._run_case(campaign, 0, command, {}, tmp_path / "out")
        (row,) = campaign.rows()
        assert row["kind"].endswith(kind) and row["right"] == 1 and not landed


def test_an_interrupted_campaign_stores_its_part(tmp_path, monkeypatch):
    def run(campaign, cases):
        for case in campaign.each(cases):
            if case == 12:
                raise KeyboardInterrupt
            campaign.add("kind", "right")

    monkeypatch.setattr(sys, "argv", ["some", "--first", "10", "--count", "5", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main("some", "", run, 100)
    result = json.loads((tmp_path / "limits-some.json").read_text())
    assert end.value.code == 130 and (result["first"], result["count"], result["rows"][0]["right"]) == (10, 2, 2)
