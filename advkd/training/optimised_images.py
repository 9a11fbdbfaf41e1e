"""Optimisation of images by score distillation: ``advkd distill score-distillation``."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..data.glyph_sets import named_like
from ..data.images import load_images, load_labelled, normalize
from ..data.labels import labels_in_turn
from ..data.pictures import save_grid
from ..data.sources import Tensors
from ..diffusion.guidance import require_labels
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..methods.score_distillation import ScoreDistillation, ScoreDistillationConfig, classes_in_turn
from ..models.optimised_images import OptimisedImages, optimised_images
from ..models.saving import TRAINING
from ..runtime.devices import plain_defaults
from ..runtime.files import digest, with_digest, write_json, write_tensors
from .cost import run_cost
from .denoiser_data import require_callable
from .trainer import Trainer

IMAGES = "images.safetensors"
"""File of the images: ``images``, ``(num, C, H, W)`` float32 in [-1, 1], and ``labels`` where they have classes.

If the teacher draws latents, it has ``latents``, too: they were optimised, and the images are what they decode to."""

PICTURE = "images.png"
"""File of the images as one grid."""

Data = str | Path | Tensor | tuple[Tensor, Tensor] | None


def optimise_images(
    config: ScoreDistillationConfig,
    teacher: Teacher,
    out: str | Path,
    *,
    data: Data = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Tensor:
    """Optimise images by a teacher's score and save them under ``out``.

    Args:
        config: number and kind of the images, their classes, and how they are optimised.
        teacher: the teacher, on the run's device.
        out: folder for ``images.safetensors``, ``images.png``, ``training.json`` (method, configuration, teacher, cost),
            ``checkpoint.safetensors``, ``metrics.csv`` and TensorBoard files.
        data: images that prototypes of ``warp`` are made of: ``digits``, ``glyphs``, a folder, or ``(N, C, H, W)`` in [-1, 1];
            with classes a folder of one folder a class, or a pair of images and ``(N,)`` classes. None for other generators.
        resume: go on from ``out``'s checkpoint.
        device: torch device of a single process (several processes: what accelerate gives).
        progress: show a bar (on the main process).

    Returns:
        The images, ``(num, C, H, W)`` float32 in [-1, 1] on the run's device.

    Raises:
        InputError: teacher, data, configuration or folder do not fit each other; nothing was started.
        TrainingError: a gradient is not finite; the last good checkpoint is kept.

    Examples:
        >>> images = optimise_images(ScoreDistillationConfig(num=4), Teacher.from_pretrained("digits"), "sds")
    """
    optimised = drawn(ImageOptimiser(config, teacher, out, data, resume=resume, device=device, progress=progress).run())
    return teacher.images(optimised)


class ImageOptimiser(Trainer):
    """One run; see :func:`optimise_images`. ``dtype`` is float32, or float64 for tests of exactness.

    Args:
        config: the configuration.
        teacher: the teacher.
        out: folder of the run.
        data: images that prototypes are made of, or None.
        resume: go on from ``out``'s checkpoint.
        device: torch device of a single process.
        dtype: of the images.
        progress: show a bar.

    Raises:
        InputError: what does not fit; nothing was started.
    """

    @plain_defaults()
    def __init__(
        self,
        config: ScoreDistillationConfig,
        teacher: Teacher,
        out: str | Path,
        data: Data = None,
        *,
        resume: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: bool = True,
    ):
        config.validate()
        require_callable(teacher, device)
        numbers = classes_in_turn(teacher, config)
        self.labels = labels_in_turn(numbers, 0, config.num)
        prototypes = _prototypes(config, teacher, self.labels, data, progress)
        autoencoder = teacher.autoencoder
        states = prototypes if prototypes is None or autoencoder is None else autoencoder.encode(prototypes)
        kind = (config.generator, teacher.shape, config.num, config.seed, config.grid)
        images = optimised_images(*kind, states, bounded=autoencoder is None)
        run = ScoreDistillation(config, images, teacher.schedule)
        run.origin = {"teacher": {**teacher.identity(), "name": None}}
        if prototypes is not None:
            run.origin |= {"prototypes": digest({"prototypes": prototypes})}
        self._class_names = [teacher.class_names[number] for number in numbers]
        super().__init__(
            run,
            Tensors(),
            teacher,
            out,
            resume=resume,
            device=device,
            dtype=dtype,
            progress=progress,
            save=self._save_images,
            finished=(IMAGES, TRAINING),
            what="picture set",
        )

    def _save_images(self, images, out):
        """The record comes last: a folder with one is complete."""
        optimised = drawn(images)
        found = self.method.teacher.images(optimised).cpu()
        tensors = {"images": found} if self.labels is None else {"images": found, "labels": self.labels}
        tensors |= {} if self.method.teacher.autoencoder is None else {"latents": optimised.cpu()}
        write_tensors(out / IMAGES, tensors, with_digest(tensors, {"classes": self._class_names}))
        save_grid(found, out / PICTURE)
        write_json(out / TRAINING, self._record())

    def _record(self):
        method = self.method
        run = {"method": method.name, "config": dataclasses.asdict(method.config), "teacher": method.teacher.identity()}
        run |= {"cost": run_cost(method, self.stages), "classes": self._class_names, "version": __version__}
        return {"runs": [{**run, "prototypes": method.origin.get("prototypes")}]}


@torch.no_grad()
def drawn(images: nn.Module) -> Tensor:
    """All images of a module.

    Args:
        images: an :class:`~advkd.models.optimised_images.OptimisedImages`.

    Returns:
        ``(num, ...)`` float32 on the module's device.
    """
    assert isinstance(images, OptimisedImages)
    return images(torch.arange(len(images), device=images.values.device)).float()


def _prototypes(config, teacher, labels, data, progress):
    """The prototype of every image from ``data``, ``(num, C, H, W)``; None for generators without one."""
    if config.generator != "warp":
        if data is not None:
            raise InputError(f"--data is for --generator warp, whose prototypes it holds: leave it out of {config.generator}")
        return None
    if data is None:
        raise InputError("generator warp needs images to make prototypes of: name them by --data")
    images, known = _read(teacher, labels is not None, data, progress)
    if tuple(images.shape[1:]) != tuple(teacher.image_shape) or not len(images):
        raise InputError(f"data holds images {tuple(images.shape)}, the teacher draws {tuple(teacher.image_shape)}")
    if labels is None:
        return _prototype(config.prototype, images, "images").expand(config.num, *images.shape[1:])
    own = {
        k: _prototype(config.prototype, images[known == k], f"images of {teacher.class_names[k]}") for k in set(labels.tolist())
    }
    return torch.stack([own[k] for k in labels.tolist()])


def _read(teacher, labelled, data, progress):
    """Images and, where they are asked for, the teacher's numbers of their classes."""
    channels, size, _ = teacher.image_shape
    if isinstance(data, (Tensor, tuple)):
        images, labels = data if isinstance(data, tuple) else (data, None)
        if labelled and labels is None:
            raise InputError("data has no labels, and the images have classes: give a pair of images and classes")
        return images, require_labels(labels, len(images), teacher.num_classes, images.device) if labelled else None
    if not labelled:
        return load_images(data, size, channels, progress=progress), None
    images, labels, names = load_labelled(data, size, channels, progress=progress)
    if tuple(names) != tuple(teacher.class_names):
        remedy = f": name {fitting}" if (fitting := named_like(teacher.class_names)) else ""
        raise InputError(
            f"--data {data} has classes {', '.join(names)}, the teacher knows {', '.join(teacher.class_names)}{remedy}"
        )
    return images, labels


def _prototype(which, images, what):
    """One image, or the mean of all."""
    if not len(images):
        raise InputError(f"data holds no {what}: name other data by --data, or other classes by --classes")
    if which == "mean":
        return normalize(images).mean(dim=0)
    if int(which) >= len(images):
        raise InputError(f"prototype must be mean or in [0, {len(images)}), the number of one of the {what}, got {which}")
    return normalize(images[int(which)])
