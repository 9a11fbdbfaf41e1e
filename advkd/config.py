"""Configurations: dataclasses from JSON values."""

import dataclasses
from typing import TypeVar

from .errors import InputError

Config = TypeVar("Config")


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
