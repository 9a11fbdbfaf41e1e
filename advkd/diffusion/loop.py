"""The teacher's loop of network evaluation and fused step, over static memory.

Everything that changes from step to step is read through one counter on the device: nothing is copied to it and nothing is
waited for, so that a GPU replays one captured CUDA graph per step. On a CPU the same calls run directly.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from ..ops import StepCoefficients, coefficient_table, sampler_step
from ..runtime.hub import reason
from ..runtime.ranges import named

if TYPE_CHECKING:
    from diffusers import UNet2DModel

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_LOGGER = logging.getLogger(__name__)


class SamplingLoop:
    """A sampler's run on batches of one shape.

    Args:
        network: function of the state ``(N, C, H, W)`` and the timestep, int64 ``(1,)``, that gives the network's output.
        shape: of the state, which is float32.
        timesteps: of the run, a list of ints.
        steps: :class:`~advkd.ops.StepCoefficients`, one per timestep.
        seed: of the step noise.
        device: of the network.
        capture: replay CUDA graphs (on a CUDA device).
    """

    def __init__(
        self,
        network: Network,
        shape: Sequence[int],
        timesteps: Sequence[int],
        steps: Sequence[StepCoefficients],
        seed: int,
        device: str | torch.device,
        capture: bool = False,
    ):
        self._network, self._seed, self._capture_graphs = network, seed, capture
        self._noisy = any(step.c_z for step in steps)
        # Buffers are written to again and again; made in inference mode, they could not be outside of it.
        with torch.inference_mode(False):
            # diffusers' networks keep the layout of their input; convolutions are faster in this one.
            self.x = torch.empty(shape, dtype=torch.float32, device=device, memory_format=torch.channels_last)
            self._table = coefficient_table(steps, device)
            self._timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)
            self._indices = torch.empty(shape[0], dtype=torch.int64, device=device)
            self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._graphs: dict[int | None, tuple[torch.cuda.CUDAGraph, torch.Tensor | None]] = {}
        self._memory = torch.cuda.graph_pool_handle() if capture else None

    @torch.no_grad()
    def start(self, x_T: torch.Tensor, first: int) -> None:
        """Begin with the states ``x_T`` of samples ``first ..``."""
        if x_T.shape != self.x.shape:
            raise InputError(f"x_T must have shape {tuple(self.x.shape)}, got {tuple(x_T.shape)}")
        self.x.copy_(x_T)
        self._indices.copy_(torch.arange(first, first + len(x_T), dtype=torch.int64, device=self.x.device))
        self._step.zero_()

    @torch.no_grad()
    def step(self, pool: int | None = None) -> torch.Tensor | None:
        """The next step, in place in ``x``; with ``pool`` its area average, valid until the next call."""
        if not self._capture_graphs:
            return self._run(pool)
        if pool not in self._graphs:
            self._graphs[pool] = self._capture(pool)
        graph, pooled = self._graphs[pool]
        with named("network and step"):
            graph.replay()
        return pooled

    def _run(self, pool):
        with named("network"):
            output = self._network(self.x, self._timesteps.index_select(0, self._step))
        with named("step"):
            row = self._table.index_select(0, self._step)
            noise = (self._seed, self._indices, self._step) if self._noisy else None
            _, _, pooled = sampler_step(self.x, output, row, noise=noise, pool=pool, out=self.x)
            self._step += 1
        return pooled

    def _capture(self, pool):
        """One step as a graph. Graphs share their memory: what one leaves there is copied before the next one runs."""
        x, step = self.x.clone(), self._step.clone()
        with torch.cuda.device(self.x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Libraries choose and allocate in their first calls, which a graph cannot hold.
                for _ in range(3):
                    self._run(pool)
                    self.x.copy_(x)
                    self._step.copy_(step)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads (a writer that waits for copies) go on meanwhile.
            with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
                pooled = self._run(pool)
        return graph, pooled


def network_of(unet: "UNet2DModel", autocast: torch.dtype | None = None, compiled: bool = False) -> Network:
    """A diffusers UNet as a :class:`SamplingLoop`'s network.

    Args:
        unet: ``UNet2DModel``.
        autocast: ``torch.bfloat16`` for mixed precision, or None.
        compiled: through ``torch.compile``; a minute or more the first time, kept on disk. Its first output is compared with
            the uncompiled network's; if it is wrong, or if there is no compiler, a warning says so and the plain one runs on.
    """
    parameter = next(unet.parameters())

    def evaluate(x, t):
        with torch.autocast(parameter.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            output = unet(x.to(parameter.dtype), t, return_dict=False)[0]
        # The step reads halves as they are.
        return output.float() if output.dtype == torch.float64 else output

    if not compiled:
        return torch.inference_mode()(evaluate)
    return _Checked(evaluate, torch.compile(evaluate, dynamic=False))


class _Checked:
    """A compiled network that is compared with the plain one on its first call: compilers have been wrong without an error."""

    def __init__(self, plain, compiled):
        self._plain, self._run = plain, compiled
        self._first = True

    def __call__(self, x, t):
        if self._first:
            self._first = False
            _LOGGER.warning("torch.compile compiles the teacher's network (a minute or more; its cache keeps the result)")
            self._compare(x, t)
        return self._run(x, t)

    def _compare(self, x, t):
        wanted = self._plain(x, t).float()
        try:
            found = self._run(x, t).float()
        except Exception as error:  # a compiler that is missing raises its own kinds
            self._give_up(f"the network cannot be compiled here and runs as it is: {reason(error)}")
            return
        scale, distance = wanted.abs().max().item(), (wanted - found).abs().max().item()
        # Both round to the network's precision, TF32 or bfloat16 at the coarsest.
        if not distance <= 0.05 * scale:
            self._give_up(f"the compiled network is off by {distance:.2g} of {scale:.2g} and is not used")

    def _give_up(self, why):
        warnings.warn(why, UserWarning, stacklevel=2)
        self._run = self._plain
