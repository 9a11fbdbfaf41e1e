"""Distillation into denoiser students, by any method that trains one."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.images import load_images, load_labelled
from ..data.sources import RecordedPairs, Source, Tensors
from ..data.trajectories import Trajectories
from ..diffusion.denoiser_student import DenoiserStudent
from ..diffusion.guidance import require_labels
from ..diffusion.saving import INDEX
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..methods import method_class
from ..methods.base import Stage
from ..models.denoiser import DenoiserNetwork
from ..runtime.devices import plain_defaults
from ..runtime.files import digest
from .cost import run_cost
from .trainer import Trainer


def distill_denoiser(
    method: str,
    config: Any,
    student: DenoiserStudent,
    out: str | Path,
    *,
    teacher: Teacher | None = None,
    data: "str | Path | torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None" = None,
    trajectories: "str | Path | Sequence[str | Path] | Trajectories | None" = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> DenoiserStudent:
    """Train a denoiser student and save it under ``out``, or the student of every round under a folder of its own.

    Args:
        method: name of the method (:data:`advkd.methods.METHODS`).
        config: its configuration.
        student: where training begins; its network is trained in place.
        out: folder for the student, ``checkpoint.safetensors``, ``metrics.csv`` and TensorBoard files.
        teacher: of methods that call one, of the student's schedule.
        data: images of methods that need them: ``digits``, a folder, or ``(N, C, H, W)`` in [-1, 1]; with labels a folder of
            one folder a class, or a pair of images and ``(N,)`` classes.
        trajectories: folder of ``advkd trajectories``, several of them, or a :class:`Trajectories`, of methods that need pairs.
        resume: go on from ``out``'s checkpoint.
        device: torch device of a single process (several processes: what accelerate gives).
        progress: show a bar (on the main process).

    Returns:
        The student of the last stage, in eval mode.

    Raises:
        InputError: student, teacher, data, configuration or folder do not fit each other; nothing was started.
        TrainingError: a loss is not finite; the last good checkpoint is kept.

    Examples:
        >>> start = DenoiserStudent.from_teacher(teacher)
        >>> distill_denoiser("reparametrize", ReparametrizeConfig(), start, "v", teacher=teacher, data="digits")
    """
    if isinstance(trajectories, (str, Path)):
        trajectories = [trajectories]
    if trajectories is not None and not isinstance(trajectories, Trajectories):
        trajectories = Trajectories(*trajectories)
    run = DenoiserDistiller(
        method, config, student, out, teacher, data, trajectories, resume=resume, device=device, progress=progress
    )
    run.run()
    return run.kept(run.result, run.stages[-1])


class DenoiserDistiller(Trainer):
    """One run; see :func:`distill_denoiser`. ``dtype`` is float32, or float64 for tests of exactness.

    Args:
        method: name of the method.
        config: its configuration.
        student: where training begins.
        out: folder of the run.
        teacher: a :class:`Teacher`, or None.
        data: images, or None.
        trajectories: a :class:`Trajectories`, or None.
        resume: go on from ``out``'s checkpoint.
        device: torch device of a single process.
        dtype: of the networks and the batches.
        progress: show a bar.

    Raises:
        InputError: what does not fit; nothing was started.
    """

    @plain_defaults()
    def __init__(
        self,
        method: str,
        config: Any,
        student: DenoiserStudent,
        out: str | Path,
        teacher: Teacher | None = None,
        data: "str | Path | torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None" = None,
        trajectories: Trajectories | None = None,
        *,
        resume: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: bool = True,
    ):
        kind: Any = method_class(method)
        if "denoiser" not in kind.students:
            raise InputError(f"{method} trains a {kind.students[0]}, not a denoiser student")
        if not isinstance(config, kind.Config):
            raise InputError(f"config of {method} must be a {kind.Config.__name__}, got {type(config).__name__}")
        student = kind.begin(config, student)
        self._start_student, self._recorded = student, trajectories
        model = student.model
        run = kind(config, DenoiserNetwork(model.unet), model.schedule)
        run.teacher, run.clip = teacher, model.clip
        run.num_classes, run.null_class = model.num_classes, model.null_class
        run.given = "pairs" if trajectories is not None else "images" if data is not None else "none"
        needs = run.needs()
        if needs.teacher and teacher is None:
            raise InputError(f"{method} needs a teacher: name it by --teacher")
        if teacher is not None:
            _require_alike(student, teacher)
        taught = {} if teacher is None else {"teacher": teacher.identity()}
        run.origin = {"init": digest(student.model.unet.state_dict()), **taught}
        source = _source(run, needs, student, data, trajectories)
        for stage in run.stages():
            sampler = run.sampler(stage)
            model.program(sampler.solver, sampler.steps)
        super().__init__(
            run,
            source,
            teacher,
            out,
            resume=resume,
            device=device,
            dtype=dtype,
            progress=progress,
            save_stage=self._keep,
            finished=tuple(str(Path(run.folder(stage)) / INDEX) for stage in run.stages()),
        )

    def kept(self, network: torch.nn.Module, stage: Stage) -> DenoiserStudent:
        """The student of a stage.

        Args:
            network: the result of the stage, a :class:`~advkd.models.denoiser.DenoiserNetwork`.
            stage: the stage.

        Returns:
            Student with a copy of the network, the stage's sampler and the record of all training so far.
        """
        start = self._start_student.model
        assert isinstance(network, DenoiserNetwork)
        unet = copy.deepcopy(network.unet).to(memory_format=torch.contiguous_format)
        model = Teacher(unet, start.scheduler, "student", start.classes)
        method: Any = self.method
        return DenoiserStudent(model, method.sampler(stage), self._record(stage, method.measured(model, stage)))

    def _keep(self, network, out, stage):
        self.kept(network, stage).save_pretrained(out / self.method.folder(stage))  # type: ignore[attr-defined]

    def _record(self, stage, measured):
        """Record of training up to a stage's end; evaluation refuses reference samples that are among its ``samples``."""
        before = self._start_student.training_record or {"samples": [], "runs": []}
        recorded, stages = self._recorded, self.stages[: stage.number]
        parts, info = (recorded.parts, recorded.info) if recorded is not None else ([], None)
        new = [part for part in parts if part not in before["samples"]]
        run: dict[str, Any] = {
            "method": self.method.name,
            "config": dataclasses.asdict(self.method.config),
            "stage": stage.number,
            "cost": run_cost(self.method, stages, info, sum(part["num"] for part in new)),
            **measured,
            "version": __version__,
        }
        if info is not None:
            run |= {"sampler": info.solver, "steps": info.steps, "samples": parts}
        if self.method.teacher is not None:
            run["teacher"] = self.method.teacher.identity()
        return {"runs": [*before["runs"], run], "samples": before["samples"] + new}


def _source(run, needs, student, data, trajectories) -> Source:
    """The data set that a method's configuration needs, and no other."""
    model = student.model
    if needs.data == "pairs":
        if trajectories is None:
            raise InputError(f"{run.name} needs pairs of a deterministic solver: record them and name them by --trajectories")
        if data is not None:
            raise InputError(f"{run.name} learns from pairs here: leave --data out, or leave out --trajectories")
        return _pairs(run, needs, model, trajectories)
    if trajectories is not None:
        raise InputError(f"{run.name} does not read trajectories with these options: leave --trajectories out")
    if needs.data == "none":
        return Tensors()
    if data is None:
        raise InputError(f"{run.name} needs images: name them by --data")
    return _images(needs, model, data)


def _pairs(run, needs, model, trajectories):
    if needs.grow:
        raise InputError("grow adds trajectories for students that draw in one pass: leave it out, and record more")
    shape = (trajectories.info.image_channels, trajectories.info.image_size, trajectories.info.image_size)
    if shape != tuple(model.shape):
        raise InputError(f"the trajectories hold images {shape}, the student draws {tuple(model.shape)}: record again")
    run.check(trajectories)
    if needs.paired and not trajectories.paired:
        raise InputError("the trajectories are unpaired (a solver that adds noise): record with --solver unipc")
    trajectories = Trajectories(*trajectories.folders)
    trajectories.verify()
    source = RecordedPairs(trajectories, needs.limit)
    if model.num_classes and trajectories.labels([0]) is None:
        raise InputError("the student is told classes and the trajectories have none: record them with --classes all")
    return source


def _images(needs, model, data):
    size, channels = model.image_size, model.image_channels
    if isinstance(data, torch.Tensor):
        images, labels = data, None
    elif isinstance(data, tuple):
        images, labels = data[0], require_labels(data[1], len(data[0]), model.num_classes, data[0].device)
    elif needs.labels or model.num_classes:
        images, labels, names = load_labelled(data, size, channels)
        if tuple(names) != tuple(model.class_names):
            raise InputError(f"--data {data} has classes {', '.join(names)}, the student knows {', '.join(model.class_names)}")
    else:
        images, labels = load_images(data, size, channels), None
    if tuple(images.shape[1:]) != tuple(model.shape):
        raise InputError(f"data holds images {tuple(images.shape[1:])}, the student draws {tuple(model.shape)}")
    if needs.labels and labels is None:
        raise InputError("data has no labels, and the method needs them: name a folder of one folder a class")
    return Tensors(images=images) if labels is None else Tensors(images=images, labels=labels)


def _require_alike(student, teacher):
    """Refuse a teacher whose states are not the student's."""
    model = student.model
    if tuple(model.shape) != tuple(teacher.shape):
        raise InputError(
            f"the teacher draws images {tuple(teacher.shape)}, the student {tuple(model.shape)}: they must be alike"
        )
    ours, theirs = model.schedule.alpha_bars, teacher.schedule.alpha_bars
    if ours.shape != theirs.shape or not torch.equal(ours, theirs):
        raise InputError("teacher and student have different noise schedules: begin with one of the teacher's own students")
    if model.num_classes != teacher.num_classes:
        raise InputError(
            f"the teacher knows {teacher.num_classes} classes, the student {model.num_classes}: they must be alike"
        )
