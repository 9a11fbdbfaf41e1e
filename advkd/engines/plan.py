"""The plan of an engine: a row for each launch, printed as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops.conv_layer import ConvLayer, output_sides


@dataclass(frozen=True, repr=False)
class Plan:
    """How a batch is computed; ``print(plan)`` shows it.

    Attributes:
        rows: a :class:`PlannedLayer` or a :class:`PlannedLaunch` each.
    """

    rows: tuple

    @property
    def heading(self) -> str:
        """The line above the table."""
        raise NotImplementedError

    def __str__(self) -> str:
        kind = type(self.rows[0])
        counts = [[getattr(row, name) for name in kind.summed] for row in self.rows]
        lines = [(*row.names(), *kind.figures(*own)) for row, own in zip(self.rows, counts)]
        sums = [None if None in column else sum(column) for column in zip(*counts)]
        return "\n".join([self.heading, *text_table([kind.titles, *lines, ("all", "", *kind.figures(*sums))])])

    __repr__ = __str__


@dataclass(frozen=True)
class PlannedLayer:
    """One row of a :class:`CpuPlan`: multiply-adds are per image, times seconds for one image.

    Attributes:
        layer: the :class:`advkd.ops.conv_layer.ConvLayer`.
        algorithm: one of :data:`advkd.ops.conv_layer.ALGORITHMS`.
        direct_products: multiply-adds of the layer as it is defined, on the up-sampled tensor.
        products: those that the algorithm makes, transforms left out.
        predicted: ``products`` at the rate that the processor reaches in registers.
        measured: shortest of several runs, or None.
    """

    titles: ClassVar = ("layer", "algorithm", "direct MMAC", "made MMAC", "predicted ms", "measured ms", "direct GMAC/s")
    summed: ClassVar = ("direct_products", "products", "predicted", "measured")

    layer: ConvLayer
    algorithm: str
    direct_products: int
    products: int
    predicted: float
    measured: float | None

    def names(self) -> tuple[str, str]:
        """The row's first two cells."""
        layer, (height, width) = self.layer, output_sides(self.layer)
        return f"{layer.c_in} -> {layer.c_out} {'up to' if layer.upsample else 'at'} {height}x{width}", self.algorithm

    @staticmethod
    def figures(direct: int, products: int, predicted: float, measured: float | None) -> tuple[str, ...]:
        """The cells behind the names, of the values :attr:`summed`."""
        counts = f"{direct / 1e6:.1f}", f"{products / 1e6:.1f}", f"{1e3 * predicted:.3f}"
        return *counts, *(("-", "-") if measured is None else (f"{1e3 * measured:.3f}", f"{direct / measured / 1e9:.0f}"))


@dataclass(frozen=True, repr=False)
class CpuPlan(Plan):
    """How every layer is computed on a CPU.

    Attributes:
        rows: a :class:`PlannedLayer` per convolution.
        rate: multiply-adds per second in registers, all threads together, per dtype of the products.
        isa: the instruction set.
        threads: torch's threads.
    """

    rate: dict[torch.dtype, float]
    isa: str
    threads: int

    @property
    def heading(self) -> str:
        """The processor, and how fast it multiplies."""
        rates = ", ".join(f"{value / 1e9:.0f} GMAC/s {str(kind).removeprefix('torch.')}" for kind, value in self.rate.items())
        return f"{self.isa}, {self.threads} threads, at most {rates}"


@dataclass(frozen=True)
class PlannedLaunch:
    """One row of a :class:`GpuPlan`, for the whole batch.

    Attributes:
        layers: the :class:`advkd.ops.conv_layer.ConvLayer` objects that one launch computes.
        kernel: one of :data:`advkd.ops.student_steps.KERNELS`, with its configuration.
        products: multiply-adds, up-sampling as four phases.
        moved_bytes: that the launch must read and write.
        measured: seconds of one launch alone in a graph, or None.
    """

    titles: ClassVar = ("layers", "kernel", "MMAC", "MB", "microseconds", "TFLOP/s", "GB/s")
    summed: ClassVar = ("products", "moved_bytes", "measured")

    layers: tuple[ConvLayer, ...]
    kernel: str
    products: int
    moved_bytes: int
    measured: float | None

    def names(self) -> tuple[str, str]:
        """The row's first two cells."""
        side, _ = output_sides(self.layers[-1])
        channels = " > ".join(str(c) for c in (self.layers[0].c_in, *(layer.c_out for layer in self.layers)))
        return f"{channels} at {side}x{side}", self.kernel

    @staticmethod
    def figures(products: int, moved: int, seconds: float | None) -> tuple[str, ...]:
        """The cells behind the names, of the values :attr:`summed`."""
        counts = f"{products / 1e6:.1f}", f"{moved / 1e6:.2f}"
        if seconds is None:
            return *counts, "-", "-", "-"
        return *counts, f"{1e6 * seconds:.1f}", f"{2e-12 * products / seconds:.1f}", f"{1e-9 * moved / seconds:.0f}"


@dataclass(frozen=True, repr=False)
class GpuPlan(Plan):
    """How a batch is computed on a GPU.

    Attributes:
        rows: a :class:`PlannedLaunch` per launch.
        batch_size: images of the batch.
        device: name of the device.
        product: how numbers are multiplied, one of :data:`advkd.ops.gpu_storage.PRODUCTS`.
    """

    batch_size: int
    device: str
    product: str

    @property
    def heading(self) -> str:
        """The device, the batch, and how numbers are multiplied."""
        return f"{self.device}, batch {self.batch_size}, products {self.product}"


def text_table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of text: the first two columns begin at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    align = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    return ["  ".join(f(cell, w) for f, cell, w in zip(align, line, widths)).rstrip() for line in lines]
