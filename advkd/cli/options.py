"""Parts that commands share: options made of a configuration's fields, the device, fair sharing of the processors."""

import dataclasses
import functools
from collections.abc import Callable

import click

from ..config import field_documentation

device_option = click.option("--device", default="cpu", show_default=True, help="torch device: cpu, cuda, cuda:1, ...")


def computing(command: Callable) -> Callable:
    """Decorator of a command that computes: it shares the processors with others (:func:`advkd.runtime.neighbours.sharing`)."""

    @functools.wraps(command)
    def run(*arguments, **options):
        from ..runtime.neighbours import sharing

        with sharing():
            return command(*arguments, **options)

    return run


def options(config_class: type, rename: dict[str, str] | None = None) -> Callable:
    """Decorator that adds an option for every field of a configuration dataclass; unset ones are None.

    ``rename`` gives fields other names on the command line.
    """

    def decorate(command):
        documentation = field_documentation(config_class)
        for field in reversed(dataclasses.fields(config_class)):
            text = documentation.get(field.name, "") + _default(field)
            name = (rename or {}).get(field.name, field.name)
            command = click.option(*_declaration(name, field.default), default=None, help=text)(command)
        return command

    return decorate


def only(config_class: type, *names: str, of: str) -> Callable:
    """Decorator that adds an option for some fields of a configuration dataclass, which go with the option ``of`` alone."""

    def decorate(command):
        documentation = field_documentation(config_class)
        for field in reversed([field for field in dataclasses.fields(config_class) if field.name in names]):
            text = f"With {of}: {documentation[field.name]}{_default(field)}"
            command = click.option(*_declaration(field.name, field.default), default=None, help=text)(command)
        return command

    return decorate


def _default(field):
    """Sentence with the field's default, for the help; nothing where it is empty or computed."""
    value = field.default
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif isinstance(value, tuple):
        value = ",".join(map(str, value))
    return "" if value is dataclasses.MISSING or value in ("", None, float("inf")) else f" Default: {value}."


def _declaration(name, default):
    option = "--" + name.replace("_", "-")
    if isinstance(default, bool):
        return [f"{option}/--no-{option[2:]}", name]
    return [option, name]
