"""A network on a GPU's kernels, with plain PyTorch in their place: storage, packing, chains of launches, plans."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from advkd.engines import gpu_search
from advkd.engines.base import Options
from advkd.engines.gpu import GpuEngine
from advkd.engines.gpu_search import cheapest
from advkd.errors import InputError
from advkd.models.shape import PRESETS, StudentConfig, convolutions
from advkd.ops import registry, student_steps
from advkd.ops.conv_layer import ACTIVATIONS
from advkd.ops.gpu_storage import PRODUCTS, fold_taps, pack_fragments, pack_image, pad_layer, product_of, round_tf32
from advkd.ops.student_forward import student_forward_reference
from advkd.ops.student_steps import Step, decode_steps, encode_steps, pack_gpu, plain_steps, student_forward_gpu

from .cases import activated, convolve

F32 = torch.float32
# Channels that are no multiple of a unit, and detail bands after them; with classes 17 channels of the first layer: two units.
CONFIGS = {
    "small": StudentConfig(32, 1, channels=(24, 20, 20, 12, 12, 12, 4, 12), latent_size=2),
    "detail": StudentConfig(32, 3, channels=(16, 33, 20, 20, 24, 8, 5, 9), latent_size=1, detail_noise=True),
    "classes": StudentConfig(
        8, 3, channels=(16, 33, 8, 9), latent_size=1, detail_noise=True, classes=("A", "b", "7"), class_channels=14
    ),
}


def network(name, dtype=F32):
    """Layers, folded weights and biases, and latents."""
    layers = convolutions(CONFIGS[name])
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(i.c_out, i.c_in, 3, 3, generator=generator) / (4.5 * i.c_in) ** 0.5 for i in layers]
    biases = [torch.randn(i.c_out, generator=generator) / 4 for i in layers]
    numel = layers[0].c_in * 16 + sum(i.detail * i.height * i.width for i in layers)
    return layers, weights, biases, torch.randn(3, numel, generator=generator)


def unpack_fragments(packed):
    """``(phases, taps, C_in, C_out)`` of :func:`pack_fragments`, word by word as csrc/cuda/warp.cuh describes them."""
    phases, steps, taps, columns, _, elements = packed.shape
    word = elements // 4
    found = torch.full((phases, taps, steps * 8 * word, columns * 16), float("nan"), dtype=packed.dtype)
    for lane, m, half, e in itertools.product(range(32), range(2), range(2), range(word)):
        g, t = divmod(lane, 4)
        k = (4 * half + t) * word + e
        values = packed[..., lane, (2 * m + half) * word + e]
        found[:, :, k :: 8 * word, 8 * m + g :: 16] = values.permute(0, 2, 1, 3)
    return found


def conv_layer(x, taps, bias, out, upsample, activation, slope):
    """The layer by its definition in :mod:`advkd.ops.gpu_storage`: phases and taps one by one, sums in float64."""
    n, height, width, _ = x.shape
    bordered = F.pad(x.double(), (0, 0, 1, 1, 1, 1))
    side = 2 if upsample else 1
    for phase, (a, b) in enumerate(itertools.product(range(side), range(side))):
        y = bias.double().expand(n, height, width, -1).clone()
        for tap in range(taps.shape[1]):
            i, j = (tap // 2 + a, tap % 2 + b) if upsample else divmod(tap, 3)
            y += bordered[:, i : i + height, j : j + width] @ taps[phase, tap].double()
        y = activated(y, ACTIVATIONS[activation], slope)
        out[:, a::side, b::side, : taps.shape[3]] = y.to(out.dtype)


def conv_image(x, columns, bias, out, activation, slope):
    products = F.pad(x.double() @ columns.double(), (0, 0, 1, 1, 1, 1))
    (height, width), c = x.shape[1:3], len(bias)
    y = bias.double().expand(len(x), height, width, c).clone()
    for tap in range(9):
        i, j = divmod(tap, 3)
        y += products[:, i : i + height, j : j + width, c * tap : c * (tap + 1)]
    assert activation == 2
    out.copy_(y.tanh().permute(0, 3, 1, 2))


class Launchers:
    """The launchers' signatures, computed by plain PyTorch."""

    def __init__(self):
        self.started = []

    def conv_layer(self, x, weights, bias, out, upsample, activation, slope, product):
        self.started.append("conv")
        conv_layer(x, unpack_fragments(weights), bias, out, upsample, activation, slope)

    def conv_image(self, x, weights, bias, out, activation, slope, product):
        self.started.append("image")
        conv_image(x, unpack_fragments(weights)[0, 0], bias, out, activation, slope)

    def conv_pair(self, x, weights1, bias1, weights2, bias2, out, upsample, image, activation, slope, product):
        self.started.append("pair")
        side = 2 if upsample else 1
        middle = x.new_empty((len(x), side * x.shape[1], side * x.shape[2], len(bias1)))
        conv_layer(x, unpack_fragments(weights1), bias1, middle, upsample, 1, slope)
        if image:
            conv_image(middle, unpack_fragments(weights2)[0, 0], bias2, out, activation, slope)
        else:
            conv_layer(middle, unpack_fragments(weights2), bias2, out, False, activation, slope)

    def student_stem(self, x, weights, biases, out, layers, slope, product, cluster, images):
        self.started.append(f"stem of {len(biases)}, {cluster} blocks, {images} images")
        rows = [layers[i : i + 5] for i in range(0, len(layers), 5)]
        for i, (c_in, c_out, height, width, upsample) in enumerate(rows):
            assert x.shape[1:] == (height, width, c_in)
            side = 2 if upsample else 1
            made = x.new_empty((len(x), side * height, side * width, c_out)) if i + 1 < len(rows) else out
            conv_layer(x, unpack_fragments(weights[i]), biases[i], made, upsample, 1, slope)
            x = made


@pytest.fixture
def launchers(monkeypatch):
    """CUDA's launchers, and Triton's, which take taps, in plain PyTorch."""
    found = Launchers()
    monkeypatch.setattr(registry, "cuda_launcher", lambda name: getattr(found, name))

    def triton(name):
        def layer(x, taps, bias, out, upsample, activation, slope, precision, config):
            found.started.append(f"{'triton_conv' if name == 'conv_layer' else 'triton_descriptor'} {config} {precision}")
            conv_layer(x, taps, bias, out, upsample, activation, slope)

        def image(x, taps, bias, out, activation, slope, precision, config):
            found.started.append(f"triton_image {config} {precision}")
            c = len(out[0])
            columns = taps[0, :, :, :c].permute(1, 0, 2).flatten(1)
            conv_image(x, columns, bias[:c], out, activation, slope)

        def pack_weights(taps, dtype, precision):
            return taps.to(dtype)

        layers = {"conv_layer": layer, "conv_descriptor": layer, "conv_image": image}
        return {**layers, "pack_weights": pack_weights, "default": lambda *layer: (7,)}[name]

    monkeypatch.setattr(student_steps, "triton_launcher", triton)
    return found


@pytest.mark.parametrize("product", PRODUCTS)
def test_fragments_hold_every_weight_where_a_lane_reads_it(product):
    layer = convolutions(CONFIGS["small"])[2]
    weight = torch.randn(layer.c_out, layer.c_in, 3, 3)
    taps, bias = pad_layer(weight, torch.randn(layer.c_out), layer)
    assert layer.upsample and taps.shape == (4, 4, 32, 32) and bias.shape == (32,)
    narrow = {"bf16": torch.bfloat16, "f16": torch.float16}.get(product, F32)
    wanted = round_tf32(taps) if product == "tf32" else taps.to(narrow)
    packed = pack_fragments(taps, product)
    assert packed.is_contiguous() and packed.dtype == narrow and packed[0, 0, 0, 0, 0].numel() * packed.itemsize == 16
    assert torch.equal(unpack_fragments(packed), wanted)
    assert (
        (wanted[:, :, layer.c_in :] == 0).all() and (wanted[..., layer.c_out :] == 0).all() and (bias[layer.c_out :] == 0).all()
    )


def test_image_columns():
    taps = torch.randn(1, 9, 16, 16)
    columns = unpack_fragments(pack_image(taps, 3, "f32"))[0, 0]
    assert columns.shape == (16, 32) and (columns[:, 27:] == 0).all()
    assert torch.equal(columns[:, 3 * 5 + 2], taps[0, 5, :, 2])


def test_rounding_to_tensor_float():
    """Rounds to nearest on ten bits of mantissa, ties away from zero; non-finite values stay."""
    x = torch.tensor([1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 2**-11, 1 + 2**-10, 0.0, float("inf"), 3.4028234e38])
    wanted = torch.tensor([1 + 2**-10, 1.0, -1 - 2**-10, 1 + 2**-10, 0.0, float("inf"), float("inf")])
    assert torch.equal(round_tf32(x), wanted) and round_tf32(torch.tensor([float("nan")])).isnan()


def test_folded_taps_are_the_up_sampled_convolution():
    x, weight = torch.randn(2, 3, 4, 5).double(), torch.randn(6, 3, 3, 3).double()
    out = torch.empty(2, 8, 10, 6).double()
    conv_layer(x.permute(0, 2, 3, 1), fold_taps(weight, True), torch.zeros(6), out, True, 0, 0.2)
    assert (out.permute(0, 3, 1, 2) - convolve(x, weight, upsample=True)).abs().max() < 1e-13


CHAINS = {
    "small": [
        [Step("conv", i) for i in range(16)] + [Step("image", 16)],
        [
            *(Step(("triton_conv", "triton_descriptor")[i % 2], i, 1, (i, 3)) for i in range(16)),
            Step("triton_image", 16, 1, (3,)),
        ],
        [Step("stem", 0, 6, (2, 4)), *(Step("pair", i, 2) for i in (6, 8, 10, 12)), Step("conv", 14), Step("pair", 15, 2)],
    ],
    "detail": [
        [Step("conv", i) for i in range(16)] + [Step("image", 16)],
        # Detail bands enter the first layer of a step, whatever the step.
        [
            Step("stem", 0, 2, (1, 1)),
            *(Step("pair", i, 2) for i in range(2, 14, 2)),
            Step("triton_conv", 14),
            Step("pair", 15, 2),
        ],
    ],
    "classes": [
        [Step("triton_conv", 0), *(Step("conv", i) for i in range(1, 8)), Step("image", 8)],
        [Step("pair", 0, 2), Step("stem", 2, 2, (2, 1)), *(Step("pair", i, 2) for i in (4, 6)), Step("triton_image", 8)],
    ],
}


@pytest.mark.parametrize("name, chain", [(name, i) for name, chains in CHAINS.items() for i in range(len(chains))])
def test_chains_of_launches_are_the_network(name, chain, launchers):
    """The workspace holds NaN that another network left behind."""
    layers, weights, biases, z = network(name)
    steps = CHAINS[name][chain]
    with torch.no_grad():
        wanted = student_forward_reference(z.double(), [w.double() for w in weights], [b.double() for b in biases], layers, 0.2)
    for product, tolerance in (("f32", 1e-5), ("tf32", 2e-2)):
        forms = [s.form(i, len(layers) - 1) for s in steps for i in range(s.first, s.first + s.count)]
        packed, padded_biases = zip(
            *(pack_gpu(w, b, layer, F32, form, product) for w, b, layer, form in zip(weights, biases, layers, forms))
        )
        torch.use_deterministic_algorithms(True)
        try:
            numbers = encode_steps(steps, product)
            assert decode_steps(numbers) == (steps, product)
            images = student_forward_gpu(z, padded_biases, packed, layers, F32, numbers, 0.2)
        finally:
            torch.use_deterministic_algorithms(False)
        assert (images - wanted).abs().max() <= tolerance
        assert len(launchers.started) == len(steps)
        for step, started in zip(steps, launchers.started):
            assert not step.kernel.startswith("triton") or started.startswith(f"{step.kernel} {step.config}")
        launchers.started.clear()
    assert student_forward_gpu(z[:0], padded_biases, packed, layers, F32, numbers, 0.2).shape == (0, *images.shape[1:])


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_engines_and_the_op_agree(backend, launchers, monkeypatch):
    """The op by itself starts a kernel per layer; an engine keeps packed weights."""
    layers, weights, biases, z = network("small")
    engine = GpuEngine(layers, weights, biases, 0.2, F32, Options(backend))
    monkeypatch.setattr(gpu_search, "all_steps", lambda engine, n, backends, tune: plain_steps(layers, n, F32, backend))
    images = engine(z)
    assert launchers.started[0].startswith("triton_conv" if backend == "triton" else "conv") and len(launchers.started) == 17
    arguments, packed = engine.arguments(3), dict(engine._packed)
    assert torch.equal(torch.ops.advkd.student_forward(z, *arguments), images)
    assert all(engine._packed[key][0] is packed[key][0] for key in packed) and engine.packed_bytes() > 0
    torch.library.opcheck(torch.ops.advkd.student_forward.default, (z, *arguments))
    assert engine.workspace_bytes(3) == 4 * 3 * 2 * 32 * 32 * 16


def test_plans_of_other_versions_are_refused():
    """Kernels keep their numbers; one that this version lacks is refused, not started as another."""
    assert student_steps.KERNELS[:6] == ("triton_conv", "triton_image", "conv", "image", "pair", "stem")
    for number in (-1, len(student_steps.KERNELS)):
        with pytest.raises(InputError, match=f"kernel number {number}, of another version"):
            decode_steps([0, number, 0, 1, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32], ids=str)
@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_descriptors_are_candidates_of_measured_plans_alone(capability, dtype):
    pytest.importorskip("triton")
    layers = convolutions(PRESETS["pyramid-256"])
    limits = gpu_search.Limits(132, 227 * 1024, capability)
    engine = SimpleNamespace(layers=layers, product=product_of(dtype), dtype=dtype, limits=limits, backend="triton")

    def steps(backends, tune):
        return [s for s in gpu_search.all_steps(engine, 8, backends, tune) if s.kernel == "triton_descriptor"]

    found = steps(("cuda", "triton"), True)
    expected = capability >= (9, 0) and dtype != F32
    assert {s.first for s in found} == ({i for i in range(24) if layers[i].height >= 8} if expected else set())
    assert all(s.form(s.first, 24) == "taps" and s.count == 1 and len(s.config) == 6 for s in found)
    assert not steps(("cuda", "triton"), False) and not steps(("cuda",), True)


def test_a_plan_is_the_cheapest_chain():
    steps = [*(Step("conv", i) for i in range(5)), Step("pair", 1, 2), Step("pair", 2, 2), Step("stem", 0, 3)]
    costs = {"conv": 3.0, "pair": 5.0, "stem": 7.5}
    assert cheapest(5, steps, lambda s: costs[s.kernel]) == [Step("stem", 0, 3), Step("conv", 3), Step("conv", 4)]
    costs["stem"] = 9.5
    plan = cheapest(5, steps, lambda s: costs[s.kernel])
    assert sum(costs[s.kernel] for s in plan) == 14 and sum(s.count for s in plan) == 5
    # A step that leads nowhere is not taken.
    assert cheapest(2, [Step("stem", 0, 3), Step("pair", 0, 2)], lambda s: 1.0) == [Step("pair", 0, 2)]


NETWORKS = [
    ("small", torch.bfloat16, 2),
    ("classes", torch.bfloat16, 1),
    pytest.param("detail", torch.bfloat16, 1, marks=pytest.mark.slow),
    *(pytest.param(name, F32, 4, marks=pytest.mark.slow) for name in CONFIGS),
]


@pytest.mark.parametrize("name, dtype, cluster", NETWORKS)
def test_networks_on_the_cuda_kernels(name, dtype, cluster, cupy_on_host):
    """Every kernel, run on the host: stem, pairs, single layers and the image, detail bands between them."""
    layers, weights, biases, z = network(name)
    engine = GpuEngine(layers, weights, biases, 0.2, dtype, Options("cuda"))
    engine._steps[len(z)] = {
        "small": [Step("stem", 0, 6, (cluster, 2)), *CHAINS["small"][2][1:]],
        "detail": [*(Step("pair", i, 2) for i in range(0, 14, 2)), *(Step("conv", i) for i in (14, 15)), Step("image", 16)],
        "classes": [
            Step("stem", 0, 2, (cluster, 1)),
            Step("pair", 2, 2),
            *(Step("conv", i) for i in range(4, 8)),
            Step("image", 8),
        ],
    }[name]
    found = engine(z)
    wanted = student_forward_reference(z.double(), [w.double() for w in weights], [b.double() for b in biases], layers, 0.2)
    plain = student_forward_reference(z.to(dtype), [w.to(dtype) for w in weights], [b.to(dtype) for b in biases], layers, 0.2)
    # At most twice PyTorch's error in the same dtype; TensorFloat-32 is disabled (tests/conftest.py).
    assert (found - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 1e-5
    assert torch.equal(engine(z), found)
