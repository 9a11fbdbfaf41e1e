"""Training of autoencoders for latent teachers (``advkd autoencoder train``)."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from .. import __version__
from ..data.glyph_sets import trained_glyphs
from ..data.images import load_images, normalize
from ..data.sources import Tensors
from ..methods.autoencoding import AutoencoderTrainingConfig, Autoencoding
from ..models.autoencoder import TOGETHER, Autoencoder, build_autoencoder, scaling_of
from ..models.saving import TRAINING, WEIGHTS
from ..runtime.devices import plain_defaults, require_device
from ..runtime.files import digest, write_json
from .checkpoint import CHECKPOINT, require_unclaimed
from .trainer import Trainer

FINISHED = ("config.json", WEIGHTS)


@plain_defaults()
def train_autoencoder(
    config: AutoencoderTrainingConfig, out: str | Path, resume: bool = False, progress: bool = True
) -> Autoencoder:
    """Train and save an autoencoder in diffusers' layout, with the scaling factor of its latents, under ``out``.

    A checkpoint every ``config.checkpoint_every`` steps makes a killed run go on with ``resume=True``; every random draw is a
    function of (seed, sample), so the resumed run equals an uninterrupted one.

    Args:
        config: an :class:`~advkd.methods.autoencoding.AutoencoderTrainingConfig`, with the data and the device.
        out: folder for ``config.json``, the weights, ``training.json`` (configuration, scaling factor, error of the decoded
            images) and the checkpoint, which is removed at the end.
        resume: go on from ``out``'s checkpoint.
        progress: show a bar.

    Returns:
        The autoencoder; ``out`` is a source for :meth:`advkd.Autoencoder.from_pretrained`, and for ``from_pretrained`` of
        diffusers' own class.

    Raises:
        InputError: bad configuration, data that cannot be read, or ``out`` that holds another run or autoencoder.
        TrainingError: the loss is not finite; the last checkpoint is kept.

    Examples:
        >>> train_autoencoder(AutoencoderTrainingConfig(data="digits"), "autoencoder").latent_shape
        (4, 8, 8)
    """
    config.validate()
    require_device(config.device)
    require_unclaimed(out, resume, FINISHED, "autoencoder")
    size, channels = config.size or None, config.image_channels or None
    images = load_images(config.data, size, channels, config.classes, config.images, progress).to(config.device)
    shape = tuple(images.shape[1:])
    config.require_size(shape[-1])
    torch.manual_seed(config.seed)
    network = build_autoencoder(config.regularisation, shape, config.channels, config.latent_channels, config.codes)
    trainer = Trainer(
        Autoencoding(config, network),
        Tensors(images=images),
        None,
        out,
        resume=resume,
        device=config.device,
        progress=progress,
        save=partial(_save, images=images, config=config),
        finished=FINISHED,
        what="autoencoder",
    )
    trainer.run()
    return Autoencoder.from_pretrained(trainer.out)


def _save(network, out, images, config):
    """Measure the scale of the latents and the decoded images' error, and write; the checkpoint has served then."""
    plain = Autoencoder(network, 1.0, images.shape[1:])
    scaled = Autoencoder(network, scaling_of(plain.encode(images)), images.shape[1:])
    error = sum(_error(scaled, part) for part in images.split(TOGETHER)) / images.numel()
    glyphs = trained_glyphs(config.data, config.classes, config.images)
    record = {"config": asdict(config), "images": digest({"images": images}), "scaling_factor": scaled.scaling, "error": error}
    record |= {"data": glyphs.description()} if glyphs else {}
    write_json(out / TRAINING, {**record, "version": __version__})
    scaled.save_pretrained(out)
    (out / CHECKPOINT).unlink(missing_ok=True)


@torch.no_grad()
def _error(autoencoder, images):
    """Sum of the decoded images' absolute errors."""
    return (autoencoder.decode(autoencoder.encode(images)).clamp(-1, 1) - normalize(images)).abs().sum().item()
