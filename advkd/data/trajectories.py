"""Recorded trajectories of a teacher: their configuration, their files, and the reader."""

import bisect
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import build_config
from ..errors import InputError
from ..ops import philox_normal
from ..ops.latents import check_latent, latent_numel, project
from ..runtime.files import MANIFEST_LIMIT, damaged, has_own_digest, read_json, read_tensors, require_regular, sha256
from .levels import resolutions

FORMAT = "advkd-trajectories-1"
SHARD_KEYS = ("recipe", "start", "count", "digest")
SHAPE = ("image_size", "image_channels", "latent_size", "depth")
RECORD_AGAIN = "delete it and run the same 'advkd trajectories' command again"


@dataclass
class TrajectoryConfig:
    """What ``advkd trajectories`` records.

    Attributes:
        sampler: ``ddim`` (paired: x_0 is a function of z's x_T) or ``ddpm`` (unpaired).
        steps: sampler steps (0: 50 for DDIM, all for DDPM).
        num: number of trajectories.
        start: index of the first one among the seed's samples.
        seed: of the noise.
        depth: submodules of the student.
        latent_size: m of the latent's blocks (0: all of x_T up to 32 pixels, 4 above).
        detail_noise: store the Haar pyramid of x_T instead of blocks.
        batch_size: samples that run through the teacher at once; the last batch is padded to it.
        shard_size: samples per shard, a multiple of ``batch_size``.
    """

    sampler: str = "ddim"
    steps: int = 0
    num: int = 2048
    start: int = 0
    seed: int = 0
    depth: int = 12
    latent_size: int = 0
    detail_noise: bool = False
    batch_size: int = 32
    shard_size: int = 128

    def validate(self):
        """Raise :class:`InputError` that names the field that cannot work."""
        for name in ("num", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shard_size % self.batch_size:
            raise InputError(f"shard_size must be a multiple of batch_size {self.batch_size}, got {self.shard_size}")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must be in [0, 2^64), got {self.seed}")
        if not 0 <= self.start < 2**62:
            raise InputError(f"start must be in [0, 2^62), got {self.start}")


class Trajectories:
    """Recorded data, memory-mapped; a shard's hash is checked the first time the shard is read.

    Args:
        folders: where ``advkd trajectories`` wrote; several make one data set if only ``num``, ``start`` and ``seed`` differ.
        option: what error messages call it.

    Attributes:
        recipe: how it was made (a dict: :class:`TrajectoryConfig` plus teacher, timesteps, resolutions), of the first folder.
        folders: all of them.
        parts: ``seed``, ``start`` and ``num`` of every folder.
        manifests: SHA-256 of every folder's manifest.
        standard_deviations: one per level, of the first folder.

    Raises:
        InputError: no finished data set there, folders that do not fit each other, or (on reading) a shard that is missing,
            truncated or altered.
    """

    def __init__(self, *folders, option="--trajectories"):
        self.folder, self.folders, self._option = Path(folders[0]), [], option
        self._entries, self._shards, self.parts, self.manifests = [], {}, [], []
        for folder in map(Path, folders):
            self.append(folder)

    def append(self, folder):
        """Add a folder's samples after those that are there."""
        manifest = _read_manifest(Path(folder), self._option)
        recipe = manifest["recipe"]
        if not self.parts:
            self.recipe, self.standard_deviations = recipe, manifest["standard_deviations"]
        changed = differences(recipe, self.recipe, ignored=("num", "start", "seed"))
        if changed:
            raise InputError(f"{self._option} {folder} and {self.folder} were made with different {', '.join(changed)}")
        part = {key: recipe[key] for key in ("seed", "start", "num")}
        if any(samples_overlap(part, other) for other in self.parts):
            raise InputError(f"{self._option} {folder} repeats samples of another folder: record with another --start")
        first = len(self)
        place = {"folder": folder, "recipe": recipe}
        self._entries += [{**entry, **place, "start": first + entry["start"]} for entry in manifest["shards"]]
        self.parts.append(part)
        self.folders.append(Path(folder))
        self.manifests.append(sha256(Path(folder) / "manifest.json"))

    def __len__(self):
        return sum(part["num"] for part in self.parts)

    @property
    def paired(self):
        """Whether x_0 is a function of z's x_T (DDIM), so that pairs (z, x_0) mean something."""
        return self.recipe["sampler"] == "ddim"

    def verify(self):
        """Check every shard's hash now."""
        for shard in range(len(self._entries)):
            self._load(shard)

    def noise(self, rows):
        """x_T of some rows: ``(len(rows), C, S, S)`` float32 on the CPU, made anew from its counters."""
        side, channels = self.recipe["image_size"], self.recipe["image_channels"]
        pieces = []
        for row in rows:
            part = 0
            while row >= self.parts[part]["num"]:
                row, part = row - self.parts[part]["num"], part + 1
            indices = torch.tensor([self.parts[part]["start"] + row], dtype=torch.int64, device="cpu")
            pieces.append(philox_normal(self.parts[part]["seed"], indices, (channels, side, side), stream="x_T"))
        return torch.cat(pieces)

    def batch(self, rows, levels, latent=None):
        """Rows of the data set.

        Args:
            rows: list of sample numbers.
            levels: list of level numbers k (1-based).
            latent: ``(latent_size, detail_noise)`` of the z that is wanted; by default that of the recording.

        Returns:
            ``(z, {k: (len(rows), C, R_k, R_k)})`` float32 on the CPU, levels as recorded (not standardised).
        """
        recorded = (self.recipe["latent_size"], self.recipe["detail_noise"])
        stored = latent is None or tuple(latent) == recorded
        names = [*(["z"] if stored else []), *(f"level_{k:02d}" for k in levels)]
        places = [self._place(row) for row in rows]
        picked = [torch.stack([self._load(shard)[name][offset] for shard, offset in places]).float() for name in names]
        z = picked.pop(0) if stored else project(self.noise(rows), *latent)
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
            if {name: (t.dtype, t.shape) for name, t in tensors.items()} != self._wanted(entry["count"]):
                raise damaged("shard", path, "it holds other tensors than its recipe says", RECORD_AGAIN)
            if differences(entry["recipe"], metadata.get("recipe", {})):
                raise InputError(f"shard {path} has another recipe than the manifest beside it: {RECORD_AGAIN}")
            self._shards[shard] = tensors
        return self._shards[shard]

    def _wanted(self, count):
        """dtype and shape of every tensor of a shard of ``count`` samples."""
        recipe = self.recipe
        channels, latent = recipe["image_channels"], (recipe["image_size"], recipe["latent_size"], recipe["detail_noise"])
        shapes = {"z": (count, latent_numel(channels, *latent))}
        shapes |= {f"level_{k:02d}": (count, channels, side, side) for k, side in enumerate(recipe["resolutions"], 1)}
        return {name: (torch.float16, shape) for name, shape in shapes.items()}


def _read_manifest(folder, option):
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


def _is_consistent(manifest):
    """Whether a manifest's parts fit each other: shards that cover the samples, one deviation per level.

    It may come from elsewhere: shards are files of its own folder, and nothing is made that is as large as it says.
    """
    recipe, entries, names = (
        manifest["recipe"],
        manifest["shards"],
        {field.name for field in dataclasses.fields(TrajectoryConfig)},
    )
    try:
        build_config(TrajectoryConfig, {name: recipe[name] for name in names}, "").validate()
        check_latent(recipe["image_size"], recipe["latent_size"], recipe["detail_noise"])
        shards = range(0, recipe["num"], recipe["shard_size"])
        shapes = recipe["resolutions"] == resolutions(recipe["image_size"], recipe["depth"])
        whole = len(entries) == len(shards) and all(
            _are_whole(entry["start"], entry["count"])
            and entry["start"] == start
            and entry["file"] == shard_path("", i).name
            and entry["count"] == min(recipe["shard_size"], recipe["num"] - start)
            and isinstance(entry["sha256"], str)
            for i, (entry, start) in enumerate(zip(entries, shards))
        )
        deviations = manifest["standard_deviations"]
        levels = len(deviations) == recipe["depth"] == len(recipe["timesteps"]) + 1
        levels &= all(type(value) in (int, float) and 0 <= value < math.inf for value in deviations)
        numbers = _are_whole(*recipe["timesteps"], *recipe["resolutions"], *(recipe[name] for name in SHAPE))
        known = recipe["image_channels"] in (1, 2, 3, 4) and isinstance(recipe["teacher"], dict)
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
    return shapes and whole and levels and numbers and known


def _are_whole(*values):
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def shard_path(out, shard):
    return Path(out) / f"shard-{shard:05d}.safetensors"


def differences(recipe, other, ignored=()):
    """Sorted keys in which two recipes differ; a teacher's name is not one."""
    differ = {k for k in recipe if k not in ignored and recipe[k] != other.get(k)}
    if "teacher" in differ and isinstance(other.get("teacher"), dict) and same_teacher(recipe["teacher"], other["teacher"]):
        differ.remove("teacher")
    return sorted(differ)


def samples_overlap(a, b):
    """Whether two parts (seed, start, num) share a sample."""
    return a["seed"] == b["seed"] and a["start"] < b["start"] + b["num"] and b["start"] < a["start"] + a["num"]


def same_teacher(a, b):
    """Whether two :meth:`Teacher.identity` are of one teacher, whatever it was called."""
    return {**a, "name": None} == {**b, "name": None}
