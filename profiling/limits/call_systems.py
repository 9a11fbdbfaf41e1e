"""Calls of what is built on the ops: schedulers, samplers, latents and data, with random arguments."""

import copy
import functools
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from advkd.data.images import load_images
from advkd.diffusion import renoising, schedulers
from advkd.ops import StepCoefficients, latents, philox_normal, sampler_step

from . import call_oracles
from .call import UNIT, Call, plain_number
from .draw import DTYPES


def project(draw):
    size, channels = draw.choice((4, 8, 16, 32)), draw.randint(1, 3)
    detail = draw.chance(0.4)
    dtype = draw.choice((torch.float32, torch.float32, torch.float64))
    arguments = {
        "x_T": draw.tensor((draw.choice((0, 1, 2)), channels, size, size), dtype),
        "latent_size": 1 if detail else draw.randint(1, size // 4),
        "detail_noise": detail,
    }

    # An orthonormal map: a number is a sum of as many terms as a block has, or of the levels' fours.
    def bound(wide, wanted, same):
        narrow = max(UNIT, torch.finfo(same[0].dtype).eps / 2)
        return [(64 * narrow * _largest(wide["x_T"], size)).expand(wanted[0].shape)]

    plain = call_oracles.project
    fits = (("x_T", "latent_size", "detail_noise"),)
    return Call("project", latents.project, arguments, plain, plain, bound, None, ("x_T",), fits=fits)


def _largest(x, size):
    return x.abs().nan_to_num(0, 0, 0).amax((1, 2, 3))[:, None] * size + 1e-30 if len(x) else x.new_zeros((0, 1))


def sample_again(draw):
    """The samplers that add noise again, with a denoiser that is a linear function."""
    function, gain = draw.choice((renoising.sample_dpdm, renoising.sample_consistency)), draw.choice((0.5, 0.9))
    kind, bad = draw.choice((torch.float32, torch.float64, torch.bfloat16)), ([1.0, 1.0], [], [1.0, -1.0], [math.nan])
    arguments = {
        "denoiser": lambda x, sigma: (gain * x / (1 + sigma)).to(kind),
        "sigmas": draw.choice(bad if draw.chance(0.05) else ([5.0, 1.0, 0.5], [2.0], (80.0, 3.0))),
        "shape": (draw.choice((0, 1, 2)), 1, 4, draw.choice((0, 1, 4))),
        "seed": draw.choice((0, 2**64 - 1)),
        "start": draw.choice((0, 9)),
        "device": draw.choice(("cpu", torch.device("cpu"))),
    }
    if function is renoising.sample_consistency:
        arguments["sigma_min"] = draw.choice((0.002, 0.0))

    def wanted(arguments):
        sigmas, low = arguments["sigmas"], arguments.get("sigma_min", 0.0)
        indices = torch.arange(arguments["start"], arguments["start"] + arguments["shape"][0], dtype=torch.int64, device="cpu")

        def normal(stream, step):
            shape = arguments["shape"][1:]
            return philox_normal(arguments["seed"], indices, shape, stream=stream, step=step, backend="reference")

        x = sigmas[0] * normal("x_T", 0).double()
        for k, sigma in enumerate(sigmas[1:], 1):
            x_0 = arguments["denoiser"](x.float(), sigmas[k - 1]).double()
            x = x_0 + math.sqrt(sigma**2 - low**2) * normal("step", k).double()
        return arguments["denoiser"](x.float(), sigmas[-1]).double()

    loose = 2.0**-7 if kind == torch.bfloat16 else 1e-5
    bound = lambda wide, found, same: [loose * (found[0].abs() + 80)]  # noqa: E731
    same = lambda given: wanted(given).float()  # noqa: E731
    groups = (("denoiser", "sigmas", "sigma_min"), ("shape", "start"), ("denoiser", "shape"))
    call = Call(function.__name__, function, arguments, wanted, same, bound, order=None, fits=groups)
    return call.spoil("sigmas", arguments["sigmas"] in bad)


PAIRS = (
    (DDIMScheduler, schedulers.FusedDDIMScheduler),
    (DDPMScheduler, schedulers.FusedDDPMScheduler),
    (EulerDiscreteScheduler, schedulers.FusedEulerDiscreteScheduler),
    (DPMSolverMultistepScheduler, schedulers.FusedDPMSolverMultistepScheduler),
)


def scheduler_step(draw):
    """A step of a schedule, always from the same state and network output, against diffusers' own in float64."""
    theirs, ours = draw.choice(PAIRS)
    config, count, shape = _schedule(draw, theirs), draw.choice((2, 5, 10)), draw.samples()
    dtype = draw.choice((torch.float32, *DTYPES))
    shape = shape if len(shape) > 1 else (*shape, 3)
    first, seed, (model_output, sample) = draw.randrange(count), draw.randrange(100), _state(draw, shape, dtype)
    arguments = {"model_output": model_output, "timestep": None, "sample": sample, "return_dict": draw.chance(0.3)}
    if theirs is DDIMScheduler:
        arguments |= {"eta": draw.choice((0.0, 0.0, 1.0, 0.5)), "use_clipped_model_output": draw.chance(0.2)}
    if theirs is EulerDiscreteScheduler:
        arguments["s_churn"] = draw.choice((0.0, 0.0, 0.0, 0.5))
    # A call's mode does not reach the making of its scheduler.
    step = _Step(_made(theirs, config, count), _made(ours, config, count), seed, arguments)
    known = step.theirs.timesteps
    as_number = draw.chance(0.03 if theirs is EulerDiscreteScheduler else 0.3)
    arguments["timestep"] = int(known[first]) if as_number else known[first]
    call = Call(
        ours.__qualname__,
        lambda **given: step(step.ours, given),
        arguments,
        # Noise is drawn in model_output's dtype: in float64 it would be another.
        oracle=lambda wide: step(step.theirs, arguments if step.is_drawn() else wide),
        same=lambda given: step(step.theirs, given),
        bound=functools.partial(_step_bound, step) if math.prod(shape) else lambda wide, wanted, same: wanted,
        order=None,
        fits=(("model_output", "sample"),),
    )
    # Euler's sigmas are looked up by elements of the schedule alone.
    return call.spoil("timestep", as_number and theirs is EulerDiscreteScheduler)


def _schedule(draw, kind):
    config = {
        "prediction_type": draw.choice(("epsilon", "sample", "v_prediction")),
        "beta_schedule": draw.choice(("linear", "scaled_linear", "squaredcos_cap_v2")),
        "timestep_spacing": draw.choice(("leading", "trailing", "linspace")),
    }
    if kind in (DDIMScheduler, DDPMScheduler):
        config["clip_sample"] = draw.chance(0.5)
    if kind is DPMSolverMultistepScheduler:
        config |= {"solver_order": draw.choice((1, 2)), "solver_type": draw.choice(("midpoint", "heun"))}
    return config


@dataclass
class _Step:
    """A step by diffusers' scheduler and by ours, each time from the beginning of the run."""

    theirs: object
    ours: object
    seed: int
    arguments: dict

    def __call__(self, scheduler, given):
        scheduler, timestep, theirs = copy.deepcopy(scheduler), given["timestep"], scheduler is self.theirs
        scheduler.is_scale_input_called = True
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        given = {name: plain_number(value) for name, value in given.items()}
        if theirs and isinstance(timestep, (torch.Tensor, np.ndarray)):
            # Ours takes a number of any dtype.
            given["timestep"] = scheduler.timesteps.new_tensor(timestep.item())
        found = scheduler.step(**given, generator=generator)
        return found if isinstance(found, tuple) else tuple(found.values())

    def is_drawn(self):
        return type(self.theirs) is DDPMScheduler or bool(self.arguments.get("eta")) or bool(self.arguments.get("s_churn"))


def _step_bound(step, wide, wanted, same):
    """The errors that 1 / sqrt(alpha_bar) and 1 / alpha magnify, in both sides' arithmetic."""
    scheduler, states = step.theirs, [step.arguments[name] for name in ("sample", "model_output")]
    sigmas = getattr(scheduler, "sigmas", None)
    alpha_bar = float(scheduler.alphas_cumprod[int(step.arguments["timestep"])])
    gain = (float(sigmas.max()) if sigmas is not None else 0) + 1 / math.sqrt(max(alpha_bar, 1e-9))
    size = 4 + sum(wide[name].abs().max() for name in ("sample", "model_output") if wide[name].numel())
    loose = 64 * max(UNIT, *(torch.finfo(t.dtype).eps / 2 for t in (*same, *states) if t.is_floating_point()))
    bounds = [torch.full(w.shape, float(loose * gain * size)) for w in wanted]
    # Halves may overflow in one order of operations and not in the other.
    return [torch.where(w.isfinite(), b, math.nan) for w, b in zip(wanted, bounds)] if step.is_drawn() else bounds


def _state(draw, shape, dtype):
    other = draw.choice((dtype, dtype, draw.choice(DTYPES)))
    return draw.tensor(shape, dtype, finite=True), draw.tensor(shape, other, finite=True)


def _made(kind, config, count):
    scheduler = kind(**config)
    scheduler.set_timesteps(count)
    return scheduler


def images(draw):
    """The digits, or something else in the place of a folder."""
    arguments = {"source": "digits", "size": draw.choice((8, None, 16, 11)), "channels": draw.choice((1, None, 3))}
    plain = lambda given: call_oracles.digits(given["size"] or 32, given["channels"] or 1)  # noqa: E731
    bound = lambda wide, wanted, same: [torch.full(wanted[0].shape, 1e-5)]  # noqa: E731
    # Messages name the command line's option.
    return Call("load_images", load_images, arguments, plain, plain, bound, order=None, options={"option": "--data"})


@torch.no_grad()
def in_place(draw):
    """A sampling loop in place over a state that other tensors are views of."""
    x = draw.kept_layout(draw.values((2, 3, 4, 4), finite=True))
    step = StepCoefficients(1.0, -0.5, 0.5, c_x=0.25)

    def function(x):
        kept, m = x.clone(), x.clone().mul_(0.5)
        for _ in range(3):
            sampler_step(x, m, step, out=x)
        found = x.clone()
        x.copy_(kept)
        return found

    def wanted(arguments):
        x, m = arguments["x"].clone(), arguments["x"] * 0.5
        for _ in range(3):
            x = 0.5 * (x - 0.5 * m) + 0.25 * x
        return x

    bound = lambda wide, found, same: [64 * UNIT * (wide["x"].abs() + 1e-30)]  # noqa: E731
    return Call("sampler_step in a loop", function, {"x": x}, wanted, wanted, bound, options={"whole": True})


warnings.filterwarnings("ignore", message=".*runs diffusers' own code")
