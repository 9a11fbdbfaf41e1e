"""Rounding bounds of float32 formulas, derived operation by operation (running error analysis; Higham 2002, section 3.3)."""

import functools
import operator

import numpy
import torch

UNIT = 2.0**-24
"""Largest relative error of one correctly rounded float32 operation."""


class Rounded:
    """A number or tensor in float64, and a bound on how far a float32 computation of it may be from that value.

    A formula evaluated with these instead of float32 tensors bounds its own rounding, element by element. Each operation
    propagates the errors of its operands, amplified as it amplifies them, and adds 2^-24 of its result. Square roots,
    exponentials and
    logarithms come from a library and are good to an ulp only: they add twice that. Contracting a product and a sum (FMA)
    leaves a rounding out, so the bound holds with and without it.

    Attributes:
        value: float64 array, as the formula gives it in float64.
        error: float64 array of the same shape, not negative. By default the rounding of ``value`` to float32, which is 0 for
            what is stored in float32 or less.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, value, error=None):
        if isinstance(value, torch.Tensor):
            value = value.detach().double().numpy()
        self.value = numpy.float64(value)
        self.error = _rounding(self.value) if error is None else error

    @classmethod
    def from_float32(cls, value):
        """A quantity known only to be rounded to float32."""
        known = cls(value)
        return cls(known.value, numpy.where(numpy.isinf(known.value), 0.0, UNIT * abs(known.value)))

    @property
    def shape(self):
        return self.value.shape

    def __add__(self, other):
        other = _rounded(other)
        return _result(self.value + other.value, self.error + other.error)

    def __neg__(self):
        return Rounded(-self.value, self.error)

    def __sub__(self, other):
        return self + -_rounded(other)

    def __rsub__(self, other):
        return _rounded(other) - self

    def __mul__(self, other):
        other = _rounded(other)
        carried = abs(self.value) * other.error + self.error * (abs(other.value) + other.error)
        return _result(self.value * other.value, carried)

    def __truediv__(self, other):
        other = _rounded(other)
        quotient = self.value / other.value
        smallest = numpy.maximum(abs(other.value) - other.error, 0.0)
        return _result(quotient, (self.error + abs(quotient) * other.error) / smallest)

    def __rtruediv__(self, other):
        return _rounded(other) / self

    def __pow__(self, exponent):
        if exponent in (0, 1):
            return self if exponent else Rounded(numpy.ones_like(self.value))
        if exponent == 2:
            return self * self
        assert exponent == 0.5, f"no bound for the power {exponent}"
        root = numpy.sqrt(self.value)
        below, above = (numpy.sqrt(numpy.maximum(self.value + sign * self.error, 0.0)) for sign in (-1, 1))
        return _result(root, numpy.maximum(root - below, above - root), roundings=2)

    __radd__, __rmul__, mul = __add__, __mul__, __mul__

    def __ge__(self, other):
        return self.value >= other

    def __le__(self, other):
        return self.value <= other

    def __len__(self):
        return len(self.value)

    def __getitem__(self, index):
        return Rounded(self.value[index], self.error[index])

    def to(self, *_):
        """Returns itself: the formula is bounded as float32 computes it."""
        return self

    def exp(self):
        value = numpy.exp(self.value)
        return _result(value, value * numpy.expm1(self.error), roundings=2)

    def expm1(self):
        value = numpy.expm1(self.value)
        return _result(value, (value + 1) * numpy.expm1(self.error), roundings=2)

    def pow(self, exponent):
        return self**exponent

    def log(self):
        return _result(numpy.log(self.value), -numpy.log1p(-self.error / self.value), roundings=2)

    def clamp(self, min, max=float("inf")):
        low, high = _rounded(min), _rounded(max)
        limit = numpy.maximum(low.error, high.error)
        # A value beyond a limit by more than every error becomes the limit in float32, too.
        beyond = numpy.maximum(self.value - high.value, low.value - self.value) > self.error + limit
        error = numpy.where(beyond, limit, numpy.maximum(self.error, limit))
        return Rounded(numpy.clip(self.value, low.value, high.value), error)

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        first, *others = arguments
        known = _FUNCTIONS.get(function.__name__) or getattr(_rounded(first), function.__name__)
        return known(*(arguments if function.__name__ in _FUNCTIONS else others), **(options or {}))

    def __array_ufunc__(self, function, method, first, *others):
        return getattr(_rounded(first), function.__name__)(*others)


def _rounded(operand):
    return operand if isinstance(operand, Rounded) else Rounded(operand)


@numpy.errstate(invalid="ignore")
def _rounding(value):
    """The error of float64 numbers that are rounded to float32; an infinity has none."""
    return numpy.where(numpy.isinf(value), 0.0, abs(value - numpy.float32(value)))


def _result(value, carried, roundings=1):
    """The result of an operation. Exact operands leave one rounding, which float64 shows."""
    error = carried + roundings * UNIT * (abs(value) + carried)
    if roundings == 1:
        error = numpy.where(carried == 0, _rounding(value), error)
    # An infinity comes from a zero that float32 has, too.
    return Rounded(value, numpy.where(numpy.isinf(value), 0.0, error))


def _stack(tensors, dim=0):
    tensors = [_rounded(tensor) for tensor in tensors]
    return Rounded(*(numpy.stack([getattr(t, name) for t in tensors], dim) for name in ("value", "error")))


def _einsum(equation, weights, tensors):
    assert equation == "k,bkc...->bc...", f"no bound for the sum {equation}"
    weights, tensors = _rounded(weights), _rounded(tensors)
    return functools.reduce(operator.add, (weights[k] * tensors[:, k] for k in range(len(weights))))


def _solve(matrix, right):
    """Gaussian elimination with row exchanges, as LAPACK has it."""
    rows = [[*(matrix[i, j] for j in range(len(right))), right[i]] for i in range(len(right))]
    for i in range(len(rows)):
        rows[i:] = sorted(rows[i:], key=lambda row: -abs(row[i].value))
        for j in range(i + 1, len(rows)):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i])]
    solution = []
    for i in reversed(range(len(rows))):
        known = (c * x for c, x in zip(rows[i][i + 1 : -1], solution))
        solution.insert(0, functools.reduce(operator.sub, known, rows[i][-1]) / rows[i][i])
    return _stack(solution)


_FUNCTIONS = {"stack": _stack, "einsum": _einsum, "linalg_solve": _solve}
