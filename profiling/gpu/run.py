"""Parts of a run on a GPU, each a process of its own with a limit of its own: one that dies or hangs takes no other with it."""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from advkd.runtime.files import write_json

from ..evidence import ROOT, environment, gpu_digests
from . import kept as gpu_kept
from .parent import as_parent
from .tests import BROKEN

STARTS = 8
"""A part whose process dies is started so often: every time without what the last one died of."""
GRACE = 3.0
"""Seconds that a part has to end by itself at its limit, and again when it is asked to."""
STATES = {0: "passed", 1: "failed", 3: "unfinished"}


@dataclass(frozen=True)
class Part:
    """One part of the command.

    Attributes:
        name: of ``gpu_<name>.json``.
        seconds: that it may take.
        module: whose command line does it.
        needs_gpu: True if it runs nowhere else.
        most: cases of a test function that it runs at most; 0 for all.
    """

    name: str
    seconds: float
    module: str = "profiling.gpu.parts"
    needs_gpu: bool = True
    most: int = 0


def source_digest(root=ROOT):
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
        options: further words of every part's command line.
    """

    def __init__(self, out, place, seconds, full=False, kept=None, options=()):
        self.out, self.place, self.full, self.kept, self.options = Path(out), place, full, kept, list(options)
        self.end, self.live = time.monotonic() + seconds, set()
        self.kernels = gpu_digests()  # here: parts run in threads, in which Python 3.11's parser is not safe
        self.key = {"commit": place["commit"], "device": place["device"], "sources": source_digest()}

    def do(self, part, again=False):
        """Run a part unless it is finished; returns its stored result."""
        known = self.stored(part)
        same = known is not None and known["key"] == self.key and known["full"] == self.full
        if same and not again and known["state"] in ("passed", "failed"):
            print(f"{part.name}: {known['state']} before, not run again (--again {part.name})", flush=True)
            return known
        if not again and self.kept and (known := gpu_kept.whole_part(self.kept, part.name)):
            print(f"{part.name}: there is a result for these sources, not run again", flush=True)
            write_json(self.out / f"gpu_{part.name}.json", known)
            return known
        folder = self.out / "parts" / part.name
        if again or not same:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        # Logs and journals are for this machine alone.
        (self.out / "parts" / ".gitignore").write_text("*\n")
        (folder / "result.json").unlink(missing_ok=True)
        seconds = min(part.seconds, self.end - time.monotonic())
        begin = time.monotonic()
        state = "unfinished" if seconds < 2 * GRACE else self._processes(part, folder, seconds)
        spent = time.monotonic() - begin
        print(f"{part.name}: {state} after {spent:.0f} s", flush=True)
        return self._store(part, folder, state, spent, seconds)

    def stored(self, part):
        """Stored result of a part, or None."""
        path = self.out / f"gpu_{part.name}.json"
        try:
            found = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError):
            return None
        return found if isinstance(found, dict) and {"key", "full", "state"} <= set(found) else None

    def stop(self):
        """End all parts now; what they have finished stays."""
        self.end = 0.0
        for process in list(self.live):
            _end(process)

    def _processes(self, part, folder, seconds):
        end, restarted = time.monotonic() + seconds, []
        for _ in range(STARTS):
            left = min(end, self.end) - time.monotonic()
            if left < GRACE:
                return "unfinished"
            command = [sys.executable, "-m", part.module, part.name, "--out", str(self.out), "--folder", str(folder)]
            command += ["--seconds", f"{left - GRACE:.1f}", *(["--full"] if self.full else []), *restarted, *self.options]
            command += [*(["--most", str(part.most)] if part.most else []), *(["--kept", str(self.kept)] if self.kept else [])]
            code = run_process(command, folder / "log.txt", left, part.name, self.live)
            if code is None or self.end == 0.0:
                return "unfinished"
            if code in STATES and (folder / "result.json").exists():
                return STATES[code]
            if code != BROKEN and code >= 0:
                # A process that ended by itself without a result would do so again.
                break
            print(f"{part.name}: the process died ({code}); what it was at is left out", flush=True)
            restarted = ["--restarted"]
        return "died"

    def _store(self, part, folder, state, spent, limit):
        found = folder / "result.json"
        journal = folder / "journal.json"
        if found.exists():
            result = json.loads(found.read_text())
        else:
            result = {"items": json.loads(journal.read_text()) if journal.exists() else {}, "unfinished": "ended from outside"}
        log = folder / "log.txt"
        stored = {
            "part": part.name,
            "state": state,
            "key": self.key,
            "full": self.full,
            "kernels": self.kernels,
            "sources": gpu_kept.measured_digest(part.name),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
            "seconds": round(spent, 1),
            "limit": round(limit, 1),
            "result": result,
            "log_tail": log.read_text(errors="replace")[-3000:] if state != "passed" and log.exists() else "",
            "provenance": self.place,
        }
        write_json(self.out / f"gpu_{part.name}.json", with_commit(stored, self.place))
        return stored


def with_commit(value, place):
    """Every provenance inside with the commit that the whole run has, where its process could not ask git."""
    if isinstance(value, dict):
        known = {k: with_commit(v, place) for k, v in value.items()}
        if {"commit", "dirty"} <= set(known) and known["commit"] is None:
            known |= {"commit": place["commit"], "dirty": place["dirty"]}
        return known
    return [with_commit(item, place) for item in value] if isinstance(value, list) else value


def run_process(command, log, seconds, name, live):
    """Run a command whose output goes to a log and, line by line, to the terminal; its code, None where it was ended.

    The process is in the set ``live`` while it runs.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=environment(**as_parent(), PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1"),
    )
    reader = threading.Thread(target=_copy, args=(process.stdout, log, name), daemon=True)
    reader.start()
    live.add(process)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"{name}: {seconds:.0f} s are over, the part is ended", flush=True)
        return None
    finally:
        live.discard(process)
        _end(process)
        reader.join(GRACE)
    return process.returncode


def _end(process):
    """Ask a process group to end, then end it; what a dead leader left behind as well."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _copy(stream, log, name):
    with open(log, "a") as file:
        for line in stream:
            file.write(line)
            file.flush()
            print(f"[{name}] {line}", end="", flush=True)
