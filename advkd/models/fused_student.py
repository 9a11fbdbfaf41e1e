"""The student as it is used: batch norm folded into the convolutions, terminal modules gone, one op per convolution."""

import torch
from torch import nn

from ..errors import InputError
from ..latents import split_latent
from ..ops import backends, conv_block, philox_normal
from .batch_norm import fold
from .student import sample_in_batches

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FusedStudent(nn.Module):
    """A student for sampling only. Made by :meth:`Student.fuse`.

    Args:
        student: the :class:`Student`; it is not changed.
        backend: see :func:`advkd.ops.backends.choose`.
        dtype: of weights and activations: float32, bfloat16, float16 or float64.

    ``fused(z)`` has no gradient.
    """

    def __init__(self, student, backend="auto", dtype=torch.float32):
        super().__init__()
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        backends.choose("conv_block", backend, student.head.weight.device)
        self.backend = backend
        self.config = student.config
        self.latent_parts = student.latent_parts
        self.latent_numel = student.latent_numel
        self.plan = []
        for block in student.submodules:
            self._add(*fold(block.convolution1, block.norm1), block.upsample, "leaky_relu", dtype)
            self._add(*fold(block.convolution2, block.norm2), False, "leaky_relu", dtype)
        self._add(student.head.weight.detach(), student.head.bias.detach(), False, "tanh", dtype)

    def _add(self, weight, bias, upsample, activation, dtype):
        i = len(self.plan)
        self.register_buffer(f"weight{i}", weight.to(dtype).contiguous(memory_format=torch.channels_last))
        self.register_buffer(f"bias{i}", bias.to(dtype))
        self.plan.append((upsample, activation))

    def latents(self, n, seed=0, start=0):
        """z of images ``start .. start + n - 1``, as :meth:`Student.latents`."""
        indices = torch.arange(start, start + n, device=self.weight0.device)
        return philox_normal(seed, indices, (self.latent_numel,), stream="z")

    @torch.no_grad()
    def forward(self, z):
        """Images ``(N, C, S, S)`` in [-1, 1], in the engine's dtype, of latents ``(N, latent_numel)``."""
        coarse, *details = split_latent(z.to(self.weight0.dtype), self.latent_parts)
        x = coarse.contiguous(memory_format=torch.channels_last)
        for i, (upsample, activation) in enumerate(self.plan):
            if upsample and details:
                x = torch.cat((x, details.pop(0)), dim=1)
            weight, bias = getattr(self, f"weight{i}"), getattr(self, f"bias{i}")
            x = conv_block(
                x, weight, bias, slope=self.config.slope, upsample=upsample, activation=activation, backend=self.backend
            )
        return x

    def sample(self, n, seed=0, batch_size=64, start=0):
        """Images of seed ``seed``, ``(n, C, S, S)`` float32 in [-1, 1] on the CPU; image i is that of index ``start + i``."""
        return sample_in_batches(self, self.latents, n, seed, batch_size, start)
