"""The CPU's engine: weights packed once, and for each layer an algorithm, chosen by a small measured search that is kept."""

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..ops import registry
from ..ops.conv_layer import CPU_DTYPES, ConvLayer, encode, pack
from ..ops.student_forward import latent_numel, require_latents
from .base import Engine, Options, dtype_gap
from .kept import kept_algorithms
from .plan import CpuPlan, PlannedLayer

SECONDS = 0.02
"""Target total run time per candidate, in seconds."""

KEEP = 1.03
"""An algorithm must be so many times faster to take the place of one with smaller tiles: a tie is not decided by noise. F(6x6)
is allowed everywhere: in float32 a network of nothing else stays within 1e-4 of the range (as tests show)."""

_LOG = logging.getLogger(__name__)


class CpuEngine(Engine):
    """The C++ kernels; see :class:`advkd.engines.base.Engine`.

    Weights are kept as they come: a saved student is packed anew for the processor that loads it.
    """

    def __init__(
        self,
        layers: Sequence[ConvLayer],
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        slope: float,
        dtype: torch.dtype,
        options: Options,
    ):
        algorithms = options.algorithms or tuple(layer.default(dtype) for layer in layers)
        self.layers, self.weights, self.biases, self.slope, self.dtype = layers, weights, biases, slope, dtype
        self.options = replace(options, algorithms=algorithms)
        parts = zip(weights, biases, layers, algorithms, strict=True)
        self.packed = [pack(weight, bias, layer, dtype, algorithm) for weight, bias, layer, algorithm in parts]
        self.numel, self.numbers = latent_numel(layers), encode(layers, dtype, algorithms)
        # Idle workspaces go with the engine; one that is still in use elsewhere makes its own anew.
        weakref.finalize(self, torch.ops.advkd_cpu.clear_workspaces).atexit = False  # type: ignore[misc]

    @staticmethod
    def gap(layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device) -> str | None:
        """The reason why the kernels cannot run here, or None."""
        return registry.gap("student_forward", "cpu", device) or dtype_gap(dtype, CPU_DTYPES)

    @staticmethod
    def search(layers: Sequence[ConvLayer], dtype: torch.dtype) -> tuple[str, ...]:
        """The fastest algorithm of every layer; see :func:`choose_algorithms`."""
        return choose_algorithms(layers, dtype)

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Images ``(N, C, S, S)`` of latents ``(N, numel)``."""
        require_latents(z, self.numel, self.weights[0].device)
        z = z.float().contiguous()
        return torch.ops.advkd.student_forward(z, [], [], self.packed, self.numbers, [], self.slope, "cpu")

    def plan(self, batch_size: int, measured: bool) -> CpuPlan:
        """How every layer is computed, whatever the batch; with ``measured`` each is run a few times."""
        ops = torch.ops.advkd_cpu
        rate = {kind: ops.product_rate(i, 0.02) for i, kind in enumerate(CPU_DTYPES) if kind in (self.dtype, torch.float32)}
        parts = zip(self.layers, self.options.algorithms, self.packed, strict=True)
        rows = tuple(_planned(*part, self.dtype, rate, measured) for part in parts)
        return CpuPlan(rows, rate, ops.isa(), torch.get_num_threads())

    def memory(self, batch_size: int) -> dict[str, int]:
        """Bytes of packed ``weights`` and of the ``workspace``, for torch's current number of threads."""
        workspace = torch.ops.advkd_cpu.workspace_bytes(self.numbers, batch_size)
        return {"weights": sum(packed.numel() for packed in self.packed), "workspace": workspace}


def _planned(layer, algorithm, packed, dtype, rate, measured):
    """A layer's row of the plan."""
    ops, numbers = torch.ops.advkd_cpu, layer.numbers(dtype, algorithm)
    products, direct = ops.conv_products(numbers)
    predicted = products / rate[layer.products(dtype, algorithm)]
    repeats = max(3, min(30, int(SECONDS / predicted)))
    seconds = ops.conv_seconds(packed, numbers, 1, repeats) if measured else None
    return PlannedLayer(layer, algorithm, direct, products, predicted, seconds)


def choose_algorithms(layers: Sequence[ConvLayer], dtype: torch.dtype) -> tuple[str, ...]:
    """The fastest algorithm of every layer here, as names: from the cache, else measured once and kept there.

    A choice holds for a layer's shape, the dtype, the processor's model and its instruction set; never for a batch or a number
    of threads, so that neither changes an image. The measured quantity is the time per image of one image and, where low
    resolutions go through the network together, of eight.
    """
    kept = kept_algorithms()
    for layer in dict.fromkeys(layers):
        key = _key(layer, dtype)
        if len(layer.algorithms()) > 1 and kept.known.get(key) not in layer.algorithms():
            kept.add(key, _fastest(layer, dtype))
    if kept.found and kept.path is not None:
        _LOG.info("measured %d layers; the choices are kept in %s", len(kept.found), kept.path)
        kept.keep()
    return tuple(kept.known[_key(i, dtype)] if len(i.algorithms()) > 1 else i.algorithms()[0] for i in layers)


def _key(layer, dtype):
    shape = f"{layer.c_in}-{layer.c_out}, {layer.height}x{layer.width}{', up' if layer.upsample else ''}"
    return f"{shape}, {str(dtype).removeprefix('torch.')}, {torch.ops.advkd_cpu.isa()}"


def _fastest(layer, dtype):
    kind = {"dtype": torch.float32, "device": "cpu"}
    weight, bias = torch.full((layer.c_out, layer.c_in, 3, 3), 0.01, **kind), torch.zeros(layer.c_out, **kind)
    batches = (1, 8) if layer.height * layer.width < 64 * 64 else (1,)
    packed = {name: pack(weight, bias, layer, dtype, name) for name in layer.algorithms()}

    def seconds(name, repeats):
        numbers = layer.numbers(dtype, name)
        return sum(torch.ops.advkd_cpu.conv_seconds(packed[name], numbers, n, repeats) / n for n in batches)

    first = {name: seconds(name, 1) for name in packed}
    finalists = [name for name in packed if first[name] < 2 * min(first.values())]
    repeats = max(2, min(30, int(SECONDS / sum(batches) / min(first.values()))))
    times = {name: seconds(name, repeats) for name in finalists}
    chosen = finalists[0]
    for name in finalists:
        if KEEP * times[name] < times[chosen]:
            chosen = name
    return chosen
