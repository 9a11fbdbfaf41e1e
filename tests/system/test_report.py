"""The report: one file, no network, and a browser shows its pictures."""

import base64
import copy
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from advkd.data.pictures import read_metrics, save_curves
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.evaluation import report as report_module
from advkd.evaluation.evaluate import EvaluationConfig
from advkd.evaluation.report import write_report
from advkd.models.student import Student
from advkd.runtime.files import digest, write_json

from ..conftest import fork_cli
from .test_solver_quality import conditional_teacher

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PICTURES = ["teacher_and_student.png", "levels.png", "student_samples.png", "loss_curves.png", "extrapolation.png"]


def a_row(name, against):
    fit = {"value": 0.1, "slope": 2.0, "sizes": [200, 100], "distances": [0.11, 0.12]}
    row = {"images": name, "against": against, "samples": [200, 200], "frechet": 0.5, "frechet_interval": [0.4, 0.6]}
    row |= {"times_floor": 2.5, "floor": 0.2, "frechet_at_infinity": fit, "kid": 0.01, "precision": 0.9, "recall": 0.8}
    row |= {"nearest": 1.75, "diversity": 7.25}
    return row


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """An evaluation with made-up figures that are easy to find again."""
    seconds = {"median": 0.00123, "p20": 0.001, "p80": 0.002, "repeats": 3}
    models = {name: {"parameters": 1234567, "evaluations": 1, "seconds": seconds} for name in ("teacher", "student")}
    result = {
        "score": "FD-digits",
        "num_features": 64,
        "config": EvaluationConfig().__dict__,
        "student": {"weights_sha256": digest(Student.from_pretrained("digits").state_dict())},
        "teacher": Teacher.from_pretrained("digits").identity(),
        "known_unseen": True,
        "rows": [a_row("student", "teacher"), a_row("<b>odd & name</b>", "teacher")],
        "pairs": {"num": 16, "correlation": 0.912, "mismatched": 0.5, "mse": 0.1},
        "models": {"batch_size": 16, **models},
        "provenance": {"commit": "abc", "dirty": False, "device": "a processor", "driver": None, "versions": {"torch": "2"}},
    }
    path = tmp_path_factory.mktemp("evaluation") / "evaluation.json"
    write_json(path, result)
    return path


@pytest.fixture(scope="module")
def report(evaluation, tmp_path_factory):
    """A report of the shipped student, with losses and a table of runs."""
    root = tmp_path_factory.mktemp("report")
    levels = [f"mse_{k:02d}" for k in range(1, 13)]
    lines = [",".join(["stage", "update", "loss", "wasserstein", "critic", "penalty", *levels])]
    lines += [",".join(["1", str(20 * i), *["0.5"] * 16]) for i in range(1, 5)]
    (root / "metrics.csv").write_text("\n".join(lines) + "\n")
    run = {"name": "a row", "times_floor": 3.0, "at_infinity": 0.2, "precision": 0.9, "recall": 0.8, "correlation": 0.7}
    write_json(root / "ablation.json", {"runs": [{**run, "cpu_seconds": 12.0, "command": "advkd distill --fresh"}]})
    student, teacher = Student.from_pretrained("digits"), Teacher.from_pretrained("digits")
    write_report(student, teacher, evaluation, root / "out", root / "metrics.csv", root / "ablation.json")
    return root / "out"


def embedded(page):
    """The PNGs inside a page, as arrays."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def test_one_page_holds_everything(report):
    page = (report / "report.html").read_text()
    assert sorted(path.name for path in report.iterdir()) == sorted([*PICTURES, "report.html"])
    assert not re.search(r'(?:src|href)=(?!"data:)|https?://|@import|<script|<link', page)
    pictures = embedded(page)
    assert len(pictures) == 5
    for name in PICTURES:
        assert any(np.array_equal(np.asarray(Image.open(report / name).convert("RGB")), picture) for picture in pictures)
    for text in (
        "FD-digits",
        "2.50",
        "0.400 to 0.600",
        "1,234,567",
        "0.912",
        "1.750",
        "7.250",
        "advkd distill --fresh",
        "a processor",
    ):
        assert text in page
    assert "<b>odd" not in page and "&lt;b&gt;odd &amp; name" in page


def screenshot(page, path, profile):
    """The page as headless Chromium draws it."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command += ["--force-device-scale-factor=1", "--force-color-profile=srgb", f"--user-data-dir={profile}"]
    command += ["--window-size=2000,4200", f"--screenshot={path}", page.as_uri()]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    return np.asarray(Image.open(path).convert("RGB"))


def shows(screen, picture):
    """True if the picture's most detailed 32x32 patch appears somewhere on the screen, pixel by pixel."""
    patches = [(y, x) for y in range(0, picture.shape[0] - 32, 16) for x in range(0, picture.shape[1] - 32, 16)]
    y, x = max(patches, key=lambda corner: picture[corner[0] : corner[0] + 32, corner[1] : corner[1] + 32].std())
    patch = picture[y : y + 32, x : x + 32]
    likely = np.ones((screen.shape[0] - 31, screen.shape[1] - 31), dtype=bool)
    for dy, dx in [(0, 0), (5, 9), (11, 3), (17, 29), (31, 31), (23, 14), (8, 20), (28, 2)]:
        likely &= (screen[dy : dy + likely.shape[0], dx : dx + likely.shape[1]] == patch[dy, dx]).all(axis=-1)
    return any(np.array_equal(screen[a : a + 32, b : b + 32], patch) for a, b in np.argwhere(likely))


@pytest.mark.kernels
@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_a_browser_shows_the_pictures(report, tmp_path):
    page = report / "report.html"
    screen = screenshot(page, tmp_path / "page.png", tmp_path / "profile")
    pictures = embedded(page.read_text())
    assert all(shows(screen, picture) for picture in pictures)
    # The check can fail: it does on a page whose pictures are gone.
    blind = tmp_path / "blind.html"
    blind.write_text(re.sub(r'src="data:[^"]+"', 'src=""', page.read_text()))
    assert not any(shows(screenshot(blind, tmp_path / "blind.png", tmp_path / "profile"), picture) for picture in pictures)


def test_losses_of_a_method_without_critics(evaluation, tmp_path):
    """Pairs log their loss alone; the report takes the student's own metrics."""
    (tmp_path / "metrics.csv").write_text("stage,update,loss\n1,1,0.5\n1,2,0.25\n")
    assert read_metrics(tmp_path / "metrics.csv")["loss"] == [0.5, 0.25]
    save_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width == 1800


def test_command_line(evaluation, tmp_path):
    done = fork_cli("report", "--evaluation", evaluation, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout and (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    "broken", ["missing", "another file", "a row", "another student", "a folder", "metrics", "no metrics", "ablation", "a run"]
)
def test_bad_files_are_refused_before_anything_is_written(evaluation, tmp_path, broken):
    good, changed = json.loads(evaluation.read_text()), tmp_path / "changed.json"
    (tmp_path / "text.csv").write_text("some,words\nand,more\n")
    row = {key: value for key, value in good["rows"][0].items() if key != "kid"}
    changes = {
        "another file": {"runs": []},
        "a row": {**good, "rows": [row]},
        "another student": {**good, "student": {"weights_sha256": "0"}},
        "a folder": {**good, "images": {}},
        "ablation": [],
        "a run": {"runs": [{"name": "x"}]},
    }
    changed.write_text(json.dumps(changes.get(broken, {})))
    values = {"evaluation": evaluation, "metrics": None, "ablation": None}
    values |= {
        "missing": {"evaluation": tmp_path / "none.json"},
        "metrics": {"metrics": tmp_path / "text.csv"},
        "no metrics": {"metrics": tmp_path / "none.csv"},
        "ablation": {"ablation": changed},
        "a run": {"ablation": changed},
    }.get(broken, {"evaluation": changed})
    models = Student.from_pretrained("digits"), Teacher.from_pretrained("digits")
    with pytest.raises(InputError):
        write_report(*models, values["evaluation"], tmp_path / "out", values["metrics"], values["ablation"])
    assert not (tmp_path / "out").exists()


def test_teachers_that_cannot_be_shown_are_refused_before_anything_is_written(evaluation, tmp_path):
    """A schedule that begins without signal, which the pictures' solver cannot take, and no classes to guide towards."""
    student, teacher = Student.from_pretrained("digits"), Teacher.from_pretrained("digits")
    blind = conditional_teacher(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for other, reason in (
        (blind, "alpha_bar = 0"),
        (conditional_teacher(null=None), "no null class"),
        (teacher, "unconditional"),
    ):
        with pytest.raises(InputError, match=f"{reason}.*--conditional"):
            write_report(student, teacher, evaluation, tmp_path / "out", conditional=other)
    nameless = conditional_teacher(null=None)
    write_json(tmp_path / "e.json", {**json.loads(evaluation.read_text()), "teacher": nameless.identity()})
    with pytest.raises(InputError, match="no null class"):
        write_report(student, nameless, tmp_path / "e.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [None, "x", -1, [[8]], [None], {}], ids=str)
def test_evaluations_of_other_values_are_refused(value, evaluation, tmp_path, monkeypatch):
    """Where any text will do, the value may be shown; nothing ends in another error."""
    monkeypatch.setattr(report_module, "save_pictures", lambda *arguments: {})
    student, teacher = Student.from_pretrained("digits"), Teacher.from_pretrained("digits")
    whole, refused = json.loads(evaluation.read_text()), []
    for key in whole:
        write_json(tmp_path / "e.json", {**whole, key: value})
        try:
            write_report(student, teacher, tmp_path / "e.json", tmp_path)
        except InputError as error:
            refused.append(key)
            assert "e.json" in str(error)
    assert {"rows", "models", "student", "teacher", "provenance"} <= set(refused)


def places(value, path=()):
    """Paths to everything within a JSON value."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def replaced(value, path, other):
    value = part = copy.deepcopy(value)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = other
    return value


@pytest.mark.parametrize("value", ["<script>$\\frac$", "\ud800", 0, 1e308], ids=["markup", "surrogate", "zero", "large"])
def test_nothing_of_an_evaluation_is_markup_or_a_formula(value, evaluation, tmp_path, monkeypatch):
    """Any value in any place is shown as text, or refused before anything is drawn."""
    draw, drawn = report_module.save_extrapolation, set()

    def draw_once(curves, score, path):
        if repr((curves, score)) not in drawn:
            draw(curves, score, path)
        drawn.add(repr((curves, score)))

    monkeypatch.setattr(report_module, "save_pictures", lambda *arguments: {})
    monkeypatch.setattr(report_module, "save_extrapolation", draw_once)
    student, teacher = Student.from_pretrained("digits"), Teacher.from_pretrained("digits")
    whole, shown = json.loads(evaluation.read_text()), 0
    for path in places(whole):
        write_json(tmp_path / "e.json", replaced(whole, path, value))
        try:
            page = write_report(student, teacher, tmp_path / "e.json", tmp_path / "out")
            shown += "&lt;script&gt;" in page.read_text()
            assert "<script>" not in page.read_text()
            page.unlink()
        except InputError:
            assert not (tmp_path / "out" / "report.html").exists()
    assert shown > 0 or "<" not in str(value)


@pytest.mark.parametrize(
    "bad", ["mse_x", "mse_", "mse_" + 5000 * "9", "1e308", "-1e308"], ids=["name", "none", "digits", "large", "negative"]
)
def test_metrics_that_cannot_be_drawn_are_refused(bad, tmp_path):
    path, titles = tmp_path / "metrics.csv", ["stage", "update", "loss", "wasserstein", "critic", "penalty", "mse_01"]
    rows = [["1", str(update), *["0.5"] * 5] for update in (1, 2)]
    if bad.startswith("mse"):
        titles[-1] = bad
    else:
        rows[1][2] = bad
    path.write_text("".join(",".join(row) + "\n" for row in (titles, *rows)))
    with pytest.raises(InputError, match="metrics.csv is not a metrics.csv"):
        save_curves(path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_torn_row_of_a_running_training_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("stage,update,loss,wasserstein,critic,penalty\n1,1,0.5,,,\n1,2,0.")
    assert read_metrics(path)["loss"] == [0.5]
    # A number may be torn although no comma is missing.
    path.write_text("stage,update,loss,wasserstein,critic,penalty\n1,1,0.5,,,2\n1,2,0.7,,,1")
    assert read_metrics(path)["loss"] == [0.5]


@pytest.mark.parametrize(
    "text", ["stage,update,loss,critic,wasserstein,penalty\n1,1,0.5,,,\n1,2,0.\n1,3,0.5,,,\n", "a,a\n1,2\n"]
)
def test_other_torn_rows_and_columns_of_one_title_are_refused(text, tmp_path):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(InputError, match="metrics.csv is not a metrics.csv .* .(a row has|two columns)"):
        read_metrics(tmp_path / "metrics.csv")
