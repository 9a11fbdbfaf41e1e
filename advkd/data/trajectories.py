"""Recorded trajectories of a teacher: their files, and the reader."""

import bisect
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import build_config
from ..errors import InputError
from ..ops import philox_normal
from ..ops.latents import check_latent, project
from ..runtime.files import MANIFEST_LIMIT, damaged, has_own_digest, read_json, read_tensors, require_regular, sha256
from .dataset_info import DatasetInfo, TrajectoryConfig, differences, samples_overlap
from .levels import resolutions

FORMAT = "advkd-trajectories-1"
SHARD_KEYS = ("recipe", "start", "count", "digest")
RECORD_AGAIN = "delete it and run the same 'advkd trajectories' command again"


class Trajectories:
    """Recorded data, memory-mapped; a shard's hash is checked the first time the shard is read.

    ``len(trajectories)`` is the number of samples of all folders.

    Args:
        folders: outputs of ``advkd trajectories``; several make one data set if only ``num``, ``start`` and ``seed`` differ.
        option: name of the folders' option in error messages.

    Attributes:
        info: :class:`DatasetInfo` of the first folder.
        folders: all of them.
        parts: ``seed``, ``start`` and ``num`` of every folder.
        manifests: SHA-256 of every folder's manifest.
        standard_deviations: one per level, of the first folder.

    Raises:
        InputError: no finished data set there, folders that do not fit each other, or (on reading) a shard that is missing,
            truncated or altered.

    Examples:
        >>> z, levels = Trajectories("trajectories").batch(rows=range(64), levels=[12])
    """

    def __init__(self, *folders: str | Path, option: str = "--trajectories"):
        self.folder, self._option = Path(folders[0]), option
        self.folders: list[Path] = []
        self.parts: list[dict[str, int]] = []
        self.manifests: list[str] = []
        self._entries: list[dict[str, Any]] = []
        self._shards: dict[int, dict[str, torch.Tensor]] = {}
        for folder in map(Path, folders):
            self.append(folder)

    def append(self, folder: str | Path) -> None:
        """Add a folder's samples after those that are there.

        Args:
            folder: output of ``advkd trajectories``, which differs from the others in ``num``, ``start`` and ``seed`` alone.

        Raises:
            InputError: no finished data set there, one made otherwise, or one with samples that are there already.
        """
        manifest = _read_manifest(Path(folder), self._option)
        described = manifest["recipe"]
        if not self.parts:
            self.info, self.standard_deviations = DatasetInfo.from_json(described), manifest["standard_deviations"]
        changed = differences(described, self.info.to_json(), ignored=("num", "start", "seed"))
        if changed:
            raise InputError(f"{self._option} {folder} and {self.folder} were made with different {', '.join(changed)}")
        part = {key: described[key] for key in ("seed", "start", "num")}
        if any(samples_overlap(part, other) for other in self.parts):
            raise InputError(f"{self._option} {folder} repeats samples of another folder: record with another --start")
        first = len(self)
        place = {"folder": folder, "described": described}
        self._entries += [{**entry, **place, "start": first + entry["start"]} for entry in manifest["shards"]]
        self.parts.append(part)
        self.folders.append(Path(folder))
        self.manifests.append(sha256(Path(folder) / "manifest.json"))

    def __len__(self) -> int:
        return sum(part["num"] for part in self.parts)

    @property
    def paired(self) -> bool:
        """True if x_0 is a function of the x_T that z comes from, so that pairs (z, x_0) can be learned."""
        return self.info.paired

    def require_paired(self) -> None:
        """Refuse data that pairs cannot be learned from.

        Raises:
            InputError: the solver adds noise or the teacher is told a latent, so that x_0 is no function of x_T.
        """
        if not self.paired and "takes_latent" in self.info.teacher:
            raise InputError(
                "the trajectories are unpaired (a teacher told a latent: x_0 is not a function of z): record another's"
            )
        if not self.paired:
            reason = "a solver that adds noise: x_0 is not a function of z"
            raise InputError(f"the trajectories are unpaired ({reason}): record with --solver ddim")

    def verify(self) -> None:
        """Check every shard's hash now.

        Raises:
            InputError: a shard is missing, truncated or altered; the message names it.
        """
        for shard in range(len(self._entries)):
            self._load(shard)

    def noise(self, rows: Sequence[int]) -> torch.Tensor:
        """x_T of some rows, made anew from its counters.

        Args:
            rows: sample numbers from 0 to ``len(self) - 1``, one or more.

        Returns:
            ``(len(rows), C, S, S)`` float32 on the CPU, standard normal.

        Raises:
            InputError: rows out of range.
        """
        shape = (self.info.image_channels, self.info.image_size, self.info.image_size)
        wanted = torch.tensor(self._checked(rows), dtype=torch.int64, device="cpu")
        noise, first = torch.empty((len(wanted), *shape), dtype=torch.float32, device="cpu"), 0
        for part in self.parts:
            places = ((wanted >= first) & (wanted < first + part["num"])).nonzero().flatten()
            indices = wanted[places] - first + part["start"]
            noise[places] = philox_normal(part["seed"], indices, shape, stream="x_T")
            first += part["num"]
        return noise

    def labels(self, rows: Sequence[int], names: Sequence[str] = ()) -> torch.Tensor | None:
        """Classes of some rows.

        Args:
            rows: sample numbers from 0 to ``len(self) - 1``, one or more.
            names: names of the classes by the numbers that are wanted; none: the teacher's own numbers.

        Returns:
            ``(len(rows),)`` int64 on the CPU; None where samples have no class.

        Raises:
            InputError: rows out of range, a class that is not among ``names``, or a shard that the rows are in is missing,
                truncated or altered.
        """
        if not self.info.classes:
            return None
        labels = self._picked("labels", self._checked(rows))
        return self._renumbered(labels, list(names)) if names else labels

    def _renumbered(self, labels, names):
        """The teacher's numbers of classes as their places in a list of names."""
        known = dict(zip(self.info.class_numbers, self.info.class_names, strict=True))
        places = {number: names.index(name) for number, name in known.items() if name in names}
        if unknown := [known.get(label, label) for label in labels.tolist() if label not in places]:
            raise InputError(f"{self._option}: class {unknown[0]!r} of the samples is not one of {', '.join(names)}")
        return torch.tensor([places[label] for label in labels.tolist()], dtype=torch.int64, device="cpu")

    def images(self, rows: Sequence[int]) -> torch.Tensor:
        """x_0 of some rows.

        Args:
            rows: sample numbers from 0 to ``len(self) - 1``, one or more.

        Returns:
            ``(len(rows), C, S, S)`` float32 on the CPU, in [-1, 1] but for latents.

        Raises:
            InputError: rows out of range, or a shard that they are in is missing, truncated or altered.
        """
        return self._picked(_level(self.info.depth), self._checked(rows)).float()

    def largest(self) -> float:
        """Largest magnitude of a number of x_0, over all samples.

        Raises:
            InputError: a shard is missing, truncated or altered.
        """
        images = (self._load(shard)[_level(self.info.depth)] for shard in range(len(self._entries)))
        return max(float(image.abs().max()) for image in images)

    def batch(
        self, rows: Sequence[int], levels: Sequence[int], latent: tuple[int, bool] | None = None
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Rows of the data set.

        Args:
            rows: sample numbers from 0 to ``len(self) - 1``, one or more.
            levels: level numbers k from 1 to ``info.depth``; the last level is the image x_0, in [-1, 1] but for latents.
            latent: ``(latent_size, detail_noise)`` of the returned z; by default that of the recording.

        Returns:
            ``(z, {k: (len(rows), C, R_k, R_k)})`` float32 on the CPU, levels as recorded (not standardised); z is
            ``(len(rows), numel)``.

        Raises:
            InputError: rows out of range, or a shard that they are in is missing, truncated or altered.
        """
        rows = self._checked(rows)
        recorded = (self.info.latent_size, self.info.detail_noise)
        wanted = None if latent is None or tuple(latent) == recorded else latent
        z = self._picked("z", rows).float() if wanted is None else project(self.noise(rows), *wanted)
        return z, {k: self._picked(_level(k), rows).float() for k in levels}

    def _checked(self, rows):
        """Rows as numbers from 0 to ``len(self) - 1``."""
        try:
            rows = [operator.index(row) for row in rows]
        except TypeError:
            raise InputError(f"rows must be whole numbers, got {rows!r}") from None
        if rows and not 0 <= min(rows) <= max(rows) < len(self):
            raise InputError(f"rows must be from 0 to {len(self) - 1}, got {min(rows)} to {max(rows)}")
        return rows

    def _picked(self, name, rows):
        """A tensor of the shards at some rows."""
        places = map(self._place, rows)
        return torch.stack([self._load(shard)[name][offset] for shard, offset in places])

    def _place(self, row):
        shard = bisect.bisect_right(self._entries, row, key=lambda entry: entry["start"]) - 1
        return shard, row - self._entries[shard]["start"]

    def _load(self, shard):
        if shard not in self._shards:
            entry = self._entries[shard]
            path = entry["folder"] / entry["file"]
            if not path.exists():
                raise InputError(f"shard {path} is missing: run the same 'advkd trajectories' command again")
            require_regular(path, "shard")
            if sha256(path) != entry["sha256"]:
                raise damaged("shard", path, "it is truncated or altered", RECORD_AGAIN)
            tensors, metadata = read_tensors(path, "shard", remedy=RECORD_AGAIN)
            require_layout(path, tensors, self.info, entry["count"])
            if differences(entry["described"], metadata.get("recipe", {})):
                raise InputError(f"shard {path} has another recipe than the manifest beside it: {RECORD_AGAIN}")
            self._shards[shard] = tensors
        return self._shards[shard]


def _read_manifest(folder: Path, option: str) -> dict:
    if not folder.is_dir():
        raise InputError(f"{option} {folder} is not a folder")
    if not (folder / "manifest.json").exists() and any(folder.glob("shard-*.safetensors")):
        raise InputError(f"{option} {folder} is unfinished: run the same 'advkd trajectories' command again")
    keys = ("format", "recipe", "standard_deviations", "shards")
    manifest = read_json(folder / "manifest.json", "manifest", keys, MANIFEST_LIMIT)
    if manifest["format"] != FORMAT:
        raise InputError(f"{folder / 'manifest.json'} is not a manifest of advkd trajectories")
    as_written = "digest" not in manifest or has_own_digest({}, manifest)  # older ones have none
    if not as_written or not _is_consistent(manifest):
        raise InputError(f"{folder / 'manifest.json'} is damaged: run the same 'advkd trajectories' command again")
    return manifest


def _is_consistent(manifest: dict) -> bool:
    """True if a manifest's parts fit each other: shards that cover the samples, one deviation per level.

    It may come from elsewhere: shards are files of its own folder, and nothing is made that is as large as it says.
    """
    try:
        info, deviations = DatasetInfo.from_json(manifest["recipe"]), manifest["standard_deviations"]
        levels = _is_possible(info) and len(deviations) == info.depth == len(info.timesteps) + 1
        finite = all(type(value) in (int, float) and 0 <= value < math.inf for value in deviations)
        return levels and finite and _are_shards(manifest["shards"], info)
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def _is_possible(info: DatasetInfo) -> bool:
    """True if a data set can be as described; may also raise ``TypeError`` or ``ValueError``."""
    build_config(TrajectoryConfig, vars(info.config()), "").validate()
    check_latent(info.image_size, info.latent_size, info.detail_noise)
    shape = (info.image_size, info.image_channels, info.latent_size, info.depth)
    numbers = _are_whole(*info.timesteps, *info.resolutions, *shape)
    known = info.image_channels in (1, 2, 3, 4) and isinstance(info.teacher, dict)
    known = known and isinstance(info.paired, bool) and _are_classes(info.classes, info.class_numbers, info.class_names)
    return numbers and known and info.resolutions == resolutions(info.image_size, info.depth)


def _are_classes(classes: str, numbers: list[int], names: list[str]) -> bool:
    """True if classes have a number and a name each; ``classes`` is empty where there are none."""
    named = _are_whole(*numbers) and all(isinstance(name, str) for name in names)
    return named and len(numbers) == len(names) and bool(numbers) == bool(classes)


def _are_shards(entries: list[dict], info: DatasetInfo) -> bool:
    """True if a manifest's entries are the shards of a data set."""
    starts = range(0, info.num, info.shard_size)
    return len(entries) == len(starts) and all(
        _are_whole(entry["start"], entry["count"])
        and entry["start"] == start
        and entry["file"] == shard_path("", shard).name
        and entry["count"] == info.shard_count(shard)
        and isinstance(entry["sha256"], str)
        for shard, (entry, start) in enumerate(zip(entries, starts))
    )


def _are_whole(*values) -> bool:
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def require_layout(path: Path, tensors: dict[str, torch.Tensor], info: DatasetInfo, count: int) -> None:
    """Refuse a shard of ``count`` samples that holds other tensors than the data set's description says."""
    if {name: (t.dtype, t.shape) for name, t in tensors.items()} != info.layout(count):
        raise damaged("shard", path, ValueError("it holds other tensors than its recipe says"), RECORD_AGAIN)


def _level(k: int) -> str:
    """Name of a level in a shard."""
    return f"level_{k:02d}"


def shard_path(folder: str | Path, shard: int) -> Path:
    """Path of a shard in a data set's folder."""
    return Path(folder) / f"shard-{shard:05d}.safetensors"
