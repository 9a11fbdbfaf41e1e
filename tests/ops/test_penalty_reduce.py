"""Parity of every backend of the penalty's reduction, its accuracy, its three modes, and refusals."""

import pytest
import torch

from advkd.errors import InputError
from advkd.ops import penalty_reduce
from advkd.ops.penalty_reduce import MODES

from .each_backend import DEVICES, DTYPES, LAUNCH, cases, fast_backends
from .training_cases import check


def make(shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cases("penalty_reduce"), ids=str)
def test_parity(case, device):
    for backend in fast_backends("penalty_reduce", device):
        launch = LAUNCH["penalty_reduce"][backend]
        check("penalty_reduce", case, launch, device, truncates=backend == "triton" and device == "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_penalty_and_its_derivative(mode, device):
    """Compared with autograd in float64; the first sample is below the target, the last ones above."""
    g = (make((3, 2, 4, 5)) * torch.tensor([0.01, 1.0, 5.0]).view(3, 1, 1, 1)).to(device)
    leaf = g.double().requires_grad_()
    norm = leaf.flatten(1).norm(dim=1)
    excess = {"two-sided": norm - 2.0, "one-sided": (norm - 2.0).relu(), "r1": norm / 2**0.5}[mode]
    wanted = 7.0 / 3 * excess.square()
    (derivative,) = torch.autograd.grad(wanted.sum(), leaf)
    for backend in ("reference", *fast_backends("penalty_reduce", device)):
        penalties, v = penalty_reduce(g, target=2.0, weight=7.0, mode=mode, backend=backend)
        assert penalties.dtype == torch.float32 and penalties.shape == (3,)
        torch.testing.assert_close(penalties.double(), wanted.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(v.double(), derivative, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_zero(dtype, mode, device):
    g = make((3, 5, 7), dtype, device)
    g[1] = 0
    for backend in ("reference", *fast_backends("penalty_reduce", device)):
        penalties, v = penalty_reduce(g, target=2.0, weight=3.0, mode=mode, backend=backend)
        assert penalties[1] == (4 if mode == "two-sided" else 0)
        assert (v[1] == 0).all() and torch.isfinite(v).all() and (v[0] != 0).any()


@pytest.mark.parametrize("device", DEVICES)
def test_one_sided_below_the_target(device):
    g = make((2, 100), device=device) * 1e-3
    for backend in ("reference", *fast_backends("penalty_reduce", device)):
        penalties, v = penalty_reduce(g, mode="one-sided", backend=backend)
        assert (penalties == 0).all() and (v == 0).all()


def test_accurate_for_millions_of_elements():
    """Twelve million small squares and a large one that would absorb each in float32: rounding does not grow."""
    g = torch.full((1, 3, 2000, 2001), 0.1)
    g[0, 0, 0, 0] = 300.0
    exact = g.double().square().sum()
    for backend in fast_backends("penalty_reduce", "cpu"):
        penalties, _ = penalty_reduce(g, weight=2.0, mode="r1", out=g.clone(), backend=backend)
        assert abs(penalties.double() - exact) <= 4 * 2.0**-24 * exact


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(value):
    for backend in ("reference", *fast_backends("penalty_reduce", "cpu")):
        g = make((3, 9))
        g[1, 4] = value
        penalties, v = penalty_reduce(g, backend=backend)
        assert penalties.isfinite().tolist() == [True, False, True] and v.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    g = make((2, 3, 5, 7), device=device)
    last, wide = g.contiguous(memory_format=torch.channels_last), torch.stack((g, g), -1)[..., 0]
    for backend in ("reference", *fast_backends("penalty_reduce", device)):
        penalties, v = penalty_reduce(g, backend=backend)
        strided = penalty_reduce(wide, backend=backend)
        assert torch.equal(strided[0], penalties) and torch.equal(strided[1], v) and strided[1].is_contiguous()
        found = penalty_reduce(last, backend=backend)
        assert found[1].stride() == last.stride()
        # The order of the sum differs.
        torch.testing.assert_close(found[0], penalties, rtol=1e-5, atol=0)
        torch.testing.assert_close(found[1], v, rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_and_in_place(dtype, device):
    # Samples of which each thread takes whole ones, and larger ones that are cut.
    for shape in ((40, 33), (2, 3, 200, 301)):
        g = make(shape, dtype, device)
        for backend in ("reference", *fast_backends("penalty_reduce", device)):
            penalties, wanted = penalty_reduce(g, backend=backend)
            out, same = torch.full_like(g, torch.nan), g.clone()
            for given, place in ((g, out), (same, same)):
                found, v = penalty_reduce(given, out=place, backend=backend)
                assert v is place and torch.equal(v, wanted) and torch.equal(found, penalties)


def test_a_sample_does_not_depend_on_its_neighbours():
    g = make((24, 3, 40, 41))
    for backend in fast_backends("penalty_reduce", "cpu"):
        penalties, v = penalty_reduce(g, weight=24.0, backend=backend)
        alone, part = penalty_reduce(g[5:6], weight=1.0, backend=backend)
        assert torch.equal(alone, penalties[5:6]) and torch.equal(part, v[5:6])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0)], ids=str)
def test_empty(shape, device):
    g = torch.zeros(shape, device=device)
    for backend in ("reference", *fast_backends("penalty_reduce", device)):
        penalties, v = penalty_reduce(g, target=2.0, weight=1.0, backend=backend)
        assert penalties.tolist() == [2.0] * shape[0] and v.shape == shape


def test_float64_is_the_references():
    g = make((2, 9), torch.float64)
    penalties, _ = penalty_reduce(g)
    assert penalties.dtype == torch.float64 and torch.equal(penalties, 5 * (g.norm(dim=1) - 1).square())
    with pytest.raises(InputError, match="float32, bfloat16 and float16"):
        penalty_reduce(g, backend="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"g": [1.0]}, "g must be"),
        ({"g": torch.zeros(2, 9).int()}, "g must be"),
        ({"g": torch.zeros(())}, r"g must have shape \(N, \.\.\.\)"),
        ({"mode": "r2"}, "mode must be one of two-sided, one-sided, r1"),
        ({"out": torch.zeros(2, 10)}, "out must be like g"),
        ({"out": torch.zeros(2, 9).half()}, "out must be like g"),
        ({"out": torch.zeros(2, 9, device="meta")}, "out must be like g"),
        ({"out": torch.zeros(2, 18)[:, ::2]}, "out must be laid out like g"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        penalty_reduce(**{"g": torch.zeros(2, 9), **changes})


def test_no_gradient():
    g = make((2, 9))
    for backend in ("reference", "cpu"):
        for arguments in ({"g": g.clone().requires_grad_()}, {"g": g, "out": 2 * g.clone().requires_grad_()}):
            with pytest.raises(RuntimeError, match="no gradient"):
                penalty_reduce(**arguments, backend=backend)
            with torch.no_grad():
                penalty_reduce(**arguments, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    g = make((2, 3, 5, 7))
    for mode in range(3):
        arguments = (g, 1.0, 10.0, mode, backend, torch.empty_like(g), torch.empty(2))
        torch.library.opcheck(torch.ops.advkd.penalty_reduce.default, arguments)


@pytest.mark.slow
def test_more_elements_than_a_32_bit_number():
    g = torch.ones(3, 2**15, 22000, dtype=torch.bfloat16)
    assert g.numel() > 2**31
    count = g[0].numel()
    g[2] = 2
    penalties, v = penalty_reduce(g, weight=6.0, mode="r1", out=g, backend="cpu")
    assert penalties.tolist() == [count, count, 4 * count] and v[0, 0, 0] == 2 and v[2, -1, -1] == 4
