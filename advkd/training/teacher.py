"""Training of a small diffusers teacher on digits or on a folder of images (``advkd teacher train``)."""

import copy
import dataclasses
import os
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from ..data.images import load_images, load_labelled
from ..data.sources import Tensors
from ..diffusion.loading import CLASSES, Classes
from ..diffusion.noise_power import FILE as NOISE_POWER
from ..diffusion.training_schedules import noise_scheduler
from ..errors import InputError
from ..methods.denoising import Denoising, TeacherTrainingConfig
from ..runtime.devices import plain_defaults, require_device
from ..runtime.files import synchronize_all, write_json
from ..runtime.folders import temporary_path, writing
from .checkpoint import CHECKPOINT, claim
from .trainer import Trainer

PIPELINE = ("unet", "scheduler", CLASSES, "model_index.json")


@plain_defaults()
def train_teacher(config: TeacherTrainingConfig, out: str | Path, resume: bool = False, progress: bool = True) -> Path:
    """Train and save a teacher in diffusers' pipeline layout (float16 safetensors) under ``out``.

    A checkpoint every ``config.checkpoint_every`` steps makes a killed run go on with ``resume=True``; every random draw
    is a function of (seed, step), so the resumed run equals an uninterrupted one. The teacher has 1,000 timesteps and clips x0.
    A conditional one has a class more than the data, which stands for no class, and ``classes.json`` with their names.

    Args:
        config: a :class:`~advkd.methods.denoising.TeacherTrainingConfig`, with the data and the device.
        out: folder for ``model_index.json``, ``unet``, ``scheduler``, ``classes.json`` and the checkpoint, which is removed at
            the end.
        resume: go on from ``out``'s checkpoint.
        progress: show a bar.

    Returns:
        The folder, a source for :meth:`advkd.Teacher.from_pretrained`.

    Raises:
        InputError: bad configuration, data that cannot be read, or ``out`` that holds another run or teacher.
        TrainingError: the loss is not finite; the last checkpoint is kept.

    Examples:
        >>> train_teacher(TeacherTrainingConfig(data="digits", steps=500), "teacher")
    """
    config.validate()
    require_device(config.device)
    for name in PIPELINE:
        if Path(out, name).is_symlink():
            raise InputError(f"{Path(out, name)} is a link, and a teacher would take its place: remove it")
    claim(out, resume, PIPELINE, "teacher")
    source, classes = _read(config)
    images = source.tensors["images"]
    torch.manual_seed(config.seed)
    unet = build_unet(
        images.shape[-1], images.shape[1], config.channels, len(classes.names) + (classes.null is not None) if classes else 0
    )
    scheduler = noise_scheduler(config.schedule, config.prediction)
    method = Denoising(config, unet, scheduler, classes.null if classes else None)
    trainer = Trainer(
        method,
        source,
        None,
        out,
        resume=resume,
        device=config.device,
        progress=progress,
        save=partial(_save_pipeline, scheduler=scheduler, classes=classes),
        finished=PIPELINE,
        what="teacher",
    )
    trainer.run()
    return trainer.out


def _read(config):
    """The images, with labels for a conditional teacher, and its classes."""
    size, channels = config.size or None, config.image_channels or None
    if not config.conditional:
        return Tensors(images=load_images(config.data, size, channels).to(config.device)), None
    images, labels, names = load_labelled(config.data, size, channels)
    # Without dropped labels the null class would never be trained.
    null = len(names) if config.drop else None
    return Tensors(images=images.to(config.device), labels=labels), Classes(tuple(names), null)


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
        InputError: a size that cannot be, or too many channels for it.
    """
    from diffusers import UNet2DModel

    if size < 8 or size & (size - 1):
        raise InputError(f"size must be 4 * 2^k and at least 8, got {size}")
    depth = len(channels) or size.bit_length() - 2
    channels = tuple(channels) or (16, 32, *[64] * (depth - 2))[:depth]
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
        norm_num_groups=8,
        attention_head_dim=8,
        num_class_embeds=classes or None,
    )


def _save_pipeline(unet, out, scheduler, classes):
    from diffusers import DDPMPipeline

    # Saved aside and moved in, the index last; the checkpoint stays until all is there, so a kill loses nothing.
    folder = temporary_path(out / "pipeline")
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with writing(out / "model_index.json", folder):
            folder.mkdir()  # here and now: a link that somebody else has put in its place would be written through
            DDPMPipeline(_in_half(unet), scheduler).save_pretrained(folder)
            (out / NOISE_POWER).unlink(missing_ok=True)  # of other weights
            if classes:
                write_json(folder / CLASSES, dataclasses.asdict(classes))
            synchronize_all(folder)
            for name in PIPELINE:
                if (folder / name).exists():
                    shutil.rmtree(out / name, ignore_errors=True)
                    os.replace(folder / name, out / name)
    except SafetensorError as error:
        raise InputError(f"the teacher cannot be written to {out} ({error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    (out / CHECKPOINT).unlink(missing_ok=True)


def _in_half(unet):
    """A float16 copy on the CPU (diffusers warns about ``half()``)."""
    unet = copy.deepcopy(unet).cpu()
    for parameter in unet.parameters():
        parameter.data = parameter.data.half()
    return unet
