"""The whole student as one op: from latents to images, batch norm folded, nothing of Python between the layers."""

from collections.abc import Sequence

import torch

from ..errors import InputError
from ..runtime.devices import without_autocast
from . import registry
from .arguments import finite, require_dense
from .conv_block import conv_block_reference
from .conv_layer import CPU_DTYPES, DTYPES, STORAGE, ConvLayer, decode, encode, is_image, pack
from .declaration import declare
from .latents import split_latent
from .layout import require_floating
from .student_steps import gpu_arguments, plain_steps, student_forward_gpu


def student_forward(
    z: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    layers: Sequence[ConvLayer],
    *,
    slope: float,
    dtype: torch.dtype,
    packed: Sequence[torch.Tensor] = (),
    algorithms: Sequence[str] = (),
    backend: str = "auto",
) -> torch.Tensor:
    """Images of latents, through 3x3 convolutions that follow each other (:func:`advkd.ops.conv_block`).

    Args:
        z: ``(N, latent_numel)`` float32 (other floating-point dtypes are converted): the first layer's input, then the detail
            bands of up-sampling layers, in order.
        weights: per layer ``(C_out, C_in, 3, 3)``; float32, or ``dtype``.
        biases: per layer ``(C_out,)``, as the weights.
        layers: a :class:`advkd.ops.conv_layer.ConvLayer` each; the last one is the image's.
        slope: LeakyReLU's slope for negative values.
        dtype: of activations and images: float32, bfloat16; float16 (all but ``cpu``), float64 (``reference``).
        algorithms: for ``cpu``, one of ``ALGORITHMS`` per layer; by default each layer's default.
        packed: for ``cpu``, these weights and biases by :func:`advkd.ops.conv_layer.pack`; by default they are packed now.
        backend: see :func:`advkd.ops.registry.choose`. ``triton`` and ``cuda`` pack the weights on every call and start one
            kernel per layer; :class:`advkd.FusedStudent` keeps weights packed, plans launches and captures them as graphs.

    Returns:
        ``(N, C, S, S)`` images in ``dtype``. On ``cpu`` an image's bits depend on its latent, the algorithms and the
        instruction set alone: not on the batch or the number of threads.

    Raises:
        InputError: shapes, dtypes, devices or numbers of layers that do not fit, a slope that is no finite number, or a last
            layer that GPU kernels do not take.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.
        RuntimeError: a gradient is asked for, or a tangent in forward mode comes in. Order of differentiability 0.

    Examples:
        >>> layers = [ConvLayer(4, 1, 4, 4, activation="tanh")]
        >>> weights, biases = [torch.ones(1, 4, 3, 3)], [torch.zeros(1)]
        >>> student_forward(torch.zeros(2, 64), weights, biases, layers, slope=0.2, dtype=torch.float32).shape
        torch.Size([2, 1, 4, 4])
    """
    _check_layers(layers, weights, biases)
    require_floating("z", z)
    registry.require_known(backend)
    registry.refuse_order_0("student_forward", *weights, *biases)
    slope = finite("slope", slope)
    require_latents(z, latent_numel(layers), weights[0].device)
    backend = registry.choose_for_dtype("student_forward", dtype, backend, z.device)
    if backend in ("triton", "cuda"):
        if not is_image(layers[-1]):
            raise InputError(f"the last layer must make 1 to 4 channels by tanh without up-sampling on {backend!r}")
        biases, packed, steps = gpu_arguments(weights, biases, layers, dtype, plain_steps(layers, len(z), dtype, backend))
        numbers = encode(layers, dtype)
        return OP(z.contiguous(), [], biases, packed, numbers, steps, slope, backend)
    if backend != "cpu":
        narrow = ([tensor.to(dtype) for tensor in group] for group in (weights, biases))
        return OP(z.to(dtype), *narrow, [], encode(layers), [], slope, backend)
    algorithms = algorithms or [layer.default(dtype) for layer in layers]
    if len(algorithms) != len(layers) or packed and len(packed) != len(layers):
        raise InputError(f"{len(layers)} layers need as many algorithms and packed weights")
    packed = packed or [pack(w, b, i, dtype, a) for w, b, i, a in zip(weights, biases, layers, algorithms, strict=True)]
    z, numbers = z.float().contiguous(), encode(layers, dtype, algorithms)
    return OP(z, list(weights), list(biases), list(packed), numbers, [], slope, backend)


def latent_numel(layers: Sequence[ConvLayer]) -> int:
    """Elements of one latent: the first layer's input and the detail bands of later ones."""
    first = layers[0]
    return first.c_in * first.height * first.width + sum(i.detail * i.height * i.width for i in layers)


def require_latents(z: torch.Tensor, numel: int, device: torch.device) -> None:
    """Refuse latents that are not ``(N, numel)`` on ``device``, and a tangent, which the op would leave behind."""
    registry.refuse_order_0("student_forward", z)
    if z.device != device:
        raise InputError(f"z must be on {device} like the weights, got {z.device}")
    if z.ndim != 2 or z.shape[1] != numel:
        raise InputError(f"z must have shape (N, {numel}), got {tuple(z.shape)}")


def _check_layers(layers, weights, biases):
    for name, group in (("layers", layers), ("weights", weights), ("biases", biases)):
        if not isinstance(group, (list, tuple)):
            raise InputError(f"{name} must be a sequence, got {type(group).__name__}")
    if not all(isinstance(layer, ConvLayer) for layer in layers):
        raise InputError("layers must be a sequence of ConvLayer")
    if not layers or not len(weights) == len(biases) == len(layers):
        raise InputError(f"{len(layers)} layers need as many weights and biases, got {len(weights)} and {len(biases)}")
    for i, (layer, weight, bias) in enumerate(zip(layers, weights, biases, strict=True)):
        require_dense(f"weights {i}", weight)
        require_dense(f"biases {i}", bias)
        if not 0 <= layer.detail < layer.c_in or i == 0 and layer.detail:
            raise InputError(f"layer {i}: detail must be 0 or some of a later layer's input channels, got {layer.detail}")
        if weight.shape != (layer.c_out, layer.c_in, 3, 3) or bias.shape != (layer.c_out,):
            expected = f"({layer.c_out}, {layer.c_in}, 3, 3) and ({layer.c_out},)"
            raise InputError(f"weights and biases {i} must be {expected}, got {tuple(weight.shape)} and {tuple(bias.shape)}")


def student_forward_reference(
    z: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], layers: Sequence[ConvLayer], slope: float
) -> torch.Tensor:
    """The specification of :func:`student_forward`."""
    with without_autocast(z):
        return _images(z, weights, biases, layers, slope)


def _images(z, weights, biases, layers, slope):
    first = layers[0]
    parts = [(first.c_in, first.height), *((layer.detail, layer.height) for layer in layers if layer.detail)]
    coarse, *details = split_latent(z, parts)
    x = coarse.contiguous(memory_format=torch.channels_last)
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        if layer.detail:
            x = torch.cat((x, details.pop(0)), dim=1)
        x = conv_block_reference(x, weight, bias, slope, layer.upsample, layer.activation)
    return x


def _reference(z, weights, biases, packed, layers, steps, slope):
    return student_forward_reference(z, weights, biases, decode(layers), slope).contiguous()


def _cpu(z, weights, biases, packed, layers, steps, slope):
    return torch.ops.advkd_cpu.student_forward(z, packed, layers, slope)


def _gpu(z, weights, biases, packed, layers, steps, slope):
    return student_forward_gpu(z, biases, packed, decode(layers), DTYPES[layers[STORAGE]], steps, slope)


def _fake(z, weights, biases, packed, layers, steps, slope, backend):
    image = decode(layers)[-1]
    scale = 2 if image.upsample else 1
    # The reference computes in z's dtype; the kernels' launchers take float32 latents and say theirs with each layer.
    dtype = z.dtype if backend == "reference" else DTYPES[layers[STORAGE]]
    return z.new_empty((z.shape[0], image.c_out, scale * image.height, scale * image.width), dtype=dtype)


OP = declare(
    "student_forward(Tensor z, Tensor[] weights, Tensor[] biases, Tensor[] packed, int[] layers, int[] steps, float slope)"
    " -> Tensor",
    reference=_reference,
    backends=("cpu", "triton", "cuda"),
    launchers={"cpu": _cpu, "triton": _gpu, "cuda": _gpu},
    fake=_fake,
    # The dtype of the images chose the backend for which the weights were packed; the latents may have any.
    choose=lambda name, z, backend: backend,
    capability=(8, 0),
    dtypes={"cpu": CPU_DTYPES},
)
