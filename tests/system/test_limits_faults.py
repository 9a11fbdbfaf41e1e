"""Kills, and faults of the file system and the clock: a few cases of the campaigns of ``profiling/limits``."""

import json
import subprocess
import sys

from tests.conftest import ROOT, process_environment

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
commands = [commands[0], *commands[2:6]]
plans = [kills.plan(0, case, 0) for case in range(100)]
killed = [case for case, plan in enumerate(plans) if not plan["fresh"] and len(plan["kills"]) == 1][:6]
kinds = len(faults.KINDS)
faulty = [kinds * (len(commands) + kind % len(commands)) + kind for kind in range(kinds)]
for name, module, cases in (("kills", kills, killed), ("faults", faults, faulty)):
    campaign = Campaign(name, 0)
    module.run_commands(campaign, cases, commands, out / name)
    (out / f"{name}.json").write_text(json.dumps([campaign.rows(), campaign.failures]))
"""


def test_kills_and_faults_lose_nothing(tmp_path):
    """Runs that are killed or meet a fault end by a line or a signal; repeated, they equal runs that were left alone."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "out")]
    environment = process_environment({"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows, failures = json.loads((tmp_path / "out" / "kills.json").read_text())
    assert failures == [] and sum(row["tried"] for row in rows) == 6
    rows, failures = json.loads((tmp_path / "out" / "faults.json").read_text())
    assert failures == [] and sum(row["tried"] for row in rows) >= 10
    assert {"disk full", "input/output error", "folder removed", "jumping clock"} <= {
        row["kind"].split(", ")[0] for row in rows
    }
    assert sum(row["refused"] for row in rows) >= 4
