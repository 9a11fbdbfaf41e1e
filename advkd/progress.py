"""Progress bars, which need no standard error."""

import sys

from tqdm import tqdm


def progress_bar(*arguments, shown=True, **options):
    """A ``tqdm`` bar on standard error; hidden where ``shown`` is False or :func:`can_be_shown` is."""
    return tqdm(*arguments, disable=not shown or not can_be_shown(), **options)


def can_be_shown():
    """Whether there is a standard error to write to (a daemon, or ``2>&-``, has none)."""
    return sys.stderr is not None
