"""How much noise a network finds: E|eps|^2 / d by level, from which Analytic-DPM has its optimal variances.

Bao et al. 2022, theorem 1: with Gamma = E|score|^2 / d the mean variance of x0 given the state is (1 - a) / a (1 - (1 - a)
Gamma), and (1 - a) Gamma = E|eps|^2 / d. It is estimated once (:mod:`advkd.training.noise_power`), and kept beside the
teacher's weights.
"""

import bisect
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..runtime.files import read_json, write_json
from .schedule import Level

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
    def read(cls, folder: str | Path, timesteps: int) -> "NoisePower | None":
        """The estimates beside a teacher.

        Args:
            folder: the teacher's.
            timesteps: T of the teacher.

        Returns:
            Estimates, or None where there are none.

        Raises:
            InputError: a damaged file, or one of another schedule.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return None
        found = read_json(path, "noise power", _FIELDS)
        try:
            kept = cls(tuple(found["timesteps"]), tuple(map(float, found["values"])), found["images"], found["seed"])
            if kept.timesteps[-1] != timesteps - 1:
                raise InputError(f"it ends at timestep {kept.timesteps[-1]}, the teacher at {timesteps - 1}")
            return kept
        except (TypeError, ValueError, InputError) as error:
            raise InputError(f"noise power {path} is damaged ({error}): run 'advkd teacher noise-power' again") from error


_FIELDS = ("timesteps", "values", "images", "seed")
