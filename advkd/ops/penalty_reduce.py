"""From a critic's input gradient to the penalty and the tangent's start in one reduction: step 3 of the tangent pass."""

import torch

from ..errors import InputError
from . import registry
from .arguments import finite
from .declaration import declare
from .layout import arithmetic_dtype, dense, in_memory_order, require_out, require_samples

MODES = ("two-sided", "one-sided", "r1")
"""(|g| - target)^2, its part above the target, |g|^2 / 2."""


def penalty_reduce(
    g: torch.Tensor,
    *,
    target: float = 1.0,
    weight: float = 10.0,
    mode: str = "two-sided",
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient penalty of each sample, and its derivative by g.

    two-sided: P_i = weight / N (|g_i| - target)^2, v_i = 2 weight / N (|g_i| - target) g_i / |g_i| (0 where |g_i| = 0);
    one-sided: the same with max(|g_i| - target, 0); r1: P_i = weight / (2 N) |g_i|^2, v_i = weight / N g_i.

    Args:
        g: ``(N, ...)`` gradient of a critic's score by its input, float32, bfloat16 or float16 (float64: reference only),
            contiguous or channels_last (another layout is copied to a contiguous one).
        target: the norm without a penalty; unused by r1.
        weight: lambda, the factor of the whole penalty.
        mode: one of :data:`MODES`: ``two-sided``, ``one-sided`` or ``r1``.
        out: tensor that receives v, like ``g``; may be ``g`` itself.
        backend: see :func:`advkd.ops.registry.choose`.

    Returns:
        The pair ``(penalties, v)``. ``penalties`` is ``(N,)`` in the arithmetic's dtype (float32; float64 for float64); its sum
        is the penalty of Gulrajani et al. 2017, eq. 3 (Mescheder et al. 2018, eq. 9 for r1). ``v`` is like ``g``.

    Raises:
        InputError: an unknown mode, an ``out`` that does not fit, or a target or weight that is no finite number or a tensor by
            which a derivative is wanted.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.
        RuntimeError: a gradient is asked for, or a tangent in forward mode comes in. Order of differentiability 0.

    Examples:
        >>> penalties, v = penalty_reduce(torch.tensor([[3.0, 4.0]]), weight=1.0)
        >>> penalties, v
        (tensor([16.]), tensor([[4.8000, 6.4000]]))
    """
    require_samples("g", g)
    if not isinstance(mode, str) or mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    target, weight = finite("target", target), finite("weight", weight)
    registry.require_known(backend)
    registry.refuse_order_0("penalty_reduce", g, out)
    g = dense(g)
    if out is None:
        out = torch.empty_like(g)
    else:
        require_out(out, "g", g)
    penalties = torch.empty(g.shape[:1], dtype=arithmetic_dtype(g), device=g.device)
    OP(g, target, weight, MODES.index(mode), backend, out, penalties)
    return penalties, out


def penalty_reduce_reference(
    g: torch.Tensor, target: float, weight: float, mode: int, out: torch.Tensor, penalties: torch.Tensor
) -> None:
    """The specification of :func:`penalty_reduce`: writes ``out`` and ``penalties``; ``mode`` indexes :data:`MODES`."""
    values = in_memory_order(g).to(penalties.dtype)
    share = weight / g.shape[0]
    if mode == MODES.index("r1"):
        penalties.copy_(share / 2 * values.square().sum(1))
        in_memory_order(out).copy_(share * values)
        return
    norm = torch.linalg.vector_norm(values, dim=1)
    excess = norm - target
    if mode == MODES.index("one-sided"):
        excess = excess.clamp(min=0)
    penalties.copy_(share * excess.square())
    factor = torch.where(norm == 0, 0, 2 * share * excess / norm)
    in_memory_order(out).copy_(factor[:, None] * values)


def _without_elements(g, target, weight, mode, out, penalties):
    """Samples without elements have penalties, too."""
    if len(g):
        penalty_reduce_reference(g, target, weight, mode, out, penalties)


OP = declare(
    "penalty_reduce(Tensor g, float target, float weight, int kind, Tensor(a!) out, Tensor(b!) penalties) -> ()",
    reference=penalty_reduce_reference,
    backends=("cpu", "triton", "cuda"),
    empty=_without_elements,
)
