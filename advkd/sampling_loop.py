"""The teacher's loop of network evaluation and fused step, over static memory.

Everything that changes from step to step is read through one counter on the device: nothing is copied to it and nothing is
waited for, so that a GPU replays one captured CUDA graph per step. On a CPU the same calls run directly.
"""

import torch

from .ops import coefficient_table, sampler_step


class SamplingLoop:
    """A sampler's run on batches of one shape.

    Args:
        network: function of the state ``(N, C, H, W)`` and the timestep, int64 ``(1,)``, that gives the network's output.
        shape: of the state.
        timesteps: of the run, a list of ints.
        steps: :class:`~advkd.ops.StepCoefficients`, one per timestep.
        seed: of the step noise.
        device: of the network.
        capture: replay CUDA graphs (on a CUDA device).
    """

    def __init__(self, network, shape, timesteps, steps, seed, device, capture=False):
        self._network, self._seed, self._capture_graphs = network, seed, capture
        # diffusers' networks keep the layout of their input; convolutions are faster in this one.
        self.x = torch.empty(shape, device=device, memory_format=torch.channels_last)
        self._table = coefficient_table(steps, device)
        self._timesteps = torch.tensor(timesteps, device=device)
        self._noisy = any(step.c_z for step in steps)
        self._indices = torch.empty(shape[0], dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._graphs = {}
        self._memory = torch.cuda.graph_pool_handle() if capture else None

    def start(self, x_T, first):
        """Begin with the states ``x_T`` of samples ``first ..``."""
        self.x.copy_(x_T)
        self._indices.copy_(torch.arange(first, first + len(x_T), device=self.x.device))
        self._step.zero_()

    @torch.no_grad()
    def step(self, pool=None):
        """The next step, in place in ``x``; with ``pool`` its area average, valid until the next call."""
        if not self._capture_graphs:
            return self._run(pool)
        if pool not in self._graphs:
            self._graphs[pool] = self._capture(pool)
        graph, pooled = self._graphs[pool]
        graph.replay()
        return pooled

    def _run(self, pool):
        output = self._network(self.x, self._timesteps.index_select(0, self._step))
        row = self._table.index_select(0, self._step)
        noise = (self._seed, self._indices, self._step) if self._noisy else None
        _, _, pooled = sampler_step(self.x, output, row, noise=noise, pool=pool, out=self.x)
        self._step += 1
        return pooled

    def _capture(self, pool):
        """One step as a graph. Graphs share their memory: what one leaves there is copied before the next one runs."""
        x, step = self.x.clone(), self._step.clone()
        stream = torch.cuda.Stream(self.x.device)
        stream.wait_stream(torch.cuda.current_stream(self.x.device))
        with torch.cuda.stream(stream):
            # Libraries choose and allocate in their first calls, which a graph cannot hold.
            for _ in range(3):
                self._run(pool)
                self.x.copy_(x)
                self._step.copy_(step)
        torch.cuda.current_stream(self.x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            pooled = self._run(pool)
        return graph, pooled


def network_of(unet, autocast=None, compiled=False):
    """A diffusers UNet as a :class:`SamplingLoop`'s network.

    Args:
        unet: ``UNet2DModel``.
        autocast: ``torch.bfloat16`` for mixed precision, or None.
        compiled: through ``torch.compile``; minutes the first time, kept on disk.
    """
    parameter = next(unet.parameters())

    def evaluate(x, t):
        with torch.autocast(parameter.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            output = unet(x.to(parameter.dtype), t, return_dict=False)[0]
        # The step reads halves as they are.
        return output.float() if output.dtype == torch.float64 else output

    if not compiled:
        return torch.inference_mode()(evaluate)
    mode = "max-autotune-no-cudagraphs" if parameter.device.type == "cuda" else "default"
    return torch.compile(evaluate, dynamic=False, mode=mode)
