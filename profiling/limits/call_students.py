"""Calls of students and their engines with random arguments."""

import functools
import itertools
import math

import torch

from advkd.models.fused_student import FusedStudent
from advkd.models.shape import StudentConfig
from advkd.models.student import Student
from advkd.ops import philox_normal, student_forward

from . import call_oracles
from .call import Call, backend_for, narrow
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
