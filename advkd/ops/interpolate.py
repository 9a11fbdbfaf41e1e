"""Points between real and generated samples for the gradient penalty: x_hat = a real + (1 - a) fake."""

import torch

from ..errors import InputError
from ..runtime.sources import STREAMS
from . import philox, registry
from .arguments import flag, require_dense
from .declaration import declare
from .layout import arithmetic_dtype, memory_format, require_like, require_samples


def interpolate(
    real: torch.Tensor, fake: torch.Tensor, a: torch.Tensor | tuple, *, merge: bool = False, backend: str = "auto"
) -> torch.Tensor:
    """One point on the line between each real and generated sample (Gulrajani et al. 2017, algorithm 1).

    Args:
        real: ``(N, ...)`` real samples: float32, bfloat16 or float16 (float64: reference only). A layout other than contiguous
            and channels_last is copied.
        fake: ``(N, ...)`` generated samples of ``real``'s shape, dtype and device; copied where they are laid out otherwise.
        a: ``(N,)`` weights of the real samples, in float32 (float64 for float64); or ``(seed, sample indices, step)``: one
            uniform Philox number per sample of stream "interpolation", ``a = (w0 >> 8) 2^-24``, made inside the pass. ``step``
            is an int, or an int64 tensor of 1 or N elements on ``real``'s device (for a captured CUDA graph).
        merge: return ``(3 N, ...)``: real, generated and interpolated samples, as the critic's update takes them.
        backend: see :func:`advkd.ops.registry.choose`.

    Returns:
        ``(N, ...)``, or ``(3 N, ...)`` with ``merge``, in ``real``'s dtype and layout; the arithmetic is float32 (float64
        for float64).

    Raises:
        InputError: tensors that do not fit each other, a bad seed, index or step, or a ``merge`` other than a flag.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.
        RuntimeError: a gradient is asked for, or a tangent in forward mode comes in. Order of differentiability 0.

    Examples:
        >>> interpolate(torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0.25, 0.5])).tolist()
        [[0.25, 0.25, 0.25], [0.5, 0.5, 0.5]]
    """
    require_samples("real", real)
    require_dense("fake", fake)
    if fake.shape != real.shape:
        raise InputError(f"fake must be like real, {tuple(real.shape)}, got {tuple(fake.shape)}")
    registry.require_known(backend)
    registry.refuse_order_0("interpolate", real, fake, a)
    merge = flag("merge", merge)
    layout = memory_format(real)
    real, fake = real.contiguous(memory_format=layout), fake.contiguous(memory_format=layout)
    require_like("fake", fake, "real", real)
    weights, seed, indices, step, steps = None, 0, None, 0, None
    if isinstance(a, (tuple, list)):
        seed, indices, step, steps = philox.counters("a", a, real.shape[0], real.device)
    else:
        if isinstance(a, torch.Tensor):
            require_dense("a", a)
        _check_weights(a, real)
        weights = a.contiguous()
    shape = ((3 if merge else 1) * real.shape[0], *real.shape[1:])
    out = torch.empty(shape, dtype=real.dtype, device=real.device, memory_format=layout)
    OP(real, fake, weights, indices, seed, step, steps, backend, out)
    return out


def interpolate_reference(
    real: torch.Tensor,
    fake: torch.Tensor,
    a: torch.Tensor | None,
    indices: torch.Tensor | None,
    seed: int,
    step: int,
    steps: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The specification of :func:`interpolate`: writes ``out``, which has N or 3 N rows."""
    n, dtype = real.shape[0], arithmetic_dtype(real)
    a = _drawn(indices, seed, step if steps is None else steps, dtype) if a is None else a
    a = a.reshape(-1, *[1] * (real.ndim - 1))
    if out.shape[0] != n:
        out[:n].copy_(real)
        out[n : 2 * n].copy_(fake)
    out[out.shape[0] - n :].copy_(a * real.to(dtype) + (1 - a) * fake.to(dtype))


def _drawn(indices, seed, step, dtype):
    """Uniform numbers in [0, 1), one for each sample."""
    words = philox.words_reference(indices, seed, 1, STREAMS["interpolation"], step)
    return (words[:, 0] >> 8).to(dtype) * 2.0**-24


def _check_weights(a, real):
    wanted = arithmetic_dtype(real)
    if not isinstance(a, torch.Tensor) or a.shape != real.shape[:1] or a.dtype != wanted or a.device != real.device:
        found = f"{tuple(a.shape)} {a.dtype} on {a.device}" if isinstance(a, torch.Tensor) else type(a).__name__
        raise InputError(
            f"a must be ({real.shape[0]},) {wanted} on {real.device}, or (seed, sample indices, step), got {found}"
        )


OP = declare(
    "interpolate(Tensor real, Tensor fake, Tensor? a, Tensor? indices, int seed, int step, Tensor? steps, "
    "Tensor(a!) out) -> ()",
    reference=interpolate_reference,
    backends=("cpu", "triton", "cuda"),
)
