"""Ways to differentiate a call, and torch's transforms: a derivative is the reference's, or it is refused."""

import contextlib
import copy

import torch
import torch.autograd.forward_ad as forward_ad

from .call import Wrong, flat, mapped
from .call_ops import norm_act_reference


def _chosen(call, draw):
    """Name of a floating-point argument that may be differentiated."""
    return draw.choice(choices(call))


def choices(call):
    return [name for name in call.differentiable if _differentiable(call.arguments.get(name))]


def _differentiable(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_inference() and value.is_leaf


def _summed(call, name):
    """The sum of the squares of a call's results, as a function of one argument."""

    def function(value):
        results = flat(call.function(**{**call.arguments, name: value}))
        return sum(t.double().square().sum() for t in results if t.is_floating_point())

    return function


def with_gradient(call, draw):
    """A gradient through backward(): right, or refused."""
    if call.name == "gradient_penalty":
        return _penalty_gradient(call)
    name = _chosen(call, draw)
    leaf = call.arguments[name].detach().clone().requires_grad_()
    found = call.function(**{**call.arguments, name: leaf})
    if call.name in ("FusedStudent",):
        if any(t.requires_grad for t in flat(found)):
            raise Wrong("an engine's images require a gradient")
        return found
    if call.order == 0:
        # An op without written arguments raises when its gradient is asked for.
        flat(found)[0].sum().backward()
        raise Wrong(f"a gradient by {name} is not refused")
    if call.order == 1:
        _norm_act_gradient(call, name, leaf, found)
    return mapped(torch.Tensor.detach, found)


def _norm_act_gradient(call, name, leaf, found):
    """The gradient is the reference's in float64, and has no gradient itself."""
    gradient = torch.ones_like(found)
    (ours,) = torch.autograd.grad(found, leaf, gradient, create_graph=True)
    _once(ours, leaf)
    wide = {k: mapped(lambda t: t.detach().double() if t.is_floating_point() else t, v) for k, v in call.arguments.items()}
    wide[name] = leaf.detach().double().requires_grad_()
    with torch.enable_grad():
        (wanted,) = torch.autograd.grad(norm_act_reference(wide).sum(), wide[name])
        narrow = {**call.arguments, name: leaf.detach().clone().requires_grad_()}
        (same,) = torch.autograd.grad(norm_act_reference(narrow).sum(), narrow[name])
    finite = wanted.isfinite() & same.isfinite()
    error, allowed = (ours.double() - wanted).abs(), (same.double() - wanted).abs()
    # A value whose sign hangs on rounding moves the sums by itself: then the reference's own error is as large.
    scale = wanted.abs().max() if wanted.numel() else 0
    loose = 8 * allowed[finite].max() + 1e-3 * scale + 1e-4 if finite.any() else 0
    if ours.dtype != leaf.dtype or (error[finite] > loose + torch.finfo(ours.dtype).eps * scale).any():
        raise Wrong(f"the gradient by {name} is off by {error[finite].max()}, allowed {loose}")


def _penalty_gradient(call):
    critic = call.arguments["critic"]
    parameters = list(critic.parameters())
    found = call.function(**call.arguments)
    ours = torch.autograd.grad(found, parameters, create_graph=True, allow_unused=True)
    _once(sum(g.sum() for g in ours if g is not None), parameters[0])
    wide = {k: mapped(lambda t: t.double() if t.is_floating_point() else t, v) for k, v in call.arguments.items()}
    wide |= {"critic": copy.deepcopy(critic).double(), "backend": "autograd"}
    wanted = torch.autograd.grad(call.function(**wide), list(wide["critic"].parameters()), allow_unused=True)
    size = max((float(g.abs().nan_to_num().max()) for g in wanted if g is not None), default=0.0)
    for one, other in zip(ours, wanted, strict=True):
        other = torch.zeros_like(one) if other is None else other
        if not ((one.double() - other).abs() <= 1e-3 * size + 1e-5).all() and other.isfinite().all():
            raise Wrong(f"a gradient of the penalty is off by {(one.double() - other).abs().max()} of {size}")
    return found.detach()


def _once(gradient, leaf):
    if not gradient.requires_grad:
        return
    try:
        torch.autograd.grad(gradient.sum(), leaf, allow_unused=True)
    except RuntimeError as error:
        if "differentiable once" in str(error):
            return
        raise
    raise Wrong("a gradient's gradient is not refused")


def grad_transform(call, draw):
    """torch.func.grad and vjp see no gradient that is not there."""
    name = _chosen(call, draw)
    call.function(**call.arguments)
    torch.func.grad(_summed(call, name))(call.arguments[name])
    return _refused_or(call, name)


def jvp_transform(call, draw):
    name = _chosen(call, draw)
    call.function(**call.arguments)
    value = call.arguments[name].clone(memory_format=torch.contiguous_format)
    torch.func.jvp(_summed(call, name), (value,), (torch.ones_like(value),))
    return _refused_or(call, name)


def forward_mode(call, draw):
    name = _chosen(call, draw)
    call.function(**call.arguments)
    value = call.arguments[name].detach().clone(memory_format=torch.contiguous_format)
    with draw.choice((contextlib.nullcontext, torch.no_grad))(), forward_ad.dual_level():
        call.function(**{**call.arguments, name: forward_ad.make_dual(value, torch.ones_like(value))})
    return _refused_or(call, name)


def _refused_or(call, name):
    if call.order is not None and call.name != "FusedStudent":
        raise Wrong(f"a derivative by {name} is not refused")
    return call.function(**call.arguments)


def vectorized(call, draw):
    """torch.func.vmap over one argument gives what a loop gives."""
    name = _chosen(call, draw)
    value = call.arguments[name]
    wanted = call.function(**call.arguments)
    function = lambda one: flat(call.function(**{**call.arguments, name: one}))  # noqa: E731
    found = torch.func.vmap(function)(torch.stack([value, value]))
    pairs = zip(found, flat(wanted), strict=True)
    if not all(torch.allclose(one[1], other, 1e-4, 1e-4, equal_nan=True) for one, other in pairs):
        raise Wrong("vmap gives other numbers than a loop")
    return wanted
