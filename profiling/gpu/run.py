"""Parts of a run on a GPU, each a process of its own with a limit of its own: one that dies or hangs takes no other with it."""

import datetime
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from advkd.runtime.files import write_json

from ..evidence import environment, gpu_digests
from . import kept as gpu_kept
from .part import STATES
from .processes import run_session
from .summary import read_json
from .tests import BROKEN

STARTS = 8
"""A part whose process dies is started so often: every time without what the last one died of."""
REHEARSAL = 12
"""Factor by which the limits of a rehearsal are longer, for a machine of few cores."""
GRACE = 3.0
"""Seconds that a part has to end by itself at its limit."""


@dataclass(frozen=True)
class Part:
    """One part of the command.

    Attributes:
        name: of ``gpu_<name>.json``.
        seconds: that it may take.
        most: cases of a test function that it runs at most; 0 for all.
        module: that does it, with its options as JSON.
    """

    name: str
    seconds: float
    most: int = 0
    module: str = "profiling.gpu.parts"


def source_digest(root=gpu_kept.ROOT):
    """SHA-256 of all code and tests of the tree, in short: results of another tree are not passed over."""
    return gpu_kept.tree_digest(("advkd", "kernels", "csrc", "profiling", "tests", "setup.py"), root)


class Run:
    """One call of the command.

    Args:
        out: folder of the results.
        place: provenance of everything measured.
        seconds: wall time of all parts together.
        full: measure all cases.
        kept: folder of results that stand for their sources (:mod:`profiling.gpu.kept`), or None.
        rehearse: there is no GPU.
    """

    def __init__(self, out, place, seconds, full=False, kept=None, rehearse=False):
        self.slower = REHEARSAL if rehearse else 1
        self.out, self.kept = Path(out).absolute(), kept
        self.end = time.monotonic() + self.slower * seconds
        self.options = {"out": str(self.out), "place": place, "full": full, "kept": kept and str(kept), "rehearse": rehearse}
        self.kernels = gpu_digests()  # here: parts run in threads, in which Python 3.11's parser is not safe
        self.key = {"commit": place["commit"], "device": place["device"], "sources": source_digest(), "full": full}

    def do(self, part):
        """Run a part unless it is finished; returns its stored result."""
        path = self.out / f"gpu_{part.name}.json"
        known = read_json(path, {})
        same = known.get("key") == self.key
        if same and known["state"] in ("passed", "failed"):
            print(f"{part.name}: {known['state']} before, not run again (unless {path.name} is removed)", flush=True)
            return known
        if self.kept and (known := gpu_kept.whole_part(self.kept, part.name)):
            print(f"{part.name}: there is a result for these sources, not run again", flush=True)
            write_json(path, known)
            return known
        folder = self.out / "parts" / part.name
        if not same:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        # Logs and items are for this machine alone.
        (self.out / "parts" / ".gitignore").write_text("*\n")
        if (result := folder / "result.json").exists():
            # Only items stay: the rest may not come about again.
            write_json(result, {"items": read_json(result, {"items": {}})["items"]})
        seconds, begin = max(min(self.slower * part.seconds, self.end - time.monotonic()), 0.0), time.monotonic()
        state = None if seconds < 2 * GRACE else self._processes(part, folder, seconds)
        return self._store(part, folder, state, time.monotonic() - begin, seconds)

    def stop(self):
        """End all parts, also one that is just being started; what they have finished stays."""
        self.end = 0.0

    def _is_stopped(self):
        return self.end == 0.0

    def _processes(self, part, folder, seconds):
        """State of a part when it has ended; None where it was ended from outside."""
        limit, restarted = min(time.monotonic() + seconds, self.end), False
        own = {"name": part.name, "folder": str(folder), "most": part.most, "parent": os.getpid()}
        print(f"{part.name}: begins, {seconds:.0f} s at most", flush=True)
        for _ in range(STARTS):
            left = min(limit, self.end) - time.monotonic()
            if left < GRACE:
                return None
            options = {**self.options, **own, "seconds": left - GRACE, "restarted": restarted}
            command = [sys.executable, "-m", part.module, json.dumps(options)]
            variables = environment(PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")
            code = run_session(command, folder / "log.txt", left, variables, f"[{part.name}] ", self._is_stopped)
            if code is None:
                return None
            if code in STATES:
                return STATES[code]
            if code != BROKEN and code >= 0:
                # A process that ended by itself without a result would do so again.
                break
            print(f"{part.name}: the process died ({code}); what it was at is left out", flush=True)
            restarted = True
        return "died"

    def _store(self, part, folder, state, spent, limit):
        result, log = read_json(folder / "result.json", {"items": {}}), folder / "log.txt"
        if state in (None, "died"):
            result["unfinished"] = "ended from outside"
        state = state or "unfinished"
        tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        print(f"{part.name}: {state} after {spent:.0f} s", flush=True)
        stored = {
            "part": part.name,
            "state": state,
            "key": self.key,
            "kernels": self.kernels,
            "sources": gpu_kept.measured_digest(part.name),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
            "seconds": round(spent, 1),
            "limit": round(limit, 1),
            "result": result,
            "log_tail": "" if state == "passed" else tail,
            "provenance": self.options["place"],
        }
        write_json(self.out / f"gpu_{part.name}.json", stored)
        return stored
