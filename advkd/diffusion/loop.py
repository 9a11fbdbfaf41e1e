"""A solver's run of network evaluations and fused steps, over static memory.

Everything that changes from step to step is read through one counter on the device: nothing is copied to it and nothing is
waited for, so that a GPU replays captured CUDA graphs. On a CPU the same calls run directly.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..errors import InputError
from ..models.denoiser import evaluate
from ..ops import coefficient_table, philox_normal, sampler_step
from ..runtime.hub import reason
from ..runtime.ranges import named
from .program import STATE, Evaluation, Program, registers

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class Place(NamedTuple):
    """The level of a state, as tensors on its device.

    Attributes:
        t: timestep ``(1,)``: int64, or float32 in runs with timesteps that are not whole.
        alpha: weight of the image, a float64 scalar.
        noise: weight of the noise, a float64 scalar.
        latent: ``(N, latent)`` float32, the latents u of this evaluation; None in loops without them.
    """

    t: torch.Tensor
    alpha: torch.Tensor
    noise: torch.Tensor
    latent: torch.Tensor | None = None


Network = Callable[[torch.Tensor, Place], torch.Tensor]

LATENT_STEP = 2
"""Step of Philox's latents that keeps those of denoisers apart from one-pass students' and from training's."""

_LOGGER = logging.getLogger(__name__)


class SamplingLoop:
    """A solver's run on batches of one shape.

    Args:
        network: function of the state ``(N, ...)`` and its :class:`Place` that gives the network's output.
        shape: of the state.
        program: of the run.
        seed: of the step noise.
        device: of the network.
        capture: replay CUDA graphs (on a CUDA device).
        dtype: of the state: float32, or float64 for exact networks.
        latent: numbers of the latent u that the network is given in every evaluation (0: none), standard normal by seed, sample
            and evaluation.
    """

    def __init__(
        self,
        network: Network,
        shape: Sequence[int],
        program: Program,
        seed: int,
        device: str | torch.device,
        capture: bool = False,
        dtype: torch.dtype = torch.float32,
        latent: int = 0,
    ):
        self._network, self._seed, self._program, self._capture_graphs = network, seed, program, capture
        # diffusers' networks keep the layout of their input; convolutions are faster in this one.
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        # Buffers are written to again and again; made in inference mode, they could not be outside of it.
        with torch.inference_mode(False):
            self._registers = [
                torch.empty(shape, dtype=dtype, device=device, memory_format=layout) for _ in range(registers(program))
            ]
            self._table = coefficient_table([e.step for e in program], device, dtype)
            # Whole timesteps stay whole: some networks look them up in a table.
            times = torch.tensor([e.level.t for e in program], dtype=torch.float64, device="cpu")
            self._timesteps = times.to(torch.int64 if bool((times == times.round()).all()) else torch.float32).to(device)
            weights = [(e.level.alpha, e.level.noise) for e in program]
            self._weights = torch.tensor(weights, dtype=torch.float64, device="cpu").to(device)
            self._indices = torch.empty(shape[0], dtype=torch.int64, device=device)
            self._counter = torch.zeros(1, dtype=torch.int64, device=device)
            drawn = (len(program), shape[0], latent)
            self._latents = torch.empty(drawn, dtype=torch.float32, device=device) if latent else None
        self._done = 0
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, torch.Tensor | None]] = {}
        self._memory = torch.cuda.graph_pool_handle() if capture else None

    @property
    def x(self) -> torch.Tensor:
        """The state, which steps write to."""
        return self._registers[STATE]

    @torch.no_grad()
    def start(self, x_T: torch.Tensor, first: int) -> None:
        """Begin with the states ``x_T`` of samples ``first ..``."""
        if x_T.shape != self.x.shape:
            raise InputError(f"x_T must have shape {tuple(self.x.shape)}, got {tuple(x_T.shape)}")
        self.x.copy_(x_T)
        self._indices.copy_(torch.arange(first, first + len(x_T), dtype=torch.int64, device=self.x.device))
        if self._latents is not None:
            each = (len(self._latents), self._latents.shape[2])
            self._latents.copy_(philox_normal(self._seed, self._indices, each, stream="z", step=LATENT_STEP).movedim(1, 0))
        self._counter.zero_()
        self._done = 0

    @torch.no_grad()
    def step(self, pool: int | None = None) -> torch.Tensor | None:
        """The solver's next step, in place in ``x``; with ``pool`` its area average, valid until the next call."""
        while True:
            evaluation = self._program[self._done]
            self._done += 1
            if evaluation.end is not None:
                return self._advance(evaluation, pool)
            self._advance(evaluation, None)

    def _advance(self, evaluation, pool):
        if not self._capture_graphs:
            return self._run(evaluation, pool)
        key = (pool, _signature(evaluation))
        if key not in self._graphs:
            self._graphs[key] = self._capture(evaluation, pool)
        graph, pooled = self._graphs[key]
        with named("network and step"):
            graph.replay()
        return pooled

    def _run(self, evaluation, pool):
        x, out, previous, history, third, stored = (
            None if register is None else self._registers[register] for register in _signature(evaluation)[:6]
        )
        with named("network"):
            output = self._network(x, self._place()) if evaluation.network else x
        with named("step"):
            row = self._table.index_select(0, self._counter)
            noise = (self._seed, self._indices, self._counter) if evaluation.draws else third
            _, _, pooled = sampler_step(
                x, output, row, previous_x0=previous, history=history, noise=noise, pool=pool, x0=stored, out=out
            )
            self._counter += 1
        return pooled

    def _place(self):
        alpha, noise = self._weights.index_select(0, self._counter)[0].unbind()
        latent = None if self._latents is None else self._latents.index_select(0, self._counter)[0]
        return Place(self._timesteps.index_select(0, self._counter), alpha, noise, latent)

    def _capture(self, evaluation, pool):
        """One pass as a graph. Graphs share their memory: what one leaves there is copied before the next one runs."""
        changed = (*self._registers, self._counter)
        before = [tensor.clone() for tensor in changed]
        with torch.cuda.device(self.x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Libraries choose and allocate in their first calls, which a graph cannot hold.
                for _ in range(3):
                    self._run(evaluation, pool)
                    for tensor, value in zip(changed, before):
                        tensor.copy_(value)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads (a writer that waits for copies) go on meanwhile.
            with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
                pooled = self._run(evaluation, pool)
        return graph, pooled


def _signature(e: Evaluation):
    """Registers and kinds that a captured pass depends on, beside the scalars, which it reads from the table."""
    return e.x, e.out, e.previous, e.history, e.third, e.stored, e.network, e.draws


def network_of(unet: "UNet2DModel", autocast: torch.dtype | None = None, compiled: bool = False) -> Network:
    """A diffusers UNet as a :class:`SamplingLoop`'s network.

    Args:
        unet: ``UNet2DModel``.
        autocast: ``torch.bfloat16`` for mixed precision, or None.
        compiled: through ``torch.compile``; a minute or more the first time, kept on disk. Its first output is compared with
            the uncompiled network's; if it is wrong, or if there is no compiler, a warning says so and the plain one runs on.
    """
    parameter = next(unet.parameters())

    def run(x, place, condition=None):
        with torch.autocast(parameter.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            output = evaluate(unet, x, place.t, condition)
        # The step reads halves as they are.
        return output.float() if output.dtype == torch.float64 else output

    if not compiled:
        return torch.inference_mode()(run)
    return _Checked(run, torch.compile(run, dynamic=False))


class _Checked:
    """A compiled network that is compared with the plain one on its first call: compilers have been wrong without an error."""

    def __init__(self, plain, compiled):
        self._plain, self._run = plain, compiled
        self._first = True

    def __call__(self, x, place, labels=None):
        if self._first:
            self._first = False
            _LOGGER.warning("torch.compile compiles the teacher's network (a minute or more; its cache keeps the result)")
            self._compare(x, place, labels)
        return self._run(x, place, labels)

    def _compare(self, x, place, labels):
        wanted = self._plain(x, place, labels).float()
        try:
            found = self._run(x, place, labels).float()
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
