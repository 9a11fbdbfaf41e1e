"""The teacher as a v network (Salimans and Ho 2022, section 4 and appendix D): the start of students of few steps."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from ..data.draws import Draw
from ..data.sources import Batch
from ..diffusion.denoiser import noised, vp_weights
from ..diffusion.denoiser_student import Sampler
from ..diffusion.solvers import Solver
from ..errors import InputError
from .base import Needs, Stage, Step, Trained
from .denoiser_method import DenoiserConfig, DenoiserMethod


@dataclass
class ReparametrizeConfig(DenoiserConfig):
    """How ``advkd distill reparametrize`` trains.

    Attributes:
        drop: share of the labels that are replaced by a conditional teacher's null class.
    """

    ema: float = 0.99
    drop: float = 0.1

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        super().validate()
        if not 0 <= self.drop < 1:
            raise InputError(f"drop must be in [0, 1), got {self.drop}")


class Reparametrize(DenoiserMethod):
    """A network with v prediction that denoises as the teacher does.

    A teacher that predicts the noise says little about the image where there is almost nothing else: an error of its output is
    157 times as large in x0 at the last timestep of the linear schedule. Its x0 is clamped before it becomes a target.

    Args:
        config: a :class:`ReparametrizeConfig`.
        student: network that gives v; see :class:`~advkd.methods.denoiser_method.DenoiserMethod`.
        schedule: noise schedule of student and teacher.
    """

    name = "reparametrize"
    reference = "Salimans and Ho 2022, Progressive distillation for fast sampling of diffusion models, section 4"
    requires = "a teacher (--teacher) and images (--data)"
    Config = ReparametrizeConfig
    takes_low_images = True
    config: ReparametrizeConfig

    @classmethod
    def begin(cls, config: Any, student: Any) -> Any:
        """The student, whose network may be a copy of the teacher's: it is here that it learns to give v.

        Args:
            config: not used.
            student: a :class:`~advkd.diffusion.denoiser_student.DenoiserStudent`.

        Returns:
            The student.
        """
        return student

    def needs(self) -> Needs:
        """Images and a teacher, with labels where the teacher is told classes."""
        return Needs("images", teacher=True, labels=bool(getattr(self.teacher, "num_classes", 0)), student="denoiser")

    def build(self, stage: Stage) -> dict[str, Trained]:
        """The student.

        Args:
            stage: the one stage.

        Returns:
            ``{"student": Trained}``.
        """
        return {"student": self.trained(self.student, stage.updates)}

    def evaluations(self, stage: Stage) -> tuple[int, int]:
        """Teacher and student once each.

        Args:
            stage: not used.

        Returns:
            ``(2, 1)``.
        """
        return 2, 1

    def sampler(self, stage: Stage) -> Sampler:
        """Any solver serves; ten evaluations of UniPC-2 are as good as the teacher's 50 of DDIM.

        Args:
            stage: not used.

        Returns:
            Sampler.
        """
        return Sampler(Solver("unipc-2"), min(10, len(self.schedule)))

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """|v_student(x_t) - (sqrt(a) eps - sqrt(1 - a) x0)|^2 with the teacher's x0, clamped, and the eps that goes with it.

        Args:
            step: actions of the update.
            batch: ``images``, and ``labels`` where the teacher is told classes.
            draw: timesteps and noise.
        """
        images, t = batch.images, draw.integers("t", len(self.schedule))
        sigma = self.schedule.sigma(t)
        x = noised(images, draw.normal("x_t", *images.shape[1:]), sigma)
        condition = self.condition(batch, draw)
        x0, eps = self.teacher.predict(x, sigma, condition)
        alpha, noise = (w.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) for w in vp_weights(sigma))
        with step.autocast():
            v = self.student(x, t.float(), condition)
        loss = F.mse_loss(v.to(x.dtype), (alpha * eps - noise * x0).to(x.dtype))
        step("student", loss)
        step.log(loss=loss.detach())
