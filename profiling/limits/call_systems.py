"""Calls of what is built on the ops: engines, schedulers, samplers, latents, measures and data, with random arguments."""

import copy
import functools
import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from advkd import latents, metrics, samplers, schedulers
from advkd.data import load_images
from advkd.models.fused_student import FusedStudent
from advkd.models.student import Student, StudentConfig
from advkd.ops import StepCoefficients, philox_normal, sampler_step, student_forward

from .call_ops import UNIT, Call, plain_number
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


def _within(dtype):
    """A bound on images in [-1, 1]: 1e-4 of the range in float32; 35 dB, and ten deviations of that, in halves."""
    return 2e-4 if dtype in (torch.float32, torch.float64) else 10 * 2 * 10 ** (-35 / 20)


def _image_bound(z, dtype, wanted):
    """Rows of latents that are not finite, or far from those that a student is made for, may be anything."""
    usual = (z.abs() < 20).all(1)[:, None, None, None]
    return [torch.where(usual, _within(dtype), math.nan).expand(wanted.shape)]


def fused_student(draw):
    i, (backend, dtype) = draw.randrange(len(CONFIGS)), draw.choice(ENGINES)
    made = engine(i, backend, dtype)
    z = draw.tensor((draw.choice((0, 1, 1, 2, 5)), made.latent_numel), draw.choice((torch.float32, torch.float32, *DTYPES)))
    wide = lambda arguments: exact(i)(arguments["z"].double())  # noqa: E731
    return Call(
        "FusedStudent",
        lambda z: made(z),
        {"z": z},
        oracle=wide,
        same=lambda arguments: made(arguments["z"]),
        bound=lambda wide, wanted, same: _image_bound(wide["z"], dtype, wanted[0]),
        differentiable=("z",),
        options={"engine": made},
    )


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
        "backend": draw.choice(("auto", "cpu", "reference", "cuda", "triton")),
    }

    def bound(wide, wanted, same):
        # What is rounded is as large as the numbers before tanh, which a slope of 1 or more lets grow.
        plain = [replace(layer, activation="none") if layer.activation == "tanh" else layer for layer in wide["layers"]]
        before = student_forward(**{**wide, "layers": plain, "dtype": torch.float64, "backend": "reference"})
        usual = _image_bound(wide["z"], dtype, wanted[0])[0]
        return [usual * before.abs().amax((1, 2, 3), keepdim=True).clamp(min=1)]

    return Call(
        "student_forward",
        student_forward,
        arguments,
        oracle=lambda wide: student_forward(**{**wide, "dtype": torch.float64, "backend": "reference"}),
        bound=bound,
        differentiable=("z",),
    )


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

    def wanted(arguments):
        return exact(i)(exact(i).latents(arguments["n"], arguments["seed"], arguments["start"]).double())

    bound = lambda wide, found, same: [torch.full(found[0].shape, _within(dtype))]  # noqa: E731
    # A student that is not fused computes as torch's autocast has it.
    options = {"autocast": 1000} if isinstance(made, Student) else {"engine": made}
    return Call("sample", made.sample, arguments, wanted, made_alone(made), bound, order=None, options=options)


def made_alone(made):
    """Images drawn one at a time, which no batch may change."""
    return lambda arguments: made.sample(**{**arguments, "batch_size": 1})


def stream_of_student(draw):
    i = draw.randrange(len(CONFIGS))
    made, dtype = engine(i, "cpu", torch.float32), draw.choice((torch.float32, torch.uint8))
    arguments = {"n": draw.choice((0, 1, 3)), "seed": 1, "batch_size": draw.choice((1, 2, 64)), "start": 0, "dtype": dtype}
    # A few batches: a stream may be as long as it likes.
    function = lambda **given: list(itertools.islice(made.stream(**given), 4))  # noqa: E731
    parts = lambda arguments: [  # noqa: E731
        next(
            iter(
                made.stream(
                    min(arguments["batch_size"], arguments["n"] - k), arguments["seed"], 64, arguments["start"] + k, dtype
                )
            )
        )
        for k in range(0, min(arguments["n"], 4 * arguments["batch_size"]), arguments["batch_size"])
    ]
    return Call("stream", function, arguments, oracle=parts, same=parts, order=None)


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
        oracle=lambda wide: exact(i)(wide["z"].double()),
        same=lambda arguments: made(arguments["z"]),
        bound=lambda wide, wanted, same: _image_bound(wide["z"], dtype, wanted[0]),
        order=None,
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

    return Call("project", latents.project, arguments, latents_in_plain, latents_in_plain, bound, None, ("x_T",))


def _largest(x, size):
    return x.abs().nan_to_num(0, 0, 0).amax((1, 2, 3))[:, None] * size + 1e-30 if len(x) else x.new_zeros((0, 1))


def latents_in_plain(arguments):
    """The projection, one basis function after the other."""
    x, m = arguments["x_T"], arguments["latent_size"]
    size = x.shape[-1]
    if not arguments["detail_noise"]:
        side = size // 4
        grid = (torch.arange(side, dtype=torch.float64, device="cpu") + 0.5) * math.pi / side
        rows = torch.stack([torch.cos(k * grid) * math.sqrt((1 if k == 0 else 2) / side) for k in range(m)]).to(x)
        blocks = x.reshape(*x.shape[:2], 4, side, 4, side).permute(0, 1, 3, 5, 2, 4)
        found = torch.stack(
            [torch.stack([(blocks * torch.outer(u, v)[:, :, None, None]).sum((2, 3)) for v in rows], 2) for u in rows], 2
        )
        return found.reshape(len(x), channels_of(x) * m * m * 16)
    parts = []
    while x.shape[-1] > 4:
        a, b, c, d = x[..., 0::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2]
        parts.append(torch.cat([(a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2], 1).flatten(1))
        x = (a + b + c + d) / 2
    return torch.cat([x.flatten(1), *parts[::-1]], 1)


def channels_of(x):
    return x.shape[1]


def sample_again(draw):
    """The samplers that add noise again, with a denoiser that is a linear function."""
    function, gain = draw.choice((samplers.sample_dpdm, samplers.sample_consistency)), draw.choice((0.5, 0.9))
    kind = draw.choice((torch.float32, torch.float64, torch.bfloat16))
    arguments = {
        "denoiser": lambda x, sigma: (gain * x / (1 + sigma)).to(kind),
        "sigmas": draw.choice(([5.0, 1.0, 0.5], [2.0], (80.0, 3.0), [1.0, 1.0], [], [1.0, -1.0], [math.nan])),
        "shape": (draw.choice((0, 1, 2)), 1, 4, draw.choice((0, 1, 4))),
        "seed": draw.choice((0, 2**64 - 1)),
        "start": draw.choice((0, 9)),
        "device": draw.choice(("cpu", torch.device("cpu"))),
    }
    if function is samplers.sample_consistency:
        arguments["sigma_min"] = draw.choice((0.002, 0.0))

    def wanted(arguments):
        sigmas, low = arguments["sigmas"], arguments.get("sigma_min", 0.0)
        indices = torch.arange(arguments["start"], arguments["start"] + arguments["shape"][0], dtype=torch.int64, device="cpu")
        normal = (
            lambda stream, step: philox_normal(  # noqa: E731
                arguments["seed"], indices, arguments["shape"][1:], stream=stream, step=step, backend="reference"
            )
        )
        x = sigmas[0] * normal("x_T", 0).double()
        for k, sigma in enumerate(sigmas[1:], 1):
            x_0 = arguments["denoiser"](x.float(), sigmas[k - 1]).double()
            x = x_0 + math.sqrt(sigma**2 - low**2) * normal("step", k).double()
        return arguments["denoiser"](x.float(), sigmas[-1]).double()

    loose = 2.0**-7 if kind == torch.bfloat16 else 1e-5
    bound = lambda wide, found, same: [loose * (found[0].abs() + 80)]  # noqa: E731
    return Call(
        function.__name__, function, arguments, oracle=wanted, same=lambda a: wanted(a).float(), bound=bound, order=None
    )


PAIRS = (
    (DDIMScheduler, schedulers.FusedDDIMScheduler),
    (DDPMScheduler, schedulers.FusedDDPMScheduler),
    (EulerDiscreteScheduler, schedulers.FusedEulerDiscreteScheduler),
    (DPMSolverMultistepScheduler, schedulers.FusedDPMSolverMultistepScheduler),
)


def scheduler_step(draw):
    """A few steps of a schedule, all from one state and one network output, against diffusers' own in float64."""
    theirs, ours = draw.choice(PAIRS)
    config = {
        "prediction_type": draw.choice(("epsilon", "sample", "v_prediction")),
        "beta_schedule": draw.choice(("linear", "scaled_linear", "squaredcos_cap_v2")),
        "timestep_spacing": draw.choice(("leading", "trailing", "linspace")),
    }
    if theirs in (DDIMScheduler, DDPMScheduler):
        config["clip_sample"] = draw.chance(0.5)
    if theirs is DPMSolverMultistepScheduler:
        config |= {"solver_order": draw.choice((1, 2)), "solver_type": draw.choice(("midpoint", "heun"))}
    count, shape, dtype = draw.choice((2, 5, 10)), draw.samples(), draw.choice((torch.float32, *DTYPES))
    shape = shape if len(shape) > 1 else (*shape, 3)
    first, seed, tensors = draw.randrange(count), draw.randrange(100), _state(draw, shape, dtype)
    arguments = {
        "model_output": tensors[0],
        "timestep": None,
        "sample": tensors[1],
        "return_dict": draw.chance(0.3),
    }
    if theirs is DDIMScheduler:
        arguments |= {"eta": draw.choice((0.0, 0.0, 1.0, 0.5)), "use_clipped_model_output": draw.chance(0.2)}
    if theirs is EulerDiscreteScheduler:
        arguments["s_churn"] = draw.choice((0.0, 0.0, 0.0, 0.5))
    # Whatever the modes of a call, its scheduler is made without them.
    made = {kind: _made(kind, config, count) for kind in (theirs, ours)}
    known = made[theirs].timesteps
    arguments["timestep"] = draw.choice((known[first], known[first], int(known[first])))

    def run(kind, given):
        scheduler = copy.deepcopy(made[kind])
        scheduler.is_scale_input_called = True
        generator = torch.Generator(device="cpu").manual_seed(seed)
        timestep, given = given["timestep"], {name: plain_number(value) for name, value in given.items()}
        if kind is theirs and isinstance(timestep, torch.Tensor):
            # Ours takes a number of any dtype.
            given = {**given, "timestep": known.new_tensor(timestep.item())}
        found = scheduler.step(**given, generator=generator)
        return found if isinstance(found, tuple) else tuple(found.values())

    def drawn():
        return theirs is DDPMScheduler or bool(arguments.get("eta")) or bool(arguments.get("s_churn"))

    def bound(wide, wanted, same):
        # The errors that 1 / sqrt(alpha_bar) and 1 / alpha magnify, in both sides' arithmetic.
        scheduler = made[theirs]
        sigmas = scheduler.sigmas if hasattr(scheduler, "sigmas") else None
        alpha_bar = float(scheduler.alphas_cumprod[int(known[first])])
        gain = (float(sigmas.max()) if sigmas is not None else 0) + 1 / math.sqrt(max(alpha_bar, 1e-9))
        size = 4 + sum(wide[name].abs().max() for name in ("sample", "model_output") if wide[name].numel())
        states = [arguments[name] for name in ("sample", "model_output")]
        loose = 64 * max(UNIT, *(torch.finfo(t.dtype).eps / 2 for t in (*same, *states) if t.is_floating_point()))
        bounds = [torch.full(w.shape, float(loose * gain * size)) for w in wanted]
        # Halves may overflow in one order of operations and not in the other.
        return [torch.where(w.isfinite(), b, math.nan) for w, b in zip(wanted, bounds)] if drawn() else bounds

    return Call(
        ours.__qualname__,
        lambda **given: run(ours, given),
        arguments,
        # Noise is drawn in model_output's dtype: in float64 it would be another.
        oracle=lambda wide: run(theirs, arguments if drawn() else wide),
        same=lambda given: run(theirs, given),
        bound=bound if math.prod(shape) else lambda wide, wanted, same: wanted,
        order=None,
    )


def _state(draw, shape, dtype):
    other = draw.choice((dtype, dtype, draw.choice(DTYPES)))
    return draw.tensor(shape, dtype, finite=True), draw.tensor(shape, other, finite=True)


def _made(kind, config, count):
    scheduler = kind(**config)
    scheduler.set_timesteps(count)
    return scheduler


def measure(draw):
    """A distance of features."""
    n, d = draw.randint(4, 9), draw.randint(1, 4)
    dtype = draw.choice(DTYPES)
    sets = [draw.tensor((draw.choice((n, n, n + 2)), d), dtype, finite=draw.chance(0.9)) for _ in range(2)]
    name = draw.choice(tuple(_MEASURES))
    function, oracle, names, options = _MEASURES[name]
    options = {key: draw.choice(values) for key, values in options.items()}
    arguments = {**dict(zip(names, sets)), **options}
    same = None if oracle else (lambda arguments: function(**arguments))
    bound = lambda wide, wanted, same: [1e-5 * (1 + _scale(wide, names)) + 1e-6 * w.abs() for w in wanted]  # noqa: E731
    again = lambda wide, wanted, same: [1e-9 * (1 + _scale(wide, names)) + 0 * w for w in wanted]  # noqa: E731
    return Call(name, function, arguments, oracle or same, oracle or same, bound if oracle else again, order=None)


def _scale(wide, names):
    return max(float(wide[name].abs().max()) for name in names if wide[name].numel()) ** 2


def _plain_distances(arguments):
    a, b = arguments["points"].double(), arguments["others"].double()
    return (a[:, None] - b[None]).square().sum(-1).sqrt()


def _plain_frechet(arguments):
    a, b = arguments["generated"].double(), arguments["reference"].double()
    one, two = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    values = np.linalg.eigvals(one @ two).astype(complex)
    return float((a.mean(0) - b.mean(0)).square().sum() + np.trace(one) + np.trace(two) - 2 * np.sqrt(values).real.sum())


_BOTH = ("generated", "reference")
_SEEDS = {"seed": (0, 3)}
_MEASURES = {
    "distances": (metrics.distances, _plain_distances, ("points", "others"), {}),
    "frechet_distance": (metrics.frechet_distance, _plain_frechet, _BOTH, {}),
    "kernel_distance": (metrics.kernel_distance, None, _BOTH, {"subsets": (1, 3), **_SEEDS}),
    "covers": (metrics.covers, None, ("points", "manifold"), {"k": (1, 3)}),
    "frechet_interval": (metrics.frechet_interval, None, _BOTH, {"resamples": (1, 3), **_SEEDS, "level": (0.95, 0.5)}),
    "neighbour_measures": (metrics.neighbour_measures, None, _BOTH, {"resamples": (1, 3), **_SEEDS, "level": (0.95,)}),
    "frechet_at_infinity": (metrics.frechet_at_infinity, None, _BOTH, {"points": (2, 3), "subsets": (1,), **_SEEDS}),
    "frechet_floor": (metrics.frechet_floor, None, ("samples",), {"splits": (1, 2), **_SEEDS}),
}


def images(draw):
    """The digits, or something else in the place of a folder."""
    arguments = {"source": "digits", "size": draw.choice((8, None)), "channels": draw.choice((1, None))}
    same = lambda arguments: load_images(**arguments)  # noqa: E731
    # Messages name the command line's option.
    return Call("load_images", load_images, arguments, oracle=same, same=same, order=None, options={"option": "--data"})


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
