"""Fills the caches that a first image would wait for: measured plans, and what Triton and CuPy compile."""

import time
from collections.abc import Iterator, Sequence

import torch

from ..errors import InputError
from ..models.shape import DTYPES, PRESETS
from ..models.student import Student
from ..runtime.devices import require_device


def warmup(
    student: str = "digits",
    device: str | torch.device = "cpu",
    backend: str = "auto",
    dtypes: Sequence[str] = ("float32",),
    batch_sizes: Sequence[int] = (1, 64),
    tune: bool = True,
) -> Iterator[tuple[str, int, float]]:
    """Draw one batch of each size and dtype, so that later processes find everything compiled, measured and kept.

    Args:
        student: what :meth:`Student.from_pretrained` takes, or a preset's name (plans depend on shapes, not on weights).
        device: torch device to prepare for, as ``advkd sample`` takes it.
        backend: of the kernels, as ``advkd sample`` takes it.
        dtypes: names of :data:`advkd.models.shape.DTYPES`.
        batch_sizes: on a GPU plans, kernels and graphs belong to a batch's size.
        tune: measure plans, as ``student.fuse()`` does by default; False compiles only.

    Yields:
        ``(dtype, batch size, seconds)`` of each, as it is done.
    """
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise InputError(f"--dtypes must be of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    if any(not 1 <= size <= 2**20 for size in batch_sizes):
        raise InputError(f"--batch-sizes must be in [1, 2^20], got {', '.join(map(str, batch_sizes))}")
    device = require_device(device)
    known = student in PRESETS and student not in Student.embedded
    model = Student.from_preset(student).eval().to(device) if known else Student.from_pretrained(student, device)
    for name in dtypes:
        fused = model.fuse(backend, DTYPES[name], tune)
        for size in batch_sizes:
            start = time.perf_counter()
            fused.sample(size, batch_size=size)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield name, size, time.perf_counter() - start
