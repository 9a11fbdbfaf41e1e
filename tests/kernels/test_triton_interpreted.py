"""Every Triton kernel in Triton's interpreter, a case each, in one process; each kernel's own file has the other cases."""

import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch

from advkd.ops import philox_normal, philox_words

from ..conftest import ROOT, process_environment
from ..ops import training_cases
from . import test_conv_block_triton as convolutions
from . import test_sampler_step_gpu_sources as steps
from . import test_training_triton as training

TRAINING = [
    (name, next(case for case in cases if case.planted and len(case.shape) == 4 and case.shape[1] > 1))
    for name, cases in training_cases.CASES.items()
]
# Up-sampling with channels last has a function of its own.
LAST = next(case for case in training_cases.CASES["norm_act"] if case.upsample and case.last and case.planted)
TRAINING += [("norm_act", LAST)]
STEPS = [next(case for case in steps.CASES if case.noise == "draw" and case.pool in pools) for pools in ((0,), (2, 3))]
STEPS += [next(case for case in steps.CASES if case.extended and case.history)]
CONVOLUTIONS = [cases[3] for cases in (convolutions.LAYERS, convolutions.DESCRIPTORS, convolutions.IMAGES)]


def check_philox():
    indices = torch.tensor([0, 2**33 + 1])
    for seed in (0, 1, 2**64 - 1):
        for count in (1, 13, 1024, 1030):
            options = dict(stream="order", step=5)
            a, b = (philox_words(seed, indices, count, **options, backend=name) for name in ("reference", "triton"))
            assert torch.equal(a, b), count
            a, b = (philox_normal(seed, indices, (count,), **options, backend=name) for name in ("reference", "triton"))
            assert (a - b).abs().max() <= 2e-6, count


def interpret():
    """Check the cases, and that they have called every function of the kernels."""
    import advkd.kernels
    from advkd.kernels.sampler_step import sampler_step
    from triton.runtime.interpreter import InterpretedFunction

    check_philox()
    for name, case in TRAINING:
        training_cases.check(name, case, training.launcher(name), truncates=True)
    for case in STEPS:
        steps.check(case, sampler_step, truncates=True)
    for case in CONVOLUTIONS:
        convolutions.require(case, "cpu")
    modules = [
        importlib.import_module(f"advkd.kernels.{module.name}") for module in pkgutil.iter_modules(advkd.kernels.__path__)
    ]
    functions = {value for module in modules for value in vars(module).values() if isinstance(value, InterpretedFunction)}
    left = [function.__name__ for function in functions if function.fn not in InterpretedFunction.rewritten_fn]
    assert functions and not left, left


@pytest.mark.core
def test_every_kernel():
    """The interpreter truncates where a GPU rounds to bfloat16: one unit is allowed there."""
    code = "from tests.kernels.test_triton_interpreted import interpret; interpret(); print('parity')"
    environment = process_environment({"TRITON_INTERPRET": "1"})
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.stdout.strip() == "parity", result.stderr
