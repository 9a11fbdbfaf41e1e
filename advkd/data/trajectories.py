"""Recorded trajectories of a teacher: their files, and the reader."""

import bisect
import math
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
        """
        shape, pieces = (self.info.image_channels, self.info.image_size, self.info.image_size), []
        for row in rows:
            part = 0
            while row >= self.parts[part]["num"]:
                row, part = row - self.parts[part]["num"], part + 1
            indices = torch.tensor([self.parts[part]["start"] + row], dtype=torch.int64, device="cpu")
            pieces.append(philox_normal(self.parts[part]["seed"], indices, shape, stream="x_T"))
        return torch.cat(pieces)

    def batch(
        self, rows: Sequence[int], levels: Sequence[int], latent: tuple[int, bool] | None = None
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Rows of the data set.

        Args:
            rows: sample numbers from 0 to ``len(self) - 1``, one or more.
            levels: level numbers k from 1 to ``info.depth``; the last level is the image x_0, in [-1, 1].
            latent: ``(latent_size, detail_noise)`` of the returned z; by default that of the recording.

        Returns:
            ``(z, {k: (len(rows), C, R_k, R_k)})`` float32 on the CPU, levels as recorded (not standardised); z is
            ``(len(rows), numel)``.

        Raises:
            InputError: a shard that these rows are in is missing, truncated or altered.
        """
        recorded = (self.info.latent_size, self.info.detail_noise)
        wanted = None if latent is None or tuple(latent) == recorded else latent
        names = [*(["z"] if wanted is None else []), *(f"level_{k:02d}" for k in levels)]
        places = [self._place(row) for row in rows]
        picked = [torch.stack([self._load(shard)[name][offset] for shard, offset in places]).float() for name in names]
        z = picked.pop(0) if wanted is None else project(self.noise(rows), *wanted)
        return z, dict(zip(levels, picked, strict=True))

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
            wanted = {name: (torch.float16, shape) for name, shape in self.info.shapes(entry["count"]).items()}
            if {name: (t.dtype, t.shape) for name, t in tensors.items()} != wanted:
                raise damaged("shard", path, "it holds other tensors than its recipe says", RECORD_AGAIN)
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
    return numbers and known and isinstance(info.paired, bool) and info.resolutions == resolutions(info.image_size, info.depth)


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


def shard_path(folder: str | Path, shard: int) -> Path:
    """Path of a shard in a data set's folder."""
    return Path(folder) / f"shard-{shard:05d}.safetensors"
