"""Solvers of the reverse process by name: how a run's levels become a program of fused steps.

A :class:`Solver` holds a method's name and its numbers; :meth:`Solver.program` writes the run. The probability-flow equation is
solved by ``euler``, ``ddim`` (the same step; it uses the network's noise where x0 is clipped, as diffusers does), ``heun``,
``heun-flow``, ``dpm-2``, ``dpm-3``, ``dpmpp-2m``, ``dpmpp-3m``, ``deis-1`` to ``deis-3`` and ``unipc-1`` to ``unipc-3``; noise
is added by ``ddpm``, ``ddim`` with ``eta``, ``ddim-renoised``, ``euler-maruyama``, ``predictor-corrector``, ``analytic-ddpm``,
``analytic-ddim``, ``consistency``, ``dpdm`` and ``heun`` with ``churn``.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from ..errors import InputError
from ..ops.arguments import real, whole
from .coefficients import VARIANCES, ddim_coefficients, ddpm_coefficients
from .multistep import Weights, deis_weights, dpmpp_weights, multistep, unipc_weights
from .program import Evaluation, Writer
from .schedule import IMAGE, SPACINGS, Level, Schedule
from .singlestep import dpm2_step, dpm3_step, euler_step, heun_flow_step, heun_step
from .stochastic import analytic_step, euler_maruyama_step, langevin_step, renoising_step, skip_weight

ALIASES = {"dpmpp": "dpmpp-2m", "deis": "deis-3", "unipc": "unipc-2"}
"""Short names of solvers."""

NoisePower = Callable[[Level], float]
"""E|eps|^2 / d of a teacher at a level, which Analytic-DPM needs."""


@dataclass(frozen=True)
class Method:
    """Facts about a solver.

    Attributes:
        order: global order of accuracy on the probability-flow equation, once there is enough to remember; 0 for solvers that
            add noise.
        evaluations: network evaluations of a step.
        least: fewest steps of a run: the order of a multistep solver, and two of a single-step one, whose last step is Euler's.
        paper: where it comes from.
        first: order that the first step of a run, one of first order, leaves to the whole of it; 0 where it costs none.
    """

    order: int
    evaluations: int = 1
    least: int = 1
    paper: str = ""
    first: int = 0

    @property
    def whole(self) -> int:
        """Order of accuracy of whole runs."""
        return self.first or self.order


METHODS = {
    "ddim": Method(1, paper="Song et al. 2020, Denoising diffusion implicit models"),
    "ddpm": Method(0, paper="Ho et al. 2020, Denoising diffusion probabilistic models"),
    "euler": Method(1, paper="Karras et al. 2022, algorithm 1, first order"),
    "heun": Method(2, 2, 2, paper="Karras et al. 2022, algorithms 1 and 2"),
    "heun-flow": Method(2, 2, 2, paper="Liu et al. 2023, Flow straight and fast; Heun's step in its time"),
    "dpm-2": Method(2, 2, 2, paper="Lu et al. 2022a, DPM-Solver-2"),
    "dpm-3": Method(3, 3, 2, paper="Lu et al. 2022a, DPM-Solver-3"),
    "dpmpp-2m": Method(2, least=2, paper="Lu et al. 2022b, DPM-Solver++ (2M)"),
    "dpmpp-3m": Method(3, least=3, paper="Lu et al. 2022b, DPM-Solver++ (3M), second difference at its whole size", first=2),
    "deis-1": Method(1, paper="Zhang and Chen 2023, rho-AB1"),
    "deis-2": Method(2, least=2, paper="Zhang and Chen 2023, rho-AB2"),
    "deis-3": Method(3, least=3, paper="Zhang and Chen 2023, rho-AB3", first=2),
    "unipc-1": Method(2, least=2, paper="Zhao et al. 2023, UniPC-1, bh2"),
    "unipc-2": Method(3, least=3, paper="Zhao et al. 2023, UniPC-2, bh2"),
    "unipc-3": Method(4, least=4, paper="Zhao et al. 2023, UniPC-3, bh2", first=3),
    "ddim-renoised": Method(0, paper="Meng et al. 2023, On distillation of guided diffusion models, N-step stochastic sampler"),
    "euler-maruyama": Method(0, paper="Song et al. 2021, eq. 6"),
    "predictor-corrector": Method(0, 2, paper="Song et al. 2021, algorithms 1 and 4"),
    "analytic-ddpm": Method(0, paper="Bao et al. 2022, Analytic-DPM with DDPM's mean"),
    "analytic-ddim": Method(0, paper="Bao et al. 2022, Analytic-DPM with DDIM's mean"),
    "consistency": Method(0, paper="Song et al. 2023, Consistency models, algorithm 1"),
    "dpdm": Method(0, paper="Data-prediction denoising models, algorithm 2"),
}
"""Every solver by its name."""

FROM_NOISE = ("ddim", "ddim-renoised", "ddpm", "heun-flow")
"""Solvers whose first step may begin at alpha_bar = 0."""


@dataclass(frozen=True)
class Solver:
    """A solver and its numbers.

    Attributes:
        name: method: ddim, ddpm, euler, heun, heun-flow, dpm-2, dpm-3, dpmpp-2m, dpmpp-3m, deis-1 to deis-3, unipc-1 to
            unipc-3, ddim-renoised, euler-maruyama, predictor-corrector, analytic-ddpm, analytic-ddim, consistency, dpdm;
            short: dpmpp, deis, unipc.
        spacing: of the levels: leading, trailing, linspace, karras, log_snr, dpdm or flow (empty: leading for ddim and ddpm,
            dpdm for dpdm, trailing for the others).
        rho: exponent of the ``karras`` spacing.
        eta: of ``ddim``: 0 adds no noise, 1 as much as DDPM.
        churn: of ``heun``: S_churn of Karras et al. 2022, algorithm 2 (0: no noise).
        churn_min: S_tmin: no noise below this sigma.
        churn_max: S_tmax: no noise above this sigma.
        churn_noise: S_noise, the factor of its deviation.
        snr: of ``predictor-corrector``: signal-to-noise ratio of the corrector.
        sigma_min: of ``consistency``: noise level at which the consistency function is the identity.
        sigma_data: of ``consistency``: deviation of the data in the weight of the state.
        alpha_bars: alpha_bar of the levels at which steps begin, rising, in the place of a spacing; a run takes a number of
            steps that divides theirs.

    Raises:
        InputError: an unknown name or spacing, numbers out of range, or a number that the solver does not have.

    Examples:
        >>> Solver("unipc").evaluations(10)
        10
    """

    name: str = "ddim"
    spacing: str = ""
    rho: float = 7.0
    eta: float = 0.0
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0
    snr: float = 0.16
    sigma_min: float = 0.0
    sigma_data: float = 0.5
    alpha_bars: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.name, str):
            object.__setattr__(self, "name", ALIASES.get(self.name, self.name))
        if not isinstance(self.name, str) or self.name not in METHODS:
            raise InputError(f"solver must be one of {', '.join([*METHODS, *ALIASES])}, got {self.name!r}")
        if self.spacing and self.spacing not in SPACINGS:
            raise InputError(f"spacing must be one of {', '.join(SPACINGS)}, got {self.spacing!r}")
        for name, owner in _OWNERS.items():
            value, default = real(name, getattr(self, name)), _DEFAULTS[name]
            object.__setattr__(self, name, value)
            if not value >= 0 or (value == math.inf and default != math.inf):
                raise InputError(f"{name} must not be negative or infinite, got {value}")
            if value != default and self.name != owner and not (name == "rho" and self.spacing == "karras"):
                raise InputError(f"{name} is a number of {owner}; solver {self.name} has none: leave it out")
        limits = (self.churn_min, self.churn_max, self.churn_noise)
        if not self.churn and limits != tuple(_DEFAULTS[name] for name in ("churn_min", "churn_max", "churn_noise")):
            raise InputError("churn_min, churn_max and churn_noise need churn above 0: give it, or leave them out")
        object.__setattr__(self, "alpha_bars", tuple(real("alpha_bars", value) for value in self.alpha_bars))
        if self.alpha_bars and self.spacing:
            raise InputError("alpha_bars and spacing are two ways to place levels: give one of them")
        if any(not 0 <= a < 1 for a in self.alpha_bars) or any(a >= b for a, b in pairwise(self.alpha_bars)):
            raise InputError(f"alpha_bars must rise within [0, 1), got {self.alpha_bars}")
        if self.churn_min > self.churn_max:
            raise InputError(f"churn_min must be at most churn_max, {self.churn_max}, got {self.churn_min}")

    @property
    def order(self) -> int:
        """Global order of accuracy; 0 where noise is added."""
        return 0 if self.stochastic else METHODS[self.name].order

    @property
    def stochastic(self) -> bool:
        """True if steps add noise, so that x_0 is no function of x_T."""
        return METHODS[self.name].order == 0 or self.eta > 0 or self.churn > 0

    @property
    def analytic(self) -> bool:
        """True if steps depend on the teacher's noise power."""
        return self.name.startswith("analytic")

    @property
    def chosen_spacing(self) -> str:
        """``spacing``, or the solver's own; empty where levels are given one by one."""
        if self.alpha_bars:
            return ""
        return self.spacing or {"ddim": "leading", "ddpm": "leading", "dpdm": "dpdm"}.get(self.name, "trailing")

    def identity(self) -> dict[str, Any]:
        """The numbers as JSON values; those of :data:`_NEWER` only where they are not the default."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _NEWER or v != _DEFAULTS[k]}

    def levels(self, schedule: Schedule, steps: int) -> list[Level]:
        """Levels at which the steps begin.

        Args:
            schedule: noise schedule.
            steps: number of steps.

        Returns:
            ``steps`` levels of falling noise.

        Raises:
            InputError: a number of steps outside [1, T] or that does not divide ``alpha_bars``, or too few for the solver's
                order.
        """
        steps, least = whole("steps", steps, 1), METHODS[self.name].least
        if steps < least:
            raise InputError(f"steps must be at least {least} for the order of solver {self.name}, got {steps}")
        if self.alpha_bars:
            if len(self.alpha_bars) % steps:
                raise InputError(f"steps must divide the {len(self.alpha_bars)} levels that are given, got {steps}")
            return [schedule.at_alpha_bar(a) for a in self.alpha_bars[:: len(self.alpha_bars) // steps]]
        return schedule.levels(self.chosen_spacing, steps, self.rho)

    def evaluations(self, steps: int) -> int:
        """Network evaluations of a run: single-step solvers take one in the last step, to the image.

        Args:
            steps: number of steps.

        Returns:
            Their number.
        """
        each = METHODS[self.name].evaluations
        return each * (steps - 1) + 1

    def program(
        self,
        schedule: Schedule,
        steps: int,
        prediction: str,
        clip: float = math.inf,
        variance: str = VARIANCES[0],
        noise_power: NoisePower | None = None,
    ) -> list[Evaluation]:
        """The run of ``steps`` steps on a teacher's schedule.

        Args:
            schedule: the teacher's noise schedule.
            steps: number of steps.
            prediction: meaning of the network's output.
            clip: x0 is clamped to [-clip, clip], but for ``consistency``.
            variance: of ``ddpm``, one of :data:`~advkd.diffusion.coefficients.VARIANCES`.
            noise_power: E|eps|^2 / d by level, which the ``analytic`` solvers need.

        Returns:
            Evaluations in their order.

        Raises:
            InputError: a number of steps that cannot be, a schedule that the solver cannot take, or a missing ``noise_power``.
        """
        levels = self.levels(schedule, steps)
        if levels[0].alpha == 0 and self.name not in FROM_NOISE:
            raise InputError(
                f"solver {self.name} needs a finite noise level at every step; this run begins at alpha_bar = 0: "
                f"take {', '.join(FROM_NOISE)}, or another spacing"
            )
        if levels[-1].noise == 0 and self.name != "ddim":
            raise InputError(
                f"the schedule has no noise at timestep {levels[-1].t:g}, and solver {self.name} needs some: take ddim"
            )
        remembers = self.name in _MULTISTEP or METHODS[self.name].order > 1
        if remembers and any(a.sigma <= b.sigma for a, b in pairwise(levels)):
            raise InputError(f"solver {self.name} needs levels that fall; this schedule repeats one: take ddim, or fewer steps")
        if self.analytic and noise_power is None:
            raise InputError(f"solver {self.name} needs the teacher's noise power (run advkd teacher noise-power once)")
        writer = Writer(prediction, math.inf if self.name == "consistency" else clip)  # D takes the state's noise away
        if self.name in _MULTISTEP:
            remembered, weights, kind = _MULTISTEP[self.name]
            return list(multistep(writer, levels, remembered, weights, kind))
        steps_of = partial(_SINGLE[self.name], self, writer, schedule=schedule, variance=variance, noise_power=noise_power)
        ends = [*levels[1:], IMAGE, IMAGE]
        triples = zip(levels, ends, ends[1:])
        return [e for a, b, c in triples for e in steps_of(a, b, beyond=c, steps=steps, last=levels[-1])]


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Solver)}
_OWNERS = {
    "rho": "spacing karras",
    "eta": "ddim",
    "churn": "heun",
    "churn_min": "heun",
    "churn_max": "heun",
    "churn_noise": "heun",
    "snr": "predictor-corrector",
    "sigma_min": "consistency",
    "sigma_data": "consistency",
}
"""The solver that has a number."""

_NEWER = ("alpha_bars", "sigma_min", "sigma_data")
"""Numbers that solvers did not always have: identities from before are still the same."""

_MULTISTEP: dict[str, tuple[int, Callable[[Sequence[Level], Level], Weights], str]] = {
    "dpmpp-2m": (2, dpmpp_weights, "x0"),
    "dpmpp-3m": (3, dpmpp_weights, "x0"),
    **{f"deis-{k}": (k, deis_weights, "eps") for k in (1, 2, 3)},
    **{f"unipc-{k}": (k + 1, partial(unipc_weights, order=k), "x0") for k in (1, 2, 3)},
}


def _ddim(solver, writer, level, following, **_):
    a, after = level.alpha_bar, following.alpha_bar
    yield Evaluation(level, ddim_coefficients(a, after, writer.prediction, solver.eta, writer.clip), following)


def _ddim_renoised(solver, writer, level, following, beyond, **_):
    """DDIM to the level after the next one, and noise back up to the next one."""
    step = ddim_coefficients(level.alpha_bar, beyond.alpha_bar, writer.prediction, clip=writer.clip)
    if following.noise == 0:
        yield Evaluation(level, step, following)
        return
    yield Evaluation(level, step)
    yield dataclasses.replace(writer.add_noise(beyond, following), end=following)


def _ddpm(solver, writer, level, following, variance, **_):
    a, after, noisy = level.alpha_bar, following.alpha_bar, following.noise > 0
    yield Evaluation(level, ddpm_coefficients(a, after, writer.prediction, variance, writer.clip, noisy), following)


def _euler(solver, writer, level, following, **_):
    yield euler_step(writer, level, following)


def _heun(solver, writer, level, following, schedule, steps, **_):
    gamma = min(solver.churn / steps, math.sqrt(2) - 1) if solver.churn_min <= level.sigma <= solver.churn_max else 0.0
    highest = schedule.level(len(schedule) - 1.0).sigma
    if gamma and level.sigma < highest:
        noisier = schedule.at_sigma(min(level.sigma * (1 + gamma), highest))
        yield writer.add_noise(level, noisier, solver.churn_noise)
        level = noisier
    yield from heun_step(writer, level, following)


def _heun_flow(solver, writer, level, following, **_):
    yield from heun_flow_step(writer, level, following)


def _dpm2(solver, writer, level, following, schedule, **_):
    yield from dpm2_step(writer, level, following, schedule)


def _dpm3(solver, writer, level, following, schedule, **_):
    yield from dpm3_step(writer, level, following, schedule)


def _euler_maruyama(solver, writer, level, following, **_):
    yield euler_maruyama_step(writer, level, following)


def _predictor_corrector(solver, writer, level, following, **_):
    predictor = euler_maruyama_step(writer, level, following)
    if following.noise == 0:
        yield predictor
        return
    yield dataclasses.replace(predictor, end=None)
    yield langevin_step(writer, following, solver.snr)


def _analytic(solver, writer, level, following, noise_power, last, **_):
    power, ancestral = noise_power(level), solver.name == "analytic-ddpm"
    yield analytic_step(writer, level, following, power, ancestral, following == last)


def _consistency(solver, writer, level, following, **_):
    skip = skip_weight(level.sigma, solver.sigma_min, solver.sigma_data)
    yield renoising_step(writer, level, following, skip, solver.sigma_min)


def _dpdm(solver, writer, level, following, **_):
    yield renoising_step(writer, level, following)


_SINGLE: dict[str, Callable[..., Iterator[Evaluation]]] = {
    "ddim": _ddim,
    "ddim-renoised": _ddim_renoised,
    "ddpm": _ddpm,
    "euler": _euler,
    "heun": _heun,
    "heun-flow": _heun_flow,
    "dpm-2": _dpm2,
    "dpm-3": _dpm3,
    "euler-maruyama": _euler_maruyama,
    "predictor-corrector": _predictor_corrector,
    "analytic-ddpm": _analytic,
    "analytic-ddim": _analytic,
    "consistency": _consistency,
    "dpdm": _dpdm,
}


def as_solver(solver: "str | Solver") -> Solver:
    """A solver from its name, or itself.

    Args:
        solver: a name, or a :class:`Solver`.

    Returns:
        Solver.

    Raises:
        InputError: an unknown name, or something else.
    """
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise InputError(f"solver must be a name or a Solver, got {solver!r}")
    return Solver(solver)
