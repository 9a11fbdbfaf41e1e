"""Sets of images of a teacher's solvers that the cache keeps."""

from dataclasses import dataclass
from typing import Any

from ..data.kept_sets import KeptSet
from ..data.labels import labels_in_turn
from ..diffusion.guidance import class_numbers, classes_of
from ..diffusion.solvers import METHODS, Solver
from ..diffusion.teacher import Teacher

FINE = Solver("unipc-2")
"""Solver of the fine-step reference."""


@dataclass(frozen=True)
class Run:
    """A set of a teacher's images: a solver, its steps, the seed of its noise, and their number."""

    solver: Solver
    steps: int
    seed: int
    num: int

    @classmethod
    def of_evaluations(cls, solver: Solver, evaluations: int, model: Teacher, seed: int, num: int) -> "Run":
        """The longest run with at most ``evaluations`` network evaluations; its steps may be too few for the solver."""
        steps = (evaluations - 1) // METHODS[solver.name].evaluations + 1
        return cls(solver, min(steps, model.train_timesteps), seed, num)

    @property
    def evaluations(self) -> int:
        """Network evaluations of an image."""
        return self.solver.evaluations(self.steps)

    @property
    def name(self) -> str:
        """Solver and evaluations."""
        return f"{self.solver.name} {self.evaluations}"


@dataclass(frozen=True)
class Condition:
    """Classes that images take in turn by their index, and guidance towards them.

    Attributes:
        classes: numbers of the classes; empty: no class.
        guidance: weight w.
    """

    classes: tuple[int, ...] = ()
    guidance: float = 0.0

    @classmethod
    def of(cls, model: Teacher, classes: str, guidance: float) -> "Condition":
        """Condition of a model's images.

        Args:
            model: the model that draws them.
            classes: names, as for :func:`advkd.diffusion.guidance.class_numbers`; empty: no class.
            guidance: weight w, at least 0.

        Returns:
            The condition; the empty one of an unconditional model, whatever the classes.

        Raises:
            InputError: an unknown class, none where the model has no null class, or a weight that it cannot take.
        """
        numbers = class_numbers(model, model.class_names, classes or None) if model.num_classes else []
        if not numbers:
            return cls()
        classes_of(model, len(numbers), numbers, guidance, None)
        return cls(tuple(numbers), guidance)

    def passes(self, model: Teacher) -> int:
        """Network evaluations where a run without guidance has one: two, unless the model takes the weight itself."""
        return 2 if self.guidance and not model.most_guidance else 1

    def arguments(self, count: int, first: int) -> dict[str, Any]:
        """Arguments of ``sample`` for images ``first .. first + count - 1``; none without classes."""
        if not self.classes:
            return {}
        return {"labels": labels_in_turn(self.classes, first, count), "guidance": self.guidance}

    def identity(self) -> list[Any]:
        """JSON values; none without classes, whose images were kept before there were any."""
        return [{"classes": list(self.classes), "guidance": self.guidance}] if self.classes else []


NO_CLASS = Condition()
"""Condition of images of no class."""


def solver_set(model: Teacher, run: Run, batch_size: int, condition: Condition = NO_CLASS) -> KeptSet:
    """A teacher's images by a solver.

    Args:
        model: the teacher.
        run: solver, steps, seed and number.
        batch_size: images that run through the network together.
        condition: classes of the images.

    Returns:
        The set; nothing is drawn yet.
    """
    identity = {**model.identity(run.solver), "name": None}
    depends = [identity, run.solver.identity(), run.steps, run.seed, batch_size, *condition.identity()]

    def draw(count, first):
        return model.sample(count, run.seed, run.solver, run.steps, first, **condition.arguments(count, first))

    return KeptSet("solvers", depends, run.num, model.image_shape, batch_size, draw)


def fine_run(steps: int, seed: int, num: int) -> Run:
    """The fine-step reference of sets of ``seed``, whose noise is another one's."""
    return Run(FINE, steps, seed + 1, num)
