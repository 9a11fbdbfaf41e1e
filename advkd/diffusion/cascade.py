"""Cascades: a model of small images, and super-resolution models that enlarge them one after the other (Ho et al. 2022).

A stage puts known noise on the low image that it is given (:mod:`advkd.diffusion.low_images`) and draws a large one by its own
solver, told the low image and the noise's level in every evaluation.
"""

from typing import Any, Protocol

import torch

from ..errors import InputError
from ..models.autoencoder import Pictured
from ..models.denoiser import LowImage
from ..ops import philox_normal, philox_words
from ..ops.arguments import whole
from .denoiser_student import DenoiserStudent
from .low_images import LowImages
from .sampling import DiffusionModel
from .schedule import Level
from .solvers import Solver, as_solver
from .teacher import Teacher

LEVEL = 100
"""Level of the low images' noise where none is asked for, in timesteps; a model's largest level, if that is lower."""

KEY_STEP = 3
"""Step of Philox's latents that keeps the keys of cascades' stages apart from other draws."""


class Base(Protocol):
    """A model that draws the first images of a cascade: a teacher or a student of either kind."""

    def sample(self, n: int, seed: int = 0, *, start: int = 0) -> torch.Tensor:
        """Images ``start .. start + n - 1``.

        Args:
            n: number of images.
            seed: of their noise.
            start: index of the first image.

        Returns:
            ``(n, C, h, w)`` in [-1, 1]; an image depends on seed and index alone.
        """


class SuperResolution:
    """A model that enlarges images.

    Args:
        model: a teacher of ``advkd teacher train --super-resolution``, a denoiser student of one, or an exact one.
        solver: a name, or a :class:`~advkd.diffusion.solvers.Solver`; None: a student's own, ``ddim`` for others.
        steps: number of steps; None: a student's own, or the solver's usual number.

    Attributes:
        model: the diffusion model.
        low: size of the low images that it takes, and their largest level.
        solver: how it draws.
        steps: in how many steps; None: the solver's usual number.

    Raises:
        InputError: a model that takes no low image, or a solver or a number of steps that it cannot take.

    Examples:
        >>> SuperResolution(Teacher.from_pretrained("sr")).sample(low, level=100)  # (N, C, 16, 16) to (N, C, 32, 32)
    """

    def __init__(self, model: DiffusionModel | DenoiserStudent, solver: str | Solver | None = None, steps: int | None = None):
        if isinstance(model, DenoiserStudent):
            own, model = model.sampler, model.model
            if solver is None:
                solver, steps = own.solver, own.steps if steps is None else steps
        low: LowImages | None = getattr(model, "low", None)
        if low is None:
            name = getattr(model, "name", type(model).__name__)
            raise InputError(f"{name} takes no low image: train one with 'advkd teacher train --super-resolution'")
        if getattr(model, "autoencoder", None) is not None:
            raise InputError(f"{model.name} draws latents: a stage of a cascade enlarges pictures")
        self.model, self.low, self.solver, self.steps = model, low, as_solver(solver or "ddim"), steps
        if self.solver.analytic:
            raise InputError(f"solver {self.solver.name}: a stage's noise power is not known: take another solver")
        model.program(self.solver, steps)

    @property
    def evaluations(self) -> int:
        """Network evaluations of an image."""
        return self.solver.evaluations(len(self.model.timesteps(self.solver, self.steps)))

    def level(self, level: int | None = None) -> int:
        """The level of a call.

        Args:
            level: of the low images' noise, in timesteps; None: :data:`LEVEL`, or the model's largest, if that is lower.

        Returns:
            The level.

        Raises:
            InputError: one that the model was not trained with.
        """
        return min(LEVEL, self.low.level) if level is None else self.low.require_level(level, self.model.name)

    @torch.no_grad()
    def sample(self, low: torch.Tensor, level: int | None = None, seed: int = 0, start: int = 0) -> torch.Tensor:
        """Large images of low ones.

        Args:
            low: ``(N, C, h, w)`` clean low images, in [-1, 1]; h and w are those of ``low.size``.
            level: see :meth:`level`; 0 for no noise.
            seed: in [0, 2^64); it and the stage's size key the low images' noise, the start noise and the step noise, which are
                other numbers than a base model's or another stage's of the same seed.
            start: index of the first image.

        Returns:
            ``(N, C, H, W)`` on the model's device: of teachers and students float32 in [-1, 1], of exact models float64 and not
            clamped. An image depends on its low image, seed and index alone. Order of differentiability 0.

        Raises:
            InputError: low images of another shape, or a level or a seed that cannot be.
        """
        model, level = self.model, self.level(level)
        shape = (model.shape[0], self.low.size, self.low.size)
        if tuple(low.shape[1:]) != shape:
            raise InputError(f"low must be (N, {', '.join(map(str, shape))}) for {model.name}, got {tuple(low.shape)}")
        low, start = low.to(model.device, model.state_dtype), whole("start", start)
        key = stage_key(seed, model.shape[-1])
        indices = torch.arange(start, start + len(low), device=low.device)
        noise = philox_normal(key, indices, shape, stream="z").to(low.dtype)
        told = self.low.noised(low, torch.full_like(indices, level), noise, model.schedule)
        images = _Enlarging(model, told).sample(len(low), key, self.solver, self.steps, start)
        return images.clamp_(-1, 1) if isinstance(model, Teacher) else images


class Cascade:
    """A base model and the stages that enlarge its images.

    Args:
        base: a teacher or a student.
        stages: super-resolution models in their order, or what :class:`SuperResolution` takes.

    Raises:
        InputError: no stage, or one whose low images are not what the model before it draws.

    Examples:
        >>> Cascade(Teacher.from_pretrained("base"), DenoiserStudent.from_pretrained("sr-student")).sample(16, seed=1)
    """

    def __init__(self, base: Base, *stages: SuperResolution | DiffusionModel | DenoiserStudent):
        if not stages:
            raise InputError("a cascade needs a super-resolution model")
        self.base = base
        self.stages = [stage if isinstance(stage, SuperResolution) else SuperResolution(stage) for stage in stages]
        channels, size = self.image_channels, shape_of(base)[-1]
        for stage in self.stages:
            wanted = (stage.model.shape[0], stage.low.size)
            if (channels, size) != wanted:
                before = f"{channels} x {size} x {size}"
                needed = f"{wanted[0]} x {wanted[1]} x {wanted[1]}"
                raise InputError(
                    f"{stage.model.name} enlarges images of {needed}, the model before it draws {before}: "
                    f"put a model of {needed} before it"
                )
            size = stage.model.shape[-1]

    @property
    def image_size(self) -> int:
        """Side of the large images in pixels."""
        return self.stages[-1].model.shape[-1]

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return shape_of(self.base)[0]

    def sample(self, n: int, seed: int = 0, start: int = 0, level: int | None = None, **options: Any) -> torch.Tensor:
        """Large images ``start .. start + n - 1``.

        Args:
            n: number of images.
            seed: of all noise, in [0, 2^64).
            start: index of the first image.
            level: see :meth:`enlarge`.
            options: further arguments of the base's ``sample``: ``labels``, ``steps`` and so on.

        Returns:
            ``(n, C, H, W)``, as :meth:`SuperResolution.sample` gives them.

        Raises:
            InputError: as the base's ``sample`` and :meth:`SuperResolution.sample`.
        """
        levels = self.levels(level)
        images = self.base.sample(n, seed, start=start, **options)
        return self._enlarged(images, levels, seed, start)

    def enlarge(self, images: torch.Tensor, seed: int = 0, start: int = 0, level: int | None = None) -> torch.Tensor:
        """The stages' images of the base's images.

        Args:
            images: ``(N, C, h, w)`` of the base, in [-1, 1].
            seed: of the stages' noise.
            start: index of the first image.
            level: of the low images' noise in every stage, in timesteps; None: see :meth:`SuperResolution.level`.

        Returns:
            ``(N, C, H, W)``.

        Raises:
            InputError: as :meth:`SuperResolution.sample`.
        """
        return self._enlarged(images, self.levels(level), seed, start)

    def levels(self, level: int | None = None) -> list[int]:
        """The levels of the stages, checked.

        Args:
            level: see :meth:`enlarge`.

        Returns:
            One level a stage.

        Raises:
            InputError: a level that a stage was not trained with.
        """
        return [stage.level(level) for stage in self.stages]

    def _enlarged(self, images, levels, seed, start):
        for stage, level in zip(self.stages, levels, strict=True):
            images = stage.sample(images, level, seed, start)
        return images


def shape_of(model: Any) -> tuple[int, ...]:
    """Shape of a model's images.

    Args:
        model: a teacher, a student of either kind, or an exact model.

    Returns:
        ``(C, H, W)``.
    """
    if isinstance(model, Pictured):
        return tuple(model.image_shape)
    if isinstance(model, DiffusionModel):
        return tuple(model.shape)
    shape = getattr(model, "config", model)  # a generator's
    return shape.image_channels, shape.image_size, shape.image_size


class _Enlarging(DiffusionModel):
    """A super-resolution model with the low images that it is told: a diffusion model of their large images."""

    def __init__(self, model: DiffusionModel, told: LowImage):
        super().__init__(model.schedule, model.shape, model.state_dtype)
        self.model, self.told = model, told
        self.prediction, self.clip, self.variance_type = model.prediction, model.clip, model.variance_type
        self.name = model.name

    @property
    def device(self) -> torch.device:
        return self.model.device

    def noise_power(self, level: Level) -> float:
        return self.model.noise_power(level)

    def _program(self, solver, steps):
        return self.model._program(solver, steps)

    def _network(self, compiled=False):
        network = self.model._network(compiled)
        return lambda x, place: network(x, place, self.told)


def stage_key(seed: int, size: int) -> int:
    """Key of the noise of a stage: stages of one seed, and the base, would repeat each other's under the seed itself.

    Args:
        seed: of a call, in [0, 2^64).
        size: side of the stage's images.

    Returns:
        Key in [0, 2^64).
    """
    high, low = philox_words(seed, range(size, size + 1), 2, stream="z", step=KEY_STEP)[0].tolist()
    return high << 32 | low
