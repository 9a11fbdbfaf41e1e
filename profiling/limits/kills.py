"""Kills at random moments: SIGKILL, SIGTERM and Ctrl-C, once to three times a case, and the command again until it is complete.

``python -m profiling.limits.kills --count 240``. The folder must then equal that of a run without kills; a killed process must
print no traceback, and end by the signal or with the status that stands for it. Half the kills come at a random time, half
just after a random event in the output folder (a file made, written, renamed). One case in sixteen starts processes anew;
Ctrl-C then comes after the interpreter's own start, which no program can guard. A case whose signals all came after the end of
its processes is drawn anew, up to :data:`ATTEMPTS` times, and then counted under a kind of its own.
"""

import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from .commands import FINISHED, Events, Process, difference, finish, prepare, run, snapshot
from .record import main

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
ATTEMPTS = 8
"""Draws of a case's moments until a signal ends a process."""
INTERPRETER = 0.5
"""Seconds of a new process within which no Ctrl-C is sent."""


def run_cases(campaign, cases):
    """Run the cases of these numbers."""
    with tempfile.TemporaryDirectory(prefix="advkd-kills-") as folder:
        folder = Path(folder)
        run_commands(campaign, cases, list(prepare(folder / "in").values()), folder / "runs")


def run_commands(campaign, cases, commands, folder):
    """Run the cases of these numbers on ``commands`` in a new ``folder``."""
    whole = {(command.name, False): _measure(command, folder) for command in commands}
    for case in campaign.each(cases):
        chosen = plan(campaign.seed, case, 0)
        command = commands[case % len(commands)]
        if chosen["fresh"] and (command.name, True) not in whole:
            whole[command.name, True] = _measure(command, folder, fresh=True)
        _run_case(campaign, case, command, whole[command.name, chosen["fresh"]], folder / "out")


def _measure(command, folder, fresh=False):
    """A run without kills: its files, seconds and events."""
    out = folder / "whole" / f"{command.name}{' anew' * fresh}"
    out.mkdir(parents=True)
    events = Events(out)
    begin = time.perf_counter()
    code, said = run(command.line(out), fresh=fresh)
    seconds = time.perf_counter() - begin
    events.read()
    events.close()
    if code:
        raise RuntimeError(f"{command.name} does not run here: {said}")
    return {"files": snapshot(out), "seconds": seconds, "events": events.count}


def plan(seed, case, attempt):
    """Signal, moments and start of a case, a function of its arguments; an attempt draws the moments alone."""
    draw, moments = random.Random(f"{seed} {case}"), random.Random(f"{seed} {case} {attempt}")
    chosen = {"signal": draw.choice(list(SIGNALS)), "fresh": draw.random() < 1 / 16}
    count = draw.choice((1, 1, 2, 3))
    return {**chosen, "kills": [(moments.random() < 0.5, moments.random(), moments.random() * 2e-3) for _ in range(count)]}


def _run_case(campaign, case, command, whole, out):
    """Attempt a case until a signal has ended a process, or an attempt fails."""
    for attempt in range(ATTEMPTS):
        chosen = plan(campaign.seed, case, attempt)
        out.mkdir()
        landed, outcome, detail = _attempt(command, chosen, whole, out)
        shutil.rmtree(out)
        if landed or outcome != "right":
            break
    campaign.add(f"{chosen['signal'] if landed else 'ended before the signal'}, {command.name}", outcome, case, detail)


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
    by_event, fraction, delay = kill
    resume = ["--resume"] if command.resumes and (out / "checkpoint.safetensors").exists() else []
    events = Events(out)
    process = Process(command.line(out, *resume), fresh=chosen["fresh"])
    number = SIGNALS[chosen["signal"]]
    try:
        if by_event:
            process.ends_within(0) or events.wait(1 + int(fraction * whole["events"]), process)
            process.ends_within(delay)
        else:
            least = INTERPRETER if chosen["fresh"] and number == signal.SIGINT else 0
            process.ends_within(least + fraction * max(0, whole["seconds"] - least))
        sent = process.send(number)
        code = process.wait()
    finally:
        events.close()
    fault = _end_fault(code, process.said, number if sent else None)
    return sent and (code in _ends_by(number) or bool(fault)), fault


def _ends_by(number):
    """Exit statuses of a process that a signal ended."""
    return -number, 128 + number


def _end_fault(code, said, number):
    """The fault of a process's end; ``number`` is the signal that reached it alive, or None."""
    if code is None:
        return "it hangs"
    if "Traceback" in said or "Exception" in said:
        return f"a traceback: {said[-1500:]}"
    if number == signal.SIGINT and code == 130 and "advkd: interrupted; run the same command again" not in said:
        return f"no message: {said[-500:]}"
    complete = code == 0 or (code == 2 and any(words in said for words in FINISHED))
    return "" if complete or (number and code in _ends_by(number)) else f"exit status {code}: {said[-500:]}"


if __name__ == "__main__":
    main("kills", __doc__, run_cases, 240)
