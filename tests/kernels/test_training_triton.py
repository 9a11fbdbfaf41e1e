"""The Triton kernels of the training ops: in Triton's interpreter, compiled ahead of time for three architectures, on a GPU."""

import importlib
import json
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch

from advkd.ops.conv_bias_act_mask import bias_act_mask
from advkd.ops.interpolate import interpolate
from advkd.ops.mask_mul import mask_mul
from advkd.ops.norm_act import norm_act
from advkd.ops.penalty_reduce import MODES, penalty_reduce

from ..conftest import ROOT, process_environment
from ..ops.training_cases import CASES, check, prepare

ARCHITECTURES = [80, 90, 100]


def launcher(name):
    module = "norm_act" if name.startswith("norm_act") else name
    return getattr(importlib.import_module(f"advkd.kernels.{module}"), name)


LAYOUTS = (torch.contiguous_format, torch.channels_last)
LOOPS = ("penalty_reduce", "norm_act_moments", "norm_act_sums")


def public_functions(backend, device, layouts=LAYOUTS):
    """Results of the public functions through ``backend``, for all layouts and options in turn."""
    generator = torch.Generator().manual_seed(0)
    for layout in layouts:

        def tensor():
            return torch.randn(4, 3, 6, 10, generator=generator).to(device).contiguous(memory_format=layout)

        x, y, channels = tensor(), tensor(), torch.linspace(-1, 2, 3, device=device)
        with torch.no_grad():
            activated, mask = bias_act_mask(x, channels, 0.2, backend=backend)
            yield from (activated, mask, mask_mul(y, mask, 0.2, backend=backend))
            for mode in MODES:
                yield from penalty_reduce(x, target=13.0, mode=mode, backend=backend)
            yield interpolate(x, y, torch.linspace(0, 1, 4, device=device), backend=backend)
            yield interpolate(x, y, (2**63 + 5, range(2**40, 2**40 + 4), 9), merge=True, backend=backend)
        for upsample in (False, True):
            leaves = [t.clone().requires_grad_() for t in (x, channels, channels + 0.5)]
            z = norm_act(*leaves, None, None, upsample=upsample, backend=backend)
            yield z
            gradient = torch.randn(z.shape, generator=generator).to(device)
            yield from torch.autograd.grad(z, leaves, gradient)


def check_public_functions(device, layouts=LAYOUTS):
    found = list(public_functions("triton", device, layouts))
    for ours, theirs in zip(found, public_functions("reference", device, layouts), strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def check_loops(device="cpu", names=LOOPS, **options):
    """Run the first stages with so few programs that each takes several tiles, as otherwise only on large tensors."""
    from advkd.kernels import norm_act, penalty_reduce

    with mock.patch.object(norm_act, "PROGRAMS", 2), mock.patch.object(penalty_reduce, "PARTS", 2):
        for name in names:
            for case in CASES[name]:
                if torch.Size(case.shape).numel() > 4096:
                    check(name, case, launcher(name), device, **options)


def interpret():
    # The interpreter truncates where a GPU rounds to bfloat16: one unit is allowed there.
    for name, cases in CASES.items():
        for case in cases:
            check(name, case, launcher(name), truncates=True)
    check_loops(truncates=True)
    check_public_functions("cpu")


def compile_ahead(architecture):
    """Compile the kernels' main variants and print, for each, the figures that the test checks."""
    import triton
    import triton.language as tl
    from advkd.kernels import conv_bias_act_mask, mask_mul, norm_act, penalty_reduce
    from advkd.kernels import interpolate as points
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    elements = ("x", "p", "g", "bias", "real", "fake", "gradient", "kept", "dx", "out")
    tables = ("a", "partial", "penalties", "statistics", "weights", "sums", "means")
    types = dict.fromkeys(tables, "*fp32") | dict.fromkeys(("slope", "eps", "target", "share"), "fp32")
    types |= {"indices": "*i64", "steps": "*i64", "mask": "*u8", "key": "i64"}

    def variant(kernel, element, loads=0, stores=0, aligned=True, **constants):
        """Compile one variant: pointers and sizes are aligned as usual tensors are; a tensor it lacks is a constant None."""
        fusion = constants.pop("enable_fp_fusion", True)
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        known = types | dict.fromkeys(elements, f"*{element}") | dict.fromkeys(constants, "constexpr")
        signature = {name: known.get(name, "i32") for name in kernel.arg_names}
        free = ("constexpr", "fp32")
        sizes = [i for i, (n, t) in enumerate(signature.items()) if t not in free and n not in kernel.do_not_specialize]
        source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in sizes if aligned})
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": fusion})
        ptx = compiled.asm["ptx"]
        wide = [len(re.findall(way + r"\.global\S*\.v4\.b32", ptx)) for way in ("ld", "st")]
        promised = wide[0] >= loads and wide[1] >= stores
        print("KERNEL " + json.dumps([kernel.__name__, element, wide, promised, compiled.metadata.shared]))

    def elementwise(kernel, *arguments, **constants):
        variant(kernel, *arguments, BLOCK=2048, enable_fp_fusion=False, **{"INDEX": tl.int32, **constants})

    def normalized(kernel, *arguments, shape=(64, 128, 32, 32), last=False, upsample=False, moments=False, **constants):
        """Compile a variant of a norm's kernel; lengths of 1 are compile-time constants."""
        x = torch.empty(shape, device="meta")
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        tile = norm_act.MOMENTS_TILE if moments else norm_act.REPEATED_TILE if upsample else norm_act.TILE
        lengths, _, options = norm_act.tiling(x, upsample, tile)
        constants |= {name: 1 for name, length in lengths.items() if length == 1 and name not in kernel.do_not_specialize}
        variant(kernel, *arguments, UPSAMPLE=upsample, **options, **constants)

    # A tile of 2048 elements on 128 threads is four vectors of 16 bytes in float32, two in bfloat16, for every tensor.
    elementwise(mask_mul.mask_mul_kernel, "fp32", 4, 4)
    elementwise(mask_mul.mask_mul_kernel, "bf16", 2, 2)
    conv = conv_bias_act_mask.bias_act_mask_kernel
    elementwise(conv, "fp32", 4, 4, FASTEST=False, ROWS=True)
    elementwise(conv, "bf16", 2, 2, FASTEST=True, ROWS=True)
    elementwise(conv, "fp16", 2, 2, FASTEST=True, ROWS=False)
    elementwise(conv, "bf16", 2, 2, FASTEST=False, ROWS=False, bias=None, INDEX=tl.int64)
    elementwise(points.interpolate_kernel, "fp32", 8, 12, MERGE=True, a=None)
    elementwise(points.interpolate_kernel, "bf16", 4, 2, MERGE=False, indices=None, steps=None)
    elementwise(penalty_reduce.squares_kernel, "fp32", 4, 0, out=None)
    elementwise(penalty_reduce.squares_kernel, "bf16", 2, 2)
    elementwise(penalty_reduce.penalty_kernel, "fp32", 4, 4, MODE=1, PARTS=128)
    elementwise(penalty_reduce.penalty_kernel, "bf16", 2, 2, MODE=0, PARTS=512, INDEX=tl.int64)
    # Twice as large where a tile is reduced at once; half as large, with two, four and eight times as much beside it,
    # where a pixel stands for four.
    normalized(norm_act.moments_kernel, "fp32", 8, 0, moments=True)
    normalized(norm_act.moments_kernel, "bf16", 4, 0, moments=True, last=True)
    normalized(norm_act.norm_act_kernel, "fp32", 4, 4)
    normalized(norm_act.norm_act_kernel, "bf16", 2, 2, last=True)
    normalized(norm_act.norm_act_kernel, "fp32", 2, 8, upsample=True)
    normalized(norm_act.norm_act_kernel, "bf16", 1, 4, upsample=True)
    normalized(norm_act.norm_act_kernel, "bf16", 1, 4, last=True, upsample=True)
    normalized(norm_act.sums_kernel, "bf16", 4, 0, kept=None)
    normalized(norm_act.sums_kernel, "fp32", 8, 0, last=True, kept=None)
    normalized(norm_act.sums_kernel, "fp32", 10, 2, upsample=True)
    normalized(norm_act.sums_kernel, "fp32", 10, 2, last=True, upsample=True)
    normalized(norm_act.sums_kernel, "bf16", 5, 0, upsample=True, kept=None)
    normalized(norm_act.sums_kernel, "bf16", 5, 0, last=True, upsample=True, kept=None)
    normalized(norm_act.backward_kernel, "fp32", 8, 4, MASKED=True)
    normalized(norm_act.backward_kernel, "bf16", 4, 2, last=True, MASKED=False)
    normalized(norm_act.backward_kernel, "bf16", 5, 1, upsample=True, MASKED=False)
    normalized(norm_act.backward_kernel, "bf16", 5, 1, last=True, upsample=True, MASKED=False)
    variant(norm_act.moments_end_kernel, "fp32", PARTS=norm_act.PARTS)
    variant(norm_act.sums_end_kernel, "fp32", PARTS=norm_act.PARTS)
    # Nothing aligned, and sizes that are compile-time constants because they are one.
    one = {"aligned": False, "count": 1}
    elementwise(conv, "fp32", FASTEST=False, ROWS=False, divisor=1, **one)
    elementwise(points.interpolate_kernel, "fp16", MERGE=True, a=None, steps=None, **one)
    elementwise(penalty_reduce.penalty_kernel, "fp32", MODE=2, PARTS=1, **one)
    one = {"aligned": False, "shape": (64, 1, 1, 1)}
    normalized(norm_act.moments_kernel, "fp32", moments=True, **one)
    normalized(norm_act.norm_act_kernel, "fp32", upsample=True, **one)
    normalized(norm_act.sums_kernel, "fp16", upsample=True, **one)
    normalized(norm_act.backward_kernel, "fp16", upsample=True, last=True, aligned=False, shape=(64, 3, 32, 1), MASKED=False)


def output_of(call, environment):
    """Output of a function of this file in a process of its own: Triton's compiler and its interpreter exclude each other."""
    code = f"from tests.kernels import test_training_triton as t; t.{call}; print('END')"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([sys.executable, "-c", code], env=process_environment(environment), cwd=ROOT, **streams).stdout


def test_interpreter_parity():
    output = output_of("interpret()", {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"})
    assert output.strip() == "END", output


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_ahead(architecture, tmp_path):
    """Nothing spills, four blocks of 128 threads fit on a multiprocessor, aligned tensors are read and written in vectors."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DUMP_PTXAS_LOG": "1"}
    output = output_of(f"compile_ahead({architecture})", environment)
    assert output.rstrip().endswith("END"), output
    kernels = [json.loads(line) for line in re.findall(r"^KERNEL (.*)$", output, re.M)]
    assert len(kernels) > 30
    for name, element, wide, promised, shared in kernels:
        assert promised and shared <= 48 * 1024, (name, element, wide, shared)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", output)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    assert len(spills) == 2 * len(registers) == 2 * len(kernels)
    assert sum(spills) == 0 and max(registers) <= 128, list(zip(kernels, registers))


EVERY = [pytest.param(name, case, id=f"{name}-{case}") for name, cases in CASES.items() for case in cases]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "case"), EVERY)
def test_on_a_gpu(name, case):
    pytest.importorskip("triton")
    check(name, case, launcher(name), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOOPS)
def test_loops_on_a_gpu(name):
    pytest.importorskip("triton")
    check_loops("cuda", [name])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_public_functions_on_a_gpu(layout):
    pytest.importorskip("triton")
    check_public_functions("cuda", [layout])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_repeats_in_a_captured_graph_on_a_gpu(name):
    """Bit for bit: nothing depends on the order in which blocks run, and nothing waits for the host."""
    pytest.importorskip("triton")
    plain = [case for case in CASES[name] if not case.in_place and not case.planted]
    case = max(plain, key=lambda case: torch.Size(case.shape).numel())
    _, arguments, results = prepare(name, case, "cuda")
    launcher(name)(*arguments)
    expected = {key: result.clone() for key, result in results.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launcher(name)(*arguments)
    for _ in range(3):
        for result in results.values():
            result.fill_(0)
        graph.replay()
        assert all(torch.equal(result, expected[key]) for key, result in results.items())


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_beyond_32_bits_on_a_gpu(last, forty_gigabytes):
    """More than 2^31 elements in one sample, and two samples that begin more than 2^31 elements apart."""
    pytest.importorskip("triton")
    layout = torch.channels_last if last else torch.contiguous_format
    shape, options = (2, 3, 2**15, 2**15 - 1), {"dtype": torch.float16, "device": "cuda"}
    x = torch.empty(shape, memory_format=layout, **options).fill_(-1)
    end = x[1, 2, -1, -2:]
    end.copy_(torch.tensor([3.0, -5.0]))
    mask = torch.empty(2, x[0].numel() // 8, dtype=torch.uint8, device="cuda")
    launcher("conv_bias_act_mask")(x, torch.zeros(3, **options), 0.25, x, mask)
    assert end.tolist() == [3.0, -1.25] and int((x == -0.25).sum()) == x.numel() - 2
    # The positive one is the last but one, or but three, of its sample.
    assert int(mask.count_nonzero()) == 1 and int(mask[1, -1]) == (1 << 4 if last else 1 << 6)
    launcher("mask_mul")(x, mask, 0.5, x)
    assert end.tolist() == [3.0, -0.625] and int((x == -0.125).sum()) == x.numel() - 2
    statistics, weights = torch.empty(2, 3, device="cuda"), torch.ones(2, 3, device="cuda")
    launcher("norm_act_moments")(x, statistics)
    torch.testing.assert_close(statistics[0].cpu(), torch.full((3,), -0.125))
    statistics[0], statistics[1] = -0.125, 1.0
    launcher("norm_act")(x, weights, statistics, 0.0, 0.25, False, x)
    assert end.tolist() == [4.125, 0.5] and int((x == 1).sum()) == x.numel() - 2
