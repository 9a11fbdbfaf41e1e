"""Pipelines written in diffusers' layout: whole or absent, and nothing of an earlier one lost before the new one is there."""

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import InputError
from ..models.autoencoder import PARTS as AUTOENCODERS
from ..models.autoencoder import Autoencoder
from ..models.denoiser import embedding_of
from ..runtime.files import read_json, synchronize_all, write_json
from ..runtime.folders import temporary_path, writing
from .loading import CLASSES, CONDITION, Classes
from .noise_power import FILE as NOISE_POWER

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DModel

INDEX = "model_index.json"
"""File by which a folder is taken for a finished pipeline; it is written last."""

PARTS = ("unet", "scheduler", *AUTOENCODERS, CONDITION, CLASSES)
"""Files and folders of a pipeline beside :data:`INDEX`."""


def write_pipeline(
    out: Path,
    pipeline: "type[DiffusionPipeline]",
    unet: "UNet2DModel",
    scheduler: Any,
    classes: Classes | None = None,
    dtype: torch.dtype = torch.float32,
    autoencoder: Autoencoder | None = None,
    extra: Sequence[str] = (),
    write_extra: Callable[[Path], None] | None = None,
) -> None:
    """Write a network and its scheduler; a kill leaves the folder's earlier pipeline, or one without its index.

    Args:
        out: folder, made where it is missing.
        pipeline: diffusers' class that ``model_index.json`` names; with an autoencoder it is ``LDMPipeline``.
        unet: network; its :class:`~advkd.models.denoiser.ConditionEmbedding`, where it has one, goes to ``condition``.
        scheduler: diffusers' scheduler.
        classes: of a conditional network, for ``classes.json``.
        dtype: of the network's weights; an autoencoder keeps its own.
        autoencoder: between the network's latents and pictures, for ``vqvae``.
        extra: names of further files that ``write_extra`` writes.
        write_extra: called with the folder that they are written to.

    Raises:
        InputError: the disk has no room, or the folder cannot be written.
    """
    folder, moved = temporary_path(out / "pipeline"), (*PARTS, *extra, INDEX)
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with writing(out / INDEX, folder):
            folder.mkdir()  # here and now: a link that somebody else has put in its place would be written through
            plain, condition = _separated(unet, dtype)
            if autoencoder is None:
                pipeline(plain, scheduler).save_pretrained(folder)
            else:
                _save_latent(folder, plain, scheduler, autoencoder)
            _forget_origin(folder / "unet" / "config.json")
            (out / NOISE_POWER).unlink(missing_ok=True)  # of other weights
            if condition is not None:
                condition.save_pretrained(folder / CONDITION)
            if classes:
                write_json(folder / CLASSES, dataclasses.asdict(classes))
            if write_extra:
                write_extra(folder)
            synchronize_all(folder)
            (out / INDEX).unlink(missing_ok=True)
            for name in moved:
                _take_place(folder / name, out / name)
    except SafetensorError as error:
        raise InputError(f"the pipeline cannot be written to {out} ({error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save_latent(folder, unet, scheduler, autoencoder):
    from diffusers import LDMPipeline

    LDMPipeline(autoencoder.network, unet, scheduler).save_pretrained(folder)
    autoencoder.save_pretrained(folder / AUTOENCODERS[0])  # its scaling factor may be another than the network was made with


def _take_place(new, old):
    """Move a file or a folder to where an earlier one may be, which goes in any case."""
    shutil.rmtree(old, ignore_errors=True)  # a file stays, and is replaced
    if new.exists():
        os.replace(new, old)
    else:
        old.unlink(missing_ok=True)


def _forget_origin(config):
    """Take out of a configuration the folder that diffusers read the network from, which would reveal a local path."""
    write_json(config, {name: value for name, value in read_json(config).items() if name != "_name_or_path"})


def _separated(unet, dtype):
    """A copy of the network on the CPU without its condition embedding, and a copy of that, or None."""
    unet, condition = copy.deepcopy(unet).cpu(), embedding_of(unet)
    if condition is not None:
        condition = copy.deepcopy(condition).cpu()
        unet.class_embedding = nn.Identity()
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)  # diffusers warns about half()
    return unet.to(memory_format=torch.contiguous_format), condition
