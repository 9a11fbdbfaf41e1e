"""The student's one pass: plain module, fused student, and other engines on the folded network.

python -m profiling.bench_student [--only digits] [--out FOLDER]
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from advkd import Student
from advkd.models.fused_student import convolutions

from . import peers
from .harness import Case, Contestant, main

SHAPES = {"digits": (1, 16, 64), "pyramid-256": (1, 8), "paper-256": (1, 8)}
PARITY_TESTS = ["tests/ops/test_conv_block.py", "tests/ops/test_student_forward.py", "tests/system/test_student.py"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Folded(nn.Module):
    """The student as an engine's user folds it: convolutions with bias, LeakyReLU, nearest up-sampling, input (N, C, 4, 4).

    With ``transposed`` each up-sampling is folded into its convolution by hand: ``conv_transpose2d`` with 4x4 taps, stride 2
    and padding 1 makes the same image from (w2, w1 + w2, w0 + w1, w0) along each axis.
    """

    def __init__(self, fused, transposed=False):
        super().__init__()
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
            x = torch.tanh(x) if i == last else F.leaky_relu(x, self.slope)
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
def _oracle(double, z):
    return torch.cat([double(row.double()) for row in z.split(1)])


CASES = {
    f"{preset}, batch {batch}, {dtype}": lambda preset=preset, batch=batch, dtype=dtype: case(preset, batch, dtype)
    for preset, batches in SHAPES.items()
    for batch in batches
    for dtype in DTYPES
}

if __name__ == "__main__":
    main("bench_student", CASES, PARITY_TESTS)
