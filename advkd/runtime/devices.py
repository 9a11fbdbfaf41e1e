"""Devices by name, torch's defaults and memory, and results on their way to the host."""

import contextlib
import ctypes
from collections.abc import Iterable, Iterator

import torch

from ..errors import InputError
from .hub import reason
from .ranges import named


def require_device(name: str | torch.device) -> torch.device:
    """A torch device that computes and can be read back.

    Raises:
        InputError: ``name`` is no device, or one that is not there or holds no values (``meta``).
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device raises errors of its own where it is missing
        why = "it holds no values" if str(name).startswith("meta") else reason(error).partition(". ")[0]
        raise InputError(f"--device {str(name)!r} is not available ({why}); use cpu, or cuda where there is a GPU") from error
    # There is one CPU: to torch's comparisons "cpu:1" would be another.
    return torch.device("cpu") if device.type == "cpu" else device


@contextlib.contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """A context in which weights on the CPU are drawn by a seed; torch's generators are left as they were.

    Args:
        seed: in [0, 2^63).
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # torch's own function would seed GPUs, too
        yield


AUTOCAST = ("cpu", "cuda")
"""Devices with an autocast that the ops respect."""


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """A context manager that switches autocast off for ``x``'s device: results keep the dtypes of their tensors."""
    kind = x.device.type
    on = kind in AUTOCAST and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """Restore torch's own defaults meanwhile: float32 on the CPU, whatever the caller has set. Also a decorator.

    Meant for whole runs, whose libraries make tensors and weights without a dtype: a weight drawn in float64 is another number.
    The default dtype belongs to the process, so it is set only where it differs.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short: torch's allocators raise RuntimeError, on CPUs and GPUs in other words."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in ("can't allocate memory", "out of memory"))
    return isinstance(error, MemoryError)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on the CPU with ``count`` threads meanwhile: with one, results do not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of returning it to the kernel; a no-op with other C libraries.

    By default every large tensor pays for fresh pages, a quarter of a small network's time on a CPU. The setting is the whole
    process's: call it in the command line and its workers only.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)


def to_host(tensors: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """An iterator over ``tensors`` on the CPU.

    On a CUDA device each tensor is copied to pinned memory on a separate stream and yielded once the next one is under way, so
    that the device computes while the last result is copied and used.
    """
    if device.type != "cuda":
        for tensor in tensors:
            with named("to host"):
                host = tensor.cpu()
            yield host
        return
    copies, pending = torch.cuda.Stream(device), None
    for tensor in tensors:
        tensor = tensor.contiguous()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            host.copy_(tensor, non_blocking=True)
            done = copies.record_event()
        tensor.record_stream(copies)
        if pending is not None:
            yield _arrived(*pending)
        pending = host, done
    if pending is not None:
        yield _arrived(*pending)


def _arrived(host, done):
    with named("to host"):
        done.synchronize()
    return host
