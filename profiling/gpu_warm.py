"""Compiles a share of the Triton convolutions that a plan may measure: python -m profiling.gpu_warm 0/12

Triton compiles one kernel at a time, and a tuned plan wants hundreds; processes side by side fill its cache on disk first.
"""

import sys

import torch

from advkd.gpu_plan import Limits
from advkd.models.fused_student import convolutions
from advkd.models.student import PRESETS
from advkd.ops.gpu_layers import input_channels, padded
from advkd.ops.student_gpu import run_step

from .bench_conv_block import SLOPE, Chain, tensors, ways
from .gpu_predictions import BATCHES
from .gpu_timing import set_tf32

NETWORKS = [*((preset, torch.bfloat16, "bf16") for preset in PRESETS), ("paper-256", torch.float32, "f32")]


def wanted(limits):
    """``{constants: (preset, layer, dtype, product, step)}``: one of each kernel that Triton would compile."""
    found = {}
    for preset, dtype, product in NETWORKS:
        for i, layer in enumerate(convolutions(PRESETS[preset])):
            chain = Chain(preset, i, 1)
            for batch in BATCHES[preset]:
                for step in ways(chain, product, dtype, limits, batch).get("advkd, Triton", []):
                    shape = (input_channels(layer), padded(layer.c_out), layer.upsample, layer.activation)
                    found.setdefault((dtype, *shape, step.config), (preset, i, dtype, product, step))
    return found


def main(share):
    index, count = map(int, share.split("/"))
    set_tf32(False)
    for preset, i, dtype, product, step in list(wanted(Limits.of(torch.device("cuda"))).values())[index::count]:
        chain = Chain(preset, i, 1)
        layer = chain.layers[0]
        x = torch.randn(1, layer.c_in, layer.height, layer.width, device="cuda").to(dtype)
        stored, packed, biases, out = tensors(chain, x, dtype, product, step)
        run_step(step, chain.network, stored, packed, biases, out, SLOPE, product)


if __name__ == "__main__":
    main(sys.argv[1])
