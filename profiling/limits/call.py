"""A public function with random arguments, what they are drawn from, and what a result is compared by."""

import fractions
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from advkd.ops.layout import memory_format

from .draw import DTYPES

UNIT = 2.0**-24
"""Half of float32's epsilon: the largest relative error of one rounding."""


@dataclass
class Call:
    """A public function, its arguments, and what tells whether its result is right.

    Attributes:
        name: of the function.
        function: to be called with the arguments by name.
        arguments: by name; None where one is not given.
        oracle: function of the arguments in float64; default: the function with the reference backend.
        same: function of the arguments as they are, whose result is as good as that dtype allows; default: the function with
            the reference backend.
        bound: function ``(wide arguments, wanted, same)`` that gives the error allowed for each result; None: ``same`` bit for
            bit.
        order: of differentiability; None where torch differentiates.
        differentiable: names of the arguments that a gradient may be asked for.
        written: names of the arguments that may be written.
        fits: groups of arguments that must fit each other: a refusal of one may name another of its group.
        check: function ``(results, wide arguments, wanted, same)`` that gives a further fault of the results, or None.
        after: function of the wide arguments that gives ``(wanted, bound)`` of written arguments, by name.
        received: place among the results of each tensor in ``out``.
        spoilt: names of arguments that do not fit on purpose; the others of a call do.
    """

    name: str
    function: Callable
    arguments: dict
    oracle: Callable | None = None
    same: Callable | None = None
    bound: Callable | None = None
    order: int | None = 0
    differentiable: tuple = ()
    written: tuple = ()
    options: dict = field(default_factory=dict)
    fits: tuple = ()
    check: Callable | None = None
    after: Callable | None = None
    received: tuple = ()
    spoilt: list = field(default_factory=list)

    def reference(self, arguments):
        """The reference's result; nothing is written into an argument."""
        kept = {name: value for name, value in arguments.items() if name not in self.written}
        return self.function(**{**kept, "backend": "reference"})

    def spoil(self, name, when=True):
        """Say that an argument need not fit."""
        if when and name not in self.spoilt:
            self.spoilt.append(name)
        return self

    def may_be_named(self, spoilt):
        """The arguments that a refusal of ``spoilt`` may name."""
        return {spoilt, *(name for group in self.fits if spoilt in group for name in group)}


def backend_for(draw, *, cpu=True):
    """A backend that can run, now and then one that cannot; ``cpu``: that one takes the tensors."""
    if draw.chance(0.03):
        return draw.choice(("cuda", "triton"))
    if draw.chance(0.03):
        return draw.choice(("cpu", "reference"))
    return draw.choice(("auto", "cpu") if cpu else ("auto", "auto", "reference"))


def slope_for(draw):
    return draw.choice((0.2, 0.2, 0.01, 0.0, 1.0, -0.5, 1, 3.5))


def dtype_for(draw):
    return draw.choice((*DTYPES[:3], torch.float32, torch.float32, torch.float64))


def out_for(draw, like, others=()):
    """``(tensor that receives a result, whether it fits)``: a new one, the input itself, another view of it, or a bad one."""
    if draw.chance(0.4):
        return None, True
    if draw.chance(0.15):
        return _bad_out(draw, like), False
    kind = draw.choice(("new", "new", "itself", "view", "other"))
    if kind in ("itself", "view") and _writable(like):
        return (like[:] if kind == "view" and like.ndim else like), True
    fitting = [other for other in others if _like(other, like)]
    if kind == "other" and fitting:
        return draw.choice(fitting), True
    return blank(like), True


def blank(like, shape=None):
    """A tensor for a result that is laid out as ops lay theirs out."""
    shape = like.shape if shape is None else shape
    return torch.full(shape, math.nan, dtype=like.dtype, device="cpu").contiguous(memory_format=memory_format(like))


def _bad_out(draw, like):
    kind = draw.choice(("shifted", "layout", "overlapping"))
    if kind == "shifted" and like.numel() > 2 and like.ndim and _room(like) > like.numel():
        return like.as_strided((like.numel() + 1,), (1,), 0)[1:].view(like.shape)
    if kind == "overlapping":
        return torch.zeros(1, dtype=like.dtype, device="cpu").expand(like.shape)
    return draw.laid_out(torch.full(like.shape, math.nan, dtype=like.dtype, device="cpu"))


def _writable(tensor):
    """True if an op that reads a tensor can also write its result there."""
    return tensor.is_contiguous(memory_format=memory_format(tensor)) and not tensor.is_inference() and not tensor.is_neg()


def _like(tensor, other):
    laid_out = tensor.is_contiguous(memory_format=memory_format(other))
    return laid_out and tensor.dtype == other.dtype and _writable(tensor)


def _room(tensor):
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def narrow(dtype):
    """The largest relative error of storing a float32 in a dtype."""
    return torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else 0.0


def stored(bound, wanted, dtype):
    """A bound of the arithmetic and that of storage; the least numbers that a dtype has are as far apart as they are."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return bound * (1 + narrow(dtype)) + narrow(dtype) * wanted.abs() + least


def plain_number(value):
    """Numbers of other types, and those that no float32 operation takes as they are, as Python's."""
    if isinstance(value, (fractions.Fraction, np.floating)) or (isinstance(value, int) and abs(value) >= 2**63):
        return float(value)
    return int(value) if isinstance(value, np.integer) else value


def elementwise_backend(draw, dtype):
    """A backend of an op whose kernels take all dtypes but float64."""
    return backend_for(draw, cpu=dtype != torch.float64)


def checked_backend(call, dtype, cpu=DTYPES[:3]):
    """``call``, whose backend does not fit where that is ``cpu`` and the dtype none of its kernels'."""
    return call.spoil("backend", call.arguments["backend"] == "cpu" and dtype not in cpu)


def seed_for(draw):
    return draw.choice((0, 1, 2**31, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1, draw.getrandbits(64)))


def indices_for(draw, count):
    if draw.chance(0.3):
        start = draw.choice((0, 5, 2**40))
        return range(start, start + count)
    low = draw.choice((0, -(2**63), 2**62))
    indices = torch.randint(low, low + 2**40, (count,), generator=draw.generator, dtype=torch.int64, device="cpu")
    return draw.laid_out(indices)


def noise_for(draw, count):
    """(seed, sample indices, step), at times with something wrong, and whether it fits."""
    steps = torch.randint(0, 2**24, (draw.choice((1, count)),), generator=draw.generator, dtype=torch.int64, device="cpu")
    step = draw.choice((0, 7, 2**24 - 1, draw.laid_out(steps)))
    triple = [seed_for(draw), indices_for(draw, count), step]
    fits = not draw.chance(0.05)
    if not fits:
        triple[draw.randrange(3)] = draw.choice((None, -1, 2**64, 0.5, "1", torch.tensor([2**24]), torch.tensor(1.0)))
    return draw.choice((tuple, list))(triple), fits


class Wrong(Exception):
    """A fault that a mode finds itself."""


def mapped(function, value):
    """``value`` with ``function`` applied to every tensor in it."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(function, item) for item in value)
    return value


def flat(result):
    """A result as a list of tensors."""
    if result is None or isinstance(result, str):
        return []
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (bool, int, float)):
        return [torch.tensor(float(result), dtype=torch.float64, device="cpu")]
    values = result.values() if isinstance(result, dict) else result
    return [tensor for item in values for tensor in flat(item)]


def identical(found, wanted):
    """True if two results have the same bits, NaN aside."""
    found, wanted = flat(found), flat(wanted)
    alike = [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in wanted]
    return alike and all(bool(equal_bits(a, b).all()) for a, b in zip(found, wanted, strict=True))


def equal_bits(a, b):
    """Where two tensors have the same number, or NaN both."""
    return (a == b) | ((a != a) & (b != b))
