"""The common parts of the fused schedulers: options, kept tables, noise, positions, outputs, and the way back to diffusers."""

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor

from ..errors import InputError
from ..ops import StepCoefficients, sampler_step
from ..ops.arguments import flag
from ..ops.philox import validated
from ..ops.registry import require_known
from .coefficients import path_weights
from .schedule import Level
from .step_arguments import are_plain, as_number, position_in, require_generator, require_noise, require_tensors
from .step_tables import VARIANTS, remembered, unchanged

_LOGGER = logging.get_logger(__name__)


@dataclass(frozen=True)
class Options:
    """Arguments of :meth:`FusedStep.set_step_options`."""

    backend: str = "auto"
    seed: int | None = None
    indices: torch.Tensor | None = None
    return_x0: bool = True


class FusedStep:
    """The common part of all schedulers: options, tables, and the way back to diffusers' own code."""

    _published: ClassVar[type]
    to_json_string: Callable[[], str]
    _said: set[str]
    _kept: dict[Hashable, Any]
    _sources_kept: tuple

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Here rather than in __init__, whose signature diffusers reads as the list of configuration keys.
        self = super().__new__(cls)
        if cls.__name__ == cls._published.__name__:
            self.__module__ = cls._published.__module__
        self._options = Options()
        self._said = set()
        self._kept, self._sources_kept = {}, ()
        return self

    def __repr__(self) -> str:
        return f"{type(self).__qualname__} {self.to_json_string()}"

    def set_step_options(
        self,
        *,
        backend: str = "auto",
        seed: int | None = None,
        indices: range | torch.Tensor | None = None,
        return_x0: bool = True,
    ) -> "FusedStep":
        """Options of the fused step, which diffusers' schedulers do not have; they hold until the next call of this method.

        Args:
            backend: see :func:`advkd.ops.registry.choose`.
            seed: int: the step noise is not drawn from a generator but made inside the pass, a function of the seed, the
                sample's index and the step's position in ``timesteps`` (:func:`advkd.ops.philox_normal`, stream "step").
                Neither a generator nor noise may then be passed. Samplers without noise ignore it.
            indices: the samples' indices for ``seed``, a range or an int64 tensor ``(N,)``, copied; default 0 to N - 1.
            return_x0: False leaves ``pred_original_sample`` out (None), and with it a quarter of the memory traffic.

        Returns:
            The scheduler.

        Raises:
            InputError: a value that cannot be. With a seed, or a backend asked for by name, ``step`` also refuses what the
                fused step does not cover, instead of running diffusers' own code without them.
        """
        require_known(backend)
        return_x0 = flag("return_x0", return_x0)
        if indices is not None and seed is None:
            raise InputError("indices need a seed: they choose the noise that the seed makes")
        chosen = None
        if seed is not None:
            _, checked, _ = validated(seed, range(0) if indices is None else indices, "step", 0)
            chosen = None if indices is None else checked.clone()
        self._options = Options(backend, seed, chosen, return_x0)
        self._kept = {}
        return self

    def _refresh(self):
        """Forget the tables where a tensor or a configuration that they come from has changed: at the start of every step.

        A tensor on the CPU is compared with a copy of it, so that writes are seen that PyTorch does not count (through
        ``.data`` or a numpy view, or in inference mode). One on another device would have to be waited for: it is known by
        identity and by PyTorch's count of its changes, and such writes to it are seen after ``set_timesteps`` only.
        """
        sources = (self.config, self.timesteps, *self._sources())
        kept = self._sources_kept
        if len(kept) != len(sources) or not all(map(unchanged, kept, sources)):
            self._kept, self._sources_kept = {}, tuple(map(remembered, sources))

    def _cached(self, key, make):
        """``make()``, kept until :meth:`_refresh` finds a change."""
        if key not in self._kept:
            if len(self._kept) >= VARIANTS:
                self._kept.clear()
            self._kept[key] = make()
        return self._kept[key]

    def _schedule(self):
        """``timesteps`` as a list of numbers."""
        return self._cached("schedule", self.timesteps.tolist)

    def _timestep(self, timestep):
        """The timestep as an int in [0, T).

        An element of ``timesteps`` is recognised by its address: to read its value from a GPU would wait for the device.
        """
        position = position_in(timestep, self.timesteps)
        number = as_number(timestep) if position is None else self._schedule()[position]
        if number is None or number % 1 != 0 or not 0 <= number < len(self.alphas_cumprod):
            raise self._bad_timestep(timestep)
        return int(number)

    def _bad_timestep(self, timestep):
        """The error for a timestep that cannot be stepped from."""
        self._refresh()
        total, schedule, number = len(self.alphas_cumprod), self._schedule(), as_number(timestep)
        if number in schedule and not 0 <= number < total:
            return InputError(f"timestep {number} is an element of scheduler.timesteps, but {self._why_outside(total)}")
        bounds = f", in [0, {total})" if all(0 <= t < total for t in schedule) else ""
        return InputError(f"timestep must be an element of scheduler.timesteps{bounds}, got {timestep!r}")

    def _why_outside(self, total):
        """How an element of ``timesteps`` comes to be outside [0, T), and what helps."""
        outside = f"outside [0, {total}), the timesteps of training"
        offset, count = self.config.steps_offset, len(self.timesteps)
        if offset == 0 or self.config.timestep_spacing != "leading":
            return f"{outside}: set timesteps within that range"
        cause = f"steps_offset={offset} with num_inference_steps={count} leads there"
        fits = (n for n in range(count - 1, 0, -1) if 0 <= offset and (n - 1) * (total // n) + offset < total)
        fewer = next(fits, None)
        return f"{outside}: {cause}; take steps_offset=0{f' or num_inference_steps={fewer}' if fewer else ''}"

    def _own_code(self, reason):
        """Say once that diffusers' own code runs; refuse what it would leave out."""
        options = self._options
        if options.seed is not None or options.backend != "auto":
            name = "seed" if options.seed is not None else "backend"
            raise InputError(f"{name}: only the fused step has this option, and it does not cover {reason}")
        if reason not in self._said:
            self._said.add(reason)
            message = f"{type(self).__qualname__} runs diffusers' own code: the fused step does not cover {reason}"
            warnings.warn(message, UserWarning, stacklevel=3)

    def _advance(self, sample, model_output, coefficients, dtype, *, noise=None, previous_x0=None, history=None, x0=True):
        """One fused step in ``dtype``'s storage: the next state and what the step stores (or None).

        ``coefficients`` are :class:`StepCoefficients`, or a table and a key in it.
        """
        x = sample.to(dtype)
        exact = dtype == torch.float64
        if not isinstance(coefficients, StepCoefficients):
            table, key = coefficients
            coefficients = table.row(key, x.device, torch.float64 if exact else torch.float32)
        x_next, x0, _ = sampler_step(
            x,
            model_output.to(dtype) if exact else model_output,
            coefficients,
            noise=noise.to(x).expand_as(x) if isinstance(noise, torch.Tensor) else noise,
            previous_x0=None if previous_x0 is None else previous_x0.to(dtype),
            history=None if history is None else history.to(dtype),
            return_x0=x0,
            backend=self._options.backend,
        )
        return x_next, x0

    _moves_noise = False
    """True if diffusers' step takes noise from another device."""

    def _learns_variance(self):
        """True if the network's output has further channels, of the variance."""
        return False

    def _require(self, model_output, sample, generator=None, variance_noise=None):
        """An :class:`InputError` for what neither the fused step nor diffusers' own code can compute with."""
        if variance_noise is not None or not are_plain(model_output, sample):
            require_tensors(model_output, sample, self._learns_variance())
        if variance_noise is not None:
            require_noise(variance_noise, sample, self._moves_noise)
        if generator is not None:
            require_generator(generator, len(model_output) if model_output.ndim else 1)

    def _predicts_sample(self):
        return self.config.prediction_type in ("sample", "original_sample")

    def _noise(self, model_output, generator, variance_noise, position):
        """The step's noise: the caller's, a draw from the generator as diffusers draws it, or counters."""
        seed = self._options.seed
        if seed is None:
            if variance_noise is not None:
                return variance_noise
            shape, device, dtype = model_output.shape, model_output.device, model_output.dtype
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if generator is not None or variance_noise is not None:
            name = "generator" if generator is not None else "variance_noise"
            raise InputError(f"{name}: the noise comes from the scheduler's seed (set_step_options); pass one of the two")
        if position is None:
            raise InputError(
                "timestep: noise from a seed needs an element of scheduler.timesteps, whose position it depends on"
            )
        count, device, indices = len(model_output), model_output.device, self._options.indices
        if indices is None:
            key, make = ("indices", count, device), lambda: torch.arange(count, dtype=torch.int64, device=device)
        else:
            key, make = ("indices", device), lambda: indices.to(device)
        with torch.inference_mode(False):
            return seed, self._cached(key, make), position


class FusedVariancePreserving(FusedStep):
    """The common part of DDIM and DDPM: steps by timestep, a clamped x0, and diffusers' dtypes."""

    def _alpha_bar(self, t):
        values = self._cached("alpha_bars", self.alphas_cumprod.tolist)
        if not 0 <= t < len(values):
            raise InputError(f"timestep {t}, which is outside [0, {len(values)})")
        return values[t]

    def _clip(self):
        return float(self.config.clip_sample_range) if self.config.clip_sample else float("inf")

    def _finish(self, kind, sample, model_output, coefficients, noise, return_dict):
        """The fused step and its output in the dtypes that diffusers' arithmetic promotes to."""
        x0_dtype = dtype = torch.promote_types(sample.dtype, model_output.dtype)
        if isinstance(noise, torch.Tensor):
            dtype = torch.promote_types(dtype, noise.dtype)
        x_next, x0 = self._advance(sample, model_output, coefficients, dtype, noise=noise, x0=self._options.return_x0)
        return step_output(kind, x_next, x0, model_output.dtype if self._predicts_sample() else x0_dtype, return_dict)


class FusedSigmas(FusedStep):
    """The common part of the schedulers by sigma: steps by position in ``sigmas``, counted by diffusers' ``step_index``.

    Timesteps may repeat: those of a cosine schedule with Karras sigmas do. Given one that does, diffusers begins a run at the
    second of them, so that its own loop over all of ``timesteps`` runs out of them before its last step. Here a run whose first
    timestep is element 0 of ``timesteps`` itself begins at 0, as after ``set_begin_index(0)``. Any other start by a repeated
    timestep is diffusers', in the middle of the schedule too, where the loop's position would be known: the state's noise level
    is that of ``add_noise``, which looks its timestep up by value. A logged warning then names ``set_begin_index``, which
    decides for both.
    """

    _repeated = None
    """Where the first timestep of this run occurs first, where the run began later than that, and the timestep."""

    def _sources(self):
        return (self.sigmas,)

    def _sigmas(self):
        return self._cached("sigmas", self.sigmas.tolist)

    def _levels(self):
        """The levels of ``sigmas``, on the straight path if the configuration says so; their timesteps are left out."""
        return self._cached("levels", self._make_levels)

    def _make_levels(self):
        flow = bool(self.config.get("use_flow_sigmas", False))
        weights = (path_weights(sigma, flow) for sigma in self._sigmas())
        return [Level(-1.0, alpha, noise, alpha**2) for alpha, noise in weights]

    def _unknown_output(self):
        """The reason why diffusers' conversion of the network's output is none of ours, or None."""
        prediction, flow = self.config.prediction_type, bool(self.config.use_flow_sigmas)
        if (flow and prediction == "v_prediction") or (not flow and prediction == "flow_prediction"):
            return f"prediction_type {prediction!r} with use_flow_sigmas={flow}"
        return None

    def _begin(self, timestep):
        """The position of this step; the first of a run looks its timestep up, later ones count."""
        self._refresh()
        self._refuse_outside(timestep)
        if self.step_index is None:
            self._init_step_index(timestep)
        if not self.step_index < len(self.sigmas) - 1:
            raise InputError(f"timestep: {self._all_done()}")
        return self.step_index

    def _refuse_outside(self, timestep):
        """Refuse a timestep that can be read without waiting and is neither in [0, T) nor in the schedule."""
        if isinstance(timestep, torch.Tensor) and (timestep.device.type != "cpu" or timestep.numel() != 1):
            return
        if position_in(timestep, self.timesteps) is not None:
            return
        number = as_number(timestep)
        if number is None or (not 0 <= number < len(self.alphas_cumprod) and number not in self._schedule()):
            raise self._bad_timestep(timestep)

    def _init_step_index(self, timestep):
        self._repeated = None
        if self.begin_index is not None:
            super()._init_step_index(timestep)
            return
        self._refresh()
        position, schedule = position_in(timestep, self.timesteps), self._schedule()
        if position == 0:
            self._step_index = 0
            return
        number = as_number(timestep) if position is None else schedule[position]
        if number is None:
            raise self._bad_timestep(timestep)
        super()._init_step_index(timestep)
        if number in schedule and schedule.index(number) < self._step_index:
            self._repeated = (schedule.index(number), self._step_index, number)
        if position not in (None, self._step_index):
            _LOGGER.warning(
                f"scheduler.timesteps holds {number} more than once: the run begins at position {self._step_index}, where "
                f"add_noise looks it up, too, and not at {position}; set_begin_index({position}) before both begins there"
            )

    def _all_done(self):
        """Why there is no step left, and what helps."""
        count = len(self.timesteps)
        if self._repeated is None:
            return f"all {count} steps of the schedule are done; call set_timesteps to start another run"
        first, began, number = self._repeated
        return (
            f"the schedule is done after {count - began} steps, not {count - first}: scheduler.timesteps holds the repeated "
            f"timestep {number}, and a run that starts by its value begins at the second of them, position {began}; "
            f"call set_begin_index({first}) after set_timesteps"
        )


def step_output(
    kind: type[BaseOutput], x_next: torch.Tensor, x0: torch.Tensor | None, x0_dtype: torch.dtype, return_dict: bool
) -> BaseOutput | tuple:
    """A step's result as diffusers' output class ``kind``, or as a tuple."""
    x0 = None if x0 is None else x0.to(x0_dtype)
    return kind(prev_sample=x_next, pred_original_sample=x0) if return_dict else (x_next, x0)


def saved_as_diffusers_class(cls: type[FusedStep]) -> type[FusedStep]:
    """Let diffusers write its own class into files that others read.

    diffusers names a scheduler in ``scheduler_config.json`` and ``model_index.json`` by its class's ``__name__`` and its
    object's ``__module__``, and loads only what it finds in its own library. ``__qualname__``, and with it pickling and
    representations, stays ours.
    """
    cls._published = cls.__bases__[-1]
    cls.__name__ = cls._published.__name__
    return cls
