"""Denoising diffusion GANs (Xiao et al. 2022): a generator samples q(x0 | x_t), so that few large steps are enough.

A large step's q(x_s | x_t) is no Gaussian: a posterior mean cannot draw it. The generator is told a latent u beside x_t, its
image goes through the posterior q(x_s | x_t, x0), and a critic of (x_s, x_t) compares the result with a pair of the chain.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..data.draws import Draw
from ..data.sources import Batch
from ..diffusion.coefficients import ddpm_coefficients
from ..diffusion.denoiser import noised, over
from ..diffusion.denoiser_student import Sampler
from ..diffusion.schedule import IMAGE, Schedule
from ..diffusion.solvers import Solver
from ..errors import InputError
from ..models.batch_norm import evaluating
from ..models.critic import Critic, CriticConfig
from ..models.denoiser import pack
from ..ops.critic.update import critic_gradients
from ..ops.registry import BACKENDS
from ..runtime.devices import seeded_weights
from .base import Kept, Needs, Settings, Stage, Step, Trained
from .denoiser_method import DenoiserConfig, DenoiserMethod


@dataclass
class DDGANConfig(DenoiserConfig):
    """How ``advkd distill ddgan`` trains.

    Attributes:
        steps: K, the steps from noise to image; each begins at a level of its own.
        latent: numbers of the latent u that the generator is told in every step.
        critic_updates: updates of the critic for each of the generator.
        r1: weight of the critic's gradient penalty on real x_s, r1 / 2 |grad D|^2.
        r1_every: updates of the critic between two penalties, each of which counts so many times.
        critic_learning_rate: of the critic's Adam.
        betas: of Adam, for generator and critic.
        critic_channels: features after the critic's first convolution; they double with each further one.
        critic_max_channels: upper bound of the critic's features.
        critic_backend: what differentiates the critic: ``auto``, a backend's name, or ``autograd``.
        drop: share of the labels that are replaced by a conditional student's null class.
    """

    updates: int = 3000
    learning_rate: float = 1e-4
    ema: float = 0.999
    steps: int = 4
    latent: int = 64
    critic_updates: int = 1
    r1: float = 0.05
    r1_every: int = 15
    critic_learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.9)
    critic_channels: int = 32
    critic_max_channels: int = 128
    critic_backend: str = "auto"
    drop: float = 0.1

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        super().validate()
        for name in ("steps", "latent", "critic_updates", "r1_every", "critic_channels", "critic_max_channels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        most, known = self.critic_max_channels, ("autograd", "auto", *BACKENDS)
        for name, holds, wanted in (
            ("r1", 0 <= self.r1 < math.inf, "at least 0 and finite"),
            ("critic_learning_rate", 0 < self.critic_learning_rate < math.inf, "positive and finite"),
            ("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)"),
            ("critic_channels", self.critic_channels <= most, f"at most critic_max_channels, {most}"),
            ("critic_backend", self.critic_backend in known, f"one of {', '.join(known)}"),
            ("drop", 0 <= self.drop < 1, "in [0, 1)"),
        ):
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


class DDGAN(DenoiserMethod):
    """A generator of K large steps, each trained against a critic that sees the state before it; images alone, no teacher.

    Args:
        config: a :class:`DDGANConfig`.
        student: network that gives v, told :func:`advkd.models.denoiser.pack` of classes and latents.
        schedule: noise schedule of the student.
        critic: module of x_s ``(N, C, H, W)`` and a condition ``(N, C + K + classes, H, W)``, x_t and planes of 0 and 1 for
            step and class, that gives scores ``(N,)``; None: an :class:`advkd.Critic` of the images' shape.

    Raises:
        InputError: more steps than the schedule has timesteps.
    """

    name = "ddgan"
    reference = "Xiao et al. 2022, Tackling the generative learning trilemma with denoising diffusion GANs"
    requires = "images (--data) and a student of v prediction (--init) or a fresh one (--channels); no teacher is called"
    inputs = ("data", "teacher")
    takes_latents: ClassVar[bool] = True
    columns: tuple[str, ...] = ("loss", "critic", "penalty")
    Config = DDGANConfig
    config: DDGANConfig

    def __init__(self, config: DDGANConfig, student: nn.Module, schedule: Schedule, critic: nn.Module | None = None):
        super().__init__(config, student, schedule)
        levels = Solver("ddpm", "trailing").levels(schedule, config.steps)
        self.alpha_bars = tuple(level.alpha_bar for level in levels)
        steps = [
            (before, after, ddpm_coefficients(before.alpha_bar, after.alpha_bar, "sample", noisy=after.noise > 0))
            for before, after in pairwise([*levels, IMAGE])
        ]
        rows = [(b.sigma, a.sigma, b.alpha_bar / a.alpha_bar, c.c_0, c.c_x, c.c_z) for b, a, c in steps]
        self._steps = torch.tensor(rows, dtype=torch.float64, device="cpu")
        self._denoiser = self.denoiser(student)
        self._critic: Any = critic

    @classmethod
    def calls_teacher(cls, config: Any) -> bool:
        """False: it learns from images alone.

        Args:
            config: not used.
        """
        return False

    @classmethod
    def begin(cls, config: Any, student: Any) -> Any:
        """The student, or a copy that takes a latent, which at first changes nothing.

        Args:
            config: a :class:`DDGANConfig`.
            student: a :class:`~advkd.diffusion.denoiser_student.DenoiserStudent`.

        Returns:
            One that takes ``config.latent`` numbers.

        Raises:
            InputError: weights of another prediction, or a student that takes another latent.
        """
        config.validate()
        student, own = super().begin(config, student), student.model.latent
        if own and own != config.latent:
            raise InputError(f"latent must be {own}, that of the student's own training, got {config.latent}")
        return student if own else student.told_more(config.seed, latent=config.latent)

    def needs(self) -> Needs:
        """Images, with labels where the student is told classes.

        Returns:
            Needs.

        Raises:
            InputError: a critic that does not fit the images, or images that no critic is made for.
        """
        if self._critic is None:
            self._critic_config()
        elif self.shape:
            self._require_critic()
        backend = self.config.critic_backend
        return Needs("images", labels=self.num_classes > 0, student="denoiser", critic_backend=backend)

    @property
    def _classes(self):
        """Classes that the critic is told, the null class among them."""
        return self.num_classes + (self.null_class is not None)

    def _critic_config(self):
        """Shape of a critic of the images and their conditions."""
        if len(self.shape) != 3:
            raise InputError(f"critic: there is none of samples {self.shape}, which are no images: name one")
        config, (channels, _, side) = self.config, self.shape
        planes = channels + config.steps + self._classes
        try:
            return CriticConfig(side, channels, config.critic_channels, config.critic_max_channels, planes, side)
        except InputError as error:
            raise InputError(f"there is no critic of images {self.shape} ({error}): resize them") from error

    @torch.no_grad()
    def _require_critic(self):
        """Run the critic that was given once, in eval mode: nothing of it may change."""
        like = next(self._critic.parameters(), torch.zeros((), device="cpu"))
        x, k = like.new_zeros(2, *self.shape), torch.zeros(2, dtype=torch.int64, device=like.device)
        try:
            with evaluating(self._critic):
                scores = self._critic(x, self._told(x, k, k if self._classes else None))
            found = tuple(scores.shape)
        except Exception as error:  # it may be any module
            raise InputError(
                f"critic: it does not take images {self.shape} and their conditions ({error}): leave it out"
            ) from error
        if found != (2,):
            raise InputError(f"critic: it gives {found} for 2 images, not one score each: leave it out")

    def settings(self) -> Settings:
        """The trainer's part of the configuration; a resumed run may take another backend."""
        config = self.config
        free = ("checkpoint_every", "critic_backend")
        return Settings(config.seed, config.checkpoint_every, config.log_every, config.mixed_precision, free)

    def build(self, stage: Stage) -> dict[str, Trained | Kept]:
        """The generator and the critic.

        Args:
            stage: the one stage.

        Returns:
            ``student`` and ``critic``.
        """
        config, student = self.config, self.trained(self.student, stage.updates)
        student.betas = config.betas
        if self._critic is None:
            with seeded_weights(config.seed):
                self._critic = Critic(self._critic_config())
        critic = Trained(self._critic, config.critic_learning_rate, config.betas, schedule=student.schedule)
        return {"student": student, "critic": critic}

    def sampler(self, stage: Stage) -> Sampler:
        """Ancestral steps between the levels that were learnt; a smaller number of steps is one that divides theirs.

        Args:
            stage: not used.

        Returns:
            Sampler.
        """
        return Sampler(Solver("ddpm", alpha_bars=self.alpha_bars), self.config.steps)

    def evaluations(self, stage: Stage) -> tuple[int, int]:
        """The generator once for each update of the critic, whose last images are its own; the critic is not counted.

        Args:
            stage: not used.

        Returns:
            ``(forward, backward)`` by sample of the batch.
        """
        return self.config.critic_updates, 1

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """The critic on (x_s, x_t) of the chain and of the generator, softplus and lazy R1; then the generator against it.

        Args:
            step: actions of the update.
            batch: ``images``, and ``labels`` where the student is told classes.
            draw: steps, noise and latents.
        """
        updates = self.config.critic_updates
        for i in range(updates):
            if i:
                batch, draw = step.next_batch()
            k, labels = draw.integers("step", self.config.steps), self.dropped(batch.labels, draw, self.config.drop)
            x_s, x_t = self._pair(batch.images, k, draw)
            with torch.set_grad_enabled(i + 1 == updates), step.autocast():
                fake = self._step(x_t, k, labels, draw).to(x_s.dtype)
            told = self._told(x_t, k, labels)
            self._judge(step, x_s, fake.detach(), told, draw.start // self.config.batch_size)
        loss = F.softplus(-self._critic(fake, told)).mean()
        step("student", loss)
        step.log(loss=loss.detach())

    def _judge(self, step, real, fake, told, number):
        """Update ``number`` of the critic; every ``r1_every``-th one has the penalty."""
        config = self.config
        found = critic_gradients(
            self._critic,
            real,
            fake,
            condition=told,
            loss="softplus",
            mode="r1",
            weight=config.r1 * config.r1_every * (number % config.r1_every == 0),
            backend=config.critic_backend,
            check_finite=False,
        )
        step.gradients("critic", (gradient for gradient in found.gradients if gradient is not None))
        step.log(critic=found.loss, penalty=found.penalty)

    def _weights(self, x, k):
        """The numbers of each sample's step in shapes that multiply states."""
        return [over(x, column) for column in self._steps.to(x.device)[k].unbind(1)]

    def _pair(self, images, k, draw):
        """(x_s, x_t) of one image: x_t gains its noise from x_s, as in the chain."""
        shape, ratio = images.shape[1:], self._weights(images, k)[2]
        x_s = noised(images, draw.normal("x_s", *shape), self._steps.to(images.device)[k, 1])
        return x_s, ratio.sqrt() * x_s + (1 - ratio).sqrt() * draw.normal("x_t", *shape)

    def _step(self, x_t, k, labels, draw):
        """x_s of the generator: G(x_t, u, t) through the posterior q(x_s | x_t, x0)."""
        *_, c_0, c_x, c_z = self._weights(x_t, k)
        condition = pack(labels, latent=draw.normal("u", self.config.latent))
        x0, _ = self._denoiser.predict(x_t, self._steps.to(x_t.device)[k, 0], condition)
        return c_0 * x0 + c_x * x_t + c_z * draw.normal("posterior", *x_t.shape[1:])

    def _told(self, x_t, k, labels):
        """The critic's condition: x_t, and planes of 0 and 1 for the step and the class."""
        columns = [F.one_hot(k, self.config.steps)] + ([] if labels is None else [F.one_hot(labels, self._classes)])
        planes = torch.cat(columns, dim=1)[:, :, None, None].to(x_t.dtype)
        return torch.cat((x_t, planes.expand(-1, -1, *x_t.shape[2:])), dim=1)
