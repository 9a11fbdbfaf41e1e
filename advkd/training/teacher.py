"""Train a small diffusers teacher (DDPM's simple objective, Ho et al. 2020, eq. 14) on digits or on a folder of images."""

import copy
import dataclasses
import math
import os
import shutil
from dataclasses import dataclass

import torch
from safetensors import SafetensorError

from ..data.images import load_images, normalize
from ..errors import InputError, TrainingError
from ..runtime.devices import plain_defaults, require_device
from ..runtime.files import (
    pack_optimizer,
    read_tensors,
    require_digest,
    restoring,
    synchronize_all,
    unpack_optimizer,
    with_digest,
    write_tensors,
)
from ..runtime.folders import locked, require_output_folder, require_space, temporary_path, writing
from ..runtime.progress import progress_bar

CHECKPOINT = "checkpoint.safetensors"
PIPELINE = ("unet", "scheduler", "model_index.json")


@dataclass
class TeacherTrainingConfig:
    """How ``advkd teacher train`` trains.

    Attributes:
        data: ``digits`` or a folder of images.
        size: side of the images in pixels (0: from the data).
        image_channels: 1 or 3 (0: from the data).
        channels: UNet channels from the highest to the lowest resolution (empty: 16, 32, 64, 64, ... down to 4x4).
        steps: optimiser steps.
        batch_size: images per step.
        learning_rate: peak of the cosine schedule (after ``warmup`` linear steps).
        warmup: steps of linear warm-up.
        ema: decay of the exponential moving average that is saved.
        prediction: ``epsilon``, ``v_prediction`` or ``sample``.
        seed: of weights, data order, timesteps and noise.
        checkpoint_every: steps between checkpoints.
        device: torch device.
    """

    data: str = "digits"
    size: int = 0
    image_channels: int = 0
    channels: tuple[int, ...] = ()
    steps: int = 5400
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    ema: float = 0.999
    prediction: str = "epsilon"
    seed: int = 0
    checkpoint_every: int = 200
    device: str = "cpu"

    def validate(self):
        """Raise :class:`InputError` that names the field that cannot work."""
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must be in [0, 1), got {self.ema}")
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise InputError(f"prediction must be epsilon, v_prediction or sample, got {self.prediction!r}")
        if any(c < 8 or c % 8 for c in self.channels):
            raise InputError(f"channels must be positive multiples of 8 (group norm has 8 groups), got {self.channels}")
        if not self.learning_rate > 0 or self.warmup < 0:
            raise InputError(f"learning_rate must be positive and warmup not negative, got {self.learning_rate}, {self.warmup}")
        if self.size and (self.size < 8 or self.size & (self.size - 1)):
            raise InputError(f"size must be 4 * 2^k and at least 8, got {self.size}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be in [0, 2^63), got {self.seed}")


def build_unet(size, image_channels, channels=()):
    """A small ``UNet2DModel``: one resnet per block, attention at the lowest resolution only.

    With the default channels it has 1.09 M parameters at 32x32.
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
    )


@plain_defaults()
def train_teacher(config, out, resume=False, progress=True):
    """Train and save a teacher in diffusers' pipeline layout (float16 safetensors) under ``out``.

    A checkpoint every ``config.checkpoint_every`` steps makes a killed run go on with ``resume=True``; every random draw
    is a function of (seed, step), so the resumed run equals an uninterrupted one.

    Raises:
        InputError: bad configuration, data that cannot be read, or ``out`` that holds another run or teacher.
        TrainingError: the loss is not finite; the last checkpoint is kept.
    """
    config.validate()
    require_device(config.device)
    out = require_output_folder(out)
    with locked(out):
        return _train_locked(config, out, resume, progress)


def _train_locked(config, out, resume, progress):
    from diffusers import DDPMScheduler

    for name in PIPELINE:
        if (out / name).is_symlink():
            raise InputError(f"{out / name} is a link, and a teacher would take its place: remove it")
    if not (out / CHECKPOINT).exists():
        if any((out / name).exists() for name in PIPELINE):
            raise InputError(f"--out {out} holds a teacher already: name another folder")
        if resume:
            raise InputError(f"--resume: --out {out} holds no checkpoint yet: run without --resume")
    images = load_images(config.data, config.size or None, config.image_channels or None)
    torch.manual_seed(config.seed)
    unet = build_unet(images.shape[-1], images.shape[1], config.channels).to(config.device)
    average = copy.deepcopy(unet).requires_grad_(False)
    scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type=config.prediction, clip_sample=True)
    optimizer = torch.optim.Adam(unet.parameters(), config.learning_rate)
    require_space(out, 20 * sum(p.numel() for p in unet.parameters()) + 2**24, "the run")
    checkpoint, start = out / CHECKPOINT, 0
    if checkpoint.exists():
        if not resume:
            raise InputError(f"--out {out} holds an unfinished run: add --resume, or name another folder")
        start = _restore(checkpoint, config, unet, average, optimizer)
    _train(config, checkpoint, start, images.to(config.device), unet, average, scheduler, optimizer, progress)
    _save_pipeline(out, average, scheduler)
    return out


def _train(config, checkpoint, start, images, unet, average, scheduler, optimizer, progress):
    bar = progress_bar(range(start, config.steps), initial=start, total=config.steps, desc="teacher", shown=progress)
    smooth = None
    for step in bar:
        loss = _train_step(config, step, images, unet, scheduler, optimizer)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is not finite at step {step}: lower learning_rate (now {config.learning_rate})")
        decay = min(config.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            _save_checkpoint(checkpoint, config, step + 1, unet, average, optimizer)


def _train_step(config, step, images, unet, scheduler, optimizer):
    # One batch, its timesteps and its noise: a function of (seed, step) alone.
    host = {"generator": torch.Generator("cpu").manual_seed((config.seed * 2**32 + step) % 2**63), "device": "cpu"}
    rows = torch.randint(len(images), (config.batch_size,), **host)
    x0 = normalize(images[rows.to(images.device)])
    noise = torch.randn(x0.shape, dtype=torch.float32, **host).to(x0.device)
    t = torch.randint(scheduler.config.num_train_timesteps, (config.batch_size,), **host).to(x0.device)
    # The network's output against its target, at x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps.
    target = {"epsilon": noise, "sample": x0}.get(config.prediction)
    if target is None:
        target = scheduler.get_velocity(x0, noise, t)
    loss = torch.nn.functional.mse_loss(unet(scheduler.add_noise(x0, noise, t), t).sample, target)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    rate = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    rate *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * rate
    optimizer.step()
    return loss.item()


def _save_checkpoint(path, config, step, unet, average, optimizer):
    tensors = {f"unet/{k}": v for k, v in unet.state_dict().items()}
    tensors |= {f"average/{k}": v for k, v in average.state_dict().items()}
    tensors |= pack_optimizer("optimizer", optimizer)
    write_tensors(path, tensors, with_digest(tensors, {"step": step, "config": dataclasses.asdict(config)}))


def _restore(path, config, unet, average, optimizer):
    tensors, metadata = read_tensors(path, "checkpoint", ("step", "config", "digest"))
    require_digest(path, tensors, metadata)
    wanted = dataclasses.asdict(config)
    wanted["channels"] = list(config.channels)
    ignored = ("checkpoint_every", "device")
    with restoring("checkpoint", path):
        changed = [k for k, v in metadata["config"].items() if k not in ignored and wanted.get(k) != v]
    if changed:
        raise InputError(f"--resume: {', '.join(changed)} differ from the unfinished run in {path.parent}")
    with restoring("checkpoint", path):
        for name, module in (("unet", unet), ("average", average)):
            module.load_state_dict({k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + "/")})
        unpack_optimizer("optimizer", optimizer, tensors)
        step = metadata["step"]
        if type(step) is not int or not 0 <= step <= config.steps:
            raise ValueError(f"the run has no step {step}")
        return step


def _save_pipeline(out, unet, scheduler):
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
            synchronize_all(folder)
            for name in PIPELINE:
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
