"""The part that runs Nsight Compute on one launch of every kernel that can compute a chain of layers.

python -m profiling.gpu.ncu CHAIN launches them for the profiler and prints ``LAUNCH {json}`` per launch, in their order.
"""

import json
import shutil
import subprocess
import sys

import torch

from advkd.engines.gpu_search import Limits
from advkd.ops.student_steps import run_step

from ..cases.conv_block import CHAINS, SLOPE, Chain, tensors, ways
from ..evidence import ROOT
from ..limits import predictions
from ..trace.counters import METRICS, ncu_rows
from .part import NEEDS_DEVICE

PROFILED = (
    "128 to 128 at 256",
    "128 to 128 up to 256",
    "128 to 3 at 256",
    "48 to 48 up to 128, and at 128",
    "32 to 32 at 256, to 3",
    "the stem of pyramid-256 up to 16",
)
"""The chains of layers whose kernels Nsight Compute looks at, one process each."""
BATCH = 8


def ncu(part):
    """Nsight Compute on one launch of each kernel: time, traffic, rate, occupancy, what its warps wait for."""
    tool = shutil.which("ncu")
    if part.rehearse:
        return {NEEDS_DEVICE: "ncu"}
    if tool is None:
        print("ncu is not installed", flush=True)
        return {"ncu": "not installed"}
    for name in PROFILED:
        part.journal.run(name, lambda name=name: _profiled(part, tool, name))
    return {"ncu": tool}


def _profiled(part, tool, chain):
    work = [sys.executable, "-m", "profiling.gpu.ncu", chain]
    options = ["--csv", "--page", "raw", "--clock-control", "none", "--print-units", "base", "--target-processes", "all"]
    command = [
        tool,
        *options,
        "--kernel-name",
        "regex:advkd|conv_kernel|image_kernel|descriptor_kernel",
        "--metrics",
        ",".join(METRICS.values()),
        *work,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=part.left())
    rows = ncu_rows(done.stdout)
    if done.returncode or not rows:
        raise RuntimeError((done.stdout + done.stderr).strip().splitlines()[-1])
    marks = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("LAUNCH ")]
    for i, row in enumerate(rows):
        if len(marks) == len(rows):
            row |= marks[i]
            row["flop_per_second"] = row["flop"] / row["seconds"]
        print(
            f"  {row['kernel'][:60]}: {1e6 * row['seconds']:.1f} us, {row['dram_bytes'] / 1e6:.1f} MB, {row['top_stall']}",
            flush=True,
        )
    return {"launches": rows}


def launch(name):
    """Launch each way to compute a chain once."""
    chain = Chain(*CHAINS[name])
    x = torch.randn(BATCH, chain.layers[0].c_in, chain.layers[0].height, chain.layers[0].width, device="cuda").bfloat16()
    flop = BATCH * sum(map(predictions.flop, chain.layers))
    for way, steps in ways(chain, "bf16", torch.bfloat16, Limits.of(x.device), BATCH).items():
        step = steps[-1]
        stored, packed, biases, out = tensors(chain, x, torch.bfloat16, "bf16", step)
        run_step(step, chain.network, stored, packed, biases, out, SLOPE, "bf16")
        torch.cuda.synchronize()
        print("LAUNCH " + json.dumps({"way": way, "config": step.config, "flop": flop}), flush=True)


if __name__ == "__main__":
    launch(sys.argv[1])
