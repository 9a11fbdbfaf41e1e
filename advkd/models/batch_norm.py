"""Batch normalisation whose statistics are those of the global batch, and its folding into a convolution."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..ops import norm_act


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, LeakyReLU and nearest up-sampling as one op; in training the processes share their statistics.

    torch's ``SyncBatchNorm`` has no CPU path. The processes may hold different numbers of samples.
    """

    def forward(self, x, slope=1.0, upsample=False):
        """``(N, C, H, W)`` to the same shape, or twice the side; a ``slope`` of 1 is no activation."""
        if not (self.training or torch.is_grad_enabled()):
            # Nothing is saved for a backward pass: torch's ops, which cost less to call, do as well.
            x = F.leaky_relu(super().forward(x), slope, inplace=True)
            return F.interpolate(x, scale_factor=2, mode="nearest") if upsample else x
        if self.training:
            self.num_batches_tracked += 1
        return norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            slope=slope,
            upsample=upsample,
            training=self.training,
            eps=self.eps,
            momentum=self.momentum,
            synchronize=self.training and _several_processes(),
        )


def _several_processes():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def fold(convolution, norm):
    """Weight and bias of ``norm(convolution(x))`` in eval mode as one convolution.

    w' = w gamma / sqrt(var + eps), b' = beta + (b - mean) gamma / sqrt(var + eps), computed in float64.
    """
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    bias = convolution.bias.double() if convolution.bias is not None else 0.0
    weight = convolution.weight.double() * scale[:, None, None, None]
    folded = norm.bias.double() + (bias - norm.running_mean.double()) * scale
    return weight.to(convolution.weight.dtype).detach(), folded.to(convolution.weight.dtype).detach()
