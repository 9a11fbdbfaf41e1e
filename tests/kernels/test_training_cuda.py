"""The CUDA kernels of the training ops.

They are compiled for the host and started by the CuPy launchers' own marshalling, bit for bit against the reference wherever
that is defined; on a GPU where there is one.
"""

import dataclasses
import itertools
import subprocess

import pytest
import torch

from advkd.errors import InputError
from advkd.ops import cupy_kernels, cupy_modules, cupy_training
from advkd.ops.mask_mul import mask_mul_reference
from advkd.ops.norm_act import moments_reference, norm_act_reference
from advkd.ops.penalty_reduce import penalty_reduce_reference
from advkd.runtime.extension import extension_gap

from ..conftest import ROOT
from ..ops.training_cases import BF16, CASES, F32, Case, check
from .cuda_on_host import only_last_block

ALL = [pytest.param(name, case, id=f"{name}-{case}") for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("name, case", ALL)
def test_kernels_on_the_host(name, case, cupy_on_host):
    check(name, case, getattr(cupy_kernels, name))


# Cases for threads' second and later turns, which otherwise only large tensors need: planes of one row and of several, steps
# of whole samples and of a part of a row; channels last with lanes that do not fill a block.
TURNS = [
    Case((40, 2, 2, 2)),
    Case((3, 3, 21, 60)),
    Case((2, 1, 5, 333), BF16),
    *(Case((3, channels, 9, 24), dtype, last=True) for channels, dtype in ((17, F32), (24, BF16))),
]
PIECES = ("norm_act_moments", "norm_act", "norm_act_sums", "norm_act_backward")


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("case", TURNS, ids=str)
def test_threads_take_turns(case, blocks, cupy_on_host, monkeypatch):
    monkeypatch.setattr(cupy_training, "BLOCKS", blocks)
    for name, upsample in itertools.product(PIECES, (False, True)):
        check(name, dataclasses.replace(case, upsample=upsample), getattr(cupy_kernels, name))
    # In place, an element that two threads process gives a wrong result.
    check("norm_act_backward", dataclasses.replace(case, masked=True, in_place=True), cupy_kernels.norm_act_backward)


@pytest.mark.parametrize("name", PIECES)
def test_more_channels_than_threads(name, cupy_on_host):
    check(name, Case((2, 301, 2, 3), last=True, upsample=True), getattr(cupy_kernels, name))


@pytest.mark.parametrize("name", ["norm_act_moments", "norm_act_sums"])
def test_more_parts_than_threads(name, cupy_on_host):
    """130 channels leave room for one pixel in a block: 256 threads join 300 partial results."""
    check(name, Case((3, 130, 10, 10), last=True), getattr(cupy_kernels, name))


def test_samples_of_several_blocks(cupy_on_host):
    """A penalty's blocks take turns too, and a sample's bits are those of the sample alone."""
    g = torch.randn(2, 3, 150, 151, generator=torch.Generator().manual_seed(0)) / 256
    assert cupy_training.penalty_parts(g[0].numel()) == 5
    penalties, v, alone = torch.empty(2), torch.empty_like(g), torch.empty(1)
    cupy_kernels.penalty_reduce(g, 1.0, 10.0, 0, v, penalties)
    cupy_kernels.penalty_reduce(g[1:], 1.0, 5.0, 0, torch.empty_like(g[1:]), alone)
    assert torch.equal(alone, penalties[1:])
    theirs, expected = torch.empty_like(g).double(), torch.empty(2).double()
    penalty_reduce_reference(g.double(), 1.0, 10.0, 0, theirs, expected)
    # Norms of about 1.02: half of float32's seven digits remain in the excess over 1.
    assert ((penalties - expected) / expected).abs().max() <= 1e-4
    assert (v - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_moments_far_from_zero(cupy_on_host):
    """A mean of 2^14 standard deviations in one of two halves, so that blocks' means differ and joining them matters."""
    x = torch.randn(2, 8, 40, 64, generator=torch.Generator().manual_seed(0))
    x[0] += 2.0**14
    for last in (False, True):
        dense = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        ours, expected = torch.empty(2, 8), torch.empty(2, 8, dtype=torch.float64)
        cupy_kernels.norm_act_moments(dense, ours)
        moments_reference(dense.double(), expected)
        assert ((ours - expected) / expected).abs().max() <= 2e-6


def test_elements_count_beyond_32_bits(cupy_on_host, monkeypatch):
    """The last block of a sample of 2^33 + 2048 elements."""
    before = 2**33
    x, mask, out = torch.randn(1, 2048), torch.randint(0, 256, (1, 256), dtype=torch.uint8), torch.full((1, 2048), torch.nan)
    small = cupy_training.struct

    def large(dtype, fields):
        moved = {"x": fields["x"] - 4 * before, "out": fields["out"] - 4 * before, "mask": fields["mask"] - before // 8}
        return small(dtype, {**fields, **moved, "length": before + 2048})

    blocks = (before + 2048) // 2048
    monkeypatch.setattr(cupy_training, "struct", large)
    monkeypatch.setattr(cupy_training, "_blocks", lambda x: blocks)
    with only_last_block("mask_mul", blocks):
        cupy_kernels.mask_mul(x, mask, 0.2, out)
    expected = torch.empty_like(x)
    mask_mul_reference(x, mask, 0.2, expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("last", [False, True])
def test_up_sampling_counts_beyond_32_bits(last, cupy_on_host, monkeypatch):
    """The last block, 2^10 elements, of one channel of 2^16 x 2^16 or of 8 of 2^14 x 2^15; its results are 2^34 elements on."""
    channels, h, w = (8, 2**14, 2**15) if last else (1, 2**16, 2**16)
    x = torch.randn(1, channels, 1, 2**10 // channels, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    pitch = 2 * w * channels
    out = torch.full((pitch + 2**11,), torch.nan)
    sizes = dict(samples=h if last else 1, height=1 if last else h, columns=w if last else w // 4, channels=channels)
    monkeypatch.setattr(cupy_training, "MOST_TURNS", 1)
    plan = cupy_training.norm_plan(*sizes.values(), 4, last, False)
    small = cupy_training.norm_fields

    def large(x, **options):
        ends = {"x": x.data_ptr() + 4 * 2**10 - 4 * 2**32, "out": out.data_ptr() + 4 * len(out) - 4 * 2**34}
        return {**small(x, **options), **sizes, **plan, **ends, "width": w}

    monkeypatch.setattr(cupy_training, "norm_fields", large)
    weights, statistics = torch.randn(2, channels), torch.rand(2, channels) + 0.5
    with only_last_block("norm_act", plan["tiles"] * plan["parts"]):
        cupy_kernels.norm_act(x, weights, statistics, 1e-5, 0.2, True, out)
    expected = torch.empty(1, channels, 2, 2 * x.shape[-1])
    norm_act_reference(x, weights, statistics, 1e-5, 0.2, True, expected)
    rows = expected.permute(2, 0, 3, 1).reshape(2, -1)
    assert torch.equal(torch.stack((out[: 2**11], out[pitch:])), rows) and out[2**11 : pitch].isnan().all()


STRUCTS = {
    "MaskMulParameters": cupy_training.MASK_MUL,
    "ConvBiasActMaskParameters": cupy_training.CONV_BIAS_ACT_MASK,
    "InterpolateParameters": cupy_training.INTERPOLATE,
    "PenaltyParameters": cupy_training.PENALTY,
    "NormParameters": cupy_training.NORM,
}
PLANS = [
    # samples, height, columns, channels, group, last, reduces: planes and rows of planes; a few and many channels last, some of
    # which fill no block of threads, and more of them than it has.
    (1, 1, 1, 1, 1, 0, 0),
    (64, 1, 16384, 128, 4, 0, 1),
    (64, 256, 32, 128, 8, 0, 0),
    (64, 255, 255, 3, 1, 0, 0),
    (2**20, 1, 2**15, 1, 4, 0, 1),
    (64 * 256, 1, 256, 128, 8, 1, 1),
    (64 * 256, 1, 256, 3, 1, 1, 0),
    (5, 1, 7, 300, 1, 1, 1),
    (2**14, 1, 2**15, 2**12, 8, 1, 0),
]
LAYOUT = r"""
#include <cstddef>
#include <cstdio>
INCLUDES
using namespace advkd;
int main() {
  SIZES
  long long length;
  NormParameters p{};
  int last, reduces;
  std::scanf("%lld", &length);
  for (; length; std::scanf("%lld", &length)) std::printf("%d\n", penalty_parts(length));
  while (std::scanf("%d %d %d %d %d %d %d", &p.samples, &p.height, &p.columns, &p.channels, &p.group, &last, &reduces) == 7) {
    norm_plan(p, last, reduces);
    const int plan[] = {p.tiles, p.parts, p.lanes, p.rows, p.sample_step, p.row_step, p.column_step};
    for (int n : plan) std::printf("%d\n", n);
  }
}
"""


def test_python_and_cpp_launchers_agree(tmp_path):
    """The parameters' layouts and the plans, which both launchers have."""
    headers = ("conv_bias_act_mask", "interpolate", "mask_mul", "norm_act", "penalty_reduce")
    places = [f"sizeof({name})" for name in STRUCTS]
    places += [f"offsetof({name}, {field})" for name, dtype in STRUCTS.items() for field in dtype.names]
    code = LAYOUT.replace("INCLUDES", "\n".join(f'#include "cuda/{name}.h"' for name in headers))
    code = code.replace("SIZES", "".join(f'std::printf("%zu\\n", {place});' for place in places))
    (tmp_path / "layout.cpp").write_text(code)
    command = ["g++", "-std=c++20", f"-I{ROOT / 'csrc'}", "layout.cpp", "-o", "layout"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    lengths = [1, 2**14, 2**14 + 1, 3 * 256**2, 2**33]
    text = " ".join(str(int(n)) for numbers in (lengths, [0], *PLANS) for n in numbers)
    printed = subprocess.run([tmp_path / "layout"], input=text, capture_output=True, text=True, check=True).stdout
    expected = [dtype.itemsize for dtype in STRUCTS.values()]
    expected += [dtype.fields[field][1] for dtype in STRUCTS.values() for field in dtype.names]
    expected += [cupy_training.penalty_parts(length) for length in lengths]
    expected += [n for plan in PLANS for n in cupy_training.norm_plan(*plan).values()]
    assert list(map(int, printed.split())) == expected


def test_plans_cover_every_position():
    for samples, height, columns, channels, group, last, reduces in PLANS:
        plan = cupy_training.norm_plan(samples, height, columns, channels, group, last, reduces)
        step = (plan["sample_step"] * height + plan["row_step"]) * columns + plan["column_step"]
        assert step == plan["parts"] * plan["rows"] and plan["lanes"] * plan["rows"] <= cupy_modules.THREADS
        assert plan["tiles"] * plan["lanes"] * (group if last else 1) >= channels
        blocks = plan["tiles"] * plan["parts"]
        # Partial results stay few, and so do a thread's turns where there are none.
        assert blocks <= max(2 * cupy_training.BLOCKS, plan["tiles"]) if reduces else samples * height * columns <= 8 * step


def test_vectors_only_where_they_are_aligned():
    def group(x, **options):
        return cupy_training.norm_fields(x, **options)["group"]

    def vectors(*tensors):
        return cupy_training._samples(*tensors)["vectors"]

    x, odd = torch.zeros(2, 8, 4, 4), torch.zeros(2 * 8 * 16 + 1)[1:].view(2, 8, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    assert vectors(x) and vectors(last, x) and not vectors(x, odd) and not vectors(odd)
    assert vectors(torch.zeros(2, 12)) and not vectors(torch.zeros(2, 12).half()) and not vectors(torch.zeros(2, 9))
    assert group(x) == group(last) == group(x, upsample=True) == 4
    assert group(x.half()) == group(last.half()) == 8
    # A row of four is half a vector; so are twelve channels and a half.
    assert group(x.half(), upsample=True) == group(last[:, :4].contiguous(memory_format=torch.channels_last).half()) == 1
    assert group(odd) == group(x, out=odd) == group(x, gradient=odd) == group(x, weights=odd) == 1


def test_too_many_rows_are_refused(cupy_on_host):
    x = torch.empty(2**29 + 1, 2, 1, 1, device="meta").expand(-1, -1, -1, 2)
    with pytest.raises(InputError, match="2\\^29"):
        cupy_training.norm_fields(x)


@pytest.mark.parametrize("name", ["conv_bias_act_mask", "mask_mul", "penalty_reduce", "interpolate", "norm_act"])
def test_sources_are_whole_and_self_contained(name):
    text = cupy_modules.source(name)
    assert "#include" not in text and "#pragma once" not in text
    assert all(text.count(part) == 1 for part in ("struct bf16 {", "constexpr int kThreads", "ADVKD_DTYPES(EACH)"))


def launcher(name, compiled_by):
    """A launcher on a GPU, of the extension or of CuPy."""
    if compiled_by == "cupy":
        if reason := cupy_kernels.gap():
            pytest.skip(reason)
        return getattr(cupy_kernels, name)
    if reason := extension_gap("cuda"):
        pytest.skip(reason)
    return getattr(torch.ops.advkd_cuda, name)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])
@pytest.mark.parametrize("name, case", ALL)
def test_on_a_gpu(name, case, compiled_by):
    check(name, case, launcher(name, compiled_by), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])
@pytest.mark.parametrize("last", [False, True])
def test_reductions_repeat_and_are_captured(last, compiled_by):
    """Equal bits on every call, and from a CUDA graph's replay on other values."""
    x = torch.randn(16, 64, 64, 64, device="cuda").contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
    statistics, penalties, v = torch.empty(2, 64, device="cuda"), torch.empty(16, device="cuda"), torch.empty_like(x)

    def reduce():
        launcher("norm_act_moments", compiled_by)(x, statistics)
        launcher("penalty_reduce", compiled_by)(x, 1.0, 10.0, 0, v, penalties)
        return [tensor.clone() for tensor in (statistics, penalties, v)]

    first = reduce()
    assert all(torch.equal(a, b) for a, b in zip(first, reduce()))
    graph, kept = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        results = reduce()
    x.zero_()
    graph.replay()
    assert all(tensor.abs().max() == 0 for tensor in (results[0], results[2]))
    x.copy_(kept)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, results))
