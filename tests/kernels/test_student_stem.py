"""The student's first layers in one launch.

The CUDA kernel on the host, clusters and all, against float64; on a GPU where there is one; compiled ahead of time.
"""

import functools
import itertools
import re
import shutil
from dataclasses import replace

import pytest
import torch

from advkd.engines.gpu_search import stem_layers
from advkd.models.shape import PRESETS, FusedStudentConfig, convolutions
from advkd.ops.conv_layer import ConvLayer
from advkd.ops.gpu_storage import PRODUCTS, padded

from .cases import Case, after, arguments, case_of, check_captured, compare, draw, meta, pack, run, starter, store
from .cuda_on_host import in_order
from .host_plans import H200, LAUNCHERS, gpu_launchers, plan
from .test_compile_ahead import cuda_kernels, known_to_nvcc

LIMITS = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}


def chain(*shapes):
    """Layers (c_in, c_out, upsample) from 4x4 on."""
    channels = (shapes[0][0], *(c_out for _, c_out, _ in shapes))
    return Case(2, 4, 4, channels, tuple(up for *_, up in shapes), more=16, op="student_stem")


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


@functools.lru_cache(4)
def numbers(case):
    """Images, and the layers' weights and biases as given and as the kernel takes them."""
    x, *layers = draw(case)
    return x, layers, pack(case, *layers)


def result(case, share=(1, 1), launchers=LAUNCHERS, images=slice(None), count=None, device="cpu"):
    """The first ``count`` layers' result of some of the case's images, with clusters and groups of images that ``share``."""
    x, _, packed = numbers(case)
    part = case_of(case.layers[:count], case.n, product=case.product, more=16, op="student_stem", tile=share)
    return run(part, starter(launchers), x[images], *(p[:count] for p in packed), device, calls=1)


def check_layers(case, **options):
    """Check each layer against float64, given the kernel's result for the layers before; the whole repeats bit for bit."""
    x, (weights, biases), _ = numbers(case)
    before = x.to(options.get("device", "cpu"))
    for i, (layer, weight, bias) in enumerate(zip(case.layers, weights, biases)):
        found = result(case, count=i + 1, **options)
        compare(found, *after(case, layer, before, weight.to(before.device), bias.to(before.device)))
        before = found
    assert torch.equal(result(case, **options), before)


def chained(name, product="bf16", n=2):
    return replace(CHAINS[name], product=product, n=n)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.core if name == "up" else ()) for name in CHAINS])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_layer(product, name, cupy_on_host):
    check_layers(chained(name, product))


# Whole groups and a partial last one: a cluster's blocks alone, with columns each, with shares of pixels.
SHARES = [(1, 3), (2, 2), (4, 1), (8, 3), (4, 4)]


@pytest.mark.parametrize("name", ["smallest", "columns", "kinds"])
@pytest.mark.parametrize("product", ["bf16", "f32"])
def test_bits_depend_on_the_image_alone(product, name, cupy_on_host):
    check_shares(chained(name, product, 3), SHARES)


def check_shares(case, shares, **options):
    """Each way to share the work, clusters and groups of images, gives the bits of every image alone."""
    alone = torch.cat([result(case, images=slice(i, i + 1), **options) for i in range(case.n)])
    for share in shares:
        assert torch.equal(result(case, share, **options), alone), share


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name, cluster, images", [("kinds", 1, 2), ("kinds", 4, 2), ("large", 1, 1), ("large", 4, 1)])
def test_warps_far_ahead_of_others(name, cluster, images, order, cupy_on_host):
    """Work that runs ahead finds its inputs ready and overwrites nothing still in use."""
    wanted = result(chained(name))
    with in_order(order, "student_stem", "bf16"):
        assert torch.equal(result(chained(name), (cluster, images)), wanted)


@pytest.mark.parametrize("cluster", [1, 4])
def test_images_of_a_group_do_not_meet(cluster, cupy_on_host):
    case = replace(chained("kinds", "f16", 3), tile=(cluster, 3))
    x, _, packed = numbers(case)
    clean = run(case, starter(LAUNCHERS), x, *packed)
    x = x.clone()
    x[1] = torch.nan
    spoilt = run(case, starter(LAUNCHERS), x, *packed)
    assert torch.equal(spoilt[::2], clean[::2]) and spoilt[1].isnan().all()


@pytest.mark.parametrize("name, cluster", [("smallest", 8), ("large", 8), ("large", 2), ("up", 8)])
def test_more_blocks_than_work(name, cluster, cupy_on_host):
    """Blocks without columns or pixels wait with the others and receive their results."""
    assert torch.equal(result(chained(name), (cluster, 1)), result(chained(name)))


# Division of work in consecutive plain layers of one side: log2 of the sets of blocks with pixels of their own, in each of
# which every block has columns of its own. A block gets only its pixels and their neighbours from the others.
SHARED = [
    (chain((16, 48, 1), (48, 144, 0), (144, 32, 0), (32, 32, 0)), 8, (1, 1, 1, 1)),
    (chain((16, 16, 1), (16, 16, 1), (16, 144, 0), (144, 48, 0)), 8, (2, 1, 3, 3)),
    (chain((16, 16, 1), (16, 16, 1), (16, 80, 0), (80, 16, 0)), 4, (2, 1, 2, 2)),
]


@pytest.mark.parametrize("case, cluster, shifts", SHARED)
def test_columns_and_pixels_are_shared(case, cluster, shifts, cupy_on_host):
    planned = stem_plan(case.layers, "bf16", cluster, 1, LIMITS["sm_90"])
    assert tuple(planned.fields["layers"]["line_shift"][: len(shifts)]) == shifts
    check_shares(replace(case, n=3), [(cluster, 1), (cluster, 2)])


def test_empty_batch(cupy_on_host):
    assert result(chained("smallest", n=0), (4, 2)).shape == (0, 16, 4, 4)


def stem_plan(layers, product, cluster, images, limit):
    """The plan of layers that fit, for two images."""
    case = case_of(layers, 2, product=product, op="student_stem", tile=(cluster, images))
    return plan("student_stem", *arguments(case, *meta(case)), device=(H200[0], limit, H200[2]))


@functools.cache
def preset(name):
    layers = convolutions(FusedStudentConfig(**vars(PRESETS[name])))
    return layers, layers[: stem_layers(layers, "bf16", 1, 2**30)]


def plans():
    layers = [preset(name)[1] for name in PRESETS] + [case.layers for case in CHAINS.values()]
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
        p, element = stem_plan(fit, product, cluster, images, limit), 2 if product in ("bf16", "f16") else 4
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
# 32x32 pixels, paper-256 with 64 channels at 32x32, and all of digits but the image's layer. All of latent but that layer, 8x8
# at most, fits anywhere. The third layer of glyphs takes a band of the noise, which a launch of several layers cannot read.
COUNTS = {
    "paper-256": {"sm_80": (11, 10), "sm_86": (10, 8), "sm_90": (12, 11)},
    "pyramid-256": {"sm_80": (8, 7), "sm_86": (7, 4), "sm_90": (11, 7)},
    "digits": {"sm_80": (12, 8), "sm_86": (8, 7), "sm_90": (24, 11)},
    "latent": dict.fromkeys(("sm_80", "sm_86", "sm_90"), (24, 24)),
    "glyphs": dict.fromkeys(("sm_80", "sm_86", "sm_90"), (2, 2)),
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
    layers = chain(
        (48, 16, 0), (16, 16, 1), (16, 16, 0), (16, 16, 1), (16, 16, 0), (16, 16, 1), (16, 16, 0), (16, 16, 1)
    ).layers
    assert stem_layers(layers, "bf16", 1, LIMITS["sm_90"]) == 7, "the last makes 64x64"
    assert stem_layers([], "bf16", 1, LIMITS["sm_90"]) == stem_layers(layers, "bf16", 1, 1000) == 0
    detail = ConvLayer(28, 16, 8, 8, True, detail=12)
    assert stem_layers([*layers[:3], detail, *layers[4:]], "bf16", 1, LIMITS["sm_90"]) == 3
    image = ConvLayer(16, 3, 8, 8, activation="tanh")
    assert stem_layers([*layers[:3], image], "bf16", 1, LIMITS["sm_90"]) == 3
    assert stem_layers(layers[2:], "bf16", 1, LIMITS["sm_90"]) == 0, "the first is not 4x4"
    many = chain(*[(16, 16, 0)] * 40).layers
    assert stem_layers(many, "bf16", 1, LIMITS["sm_90"]) == 32


def good_arguments(**changes):
    case = chained("up", changes.pop("of", "bf16"))
    x, _, packed = numbers(case)
    names = ("x", "weights", "biases", "out", "layers", "slope", "product", "cluster", "images")
    out = torch.empty(2, 16, 16, 16, dtype=case.dtype)
    return {**dict(zip(names, arguments(case, store(case, x), *packed, out))), **changes}


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
        plan("student_stem", **good_arguments(**changes))


def test_too_little_shared_memory_is_refused():
    needed = stem_plan(CHAINS["up"].layers, "bf16", 1, 3, LIMITS["sm_90"]).launches[0][3]
    with pytest.raises(RuntimeError, match="1 of 2 layers fit"):
        stem_plan(CHAINS["up"].layers, "bf16", 1, 3, needed - 1)


def test_clusters_need_their_capability():
    assert plan("student_stem", **good_arguments(), device=(108, LIMITS["sm_80"], 8)).blocks == 2
    with pytest.raises(RuntimeError, match="cluster must be 1 before compute capability 9.0, got 2"):
        plan("student_stem", **good_arguments(cluster=2), device=(108, LIMITS["sm_80"], 8))


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


def clusters_of_the_device():
    return (1, 2, 4, 8) if torch.cuda.get_device_capability()[0] >= 9 else (1,)


def shared_limit():
    return torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin


def fits_the_device(case, images):
    return stem_layers(case.layers, case.product, images, shared_limit()) == len(case.layers)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_layer_on_a_gpu(product, name, compiled_by):
    case, options = chained(name, product, 3), dict(launchers=gpu_launchers(compiled_by), device="cuda")
    shares = [share for share in itertools.product(clusters_of_the_device(), (1, 2, 3)) if fits_the_device(case, share[1])]
    if (1, 1) not in shares:
        pytest.skip("needs more shared memory than this device has")
    check_layers(case, **options)
    check_shares(case, shares, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled_by", ["nvcc", "cupy"])
@pytest.mark.parametrize("product", ["bf16", "f32"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_on_a_gpu(name, product, compiled_by):
    layers = preset(name)[0][: stem_layers(preset(name)[0], product, 1, shared_limit())]
    case = case_of(layers, 5, product=product, op="student_stem")
    for cluster in clusters_of_the_device():
        check_layers(case, share=(cluster, 1), launchers=gpu_launchers(compiled_by), device="cuda")


@pytest.mark.gpu
def test_is_captured():
    case = replace(chained("kinds", n=1), more=0, tile=(clusters_of_the_device()[-1], 1))
    check_captured(case, starter(gpu_launchers("nvcc")))
