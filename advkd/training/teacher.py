"""Training of a small diffusers teacher on digits, glyphs, or a folder of images (``advkd teacher train``)."""

from functools import partial
from pathlib import Path

import torch

from ..data.glyph_sets import trained_glyphs
from ..data.images import describe_shape, load_images, load_labelled
from ..data.sources import Tensors
from ..diffusion.loading import CLASSES, CONDITION, Classes, load_pipeline
from ..diffusion.low_images import LowImages, require_divides
from ..diffusion.networks import build_unet
from ..diffusion.saving import write_pipeline
from ..diffusion.training_schedules import SCHEDULES, noise_scheduler
from ..errors import InputError
from ..methods.denoising import Denoising, TeacherTrainingConfig
from ..models.autoencoder import PARTS, Autoencoder, sha256_of
from ..models.denoiser import with_condition
from ..runtime.devices import plain_defaults, require_device
from ..runtime.files import digest, read_json, write_json
from .checkpoint import CHECKPOINT, require_unclaimed
from .denoiser_data import encoded
from .trainer import Trainer

DATA = "data.json"
"""File that tells which glyphs a teacher was trained on, drawn with which versions, and which teacher it began with."""

PIPELINE = ("unet", "scheduler", *PARTS, CONDITION, CLASSES, DATA, "model_index.json")


@plain_defaults()
def train_teacher(config: TeacherTrainingConfig, out: str | Path, resume: bool = False, progress: bool = True) -> Path:
    """Train and save a teacher in diffusers' pipeline layout (float16 safetensors) under ``out``.

    A checkpoint every ``config.checkpoint_every`` steps makes a killed run go on with ``resume=True``; every random draw
    is a function of (seed, step), so the resumed run equals an uninterrupted one. The teacher has 1,000 timesteps and clips x0,
    but for one of latents, which has a copy of its autoencoder beside it and runs in diffusers' ``LDMPipeline``. A conditional
    one has a class more than the data, which stands for no class, and ``classes.json`` with their names.

    Args:
        config: a :class:`~advkd.methods.denoising.TeacherTrainingConfig`, with the data and the device.
        out: folder for ``model_index.json``, ``unet``, ``scheduler``, ``vqvae``, ``classes.json``, ``data.json`` (of glyphs,
            with a start or with an autoencoder), and the checkpoint, which is removed at the end.
        resume: go on from ``out``'s checkpoint; a start must still be there, and have the same weights.
        progress: show a bar.

    Returns:
        The folder, a source for :meth:`advkd.Teacher.from_pretrained`.

    Raises:
        InputError: bad configuration, data that cannot be read, a start that does not fit, or ``out`` that holds another run
            or teacher.
        TrainingError: the loss is not finite; the last checkpoint is kept.

    Examples:
        >>> train_teacher(TeacherTrainingConfig(data="digits", steps=500), "teacher")
    """
    config.validate()
    require_device(config.device)
    for name in PIPELINE:
        if Path(out, name).is_symlink():
            raise InputError(f"{Path(out, name)} is a link, and a teacher would take its place: remove it")
    require_unclaimed(out, resume, PIPELINE, "teacher")
    autoencoder = _autoencoder(config)
    start = _start(config, autoencoder)
    source, classes = _read(config, autoencoder, progress)
    unet = _network(config, source.tensors["images"].shape[1:], classes, start)
    scheduler = noise_scheduler(config.schedule, config.prediction, clip=autoencoder is None)
    weights = None if start is None else digest(unet.state_dict())
    low = LowImages(config.super_resolution, config.truncation) if config.super_resolution else None
    if low is not None:
        require_divides(low.size, unet.config.sample_size, "super_resolution")
        unet = with_condition(unet, low_size=low.size, low_level=low.level)
    method = Denoising(config, unet, scheduler, classes.null if classes else None, low)
    method.origin = {"init": weights, "autoencoder": sha256_of(autoencoder)}
    trainer = Trainer(
        method,
        source,
        None,
        out,
        resume=resume,
        device=config.device,
        progress=progress,
        save=partial(
            _save_pipeline,
            scheduler=scheduler,
            classes=classes,
            autoencoder=autoencoder,
            record=_record(config, start, weights, autoencoder),
        ),
        finished=PIPELINE,
        what="teacher",
    )
    trainer.run()
    return trainer.out


def _autoencoder(config):
    """The autoencoder of the teacher's latents, or None; its images are the teacher's."""
    if not config.autoencoder:
        return None
    found = Autoencoder.from_pretrained(config.autoencoder)
    for name, own in (("size", found.image_shape[-1]), ("image_channels", found.image_shape[0])):
        if getattr(config, name) not in (0, own):
            raise InputError(f"{name} must be the autoencoder's {own}, got {getattr(config, name)}: leave it out")
    return found


def _read(config, autoencoder, progress):
    """The images or their latents, with labels for a conditional teacher, and its classes."""
    size, channels = config.size or None, config.image_channels or None
    if autoencoder is not None:
        channels, size, _ = autoencoder.image_shape
    if not config.conditional:
        images = load_images(config.data, size, channels, config.classes, config.images, progress).to(config.device)
        return _states(Tensors(images=images), autoencoder), None
    images, labels, names = load_labelled(config.data, size, channels, config.classes, config.images, progress)
    # Without dropped labels the null class would never be trained.
    null = len(names) if config.drop else None
    source = Tensors(images=images.to(config.device), labels=labels)
    return _states(source, autoencoder), Classes(tuple(names), null)


def _states(source, autoencoder):
    return source if autoencoder is None else encoded(source, autoencoder, source.tensors["images"].device)


def _start(config, autoencoder):
    """The teacher that a run begins with, or None; one that fits no data with these options is refused before they are read."""
    if not config.init:
        return None
    start = load_pipeline(config.init, torch.float32)
    made, kind = start.unet.config, start.scheduler.config.prediction_type
    own, given = (",".join(map(str, channels)) for channels in (made.block_out_channels, config.channels))
    levels = [name for name in SCHEDULES if torch.equal(start.scheduler.alphas_cumprod, noise_scheduler(name).alphas_cumprod)]
    remedy = f"those of --schedule {levels[0]}" if levels else "which no --schedule makes: it cannot be trained here"
    if made.class_embed_type is not None:
        _refuse(config, "takes more than classes: advkd distill trains denoiser students")
    if given not in ("", own):
        _refuse(config, f"has the channels {own}, got {given}: leave --channels out")
    if sha256_of(start.autoencoder) != sha256_of(autoencoder):
        _refuse(config, "draws other latents, or none: give the --autoencoder that it was trained with, or none")
    if kind != config.prediction:
        _refuse(config, f"predicts {kind}: give --prediction {kind}")
    if config.schedule not in levels:
        _refuse(config, f"has other noise levels, {remedy}")
    return start


def _refuse(config, why):
    raise InputError(f"init: the teacher {config.init} {why}")


def _network(config, shape, classes, start):
    """A fresh network for the data, or that of the teacher that the run begins with."""
    channels, size = shape[:2]
    torch.manual_seed(config.seed)
    if start is None:
        return build_unet(size, channels, config.channels, len(classes.names) + (classes.null is not None) if classes else 0)
    made = start.unet.config
    if (made.in_channels, made.sample_size) != (channels, size):
        own, found = (describe_shape((c, s, s)) for c, s in ((made.in_channels, made.sample_size), (channels, size)))
        remedy = f"give --size {made.sample_size} and --image-channels {made.in_channels}"
        _refuse(config, f"draws {own} images, the data have {found}: {remedy}")
    if start.classes != classes:
        remedy = "give data of exactly its classes, --conditional where it has any, a --drop over 0 where it has a null class"
        _refuse(config, f"has other classes than the data: {remedy}")
    return start.unet


def _record(config, start, weights, autoencoder):
    """JSON values of ``data.json``: the glyphs or latents that are trained on, and the start with those of its training."""
    glyphs = trained_glyphs(config.data, config.classes, config.images)
    record = {} if glyphs is None else glyphs.description()
    record |= {} if autoencoder is None else {"autoencoder_sha256": autoencoder.sha256}
    if start is not None:
        path = start.folder / DATA
        before = read_json(path, "the record of the start's data") if path.exists() else None
        record["init"] = {"weights_sha256": weights, "data": before}
    return record


def _save_pipeline(unet, out, scheduler, classes, autoencoder, record):
    from diffusers import DDIMScheduler, DDPMPipeline

    if autoencoder is not None:  # LDMPipeline's scheduler
        scheduler = DDIMScheduler.from_config(scheduler.config)
    # The checkpoint stays until all is there, so a kill loses nothing.
    write_pipeline(out, DDPMPipeline, unet, scheduler, classes, torch.float16, autoencoder)
    if record:
        write_json(out / DATA, record)
    (out / CHECKPOINT).unlink(missing_ok=True)
