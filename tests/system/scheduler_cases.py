"""diffusers' schedulers and ours side by side: pairs, rounding bounds of a step and of a run, a network.

A step is compared by :func:`compare`: ours is within the rounding bound of its own pass of the formula, which is diffusers' own
code in float64, and within both sides' bounds of diffusers'.
"""

import copy
import functools
import inspect
import math
import operator
from typing import NamedTuple
from unittest import mock

import numpy
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from advkd.diffusion import fused_step as common
from advkd.diffusion import step_tables
from advkd.diffusion.deis_scheduler import FusedDEISMultistepScheduler
from advkd.diffusion.heun_scheduler import FusedHeunDiscreteScheduler
from advkd.diffusion.schedulers import (
    FusedDDIMScheduler,
    FusedDDPMScheduler,
    FusedDPMSolverMultistepScheduler,
    FusedEulerDiscreteScheduler,
)
from advkd.diffusion.unipc_scheduler import FusedUniPCMultistepScheduler
from advkd.ops import coefficient_table, philox_normal, sampler_step

from ..rounding import UNIT, Rounded

PAIRS = {
    "ddim": (DDIMScheduler, FusedDDIMScheduler),
    "ddpm": (DDPMScheduler, FusedDDPMScheduler),
    "euler": (EulerDiscreteScheduler, FusedEulerDiscreteScheduler),
    "dpmsolver": (DPMSolverMultistepScheduler, FusedDPMSolverMultistepScheduler),
    "heun": (HeunDiscreteScheduler, FusedHeunDiscreteScheduler),
    "unipc": (UniPCMultistepScheduler, FusedUniPCMultistepScheduler),
    "deis": (DEISMultistepScheduler, FusedDEISMultistepScheduler),
}
NAMES = sorted(PAIRS)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
SPACINGS = ["leading", "trailing", "linspace"]
SHAPE = (2, 3, 8, 8)


def pair(name, steps=10, **config):
    """diffusers' scheduler and ours, ready to run."""
    theirs, ours = (kind(**config) for kind in PAIRS[name])
    if steps:
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
    return theirs, ours


def normal(seed, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(x, alpha, sigma, prediction):
    """The output of an almost perfect network for x = alpha x0 + sigma eps for data N(0.3, 0.2), so that x0 is of order 1.

    Element by element and in float64, rounded once.
    """
    alpha, sigma, dtype, x = float(alpha), float(sigma), x.dtype, x.double()
    posterior = 0.3 + alpha * 0.2 / (alpha**2 * 0.2 + sigma**2) * (x - alpha * 0.3) + 0.1 * torch.sin(5 * x)
    eps = (x - alpha * posterior) / sigma
    outputs = {"epsilon": eps, "sample": posterior, "v_prediction": alpha * eps - sigma * posterior}
    return outputs.get(prediction, eps - posterior).to(dtype)


def network_at(scheduler, x, t, prediction):
    a = float(scheduler.alphas_cumprod[int(t)])
    return network(x, math.sqrt(a), math.sqrt(1 - a), prediction)


TABLES = ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas")
"""The tables that diffusers' schedulers keep in float32 and compute their steps from."""

KEPT = {"heun": ("sample", "prev_derivative", "dt"), "unipc": ("last_sample", "this_order")}
"""What diffusers keeps of a step besides ``model_outputs``."""

CONTAINED = {"heun": "prev_derivative", "unipc": "last_sample"}
"""What of it our fused step does not write: the state that it returns contains it."""

NORMALS = 2e-6
"""Largest difference of two backends' normals for one counter."""

FLOAT64 = 2.0**-29
"""A rounding of float64 relative to one of float32."""


def with_tables(theirs, convert):
    """A copy of diffusers' scheduler whose tables, and what it keeps of the steps before, went through ``convert``."""
    scheduler = copy.copy(theirs)
    for name in (*TABLES, "sample", "prev_derivative", "dt", "last_sample"):
        if getattr(theirs, name, None) is not None:
            setattr(scheduler, name, convert(getattr(theirs, name)))
    if hasattr(theirs, "model_outputs"):
        scheduler.model_outputs = [None if m is None else convert(m) for m in theirs.model_outputs]
    return scheduler


# Steps to the image divide by sigma = 0.
@numpy.errstate(divide="ignore", invalid="ignore")
def diffusers_bound(scheduler, output, t, x, **options):
    """Next state and x0 of diffusers' step as :class:`Rounded`: its own code, run on them by a scheduler of such tables."""
    result = scheduler.step(Rounded(output), t, Rounded(x), **options, return_dict=False)
    return result if len(result) > 1 else (*result, scheduler.model_outputs[-1])


def fused_bound(row, x, output, previous_x0, noise, history):
    """Next state and stored output of the fused pass as :class:`Rounded`: products and their sums."""
    row = Rounded.from_float32(row)
    (k_x, k_m, clip, *weights), stored = (row[i] for i in range(8)), [row[i] for i in range(9, len(row))]
    weights += [row[i] for i in range(8, len(row))][:1]

    def combination(coefficients, tensors):
        return functools.reduce(operator.add, (c * t for c, t in zip(coefficients, tensors) if c.value != 0))

    x, output = Rounded(x), Rounded(output)
    x0 = combination((k_x, k_m), (x, output)).clamp(-clip, clip) if k_x.value or k_m.value else Rounded(0.0)
    x_next = combination(weights, (x0, x, output, previous_x0, noise, history))
    return x_next, combination(stored, (x0, x, output)) if stored else x0


def fused_step(ours, output, t, x, **options):
    """Our step's outputs, and next state and x0 of its pass as :class:`Rounded`."""
    passes = []

    def recorded(*arguments, **given):
        passes.append((arguments[-1], given["previous_x0"], given["noise"], given["history"]))
        return sampler_step(*arguments, **given)

    with mock.patch.object(common, "sampler_step", recorded):
        result = ours.step(output, t, x, **options, return_dict=False)
    ((row, previous_x0, noise, history),) = passes
    row = row if isinstance(row, torch.Tensor) else coefficient_table([row])[0]
    if isinstance(noise, tuple):
        seed, indices, position = noise
        noise = Rounded(philox_normal(seed, indices, x.shape[1:], stream="step", step=position))
        noise.error = noise.error + NORMALS
    bounds = fused_bound(row, x, output, previous_x0, noise, history)
    if row.dtype == torch.float64:
        bounds = tuple(Rounded(bound.value, FLOAT64 * bound.error) for bound in bounds)
    return result, bounds


class Compared(NamedTuple):
    """One step of both from the same state and history: outputs, both sides' bounds together, each side as :class:`Rounded`."""

    theirs: tuple
    ours: tuple
    bounds: tuple
    formula: tuple
    fused: tuple
    contained: numpy.ndarray | None
    """Both sides' bounds of what the state contains, where its weight is not 0."""


def kept(scheduler, names=KEPT):
    """The entry of ``names`` for a scheduler's kind, or ()."""
    return next((names[name] for name in names if isinstance(scheduler, PAIRS[name][0])), ())


def noise_ratio(theirs, i):
    """UniPC's weight of the corrected state at position i in the next state."""
    _, noises = theirs._sigma_to_alpha_sigma_t(theirs.sigmas.double())
    return float(noises[i + 1] / noises[i])


def synchronise(theirs, ours, x, follows=True):
    """Give ours what diffusers' keeps; with ``follows``, ``x`` is what the step before returned.

    Returns how far the fused step may then be from diffusers' formula: what ``x`` contains is read from ``x``, which
    diffusers' own rounding took away from it.
    """
    if hasattr(ours, "model_outputs"):
        ours.model_outputs = list(theirs.model_outputs)
    for name in kept(theirs):
        if hasattr(theirs, name):
            setattr(ours, name, getattr(theirs, name))
    if not follows or not kept(theirs, CONTAINED) or getattr(theirs, kept(theirs, CONTAINED)) is None:
        return 0.0
    ours._returned = step_tables.Handed(x)
    wide = with_tables(theirs, torch.Tensor.double)
    if isinstance(theirs, HeunDiscreteScheduler):
        return 0.5 * abs(x.double() - (wide.sample + wide.prev_derivative * wide.dt)).numpy()
    wide._step_index -= 1
    predicted = wide.multistep_uni_p_bh_update(None, sample=wide.last_sample, order=wide.this_order)
    return noise_ratio(theirs, theirs.step_index) * abs(x.double() - predicted).numpy()


def contained_bound(theirs, rounded, error):
    """Bound on the distance of what both sides' states contain, from the error of our state; None if it is not contained."""
    value = getattr(theirs, kept(theirs, CONTAINED) or "", None)
    if value is None:
        return None
    weight = (
        noise_ratio(theirs, theirs.step_index - 1) if isinstance(theirs, UniPCMultistepScheduler) else abs(float(theirs.dt))
    )
    return getattr(rounded, kept(theirs, CONTAINED)).error + error / weight if weight else None


@torch.no_grad()
def compare(theirs, ours, output, t, x, generator=None, follows=True, **options):
    """Step both and compare ours with the formula in float64 and with diffusers', which advances ``generator``."""
    inherited, rounded = synchronise(theirs, ours, x, follows), with_tables(theirs, Rounded)
    formula = diffusers_bound(rounded, output, t, x, **taken(theirs, copied(generator)), **options)
    result, (state, stored) = fused_step(ours, output, t, x, **taken(theirs, copied(generator)), **options)
    expected = theirs.step(output, t, x, **taken(theirs, generator), **options, return_dict=False)
    fused = (Rounded(state.value, state.error + inherited), stored)
    if hasattr(theirs, "model_outputs"):
        result, expected = (*result, ours.model_outputs[-1]), (*expected, theirs.model_outputs[-1])
    bounds = tuple(f.error + o.error for f, o in zip(formula, fused))
    for ours_value, theirs_value, exact, own, both in zip(result, expected, formula, fused, bounds):
        assert ours_value.dtype == theirs_value.dtype and numpy.isfinite(own.error).all()
        assert_within(ours_value, exact.value, own.error)
        assert_within(ours_value, theirs_value, both)
    return Compared(expected, result, bounds, formula, fused, contained_bound(theirs, rounded, state.error))


def taken(scheduler, generator):
    """A generator as an argument of a scheduler's step, if it has one."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def copied(generator):
    """A generator in the same state; a list of them for a list."""
    return [g.clone_state() for g in generator] if isinstance(generator, list) else generator and generator.clone_state()


def assert_within(a, b, bound):
    a, b = (tensor.double().numpy() if isinstance(tensor, torch.Tensor) else tensor for tensor in (a, b))
    assert (abs(a - b) <= bound).all(), f"{(abs(a - b) / bound).max():.3g} times the bound"


def gap(a, b):
    return float((a.double() - b.double()).abs().max())


def follow(theirs, ours, prediction, **arguments):
    """Step both along diffusers' path."""
    x = normal(0)
    for i, t in enumerate(ours.timesteps):
        noise = {"variance_noise": normal(100 + i)} if arguments.get("eta") else {}
        x = compare(theirs, ours, network_at(theirs, x, t, prediction), t, x, **arguments, **noise).theirs[0]


def sigma_states(theirs, i, x, prediction):
    """The network's output for a state at position i of a sigma schedule."""
    sigma = theirs.sigmas[i].double()
    if hasattr(theirs, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = theirs._sigma_to_alpha_sigma_t(sigma)
        return network(x, alpha, sigma, prediction)
    # Euler's state is x0 + sigma eps; the network sees it scaled.
    alpha = float(1 / (sigma**2 + 1) ** 0.5)
    return network(x * alpha, alpha, sigma * alpha, prediction)


def follow_sigmas(theirs, ours, prediction, begin=0, follows=True):
    """As ``follow``, for schedulers that count their steps."""
    x = normal(0) * float(theirs.sigmas[begin] if theirs.init_noise_sigma != 1 else 1)
    for scheduler in (theirs, ours):
        scheduler.set_begin_index(begin)
    for i, t in enumerate(ours.timesteps[begin:], begin):
        for scheduler in (theirs, ours):
            scheduler.scale_model_input(x, t)
        x = compare(theirs, ours, sigma_states(theirs, i, x, prediction), t, x, follows=follows).theirs[0]
        assert (ours.step_index, ours.begin_index) == (theirs.step_index, theirs.begin_index)


def output_at(scheduler, i, x, prediction):
    """The network's output for a state at position i of any scheduler's schedule."""
    if hasattr(scheduler, "sigmas"):
        return sigma_states(scheduler, i, x, prediction)
    return network_at(scheduler, x, scheduler.timesteps[i], prediction)


def run(scheduler, x, prediction="epsilon", begin=0, **arguments):
    """A whole sampling run; returns the last state."""
    if "generator" in arguments:
        arguments |= taken(scheduler, arguments.pop("generator"))
    for i, t in enumerate(scheduler.timesteps[begin:], begin):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output_at(scheduler, i, x, prediction), t, x, **arguments).prev_sample
    return x


@torch.enable_grad()
def run_bound(theirs, ours, x, prediction="epsilon", begin=0, generator=None, **arguments):
    """Bound on the distance between the ends of two runs from one state: each rounding times the derivative of the rest.

    The bound is of first order. A step is rounded as in :func:`compare`, in the next state and in the x0 that is kept for the
    next step, and the network's output once a run. Steps and network work element by element, so one backward pass through
    diffusers' own code in float64, along its float32 path, gives all derivatives.
    """
    roundings, smooth = [], with_tables(theirs, torch.Tensor.double)

    def rounded(value, bound):
        roundings.append((torch.zeros_like(value, requires_grad=True), bound))
        return value + roundings[-1][0]

    x = x.double()
    for i, t in enumerate(theirs.timesteps[begin:], begin):
        for scheduler in (theirs, ours, smooth):
            scheduler.scale_model_input(x, t)
        output = output_at(theirs, i, x, prediction)
        output = rounded(output, 2 * UNIT * abs(output.detach().numpy()))
        following = smooth.step(output, t, x, **taken(smooth, copied(generator)), **arguments, return_dict=False)[0]
        step = compare(theirs, ours, output.float(), t, x.float(), generator, **arguments)
        x = rounded(step.theirs[0] + following - following.detach(), step.bounds[0])
        if hasattr(smooth, "model_outputs"):
            smooth.model_outputs[-1] = rounded(smooth.model_outputs[-1], step.bounds[1])
        if step.contained is not None:
            name = kept(theirs, CONTAINED)
            setattr(smooth, name, rounded(getattr(smooth, name), step.contained))
    zeros, bounds = zip(*roundings)
    derivatives = torch.autograd.grad(x.sum(), zeros, materialize_grads=True)
    return sum(derivative.abs().numpy() * bound for derivative, bound in zip(derivatives, bounds))


def seeded(*seeds):
    """A generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def storage(size, dtype):
    """The rounding of numbers up to ``size`` to a dtype: half an ulp, where it is subnormal half of the smallest number."""
    information = torch.finfo(dtype)
    return information.eps / 2 * numpy.maximum(size, information.smallest_normal)
