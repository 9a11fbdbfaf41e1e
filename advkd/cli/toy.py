"""The command ``advkd toy``: every method and every solver on points of the plane."""

import click

from ..config import overlay
from ..evaluation.toy.run import ToyConfig
from .options import computing, options


@click.command()
@click.option("--out", default="toy", show_default=True, help="Folder for toy.html, toy.json, and the rows' results.")
@options(ToyConfig)
@computing
def toy(out, **values):
    """Write a page of every method and solver on 25 Gaussians and two moons, with exact teachers; killed runs go on."""
    from ..evaluation.toy.run import write_toy

    page = write_toy(overlay(ToyConfig(), values, "toy"), out)
    click.echo(f"the page with the pictures: {page}")
