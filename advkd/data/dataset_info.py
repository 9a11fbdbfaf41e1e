"""Description of a data set of trajectories: the configuration of a recording, and what its contents depend on."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..ops.arguments import finite
from ..ops.latents import latent_numel

SPACINGS = ("leading", "trailing", "linspace")
"""Spacings whose timesteps are whole, which levels of a trajectory can be told by."""

LABELLED = ("classes", "guidance", "class_numbers", "class_names")
"""Fields of a description that its JSON has only where samples have classes: others keep the bytes that they had before."""


@dataclass
class TrajectoryConfig:
    """Configuration of a recording by ``advkd trajectories``.

    Attributes:
        solver: name of the teacher's solver; one that adds no noise is paired: x_0 is a function of z's x_T.
        spacing: of its timesteps: leading, trailing or linspace (empty: the solver's own).
        steps: its steps (0: 50 for ddim, all for ddpm, 10 for the others).
        num: number of trajectories.
        start: index of the first one among the seed's samples.
        seed: of the noise.
        depth: submodules of the student.
        latent_size: m of the latent's blocks (0: all of x_T up to 32 pixels, 4 above).
        detail_noise: store the Haar pyramid of x_T instead of blocks.
        batch_size: samples that run through the teacher at once; the last batch is padded to it.
        shard_size: samples per shard, a multiple of ``batch_size``.
        classes: names of the teacher's classes, separated by commas, which samples take in turn by their index; ``all``: every
            class in turn (empty: no class, which a conditional teacher needs its null class for).
        guidance: w >= 0, the weight of classifier-free guidance towards the class; 0 is the conditional model.
    """

    solver: str = "ddim"
    spacing: str = ""
    steps: int = 0
    num: int = 2048
    start: int = 0
    seed: int = 0
    depth: int = 12
    latent_size: int = 0
    detail_noise: bool = False
    batch_size: int = 32
    shard_size: int = 128
    classes: str = ""
    guidance: float = 0.0

    def validate(self) -> None:
        """Raise :class:`InputError` that names the field that cannot work."""
        for name in ("num", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shard_size % self.batch_size:
            raise InputError(f"shard_size must be a multiple of batch_size {self.batch_size}, got {self.shard_size}")
        if self.spacing not in ("", *SPACINGS):
            raise InputError(f"spacing must be one of {', '.join(SPACINGS)}, whole timesteps, got {self.spacing!r}")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must be in [0, 2^64), got {self.seed}")
        if not 0 <= self.start < 2**62:
            raise InputError(f"start must be in [0, 2^62), got {self.start}")
        if not isinstance(self.classes, str):
            raise InputError(f"classes must be a text, names separated by commas, got {self.classes!r}")
        if finite("guidance", self.guidance) < 0:
            raise InputError(f"guidance must be at least 0 (the conditional model), got {self.guidance}")
        if self.guidance and not self.classes:
            raise InputError(f"guidance {self.guidance} needs classes: name what it is towards by --classes")


@dataclass(frozen=True)
class DatasetInfo:
    """Everything that the contents of a data set's shards depend on.

    Attributes:
        solver: name of the teacher's solver; this and the next twelve are the fields of :class:`TrajectoryConfig`.
        spacing: of its timesteps; empty for the solver's own.
        steps: its steps, the default filled in (never 0).
        num: number of trajectories.
        start: index of the first one among the seed's samples.
        seed: key of the noise.
        depth: submodules of the student, and levels of a trajectory.
        latent_size: m of the latent's blocks, the default filled in (never 0).
        detail_noise: True if z is the Haar pyramid of x_T, False for blocks.
        batch_size: samples that ran through the teacher at once.
        shard_size: samples per shard.
        classes: names of the classes, separated by commas, or ``all``; empty where samples have none.
        guidance: weight of classifier-free guidance.
        class_numbers: the classes' numbers: sample i of the seed has class ``class_numbers[i mod K]``, K being their number.
        class_names: the classes' names, in the same order.
        teacher: :meth:`Teacher.identity`.
        image_channels: channels C of the images, or of a latent teacher's latents.
        image_size: side S of the images in pixels, or of the latents, 4 * 2^k.
        resolutions: R_k of every level.
        timesteps: the teacher's timestep of every level but the last, which is x_0.
        paired: True if x_0 is a function of z's x_T.
    """

    solver: str
    spacing: str
    steps: int
    num: int
    start: int
    seed: int
    depth: int
    latent_size: int
    detail_noise: bool
    batch_size: int
    shard_size: int
    classes: str
    guidance: float
    class_numbers: list[int]
    class_names: list[str]
    teacher: dict
    image_channels: int
    image_size: int
    resolutions: list[int]
    timesteps: list[int]
    paired: bool

    @classmethod
    def from_json(cls, values: dict) -> "DatasetInfo":
        """The description in a manifest or a shard.

        Args:
            values: what :meth:`to_json` gave, with further keys or without; the values' types are not checked.

        Returns:
            A description that shares lists and the dict ``teacher`` with ``values``.

        Raises:
            KeyError: one of the description's values is missing.
            TypeError: ``values`` are no dict.
        """
        solver = values["sampler"]
        values = {"solver": solver, "spacing": "", "paired": solver == "ddim"} | values
        values = {"classes": "", "guidance": 0.0, "class_numbers": [], "class_names": []} | values
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})

    def to_json(self) -> dict:
        """The description as manifests and shards hold it.

        Returns:
            JSON values by the names of the fields; lists and the dict ``teacher`` are the description's own, not copies.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # Files name the solver as they did when there were two, of which DDIM is paired.
        solver, spacing, paired = (values.pop(name) for name in ("solver", "spacing", "paired"))
        labelled = {name: values.pop(name) for name in LABELLED}
        added = {"spacing": spacing} if spacing else {}
        added |= {"paired": paired} if solver not in ("ddim", "ddpm") or paired != (solver == "ddim") else {}
        added |= labelled if self.classes else {}
        return {"sampler": solver, **values, **added}

    def config(self, **changes: Any) -> TrajectoryConfig:
        """The configuration of a recording like this one, with some fields changed.

        Args:
            changes: fields of :class:`TrajectoryConfig` and their values.

        Returns:
            A new configuration, which is not validated.

        Raises:
            TypeError: a name in ``changes`` is no field.
        """
        names = [field.name for field in dataclasses.fields(TrajectoryConfig)]
        return TrajectoryConfig(**{**{name: getattr(self, name) for name in names}, **changes})

    @property
    def student_classes(self) -> tuple[str, ...]:
        """Names of the classes, each once: those of a student that is trained on the data; empty where samples have none."""
        return tuple(dict.fromkeys(self.class_names))

    @property
    def latents(self) -> bool:
        """True if the images are latents of the teacher's autoencoder, which are not in [-1, 1]."""
        return "autoencoder_sha256" in self.teacher

    @property
    def num_shards(self) -> int:
        """Number of shards; the last one may hold fewer samples."""
        return -(-self.num // self.shard_size)

    def shard_count(self, shard: int) -> int:
        """Number of samples in a shard.

        Args:
            shard: the shard's number, from 0 to ``num_shards - 1``.

        Returns:
            ``shard_size``, or the number that is left for the last shard.
        """
        return min(self.shard_size, self.num - shard * self.shard_size)

    def layout(self, count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor of a shard, by name.

        Args:
            count: number of samples in the shard.

        Returns:
            float16 ``(count, numel)`` for ``z`` and ``(count, C, R_k, R_k)`` for level k, ``level_01`` to ``level_{depth}``;
            int64 ``(count,)`` for ``labels``, where samples have classes.
        """
        channels = self.image_channels
        latent = latent_numel(channels, self.image_size, self.latent_size, self.detail_noise)
        levels = {f"level_{k:02d}": (count, channels, side, side) for k, side in enumerate(self.resolutions, 1)}
        labels = {"labels": (torch.int64, (count,))} if self.classes else {}
        return {name: (torch.float16, shape) for name, shape in {"z": (count, latent), **levels}.items()} | labels


def differences(described: dict, other: dict, ignored: tuple[str, ...] = ()) -> list[str]:
    """Sorted keys in which the descriptions of two data sets, as JSON, differ; a teacher's name is not one."""
    differ = {key for key in described | other if key not in ignored and described.get(key) != other.get(key)}
    theirs = other.get("teacher")
    if "teacher" in differ and isinstance(theirs, dict) and same_teacher(described["teacher"], theirs):
        differ.remove("teacher")
    return sorted(differ)


def samples_overlap(a: dict, b: dict) -> bool:
    """True if two parts (seed, start, num) share a sample."""
    return a["seed"] == b["seed"] and a["start"] < b["start"] + b["num"] and b["start"] < a["start"] + a["num"]


def same_teacher(a: dict, b: dict) -> bool:
    """True if two :meth:`Teacher.identity` are of one teacher, whatever it was called."""
    return {**a, "name": None} == {**b, "name": None}
