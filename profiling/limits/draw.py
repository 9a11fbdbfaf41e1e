"""Random arguments of the public functions: odd but valid ones, and ones that are plainly wrong.

Everything is drawn from a :class:`Draw`, which a seed and a case's number determine.
"""

import fractions
import math
import random
import tempfile

import numpy as np
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIDES = (1, 1, 2, 3, 4, 4, 5, 7, 8, 9, 16, 17)


class Draw(random.Random):
    """Random choices, and tensors with the values and layouts that users' tensors have."""

    def __init__(self, seed, number):
        super().__init__(f"{seed}:{number}")
        self.generator = torch.Generator(device="cpu").manual_seed(self.getrandbits(62))

    def chance(self, share):
        return self.random() < share

    def images(self, low=1, most=6):
        """A shape (N, C, H, W): small, now and then empty or larger than what the kernels take at a time."""
        shape = [self.randint(low, 4), self.randint(low, most), self.choice(SIDES), self.choice(SIDES)]
        if self.chance(0.05):
            shape[self.choice((0, 2, 3))] = 0
        if self.chance(0.03):
            shape[2:] = self.choice(((33, 40), (64, 74), (1, 300)))
        return tuple(shape)

    def samples(self):
        """A shape (N, ...) of any rank."""
        if self.chance(0.6):
            return self.images()
        return tuple(self.choice((0, 1, 2, 3, 5, 8)) if self.chance(0.9) else 40 for _ in range(self.choice((1, 2, 3, 5))))

    def values(self, shape, dtype=torch.float32, finite=False):
        """Normal numbers of some size, at times with zeros, subnormal numbers, infinities and NaN among them."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        values *= self.choice((1.0, 1.0, 1.0, 1e-3, 30.0))
        if values.numel() and self.chance(0.2):
            flat = values.view(-1)
            planted = (0.0, -0.0, 1e-40, -1e-40) if finite else (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40)
            for _ in range(self.randint(1, 4)):
                flat[self.randrange(len(flat))] = self.choice(planted)
        return values.to(dtype)

    def tensor(self, shape, dtype=torch.float32, finite=False):
        """:meth:`values` in an odd layout."""
        return self.laid_out(self.values(shape, dtype, finite))

    def laid_out(self, values):
        """A tensor of the same values (expanded: of some of them) laid out in another way."""
        return self.choice(_LAYOUTS)(self, values)

    def folder(self):
        """A new folder under ``tempfile.tempdir``, which whoever judges the cases sets and removes."""
        return tempfile.mkdtemp(prefix="advkd-calls-")

    def kept_layout(self, values):
        """Contiguous or channels_last, perhaps past the start of its memory: what an op may write to."""
        return self.choice((_contiguous, _channels_last, _with_offset))(self, values)


def _contiguous(draw, values):
    return values.contiguous()


def _channels_last(draw, values):
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values.contiguous()


def _permuted(draw, values):
    order = draw.sample(range(values.ndim), values.ndim)
    inverse = [order.index(i) for i in range(values.ndim)]
    return values.permute(order).contiguous().permute(inverse)


def _strided(draw, values):
    if values.ndim == 0:
        return values
    axis, step = draw.randrange(values.ndim), draw.choice((2, 3))
    shape = list(values.shape)
    shape[axis] *= step
    place = torch.full(shape, 7, dtype=values.dtype, device="cpu")
    view = place[(slice(None),) * axis + (slice(draw.randrange(step), None, step),)]
    return view.copy_(values)


def _with_offset(draw, values):
    offset = draw.choice((1, 2, 3, 5))
    place = torch.full((values.numel() + offset + 3,), 7, dtype=values.dtype, device="cpu")
    return place[offset : offset + values.numel()].view(values.shape).copy_(values)


def _expanded(draw, values):
    if values.ndim == 0 or 0 in values.shape:
        return values
    axis = draw.randrange(values.ndim)
    return values.narrow(axis, 0, 1).expand(values.shape)


def _far_apart(draw, values):
    """Strides of axes with one element are free: any number is one."""
    strides = [2**40 if side == 1 else stride for side, stride in zip(values.shape, values.contiguous().stride())]
    return values.contiguous().as_strided(values.shape, strides) if values.numel() else values


def _negated(draw, values):
    return torch._neg_view(values.neg()) if values.is_floating_point() else values


def _inference(draw, values):
    with torch.inference_mode():
        return values.clone()


def _parameter(draw, values):
    floating = values.is_floating_point()
    return torch.nn.Parameter(values.contiguous(), requires_grad=False) if floating else values


_LAYOUTS = (
    *(_contiguous,) * 4,
    *(_channels_last,) * 3,
    *(_permuted,) * 2,
    *(_strided,) * 2,
    _with_offset,
    _expanded,
    _far_apart,
    _negated,
    _inference,
    _parameter,
)


def spoiled(draw, value):
    """Something else in the place of an argument: of another type, rank, size, dtype, layout or device, or out of range."""
    if isinstance(value, torch.Tensor) and draw.chance(0.75):
        return draw.choice(_SPOIL_TENSOR)(value)
    if isinstance(value, (int, float)) and draw.chance(0.75):
        return draw.choice(_NUMBERS)()
    return draw.choice(_ANYTHING)()


def _huge(t):
    """More than 2^31 elements in the memory of one."""
    return torch.zeros(1, dtype=t.dtype, device="cpu").expand(2**31 + 5, *t.shape[1:])


_SPOIL_TENSOR = (
    lambda t: t[None],
    lambda t: t.reshape(-1)[0] if t.numel() else t[None],
    lambda t: t.flatten(),
    lambda t: t[:0] if t.ndim else t,
    lambda t: torch.cat((t, t)) if t.ndim else t,
    lambda t: t[..., :0] if t.ndim else t,
    lambda t: t.transpose(0, -1) if t.ndim else t,
    lambda t: t.to(torch.float64),
    lambda t: t.to(torch.float16),
    lambda t: t.to(torch.int64),
    lambda t: t.to(torch.uint8),
    lambda t: t > 0,
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.float32).to(torch.float8_e4m3fn),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: torch.nested.nested_tensor(list(t.float())) if t.ndim > 1 and len(t) else None,
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    lambda t: t.float().resolve_neg().numpy(),
    lambda t: t.tolist(),
    _huge,
)
_NUMBERS = (
    lambda: -1,
    lambda: 0,
    lambda: math.nan,
    lambda: math.inf,
    lambda: -math.inf,
    lambda: 1e300,
    lambda: 2**31,
    lambda: 2**63,
    lambda: 2**64,
    lambda: -(2**70),
    lambda: 0.5,
    lambda: 1j,
    lambda: True,
    lambda: "0.2",
    lambda: np.float32(0.25),
    lambda: np.int64(2),
    lambda: fractions.Fraction(1, 3),
    lambda: torch.tensor(0.25),
    lambda: torch.tensor([1, 2]),
    lambda: torch.tensor(0.25, device="meta"),
)
_ANYTHING = (
    lambda: None,
    lambda: "text",
    lambda: b"text",
    lambda: 3,
    lambda: -2.5,
    lambda: [],
    lambda: [1.0],
    lambda: (1, 2),
    lambda: {},
    lambda: object(),
    lambda: True,
    lambda: torch.zeros(()),
    lambda: torch.zeros(2, 3),
    lambda: np.zeros(3),
    lambda: int,
    lambda: range(3),
    lambda: slice(2),
)
