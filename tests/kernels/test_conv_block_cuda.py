"""The student's CUDA convolutions: the kernels' arithmetic on the host, against float64; on a GPU where there is one."""

import ctypes
import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advkd.models.shape import PRESETS, convolutions
from advkd.ops import cuda
from advkd.ops.conv_layer import ACTIVATIONS
from advkd.ops.gpu_storage import PRODUCTS, padded

from ..conftest import ROOT
from .cases import UP, Case, arguments, case_of, check, convolve, draw, expected, meta, pack, run, starter, store
from .cuda_on_host import only_last_block
from .host_plans import A100, B200, CARD, H200, LAUNCHERS, change_plans, gpu_launchers, plan, plan_for, start
from .test_compile_ahead import cuda_kernels, known_to_nvcc

HOST = (3, 163 * 1024, 9)
ON_HOST = starter(LAUNCHERS)


def plan_of(case, device=H200, **begins):
    """The plan of a layer or an image of any size; ``begins``: addresses of its tensors."""
    found = plan(case.launcher, *arguments(case, *meta(case)), device=device)
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
    """``(shape, channel_warps, parts, resident)`` of every plan that may suit a layer: at least a dozen."""
    every = itertools.product(range(len(shapes())), (1, 2, 4, 8), (1, 2, 4, 8), (1, 0))
    found = [candidate for candidate in every if planner().suits(c_out // 16, *candidate[:3])]
    assert len(found) >= 12
    return found


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("ups", [(), UP])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_and_activations(product, ups, activation, cupy_on_host):
    for size in SIZES[:2]:
        check(Case(*size, (29, 24), ups, activation, product), ON_HOST)


@pytest.mark.parametrize("ups", [(), pytest.param(UP, marks=pytest.mark.core)])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, ups, cupy_on_host):
    check(Case(*size, (16, 40), ups, exact=True, more=16), ON_HOST)


# Layers whose channels give the warps' sums every width, 1 to 4 units; 5 and 7 units leave blocks of channels partly full.
WIDTHS = (16, 32, 80, 112)
# Tiles of several images, some of them beyond the last; tiles that an image does not fill. Blocks take several tiles.
SEVERAL, RAGGED = Case(5, 6, 7, exact=True, more=16), Case(1, 18, 33, ups=UP, exact=True)


def test_widths_reach_every_shape():
    assert {shape for c_out in WIDTHS for shape, *_ in candidates(c_out)} == set(range(len(shapes()))) != set()


@pytest.mark.parametrize("c_out", WIDTHS)
def test_every_plan(c_out, cupy_on_host, monkeypatch):
    for candidate in candidates(c_out):
        force(monkeypatch, candidate)
        resident = candidate[-1]
        check(replace(SEVERAL if resident else RAGGED, channels=(16, c_out)), ON_HOST, calls=1)


@pytest.mark.slow
@pytest.mark.parametrize("c_out", WIDTHS)
def test_every_plan_with_every_size(c_out, cupy_on_host, monkeypatch):
    """Plans with three steps are included; resident weights need more shared memory then."""
    sizes = list(itertools.product((SEVERAL, RAGGED), (16, 48), ((), UP)))
    for candidate, (size, c_in, ups) in itertools.product(candidates(c_out), sizes):
        force(monkeypatch, candidate, (3, *H200[1:]))
        check(replace(size, channels=(c_in, c_out), ups=ups), ON_HOST, calls=1)


def test_every_way_to_share_shared_memory(cupy_on_host, monkeypatch):
    """Chunks of 1 to 4 steps, weights that stay resident or arrive with the chunks, 2 to 4 stages."""
    found = set()
    # 3 steps are chunks of 3 and 1, 4 steps of 4, 2 and 1; the smallest sums, in parts of K and whole.
    for c_in, ups, candidate in ((48, (), (5, 2, 2)), (64, UP, (5, 1, 1)), (48, UP, (5, 2, 1))):
        case = Case(2, 9, 10, (c_in, 32), ups, exact=True)
        ways = {}
        for limit, resident in itertools.product(range(16, 228, 2), (0, 1)):
            attempt = plan_of(case)
            if take(attempt, (*candidate, resident), (2, 1024 * limit)):
                ways[tuple(attempt[name] for name in ("chunk", "stages", "resident"))] = limit
        for way, limit in ways.items():
            force(monkeypatch, (*candidate, way[2]), (2, 1024 * limit))
            check(case, ON_HOST, calls=1)
        found |= set(ways)
    assert {(chunk, resident) for chunk, _, resident in found} == set(itertools.product((1, 2, 3, 4), (0, 1)))
    assert {stages for _, stages, _ in found} == {2, 3, 4}


@pytest.mark.parametrize("product", PRODUCTS)
def test_large_sums_of_every_product(product, cupy_on_host, monkeypatch):
    """Two chunks of several images a tile, and up-sampling; the widest sums."""
    force(monkeypatch, (0, 1, 1, 1), H200)
    check(Case(5, 6, 7, (32, 64), product=product, exact=True), ON_HOST)
    check(Case(1, 9, 17, (16, 64), UP, "none", product, exact=True), ON_HOST)


@pytest.mark.parametrize("ups", [(), UP])
def test_a_number_that_is_not_finite_stays_where_it_is(ups, cupy_on_host):
    """A NaN in x spoils the outputs that read it, and no other: pixels outside the image are zero, not a neighbour."""
    case = Case(2, 5, 6, ups=ups)
    x, (weight,), biases = draw(case)
    x[0, 3, 0, 5] = x[0, 3, 4, 0] = torch.nan
    found = run(case, ON_HOST, x, *pack(case, [torch.ones_like(weight)], biases))
    spoiled = convolve(x[:, 3:4].isnan().float(), torch.ones(1, 1, 3, 3), bool(ups)) > 0
    assert torch.equal(found.isnan(), spoiled.expand(-1, 16, -1, -1))


def last_image(case, n, limits, forced=None, blocks_after=0):
    """Run the last of ``n`` such images, before whose tensors there is no memory."""
    x, weights, biases = draw(case)
    tensors = [store(case, x), *(t[0] for t in pack(case, weights, biases))]
    _, _, _, out = meta(case)
    out = torch.full(out.shape, torch.nan, dtype=case.dtype)
    before = [t.data_ptr() - (n - 1) * t.numel() * t.element_size() for t in (tensors[0], out)]
    places = dict(weights=tensors[1].data_ptr(), bias=tensors[2].data_ptr())
    planned = plan_of(replace(case, n=n), limits, x=before[0], out=before[1], **places)
    assert forced is None or take(planned, forced, limits)
    assert planned["tiles"] == planned["walkers"] == n
    with only_last_block("conv_block", planned.blocks - blocks_after, "bf16"):
        start(planned)
    wanted, _ = expected(case, x, weights, biases)
    assert torch.equal((out if case.image else out.permute(0, 3, 1, 2)).double(), wanted)


@pytest.mark.parametrize("ups", [(), UP])
def test_places_count_beyond_32_bits(ups, cupy_on_host):
    """The last of 2^20 images of 16x16: x and out end at least 2^33 bytes after they begin."""
    case = Case(1, 16, 16, (32, 32), ups, exact=True)
    last_image(case, 2**20, (2**22, H200[1], 9), (4, 1, 1, 1), 3 if ups else 0)


IMAGE = Case(2, 11, 45, (29, 3), activation="tanh", image=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_image(product, activation, cupy_on_host):
    """Two images of two rows and two columns of partial tiles."""
    check(replace(IMAGE, product=product, activation=activation), ON_HOST)


@pytest.mark.parametrize("c_out", [1, 2, pytest.param(3, marks=pytest.mark.core), 4])
def test_image_sizes(c_out, cupy_on_host, monkeypatch):
    """A pixel, a row, a column, tiles that exactly fit; blocks that take several tiles."""
    plan_for(monkeypatch, (1, *A100[1:]))
    for size in ((1, 1, 1), (1, 2, 70), (1, 20, 2), (3, 8, 32)):
        check(Case(*size, (48, c_out), image=True, exact=True), ON_HOST, calls=1)


def test_image_in_every_shared_memory(cupy_on_host, monkeypatch):
    """Chunks of one step and of two, 2 to 4 stages."""
    found = set()
    for c_in in (48, 64):
        case, ways = Case(2, 9, 33, (c_in, 1), activation="none", image=True, exact=True), {}
        for limit in range(48, 228, 4):
            planned = plan_of(case, (1, 1024 * limit, 9))
            ways[planned["chunk"], planned["stages"]] = limit
        for limit in ways.values():
            plan_for(monkeypatch, (1, 1024 * limit, 9))
            check(case, ON_HOST, calls=1)
        found |= set(ways)
    assert {chunk for chunk, _ in found} == {1, 2} and {stages for _, stages in found} == {2, 3, 4}


def test_image_places_count_beyond_32_bits(cupy_on_host):
    """The last of 2^22 images of 8x32."""
    last_image(Case(1, 8, 32, (16, 3), image=True, exact=True), 2**22, (2**22, *H200[1:]))


@pytest.mark.parametrize("case", [Case(0, 4, 4), Case(0, 4, 4, (16, 3), image=True)], ids=str)
def test_empty_batch(case, cupy_on_host):
    x, *layers = draw(case)
    assert run(case, ON_HOST, x, *pack(case, *layers)).numel() == 0


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


def check_refused(launchers, device, image, name, changes):
    options = {**dict(upsample=False, activation=1, slope=0.2, product=0), **tensors(image), **changes}
    options = {key: moved(value, device) if torch.is_tensor(value) else value for key, value in options.items()}
    if image:
        options.pop("upsample")
    with pytest.raises(RuntimeError, match=name):
        getattr(launchers, "conv_image" if image else "conv_layer")(options.pop("x"), **options)


@pytest.mark.parametrize("image, name, changes", REFUSED)
def test_refusals(image, name, changes, cupy_on_host):
    check_refused(LAUNCHERS, "cpu", image, name, changes)


def test_a_device_too_small_is_refused():
    options = dict(activation=1, slope=0.2, product=0, device=(108, 16 * 1024, 9))
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
    wide = [replace(layer, detail=0) for layer in layers if layer.activation != "tanh"]
    return wide, [layer for layer in layers if layer.activation == "tanh"]


def every_plan_input():
    """Presets at batches of 1 and 64, and sizes that are odd in every way."""
    wide, images = preset_layers()
    cases = [
        case_of([layer], n, product=product, image=layer in images)
        for layer in (*wide, *images)
        for n in (1, 64)
        for product in ("bf16", "f32")
    ]
    cases += [
        Case(*size, channels, ups, activation)
        for size in ((7, 3, 50), (100, 1, 1))
        for channels in ((80, 176), (16, 48))
        for ups in ((), UP)
        for activation in ("leaky_relu", "tanh")
    ]
    return itertools.product(cases, DEVICES)


def test_plans_of_the_presets_fit():
    """Plans fit a block's shared memory, take all tiles, and fill many multiprocessors where a layer has work for them."""
    for case, device in every_plan_input():
        p = plan_of(case, device)
        assert p["shared_bytes"] == p.launches[0][3] <= device[1]
        assert p["chunk"] * p["chunks"] == p["steps"] == padded(case.channels[0]) * case.dtype.itemsize // 32
        assert p["pixel_warps"] * p["channel_warps"] * p["parts"] == 8 and p["walkers"] <= p["tiles"]
        pixels = p["tile_images"] << p["log_height"] + p["log_width"]
        inputs = case.n * case.height * case.width
        assert p["tiles"] * pixels >= inputs
        assert p.blocks == p["walkers"] * p["channel_blocks"] * p["phases"]
        if case.image:
            continue
        rows, columns, _ = shapes()[p["shape"]]
        assert pixels == 16 * rows * p["pixel_warps"] and p.launches[0][0].startswith(f"advkd_conv_layer_{rows}x{columns}_")
        units = padded(case.channels[1]) // 16
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


GPU = pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("product", PRODUCTS)
def test_small_on_a_gpu(product, compiled_by):
    start = starter(gpu_launchers(compiled_by))
    for activation in ACTIVATIONS:
        for ups, size in itertools.product(((), UP), SIZES):
            check(Case(*size, (29, 24), ups, activation, product), start, "cuda")
            check(Case(*size, (16, 40), ups, activation, product, exact=activation != "tanh", more=16), start, "cuda")
        check(replace(IMAGE, product=product, activation=activation), start, "cuda")
    for c_out in (1, 2, 3, 4):
        for size in ((1, 1, 1), (1, 2, 70), (1, 20, 2), (3, 8, 32), (2, 33, 65)):
            check(Case(*size, (48, c_out), product=product, image=True, exact=True), start, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("c_out", WIDTHS)
def test_every_plan_on_a_gpu(c_out, monkeypatch):
    launch = starter(gpu_launchers("cupy"))
    limits = cuda.limits(torch.device("cuda", 0))
    fits = 0
    for candidate, case in itertools.product(candidates(c_out), (SEVERAL, RAGGED)):
        case = replace(case, channels=(16, c_out))
        if take(plan_of(case, limits), candidate, limits):
            force(monkeypatch, candidate, limits)
            check(case, launch, "cuda")
            fits += 1
    assert fits >= 12


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("product", ["bf16", "f32"])
def test_presets_on_a_gpu(product, exact, compiled_by):
    """Every layer of the presets for one image and, where it is small, for many: all that plans choose there."""
    start, (wide, images) = starter(gpu_launchers(compiled_by)), preset_layers()
    for layer in wide:
        for n in (1, 3 if layer.height > 64 else 40):
            check(case_of([layer], n, product=product, exact=exact), start, "cuda")
    for layer in images:
        check(case_of([layer], 3, product=product, image=True), start, "cuda")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("image, name, changes", REFUSED)
def test_refusals_on_a_gpu(image, name, changes, compiled_by):
    check_refused(gpu_launchers(compiled_by), "cuda", image, name, changes)
