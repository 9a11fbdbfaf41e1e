"""Both modes of ``python -m profiling.gpu`` from end to end on a machine without a GPU, before one is there for minutes.

python -m profiling.gpu.rehearsal --out FOLDER        # ``make rehearse`` does that with the versions of a GPU's machine

Both objects are built, ``parity`` is killed once while it runs and goes on to its end, then ``bench``: every GPU test and
benchmark goes as far as it can on a stand-in (tests/gpu_dry_run.py). Steps that need a device say so and are counted. The log
names every step with its seconds; the code is 0 where nothing failed that needs no device.
"""

import argparse
import json
import platform
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import torch

from advkd.runtime.folders import require_output_folder
from advkd.runtime.timing import provenance

from ..evidence import ROOT
from .build import BUILD, REHEARSED, build_environment, stale_objects
from .modes import ARCHIVE, MODES, SUMMARY, TESTS
from .part import NEEDS_DEVICE

KILLED_AFTER = 45.0
"""Seconds that the run that is killed has."""


class Log:
    """Lines with the seconds since the beginning, on the terminal and in a file."""

    def __init__(self, path):
        self.file, self.begin = open(path, "w"), time.monotonic()

    def __call__(self, text):
        line = f"[{time.monotonic() - self.begin:5.0f} s] {text}"
        print(line, flush=True)
        print(line, file=self.file, flush=True)


def rehearse(out):
    """All steps; returns whether nothing failed."""
    say = Log(out / "rehearsal.txt")
    known = {name: version for name, version in provenance()["versions"].items() if version}
    say(f"Python {platform.python_version()}, {', '.join(f'{k} {v}' for k, v in known.items())}; CUDA: {torch.version.cuda}")
    steps = [build(say), killed(out / "parity", say)]
    for mode in MODES:
        steps.append(whole(mode, out / mode, say))
    say("nothing failed that needs no device" if all(steps) else "something failed that needs no device: see above")
    return all(steps)


def build(say):
    """Both objects for the architecture of the first cards, unless they are there."""
    if not stale_objects():
        say("both objects are there, of these sources")
        return True
    done = subprocess.run(BUILD, cwd=ROOT, env=build_environment(REHEARSED), capture_output=True, text=True)
    say(f"both objects built for {REHEARSED}: {'yes' if done.returncode == 0 else done.stderr[-2000:]}")
    return done.returncode == 0


def start(mode, out):
    command = [sys.executable, "-m", "profiling.gpu", mode, "--rehearse", "--out", str(out)]
    with open(out.parent / f"{out.name}.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def killed(out, say):
    """``parity``, killed while it runs: what it has left is whole."""
    process = start("parity", out)
    time.sleep(KILLED_AFTER)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = state_of(out)
    say(f"parity, killed after {KILLED_AFTER:.0f} s: {', '.join(state['files'])}; {len(state['tests'])} tests in {TESTS}")
    return state["whole"] and bool(state["tests"])


def whole(mode, out, say):
    """A mode to its end; its parts, seconds and counts."""
    begin = time.monotonic()
    code = start(mode, out).wait()
    state = state_of(out)
    say(f"{mode}: ended with {code} after {time.monotonic() - begin:.0f} s; {', '.join(state['files'])}")
    for name, part in state["parts"].items():
        say(f"  {name}: {part['state']}, {part['seconds']:.0f} s; {told(part['result'])}")
    counts = Counter(entry["outcome"] for entry in state["tests"].values())
    say(f"  tests entered: {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}")
    for test, entry in state["tests"].items():
        if entry["outcome"] in ("failed", "died"):
            say(f"  {test}: {entry.get('message', '')[-200:]}")
    return state["whole"] and code == 0


def told(result):
    """A part's result in a line: its error, its counts, and how often it needed a device."""
    devices = json.dumps(result).count(NEEDS_DEVICE)
    words = [str(result[key])[:300] for key in ("error", "unfinished", "counts", "errors") if result.get(key)]
    return "; ".join([*words, *([f"needs a device: {devices} times"] if devices else [])]) or "done"


def state_of(out):
    """The files that a run has left in its folder, read as its user would."""
    files = sorted(path.name for path in out.iterdir()) if out.exists() else []
    whole_files = set(files) == {TESTS, ARCHIVE, SUMMARY}
    tests = json.loads((out / TESTS).read_text()) if TESTS in files else {}
    parts = {}
    if ARCHIVE in files:
        with tarfile.open(out / ARCHIVE) as archive:
            for name in archive.getnames():
                if found := re.fullmatch(r"gpu_(\w+)\.json", name):
                    parts[found[1]] = json.load(archive.extractfile(name))
    return {"files": files, "whole": whole_files, "tests": tests, "parts": parts}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the log and what the runs leave")
    options = parser.parse_args()
    sys.exit(0 if rehearse(Path(require_output_folder(options.out)).absolute()) else 1)


if __name__ == "__main__":
    main()
