"""The sources of ``csrc/`` that Python reads: the numbers that the languages share, and what CuPy compiles."""

import re
from pathlib import Path


def folder() -> Path:
    """The folder ``csrc``: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def _streams():
    """``enum PhiloxStream`` of ``csrc/common/philox.h``."""
    text = (folder() / "common/philox.h").read_text()
    body = text.partition("enum class PhiloxStream")[2].partition("}")[0]
    return {name: int(code) for name, code in re.findall(r"(\w+) = (\d+)", body)}


STREAMS = _streams()
"""Purpose of random numbers -> its code in Philox' counter; streams never share a counter."""
