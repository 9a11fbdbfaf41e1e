"""The GPU sources of the sampler step without a GPU.

The Triton kernels run in the interpreter; the CUDA kernels are compiled for the host, and started as the CUDA host side plans
them.
"""

import contextlib
import dataclasses
import subprocess
import sys
import types

import pytest
import torch

from advkd.ops import cuda
from advkd.ops.philox import normal_reference, rounds_reference, words_reference
from advkd.ops.sampler_step import sampler_step_reference
from advkd.runtime.extension import extension_gap

from ..conftest import ROOT, process_environment
from .cuda_on_host import only_last_block
from .host_plans import LAUNCHERS, plan, start

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple
    x: torch.dtype = F32
    m: torch.dtype = F32
    last: bool = False
    pool: int = 0
    noise: str | None = None
    steps: tuple | None = None
    rows: bool = False
    history: bool = False
    x0: bool = False
    flags: bool = False
    extended: bool = False
    in_place: str | None = None
    stored_in: str | None = None
    offset: int = 0
    scale: float = 1.0
    clip: float = 0.7
    planted: bool = False

    def __str__(self):
        changed = [f for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default]
        values = [f"{f.name}={getattr(self, f.name)}".replace("torch.", "") for f in changed]
        return ",".join(["x".join(map(str, self.shape)), *values])


ALL = {"rows": True, "history": True, "x0": True, "flags": True}
CASES = [
    # Odd everywhere: no vector fits, and a channel's 35 elements split the Philox blocks.
    Case((2, 3, 5, 7), noise="tensor", **ALL),
    Case((2, 3, 5, 7), noise="draw", planted=True, **ALL),
    Case((2, 3, 5, 7), last=True, noise="draw", planted=True, **ALL),
    # The smallest: most of a block or program is beyond the end. An infinite clip does not clip.
    Case((1, 1, 4, 4), clip=float("inf"), x0=True),
    Case((1, 1, 1, 1), noise="draw", pool=1),
    Case((5,), noise="draw", rows=True),
    # Whole vectors; the flag of the planted sample alone.
    Case((2, 3, 8, 8), planted=True, **ALL),
    Case((2, 3, 8, 8), noise="draw", steps=(5,), in_place="x", **ALL),
    Case((2, 3, 8, 8), noise="draw", steps=(3, 2**24 - 1), in_place="m", history=True),
    Case((2, 3, 8, 8), noise="tensor", in_place="noise"),
    Case((2, 3, 8, 8), last=True, noise="tensor", in_place="previous_x0", history=True),
    # More than one block or tile per sample, the last one in part.
    Case((3, 4, 33, 16), last=True, noise="draw", rows=True, history=True),
    Case((2, 1500), noise="draw"),
    # A view whose base no vector fits.
    Case((2, 3, 8, 8), noise="draw", offset=1, x0=True),
    Case((2, 3, 8, 8), F16, F16, noise="tensor", offset=3),
    # Every pair of dtypes: vectors of eight beside vectors of four; sizes that fit four but not eight.
    *(Case((2, 3, 4, 4), x, m, noise="draw", **ALL) for x in (F32, BF16, F16) for m in (F32, BF16, F16)),
    Case((2, 1, 2, 6), BF16, F32, history=True, in_place="x"),
    # Finite inputs, a next state that is finite in float32 and infinite as stored.
    Case((2, 3, 8, 8), F16, F16, history=True, rows=True, flags=True, scale=1.5e4),
    # Pooling: one pixel, powers of two, others, a whole row; columns that are not whole vectors; several strips per block.
    Case((2, 1, 3, 4), pool=1, noise="draw", **ALL),
    Case((2, 3, 8, 8), pool=2, planted=True, noise="tensor", **ALL),
    Case((2, 2, 6, 10), pool=2, noise="draw", in_place="x"),
    Case((2, 2, 9, 27), pool=3, noise="draw", steps=(7,), x0=True),
    Case((2, 3, 6, 12), pool=3, last=True, noise="draw", rows=True),
    Case((2, 3, 8, 16), pool=4, noise="draw", history=True, in_place="previous_x0"),
    Case((2, 3, 8, 16), pool=4, last=True, noise="draw", flags=True, in_place="x"),
    Case((1, 5, 16, 16), BF16, F32, pool=8, last=True, noise="tensor"),
    Case((2, 1, 8, 8), F16, BF16, pool=8, noise="draw", offset=5),
    # Wider than one tile of a block.
    Case((1, 1, 4, 1100), pool=4, noise="draw"),
    Case((1, 1, 5, 1300), pool=5),
    # Extended steps: single elements, drawn and not, and in two layouts; vectors, with what is stored in place of a history.
    Case((2, 3, 5, 7), noise="tensor", extended=True, **ALL),
    Case((2, 3, 5, 7), last=True, noise="draw", planted=True, extended=True, **ALL),
    Case((2, 3, 8, 8), noise="draw", extended=True, history=True, rows=True, stored_in="second", in_place="x"),
    Case((2, 3, 8, 8), BF16, F16, noise="tensor", extended=True, history=True, stored_in="previous_x0", planted=True),
    Case((2, 3, 8, 8), F16, F32, last=True, noise="tensor", extended=True, history=True, stored_in="noise", offset=1),
    # Without histories.
    Case((2, 1500), extended=True, x0=True, flags=True),
    Case((2, 3, 8, 16), pool=4, noise="draw", extended=True, history=True, stored_in="second"),
    Case((2, 3, 6, 12), BF16, BF16, pool=3, last=True, noise="tensor", extended=True, **ALL),
]
# Slow in the interpreter, and special in CUDA alone.
CUDA_CASES = [
    # Two vectors a thread: one warp a sample, nine over two blocks; the last element, in a second vector, is planted.
    *(Case((3, length), noise=noise, planted=True, **ALL) for length in (256, 9 * 256) for noise in ("tensor", "draw")),
    *(Case((2, 3, 16, 16), noise="tensor", history=True, in_place=name) for name in ("x", "m", "noise", "previous_x0")),
    *(Case((2, 512), x, m, noise="tensor", planted=True, **ALL) for x in (BF16, F16) for m in (F32, BF16, F16)),
    Case((2, 512), F32, BF16, noise="tensor", **ALL),
    Case((40, 256), flags=True, planted=True),
    # Just around: one vector a thread with a last warp in part, and single elements.
    *(Case((3, length), noise="tensor", planted=True, **ALL) for length in (252, 255, 257, 260, 4 * 255)),
    *(Case((3, length), BF16, F32, noise="tensor", planted=True, **ALL) for length in (504, 511, 513, 520)),
    *(Case((3, length), noise="draw", planted=True, **ALL) for length in (124, 127, 128, 129, 132)),
    # Two vectors' worth that begins between two vectors.
    Case((2, 512), noise="tensor", offset=2, **ALL),
    # Channels that are neighbours, in more warps than one and in more blocks than one.
    Case((2, 7, 5, 5), last=True, noise="draw", planted=True, **ALL),
    Case((2, 300, 3, 4), BF16, F16, last=True, noise="draw", planted=True, **ALL),
    # One output wider than a block, its last group of columns in part.
    Case((1, 2, 1030, 1030), pool=1030, last=True, noise="draw"),
    # Tiles of three outputs: the second begins where no vector does.
    Case((1, 1, 301, 1204), pool=301, noise="tensor"),
    # More channels than a block has threads.
    Case((1, 300, 2, 4), pool=2, last=True, noise="draw"),
]
# Extended steps are kernels of their own.
CUDA_CASES += [
    dataclasses.replace(case, extended=True) for case in (*CASES, *CUDA_CASES) if case.x0 and case.history and not case.extended
]


class Guarded:
    """A tensor inside a larger one of NaN: `untouched` is true while the rest is still NaN."""

    def __init__(self, shape, dtype, last, offset, device, values=None):
        size = torch.Size(shape).numel()
        self.buffer = torch.full((size + offset + 64,), float("nan"), dtype=dtype, device=device)
        dense = torch.empty(shape, device="meta").contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )
        self.tensor = self.buffer.as_strided(shape, dense.stride(), offset)
        self.size, self.offset = size, offset
        if values is not None:
            self.tensor.copy_(values)

    def untouched(self):
        return bool(self.buffer[: self.offset].isnan().all() and self.buffer[self.offset + self.size :].isnan().all())


def run(case, launch, device="cpu"):
    """The outputs of ``launch`` on the case's inputs by name; the outputs start as NaN, with NaN around them."""
    generator = torch.Generator().manual_seed(0)
    n = case.shape[0]

    def tensor(dtype, wanted=True):
        values = torch.randn(case.shape, generator=generator) * case.scale
        return Guarded(case.shape, dtype, case.last, case.offset, device, values) if wanted else None

    named = {
        "x": tensor(case.x),
        "m": tensor(case.m),
        "previous_x0": tensor(case.x, case.history),
        "noise": tensor(case.x, case.noise == "tensor"),
        "second": tensor(case.x, case.history and case.extended),
    }
    if case.planted:
        named["x"].tensor[(n - 1, *[0] * (len(case.shape) - 1))] = float("inf")
        named["m"].tensor[n - 1, ..., -1] = float("nan")
    table = torch.randn(n if case.rows else 1, 12 if case.extended else 8, generator=generator)
    table[:, 2] = case.clip
    small = (*case.shape[:2], *(side // case.pool for side in case.shape[2:])) if case.pool else None
    outputs = {
        "out": named[case.in_place] if case.in_place else Guarded(case.shape, case.x, case.last, case.offset, device),
        "x0": Guarded(case.shape, case.x, case.last, case.offset, device) if case.x0 else named.get(case.stored_in),
        "pooled": Guarded(small, case.x, case.last, case.offset, device) if small else None,
    }
    flags = torch.zeros(n, dtype=torch.int32, device=device) if case.flags else None
    # Indices beyond 32 bits, and a seed whose upper half counts.
    indices = torch.arange(n, device=device) * 2**33 + 5 if case.noise == "draw" else None
    steps = None if case.steps is None else torch.tensor(case.steps, device=device)
    x, m, previous_x0, noise, second = (None if g is None else g.tensor for g in named.values())
    out, x0, pooled = (None if g is None else g.tensor for g in outputs.values())
    drawn = (indices, -(2**40) + 9, 7, steps)
    launch(x, m, table.to(device), previous_x0, second, noise, *drawn, case.pool, out, x0, pooled, flags)
    assert all(g is None or g.untouched() for g in (*named.values(), *outputs.values()))
    results = {"out": out, "x0": x0, "pooled": pooled, "flags": flags}
    return {name: tensor.cpu() for name, tensor in results.items() if tensor is not None}


def check(case, launch, device="cpu", truncates=False):
    """Compare ``launch`` with the reference, bit for bit where only rounding in the stated order happens."""
    expected = run(case, sampler_step_reference)
    for name, ours in run(case, launch, device).items():
        if name == "flags":
            assert torch.equal(ours, expected[name]), str(case)
            continue
        theirs, ours = expected[name].double(), ours.double()
        # Drawn normals are within 2e-6 (times c_z, at most 3), sums of a pool's elements in another order within a few units.
        slack = 6e-6 * (case.noise == "draw" and name != "x0") + 1e-6 * case.scale * (name == "pooled")
        unit = torch.finfo(case.x).eps if slack or (truncates and case.x == BF16) else 0.0
        finite = theirs.isfinite()
        assert torch.equal(ours[~finite].nan_to_num(7), theirs[~finite].nan_to_num(7)), (str(case), name)
        error = (ours[finite] - theirs[finite]).abs()
        assert (error <= slack + unit * theirs[finite].abs()).all(), (str(case), name, float(error.max()))


def interpret():
    from advkd.kernels.sampler_step import sampler_step

    for case in CASES:
        check(case, sampler_step, truncates=True)


def test_triton_interpreter_parity():
    # The interpreter truncates where a GPU rounds to bfloat16: one unit is allowed there.
    code = "from tests.kernels.test_sampler_step_gpu_sources import interpret; interpret(); print('parity')"
    environment = process_environment({"TRITON_INTERPRET": "1"})
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.stdout.strip() == "parity", result.stderr


CORE = (CASES[1], next(case for case in CASES if case.pool == 3), next(case for case in CASES if case.extended))
HOSTED = [pytest.param(case, id=str(case), marks=pytest.mark.core if case in CORE else ()) for case in CASES + CUDA_CASES]


@pytest.mark.parametrize("case", HOSTED)
def test_cuda_kernels_on_the_host(case, cupy_on_host):
    check(case, LAUNCHERS.sampler_step)


def launcher(compiled_by):
    """The kernels on a GPU, or a skip."""
    if compiled_by == "triton":
        return pytest.importorskip("advkd.kernels.sampler_step").sampler_step
    if reason := cuda.gap() if compiled_by == "cupy" else extension_gap("cuda"):
        pytest.skip(reason)
    return LAUNCHERS.sampler_step if compiled_by == "cupy" else torch.ops.advkd_cuda.sampler_step


@pytest.mark.gpu
@pytest.mark.parametrize("compiled_by", ["triton", "nvcc", "cupy"])
@pytest.mark.parametrize("case", CASES + CUDA_CASES, ids=str)
def test_on_a_gpu(case, compiled_by):
    check(case, launcher(compiled_by), "cuda")


def check_rounding(dtype, launch, device="cpu"):
    """Check every upper half of a float32, with lower halves below, at and above the middle; ties to even, NaN stays NaN."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    bits = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16).unsqueeze(1) | lower
    m = bits.reshape(1, -1).view(F32)
    x = torch.zeros_like(m, dtype=dtype, device=device)
    # In vectors, and one by one.
    for count in (m.numel(), m.numel() - 1):
        out = torch.full((1, count), 7, dtype=dtype, device=device)
        table = torch.tensor([[0, 0, 1, 0, 0, 1.0, 0, 0]], device=device)
        arguments = (
            x[:, :count].contiguous(),
            m[:, :count].contiguous().to(device),
            table,
            None,
            None,
            None,
            None,
            0,
            0,
            None,
            0,
        )
        launch(*arguments, out, None, None, None)
        finite = m[:, :count].isfinite()
        assert torch.equal(out.cpu()[finite], m[:, :count][finite].to(dtype))
        # A coefficient of zero turns an infinity into NaN.
        assert out.cpu()[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_cuda_kernels_round_as_torch_does(dtype, cupy_on_host):
    check_rounding(dtype, LAUNCHERS.sampler_step)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounding_on_a_gpu(dtype):
    check_rounding(dtype, launcher("nvcc"), "cuda")


def normals(index, seed, step, first_block, blocks):
    """Normals of blocks of a sample, whatever its size, in float64."""
    block = first_block + torch.arange(blocks)
    counter = [torch.full_like(block, word) for word in (index & 0xFFFFFFFF, index >> 32, 1 << 24 | step)]
    words = torch.stack(rounds_reference((block, *counter), (seed & 0xFFFFFFFF, seed >> 32)), dim=1).reshape(2 * blocks, 2)
    u1, angle = ((words[:, 0] >> 8) + 1).double() * 2.0**-24, (words[:, 1] >> 8).double() * 2.0**-24 * 6.2831854820251465
    radius = torch.sqrt(-2 * torch.log(u1))
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1).flatten()


def run_last_block(sizes, before, tensors, pool=0, last=False, seed=0, step=0):
    """Run the last block of a plan for tensors of ``sizes``, which end with those of ``tensors``.

    ``before``: by name, bytes of the whole tensor before them.
    """
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(sizes, device="meta", memory_format=layout)
    indices = torch.empty(sizes[0], dtype=torch.int64, device="meta") if "indices" in tensors else None
    small = torch.empty((*sizes[:-2], sizes[-2] // pool, sizes[-1] // pool), device="meta") if pool else None
    table = torch.empty(1, 8, device="meta")
    planned = plan("sampler_step", x, x, table, None, None, None, indices, seed, step, None, pool, x, None, small, None)
    for name, tensor in tensors.items():
        planned.update(**{name: tensor.data_ptr() - before.get(name, 0)})
    with only_last_block("sampler_step", planned.blocks, "f32, f32, plain"):
        start(planned)
    return planned


DRAWN = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 1.0]])
PLAIN = torch.tensor([[0.5, 0.25, 0.7, 1.5, -0.5, 0.125, 0, 0]])


def ends(before, x, m, table, out, **others):
    """Tensors by name, and the bytes before those that are the end of a whole one."""
    return dict.fromkeys(("x", "m", "out"), 4 * before), dict(x=x, m=m, table=table, out=out, **others)


@pytest.mark.parametrize("pool", [0, 2])
def test_cuda_kernels_count_beyond_32_bits(pool, cupy_on_host):
    """The end of a sample of 2^33 + 16 elements with drawn normals: whole blocks lie before the last one's elements."""
    before = 2**33
    x = torch.zeros(1, 1, 2, 8)
    out, pooled = torch.full_like(x, float("nan")), torch.full((1, 1, 1, 4), float("nan"))
    index, seed = 2**33 + 5, 2**40 + 9
    places, tensors = ends(before, x, x, DRAWN, out, indices=torch.tensor([index]))
    if pool:
        places, tensors = {**places, "pooled": before}, {**tensors, "pooled": pooled}
    run_last_block((1, 1, before // 8 + 2, 8), places, tensors, pool, seed=seed, step=7)
    expected = normals(index, seed, 7, before // 4, 4).reshape(x.shape)
    assert (out - expected).abs().max() <= 2e-6
    assert not pool or (pooled - torch.nn.functional.avg_pool2d(expected, 2)).abs().max() <= 2e-6


@pytest.mark.parametrize("count", [256, 252, 255])
def test_cuda_kernels_count_beyond_32_bits_in_memory_order(count, cupy_on_host):
    """The end of a sample of more than 2^33 elements: two vectors a thread, one, and single elements."""
    before = 2**33
    x, m = torch.randn(2, 1, count, generator=torch.Generator().manual_seed(0))
    out, expected = torch.full_like(x, float("nan")), torch.empty_like(x)
    planned = run_last_block((1, before + count), *ends(before, x, m, PLAIN, out))
    assert planned["vectors_each"] == {256: 2, 252: 1, 255: 0}[count]
    sampler_step_reference(x, m, PLAIN, None, None, None, None, 0, 0, None, 0, expected, None, None, None)
    assert torch.equal(out, expected)


def test_cuda_kernels_count_beyond_32_bits_between_channels(cupy_on_host):
    """The end of a sample of 15 * 2^30 elements whose three channels alternate in memory: 85 groups of four of each channel."""
    length, index, seed = 5 * 2**30, 5, 9
    x = torch.zeros(1, 3, 4, 88).contiguous(memory_format=torch.channels_last)
    before, out = length - 4 * 88, torch.full_like(x, float("nan"))
    places, tensors = ends(3 * before, x, x, DRAWN, out, indices=torch.tensor([index]))
    run_last_block((1, 3, length // 4, 4), places, tensors, last=True, seed=seed, step=7)
    for channel in range(3):
        expected = normals(index, seed, 7, (channel + 1) * length // 4 - 85, 85)
        assert (out[0, channel].flatten()[-4 * 85 :] - expected).abs().max() <= 2e-6


def test_cuda_kernels_take_almost_2_to_the_32_samples(cupy_on_host):
    """The last block of the largest launch: three of 2^32 - 13 samples of 16 elements, one warp each."""
    before = 2**32 - 16
    x = torch.zeros(3, 16)
    out = torch.full_like(x, float("nan"))
    indices = torch.tensor([3, 2**33, 7])
    places, tensors = ends(16 * before, x, x, DRAWN, out, indices=indices)
    run_last_block((before + 3, 16), {**places, "indices": 8 * before}, tensors, seed=9, step=7)
    for row, index in zip(out, indices.tolist()):
        assert (row - normals(index, 9, 7, 0, 4)).abs().max() <= 2e-6


def test_more_blocks_than_a_launch_has_are_refused():
    x, table = torch.empty(2**32, 1, device="meta"), torch.empty(1, 8, device="meta")
    with pytest.raises(RuntimeError, match="sampler_step: x is too large for one launch"):
        plan("sampler_step", x, x, table, None, None, None, None, 0, 0, None, 0, x, None, None, None)


@pytest.mark.parametrize("d", [1, 2, 3, 7, 640, 2**31 - 1, 2**31, 2**32 - 1])
def test_products_with_the_inverse_are_quotients(d):
    """A sample of so many warps of 128 elements each."""
    d = min(d, 8 * (2**29 - 1))  # a launch has no more
    planned = step_plan((1, 128 * d), odd=True)
    inverse = planned["inverse_warps"]
    assert planned["warps"] == d and inverse == (2**64 - 1) // d < 2**64
    most = min(2**64 // d, 2**64) - 1
    for n in {n for k in (1, 2, 3, most // d, 2**32 // d, 2**33 // d) for n in (k * d - 1, k * d, k * d + 1)} | {0, most}:
        if 0 <= n <= most:
            assert (n + 1) * inverse >> 64 == n // d


@pytest.mark.parametrize("dtype, count", [(F32, 256), (F32, 252), (F32, 255), (BF16, 512), (BF16, 504), (BF16, 511)])
def test_cuda_kernels_flag_one_offender(dtype, count, cupy_on_host):
    """The offender may be in the first vector or the second, at their ends, or among single elements."""
    for place in (0, 3, 7, count // 2 - 1, count // 2, count - 1):
        x, flags = torch.zeros(3, count, dtype=dtype), torch.zeros(3, dtype=torch.int32)
        x[1, place] = float("inf")
        LAUNCHERS.sampler_step(x, x, PLAIN, None, None, None, None, 0, 0, None, 0, torch.empty_like(x), None, None, flags)
        assert flags.tolist() == [0, 1, 0]


@pytest.mark.parametrize("seed", [0, pytest.param(2**40 + 9, marks=pytest.mark.core), -1])
def test_cuda_philox_on_the_host(seed, cupy_on_host):
    indices = torch.tensor([0, 2**33 + 1])
    for shape in [(1,), (3, 5, 7), (4, 16, 17)]:
        words = torch.full((2, torch.Size(shape).numel()), -1)
        LAUNCHERS.philox_words(indices, seed, 4, 5, words)
        assert torch.equal(words, words_reference(indices, seed, words.shape[1], 4, 5))
        normals = torch.full((2, *shape), torch.nan)
        LAUNCHERS.philox_normal(indices, seed, 2, 7, normals)
        assert (normals - normal_reference(indices, seed, shape, 2, 7)).abs().max() <= 2e-6
    LAUNCHERS.philox_normal(indices[:0], seed, 2, 7, torch.empty(0, 3))


PHILOX_REFUSED = {
    "indices must be torch.int64": (torch.zeros(2), torch.zeros(2, 3)),
    "out must be torch.float32 with 2 samples": (torch.zeros(2).long(), torch.zeros(3, 3)),
    "out must be torch.float32 with 2 samples, one for each index, got torch.float16": (
        torch.zeros(2).long(),
        torch.zeros(2, 3).half(),
    ),
    "out must be torch.float32 with 6 contiguous": (torch.zeros(2).long(), torch.zeros(3, 2).T),
    "out must be on x's device": (torch.zeros(2).long(), torch.zeros(2, 3, device="meta")),
    "out must have at most 2\\^34": (torch.zeros(1, device="meta").long(), torch.zeros(1, 2**34 + 1, device="meta")),
}


@pytest.mark.parametrize("message", PHILOX_REFUSED)
def test_philox_refuses(message):
    indices, out = PHILOX_REFUSED[message]
    with pytest.raises(RuntimeError, match=f"philox_normal: {message}"):
        plan("philox_normal", indices, 0, 1, 0, out)


def step_plan(shape, dtype=F32, pool=0, last=False, draw=False, odd=False, extended=False):
    """The plan for x of any size; ``odd``: m begins where no vector does."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
    m = torch.empty(x.numel() + 1, dtype=dtype, device="meta").as_strided(x.shape, x.stride(), 1) if odd else x
    indices = torch.empty(shape[0], dtype=torch.int64, device="meta") if draw else None
    small = (*shape[:-2], shape[-2] // pool, shape[-1] // pool) if pool else None
    pooled = torch.empty(small, dtype=dtype, device="meta").contiguous(memory_format=layout) if pool else None
    table = torch.empty(1, 12 if extended else 8, device="meta")
    return plan("sampler_step", x, m, table, None, None, None, indices, 0, 0, None, pool, x, None, pooled, None)


PLANS = [
    # Flat in single elements, one vector and two, by channel.
    dict(shape=(2, 105)),
    dict(shape=(2, 105), draw=True),
    dict(shape=(2, 252)),
    dict(shape=(2, 256)),
    dict(shape=(2, 256), odd=True),
    dict(shape=(2, 256), draw=True),
    dict(shape=(2, 256), dtype=BF16),
    dict(shape=(2, 256), extended=True),
    dict(shape=(64, 3 * 2**16), dtype=BF16, extended=True),
    dict(shape=(64, 3 * 2**16), dtype=BF16),
    dict(shape=(3, 5, 2**15, 2**16), last=True, draw=True),
    dict(shape=(2**32 - 8, 1)),
    dict(shape=(1, 2**39)),
    # Pooled.
    dict(shape=(1, 1, 1, 1), pool=1),
    dict(shape=(64, 3, 256, 256), pool=4),
    dict(shape=(64, 3, 256, 256), pool=4, last=True, draw=True),
    dict(shape=(64, 3, 256, 256), pool=64, last=True),
    dict(shape=(2, 3, 255, 255), pool=3),
    dict(shape=(2, 300, 2, 4), pool=2, last=True),
    dict(shape=(1, 2, 1100, 1100), pool=1100, last=True),
    dict(shape=(3, 1, 2**17, 2**16), pool=2),
]


def test_plans_cover_every_element():
    for case in PLANS:
        p, threads = step_plan(**case), 256
        assert p.launches[0][2] == threads and p.blocks == p["tiles"]
        if pool := case.get("pool"):
            assert p["lanes"] * p["rows"] * p["strips"] <= threads
            assert p["column_tiles"] * p["outputs"] >= p["width"] // pool
            assert p["channel_tiles"] * p["tile_channels"] >= p["channels"]
            strips = p["samples"] * (p["length"] // p["width"] // pool)
            assert p["tiles"] == -(-strips // p["strips"]) * p["column_tiles"] * p["channel_tiles"]
        else:
            group = 4 if case.get("dtype", F32) == F32 else 8
            elements = 32 * (p["vectors_each"] * group or 4)
            assert p["tiles"] * 8 >= p["samples"] * p["warps"] and p["tiles"] < 2**29
            assert p["warps"] * elements >= p["length"] * p["channels"]
            assert p["vectors_each"] < 2 or p["length"] % elements == 0


def test_vectors_only_where_they_are_aligned():
    def vectors(x, pool=0, name="vectors", table=None, history=None, x0=None, indices=None):
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        small = (*x.shape[:-2], x.shape[-2] // pool, x.shape[-1] // pool) if pool else None
        pooled = torch.empty(small, memory_format=layout) if pool else None
        table = torch.zeros(1, 8) if table is None else table
        return plan("sampler_step", x, x, table, None, history, None, indices, 0, 0, None, pool, x, x0, pooled, None)[name]

    x = torch.zeros(2, 3, 8, 8)
    drawn = {"indices": torch.arange(2)}
    assert vectors(x) == vectors(x, pool=2) == vectors(x, **drawn) == 1
    odd = torch.zeros(2 * 192 + 1)[1:].view_as(x)
    assert vectors(x, x0=odd) == vectors(x, table=torch.zeros(9)[1:].view(1, 8)) == 0
    wide = torch.zeros(2, 12)
    assert vectors(x, table=wide, history=x) == 1 and vectors(x, table=wide, history=odd) == 0
    assert vectors(torch.zeros(2, 3, 5, 7)) == vectors(torch.zeros(2, 3, 8, 6), pool=2) == 0
    assert vectors(torch.zeros(2, 1, 2, 6)) == 1 and vectors(torch.zeros(2, 1, 2, 6).half()) == 0
    last = x.contiguous(memory_format=torch.channels_last)
    assert (vectors(last), vectors(last, **drawn), vectors(last, pool=2)) == (1, 0, 0)
    # Two per thread where warps are full and nothing is drawn.
    large = torch.zeros(2, 1, 16, 16)
    assert [vectors(y, name="vectors_each") for y in (x, large, large.half(), torch.zeros(2, 512).half())] == [1, 2, 1, 2]
    assert vectors(large, name="vectors_each", **drawn) == vectors(large, name="vectors_each", table=wide) == 1
    assert vectors(torch.zeros(2, 255), name="vectors_each") == 0


GOOD = dict(
    x=torch.zeros(2, 3, 8, 8),
    m=torch.zeros(2, 3, 8, 8),
    table=torch.zeros(1, 8),
    **dict.fromkeys(("previous_x0", "history", "noise", "indices")),
    **dict(seed=0, step=0, steps=None, pool=0, out=torch.zeros(2, 3, 8, 8)),
    **dict.fromkeys(("x0", "pooled", "flags")),
)
REFUSED = {
    "x must be contiguous or channels_last": {"x": torch.zeros(3, 2, 8, 8).transpose(0, 1)},
    "x must be float32": {"x": torch.zeros(2, 3, 8, 8).double()},
    "m must be float32": {"m": torch.zeros(2, 3, 8, 8).double()},
    "m must have 384 elements": {"m": torch.zeros(2, 3, 8, 4)},
    "table must be torch.float32 with 16": {"table": torch.zeros(3, 8)},
    "table must be torch.float32 with 24": {"table": torch.zeros(3, 12)},
    "history needs a table of 12 columns": {"history": torch.zeros(2, 3, 8, 8)},
    "history must be torch.float32": {"table": torch.zeros(1, 12), "history": torch.zeros(2, 3, 8, 8).half()},
    "previous_x0 must be torch.float32": {"previous_x0": torch.zeros(2, 3, 8, 8).half()},
    "noise must be contiguous": {"noise": torch.zeros(2, 8, 8, 3).permute(0, 3, 1, 2)},
    "indices must be torch.int64 with 2": {"indices": torch.arange(3)},
    "steps must be torch.int64 with 2": {"steps": torch.arange(3)},
    "pool must be 0, or divide": {"pool": 3},
    "pooled must be given": {"pool": 2},
    "pooled must have 96 elements": {"pool": 2, "pooled": torch.zeros(2, 3, 2, 2)},
    "out must have": {"out": torch.zeros(2, 3, 8, 4)},
    "flags must be torch.int32 with 2": {"flags": torch.zeros(2)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    assert plan("sampler_step", **GOOD).blocks > 0
    with pytest.raises(RuntimeError, match=f"sampler_step: {message}"):
        plan("sampler_step", **{**GOOD, **REFUSED[message]})


STORE = """
#include "{root}/tests/kernels/cuda_on_host.h"
#include "cuda/storage.cuh"
void keep(void* to, const advkd::Group<advkd::{dtype}, {count}>& group) {{
  advkd::store_bits<advkd::{dtype}>(to, advkd::Span{{0, {count}, true}}, group);
}}
"""


@pytest.mark.parametrize("dtype, count, whole", [("bf16", 8, True), ("bf16", 1, True), ("bf16", 4, False), ("f32", 2, False)])
def test_groups_that_are_not_whole_vectors_do_not_compile(dtype, count, whole, tmp_path):
    source = STORE.format(root=ROOT, dtype=dtype, count=count)
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}", "-x", "c++", "-"]
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    assert (result.returncode == 0) == whole, result.stderr
    assert whole or "whole vectors of 16 bytes" in result.stderr


def test_sources_are_whole_and_self_contained():
    for name, kernel in [("sampler_step", "advkd_step_"), ("philox", "advkd_philox_normal")]:
        text = cuda.source(name)
        assert "#include" not in text and "#pragma once" not in text and kernel in text
        assert text.count("void philox_rounds(") == 1


@pytest.mark.parametrize("release", [13, 14])
def test_kernels_run_on_torchs_stream(release, monkeypatch):
    entered = []

    class Stream(contextlib.nullcontext):
        def __enter__(self):
            entered.append(self.enter_result)

    new = types.SimpleNamespace(from_external=lambda stream: Stream(stream.__cuda_stream__()))
    parts = types.SimpleNamespace(Stream=new if release == 14 else object, ExternalStream=lambda handle: Stream((0, handle)))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=parts))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    with cuda._current(torch.device("cuda:1")):
        assert entered == [(0, 77)]


def test_gap_names_what_is_missing(monkeypatch, tmp_path):
    gap = cuda.gap.__wrapped__
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    assert "CuPy is not installed" in gap()
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: object())
    broken = types.SimpleNamespace(getVersion=lambda: (_ for _ in ()).throw(RuntimeError("no libnvrtc")))
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", types.SimpleNamespace(nvrtc=broken))
    assert "no libnvrtc" in gap()
    monkeypatch.setitem(
        sys.modules, "cupy.cuda", types.SimpleNamespace(nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)))
    )
    assert gap() is None
    monkeypatch.setattr(cuda, "folder", lambda: tmp_path)
    assert "sources are not installed" in gap()
    missing = "the cpu extension is not built (python setup.py build_ext --inplace)"
    monkeypatch.setattr(cuda, "extension_gap", lambda kind: missing if kind == "cpu" else None)
    assert gap() == f"CuPy needs the CPU extension, which plans the launches: {missing}"


def test_info_says_that_cupy_needs_the_cpu_extension(monkeypatch):
    """Where a GPU is, CuPy, and neither extension."""
    from click.testing import CliRunner

    from advkd.cli.main import main
    from advkd.ops import registry

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: object())
    missing = "the {} extension is not built (python setup.py build_ext --inplace)"
    for module in (cuda, registry):
        monkeypatch.setattr(module, "extension_gap", missing.format)
    caches = (cuda.gap, registry.cuda_gap, registry._choose)
    for cache in caches:
        cache.cache_clear()
    result = CliRunner().invoke(main, ["info"])
    for cache in caches:
        cache.cache_clear()
    assert "CuPy needs the CPU extension, which plans the launches: the cpu extension is not built" in result.output, result
