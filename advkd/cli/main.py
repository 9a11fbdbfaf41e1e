"""The command line ``advkd``.

Commands: info, teacher train, classifier train, trajectories, distill, sample, evaluate, report, warmup, demo.
"""

from pathlib import Path

import click

from ..config import overlay, read_value
from ..data.dataset_info import TrajectoryConfig
from ..errors import BackendUnavailableError, InputError, TrainingError
from ..evaluation.evaluate import EvaluationConfig
from ..methods.classification import ClassifierTrainingConfig
from ..methods.denoising import TeacherTrainingConfig
from ..runtime.devices import keep_freed_memory
from ..runtime.hub import reason
from ..runtime.launcher import INTERRUPTED, hold_standard_streams, local_device
from .distill import distill
from .likelihood import LIKELIHOOD, measure_likelihood
from .options import computing, device_option, options


class _Commands(click.Group):
    """Errors that a user can mend are one line and exit code 2 (a run that diverged: 1), not a traceback."""

    def invoke(self, context):
        hold_standard_streams()
        keep_freed_memory()
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise  # nobody reads on, as behind "| head": click ends without a word
        except (InputError, BackendUnavailableError, OSError) as error:
            self._fail(error, 2)
        except TrainingError as error:
            self._fail(error, 1)
        except (MemoryError, RuntimeError) as error:
            # torch's allocators raise RuntimeError: on the CPU with these words, on a GPU with those.
            words = ("can't allocate memory", "out of memory")
            if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
                raise
            self._fail(f"not enough memory: lower the batch size or the model's channels ({reason(error)})", 2)
        except KeyboardInterrupt:
            self._fail(INTERRUPTED, 130)

    def _fail(self, error, code):
        click.echo("advkd: " + " ".join(str(error).split()), err=True)
        raise SystemExit(code)


@click.group(cls=_Commands)
@click.version_option(package_name="advkd")
def main():
    """Distil a diffusion teacher into a student that draws an image in one pass."""


@main.command()
def info():
    """Print versions, devices, and which backend runs which op, with the reason for each gap."""
    from .info import describe

    click.echo(describe())


@main.group()
def teacher():
    """Make a teacher."""


@teacher.command("train")
@click.option("--out", required=True, help="Folder for the teacher (diffusers' format).")
@click.option("--resume", is_flag=True, help="Go on from an unfinished run.")
@options(TeacherTrainingConfig)
@computing
def teacher_train(out, resume, **values):
    """Train a small diffusers teacher on the digits or on a folder of images."""
    from ..runtime.devices import require_device
    from ..training.teacher import train_teacher

    config = overlay(TeacherTrainingConfig(), values, "teacher train")
    require_device(config.device)
    click.echo(f"teacher saved in {train_teacher(config, out, resume)}")


@main.group()
def classifier():
    """Make a feature extractor for 'advkd evaluate'."""


@classifier.command("train")
@click.option("--out", required=True, help="Folder for the classifier.")
@click.option("--resume", is_flag=True, help="Go on from an unfinished run.")
@options(ClassifierTrainingConfig)
@computing
def classifier_train(out, resume, **values):
    """Train a small classifier on the digits or on a folder that holds one folder of images per class."""
    from ..training.classifier import train_classifier

    accuracy = train_classifier(overlay(ClassifierTrainingConfig(), values, "classifier train"), out, resume=resume)
    click.echo(f"classifier saved in {out}, held-out accuracy {accuracy:.4f}")


@main.command()
@click.option("--teacher", "teacher_source", default="digits", show_default=True, help="'digits', a folder or a hub id.")
@click.option("--out", required=True, help="Folder for the shards and the manifest.")
@click.option("--processes", default=1, show_default=True, help="Local processes of one thread each (CPU only).")
@click.option("--compiled/--no-compiled", default=None, help="The network through torch.compile (default: on GPUs).")
@click.option("--autocast/--no-autocast", default=False, help="Mixed precision in bfloat16: other paths, at less cost.")
@device_option
@options(TrajectoryConfig)
@computing
def trajectories(teacher_source, out, processes, compiled, autocast, device, **values):
    """Run the teacher and store its trajectories; run again to go on after a kill.

    Several machines or GPUs: torchrun --nproc-per-node N -m -- advkd.cli trajectories ...
    """
    import torch

    from ..diffusion.recorder import record_in_processes, record_trajectories
    from ..diffusion.teacher import Teacher
    from ..runtime.devices import require_device

    config = overlay(TrajectoryConfig(), values, "trajectories")
    config.validate()
    if processes != 1 and device != "cpu":
        raise InputError(f"--processes {processes} is for --device cpu; use torchrun for several GPUs")
    teacher = Teacher.from_pretrained(teacher_source, require_device(local_device(device)))
    teacher.optimize(compiled, torch.bfloat16 if autocast else None)
    if processes == 1:
        record_trajectories(teacher, config, out)
    else:
        record_in_processes(teacher_source, config, out, processes, compiled=compiled, autocast=autocast)
    finished = (Path(out) / "manifest.json").exists()
    click.echo(f"{config.num} trajectories in {out}" if finished else f"this process's shards are in {out}")


main.add_command(distill)


@main.command()
@click.option("--student", default="digits", show_default=True, help="'digits', a folder or a hub id.")
@click.option("-n", "--num", "n", default=16, show_default=True, help="Number of images.")
@click.option("--seed", default=0, show_default=True, help="Seed of the noise.")
@click.option("--out", required=True, help="A picture (a grid) or a folder (one PNG per image; its name may end in a slash).")
@click.option("--interpolate", is_flag=True, help="A spherical walk between the seed's first two latents.")
@click.option("--batch-size", default=64, show_default=True, help="Images per pass.")
@click.option("--backend", default="auto", show_default=True, help="auto, reference, cpu, triton or cuda.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16, float16 or float64.")
@device_option
@computing
def sample(student, n, seed, out, interpolate, batch_size, backend, dtype, device):
    """Draw images with a student, in one pass. Into a folder: pictures that are there are kept, the same command goes on.

    Several processes or GPUs: torchrun --nproc-per-node N -m -- advkd.cli sample ...
    """
    from .sample import sample as run

    run(student, n, seed, out, interpolate, local_device(device), backend, dtype, batch_size)
    click.echo(f"{n} images in {out}")


@main.command()
@click.option("--student", default="digits", show_default=True, help="'digits', a preset, a folder or a hub id.")
@click.option("--batch-sizes", default="1,64", show_default=True, help="Comma-separated images per pass.")
@click.option("--dtypes", default="float32", show_default=True, help="Comma-separated, of float32, bfloat16, float16.")
@click.option("--backend", default="auto", show_default=True, help="auto, cpu, triton or cuda.")
@click.option("--tune/--no-tune", default=True, help="Measure plans (default), or compile kernels only.")
@device_option
@computing
def warmup(student, batch_sizes, dtypes, backend, tune, device):
    """Compile and measure everything that a student needs here, so that later processes start at once."""
    from ..runtime.folders import cache_folder
    from .warmup import warmup as run

    sizes = tuple(read_value(batch_sizes, (0,), "warmup: --batch-sizes", "int"))
    for dtype, size, seconds in run(student, device, backend, tuple(dtypes.split(",")), sizes, tune):
        click.echo(f"{dtype}, batch {size}: {seconds:.1f} s")
    click.echo(f"measured plans are kept in {cache_folder() / 'plans'}; Triton and CuPy keep kernels in caches of their own")


@main.command()
@click.option("--student", help="'digits' (the default), a folder or a hub id.")
@click.option("--teacher", help="'digits' (the default), a folder or a hub id.")
@click.option("--teacher-samples", help="Folder of 'advkd trajectories' (by default they are drawn and kept in the cache).")
@click.option("--images", help="Measure a folder of images instead, against --reference.")
@click.option("--reference", help="Folder of reference images, or 'digits'.")
@click.option("--out", help="Folder for evaluation.json (needed for a student) or likelihood.json.")
@click.option("--likelihood", is_flag=True, help=LIKELIHOOD)
@click.option("--steps", help="Of the chain of --likelihood, evenly spaced. Default: all of the teacher's.")
@click.option("--variance", help="Of the steps of --likelihood: fixed_small, fixed_large or analytic. Default: the teacher's.")
@device_option
@options(EvaluationConfig)
@computing
def evaluate(student, teacher, teacher_samples, images, reference, out, likelihood, steps, variance, device, **values):
    """Measure a student against its teacher and real images, a folder of images against another, or a teacher's likelihood."""
    from ..evaluation import evaluate as run
    from ..runtime.devices import require_device

    if likelihood:
        given = {"student": student, "teacher_samples": teacher_samples, "reference": reference, **values}
        given |= {"steps": steps, "variance": variance}
        return click.echo(measure_likelihood(teacher, images, out, device, given))
    for name, value in (("steps", steps), ("variance", variance)):
        if value is not None:
            raise InputError(f"--{name} goes with --likelihood only")
    config = overlay(run.EvaluationConfig(), values, "evaluate")
    require_device(device)
    if (images is None) != (reference is None):
        raise InputError("--images and --reference go together")
    if images is not None:
        unused = {"student": student, "teacher": teacher, "teacher-samples": teacher_samples}
        unused |= {name: values[name] for name in ("num", "seed", "real", "processes", "dtype")}
        given = [option for option, value in unused.items() if value is not None]
        if given:
            raise InputError(f"--{given[0]} does not go with --images")
        result = run.evaluate_folders(images, reference, config, out, device)
    elif out is None:
        raise InputError("--out is missing: name a folder for evaluation.json")
    else:
        result = run.evaluate_student(student or "digits", teacher or "digits", config, out, teacher_samples, device)
    click.echo(run.table(result))


@main.command()
@click.option("--student", default="digits", show_default=True, help="'digits', a folder or a hub id.")
@click.option("--teacher", default="digits", show_default=True, help="'digits', a folder or a hub id.")
@click.option("--evaluation", required=True, help="evaluation.json of 'advkd evaluate' for this student.")
@click.option("--metrics", help="metrics.csv of the training (default: the student's own, where it has one).")
@click.option("--ablation", help="Table of runs by profiling/cases/ablation.py.")
@click.option("--out", required=True, help="Folder for report.html and its PNGs.")
@device_option
@computing
def report(student, teacher, evaluation, metrics, ablation, out, device):
    """Write one self-contained HTML page: samples, levels, loss curves, tables."""
    from ..diffusion.teacher import Teacher
    from ..evaluation.report import write_report
    from ..models.student import Student
    from ..runtime.devices import require_device

    model = Student.from_pretrained(student, require_device(device))
    folder = Student.embedded.get(student, Path(student))
    if metrics is None and (folder / "metrics.csv").exists():
        metrics = folder / "metrics.csv"
    page = write_report(model, Teacher.from_pretrained(teacher, device), evaluation, out, metrics, ablation)
    click.echo(f"report in {page}")


@main.command()
@click.option("--out", default="demo", show_default=True, help="Folder for trajectories, student and pictures.")
@click.option("--num", default=1024, show_default=True, help="Trajectories.")
@click.option("--updates", default=300, show_default=True, help="Student updates.")
@device_option
@computing
def demo(out, num, updates, device):
    """The main job on the embedded teacher: trajectories, distillation, samples, pictures."""
    from ..runtime.devices import require_device
    from .demo import run_demo

    require_device(device)
    click.echo(run_demo(out, num, updates, device))
    click.echo(f"pictures in {out}: teacher_and_student.png, levels.png, loss_curves.png, student_samples.png")
