"""Batch norm, LeakyReLU and nearest up-sampling of a training step, in one pass over the statistics and one over the values.

y = LeakyReLU(gamma (x - mean) / sqrt(var + eps) + beta), every pixel repeated 2 x 2 with ``upsample``. With d the gradient by
the value before LeakyReLU (that of four pixels added up first) and x' = (x - mean) / sqrt(var + eps):
dbeta = sum d, dgamma = sum d x', dx = gamma / sqrt(var + eps) (d - dbeta / n - x' dgamma / n), without the last two terms
where the statistics are the running ones (Ioffe & Szegedy 2015, section 3). The backward pass keeps x and the statistics of
the channels, and has the weights; nothing else.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..errors import InputError
from ..runtime.devices import without_autocast
from . import registry
from .arguments import finite, flag
from .declaration import declare
from .layout import arithmetic_dtype, dense, has_memory, memory_format, overlap, require_floating
from .order import once


def norm_act(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *,
    slope: float = 0.01,
    upsample: bool = False,
    training: bool = True,
    eps: float = 1e-5,
    momentum: float = 0.1,
    synchronize: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Batch norm over (N, H, W), LeakyReLU, and nearest up-sampling by 2 where asked.

    Args:
        x: ``(N, C, H, W)``, float32, bfloat16 or float16 (float64: reference only), contiguous or channels_last (another layout
            is copied to a contiguous one).
        gamma: ``(C,)`` scale of the normalised values, float32, bfloat16, float16 or float64.
        beta: ``(C,)`` shift, any of these dtypes.
        running_mean: ``(C,)`` mean that training moves by ``momentum`` in place and that is used where ``training`` is False;
            None, together with ``running_var``: not kept.
        running_var: ``(C,)`` variance, moved and used likewise (training puts in the unbiased one).
        slope: of LeakyReLU, 0 for ReLU.
        upsample: repeat every pixel of the result 2 x 2.
        training: use the batch's statistics; False: the running ones.
        eps: added to the variance.
        momentum: weight of the batch in the running statistics; 1 / k for batch k makes them averages over the batches.
        synchronize: statistics of all processes' batches together (``torch.distributed`` must be initialised); the processes
            may hold different numbers of samples.
        backend: see :func:`advkd.ops.registry.choose`.

    Returns:
        ``(N, C, H, W)`` or ``(N, C, 2 H, 2 W)`` in ``x``'s dtype and layout. Statistics and arithmetic are float32 (float64 for
        float64). Order of differentiability 1, in ``x``, ``gamma`` and ``beta``: differentiating its gradients raises.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, a batch of one value per channel in training, no statistics where
            they are used, only one of the two, no momentum, statistics that require a gradient or, in training, share memory
            with another tensor; numbers that are not finite or tensors by which a derivative is wanted, a negative ``eps``,
            flags that are none, or ``synchronize`` without a process group.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.
        RuntimeError: a tangent in forward mode comes in, or a gradient of the gradients is asked for.

    Examples:
        >>> y = norm_act(torch.randn(8, 16, 4, 4), torch.ones(16), torch.zeros(16), None, None, slope=0.2, upsample=True)
        >>> y.shape
        torch.Size([8, 16, 8, 8])
    """
    upsample, training, synchronize = flag("upsample", upsample), flag("training", training), flag("synchronize", synchronize)
    _check(x, gamma, beta, running_mean, running_var, training, synchronize)
    if momentum is None:
        raise InputError("momentum must be a number, got None: for averages over the batches give 1 / k for batch k")
    # torch.compile must see them here first: inside an autograd function they would belong to its graph.
    eps, slope, momentum = finite("eps", eps), finite("slope", slope), finite("momentum", momentum)
    if eps < 0:
        raise InputError(f"eps must be at least 0, got {eps}")
    registry.require_known(backend)
    registry.refuse_forward_mode("norm_act", x, gamma, beta, running_mean, running_var)
    x = dense(x)
    with torch.no_grad():
        if training:
            statistics, count = _batch_statistics(x, synchronize, backend)
            if running_mean is not None:
                _move(running_mean, running_var, statistics, count, momentum)
        else:
            statistics, count = _weights(running_mean, running_var, x), None
    if not torch.is_grad_enabled():
        return _normalize(x, _weights(gamma, beta, x), statistics, eps, slope, upsample, backend)
    return _NormAct.apply(x, gamma, beta, statistics, count, eps, slope, upsample, synchronize and training, backend)


def _normalize(x, weights, statistics, eps, slope, upsample, backend):
    shape = (*x.shape[:2], *(2 * side if upsample else side for side in x.shape[2:]))
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    NORMALIZE(x, weights, statistics, eps, slope, upsample, backend, out)
    return out


class _NormAct(torch.autograd.Function):
    """``count``: values of a channel in the statistics, None where those are the running ones."""

    @staticmethod
    def forward(ctx, x, gamma, beta, statistics, count, eps, slope, upsample, synchronize, backend):
        ctx.save_for_backward(x, gamma, beta, statistics)
        ctx.options, ctx.count, ctx.synchronize = (eps, slope, upsample, backend), count, synchronize
        return _normalize(x, _weights(gamma, beta, x), statistics, eps, slope, upsample, backend)

    @staticmethod
    def backward(ctx, gradient):
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(ctx, gradient, *saved)
        return (*once("norm_act", gradients, gradient, *saved[:3]), *[None] * 7)


def _gradients(ctx, gradient, x, gamma, beta, statistics):
    """dx, dgamma and dbeta, None where they are not needed."""
    eps, slope, upsample, backend = ctx.options
    gradient = gradient.contiguous(memory_format=memory_format(x))
    given = (x, _weights(gamma, beta, x), statistics)
    needs_dx, needs_dgamma, needs_dbeta = ctx.needs_input_grad[:3]
    dx = torch.empty_like(x) if needs_dx else None
    sums, masked = torch.zeros_like(statistics), False
    if ctx.count is not None or needs_dgamma or needs_dbeta:
        # The sum of four pixels' gradients is needed twice: kept in the later dx, where its dtype loses nothing.
        masked = needs_dx and upsample and x.dtype == statistics.dtype
        kept = dx if masked else None
        SUMS(gradient, *given, eps, slope, upsample, backend, kept, sums)
    if needs_dx:
        gradient, means = dx if masked else gradient, _means(sums, ctx.count, ctx.synchronize)
        BACKWARD(gradient, *given, means, eps, slope, upsample, masked, backend, dx)
    return dx, sums[1].to(gamma.dtype) if needs_dgamma else None, sums[0].to(beta.dtype) if needs_dbeta else None


def moments(x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """``(2, C)`` mean and biased variance over (N, H, W), in the arithmetic's dtype. Order of differentiability 0."""
    statistics = torch.empty((2, x.shape[1]), dtype=arithmetic_dtype(x), device=x.device)
    MOMENTS(x, backend, statistics)
    return statistics


def moments_reference(x: torch.Tensor, statistics: torch.Tensor) -> None:
    """The specification of :func:`moments`: writes ``statistics``."""
    variance, mean = torch.var_mean(x.to(statistics.dtype), dim=(0, 2, 3), correction=0)
    statistics.copy_(torch.stack((mean, variance)))


def norm_act_reference(
    x: torch.Tensor,
    weights: torch.Tensor,
    statistics: torch.Tensor,
    eps: float,
    slope: float,
    upsample: bool,
    out: torch.Tensor,
) -> None:
    """The specification of the forward pass: writes ``out``; ``weights`` are ``(2, C)``, gamma and beta."""
    _, before = _before(x, weights, statistics, eps)
    y = F.leaky_relu(before, slope)
    out.copy_(F.interpolate(y, scale_factor=2, mode="nearest") if upsample else y)


def norm_act_sums_reference(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    statistics: torch.Tensor,
    eps: float,
    slope: float,
    upsample: bool,
    kept: torch.Tensor | None,
    sums: torch.Tensor,
) -> None:
    """The specification of the backward pass' sums: writes ``sums``, dbeta and dgamma, and d into ``kept`` if that is given.

    ``kept`` has ``x``'s dtype.
    """
    d, normalized = _masked(gradient, x, weights, statistics, eps, slope, upsample)
    sums.copy_(torch.stack((d.sum((0, 2, 3)), (d * normalized).sum((0, 2, 3)))))
    if kept is not None:
        kept.copy_(d)


def norm_act_backward_reference(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    statistics: torch.Tensor,
    means: torch.Tensor,
    eps: float,
    slope: float,
    upsample: bool,
    masked: bool,
    dx: torch.Tensor,
) -> None:
    """The specification of the backward pass' second half: writes ``dx``.

    ``means``: ``(2, C)``, the sums divided by their global count, zero for running statistics. ``masked``: ``gradient`` is the
    d that :func:`norm_act_sums_reference` kept, of ``x``'s shape (it may be ``dx`` itself), else the incoming gradient.
    """
    normalized, _ = _before(x, weights, statistics, eps)
    if masked:
        d = gradient.to(statistics.dtype)
    else:
        d, _ = _masked(gradient, x, weights, statistics, eps, slope, upsample)
    mean_d, mean_dx = (m[:, None, None] for m in means)
    scale = (weights[0] * torch.rsqrt(statistics[1] + eps))[:, None, None]
    dx.copy_(scale * (d - mean_d - normalized * mean_dx))


def _before(x, weights, statistics, eps):
    """The normalised values, and those before LeakyReLU."""
    mean, variance = (s[:, None, None] for s in statistics)
    normalized = (x.to(statistics.dtype) - mean) * torch.rsqrt(variance + eps)
    return normalized, weights[0][:, None, None] * normalized + weights[1][:, None, None]


def _masked(gradient, x, weights, statistics, eps, slope, upsample):
    """d, the gradient by the values before LeakyReLU, and the normalised values."""
    normalized, before = _before(x, weights, statistics, eps)
    d = gradient.to(statistics.dtype)
    if upsample:
        d = 4 * F.avg_pool2d(d, 2)
    return torch.where(before > 0, d, slope * d), normalized


def _weights(gamma, beta, x):
    # Autocast has no stack of float64 numbers.
    with without_autocast(x):
        return torch.stack((gamma, beta)).to(arithmetic_dtype(x))


def _batch_statistics(x, synchronize, backend):
    """Statistics of the batch, or of all processes' batches together, and their number of values per channel."""
    statistics, count = moments(x, backend), x.numel() // x.shape[1]
    if not synchronize:
        return statistics, count
    mine = torch.cat((statistics.flatten().double(), statistics.new_tensor([count], dtype=torch.float64)))
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    everyone = torch.stack(everyone)
    counts = everyone[:, -1]
    means, variances = everyone[:, :-1].reshape(len(everyone), 2, -1).unbind(1)
    shares = (counts / counts.sum())[:, None]
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)
    return torch.stack((mean, variance)).to(statistics.dtype), counts.sum()


def _move(running_mean, running_var, statistics, count, momentum):
    mean, variance = statistics
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)


def _means(sums, count, synchronize):
    """The sums by their count, over all processes where asked; zero for running statistics."""
    if count is None:
        return torch.zeros_like(sums)
    if synchronize:
        sums = sums.clone()
        dist.all_reduce(sums)
    return (sums / count).to(sums.dtype)


def _check(x, gamma, beta, running_mean, running_var, training, synchronize):
    require_floating("x", x)
    if x.ndim != 4:
        raise InputError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    if (running_mean is None) != (running_var is None):
        raise InputError("running_mean and running_var must both be given, or neither")
    named = {"gamma": gamma, "beta": beta}
    if running_mean is not None:
        named |= {"running_mean": running_mean, "running_var": running_var}
    for name, tensor in named.items():
        require_floating(name, tensor)
        if tensor.shape != x.shape[1:2] or tensor.device != x.device:
            found = f"{tuple(tensor.shape)} on {tensor.device}"
            raise InputError(f"{name} must have shape ({x.shape[1]},) on {x.device}, one number per channel, got {found}")
        if name.startswith("running") and tensor.requires_grad and torch.is_grad_enabled():
            raise InputError(f"{name} must not require a gradient, for none flows into statistics; give its detach()")
    if training and running_mean is not None and has_memory(x):
        _check_apart({"x": x, **named})
    if not training and running_mean is None:
        raise InputError("running_mean and running_var are needed where training is False")
    if synchronize and not (dist.is_available() and dist.is_initialized()):
        raise InputError("synchronize needs an initialised process group (torch.distributed.init_process_group)")
    if training and not synchronize and x.numel() // max(x.shape[1], 1) < 2:
        raise InputError(f"x must hold at least two values per channel in training, got {tuple(x.shape)}")


def _check_apart(named):
    """Refuse running statistics, which are written before the rest is read, that share memory with another tensor."""
    others = dict(named)
    for name in ("running_mean", "running_var"):
        written = others.pop(name)
        for other, tensor in others.items():
            if overlap(written, tensor):
                raise InputError(f"{name} overlaps {other}, which is read after it is written; give it memory of its own")


def _declared(schema, reference, empty=None):
    return declare(schema, reference=reference, backends=("cpu", "triton", "cuda"), group="norm_act", empty=empty)


MOMENTS = _declared("norm_act_moments(Tensor x, Tensor(a!) statistics) -> ()", moments_reference, empty=moments_reference)
NORMALIZE = _declared(
    "norm_act(Tensor x, Tensor weights, Tensor statistics, float eps, float slope, bool upsample, Tensor(a!) out) -> ()",
    norm_act_reference,
)
SUMS = _declared(
    "norm_act_sums(Tensor gradient, Tensor x, Tensor weights, Tensor statistics, float eps, float slope, bool upsample, "
    "Tensor(a!)? kept, Tensor(b!) sums) -> ()",
    norm_act_sums_reference,
)
BACKWARD = _declared(
    "norm_act_backward(Tensor gradient, Tensor x, Tensor weights, Tensor statistics, Tensor means, float eps, float slope, "
    "bool upsample, bool masked, Tensor(a!) dx) -> ()",
    norm_act_backward_reference,
)
