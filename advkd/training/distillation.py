"""Distillation into a student that draws in one pass, by any method that trains one."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.dataset_info import TrajectoryConfig, same_teacher
from ..data.sources import Recorded, Source
from ..data.trajectories import Trajectories
from ..diffusion.recorder import record_trajectories
from ..errors import InputError
from ..methods import method_class
from ..models.autoencoder import Autoencoder, sha256_of
from ..models.student import Student
from ..runtime.devices import plain_defaults
from ..runtime.files import digest
from .cost import run_cost, unpaid
from .denoiser_data import encoded, images_of, learnt_from, require_callable
from .processes import barrier
from .trainer import Trainer


def distill(
    trajectories: "str | Path | Sequence[str | Path] | Trajectories | None",
    student: Student,
    config: Any,
    out: str | Path,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
    teacher: Any = None,
    method: str = "adv-kd",
    images: "str | Path | torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None" = None,
) -> Student:
    """Train ``student`` and save it (its average, where ``config.ema`` is positive) under ``out``.

    Args:
        trajectories: folder of ``advkd trajectories``, several, or a :class:`Trajectories`; None: ``method`` needs none.
        student: a :class:`Student`, fresh or loaded; it is trained in place. Image size, channels, depth and classes must be
            those of the trajectories (``info.student_classes`` in any order); the latent may be another than the recorded one.
        config: configuration of the method: a :class:`DistillConfig` for ``adv-kd``, a :class:`PairsConfig` for ``pairs``, a
            :class:`~advkd.methods.diff_instruct.DiffInstructConfig` for ``diff-instruct``.
        out: folder for the student, ``checkpoint.safetensors``, ``training.json`` (what it was trained on), ``metrics.csv``,
            TensorBoard files and sample grids.
        resume: go on from ``out``'s checkpoint.
        device: torch device of a single process (several processes: what accelerate gives). A process group that accelerate
            starts here serves all later runs of the process and is destroyed at exit; one that exists already is the caller's.
        progress: show a bar (on the main process).
        teacher: the :class:`Teacher` that ``method`` calls, or that of the trajectories, where ``config.grow`` adds some.
        method: name of the method (:data:`advkd.methods.METHODS`).
        images: of a method that learns from images without trajectories: ``digits``, ``glyphs``, a folder, or ``(N, C, H, W)``
            in [-1, 1]; with labels a folder of one folder a class, or a pair of images and ``(N,)`` classes.

    Returns:
        The :class:`Student` that was saved, in eval mode.

    Raises:
        InputError: data, student, configuration or folder do not fit each other; nothing was started.
        TrainingError: a loss is not finite; the last good checkpoint is kept.

    Examples:
        >>> student = distill("trajectories", Student.from_preset("digits"), recipe("digits"), "student", device="cuda")
    """
    if trajectories is not None and not isinstance(trajectories, Trajectories):
        folders = [trajectories] if isinstance(trajectories, (str, Path)) else trajectories
        trajectories = Trajectories(*folders)
    run = Distiller(
        trajectories, student, config, out, resume, device, progress=progress, teacher=teacher, method=method, images=images
    )
    trained = run.run()
    assert isinstance(trained, Student)
    return trained


class Distiller(Trainer):
    """One distillation run; see :func:`distill`. ``dtype`` is float32, or float64 for tests of exactness.

    Args:
        data: a :class:`Trajectories`, which is opened anew, so that the caller's does not grow; None: ``method`` needs none.
        student: a :class:`Student`, trained in place.
        config: configuration of the method, an instance of its ``Config``.
        out: folder for all that :func:`distill` writes.
        resume: go on from ``out``'s checkpoint.
        device: torch device of a single process (several processes: what accelerate gives).
        dtype: of the student, the critics and the batches.
        progress: show a bar (on the main process).
        teacher: the :class:`Teacher` that ``method`` calls, or that of the trajectories, for a ``config`` that grows them.
        method: name of the method (:data:`advkd.methods.METHODS`).
        images: see :func:`distill`.

    Raises:
        InputError: data, student, configuration, device or folder do not fit each other, or a shard is damaged; nothing was
            started.

    Examples:
        >>> Distiller(Trajectories("trajectories"), student, DistillConfig(), "out").run()
    """

    @plain_defaults()
    def __init__(
        self,
        data: Trajectories | None,
        student: Student,
        config: Any,
        out: str | Path,
        resume: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: bool = True,
        teacher: Any = None,
        method: str = "adv-kd",
        images: "str | Path | torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None" = None,
    ):
        kind: Any = method_class(method)
        if "generator" not in kind.students:
            raise InputError(f"{method} trains a {kind.students[0]}, not a student that draws in one pass")
        if not isinstance(config, kind.Config):
            raise InputError(f"config of {method} must be a {kind.Config.__name__}, got {type(config).__name__}")
        run = kind(config, student)
        run.teacher, run.given = teacher, "pairs" if data is not None else "images" if images is not None else "none"
        if data is not None:
            run.check(data)
        needs = run.needs()
        if teacher is not None and not needs.teacher and not needs.grow:
            raise InputError(
                f"teacher: {method} calls none with these options, the trajectories hold what it drew: leave it out"
            )
        if needs.teacher:
            _require_teacher(method, student, teacher, device)
            taught = {**teacher.identity(), "name": None}
            run.origin = {"init": digest(student.state_dict()), "teacher": taught}
        self._recorded = data = _recorded(data, student, needs, teacher, images)
        bound = _bound(data, student, teacher)
        if needs.teacher and student.autoencoder is not None:  # the method works at the teacher's scale, the data stay there
            run.bound = run.origin["bound"] = bound
            bound = 1.0
        if data is not None:
            source: Source = _Growing(data, student, needs, teacher, bound, Path(out) / "trajectories")
        else:
            source = images_of(run, needs, student.image_shape, student.class_names, images, progress)
            source = source if teacher.autoencoder is None else encoded(source, teacher.autoencoder, teacher.device)
        super().__init__(
            run,
            source,
            teacher,
            out,
            resume=resume,
            device=device,
            dtype=dtype,
            progress=progress,
            save=self._save_student,
        )

    @property
    def student(self) -> Student:
        """The student in training, not its average."""
        student = self.running["student"].part.module
        assert isinstance(student, Student)
        return student

    def _save_student(self, student, out):
        student.training_record = self._provenance(student, out)
        student.save_pretrained(out)

    def _provenance(self, student, out):
        """Record of a student's training; evaluation refuses reference samples that are among its ``samples``."""
        before, method = self.student.training_record or {"samples": [], "runs": []}, self.method
        begun = {**learnt_from(method, self.data), **method.measured(student, self.stage)}
        if self._recorded is None:
            run = {"method": method.name, "config": dataclasses.asdict(method.config), "version": __version__, **begun}
            run |= {"teacher": method.teacher.identity(), "cost": run_cost(method, self.stages)}
            return {"runs": [*before["runs"], run], "samples": before["samples"]}
        info = self._recorded.info
        # A finished run that is resumed has not opened the folders that it grew.
        grown = [Trajectories(path.parent) for path in sorted(out.glob("trajectories/*/manifest.json"))]
        read = [self._recorded, *(one for one in grown if one.parts[0] not in self._recorded.parts)]
        parts, manifests = ([item for one in read for item in getattr(one, name)] for name in ("parts", "manifests"))
        run = {"config": dataclasses.asdict(method.config), "samples": parts, "version": __version__}
        if method.name != "adv-kd":
            run["method"] = method.name
        run |= {"sampler": info.solver, "steps": info.steps, "teacher": info.teacher, "trajectories": manifests, **begun}
        if self.needs.teacher:
            run |= {"teacher": method.teacher.identity(), "recorded_by": info.teacher}
        run |= {"classes": info.classes, "guidance": info.guidance} if info.classes else {}
        new = [part for part in parts if part not in before["samples"]]
        run["cost"] = run_cost(method, self.stages, info, unpaid(before, manifests, parts))
        return {"runs": [*before["runs"], run], "samples": before["samples"] + new}


class _Growing(Recorded):
    """Recorded trajectories to which the teacher adds some while a student is trained."""

    def __init__(self, data, student, needs, teacher, bound, folder):
        latent = (student.config.latent_size, student.config.detail_noise)
        super().__init__(data, latent, needs.limit, student.class_names, needs.averaged, bound)
        self._teacher, self._needs, self._folder = teacher, needs, folder
        self._given = len(data.folders)
        self._first = max(part["start"] + part["num"] for part in data.parts)

    def grow(self, updates: int) -> None:
        """Record what is to be there after so many updates and is not, by all processes together."""
        if not self._needs.grow:
            return
        for i in range(len(self.data.folders) - self._given, updates // self._needs.grow_every):
            names = {field.name for field in dataclasses.fields(TrajectoryConfig)}
            values = {name: getattr(self.data.info, name) for name in names}
            values |= {"start": self._first + i * self._needs.grow, "num": self._needs.grow}
            folder = self._folder / f"{i + 1:04d}"
            record_trajectories(self._teacher, TrajectoryConfig(**values), folder, progress=False)
            barrier()
            self.data.append(folder)


def _bound(data, student, teacher):
    """Number by which latents are divided for a student in [-1, 1], which is given their autoencoder; 1 of pictures."""
    autoencoder = _autoencoder(data, teacher)
    if autoencoder is None and student.autoencoder is not None:
        raise InputError(
            "the student draws latents, and --teacher or --trajectories is of pictures: begin with another student by --preset"
        )
    if autoencoder is None:
        return 1.0
    if student.autoencoder is None and data is None:
        raise InputError(
            "a student in one pass draws numbers in [-1, 1], and the teacher's latents have no known bound: record some "
            "and name them by --trajectories, or begin with a student of these latents by --init"
        )
    if student.autoencoder is None:
        student.autoencoder = autoencoder.rescaled(data.largest())
    if student.autoencoder.weights_sha256 != autoencoder.weights_sha256:
        raise InputError(
            "the student draws latents of another autoencoder than --trajectories or --teacher: begin with a fresh one by "
            "--preset and --trajectories"
        )
    return autoencoder.scaling / student.autoencoder.scaling


def _autoencoder(data, teacher):
    """The autoencoder of what a student learns from, of a recording, a teacher, or both; None of pictures."""
    if data is None:
        return teacher.autoencoder
    known = data.info.teacher.get("autoencoder_sha256")
    if teacher is not None and known != sha256_of(teacher.autoencoder):
        raise InputError(
            "--trajectories and --teacher are not of one autoencoder: record others, or name the trajectories' teacher"
        )
    if not data.info.latents:
        return None
    autoencoder = Autoencoder.from_pretrained(data.folder)
    if autoencoder.sha256 != known:
        raise InputError(f"--trajectories {data.folder}: its autoencoder is not the teacher's: restore or fetch a copy of it")
    return autoencoder


def _recorded(data, student, needs, teacher, images):
    """The trajectories that a method reads, opened anew; None where it needs none."""
    if needs.data not in ("levels", "pairs"):
        return None
    if data is None:
        raise InputError("name recorded trajectories by --trajectories")
    if images is not None:
        raise InputError("the run learns from trajectories: leave --data out, or leave out --trajectories")
    _require_fit(data, student, needs, teacher)
    data = Trajectories(*data.folders)
    data.verify()
    return data


def _require_teacher(method, student, teacher, device):
    """Refuse a teacher that is missing, takes weights itself, or draws other images or classes than the student."""
    if teacher is None:
        raise InputError(f"{method} needs a teacher: name it by --teacher")
    require_callable(teacher, device)
    shape = (student.config.image_channels, student.config.image_size, student.config.image_size)
    if tuple(teacher.shape) != shape:
        raise InputError(f"the teacher draws {tuple(teacher.shape)}, the student {shape}: choose another by --preset")
    if teacher.num_classes and not student.num_classes:
        raise InputError("the teacher is told classes and the student knows none: begin with a fresh one by --preset")
    if missing := [name for name in student.class_names if name not in teacher.class_names]:
        raise InputError(f"the teacher does not know the student's classes {', '.join(missing)}: name the teacher that does")


def _require_fit(data, student, needs, teacher):
    if needs.grow and teacher is not None:
        teacher.match(data.info.teacher)
    if needs.grow and (teacher is None or not same_teacher(teacher.identity(), data.info.teacher)):
        raise InputError(f"grow {needs.grow} needs the teacher of the trajectories: --teacher")
    if needs.paired:
        data.require_paired()
    _require_classes(data.info.student_classes, student.class_names)
    info, shape = data.info, student.config
    wanted = {
        "image_size": (info.image_size, shape.image_size),
        "image_channels": (info.image_channels, shape.image_channels),
        "depth": (info.depth, len(shape.channels)),
    }
    for name, (theirs, ours) in wanted.items():
        if theirs != ours:
            raise InputError(
                f"the trajectories have {name} {theirs}, the student {ours}: choose another preset or record again"
            )


def _require_classes(theirs, ours):
    """Refuse recordings whose classes, by name, are not the student's."""
    if set(theirs) == set(ours):
        return
    if not ours:
        raise InputError(
            "the trajectories have classes and the student knows none: begin with a fresh one by --preset, or with "
            "Student(StudentConfig(classes=trajectories.info.student_classes, ...)), or record them without --classes"
        )
    if not theirs:
        raise InputError("the student has classes and the trajectories have none: record them with --classes all")
    raise InputError(
        f"the trajectories' classes are {', '.join(theirs)}, the student's {', '.join(ours)}: record those of the student, or "
        "begin with a fresh one by --preset"
    )
