"""Folder of a recording while it is written: which shards are there, and the manifest once all are."""

import math
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..runtime.files import (
    MANIFEST_LIMIT,
    damaged,
    digest,
    read_json,
    read_tensors,
    require_digest,
    sha256,
    with_digest,
    write_json,
)
from ..runtime.folders import require_space
from .dataset_info import DatasetInfo, differences
from .trajectories import FORMAT, RECORD_AGAIN, SHARD_KEYS, require_layout, shard_path

SHARED_INFO = ".recipe.json"
"""Description of the data set of a launcher's processes, beside the shards until all are there."""


def missing_shards(out: Path, info: DatasetInfo) -> list[int]:
    """Numbers of the shards that ``out`` lacks, once those that are there and the free space have been checked."""
    present = {path.name for path in _check_existing(out, info)}
    left = max(0, info.num - len(present) * info.shard_size)
    bytes_per_sample = sum(dtype.itemsize * math.prod(shape) for dtype, shape in info.layout(1).values())
    require_space(out, left * bytes_per_sample, "what is left of the trajectories")
    return [s for s in range(info.num_shards) if shard_path(out, s).name not in present]


def finish(out: Path, info: DatasetInfo) -> bool:
    """Write the manifest and return True if all shards are there."""
    finished = all(shard_path(out, s).exists() for s in range(info.num_shards))
    if finished:
        _check_existing(out, info)
        path, manifest = out / "manifest.json", manifest_of(out, info)
        if not _is_without_digest(path, manifest):
            write_json(path, manifest)
        (out / SHARED_INFO).unlink(missing_ok=True)
    return finished


def is_of_older_version(out: Path) -> bool:
    """True if an earlier version wrote the first shard that is there, or the manifest where all shards are lost.

    Its digests are of tensors alone, and those of shards recorded again are so, too: runs know their data by its bytes.
    """
    for path in sorted(out.glob("shard-*.safetensors"))[:1]:
        tensors, metadata = read_tensors(path, "shard", SHARD_KEYS, RECORD_AGAIN)
        return metadata["digest"] == digest(tensors)
    try:
        manifest = read_json(out / "manifest.json", "manifest", ("format", "recipe", "shards"), MANIFEST_LIMIT)
        return "digest" not in manifest
    except InputError:  # none, or a damaged one
        return False


def manifest_of(out: Path, info: DatasetInfo) -> dict[str, Any]:
    """The manifest of a finished data set. It holds no times and no host: equal descriptions give equal bytes."""
    sums: dict[str, torch.Tensor] = {}
    entries = []
    for shard in range(info.num_shards):
        path = shard_path(out, shard)
        tensors, metadata = read_tensors(path, "shard", SHARD_KEYS, RECORD_AGAIN)
        entries.append({"file": path.name, "start": metadata["start"], "count": metadata["count"], "sha256": sha256(path)})
        for name, tensor in tensors.items():
            if name == "labels":
                continue
            values = tensor.double()
            moments = torch.stack((values.sum(), values.square().sum(), values.new_tensor(values.numel())))
            sums[name] = sums.get(name, 0) + moments
    deviations = {}
    for name, (total, squares, number) in sums.items():
        deviations[name] = float((squares / number - (total / number) ** 2).clamp_min(0).sqrt())
    levels = [name for name in sorted(sums) if name != "z"]
    manifest = {
        "format": FORMAT,
        "recipe": info.to_json(),
        "standard_deviations": [deviations[name] for name in levels],
        "latent_standard_deviation": deviations["z"],
        "shards": entries,
    }
    return with_digest({}, manifest)


def _check_existing(out, info):
    """The shards in ``out``, each whole and of this data set."""
    paths = sorted(out.glob("shard-*.safetensors"))
    for path in paths:
        tensors, metadata = read_tensors(path, "shard", SHARD_KEYS, RECORD_AGAIN)
        if not isinstance(metadata["recipe"], dict):
            raise damaged("shard", path, "it has no recipe", RECORD_AGAIN)
        changed = differences(info.to_json(), metadata["recipe"])
        if changed:
            raise InputError(f"--out {out} holds trajectories made with another {', '.join(changed)}: name another folder")
        require_digest(f"shard {path}", tensors, metadata, RECORD_AGAIN)
        require_layout(path, tensors, info, metadata["count"])
    return paths


def _is_without_digest(path, manifest):
    """True for an earlier version's file of this manifest: it stays, since runs know their data by the file's bytes."""
    try:
        return read_json(path, "manifest", most=MANIFEST_LIMIT) == {k: v for k, v in manifest.items() if k != "digest"}
    except InputError:  # none, or a damaged one
        return False
