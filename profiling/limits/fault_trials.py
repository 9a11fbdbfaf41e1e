"""Commands that meet faults: the calls of a run that can fail, by ``faults.c``, and the judgement of one that has met them."""

import ctypes
import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from .commands import difference, finish, is_complete, measure, message_fault, snapshot

FEW = 5
"""Moments of a run at which faults come that are not tried at every call."""


MOST = 60
"""Calls of a command that fail one after the other; of more than these every second or third does, which ones the seed says."""


ATTEMPTS = 8
"""Draws of a case's moment until the fault meets the run."""


FOR_EVER = 2**40


CALLS = {"make": 1, "folder": 1, "truncate": 1, "write": 2, "sync": 4, "rename": 8, "link": 8, "remove": 16, "close": 32}
"""Calls of a log and the classes that ``faults.c`` gives them."""


ALL, WRITES, HALF = 63, 2, 64


FULL, READ_ONLY = ALL & ~(CALLS["remove"] | CALLS["close"]), ALL & ~CALLS["close"]
"""Classes that fail on a disk that is full, and on one that may only be read."""


def preload():
    """Load ``faults.c`` into this program, which starts again for it."""
    if hasattr(ctypes.CDLL(None), "faults_arm"):
        os.environ.pop("LD_PRELOAD", None)
        return
    library = Path(tempfile.gettempdir()) / f"advkd-faults-{os.getpid()}.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("faults.c"), "-ldl"], check=True)
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def arm(folder, first=FOR_EVER, last=FOR_EVER, number=0, classes=0):
    """The calls ``first`` to ``last`` of some classes below ``folder`` fail in this process; all that fail are counted."""
    long = ctypes.c_long
    ctypes.CDLL(None).faults_arm(os.fsencode(str(folder)), long(first), long(last), number, classes)


def counter(name):
    """A counter of ``faults.c``: calls that failed, or readings of a clock that jumps."""
    function = getattr(ctypes.CDLL(None), f"faults_{name}")
    function.restype = ctypes.c_long
    return function()


class Trial:
    """One command in an empty folder, its runs without faults, and the case that is tried."""

    def __init__(self, campaign, folder, command):
        self.campaign, self.folder, self.command = campaign, folder, command
        self.out, self.whole = folder / "out", _measure(command, folder / "whole")

    @functools.cached_property
    def other(self):
        """A run that asks for another result."""
        command = self.command
        return _measure(replace(command, arguments=(*command.arguments, *command.other)), self.folder / "other")

    def calls(self, classes=ALL):
        """Calls of some classes that a run makes."""
        return sum(bool(CALLS[call] & classes) for call, *_ in self.whole["log"])

    def failing(self, classes):
        """Number of them that are tried."""
        return min(MOST, self.calls(classes))

    def place(self, n, classes):
        """The call that fails in case n of :meth:`failing`."""
        calls, most = self.calls(classes), self.failing(classes)
        start = random.Random(f"{self.campaign.seed} {self.command.name}").random() if calls > most else 0
        return 1 + int((n - 1 + start) * calls / most)

    def sizes(self):
        """Powers of four that are less than the bytes of the largest file."""
        largest = max(map(len, self.whole["files"].values()))
        return sum(4**n < largest for n in range(1, 20))

    def reset(self):
        """An empty output folder, and no fault counted."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(exist_ok=True)
        ctypes.CDLL(None).faults_reset()

    def add(self, kind, outcome, case, detail=""):
        """Count a case."""
        self.campaign.add(f"{kind}, {self.command.name}", outcome, case, detail)

    def judge(self, kind, case, code, said):
        """Count the end of a command with a fault, and what the same command makes of the folder afterwards."""
        if code != 0 and (fault := message_fault(code, said, self.out)):
            self.add(kind, "crashed", case, fault)
        elif code == 0 and (fault := self.differs()):
            self.add(kind, "wrong", case, f"exit status 0, but {fault}")
        elif fault := self.cannot_finish():
            self.add(kind, "lost", case, fault)
        else:
            self.add(kind, "right" if code == 0 else "refused", case)

    def differs(self):
        """Difference of the output; a temporary file whose removal failed may stay until the command is repeated."""
        fault, names = difference(self.out, self.whole["files"]), snapshot(self.out).keys() - self.whole["files"].keys()
        left = all(Path(name).name.startswith(".") and name.endswith(".tmp") for name in names)
        return "" if left and counter("failed") and is_complete(self.out, self.whole["files"]) else fault

    def cannot_finish(self):
        """Why the command repeated does not give the files of a run without faults; empty if it does."""
        self.out.mkdir(exist_ok=True)
        code, said = finish(self.command, self.out)
        return f"exit status {code}: {said[-1000:]}" if code else difference(self.out, self.whole["files"])

    def moment(self, n):
        """The event at which fault ``n`` of a few comes."""
        return 1 + self.whole["events"] * (n - 1) // FEW

    def moments(self, case, n):
        """:meth:`moment`, and earlier ones for as long as the fault comes too late."""
        draw, moment = random.Random(f"{self.campaign.seed} {case}"), self.moment(n)
        for _ in range(ATTEMPTS):
            yield moment
            moment = draw.randrange(1, max(2, moment))


def _measure(command, folder):
    """A run without faults: what :func:`measure` finds, and its log of calls."""
    log = folder / f"{command.name}.log"

    def before():
        arm(folder / command.name)
        ctypes.CDLL(None).faults_log(os.fsencode(str(log)))

    found = measure(command, folder, before=before)
    return {**found, "log": [line.split("\t") for line in log.read_text().splitlines()], "command": command}
