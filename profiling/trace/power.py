"""Energy that the device reports: a GPU's own counter through NVML, or the processor packages' through Linux's powercap (RAPL).

Both count the whole card or all packages, whatever else runs on them.
"""

import ctypes
from pathlib import Path

import torch

from advkd.errors import InputError

POWERCAP = Path("/sys/class/powercap")
SHORTEST = 1.0
"""Seconds that work is repeated for at least: the counters go on tens of milliseconds at a time."""


def meter(device):
    """A function that gives the joules since some moment.

    Raises:
        InputError: there is no such counter.
    """
    return nvml() if torch.device(device).type == "cuda" else rapl()


def rapl(folder=POWERCAP):
    """All processor packages."""
    packages = sorted(path for path in Path(folder).glob("*-rapl:*") if path.name.count(":") == 1)
    if not packages:
        raise InputError(f"no energy counter below {folder}")
    last, total = dict.fromkeys(packages, 0), 0

    def joules():
        nonlocal total
        for path, before in last.items():
            last[path] = int((path / "energy_uj").read_text())
            # A counter begins anew at its range.
            total += (last[path] - before) % int((path / "max_energy_range_uj").read_text())
        return 1e-6 * total

    try:
        joules()
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror})") from error
    return joules


def nvml(load=ctypes.CDLL):
    """The current GPU."""
    try:
        library = load("libnvidia-ml.so.1")
    except OSError as error:
        raise InputError(f"NVML cannot be loaded ({error})") from error
    handle, name = ctypes.c_void_p(), f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    # An index would be another one under CUDA_VISIBLE_DEVICES.
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)):
        raise InputError("NVML does not know the device")
    millijoules = ctypes.c_ulonglong()

    def joules():
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise InputError("the device reports no energy")
        return 1e-3 * millijoules.value

    return joules
