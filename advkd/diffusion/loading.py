"""Teachers in diffusers' format: loading, and refusals of those that cannot be distilled."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import InputError
from ..models.autoencoder import Autoencoder, autoencoder_part, load_autoencoder
from ..models.denoiser import ConditionEmbedding
from ..models.weights import load_network, require_ordinary
from ..runtime.files import read_json
from ..runtime.hub import PRETRAINED, reason, resolve
from .coefficients import VARIANCES
from .schedule import Schedule

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

EMBEDDED = {
    "digits": PRETRAINED / "digits-teacher",
    "digits-conditional": PRETRAINED / "digits-conditional",
    **dict.fromkeys(("glyphs", "glyphs-teacher"), PRETRAINED / "glyphs-teacher"),
}
"""Folders of the embedded teachers; of the two names of one, the second is no student's."""

MOST_CLASSES, MOST_TIMESTEPS, LARGEST_CLIP = 10**5, 10**6, 1e30
"""Limits for configurations that come from elsewhere."""

CONDITION = "condition"
"""Folder of the :class:`~advkd.models.denoiser.ConditionEmbedding` of a network that takes more than classes."""

CLASSES = "classes.json"
"""File beside ``model_index.json`` with a conditional teacher's :class:`Classes`."""


@dataclass(frozen=True)
class Classes:
    """Classes of a conditional teacher.

    Attributes:
        names: of the classes, by number.
        null: number of the class that stands for no class, or None where the network was not trained with one.
    """

    names: tuple[str, ...]
    null: int | None = None


class Loaded(NamedTuple):
    """The parts of a teacher.

    Attributes:
        unet: the network, on the CPU.
        scheduler: the scheduler of its folder.
        classes: those of a conditional teacher, or None. Without ``classes.json`` they are named by their numbers, and none of
            them is the null class.
        folder: the files' own, which may have a ``noise_power.json``.
        autoencoder: of a latent teacher, on the CPU, or None.
    """

    unet: "UNet2DModel"
    scheduler: "DDPMScheduler | DDIMScheduler"
    classes: Classes | None
    folder: Path
    autoencoder: Autoencoder | None


def load_pipeline(source: str | Path, dtype: torch.dtype) -> Loaded:
    """The parts of a teacher in diffusers' format.

    Args:
        source: as for :meth:`Teacher.from_pretrained`.
        dtype: dtype of the network's weights.

    Returns:
        :class:`Loaded`.

    Raises:
        InputError: files that are missing or damaged, or a teacher of another kind.
    """
    # An unfit repository of the hub is refused before its weights are fetched.
    folder = resolve(source, EMBEDDED, "teacher", ["*.json", "*/*.json"])
    part = _require_fit(folder)
    # Torch's default device and the mode of autograd may be any.
    with torch.inference_mode(False), torch.device("cpu"):
        scheduler, unet = _load_scheduler(folder), _load_unet(source, folder, dtype)
        condition = _load_condition(source, folder, unet)
        autoencoder = load_autoencoder(folder, part, partial(_fetched, source)) if part else None
        return Loaded(unet, scheduler, _load_classes(folder, condition), folder, autoencoder)


def _load_condition(source, folder, unet):
    """Give a network that takes more than classes its :class:`ConditionEmbedding`."""
    if unet.config.class_embed_type is None:
        return None
    folder = resolve(source, EMBEDDED, "teacher", ["*.json", "*/*.json", f"{CONDITION}/*"])
    condition = ConditionEmbedding.from_pretrained(folder / CONDITION)
    width = unet.time_embedding.linear_2.out_features
    if condition.config.width != width:
        raise InputError(
            f"{folder / CONDITION} is {condition.config.width} numbers wide, the network {width}: restore the files"
        )
    unet.class_embedding = condition.to(unet.dtype)
    return condition


def _load_classes(folder, condition):
    """Classes of a teacher whose network takes any."""
    count = read_json(_part(folder, "unet") / "config.json", "teacher configuration").get("num_class_embeds")
    count = count if condition is None else condition.config.classes or None
    if count is None:
        return None
    if not os.path.lexists(path := folder / CLASSES):
        return Classes(tuple(map(str, range(count))))
    found = read_json(path, "the teacher's classes", ("names", "null"))
    names, null = found["names"], found["null"]
    wanted = count if null is None else count - 1
    if not isinstance(names, list) or len(names) != wanted or not all(isinstance(name, str) for name in names):
        raise InputError(f"the teacher's classes {path} must be {wanted} names, as its network takes {count}: restore the file")
    if null is not None and (type(null) is not int or null != wanted):
        raise InputError(
            f"the teacher's classes {path}: null must be the number {wanted}, or null, got {null!r}: restore the file"
        )
    return Classes(tuple(names), null)


def _part(folder, name):
    # The first repositories of the hub keep the network and the scheduler beside model_index.json.
    return folder / name if (folder / name).is_dir() else folder


def _require_fit(folder):
    """Refuse a pipeline that is told more than classes, or has no network of ordinary size; name its autoencoder's folder."""
    index = folder / "model_index.json"
    parts = read_json(index, "pipeline index") if os.path.lexists(index) else {}
    if "movq" in parts:
        raise InputError(f"teacher {folder} has a movq; latents of a vqvae or vae are supported")
    for part in ("text_encoder", "image_encoder"):
        if part in parts:
            raise InputError(
                f"teacher {folder} is conditional (it has a {part}); teachers that are told classes at most are supported"
            )
    config = read_json(_part(folder, "unet") / "config.json", "teacher configuration")
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise InputError(f"teacher {folder} has a {kind}; only UNet2DModel teachers are supported")
    embedding, known = config.get("class_embed_type"), (folder / CONDITION / "config.json").is_file()
    if embedding is not None and not (embedding == "identity" and known):
        raise InputError(f"teacher {folder} has class_embed_type {embedding!r}; only a table of num_class_embeds is supported")
    classes = config.get("num_class_embeds")
    if classes is not None and (type(classes) is not int or not 1 <= classes <= MOST_CLASSES):
        raise InputError(f"teacher {folder}: num_class_embeds must be in [1, {MOST_CLASSES:,}], got {classes!r}")
    require_network(config, folder, _takes_low_images(folder))
    size = config.get("sample_size")
    if not isinstance(size, int) or size < 8 or size & (size - 1):
        raise InputError(f"teacher {folder} has sample_size {size}; a student needs square images of side 4 * 2^k")
    require_ordinary(config, f"teacher {folder}")
    return autoencoder_part(folder, parts)


def _takes_low_images(folder):
    """True for the network of a super-resolution model, whose input has the low image's channels, too."""
    path = folder / CONDITION / "config.json"
    return path.is_file() and bool(read_json(path, "the network's conditions").get("low_size"))


def require_network(config: Mapping[str, Any], name: str | Path, low: bool = False) -> None:
    """Refuse a network that predicts more than one image, or that is not told a timestep.

    Args:
        config: of the network.
        name: the teacher's, for errors.
        low: True if it takes a low image as further channels.

    Raises:
        InputError: a learned variance, or a network that is told the noise's level.
    """
    if (1 + low) * (config.get("out_channels") or 0) != config.get("in_channels"):
        shapes = f"{config.get('in_channels')} channels in, {config.get('out_channels')} out"
        if low:
            file = Path(name) / CONDITION / "config.json"
            remedy = f"twice as many in are needed for the low_size of {file}: restore the files"
            raise InputError(f"teacher {name} has {shapes}, and {remedy}")
        raise InputError(f"teacher {name} has {shapes}: a learned variance is not supported")
    if config.get("time_embedding_type") == "fourier":
        raise InputError(f"teacher {name} is told the noise's level (Fourier embedding), not a timestep: it is not supported")


def require_scheduler(scheduler: Any, name: str | Path) -> None:
    """Refuse a scheduler whose run the solvers do not know.

    Args:
        scheduler: diffusers' ``DDPMScheduler`` or ``DDIMScheduler``.
        name: the teacher's, for errors.

    Raises:
        InputError: another kind, betas that make no noise schedule, another prediction, dynamic thresholding, or a variance
            that is learned.
    """
    config = scheduler.config
    if not {"DDPMScheduler", "DDIMScheduler"} & {kind.__name__ for kind in type(scheduler).__mro__}:
        kind = type(scheduler).__name__
        raise InputError(f"teacher {name} has a {kind}; a DDPMScheduler or DDIMScheduler configuration is needed")
    if not _is_schedule(scheduler.alphas_cumprod, config.num_train_timesteps):
        raise InputError(f"teacher {name}: its betas make no noise schedule: alpha_bar must fall within [0, 1]")
    if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise InputError(f"teacher {name}: prediction_type {config.prediction_type!r} is not supported")
    if config.thresholding:
        raise InputError(f"teacher {name}: dynamic thresholding is not supported")
    variance = config.get("variance_type") or VARIANCES[0]
    if variance not in VARIANCES:
        raise InputError(f"teacher {name}: variance_type {variance!r} is not supported (known: {', '.join(VARIANCES)})")


def _load_unet(source, folder, dtype):
    from diffusers import UNet2DModel

    part = "unet" if (folder / "unet").is_dir() else ""
    return load_network(UNet2DModel, partial(_fetched, source), part, "teacher", dtype, _run_unet)


def _fetched(source, weights):
    """The teacher's folder with its JSON files and some weights."""
    return resolve(source, EMBEDDED, "teacher", ["*.json", "*/*.json", weights])


def _run_unet(network):
    x = torch.empty(1, network.config.in_channels, network.config.sample_size, network.config.sample_size)
    zero = torch.zeros(1, dtype=torch.int64)
    labels = None if network.config.num_class_embeds is None else zero
    if network.config.class_embed_type == "identity":
        labels = torch.zeros(1, network.time_embedding.linear_2.out_features)
    if network(x, zero, labels).sample.shape != (1, network.config.out_channels, *x.shape[2:]):
        raise InputError("its network gives images of another shape than it takes")


def _is_schedule(alpha_bars, steps):
    """True if the noise grows from step to step, and is never more than all of a state."""
    try:
        return len(Schedule(alpha_bars)) == steps
    except InputError:
        return False


def _load_scheduler(folder):
    import diffusers

    config = read_json(_part(folder, "scheduler") / "scheduler_config.json", "scheduler configuration")
    kind = config.get("_class_name", "DDPMScheduler")
    if kind not in ("DDPMScheduler", "DDIMScheduler"):
        raise InputError(f"teacher {folder} has a {kind}; a DDPMScheduler or DDIMScheduler configuration is needed")
    if not isinstance(steps := config.get("num_train_timesteps", 1000), int) or not 1 <= steps <= MOST_TIMESTEPS:
        raise InputError(f"teacher {folder}: num_train_timesteps must be in [1, {MOST_TIMESTEPS:,}], got {steps!r}")
    clip = config.get("clip_sample_range", 1.0)
    if type(clip) not in (int, float) or not 0 <= clip < LARGEST_CLIP:
        raise InputError(f"teacher {folder}: clip_sample_range must be in [0, {LARGEST_CLIP:g}), got {clip!r}")
    try:
        scheduler = getattr(diffusers, kind).from_config(config)
    except Exception as error:
        raise InputError(f"teacher {folder}: the scheduler configuration cannot be used ({reason(error)})") from error
    require_scheduler(scheduler, folder)
    return scheduler
