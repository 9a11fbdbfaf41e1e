"""Batch normalisation whose statistics are those of the global batch, and its folding into a convolution."""

import contextlib
import operator
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as calls
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError
from ..ops import norm_act


class CannotFoldError(InputError):
    """A student whose layers are not what a fused engine computes; the message names the layer."""


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, LeakyReLU and nearest up-sampling; in training they are one op, and the processes share statistics.

    torch's ``SyncBatchNorm`` has no CPU path. The processes may hold different numbers of samples.
    """

    def forward(self, x: torch.Tensor, slope: float = 1.0, upsample: bool = False) -> torch.Tensor:
        """``(N, C, H, W)`` to the same shape, or twice the side; a ``slope`` of 1 is no activation."""
        if not self.training:
            # torch's own operations alone: they can be exported, and differentiated any number of times.
            x = F.leaky_relu(super().forward(x), slope, inplace=True)
            return F.interpolate(x, scale_factor=2, mode="nearest") if upsample else x
        momentum, (weight, bias) = self._count(), self._scales(x)
        return norm_act(
            x,
            weight,
            bias,
            self.running_mean if self.track_running_stats else None,
            self.running_var if self.track_running_stats else None,
            slope=slope,
            upsample=upsample,
            training=True,
            eps=self.eps,
            momentum=momentum,
            synchronize=_several_processes(),
        )

    def _count(self):
        """Count a batch of training; the weight that it has in the running statistics."""
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum

    def _scales(self, x):
        """Weight and bias; ones and zeros where the module has none."""
        weight, bias = self.weight, self.bias
        if weight is None:
            weight = torch.ones(self.num_features, dtype=torch.float32, device=x.device)
        return weight, torch.zeros_like(weight) if bias is None else bias


def _several_processes():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def normalize(norm: nn.Module, x: torch.Tensor, slope: float, upsample: bool = False) -> torch.Tensor:
    """LeakyReLU of ``norm(x)``, its pixels repeated 2 x 2 with ``upsample``.

    Any module may have taken the place of a :class:`BatchNorm2d`: a ``SyncBatchNorm``, or an ``Identity`` where the convolution
    before has swallowed it.
    """
    if isinstance(norm, BatchNorm2d):
        return norm(x, slope, upsample)
    x = F.leaky_relu(norm(x), slope)
    return F.interpolate(x, scale_factor=2, mode="nearest") if upsample else x


def fold(convolution: nn.Module, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of ``norm(convolution(x))`` in eval mode as one convolution.

    w' = w gamma / sqrt(var + eps), b' = beta + (b - mean) gamma / sqrt(var + eps), computed in float64. ``norm`` is batch norm
    of any class of torch's, or an ``Identity``.

    Raises:
        CannotFoldError: see :func:`require_foldable`.
    """
    require_foldable(convolution, norm)
    weight, bias = tensors_of(convolution, "weight", "bias")
    dtype, weight = weight.dtype, weight.detach().double()
    bias = torch.zeros_like(weight[:, 0, 0, 0]) if bias is None else bias.detach().double()
    if isinstance(norm, nn.Identity):
        return weight.to(dtype), bias.to(dtype)
    gamma, beta, mean, variance = tensors_of(norm, *NORMS_TENSORS)
    scale = torch.rsqrt(variance.double() + norm.eps)
    if gamma is not None:
        scale = gamma.detach().double() * scale
    folded = (bias - mean.double()) * scale
    if beta is not None:
        folded = beta.detach().double() + folded
    return (weight * scale[:, None, None, None]).to(dtype), folded.to(dtype)


def require_foldable(convolution: nn.Module, norm: nn.Module) -> None:
    """Refuse modules that compute something else than their tensors say.

    Raises:
        CannotFoldError: modules of other classes, those with hooks or code of their own (pruning, weight norm by hooks,
            adapters), or batch norm without running statistics.
    """
    for module, kinds, kind in ((convolution, (nn.Conv2d,), "a Conv2d"), (norm, NORMS, "batch norm or an Identity")):
        if type(module) not in kinds and not any(_inherits(module, plain) for plain in kinds):
            raise CannotFoldError(f"{kind} without code of its own can be folded, not {type(module).__name__}")
        if _has_hooks(module):
            said = f"{type(module).__name__} has hooks or a forward of its own and cannot be folded: take them off"
            raise CannotFoldError(f"{said} (torch.nn.utils.prune.remove, remove_weight_norm, an adapter's merge)")
    if isinstance(norm, _BatchNorm) and (norm.running_mean is None or norm.running_var is None):
        raise CannotFoldError(f"{type(norm).__name__} has no running statistics: those of each batch cannot be folded")


def has_own_code(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if calling a module may compute something else than a ``kind`` of the same attributes does."""
    return not _inherits(module, kind) or _has_hooks(module)


def _inherits(module, kind):
    """True if the module's class leaves the code of a ``kind`` as it is."""
    own = type(module)
    if own is kind:
        return True
    return issubclass(own, kind) and all(getattr(own, name, None) is getattr(kind, name, None) for name in CALLS)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper or a checkpointing one, which compute the same; others are themselves."""
    own = vars(module)
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        if name in own["_modules"] and not (own["_forward_hooks"] or own["_forward_pre_hooks"]):
            return own["_modules"][name]
    return module


def _has_hooks(module):
    """True if calling a module runs hooks, its own or everybody's, or a forward that is not its class's."""
    own = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or calls._global_forward_hooks or calls._global_forward_pre_hooks:
        return True
    # Libraries that wrap a forward for a while leave the class's own behind, bound.
    replaced = "forward" in own and own["forward"] != types.MethodType(type(module).forward, module)
    return replaced or "_conv_forward" in own


geometry = operator.itemgetter("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
"""A getter, from a convolution's ``vars``, of how it moves over its input and of the border around that."""

_MODES = threading.RLock()
CALLS = ("__call__", "forward", "_conv_forward")
NORMS = (BatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity)
NORMS_TENSORS = ("weight", "bias", "running_mean", "running_var")


def read_by_fold(convolution: nn.Module, norm: nn.Module) -> tuple[tuple, list[torch.Tensor]]:
    """The inputs of :func:`fold`: a tuple of everything but tensors, and a list of the tensors."""
    tensors, eps = tensors_of(convolution, "weight", "bias"), None
    if isinstance(norm, _BatchNorm):
        tensors, eps = [*tensors, *tensors_of(norm, *NORMS_TENSORS)], norm.eps
    return (type(norm), eps, *[tensor is None for tensor in tensors]), [tensor for tensor in tensors if tensor is not None]


def tensors_of(module: nn.Module, *names: str) -> list[Any]:
    """Attributes of a module, from its dictionaries where those have them: asking the module takes three times as long."""
    own = vars(module)
    known = own["_parameters"] | own["_buffers"]
    # In training mode a parametrization may change with every look at it.
    with evaluating(module) if "parametrizations" in own["_modules"] else contextlib.nullcontext():
        return [known[name] if name in known else getattr(module, name) for name in names]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in eval mode within; the mode of each of its modules comes back. One thread at a time."""
    with _MODES:
        modes = {part: part.training for part in module.modules()}
        module.eval()
        try:
            yield
        finally:
            for part, training in modes.items():
                # By train(), in which adapters take their weights out of the layer's again.
                part.train(training)
