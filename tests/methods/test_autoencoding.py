"""Autoencoding as a method of the trainer."""

import torch

from advkd.data.sources import Tensors
from advkd.methods.autoencoding import AutoencoderTrainingConfig, Autoencoding
from advkd.models.autoencoder import build_autoencoder
from advkd.training.trainer import Trainer


def tiny_run(data, out, seed=0, weights=0, regularisation="kl", **options):
    """Six updates on random pictures."""
    config = AutoencoderTrainingConfig(
        regularisation=regularisation, channels=(8, 8), steps=6, batch_size=8, checkpoint_every=2, warmup=2, seed=seed
    )
    images = torch.randint(256, (20, 1, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    torch.manual_seed(seed + weights)
    network = build_autoencoder(regularisation, (1, 16, 16), config.channels, config.latent_channels)
    return Trainer(Autoencoding(config, network), Tensors(images=images), None, out, **options)
