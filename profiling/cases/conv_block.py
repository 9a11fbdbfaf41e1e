"""Convolutions of the students on an NVIDIA GPU: single layers, pairs and the stem, ours against cuDNN and torch.compile.

python -m profiling.cases.conv_block --device cuda [--only "batch 8"] [--out FOLDER]

A contestant is captured as a CUDA graph of calls on as many sets of inputs and outputs as exceed the second-level cache three
times, so that its activations come from memory and launches cost what they cost inside a network. Inputs are random, weights as
after initialisation, and everybody reads inputs of the case's dtype; the oracle is float64.
"""

import copy
import functools
import json
from types import SimpleNamespace

import torch

from advkd.engines.gpu_search import Limits, all_steps
from advkd.models.shape import PRESETS, convolutions
from advkd.ops.conv_layer import is_image, output_sides
from advkd.ops.gpu_storage import input_channels, padded
from advkd.ops.student_steps import pack_gpu, run_step

from .. import peers
from ..harness import Case, Contestant, Replay, main, measure_events, set_tf32, sets_beyond_cache
from ..limits import predictions
from .student import BY_HAND, GPU_DTYPES, Folded, gpu_rates

PARITY_TESTS = [
    "tests/ops/test_conv_block.py",
    "tests/kernels/test_conv_block_cuda.py",
    "tests/kernels/test_conv_block_triton.py",
    "tests/kernels/test_conv_pair.py",
    "tests/kernels/test_student_stem.py",
]
SLOPE = 0.2
CHAINS = {
    "128 to 128 at 128": ("paper-256", 19, 1),
    "128 to 128 up to 256": ("paper-256", 22, 1),
    "128 to 128 at 256": ("paper-256", 23, 1),
    "128 to 3 at 256": ("paper-256", 24, 1),
    "64 to 64 at 64": ("pyramid-256", 15, 1),
    "144 to 144 at 8": ("pyramid-256", 4, 1),
    "48 to 48 up to 128, and at 128": ("pyramid-256", 18, 2),
    "32 to 32 at 256, to 3": ("pyramid-256", 23, 2),
    "the stem of pyramid-256 up to 16": ("pyramid-256", 0, 10),
}
"""Name -> preset, first convolution and how many follow each other."""


WAYS = {
    "triton_conv": "Triton",
    "triton_image": "Triton",
    "triton_descriptor": "Triton descriptors",
    "conv": "CUDA conv_layer",
    "image": "CUDA conv_image",
    "pair": "CUDA conv_pair",
    "stem": "CUDA student_stem",
}
"""The engine's names of kernels, as tables have them."""


class Chain:
    """Consecutive convolutions of a preset with weights as after initialisation, as :class:`Folded` reads a fused student."""

    def __init__(self, preset, first, count):
        self.config, self.first = PRESETS[preset], first
        self.network = convolutions(self.config)
        self.layers = self.network[first : first + count]
        self.image = is_image(self.layers[-1])
        generator = torch.Generator().manual_seed(0)
        for i, layer in enumerate(self.layers):
            scale = (2 / (9 * layer.c_in)) ** 0.5
            setattr(self, f"weight{i}", scale * torch.randn(layer.c_out, layer.c_in, 3, 3, generator=generator))
            setattr(self, f"bias{i}", 0.1 * torch.randn(layer.c_out, generator=generator))

    def weights(self):
        """``(weight, bias)`` of every layer."""
        return [(getattr(self, f"weight{i}"), getattr(self, f"bias{i}")) for i in range(len(self.layers))]

    def module(self, transposed):
        """As an engine's user folds it."""
        found = Folded(self, transposed, inplace=True)
        found.tanh = self.image
        return found


def case(name, batch, dtype, device="cuda"):
    """The case of one chain, batch size and dtype."""
    kind, product = GPU_DTYPES[dtype], predictions.PRODUCTS[dtype]
    set_tf32(product == "tf32")
    torch._dynamo.reset()
    chain = Chain(*CHAINS[name])
    first, last = chain.layers[0], chain.layers[-1]
    moved = predictions.moved_bytes(first, last, product, batch)
    count = sets_beyond_cache(moved, device)
    generator = torch.Generator(device).manual_seed(1)
    shape = (count, batch, first.c_in, first.height, first.width)
    inputs = torch.randn(shape, generator=generator, device=device).to(kind)
    with torch.no_grad():
        wanted = copy.deepcopy(chain.module(False)).double().to(device)(inputs[0].double()).cpu()
    plain = peers.graphed(chain.module(False), inputs[0], kind)()
    error = (plain.double().cpu() - wanted).abs().max().item()
    # Where operands are rounded cuDNN's error is the measure; full float32 is exact to a few roundings of long sums.
    tolerance = 1e-5 * wanted.abs().max().item() if product == "f32" else 4 * error
    work = batch * sum(map(predictions.flop, chain.layers))
    least = max(work / gpu_rates().flops[product], moved / gpu_rates().bandwidth)
    notes = {
        "sets": count,
        "cudnn_error": error,
        "floor": {"seconds": least, "flop": work, "bytes": moved},
        "tf32": product == "tf32",
    }
    contestants = [*_ours(chain, inputs, kind, product), *_peers(chain, inputs, kind)]
    title = f"{name}, batch {batch}, {dtype}"
    figures = {"flop": work, "moved_bytes": moved, "repeats": 20, "notes": notes}
    return Case(title, lambda: wanted, tolerance, contestants, batch, device=device, **figures)


def ways(chain, product, kind, limits, batch):
    """``{name: steps}``: our kernels that compute the whole chain in one launch, each in all of its configurations."""
    engine = SimpleNamespace(layers=chain.network, product=product, dtype=kind, limits=limits, backend="cuda")
    found = {}
    for step in all_steps(engine, batch, ("cuda", "triton"), tune=True):
        if (step.first, step.count) == (chain.first, len(chain.layers)):
            found.setdefault(f"advkd, {WAYS[step.kernel]}", []).append(step)
    return found


def _ours(chain, inputs, kind, product):
    """Every kernel that computes the chain in one launch, in the configuration that is fastest here."""
    steps = ways(chain, product, kind, Limits.of(inputs.device), inputs.shape[1])
    return [Contestant(n, lambda s=found: _fastest(chain, inputs, kind, product, s), "ours") for n, found in steps.items()]


def _fastest(chain, inputs, kind, product, steps):
    replays = [_launches(chain, inputs, kind, product, step) for step in steps]
    if len(replays) == 1:
        return replays[0]
    times = measure_events(dict(enumerate(replays)), repeats=3)
    return replays[min(times, key=lambda i: times[i]["median"])]


def _launches(chain, inputs, kind, product, step):
    """One launch per set of inputs, captured; the first set's result as (N, C, H, W), a view."""
    stored, packed, biases, out = tensors(chain, inputs[0], kind, product, step)
    last, given = chain.layers[-1], [stored, *(_stored(x, chain.layers[0]) for x in inputs[1:])]
    outputs = [out, *(torch.empty_like(out) for _ in inputs[1:])]

    def launch(i):
        run_step(step, chain.network, given[i], packed, biases, outputs[i], SLOPE, product)
        return outputs[i] if chain.image else outputs[i][..., : last.c_out].permute(0, 3, 1, 2)

    return Replay(launch, len(inputs))


def tensors(chain, x, kind, product, step):
    """Input, packed weights, biases and output of a launch that computes a chain, on the GPU; ``x``: (N, C, H, W)."""
    count, last = len(chain.network), chain.layers[-1]
    packed, biases = [None] * count, [None] * count
    for i, (weight, bias) in enumerate(chain.weights(), chain.first):
        form = step.form(i, count - 1)
        packed[i], biases[i] = pack_gpu(weight.to(x.device), bias.to(x.device), chain.network[i], kind, form, product)
    sides = output_sides(last)
    shape = (len(x), last.c_out, *sides) if chain.image else (len(x), *sides, padded(last.c_out))
    return _stored(x, chain.layers[0]), packed, biases, x.new_empty(shape)


def _stored(x, layer):
    """(N, C, H, W) as our kernels keep it."""
    found = x.new_zeros((len(x), *x.shape[2:], input_channels(layer)))
    found[..., : layer.c_in] = x.permute(0, 2, 3, 1)
    return found


def _peers(chain, inputs, kind):
    """cuDNN's kernels and the compiler's, in graphs of ours: torch.compile's own would copy their inputs."""
    found = []
    for by_hand in (False, True) if any(layer.upsample for layer in chain.layers) else (False,):

        def prepare(mode=None, by_hand=by_hand):
            return peers.graphed(chain.module(by_hand), inputs[0], kind, mode, inputs[1:])

        compiled = functools.partial(prepare, "max-autotune-no-cudagraphs")
        found += [
            Contestant("cuDNN" + BY_HAND * by_hand, prepare, "peer" if by_hand else "baseline"),
            Contestant("torch.compile, max-autotune" + BY_HAND * by_hand, compiled, costly=True),
        ]
    return found


PROFILED = (
    "128 to 128 at 256",
    "128 to 128 up to 256",
    "128 to 3 at 256",
    "48 to 48 up to 128, and at 128",
    "32 to 32 at 256, to 3",
    "the stem of pyramid-256 up to 16",
)
"""The chains of layers whose kernels Nsight Compute looks at, one process each."""
PROFILED_BATCH = 8


def launch(name):
    """Launch each way to compute a chain once, for a profiler; prints ``LAUNCH {json}`` per launch, in their order."""
    chain = Chain(*CHAINS[name])
    first, flop = chain.layers[0], PROFILED_BATCH * sum(map(predictions.flop, chain.layers))
    x = torch.randn(PROFILED_BATCH, first.c_in, first.height, first.width, device="cuda").bfloat16()
    for way, steps in ways(chain, "bf16", torch.bfloat16, Limits.of(x.device), PROFILED_BATCH).items():
        step = steps[-1]
        stored, packed, biases, out = tensors(chain, x, torch.bfloat16, "bf16", step)
        run_step(step, chain.network, stored, packed, biases, out, SLOPE, "bf16")
        torch.cuda.synchronize()
        print("LAUNCH " + json.dumps({"way": way, "config": step.config, "flop": flop}), flush=True)


def cases(device):
    """Every chain at batch 8 in each dtype, and at batch 1 and 64 in bfloat16; none on a CPU (see the student's layers)."""
    if device == "cpu":
        return {}
    shapes = [(name, 8, dtype) for dtype in GPU_DTYPES for name in CHAINS]
    shapes += [(name, batch, "bfloat16") for batch in (1, 64) for name in CHAINS]
    return {f"{name}, batch {batch}, {dtype}": functools.partial(case, name, batch, dtype) for name, batch, dtype in shapes}


if __name__ == "__main__":
    main(name="bench_conv_block", cases=cases, parity_tests=PARITY_TESTS)
