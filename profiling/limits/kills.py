"""Kills at random moments: SIGKILL, SIGTERM and Ctrl-C, once to three times a case, and the command again until it is complete.

``python -m profiling.limits.kills --count 240``. The folder must then equal that of a run without kills; a killed process must
print no traceback, and end by the signal or with the status that stands for it. Half the kills come at a random time, half
just after a random event in the output folder (a file made, written, renamed). One case in sixteen starts processes anew;
Ctrl-C then comes after the interpreter's own start, which no program can guard. Now and then the command has processes of its
own, and the signal goes to it alone or to all of them, as a terminal's Ctrl-C does; none of them may live on.

A process that goes on to its end in spite of a signal is a failure, unless it was in its last instants: it then wrote no more
files and ended at once. An attempt of whose signals none ended a process is counted under a kind of its own, and its moments
are drawn anew, up to :data:`ATTEMPTS` times. A case stands under its signal only where one landed.
"""

import random
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from .commands import FINISHED, Events, Process, crash_fault, difference, finish, measure, prepare
from .record import main

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
ATTEMPTS = 8
"""Draws of a case's moments until a signal ends a process."""
INTERPRETER = 0.5
"""Seconds of a new process within which no Ctrl-C is sent."""
INSTANTS = {False: 0.5, True: 2}
"""Seconds in which a process ends that no longer heeds a signal: a forked one, and an interpreter that was started anew."""
GROUPS = 80
"""One case in so many is of the command that has processes of its own, which takes many times as long."""


def run_cases(campaign, cases):
    """Run the cases of these numbers."""
    with tempfile.TemporaryDirectory(prefix="advkd-kills-", ignore_cleanup_errors=True) as folder:
        commands = prepare(Path(folder) / "in")
        line = (*commands["trajectories"].arguments, "--processes", "2")
        group = replace(commands["trajectories"], name="trajectories --processes 2", arguments=line, group=True)
        run_commands(campaign, cases, list(commands.values()), Path(folder) / "runs", group)


def run_commands(campaign, cases, commands, folder, group=None):
    """Run the cases of these numbers on ``commands``, and some on ``group``, in a new ``folder``."""
    # Where a shell has had this process ignore interrupts, the commands would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wholes = {}
    for case in campaign.each(cases):
        command = group if group and case % GROUPS == GROUPS // 2 else commands[case % len(commands)]
        fresh = command.group or plan(campaign.seed, case, 0)["fresh"]
        if (command.name, fresh) not in wholes:
            wholes[command.name, fresh] = measure(command, folder / f"whole{' anew' * fresh}", fresh=fresh)
        _run_case(campaign, case, command, wholes[command.name, fresh], folder / "out")


def plan(seed, case, attempt):
    """Signal, moments and start of a case, a function of its arguments; an attempt draws the moments alone."""
    draw, moments = random.Random(f"{seed} {case}"), random.Random(f"{seed} {case} {attempt}")
    chosen = {"signal": draw.choice(list(SIGNALS)), "fresh": draw.random() < 1 / 16}
    count = draw.choice((1, 1, 2, 3))
    kills = [(moments.random() < 0.5, moments.random(), moments.random() * 2e-3) for _ in range(count)]
    return {**chosen, "kills": kills, "to all": draw.random() < 0.5}


def _run_case(campaign, case, command, whole, out):
    """Attempt a case until a signal has ended a process, or an attempt fails."""
    for attempt in range(ATTEMPTS):
        chosen = plan(campaign.seed, case, attempt)
        chosen["fresh"] |= command.group
        out.mkdir()
        landed, outcome, detail = _attempt(command, chosen, whole, out)
        shutil.rmtree(out)
        kind = chosen["signal"] if landed else "ended before the signal"
        campaign.add(f"{kind}, {command.name}", outcome, case, f"attempt {attempt}: {detail}")
        if landed or outcome != "right":
            return


def _attempt(command, chosen, whole, out):
    """``(whether a signal ended a process, outcome, detail)`` of the kills and of the command repeated to its end."""
    ends = [_kill(command, out, chosen, kill, whole) for kill in chosen["kills"]]
    landed, faults = any(landed for landed, _ in ends), [fault for _, fault in ends if fault]
    code, said = finish(command, out, fresh=chosen["fresh"])
    if faults:
        return landed, "crashed", faults[0]
    if code:
        return landed, "lost", f"exit status {code}: {said[-1000:]}"
    fault = difference(out, whole["files"])
    return landed, "wrong" if fault else "right", fault


def _kill(command, out, chosen, kill, whole):
    """Start the command and send it the signal: ``(whether it ended the process, the fault of the end or "")``.

    A process that the signal reached and that ended badly counts as ended by it.
    """
    resume = ["--resume"] if command.resumes and (out / "checkpoint.safetensors").exists() else []
    events = Events(out)
    process = Process(command.line(out, *resume), fresh=chosen["fresh"])
    number = SIGNALS[chosen["signal"]]
    try:
        _await(process, events, kill, chosen, whole)
        sent = process.send(number, command.group and chosen["to all"])
        events.read()
        begin, work = time.perf_counter(), events.work
        code = process.wait()
        late = time.perf_counter() - begin > INSTANTS[chosen["fresh"]]
        events.read()
    finally:
        events.close()
    landed = sent and code in _ends_by(number, chosen["fresh"])
    fault = _end_fault(code, process.said, number, landed)
    if not fault and sent and not landed and (late or events.work > work):
        fault = f"it ignores the signal: exit status {code}"
    # One that is still importing its modules ends when it has done so.
    if not fault and command.group and process.leaves(5 + whole["seconds"]):
        fault = "processes that it started live on"
    return landed or bool(sent and fault), fault


def _await(process, events, kill, chosen, whole):
    """Let the process run until the moment of a kill, or to its end."""
    by_event, fraction, delay = kill
    if by_event:
        process.ends_within(0) or events.wait(1 + int(fraction * whole["events"]), process)
        process.ends_within(delay)
    else:
        least = INTERPRETER if chosen["fresh"] and SIGNALS[chosen["signal"]] == signal.SIGINT else 0
        process.ends_within(least + fraction * max(0, whole["seconds"] - least))


def _ends_by(number, fresh):
    """Exit statuses of a process that a signal ended."""
    if number != signal.SIGINT:
        return (-number,)
    # An interpreter that shuts down has put back the system's own way to end.
    return (128 + number, -number) if fresh else (128 + number,)


def _end_fault(code, said, number, landed):
    """The fault of a process's end; ``landed``: the signal ``number`` ended it."""
    if fault := crash_fault(code, said):
        return fault
    if landed and code == 130 and "advkd: interrupted; run the same command again" not in said:
        return f"no message: {said[-500:]}"
    complete = code == 0 or (code == 2 and any(words in said for words in FINISHED))
    return "" if complete or landed else f"exit status {code}: {said[-500:]}"


if __name__ == "__main__":
    main("kills", __doc__, run_cases, 240)
