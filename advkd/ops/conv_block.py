"""A convolution of the student with everything around it: y = act(conv3x3(up(x)) + bias), batch norm already folded."""

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..runtime.devices import without_autocast
from . import registry
from .arguments import finite, flag, require_dense
from .conv_layer import ACTIVATIONS, CPU_DTYPES, ConvLayer, is_image, output_sides, pack
from .declaration import declare
from .gpu_storage import padded, product_of
from .layout import has_values
from .student_steps import Step, pack_gpu, run_step, triton_launcher


def conv_block(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    slope: float = 0.2,
    upsample: bool = False,
    activation: str = "leaky_relu",
    backend: str = "auto",
) -> torch.Tensor:
    """3x3 convolution (padding 1) of the nearest-neighbour up-sampled input, bias and activation.

    Args:
        x: ``(N, C_in, H, W)``, any strides: float32 or bfloat16 (all backends), float16 (all but ``cpu``), float64
            (``reference``).
        weight: ``(C_out, C_in, 3, 3)``, same dtype, finite.
        bias: ``(C_out,)``, same dtype, finite.
        slope: LeakyReLU's slope for negative values.
        upsample: double height and width of ``x`` before the convolution.
        activation: ``leaky_relu``, ``tanh`` (the last layer) or ``none``.
        backend: see :func:`advkd.ops.registry.choose`. Kernels pack the weights on every call, which takes longer than a
            convolution of one image: ``auto`` passes them over here (not in :func:`student_forward`, which keeps weights
            packed).

    Returns:
        ``(N, C_out, H, W)``, or ``(N, C_out, 2H, 2W)`` with ``upsample``, in ``x``'s dtype. Sums are float32. On the ``cpu``
        backend an image's bits depend neither on the batch nor on the number of threads; a number of x that is not finite
        spoils the tiles of outputs that read it, not only the nine outputs around it. On GPUs float32 products are
        TensorFloat-32 where ``torch.backends.cudnn.allow_tf32`` is set (torch's default), as cuDNN's are; else they are full
        float32 (``cuda``: to 22 bits of each factor, infinite numbers give NaN).

    Raises:
        InputError: shapes, dtypes, names or weights that do not fit, a slope that is no finite number or a tensor by which a
            derivative is wanted, or an ``upsample`` that is no flag.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.
        RuntimeError: a gradient is asked for, or a tangent in forward mode comes in. Order of differentiability 0.

    Examples:
        >>> conv_block(torch.ones(1, 8, 4, 4), torch.ones(16, 8, 3, 3), torch.zeros(16), upsample=True).shape
        torch.Size([1, 16, 8, 8])
    """
    _check_tensors(x, weight, bias)
    slope, upsample = finite("slope", slope), flag("upsample", upsample)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    registry.require_known(backend)
    registry.refuse_order_0("conv_block", x, weight, bias)
    require_finite(weight=weight, bias=bias)
    backend = registry.choose_for_dtype("conv_block", x.dtype, backend, x.device)
    return OP(x, weight, bias, slope, upsample, activation, backend)


def _check_tensors(x, weight, bias):
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        require_dense(name, tensor)
    if x.ndim != 4:
        raise InputError(f"x must have shape (N, C_in, H, W), got {tuple(x.shape)}")
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or weight.shape[1] != x.shape[1]:
        expected = f"(C_out, {x.shape[1]}, 3, 3)"
        raise InputError(f"weight must be {expected} for x of shape {tuple(x.shape)}, got {tuple(weight.shape)}")
    if min(*x.shape[1:], *weight.shape) < 1:
        raise InputError(f"x and weight must not be empty but in N, got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise InputError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not x.dtype == weight.dtype == bias.dtype:
        raise InputError(f"x, weight and bias must share a dtype, got {x.dtype}, {weight.dtype} and {bias.dtype}")
    if not x.device == weight.device == bias.device:
        raise InputError(f"x, weight and bias must be on one device, got {x.device}, {weight.device} and {bias.device}")
    if not x.dtype.is_floating_point:
        raise InputError(f"x must be a floating-point tensor, got {x.dtype}")


def require_finite(**tensors: torch.Tensor) -> None:
    """Refuse weights that are infinite or not numbers: transforms would spread them over the image."""
    for name, tensor in tensors.items():
        if has_values(tensor) and not torch.isfinite(tensor).all():
            raise InputError(f"{name} holds numbers that are not finite")


def conv_block_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, slope: float, upsample: bool, activation: str
) -> torch.Tensor:
    """The specification of :func:`conv_block`."""
    if upsample:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    with without_autocast(x):
        y = F.conv2d(x, weight, bias, padding=1)
    if activation == "leaky_relu":
        return F.leaky_relu(y, slope)
    return torch.tanh(y) if activation == "tanh" else y


def conv_block_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    slope: float,
    upsample: bool,
    activation: str,
    algorithm: str | None = None,
) -> torch.Tensor:
    """The C++ kernels, packing the weights on every call (:func:`student_forward` keeps them packed)."""
    layer = ConvLayer(weight.shape[1], weight.shape[0], x.shape[2], x.shape[3], upsample, activation)
    algorithm = algorithm or layer.default(x.dtype)
    numbers = layer.numbers(x.dtype, algorithm)
    packed = pack(weight, bias, layer, x.dtype, algorithm)
    return torch.ops.advkd_cpu.conv_block(x.float().contiguous(), packed, numbers, slope)


def conv_block_cuda(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, slope: float, upsample: bool, activation: str
) -> torch.Tensor:
    """The launcher of op ``conv_block`` on backend ``cuda``: stored as a network's layer is, convolved, and back."""
    layer = ConvLayer(weight.shape[1], weight.shape[0], x.shape[2], x.shape[3], upsample, activation)
    product, image = product_of(x.dtype), is_image(layer)
    step = Step("image" if image else "conv", 0)
    packed, padded_bias = pack_gpu(weight, bias, layer, x.dtype, step.form(0, 0), product)
    stored = x.new_zeros((len(x), *x.shape[2:], padded(layer.c_in)))
    stored[..., : layer.c_in] = x.permute(0, 2, 3, 1)
    sides = output_sides(layer)
    out = x.new_empty((len(x), layer.c_out, *sides) if image else (len(x), *sides, padded(layer.c_out)))
    if len(x):
        run_step(step, [layer], stored, [packed], [padded_bias], out, slope, product)
    return out if image else out[..., : layer.c_out].permute(0, 3, 1, 2).contiguous()


def conv_block_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, slope: float, upsample: bool, activation: str
) -> torch.Tensor:
    """The launcher of op ``conv_block`` on backend ``triton``."""
    return triton_launcher("conv_block")(x, weight, bias, slope, upsample, activation)


def _reference(*args):
    return conv_block_reference(*args).contiguous()


def _fake(x, weight, bias, slope, upsample, activation, backend):
    scale = 2 if upsample else 1
    return x.new_empty((x.shape[0], weight.shape[0], scale * x.shape[2], scale * x.shape[3]))


OP = declare(
    "conv_block(Tensor x, Tensor weight, Tensor bias, float slope, bool upsample, str activation) -> Tensor",
    reference=_reference,
    backends=("cpu", "triton", "cuda"),
    launchers={"cpu": conv_block_cpu, "triton": conv_block_triton, "cuda": conv_block_cuda},
    fake=_fake,
    by_name=("cpu", "triton", "cuda"),
    capability=(8, 0),
    dtypes={"cpu": CPU_DTYPES},
)
