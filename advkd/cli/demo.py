"""The main job, end to end: trajectories of the embedded teacher, distillation, samples and pictures."""

import os
from pathlib import Path

import torch

from ..data.dataset_info import TrajectoryConfig
from ..diffusion.recorder import record_in_processes, record_trajectories
from ..diffusion.teacher import Teacher
from ..evaluation.evaluate import describe_models
from ..evaluation.report import save_pictures
from ..methods.adv_kd import DistillConfig, recipe
from ..models.shape import PRESETS
from ..models.student import Student
from ..runtime.devices import plain_defaults
from ..runtime.ranges import named
from ..training.checkpoint import CHECKPOINT
from ..training.distillation import distill


@plain_defaults()
def run_demo(out: str | Path, num: int = 1024, updates: int = 300, device: str = "cpu", progress: bool = True) -> str:
    """Make ``num`` trajectories, distil for ``updates`` updates and write the pictures under ``out``; a killed run goes on.

    Returns the summary line (parameters, network evaluations, time per image of teacher and student).
    """
    out = Path(out)
    config = demo_recipe(updates)
    TrajectoryConfig(num=num).validate()
    config.validate(len(PRESETS["digits"].channels), True, num)
    with named("load"):
        teacher = Teacher.from_pretrained("digits", device)
    with named("trajectories"):
        trajectories = _record(teacher, TrajectoryConfig(num=num), out / "trajectories", device, progress)
    torch.manual_seed(config.seed)
    student = Student.from_preset("digits")
    resume = (out / "student" / CHECKPOINT).exists()
    with named("distillation"):
        student = distill(trajectories, student, config, out / "student", resume, device, progress)
    with named("pictures"):
        save_pictures(teacher, student, out / "student" / "metrics.csv", out)
    with named("timing"):
        return summary(teacher, student)


def _record(teacher, config, out, device, progress):
    processes = os.cpu_count() or 1
    if str(device) != "cpu" or processes == 1:
        return record_trajectories(teacher, config, out, progress)
    return record_in_processes("digits", config, out, min(processes, 8), progress)


def demo_recipe(updates: int) -> DistillConfig:
    """The joint recipe, shortened: half the batch, a critic on the final image only."""
    return recipe(
        "joint",
        updates=(updates,),
        batch_sizes=(32,),
        critic_levels=(12,),
        learning_rate=1e-3,
        final_learning_rate=0.1,
        checkpoint_every=50,
    )


def summary(teacher: Teacher, student: Student) -> str:
    """One line: parameters, network evaluations and time per image of teacher and student."""
    with named("fuse"):
        fused = student.fuse()
    models = describe_models(fused, student, teacher)
    slow, quick = models["teacher"], models["student"]
    teacher_time, student_time = (1e3 * model["seconds"]["median"] for model in (slow, quick))
    size, threads = models["batch_size"], torch.get_num_threads()
    return (
        f"teacher: {slow['parameters']:,} parameters, {slow['evaluations']} evaluations, {teacher_time:.1f} ms per image; "
        f"student: {quick['parameters']:,} parameters, 1 evaluation, {student_time:.2f} ms per image "
        f"({teacher_time / student_time:.0f} times faster; batches of {size}, {threads} threads)"
    )
