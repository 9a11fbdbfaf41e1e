"""Students of either kind by what a folder holds."""

import os
from pathlib import Path

import torch

from ..errors import InputError
from ..models.saving import SAMPLER
from ..models.student import Student
from ..runtime.hub import resolve
from .denoiser_student import DenoiserStudent
from .guidance import named_classes
from .loading import EMBEDDED
from .saving import INDEX
from .teacher import Teacher


def student_class(source: str | Path) -> type[Student] | type[DenoiserStudent]:
    """The kind of a student, of which no weights are read.

    Args:
        source: as for :func:`load_student`.

    Returns:
        :class:`DenoiserStudent` where the folder holds ``sampler.json``, else :class:`Student`, which draws in one pass.

    Raises:
        InputError: it is neither a known name nor a folder nor a repository of the hub that can be fetched, or it is a folder
            with the students of several rounds.
    """
    folder = resolve(source, Student.embedded, "student", ["*.json"])
    inner = sorted(path.parent.name for path in folder.glob(f"*/{SAMPLER}"))
    if inner and not any((folder / name).exists() for name in (SAMPLER, "config.json", INDEX)):
        raise InputError(
            f"student {source} holds the students of several rounds, {', '.join(inner)}: name one, {source}/{inner[0]}"
        )
    return DenoiserStudent if os.path.lexists(folder / SAMPLER) else Student


def load_student(source: str | Path, device: str | torch.device = "cpu") -> Student | DenoiserStudent:
    """Load a student.

    Args:
        source: ``digits`` or ``glyphs`` (embedded), a folder of ``advkd distill``, or a hub id (owner/name).
        device: where it is put.

    Returns:
        A student in eval mode, of the kind that :func:`student_class` finds.

    Raises:
        InputError: missing, damaged or foreign files.
    """
    return student_class(source).from_pretrained(source, device)


def generator_classes(source: str | Path, student: Student, classes: str | None) -> list[int]:
    """Numbers of the classes that images of a generator student take in turn.

    Args:
        source: name of the student in messages.
        student: the student.
        classes: as for :func:`advkd.diffusion.guidance.named_classes`; None: every class of a conditional student.

    Returns:
        The numbers; empty for an unconditional student.

    Raises:
        InputError: an unknown class, or one of an unconditional student.
    """
    if classes is None:
        return list(range(student.num_classes))
    return named_classes(f"student {source}", student.class_names, classes)


def load_start(source: str | Path, device: str | torch.device = "cpu") -> Student | DenoiserStudent:
    """A student to be trained further: a student, or a copy of a teacher as one.

    Args:
        source: as for :func:`load_student`, or a teacher's: ``digits-conditional``, ``glyphs-teacher``, a folder or a hub id.
        device: where it is put.

    Returns:
        A :class:`Student` or a :class:`DenoiserStudent`; of a teacher of another prediction one whose ``trained_as`` says so.

    Raises:
        InputError: missing, damaged or foreign files.
    """
    if str(source) not in Student.embedded:
        folder = resolve(source, EMBEDDED, "student", ["*.json"])
        if os.path.lexists(folder / INDEX) and not os.path.lexists(folder / SAMPLER) and not (folder / "student").is_dir():
            return DenoiserStudent.from_teacher(Teacher.from_pretrained(source, device))
    return load_student(source, device)
