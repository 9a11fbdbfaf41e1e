"""A pytest plugin for tests on a GPU: every test's begin and end as a line of JSON, so that a killed run says how far it came.

python -m pytest -p profiling.gpu.tests --gpu-log FILE [--gpu-seen FILE] [--gpu-most 2] [-n 4] -m gpu tests

Tests in the file of tests seen before are not run again. With pytest-xdist the workers run the tests and the process that they
report to writes the log; a test that takes its worker along has died there. A test that hangs ends its process: faulthandler's
thread needs no turn of Python's. A failure that leaves the device unusable (every later call in the process would fail as well)
ends the process with the code :data:`BROKEN`; another one goes on.
"""

import faulthandler
import json
import os
import sys
import time
from pathlib import Path

import pytest

from .processes import end_with_parent

BROKEN = 77
STDERR = os.dup(2)
"""Standard error before pytest captures it."""


def pytest_addoption(parser):
    parser.addoption("--gpu-log", help="where the lines go")
    parser.addoption("--gpu-seen", help="JSON of tests that are not run again")
    parser.addoption("--gpu-parent", type=int, help="number of the process that started this one: end once it has gone")
    parser.addoption("--gpu-hang", type=float, default=3600.0, help="seconds after which a test ends its process")
    parser.addoption("--gpu-most", type=int, default=0, help="so many cases of a test function at most, spread evenly")


def read_log(path):
    """``{test: {"outcome": ..., "seconds": ..., "message": ...}}``; one that did not end: ``begun``, and when."""
    found = {}
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line at which a process was killed
            continue
        found[entry.pop("test")] = entry
    return found


def collected(path):
    """The tests that a run with this log has chosen, or None where it did not come that far."""
    try:
        return json.loads(Path(path).with_suffix(".collected.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def running(path):
    """Tests in a log that have not ended."""
    return [test for test, entry in read_log(path).items() if entry["outcome"] == "begun"]


def settle(path, code):
    """Close a log whose process is gone: tests that did not end are dropped, to run again, or died with a code of its own."""
    known, begun = read_log(path), running(path)
    for test in begun:
        start = known.pop(test)["begun"]
        if code is not None:
            said = f"the process ended with code {code}" + f", in one of {len(begun)} tests" * (len(begun) > 1)
            known[test] = {"outcome": "died", "seconds": time.time() - start, "message": said}
    if known or begun:
        Path(path).write_text("".join(json.dumps({"test": test, **entry}) + "\n" for test, entry in known.items()))


def spread(items, most):
    """At most ``most`` of them, at even distances."""
    if not most or len(items) <= most:
        return items
    return [items[i * (len(items) - 1) // max(most - 1, 1)] for i in range(most)]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    functions = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    path, most = config.getoption("--gpu-seen"), config.getoption("--gpu-most")
    seen = json.loads(Path(path).read_text()) if path else {}
    groups = [spread(group, most) for group in functions.values()]
    # The first case of every function comes before the others: a fault of a kernel is found early.
    chosen = [*(group[0] for group in groups), *(item for group in groups for item in group[1:])]
    own = [item for item in chosen if item.nodeid not in seen]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(own)])
    items[:] = own


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    before = item.session.testsfailed
    watch(item)
    result = yield
    if item.session.testsfailed > before and broken():
        os._exit(BROKEN)
    faulthandler.cancel_dump_traceback_later()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item):
    watch(item)  # again, as pytest stops the watch at a failure


def watch(item):
    """Print where all threads are and end the process, unless the test has ended by then."""
    faulthandler.dump_traceback_later(item.config.getoption("--gpu-hang"), exit=True, file=STDERR)


class Log:
    """Writes the lines of a run."""

    def __init__(self, path):
        self.path, self.entries = Path(path), {}

    def write(self, test, **entry):
        with open(self.path, "a") as file:
            file.write(json.dumps({"test": test, **entry}) + "\n")

    def pytest_collection_finish(self, session):
        self.pytest_xdist_node_collection_finished([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        self.path.with_suffix(".collected.json").write_text(json.dumps(ids))

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(report.nodeid, outcome="failed", seconds=0.0, message=str(report.longrepr)[-500:])

    def pytest_runtest_logstart(self, nodeid):
        self.write(nodeid, outcome="begun", begun=time.time())

    def pytest_runtest_logreport(self, report):
        entry = self.entries.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        crashed = report.when not in ("setup", "call", "teardown")
        entry["seconds"] += report.duration
        if report.outcome != "passed" and entry["outcome"] == "passed":
            entry["outcome"] = "died" if crashed else report.outcome
            entry["message"] = str(report.longrepr)[-500:]
        if crashed or report.when == "teardown":
            self.write(report.nodeid, **entry)


def broken():
    """True if an earlier error has made this process's device unusable."""
    torch = sys.modules.get("torch")
    try:
        if torch and torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # a worker reports to the process that started it and ends with it
        return
    if parent := config.getoption("--gpu-parent"):
        end_with_parent(parent)
    if config.getoption("--gpu-log"):
        config.pluginmanager.register(Log(config.getoption("--gpu-log")))
