"""The student's convolutions for the tests of all their kernels: cases, their numbers, an oracle, its bound, and a check.

``check`` gives a launcher a case's tensors, guarded, and a result full of NaN, and compares with float64: bit for bit where
whole numbers make every sum exact, else within a bound that follows from the roundings.
"""

import ctypes
import dataclasses
import itertools
import mmap
import os

import torch
import torch.nn.functional as F

from advkd.ops.conv_layer import ACTIVATIONS, ConvLayer, output_sides
from advkd.ops.gpu_storage import PRODUCTS, input_channels, pack_fragments, pack_image, pad_layer, padded, stem_numbers

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
UP = (True,)

FACTORS = {"tf32": 2**-10 + 2**-22, "f32": 3 * 2**-22, "ieee": 0.0, "tf32x3": 3 * 2**-20, "truncated": 2**-10 + 2**-11}
"""Error of a product from rounding its two factors, relative, by the float32 products of CUDA's kernels and of Triton's.

TensorFloat-32 keeps 11 bits, to nearest or (Triton's x) truncated; in three products, where each factor's last bits and the
product of the rests are lost, 22 bits in CUDA's kernels and 20 in Triton's. 16-bit factors are stored as they are multiplied.
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """Consecutive convolutions in one launch: images, sides of the input, channels before, between and after the layers.

    Attributes:
        ups: true for each layer that up-samples; those it does not reach do not.
        activation: of the last layer; the others take LeakyReLU.
        product: one of PRODUCTS, or of Triton's (:data:`FACTORS`).
        image: the result is (N, C, H, W) without units of channels.
        exact: whole numbers, with which every sum, folded weight and product is exact.
        more: channels of the result's memory after the layer's own.
        detail: input channels that come from the latent.
        tile: of the kernel's plan, as its test file has it.
        op: the CUDA launcher, where the number of layers does not say it.
    """

    n: int
    height: int
    width: int
    channels: tuple = (16, 16)
    ups: tuple = ()
    activation: str = "leaky_relu"
    product: str = "bf16"
    image: bool = False
    exact: bool = False
    more: int = 0
    detail: int = 0
    tile: object = ()
    op: str = ""

    def __str__(self):
        changed = [f for f in dataclasses.fields(self)[4:] if getattr(self, f.name) != f.default]
        sizes = "x".join(map(str, (self.n, self.height, self.width, *self.channels)))
        return ",".join([sizes, *(f"{f.name}={getattr(self, f.name)}" for f in changed)])

    @property
    def layers(self):
        found, sides, last = [], (self.height, self.width), len(self.channels) - 2
        for i, channels in enumerate(itertools.pairwise(self.channels)):
            activation = self.activation if i == last else "leaky_relu"
            up = i < len(self.ups) and bool(self.ups[i])
            found.append(ConvLayer(*channels, *sides, up, activation, 0 if i else self.detail))
            sides = output_sides(found[-1])
        return found

    @property
    def upsample(self):
        """True if the first layer up-samples."""
        return self.layers[0].upsample

    @property
    def dtype(self):
        return {"bf16": BF16, "f16": F16}.get(self.product, F32)

    @property
    def slope(self):
        return 0.25 if self.exact else 0.2

    @property
    def launcher(self):
        return self.op or ("conv_pair" if len(self.channels) > 2 else "conv_image" if self.image else "conv_layer")


def case_of(layers, n, **options):
    """The case of a network's consecutive layers."""
    first = layers[0]
    channels = (first.c_in, *(layer.c_out for layer in layers))
    ups = tuple(layer.upsample for layer in layers)
    options = {"activation": layers[-1].activation, "detail": first.detail, **options}
    return Case(n, first.height, first.width, channels, ups, **options)


def draw(case):
    """x ``(N, C, H, W)``, and the weights and biases of each layer, float32; weights and x are as storage holds them."""
    generator = torch.Generator().manual_seed(0)

    def numbers(most, scale, *shape):
        if not case.exact:
            return torch.randn(shape, generator=generator) * scale
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    x = numbers(63, 1, case.n, case.channels[0], case.height, case.width)
    weights, biases = [], []
    for i, (c_in, c_out) in enumerate(itertools.pairwise(case.channels)):
        weights.append(numbers(3, (9 * c_in) ** -0.5, c_out, c_in, 3, 3) / (64 if case.exact and i else 1))
        biases.append(numbers(9, 1, c_out))
    return x.to(case.dtype).float(), [w.to(case.dtype).float() for w in weights], biases


def convolve(x, weight, upsample=False):
    """A convolution without bias, written out by taps, in float64."""
    x, weight = x.double(), weight.double()
    if upsample:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    around = F.pad(x, (1, 1, 1, 1))
    windows = {(i, j): around[:, :, i : i + x.shape[2], j : j + x.shape[3]] for i in range(3) for j in range(3)}
    return sum(torch.einsum("nchw,oc->nohw", window, weight[:, :, i, j]) for (i, j), window in windows.items())


def activated(y, activation, slope):
    return {"leaky_relu": torch.where(y > 0, y, slope * y), "tanh": y.tanh(), "none": y}[activation]


def oracle(x, weight, bias, slope, upsample, activation):
    """A layer's result in float64."""
    return activated(convolve(x, weight, upsample) + bias.double()[:, None, None], activation, slope)


def phase_filters(weight):
    """The four phases' 3x3 filters on the low-resolution input, by (vertical, horizontal)."""
    fold = [[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]]
    fold = torch.tensor(fold, dtype=torch.float64, device=weight.device)
    return {(a, b): torch.einsum("ocij,ui,vj->ocuv", weight.double(), fold[a], fold[b]) for a in (0, 1) for b in (0, 1)}


def sizes(x, weight, upsample, plain=lambda x, weight: convolve(x.abs(), weight.abs())):
    """Sizes that roundings scale with: sums of the terms' magnitudes, as ``plain`` has them, with the folded filters."""
    if not upsample:
        return plain(x, weight)
    n, _, height, width = x.shape
    found = torch.empty(n, len(weight), 2 * height, 2 * width, dtype=torch.float64, device=x.device)
    for (a, b), filters in phase_filters(weight).items():
        found[:, :, a::2, b::2] = plain(x, filters)
    return found


def after(case, layer, x, weight, bias, error=None, truncates=False):
    """A layer's result in float64, and its largest error, from x with the largest ``error``.

    A sum's 9 C_in terms, the bias and the slope's product are rounded once each, by 2^-23 where a tensor core cuts off. A
    phase's 16-bit weights are rounded after they are folded. tanh has 2^-22 of its own. Results are rounded to storage
    (``truncates``: cut off, as Triton's interpreter does in bfloat16); below 2^-14 float16's numbers are 2^-24 apart.
    """
    y = oracle(x, weight, bias, case.slope, layer.upsample, layer.activation)
    unit = torch.finfo(case.dtype).eps / 2
    factors = FACTORS.get(case.product, unit if layer.upsample else 0.0)
    size = sizes(x if error is None else x.abs() + error, weight, layer.upsample)
    allowed = (factors + (9 * layer.c_in + 2) * 2**-23) * (size + bias.double().abs()[:, None, None])
    if error is not None:
        allowed = allowed + convolve(error, weight.abs(), layer.upsample)
    allowed = allowed + (2**-22 if layer.activation == "tanh" else 0)
    last = 2 * unit if truncates and case.dtype == BF16 else unit
    return y, allowed + last * (y.abs() + allowed) + (2**-25 if case.dtype == F16 else 0)


def exactly(case, layer, x, weight, bias, unit):
    """A layer's result for whole numbers of ``unit``, bit for bit as storage holds it."""
    if case.product == "tf32":
        # 11 bits, ties away from zero.
        mantissa, exponent = torch.frexp(x.double())
        x = torch.ldexp(torch.sign(x) * torch.floor(mantissa.abs() * 2**11 + 0.5) / 2**11, exponent)
    assert oracle(x.abs(), weight.abs(), bias.abs(), 1, layer.upsample, "none").max() * unit / case.slope < 2**24
    y = oracle(x, weight, bias, case.slope, layer.upsample, layer.activation).to(case.dtype).double()
    assert y.isfinite().all()
    return y


def expected(case, x, weights, biases, truncates=False):
    """The launch's result in float64 and its largest error, which is 0 for whole numbers."""
    error = None
    for i, (layer, weight, bias) in enumerate(zip(case.layers, weights, biases)):
        if case.exact:
            x, error = exactly(case, layer, x, weight, bias, 64 if i else 1), torch.zeros((), dtype=torch.float64)
        else:
            x, error = after(case, layer, x, weight, bias, error, truncates)
    return x, error.to(x.device)


def compare(found, wanted, allowed):
    """Require errors within the bound, and name the border, where most faults of index arithmetic show, apart from the rest."""
    assert found.shape == wanted.shape
    errors = (found.double() - wanted).abs()
    border = torch.ones_like(errors, dtype=torch.bool)
    border[:, :, 1:-1, 1:-1] = False
    right = errors <= allowed
    for where, name in ((border, "border"), (~border, "inside")):
        assert right[where].all(), f"{name}: {(~right[where]).sum()} of {where.sum()} wrong, by up to {errors[where].max()}"


def store(case, x):
    """x in a GPU's storage: channels last and in whole units, the latent's after the others."""
    own = case.channels[0] - case.detail
    parts = [x[:, :own], x[:, own:]] if case.detail else [x]
    parts = [F.pad(part, (0, 0, 0, 0, 0, padded(part.shape[1]) - part.shape[1])) for part in parts]
    return torch.cat(parts, 1).permute(0, 2, 3, 1).to(case.dtype).contiguous()


def pack(case, weights, biases):
    """Weights and biases as CUDA's kernels take them."""
    packed = []
    for layer, weight, bias in zip(case.layers, weights, biases):
        taps, wide = pad_layer(weight, bias, layer)
        packed.append((pack_fragments(taps, case.product), wide))
    if case.image:
        packed[-1] = pack_image(taps, layer.c_out, case.product), bias
    return tuple(list(parts) for parts in zip(*packed))


def result_shape(case, n):
    last = case.layers[-1]
    if case.image:
        return n, last.c_out, *output_sides(last)
    return n, *output_sides(last), padded(last.c_out) + case.more


def meta(case):
    """x, weights, biases and the result as CUDA's kernels take them, of any size, without memory."""

    def empty(*shape, dtype=case.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def packed(layer, image):
        phases, taps = (4, 4) if layer.upsample else (1, 1) if image else (1, 9)
        columns = 9 * layer.c_out if image else layer.c_out
        steps = input_channels(layer) * case.dtype.itemsize // 32
        return empty(phases, steps, taps, padded(columns) // 16, 32, 16 // case.dtype.itemsize)

    layers = case.layers
    images = [case.image and layer is layers[-1] for layer in layers]
    weights = [packed(layer, image) for layer, image in zip(layers, images)]
    biases = [empty(i.c_out if image else padded(i.c_out), dtype=F32) for i, image in zip(layers, images)]
    x = empty(case.n, case.height, case.width, input_channels(layers[0]))
    return x, weights, biases, empty(*result_shape(case, case.n))


def arguments(case, x, weights, biases, out):
    """The arguments of the case's CUDA launcher; ``student_stem`` takes cluster and images from the tile."""
    code, product = ACTIVATIONS.index(case.activation), PRODUCTS.index(case.product)
    if case.launcher == "student_stem":
        return x, weights, biases, out, stem_numbers(case.layers), case.slope, product, *(case.tile or (1, 1))
    options = {"conv_layer": (case.upsample,), "conv_image": (), "conv_pair": (case.upsample, case.image)}[case.launcher]
    return x, *itertools.chain(*zip(weights, biases)), out, *options, code, case.slope, product


def starter(launchers):
    """``start`` of :func:`run` for CUDA's launchers."""
    return lambda case, *tensors: getattr(launchers, case.launcher)(*arguments(case, *tensors))


class Guarded:
    """A copy of a tensor between bytes of NaN, which a kernel neither reads nor changes.

    On the CPU it ends where an inaccessible page begins: an access beyond its end stops the process. On a GPU that a sanitizer
    watches it is an allocation of its own.
    """

    def __init__(self, tensor, device="cpu"):
        size = tensor.numel() * tensor.element_size()
        if device == "cpu":
            self.memory = _pages(size)
            begin = len(self.memory) - size
        else:
            begin = 0 if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") else 512
            self.memory = torch.full((size + 2 * begin,), 0xFF, dtype=torch.uint8, device=device)
        self.rest = self.memory[:begin], self.memory[begin + size :]
        self.tensor = (
            self.memory[begin : begin + size]
            .view(tensor.dtype)
            .as_strided(tensor.shape, tensor.stride(), begin // tensor.element_size())
        )
        self.tensor.copy_(tensor)

    def untouched(self):
        return all(bool((part == 0xFF).all()) for part in self.rest)


def _pages(size):
    """Bytes 0xFF in whole pages, at least ``size`` of them, between two inaccessible pages."""
    page = mmap.PAGESIZE
    whole = max(-(-size // page), 1) * page
    area = mmap.mmap(-1, whole + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for forbidden in (start, start + page + whole):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), page, 0) == 0
    return torch.frombuffer(area, dtype=torch.uint8, count=whole, offset=page).fill_(0xFF)


def bits(tensor):
    """A tensor's bits, for comparisons in which NaN equals NaN."""
    return tensor.flatten().view(torch.uint8)


def run(case, start, x, weights, biases, device="cpu", calls=2):
    """The result ``(N, C, H', W')`` of ``start(case, x, weights, biases, out)``, of x and packed weights.

    Nothing else is written, and further calls repeat it bit for bit.
    """
    sources = [store(case, x), *weights, *biases]
    inputs = [Guarded(tensor, device) for tensor in sources]
    stored, *rest = (guarded.tensor for guarded in inputs)
    poison = torch.full(result_shape(case, len(x)), torch.nan, dtype=case.dtype)
    outs = [Guarded(poison, device) for _ in range(calls)]
    for out in outs:
        start(case, stored, rest[: len(weights)], rest[len(weights) :], out.tensor)
    assert all(guarded.untouched() for guarded in [*inputs, *outs]), "written outside the result"
    assert all(torch.equal(bits(i.tensor), bits(source.to(device))) for i, source in zip(inputs, sources)), "changed an input"
    assert all(torch.equal(bits(out.tensor), bits(outs[0].tensor)) for out in outs), "another call, other bits"
    found = outs[0].tensor
    if case.image:
        return found
    own, wide = case.channels[-1], padded(case.channels[-1])
    assert torch.equal(bits(found[..., wide:]), bits(poison[..., wide:].to(device))), "written beyond the layer's channels"
    assert (found[..., own:wide] == 0).all(), "channels that fill a unit are zeros"
    return found[..., :own].permute(0, 3, 1, 2)


def check(case, start, device="cpu", calls=2, packer=pack, truncates=False):
    """``start`` of :func:`run` against the oracle."""
    numbers = draw(case)
    found = run(case, start, numbers[0], *packer(case, *numbers[1:]), device, calls)
    x, weights, biases = numbers[0].to(device), *([tensor.to(device) for tensor in part] for part in numbers[1:])
    compare(found, *expected(case, x, weights, biases, truncates))


def check_captured(case, start, packer=pack):
    """A CUDA graph's replay reads what its tensors hold then."""
    x, weights, biases = draw(case)
    weights, biases = ([tensor.cuda() for tensor in part] for part in packer(case, weights, biases))
    x = store(case, x).cuda()
    out = torch.full(result_shape(case, len(x)), torch.nan, dtype=case.dtype, device="cuda")
    start(case, x, weights, biases, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        start(case, x, weights, biases, out)
    x.copy_(x.flip(1) / 2)
    biases[-1] += 1
    start(case, x, weights, biases, out)
    wanted = out.clone()
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(bits(out), bits(wanted))
