"""The profilers' drivers: their commands, their readers, their refusals; the workloads agree with each other."""

import gzip
import json
import runpy
import sqlite3
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from advkd.errors import InputError
from advkd.models import shape
from advkd.runtime import timing
from advkd.runtime.ranges import named
from profiling import evidence
from profiling.trace import compare, ncu, nsys, power, timeline, torch_trace, workloads
from profiling.trace.timeline import KERNEL, Activity, Span, Trace, busy_time, own_times, summary
from profiling.trace.workloads import UNIT, VARIANTS, Size

from ..conftest import ROOT, TINY_STUDENT, tiny_student, tiny_teacher

DATA = ROOT / "tests" / "data" / "nsight"
PLACE = {"device": "a GPU", "threads": 2, "commit": "c0ffee", "dirty": False, "versions": {"torch": "2"}}
CONV = "void conv_kernel<float, 64>(float *)"


def export(path, changes=""):
    """The small SQLite export as a file."""
    with closing(sqlite3.connect(path)) as database:
        database.executescript((DATA / "report.sql").read_text() + changes)
    return path


def fixture(kind, tmp_path):
    return nsys.read(export(tmp_path / "a.sqlite")) if kind == "nsys" else torch_trace.read(DATA / "chrome_trace.json")


@pytest.mark.parametrize("kind", ["nsys", "torch"])
def test_both_tools_recordings_give_the_same_figures(kind, tmp_path):
    found = summary(fixture(kind, tmp_path))
    # Two units of 10 us. First: kernels of 3 and 2 us that overlap by 1, a copy of 0.5; second: a kernel of 3, a memset of 0.2.
    assert (found["units"], found["launches"], found["launched"], found["copies"]) == (2, 1.5, "kernels", 0.5)
    assert found["seconds"] == pytest.approx(10e-6) and found["copied_bytes"] == 2048
    assert found["busy"] == pytest.approx((4000 + 500 + 3000 + 200) / 20000)
    rows = {row["range"]: row for row in found["ranges"]}
    assert list(rows) == [UNIT, "student", "block"]
    # The step's kernel was launched from another thread while the block was open, the memset near the end of a range.
    assert rows["student"]["seconds"] == pytest.approx((3000 + 2000 + 3000 + 200) / 2 * 1e-9)
    assert rows["student"]["own_seconds"] == pytest.approx((3000 + 3000 + 200) / 2 * 1e-9)
    assert rows["student"]["host_seconds"] == pytest.approx((6000 + 5000) / 2 * 1e-9)
    assert rows["block"]["seconds"] == rows["block"]["own_seconds"] == pytest.approx(1000e-9)
    assert rows[UNIT]["own_seconds"] == pytest.approx(250e-9)
    assert [(row["calls"], row["launches"], row["own_launches"]) for row in rows.values()] == [
        (1, 1.5, 0),
        (1, 1.5, 1),
        (0.5, 0.5, 0.5),
    ]
    assert [(row["name"], row["launches"]) for row in found["top"]] == [(CONV, 1), ("step_kernel", 0.5)]
    assert found["top"][0]["seconds"] == pytest.approx(3000e-9)


def test_a_report_that_torchs_profiler_made():
    """Two units of a small student on a CPU."""
    found = summary(torch_trace.read(ROOT / "tests" / "data" / "torch" / "student.json.gz"))
    assert (found["units"], found["launches"], found["launched"], found["busy"]) == (2, 17, "operators", None)
    rows = {row["range"]: (row["calls"], row["own_launches"]) for row in found["ranges"]}
    assert rows == {UNIT: (1, 3), "latents": (1, 8), "student": (1, 5), "to host": (1, 1)}
    # 17,162 us of a first call, 500 us of a second one.
    assert found["unit_seconds"] == pytest.approx([0.017162402, 0.000500454])
    assert sum(row["own_seconds"] for row in found["ranges"]) == pytest.approx(found["seconds"])
    assert found["top"][1]["name"] == "advkd::student_forward"


def test_a_range_that_was_open_before_is_no_row():
    ranges = [Span(-50, 300, "library"), Span(0, 100, UNIT), Span(10, 60, "inner")]
    found = summary(Trace(ranges, operators=[Span(12, 52, "conv"), Span(70, 80, "add")], on_gpu=False))
    rows = {row["range"]: (row["launches"], row["own_launches"]) for row in found["ranges"]}
    assert rows == {UNIT: (2, 1), "inner": (1, 1)}


def test_operators_of_a_cpu():
    ranges = [Span(0, 100, UNIT), Span(10, 60, "outer"), Span(20, 30, "inner")]
    operators = [Span(12, 52, "conv"), Span(14, 50, "kernel"), Span(22, 26, "add"), Span(70, 80, "add"), Span(200, 210, "late")]
    found = summary(Trace(ranges, operators=operators, on_gpu=False))
    assert (found["launches"], found["launched"], found["busy"]) == (4, "operators", None) and "copied_bytes" not in found
    rows = {row["range"]: (row["own_launches"], row["own_seconds"]) for row in found["ranges"]}
    assert rows[UNIT] == (1, pytest.approx(50e-9)) and rows["outer"] == (2, pytest.approx(40e-9))
    assert rows["inner"] == (1, pytest.approx(10e-9))
    # 36 minus the 4 of the addition inside; 4 plus 10; 40 minus 36.
    assert [(row["name"], round(1e9 * row["seconds"])) for row in found["top"]] == [("kernel", 32), ("add", 14), ("conv", 4)]


def test_nested_and_overlapping_times():
    assert own_times([Span(0, 10, "a"), Span(2, 8, "b"), Span(3, 4, "c"), Span(0, 10, "other", thread=1)]) == [4, 5, 1, 10]
    kernels = [Activity(start, end, "k", KERNEL, 0) for start, end in ((-5, 3), (2, 4), (2, 3), (6, 20))]
    assert busy_time(kernels, [Span(0, 10, UNIT)]) == 4 + 4


def test_other_versions_of_nsys(tmp_path):
    older = "ALTER TABLE NVTX_EVENTS DROP COLUMN domainId; ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN demangledName;"
    older += "DROP TABLE CUPTI_ACTIVITY_KIND_MEMSET;"
    found = summary(nsys.read(export(tmp_path / "older.sqlite", older)))
    # Without domains every library's ranges appear.
    assert "cudnnConvolutionForward" in {row["range"] for row in found["ranges"]}
    assert found["top"][0]["name"] == "conv_kernel"
    whole = "CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER, end INTEGER);"
    whole += "INSERT INTO CUPTI_ACTIVITY_KIND_GRAPH_TRACE VALUES (1, 2);"
    with pytest.raises(InputError, match="cuda-graph-trace=node"):
        nsys.read(export(tmp_path / "graphs.sqlite", whole))
    empty = nsys.read(export(tmp_path / "empty.sqlite", "DELETE FROM NVTX_EVENTS;"))
    with pytest.raises(InputError, match="unit of work"):
        summary(empty)


def test_counters_of_nsight_compute():
    launches = ncu.read((DATA / "raw.csv").read_text())
    assert [row["flop"] for row in launches] == [3e6 + 2 * 1e6, 4e5 + 4 * 1e5, 1e6]
    found = ncu.totals(launches)
    assert (found["launches"], found["dram_bytes"], found["flop"]) == (3, 32e6, 6.8e6)
    assert found["seconds"] == pytest.approx(14e-6) and found["flop_per_second"] == pytest.approx(6.8e6 / 14e-6)
    assert found["bytes_per_second"] == pytest.approx(32e6 / 14e-6)
    assert found["occupancy_percent"] == pytest.approx((8 * 40 + 4 * 80 + 2 * 20) / 14)
    conv, step = ncu.by_kernel(launches)
    assert (conv["kernel"], conv["launches"], step["launches"]) == (CONV, 2, 1)
    # Means by time of 8 and 2 us.
    assert conv["stalls"] == pytest.approx({"long_scoreboard": 3.0, "barrier": 1.0, "wait": 0.4})
    assert list(conv["stalls"]) == ["long_scoreboard", "barrier", "wait"]
    assert conv["flop_per_second"] == pytest.approx(6e11) and conv["bytes_per_second"] == pytest.approx(2e12)
    assert ncu.read("==ERROR== no rights") == [] == ncu.read("")
    place = {"workload": "student", "size": "digits", "variant": "fused", "tool": "Nsight Compute"}
    rows = [{**place, **found, "kernels": [conv, step]}]
    text = "\n".join(ncu.lines([{"rows": rows, "path": "a/b.json", "provenance": PLACE}]))
    assert "a GPU, 2 threads" in text and "Counted by Nsight Compute." in text and "one launch of each kernel" in text
    assert "long_scoreboard 3.0, barrier 1.0, wait 0.4" in text
    assert "`conv_kernel`" in text and "| 32 |" in text


def test_only_counters_that_the_card_has_are_asked_for():
    everything = ncu.metrics(set())
    assert set(ncu.FLOP) < set(everything)
    hopper = {"sm__ops_path_tensor_src_bf16_dst_fp32", "sm__ops_path_tensor_src_fp16", "sm__ops_path_tensor_src_fp16_dst_fp32"}
    chosen = set(ncu.metrics(hopper)) & set(ncu.FLOP)
    assert chosen == {"sm__ops_path_tensor_src_bf16_dst_fp32.sum", "sm__ops_path_tensor_src_fp16_dst_fp32.sum"}


def test_command_lines(tmp_path):
    words = nsys.nsys_command("update", "fused", "cuda", "digits", 3, tmp_path / "trace")
    work = ["-m", "profiling.trace.workloads", "update", "fused", "--device=cuda", "--size=digits"]
    assert words[:2] == ["nsys", "profile"] and words[-8:] == [sys.executable, *work, "--repeats=3"]
    for option in ("--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--cuda-graph-trace=node", "--export=sqlite"):
        assert option in words
    words = ncu.unit_command("teacher", "baseline", "cuda", "digits", ["a", "b"])
    assert words[0] == "ncu" and words[-2:] == ["--repeats=1", "--steps=2"]
    text = " ".join(words)
    for option in ("--csv --page raw", "--metrics a,b", "--profile-from-start off", "--launch-count 4000"):
        assert option in text
    assert nsys.file_name("student", "fused", "digits") == "trace-student-fused"
    assert nsys.file_name("student", "fused", "paper-256") == "trace-student-fused-paper-256"


def process(monkeypatch, stdout="", stderr="", returncode=0, made=lambda words: None):
    """Every process ends like this; returns the environments that they had."""
    environments = []

    def run(words, **options):
        environments.append(options.get("env"))
        made(words)
        said = stdout(words) if callable(stdout) else stdout
        return SimpleNamespace(returncode=returncode, stdout=said, stderr=stderr)

    monkeypatch.setattr(workloads.subprocess, "run", run)
    return environments


def test_a_recording_by_nsys(tmp_path, monkeypatch):
    output = lambda words: next(w for w in words if w.startswith("--output=")).removeprefix("--output=")  # noqa: E731
    environments = process(monkeypatch, made=lambda words: export(output(words) + ".sqlite"))
    trace = nsys.record("student", "fused", "cuda", "digits", 2, tmp_path)
    assert summary(trace)["launches"] == 1.5 and (tmp_path / "trace-student-fused.sqlite").exists()
    assert [variables["ADVKD_RANGES"] for variables in environments] == ["nvtx"]
    # An earlier report does not count.
    process(monkeypatch, stderr="nothing was captured")
    with pytest.raises(InputError, match="student, fused: nsys has recorded nothing: nothing was captured"):
        nsys.record("student", "fused", "cuda", "digits", 2, tmp_path)
    process(monkeypatch, stderr="first\nno rights\n", returncode=1)
    with pytest.raises(InputError, match="student, baseline: nsys ended with 1: no rights"):
        nsys.record("student", "baseline", "cuda", "digits", 2, tmp_path)


def test_counting_by_ncu_and_its_refusal(monkeypatch):
    table, known = (DATA / "raw.csv").read_text(), "\n".join(sorted(ncu.FLOP))
    process(monkeypatch, lambda words: table if "--csv" in words else known)
    found = ncu.count("teacher", "fused", "cuda", "digits")
    assert (found["flop"], found["steps"], len(found["kernels"]), found["tool"]) == (6.8e6, 2, 2, ncu.NCU)
    monkeypatch.setattr(ncu, "MOST", 3)
    assert ncu.count("teacher", "fused", "cuda", "digits")["error"] == "teacher, fused: ncu: more than 3 kernels in a unit"
    said = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\n==PROF== Disconnected\n"
    for code, wanted in ((0, "has counted nothing"), (1, "ended with 1")):
        process(monkeypatch, said, returncode=code)
        error = ncu.count("student", "fused", "cuda", "digits")["error"]
        assert error == f"student, fused: ncu {wanted}: ==ERROR== ERR_NVGPUCTRPERM - no permission"


def test_missing_tools_have_a_reason(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert nsys.missing("cpu") == ncu.missing("cpu") == "the work is on a CPU"
    assert nsys.missing("cuda") == "nsys is not on PATH" and ncu.missing("cuda") == "ncu is not on PATH"
    monkeypatch.setattr(nsys.shutil, "which", lambda name: name)
    monkeypatch.setattr(nsys, "find_spec", lambda name: None)
    assert "advkd[profile]" in nsys.missing("cuda") and ncu.missing("cuda") is None


@pytest.mark.parametrize("module", [nsys, ncu, compare])
@pytest.mark.parametrize("bad", [["--only", "nothing"], ["--size", "huge"], ["--device", "tpu"], ["--frequency", "1"]])
def test_bad_arguments(module, bad, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", *bad])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2 and bad[0].strip("-") in capsys.readouterr().err


def test_counts_are_positive_and_a_gpu_is_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for bad in (["--repeats", "0"], ["--device", "cuda"]):
        monkeypatch.setattr(sys, "argv", ["x", *bad])
        with pytest.raises(SystemExit) as ended:
            compare.main()
        assert ended.value.code == 2 and bad[0] in capsys.readouterr().err


@pytest.fixture
def tiny(monkeypatch):
    """A size that makes every workload quick."""
    monkeypatch.setitem(shape.PRESETS, "tiny", TINY_STUDENT)
    monkeypatch.setitem(workloads.SIZES, "tiny", Size("tiny", 3, 2, 8, steps=5))
    monkeypatch.setattr(workloads, "teacher_of", lambda size, device: tiny_teacher())
    monkeypatch.setattr(workloads, "plausible_student", lambda preset: tiny_student().eval())


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_the_variants_agree(name, tiny):
    found = workloads.gate(name, size="tiny")
    assert found["passed"] and set(found["errors"]) == set(VARIANTS) and found["tolerance"] < 1e-2


def test_a_wrong_variant_is_found_out(tiny, monkeypatch):
    monkeypatch.setattr("advkd.diffusion.teacher.Teacher.record", lambda self, x, *more: (x * float("nan"), {}))
    found = workloads.gate("teacher", size="tiny")
    assert not found["passed"] and found["errors"]["fused"] == float("inf")


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_a_recording_by_torch(name, tiny, tmp_path):
    rows = {}
    for variant in VARIANTS:
        path = tmp_path / f"{variant}.json.gz"
        torch_trace.profile(workloads.prepare(name, variant, size="tiny"), 2, "cpu", path)
        rows[variant] = summary(torch_trace.read(path))
        assert rows[variant]["units"] == 2 and rows[variant]["launches"] > 3 and rows[variant]["busy"] is None
    wanted = {
        "student": {"latents", "student", "to host"},
        "teacher": {"network", "step"},
        "update": {"data", "student forward", "critic update", "student update", "average"},
    }[name]
    for row in rows.values():
        found = {part["range"]: part for part in row["ranges"]}
        assert set(found) == {UNIT, *wanted}
        assert sum(part["own_seconds"] for part in row["ranges"]) == pytest.approx(row["seconds"])
        assert sum(part["own_launches"] for part in row["ranges"]) == row["launches"]
    # Ranges are disabled again.
    with named("a"):
        assert named("a") is named("b")
    if name == "teacher":
        steps = {v: next(p for p in row["ranges"] if p["range"] == "step") for v, row in rows.items()}
        assert all(part["calls"] == 5 for part in steps.values())


def test_a_process_of_its_own(tmp_path, monkeypatch):
    trace = torch_trace.record("student", "fused", "cpu", "digits", 1, tmp_path / "trace.json.gz")
    found = summary(trace)
    assert found["units"] == 1 and {"latents", "student"} < {row["range"] for row in found["ranges"]}
    assert not list(tmp_path.glob(".*"))
    process(monkeypatch, returncode=3)
    with pytest.raises(InputError, match="torch.profiler ended with 3: nothing was said"):
        torch_trace.record("student", "fused", "cpu", "digits", 1, tmp_path / "trace.json.gz")


def run_main(module, monkeypatch, out, *arguments):
    """Run a driver's command line; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--size", "tiny", "--out", str(out), *arguments])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return ended.value.code


def test_nsys_without_nsys(tiny, tmp_path, monkeypatch, capsys):
    def here(name, variant, device, size, repeats, path):
        torch_trace.profile(workloads.prepare(name, variant, device, size), repeats, device, path)
        return torch_trace.read(path)

    monkeypatch.setattr(torch_trace, "record", here)
    assert run_main(nsys, monkeypatch, tmp_path, "--only", "student", "--traces", str(tmp_path / "traces")) == 0
    stored = json.loads((tmp_path / "traces.json").read_text())
    assert [row["variant"] for row in stored["rows"]] == list(VARIANTS) and stored["provenance"]["threads"]
    assert all(row["tool"].startswith("torch.profiler") and row["not_nsys"] for row in stored["rows"])
    assert len(list((tmp_path / "traces").glob("trace-student-*-tiny.json.gz"))) == 2
    said = capsys.readouterr().out
    assert "Recorded by torch.profiler" in said and "outside of ranges" in said and "operators" in said


def test_ncu_without_ncu(tiny, tmp_path, monkeypatch, capsys):
    assert run_main(ncu, monkeypatch, tmp_path, "--only", "student") == 0
    baseline, fused = json.loads((tmp_path / "counters.json").read_text())["rows"]
    # Its nine convolutions by hand, inputs x outputs x pixels; a product counts two.
    maps = [(4, 8, 4), (8, 8, 4), *[(8, 8, 8)] * 6, (8, 1, 8)]
    assert baseline["flop"] == fused["flop"] == 3 * sum(18 * a * b * side * side for a, b, side in maps)
    assert fused["dram_bytes"] is None and fused["flop_per_second"] == fused["flop"] / fused["seconds"]
    assert "needs ncu" in capsys.readouterr().out


def test_operations_of_an_update(tiny):
    plain = ncu.counted(workloads.prepare("update", "baseline", size="tiny"))
    # The hand-written passes skip the zeros of a second derivative, and torch has no formula for our ops.
    assert 0 < ncu.counted(workloads.prepare("update", "fused", size="tiny")) < plain
    assert ncu.counted(workloads.prepare("student", "fused", size="tiny")) == 0


def pair(monkeypatch, baseline=1.0, fused=1.0, error=0.0):
    """A workload whose variants advance a fake clock by the given seconds; the fused one's result has ``error``."""
    now = [0.0]

    def prepare(variant, device, size):
        def call():
            now[0] += fused if variant == "fused" else baseline

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(workloads, "WORKLOADS", {"student": (prepare, lambda *_: ({"baseline": 0.0, "fused": error}, 1e-4))})
    monkeypatch.setattr(compare, "beside", lambda *_: {})


def test_compare_ends_with_what_it_found(tiny, tmp_path, monkeypatch, capsys):
    def ends():
        code = run_main(compare, monkeypatch, tmp_path, "--only", "student", "--repeats", "3", "--traces", str(tmp_path / "t"))
        caught = capsys.readouterr()
        return code, caught.err.splitlines()[-1], caught.out

    monkeypatch.setattr(power, "SHORTEST", 0.0)
    pair(monkeypatch, baseline=20.0, fused=2.0)
    assert ends()[0] == 0
    (row,) = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert (row["seconds"]["fused"]["median"], row["seconds"]["baseline"]["median"]) == (2.0, 20.0) and "joules" in row
    pair(monkeypatch, baseline=2.0, fused=20.0)
    code, said, shown = ends()
    assert (code, said) == (1, "student, tiny: the fused variant is slower: 2e+04 against 2000 ms")
    assert f"**{said}**" in shown
    pair(monkeypatch, error=1.0)
    code, said, _ = ends()
    assert (code, said) == (1, "student, tiny: off (baseline 0.00e+00, fused 1.00e+00; at most 1.00e-04)")
    assert "seconds" not in json.loads((tmp_path / "compare.json").read_text())["rows"][0]
    pair(monkeypatch, error=float("nan"))
    code, said, _ = ends()
    assert code == 1 and "off (" in said
    monkeypatch.setattr(workloads, "WORKLOADS", {"student": (None, lambda *_: 1 / 0)})
    code, said, _ = ends()
    assert code == 1 and "student, tiny: cannot run: ZeroDivisionError" in said
    # A profiler that exists and fails has a code of its own.
    pair(monkeypatch, baseline=2.0)
    monkeypatch.setattr(compare, "beside", lambda *_: {"not_recorded": ["fused: killed"]})
    code, said, shown = ends()
    assert (code, said) == (3, "student, tiny: fused: killed") and "Not recorded: student, tiny, fused: killed." in shown


def test_compare_measures_memory_and_launches_elsewhere(tiny, tmp_path, monkeypatch):
    process(monkeypatch, "1000\n")
    recordings = {"baseline": {"launches": 9.0, "launched": "operators"}, "fused": {"error": "no"}}
    monkeypatch.setattr(nsys, "recorded", lambda name, variant, *_: recordings[variant])
    found = compare.beside("student", "cpu", "tiny", tmp_path)
    assert found["peak_bytes"] == {"baseline": 1000, "fused": 1000} and found["launched"] == "operators"
    assert found["launches"] == {"baseline": 9.0, "fused": None} and "needs ncu" in found["dram_bytes"]["missing"]
    row = {"workload": "student", "size": "tiny", "parity": {"errors": {"baseline": 0.0, "fused": 1e-6}}, **found}
    times = {v: 0.002 - 0.001 * (v == "fused") for v in VARIANTS}
    row |= {"seconds": {v: {"median": t, "p20": t, "p80": t} for v, t in times.items()}, "flop": 3e9}
    row["joules"] = {"missing": "no counter"}
    row["seconds"]["channels_last"] = {"median": 0.0015, "p20": 0.0015, "p80": 0.0015}
    text = "\n".join(compare.lines([{"rows": [row], "complaints": [], "path": "a/b.json", "provenance": PLACE}]))
    assert "| student, tiny | 2, 1 | 2.00 x | 9, - operators | 3 | - | 0, 0 | - | 0.0e+00, 1.0e-06 |" in text
    assert "student, tiny, baseline in channels_last: 1.5 ms, 1.50 x." in text
    assert "Joules: no counter." in text and "Not recorded: student, tiny, fused: no." in text
    # Without ncu there are no bytes; if ncu exists and fails, so does the command.
    assert compare.tool_failures([row]) == ["student, tiny: fused: no"]
    monkeypatch.setattr(ncu, "missing", lambda device: None)
    monkeypatch.setattr(ncu, "count", lambda *_: {"dram_bytes": 6, "steps": 2})
    assert compare._bytes("teacher", "cuda", "digits")["dram_bytes"] == {"baseline": 150, "fused": 150}
    monkeypatch.setattr(ncu, "count", lambda *_: {"error": "no rights"})
    row |= {"not_recorded": [], **compare._bytes("student", "cuda", "tiny")}
    assert compare.tool_failures([row]) == ["student, tiny: ncu: no rights"]
    process(monkeypatch, stderr="killed", returncode=1)
    with pytest.raises(InputError, match="killed"):
        compare.beside("student", "cpu", "tiny", tmp_path)


PEAK = """
import sys, torch
from profiling.trace import workloads

def prepare(variant, device, size):
    kept = torch.ones(2**22)
    return lambda: kept.repeat(4 if variant == "baseline" else 1)

workloads.WORKLOADS = {"student": (prepare, None)}
workloads.SIZES = {**workloads.SIZES, "tiny": next(iter(workloads.SIZES.values()))}
print(workloads.peak("student", sys.argv[1], "cpu", "tiny"))
"""


def test_peak_memory_counts_what_a_unit_takes():
    """Each runs in a process of its own, as a process would reuse memory that it has freed."""
    commands = [[sys.executable, "-c", PEAK, variant] for variant in VARIANTS]
    peaks = [int(subprocess.run(c, capture_output=True, text=True, check=True, cwd=ROOT).stdout) for c in commands]
    assert peaks[0] > 4 * 2**24 and peaks[0] - peaks[1] > 2 * 2**24


def test_energy_of_packages(tmp_path):
    for name, energy in (("intel-rapl:0", 900_000), ("intel-rapl:1", 5_000_000), ("intel-rapl:0:0", 77)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{energy}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000\n" if name.endswith("0") else "9000000\n")
    joules = power.rapl(tmp_path)
    before = joules()
    assert before == pytest.approx(5.9)
    # The first counter wraps around, the second goes on; a package includes its parts.
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("5500000\n")
    assert joules() - before == pytest.approx(0.2 + 0.5)
    with pytest.raises(InputError, match="no energy counter"):
        power.rapl(tmp_path / "nowhere")
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        power.rapl(tmp_path)


def test_energy_without_nvml():
    def load(name):
        raise OSError(f"{name}: no such file")

    with pytest.raises(InputError, match=r"libnvidia-ml\.so\.1"):
        power.nvml(load)


def test_tables_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "changed", lambda name, result: [])
    (tmp_path / "d").mkdir()
    for name, module in (("traces", timeline), ("counters", ncu), ("compare", compare)):
        assert module.lines(evidence.stored(name)) == []
        (tmp_path / "d" / f"{name}.json").write_text(json.dumps({"provenance": PLACE, "complaints": [], "rows": []}))
        # Without rows there is no spread, and never an empty table.
        with pytest.raises(InputError, match="spread"):
            module.lines(evidence.stored(name))


@pytest.mark.parametrize(
    ("module", "damage", "said"),
    [
        (nsys, lambda data: b"", "unit of work"),
        (nsys, lambda data: data[: len(data) // 2], "whole SQLite export"),
        (nsys, lambda data: b"no database" * 200, "whole SQLite export"),
        (ncu, lambda data: data[: len(data) - 40], "cut off"),
        (ncu, lambda data: b'"a","b"\n"","s"\n"1","2"\n', "another one"),
    ],
)
def test_a_damaged_report_is_refused(module, damage, said, tmp_path):
    read = (lambda path: summary(nsys.read(path))) if module is nsys else lambda path: ncu.read(path.read_text())
    path = tmp_path / "report"
    if module is nsys:
        export(path)
    else:
        path.write_bytes((DATA / "raw.csv").read_bytes())
    assert read(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=said):
        read(path)


TRACE = (ROOT / "tests/data/torch/student.json.gz").read_bytes()
OTHER_JSON = (b"", b'{"traceEvents": [{', b"{}", b"[]", b'{"traceEvents": [1]}', b'{"traceEvents": [{"ph": "X"}]}')


@pytest.mark.parametrize(
    "data",
    [
        *(b"", TRACE[: len(TRACE) // 2], TRACE[:-8] + bytes(8), TRACE[:200] + b"damaged" + TRACE[207:]),
        *(gzip.compress(text, mtime=0) for text in OTHER_JSON),  # the time would be in the tests' names
    ],
)
def test_a_damaged_chrome_trace_costs_its_own_row(data, tmp_path, monkeypatch):
    def finished(words, what, **variables):
        (tmp_path / "trace-student-fused.json.gz").write_bytes(data)

    monkeypatch.setattr(torch_trace, "finished", finished)
    row = nsys.recorded("student", "fused", "cpu", "digits", 1, tmp_path)
    assert row["tool"] == "none" and "is not a whole Chrome trace" in row["error"]


def test_an_export_without_threads_is_refused(tmp_path):
    path = export(tmp_path / "report", "UPDATE NVTX_EVENTS SET globalTid = NULL;")
    with pytest.raises(InputError, match="whole SQLite export"):
        nsys.read(path)


@pytest.mark.parametrize(("module", "stored"), [(nsys, "traces.json"), (ncu, "counters.json")])
def test_a_failing_tool_ends_with_3_and_leaves_what_there_was(module, stored, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / stored).write_text("kept")
    monkeypatch.setattr(module, "missing", lambda device: None)
    process(monkeypatch, stderr="no rights", returncode=1)
    more = ["--traces", str(tmp_path)] if module is nsys else []
    assert run_main(module, monkeypatch, tmp_path, "--only", "student", *more) == 3
    caught = capsys.readouterr()
    assert (
        f"student, fused: {module.__name__.rpartition('.')[2]} ended with 1: no rights" in caught.err and "|" not in caught.out
    )
    assert (tmp_path / stored).read_text() == "kept"


def test_a_device_without_counters():
    launches = ncu.read((DATA / "raw.csv").read_text())
    # A launch without a time does not count in rates, and does not break a table.
    one, *others = launches
    found = ncu.totals([{**one, "seconds": None}, *others])
    rest = ncu.totals(others)
    assert found["flop"] > rest["flop"] and found["flop_per_second"] == rest["flop_per_second"]
    row = {"workload": "a", "size": "b", "variant": "c", **found, "kernels": ncu.by_kernel([{**one, "seconds": None}])}
    assert ncu.tables_of([row])[-2].startswith("| a, b | c | `conv_kernel` | 1 | - | - | - | - |")
    with pytest.raises(InputError, match="no counters"):
        ncu.counted_launches([{**launch, "seconds": None} for launch in launches])


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_module_runs_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "student", "neither"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("profiling.trace.workloads", run_name="__main__")
    assert ended.value.code == 2 and "invalid choice: 'neither'" in capsys.readouterr().err
