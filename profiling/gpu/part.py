"""One part of a run in its own process: its folders and its time, its journal, and its end.

A part keeps a journal of its items (benchmark cases, sanitizer tools, ...): what is finished is not done again, and what a
process died of is not tried a second time. It ends with 0, with 1 where something failed, with :data:`BROKEN` where the
device's context is unusable and the rest needs a fresh process.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from advkd.runtime.files import write_json
from advkd.runtime.hub import reason

from ..evidence import ROOT
from .tests import BROKEN, broken

NEEDS_DEVICE = "needs a device"
"""Key, or text, of a step that a rehearsal cannot do."""


class OutOfTime(Exception):
    """The item that it names was stopped at the part's limit, and is done again next time."""


class Journal:
    """Items of a part with their results, in a file that is whole at any time."""

    def __init__(self, path):
        self.path = Path(path)
        self.items = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, name, work):
        """Do an item and keep its result, unless it is kept already; returns the result. An error is a result."""
        if name in self.items:
            known = self.items[name]
            return known if known.get("state") != "begun" else self._keep(name, {"state": "died", "error": "the process died"})
        self._keep(name, {"state": "begun"})
        begin = time.monotonic()
        try:
            found = {"state": "done", **work()}
        except subprocess.TimeoutExpired:
            self.forget_begun()
            raise OutOfTime(name) from None
        except Exception as error:
            found = {"state": "error", "error": f"{type(error).__name__}: {reason(error)}"}
        found["item_seconds"] = round(time.monotonic() - begin, 2)
        self._keep(name, found)
        if found["state"] == "error" and broken():
            sys.exit(BROKEN)
        return found

    def _keep(self, name, value):
        self.items[name] = value
        write_json(self.path, self.items)
        return value

    def forget_begun(self):
        """An item that was stopped from outside is done again."""
        self.items = {name: value for name, value in self.items.items() if value.get("state") != "begun"}
        write_json(self.path, self.items)

    def failed(self):
        """Items that did not end well."""
        return [name for name, value in self.items.items() if value.get("state") != "done" or value.get("red")]


class Part:
    """The argument of a part's function: its folders, its journal, its time.

    Attributes:
        out, folder: folders of all results, and of this part's own files.
        full: measure all cases.
        name: of the part.
        most: cases of a test function at most; 0 for all.
        kept: folder of results that stand for their sources, or None.
        rehearse: there is no GPU: do all that needs none.
    """

    def __init__(self, out, folder, seconds, full=False, name="", most=0, kept=None, rehearse=False):
        self.out, self.folder, self.full = Path(out), Path(folder), full
        self.name, self.most, self.kept, self.rehearse = name, most, kept, rehearse
        self.end = time.monotonic() + seconds
        self.journal = Journal(self.folder / "journal.json")
        self.red, self.unfinished = False, None

    def left(self):
        """Seconds until the part is ended from outside."""
        return max(self.end - time.monotonic(), 0.0)

    def processes(self, most):
        """Number of processes that the part may start side by side: one on a small machine, some cores left on a large one."""
        return max(1, min(most, (os.cpu_count() or 1) - 4))


def run(function, part):
    """Do a part; returns its JSON for ``result.json`` and the process's code."""
    try:
        found = function(part)
    except OutOfTime as item:
        found, part.unfinished = {}, f"no time for {item}"
    except Exception as error:
        found, part.red = {"error": f"{type(error).__name__}: {reason(error)}"}, True
        print(found["error"], file=sys.stderr, flush=True)
    return result_of(found, part), 3 if part.unfinished else int(bool(part.journal.failed() or part.red))


def result_of(found, part):
    """A part's JSON: its function's result, and the items that did not end well or were not begun."""
    failed = part.journal.failed()
    result = {**found, "failed_items": failed}
    if "cases" not in result and "tests" not in result:
        result["items"] = part.journal.items
    elif failed:
        result["errors"] = {name: part.journal.items[name].get("error", "red") for name in failed}
    if part.unfinished:
        result["unfinished"] = part.unfinished
    return result


def logged(command, part, environment=None):
    """Run a command whose output is part of this part's log; an error where it fails."""
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=part.left())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {done.returncode}")
    return {}
