"""Everything that a machine with an NVIDIA GPU can say about this tree, in one command of a few minutes.

python -m profiling.gpu [--out FOLDER] [--parts build,tests,...] [--again PART] [--minutes 8] [--full] [--commit SHA]

Parts run one after the other, what matters first, each in a process of its own with a limit of its own: one that dies or hangs
takes no other with it. A finished part leaves ``gpu_<part>.json``; run again, finished parts of the same tree and device are
passed over and the others go on where they stopped. ``SUMMARY.md`` says what came of it. The code is 0 where every part passed,
1 where one failed or had no time, 2 where there is no GPU.
"""

import argparse
import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from advkd.files import require_output_folder, write_bytes, write_json
from advkd.timing import provenance

from . import gpu_summary
from .gpu_kernels import digests
from .gpu_test_log import BROKEN
from .harness import ROOT, device_folder

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
        needs_gpu: whether it runs nowhere else.
    """

    name: str
    seconds: float
    module: str = "profiling.gpu_parts"
    needs_gpu: bool = True


PARTS = (
    Part("build", 240),
    Part("rates", 30),
    Part("warm", 80),
    Part("tests", 110),
    Part("bench_student", 200),
    Part("first_image", 60),
    Part("bench_conv_block", 80),
    Part("sanitizer", 90),
    Part("bench_gradient_penalty", 50),
    Part("bench_norm_act", 30),
    Part("bench_sampler_step", 40),
    Part("ncu", 90),
    Part("ahead", 200, needs_gpu=False),
)
"""In order. Their limits add up to more than a run's minutes: who needs less leaves the rest to those after it."""


def source_digest(root=ROOT):
    """Of all code and tests of the tree: results of another tree are not passed over."""
    sha = hashlib.sha256()
    for folder in ("advkd", "kernels", "csrc", "profiling", "tests", "setup.py"):
        paths = [root / folder] if (root / folder).is_file() else sorted((root / folder).rglob("*"))
        for path in paths:
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
                sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def gpu_missing(device):
    """The reason why there is nothing to measure on, or None."""
    if torch.device(device).type != "cuda":
        return f"{device} is no GPU (--device cuda)"
    if torch.cuda.is_available():
        return None
    return "there is no CUDA device" if torch.version.cuda else "this torch is built without CUDA"


class Run:
    """One call of the command.

    Args:
        out: folder of the results.
        place: provenance of everything measured.
        seconds: wall time of all parts together.
        full: measure all cases.
    """

    def __init__(self, out, place, seconds, full=False):
        self.out, self.place, self.full = Path(out), place, full
        self.end = time.monotonic() + seconds
        self.key = {"commit": place["commit"], "device": place["device"], "sources": source_digest()}

    def do(self, part, again=False):
        """Run a part unless it is finished; returns its stored result."""
        known = self.stored(part)
        same = known is not None and known["key"] == self.key and known["full"] == self.full
        if same and not again and known["state"] in ("passed", "failed"):
            print(f"{part.name}: {known['state']} before, not run again (--again {part.name})", flush=True)
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
        """What a part has left, or None."""
        path = self.out / f"gpu_{part.name}.json"
        try:
            found = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError):
            return None
        return found if isinstance(found, dict) and {"key", "full", "state"} <= set(found) else None

    def _processes(self, part, folder, seconds):
        end, restarted = time.monotonic() + seconds, []
        for _ in range(STARTS):
            left = end - time.monotonic()
            if left < GRACE:
                return "unfinished"
            command = [sys.executable, "-m", part.module, part.name, "--out", str(self.out), "--folder", str(folder)]
            command += ["--seconds", f"{left - GRACE:.1f}", *(["--full"] if self.full else []), *restarted]
            code = run_process(command, folder / "log.txt", left, part.name)
            if code is None:
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
            "kernels": digests(),
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


def run_process(command, log, seconds, name):
    """Run a command whose output goes to a log and, line by line, to the terminal; its code, None where it was ended."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
    )
    reader = threading.Thread(target=_copy, args=(process.stdout, log, name), daemon=True)
    reader.start()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"{name}: {seconds:.0f} s are over, the part is ended", flush=True)
        return None
    finally:
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


def place_of(device, commit):
    """Provenance of a run; ``commit``: of what tree this is a clean copy, where git is not there to say so."""
    found = provenance(device)
    if commit and found["commit"] is None:
        found |= {"commit": commit, "dirty": False}
    return found


def options_of(arguments, parts):
    names = [part.name for part in parts]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="folder for the results (default: profiling/results/<device>)")
    parser.add_argument("--parts", default=",".join(names), help=f"some of {', '.join(names)}")
    parser.add_argument("--again", action="append", default=[], metavar="PART", help="run it although it is finished (or: all)")
    parser.add_argument("--minutes", type=float, default=8.0, help="of wall time for all parts together")
    parser.add_argument("--full", action="store_true", help="every case of every benchmark: an hour, give it --minutes")
    parser.add_argument("--commit", help="of which commit the tree is a clean copy, where there is no git to ask")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    options.parts = [name for name in options.parts.split(",") if name]
    for name in (*options.parts, *(name for name in options.again if name != "all")):
        if name not in names:
            parser.error(f"there is no part {name!r} (known: {', '.join(names)})")
    return options


def main(arguments=None, parts=PARTS, missing=gpu_missing, place=place_of):
    """The command line; returns the code. Everything but ``arguments`` is for tests."""
    options = options_of(arguments, parts)
    chosen = [part for part in parts if part.name in options.parts]
    gap = missing(options.device)
    if gap and any(part.needs_gpu for part in chosen):
        print(f"profiling.gpu: {gap}; of its parts only those without a GPU run here (--parts ahead)", file=sys.stderr)
        return 2
    if gap and not options.out:
        print("profiling.gpu: without a GPU --out must name the folder", file=sys.stderr)
        return 2
    where = place("cpu" if gap else options.device, options.commit)
    out = require_output_folder(options.out or device_folder(options.device))
    if gap:
        chosen = [replace(part, seconds=60 * options.minutes) for part in chosen]
    run = Run(out, where, 60 * options.minutes, options.full)
    found = [run.do(part, part.name in options.again or "all" in options.again) for part in chosen]
    write_bytes(out / "SUMMARY.md", gpu_summary.summary(out, [part.name for part in parts]).encode())
    print(f"{out / 'SUMMARY.md'}", flush=True)
    return 0 if all(part["state"] == "passed" for part in found) else 1


if __name__ == "__main__":
    sys.exit(main())
