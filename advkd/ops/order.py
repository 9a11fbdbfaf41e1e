"""Order of differentiability 1, enforced: differentiating the gradients of such an op raises."""

import torch


def once(
    name: str, gradients: tuple[torch.Tensor | None, ...], *inputs: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of op ``name``, to be returned from its backward pass.

    Where a graph of the backward pass is recorded (``create_graph=True``) they depend on every tensor of ``inputs``: the op's
    arguments and its incoming gradients. Differentiating them, through ``backward()`` or ``torch.autograd.grad`` by any of
    these or by an ancestor, then raises instead of giving a gradient with terms missing.
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
