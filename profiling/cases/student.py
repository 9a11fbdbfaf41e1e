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
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from advkd import EvaluationConfig, Student, StudentConfig, evaluate_student
from advkd.data.glyphs import CLASSES as CHARACTERS
from advkd.data.labels import labels_in_turn
from advkd.data.plots import panels
from advkd.models.classes import told
from advkd.models.shape import PRESETS, convolutions
from advkd.ops.student_forward import latent_numel
from advkd.runtime.timing import measure, percentiles

from .. import peers as engines
from ..harness import Case, Contestant, Replay, Sweep, copying, main, set_tf32, with_captured
from ..limits import predictions
from ..sweep import curves, growth, medians
from .tables import TABLES

PARITY_TESTS = ["tests/ops/test_conv_block.py", "tests/ops/test_student_forward.py", "tests/system/test_student.py"]


class Folded(nn.Module):
    """The student as an engine's user folds it: convolutions with bias, LeakyReLU, nearest up-sampling, input (N, C, 4, 4).

    Detail parts of the latent are further inputs, which join the features before each up-sampling.

    With ``transposed`` each up-sampling is folded into its convolution by hand: ``conv_transpose2d`` with 4x4 taps, stride 2
    and padding 1 makes the same image from (w2, w1 + w2, w0 + w1, w0) along each axis. ``inplace``: LeakyReLU takes no memory
    of its own.
    """

    def __init__(self, fused, transposed=False, inplace=False):
        super().__init__()
        self.transposed, self.inplace, self.tanh, self.slope = transposed, inplace, True, fused.config.slope
        self.ups, self.joins = [[getattr(layer, of) for layer in fused.layers] for of in ("upsample", "detail")]
        self.convolutions = nn.ModuleList()
        for i, layer in enumerate(fused.layers):
            by_hand, weight = transposed and layer.upsample, getattr(fused, f"weight{i}")
            kind, taps, stride = (nn.ConvTranspose2d, 4, 2) if by_hand else (nn.Conv2d, 3, 1)
            convolution = kind(layer.c_in, layer.c_out, taps, stride, padding=1)
            convolution.weight.data = _transposed(weight) if by_hand else weight.clone()
            convolution.bias.data = getattr(fused, f"bias{i}").clone()
            self.convolutions.append(convolution)
        self.eval().requires_grad_(False)

    def forward(self, x, *details):
        last, details = len(self.convolutions) - 1, list(details)
        for i, convolution in enumerate(self.convolutions):
            if self.joins[i]:
                x = torch.cat((x, details.pop(0)), dim=1)
            if self.ups[i] and not self.transposed:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = convolution(x)
            x = torch.tanh(x) if i == last and self.tanh else F.leaky_relu(x, self.slope, self.inplace)
        return x


class Told(nn.Module):
    """A folded network of flat latents and class numbers: the whole work of a conditional student, its embedding included."""

    def __init__(self, fused, *how):
        super().__init__()
        self.network, self.parts = Folded(fused, *how), fused.latent_parts
        self.embedding = nn.Embedding.from_pretrained(fused.embedding.clone())

    def forward(self, z, labels):
        pieces = torch.split(z, [channels * side * side for channels, side in self.parts], dim=1)
        x, *details = (piece.reshape(-1, *(c, side, side)) for piece, (c, side) in zip(pieces, self.parts))
        features = self.embedding(labels).reshape(-1, self.embedding.embedding_dim // 16, 4, 4)
        return self.network(torch.cat((x, features), dim=1), *details)


def _transposed(weight):
    taps = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
    return torch.einsum("ocij,ui,vj->couv", weight.double(), taps, taps).to(weight.dtype).contiguous()


def direct_products(config):
    """Multiply-adds of one image, on the up-sampled tensors."""
    return sum(9 * i.c_in * i.c_out * i.height * i.width * (4 if i.upsample else 1) for i in convolutions(config))


@torch.no_grad()
def plausible_student(preset):
    """A student with plausible batch-norm statistics: the shipped one, or fresh weights that have seen some latents."""
    if preset in Student.embedded:
        return Student.from_pretrained(preset)
    torch.manual_seed(0)
    student = Student(replace(PRESETS[preset], classes=CLASSES.get(preset, ()))).train()
    for seed in range(2):
        student(student.latents(4, seed), **labels_of(student, 4))
    return student.eval()


def labels_of(student, n):
    """The keyword for the classes of ``n`` latents, which take them in turn; none without classes."""
    return told(labels_in_turn(range(student.num_classes), 0, n))


_plausible_once = functools.cache(plausible_student)


@torch.no_grad()
def _oracle(double, z, images=4, **labels):
    """Float64 images, so many at a time, to bound memory."""
    parts = [{name: rows[i : i + images] for name, rows in labels.items()} for i in range(0, len(z), images)]
    return torch.cat([double(rows.double(), **part) for rows, part in zip(z.split(images), parts, strict=True)])


@functools.lru_cache(maxsize=4)
def _oracle_once(preset, batch, device):
    """The latents, labels and float64 images of a case on its device, whatever its dtype and peers."""
    student = _plausible_once(preset)
    z = student.latents(batch, seed=1).to(device)
    labels = {name: rows.to(device) for name, rows in labels_of(student, batch).items()}
    return z, labels, _oracle(copy.deepcopy(student).double().to(device), z, **labels)


BY_HAND = ", conv_transpose2d"
"""Ends the name of an engine on the network whose up-sampling is folded by hand."""
SEARCHED = ", max-autotune"
"""Ends the names of cases with what takes the compiler minutes."""
MAX_AUTOTUNE = functools.partial(engines.compiled, mode="max-autotune")
PEERS = {
    "cpu": [
        Contestant("PyTorch eager, folded", engines.eager),
        Contestant("torch.compile, folded, freezing", engines.compiled),
        Contestant("OpenVINO", engines.openvino),
        Contestant("ncnn", engines.ncnn),
        Contestant("ONNX Runtime", engines.onnx_runtime),
        Contestant("torch.compile, freezing" + BY_HAND, engines.compiled),
    ],
    "all": [
        Contestant("cuDNN eager", engines.eager, "baseline"),
        Contestant("cuDNN, CUDA graph", engines.graphed, captured=True),
        Contestant("cuDNN, CUDA graph" + BY_HAND, engines.graphed, captured=True),
        Contestant("torch.compile, reduce-overhead" + BY_HAND, engines.compiled),
        Contestant("torch.compile, CUDA graph" + BY_HAND, functools.partial(engines.graphed, mode="default"), captured=True),
        Contestant("cuDNN graph API" + BY_HAND, engines.cudnn_graph, captured=True, costly=True),
        Contestant("cuDNN graph API", engines.cudnn_graph, captured=True, costly=True),
        Contestant("TensorRT" + BY_HAND, engines.tensorrt, captured=True, costly=True),
        Contestant("TensorRT", engines.tensorrt, captured=True, costly=True),
        Contestant("torch.compile, reduce-overhead", engines.compiled, costly=True),
    ],
    "few": [
        Contestant("cuDNN eager", engines.eager, "baseline"),
        Contestant("cuDNN, CUDA graph" + BY_HAND, engines.graphed, captured=True),
        Contestant("torch.compile, reduce-overhead" + BY_HAND, engines.compiled),
    ],
    "searched": [
        Contestant("torch.compile, max-autotune" + BY_HAND, MAX_AUTOTUNE, costly=True),
        Contestant("torch.compile, max-autotune", MAX_AUTOTUNE, costly=True),
    ],
}
"""Selections of engines, each a function of the network, its input and the dtype: on a CPU, and on GPUs."""
GPU_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float32 with TF32": torch.float32,
}


def case(preset, batch, dtype="float32", peers="cpu", device=None):
    """The case of one preset, batch size and dtype; ``peers``: a key of :data:`PEERS`, and so the kind of device."""
    on_cpu, kind, product = peers == "cpu", GPU_DTYPES[dtype], predictions.PRODUCTS[dtype]
    device = device or ("cpu" if on_cpu else "cuda")
    set_tf32(product == "tf32")
    # Code compiled for other cases would be looked through on every call.
    torch._dynamo.reset()
    student, (z, labels, wanted) = copy.deepcopy(_plausible_once(preset)), _oracle_once(preset, batch, device)
    fused = student.fuse("reference", tune=False)
    channels, side = fused.latent_parts[0]
    x = (z, labels["labels"]) if labels else z.reshape(batch, channels, side, side)
    network = Told if labels else Folded
    folded = {by_hand: network(fused, by_hand, not on_cpu) for by_hand in (False, True)}
    # float32: 1e-4 of the output's range. Where operands are rounded: four times eager's error, so that no engine is left out
    # by a single pixel.
    error = (engines.eager(copy.deepcopy(folded[False]), x, kind)().double() - wanted).abs().max().item()
    tolerance = 1e-4 * (wanted.max() - wanted.min()).item() if product == "f32" else 4 * error
    found = Case(predictions.case_name(preset, batch, dtype), lambda: wanted, tolerance, images=batch, device=device)
    if on_cpu:
        found.flop = 2 * batch * direct_products(student.config)
        weights = sum(layer.c_out * (9 * layer.c_in + 1) for layer in fused.layers)
        found.moved_bytes = 4 * (weights + batch * latent_numel(fused.layers) + wanted.numel())
        found.repeats = {"pyramid-256": 10, "paper-256": 10 if batch == 1 else 5}.get(preset, 30)
        found.contestants = _cpu_ours(student, z, labels, dtype)
    else:
        floor = predictions.floor(convolutions(student.config), product, batch, gpu_rates())
        found.name += SEARCHED if peers == "searched" else ""
        found.flop, found.moved_bytes = floor["flop"], floor["bytes"]
        found.notes = {"floor": floor, "cudnn_error": error, "tf32": product == "tf32", "peers": peers}
        found.notes["predicted_microseconds"] = predictions.predicted_microseconds(preset, batch, dtype)
        floors = [copying("a copy that moves as many bytes", floor["bytes"], device)]
        found.contestants = [*_gpu_ours(student, z, labels, kind), *with_captured(floors, device)]
    for peer in PEERS[peers]:
        if kind == torch.float32 or peer.prepare is not engines.onnx_runtime:
            module = folded[peer.name.endswith(BY_HAND)]
            prepare = functools.partial(lambda engine, module: engine(copy.deepcopy(module), x, kind), peer.prepare, module)
            found.contestants.append(replace(peer, prepare=prepare))
    return found


def _cpu_ours(student, z, labels, dtype):
    """Our engine and, in float32, the student as it was trained."""

    def plain():
        model = student.to(memory_format=torch.channels_last)
        return lambda: torch.inference_mode()(model)(z, **labels)

    def fused():
        return functools.partial(student.fuse(dtype=GPU_DTYPES[dtype]), z, **labels)

    found = [Contestant(f"advkd, FusedStudent {dtype}", fused, "ours"), Contestant("PyTorch eager", plain, "baseline")]
    return found if dtype == "float32" else found[:1]


def _gpu_ours(student, z, labels, kind):
    """Our engine: each GPU backend alone, and the plan that may mix them, as it is called and as a bare graph."""

    @functools.cache
    def call(backend):
        return functools.partial(copy.deepcopy(student).to(z.device).fuse(backend=backend, dtype=kind, tune=True), z, **labels)

    def bare():
        # The plan is measured and the weights are packed before anything is captured; latents and images stay where they are.
        call("auto")()
        return Replay(lambda i: call("auto")())

    auto, *alone = (Contestant(f"advkd, {b}", functools.partial(call, b), "ours") for b in ("auto", "cuda", "triton"))
    return [auto, Contestant("advkd, auto, bare graph", bare, "ours", captured=True), *alone]


def gpu_rates():
    """The rates that floors are counted with: measured ones where this process knows them, else an H200's."""
    return MEASURED_RATES[0] if MEASURED_RATES else predictions.H200


MEASURED_RATES = []
SHAPES = {"digits": (1, 16, 64), "glyphs": (1, 16, 64), "pyramid-256": (1, 8), "paper-256": (1, 8)}
DTYPES = ("float32", "bfloat16")
"""Presets with their batches, and dtypes, on a CPU; ``glyphs`` is told its classes and takes the detail bands of the noise.

It is not among the cases of GPUs, :data:`profiling.limits.predictions.BATCHES`: their captured peers take one input.
"""
CLASSES = {"glyphs": tuple(CHARACTERS["all"])}
"""Names of the classes of a preset that is measured with them."""
WHOLE = ("paper-256, batch 8, bfloat16", "pyramid-256, batch 1, bfloat16")


def cases(device, quick=False):
    """The cases of a device by name, those that take the compiler minutes last.

    ``quick``: on a GPU with the peers that compile fastest, but for those in :data:`WHOLE`.
    """
    found, slow = {}, {}
    if device == "cpu":
        shapes = [(preset, n, dtype) for preset, batches in SHAPES.items() for n in batches for dtype in DTYPES]
        return {predictions.case_name(*shape): functools.partial(case, *shape) for shape in shapes}
    for dtype, preset in itertools.product(GPU_DTYPES, predictions.BATCHES):
        for n in predictions.BATCHES[preset]:
            name = predictions.case_name(preset, n, dtype)
            peers = "few" if quick and name not in WHOLE else "all"
            found[name] = functools.partial(case, preset, n, dtype, peers)
            slow[name + SEARCHED] = functools.partial(case, preset, n, dtype, "searched")
    return {**found, **slow}


quick_cases = functools.partial(cases, "cuda", quick=True)


PLANS = 5
"""Plans measured of each student."""


def measured_plan(preset, dtype):
    """One preset's plan with measured times, as JSON values."""
    fused = plausible_student(preset).fuse("cpu", getattr(torch, dtype))
    plan, *others = [fused.plan() for _ in range(PLANS)]
    rate, rows = {str(kind).removeprefix("torch."): value for kind, value in plan.rate.items()}, []
    for row, *same in zip(plan.rows, *(other.rows for other in others)):
        figures = {k: v for k, v in asdict(row).items() if k not in ("layer", "measured")}
        rows.append({**asdict(row.layer), **figures, "seconds": percentiles([one.measured for one in (row, *same)])})
    return {"preset": preset, "dtype": dtype, "isa": plan.isa, "products_per_second": rate, "layers": rows}


def plans():
    """Every layer of the fused students on this processor: algorithm, useful rate, share of the rate in registers."""
    students = [measured_plan(preset, dtype) for preset in SHAPES for dtype in DTYPES]
    return {"students": students, "threads": torch.get_num_threads()}


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
    single, narrow = (student.fuse(dtype=getattr(torch, dtype))(z).double() for dtype in DTYPES)
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
begin = time.perf_counter()
import advkd
fused = advkd.Student.from_pretrained(sys.argv[1]).fuse(dtype=getattr(torch, sys.argv[2]), tune=False)
fused.sample(1)
seconds = time.perf_counter() - begin
# The peak from here on is the image's: loading has a peak of its own.
torch.ops.advkd_cpu.clear_workspaces()
open("/proc/self/clear_refs", "w").write("5")
loaded = memory("VmRSS")
fused.sample(1)
print(json.dumps({"seconds": seconds, "image_bytes": memory("VmHWM") - loaded}))
"""


def timed_row(fused, repeats, batch=1, **row):
    """A row with the seconds of a call."""
    z = fused.latents(batch, seed=1)
    return {**row, "seconds": measure({"call": lambda: fused(z)}, repeats, warmup=2)["call"]}


def batches(dtype):
    """The shipped student and the pyramid, by batch."""
    for preset in GROWN:
        fused = plausible_student(preset).fuse("cpu", getattr(torch, dtype))
        for n in BATCHES:
            row = {"preset": preset, "dtype": dtype, "products": n * direct_products(fused.config)}
            yield {"batch": n, **timed_row(fused, 30 if preset == "digits" else max(3, 40 // n), n, **row)}


def sizes(dtype):
    """Students of 32 channels throughout, by image size."""
    for size in SIZES:
        config = StudentConfig(size, 3, channels=(32,) * max(4, 2 * (size.bit_length() - 3)))
        torch.manual_seed(0)
        fused = Student(config).eval().fuse("cpu", getattr(torch, dtype))
        yield timed_row(fused, 20, size=size, dtype=dtype, products=direct_products(config))


def threads(dtype):
    """One image and eight on one thread and on all."""
    most = torch.get_num_threads()
    for preset, n in THREADED:
        fused = plausible_student(preset).fuse("cpu", getattr(torch, dtype))
        for count in sorted({1, *(2**i for i in range(1, 7) if 2**i <= most), most}):
            torch.set_num_threads(count)
            yield {"batch": n, **timed_row(fused, 15, n, preset=preset, dtype=dtype, threads=count)}
        torch.set_num_threads(most)


def footprint(preset, dtype, folder):
    """Seconds and memory of a first image in a fresh process, beside what the engine says it takes."""
    student = plausible_student(preset)
    student.save_pretrained(Path(folder) / preset)
    fused = student.fuse("cpu", getattr(torch, dtype), tune=False)
    pixels = [i.c_out * i.height * i.width * (4 if i.upsample else 1) for i in fused.layers[:-1]]
    command = [sys.executable, "-c", FIRST_IMAGE, str(Path(folder) / preset), dtype]
    runs = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(FIRST_IMAGES)]
    measured = {key: percentiles([run[key] for run in runs]) for key in runs[0]}
    two = getattr(torch, dtype).itemsize * sum(sorted(pixels)[-2:])
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

    with panels(path, 3.8, columns=3) as (left, middle, right):
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
