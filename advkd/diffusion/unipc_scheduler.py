"""Drop-in diffusers scheduler for UniPC, whose corrector and predictor are one pass over memory."""

from typing import NamedTuple

import torch
from diffusers import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ..errors import InputError
from ..ops import StepCoefficients
from ..ops.arguments import flag
from .fused_step import FusedSigmas, saved_as_diffusers_class
from .multistep import require_apart, unipc_correction, unipc_corrector, unipc_predictor
from .prediction import x0_weights
from .step_arguments import why_unfit
from .step_tables import Handed, Table, counted, handed_in, or_reason

__all__ = ["FusedUniPCMultistepScheduler"]


class Pass(NamedTuple):
    """A step's place in the schedule and its orders: all that its coefficients depend on."""

    position: int
    order: int
    corrected: int
    """Order of the corrector, which is that of the step before; 0 for none."""
    follows: bool
    """True if the state is what the step before returned: the corrector's change is then added to it."""


class Taken(NamedTuple):
    """A fused step and its operands: what ``last_sample`` is computed from."""

    key: Pass
    sample: Handed
    last: torch.Tensor | None
    """The corrected state before, where the step read it."""
    x0s: list[torch.Tensor]
    """Newest first."""
    returned: Handed
    dtype: torch.dtype


@saved_as_diffusers_class
class FusedUniPCMultistepScheduler(FusedSigmas, UniPCMultistepScheduler):
    """diffusers' ``UniPCMultistepScheduler`` (Zhao et al. 2023) with a fused step: order 1, 2 or 3, "bh1" and "bh2".

    The corrected state is what the step before returned, and a few x0: it is written nowhere, and ``last_sample`` is computed
    where it is asked for: by its reader, or by a step to which another state than the one returned is passed (inpainting, for
    one). Such a step takes a pass more. A write to the returned state in place makes another state of it; one that PyTorch does
    not count (through ``.data`` or a numpy view) is not seen. If the caller writes to the first state of a run, the corrector
    still starts from what it was (diffusers' own from what it has become).

    The first step of a run starts at the begin index or at its timestep; as in diffusers, one in [0, T) that is not in the
    schedule means the last step. Later steps count. Diffusers' own code runs for ``predict_x0=False``, ``solver_p``, dynamic
    thresholding, a velocity on a path that it does not belong to, a third-order corrector for another state than the one
    returned, and where a gradient is wanted.

    ``pipe.scheduler = FusedUniPCMultistepScheduler.from_config(pipe.scheduler.config)`` puts it into a pipeline.
    ``set_step_options`` names a backend. With one, ``step`` refuses what the fused step does not cover.
    """

    lower_order_nums: int
    _last: torch.Tensor | None = None
    _taken: Taken | None = None
    _returned = Handed(None)

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
            InputError: a timestep outside [0, T), tensors that do not fit, a step after the last, or another state than the one
                returned, where that one and the one before it were written to in place.
            ValueError: diffusers' own, before ``set_timesteps``.
        """
        self._require(model_output, sample)
        return_dict = flag("return_dict", return_dict)
        arguments = (model_output, timestep, sample, return_dict)
        if self.num_inference_steps is None:
            # Diffusers raises its own error.
            return super().step(*arguments)
        key = self._pass(self._begin(timestep), sample)
        table = self._cached("steps", self._table)
        step = table[key] if key in table.positions else or_reason(self._coefficients, key)
        last = self.last_sample if key.corrected and not key.follows else None
        before = self._before(key, last)
        reason = self._uncovered() or why_unfit(model_output, sample, *before)
        if reason or isinstance(step, str):
            self._own_code(reason or step)
            result = super().step(*arguments)
            self._returned = Handed(result[0])
            return result
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        out = sample.dtype if last is None else last.dtype
        weights = (step.c_h, step.c_g, step.c_z)
        operands = {name: x for name, x, weight in zip(("previous_x0", "history", "noise"), before, weights) if weight}
        with counted():
            coefficients = (table, key) if key in table.positions else step
            x_next, x0 = self._advance(sample, model_output, coefficients, dtype, **operands)
            x_next, x0 = x_next.to(out), x0.to(model_output.dtype if self._predicts_sample() else dtype)
        self._remember(key, timestep, sample, last, x_next, x0)
        return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    @property
    def last_sample(self) -> torch.Tensor | None:
        """The corrected state from which the newest step went on; None at the start of a run."""
        if self._last is None and self._taken is not None:
            self._last = self._corrected(self._taken)
        return self._last

    @last_sample.setter
    def last_sample(self, value: torch.Tensor | None) -> None:
        """Keep a state, or free it, in the place of what it would be computed from."""
        self._last, self._taken, self._returned = value, None, Handed(None)

    def _uncovered(self):
        config = self.config
        if self.solver_p is not None:
            return "solver_p"
        if not self.predict_x0:
            return "predict_x0=False"
        if config.thresholding:
            return "dynamic thresholding"
        return f"solver_order {config.solver_order}" if config.solver_order not in (1, 2, 3) else self._unknown_output()

    def _pass(self, position, sample):
        order = min(self._most(position), self.lower_order_nums + 1)
        begun = self._last is not None or self._taken is not None
        corrects = position > 0 and position - 1 not in self.disable_corrector and begun
        return Pass(position, order, self.this_order if corrects else 0, corrects and self._returned.is_still(sample))

    def _most(self, position):
        """The highest order of a step at a position."""
        left = len(self.timesteps) - position if self.config.lower_order_final else self.config.solver_order
        return min(self.config.solver_order, left)

    def _before(self, key, last):
        """The operands of a step, newest first, behind its state and output."""
        x0s = self.model_outputs[::-1][: max(key.order - 1, key.corrected)]
        return x0s if last is None else [*x0s, last]

    def _remember(self, key, timestep, sample, last, x_next, x0):
        """State that diffusers' own code keeps after a step."""
        x0s = [x0, *self.model_outputs[::-1]]
        self.last_sample = None
        self._returned = Handed(x_next)
        self._taken = Taken(key, handed_in(sample), last, x0s, self._returned, x_next.dtype)
        for kept, newest in ((self.model_outputs, x0), (self.timestep_list, timestep)):
            kept.append(newest)
            del kept[0]
        self.this_order = key.order
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index += 1

    def _corrected(self, taken):
        """The corrected state of a step, from what is left of its operands."""
        key, x0s = taken.key, taken.x0s
        past = self._levels()[key.position :: -1]
        if taken.last is not None:
            ratio, weights = unipc_corrector(past[: key.corrected + 1], self.config.solver_type)
            return _combined(ratio, taken.last, weights, x0s).to(taken.dtype)
        if taken.sample.untouched():
            if not key.corrected:
                return taken.sample.tensor
            weights = unipc_correction(past[: key.corrected + 1], self.config.solver_type)
            return _combined(1.0, taken.sample.tensor, weights, x0s).to(taken.dtype)
        ratio, weights = unipc_predictor(past[: key.order], self._levels()[key.position + 1], self.config.solver_type)
        if not ratio or not taken.returned.untouched():
            raise InputError(
                "sample is not the tensor that the step before returned, and that one and the one before it were written to "
                "in place: leave one of them as it is"
            )
        return (_combined(1.0, taken.returned.tensor, [-weight for weight in weights], x0s) / ratio).to(taken.dtype)

    def _table(self):
        """Steps of every order that a run comes to, wherever it begins."""
        keys = {}
        for position in range(len(self.sigmas) - 1):
            for behind in range(min(self.config.solver_order, position) + 1):
                order = min(self._most(position), behind + 1)
                corrected = min(self._most(position - 1), behind)
                keys |= dict.fromkeys((Pass(position, order, 0, False), Pass(position, order, corrected, corrected > 0)))
        return Table(list(keys), self._coefficients)

    def _coefficients(self, key):
        kind, levels = self.config.solver_type, self._levels()
        past, following = levels[key.position :: -1][: max(key.order, key.corrected + 1)], levels[key.position + 1]
        if len(past) < max(key.order, key.corrected + 1):
            raise InputError(f"a step of order {key.order} at position {key.position} of the schedule")
        require_apart([following, *past[: key.order]] if key.order > 1 else past[:1])
        k_x, k_m = x0_weights(past[0].alpha, past[0].noise, self.config.prediction_type)
        ratio, weights = unipc_predictor(past[: key.order], following, kind)
        weights += [0.0] * (len(past) - key.order)
        back, changes = 1.0, [0.0]
        if key.corrected:
            before = past[: key.corrected + 1]
            require_apart(before if key.corrected > 1 else before[1:])
            back, changes = (1.0, unipc_correction(before, kind)) if key.follows else unipc_corrector(before, kind)
        for j, change in enumerate(changes):
            weights[j] += ratio * change
        own, *others = weights
        if key.corrected and not key.follows:
            # The corrected state before takes the place of this one.
            ratio, others = 0.0, [*others, ratio * back]
        if len(others) > 3:
            raise InputError("a third-order corrector for a state that the step before did not return")
        c_h, c_g, c_z = (*others, 0.0, 0.0, 0.0)[:3]
        return StepCoefficients(k_x, k_m, own, ratio, c_h=c_h, c_g=c_g, c_z=c_z)


def _combined(weight, state, weights, x0s):
    """weight state + sum_j weights_j x0_j, in float32 or wider."""
    wide = torch.promote_types(state.dtype, torch.float32)
    return sum((w * x0.to(wide) for w, x0 in zip(weights, x0s)), weight * state.to(wide))
