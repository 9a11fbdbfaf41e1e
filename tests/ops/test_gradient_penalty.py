"""The gradient penalty against the formulas written out, and its gradients by finite differences."""

import pytest
import torch

from advkd.errors import InputError
from advkd.models.critic import Critic, CriticConfig
from advkd.ops import gradient_penalty


def critic(condition_channels=0):
    torch.manual_seed(0)
    return Critic(CriticConfig(8, 1, channels=4, max_channels=8, condition_channels=condition_channels)).double()


def points(n=3):
    return torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_value_of_a_linear_critic():
    w = torch.full((64,), 0.5, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ w, points(), weight=10.0, backend="autograd")
    assert abs(penalty.item() - 10 * (w.norm().item() - 1) ** 2) < 1e-12
    (gradient,) = torch.autograd.grad(penalty, w)
    assert torch.allclose(gradient, 20 * (w.norm() - 1) * w / w.norm())


def shifted(function, weight, place, step):
    """The function's value with one weight moved."""
    with torch.no_grad():
        weight[place] += step
    value = function()
    with torch.no_grad():
        weight[place] -= step
    return value


@pytest.mark.parametrize("conditional", [False, True])
def test_gradients_by_finite_differences(conditional):
    model = critic(2 if conditional else 0)
    condition = torch.randn(3, 2, 4, 4, dtype=torch.float64) if conditional else None
    weight = model.tail[0].weight

    def penalty():
        return gradient_penalty(model, points(), condition=condition, target=0.5, weight=3.0)

    (gradient,) = torch.autograd.grad(penalty(), weight)
    for place in [(0, 0, 0, 0), (3, 2, 1, 2), (7, 3, 2, 2)]:
        up, down = shifted(penalty, weight, place, 1e-6), shifted(penalty, weight, place, -1e-6)
        assert abs((up - down).item() / 2e-6 - gradient[place].item()) <= 1e-6 * max(1.0, gradient.abs().max().item())


def test_samples_do_not_couple():
    model = critic()
    whole = gradient_penalty(model, points(4))
    parts = [gradient_penalty(model, points(4)[i : i + 1]) for i in range(4)]
    assert torch.allclose(whole, torch.stack(parts).mean())


def test_no_gradient_flows_into_the_points():
    x = points().requires_grad_()
    penalty = gradient_penalty(critic(), x)
    assert torch.autograd.grad(penalty, x, allow_unused=True) == (None,)


def test_bad_shape_is_named():
    with pytest.raises(InputError, match="x_hat"):
        gradient_penalty(critic(), points()[0])
