"""Plans of the CUDA kernels' host side: their parameters by name, and ways to run a plan with others."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import pytest
import torch

from advkd.ops import cuda
from advkd.runtime.extension import extension_gap

from ..conftest import ROOT

KINDS = {"int": "i4", "i64": "i8", "u32": "u4", "u64": "u8", "float": "f4"}
A100, CARD, H200, B200 = (108, 163 * 1024, 8), (84, 99 * 1024, 8), (132, 227 * 1024, 9), (148, 227 * 1024, 10)
"""Limits of devices as plans take them: multiprocessors, bytes of shared memory of a block, compute capability."""


@functools.cache
def struct(source: str, name: str) -> numpy.dtype:
    """A C struct of ``csrc/cuda/<source>.h``, laid out as its declaration says."""
    text = "".join((ROOT / "csrc" / path).read_text() for path in (f"cuda/{source}.h", "common/philox.h"))
    text = re.sub(r"//.*", "", text)
    body = re.search(rf"^struct {name} {{(.*?)^}};", text, re.M | re.S)[1]
    fields = []
    for kind, declared in re.findall(r"(?:const )?(unsigned char|\w+)(\*? [^;]+);", body):
        for entry in declared.replace("* ", " *").split(","):
            pointer, field, count = re.fullmatch(r"\s*(\*?)(\w+)(?:\[(\w+)\])?\s*", entry).groups()
            base = "u8" if pointer else KINDS.get(kind) or struct(source, kind)
            if count and not count.isdigit():
                count = re.search(rf"constexpr int {count} = (\d+);", text)[1]
            fields.append((field, base, (int(count),)) if count else (field, base))
    return numpy.dtype(fields, align=True)


@dataclass
class Plan:
    """A plan as the CPU extension's op gives it.

    Attributes:
        fields: the kernels' parameters.
        launches: a list ``[kernel, blocks, threads, shared]`` each.
        scratch, place: float32 elements that the kernels need, and the byte of the parameters for their address.
    """

    source: str
    variant: str
    fields: numpy.ndarray
    launches: list
    scratch: int
    place: int

    def __getitem__(self, name: str) -> int | float:
        return self.fields[name].item()

    def update(self, **values: int) -> None:
        for name, value in values.items():
            self.fields[name] = value

    @property
    def blocks(self) -> int:
        """Blocks of the first kernel."""
        return self.launches[0][1]


def _read(parameters, names, numbers):
    source, variant, *kernels = names
    numbers = list(numbers)
    launches = [[kernel, *numbers[3 * i + 2 : 3 * i + 5]] for i, kernel in enumerate(kernels)]
    fields = numpy.zeros(())
    if kernels:
        name = re.findall(r"^struct (\w+Parameters)", (ROOT / f"csrc/cuda/{source}.h").read_text(), re.M)[-1]
        assert struct(source, name).itemsize == len(parameters)
        fields = parameters.clone().numpy().view(struct(source, name)).reshape(())
    return Plan(source, variant, fields, launches, *numbers[:2])


def plan(op: str, *arguments, device: Sequence[int] = H200, **named) -> Plan:
    """The plan of launcher ``op``; tensors may be meta ones of any size."""
    assert extension_gap("cpu") is None, "the CPU object plans the launches"
    return _read(*getattr(torch.ops.advkd_cpu, f"cuda_{op}").default(*arguments, **named, device=device))


def start(planned: Plan, device: torch.device | str = "cpu") -> None:
    """Run a plan's kernels."""
    parameters = torch.from_numpy(planned.fields.reshape(1).view("u1").copy())
    numbers = [number for _, *launch in planned.launches for number in launch]
    names = [planned.source, planned.variant, *(kernel for kernel, *_ in planned.launches)]
    cuda_start(torch.device(device), parameters, names, [planned.scratch, planned.place, *numbers])


cuda_start = cuda.start


def change_plans(monkeypatch, change: Callable[[Plan], None]) -> None:
    """Make launchers start their plans after ``change`` has edited them."""

    def changed(device, *results):
        planned = _read(*results)
        change(planned)
        start(planned, device)

    monkeypatch.setattr(cuda, "start", changed)


def plan_for(monkeypatch, device: Sequence[int]) -> None:
    """Make launchers plan for a device with these limits."""
    monkeypatch.setattr(cuda, "limits", lambda _: list(device))


class Launchers:
    """The CuPy launchers by name, as attributes."""

    def __getattr__(self, name):
        return cuda.launcher(name)


LAUNCHERS = Launchers()


def gpu_launchers(compiled_by: str) -> object:
    """The launchers on a GPU, of the extension ("nvcc") or of CuPy ("cupy"); skips where they are missing."""
    if reason := cuda.gap() if compiled_by == "cupy" else extension_gap("cuda"):
        pytest.skip(reason)
    return LAUNCHERS if compiled_by == "cupy" else torch.ops.advkd_cuda
