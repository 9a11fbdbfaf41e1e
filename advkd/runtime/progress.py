"""Progress bars, which need no standard error."""

import sys

from tqdm import tqdm


def progress_bar(*arguments, shown=True, **options):
    """A ``tqdm`` bar on standard error; hidden where ``shown`` is False or :func:`can_be_shown` is.

    Output that cannot be written is lost: no work ends because a terminal has gone.
    """
    if not shown or not can_be_shown():
        return tqdm(*arguments, disable=True, **options)
    return tqdm(*arguments, file=_Tolerant(sys.stderr), **options)


def can_be_shown():
    """True if there is a standard error to write to: a daemon has none, or a closed one, or a pipe without a reader."""
    try:
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        return False
    return True


class _Tolerant:
    """A stream whose failures to write are passed over."""

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
