"""Measured choices, kept in the user's cache folder (``ADVKD_CACHE``): a file for each device or model of processor."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..ops.conv_layer import ALGORITHMS
from ..runtime.files import read_json, write_json
from ..runtime.folders import cache_folder
from ..runtime.timing import processor_identity

ALGORITHMS_VERSION = TIMES_VERSION = 1
"""Versions of the kernels as a search sees them: raised when their speed changes, so that kept values are measured anew."""

LONGEST = 1e3
"""Seconds that no launch takes: a kept time beyond them was not measured."""

_LOG = logging.getLogger(__name__)


class Kept:
    """Measurements on one piece of hardware, by a text that describes each.

    A file that is damaged, or of other kernels, counts as none; one that cannot be written costs a warning.

    Args:
        hardware: its name.
        entry: the key of the file that holds the values.
        versions: the other keys of the file, and their values now.
        accepts: True for a value that a measurement gives.
        subject: the beginning of the warning's sentence.

    Attributes:
        path: the file, None where there can be none.
        known: all values, the kept ones and those that were added.
        found: those that were added.
    """

    def __init__(self, hardware: str, entry: str, versions: dict[str, Any], accepts: Callable[[Any], bool], subject: str):
        self.path = kept_file(hardware)
        self._entry, self._versions, self._accepts, self._subject = entry, versions, accepts, subject
        self.known: dict[str, Any] = self._read()
        self.found: dict[str, Any] = {}

    def add(self, key: str, value: Any) -> None:
        """Remember a value until :meth:`keep` writes it."""
        self.known[key] = self.found[key] = value

    def keep(self) -> None:
        """Write the values that were added; another process may have added its own since."""
        found = {key: value for key, value in self.found.items() if self._accepts(value)}
        if not found or self.path is None:
            return
        try:
            write_json(self.path, {**self._versions, self._entry: dict(sorted({**self._read(), **found}.items()))})
        except (OSError, InputError) as error:
            _LOG.warning("%s not kept: %s (%s)", self._subject, self.path, error)

    def _read(self):
        if self.path is None:
            return {}
        try:
            stored = read_json(self.path, "kept plan", (*self._versions, self._entry))
        except InputError:
            return {}
        values = stored[self._entry]
        if any(stored[key] != value for key, value in self._versions.items()) or not isinstance(values, dict):
            return {}
        return {key: value for key, value in values.items() if self._accepts(value)}


def kept_algorithms() -> Kept:
    """The algorithms chosen on this model of processor."""
    versions = {"version": ALGORITHMS_VERSION}
    return Kept(processor_identity(), "algorithms", versions, ALGORITHMS.__contains__, "the measured plan is")


def kept_times(device: torch.device) -> Kept:
    """Seconds of launches on a device."""
    versions = {"version": TIMES_VERSION, "torch": torch.__version__, "triton": _triton_version()}
    return Kept(device_name(device), "seconds", versions, _is_time, "the measured times are")


def device_name(device: torch.device) -> str:
    """A CUDA device's name, any other's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def kept_file(hardware: str) -> Path | None:
    """The file of measurements on some hardware, in the user's cache folder; None, with a warning, where that has none."""
    try:
        return cache_folder() / "plans" / f"{re.sub(r'[^a-z0-9]+', '-', hardware.lower()).strip('-')}.json"
    except (OSError, InputError) as error:
        _LOG.warning("nothing measured is kept (%s)", error)
        return None


def _is_time(value):
    return isinstance(value, float) and 0 < value < LONGEST


def _triton_version():
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    return triton
