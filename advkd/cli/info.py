"""Text of ``advkd info``: versions, devices, and which backend runs which op."""

import importlib.metadata
import platform
import sys

import torch

from .. import __version__
from ..ops import registry
from ..runtime.extension import extension_gap

PACKAGES = ("torch", "diffusers", "accelerate", "triton", "cupy-cuda13x", "numpy", "safetensors", "torchmetrics")


def describe() -> str:
    """The report as text."""
    lines = [f"advkd {__version__}, Python {sys.version.split()[0]}, {platform.platform()}"]
    lines += [f"  {name} {_version(name)}" for name in PACKAGES]
    kernels = "no kernels built" if extension_gap("cpu") else f"kernels {torch.ops.advkd_cpu.isa()}"
    lines += ["devices", f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {kernels}"]
    for i in range(torch.cuda.device_count()):
        lines.append(f"  cuda:{i}: {torch.cuda.get_device_name(i)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines.append(f"backends on {device.type} (auto takes the first that can run)")
    width = max(map(len, registry.IMPLEMENTED))
    for op in sorted(registry.IMPLEMENTED):
        chosen = registry.choose(op, "auto", device)
        lines.append(f"  {op:{width}}  auto = {chosen}")
        for backend in registry.BACKENDS:
            reason = registry.gap(op, backend, device)
            lines.append(f"  {'':{width}}    {backend:9}  {'yes' if reason is None else f'no: {reason}'}")
    return "\n".join(lines)


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
