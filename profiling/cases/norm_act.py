"""Batch norm, LeakyReLU and up-sampling of a training step, forward and backward: 64 channels, 128x128, batch 16.

python -m profiling.cases.norm_act [--device cuda] [--only bfloat16] [--out FOLDER]

A call gives y and the gradients by x, gamma and beta, in contiguous and in channels_last layout; x's gradient is compared with
float64. The bytes of a case are those that the passes read and write: x for the moments, x and y for the values, the gradient
and x for the sums, and again with dx (with up-sampling in float32 the sums of four gradients are written and read instead).
Freed memory is kept by the process (advkd.runtime.devices), for all contestants. On a GPU every contestant is there twice, as a
call and as a captured CUDA graph of both passes; TensorFloat-32 is off.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

from advkd.ops import norm_act
from advkd.runtime.devices import keep_freed_memory

from ..harness import Case, Contestant, copying, main, set_tf32, with_captured

SHAPE = (16, 64, 128, 128)
EPS, SLOPE = 1e-5, 0.2
PARITY_TESTS = ["tests/ops/test_norm_act.py"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def problem(device, dtype, upsample):
    """x, gamma, beta and y's gradient. No value before LeakyReLU is so small that its sign depends on rounding."""
    drawn = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    x = torch.randn(SHAPE, **drawn)
    gamma = torch.rand(SHAPE[1], **drawn) + 0.5
    beta = torch.randn(SHAPE[1], **drawn) / 4
    margin = 1e-3 if dtype == torch.float32 else 0.05
    before = before_activation(x, gamma, beta)
    x = torch.where(before.abs() < margin, x + 2 * margin * before.sign(), x).to(dtype)
    assert before_activation(x.float(), gamma, beta).abs().min() > margin / 4
    sides = [side * (2 if upsample else 1) for side in SHAPE[2:]]
    gradient = torch.randn(*SHAPE[:2], *sides, **drawn).to(dtype)
    return x, gamma, beta, gradient


def before_activation(x, gamma, beta):
    return F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)


def torch_ops(x, gamma, beta, mean, variance, upsample):
    """torch's three ops; LeakyReLU in place, as batch norm's backward pass does not need its result."""
    y = F.leaky_relu(F.batch_norm(x, mean, variance, gamma, beta, True, eps=EPS), SLOPE, inplace=True)
    return F.interpolate(y, scale_factor=2, mode="nearest") if upsample else y


def ours(x, gamma, beta, mean, variance, upsample):
    return norm_act(x, gamma, beta, mean, variance, slope=SLOPE, upsample=upsample, eps=EPS)


def forward_and_backward(function, tensors, layout, upsample):
    """A call that gives x's gradient."""
    x, gamma, beta, gradient = tensors
    x, gradient = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, gradient))
    leaves = [t.detach().requires_grad_() for t in (x, gamma, beta)]
    statistics = torch.zeros_like(gamma), torch.ones_like(gamma)
    return lambda: torch.autograd.grad(function(*leaves, *statistics, upsample), leaves, gradient)[0]


def passes_bytes(x, upsample):
    """Bytes that ours reads and writes, pass by pass."""
    y = 4 if upsample else 1
    keeps = upsample and x.dtype == torch.float32
    sums, backward = (y + 1 + 1, 1 + 1 + 1) if keeps else (y + 1, y + 1 + 1)
    return (1 + 1 + y + sums + backward) * x.numel() * x.element_size()


def needed_bytes(x, upsample):
    """Bytes that the work needs: x read and y written, then y's gradient and x read and x's gradient written."""
    y = 4 if upsample else 1
    return (1 + y + y + 1 + 1) * x.numel() * x.element_size()


def case_name(upsample, dtype):
    return f"{'with' if upsample else 'without'} up-sampling, {str(dtype)[6:]}"


def case(upsample, dtype, device):
    """The case of one dtype, with or without up-sampling."""
    set_tf32(False)
    # Past a number of compilations torch.compile runs a function as it is, without failing.
    torch._dynamo.reset()
    tensors = problem(device, dtype, upsample)
    functions = {
        "advkd, norm_act": (ours, "ours"),
        "torch, LeakyReLU in place": (torch_ops, "baseline"),
        "torch.compile of the three": (torch.compile(torch_ops, dynamic=False), "peer"),
    }
    contestants = [
        Contestant(f"{name}, {layout}", functools.partial(forward_and_backward, function, tensors, layout, upsample), kind)
        for layout in LAYOUTS
        for name, (function, kind) in functions.items()
    ]
    contestants.append(copying("a copy that moves as many bytes as ours", passes_bytes(tensors[0], upsample), device))
    contestants = with_captured(contestants, device, grad=True)

    def oracle():
        wide = [t.double() for t in tensors]
        return forward_and_backward(torch_ops, wide, "contiguous", upsample)()

    # Gradients are below 16. torch sums 262144 of them in float32 in channels_last; in bfloat16 it rounds at every step.
    tolerance = 5e-4 if dtype == torch.float32 else 16 * 4 * torch.finfo(dtype).eps
    notes = {"keeps_freed_memory": True, "tf32": False}
    figures = {"moved_bytes": needed_bytes(tensors[0], upsample), "repeats": 15, "device": device}
    return Case(case_name(upsample, dtype), oracle, tolerance, contestants, SHAPE[0], notes=notes, **figures)


def cases(device):
    keep_freed_memory()
    kinds = itertools.product((True, False), (torch.float32, torch.bfloat16))
    return {case_name(*kind): functools.partial(case, *kind, device) for kind in kinds}


if __name__ == "__main__":
    main(name="bench_norm_act", cases=cases, parity_tests=PARITY_TESTS)
