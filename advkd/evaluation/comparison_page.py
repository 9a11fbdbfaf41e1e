"""The table of a comparison as text, Markdown and one self-contained HTML page, with pictures of every row."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.images import normalize
from ..data.pictures import save_grid
from ..data.plots import COLOURS, panels
from ..runtime.files import write_bytes
from .decoded import DECODED
from .evaluate import aligned
from .html_page import figure, provenance_of, self_contained, table_of

PICTURES = 10
"""Start noises that every row shows."""


def cells(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows as texts, titles first.

    Args:
        result: of :func:`advkd.evaluation.compare.compare_models`.

    Returns:
        A list of texts for the titles and for every row.
    """
    reference = f"unipc-2, {result['config']['fine_steps']} steps"
    titles = ["row", "method", "parameters", "evaluations", "N", f"{result['score']} to real images", "at infinity"]
    titles += [f"less {result['baseline']}", "precision", "recall", f"{result['score']} to {reference}", "at infinity"]
    titles += [f"x floor at {_halves(result)}", "ms an image", "training: forward / backward"]
    return [titles, *(_cells(row) for row in result["rows"]), *_decoder_cells(result, len(titles))]


def _decoder_cells(result, columns):
    """Row of a latent teacher's decoder, its figures alone."""
    if (row := result.get("decoder")) is None:
        return []
    facts = [DECODED, "autoencoder", f"{row['parameters']:,}", "", f"{row['num']:,}"]
    told = [*facts, said(row["frechet"], 3), said(row["at_infinity"], 3)]
    return [told + [""] * (columns - len(told))]


def _halves(result):
    """Numbers of images at which rows are measured in units of the floor."""
    one_length = len(result.get("floors", ())) < 2
    return f"N = {result['floor_num']:,}" if one_length else "half of N"


def _cells(row):
    real, fine, several = row["real"], row["fine"], len(row["trainings"]) > 1
    facts = [row["name"], row["method"], f"{row['parameters']:,}", str(row["evaluations"]), f"{row['num']:,}"]
    against_real = [
        said(real["frechet"], 3, several),
        said(real["at_infinity"], 3, several),
        said(real["difference"], 3, sign="+"),
    ]
    shares = [said(real[name], 3, several) for name in ("precision", "recall")]
    against_fine = [said(fine[name], 3, several) for name in ("frechet", "at_infinity")]
    return [*facts, *against_real, *shares, *against_fine, said(fine["times_floor"], 2, several), time_of(row), cost_of(row)]


def said(one: dict[str, Any], digits: int, several: bool = False, sign: str = "") -> str:
    """A figure with its 95 % interval and, of several trainings, their spread.

    Args:
        one: ``value``, and where there are any ``interval`` and ``spread``.
        digits: behind the point.
        several: say the spread.
        sign: ``+`` for differences.

    Returns:
        ``value (low to high) [least to most]``.
    """
    form = f"{sign}.{digits}f"
    parts = [f"{one['value']:{form}}"]
    if "interval" in one:
        parts.append("({:{form}} to {:{form}})".format(*one["interval"], form=form))
    if several:
        parts.append("[{:{form}} to {:{form}}]".format(*one["spread"], form=form))
    return " ".join(parts)


def time_of(row: dict[str, Any]) -> str:
    """Milliseconds an image of a row, with their 20th and 80th percentiles."""
    median, p20, p80 = (1e3 * row["seconds"][name] for name in ("median", "p20", "p80"))
    return f"{median:.3g} ({p20:.3g} to {p80:.3g})"


def cost_of(row: dict[str, Any]) -> str:
    """Training cost of a row in network evaluations."""
    return "not recorded" if row["cost"] is None else " / ".join(f"{row['cost'][n]:,.0f}" for n in ("forward", "backward"))


def describe(result: dict[str, Any]) -> str:
    """A result as lines of text, the best at real images first.

    Args:
        result: of :func:`advkd.evaluation.compare.compare_models`.

    Returns:
        A line for every row under one of titles.
    """
    table = [["row", "evaluations", result["score"], "at infinity", f"less {result['baseline']}", "ms an image"]]
    for row in sorted(result["rows"], key=lambda row: row["real"]["at_infinity"]["value"]):
        real = row["real"]
        figures = [f"{real[name]['value']:.3f}" for name in ("frechet", "at_infinity")]
        table.append([row["name"], str(row["evaluations"]), *figures, said(real["difference"], 3, sign="+"), time_of(row)])
    if (row := result.get("decoder")) is not None:
        table.append([DECODED, "", *(f"{row[name]['value']:.3f}" for name in ("frechet", "at_infinity")), "", ""])
    return "\n".join(aligned(table))


def reading(result: dict[str, Any]) -> str:
    """How the table is to be read, in a paragraph.

    Args:
        result: of :func:`advkd.evaluation.compare.compare_models`.
    """
    several = any(len(row["trainings"]) > 1 for row in result["rows"])
    spread = " A row of several trainings has their median, and in brackets the least and the most." if several else ""
    score, (first, *others) = result["score"], result.get("floors", [{"half": result["floor_num"], "value": result["floor"]}])
    floors = f"{first['value']:.4f}" + "".join(f" ({one['value']:.4f} where N is {one['num']:,})" for one in others)
    shared = " Two rows of different N are compared by the first images of the longer one." if others else ""
    that = "an equally large part" if others else "a half"
    half = "half of a row's images" if others else f"{first['half']:,} images"
    halves = f" The row of {DECODED} has one half of them, encoded and decoded, against the other."
    decoded = halves if "decoder" in result else ""
    return (
        f"All rows begin at the same start noise. {score} is a Frechet distance; smaller is better, and at infinity it is "
        "without the bias of N. Parentheses hold 95 % intervals of a bootstrap that draws the same images of all rows, so that "
        f"differences have intervals of their own.{shared}{spread} The floor, {floors}, is the mean distance of random "
        f"halves of the fine-step reference; x floor is the distance of {half} to {that} of it. Times are medians of "
        f"batches of {result['batch_size']}, all rows in turn, with their 20th and 80th percentiles. Training cost counts "
        f"evaluations of teachers, students and score networks, not of critics and classifiers."
        f"{decoded}{told(result)}{unknown(result)}"
    )


def told(result: dict[str, Any]) -> str:
    """Sentences about the classes of rows; empty where all models are unconditional.

    Args:
        result: of :func:`advkd.evaluation.compare.compare_models`.
    """
    names: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["classes"] is not None:
            taken = f"classes in turn, {', '.join(row['classes'])}" if row["classes"] else "no class"
            weight = row["guidance"]
            guided = "guidance distilled in" if weight is None else f"weight {weight:g} of guidance"
            names.setdefault(f" with {taken}, and {guided}", []).append(row["name"])
    drawn = "".join(f" Rows drawn{how}: {', '.join(rows)}." for how, rows in names.items())
    others = any(row["classes"] is None for row in result["rows"])
    return drawn + (" All other rows are of unconditional models." if drawn and others else "")


def unknown(result: dict[str, Any]) -> str:
    """Sentence about students without a training record; empty where there are none.

    Args:
        result: of :func:`advkd.evaluation.compare.compare_models`.
    """
    rows = [row["name"] for row in result["rows"] if row.get("known_unseen", True) is None]
    return f" No record says if these were trained on the sets' start noise: {', '.join(rows)}." if rows else ""


def markdown(result: dict[str, Any]) -> str:
    """The table as Markdown.

    Args:
        result: of :func:`advkd.evaluation.compare.compare_models`.

    Returns:
        The table and how to read it.
    """
    titles, *rows = ([cell.replace("|", "\\|") for cell in row] for row in cells(result))
    lines = ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]
    return "\n".join([*lines, "", reading(result), ""])


def write_pages(result: dict[str, Any], pictures: dict[str, torch.Tensor], out: Path) -> None:
    """Write ``comparison.md`` and ``comparison.html``, and the PNGs that it holds; pictures of an earlier one go.

    Args:
        result: of :func:`advkd.evaluation.compare.compare_models`.
        pictures: the first images of every row, uint8 ``(n, C, H, W)``, by its name.
        out: folder that is there.
    """
    for earlier in out.glob("pictures-[0-9]*.png"):
        earlier.unlink()
    write_bytes(out / "comparison.md", markdown(result).encode())
    save_distances(result["rows"], result["score"], out / "distances.png")
    titles, *rows = cells(result)
    body = [table_of(titles, rows), f"<p>{html.escape(reading(result))}</p>"]
    body += [figure(out / "distances.png", "Distance to real images by network evaluations, with 95 % intervals.")]
    body += ["<h2>The same start noises</h2>"]
    for i, row in enumerate(result["rows"], 1):
        path, images = out / f"pictures-{i:02d}.png", pictures[row["name"]]
        save_grid(normalize(images), path, columns=len(images))
        body.append(figure(path, f"{row['name']}: {row['method']}, network evaluations: {row['evaluations']}"))
    body += ["<h2>Where this was measured</h2>", provenance_of(result)]
    write_bytes(out / "comparison.html", self_contained("Students and solvers", body).encode())


def save_distances(rows: Sequence[dict[str, Any]], score: str, path: str | Path) -> None:
    """Plot the distance to real images against network evaluations.

    Args:
        rows: of a comparison.
        score: name of the distance.
        path: picture to write.
    """
    from matplotlib.ticker import LogLocator

    methods = list(dict.fromkeys((row["kind"], row["method"]) for row in rows))
    with panels(path, 4.6) as (axis,):
        for i, (kind, method) in enumerate(methods):
            own = sorted((row for row in rows if (row["kind"], row["method"]) == (kind, method)), key=_evaluations)
            _curve(axis, own, method, COLOURS[i % len(COLOURS)])
        axis.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel=f"{score} to real images")
        axis.set_xticks(sorted({_evaluations(row) for row in rows}))
        axis.get_xaxis().set_major_formatter("{x:.0f}")
        axis.get_yaxis().set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.get_yaxis().set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.legend()


def _evaluations(row):
    return row["evaluations"]


def _curve(axis, rows, method, colour):
    """Points of one method, joined where each has evaluations of its own."""
    x = [_evaluations(row) for row in rows]
    y, intervals = zip(*((row["real"]["frechet"]["value"], row["real"]["frechet"]["interval"]) for row in rows), strict=True)
    ends = [[max(0.0, value - low), max(0.0, high - value)] for value, (low, high) in zip(y, intervals, strict=True)]
    shape = ("o", "--") if rows[0]["kind"] == "solver" else ("s", "-")
    line = shape[1] if len(set(x)) == len(x) else "none"
    axis.errorbar(x, y, list(zip(*ends, strict=True)), marker=shape[0], linestyle=line, color=colour, capsize=2, label=method)
