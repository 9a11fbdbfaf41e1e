"""The noise schedule: alpha_bar, sigma and log-SNR of every timestep in float64, their inverse, and lists of levels.

Timesteps run from 0 (almost clean) to T - 1 (almost noise). A state is x_t = sqrt(a) x0 + sqrt(1 - a) eps with a =
alpha_bar(t); sigma = sqrt((1 - a) / a) is the noise level of Karras et al. 2022 and lambda = -log sigma half the logarithm of
the signal-to-noise ratio (Lu et al. 2022). Between timesteps log sigma is linear in t.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..ops.arguments import whole

SPACINGS = ("leading", "trailing", "linspace", "karras", "log_snr", "dpdm", "flow")
"""Ways to place the levels of a run; see :meth:`Schedule.levels`."""

_TABLE: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}

DPDM_SIGMA_MIN = {4: 0.3, 5: 0.2, 6: 0.1, 7: 0.015, 8: 0.0035, 9: 0.00055}
"""Lowest noise level of DPDM's lists by their length (Data Prediction Denoising Models, table 7); 1e-4 for longer ones."""


@dataclass(frozen=True)
class Level:
    """Place of a state on the way from noise to image: x = alpha x0 + noise eps.

    Attributes:
        t: timestep that a network is told, in [0, T), between two timesteps too; -1 for the image itself.
        alpha: weight of the image.
        noise: weight of the noise.
        alpha_bar: alpha^2, before its square root was rounded.
    """

    t: float
    alpha: float
    noise: float
    alpha_bar: float

    @property
    def sigma(self) -> float:
        """noise / alpha; infinity where no image is left."""
        return self.noise / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """log(alpha / noise), lambda in Lu et al. 2022; infinity for the image, minus infinity for noise alone."""
        if not self.noise:
            return math.inf
        return math.log(self.alpha) - math.log(self.noise) if self.alpha else -math.inf


IMAGE = Level(-1.0, 1.0, 0.0, 1.0)
"""The level of images, at which every run ends."""


class Schedule:
    """The noise levels of a diffusion model's T timesteps.

    Args:
        alpha_bars: alpha_bar of timesteps 0 .. T - 1, a tensor ``(T,)`` or a sequence of numbers, falling within [0, 1].

    Attributes:
        alpha_bars: ``(T,)`` float64 on the CPU.

    Raises:
        InputError: numbers that do not fall within [0, 1].

    Examples:
        >>> Schedule.linear().levels("trailing", 4)[0].t
        999.0
    """

    def __init__(self, alpha_bars: torch.Tensor):
        a = torch.as_tensor(alpha_bars, **_TABLE).clone()
        if a.ndim != 1 or not len(a) or not ((a >= 0) & (a <= 1)).all() or not (a.diff() <= 0).all():
            raise InputError(f"alpha_bars must be (T,) numbers that fall within [0, 1], got {a}")
        self.alpha_bars = a
        self._log_sigmas = 0.5 * (torch.log1p(-a) - torch.log(a))

    @classmethod
    def linear(cls, timesteps: int = 1000, start: float = 1e-4, end: float = 0.02) -> "Schedule":
        """Linear betas (Ho et al. 2020).

        Args:
            timesteps: T.
            start: beta of timestep 0.
            end: beta of timestep T - 1.

        Returns:
            Schedule of T timesteps.
        """
        return cls((1 - torch.linspace(start, end, whole("timesteps", timesteps, 1), **_TABLE)).cumprod(0))

    @classmethod
    def cosine(cls, timesteps: int = 1000, offset: float = 0.008, most: float = 0.999) -> "Schedule":
        """cos^2 schedule (Nichol and Dhariwal 2021, eq. 17).

        Args:
            timesteps: T.
            offset: s, which keeps the first betas from vanishing.
            most: limit of every beta.

        Returns:
            Schedule of T timesteps.
        """
        ends = torch.arange(whole("timesteps", timesteps, 1) + 1, **_TABLE) / timesteps
        f = torch.cos((ends + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls((f[1:] / f[:-1]).clamp_min(1 - most).cumprod(0))

    @classmethod
    def edm(cls, timesteps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> "Schedule":
        """Noise levels of Karras et al. 2022, eq. 5, on a variance-preserving path: alpha_bar = 1 / (1 + sigma^2).

        Args:
            timesteps: T.
            sigma_min: noise level of timestep 0.
            sigma_max: noise level of timestep T - 1.
            rho: exponent; larger ones place more levels near ``sigma_min``.

        Returns:
            Schedule of T timesteps.
        """
        sigmas = karras_sigmas(whole("timesteps", timesteps, 1), sigma_min, sigma_max, rho)[::-1]
        return cls(1 / (1 + torch.tensor(sigmas, **_TABLE) ** 2))

    def __len__(self) -> int:
        return len(self.alpha_bars)

    def log_sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """log sigma at timesteps, linear between two of them.

        Args:
            t: timesteps in [0, T - 1], a number or a tensor of any shape; others are clamped.

        Returns:
            float64 tensor of ``t``'s shape, on its device.
        """
        wanted = _numbers(t).clamp(0, len(self) - 1)
        table = self._log_sigmas.to(wanted.device)
        below = wanted.floor().long().clamp_max(max(len(self) - 2, 0))
        above = (below + 1).clamp_max(len(self) - 1)
        share = wanted - below
        low, high = table[below], table[above]
        # Between a finite level and an infinite one (alpha_bar of 0 or 1) all are infinite.
        mixed = torch.where(low.isinf(), low, torch.where(high.isinf(), high, torch.lerp(low, high, share)))
        return torch.where(share == 0, low, torch.where(share == 1, high, mixed))

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """Noise level sigma = sqrt((1 - a) / a) at timesteps; arguments and result as in :meth:`log_sigma`.

        Args:
            t: timesteps in [0, T - 1].

        Returns:
            float64 tensor of ``t``'s shape, on its device.
        """
        return self.log_sigma(t).exp()

    def log_snr(self, t: torch.Tensor | float) -> torch.Tensor:
        """lambda = -log sigma at timesteps; arguments and result as in :meth:`log_sigma`.

        Args:
            t: timesteps in [0, T - 1].

        Returns:
            float64 tensor of ``t``'s shape, on its device.
        """
        return -self.log_sigma(t)

    def alpha_bar(self, t: torch.Tensor | float) -> torch.Tensor:
        """alpha_bar = 1 / (1 + sigma^2) at timesteps; arguments and result as in :meth:`log_sigma`.

        Args:
            t: timesteps in [0, T - 1].

        Returns:
            float64 tensor of ``t``'s shape, on its device.
        """
        return torch.sigmoid(-2 * self.log_sigma(t))

    def t(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The timestep of a noise level, between two timesteps in general: the inverse of :meth:`sigma`.

        Args:
            sigma: noise levels, a number or a tensor of any shape; below sigma(0) the result is 0, above sigma(T - 1) T - 1.

        Returns:
            float64 tensor of ``sigma``'s shape, on its device. A network must be given a tensor of it: diffusers rounds a
            Python float to a whole timestep.
        """
        wanted = torch.log(_numbers(sigma))
        table = self._log_sigmas.to(wanted.device)
        above = torch.searchsorted(table, wanted.contiguous()).clamp(0, len(self) - 1)
        below = (above - 1).clamp_min(0)
        gap = table[above] - table[below]
        share = torch.where((gap > 0) & (gap < math.inf), (wanted - table[below]) / gap, torch.zeros_like(wanted))
        inner = below + share.clamp(0, 1)
        # At or beyond an infinite last level, and at levels that repeat, the upper timestep is the level's own.
        return torch.where((wanted >= table[above]) | (above == 0), above.double(), inner)

    def level(self, t: float) -> Level:
        """Level of one timestep, which may lie between two.

        Args:
            t: timestep in [0, T - 1].

        Returns:
            Level with alpha = sqrt(alpha_bar) and noise = sqrt(1 - alpha_bar).

        Raises:
            InputError: ``t`` is outside the schedule.
        """
        if not 0 <= t <= len(self) - 1:
            raise InputError(f"timestep must be in [0, {len(self) - 1}], got {t}")
        a = float(self.alpha_bars[int(t)] if t == int(t) else self.alpha_bar(t))
        return Level(float(t), math.sqrt(a), math.sqrt(1 - a), a)

    def at_sigma(self, sigma: float) -> Level:
        """Level of one noise level, exactly; its timestep is :meth:`t`'s.

        Args:
            sigma: noise level within the schedule's.

        Returns:
            Level on the variance-preserving path.
        """
        if math.isinf(sigma):
            return Level(self.t(sigma).item(), 0.0, 1.0, 0.0)
        scale = math.hypot(1.0, sigma)
        return Level(self.t(sigma).item(), 1 / scale, sigma / scale, 1 / scale**2)

    def at_alpha_bar(self, alpha_bar: float) -> Level:
        """Level of one alpha_bar: a whole timestep's own where the table has it, else as :meth:`at_sigma`.

        Args:
            alpha_bar: in [0, 1), within the schedule's for the network's sake.

        Returns:
            Level on the variance-preserving path.

        Raises:
            InputError: ``alpha_bar`` outside [0, 1).
        """
        if not 0 <= alpha_bar < 1:
            raise InputError(f"alpha_bars must be in [0, 1), got {alpha_bar}")
        if len(whole_t := (self.alpha_bars == alpha_bar).nonzero()):
            return self.level(float(whole_t[0]))
        return self.at_sigma(math.sqrt((1 - alpha_bar) / alpha_bar) if alpha_bar else math.inf)

    def at_log_snr(self, log_snr: float) -> Level:
        """Level of one lambda = log(alpha / noise).

        Args:
            log_snr: within the schedule's.

        Returns:
            Level on the variance-preserving path.
        """
        return self.at_sigma(math.exp(-log_snr))

    def levels(self, spacing: str, steps: int, rho: float = 7.0) -> list[Level]:
        """Levels at which a run of ``steps`` steps begins each of them, from noise to image; it ends at :data:`IMAGE`.

        Args:
            spacing: ``leading`` (t = i floor(T / steps)), ``trailing`` (t = T - 1 first) and ``linspace`` (0 and T - 1 among
                them) are whole timesteps, as diffusers names them; ``karras`` (Karras et al. 2022, eq. 5), ``log_snr`` (equal
                steps of lambda) and ``dpdm`` (rho = 40, lowest level by number of steps) are noise levels within the
                schedule's, whose timesteps lie between whole ones; ``flow`` (equal steps of tau = 1 / (1 + sigma), Liu et al.
                2023) begins at noise alone, whatever the schedule's highest level is.
            steps: number of levels, in [1, T].
            rho: exponent of ``karras``.

        Returns:
            ``steps`` levels of falling noise.

        Raises:
            InputError: another spacing, a number of steps outside [1, T], or noise levels of a schedule that ends at
                alpha_bar = 0 or begins at 1, or lies below ``dpdm``'s.
        """
        if spacing not in SPACINGS:
            raise InputError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
        total, steps = len(self), whole("steps", steps)
        if not 1 <= steps <= total:
            raise InputError(f"steps must be between 1 and the schedule's {total} timesteps, got {steps}")
        if spacing in _TIMESTEPS:
            return [self.level(float(t)) for t in _TIMESTEPS[spacing](total, steps)]
        if spacing == "flow":
            return [self.at_sigma((steps - i) / i if i else math.inf) for i in range(steps)]
        if not self._log_sigmas.isfinite().all():
            raise InputError(f"spacing {spacing} needs finite noise levels; this schedule reaches alpha_bar 0 or 1")
        # The ends are levels of the table: exponentials of their logarithms would miss them by a rounding.
        first, last = self.level(total - 1.0), self.level(0.0)
        if spacing == "log_snr":
            sigmas = _geometric(steps, first.sigma, last.sigma)
        elif spacing == "dpdm":
            lowest = max(DPDM_SIGMA_MIN.get(steps, 0.3 if steps < 4 else 1e-4), last.sigma)
            if lowest >= first.sigma and steps > 1:
                raise InputError(f"spacing dpdm ends at sigma {lowest}, above this schedule's highest: take another spacing")
            lowest = min(lowest, first.sigma)
            return [first, *(self.at_sigma(sigma) for sigma in karras_sigmas(steps, lowest, first.sigma, 40.0)[1:])]
        else:
            sigmas = karras_sigmas(steps, last.sigma, first.sigma, rho)
        return [first, *(self.at_sigma(sigma) for sigma in sigmas[1:-1]), last][:steps]


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """Falling noise levels (max^(1/rho) + i/(steps - 1) (min^(1/rho) - max^(1/rho)))^rho (Karras et al. 2022, eq. 5).

    Args:
        steps: number of levels; a single one is ``sigma_max``.
        sigma_min: last level, positive.
        sigma_max: first level.
        rho: exponent, positive.

    Returns:
        ``steps`` floats.

    Raises:
        InputError: a ``rho`` or a level that is not positive, or ``sigma_max`` below ``sigma_min``.
    """
    if not 0 < sigma_min <= sigma_max < math.inf or not 0 < rho < math.inf:
        raise InputError(f"0 < sigma_min <= sigma_max and rho > 0 must hold, got {sigma_min}, {sigma_max} and {rho}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / max(steps - 1, 1) * (low - high)) ** rho for i in range(steps)]


def _numbers(value):
    """A number or a tensor in float64; a number on the CPU, whatever torch's default device is."""
    return value.double() if isinstance(value, torch.Tensor) else torch.tensor(value, **_TABLE)


def _geometric(steps, first, last):
    return [first * (last / first) ** (i / max(steps - 1, 1)) for i in range(steps)]


def _leading(total, steps):
    return [total // steps * i for i in reversed(range(steps))]


def _trailing(total, steps):
    # The roundings of diffusers, which decide ties; its range has one number too many where they fall badly.
    return (np.arange(total, 0, -total / steps).round() - 1).tolist()[:steps]


def _linspace(total, steps):
    return np.linspace(0, total - 1, steps).round()[::-1].tolist() if steps > 1 else [total - 1]


_TIMESTEPS: dict[str, Callable[[int, int], list[float]]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}
