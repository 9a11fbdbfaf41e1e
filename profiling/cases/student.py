"""The student's one pass: plain module, fused student, and other engines on the folded network.

python -m profiling.cases.student [--device cuda] [--only digits] [--out FOLDER]     # or --only layers, scaling
python -m profiling.cases.student --only precision [--num 2000] [--processes 2] [--out FOLDER]

On a GPU every contestant's weights and activations have the case's dtype; "float32" is full float32 for everyone, "float32 with
TF32" lets everyone round to TensorFloat-32. Times are of calls in a row, between events on the stream. "advkd, auto" is a
user's call, which replays a graph and copies in and out; "bare graph" is the same launches over tensors that stay where they
are, as the peers' graphs are timed. The floor is a copy that moves as many bytes as latents, weights and images have.
"""

import copy
import functools
import itertools
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from advkd import EvaluationConfig, Student, StudentConfig, evaluate_student
from advkd.models.shape import convolutions
from advkd.runtime.timing import measure, percentiles

from .. import peers as engines
from ..harness import CAPTURED, Case, Contestant, Replay, Sweep, main, set_tf32
from ..limits import predictions
from ..sweep import curves, growth, medians, panels
from .tables import TABLES

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
    error = (engines.eager(copy.deepcopy(folded), x, kind)().double() - wanted).abs().max().item()
    tolerance = 1e-4 * (wanted.max() - wanted.min()).item() if kind == torch.float32 else 4 * error
    contestants = [Contestant(f"advkd, FusedStudent {dtype}", lambda: lambda: fused(z), "ours"), *_peers(folded, x, kind)]
    if kind == torch.float32:
        contestants.insert(1, Contestant("PyTorch eager", lambda: _plain(student, z), "baseline"))
    transposed = Folded(student.fuse(tune=False), transposed=True)
    contestants.append(
        Contestant("torch.compile, freezing, conv_transpose2d", lambda: engines.compiled(copy.deepcopy(transposed), x, kind))
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
        "PyTorch eager, folded": engines.eager,
        "torch.compile, folded, freezing": engines.compiled,
        "OpenVINO": engines.openvino,
        "ncnn": engines.ncnn,
    }
    found = [Contestant(n, lambda peer=peer: peer(copy.deepcopy(folded), x, dtype)) for n, peer in names.items()]
    if dtype == torch.float32:
        found.append(Contestant("ONNX Runtime", lambda: engines.onnx_runtime(copy.deepcopy(folded), x)))
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
    error = (engines.eager(copy.deepcopy(folded[False]), x, kind)().double() - wanted).abs().max().item()
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
    return Replay(lambda i: call())


def _gpu_floors(moved, device):
    """A copy that reads and writes so many bytes together, as a call and as a graph."""
    source, target = torch.randn(-(-moved // 8), device=device), torch.empty(-(-moved // 8), device=device)

    def copied():
        return target.copy_(source)

    return [
        Contestant(COPY, lambda: copied, "floor"),
        Contestant(COPY + CAPTURED, lambda: Replay(lambda i: copied()), "floor", captured=True),
    ]


COPY = "a copy that moves as many bytes"
FOLDED_BY_HAND = {False: "", True: ", conv_transpose2d"}
GPU_ENGINES = {
    "cuDNN eager": engines.eager,
    "cuDNN, CUDA graph": engines.graphed,
    "cuDNN graph API": engines.cudnn_graph,
    "torch.compile, reduce-overhead": engines.compiled,
    "torch.compile, CUDA graph": engines.compiled_graph,
    "torch.compile, max-autotune": functools.partial(engines.compiled, mode="max-autotune"),
    "TensorRT": engines.tensorrt,
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


def gpu_cases(quick=False):
    """Every case on a GPU by name, those that take the compiler minutes last.

    ``quick``: with the peers that compile fastest, but for those in :data:`WHOLE`.
    """
    found, slow = {}, {}
    for dtype, preset in itertools.product(GPU_DTYPES, predictions.BATCHES):
        for n in predictions.BATCHES[preset]:
            name = predictions.case_name(preset, n, dtype)
            peers = "few" if quick and name not in WHOLE else "all"
            found[name] = functools.partial(gpu_case, preset, n, dtype, peers)
            slow[name + SEARCHED] = functools.partial(gpu_case, preset, n, dtype, "searched")
    return {**found, **slow}


quick_cases = functools.partial(gpu_cases, quick=True)
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


PLANS = 5
"""Plans measured of each student."""


def measured_plan(preset, dtype):
    """One preset's plan with measured times, as JSON values."""
    fused = plausible_student(preset).fuse("cpu", DTYPES[dtype])
    plans = [fused.plan() for _ in range(PLANS)]
    plan = plans[0]
    peak = plan.rate[DTYPES[dtype]]
    rows = []
    for same in zip(*(plan.rows for plan in plans)):
        row, seconds = same[0], percentiles([other.measured for other in same])
        figures = {k: v for k, v in asdict(row).items() if k not in ("layer", "measured")}
        rate = row.direct_products / seconds["median"]
        rows.append({**asdict(row.layer), **figures, "seconds": seconds, "gflops": 2e-9 * rate, "of_peak": rate / peak})
    rate = {str(kind).removeprefix("torch."): value for kind, value in plan.rate.items()}
    return {"preset": preset, "dtype": dtype, "isa": plan.isa, "products_per_second": rate, "layers": rows}


def plans():
    """Every layer of the fused students on this processor: algorithm, useful rate, share of the rate in registers."""
    return {
        "students": [measured_plan(preset, dtype) for preset in SHAPES for dtype in DTYPES],
        "threads": torch.get_num_threads(),
    }


KEPT = ("frechet", "frechet_interval", "times_floor", "precision", "recall")
"""The figures of an evaluation that are kept."""


def precision(num, processes):
    """Cost of bfloat16 for the shipped student: PSNR against float32 on the same noise, and the Frechet distance of both.

    ``num``: images of each dtype; ``processes`` draw the teacher's, twice as many and once.
    """
    student, rows = Student.from_pretrained("digits"), {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            config = EvaluationConfig(num=num, processes=processes, dtype=dtype, real="none")
            row = evaluate_student("digits", "digits", config, Path(folder) / dtype)["rows"][0]
            rows[dtype] = {name: row[name] for name in KEPT}
    z = student.latents(256, seed=1)
    single, narrow = (student.fuse(dtype=dtype)(z).double() for dtype in DTYPES.values())
    psnr = 10 * math.log10(4 / (single - narrow).square().mean().item())
    ratio = rows["bfloat16"]["frechet"] / rows["float32"]["frechet"]
    return {"student": "digits", "num": num, "psnr": psnr, "rows": rows, "ratio": ratio}


GROWN, BATCHES = ("digits", "pyramid-256"), (1, 2, 4, 8, 16, 32, 64)
SIZES = (32, 64, 128, 256, 512)
FIRST_IMAGES = 5
THREADED = (("digits", 1), ("digits", 8), ("pyramid-256", 1), ("pyramid-256", 8))
"""Preset and images of a call that is measured by threads."""

FIRST_IMAGE = """
import json, re, sys, time, torch

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.ones(1) + 1
begin, before = time.perf_counter(), memory("VmRSS")
import advkd
fused = advkd.Student.from_pretrained(sys.argv[1]).fuse(dtype=getattr(torch, sys.argv[2]), tune=False)
fused.sample(1)
seconds = time.perf_counter() - begin
# The peak from here on is the image's: loading has a peak of its own.
torch.ops.advkd_cpu.clear_workspaces()
open("/proc/self/clear_refs", "w").write("5")
loaded = memory("VmRSS")
fused.sample(1)
figures = {"seconds": seconds, "loading_bytes": loaded - before, "image_bytes": memory("VmHWM") - loaded}
print(json.dumps(figures))
"""


def seconds(fused, batch, repeats):
    """Seconds of a call."""
    z = fused.latents(batch, seed=1)
    return measure({"call": lambda: fused(z)}, repeats, warmup=2)["call"]


def batches(dtype):
    """The shipped student and the pyramid, by batch."""
    rows = []
    for preset in GROWN:
        fused = plausible_student(preset).fuse("cpu", DTYPES[dtype])
        work = direct_products(fused.config)
        for batch in BATCHES:
            call = seconds(fused, batch, 30 if preset == "digits" else max(3, 40 // batch))
            rows.append({"preset": preset, "dtype": dtype, "batch": batch, "seconds": call, "products": batch * work})
    return rows


def sizes(dtype):
    """Students of 32 channels throughout, by image size."""
    rows = []
    for size in SIZES:
        depth = 2 * (size.bit_length() - 3)
        config = StudentConfig(size, 3, channels=(32,) * max(4, depth))
        torch.manual_seed(0)
        fused = Student(config).eval().fuse("cpu", DTYPES[dtype])
        rows.append({"size": size, "dtype": dtype, "seconds": seconds(fused, 1, 20), "products": direct_products(config)})
    return rows


def threads(dtype):
    """One image and eight on one thread and on all."""
    rows, most = [], torch.get_num_threads()
    for preset, batch in THREADED:
        fused = plausible_student(preset).fuse("cpu", DTYPES[dtype])
        for count in sorted({1, *(2**i for i in range(1, 7) if 2**i <= most), most}):
            torch.set_num_threads(count)
            rows.append(
                {"preset": preset, "dtype": dtype, "batch": batch, "threads": count, "seconds": seconds(fused, batch, 15)}
            )
        torch.set_num_threads(most)
    return rows


def footprint(preset, dtype, folder):
    """Seconds and memory of a first image in a fresh process, beside what the engine says it takes."""
    student = plausible_student(preset)
    student.save_pretrained(Path(folder) / preset)
    fused = student.fuse("cpu", DTYPES[dtype], tune=False)
    element = 4 if dtype == "float32" else 2
    pixels = [i.c_out * i.height * i.width * (4 if i.upsample else 1) for i in fused.layers[:-1]]
    command = [sys.executable, "-c", FIRST_IMAGE, str(Path(folder) / preset), dtype]
    runs = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(FIRST_IMAGES)]
    measured = {key: percentiles([run[key] for run in runs]) for key in runs[0]}
    two = element * sum(sorted(pixels)[-2:])
    return {"preset": preset, "dtype": dtype, **fused.memory(1), "two_largest_activations": two, "first_image": measured}


def scaling():
    """Growth of the cost with batch, resolution and threads, and the memory of a first image."""
    with tempfile.TemporaryDirectory() as folder:
        footprints = [footprint(preset, dtype, folder) for preset in SHAPES for dtype in DTYPES]
    parts = {"batches": batches, "sizes": sizes, "threads": threads}
    return {**{name: [r for dtype in DTYPES for r in part(dtype)] for name, part in parts.items()}, "footprints": footprints}


def plot(result, path):
    """Three panels: time by batch, by resolution, by threads, each beside proportional growth."""

    def rows(part, **wanted):
        return [row for row in result[part] if wanted.items() <= row.items()]

    with panels(path, size=(13, 4), count=3) as (left, middle, right):
        found = {(p, d): rows("batches", preset=p, dtype=d) for p in GROWN for d in DTYPES}
        times = {", ".join(names): medians(chosen, "seconds") for names, chosen in found.items()}
        expected = [growth(values, BATCHES, 0) for values in times.values()]
        words = {"ylabel": "ms per call", "title": "batch (dotted: proportional)"}
        curves(left, BATCHES, times, expected, xlabel="images per call", **words)
        times = {dtype: medians(rows("sizes", dtype=dtype), "seconds") for dtype in DTYPES}
        works = [row["products"] for row in rows("sizes", dtype="float32")]
        words = {"ylabel": "ms per image", "title": "resolution (dotted: proportional to work)"}
        expected = [growth(values, works, -1) for values in times.values()]
        curves(middle, SIZES, times, expected, xlabel="image side, 32 channels throughout", **words)
        for preset, batch in THREADED:
            chosen = rows("threads", preset=preset, batch=batch, dtype="float32")
            speedups = [chosen[0]["seconds"]["median"] / row["seconds"]["median"] for row in chosen]
            right.plot([row["threads"] for row in chosen], speedups, "o-", label=f"{preset}, batch {batch}")
        counts = sorted({row["threads"] for row in result["threads"]})
        right.plot(counts, counts, ":", color="gray")
        right.set(xlabel="threads", ylabel="times one thread's speed", title="threads, float32", xticks=counts)
        right.legend()


SWEEPS = {
    "layers": Sweep("layers", plans, PARITY_TESTS, [TABLES["layers"]]),
    "precision": Sweep("precision", precision, PARITY_TESTS, [TABLES["precision"]], options={"num": 2000, "processes": 1}),
    "scaling": Sweep("scaling", scaling, PARITY_TESTS, [TABLES["footprint"]], plot),
}

if __name__ == "__main__":
    main(SWEEPS, "bench_student", cases, PARITY_TESTS)
