"""Stochastic solvers: steps that add noise.

Each function gives the evaluation of one step from ``level`` to ``following``; D is the network's clamped x0, and the score of
the state is (alpha D - x) / noise^2. To the image the step is its mean.
"""

import math
from typing import Any

from ..errors import InputError
from .program import Evaluation, Writer
from .schedule import Level


def euler_maruyama_step(writer: Writer, level: Level, following: Level) -> Evaluation:
    """Euler-Maruyama's step of the reverse variance-preserving equation (Song et al. 2021, eq. 6 and 11).

    x' = x + b / 2 x + b score + sqrt(b) z, with b = log(alpha_bar' / alpha_bar) the integral of beta over the step.

    Args:
        writer: of the network's kind.
        level: level of the state, on the variance-preserving path.
        following: level after the step; the image is reached by D.

    Returns:
        Evaluation.

    Raises:
        InputError: no image is left at ``level``.
    """
    if following.noise == 0:
        return writer.evaluate(level, x0=1.0, end=following)
    if level.alpha == 0:
        raise InputError("the reverse equation cannot begin at alpha_bar = 0")
    b = 2 * math.log(following.alpha / level.alpha)
    x, x0 = score_weights(level, b)
    return writer.evaluate(level, x0=x0, x=1 + b / 2 + x, noise=math.sqrt(b), end=following)


def langevin_step(writer: Writer, level: Level, snr: float) -> Evaluation:
    """Langevin's corrector (Song et al. 2021, algorithm 4): x' = x + d score + sqrt(2 d) z.

    The paper sets d = 2 (snr |z| / |score|)^2 by the norms of a batch. Their expectations for a white state, of which |score|
    is |z| / noise, make it d = 2 (snr noise)^2: a number of the schedule. The authors' code also multiplies d by 1 - beta_t on
    variance-preserving paths; a run of few steps has no such beta, and it is left out.

    Args:
        writer: of the network's kind.
        level: level of the state, which it stays at.
        snr: ratio of the noise to the score.

    Returns:
        Evaluation.
    """
    d = 2 * (snr * level.noise) ** 2
    x, x0 = score_weights(level, d)
    return writer.evaluate(level, x0=x0, x=1 + x, noise=math.sqrt(2 * d), end=level)


def skip_weight(sigma: Any, sigma_min: float, sigma_data: float) -> Any:
    """Weight of the state in a consistency function, s^2 / ((sigma - sigma_min)^2 + s^2) (Song et al. 2023, appendix C).

    Args:
        sigma: noise level, a number or a tensor; infinity has the weight 0.
        sigma_min: level at which the function is the identity: its weight is 1 there, exactly.
        sigma_data: s, positive.

    Returns:
        Weight in (0, 1], of ``sigma``'s kind.
    """
    return sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)


def renoising_step(writer: Writer, level: Level, following: Level, skip: float = 0.0, sigma_min: float = 0.0) -> Evaluation:
    """Denoise to an image, and add the noise of the next level (Song et al. 2023, algorithm 1; DPDM, algorithm 2).

    The image is f = skip y + (1 - skip) D with y = x / alpha, and x' = alpha' (f + sqrt(sigma'^2 - sigma_min^2) z).

    Args:
        writer: of the network's kind.
        level: level of the state, with some image in it where ``skip`` is positive.
        following: level after the step, not below ``sigma_min``, or the image.
        skip: weight of the state.
        sigma_min: noise level that the network's images have.

    Returns:
        Evaluation.

    Raises:
        InputError: a level after the step below ``sigma_min``.
    """
    if 0 < following.sigma < sigma_min:
        raise InputError(f"sigma_min must not be above the levels of the run, {following.sigma:.3g}, got {sigma_min}")
    noise = following.alpha * math.sqrt(following.sigma**2 - sigma_min**2) if following.noise else 0.0
    kept = following.alpha * skip / level.alpha if skip else 0.0
    return writer.evaluate(level, x0=following.alpha * (1 - skip), x=kept, noise=noise, end=following)


def score_weights(level: Level, weight: float) -> tuple[float, float]:
    """Weights of the state and of x0 that are ``weight`` times the score.

    Args:
        level: level of the state.
        weight: factor of the score.

    Returns:
        ``(x, x0)``.
    """
    return -weight / level.noise**2, weight * level.alpha / level.noise**2


GREY_VALUES = 2
"""Most noise, in grey values of 255 and in the mean, that Analytic-DPM leaves in an image before the last step."""


def analytic_step(
    writer: Writer, level: Level, following: Level, noise_power: float, ancestral: bool, last_noise: bool = False
) -> Evaluation:
    """Analytic-DPM's step (Bao et al. 2022, eq. 6 and 8): the optimal variance beside DDPM's or DDIM's mean.

    sigma*^2 = l^2 + (sqrt(a') - sqrt((1 - a' - l^2) a / (1 - a)))^2 V with V the mean variance of x0 given the state,
    (1 - a) / a (1 - E|eps|^2 / d), and l^2 the posterior variance (DDPM) or 0 (DDIM). Images are clipped as in the paper's
    appendix F: V lies in [0, 1], the noise before the last step is at most 2 grey values of 255 in the mean, and the last step
    adds none.

    Args:
        writer: of the network's kind.
        level: level of the state.
        following: level after the step.
        noise_power: E|eps|^2 / d at ``level``, that is (1 - a) Gamma with Gamma = E|score|^2 / d.
        ancestral: DDPM's mean (l^2 > 0); else DDIM's.
        last_noise: True for the step before the last one.

    Returns:
        Evaluation.
    """
    a, after = level.alpha_bar, following.alpha_bar
    own = level.noise**2
    posterior = following.noise**2 / own * (1 - a / after) if ancestral else 0.0
    direction = math.sqrt(max(following.noise**2 - posterior, 0.0))
    variance, images = x0_variance(level, noise_power, writer.clip), math.isfinite(writer.clip)
    total = posterior + (following.alpha - direction * level.alpha / level.noise) ** 2 * variance
    deviation = math.sqrt(total)
    if images and following.noise == 0:
        deviation = 0.0
    elif images and last_noise:
        # The mean of |z| is sqrt(2 / pi), and a grey value 2 / 255 in [-1, 1].
        deviation = min(deviation, GREY_VALUES * 2 / 255 * math.sqrt(math.pi / 2))
    return writer.evaluate(
        level,
        x0=following.alpha - direction * level.alpha / level.noise,
        x=direction / level.noise,
        noise=deviation,
        end=following,
    )


def x0_variance(level: Level, noise_power: float, clip: float) -> float:
    """Mean variance of x0 given a state, (1 - a) / a (1 - E|eps|^2 / d); at most that of images, 1, where x0 is clamped.

    Args:
        level: level of the state.
        noise_power: E|eps|^2 / d at ``level``.
        clip: x0 is clamped to [-clip, clip]; infinity for data that are no images.

    Returns:
        Mean over states and dimensions, at least 0.
    """
    variance = level.noise**2 / level.alpha_bar * max(1 - noise_power, 0.0)
    return min(variance, 1.0) if math.isfinite(clip) else variance
