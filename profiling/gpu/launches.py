"""One launch of every kernel that can compute a chain of layers, for a profiler: python -m profiling.gpu.launches CHAIN

Prints ``LAUNCH {json}`` per launch, in the order in which they run.
"""

import json
import sys

import torch

from advkd.engines.gpu_search import Limits
from advkd.ops.student_steps import run_step

from ..cases.conv_block import CHAINS, SLOPE, Chain, tensors, ways
from ..limits import predictions

BATCH = 8


def main(name):
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
    main(sys.argv[1])
