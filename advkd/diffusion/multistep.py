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

from .program import STATE, Evaluation, Writer
from .schedule import IMAGE, Level

Weights = tuple[float, list[float]]
"""Weight of the state, and weights of what is remembered, the newest first."""


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
    ratio, predicted = _unipc_predictor(past[:order], following)
    weights = predicted + [0.0] * (len(past) - len(predicted))
    if len(past) == 1 or ratio == 0:
        return ratio, weights
    level, before = past[0], past[1 : order + 1]
    _, old = _unipc_predictor(before, level)
    corrected = _unipc_corrector(before, level)
    for j, weight in enumerate(corrected):
        weights[j] += ratio * (weight - (old[j - 1] if j else 0.0))
    return ratio, weights


def _unipc_predictor(past, following):
    # Its first two orders are DPM-Solver++'s, as is the third with the right second difference.
    return dpmpp_weights(past, following)


def _unipc_corrector(before, level):
    """Weights of D_i and the D before it in the step from ``before[0]`` to ``level``."""
    h = level.log_snr - before[0].log_snr
    if len(before) == 1:
        whole = level.alpha * -math.expm1(-h)
        return [whole / 2, whole / 2]
    return [level.alpha * weight for weight in exponential_weights(h, [h, *_offsets(before)])]


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
    first: int = 0,
) -> Iterator[Evaluation]:
    """The program of a multistep method.

    Args:
        writer: of the network's kind.
        levels: levels at which steps begin, from noise to image.
        remembered: most evaluations that a step uses, with its own.
        weights: of a step, from the levels of the remembered evaluations.
        kind: what is remembered: ``x0`` or ``eps``.
        first: step to begin with. Registers 1 + j % (remembered - 1) must then hold what steps j before it remembered.

    Yields:
        An evaluation for every step.
    """
    places = max(remembered - 1, 1)
    for i, (level, following) in list(enumerate(pairwise([*levels, IMAGE])))[first:]:
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
