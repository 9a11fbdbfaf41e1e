"""Training of a small diffusers teacher on digits, glyphs, or a folder of images (``advkd teacher train``)."""

from functools import partial
from pathlib import Path

import torch

from ..data.glyph_sets import trained_glyphs
from ..data.images import load_images, load_labelled
from ..data.sources import Tensors
from ..diffusion.loading import CLASSES, Classes, load_pipeline
from ..diffusion.networks import build_unet
from ..diffusion.saving import write_pipeline
from ..diffusion.training_schedules import noise_scheduler
from ..errors import InputError
from ..methods.denoising import Denoising, TeacherTrainingConfig
from ..runtime.devices import plain_defaults, require_device
from ..runtime.files import write_json
from .checkpoint import CHECKPOINT, claim
from .trainer import Trainer

DATA = "data.json"
"""File that tells which glyphs a teacher was trained on, and with which versions they were drawn."""

PIPELINE = ("unet", "scheduler", CLASSES, DATA, "model_index.json")


@plain_defaults()
def train_teacher(config: TeacherTrainingConfig, out: str | Path, resume: bool = False, progress: bool = True) -> Path:
    """Train and save a teacher in diffusers' pipeline layout (float16 safetensors) under ``out``.

    A checkpoint every ``config.checkpoint_every`` steps makes a killed run go on with ``resume=True``; every random draw
    is a function of (seed, step), so the resumed run equals an uninterrupted one. The teacher has 1,000 timesteps and clips x0.
    A conditional one has a class more than the data, which stands for no class, and ``classes.json`` with their names.

    Args:
        config: a :class:`~advkd.methods.denoising.TeacherTrainingConfig`, with the data and the device.
        out: folder for ``model_index.json``, ``unet``, ``scheduler``, ``classes.json``, ``data.json`` of glyphs, and the
            checkpoint, which is removed at the end.
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
    source, classes = _read(config, progress)
    images = source.tensors["images"]
    scheduler = noise_scheduler(config.schedule, config.prediction)
    unet = _network(config, images.shape[-1], images.shape[1], classes, scheduler)
    method = Denoising(config, unet, scheduler, classes.null if classes else None)
    trainer = Trainer(
        method,
        source,
        None,
        out,
        resume=resume,
        device=config.device,
        progress=progress,
        save=partial(_save_pipeline, scheduler=scheduler, classes=classes, config=config),
        finished=PIPELINE,
        what="teacher",
    )
    trainer.run()
    return trainer.out


def _read(config, progress):
    """The images, with labels for a conditional teacher, and its classes."""
    size, channels = config.size or None, config.image_channels or None
    if not config.conditional:
        images = load_images(config.data, size, channels, config.classes, config.images, progress)
        return Tensors(images=images.to(config.device)), None
    images, labels, names = load_labelled(config.data, size, channels, config.classes, config.images, progress)
    # Without dropped labels the null class would never be trained.
    null = len(names) if config.drop else None
    return Tensors(images=images.to(config.device), labels=labels), Classes(tuple(names), null)


def _network(config, size, channels, classes, scheduler):
    """A fresh network of the data's shape, or that of the teacher that is trained on."""
    if not config.init:
        torch.manual_seed(config.seed)
        return build_unet(size, channels, config.channels, len(classes.names) + (classes.null is not None) if classes else 0)
    found = load_pipeline(config.init, torch.float32)
    made, kind = found.unet.config, found.scheduler.config.prediction_type
    refusals = {
        "takes more than classes: train a denoiser student on by advkd distill": made.class_embed_type is None,
        f"draws images of {made.sample_size} pixels and {made.in_channels} channels, the data have {size} and {channels}: give "
        "others by --size and --image-channels": (made.sample_size, made.in_channels) == (size, channels),
        f"has the channels {tuple(made.block_out_channels)}, got {config.channels}: leave --channels out": config.channels
        in ((), tuple(made.block_out_channels)),
        f"predicts {kind}: give --prediction {kind}": kind == config.prediction,
        "has other noise levels: give its --schedule": torch.equal(found.scheduler.alphas_cumprod, scheduler.alphas_cumprod),
        "has other classes than the data: give its --classes, and --conditional and --drop as it was trained": (
            found.classes == classes
        ),
    }
    for refusal, fits in refusals.items():
        if not fits:
            raise InputError(f"init: the teacher {config.init} {refusal}")
    return found.unet


def _save_pipeline(unet, out, scheduler, classes, config):
    from diffusers import DDPMPipeline

    # The checkpoint stays until all is there, so a kill loses nothing.
    write_pipeline(out, DDPMPipeline, unet, scheduler, classes, torch.float16)
    glyphs = trained_glyphs(config.data, config.classes, config.images)
    if glyphs is not None:
        write_json(out / DATA, glyphs.description())
    (out / CHECKPOINT).unlink(missing_ok=True)
