"""The cases of a campaign and their outcomes, as JSON with provenance; ``docs/pages/tried.md`` is made from it.

A campaign draws its cases from a seed: case i is the same in every run, so that a failure is run again by its number.
"""

import argparse
import functools
import json
import os
import resource
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from advkd.runtime.files import write_json

from ..harness import device_folder, provenance

GOOD = ("right", "refused")
"""The expected answer, or a clear refusal that names the cause; nothing written before is lost."""

BAD = ("wrong", "lost", "crashed")
"""Another answer, something written that is lost, or a traceback, a hang or a signal's death instead of a message."""

PROGRESS = 60
"""Seconds between lines of progress."""


@dataclass
class Campaign:
    """Counts of outcomes by kind of case.

    Attributes:
        name: of the campaign; its result is ``limits-<name>.json``.
        seed: of its cases.
        first: number of the first case that was asked for.
        count: cases that were asked for.
        failures: what went wrong, each with the number of its case.
    """

    name: str
    seed: int
    first: int = 0
    count: int = 0
    failures: list = field(default_factory=list)

    def __post_init__(self):
        self._counts, self._modes = Counter(), Counter()
        self._begin = time.perf_counter()
        self._reached, self._last_line = 0, self._begin

    def each(self, cases):
        """Iterate over the numbers of cases and record how far the run has come."""
        for done, case in enumerate(cases):
            self.reach(done)
            yield case
        self.reach(len(cases))

    def reach(self, done):
        """Record that the first ``done`` cases have ended; prints a line of progress now and then."""
        self._reached, now = done, time.perf_counter()
        if now - self._last_line > PROGRESS:
            self._last_line, minutes = now, (now - self._begin) / 60
            print(
                f"{self.name}: {done:,} of {self.count:,} cases, {len(self.failures)} failures, {minutes:.0f} min", flush=True
            )

    def add(self, kind, outcome, case=None, detail="", mode=None):
        """Count one case of ``kind`` and its ``mode``; of :data:`BAD` outcomes the case's number and a detail are kept too."""
        if outcome not in GOOD + BAD:
            raise ValueError(f"outcome must be one of {', '.join(GOOD + BAD)}, got {outcome!r}")
        self._counts[kind, outcome] += 1
        self._modes[mode, outcome] += 1
        if outcome in BAD:
            self.failures.append({"kind": kind, "case": case, "outcome": outcome, "detail": str(detail)[:2000]})

    def rows(self):
        """One dict a kind: ``kind``, ``tried``, and a count for each outcome."""
        return [{"kind": kind, **counts} for kind, counts in _by_name(self._counts).items()]

    def modes(self):
        """The same counts by mode, for cases that have one."""
        return _by_name(Counter({key: n for key, n in self._modes.items() if key[0] is not None}))

    def write(self, out=None):
        """Write ``limits-<name>.json`` to the folder ``out`` (default: this machine's results); returns its path.

        Its ``first`` and ``count`` repeat the run; the count of an interrupted one is that of the cases that ended.
        """
        path = Path(out or device_folder()) / f"limits-{self.name}.json"
        seconds = time.perf_counter() - self._begin
        asked = {"campaign": self.name, "seed": self.seed, "first": self.first, "count": self._reached}
        result = {**asked, "seconds": seconds, "rows": self.rows(), "failures": self.failures}
        result |= {"modes": modes} if (modes := self.modes()) else {}
        write_json(path, {**result, "provenance": provenance()})
        return path


def _by_name(counted):
    """``{name: {"tried": ..., and a count for each outcome}}`` of counts by name and outcome."""
    found = {}
    for name in sorted({name for name, _ in counted}):
        counts = {outcome: counted[name, outcome] for outcome in GOOD + BAD}
        found[name] = {"tried": sum(counts.values()), **counts}
    return found


def judge_in_processes(campaign, cases, judge, size, seconds, memory, threaded=False):
    """Judge cases in forked processes, so that one that ends its process or hangs is a finding and not the end.

    Args:
        campaign: that counts the outcomes.
        cases: their numbers.
        judge: function of a number that yields what is known of the case as it goes on: dictionaries with ``kind`` and, where
            there are some, ``mode`` and ``detail``; the last one has the ``outcome``.
        size: cases of a process.
        seconds: until a case hangs.
        memory: bytes that a process may take beyond its parent's.
        threaded: judge in a new thread: OpenMP would wait for the threads of the one that forked.
    """
    left = list(cases)
    while left:
        begun = _judge_some(campaign, left[:size], functools.partial(_judge_all, judge, seconds, memory), threaded)
        left = left[begun:]
        campaign.reach(len(cases) - len(left))


def _judge_some(campaign, numbers, work, threaded):
    """Judge cases in one process until it ends; returns how many it began."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        try:
            if threaded:
                thread = threading.Thread(target=work, args=(numbers, writing))
                thread.start()
                thread.join()
            else:
                work(numbers, writing)
        finally:
            os._exit(1)
    os.close(writing)
    begun, row = 0, None
    with os.fdopen(reading) as lines:
        for line in lines:
            row = json.loads(line)
            begun += row["first"]
            if "outcome" in row:
                campaign.add(row["kind"], row["outcome"], row["case"], row["detail"], row.get("mode"))
                row = None
    _, status = os.waitpid(child, 0)
    if row is not None:
        hangs = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        end = "a hang" if hangs else f"the process ended with status {status}"
        campaign.add(row["kind"], "crashed", row["case"], f"{row.get('detail', '')} {end}".strip(), row.get("mode"))
    if not begun:
        raise RuntimeError(f"a process of the campaign ended with status {status} before it began a case")
    return begun


def _judge_all(judge, seconds, memory, numbers, writing):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    with os.fdopen(writing, "w", buffering=1) as answers:
        for number in numbers:
            signal.alarm(seconds)
            for i, row in enumerate(judge(number)):
                print(json.dumps({"case": number, "first": i == 0, **row}), file=answers)
            signal.alarm(0)
    os._exit(0)


def main(name, description, run, count):
    """The command line of a campaign.

    Args:
        name: of the campaign.
        description: for ``--help``.
        run: function ``(campaign, cases)`` that runs the cases of these numbers and adds each one's outcome.
        count: number of cases by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=count, help=f"cases (default {count})")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for the result (default: profiling/results/<device>)")
    options = parser.parse_args()
    campaign = Campaign(name, options.seed, options.first, options.count)
    interrupted = False
    try:
        run(campaign, range(options.first, options.first + options.count))
    except KeyboardInterrupt:
        interrupted = True
    tried = sum(row["tried"] for row in campaign.rows())
    print(f"{campaign.write(options.out)}: {tried} cases, {len(campaign.failures)} failures{', interrupted' * interrupted}")
    sys.exit(128 + signal.SIGINT if interrupted else 1 if campaign.failures else 0)
