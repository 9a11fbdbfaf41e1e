"""Tiles of the student's convolutions in Triton, tables of them, and the devices that can run them.

Nothing here imports Triton: a machine without it can read the tables.
"""

from typing import NamedTuple

import torch

PROCESSORS = 132
"""Multiprocessors of the GPU for which configurations are ordered."""

SHARED = 99 * 1024
"""Bytes of shared memory that every GPU since sm_80 can give a block."""

DESCRIPTORS_SINCE = (9, 0)
"""Compute capability of the first GPUs that copy boxes of tensors by descriptors."""


class Config(NamedTuple):
    """Tile of the convolution: pixels by output channels, input channels of a step, warps, stages of the pipeline."""

    pixels: int
    columns: int
    inner: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.pixels}x{self.columns}x{self.inner}, {self.warps} warps, {self.stages} stages"

    def shared(self, dtype: torch.dtype) -> int:
        """Bytes of shared memory of the pipeline."""
        return self.stages * (self.pixels + self.columns) * self.inner * dtype.itemsize


class ImageConfig(NamedTuple):
    """Tile of the image's convolution: rows by columns of pixels, input channels of a step, warps."""

    rows: int
    columns: int
    inner: int
    warps: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} pixels, {self.inner}, {self.warps} warps"


class DescriptorConfig(NamedTuple):
    """Tile of the descriptor variant: rows by columns of pixels by output channels, the rest as in :class:`Config`."""

    rows: int
    columns: int
    channels: int
    inner: int
    warps: int
    stages: int

    def __str__(self) -> str:
        tile = f"{self.rows}x{self.columns} pixels x{self.channels}x{self.inner}"
        return f"{tile}, {self.warps} warps, {self.stages} stages"

    def shared(self, dtype: torch.dtype) -> int:
        """Bytes of shared memory of the pipeline."""
        return self.stages * (self.rows * self.columns + self.channels) * self.inner * dtype.itemsize


NARROW = (
    Config(256, 128, 64, 8, 3),
    Config(128, 128, 32, 4, 4),
    Config(128, 128, 32, 8, 4),
    Config(256, 64, 64, 8, 3),
    Config(128, 64, 64, 8, 3),
    Config(64, 128, 64, 4, 3),
    Config(64, 64, 64, 4, 3),
    Config(256, 32, 64, 8, 3),
    Config(128, 32, 64, 4, 3),
    Config(64, 32, 64, 4, 3),
    Config(32, 64, 64, 4, 3),
    Config(32, 32, 64, 4, 3),
    Config(128, 16, 64, 4, 3),
    Config(64, 16, 64, 4, 4),
    Config(16, 32, 64, 2, 4),
    Config(16, 16, 64, 1, 4),
)
"""Configurations in 16-bit storage; a step is a cache line of 128 bytes of a pixel."""

WIDE = (
    Config(128, 128, 32, 8, 3),
    Config(128, 64, 32, 8, 3),
    Config(64, 128, 32, 8, 3),
    Config(64, 64, 32, 4, 3),
    Config(128, 32, 32, 8, 3),
    Config(64, 32, 32, 4, 3),
    Config(32, 64, 32, 4, 3),
    Config(32, 32, 32, 2, 4),
    Config(64, 16, 32, 4, 3),
    Config(16, 16, 32, 1, 4),
)
"""Configurations in TensorFloat-32."""

THREE = (
    Config(128, 64, 16, 8, 3),
    Config(64, 128, 16, 8, 3),
    Config(64, 64, 16, 4, 3),
    Config(128, 32, 16, 4, 3),
    Config(64, 32, 16, 4, 3),
    Config(32, 64, 32, 4, 3),
    Config(32, 32, 32, 2, 4),
    Config(64, 16, 32, 4, 3),
    Config(16, 32, 32, 2, 4),
    Config(16, 16, 32, 1, 4),
)
"""Configurations in float32 as three products: what is left over of each number takes registers, too."""

FULL = (
    Config(128, 64, 16, 8, 2),
    Config(64, 64, 16, 8, 2),
    Config(64, 64, 16, 4, 2),
    Config(64, 32, 16, 4, 2),
    Config(32, 64, 16, 4, 2),
    Config(32, 32, 16, 4, 2),
    Config(64, 16, 16, 4, 2),
    Config(16, 16, 16, 1, 2),
)
"""Configurations in float32 without tensor cores."""

IMAGE = (
    ImageConfig(8, 32, 64, 8),
    ImageConfig(8, 16, 64, 4),
    ImageConfig(4, 32, 64, 4),
    ImageConfig(8, 8, 64, 4),
    ImageConfig(4, 8, 64, 2),
)
"""Configurations of the image's layer; in float32 a step has half as many channels."""

IMAGE_FULL = (
    ImageConfig(8, 16, 64, 8),
    ImageConfig(8, 8, 64, 4),
    ImageConfig(4, 8, 64, 4),
)
"""The same without tensor cores."""

DESCRIPTOR = (
    DescriptorConfig(16, 16, 128, 64, 8, 4),
    DescriptorConfig(8, 16, 128, 64, 8, 3),
    DescriptorConfig(8, 16, 128, 64, 4, 3),
    DescriptorConfig(8, 8, 128, 64, 4, 4),
    DescriptorConfig(16, 16, 64, 64, 8, 4),
    DescriptorConfig(8, 16, 64, 64, 4, 4),
    DescriptorConfig(8, 8, 64, 64, 4, 4),
    DescriptorConfig(1, 256, 32, 64, 8, 3),
    DescriptorConfig(1, 128, 32, 64, 4, 4),
    DescriptorConfig(8, 16, 32, 64, 4, 4),
)
"""Configurations of the descriptor variant, in 16-bit storage; three stages leave a multiprocessor room for two blocks."""


def descriptor_table(c_in: int) -> tuple[DescriptorConfig, ...]:
    """All configurations of ``conv_descriptor``, their steps fitted to ``c_in`` channels."""
    return tuple(tile._replace(inner=inner(tile.inner, c_in)) for tile in DESCRIPTOR)


def table(dtype: torch.dtype, precision: str, c_in: int) -> tuple[Config, ...]:
    """All configurations of ``conv_layer``, their steps fitted to ``c_in`` channels."""
    tiles = {"tf32": WIDE, "tf32x3": THREE, "ieee": FULL}[precision] if dtype == torch.float32 else NARROW
    return tuple(tile._replace(inner=inner(tile.inner, c_in)) for tile in tiles)


def image_table(dtype: torch.dtype, precision: str, c_in: int) -> tuple[ImageConfig, ...]:
    """All configurations of ``conv_image``, their steps fitted to ``c_in`` channels."""
    wide = dtype == torch.float32
    tiles = IMAGE_FULL if wide and precision == "ieee" else IMAGE
    return tuple(tile._replace(inner=inner(tile.inner // (1 + wide), c_in)) for tile in tiles)


def descriptor_gap(dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Why ``conv_descriptor`` cannot run for a dtype on a device of a compute capability, or None."""
    if dtype == torch.float32:
        return "tensor descriptors are read in 16-bit storage only"
    if capability < DESCRIPTORS_SINCE:
        least, found = (".".join(map(str, pair)) for pair in (DESCRIPTORS_SINCE, capability))
        return f"tensor descriptors need compute capability {least}, this device has {found}"
    return None


def ceil(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return (a + b - 1) // b


def inner(most: int, channels: int) -> int:
    """Input channels per step: few steps, with little padding beyond the last channel."""
    sizes = [size for size in (64, 32, 16) if size <= most]
    # torch 2.10's compiler traces sorted with a key, but not min with one.
    return sorted(sizes, key=lambda size: ceil(channels, size) * (size + 16))[0]
