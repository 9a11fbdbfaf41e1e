"""One part of a run in its own process: its folders and its time, its items, and its end.

Finished items of a part (benchmark cases, chains under a profiler, ...) are not done again, and an item that killed its process
is not tried a second time. The process ends with a code of :data:`STATES`, or with that of a broken device where the rest needs
a fresh process.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from advkd.runtime.files import write_json
from advkd.runtime.hub import reason

from ..evidence import ROOT
from .summary import read_json
from .tests import BROKEN, broken

NEEDS_DEVICE = "needs a device"
"""Key, or text, of a step that a rehearsal cannot do."""
STATES = {0: "passed", 3: "unfinished", 4: "failed"}
"""Codes of a part that came to its end."""


class OutOfTime(Exception):
    """The item that it names was stopped at the part's limit, and is done again next time."""


@dataclass
class Part:
    """The argument of a part's function: its folders, its time, and its result, a file that is whole at any time.

    Attributes:
        name: of the part.
        out, folder: folders of all results, and of this part's own files.
        seconds: until the part is ended from outside.
        place: provenance of everything measured.
        full: measure all cases.
        most: cases of a test function at most; 0 for all.
        kept: folder of results that stand for their sources, or None.
        rehearse: there is no GPU: do all that needs none.
        restarted: what the last process did not end has killed it.
    """

    name: str
    out: Path
    folder: Path
    seconds: float
    place: dict
    full: bool = False
    most: int = 0
    kept: str | None = None
    rehearse: bool = False
    restarted: bool = False

    def __post_init__(self):
        self.out, self.folder, self.red = Path(self.out), Path(self.folder), False
        self.path, self.end = self.folder / "result.json", time.monotonic() + self.seconds
        self.items = read_json(self.path, {"items": {}})["items"]
        for name in [name for name, item in self.items.items() if item["state"] == "begun"]:
            if self.restarted:
                self.items[name] = {"state": "died", "error": "the process died"}
            else:
                del self.items[name]
        self.result = {"items": self.items}

    def run(self, name, work):
        """Do an item and keep its result, unless it is kept already; returns the result. An error is a result."""
        if name in self.items:
            return self.items[name]
        self.keep(name, {"state": "begun"})
        begin = time.monotonic()
        try:
            found = {"state": "done", **work()}
        except subprocess.TimeoutExpired:
            del self.items[name]
            raise OutOfTime(name) from None
        except Exception as error:
            found = {"state": "error", "error": f"{type(error).__name__}: {reason(error)}"}
        self.keep(name, {**found, "item_seconds": round(time.monotonic() - begin, 2)})
        if found["state"] == "error" and broken():
            sys.exit(BROKEN)
        return self.items[name]

    def keep(self, name, item):
        """Store an item's result."""
        self.items[name] = item
        write_json(self.path, self.result)

    def left(self):
        """Seconds until the part is ended from outside."""
        return max(self.end - time.monotonic(), 0.0)

    def processes(self, most):
        """Number of processes that the part may start side by side: one on a small machine, some cores left on a large one."""
        return max(1, min(most, (os.cpu_count() or 1) - 4))


def run(function, part):
    """Do a part, whose function may return more of its result; returns the process's code."""
    try:
        part.result |= function(part) or {}
    except OutOfTime as item:
        part.result["unfinished"] = f"no time for {item}"
    except Exception as error:
        part.result["error"], part.red = f"{type(error).__name__}: {reason(error)}", True
        print(part.result["error"], file=sys.stderr, flush=True)
    failed = [name for name, item in part.items.items() if item["state"] != "done" or item.get("red")]
    part.result["failed_items"] = failed
    write_json(part.path, part.result)
    return 3 if "unfinished" in part.result else 4 if failed or part.red else 0


def logged(command, part, environment=None):
    """Run a command whose output is part of this part's log; an error where it fails."""
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=part.left())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {done.returncode}")
    return {}
