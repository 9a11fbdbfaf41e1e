"""Every method and solver on a plane: measures of known samples, a tiny page, its resumption, and a browser's view of it."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.solvers import METHODS as SOLVERS
from advkd.errors import InputError
from advkd.evaluation.toy import laboratory, readings, solvers
from advkd.evaluation.toy.data import DATA, REACH, SCHEDULE
from advkd.evaluation.toy.methods import LEFT_OUT, ROWS
from advkd.evaluation.toy.page import Section, left_out
from advkd.evaluation.toy.run import ALWAYS, ToyConfig, source_digest, write_toy
from advkd.methods import METHODS, method_class
from advkd.methods.rectified_flow import straightness
from advkd.runtime.files import digest, read_tensors

from ..conftest import fork_cli, start

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TINY = ToyConfig(data="25-gaussians", updates_scale=0.002, samples=1000)


@pytest.fixture(scope="module")
def small():
    """Few points, runs of solvers and pixels."""
    from matplotlib.figure import Figure

    original = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, dpi, format: original(figure, path, dpi=dpi / 4, format=format))
        patch.setattr(laboratory, "TRAINED", 600)
        for name, value in {"COUNTS": (8, 16, 32), "WHOLE": (4, 8), "POINTS": 16, "REFERENCE": ("dpm-3", 60)}.items():
            patch.setattr(solvers, name, value)
        yield


@pytest.fixture(scope="module")
def page(small, tmp_path_factory):
    return write_toy(TINY, tmp_path_factory.mktemp("toy") / "out", progress=False)


@pytest.mark.parametrize("name", DATA)
def test_samples_of_the_data_have_its_measures(name):
    """A share 1 - exp(-9/2) of a Gaussian's samples lies within three deviations; neighbours on a moon only add to it."""
    data, n = DATA[name](), 20_000
    found, least = data.measured(data.teacher.data(n, seed=5)), 1 - math.exp(-(REACH**2) / 2)
    assert found["modes"] == 1
    assert found["within"] > least - 5 * math.sqrt(least * (1 - least) / n)
    if name == "25-gaussians":
        assert found["within"] < least + 5 * math.sqrt(least * (1 - least) / n)
    assert found["width"] == pytest.approx(1, abs=0.03) and found["spread"] == pytest.approx(1, abs=0.03)
    assert data.teacher.data(n).square().mean() == pytest.approx(1, abs=0.03)


def test_measures_of_samples_that_are_placed_by_hand():
    data = DATA["25-gaussians"]()
    means = data.teacher.means
    none = pytest.approx(0, abs=1e-9)
    assert data.measured(means[:1].repeat(50, 1)) == {"within": 1.0, "modes": 1 / 25, "width": none, "spread": none}
    # 500 samples, a fair share is 20: nine are fewer than half of one, ten are not.
    for count, kept in ((9, 24 / 25), (10, 1.0)):
        shares = [count, 40 - count, *[20] * 23]
        placed = torch.cat([means[i : i + 1].repeat(share, 1) for i, share in enumerate(shares)])
        assert data.measured(placed)["modes"] == pytest.approx(kept)
    # Just inside and just outside of three deviations.
    step = torch.tensor([[data.deviation, 0.0]]).double()
    assert data.measured(means + 2.999 * step)["within"] == 1
    outside = data.measured(means + 3.001 * step)
    assert outside == {"within": 0.0, "modes": 0.0, "width": 0.0, "spread": pytest.approx(1, abs=0.02)}
    assert readings.verdict(data, outside) == "loses 25 of 25 modes and leaves 100% of the samples between the modes"
    # One point a mode says nothing of their width.
    few = torch.cat([means, (means + 10 * step).repeat(40, 1)])
    assert readings.verdict(data, data.measured(few)) == "loses 25 of 25 modes and leaves 98% of the samples between the modes"
    # Points beside a centre are as narrow as those on it.
    beside = data.measured((means + 2 * step).repeat(4, 1))
    assert beside["width"] == none and readings.verdict(data, beside) == (
        "keeps every mode and has collapsed to 0.00 of the data's width"
    )
    # By n - 1, two points a mode, and the corners of a square, have variances d^2 / 2 and 2 d^2 / 3.
    two = torch.cat([means, means + step])
    four = torch.cat([two, two + step.flip(1)])
    assert data.measured(two)["width"] == pytest.approx(math.sqrt(3 / 4) * data.measured(four)["width"], rel=1e-9)


def test_classes_of_the_data():
    data = DATA["two-moons"]()
    assert data.guide.num_classes == 2 and data.teacher.num_classes == 0 and data.total == 16
    assert data.labels(data.teacher.means).tolist() == [0] * 48 + [1] * 48
    points = data.guide.sample(200, solver="heun", steps=30, labels=1)
    assert (data.labels(points) == 1).all()


class Shift:
    """The flow of x = z + 3, whose velocity is 3 everywhere."""

    def predict(self, x, sigma, condition=None):
        sigma = sigma[:, None]
        tau = 1 / (1 + sigma)
        y = x * torch.hypot(tau, 1 - tau)
        return y - 3 * tau + 3, y - 3 * tau


def test_straightness_of_a_straight_flow_and_of_one_in_closed_form():
    z = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert straightness(Shift(), z) < 1e-24
    # Gaussian data of variance v: u = s'(tau) / s(tau) y with s^2 = v tau^2 + (1 - tau)^2, so that Euler's path is p_i z.
    variance, steps, p, slopes = 0.3, 64, 1.0, []
    for i in range(steps):
        tau = i / steps
        slopes.append((variance * tau - (1 - tau)) / (variance * tau**2 + (1 - tau) ** 2) * p)
        p += slopes[-1] / steps
    factor = sum((slope - (p - 1)) ** 2 for slope in slopes) / steps
    teacher = GaussianTeacher(torch.zeros(2), torch.full((2,), variance, dtype=torch.float64), SCHEDULE)
    assert straightness(teacher, z, steps=steps) == pytest.approx(z.square().mean().item() * factor, rel=1e-9)
    # Its limit, the integral of s'^2 less (sqrt(v) - 1)^2, is first order in 1 / steps away.
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    s = (variance * grid**2 + (1 - grid) ** 2).sqrt()
    limit = torch.trapezoid(((variance * grid - (1 - grid)) / s) ** 2, grid) - (math.sqrt(variance) - 1) ** 2
    assert factor == pytest.approx(limit.item(), rel=6 / steps)


def test_readings_follow_the_numbers():
    data = DATA["25-gaussians"]()
    sharp = {"within": 0.97, "modes": 1.0, "width": 1.0, "spread": 1.0}
    assert readings.verdict(data, sharp) == "keeps every mode"
    assert readings.verdict(data, {**sharp, "width": 1.4}) == "keeps every mode and is blurred"
    collapsed = {"within": 0.4, "modes": 0.04, "width": 0.1, "spread": 0.9}
    one = {"within": 0.86, "modes": 0.04, "width": 1.26, "spread": 0.06}
    assert readings.verdict(data, one).startswith(
        "loses 24 of 25 modes and has collapsed to one place, 0.06 of the data's spread"
    )
    assert readings.verdict(data, collapsed) == (
        "loses 24 of 25 modes and has collapsed to 0.10 of the data's width and leaves 60% of the samples between the modes"
    )
    corner = torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]], [[3.0, 4.0]]])
    assert readings.bends(corner) == pytest.approx(7 / 5) and readings.bends(corner[:2]) == pytest.approx(1)
    assert "straightest is b (0.1), then a (0.2)" in readings.straightness_reading({"a": 0.2, "b": 0.1})


def test_the_slope_of_a_power_law():
    counts = [8, 16, 32, 64]
    assert solvers.fitted_order(counts, [1.0, *(5 * count**-3.0 for count in counts[1:])]) == pytest.approx(3)


def test_every_method_is_shown_or_named():
    distilling = {name for name in METHODS if method_class(name).distils}
    said = left_out(list(ROWS))
    assert all(name in said for name in distilling - {row.method for row in ROWS.values()})
    assert all(f"{name} ({why})" in said for name, why in LEFT_OUT.items())
    assert "rectified-flow" not in said and "rectified-flow" in left_out(["pairs"])
    for i, row in enumerate(ROWS.values()):
        assert row.method in METHODS and set(row.after) <= set(list(ROWS)[:i])


def test_rows_bring_those_that_they_begin_with():
    assert ToyConfig(methods="score-distillation,pairs").rows() == [
        "reparametrize",
        "pairs",
        "diff-instruct",
        "score-distillation",
    ]


def test_a_page_of_every_row(page):
    numbers = json.loads((page.parent / "toy.json").read_text())
    rows = numbers["data"]["25-gaussians"]["rows"]
    assert {row["row"] for row in rows} == {"teacher", *ROWS}
    assert all(0 <= row["within"] <= 1 and 0 <= row["modes"] <= 1 for row in rows)
    exact = {row["samples"]: row for row in rows if row["row"] == "teacher"}
    assert {row["evaluations"] for row in exact.values()} == {40, 100, 500}
    assert all(row["within"] > 0.9 for row in exact.values())
    found = numbers["data"]["25-gaussians"]["solvers"]
    assert set(found["whole"]) == set(SOLVERS) and set(found["order"]) == {n for n, m in SOLVERS.items() if m.order}
    text = page.read_text()
    assert text.count("<figure>") == text.count('src="data:image/png') == text.count("<figcaption>") == len(ROWS) + 8
    assert all(len(caption) > 40 for caption in re.findall(r"<figcaption>(.*?)</figcaption>", text))
    (adversarial,) = [
        caption
        for caption in re.findall(r"<figcaption>(.*?)</figcaption>", text)
        if "student, steps: 4" in caption and "DDPM" in caption
    ]
    assert all(f"exact teacher, DDPM, steps: {steps}: 25 of 25 modes" in adversarial for steps in (100, 500))
    assert "<h2>Where this was measured</h2>" in text


@pytest.fixture
def trained(small, monkeypatch):
    """Names of the methods that are trained, in their order."""
    names: list[str] = []

    def counted(method, *arguments, **options):
        names.append(method.name)
        return original(method, *arguments, **options)

    original = laboratory.Trainer
    monkeypatch.setattr(laboratory, "Trainer", counted)
    return names


def outcome_of(path):
    """A kept row without the time that it took."""
    tensors, facts = read_tensors(path)
    return digest(tensors), {name: value for name, value in facts.items() if name != "seconds"}


QUICK = ToyConfig(data="two-moons", methods="pairs,progressive", updates_scale=0.001, samples=1000)


def test_a_second_run_trains_nothing_and_a_lost_row_alone_is_run_again(trained, tmp_path):
    page = write_toy(QUICK, tmp_path, progress=False)
    first = page.read_bytes()
    assert trained == ["reparametrize", "pairs", "progressive"]
    (lost,) = (tmp_path / "kept").glob("two-moons-pairs-*")
    kept, outcome = lost.read_bytes(), outcome_of(lost)
    lost.unlink()
    write_toy(QUICK, tmp_path, progress=False)
    assert trained[3:] == ["pairs"] and outcome_of(lost) == outcome and page.read_bytes() == first
    lost.write_bytes(kept[:100])
    with pytest.raises(InputError, match=r"kept row .* is damaged .*: delete it and run again"):
        write_toy(QUICK, tmp_path, progress=False)
    assert len(trained) == 4 and page.read_bytes() == first


def test_another_seed_or_other_code_is_another_row(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Section, "body", lambda section: [])
    for config in (QUICK, QUICK, replace(QUICK, seed=1), QUICK):
        write_toy(config, tmp_path, progress=False)
    assert len(trained) == 6
    monkeypatch.setattr("advkd.evaluation.toy.run.source_digest", lambda: "other")
    write_toy(QUICK, tmp_path, progress=False)
    assert len(trained) == 9 and re.fullmatch("[0-9a-f]{64}", source_digest())


def test_a_killed_run_goes_on_with_the_row_that_it_was_at(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Section, "body", lambda section: [])

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("advkd.evaluation.toy.methods.Progressive", killed)
        write_toy(QUICK, tmp_path, progress=False)
    assert trained == ["reparametrize", "pairs"] and not (tmp_path / "toy.html").exists()
    write_toy(QUICK, tmp_path, progress=False)
    assert trained == ["reparametrize", "pairs", "progressive"] and (tmp_path / "toy.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "moons"], "data must be 25-gaussians, two-moons or both, got 'moons'"),
        (["--methods", "pairs,ddim"], "methods must be all, or some of reparametrize, .*, got 'ddim'"),
        (["--updates-scale", "0"], "updates_scale must be positive and finite, got 0.0"),
        (["--samples", "999"], "samples must be from 1,000 to 1,000,000, got 999"),
        (["--seed", "-1"], r"seed must be in \[0, 2\^32\), got -1"),
        (["--seed", "one"], "toy: seed must be a whole number, got 'one'"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path):
    done = fork_cli("toy", "--out", tmp_path / "out", *options)
    assert done.returncode == 2 and re.fullmatch(f"advkd: {message}\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    done = fork_cli("toy", "--out", tmp_path / "file")
    assert done.returncode == 2 and "is a file; name a folder" in done.stderr


@pytest.mark.kernels
def test_each_data_set_has_a_process_and_the_rows_that_it_has_alone(tmp_path):
    options = ("--methods", "reparametrize", "--updates-scale", "0.001", "--samples", "1000")
    environment = {"OMP_NUM_THREADS": "2"}
    both = start("-m", "advkd.cli", "toy", "--out", tmp_path / "both", *options, environment=environment).finish(300)
    assert both.returncode == 0, both.stderr
    assert f"the page with the pictures: {tmp_path / 'both' / 'toy.html'}" in both.stdout
    assert set(json.loads((tmp_path / "both" / "toy.json").read_text())["data"]) == set(DATA)
    assert "toy: 25-gaussians" in both.stderr and "toy: two-moons" not in both.stderr  # one of several processes has a bar
    alone = ("toy", "--out", tmp_path / "alone", "--data", "two-moons", *options)
    alone = start("-m", "advkd.cli", *alone, environment=environment).finish(300)
    assert alone.returncode == 0 and "toy: two-moons" in alone.stderr, alone.stderr
    kept = list((tmp_path / "alone" / "kept").iterdir())
    assert len(kept) == len(ALWAYS) + 1
    assert all(outcome_of(tmp_path / "both" / "kept" / path.name) == outcome_of(path) for path in kept)


LOOK = """<script>onload = () => parent.postMessage({
  images: document.images.length,
  broken: [...document.images].filter((image) => !image.complete || !image.naturalWidth).length,
  unread: [...document.querySelectorAll("figcaption")].filter((one) => one.innerText.length < 40).length,
  width: innerWidth,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
}, "*")</script>"""
HARNESS = """<!DOCTYPE html><body><script>onmessage = (event) => {
  const found = document.createElement("pre");
  found.id = "found";
  found.innerText = JSON.stringify(event.data);
  document.body.append(found);
}</script><iframe src="looked.html" width="400" height="900" style="border: 0"></iframe></body>"""


def looked_at(text, folder):
    """Measures of a page in a browser's frame of 400 pixels, and the browser's complaints."""
    (folder / "looked.html").write_text(text.replace("</body>", LOOK + "</body>"))
    (folder / "harness.html").write_text(HARNESS)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=30000", (folder / "harness.html").as_uri()]
    done = subprocess.run(command, check=True, timeout=240, capture_output=True, text=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-500:]
    return json.loads(found[1]), re.findall(r".*CONSOLE.*", done.stderr)


@pytest.mark.kernels
@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_a_browser_shows_it_on_a_narrow_screen(page, tmp_path):
    text = page.read_text()
    seen, complaints = looked_at(text, tmp_path)
    wanted = {"images": text.count("<img "), "broken": 0, "unread": 0, "width": 400}
    assert {name: seen[name] for name in wanted} == wanted and seen["overflow"] <= 0 and not complaints, (seen, complaints)
    # The check can fail.
    planted = '<figure><img src="data:image/png;base64,AA"><figcaption>?</figcaption></figure><p style="width: 3000px">wide</p>'
    text = text.replace("</main>", planted + "<script>console.error('planted')</script></main>")
    seen, complaints = looked_at(text, tmp_path)
    assert (seen["broken"], seen["unread"]) == (1, 1) and seen["overflow"] > 0 and complaints
