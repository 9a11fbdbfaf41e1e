"""The CUDA kernels of the training ops.

They are compiled for the host and started as the CUDA host side plans them, bit for bit against the reference wherever
that is defined; on a GPU where there is one.
"""

import dataclasses
import itertools

import pytest
import torch

from advkd.ops import cuda
from advkd.ops.mask_mul import mask_mul_reference
from advkd.ops.norm_act import moments_reference, norm_act_reference
from advkd.ops.penalty_reduce import penalty_reduce_reference
from advkd.runtime.extension import extension_gap

from ..ops.training_cases import BF16, CASES, F32, Case, check
from .cuda_on_host import only_last_block
from .host_plans import LAUNCHERS, change_plans, plan, start

ALL = [
    pytest.param(name, case, id=f"{name}-{case}", marks=[pytest.mark.core] if case is cases[0] else [])
    for name, cases in CASES.items()
    for case in cases
]


@pytest.mark.parametrize("name, case", ALL)
def test_kernels_on_the_host(name, case, cupy_on_host):
    check(name, case, cuda.launcher(name))


# Cases for threads' second and later turns, which otherwise only large tensors need: planes of one row and of several, steps
# of whole samples and of a part of a row; channels last with lanes that do not fill a block.
TURNS = [
    Case((40, 2, 2, 2)),
    Case((3, 3, 21, 60)),
    Case((2, 1, 5, 333), BF16),
    *(Case((3, channels, 9, 24), dtype, last=True) for channels, dtype in ((17, F32), (24, BF16))),
]
PIECES = ("norm_act_moments", "norm_act", "norm_act_sums", "norm_act_backward")


def share(planned, parts):
    """Make so many blocks of norm_act share the positions of a channel."""
    p = {name: planned[name] for name in ("rows", "columns", "height", "tiles", "channels")}
    lines, column_step = divmod(parts * p["rows"], p["columns"])
    steps = dict(sample_step=lines // p["height"], row_step=lines % p["height"], column_step=column_step)
    planned.update(parts=parts, **steps)
    planned.launches[0][1] = p["tiles"] * parts
    planned.scratch = min(planned.scratch, 1) * parts * 3 * p["channels"]


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("case", TURNS, ids=str)
def test_threads_take_turns(case, blocks, cupy_on_host, monkeypatch):
    change_plans(monkeypatch, lambda planned: share(planned, blocks))
    for name, upsample in itertools.product(PIECES, (False, True)):
        check(name, dataclasses.replace(case, upsample=upsample), cuda.launcher(name))
    # In place, an element that two threads process gives a wrong result.
    check("norm_act_backward", dataclasses.replace(case, masked=True, in_place=True), cuda.launcher("norm_act_backward"))


@pytest.mark.parametrize("name", PIECES)
def test_more_channels_than_threads(name, cupy_on_host):
    check(name, Case((2, 301, 2, 3), last=True, upsample=True), cuda.launcher(name))


@pytest.mark.parametrize("name", ["norm_act_moments", "norm_act_sums"])
def test_more_parts_than_threads(name, cupy_on_host):
    """130 channels leave room for one pixel in a block: 256 threads join 300 partial results."""
    check(name, Case((3, 130, 10, 10), last=True), cuda.launcher(name))


def test_samples_of_several_blocks(cupy_on_host):
    """A penalty's blocks take turns too, and a sample's bits are those of the sample alone."""
    g = torch.randn(2, 3, 150, 151, generator=torch.Generator().manual_seed(0)) / 256
    penalties, v, alone = torch.empty(2), torch.empty_like(g), torch.empty(1)
    assert plan("penalty_reduce", g, 1.0, 10.0, 0, v, penalties)["parts"] == 5
    LAUNCHERS.penalty_reduce(g, 1.0, 10.0, 0, v, penalties)
    LAUNCHERS.penalty_reduce(g[1:], 1.0, 5.0, 0, torch.empty_like(g[1:]), alone)
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
        LAUNCHERS.norm_act_moments(dense, ours)
        moments_reference(dense.double(), expected)
        assert ((ours - expected) / expected).abs().max() <= 2e-6


def test_elements_count_beyond_32_bits(cupy_on_host):
    """The last block of a sample of 2^33 + 2048 elements."""
    before = 2**33
    x, mask, out = torch.randn(1, 2048), torch.randint(0, 256, (1, 256), dtype=torch.uint8), torch.full((1, 2048), torch.nan)
    whole = torch.empty(1, before + 2048, device="meta")
    bits = torch.empty(1, (before + 2048) // 8, dtype=torch.uint8, device="meta")
    planned = plan("mask_mul", whole, bits, 0.2, whole)
    assert planned.blocks == (before + 2048) // 2048 and planned["vectors"]
    ends = {"x": x.data_ptr() - 4 * before, "out": out.data_ptr() - 4 * before, "mask": mask.data_ptr() - before // 8}
    planned.update(**ends)
    with only_last_block("mask_mul", planned.blocks, "f32"):
        start(planned)
    expected = torch.empty_like(x)
    mask_mul_reference(x, mask, 0.2, expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("last", [False, True])
def test_up_sampling_counts_beyond_32_bits(last, cupy_on_host):
    """The last block, 2^10 elements, of one channel of 2^16 x 2^16 or of 8 of 2^14 x 2^15; its results are 2^34 elements on."""
    channels, h, w = (8, 2**14, 2**15) if last else (1, 2**16, 2**16)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(1, channels, 1, 2**10 // channels, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=layout
    )
    pitch = 2 * w * channels
    out = torch.full((pitch + 2**11,), torch.nan)
    weights, statistics = torch.randn(2, channels), torch.rand(2, channels) + 0.5

    def large(scale):
        return torch.empty(1, channels, scale * h, scale * w, device="meta", memory_format=layout)

    two = torch.empty(2, channels, device="meta")
    planned = plan("norm_act", large(1), two, two, 1e-5, 0.2, True, large(2))
    assert planned["group"] == 4 and planned["width"] == w
    # Blocks that take one turn.
    positions = planned["samples"] * planned["height"] * planned["columns"]
    share(planned, -(-positions // planned["rows"]))
    planned.update(weights=weights.data_ptr(), statistics=statistics.data_ptr())
    planned.update(x=x.data_ptr() + 4 * 2**10 - 4 * 2**32, out=out.data_ptr() + 4 * len(out) - 4 * 2**34)
    with only_last_block("norm_act", planned.blocks, "f32"):
        start(planned)
    expected = torch.empty(1, channels, 2, 2 * x.shape[-1])
    norm_act_reference(x, weights, statistics, 1e-5, 0.2, True, expected)
    rows = expected.permute(2, 0, 3, 1).reshape(2, -1)
    assert torch.equal(torch.stack((out[: 2**11], out[pitch:])), rows) and out[2**11 : pitch].isnan().all()


def norm_plan(shape, dtype, last, upsample, reduces):
    """The plan of a piece of norm_act that reduces or not, for x of any size."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
    two = torch.empty(2, shape[1], device="meta")
    scale = 2 if upsample else 1
    wide = torch.empty((*shape[:2], scale * shape[2], scale * shape[3]), dtype=dtype, device="meta", memory_format=layout)
    if reduces:
        return plan("norm_act_sums", wide, x, two, two, 1e-5, 0.2, upsample, None, two)
    return plan("norm_act", x, two, two, 1e-5, 0.2, upsample, wide)


PLANS = [
    # Shape, dtype, channels last, up-sampled, reduces: planes and rows of planes; a few and many channels last, some of which
    # fill no block of threads, and more of them than it has.
    ((1, 1, 1, 1), F32, False, False, False),
    ((64, 128, 256, 256), F32, False, False, True),
    ((64, 128, 256, 256), BF16, False, True, False),
    ((64, 3, 255, 255), F32, False, True, False),
    ((2**20, 1, 2, 2**16), F32, False, False, True),
    ((64, 128, 256, 256), BF16, True, False, True),
    ((64, 3, 256, 256), F32, True, True, False),
    ((5, 300, 1, 7), F32, True, False, True),
    ((1, 2**15, 2**14, 2**15), BF16, True, False, False),
]
BLOCKS = 1024
"""``kBlocks`` of ``csrc/cuda/host/norm_act.cpp``."""


def test_plans_cover_every_position():
    for shape, dtype, last, upsample, reduces in PLANS:
        p = norm_plan(shape, dtype, last, upsample, reduces)
        samples, height, columns, channels, group = (p[name] for name in "samples height columns channels group".split())
        assert samples * height * columns * group * (1 if last else channels) == torch.Size(shape).numel() // (
            channels // group if last else 1
        )
        step = (p["sample_step"] * height + p["row_step"]) * columns + p["column_step"]
        assert step == p["parts"] * p["rows"] and p["lanes"] * p["rows"] <= p.launches[0][2]
        assert p["tiles"] * p["lanes"] * (group if last else 1) >= channels
        assert p.blocks == p["tiles"] * p["parts"] and p.scratch == (p["parts"] * 3 * channels if reduces else 0)
        # Partial results stay few, and so do a thread's turns where there are none.
        assert p.blocks <= max(2 * BLOCKS, p["tiles"]) if reduces else samples * height * columns <= 8 * step


def test_vectors_only_where_they_are_aligned():
    def group(x, gradient=None, weights=None, out=None, upsample=False):
        scale = 2 if upsample else 1
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        two = torch.zeros(2, x.shape[1])
        sides = (*x.shape[:2], scale * x.shape[2], scale * x.shape[3])
        wide = torch.empty(sides, dtype=x.dtype, memory_format=layout) if gradient is None else gradient
        weights = two if weights is None else weights
        return plan("norm_act_sums", wide, x, weights, two, 1e-5, 0.2, upsample, out, two)["group"]

    def vectors(x, out=None):
        mask = torch.zeros(len(x), -(-x[0].numel() // 8), dtype=torch.uint8)
        return plan("mask_mul", x, mask, 0.2, torch.empty_like(x) if out is None else out)["vectors"]

    x, odd = torch.zeros(2, 8, 4, 4), torch.zeros(2 * 8 * 16 + 1)[1:].view(2, 8, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    assert vectors(x) and vectors(last) and not vectors(x, odd) and not vectors(odd)
    assert vectors(torch.zeros(2, 12)) and not vectors(torch.zeros(2, 12).half()) and not vectors(torch.zeros(2, 9))
    assert group(x) == group(last) == group(x, upsample=True) == 4
    assert group(x.half()) == group(last.half()) == 8
    # A row of four is half a vector; so are twelve channels and a half.
    assert group(x.half(), upsample=True) == group(last[:, :4].contiguous(memory_format=torch.channels_last).half()) == 1
    assert group(odd) == group(x, out=odd) == group(x, gradient=odd) == group(x, weights=torch.zeros(17)[1:].view(2, 8)) == 1


def test_too_many_rows_are_refused():
    with pytest.raises(RuntimeError, match="norm_act: x must have at most 2\\^29"):
        norm_plan((2**29 + 1, 2, 1, 2), F32, False, False, False)


X = torch.zeros(2, 8, 4, 4)
TWO, MASK = torch.zeros(2, 8), torch.zeros(2, 16, dtype=torch.uint8)
REFUSED = {
    "mask_mul: x must be contiguous or channels_last": ("mask_mul", X.transpose(0, 1), MASK, 0.2, X),
    "mask_mul: x must have samples": ("mask_mul", torch.zeros(()), MASK, 0.2, X),
    "mask_mul: x must be float32, bfloat16 or float16, got another dtype": ("mask_mul", X.double(), MASK, 0.2, X),
    "mask_mul: mask must be torch.uint8 with 32": ("mask_mul", X, MASK[:1], 0.2, X),
    "mask_mul: out must be torch.float32": ("mask_mul", X, MASK, 0.2, X.half()),
    "mask_mul: out must have 256 elements": ("mask_mul", X, MASK, 0.2, X[:1]),
    "mask_mul: out must be contiguous": ("mask_mul", X, MASK, 0.2, X.contiguous(memory_format=torch.channels_last)),
    "mask_mul: out must be on the device": ("mask_mul", X, MASK, 0.2, X.to("meta")),
    "mask_mul: mask must be on x's device": ("mask_mul", X, MASK.to("meta"), 0.2, X),
    "conv_bias_act_mask: bias must be torch.float32 with 8": ("conv_bias_act_mask", X, TWO, 0.2, X, MASK),
    "penalty_reduce: mode must be 0, 1 or 2": ("penalty_reduce", X, 1.0, 1.0, 3, X, torch.zeros(2)),
    "penalty_reduce: penalties must be torch.float32 with 2": ("penalty_reduce", X, 1.0, 1.0, 0, X, torch.zeros(3)),
    "interpolate: one of a and indices": ("interpolate", X, X, None, None, 0, 0, None, X),
    "interpolate: steps must be torch.int64 with 2": (
        "interpolate",
        X,
        X,
        torch.zeros(2),
        None,
        0,
        0,
        torch.zeros(3).long(),
        X,
    ),
    "norm_act_moments: x must have shape": ("norm_act_moments", X[0], TWO),
    "norm_act_moments: statistics must be torch.float32 with 16": ("norm_act_moments", X, TWO[0]),
    "norm_act: out must have 1024 elements": ("norm_act", X, TWO, TWO, 1e-5, 0.2, True, X),
    "norm_act_backward: dx must have": ("norm_act_backward", X, X, TWO, TWO, TWO, 1e-5, 0.2, False, False, X[:1]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(RuntimeError, match=message):
        plan(*REFUSED[message])


def test_more_blocks_than_a_launch_has_are_refused():
    x = torch.empty(2**39, 1, device="meta")
    with pytest.raises(RuntimeError, match="mask_mul: x is too large for one launch"):
        plan("mask_mul", x, torch.empty(2**39, 1, dtype=torch.uint8, device="meta"), 0.2, x)


def test_an_empty_x_is_no_launch(cupy_on_host):
    x, mask = torch.empty(0, 3), torch.empty(0, 1, dtype=torch.uint8)
    assert plan("mask_mul", x, mask, 0.2, x).launches == []
    cuda.launcher("mask_mul")(x, mask, 0.2, x)


@pytest.mark.parametrize("name", ["conv_bias_act_mask", "mask_mul", "penalty_reduce", "interpolate", "norm_act"])
def test_sources_are_whole_and_self_contained(name):
    text = cuda.source(name)
    assert "#include" not in text and "#pragma once" not in text
    assert all(text.count(part) == 1 for part in ("struct bf16 {", "constexpr int kThreads", "ADVKD_DTYPES(EACH)"))


def launcher(name, compiled_by):
    """A launcher on a GPU, of the extension or of CuPy."""
    if compiled_by == "cupy":
        if reason := cuda.gap():
            pytest.skip(reason)
        return cuda.launcher(name)
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
