"""Runs a fused student on a GPU: weights packed once, a plan of launches per batch size, each captured as a CUDA graph."""

import threading
from collections import OrderedDict

import torch

from .gpu_plan import Limits, fixed_steps, measured_steps
from .ops.gpu_layers import input_channels, padded, product_of
from .ops.student_forward import encode
from .ops.student_gpu import activation_shapes, encode_steps, output_sides, pack_gpu, workspace_elements

GRAPHS = 8
"""Batch sizes whose graphs are kept; the one that was used longest ago goes first."""


class GpuEngine:
    """The launches of one network on one device.

    Args:
        layers: its :class:`advkd.ops.conv_block.ConvLayer`.
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
        self._packed, self._steps, self._graphs = {}, {}, OrderedDict()
        self._lock, self._pool, self._used = threading.RLock(), None, None

    def __call__(self, z):
        """Images ``(N, C, S, S)`` of latents ``(N, numel)``, a tensor of their own."""
        if self.device.type != "cuda" or len(z) == 0 or torch.cuda.is_current_stream_capturing():
            return self.run(z)
        with self._lock, torch.cuda.device(self.device):
            if self._used is not None:
                torch.cuda.current_stream().wait_event(self._used)
            graph, latents, images = self._graph(len(z))
            latents.copy_(z)
            graph.replay()
            found = images.clone()
            self._used = torch.cuda.current_stream().record_event()
            return found

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
        with self._lock:
            if n not in self._steps:
                choose = measured_steps if self.tune and self.device.type == "cuda" else fixed_steps
                self._steps[n] = choose(self, max(n, 1))
            return self._steps[n]

    def step_tensors(self, step, n):
        """A step's input and output of ``n`` images, its input random, and all layers' weights and biases (those it reads)."""
        first, last = self.layers[step.first], self.layers[step.first + step.count - 1]
        x = torch.randn(n, first.height, first.width, input_channels(first), device=self.device).to(self.dtype)
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
            self._graphs.popitem(last=False)
        numel = self.layers[0].c_in * self.layers[0].height * self.layers[0].width
        numel += sum(layer.detail * layer.height * layer.width for layer in self.layers)
        latents = torch.zeros(n, numel, device=self.device)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # What is compiled, loaded and packed the first time must not be inside the graph.
            self.run(latents)
        torch.cuda.current_stream().wait_stream(stream)
        # Graphs run one after the other and share memory; what must outlive a replay is copied from it.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            images = self.run(latents)
        self._graphs[n] = graph, latents, images
        return self._graphs[n]
