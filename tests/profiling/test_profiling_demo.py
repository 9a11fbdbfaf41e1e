"""The demo's profile: the arithmetic of its parts, its summary line, the limit on parts outside the networks, the plot."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from advkd.cli import demo as advkd_demo
from advkd.diffusion.recorder import record_trajectories
from advkd.errors import InputError
from profiling.cases import distillation
from profiling.trace import demo, workloads

SEEN = "100 images of the student from fresh noise. A classifier of real digits is sure of 97 of them (p), and of 99.\n"

SUMMARY = SEEN + (
    "teacher: 1,234 parameters, 50 evaluations, 93.5 ms per image; student: 567 parameters, 1 evaluation, 0.43 ms per image "
    "(217 times faster; batches of 16, 2 threads)\n"
)


def clock(process, **seconds):
    ranges = {path.replace("__", " / ").replace("_", " "): {"seconds": s, "calls": 1} for path, s in seconds.items()}
    return {"process": process, "ranges": ranges}


MAIN = clock(
    "MainProcess", load=2.0, trajectories=10.0, trajectories__load=1.0, distillation=1.0, distillation__critic_update=5.0
)
RECORDERS = [
    clock("SpawnProcess-1", trajectories=0.5, trajectories__load=1.0, trajectories__network=6.0),
    clock("SpawnProcess-2", trajectories=0.5, trajectories__network=4.0, trajectories__write=1.0),
]


def test_the_wait_for_recorders_is_what_they_do():
    found = demo.parts([RECORDERS[0], MAIN, RECORDERS[1]], 20.0)
    assert found == {
        "start and imports": 1.0,
        "load": 2.0,
        "trajectories": 0.5,
        "trajectories / load": 1.5,
        "trajectories / network": 5.0,
        "trajectories / write": 0.5,
        "trajectories / start and imports": 3.5,
        "distillation": 1.0,
        "distillation / critic update": 5.0,
    }
    assert sum(found.values()) == 20.0


def test_one_process_records_itself():
    found = demo.parts([MAIN], 20.0)
    assert found["trajectories"] == 10.0 and "trajectories / start and imports" not in found and sum(found.values()) == 20.0


@pytest.mark.parametrize("clocks", [[], RECORDERS, [MAIN, MAIN], [clock("MainProcess", load=1.0)]])
def test_clocks_of_something_else(clocks):
    with pytest.raises(InputError, match="one main process"):
        demo.parts(clocks, 20.0)


def test_the_summary_line():
    wanted = {"teacher_ms_per_image": 93.5, "student_ms_per_image": 0.43, "times_faster": 217.0, "recognised": 0.97}
    assert demo.figures("recording\n" + SUMMARY) == wanted
    line = SUMMARY.removeprefix(SEEN)
    wrong = (line.replace("217 times faster", "faster"), line.replace("0.43", "-"), f"x {line}")
    for bad in ("", line, SEEN, *(SEEN + text for text in wrong)):
        with pytest.raises(InputError, match="no summary line"):
            demo.figures(bad)


def made(seconds=(100.0, 110.0), **parts):
    runs = []
    for i, whole in enumerate(seconds):
        clocks = [clock("MainProcess", trajectories=0.0, **{path: spent[i] for path, spent in parts.items()})]
        runs.append({"seconds": whole, "parts": demo.parts(clocks, whole), **demo.figures(SUMMARY)})
    return demo.combined(runs)


RESULT = {
    "distillation__critic_update": (60.0, 70.0),
    "trajectories__network": (30.0, 30.0),
    "load": (9.0, 9.5),
    "a": (0.1, 0.2),
}


def test_rows():
    result = made(**RESULT)
    assert (result["benchmark"], result["seconds"], result["times_faster"]) == ("demo", [100.0, 110.0], [217.0, 217.0])
    found = demo.rows(result)
    assert [row[0] for row in found[:3]] == ["distillation / critic update", "trajectories / network", "load"]
    assert found[0][1:] == ([60.0, 70.0], pytest.approx(130 / 210), True) and found[2][3] is False
    assert sum(row[2] for row in found) == pytest.approx(1.0)
    table = "\n".join(demo.lines(result))
    assert "| distillation / critic update | 60.0, 70.0 | 61.9 | network |" in table
    assert "| load | 9.0, 9.5 | 8.8 |  |" in table and "| the rest | 0.1, 0.2 | 0.1 |  |" in table and "| a |" not in table
    assert "| all outside of networks |  | 9.5 |  |" in table
    assert demo.spread([1.0, 3.0, 2.0]) == "2.0 (1.0 to 3.0)"


def test_a_part_outside_of_the_networks_is_too_large():
    assert demo.complaints(made(**RESULT)) == []
    (said,) = demo.complaints(made(**{**RESULT, "load": (20.0, 9.5), "distillation__critic_update": (49.0, 70.0)}))
    assert said.startswith("load: 14 %")
    # The same thing in several places counts as one.
    parts = {"load": (6.0, 6.0), "trajectories__load": (6.0, 6.0), "distillation__critic_update": (49.0, 70.0)}
    (said,) = demo.complaints(made(**{**RESULT, **parts}))
    assert said.startswith("load: 11 %")


def test_too_few_recognised_images():
    assert demo.complaints({**made(**RESULT), "recognised": [0.97, 0.8]}) == []
    (said,) = demo.complaints({**made(**RESULT), "recognised": [0.97, 0.79]})
    assert said == "79 % of the images are recognised, at least 80 % must be"


def test_the_plot_is_a_picture(tmp_path):
    from PIL import Image

    demo.plot(made(**RESULT), tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.format == "PNG" and picture.width > 500


def demonstration(monkeypatch, clocks, pictures=demo.PICTURES, returncode=0):
    """Stand-in for the demo's process: its files and its output."""

    def run(words, env, **options):
        folder = demo.Path(words[words.index("--out") + 1])
        clock_folder = demo.Path(env["ADVKD_RANGES"].removeprefix("clock:"))
        assert env["ADVKD_CACHE"].startswith(str(folder.parent))
        for made_folder in (folder, clock_folder):
            made_folder.mkdir()
        for name in pictures:
            (folder / name).touch()
        for i, found in enumerate(clocks):
            (clock_folder / f"{i}.json").write_text(json.dumps(found))
        return SimpleNamespace(returncode=returncode, stdout=SUMMARY, stderr="first\nadvkd: no\n")

    monkeypatch.setattr(workloads.subprocess, "run", run)


def test_a_run(monkeypatch, tmp_path):
    demonstration(monkeypatch, [MAIN, *RECORDERS])
    found = demo.run_once(tmp_path)
    assert found["parts"]["trajectories / network"] == 5.0 and found["times_faster"] == 217.0


def test_a_run_that_failed(monkeypatch, tmp_path):
    demonstration(monkeypatch, [MAIN], returncode=2)
    with pytest.raises(InputError, match="ended with 2: advkd: no"):
        demo.run_once(tmp_path)


def test_a_run_without_a_picture(monkeypatch, tmp_path):
    demonstration(monkeypatch, [MAIN], demo.PICTURES[1:])
    with pytest.raises(InputError, match="has not made demo.html"):
        demo.run_once(tmp_path)


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        demo, "run_once", lambda folder: {"seconds": 20.0, "parts": demo.parts([MAIN], 20.0), **demo.figures(SUMMARY)}
    )
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path), "--repeats", "3"])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    # The main process waits without a recorder that would explain why.
    assert (
        ended.value.code.startswith("trajectories: 50 %")
        and "| trajectories | 10.0 (10.0 to 10.0) | 50.0 |" in capsys.readouterr().out
    )
    stored = json.loads((tmp_path / "demo.json").read_text())
    assert stored["seconds"] == [20.0] * 3 and stored["provenance"]["threads"] and (tmp_path / "demo.png").exists()
    assert stored["parts"]["distillation / critic update"] == {"seconds": [5.0] * 3, "network": True}
    monkeypatch.setattr(sys, "argv", ["demo", "--repeats", "0"])
    with pytest.raises(SystemExit):
        demo.main()


class Stopped(Exception):
    """Ends a demo where its distillation would begin."""


def test_the_updates_that_are_timed_are_the_demos(monkeypatch, tmp_path):
    """The same teacher, recording, shape of the student and recipe; the number of updates and the backend are the bench's."""
    recorded, distilled = [], []

    def record(teacher, config, out, progress=False):
        recorded.append((teacher.name, replace(config, num=32)))
        return record_trajectories(teacher, replace(config, num=32, steps=3), tmp_path / "paths", progress=False)

    def distil(data, student, config, *rest):
        distilled.append((student.config, config))
        raise Stopped

    def measure(data, root):
        run = distillation.distiller(data, root, "auto")
        distilled.append((run.student.config, replace(run.method.config, updates=(600,))))
        return {"plain PyTorch": {part: {"median": 1.0} for part in ("seconds", "rest")}}

    monkeypatch.setattr(advkd_demo.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(advkd_demo, "distill", distil)
    monkeypatch.setattr(distillation, "measure", measure)
    for module in (advkd_demo, distillation):
        monkeypatch.setattr(module, "record_trajectories", record)
    with pytest.raises(Stopped):
        advkd_demo.run_demo(tmp_path / "demo")
    found = distillation.compared()
    assert recorded[0] == recorded[1] and found["teacher"] == recorded[0][0]
    assert distilled[1] == (distilled[0][0], replace(distilled[0][1], critic_backend="auto"))
