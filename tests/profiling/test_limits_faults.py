"""Kills, and faults of the file system and the clock: a few cases of the campaigns of ``profiling/limits``."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("diffusers")

from profiling.limits import faults, kills  # noqa: E402
from profiling.limits.commands import Command  # noqa: E402
from profiling.limits.record import Campaign, main  # noqa: E402
from tests.conftest import ROOT, process_environment  # noqa: E402

SCRIPT = """
import contextlib
import json
import signal
import sys
from pathlib import Path
from unittest import mock
from advkd.runtime.folders import require_output_folder
from profiling.limits import faults, kills
from profiling.limits.commands import prepare
from profiling.limits.record import Campaign

faults.preload()
out = Path(sys.argv[1])
commands = list(prepare(out / "in").values())
chosen = [commands[1], commands[5], commands[4]]
campaigns = {name: Campaign(name, 0) for name in ("kills", "faults", "without locks")}
plans = [kills.plan(0, case, 0) for case in range(100)]
killed = [case for case, plan in enumerate(plans) if not plan["fresh"] and len(plan["kills"]) == 1][:5]
kills.run_commands(campaigns["kills"], killed, chosen, out / "kills")
trials = faults.make_trials(campaigns["faults"], chosen, out / "faults")
kinds = len(faults.KINDS)
numbers = []
for kind, (_, most, _) in enumerate(faults.KINDS):
    which = kind % len(chosen)
    numbers.append(kind + kinds * (which + len(chosen) * (most(trials[which]) > 1)))
faults.run_trials(campaigns["faults"], numbers, trials)
counts = [faults.exists(trials, number) for number in range(kinds * len(chosen) * 200)]
logs = [faults.unsynchronized(t.whole["log"], out / "faults" / "whole" / t.command.name, t.whole["files"]) for t in trials]

# The campaigns must find a command that ignores Ctrl-C, and one that locks nothing.
trial = trials[2]
trial.reset()
with mock.patch("advkd.__main__.end_at_interrupt", lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)):
    interrupt = {"signal": "Ctrl-C", "fresh": False, "to all": False}
    ignored = kills._kill(trial.command, trial.out, interrupt, (True, 0, 0), trial.whole)
changes = {"trainer.locked": lambda out: contextlib.nullcontext(), "trainer.file_state": lambda path: None}
changes |= {"trainer.claim": lambda out, *_: require_output_folder(out), "classifier.require_unclaimed": lambda *_: None}
with contextlib.ExitStack() as unlocked:
    for name, change in changes.items():
        unlocked.enter_context(mock.patch(f"advkd.training.{name}", change))
    trial.campaign = campaigns["without locks"]
    faults._two(other=True)(trial, "unlocked", 0, 2)

(out / "result.json").write_text(json.dumps({
    "rows": {name: campaign.rows() for name, campaign in campaigns.items()},
    "failures": [campaign.failures for campaign in campaigns.values()],
    "existing": [sum(counts), sum(1 for _ in faults.existing(trials))],
    "unsynchronized": logs,
    "ignored": ignored,
}))
"""


def test_kills_and_faults_lose_nothing(tmp_path):
    """Runs that are killed or meet a fault end with a line or a signal; repeated, they equal undisturbed runs."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "out")]
    environment = process_environment({"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["failures"][:2] == [[], []]
    killed, faulty = result["rows"]["kills"], result["rows"]["faults"]
    assert sum(row["tried"] for row in killed if not row["kind"].startswith("ended before")) == 5
    # Mounts need rights that a process may lack. A case whose fault hit nothing would be of another kind.
    tried, kinds = {row["kind"].rpartition(", ")[0] for row in faulty}, {name for name, _, _ in faults.KINDS}
    assert tried <= kinds and kinds - tried <= {"full tmpfs", "read-only mount"}
    assert sum(row["refused"] for row in faulty) >= 6
    assert result["existing"][0] == result["existing"][1] > 0
    assert result["unsynchronized"] == [[], [], []]
    assert result["ignored"] == [True, "it ignores the signal: exit status 0"]
    assert [row["wrong"] + row["lost"] for row in result["rows"]["without locks"]] == [1]


def test_a_kill_lands_or_is_counted_apart(tmp_path):
    """Signals that come after the end of all processes are no kills."""

    def attempt(landed):
        return lambda *_: (landed.pop(0), "right", "")

    landing, missing = f"{kills.plan(0, 0, 0)['signal']}, some", "ended before the signal, some"
    cases = (([False, True], {landing: 1, missing: 1}), ([False] * kills.ATTEMPTS, {missing: kills.ATTEMPTS}))
    for landed, expected in cases:
        campaign = Campaign("kills", 0)
        with mock.patch.object(kills, "_attempt", attempt(landed)):
            kills._run_case(campaign, 0, Command("some", ()), {}, tmp_path / "out")
        assert {row["kind"]: row["right"] for row in campaign.rows()} == expected and not landed


def test_names_before_bytes_are_found():
    """Detects a file renamed before it is on the disk, alone or in its folder, or written under its final name."""
    out, synced = Path("/out"), [["make", "/out/.a.tmp", ""], ["write", "/out/.a.tmp", ""], ["sync", "/out/.a.tmp", ""]]
    renamed = ["rename", "/out/.a.tmp", "/out/a"]
    assert not faults.unsynchronized([*synced, renamed], out, {"a": b""})
    assert faults.unsynchronized([*synced[:2], renamed], out, {"a": b""})
    assert faults.unsynchronized([*synced, synced[1], renamed], out, {"a": b""})
    assert faults.unsynchronized([["make", "/out/.b.tmp/a", ""], ["rename", "/out/.b.tmp", "/out/b"]], out, {"b/a": b""})
    assert faults.unsynchronized([["write", "/out/a", ""], ["sync", "/out/a", ""]], out, {"a": b""})


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
