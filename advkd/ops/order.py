"""Order of differentiability 1, made loud: differentiating the gradients of such an op raises."""

import torch


def once(name, gradients, *inputs):
    """The gradients of op ``name``, to be returned from its backward pass.

    Where a graph of the backward pass is wanted (``create_graph=True``) they hang on every tensor of ``inputs``, what the op
    was given and its incoming gradients: whoever differentiates them, through ``backward()`` or ``torch.autograd.grad`` with
    respect to any of these or of what they come from, gets an error, not a gradient with terms missing.
    """
    if not torch.is_grad_enabled():
        return gradients
    kept = [i for i, gradient in enumerate(gradients) if gradient is not None]
    results = list(gradients)
    hung = _Once.apply(name, len(kept), *(gradients[i] for i in kept), *(t for t in inputs if t is not None))
    for i, gradient in zip(kept, hung, strict=True):
        results[i] = gradient
    return tuple(results)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(f"{ctx.name} is differentiable once: its gradients have no gradient; for that take plain PyTorch")
