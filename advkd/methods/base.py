"""Interface of a distillation method: its numbers, its stages, the modules it trains, and one update of them.

The trainer (:mod:`advkd.training.trainer`) owns the rest: order of the data, random draws, optimisers, averages, checkpoints,
processes, devices and files.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..data.draws import Draw
from ..data.sources import Batch


@dataclass(frozen=True)
class Needs:
    """Requirements of a method's configuration.

    Attributes:
        data: ``levels`` (the teacher's recorded states), ``pairs`` (its start noise and final image), ``images`` or ``none``.
        paired: True if x_0 must be a function of x_T.
        teacher: True if updates call the teacher.
        labels: True if updates read class labels.
        averaged: True if levels are area averages of the final image instead of the teacher's states.
        student: ``generator`` (latent to image in one pass), ``denoiser``, ``classifier``, or ``images``: none.
        limit: number of recorded trajectories that are used (0: all).
        grow: trajectories that the teacher adds after every ``grow_every`` updates (0: none).
        grow_every: updates between two such additions.
        critic_backend: backend of the kernels of critics' updates; ``autograd`` where there are no kernels, or no critics.
    """

    data: str
    paired: bool = False
    teacher: bool = False
    labels: bool = False
    averaged: bool = False
    student: str = "generator"
    limit: int = 0
    grow: int = 0
    grow_every: int = 1
    critic_backend: str = "autograd"


@dataclass(frozen=True)
class Stage:
    """Part of a run with optimisers of its own.

    Attributes:
        number: 1, 2, ...
        updates: updates of the stage.
        batch_size: samples of a batch, over all processes.
        levels: submodules of the student whose recorded levels a batch holds.
    """

    number: int
    updates: int
    batch_size: int
    levels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Settings:
    """The trainer's part of a method's configuration.

    Attributes:
        seed: key of the data's order and of all draws.
        checkpoint_every: updates between checkpoints, a multiple of ``log_every``.
        log_every: updates that one row of ``metrics.csv`` averages.
        mixed_precision: ``no`` or ``bf16``.
        free: names of fields that may change between a run and its resumption.
    """

    seed: int
    checkpoint_every: int
    log_every: int = 1
    mixed_precision: str = "no"
    free: tuple[str, ...] = ("checkpoint_every",)


def cosine(update: int, updates: int, final: float = 0.0) -> float:
    """Cosine decay of a learning rate from 1 to ``final`` over ``updates`` updates.

    Args:
        update: updates so far, from 0; ``updates`` gives ``final``.
        updates: length of the decay.
        final: fraction of the learning rate at its end.

    Returns:
        Fraction of the learning rate.
    """
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * update / updates))


def warmed_cosine(update: int, updates: int, warmup: int) -> float:
    """Linear warm-up times cosine decay to 0.

    Args:
        update: updates so far, from 0.
        updates: length of the decay.
        warmup: updates of the warm-up (0: none).

    Returns:
        Fraction of the learning rate.
    """
    return (min(1.0, (update + 1) / warmup) if warmup else 1.0) * cosine(update, updates)


def constant(update: int) -> float:
    """Schedule of a learning rate that does not change.

    Args:
        update: updates so far; not used.

    Returns:
        Fraction of the learning rate, which is 1.
    """
    return 1.0


@dataclass
class Trained:
    """A module with an optimiser: Adam, or AdamW where ``weight_decay`` is positive.

    Attributes:
        module: moved to the run's device and dtype by the trainer.
        learning_rate: of the optimiser, before ``schedule``.
        betas: decays of Adam's running averages of the gradient and of its square.
        weight_decay: AdamW's decoupled decay; 0 for Adam.
        schedule: function of the stage's updates so far that gives a fraction of ``learning_rate``.
        clip: bound of the gradients' norm (0: none).
        average: decay of an exponential moving average of the module (0: none).
        parameters: those that the optimiser moves (None: all that require a gradient).
        memory_format: layout that the trainer gives the module's weights, ``torch.channels_last`` say.
    """

    module: nn.Module
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Callable[[int], float] = constant
    clip: float = 0.0
    average: float = 0.0
    parameters: list[nn.Parameter] | None = None
    memory_format: torch.memory_format = torch.preserve_format

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimiser of the parameters.

        Returns:
            ``Adam``, or ``AdamW`` where ``weight_decay`` is positive, with ``learning_rate`` and ``betas``.
        """
        own = (p for p in self.module.parameters() if p.requires_grad)
        parameters = list(own if self.parameters is None else self.parameters)
        if self.weight_decay:
            return torch.optim.AdamW(parameters, self.learning_rate, self.betas, weight_decay=self.weight_decay)
        return torch.optim.Adam(parameters, self.learning_rate, self.betas)


@dataclass
class Kept:
    """A module without an optimiser that a resumed run needs: a target average, the teacher of a round.

    Attributes:
        module: moved to the run's device and dtype by the trainer.
        memory_format: layout that the trainer gives the module's weights.
    """

    module: nn.Module
    memory_format: torch.memory_format = torch.preserve_format


class Step(Protocol):
    """Actions of an update; the trainer provides them."""

    def __call__(self, name: str, loss: Tensor) -> None:
        """Move a module down the gradient of a loss.

        Args:
            name: of a :class:`Trained` module that :meth:`Method.build` gave.
            loss: scalar with a graph; a parameter that it does not depend on has the gradient 0.

        Raises:
            TrainingError: the gradient, averaged over the processes, is not finite.
        """

    def gradients(self, name: str, gradients: Iterable[Tensor]) -> None:
        """Move a module by gradients.

        Args:
            name: of a :class:`Trained` module that :meth:`Method.build` gave.
            gradients: one tensor for each of its optimiser's parameters, in their order; their memory may be written to.

        Raises:
            TrainingError: a gradient, averaged over the processes, is not finite.
        """

    def log(self, **values: Tensor) -> None:
        """Record scalars; ``metrics.csv`` has a column for each name in :attr:`Method.columns`.

        Args:
            values: tensors of one element by name; their means over the processes are written.
        """

    def next_batch(self) -> tuple[Batch, Draw]:
        """A further batch of the same update, and its draws.

        Returns:
            ``(batch, draw)`` of the rows that come next in the data's order, as :meth:`Method.update` is given them.
        """

    def autocast(self) -> Any:
        """Context manager of the run's mixed precision.

        Returns:
            Autocast to bfloat16 with ``mixed_precision`` ``bf16``; with ``no``, a context in which nothing changes.
        """


class Method(Protocol):
    """A distillation method; subclasses write :meth:`needs`, :meth:`stages`, :meth:`build` and :meth:`update`.

    Attributes:
        name: command, registry key and folder name.
        reference: the paper.
        Config: dataclass of the method's own numbers; each field is an option of the command line.
        recipes: named configurations.
        columns: names that :meth:`update` logs, in the order of ``metrics.csv`` (empty: no such file is written).
        parallel: True if several processes may share a batch.
        distils: True if ``advkd distill`` offers the method.
        requires: what it needs, for people.
        inputs: options of the command line that name what it learns from: ``trajectories``, ``data`` (images), ``teacher``.
        students: kinds of students that it trains: ``generator``, ``denoiser``; ``images`` alone where it optimises them.
        takes_weights: True if it tells a denoiser student a guidance weight.
        takes_latents: True if it tells a denoiser student a latent.
        takes_low_images: True if it tells a denoiser student low images.
        teacher: the run's teacher; the trainer sets it before the first stage.
        averages: moving averages by the names of :meth:`build`: in it those of the stage before (none in a run that is resumed:
            the checkpoint's state comes after it), in :meth:`update` the stage's.
        origin: JSON values of the network that training begins from and of the teacher, where the runner says them.
        config: this run's configuration, a ``Config``.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    Config: ClassVar[type]
    recipes: ClassVar[Mapping[str, Any]] = {}
    columns: tuple[str, ...] = ("loss",)
    parallel: ClassVar[bool] = True
    distils: ClassVar[bool] = True
    requires: ClassVar[str] = "trajectories of a teacher (advkd trajectories)"
    inputs: ClassVar[tuple[str, ...]] = ("trajectories", "teacher")
    students: ClassVar[tuple[str, ...]] = ("generator",)
    takes_weights: ClassVar[bool] = False
    takes_latents: ClassVar[bool] = False
    takes_low_images: ClassVar[bool] = False
    config: Any
    teacher: Any = None
    averages: Mapping[str, nn.Module] = {}
    origin: Mapping[str, Any] = {}

    @classmethod
    def begin(cls, config: Any, student: Any) -> Any:
        """The denoiser student with which training begins, from the one that the user named.

        Args:
            config: a ``Config``.
            student: a :class:`~advkd.diffusion.denoiser_student.DenoiserStudent`.

        Returns:
            The student, the default, or one that is told more.

        Raises:
            InputError: a student that the method cannot begin with: by default a copy of a teacher that gives another output
                than v.
        """
        student.require_v(cls.name)
        return student

    def check(self, data: Any) -> None:
        """Raise :class:`advkd.InputError` where recorded trajectories do not suit the configuration.

        Args:
            data: the :class:`advkd.data.trajectories.Trajectories` of the run.
        """
        return None

    @classmethod
    def calls_teacher(cls, config: Any) -> bool:
        """True if updates of a denoiser student may call a teacher.

        Args:
            config: the method's configuration.
        """
        return False

    def needs(self) -> Needs:
        """Requirements of this configuration."""
        ...

    def settings(self) -> Settings:
        """The trainer's part of the configuration."""
        ...

    def stages(self) -> Sequence[Stage]:
        """Stages of a run, in order.

        Returns:
            One stage or more, each with one update or more and a batch size that the number of processes divides.
        """
        ...

    def build(self, stage: Stage) -> Mapping[str, Trained | Kept]:
        """Modules of a stage; a module may be that of the stage before.

        Args:
            stage: one of :meth:`stages`; the trainer builds them in order, a resumed run only those from its own on.

        Returns:
            Modules by name, with an optimiser (:class:`Trained`) or without (:class:`Kept`); ``student``, a :class:`Trained`
            one, is the result.
        """
        ...

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """One update, in the paper's order.

        Args:
            step: moves modules, records numbers and gives further batches.
            batch: this process's rows, with the parts that :meth:`needs` names.
            draw: random numbers of these rows; each is a function of (seed, global draw, purpose).
        """
        ...

    def evaluations(self, stage: Stage) -> tuple[float, float]:
        """Network evaluations of an update by sample of the batch, the price of a run.

        Args:
            stage: one of :meth:`stages`.

        Returns:
            ``(forward, backward)``, means over the stage's updates: passes forward of student, score network and teacher, and
            passes backward.
        """
        return 1, 1

    def measured(self, model: Any, stage: Stage) -> dict[str, Any]:
        """Numbers about a stage's result that its record keeps.

        Args:
            model: the student as the model that it is saved as, a :class:`advkd.Teacher`.
            stage: one of :meth:`stages`.

        Returns:
            JSON values by name; none by default.
        """
        return {}

    def identity(self) -> dict[str, Any]:
        """JSON values beside the configuration that must not change between a run and its resumption.

        Returns:
            Values by name, other names than those of the configuration's fields and of :meth:`Source.identity`.
        """
        return dict(self.origin)

    def generator(self, update: int) -> torch.Generator | None:
        """Generator that an update of the run draws rows and noise from, instead of Philox.

        Args:
            update: number of the update, from 0 over all stages.

        Returns:
            A generator on the host. None, the default, leaves rows and noise to Philox.
        """
        return None

    def samples(self, student: nn.Module, stage: Stage) -> Tensor | None:
        """Images that show a stage's result.

        Args:
            student: the result so far, in eval mode: the average, where there is one.
            stage: the stage that has just ended.

        Returns:
            ``(N, C, H, W)`` in [-1, 1], which the main process writes as a grid, ``samples-stage-01.png`` say; or None, the
            default, for no picture.
        """
        return None
