"""The shape of one convolution of a student, and the integers by which the ops name it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ACTIVATIONS = ("none", "leaky_relu", "tanh")
ALGORITHMS = ("dot", "direct", "winograd2", "winograd4", "winograd6")
"""How the ``cpu`` backend computes a layer. Up-sampling layers take four phases on the low-resolution input with each of them.

``dot`` sums over vectors of input channels (the image: 1 to 4 output channels, no up-sampling), ``direct`` adds nine taps (four
per phase), ``winogradM`` is F(M x M, 3 x 3). Products are float32, in bfloat16 those of ``direct`` and ``winograd2`` bfloat16.
"""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes in which kernels keep activations; the place is a dtype's number in lists of integers."""

CPU_DTYPES = DTYPES[:2]

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

FIELDS = 9
"""Integers per layer, as :meth:`ConvLayer.numbers` makes them."""

STORAGE = 6
"""Index of the dtype within a layer's integers."""


@dataclass(frozen=True)
class ConvLayer:
    """Shape and meaning of one convolution: sides are those of the input, before up-sampling.

    ``detail`` of the input channels come from the latent and not from the layer before.
    """

    c_in: int
    c_out: int
    height: int
    width: int
    upsample: bool = False
    activation: str = "leaky_relu"
    detail: int = 0

    def numbers(self, dtype: torch.dtype, algorithm: str) -> list[int]:
        """The layer as the C++ launchers take it: :data:`FIELDS` integers."""
        codes = (ACTIVATIONS.index(self.activation), DTYPES.index(dtype), ALGORITHMS.index(algorithm))
        return [self.c_in, self.c_out, self.height, self.width, int(self.upsample), *codes, self.detail]

    def products(self, dtype: torch.dtype, algorithm: str) -> torch.dtype:
        """The dtype of the multiplied numbers, as the C++ code has it."""
        return dtype if algorithm in ("direct", "winograd2") else torch.float32

    def algorithms(self) -> tuple[str, ...]:
        """Algorithms that can compute the layer, ``default`` among them; tiles larger than the image are left out."""
        if self.activation == "tanh" and self.c_out <= 4 and not self.upsample:
            return ("dot",)
        side = max(self.height, self.width)
        return tuple(a for a in ALGORITHMS[1:] if a == "direct" or int(a[-1]) <= side)

    def default(self, dtype: torch.dtype) -> str:
        """The algorithm taken without a measurement.

        Winograd's larger tiles make fewer products, on 4x4 images of more weights than they save. In bfloat16 F(2x2) keeps
        the products narrow where the processor has such an instruction.
        """
        possible = self.algorithms()
        narrow = dtype == torch.bfloat16 and torch.ops.advkd_cpu.isa() == "avx512bf16"
        best = "winograd2" if narrow or max(self.height, self.width) <= 4 else "winograd4"
        return best if best in possible else possible[0]


def is_image(layer: ConvLayer) -> bool:
    """True for a layer that the kernels for images take."""
    return layer.c_out <= 4 and not layer.upsample and layer.activation == "tanh"


def output_sides(layer: ConvLayer) -> tuple[int, int]:
    """Height and width of a layer's output."""
    scale = 2 if layer.upsample else 1
    return scale * layer.height, scale * layer.width


def pack(weight: torch.Tensor, bias: torch.Tensor, layer: ConvLayer, dtype: torch.dtype, algorithm: str) -> torch.Tensor:
    """One layer's weights as the ``cpu`` backend reads them, a ``(bytes,)`` uint8 tensor for this processor."""
    numbers = layer.numbers(dtype, algorithm)
    return torch.ops.advkd_cpu.conv_pack(weight.float().contiguous(), bias.float().contiguous(), numbers)


def encode(layers: Sequence[ConvLayer], dtype: torch.dtype = torch.float32, algorithms: Sequence[str] = ()) -> list[int]:
    """All layers as one list of integers; ``direct`` stands in where there is no choice (the reference's)."""
    algorithms = algorithms or ["direct"] * len(layers)
    return [n for layer, algorithm in zip(layers, algorithms, strict=True) for n in layer.numbers(dtype, algorithm)]


def decode(numbers: Sequence[int]) -> list[ConvLayer]:
    """The layers of :func:`encode`."""
    rows = [numbers[i : i + FIELDS] for i in range(0, len(numbers), FIELDS)]
    return [
        ConvLayer(c_in, c_out, height, width, bool(upsample), ACTIVATIONS[activation], detail)
        for c_in, c_out, height, width, upsample, activation, _, _, detail in rows
    ]
