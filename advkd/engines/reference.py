"""The engine of plain torch operations: every device and every dtype."""

from collections.abc import Sequence

import torch

from ..errors import InputError
from ..ops.conv_layer import ConvLayer, encode
from ..ops.student_forward import latent_numel, require_latents
from .base import Engine, Options
from .plan import Plan


class ReferenceEngine(Engine):
    """The specification; see :class:`advkd.engines.base.Engine`. Its weights are kept in the dtype of the activations."""

    def __init__(
        self,
        layers: Sequence[ConvLayer],
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        slope: float,
        dtype: torch.dtype,
        options: Options,
    ):
        self.weights = [weight.to(dtype, memory_format=torch.channels_last) for weight in weights]
        self.biases = [bias.to(dtype, memory_format=torch.contiguous_format) for bias in biases]
        self.slope, self.dtype, self.options = slope, dtype, options
        self.numel, self.numbers = latent_numel(layers), encode(layers)

    @staticmethod
    def gap(layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device) -> str | None:
        """None: it runs everywhere."""
        return None

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Images ``(N, C, S, S)`` of latents ``(N, numel)``."""
        require_latents(z, self.numel, self.weights[0].device)
        z = z.to(self.dtype)
        return torch.ops.advkd.student_forward(z, self.weights, self.biases, [], self.numbers, [], self.slope, "reference")

    def plan(self, batch_size: int, measured: bool) -> Plan:
        """Refused: torch plans.

        Raises:
            InputError: always.
        """
        raise InputError("a plan exists for the backends cpu, cuda and triton, not 'reference'")

    def memory(self, batch_size: int) -> dict[str, int]:
        """Refused: torch allocates.

        Raises:
            InputError: always.
        """
        raise InputError("memory is known for the backends cpu, cuda and triton, not 'reference'")
