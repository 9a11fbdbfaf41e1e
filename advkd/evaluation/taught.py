"""The teacher's run that a generator student was taught by, for the teacher's images in pictures and evaluations."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data.labels import labels_in_turn
from ..diffusion.solvers import METHODS, Solver
from ..diffusion.teacher import Teacher
from ..models.student import Student
from .kept_images import NO_CLASS, Condition


@dataclass(frozen=True)
class Lesson:
    """The teacher's run that made the images which a student learned.

    Attributes:
        solver: name of the solver.
        steps: its steps; None: the solver's usual number.
        condition: classes that the images take in turn, and guidance towards them.
    """

    solver: str = "ddim"
    steps: int | None = None
    condition: Condition = NO_CLASS

    def arguments(self, count: int, first: int = 0) -> dict[str, Any]:
        """Arguments of the teacher's ``sample`` and ``path`` for images ``first .. first + count - 1``."""
        return {"solver": self.solver, "steps": self.steps, **self.condition.arguments(count, first)}

    def evaluations(self, teacher: Teacher) -> int:
        """Network evaluations of an image.

        Args:
            teacher: the teacher that draws it.
        """
        steps = len(teacher.timesteps(self.solver, self.steps))
        return Solver(self.solver).evaluations(steps) * self.condition.passes(teacher)


def taught(student: Student, teacher: Teacher) -> Lesson:
    """The run of the teacher's images beside a student's.

    Args:
        student: the student, whose training record has the run.
        teacher: its teacher.

    Returns:
        The solver and steps of the student's last training, or DDIM where they are not recorded, damaged or add noise; the
        student's classes in turn with that training's guidance, but no class of an unconditional student, or of a teacher that
        does not know the classes.
    """
    run, known = _last_run(student), list(teacher.class_names)
    solver, steps, guidance = run.get("sampler"), run.get("steps"), run.get("guidance")
    lesson = Lesson()
    if isinstance(solver, str) and solver in METHODS and not Solver(solver).stochastic:
        lesson = Lesson(solver, steps if type(steps) is int and steps > 0 else None)
    if not student.num_classes or not set(student.class_names) <= set(known):
        return lesson
    numbers = tuple(known.index(name) for name in student.class_names)
    weight = float(guidance) if isinstance(guidance, (int, float)) and 0 <= guidance < 2**53 else 0.0
    return replace(lesson, condition=Condition(numbers, weight))


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
    runs = (student.training_record or {}).get("runs")
    return runs[-1] if isinstance(runs, list) and runs and isinstance(runs[-1], dict) else {}
