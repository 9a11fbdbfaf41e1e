"""Helpers for tests of the ops of a critic's update: devices, backends that run on them, threads, a digest of results."""

import contextlib
import hashlib

import pytest
import torch

from advkd.ops import registry
from advkd.ops.conv_bias_act_mask import OP as CONV_BIAS_ACT_MASK
from advkd.ops.interpolate import OP as INTERPOLATE
from advkd.ops.mask_mul import OP as MASK_MUL
from advkd.ops.penalty_reduce import OP as PENALTY_REDUCE

from .training_cases import BF16, CASES, F16, Case, prepare

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAUNCH = {op.name: op.launchers for op in (CONV_BIAS_ACT_MASK, MASK_MUL, PENALTY_REDUCE, INTERPOLATE)}
# Sizes that the CPU's kernels cut into pieces: several pieces and several tasks, whole planes and parts of one; a group of
# four vectors and a remainder; a pixel of more channels than a piece has elements.
PIECES = [
    Case((2, 5, 8, 16)),
    Case((3, 2, 150, 131), planted=True),
    Case((2, 3, 128, 128), BF16, in_place=True),
    Case((3, 24, 48, 33), F16, last=True),
    Case((2, 2500, 1, 3)),
    Case((2, 2500, 1, 3), last=True),
    Case((300, 7)),
    Case((40, 1, 16, 16)),
]


def cases(name):
    # interpolate has no in-place form.
    changed = [case for case in PIECES if name != "interpolate" or not case.in_place]
    return [*CASES[name], *changed]


def fast_backends(name, device):
    return [b for b in ("cpu", "triton", "cuda") if registry.gap(name, b, torch.device(device)) is None]


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def results(name, case):
    """Results of the CPU's launcher on a case."""
    assert "cpu" in fast_backends(name, "cpu")
    _, arguments, outputs = prepare(name, case)
    LAUNCH[name]["cpu"](*arguments)
    # A NaN's bits depend on the processor.
    return [torch.nan_to_num(t.float(), nan=7.0) for t in outputs.values()]


def digest():
    """SHA-256 of the CPU kernels' results on every case."""
    sha = hashlib.sha256()
    for name in LAUNCH:
        for case in cases(name):
            for tensor in results(name, case):
                sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()
