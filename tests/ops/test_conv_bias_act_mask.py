"""Parity of every backend of a convolution's epilogue, its mask, layouts, and refusals."""

import pytest
import torch

from advkd.errors import InputError
from advkd.ops import conv_bias_act_mask, mask_mul
from advkd.ops.conv_bias_act_mask import bias_act_mask
from advkd.ops.mask_mul import mask_bytes, unpack

from .each_backend import DEVICES, DTYPES, LAUNCH, cases, fast_backends
from .training_cases import check

SLOPE = 0.2


def make(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    p, bias = (torch.randn(s, generator=generator).to(device, dtype) for s in (shape, shape[1:2]))
    return p, bias


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cases("conv_bias_act_mask"), ids=str)
def test_parity(case, device):
    for backend in fast_backends("conv_bias_act_mask", device):
        launch = LAUNCH["conv_bias_act_mask"][backend]
        check("conv_bias_act_mask", case, launch, device, truncates=backend == "triton" and device == "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_nan_are_not_positive(dtype, device):
    # Positive, both zeros, a bias that cancels, NaN, infinities, the smallest subnormal number.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = [2.0, 0.0, -0.0, -1.0, torch.nan, torch.inf, -torch.inf, smallest, -smallest]
    p = torch.tensor([values], dtype=dtype, device=device)
    bias = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=dtype, device=device)
    for backend in ("reference", *fast_backends("conv_bias_act_mask", device)):
        out, mask = bias_act_mask(p, bias, SLOPE, backend=backend)
        assert mask.tolist() == [[0b10100001, 0]]
        assert torch.equal(out.isnan(), p.isnan()) and out[0, 5] == torch.inf and out[0, 6] == -torch.inf
        # Without a bias a zero keeps its sign.
        out, mask = bias_act_mask(p, None, SLOPE, backend=backend)
        assert mask.tolist() == [[0b10100001, 0]] and out[0, 1:3].signbit().tolist() == [False, True]


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    p, bias = make((2, 3, 5, 7), device=device)
    last, wide = p.contiguous(memory_format=torch.channels_last), torch.stack((p, p), -1)[..., 0]
    for backend in ("reference", *fast_backends("conv_bias_act_mask", device)):
        y = p + bias[:, None, None]
        wanted = torch.where(y > 0, y, SLOPE * y)
        for given, order in ((p, (0, 1, 2, 3)), (last, (0, 2, 3, 1)), (wide, (0, 1, 2, 3))):
            out, mask = bias_act_mask(given, bias, SLOPE, backend=backend)
            assert torch.equal(out, wanted) and out.is_contiguous(memory_format=layout_of(given))
            assert torch.equal(unpack(mask, 105), (y > 0).permute(order).reshape(2, -1))


def layout_of(x):
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


@pytest.mark.parametrize("device", DEVICES)
def test_out_and_fresh(device):
    p, bias = make((2, 3, 5, 7), device=device)
    for backend in ("reference", *fast_backends("conv_bias_act_mask", device)):
        wanted, bits = bias_act_mask(p, bias, SLOPE, backend=backend)
        out, same, fresh = torch.full_like(p, torch.nan), p.clone(), p.clone()
        for given, options in ((p, {"out": out}), (same, {"out": same}), (fresh, {"fresh": True})):
            found, mask = bias_act_mask(given, bias, SLOPE, backend=backend, **options)
            assert found is options.get("out", fresh) and torch.equal(found, wanted) and torch.equal(mask, bits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_convolution(last, device):
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 4, 9, 8, generator=generator).to(device).contiguous(memory_format=layout)
    weight, bias = (torch.randn(s, generator=generator).to(device) for s in ((6, 2, 3, 3), (6,)))
    for b in (bias, None):
        options = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": 2}
        before = torch.nn.functional.conv2d(x.double(), weight.double(), None if b is None else b.double(), **options)
        for backend in ("reference", *fast_backends("conv_bias_act_mask", device)):
            a, mask = conv_bias_act_mask(x, weight, b, slope=SLOPE, backend=backend, **options)
            assert (a - torch.nn.functional.leaky_relu(before, SLOPE)).abs().max() < 1e-5 and a.dtype == torch.float32
            assert mask.shape == (2, mask_bytes(a)) and mask.device.type == device
            # The mask and the activation agree element for element: LeakyReLU keeps signs.
            ones = mask_mul(torch.ones_like(a), mask, 0.0, backend="reference")
            assert torch.equal(ones.bool(), a > 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape, device):
    p, bias = make(shape, device=device)
    for backend in ("reference", *fast_backends("conv_bias_act_mask", device)):
        out, mask = bias_act_mask(p, bias, SLOPE, backend=backend)
        assert out.shape == shape and mask.shape == (shape[0], mask_bytes(p))
    x, weight = torch.zeros(0, 3, 8, 8, device=device), torch.zeros(5, 3, 3, 3, device=device)
    assert conv_bias_act_mask(x, weight)[0].shape == (0, 5, 6, 6)


def test_float64_is_the_references():
    p, bias = make((2, 3, 5, 7), torch.float64)
    out, _ = bias_act_mask(p, bias, SLOPE)
    assert torch.equal(out, torch.nn.functional.leaky_relu(p + bias[:, None, None], SLOPE))
    with pytest.raises(InputError, match="float32, bfloat16 and float16"):
        bias_act_mask(p, bias, SLOPE, backend="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 2, 4, 4).int()}, "x must be"),
        ({"x": torch.zeros(2, 4, 4)}, r"x must be \(N, C, H, W\)"),
        ({"x": torch.zeros(1, 3, 4, 4)}, r"x must be \(N, C, H, W\)"),
        ({"weight": torch.zeros(3, 2, 3)}, "weight"),
        ({"weight": torch.zeros(3, 2, 3, 3).half()}, "weight must be torch.float32 on cpu"),
        ({"weight": torch.zeros(3, 2, 3, 3, device="meta")}, "weight must be torch.float32 on cpu"),
        ({"bias": torch.zeros(3).bfloat16()}, "bias must be torch.float32 on cpu"),
        ({"bias": torch.zeros(3, device="meta")}, "bias must be torch.float32 on cpu"),
        ({"bias": torch.zeros(2)}, r"bias must be \(3,\)"),
        ({"groups": 2}, "groups 2"),
        ({"groups": 2, "weight": torch.zeros(3, 1, 3, 3)}, "weight must have a multiple of groups, 2"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"x": torch.zeros(1, 2, 4, 4), "weight": torch.zeros(3, 2, 3, 3), "bias": torch.zeros(3), **changes}
    with pytest.raises(InputError, match=message):
        conv_bias_act_mask(**arguments)


def test_the_kernel_refuses_what_does_not_fit():
    p, bias = make((2, 3, 5, 7))
    for wrong in (
        torch.zeros(2, 3, 5, 8),
        torch.zeros(2, 3, 5, 7).half(),
        p.mT,
        p.contiguous(memory_format=torch.channels_last),
    ):
        with pytest.raises(InputError, match="out must be"):
            bias_act_mask(p, bias, SLOPE, out=wrong)
    for wrong in (bias[:2], bias.half(), bias[:, None], torch.zeros(6)[::2]):
        with pytest.raises(RuntimeError, match="bias must be contiguous"):
            bias_act_mask(p, wrong, SLOPE, backend="cpu")
    launch = LAUNCH["conv_bias_act_mask"]["cpu"]
    for wrong in (torch.zeros(2, 13, dtype=torch.uint8), torch.zeros(2, 14), torch.zeros(1, 14, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="mask must be contiguous uint8"):
            launch(p, bias, SLOPE, torch.empty_like(p), wrong)


def test_no_gradient():
    p, bias = make((2, 3, 5, 7))
    for arguments in ((p.clone().requires_grad_(), bias), (p, bias.clone().requires_grad_())):
        for backend in ("reference", "cpu"):
            with pytest.raises(RuntimeError, match="no gradient"):
                bias_act_mask(*arguments, SLOPE, backend=backend)
            with torch.no_grad():
                bias_act_mask(*arguments, SLOPE, backend=backend)
    with pytest.raises(RuntimeError, match="no gradient"):
        conv_bias_act_mask(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 3, 3, requires_grad=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    p, bias = make((2, 3, 5, 7))
    for b in (bias, None):
        arguments = (p, b, SLOPE, backend, torch.empty_like(p), torch.empty(2, 14, dtype=torch.uint8))
        torch.library.opcheck(torch.ops.advkd.conv_bias_act_mask.default, arguments)


@pytest.mark.slow
def test_more_elements_than_a_32_bit_number():
    p = torch.ones(1, 3, 2**15, 22000, dtype=torch.bfloat16)
    assert p.numel() > 2**31
    p[0, -1, -1, -1] = -1
    bias = torch.tensor([1.0, 2.0, 0.5], dtype=torch.bfloat16)
    out, mask = bias_act_mask(p, bias, 0.5, fresh=True, backend="cpu")
    assert out[0, 0, 0, 0] == 2 and out[0, 2, 0, 0] == 1.5 and out[0, -1, -1, -1] == -0.25
    assert mask[0, -1] == 0x7F and (mask[0, :-1] == 0xFF).all()
