"""Drop-in diffusers scheduler for Heun's method, each half of whose step is one pass over memory."""

from functools import reduce
from typing import Any

import torch
from diffusers import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput

from ..errors import InputError
from ..ops import StepCoefficients
from ..ops.arguments import flag
from .coefficients import OF_A_TIMESTEP
from .fused_step import FusedSigmas, saved_as_diffusers_class, step_output
from .prediction import require_prediction, x0_weights
from .step_arguments import as_number, why_unfit
from .step_tables import Handed, Table, counted, handed_in

__all__ = ["FusedHeunDiscreteScheduler"]

FIRST, SECOND, GIVEN = "first half", "second half", "second half from a given state"
"""Kinds of a pass. The state of a ``SECOND`` one is what the first half returned, in which its slope is contained."""


@saved_as_diffusers_class
class FusedHeunDiscreteScheduler(FusedSigmas, HeunDiscreteScheduler):
    """diffusers' ``HeunDiscreteScheduler`` (Karras et al. 2022, algorithm 1) with a fused step.

    A step between two noise levels takes two calls of ``step``, as in diffusers, and ``timesteps`` holds all but the first
    twice. The slope of the first half, ``prev_derivative``, is contained in the state that ``step`` returns, and is computed
    where it is asked for: by its reader, or by a second half to which another state is passed. The run starts at the begin
    index, or at its timestep, which must then be in the schedule (diffusers raises an ``IndexError`` for others); later steps
    count. Diffusers' own code runs where a gradient is wanted.

    ``pipe.scheduler = FusedHeunDiscreteScheduler.from_config(pipe.scheduler.config)`` puts it into a pipeline.
    ``set_step_options`` names a backend or leaves x0 out. With a backend, ``step`` refuses what the fused step does not cover.
    """

    _slope: torch.Tensor | None = None
    _slopes: tuple[tuple[Handed, Handed, float], ...] = ()
    """Differences that the slope is, and what they are divided by."""
    _returned = Handed(None)
    sample: torch.Tensor | None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> HeunDiscreteSchedulerOutput | tuple:
        """The state after a half of Heun's step, and x0.

        Args:
            model_output: the network's output ``(N, ...)``, float32, bfloat16, float16 or float64.
            sample: the state ``(N, ...)``, in any of these dtypes, on the same device.
            timestep: element of ``timesteps``.
            return_dict: False for a tuple.

        Returns:
            ``HeunDiscreteSchedulerOutput(prev_sample, pred_original_sample)`` or the tuple of both, in diffusers' dtypes.

        Raises:
            InputError: a first timestep that is not in the schedule, tensors that do not fit, a step after the last, or a
                second half for whose slope too much was written to in place.
        """
        self._require(model_output, sample)
        return_dict = flag("return_dict", return_dict)
        arguments = (model_output, timestep, sample, return_dict)
        kind = FIRST
        position = self._begin(timestep)
        if not self.state_in_first_order:
            kind = SECOND if self._returned.is_still(sample) else GIVEN
        table = self._cached("steps", self._table)
        start, slope = None if kind == FIRST else self.sample, self.prev_derivative if kind == GIVEN else None
        reason = why_unfit(model_output, sample, start, slope)
        if reason or isinstance(table[position, kind], str):
            self._own_code(reason or table[position, kind])
            result = super().step(*arguments)
            self._returned = Handed(result[0])
            return result
        x0_dtype = torch.promote_types(sample.dtype, model_output.dtype)
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in (start, slope) if tensor is not None), x0_dtype)
        with counted():
            row, wanted = (table, (position, kind)), self._options.return_x0
            x_next, x0 = self._advance(sample, model_output, row, dtype, previous_x0=start, history=slope, x0=wanted)
        self._remember(position, kind, sample, x_next, x0)
        self._step_index += 1
        x0_dtype = model_output.dtype if self._predicts_sample() else x0_dtype
        return step_output(HeunDiscreteSchedulerOutput, x_next, x0, x0_dtype, return_dict)

    @property
    def prev_derivative(self) -> torch.Tensor | None:
        """Slope of the first half of the step, between its two halves; None otherwise."""
        if self._slope is None and self._slopes:
            self._slope = self._difference()
        return self._slope

    @prev_derivative.setter
    def prev_derivative(self, value: torch.Tensor | None) -> None:
        """Keep a slope, or free it, in the place of what it would be computed from."""
        self._slope, self._slopes, self._returned = value, (), Handed(None)

    def _remember(self, position, kind, sample, x_next, x0):
        """State that diffusers' own code keeps between two halves of a step, and frees after them."""
        self.prev_derivative = self.dt = self.sample = None
        if kind != FIRST:
            return
        sigma, following = self._sigmas()[position : position + 2]
        self.dt = self.sigmas[position + 1] - self.sigmas[position]
        self.sample, self._returned = sample, Handed(x_next)
        start, x0 = handed_in(sample), Handed(x0)
        self._slopes = (start, x0, sigma), (self._returned, x0, following), (self._returned, start, following - sigma)

    def _difference(self):
        """The slope from the first two tensors that nothing was written to."""
        for a, b, divisor in self._slopes:
            if divisor and a.untouched() and b.untouched():
                dtype = torch.promote_types(a.tensor.dtype, b.tensor.dtype)
                wide = torch.promote_types(dtype, torch.float32)
                return ((a.tensor.to(wide) - b.tensor.to(wide)) / divisor).to(dtype)
        raise InputError(
            "sample is not the tensor that the first half of this step returned, and that one and the one before it were "
            "written to in place: leave one of them as it is"
        )

    def _init_step_index(self, timestep: Any) -> None:
        # Every timestep but the first stands for both halves of a step; diffusers' look-up begins with the first half.
        if self.begin_index is None and as_number(timestep) is None:
            raise self._bad_timestep(timestep)
        try:
            HeunDiscreteScheduler._init_step_index(self, timestep)
        except IndexError as error:
            raise self._bad_timestep(timestep) from error

    def _table(self):
        positions = range(len(self.sigmas) - 1)
        return Table([(i, kind) for i in positions for kind in (FIRST, SECOND, GIVEN)], lambda key: self._coefficients(*key))

    def _coefficients(self, position, kind):
        """x + dt d for the first half, x_0 + dt (d_0 + d) / 2 for the second, where dt d_0 = x - x_0."""
        first = position if kind == FIRST else position - 1
        if first < 0:
            raise InputError("the second half of a step at the start of the schedule")
        sigmas = self._sigmas()
        sigma, gap = sigmas[position], sigmas[first + 1] - sigmas[first]
        if sigma <= 0:
            raise InputError(f"a step at sigma = {sigma}")
        prediction, clip = self.config.prediction_type, float("inf")
        if self.config.clip_sample:
            clip = float(self.config.clip_sample_range)
        weight, own = (gap, 1.0) if kind == FIRST else (gap / 2, 0.5 if kind == SECOND else 0.0)
        earlier = {FIRST: {}, SECOND: {"c_h": 0.5}, GIVEN: {"c_h": 1.0, "c_g": gap / 2}}[kind]
        require_prediction(prediction, OF_A_TIMESTEP)
        k_x, k_m = x0_weights(1.0, sigma, prediction)
        if prediction == "epsilon" and not self.config.clip_sample:
            # The slope (x - x0) / sigma is the network's output itself.
            return StepCoefficients(k_x, k_m, 0.0, own, weight, **earlier)
        return StepCoefficients(k_x, k_m, -weight / sigma, own + weight / sigma, clip=clip, **earlier)
