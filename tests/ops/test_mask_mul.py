"""Parity of every backend of the product with a mask, its layouts and refusals; and bits of all kernels of its kind."""

import pytest
import torch

from advkd.errors import InputError
from advkd.ops import mask_mul
from advkd.ops.mask_mul import mask_bytes, pack, unpack

from ..conftest import fork
from .each_backend import DEVICES, DTYPES, LAUNCH, cases, digest, fast_backends, results, threads
from .training_cases import check

SLOPE = 0.2


def make(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    bits = torch.randn(shape[0], x[0].numel(), generator=generator).to(device) > 0
    return x, bits, pack(bits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cases("mask_mul"), ids=str)
def test_parity(case, device):
    for backend in fast_backends("mask_mul", device):
        check("mask_mul", case, LAUNCH["mask_mul"][backend], device, truncates=backend == "triton" and device == "cpu")


def test_the_compiled_backends_are_there():
    # The tests run on a built checkout; a missing extension must not pass as "nothing to compare".
    for name in LAUNCH:
        assert "cpu" in fast_backends(name, "cpu")


def test_bit_i_of_byte_j_is_element_8_j_plus_i():
    mask = torch.tensor([[0b00000101, 0b10]], dtype=torch.uint8)
    assert unpack(mask, 10).nonzero()[:, 1].tolist() == [0, 2, 9] and torch.equal(pack(unpack(mask, 10)), mask)
    for backend in ("reference", *fast_backends("mask_mul", "cpu")):
        found = mask_mul(torch.ones(1, 10), mask, 0.0, backend=backend)
        assert found[0].tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    x, bits, mask = make((2, 3, 5, 7), device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    wide = torch.stack((x, x), -1)[..., 0]
    for backend in ("reference", *fast_backends("mask_mul", device)):
        contiguous = mask_mul(x, mask, SLOPE, backend=backend)
        assert torch.equal(contiguous, torch.where(bits.view_as(x), x, SLOPE * x))
        # Another layout is copied to a contiguous one.
        strided = mask_mul(wide, mask, SLOPE, backend=backend)
        assert strided.is_contiguous() and torch.equal(strided, contiguous)
        # The mask follows memory, not the logical order.
        found = mask_mul(last, mask, SLOPE, backend=backend)
        wanted = torch.where(bits.view(2, 5, 7, 3).permute(0, 3, 1, 2), x, SLOPE * x)
        assert found.stride() == last.stride() and torch.equal(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_and_in_place(dtype, device):
    x, _, mask = make((3, 5, 9), dtype, device)
    for backend in ("reference", *fast_backends("mask_mul", device)):
        wanted = mask_mul(x, mask, SLOPE, backend=backend)
        out, same = torch.full_like(x, torch.nan), x.clone()
        assert mask_mul(x, mask, SLOPE, out=out, backend=backend) is out and torch.equal(out, wanted)
        assert mask_mul(same, mask, SLOPE, out=same, backend=backend) is same and torch.equal(same, wanted)
        assert torch.equal(mask_mul(x, mask, SLOPE, backend=backend), wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0), (2, 3, 0, 4)], ids=str)
def test_empty(shape, device):
    x = torch.zeros(shape, device=device)
    mask = torch.zeros(shape[0], mask_bytes(x), dtype=torch.uint8, device=device)
    for backend in ("reference", *fast_backends("mask_mul", device)):
        assert mask_mul(x, mask, SLOPE, backend=backend).shape == shape


def test_float64_is_the_references():
    x, bits, mask = make((2, 9), torch.float64)
    assert torch.equal(mask_mul(x, mask, SLOPE), torch.where(bits, x, SLOPE * x))
    with pytest.raises(InputError, match="float32, bfloat16 and float16"):
        mask_mul(x, mask, SLOPE, backend="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [1.0]}, "x must be"),
        ({"x": torch.zeros(2, 9).int()}, "x must be"),
        ({"mask": torch.zeros(2, 3, dtype=torch.uint8)}, r"mask must be contiguous uint8 \(2, 2\)"),
        ({"mask": torch.zeros(1, 2, dtype=torch.uint8)}, "mask must be"),
        ({"mask": torch.zeros(2, 2)}, "mask must be"),
        ({"mask": torch.zeros(2, 4, dtype=torch.uint8)[:, ::2]}, "mask must be"),
        ({"mask": torch.zeros(2, 2, dtype=torch.uint8, device="meta")}, "mask must be .* on cpu"),
        ({"out": torch.zeros(2, 10)}, "out must be like x"),
        ({"out": torch.zeros(2, 9).half()}, "out must be like x"),
        ({"out": torch.zeros(2, 9, device="meta")}, "out must be like x"),
        ({"out": torch.zeros(2, 18)[:, ::2]}, "out must be laid out like x"),
        ({"out": torch.zeros(1, 9).expand(2, 9)}, "out must be laid out like x"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"x": torch.zeros(2, 9), "mask": torch.zeros(2, 2, dtype=torch.uint8), "slope": SLOPE, **changes}
    with pytest.raises(InputError, match=message):
        mask_mul(**arguments)


def test_no_gradient():
    x, _, mask = make((2, 9))
    leaf = x.clone().requires_grad_()
    for backend in ("reference", "cpu"):
        for arguments in ((leaf, mask, SLOPE), (x, mask, SLOPE)):
            with pytest.raises(RuntimeError, match="no gradient"):
                mask_mul(*arguments, out=None if arguments[0] is leaf else 2 * leaf, backend=backend)
        with torch.no_grad():
            mask_mul(leaf, mask, SLOPE, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    x, _, mask = make((2, 3, 5, 7))
    torch.library.opcheck(torch.ops.advkd.mask_mul.default, (x, mask, SLOPE, backend, torch.empty_like(x)))


@pytest.mark.parametrize("name", LAUNCH)
def test_threads_and_repetition_do_not_change_bits(name):
    for case in cases(name):
        with threads(1):
            expected = results(name, case)
        for number in (2, 3, 3):
            with threads(number):
                found = results(name, case)
            assert all(map(torch.equal, found, expected)), str(case)


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_instruction_set_gives_the_same_bits(level):
    """Covers all kernels of a critic's update."""
    code = "from tests.ops.each_backend import digest; print(digest())"
    result = fork("-c", code, environment={"ADVKD_ISA": level}).finish(60)
    assert result.stdout.strip() == digest(), result.stderr


@pytest.mark.slow
def test_more_elements_than_a_32_bit_number():
    x = torch.ones(3, 2**15, 22000, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    mask = torch.full((3, mask_bytes(x)), 0xFF, dtype=torch.uint8)
    mask[2, -1] = 0x7F
    mask_mul(x, mask, 0.5, out=x, backend="cpu")
    assert x[0, 0, 0] == 1 and x[2, -1, -2] == 1 and x[2, -1, -1] == 0.5
