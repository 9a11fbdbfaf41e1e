"""A run's folder and its checkpoint: one format for every method.

``checkpoint.safetensors`` holds, for every module NAME of the stage, ``NAME/...`` (its state), ``NAME.average/...`` and
``NAME.optimizer/...`` where it has them, and the states of torch's random generators.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..methods.base import Kept, Stage, Trained
from ..runtime.files import (
    pack_optimizer,
    read_tensors,
    require_digest,
    restoring,
    unpack_optimizer,
    with_digest,
    write_tensors,
)
from ..runtime.folders import require_folder_path, require_output_folder, require_space

CHECKPOINT = "checkpoint.safetensors"
FORMAT = "advkd-run-1"

ADDED = {"targets": "states", "classes": "", "images": 0, "sigma_data": 0.5, "super_resolution": 0, "truncation": 1000}
"""Values in every run's identity before these fields of configurations were."""


@dataclass
class Running:
    """A module of the current stage with what moves it.

    Attributes:
        part: what the method built.
        optimizer: None for a module that is kept.
        average: exponential moving average of the module, or None.
    """

    part: Trained | Kept
    optimizer: torch.optim.Optimizer | None = None
    average: torch.nn.Module | None = None

    @classmethod
    def of(cls, part: Trained | Kept, before: "Running | None") -> "Running":
        """Start a stage's part; the average goes on where ``before``, the stage before's, has the same module."""
        if isinstance(part, Kept):
            return cls(part)
        average = before.average if before is not None and before.part.module is part.module else None
        if part.average and average is None:
            average = copy.deepcopy(part.module).requires_grad_(False).eval()
        return cls(part, part.optimizer(), average)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that the optimiser moves."""
        assert self.optimizer is not None
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All state, by the names of a checkpoint."""
        found = {f"{name}/{k}": v for k, v in self.part.module.state_dict().items()}
        if self.average is not None:
            found |= {f"{name}.average/{k}": v for k, v in self.average.state_dict().items()}
        return found if self.optimizer is None else found | pack_optimizer(f"{name}.optimizer", self.optimizer)

    def restore(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Load what :meth:`tensors` gave; an error of torch's where it does not fit."""
        self.part.module.load_state_dict(_under(f"{name}/", tensors))
        if self.average is not None:
            self.average.load_state_dict(_under(f"{name}.average/", tensors))
        if self.optimizer is not None:
            unpack_optimizer(f"{name}.optimizer", self.optimizer, tensors)


def _under(prefix, tensors):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def claim(out: str | Path, resume: bool, finished: Sequence[str], what: str) -> Path:
    """The output folder, created; one that :func:`require_unclaimed` refuses is left as it is."""
    require_unclaimed(out, resume, finished, what)
    return require_output_folder(out)


def require_unclaimed(out: str | Path, resume: bool, finished: Sequence[str], what: str) -> None:
    """Refuse an output folder that holds a result, or an unfinished run without ``resume``; nothing is created.

    Args:
        out: the folder.
        resume: True to go on from its checkpoint.
        finished: names of files that a result consists of.
        what: word for a result.
    """
    out = require_folder_path(out)
    if (out / CHECKPOINT).exists():
        if not resume:
            raise InputError(f"--out {out} holds a run already: add --resume, or name another folder")
    elif any((out / name).exists() for name in finished):
        raise InputError(f"--out {out} holds {'an' if what[0] in 'aeiou' else 'a'} {what} already: name another folder")
    elif resume:
        raise InputError(f"--resume: --out {out} holds no checkpoint yet: run without --resume")


def require_room(out: Path, modules: Sequence[torch.nn.Module], logged: bool) -> None:
    """Refuse a disk without room for a run that trains ``modules``; ``logged``: with metrics and pictures."""
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    require_space(out, 40 * parameters + (2**26 if logged else 2**22), "the run")


def file_state(path: Path) -> tuple[int, int] | None:
    """Time and size by which another process's writing is noticed, or None where there is no file."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def write_checkpoint(
    path: Path, running: dict[str, Running], place: dict[str, int], identity: dict[str, Any], generator: torch.Generator | None
) -> None:
    """Write the state of a run at ``place`` (stage, update, cursor)."""
    tensors = {"rng": torch.get_rng_state()}
    for name, part in running.items():
        tensors |= part.tensors(name)
    if generator is not None:
        tensors["generator"] = generator.get_state()
    write_tensors(path, tensors, with_digest(tensors, {"format": FORMAT, **place, "run": identity}))


def read_checkpoint(
    path: Path, identity: dict[str, Any], stages: Sequence[Stage]
) -> tuple[dict[str, torch.Tensor], tuple[int, int, int]]:
    """Tensors of a checkpoint and its (stage, update, cursor).

    Raises:
        InputError: the file is damaged, of an earlier version, or of a run with other settings.
    """
    tensors, metadata = read_tensors(path, "checkpoint", ("digest",))
    require_digest(path, tensors, metadata)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"checkpoint {path} is of another version of advkd, which alone can go on with it: finish the run with that "
            "version, or start again in another folder"
        )
    with restoring("checkpoint", path):
        run = {**ADDED, **metadata["run"]}
        ours, theirs = ({name: _told(value) for name, value in known.items()} for known in (identity, run))
        changed = sorted(name for name in identity if theirs.get(name) != ours[name])
    if changed:
        raise InputError(
            f"{path.parent} holds a run with another {', '.join(changed)}: repeat its options or name another folder"
        )
    with restoring("checkpoint", path):
        return tensors, _position(metadata, stages)


def _told(value):
    """A value of a run's identity; a student without classes is described without them, as before there were any."""
    is_plain = isinstance(value, dict) and value.get("classes") == [] and "class_channels" in value
    return {k: v for k, v in value.items() if k not in ("classes", "class_channels")} if is_plain else value


def _position(metadata, stages):
    """Stage, update and cursor of a checkpoint; ``ValueError`` where the run has no such place."""
    stage, update, cursor = place = tuple(metadata[name] for name in ("stage", "update", "cursor"))
    updates = stages[stage].updates if type(stage) is int and 0 <= stage < len(stages) else 0
    whole = all(type(number) is int for number in place) and 0 <= stage <= len(stages)
    if not whole or not 0 <= update <= updates or not 0 <= cursor < 2**62:
        raise ValueError(f"the run has no stage {stage}, update {update}, draw {cursor}")
    return place
