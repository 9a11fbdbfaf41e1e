"""Configurations: dataclasses from JSON values, and from the texts of a command line."""

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def build_config(config_class: type[Config], values: dict, where: str) -> Config:
    """A dataclass from a dict of JSON values; an unknown key or a wrong type is an :class:`InputError` that names it."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"{where}: unknown key {key!r} (known: {', '.join(fields)})")
        values = {**values, key: _coerced(value, fields[key], where)}
    try:
        return config_class(**values)
    except (TypeError, InputError) as error:
        raise InputError(f"{where}: {error}") from error


def _coerced(value, field, where):
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else value
    if type(value) is not type(default):
        raise InputError(f"{where}: {field.name} must be {type(default).__name__}, got {value!r}")
    return value


def overlay(config: Any, values: dict[str, Any], where: str) -> Any:
    """A configuration with some fields replaced by texts or JSON values; those that are None are left out.

    Raises:
        InputError: an unknown key or an unreadable value, by name.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    changes = {}
    for name, value in values.items():
        if value is None:
            continue
        if name not in fields:
            raise InputError(f"{where}: unknown key {name!r} (known: {', '.join(fields)})")
        changes[name] = read_value(value, getattr(config, name), f"{where}: {name}", fields[name].type)
    return dataclasses.replace(config, **changes)


def read_value(value: Any, default: Any, where: str, kind: Any) -> Any:
    """``value``, a text or a JSON value, as the type of ``default``; ``kind``: the annotation, which tuples are told by.

    A default of None stands for a number that is found otherwise.
    """
    default = 0.0 if default is None else default
    try:
        if isinstance(default, tuple):
            parts = value.split(",") if isinstance(value, str) else value
            item = 0.0 if "float" in str(kind) else 0
            return tuple(_number(part, item) for part in parts if part != "")
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError
            return value
        return value if isinstance(default, str) and isinstance(value, str) else _number(value, default)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} must be {_kind_name(default)}, got {value!r}") from None


def _number(value, default):
    """``value`` (text or JSON) as the number type of ``default``; nothing is rounded."""
    if isinstance(value, bool) or isinstance(default, str):
        raise ValueError
    number = type(default)(value)
    if not isinstance(value, str) and number != value:
        raise ValueError
    return number


def _kind_name(default):
    if isinstance(default, tuple):
        return "comma-separated numbers"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(type(default), "text")


def field_documentation(config_class: type) -> dict[str, str]:
    """The ``Attributes`` of a configuration's docstring and of its bases': one line per field."""
    documentation: dict[str, str] = {}
    for kind in reversed(config_class.__mro__):
        documentation |= _attributes(str(kind.__doc__).partition("Attributes:")[2])
    return documentation


def _attributes(text):
    documentation, name = {}, None
    for line in text.splitlines():
        head, _, said = line.strip().partition(": ")
        if said and all(part.strip().isidentifier() for part in head.split(",")):
            for name in head.split(", "):
                documentation[name] = said
        elif name and line.strip():
            documentation[name] += " " + line.strip()
    return documentation
