"""Two convolutions in one kernel: on the host as their host side plans them, compiled ahead of time, and on a GPU."""

import itertools
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

from advkd.models.shape import PRESETS, convolutions
from advkd.ops import cuda, gpu_storage, registry
from advkd.ops.gpu_storage import PRODUCTS, input_channels, padded

from .cases import UP, Case, arguments, case_of, check, check_captured, draw, meta, pack, run, starter
from .cuda_on_host import in_order, only_last_block
from .host_plans import LAUNCHERS, change_plans, gpu_launchers, plan, plan_for
from .test_compile_ahead import cuda_kernels, known_to_nvcc

ON_HOST = starter(LAUNCHERS)
LIMITS = {"whole": (1, 227 * 1024, 9), "part": (1, 0, 9), "small": (10**6, 227 * 1024, 9)}
"""Multiprocessors and shared memory for which a plan takes 16 x 16, 8 x 16 (the limit is set for each case) and 8 x 8."""

PLAIN = [
    # One pixel and less than a tile: all border.
    Case(1, 1, 1, (16, 16, 16)),
    Case(2, 3, 5, (5, 20, 16), activation="none", tile="small"),
    # Ragged in both axes, several tiles; channels behind the layer's own in `out`.
    Case(1, 17, 19, (32, 32, 32), more=16),
    Case(1, 9, 11, (32, 32, 32), activation="none", more=32, tile="small"),
    Case(1, 9, 17, (30, 24, 20), tile="part"),
    # Whole tiles, several images.
    Case(2, 16, 32, (16, 16, 16)),
    Case(3, 8, 16, (16, 16, 16), tile="small"),
    # Three columns of 16 channels in one turn of a warp, and in two that overlap (in the first convolution, in the second).
    Case(1, 16, 17, (48, 48, 48)),
    Case(1, 8, 10, (48, 48, 48), tile="part"),
    Case(1, 5, 18, (16, 32, 48)),
    # Four columns in two turns; fewer columns in the second than a warp has; many more.
    Case(1, 16, 18, (64, 64, 64)),
    Case(1, 7, 8, (32, 48, 32)),
    Case(1, 4, 4, (48, 16, 64)),
    # Large inputs and little else: surplus lanes must not read past their end either.
    Case(1, 9, 16, (64, 16, 16)),
    Case(1, 8, 7, (64, 16, 16), tile="small"),
]
DOUBLED = [
    Case(1, 1, 1, (16, 16, 16), UP),
    Case(2, 2, 3, (20, 16, 5), UP, activation="none", tile="small"),
    # 18 x 22 outputs: ragged in both axes.
    Case(1, 9, 11, (32, 32, 32), UP, more=16),
    Case(1, 5, 9, (16, 16, 16), UP, tile="small"),
    Case(1, 5, 9, (48, 32, 32), UP, tile="part"),
    Case(2, 8, 16, (16, 16, 16), UP),
    Case(1, 8, 8, (64, 48, 48), UP),
    Case(1, 5, 4, (48, 48, 48), UP, tile="small"),
    Case(1, 8, 9, (64, 64, 64), UP),
    Case(1, 3, 4, (48, 16, 32), UP),
]
IMAGES = [
    Case(1, 1, 1, (16, 16, 1), image=True),
    Case(2, 7, 5, (16, 16, 2), image=True, activation="none", tile="small"),
    Case(1, 17, 19, (32, 32, 3), image=True),
    Case(1, 9, 10, (48, 48, 3), image=True, tile="part"),
    Case(2, 16, 18, (48, 48, 4), image=True),
    Case(1, 13, 14, (64, 64, 1), image=True),
    Case(1, 3, 9, (32, 32, 4), image=True, tile="small"),
    Case(1, 1, 1, (16, 16, 3), UP, image=True),
    Case(2, 9, 7, (32, 32, 3), UP, image=True),
    Case(1, 5, 5, (16, 16, 2), UP, image=True, tile="small"),
    Case(1, 4, 9, (48, 64, 4), UP, image=True, tile="part"),
]
ALL = [*PLAIN, *DOUBLED, *IMAGES]
FEW = [ALL[i] for i in (0, 2, 4, 7, 8, 16, 17, 19, 22, 27, 28, 31, 33, 35)]
"""Cases for products that take longer to emulate: tiles of each size, ragged ones, up-sampled ones, images."""


def limits_of(case):
    """A case's limits; "part": as much shared memory as 8 x 16 outputs need."""
    return (1, shared_bytes((8, 16), case), 9) if case.tile == "part" else LIMITS[case.tile or "whole"]


def shared_bytes(tile, case):
    """Shared memory of a tile: the inputs with their border, or what becomes of them, and the pixels between."""
    (height, width), element, (c_in, c_mid, c_out) = tile, case.dtype.itemsize, case.channels
    mid = (height + 2) * (width + 2)
    inputs = (height // 2 + 2) * (width // 2 + 2) if case.upsample else (height + 4) * (width + 4)
    image = 4 * mid * (9 * c_out | 1)
    outputs = image if case.image else height * width * (padded(c_out) * element + 16)
    return max(inputs * (padded(c_in) * element + 16), outputs) + mid * (padded(c_mid) * element + 16)


def plan_of(case, device):
    """The plan of a pair of any size."""
    return plan("conv_pair", *arguments(case, *meta(case)), device=device)


EXACT = [replace(case, exact=True) for case in ALL]
EXACT += [replace(case, exact=True, product=product) for product in ("f16", "tf32", "f32") for case in FEW]
BOUND = [
    replace(case, activation=activation, product=product)
    for product in PRODUCTS
    for case, activation in zip((ALL[1], ALL[17], ALL[26], ALL[32]), ("tanh", "leaky_relu", "tanh", "tanh"))
]
CORE = replace(DOUBLED[2], exact=True)
HOSTED = [pytest.param(case, id=str(case), marks=pytest.mark.core if case == CORE else ()) for case in EXACT]


@pytest.fixture
def on_host(cupy_on_host, monkeypatch):
    """A function that checks a case on the host within its limits."""

    def run(case):
        plan_for(monkeypatch, limits_of(case))
        check(case, ON_HOST)

    return run


@pytest.mark.parametrize("case", HOSTED)
def test_exact_on_the_host(case, on_host):
    on_host(case)


@pytest.mark.parametrize("case", BOUND, ids=str)
def test_rounding_on_the_host(case, on_host):
    on_host(case)


def test_cases_take_every_tile_and_kernel():
    """The cases cover tiles of each size and one to three columns."""
    tiles, columns = set(), set()
    for case in EXACT:
        plan = plan_of(case, limits_of(case))
        tile = plan["tile_height"], plan["tile_width"]
        if case.tile or 2**case.upsample * min(case.height, case.width) > 8:
            assert tile == {"whole": (16, 16), "part": (8, 16), "small": (8, 8)}[case.tile or "whole"]
        tiles.add((*tile, case.upsample, case.image))
        columns.add((plan["columns"], case.product))
    assert len(tiles) == 12 and len(columns) == 12


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", [PLAIN[2], DOUBLED[0], IMAGES[1]], ids=str)
def test_warps_in_any_order(case, order, on_host):
    """Warps wait for each other wherever one needs another's result."""
    with in_order(order, "conv_pair", "bf16"):
        on_host(replace(case, exact=True))


def launch(case):
    x, *layers = draw(case)
    return run(case, ON_HOST, x, *pack(case, *layers))


@pytest.mark.parametrize("ups", [(), UP])
@pytest.mark.parametrize("image", [False, True])
def test_a_block_writes_its_tile_alone(ups, image, cupy_on_host, monkeypatch):
    """Only the first of 3 x 3 tiles is computed."""
    side = 10 if ups else 20

    def first_alone(planned):
        assert planned.launches[0][1] == 9
        planned.launches[0][1] = 1

    plan_for(monkeypatch, LIMITS["small"])
    change_plans(monkeypatch, first_alone)
    y = launch(Case(1, side, side, (16, 16, 3 if image else 16), ups, image=image))
    written = torch.zeros(y.shape, dtype=torch.bool)
    written[..., :8, :8] = True
    assert torch.equal(~y.isnan(), written)


@pytest.mark.parametrize("image", [False, True])
def test_empty_batch(image, cupy_on_host):
    assert launch(Case(0, 4, 4, (16, 16, 3 if image else 16), image=image)).numel() == 0


@pytest.mark.parametrize("ups, image", [((), False), (UP, False), ((), True)])
def test_elements_count_beyond_32_bits(ups, image, cupy_on_host, monkeypatch):
    """The last of 2^25 images of 8 x 8 pixels: more than 2^31 elements before it."""
    n, c_out, side = 2**25 + 1, 3 if image else 16, 4 if ups else 8
    case = Case(1, side, side, (16, 16, c_out), ups, image=image, exact=True)
    large = plan_of(replace(case, n=n), LIMITS["small"])
    assert large.blocks == n

    def last_of_many(planned):
        x_bytes, out_bytes = 2 * 16 * side**2, 2 * c_out * 64
        large.update(x=planned["x"] - (n - 1) * x_bytes, out=planned["out"] - (n - 1) * out_bytes)
        large.update(**{name: planned[name] for name in ("weights1", "weights2", "bias1", "bias2", "activation", "slope")})
        planned.fields, planned.launches = large.fields, large.launches

    plan_for(monkeypatch, LIMITS["small"])
    change_plans(monkeypatch, last_of_many)
    with only_last_block("conv_pair", n, "bf16"):
        check(case, ON_HOST)


def good_arguments():
    x, bias = torch.zeros(1, 8, 8, 16).bfloat16(), torch.zeros(16)
    weights = gpu_storage.pack_fragments(torch.zeros(1, 9, 16, 16), "bf16")
    tensors = dict(x=x, weights1=weights, bias1=bias, weights2=weights, bias2=bias, out=torch.zeros_like(x))
    return {**tensors, **dict(upsample=False, image=False, activation=1, slope=0.2, product=0)}


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
        plan_of(Case(2**28, 64, 64, (16, 16, 16)), LIMITS["whole"])
    with pytest.raises(RuntimeError, match="2\\^29"):
        plan_of(Case(1, 1, 2**29 + 1, (16, 16, 16)), LIMITS["whole"])


# Sizes of x, channels, up-sampled or not, image or not, bytes of an element, multiprocessors, shared memory: cards of each
# kind, one image and many, every tile, and sizes that do not fit.
PLANS = [
    (Case(n, side, side + 3 * ragged, channels, ups, image=image, product=product), (multiprocessors, kilobytes * 1024, 9))
    for n, side, ragged in ((1, 1, 1), (1, 32, 0), (64, 128, 1), (7, 9, 0))
    for channels, image in (
        ((16, 16, 16), False),
        ((48, 48, 48), False),
        ((64, 64, 64), False),
        ((32, 32, 3), True),
        ((64, 16, 4), True),
    )
    for ups in ((), UP)
    for product in ("bf16", "f32")
    for multiprocessors, kilobytes in ((132, 227), (108, 163), (128, 99), (40, 48), (40, 9))
]
# As many blocks as multiprocessors, and one less.
PLANS += [(Case(1, 64, 64, (32, 32, 32)), (blocks, 2**17, 9)) for blocks in (16, 17)]
TILES = [(16, 16), (8, 16), (8, 8)]


def test_plans():
    """Tiles cover the image, shared memory is as needed and within the limit, quotients are exact for every dividend."""
    found = set()
    for case, device in PLANS:
        element, up, (c_in, _, c_out) = case.dtype.itemsize, case.upsample, case.channels
        if min(shared_bytes(tile, case) for tile in TILES) > device[1]:
            assert device[1] < 99 * 1024
            with pytest.raises(RuntimeError, match="do not fit"):
                plan_of(case, device)
            continue
        p = plan_of(case, device)
        th, tw = p["tile_height"], p["tile_width"]
        found.add((th, tw))
        assert p["shared"] == p.launches[0][3] == shared_bytes((th, tw), case) <= device[1]
        assert p["shared"] % 16 == p["mid_place"] % 16 == 0
        for count, tile, side in ((p["down"], th, case.height << up), (p["across"], tw, case.width << up)):
            assert count * tile >= side > (count - 1) * tile
        assert p.blocks == p["blocks"] == case.n * p["down"] * p["across"]
        rows, columns = (th // 2 + 2, tw // 2 + 2) if up else (th + 4, tw + 4)
        grid = (th + 2) * (tw + 2) // (4 if up else 1)
        chunks, out_chunks = c_in * element // 16, c_out * element // 16
        divided = [("by_input_chunks", chunks, rows * columns * chunks)]
        divided += [("by_input_width", columns, rows * columns), ("by_grid_width", (tw + 2) // (1 + up), grid + 48)]
        divided += [("by_sets", -(-grid // 48), 4 * 4 * 8)]
        divided += [] if case.image else [("by_out_chunks", out_chunks, th * tw * out_chunks)]
        for name, divisor, most in divided:
            numerators = torch.arange(most)
            assert torch.equal(numerators * p[name] >> 20, numerators // divisor) and most * p[name] < 2**32
    assert found == set(TILES)
    # The smaller tile where there are more multiprocessors than blocks, and where it suffices for the image.
    case = Case(1, 64, 64, (32, 32, 32))
    assert [plan_of(case, (count, 2**17, 9)).blocks for count in (16, 32, 132)] == [16, 32, 64]
    assert plan_of(Case(64, 8, 8, (32, 32, 32)), (16, 2**17, 9))["tile_height"] == 8


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


def preset_pairs(preset):
    """Every pair of a preset's convolutions that the kernel supports."""
    found, layers = [], convolutions(PRESETS[preset])
    for first, second in itertools.pairwise(layers):
        image = second is layers[-1]
        if not image:
            second = replace(second, c_out=padded(second.c_out))
        case = case_of([first, second], 2, image=image)
        if not second.upsample and not second.detail and fits(*fitted(case), "bf16", 227 * 1024):
            found.append(case)
    assert found
    return found


def fitted(case):
    """Channels in units, and kind, as the query of what fits takes them."""
    first, second = case.layers
    return input_channels(first), padded(first.c_out), second.c_out, first.upsample, case.image


@pytest.mark.parametrize("preset", PRESETS)
def test_shared_memory_of_the_presets(preset):
    """Whole tiles of up to 48 channels in 16 bits within 99 KB, of 64 within 163 KB and twice within 227 KB."""
    for case in preset_pairs(preset):
        plan, first = plan_of(replace(case, n=256), (132, 227 * 1024, 9)), case.layers[0]
        assert plan["shared"] <= (99 if max(fitted(case)[:3]) <= 48 else 113) * 1024
        assert (plan["tile_height"] == 16) == (first.height << first.upsample > 8)
        for kilobytes in (99, 163, 227):
            assert fits(*fitted(case), "f32", kilobytes * 1024)


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
        narrow = product in ("bf16", "f16")
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


GPU = pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("case", [*(replace(c, exact=True, product=p) for c in ALL for p in PRODUCTS), *BOUND], ids=str)
def test_on_a_gpu(case, compiled_by):
    check(case, starter(gpu_launchers(compiled_by)), "cuda")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("product", ["bf16", "f32"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_on_a_gpu(preset, product, compiled_by):
    start = starter(gpu_launchers(compiled_by))
    for case, changes in itertools.product(preset_pairs(preset), ({}, {"activation": "none", "exact": True})):
        check(replace(case, product=product, **changes), start, "cuda")


@pytest.mark.gpu
@GPU
def test_captured_on_a_gpu(compiled_by):
    check_captured(Case(1, 8, 8, (16, 16, 16)), starter(gpu_launchers(compiled_by)))
