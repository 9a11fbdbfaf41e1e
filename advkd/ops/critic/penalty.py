"""The gradient penalty that keeps a critic 1-Lipschitz (Gulrajani et al. 2017, eq. 3), without a second autograd pass.

The gradient by the parameters is found by a tangent pass (:mod:`advkd.ops.critic.passes`): with g_i the score's gradient by
sample i and v_i = dP/dg_i, dP/dW of a layer is its weight gradient with input u, the tangent of v, and output gradient d.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from ...errors import InputError
from ...runtime.devices import AUTOCAST, without_autocast
from .. import registry
from ..arguments import finite, flag, real, require_dense
from ..layout import arithmetic_dtype
from ..order import once
from ..penalty_reduce import MODES, penalty_reduce
from .layers import Plan
from .maps import layer_options, layer_weights
from .passes import Passes
from .trace import plan_of, unwrapped


def gradient_penalty(
    critic: Callable[..., torch.Tensor],
    x_hat: torch.Tensor,
    *,
    condition: torch.Tensor | None = None,
    target: float = 1.0,
    weight: float = 10.0,
    mode: str = "two-sided",
    backend: str = "auto",
    check_finite: bool | None = None,
) -> torch.Tensor:
    """Gradient penalty of a critic, weight mean_i (|grad_x D(x_hat_i)| - target)^2, differentiable once in its parameters.

    Args:
        critic: a module ``critic(x)`` or ``critic(x, condition)`` -> one score (or map of scores, which are added up) per
            sample, made of Conv2d, Linear, LeakyReLU or ReLU, Flatten and other reshaping, average pooling, nearest
            up-sampling, sums of branches and concatenation of channels. Inside DataParallel, DistributedDataParallel,
            ``torch.compile`` or AveragedModel the critic itself is taken, and computes on ``x_hat``'s device alone. With
            ``backend="autograd"`` any callable that does not couple samples.
        x_hat: ``(N, C, H, W)`` points between real and generated samples, or the real ones for ``r1``: float32, bfloat16,
            float16 or float64, contiguous or channels_last. No gradient flows into them.
        condition: second argument of a conditional critic, ``(N, ...)``; no gradient flows into it.
        target: the norm that is not penalised (unused by r1).
        weight: lambda, the factor of the whole penalty.
        mode: ``two-sided``; ``one-sided``: weight mean max(|g| - target, 0)^2; ``r1``: weight / 2 mean |g|^2 (Mescheder et al.
            2018, eq. 9).
        backend: ``autograd``: double backward, for any critic; else that of the kernels, see
            :func:`advkd.ops.registry.choose`.
        check_finite: look for infinities and NaN; None: on CPU tensors, where it costs nothing (it waits for a GPU).

    Returns:
        A scalar in the arithmetic's dtype (float32, float64 for float64; ``autograd``: what autograd gives). Its gradients by
        the parameters are exact; those of biases are zero. Order of differentiability 1: differentiating its gradients raises
        (``autograd``: no limit). Under ``torch.autocast`` the passes take the autocast dtype.

    Raises:
        InputError: a layer that is not piecewise linear or couples samples, parameters that are sharded, tensors that do not
            fit, a negative target or weight, or numbers that are not finite; the layer or argument is named.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.
        RuntimeError: a gradient of the penalty's gradients is asked for (not with ``autograd``).

    Examples:
        >>> critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        >>> gradient_penalty(critic, torch.ones(4, 1, 8, 8)).backward()
        >>> critic[1].weight.grad.shape
        torch.Size([1, 64])
    """
    _check(critic, x_hat, condition, mode)
    check_numbers(target=target, weight=weight)
    target, weight = float(target), float(weight)
    check_finite = check_finite if check_finite is None else flag("check_finite", check_finite)
    if not (isinstance(backend, str) and backend == "autograd"):
        registry.require_known(backend)
    named = {"x_hat": x_hat, "condition": condition}
    if backend == "autograd":
        penalty = _by_autograd(critic, x_hat, condition, target, weight, mode)
        require_finite(check_finite, penalty.detach() + x_hat.detach().sum(dtype=arithmetic_dtype(x_hat)), named, critic)
        return penalty
    module = unwrapped(critic)
    if not torch.compiler.is_compiling():
        if not torch.is_inference_mode_enabled():
            _require_recordable(module)
        registry.choose("gradient_penalty", backend, x_hat.device)
    plan = plan_of(module, condition is not None)
    weights = layer_weights(plan, module)
    check_weights(plan, weights, x_hat, passes_dtype(x_hat) != x_hat.dtype)
    numbers, tensors = _numbered(weights)
    settings = (plan, layer_options(plan, module), numbers, target, weight, mode, backend)
    condition = condition if condition is None else condition.detach()
    penalty, score = _Penalty.apply(settings, x_hat.detach(), condition, *tensors)
    # The penalty depends on the points through signs alone; the scores show what is not finite.
    require_finite(check_finite, penalty.detach() + score, named, module)
    return penalty


def _by_autograd(critic, x_hat, condition, target, weight, mode):
    """:func:`gradient_penalty_reference` in every grad mode: it takes a gradient even where the penalty needs none."""
    _require_recordable(critic)
    if torch.is_grad_enabled():
        return gradient_penalty_reference(critic, x_hat, condition, target, weight, mode)
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad():
        if condition is not None and condition.is_inference():
            condition = condition.clone()
        return gradient_penalty_reference(critic, x_hat, condition, target, weight, mode).detach()


def _require_recordable(critic):
    """Refuse parameters that autograd cannot keep for a backward pass."""
    if torch.compiler.is_compiling() or not isinstance(critic, torch.nn.Module):
        return
    for name, parameter in critic.named_parameters():
        if parameter.is_inference():
            raise InputError(f"critic: its parameter {name} was made in inference mode; make the critic outside of that mode")


def gradient_penalty_reference(
    critic: Callable[..., torch.Tensor],
    x_hat: torch.Tensor,
    condition: torch.Tensor | None,
    target: float,
    weight: float,
    mode: str,
) -> torch.Tensor:
    """The specification of :func:`gradient_penalty`."""
    # An inference tensor cannot require a gradient, a copy of it can.
    x_hat = (x_hat.clone() if x_hat.is_inference() else x_hat.detach()).requires_grad_()
    scores = critic(x_hat) if condition is None else critic(x_hat, condition)
    (gradient,) = torch.autograd.grad(scores.sum(), x_hat, create_graph=True)
    gradient = gradient.flatten(1)
    if mode == "r1":
        return weight / 2 * gradient.square().sum(dim=1).mean()
    excess = gradient.norm(dim=1) - target
    return weight * (excess.clamp(min=0) if mode == "one-sided" else excess).square().mean()


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, x_hat, condition, *tensors):
        plan, options, numbers, target, weight, mode, backend = settings
        dtype = passes_dtype(x_hat)
        trained = _trained(numbers, ctx.needs_input_grad[3:])
        with without_autocast(x_hat):
            passes = Passes(plan, options, _gathered(numbers, tensors, dtype), trained, backend)
            condition = condition if condition is None else condition.to(dtype)
            scores = passes.forward(x_hat.to(dtype), condition, keep=False)
            g = passes.backward(torch.ones_like(scores)).contiguous(memory_format=passes.formats[0])
            # Wide from here to the incoming gradient, which may be a loss scale that a narrow v would not survive.
            g = g.to(arithmetic_dtype(g))
            penalties, v = penalty_reduce(g, target=target, weight=weight, mode=mode, backend=backend)
        ctx.settings, ctx.trained, ctx.shapes, ctx.dtype = settings, trained, (passes.shapes, passes.formats), dtype
        ctx.counts = len(tensors), len(plan.layers)
        ctx.save_for_backward(v, *tensors, *passes.masks, *passes.gradients)
        score = scores.sum(dtype=penalties.dtype)
        ctx.mark_non_differentiable(score)
        return penalties.sum(), score

    @staticmethod
    def backward(ctx, gradient, _):
        plan, options, numbers, *_, backend = ctx.settings
        count, layers = ctx.counts
        v, *saved = ctx.saved_tensors
        tensors = saved[:count]
        results = [None] * count
        with torch.no_grad(), without_autocast(v):
            passes = Passes(plan, options, _gathered(numbers, tensors, ctx.dtype), ctx.trained, backend)
            passes.shapes, passes.formats = ctx.shapes
            passes.masks, passes.gradients = list(saved[count : count + layers]), list(saved[count + layers :])

            def accumulate(i, u):
                found = passes.weight_gradient(i, u, passes.gradients[i])
                passes.gradients[i] = None
                number = numbers[i][0]
                found = found.to(tensors[number].dtype)
                results[number] = found if results[number] is None else results[number] + found

            del saved
            passes.tangent((v * gradient).to(ctx.dtype), accumulate)
            for k, tensor in enumerate(tensors):
                if results[k] is None and ctx.needs_input_grad[3 + k]:
                    results[k] = torch.zeros_like(tensor)
        return (None, None, None, *once("gradient_penalty", tuple(results), gradient, *tensors))


def passes_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the passes: autocast's where that is on (it leaves float64 alone), else ``x``'s."""
    kind = x.device.type
    if kind not in AUTOCAST or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def _numbered(weights):
    """The numbers of each layer's weight and bias in a list of the distinct tensors, and that list."""
    tensors, numbers = [], []
    for pair in weights:
        row = []
        for tensor in pair:
            place = next((k for k, t in enumerate(tensors) if t is tensor), None)
            if tensor is not None and place is None:
                place = len(tensors)
                tensors.append(tensor)
            row.append(place)
        numbers.append(tuple(row))
    return tuple(numbers), tensors


def _trained(numbers, needed):
    """True for each layer's weight that is trained, and False for its bias: the penalty's gradients by biases are zero."""
    return [(weight is not None and needed[weight], False) for weight, _ in numbers]


def _gathered(numbers, tensors, dtype):
    return [tuple(None if k is None else tensors[k].detach().to(dtype) for k in pair) for pair in numbers]


def check_weights(plan: Plan, weights: Sequence[tuple], x: torch.Tensor, cast: bool) -> None:
    """Refuse weights that are not on ``x``'s device, or not in its dtype unless the passes ``cast`` both."""
    for layer, pair in zip(plan.layers, weights):
        for tensor in pair:
            if tensor is not None and (tensor.device != x.device or (tensor.dtype != x.dtype and not cast)):
                found = f"{tensor.dtype} on {tensor.device}"
                raise InputError(f"{layer.name} has weights of {found}, the samples are {x.dtype} on {x.device}")


def require_finite(wish: bool | None, result: torch.Tensor, named: Mapping[str, torch.Tensor | None], critic: Callable) -> None:
    """Name the tensor that is not finite where ``result`` is not; ``wish`` None: on the CPU, outside compiled code."""
    if wish is None:
        wish = result.device.type == "cpu" and not torch.compiler.is_compiling()
    if not wish or bool(torch.isfinite(result)):
        return
    own = critic.named_parameters() if isinstance(critic, torch.nn.Module) else ()
    for name, tensor in (*named.items(), *((f"the critic's parameter {name}", p) for name, p in own)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise InputError(f"{name} holds numbers that are not finite")


def check_numbers(**numbers: float) -> None:
    """Refuse a target or weight that is negative or not finite."""
    for name, value in numbers.items():
        if not real(name, value) >= 0:
            raise InputError(f"{name} must be a number of at least 0, got {value!r}")
        finite(name, value)


def _check(critic, x_hat, condition, mode):
    if not callable(critic):
        raise InputError(f"critic must be a module or a function, got {type(critic).__name__}")
    require_dense("x_hat", x_hat)
    if x_hat.ndim != 4 or not x_hat.is_floating_point():
        raise InputError(f"x_hat must be a floating-point tensor (N, C, H, W), got {x_hat.dtype} {tuple(x_hat.shape)}")
    if x_hat.shape[0] == 0:
        raise InputError("x_hat holds no samples")
    check_condition(condition, x_hat)
    if not isinstance(mode, str) or mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def check_condition(condition: torch.Tensor | None, x: torch.Tensor) -> None:
    """Refuse a condition without ``x``'s samples and device."""
    if condition is None:
        return
    require_dense("condition", condition)
    if condition.shape[:1] != x.shape[:1] or condition.device != x.device:
        found = f"{tuple(condition.shape)} on {condition.device}"
        raise InputError(f"condition must be ({x.shape[0]}, ...) on {x.device}, one row per sample, got {found}")
    if condition.is_complex():
        raise InputError(f"condition must hold real numbers, got {condition.dtype}")


registry.implement("gradient_penalty", "cpu", "triton", "cuda")
