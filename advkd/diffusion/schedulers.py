"""Drop-in diffusers schedulers whose step is one pass over memory, :func:`advkd.ops.sampler_step`.

    pipe.scheduler = FusedDDIMScheduler.from_config(pipe.scheduler.config)

Each is a subclass of diffusers' own: same constructor, configuration, ``set_timesteps``, bookkeeping and outputs; only ``step``
differs. Its coefficients are computed in float64 from the scheduler's own float32 ``alphas_cumprod`` or ``sigmas``, once
after each ``set_timesteps``, and lie on the device as one table. Noise is drawn from the caller's generator, number for number
as diffusers draws it. Diffusers' own code runs for everything that the fused step does not cover (dynamic thresholding, learned
variances, churn, order 3, stochastic solvers, gradients, ...), and a warning says so once per scheduler and reason.

A pipeline saved with one of these schedulers names diffusers' class, so that it loads where advkd is not installed. After
loading, the line above puts the fused scheduler back; or ``from_pretrained`` is given
``scheduler=FusedDDIMScheduler.from_pretrained(folder, subfolder="scheduler")``.

A timestep outside [0, T) is refused by all of them; each class names its further refusals. The tables are made anew when a
tensor that they come from holds other numbers, however these were written; see :meth:`FusedStep._refresh` for GPU tensors.
Torch's default dtype and device do not change a step; constructors and ``set_timesteps`` are diffusers' own, under them too.
"""

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import logging

from ..errors import InputError
from ..ops.arguments import flag, real
from .coefficients import VARIANCES, ddim_coefficients, ddpm_coefficients, dpmsolver_coefficients, euler_coefficients
from .fused_step import FusedSigmas, FusedVariancePreserving, saved_as_diffusers_class, step_output
from .step_arguments import GRADIENT, for_diffusers, scalar, why_unfit
from .step_tables import Table, or_reason

__all__ = ["FusedDDIMScheduler", "FusedDDPMScheduler", "FusedDPMSolverMultistepScheduler", "FusedEulerDiscreteScheduler"]

Generators = torch.Generator | list[torch.Generator] | None

_LOGGER = logging.get_logger(__name__)
_LEARNED = ("learned", "learned_range")


@saved_as_diffusers_class
class FusedDDIMScheduler(FusedVariancePreserving, DDIMScheduler):
    """diffusers' ``DDIMScheduler`` (Song et al. 2020) with a fused step.

    As in diffusers, any timestep t in [0, T) may be stepped from, in the schedule or not, and the step goes to
    t - T // num_inference_steps. Diffusers' own code runs for dynamic thresholding, for an epsilon prediction at alpha_bar = 0,
    for eta < 0 or so large that the next state cannot hold the noise, and where a gradient is wanted.

    ``set_step_options`` names a backend, makes the noise from a seed within the step, or leaves x0 out. With a backend or a
    seed, ``step`` refuses what the fused step does not cover.

    Examples:
        >>> pipe.scheduler = FusedDDIMScheduler.from_config(pipe.scheduler.config)
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """The state at the timestep before, and x0.

        Args:
            model_output: the network's output ``(N, ...)``, float32, bfloat16, float16 or float64.
            sample: the state ``(N, ...)``, in any of these dtypes, on the same device.
            timestep: int or tensor of one element in [0, T). An element of ``timesteps`` is not read from the device.
            eta: weight of the step's noise: 0 for the deterministic sampler, 1 for the ancestral one.
            use_clipped_model_output: derive the noise that is used again from the clamped x0; None means False.
            generator: source of the noise, or a list of one a sample; None: torch's own, or ``set_step_options``'s seed.
            variance_noise: the step's noise instead of a draw, of the shape of ``sample`` or one that is expanded to it.
            return_dict: False for a tuple.

        Returns:
            ``DDIMSchedulerOutput(prev_sample, pred_original_sample)`` or the tuple of both, in diffusers' dtypes.

        Raises:
            InputError: a timestep outside [0, T), tensors, numbers or a generator that do not fit, or a generator or noise
                beside a seed.
            ValueError: diffusers' own, before ``set_timesteps``, or for both ``generator`` and ``variance_noise``.
        """
        self._require(model_output, sample, generator, variance_noise)
        (eta, own_eta), return_dict = scalar("eta", eta), flag("return_dict", return_dict)
        # diffusers' own pipeline passes None.
        given = False if use_clipped_model_output is None else use_clipped_model_output
        use_clipped_model_output = flag("use_clipped_model_output", given)
        arguments = (model_output, timestep, sample, own_eta, use_clipped_model_output, generator, variance_noise, return_dict)
        if self.num_inference_steps is None or (eta > 0 and variance_noise is not None and generator is not None):
            # Diffusers raises its own error.
            return super().step(*arguments)
        self._refresh()
        t = self._timestep(timestep)
        variant = (eta, use_clipped_model_output)
        table = self._cached(variant, lambda: Table(self._schedule(), lambda t: self._coefficients(t, *variant)))
        step = table[t] if t in table.positions else or_reason(lambda t: self._coefficients(t, *variant), t)
        reason = self._uncovered(eta) or why_unfit(model_output, sample, variance_noise)
        if own_eta is not eta:
            reason = GRADIENT
        if reason or isinstance(step, str):
            self._own_code(reason or step)
            return super().step(model_output, for_diffusers(timestep, t), *arguments[2:])
        position = table.positions.get(t)
        noise = self._noise(model_output, generator, variance_noise, position) if eta > 0 else None
        coefficients = step if position is None else (table, t)
        return self._finish(DDIMSchedulerOutput, sample, model_output, coefficients, noise, return_dict)

    def _sources(self):
        return self.alphas_cumprod, self.final_alpha_cumprod, self.num_inference_steps

    def _uncovered(self, eta):
        if self.config.thresholding:
            return "dynamic thresholding"
        return "eta < 0" if eta < 0 else None

    def _coefficients(self, t, eta, clipped_eps):
        following = t - self.config.num_train_timesteps // self.num_inference_steps
        a_s = self._alpha_bar(following) if following >= 0 else float(self.final_alpha_cumprod)
        return ddim_coefficients(self._alpha_bar(t), a_s, self.config.prediction_type, eta, self._clip(), clipped_eps)


@saved_as_diffusers_class
class FusedDDPMScheduler(FusedVariancePreserving, DDPMScheduler):
    """diffusers' ``DDPMScheduler`` (Ho et al. 2020) with a fused step.

    Before ``set_timesteps`` a step goes from t to t - 1, as in diffusers; afterwards only timesteps of the schedule are
    accepted (diffusers raises an ``IndexError`` for others). Diffusers' own code runs for dynamic thresholding, for learned
    variances and ``fixed_large_log``, for an epsilon prediction at alpha_bar = 0, and where a gradient is wanted.

    ``pipe.scheduler = FusedDDPMScheduler.from_config(pipe.scheduler.config)`` puts it into a pipeline. ``set_step_options``
    names a backend, makes the noise from a seed within the step, or leaves x0 out. With a backend or a seed, ``step`` refuses
    what the fused step does not cover.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple:
        """The state at the timestep before, and x0.

        Args:
            model_output: the network's output ``(N, ...)``, float32, bfloat16, float16 or float64.
            sample: the state ``(N, ...)``, in any of these dtypes, on the same device.
            timestep: int or tensor of one element, of the schedule. An element of ``timesteps`` is not read from the device.
            generator: source of the noise, or a list of one a sample; None: torch's own, or ``set_step_options``'s seed.
            return_dict: False for a tuple.

        Returns:
            ``DDPMSchedulerOutput(prev_sample, pred_original_sample)`` or the tuple of both, in diffusers' dtypes.

        Raises:
            InputError: a timestep that is not in the schedule, tensors or a generator that do not fit, or a generator beside a
                seed.
        """
        self._require(model_output, sample, generator)
        return_dict = flag("return_dict", return_dict)
        self._refresh()
        t = self._timestep(timestep)
        table = self._cached("steps", self._table)
        if t not in table.positions:
            raise self._bad_timestep(t)
        reason = self._uncovered() or why_unfit(model_output, sample)
        if reason or isinstance(table[t], str):
            self._own_code(reason or table[t])
            return super().step(model_output, for_diffusers(timestep, t), sample, generator, return_dict)
        noise = self._noise(model_output, generator, None, table.positions[t]) if t > 0 else None
        return self._finish(DDPMSchedulerOutput, sample, model_output, (table, t), noise, return_dict)

    def _sources(self):
        return self.alphas_cumprod, self.num_inference_steps, self.custom_timesteps

    def _learns_variance(self):
        return self.variance_type in _LEARNED

    def _uncovered(self):
        if self.config.thresholding:
            return "dynamic thresholding"
        # diffusers reads the one here and the other there.
        for variance_type in (self.variance_type, self.config.variance_type):
            if variance_type not in VARIANCES or variance_type != self.variance_type:
                return f"variance_type {variance_type!r}"
        return None

    def _table(self):
        schedule = self._schedule()
        chosen = self.custom_timesteps or self.num_inference_steps
        following = dict(zip(schedule, [*schedule[1:], -1] if chosen else [t - 1 for t in schedule]))
        return Table(schedule, lambda t: self._coefficients(t, following[t]))

    def _coefficients(self, t, following):
        a_s = self._alpha_bar(following) if following >= 0 else 1.0
        variance_type = self.config.variance_type if self.config.variance_type in VARIANCES else VARIANCES[0]
        return ddpm_coefficients(self._alpha_bar(t), a_s, self.config.prediction_type, variance_type, self._clip(), t > 0)


@saved_as_diffusers_class
class FusedEulerDiscreteScheduler(FusedSigmas, EulerDiscreteScheduler):
    """diffusers' ``EulerDiscreteScheduler`` (Karras et al. 2022, algorithm 1) with a fused step.

    The first step of a run starts at the begin index, or at its timestep, which must then be in the schedule (diffusers raises
    an ``IndexError`` for others); later steps count, and of their timestep only the range is looked at. Diffusers' own code
    runs for ``s_churn`` other than 0 and where a gradient is wanted, by ``s_churn`` too.

    ``pipe.scheduler = FusedEulerDiscreteScheduler.from_config(pipe.scheduler.config)`` puts it into a pipeline.
    ``set_step_options`` names a backend or leaves x0 out. With a backend, ``step`` refuses what the fused step does not cover.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple:
        """The state at the next noise level, and x0.

        Args:
            model_output: the network's output ``(N, ...)``, float32, bfloat16, float16 or float64.
            sample: the state ``(N, ...)``, in any of these dtypes, on the same device.
            timestep: element of ``timesteps``; an int is refused, as in diffusers.
            s_churn: strength of the churn (Karras et al. 2022, algorithm 2), whose noise diffusers' own code makes; 0 for none.
            s_tmin: lowest noise level that is churned.
            s_tmax: highest noise level that is churned.
            s_noise: factor of the churn's noise.
            generator: source of the churn's noise, or a list with one for each sample.
            return_dict: False for a tuple.

        Returns:
            ``EulerDiscreteSchedulerOutput(prev_sample, pred_original_sample)`` or the tuple of both, in diffusers' dtypes:
            ``prev_sample`` in ``model_output``'s, x0 in float32 where it is computed.

        Raises:
            InputError: a first timestep that is not in the schedule, tensors, numbers or a generator that do not fit, or a step
                after the last.
            ValueError: diffusers' own, for a timestep that is an int.
        """
        self._require(model_output, sample, generator)
        (s_churn, own_churn), (_, own_noise) = scalar("s_churn", s_churn), scalar("s_noise", s_noise)
        s_tmin, s_tmax = real("s_tmin", s_tmin, constant=False), real("s_tmax", s_tmax, constant=False)
        return_dict = flag("return_dict", return_dict)
        arguments = (model_output, timestep, sample, own_churn, s_tmin, s_tmax, own_noise, generator, return_dict)
        if isinstance(timestep, (int, torch.IntTensor, torch.LongTensor)):
            # Diffusers raises its own error.
            return super().step(*arguments)
        position = self._begin(timestep)
        table = self._cached("steps", lambda: Table(range(len(self.sigmas) - 1), self._coefficients))
        churns = s_churn != 0 or own_churn is not s_churn
        reason = "s_churn (noise added at each step)" if churns else why_unfit(model_output, sample)
        if reason or isinstance(table[position], str):
            self._own_code(reason or table[position])
            return super().step(*arguments)
        if not self.is_scale_input_called:
            _LOGGER.warning("scale_model_input was not called before step: the network has seen a sample of the wrong scale")
        wanted, out = self._options.return_x0, model_output.dtype
        # x0 is float32 as in diffusers; where nobody wants it, half-precision states need not be widened.
        dtype = out if out == sample.dtype and not wanted else torch.promote_types(torch.float32, out)
        x_next, x0 = self._advance(sample, model_output, (table, position), dtype, x0=wanted)
        self._step_index += 1
        x0_dtype = out if self._predicts_sample() else dtype
        return step_output(EulerDiscreteSchedulerOutput, x_next.to(out), x0, x0_dtype, return_dict)

    def index_for_timestep(self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """The position of a timestep in the schedule, as in diffusers: of one that repeats, the second.

        Args:
            timestep: number, or a tensor of one element.
            schedule_timesteps: tensor ``(K,)`` to look in; None: ``timesteps``.

        Returns:
            Index in [0, K).

        Raises:
            InputError: the schedule does not hold the timestep.
        """
        try:
            return super().index_for_timestep(timestep, schedule_timesteps)
        except IndexError as error:
            raise self._bad_timestep(timestep) from error

    def _coefficients(self, position):
        prediction = "sample" if self._predicts_sample() else self.config.prediction_type
        return euler_coefficients(*self._sigmas()[position : position + 2], prediction)


@saved_as_diffusers_class
class FusedDPMSolverMultistepScheduler(FusedSigmas, DPMSolverMultistepScheduler):
    """diffusers' ``DPMSolverMultistepScheduler`` (Lu et al. 2022b) with a fused step: ``dpmsolver++`` of order 1 or 2.

    The first step of a run starts at the begin index or at its timestep; as in diffusers, one in [0, T) that is not in the
    schedule means the last step. Later steps count. Diffusers' own code runs for the other algorithms, order 3, dynamic
    thresholding, learned variances, and where a gradient is wanted.

    ``pipe.scheduler = FusedDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`` puts it into a pipeline.
    ``set_step_options`` names a backend. With one, ``step`` refuses what the fused step does not cover.
    """

    lower_order_nums: int

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:
        """The state at the next noise level.

        Args:
            model_output: the network's output ``(N, ...)``, float32, bfloat16, float16 or float64.
            sample: the state ``(N, ...)``, in any of these dtypes, on the same device.
            timestep: element of ``timesteps``.
            generator: source of the noise of stochastic algorithms, which diffusers' own code runs, or a list of them.
            variance_noise: that noise itself, of the shape of ``sample`` or one that is expanded to it.
            return_dict: False for a tuple.

        Returns:
            ``SchedulerOutput(prev_sample)`` or a tuple of it, in diffusers' dtypes.

        Raises:
            InputError: a timestep outside [0, T), tensors or a generator that do not fit, or a step after the last.
            ValueError: diffusers' own, before ``set_timesteps``.
        """
        self._require(model_output, sample, generator, variance_noise)
        return_dict = flag("return_dict", return_dict)
        arguments = (model_output, timestep, sample, generator, variance_noise, return_dict)
        if self.num_inference_steps is None:
            # Diffusers raises its own error.
            return super().step(*arguments)
        key = (self._begin(timestep), self._order())
        table = self._cached("steps", self._table)
        history = self.model_outputs[-1] if key[1] == 2 else None
        reason = self._uncovered() or why_unfit(model_output, sample, history)
        if reason or isinstance(table[key], str):
            self._own_code(reason or table[key])
            return super().step(*arguments)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        out = model_output.dtype if self._predicts_sample() else dtype
        wanted = self._options.return_x0 or self.config.solver_order > 1
        x_next, x0 = self._advance(sample, model_output, (table, key), dtype, previous_x0=history, x0=wanted)
        self.model_outputs.append(x0.to(out) if wanted else None)
        del self.model_outputs[0]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index += 1
        return SchedulerOutput(prev_sample=x_next.to(out)) if return_dict else (x_next.to(out),)

    _moves_noise = True

    def _learns_variance(self):
        return self.config.variance_type in _LEARNED

    def _uncovered(self):
        config = self.config
        if config.algorithm_type != "dpmsolver++":
            return f"algorithm_type {config.algorithm_type!r}"
        if config.solver_order > 2:
            return f"solver_order {config.solver_order}"
        if config.thresholding:
            return "dynamic thresholding"
        return self._unknown_output() if config.variance_type is None else f"variance_type {config.variance_type!r}"

    def _order(self):
        """1 for the first step after a start, for orders that are not 2, and for a last step that diffusers lowers."""
        config, count = self.config, len(self.timesteps)
        lowers = config.euler_at_final or config.final_sigmas_type == "zero" or (config.lower_order_final and count < 15)
        last = self.step_index == count - 1
        return 1 if config.solver_order == 1 or self.lower_order_nums < 1 or (last and lowers) else 2

    def _table(self):
        return Table(
            [(i, order) for i in range(len(self.sigmas) - 1) for order in (1, 2)], lambda key: self._coefficients(*key)
        )

    def _coefficients(self, position, order):
        sigmas = self._sigmas()
        if order == 2 and position == 0:
            raise InputError("a second-order step at the start of the schedule")
        return dpmsolver_coefficients(
            *sigmas[position : position + 2],
            self.config.prediction_type,
            sigmas[position - 1] if order == 2 else None,
            self.config.solver_type,
            bool(self.config.get("use_flow_sigmas", False)),
        )
