"""The student's first layers in one launch.

The CUDA kernel on the host, clusters and all, against float64; on a GPU where there is one; compiled ahead of time.
"""

import functools
import itertools
import re
import shutil
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from advkd.engines.gpu_search import stem_layers
from advkd.models.shape import PRESETS, FusedStudentConfig, convolutions
from advkd.ops import cuda
from advkd.ops.conv_layer import ConvLayer
from advkd.ops.gpu_storage import PRODUCTS, pack_fragments, pad_layer, padded, stem_numbers
from advkd.runtime.extension import extension_gap

from .cuda_on_host import in_order
from .host_plans import H200, LAUNCHERS, plan
from .test_compile_ahead import cuda_kernels, known_to_nvcc

SLOPE = 0.3
LIMITS = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}


def chain(*shapes):
    """Layers (c_in, c_out, upsample) from 4x4 on."""
    layers, side = [], 4
    for c_in, c_out, upsample in shapes:
        layers.append(ConvLayer(c_in, c_out, side, side, bool(upsample)))
        side *= 2 if upsample else 1
    return layers


CHAINS = {
    # In 16 bits, nine units for eight parts of a sum.
    "smallest": chain((16, 16, 0)),
    # Nine columns: no cluster divides them, and one of its blocks has an odd one left.
    "columns": chain((48, 144, 0), (144, 16, 1)),
    # Up-sampling comes first and last; three columns.
    "up": chain((16, 48, 1), (48, 16, 1)),
    # Each kind of layer at each side up to 16; channels that do not fill their units.
    "kinds": chain((20, 40, 0), (40, 24, 0), (24, 33, 1), (33, 20, 0), (20, 16, 1), (16, 16, 0)),
    # The largest side, several rounds of tiles.
    "large": chain((16, 16, 1), (16, 16, 1), (16, 32, 1), (32, 16, 0)),
}


def dtype_of(product):
    return {"bf16": torch.bfloat16, "f16": torch.float16}.get(product, torch.float32)


@dataclass
class Network:
    """Layers with their weights as given, `(C_out, C_in, 3, 3)` in the storage dtype, and as the kernel takes them."""

    layers: list
    product: str
    device: str = "cpu"

    def __post_init__(self):
        generator = torch.Generator().manual_seed(1)
        self.weights, self.biases, packed = [], [], []
        for layer in self.layers:
            weight = torch.randn(layer.c_out, layer.c_in, 3, 3, generator=generator) / (9 * layer.c_in) ** 0.5
            self.weights.append(weight.to(dtype_of(self.product)).float())
            self.biases.append(torch.randn(layer.c_out, generator=generator) / 4)
            taps, bias = pad_layer(self.weights[-1], self.biases[-1], layer)
            packed.append((pack_fragments(taps, self.product).to(self.device), bias.to(self.device)))
        self.packed = [list(parts) for parts in zip(*packed)]

    def input(self, n):
        layer = self.layers[0]
        x = torch.randn(n, 4, 4, layer.c_in, generator=torch.Generator().manual_seed(n))
        return F.pad(x, (0, padded(layer.c_in) - layer.c_in)).to(dtype_of(self.product)).to(self.device)

    def run(self, x, cluster=1, images=1, count=None, launch=None):
        """The first `count` layers' result `(N, R, R, C_out)`; checks that nothing else is written."""
        layers = self.layers[:count]
        last = layers[-1]
        side, channels = last.height * (2 if last.upsample else 1), padded(last.c_out)
        whole = torch.full((len(x) + 2, side, side, channels + 16), torch.nan, dtype=x.dtype, device=x.device)
        out, weights, biases = whole[1:-1], self.packed[0][: len(layers)], self.packed[1][: len(layers)]
        numbers, product = stem_numbers(layers), PRODUCTS.index(self.product)
        launch = launch or LAUNCHERS.student_stem
        assert launch(x, weights, biases, out, numbers, SLOPE, product, cluster, images) is None
        assert whole[0].isnan().all() and whole[-1].isnan().all() and out[..., channels:].isnan().all(), "written beyond out"
        assert not out[..., last.c_out : channels].any(), "channels that fill a unit are zeros"
        return out[..., : last.c_out].clone()


@functools.cache
def network(name, product, device="cpu"):
    return Network(CHAINS[name], product, device)


def filters(weight, upsample):
    """The 3x3 filters on the low-resolution input by place in the output; one where nothing is up-sampled."""
    if not upsample:
        return {(0, 0): weight}
    fold = torch.tensor([[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    return {(a, b): torch.einsum("ocij,ui,vj->ocuv", weight, fold[a], fold[b]) for a in (0, 1) for b in (0, 1)}


def convolve(x, weight, upsample, positive):
    """The sums of nine taps, float64, `(N, C, H, W)`; `positive`: of all terms' sizes, after the phases' folding."""
    step = 2 if upsample else 1
    out = x.new_empty(len(x), len(weight), step * x.shape[2], step * x.shape[3])
    edged = F.pad(x.abs() if positive else x, (1, 1, 1, 1))
    for (a, b), taps in filters(weight, upsample).items():
        taps = taps.abs() if positive else taps
        windows = [
            torch.einsum("nchw,oc->nohw", edged[:, :, i : i + x.shape[2], j : j + x.shape[3]], taps[:, :, i, j])
            for i in range(3)
            for j in range(3)
        ]
        out[:, :, a::step, b::step] = sum(windows)
    return out


def expected(x, weight, bias, layer, product):
    """A layer's result in float64 of its stored input `(N, H, W, C)`, and the largest error that rounding allows.

    Sums are float32 of at most 9 C terms, eight parts and a bias, each step off by 2^-23 where a tensor core cuts off. bfloat16
    and float16: phases' weights are rounded once, the result once. TensorFloat-32: both operands are rounded to 11 bits.
    float32 from three of its products: each operand's rest and the product of rests are lost, 2^-22 each.
    """
    x = x[..., : layer.c_in].double().cpu().permute(0, 3, 1, 2)
    weight, bias = weight.double(), bias.double()[None, :, None, None]
    y = convolve(x, weight, layer.upsample, False) + bias
    size = convolve(x, weight, layer.upsample, True)
    unit = {"bf16": 2.0**-8, "f16": 2.0**-11}.get(product, 2.0**-24)
    operands = {"tf32": 2 * 2.0**-11 + 2.0**-21, "f32": 3 * 2.0**-22}.get(product, unit if layer.upsample else 0.0)
    error = (9 * layer.c_in + 10) * 2.0**-23 * (size + bias.abs()) + operands * size
    y = torch.where(y > 0, y, SLOPE * y)
    # Two intermediate roundings to float32: of the sum with the bias, and of the slope's product.
    allowed = error + (unit + 3 * 2.0**-24) * (y.abs() + error) + 2.0**-24
    return y.permute(0, 2, 3, 1), allowed.permute(0, 2, 3, 1)


def check_layers(net, n, **options):
    """Check each layer against float64, given the kernel's result for the layers before; the whole repeats bit for bit."""
    x = stored = net.input(n)
    for i, layer in enumerate(net.layers):
        y = net.run(x, count=i + 1, **options)
        wanted, allowed = expected(stored, net.weights[i], net.biases[i], layer, net.product)
        errors = (y.double().cpu() - wanted).abs()
        border = torch.ones_like(errors, dtype=torch.bool)
        border[:, 1:-1, 1:-1] = False
        assert (errors <= allowed)[border].all(), f"layer {i}, border"
        assert (errors <= allowed)[~border].all(), f"layer {i}, inside"
        stored = y
    assert torch.equal(net.run(x, **options), stored)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.core if name == "up" else ()) for name in CHAINS])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_layer(product, name, cupy_on_host):
    check_layers(network(name, product), 2)


# Whole groups and a partial last one: a cluster's blocks alone, with columns each, with shares of pixels.
SHARES = [(1, 3), (2, 2), (4, 1), (8, 3), (4, 4)]


@pytest.mark.parametrize("name", ["smallest", "columns", "kinds"])
@pytest.mark.parametrize("product", ["bf16", "f32"])
def test_bits_depend_on_the_image_alone(product, name, cupy_on_host):
    net = network(name, product)
    x = net.input(3)
    alone = torch.cat([net.run(x[i : i + 1]) for i in range(3)])
    for cluster, images in SHARES:
        assert torch.equal(net.run(x, cluster, images), alone), (cluster, images)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name, cluster, images", [("kinds", 1, 2), ("kinds", 4, 2), ("large", 1, 1), ("large", 4, 1)])
def test_warps_far_ahead_of_others(name, cluster, images, order, cupy_on_host):
    """Work that runs ahead finds its inputs ready and overwrites nothing still in use."""
    net = network(name, "bf16")
    x = net.input(2)
    wanted = net.run(x)
    with in_order(order, "student_stem", "bf16"):
        assert torch.equal(net.run(x, cluster, images), wanted)


@pytest.mark.parametrize("cluster", [1, 4])
def test_images_of_a_group_do_not_meet(cluster, cupy_on_host):
    net = network("kinds", "f16")
    x = net.input(3)
    clean = net.run(x, cluster, 3)
    x[1] = torch.nan
    spoilt = net.run(x, cluster, 3)
    assert torch.equal(spoilt[::2], clean[::2]) and spoilt[1].isnan().all()


@pytest.mark.parametrize("name, cluster", [("smallest", 8), ("large", 8), ("large", 2), ("up", 8)])
def test_more_blocks_than_work(name, cluster, cupy_on_host):
    """Blocks without columns or pixels wait with the others and receive their results."""
    net = network(name, "bf16")
    x = net.input(2)
    assert torch.equal(net.run(x, cluster, 1), net.run(x))


# Division of work in consecutive plain layers of one side: log2 of the sets of blocks with pixels of their own, in each of
# which every block has columns of its own. A block gets only its pixels and their neighbours from the others.
SHARED = [
    (chain((16, 48, 1), (48, 144, 0), (144, 32, 0), (32, 32, 0)), 8, (1, 1, 1, 1)),
    (chain((16, 16, 1), (16, 16, 1), (16, 144, 0), (144, 48, 0)), 8, (2, 1, 3, 3)),
    (chain((16, 16, 1), (16, 16, 1), (16, 80, 0), (80, 16, 0)), 4, (2, 1, 2, 2)),
]


@pytest.mark.parametrize("layers, cluster, shifts", SHARED)
def test_columns_and_pixels_are_shared(layers, cluster, shifts, cupy_on_host):
    planned = stem_plan(layers, "bf16", cluster, 1, LIMITS["sm_90"])
    assert tuple(planned.fields["layers"]["line_shift"][: len(layers)]) == shifts
    net = Network(layers, "bf16")
    x = net.input(3)
    alone = net.run(x)
    for images in (1, 2):
        assert torch.equal(net.run(x, cluster, images), alone)


def test_empty_batch(cupy_on_host):
    net = network("smallest", "bf16")
    assert net.run(net.input(0), 4, 2).shape == (0, 4, 4, 16)


def stem_plan(layers, product, cluster, images, limit):
    """The plan of layers that fit, for two images."""
    dtype, last = dtype_of(product), layers[-1]

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    packed = [
        empty(4 if i.upsample else 1, padded(i.c_in) * dtype.itemsize // 32, 4 if i.upsample else 9, padded(i.c_out) // 16,
              32, 16 // dtype.itemsize)
        for i in layers
    ]  # fmt: skip
    biases = [empty(padded(i.c_out), dtype=torch.float32) for i in layers]
    side = last.height * (2 if last.upsample else 1)
    x, out = empty(2, 4, 4, padded(layers[0].c_in)), empty(2, side, side, padded(last.c_out))
    numbers = (SLOPE, PRODUCTS.index(product), cluster, images)
    return plan("student_stem", x, packed, biases, out, stem_numbers(layers), *numbers, device=(H200[0], limit, H200[2]))


@functools.cache
def preset(name):
    layers = convolutions(FusedStudentConfig(**vars(PRESETS[name])))
    return layers, layers[: stem_layers(layers, "bf16", 1, 2**30)]


def plans():
    layers = [preset(name)[1] for name in PRESETS] + list(CHAINS.values())
    limits = (0, 20_000, *LIMITS.values())
    return list(itertools.product(layers, PRODUCTS, (1, 2, 4, 8), (1, 2, 5, 64), limits))


def test_places_in_shared_memory():
    """Regions do not overlap, those read as vectors are aligned, the limit is kept and used."""
    for layers, product, cluster, images, limit in plans():
        fit = layers[: stem_layers(layers, product, images, limit)]
        if len(fit) < len(layers):
            # One layer more fits where there is more memory, and here it is refused.
            more = layers[: len(fit) + 1]
            assert stem_plan(more, product, cluster, images, 2**31 - 1).launches[0][3] > limit
            with pytest.raises(RuntimeError, match=f"{len(fit)} of {len(more)} layers fit in {limit} bytes"):
                stem_plan(more, product, cluster, images, limit)
        if not fit:
            continue
        p, element = stem_plan(fit, product, cluster, images, limit), dtype_of(product).itemsize
        splits, needed = p.fields["layers"][: len(fit)], p.launches[0][3]
        pixels = [images * i.height * i.height * (padded(i.c_in) * element + 16) for i in fit]
        buffers = [max(pixels[i::2], default=0) for i in (0, 1)]
        sums = int(max(8 * 16 * splits["rows"] * 40 * 4))
        widths = [padded(i.c_out) for i in fit]
        starts = [p["bias"], p["sums"], *p.fields["buffers"].tolist(), needed]
        assert p["bias"] == 32 and [b - a for a, b in itertools.pairwise(starts)] == [4 * sum(widths), sums, *buffers]
        assert not any(start % 16 for start in starts) and needed <= limit
        assert splits["bias_place"].tolist() == [sum(widths[:i]) for i in range(len(fit))]
        assert (1 << splits["shift"] == splits["side"]).all() and (splits["part_shift"] <= 3).all()
        assert (1 << splits["line_shift"] <= cluster).all()
        assert p.blocks == -(-2 // images) * cluster


# Layers in one launch at batch 1, in 16 and in 32 bits. In 16 bits 227 KB hold pyramid-256 up to the layer from 16x16 to
# 32x32 pixels, paper-256 with 64 channels at 32x32, and all of digits but the image's layer.
COUNTS = {
    "paper-256": {"sm_80": (11, 10), "sm_86": (10, 8), "sm_90": (12, 11)},
    "pyramid-256": {"sm_80": (8, 7), "sm_86": (7, 4), "sm_90": (11, 7)},
    "digits": {"sm_80": (12, 8), "sm_86": (8, 7), "sm_90": (24, 11)},
}


@pytest.mark.parametrize("name", PRESETS)
def test_layers_of_the_presets(name):
    layers = preset(name)[0]
    for architecture, counts in COUNTS[name].items():
        limit = LIMITS[architecture]
        for products, count in zip((("bf16", "f16"), ("tf32", "f32")), counts):
            assert all(stem_layers(layers, product, 1, limit) == count for product in products), (architecture, products)
        fewer = [stem_layers(layers, "bf16", images, limit) for images in (1, 2, 4, 16)]
        assert fewer == sorted(fewer, reverse=True)


def test_where_the_layers_end():
    layers = chain((48, 16, 0), (16, 16, 1), (16, 16, 0), (16, 16, 1), (16, 16, 0), (16, 16, 1), (16, 16, 0), (16, 16, 1))
    assert stem_layers(layers, "bf16", 1, LIMITS["sm_90"]) == 7, "the last makes 64x64"
    assert stem_layers([], "bf16", 1, LIMITS["sm_90"]) == stem_layers(layers, "bf16", 1, 1000) == 0
    detail = ConvLayer(28, 16, 8, 8, True, detail=12)
    assert stem_layers([*layers[:3], detail, *layers[4:]], "bf16", 1, LIMITS["sm_90"]) == 3
    image = ConvLayer(16, 3, 8, 8, activation="tanh")
    assert stem_layers([*layers[:3], image], "bf16", 1, LIMITS["sm_90"]) == 3
    assert stem_layers(layers[2:], "bf16", 1, LIMITS["sm_90"]) == 0, "the first is not 4x4"
    many = chain(*[(16, 16, 0)] * 40)
    assert stem_layers(many, "bf16", 1, LIMITS["sm_90"]) == 32


def arguments(**changes):
    layers, product = CHAINS["up"], changes.pop("of", "bf16")
    net = network("up", product)
    values = dict(x=net.input(2), weights=net.packed[0], biases=net.packed[1])
    values |= dict(out=torch.empty(2, 16, 16, 16, dtype=dtype_of(product)), layers=stem_numbers(layers), slope=SLOPE)
    return {**values, "product": PRODUCTS.index(product), "cluster": 1, "images": 1, **changes}


REFUSED = [
    ({"product": 4}, "product"),
    ({"product": -1}, "product"),
    ({"product": 1}, "x must be"),
    ({"cluster": 3}, "cluster"),
    ({"cluster": 16}, "cluster"),
    ({"images": 0}, "images"),
    ({"slope": float("nan")}, "slope"),
    ({"layers": []}, "layers"),
    ({"layers": [16, 16, 4, 4]}, "layers"),
    ({"layers": [16, 48, 4, 4, 1, 32, 16, 8, 8, 1]}, "layer 1 must take 48"),
    ({"layers": [16, 24, 4, 4, 1]}, "multiples of 16"),
    ({"layers": [16, 48, 4, 4, 1, 48, 16, 4, 4, 1]}, "layer 1 must have a side of 8"),
    ({"layers": [16, 48, 4, 4, 2]}, "upsample"),
    ({"layers": [16, 16, 4, 4, 1, 16, 16, 8, 8, 1, 16, 16, 16, 16, 1, 16, 16, 32, 32, 1]}, "more than 32"),
    ({"x": torch.zeros(2, 4, 4, 32).bfloat16()}, "x must be"),
    ({"x": torch.zeros(2, 4, 4, 32).bfloat16()[..., ::2]}, "x must be"),
    ({"x": torch.zeros(2 * 4 * 4 * 16 + 1).bfloat16()[1:].view(2, 4, 4, 16)}, "x must begin at a multiple of 16"),
    ({"x": torch.zeros(())}, "x must be"),
    ({"out": torch.empty(2, 8, 8, 16).bfloat16()}, "out must be"),
    ({"out": torch.empty(2, 16, 16, 8).bfloat16()}, "out must have at least 16"),
    ({"out": torch.empty(2, 16, 16, 24).bfloat16()}, "whole units"),
    ({"out": torch.empty(2, 16, 16, 16)}, "out must be"),
    ({"out": torch.empty(2, 16, 16, 16, device="meta").bfloat16()}, "out must be"),
    ({"weights": []}, "weights and biases"),
    ({"biases": [torch.zeros(48)]}, "weights and biases"),
    ({"biases": [torch.zeros(48), torch.zeros(16).half()]}, r"biases\[1\]"),
    ({"of": "tf32", "biases": [torch.zeros(16), torch.zeros(16)]}, r"biases\[0\]"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(RuntimeError, match=f"student_stem: .*{message}"):
        plan("student_stem", **arguments(**changes))


def test_too_little_shared_memory_is_refused():
    needed = stem_plan(CHAINS["up"], "bf16", 1, 3, LIMITS["sm_90"]).launches[0][3]
    with pytest.raises(RuntimeError, match="1 of 2 layers fit"):
        stem_plan(CHAINS["up"], "bf16", 1, 3, needed - 1)


def test_clusters_need_their_capability():
    assert plan("student_stem", **arguments(), device=(108, LIMITS["sm_80"], 8)).blocks == 2
    with pytest.raises(RuntimeError, match="cluster must be 1 before compute capability 9.0, got 2"):
        plan("student_stem", **arguments(cluster=2), device=(108, LIMITS["sm_80"], 8))


PTX = {"bf16": "bf16.bf16", "f16": "f16.f16", "tf32": "tf32.tf32", "f32": "tf32.tf32"}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize(
    "architecture", ["sm_80", pytest.param("sm_90a", marks=pytest.mark.slow), pytest.param("sm_100", marks=pytest.mark.slow)]
)
def test_nvcc_student_stem(architecture, tmp_path):
    """Nothing spills, a block of 256 threads fits; tensor cores, vectors of weights, clusters from sm_90 on."""
    known_to_nvcc(architecture)
    kernels = {name: rest for name, *rest in cuda_kernels("student_stem.cu", tmp_path, architecture)}
    names = [f"advkd_student_stem_cluster{cluster}_{product}" for cluster in (1, 2, 4, 8) for product in PRODUCTS]
    assert sorted(kernels) == sorted(names)
    ptx = next(tmp_path.glob("*.ptx")).read_text()
    assert ".local" not in ptx
    clusters = architecture != "sm_80"
    for name, (spilled, registers, body) in kernels.items():
        assert spilled == 0 and registers <= 255, (name, registers)
        assert ("call" in body) == (clusters or "cluster1_" in name), name
        assert (".reqnctapercluster" in body or ".explicitcluster" in body) == (clusters and "cluster1_" not in name), name
    bodies = [body for body in re.split(r"^\.func ", ptx, flags=re.M) if "ldmatrix" in body]
    assert len(bodies) == len(PRODUCTS)
    for product in PRODUCTS:
        body = next(body for body in bodies if f"product_{product}E" in body.split("(")[0])
        assert f".f32.{PTX[product]}.f32" in body and "ldmatrix" in body and "ld.global.nc.v4" in body
        assert ("st.shared::cluster.v4" in body and "barrier.cluster.arrive.release" in body) == clusters


def launcher(compiled_by):
    """The launcher of the extension or of CuPy, on a GPU."""
    if compiled_by == "cupy":
        if reason := cuda.gap():
            pytest.skip(reason)
        return LAUNCHERS.student_stem
    if reason := extension_gap("cuda"):
        pytest.skip(reason)
    return torch.ops.advkd_cuda.student_stem


def clusters_of_the_device():
    return (1, 2, 4, 8) if torch.cuda.get_device_capability()[0] >= 9 else (1,)


def shared_limit():
    return torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin


def fits_the_device(net, images):
    return stem_layers(net.layers, net.product, images, shared_limit()) == len(net.layers)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_layer_on_a_gpu(product, name, compiled_by):
    launch = launcher(compiled_by)
    net = network(name, product, "cuda")
    shares = [share for share in itertools.product(clusters_of_the_device(), (1, 2, 3)) if fits_the_device(net, share[1])]
    if (1, 1) not in shares:
        pytest.skip("needs more shared memory than this device has")
    check_layers(net, 2, launch=launch)
    x = net.input(3)
    alone = torch.cat([net.run(x[i : i + 1], launch=launch) for i in range(3)])
    for cluster, images in shares:
        assert torch.equal(net.run(x, cluster, images, launch=launch), alone), (cluster, images)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])
@pytest.mark.parametrize("product", ["bf16", "f32"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_on_a_gpu(name, product, compiled_by):
    launch = launcher(compiled_by)
    layers = preset(name)[0][: stem_layers(preset(name)[0], product, 1, shared_limit())]
    net = Network(layers, product, "cuda")
    for cluster in clusters_of_the_device():
        check_layers(net, 5, cluster=cluster, launch=launch)


@pytest.mark.gpu
def test_is_captured():
    """A CUDA graph's replay on other values."""
    launch, net = launcher("nvcc"), network("kinds", "bf16", "cuda")
    cluster = clusters_of_the_device()[-1]
    x, other = net.input(1), net.input(2)[:1]
    wanted = [net.run(values, cluster, launch=launch) for values in (x, other)]
    out = torch.empty(1, 16, 16, 16, dtype=x.dtype, device="cuda")
    values = (net.packed[0], net.packed[1], out, stem_numbers(net.layers), SLOPE, 0, cluster, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(x, *values)
    for source, result in zip((x.clone(), other), wanted):
        x.copy_(source)
        graph.replay()
        assert torch.equal(out, result)
