"""A solver's run as a program: network evaluations and, after each, one fused step over a few registers.

A register is a tensor like the state. The state is register :data:`STATE`, where every step of the solver begins and ends;
others hold what multistep solvers remember and what single-step solvers return to. An :class:`Evaluation` names the registers
it reads and writes and the scalars of :func:`advkd.ops.sampler_step`, so that a run of any solver is one list, which a loop on
a GPU replays from captured graphs and which an exact teacher runs in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..ops import StepCoefficients
from .prediction import x0_weights
from .schedule import Level

STATE = 0
"""Register of the state."""

Operand = tuple[int, float]
"""A register and its weight in the next state."""


@dataclass(frozen=True)
class Evaluation:
    """A network evaluation and the fused step after it.

    Attributes:
        level: level of the state that the network sees.
        step: scalars of the fused step.
        end: level of the state after it where a step of the solver is complete, else None.
        x: register of the state that the network sees.
        out: register of the next state.
        previous: register that ``c_h`` weights, or None.
        history: register that ``c_g`` weights, or None.
        third: register that ``c_z`` weights in the place of noise, or None.
        stored: register of the stored output, or None.
        network: False for a pass without an evaluation, which only adds noise.
    """

    level: Level
    step: StepCoefficients
    end: Level | None = None
    x: int = STATE
    out: int = STATE
    previous: int | None = None
    history: int | None = None
    third: int | None = None
    stored: int | None = None
    network: bool = True

    @property
    def draws(self) -> bool:
        """True if the step adds noise that it draws."""
        return self.third is None and self.step.c_z != 0


Program = Sequence[Evaluation]


def registers(program: Program) -> int:
    """Number of registers that a program uses."""
    used = [STATE]
    for e in program:
        used += [register for register in (e.x, e.out, e.previous, e.history, e.third, e.stored) if register is not None]
    return max(used) + 1


@dataclass(frozen=True)
class Writer:
    """Writes evaluations for one kind of network: solvers speak of x0 alone.

    Attributes:
        prediction: meaning of the network's output, one of :data:`~advkd.diffusion.prediction.PREDICTIONS`.
        clip: x0 is clamped to [-clip, clip]; infinity clamps nothing.
    """

    prediction: str
    clip: float = math.inf

    def evaluate(
        self,
        level: Level,
        *,
        x0: float,
        x: float = 0.0,
        previous: Operand | None = None,
        history: Operand | None = None,
        third: Operand | None = None,
        noise: float = 0.0,
        store: tuple[int, str] | None = None,
        source: int = STATE,
        out: int = STATE,
        end: Level | None = None,
    ) -> Evaluation:
        """The evaluation at ``level`` whose next state is x0 D + x x_t + the operands + noise z, with D the clamped x0.

        Args:
            level: level of the state in ``source``.
            x0: weight of D.
            x: weight of the state.
            previous: a register and its weight, or None; ``history`` and ``third`` likewise.
            history: a second one.
            third: a third one, in the place of noise.
            noise: deviation of the noise.
            store: a register and what it receives: ``x0`` for D, ``eps`` for the noise (x - alpha D) / noise; or None.
            source: register of the state.
            out: register of the next state.
            end: level of the next state where the solver's step is complete.

        Returns:
            Evaluation.
        """
        k_x, k_m = x0_weights(level.alpha, level.noise, self.prediction)
        stored, kind = store or (None, "x0")
        kept = {} if kind == "x0" else {"s_0": -level.alpha / level.noise, "s_x": 1 / level.noise}
        (first, c_h), (second, c_g), (last, c_z) = (operand or (None, 0.0) for operand in (previous, history, third))
        c_z = noise if third is None else c_z
        step = StepCoefficients(k_x, k_m, x0, x, c_h=c_h, c_g=c_g, c_z=c_z, clip=self.clip, **kept)
        return Evaluation(level, step, end, source, out, first, second, last, stored)

    def add_noise(self, level: Level, following: Level, factor: float = 1.0) -> Evaluation:
        """The pass from ``level`` back to the noisier ``following``: x0 + sigma eps gains noise, without an evaluation.

        Args:
            level: level of the state.
            following: level after it, of a higher sigma.
            factor: multiplies the noise's deviation.

        Returns:
            Evaluation whose ``network`` is False.
        """
        deviation = following.alpha * math.sqrt(following.sigma**2 - level.sigma**2)
        step = StepCoefficients(0.0, 0.0, 0.0, following.alpha / level.alpha, c_z=factor * deviation)
        return Evaluation(level, step, network=False)
