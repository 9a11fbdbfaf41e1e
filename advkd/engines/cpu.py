"""Which algorithm computes each layer of a fused student on the CPU: a small measured search, kept, and a table of it."""

import logging
import re
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..ops.conv_block import ALGORITHMS, CPU_DTYPES
from ..ops.student_forward import pack
from ..runtime.files import read_json, write_json
from ..runtime.folders import cache_folder
from ..runtime.timing import processor_identity

VERSION = 1
"""Of the kernels as a search sees them: raised when their speed changes, so that kept choices are measured anew."""

SECONDS = 0.02
"""Aim for the time that one candidate's runs take together."""

KEEP = 1.03
"""An algorithm must be so many times faster to take the place of one with smaller tiles: a tie is not decided by noise. F(6x6)
is allowed everywhere: in float32 a network of nothing else stays within 1e-4 of the range (as tests show)."""

_LOG = logging.getLogger(__name__)


def choose_algorithms(layers, dtype):
    """The fastest algorithm of every layer here, as names: from the cache, else measured once and kept there.

    A choice holds for a layer's shape, the dtype, the processor's model and its instruction set; never for a batch or a number
    of threads, so that neither changes an image. What is measured is the time per image of one image and, where low
    resolutions go through the network together, of eight.
    """
    path = kept_file(processor_identity())
    known, found = _read(path), {}
    for layer in dict.fromkeys(layers):
        key = _key(layer, dtype)
        if len(layer.algorithms()) > 1 and known.get(key) not in layer.algorithms():
            found[key] = _fastest(layer, dtype)
    if found and path is not None:
        _LOG.info("measured %d layers; the choices are kept in %s", len(found), path)
        _keep(path, found)
    known.update(found)
    return tuple(known[_key(i, dtype)] if len(i.algorithms()) > 1 else i.algorithms()[0] for i in layers)


def kept_file(hardware):
    """The file of what was measured on some hardware, in the user's cache folder; None, with a warning, where that has none."""
    try:
        return cache_folder() / "plans" / f"{re.sub(r'[^a-z0-9]+', '-', hardware.lower()).strip('-')}.json"
    except (OSError, InputError) as error:
        _LOG.warning("nothing measured is kept (%s)", error)
        return None


def _key(layer, dtype):
    shape = f"{layer.c_in}-{layer.c_out}, {layer.height}x{layer.width}{', up' if layer.upsample else ''}"
    return f"{shape}, {str(dtype).removeprefix('torch.')}, {torch.ops.advkd_cpu.isa()}"


def _read(path):
    """Kept choices; a file that is damaged, or of other kernels, counts as none, and so does what is no algorithm's name."""
    if path is None:
        return {}
    try:
        stored = read_json(path, "kept plan", ("version", "algorithms"))
    except InputError:
        return {}
    if stored["version"] != VERSION or not isinstance(stored["algorithms"], dict):
        return {}
    return {key: name for key, name in stored["algorithms"].items() if name in ALGORITHMS}


def _keep(path, found):
    # Another process may have added its own since.
    try:
        write_json(path, {"version": VERSION, "algorithms": dict(sorted({**_read(path), **found}.items()))})
    except (OSError, InputError) as error:
        _LOG.warning("the measured plan is not kept: %s (%s)", path, error)


def _fastest(layer, dtype):
    kind = {"dtype": torch.float32, "device": "cpu"}
    weight, bias = torch.full((layer.c_out, layer.c_in, 3, 3), 0.01, **kind), torch.zeros(layer.c_out, **kind)
    batches = (1, 8) if layer.height * layer.width < 64 * 64 else (1,)
    packed = {name: pack(weight, bias, layer, dtype, name) for name in layer.algorithms()}

    def seconds(name, repeats):
        numbers = layer.numbers(dtype, name)
        return sum(torch.ops.advkd_cpu.conv_seconds(packed[name], numbers, n, repeats) / n for n in batches)

    first = {name: seconds(name, 1) for name in packed}
    hopeful = [name for name in packed if first[name] < 2 * min(first.values())]
    repeats = max(2, min(30, int(SECONDS / sum(batches) / min(first.values()))))
    times = {name: seconds(name, repeats) for name in hopeful}
    chosen = hopeful[0]
    for name in hopeful:
        if KEEP * times[name] < times[chosen]:
            chosen = name
    return chosen


def text_table(lines):
    """Rows of cells as lines of text: the first two columns begin at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    align = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    return ["  ".join(f(cell, w) for f, cell, w in zip(align, line, widths)).rstrip() for line in lines]


@dataclass(frozen=True)
class PlannedLayer:
    """One row of a :class:`Plan`: multiply-adds are per image, times seconds for one image.

    Attributes:
        layer: the :class:`advkd.ops.conv_block.ConvLayer`.
        algorithm: one of :data:`advkd.ops.conv_block.ALGORITHMS`.
        direct_products: multiply-adds of the layer as it is defined, on the up-sampled tensor.
        products: those that the algorithm makes, transforms left out.
        predicted: ``products`` at the rate that the processor reaches in registers.
        measured: shortest of several runs, or None.
    """

    layer: object
    algorithm: str
    direct_products: int
    products: int
    predicted: float
    measured: float | None


@dataclass(frozen=True, repr=False)
class Plan:
    """How every layer is computed; ``print(plan)`` shows it.

    Attributes:
        rows: a :class:`PlannedLayer` per convolution.
        rate: multiply-adds per second in registers, all threads together, per dtype of the products.
        isa: the instruction set.
        threads: torch's threads.
    """

    rows: tuple
    rate: dict
    isa: str
    threads: int

    @classmethod
    def of(cls, layers, algorithms, dtype, packed, measured=True):
        """The plan of packed layers; with ``measured`` each layer is run a few times."""
        ops = torch.ops.advkd_cpu
        rate = {kind: ops.product_rate(i, 0.02) for i, kind in enumerate(CPU_DTYPES) if kind in (dtype, torch.float32)}
        rows = []
        for layer, algorithm, weights in zip(layers, algorithms, packed, strict=True):
            numbers = layer.numbers(dtype, algorithm)
            products, direct = ops.conv_products(numbers)
            predicted = products / rate[layer.products(dtype, algorithm)]
            repeats = max(3, min(30, int(SECONDS / predicted)))
            seconds = ops.conv_seconds(weights, numbers, 1, repeats) if measured else None
            rows.append(PlannedLayer(layer, algorithm, direct, products, predicted, seconds))
        return cls(tuple(rows), rate, ops.isa(), torch.get_num_threads())

    def __str__(self):
        titles = ("layer", "algorithm", "direct MMAC", "made MMAC", "predicted ms", "measured ms", "direct GMAC/s")
        lines = [titles, *(_cells(row) for row in self.rows), self._total()]
        text = text_table(lines)
        rates = ", ".join(f"{value / 1e9:.0f} GMAC/s {str(kind).removeprefix('torch.')}" for kind, value in self.rate.items())
        return "\n".join([f"{self.isa}, {self.threads} threads, at most {rates}", *text])

    __repr__ = __str__

    def _total(self):
        measured = [row.measured for row in self.rows]
        whole = None if None in measured else sum(measured)
        sums = [sum(getattr(row, name) for row in self.rows) for name in ("direct_products", "products", "predicted")]
        return ("all", "", *_figures(*sums, whole))


def _cells(row):
    layer = row.layer
    up = f"up to {2 * layer.height}x{2 * layer.width}" if layer.upsample else f"at {layer.height}x{layer.width}"
    figures = _figures(row.direct_products, row.products, row.predicted, row.measured)
    return (f"{layer.c_in} -> {layer.c_out} {up}", row.algorithm, *figures)


def _figures(direct, products, predicted, measured):
    times = f"{1e3 * predicted:.3f}", "-" if measured is None else f"{1e3 * measured:.3f}"
    return f"{direct / 1e6:.1f}", f"{products / 1e6:.1f}", *times, "-" if measured is None else f"{direct / measured / 1e9:.0f}"
