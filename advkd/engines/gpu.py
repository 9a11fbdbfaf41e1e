"""A GPU's engine: weights packed once, a plan of launches per batch size, each captured as a CUDA graph."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch

from ..errors import InputError
from ..ops import registry
from ..ops.conv_layer import DTYPES, ConvLayer, encode, is_image, output_sides
from ..ops.gpu_storage import input_channels, padded, product_of
from ..ops.student_forward import latent_numel
from ..ops.student_steps import Step, activation_shapes, encode_steps, pack_gpu, workspace_elements
from .base import Engine, Options, dtype_gap
from .gpu_search import Limits, fixed_steps, measured_steps, planned
from .plan import GpuPlan

_CAPTURES = threading.RLock()

BACKENDS = ("cuda", "triton")
"""The backends whose kernels these launches are."""

GRAPHS = 8
"""Batch sizes whose graphs are kept; the one that was used longest ago goes first."""


class GpuEngine(Engine):
    """The launches of one network on one device; see :class:`advkd.engines.base.Engine`.

    ``options``: ``backend``, ``cuda`` or ``triton``, has the kernels of the fixed plan. With ``tune`` each batch size's plan is
    measured once (kept on disk) instead; with ``mixed`` it may take the kernels of both backends.

    Calls from several threads and streams are safe: they run one after the other.
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
        self.layers, self.weights, self.biases, self.slope, self.dtype = layers, weights, biases, slope, dtype
        self.options, self.backend, self.product = options, options.backend, product_of(dtype)
        self.device = weights[0].device
        able = [b for b in BACKENDS if options.mixed and registry.gap("student_forward", b, self.device) is None]
        self.candidates = tuple(able) or (self.backend,)
        self.limits = Limits.of(self.device)
        self.numel, self.numbers = latent_numel(layers), encode(layers, dtype)
        self._packed: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
        self._steps: dict[int, list[Step]] = {}
        self._graphs: OrderedDict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = OrderedDict()
        self._asked: set[int] = set()
        self._stream: torch.cuda.Stream | None = None
        self._lock, self._pool, self._used = threading.RLock(), None, None

    @staticmethod
    def gap(layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device) -> str | None:
        """The reason why the kernels cannot run here, or None."""
        gaps = list(filter(None, (registry.gap("student_forward", backend, device) for backend in BACKENDS)))
        if len(gaps) == len(BACKENDS):
            return "; ".join(gaps)
        shape = None if is_image(layers[-1]) else "the last layer must make 1 to 4 channels by tanh without up-sampling"
        return shape or dtype_gap(dtype, DTYPES)

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Images ``(N, C, S, S)`` of latents ``(N, numel)``, a tensor of their own."""
        if z.ndim != 2 or z.shape[1] != self.numel:
            raise InputError(f"z must have shape (N, {self.numel}), got {tuple(z.shape)}")
        if z.device != self.device:
            raise InputError(f"z must be on {self.device}, got {z.device}")
        if self.device.type != "cuda" or len(z) == 0:
            return self.run(z)
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                self._require_ready(len(z))
                return self.run(z)
            with self._lock:
                return self._replay(z)

    def _require_ready(self, n):
        # Inside a capture nothing can be measured or packed: it would be recorded, not done.
        steps = self._steps.get(n, [])
        forms = [(i, s.form(i, len(self.layers) - 1)) for s in steps for i in range(s.first, s.first + s.count)]
        if not forms or any(key not in self._packed for key in forms):
            again = "(twice if larger ones were drawn before: the first draw takes their graph)"
            raise InputError(f"draw a batch of {n} images before capturing it in a CUDA graph {again}")

    def _replay(self, z):
        current = torch.cuda.current_stream()
        if self._used is not None:
            current.wait_event(self._used)
        graph, latents, images = self._graph(self.batch_of(len(z)))
        latents.record_stream(current)
        latents[: len(z)].copy_(z)
        graph.replay()
        found = images[: len(z)].clone()
        self._used = current.record_event()
        return found

    def batch_of(self, n: int) -> int:
        """The batch size whose graph draws ``n`` images: a larger one's the first time, as the rest of a run comes once."""
        larger = [m for m in self._graphs if m > n]
        if n in self._graphs or n in self._asked or not larger:
            return n
        self._asked.add(n)
        return min(larger)

    def run(self, z: torch.Tensor) -> torch.Tensor:
        """The same without a graph: one launch after the other."""
        return torch.ops.advkd.student_forward(z.contiguous(), *self.arguments(len(z)))

    def arguments(self, n: int) -> tuple:
        """The op's arguments behind the latents of ``n`` images."""
        steps = self.steps(n)
        packed, biases = [], []
        for step in steps:
            for i in range(step.first, step.first + step.count):
                weight, bias = self._pack(i, step.form(i, len(self.layers) - 1))
                packed.append(weight)
                biases.append(bias)
        return [], biases, packed, self.numbers, encode_steps(steps, self.product), self.slope, self.backend

    def steps(self, n: int) -> list[Step]:
        """The plan for ``n`` images, chosen when it is first asked for."""
        if n not in self._steps:
            with self._lock:
                choose = measured_steps if self.options.tune and self.device.type == "cuda" else fixed_steps
                self._steps[n] = choose(self, max(n, 1))
        return self._steps[n]

    def step_tensors(self, step: Step, n: int) -> tuple[torch.Tensor, torch.Tensor, list, list]:
        """A step's input and output of ``n`` images, its input random, and all layers' weights and biases (those it reads)."""
        first, last = self.layers[step.first], self.layers[step.first + step.count - 1]
        shape = (n, first.height, first.width, input_channels(first))
        x = torch.randn(shape, dtype=torch.float32, device=self.device).to(self.dtype)
        sides = output_sides(last)
        image = step.first + step.count == len(self.layers)
        shape = (n, last.c_out, *sides) if image else (n, *sides, padded(last.c_out))
        pairs = {i: self._pack(i, step.form(i, len(self.layers) - 1)) for i in range(step.first, step.first + step.count)}
        packed, biases = ([pairs[i][k] if i in pairs else None for i in range(len(self.layers))] for k in range(2))
        return x, x.new_empty(shape), packed, biases

    def plan(self, batch_size: int, measured: bool) -> GpuPlan:
        """The launches of a batch; with ``measured``, on a CUDA device, each is run a few times."""
        return planned(self, batch_size, measured)

    def memory(self, batch_size: int) -> dict[str, int]:
        """Bytes of the ``weights`` packed so far and of the ``workspace`` between the launches."""
        workspace = self.workspace_bytes(batch_size)
        return {"weights": self.packed_bytes(), "workspace": workspace}

    def workspace_bytes(self, n: int) -> int:
        """Bytes of the activations between the launches for ``n`` images."""
        return self.dtype.itemsize * workspace_elements(activation_shapes(self.steps(n), self.layers, n))

    def packed_bytes(self) -> int:
        """Bytes of the weights packed so far."""
        return sum(t.numel() * t.element_size() for pair in self._packed.values() for t in pair)

    def _pack(self, i, form):
        if (i, form) not in self._packed:
            self._packed[i, form] = pack_gpu(self.weights[i], self.biases[i], self.layers[i], self.dtype, form, self.product)
        return self._packed[i, form]

    def _graph(self, n):
        """``(graph, its latents, its images)`` of a batch size, captured when it is first asked for."""
        if n in self._graphs:
            self._graphs.move_to_end(n)
            return self._graphs[n]
        while len(self._graphs) >= GRAPHS:
            self._used.synchronize()
            self._graphs.popitem(last=False)
        with self.on_own_stream() as stream:
            latents = torch.zeros(n, self.numel, dtype=torch.float32, device=self.device)
            # Compiling, loading and packing, which the first run does, must not be inside the graph.
            self.run(latents)
            # Graphs of one stream run one after the other and share memory; images that must outlive a replay are copied.
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                images = self.run(latents)
        self._graphs[n] = graph, latents, images
        return self._graphs[n]

    @contextlib.contextmanager
    def on_own_stream(self) -> Iterator[torch.cuda.Stream]:
        """A context whose work goes to the engine's stream, behind the caller's work so far and before the caller's next.

        Tensors made inside may be written to later, whatever the mode of the caller; torch captures one graph at a time.
        """
        with self._lock, _CAPTURES, torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
            caller = torch.cuda.current_stream()
            self._stream = own = self._stream or torch.cuda.Stream()
            own.wait_stream(caller)
            with torch.cuda.stream(own):
                yield own
            caller.wait_stream(own)
