"""The parts of ``python -m profiling.gpu``, each in a process of its own: python -m profiling.gpu.parts NAME ..."""

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path

import torch

from advkd.runtime.files import write_json

from ..cases.conv_block import PROFILED
from ..harness import peaks
from ..trace import ncu as counters
from .bench import QUICK, bench
from .build import architecture, build
from .first_image import first_image
from .parent import end_with_parent
from .parity import gate, tests
from .part import NEEDS_DEVICE, Part, logged, run
from .sanitizers import SANITIZERS, sanitizer
from .warm import warm


def rates(part):
    """The card's own rates, which floors are counted with."""
    return part.journal.run("rates", peaks if not part.rehearse else lambda: {NEEDS_DEVICE: "rates"})


def ahead(part):
    """Compilers' figures of the kernels for this card's architecture."""
    name = "sm_" + architecture(torch.cuda.get_device_capability()).replace(".", "") if torch.cuda.is_available() else None
    command = [sys.executable, "-m", "profiling.limits.ahead", "--out", str(part.folder / "ahead")]
    part.journal.run("compile", lambda: logged([*command, *(["--architectures", name] if name else [])], part))
    return {"file": "ahead/ahead.json"}


LAUNCH = "import sys; from profiling.cases.conv_block import launch; launch(sys.argv[1])"


def ncu(part):
    """Nsight Compute on one launch of each kernel: time, traffic, rate, occupancy, what its warps wait for."""
    tool = shutil.which("ncu")
    if part.rehearse:
        return {NEEDS_DEVICE: "ncu"}
    if tool is None:
        print("ncu is not installed", flush=True)
        return {"ncu": "not installed"}
    for name in PROFILED:
        part.journal.run(name, lambda name=name: _profiled(part, name))
    return {"ncu": tool}


def _profiled(part, chain):
    kernels = ["--kernel-name", "regex:advkd|conv_kernel|image_kernel|descriptor_kernel"]
    words = counters.ncu_command(counters.METRICS.values(), kernels, ["-c", LAUNCH, chain])
    rows, text = counters.launches_of(words, part.left())
    marks = [json.loads(line.partition(" ")[2]) for line in text.splitlines() if line.startswith("LAUNCH ")]
    for i, row in enumerate(rows):
        if len(marks) == len(rows):
            row |= marks[i]
            row["flop_per_second"] = row["flop"] / row["seconds"]
        figures = f"{1e6 * row['seconds']:.1f} us, {row['dram_bytes'] / 1e6:.1f} MB, {row['top_stall']}"
        print(f"  {row['kernel'][:60]}: {figures}", flush=True)
    return {"launches": rows}


PARTS = {
    "build": build,
    "rates": rates,
    "warm": warm,
    "first_tests": tests,
    "tests": tests,
    "gate": gate,
    **{name: sanitizer(name) for name in SANITIZERS},
    "first_image": first_image,
    **{name: bench(name) for name in QUICK},
    "ncu": ncu,
    "ahead": ahead,
}


def main(known=None):
    known = PARTS if known is None else known
    parser = argparse.ArgumentParser(description="One part of python -m profiling.gpu.")
    parser.add_argument("name", choices=known)
    parser.add_argument("--out", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--most", type=int, default=0)
    parser.add_argument("--kept")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--restarted", action="store_true", help="what the last process did not end has killed it")
    options = parser.parse_args()
    end_with_parent()
    # Whatever was started is ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    words = {name: getattr(options, name) for name in ("full", "name", "most", "kept", "rehearse")}
    part = Part(options.out, options.folder, options.seconds, **words)
    if not options.restarted:
        part.journal.forget_begun()
    result, code = run(known[options.name], part)
    write_json(Path(options.folder) / "result.json", result)
    sys.exit(code)


if __name__ == "__main__":
    main()
