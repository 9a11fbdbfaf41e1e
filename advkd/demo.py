"""The main job, end to end: trajectories of the embedded teacher, distillation, samples and pictures."""

import os
import statistics
import time
from pathlib import Path

import torch

from .distill import CHECKPOINT, distill
from .models.student import PRESETS, Student
from .pictures import save_curves, save_grid, save_levels, save_pairs
from .recipes import recipe
from .teacher import Teacher
from .trajectories import TrajectoryConfig, downsample, record_in_processes, record_trajectories

FRESH_SEED = 12345


def run_demo(out, num=1024, updates=300, device="cpu", progress=True):
    """Make ``num`` trajectories, distil for ``updates`` updates and write the pictures under ``out``; a killed run goes on.

    Returns the summary line (parameters, network evaluations, time per image of teacher and student).
    """
    out = Path(out)
    config = demo_recipe(updates)
    TrajectoryConfig(num=num).validate()
    config.validate(len(PRESETS["digits"].channels), True, num)
    teacher = Teacher.from_pretrained("digits", device)
    trajectories = _record(teacher, TrajectoryConfig(num=num), out / "trajectories", device, progress)
    torch.manual_seed(config.seed)
    student = Student.from_preset("digits")
    resume = (out / "student" / CHECKPOINT).exists()
    student = distill(trajectories, student, config, out / "student", resume, device, progress)
    pairs_picture(teacher, student, out / "teacher_and_student.png")
    levels_picture(teacher, student, out / "levels.png")
    save_curves(out / "student" / "metrics.csv", out / "loss_curves.png")
    save_grid(student.fuse().sample(64, seed=FRESH_SEED), out / "student_samples.png")
    return summary(teacher, student)


def _record(teacher, config, out, device, progress):
    processes = os.cpu_count() or 1
    if str(device) != "cpu" or processes == 1:
        return record_trajectories(teacher, config, out, progress)
    return record_in_processes("digits", config, out, min(processes, 8), progress)


def demo_recipe(updates):
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


def pairs_picture(teacher, student, path, n=12, seed=FRESH_SEED):
    """Teacher and student side by side from the same noise, which training has not seen."""
    x_T = teacher.noise(n, seed)
    for _, x_0 in teacher.path(x_T, "ddim"):
        pass
    with torch.no_grad():
        save_pairs(x_0, student(student.project(x_T)), path)


def levels_picture(teacher, student, path, seed=FRESH_SEED):
    """The strip of all levels beneath the teacher's states, from one noise."""
    from .schedule import supervising_timesteps

    x_T = teacher.noise(1, seed)
    states = dict(teacher.path(x_T, "ddim"))
    timesteps = supervising_timesteps("ddim", student.depth, list(states), teacher.train_timesteps)
    targets = [downsample(states[t], side)[0] for t, side in zip(timesteps, student.resolutions)]
    with torch.no_grad():
        levels = [level[0] for level in student.levels(student.project(x_T))]
    save_levels([*targets, states[min(states)][0]], levels, [*timesteps, None], path)


def summary(teacher, student, n=16):
    """One line: parameters, network evaluations and time per image of teacher and student."""
    fused = student.fuse()
    z = fused.latents(n, FRESH_SEED)
    student_time = _seconds(lambda: fused(z), repeats=20) / n
    teacher_time = _seconds(lambda: teacher.sample(n, FRESH_SEED), repeats=2) / n
    evaluations = len(teacher.timesteps("ddim"))
    return (
        f"teacher: {teacher.num_parameters():,} parameters, {evaluations} evaluations, {1e3 * teacher_time:.1f} ms per image; "
        f"student: {student.num_parameters(terminals=False):,} parameters, 1 evaluation, {1e3 * student_time:.2f} ms per image "
        f"({teacher_time / student_time:.0f} times faster; batches of {n}, {torch.get_num_threads()} threads)"
    )


def _seconds(function, repeats):
    """Median time of a call, after one call to warm up; results are fetched to the CPU, so that a GPU's work is counted."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function().cpu()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])
