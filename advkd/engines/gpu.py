"""Runs a fused student on a GPU: weights packed once, a plan of launches per batch size, each captured as a CUDA graph."""

import contextlib
import threading
from collections import OrderedDict

import torch

from ..errors import InputError
from ..ops.conv_layer import encode, output_sides
from ..ops.gpu_storage import input_channels, padded, product_of
from ..ops.student_steps import activation_shapes, encode_steps, pack_gpu, workspace_elements
from .gpu_search import Limits, fixed_steps, measured_steps

_CAPTURES = threading.RLock()

GRAPHS = 8
"""Batch sizes whose graphs are kept; the one that was used longest ago goes first."""


class GpuEngine:
    """The launches of one network on one device.

    Args:
        layers: its :class:`advkd.ops.conv_layer.ConvLayer`.
        weights, biases: folded, on the device.
        slope: of LeakyReLU.
        dtype: of activations and images.
        backend: ``cuda`` or ``triton``: whose kernels the fixed plan takes.
        tune: measure each batch size's plan once (kept on disk) instead of taking the fixed one.
        candidates: the backends whose kernels a measured plan may take.

    Calls from several threads and streams are safe: they run one after the other.
    """

    def __init__(self, layers, weights, biases, slope, dtype, backend, tune=False, candidates=()):
        self.layers, self.slope, self.dtype, self.backend = layers, slope, dtype, backend
        self.tune, self.candidates = tune, candidates or (backend,)
        self.product = product_of(dtype)
        self.device = weights[0].device
        self.limits = Limits.of(self.device)
        self._folded = list(zip(weights, biases, strict=True))
        self._packed, self._steps, self._graphs, self._asked = {}, {}, OrderedDict(), set()
        self._lock, self._stream, self._pool, self._used = threading.RLock(), None, None, None

    def __call__(self, z):
        """Images ``(N, C, S, S)`` of latents ``(N, numel)``, a tensor of their own."""
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

    def batch_of(self, n):
        """The batch size whose graph draws ``n`` images: a larger one's the first time, as what is left of a run comes once."""
        larger = [m for m in self._graphs if m > n]
        if n in self._graphs or n in self._asked or not larger:
            return n
        self._asked.add(n)
        return min(larger)

    def run(self, z):
        """The same without a graph: one launch after the other."""
        return torch.ops.advkd.student_forward(z.contiguous(), *self.arguments(len(z)))

    def arguments(self, n):
        """The op's arguments behind the latents of ``n`` images."""
        steps = self.steps(n)
        packed, biases = [], []
        for step in steps:
            for i in range(step.first, step.first + step.count):
                weight, bias = self._pack(i, step.form(i, len(self.layers) - 1))
                packed.append(weight)
                biases.append(bias)
        numbers = encode(self.layers, self.dtype)
        return [], biases, packed, numbers, encode_steps(steps, self.product), self.slope, self.backend

    def steps(self, n):
        """The plan for ``n`` images, chosen when it is first asked for."""
        if n not in self._steps:
            with self._lock:
                choose = measured_steps if self.tune and self.device.type == "cuda" else fixed_steps
                self._steps[n] = choose(self, max(n, 1))
        return self._steps[n]

    def step_tensors(self, step, n):
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

    def workspace_bytes(self, n):
        """Bytes of the activations between the launches for ``n`` images."""
        return self.dtype.itemsize * workspace_elements(activation_shapes(self.steps(n), self.layers, n))

    def packed_bytes(self):
        """Bytes of the weights packed so far."""
        return sum(t.numel() * t.element_size() for pair in self._packed.values() for t in pair)

    def _pack(self, i, form):
        if (i, form) not in self._packed:
            self._packed[i, form] = pack_gpu(*self._folded[i], self.layers[i], self.dtype, form, self.product)
        return self._packed[i, form]

    def _graph(self, n):
        """``(graph, its latents, its images)`` of a batch size, captured when it is first asked for."""
        if n in self._graphs:
            self._graphs.move_to_end(n)
            return self._graphs[n]
        while len(self._graphs) >= GRAPHS:
            self._used.synchronize()
            self._graphs.popitem(last=False)
        numel = self.layers[0].c_in * self.layers[0].height * self.layers[0].width
        numel += sum(layer.detail * layer.height * layer.width for layer in self.layers)
        with self.on_own_stream() as stream:
            latents = torch.zeros(n, numel, dtype=torch.float32, device=self.device)
            # What is compiled, loaded and packed the first time must not be inside the graph.
            self.run(latents)
            # Graphs of one stream that run one after the other share memory; what must outlive a replay is copied from it.
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                images = self.run(latents)
        self._graphs[n] = graph, latents, images
        return self._graphs[n]

    @contextlib.contextmanager
    def on_own_stream(self):
        """What runs inside goes to the engine's stream, behind the caller's work and before what the caller does next.

        Tensors made inside may be written to later, whatever the mode of the caller; torch captures one graph at a time.
        """
        with self._lock, _CAPTURES, torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
            caller, self._stream = torch.cuda.current_stream(), self._stream or torch.cuda.Stream()
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                yield self._stream
            caller.wait_stream(self._stream)
