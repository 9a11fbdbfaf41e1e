"""The site: built strictly, looked at by a browser; code, tests, variables, messages and commands that it names exist."""

import ast
import functools
import html
import http.server
import json
import logging
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import advkd
from advkd import ops
from advkd.methods import METHODS, method_class

from ..conftest import ROOT

PAGES = ROOT / "docs" / "pages"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REFERENCE = "\n".join(page.read_text() for page in sorted((PAGES / "api").glob("*.md")))
SHOWN = re.findall(r"^::: advkd\.(\S+)", REFERENCE, re.M)
# Names that the site's configuration hides: the mechanics of loading.
HIDDEN = re.search(r"!\^\(([\w|]+)\)\$", (ROOT / "docs" / "mkdocs.yml").read_text())[1].split("|")
PACKAGE = [path.read_text() for path in sorted((ROOT / "advkd").rglob("*.py"))]


@pytest.fixture(scope="module")
def package():
    griffe = pytest.importorskip("griffe")
    logging.getLogger("griffe").setLevel(logging.CRITICAL)
    return griffe.load("advkd", search_paths=[str(ROOT)], docstring_parser="google")


def public(thing):
    """A module's, class's or function's public names, itself first."""
    yield thing
    if thing.is_module or thing.is_class:
        for name, member in thing.members.items():
            if not name.startswith("_") and not member.is_alias:
                yield from public(member)


def names_in(thing, kind):
    """Names in a section of a docstring."""
    sections = thing.docstring.parse("google") if thing.docstring else []
    return [item.name.lstrip("*") for section in sections if section.kind.value == kind for item in section.value]


def described(thing):
    """True for an attribute with a description, of its own, in its class's docstring, or in that of a base."""
    owner = thing.parent
    if thing.docstring or owner.is_module:
        return bool(thing.docstring)
    if "class-attribute" not in thing.labels and "dataclass" not in owner.labels:
        return True  # what methods set is no field, and not shown
    return any(thing.name in names_in(base, "attributes") for base in (owner, *owner.mro()))


def gaps(thing):
    """Parts that the documentation of a public name lacks."""
    if thing.is_attribute:
        return [] if thing.name in HIDDEN or described(thing) else ["a description"]
    if not thing.docstring:
        return ["a docstring"]
    text, listed = thing.docstring.value, names_in(thing, "parameters")
    if not thing.is_function or "see :class:" in text:
        return []
    wanted = [parameter.name for parameter in thing.parameters if parameter.name not in ("self", "cls")]
    missing = [name for name in wanted if name not in listed and not re.search(rf"``{name}\b", text)]
    return missing + [f"a result that reads {text!r}" for text in results(thing) if "`" in text]


def results(thing):
    """Types of a docstring's results, as the site's parser takes them: a colon may cut one off where none is."""
    sections = thing.docstring.parse("google", returns_multiple_items=False)
    return [
        str(item.annotation) for section in sections if section.kind.value in ("returns", "yields") for item in section.value
    ]


@pytest.mark.parametrize("name", SHOWN)
def test_public_names_are_documented(name, package):
    found = {thing.path: missing for thing in public(package[name]) if (missing := gaps(thing))}
    assert not found


def test_every_public_name_of_the_package_has_a_docstring(package):
    missing = [thing.path for thing in public(package) if not thing.is_attribute and not thing.docstring]
    assert not missing


def test_gaps_are_found(package, tmp_path):
    """The check can fail."""
    import griffe

    (tmp_path / "bare.py").write_text('"""A module."""\n\ndef f(x):\n    """Does."""\n\nclass C:\n    y: int = 0\n\nZ = 1\n')
    module = griffe.load("bare", search_paths=[str(tmp_path)], docstring_parser="google")
    assert {thing.name: gaps(thing) for thing in public(module)} == {
        "bare": [],
        "f": ["x"],
        "C": ["a docstring"],
        "y": ["a description"],
        "Z": ["a description"],
    }


def test_every_export_is_shown(package):
    paths = [f"{advkd._EXPORTS[name]}.{name}" for name in advkd.__all__]
    paths += [f"{getattr(ops, name).__module__}.{name}".removeprefix("advkd.") for name in ops.__all__]
    missing = [path for path in paths if path not in SHOWN and path.rpartition(".")[0] not in SHOWN]
    assert not missing


def test_every_method_with_trajectories_has_a_page():
    sections = ["Idea", "Equations", "Picture", "Command", "Closed-form proof", "Numbers"]
    for name in METHODS:
        kind, page = method_class(name), PAGES / "methods" / f"{name}.md"
        if not kind.distils:
            continue
        assert re.findall(r"^## (.+)$", page.read_text(), re.M) == sections, name
    assert re.findall(r"^## (.+)$", (PAGES / "methods" / "template.md").read_text(), re.M) == sections


def test_the_tests_that_pages_name_exist():
    count = 0
    for page in sorted(PAGES.rglob("*.md")):
        file = None
        for path, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`", page.read_text()):
            if path or test:
                file = (ROOT / path).read_text() if path else file
                assert f"def {test or 'test_'}" in file and (not test or f"def {test}(" in file), f"{page.name}: {path}::{test}"
                count += 1
    assert count > 30


def commands():
    """The command lines of README and site, without what a shell does to them."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(PAGES.rglob("*.md"))):
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            for line in block.splitlines():
                words = shlex.split(line.replace("-m -- advkd.cli", "advkd"), comments=True)
                if "advkd" in words[:4]:
                    yield page.name, words[words.index("advkd") + 1 :]


def complaint(words):
    """Why advkd would not take a command line, or None; nothing is run."""
    import click

    from advkd.cli.distill import DEFAULT
    from advkd.cli.main import main

    command, words = main, list(words)
    context = click.Context(command)
    while isinstance(command, click.Group):
        if command.name == "distill" and (not words or words[0].startswith("-")):
            words = [DEFAULT, *words]
        if not words or (found := command.get_command(context, words[0])) is None:
            return f"no command {' '.join(words[:1])}"
        command, words = found, words[1:]
    try:
        command.make_context(command.name, words)
    except click.exceptions.Exit:
        return None  # --help
    except click.UsageError as error:
        return error.format_message()


def test_command_lines_of_the_pages_are_understood():
    found = [(page, words) for page, words in commands() if words]
    assert len(found) > 40
    assert not [(page, words, why) for page, words in found if (why := complaint(words))]
    # The check can fail.
    wrong = (["distill", "adv-kd", "--nonsense", "3"], ["distill", "--nonsense"], ["trajectores"], ["sample", "-n", "many"])
    assert all(map(complaint, wrong))


SMALLER = {
    "--steps 20000": "--steps 3",
    "--num 11000": "--num 32",
    "--size 64": "--size 16",
    "--critic-levels 12": "--critic-levels 12 --updates 2 --batch-sizes 4",
    "--out features": "--out features --steps 20",
    "--extractor features": "--extractor features --num 260 --resamples 20",
    "-n 64": "-n 4",
}
"""Sizes of the page that take hours, and sizes that take seconds."""


@pytest.mark.kernels
def test_getting_started_runs(tmp_path):
    """Its commands, one after the other, on a folder of pictures of several sizes."""
    draw = np.random.default_rng(0)
    for kind in ("a", "b"):
        for i in range(40):
            folder = tmp_path / "my-images-by-class" / kind
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "my-images").symlink_to("my-images-by-class")
    page = (PAGES / "getting-started.md").read_text().partition("## From then on")[0]
    lines = [
        line.strip() for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines() if line.strip()
    ]
    assert len(lines) == 10 and lines[0] == "pip install ."
    for line in lines[1:]:
        for whole, part in SMALLER.items():
            line = line.replace(whole, part)
        line = line.replace('"image_size": 64', '"image_size": 16').replace("128", "8").replace("48", "8").replace("32]", "8]")
        environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert (tmp_path / "samples.png").exists() and (tmp_path / "report" / "report.html").exists()


def texts_of(tree):
    """String literals of a module without docstrings, those of an f-string's parts joined."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_messages_in_the_table_of_errors_are_raised():
    table = (PAGES / "errors.md").read_text().partition("| message contains |")[2].partition("## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    texts = [text for source in PACKAGE for text in texts_of(ast.parse(source))]
    assert len(messages) > 10
    assert not [message for message in messages if not any(message in text for text in texts)]


def test_every_variable_is_explained():
    read = r"""(?:environ\.get\(|environ\[|getenv\()["'](ADVKD_\w+)"""
    texts = [
        *PACKAGE,
        (ROOT / "setup.py").read_text(),
        *(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.[ch]*"))),
    ]
    used = {name for text in texts for name in re.findall(read, text)} | {"ADVKD_CPU", "ADVKD_CUDA"}
    explained = set(re.findall(r"^\| `(ADVKD_\w+)`", (PAGES / "environment.md").read_text(), re.M))
    assert used == explained


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built without a warning."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "docs" / "mkdocs.yml"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([*command, "--site-dir", folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


class _Site(http.server.SimpleHTTPRequestHandler):
    """Serves the site, and takes what the browser posts."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.server.found.put(json.loads(body))

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Site, directory=site))
    server.found = queue.Queue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_links_lead_somewhere(site):
    """Every internal link and anchor of every page, as a browser resolves them."""
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="?([^"\s>]+)', text)) for path, text in pages.items()}
    count = 0
    for path, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            target, _, anchor = html.unescape(link).partition("#")
            if re.match(r"[a-z]+:|/", target) or path.name == "404.html":
                continue
            place = (path.parent / target.partition("?")[0]).resolve() if target else path
            place = place / "index.html" if place.is_dir() else place
            assert place.exists(), f"{path.relative_to(site)}: {link}"
            assert not anchor or place not in anchors or anchor in anchors[place], f"{path.relative_to(site)}: {link}"
            count += 1
    assert count > 1000


@pytest.mark.kernels
@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_a_browser_shows_every_page(site, served, tmp_path):
    """At 400 and 1400 pixels: no error in the console, nothing from elsewhere, no sideways scrolling; the search finds."""
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html")
    planted = '<article style="width: 3000px">' + "word " * 30 + "|---|" + '<img src="planted.png"></article>'
    (site / "planted.html").write_text(f"<title>planted</title>{planted}<script>console.error('planted')</script>")
    (site / "pages.json").write_text(json.dumps({"pages": [*pages, "planted.html"], "widths": [400, 1400]}))
    shutil.copy(ROOT / "tests" / "system" / "site_harness.html", site / "harness.html")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path}", "--enable-logging=stderr", f"http://127.0.0.1:{served.server_port}/harness.html"]
    with open(tmp_path / "console", "w+") as console:
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=console)
        try:
            found = served.found.get(timeout=240)
        finally:
            browser.terminate()
            browser.wait(30)
        console.seek(0)
        complaints = re.findall(r".*CONSOLE.*", console.read())
    # Faults planted on one page are seen, and no others are there.
    assert complaints and all("planted" in line for line in complaints), complaints
    faults = [found["pages"].pop() for _ in range(2)]
    assert all(seen["broken"] and seen["overflow"] > 0 and seen["raw"] for seen in faults)
    assert len(found["pages"]) == 2 * len(pages) > 50
    for seen in found["pages"]:
        assert seen["title"] and seen["words"] > 20, seen
        assert not seen["broken"] and not seen["foreign"] and seen["overflow"] <= 0 and not seen["raw"], seen
    hits = found["search"]
    assert any("penalty" in hit["text"].lower() for hit in hits[:3]), hits
    assert all(hit["path"].lstrip("/") in pages for hit in hits), hits
