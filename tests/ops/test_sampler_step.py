"""Parity of every backend of the sampler step with its reference, its noise, and refusals."""

import dataclasses
import hashlib
import itertools
import pickle

import pytest
import torch

from advkd.errors import BackendUnavailableError, InputError
from advkd.ops import StepCoefficients, coefficient_table, philox_normal, registry, sampler_step
from advkd.ops.layout import memory_format
from advkd.ops.philox import rounds_reference
from advkd.ops.sampler_step import OP
from advkd.ops.step_coefficients import EXTENDED_COEFFICIENTS
from advkd.runtime.sources import STREAMS

from ..conftest import DEFAULTS, fork, other_default

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COEFFICIENTS = StepCoefficients(k_x=1.3, k_m=-0.6, c_0=0.8, c_x=0.15, c_m=0.2, c_h=-0.3, c_z=0.4, clip=0.9)
EXTENDED = dataclasses.replace(COEFFICIENTS, c_g=0.25, s_0=0.7, s_x=-0.2, s_m=0.35)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every shape has a reason: one vector and less, odd sides, sizes that no vector divides, several pieces of work, no images.
SHAPES = [(1, 1, 4, 4), (2, 3, 5, 7), (3, 4, 33, 16), (2, 3, 64, 64), (2, 1, 96, 96), (5,), (2, 3, 4, 5, 6)]
SEED, STEP = 2**40 + 3, 7


def fast_backends(device):
    return [b for b in ("cpu", "triton", "cuda") if registry.gap("sampler_step", b, torch.device(device)) is None]


def make(shape, dtype=torch.float32, model_dtype=None, last=False, device="cpu", offset=0):
    """x, model output, previous x0, noise and second history.

    ``offset``: elements past an allocation's start, so that vectors are not aligned.
    """
    generator = torch.Generator().manual_seed(len(shape))
    layout = torch.channels_last if last else torch.contiguous_format
    tensors = []
    for kind in (dtype, model_dtype or dtype, dtype, dtype, dtype):
        values = torch.randn(shape, generator=generator).to(device, kind).contiguous(memory_format=layout)
        place = torch.empty(values.numel() + offset, dtype=kind, device=device)[offset:].as_strided(shape, values.stride())
        tensors.append(place.copy_(values) if offset else values)
    return tensors


def launch(backend, tensors, table, noise=None, pool=0, history=True, flags=False, stored=True):
    """A launcher's outputs (next state, what is stored, pooled, flags), all poisoned before."""
    x, m, previous, z, second = tensors
    layout = memory_format(x)
    poison = lambda shape: torch.full(shape, torch.nan, dtype=x.dtype, device=x.device).contiguous(memory_format=layout)  # noqa: E731
    offset = x.storage_offset()
    base = torch.full((x.numel() + offset,), torch.nan, dtype=x.dtype, device=x.device)
    out, x0 = base[offset:].as_strided(x.shape, x.stride()), poison(x.shape) if stored else None
    pooled = poison((*x.shape[:2], x.shape[2] // pool, x.shape[3] // pool)) if pool else None
    flagged = torch.zeros(len(x), dtype=torch.int32, device=x.device) if flags else None
    drawn = (None, 0, 0, None)
    if noise == "philox":
        drawn = (torch.arange(5, 5 + len(x), device=x.device) * 2**31, SEED, STEP, None)
    elif noise == "philox, steps":
        drawn = (torch.arange(len(x), device=x.device), SEED, 0, torch.arange(len(x), device=x.device) + 3)
    histories = (previous, second if table.shape[1] == 12 else None) if history else (None, None)
    arguments = (x, m, table, *histories, z if noise == "tensor" else None, *drawn, pool)
    OP.launchers[backend](*arguments, out, x0, pooled, flagged)
    return [t for t in (out, x0, pooled, flagged) if t is not None]


def assert_parity(backend, tensors, table, **options):
    """Allow twice the error of the reference in the same dtype; normals may differ by 2e-6, sums of a pool in their order."""
    found = launch(backend, tensors, table, **options)
    again = launch(backend, tensors, table, **options)
    eager = launch("reference", tensors, table, **options)
    exact = launch("reference", [t.double() for t in tensors], table.double(), **options)
    for ours, twice, same, wanted in zip(found, again, eager, exact, strict=True):
        assert torch.equal(ours, twice) and ours.dtype == same.dtype and ours.stride() == same.stride()
        scale = wanted.abs().max().item() + 1
        floor = 2.0**-23 * scale + (2e-6 * table[:, 7].abs().max().item() if options.get("noise") else 0)
        if ours.dtype in (torch.bfloat16, torch.float16):
            # Rounded to the nearest: an ulp is at most eps times the value (and 2^-24 where half precision is subnormal).
            bound = torch.finfo(ours.dtype).eps / 2 * wanted.abs() + floor
        else:
            bound = 2 * (same.double() - wanted).abs().max() + floor
        assert ((ours.double() - wanted).abs() <= bound).all()


def table_for(tensors, rows=1, extended=False):
    """Coefficients of one row, or of different ones for the samples; among extended ones are plain ones."""
    steps = [EXTENDED if extended else COEFFICIENTS, StepCoefficients(1, -0.5, 0.5, c_x=0.5, c_h=0.1, c_z=0.2)]
    return coefficient_table((steps * len(tensors[0]))[: len(tensors[0]) if rows > 1 else 1], tensors[0].device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", [None, "tensor", "philox", "philox, steps"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, last, noise, device):
    if last and len(shape) != 4:
        pytest.skip("channels_last is a layout of images")
    tensors = make(shape, last=last, device=device)
    for backend, rows, extended in itertools.product(fast_backends(device), (1, 2), (False, True)):
        assert_parity(backend, tensors, table_for(tensors, rows, extended), noise=noise, flags=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_of_dtypes(dtype, model_dtype, device):
    for (shape, last), noise in itertools.product([((2, 3, 5, 7), True), ((2, 3, 32, 32), False)], (None, "philox")):
        tensors = make(shape, dtype, model_dtype, last, device)
        for backend, extended in itertools.product(fast_backends(device), (False, True)):
            assert_parity(backend, tensors, table_for(tensors, 1, extended), noise=noise, pool=0, flags=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("noise", [None, "philox"])
@pytest.mark.parametrize(
    ("shape", "pool"),
    # One pixel; halves, quarters and a whole image; odd r; a row of more than one vector; sides that differ; 6 = 2 x 3.
    [((2, 3, 4, 6), 1), ((2, 3, 8, 8), 2), ((1, 3, 32, 64), 4), ((2, 1, 32, 32), 32), ((2, 3, 9, 6), 3), ((1, 2, 12, 90), 6)],
    ids=str,
)
def test_parity_of_pooling(shape, pool, noise, last, device):
    for dtype, extended in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        tensors = make(shape, dtype, last=last, device=device)
        for backend in fast_backends(device):
            assert_parity(backend, tensors, table_for(tensors, 2, extended), noise=noise, pool=pool)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", [True, False], ids=["two outputs", "one output"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3], ids=["aligned", "off by 1", "off by 3"])
def test_larger_than_the_caches(offset, dtype, stored, device):
    # More than 4 MB: the CPU's stores pass the caches, where they are aligned; 3 x 801 x 401 elements end with 19 of 32.
    for height, width, pool in ((801, 401, 0), (800, 400, 8)):
        tensors = make((3, 3, height, width), dtype, device=device, offset=offset)
        for backend, extended in itertools.product(fast_backends(device), (False, True)):
            assert_parity(backend, tensors, table_for(tensors, 1, extended), pool=pool, history=extended, stored=stored)


@pytest.mark.parametrize("device", DEVICES)
def test_infinite_clip_and_missing_terms(device):
    x, m, *_ = make((2, 3, 8, 8), device=device)
    c = StepCoefficients(157.0, -157.0, 0.006)
    for backend in fast_backends(device):
        ours, x0, pooled = sampler_step(x, m, c, backend=backend, return_x0=True)
        wanted = 157.0 * x.double() - 157.0 * m.double()
        assert pooled is None and (x0 - wanted).abs().max() <= 2**-22 * 157 * 8
        assert (ours - 0.006 * wanted).abs().max() <= 2**-22 * 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_is_seen_in_the_pass(value, device):
    # At a vector's place and in the partial last one; clipping hides an infinite x0, not an infinite state.
    for place, dtype in itertools.product((0, -1), DTYPES):
        x, m, *_ = make((3, 1, 5, 7), dtype, device=device)
        x[1].flatten()[place] = value
        for backend in (*fast_backends(device), "reference"):
            with pytest.raises(InputError, match="next state of sample 1 is not finite"):
                sampler_step(x, m, StepCoefficients(1, -1, 0.5, c_x=0.5, clip=1.0), check_finite=True, backend=backend)
            found, _, _ = sampler_step(x, m, StepCoefficients(1, -1, 0.5, c_x=0.5, clip=1.0), backend=backend)
            assert torch.isfinite(found[[0, 2]]).all() and not torch.isfinite(found[1]).all()
    # 65519 is rounded to float16's largest number, 65504; 65521 to infinity.
    largest = torch.full((1, 1, 5, 7), 65504.0, dtype=torch.float16, device=device)
    for backend in (*fast_backends(device), "reference"):
        same = StepCoefficients(1, 0, 0, c_x=65519 / 65504)
        found, _, _ = sampler_step(largest, largest, same, check_finite=True, backend=backend)
        assert torch.equal(found, largest)
        with pytest.raises(InputError, match="sample 0 is not finite"):
            sampler_step(largest, largest, StepCoefficients(1, 0, 0, c_x=65521 / 65504), check_finite=True, backend=backend)
    overflowing = torch.full((2, 1, 4, 4), 60000.0, dtype=torch.float16, device=device)
    for backend in (*fast_backends(device), "reference"):
        with pytest.raises(InputError, match="sample 0, 1 is not finite"):
            sampler_step(overflowing, overflowing, StepCoefficients(1, 0, 1.1), check_finite=True, backend=backend)


@pytest.mark.parametrize("name", ["model_output", "previous_x0", "history", "noise", "out", "x0"])
def test_a_launcher_refuses_another_layout(name):
    """The public function lays tensors out like x; whoever calls the op itself must do so."""
    x = torch.zeros(2, 3, 4, 4)
    given = dict.fromkeys(("model_output", "previous_x0", "history", "noise", "out", "x0"), x)
    given[name] = x.contiguous(memory_format=torch.channels_last)
    *inputs, out, x0 = given.values()
    arguments = (x, inputs[0], torch.zeros(1, 12), *inputs[1:], None, 0, 0, None, 0)
    with pytest.raises(RuntimeError, match="one shape and layout"):
        OP(*arguments, "cpu", out, x0, None, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_in_place(last, device):
    for backend in ("reference", *fast_backends(device)):
        for name in ("x", "model_output", "previous_x0", "noise"):
            tensors = dict(zip(("x", "model_output", "previous_x0", "noise"), make((2, 3, 17, 9), last=last, device=device)))
            expected, x0, _ = sampler_step(coefficients=COEFFICIENTS, return_x0=True, backend=backend, **tensors)
            out = tensors[name]
            found, clean, _ = sampler_step(coefficients=COEFFICIENTS, return_x0=True, out=out, backend=backend, **tensors)
            assert found is out and torch.equal(out, expected) and torch.equal(clean, x0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_stored_into_a_history(last, device):
    """What is stored replaces a history that the step itself has read, in vectors, past the caches, and with a pool."""
    names = ("x", "model_output", "previous_x0", "noise", "history")
    for backend, pool, shape in itertools.product(
        ("reference", *fast_backends(device)), (None, 3), ((2, 3, 18, 9), (1, 3, 600, 600))
    ):
        for name in ("previous_x0", "history", "noise"):
            tensors = dict(zip(names, make(shape, last=last, device=device)))
            options = {"coefficients": EXTENDED, "pool": pool, "backend": backend}
            expected = sampler_step(return_x0=True, **options, **tensors)
            for out in (None, tensors["x"]):
                kept = {key: tensor.clone() for key, tensor in tensors.items()}
                x0 = tensors[name]
                found = sampler_step(x0=x0, out=out, **options, **tensors)
                assert found[1] is x0 and (out is None or found[0] is out)
                assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
                for key, tensor in tensors.items():
                    tensor.copy_(kept[key])


def test_only_previous_x0_history_and_noise_may_be_overwritten():
    tensors = dict(zip(("x", "model_output", "previous_x0", "noise", "history"), make((2, 1, 4, 4))))
    for name in ("x", "model_output"):
        with pytest.raises(InputError, match=f"x0 overlaps {name}"):
            sampler_step(coefficients=EXTENDED, x0=tensors[name], **tensors)
    with pytest.raises(InputError, match="out overlaps x0"):
        sampler_step(coefficients=EXTENDED, x0=tensors["history"], out=tensors["history"], **tensors)
    memory = torch.zeros(3, 1, 4, 4)
    for name in ("previous_x0", "history", "noise"):
        with pytest.raises(InputError, match=f"x0 overlaps {name} without being the same"):
            sampler_step(coefficients=EXTENDED, x0=memory[1:], **{**tensors, name: memory[:2]})
    average = tensors["history"].view(-1)[:8].view(2, 1, 2, 2)
    with pytest.raises(InputError, match="second tensor overlaps history"):
        sampler_step(coefficients=EXTENDED, x0=tensors["history"], pool=2, out=(torch.zeros(2, 1, 4, 4), average), **tensors)
    table = coefficient_table([EXTENDED] * 2).view(-1)
    x, x0 = torch.zeros(2, 4), table[:8].view(2, 4)
    with pytest.raises(InputError, match="x0 overlaps coefficients"):
        sampler_step(x, x.clone(), table.view(2, 12), x0=x0)


def test_x0_is_checked_like_out():
    x = torch.zeros(2, 1, 4, 4)
    step = StepCoefficients(1, 1, 1)
    for wrong, message in [
        (torch.zeros(2, 1, 4, 5), "x0 is"),
        (x.half(), "x0 is"),
        (1.0, "x0 must be a tensor"),
        (torch.zeros(2, 1, 4, 8)[..., ::2], "x0 must be laid out like x"),
    ]:
        with pytest.raises(InputError, match=message):
            sampler_step(x, x.clone(), step, x0=wrong)
    with torch.inference_mode():
        made = torch.zeros(2, 1, 4, 4)
    with pytest.raises(InputError, match="x0 was made in inference mode"):
        sampler_step(x, x.clone(), step, x0=made)
    with pytest.raises(RuntimeError, match="no gradient"):
        sampler_step(x, x.clone(), step, x0=x.clone().requires_grad_())


@pytest.mark.parametrize("device", DEVICES)
def test_x0_before_it_is_clipped(device):
    x, m, *_ = make((2, 3, 8, 8), device=device)
    step = StepCoefficients(1.5, -0.5, 1.0, clip=0.25, s_0=0.0, s_x=1.5, s_m=-0.5)
    for backend in ("reference", *fast_backends(device)):
        clipped, stored, _ = sampler_step(x, m, step, return_x0=True, backend=backend)
        assert torch.equal(stored.clamp(-0.25, 0.25), clipped) and torch.equal(stored, 1.5 * x - 0.5 * m)


@pytest.mark.parametrize("device", DEVICES)
def test_twelve_columns_of_a_plain_step_give_the_plain_bits(device):
    for dtype, last in itertools.product(DTYPES, (False, True)):
        x, m, previous, _, second = make((2, 3, 12, 20), dtype, last=last, device=device)
        tables = [coefficient_table([COEFFICIENTS], device, extended=extended) for extended in (False, True)]
        assert [table.shape[1] for table in tables] == [8, 12]
        options = {"previous_x0": previous, "noise": (9, range(2), 4), "pool": 2, "return_x0": True}
        for backend in ("reference", *fast_backends(device)):
            plain = sampler_step(x, m, tables[0], backend=backend, **options)
            for history in (None, second):
                wide = sampler_step(x, m, tables[1], history=history, backend=backend, **options)
                assert all(map(torch.equal, plain, wide))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_into_a_pair(last, device):
    x, m, *_ = make((2, 3, 8, 6), last=last, device=device)
    c, layout = StepCoefficients(1, -0.5, 0.5), memory_format(x)
    average = torch.full((2, 3, 4, 3), torch.nan, device=device).contiguous(memory_format=layout)
    for backend in ("reference", *fast_backends(device)):
        wanted = sampler_step(x, m, c, pool=2, backend=backend)
        pair = (torch.full_like(x, torch.nan), average.fill_(torch.nan))
        found = sampler_step(x, m, c, pool=2, out=pair, backend=backend)
        assert found[0] is pair[0] and found[2] is pair[1]
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[2], wanted[2])
    for wrong in (average[:1], average.double(), average.expand(2, 2, 3, 4, 3)[0].transpose(2, 3), average[..., :1]):
        with pytest.raises(InputError, match="second tensor"):
            sampler_step(x, m, c, pool=2, out=(x.clone(), wrong))
    with pytest.raises(InputError, match="no second tensor without pool"):
        sampler_step(x, m, c, out=(x.clone(), average))


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    x, m, previous, z, _ = make((2, 3, 5, 7), device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    for backend in ("reference", *fast_backends(device)):
        options = {"previous_x0": previous, "noise": z, "backend": backend}
        expected, _, _ = sampler_step(x, m, COEFFICIENTS, **options)
        # Tensors of another layout than x's are copied to it; a strided x comes out contiguous.
        mixed, _, _ = sampler_step(last, m, COEFFICIENTS, **options)
        assert torch.equal(mixed, expected) and mixed.is_contiguous(memory_format=torch.channels_last)
        wide = torch.stack((x, x), -1)[..., 0]
        strided, _, _ = sampler_step(wide, m, COEFFICIENTS, **options)
        assert torch.equal(strided, expected) and strided.is_contiguous()
        assert sampler_step(x[:0], m[:0], StepCoefficients(1, 1, 1), pool=1, return_x0=True)[1].shape == (0, 3, 5, 7)
        assert sampler_step(x[..., :0], m[..., :0], StepCoefficients(1, 1, 1))[0].shape == (2, 3, 5, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_noise_is_the_stream_of_steps(last, device):
    """A sample's noise depends only on (seed, index, step), whatever the batch and the layout."""
    x, m, *_ = make((4, 3, 7, 9), last=last, device=device)
    indices = torch.tensor([3, 0, 2**33, 12], device=device)
    for backend in fast_backends(device):
        wanted = philox_normal(SEED, indices, (3, 7, 9), stream="step", step=STEP, backend=backend)
        options = {"coefficients": StepCoefficients(0, 0, 0, c_z=1.0), "backend": backend}
        whole, _, _ = sampler_step(x, m, noise=(SEED, indices, STEP), **options)
        part, _, _ = sampler_step(x[2:], m[2:], noise=(SEED, indices[2:], torch.tensor([STEP], device=device)), **options)
        assert (whole - wanted).abs().max() <= 2e-6 and torch.equal(part, whole[2:])


def test_noise_of_steps_is_normal_and_independent():
    x = torch.zeros(16, 3, 32, 32)
    drawn = [sampler_step(x, x, StepCoefficients(0, 0, 0, c_z=1.0), noise=(5, range(16), i))[0] for i in range(20)]
    z = torch.stack(drawn).double()
    n = z.numel()
    # Five standard errors of each moment; pairs: over steps, samples, channels, rows, columns and within a block.
    assert abs(z.mean()) < 5 / n**0.5 and abs(z.var() - 1) < 5 * (2 / n) ** 0.5 and abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    for axis, shift in [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (4, 3), (4, 4)]:
        first, second = z.narrow(axis, 0, z.shape[axis] - shift), z.narrow(axis, shift, z.shape[axis] - shift)
        for a, b in ((first, second), (first**2 - 1, second**2 - 1)):
            product = a * b
            assert abs(product.mean()) < 5 * product.std() / product.numel() ** 0.5


def test_counters_never_meet():
    """The largest image has 2^32 blocks: no counter of another sample (nor of the millionth), step or stream is the same."""
    blocks, samples, steps = (0, 1, 2**32 - 1), (0, 1, 10**6 - 1, 2**32, 2**62), (0, 1, 999, 2**24 - 1)
    words = set()
    corners = list(itertools.product(blocks, samples, steps, STREAMS.values()))
    for block, index, step, stream in corners:
        counter = (block, index & 0xFFFFFFFF, index >> 32, stream << 24 | step)
        assert all(0 <= word < 2**32 for word in counter)
        words.add(tuple(int(w) for w in rounds_reference([torch.tensor([word]) for word in counter], (1, 2))))
    assert len(words) == len(corners)
    huge = torch.zeros(1, 1).expand(1, 2**34 + 4)
    with pytest.raises(InputError, match="2\\^34 numbers per sample"):
        sampler_step(huge, huge, COEFFICIENTS, noise=(0, range(1), 0))


def step_digest():
    """SHA-256 of steps of all dtypes and both layouts, with noise, history, pooling, halves that are subnormal, and NaN."""
    digest = hashlib.sha256()
    for dtype, model_dtype, last in itertools.product(DTYPES, DTYPES, (False, True)):
        x, m, previous, _, second = make((3, 3, 12, 20), dtype, model_dtype, last)
        x[0] *= 1e-6
        x[1, 0, 0, 0] = torch.nan
        m[2] *= 1e5
        options = {"previous_x0": previous, "noise": (9, range(3), 4), "pool": 2, "return_x0": True, "backend": "cpu"}
        steps = [{"coefficients": COEFFICIENTS}, {"coefficients": EXTENDED, "history": second}]
        for tensor in itertools.chain.from_iterable(sampler_step(x, m, **step, **options) for step in steps):
            # A NaN's bits depend on the processor.
            digest.update(torch.nan_to_num(tensor.float(), nan=7.0).contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(level):
    code = "from tests.ops.test_sampler_step import step_digest; print(step_digest())"
    result = fork("-c", code, environment={"ADVKD_ISA": level}).finish(60)
    assert result.stdout.strip() == step_digest(), result.stderr


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_bits(threads):
    x, m, previous, *_ = make((3, 3, 96, 128))
    options = {"previous_x0": previous, "noise": (9, range(3), 4), "pool": 8, "backend": "cpu"}
    expected = sampler_step(x, m, COEFFICIENTS, **options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = sampler_step(x, m, COEFFICIENTS, **options)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])


@pytest.mark.slow
def test_more_elements_than_a_32_bit_number():
    x = torch.ones(3, 1, 2**15, 22000, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    m = x.clone()
    m[-1, -1, -1, -1] = 3.0
    found, _, _ = sampler_step(x, m, StepCoefficients(1.0, 1.0, 1.0), out=x, backend="cpu")
    assert found[-1, -1, -1, -1] == 4 and found[-1, -1, -1, -2] == 2 and found[0, 0, 0, 0] == 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    x, m, previous, z, second = make((2, 1, 4, 4))
    table, extended = coefficient_table([COEFFICIENTS]), coefficient_table([EXTENDED])
    noise = (torch.arange(2), 1, 2, None)
    outputs = (torch.empty_like(x), torch.empty_like(x), torch.empty(2, 1, 2, 2), torch.zeros(2, dtype=torch.int32))
    op = torch.ops.advkd.sampler_step.default
    torch.library.opcheck(op, (x, m, table, previous, None, None, *noise, 2, backend, *outputs))
    drawn = (None, 0, 0, None)
    torch.library.opcheck(op, (x, m, table, previous, None, z, *drawn, 0, backend, x.clone(), None, None, None))
    torch.library.opcheck(op, (x, m, extended, previous, second, z, *drawn, 0, backend, x.clone(), x.clone(), None, None))


def test_compiles_whole():
    x, m, previous, _, second = make((2, 3, 8, 8))
    table = coefficient_table([EXTENDED])

    def step(x, m, table, previous, second, indices, i, x0=None):
        histories = {"previous_x0": previous, "history": second}
        return sampler_step(2 * x, m, table, **histories, noise=(3, indices, i), pool=2, return_x0=True, x0=x0)

    arguments = (x, m, table, previous, second, torch.arange(2), torch.tensor([5]))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(*arguments)
    for ours, wanted in zip(compiled(*arguments), expected, strict=True):
        assert torch.equal(ours, wanted)
    x0 = torch.full_like(x, torch.nan)
    for ours, wanted in zip(compiled(*arguments, x0), expected, strict=True):
        assert torch.equal(ours, wanted)
    assert torch.equal(x0, expected[1])


def test_coefficients_of_one_call_and_of_every_sample():
    x, m, *_ = make((3, 2, 4, 4))
    steps = [StepCoefficients(1, -0.1 * i, 0.5 + i, c_x=0.1, clip=1.0) for i in range(3)]
    whole, _, _ = sampler_step(x, m, steps)
    table, _, _ = sampler_step(x, m, coefficient_table(steps))
    single = torch.cat([sampler_step(x[i : i + 1], m[i : i + 1], steps[i])[0] for i in range(3)])
    assert torch.equal(whole, single) and torch.equal(table, single)
    row, _, _ = sampler_step(x, m, coefficient_table(steps)[1])
    assert torch.equal(row[1], single[1])


def test_float64_is_the_references():
    x, m, previous, z, second = (tensor.double() for tensor in make((2, 1, 3, 3)))
    c = EXTENDED
    x0 = (c.k_x * x + c.k_m * m).clamp(-c.clip, c.clip)
    plain = c.c_0 * x0 + c.c_x * x + c.c_m * m + c.c_h * previous + c.c_z * z
    found, same, _ = sampler_step(x, m, COEFFICIENTS, previous_x0=previous, noise=z, return_x0=True)
    assert (found - plain).abs().max() < 1e-14 and torch.equal(same, x0)
    found, stored, _ = sampler_step(x, m, c, previous_x0=previous, history=second, noise=z, return_x0=True)
    assert (found - plain - c.c_g * second).abs().max() < 1e-14
    assert (stored - (c.s_0 * x0 + c.s_x * x + c.s_m * m)).abs().max() < 1e-14
    with pytest.raises(InputError, match="float32, bfloat16 and float16"):
        sampler_step(x, m, StepCoefficients(1, 1, 1), backend="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [1.0]}, "x must be"),
        ({"x": torch.zeros(2, 1, 4, 4).int()}, "x must be"),
        ({"model_output": torch.zeros(2, 1, 4, 5)}, "model_output"),
        ({"model_output": torch.zeros(2, 1, 4, 4).int()}, "model_output"),
        ({"model_output": torch.zeros(2, 1, 4, 4).double()}, "model_output"),
        ({"noise": torch.zeros(1)}, "noise"),
        ({"noise": torch.zeros(2, 1, 4, 4).half()}, "noise"),
        ({"noise": (0, range(2))}, "noise"),
        ({"noise": (0, range(3), 0)}, "noise has 3 sample indices for 2 samples"),
        ({"noise": (-1, range(2), 0)}, "seed"),
        ({"noise": (0, torch.zeros(2), 0)}, "indices"),
        ({"noise": (0, range(2), 2**24)}, "step"),
        ({"noise": (0, range(2), torch.tensor([2**24]))}, "step"),
        ({"noise": (0, range(2), torch.zeros(3).long())}, "step"),
        ({"coefficients": StepCoefficients(1, 1, 1, c_z=1.0)}, "noise is needed"),
        ({"coefficients": StepCoefficients(1, 1, 1, c_h=1.0)}, "previous_x0 is needed"),
        ({"coefficients": StepCoefficients(1, 1, 1, c_g=1.0)}, "history is needed"),
        ({"history": torch.zeros(2, 1, 4, 4)}, "history must be None: the step is a plain one"),
        ({"coefficients": torch.zeros(8), "history": torch.zeros(2, 1, 4, 4)}, "history needs coefficients with 12 columns"),
        ({"coefficients": torch.zeros(12), "history": torch.zeros(2, 1, 4, 5)}, "history is"),
        ({"coefficients": [StepCoefficients(1, 1, 1)] * 3}, "coefficients"),
        ({"coefficients": torch.zeros(7)}, "coefficients"),
        ({"coefficients": torch.zeros(3, 8)}, "coefficients"),
        ({"coefficients": torch.zeros(3, 12)}, "coefficients"),
        ({"coefficients": torch.zeros(9)}, r"shape \(8,\), \(1, 8\) or \(2, 8\) for 2 samples, or 12 instead of 8"),
        ({"coefficients": torch.zeros(8).double()}, "coefficients"),
        ({"coefficients": None}, "coefficients"),
        ({"coefficients": [1.0, 2.0]}, "coefficients"),
        ({"model_output": 1.0}, "model_output must be a tensor"),
        ({"noise": ("seed", range(2), 0)}, "seed"),
        ({"noise": (0, range(2), 1.5)}, "step"),
        ({"pool": 3}, "pool"),
        ({"pool": 0}, "pool"),
        ({"pool": 2.0}, "pool"),
        ({"out": torch.zeros(2, 1, 4, 5)}, "out"),
        ({"out": torch.zeros(2, 1, 4, 8)[..., ::2]}, "out must be laid out like x"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    x = torch.zeros(2, 1, 4, 4)
    arguments = {"x": x, "model_output": x, "coefficients": StepCoefficients(1, 1, 1), **changes}
    with pytest.raises(InputError, match=message):
        sampler_step(**arguments)


def test_columns_of_a_table():
    plain = StepCoefficients(1, 2, 3)
    for change in ({"c_g": 0.5}, {"s_0": 0.0}, {"s_x": 1.0}, {"s_m": 1.0}):
        step = dataclasses.replace(plain, **change)
        assert step.extended and not plain.extended
        assert coefficient_table([plain]).shape == (1, 8) and coefficient_table([]).shape == (0, 8)
        assert coefficient_table([plain, step]).tolist()[1] == [getattr(step, name) for name in EXTENDED_COEFFICIENTS]
        with pytest.raises(InputError, match="extended must not be False: step 1"):
            coefficient_table([plain, step], extended=False)
    assert coefficient_table([plain], extended=True).tolist() == [[1, 2, torch.inf, 3, 0, 0, 0, 0, 0, 1, 0, 0]]
    with pytest.raises(InputError, match="extended must be True or False"):
        coefficient_table([plain], extended="no")


def test_a_launcher_refuses_a_history_without_a_weight():
    x = torch.zeros(2, 3, 4, 4)
    arguments = (x, x, torch.zeros(1, 8), None, x, None, None, 0, 0, None, 0, "cpu", x.clone(), None, None, None)
    with pytest.raises(RuntimeError, match="history needs a table of 12 columns"):
        OP(*arguments)


def test_a_negative_clip_is_refused():
    with pytest.raises(InputError, match="clip must not be negative"):
        StepCoefficients(1, 1, 1, clip=-1.0)


def test_out_may_not_overlap():
    memory = torch.zeros(3, 1, 4, 4)
    with pytest.raises(InputError, match="out overlaps x"):
        sampler_step(memory[:2], torch.zeros(2, 1, 4, 4), StepCoefficients(1, 1, 1), out=memory[1:])
    half = memory[:2].view(torch.float16).view(-1)[:32].view(2, 1, 4, 4)
    with pytest.raises(InputError, match="out overlaps model_output"):
        sampler_step(torch.zeros(2, 1, 4, 4), half, StepCoefficients(1, 1, 1), out=memory[:2])


def test_the_tensor_for_the_average_stands_alone():
    x, m, c = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), StepCoefficients(1, 1, 1)
    for tensor, name in ((x, "x"), (m, "model_output")):
        with pytest.raises(InputError, match=f"second tensor overlaps {name}"):
            sampler_step(x, m, c, pool=2, out=(torch.zeros(1, 1, 4, 4), tensor.view(-1)[4:8].view(1, 1, 2, 2)))
    y = torch.zeros(1, 1, 4, 4)
    with pytest.raises(InputError, match="second tensor overlaps the first"):
        sampler_step(x, m, c, pool=2, out=(y, y.view(-1)[12:].view(1, 1, 2, 2)))
    for wrong in ((y,), (y, y, y), (y, 1.0), ((y, y), y)):
        with pytest.raises(InputError, match="out must be"):
            sampler_step(x, m, c, pool=2, out=wrong)
    with pytest.raises(RuntimeError, match="no gradient"):
        sampler_step(x, m, c, pool=2, out=(y, torch.zeros(1, 1, 2, 2, requires_grad=True)))


def test_no_gradient():
    x = torch.zeros(1, 1, 4, 4)
    leaf = x.clone().requires_grad_()
    for changes in ({"x": leaf}, {"previous_x0": leaf}, {"history": leaf}, {"out": x.clone()}, {"x0": x.clone()}):
        arguments = {"x": x, "model_output": leaf, "coefficients": StepCoefficients(1, 1, 1, s_x=1.0), **changes}
        with pytest.raises(RuntimeError, match="no gradient"):
            sampler_step(**arguments)
        with torch.no_grad():
            sampler_step(**arguments)


def test_no_gradient_is_lost_in_out_or_in_a_table():
    x, c = torch.zeros(1, 1, 4, 4), StepCoefficients(1, 1, 1)
    leaf = x.clone().requires_grad_()
    for changes in ({"out": leaf}, {"out": 3 * leaf}, {"coefficients": coefficient_table([c]).requires_grad_()}):
        with pytest.raises(RuntimeError, match="no gradient"):
            sampler_step(**{"x": x, "model_output": x, "coefficients": c, **changes})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_step_into_a_tensor_that_autograd_has_saved_is_noticed(backend):
    x = torch.zeros(1, 1, 4, 4)
    for results in ({"x": "out"}, {"previous_x0": "x0"}):
        w, y = torch.ones(1, 1, 4, 4, requires_grad=True), torch.full((1, 1, 4, 4), 2.0)
        loss = (w * y).sum()
        with torch.no_grad():
            given = {"x": x, **dict.fromkeys((*results, *results.values()), y)}
            sampler_step(model_output=x, coefficients=StepCoefficients(1, 0, 0.25), backend=backend, **given)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_any_stride(device):
    x, m, *_ = make((4, 1, 3, 5), device=device)
    indices = torch.arange(4, device=device)
    for backend in ("reference", *fast_backends(device)):
        options = {"coefficients": StepCoefficients(0, 0, 0, c_z=1.0), "backend": backend}
        for steps in (torch.arange(8, device=device)[::2], torch.tensor(5, device=device).expand(4)):
            found, _, _ = sampler_step(x, m, noise=(1, indices, steps), **options)
            for i in range(4):
                single = (1, indices[i : i + 1], int(steps[i]))
                wanted, _, _ = sampler_step(x[i : i + 1], m[i : i + 1], noise=single, **options)
                assert torch.equal(found[i], wanted[0])


def test_rows_are_kept_by_their_step_alone():
    from torch._subclasses.fake_tensor import FakeTensorMode

    c = StepCoefficients(1.0, 0.5, 2.0)
    with FakeTensorMode():
        assert sampler_step(torch.zeros(1, 4), torch.zeros(1, 4), c)[0].shape == (1, 4)
    with torch.inference_mode():
        sampler_step(torch.zeros(1, 4), torch.zeros(1, 4), c)
    x = torch.ones(1, 4)
    assert torch.equal(sampler_step(x, x, c)[0], torch.full((1, 4), 3.0))
    assert c.row(x.device, x.dtype) is c.row(x.device, x.dtype) and not c.row(x.device, x.dtype).is_inference()
    assert pickle.loads(pickle.dumps(c)) == c and "_rows" not in pickle.loads(pickle.dumps(c)).__dict__


@pytest.mark.parametrize("other", DEFAULTS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_torch_defaults_change_nothing(backend, other):
    """Neither the results nor the cached row that a first step under them leaves behind."""
    x, m, previous, *_ = make((2, 3, 8, 8))
    options = {"previous_x0": previous, "noise": (3, range(2), 5), "pool": 2, "return_x0": True, "backend": backend}

    def results(coefficients):
        return [*sampler_step(x, m, coefficients, **options), coefficient_table([coefficients] * 2)]

    wanted = results(COEFFICIENTS)
    fresh = pickle.loads(pickle.dumps(COEFFICIENTS))
    with other_default(other), torch.inference_mode():
        found = results(fresh)
    for a, b in zip([*found, *results(fresh)], [*wanted, *wanted], strict=True):
        assert (a.device, a.dtype) == (b.device, b.dtype) and torch.equal(a, b)
    row = fresh.row(x.device, x.dtype)
    assert row.device.type == "cpu" and not row.is_inference()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_one_launch_per_step(backend):
    x, m, *_ = make((2, 3, 64, 64), device="cuda")
    row, indices = coefficient_table([COEFFICIENTS], "cuda"), torch.arange(2, device="cuda")
    options = {
        "noise": (3, indices, torch.tensor([4], device="cuda")),
        "pool": 4,
        "return_x0": True,
        "out": x,
        "backend": backend,
    }
    sampler_step(x, m, row, **options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sampler_step(x, m, row, **options)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, [kernel.name for kernel in kernels]


def test_a_backend_by_name_runs_or_raises():
    x = torch.zeros(1, 1, 4, 4)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError):
            sampler_step(x, x, StepCoefficients(1, 1, 1), backend="cuda")
    assert registry.choose("sampler_step", "auto", torch.device("cpu")) == "cpu"
