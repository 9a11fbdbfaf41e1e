"""The diffusion teacher: its noise, and the sampling paths that the student imitates."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InputError
from ..models.autoencoder import Autoencoder, Pictured
from ..models.denoiser import LowImage, embedding_of, evaluate
from ..ops.arguments import whole
from ..runtime.devices import require_device
from .denoiser import Denoiser
from .guidance import NoisyClassifier, classes_of, classifier_free, condition_of, guided, require_null
from .identity import identity_of
from .loading import Classes, load_pipeline, require_network, require_scheduler
from .loop import SamplingLoop, network_of
from .low_images import LowImages
from .noise_power import NoisePower
from .sampling import DiffusionModel
from .schedule import Level, Schedule
from .solvers import Solver

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel


class Teacher(Pictured, DiffusionModel):
    """A diffusion model of images, unconditional or told classes, with its noise schedule.

    Args:
        unet: diffusers ``UNet2DModel``; it is put into eval mode, frozen and laid out channels_last, in place.
        scheduler: diffusers ``DDPMScheduler`` or ``DDIMScheduler``; its noise schedule, prediction type and clipping are used.
        name: its name in a data set's manifest and in errors.
        classes: names of the classes that the network takes, and which of them stands for none; None for an unconditional one.
        folder: of its files, where the noise power for the analytic solvers is looked for; None: it has none.

    Raises:
        InputError: a network or a scheduler that the solvers do not know: a learned variance, dynamic thresholding.

    Attributes:
        schedule: the noise schedule in float64.
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
        folder: str | Path | None = None,
    ):
        require_scheduler(scheduler, name)
        side, config = unet.config.sample_size, scheduler.config
        super().__init__(Schedule(scheduler.alphas_cumprod), (unet.config.out_channels, side, side))
        self.low = LowImages.of(unet, len(self.schedule), name)
        require_network(unet.config, name, low=self.low is not None)
        self.unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.scheduler = scheduler
        self.name = name
        condition = embedding_of(unet)
        embedded = condition.config.classes if condition else getattr(unet.config, "num_class_embeds", None)
        self.most_guidance, self.latent = (condition.config.guidance, condition.config.latent) if condition else (0.0, 0)
        classes = classes or (Classes(tuple(map(str, range(embedded)))) if embedded else None)
        self.classes, self.folder = classes, folder
        self.class_names = classes.names if classes else ()
        self.num_classes, self.null_class = len(self.class_names), classes.null if classes else None
        self.prediction = config.prediction_type
        self.clip = float(config.clip_sample_range) if config.clip_sample else math.inf
        self.variance_type = config.get("variance_type") or self.variance_type
        self.optimize()

    @classmethod
    def from_pretrained(
        cls, source: str | Path = "digits", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Teacher":
        """Load a teacher in diffusers' format.

        Args:
            source: ``"digits"``, ``"digits-conditional"``, ``"glyphs"``, a folder (a pipeline with ``model_index.json``, or a
                bare UNet folder with a scheduler beside it) or a hub id such as ``google/ddpm-celebahq-256``.
            device: torch device that the network computes on.
            dtype: dtype of the network's weights and input; states stay float32.

        Returns:
            Teacher named ``str(source)``, its network frozen and in eval mode; a :class:`LatentTeacher` where the folder has a
            ``vqvae`` or a ``vae``, which stays float32.

        Raises:
            InputError: missing or damaged files, a device that is not there, or a teacher that is told more than classes,
                learns its variance, whose scheduler is neither DDPM nor DDIM, or whose autoencoder does not fit its network.
        """
        device = require_device(device)
        unet, scheduler, classes, folder, autoencoder = load_pipeline(source, dtype)
        if autoencoder is None:
            return Teacher(unet.to(device), scheduler, str(source), classes, folder)
        return LatentTeacher(unet.to(device), scheduler, autoencoder, str(source), classes, folder)

    @functools.cached_property
    def noise_powers(self) -> NoisePower | None:
        """Noise power kept with its files for the analytic solvers, or None; read where it is needed."""
        return None if self.folder is None else NoisePower.read(self.folder, self.train_timesteps)

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.unet.parameters()).device

    def identity(self, solver: Solver | None = None) -> dict:
        """Everything that its paths depend on, for a data set's manifest: weights, network, schedule, prediction, clipping.

        Args:
            solver: of the paths; an analytic one depends on the noise power, too.

        Returns:
            JSON values: ``name``, number of ``parameters``, digests of weights, network and schedule, ``prediction``, ``clip``
            (None: no clipping), ``variance``, only where it is on ``autocast``, for analytic solvers ``noise_power``, and the
            digest of a latent teacher's autoencoder.
        """
        powers = self.noise_powers if solver is not None and solver.analytic else None
        return identity_of(self, self._autocast, powers)

    def num_parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(p.numel() for p in self.unet.parameters())

    def predict(
        self,
        x: torch.Tensor,
        sigma: float | torch.Tensor,
        condition: torch.Tensor | LowImage | None = None,
        guidance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The image and the noise that the network finds in states, x0 clamped to [-``clip``, ``clip``].

        Args:
            x: ``(N, C, H, W)`` float32 variance-preserving states, on the teacher's device.
            sigma: noise level sqrt((1 - a) / a), a number or ``(N,)``.
            condition: ``(N,)`` classes, whole numbers, the null class among them, or the low images of a super-resolution
                teacher; None: no class, which a conditional teacher needs its null class for.
            guidance: ``(N,)`` weights w of classifier-free guidance, after which x0 is clamped; None: no guidance.

        Returns:
            ``(x0, eps)``, both ``(N, C, H, W)`` float32; eps goes with the clamped x0. No gradient flows.

        Raises:
            InputError: noise levels or classes that cannot be, or guidance of a teacher without a null class.
        """
        denoiser = self.denoiser
        if guidance is not None:
            denoiser.network = classifier_free(denoiser.network, guidance, require_null(self))
        with torch.no_grad():
            return denoiser.predict(x, sigma, condition_of(self, len(x), condition))

    @property
    def denoiser(self) -> Denoiser:
        """The network as a denoiser of variance-preserving states, with the teacher's clipping; gradients flow."""

        def network(state, t, condition):
            return evaluate(self.unet, state, self._timesteps_for(t), condition)

        return Denoiser(network, self.schedule, self.prediction, self.clip)

    def _looks_timesteps_up(self):
        return getattr(self.unet.config, "time_embedding_type", None) == "learned"

    def _timesteps_for(self, t):
        """Timesteps as the network takes them: one that looks them up in a table needs whole ones."""
        if not self._looks_timesteps_up():
            return t
        whole = t.round()
        if (t - whole).abs().max() > 1e-3:
            raise InputError(f"teacher {self.name} knows whole timesteps only: choose noise levels of whole timesteps")
        return whole.long()

    def noise_power(self, level: Level) -> float:
        """E|eps|^2 / d of the noise that the network finds at a level, from the estimates kept with the teacher.

        Args:
            level: level of the states.

        Returns:
            Mean over data, noise and dimensions.

        Raises:
            InputError: it has not been estimated.
        """
        if self.noise_powers is None:
            raise InputError("its noise power is not known: run 'advkd teacher noise-power' once, or estimate_noise_power")
        return self.noise_powers.at(level)

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

    def record(
        self,
        x_T: torch.Tensor,
        keep: dict[int, int],
        solver: str | Solver = "ddim",
        steps: int | None = None,
        seed: int = 0,
        start: int = 0,
        *,
        labels: torch.Tensor | Sequence[int] | int | None = None,
        guidance: float = 0.0,
        classifier: NoisyClassifier | None = None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """A run that keeps area averages of some states, made within the steps.

        Args:
            x_T: ``(N, C, H, W)`` start states.
            keep: ``{t: r}``: keep the r x r average of the state after the step taken at t.
            solver: a name, or a :class:`~advkd.diffusion.solvers.Solver`.
            steps: number of steps; see :meth:`timesteps`.
            seed: key of the step noise, in [0, 2^64).
            start: index of the first sample, for the step noise.
            labels: as for :meth:`sample`.
            guidance: as for :meth:`sample`.
            classifier: as for :meth:`sample`.

        Returns:
            ``(x_0, {t: (N, C, H / r, W / r)})`` float32 on the teacher's device. Order of differentiability 0: no gradient
            flows to ``x_T``.

        Raises:
            InputError: before work starts, an ``x_T`` of another shape, a t that is not of the run, an r that does not divide.
        """
        timesteps = self.timesteps(solver, steps)
        for t, r in keep.items():
            if t not in timesteps:
                raise InputError(f"keep: there is no timestep {t} in this run (see Teacher.timesteps)")
            if r < 1 or self.shape[-1] % r:
                raise InputError(f"keep: an average over {r} x {r} pixels does not divide images of {self.shape[-1]}")
        compiled = self.device.type == "cuda" if self._compiled is None else self._compiled
        return self._run(x_T, keep, solver, steps, seed, start, compiled, (labels, guidance, classifier))

    @torch.no_grad()
    def _run(self, x_T, keep, solver, steps, seed, start, compiled, condition):
        loop = self._kept_loop(len(x_T), solver, steps, seed, compiled, condition)
        loop.start(x_T, start)
        kept = {}
        for t in self.timesteps(solver, steps):
            if (pooled := loop.step(keep.get(t))) is not None:
                kept[t] = pooled.clone(memory_format=torch.contiguous_format)
        return loop.x.clone(memory_format=torch.contiguous_format), kept

    def sample(
        self,
        n: int,
        seed: int = 0,
        solver: str | Solver = "ddim",
        steps: int | None = None,
        start: int = 0,
        *,
        labels: torch.Tensor | Sequence[int] | int | None = None,
        guidance: float = 0.0,
        classifier: NoisyClassifier | None = None,
    ) -> torch.Tensor:
        """Images of samples ``start .. start + n - 1``, the ends of their paths.

        Args:
            n: number of images; they run through the network as one batch.
            seed: key of the start noise and of the step noise, in [0, 2^64).
            solver: a name of :data:`~advkd.diffusion.solvers.METHODS`, or a :class:`~advkd.diffusion.solvers.Solver`.
            steps: number of steps; see :meth:`timesteps`.
            start: index of the first sample.
            labels: ``(n,)`` classes in [0, ``num_classes``), or one for all; None: no class.
            guidance: w >= 0, the weight of guidance towards the class. Without ``classifier`` it is classifier-free: the noise
                is (1 + w) eps(x, class) - w eps(x), so that 0 is the conditional model; diffusers' ``guidance_scale`` is 1 + w.
                With one, it is eps(x) - w sqrt(1 - a) grad log p(class | x).
            classifier: a classifier of noisy images, for classifier guidance; ``guidance`` is its weight.

        Returns:
            ``(n, C, H, W)`` float32 in [-1, 1], on the teacher's device.

        Raises:
            InputError: a number of images, a solver, a number of steps, a seed or classes that cannot be.
        """
        x_T, condition = self.noise(whole("n", n, least=1), seed, start), (labels, guidance, classifier)
        return self.draw(x_T, solver, steps, seed, start, condition)

    def draw(
        self,
        x_T: torch.Tensor,
        solver: str | Solver = "ddim",
        steps: int | None = None,
        seed: int = 0,
        start: int = 0,
        condition: tuple[Any, float, NoisyClassifier | None] = (None, 0.0, None),
    ) -> torch.Tensor:
        """Images of start noise that is given.

        Args:
            x_T: ``(N, C, H, W)`` start states.
            solver: as for :meth:`sample`.
            steps: number of steps.
            seed: key of the step noise.
            start: index of the first sample, for the step noise.
            condition: labels, guidance and classifier of :meth:`sample`.

        Returns:
            ``(N, C, H, W)`` float32 in [-1, 1], on the teacher's device.
        """
        # Compiled only where that was asked for: every number of images would be compiled anew.
        return self.images(self._run(x_T, {}, solver, steps, seed, start, bool(self._compiled), condition)[0]).clamp_(-1, 1)

    def _kept_loop(self, n, solver, steps, seed, compiled, condition):
        # The last loop is kept: a recorder needs the same one again and again, and graphs hold memory. Its key has everything
        # that a captured graph reads: moved or replaced weights, another schedule.
        labels, guidance, classifier = condition
        tensors = [*self.unet.parameters(), *self.unet.buffers()]
        if isinstance(classifier, nn.Module):
            tensors += [*classifier.parameters(), *classifier.buffers()]
        places = tuple((t.data_ptr(), t.dtype, t.device) for t in tensors)
        told = classes_of(self, n, labels, guidance, classifier)
        key = (n, tuple(self.program(solver, steps)), seed, compiled, self.unet, places, told is None, guidance, classifier)
        if self._loop is None or self._loop[0] != key:
            self._loop = None
            told = None if told is None else told.clone()  # theirs may be the caller's own memory
            network = guided(self, self._network(compiled), n, told, guidance, classifier)
            shape, capture = (n, *self.shape), self.device.type == "cuda"
            self._loop = (key, SamplingLoop(network, shape, key[1], seed, self.device, capture, latent=self.latent), told)
        elif told is not None:
            self._loop[2].copy_(told)  # graphs read the classes where the first ones were
        return self._loop[1]

    def _network(self, compiled=False):
        return network_of(self.unet, self._autocast, compiled)

    def _program(self, solver, steps):
        program = solver.program(self.schedule, steps, self.prediction, self.clip, self.variance_type, self.noise_power)
        if self._looks_timesteps_up() and any(e.level.t % 1 for e in program if e.network):
            needed = f"its network knows whole timesteps only, and {solver.name} needs others"
            raise InputError(f"{needed}: take another solver, or a spacing of whole timesteps")
        return program

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own loop.
        return {**self.__dict__, "_loop": None}


class LatentTeacher(Teacher):
    """A teacher whose states are the latents of an autoencoder: ``sample`` and ``draw`` decode, ``record`` and ``path`` do not.

    ``unet``, ``scheduler``, ``name``, ``classes`` and ``folder`` are as for :class:`Teacher`.

    Args:
        autoencoder: between latents of unit variance and pictures.

    Raises:
        InputError: as for :class:`Teacher`, or an autoencoder whose latents have another shape.
    """

    def __init__(
        self,
        unet: "UNet2DModel",
        scheduler: "DDPMScheduler | DDIMScheduler",
        autoencoder: Autoencoder,
        name: str = "teacher",
        classes: Classes | None = None,
        folder: str | Path | None = None,
    ):
        super().__init__(unet, scheduler, name, classes, folder)
        self.autoencoder = autoencoder.require_latents(self.shape, f"teacher {name}")
