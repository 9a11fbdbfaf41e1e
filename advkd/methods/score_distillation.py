"""Score distillation (Poole et al. 2023, DreamFusion): images are moved towards a diffusion model's modes, by its score alone.

It optimises images and trains no student: what is left of a run is the images, and there is nothing to draw others with.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.draws import Draw
from ..data.labels import labels_in_turn
from ..data.sources import Batch
from ..diffusion.denoiser import levels_of, noised, vp_weights
from ..diffusion.guidance import class_numbers, require_null
from ..diffusion.schedule import Schedule
from ..errors import InputError
from ..models.optimised_images import GENERATORS
from .base import Method, Needs, Settings, Stage, Step, Trained, cosine
from .denoiser_method import require_unused

WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "variance": lambda alpha, noise: alpha * noise,
    "uniform": lambda alpha, noise: alpha / noise,
    "x0": lambda alpha, noise: torch.ones_like(alpha),
}
"""Weight w(t) by name -> what it makes of x - D(x_t), w(t) alpha / noise: w = noise^2 = 1 - alpha_bar, 1, and noise / alpha."""

RATES = {"pixels": 0.05, "coefficients": 0.05, "warp": 0.01}
"""Learning rate by generator, where the configuration leaves it open."""


@dataclass
class ScoreDistillationConfig:
    """How ``advkd distill score-distillation`` optimises images.

    Attributes:
        generator: of the images: ``pixels``, ``coefficients`` (a smaller grid, enlarged) or ``warp`` (of a prototype).
        num: number of images.
        grid: side of the grid of ``coefficients``.
        prototype: of ``warp``: ``mean`` of --data's images, or the number of one, from 0; with classes, among those of its own.
        classes: names of classes that the images take in turn, separated by commas, or ``all``; for conditional teachers.
        guidance: weight w >= 0 of classifier-free guidance, (1 + w) D(x, class) - w D(x); 0 is the conditional teacher.
        weight: w(t) before the difference of noises: ``variance`` (1 - alpha_bar), ``uniform`` (1) or ``x0`` (noise / alpha).
        t_min: lowest timestep that is drawn, as a share of the schedule's last one.
        t_max: highest timestep that is drawn, likewise.
        updates: updates of every image.
        learning_rate: of Adam (0: 0.05 for ``pixels`` and ``coefficients``, 0.01 for ``warp``).
        final_learning_rate: fraction of the learning rate left at the end (cosine decay; 1 keeps it constant).
        seed: of the start and of all draws.
        checkpoint_every: updates between checkpoints.
        log_every: updates that one row of ``metrics.csv`` averages.
    """

    generator: str = "pixels"
    num: int = 16
    grid: int = 16
    prototype: str = "mean"
    classes: str = ""
    guidance: float = 0.0
    weight: str = "variance"
    t_min: float = 0.02
    t_max: float = 0.98
    updates: int = 300
    learning_rate: float = 0.0
    final_learning_rate: float = 0.1
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 1

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        for name in ("num", "grid", "updates", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, holds, wanted in (
            ("generator", self.generator in GENERATORS, f"one of {', '.join(GENERATORS)}"),
            ("prototype", self.prototype == "mean" or self.prototype.isdecimal(), "mean or the number of an image"),
            ("guidance", 0 <= self.guidance < math.inf, "at least 0 (the conditional teacher) and finite"),
            ("weight", self.weight in WEIGHTS, f"one of {', '.join(WEIGHTS)}"),
            ("t_min", 0 <= self.t_min <= 1, "in [0, 1], a share of the schedule"),
            ("t_max", self.t_min <= self.t_max <= 1, f"in [{self.t_min:g}, 1], from t_min on"),
            ("learning_rate", 0 <= self.learning_rate < math.inf, "at least 0 and finite"),
            ("final_learning_rate", 0 <= self.final_learning_rate <= 1, "in [0, 1]"),
            ("seed", 0 <= self.seed < 2**63, "in [0, 2^63)"),
        ):
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        require_unused(self, self.generator != "coefficients", "generator coefficients", "grid")
        require_unused(self, self.generator != "warp", "generator warp", "prototype")
        if self.guidance and not self.classes:
            raise InputError(f"guidance {self.guidance:g} leads towards a class: name the images' by --classes")


class ScoreDistillation(Method):
    """An optimiser of images, not a student: each of --num images moves along the teacher's score of its noised versions.

    The result is the images, and no others can be drawn. They seek the teacher's modes: images of one class may end alike.

    Args:
        config: a :class:`ScoreDistillationConfig`.
        images: module of the images, from numbers ``(N,)`` in [0, ``config.num``) to ``(N, ...)``.
        schedule: the teacher's noise schedule.

    Attributes:
        images: the module, which is optimised in place.
        timesteps: lowest and highest timestep that are drawn.

    Raises:
        InputError: a configuration that cannot work, or a range of timesteps with a level of no noise or no image.
    """

    name = "score-distillation"
    reference = "Poole et al. 2023, DreamFusion: text-to-3D using 2D diffusion, equation 3"
    requires = "a teacher (--teacher), and images (--data) with --generator warp; it optimises images and trains no student"
    inputs = ("data", "teacher")
    students: ClassVar[tuple[str, ...]] = ("images",)
    Config = ScoreDistillationConfig
    config: ScoreDistillationConfig

    def __init__(self, config: ScoreDistillationConfig, images: torch.nn.Module, schedule: Schedule):
        config.validate()
        self.config, self.images, self.schedule = config, images, schedule
        self.timesteps = tuple(round(share * (len(schedule) - 1)) for share in (config.t_min, config.t_max))
        ends = schedule.alpha_bars[list(self.timesteps)]
        if not ((ends > 0) & (ends < 1)).all():
            raise InputError(
                f"t_min and t_max must keep to levels with noise and image, alpha_bar of timesteps {self.timesteps} is "
                f"{ends.tolist()}: raise t_min, or lower t_max"
            )
        self._classes: Tensor | None = None

    def needs(self) -> Needs:
        """A teacher, and no data: the prototypes of a warp are part of its module."""
        return Needs("none", teacher=True, student="images")

    def settings(self) -> Settings:
        """The trainer's part of the configuration."""
        return Settings(self.config.seed, self.config.checkpoint_every, self.config.log_every)

    def stages(self) -> Sequence[Stage]:
        """One stage, whose batches hold every image once.

        Returns:
            ``[Stage]``.
        """
        return [Stage(1, self.config.updates, self.config.num)]

    def build(self, stage: Stage) -> dict[str, Trained]:
        """The images, and the classes that they take in turn.

        Args:
            stage: the one stage.

        Returns:
            ``{"student": Trained}``, the trainer's name of a result.

        Raises:
            InputError: see :func:`classes_in_turn`.
        """
        config = self.config
        self._classes = labels_in_turn(classes_in_turn(self.teacher, config), 0, config.num)
        rate = config.learning_rate or RATES[config.generator]
        schedule: Any = lambda update: cosine(update, config.updates, config.final_learning_rate)  # noqa: E731
        return {"student": Trained(self.images.train(), rate, schedule=schedule)}

    def evaluations(self, stage: Stage) -> tuple[int, int]:
        """Passes forward of the teacher, with the class and with guidance without it, too; none backward.

        Args:
            stage: not used.

        Returns:
            ``(1, 0)``, or ``(2, 0)`` with guidance.
        """
        return 2 if self.config.guidance else 1, 0

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """w(t) (e_p(x_t) - eps) dx / dphi for each image, with a timestep and noise of its own.

        ``loss`` is the mean square of the gradient by the pixels.

        Args:
            step: actions of the update.
            batch: not used: its rows are empty.
            draw: timesteps and noise; its rows are the images.
        """
        numbers, (low, high) = draw.indices % self.config.num, self.timesteps
        x = self.images(numbers)
        sigma = self.schedule.sigma(low + draw.integers("t", high - low + 1))
        x_t = noised(x.detach(), draw.normal("x_t", *x.shape[1:]), sigma)
        told = None if self._classes is None else self._classes.to(x.device)[numbers]
        guidance = torch.full_like(sigma, self.config.guidance) if self.config.guidance else None
        gradient = score_distillation_gradient(
            self.teacher.predict, x.detach(), x_t, sigma, told, guidance, weight=self.config.weight
        )
        # A sum over all images: the mean over processes is of their own images' sums.
        step("student", self.config.num / len(x) * (gradient * x).sum())
        step.log(loss=gradient.square().mean())


def score_distillation_gradient(
    predict: Callable[..., tuple[Tensor, Tensor]],
    image: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    condition: Tensor | None = None,
    guidance: Tensor | None = None,
    *,
    weight: str = "variance",
) -> Tensor:
    """w(t) (e_p(x_t) - e) with e = (x_t - alpha image) / noise, the noise that ``image`` leaves in the state.

    The state's own image gives score distillation, where e is the noise that was added. The posterior mean E[x | x_t] of the
    images' own distribution q gives Diff-Instruct, where e is q's. It is computed as w(t) alpha / noise (image - D_p(x_t)): at
    high levels, where both noises are almost the state, nothing cancels.

    Args:
        predict: the teacher's, from states, levels, classes and guidance to ``(x0, eps)``.
        image: ``(N, ...)`` images of the states, or their posterior means.
        x_t: ``(N, ...)`` variance-preserving states.
        sigma: ``(N,)`` float64 noise levels, positive and finite.
        condition: ``(N,)`` classes, or None.
        guidance: ``(N,)`` weights of classifier-free guidance, or None; the guided x0 is used.
        weight: w(t), a name of :data:`WEIGHTS`.

    Returns:
        ``(N, ...)`` in ``image``'s dtype, without a graph: the network's Jacobian is left out.
    """
    with torch.no_grad():
        x0, _ = predict(x_t, sigma, condition, guidance)
        alpha, noise = vp_weights(levels_of(x_t, sigma))
        factor = WEIGHTS[weight](alpha, noise).to(image.dtype).reshape(-1, *[1] * (image.ndim - 1))
        return factor * (image - x0.to(image.dtype))


def classes_in_turn(teacher: Any, config: ScoreDistillationConfig) -> list[int]:
    """Numbers of the classes that images take in turn, checked against the teacher.

    Args:
        teacher: the teacher.
        config: the configuration, with names of classes and the guidance towards them.

    Returns:
        The numbers; empty without classes.

    Raises:
        InputError: a teacher that cannot be guided, or classes that it does not know.
    """
    if config.guidance:
        require_null(teacher)
    return class_numbers(teacher, teacher.class_names, config.classes or None)
