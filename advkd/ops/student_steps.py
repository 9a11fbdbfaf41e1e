"""The student on a GPU, as :func:`student_forward` runs it there: a few kernels over one workspace, weights packed once.

A :class:`Step` is one launch for one convolution or several that follow each other. All of them keep activations as
:mod:`advkd.ops.gpu_storage` says; between two steps there are two halves of one workspace.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import InputError
from . import registry
from .conv_layer import ACTIVATION_CODES, ConvLayer, is_image, output_sides
from .gpu_storage import PRODUCTS, input_channels, pack_fragments, pack_image, pad_layer, padded, product_of, stem_numbers
from .latents import split_latent

KERNELS = ("triton_conv", "triton_image", "conv", "image", "pair", "stem", "triton_descriptor")
"""The kernels that a step can start; encoded plans keep their places. ``pair`` fuses two convolutions of few channels,
``stem`` all of the lowest resolutions; ``image`` makes the last layer's. Triton's names begin with ``triton``, the others are
CUDA C++."""


@dataclass(frozen=True)
class Step:
    """One launch: convolutions ``first .. first + count - 1`` by one of :data:`KERNELS`.

    ``config``: integers; Triton's tile (``Config``, ``ImageConfig`` or ``DescriptorConfig`` of ``kernels/conv_tiles.py``), of
    ``stem`` blocks per cluster and images per cluster, of the others none.
    """

    kernel: str
    first: int
    count: int = 1
    config: tuple[int, ...] = ()

    def form(self, i: int, last: int) -> str:
        """How convolution ``i``'s weights are packed for this step; ``last``: the network's last convolution."""
        if self.kernel.startswith("triton"):
            return "taps"
        return "image" if self.kernel == "image" or self.kernel == "pair" and i == last else "fragments"


def encode_steps(steps: Iterable[Step], product: str) -> list[int]:
    """Steps and the product as the op's list of integers."""
    rows = ((KERNELS.index(s.kernel), s.first, s.count, len(s.config), *s.config) for s in steps)
    return [PRODUCTS.index(product), *(number for row in rows for number in row)]


def decode_steps(numbers: Sequence[int]) -> tuple[list[Step], str]:
    """``(steps, product)`` of :func:`encode_steps`.

    Raises:
        InputError: a kernel that this version does not have.
    """
    steps, place = [], 1
    while place < len(numbers):
        kernel, first, count, length = numbers[place : place + 4]
        if not 0 <= kernel < len(KERNELS):
            raise InputError(
                f"the plan has kernel number {kernel}, of another version; this one has {len(KERNELS)}: plan again"
            )
        place += 4 + length
        steps.append(Step(KERNELS[kernel], first, count, tuple(numbers[place - length : place])))
    return steps, PRODUCTS[numbers[0]]


def pack_gpu(
    weight: torch.Tensor, bias: torch.Tensor, layer: ConvLayer, dtype: torch.dtype, form: str, product: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's weights in one form, and its bias, float32 in whole units (as many as there are for an image).

    Args:
        weight: ``(C_out, C_in, 3, 3)`` of the folded network.
        bias: ``(C_out,)`` of the folded network.
        layer: a :class:`advkd.ops.conv_layer.ConvLayer`.
        dtype: of the activations.
        form: ``taps`` (Triton), ``fragments`` or ``image`` (CUDA C++).
        product: one of :data:`advkd.ops.gpu_storage.PRODUCTS`.
    """
    taps, padded_bias = pad_layer(weight, bias, layer)
    if form == "taps":
        return triton_launcher("pack_weights")(taps, dtype, triton_precision(product)), padded_bias
    if form == "image":
        return pack_image(taps, layer.c_out, product), bias.float().contiguous()
    return pack_fragments(taps, product), padded_bias


def student_forward_gpu(
    z: torch.Tensor,
    biases: Sequence[torch.Tensor],
    packed: Sequence[torch.Tensor],
    layers: Sequence[ConvLayer],
    dtype: torch.dtype,
    steps: Sequence[int],
    slope: float,
) -> torch.Tensor:
    """Images ``(N, C, S, S)`` in ``dtype`` of latents ``(N, numel)``; see :func:`advkd.ops.student_forward.student_forward`.

    ``packed`` and ``biases``: of every layer, as :func:`pack_gpu` makes them for its step. ``steps``: of :func:`encode_steps`.
    """
    launches, product = decode_steps(steps)
    first, image = layers[0], layers[-1]
    images = z.new_empty((len(z), image.c_out, *output_sides(image)), dtype=dtype)
    if len(z) == 0:
        return images
    parts = [(first.c_in, first.height), *((layer.detail, layer.height) for layer in layers if layer.detail)]
    coarse, *details = split_latent(z.to(dtype), parts)
    x = coarse.new_zeros((len(z), first.height, first.width, padded(first.c_in)))
    x[..., : first.c_in] = coarse.permute(0, 2, 3, 1)
    for step, out in zip(launches, [*_activations(launches, layers, x), images], strict=True):
        run_step(step, layers, x, packed, biases, out, slope, product)
        following = step.first + step.count
        if following < len(layers) and layers[following].detail:
            _enter(out, details.pop(0))
        x = out
    return images


def run_step(
    step: Step,
    layers: Sequence[ConvLayer],
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    out: torch.Tensor,
    slope: float,
    product: str,
) -> None:
    """Start one step: ``x`` as its first layer reads it, ``out`` as the layer after it does, or the images."""
    _LAUNCH[step.kernel](step, layers, x, packed, biases, out, slope, product)


def activation_shapes(steps: Sequence[Step], layers: Sequence[ConvLayer], n: int) -> list[tuple[int, ...]]:
    """Shapes of the tensors between the steps."""
    following = [layers[step.first] for step in steps[1:]]
    return [(n, layer.height, layer.width, input_channels(layer)) for layer in following]


def workspace_elements(shapes: Iterable[Sequence[int]]) -> int:
    """Elements of the workspace that holds such tensors by turns in its two halves."""
    return sum(_halves([math.prod(shape) for shape in shapes]))


def _halves(sizes):
    # Steps of 128 elements keep both halves aligned.
    return [-(-max(sizes[i::2], default=0) // 128) * 128 for i in range(2)]


def _activations(steps, layers, x):
    """The tensors between the steps, by turns in the two halves of one workspace."""
    shapes = activation_shapes(steps, layers, len(x))
    starts = (0, _halves([math.prod(shape) for shape in shapes])[0])
    workspace = x.new_empty(workspace_elements(shapes))
    return [workspace[starts[i % 2] :][: math.prod(shape)].view(shape) for i, shape in enumerate(shapes)]


def _enter(out, detail):
    """Detail bands of the latent into the channels behind those of the layer before."""
    place = out[..., out.shape[-1] - padded(detail.shape[1]) :]
    place[..., : detail.shape[1]] = detail.permute(0, 2, 3, 1)
    place[..., detail.shape[1] :] = 0


def triton_launcher(name: str) -> Callable:
    """Function ``name`` of :mod:`advkd.ops.triton_conv`, which imports Triton."""
    return getattr(importlib.import_module("advkd.ops.triton_conv"), name)


def triton_precision(product: str) -> str:
    """How Triton multiplies float32 numbers for one of :data:`PRODUCTS`."""
    return "tf32x3" if product == "f32" else "tf32"


def triton_layer(layer: ConvLayer) -> ConvLayer:
    """A layer as Triton's table of configurations takes it: only what makes images has so few channels."""
    return layer if is_image(layer) else replace(layer, c_out=padded(layer.c_out))


def _triton(name):
    def launch(step, layers, x, packed, biases, out, slope, product):
        layer = layers[step.first]
        arguments = (x, packed[step.first], biases[step.first], out)
        options = (ACTIVATION_CODES[layer.activation], slope, triton_precision(product), step.config)
        triton_launcher(name)(*arguments, *([] if name == "conv_image" else [layer.upsample]), *options)

    return launch


def cuda_launch(
    step: Step,
    layers: Sequence[ConvLayer],
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    out: torch.Tensor,
    slope: float,
    product: str,
) -> tuple[str, tuple]:
    """Name and arguments of the CUDA launcher that does a step; arguments as of :func:`run_step`."""
    i, last = step.first, layers[step.first + step.count - 1]
    numbers = (ACTIVATION_CODES[last.activation], slope, PRODUCTS.index(product))
    if step.kernel == "stem":
        own = slice(i, i + step.count)
        plan = (stem_numbers(layers[own]), slope, PRODUCTS.index(product), *step.config)
        return "student_stem", (x, list(packed[own]), list(biases[own]), out, *plan)
    if step.kernel == "pair":
        pair = (x, packed[i], biases[i], packed[i + 1], biases[i + 1], out)
        return "conv_pair", (*pair, layers[i].upsample, i + 2 == len(layers), *numbers)
    tensors = (x, packed[i], biases[i], out)
    return (
        ("conv_image", (*tensors, *numbers)) if step.kernel == "image" else ("conv_layer", (*tensors, last.upsample, *numbers))
    )


def _cuda(*arguments):
    name, values = cuda_launch(*arguments)
    registry.cuda_launcher(name)(*values)


_LAUNCH = {
    "triton_conv": _triton("conv_layer"),
    "triton_image": _triton("conv_image"),
    **dict.fromkeys(("conv", "image", "pair", "stem"), _cuda),
    "triton_descriptor": _triton("conv_descriptor"),
}


def plain_steps(layers: Sequence[ConvLayer], n: int, dtype: torch.dtype, backend: str) -> list[Step]:
    """A step for every convolution of ``n`` images, by ``triton`` or ``cuda``."""
    prefix = "triton_" if backend == "triton" else ""
    steps = []
    for i, layer in enumerate(layers):
        config = ()
        if backend == "triton":
            config = tuple(triton_launcher("default")(triton_layer(layer), n, dtype, triton_precision(product_of(dtype))))
        steps.append(Step(prefix + ("image" if is_image(layer) else "conv"), i, 1, config))
    return steps


def gpu_arguments(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    layers: Sequence[ConvLayer],
    dtype: torch.dtype,
    steps: Sequence[Step],
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """Arguments ``biases``, ``packed`` and ``steps`` of the op ``student_forward`` on a GPU."""
    product = product_of(dtype)
    forms = [step.form(i, len(layers) - 1) for step in steps for i in range(step.first, step.first + step.count)]
    pairs = [pack_gpu(w, b, i, dtype, form, product) for w, b, i, form in zip(weights, biases, layers, forms, strict=True)]
    return [bias for _, bias in pairs], [packed for packed, _ in pairs], encode_steps(steps, product)
