"""Sets of images, drawn in shards that the cache keeps: a killed run goes on, and a larger one draws what is missing."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.labels import labels_in_turn
from ..diffusion.guidance import class_numbers, classes_of
from ..diffusion.solvers import METHODS, Solver
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..models.shape import batches
from ..runtime.files import read_tensors, require_digest, with_digest, write_tensors
from .image_sets import eight_bit

SHARD = 500
"""Images of a shard."""

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


@dataclass(frozen=True)
class KeptSet:
    """Images ``0 .. num - 1`` of one sampler and one seed, kept in the cache.

    Attributes:
        kind: first word of the folder's name.
        depends: JSON values that determine every image; their hash names the folder.
        num: number of images.
        shape: of an image, ``(C, H, W)``.
        batch_size: images that are drawn together.
        draw: function of a batch's number of images and the index of its first one that gives them, ``(n, C, H, W)`` in
            [-1, 1].
    """

    kind: str
    depends: list[Any]
    num: int
    shape: tuple[int, ...]
    batch_size: int
    draw: Callable[[int, int], torch.Tensor]

    @property
    def name(self) -> str:
        """Name of its folder, another one of other images."""
        key = hashlib.sha256(json.dumps(self.depends, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{key[:32]}"

    def images(self, cache: Path, bar: Any) -> torch.Tensor:
        """The images, from the cache or drawn now.

        Args:
            cache: folder that the set's folder is in.
            bar: progress bar, moved on by every image.

        Returns:
            ``(num, C, H, W)`` uint8 on the CPU.

        Raises:
            InputError: a kept file that is damaged; the message names it.
        """
        folder = cache / self.name
        return torch.cat([self._shard(folder, first, count, bar) for first, count in batches(self.num, SHARD)])

    def _shard(self, folder, first, count, bar):
        path = folder / f"images-{first:07d}-{count:03d}.safetensors"
        if path.exists():
            bar.update(count)
            return _kept(path, (count, *self.shape))
        drawn = []
        for start, number in batches(count, self.batch_size):
            drawn.append(eight_bit(self.draw(number, first + start)))
            bar.update(number)
        folder.mkdir(exist_ok=True)
        tensors = {"images": torch.cat(drawn)}
        write_tensors(path, tensors, with_digest(tensors, {}))
        return tensors["images"]


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

    return KeptSet("solvers", depends, run.num, model.shape, batch_size, draw)


def fine_run(steps: int, seed: int, num: int) -> Run:
    """The fine-step reference of sets of ``seed``, whose noise is another one's."""
    return Run(FINE, steps, seed + 1, num)


def _kept(path, shape):
    """Images of an earlier run, as they were written."""
    remedy = "delete it, and it is drawn again"
    tensors, metadata = read_tensors(path, "the cache's images", ("digest",), remedy)
    require_digest(path, tensors, metadata, remedy)
    if tuple(tensors["images"].shape) != shape:
        raise InputError(f"{path} holds {tuple(tensors['images'].shape)}, expected {shape}: {remedy}")
    return tensors["images"]
