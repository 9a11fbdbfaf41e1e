"""Faults of file systems and clocks at every call that writes: ``python -m profiling.limits.faults``.

A case is a kind of fault, a command and a number n. Disk full: all calls that write below the output folder fail from the n-th
on; input/output error: the n-th alone fails (by ``faults.c``, preloaded). The command must end with one line that names the
file or the folder and exit code 2; once the fault is gone, the command repeated must give the files of a run without faults.

The number of a case is a function of n, command and kind, and n grows slowest: a short run meets every kind and command. A
number whose n exceeds the command's calls stands for no case: it is passed over, and ``--count`` counts cases alone.
"""

import ctypes
import errno
import functools
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from .commands import Events, Process, difference, finish, message_fault, prepare, run, snapshot
from .record import main

FEW = 6
"""Moments of a run at which faults come that are not tried at every call."""

TMPFS = 200 * 2**20
"""Bytes of the small file system: more than a run asks for before it starts."""

FOR_EVER = 2**40


def preload():
    """Load ``faults.c`` into this program, which starts again for it."""
    if hasattr(ctypes.CDLL(None), "faults_arm"):
        os.environ.pop("LD_PRELOAD", None)
        return
    library = Path(tempfile.gettempdir()) / f"advkd-faults-{os.getpid()}.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, Path(__file__).with_suffix(".c"), "-ldl"], check=True)
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def arm(folder, first, last, number):
    """The calls ``first`` to ``last`` that write below ``folder`` fail in this process."""
    ctypes.CDLL(None).faults_arm(os.fsencode(str(folder)), ctypes.c_long(first), ctypes.c_long(last), number)


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

    def reset(self):
        """An empty output folder."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()

    def judge(self, kind, case, code, said):
        """Count the end of a command with a fault, and what the same command makes of the folder afterwards."""
        kind = f"{kind}, {self.command.name}"
        if code != 0 and (fault := message_fault(code, said, self.out)):
            self.campaign.add(kind, "crashed", case, fault)
        elif code == 0 and (fault := difference(self.out, self.whole["files"])):
            self.campaign.add(kind, "wrong", case, f"exit status 0, but {fault}")
        elif fault := self.cannot_finish():
            self.campaign.add(kind, "lost", case, fault)
        else:
            self.campaign.add(kind, "right" if code == 0 else "refused")

    def cannot_finish(self):
        """Why the command repeated does not give the files of a run without faults; empty if it does."""
        self.out.mkdir(exist_ok=True)
        code, said = finish(self.command, self.out)
        return f"exit status {code}: {said[-1000:]}" if code else difference(self.out, self.whole["files"])

    def moment(self, n):
        """The event at which fault ``n`` of a few comes."""
        return 1 + self.whole["events"] * (n - 1) // FEW


def run_cases(campaign, cases):
    """Run as many cases as ``cases`` has numbers, from its first number on, or all from there if they are fewer."""
    preload()
    with tempfile.TemporaryDirectory(prefix="advkd-faults-") as folder:
        trials = make_trials(campaign, list(prepare(Path(folder) / "in").values()), Path(folder) / "runs")
        numbers = list(itertools.islice(existing(trials, cases.start), len(cases)))
        campaign.count = len(numbers)
        run_trials(campaign, numbers, trials)


def make_trials(campaign, commands, folder):
    """A trial of each command, in a new ``folder``."""
    return [Trial(campaign, folder, command) for command in commands]


def existing(trials, first=0):
    """Numbers of all cases from ``first`` on."""
    most = max(*(most or 0 for _, most, _ in KINDS), *(trial.whole["calls"] for trial in trials))
    return (number for number in range(first, most * len(trials) * len(KINDS)) if exists(trials, number))


def exists(trials, number):
    """Whether the n of a number is at most the command's calls, or the largest of its kind."""
    n, trial, (_, most, _) = case_of(trials, number)
    return n <= (most or trial.whole["calls"])


def case_of(trials, number):
    """``(n, trial, kind)`` of a number; n begins with 1."""
    rest, kind = divmod(number, len(KINDS))
    n, which = divmod(rest, len(trials))
    return n + 1, trials[which], KINDS[kind]


def run_trials(campaign, numbers, trials):
    """Run the cases of these numbers."""
    for number in campaign.each(numbers):
        n, trial, (name, _, attempt) = case_of(trials, number)
        trial.reset()
        attempt(trial, name, number, n)


def _measure(command, folder):
    """A run without faults: its files, events and calls that write."""
    out, count = folder / command.name, folder / "calls"
    out.mkdir(parents=True)
    events = Events(out)

    def before():
        import atexit

        arm(out, FOR_EVER, FOR_EVER, 0)
        atexit.register(lambda: count.write_text(str(ctypes.c_long(ctypes.CDLL(None).faults_calls()).value)))

    process = Process(command.line(out), before=before)
    if process.wait():
        raise RuntimeError(f"{command.name} does not run here: {process.said}")
    events.read()
    events.close()
    return {"files": snapshot(out), "events": events.count, "calls": int(count.read_text()), "command": command}


def _failing(number, alone=False):
    def attempt(trial, name, case, n):
        kept = _earlier_picture(trial)
        last = n if alone else FOR_EVER
        code, said = run(trial.command.line(trial.out), before=lambda: arm(trial.out, n, last, number))
        if code and kept is not None and (trial.out / trial.command.out).read_bytes() != kept:
            trial.campaign.add(f"{name}, {trial.command.name}", "lost", case, "the earlier picture")
            return
        trial.judge(name, case, code, said)

    return attempt


def _earlier_picture(trial):
    """The contents of a picture that lies where the command writes one."""
    if not trial.command.out:
        return None
    (trial.out / trial.command.out).write_bytes(b"an earlier picture")
    return b"an earlier picture"


def _limited(trial, name, case, n):
    """Files of at most 4^n bytes (RLIMIT_FSIZE)."""

    def before():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4**n, resource.RLIM_INFINITY))

    code, said = run(trial.command.line(trial.out), before=before)
    trial.judge(name, case, code, said)


def _full_tmpfs(trial, name, case, n):
    if not _mount(trial.out, f"size={TMPFS}"):
        return
    try:
        _at_event(trial, n, lambda: _fill(trial.out / "filler"), name, case, after=lambda: (trial.out / "filler").unlink())
    finally:
        subprocess.run(["umount", "-l", trial.out], check=True)


def _read_only_mount(trial, name, case, n):
    if not _mount(trial.out, "ro"):
        return
    try:
        code, said = run(trial.command.line(trial.out))
    finally:
        subprocess.run(["umount", "-l", trial.out], check=True)
    trial.judge(name, case, code, said)


def _mount(folder, options):
    """Mount a small file system at ``folder``; False where this is not permitted."""
    return not subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], stderr=subprocess.DEVNULL).returncode


def _fill(path):
    with open(path, "wb", buffering=0) as file:
        for block in (2**20, 2**12, 1):
            try:
                while file.write(bytes(block)):
                    pass
            except OSError:
                continue


def _vanishing(trial, name, case, n):
    _at_event(trial, n, lambda: shutil.rmtree(trial.out, ignore_errors=True), name, case)


def _moved_away(trial, name, case, n):
    away = trial.folder / "away"
    shutil.rmtree(away, ignore_errors=True)
    _at_event(trial, n, lambda: trial.out.rename(away), name, case)


def _at_event(trial, n, happen, name, case, after=lambda: None):
    events = Events(trial.out)
    process = Process(trial.command.line(trial.out))
    try:
        came = events.wait(trial.moment(n), process)
        if came:
            _stopped(process, happen)
        code = process.wait()
    finally:
        events.close()
    if came:
        after()
    trial.judge(name, case, code, process.said)


def _stopped(process, happen):
    """Let something happen while the process stands still, so that it comes at the event and not some time after."""
    if process.send(signal.SIGSTOP):
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    happen()
    process.send(signal.SIGCONT)


def _two(other):
    def attempt(trial, name, case, n):
        draw = random.Random(f"{trial.campaign.seed} {case}")
        wholes = [trial.whole, trial.other if other else trial.whole]
        events = Events(trial.out)
        first = Process(wholes[0]["command"].line(trial.out))
        if n > 2:  # the first ones start together
            events.wait(trial.moment(n), first)
        first.ends_within(draw.random() * 1e-2)
        second = Process(wholes[1]["command"].line(trial.out))
        codes = [first.wait(), second.wait()]
        events.close()
        kind = f"{name}, {trial.command.name}"
        faults = [message_fault(code, each.said) for code, each in zip(codes, (first, second)) if code]
        if any(faults):
            trial.campaign.add(kind, "crashed", case, f"{codes}, {max(faults)}")
            return
        if all(codes):
            return trial.campaign.add(kind, "lost", case, f"both refused: {first.said[-400:]} {second.said[-400:]}")
        ended = [whole for code, whole in zip(codes, wholes) if code == 0]
        differ = [difference(trial.out, whole["files"]) for whole in ended]
        # Two that ended well are both right; of two pictures the later one stays.
        wrong = all(differ) if trial.command.out else any(differ)
        outcome = "wrong" if wrong else "right" if all(code == 0 for code in codes) else "refused"
        trial.campaign.add(kind, outcome, case, f"exit statuses {codes}: {differ}")

    return attempt


def _jumping_clock(trial, name, case, n):
    """A clock that jumps by up to weeks at every reading; of odd cases half a run is there, with times far off."""
    draw = random.Random(f"{trial.campaign.seed} {case}")
    if n % 2:
        events = Events(trial.out)
        process = Process(trial.command.line(trial.out))
        events.wait(trial.moment(n), process)
        process.send(signal.SIGKILL)
        process.wait()
        events.close()
        for path in [*trial.out.rglob("*"), trial.out]:
            time = draw.choice((0, 2**32))
            os.utime(path, (time, time))
    seconds = draw.choice((1, 3600, 86400, 10**6))

    def before():
        ctypes.CDLL(None).faults_clock(ctypes.c_long(seconds))

    code, said = finish(trial.command, trial.out, before=before)
    trial.judge(name, case, code, said)


KINDS = [
    ("disk full", None, _failing(errno.ENOSPC)),
    ("input/output error", None, _failing(errno.EIO, alone=True)),
    ("read-only after some calls", FEW, _failing(errno.EROFS)),
    ("limit of a file's size", 9, _limited),
    ("full tmpfs", FEW, _full_tmpfs),
    ("read-only mount", 1, _read_only_mount),
    ("folder removed", FEW, _vanishing),
    ("folder moved away", FEW, _moved_away),
    ("two processes, the same", FEW, _two(other=False)),
    ("two processes, another seed", FEW, _two(other=True)),
    ("jumping clock", FEW, _jumping_clock),
]
"""Kinds of faults: a name, the largest n (None: the number of the command's calls), and what tries one case."""

ALL = 10**6
"""More than there are cases."""

if __name__ == "__main__":
    main("faults", __doc__, run_cases, ALL)
