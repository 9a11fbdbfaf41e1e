"""The command ``advkd compare``: students and solvers in one table."""

import click

from ..config import overlay
from ..evaluation.compare import CompareConfig
from .options import computing, device_option, options


@click.command()
@click.option("--teacher", default="digits", show_default=True, help="'digits', 'glyphs', a folder or a hub id.")
@click.option("--out", required=True, help="Folder for comparison.json, comparison.md and comparison.html.")
@device_option
@options(CompareConfig)
@computing
def compare(teacher, out, device, **values):
    """Compare students and the teacher's solvers: distances, times and training costs in one table; killed runs go on."""
    from ..evaluation.compare import compare_models
    from ..evaluation.comparison_page import describe

    click.echo(describe(compare_models(teacher, overlay(CompareConfig(), values, "compare"), out, device)))
