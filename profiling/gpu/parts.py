"""The parts of ``python -m profiling.gpu``, each in a process of its own, whose argument is a :class:`Part` as JSON."""

import json
import shutil
import sys

from ..cases.conv_block import PROFILED
from ..harness import peaks
from ..trace import ncu as counters
from .bench import QUICK, bench
from .build import build
from .first_image import first_image
from .parity import gate, tests
from .part import NEEDS_DEVICE, Part, run
from .processes import end_with_parent
from .sanitizers import SANITIZERS, sanitizer
from .warm import warm


def rates(part):
    """The card's own rates, which floors are counted with."""
    found = part.run("rates", peaks if not part.rehearse else lambda: {NEEDS_DEVICE: "rates"})
    if "flops" in found:
        flops = ", ".join(f"{product} {value / 1e12:.0f}" for product, value in found["flops"].items())
        return {"said": f"TFLOP/s: {flops}; copy {found['bandwidth'] / 1e12:.2f} TB/s"}


LAUNCH = "import sys; from profiling.cases.conv_block import launch; launch(sys.argv[1])"


def ncu(part):
    """Nsight Compute on one launch of each kernel: time, traffic, rate, occupancy, what its warps wait for."""
    tool = shutil.which("ncu")
    if part.rehearse:
        return {NEEDS_DEVICE: "ncu"}
    if tool is None:
        return {"said": "ncu is not installed"}
    for name in PROFILED:
        part.run(name, lambda name=name: _profiled(part, name))


def _profiled(part, chain):
    kernels = ["--kernel-name", "regex:advkd|conv_kernel|image_kernel|descriptor_kernel"]
    words = counters.ncu_command(counters.METRICS.values(), kernels, [sys.executable, "-c", LAUNCH, chain])
    rows, text = counters.launches_of(words, "ncu", part.left())
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
    "tests": tests,
    "gate": gate,
    **{name: sanitizer(name) for name in SANITIZERS},
    "first_image": first_image,
    **{name: bench(name) for name in QUICK},
    "ncu": ncu,
}


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    end_with_parent(options.pop("parent"))
    sys.exit(run(PARTS[options["name"]], Part(**options)))
