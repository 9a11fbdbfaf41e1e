"""Plots of results."""

import contextlib

from advkd.runtime.files import replacing


@contextlib.contextmanager
def panels(*paths, size, count=1, **options):
    """Panels side by side, written at the end of the block.

    Args:
        paths: files of the figure, each in the format of its ending and whole at any time.
        size: of the figure, in inches.
        count: panels.
        options: as :func:`matplotlib.pyplot.subplots` takes them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, found = pyplot.subplots(1, count, figsize=size, constrained_layout=True, squeeze=False, **options)
    yield found[0]
    for path in paths:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110, format=path.suffix[1:])
    pyplot.close(figure)
