"""The compiled objects of the package: ``torch.ops.advkd_cpu`` and ``torch.ops.advkd_cuda``."""

import functools
import shutil
from pathlib import Path

import torch

from ..errors import InputError


@functools.cache
def extension_gap(kind: str) -> str | None:
    """Load the C++ extension ``kind`` (``cpu`` or ``cuda``) once; None if it is loaded, else the reason.

    Raises:
        InputError: the environment variable ``ADVKD_ISA`` names no instruction set.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
    files = sorted(Path(__file__).parent.parent.glob(f"_{kind}*.so"))
    if not files:
        compiler = "; nvcc is not on PATH" if kind == "cuda" and shutil.which("nvcc") is None else ""
        return f"the {kind} extension is not built (python setup.py build_ext --inplace{compiler})"
    try:
        torch.ops.load_library(files[0])
    except OSError as error:
        return f"{files[0].name} does not load ({error})"
    if kind == "cuda":
        return _foreign_code(files[0].name)
    try:
        torch.ops.advkd_cpu.isa()
    except RuntimeError as error:
        raise InputError(f"the environment variable {error}") from error
    return None


def _foreign_code(name):
    """The reason if the loaded CUDA object was built for other GPUs than the current one."""
    device = torch.device("cuda", torch.cuda.current_device())
    if not _code_error(device):
        return None
    own = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return f"{name} is built for other GPUs than this one: TORCH_CUDA_ARCH_LIST={own} python setup.py build_ext --inplace"


def _code_error(device):
    return torch.ops.advkd_cuda.missing_code(torch.empty(0, device=device))
