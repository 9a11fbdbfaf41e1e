"""The GPU sources of the sampler step without a GPU.

The Triton kernels run in the interpreter; the CUDA kernels are compiled for the host, and started by the CuPy launchers through
a stand-in for CuPy.
"""

import contextlib
import dataclasses
import subprocess
import sys
import types

import pytest
import torch

from advkd.errors import InputError
from advkd.ops import cupy_kernels, cupy_modules
from advkd.ops.philox import normal_reference, rounds_reference, words_reference
from advkd.ops.sampler_step import sampler_step_reference
from advkd.runtime.extension import extension_gap

from ..conftest import ROOT, process_environment
from .cuda_on_host import only_last_block

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
    in_place: str | None = None
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
    }
    if case.planted:
        named["x"].tensor[(n - 1, *[0] * (len(case.shape) - 1))] = float("inf")
        named["m"].tensor[n - 1, ..., -1] = float("nan")
    table = torch.randn(n if case.rows else 1, 8, generator=generator)
    table[:, 2] = case.clip
    small = (*case.shape[:2], *(side // case.pool for side in case.shape[2:])) if case.pool else None
    outputs = {
        "out": named[case.in_place] if case.in_place else Guarded(case.shape, case.x, case.last, case.offset, device),
        "x0": Guarded(case.shape, case.x, case.last, case.offset, device) if case.x0 else None,
        "pooled": Guarded(small, case.x, case.last, case.offset, device) if small else None,
    }
    flags = torch.zeros(n, dtype=torch.int32, device=device) if case.flags else None
    # Indices beyond 32 bits, and a seed whose upper half counts.
    indices = torch.arange(n, device=device) * 2**33 + 5 if case.noise == "draw" else None
    steps = None if case.steps is None else torch.tensor(case.steps, device=device)
    x, m, previous_x0, noise = (None if g is None else g.tensor for g in named.values())
    out, x0, pooled = (None if g is None else g.tensor for g in outputs.values())
    launch(x, m, table.to(device), previous_x0, noise, indices, -(2**40) + 9, 7, steps, case.pool, out, x0, pooled, flags)
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


@pytest.mark.parametrize("case", CASES + CUDA_CASES, ids=str)
def test_cuda_kernels_on_the_host(case, cupy_on_host):
    check(case, cupy_kernels.sampler_step)


def launcher(compiled_by):
    """The kernels on a GPU, or a skip."""
    if compiled_by == "triton":
        return pytest.importorskip("advkd.kernels.sampler_step").sampler_step
    if reason := cupy_kernels.gap() if compiled_by == "cupy" else extension_gap("cuda"):
        pytest.skip(reason)
    return cupy_kernels.sampler_step if compiled_by == "cupy" else torch.ops.advkd_cuda.sampler_step


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
        arguments = (x[:, :count].contiguous(), m[:, :count].contiguous().to(device), table, None, None, None, 0, 0, None, 0)
        launch(*arguments, out, None, None, None)
        finite = m[:, :count].isfinite()
        assert torch.equal(out.cpu()[finite], m[:, :count][finite].to(dtype))
        # A coefficient of zero turns an infinity into NaN.
        assert out.cpu()[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_cuda_kernels_round_as_torch_does(dtype, cupy_on_host):
    check_rounding(dtype, cupy_kernels.sampler_step)


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


@contextlib.contextmanager
def last_block_of(monkeypatch, before, pooled_before=0, **changes):
    """Make the launcher's tensors begin ``before`` float32 elements before the actual memory; only the last block runs.

    ``changes``: sizes of the whole, and pointers.
    """
    small = cupy_kernels.step_parameters

    def large(tensors, seed, step, pool):
        p = small(tensors, seed, step, pool)
        for name, value in changes.items():
            p[name] = int(p[name]) + value
        sizes = (int(p[name]) for name in ("samples", "length", "channels", "width"))
        plan = cupy_kernels.step_plan(*sizes, pool, 4, int(p["vectors"]), tensors["indices"] is not None)
        for name, value in plan.items():
            p[name] = value
        for name in ("x", "m", "out"):
            p[name] -= 4 * before
        p["pooled"] -= 4 * pooled_before
        tiles.append(int(p["tiles"]))
        return p

    def start(program, *arguments):
        with only_last_block("sampler_step", tiles[-1]):
            cupy_modules.start(program, *arguments)

    tiles = []
    monkeypatch.setattr(cupy_kernels, "step_parameters", large)
    monkeypatch.setattr(cupy_kernels, "start", start)
    yield
    monkeypatch.undo()


DRAWN = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 1.0]])
PLAIN = torch.tensor([[0.5, 0.25, 0.7, 1.5, -0.5, 0.125, 0, 0]])


@pytest.mark.parametrize("pool", [0, 2])
def test_cuda_kernels_count_beyond_32_bits(pool, cupy_on_host, monkeypatch):
    """The end of a sample of 2^33 + 16 elements with drawn normals: whole blocks lie before the last one's elements."""
    before = 2**33
    x = torch.zeros(1, 1, 2, 8)
    out, pooled = torch.full_like(x, float("nan")), torch.full((1, 1, 1, 4), float("nan"))
    index, seed = 2**33 + 5, 2**40 + 9
    with last_block_of(monkeypatch, before, before // 4 if pool else 0, length=before):
        indices = torch.tensor([index])
        small = pooled if pool else None
        cupy_kernels.sampler_step(x, x, DRAWN, None, None, indices, seed, 7, None, pool, out, None, small, None)
    expected = normals(index, seed, 7, before // 4, 4).reshape(x.shape)
    assert (out - expected).abs().max() <= 2e-6
    assert not pool or (pooled - torch.nn.functional.avg_pool2d(expected, 2)).abs().max() <= 2e-6


@pytest.mark.parametrize("count", [256, 252, 255])
def test_cuda_kernels_count_beyond_32_bits_in_memory_order(count, cupy_on_host, monkeypatch):
    """The end of a sample of more than 2^33 elements: two vectors a thread, one, and single elements."""
    before = 2**33
    x, m = torch.randn(2, 1, count, generator=torch.Generator().manual_seed(0))
    out, expected = torch.full_like(x, float("nan")), torch.empty_like(x)
    with last_block_of(monkeypatch, before, length=before):
        cupy_kernels.sampler_step(x, m, PLAIN, None, None, None, 0, 0, None, 0, out, None, None, None)
    sampler_step_reference(x, m, PLAIN, None, None, None, 0, 0, None, 0, expected, None, None, None)
    assert torch.equal(out, expected)


def test_cuda_kernels_count_beyond_32_bits_between_channels(cupy_on_host, monkeypatch):
    """The end of a sample of 15 * 2^30 elements whose three channels alternate in memory: 85 groups of four of each channel."""
    length, index, seed = 5 * 2**30, 5, 9
    x = torch.zeros(1, 3, 4, 88).contiguous(memory_format=torch.channels_last)
    before, out = length - 4 * 88, torch.full_like(x, float("nan"))
    with last_block_of(monkeypatch, 3 * before, length=before):
        cupy_kernels.sampler_step(x, x, DRAWN, None, None, torch.tensor([index]), seed, 7, None, 0, out, None, None, None)
    for channel in range(3):
        expected = normals(index, seed, 7, (channel + 1) * length // 4 - 85, 85)
        assert (out[0, channel].flatten()[-4 * 85 :] - expected).abs().max() <= 2e-6


def test_cuda_kernels_take_almost_2_to_the_32_samples(cupy_on_host, monkeypatch):
    """The last block of the largest launch: three of 2^32 - 13 samples of 16 elements, one warp each."""
    before = 2**32 - 16
    x = torch.zeros(3, 16)
    out = torch.full_like(x, float("nan"))
    indices = torch.tensor([3, 2**33, 7])
    with last_block_of(monkeypatch, 16 * before, samples=before, indices=-8 * before):
        cupy_kernels.sampler_step(x, x, DRAWN, None, None, indices, 9, 7, None, 0, out, None, None, None)
    for row, index in zip(out, indices.tolist()):
        assert (row - normals(index, 9, 7, 0, 4)).abs().max() <= 2e-6


def test_more_blocks_than_a_launch_has_are_refused(monkeypatch):
    x = torch.empty(1, device="meta").expand(2**32, 1)
    tensors = dict.fromkeys(cupy_kernels._POINTERS) | {"x": x, "m": x, "out": x, "table": torch.zeros(1, 8)}
    monkeypatch.setattr(cupy_kernels, "address", lambda tensor: 0)
    arguments = [tensors[name] for name in ("x", "m", "table", "previous_x0", "noise", "indices")]
    with pytest.raises(InputError, match="too large"):
        cupy_kernels.sampler_step(*arguments, 0, 0, None, 0, x, None, None, None)


@pytest.mark.parametrize("d", [1, 2, 3, 7, 640, 2**31 - 1, 2**31, 2**32 - 1])
def test_products_with_the_inverse_are_quotients(d):
    inverse = cupy_kernels.step_inverse(d)
    assert inverse < 2**64
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
        cupy_kernels.sampler_step(x, x, PLAIN, None, None, None, 0, 0, None, 0, torch.empty_like(x), None, None, flags)
        assert flags.tolist() == [0, 1, 0]


@pytest.mark.parametrize("seed", [0, 2**40 + 9, -1])
def test_cuda_philox_on_the_host(seed, cupy_on_host):
    indices = torch.tensor([0, 2**33 + 1])
    for shape in [(1,), (3, 5, 7), (4, 16, 17)]:
        count = torch.Size(shape).numel()
        assert torch.equal(cupy_kernels.philox_words(indices, seed, count, 4, 5), words_reference(indices, seed, count, 4, 5))
        normals = cupy_kernels.philox_normal(indices, seed, shape, 2, 7)
        assert normals.shape == (2, *shape)
        assert (normals - normal_reference(indices, seed, shape, 2, 7)).abs().max() <= 2e-6
    assert cupy_kernels.philox_normal(indices[:0], seed, (3,), 2, 7).shape == (0, 3)


PLANS = [
    # samples, length, channels, width, pool, group, vectors, draw: flat in single elements, one vector and two, by channel.
    (2, 105, 1, 0, 0, 4, 0, 0),
    (2, 105, 1, 0, 0, 4, 0, 1),
    (2, 252, 1, 0, 0, 4, 1, 0),
    (2, 256, 1, 0, 0, 4, 1, 0),
    (2, 256, 1, 0, 0, 4, 0, 0),
    (2, 256, 1, 0, 0, 4, 1, 1),
    (2, 256, 1, 0, 0, 8, 1, 0),
    (64, 3 * 2**16, 1, 0, 0, 8, 1, 0),
    (3, 2**33, 5, 0, 0, 4, 0, 1),
    (2**32 - 8, 1, 1, 0, 0, 4, 0, 0),
    (1, 2**40, 1, 0, 0, 4, 1, 0),
    # Pooled.
    (1, 1, 1, 1, 1, 4, 0, 0),
    (64, 3 * 2**16, 1, 256, 4, 4, 1, 0),
    (64, 2**16, 3, 256, 4, 4, 0, 1),
    (64, 2**16, 3, 256, 64, 4, 0, 0),
    (2, 3 * 85 * 255, 1, 255, 3, 4, 0, 0),
    (2, 8, 300, 4, 2, 4, 0, 0),
    (1, 1100 * 1100, 2, 1100, 1100, 4, 0, 0),
    (3, 2**33, 1, 2**16, 2, 4, 1, 0),
]
LAYOUT = r"""
#include <cstdio>
#include <cstddef>
#include "cuda/sampler_step.h"
using namespace advkd;
int main() {
  std::printf("%zu %zu\n", sizeof(PhiloxParameters), sizeof(StepParameters));
  OFFSETS
  long long samples, length, index = 0;
  int channels, width, pool, group, vectors, draw;
  while (std::scanf("%lld %lld %d %d %d %d %d %d", &samples, &length, &channels, &width, &pool, &group, &vectors, &draw) == 8) {
    StepParameters p{};
    p.samples = samples, p.length = length, p.channels = channels, p.width = width, p.pool = pool;
    p.vectors = vectors, p.indices = draw ? &index : nullptr;
    step_plan(p, group);
    std::printf("%lld %lld %llu %llu %u", step_most_tiles(p), p.tiles, p.inverse_warps, p.inverse_channels, p.warps);
    const int plan[] = {p.vectors_each, p.column_tiles, p.channel_tiles, p.tile_channels, p.outputs, p.lanes, p.rows, p.strips};
    for (int n : plan) std::printf(" %d", n);
    std::printf("\n");
  }
}
"""


def test_python_and_cpp_launchers_agree(tmp_path):
    """The parameters' layouts and the plan, which both launchers have."""
    structures = {"PhiloxParameters": cupy_kernels.PHILOX, "StepParameters": cupy_kernels.STEP}
    fields = [(name, field) for name, dtype in structures.items() for field in dtype.names]
    offsets = "".join(f'std::printf("%zu\\n", offsetof({name}, {field}));' for name, field in fields)
    (tmp_path / "layout.cpp").write_text(LAYOUT.replace("OFFSETS", offsets))
    command = ["g++", "-std=c++20", f"-I{ROOT / 'csrc'}", "layout.cpp", "-o", "layout"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    text = "\n".join(" ".join(map(str, plan)) for plan in PLANS)
    lines = subprocess.run([tmp_path / "layout"], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].split() == [str(dtype.itemsize) for dtype in structures.values()]
    assert [int(line) for line in lines[1 : len(fields) + 1]] == [structures[name].fields[field][1] for name, field in fields]
    ours = [cupy_kernels.step_plan(*plan) for plan in PLANS]
    order = ("tiles", *cupy_kernels._FLAT_PLAN, *cupy_kernels._POOL_PLAN)
    most = [cupy_kernels.step_most_tiles(pool) for _, _, _, _, pool, *_ in PLANS]
    expected = [[limit, *(plan[name] for name in order)] for limit, plan in zip(most, ours)]
    assert [list(map(int, line.split())) for line in lines[len(fields) + 1 :]] == expected
    for (samples, length, channels, width, pool, group, *_), plan in zip(PLANS, ours):
        if pool:
            assert plan["lanes"] * plan["rows"] * plan["strips"] <= cupy_modules.THREADS
            assert (
                plan["column_tiles"] * plan["outputs"] >= width // pool
                and plan["channel_tiles"] * plan["tile_channels"] >= channels
            )
        else:
            elements = 32 * (plan["vectors_each"] * group or 4)
            assert plan["tiles"] * 8 >= samples * plan["warps"]
            assert plan["warps"] * elements >= length * channels or plan["tiles"] > cupy_kernels.step_most_tiles(0)
            assert plan["vectors_each"] < 2 or length % elements == 0


def test_vectors_only_where_they_are_aligned():
    def vectors(x, pool=0, name="vectors", **others):
        tensors = dict.fromkeys(cupy_kernels._POINTERS) | {"x": x, "m": x, "out": x, "table": torch.zeros(1, 8), **others}
        return int(cupy_kernels.step_parameters(tensors, 0, 0, pool)[name])

    x = torch.zeros(2, 3, 8, 8)
    drawn = {"indices": torch.arange(2)}
    assert vectors(x) == vectors(x, pool=2) == vectors(x, **drawn) == 1
    assert vectors(x, x0=torch.zeros(2 * 192 + 1)[1:]) == vectors(x, table=torch.zeros(9)[1:].view(1, 8)) == 0
    assert vectors(torch.zeros(2, 3, 5, 7)) == vectors(torch.zeros(2, 3, 8, 6), pool=2) == 0
    assert vectors(torch.zeros(2, 1, 2, 6)) == 1 and vectors(torch.zeros(2, 1, 2, 6).half()) == 0
    last = x.contiguous(memory_format=torch.channels_last)
    assert (vectors(last), vectors(last, **drawn), vectors(last, pool=2)) == (1, 0, 0)
    # Two per thread where warps are full and nothing is drawn.
    large = torch.zeros(2, 1, 16, 16)
    assert [vectors(y, name="vectors_each") for y in (x, large, large.half(), torch.zeros(2, 512).half())] == [1, 2, 1, 2]
    assert vectors(large, name="vectors_each", **drawn) == 1 and vectors(torch.zeros(2, 255), name="vectors_each") == 0


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
        text = cupy_modules.source(name)
        assert "#include" not in text and "#pragma once" not in text and kernel in text
        assert text.count("void philox_rounds(") == 1


@pytest.mark.parametrize("release", [13, 14])
def test_kernels_run_on_torchs_stream(release, monkeypatch):
    entered = []

    class Stream(contextlib.nullcontext):
        def __enter__(self):
            entered.append(self.enter_result)

    new = types.SimpleNamespace(from_external=lambda stream: Stream(stream.__cuda_stream__()))
    cuda = types.SimpleNamespace(Stream=new if release == 14 else object, ExternalStream=lambda handle: Stream((0, handle)))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    with cupy_modules._current(torch.device("cuda:1")):
        assert entered == [(0, 77)]


def test_gap_names_what_is_missing(monkeypatch):
    gap = cupy_modules.gap.__wrapped__
    monkeypatch.setattr(cupy_modules.importlib.util, "find_spec", lambda name: None)
    assert "CuPy is not installed" in gap()
    monkeypatch.setattr(cupy_modules.importlib.util, "find_spec", lambda name: object())
    broken = types.SimpleNamespace(getVersion=lambda: (_ for _ in ()).throw(RuntimeError("no libnvrtc")))
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", types.SimpleNamespace(nvrtc=broken))
    assert "no libnvrtc" in gap()
    monkeypatch.setitem(
        sys.modules, "cupy.cuda", types.SimpleNamespace(nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)))
    )
    assert gap() is None
    monkeypatch.setattr(cupy_modules, "folder", lambda: None)
    assert "sources are not installed" in gap()
