"""Single-step solvers: every step begins anew, and evaluates the network once for every order.

Each function yields the evaluations of one step from ``level`` to ``following``; D is the network's clamped x0, and eps the
noise (x - alpha D) / noise that goes with it. To the image (sigma = 0) all of them take the step of first order, x = D.
"""

import math
from collections.abc import Iterator

from .program import STATE, Evaluation, Writer
from .schedule import Level, Schedule

BETWEEN, KEPT = 1, 2
"""Registers of the state between two evaluations of a step, and of what the last of them needs from the first."""


def euler_step(writer: Writer, level: Level, following: Level, out: int = STATE, end: bool = True) -> Evaluation:
    """Euler's step in sigma (Karras et al. 2022, algorithm 1), which is DDIM's: x' = alpha' D + noise' eps.

    Args:
        writer: of the network's kind.
        level: level of the state.
        following: level after the step.
        out: register of the next state.
        end: True if a step of the solver is complete after it.

    Returns:
        Evaluation.
    """
    ratio = following.noise / level.noise
    x0 = following.alpha - level.alpha * ratio
    return writer.evaluate(level, x0=x0, x=ratio, out=out, end=following if end else None)


def heun_step(writer: Writer, level: Level, following: Level) -> Iterator[Evaluation]:
    """Heun's step in sigma (Karras et al. 2022, algorithm 1): order 2.

    With y = x / alpha and z Euler's state, y' = (y + z) / 2 + (sigma' - sigma) / 2 (z - D(z)) / sigma', as Euler's slope is
    (z - y) / (sigma' - sigma).

    Args:
        writer: of the network's kind.
        level: level of the state.
        following: level after the step.

    Yields:
        Two evaluations, or one to the image.
    """
    if following.noise == 0:
        yield euler_step(writer, level, following)
        return
    yield euler_step(writer, level, following, out=BETWEEN, end=False)
    slope = (1 - level.sigma / following.sigma) / 2
    yield writer.evaluate(
        following,
        x0=-slope * following.alpha,
        x=0.5 + slope,
        previous=(STATE, following.alpha / level.alpha / 2),
        source=BETWEEN,
        end=following,
    )


def heun_flow_step(writer: Writer, level: Level, following: Level) -> Iterator[Evaluation]:
    """Heun's step in tau = alpha / (alpha + noise), the time of rectified flow (Liu et al. 2023): order 2, valid at alpha = 0.

    With y = tau x0 + (1 - tau) eps = x / (alpha + noise), the velocity u = D - eps and z Euler's state, y' = (y + z) / 2 +
    (tau' - tau) / 2 u(z), as Euler's slope is (z - y) / (tau' - tau). Euler's step in tau is that in sigma.

    Args:
        writer: of the network's kind.
        level: level of the state.
        following: level after the step.

    Yields:
        Two evaluations, or one to the image.
    """
    if following.noise == 0:
        yield euler_step(writer, level, following)
        return
    yield euler_step(writer, level, following, out=BETWEEN, end=False)
    scale, scale_next = level.alpha + level.noise, following.alpha + following.noise
    # u(z) = ((alpha' + noise') D - x) / noise' for the state x there.
    slope = (following.alpha - level.alpha * scale_next / scale) / (2 * following.noise)
    yield writer.evaluate(
        following,
        x0=slope * scale_next,
        x=0.5 - slope,
        previous=(STATE, scale_next / scale / 2),
        source=BETWEEN,
        end=following,
    )


def dpm2_step(writer: Writer, level: Level, following: Level, schedule: Schedule) -> Iterator[Evaluation]:
    """DPM-Solver-2 (Lu et al. 2022a, algorithm 1): eps at the midpoint of lambda; order 2.

    Args:
        writer: of the network's kind.
        level: level of the state.
        following: level after the step.
        schedule: gives the timestep between the two.

    Yields:
        Two evaluations, or one to the image.
    """
    if following.noise == 0:
        yield euler_step(writer, level, following)
        return
    h = following.log_snr - level.log_snr
    middle = schedule.at_log_snr(level.log_snr + h / 2)
    yield euler_step(writer, level, middle, out=BETWEEN, end=False)
    weight = -following.noise * math.expm1(h)
    yield writer.evaluate(
        middle,
        **_as_x0(middle, weight),
        previous=(STATE, following.alpha / level.alpha),
        source=BETWEEN,
        end=following,
    )


def dpm3_step(writer: Writer, level: Level, following: Level, schedule: Schedule) -> Iterator[Evaluation]:
    """DPM-Solver-3 (Lu et al. 2022a, algorithm 2, r1 = 1/3, r2 = 2/3): order 3.

    Args:
        writer: of the network's kind.
        level: level of the state.
        following: level after the step.
        schedule: gives the timesteps between the two.

    Yields:
        Three evaluations, or one to the image.
    """
    if following.noise == 0:
        yield euler_step(writer, level, following)
        return
    h = following.log_snr - level.log_snr
    first, second = (schedule.at_log_snr(level.log_snr + r * h) for r in (1 / 3, 2 / 3))
    ratio = first.noise / level.noise
    yield writer.evaluate(level, x0=first.alpha - level.alpha * ratio, x=ratio, out=BETWEEN, store=(KEPT, "eps"))
    g = 2 * h / 3
    slope = -2 * second.noise * (math.expm1(g) / g - 1)
    yield writer.evaluate(
        first,
        **_as_x0(first, slope),
        previous=(STATE, second.alpha / level.alpha),
        history=(KEPT, -second.noise * math.expm1(g) - slope),
        source=BETWEEN,
        out=BETWEEN,
    )
    slope = -1.5 * following.noise * (math.expm1(h) / h - 1)
    yield writer.evaluate(
        second,
        **_as_x0(second, slope),
        previous=(STATE, following.alpha / level.alpha),
        history=(KEPT, -following.noise * math.expm1(h) - slope),
        source=BETWEEN,
        end=following,
    )


def _as_x0(level, weight):
    """Weights of x0 and the state that are ``weight`` times eps = (x - alpha x0) / noise."""
    return {"x0": -weight * level.alpha / level.noise, "x": weight / level.noise}
