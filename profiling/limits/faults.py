"""Faults of file systems and clocks at every call that writes: ``python -m profiling.limits.faults``.

A case is a kind of fault, a command and a number n. Disk full: all calls that write below the output folder fail from the n-th
on, or the n-th write does half its work before; input/output error: the n-th call alone fails (by ``faults.c``, preloaded). The
command must end with one line that names the file or the folder and exit code 2; once the fault is gone, the command repeated
must give the files of a run without faults.

A fault that came when there was nothing left to do has shown nothing: another moment is drawn, up to :data:`ATTEMPTS` times,
and the case is then counted under a kind of its own. Two processes are two only where both are at work at one time.

The number of a case is a function of n, command and kind, and n grows slowest: a short run meets every kind and command. A
number whose n exceeds the command's calls stands for no case: it is passed over, and ``--count`` counts cases alone.
"""

import ctypes
import errno
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from .commands import Events, Process, difference, finish, is_complete, message_fault, prepare, run
from .fault_trials import ALL, ATTEMPTS, FEW, FOR_EVER, FULL, HALF, READ_ONLY, WRITES, Trial, arm, counter, preload
from .record import main

TMPFS = 200 * 2**20
"""Bytes of the small file system: more than a run asks for before it starts."""


def run_cases(campaign, cases):
    """Run as many cases as ``cases`` has numbers, from its first number on, or all from there if they are fewer."""
    preload()
    with tempfile.TemporaryDirectory(prefix="advkd-faults-", ignore_cleanup_errors=True) as folder:
        trials = make_trials(campaign, list(prepare(Path(folder) / "in").values()), Path(folder) / "runs")
        numbers = list(itertools.islice(existing(trials, cases.start), len(cases)))
        campaign.count = len(numbers)
        run_trials(campaign, numbers, trials)


def make_trials(campaign, commands, folder):
    """A trial of each command, in a new ``folder``."""
    return [Trial(campaign, folder, command) for command in commands]


def existing(trials, first=0):
    """Numbers of all cases from ``first`` on."""
    most = max(most(trial) for _, most, _ in KINDS for trial in trials)
    return (number for number in range(first, most * len(trials) * len(KINDS)) if exists(trials, number))


def exists(trials, number):
    """True if the n of a number is at most the largest of its kind and command."""
    n, trial, (_, most, _) = case_of(trials, number)
    return n <= most(trial)


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


def _failing(number, classes, alone=False, few=False):
    """A case in which a call of some classes fails, alone or with all later ones."""

    def attempt(trial, name, case, n):
        kept = _earlier_picture(trial)
        first = 1 + trial.calls(classes) * (n - 1) // FEW if few else trial.place(n, WRITES if classes == HALF else classes)
        last = first if alone else FOR_EVER
        code, said = run(trial.command.line(trial.out), before=lambda: arm(trial.out, first, last, number, classes))
        if code and kept is not None and (trial.out / trial.command.out).read_bytes() != kept:
            trial.add(name, "lost", case, "the earlier picture")
            return
        trial.judge(_met(name), case, code, said)

    return attempt


def _met(name):
    """The kind of a case whose fault was to make a call fail."""
    return name if counter("failed") else f"{name}: no call failed"


def _earlier_picture(trial):
    """The contents of a picture that lies where the command writes one."""
    if not trial.command.out:
        return None
    (trial.out / trial.command.out).write_bytes(b"an earlier picture")
    return b"an earlier picture"


def _limited(trial, name, case, n):
    """Files of at most 4^n bytes (RLIMIT_FSIZE)."""

    def before():
        arm(trial.out)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4**n, resource.RLIM_INFINITY))

    code, said = run(trial.command.line(trial.out), before=before)
    trial.judge(_met(name), case, code, said)


def _ordered(trial, name, case, n):
    """True if a power failure after any rename leaves whole files: they reach the disk before they have their names."""
    fault = "; ".join(unsynchronized(trial.whole["log"], trial.out.parent / "whole" / trial.command.name, trial.whole["files"]))
    trial.add(name, "wrong" if fault else "right", case, fault)


def unsynchronized(log, out, files):
    """The files of ``out`` that had their names before they were on the disk, or were written in place, in words."""
    dirty, named, faults = set(), [], []
    for call, path, target in log:
        if call in ("make", "write", "truncate"):
            dirty.add(path)
        elif call == "sync":
            dirty.discard(path)
        elif call in ("rename", "link"):
            late = {name for name in dirty if _is_within(name, path)}
            dirty = dirty - late | {target + name[len(path) :] for name in late}
            named.append(target)
            # A name that begins with a dot is none to be relied on; safetensors renames such ones by itself, unseen.
            relied = [name for name in late if name == path or not Path(name).name.startswith(".")]
            if relied and "/." not in target[len(str(out)) :]:
                faults.append(f"{target} has its name before the disk has it")
    # Rows are added to a table; one that is torn is dropped.
    whole = sorted(str(out / name) for name in files if Path(name).name != "metrics.csv")
    return faults + [f"{name} is written in place" for name in whole if not any(_is_within(name, path) for path in named)]


def _is_within(path, folder):
    return path == folder or path.startswith(f"{folder}/")


def _full_tmpfs(trial, name, case, n):
    """A disk that is full from a moment on or, where nothing is written after any, from before the start."""
    filler = trial.out / "filler"
    if not _mount(trial.out, f"size={TMPFS}"):
        return
    try:
        for moment in [*trial.moments(case, n), 0]:
            trial.reset()
            struck, code, said = _strike(trial, moment, lambda: _fill(filler))
            if struck and (code or counter("failed")):
                break
        filler.unlink(missing_ok=True)
        trial.judge(name if struck else f"{name} after the end", case, code, said)
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
    _until_struck(trial, name, case, n, lambda: shutil.rmtree(trial.out, ignore_errors=True))


def _moved_away(trial, name, case, n):
    away = trial.folder / "away"

    def happen():
        shutil.rmtree(away, ignore_errors=True)
        trial.out.rename(away)

    _until_struck(trial, name, case, n, happen)


def _until_struck(trial, name, case, n, happen):
    """Let something happen to a run that is at work, and judge it."""
    for moment in trial.moments(case, n):
        trial.reset()
        struck, code, said = _strike(trial, moment, happen)
        if struck:
            trial.judge(name, case, code, said)
            return
    fault = message_fault(code, said, trial.out) if code else trial.cannot_finish()
    trial.add(f"{name} after the end", "crashed" if code and fault else "lost" if fault else "right", case, fault)


def _strike(trial, moment, happen):
    """``(whether there was something left to do, exit status, what was said)`` of a run to which something happens.

    It happens at an event, while the process stands still: some time after it would be another moment. At moment 0 it has
    happened before the start.
    """
    if not moment:
        happen()
        return True, *run(trial.command.line(trial.out), before=lambda: arm(trial.out))
    events = Events(trial.out)
    process = Process(trial.command.line(trial.out), before=lambda: arm(trial.out))
    try:
        struck = _stands(trial, process, events, moment)
        if struck:
            happen()
        process.send(signal.SIGCONT)
        code = process.wait()
    finally:
        events.close()
    return struck, code, process.said


def _stands(trial, process, events, moment):
    """Stop a process at an event; whether it stands and its output is not complete."""
    return events.wait(moment, process) and process.stop() and not is_complete(trial.out, trial.whole["files"])


def _two(other):
    def attempt(trial, name, case, n):
        draw = random.Random(f"{trial.campaign.seed} {case} delay")
        wholes = [trial.whole, trial.other if other else trial.whole]
        # The first ones start together.
        for moment in trial.moments(case, n) if n > 1 else [0] * ATTEMPTS:
            trial.reset()
            overlap, ends = _beside(trial, wholes, moment, draw.choice((0, 0.01, 0.1, 1)) * draw.random())
            if overlap:
                break
        else:
            name = f"{name}, one after the other"
        trial.add(name, *_judge_two(trial, wholes, case, ends))

    return attempt


def _beside(trial, wholes, moment, delay):
    """``(whether both were at work at one time, exit status and words of each)``.

    The first process stands still at an event until the second one has come to the folder, and for a delay more.
    """
    events = Events(trial.out)
    first = Process(wholes[0]["command"].line(trial.out))
    overlap = bool(moment) and _stands(trial, first, events, moment)
    events.read()
    second = Process(wholes[1]["command"].line(trial.out))
    if overlap:
        events.wait(events.count + 1, second)
        second.ends_within(delay)
    elif not moment:
        overlap = not first.ends_within(0)
    first.send(signal.SIGCONT)
    ends = [(each.wait(), each.said) for each in (first, second)]
    events.close()
    return overlap, ends


def _judge_two(trial, wholes, case, ends):
    """``(outcome, case, detail)`` of two processes of one folder."""
    codes = [code for code, _ in ends]
    if any(faults := [message_fault(code, said) for code, said in ends if code]):
        return "crashed", case, f"{codes}, {max(faults)}"
    if all(codes):
        return "lost", case, f"both refused: {[said[-400:] for _, said in ends]}"
    ended = [whole for code, whole in zip(codes, wholes) if code == 0]
    differ = [difference(trial.out, whole["files"]) for whole in ended]
    # Two that ended well are both right; of two pictures the later one stays.
    wrong = all(differ) if trial.command.out else any(differ)
    return "wrong" if wrong else "refused" if any(codes) else "right", case, f"exit statuses {codes}: {differ}"


def _jumping_clock(trial, name, case, n):
    """A clock that jumps by up to weeks at every reading; of odd cases half a run is there, with times far off."""
    draw = random.Random(f"{trial.campaign.seed} {case} clock")
    if n % 2 and not _leave_a_part(trial, case, n, draw):
        name = f"{name}, nothing there before"
    seconds = draw.choice((1, 3600, 86400, 10**6))
    ctypes.CDLL(None).faults_reset()

    def before():
        ctypes.CDLL(None).faults_clock(ctypes.c_long(seconds))

    code, said = finish(trial.command, trial.out, before=before)
    trial.judge(name if counter("ticks") else f"{name}: not read", case, code, said)


def _leave_a_part(trial, case, n, draw):
    """Kill a run at work and give its files times that are far off; whether one was at work."""
    for moment in trial.moments(case, n):
        trial.reset()
        events = Events(trial.out)
        process = Process(trial.command.line(trial.out))
        struck = _stands(trial, process, events, moment)
        process.send(signal.SIGKILL)
        process.wait()
        events.close()
        if struck:
            break
    for path in [*trial.out.rglob("*"), trial.out]:
        os.utime(path, (draw.choice((0, 2**32)),) * 2)
    return struck


def _few(trial):
    return FEW


def _once(trial):
    return 1


KINDS = [
    ("disk full", lambda trial: trial.failing(FULL), _failing(errno.ENOSPC, FULL)),
    ("half of a write, then disk full", lambda trial: trial.failing(WRITES), _failing(errno.ENOSPC, HALF)),
    ("input/output error", lambda trial: trial.failing(ALL), _failing(errno.EIO, ALL, alone=True)),
    ("read-only after some calls", _few, _failing(errno.EROFS, READ_ONLY, few=True)),
    ("limit of a file's size", Trial.sizes, _limited),
    ("order of writing and renaming", _once, _ordered),
    ("full tmpfs", _few, _full_tmpfs),
    ("read-only mount", _once, _read_only_mount),
    ("folder removed", _few, _vanishing),
    ("folder moved away", _few, _moved_away),
    ("two processes, the same", _few, _two(other=False)),
    ("two processes, another seed", _few, _two(other=True)),
    ("jumping clock", _few, _jumping_clock),
]
"""Kinds of faults: a name, the largest n of a trial, and what tries one case."""

ENDLESS = 10**6
"""More than there are cases."""

if __name__ == "__main__":
    main("faults", __doc__, run_cases, ENDLESS)
