"""A pytest plugin for tests on a GPU: every test's begin and end as a line of JSON, so that a killed run says how far it came.

python -m pytest -p profiling.gpu.tests --gpu-log FILE [--gpu-seen FILE] [--gpu-shard 0/4] [--gpu-most 2] -m gpu tests

Tests that the log or the file of tests seen before hold are not run again. A failure that leaves the device unusable (every
later call in the process would fail as well) ends the process with the code :data:`BROKEN`, and it is to be started again.
"""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from .parent import end_with_parent

BROKEN = 77


COLLECTED = "::collected"
"""The line that names the tests of a share."""


def pytest_addoption(parser):
    parser.addoption("--gpu-log", help="where the lines go")
    parser.addoption("--gpu-seen", help="JSON of tests that are not run again")
    parser.addoption("--gpu-shard", default="0/1", help="the i-th of n shares of the tests")
    parser.addoption("--gpu-end-with-parent", action="store_true", help="end once the process that started this one is gone")
    parser.addoption("--gpu-most", type=int, default=0, help="so many cases of a test function at most, spread evenly")


def read_log(path):
    """``{test: {"outcome": ..., "seconds": ..., "message": ...}}``; of a test that began and did not end: ``died``."""
    found = {}
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line at which a process was killed
            continue
        found[entry.pop("test")] = entry
    return found


def forget(path, stopped=None):
    """Drop a test that was stopped from outside (default: all that began and did not end), so that it runs again."""
    known = read_log(path)
    if not known:
        return
    drop = [stopped] if stopped else [test for test, entry in known.items() if entry["outcome"] == "died"]
    kept = [json.dumps({"test": test, **entry}) + "\n" for test, entry in known.items() if test not in drop]
    Path(path).write_text("".join(kept))


def spread(items, most):
    """At most ``most`` of them, at even distances."""
    if not most or len(items) <= most:
        return items
    return [items[i * (len(items) - 1) // max(most - 1, 1)] for i in range(most)]


class Log:
    """Writes the lines of one process."""

    def __init__(self, config):
        self.path = Path(config.getoption("--gpu-log"))
        self.seen = read_log(self.path)
        before = config.getoption("--gpu-seen")
        self.before = json.loads(Path(before).read_text()) if before else {}
        self.shard, self.shards = map(int, config.getoption("--gpu-shard").split("/"))
        self.most = config.getoption("--gpu-most")
        self.entries = {}

    def write(self, **entry):
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        functions = {}
        for item in items:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
        chosen = [item for group in functions.values() for item in spread(group, self.most) if item.nodeid not in self.before]
        share = [item for i, item in enumerate(chosen) if i % self.shards == self.shard]
        self.write(test=COLLECTED, outcome="collected", tests=[item.nodeid for item in share])
        own = [item for item in share if item.nodeid not in self.seen]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(own)])
        items[:] = own

    def pytest_collectreport(self, report):
        if report.failed and report.nodeid not in self.seen:
            self.write(test=report.nodeid, outcome="failed", seconds=0.0, message=str(report.longrepr)[-500:])

    def pytest_runtest_logstart(self, nodeid):
        self.entries[nodeid] = {"outcome": "passed", "seconds": 0.0}
        self.write(test=nodeid, outcome="died", begun=time.time())

    def pytest_runtest_logreport(self, report):
        entry = self.entries[report.nodeid]
        entry["seconds"] += report.duration
        if report.outcome != "passed" and entry["outcome"] == "passed":
            entry["outcome"] = report.outcome
            entry["message"] = str(report.longrepr)[-500:]
        if report.when == "teardown":
            self.write(test=report.nodeid, **entry)
            if entry["outcome"] == "failed" and broken():
                os._exit(BROKEN)


def broken():
    """True if an earlier error has made this process's device unusable."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_configure(config):
    if config.getoption("--gpu-end-with-parent"):
        end_with_parent()
    if config.getoption("--gpu-log"):
        config.pluginmanager.register(Log(config))
