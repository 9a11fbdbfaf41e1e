"""The student's one pass: plain module, fused student, and other engines on the folded network.

python -m profiling.cases.student [--device cuda] [--only digits] [--out FOLDER]

On a GPU every contestant's weights and activations have the case's dtype; "float32" is full float32 for everyone, "float32 with
TF32" lets everyone round to TensorFloat-32. Times are of calls in a row, between events on the stream. "advkd, auto" is a
user's call, which replays a graph and copies in and out; "bare graph" is the same launches over tensors that stay where they
are, as the peers' graphs are timed. The floor is a copy that moves as many bytes as latents, weights and images have.
"""

import copy
import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from advkd import Student
from advkd.models.shape import convolutions

from .. import gpu_peers, peers
from ..gpu_timing import set_tf32
from ..harness import CAPTURED, Case, Contestant, main
from ..limits import predictions

SHAPES = {"digits": (1, 16, 64), "pyramid-256": (1, 8), "paper-256": (1, 8)}
PARITY_TESTS = ["tests/ops/test_conv_block.py", "tests/ops/test_student_forward.py", "tests/system/test_student.py"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Folded(nn.Module):
    """The student as an engine's user folds it: convolutions with bias, LeakyReLU, nearest up-sampling, input (N, C, 4, 4).

    With ``transposed`` each up-sampling is folded into its convolution by hand: ``conv_transpose2d`` with 4x4 taps, stride 2
    and padding 1 makes the same image from (w2, w1 + w2, w0 + w1, w0) along each axis. ``inplace``: LeakyReLU takes no memory
    of its own.
    """

    def __init__(self, fused, transposed=False, inplace=False):
        super().__init__()
        self.inplace, self.tanh = inplace, True
        self.slope = fused.config.slope
        self.ups = [layer.upsample for layer in fused.layers]
        self.transposed = transposed
        self.convolutions = nn.ModuleList()
        for i, layer in enumerate(fused.layers):
            weight = getattr(fused, f"weight{i}")
            if transposed and layer.upsample:
                convolution = nn.ConvTranspose2d(layer.c_in, layer.c_out, 4, stride=2, padding=1)
                convolution.weight.data = _transposed(weight)
            else:
                convolution = nn.Conv2d(layer.c_in, layer.c_out, 3, padding=1)
                convolution.weight.data = weight.clone()
            convolution.bias.data = getattr(fused, f"bias{i}").clone()
            self.convolutions.append(convolution)
        self.eval().requires_grad_(False)

    def forward(self, x):
        last = len(self.convolutions) - 1
        for i, convolution in enumerate(self.convolutions):
            if self.ups[i] and not self.transposed:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = convolution(x)
            x = torch.tanh(x) if i == last and self.tanh else F.leaky_relu(x, self.slope, self.inplace)
        return x


def _transposed(weight):
    taps = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
    return torch.einsum("ocij,ui,vj->couv", weight.double(), taps, taps).to(weight.dtype).contiguous()


def case(preset, batch, dtype="float32"):
    """The case of one preset, batch size and dtype."""
    kind = DTYPES[dtype]
    student = plausible_student(preset)
    fused = student.fuse(dtype=kind)
    z = fused.latents(batch, seed=1)
    channels, side = fused.latent_parts[0]
    x = z.reshape(batch, channels, side, side)
    folded = Folded(student.fuse(tune=False))
    wanted = _oracle(copy.deepcopy(student).double(), z)
    # float32: 1e-4 of the output's range. bfloat16: four times eager's error, so that no engine is left out by a single pixel.
    error = (peers.eager(copy.deepcopy(folded), x, kind)().double() - wanted).abs().max().item()
    tolerance = 1e-4 * (wanted.max() - wanted.min()).item() if kind == torch.float32 else 4 * error
    contestants = [Contestant(f"advkd, FusedStudent {dtype}", lambda: lambda: fused(z), "ours"), *_peers(folded, x, kind)]
    if kind == torch.float32:
        contestants.insert(1, Contestant("PyTorch eager", lambda: _plain(student, z), "baseline"))
    transposed = Folded(student.fuse(tune=False), transposed=True)
    contestants.append(
        Contestant("torch.compile, freezing, conv_transpose2d", lambda: peers.compiled(copy.deepcopy(transposed), x, kind))
    )
    flop = 2 * batch * direct_products(student.config)
    parameters = sum(p.numel() for p in folded.parameters())
    moved = 4 * (parameters + x.numel() + wanted.numel())
    repeats = {"digits": 30, "pyramid-256": 10, "paper-256": 10 if batch == 1 else 5}[preset]
    name = f"{preset}, batch {batch}, {dtype}"
    return Case(name, lambda: wanted, tolerance, contestants, batch, flop, moved, repeats)


def direct_products(config):
    """Multiply-adds of one image, on the up-sampled tensors."""
    return sum(9 * i.c_in * i.c_out * i.height * i.width * (4 if i.upsample else 1) for i in convolutions(config))


def _plain(student, z):
    model = student.to(memory_format=torch.channels_last)

    def call():
        with torch.inference_mode():
            return model(z)

    return call


def _peers(folded, x, dtype):
    """Every engine that computes in this dtype."""
    names = {
        "PyTorch eager, folded": peers.eager,
        "torch.compile, folded, freezing": peers.compiled,
        "OpenVINO": peers.openvino,
        "ncnn": peers.ncnn,
    }
    found = [Contestant(n, lambda peer=peer: peer(copy.deepcopy(folded), x, dtype)) for n, peer in names.items()]
    if dtype == torch.float32:
        found.append(Contestant("ONNX Runtime", lambda: peers.onnx_runtime(copy.deepcopy(folded), x)))
    return found


@torch.no_grad()
def plausible_student(preset):
    """A student with plausible batch-norm statistics: the shipped one, or fresh weights that have seen some latents."""
    if preset in Student.embedded:
        return Student.from_pretrained(preset)
    torch.manual_seed(0)
    student = Student.from_preset(preset).train()
    for seed in range(2):
        student(student.latents(4, seed))
    return student.eval()


@torch.no_grad()
def _oracle(double, z, images=1):
    """Float64 images, so many at a time, to bound memory."""
    return torch.cat([double(rows.double()) for rows in z.split(images)])


@functools.lru_cache(maxsize=4)
def _oracle_once(preset, batch, device):
    """The latents and float64 images of a case on its device, whatever its dtype and peers."""
    student = _plausible_once(preset)
    z = student.latents(batch, seed=1).to(device)
    return z, _oracle(copy.deepcopy(student).double().to(device), z, images=4)


GPU_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float32 with TF32": torch.float32,
}
SEARCHED = ", max-autotune"
"""Ends the names of cases with what takes the compiler minutes."""


def gpu_case(preset, batch, dtype, peers="all", device="cuda"):
    """The case of one preset, batch size and dtype on a GPU; ``peers``: a key of :data:`GPU_PEERS`."""
    kind, product = GPU_DTYPES[dtype], predictions.PRODUCTS[dtype]
    set_tf32(product == "tf32")
    # Code compiled for other cases would be looked through on every call.
    torch._dynamo.reset()
    student, (z, wanted) = copy.deepcopy(_plausible_once(preset)), _oracle_once(preset, batch, device)
    fused = student.fuse("reference", tune=False)
    channels, side = fused.latent_parts[0]
    x = z.reshape(batch, channels, side, side)
    folded = {transposed: Folded(fused, transposed, inplace=True) for transposed in (False, True)}
    # As on a CPU: float32 1e-4 of the output's range; where operands are rounded, four times cuDNN's error.
    error = (gpu_peers.eager(copy.deepcopy(folded[False]), x, kind)().double() - wanted).abs().max().item()
    tolerance = 1e-4 * (wanted.max() - wanted.min()).item() if product == "f32" else 4 * error
    layers = convolutions(student.config)
    notes = {
        "floor": predictions.floor(layers, product, batch, gpu_rates()),
        "cudnn_error": error,
        "tf32": product == "tf32",
        "peers": peers,
        "predicted_microseconds": predictions.predicted_microseconds(preset, batch, dtype),
    }
    contestants = [*_gpu_ours(student, z, kind), *_gpu_floors(notes["floor"]["bytes"], device)]
    contestants += _gpu_peers(folded, x, kind, peers)
    name = predictions.case_name(preset, batch, dtype) + (SEARCHED if peers == "searched" else "")
    figures = {"flop": notes["floor"]["flop"], "moved_bytes": notes["floor"]["bytes"], "notes": notes, "keep_going": True}
    return Case(name, lambda: wanted, tolerance, contestants, batch, repeats=20, device=device, **figures)


def gpu_rates():
    """The rates that floors are counted with: measured ones where this process knows them, else an H200's."""
    return MEASURED_RATES[0] if MEASURED_RATES else predictions.H200


MEASURED_RATES = []


def _gpu_ours(student, z, kind):
    """Our engine: each GPU backend alone, and the plan that may mix them, as it is called and as a bare graph."""

    @functools.cache
    def engine(backend):
        return copy.deepcopy(student).to(z.device).fuse(backend=backend, dtype=kind, tune=True)

    def call(backend):
        return functools.partial(engine(backend), z)

    found = [Contestant(f"advkd, {name}", lambda b=name: call(b), "ours") for name in ("auto", "cuda", "triton")]
    bare = Contestant("advkd, auto, bare graph", lambda: _bare_graph(call("auto")), "ours", captured=True)
    return [found[0], bare, *found[1:]]


def _bare_graph(call):
    """An engine's launches in a graph of our own, where it neither copies nor records events: latents and images stay."""
    # The plan is measured and the weights are packed before anything is captured.
    call()
    return gpu_peers.Replay(lambda i: call())


def _gpu_floors(moved, device):
    """A copy that reads and writes so many bytes together, as a call and as a graph."""
    source, target = torch.randn(-(-moved // 8), device=device), torch.empty(-(-moved // 8), device=device)

    def copied():
        return target.copy_(source)

    return [
        Contestant(COPY, lambda: copied, "floor"),
        Contestant(COPY + CAPTURED, lambda: gpu_peers.Replay(lambda i: copied()), "floor", captured=True),
    ]


COPY = "a copy that moves as many bytes"
FOLDED_BY_HAND = {False: "", True: ", conv_transpose2d"}
GPU_ENGINES = {
    "cuDNN eager": gpu_peers.eager,
    "cuDNN, CUDA graph": gpu_peers.graphed,
    "cuDNN graph API": gpu_peers.cudnn_graph,
    "torch.compile, reduce-overhead": gpu_peers.compiled,
    "torch.compile, CUDA graph": gpu_peers.compiled_graph,
    "torch.compile, max-autotune": functools.partial(gpu_peers.compiled, mode="max-autotune"),
    "TensorRT": gpu_peers.tensorrt,
}
GRAPHS = ("cuDNN, CUDA graph", "cuDNN graph API", "torch.compile, CUDA graph", "TensorRT")
"""The engines whose calls replay one captured graph over tensors that stay where they are."""
GPU_PEERS = {
    "all": [
        ("cuDNN eager", False),
        ("cuDNN, CUDA graph", False),
        ("cuDNN, CUDA graph", True),
        ("torch.compile, reduce-overhead", True),
        ("torch.compile, CUDA graph", True),
        *((name, by_hand) for name in ("cuDNN graph API", "TensorRT") for by_hand in (True, False)),
        ("torch.compile, reduce-overhead", False),
    ],
    "few": [("cuDNN eager", False), ("cuDNN, CUDA graph", True), ("torch.compile, reduce-overhead", True)],
    "searched": [("torch.compile, max-autotune", by_hand) for by_hand in (True, False)],
}
"""Selections of engines on the plain network or, where True, on the one whose up-sampling is folded by hand."""
COSTLY = {
    *itertools.product(("cuDNN graph API", "TensorRT", "torch.compile, max-autotune"), (False, True)),
    ("torch.compile, reduce-overhead", False),
}
"""Those whose compilation takes longest, or that compile a second network: they come last."""


def _gpu_peers(folded, x, kind, peers):
    found = []
    for name, by_hand in GPU_PEERS[peers]:
        engine, module = GPU_ENGINES[name], folded[by_hand]
        prepare = functools.partial(lambda engine, module: engine(copy.deepcopy(module), x, kind), engine, module)
        words = {"captured": name in GRAPHS, "costly": (name, by_hand) in COSTLY}
        side = "baseline" if name == "cuDNN eager" else "peer"
        found.append(Contestant(name + FOLDED_BY_HAND[by_hand], prepare, side, **words))
    return found


@functools.cache
def _plausible_once(preset):
    return plausible_student(preset)


def gpu_cases():
    """Every case on a GPU by name, those that take the compiler minutes last."""
    shapes = [(preset, n, dtype) for dtype in GPU_DTYPES for preset, batches in predictions.BATCHES.items() for n in batches]
    found = {predictions.case_name(*shape): functools.partial(gpu_case, *shape) for shape in shapes}
    slow = {predictions.case_name(*shape) + SEARCHED: functools.partial(gpu_case, *shape, "searched") for shape in shapes}
    return {**found, **slow}


def quick_cases():
    """The same cases with the peers that compile fastest, but for those in :data:`WHOLE`."""
    shapes = [(preset, n, dtype) for dtype in GPU_DTYPES for preset, batches in predictions.BATCHES.items() for n in batches]
    few = {predictions.case_name(*shape): functools.partial(gpu_case, *shape, "few") for shape in shapes}
    return {**gpu_cases(), **{name: build for name, build in few.items() if name not in WHOLE}}


WHOLE = ("paper-256, batch 8, bfloat16", "pyramid-256, batch 1, bfloat16")


CASES = {
    f"{preset}, batch {batch}, {dtype}": lambda preset=preset, batch=batch, dtype=dtype: case(preset, batch, dtype)
    for preset, batches in SHAPES.items()
    for batch in batches
    for dtype in DTYPES
}


def cases(device):
    """The cases of a device by name."""
    return CASES if device == "cpu" else gpu_cases()


if __name__ == "__main__":
    main("bench_student", cases, PARITY_TESTS)
