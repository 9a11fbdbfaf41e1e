"""Every measurement of this tree on a machine with an NVIDIA GPU.

python -m profiling.gpu parity|bench --out FOLDER [--commit SHA]
python -m profiling.gpu --parts build,tests,... | --full [--out FOLDER] [--minutes 8] [--commit SHA]

``parity`` (270 s: is it right?) and ``bench`` (330 s: how fast?) are for a machine that is there for a quarter of an hour; see
:mod:`profiling.gpu.modes`. The second form runs parts one after the other: each in a process with a limit of its own,
so that one that dies or hangs takes no other with it; benchmarks count behind the part ``tests``. A finished part leaves
``gpu_<part>.json``; run again, finished parts of the same tree and device are passed over and the others go on where they
stopped. ``SUMMARY.md`` says what came of it. The code is 0 where every part passed, 1 where one failed or had no time, 2 where
there is no GPU.
"""

import argparse
import sys

import torch

from advkd.runtime.files import write_bytes
from advkd.runtime.folders import require_output_folder
from advkd.runtime.timing import provenance

from ..harness import device_folder
from . import summary as gpu_summary
from .modes import MODES, run_mode, stopped_by_signal
from .run import Part, Run

PARTS = (
    Part("build", 240),
    Part("rates", 30),
    Part("warm", 80),
    Part("tests", 110),
    Part("bench_student", 200),
    Part("first_image", 60),
    Part("bench_conv_block", 80),
    Part("memcheck", 60, most=3),
    Part("racecheck", 60, most=3),
    Part("bench_gradient_penalty", 50),
    Part("bench_norm_act", 30),
    Part("bench_sampler_step", 40),
    Part("ncu", 90),
)
"""Parts in order. Their limits add up to more than a run's minutes: time that one does not need is left to those after it."""


def gpu_missing(device):
    """The reason why there is nothing to measure on, or None."""
    if torch.device(device).type != "cuda":
        return f"{device} is no GPU (--device cuda)"
    if torch.cuda.is_available():
        return None
    return "there is no CUDA device" if torch.version.cuda else "this torch is built without CUDA"


def place_of(device, commit):
    """Provenance of a run; ``commit``: that of which the tree is a clean copy, where there is no git to ask."""
    found = provenance(device)
    if commit and found["commit"] is None:
        found |= {"commit": commit, "dirty": False}
    return found


def options_of(arguments, parts):
    names = [part.name for part in parts]
    parser = argparse.ArgumentParser("python -m profiling.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=MODES, help="a run of some minutes, three files in --out")
    parser.add_argument("--out", help="folder for the results (default without a mode: profiling/results/<device>)")
    parser.add_argument("--parts", help=f"instead of a mode: some of {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="of wall time for all parts together")
    parser.add_argument("--full", action="store_true", help="every case of every benchmark: an hour, give it --minutes")
    parser.add_argument("--commit", help="of which commit the tree is a clean copy, where there is no git to ask")
    parser.add_argument("--rehearse", action="store_true", help="with a mode, without a GPU: do all that needs none")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    if bool(options.mode) == bool(options.parts or options.full):
        parser.error("give a mode (parity or bench), or --parts or --full")
    if options.mode and not options.out:
        parser.error(f"--out must name the folder for the files of {options.mode}")
    if options.rehearse and not options.mode:
        parser.error("--rehearse needs a mode (parity or bench)")
    options.parts = [name for name in (options.parts or ",".join(names)).split(",") if name]
    for name in options.parts:
        if name not in names:
            parser.error(f"there is no part {name!r} (known: {', '.join(names)})")
    return options


def main(arguments=None, parts=PARTS, missing=gpu_missing, place=place_of, modes=MODES):
    """The command line; returns the code. Everything but ``arguments`` is for tests."""
    options = options_of(arguments, parts)
    gap = missing(options.device)
    if gap and not options.rehearse:
        print(f"profiling.gpu: {gap}; parity and bench go as far as they can with --rehearse", file=sys.stderr)
        return 2
    where = place("cpu" if gap else options.device, options.commit)
    if options.mode:
        # A rehearsal must not pass over what a card has measured.
        kept = None if options.rehearse else device_folder(options.device)
        return _code(run_mode(modes[options.mode], options.out, where, kept=kept, rehearse=options.rehearse))
    out = require_output_folder(options.out or device_folder(options.device))
    run = Run(out, where, 60 * options.minutes, options.full)
    with stopped_by_signal(run):
        found = [run.do(part) for part in parts if part.name in options.parts]
    write_bytes(out / "SUMMARY.md", gpu_summary.summary(out, [part.name for part in parts]).encode())
    print(f"{out / 'SUMMARY.md'}", flush=True)
    return _code(found)


def _code(found):
    return 0 if all(part["state"] == "passed" for part in found) else 1
