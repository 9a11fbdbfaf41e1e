"""Calls of what is built on the ops: engines, schedulers, samplers, latents and data, with random arguments."""

import copy
import functools
import itertools
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from advkd.data.images import load_images
from advkd.diffusion import renoising, schedulers
from advkd.models.fused_student import FusedStudent
from advkd.models.shape import StudentConfig
from advkd.models.student import Student
from advkd.ops import StepCoefficients, latents, philox_normal, sampler_step, student_forward

from . import call_oracles
from .call_ops import UNIT, Call, backend_for, narrow, plain_number
from .draw import DTYPES

CONFIGS = (
    StudentConfig(8, 1, channels=(4, 5, 8, 8), latent_size=2),
    StudentConfig(16, 3, channels=(12, 8, 9, 8, 4, 6), latent_size=1),
    StudentConfig(16, 2, channels=(8, 4, 8, 8, 16, 4), latent_size=1, detail_noise=True),
)
ENGINES = (("cpu", torch.float32), ("cpu", torch.bfloat16), *(("reference", dtype) for dtype in DTYPES))


@functools.cache
def students():
    """Students whose statistics are those of what they see."""
    found = []
    for i, config in enumerate(CONFIGS):
        torch.manual_seed(i)
        student = Student(config).train()
        with torch.no_grad():
            for seed in range(3):
                student(student.latents(8, seed))
        found.append(student.eval())
    return found


@functools.cache
def exact(i):
    """Student ``i`` in float64."""
    return students()[i].fuse("reference", torch.float64)


@functools.cache
def engine(i, backend, dtype):
    """Student ``i`` fused."""
    return students()[i].fuse(backend, dtype, tune=False)


RANGE = 2.0
"""Width of the images' range, [-1, 1]."""
CLOSE = 1e-4 * RANGE
"""How far from those in float64 images of float32 may be."""
NOISE = RANGE * 10 ** (-35 / 20)
"""The root of the mean square by which images of halves may be off: 35 dB."""
OWN = 5
"""How many times further off than plain code of its dtype an engine of halves may be."""


def in_plain(i, z, dtype=torch.float64):
    """Images of student ``i`` by code of its own."""
    return call_oracles.images_of(students()[i], z, dtype).tanh()


@functools.cache
def _usual_error(i, dtype):
    """The largest error of plain code in a dtype for latents as they are drawn."""
    z = torch.randn(64, exact(i).latent_numel, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    return float((in_plain(i, z, dtype).double() - in_plain(i, z.double())).abs().max())


def _usual(z):
    """Rows of latents that are finite, and near those that a student is made for; images of others may be anything."""
    return (z.abs() < 20).all(1)[:, None, None, None]


def _image_bound(i, z, dtype, right, alike):
    """Images in float32 are off by a part of their range, those of halves by a few times what plain code is."""
    bound = torch.full((len(z), 1, 1, 1), CLOSE)
    if narrow(dtype) and len(z):
        own = (alike.double() - right).abs().nan_to_num().amax((1, 2, 3), keepdim=True)
        bound = OWN * own.clamp(min=_usual_error(i, dtype))
    return [torch.where(_usual(z), bound, math.nan).expand(right.shape)]


def _noisy(dtype, z, right, found, alike):
    """The fault of images of halves whose mean square is off by more than documented, or than plain code's, or None."""
    rows = (z.abs() < 6).all(1)
    if not narrow(dtype) or not rows.any():
        return None
    off, own = ((images.double() - right)[rows].square().mean().sqrt() for images in (found, alike))
    allowed = min(NOISE, OWN * float(own) + narrow(dtype))
    return None if off <= allowed else f"images are off by {off:.3g} in the mean square, allowed {allowed:.3g}"


def fused_student(draw):
    i, (backend, dtype) = draw.randrange(len(CONFIGS)), draw.choice(ENGINES)
    made = engine(i, backend, dtype)
    z = draw.tensor((draw.choice((0, 1, 1, 2, 5)), made.latent_numel), draw.choice((torch.float32, torch.float32, *DTYPES)))
    return Call(
        "FusedStudent", lambda z: made(z), {"z": z}, differentiable=("z",), options={"engine": made}, **_images(i, dtype)
    )


def _images(i, dtype):
    """The judge of images of an argument ``z``."""
    return {
        "oracle": lambda wide: in_plain(i, wide["z"].double()),
        "same": lambda arguments: in_plain(i, arguments["z"], dtype),
        "bound": lambda wide, wanted, same: _image_bound(i, wide["z"], dtype, wanted[0], same[0]),
        "check": lambda found, wide, wanted, same: _noisy(dtype, wide["z"], wanted[0], found[0], same[0]),
    }


def forward_of_student(draw):
    i, dtype = draw.randrange(len(CONFIGS)), draw.choice((torch.float32, torch.bfloat16, torch.float16))
    made = exact(i)
    count = range(len(made.layers))
    arguments = {
        "z": draw.tensor((draw.choice((0, 1, 2, 3)), made.latent_numel)),
        "weights": [made._weight(k).float() for k in count],
        "biases": [made._bias(k).float() for k in count],
        "layers": list(made.layers),
        "slope": 0.2,
        "dtype": dtype,
        "backend": backend_for(draw, cpu=dtype != torch.float16),
    }
    call = Call(
        "student_forward",
        student_forward,
        arguments,
        oracle=lambda wide: _layers(wide, torch.float64),
        same=lambda arguments: _layers(arguments, arguments["dtype"]),
        bound=_forward_bound,
        differentiable=("z",),
        fits=(("z", "weights", "biases", "layers", "dtype", "backend"),),
    )
    return call.spoil("backend", arguments["backend"] == "cpu" and dtype == torch.float16)


def _layers(arguments, dtype, before=False):
    """Images of arguments of student_forward, or what is before tanh."""
    tanh = torch.Tensor.clone if before else torch.tanh
    return tanh(call_oracles.images_of_layers(arguments, dtype))


def _forward_bound(wide, wanted, same):
    """Numbers before tanh are rounded, which a slope of 1 or more lets grow."""
    before = _layers(wide, torch.float64, before=True).abs().amax((1, 2, 3), keepdim=True).clamp(min=1)
    bound = CLOSE * before
    if narrow(same[0].dtype) and len(before):
        own = (same[0].double() - wanted[0]).abs().nan_to_num().amax((1, 2, 3), keepdim=True)
        bound = OWN * own.clamp(min=4 * narrow(same[0].dtype)) * before.sqrt()
    return [torch.where(_usual(wide["z"]), bound, math.nan).expand(wanted[0].shape)]


def latents_of_student(draw):
    i = draw.randrange(len(CONFIGS))
    model = draw.choice((students()[i], exact(i)))
    arguments = {"n": draw.choice((0, 1, 3)), "seed": draw.choice((0, 2**63, 2**64 - 1)), "start": draw.choice((0, 7, 2**40))}
    if isinstance(model, Student):
        arguments["device"] = draw.choice((None, "cpu", torch.device("cpu")))

    def wanted(arguments):
        indices = torch.arange(arguments["start"], arguments["start"] + arguments["n"], dtype=torch.int64, device="cpu")
        return philox_normal(arguments["seed"], indices, (model.latent_numel,), stream="z")

    return Call("latents", model.latents, arguments, oracle=wanted, same=wanted, order=None)


def sample_of_student(draw):
    i, (backend, dtype) = draw.randrange(len(CONFIGS)), draw.choice(ENGINES)
    made = draw.choice((students()[i], engine(i, backend, dtype)))
    dtype = getattr(made, "dtype", torch.float32)
    arguments = {"n": draw.choice((0, 1, 3, 5)), "seed": draw.choice((0, 3)), "batch_size": draw.choice((1, 2, 64)), "start": 0}

    # A student that is not fused computes as torch's autocast has it.
    options = {"autocast": 1000} if isinstance(made, Student) else {"engine": made}
    return Call("sample", made.sample, arguments, order=None, options=options, fits=_COUNTS, **_samples(i, dtype))


_COUNTS = (("n", "batch_size", "start"),)


def _samples(i, dtype):
    """The judge of images of a seed."""
    plain = lambda given, kind: in_plain(i, _latents(i, given), kind)  # noqa: E731
    return {
        "oracle": lambda wide: plain(wide, torch.float64),
        "same": lambda given: plain(given, dtype).float(),
        "bound": lambda wide, wanted, same: _image_bound(i, _latents(i, wide), dtype, wanted[0], same[0]),
        "check": lambda found, wide, wanted, same: _noisy(dtype, _latents(i, wide), wanted[0], found[0], same[0]),
    }


def _latents(i, given):
    indices = torch.arange(given["start"], given["start"] + given["n"], dtype=torch.int64, device="cpu")
    return philox_normal(given["seed"], indices, (exact(i).latent_numel,), stream="z", backend="reference")


def stream_of_student(draw):
    i = draw.randrange(len(CONFIGS))
    made, dtype = engine(i, "cpu", torch.float32), draw.choice((torch.float32, torch.uint8))
    arguments = {"n": draw.choice((0, 1, 3)), "seed": 1, "batch_size": draw.choice((1, 2, 64)), "start": 0, "dtype": dtype}
    # A few batches: a stream may be as long as it likes.
    function = lambda **given: list(itertools.islice(made.stream(**given), 4))  # noqa: E731
    step = 1 if dtype == torch.uint8 else CLOSE
    return Call(
        "stream",
        function,
        arguments,
        oracle=lambda wide: _parts(i, wide),
        same=lambda given: _parts(i, given),
        bound=lambda wide, wanted, same: [torch.full(w.shape, step, dtype=torch.float64) for w in wanted],
        order=None,
        fits=_COUNTS,
    )


def _parts(i, given):
    """A stream's first four batches."""
    size = int(given["batch_size"])
    shown = in_plain(i, _latents(i, {**given, "n": min(int(given["n"]), 4 * size)}).double())
    if given["dtype"] == torch.uint8:
        shown = ((shown + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [part.to(given["dtype"]) for part in shown.split(size)] if len(shown) else []


def save_and_load(draw):
    i, (backend, dtype) = draw.randrange(len(CONFIGS)), draw.choice(ENGINES)
    made = engine(i, backend, dtype)
    z = draw.tensor((2, made.latent_numel), finite=True)
    folder, wish = draw.folder(), draw.choice((backend, "auto"))

    def function(z, folder, device, backend):
        made.save_pretrained(folder)
        return FusedStudent.from_pretrained(folder, device, backend)(z)

    arguments = {"z": z, "folder": folder, "device": draw.choice(("cpu", torch.device("cpu"))), "backend": wish}
    return Call(
        "save_pretrained",
        function,
        arguments,
        order=None,
        fits=(("device", "backend"),),
        **_images(i, dtype),
    )


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
