"""The command ``advkd search-levels``: noise levels of a consistency student's further evaluations."""

import click

from ..config import overlay
from ..evaluation.search_levels import SearchLevelsConfig
from .options import computing, options


@click.command("search-levels")
@click.option("--student", required=True, help="Folder of 'advkd distill consistency', or a hub id.")
@click.option("--out", required=True, help="New folder for the student with its levels, and levels.json.")
@options(SearchLevelsConfig)
@computing
def search_levels(student, out, **values):
    """Choose the levels of multistep consistency sampling by Frechet distance; run again to go on after a kill."""
    from ..evaluation.search_levels import search_levels as search

    result = search(student, overlay(SearchLevelsConfig(), values, "search-levels"), out)
    levels = ", ".join(f"{sigma:.4g}" for sigma in result["sigmas"])
    distance = next(one["distance"] for one in result["candidates"] if one["sigmas"] == result["sigmas"])
    click.echo(f"student in {out}: sigmas {levels}, {result['score']} {distance:.4g}")
