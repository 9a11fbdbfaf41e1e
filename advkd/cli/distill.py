"""``advkd distill``: one subcommand a method, made of its configuration."""

import tomllib
from dataclasses import replace
from inspect import cleandoc
from pathlib import Path

import click

from ..config import build_config, overlay, read_value
from ..errors import InputError
from ..methods import METHODS, method_class
from ..runtime.files import parse_json, require_regular, why_unreadable
from ..runtime.launcher import local_device
from .options import computing, device_option, options

CONFIG_LIMIT = 2**13
"""Bytes that --config may have: the memory of TOML's dotted keys grows with the square of their length."""

DEFAULT = "adv-kd"
"""Method of a command that names none."""


class _Methods(click.Group):
    """One subcommand a method; options that come without a name are those of :data:`DEFAULT`."""

    def list_commands(self, context):
        return [name for name in METHODS if method_class(name).distils]

    def get_command(self, context, name):
        return method_command(name) if name in self.list_commands(context) else None

    def parse_args(self, context, arguments):
        if arguments and arguments[0].startswith("-") and arguments[0] != "--help":
            arguments = [DEFAULT, *arguments]
        return super().parse_args(context, arguments)


@click.group(cls=_Methods, invoke_without_command=True)
@click.pass_context
def distill(context):
    """Train a student by a method; without one, list the methods and what each needs.

    Options without a method are those of adv-kd: see 'advkd distill adv-kd --help'.
    """
    if context.invoked_subcommand is None:
        for name in context.command.list_commands(context):
            kind = method_class(name)
            click.echo(f"{name}: {kind.reference}\n    needs {kind.requires}")


def method_command(name: str) -> click.Command:
    """The subcommand of a method, with an option for each of its configuration's fields."""
    kind = method_class(name)

    @click.command(name, help=f"{cleandoc(str(kind.__doc__)).partition('Args:')[0].strip()}\n\nReference: {kind.reference}.")
    @_inputs(kind)
    @click.option("--out", required=True, help="Folder for the result, checkpoint, metrics and samples.")
    @click.option("--config", "config_file", help="JSON or TOML file with fields of the recipe; options override it.")
    @click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
    @device_option
    @options(kind.Config)
    @computing
    def command(out, config_file, resume, device, **values):
        import torch

        from ..runtime.devices import require_device

        inputs = {key: values.pop(key, None) for key in ("trajectories", "data", "teacher", "preset", "init", "channels")}
        config = _configuration(kind, config_file, values)
        device = local_device(device)
        require_device(device)
        torch.manual_seed(config.seed % 2**63)
        if kind.students == ("images",):
            _optimise(config, inputs, out, resume, device)
            return
        student = _start(kind, inputs, config, device)
        _run(kind, student, config, inputs, out, resume, device)
        click.echo(f"student saved in {out}")

    return command


def _inputs(kind):
    """Decorator with the options that name where a method's student begins and what it learns from."""
    from ..models.shape import PRESETS

    generator, denoiser = "generator" in kind.students, "denoiser" in kind.students
    starts = ["a student ('digits', 'glyphs')"] * generator + ["a teacher ('digits-conditional', 'glyphs-teacher')"] * denoiser
    only_generator = generator and not denoiser
    teacher = (
        "The trajectories' teacher, which --grow needs." if only_generator else "'digits', 'glyphs', a folder or a hub id."
    )
    known = [
        ("trajectories" in kind.inputs, "--trajectories", "Folder of 'advkd trajectories' (several: repeat).", True),
        (
            "data" in kind.inputs,
            "--data",
            "Images: 'digits', 'glyphs' or a folder (with labels: of one folder a class).",
            False,
        ),
        ("teacher" in kind.inputs, "--teacher", teacher, False),
        (generator, "--preset", f"{', '.join(PRESETS)}, or a JSON file with a student's configuration.", False),
        (
            generator or denoiser,
            "--init",
            f"Start from {' or '.join(starts)}, a folder or a hub id, instead of {_instead(generator, denoiser)}.",
            False,
        ),
        (
            denoiser,
            "--channels",
            "Channels of a fresh denoiser student, from the highest resolution on, 16,32,64 say.",
            False,
        ),
    ]

    def decorate(command):
        for there, option, text, multiple in reversed(known):
            if there:
                command = click.option(option, multiple=multiple, help=text)(command)
        return command

    return decorate


def _instead(generator, denoiser):
    fresh = ["a preset's fresh weights"] * generator + ["a copy of the teacher"] * denoiser
    return " or ".join(fresh)


def _start(kind, inputs, config, device):
    """The student with which training begins: a generator or a denoiser."""
    preset, init, channels = inputs["preset"], inputs["init"], inputs["channels"]
    if kind.students == ("generator",):
        return _build_student(preset, init, inputs)
    from ..diffusion.denoiser_student import DenoiserStudent
    from ..diffusion.students import load_start
    from ..diffusion.teacher import Teacher

    widths = tuple(read_value(channels or "", (0,), "distill: --channels", "int"))
    if widths and (preset is not None or init is not None):
        raise InputError("--channels are of a fresh denoiser student: leave --preset and --init out")
    if preset is not None:
        return _build_student(preset, init, inputs)
    if init is not None:
        student = load_start(init, device)
        if not isinstance(student, DenoiserStudent) and "generator" not in kind.students:
            raise InputError(f"--init {init}: {kind.name} trains a denoiser student, and this one draws in one pass")
        return student
    if inputs["teacher"] is None and widths and inputs["data"] is not None:
        from ..training.denoiser_data import fresh_student

        return fresh_student(inputs["data"], widths, device)
    if inputs["teacher"] is None:
        raise InputError(
            "name a student to start from by --init, or a --teacher whose network is copied, or --channels and --data"
        )
    return DenoiserStudent.from_teacher(Teacher.from_pretrained(inputs["teacher"], device), widths)


def _run(kind, student, config, inputs, out, resume, device):
    """Train, by the runner of the student's kind."""
    from ..diffusion.teacher import Teacher
    from ..models.student import Student

    named = inputs["teacher"]
    if not isinstance(student, Student):
        from ..training.denoisers import distill_denoiser

        teacher = Teacher.from_pretrained(named, device) if named and kind.calls_teacher(config) else None
        if named and teacher is None and inputs["init"] is not None:
            raise InputError(
                f"--teacher: {kind.name} does not call one with these options, and --init names the start: leave it out"
            )
        folders, data = inputs["trajectories"] or None, inputs["data"]
        sources = {"teacher": teacher, "data": data, "trajectories": folders}
        distill_denoiser(kind.name, config, student, out, **sources, resume=resume, device=device)
        return
    from ..training.distillation import distill as run

    calls = kind.calls_teacher(config)
    if named and not calls and not config.grow:
        raise InputError("--teacher is for --grow: the trajectories hold what the teacher drew")
    if not inputs["trajectories"] and not calls:
        raise InputError("name recorded trajectories by --trajectories")
    teacher = Teacher.from_pretrained(named, device) if named else None
    folders, images = inputs["trajectories"] or None, inputs["data"]
    run(folders, student, config, out, resume, device, teacher=teacher, method=kind.name, images=images)


def _optimise(config, inputs, out, resume, device):
    """Optimise images, of a method that trains no student."""
    from ..diffusion.teacher import Teacher
    from ..training.optimised_images import optimise_images

    if inputs["teacher"] is None:
        raise InputError("name the teacher whose score moves the images by --teacher")
    teacher = Teacher.from_pretrained(inputs["teacher"], device)
    optimise_images(config, teacher, out, data=inputs["data"], resume=resume, device=device)
    click.echo(f"images saved in {out}")


def _configuration(kind, config_file, values):
    """Fields of a recipe, overridden by the file and then by options."""
    from_file = _read_config(config_file) if config_file else {}
    config = kind.Config()
    if kind.recipes:
        in_file = from_file.pop("recipe", next(iter(kind.recipes)))
        name = values.pop("recipe", None) or in_file
        if not isinstance(name, str) or name not in kind.recipes:
            raise InputError(f"--recipe must be one of {', '.join(kind.recipes)}, got {name!r}")
        config = kind.recipes[name]
    return overlay(overlay(config, from_file, f"--config {config_file}"), values, "distill")


def _read_config(path):
    """A JSON or TOML file as a dict."""
    path = Path(path)
    require_regular(path, "--config", CONFIG_LIMIT)
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else parse_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config {path} is not readable JSON or TOML ({why_unreadable(path, error)})") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path} must hold an object of fields")
    return values


def _build_student(preset, init, inputs):
    """A student to start from: a loaded one, or a fresh one of a preset's shape with the classes of what it learns from."""
    from ..models.shape import PRESETS, StudentConfig
    from ..models.student import Student
    from ..runtime.files import read_json

    if (preset is None) == (init is None):
        raise InputError("name either a --preset or a student to start from by --init")
    if init is not None:
        return Student.from_pretrained(init)
    if preset not in PRESETS and not preset.endswith(".json"):
        raise InputError(f"--preset must be one of {', '.join(PRESETS)} or a JSON file, got {preset!r}")
    config = PRESETS.get(preset)
    if config is None:
        values = {k: v for k, v in read_json(preset, "--preset").items() if not k.startswith("_")}
        config = build_config(StudentConfig, values, f"--preset {preset}")
    return Student(config if config.classes else replace(config, classes=_classes(inputs)))


def _classes(inputs):
    """Names of the classes of the first recording, or without one of the teacher; none where neither has any."""
    from ..data.trajectories import Trajectories
    from ..diffusion.teacher import Teacher

    if inputs["trajectories"]:
        return Trajectories(inputs["trajectories"][0]).info.student_classes
    return Teacher.from_pretrained(inputs["teacher"]).class_names if inputs["teacher"] else ()
