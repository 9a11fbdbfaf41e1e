"""Small networks of teachers and denoiser students."""

from torch import nn

from ..errors import InputError

GROUPS = 8
"""Groups of channels that group normalisation takes together."""


def build_unet(size: int, image_channels: int, channels: tuple[int, ...] = (), classes: int = 0) -> nn.Module:
    """A small ``UNet2DModel``: one resnet per block, attention at the lowest resolution only.

    With the default channels it has 1.09 M parameters at 32x32.

    Args:
        size: side of the images in pixels, 4 * 2^k and at least 8.
        image_channels: channels of the images.
        channels: from the highest to the lowest resolution (empty: 16, 32, 64, 64, ... down to 4x4).
        classes: number of classes that the network is told, the null class among them (0: none).

    Returns:
        The network in training mode, its weights drawn from torch's global generator.

    Raises:
        InputError: a size that cannot be, too many channels for it, or channels that are no multiples of 8.
    """
    from diffusers import UNet2DModel

    if size < 8 or size & (size - 1):
        raise InputError(f"size must be 4 * 2^k and at least 8, got {size}")
    depth = len(channels) or size.bit_length() - 2
    channels = tuple(channels) or (16, 32, *[64] * (depth - 2))[:depth]
    if any(c < GROUPS or c % GROUPS for c in channels):
        raise InputError(f"channels must be positive multiples of {GROUPS}, got {', '.join(map(str, channels))}")
    if size >> (depth - 1) < 2:
        raise InputError(f"channels has {depth} entries, too many for images of {size} pixels")
    return UNet2DModel(
        sample_size=size,
        in_channels=image_channels,
        out_channels=image_channels,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * (depth - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
        norm_num_groups=GROUPS,
        attention_head_dim=8,
        num_class_embeds=classes or None,
    )
