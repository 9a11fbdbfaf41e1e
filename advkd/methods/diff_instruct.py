"""Diff-Instruct (Luo et al. 2023) and distribution matching distillation (Yin et al. 2024): a generator by two scores.

The student draws in one pass. Its images' scores are those of a network trained on them; where they differ from the teacher's,
the images move. Reverse divergences forget modes: pairs of the teacher's (DMD) or a critic on noised images (DMD2) hold them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.draws import Draw
from ..data.sources import Batch
from ..diffusion.denoiser import noised
from ..diffusion.denoiser_student import Sampler
from ..diffusion.schedule import Schedule
from ..diffusion.solvers import Solver
from ..errors import InputError
from ..models.critic import Critic, CriticConfig
from ..ops.critic.update import critic_gradients
from ..runtime.devices import seeded_weights
from .base import Kept, Needs, Stage, Step, Trained
from .denoiser_method import require_unused
from .generator import previewed
from .score import ScoreConfig, ScoreMethod, along

NORMS = ("", "batch", "frozen")
"""Statistics of a generator's batch norm while it is trained; see :class:`DiffInstructConfig`."""


@dataclass
class DiffInstructConfig(ScoreConfig):
    """How ``advkd distill diff-instruct`` trains.

    Attributes:
        entry: noise level sigma at which a denoiser student is entered, once.
        regression: weight of the squared error on recorded pairs (--trajectories).
        gan: weight of a critic of noised images, real ones (--data, or the pairs') against the student's (0: none).
        gradient_penalty: lambda of the critic.
        critic_learning_rate: of the critic's Adam.
        critic_channels: features after the critic's first convolution; they double with each further one.
        critic_max_channels: upper bound of the critic's features.
        norm: statistics of a generator's batch norm: each batch's (``batch``) or the ones it came with (``frozen``); empty:
            frozen for a student that has been trained before.
    """

    entry: float = 1.0
    regression: float = 0.25
    gan: float = 0.0
    gradient_penalty: float = 10.0
    critic_learning_rate: float = 2e-4
    critic_channels: int = 32
    critic_max_channels: int = 128
    norm: str = ""

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        super().validate()
        for name in ("regression", "gan", "gradient_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        for name in ("entry", "critic_learning_rate", "critic_channels", "critic_max_channels"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.norm not in NORMS:
            raise InputError(f"norm must be batch or frozen, or empty, got {self.norm!r}")
        if self.critic_channels > self.critic_max_channels:
            most = self.critic_max_channels
            raise InputError(f"critic_channels must be at most critic_max_channels, {most}, got {self.critic_channels}")
        critic = ("gradient_penalty", "critic_learning_rate", "critic_channels", "critic_max_channels")
        require_unused(self, not self.gan, "a critic (--gan)", *critic)


class DiffInstruct(ScoreMethod):
    """A generator whose images are distributed as the teacher's, without images or with pairs and a critic beside.

    The student is a one-pass student (--preset, --init) or a network that gives v (--init, --channels), entered at one level.

    Args:
        config: a :class:`DiffInstructConfig`.
        student: module from z to images; with ``schedule`` a network that gives v at a state, a timestep and a condition.
        schedule: noise schedule of a denoiser student; None: the student is a generator.
        score: see :class:`~advkd.methods.score.ScoreMethod`.

    Attributes:
        bound: factor of a generator's output in [-1, 1] that makes it the teacher's latents; 1 of pictures.

    Raises:
        InputError: numbers that cannot work, or an entry outside of the schedule's levels.
    """

    name = "diff-instruct"
    reference = "Luo et al. 2023, Diff-Instruct, algorithm 1; Yin et al. 2024, Distribution matching distillation"
    requires = "a teacher (--teacher); pairs (--trajectories) for --regression, these or images (--data) for --gan, if you like"
    inputs = ("trajectories", "data", "teacher")
    students: ClassVar[tuple[str, ...]] = ("generator", "denoiser")
    Config = DiffInstructConfig
    config: DiffInstructConfig
    given = "none"
    bound = 1.0

    def __init__(
        self, config: DiffInstructConfig, student: Any, schedule: Schedule | None = None, score: nn.Module | None = None
    ):
        self._draws = schedule is None
        super().__init__(config, student, schedule, score)  # type: ignore[arg-type]
        if config.gan:
            self.columns = (*self.columns, "critic", "penalty")
        self._critic: nn.Module | None = None
        self._numbers: Tensor | None = None
        trained = getattr(student, "training_record", None)
        self._norm = (config.norm or ("frozen" if trained else "batch")) if self._draws else ""
        if schedule is None:
            if config.entry != type(config).entry:
                raise InputError("entry is of a denoiser student, which is entered there: leave it out")
            return
        if config.norm:
            raise InputError("norm is of a one-pass student, which has batch norm: leave it out")
        least, most = schedule.sigma(0.0).item(), schedule.sigma(len(schedule) - 1.0).item()
        if not least <= config.entry <= most:
            raise InputError(f"entry must be within the schedule's levels, {least:.3g} to {most:.3g}, got {config.entry}")

    def check(self, data: Any) -> None:
        """Refuse pairs that the teacher was guided to with another weight than that of its score.

        Args:
            data: the recorded pairs.

        Raises:
            InputError: two weights.
        """
        recorded, ours = data.info.guidance, self.config.guidance
        if recorded != ours:
            raise InputError(
                f"guidance {ours:g}: the pairs were recorded with {recorded:g}, and two losses would lead to different images: "
                f"give --guidance {recorded:g}, or record others"
            )

    def needs(self) -> Needs:
        """A teacher, and the pairs or images that the run has.

        Returns:
            Needs.

        Raises:
            InputError: data that would not be read, a critic without any or of other images, or what does not fit the teacher.
        """
        config, given, kind = self.config, self.given, "generator" if self._draws else "denoiser"
        self.require_fit(self._classes)
        require_unused(config, given != "pairs", "pairs (--trajectories)", "regression")
        if given == "none" and config.gan:
            raise InputError("gan compares with images: name them by --data, or pairs by --trajectories")
        if given == "images" and not config.gan:
            raise InputError("images are for the critic: give --gan a weight, or leave --data out")
        if given == "pairs" and not config.gan and not config.regression:
            raise InputError("pairs are for --regression and --gan: give one of them a weight, or leave --trajectories out")
        if config.gan and self.teacher is not None:
            self._critic_config()
        labels = given != "none" and self._classes > 0
        return Needs(given, given == "pairs" and config.regression > 0, teacher=True, labels=labels, student=kind)

    def _critic_config(self):
        config, (channels, *_, side) = self.config, self.teacher.shape
        try:
            return CriticConfig(side, channels, config.critic_channels, config.critic_max_channels, 1 + self._classes)
        except InputError as error:
            raise InputError(
                f"gan: there is no critic of the teacher's images, {self.teacher.shape} ({error}): leave gan out"
            ) from error

    @property
    def _classes(self):
        return self.student.num_classes if hasattr(self.student, "num_classes") else self.num_classes

    def stages(self) -> Sequence[Stage]:
        """One stage; on a one-pass student's pairs it reads the last level, the image.

        Returns:
            ``[Stage]``.
        """
        depth: Any = getattr(self.student, "depth", None) if self.given == "pairs" else None
        levels = (depth,) if depth else ()
        return [Stage(1, self.config.updates, self.config.batch_size, levels)]

    def build(self, stage: Stage) -> dict[str, Trained | Kept]:
        """The student, the score network and, where there is one, the critic.

        Args:
            stage: the one stage.

        Returns:
            ``student``, ``score`` and ``critic``.
        """
        config, student, teacher = self.config, self.student, self.teacher
        if self._draws:
            self.schedule = teacher.schedule
            self._numbers = numbers_of(getattr(student, "class_names", ()), teacher.class_names)
        parts = super().build(stage)
        if hasattr(student, "terminals"):
            student.terminals.requires_grad_(False)
        if self._norm == "frozen":
            student.eval()
        if config.gan:
            with seeded_weights(config.seed):
                self._critic = Critic(self._critic_config())
            parts["critic"] = Trained(self._critic, config.critic_learning_rate, config.betas, schedule=self._rate)
        return parts

    def evaluations(self, stage: Stage) -> tuple[float, float]:
        """The student once for each update of the score network, which is compared with the teacher once, and on pairs.

        The critic is not counted; guidance takes the teacher twice.

        Args:
            stage: not used.

        Returns:
            ``(forward, backward)`` by sample of the batch.
        """
        updates, trained, pairs = self.config.score_updates, self.trained_share, int(self._regresses)
        return 2 * updates + 2 + pairs * trained + (self.config.guidance > 0), updates + (1 + pairs) * trained

    @property
    def _regresses(self):
        return self.given == "pairs" and self.config.regression > 0

    def sampler(self, stage: Stage) -> Sampler:
        """One evaluation of a denoiser student.

        Args:
            stage: not used.

        Returns:
            DDIM from the level at which the network is entered.
        """
        return Sampler(Solver("ddim", alpha_bars=(1 / (1 + self.config.entry**2),)))

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """Updates of the score network on images of fresh noise; then one of the student along D_q - D_p at the last of them.

        Args:
            step: actions of the update.
            batch: ``z`` and ``images`` of pairs, ``images`` alone, or nothing; ``labels`` beside them.
            draw: noise and its levels.
        """
        waits, rounds = self.waits(draw), self.config.score_updates
        for i in range(rounds):
            if i:
                batch, draw = step.next_batch()
            last, labels = i + 1 == rounds and not waits, self._labels(batch, draw)
            fresh, paired = self._images(step, batch, draw, labels, last)
            told = labels if labels is None or self._numbers is None else self._numbers.to(labels.device)[labels]
            self.learn_score(step, fresh.detach(), draw, self.noise_levels(draw, "score level"), told)
        direction = self.direction(fresh, draw, self.noise_levels(draw, "level"), told)
        losses = [along(direction, fresh)]
        if paired is not None:
            losses.append(self.config.regression * F.mse_loss(paired, batch.images))
        if self._critic is not None:
            losses.append(self.config.gan * self._judged(step, batch, draw, labels, fresh))
        step.log(difference=direction.square().mean())
        if not waits:
            loss = torch.stack(losses).sum()
            step("student", loss)
            step.log(loss=loss.detach())

    def _labels(self, batch, draw):
        """Classes of fresh noise: those of the batch, or of one's own."""
        if not self._classes:
            return None
        return draw.integers("labels", self._classes) if batch.labels is None else batch.labels

    def _images(self, step, batch, draw, labels, trained):
        """Images of fresh noise, and of the batch's pairs where the student is trained on them."""
        numbers = getattr(self.student, "latent_numel", None)
        z, regresses = draw.normal("z", *(self.teacher.shape if numbers is None else (numbers,))), trained and self._regresses
        both = torch.cat((z, batch.z.reshape(z.shape))) if regresses else z
        told = labels if labels is None or not regresses else labels.repeat(2)
        with torch.set_grad_enabled(trained), step.autocast():
            images = self._generate(both, told)
        images = self.bound * images.to(z.dtype)
        return (images[: len(z)], images[len(z) :]) if regresses else (images, None)

    def _generate(self, z, labels):
        if self._draws:
            return self.student(z) if labels is None else self.student(z, labels=labels)
        return self.denoiser(self.student).predict(z, self.config.entry, labels)[0]

    def _judged(self, step, batch, draw, labels, fresh):
        """One update of the critic on noised images, and its score of the student's with a graph."""
        sigma = self.noise_levels(draw, "critic level")
        real, fake = (
            noised(x, draw.normal(f"{name} noise", *x.shape[1:]), sigma)
            for name, x in (("real", batch.images), ("fake", fresh))
        )
        condition = critic_condition(sigma, labels, self._classes, fresh.dtype)
        found = critic_gradients(
            self._critic,
            real,
            fake.detach(),
            a=(draw.seed, draw.indices, 0),
            condition=condition,
            weight=self.config.gradient_penalty,
            check_finite=False,
        )
        step.gradients("critic", found.gradients)
        step.log(critic=found.loss, penalty=found.penalty)
        return -self._critic(fake, condition).mean()

    def measured(self, model: Any, stage: Stage) -> dict[str, Any]:
        """The statistics that a generator's batch norm was trained with.

        Args:
            model: not used.
            stage: not used.

        Returns:
            ``{"norm": ...}`` of a generator, ``batch`` or ``frozen``; nothing of a denoiser.
        """
        return {"norm": self._norm} if self._draws else {}

    def samples(self, student: Any, stage: Stage) -> Tensor | None:
        """Images, the same in every run of one seed, of all classes in turn.

        Args:
            student: the result so far.
            stage: the one stage.

        Returns:
            ``(N, C, H, W)``, or None for a module that has no ``latents`` as :class:`advkd.Student` has.
        """
        return previewed(student, self.config.seed)


def critic_condition(sigma: Tensor, labels: Tensor | None, classes: int, dtype: torch.dtype) -> Tensor:
    """The planes that a critic of noised images is told: c_noise = log(sigma) / 4, and the class.

    Args:
        sigma: ``(N,)`` noise levels.
        labels: ``(N,)`` classes, or None.
        classes: their number.
        dtype: of the planes.

    Returns:
        ``(N, 1 + classes, 4, 4)``.
    """
    columns = [(sigma.log() / 4)[:, None].to(dtype)]
    if labels is not None:
        columns.append(F.one_hot(labels, classes).to(dtype))
    return torch.cat(columns, dim=1)[:, :, None, None].expand(-1, -1, 4, 4)


def numbers_of(ours: Sequence[str], theirs: Sequence[str]) -> Tensor | None:
    """Numbers of the teacher's classes by those of the student's.

    Args:
        ours: names of the student's classes.
        theirs: names of the teacher's, those among them.

    Returns:
        ``(len(ours),)`` int64; None without classes.
    """
    if not ours:
        return None
    return torch.tensor([list(theirs).index(name) for name in ours], dtype=torch.int64, device="cpu")
