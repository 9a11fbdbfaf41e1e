"""Ways to call a function: under torch's modes and transforms, copied, pickled, from threads, after a fork, compiled."""

import contextlib
import copy
import functools
import os
import pickle
import signal
import threading
import traceback

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from advkd import ops
from advkd.runtime.devices import threads

from .call import Wrong, flat, identical, mapped
from .call_gradients import choices, forward_mode, grad_transform, jvp_transform, vectorized, with_gradient

PATIENCE = 60
"""Seconds until a forked process that has not answered hangs."""


def plain(call, draw):
    return call.function(**call.arguments)


def within(context):
    def mode(call, draw):
        with context():
            return call.function(**call.arguments)

    return mode


@contextlib.contextmanager
def _default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def two_threads(call, draw):
    with threads(2):
        return call.function(**call.arguments)


def twice(call, draw):
    """The second call gives the first one's bits."""
    found = call.function(**call.arguments)
    if not identical(found, call.function(**call.arguments)):
        raise Wrong("the second call gives other bits")
    return found


def copied(call, draw):
    return call.function(**_copied(call, copy.deepcopy))


def pickled(call, draw):
    return call.function(**_copied(call, lambda value: pickle.loads(pickle.dumps(value))))


def _copied(call, copying):
    arguments = {}
    for name, value in call.arguments.items():
        try:
            arguments[name] = copying(value)
        except (AttributeError, TypeError, NotImplementedError, RuntimeError, pickle.PicklingError):  # no copy of such a value
            arguments[name] = value
    return arguments


def engine_copied(call, draw):
    made = call.options.get("engine")
    other = draw.choice((copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))))(made)
    return other(**call.arguments)


def functional(call, draw):
    made = call.options.get("engine")
    return torch.func.functional_call(made, dict(made.named_buffers()), (call.arguments["z"],))


def from_threads(call, draw):
    """Four threads at once get what one gets."""
    wanted, found = call.function(**call.arguments), [None] * 4

    def run(k):
        with torch.set_grad_enabled(k % 2 == 0):
            found[k] = call.function(**call.arguments)

    workers = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if not all(identical(one, wanted) for one in found):
        raise Wrong("threads that call at once get other bits than one alone")
    return wanted


def after_fork(call, draw):
    """A child of a process that has used two threads gets its parent's bits, where the threads are not torch's own."""
    with threads(2):
        wanted = call.function(**call.arguments)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _in_child(call, wanted, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as answer:
            said = answer.read().decode()
        _, status = os.waitpid(child, 0)
    if said != "same":
        raise Wrong(f"after a fork: {said or f'no answer, status {status}'}")
    return wanted


def _in_child(call, wanted, writing):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE)
    try:
        found = call.function(**call.arguments)
        # The comparison is torch's own, whose threads are dead here.
        torch.set_num_threads(1)
        same = identical(found, wanted)
        os.write(writing, b"same" if same else b"other bits than in the parent")
    except BaseException:
        os.write(writing, traceback.format_exc().encode())
    finally:
        os._exit(0)


def compiled(call, draw):
    """One graph without a break; what is refused is refused without a compiler."""
    call.function(**call.arguments)
    torch._dynamo.reset()
    torch._dynamo.config.suppress_errors = False
    backend = draw.choice(("eager", "aot_eager"))
    function = torch.compile(lambda **given: call.function(**given), fullgraph=True, backend=backend)
    return function(**call.arguments)


def on_meta(call, draw):
    """Tensors without memory give results of the right shapes and dtypes."""
    return _without_memory(call, lambda t: t.to("meta"), contextlib.nullcontext())


def fake(call, draw):
    mode = FakeTensorMode()
    return _without_memory(call, mode.from_tensor, mode)


def _without_memory(call, convert, context):
    wanted = call.function(**call.arguments)
    arguments = {name: mapped(lambda t: convert(t.detach()), value) for name, value in call.arguments.items()}
    with context:
        found = flat(call.function(**arguments))
    if [(t.shape, t.dtype) for t in found] != [(t.shape, t.dtype) for t in flat(wanted)]:
        raise Wrong(f"{found} without memory, where {[(t.shape, t.dtype) for t in flat(wanted)]} come with it")
    return wanted


MODES = {
    "plain": plain,
    "no_grad": within(torch.no_grad),
    "inference_mode": within(torch.inference_mode),
    "autocast": within(_autocast),
    "another default dtype": within(_default_dtype),
    "another default device": within(functools.partial(torch.device, "meta")),
    "poisoned memory": within(_deterministic),
    "two threads": two_threads,
    "twice": twice,
    "copied": copied,
    "pickled": pickled,
    "engine copied": engine_copied,
    "functional_call": functional,
    "from four threads": from_threads,
    "after a fork": after_fork,
    "compiled": compiled,
    "meta": on_meta,
    "fake": fake,
    "gradient": with_gradient,
    "func.grad": grad_transform,
    "func.jvp": jvp_transform,
    "forward mode": forward_mode,
    "vmap": vectorized,
}
"""Name -> function of a call and a draw that gives the call's result, whose modes are off again when it returns."""

SHARES = {"plain": 12.0, "from four threads": 1.5, "vmap": 2.0, "after a fork": 0.0, "compiled": 0.0}
"""How often a mode is drawn, 1 where not named."""

QUOTAS = {"compiled": 400, "after a fork": 300}
"""Costly modes: one case of so many is in each, a call for which it means something."""


def _repeatable(call):
    """Calls that are repeated must find the same arguments."""
    return not any(call.arguments.get(name) is not None for name in call.written)


def _is_op(call):
    return call.name in ops.__all__ and call.name != "student_forward"


def _forks(call):
    """The process that forked has used its threads, where these are not torch's own."""
    made = call.options.get("engine")
    own = call.arguments.get("backend") == "cpu" if made is None else made.backend == "cpu"
    return own and call.name not in ("conv_bias_act_mask", "gradient_penalty")


def _differentiates(call):
    if call.name == "gradient_penalty":
        return isinstance(call.arguments["critic"], torch.nn.Module)
    return bool(choices(call))


_FIRST = {
    # The sums of torch's own convolution depend on the number of threads.
    "two threads": lambda call: call.name != "conv_bias_act_mask",
    "engine copied": lambda call: call.name == "FusedStudent",
    "functional_call": lambda call: call.name == "FusedStudent",
    # They would write to the same place.
    "from four threads": lambda call: call.name != "save_pretrained" and "whole" not in call.options,
    "after a fork": _forks,
    # Values are looked at, outside of a graph.
    "compiled": lambda call: _is_op(call) and call.name != "conv_block" and not call.arguments.get("check_finite"),
    "meta": lambda call: call.order is not None and _is_op(call) and call.name != "gradient_penalty",
    "fake": lambda call: call.order is not None and _is_op(call) and call.name != "gradient_penalty",
    "gradient": _differentiates,
    **dict.fromkeys(("func.grad", "func.jvp", "forward mode", "vmap"), lambda call: bool(choices(call))),
}
"""Name of a mode -> whether it has a meaning for a call."""

_ONCE = ("plain", "no_grad", "inference_mode", "autocast", "another default dtype", "another default device", "poisoned memory")
"""Modes that call once, with the arguments themselves."""


def has_meaning(mode, call):
    """True if a mode has a meaning for a call."""
    once = mode in (*_ONCE, "two threads", "engine copied", "functional_call")
    return (once or _repeatable(call)) and _FIRST.get(mode, lambda call: True)(call)
