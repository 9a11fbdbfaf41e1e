"""Parts of self-contained HTML pages: the frame, tables and figures."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STYLE = """
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: #1c2330; background: #fff; }
main { max-width: 1880px; margin: 0 auto; padding: 24px; } p { max-width: 90ch; }
h1 { font-size: 26px; } h2 { font-size: 19px; margin-top: 36px; }
figure { margin: 24px 0; } img { max-width: 100%; display: block; }
figcaption { color: #566; font-size: 13px; margin-top: 6px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #e3e6ea; vertical-align: top; }
th { color: #566; font-weight: 600; }
"""


def self_contained(title: str, body: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: text of its heading.
        body: HTML parts below the heading.

    Returns:
        HTML that needs no other file.
    """
    text = html.escape(title)
    joined = "\n".join([f"<h1>{text}</h1>", *body])
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{text}</title><style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body><main>\n{joined}\n</main></body></html>\n"


def table_of(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts.

    Args:
        titles: of the columns.
        rows: cells of every row.

    Returns:
        HTML; the texts are escaped.
    """
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def figure(path: str | Path, caption: str) -> str:
    """A PNG within the page.

    Args:
        path: file of the PNG.
        caption: line below it.

    Returns:
        HTML; the caption is escaped.
    """
    data = base64.b64encode(Path(path).read_bytes()).decode()
    caption = html.escape(caption)
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def provenance_of(result: dict[str, Any]) -> str:
    """Where a result was measured, and with which options.

    Args:
        result: with ``provenance`` and ``config``.

    Returns:
        HTML of a table.
    """
    known = {k: v for k, v in result["provenance"].items() if v is not None and not isinstance(v, dict)}
    known |= {k: v for k, v in result["provenance"]["versions"].items() if v}
    known |= {f"option {k}": v for k, v in result["config"].items() if v != ""}
    return table_of(("", ""), [[str(k), str(v)] for k, v in known.items()])
