"""A pytest plugin that enters GPU tests without a GPU: ``python -m pytest -p tests.gpu_dry_run --gpu-dry -m gpu tests``.

"cuda" is a stand-in: its tensors compute on the CPU and report ``cuda:0`` as their device; streams, events and graphs keep the
rules that raise on a device. A kernel of ours starts and does nothing, so that from the first one on numbers mean nothing: a
comparison may then fail and the body goes on. A test fails on any error before the first kernel; after it, on errors that
wrong numbers cannot explain (all but :data:`EXCUSED`), such as a missing attribute, wrong arguments, tensors of two devices, a
graph that is captured twice.

With ``profiling.gpu.tests`` beside it (``--gpu-most=1``) one case of each function is entered, with pytest-xdist (``-n 2``) in
several processes. The summary says how many tests reached a kernel, how many needed none, where a body ended early, and what
was skipped.
"""

import ast
import contextlib
import functools
import importlib.abc
import importlib.machinery
import inspect
import logging
import re
import signal
import sys
import threading
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parent.parent
DEVICE, STAND_IN = torch.device("cuda", 0), torch.device("meta")
"""The device that a tensor names, and the one that torch's C++ sees: every build has it, and it has no memory of its own."""

MOST_BYTES, SECONDS = 2**28, 2
"""Limits that end a test: bytes of one tensor, and seconds of CPU time after the first kernel."""


class DeviceFault(BaseException):
    """A call that a real device would have refused; no test expects it."""


class Ended(BaseException):
    """The stand-in cannot go further here."""


EXCUSED = (AssertionError, pytest.fail.Exception)
"""Errors that wrong numbers may raise."""

DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
COPIES = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")
"""Ops that take tensors of two devices."""


class State(threading.local):
    """State of one test on the stand-in; per thread, its stream and the graph being captured."""

    kernels = ()

    def __init__(self, kernels, most_bytes=MOST_BYTES):
        self.kernels, self.stream, self.capturing, self.most_bytes = kernels, Stream(), None, most_bytes
        self.over = False

    def start(self, kernel):
        if not self.kernels:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        self.kernels.append(kernel)


class Stream:
    """Stand-in for ``torch.cuda.Stream``."""

    device, device_index = DEVICE, 0

    def __init__(self, device=None, priority=0):
        self.cuda_stream = id(self)

    def wait_stream(self, stream):
        require(isinstance(stream, Stream), f"wait_stream takes a stream, got {stream}")

    def wait_event(self, event):
        require(isinstance(event, Event), f"wait_event takes an event, got {event}")

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        wait("stream.synchronize()")

    def query(self):
        return True


class Event:
    """Stand-in for ``torch.cuda.Event``."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self.timed = enable_timing

    def record(self, stream=None):
        require(stream is None or isinstance(stream, Stream), f"record takes a stream, got {stream}")

    def wait(self, stream=None):
        self.record(stream)

    def synchronize(self):
        wait("event.synchronize()")

    def query(self):
        return True

    def elapsed_time(self, end):
        require(self.timed and end.timed, "elapsed_time needs events with enable_timing=True")
        return 1.0


class Graph:
    """Stand-in for ``torch.cuda.CUDAGraph``: captured once, replayed afterwards."""

    def __init__(self, keep_graph=False):
        self.captured = False

    def capture_begin(self, pool=None, capture_error_mode="global", check_input_liveness=False):
        require(not self.captured, "This CUDAGraph instance already owns a captured graph: create a new one")
        require(STATE.capturing is None, "a graph is being captured already")
        STATE.start("a graph")
        STATE.capturing = self

    def capture_end(self):
        STATE.capturing, self.captured = None, True

    def replay(self):
        require(self.captured, "replay of a CUDAGraph that was never captured")

    def pool(self):
        return (0, 1)

    def reset(self):
        self.captured = False


def require(right, message):
    if not right:
        raise DeviceFault(message)


def wait(what):
    require(STATE.capturing is None, f"{what} is not permitted while a stream is capturing")


class Generator(torch.Generator):
    """A generator that draws on the CPU for the device it was made for."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, device="cpu")
        generator.on = torch.device(device).type
        return generator

    @property
    def device(self):
        return DEVICE if self.on == "cuda" else torch.device("cpu")


class DeviceTensor(torch.Tensor):
    """A tensor on the stand-in; ``inside`` holds its numbers."""

    @staticmethod
    def __new__(cls, inside):
        place = {"strides": inside.stride(), "storage_offset": inside.storage_offset(), "device": STAND_IN}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, **place)
        tensor.inside = inside
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_meta = (property(lambda self, value=value: value) for value in (DEVICE, True, False))

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.inside.data_ptr()

    def record_stream(self, stream):
        require(isinstance(stream, Stream), f"record_stream takes a stream, got {stream}")

    def numpy(self, *, force=False):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        copy.__dict__.update({**self.__dict__, "inside": copy.inside})
        return copy

    def __repr__(self):
        return f"{self.inside!r} on {DEVICE}"


def numbers_of(value):
    """The numbers that a tensor on the stand-in holds; anything else as it is."""
    return value.inside if isinstance(value, DeviceTensor) else value


class Ops(TorchDispatchMode):
    """Sends every op that torch runs to :func:`run`."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


def run(function, arguments, options):
    """Run an op: ours by its own implementation, a kernel's launcher as a no-op, torch's on the CPU."""
    if STATE.over:
        raise Ended(f"{SECONDS} seconds behind its first kernel")
    tensors = [t for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)]
    device = any(isinstance(t, DeviceTensor) for t in tensors)
    if function.namespace.startswith("advkd"):
        return run_ours(function, arguments, options, device)
    if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
        with Ops():
            return function.decompose(*arguments, **options)
    inside, place, known = {**options}, options.get("device"), {}
    if place is not None:
        device, inside["device"] = torch.device(place).type in ("cuda", "meta"), torch.device("cpu")
    pinned = inside.pop("pin_memory", None)
    require(not (pinned and device), "only dense CPU tensors can be pinned")
    name = function._schema.name.partition("::")[2]
    require_permitted(name, tensors, options, device)
    require_small(name, arguments)

    def inner(value):
        if not isinstance(value, DeviceTensor):
            return value
        known[id(value.inside)] = value
        return value.inside

    def outer(value):
        if not isinstance(value, torch.Tensor) or not device:
            return value
        return known[id(value)] if place is None and id(value) in known else DeviceTensor(value)

    results = function(*tree_map(inner, arguments), **tree_map(inner, inside))
    if device and name.startswith(("empty", "new_empty")) and not torch.are_deterministic_algorithms_enabled():
        results.zero_()
    # A view is an inference tensor if its base is, whatever the mode.
    inference = any(t.is_inference() for t in tensors) if function.is_view else torch.is_inference_mode_enabled()
    with torch.inference_mode(inference):
        return tree_map(outer, results)


def require_permitted(name, tensors, options, device):
    """Require tensors of one device, and nothing that synchronizes with it inside a capture."""
    if not any(isinstance(t, DeviceTensor) for t in tensors):
        return
    strays = [t for t in tensors if not isinstance(t, DeviceTensor) and t.ndim]
    require(not strays or name in COPIES, f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
    if name == "_local_scalar_dense":
        wait("a number's way to the host")
    if name == "_to_copy" and not device and not options.get("non_blocking"):
        wait("a copy to the host")


def require_small(name, arguments):
    sizes = arguments[0] if arguments and isinstance(arguments[0], (list, tuple, torch.Size)) else ()
    if name in ("empty", "zeros", "ones", "full", "randn", "rand") and torch.Size(sizes).numel() * 4 > STATE.most_bytes:
        raise Ended(f"a tensor of {tuple(sizes)}")


def run_ours(function, arguments, options, device):
    if function._schema.name in LAUNCHERS:
        require(device, f"{function} takes tensors on a GPU")
        return LAUNCHERS[function._schema.name](*arguments, **options)
    if function.namespace == "advkd_cuda" or function._schema.name.startswith("advkd_cpu::cuda_"):
        # A question, or a plan: both compute on the CPU.
        return function(*tree_map(numbers_of, arguments), **tree_map(numbers_of, options))
    require(not device or function.namespace == "advkd", f"{function} takes tensors on the CPU")
    kernel = torch.library.get_kernel(function, "CPU")
    with Names(), Ops():
        return kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments, **options)


class Names(TorchFunctionMode):
    """Redirects calls that name the device: torch's C++ must not look for a real one."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is torch.device or isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return function(*arguments, **options)
        require_own_generator(arguments, options)
        if function in DATA:
            return of_data(function, arguments, options)
        if function is torch.Tensor.cuda:
            return arguments[0].to(STAND_IN, non_blocking=bool(options.get("non_blocking")))
        if function is torch.Tensor.pin_memory:
            return arguments[0]
        if function is torch.Tensor.to and len(arguments) > 1 and is_device(arguments[1]):
            arguments = (arguments[0], STAND_IN, *arguments[2:])
        if is_device(options.get("device")):
            options = {**options, "device": STAND_IN}
        return function(*arguments, **options)


def require_own_generator(arguments, options):
    generator = options.get("generator")
    if generator is not None:
        named = is_device(options.get("device"))
        device = named or any(isinstance(a, DeviceTensor) for a in (*arguments, options.get("out")))
        on = getattr(generator, "on", "cpu")
        require(on == ("cuda" if device else "cpu"), f"a generator on {on} for another device")


def is_device(value):
    """True if a value names a CUDA device."""
    if isinstance(value, str) and re.fullmatch(r"cuda(:\d+)?", value):
        return True
    return isinstance(value, torch.device) and value.type == "cuda"


def of_data(function, arguments, options):
    """A tensor made from data: on the CPU first, then copied."""
    data, like = arguments[0], None
    if function is torch.Tensor.new_tensor:
        like, data, function = arguments[0], arguments[1], torch.tensor
        options = {"dtype": like.dtype, "device": like.device, **options}
    if isinstance(data, DeviceTensor):
        return data.to(**options) if options else data
    options = {"device": "cpu", **options}
    if not is_device(options["device"]):
        return function(data, *arguments[1 if like is None else 2 :], **options)
    grad = options.pop("requires_grad", False)
    return function(data, **{**options, "device": "cpu"}).to(STAND_IN).requires_grad_(grad)


class Unenforced(ast.NodeTransformer):
    """Evaluates assertions but does not enforce them after the first kernel."""

    def visit_Assert(self, node):
        begun = ast.parse(f"__import__('sys').modules[{__name__!r}].STATE.kernels", mode="eval").body
        node.test = ast.BoolOp(ast.Or(), [node.test, begun])
        return ast.fix_missing_locations(node)


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a test file with :class:`Unenforced` assertions, past the cache of bytecode."""

    def path_stats(self, path):
        raise OSError

    def source_to_code(self, data, path, **options):
        return super().source_to_code(Unenforced().visit(ast.parse(data)), path, **options)


class Finder(importlib.abc.MetaPathFinder):
    """Finds test files before pytest does."""

    def find_spec(self, name, path, target=None):
        if not name.startswith("tests."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(name, spec.origin)
        return spec


PROPERTIES = types.SimpleNamespace(
    name="stand-in for a GPU",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    warp_size=32,
    regs_per_multiprocessor=2**16,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024,
)


def set_stream(stream):
    STATE.stream = stream


def in_a_thread(begin):
    def run(thread):
        with Names(), Ops():
            begin(thread)

    return run


def no_compiler(function=None, **options):
    """Stand-in for ``torch.compile``, also as a decorator with options: compiles nothing; calling the result ends the test."""

    def call(*arguments, **named):
        raise Ended("torch.compile")

    return no_compiler if function is None else call


CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": lambda: None,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "_exchange_device": lambda index: 0,
    "_maybe_exchange_device": lambda index: 0,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_properties": lambda device=None: PROPERTIES,
    "mem_get_info": lambda device=None: (PROPERTIES.total_memory,) * 2,
    "synchronize": lambda device=None: wait("torch.cuda.synchronize()"),
    "empty_cache": lambda: None,
    "current_stream": lambda device=None: STATE.stream,
    "default_stream": lambda device=None: STATE.stream,
    "set_stream": set_stream,
    "is_current_stream_capturing": lambda: STATE.capturing is not None,
    "graph_pool_handle": lambda: (0, 1),
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": Graph,
}
"""Stand-ins for parts of ``torch.cuda``."""


def schemas():
    """Schemas of the CUDA object's launchers and questions, from those of the CPU object, which plans for them."""
    own = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("advkd_cpu::cuda_")]
    found = [str(getattr(torch.ops.advkd_cpu, name.partition("::")[2]).default._schema) for name in own]
    return [re.sub(r", int\[\] device\) -> \(Tensor.*", ") -> ()", text.partition("::cuda_")[2]) for text in found]


LAUNCHERS, STATE = {}, None


def launcher(name):
    """A launcher of the CUDA object that starts nothing; noise comes from the reference."""
    from advkd.ops import philox

    references = {op.name: op.launchers["reference"] for op in (philox.WORDS, philox.NORMAL)}

    def launch(*arguments, **options):
        STATE.start(name)
        if name in references:
            with Names(), Ops():
                references[name](*arguments, **options)

    return launch


def use_cuda_object():
    """Define the launchers' schemas as if the object were built and loaded."""
    from advkd.ops import registry
    from advkd.runtime import extension

    gap = extension.extension_gap
    extension.extension_gap = registry.extension_gap = lambda kind: None if kind == "cuda" else gap(kind)
    require(gap("cpu") is None, gap("cpu"))
    library = torch.library.Library("advkd_cuda", "DEF")
    for schema in schemas():
        name = schema.partition("(")[0]
        library.define(schema)
        if schema.endswith("()"):
            LAUNCHERS[f"advkd_cuda::{name}"] = launcher(name)
        else:
            library.impl(name, getattr(torch.ops.advkd_cpu, f"cuda_{name}").default, "CompositeExplicitAutograd")
    return library


class Program:
    """Stand-in for ``cupy.RawModule``."""

    def __init__(self, *, code, options=()):
        self.code = code

    def get_function(self, name):
        def start(grid, block, arguments, *, shared_mem=0):
            require(shared_mem <= max(48 * 1024, start.max_dynamic_shared_size_bytes), f"{name}: shared memory not asked for")
            require(all(isinstance(a, int) or getattr(a, "size", 0) == 1 for a in arguments), f"{name}: {arguments}")
            STATE.start(name)

        start.max_dynamic_shared_size_bytes = 0
        return start


def use_cupy():
    from_external = staticmethod(lambda stream: contextlib.nullcontext(stream.__cuda_stream__()))
    cuda = types.ModuleType("cupy.cuda")
    cuda.Stream, cuda.nvrtc = type("Stream", (), {"from_external": from_external}), types.ModuleType("cupy.cuda.nvrtc")
    cuda.nvrtc.getVersion = lambda: (13, 0)
    cupy = types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    cupy.RawModule, cupy.cuda = Program, cuda
    sys.modules |= {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nvrtc": cuda.nvrtc}


def use_triton():
    """Reduce Triton's launches to checks of their arguments; the ops around them are not traced through."""
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.runtime.jit import JITFunction

    from advkd.ops import triton_conv

    def start(self, *arguments, grid, warmup=False, **options):
        own = {name: value for name, value in options.items() if name in self.arg_names}
        bound = inspect.signature(self.fn).bind(*arguments, **own)
        unknown = set(options) - set(own) - set(CUDAOptions.__dataclass_fields__)
        require(not unknown, f"{self.__name__} has no options {sorted(unknown)}")
        strays = [n for n, t in bound.arguments.items() if isinstance(t, torch.Tensor) and not isinstance(t, DeviceTensor)]
        require(not strays, f"{self.__name__}: {strays} are not on a GPU")
        if callable(grid):
            grid({**bound.arguments, **options})
        STATE.start(self.__name__)

    JITFunction.run = start
    triton_conv.wrap_triton = lambda kernel: kernel


def pytest_addoption(parser):
    parser.addoption("--gpu-dry", action="store_true", help="enter GPU tests without a GPU")


def pytest_configure(config):
    if config.getoption("--gpu-dry"):
        sys.meta_path.insert(0, Finder())
        config.pluginmanager.register(DryRun(install()))


@functools.cache
def install():
    """Make "cuda" the stand-in for the rest of this process; returns the library of its launchers."""
    torch.Generator, torch.compile = Generator, no_compiler
    threading.Thread.run = in_a_thread(threading.Thread.run)
    torch.backends.cudnn.enabled = False
    torch._C._host_emptyCache = lambda: None
    for name, stand_in in CUDA.items():
        setattr(torch.cuda, name, stand_in)
    library = use_cuda_object()
    use_cupy()
    use_triton()
    logging.getLogger("advkd.engines.gpu_search").addHandler(PassedOver())
    return library


@contextlib.contextmanager
def stand_in(most_bytes=MOST_BYTES):
    """Put the stand-in in the device's place, without pytest; a larger tensor ends the block."""
    global STATE
    install()
    STATE = State([], most_bytes)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Names(), Ops():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def how_far(function):
    """Call a function on the stand-in; returns how far it came, as text, and an error that a device would not cure, or None."""
    global STATE
    STATE, error, ended = State([], STATE.most_bytes), None, False
    signal.signal(signal.SIGVTALRM, out_of_time)
    try:
        function()
        way = "to its end"
    except Ended as end:
        way, ended = f"as far as {end}", True
    except (Exception, DeviceFault) as fault:
        way, error = f"as far as {type(fault).__name__}: {fault}", fault
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    needs = "needs a device" if STATE.kernels or ended else "no kernel of ours"
    return f"{needs}, ran {way}", error


TO_THE_END = "started a kernel, ran to its end"
WAY = "gpu dry run"
"""Name of the property of a report that says how far its test came."""


class PassedOver(logging.Handler):
    """Fails a test whose search for a plan skips a kernel: on the stand-in every kernel runs."""

    def emit(self, record):
        require("is passed over" not in record.getMessage(), record.getMessage())


class DryRun:
    """Runs each test on the stand-in."""

    def __init__(self, library):
        self.library, self.ways, self.skipped = library, {}, Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        with stand_in():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        signal.signal(signal.SIGVTALRM, out_of_time)
        try:
            result = yield
            way = "to its end"
        except Ended as end:
            result, way = True, f"as far as {end}"
        except EXCUSED as error:
            if not STATE.kernels:
                raise
            result, way = True, f"as far as {type(error).__name__}"
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        way = f"{'started a kernel' if STATE.kernels else 'started none'}, ran {way}"
        pyfuncitem.user_properties.append((WAY, way))
        return result

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and WAY in (properties := dict(report.user_properties)):
            self.ways.setdefault(properties[WAY], []).append(report.nodeid)
        if report.skipped:
            self.skipped[f"{report.nodeid.partition('[')[0]}: {report.longrepr[2]}"] += 1

    def pytest_terminal_summary(self, terminalreporter):
        for way, tests in sorted(self.ways.items()):
            few = "" if way == TO_THE_END else ": " + ", ".join(tests)
            terminalreporter.write_line(f"gpu dry run: {len(tests)} {way}{few}")
        for test, count in sorted(self.skipped.items()):
            terminalreporter.write_line(f"gpu dry run: skipped {count} of {test}")


def out_of_time(number, frame):
    # The next op ends the test: raised here, an error could fall between torch's pushing and popping of modes.
    STATE.over = True
