"""What a generator student was taught, of which pictures and evaluations draw the teacher's counterpart."""

from typing import Any

import torch

from ..data.labels import labels_in_turn
from ..diffusion.teacher import Teacher
from ..models.student import Student
from .kept_images import NO_CLASS, Condition


def taught(student: Student, teacher: Teacher) -> Condition:
    """Condition of the teacher's images beside a student's.

    Args:
        student: the student, whose training record has the guidance.
        teacher: its teacher.

    Returns:
        The student's classes in turn with the guidance of its last training, 0 where that is not recorded; no class of an
        unconditional student, or of a teacher that does not know the classes.
    """
    known = list(teacher.class_names)
    if not student.num_classes or not set(student.class_names) <= set(known):
        return NO_CLASS
    return Condition(tuple(known.index(name) for name in student.class_names), _last_run(student).get("guidance", 0.0))


def learned_image(student: Student) -> bool:
    """True if the levels of a student learned the teacher's image, not its states.

    Args:
        student: the student, whose training record tells.
    """
    config = _last_run(student).get("config")
    return isinstance(config, dict) and config.get("targets") == "image"


def all_in_turn(student: Student, n: int) -> torch.Tensor | None:
    """Classes of images ``0 .. n - 1``, every class of a student in turn.

    Args:
        student: the student.
        n: number of images.

    Returns:
        ``(n,)`` int64 on the student's device; None of an unconditional student.
    """
    labels = labels_in_turn(range(student.num_classes), 0, n)
    return None if labels is None else labels.to(student.head.weight.device)


def _last_run(student: Student) -> dict[str, Any]:
    """Record of a student's last training; empty where there is none."""
    runs = (student.training_record or {}).get("runs") or [{}]
    return runs[-1] if isinstance(runs[-1], dict) else {}
