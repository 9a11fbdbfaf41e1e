"""The GPU profiling command without a GPU: its parts are small programs here, its benchmarks run small cases on the CPU."""

import dataclasses
import functools
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
import torch

from advkd.errors import InputError
from advkd.models.shape import PRESETS, convolutions
from advkd.ops import registry
from profiling import evidence, harness, peers
from profiling.cases import conv_block as bench_conv_block
from profiling.cases import sampler_step as bench_sampler_step
from profiling.cases import student as bench_student
from profiling.evidence import module_of
from profiling.gpu import bench, build, first_image, parity, parts, rehearsal, sanitizers, tables, warm
from profiling.gpu import kept as gpu_kept
from profiling.gpu import main as gpu
from profiling.gpu import modes as gpu_modes
from profiling.gpu import part as gpu_part
from profiling.gpu import run as gpu_run
from profiling.gpu import summary as gpu_summary
from profiling.gpu.tests import BROKEN, collected, read_log, settle, spread
from profiling.harness import run_case
from profiling.limits import ahead, predictions
from profiling.trace import ncu

from ..conftest import ROOT, process_environment
from ..kernels.test_fused_student_gpu import launchers, on_gpu_kernels  # noqa: F401

PLACE = {"commit": "c0ffee", "dirty": False, "device": "a card", "driver": "1", "threads": 2, "versions": {"torch": "2"}}
# A part as a run starts it; its name decides how it ends.
FAKE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from profiling.gpu.processes import end_with_parent
options = json.loads(sys.argv[1])
end_with_parent(options["parent"])
name, folder, out = options["name"], Path(options["folder"]), Path(options["out"])
with open(out / "starts.txt", "a") as file:
    file.write(name + "\\n")
print("works on", name)
result = {"items": {"first": {"state": "done"}}}
if name == "bad":
    result["needs a device"] = "bad"
if name == "hang":
    (folder / "result.json").write_text(json.dumps(result))
if name == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "child.txt").write_text(str(child.pid))
    time.sleep(600)
if name == "segfault" and not options["restarted"]:
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "broken" and not options["restarted"]:
    os._exit(77)
if name == "raises":
    raise RuntimeError("no such thing")
again = (folder / "mark").exists()
(folder / "mark").write_text("")
if name == "flaky" and again:
    raise RuntimeError("no more")
(folder / "result.json").write_text(json.dumps({**result, "value": 7, "again": again, "place": options["place"]}))
sys.exit({"bad": 4, "late": 3, "flaky": 3}.get(name, 0))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(names, *arguments)`` runs fake parts into ``run.out``; returns the code."""
    (tmp_path / "fake_part.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_run, "GRACE", 0.5)
    monkeypatch.setattr(gpu_run, "source_digest", lambda: "unchanged")

    def run(names, *arguments, place=PLACE, seconds=1.5):
        parts = [gpu.Part(name, seconds if name == "hang" else 30, 0, "fake_part") for name in names]
        chosen = [] if "--parts" in arguments else ["--parts", ",".join(names)]
        given = ["--out", str(run.out), *chosen, *arguments]
        return gpu.main(given, parts, missing=lambda device: None, place=lambda device, commit: dict(place))

    run.out = tmp_path / "out"
    run.stored = lambda name: json.loads((run.out / f"gpu_{name}.json").read_text())
    run.starts = lambda: (run.out / "starts.txt").read_text().split()
    return run


def test_parts_do_not_take_each_other_along(run, capsys):
    names = ("good", "bad", "hang", "segfault", "broken", "raises", "late", "after")
    assert run(names) == 1
    states = {name: run.stored(name)["state"] for name in names}
    assert states == {
        **dict.fromkeys(("good", "segfault", "broken", "after"), "passed"),
        **{"bad": "failed", "hang": "unfinished", "raises": "died", "late": "unfinished"},
    }
    assert run.starts().count("segfault") == run.starts().count("broken") == 2 and run.starts().count("raises") == 1
    good, hang = run.stored("good"), run.stored("hang")
    assert good["result"]["value"] == 7 and good["key"]["commit"] == "c0ffee" and good["log_tail"] == ""
    assert good["kernels"] == evidence.gpu_digests()
    assert good["result"]["place"] == PLACE
    assert hang["result"]["items"] == {"first": {"state": "done"}} and hang["seconds"] < 10
    assert "no such thing" in run.stored("raises")["log_tail"]
    said = capsys.readouterr().out
    assert "[good] works on good" in said and "hang: unfinished" in said and "died (-11)" in said
    page = (run.out / "SUMMARY.md").read_text()
    assert "a card, driver 1, commit c0ffee, torch 2." in page and "| hang | unfinished |" in page
    assert not list(run.out.glob("*.tmp")) and not list(run.out.glob(".*.tmp"))
    # The part's own children are ended too.
    child = int((run.out / "child.txt").read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of an ended part goes on")


def test_finished_parts_are_not_run_again(run, capsys):
    names = ("good", "bad", "late")
    assert run(names) == 1 and run.starts() == ["good", "bad", "late"]
    assert run(names) == 1 and run.starts()[3:] == ["late"]
    assert "bad: failed before" in capsys.readouterr().out
    assert run(names, "--parts", "good") == 0 and len(run.starts()) == 4
    (run.out / "gpu_good.json").unlink()
    assert run(names, "--parts", "good,bad") == 1 and run.starts()[4:] == ["good"]
    # Another commit or device, or all cases instead of some: another run.
    assert run(("good",), place={**PLACE, "commit": "beef"}) == 0 and run.starts()[5:] == ["good"]
    assert run(("good",), "--full", place={**PLACE, "commit": "beef"}) == 0 and run.starts()[6:] == ["good"]
    # An unfinished part resumes, but begins anew in another tree; a result that could not be repeated is dropped.
    assert [run(("late",)) and run.stored("late")["result"]["again"] for _ in range(2)] == [True, True]
    assert run(("late",), place={**PLACE, "commit": "beef"}) == 1 and not run.stored("late")["result"]["again"]
    assert run(("flaky",)) == 1 and run.stored("flaky")["result"]["value"] == 7
    assert run(("flaky",)) == 1 and "value" not in run.stored("flaky")["result"] and run.stored("flaky")["state"] == "died"
    assert run.starts()[7:] == ["late", "late", "late", "flaky", "flaky"]


def test_parts_without_time_are_reported_and_run_next_time(run):
    assert run(("good", "after"), "--minutes", "0") == 1 and not (run.out / "starts.txt").exists()
    assert run.stored("good")["state"] == "unfinished" and run.stored("good")["result"]["unfinished"]
    assert run(("good", "after")) == 0 and run.starts() == ["good", "after"]


def test_other_sources_are_another_run(tmp_path):
    for name in ("csrc", "advkd", "kernels", "profiling", "tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "setup.py").write_text("1")
    (tmp_path / "csrc/a.cu").write_text("1")
    before = gpu_run.source_digest(tmp_path)
    (tmp_path / "csrc/results.json").write_text("1")
    assert gpu_run.source_digest(tmp_path) == before
    (tmp_path / "csrc/a.cu").write_text("2")
    assert gpu_run.source_digest(tmp_path) != before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_starts(tmp_path, capsys):
    out = tmp_path / "out"
    for chosen in (["parity"], ["bench"], ["--full"], ["--parts", "tests"]):
        assert gpu.main([*chosen, "--out", str(out)]) == 2 and not out.exists()
        assert re.search("without CUDA|no CUDA device", capsys.readouterr().err)
    assert gpu.main(["parity", "--out", str(out), "--device", "cpu"]) == 2
    wrong = (["--parts", "build,nothing"], ["--out", str(out)], ["parity"], ["parity", "--full"], ["--full", "--rehearse"])
    for arguments in (*wrong, ["x"]):
        with pytest.raises(SystemExit) as ended:
            gpu.main(arguments)
        assert ended.value.code == 2


def test_every_part_is_there():
    modes = [part for mode in gpu_modes.MODES.values() for part in mode.parts()]
    assert [part.name for part in gpu.PARTS] == PART_ORDER
    assert {part.name for part in (*gpu.PARTS, *modes)} == set(parts.PARTS)
    for name, cases in bench.QUICK.items():
        known = importlib.import_module(module_of(name)).cases("cuda")
        assert cases and set(cases) <= set(known), name
    commit = gpu.place_of("cpu", "feed")
    assert commit["commit"] == gpu.provenance("cpu")["commit"] or commit["commit"] == "feed"


PART_ORDER = """build rates warm tests bench_student first_image bench_conv_block memcheck racecheck bench_gradient_penalty
bench_norm_act bench_sampler_step ncu""".split()


def test_modes_fit_their_minutes():
    """Steps run one after the other, and a step takes as long as its longest part."""
    for name, seconds in (("parity", 270), ("bench", 330)):
        mode = gpu_modes.MODES[name]
        built = sum(max(part.seconds for part in step) for step in mode.steps if step[0].name != "build")
        assert mode.seconds == seconds and built <= seconds
    following = gpu_modes.MODES["parity"].steps[1]
    assert [part.name for part in following] == ["tests", "memcheck", "racecheck"]
    assert following[0].most == 16 and gpu_modes.MODES["parity"].steps[-1][0].name == "rates"


def mode_of(*steps, seconds=60):
    return gpu_modes.Mode(seconds, tuple(tuple(gpu.Part(name, 30, 0, "fake_part") for name in step) for step in steps))


THREE = {"tests.json", "results.tgz", "SUMMARY.md"}


def test_a_mode_leaves_three_files(run, tmp_path, monkeypatch):
    """Parts run concurrently; the next call skips parts in the archive."""
    monkeypatch.setattr(gpu, "device_folder", lambda device: tmp_path / "nothing")
    modes = {"parity": mode_of(("good",), ("bad", "segfault")), "bench": mode_of(("good",), ("after",))}
    given = {"missing": lambda device: None, "place": lambda device, commit: dict(PLACE), "modes": modes}
    assert gpu.main(["parity", "--out", str(run.out)], **given) == 1
    assert {path.name for path in run.out.iterdir()} == THREE and not list(tmp_path.glob("advkd-gpu-*"))
    page = (run.out / "SUMMARY.md").read_text()
    assert "| good | passed |" in page and "| segfault | passed |" in page and "| bad | failed |" in page
    with tarfile.open(run.out / "results.tgz") as archive:
        names = set(archive.getnames())
        assert json.load(archive.extractfile("gpu_good.json"))["key"]["commit"] == "c0ffee"
        assert "works on bad" in archive.extractfile("parts/bad/log.txt").read().decode()
    assert {"gpu_bad.json", "gpu_segfault.json", "machine.txt"} <= names
    assert gpu.main(["bench", "--out", str(run.out)], **given) == 0
    with tarfile.open(run.out / "results.tgz") as archive:
        starts = archive.extractfile("starts.txt").read().decode().split()
        assert {"gpu_bad.json", "gpu_after.json"} <= set(archive.getnames())
    assert starts.count("good") == 1 and starts[-1] == "after"


MODE = """
import sys, time
from pathlib import Path
from profiling.gpu import main, modes, run
from tests.profiling.test_profiling_gpu import PLACE, mode_of
modes.SAVE = 0.05
run.source_digest = lambda: "unchanged"
main.device_folder = lambda device: Path("nothing")
short = {"parity": mode_of(("good",), ("late", "hang"), ("after",)), "bench": mode_of(("good",))}
sys.exit(main.main(["parity", "--out", sys.argv[1]], missing=lambda d: None, place=lambda d, c: dict(PLACE), modes=short))
"""


def test_a_stopped_run_of_parts_leaves_a_summary_and_what_was_printed(tmp_path):
    (tmp_path / "fake_part.py").write_text(FAKE)
    code = MODE.replace('["parity", "--out"', '["--parts", "good,hang,after", "--out"')
    code = code.replace("modes=short", 'parts=[main.Part(name, 30, 0, "fake_part") for name in ("good", "hang", "after")]')
    environment = process_environment({"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONUNBUFFERED": "1"})
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line == "[hang] works on hang\n":  # printed while it runs
                break
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 1 and "hang: unfinished" in said
    page = (tmp_path / "out/SUMMARY.md").read_text()
    assert "| good | passed |" in page and "| hang | unfinished |" in page and "| after | unfinished |" in page
    assert (tmp_path / "out/starts.txt").read_text().split() == ["good", "hang"]


def test_a_part_that_starts_while_its_run_is_stopped_is_ended(tmp_path, monkeypatch):
    (tmp_path / "fake_part.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run, real = gpu_run.Run(tmp_path / "out", PLACE, 600), subprocess.Popen

    def start(command, **options):
        process = real(command, **options)
        run.stop()
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    found = run.do(gpu.Part("hang", 300, 0, "fake_part"))
    assert found["state"] == "unfinished" and found["seconds"] < 20


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_a_killed_mode_leaves_whole_files(sign, tmp_path):
    """Killed again and again while it saves: three files at most, each whole; the parts end as well."""
    (tmp_path / "fake_part.py").write_text(FAKE)
    out, changes = tmp_path / "out", {"PYTHONPATH": f"{tmp_path}:{ROOT}", "TMPDIR": str(tmp_path)}
    environment = process_environment(changes)
    for i in range(4 if sign == signal.SIGKILL else 1):
        process = subprocess.Popen([sys.executable, "-c", MODE, str(out)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while not list(tmp_path.glob("advkd-gpu-*/run/parts/hang/result.json")):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.1 + 0.07 * i)
        process.send_signal(sign)
        process.wait(20)
        left = [path.name for path in out.iterdir()]
        assert set(left) <= THREE and len(left) == len(set(left))
        with tarfile.open(out / "results.tgz") as archive:
            assert json.load(archive.extractfile("gpu_good.json"))["state"] == "passed"
            if sign == signal.SIGTERM:
                assert json.load(archive.extractfile("gpu_hang.json"))["state"] == "unfinished"
        assert json.loads((out / "tests.json").read_text()) == {} and "| good | passed |" in (out / "SUMMARY.md").read_text()
    hanging = re.compile(rb"fake_part.{0,9}hang")
    for _ in range(100):
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        if not any(hanging.search(line) and str(tmp_path).encode() in line for line in lines):
            break
        time.sleep(0.1)
    else:
        pytest.fail("a part goes on after its run was killed")


def test_a_torn_result_counts_as_absent(run, tmp_path):
    assert run(("good", "bad")) == 1
    for path in (run.out / "gpu_good.json", run.out / "parts/bad/result.json", run.out / "gpu_bad.json"):
        path.write_bytes(path.read_bytes()[:-9])
    assert run(("good", "bad")) == 1 and run.starts() == ["good", "bad"] * 2
    assert run.stored("good")["state"] == "passed" and run.stored("bad")["state"] == "failed"
    (tmp_path / "tests.collected.json").write_text('["a", "')
    assert collected(tmp_path / "tests.jsonl") is None
    (tmp_path / "gpu_rates.json").write_text('{"state": "passed", "re')
    assert gpu_kept.whole_part(tmp_path, "rates") is None and parity.parity_gate([], part_of(run.out))["state"] == "none ran"


@pytest.mark.parametrize("left", [1.0, 0.6, 0.0])
def test_an_archive_is_unpacked_whole_or_until_its_damage(left, tmp_path, monkeypatch):
    """One that a killed call has unpacked in part is unpacked again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (out := tmp_path / "out").mkdir()
    with gpu_modes.work_folder(out) as work:
        for name in "abc":
            (work / f"gpu_{name}.json").write_text(json.dumps(os.urandom(50_000).hex()))
        gpu_modes.save(work, out, [])
        data = (out / "results.tgz").read_bytes()
    (out / "results.tgz").write_bytes(data[: int(left * len(data))])
    half = work.parent / "unpacked"
    half.mkdir(parents=True)
    (half / "gpu_d.json").write_text("[")
    with gpu_modes.work_folder(out) as work:
        found = {path.name for path in work.glob("gpu_*.json") if gpu_summary.read_json(path, None)}
    assert found == {f"gpu_{name}.json" for name in {1.0: "abc", 0.6: "a", 0.0: ""}[left]}


def test_a_second_run_into_a_folder_is_refused(run, tmp_path):
    run.out.mkdir()
    held = pytest.raises(InputError, match=f"--out {run.out}: another process")
    with gpu_modes.work_folder(run.out), held, gpu_modes.work_folder(run.out):
        pass


def test_what_is_kept_stands_for_its_sources(tmp_path):
    file = "tests/ops/test_mask_mul.py"
    place, good = gpu.provenance("cpu"), entry("advkd", "ours", 1e-3)
    tests = {f"{file}::{name}": {"outcome": "passed", "of": gpu_kept.test_digest(file)} for name in "abc"}
    tests[f"{file}::b"]["outcome"], tests[f"{file}::c"]["of"] = "failed", "another"
    off = {**good, "parity": {"error": 1.0, "tolerance": 0.1, "passed": False}}
    items = {name: {"case": name, "contestants": [entry]} for name, entry in (("one", good), ("off", off))}
    cases = {"items": items, "wanted": list(items)}

    def keep(name, result, **changes):
        stored = {"state": "passed", "sources": gpu_kept.measured_digest(name), "provenance": place, "result": result}
        (tmp_path / f"gpu_{name}.json").write_text(json.dumps({**stored, **changes}))

    keep("tests", {"tests": tests})
    keep("bench_norm_act", {**cases, "gate": {"state": "green"}})
    keep("rates", {"items": {}})
    assert set(gpu_kept.known_tests(tmp_path)) == {f"{file}::a"}
    assert set(gpu_kept.known_tests(tmp_path, ("passed", "failed"))) == {f"{file}::a", f"{file}::b"}
    assert list(gpu_kept.cases(tmp_path, "bench_norm_act")) == ["one"]
    assert gpu_kept.whole_part(tmp_path, "rates")["state"] == "passed" and gpu_kept.whole_part(tmp_path, "ncu") is None
    assert gpu_kept.whole_part(tmp_path, "tests") is None
    keep("rates", {"items": {}}, state="failed")
    keep("bench_norm_act", {**cases, "gate": {"state": "red"}})
    keep("tests", {"tests": tests}, provenance={**place, "versions": {**place["versions"], "torch": "1"}})
    assert gpu_kept.whole_part(tmp_path, "rates") is None and gpu_kept.cases(tmp_path, "bench_norm_act") == {}
    assert gpu_kept.known_tests(tmp_path) == {}
    keep("bench_norm_act", {**cases, "gate": {"state": "green"}}, sources="another")
    assert gpu_kept.cases(tmp_path, "bench_norm_act") == {}


def test_counters_stand_for_the_launches_that_were_counted(monkeypatch):
    monkeypatch.setattr(gpu_kept, "tree_digest", set)
    files = {f"profiling/{name}.py" for name in ("trace/ncu", "cases/conv_block", "gpu/parts", "harness", "peers")}
    assert files < gpu_kept.measured_digest("ncu") and all((ROOT / file).exists() for file in files)
    assert "profiling/gpu/parts.py" not in gpu_kept.measured_digest("bench_norm_act")


def test_a_gate_counts_what_has_failed_before(tmp_path, monkeypatch):
    """With fewer cases it must not turn green on sources for which it was red with all of them."""
    known = {"passed": {"a": {"outcome": "passed"}}, "failed": {"b": {"outcome": "failed"}}}
    stored = lambda folder, outcomes: {t: e for outcome in outcomes for t, e in known.get(outcome, {}).items()}  # noqa: E731
    monkeypatch.setattr(gpu_kept, "known_tests", stored)
    seen = {}
    for name in ("gate", "tests"):
        part = dataclasses.replace(part_of(tmp_path), name=name, kept=tmp_path)
        seen[name] = set(parity._seen(part))
    assert seen == {"gate": {"a", "b"}, "tests": {"a"}}


def test_tests_that_still_run_have_begun(tmp_path):
    folder = tmp_path / "parts/tests"
    folder.mkdir(parents=True)
    lines = [{"test": "a", "outcome": "died"}, {"test": "b", "outcome": "passed"}, {"test": "c", "outcome": "begun"}]
    (folder / "tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "seen.json").write_text(json.dumps({"d": {"outcome": "passed"}}))
    outcomes = {test: entry["outcome"] for test, entry in gpu_modes.tests_so_far(tmp_path).items()}
    assert outcomes == {"a": "died", "b": "passed", "c": "begun", "d": "passed"}


def test_a_rehearsal_reads_what_a_run_has_left(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "device_folder", lambda device: tmp_path / "nothing")
    given = {"missing": lambda device: "there is none", "place": lambda device, commit: dict(PLACE)}
    assert rehearsal.state_of(run.out) == (None, 0)
    modes = {"parity": mode_of(("good",), ("bad",))}
    assert gpu.main(["parity", "--rehearse", "--out", str(run.out)], modes=modes, **given) == 1
    assert rehearsal.state_of(run.out) == ({}, 1)
    (run.out / "SUMMARY.md").unlink()
    assert rehearsal.state_of(run.out) == (None, 0)
    run = gpu_run.Run(tmp_path, PLACE, 330, rehearse=True)
    assert run.slower == gpu_run.REHEARSAL and run.end - time.monotonic() == pytest.approx(330 * run.slower, abs=60)


def test_a_rehearsed_case_reports_how_far_it_went():
    """Runs in a process of its own, as it replaces the device by a stand-in."""
    code = """
import torch
from profiling.gpu.bench import rehearsed
from profiling.harness import Case, Contestant
from tests import gpu_dry_run

def fails():
    raise RuntimeError("no such name")

def absent():
    import no_such_package

with gpu_dry_run.stand_in():
    x = torch.ones(2, device="cuda")
    runs = {"torch": lambda: lambda: x + 1, "compiled": lambda: torch.compile(lambda: x), "absent": absent, "fails": fails}
    case = Case("case", None, 0.0, [Contestant(name, prepare) for name, prepare in runs.items()])
    found = rehearsed(case)
    case.contestants.pop()
    print([entry["missing"] for entry in found["contestants"]], found["red"], rehearsed(case)["red"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=process_environment(), capture_output=True, text=True)
    texts = [
        "no kernel of ours, ran to its end",
        "needs a device, ran as far as torch.compile",
        "needs no_such_package, which is not installed",
        "no kernel of ours, ran as far as RuntimeError: no such name",
    ]
    assert done.stdout.splitlines()[-1:] == [f"{texts} True False"], done.stderr[-2000:]


def test_objects_of_other_sources_are_built_anew(tmp_path, monkeypatch):
    """The linker writes the sources' digest into an object."""
    identity = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["source_identity"]
    for folder in ("csrc", "setup.py"):
        (shutil.copytree if folder == "csrc" else shutil.copy)(ROOT / folder, tmp_path / folder)
    objects = [tmp_path / f"advkd/_{kind}.abi3.so" for kind in ("cpu", "cuda")]
    assert build.stale_objects(tmp_path) == objects
    (tmp_path / "advkd").mkdir()
    for kind in ("cpu", "cuda"):
        (tmp_path / f"advkd/_{kind}.abi3.so").write_bytes(b"ELF" + bytes.fromhex(identity(kind)) + b"rest")
    assert build.stale_objects(tmp_path) == []
    with open(tmp_path / "csrc/cuda/mask_mul.cu", "a") as file:
        file.write("// changed")
    assert build.stale_objects(tmp_path) == objects[1:]


@pytest.mark.skipif(registry.extension_gap("cpu") is not None, reason="the extension is not built")
def test_objects_load_in_a_fresh_process():
    command = [sys.executable, "-c", build.LOADS, "cpu"]
    assert subprocess.run(command, cwd=ROOT, env=process_environment()).returncode == 0


def part_of(folder, seconds=60.0, **more):
    return gpu_part.Part("part", folder, folder, seconds, PLACE, **more)


def finished(function, part):
    """A part's result and code."""
    return gpu_part.run(function, part), json.loads(part.path.read_text())


def test_a_part_goes_on_where_it_stopped(tmp_path):
    done = []

    def fails():
        raise ValueError("off")

    def stopped():
        raise subprocess.TimeoutExpired("ncu", 3)

    def work(part):
        part.run("one", lambda: done.append(1) or {"value": 1})
        part.run("two", fails)
        part.run("three", stopped if part.most else lambda: {"red": True})
        return {"extra": 5}

    code, result = finished(work, part_of(tmp_path, most=1))
    assert code == 3 and result["unfinished"] == "no time for three" and "three" not in result["items"]
    code, result = finished(work, part_of(tmp_path))
    assert code == 4 and done == [1] and result["extra"] == 5 and result["failed_items"] == ["two", "three"]
    assert result["items"]["two"]["error"] == "ValueError: off" and "unfinished" not in result
    # A process that ended midway: by itself, or stopped from outside.
    for restarted, state in ((True, "died"), (False, "done")):
        (tmp_path / "result.json").write_text(json.dumps({"items": {"four": {"state": "begun"}}}))
        assert part_of(tmp_path, restarted=restarted).run("four", lambda: {})["state"] == state
    code, result = finished(lambda part: 1 / 0, part_of(tmp_path))
    assert code == 4 and result["error"].startswith("ZeroDivisionError")


def test_a_broken_device_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_part, "broken", lambda: True)
    with pytest.raises(SystemExit) as ended:
        part_of(tmp_path).run("one", lambda: 1 / 0)
    assert ended.value.code == BROKEN and part_of(tmp_path).items["one"]["state"] == "error"


TESTS = """
import ctypes, os, pytest, time

@pytest.mark.parametrize("i", range(6))
def test_case(i):
    if os.environ.get("STEP") == "die" and i == 1:
        os._exit(11)
    if os.environ.get("STEP") == "kill" and i == 1:
        time.sleep(0.2)  # until the process that is killed knows which test runs
        os.kill(os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid(), 9)
    if i == 2:
        # Python's lock is held all the while: no thread of Python could end it.
        ctypes.PyDLL(None).sleep(600)
    assert i != 3
    if i == 4:
        pytest.skip("no")
"""


def lack(absent, monkeypatch):
    """A machine without these packages."""
    find = parity.importlib.util.find_spec
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None if name in absent else find(name))


@pytest.mark.parametrize(("step", "absent"), [("die", ()), ("die", ("xdist",)), ("kill", ())])
def test_tests_that_die_or_hang_cost_themselves_alone(step, absent, tmp_path, monkeypatch):
    (tmp_path / "test_small.py").write_text(TESTS)
    monkeypatch.setenv("STEP", step)
    monkeypatch.setattr(parity, "GATE", ["-m", ""])
    monkeypatch.setattr(parity, "HANG", 0.5)
    lack(absent, monkeypatch)
    words, log = ["--rootdir", str(tmp_path), str(tmp_path / "test_small.py")], tmp_path / "log.jsonl"
    assert parity.run_pytest(part_of(tmp_path), log, words) == 1
    found = read_log(log)
    outcomes = [found[name]["outcome"] for name in sorted(found)]
    assert outcomes == ["passed", "died", "died", "failed", "skipped", "passed"]
    assert "assert 3 != 3" in found[sorted(found)[3]]["message"]
    # Tests in the log are not run again.
    assert parity.run_pytest(part_of(tmp_path), log, words) == 5 and collected(log) == []


BREAKS = """
import os, pathlib, pytest
from profiling.gpu import tests
tests.broken = lambda: True

@pytest.mark.parametrize("i", range(3))
def test_case(i):
    with open(pathlib.Path(__file__).parent / "pids.txt", "a") as file:
        file.write(f"{os.getpid()} ")
    assert i != 1
"""


@pytest.mark.parametrize("absent", [(), ("xdist",)], ids="without {}".format)
def test_a_failure_that_breaks_the_device_ends_its_worker(absent, tmp_path, monkeypatch):
    lack(absent, monkeypatch)
    (tmp_path / "test_small.py").write_text(BREAKS)
    monkeypatch.setattr(parity, "GATE", ["-m", ""])
    monkeypatch.setattr(gpu_part.Part, "processes", lambda part, most: 1)
    # The code of the last process: without pytest-xdist another one runs what is left.
    code = parity.run_pytest(part_of(tmp_path), tmp_path / "log.jsonl", ["--rootdir", tmp_path, tmp_path])
    assert code == (0 if absent else 1)
    found = read_log(tmp_path / "log.jsonl")
    assert [found[name]["outcome"] for name in sorted(found)] == ["passed", "failed", "passed"]
    assert "assert 1 != 1" in found[sorted(found)[1]]["message"]
    first, second, third = (tmp_path / "pids.txt").read_text().split()
    assert first == second != third


def test_a_log_without_its_process_is_settled(tmp_path):
    log, now, begun = tmp_path / "log.jsonl", time.time(), {}
    passed = '{"test": "a", "outcome": "passed"}\n'
    for test, seconds in {"b": 100, "c": 3}.items():
        begun[test] = json.dumps({"test": test, "outcome": "begun", "begun": now - seconds}) + "\n"
    unknown = "the process ended with code -9, in one of 2 tests"
    for code, died in ((-9, {"b": unknown, "c": unknown}), (None, {})):
        log.write_text(passed + begun["b"] + begun["c"] + '{"test": "a')
        settle(log, code)
        found = read_log(log)
        assert found.pop("a") == {"outcome": "passed"} and {entry["outcome"] for entry in found.values()} <= {"died"}
        assert {test: entry["message"] for test, entry in found.items()} == died
    log.write_text(passed + begun["c"])
    settle(log, 11)
    assert read_log(log)["c"]["message"] == "the process ended with code 11" and read_log(log)["c"]["seconds"] >= 3
    log.write_text(begun["c"])
    settle(log, None)
    assert read_log(log) == {}


HANGS_LATE = """
import pytest, time

@pytest.fixture
def hanging():
    yield
    time.sleep(600)

def test_case(hanging):
    assert False

def test_other():
    pass
"""


def test_a_failed_test_that_hangs_afterwards_is_ended(tmp_path, monkeypatch):
    (tmp_path / "test_small.py").write_text(HANGS_LATE)
    monkeypatch.setattr(parity, "GATE", ["-m", ""])
    monkeypatch.setattr(parity, "HANG", 0.5)
    lack(("xdist",), monkeypatch)
    words = ["--rootdir", str(tmp_path), str(tmp_path / "test_small.py")]
    assert parity.run_pytest(part_of(tmp_path), tmp_path / "log.jsonl", words) == 0
    found = read_log(tmp_path / "log.jsonl")
    assert [found[name]["outcome"] for name in sorted(found)] == ["died", "passed"]
    assert "in hanging" in (tmp_path / "log.txt").read_text()


def test_tests_stopped_for_lack_of_time_are_no_failures(tmp_path, monkeypatch):
    (tmp_path / "test_small.py").write_text(TESTS)
    monkeypatch.setattr(parity, "gpu_test_files", lambda: ["--rootdir", str(tmp_path), str(tmp_path / "test_small.py")])
    monkeypatch.setattr(parity, "test_digest", lambda file: "digest")
    monkeypatch.setattr(parity.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(parity.registry, "gap", lambda *place: None)
    monkeypatch.setattr(parity, "GATE", ["-m", ""])

    code, result = finished(parity.tests, part_of(tmp_path, 13.0))
    assert code == 3 and result["unfinished"] == "no time for 4 of 6 tests" and result["failures"] == []
    assert result["said"] == "2 passed"


def test_a_spread_of_cases():
    assert spread(list(range(10)), 0) == list(range(10)) and spread([1, 2], 3) == [1, 2]
    assert spread(list(range(10)), 3) == [0, 4, 9] and spread(list(range(10)), 1) == [0]


ORDER = """
import pytest

@pytest.mark.parametrize("i", range(5))
def test_a(i):
    pass

@pytest.mark.parametrize("i", range(2))
def test_b(i):
    pass
"""


def test_the_first_case_of_every_function_comes_first(tmp_path, monkeypatch):
    (tmp_path / "test_small.py").write_text(ORDER)
    monkeypatch.setattr(parity, "GATE", ["-m", ""])
    lack(("xdist",), monkeypatch)
    log = tmp_path / "log.jsonl"
    assert parity.run_pytest(part_of(tmp_path), log, ["--gpu-most=3", "--rootdir", tmp_path, tmp_path]) == 0
    names = [test.partition("::")[2] for test in collected(log)]
    assert names == ["test_a[0]", "test_b[0]", "test_a[2]", "test_a[4]", "test_b[1]"] and len(read_log(log)) == 5


def test_only_files_with_gpu_tests_are_collected():
    files = parity.gpu_test_files()
    assert "tests/kernels/test_training_cuda.py" in files and "tests/ops/test_norm_act.py" in files
    assert "tests/system/test_readme.py" not in files and "tests/profiling/test_profiling_gpu.py" in files


def test_the_sanitizers_verdict():
    log = {"a": {"outcome": "passed"}}
    clean = "========= ERROR SUMMARY: 0 errors\n"
    assert not sanitizers.sanitizer_verdict(clean, 0, log)["red"]
    hazards = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert sanitizers.sanitizer_verdict(hazards, 99, log)["errors"] == 2
    reds = ((hazards, 99, log), ("", 0, log), (clean, 1, log), (clean, 0, {}), (clean + clean.replace("0", "1"), 0, log))
    assert all(sanitizers.sanitizer_verdict(*case)["red"] for case in reds)
    # Stopped at its limit: its output until then counts.
    assert not sanitizers.sanitizer_verdict("", None, log)["red"]
    cut = sanitizers.sanitizer_verdict("========= Invalid __global__ write of size 4 bytes\n", None, log)
    assert cut["red"] and cut["errors"] == 1


SANITIZER = """#!/bin/sh
for word; do case $word in --gpu-log=*) log=${word#*=};; esac; done
echo '{"test": "a", "outcome": "passed"}' > "$log"
if mkdir "$log.started" 2>/dev/null; then echo "$STEP"; exec sleep 600; fi
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.mark.parametrize("step", ["", "========= Invalid __global__ write of size 4 bytes"], ids=["silent", "after a finding"])
def test_a_sanitizer_stopped_at_its_limit_runs_again_unless_it_has_found_something(step, tmp_path, monkeypatch):
    (tool := tmp_path / "compute-sanitizer").write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("STEP", step)
    monkeypatch.setattr(sanitizers.shutil, "which", lambda name: str(tool))
    code, result = finished(sanitizers.sanitizer("memcheck"), part_of(tmp_path, 0.0))
    if step:
        assert code == 4 and result["items"]["memcheck"]["errors"] == 1
    else:
        assert code == 3 and result["items"] == {} and result["unfinished"] == "no time for memcheck"
    code, result = finished(sanitizers.sanitizer("memcheck"), part_of(tmp_path))
    assert code == (4 if step else 0)
    assert result["items"]["memcheck"]["code"] == (None if step else 0) and "unfinished" not in result


def test_a_missing_sanitizer_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizers.shutil, "which", lambda name: None)
    code, result = finished(sanitizers.sanitizer("memcheck"), part_of(tmp_path))
    assert code == 4 and "compute-sanitizer is not on PATH" in result["error"]
    code, result = finished(parts.ncu, part_of(tmp_path))
    assert code == 0 and result["said"] == "ncu is not installed"


def test_a_compile_that_dies_or_hangs_does_not_outlast_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(warm.Limits, "of", lambda device: None)
    monkeypatch.setattr(warm, "set_tf32", bool)  # processes need not import torch
    for work, argument, seconds in ((os._exit, 11, 60.0), (time.sleep, 600, 3.0), (time.sleep, 0, 60.0)):
        monkeypatch.setattr(warm, "wanted", lambda limits, argument=argument: {1: argument})
        monkeypatch.setattr(warm, "compile_kernel", work)
        begin = time.monotonic()
        code, result = finished(warm.warm, part_of(tmp_path / f"{argument}", seconds))
        assert time.monotonic() - begin < 40
        if work is os._exit:
            assert code == 4 and result["error"].startswith("BrokenProcessPool: ")
        else:
            assert (code, "unfinished" in result) == ((3, True) if argument else (0, False))


def test_a_second_first_image_compiles_nothing(tmp_path, monkeypatch):
    for name in ("ADVKD_CACHE", "TRITON_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH"):
        monkeypatch.setenv(name, str(tmp_path / "caches" / name))
    once = "import os, pathlib; p = pathlib.Path(os.environ['TRITON_CACHE_DIR'], {}); os.makedirs(p.parent, exist_ok=True)"
    write = once + "; p.exists() or p.write_text('kernel'); print('SECONDS', 0.25)"
    monkeypatch.setattr(first_image, "FIRST_IMAGE", write.format("'same'"))
    code, result = finished(first_image.first_image, part_of(tmp_path))
    assert code == 0 and len(result["items"]) == 4
    assert result["items"]["digits, cuda"]["kept_seconds"] == 0.25 and not result["items"]["digits, cuda"]["compiled_again"]
    monkeypatch.setattr(first_image, "FIRST_IMAGE", write.format("str(os.getpid())"))
    (tmp_path / "result.json").unlink()
    code, result = finished(first_image.first_image, part_of(tmp_path))
    assert code == 4 and result["items"]["digits, auto"]["compiled_again"]
    monkeypatch.setattr(first_image, "FIRST_IMAGE", "raise SystemExit('no kernel')")
    (tmp_path / "result.json").unlink()
    code, result = finished(first_image.first_image, part_of(tmp_path))
    assert code == 4 and result["items"]["digits, auto"]["error"] == "RuntimeError: no kernel"


NCU = """==PROF== Profiling "advkd_conv_layer_4x4_bf16" - 0
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","launch__registers_per_thread"
"","","ns","byte","inst","inst","register/thread"
"0","advkd_conv_layer_4x4_bf16(Parameters)","12,345","1000000","2.5","0.5","242"
"1","conv_kernel","n/a","2","0.1","0.7","100"
"""


def test_output_of_nsight_compute():
    first, second = ncu.read(NCU)
    assert first["seconds"] == pytest.approx(12.345e-6) and first["dram_bytes"] == 1e6 and first["registers"] == 242
    assert first["top_stall"] == "barrier" and first["stalls"] == {"barrier": 2.5, "wait": 0.5}
    assert second["seconds"] is None and second["top_stall"] == "wait"
    assert ncu.read("") == []


def test_processes_find_packages_of_the_path(monkeypatch):
    """Those that a machine without a network has unpacked."""
    seen, text = [], "\n".join(['"Kernel Name"', '""', '"a"'])

    def run(words, env, **options):
        seen.append(env["PYTHONPATH"])
        return subprocess.CompletedProcess(words, 0, text, "")

    for path in ("unpacked", ""):
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setattr(subprocess, "run", run)
        ncu.launches_of(["ncu"], "ncu", 1.0)
    assert seen == [f"{ROOT}:unpacked", str(ROOT)]


def test_architectures_of_cards():
    names = {(8, 0): "8.0", (8, 9): "8.9", (9, 0): "9.0a", (10, 0): "10.0a", (12, 0): "12.0a"}
    assert {capability: build.architecture(capability) for capability in names} == names


def entry(name, kind, seconds=None, error=1e-3, **more):
    times = {"seconds": {"median": seconds, "p20": seconds, "p80": seconds}} if seconds else {}
    return {"name": name, "kind": kind, "parity": {"error": error, "tolerance": 1, "passed": True}, **times, **more}


def test_the_summary_says_what_was_reached_and_missed(tmp_path):
    contestants = [
        entry("advkd, auto", "ours", 2e-4, 3e-3),
        entry("advkd, triton", "ours", 3e-4),
        entry("cuDNN eager", "baseline", 5e-4),
    ]
    contestants += [entry("copy", "floor", 1e-5), {"name": "TensorRT", "kind": "peer", "missing": "no module"}]
    case = {"case": "paper-256, batch 8, bfloat16", "contestants": contestants, "ratio": 2.5, "floor": {"seconds": 1e-4}}
    case |= {"cudnn_error": 1e-3, "predicted_microseconds": 100.0}
    slow = {**case, "case": "digits", "ratio": 0.5, "cudnn_error": 1.0, "predicted_microseconds": None}
    items = {one["case"]: one for one in (case, slow)}
    found = {"items": items, "wanted": list(items), "gate": {"state": "green"}}
    stored = {"state": "failed", "seconds": 3, "limit": 9, "result": found, "provenance": PLACE}
    tests = {
        "said": "5 passed, 1 failed",
        "failures": ["tests/a.py::b"],
        "tests": {"tests/a.py::b": {"message": "E off by 2"}},
        "items": {},
    }
    for name, value in {"bench_student": stored, "tests": {**stored, "result": tests}}.items():
        (tmp_path / f"gpu_{name}.json").write_text(json.dumps(value))
    page = gpu_summary.summary(tmp_path, ["tests", "bench_student", "ncu"])
    assert "| tests | failed | 3 of 9 | 5 passed, 1 failed |" in page and "| ncu | not run |" in page
    row = "| paper-256, batch 8, bfloat16 | advkd, auto: 200.0 | 100.0 | cuDNN eager: 500.0 | 2.50 x | 50% | **3.00 x** |"
    assert row in page and "| digits | advkd, auto: 200.0 | - | cuDNN eager: 500.0 | **0.50 x** | 50% | 0.00 x |" in page
    assert "- cannot run: TensorRT: no module" in page and "- tests: tests/a.py::b: E off by 2" in page
    found["gate"]["state"] = "red"
    (tmp_path / "gpu_bench_student.json").write_text(json.dumps(stored))
    assert "these are no results" in gpu_summary.summary(tmp_path, ["bench_student"])
    assert "Nothing yet" in gpu_summary.summary(tmp_path / "nowhere", ["tests"])


def test_tables_of_gpu_results(monkeypatch):
    case = {
        "case": "digits, batch 1",
        "contestants": [entry("advkd", "ours", 2e-4), entry("cuDNN", "peer", 5e-4)],
        "ratio": 2.5,
    }
    case |= {"floor": {"seconds": 1e-4}, "cudnn_error": 1e-3}
    unmeasured = {"case": "digits, batch 2", "contestants": [{"name": "advkd", "kind": "ours", "missing": "no"}], "ratio": None}
    items = {one["case"]: one for one in (case, unmeasured)}
    result = {"items": items, "wanted": list(items), "gate": {"state": "green"}}
    stored = {"result": result, "provenance": PLACE, "path": "a/b.json"}
    kernel = {"registers": 40, "local_accesses": 0, "tensor": {"HMMA": 3}, "dtype": "bf16", "precision": "tf32"}
    spilled = {**kernel, "registers": 255, "local_accesses": 7, "tensor": {}}
    plan = {"preset": "digits", "batch": 8, "dtype": "bfloat16", "layers": ["a", "b"], "entry": "advkd_conv_pair_columns2_bf16"}
    plan |= {"shared": 2048, "registers": 40, "blocks": 2, "intensity": 12.3, "microseconds": 4.56}
    compiled = {"sm_90a": {"cuda": {"conv_pair": [kernel, spilled]}, "triton": [kernel]}, "sm_80": {"cuda": {}, "triton": []}}
    aot = {
        "compiled": compiled,
        "plans": [plan, plan],
        "versions": {"nvcc": "13", "triton": "3"},
        "kernels": {},
        "path": "a/ahead.json",
        "provenance": PLACE,
    }
    known = {"gpu_bench_student": [stored], "ahead": [aot]}
    monkeypatch.setattr(tables, "stored", lambda name: known.get(name, []))
    page = "\n".join(tables.gpu_benchmarks())
    assert "| digits, batch 1 | advkd: 200.0 | - | cuDNN: 500.0 | 2.50 x | 50% | 1.00 x |" in page
    assert "| digits, batch 2 | - | - | - | - | - | - |" in page
    page = "\n".join(tables.ahead())
    assert "| CUDA C++, conv_pair, 2 entry points | 40 to 255, 7, HMMA in 1 | - |" in page and "(of earlier sources)" in page
    assert "| digits | conv_pair_columns2, 2 times | 2: a ... b | 40 | 2 | 2 | 12 | 4.6 |" in page
    stored["result"]["gate"]["state"] = "red"
    assert tables.gpu_benchmarks() == ["Nothing has been measured on a GPU yet."]


def test_a_digest_covers_what_a_triton_kernel_imports(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    families = {name: evidence.Family("triton", name) for name in ("conv_block", "mask_mul", "conv_bias_act_mask")}
    before = {name: family.digest() for name, family in families.items()}
    for file, changed in (("conv_tiles", {"conv_block"}), ("mask_mul", {"mask_mul", "conv_bias_act_mask"})):
        with (tmp_path / "kernels" / f"{file}.py").open("a") as out:
            out.write("# one more line\n")
        now = {name: family.digest() for name, family in families.items()}
        assert {name for name in now if now[name] != before[name]} == changed
        before = now


def test_a_digest_covers_the_plans_of_launches(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    for folder in ("kernels", "advkd/ops", "csrc/cuda"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    known = [evidence.Family(*pair) for pair in (("cuda", "conv_block"), ("cuda", "norm_act"), ("triton", "conv_block"))]
    before = [family.digest() for family in known]
    files = (("csrc/cuda/host/conv_block.cpp", [0]), ("csrc/cuda/host/host.h", [0, 1]), ("advkd/ops/triton_conv.py", [2]))
    for file, changed in files:
        with (tmp_path / file).open("a") as out:
            out.write("\n")
        now = [family.digest() for family in known]
        assert [i for i in range(3) if now[i] != before[i]] == changed
        before = now


def test_kernels_have_tests_and_become_stale(tmp_path):
    known = {family.key: family for family in evidence.families()}
    assert {"cuda sampler_step", "triton sampler_step", "cuda conv_block", "triton conv_block", "cuda student_stem"} <= set(
        known
    )
    assert all((ROOT / family.source).exists() for family in known.values())
    assert "triton conv_tiles" not in known, "tables, which belong to the kernels that import them"
    cuda, triton = known["cuda mask_mul"], known["triton mask_mul"]
    node = "tests/kernels/test_training_{}.py::test_on_a_gpu[mask_mul-Case0]"
    assert cuda.tested_by(node.format("cuda")) and not triton.tested_by(node.format("cuda"))
    assert triton.tested_by(node.format("triton")) and not triton.tested_by(
        node.format("triton").replace("mask_mul", "norm_act")
    )
    assert cuda.tested_by("tests/ops/test_mask_mul.py::test_a[cuda]") and triton.tested_by(
        "tests/ops/test_mask_mul.py::test_a[cuda]"
    )
    assert not known["triton conv_block"].tested_by("tests/kernels/test_conv_block_cuda.py::test_a")
    assert not known["triton sampler_step"].tested_by("tests/kernels/test_sampler_step_gpu_sources.py::test_on_a_gpu[1]")
    stored = {"date": "2026-01-02 03:04", "kernels": evidence.gpu_digests(), "provenance": PLACE}
    outcomes = {node.format("cuda"): "passed", node.format("cuda") + "2": "failed", node.format("triton"): "passed"}
    tests = {test: {"outcome": outcome} for test, outcome in outcomes.items()}
    stored["result"] = {"tests": tests, "gaps": {"cuda": None, "triton": "Triton is not installed"}}
    (tmp_path / "card").mkdir()
    (tmp_path / "card/gpu_tests.json").write_text(json.dumps(stored))
    run = evidence.last_run(cuda, tmp_path)
    assert (run["passed"], run["failed"], run["stale"], run["device"]) == (1, 1, False, "a card")
    assert evidence.last_run(triton, tmp_path) is None and evidence.last_run(known["cuda philox"], tmp_path) is None
    stored["kernels"][cuda.key] = "0"
    (tmp_path / "card/gpu_tests.json").write_text(json.dumps(stored))
    assert evidence.last_run(cuda, tmp_path)["stale"]


def test_floors_are_those_of_the_definition():
    layers = convolutions(PRESETS["paper-256"])
    # Multiply-adds of the largest layers, by hand.
    plain, up, last = layers[19], layers[22], layers[24]
    assert predictions.flop(plain) == 2 * 9 * 128 * 128 * 128 * 128
    assert predictions.flop(up) == 2 * 4 * 128 * 128 * 256 * 256 and predictions.flop(
        up, phases=False
    ) == 9 / 4 * predictions.flop(up)
    assert (
        predictions.flop(last) == 2 * 9 * 128 * 3 * 256 * 256 and predictions.made_flop(last, True) == 2 * 32 * 128 * 256 * 256
    )
    assert sum(predictions.flop(i, False) for i in layers) == 2 * bench_student.direct_products(PRESETS["paper-256"])
    floor = predictions.floor(layers, "bf16", 8, predictions.H200)
    assert floor["seconds"] == floor["flop"] / 788e12 > floor["bytes"] / 4.3e12
    assert predictions.layer_roofline(last, "bf16", 64, predictions.H200) == pytest.approx(64 * 4.0e-6, rel=0.05)


def test_predictions_follow_the_model():
    stored = json.loads(predictions.PREDICTIONS.read_text())
    assert stored["kind"] == "prediction, not a measurement" and stored["assumptions"] == predictions.assumptions()
    cases = {(p["preset"], p["batch"], p["dtype"]): p for p in stored["predictions"]}
    dtypes = ("bfloat16", "float32", "float32 with TF32")
    assert set(cases) == {(p, n, d) for p, batches in predictions.BATCHES.items() for n in batches for d in dtypes}
    wide = {(p["preset"], p["batch"], p["dtype"]): p for p in stored["descriptors"]}
    assert set(wide) == {case for case in cases if case[2] == "bfloat16"}
    assert any(row["kernel"] == "triton_descriptor" for p in wide.values() for row in p["steps"])
    assert all(p["microseconds"] <= cases[case]["microseconds"] for case, p in wide.items()), "one more candidate"
    step = {name: predictions.predict_step_of_the_sampler(element) for name, element in predictions.STEP_CASES.items()}
    assert stored["sampler_step"] == step and set(step) <= set(bench_sampler_step.cases("cuda"))
    for case, prediction in (*cases.items(), *wide.items()):
        # The plans are current; their cost comes from the model.
        again = predictions.predict(*case, steps=predictions.stored_steps(prediction))
        assert again == prediction and again["microseconds"] > again["roofline_microseconds"] / 2
        assert [row["first"] for row in again["steps"]][0] == 0 and sum(row["count"] for row in again["steps"]) in (25,)
    assert predictions.predicted_microseconds("digits", 1, "float16") == cases["digits", 1, "bfloat16"]["microseconds"]
    assert predictions.predicted_microseconds("digits", 2, "bfloat16") is None
    measured = predictions.H200.measured({"bf16": 1e12}, 2e12)
    assert (
        measured.flops["bf16"] == 1e12 and measured.flops["f32"] == predictions.H200.flops["f32"] and measured.bandwidth == 2e12
    )


def test_resident_blocks():
    # Limits by registers, by threads, by shared memory (with the system's share), by blocks.
    assert ahead.resident_blocks("sm_90a", 128, 256, 0) == 2 and ahead.resident_blocks("sm_90a", 129, 256, 0) == 1
    assert ahead.resident_blocks("sm_90a", 32, 256, 0) == 8 and ahead.resident_blocks("sm_80", 16, 32, 0) == 32
    # Sixteen warps of 104 registers, four in each part of the file, though nineteen would fit in the whole.
    assert ahead.resident_blocks("sm_90a", 104, 32, 0) == 16
    assert ahead.resident_blocks("sm_89", 32, 256, 0) == 6 and ahead.resident_blocks("sm_7", 32, 256, 0) is None
    assert ahead.resident_blocks("sm_90a", 32, 256, 113 * 1024) == 2 and ahead.resident_blocks("sm_80", 32, 256, 82 * 1024) == 1


SHOWN = """
Resource usage:
 Function advkd_a_bf16:
  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:576
.nv.info.advkd_a_bf16
	<0x1>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x80 0x1 0x1
		Function : advkd_a_bf16
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
        /*0010*/               @P0 HMMA.16816.F32.BF16 R4, R8, R2, R4 ;   /* 0x0 */
        /*0020*/              @!UP1 STL [R1], R2 ;   /* 0x0 */
        /*0030*/                   HGMMA.64x64x16.F32 R24, R8 ;   /* 0x0 */
"""


def test_output_of_the_disassembler():
    (kernel,) = ahead.read_kernels(SHOWN)
    assert kernel == {
        **{"entry": "advkd_a_bf16", "registers": 40, "stack": 8, "local": 0, "shared": 1024, "threads": 128},
        **{"instructions": 4, "local_accesses": 1, "tensor": {"HMMA": 1, "HGMMA": 1}},
    }


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_source_is_compiled_ahead_of_time(tmp_path):
    command = [
        sys.executable,
        "-m",
        "profiling.limits.ahead",
        "--only",
        "mask_mul",
        "--architectures",
        "sm_80,sm_1",
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, env=process_environment(), check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "ahead.json").read_text())
    kernels = found["compiled"]["sm_80"]["cuda"]["mask_mul"]
    assert found["unknown_to_nvcc"] == ["sm_1"] and [k["entry"] for k in kernels] == [
        f"advkd_mask_mul_{d}" for d in ("bf16", "f16", "f32")
    ]
    for kernel in kernels:
        assert 8 <= kernel["registers"] <= 80 and kernel["threads"] == 256 and kernel["local_accesses"] == kernel["stack"] == 0
        assert kernel["blocks"] >= 3 and kernel["shared"] == 0 and kernel["instructions"] > 50
    assert found["provenance"]["device"] and re.match(r"\d+\.\d+", found["versions"]["nvcc"])


def test_plans_name_their_entry_points():
    limits = predictions.H200.limits
    for prediction in predictions.read_predictions().values():
        layers, product = convolutions(PRESETS[prediction["preset"]]), predictions.PRODUCTS[prediction["dtype"]]
        for step in predictions.stored_steps(prediction):
            launch = ahead.entry_of(step, layers, product, prediction["batch"], limits)
            source = {"conv": "conv_block", "image": "conv_block", "pair": "conv_pair", "stem": "student_stem"}[step.kernel]
            stem = launch["entry"].removeprefix("advkd_").rpartition("_")[0]
            assert launch["entry"].endswith("_" + product) and 0 < launch["shared"] <= limits.shared and launch["grid"] > 0
            assert (
                re.sub(r"_?(columns|cluster)?\d+(x\d+)?$", "", stem).split("_")[0]
                in (ROOT / f"csrc/cuda/{source}.cu").read_text()
            )


class OnHost:
    """Stand-in for a captured graph."""

    def __init__(self, function, units=1):
        self.function, self.units = function, units
        self()

    def __call__(self):
        with torch.no_grad():
            return [self.function(i) for i in range(self.units)][0]


@pytest.fixture
def gpu_on_host(on_gpu_kernels, monkeypatch):  # noqa: F811
    """Benchmarks for a GPU on the CPU: plain PyTorch in place of the kernels, function calls in place of graphs."""
    for module in (bench_conv_block, bench_student, peers):
        monkeypatch.setattr(module, "Replay", OnHost)
    # Inductor's code for a CPU says nothing about that for a GPU.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(bench_conv_block, "sets_beyond_cache", lambda moved, device: 2)
    monkeypatch.setattr(bench_conv_block, "measure_events", lambda calls, repeats: {n: {"median": 1.0 + n} for n in calls})
    for selection, chosen in bench_student.PEERS.items():
        plain = [dataclasses.replace(p, prepare=peers.eager) if p.name.startswith("torch.compile") else p for p in chosen]
        monkeypatch.setitem(bench_student.PEERS, selection, plain)
    return on_gpu_kernels


def prepared_parity(case):
    """Every contestant's parity with the oracle; contestants that cannot run are left out."""
    wanted, errors = case.oracle(), {}
    for contestant in case.contestants:
        if contestant.kind == "floor":
            continue
        try:
            errors[contestant.name] = (contestant.prepare()().double() - wanted).abs().max().item()
        except ImportError:
            continue
    return errors


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_students_benchmark_on_a_gpu(dtype, gpu_on_host):
    case = bench_student.case("digits", 1, dtype, "all", device="cpu")
    assert case.name == f"digits, batch 1, {dtype}" and case.notes["floor"]["seconds"] > 0
    assert case.notes["predicted_microseconds"] == predictions.predicted_microseconds("digits", 1, dtype)
    errors = prepared_parity(case)
    assert {"advkd, auto", "advkd, cuda", "advkd, triton", "cuDNN eager", "cuDNN, CUDA graph, conv_transpose2d"} <= set(errors)
    assert all(error <= case.tolerance for error in errors.values())
    missing = {c.name for c in case.contestants if c.kind != "floor"} - set(errors)
    assert missing <= {engine + way for engine in ("TensorRT", "cuDNN graph API") for way in ("", ", conv_transpose2d")}
    searched = bench_student.case("digits", 1, dtype, "searched", device="cpu")
    assert searched.name.endswith(", max-autotune") and [c.kind for c in searched.contestants].count("peer") == 2
    quick, every = bench_student.quick_cases(), bench_student.cases("cuda")
    assert set(quick) == set(every) and all(quick[name].args == every[name].args for name in bench_student.WHOLE)
    assert quick["digits, batch 64, bfloat16"].args == ("digits", 64, "bfloat16", "few")


SMALL = {
    "one layer": ("digits", 7, 1),
    "up-sampling": ("digits", 6, 1),
    "an image": ("digits", 24, 1),
    "two": ("digits", 21, 2),
    "two, to an image": ("digits", 23, 2),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_layers_benchmark(name, gpu_on_host, monkeypatch):
    monkeypatch.setattr(bench_conv_block, "CHAINS", SMALL)
    case = bench_conv_block.case(name, 2, "bfloat16", device="cpu")
    errors = prepared_parity(case)
    ours = {"one layer": "conv_layer", "up-sampling": "conv_layer", "an image": "conv_image"}.get(name, "conv_pair")
    assert {f"advkd, CUDA {ours}", "cuDNN", "torch.compile, max-autotune"} <= set(errors)
    assert ("cuDNN, conv_transpose2d" in errors) == (name == "up-sampling")
    assert ("advkd, Triton" in errors) == (SMALL[name][2] == 1)
    assert all(error <= case.tolerance for error in errors.values()), errors
    assert case.notes["sets"] == 2 and case.flop == case.notes["floor"]["flop"]


def test_peers_of_the_compiler(monkeypatch):
    """Other tests leave it to eager: here Inductor takes both folded networks whole, with freezing and with its search."""
    monkeypatch.setattr(peers, "Replay", OnHost)
    chain = bench_conv_block.Chain("digits", 6, 1)
    first = chain.layers[0]
    x = torch.randn(1, first.c_in, first.height, first.width, generator=torch.Generator().manual_seed(1))
    modules = [chain.module(transposed) for transposed in (False, True)]
    wanted = modules[0](x)
    found = [
        peers.compiled(modules[0], x.clone())(),
        peers.graphed(modules[1], x, torch.float32, "max-autotune-no-cudagraphs")(),
    ]
    assert first.upsample and all((one - wanted).abs().max() < 1e-5 * wanted.abs().max() for one in found)


def test_chains_are_what_their_names_say():
    for name, (preset, first, count) in bench_conv_block.CHAINS.items():
        layers = convolutions(PRESETS[preset])[first : first + count]
        said = predictions.layer_name(layers[0])
        if count == 1:
            assert said.replace(",", "") == name
        if "stem" in name:
            assert first == 0 and predictions.pixels(layers[-1]) == 16 * 16
    pair = convolutions(PRESETS["pyramid-256"])
    assert [predictions.layer_name(i) for i in pair[18:20]] == ["48 to 48, up to 128", "48 to 48, at 128"]
    assert [predictions.layer_name(i) for i in pair[23:25]] == ["32 to 32, at 256", "32 to 3, at 256"]


def test_the_parity_gate(tmp_path):
    files = ["tests/ops/test_mask_mul.py"]
    stored = {"kernels": evidence.gpu_digests(), "result": {"tests": {}, "left": []}}
    tests = stored["result"]["tests"]
    part = part_of(tmp_path)

    def gate():
        (tmp_path / "gpu_tests.json").write_text(json.dumps(stored))
        return parity.parity_gate(files, part)

    assert parity.parity_gate(files, part)["state"] == "none ran"
    assert gate()["state"] == "none ran"
    tests["tests/ops/test_mask_mul.py::test_a"] = {"outcome": "passed"}
    tests["tests/ops/test_norm_act.py::test_a"] = {"outcome": "failed"}
    assert gate() == {"state": "green", "passed": 1, "failed": 0}
    tests["tests/ops/test_mask_mul.py::test_b"] = {"outcome": "died"}
    assert gate() == {"state": "red", "passed": 1, "failed": 1}
    tests.popitem()
    stored["result"]["left"] = ["tests/ops/test_norm_act.py::test_b"]
    assert gate()["state"] == "green", "tests of another kernel"
    stored["result"]["left"] = ["tests/ops/test_mask_mul.py::test_c"]
    assert gate()["state"] == "incomplete"
    stored["result"]["left"] = None
    assert gate()["state"] == "incomplete"
    few = {"kernels": evidence.gpu_digests(), "result": {"tests": {f"{files[0]}::test_a": {"outcome": "passed"}}, "left": []}}
    (tmp_path / "gpu_gate.json").write_text(json.dumps(few))
    assert gate()["state"] == "green", "a gate that is through"
    few["result"]["left"] = None
    (tmp_path / "gpu_gate.json").write_text(json.dumps(few))
    assert gate()["state"] == "incomplete"
    few["result"]["left"], few["kernels"] = [], {}
    (tmp_path / "gpu_gate.json").write_text(json.dumps(few))
    stored["result"]["left"] = []
    assert gate()["state"] == "green", "beside a gate of other kernels"
    stored["kernels"] = {}
    assert gate()["state"] == "none ran", "tests of other kernels"
    few["kernels"], stored["kernels"] = evidence.gpu_digests(), evidence.gpu_digests()
    tests["tests/ops/test_mask_mul.py::test_b"] = {"outcome": "failed"}
    (tmp_path / "gpu_gate.json").write_text(json.dumps(few))
    assert gate()["state"] == "red", "a few cases do not outrank all"


GOOD = {"case": "good", "moved_bytes": 10**9, "ratio": 2.0, "contestants": [entry("advkd", "ours", 1e-3)]}


def test_a_benchmark_part(tmp_path, monkeypatch):
    """Cases enter the result one by one, costly contestants last; a failing case does not end the part."""
    ran, calls = [], []

    def measured(case, costly):
        calls.append(costly)
        found = {**GOOD, "case": ["good", "costly"][len(calls) % 2 == 0 or costly]}
        if costly:
            stored = json.loads((tmp_path / "result.json").read_text())
            assert stored["gate"] == {"state": "green"} and len(gpu_summary.cases_of({"result": stored})) == 2, "cut here"
            return {**found, "ratio": 3.0}
        pending = [{"name": "engine", "kind": "peer", "missing": "not prepared yet", "pending": True}]
        return {**found, "contestants": found["contestants"] + pending * (found["case"] == "costly")}

    def fails():
        raise RuntimeError("out of memory")

    def small():
        ran.append(1)
        return dataclasses.replace(bench_student.case("digits", 1), contestants=[], device="cpu")

    module = type(sys)("small_bench")
    module.cases, module.PARITY_TESTS = lambda device: {"good": small, "costly": small, "bad": fails, "other": small}, []
    monkeypatch.setitem(sys.modules, "profiling.cases.small_bench", module)
    monkeypatch.setitem(bench.QUICK, "small_bench", ["good", "costly", "bad", "unknown"])
    monkeypatch.setitem(parity.GATES, "small_bench", ["tests/a.py"])
    monkeypatch.setattr(bench, "parity_gate", lambda files, part: {"state": "green"})
    monkeypatch.setattr(bench, "run_case", measured)
    monkeypatch.setattr(bench, "format_case", lambda result: "")
    rates = {"result": {"items": {"rates": {"flops": {"bf16": 1e12}, "bandwidth": 1e12}}}}
    (tmp_path / "gpu_rates.json").write_text(json.dumps(rates))
    code, result = finished(bench.bench("small_bench"), part_of(tmp_path))
    assert code == 4 and result["wanted"] == ["good", "costly", "bad"] and result["failed_items"] == ["bad"]
    cases = gpu_summary.cases_of({"result": result})
    assert [case["case"] for case in cases] == ["good", "costly"] and calls == [False, False, True]
    assert cases[0]["floor"]["seconds"] == 1e-3 and cases[0]["provenance"] == PLACE and cases[1]["ratio"] == 3.0
    assert "out of memory" in result["items"]["bad"]["error"] and set(result["items"]) == {"good", "costly", "bad"}
    assert bench_student.gpu_rates().flops["bf16"] == 1e12 and len(ran) == 3
    monkeypatch.setattr(bench_student, "MEASURED_RATES", [])
    code, result = finished(bench.bench("small_bench"), part_of(tmp_path, 0.0))
    assert len(ran) == 3
    late = part_of(tmp_path / "late", 1.0)
    code, result = finished(bench.bench("small_bench"), late)
    assert code == 3 and result["unfinished"] == "no time for 3 cases: good, costly, bad"
    for state, code in (("red", 4), ("none ran", 3), ("incomplete", 3)):
        monkeypatch.setattr(bench, "parity_gate", lambda files, part, state=state: {"state": state})
        monkeypatch.setitem(bench.QUICK, "small_bench", [])
        assert finished(bench.bench("small_bench"), part_of(tmp_path / state.replace(" ", "")))[0] == code


@pytest.mark.gpu
def test_times_on_a_gpu():
    """A replay's results are the function's; a longer kernel takes longer; a case runs from end to end."""
    x = torch.randn(1 << 24, device="cuda")
    replay = harness.Replay(lambda i: x * (i + 2), 3)
    assert torch.equal(replay(), 2 * x)
    small = x[: 1 << 16]
    times = harness.measure_events({"long": lambda: x * 2, "short": lambda: small * 2, "graph": replay}, repeats=5)
    assert times["short"]["median"] < times["long"]["median"] and times["graph"]["median"] < 2 * times["long"]["median"]
    assert harness.sets_beyond_cache(1) == 64
    case = bench_conv_block.case("144 to 144 at 8", 1, "bfloat16")
    case.contestants = [c for c in case.contestants if "compile" not in c.name]
    result = run_case(dataclasses.replace(case, repeats=3))
    assert all(entry["parity"]["passed"] and entry["seconds"]["median"] > 0 for entry in result["contestants"])
