"""The cases of a campaign and their outcomes, as JSON with provenance; ``docs/guarantees.md`` is made from it.

A campaign draws its cases from a seed: case i is the same in every run, so that a failure is run again by its number.
"""

import argparse
import signal
import sys
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
