"""The student's CUDA convolutions: the kernels' arithmetic on the host, against float64; on a GPU where there is one."""

import ctypes
import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from advkd.models.shape import PRESETS, convolutions
from advkd.ops import cuda
from advkd.ops.conv_layer import ConvLayer
from advkd.ops.gpu_storage import PRODUCTS, pack_fragments, pack_image, pad_layer, padded
from advkd.runtime.extension import extension_gap

from ..conftest import ROOT
from .cuda_on_host import only_last_block
from .host_plans import A100, B200, CARD, H200, LAUNCHERS, change_plans, plan, plan_for, start
from .test_compile_ahead import cuda_kernels, known_to_nvcc

NONE, LEAKY, TANH = range(3)
NAMES = ("none", "leaky_relu", "tanh")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "f32": torch.float32}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
# By product: rounding of the factors, relative to a term of the sum. 16 bits: the weight's rounding. TensorFloat-32: that of
# both factors. float32: 22 bits of each factor and the product of the small parts.
OPERANDS = {"bf16": 2**-8, "f16": 2**-11, "tf32": 2**-10 + 2**-21, "f32": 3 * 2**-22 + 2**-24}
SLOPE = 0.25
HOST = (3, 163 * 1024, 9)


@dataclass(frozen=True)
class Case:
    n: int
    height: int
    width: int
    c_in: int = 16
    c_out: int = 16
    upsample: bool = False
    activation: int = LEAKY
    product: str = "bf16"
    extra: int = 0  # channels of out after the layer's own
    image: bool = False
    exact: bool = True

    def layer(self):
        return ConvLayer(self.c_in, self.c_out, self.height, self.width, self.upsample, NAMES[self.activation])


def arguments(case, device="cpu"):
    """x ``(N, C, H, W)``, weight and bias in float32; x is rounded to its storage dtype.

    ``exact``: small whole numbers, with which every sum, folded weight and result is exact in all storages but for tanh.
    """
    generator = torch.Generator(device).manual_seed(case.n * case.height + case.width)
    options = dict(generator=generator, device=device)
    sides = (case.n, case.c_in, case.height, case.width)
    taps = (case.c_out, case.c_in, 3, 3)
    if case.exact:
        x, weight = torch.randint(-2, 3, sides, **options).float(), torch.randint(-1, 2, taps, **options).float()
        if case.c_in > 32:  # most weights are zero, else sums would be too large for bfloat16
            weight *= torch.rand(taps, **options) < 32 / case.c_in
        return x, weight, torch.randint(-3, 4, (case.c_out,), **options).float()
    weight = torch.randn(taps, **options) / (9 * case.c_in) ** 0.5
    x = torch.randn(sides, **options).to(DTYPES[case.product]).float()
    return x, weight, torch.randn(case.c_out, **options)


def convolve(x, weight, upsample):
    """Written out by taps, in float64."""
    x, weight = x.double(), weight.double()
    if upsample:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    around = F.pad(x, (1, 1, 1, 1))
    y = 0
    for i, j in itertools.product(range(3), range(3)):
        window = around[:, :, i : i + x.shape[2], j : j + x.shape[3]]
        y = y + torch.einsum("nchw,oc->nohw", window, weight[:, :, i, j])
    return y


def oracle(case, x, weight, bias):
    """The result, and the largest error that rounding allows.

    Roundings are those of the factors, the sum's terms, each of which tensor cores may truncate, bias and activation
    (tanhf's own two units), and the result in storage.
    """
    y = convolve(x, weight, case.upsample) + bias.double()[None, :, None, None]
    size = convolve(x.abs(), weight.abs(), case.upsample) + bias.abs()[None, :, None, None]
    y = {NONE: y, LEAKY: torch.where(y > 0, y, SLOPE * y), TANH: y.tanh()}[case.activation]
    terms = 9 * padded(case.c_in) * (3 if case.product == "f32" else 1) + 12
    allowed = (OPERANDS[case.product] + terms * 2**-23) * size + ROUNDING[DTYPES[case.product]] * y.abs()
    return y, allowed + 2**-22


def stored(x, dtype):
    """NHWC in whole units, between numbers that must not be read."""
    n, c, height, width = x.shape
    count = n * height * width * padded(c)
    memory = x.new_full((count + 512,), torch.nan, dtype=dtype)
    inside = memory[256 : 256 + count].view(n, height, width, padded(c))
    inside.zero_()[..., :c] = x.permute(0, 2, 3, 1)
    return inside


def run(case, launchers, device="cpu", calls=2):
    """The result ``(N, C, H', W')`` in storage; checks that nothing else is written and that a second call repeats it."""
    x, weight, bias = arguments(case, device)
    dtype, layer, product = DTYPES[case.product], case.layer(), PRODUCTS.index(case.product)
    taps, wide_bias = pad_layer(weight, bias, layer)
    scale = 2 if case.upsample else 1
    sides = (scale * case.height, scale * case.width)
    units = padded(case.c_out)
    shape = (case.n, case.c_out, *sides) if case.image else (case.n, *sides, units + case.extra)
    count = torch.Size(shape).numel()
    results = []
    for _ in range(calls):
        memory = torch.full((count + 512,), torch.nan, dtype=dtype, device=device)
        out = memory[256 : 256 + count].view(shape)
        inputs = stored(x, dtype)
        if case.image:
            packed = pack_image(taps, case.c_out, case.product)
            launchers.conv_image(inputs, packed, bias, out, case.activation, SLOPE, product)
        else:
            packed = pack_fragments(taps, case.product)
            launchers.conv_layer(inputs, packed, wide_bias, out, case.upsample, case.activation, SLOPE, product)
        assert memory[:256].isnan().all() and memory[256 + count :].isnan().all()
        results.append(out)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert all(torch.equal(result.view(bits), results[0].view(bits)) for result in results)
    if case.image:
        return x, weight, bias, results[0]
    assert results[0][..., units:].isnan().all() and (results[0][..., case.c_out : units] == 0).all()
    return x, weight, bias, results[0][..., : case.c_out].permute(0, 3, 1, 2)


def check(case, launchers, device="cpu", calls=2):
    x, weight, bias, y = run(case, launchers, device, calls)
    wanted, allowed = oracle(case, x, weight, bias)
    assert y.shape == wanted.shape
    if case.exact and case.activation != TANH:
        assert wanted.abs().max() <= 256
        allowed = torch.zeros_like(wanted)
    errors = (y.double() - wanted).abs()
    border = torch.ones_like(errors, dtype=torch.bool)
    border[:, :, 1:-1, 1:-1] = False
    assert (errors <= allowed)[border].all(), "border"
    assert (errors <= allowed)[~border].all(), "inside"


def plan_of(case, device=H200, **begins):
    """The plan of a layer or an image of any size; ``begins``: addresses of its tensors."""
    dtype, product = DTYPES[case.product], PRODUCTS.index(case.product)
    c_in, units, scale = padded(case.c_in), padded(case.c_out), 2 if case.upsample else 1
    sides = (scale * case.height, scale * case.width)

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    steps, lanes = c_in * dtype.itemsize // 32, (32, 16 // dtype.itemsize)
    x, options = empty(case.n, case.height, case.width, c_in), (case.activation, SLOPE, product)
    if case.image:
        weights, out = empty(1, steps, 1, -(-9 * case.c_out // 16), *lanes), empty(case.n, case.c_out, *sides)
        found = plan("conv_image", x, weights, empty(case.c_out, dtype=torch.float32), out, *options, device=device)
    else:
        phases, taps = (4, 4) if case.upsample else (1, 9)
        weights, out = empty(phases, steps, taps, units // 16, *lanes), empty(case.n, *sides, units + case.extra)
        bias = empty(units, dtype=torch.float32)
        found = plan("conv_layer", x, weights, bias, out, case.upsample, *options, device=device)
    found.update(**begins)
    return found


@functools.cache
def planner():
    """Parts of the planner, compiled by themselves."""
    with tempfile.TemporaryDirectory() as folder:
        sources = [ROOT / "tests/kernels/conv_candidates.cpp", ROOT / "csrc/cuda/host/host.cpp"]
        library = f"{folder}/planner.so"
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", *sources, "-o", library], check=True)
        return ctypes.CDLL(library)


def shapes():
    """``(rows, columns, blocks)`` of a warp's sums: times 16 pixels, times 16 channels, blocks that registers allow."""
    numbers, found = (ctypes.c_int * 3)(), []
    places = [ctypes.byref(numbers, 4 * i) for i in range(3)]
    while planner().shape_of(len(found), *places):
        found.append(tuple(numbers))
    return found


def candidates(c_out):
    """``(shape, channel_warps, parts, resident)`` of every plan that may suit a layer."""
    every = itertools.product(range(len(shapes())), (1, 2, 4, 8), (1, 2, 4, 8), (1, 0))
    return [candidate for candidate in every if planner().suits(c_out // 16, *candidate[:3])]


def take(planned, candidate, device):
    """Make a layer's plan that of a candidate. Whether it fits the device."""
    element, split = 2 if planned.variant in ("bf16", "f16") else 4, planned.variant == "f32"
    limits = (ctypes.c_int * 4)(element, split, *device[:2])
    fits = planner().plan_candidate(ctypes.c_void_p(planned.fields.ctypes.data), limits, (ctypes.c_int * 4)(*candidate))
    rows, columns, _ = shapes()[candidate[0]]
    blocks = planned["walkers"] * planned["channel_blocks"] * planned["phases"]
    planned.launches = [[f"advkd_conv_layer_{rows}x{columns}_{planned.variant}", blocks, 256, planned["shared_bytes"]]]
    return bool(fits)


def force(monkeypatch, candidate, device=HOST):
    """Make every layer take this plan."""

    def change(planned):
        assert take(planned, candidate, device), "the plan does not fit"

    change_plans(monkeypatch, change)


# Odd sides, so that no tile is whole; one image pixel; more images than a tile has; rows and columns alone.
SIZES = [(2, 5, 7), (1, 1, 1), (5, 4, 4), (1, 2, 37), (1, 37, 1)]


@pytest.mark.parametrize("activation", [NONE, LEAKY, TANH])
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_and_activations(product, upsample, activation, cupy_on_host):
    for n, height, width in SIZES[:2]:
        case = Case(n, height, width, 29, 24, upsample, activation, product, exact=False)
        check(case, LAUNCHERS)


@pytest.mark.parametrize("upsample", [False, pytest.param(True, marks=pytest.mark.core)])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, upsample, cupy_on_host):
    check(Case(*size, 16, 40, upsample, extra=16), LAUNCHERS)


# Layers whose channels give the warps' sums every width, 1 to 4 units; 5 and 7 units leave blocks of channels partly full.
WIDTHS = (16, 32, 80, 112)
# Tiles of several images, some of them beyond the last; tiles that an image does not fill. Blocks take several tiles.
SEVERAL, RAGGED = Case(5, 6, 7, extra=16), Case(1, 18, 33, upsample=True)


@pytest.mark.parametrize("c_out", WIDTHS)
def test_every_plan(c_out, cupy_on_host, monkeypatch):
    for candidate in candidates(c_out):
        force(monkeypatch, candidate)
        resident = candidate[-1]
        check(replace(SEVERAL if resident else RAGGED, c_out=c_out), LAUNCHERS, calls=1)


@pytest.mark.slow
@pytest.mark.parametrize("c_out", WIDTHS)
def test_every_plan_with_every_size(c_out, cupy_on_host, monkeypatch):
    """Plans with three steps are included; resident weights need more shared memory then."""
    sizes = list(itertools.product((SEVERAL, RAGGED), (16, 48), (False, True)))
    for candidate, (size, c_in, upsample) in itertools.product(candidates(c_out), sizes):
        force(monkeypatch, candidate, (3, *H200[1:]))
        check(replace(size, c_in=c_in, c_out=c_out, upsample=upsample), LAUNCHERS, calls=1)


def test_every_way_to_share_shared_memory(cupy_on_host, monkeypatch):
    """Chunks of 1 to 4 steps, weights that stay resident or arrive with the chunks, 2 to 4 stages."""
    found = set()
    # 3 steps are chunks of 3 and 1, 4 steps of 4, 2 and 1; the smallest sums, in parts of K and whole.
    for c_in, upsample, candidate in ((48, False, (5, 2, 2)), (64, True, (5, 1, 1)), (48, True, (5, 2, 1))):
        case = Case(2, 9, 10, c_in, 32, upsample)
        ways = {}
        for limit, resident in itertools.product(range(16, 228, 2), (0, 1)):
            attempt = plan_of(case)
            if take(attempt, (*candidate, resident), (2, 1024 * limit)):
                ways[tuple(attempt[name] for name in ("chunk", "stages", "resident"))] = limit
        for way, limit in ways.items():
            force(monkeypatch, (*candidate, way[2]), (2, 1024 * limit))
            check(case, LAUNCHERS, calls=1)
        found |= set(ways)
    assert {(chunk, resident) for chunk, _, resident in found} == set(itertools.product((1, 2, 3, 4), (0, 1)))
    assert {stages for _, stages, _ in found} == {2, 3, 4}


@pytest.mark.parametrize("product", PRODUCTS)
def test_large_sums_of_every_product(product, cupy_on_host, monkeypatch):
    """Two chunks of several images a tile, and up-sampling; the widest sums."""
    force(monkeypatch, (0, 1, 1, 1), H200)
    check(Case(5, 6, 7, 32, 64, product=product), LAUNCHERS)
    check(Case(1, 9, 17, 16, 64, True, NONE, product), LAUNCHERS)


def test_a_number_that_is_not_finite_stays_where_it_is(cupy_on_host):
    """A NaN in x spoils the outputs that read it, and no other: pixels outside the image are zero, not a neighbour."""
    for upsample in (False, True):
        case = Case(2, 5, 6, 16, 16, upsample)
        x, weight, bias = arguments(case)
        taps, wide = pad_layer(torch.ones_like(weight), bias, case.layer())
        inputs = stored(x, torch.bfloat16)
        inputs[0, 0, 5, 3] = inputs[0, 4, 0, 3] = torch.nan
        scale = 2 if upsample else 1
        out = torch.zeros(2, scale * 5, scale * 6, 16, dtype=torch.bfloat16)
        LAUNCHERS.conv_layer(inputs, pack_fragments(taps, "bf16"), wide, out, upsample, LEAKY, SLOPE, 0)
        spoiled = convolve(inputs[..., 3:4].isnan().permute(0, 3, 1, 2).float(), torch.ones(1, 1, 3, 3), upsample) > 0
        assert torch.equal(out.isnan(), spoiled.permute(0, 2, 3, 1).expand(-1, -1, -1, 16))


@pytest.mark.parametrize("upsample", [False, True])
def test_places_count_beyond_32_bits(upsample, cupy_on_host):
    """The last of 2^20 images of 16x16: x and out end at least 2^33 bytes after they begin."""
    n, case = 2**20, Case(1, 16, 16, 32, 32, upsample)
    x, weight, bias = arguments(case)
    taps, wide = pad_layer(weight, bias, case.layer())
    side, packed = (32 if upsample else 16), pack_fragments(taps, "bf16")
    inputs, out = stored(x, torch.bfloat16), torch.full((1, side, side, 32), torch.nan, dtype=torch.bfloat16)
    before = dict(x=inputs.data_ptr() - (n - 1) * 2 * 32 * 256, out=out.data_ptr() - (n - 1) * 2 * 32 * side**2)
    planned = plan_of(replace(case, n=n), weights=packed.data_ptr(), bias=wide.data_ptr(), **before)
    assert take(planned, (4, 1, 1, 1), (2**22, H200[1])) and planned["tiles"] == planned["walkers"] == n
    with only_last_block("conv_block", planned.blocks - (3 if upsample else 0), "bf16"):
        start(planned)
    wanted, _ = oracle(case, x, weight, bias)
    assert torch.equal(out.permute(0, 3, 1, 2).double(), wanted)


IMAGE = Case(2, 11, 45, 29, 3, activation=TANH, image=True, exact=False)


@pytest.mark.parametrize("activation", [NONE, LEAKY, TANH])
@pytest.mark.parametrize("product", PRODUCTS)
def test_image(product, activation, cupy_on_host):
    """Two images of two rows and two columns of partial tiles."""
    check(replace(IMAGE, product=product, activation=activation), LAUNCHERS)


@pytest.mark.parametrize("c_out", [1, 2, pytest.param(3, marks=pytest.mark.core), 4])
def test_image_sizes(c_out, cupy_on_host, monkeypatch):
    """A pixel, a row, a column, tiles that exactly fit; blocks that take several tiles."""
    plan_for(monkeypatch, (1, *A100[1:]))
    for n, height, width in ((1, 1, 1), (1, 2, 70), (1, 20, 2), (3, 8, 32)):
        check(Case(n, height, width, 48, c_out, activation=LEAKY, image=True), LAUNCHERS, calls=1)


def test_image_in_every_shared_memory(cupy_on_host, monkeypatch):
    """Chunks of one step and of two, 2 to 4 stages."""
    found = set()
    for c_in in (48, 64):
        case, ways = Case(2, 9, 33, c_in, 1, activation=NONE, image=True), {}
        for limit in range(48, 228, 4):
            planned = plan_of(case, (1, 1024 * limit, 9))
            ways[planned["chunk"], planned["stages"]] = limit
        for limit in ways.values():
            plan_for(monkeypatch, (1, 1024 * limit, 9))
            check(case, LAUNCHERS, calls=1)
        found |= set(ways)
    assert {chunk for chunk, _ in found} == {1, 2} and {stages for _, stages in found} == {2, 3, 4}


def test_image_places_count_beyond_32_bits(cupy_on_host):
    """The last of 2^22 images of 8x32."""
    n, case = 2**22, Case(1, 8, 32, 16, 3, activation=LEAKY, image=True)
    x, weight, bias = arguments(case)
    taps, _ = pad_layer(weight, bias, case.layer())
    packed, inputs = pack_image(taps, 3, "bf16"), stored(x, torch.bfloat16)
    out = torch.full((1, 3, 8, 32), torch.nan, dtype=torch.bfloat16)
    before = dict(x=inputs.data_ptr() - (n - 1) * 2 * 16 * 256, out=out.data_ptr() - (n - 1) * 2 * 3 * 256)
    planned = plan_of(replace(case, n=n), (2**22, *H200[1:]), weights=packed.data_ptr(), bias=bias.data_ptr(), **before)
    assert planned["tiles"] == planned["walkers"] == n
    with only_last_block("conv_block", n, "bf16"):
        start(planned)
    wanted, _ = oracle(case, x, weight, bias)
    assert torch.equal(out.double(), wanted)


def test_empty_batch(cupy_on_host):
    for case in (Case(0, 4, 4), Case(0, 4, 4, c_out=3, image=True)):
        *_, y = run(case, LAUNCHERS)
        assert y.numel() == 0


def tensors(image=False, dtype=torch.bfloat16):
    """Valid arguments by name."""
    x = torch.zeros(2, 4, 4, 32, dtype=dtype)
    weights, bias = (
        torch.zeros(1, 32 // (32 // x.element_size()), 9, 3, 32, 16 // x.element_size(), dtype=dtype),
        torch.zeros(48),
    )
    out = torch.zeros(2, 4, 4, 64, dtype=dtype)
    if image:
        weights, bias, out = weights[:, :, :1, :2].contiguous(), torch.zeros(3), torch.zeros(2, 3, 4, 4, dtype=dtype)
    return dict(x=x, weights=weights, bias=bias, out=out)


REFUSED = [
    (False, "product", dict(product=4)),
    (False, "activation", dict(activation=3)),
    (False, "x must", dict(x=torch.zeros(2, 4, 32).bfloat16())),
    (False, "x must", dict(x=torch.zeros(2, 4, 4, 24).bfloat16())),
    (False, "x must", dict(x=torch.zeros(2, 0, 4, 32).bfloat16())),
    (False, "x must", dict(x=torch.zeros(2, 4, 4, 32))),
    (False, "x must be contiguous", dict(x=torch.zeros(2, 4, 8, 32).bfloat16()[:, :, ::2])),
    (False, "x must begin", dict(x=torch.zeros(2 * 4 * 4 * 32 + 1).bfloat16()[1:].view(2, 4, 4, 32))),
    (False, "bias", dict(bias=torch.zeros(40))),
    (False, "bias", dict(bias=torch.zeros(48).double())),
    (False, "weights", dict(bias=torch.zeros(32))),
    (False, "weights", dict(upsample=True)),
    (False, "weights", dict(weights=torch.zeros(1, 2, 9, 3, 32, 4))),
    (False, "out", dict(out=torch.zeros(2, 4, 4, 32).bfloat16())),
    (False, "out", dict(out=torch.zeros(2, 4, 4, 56).bfloat16())),
    (False, "out", dict(out=torch.zeros(2, 4, 5, 64).bfloat16())),
    (False, "out", dict(out=torch.zeros(2, 4, 4, 64))),
    (True, "bias", dict(bias=torch.zeros(5))),
    (True, "weights", dict(bias=torch.zeros(1))),
    (True, "out", dict(out=torch.zeros(2, 4, 4, 3).bfloat16())),
]


def moved(tensor, device):
    """A view on another device with the same strides and the same place in its memory."""
    whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.mark.parametrize("image, name, changes", REFUSED)
def test_refusals(image, name, changes, cupy_on_host, launchers=LAUNCHERS, device="cpu"):
    options = {**dict(upsample=False, activation=LEAKY, slope=SLOPE, product=0), **tensors(image), **changes}
    options = {key: moved(value, device) if torch.is_tensor(value) else value for key, value in options.items()}
    if image:
        options.pop("upsample")
    with pytest.raises(RuntimeError, match=name):
        getattr(launchers, "conv_image" if image else "conv_layer")(options.pop("x"), **options)


def test_a_device_too_small_is_refused():
    options = dict(activation=LEAKY, slope=SLOPE, product=0, device=(108, 16 * 1024, 9))
    with pytest.raises(RuntimeError, match="conv_layer: no tile of such a layer fits"):
        plan("conv_layer", **tensors(), upsample=False, **options)
    with pytest.raises(RuntimeError, match="conv_image: no tile of such an image fits"):
        plan("conv_image", **tensors(image=True), **options)


def test_source_is_whole_and_self_contained():
    text = cuda.source("conv_block")
    assert "#include" not in text and "#pragma once" not in text
    assert all(text.count(part) == 1 for part in ("struct bf16 {", "struct product_f32", "constexpr int kConvWarps"))


DEVICES = [A100, CARD, H200, B200]


def preset_layers():
    """The presets' layers, each once, and the image's apart."""
    layers = {layer for config in PRESETS.values() for layer in convolutions(config)}
    wide = [layer for layer in layers if layer.activation != "tanh"]
    return wide, [layer for layer in layers if layer.activation == "tanh"]


def layer_case(layer, n, product):
    return Case(n, layer.height, layer.width, layer.c_in, layer.c_out, layer.upsample, LEAKY, product)


def every_plan_input():
    """Presets at batches of 1 and 64, and sizes that are odd in every way."""
    wide, images = preset_layers()
    odd = [
        Case(n, h, w, c_in, c_out, up, activation)
        for n, h, w in ((7, 3, 50), (100, 1, 1))
        for c_in, c_out in ((80, 176), (16, 48))
        for up in (False, True)
        for activation in (LEAKY, TANH)
    ]
    cases = [layer_case(layer, n, product) for layer in wide for n in (1, 64) for product in ("bf16", "f32")]
    pictures = [
        Case(n, layer.height, layer.width, layer.c_in, layer.c_out, activation=TANH, product=product, image=True)
        for layer in images
        for n in (1, 64)
        for product in ("bf16", "f32")
    ]
    return itertools.product([*cases, *odd, *pictures], DEVICES)


def test_plans_of_the_presets_fit():
    """Plans fit a block's shared memory, take all tiles, and fill many multiprocessors where a layer has work for them."""
    for case, device in every_plan_input():
        p = plan_of(case, device)
        assert p["shared_bytes"] == p.launches[0][3] <= device[1]
        assert p["chunk"] * p["chunks"] == p["steps"] == padded(case.c_in) * DTYPES[case.product].itemsize // 32
        assert p["pixel_warps"] * p["channel_warps"] * p["parts"] == 8 and p["walkers"] <= p["tiles"]
        pixels = p["tile_images"] << p["log_height"] + p["log_width"]
        inputs = case.n * case.height * case.width
        assert p["tiles"] * pixels >= inputs
        assert p.blocks == p["walkers"] * p["channel_blocks"] * p["phases"]
        if case.image:
            continue
        rows, columns, _ = shapes()[p["shape"]]
        assert pixels == 16 * rows * p["pixel_warps"] and p.launches[0][0].startswith(f"advkd_conv_layer_{rows}x{columns}_")
        units = padded(case.c_out) // 16
        assert p["channel_blocks"] * columns * p["channel_warps"] >= units
        assert p.blocks >= 0.4 * min(device[0], inputs // 128 * units * p["phases"])


ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
COMPILED = [
    # A product for each architecture; all of them take a minute.
    *zip(ARCHITECTURES, ("f32", "bf16", "tf32")),
    *(pytest.param(a, p, marks=pytest.mark.slow) for a in ARCHITECTURES for p in PRODUCTS),
]
INSTRUCTIONS = {
    "bf16": "m16n8k16.row.col.f32.bf16.bf16.f32",
    "f16": "m16n8k16.row.col.f32.f16.f16.f32",
    "tf32": "m16n8k8.row.col.f32.tf32.tf32.f32",
    "f32": "m16n8k8.row.col.f32.tf32.tf32.f32",
}


@functools.cache
def machine_code(folder, architecture):
    """One architecture's machine code by entry point, from nvcc's output in ``folder``, if Triton's disassembler is there."""
    spec = importlib.util.find_spec("triton")
    tool = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm" if spec else None
    if architecture != "sm_90a" or tool is None or not tool.is_file():
        return {}
    text = subprocess.run([tool, "-c", folder / "kernels.cubin"], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"\.section\t\.text\.(\w+),(.*?)(?=\.section|\Z)", text, re.S))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("architecture, product", COMPILED)
def test_nvcc(architecture, product, tmp_path):
    """Nothing spills, as many blocks fit as plans assume, products run on tensor cores, copies are asynchronous."""
    known_to_nvcc(architecture)
    source = tmp_path / "one_product.cu"
    source.write_text(f'#define ADVKD_VARIANTS(EACH) EACH({product})\n#include "cuda/conv_block.cu"\n')
    kernels = {name: rest for name, *rest in cuda_kernels(source, tmp_path, architecture)}
    entries = {f"layer_{rows}x{columns}": (rows, columns, blocks) for rows, columns, blocks in shapes()}
    entries |= {f"image_{columns}": (3, columns, 2) for columns in (1, 2, 3)}
    assert sorted(kernels) == sorted(f"advkd_conv_{shape}_{product}" for shape in entries)
    for shape, (rows, columns, blocks) in entries.items():
        spilled, registers, ptx = kernels[f"advkd_conv_{shape}_{product}"]
        if product == "f32" and shape.startswith("layer") and rows * columns >= 8:
            blocks = 1
        assert spilled == 0 and ".local" not in ptx and registers <= (128 if blocks == 2 else 255), shape
        least = 2 * rows * columns * (3 if product == "f32" else 1)
        assert ptx.count(f"mma.sync.aligned.{INSTRUCTIONS[product]}") >= least, shape
        assert "cp.async.cg.shared.global" in ptx and "ldmatrix.sync" in ptx, shape
        if code := machine_code(tmp_path, architecture):
            body = code[f"advkd_conv_{shape}_{product}"]
            assert body.count("HMMA.") >= least and "LDSM." in body and "LDGSTS." in body and "LDL" not in body, shape
        if shape.startswith("layer"):
            assert re.search(r"st\.global\S*\.v4\.", ptx), shape


def gpu_launchers(compiled_by):
    """Both launchers on a GPU, of the extension or of CuPy."""
    if compiled_by == "cupy":
        if reason := cuda.gap():
            pytest.skip(reason)
        return LAUNCHERS
    if reason := extension_gap("cuda"):
        pytest.skip(reason)
    return torch.ops.advkd_cuda


GPU = pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("product", PRODUCTS)
def test_small_on_a_gpu(product, compiled_by):
    launchers = gpu_launchers(compiled_by)
    for activation, upsample in itertools.product((NONE, LEAKY, TANH), (False, True)):
        for size in SIZES:
            check(Case(*size, 29, 24, upsample, activation, product, exact=False), launchers, "cuda")
            check(Case(*size, 16, 40, upsample, activation, product, extra=16), launchers, "cuda")
        check(replace(IMAGE, product=product, activation=activation), launchers, "cuda")
    for c_out in (1, 2, 3, 4):
        for n, height, width in ((1, 1, 1), (1, 2, 70), (1, 20, 2), (3, 8, 32), (2, 33, 65)):
            check(Case(n, height, width, 48, c_out, product=product, image=True), launchers, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("c_out", WIDTHS)
def test_every_plan_on_a_gpu(c_out, monkeypatch):
    launchers = gpu_launchers("cupy")
    limits = cuda.limits(torch.device("cuda", 0))
    for candidate, case in itertools.product(candidates(c_out), (SEVERAL, RAGGED)):
        case = replace(case, c_out=c_out)
        if take(plan_of(case, limits), candidate, limits):
            force(monkeypatch, candidate, limits)
            check(case, launchers, "cuda")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("product", ["bf16", "f32"])
def test_presets_on_a_gpu(product, exact, compiled_by):
    """Every layer of the presets for one image and, where it is small, for many: all that plans choose there."""
    launchers, (wide, images) = gpu_launchers(compiled_by), preset_layers()
    for layer in wide:
        for n in (1, 3 if layer.height > 64 else 40):
            check(replace(layer_case(layer, n, product), exact=exact), launchers, "cuda")
    for layer in images:
        case = Case(3, layer.height, layer.width, layer.c_in, layer.c_out, False, TANH, product, image=True, exact=False)
        check(case, launchers, "cuda")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("image, name, changes", REFUSED)
def test_refusals_on_a_gpu(image, name, changes, compiled_by):
    test_refusals(image, name, changes, None, gpu_launchers(compiled_by), "cuda")
