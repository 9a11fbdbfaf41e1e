"""The two short runs on a machine that is there for minutes: is it right, and how fast is it?

python -m profiling.gpu parity|bench --out FOLDER [--commit SHA]

``parity`` takes 270 s: one case of every GPU test, then more of each, with memcheck and racecheck beside them, then the card's
rates. ``bench`` takes 330 s: a gate of tests, the rates, then the benchmarks, the most telling cases first. ``FOLDER`` holds
three files, written anew every ten seconds, each whole at any time: ``tests.json``, ``results.tgz`` (everything else: results,
items, logs) and ``SUMMARY.md``. Nothing runs again that has a result for its current source in
``profiling/results/<device>/`` or in the archive of an earlier call. The results are kept in the repository by

tar xzf FOLDER/results.tgz -C profiling/results/<device> --wildcards "gpu_*.json"

Packages that the machine lacks and cannot fetch are unpacked into a folder on ``PYTHONPATH`` before; without diffusers its
contestants, and our schedulers, are missing. So are pytest-xdist and execnet, which are pure Python: without them tests run in
one process.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from advkd.runtime.folders import locked, require_output_folder

from . import summary as gpu_summary
from .run import Part, Run
from .tests import read_log

SAVE = 10.0
"""Seconds between two savings."""
TESTS, ARCHIVE, SUMMARY = "tests.json", "results.tgz", "SUMMARY.md"


@dataclass(frozen=True)
class Mode:
    """A run of some minutes.

    Attributes:
        seconds: wall time of all steps together.
        steps: parts that run side by side, step after step.
    """

    seconds: float
    steps: tuple[tuple[Part, ...], ...]

    def parts(self):
        """All parts in order."""
        return [part for step in self.steps for part in step]


BUILD = Part("build", 100)
MODES = {
    "parity": Mode(
        270,
        (
            (BUILD,),
            (Part("tests", 160, most=16), Part("memcheck", 85, most=1), Part("racecheck", 85, most=1)),
            (Part("rates", 25),),
        ),
    ),
    "bench": Mode(
        330,
        (
            (BUILD,),
            (Part("gate", 45, most=2),),
            (Part("warm", 30),),
            (Part("rates", 15),),
            (Part("bench_sampler_step", 40),),
            (Part("bench_gradient_penalty", 45),),
            (Part("bench_student", 105),),
            (Part("bench_norm_act", 25),),
            (Part("ncu", 20),),
        ),
    ),
}


def run_mode(mode, out, place, **options):
    """Run a :class:`Mode` with a run's options, its three files in ``out``; returns the stored results of its parts."""
    out, names = require_output_folder(out), [part.name for part in mode.parts()]
    with work_folder(out) as work, saving(work, out, names):
        describe_machine(work / "machine.txt")
        run, found = Run(work, place, mode.seconds, **options), []
        with stopped_by_signal(run):
            for step in mode.steps:
                with ThreadPoolExecutor(len(step)) as threads:
                    found += threads.map(run.do, step)
    print(f"{out / SUMMARY}", flush=True)
    return found


@contextlib.contextmanager
def stopped_by_signal(run):
    """SIGTERM ends the parts; what they have finished is saved."""
    before = signal.signal(signal.SIGTERM, lambda *_: run.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def work_folder(out):
    """A folder for the parts' files, with what an earlier call has left in ``out``; a second call at the same time is refused.

    It lies in the system's temporary folder, from where files are renamed into ``out``: nothing half-written stays there.
    """
    name = hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:12]
    base = Path(tempfile.gettempdir()) / f"advkd-gpu-{name}"
    work, unpacked = base / "run", base / "unpacked"
    base.mkdir(exist_ok=True)
    with locked(base, out):
        if not work.exists():
            _unpack(out / ARCHIVE, unpacked)
            unpacked.rename(work)
        yield work
    shutil.rmtree(base)


def _unpack(path, folder):
    """Fill a new folder from an archive, where there is one; from a damaged one with what comes before the damage."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with contextlib.suppress(FileNotFoundError), tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        print(f"{path} is damaged ({error}): results after the damage are lost", file=sys.stderr, flush=True)


@contextlib.contextmanager
def saving(work, out, names):
    """Save every :data:`SAVE` seconds and at the end."""
    done = threading.Event()

    def keep_saving():
        while not done.wait(SAVE):
            try:
                save(work, out, names)
            except Exception:
                # The next saving may find the file whole that this one could not read.
                traceback.print_exc()

    saver = threading.Thread(target=keep_saving, daemon=True)
    saver.start()
    try:
        yield
    finally:
        done.set()
        saver.join()
        save(work, out, names)


def save(work, out, names):
    """Write the three files from what the parts have written so far."""
    _replace(work, out / ARCHIVE, _archive(work))
    _replace(work, out / TESTS, (json.dumps(tests_so_far(work), indent=1, sort_keys=True) + "\n").encode())
    _replace(work, out / SUMMARY, gpu_summary.summary(work, names).encode())


def _archive(work):
    """All files of the parts as a compressed archive, in the state in which each is read."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=3) as archive:
        for path in sorted(work.rglob("*")):
            # Hidden ones are locks and files that are being written.
            if path.is_file() and not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    entry, data = tarfile.TarInfo(str(path.relative_to(work))), path.read_bytes()
                    entry.size, entry.mtime = len(data), int(time.time())
                    archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def _replace(work, path, data):
    """Write a file whole: under another name in ``work``, or beside it where that is another file system, then renamed."""
    same = work.stat().st_dev == path.parent.stat().st_dev
    temporary = (work if same else path.parent) / f".{path.name}.tmp"
    temporary.write_bytes(data)
    os.replace(temporary, path)


def tests_so_far(work):
    """``{test: outcome, seconds, message}`` of all parts, from their logs: also of a part that has not ended."""
    seen = [gpu_summary.read_json(path, {}) for path in work.glob("parts/*/seen.json")]
    found = {test: entry for tests in seen for test, entry in tests.items()}
    for log in sorted(work.glob("parts/*/*.jsonl")):
        kind = f"{log.stem}::" if log.stem in ("memcheck", "racecheck") else ""
        found |= {kind + test: entry for test, entry in read_log(log).items()}
    return found


def describe_machine(path):
    """Write the driver's page and the list of installed packages, in the background."""
    with open(path, "w") as file:
        listing = ["sh", "-c", 'nvidia-smi; "$0" -m pip list', sys.executable]
        subprocess.Popen(listing, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
