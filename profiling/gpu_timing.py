"""Times on a GPU, by events on its stream; and work captured as a CUDA graph."""

import random
import statistics

import torch

SAMPLE = 2e-3
"""Seconds that one sample takes at least: so many calls in a row that an event's resolution and the host do not count."""
MOST = 200
"""Calls of a sample at most."""


def measure_events(calls, repeats=20, warmup=3, device="cuda"):
    """Time functions in turn, in a new random order each round: seconds per call of calls in a row.

    Args:
        calls: ``{name: function}``; a function's attribute ``units`` says how many calls one is (a graph of several, say).
        repeats: timed rounds.
        warmup: calls of each before them.
        device: whose current stream they run on.

    Returns:
        As :func:`advkd.runtime.timing.measure`, with ``calls``: how many a sample holds.
    """
    counts = {name: _calls_per_sample(call, warmup, device) for name, call in calls.items()}
    times, shuffler = {name: [] for name in calls}, random.Random(0)
    for _ in range(repeats):
        for name in shuffler.sample(list(calls), len(calls)):
            times[name].append(_sample(calls[name], counts[name], device) / getattr(calls[name], "units", 1))
    return {name: {**_summary(values), "calls": counts[name]} for name, values in times.items()}


def _summary(values):
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p20": deciles[1], "p80": deciles[7], "repeats": len(values)}


def _calls_per_sample(call, warmup, device):
    _sample(call, max(warmup, 1), device)
    return max(1, min(MOST, round(SAMPLE / max(_sample(call, 3, device), 1e-7))))


def _sample(call, count, device):
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


class Replay:
    """``function(i)`` for i = 0 .. units - 1, captured as one CUDA graph; a call replays it and returns the first result.

    With inputs that together exceed the second-level cache, no call finds its own there.

    Args:
        function: whatever it reads stays where it is; what it draws from torch's default generator is new in every replay.
        units: calls in the graph.
        grad: record gradients inside, for functions that differentiate.

    Raises:
        RuntimeError: something inside cannot be captured.
    """

    def __init__(self, function, units=1, grad=False):
        self.units = units
        caller, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(caller)
        with torch.cuda.stream(stream), torch.set_grad_enabled(grad):
            # Algorithms are chosen, kernels compiled and loaded before anything is captured.
            for _ in range(3):
                function(0)
        caller.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=stream), torch.set_grad_enabled(grad):
                self.results = [function(i) for i in range(units)]
        finally:
            # A capture that fails leaves its own stream behind as the current one.
            torch.cuda.set_stream(caller)
        # Numbers that a replay does not write are not mistaken for its result.
        poison(self.results)

    def __call__(self):
        self.graph.replay()
        return self.results[0]


def poison(results):
    """Fill tensors of floating-point numbers, and those in lists and tuples, with NaN."""
    if isinstance(results, (list, tuple)):
        for result in results:
            poison(result)
    elif isinstance(results, torch.Tensor) and results.is_floating_point():
        with torch.no_grad():
            results.fill_(float("nan"))


def captures(device):
    """True if work on the device can be captured as a CUDA graph."""
    return torch.device(device).type == "cuda"


def sets_beyond_cache(moved_bytes, device="cuda", most=64):
    """Number of sets of inputs and outputs, of so many bytes each, that exceed the second-level cache three times."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(most, -(-3 * cache // moved_bytes)))


def peaks(device="cuda"):
    """Rates of the card on random numbers, a matrix product's and a copy's.

    Returns:
        ``{"flops": {product: per second}, "bandwidth": bytes per second, "samples": {what: seconds}}``.
    """
    flops, samples = {}, {}
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("f16", torch.float16, False), ("tf32", torch.float32, True)):
        set_tf32(tf32)
        n = 8192 if dtype.itemsize == 2 else 4096
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        samples |= measure_events({f"product, {name}": lambda a=a, b=b: a @ b}, 10)
        flops[name] = 2 * n**3 / samples[f"product, {name}"]["median"]
    set_tf32(False)
    # Full float32 on tensor cores is three products of TensorFloat-32.
    flops["f32"] = flops["tf32"] / 3
    x = torch.randn(2**29, device=device)
    y = torch.empty_like(x)
    samples |= measure_events({"copy": lambda: y.copy_(x)}, 10)
    return {"flops": flops, "bandwidth": 2 * x.nbytes / samples["copy"]["median"], "samples": samples}


def set_tf32(allowed):
    """torch's switches, for everyone: TensorFloat-32 or full float32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
