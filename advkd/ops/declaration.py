"""One declaration an op: schema, fake, backends, dispatch, the empty case, and the refusal of gradients.

The torch ops here have no gradients (order of differentiability 0): an op of a higher order is a ``torch.autograd.Function``
over such ops, as :mod:`advkd.ops.norm_act`.
"""

import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from . import registry

# Library rather than custom_op: that one imports torch._dynamo on the first call, a second of a sampler's start.
_LIBRARY = torch.library.Library("advkd", "FRAGMENT")


class Op:
    """An op as :func:`declare` makes it. A call runs ``torch.ops.advkd.<name>``, all arguments by place.

    Attributes:
        name: of the torch op.
        launchers: backend -> function that runs the op there; it takes the op's arguments without ``backend``.
        overload: the torch op.
    """

    def __init__(self, name: str, launchers: Mapping[str, Callable]) -> None:
        self.name, self.launchers = name, launchers
        self.overload = getattr(torch.ops.advkd, name).default

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)


def declare(
    schema: str,
    *,
    reference: Callable,
    backends: Sequence[str],
    launchers: Mapping[str, Callable] = MappingProxyType({}),
    fake: Callable | None = None,
    empty: Callable | None = None,
    group: str | None = None,
    choose: Callable[[str, torch.Tensor, str], str] = registry.choose_for,
    **options: Any,
) -> Op:
    """Define and register the torch op ``advkd::<name>``.

    Args:
        schema: of the op without its ``str backend``, which goes before the first tensor that is written, else to the end. The
            first argument is a tensor: its device and dtype choose the backend.
        reference: the specification, a launcher like the others.
        backends: those that the op is written for beside the reference.
        launchers: backend -> launcher, where that is not the default: the function ``<name>`` of ``torch.ops.advkd_cpu``
            (``cpu``), of :func:`advkd.ops.registry.cuda_launcher` (``cuda``) or of ``kernels/<group>.py`` (``triton``).
        fake: of an op that returns a tensor: its result without values, from all arguments.
        empty: launcher where the first argument of an op that writes tensors has no elements; by default nothing is done.
        group: name in the registry, where several torch ops share their backends; by default the op's.
        choose: chooses the backend, from the name in the registry, the first argument and the backend asked for.
        options: of :func:`advkd.ops.registry.implement`.
    """
    name, _, rest = schema.partition("(")
    group = group or name
    registry.implement(group, *backends, **options)
    found = {backend: _DEFAULTS[backend](group, name) for backend in backends if backend not in launchers}
    found |= {"reference": reference, **launchers}
    arguments, result = rest.rsplit(") -> ", 1)
    given = arguments.split(", ")
    place = next((i for i, argument in enumerate(given) if "!" in argument), len(given))
    _LIBRARY.define(f"{name}({', '.join([*given[:place], 'str backend', *given[place:]])}) -> {result}")

    def launcher(args):
        return found[choose(group, args[0], args[place])]

    if fake is None:
        read = [i for i, argument in enumerate(given) if argument.startswith("Tensor")]
        _register_writer(name, launcher, place, operator.itemgetter(*(i + (i >= place) for i in read)), empty)
    else:
        _register_maker(name, launcher, place, fake)
    return Op(name, found)


def _register_writer(name, launcher, place, tensors, empty):
    """An op that writes some of its arguments and returns nothing; ``tensors`` takes those that are tensors, or None."""

    def run(*args):
        registry.refuse_order_0(name, *tensors(args))
        launch = launcher(args)
        if not args[0].numel():
            launch = empty or _nothing
        launch(*args[:place], *args[place + 1 :])

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"advkd::{name}", lambda *args: registry.refuse_order_0(name, *tensors(args)), lib=_LIBRARY)


def _nothing(*args):
    pass


def _register_maker(name, launcher, place, fake):
    """An op that returns a tensor."""

    def run(*args):
        return launcher(args)(*args[:place], *args[place + 1 :])

    def backward(ctx, *gradients):
        raise RuntimeError(f"{name} has no gradient (order of differentiability 0)")

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"advkd::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"advkd::{name}", backward, lib=_LIBRARY)


def _cpu(group, name):
    namespace = torch.ops.advkd_cpu
    return lambda *args: getattr(namespace, name).default(*args)


def _cuda(group, name):
    return lambda *args: registry.cuda_launcher(name)(*args)


def _triton(group, name):
    return lambda *args: getattr(importlib.import_module(f"advkd.kernels.{group}"), name)(*args)


_DEFAULTS = {"cpu": _cpu, "cuda": _cuda, "triton": _triton}
