"""Compiles the CUDA sources with CuPy and starts their kernels: for a GPU user without a compiled extension.

CuPy compiles a source with NVRTC on first use and keeps the binary in its cache on disk. One difference from the extension:
CuPy always asks for ``-ftz=true``, float32 subnormals count as zero.
"""

import contextlib
import functools
import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from .gpu_storage import device_limits

OPTIONS = ("--std=c++17",)
THREADS = 256
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@functools.cache
def gap() -> str | None:
    """The reason why CuPy cannot compile the sources here, or None if it can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install 'advkd[cupy]')"
    if folder() is None:
        return "the CUDA sources are not installed"
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # whatever a CuPy that does not fit the machine's CUDA raises
        return f"CuPy does not load NVRTC ({error})"
    return None


def folder() -> Path | None:
    """Where the sources are: inside an installed package, beside the package in a checkout; None if nowhere."""
    package = Path(__file__).parent.parent
    return next(
        (path for path in (package / "csrc", package.parent / "csrc") if (path / "cuda/sampler_step.cu").is_file()), None
    )


def source(name: str) -> str:
    """``csrc/cuda/<name>.cu`` with our headers written out: CuPy's cache knows a program by its text alone."""
    seen = set()

    def expand(match):
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return _include(match[1])

    def _include(path):
        return re.sub(r'^#include "([^"]+)"$', expand, (folder() / path).read_text().replace("#pragma once\n", ""), flags=re.M)

    return _include(f"cuda/{name}.cu")


@functools.cache
def compiled(name: str, *options: str) -> Any:
    """The program of ``csrc/cuda/<name>.cu``."""
    import cupy

    logging.getLogger(__name__).warning(
        "CuPy compiles %s (seconds, once: its cache keeps the binary)", " ".join((name, *options))
    )
    return cupy.RawModule(code=source(name), options=(*OPTIONS, *options))


def start(
    program: Any, kernel: str, blocks: int, arguments: tuple, device: torch.device, threads: int = THREADS, shared: int = 0
) -> None:
    """Start a kernel on torch's stream: ints are passed as 64 bits, arrays of one element as they are.

    ``shared``: bytes of dynamic shared memory.
    """
    with _current(device):
        function = program.get_function(kernel)
        # Above 48 KB it must be asked for: as much as there is, so that no launch finds a limit that another one has lowered.
        if shared > 48 * 1024:
            function.max_dynamic_shared_size_bytes = device_limits(device)[1] if device.type == "cuda" else shared
        function((blocks,), (threads,), arguments, shared_mem=shared)


@contextlib.contextmanager
def _current(device):
    """``device``, and torch's stream on it as CuPy's."""
    import cupy

    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        if hasattr(cupy.cuda.Stream, "from_external"):
            external = cupy.cuda.Stream.from_external(_Stream(stream))
        else:  # before CuPy 14
            external = cupy.cuda.ExternalStream(stream)
        with external:
            yield


class _Stream:
    """A stream's handle in the form of the CUDA stream protocol."""

    def __init__(self, handle):
        self._handle = handle

    def __cuda_stream__(self):
        return 0, self._handle


def struct(dtype: numpy.dtype, fields: Mapping[str, Any]) -> numpy.ndarray:
    """Parameters of a kernel, passed by value: an array of one ``dtype``."""
    return numpy.array(tuple(fields[name] for name in dtype.names or ()), dtype)


def address(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's memory, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def key(seed: int) -> dict[str, int]:
    """A seed's halves, Philox' key."""
    return {"key0": seed & 0xFFFFFFFF, "key1": seed >> 32 & 0xFFFFFFFF}


def cover(n: int, part: int) -> int:
    """How many pieces of ``part`` cover ``n``."""
    return -(-n // part)


def clamp(n: int, most: int) -> int:
    """``n``, but at least 1 and at most ``most``."""
    return max(1, min(n, most))
