"""The place where a method's own update runs in the trainer on one data set, and what is kept of each run."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...data.sources import Source, Tensors
from ...diffusion.exact import FiniteSetTeacher
from ...diffusion.sampling import DiffusionModel
from ...diffusion.schedule import IMAGE
from ...diffusion.solvers import Solver, as_solver
from ...methods.base import Method, Stage
from ...runtime.devices import seeded_weights
from ...training.trainer import Trainer
from .data import ToyData
from .students import ToyModel, ToyNetwork

TRAINED = 2**14
"""Points or pairs that students learn from."""
PATHS, NOISY_PATHS = 48, 6
"""Paths that a picture shows, and those of a solver that adds noise, which entangles them."""
PAIRS = Solver("unipc-2"), 30
"""Solver and steps of the teacher's pairs."""
EXACT = "exact teacher"
"""Beginning of the titles of pictures that no student has drawn."""
FRESH = 2**40
"""Seed of noise that no run trains on."""


@dataclass
class Outcome:
    """Results of one row of the page.

    Attributes:
        samples: title of a picture -> points ``(N, 2)``.
        evaluations: title -> network evaluations of a sample.
        paths: title -> ``(steps + 1, n, 2)`` states tau x + (1 - tau) z from noise to points.
        numbers: what was measured beside, JSON values by name.
        weights: of the networks that later rows begin with.
        cost: network evaluations of the training, forward and backward.
        seconds: that the row took, by one thread.
    """

    samples: dict[str, Tensor] = field(default_factory=dict)
    evaluations: dict[str, int] = field(default_factory=dict)
    paths: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    cost: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0


class Laboratory:
    """One data set, and the outcomes so far.

    Args:
        data: the data set.
        samples: points that every picture is measured with.
        seed: of weights and draws.
        scale: factor of all numbers of updates.

    Attributes:
        outcomes: outcomes of earlier rows by their names.
    """

    def __init__(self, data: ToyData, samples: int, seed: int, scale: float):
        self.data, self.num, self.seed, self.scale = data, samples, seed, scale
        self.outcomes: dict[str, Outcome] = {}

    @property
    def teacher(self) -> Any:
        """The exact teacher, told no class."""
        return self.data.teacher

    def updates(self, number: int) -> int:
        """Updates of a run, scaled."""
        return max(1, round(number * self.scale))

    def settings(self, updates: int, **numbers: Any) -> dict[str, Any]:
        """Fields that all configurations have.

        Args:
            updates: before they are scaled.
            numbers: further fields.

        Returns:
            Fields by name.
        """
        common = {"batch_size": 512, "learning_rate": 2e-3, "seed": self.seed, "checkpoint_every": 10**6}
        return {"updates": self.updates(updates), **common, **numbers}

    def network(self, start: str = "", **options: Any) -> ToyNetwork:
        """A denoiser's network, drawn by the seed.

        Args:
            start: earlier row whose weights it begins with (empty: none).
            options: of :class:`~advkd.evaluation.toy.students.ToyNetwork`.
        """
        network = self.drawn(lambda: ToyNetwork(len(self.teacher.schedule), **options))
        if start:
            network.load_state_dict(self.outcomes[start].weights)
        return network

    def drawn(self, make: Callable[[], Any]) -> Any:
        """A module whose weights the seed draws.

        Args:
            make: function that makes it.

        Returns:
            The module.
        """
        with seeded_weights(self.seed):
            return make()

    def model(self, network: nn.Module, **options: Any) -> ToyModel:
        """A network as a model that solvers run on; options as of :class:`~advkd.evaluation.toy.students.ToyModel`."""
        return ToyModel(network, self.teacher.schedule, **options)

    def images(self) -> Tensors:
        """Points of the data."""
        return Tensors(images=self.teacher.data(TRAINED, self.seed).float())

    def labelled(self) -> Tensors:
        """Points of the data and their classes."""
        points = self.teacher.data(TRAINED, self.seed)
        return Tensors(images=points.float(), labels=self.data.labels(points))

    def pairs(self, model: DiffusionModel | None = None) -> Tensors:
        """Start noise and the points to which a deterministic solver leads from it.

        Args:
            model: of the solver (None: the exact teacher).
        """
        model, (solver, steps) = model or self.teacher, PAIRS
        z = model.noise(TRAINED, self.seed)
        return Tensors(z=z.float(), images=model.sample(TRAINED, self.seed, solver, steps).float())

    def run(self, method: Method, source: Source, teacher: Any = None, outcome: Outcome | None = None, **options: Any) -> Any:
        """Train a method in the real trainer.

        Args:
            method: the method.
            source: its data.
            teacher: its teacher, or None.
            outcome: is told the cost of the training.
            options: further arguments of :class:`~advkd.training.trainer.Trainer`.

        Returns:
            The student's average, or the student where it has none, in eval mode.
        """
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(method, source, teacher, folder, progress=False, **options)
            result = trainer.run()
        if outcome is not None:
            costs = [_cost(method, stage) for stage in trainer.stages]
            outcome.cost = (sum(cost[0] for cost in costs), sum(cost[1] for cost in costs))
        return result

    def draw(self, outcome: Outcome, title: str, model: DiffusionModel, solver: str | Solver, steps: int) -> None:
        """Samples of a model by a solver, and some of its paths.

        Args:
            outcome: where they are kept.
            title: of the picture.
            model: the model.
            solver: the solver.
            steps: its steps.
        """
        solver = as_solver(solver)
        z = model.noise(self.num, FRESH + self.seed)
        levels = [*solver.levels(model.schedule, steps)[1:], IMAGE]
        few = NOISY_PATHS if solver.stochastic else PATHS
        states = [z[:few].float()]
        for (_, x), level in zip(model.path(z, solver, steps, FRESH + self.seed), levels, strict=True):
            states.append((x[:few] / (level.alpha + level.noise)).float())
        outcome.samples[title], outcome.paths[title] = x.float(), torch.stack(states)
        outcome.evaluations[title] = solver.evaluations(steps)

    def place(self, outcome: Outcome, title: str, points: Tensor, evaluations: int = 1) -> None:
        """Keep the points of a generator, which takes one evaluation.

        Args:
            outcome: where they are kept.
            title: of the picture.
            points: ``(N, 2)``.
            evaluations: network evaluations of a sample; 0 for points that are no samples.
        """
        outcome.samples[title], outcome.evaluations[title] = points.detach().float(), evaluations

    def noise(self, num: int = 0) -> Tensor:
        """Fresh start noise ``(N, 2)`` float32; by default that of all pictures."""
        return self.teacher.noise(num or self.num, FRESH + self.seed).float()


def _cost(method: Any, stage: Stage) -> tuple[float, float]:
    forward, backward = method.evaluations(stage)
    samples = stage.updates * stage.batch_size
    return forward * samples, backward * samples


@torch.no_grad()
def noise_errors(model: Any, exact: Any, points: Tensor, sigmas: Tensor) -> list[float]:
    """Root mean square difference of two models' noise, sigma sqrt(a) times that of their scores, by noise level.

    Args:
        model: a model with ``predict``.
        exact: another one.
        points: ``(N, 2)`` points that noise is added to.
        sigmas: noise levels.

    Returns:
        A number for each level.
    """
    eps, found = torch.randn(points.shape, generator=torch.Generator().manual_seed(0)), []
    for sigma in sigmas:
        scale = torch.hypot(sigma, torch.ones_like(sigma))
        x = ((points + sigma * eps) / scale).float()
        mine, theirs = (one.predict(x, sigma.item())[1].double() for one in (model, exact))
        found.append((mine - theirs).square().sum(1).mean().sqrt().item())
    return found


def own_teacher(points: Tensor, like: Any) -> FiniteSetTeacher:
    """The exact score of a generator's distribution, up to the noise between points of it.

    Args:
        points: ``(M, 2)`` many points of the generator.
        like: teacher of the same schedule.

    Returns:
        Teacher of the points as a finite set.
    """
    return FiniteSetTeacher(points, schedule=like.schedule)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's weights by name."""
    weights: Mapping[str, Tensor] = module.state_dict()
    return {name: tensor.detach().clone() for name, tensor in weights.items()}
