"""Drop-in diffusers scheduler for DEIS, whose step is one pass over memory."""

import torch
from diffusers import DEISMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ..errors import InputError
from ..ops import StepCoefficients
from ..ops.arguments import flag
from .fused_step import FusedSigmas, saved_as_diffusers_class
from .multistep import deis_log_rho_weights, require_apart
from .prediction import eps_weights
from .step_arguments import why_unfit
from .step_tables import Table

__all__ = ["FusedDEISMultistepScheduler"]


@saved_as_diffusers_class
class FusedDEISMultistepScheduler(FusedSigmas, DEISMultistepScheduler):
    """diffusers' ``DEISMultistepScheduler`` (Zhang and Chen 2023) with a fused step: order 1, 2 or 3.

    The first step of a run starts at the begin index or at its timestep; as in diffusers, one in [0, T) that is not in the
    schedule means the last step. Later steps count. ``model_outputs`` holds noise predictions. Diffusers' own code runs for
    dynamic thresholding, for a velocity on a path that it does not belong to, and where a gradient is wanted.

    ``pipe.scheduler = FusedDEISMultistepScheduler.from_config(pipe.scheduler.config)`` puts it into a pipeline.
    ``set_step_options`` names a backend. With one, ``step`` refuses what the fused step does not cover.
    """

    lower_order_nums: int

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:
        """The state at the next noise level.

        Args:
            model_output: the network's output ``(N, ...)``, float32, bfloat16, float16 or float64.
            sample: the state ``(N, ...)``, in any of these dtypes, on the same device.
            timestep: element of ``timesteps``.
            return_dict: False for a tuple.

        Returns:
            ``SchedulerOutput(prev_sample)`` or a tuple of it, in diffusers' dtypes.

        Raises:
            InputError: a timestep outside [0, T), tensors that do not fit, or a step after the last.
            ValueError: diffusers' own, before ``set_timesteps``.
        """
        self._require(model_output, sample)
        return_dict = flag("return_dict", return_dict)
        arguments = (model_output, timestep, sample, return_dict)
        if self.num_inference_steps is None:
            # Diffusers raises its own error.
            return super().step(*arguments)
        key = (self._begin(timestep), self._order())
        table = self._cached("steps", self._table)
        before = dict(zip(("previous_x0", "history"), self.model_outputs[::-1][: key[1] - 1]))
        reason = self._uncovered() or why_unfit(model_output, sample, *before.values())
        if reason or isinstance(table[key], str):
            self._own_code(reason or table[key])
            return super().step(*arguments)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        wanted = self._options.return_x0 or self.config.solver_order > 1
        x_next, eps = self._advance(sample, model_output, (table, key), dtype, **before, x0=wanted)
        self.model_outputs.append(eps)
        del self.model_outputs[0]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index += 1
        return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    def _uncovered(self):
        if self.config.solver_order not in (1, 2, 3):
            return f"solver_order {self.config.solver_order}"
        return "dynamic thresholding" if self.config.thresholding else self._unknown_output()

    def _order(self):
        """One more than the steps behind, at most ``solver_order``, and in the last two of a short run what is left."""
        count = len(self.timesteps)
        left = count - self.step_index if self.config.lower_order_final and count < 15 else self.config.solver_order
        return min(self.config.solver_order, self.lower_order_nums + 1, left)

    def _table(self):
        positions, orders = range(len(self.sigmas) - 1), range(1, self.config.solver_order + 1)
        return Table([(i, order) for i in positions for order in orders], lambda key: self._coefficients(*key))

    def _coefficients(self, position, order):
        past, following = self._levels()[position::-1][:order], self._levels()[position + 1]
        if len(past) < order:
            raise InputError(f"a step of order {order} at position {position} of the schedule")
        require_apart(past)
        e_x, e_m = eps_weights(past[0].alpha, past[0].noise, self.config.prediction_type)
        ratio, (own, *older) = deis_log_rho_weights(past, following)
        c_h, c_g = (*older, 0.0, 0.0)[:2]
        return StepCoefficients(0.0, 0.0, 0.0, ratio + own * e_x, own * e_m, c_h=c_h, c_g=c_g, s_0=0.0, s_x=e_x, s_m=e_m)
