"""The interface that the engines of a fused student share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..ops.conv_layer import ConvLayer
from .plan import Plan


@dataclass(frozen=True)
class Options:
    """How an engine computes, where it has a choice.

    Attributes:
        backend: name of the backend whose kernels run.
        tune: choose by measurements, which are kept on disk.
        mixed: also take kernels of other backends of the same device.
        algorithms: one of :data:`advkd.ops.conv_layer.ALGORITHMS` per convolution on the CPU; empty: the defaults.
    """

    backend: str
    tune: bool = False
    mixed: bool = False
    algorithms: tuple[str, ...] = ()


class Engine(Protocol):
    """Convolutions that follow each other, from latents to images, on one device.

    Args:
        layers: a :class:`advkd.ops.conv_layer.ConvLayer` for each convolution.
        weights: of the folded network, ``(C_out, C_in, 3, 3)`` per layer, on the device.
        biases: of the folded network, ``(C_out,)`` per layer, on the device.
        slope: of LeakyReLU.
        dtype: of activations and images.
        options: an :class:`Options`.

    Calls from several threads are safe.

    Attributes:
        weights: the folded network's, in the form in which they are to be kept and saved.
        biases: the folded network's, likewise.
        options: as given, the algorithms filled in.
    """

    weights: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]
    options: Options

    def __init__(
        self,
        layers: Sequence[ConvLayer],
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        slope: float,
        dtype: torch.dtype,
        options: Options,
    ): ...

    @staticmethod
    def gap(layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device) -> str | None:
        """The reason why the engine cannot run these layers here, or None."""

    @staticmethod
    def search(layers: Sequence[ConvLayer], dtype: torch.dtype) -> tuple[str, ...]:
        """The fastest ``algorithms`` by measurement, which a saved student keeps; empty where the engine has none."""
        return ()

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Images ``(N, C, S, S)`` of latents ``(N, numel)``."""

    def plan(self, batch_size: int, measured: bool) -> Plan:
        """How a batch is computed; with ``measured`` each part is run a few times."""

    def memory(self, batch_size: int) -> dict[str, int]:
        """Bytes of packed ``weights`` and of the ``workspace``."""


def dtype_gap(dtype: torch.dtype, known: Sequence[torch.dtype]) -> str | None:
    """The reason why kernels of the ``known`` dtypes cannot compute in ``dtype``, or None."""
    names = " or ".join(str(kind).removeprefix("torch.") for kind in known)
    return None if dtype in known else f"computes in {names}, not in {dtype}"
