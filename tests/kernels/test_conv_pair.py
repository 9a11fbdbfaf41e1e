"""Two convolutions in one kernel: on the host as their host side plans them, compiled ahead of time, and on a GPU."""

import ctypes
import itertools
import mmap
import re
import shutil
import subprocess
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from advkd.models.shape import PRESETS, convolutions
from advkd.ops import cuda, gpu_storage, registry
from advkd.ops.conv_layer import ConvLayer
from advkd.ops.gpu_storage import PRODUCTS, input_channels, padded
from advkd.runtime.extension import extension_gap

from .cuda_on_host import in_order, only_last_block
from .host_plans import LAUNCHERS, change_plans, plan, plan_for
from .test_compile_ahead import cuda_kernels, known_to_nvcc

STORAGE = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "f32": torch.float32}
CODES = {"none": 0, "leaky_relu": 1, "tanh": 2}
SLOPE = 0.25
WHOLE, PART, SMALL = (1, 227 * 1024, 9), (1, 0, 9), (10**6, 227 * 1024, 9)
"""Multiprocessors and shared memory for which a plan takes 16 x 16, 8 x 16 (the limit is set for each case) and 8 x 8."""


@dataclass(frozen=True)
class Case:
    """A pair's shape; ``height`` and ``width`` are those of x. ``extra``: channels of ``out`` behind the layer's own."""

    n: int
    height: int
    width: int
    c_in: int
    c_mid: int
    c_out: int
    upsample: bool = False
    image: bool = False
    activation: str = "leaky_relu"
    extra: int = 0
    limits: tuple = WHOLE

    def __str__(self):
        kind = ("up " if self.upsample else "") + ("image " if self.image else "") + self.activation
        tile = {WHOLE: "whole", PART: "part", SMALL: "small"}[self.limits]
        sizes = "x".join(map(str, (self.n, self.height, self.width, self.c_in, self.c_mid, self.c_out)))
        return f"{sizes} {kind} {tile}" + (f" +{self.extra}" if self.extra else "")

    @property
    def layers(self):
        scale = 2 if self.upsample else 1
        first = ConvLayer(self.c_in, self.c_mid, self.height, self.width, self.upsample)
        return first, ConvLayer(self.c_mid, self.c_out, scale * self.height, scale * self.width, activation=self.activation)


PLAIN = [
    # One pixel and less than a tile: all border.
    Case(1, 1, 1, 16, 16, 16),
    Case(2, 3, 5, 5, 20, 16, activation="none", limits=SMALL),
    # Ragged in both axes, several tiles; channels behind the layer's own in `out`.
    Case(1, 17, 19, 32, 32, 32, extra=16),
    Case(1, 9, 11, 32, 32, 32, activation="none", extra=32, limits=SMALL),
    Case(1, 9, 17, 30, 24, 20, limits=PART),
    # Whole tiles, several images.
    Case(2, 16, 32, 16, 16, 16),
    Case(3, 8, 16, 16, 16, 16, limits=SMALL),
    # Three columns of 16 channels in one turn of a warp, and in two that overlap (in the first convolution, in the second).
    Case(1, 16, 17, 48, 48, 48),
    Case(1, 8, 10, 48, 48, 48, limits=PART),
    Case(1, 5, 18, 16, 32, 48),
    # Four columns in two turns; fewer columns in the second than a warp has; many more.
    Case(1, 16, 18, 64, 64, 64),
    Case(1, 7, 8, 32, 48, 32),
    Case(1, 4, 4, 48, 16, 64),
    # Large inputs and little else: surplus lanes must not read past their end either.
    Case(1, 9, 16, 64, 16, 16),
    Case(1, 8, 7, 64, 16, 16, limits=SMALL),
]
UP = [
    Case(1, 1, 1, 16, 16, 16, True),
    Case(2, 2, 3, 20, 16, 5, True, activation="none", limits=SMALL),
    # 18 x 22 outputs: ragged in both axes.
    Case(1, 9, 11, 32, 32, 32, True, extra=16),
    Case(1, 5, 9, 16, 16, 16, True, limits=SMALL),
    Case(1, 5, 9, 48, 32, 32, True, limits=PART),
    Case(2, 8, 16, 16, 16, 16, True),
    Case(1, 8, 8, 64, 48, 48, True),
    Case(1, 5, 4, 48, 48, 48, True, limits=SMALL),
    Case(1, 8, 9, 64, 64, 64, True),
    Case(1, 3, 4, 48, 16, 32, True),
]
IMAGE = [
    Case(1, 1, 1, 16, 16, 1, image=True),
    Case(2, 7, 5, 16, 16, 2, image=True, activation="none", limits=SMALL),
    Case(1, 17, 19, 32, 32, 3, image=True),
    Case(1, 9, 10, 48, 48, 3, image=True, limits=PART),
    Case(2, 16, 18, 48, 48, 4, image=True),
    Case(1, 13, 14, 64, 64, 1, image=True),
    Case(1, 3, 9, 32, 32, 4, image=True, limits=SMALL),
    Case(1, 1, 1, 16, 16, 3, True, image=True),
    Case(2, 9, 7, 32, 32, 3, True, image=True),
    Case(1, 5, 5, 16, 16, 2, True, image=True, limits=SMALL),
    Case(1, 4, 9, 48, 64, 4, True, image=True, limits=PART),
]
ALL = [*PLAIN, *UP, *IMAGE]
FEW = [ALL[i] for i in (0, 2, 4, 7, 8, 16, 17, 19, 22, 27, 28, 31, 33, 35)]
"""Cases for products that take longer to emulate: tiles of each size, ragged ones, up-sampled ones, images."""


def limits_of(case, product):
    """PART: as much shared memory as 8 x 16 outputs need."""
    if case.limits is not PART:
        return case.limits
    return 1, shared_bytes((8, 16), case, STORAGE[product].itemsize), 9


def shared_bytes(tile, case, element):
    """Shared memory of a tile: the inputs with their border, or what becomes of them, and the pixels between."""
    height, width = tile
    mid = (height + 2) * (width + 2)
    inputs = (height // 2 + 2) * (width // 2 + 2) if case.upsample else (height + 4) * (width + 4)
    image = 4 * mid * (9 * case.c_out | 1)
    outputs = image if case.image else height * width * (padded(case.c_out) * element + 16)
    return max(inputs * (padded(case.c_in) * element + 16), outputs) + mid * (padded(case.c_mid) * element + 16)


class Guarded:
    """Memory between two inaccessible pages: a read or write past its end stops the process."""

    device = "cpu"

    def __init__(self):
        self.maps = []

    def __call__(self, tensor):
        """A copy that ends where the forbidden page begins."""
        size = tensor.numel() * tensor.element_size()
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        area = mmap.mmap(-1, whole + 2 * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for page in (start, start + mmap.PAGESIZE + whole):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0) == 0
        self.maps.append(area)
        place = torch.frombuffer(area, dtype=torch.uint8, count=size, offset=mmap.PAGESIZE + whole - size)
        place.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        return place.view(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True)
class Plain:
    """Ordinary device memory."""

    device: str

    def __call__(self, tensor):
        return tensor.to(self.device).clone()


def oracle(x, weight, bias, upsample):
    """A convolution written out by taps, in float64."""
    if upsample:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    windows = F.pad(x, (1, 1, 1, 1))
    y = bias[None, :, None, None].expand(len(x), -1, *x.shape[2:]).clone()
    for i, j in itertools.product(range(3), range(3)):
        y += torch.einsum("nchw,oc->nohw", windows[:, :, i : i + x.shape[2], j : j + x.shape[3]], weight[:, :, i, j])
    return y


def activated(y, activation):
    return {"leaky_relu": torch.where(y > 0, y, SLOPE * y), "tanh": y.tanh(), "none": y}[activation]


def stored(x, product):
    """``x`` rounded to its storage dtype."""
    return x.to(STORAGE[product]).double()


def multiplied(x, product):
    """``x`` rounded as a factor: TensorFloat-32 has 11 bits, ties go away from zero."""
    if product != "tf32":
        return x
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.sign(x) * torch.floor(mantissa.abs() * 2**11 + 0.5) / 2**11, exponent)


def integers(case, seed=0):
    """Numbers that make every sum exact in float32, in any order, and every weight in bfloat16, folded or not."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most, *shape):
        return torch.randint(-most, most + 1, shape, generator=generator).double()

    first = draw(3, case.c_mid, case.c_in, 3, 3), draw(9, case.c_mid)
    second = draw(3, case.c_out, case.c_mid, 3, 3) / 64, draw(9, case.c_out)
    return draw(63, case.n, case.c_in, case.height, case.width), *first, *second


def normals(case, product):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.n, case.c_in, case.height, case.width, generator=generator)
    weight1 = torch.randn(case.c_mid, case.c_in, 3, 3, generator=generator) / (9 * case.c_in) ** 0.5
    weight2 = torch.randn(case.c_out, case.c_mid, 3, 3, generator=generator) / (9 * case.c_mid) ** 0.5
    bias1, bias2 = torch.randn(case.c_mid, generator=generator), torch.randn(case.c_out, generator=generator)
    return tuple(t.double() for t in (stored(x, product), weight1, bias1, weight2, bias2))


def launch(case, product, numbers, launcher, place):
    """The outputs as ``(N, C, H, W)``; checks that a call leaves everything else alone and that a second one repeats it."""
    x, weight1, bias1, weight2, bias2 = numbers
    first, second = case.layers
    taps1, bias1 = gpu_storage.pad_layer(weight1, bias1, first)
    taps2, padded2 = gpu_storage.pad_layer(weight2, bias2, second)
    packed2 = gpu_storage.pack_image(taps2, case.c_out, product) if case.image else gpu_storage.pack_fragments(taps2, product)
    dtype, sides = STORAGE[product], (second.height, second.width)
    pixels = x.new_zeros((case.n, case.height, case.width, padded(case.c_in)), dtype=dtype)
    pixels[..., : case.c_in] = x.permute(0, 2, 3, 1).to(dtype)
    shape = (case.n, case.c_out, *sides) if case.image else (case.n, *sides, padded(case.c_out) + case.extra)
    poison = x.new_full(shape, torch.nan, dtype=dtype)
    bias2 = bias2.float() if case.image else padded2
    tensors = [place(t) for t in (pixels, gpu_storage.pack_fragments(taps1, product), bias1, packed2, bias2)]
    options = case.upsample, case.image, CODES[case.activation], SLOPE, PRODUCTS.index(product)
    out, again = place(poison), place(poison)
    launcher(*tensors, out, *options)
    launcher(*tensors, again, *options)
    assert torch.equal(out.view(torch.uint8), again.view(torch.uint8))
    if case.image:
        return out.double()
    behind, own = padded(case.c_out), case.c_out
    assert torch.equal(out[..., behind:].contiguous().view(torch.uint8), poison[..., behind:].contiguous().view(torch.uint8))
    assert (out[..., own:behind] == 0).all()
    return out[..., :own].permute(0, 3, 1, 2).double()


def compare(errors, allowed):
    """Compare borders and interior separately."""
    assert not errors.isnan().any()
    border = torch.ones_like(errors, dtype=torch.bool)
    border[:, :, 1:-1, 1:-1] = False
    wrong = errors > allowed
    assert not wrong[border].any(), f"border: {wrong[border].sum()} of {border.sum()}, {errors[border].max()}"
    assert not wrong[~border].any(), f"inside: {wrong[~border].sum()} of {(~border).sum()}, {errors[~border].max()}"


def check_exact(case, product, launcher, place):
    """Integers: bit for bit the result of two kernels, with the tensor between them rounded to storage."""
    x, weight1, bias1, weight2, bias2 = numbers = tuple(t.to(place.device) for t in integers(case))
    mid = stored(activated(oracle(multiplied(x, product), weight1, bias1, case.upsample), "leaky_relu"), product)
    sums = oracle(mid.abs(), weight2.abs(), bias2.abs(), False)
    # In units of the last place.
    assert sums.max() * 64 / SLOPE < 2**24
    expected = stored(activated(oracle(multiplied(mid, product), weight2, bias2, False), case.activation), product)
    assert expected.isfinite().all()
    compare((launch(case, product, numbers, launcher, place) - expected).abs(), 0.0)


def check_bound(case, product, launcher, place):
    """Normal numbers: within a rounding bound that grows with the number of terms.

    A sum's terms are rounded to 24 bits, by tensor cores towards zero: 2^-23 each. Operands: weights once to storage (bf16,
    f16), both to TensorFloat-32 (tf32), or each to 22 bits, the product of the rests left out, and weights once (f32).
    """
    x, weight1, bias1, weight2, bias2 = numbers = tuple(t.to(place.device) for t in normals(case, product))
    unit = {"bf16": 2**-8, "f16": 2**-11}.get(product, 2**-24)
    operands = {"bf16": 2**-8, "f16": 2**-11, "tf32": 2**-10 + 2**-22, "f32": 2**-24 + 3 * 2**-22}[product]
    # Below 2^-14 float16's numbers are 2^-24 apart.
    least = 2**-25 if product == "f16" else 0.0
    mid = activated(oracle(x, weight1, bias1, case.upsample), "leaky_relu")
    sizes = oracle(x.abs(), weight1.abs(), bias1.abs(), case.upsample)
    error = 1.01 * (operands + (9 * case.c_in + 2) * 2**-23) * sizes
    error += least * oracle(x.abs(), torch.ones_like(weight1), 0 * bias1, case.upsample)
    error += 1.01 * unit * mid.abs() + least
    y = oracle(mid, weight2, bias2, False)
    sizes = oracle(mid.abs(), weight2.abs(), bias2.abs(), False)
    allowed = oracle(error, weight2.abs(), 0 * bias2, False) + 1.01 * (operands + (9 * case.c_mid + 2) * 2**-23) * sizes
    allowed += least * oracle(mid.abs(), torch.ones_like(weight2), 0 * bias2, False)
    expected = activated(y, case.activation)
    # tanh adds its own error.
    allowed = 1.01 * allowed + 1.01 * unit * expected.abs() + least + (2**-21 if case.activation == "tanh" else 0)
    compare((launch(case, product, numbers, launcher, place) - expected).abs(), allowed)


EXACT = [(case, "bf16") for case in ALL]
EXACT += [(case, product) for product in ("f16", "tf32", "f32") for case in FEW]
BOUND = [
    (replace(case, activation=activation), product)
    for product in PRODUCTS
    for case, activation in zip((ALL[1], ALL[17], ALL[26], ALL[32]), ("tanh", "leaky_relu", "tanh", "tanh"))
]


def named(pairs):
    core = [pytest.mark.core]
    return [
        pytest.param(case, product, id=f"{product}-{case}", marks=core if case is UP[2] and product == "bf16" else [])
        for case, product in pairs
    ]


@pytest.fixture
def on_host(cupy_on_host, monkeypatch):
    """A function that runs a check on the host within a case's limits."""

    def run(check, case, product):
        plan_for(monkeypatch, limits_of(case, product))
        check(case, product, LAUNCHERS.conv_pair, Guarded())

    return run


@pytest.mark.parametrize("case, product", named(EXACT))
def test_exact_on_the_host(case, product, on_host):
    on_host(check_exact, case, product)


@pytest.mark.parametrize("case, product", named(BOUND))
def test_rounding_on_the_host(case, product, on_host):
    on_host(check_bound, case, product)


def test_cases_take_every_tile_and_kernel():
    """The cases cover tiles of each size and one to three columns."""
    tiles, columns = set(), set()
    for case, product in EXACT:
        plan = plan_of(case, product, limits_of(case, product))
        expected = {WHOLE: (16, 16), PART: (8, 16), SMALL: (8, 8)}[case.limits]
        if case.limits is not WHOLE or 2**case.upsample * min(case.height, case.width) > 8:
            assert (plan["tile_height"], plan["tile_width"]) == expected
        tiles.add((plan["tile_height"], plan["tile_width"], case.upsample, case.image))
        columns.add((plan["columns"], product))
    assert len(tiles) == 12 and len(columns) == 12


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", [PLAIN[2], UP[0], IMAGE[1]], ids=str)
def test_warps_in_any_order(case, order, on_host):
    """Warps wait for each other wherever one needs another's result."""
    with in_order(order, "conv_pair", "bf16"):
        on_host(check_exact, case, "bf16")


@pytest.mark.parametrize("upsample, image", list(itertools.product((False, True), repeat=2)))
def test_a_block_writes_its_tile_alone(upsample, image, cupy_on_host, monkeypatch):
    """Only the first of 3 x 3 tiles is computed."""
    side = 10 if upsample else 20
    case = Case(1, side, side, 16, 16, 3 if image else 16, upsample, image)

    def first_alone(planned):
        assert planned.launches[0][1] == 9
        planned.launches[0][1] = 1

    plan_for(monkeypatch, SMALL)
    change_plans(monkeypatch, first_alone)
    y = launch(case, "bf16", integers(case), LAUNCHERS.conv_pair, Plain("cpu"))
    written = torch.zeros(y.shape, dtype=torch.bool)
    written[..., :8, :8] = True
    assert torch.equal(~y.isnan(), written)


def plan_of(case, product, device):
    """The plan of a pair of any size."""
    dtype, scale = STORAGE[product], 2 if case.upsample else 1

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def packed(phases, taps, c_in, c_out):
        return empty(phases, c_in * dtype.itemsize // 32, taps, padded(c_out) // 16, 32, 16 // dtype.itemsize)

    c_in, c_mid, c_out = padded(case.c_in), padded(case.c_mid), case.c_out if case.image else padded(case.c_out)
    sides = (scale * case.height, scale * case.width)
    out = empty(case.n, c_out, *sides) if case.image else empty(case.n, *sides, c_out + case.extra)
    first = packed(4 if case.upsample else 1, 4 if case.upsample else 9, c_in, c_mid)
    second = packed(1, 1, c_mid, 9 * c_out) if case.image else packed(1, 9, c_mid, c_out)
    biases = [empty(c, dtype=torch.float32) for c in (c_mid, c_out)]
    tensors = (empty(case.n, case.height, case.width, c_in), first, biases[0], second, biases[1], out)
    options = (case.upsample, case.image, CODES[case.activation], SLOPE, PRODUCTS.index(product))
    return plan("conv_pair", *tensors, *options, device=device)


@pytest.mark.parametrize("image", [False, True])
def test_empty_batch(image, cupy_on_host):
    case = Case(0, 4, 4, 16, 16, 3 if image else 16, image=image)
    assert launch(case, "bf16", integers(case), LAUNCHERS.conv_pair, Plain("cpu")).numel() == 0


@pytest.mark.parametrize("upsample, image", [(False, False), (True, False), (False, True)])
def test_elements_count_beyond_32_bits(upsample, image, cupy_on_host, monkeypatch):
    """The last of 2^25 images of 8 x 8 pixels: more than 2^31 elements before it."""
    n, product = 2**25 + 1, "bf16"
    c_out = 3 if image else 16
    case = Case(1, 4 if upsample else 8, 4 if upsample else 8, 16, 16, c_out, upsample, image)
    large = plan_of(replace(case, n=n), product, SMALL)
    assert large.blocks == n

    def last_of_many(planned):
        x_bytes, out_bytes = 2 * 16 * case.height * case.width, 2 * c_out * 64
        large.update(x=planned["x"] - (n - 1) * x_bytes, out=planned["out"] - (n - 1) * out_bytes)
        large.update(**{name: planned[name] for name in ("weights1", "weights2", "bias1", "bias2", "activation", "slope")})
        planned.fields, planned.launches = large.fields, large.launches

    plan_for(monkeypatch, SMALL)
    change_plans(monkeypatch, last_of_many)
    with only_last_block("conv_pair", n, product):
        check_exact(case, product, LAUNCHERS.conv_pair, Plain("cpu"))


def good_arguments(product="bf16"):
    dtype = STORAGE[product]
    x, bias = torch.zeros(1, 8, 8, 16, dtype=dtype), torch.zeros(16)
    weights = gpu_storage.pack_fragments(torch.zeros(1, 9, 16, 16), product)
    tensors = dict(x=x, weights1=weights, bias1=bias, weights2=weights, bias2=bias, out=torch.zeros_like(x))
    return {**tensors, **dict(upsample=False, image=False, activation=1, slope=0.2, product=PRODUCTS.index(product))}


IMAGE_PAIR = dict(image=True, bias2=torch.zeros(3), weights2=gpu_storage.pack_fragments(torch.zeros(1, 1, 16, 32), "bf16"))


def odd(*shape):
    """Contiguous, but not aligned."""
    return torch.zeros(torch.Size(shape).numel() + 1, dtype=torch.bfloat16)[1:].view(shape)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x=torch.zeros(8, 8, 16).bfloat16()), "x must have shape"),
        (dict(x=torch.zeros(1, 8, 8, 24).bfloat16()), "multiples of 16"),
        (dict(x=torch.zeros(1, 8, 8, 80).bfloat16()), "up to 64"),
        (dict(x=torch.zeros(1, 8, 8, 32).bfloat16()), "weights1 must be"),
        (dict(x=torch.zeros(1, 8, 8, 16)), "x must be torch.bfloat16"),
        (dict(x=torch.zeros(1, 8, 16, 8).bfloat16().transpose(2, 3)), "contiguous"),
        (
            dict(weights1=gpu_storage.pack_fragments(torch.zeros(1, 9, 16, 16), "bf16").to("meta")),
            "weights1 must be on x's device",
        ),
        (dict(x=odd(1, 8, 8, 16)), "x must begin at a multiple of 16"),
        (dict(bias1=torch.zeros(16).bfloat16()), "bias1 must be torch.float32"),
        (dict(bias1=torch.zeros(32)), "weights1 must be"),
        (dict(bias2=torch.zeros(32)), "weights2 must be"),
        (dict(weights2=gpu_storage.pack_fragments(torch.zeros(4, 4, 16, 16), "bf16")), "weights2 must be"),
        (dict(weights1=gpu_storage.pack_fragments(torch.zeros(1, 9, 16, 16), "f16")), "weights1 must be torch.bfloat16"),
        (dict(out=torch.zeros(1, 8, 7, 16).bfloat16()), "out must be"),
        (dict(out=torch.zeros(1, 8, 8, 24).bfloat16()), "out must have channels in units of 16"),
        (dict(out=odd(1, 8, 8, 16)), "out must begin at a multiple of 16"),
        (dict(upsample=True), "weights1 must be"),
        (dict(image=True), "1 to 4 channels"),
        (dict(**IMAGE_PAIR, out=torch.zeros(1, 8, 8, 3).bfloat16()), "out must be"),
        (dict(image=True, bias2=torch.zeros(3), out=torch.zeros(1, 3, 8, 8).bfloat16()), "weights2 must be"),
        (dict(activation=3), "activation"),
        (dict(product=4), "product"),
    ],
)
def test_refusals(changes, message):
    assert plan("conv_pair", **good_arguments()).blocks > 0
    with pytest.raises(RuntimeError, match=f"conv_pair: .*{message}"):
        plan("conv_pair", **{**good_arguments(), **changes})


def test_what_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match="16, 16 and 16 channels in torch.bfloat16 do not fit"):
        plan("conv_pair", **good_arguments(), device=(108, 4096, 9))
    with pytest.raises(RuntimeError, match="too large"):
        plan_of(Case(2**28, 64, 64, 16, 16, 16), "bf16", WHOLE)
    with pytest.raises(RuntimeError, match="2\\^29"):
        plan_of(Case(1, 1, 2**29 + 1, 16, 16, 16), "bf16", WHOLE)


# Sizes of x, channels, up-sampled or not, image or not, bytes of an element, multiprocessors, shared memory: cards of each
# kind, one image and many, every tile, and sizes that do not fit.
PLANS = [
    (Case(n, side, side + 3 * ragged, *channels, up, image), product, (multiprocessors, kilobytes * 1024, 9))
    for n, side, ragged in ((1, 1, 1), (1, 32, 0), (64, 128, 1), (7, 9, 0))
    for channels, image in (
        ((16, 16, 16), False),
        ((48, 48, 48), False),
        ((64, 64, 64), False),
        ((32, 32, 3), True),
        ((64, 16, 4), True),
    )
    for up in (False, True)
    for product in ("bf16", "f32")
    for multiprocessors, kilobytes in ((132, 227), (108, 163), (128, 99), (40, 48), (40, 9))
]
# As many blocks as multiprocessors, and one less.
PLANS += [(Case(1, 64, 64, 32, 32, 32), "bf16", (blocks, 2**17, 9)) for blocks in (16, 17)]
TILES = [(16, 16), (8, 16), (8, 8)]


def test_plans():
    """Tiles cover the image, shared memory is as needed and within the limit, quotients are exact for every dividend."""
    found = set()
    for case, product, device in PLANS:
        element, up, image = STORAGE[product].itemsize, case.upsample, case.image
        if min(shared_bytes(tile, case, element) for tile in TILES) > device[1]:
            assert device[1] < 99 * 1024
            with pytest.raises(RuntimeError, match="do not fit"):
                plan_of(case, product, device)
            continue
        p = plan_of(case, product, device)
        th, tw = p["tile_height"], p["tile_width"]
        found.add((th, tw))
        assert p["shared"] == p.launches[0][3] == shared_bytes((th, tw), case, element) <= device[1]
        assert p["shared"] % 16 == p["mid_place"] % 16 == 0
        for count, tile, side in ((p["down"], th, case.height << up), (p["across"], tw, case.width << up)):
            assert count * tile >= side > (count - 1) * tile
        assert p.blocks == p["blocks"] == case.n * p["down"] * p["across"]
        rows, columns = (th // 2 + 2, tw // 2 + 2) if up else (th + 4, tw + 4)
        grid = (th + 2) * (tw + 2) // (4 if up else 1)
        chunks, out_chunks = case.c_in * element // 16, case.c_out * element // 16
        divided = [("by_input_chunks", chunks, rows * columns * chunks)]
        divided += [("by_input_width", columns, rows * columns), ("by_grid_width", (tw + 2) // (1 + up), grid + 48)]
        divided += [("by_sets", -(-grid // 48), 4 * 4 * 8)]
        divided += [] if image else [("by_out_chunks", out_chunks, th * tw * out_chunks)]
        for name, divisor, most in divided:
            numerators = torch.arange(most)
            assert torch.equal(numerators * p[name] >> 20, numerators // divisor) and most * p[name] < 2**32
    assert found == set(TILES)
    # The smaller tile where there are more multiprocessors than blocks, and where it suffices for the image.
    case = Case(1, 64, 64, 32, 32, 32)
    assert [plan_of(case, "bf16", (count, 2**17, 9)).blocks for count in (16, 32, 132)] == [16, 32, 64]
    assert plan_of(Case(64, 8, 8, 32, 32, 32), "bf16", (16, 2**17, 9))["tile_height"] == 8


def fits(c_in, c_mid, c_out, upsample, image, product, limit):
    return registry.cuda_query("pair_fits")(c_in, c_mid, c_out, upsample, image, PRODUCTS.index(product), limit)


def test_fits():
    for channels in itertools.product((16, 32, 48, 64), repeat=3):
        for up, product in itertools.product((False, True), PRODUCTS):
            assert fits(*channels, up, False, product, 99 * 1024)
            assert fits(*channels[:2], 4, up, True, product, 99 * 1024)
    for bad in ((80, 16, 16), (16, 80, 16), (16, 16, 80), (16, 24, 16), (0, 16, 16), (16, 16, 0)):
        assert not fits(*bad, False, False, "bf16", 227 * 1024)
    assert not fits(16, 16, 5, False, True, "bf16", 227 * 1024) and not fits(16, 16, 0, False, True, "bf16", 227 * 1024)
    assert not fits(64, 64, 64, False, False, "f32", 48 * 1024) and fits(16, 16, 16, False, False, "bf16", 48 * 1024)


def preset_pairs():
    """Every pair of a preset's convolutions that the kernel supports, with its products' names and its plan's arguments."""
    for name, config in PRESETS.items():
        layers = convolutions(config)
        for i, (first, second) in enumerate(zip(layers, layers[1:])):
            image = i + 2 == len(layers)
            c_out = second.c_out if image else padded(second.c_out)
            channels = input_channels(first), padded(first.c_out), c_out
            kind = first.upsample, image
            if second.upsample or second.detail or not fits(*channels, *kind, "bf16", 227 * 1024):
                continue
            yield pytest.param(first, channels, *kind, id=f"{name}-{i}")


PAIRS = list(preset_pairs())


@pytest.mark.parametrize("first, channels, upsample, image", PAIRS)
def test_shared_memory_of_the_presets(first, channels, upsample, image):
    """Whole tiles of up to 48 channels in 16 bits within 99 KB, of 64 within 163 KB and twice within 227 KB."""
    plan = plan_of(Case(256, first.height, first.width, *channels, upsample, image), "bf16", (132, 227 * 1024, 9))
    assert plan["shared"] <= (99 if max(channels) <= 48 else 113) * 1024
    assert (plan["tile_height"] == 16) == (first.height << upsample > 8)
    for kilobytes in (99, 163, 227):
        assert fits(*channels, upsample, image, "f32", kilobytes * 1024)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize(
    "architecture", ["sm_80", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_90a", "sm_100"))]
)
def test_nvcc(architecture, tmp_path):
    """Nothing spills, as many blocks fit on a multiprocessor as intended, products use tensor cores, copies are vectors."""
    known_to_nvcc(architecture)
    kernels = {name: rest for name, *rest in cuda_kernels("conv_pair.cu", tmp_path, architecture)}
    names = itertools.product("123", PRODUCTS)
    assert sorted(kernels) == sorted(f"advkd_conv_pair_columns{columns}_{product}" for columns, product in names)
    for name, (spilled, registers, ptx) in kernels.items():
        columns, product = re.fullmatch(r"advkd_conv_pair_columns(\d)_(\w+)", name).groups()
        narrow = STORAGE[product].itemsize == 2
        blocks = 3 if narrow and columns == "1" else 2 if narrow or columns != "3" else 1
        # A multiprocessor's 65536 registers, allocated to warps in units of 8 per thread.
        assert spilled == 0 and ".local" not in ptx and -(-registers // 8) * 8 * 256 * blocks <= 65536, (name, registers)
        shape = {"bf16": "m16n8k16.row.col.f32.bf16", "f16": "m16n8k16.row.col.f32.f16"}.get(
            product, "m16n8k8.row.col.f32.tf32"
        )
        assert ptx.count("mma.sync.aligned." + shape) == ptx.count("mma.sync") > 0
        assert "ldmatrix.sync" in ptx and "cp.async.cg" in ptx
        assert re.search(r"st\.global\.v4", ptx) and re.search(r"ld\.global\.nc\.v4", ptx)
    sass = sass_of(tmp_path / "kernels.cubin")
    assert sass is None or all(kind in sass for kind in ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "HMMA.1688.F32.TF32"))


def sass_of(cubin):
    """Machine code by Triton's disassembler, or None where there is none."""
    try:
        from triton.backends import nvidia
    except ImportError:
        return None
    program = shutil.which("nvdisasm", path=f"{nvidia.__path__[0]}/bin")
    return program and subprocess.run([program, "-c", cubin], capture_output=True, text=True, check=True).stdout


def test_source_is_whole_and_self_contained():
    text = cuda.source("conv_pair")
    assert "#include" not in text and "#pragma once" not in text


def gpu_launcher(compiled_by):
    if compiled_by == "cupy":
        if reason := cuda.gap():
            pytest.skip(reason)
        return LAUNCHERS.conv_pair
    if reason := extension_gap("cuda"):
        pytest.skip(reason)
    return torch.ops.advkd_cuda.conv_pair


@pytest.mark.gpu
@pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])
@pytest.mark.parametrize("check, case, product", [
    *(pytest.param(check_exact, case, product, id=f"exact-{product}-{case}") for case in ALL for product in PRODUCTS),
    *(pytest.param(check_bound, case, product, id=f"bound-{product}-{case}") for case, product in BOUND),
])  # fmt: skip
def test_on_a_gpu(check, case, product, compiled_by):
    check(case, product, gpu_launcher(compiled_by), Plain("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])
@pytest.mark.parametrize("product", ["bf16", "f32"])
@pytest.mark.parametrize("first, channels, upsample, image", PAIRS)
def test_presets_on_a_gpu(first, channels, upsample, image, product, compiled_by):
    activation = "tanh" if image else "leaky_relu"
    case = Case(2, first.height, first.width, first.c_in, first.c_out, channels[2], upsample, image, activation)
    check_bound(case, product, gpu_launcher(compiled_by), Plain("cuda"))
    check_exact(replace(case, activation="none"), product, gpu_launcher(compiled_by), Plain("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])
def test_captured_on_a_gpu(compiled_by):
    """A CUDA graph's replay on other values."""
    arguments = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in good_arguments().items()}
    arguments["bias2"] += 1
    arguments["x"] += 1
    launcher = gpu_launcher(compiled_by)
    launcher(*arguments.values())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launcher(*arguments.values())
    arguments["bias2"] += 1
    graph.replay()
    assert (arguments["out"] == 2).all()
