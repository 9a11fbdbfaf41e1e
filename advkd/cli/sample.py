"""The work of ``advkd sample``: images of a student or a teacher to a picture or a folder, by one process or several."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from ..data.labels import labels_in_turn
from ..diffusion.denoiser_student import DenoiserStudent
from ..diffusion.guidance import class_numbers
from ..diffusion.solvers import Solver
from ..diffusion.students import generator_classes, student_class
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..models.classifier import Classifier
from ..models.shape import DTYPES
from ..models.student import Student
from ..runtime.devices import require_device
from ..runtime.files import digest
from .enlarging import enlarged, load_stages
from .output import Draw, require_counts, require_output, write_images


def sample(
    student: str,
    n: int,
    seed: int,
    out: str | Path,
    interpolate: bool = False,
    classes: str | None = None,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    dtype: str = "float32",
    batch_size: int = 64,
    progress: bool = True,
    cascade: Sequence[str] = (),
    cascade_level: int | None = None,
) -> str:
    """Draw ``n`` images of seed ``seed`` with the fused student and save them.

    Args:
        student: what :meth:`Student.from_pretrained` takes.
        n: number of images.
        seed: of the noise; image i of a seed is always the same (to rounding: see :meth:`Student.fuse`).
        out: a picture (a grid; .png, .jpg, .jpeg, .webp or .bmp; a symbolic link stays and its target is written) or a folder
            (a name without a suffix, or one that ends in a slash: one PNG per image; pictures that are there are kept, so that
            the same call goes on after a kill, or with a larger ``n``).
        interpolate: a spherical walk from the seed's first latent to its second, in ``n`` pictures, within one class.
        classes: names of a conditional student's classes, separated by commas, which images have in turn; None: every class.
        device: torch device that draws.
        backend: of the kernels, see :func:`advkd.ops.registry.choose`.
        dtype: of the network, a name of :data:`advkd.models.shape.DTYPES`.
        batch_size: images that are drawn at a time.
        progress: show a bar.
        cascade: super-resolution models that enlarge the images, in their order; see :func:`advkd.cli.enlarging.load_stages`.
        cascade_level: level of the noise on the images that they are given; None: 100, or a model's largest.

    Returns:
        Words for what a cascade costs; empty without one.

    Under ``torchrun`` process r of w draws the batches r, r + w, ... into the folder.
    """
    require_counts(n, seed, batch_size)
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = require_output(out)
    model = Student.from_pretrained(student, require_device(device))
    labels = generator_classes(student, model, classes)
    if interpolate and len(labels) > 1:
        raise InputError("--interpolate: a walk is within one class: name it by --classes")
    fused = model.fuse(backend, DTYPES[dtype])

    def images(z, first):
        told = labels_in_turn(labels, first, len(z))
        return model.images(fused(z, None if told is None else told.to(z.device)))

    walk = partial(_walk, images, fused.latents(2, seed), n) if interpolate else None
    record = {"student": digest(model.state_dict()), "seed": seed, "walk": n if interpolate else None}
    record |= {"classes": [model.class_names[label] for label in labels]} if labels else {}
    record |= {"autoencoder": model.autoencoder.sha256} if model.autoencoder else {}
    stages = load_stages(cascade, device)
    draw: Draw = walk or partial(_drawn, fused, seed, labels, folder and not stages)
    draw, record, size, said = enlarged(draw, record, model, stages, cascade_level, seed)
    write_images(out, n, size, draw, record, batch_size, min(n, 10) if walk else None, progress)
    return said.removeprefix("; ")


def sample_denoiser(
    student: str,
    n: int,
    seed: int,
    out: str | Path,
    steps: int | None = None,
    classes: str | None = None,
    guidance: float | None = None,
    interpolate: bool = False,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    progress: bool = True,
    cascade: Sequence[str] = (),
    cascade_level: int | None = None,
) -> str:
    """Draw ``n`` images of seed ``seed`` with a denoiser student and save them.

    Args:
        student: what :meth:`DenoiserStudent.from_pretrained` takes.
        n: number of images.
        seed: of the start noise and the step noise; image i of a seed is always the same (to rounding).
        out: a picture or a folder, as for :func:`sample`.
        steps: number of steps; None: the sampler's.
        classes: as for :func:`sample_teacher`.
        guidance: weight of guidance towards them; None: the sampler's, or 0 without classes.
        interpolate: a spherical walk from the seed's first start noise to its second, in ``n`` pictures.
        device: torch device that draws.
        batch_size: images that are drawn at a time.
        progress: show a bar.
        cascade: super-resolution models that enlarge the images, in their order; see :func:`advkd.cli.enlarging.load_stages`.
        cascade_level: level of the noise on the images that they are given; None: 100, or a model's largest.

    Returns:
        Sentence that names the solver and the network evaluations of an image.

    Raises:
        InputError: bad input, before anything is drawn.
    """
    require_counts(n, seed, batch_size)
    require_output(out)
    model = DenoiserStudent.from_pretrained(student, require_device(device))
    sampler, steps = model.sampler, model.sampler.steps if steps is None else steps
    weight = model.weight(classes, guidance)
    labels = _classes(classes, model.model, None, weight)
    model.model.check_run(len(labels) or 1, sampler.solver, steps, labels=labels or None, guidance=weight)

    if interpolate and (sampler.solver.stochastic or len(labels) > 1):
        raise InputError("--interpolate: a walk is of one class, or of none, and of a sampler that adds no noise")

    def images(x_T, first):
        return model.draw(x_T, steps, seed, first, labels=labels_in_turn(labels, first, len(x_T)), guidance=weight)

    walk = partial(_walk, images, model.latents(2, seed), n) if interpolate else None
    record = {"student": {**model.identity(), "name": None}, "seed": seed, "walk": n if interpolate else None}
    record |= {"steps": steps, "classes": labels, "guidance": weight}
    draw: Draw = walk or (lambda parts: (images(model.latents(count, seed, first), first) for first, count in parts))
    draw, record, size, said = enlarged(draw, record, model, load_stages(cascade, device), cascade_level, seed)
    write_images(out, n, size, draw, record, batch_size, min(n, 10) if walk else None, progress)
    return _cost(sampler.solver, steps, bool(weight) and not model.model.most_guidance) + said


def sample_teacher(
    teacher: str,
    n: int,
    seed: int,
    out: str | Path,
    solver: Solver,
    steps: int | None = None,
    classes: str | None = None,
    guidance: float = 0.0,
    classifier: str = "",
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    progress: bool = True,
    cascade: Sequence[str] = (),
    cascade_level: int | None = None,
) -> str:
    """Draw ``n`` images of seed ``seed`` with a teacher and save them.

    Args:
        teacher: what :meth:`Teacher.from_pretrained` takes.
        n: number of images.
        seed: of the start noise and the step noise; image i of a seed is always the same (to rounding).
        out: a picture or a folder, as for :func:`sample`.
        solver: a :class:`~advkd.diffusion.solvers.Solver`.
        steps: number of steps; None: the solver's usual number.
        classes: names of classes, separated by commas, which images have in turn (``all``: every class); None: no class.
        guidance: weight of guidance towards them; 0 for the conditional model.
        classifier: folder of ``advkd classifier train --noisy``, for classifier guidance; empty: classifier-free.
        device: torch device that draws.
        batch_size: images that are drawn at a time.
        progress: show a bar.
        cascade: super-resolution models that enlarge the images, in their order; see :func:`advkd.cli.enlarging.load_stages`.
        cascade_level: level of the noise on the images that they are given; None: 100, or a model's largest.

    Returns:
        Sentence that names the solver and the network evaluations of an image.

    Raises:
        InputError: bad input, before anything is drawn.
    """
    require_counts(n, seed, batch_size)
    require_output(out)
    model = Teacher.from_pretrained(teacher, require_device(device))
    guide = Classifier.from_pretrained(classifier).to(device) if classifier else None
    labels = _classes(classes, model, guide, guidance)
    draw: Draw = partial(_from_teacher, model, seed, solver, steps, labels, guidance, guide)
    if guide is not None and not guidance:
        raise InputError("--classifier needs --guidance above 0, its weight")
    model.check_run(len(labels) or 1, solver, steps, labels=labels or None, guidance=guidance, classifier=guide)
    record = {"teacher": {**model.identity(solver), "name": None}, "seed": seed, "solver": solver.identity(), "steps": steps}
    record |= {"classes": labels, "guidance": guidance, "classifier": digest(guide.state_dict()) if guide else None}
    stages = load_stages(cascade, device, solver, steps)
    draw, record, size, said = enlarged(draw, record, model, stages, cascade_level, seed)
    write_images(out, n, size, draw, record, batch_size, progress=progress)
    return _cost(solver, len(model.timesteps(solver, steps)), bool(guidance) and guide is None) + said


def kind_of_student(student: str) -> str:
    """Kind of what :func:`advkd.load_student` would load, in words."""
    return "denoiser student" if student_class(student) is DenoiserStudent else "generator student"


def _cost(solver, steps, twice):
    """Words for what an image costs; ``twice``: guidance by two evaluations."""
    count = solver.evaluations(steps) * (1 + twice)
    return f"{solver.name}, {steps} step{'s' * (steps > 1)}, {count} network evaluation{'s' * (count > 1)} an image"


def _classes(classes: str | None, teacher: Teacher, classifier: Classifier | None, guidance: float) -> list[int]:
    """Numbers of the classes that images take in turn."""
    if classes is None and (guidance or classifier is not None):
        raise InputError("guidance needs --classes: name what it is towards")
    return class_numbers(teacher, _class_names(teacher, classifier), classes)


def _class_names(teacher: Teacher, classifier: Classifier | None) -> list[str]:
    """Names of the classes of a teacher and a classifier, numbers where nobody named them."""
    known = [list(names) for names in (teacher.class_names, _names_of(classifier)) if names]
    if len(known) == 2 and known[0] != known[1]:
        raise InputError(f"--classifier was trained on other classes than teacher {teacher.name}: {', '.join(known[1])}")
    return known[0] if known else []


def _names_of(classifier):
    """Names of a classifier's classes, numbers where it has none."""
    if classifier is None:
        return []
    record = classifier.training_record or {}
    return record.get("classes") or [str(i) for i in range(classifier.config.classes)]


def _from_teacher(teacher, seed, solver, steps, labels, guidance, classifier, parts) -> Iterator[torch.Tensor]:
    for first, count in parts:
        chosen = labels_in_turn(labels, first, count)
        yield teacher.sample(count, seed, solver, steps, first, labels=chosen, guidance=guidance, classifier=classifier)


def _drawn(fused, seed, labels, as_pictures, parts):
    return fused.draw(parts, seed, torch.uint8 if as_pictures else torch.float32, labels=labels or None)


def _walk(draw, latents, n, parts):
    a, b = latents.flatten(1)
    for first, count in parts:
        z = torch.stack([slerp(a, b, i / max(n - 1, 1)) for i in range(first, first + count)])
        yield draw(z.reshape(count, *latents.shape[1:]), first).float().cpu()


def slerp(a: torch.Tensor, b: torch.Tensor, position: float) -> torch.Tensor:
    """Spherical interpolation between two latents: a at 0, b at 1; both N(0, I) give N(0, I)-like norms between."""
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    angle = math.acos(max(-1.0, min(1.0, float(cosine))))
    if math.sin(angle) < 1e-6:
        return (1 - position) * a + position * b
    return (math.sin((1 - position) * angle) * a + math.sin(position * angle) * b) / math.sin(angle)
