"""Rounding bounds, from which tolerances are derived: float32 stays within them, and uses much of them."""

import numpy
import pytest
import torch

from .rounding import Rounded

FORMULAS = {
    "sums and products": lambda a, b, c: a * b + c * a - b,
    "a difference that cancels": lambda a, b, c: 1 - (a * b - 1e-3) / (b * a),
    "a root that amplifies": lambda a, b, c: (a * c - a * c * 0.9999) ** 0.5,
    "a quotient by a difference": lambda a, b, c: (b + c) / (a * a + 0.01 - a**2),
    "exponentials and logarithms": lambda a, b, c: torch.exp(-(torch.log(a * b) - torch.log(c * a))),
    "a number that float32 rounds": lambda a, b, c: 0.1 * a - b / 3.0,
    "clamped": lambda a, b, c: (a * b / c).clamp(-0.7, 0.7),
}


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_float32_uses_its_bound(formula):
    operands = torch.rand(3, 200_000, generator=torch.Generator().manual_seed(0)) + 0.1
    bound = formula(*(Rounded(operand) for operand in operands))
    assert numpy.allclose(bound.value, formula(*operands.double()).numpy(), rtol=1e-9)
    error = abs(formula(*operands).double().numpy() - bound.value)
    assert (error <= bound.error).all()
    assert (error / bound.error).max() > 0.4


def test_exact_operands_leave_one_rounding():
    """Results that float32 computes exactly have no error: 1 - a for a in [0.5, 1], and products with powers of two."""
    a = torch.rand(1000, generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    for exact in (1 - Rounded(a), Rounded(a) * 0.25, Rounded(a).clamp(0.0, 0.75)):
        assert not exact.error.any()
    assert Rounded(0.1).error == abs(0.1 - float(torch.tensor(0.1)))


def test_a_root_near_zero_is_bounded_on_both_sides():
    assert (Rounded(0.0, 1e-8) ** 0.5).error >= 1e-4


def test_sums_and_solutions_stay_within_their_bound():
    """Weighted sums over an axis, and systems of two equations as multistep solvers have them."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        nodes, right = torch.rand(2, generator=generator) + 0.1, torch.rand(2, generator=generator)
        tensors = torch.rand(1, 2, 500, generator=generator)

        def formula(nodes, right, tensors):
            matrix = torch.stack([torch.pow(nodes, 0), torch.pow(nodes, 1)])
            return torch.einsum("k,bkc...->bc...", torch.linalg.solve(matrix, torch.expm1(-right)), tensors)

        bound, exact = (
            formula(Rounded(nodes), Rounded(right), Rounded(tensors)),
            formula(nodes.double(), right.double(), tensors.double()),
        )
        assert numpy.allclose(bound.value, exact.numpy(), rtol=1e-9)
        assert (abs(formula(nodes, right, tensors).double() - exact).numpy() <= bound.error).all()
    with pytest.raises(AssertionError, match="no bound"):
        torch.einsum("kk->k", Rounded(nodes), Rounded(nodes))
