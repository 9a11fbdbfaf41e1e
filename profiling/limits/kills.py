"""Kills at random moments: SIGKILL, SIGTERM and Ctrl-C, once to three times a case, and the command again until it is complete.

``python -m profiling.limits.kills --count 240``. The folder must then equal that of a run without kills; a killed process must
print no traceback, and end by the signal or with the status that stands for it. Half the kills come at a random time, half
just after a random event in the output folder (a file made, written, renamed). One case in sixteen starts processes anew;
Ctrl-C then comes after the interpreter's own start, which no program can guard.
"""

import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from .commands import Events, Process, difference, finish, prepare, run, snapshot
from .record import main

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
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
    for case in cases:
        chosen = plan(campaign.seed, case)
        command = commands[case % len(commands)]
        if chosen["fresh"] and (command.name, True) not in whole:
            whole[command.name, True] = _measure(command, folder, fresh=True)
        _run_case(campaign, case, command, chosen, whole[command.name, chosen["fresh"]], folder / "out")


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


def plan(seed, case):
    """What happens in a case, a function of the seed and its number."""
    draw = random.Random(f"{seed} {case}")
    kills = [(draw.random() < 0.5, draw.random(), draw.random() * 2e-3) for _ in range(draw.choice((1, 1, 2, 3)))]
    return {"signal": draw.choice(list(SIGNALS)), "kills": kills, "fresh": draw.random() < 1 / 16}


def _run_case(campaign, case, command, chosen, whole, out):
    out.mkdir()
    kind = f"{chosen['signal']}, {command.name}"
    faults = [_kill(command, out, chosen, kill, whole) for kill in chosen["kills"]]
    code, said = finish(command, out, fresh=chosen["fresh"])
    if any(faults):
        campaign.add(kind, "crashed", case, next(filter(None, faults)))
    elif code:
        campaign.add(kind, "lost", case, f"exit status {code}: {said[-1000:]}")
    elif said := difference(out, whole["files"]):
        campaign.add(kind, "wrong", case, said)
    else:
        campaign.add(kind, "right")
    shutil.rmtree(out)


def _kill(command, out, chosen, kill, whole):
    """Start the command and kill it; returns what was wrong with its end. One that ends too early is not there to be killed."""
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
        process.send(number)
        code = process.wait()
    finally:
        events.close()
    return _end_fault(code, process.said, number)


def _end_fault(code, said, number):
    """What is wrong with the end of a process that was sent a signal, or that ended by itself before it came."""
    if code is None:
        return "it hangs"
    if "Traceback" in said or "Exception" in said:
        return f"a traceback: {said[-1500:]}"
    if number == signal.SIGINT and code == 130 and "advkd: interrupted; run the same command again" not in said:
        return f"no message: {said[-500:]}"
    repeated = code == 2 and "holds a" in said
    return "" if code in (0, -number, 128 + number) or repeated else f"exit status {code}: {said[-500:]}"


if __name__ == "__main__":
    main("kills", __doc__, run_cases, 240)
