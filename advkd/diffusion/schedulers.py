"""Drop-in diffusers schedulers whose step is one pass over memory, :func:`advkd.ops.sampler_step`.

    pipe.scheduler = FusedDDIMScheduler.from_config(pipe.scheduler.config)

Each is a subclass of diffusers' own: same constructor, configuration, ``set_timesteps``, bookkeeping and outputs; only ``step``
is another. Its coefficients are computed in float64 from the scheduler's own float32 ``alphas_cumprod`` or ``sigmas``, once
after each ``set_timesteps``, and lie on the device as one table. Noise is drawn from the caller's generator, number for number
as diffusers draws it. What the fused step does not cover (dynamic thresholding, learned variances, churn, order 3, stochastic
solvers, gradients, ...) runs diffusers' own code, and a warning says so once per scheduler and reason.

A pipeline saved with one of these schedulers names diffusers' class, so that it loads where advkd is not installed. After
loading, the line above puts the fused scheduler back; or ``from_pretrained`` is given
``scheduler=FusedDDIMScheduler.from_pretrained(folder, subfolder="scheduler")``.

A timestep outside [0, T) is refused by all of them; what else is refused, each class says. The tables are made anew when a
tensor that they come from holds other numbers, however these were written; see :meth:`_FusedStep._refresh` for GPU tensors.
Torch's default dtype and device do not change a step; constructors and ``set_timesteps`` are diffusers' own, under them too.
"""

import warnings
from dataclasses import dataclass
from numbers import Real

import torch
import torch.autograd.forward_ad as forward_ad
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from ..errors import InputError
from ..ops import StepCoefficients, coefficient_table, sampler_step
from ..ops.arguments import finite, flag, real, require_dense
from ..ops.derivatives import carries_tangent, wants_derivative
from ..ops.philox import validated
from ..ops.registry import require_known
from .coefficients import VARIANCES, ddim_coefficients, ddpm_coefficients, dpmsolver_coefficients, euler_coefficients

__all__ = ["FusedDDIMScheduler", "FusedDDPMScheduler", "FusedDPMSolverMultistepScheduler", "FusedEulerDiscreteScheduler"]

_LOGGER = logging.get_logger(__name__)
_LEARNED = ("learned", "learned_range")
_VARIANTS = 16
"""Tables that a scheduler keeps at once: DDIM has one per eta."""


@dataclass(frozen=True)
class _Options:
    backend: str = "auto"
    seed: int | None = None
    indices: torch.Tensor | None = None
    return_x0: bool = True


class _Table:
    """The steps of a schedule by key: :class:`StepCoefficients`, or the reason why there are none."""

    def __init__(self, keys, coefficients):
        self.steps = [_or_reason(coefficients, key) for key in keys]
        self.positions = {key: position for position, key in enumerate(keys)}
        self._rows = {}

    def __getitem__(self, key):
        return self.steps[self.positions[key]]

    def row(self, key, device, dtype):
        """The step's row on ``device``; the first call for a device copies the whole table there."""
        rows = self._rows.get((device, dtype))
        if rows is None:
            steps = [StepCoefficients(0.0, 0.0, 0.0) if isinstance(step, str) else step for step in self.steps]
            # Whatever the mode in which a step happens to be the first.
            with torch.inference_mode(False):
                rows = coefficient_table(steps, device, dtype).unbind(0)
            if all(type(row) is torch.Tensor for row in rows):  # not what a tracer makes
                self._rows[device, dtype] = rows
        return rows[self.positions[key]]


def _or_reason(coefficients, key):
    try:
        return coefficients(key)
    except InputError as error:
        return str(error)


def _saved_as_diffusers_class(cls):
    """Let diffusers write its own class into files that others read.

    diffusers names a scheduler in ``scheduler_config.json`` and ``model_index.json`` by its class's ``__name__`` and its
    object's ``__module__``, and loads only what it finds in its own library. ``__qualname__``, and with it pickling and
    representations, stays ours.
    """
    cls._published = cls.__bases__[-1]
    cls.__name__ = cls._published.__name__
    return cls


class _FusedStep:
    """The common part of the four schedulers: options, tables, and the way back to diffusers' own code."""

    def __new__(cls, *args, **kwargs):
        # Here rather than in __init__, whose signature diffusers reads as the list of configuration keys.
        self = super().__new__(cls)
        if cls.__name__ == cls._published.__name__:
            self.__module__ = cls._published.__module__
        self._options = _Options()
        self._said = set()
        self._kept, self._sources_kept = {}, ()
        return self

    def __repr__(self):
        return f"{type(self).__qualname__} {self.to_json_string()}"

    def set_step_options(self, *, backend="auto", seed=None, indices=None, return_x0=True):
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
        if seed is not None:
            _, checked, _ = validated(seed, range(0) if indices is None else indices, "step", 0)
            indices = None if indices is None else checked.clone()
        self._options = _Options(backend, seed, indices, return_x0)
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
        if len(kept) != len(sources) or not all(map(_unchanged, kept, sources)):
            self._kept, self._sources_kept = {}, tuple(map(_remembered, sources))

    def _cached(self, key, make):
        """``make()``, kept until :meth:`_refresh` finds a change."""
        if key not in self._kept:
            if len(self._kept) >= _VARIANTS:
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
        position = _position(timestep, self.timesteps)
        number = _number(timestep) if position is None else self._schedule()[position]
        if number is None or number % 1 != 0 or not 0 <= number < len(self.alphas_cumprod):
            raise self._bad_timestep(timestep)
        return int(number)

    def _bad_timestep(self, timestep):
        """The error for a timestep that cannot be stepped from."""
        self._refresh()
        total, schedule, number = len(self.alphas_cumprod), self._schedule(), _number(timestep)
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

    def _advance(self, sample, model_output, coefficients, dtype, *, noise=None, previous_x0=None, x0=True):
        """One fused step in ``dtype``'s storage: the next state and x0 (or None).

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
            return_x0=x0,
            backend=self._options.backend,
        )
        return x_next, x0

    _moves_noise = False
    """Whether diffusers' step takes noise from another device."""

    def _learns_variance(self):
        """Whether the network's output has further channels, of the variance."""
        return False

    def _require(self, model_output, sample, generator=None, variance_noise=None):
        """An :class:`InputError` for what neither the fused step nor diffusers' own code can compute with."""
        if variance_noise is not None or not _are_plain(model_output, sample):
            _require_tensors(model_output, sample, self._learns_variance())
        if variance_noise is not None:
            _require_noise(variance_noise, model_output, sample, self._moves_noise)
        if generator is not None:
            _require_generator(generator, len(model_output) if model_output.ndim else 1)

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


def _remembered(source):
    """Evidence of a later change of ``source``: a copy of a CPU tensor; another tensor and its count of changes; itself."""
    if not isinstance(source, torch.Tensor):
        return source
    if source.device.type == "cpu":
        return source.detach().clone()
    return source, _version(source)


def _unchanged(kept, source):
    if not isinstance(source, torch.Tensor):
        return kept is source
    if source.device.type != "cpu":
        return isinstance(kept, tuple) and kept[0] is source and kept[1] == _version(source)
    return isinstance(kept, torch.Tensor) and kept.dtype == source.dtype and torch.equal(kept, source)


def _version(tensor):
    return None if tensor.is_inference() else tensor._version


def _number(timestep):
    """A timestep as a plain number: it is one, or a tensor or an array of one element. None where it is not."""
    if isinstance(timestep, torch.Tensor):
        if timestep.layout is not torch.strided or timestep.is_quantized:
            return None
        if timestep.is_floating_point() and timestep.element_size() == 1:
            return None
    if not isinstance(timestep, Real) and hasattr(timestep, "item"):
        try:
            timestep = timestep.item()
        except (RuntimeError, ValueError):  # several elements
            return None
    return timestep if isinstance(timestep, Real) and not isinstance(timestep, bool) else None


def _position(timestep, timesteps):
    """Where ``timestep`` lies in ``timesteps``, if it is an element of that very tensor; None if it is not."""
    if not isinstance(timestep, torch.Tensor) or timestep.numel() != 1 or not timesteps.is_contiguous():
        return None
    if timestep.device != timesteps.device or timestep.dtype != timesteps.dtype:
        return None
    try:
        position = (timestep.data_ptr() - timesteps.data_ptr()) // timesteps.element_size()
    except RuntimeError:  # a tensor of a transform has no address
        return None
    return position if 0 <= position < len(timesteps) else None


def _for_diffusers(timestep, t):
    """A timestep that diffusers can index with: of tensors it takes int32 and int64 for one."""
    known = isinstance(timestep, torch.Tensor) and timestep.dtype in (torch.int32, torch.int64)
    return timestep if known else t


def _scalar(name, value):
    """``value`` as a finite float, and as diffusers' own code takes it: the tensor where a derivative by it is wanted."""
    number = finite(name, value, constant=False)
    return number, value if isinstance(value, torch.Tensor) and wants_derivative(value) else number


def _unfit(model_output, sample, *others):
    """Why the op cannot take these tensors, or None."""
    tensors = [tensor for tensor in (sample, model_output, *others) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _GRADIENT
    if forward_ad._current_level >= 0 and any(map(carries_tangent, tensors)):
        return "a step through which a derivative in forward mode is wanted"
    if model_output.shape != sample.shape or sample.ndim == 0:
        return "a sample without a batch, or a model_output of another shape"
    return None


_GRADIENT = "a step through which a gradient is wanted (torch.no_grad() says that none is)"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _are_plain(output, sample):
    """The usual case at a glance: a step takes as long as a few dozen such questions."""
    for tensor in (output, sample):
        if type(tensor) is not torch.Tensor or tensor.is_nested or tensor.layout is not torch.strided:
            return False
        if tensor.dtype not in _DTYPES:
            return False
    return output.shape == sample.shape and output.device == sample.device


def _require_numbers(name, tensor):
    require_dense(name, tensor)
    if tensor.dtype not in _DTYPES:
        raise InputError(f"{name} must hold floating-point numbers of 16 bits or more, got {tensor.dtype}")


def _require_tensors(model_output, sample, learned):
    """``learned``: the output may have further channels, of the variance."""
    _require_numbers("model_output", model_output)
    _require_numbers("sample", sample)
    if model_output.device != sample.device:
        found = f"{model_output.device} and {sample.device}"
        raise InputError(f"model_output and sample must be on one device, got {found}")
    output, state = list(model_output.shape), list(sample.shape)
    if min(len(output), len(state)) < 2 and output != state:
        raise InputError(f"model_output must have the shape of sample, {tuple(state)}, got {tuple(output)}")
    if learned and len(output) == len(state) and output[1:2] == [2 * n for n in state[1:2]]:
        output[1] = state[1]
    if _joint_shape(output, state) is None:
        raise InputError(f"model_output {tuple(model_output.shape)} and sample {tuple(state)} do not have one shape")


def _require_noise(noise, model_output, sample, moves):
    """``moves``: the noise may be on another device."""
    _require_numbers("variance_noise", noise)
    if _joint_shape(noise.shape, sample.shape) != sample.shape:
        raise InputError(f"variance_noise must have the shape of sample, {tuple(sample.shape)}, got {tuple(noise.shape)}")
    if noise.device != sample.device and (not moves or noise.is_meta):
        raise InputError(f"variance_noise must be on {sample.device} like sample, got {noise.device}")


def _joint_shape(*shapes):
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None


def _require_generator(generator, samples):
    several = generator if isinstance(generator, list) else [generator]
    if not several or not all(isinstance(one, torch.Generator) for one in several):
        raise InputError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
    if 1 < len(several) < samples:
        raise InputError(f"generator must be one, or one for each of {samples} samples, got a list of {len(several)}")


def _output(kind, x_next, x0, x0_dtype, return_dict):
    x0 = None if x0 is None else x0.to(x0_dtype)
    return kind(prev_sample=x_next, pred_original_sample=x0) if return_dict else (x_next, x0)


class _FusedVariancePreserving(_FusedStep):
    """What DDIM and DDPM share: steps by timestep, a clamped x0, and diffusers' dtypes."""

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
        return _output(kind, x_next, x0, model_output.dtype if self._predicts_sample() else x0_dtype, return_dict)


@_saved_as_diffusers_class
class FusedDDIMScheduler(_FusedVariancePreserving, DDIMScheduler):
    """diffusers' ``DDIMScheduler`` (Song et al. 2020) with a fused step.

    As in diffusers, any timestep t in [0, T) may be stepped from, in the schedule or not, and the step goes to
    t - T // num_inference_steps. Diffusers' own code runs for dynamic thresholding, for an epsilon prediction at alpha_bar = 0,
    for eta < 0 or so large that the next state cannot hold the noise, and where a gradient is wanted.
    """

    def step(
        self,
        model_output,
        timestep,
        sample,
        eta=0.0,
        use_clipped_model_output=False,
        generator=None,
        variance_noise=None,
        return_dict=True,
    ):
        """The state at the timestep before, and x0.

        Args:
            model_output, sample: ``(N, ...)``, any mix of float32, bfloat16, float16 and float64.
            timestep: int or tensor of one element in [0, T). An element of ``timesteps`` is not read from the device.
            eta, use_clipped_model_output, generator, variance_noise, return_dict: as in diffusers. Noise has the shape of
                ``sample``, or one that is expanded to it.

        Returns:
            ``DDIMSchedulerOutput(prev_sample, pred_original_sample)`` or the tuple of both, in diffusers' dtypes.

        Raises:
            InputError: a timestep outside [0, T), tensors, numbers or a generator that do not fit, or a generator or noise
                beside a seed.
        """
        self._require(model_output, sample, generator, variance_noise)
        (eta, own_eta), return_dict = _scalar("eta", eta), flag("return_dict", return_dict)
        # diffusers' own pipeline passes None.
        given = False if use_clipped_model_output is None else use_clipped_model_output
        use_clipped_model_output = flag("use_clipped_model_output", given)
        arguments = (model_output, timestep, sample, own_eta, use_clipped_model_output, generator, variance_noise, return_dict)
        if self.num_inference_steps is None or (eta > 0 and variance_noise is not None and generator is not None):
            # Diffusers says what is wrong.
            return super().step(*arguments)
        self._refresh()
        t = self._timestep(timestep)
        variant = (eta, use_clipped_model_output)
        table = self._cached(variant, lambda: _Table(self._schedule(), lambda t: self._coefficients(t, *variant)))
        step = table[t] if t in table.positions else _or_reason(lambda t: self._coefficients(t, *variant), t)
        reason = self._uncovered(eta) or _unfit(model_output, sample, variance_noise)
        if own_eta is not eta:
            reason = _GRADIENT
        if reason or isinstance(step, str):
            self._own_code(reason or step)
            return super().step(model_output, _for_diffusers(timestep, t), *arguments[2:])
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


@_saved_as_diffusers_class
class FusedDDPMScheduler(_FusedVariancePreserving, DDPMScheduler):
    """diffusers' ``DDPMScheduler`` (Ho et al. 2020) with a fused step.

    Before ``set_timesteps`` a step goes from t to t - 1, as in diffusers; afterwards only timesteps of the schedule are
    accepted (diffusers raises an ``IndexError`` for others). Diffusers' own code runs for dynamic thresholding, for learned
    variances and ``fixed_large_log``, for an epsilon prediction at alpha_bar = 0, and where a gradient is wanted.
    """

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        """The state at the timestep before, and x0.

        Args:
            model_output, sample: ``(N, ...)``, any mix of float32, bfloat16, float16 and float64.
            timestep: int or tensor of one element, of the schedule. An element of ``timesteps`` is not read from the device.
            generator, return_dict: as in diffusers.

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
        reason = self._uncovered() or _unfit(model_output, sample)
        if reason or isinstance(table[t], str):
            self._own_code(reason or table[t])
            return super().step(model_output, _for_diffusers(timestep, t), sample, generator, return_dict)
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
        return _Table(schedule, lambda t: self._coefficients(t, following[t]))

    def _coefficients(self, t, following):
        a_s = self._alpha_bar(following) if following >= 0 else 1.0
        variance_type = self.config.variance_type if self.config.variance_type in VARIANCES else VARIANCES[0]
        return ddpm_coefficients(self._alpha_bar(t), a_s, self.config.prediction_type, variance_type, self._clip(), t > 0)


class _FusedSigmas(_FusedStep):
    """What Euler and DPM-Solver++ share: steps by position in ``sigmas``, counted by diffusers' ``step_index``.

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
        if _position(timestep, self.timesteps) is not None:
            return
        number = _number(timestep)
        if number is None or (not 0 <= number < len(self.alphas_cumprod) and number not in self._schedule()):
            raise self._bad_timestep(timestep)

    def _init_step_index(self, timestep):
        self._repeated = None
        if self.begin_index is not None:
            super()._init_step_index(timestep)
            return
        self._refresh()
        position, schedule = _position(timestep, self.timesteps), self._schedule()
        if position == 0:
            self._step_index = 0
            return
        number = _number(timestep) if position is None else schedule[position]
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


@_saved_as_diffusers_class
class FusedEulerDiscreteScheduler(_FusedSigmas, EulerDiscreteScheduler):
    """diffusers' ``EulerDiscreteScheduler`` (Karras et al. 2022, algorithm 1) with a fused step.

    The first step of a run starts at the begin index, or at its timestep, which must then be in the schedule (diffusers raises
    an ``IndexError`` for others); later steps count, and of their timestep only the range is looked at. Diffusers' own code
    runs for ``s_churn`` other than 0 and where a gradient is wanted, by ``s_churn`` too.
    """

    def step(
        self,
        model_output,
        timestep,
        sample,
        s_churn=0.0,
        s_tmin=0.0,
        s_tmax=float("inf"),
        s_noise=1.0,
        generator=None,
        return_dict=True,
    ):
        """The state at the next noise level, and x0.

        Args:
            model_output, sample: ``(N, ...)``, any mix of float32, bfloat16, float16 and float64.
            timestep: element of ``timesteps``; an int is refused, as in diffusers.
            s_churn, s_tmin, s_tmax, s_noise, generator: the noise of churn, made by diffusers' own code.
            return_dict: as in diffusers.

        Returns:
            ``EulerDiscreteSchedulerOutput(prev_sample, pred_original_sample)`` or the tuple of both, in diffusers' dtypes:
            ``prev_sample`` in ``model_output``'s, x0 in float32 where it is computed.

        Raises:
            InputError: a first timestep that is not in the schedule, tensors, numbers or a generator that do not fit, or a step
                after the last.
        """
        self._require(model_output, sample, generator)
        (s_churn, own_churn), (_, own_noise) = _scalar("s_churn", s_churn), _scalar("s_noise", s_noise)
        s_tmin, s_tmax = real("s_tmin", s_tmin, constant=False), real("s_tmax", s_tmax, constant=False)
        return_dict = flag("return_dict", return_dict)
        arguments = (model_output, timestep, sample, own_churn, s_tmin, s_tmax, own_noise, generator, return_dict)
        if isinstance(timestep, (int, torch.IntTensor, torch.LongTensor)):
            # Diffusers says what is wrong.
            return super().step(*arguments)
        position = self._begin(timestep)
        table = self._cached("steps", lambda: _Table(range(len(self.sigmas) - 1), self._coefficients))
        churns = s_churn != 0 or own_churn is not s_churn
        reason = "s_churn (noise added at each step)" if churns else _unfit(model_output, sample)
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
        return _output(EulerDiscreteSchedulerOutput, x_next.to(out), x0, x0_dtype, return_dict)

    def index_for_timestep(self, timestep, schedule_timesteps=None):
        """The position of a timestep in the schedule, as in diffusers; :class:`InputError` where there is none."""
        try:
            return super().index_for_timestep(timestep, schedule_timesteps)
        except IndexError as error:
            raise self._bad_timestep(timestep) from error

    def _coefficients(self, position):
        prediction = "sample" if self._predicts_sample() else self.config.prediction_type
        return euler_coefficients(*self._sigmas()[position : position + 2], prediction)


@_saved_as_diffusers_class
class FusedDPMSolverMultistepScheduler(_FusedSigmas, DPMSolverMultistepScheduler):
    """diffusers' ``DPMSolverMultistepScheduler`` (Lu et al. 2022b) with a fused step: ``dpmsolver++`` of order 1 or 2.

    The first step of a run starts at the begin index or at its timestep; as in diffusers, one in [0, T) that is not in the
    schedule means the last step. Later steps count. Diffusers' own code runs for the other algorithms, order 3, dynamic
    thresholding, learned variances, and where a gradient is wanted.
    """

    def step(self, model_output, timestep, sample, generator=None, variance_noise=None, return_dict=True):
        """The state at the next noise level.

        Args:
            model_output, sample: ``(N, ...)``, any mix of float32, bfloat16, float16 and float64.
            timestep: element of ``timesteps``.
            generator, variance_noise: for the stochastic algorithms, which diffusers' own code runs.
            return_dict: as in diffusers.

        Returns:
            ``SchedulerOutput(prev_sample)`` or a tuple of it, in diffusers' dtypes.

        Raises:
            InputError: a timestep outside [0, T), tensors or a generator that do not fit, or a step after the last.
        """
        self._require(model_output, sample, generator, variance_noise)
        return_dict = flag("return_dict", return_dict)
        arguments = (model_output, timestep, sample, generator, variance_noise, return_dict)
        if self.num_inference_steps is None:
            # Diffusers says what is wrong.
            return super().step(*arguments)
        key = (self._begin(timestep), self._order())
        table = self._cached("steps", self._table)
        history = self.model_outputs[-1] if key[1] == 2 else None
        reason = self._uncovered() or _unfit(model_output, sample, history)
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
        return f"variance_type {config.variance_type!r}" if config.variance_type is not None else None

    def _order(self):
        """1 for the first step after a start, for orders that are not 2, and for a last step that diffusers lowers."""
        config, count = self.config, len(self.timesteps)
        lowers = config.euler_at_final or config.final_sigmas_type == "zero" or (config.lower_order_final and count < 15)
        last = self.step_index == count - 1
        return 1 if config.solver_order == 1 or self.lower_order_nums < 1 or (last and lowers) else 2

    def _table(self):
        return _Table(
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
