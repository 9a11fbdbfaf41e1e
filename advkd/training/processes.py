"""Processes of a run: accelerate's state, and the end of the process group that it starts."""

import atexit
import contextlib
import gc
import sys
import traceback
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..errors import BackendUnavailableError, InputError
from ..methods.base import Method, Needs, Stage
from ..ops.critic.update import critic_gap
from ..runtime import launcher
from ..runtime.devices import require_device
from ..runtime.hub import reason


class SingleProcess:
    """A run in one process, by the names of accelerate's ``Accelerator``, which keeps one precision and device a process."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, mixed_precision: str, device: torch.device):
        self.device, self._narrow = device, mixed_precision == "bf16"

    def autocast(self) -> torch.autocast:
        """Context manager of the run's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._narrow)

    def wait_for_everyone(self) -> None:
        """Nothing: there is nobody else."""


def processes_of(mixed_precision: str, device: str | torch.device) -> Any:
    """Processes of a run: a :class:`SingleProcess`, or under a launcher accelerate's ``Accelerator``.

    A process group that accelerate starts is destroyed at exit.

    Raises:
        InputError: a precision or a device that this process cannot have.
    """
    _, world = launcher.processes()  # refuses variables that accelerate would stumble over
    device = require_device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if world == 1 and process_group() is None:
        return SingleProcess(mixed_precision, device)
    from accelerate import Accelerator

    try:
        with launcher.without_empty_variables(), GROUP.started_here():
            return Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
    except ValueError as error:
        # accelerate keeps one precision and one device per process.
        raise InputError(f"mixed_precision {mixed_precision} on {device}: {reason(error)}") from error


def require_runnable(processes: Any, method: Method, needs: Needs, stages: Sequence[Stage]) -> None:
    """Refuse what these processes cannot run.

    Args:
        processes: of :func:`processes_of`.
        method: the method.
        needs: its needs.
        stages: its stages.

    Raises:
        InputError: several processes for a method of one, or for batches that they do not divide.
        BackendUnavailableError: kernels for critics that cannot run on the device.
    """
    world = processes.num_processes
    if world > 1 and not method.parallel:
        raise InputError(f"{method.name} runs in one process: start it without a launcher")
    if any(stage.batch_size % world for stage in stages):
        sizes = ", ".join(map(str, dict.fromkeys(stage.batch_size for stage in stages)))
        raise InputError(f"batches of {sizes} samples must be divisible by the {world} processes")
    if needs.critic_backend in ("auto", "autograd"):
        return
    if why := critic_gap(needs.critic_backend, processes.device):
        wish = f"critic_backend {needs.critic_backend} cannot run on {processes.device} ({why})"
        raise BackendUnavailableError(f"{wish}: take auto or autograd")


def barrier() -> None:
    """Wait for all processes, if there are several."""
    if process_group() is not None:
        dist.barrier()


def share(module: torch.nn.Module) -> None:
    """Give every process the main process's tensors of a module."""
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, 0)


class OwnGroup:
    """The process group that accelerate starts for our runs, destroyed before the interpreter finalizes, on every way out.

    gloo's threads take the GIL to release tensors that Python knows, which in a finalizing interpreter ends the process by
    SIGABRT; destroying the group joins them. This happens at exit and not at the end of a run, because accelerate keeps the
    group for the next run, and a second group would read the addresses of the first from the launcher's store.

    Attributes:
        in_step: True between runs, when all processes have reached the same place.
    """

    def __init__(self):
        self._group = None
        self.in_step = False

    @contextlib.contextmanager
    def started_here(self) -> Iterator[None]:
        """A group that is new after the block is ours to end."""
        self.in_step = False
        before = process_group()
        if dist.is_available():
            # The default arguments of its functions are the group there is at import: imported later, they would keep ours.
            from torch.distributed.nn import functional  # noqa: F401
        try:
            yield
        finally:
            group = process_group()
            if before is None and group is not None:
                # A strong reference would keep the destroyed group's threads alive.
                self._group = weakref.ref(group)
                atexit.register(self._end)

    def _end(self):
        if self._group() is None or self._group() is not process_group():
            return
        if not self.in_step:
            # After an error the other processes may never come: aborting, unlike NCCL's shutdown, does not wait for them.
            self._group().abort()
        dist.destroy_process_group()
        if self._group() is not None:
            _clear_frames(getattr(sys, "last_value", None))
            gc.collect()


GROUP = OwnGroup()


def process_group() -> Any:
    """The default process group, or None."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _clear_frames(error):
    """Release the local variables of an uncaught error's frames: in a failed collective they include the process group."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
