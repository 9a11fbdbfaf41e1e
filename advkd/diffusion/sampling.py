"""Runs of solvers on a diffusion model: what teachers of every kind have in common."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..errors import InputError
from ..ops import philox_normal
from ..ops.arguments import whole
from .guidance import NoisyClassifier, classes_of, guided
from .loop import SamplingLoop
from .low_images import LowImages
from .program import Evaluation
from .schedule import Level, Schedule
from .solvers import METHODS, Solver, as_solver


class DiffusionModel:
    """A noise schedule, a network, and the solvers' runs through both.

    Args:
        schedule: the noise schedule.
        shape: of a sample, ``(C, H, W)`` for images.
        dtype: of states: float32, or float64 for exact teachers.

    Attributes:
        schedule: the noise schedule.
        prediction: meaning of the network's output, one of :data:`~advkd.diffusion.prediction.PREDICTIONS`.
        clip: x0 is clamped to [-clip, clip] in every step; infinity clamps nothing.
        name: the model's name in errors and manifests.
        class_names: names of the classes; empty for an unconditional model.
        num_classes: number of classes; 0 for an unconditional model.
        null_class: label that stands for no class, or None.
        most_guidance: largest guidance weight that the network itself takes; 0: guidance is made of two evaluations.
        latent: numbers of the latent that the network is given in every evaluation; 0: none.
        low: low images that a super-resolution network is told; None: none.
        variance_type: variance of the ancestral step, one of :data:`~advkd.diffusion.coefficients.VARIANCES`.
    """

    prediction: str
    clip: float
    name: str = "model"
    class_names: tuple[str, ...] = ()
    num_classes: int = 0
    null_class: int | None = None
    most_guidance: float = 0.0
    latent: int = 0
    low: LowImages | None = None
    variance_type: str = "fixed_small"

    def __init__(self, schedule: Schedule, shape: tuple[int, ...], dtype: torch.dtype = torch.float32):
        self.schedule, self.shape, self.state_dtype = schedule, shape, dtype

    @property
    def device(self) -> torch.device:
        """Device of the states."""
        return torch.device("cpu")

    @property
    def alpha_bars(self) -> torch.Tensor:
        """alpha_bar of every training timestep, ``(T,)`` float64."""
        return self.schedule.alpha_bars

    @property
    def train_timesteps(self) -> int:
        """T, the number of timesteps of the schedule."""
        return len(self.schedule)

    def _network(self, compiled: bool = False) -> Any:
        """Function of the state, its level ``(t, alpha, noise)`` and classes that gives the network's output."""
        raise NotImplementedError

    def noise(self, n: int, seed: int = 0, start: int = 0) -> torch.Tensor:
        """x_T of samples ``start .. start + n - 1``, a function of (seed, index) alone.

        Args:
            n: number of samples.
            seed: key of the noise, in [0, 2^64).
            start: index of the first sample.

        Returns:
            ``(n, ...)`` standard normal numbers on the model's device, float32 (float64 for exact teachers, of the same
            numbers).
        """
        start = whole("start", start)
        indices = torch.arange(start, start + whole("n", n), device=self.device)
        return philox_normal(seed, indices, self.shape, stream="x_T").to(self.state_dtype)

    def timesteps(self, solver: str | Solver = "ddim", steps: int | None = None) -> list[int | float]:
        """Timesteps at which the steps of a run begin, descending.

        Args:
            solver: a name of :data:`~advkd.diffusion.solvers.METHODS`, or a :class:`~advkd.diffusion.solvers.Solver`.
            steps: number of steps; None: all T for ``ddpm``, 50 for ``ddim`` and 10 for the others (T, if that is fewer).

        Returns:
            ``steps`` timesteps in [0, T): whole numbers, but for spacings by noise level.

        Raises:
            InputError: another solver, or a number of steps that it cannot take.
        """
        solver = as_solver(solver)
        levels = solver.levels(self.schedule, self._steps(solver, steps))
        return [int(level.t) if level.t == int(level.t) else level.t for level in levels]

    def program(self, solver: str | Solver = "ddim", steps: int | None = None) -> list[Evaluation]:
        """The run of a solver on this model, as network evaluations and fused steps.

        Args:
            solver: a name, or a :class:`~advkd.diffusion.solvers.Solver`.
            steps: number of steps; see :meth:`timesteps`.

        Returns:
            Evaluations in their order.

        Raises:
            InputError: a solver that cannot take this model, or a number of steps that it cannot take; the message names the
                model.
        """
        solver = as_solver(solver)
        try:
            return self._program(solver, self._steps(solver, steps))
        except InputError as error:
            raise InputError(f"teacher {self.name}: {error}") from error

    def _program(self, solver, steps):
        return solver.program(self.schedule, steps, self.prediction, self.clip, noise_power=self.noise_power)

    def noise_power(self, level: Level) -> float:
        """E|eps|^2 / d of the noise that the network finds at a level: Analytic-DPM's variances depend on it.

        Args:
            level: level of the states.

        Returns:
            Mean over data, noise and dimensions.
        """
        raise NotImplementedError

    def _steps(self, solver, steps):
        if steps is not None:
            steps = whole("steps", steps, 1)
            if steps == 1 < self.train_timesteps and solver.chosen_spacing == "leading":
                # The run would give its start noise back.
                raise InputError("steps must be at least 2 with spacing leading, whose last one begins at t = 0: take trailing")
            return steps
        if solver.alpha_bars:
            return len(solver.alpha_bars)
        total, least = self.train_timesteps, METHODS[solver.name].least
        if total < least:
            raise InputError(
                f"steps: the default is the schedule's {total} timesteps, and solver {solver.name} takes at least {least}: "
                "give a solver of lower order"
            )
        return min({"ddpm": total, "ddim": 50}.get(solver.name, 10), total)

    @torch.no_grad()
    def path(
        self,
        x_T: torch.Tensor,
        solver: str | Solver = "ddim",
        steps: int | None = None,
        seed: int = 0,
        start: int = 0,
        *,
        labels: torch.Tensor | Sequence[int] | int | None = None,
        guidance: float = 0.0,
        classifier: NoisyClassifier | None = None,
    ) -> Iterator[tuple[int | float, torch.Tensor]]:
        """Walk a run step by step; the last state is x_0, not clamped to [-1, 1].

        Args:
            x_T: ``(N, ...)`` start states.
            solver: a name, or a :class:`~advkd.diffusion.solvers.Solver`.
            steps: number of steps; see :meth:`timesteps`.
            seed: key of the step noise, in [0, 2^64); that noise is a function of seed, index and pass.
            start: index of the first sample, for the step noise.
            labels: as for :meth:`sample`.
            guidance: as for :meth:`sample`.
            classifier: as for :meth:`sample`.

        Yields:
            ``(t, x)`` after every step, x being the state after the step taken at t: ``(N, ...)``, a copy on the model's
            device. No gradient flows to ``x_T``.

        Raises:
            InputError: at the first step, an ``x_T`` of another shape, or a solver, a number of steps or classes that cannot
                be.
        """
        network = guided(self, self._network(), len(x_T), labels, guidance, classifier)
        program = self.program(solver, steps)
        # A loop of its own: several paths may be walked at the same time.
        shape, dtype = (len(x_T), *self.shape), self.state_dtype
        loop = SamplingLoop(network, shape, program, seed, self.device, dtype=dtype, latent=self.latent)
        loop.start(x_T, start)
        for t in self.timesteps(solver, steps):
            loop.step()
            yield t, loop.x.clone(memory_format=torch.contiguous_format)

    def check_run(
        self,
        n: int,
        solver: str | Solver = "ddim",
        steps: int | None = None,
        *,
        labels: torch.Tensor | Sequence[int] | int | None = None,
        guidance: float = 0.0,
        classifier: NoisyClassifier | None = None,
    ) -> None:
        """Refuse arguments of :meth:`sample` with which nothing can be drawn, without drawing.

        Args:
            n: number of samples.
            solver: a name, or a :class:`~advkd.diffusion.solvers.Solver`.
            steps: number of steps; see :meth:`timesteps`.
            labels: as for :meth:`sample`.
            guidance: as for :meth:`sample`.
            classifier: as for :meth:`sample`.

        Raises:
            InputError: a solver, a number of steps or classes that cannot be.
        """
        self.program(solver, steps)
        classes_of(self, n, labels, guidance, classifier)

    def sample(
        self,
        n: int,
        seed: int = 0,
        solver: str | Solver = "ddim",
        steps: int | None = None,
        start: int = 0,
        *,
        labels: torch.Tensor | Sequence[int] | int | None = None,
        guidance: float = 0.0,
        classifier: NoisyClassifier | None = None,
    ) -> torch.Tensor:
        """Samples ``start .. start + n - 1``, the ends of their paths.

        Args:
            n: number of samples; they run through the network as one batch.
            seed: key of the start noise and of the step noise, in [0, 2^64).
            solver: a name, or a :class:`~advkd.diffusion.solvers.Solver`.
            steps: number of steps; see :meth:`timesteps`.
            start: index of the first sample.
            labels: ``(n,)`` classes in [0, num_classes), or one for all; None: no class.
            guidance: w >= 0, the weight of guidance towards the class. Without ``classifier`` it is classifier-free: the noise
                is (1 + w) eps(x, class) - w eps(x), so that 0 is the conditional model; diffusers' ``guidance_scale`` is 1 + w.
                With one, eps(x) - w sqrt(1 - a) grad log p(class | x).
            classifier: a classifier of noisy images, for classifier guidance.

        Returns:
            ``(n, ...)`` samples on the model's device, not clamped.

        Raises:
            InputError: a solver, a number of steps, a seed or classes that cannot be.
        """
        path = self.path(
            self.noise(n, seed, start), solver, steps, seed, start, labels=labels, guidance=guidance, classifier=classifier
        )
        *_, (_, x_0) = path
        return x_0
