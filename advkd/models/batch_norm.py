"""Batch normalisation whose statistics are those of the global batch."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that in training shares its sums between processes by a differentiable all-reduce.

    torch's ``SyncBatchNorm`` has no CPU path. With one process this is ``nn.BatchNorm2d``. Every process must hold equally
    many samples.
    """

    def forward(self, x):
        """``(N, C, H, W)`` to the same shape."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        narrow, x = x.dtype, x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        mean, variance, count = _global_moments(x)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(narrow)


def _global_moments(x):
    from torch.distributed.nn.functional import all_reduce

    world = dist.get_world_size()
    mean = all_reduce(x.mean(dim=(0, 2, 3))) / world
    centred = x - mean[:, None, None]
    variance = all_reduce(centred.square().mean(dim=(0, 2, 3))) / world
    return mean, variance, x.numel() // x.shape[1] * world


def fold(convolution, norm):
    """Weight and bias of ``norm(convolution(x))`` in eval mode as one convolution.

    w' = w gamma / sqrt(var + eps), b' = beta + (b - mean) gamma / sqrt(var + eps), computed in float64.
    """
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    bias = convolution.bias.double() if convolution.bias is not None else 0.0
    weight = convolution.weight.double() * scale[:, None, None, None]
    folded = norm.bias.double() + (bias - norm.running_mean.double()) * scale
    return weight.to(convolution.weight.dtype).detach(), folded.to(convolution.weight.dtype).detach()


def convolution_stage(convolution, norm, x, slope):
    """LeakyReLU(batch norm(convolution(x)))."""
    # In place: neither backward needs the normalised value before the activation.
    return F.leaky_relu(norm(convolution(x)), slope, inplace=True)
