"""The coefficients of sampler steps, in float64: the rows that :func:`advkd.ops.sampler_step` takes.

Notation: ``a_t`` is alpha_bar of the state's timestep and ``a_s`` that of the next state's, with x_t = sqrt(a_t) x0 +
sqrt(1 - a_t) eps. ``sigma`` is the noise level of Karras et al. 2022, sqrt(1 - a) / sqrt(a). ``prediction`` names the network's
output m as diffusers does: ``epsilon`` is the noise, ``sample`` is x0, ``v_prediction`` is sqrt(a_t) eps - sqrt(1 - a_t) x0
(Salimans and Ho 2022), and ``flow_prediction`` is the velocity of a straight path.

Every function takes plain floats, alpha_bars in [0, 1], and returns floats or the :class:`~advkd.ops.StepCoefficients` of a
step; it raises :class:`~advkd.errors.InputError` where its formula is undefined.
"""

import math

from ..errors import InputError
from ..ops import StepCoefficients
from .prediction import eps_weights, require_prediction, x0_weights

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
"""Variances of the ancestral step that do not come from the network; the first two are one variance written in two ways."""

OF_A_TIMESTEP = ("epsilon", "sample", "v_prediction")
"""Kinds of output that networks told a timestep have."""


def x0_coefficients(a_t: float, prediction: str) -> tuple[float, float]:
    """Coefficients of x0 in the state x and the network's output m.

    Args:
        a_t: alpha_bar of the state's timestep, in [0, 1].
        prediction: ``epsilon``, ``sample`` or ``v_prediction``.

    Returns:
        ``(k_x, k_m)`` with x0 = k_x x + k_m m.

    Raises:
        InputError: another ``prediction``, or ``epsilon`` at ``a_t`` = 0, where the state holds no signal.
    """
    require_prediction(prediction, OF_A_TIMESTEP)
    return x0_weights(math.sqrt(a_t), math.sqrt(1 - a_t), prediction)


def noise_coefficients(a_t: float, prediction: str) -> tuple[float, float]:
    """Coefficients of the noise eps in the state x and the network's output m.

    Args:
        a_t: alpha_bar of the state's timestep, in [0, 1].
        prediction: ``epsilon``, ``sample`` or ``v_prediction``.

    Returns:
        ``(e_x, e_m)`` with eps = e_x x + e_m m.

    Raises:
        InputError: another ``prediction``, or ``sample`` at ``a_t`` = 1, where the state holds no noise.
    """
    require_prediction(prediction, OF_A_TIMESTEP)
    return eps_weights(math.sqrt(a_t), math.sqrt(1 - a_t), prediction)


def ddim_coefficients(
    a_t: float, a_s: float, prediction: str, eta: float = 0.0, clip: float = math.inf, clipped_eps: bool = False
) -> StepCoefficients:
    """DDIM (Song et al. 2020, eq. 12; the noise's deviation is eta times that of eq. 16).

    Args:
        a_t: alpha_bar of the state, in [0, 1].
        a_s: alpha_bar of the state after the step (1 for the step to the image).
        prediction: ``epsilon``, ``sample`` or ``v_prediction``.
        eta: 0 for the deterministic sampler, 1 for the ancestral one.
        clip: x0 is clamped to [-clip, clip]; infinity clamps nothing.
        clipped_eps: derive the noise that is used again from the clamped x0 (diffusers' ``use_clipped_model_output``); it is
            otherwise the network's, before clamping.

    Returns:
        Coefficients for :func:`advkd.ops.sampler_step`; ``c_z``, the noise's deviation, is 0 where ``eta`` is 0.

    Raises:
        InputError: another ``prediction``; one that has no x0 at ``a_t`` = 0 or no noise at ``a_t`` = 1; with ``eta``, noise
            where none can be added (``a_t`` = 1, ``a_s`` = 0 or ``a_t`` > ``a_s``) or more than the next state has.

    Examples:
        >>> step = ddim_coefficients(a_t=0.25, a_s=0.5, prediction="epsilon", clip=1.0)
        >>> x_next, _, _ = advkd.ops.sampler_step(x, network_output, step)
    """
    k_x, k_m = x0_coefficients(a_t, prediction)
    deviation = eta * math.sqrt(_posterior_variance(a_t, a_s)) if eta else 0.0
    remaining = 1 - a_s - deviation**2
    if remaining < -1e-12:
        raise InputError(f"eta = {eta} asks for more noise than the next state has")
    direction = math.sqrt(max(remaining, 0.0))
    c_0 = math.sqrt(a_s)
    if not clipped_eps:
        e_x, e_m = noise_coefficients(a_t, prediction)
        return StepCoefficients(k_x, k_m, c_0, direction * e_x, direction * e_m, c_z=deviation, clip=clip)
    # eps = (x - sqrt(a_t) x0) / sqrt(1 - a_t) is the noise of a sample prediction whose output is the clamped x0.
    e_x, e_0 = noise_coefficients(a_t, "sample")
    return StepCoefficients(k_x, k_m, c_0 + direction * e_0, direction * e_x, c_z=deviation, clip=clip)


def ddpm_coefficients(
    a_t: float,
    a_s: float,
    prediction: str,
    variance_type: str = "fixed_small",
    clip: float = math.inf,
    noisy: bool = True,
) -> StepCoefficients:
    """DDPM's ancestral step (Ho et al. 2020, eq. 6 and 7, with beta = 1 - a_t / a_s, so that steps may be skipped).

    Args:
        a_t: alpha_bar of the state, below 1 and at most ``a_s``.
        a_s: alpha_bar of the state after the step, above 0 (1 for the step to the image).
        prediction: ``epsilon``, ``sample`` or ``v_prediction``.
        variance_type: one of :data:`VARIANCES`: eq. 7's posterior variance (at least 1e-20), or beta for ``fixed_large``.
        clip: x0 is clamped to [-clip, clip]; infinity clamps nothing.
        noisy: False for the step at t = 0, which adds no noise.

    Returns:
        Coefficients for :func:`advkd.ops.sampler_step`; ``c_z`` is the noise's deviation, or 0.

    Raises:
        InputError: another ``variance_type`` or ``prediction``, ``epsilon`` at ``a_t`` = 0, or alpha_bars between which no
            noise can be added (``a_t`` = 1, ``a_s`` = 0 or ``a_t`` > ``a_s``).
    """
    if variance_type not in VARIANCES:
        raise InputError(f"variance_type must be one of {', '.join(VARIANCES)}, got {variance_type!r}")
    k_x, k_m = x0_coefficients(a_t, prediction)
    small, beta = _posterior_variance(a_t, a_s), 1 - a_t / a_s
    c_0, c_x = math.sqrt(a_s) * beta / (1 - a_t), math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t)
    variance = beta if variance_type == "fixed_large" else max(small, 1e-20)
    return StepCoefficients(k_x, k_m, c_0, c_x, c_z=math.sqrt(variance) if noisy else 0.0, clip=clip)


def euler_coefficients(sigma: float, sigma_next: float, prediction: str) -> StepCoefficients:
    """Euler's step without churn (Karras et al. 2022, algorithm 1): x + (sigma_next - sigma) (x - x0) / sigma.

    The state is x0 + sigma eps here.

    Args:
        sigma: noise level of the state, positive.
        sigma_next: noise level after the step; 0 for the image.
        prediction: ``epsilon``, ``sample`` or ``v_prediction``.

    Returns:
        Coefficients for :func:`advkd.ops.sampler_step`, without noise and clipping.

    Raises:
        InputError: ``sigma`` is not positive, or another ``prediction``.
    """
    if sigma <= 0:
        raise InputError(f"sigma must be positive, got {sigma}")
    require_prediction(prediction, OF_A_TIMESTEP)
    if prediction == "epsilon":
        # (x - x0) / sigma is the network's output itself.
        return StepCoefficients(1.0, -sigma, 0.0, 1.0, sigma_next - sigma)
    ratio = sigma_next / sigma
    return StepCoefficients(*x0_weights(1.0, sigma, prediction), 1 - ratio, ratio)


def dpmsolver_coefficients(
    sigma: float,
    sigma_next: float,
    prediction: str,
    sigma_previous: float | None = None,
    solver_type: str = "midpoint",
    flow: bool = False,
) -> StepCoefficients:
    """DPM-Solver++ of first order, or the second-order multistep 2M (Lu et al. 2022b, algorithm 2).

    Args:
        sigma: noise level of the state, positive.
        sigma_next: noise level after the step; 0 for the image, to which only the first order goes.
        prediction: ``epsilon``, ``sample``, ``v_prediction`` or ``flow_prediction``.
        sigma_previous: noise level of the step before, for the second order; None for the first.
        solver_type: ``midpoint`` (the paper's 2M) or ``heun``, which integrates the slope of x0 exactly; second order only.
        flow: sigma runs along the straight path x = (1 - sigma) x0 + sigma eps; otherwise the path preserves variance.

    A step between equal noise levels leaves the state as it is (the limit; diffusers' ``heun`` has 0 / 0 there).

    Returns:
        Coefficients for :func:`advkd.ops.sampler_step`; ``c_h`` weights the previous step's x0 in the second order.

    Raises:
        InputError: ``sigma`` is not positive, no signal is left (with ``flow``, a sigma of 1 or more), another ``prediction``
            or ``solver_type``, or a second-order step across a log-SNR gap that is infinite or, for the step before, 0.
    """
    if sigma <= 0:
        raise InputError(f"sigma must be positive, got {sigma}")
    alpha_s, sigma_s = path_weights(sigma, flow)
    alpha_t, sigma_t = path_weights(sigma_next, flow)
    k_x, k_m = x0_weights(alpha_s, sigma_s, prediction)
    h = _log_snr(alpha_t, sigma_t) - _log_snr(alpha_s, sigma_s)
    first, c_x = -alpha_t * math.expm1(-h), sigma_t / sigma_s
    if sigma_previous is None:
        return StepCoefficients(k_x, k_m, first, c_x)
    h_0 = _log_snr(alpha_s, sigma_s) - _log_snr(*path_weights(sigma_previous, flow))
    if h_0 == 0 or math.isinf(h_0) or math.isinf(h):
        raise InputError(
            f"no second-order step from sigma {sigma_previous} and {sigma} to {sigma_next}: a log-SNR gap is 0 or infinite"
        )
    # The factor of x0 - x0_prev: the slope D1 = (h / h_0) (x0 - x0_prev) times its weight.
    if solver_type == "midpoint":
        second = first * h / h_0 / 2
    elif solver_type == "heun":
        second = alpha_t * (math.expm1(-h) + h) / h_0
    else:
        raise InputError(f"solver_type must be midpoint or heun, got {solver_type!r}")
    return StepCoefficients(k_x, k_m, first + second, c_x, c_h=-second)


def _posterior_variance(a_t, a_s):
    """Variance of x_s given x_t and x0 (Ho et al. 2020, eq. 7; Song et al. 2020, eq. 16 with eta = 1)."""
    if not a_t <= a_s or a_t == 1 or a_s == 0:
        raise InputError(f"no noise can be added between alpha_bar = {a_t} and {a_s}")
    return (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)


def path_weights(sigma: float, flow: bool) -> tuple[float, float]:
    """Weights of x0 and of the noise in a state at a noise level.

    Args:
        sigma: noise level.
        flow: sigma runs along the straight path x = (1 - sigma) x0 + sigma eps; otherwise the path preserves variance.

    Returns:
        ``(alpha, noise)`` with x = alpha x0 + noise eps.
    """
    if flow:
        return 1 - sigma, sigma
    alpha = 1 / math.sqrt(sigma**2 + 1)
    return alpha, sigma * alpha


def _log_snr(alpha, sigma):
    """Half the logarithm of the signal-to-noise ratio, lambda in Lu et al. 2022b."""
    if alpha <= 0:
        raise InputError(f"no signal left: alpha = {alpha}")
    return math.log(alpha) - math.log(sigma) if sigma > 0 else math.inf
