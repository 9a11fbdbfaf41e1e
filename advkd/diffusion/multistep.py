"""Multistep solvers: one evaluation a step, and the last ones remembered.

Each function gives the weights of a step from the newest of ``past`` (levels, newest first) to ``following``; they begin with
lower orders while less is remembered. D_j is the clamped x0 of the network at level j and eps_j the noise (x_j - alpha_j D_j) /
noise_j. The probability-flow equation is linear in the state, so that each method integrates a polynomial through what is
remembered, exactly: of D in lambda for the data-prediction methods, of eps in sigma for DEIS.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from ..errors import InputError
from .program import STATE, Evaluation, Writer
from .schedule import IMAGE, Level

Weights = tuple[float, list[float]]
"""Weight of the state, and weights of what is remembered, the newest first."""


def require_apart(levels: Sequence[Level]) -> None:
    """Refuse levels that no polynomial in lambda runs through: two are equal, or one holds no image or no noise."""
    lambdas = [level.log_snr if level.alpha >= 0 else -math.inf for level in levels]
    if any(map(math.isinf, lambdas)) or len(set(lambdas)) < len(lambdas):
        sigmas = ", ".join(str(level.sigma) for level in levels)
        raise InputError(f"no solver of a higher order for the noise levels {sigmas}: a log-SNR gap is 0 or infinite")


def dpmpp_weights(past: Sequence[Level], following: Level) -> Weights:
    """DPM-Solver++ of order 1, 2 or 3 (Lu et al. 2022b), multistep: as many D as there are in ``past``.

    The second order is the paper's 2M. The third integrates the parabola through three D exactly, so that the second divided
    difference D2 = 2 (D10 - D11) / (r0 + r1) = h^2 D'' has its whole weight. The paper's own code and what follows it halve it,
    which leaves the order at 2.

    Args:
        past: levels of the remembered D, the newest first; that is the state's.
        following: level after the step.

    Returns:
        Weight of the state, and of every D in ``past``.
    """
    level, ratio = past[0], following.noise / past[0].noise
    h = following.log_snr - level.log_snr
    if len(past) == 1 or math.isinf(h):
        return ratio, [following.alpha * -math.expm1(-h)] + [0.0] * (len(past) - 1)
    if len(past) == 2:
        gap = level.log_snr - past[1].log_snr
        first = following.alpha * -math.expm1(-h)
        return ratio, [first * (1 + h / gap / 2), -first * h / gap / 2]
    return ratio, [following.alpha * weight for weight in exponential_weights(h, _offsets(past))]


def deis_weights(past: Sequence[Level], following: Level) -> Weights:
    """DEIS, rho-AB (Zhang and Chen 2023, section 3.3): the integral over sigma of the polynomial through eps_j.

    Args:
        past: levels of the remembered eps, the newest first; that is the state's.
        following: level after the step.

    Returns:
        Weight of the state, and of every eps in ``past``.
    """
    gap = following.sigma - past[0].sigma
    nodes = np.array([(level.sigma - past[0].sigma) / gap for level in past])
    moments = [gap / (q + 1) for q in range(len(past))]
    return following.alpha / past[0].alpha, [following.alpha * w for w in _interpolatory(nodes, moments)]


def deis_log_rho_weights(past: Sequence[Level], following: Level) -> Weights:
    """DEIS as diffusers has it: the integral over rho = sigma of the polynomial in log rho through eps_j.

    Args:
        past: levels of the remembered eps, the newest first; that is the state's.
        following: level after the step, of the same sigma or a lower one that is not 0.

    Returns:
        Weight of the state, and of every eps in ``past``.
    """
    # With log rho = -lambda the integrand is e^(-t) p(t) over [0, h]: that of exponential_weights from the other end.
    h = following.log_snr - past[0].log_snr
    weights = exponential_weights(h, [h - offset for offset in _offsets(past)]) if h else [0.0] * len(past)
    return following.alpha / past[0].alpha, [-following.alpha * past[0].sigma * weight for weight in weights]


def unipc_weights(past: Sequence[Level], following: Level, order: int) -> Weights:
    """UniPC with B(h) = e^-h - 1 (Zhao et al. 2023, "bh2"): the corrector for the state, then the predictor, in one step.

    The state x_i came from the predictor; with D_i, which the step evaluates, the corrector replaces it by the same integral
    through one more point. Both are linear in the remembered D, so that their difference is added to x_i.

    Args:
        past: levels of the remembered D, the newest first, at most ``order`` + 1 of them.
        following: level after the step.
        order: of the predictor; the corrector makes the method's one more.

    Returns:
        Weight of the state, and of every D in ``past``.
    """
    ratio, predicted = unipc_predictor(past[:order], following)
    weights = predicted + [0.0] * (len(past) - len(predicted))
    if len(past) == 1 or ratio == 0:
        return ratio, weights
    for j, weight in enumerate(unipc_correction(past[: order + 1])):
        weights[j] += ratio * weight
    return ratio, weights


def unipc_predictor(past: Sequence[Level], following: Level, solver_type: str = "bh2") -> Weights:
    """UniP of order 1, 2 or 3: as many D as there are in ``past``.

    Its first two orders with "bh2" are DPM-Solver++'s, as is the third of both with the right second difference: B(h) enters
    only where a single weight is set to 1 / 2 instead of solved for.

    Args:
        past: levels of the remembered D, the newest first; that is the state's.
        following: level after the step.
        solver_type: ``bh1``, B(h) = -h, or ``bh2``, B(h) = e^-h - 1.

    Returns:
        Weight of the state, and of every D in ``past``.
    """
    ratio, weights = dpmpp_weights(past, following)
    if len(past) == 2 and solver_type == "bh1":
        h, gap = following.log_snr - past[0].log_snr, past[0].log_snr - past[1].log_snr
        slope = following.alpha * h * h / gap / 2
        return ratio, [sum(weights) + slope, -slope]
    return ratio, weights


def unipc_corrector(past: Sequence[Level], solver_type: str = "bh2") -> Weights:
    """UniC of order 1, 2 or 3, the step that ends at the newest level: as many D as there are in ``past``, less one.

    Args:
        past: levels of the remembered D, the newest first; the step goes from the second to the first.
        solver_type: as for :func:`unipc_predictor`.

    Returns:
        Weight of the corrected state at the second level, and of every D in ``past``.
    """
    level, *before = past
    h, ratio = level.log_snr - before[0].log_snr, level.noise / before[0].noise
    if len(before) == 1:
        whole = level.alpha * -math.expm1(-h)
        half = whole / 2 if solver_type == "bh2" else level.alpha * h / 2
        return ratio, [half, whole - half]
    return ratio, [level.alpha * weight for weight in exponential_weights(h, [h, *_offsets(before)])]


def unipc_correction(past: Sequence[Level], solver_type: str = "bh2") -> list[float]:
    """Weights of every D in the corrected state less the predicted one, at the newest level of ``past``.

    Args:
        past: levels of the remembered D, the newest first, one more than the order of predictor and corrector.
        solver_type: as for :func:`unipc_predictor`.

    Returns:
        A weight for every D in ``past``.
    """
    _, corrected = unipc_corrector(past, solver_type)
    _, predicted = unipc_predictor(past[1:], past[0], solver_type)
    return [after - before for after, before in zip(corrected, [0.0, *predicted], strict=True)]


def exponential_weights(h: float, offsets: Sequence[float]) -> list[float]:
    """Weights w_j with sum_j w_j p(offset_j) = the integral of e^(t - h) p(t) over [0, h], for polynomials p.

    They hold for every polynomial of a degree below the number of offsets.

    Args:
        h: length of the step in lambda, positive.
        offsets: positions of the nodes, in lambda from the step's start.

    Returns:
        A weight for every offset.
    """
    # Moments of u = t / h in [0, 1]: m_0 = 1 - e^-h, m_q = 1 - q m_(q-1) / h, which cancels for small h; there the series.
    degree = len(offsets)
    moments = [_moment(h, q) for q in range(degree)]
    return _interpolatory(np.array(offsets) / h, moments)


def _moment(h, q):
    """The integral over [0, h] of e^(t - h) (t / h)^q."""
    if h < 1:
        # h sum_k (-h)^k q! / (q + k + 1)!, from repeated integration by parts at t = h.
        term = h / (q + 1)
        total, k = term, 0
        while abs(term) > 1e-18 * abs(total):
            k += 1
            term *= -h / (q + k + 1)
            total += term
        return total
    moment = -math.expm1(-h)
    for p in range(1, q + 1):
        moment = 1 - p * moment / h
    return moment


def _interpolatory(nodes, moments):
    """Weights of a quadrature that is exact for the monomials of these moments."""
    matrix = np.vander(nodes, len(nodes), increasing=True).T
    return np.linalg.solve(matrix, np.array(moments)).tolist()


def _offsets(past):
    return [level.log_snr - past[0].log_snr for level in past]


def multistep(
    writer: Writer,
    levels: Sequence[Level],
    remembered: int,
    weights: Callable[[Sequence[Level], Level], Weights],
    kind: str = "x0",
) -> Iterator[Evaluation]:
    """The program of a multistep method.

    Args:
        writer: of the network's kind.
        levels: levels at which steps begin, from noise to image.
        remembered: most evaluations that a step uses, with its own.
        weights: of a step, from the levels of the remembered evaluations.
        kind: what is remembered: ``x0`` or ``eps``.

    Yields:
        An evaluation for every step.
    """
    places = max(remembered - 1, 1)
    for i, (level, following) in enumerate(pairwise([*levels, IMAGE])):
        past = levels[max(0, i - remembered + 1) : i + 1][::-1]
        x, (own, *older) = weights(past, following)
        if kind == "eps":
            x, own = x + own / level.noise, -own * level.alpha / level.noise
        operands = [(1 + (i - j) % places, weight) if weight else None for j, weight in enumerate(older, 1)]
        previous, history, third = operands + [None] * (3 - len(operands))
        store = (1 + i % places, kind) if remembered > 1 else None
        yield writer.evaluate(
            level, x0=own, x=x, previous=previous, history=history, third=third, store=store, end=following, out=STATE
        )
