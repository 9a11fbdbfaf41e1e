"""One step of any first-order or multistep diffusion sampler, as a linear combination with clipping.

x0 = clamp(k_x x + k_m m, -clip, clip);  x_next = c_0 x0 + c_x x + c_m m + c_h x0_prev + c_g history + c_z z
stored = s_0 x0 + s_x x + s_m m

with m the network's output, x0_prev and history what earlier steps stored, and z standard normal noise. A plain step has no
history and stores x0; kernels of its own run it. A sampler is a table of coefficients: :mod:`advkd.diffusion.coefficients` has
those of DDIM, DDPM, Euler and DPM-Solver++(2M).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import InputError
from ..runtime.sources import STREAMS
from . import philox, registry
from .arguments import flag, require_dense, whole
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
from .step_coefficients import COEFFICIENTS, EXTENDED_COEFFICIENTS, StepCoefficients, coefficient_table


def sampler_step(
    x: torch.Tensor,
    model_output: torch.Tensor,
    coefficients: StepCoefficients | Sequence[StepCoefficients] | torch.Tensor,
    *,
    previous_x0: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    noise: torch.Tensor | tuple | None = None,
    pool: int | None = None,
    return_x0: bool = False,
    out: torch.Tensor | tuple | None = None,
    x0: torch.Tensor | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """One sampler step in one pass over memory.

    Args:
        x: state ``(N, ...)``, float32, bfloat16 or float16 (float64: reference only), contiguous or channels_last; another
            layout is copied to a contiguous one first.
        model_output: the network's output, ``x``'s shape; any of the three dtypes.
        coefficients: :class:`StepCoefficients`; or a sequence of N of them, one per sample (a batch at mixed timesteps); or
            rows of a :func:`coefficient_table` on ``x``'s device, ``(8,)``, ``(1, 8)`` or ``(N, 8)``, with 12 columns instead
            of 8 for extended steps. The values of a tensor are not read on the host: there a term whose tensor is missing
            counts as zero.
        previous_x0: what the previous step stored, like ``x``; needed where ``c_h`` is not 0.
        history: what a still earlier step stored, like ``x``; needed where ``c_g`` is not 0. Plain steps, those of 8 columns,
            have no weight for it and refuse it.
        noise: tensor like ``x``, standard normal (a deterministic solver may pass a third history); or
            ``(seed, sample indices, step)`` for the Philox noise of stream "step" (:func:`advkd.ops.philox_normal`) made inside
            the pass; ``step`` is an int in [0, 2^24), or an int64 tensor of 1 or N elements on ``x``'s device. Needed where
            ``c_z`` is not 0.
        pool: integer r that divides H and W: also return the r x r area average of the next state.
        return_x0: also return what the step stores: x0, or of an extended step s_0 x0 + s_x x + s_m m.
        out: tensor that receives the next state, laid out like ``x``; ``x`` itself for a step in place. With ``pool`` it may
            be a pair, of that and of the tensor for the average.
        x0: tensor that receives what the step stores, laid out like ``x``, in place of a new one; implies ``return_x0``. It may
            be ``previous_x0``, ``history`` or the tensor ``noise`` itself, each element of which is read before it is written,
            and shares no memory with any other tensor.
        check_finite: look for infinities and NaN in the next state within the pass (waits for the device).
        backend: see :func:`advkd.ops.registry.choose`.

    Returns:
        The triple ``(x_next, x0 or None, pooled or None)``, in ``x``'s dtype and layout; ``x0`` is what the step stores.
        Arithmetic is float32 (float64 for float64). ``x_next`` and ``x0`` have ``x``'s shape, ``pooled`` is
        ``(N, C, H / r, W / r)``.

    Raises:
        InputError: shapes, dtypes or devices that differ, coefficients of the wrong length, a tensor that the coefficients need
            and that is missing, a ``history`` that they do not weigh, sizes that ``pool`` does not divide, flags that are none,
            an ``out`` or ``x0`` that does not fit or that shares memory with what is read in another order, or with
            ``check_finite`` a next state that is not finite.
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
    read = {"model_output": model_output, "previous_x0": previous_x0, "history": history, "noise": noise}
    written = {"out": given, "x0": x0}
    _check_tensors(x, read, written)
    table = _table(coefficients, x, read, indices is not None)
    if not (given is average is x0 is None or torch.compiler.is_compiling()):
        read |= {"x": x, "coefficients": coefficients, "noise's indices": indices, "noise's step": steps}
        _check_results(x, written, average, read)
    pool = pool if pool is None else whole("pool", pool, 1)
    if pool is not None and (x.ndim != 4 or x.shape[-1] % pool or x.shape[-2] % pool):
        raise InputError(f"pool must divide the height and width of (N, C, H, W), got {pool} for {tuple(x.shape)}")
    registry.refuse_order_0("sampler_step", x, model_output, table, previous_x0, history, noise, given, x0, average)
    layout, marked = memory_format(x), (given, x0, average)
    x_next = torch.empty_like(x, memory_format=layout) if given is None else given
    x0, pooled, flags = _outputs(x, pool, return_x0, check_finite, x0, average)
    x, model_output, previous_x0, history, noise = _laid_out(layout, x, model_output, previous_x0, history, noise)
    drawn = (indices, seed, step, steps)
    OP(x, model_output, table, previous_x0, history, noise, *drawn, pool or 0, backend, x_next, x0, pooled, flags)
    for tensor in marked:
        if tensor is not None:
            _mark_written(tensor)
    if check_finite and has_values(flags):
        _refuse_infinite(flags)
    return x_next, x0, pooled


def sampler_step_reference(
    x: torch.Tensor,
    m: torch.Tensor,
    table: torch.Tensor,
    previous_x0: torch.Tensor | None,
    history: torch.Tensor | None,
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
    columns = table.to(arithmetic).reshape(*table.shape, *[1] * (x.ndim - 1)).unbind(1)
    (k_x, k_m, clip, c_0, c_x, c_m, c_h, c_z), extended = columns[:8], columns[8:]
    state, m = x.to(arithmetic), m.to(arithmetic)
    clean = torch.minimum(torch.maximum(k_x * state + k_m * m, -clip), clip)
    x_next = c_0 * clean + c_x * state + c_m * m
    if previous_x0 is not None:
        x_next = x_next + c_h * previous_x0.to(arithmetic)
    stored = clean
    if extended:
        c_g, s_0, s_x, s_m = extended
        stored = s_0 * clean + s_x * state + s_m * m
        if history is not None:
            x_next = x_next + c_g * history.to(arithmetic)
    if indices is not None:
        noise = philox.normal_reference(indices, seed, x.shape[1:], STREAMS["step"], step if steps is None else steps)
    if noise is not None:
        x_next = x_next + c_z * noise.to(arithmetic)
    out.copy_(x_next)
    if x0 is not None:
        x0.copy_(stored)
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


def _check_tensors(x, read, written):
    for name, tensor in {**read, **written}.items():
        if tensor is None and name != "model_output":
            continue
        require_dense(name, tensor)
        mixed = name == "model_output" and tensor.dtype in DTYPES and x.dtype in DTYPES
        if tensor.shape != x.shape or tensor.device != x.device or (tensor.dtype != x.dtype and not mixed):
            found, expected = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (tensor, x))
            raise InputError(f"{name} is {found}, expected {expected} as x")
    for name, tensor in written.items():
        if tensor is not None:
            require_writable(name, tensor)


_HISTORIES = ("previous_x0", "history", "noise")
_IN_PLACE = {"out": ("x", "model_output", *_HISTORIES), "x0": _HISTORIES}
"""A result -> the arguments that it may itself be: an element of them is read before it is written."""


def _check_results(x, written, average, read):
    """Refuse a result that is not laid out like ``x``, or overlaps another tensor without being one that it may be."""
    tensors = {name: t for name, t in {**read, **written}.items() if isinstance(t, torch.Tensor)}
    addresses = has_memory(x)
    if average is not None and addresses:
        _check_average(average, tensors)
    for name, result in written.items():
        if result is None:
            continue
        if not result.is_contiguous(memory_format=memory_format(x)):
            raise InputError(f"{name} must be laid out like x ({memory_format(x)}), got strides {result.stride()}")
        for other_name, other in tensors.items() if addresses else ():
            check = require_no_partial_overlap if other_name in (name, *_IN_PLACE[name]) else require_apart
            check(name, result, other_name, other)


def _check_average(average, tensors):
    """Refuse a tensor for the average that overlaps another one: it is written while they are read."""
    for name, tensor in tensors.items():
        if overlap(average, tensor):
            raise InputError(f"out's second tensor overlaps {'the first' if name == 'out' else name}")


def _table(coefficients, x, read, drawn):
    """The rows for the kernels, checked: one, or one per sample."""
    given = {name: read[name] is not None or (name == "noise" and drawn) for name in _HISTORIES}
    if isinstance(coefficients, torch.Tensor):
        rows = _table_given(coefficients, x)
        if given["history"] and rows.shape[1] == len(COEFFICIENTS):
            raise InputError(f"history needs coefficients with 12 columns: those of {tuple(coefficients.shape)} have no c_g")
        return rows
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
        for name, weight in (("previous_x0", step.c_h), ("history", step.c_g), ("noise", step.c_z)):
            if weight != 0 and not given[name]:
                raise InputError(f"{name} is needed: its coefficient is {weight}")
    if given["history"] and steps and not any(step.extended for step in steps):
        raise InputError("history must be None: the step is a plain one, whose c_g is 0")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not single or torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return coefficient_table(steps, x.device, dtype)
    return coefficients.row(x.device, dtype)


def _table_given(coefficients, x):
    """The rows of a table that was given, checked."""
    require_dense("coefficients", coefficients)
    rows = coefficients.reshape(1, -1) if coefficients.ndim == 1 else coefficients
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    widths = (len(COEFFICIENTS), len(EXTENDED_COEFFICIENTS))
    if rows.ndim != 2 or rows.shape[1] not in widths or rows.shape[0] not in (1, x.shape[0]):
        shapes = f"shape (8,), (1, 8) or ({len(x)}, 8) for {len(x)} samples, or 12 instead of 8"
        raise InputError(f"coefficients must have {shapes}, got {tuple(coefficients.shape)}")
    if rows.dtype != wanted or rows.device != x.device:
        raise InputError(f"coefficients must be {wanted} on {x.device}, got {rows.dtype} on {rows.device}")
    return rows.contiguous()


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


def _outputs(x, pool, return_x0, check_finite, x0, average):
    """Memory for what is stored and for the pooled state, if not given, and one zero flag per sample; None where not wanted."""
    if return_x0 and x0 is None:
        x0 = torch.empty_like(x, memory_format=memory_format(x))
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
    "sampler_step(Tensor x, Tensor model_output, Tensor coefficients, Tensor? previous_x0, Tensor? history, Tensor? noise, "
    "Tensor? indices, int seed, int step, Tensor? steps, int pool, Tensor(a!) out, Tensor(b!)? x0, Tensor(c!)? pooled, "
    "Tensor(d!)? flags) -> ()",
    reference=sampler_step_reference,
    backends=("cpu", "triton", "cuda"),
)
