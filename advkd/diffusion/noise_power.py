"""How much noise a network finds: E|eps|^2 / d by level, from which Analytic-DPM has its optimal variances.

Bao et al. 2022, theorem 1: with Gamma = E|score|^2 / d the mean variance of x0 given the state is (1 - a) / a (1 - (1 - a)
Gamma), and (1 - a) Gamma = E|eps|^2 / d. It is estimated once by evaluations on noised images, and kept beside the teacher's
weights.
"""

import bisect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from ..ops import philox_normal
from ..ops.arguments import whole
from ..runtime.files import read_json, write_json
from ..runtime.progress import progress_bar
from .denoiser import Denoiser
from .schedule import Level

if TYPE_CHECKING:
    from .teacher import Teacher

FILE = "noise_power.json"
"""File beside a teacher's ``model_index.json``."""


@dataclass(frozen=True)
class NoisePower:
    """Estimates at some timesteps, between which the mean square is linear in t.

    Attributes:
        timesteps: ascending, the first 0 and the last T - 1.
        values: E|eps|^2 / d at each.
        images: images that every estimate is a mean over.
        seed: of the noise.

    Raises:
        InputError: timesteps that do not ascend from 0, or values that are not positive and finite.
    """

    timesteps: tuple[int, ...]
    values: tuple[float, ...]
    images: int
    seed: int

    def __post_init__(self) -> None:
        times = self.timesteps
        if not all(type(t) is int for t in times) or times[:1] != (0,) or list(times) != sorted(set(times)):
            raise InputError(f"timesteps must ascend from 0, got {self.timesteps}")
        if len(self.values) != len(self.timesteps) or not all(0 < value < 1e30 for value in self.values):
            raise InputError(f"values must be positive numbers, one per timestep, got {self.values}")

    def at(self, level: Level) -> float:
        """The mean square at a level.

        Args:
            level: within the teacher's timesteps.

        Returns:
            E|eps|^2 / d.
        """
        place = min(bisect.bisect_right(self.timesteps, level.t), len(self.timesteps) - 1)
        if place == 0:
            return self.values[0]
        before, after = self.timesteps[place - 1 : place + 1]
        share = min((level.t - before) / (after - before), 1.0)
        return (1 - share) * self.values[place - 1] + share * self.values[place]

    def write(self, folder: str | Path) -> Path:
        """Write :data:`FILE` beside a teacher.

        Args:
            folder: the teacher's.

        Returns:
            Path of the file.
        """
        path = Path(folder) / FILE
        write_json(path, {name: getattr(self, name) for name in _FIELDS})
        return path

    @classmethod
    def read(cls, folder: str | Path) -> "NoisePower | None":
        """The estimates beside a teacher.

        Args:
            folder: the teacher's.

        Returns:
            Estimates, or None where there are none.

        Raises:
            InputError: a damaged file.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return None
        found = read_json(path, "noise power", _FIELDS)
        try:
            return cls(tuple(found["timesteps"]), tuple(map(float, found["values"])), found["images"], found["seed"])
        except (TypeError, ValueError, InputError) as error:
            raise InputError(f"noise power {path} is damaged ({error}): run 'advkd teacher noise-power' again") from error


_FIELDS = ("timesteps", "values", "images", "seed")


@torch.no_grad()
def estimate_noise_power(
    teacher: "Teacher",
    images: torch.Tensor,
    levels: int = 48,
    num: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> NoisePower:
    """Estimate E|eps|^2 / d of a teacher's network, denser towards the image.

    Args:
        teacher: the teacher; a conditional one is told its null class, or class 0 where it has none.
        images: ``(M, C, S, S)`` float32 in [-1, 1], of the data that it was trained on.
        levels: number of timesteps, at least 2.
        num: images noised at each of them, drawn from ``images`` in turn.
        seed: of the noise, in [0, 2^64).
        batch_size: images that run through the network together.
        progress: show a bar.

    Returns:
        Estimates; their standard error is about sqrt(2 / (num d)) of a value.

    Raises:
        InputError: images of another shape, or numbers out of range.
    """
    if tuple(images.shape[1:]) != teacher.shape or not len(images):
        raise InputError(f"images must be (M, {', '.join(map(str, teacher.shape))}), got {tuple(images.shape)}")
    total = teacher.train_timesteps
    levels, num = whole("levels", levels, 2, total), whole("num", num, 1)
    times = sorted({round((total - 1) * (i / (levels - 1)) ** 2) for i in range(levels)})
    plain = teacher.denoiser
    denoiser = Denoiser(plain.network, plain.schedule, plain.prediction)
    values = []
    with progress_bar(total=len(times) * num, desc="noise power", unit="image", shown=progress) as bar:
        for t in times:
            values.append(_mean_square(teacher, denoiser, images, t, num, seed, batch_size, bar))
    return NoisePower(tuple(times), tuple(values), num, seed)


def _mean_square(teacher, denoiser, images, t, num, seed, batch_size, bar):
    level, total = teacher.schedule.level(float(t)), 0.0
    for first in range(0, num, batch_size):
        indices = torch.arange(first, min(first + batch_size, num), device=teacher.device)
        x0 = images[(indices % len(images)).cpu()].to(teacher.device)
        eps = philox_normal(seed, indices + t * num, teacher.shape, stream="x_T")
        classes = torch.full_like(indices, teacher.null_class or 0) if teacher.num_classes else None
        found = denoiser.predict(level.alpha * x0 + level.noise * eps, level.sigma, classes)[1]
        total += found.double().square().sum().item()
        bar.update(len(indices))
    return total / num / images[0].numel()
