"""The README: short, and its Python runs; the site's Python runs; sizes of the students agree with the code."""

import re
from dataclasses import replace

import pytest
import torch

from advkd import Student, Teacher
from advkd.data.glyphs import CLASSES
from advkd.models.shape import PRESETS

from ..conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = ROOT / "docs" / "pages"
MODELS = (PAGES / "models.md").read_text().partition("## Sizes")[2]


def python_of(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_it_is_short():
    assert len(README.splitlines()) <= 200
    (example,) = python_of(README)
    assert len(example.splitlines()) <= 25
    speed = README.partition("<!-- table: speed -->")[2].partition("<!-- end -->")[0]
    assert len(speed.strip().splitlines()) <= 2 + 8
    quality = README.partition("<!-- table: quality -->")[2].partition("<!-- end -->")[0]
    assert len(quality.strip().splitlines()) == 2 + 3
    commands = README.partition("## From the command line")[2].partition("```sh\n")[2].partition("```")[0]
    assert len(commands.strip().splitlines()) == 6


@pytest.mark.parametrize("preset", ["paper-256", "pyramid-256", "digits", "glyphs"])
def test_sizes_of_the_students(preset):
    classes = tuple(CLASSES["all"]) if preset == "glyphs" else ()
    student = Student(replace(PRESETS[preset], classes=classes))
    row = next(line for line in MODELS.splitlines() if line.startswith(f"| `{preset}`"))
    small, full = (student.num_parameters(terminals) for terminals in (False, True))
    expected = [f"{small:,}", f"{full:,}", f"{4 * small / 1e6:.1f} MB", f"{4 * full / 1e6:.1f} MB", "1"]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == expected


def test_size_of_the_embedded_teacher():
    assert f"| {Teacher.from_pretrained('digits').num_parameters():,} |" in MODELS


def test_every_shipped_weight_file_has_a_card():
    """And the page of models names every card."""
    pretrained = ROOT / "advkd" / "pretrained"
    cards = set(re.findall(r"pretrained/([\w-]+)/README.md", (PAGES / "models.md").read_text()))
    shipped = {folder.name for folder in pretrained.iterdir() if any(folder.rglob("*.safetensors"))}
    assert {"digits", "digits-teacher", "digits-classifier"} <= shipped <= cards
    for name in cards:
        card = (pretrained / name / "README.md").read_text()
        assert "license: apache-2.0" in card and "**Intended use:**" in card and "**Not known:**" in card, name


def test_the_readmes_python_runs():
    names = {}
    exec(python_of(README)[0].replace("fused.sample(1000", "fused.sample(16"), names)
    assert names["images"].shape == (16, 1, 32, 32) and names["image"].shape == (1, 1, 32, 32)
    assert len(names["pictures"]) == len(names["drawn"]) == 4
    assert all(p.grad is not None for p in names["critic"].parameters())


def test_the_sites_python_runs():
    names = {}
    exec(python_of((PAGES / "index.md").read_text())[0], names)
    assert names["images"].shape == (16, 1, 32, 32)
    exec(python_of((PAGES / "backends.md").read_text())[0], names)
    assert names["fused"].dtype is torch.bfloat16 and names["noise"].shape == (4, 3, 8, 8)
    exec(python_of((PAGES / "speed" / "sampler-step.md").read_text())[0], names)
    assert names["x"].shape == (4, 1, 32, 32) and names["level"].shape == (4, 1, 8, 8) and len(names["pictures"]) == 4
    exec(python_of((PAGES / "speed" / "critic.md").read_text())[0], names)
    assert names["y"].shape == (8, 64, 32, 32) and all(p.grad is not None for p in names["critic"].parameters())
    assert len(names["update"].gradients) == len(list(names["critic"].parameters()))
    exec(python_of((PAGES / "models.md").read_text())[0], names)
    assert names["images"].shape == (2, 3, 32, 32) and len(names["some"]) == 6 and len(names["pictures"]) == 2


def test_the_python_of_getting_started_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = python_of((PAGES / "getting-started.md").read_text())
    names = {}
    exec(re.sub('"(student|my-teacher)"', '"digits"', example).replace("100_000", "64"), names)
    assert names["batch"].shape == (64, 32, 32, 1) and names["batch"].dtype is torch.uint8
    assert names["pairs"][0].shape == names["pairs"][1].shape == (4, 1, 32, 32)
    assert torch.equal(names["again"].sample(2, seed=0), names["fused"].sample(2, seed=0))


def test_links_lead_somewhere():
    """Files that the README names are there: the site's build checks those of its pages."""
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert len(links) > 20 and all((ROOT / path).exists() for path in links)
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / path).stat().st_size > 1000 for path in pictures)


def test_they_speak_of_the_project_alone():
    for page in (ROOT / "README.md", *PAGES.rglob("*.md")):
        assert not re.search(r"(?i)pypi\.org|debian\.org|\bsession|issue #?\d", page.read_text()), page
