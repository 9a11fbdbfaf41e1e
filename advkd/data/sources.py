"""Data sets as the trainer reads them: rows in, a batch of tensors out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..runtime.files import digest
from .images import normalize
from .levels import downsample
from .trajectories import Trajectories


@dataclass
class Batch:
    """Rows of a data set on the run's device, tensors; a part that the data set lacks is None.

    Attributes:
        z: latents, or start states of the teacher, ``(N, ...)``.
        images: ``(N, ...)``, in [-1, 1] where they are pictures.
        labels: ``(N,)`` int64 classes.
        levels: standardised states of the teacher by submodule; the last one is ``images``.
    """

    z: Any = None
    images: Any = None
    labels: Any = None
    levels: dict[int, Tensor] = field(default_factory=dict)


class Source(Protocol):
    """A data set."""

    def __len__(self) -> int:
        """Rows of an epoch."""
        ...

    def identity(self) -> dict[str, Any]:
        """JSON values that must not change between a run and its resumption.

        Returns:
            Values by name, other names than those of the configuration's fields and of :meth:`Method.identity`.
        """
        ...

    def batch(self, rows: Sequence[int], levels: Sequence[int], device: torch.device, dtype: torch.dtype) -> Batch:
        """The batch of some rows.

        Args:
            rows: numbers from 0 to the length - 1.
            levels: submodules whose states are read, of a source that has any.
            device: where the batch is put.
            dtype: of floating-point tensors.

        Returns:
            A batch of ``len(rows)`` rows in that order; its ``levels`` are those asked for, where the source has any.
        """
        ...

    def grow(self, updates: int) -> None:
        """Bring the data to its state after the first updates of the run.

        Args:
            updates: number of these updates, over all stages.
        """
        ...


class Tensors:
    """Tensors in memory, each with one row a sample, of any shape and device; without any, a method's batches are empty.

    Args:
        z: latents or start states ``(N, ...)``.
        images: ``(N, ...)``; images of 8 bits become floating point in [-1, 1].
        labels: ``(N,)`` int64 classes.
        rows: numbers of the rows that are used (None: all).
        made_of: text that stands for the tensors in :meth:`identity` (empty: none).
    """

    def __init__(
        self,
        z: Tensor | None = None,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        rows: Tensor | None = None,
        made_of: str = "",
    ):
        self.tensors = {name: t for name, t in (("z", z), ("images", images), ("labels", labels)) if t is not None}
        self._rows, self._made_of = rows, made_of

    def __len__(self) -> int:
        used = [self._rows] if self._rows is not None else list(self.tensors.values())
        return len(used[0]) if used else 0

    def identity(self) -> dict[str, Any]:
        """Digest of the tensors, or of what they are made of.

        Returns:
            ``{"tensors": ...}``, the hexadecimal SHA-256 of names, dtypes, shapes and contents, of ``rows`` too.
        """
        rows = {} if self._rows is None else {"rows": self._rows}
        if self._made_of:
            return {"tensors": hashlib.sha256(f"{self._made_of} {digest(rows)}".encode()).hexdigest()}
        return {"tensors": digest({**self.tensors, **rows})}

    def batch(self, rows: Sequence[int], levels: Sequence[int], device: torch.device, dtype: torch.dtype) -> Batch:
        """The tensors' rows; see :class:`Source`.

        Args:
            rows: numbers from 0 to the length - 1.
            levels: not used: there are none.
            device: where the batch is put.
            dtype: of floating-point tensors; others keep theirs.

        Returns:
            A batch of those of ``z``, ``images`` and ``labels`` that there are; images of 8 bits are in [-1, 1] there.
        """
        index = torch.as_tensor(rows, dtype=torch.int64, device="cpu")
        index = index if self._rows is None else self._rows[index]
        picked = {name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()}
        if "images" in picked:
            picked["images"] = normalize(picked["images"])
        placed: dict[str, Any] = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in picked.items()}
        return Batch(**placed)

    def grow(self, updates: int) -> None:
        """Nothing: tensors stay as they are.

        Args:
            updates: not used.
        """


class Recorded:
    """Recorded trajectories: latents and standardised levels, with the classes where samples have any.

    Args:
        data: the trajectories.
        latent: ``(latent_size, detail_noise)`` of the z that is wanted; by default that of the recording.
        limit: number of rows that are used (0: all); rows that are appended to ``data`` later are used in any case.
        classes: names of the classes by the numbers that labels are to have; none: the teacher's numbers.
        averaged: levels are area averages of the final image instead of the teacher's states.
        bound: number that the final image is divided by: 1, or the largest magnitude of latents, for a student in [-1, 1].
    """

    def __init__(
        self,
        data: Trajectories,
        latent: tuple[int, bool] | None = None,
        limit: int = 0,
        classes: Sequence[str] = (),
        averaged: bool = False,
        bound: float = 1.0,
    ):
        self.data, self.latent, self.classes, self.averaged, self.bound = data, latent, classes, averaged, bound
        self._skipped = len(data) - (limit or len(data))
        self._used = limit or len(data)

    def __len__(self) -> int:
        return len(self.data) - self._skipped

    def identity(self) -> dict[str, Any]:
        """Digests of the recordings."""
        return {"trajectories": self.data.manifests}

    def batch(self, rows: Sequence[int], levels: Sequence[int], device: torch.device, dtype: torch.dtype) -> Batch:
        """See :class:`Source`."""
        places, last = self.places(rows), self.data.info.depth
        z, recorded = self.data.batch(places, [last] if self.averaged else levels, self.latent)
        if self.averaged:
            image, sides = recorded[last].to(device, dtype) / self.bound, self.data.info.resolutions
            scaled = {k: downsample(image, sides[k - 1]) for k in levels}
        else:
            scaled = {k: self._standardised(k, level.to(device, dtype)) for k, level in recorded.items()}
        return Batch(z.to(device, dtype), scaled.get(last), self._labels(places, device), scaled)

    def _labels(self, places, device):
        labels = self.data.labels(places, self.classes)
        return None if labels is None else labels.to(device)

    def places(self, rows: Sequence[int]) -> list[int]:
        """Rows of the recordings that rows of an epoch are."""
        return [row + self._skipped if row >= self._used else row for row in rows]

    def _standardised(self, k, level):
        # The last level is the image itself, in [-1, 1] where the bound is that of latents.
        deviations = self.data.standard_deviations
        return level / self.bound if k == len(deviations) else level / max(deviations[k - 1], 1e-6)

    def grow(self, updates: int) -> None:
        """Nothing: the recordings stay as they are."""


class RecordedPairs(Recorded):
    """Pairs of a deterministic solver: its start noise x_T and its image, with the class where samples have one.

    Args:
        data: the trajectories.
        limit: number of rows that are used (0: all); rows that are appended to ``data`` later are used in any case.

    Raises:
        InputError: the solver adds noise, so that the image is no function of x_T.
    """

    def __init__(self, data: Trajectories, limit: int = 0):
        data.require_paired()
        super().__init__(data, limit=limit)

    def batch(self, rows: Sequence[int], levels: Sequence[int], device: torch.device, dtype: torch.dtype) -> Batch:
        """Start noise and image of some rows; see :class:`Source`.

        Args:
            rows: numbers from 0 to the length - 1.
            levels: not used: pairs have none.
            device: where the batch is put.
            dtype: of ``z`` and ``images``.

        Returns:
            A batch of ``z``, x_T itself, and ``images`` in [-1, 1], both ``(N, C, H, W)``, and ``labels``.
        """
        places = self.places(rows)
        z, images = (part(places).to(device, dtype) for part in (self.data.noise, self.data.images))
        return Batch(z, images, self._labels(places, device))
