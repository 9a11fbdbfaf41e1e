"""Progress bars that survive a closed standard error."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*arguments: Any, shown: bool = True, **options: Any) -> tqdm:
    """A ``tqdm`` bar on standard error; hidden where ``shown`` or :func:`can_be_shown` is False.

    Output that cannot be written is dropped: work goes on after its terminal has gone.
    """
    if not shown or not can_be_shown():
        return tqdm(*arguments, disable=True, **options)
    return tqdm(*arguments, file=_Tolerant(sys.stderr), **options)


def can_be_shown() -> bool:
    """True if standard error can be written to; a daemon's is missing, closed, or a pipe without a reader."""
    try:
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        return False
    return True


class _Tolerant:
    """A stream that ignores failures to write."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        self._try("write", text)

    def flush(self):
        self._try("flush")

    def _try(self, name, *arguments):
        try:
            getattr(self._stream, name)(*arguments)
        except (OSError, ValueError):
            pass

    def __getattr__(self, name):
        return getattr(self._stream, name)
