"""Both modes of ``python -m profiling.gpu`` from end to end on a machine without a GPU, before one is there for minutes.

python -m profiling.gpu.rehearsal --out FOLDER        # ``make rehearse`` does that with the versions of a GPU's machine

``parity`` builds both objects, is killed once while its tests run and goes on to its end, then comes ``bench``: every GPU test
and benchmark goes as far as it can on a stand-in (tests/gpu_dry_run.py). Steps that need a device say so and are counted. The
log names every step with its time, and holds the summary of each mode; the code is 0 where nothing failed that needs no device.
"""

import argparse
import json
import logging
import platform
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch

from advkd.runtime.folders import require_output_folder
from advkd.runtime.timing import provenance

from ..evidence import ROOT
from .modes import ARCHIVE, MODES, SUMMARY, TESTS
from .part import NEEDS_DEVICE

say = logging.getLogger(__name__).info


def rehearse(out):
    """All steps; returns whether nothing failed."""
    known = {name: version for name, version in provenance()["versions"].items() if version}
    say(f"Python {platform.python_version()}, {', '.join(f'{k} {v}' for k, v in known.items())}; CUDA: {torch.version.cuda}")
    steps = [killed(out / "parity"), *[whole(mode, out / mode) for mode in MODES]]
    say("nothing failed that needs no device" if all(steps) else "something failed that needs no device: see above")
    return all(steps)


def start(mode, out):
    command = [sys.executable, "-m", "profiling.gpu", mode, "--rehearse", "--out", str(out)]
    with open(out.parent / f"{out.name}.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def killed(out):
    """``parity``, killed while its tests run: what it has left is whole."""
    process = start("parity", out)
    while process.poll() is None and not state_of(out)[0]:
        time.sleep(1.0)
    process.kill()
    process.wait()
    tests, _ = state_of(out)
    say(f"parity, killed while it ran: {len(tests or ())} tests in {TESTS}")
    return bool(tests)


def whole(mode, out):
    """A mode to its end, and its summary."""
    begin = time.monotonic()
    code = start(mode, out).wait()
    tests, devices = state_of(out)
    say(f"{mode}: ended with {code} after {time.monotonic() - begin:.0f} s; {NEEDS_DEVICE}: {devices} times")
    say((out / SUMMARY).read_text() if tests else f"the files in {out} are not whole")
    return bool(tests) and code == 0


def state_of(out):
    """Tests that a run has left in its folder and how often a step needed a device; none where its files are not whole."""
    if not out.exists() or {path.name for path in out.iterdir()} != {TESTS, ARCHIVE, SUMMARY}:
        return None, 0
    with tarfile.open(out / ARCHIVE) as archive:
        results = [
            archive.extractfile(name).read().decode() for name in archive.getnames() if re.fullmatch(r"gpu_\w+\.json", name)
        ]
    return json.loads((out / TESTS).read_text()), "".join(results).count(NEEDS_DEVICE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the log and what the runs leave")
    out = Path(require_output_folder(parser.parse_args().out)).absolute()
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(out / "rehearsal.txt", "w")]
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    sys.exit(0 if rehearse(out) else 1)


if __name__ == "__main__":
    main()
