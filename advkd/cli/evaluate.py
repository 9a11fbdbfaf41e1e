"""The command ``advkd evaluate``: a student, folders of images, a teacher's solvers, or a teacher's likelihood."""

from typing import Any

import click

from ..config import overlay
from ..errors import InputError
from ..evaluation.evaluate import EvaluationConfig
from ..evaluation.evaluate_likelihood import LikelihoodConfig
from ..evaluation.solver_quality import SolverEvaluationConfig
from .options import computing, device_option, only, options

LIKELIHOOD = (
    "Bound the teacher's negative log-likelihood of --images ('digits', the default, 'glyphs' or a folder) in bits per "
    "dimension. By default --num 96, all steps and --seed 0: about five minutes on two cores for the embedded teacher; time "
    "grows with both numbers. A killed run goes on, and a larger --num adds to a smaller one."
)
"""Help of the option."""

SOLVERS = (
    "Measure the teacher's images by solver and network evaluations: names separated by commas, or all. Distances are to real "
    "images and to a fine-step reference; sets are kept in the cache, and a killed run goes on."
)


@click.command()
@click.option("--student", help="'digits' (the default), 'glyphs', a folder or a hub id.")
@click.option("--teacher", help="'digits' (the default), 'glyphs', a folder or a hub id.")
@click.option("--teacher-samples", help="Folder of 'advkd trajectories' (by default they are drawn and kept in the cache).")
@click.option("--images", help="Measure a folder of images instead, against --reference.")
@click.option("--reference", help="Folder of reference images, 'digits' or 'glyphs'.")
@click.option("--out", help="Folder for evaluation.json, likelihood.json or solvers.json.")
@click.option("--likelihood", is_flag=True, help=LIKELIHOOD)
@click.option("--steps", help="With --likelihood: number of evenly spaced timesteps. Default: all of the teacher's.")
@click.option("--variance", help="With --likelihood: variance, fixed_small, fixed_large or analytic. Default: the teacher's.")
@click.option("--solvers", help=SOLVERS)
@only(SolverEvaluationConfig, "evaluations", "other_num", "fine_steps", "spacing", of="--solvers")
@device_option
@options(EvaluationConfig)
@computing
def evaluate(device, likelihood, **given):
    """Measure a student against its teacher and real images, a folder of images against another, or a teacher."""
    from ..runtime.devices import require_device

    require_device(device)
    values = {name: value for name, value in given.items() if value is not None}
    if likelihood and "solvers" in values:
        raise InputError("--likelihood and --solvers: name one of them")
    measure = _likelihood if likelihood else _solvers if "solvers" in values else _folders if "images" in values else _student
    click.echo(measure(values, device))


def _likelihood(values: dict[str, Any], device: str) -> str:
    from ..evaluation.evaluate_likelihood import describe, evaluate_likelihood

    config, teacher, images, out = _split(values, "likelihood", LikelihoodConfig(), "teacher", "images", file="likelihood.json")
    return describe(evaluate_likelihood(teacher or "digits", images or "digits", config, out, device))


def _solvers(values: dict[str, Any], device: str) -> str:
    from ..evaluation.solver_quality import describe, evaluate_solvers

    config, teacher, out = _split(values, "solvers", SolverEvaluationConfig(), "teacher", file="solvers.json")
    return describe(evaluate_solvers(teacher or "digits", config, out, device))


def _folders(values: dict[str, Any], device: str) -> str:
    from ..evaluation.evaluate import evaluate_folders, table

    if "reference" not in values:
        raise InputError("--images and --reference go together")
    fixed = ("num", "seed", "real", "processes", "dtype", "classes", "guidance")
    if foreign := [name for name in fixed if name in values]:
        raise InputError(f"--{foreign[0]} does not go with --images")
    config, images, reference, out = _split(values, "images", EvaluationConfig(), "images", "reference")
    return table(evaluate_folders(images, reference, config, out, device))


def _student(values: dict[str, Any], device: str) -> str:
    from ..evaluation.evaluate import evaluate_student, table

    if "reference" in values:
        raise InputError("--images and --reference go together")
    names = ("student", "teacher", "teacher_samples")
    config, student, teacher, samples, out = _split(values, "", EvaluationConfig(), *names, file="evaluation.json")
    return table(evaluate_student(student or "digits", teacher or "digits", config, out, samples, device))


def _split(values: dict[str, Any], mode: str, config: Any, *names: str, file: str = "") -> list[Any]:
    """A mode's configuration, its arguments ``names`` and the folder of its ``file``; other options are refused."""
    for name in (name for name in values if name not in (*names, "out", *vars(config))):
        option = f"--{name.replace('_', '-')}"
        owner = "likelihood" if name in vars(LikelihoodConfig()) else "solvers"
        raise InputError(f"{option} does not go with --{mode}" if mode else f"{option} goes with --{owner} only")
    if file and "out" not in values:
        raise InputError(f"--out is missing: name a folder for {file}")
    fields = {name: value for name, value in values.items() if name in vars(config)}
    arguments = [values.get(name) for name in (*names, "out")]
    return [overlay(config, fields, f"evaluate --{mode}" if mode else "evaluate"), *arguments]
