"""Parity of every backend of the points between samples, the weights it draws, merging, and refusals."""

import pytest
import torch

from advkd.errors import InputError
from advkd.ops import interpolate, philox_uniform

from ..conftest import DEFAULTS, other_default
from .each_backend import DEVICES, DTYPES, LAUNCH, cases, fast_backends
from .training_cases import check

SEED, STEP = 2**63 + 5, 9


def make(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(4)
    real, fake = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return real, fake, torch.rand(shape[0], generator=generator).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cases("interpolate"), ids=str)
def test_parity(case, device):
    for backend in fast_backends("interpolate", device):
        check("interpolate", case, LAUNCH["interpolate"][backend], device, truncates=backend == "triton" and device == "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_drawn_weights_are_the_stream_of_interpolation(device):
    """Between ones and zeros the point equals the weight, which depends on seed, index and step alone."""
    indices = torch.tensor([0, 7, 2**33 + 1, 2**62], device=device)
    real, fake = torch.ones(4, 3, 5, device=device), torch.zeros(4, 3, 5, device=device)
    uniform = philox_uniform(SEED, indices, stream="interpolation", step=STEP)
    wanted = uniform[:, None, None].expand(4, 3, 5)
    assert 0 < uniform.min() < uniform.max() < 1
    steps = torch.tensor([STEP, 0, STEP, 2**24 - 1], device=device)
    single = [philox_uniform(SEED, indices[i : i + 1], stream="interpolation", step=int(s)) for i, s in enumerate(steps)]
    for backend in ("reference", *fast_backends("interpolate", device)):
        for step in (STEP, torch.tensor([STEP], device=device), torch.tensor(STEP, device=device)):
            assert torch.equal(interpolate(real, fake, (SEED, indices, step), backend=backend), wanted)
        part = interpolate(real[2:], fake[2:], (SEED, indices[2:], STEP), backend=backend)
        assert torch.equal(part, wanted[2:])
        each = interpolate(real, fake, (SEED, indices, steps), backend=backend)
        assert torch.equal(each[:, 0, 0], torch.cat(single))


def test_a_range_of_indices():
    real, fake, _ = make((3, 5))
    drawn = philox_uniform(SEED, range(40, 43), stream="interpolation", step=STEP)
    for backend in ("reference", *fast_backends("interpolate", "cpu")):
        found = interpolate(real, fake, (SEED, range(40, 43), STEP), backend=backend)
        assert torch.equal(found, interpolate(real, fake, drawn, backend=backend))


@pytest.mark.parametrize("other", DEFAULTS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_torch_defaults_change_nothing(backend, other):
    real, fake, a = make((3, 5))
    for weights in (a, (SEED, range(40, 43), STEP), (SEED, torch.arange(3), torch.tensor([STEP]))):
        before = interpolate(real, fake, weights, merge=True, backend=backend)
        with other_default(other):
            after = interpolate(real, fake, weights, merge=True, backend=backend)
        assert (after.device, after.dtype) == (before.device, before.dtype) and torch.equal(after, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged(dtype, device):
    real, fake, a = make((3, 2, 5, 7), dtype, device)
    real[0, 0, 0, 0] = torch.nan
    for layout in (torch.contiguous_format, torch.channels_last):
        x, y = (t.contiguous(memory_format=layout) for t in (real, fake))
        for backend in ("reference", *fast_backends("interpolate", device)):
            points = interpolate(x, y, a, backend=backend)
            merged = interpolate(x, y, a, merge=True, backend=backend)
            assert merged.shape == (9, 2, 5, 7) and merged.is_contiguous(memory_format=layout)
            for part, wanted in zip(merged.split(3), (x, y, points), strict=True):
                torch.testing.assert_close(part, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    real, fake, a = make((2, 3, 5, 7), device=device)
    wide = torch.stack((real, real), -1)[..., 0]
    last = real.contiguous(memory_format=torch.channels_last)
    for backend in ("reference", *fast_backends("interpolate", device)):
        wanted = interpolate(real, fake, a, backend=backend)
        for x, layout in ((wide, torch.contiguous_format), (last, torch.channels_last)):
            # A generated sample of another layout is copied to the real one's.
            found = interpolate(x, fake, a, backend=backend)
            assert torch.equal(found, wanted) and found.is_contiguous(memory_format=layout)
        weights = torch.stack((a, a), -1)[:, 0]
        assert torch.equal(interpolate(real, fake, weights, backend=backend), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_the_ends_are_exact(device):
    real, fake, _ = make((2, 11), device=device)
    for backend in ("reference", *fast_backends("interpolate", device)):
        found = interpolate(real, fake, torch.tensor([0.0, 1.0], device=device), backend=backend)
        assert torch.equal(found[0], fake[0]) and torch.equal(found[1], real[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0)], ids=str)
def test_empty(shape, device):
    x = torch.zeros(shape, device=device)
    for backend in ("reference", *fast_backends("interpolate", device)):
        assert interpolate(x, x, torch.zeros(shape[0], device=device), backend=backend).shape == shape
        found = interpolate(x, x, (0, range(shape[0]), 0), merge=True, backend=backend)
        assert found.shape == (3 * shape[0], *shape[1:])


def test_float64_is_the_references():
    real, fake, a = (t.double() for t in make((2, 9)))
    assert torch.equal(interpolate(real, fake, a), a[:, None] * real + (1 - a[:, None]) * fake)
    with pytest.raises(InputError, match="float32, bfloat16 and float16"):
        interpolate(real, fake, a, backend="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"real": [1.0]}, "real must be"),
        ({"real": torch.zeros(2, 9).int()}, "real must be"),
        ({"fake": torch.zeros(2, 8)}, "fake must be like real"),
        ({"fake": torch.zeros(2, 9).half()}, "fake must be like real"),
        ({"fake": torch.zeros(2, 9, device="meta")}, "fake must be like real"),
        ({"a": torch.zeros(3)}, r"a must be \(2,\) torch.float32 on cpu"),
        ({"a": torch.zeros(2, 1)}, "a must be"),
        ({"a": torch.zeros(2).double()}, "a must be"),
        ({"a": torch.zeros(2).half()}, "a must be"),
        ({"a": torch.zeros(2, device="meta")}, "a must be"),
        ({"a": 0.5}, "a must be"),
        ({"a": (0, range(2))}, "a must be a tensor or"),
        ({"a": (0, range(3), 0)}, "a has 3 sample indices for 2 samples"),
        ({"a": (-1, range(2), 0)}, "seed"),
        ({"a": (0, torch.zeros(2), 0)}, "indices"),
        ({"a": (0, range(2), 2**24)}, "step"),
        ({"a": (0, range(2), torch.tensor([2**24]))}, "step"),
        ({"a": (0, range(2), torch.zeros(3).long())}, "step"),
        ({"a": (0, range(2), torch.zeros(2))}, "step"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"real": torch.zeros(2, 9), "fake": torch.zeros(2, 9), "a": torch.zeros(2), **changes}
    with pytest.raises(InputError, match=message):
        interpolate(**arguments)


def test_no_gradient():
    for i in range(3):
        tensors = list(make((2, 9)))
        tensors[i].requires_grad_()
        for backend in ("reference", "cpu"):
            with pytest.raises(RuntimeError, match="no gradient"):
                interpolate(*tensors, backend=backend)
            with torch.no_grad():
                interpolate(*tensors, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    real, fake, a = make((2, 3, 5, 7))
    op, drawn = torch.ops.advkd.interpolate.default, (torch.arange(2), 1, 2)
    torch.library.opcheck(op, (real, fake, a, None, 0, 0, None, backend, torch.empty_like(real)))
    torch.library.opcheck(op, (real, fake, None, *drawn, None, backend, torch.empty(6, 3, 5, 7)))
    torch.library.opcheck(op, (real, fake, None, *drawn, torch.tensor([3, 4]), backend, torch.empty(6, 3, 5, 7)))


@pytest.mark.slow
def test_more_elements_than_a_32_bit_number():
    x = torch.ones(3, 2**15, 22000, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[2, -1, -1] = 3
    found = interpolate(x, x, torch.tensor([0.5, 0.25, 0.5]), backend="cpu")
    assert torch.equal(found, x)
