"""Students that denoise: a network of the teacher's kind with v prediction, and the few steps in which it draws."""

import copy
import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import build_config
from ..errors import InputError
from ..models.denoiser import with_condition
from ..models.saving import SAMPLER, TRAINING
from ..models.student import Student
from ..ops.arguments import whole
from ..runtime.devices import seeded_weights
from ..runtime.files import read_json, write_json
from ..runtime.hub import resolve
from .guidance import is_packed
from .latent import around
from .loading import EMBEDDED
from .networks import GROUPS, build_unet
from .saving import INDEX, write_pipeline
from .solvers import Solver
from .teacher import Teacher


@dataclass(frozen=True)
class Sampler:
    """How a student draws.

    Attributes:
        solver: its solver, with the spacing or the levels at which the network was trained.
        steps: number of its steps.
        guidance: weight w of guidance towards classes, where none is asked for.
    """

    solver: Solver = Solver("ddim", spacing="trailing")
    steps: int = 1
    guidance: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON values from which :meth:`from_json` makes an equal sampler: steps, guidance and what is set of the solver."""
        plain = dataclasses.asdict(Solver(self.solver.name))
        numbers = {key: value for key, value in dataclasses.asdict(self.solver).items() if value != plain[key]}
        return {"solver": self.solver.name, **numbers, "steps": self.steps, "guidance": self.guidance}

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "Sampler":
        """A sampler from JSON values.

        Args:
            values: those of :meth:`to_json`.
            where: name of their file, for errors.

        Returns:
            Sampler.

        Raises:
            InputError: an unknown key, or a value that cannot be.
        """
        own = {key: values[key] for key in ("steps", "guidance") if key in values}
        numbers = {key: value for key, value in values.items() if key not in (*own, "solver")}
        if "name" in numbers:
            raise InputError(f"{where}: unknown key 'name' (a solver's is called 'solver')")
        solver = build_config(Solver, {**numbers, "name": values.get("solver", Solver.name)}, where)
        sampler = build_config(cls, {**own, "solver": solver}, where)
        if sampler.steps < 1 or not 0 <= sampler.guidance < math.inf:
            raise InputError(f"{where}: steps must be at least 1 and guidance not negative, got {values}")
        return sampler


class DenoiserStudent:
    """A diffusion model of few steps.

    Its folder is a diffusers pipeline (one without classes whose sampler is DDIM at the trailing spacing runs as
    ``DDIMPipeline`` there, one of latents as ``LDMPipeline``) with ``sampler.json`` beside, so
    that :meth:`advkd.Teacher.from_pretrained` loads it, too: a student can be the teacher of the next one.

    Args:
        model: the diffusion model, of v prediction.
        sampler: how it draws.
        training_record: record of its training, or None.

    Attributes:
        trained_as: meaning of the output that the network was trained to give; another one than v prediction where training is
            to begin with a teacher's weights.

    Raises:
        InputError: a model of another prediction, or a sampler that it cannot run.

    Examples:
        >>> DenoiserStudent.from_pretrained("pd/4").sample(16, seed=1)  # four network evaluations
    """

    def __init__(self, model: Teacher, sampler: Sampler, training_record: dict[str, Any] | None = None):
        if model.prediction != "v_prediction":
            raise InputError(
                f"a denoiser student needs v prediction, {model.name} has {model.prediction}: run 'advkd distill reparametrize'"
            )
        if sampler.guidance > model.most_guidance:
            limit = f"must be at most the network's {model.most_guidance:g}"
            raise InputError(f"{model.name}: the sampler's guidance {limit}, got {sampler.guidance}")
        model.program(sampler.solver, sampler.steps)
        self.model, self.sampler, self.training_record = model, sampler, training_record
        self.trained_as = model.prediction

    @classmethod
    def from_teacher(
        cls, teacher: Teacher, channels: tuple[int, ...] = (), sampler: Sampler | None = None
    ) -> "DenoiserStudent":
        """A student to be trained, with a copy of a teacher's weights; of fresh ones where ``channels`` are given.

        Args:
            teacher: the teacher; its schedule, clipping and classes are the student's.
            channels: from the highest to the lowest resolution (empty: the teacher's network).
            sampler: None: DDIM with ten steps of the trailing spacing.

        Returns:
            Student on the teacher's device, float32. A teacher of another prediction gives weights to begin from only: until it
            is trained, their output is not v.

        Raises:
            InputError: channels that the images cannot have.
        """
        from diffusers import DDIMScheduler

        unet, config = teacher.unet, dict(teacher.scheduler.config)
        if channels:
            if min(channels) < 2 * GROUPS:
                # Normalised alone, a channel loses the timestep's embedding, which is added to it.
                raise InputError(f"channels must be at least {2 * GROUPS} for the network to hear its timestep, got {channels}")
            classes = teacher.num_classes + (teacher.null_class is not None)
            network = build_unet(teacher.shape[-1], teacher.shape[0], channels, classes).to(teacher.device)
        else:
            network = copy.deepcopy(unet).float().requires_grad_(True)
        # As the solvers do: the last step ends at the image itself, not at the first timestep.
        changes = {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}
        scheduler = DDIMScheduler.from_config(config, prediction_type="v_prediction", **changes)
        model = around(network, teacher, scheduler, "student")
        student = cls(model, sampler or Sampler(steps=min(10, len(teacher.schedule))))
        student.trained_as = student.trained_as if channels else teacher.prediction
        return student

    def told_more(self, seed: int, guidance: float = 0.0, latent: int = 0) -> "DenoiserStudent":
        """A copy whose network takes a guidance weight or a latent, too, which at first changes nothing.

        Args:
            seed: of the weights of its embedding.
            guidance: largest weight w (0: none).
            latent: numbers of the latent u (0: none).

        Returns:
            Student with the record of this one's training. With a latent it is drawn as it is trained: x0 is not clamped on the
            way, and ancestral steps have the posterior's variance.

        Raises:
            InputError: this one takes a weight or a latent already.
        """
        if is_packed(self.model):
            raise InputError(
                f"{self.model.name} takes a guidance weight or a latent already: begin with one that takes neither"
            )
        with seeded_weights(seed):
            network = with_condition(self.model.unet, guidance, latent).float().requires_grad_(True)
        scheduler: Any = self.model.scheduler
        if latent:
            config = {key: value for key, value in scheduler.config.items() if key != "variance_type"}
            scheduler = type(scheduler).from_config(config, clip_sample=False)
        student = DenoiserStudent(around(network, self.model, scheduler, "student"), self.sampler, self.training_record)
        student.trained_as = self.trained_as
        return student

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "DenoiserStudent":
        """Load a student.

        Args:
            source: a folder of ``advkd distill``, or a hub id (owner/name).
            device: where the network is put.
            dtype: of the network's weights and input; states stay float32.

        Returns:
            Student in eval mode.

        Raises:
            InputError: missing or damaged files, or a folder without ``sampler.json``: a generator's or a teacher's.
        """
        folder = resolve(source, EMBEDDED, "student", ["*.json", "*/*.json"])
        if not os.path.lexists(folder / SAMPLER):
            why = (
                "is a generator: advkd.load_student loads either kind"
                if _is_generator(source, folder)
                else (f"has no {SAMPLER}: it is a teacher, or no finished student")
            )
            raise InputError(f"student {source} {why}")
        if not os.path.lexists(folder / INDEX):
            raise InputError(f"student {source} has no {INDEX}: its saving was cut off, save it again")
        values, record = read_json(folder / SAMPLER, "sampler", ("solver", "steps", "guidance")), None
        sampler = Sampler.from_json(values, str(folder / SAMPLER))
        if os.path.lexists(folder / TRAINING):
            record = read_json(folder / TRAINING, "training record", Student.training_keys)
            if not Student.is_record(record):
                raise InputError(f"training record {folder / TRAINING} is damaged: restore or fetch a copy of it")
        return cls(Teacher.from_pretrained(source, device, dtype), sampler, record)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the student; what the folder had of an earlier one goes.

        Args:
            folder: made where it is missing.

        Raises:
            InputError: the folder cannot be written or holds a generator, or the network has not been trained to give v.
        """
        from diffusers import DDIMPipeline

        self.require_v("saving")
        folder = Path(folder)
        if os.path.lexists(folder / "config.json"):
            raise InputError(f"{folder} holds a student that draws in one pass: name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        extra, model = (SAMPLER, TRAINING), self.model
        parts = (model.unet, model.scheduler, model.classes, torch.float32, model.autoencoder)
        write_pipeline(folder, DDIMPipeline, *parts, extra=extra, write_extra=self._write_records)

    def require_v(self, who: str) -> None:
        """Refuse a network whose weights were trained to give another output.

        Args:
            who: name of the method, or of what cannot be done, for the error.

        Raises:
            InputError: ``trained_as`` is another prediction than v.
        """
        if self.trained_as != "v_prediction":
            raise InputError(
                f"{who} begins with a network that gives v, and this one's weights are of {self.trained_as}: "
                "run 'advkd distill reparametrize' first and name its result by --init"
            )

    def _write_records(self, folder):
        write_json(folder / SAMPLER, self.sampler.to_json())
        if self.training_record is not None:
            write_json(folder / TRAINING, self.training_record)

    @property
    def evaluations(self) -> int:
        """Network evaluations of an image."""
        return self.sampler.solver.evaluations(self.sampler.steps)

    @property
    def image_size(self) -> int:
        """Side of the (square) images in pixels."""
        return self.model.image_size

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.model.image_channels

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return self.model.device

    def num_parameters(self) -> int:
        """Number of parameters."""
        return self.model.num_parameters()

    def identity(self) -> dict[str, Any]:
        """JSON values that its images depend on: the network's identity and the sampler."""
        return {**self.model.identity(self.sampler.solver), "sampler": self.sampler.to_json()}

    def latents(self, n: int, seed: int = 0, start: int = 0) -> torch.Tensor:
        """Start noise of images ``start .. start + n - 1``, the teacher's x_T of the same seed and index.

        Args:
            n: number of images.
            seed: key of the noise, in [0, 2^64).
            start: index of the first image.

        Returns:
            ``(n, C, H, W)`` float32, standard normal, on the network's device.
        """
        return self.model.noise(n, seed, start)

    def sample(
        self,
        n: int,
        seed: int = 0,
        steps: int | None = None,
        start: int = 0,
        *,
        labels: torch.Tensor | Sequence[int] | int | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Images ``start .. start + n - 1``.

        Args:
            n: number of images; they run through the network as one batch.
            seed: key of the start noise and of the step noise, in [0, 2^64).
            steps: number of steps (None: the sampler's), one that divides the number of its levels where these are given one by
                one.
            start: index of the first image.
            labels: ``(n,)`` classes, or one for all; None: no class.
            guidance: weight w of a network that takes it; of another one, of classifier-free guidance. None: the sampler's, or
                0 without classes.

        Returns:
            ``(n, C, H, W)`` float32 in [-1, 1] on the network's device. Order of differentiability 0.

        Raises:
            InputError: a number of images or steps, a seed, classes or a weight that cannot be.
        """
        x_T = self.latents(whole("n", n, least=1), seed, start)
        return self.draw(x_T, steps, seed, start, labels=labels, guidance=guidance)

    def draw(
        self,
        x_T: torch.Tensor,
        steps: int | None = None,
        seed: int = 0,
        start: int = 0,
        *,
        labels: torch.Tensor | Sequence[int] | int | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Images of start noise that is given.

        Args:
            x_T: ``(N, C, H, W)`` start noise, as :meth:`latents` gives it.
            steps: as for :meth:`sample`.
            seed: key of the step noise, of samplers that add any.
            start: index of the first image, for the step noise.
            labels: as for :meth:`sample`.
            guidance: as for :meth:`sample`.

        Returns:
            ``(N, C, H, W)`` float32 in [-1, 1] on the network's device.

        Raises:
            InputError: start noise of another shape, or a number of steps, a seed, classes or a weight that cannot be.
        """
        steps = self.sampler.steps if steps is None else whole("steps", steps, least=1)
        condition = (labels, self.weight(labels, guidance), None)
        return self.model.draw(x_T, self.sampler.solver, steps, seed, start, condition)

    def weight(self, labels: Any, guidance: float | None = None) -> float:
        """Weight of guidance of a call.

        Args:
            labels: its classes, or None.
            guidance: its weight, or None.

        Returns:
            ``guidance``; where that is None, the sampler's, which is towards classes, or 0 without any.
        """
        if guidance is not None:
            return guidance
        return 0.0 if labels is None else self.sampler.guidance


def _is_generator(source, folder):
    """True for a :class:`Student`, or a pipeline around one."""
    if str(source) in Student.embedded or (folder / "student").is_dir():
        return True
    path = folder / "config.json"
    return path.is_file() and read_json(path, "student configuration").get("_class_name") == "Student"
