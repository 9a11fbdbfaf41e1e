"""The main job, end to end: a teacher's images, distillation, a page of pictures that a person reads."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from ..data.dataset_info import TrajectoryConfig
from ..data.pictures import save_curves, save_grid
from ..diffusion.recorder import record_in_processes, record_trajectories
from ..diffusion.teacher import Teacher
from ..evaluation.evaluate import describe_models
from ..evaluation.html_page import figure, self_contained
from ..evaluation.recognition import SURE, recognised
from ..evaluation.report import FRESH_SEED, save_levels_of, save_pairs_of
from ..evaluation.taught import all_in_turn, taught
from ..methods.adv_kd import DistillConfig, recipe
from ..models.classifier import Classifier
from ..models.fused_student import FusedStudent
from ..models.shape import PRESETS
from ..models.student import Student
from ..runtime.devices import plain_defaults
from ..runtime.files import write_bytes
from ..runtime.ranges import named
from ..training.checkpoint import CHECKPOINT
from ..training.distillation import distill

TEACHER = "digits-conditional"
"""The embedded teacher, told the class."""

IMAGES = 100
"""Images of the contact sheet."""

PAGE = "demo.html"
"""File of the page, in the demo's folder."""


@plain_defaults()
def run_demo(out: str | Path, num: int = 2048, updates: int = 600, device: str = "cpu", progress: bool = True) -> str:
    """Record ``num`` images of the teacher, distil for ``updates`` updates, write a page under ``out``; a killed run goes on.

    Args:
        out: folder for trajectories, student, pictures and ``demo.html``.
        num: images of the teacher, its classes in turn.
        updates: of the student.
        device: torch device.
        progress: show bars.

    Returns:
        Two lines: how many images of fresh noise are recognised; parameters, evaluations and time per image of teacher
        and student.
    """
    out, config, recording = Path(out), demo_recipe(updates), demo_recording(num)
    recording.validate()
    config.validate(len(PRESETS["digits"].channels), True, num)
    with named("load"):
        teacher = Teacher.from_pretrained(TEACHER, device)
    with named("trajectories"):
        trajectories = _record(teacher, recording, out / "trajectories", device, progress)
    torch.manual_seed(config.seed)
    student = Student(replace(PRESETS["digits"], classes=tuple(teacher.class_names)))
    resume = (out / "student" / CHECKPOINT).exists()
    with named("distillation"):
        student = distill(trajectories, student, config, out / "student", resume, device, progress)
    with named("fuse"):
        fused = student.fuse()
    with named("pictures"):
        captions = _save_pictures(teacher, student, fused, out)
    with named("timing"):
        said = summary(teacher, student, fused)
    page = self_contained(
        "advkd: one pass instead of many", [f"<p>{said}.</p>", *(figure(out / n, c) for n, c in captions.items())]
    )
    write_bytes(out / PAGE, page.encode())
    return f"{captions['student_samples.png']}\n{said}"


def demo_recording(num: int) -> TrajectoryConfig:
    """The teacher's images: ten steps of UniPC, guided towards each class in turn."""
    return TrajectoryConfig(num=num, solver="unipc", steps=10, classes="all", guidance=1.0)


def demo_recipe(updates: int) -> DistillConfig:
    """The joint recipe, shortened: levels of the teacher's image, which can be met, and a critic on the final image only."""
    return recipe(
        "joint",
        updates=(updates,),
        batch_sizes=(32,),
        targets="image",
        critic_levels=(12,),
        wasserstein=0.05,
        learning_rate=1e-3,
        final_learning_rate=0.05,
        checkpoint_every=50,
    )


def _record(teacher, config, out, device, progress):
    processes = os.cpu_count() or 1
    if str(device) != "cpu" or processes == 1:
        return record_trajectories(teacher, config, out, progress)
    return record_in_processes(TEACHER, config, out, min(processes, 8), progress)


def _save_pictures(teacher, student, fused, out):
    """Write the PNGs and return ``{file name: caption}``, the contact sheet first."""
    lesson, classifier, labels = taught(student, teacher), Classifier.from_pretrained("digits"), all_in_turn(student, IMAGES)
    images = fused.sample(IMAGES, FRESH_SEED)
    save_grid(images, out / "student_samples.png", columns=student.num_classes)
    theirs = teacher.sample(IMAGES, FRESH_SEED, **lesson.arguments(IMAGES))
    sure, of_teacher = (int(recognised(classifier, group, labels).sum()) for group in (images, theirs))
    save_pairs_of(teacher, student, out / "teacher_and_student.png")
    save_levels_of(teacher, student, out / "levels.png")
    save_curves(out / "student" / "metrics.csv", out / "loss_curves.png")
    evaluations = lesson.evaluations(teacher)
    return {
        "student_samples.png": f"{IMAGES} images of the student from fresh noise, not chosen; each column was asked "
        f"for one digit, 0 to 9. A classifier of real digits is sure of {sure} of them (probability of that digit over "
        f"{SURE:g}), and of {of_teacher} of the teacher's from the same noise.",
        "teacher_and_student.png": f"The same noise: the teacher after {evaluations} evaluations, the student after one.",
        "levels.png": "Images of the submodules, from 4x4 pixels on, beneath the averages that they learned.",
        "loss_curves.png": "The training's losses.",
    }


def summary(teacher: Teacher, student: Student, fused: FusedStudent) -> str:
    """One line: parameters, network evaluations and time per image of teacher and student."""
    models = describe_models(fused, student, teacher)
    slow, quick = models["teacher"], models["student"]
    teacher_time, student_time = (1e3 * model["seconds"]["median"] for model in (slow, quick))
    size, threads = models["batch_size"], torch.get_num_threads()
    return (
        f"teacher: {slow['parameters']:,} parameters, {slow['evaluations']} evaluations, {teacher_time:.1f} ms per image; "
        f"student: {quick['parameters']:,} parameters, 1 evaluation, {student_time:.2f} ms per image "
        f"({teacher_time / student_time:.0f} times faster; batches of {size}, {threads} threads)"
    )
