"""Compiles a share of the Triton convolutions that a plan may measure: python -m profiling.gpu.warm 0/12

Triton compiles one kernel at a time, and a tuned plan wants hundreds; processes side by side fill its cache on disk first.
"""

import sys

import torch

from advkd.engines.gpu_search import Limits
from advkd.models.fused_student import convolutions
from advkd.models.student import PRESETS
from advkd.ops.gpu_storage import input_channels, padded
from advkd.ops.student_steps import run_step

from ..cases.conv_block import SLOPE, Chain, tensors, ways
from ..cases.student import GPU_DTYPES
from ..gpu_timing import set_tf32
from ..limits.predictions import PRODUCTS
from .parts import QUICK


def networks():
    """``(preset, batch, dtype)`` of the student's cases in a short run, the most telling first."""
    cases = (case.split(", ")[:3] for case in QUICK["bench_student"])
    return list(dict.fromkeys((preset, int(batch.removeprefix("batch ")), dtype) for preset, batch, dtype in cases))


def wanted(limits):
    """``{constants: (preset, layer, dtype, product, step)}``: one of each kernel that Triton would compile."""
    found = {}
    for preset, batch, name in networks():
        dtype, product = GPU_DTYPES[name], PRODUCTS[name]
        for i, layer in enumerate(convolutions(PRESETS[preset])):
            shape = (dtype, input_channels(layer), padded(layer.c_out), layer.upsample, layer.activation)
            for step in triton_steps(Chain(preset, i, 1), product, dtype, limits, batch):
                found.setdefault((*shape, step.kernel, step.config), (preset, i, dtype, product, step))
    return found


def triton_steps(chain, product, dtype, limits, batch):
    """Every launch of a chain that a plan may measure and Triton compiles."""
    found = ways(chain, product, dtype, limits, batch).values()
    return [step for steps in found for step in steps if step.kernel.startswith("triton")]


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
