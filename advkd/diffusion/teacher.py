"""The diffusion teacher: its noise, and the sampling paths that the student imitates."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..ops import StepCoefficients, philox_normal
from ..runtime.devices import require_device
from ..runtime.files import digest
from .coefficients import ddim_coefficients, ddpm_coefficients
from .loading import Classes, load_pipeline
from .loop import SamplingLoop, network_of

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

SAMPLERS = ("ddim", "ddpm")


class Teacher:
    """An unconditional pixel-space diffusion model with its noise schedule.

    Args:
        unet: diffusers ``UNet2DModel``; it is put into eval mode, frozen and laid out channels_last, in place.
        scheduler: diffusers ``DDPMScheduler`` or ``DDIMScheduler``; its noise schedule, prediction type and clipping are used.
        name: its name in a data set's manifest and in errors.
        classes: names of the classes that the network takes, and which of them stands for none; None for an unconditional one.

    Attributes:
        alpha_bars: alpha_bar of every training timestep, ``(T,)`` float64.
        prediction: meaning of the network's output: ``epsilon``, ``sample`` or ``v_prediction``.
        clip: x0 is clamped to [-clip, clip] in every step; infinity where the scheduler does not clip.

    Examples:
        >>> images = Teacher.from_pretrained("digits").sample(4, seed=1)  # (4, 1, 32, 32) in [-1, 1]
    """

    def __init__(
        self,
        unet: "UNet2DModel",
        scheduler: "DDPMScheduler | DDIMScheduler",
        name: str = "teacher",
        classes: Classes | None = None,
    ):
        self.unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.scheduler = scheduler
        self.name = name
        self.classes = classes
        self.alpha_bars = scheduler.alphas_cumprod.double()
        self.prediction = scheduler.config.prediction_type
        config = scheduler.config
        self.clip = float(config.clip_sample_range) if config.clip_sample else math.inf
        self.optimize()

    @classmethod
    def from_pretrained(
        cls, source: str | Path = "digits", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Teacher":
        """Load a teacher in diffusers' format.

        Args:
            source: ``"digits"`` (embedded), a folder (a pipeline with ``model_index.json``, or a bare UNet folder with a
                scheduler beside it) or a hub id such as ``google/ddpm-celebahq-256``.
            device: torch device that the network computes on.
            dtype: dtype of the network's weights and input; states stay float32.

        Returns:
            Teacher named ``str(source)``, its network frozen and in eval mode.

        Raises:
            InputError: missing or damaged files, a device that is not there, or a teacher that is told more than classes, works
                on latents, learns its variance, or whose scheduler is neither DDPM nor DDIM.
        """
        device = require_device(device)
        unet, scheduler, classes = load_pipeline(source, dtype)
        return cls(unet.to(device), scheduler, str(source), classes)

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.unet.config.in_channels

    @property
    def image_size(self) -> int:
        """Side of the (square) images in pixels."""
        return self.unet.config.sample_size

    @property
    def train_timesteps(self) -> int:
        """T, the number of timesteps the teacher was trained with."""
        return len(self.alpha_bars)

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.unet.parameters()).device

    def identity(self) -> dict:
        """Everything that its paths depend on, for a data set's manifest: weights, network, schedule, prediction, clipping.

        Returns:
            JSON values: ``name``, ``parameters`` (their number), ``weights_sha256``, ``network_sha256``, ``schedule_sha256``,
            ``prediction``, ``clip`` (None without clipping), ``variance`` and, only where it is on, ``autocast``.
        """
        network = {k: v for k, v in sorted(self.unet.config.items()) if not k.startswith("_")}
        return {
            "name": self.name,
            "parameters": self.num_parameters(),
            "weights_sha256": digest(self.unet.state_dict()),
            "network_sha256": hashlib.sha256(json.dumps(network, sort_keys=True).encode()).hexdigest(),
            "schedule_sha256": digest({"alpha_bars": self.alpha_bars}),
            "prediction": self.prediction,
            "clip": self.clip if math.isfinite(self.clip) else None,
            "variance": str(self.scheduler.config.get("variance_type")),
            **({"autocast": str(self._autocast)} if self._autocast else {}),
        }

    def num_parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(p.numel() for p in self.unet.parameters())

    def noise(self, n: int, seed: int = 0, start: int = 0) -> torch.Tensor:
        """x_T of samples ``start .. start + n - 1``: ``(n, C, H, W)`` float32, a function of (seed, index) alone.

        Args:
            n: number of samples.
            seed: key of the noise, in [0, 2^64).
            start: index of the first sample.

        Returns:
            Standard normal numbers on the teacher's device.
        """
        indices = torch.arange(start, start + n, device=self.device)
        return philox_normal(seed, indices, self._shape, stream="x_T")

    def timesteps(self, sampler: str = "ddim", steps: int | None = None) -> list[int]:
        """Timesteps of a run, descending, in leading spacing with offset 0.

        Args:
            sampler: ``ddim`` or ``ddpm``.
            steps: number of timesteps; None or 0: 50 for DDIM (T, if that is fewer), all T for DDPM.

        Returns:
            ``steps`` integers in [0, T), floor(T / steps) apart; the last one is 0.

        Raises:
            InputError: another sampler, or ``steps`` outside [1, T].
        """
        if sampler not in SAMPLERS:
            raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        total = self.train_timesteps
        steps = steps or (min(50, total) if sampler == "ddim" else total)
        if not 1 <= steps <= total:
            raise InputError(f"steps must be between 1 and the teacher's {total} timesteps, got {steps}")
        spacing = total // steps
        return [spacing * i for i in reversed(range(steps))]

    def optimize(self, compiled: bool | None = None, autocast: torch.dtype | None = None) -> "Teacher":
        """Choose how the network runs in :meth:`record` and :meth:`sample`.

        Args:
            compiled: through ``torch.compile`` (a minute or more the first time, kept on disk; every batch size anew); None:
                for recordings on GPUs. On a GPU the whole step is replayed as a captured CUDA graph, compiled or not.
            autocast: ``torch.bfloat16`` for mixed precision (the paths are then others, and a recording says so), or None.

        Returns:
            The teacher itself.

        Raises:
            InputError: another ``autocast``.
        """
        if autocast not in (None, torch.bfloat16):
            raise InputError(f"autocast must be None or torch.bfloat16, got {autocast}")
        self._compiled, self._autocast, self._loop = compiled, autocast, None
        return self

    def match(self, identity: dict) -> "Teacher":
        """Take the precision of a recording.

        Args:
            identity: the :meth:`identity` that the recording names; its ``autocast`` is taken over.

        Returns:
            The teacher itself.
        """
        return self.optimize(self._compiled, torch.bfloat16 if identity.get("autocast") else None)

    @torch.no_grad()
    def path(
        self, x_T: torch.Tensor, sampler: str = "ddim", steps: int | None = None, seed: int = 0, start: int = 0
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Walk a run step by step; the last state is x_0, not clamped to [-1, 1].

        Args:
            x_T: ``(N, C, H, W)`` start states.
            sampler: ``ddim`` (deterministic) or ``ddpm`` (ancestral; step noise is a function of seed, index and step).
            steps: number of steps; see :meth:`timesteps`.
            seed: key of the step noise, in [0, 2^64).
            start: index of the first sample, for the step noise.

        Yields:
            ``(t, x)`` after every step, x being the state after the step taken at t: ``(N, C, H, W)`` float32, a copy on the
            teacher's device. No gradient flows to ``x_T``.

        Raises:
            InputError: at the first step, an ``x_T`` of another shape, or a sampler or a number of steps that cannot be.
        """
        # A loop of its own: several paths may be walked at the same time.
        loop = self._make_loop(network_of(self.unet, self._autocast), len(x_T), sampler, steps, seed, capture=False)
        loop.start(x_T, start)
        for t in self.timesteps(sampler, steps):
            loop.step()
            yield t, loop.x.clone(memory_format=torch.contiguous_format)

    def record(
        self,
        x_T: torch.Tensor,
        keep: dict[int, int],
        sampler: str = "ddim",
        steps: int | None = None,
        seed: int = 0,
        start: int = 0,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """A run that keeps area averages of some states, made within the steps.

        Args:
            x_T: ``(N, C, H, W)`` start states.
            keep: ``{t: r}``: keep the r x r average of the state after the step taken at t.
            sampler: ``ddim`` or ``ddpm``, as in :meth:`path`.
            steps: number of steps; see :meth:`timesteps`.
            seed: key of the step noise, in [0, 2^64).
            start: index of the first sample, for the step noise.

        Returns:
            ``(x_0, {t: (N, C, H / r, W / r)})`` float32 on the teacher's device. Order of differentiability 0: no gradient
            flows to ``x_T``.

        Raises:
            InputError: before work starts, an ``x_T`` of another shape, a t that is not of the run, an r that does not divide.
        """
        timesteps = self.timesteps(sampler, steps)
        for t, r in keep.items():
            if t not in timesteps:
                raise InputError(f"keep: there is no timestep {t} in this run (see Teacher.timesteps)")
            if r < 1 or self.image_size % r:
                raise InputError(f"keep: an average over {r} x {r} pixels does not divide images of {self.image_size}")
        compiled = self.device.type == "cuda" if self._compiled is None else self._compiled
        return self._run(x_T, keep, sampler, steps, seed, start, compiled)

    @torch.no_grad()
    def _run(self, x_T, keep, sampler, steps, seed, start, compiled):
        loop = self._kept_loop(len(x_T), sampler, steps, seed, compiled)
        loop.start(x_T, start)
        kept = {}
        for t in self.timesteps(sampler, steps):
            pooled = loop.step(keep.get(t))
            if pooled is not None:
                kept[t] = pooled.clone(memory_format=torch.contiguous_format)
        return loop.x.clone(memory_format=torch.contiguous_format), kept

    def sample(self, n: int, seed: int = 0, sampler: str = "ddim", steps: int | None = None, start: int = 0) -> torch.Tensor:
        """Images of samples ``start .. start + n - 1``, the ends of their paths.

        Args:
            n: number of images; they run through the network as one batch.
            seed: key of the start noise and of the step noise, in [0, 2^64).
            sampler: ``ddim`` (deterministic) or ``ddpm`` (ancestral).
            steps: number of network evaluations; see :meth:`timesteps`.
            start: index of the first sample.

        Returns:
            ``(n, C, H, W)`` float32 in [-1, 1], on the teacher's device.

        Raises:
            InputError: a sampler, a number of steps or a seed that cannot be.
        """
        # Compiled only where that was asked for: every n would be compiled anew.
        x_0, _ = self._run(self.noise(n, seed, start), {}, sampler, steps, seed, start, bool(self._compiled))
        return x_0.clamp_(-1, 1)

    def _kept_loop(self, n, sampler, steps, seed, compiled):
        # The last loop is kept: a recorder needs the same one again and again, and graphs hold memory. Its key has everything
        # that a captured graph reads: moved or replaced weights, another schedule.
        tensors = (*self.unet.parameters(), *self.unet.buffers())
        parameters = tuple((t.data_ptr(), t.dtype, t.device) for t in tensors)
        table = tuple(self._table(sampler, steps))
        key = (n, sampler, steps, seed, compiled, self.unet, parameters, table)
        if self._loop is None or self._loop[0] != key:
            self._loop = None
            network = network_of(self.unet, self._autocast, compiled)
            self._loop = (key, self._make_loop(network, n, sampler, steps, seed, capture=self.device.type == "cuda"))
        return self._loop[1]

    def _make_loop(self, network, n, sampler, steps, seed, capture):
        timesteps, table = self.timesteps(sampler, steps), self._table(sampler, steps)
        return SamplingLoop(network, (n, *self._shape), timesteps, table, seed, self.device, capture)

    def _table(self, sampler, steps):
        """The coefficients of a run's steps."""
        timesteps = self.timesteps(sampler, steps)
        return [self.coefficients(t, s, sampler) for t, s in zip(timesteps, [*timesteps[1:], None])]

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own loop.
        return {**self.__dict__, "_loop": None}

    def coefficients(self, t: int, following: int | None, sampler: str) -> StepCoefficients:
        """Coefficients of the step from timestep ``t`` to ``following`` (None: to alpha_bar = 1).

        DDIM with eta = 0, or DDPM with the scheduler's fixed variance: see :mod:`advkd.diffusion.coefficients`.

        Args:
            t: timestep of the state, in [0, T).
            following: timestep after the step, or None.
            sampler: ``ddim`` or ``ddpm``.

        Returns:
            Coefficients for :func:`advkd.ops.sampler_step`; ``c_z``, the noise's deviation, is 0 for ``ddim`` and at t = 0.

        Raises:
            InputError: there is no such step, an epsilon prediction at alpha_bar = 0 say; the message names the teacher.
        """
        a_t = float(self.alpha_bars[t])
        a_s = float(self.alpha_bars[following]) if following is not None else 1.0
        try:
            if sampler == "ddim":
                return ddim_coefficients(a_t, a_s, self.prediction, clip=self.clip)
            variance = self.scheduler.config.get("variance_type") or "fixed_small"
            return ddpm_coefficients(a_t, a_s, self.prediction, variance, self.clip, noisy=t > 0)
        except InputError as error:
            raise InputError(f"teacher {self.name}: {error}") from error

    @property
    def _shape(self):
        return (self.image_channels, self.image_size, self.image_size)
