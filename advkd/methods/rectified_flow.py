"""Rectified flow: straight paths from noise to images, reflow, distillation to k steps, and SlimFlow's aids to small students.

Time is tau: y = tau x + (1 - tau) z goes from noise z to the image x. The velocity of a network with posterior means D and eps
is u = D - eps whatever it predicts, so that students of other methods are flows already.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.draws import Draw
from ..data.sources import Batch
from ..diffusion.denoiser import over
from ..diffusion.denoiser_student import Sampler
from ..diffusion.schedule import Schedule
from ..diffusion.solvers import Solver
from ..errors import InputError
from .base import Needs, Stage, Step, Trained
from .denoiser_method import DenoiserConfig, DenoiserMethod, require_unused
from .distances import DISTANCES

TIMES = ("uniform", "u-shaped")
"""Distributions of tau; see :class:`RectifiedFlowConfig`."""

STEEPNESS = 4.0
"""a of the u-shaped density, which is as cosh(a (tau - 1/2)) (Lee et al. 2024)."""

MIDDLE = (0.2, 0.8)
"""Range of tau between the two steps of SlimFlow's targets (its published code)."""


@dataclass
class RectifiedFlowConfig(DenoiserConfig):
    """How ``advkd distill rectified-flow`` trains.

    Attributes:
        steps: 0 for a flow, which draws in any number of steps; k for a student of k steps, trained at their times alone.
        tau: times of a flow: ``uniform``, or ``u-shaped`` (Lee et al. 2024), more of them near both ends.
        anneal: share of the updates in which pairs turn from independent to the recorded ones (SlimFlow; 0: recorded at once).
        two_step: weight of targets by two steps of the teacher, a flow, from fresh noise (SlimFlow), for ``steps`` 1.
        distance: ``mse``, or ``huber`` for pseudo-Huber.
        pairs: only the first so many trajectories are used (0: all).
        drop: share of the labels that are replaced by the null class of a conditional student, where a flow learns from images.
    """

    updates: int = 2000
    ema: float = 0.99
    steps: int = 0
    tau: str = "uniform"
    anneal: float = 0.0
    two_step: float = 0.0
    distance: str = "mse"
    pairs: int = 0
    drop: float = 0.1

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        super().validate()
        for name, holds, wanted in (
            ("steps", self.steps >= 0, "at least 0"),
            ("tau", self.tau in TIMES, f"one of {', '.join(TIMES)}"),
            ("anneal", 0 <= self.anneal < 1, "in [0, 1)"),
            ("two_step", 0 <= self.two_step < math.inf, "at least 0 and finite"),
            ("distance", self.distance in DISTANCES, f"one of {', '.join(DISTANCES)}"),
            ("pairs", self.pairs >= 0, "at least 0"),
            ("drop", 0 <= self.drop < 1, "in [0, 1)"),
        ):
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.steps and self.tau != "uniform":
            raise InputError(f"tau is of a flow: a student of {self.steps} steps is trained at their times, leave it out")
        if self.two_step and self.steps != 1:
            raise InputError(f"two_step is for students of one step: add --steps 1, got {self.steps}")


class RectifiedFlow(DenoiserMethod):
    """A velocity on straight paths between noise and images.

    From images (--data) with fresh noise it is the first rectified flow; from pairs of a deterministic solver
    (--trajectories) it is reflow, and pairs that the result records make the next one. With --steps k the student learns
    the k steps alone.

    Args:
        config: a :class:`RectifiedFlowConfig`.
        student: network that gives v; see :class:`~advkd.methods.denoiser_method.DenoiserMethod`.
        schedule: noise schedule of the student, and of the teacher with ``two_step``.
    """

    name = "rectified-flow"
    reference = "Liu et al. 2023, Flow straight and fast; Zhu et al. 2024, SlimFlow"
    requires = "images (--data) or pairs of a deterministic solver (--trajectories); a flow as --teacher with --two-step"
    inputs = ("trajectories", "data", "teacher")
    Config = RectifiedFlowConfig
    config: RectifiedFlowConfig

    def __init__(self, config: RectifiedFlowConfig, student: nn.Module, schedule: Schedule):
        super().__init__(config, student, schedule)
        self._flow, self._distance = self.denoiser(student), DISTANCES[config.distance]

    @classmethod
    def calls_teacher(cls, config: RectifiedFlowConfig) -> bool:
        """True with ``two_step``.

        Args:
            config: the configuration.
        """
        return config.two_step > 0

    def check(self, data: Any) -> None:
        """Refuse trajectories of which there are fewer than asked for.

        Args:
            data: the trajectories.

        Raises:
            InputError: ``pairs`` above their number.
        """
        if self.config.pairs > len(data):
            raise InputError(f"pairs must be at most the {len(data)} trajectories, got {self.config.pairs}")

    def needs(self) -> Needs:
        """Images, pairs or neither, as the run has them; a teacher with ``two_step``.

        Returns:
            Needs.

        Raises:
            InputError: data that the configuration cannot be trained on, or a teacher that is no flow.
        """
        config, given = self.config, self.given
        if given == "none" and not config.two_step:
            raise InputError(
                "rectified-flow needs images (--data), pairs (--trajectories), or --two-step with a flow as --teacher"
            )
        if config.pairs and given != "pairs":
            raise InputError("pairs limits recorded pairs: name them by --trajectories, or leave it out")
        if config.steps == 1 and given == "images":
            raise InputError(
                "a student of one step learns from pairs: with fresh noise its best image is the mean of all; name "
                "--trajectories, or --two-step with a flow as --teacher"
            )
        if config.anneal and given != "pairs":
            raise InputError("anneal leads to recorded pairs: name them by --trajectories, or leave it out")
        if config.two_step and getattr(self.teacher, "prediction", "") == "epsilon":
            raise InputError(
                "two_step needs a flow as its teacher, and one that predicts the noise has no image where all is noise: "
                "name a student of rectified-flow"
            )
        require_unused(config, given != "images", "images (--data)", "drop")
        return Needs(given, given == "pairs", teacher=config.two_step > 0, student="denoiser", limit=config.pairs)

    def build(self, stage: Stage) -> dict[str, Trained]:
        """The student.

        Args:
            stage: the one stage.

        Returns:
            ``{"student": Trained}``.
        """
        return {"student": self.trained(self.student, stage.updates)}

    def evaluations(self, stage: Stage) -> tuple[int, int]:
        """The student once for each loss, and the teacher twice for targets of two steps.

        Args:
            stage: not used.

        Returns:
            ``(forward, backward)`` by sample.
        """
        losses = (self.given != "none") + (self.config.two_step > 0)
        return losses + 2 * (self.config.two_step > 0), losses

    def sampler(self, stage: Stage) -> Sampler:
        """Euler's method in tau, in the student's k steps, or in eight of a flow, which takes any number.

        Args:
            stage: not used.

        Returns:
            Sampler.
        """
        return Sampler(Solver("ddim", "flow"), self.config.steps or min(8, len(self.schedule)))

    def measured(self, model: Any, stage: Stage) -> dict[str, float]:
        """Straightness of a flow, for its record.

        Args:
            model: the trained diffusion model.
            stage: not used.

        Returns:
            ``{"straightness": S}`` of 64 paths; nothing for a student of k steps, which has velocities at their times alone.
        """
        if self.config.steps:
            return {}
        z, labels = model.noise(64, self.config.seed), None
        if model.num_classes:
            labels = torch.arange(len(z), device=z.device) % model.num_classes
        return {"straightness": straightness(model, z, labels)}

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """|u(y, tau) - (x - z)|^2 at y = tau x + (1 - tau) z; with ``two_step`` the teacher's targets beside it, or alone.

        Args:
            step: actions of the update.
            batch: ``images`` and their noise ``z``, ``images`` alone, or nothing; ``labels`` of a conditional student.
            draw: noise and times.
        """
        target = self._target(batch, draw) if self.config.two_step else None  # outside of autocast, as all teachers
        with step.autocast():
            losses = []
            if batch.images is not None:
                losses.append(self._straight(batch, draw))
            if target is not None:
                z, labels, goal = target
                at_noise = torch.zeros(len(z), dtype=torch.float64, device=z.device)
                losses.append(self.config.two_step * self._distance(velocity(self._flow, z, at_noise, labels), goal))
        loss = torch.stack(losses).sum()
        step("student", loss)
        step.log(loss=loss.detach())

    def annealing(self, update: int) -> float:
        """SlimFlow's b, the share of fresh noise in the pairs, which falls linearly from 1 to 0.

        Args:
            update: updates so far.

        Returns:
            Number in [0, 1]; 0 without ``anneal``, and after its share of the updates.
        """
        span = self.config.anneal * self.config.updates
        return max(0.0, 1 - update / span) if span else 0.0

    def times(self, draw: Draw) -> Tensor:
        """tau of every sample.

        Args:
            draw: of the rows.

        Returns:
            ``(N,)`` float64 in [0, 1]: i / k for students of k steps.
        """
        if self.config.steps:
            return draw.integers("tau", self.config.steps).double() / self.config.steps
        share = draw.uniform("tau").double()
        if self.config.tau == "uniform":
            return share
        # The inverse of the distribution function 1/2 + sinh(a (tau - 1/2)) / (2 sinh(a / 2)).
        reach = math.sinh(STEEPNESS / 2)
        return (0.5 + torch.asinh((2 * share - 1) * reach) / STEEPNESS).clamp(0, 1)

    def noise(self, batch: Batch, draw: Draw) -> Tensor:
        """z of the batch's images: fresh for images alone, and sqrt(1 - b^2) z + b eps for pairs.

        Args:
            batch: ``images``, with ``z`` where the run has pairs.
            draw: of the rows.

        Returns:
            ``(N, ...)`` standard normal numbers.
        """
        if self.given != "pairs":
            return draw.normal("z", *batch.images.shape[1:])
        b = self.annealing(draw.start // self.config.batch_size)
        return math.sqrt(1 - b * b) * batch.z + b * draw.normal("z", *batch.z.shape[1:]) if b else batch.z

    def _straight(self, batch, draw):
        x, z, tau = batch.images, self.noise(batch, draw), self.times(draw)
        share = over(x, tau)
        labels = batch.labels if self.given == "pairs" else self.dropped(batch.labels, draw, self.config.drop)
        u = velocity(self._flow, share * x + (1 - share) * z, tau, labels)
        return self._distance(u, x - z)

    def _target(self, batch, draw):
        """Fresh noise, its classes, and x - z after two steps of the teacher."""
        z, labels = draw.normal("two-step", *self.teacher.shape), batch.labels
        if labels is None and self.num_classes:
            labels = draw.integers("labels", self.num_classes)
        low, high = MIDDLE
        middle = low + (high - low) * draw.uniform("middle").double()
        with torch.no_grad():
            return z, labels, two_steps(self.teacher, z, middle, labels)


def velocity(model: Any, y: Tensor, tau: Tensor, condition: Any = None) -> Tensor:
    """u = D - eps of a diffusion model at y = tau x + (1 - tau) z.

    Args:
        model: a teacher or :class:`~advkd.diffusion.denoiser.Denoiser`, of variance-preserving states.
        y: ``(N, ...)`` states.
        tau: ``(N,)`` float64 times in [0, 1]; 0 for noise alone.
        condition: what ``model.predict`` takes, or None.

    Returns:
        ``(N, ...)`` in ``y``'s dtype; differentiable as ``model`` is.
    """
    x0, eps = model.predict(y / over(y, torch.hypot(tau, 1 - tau)), (1 - tau) / tau, condition)
    return (x0 - eps).to(y.dtype)


def two_steps(model: Any, z: Tensor, middle: Tensor, condition: Any = None) -> Tensor:
    """x - z of the image x to which two Euler steps lead from noise.

    Args:
        model: see :func:`velocity`.
        z: ``(N, ...)`` start noise.
        middle: ``(N,)`` float64 times between the steps.
        condition: what ``model.predict`` takes, or None.

    Returns:
        ``(N, ...)``.
    """
    share = over(z, middle)
    first = velocity(model, z, torch.zeros_like(middle), condition)
    return share * first + (1 - share) * velocity(model, z + share * first, middle, condition)


@torch.no_grad()
def straightness(model: Any, z: Tensor, condition: Any = None, steps: int = 16) -> float:
    """S = E int |x - z - u|^2 d tau along a flow's own paths from z to x (Liu et al. 2023): 0 if they are straight.

    Args:
        model: see :func:`velocity`.
        z: ``(N, ...)`` start noise.
        condition: what ``model.predict`` takes, or None.
        steps: Euler steps of the paths.

    Returns:
        Mean over samples, their numbers and steps.
    """
    y, found = z, []
    for i in range(steps):
        found.append(velocity(model, y, torch.full((len(z),), i / steps, dtype=torch.float64, device=z.device), condition))
        y = y + found[-1] / steps
    return (torch.stack(found) - (y - z)).square().mean().item()
