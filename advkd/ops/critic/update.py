"""A critic's whole update in one pass over [real; generated; interpolated] samples, without a second autograd pass.

One forward and one backward-data pass over the concatenated batch give the loss' output gradients and the penalty's input
gradient g; one tangent pass over the penalised samples follows, and one weight gradient per layer serves loss and penalty: its
rows are (a_{l-1}, d_l) for real and generated samples and (u_{l-1}, d_l) for the penalised ones
(:mod:`advkd.ops.critic.passes`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ...errors import InputError
from ...runtime.devices import without_autocast
from .. import registry
from ..interpolate import interpolate
from ..layout import arithmetic_dtype, require_floating
from ..penalty_reduce import MODES, penalty_reduce
from .layers import ADVICE, IMAGE
from .maps import layer_options, layer_weights
from .passes import Passes
from .penalty import check_condition, check_numbers, check_weights, gradient_penalty, passes_dtype, require_finite
from .trace import plan_of, unwrapped

LOSSES = ("wasserstein", "softplus")
"""mean D(fake) - mean D(real); mean softplus(D(fake)) + mean softplus(-D(real)) (Goodfellow et al. 2014, non-saturating)."""


class CriticGradients(NamedTuple):
    """Results of one update of a critic.

    Attributes:
        gradients: of loss + penalty (times ``loss_scale``) by ``critic.parameters()``, in that order and in their dtypes; None
            for frozen ones.
        loss: scalar, the adversarial loss without the penalty, not scaled.
        penalty: scalar, not scaled; 0 where its weight is 0.
        real_scores: the critic's scores of the real samples, ``(N,)`` or as it returns them, without a graph.
        fake_scores: the critic's scores of the generated samples, likewise.
    """

    gradients: tuple
    loss: torch.Tensor
    penalty: torch.Tensor
    real_scores: torch.Tensor
    fake_scores: torch.Tensor


def critic_gradients(
    critic: torch.nn.Module,
    real: torch.Tensor,
    fake: torch.Tensor,
    *,
    a: torch.Tensor | tuple | None = None,
    condition: torch.Tensor | None = None,
    loss: str = "wasserstein",
    mode: str = "two-sided",
    target: float = 1.0,
    weight: float = 10.0,
    loss_scale: float | torch.Tensor = 1.0,
    backend: str = "auto",
    check_finite: bool | None = None,
) -> CriticGradients:
    """Gradients of a critic's loss and gradient penalty.

    Pure: nothing is accumulated, and ``torch.compile`` and CUDA graphs take it whole.

    Args:
        critic: as in :func:`advkd.ops.gradient_penalty`; its weights must be its own parameters.
        real: ``(N, C, H, W)`` real samples, float32, bfloat16, float16 or float64. No gradient flows into them.
        fake: ``(N, C, H, W)`` generated samples of ``real``'s shape, dtype and device. No gradient flows into them.
        a: ``(N,)`` float32 (float64 for float64) weights of the real samples in x_hat = a real + (1 - a) fake, or ``(seed,
            sample indices, step)`` for Philox ones (:func:`advkd.ops.interpolate`); None: drawn by ``torch.rand``. Unused by
            ``r1``.
        condition: ``(N, ...)`` second argument of a conditional critic, for real, generated and interpolated samples alike.
        loss: ``wasserstein``: mean D(fake) - mean D(real); ``softplus``: mean softplus(D(fake)) + mean softplus(-D(real)).
        mode: of the penalty: ``two-sided``, ``one-sided`` or ``r1``, as in :func:`advkd.ops.gradient_penalty`.
        target: the gradient's norm that is not penalised (unused by r1).
        weight: lambda, the penalty's factor; 0 leaves the penalty out.
        loss_scale: number or scalar tensor that the gradients are multiplied by before they pass a narrow dtype: the scale of a
            ``GradScaler``, 1 / k for gradients that are accumulated over k batches.
        backend: ``autograd``: double backward, for any critic; else that of the kernels, see
            :func:`advkd.ops.registry.choose`.
        check_finite: as in :func:`advkd.ops.gradient_penalty`.

    Returns:
        :class:`CriticGradients`; scalars in the arithmetic's dtype. Order of differentiability 0.

    Raises:
        InputError: as in :func:`advkd.ops.gradient_penalty`; samples that differ, an unknown loss, a weight of the critic that
            is not its own, or ``r1`` with ``softplus`` and a critic that gives several scores per sample.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.

    Examples:
        >>> critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        >>> update = critic_gradients(critic, torch.ones(4, 1, 8, 8), torch.zeros(4, 1, 8, 8))
        >>> [gradient.shape for gradient in update.gradients]
        [torch.Size([1, 64]), torch.Size([1])]
    """
    if not isinstance(critic, torch.nn.Module):
        raise InputError(f"critic must be a torch.nn.Module, got {type(critic).__name__}")
    critic = unwrapped(critic)
    _check(real, fake, condition, loss, mode)
    check_numbers(target=target, weight=weight)
    if a is None and mode != "r1":
        a = torch.rand(real.shape[0], device=real.device, dtype=torch.float64 if real.dtype == torch.float64 else torch.float32)
    options = (a, condition, loss, mode, target, weight, loss_scale, backend)
    if backend == "autograd":
        update = _by_autograd(critic, real.detach(), fake.detach(), *options)
    else:
        dtype = passes_dtype(real)
        with torch.no_grad(), without_autocast(real):
            update = _by_tangent(critic, real.detach(), fake.detach(), dtype, *options)
    named = {"real": real, "fake": fake, "condition": condition}
    require_finite(check_finite, update.loss + update.penalty, named, critic)
    return update


def critic_gap(backend: str, device: torch.device) -> str | None:
    """The reason why a backend's kernels cannot run a critic's update on a device.

    Args:
        backend: one of :data:`advkd.ops.registry.BACKENDS`.
        device: the samples' device.

    Returns:
        The reason as text, or None.
    """
    return registry.gap("gradient_penalty", backend, device)


def critic_step(
    critic: torch.nn.Module, real: torch.Tensor, fake: torch.Tensor, *, synchronize: bool = True, **options: Any
) -> CriticGradients:
    """Add :func:`critic_gradients` to the parameters' ``.grad``, for ``optimizer.step()`` to follow.

    With several processes the accumulated gradients are averaged in one all-reduce, never through the reducer of a
    ``DistributedDataParallel`` that may be around the critic. Whatever wraps the critic, its own parameters receive the
    gradients.

    Args:
        critic: as in :func:`critic_gradients`.
        real: ``(N, C, H, W)`` real samples.
        fake: ``(N, C, H, W)`` generated samples.
        synchronize: average ``.grad`` over the processes now: once per optimiser step, in the last of the calls that
            accumulate gradients (the others take False; each takes ``loss_scale=1 / k``).
        **options: the other arguments of :func:`critic_gradients`.

    Returns:
        :class:`CriticGradients` of this batch in this process.

    Raises:
        InputError: as in :func:`critic_gradients`.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.

    Examples:
        >>> critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        >>> optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4)
        >>> update = critic_step(critic, torch.ones(4, 1, 8, 8), torch.zeros(4, 1, 8, 8))
        >>> optimizer.step()
    """
    update = critic_gradients(critic, real, fake, **options)
    parameters = list(unwrapped(critic).parameters())
    with torch.no_grad():
        for parameter, gradient in zip(parameters, update.gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
        if synchronize and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            average_gradients([p.grad for p in parameters if p.requires_grad])
    return update


def average_gradients(gradients: Sequence[torch.Tensor]) -> None:
    """Replace tensors by their means over the processes, in place, by one all-reduce per dtype."""
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        group = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, piece in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(piece.view_as(gradient))


def _by_tangent(critic, real, fake, dtype, a, condition, loss, mode, target, weight, loss_scale, backend):
    if not torch.compiler.is_compiling():
        registry.choose("gradient_penalty", backend, real.device)
    plan = plan_of(critic, condition is not None)
    weights = layer_weights(plan, critic)
    check_weights(plan, weights, real, dtype != real.dtype)
    parameters, n = list(critic.parameters()), real.shape[0]
    _require_parameters(plan, weights, [*parameters, *critic.buffers()])
    trained = [tuple(t is not None and t.requires_grad for t in pair) for pair in weights]
    narrow = [tuple(None if t is None else t.to(dtype) for t in pair) for pair in weights]
    passes = Passes(plan, layer_options(plan, critic), narrow, trained, backend)

    # The batch, and which of its rows are penalised: interpolated ones of their own, or for r1 the real ones.
    apart = weight != 0 and mode != "r1"
    batch = interpolate(real, fake, a, merge=True, backend=backend) if apart else torch.cat((real, fake))
    batch, copies = batch.to(dtype), 3 if apart else 2
    condition = condition if condition is None else condition.to(dtype).repeat(copies, *[1] * (condition.ndim - 1))
    rows = (2 * n, 3 * n) if apart else (0, n)

    # One forward pass; the losses, and the gradients that the scores begin with.
    scores = passes.forward(batch, condition, keep=True)
    real_scores, fake_scores = scores[:n], scores[n : 2 * n]
    value, seeds = _seeds(loss, real_scores, fake_scores)
    seeds = (seeds * loss_scale).to(dtype)
    ones = torch.ones_like(real_scores)
    factor = None
    if apart:
        seeds = torch.cat((seeds, ones))
    elif weight != 0:
        # The real rows pass with gradient 1, which the penalty needs; their share of the loss is a factor per sample.
        if real_scores.numel() != n and loss != "wasserstein":
            raise InputError(f"mode r1 with loss {loss} needs a critic with one score per sample: {ADVICE}")
        factor = seeds[:n].flatten(1)[:, 0] if seeds.ndim > 1 else seeds[:n]
        seeds = torch.cat((ones, seeds[n:]))

    # One backward-data pass, down to the image for the penalised rows; its norm, and the tangent's start.
    g = passes.backward(seeds, rows if weight != 0 else (0, 0))
    update = _Update(passes, parameters, weights, n, rows, apart, factor)
    update.biases()
    penalty = torch.zeros((), dtype=value.dtype, device=value.device)
    if weight != 0:
        g = g.contiguous(memory_format=passes.formats[IMAGE])
        g = g.to(arithmetic_dtype(g))
        penalties, v = penalty_reduce(g, target=target, weight=weight, mode=mode, backend=backend)
        penalty = penalties.sum()
        # One tangent pass, and on its way one weight gradient per layer.
        passes.tangent((v * loss_scale).to(dtype), update.weight, rows, update.place)
    update.remaining_layers(weight != 0)
    gradients = [None] * len(parameters)
    for k, parameter in enumerate(parameters):
        if parameter.requires_grad:
            found = update.gradients[k]
            gradients[k] = torch.zeros_like(parameter) if found is None else found.to(parameter.dtype)
    return CriticGradients(tuple(gradients), value, penalty, real_scores, fake_scores)


class _Update:
    """Weight gradients of a merged batch, each from its own rows.

    ``rows`` are penalised. ``apart``: they belong to the penalty alone; else their share of the loss is ``factor`` per sample.
    """

    def __init__(self, passes, parameters, weights, n, rows, apart, factor):
        self.passes, self.n, self.rows, self.apart, self.factor = passes, n, rows, apart, factor
        self.places = [tuple(_place(t, parameters) for t in pair) for pair in weights]
        self.gradients = [None] * len(parameters)

    def place(self, number):
        """The place of an activation's tangent: the penalised rows of the value that the forward pass has left."""
        value = self.passes.values[number]
        return value[self.rows[0] : self.rows[1]] if self.apart and value is not None else None

    def weight(self, i, u):
        """Add layer ``i``'s gradient, with the tangent of its input (None: the tangent does not pass it)."""
        number, d = self.passes.plan.layers[i].inputs[0], self.passes.gradients[i]
        x = self.passes.values[number]
        if self.apart and u is None:
            x, d = x[: 2 * self.n], d[: 2 * self.n]
        elif self.apart:
            place = x[self.rows[0] : self.rows[1]]
            if number == IMAGE or self.passes.plan.layers[number - 2].kind != "activation":
                place.copy_(u)
        elif self.factor is not None:
            scaled = x[: self.n] * _per_sample(self.factor, x)
            x = torch.cat((scaled if u is None else scaled + u, x[self.n :]))
        self._add(self.places[i][0], self.passes.weight_gradient(i, x, d))
        self.passes.gradients[i] = None

    def biases(self):
        """Add the gradients of the biases, which come from the loss alone."""
        for i, (_, bias) in enumerate(self.passes.trained):
            d = self.passes.gradients[i]
            if not bias or d is None:
                continue
            d = d[: 2 * self.n]
            if self.factor is not None:
                d = torch.cat((d[: self.n] * _per_sample(self.factor, d), d[self.n :]))
            dims = [k for k in range(d.ndim) if k != (1 if self.passes.plan.layers[i].kind == "convolution" else d.ndim - 1)]
            self._add(self.places[i][1], d.sum(dims))

    def remaining_layers(self, penalised):
        """Add the layers that the tangent has not reached: those of a condition alone, or all where there is no penalty."""
        for i, layer in enumerate(self.passes.plan.layers):
            if self.passes.trained[i][0] and not (penalised and layer.moved) and self.passes.gradients[i] is not None:
                self.weight(i, None)

    def _add(self, place, gradient):
        known = self.gradients[place]
        self.gradients[place] = gradient if known is None else known + gradient


def _place(tensor, tensors):
    return next((k for k, other in enumerate(tensors) if other is tensor), None)


def _per_sample(factor, like):
    return factor.reshape(-1, *[1] * (like.ndim - 1))


def _seeds(loss, real_scores, fake_scores):
    """The loss, and its gradients by the scores [real; fake]."""
    wide = torch.float64 if real_scores.dtype == torch.float64 else torch.float32
    real_scores, fake_scores, share = real_scores.to(wide), fake_scores.to(wide), 1 / real_scores.numel()
    if loss == "wasserstein":
        seeds = torch.cat((torch.full_like(real_scores, -share), torch.full_like(fake_scores, share)))
        return fake_scores.mean() - real_scores.mean(), seeds
    seeds = torch.cat((-share * torch.sigmoid(-real_scores), share * torch.sigmoid(fake_scores)))
    return F.softplus(fake_scores).mean() + F.softplus(-real_scores).mean(), seeds


def _by_autograd(critic, real, fake, a, condition, loss, mode, target, weight, loss_scale, backend):
    """The specification of :func:`critic_gradients`, for any critic: the loss and the penalty written out."""
    with torch.enable_grad():
        arguments = () if condition is None else (condition,)
        fake_scores, real_scores = critic(fake, *arguments), critic(real, *arguments)
        value = LOSS_FORMULAS[loss](real_scores, fake_scores)
        penalty = torch.zeros_like(value)
        if weight != 0:
            x_hat = real if mode == "r1" else interpolate(real, fake, a, backend="reference")
            penalty = gradient_penalty(
                critic, x_hat, condition=condition, target=target, weight=weight, mode=mode, backend="autograd"
            )
        parameters = [p for p in critic.parameters() if p.requires_grad]
        total = (value + penalty) * loss_scale
        found = iter(torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ())
    gradients = [next(found) if p.requires_grad else None for p in critic.parameters()]
    filled = [torch.zeros_like(p) if g is None and p.requires_grad else g for p, g in zip(critic.parameters(), gradients)]
    return CriticGradients(tuple(filled), value.detach(), penalty.detach(), real_scores.detach(), fake_scores.detach())


LOSS_FORMULAS = {
    "wasserstein": lambda real, fake: fake.mean() - real.mean(),
    "softplus": lambda real, fake: F.softplus(fake).mean() + F.softplus(-real).mean(),
}


def _require_parameters(plan, weights, parameters):
    for layer, pair in zip(plan.layers, weights):
        if any(t is not None and all(t is not p for p in parameters) for t in pair):
            raise InputError(f"{layer.name} has a weight that is no parameter or buffer of the critic: {ADVICE}")


def _check(real, fake, condition, loss, mode):
    for name, tensor in (("real", real), ("fake", fake)):
        require_floating(name, tensor)
        if tensor.ndim != 4:
            raise InputError(f"{name} must have shape (N, C, H, W), got {tuple(tensor.shape)}")
    if real.shape != fake.shape or real.dtype != fake.dtype or real.device != fake.device:
        found, wanted = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (fake, real))
        raise InputError(f"fake must be like real, {wanted}, got {found}")
    if real.shape[0] == 0:
        raise InputError("real holds no samples")
    check_condition(condition, real)
    if loss not in LOSSES:
        raise InputError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
