"""Data that denoiser students learn from, and checks that student, teacher and data fit each other."""

from collections.abc import Sequence
from typing import Any

import torch

from ..data.glyph_sets import named_like, trained_glyphs
from ..data.images import load_images, load_labelled
from ..data.sources import RecordedPairs, Source, Tensors
from ..data.trajectories import Trajectories
from ..diffusion.denoiser_student import DenoiserStudent
from ..diffusion.guidance import is_packed, require_labels
from ..diffusion.latent import require_same_latents
from ..diffusion.networks import build_unet
from ..diffusion.teacher import Teacher
from ..diffusion.training_schedules import noise_scheduler
from ..errors import InputError
from ..methods.base import Method, Needs
from ..models.autoencoder import Autoencoder, sha256_of
from ..runtime.files import digest


def source_of(
    method: Method,
    needs: Needs,
    student: DenoiserStudent,
    data: Any,
    trajectories: Trajectories | None,
    progress: bool = True,
) -> Source:
    """The data set that a method's configuration needs, and no other.

    Args:
        method: the method.
        needs: what its configuration needs.
        student: the student, of whose shape and classes the data must be.
        data: images; see :func:`advkd.training.denoisers.distill_denoiser`.
        trajectories: recorded pairs.
        progress: show a bar while glyphs are drawn.

    Returns:
        Source of images, of pairs, or of nothing.

    Raises:
        InputError: data that is missing, not needed, or of another shape or other classes.
    """
    model = student.model
    if needs.data == "pairs":
        if trajectories is None:
            raise InputError(
                f"{method.name} needs pairs of a deterministic solver: record them and name them by --trajectories"
            )
        if data is not None:
            raise InputError(f"{method.name} learns from pairs here: leave --data out, or leave out --trajectories")
        return _pairs(method, needs, model, trajectories)
    if trajectories is not None:
        raise InputError(f"{method.name} does not read trajectories with these options: leave --trajectories out")
    source = images_of(method, needs, model.image_shape, model.class_names, data, progress)
    return source if model.autoencoder is None else encoded(source, model.autoencoder, model.device)


def require_callable(teacher: Teacher, device: str | torch.device, low_images: bool = False) -> None:
    """Refuse a teacher that a method cannot call.

    Args:
        teacher: the teacher.
        device: torch device of the run.
        low_images: True if the method gives it low images.

    Raises:
        InputError: a teacher on another device, or one that takes a guidance weight, a latent or a low image itself.
    """
    if teacher.low is not None and not low_images:
        raise InputError("--teacher takes a low image, which this method does not give: distil it by consistency")
    if is_packed(teacher):
        what = "a guidance weight" if teacher.most_guidance else "a latent"
        raise InputError(f"--teacher takes {what} itself: name the teacher that it was distilled from")
    if teacher.device.type != torch.device(device).type:
        raise InputError(f"the teacher is on {teacher.device}, the run on {device}: load it there")


def require_alike(student: DenoiserStudent, teacher: Teacher) -> None:
    """Refuse a teacher whose states or classes are not the student's.

    Args:
        student: the student.
        teacher: its teacher.

    Raises:
        InputError: another shape, another autoencoder, another noise schedule, other classes or another null class.
    """
    model = student.model
    if tuple(model.shape) != tuple(teacher.shape):
        raise InputError(f"the teacher draws images {tuple(teacher.shape)}, the student {tuple(model.shape)}")
    require_same_latents(model, teacher)
    if model.low != teacher.low:
        known = ["none" if low is None else f"{low.size} pixels, level {low.level}" for low in (teacher.low, model.low)]
        raise InputError(f"the teacher's low images are {known[0]}, the student's {known[1]}: begin with the teacher's student")
    ours, theirs = model.schedule.alpha_bars, teacher.schedule.alpha_bars
    if ours.shape != theirs.shape or not torch.equal(ours, theirs):
        raise InputError("teacher and student have different noise schedules: begin with one of the teacher's own students")
    if model.num_classes != teacher.num_classes:
        raise InputError(f"the teacher knows {teacher.num_classes} classes, the student {model.num_classes}")
    if model.class_names != teacher.class_names or model.null_class != teacher.null_class:
        known = [", ".join((*m.class_names, *["none"] * (m.null_class is not None))) for m in (teacher, model)]
        raise InputError(f"the teacher's classes are {known[0]}, the student's {known[1]}")


def _pairs(method, needs, model, trajectories):
    info = trajectories.info
    if needs.grow:
        raise InputError("grow adds trajectories for students that draw in one pass: leave it out, and record more")
    shape = (info.image_channels, info.image_size, info.image_size)
    if shape != tuple(model.shape):
        raise InputError(f"the trajectories hold images {shape}, the student draws {tuple(model.shape)}: record again")
    if info.teacher.get("autoencoder_sha256") != sha256_of(model.autoencoder):
        raise InputError("the trajectories are not of the student's latents or pixels: record its own teacher's")
    method.check(trajectories)
    if needs.paired:
        trajectories.require_paired()
    _require_classes(info, model)
    trajectories = Trajectories(*trajectories.folders)
    trajectories.verify()
    return RecordedPairs(trajectories, needs.limit)


def _require_classes(info, model):
    """Refuse recordings whose classes are not the student's."""
    if model.num_classes and not info.classes:
        raise InputError("the student is told classes and the trajectories have none: record them with --classes all")
    if info.classes and not model.num_classes:
        raise InputError(
            "the trajectories have classes and the student is told none: begin with a conditional student by --init"
        )
    names = dict(enumerate(model.class_names))
    if any(names.get(number) != name for number, name in zip(info.class_numbers, info.class_names, strict=True)):
        raise InputError(
            f"the trajectories' classes are {', '.join(info.class_names)}, the student's {', '.join(model.class_names)}"
        )


def images_of(
    method: Method,
    needs: Needs,
    shape: tuple[int, ...],
    class_names: Sequence[str],
    data: Any,
    progress: bool = True,
) -> Tensors:
    """Images that a method learns from, with labels where the student is told classes; or no data at all.

    Args:
        method: the method.
        needs: what its configuration needs, ``images`` or ``none``.
        shape: of the images, ``(C, H, W)``.
        class_names: names of the student's classes.
        data: see :func:`advkd.training.denoisers.distill_denoiser`.
        progress: show a bar while glyphs are drawn.

    Returns:
        Source of images, or of nothing.

    Raises:
        InputError: data that is missing, or of another shape or other classes.
    """
    if needs.data == "none":
        return Tensors()
    if data is None:
        raise InputError(f"{method.name} needs images: name them by --data")
    channels, size = shape[0], shape[-1]
    if isinstance(data, (torch.Tensor, tuple)):
        images, labels = data if isinstance(data, tuple) else (data, None)
        if labels is not None:
            if not class_names:
                raise InputError("data: the student is told no classes: leave the labels out")
            labels = require_labels(labels, len(images), len(class_names), images.device)
    elif needs.labels or class_names:
        if (glyphs := trained_glyphs(data)) is not None:
            _require_names(data, glyphs.class_names, class_names)  # before they are drawn
        images, labels, names = load_labelled(data, size, channels, progress=progress)
        _require_names(data, names, class_names)
    else:
        images, labels = load_images(data, size, channels, progress=progress), None
    if tuple(images.shape[1:]) != shape:
        raise InputError(f"data holds images {tuple(images.shape[1:])}, the student draws {shape}")
    _require_pictures(images)
    if labels is None and (needs.labels or class_names):
        raise InputError("data has no labels, and the student is told classes: name a folder of one folder a class")
    return Tensors(images=images, labels=labels)


def encoded(source: Tensors, autoencoder: Autoencoder, device: torch.device) -> Tensors:
    """Latents of images, once for all updates.

    Args:
        source: images and perhaps labels, or nothing.
        autoencoder: of the latents.
        device: where it runs; latents are where the images were.

    Returns:
        Source of latents. It is known by the images and the autoencoder, as latents differ in their last bits by device.
    """
    if not len(source):
        return source
    made_of = f"{autoencoder.sha256} {digest(source.tensors)}"
    latents = {**source.tensors, "images": autoencoder.encode(source.tensors["images"], device)}
    return Tensors(**latents, made_of=made_of)


def fresh_student(data: str, channels: tuple[int, ...], device: str | torch.device = "cpu") -> DenoiserStudent:
    """An unconditional student of fresh weights on the usual noise levels, for methods that call no teacher.

    Args:
        data: images whose shape it takes: ``digits``, ``glyphs`` or a folder.
        channels: of the network, from the highest to the lowest resolution.
        device: where it is put.

    Returns:
        Student with linear betas and T = 1000, x0 clamped to [-1, 1]; its weights are drawn from torch's global generator.

    Raises:
        InputError: data that cannot be read, or channels that its images cannot have.
    """
    shape = load_images(data).shape[1:]
    network = build_unet(shape[-1], shape[0], channels).to(device)
    return DenoiserStudent.from_teacher(Teacher(network, noise_scheduler("linear", "v_prediction"), "student"), channels)


def learnt_from(method: Method, source: Source) -> dict[str, str]:
    """Digests of what a run began with, for the record of its student.

    Args:
        method: the run's method.
        source: the run's data.

    Returns:
        ``init``, the network that training began with, where the runner says it, and ``images`` where the run has images.
    """
    begun = {"init": method.origin["init"]} if "init" in method.origin else {}
    images = isinstance(source, Tensors) and source.tensors
    return {**begun, "images": source.identity()["tensors"]} if images else begun


def _require_names(data, names, known):
    if tuple(names) != tuple(known):
        remedy = f": name {fitting}" if (fitting := named_like(tuple(known))) else ""
        raise InputError(f"--data {data} has classes {', '.join(names)}, the student knows {', '.join(known)}{remedy}")


def _require_pictures(images):
    if not len(images):
        raise InputError("data holds no image")
    if images.dtype != torch.uint8 and not (images.is_floating_point() and bool(images.isfinite().all())):
        raise InputError(f"data must be finite images in [-1, 1], or of 8 bits, got {images.dtype}")
