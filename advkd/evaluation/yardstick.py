"""Measures of sets of images that share their start noise: one reference, one floor, and one bootstrap for all of them."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..runtime.files import digest, read_json, restoring, write_json
from .metrics import frechet_floor, neighbour_measures
from .paired import Resampled, paired_rows, resampled_frechet, resampled_limit

VERSION = 1
"""Version of the measures: kept ones of another one are measured again."""


class Yardstick:
    """References, and the rows that a bootstrap draws of every set.

    Args:
        real: features ``(M, D)`` of real images, in a random order.
        fine: features ``(num, D)`` of the fine-step reference.
        resamples: draws of the bootstrap.

    Raises:
        InputError: a reference whose images are all alike.

    Attributes:
        num: images of a set.
        half: N at which the floor is known: half of the reference.
        floor: mean Frechet distance of random halves of the reference.
    """

    def __init__(self, real: torch.Tensor, fine: torch.Tensor, resamples: int):
        self.real, self.fine, self.resamples = real, fine, resamples
        self.num, self.half = len(fine), len(fine) // 2
        splits = frechet_floor(fine)
        self.floor = sum(splits) / len(splits)
        if self.floor <= 1e-9 * fine.double().square().mean():
            raise InputError("the reference's images are all alike: nothing can be measured against them")
        self._rows = {len(other): paired_rows(self.num, len(other), resamples) for other in (real, fine)}
        self._half_rows = paired_rows(self.half, self.half, resamples)

    def measure(self, features: torch.Tensor, cache: Path) -> tuple[dict[str, Resampled], dict[str, Any]]:
        """Distances and shares of a set, from the cache where they are kept.

        Args:
            features: ``(num, D)``; row i belongs to start noise i.
            cache: folder that keeps them by content.

        Returns:
            ``real`` and ``real_at_infinity``, distances to real images, ``fine`` and ``fine_at_infinity``, to the fine-step
            reference, and ``times_floor``, of the first half of the set to the first half of that reference, in units of the
            floor; and beside them precision and recall against real images, with intervals.
        """
        depends = [VERSION, digest({"set": features, "real": self.real, "fine": self.fine}), self.resamples]
        path = cache / f"measures-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:32]}.json"
        if not path.exists():
            distances, shares = self._distances(features), neighbour_measures(features, self.real, self.resamples)
            named = {name: asdict(one) for name, one in distances.items()}
            write_json(path, {"distances": named, "shares": {n: v for n, v in shares.items() if n in SHARES}})
        kept = read_json(path, "the cache's measures", ("distances", "shares"))
        with restoring("the cache's measures", path, "delete it, and they are computed again"):
            return {name: Resampled(**one) for name, one in kept["distances"].items()}, {n: kept["shares"][n] for n in SHARES}

    def of_decoded(self, features: torch.Tensor) -> dict[str, Resampled]:
        """Distances of real images that went through an autoencoder, one half, to the other half as they were.

        Args:
            features: ``(M - M // 2, D)`` of the second half, encoded and decoded.

        Returns:
            ``frechet`` and ``at_infinity``.
        """
        half = len(self.real) // 2
        sets = features[:half], self.real[:half], paired_rows(half, half, self.resamples)
        return {"frechet": resampled_frechet(*sets), "at_infinity": resampled_limit(*sets)}

    def _distances(self, features):
        real, fine = self._rows[len(self.real)], self._rows[len(self.fine)]
        halves = features[: self.half], self.fine[: self.half], self._half_rows
        return {
            "real": resampled_frechet(features, self.real, real),
            "real_at_infinity": resampled_limit(features, self.real, real),
            "fine": resampled_frechet(features, self.fine, fine),
            "fine_at_infinity": resampled_limit(features, self.fine, fine),
            "times_floor": resampled_frechet(*halves) / self.floor,
        }


SHARES = ("precision", "precision_interval", "recall", "recall_interval")
"""Measures by neighbours that a comparison shows."""
