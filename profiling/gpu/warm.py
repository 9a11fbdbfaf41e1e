"""The part that compiles the Triton convolutions that a plan may measure.

Triton compiles one kernel at a time, and a tuned plan takes hundreds; processes side by side fill its cache on disk first.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from advkd.engines.gpu_search import Limits
from advkd.models.shape import PRESETS, convolutions
from advkd.ops.gpu_storage import input_channels, padded
from advkd.ops.student_steps import run_step

from ..cases.conv_block import SLOPE, Chain, tensors, ways
from ..cases.student import GPU_DTYPES
from ..harness import set_tf32
from ..limits.predictions import PRODUCTS
from .bench import QUICK
from .part import NEEDS_DEVICE


def warm(part):
    """Triton's kernels compiled by many processes at a time, so that no plan has to wait for them one by one."""
    if part.rehearse:
        return {NEEDS_DEVICE: "warm"}
    kernels = list(wanted(Limits.of(torch.device("cuda"))).values())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(part.processes(12), context, set_tf32, (False,)) as pool:
        try:
            # The first error counts; one that ends its process is BrokenProcessPool.
            list(pool.map(compile_kernel, kernels, timeout=max(part.left() - 1, 0.1)))
        except TimeoutError:
            part.result["unfinished"] = "not everything is compiled yet"
            for process in multiprocessing.active_children():
                process.kill()


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


def compile_kernel(kernel):
    """Launch, and so compile, one of :func:`wanted`."""
    preset, i, dtype, product, step = kernel
    chain = Chain(preset, i, 1)
    layer = chain.layers[0]
    x = torch.randn(1, layer.c_in, layer.height, layer.width, device="cuda").to(dtype)
    stored, packed, biases, out = tensors(chain, x, dtype, product, step)
    run_step(step, chain.network, stored, packed, biases, out, SLOPE, product)
