"""Data-prediction denoising models: every denoiser of a noise level gives images as the data has them, not their mean.

The level sigma is one throughout: it noises the image, enters the student, and is the level of the score network. The student
begins as the posterior mean; a denoiser and its mirror image are both minima.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..data.draws import Draw
from ..data.sources import Batch
from ..diffusion.denoiser import noised
from ..diffusion.denoiser_student import Sampler
from ..diffusion.schedule import Schedule
from ..diffusion.solvers import Solver
from ..errors import InputError
from .base import Needs, Stage, Step
from .denoiser_method import require_unused
from .score import ScoreConfig, ScoreMethod, along

INPUTS = ("data", "simulated")
"""Kinds of states that the student learns from; see :class:`DPDMConfig`."""


@dataclass
class DPDMConfig(ScoreConfig):
    """How ``advkd distill dpdm`` trains.

    Attributes:
        inputs: states that the student denoises: noised images (``data``), or those of its own sampler (``simulated``), which
            needs no images.
        steps: steps of the saved student; with simulated inputs the student learns the noise levels of this number alone.
        drop: share of the labels that are replaced by a conditional student's null class.
    """

    inputs: str = "data"
    steps: int = 8
    drop: float = 0.1

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        super().validate()
        for name, holds, wanted in (
            ("inputs", self.inputs in INPUTS, f"one of {', '.join(INPUTS)}"),
            ("steps", self.steps >= 1, "at least 1"),
            ("drop", 0 <= self.drop < 1, "in [0, 1)"),
        ):
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


class DPDM(ScoreMethod):
    """A denoiser whose images are distributed as the data at every noise level; it draws by denoising and adding noise again.

    Args:
        config: a :class:`DPDMConfig`.
        student: network that gives v; see :class:`~advkd.methods.denoiser_method.DenoiserMethod`.
        schedule: noise schedule of student and teacher.
        score: see :class:`~advkd.methods.score.ScoreMethod`.

    Raises:
        InputError: more steps than the schedule has timesteps.
    """

    name = "dpdm"
    reference = "Data-prediction denoising models, algorithms 1 and 2"
    requires = "a teacher (--teacher), a student of v prediction (--init), and images (--data) or --inputs simulated"
    Config = DPDMConfig
    config: DPDMConfig

    def __init__(self, config: DPDMConfig, student: nn.Module, schedule: Schedule, score: nn.Module | None = None):
        super().__init__(config, student, schedule, score)
        self._denoiser = self.denoiser(student)
        levels = Solver("dpdm").levels(schedule, config.steps)
        self._sigmas = torch.tensor([level.sigma for level in levels], dtype=torch.float64, device="cpu")

    def needs(self) -> Needs:
        """Images, or nothing with simulated inputs, and a teacher.

        Returns:
            Needs.

        Raises:
            InputError: images or levels that would not be read, or what does not fit the teacher.
        """
        self.require_fit(self.num_classes)
        if self.config.inputs == "data":
            return Needs("images", teacher=True, labels=self.num_classes > 0, student="denoiser")
        require_unused(self.config, True, "inputs data", "level", "level_mean", "level_deviation")
        if self.given != "none":
            raise InputError("inputs simulated needs no images: leave --data out")
        return Needs("none", teacher=True, student="denoiser")

    def evaluations(self, stage: Stage) -> tuple[float, float]:
        """The student once for each update of the score network, which is compared with the teacher once.

        Args:
            stage: not used.

        Returns:
            ``(forward, backward)`` by sample of the batch, the mean number of steps before a simulated input among them.
        """
        updates, before = self.config.score_updates, (self.config.steps - 1) / 2 if self.config.inputs == "simulated" else 0
        return updates * (2 + before) + 2 + (self.config.guidance > 0), updates + self.trained_share

    def sampler(self, stage: Stage) -> Sampler:
        """DPDM's: denoise, and add the noise of the next level; ``--steps`` of ``advkd sample`` takes other numbers of them.

        Other numbers have other levels, between which a student of simulated inputs has learnt none.

        Args:
            stage: not used.

        Returns:
            Sampler.
        """
        return Sampler(Solver("dpdm"), self.config.steps)

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """Updates of the score network on x = d(y), y = x0 + sigma eps; then one of the student along D_q - D_p.

        Args:
            step: actions of the update.
            batch: ``images``, and ``labels`` where the student is told classes; nothing with simulated inputs.
            draw: levels and noise.
        """
        waits = self.waits(draw)
        for i in range(self.config.score_updates):
            if i:
                batch, draw = step.next_batch()
            last = i + 1 == self.config.score_updates and not waits
            x, sigma, condition = self._input(step, batch, draw)
            with torch.set_grad_enabled(last), step.autocast():
                image = self._denoiser.predict(x, sigma, condition)[0]
            image = image.to(x.dtype)
            self.learn_score(step, image.detach(), draw, sigma, condition)
        direction = self.direction(image, draw, sigma, condition)
        step.log(loss=along(direction, image.detach()), difference=direction.square().mean())
        if not waits:
            step("student", along(direction, image))

    def _input(self, step, batch, draw):
        """States that the student denoises, their levels and classes."""
        if self.config.inputs == "simulated":
            labels = draw.integers("labels", self.num_classes) if self.num_classes else None
            condition = self.dropped(labels, draw, self.config.drop)
            return *self._simulated(step, draw, condition), condition
        images, sigma = batch.images, self.noise_levels(draw, "level")
        condition = self.dropped(batch.labels, draw, self.config.drop)
        return noised(images, draw.normal("x_t", *images.shape[1:]), sigma), sigma, condition

    @torch.no_grad()
    def _simulated(self, step, draw, condition):
        """States at levels of the sampler, each after as many of its steps as lie before."""
        sigmas = self._sigmas.to(draw.indices.device)
        chosen, x = draw.integers("level", len(sigmas)), draw.normal("x_T", *self.teacher.shape)
        for k in range(len(sigmas) - 1):
            on = (chosen > k).nonzero().flatten()
            if not len(on):
                break
            told = None if condition is None else condition[on]
            with step.autocast():
                image = self._denoiser.predict(x[on], sigmas[k], told)[0].clamp(-self.clip, self.clip)
            noise = draw.normal(f"simulated {k}", *self.teacher.shape)[on]
            x[on] = noised(image.to(x.dtype), noise, sigmas[k + 1])
        return x, sigmas[chosen]
