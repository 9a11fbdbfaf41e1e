"""Files of the site that lie outside of ``docs/pages``, and links between the two; formulas as MathML."""

import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT, PAGES = DOCS.parent, DOCS / "pages"
CARDS = sorted(ROOT.glob("advkd/pretrained/*/README.md"))
CARD_PAGES = {f"models/{card.parent.name}.md": card.relative_to(ROOT).as_posix() for card in CARDS}
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md", **CARD_PAGES}
"""Page -> the file of the repository that is shown as it stands."""
RESULTS = ("profiling/results/*/*.json", "profiling/results/*/*.png", "profiling/results/*.json", "profiling/limits/*.json")
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^][]*\])*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r"^```math\n(?P<block>.*?)^```$|(?P<code>^```.*?^```$|`[^`\n]+`)|\$(?P<inline>[^$`\n]+)\$", re.M | re.S)
NO_DEFAULT = re.compile("<code>Sentinel.UNSET</code>|(?<=<td>)None(?=</td>)")
"""Defaults of options as mkdocs-click writes them that have none, or name it in their text."""


def on_files(files, config):
    """Add results, their plots, and pages that lie in the repository's root."""
    for page, source in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for pattern in RESULTS:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, files, **_):
    """Links to files of the repository, as the site has them: those that it lacks become text."""
    source = ROOT / FROM_ROOT[page.file.src_uri] if page.file.src_uri in FROM_ROOT else PAGES / page.file.src_uri
    shown = {(ROOT / path).resolve(): uri for uri, path in FROM_ROOT.items()}

    def placed(match):
        kind, text, target, anchor = match.groups()
        path = (source.parent / target).resolve()
        root = PAGES if path.is_relative_to(PAGES) else ROOT
        uri = shown.get(path) or (path.relative_to(root).as_posix() if path.is_relative_to(root) else "")
        if files.get_file_from_path(uri) is None:
            # A page that is missing stays a link, which the strict build refuses.
            return text if path.exists() and root is ROOT else match[0]
        return f"{kind}[{text}]({os.path.relpath(uri, os.path.dirname(page.file.src_uri) or '.')}{anchor or ''})"

    return FORMULA.sub(_formula, LINK.sub(placed, markdown))


def _formula(match):
    if match["code"]:
        return match[0]
    return convert((match["block"] or match["inline"]).strip(), display="block" if match["block"] else "inline")


def on_page_content(html, page, **_):
    """The cell of a default that is not there is empty."""
    return NO_DEFAULT.sub("", html) if page.file.src_uri == "cli.md" else html
