"""The command line ``advkd``.

Commands: info, teacher train, teacher noise-power, classifier train, autoencoder train, trajectories, distill, sample,
evaluate, compare, search-levels, report, warmup, demo, toy.
"""

from dataclasses import replace
from pathlib import Path

import click

from ..config import overlay, read_value
from ..data.dataset_info import TrajectoryConfig
from ..diffusion.solvers import Solver
from ..errors import BackendUnavailableError, InputError, TrainingError
from ..methods.autoencoding import AutoencoderTrainingConfig
from ..methods.classification import ClassifierTrainingConfig
from ..methods.denoising import TeacherTrainingConfig
from ..ops.arguments import whole
from ..runtime.devices import keep_freed_memory, out_of_memory
from ..runtime.hub import reason
from ..runtime.launcher import INTERRUPTED, hold_standard_streams, local_device
from .compare import compare
from .distill import distill
from .evaluate import evaluate
from .options import computing, device_option, options
from .search_levels import search_levels
from .toy import toy

OWNERS = {
    "interpolate": ("student",),
    **dict.fromkeys(("backend", "dtype"), ("generator student",)),
    **dict.fromkeys(("steps", "guidance"), ("teacher", "denoiser student")),
    "classes": ("teacher", "student"),
    "classifier": ("teacher",),
}
"""Kinds of models that an option of ``advkd sample`` is for; a solver's numbers, which are not here, are for teachers."""


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
            if not out_of_memory(error):
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
    """Train a teacher, or estimate the noise that it finds."""


@teacher.command("noise-power")
@click.option("--teacher", "source", required=True, help="Folder of the teacher, in which noise_power.json is kept.")
@click.option(
    "--data", default="digits", show_default=True, help="The teacher's training data: 'digits', 'glyphs' or a folder."
)
@click.option("--num", default=256, show_default=True, help="Images at each of 48 levels.")
@click.option("--seed", default=0, show_default=True, help="Seed of the noise.")
@device_option
@computing
def teacher_noise_power(source, data, num, seed, device):
    """Estimate how much noise a teacher finds at every level, once: the analytic solvers need it."""
    from ..data.glyph_sets import trained_glyphs
    from ..data.images import load_images
    from ..diffusion.teacher import Teacher
    from ..runtime.devices import require_device
    from ..training.noise_power import estimate_noise_power

    whole("num", num, 1)
    if not Path(source).is_dir():
        raise InputError(f"--teacher {source}: a folder is needed, in which the estimates are kept")
    model = Teacher.from_pretrained(source, require_device(device))
    if (glyphs := trained_glyphs(data)) is not None:
        # Any glyphs are a fair sample of all.
        glyphs, shape = replace(glyphs, num=num).of(model.class_names, "--data"), (model.image_size, model.image_channels)
        images = glyphs.images(*shape, progress=True)
    else:
        images = load_images(data, model.image_size, model.image_channels)
    click.echo(f"noise power in {estimate_noise_power(model, images, num=num, seed=seed).write(source)}")


@teacher.command("train")
@click.option("--out", required=True, help="Folder for the teacher (diffusers' format).")
@click.option("--resume", is_flag=True, help="Go on from an unfinished run.")
@options(TeacherTrainingConfig)
@computing
def teacher_train(out, resume, **values):
    """Train a small diffusers teacher on the digits, on glyphs, or on a folder of images."""
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
    """Train a small classifier on the digits, on glyphs, or on a folder that holds one folder of images per class."""
    from ..training.classifier import train_classifier

    accuracy = train_classifier(overlay(ClassifierTrainingConfig(), values, "classifier train"), out, resume=resume)
    click.echo(f"classifier saved in {out}, held-out accuracy {accuracy:.4f}")


@main.group()
def autoencoder():
    """Make the latents in which a teacher is trained."""


@autoencoder.command("train")
@click.option("--out", required=True, help="Folder for the autoencoder (diffusers' format).")
@click.option("--resume", is_flag=True, help="Go on from an unfinished run.")
@options(AutoencoderTrainingConfig)
@computing
def autoencoder_train(out, resume, **values):
    """Train a small autoencoder on the digits, on glyphs, or on a folder of images."""
    from ..training.autoencoder import train_autoencoder

    found = train_autoencoder(overlay(AutoencoderTrainingConfig(), values, "autoencoder train"), out, resume)
    sides = "x".join(map(str, found.latent_shape))
    click.echo(f"autoencoder saved in {out}, latents {sides}, scaling factor {found.scaling:.4g}")


@main.command()
@click.option(
    "--teacher", "teacher_source", default="digits", show_default=True, help="'digits', 'glyphs', a folder or a hub id."
)
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
@click.option("--student", help="'digits' (the default), 'glyphs', a folder or a hub id.")
@click.option("--teacher", help="A teacher instead: 'digits', 'glyphs', a folder or a hub id.")
@click.option("-n", "--num", "n", default=16, show_default=True, help="Number of images.")
@click.option("--seed", default=0, show_default=True, help="Seed of the noise.")
@click.option("--out", required=True, help="A picture (a grid) or a folder (one PNG per image; its name may end in a slash).")
@click.option("--interpolate", is_flag=True, help="A student's spherical walk between the seed's first two noises.")
@click.option("--batch-size", default=64, show_default=True, help="Images per pass.")
@click.option("--backend", help="A generator's: auto (the default), reference, cpu, triton or cuda.")
@click.option("--dtype", help="A generator's: float32 (the default), bfloat16, float16 or float64.")
@click.option(
    "--steps",
    type=int,
    help="Steps (default: a denoiser student's own; of a teacher 50 for ddim, all for ddpm, 10 for the others).",
)
@click.option(
    "--classes", help="Names of a model's or classifier's classes, separated by commas, or 'all'; images take them in turn."
)
@click.option("--guidance", type=float, help="Weight w of guidance; 0: the class alone. diffusers' guidance_scale is 1 + w.")
@click.option("--classifier", help="Folder of 'advkd classifier train --noisy', for classifier guidance.")
@click.option("--cascade", multiple=True, help="Super-resolution teacher or student that enlarges them; may be repeated.")
@click.option(
    "--cascade-level", type=int, help="Noise on what --cascade enlarges, in timesteps (default: 100, or a model's largest)."
)
@device_option
@options(Solver, rename={"name": "solver"})
@computing
def sample(student, teacher, n, seed, out, batch_size, device, cascade, cascade_level, **values):
    """Draw images with a student or with a teacher. Into a folder, the same command goes on after a kill.

    A student is a generator, which draws in one pass, or a denoiser student, which takes its own few steps.

    Several processes or GPUs: torchrun --nproc-per-node N -m -- advkd.cli sample ...
    """
    from . import sample as work

    given = {name: value for name, value in values.items() if value is not None and value is not False}  # 0 was given
    if student is not None and teacher is not None:
        raise InputError("--student and --teacher: name one of them")
    if cascade_level is not None and not cascade:
        raise InputError("--cascade-level is of the images that --cascade enlarges: name a model by it")
    if cascade and "interpolate" in given:
        raise InputError("--interpolate: a cascade adds noise of its own to every picture: leave one of them out")
    kind = "teacher" if teacher is not None else work.kind_of_student(student or "digits")
    for name in given:
        if not kind.endswith(owners := OWNERS.get(name, ("teacher",))):
            option, owner = name.replace("_", "-"), " or a ".join(owners)
            places = " or ".join(f"--{kind.split()[-1]}" for kind in owners)
            raise InputError(f"--{option} is an option of a {owner}: leave it out, or name one by {places}")
    numbers = {"name" if name == "solver" else name: given.pop(name) for name in list(given) if name not in OWNERS}
    common = {**given, "device": local_device(device), "batch_size": batch_size}
    common |= {"cascade": cascade, "cascade_level": cascade_level}
    if kind == "teacher":
        said = work.sample_teacher(teacher, n, seed, out, overlay(Solver(), numbers, "sample"), **common)
    elif kind == "denoiser student":
        said = work.sample_denoiser(student, n, seed, out, **common)
    else:
        said = work.sample(student or "digits", n, seed, out, **common)
    click.echo(f"{n} images in {out}" + (f" ({said})" if said else ""))


@main.command()
@click.option("--student", default="digits", show_default=True, help="'digits', 'glyphs', a preset, a folder or a hub id.")
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


main.add_command(evaluate)
main.add_command(compare)
main.add_command(search_levels)
main.add_command(toy)


@main.command()
@click.option("--student", default="digits", show_default=True, help="'digits', 'glyphs', a folder or a hub id.")
@click.option("--teacher", default="digits", show_default=True, help="'digits', 'glyphs', a folder or a hub id.")
@click.option("--evaluation", required=True, help="evaluation.json of 'advkd evaluate' for this student.")
@click.option("--metrics", help="metrics.csv of the training (default: the student's own, where it has one).")
@click.option("--ablation", help="Table of runs by profiling/cases/ablation.py.")
@click.option("--solvers", help="solvers.json of 'advkd evaluate --solvers', for the plot by solver and evaluations.")
@click.option("--conditional", help="Conditional teacher whose classes are shown by weight of guidance.")
@click.option("--out", required=True, help="Folder for report.html and its PNGs.")
@device_option
@computing
def report(student, teacher, evaluation, metrics, ablation, solvers, conditional, out, device):
    """Write one self-contained HTML page: samples, levels, loss curves, tables."""
    from ..diffusion.teacher import Teacher
    from ..evaluation.report import write_report
    from ..models.student import Student
    from ..runtime.devices import require_device

    model = Student.from_pretrained(student, require_device(device))
    folder = Student.embedded.get(student, Path(student))
    if metrics is None and (folder / "metrics.csv").exists():
        metrics = folder / "metrics.csv"
    classes = Teacher.from_pretrained(conditional, device) if conditional else None
    source = Teacher.from_pretrained(teacher, device)
    page = write_report(model, source, evaluation, out, metrics, ablation, solvers=solvers, conditional=classes)
    click.echo(f"report in {page}")


@main.command()
@click.option("--out", default="demo", show_default=True, help="Folder for trajectories, student and pictures.")
@click.option("--num", default=2048, show_default=True, help="Images of the teacher.")
@click.option("--updates", default=600, show_default=True, help="Student updates.")
@device_option
@computing
def demo(out, num, updates, device):
    """The main job on the embedded teacher of digits by class: its images, distillation, a page of pictures."""
    from ..runtime.devices import require_device
    from .demo import PAGE, run_demo

    require_device(device)
    click.echo(run_demo(out, num, updates, device))
    click.echo(f"the page with the pictures: {Path(out) / PAGE}")
