"""Choice of a fused student's kernels on a GPU: the chain of launches that takes least time, predicted or measured.

Every launch that can stand for one convolution or several is a candidate; a plan is the cheapest way through the network. The
fixed plan counts bytes and launches, a tuned one measures each candidate once and keeps the seconds on disk.
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from ..ops.conv_layer import ConvLayer, is_image, output_sides
from ..ops.gpu_storage import PRODUCTS, device_limits, input_channels, padded, stem_numbers
from ..ops.registry import cuda_query
from ..ops.student_steps import Step, run_step, triton_launcher, triton_layer, triton_precision
from ..runtime.hub import reason
from .kept import Kept, device_name, kept_times
from .plan import GpuPlan, PlannedLaunch

BYTES_PER_SECOND = 3e12
LAUNCH = 4e-6
"""A device as the fixed plan assumes it: memory's speed, and the least that a launch takes inside a graph."""

PRODUCTS_PER_SECOND = {"bf16": 2.4e14, "f16": 2.4e14, "tf32": 1.2e14, "f32": 4e13}
"""Multiply-adds of the whole device by these kernels' instructions; one multiprocessor has a fair share of them."""

STEM_BYTES, STEM_LAYER = 8e10, 6e-7
"""A stem's block: bytes of weights per second from L2, and seconds between two layers."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """A device's limits: multiprocessors, bytes of shared memory that a block may have, compute capability."""

    multiprocessors: int
    shared: int
    capability: tuple[int, int]

    @classmethod
    def of(cls, device: torch.device) -> "Limits":
        """Those of a CUDA device; of any other those of a common one, for kernels that are interpreted or emulated."""
        if device.type != "cuda":
            return cls(108, 163 * 1024, (8, 0))
        return cls(*device_limits(device), torch.cuda.get_device_capability(device))


class Network(Protocol):
    """The part of an engine that a search reads; see :class:`advkd.engines.gpu.GpuEngine`."""

    layers: Sequence[ConvLayer]
    slope: float
    dtype: torch.dtype
    product: str
    device: torch.device
    limits: Limits
    backend: str
    candidates: tuple[str, ...]

    def steps(self, n: int) -> list[Step]:
        """The plan for ``n`` images."""

    def step_tensors(self, step: Step, n: int) -> tuple[torch.Tensor, torch.Tensor, list, list]:
        """A step's input and output, and all layers' weights and biases."""

    def on_own_stream(self) -> AbstractContextManager[torch.cuda.Stream]:
        """The engine's stream, around which the caller's waits."""


def fixed_steps(engine: Network, n: int) -> list[Step]:
    """The plan for batches of ``n`` that is taken without a measurement."""
    candidates = all_steps(engine, n, (engine.backend,), tune=False)
    return cheapest(len(engine.layers), candidates, lambda step: predicted_seconds(engine, step, n))


def measured_steps(engine: Network, n: int) -> list[Step]:
    """The plan for batches of ``n`` whose launches, each measured alone, take least time together."""
    times = kept_times(engine.device)
    candidates = all_steps(engine, n, engine.candidates, tune=True)
    steps = cheapest(len(engine.layers), candidates, lambda s: known_seconds(times, _key(engine, s, n), engine, s, n))
    times.keep()
    return steps


def cheapest(count: int, candidates: Sequence[Step], cost: Callable[[Step], float]) -> list[Step]:
    """The chain of steps through ``count`` layers whose costs add up to the least."""
    best: dict[int, tuple[float, list[Step]]] = {count: (0.0, [])}
    for first in reversed(range(count)):
        ways = [(cost(s) + best[s.first + s.count][0], s) for s in candidates if s.first == first and s.first + s.count in best]
        if ways:
            total, step = min(ways, key=lambda way: way[0])
            best[first] = (total, [step, *best[first + step.count][1]])
    if not math.isfinite(best[0][0]):
        raise RuntimeError("no chain of kernels can run this network here; the log says why")
    return best[0][1]


def all_steps(engine: Network, n: int, backends: Sequence[str], tune: bool) -> list[Step]:
    """Every launch that the kernels of ``backends`` can do for batches of ``n``; without ``tune`` one tile of Triton's each.

    Triton's descriptor variant is among them with ``tune`` alone, on devices that have what it needs.
    """
    layers, steps = engine.layers, []
    for i, layer in enumerate(layers):
        kind = "image" if is_image(layer) else "conv"
        if "triton" in backends:
            steps += [Step(f"triton_{kind}", i, 1, config) for config in _triton_configs(engine, layer, n, tune)]
        if "triton" in backends and tune:
            steps += [Step("triton_descriptor", i, 1, config) for config in _descriptor_configs(engine, layer, n)]
        if "cuda" in backends:
            steps.append(Step(kind, i))
    if "cuda" in backends:
        steps += [Step("pair", i, 2) for i in range(len(layers) - 1) if _pair_fits(engine, i)]
        steps += _stems(engine, n)
    return steps


def _triton_configs(engine, layer, n, tune):
    options = (triton_layer(layer), n, engine.dtype, triton_precision(engine.product))
    if tune:
        return [tuple(config) for config in triton_launcher("configs")(*options, engine.limits.shared)]
    return [tuple(triton_launcher("default")(*options))]


def _descriptor_configs(engine, layer, n):
    options = (triton_layer(layer), n, engine.dtype, engine.limits.capability, engine.limits.shared)
    return [tuple(config) for config in triton_launcher("descriptor_configs")(*options)]


def _pair_fits(engine, i):
    first, second = engine.layers[i : i + 2]
    if second.upsample or second.detail or is_image(first):
        return False
    image = is_image(second)
    c_out = second.c_out if image else padded(second.c_out)
    channels = (input_channels(first), padded(first.c_out), c_out)
    product = PRODUCTS.index(engine.product)
    return cuda_query("pair_fits")(*channels, first.upsample, image, product, engine.limits.shared)


def stem_layers(layers: Sequence[ConvLayer], product: str, images: int, shared: int) -> int:
    """The number of leading layers that one launch can do with ``shared`` bytes of shared memory.

    These have LeakyReLU and no detail, begin with 4x4 pixels and end with at most 32x32.

    Args:
        product: one of :data:`advkd.ops.gpu_storage.PRODUCTS`.
        images: images of a group.
    """
    leading = list(itertools.takewhile(lambda layer: not layer.detail and layer.activation == "leaky_relu", layers))
    return cuda_query("stem_layers")(stem_numbers(leading), PRODUCTS.index(product), images, shared)


def _stems(engine, n):
    """Stems that end where the resolution changes, by blocks per cluster and images per cluster."""
    layers, found = engine.layers, []
    clusters = (1, 2, 4, 8) if engine.limits.capability >= (9, 0) else (1,)
    for images in (1, 2, 4):
        if images > n:
            continue
        most = stem_layers(layers, engine.product, images, engine.limits.shared)
        ends = [k for k in range(2, most + 1) if k == len(layers) or layers[k].upsample or k == most]
        found += [Step("stem", 0, end, (cluster, images)) for end in ends for cluster in clusters]
    return found


def predicted_seconds(engine: Network, step: Step, n: int) -> float:
    """Seconds of a step for ``n`` images by its bytes and products alone."""
    if step.kernel == "stem":
        return LAUNCH + _stem_seconds(engine, step, n)
    own = engine.layers[step.first : step.first + step.count]
    # A pair computes the pixels around its tiles of 16 x 16 again.
    again = (18 / 16) ** 2 if step.kernel == "pair" else 1.0
    products = n * (again * phase_products(own[0]) + sum(map(phase_products, own[1:])))
    return LAUNCH + max(step_bytes(engine, step, n) / BYTES_PER_SECOND, products / PRODUCTS_PER_SECOND[engine.product])


def _stem_seconds(engine, step, n):
    cluster, images = step.config
    processors = engine.limits.multiprocessors
    groups = -(-n // images)
    rate = PRODUCTS_PER_SECOND[engine.product] / processors
    seconds = 0.0
    for layer in engine.layers[: step.count]:
        weights = engine.dtype.itemsize * (16 if layer.upsample else 9) * input_channels(layer) * padded(layer.c_out)
        busy = max(images * phase_products(layer) / rate, weights / STEM_BYTES) / cluster
        seconds += busy + STEM_LAYER
    # One block on a multiprocessor at a time.
    return -(-groups * cluster // processors) * seconds


def step_bytes(engine: Network, step: Step, n: int) -> int:
    """Bytes of activations and weights that a step must read and write for ``n`` images."""
    own = engine.layers[step.first : step.first + step.count]
    sides = math.prod(output_sides(own[-1]))
    activations = own[0].height * own[0].width * input_channels(own[0]) + sides * padded(own[-1].c_out)
    weights = sum((16 if layer.upsample else 9) * input_channels(layer) * padded(layer.c_out) for layer in own)
    return engine.dtype.itemsize * (n * activations + weights)


def phase_products(layer: ConvLayer) -> int:
    """Multiply-adds of a layer for one image, up-sampling as four phases of four taps."""
    return (16 if layer.upsample else 9) * layer.c_in * layer.c_out * layer.height * layer.width


def _key(engine, step, n):
    """The launch that a measured time belongs to, as text."""
    own = engine.layers[step.first : step.first + step.count]
    shapes = "; ".join(" ".join(map(str, (*stem_numbers([layer]), layer.c_out, layer.activation))) for layer in own)
    return f"{_named(step)}, {engine.product}, batch {n}: {shapes}"


def _named(step):
    return " ".join((step.kernel, "x".join(map(str, step.config)))).strip()


def known_seconds(times: Kept, key: str, engine: Network, step: Step, n: int) -> float:
    """Seconds of a step for ``n`` images, measured if they are not known; infinite for one that does not run here."""
    if key not in times.known:
        if not times.found:
            _LOG.warning("measuring kernels for batches of %d (once: the times are kept in %s)", n, times.path or "memory")
        times.add(key, _measure(key, engine, step, n))
    return times.known[key]


def _measure(key, engine, step, n):
    try:
        return step_seconds(engine, step, n)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a tile too large for the device, in each compiler's own kind of error
        # A device that is broken says so here, and ends the search.
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        _LOG.warning("%s is passed over: %s", key, reason(error))
        return math.inf


def step_seconds(engine: Network, step: Step, n: int, launches: int = 10, repeats: int = 5) -> float:
    """Seconds of one launch among others of its kind, in a CUDA graph: the median of ``repeats`` graphs of ``launches``."""
    with engine.on_own_stream() as stream:
        x, out, packed, biases = engine.step_tensors(step, n)

        def launch():
            run_step(step, engine.layers, x, packed, biases, out, engine.slope, engine.product)

        launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(launches):
                launch()
        # The first one is cold.
        times = [_replay_seconds(graph) / launches for _ in range(repeats + 1)][1:]
    return sorted(times)[repeats // 2]


def _replay_seconds(graph):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def planned(engine: Network, batch_size: int, measured: bool) -> GpuPlan:
    """The plan of an engine; with ``measured``, on a CUDA device, each launch is run a few times."""
    rows = []
    for step in engine.steps(batch_size):
        seconds = step_seconds(engine, step, batch_size) if measured and engine.device.type == "cuda" else None
        own = tuple(engine.layers[step.first : step.first + step.count])
        products = batch_size * sum(map(phase_products, own))
        rows.append(PlannedLaunch(own, _named(step), products, step_bytes(engine, step, batch_size), seconds))
    return GpuPlan(tuple(rows), batch_size, device_name(engine.device), engine.product)
