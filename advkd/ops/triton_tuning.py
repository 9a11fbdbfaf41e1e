"""Which configuration of a GPU kernel is fastest here: measured once per layer, batch and device, and kept."""

import functools
import importlib.metadata
import logging
import math

import torch

from ..errors import InputError
from ..files import cache_folder, read_json, write_json

VERSION = 1
"""Of the kernels as a search sees them: raised when their speed changes, so that kept choices are measured anew."""

KEEP = 1.03
"""A configuration must be so many times faster to take the place of an earlier one: a tie is not decided by noise."""

_LOG = logging.getLogger(__name__)


def choose(key, candidates, measure):
    """The fastest of ``candidates``: the one kept for ``key``, else measured now and kept.

    Args:
        key: all that the choice depends on, in words (:func:`layer_key`).
        candidates: names of configurations, the one to take in a tie first.
        measure: seconds of a named configuration; infinite where it cannot run. Not called for a choice that is kept.

    Returns:
        One of ``candidates``. A kept name that is none of them is measured anew, as is all of a file that is damaged or of
        other kernels.

    Raises:
        InputError: no candidates. RuntimeError: none of them can run.
    """
    if not candidates:
        raise InputError(f"no configuration to choose from for {key}")
    if len(candidates) == 1:
        return candidates[0]
    path = cache_folder() / "plans" / "gpu.json"
    kept = _read(path).get(key)
    if kept in candidates:
        return kept
    _announce(path)
    chosen = _fastest(key, candidates, measure)
    _keep(path, {key: chosen})
    return chosen


def layer_key(kernel, layer, batch, dtype, precision, device):
    """The key of a :class:`advkd.ops.conv_block.ConvLayer` on a device.

    ``kernel`` names the kernel and the version of what compiles it (:func:`triton_version`); ``precision`` how numbers are
    multiplied.
    """
    detail = f"+{layer.detail}" if layer.detail else ""
    up = ", up" if layer.upsample else ""
    shape = f"{layer.c_in - layer.detail}{detail}-{layer.c_out}, {layer.height}x{layer.width}{up}, {layer.activation}"
    number = f"{str(dtype).removeprefix('torch.')} as {precision}"
    return f"{device_name(device)}; {kernel}; {shape}; batch {batch}; {number}"


def device_name(device):
    """A GPU's name and capability."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"


def triton_version():
    """The installed Triton's version, without importing it."""
    return importlib.metadata.version("triton")


@functools.cache
def _announce(path):
    _LOG.info("measuring the configurations of GPU kernels, once per layer and batch; the choices are kept in %s", path)


def _fastest(key, candidates, measure):
    times = {name: measure(name) for name in candidates}
    chosen = min(times, key=times.get)
    if not math.isfinite(times[chosen]):
        raise RuntimeError(f"no configuration of {', '.join(candidates)} can run {key}")
    return next(name for name in candidates if times[name] <= KEEP * times[chosen])


def _read(path):
    """Kept choices; a file that is damaged, or of other kernels, counts as none."""
    try:
        stored = read_json(path, "kept choices", ("version", "choices"))
    except InputError:
        return {}
    usable = stored["version"] == VERSION and isinstance(stored["choices"], dict)
    return dict(stored["choices"]) if usable else {}


def _keep(path, found):
    # Another process may have added its own since.
    try:
        write_json(path, {"version": VERSION, "choices": dict(sorted({**_read(path), **found}.items()))})
    except (OSError, InputError) as error:
        _LOG.warning("the measured configuration is not kept: %s (%s)", path, error)
