"""Energy that the device reports: a GPU's own counter through NVML, or the processor packages' through Linux's powercap (RAPL).

Both count the whole card or all packages, whatever else runs on them.
"""

import ctypes
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
SHORTEST = 1.0
"""Seconds that work is repeated for at least: the counters go on tens of milliseconds at a time."""


def meter(device):
    """``(function, None)`` that gives the joules since some moment, or ``(None, reason)``."""
    return nvml() if torch.device(device).type == "cuda" else rapl()


def rapl(folder=POWERCAP):
    """All processor packages."""
    packages = sorted(path for path in Path(folder).glob("*-rapl:*") if path.name.count(":") == 1)
    if not packages:
        return None, f"no energy counter below {folder}"
    try:
        counters = [_Counter(path) for path in packages]
    except OSError as error:
        return None, f"{error.filename} cannot be read ({error.strerror})"
    return lambda: sum(counter.joules() for counter in counters), None


class _Counter:
    """One package's counter, which begins anew at its range."""

    def __init__(self, path):
        self.path, self.turns = path / "energy_uj", 0
        self.range = int((path / "max_energy_range_uj").read_text())
        self.last = int(self.path.read_text())

    def joules(self):
        now = int(self.path.read_text())
        self.turns += now < self.last
        self.last = now
        return 1e-6 * (now + self.turns * self.range)


def nvml(load=ctypes.CDLL):
    """The current GPU."""
    try:
        library = load("libnvidia-ml.so.1")
    except OSError as error:
        return None, f"NVML cannot be loaded ({error})"
    handle, name = ctypes.c_void_p(), f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    # An index would be another one under CUDA_VISIBLE_DEVICES.
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)):
        return None, "NVML does not know the device"
    millijoules = ctypes.c_ulonglong()

    def joules():
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise OSError("the device reports no energy")
        return 1e-3 * millijoules.value

    try:
        joules()
    except OSError as error:
        return None, str(error)
    return joules, None
