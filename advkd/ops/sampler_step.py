"""One step of any first-order or multistep diffusion sampler, as a linear combination with clipping.

x0 = clamp(k_x x + k_m m, -clip, clip);  x_next = c_0 x0 + c_x x + c_m m + c_h x0_prev + c_z z

with m the network's output, x0_prev the previous step's x0 and z standard normal noise. A sampler is a table of coefficients:
:mod:`advkd.diffusion.coefficients` has those of DDIM, DDPM, Euler and DPM-Solver++(2M).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import InputError
from ..runtime.sources import STREAMS
from . import philox, registry
from .arguments import device as known_device
from .arguments import flag, real, require_dense, whole
from .declaration import declare
from .layout import (
    DTYPES,
    arithmetic_dtype,
    has_memory,
    has_values,
    memory_format,
    overlap,
    require_apart,
    require_no_partial_overlap,
    require_samples,
    require_writable,
)

COEFFICIENTS = ("k_x", "k_m", "clip", "c_0", "c_x", "c_m", "c_h", "c_z")
"""Columns of a table of coefficients."""


@dataclass(frozen=True)
class StepCoefficients:
    """The scalars of one step (float64 values; the kernels round them to float32).

    x0 = clamp(k_x x + k_m m, -clip, clip); x_next = c_0 x0 + c_x x + c_m m + c_h x0_prev + c_z z, with m the network's output,
    x0_prev the previous step's x0 and z standard normal noise. Numbers of other types are kept as floats.

    Attributes:
        k_x: weight of the state in x0.
        k_m: weight of the network's output in x0.
        c_0: weight of the clamped x0 in the next state.
        c_x: weight of the state in the next state.
        c_m: weight of the network's output in the next state.
        c_h: weight of the previous step's x0 in the next state (multistep samplers).
        c_z: weight of the noise in the next state: its standard deviation.
        clip: x0 is clamped to [-clip, clip]; infinity for no clipping.

    Raises:
        InputError: a value that is no number, a tensor by which a derivative is wanted, or a negative ``clip``.

    Examples:
        >>> StepCoefficients(k_x=2.0, k_m=-1.0, c_0=0.5, c_x=0.5, clip=1.0).c_z
        0.0
    """

    k_x: float
    k_m: float
    c_0: float
    c_x: float = 0.0
    c_m: float = 0.0
    c_h: float = 0.0
    c_z: float = 0.0
    clip: float = math.inf

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if type(value) is not float:
                object.__setattr__(self, name, real(name, value))
        if not self.clip >= 0:
            raise InputError(f"clip must not be negative, got {self.clip}")

    def row(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The ``(1, 8)`` table of this step on ``device``, kept: a loop over the same steps copies nothing the second time.

        Args:
            device: where the table lies.
            dtype: of the table: float32, or float64 for float64 states.

        Returns:
            ``(1, 8)``, columns :data:`COEFFICIENTS`; later calls return the same tensor, which is not to be written to.
        """
        rows = self.__dict__.setdefault("_rows", {})
        row = rows.get((device, dtype))
        if row is None:
            with torch.inference_mode(False):
                row = coefficient_table((self,), device, dtype)
            if type(row) is torch.Tensor:  # a tracer makes others
                rows[device, dtype] = row
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_rows"}


def coefficient_table(
    steps: Iterable[StepCoefficients], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Table of the coefficients of several steps, a row each, columns :data:`COEFFICIENTS`.

    A loop on a GPU passes a row of it (``table[i]``) to :func:`sampler_step`, and a captured CUDA graph must: nothing is then
    copied to the device.

    Args:
        steps: a :class:`StepCoefficients` for each row.
        device: where the table is to lie: the states' device.
        dtype: floating-point; :func:`sampler_step` takes float32, or float64 for float64 states.

    Returns:
        ``(len(steps), 8)`` in ``dtype`` on ``device``.

    Raises:
        InputError: ``steps`` that are none, a dtype that is not floating-point, or an unknown device.

    Examples:
        >>> coefficient_table([StepCoefficients(k_x=1.0, k_m=-0.5, c_0=1.0)]).tolist()
        [[1.0, -0.5, inf, 1.0, 0.0, 0.0, 0.0, 0.0]]
    """
    try:
        steps = tuple(steps)
    except TypeError:
        raise InputError(f"steps must be a sequence of StepCoefficients, got {steps!r}") from None
    if not all(isinstance(step, StepCoefficients) for step in steps):
        raise InputError(f"steps must be a sequence of StepCoefficients, got {steps!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point dtype, got {dtype!r}")
    device = known_device("device", device)
    rows = [[getattr(step, name) for name in COEFFICIENTS] for step in steps]
    return torch.tensor(rows, dtype=dtype, device="cpu").reshape(len(rows), len(COEFFICIENTS)).to(device)


def sampler_step(
    x: torch.Tensor,
    model_output: torch.Tensor,
    coefficients: StepCoefficients | Sequence[StepCoefficients] | torch.Tensor,
    *,
    previous_x0: torch.Tensor | None = None,
    noise: torch.Tensor | tuple | None = None,
    pool: int | None = None,
    return_x0: bool = False,
    out: torch.Tensor | tuple | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """One sampler step in one pass over memory.

    Args:
        x: state ``(N, ...)``, float32, bfloat16 or float16 (float64: reference only), contiguous or channels_last; another
            layout is copied to a contiguous one first.
        model_output: the network's output, ``x``'s shape; any of the three dtypes.
        coefficients: :class:`StepCoefficients`; or a sequence of N of them, one per sample (a batch at mixed timesteps); or
            rows of a :func:`coefficient_table` on ``x``'s device, ``(8,)``, ``(1, 8)`` or ``(N, 8)``. The values of a
            tensor are not read on the host: there a term whose tensor is missing counts as zero.
        previous_x0: x0 of the previous step, like ``x``; needed where ``c_h`` is not 0.
        noise: standard normal tensor like ``x``, or ``(seed, sample indices, step)`` for the Philox noise of stream "step"
            (:func:`advkd.ops.philox_normal`) made inside the pass; ``step`` is an int in [0, 2^24), or an int64 tensor of 1 or
            N elements on ``x``'s device. Needed where ``c_z`` is not 0.
        pool: integer r that divides H and W: also return the r x r area average of the next state.
        return_x0: also return x0.
        out: tensor that receives the next state, laid out like ``x``; ``x`` itself for a step in place. With ``pool`` it may
            be a pair, of that and of the tensor for the average.
        check_finite: look for infinities and NaN in the next state within the pass (waits for the device).
        backend: see :func:`advkd.ops.registry.choose`.

    Returns:
        The triple ``(x_next, x0 or None, pooled or None)``, in ``x``'s dtype and layout; arithmetic is float32 (float64 for
        float64). ``x_next`` and ``x0`` have ``x``'s shape, ``pooled`` is ``(N, C, H / r, W / r)``.

    Raises:
        InputError: shapes, dtypes or devices that differ, coefficients of the wrong length, a tensor that the coefficients need
            and that is missing, sizes that ``pool`` does not divide, flags that are none, an ``out`` that does not fit or that
            shares memory with what is read in another order, or with ``check_finite`` a next state that is not finite.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.
        RuntimeError: a gradient is asked for, or a tangent in forward mode comes in. Order of differentiability 0.

    Examples:
        >>> step = StepCoefficients(k_x=1.0, k_m=-0.5, c_0=0.75, c_x=0.25)
        >>> x_next, x0, _ = sampler_step(torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8), step, return_x0=True)
        >>> x_next[0, 0, 0, 0].item(), x0[0, 0, 0, 0].item()
        (0.625, 0.5)
    """
    require_samples("x", x)
    return_x0, check_finite = flag("return_x0", return_x0), flag("check_finite", check_finite)
    registry.require_known(backend)
    given, average = _split(out)
    noise, (seed, indices, step, steps) = _split_noise(noise, x)
    tensors = {"model_output": model_output, "previous_x0": previous_x0, "out": given, "noise": noise}
    _check_tensors(x, tensors)
    table = _table(coefficients, x, previous_x0 is not None, noise is not None or indices is not None)
    if (given is not None or average is not None) and not torch.compiler.is_compiling():
        read = {"x": x, **tensors, "coefficients": coefficients, "noise's indices": indices, "noise's step": steps}
        _check_results(x, given, average, {name: t for name, t in read.items() if isinstance(t, torch.Tensor)})
    pool = pool if pool is None else whole("pool", pool, 1)
    if pool is not None and (x.ndim != 4 or x.shape[-1] % pool or x.shape[-2] % pool):
        raise InputError(f"pool must divide the height and width of (N, C, H, W), got {pool} for {tuple(x.shape)}")
    registry.refuse_order_0("sampler_step", x, model_output, table, previous_x0, noise, given, average)
    layout = memory_format(x)
    x_next = torch.empty_like(x, memory_format=layout) if given is None else given
    x0, pooled, flags = _outputs(x, pool, return_x0, check_finite, average)
    x, model_output, previous_x0, noise = _laid_out(layout, x, model_output, previous_x0, noise)
    OP(x, model_output, table, previous_x0, noise, indices, seed, step, steps, pool or 0, backend, x_next, x0, pooled, flags)
    for written in (given, average):
        if written is not None:
            _mark_written(written)
    if check_finite and has_values(flags):
        _refuse_infinite(flags)
    return x_next, x0, pooled


def sampler_step_reference(
    x: torch.Tensor,
    m: torch.Tensor,
    table: torch.Tensor,
    previous_x0: torch.Tensor | None,
    noise: torch.Tensor | None,
    indices: torch.Tensor | None,
    seed: int,
    step: int,
    steps: torch.Tensor | None,
    pool: int,
    out: torch.Tensor,
    x0: torch.Tensor | None,
    pooled: torch.Tensor | None,
    flags: torch.Tensor | None,
) -> None:
    """The specification of :func:`sampler_step`: writes ``out`` and what else is not None."""
    arithmetic = arithmetic_dtype(x)
    k_x, k_m, clip, c_0, c_x, c_m, c_h, c_z = table.to(arithmetic).reshape(-1, 8, *[1] * (x.ndim - 1)).unbind(1)
    state, m = x.to(arithmetic), m.to(arithmetic)
    clean = torch.minimum(torch.maximum(k_x * state + k_m * m, -clip), clip)
    x_next = c_0 * clean + c_x * state + c_m * m
    if previous_x0 is not None:
        x_next = x_next + c_h * previous_x0.to(arithmetic)
    if indices is not None:
        noise = philox.normal_reference(indices, seed, x.shape[1:], STREAMS["step"], step if steps is None else steps)
    if noise is not None:
        x_next = x_next + c_z * noise.to(arithmetic)
    out.copy_(x_next)
    if x0 is not None:
        x0.copy_(clean)
    if pooled is not None:
        pooled.copy_(F.avg_pool2d(x_next, pool))
    if flags is not None:
        flags.copy_(~torch.isfinite(x_next.to(x.dtype)).reshape(len(x), -1).all(1))


def _split(out):
    """``out`` as the tensors for the next state and for its average, or None."""
    out, average = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    if isinstance(out, tuple) or not (average is None or isinstance(average, torch.Tensor)):
        raise InputError("out must be a tensor, or with pool a pair of tensors")
    return out, average


def _split_noise(noise, x):
    """``noise`` as a tensor or None, and the seed, indices, step and steps of noise that is to be drawn."""
    if not isinstance(noise, (tuple, list)):
        return noise, (0, None, 0, None)
    drawn = philox.counters("noise", noise, x.shape[0], x.device)
    if x.numel() > 2**34 * max(x.shape[0], 1):
        raise InputError(f"noise has 2^34 numbers per sample (2^32 blocks of four), x has {x.numel() // x.shape[0]}")
    return None, drawn


def _check_tensors(x, tensors):
    for name, tensor in tensors.items():
        if tensor is None and name != "model_output":
            continue
        require_dense(name, tensor)
        mixed = name == "model_output" and tensor.dtype in DTYPES and x.dtype in DTYPES
        if tensor.shape != x.shape or tensor.device != x.device or (tensor.dtype != x.dtype and not mixed):
            found, expected = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (tensor, x))
            raise InputError(f"{name} is {found}, expected {expected} as x")
    if tensors["out"] is not None:
        require_writable("out", tensors["out"])


def _check_results(x, out, average, read):
    """Refuse an ``out`` that is not laid out like ``x``, or overlaps a tensor to read without being that tensor."""
    addresses = has_memory(x)
    if average is not None and addresses:
        _check_average(average, read)
    if out is None:
        return
    if not out.is_contiguous(memory_format=memory_format(x)):
        raise InputError(f"out must be laid out like x ({memory_format(x)}), got strides {out.stride()}")
    for name, tensor in read.items() if addresses else ():
        check = require_apart if name in ("coefficients", "noise's indices", "noise's step") else require_no_partial_overlap
        check("out", out, name, tensor)


def _check_average(average, tensors):
    """Refuse a tensor for the average that overlaps another one: it is written while they are read."""
    for name, tensor in tensors.items():
        if overlap(average, tensor):
            raise InputError(f"out's second tensor overlaps {'the first' if name == 'out' else name}")


def _table(coefficients, x, history, noisy):
    """The rows for the kernels, checked: one, or one per sample."""
    if isinstance(coefficients, torch.Tensor):
        require_dense("coefficients", coefficients)
        rows = coefficients.reshape(1, -1) if coefficients.ndim == 1 else coefficients
        wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
        if rows.ndim != 2 or rows.shape[1] != len(COEFFICIENTS) or rows.shape[0] not in (1, x.shape[0]):
            shape = tuple(coefficients.shape)
            raise InputError(f"coefficients must have shape (8,), (1, 8) or ({len(x)}, 8) for {len(x)} samples, got {shape}")
        if rows.dtype != wanted or rows.device != x.device:
            raise InputError(f"coefficients must be {wanted} on {x.device}, got {rows.dtype} on {rows.device}")
        return rows.contiguous()
    single = isinstance(coefficients, StepCoefficients)
    steps = (coefficients,) if single else tuple(coefficients) if isinstance(coefficients, (list, tuple)) else ()
    if (
        not (single or isinstance(coefficients, (list, tuple)))
        or (not single and len(steps) != x.shape[0])
        or not all(isinstance(step, StepCoefficients) for step in steps)
    ):
        raise InputError(
            f"coefficients must be one StepCoefficients, or a list of one per sample ({len(x)}), or a table of them"
        )
    for step in steps:
        for name, weight, given in (("previous_x0", step.c_h, history), ("noise", step.c_z, noisy)):
            if weight != 0 and not given:
                raise InputError(f"{name} is needed: its coefficient is {weight}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not single or torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return coefficient_table(steps, x.device, dtype)
    return coefficients.row(x.device, dtype)


def _laid_out(layout, *tensors):
    return [t if t is None else t.contiguous(memory_format=layout) for t in tensors]


def _mark_written(out):
    """Tell autograd of the write, as torch's in-place ops do: a backward pass that has saved ``out`` then raises."""
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _refuse_infinite(flags):
    wrong = flags.nonzero().flatten().tolist()
    if wrong:
        raise InputError(f"the next state of sample {', '.join(map(str, wrong[:8]))} is not finite: check x and model_output")


def _outputs(x, pool, return_x0, check_finite, average):
    """Memory for x0, the pooled state (``average`` if given) and one zero flag per sample; None where not wanted."""
    x0 = torch.empty_like(x, memory_format=memory_format(x)) if return_x0 else None
    if pool or average is not None:
        average = _average(x, pool, average)
    return x0, average, x.new_zeros(x.shape[0], dtype=torch.int32) if check_finite else None


def _average(x, pool, given):
    shape = (*x.shape[:2], x.shape[2] // pool, x.shape[3] // pool) if pool else None
    if given is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    require_writable("out", given)
    fits = pool and given.shape == shape and given.dtype == x.dtype and given.device == x.device
    if not fits or not given.is_contiguous(memory_format=memory_format(x)):
        expected = f"{shape} {x.dtype} on {x.device} laid out like x" if pool else "no second tensor without pool"
        raise InputError(f"out's second tensor is {tuple(given.shape)} {given.dtype} on {given.device}, expected {expected}")
    return given


OP = declare(
    "sampler_step(Tensor x, Tensor model_output, Tensor coefficients, Tensor? previous_x0, Tensor? noise, Tensor? indices, "
    "int seed, int step, Tensor? steps, int pool, Tensor(a!) out, Tensor(b!)? x0, Tensor(c!)? pooled, Tensor(d!)? flags) -> ()",
    reference=sampler_step_reference,
    backends=("cpu", "triton", "cuda"),
)
