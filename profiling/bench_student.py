"""The student's one pass: plain module, fused student, and other engines on the folded network.

python -m profiling.bench_student [--only digits] [--out FOLDER]
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from advkd import Student

from . import peers
from .harness import Case, Contestant, main

SHAPES = {"digits": (1, 16, 64), "pyramid-256": (1, 8), "paper-256": (1,)}


class Folded(nn.Module):
    """The student as an engine's user folds it: convolutions with bias, LeakyReLU, nearest up-sampling, input (N, C, 4, 4)."""

    def __init__(self, fused):
        super().__init__()
        self.slope = fused.config.slope
        self.ups = [upsample for upsample, _ in fused.plan]
        weights = [getattr(fused, f"weight{i}") for i in range(len(fused.plan))]
        self.convolutions = nn.ModuleList([nn.Conv2d(w.shape[1], w.shape[0], 3, padding=1) for w in weights])
        for i, convolution in enumerate(self.convolutions):
            convolution.weight.data = weights[i].clone()
            convolution.bias.data = getattr(fused, f"bias{i}").clone()
        self.eval().requires_grad_(False)

    def forward(self, x):
        last = len(self.convolutions) - 1
        for i, convolution in enumerate(self.convolutions):
            if self.ups[i]:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = convolution(x)
            x = torch.tanh(x) if i == last else F.leaky_relu(x, self.slope)
        return x


def case(preset, batch):
    """The case of one preset and batch size."""
    student = _student(preset)
    fused = student.fuse()
    z = fused.latents(batch, seed=1)
    channels, side = fused.latent_parts[0]
    x = z.reshape(batch, channels, side, side)
    folded = Folded(fused)
    double = copy.deepcopy(student).double()
    wanted = _oracle(double, z)
    # At most twice the error of eager float32, plus a floor of a few roundings of the image's range.
    with torch.no_grad():
        tolerance = 2 * (student(z).double() - wanted).abs().max().item() + 2e-5

    def plain():
        model = student.to(memory_format=torch.channels_last)

        def call():
            with torch.inference_mode():
                return model(z)

        return call

    contestants = [
        Contestant("advkd, FusedStudent", lambda: lambda: fused(z), "ours"),
        Contestant("PyTorch eager", plain, "baseline"),
        Contestant("PyTorch eager, folded", lambda: peers.eager(folded, x)),
        Contestant("torch.compile, folded, freezing", lambda: peers.compiled(copy.deepcopy(folded), x)),
        Contestant("ONNX Runtime", lambda: peers.onnx_runtime(copy.deepcopy(folded), x)),
        Contestant("OpenVINO", lambda: peers.openvino(copy.deepcopy(folded), x)),
    ]
    flop, moved = _count(folded, x)
    repeats = 30 if preset == "digits" else 10
    return Case(f"{preset}, batch {batch}", lambda: wanted, tolerance, contestants, batch, flop, moved, repeats)


@torch.no_grad()
def _student(preset):
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


@torch.no_grad()
def _count(folded, x):
    """Direct floating-point operations, and bytes of weights, input and image, of one call."""
    flop, hooks = 0, []

    def count(module, _, output):
        nonlocal flop
        flop += 2 * 9 * module.in_channels * output.numel()

    hooks = [convolution.register_forward_hook(count) for convolution in folded.convolutions]
    image = folded(x)
    for hook in hooks:
        hook.remove()
    weights = sum(p.numel() for p in folded.parameters())
    return flop, 4 * (weights + x.numel() + image.numel())


CASES = {
    f"{preset}, batch {batch}": lambda preset=preset, batch=batch: case(preset, batch)
    for preset, batches in SHAPES.items()
    for batch in batches
}

if __name__ == "__main__":
    main("bench_student", CASES, ["tests/ops/test_conv_block.py", "tests/system/test_student.py"])
