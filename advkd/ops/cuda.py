"""The CUDA kernels through CuPy, for a GPU user without a compiled CUDA extension.

The CPU extension has the host side of every kernel: its op ``cuda_<name>`` checks the arguments of launcher ``name`` and plans
the launches. CuPy compiles a source with NVRTC on first use, keeps the binary in its cache on disk, and starts the kernels. One
difference from the CUDA extension: CuPy always asks for ``-ftz=true``, float32 subnormals count as zero.
"""

import contextlib
import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..runtime.extension import extension_gap
from ..runtime.sources import folder
from .gpu_storage import device_limits

OPTIONS = ("--std=c++17",)


@functools.cache
def gap() -> str | None:
    """The reason why CuPy cannot run the kernels here, or None if it can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install 'advkd[cupy]')"
    if reason := extension_gap("cpu"):
        return f"CuPy needs the CPU extension, which plans the launches: {reason}"
    if not (folder() / "cuda").is_dir():
        return "the CUDA sources are not installed"
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # whatever a CuPy that does not fit the machine's CUDA raises
        return f"CuPy does not load NVRTC ({error})"
    return None


def launcher(name: str) -> Callable[..., None]:
    """Launcher ``name``, with the signature of the CUDA extension's; its first argument is positional."""
    plan = getattr(torch.ops.advkd_cpu, f"cuda_{name}").default

    def launch(first: torch.Tensor, /, *others: Any, **named: Any) -> None:
        start(first.device, *plan(first, *others, **named, device=limits(first.device)))

    return launch


@functools.cache
def limits(device: torch.device) -> list[int]:
    """Limits of a CUDA device that plans keep to: multiprocessors, bytes of shared memory of a block, compute capability."""
    return [*device_limits(device), torch.cuda.get_device_capability(device)[0]]


def start(device: torch.device, parameters: torch.Tensor, names: Sequence[str], numbers: Sequence[int]) -> None:
    """Start planned kernels on torch's stream.

    Args:
        parameters: bytes of the struct that every kernel takes by value.
        names: source, its variant, and the kernels.
        numbers: float32 elements of scratch memory, the byte of ``parameters`` where its address belongs; then of every kernel
            blocks, threads and bytes of dynamic shared memory.
    """
    source, variant, *kernels = names
    scratch_size, place, *launches = numbers
    scratch = torch.empty(scratch_size, dtype=torch.float32, device=device)
    if scratch_size:
        parameters[place : place + 8].view(torch.int64)[0] = scratch.data_ptr()
    # An array of one element is passed as its bytes.
    argument = parameters.numpy().view(f"V{len(parameters)}")
    for i, kernel in enumerate(kernels):
        blocks, threads, shared = launches[3 * i : 3 * i + 3]
        with _current(device):
            function = compiled(source, variant).get_function(kernel)
            # Above 48 KB it must be asked for: all there is, so that no launch finds a limit that another one has lowered.
            if shared > 48 * 1024:
                function.max_dynamic_shared_size_bytes = limits(device)[1]
            function((blocks,), (threads,), (argument,), shared_mem=shared)


@functools.cache
def compiled(name: str, variant: str) -> Any:
    """The program of ``csrc/cuda/<name>.cu``, with the kernels of one variant where there are several."""
    import cupy

    what = " ".join(filter(None, (name, variant)))
    logging.getLogger(__name__).warning("CuPy compiles %s (seconds, once: its cache keeps the binary)", what)
    variants = (f"-DADVKD_VARIANTS(EACH)=EACH({variant})",) if variant else ()
    return cupy.RawModule(code=source(name), options=(*OPTIONS, *variants))


def source(name: str) -> str:
    """``csrc/cuda/<name>.cu`` with our headers written out: CuPy's cache knows a program by its text alone."""
    seen = set()

    def expand(match):
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return include(match[1])

    def include(path):
        return re.sub(r'^#include "([^"]+)"$', expand, (folder() / path).read_text().replace("#pragma once\n", ""), flags=re.M)

    return include(f"cuda/{name}.cu")


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[None]:
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
