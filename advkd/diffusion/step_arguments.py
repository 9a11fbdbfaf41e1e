"""Arguments of a scheduler's step: timesteps as numbers, and refusals of tensors and generators that do not fit."""

from numbers import Real

import torch
import torch.autograd.forward_ad as forward_ad

from ..errors import InputError
from ..ops.arguments import finite, require_dense
from ..ops.derivatives import carries_tangent, wants_derivative

GRADIENT = "a step through which a gradient is wanted (torch.no_grad() says that none is)"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def as_number(timestep: object) -> Real | None:
    """A timestep as a plain number: it is one, or a tensor or an array of one element. None where it is not."""
    if isinstance(timestep, torch.Tensor):
        if timestep.layout is not torch.strided or timestep.is_quantized:
            return None
        if timestep.is_floating_point() and timestep.element_size() == 1:
            return None
    if not isinstance(timestep, Real) and hasattr(timestep, "item"):
        try:
            timestep = timestep.item()
        except (RuntimeError, ValueError):  # several elements
            return None
    return timestep if isinstance(timestep, Real) and not isinstance(timestep, bool) else None


def position_in(timestep: object, timesteps: torch.Tensor) -> int | None:
    """Position of ``timestep`` in ``timesteps``, if it is an element of that very tensor; None if it is not."""
    if not isinstance(timestep, torch.Tensor) or timestep.numel() != 1 or not timesteps.is_contiguous():
        return None
    if timestep.device != timesteps.device or timestep.dtype != timesteps.dtype:
        return None
    try:
        position = (timestep.data_ptr() - timesteps.data_ptr()) // timesteps.element_size()
    except RuntimeError:  # a tensor of a transform has no address
        return None
    return position if 0 <= position < len(timesteps) else None


def for_diffusers(timestep: object, t: int) -> int | torch.Tensor:
    """A timestep that diffusers can index with: int32 and int64 tensors as they are, others as the int ``t``."""
    if isinstance(timestep, torch.Tensor) and timestep.dtype in (torch.int32, torch.int64):
        return timestep
    return t


def scalar(name: str, value: float | torch.Tensor) -> tuple[float, float | torch.Tensor]:
    """``value`` as a finite float, and as an argument of diffusers' own code: the tensor if it takes part in a derivative."""
    number = finite(name, value, constant=False)
    return number, value if isinstance(value, torch.Tensor) and wants_derivative(value) else number


def why_unfit(model_output: torch.Tensor, sample: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """The reason why the op cannot take these tensors, or None."""
    tensors = [tensor for tensor in (sample, model_output, *others) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return GRADIENT
    if forward_ad._current_level >= 0 and any(map(carries_tangent, tensors)):
        return "a step through which a derivative in forward mode is wanted"
    if model_output.shape != sample.shape or sample.ndim == 0:
        return "a sample without a batch, or a model_output of another shape"
    return None


def are_plain(output: torch.Tensor, sample: torch.Tensor) -> bool:
    """True if two tensors need no further checks. A step takes as long as a few dozen checks, and this is the usual case."""
    for tensor in (output, sample):
        if type(tensor) is not torch.Tensor or tensor.is_nested or tensor.layout is not torch.strided:
            return False
        if tensor.dtype not in _DTYPES:
            return False
    return output.shape == sample.shape and output.device == sample.device


def _require_numbers(name, tensor):
    require_dense(name, tensor)
    if tensor.dtype not in _DTYPES:
        raise InputError(f"{name} must hold floating-point numbers of 16 bits or more, got {tensor.dtype}")


def require_tensors(model_output: torch.Tensor, sample: torch.Tensor, learned: bool) -> None:
    """Refuse tensors that make no step; with ``learned``, the output may have further channels, of the variance."""
    _require_numbers("model_output", model_output)
    _require_numbers("sample", sample)
    if model_output.device != sample.device:
        found = f"{model_output.device} and {sample.device}"
        raise InputError(f"model_output and sample must be on one device, got {found}")
    output, state = list(model_output.shape), list(sample.shape)
    if min(len(output), len(state)) < 2 and output != state:
        raise InputError(f"model_output must have the shape of sample, {tuple(state)}, got {tuple(output)}")
    if learned and len(output) == len(state) and output[1:2] == [2 * n for n in state[1:2]]:
        output[1] = state[1]
    if _joint_shape(output, state) is None:
        raise InputError(f"model_output {tuple(model_output.shape)} and sample {tuple(state)} do not have one shape")


def require_noise(noise: torch.Tensor, sample: torch.Tensor, moves: bool) -> None:
    """Refuse noise that does not fit ``sample``; with ``moves``, it may be on another device."""
    _require_numbers("variance_noise", noise)
    if _joint_shape(noise.shape, sample.shape) != sample.shape:
        raise InputError(f"variance_noise must have the shape of sample, {tuple(sample.shape)}, got {tuple(noise.shape)}")
    if noise.device != sample.device and (not moves or noise.is_meta):
        raise InputError(f"variance_noise must be on {sample.device} like sample, got {noise.device}")


def _joint_shape(*shapes):
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None


def require_generator(generator: object, samples: int) -> None:
    """Refuse a generator that cannot make the noise of ``samples`` samples."""
    several = generator if isinstance(generator, list) else [generator]
    if not several or not all(isinstance(one, torch.Generator) for one in several):
        raise InputError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
    if 1 < len(several) < samples:
        raise InputError(f"generator must be one, or one for each of {samples} samples, got a list of {len(several)}")
