"""The harness refuses wrong results before it times anything; the tables agree with the results."""

import contextlib
import copy
import importlib.util
import json
import re
import runpy
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from advkd import Teacher
from advkd.cli.distill import method_command
from advkd.config import overlay
from advkd.data.glyphs import draw_glyphs
from advkd.errors import InputError
from advkd.evaluation.features import build_extractor
from advkd.methods.adv_kd import RECIPES
from advkd.models.shape import StudentConfig
from advkd.models.student import Student
from advkd.runtime import timing
from advkd.runtime.extension import extension_gap
from advkd.runtime.files import digest
from profiling import billion, evidence, front, harness, peers, pictures, roofline, tables
from profiling.cases import ablation
from profiling.cases import conv_block as bench_conv_block
from profiling.cases import gradient_penalty as bench_gradient_penalty
from profiling.cases import neighbours as bench_neighbours
from profiling.cases import norm_act as bench_norm_act
from profiling.cases import pair_critic as bench_pair_critic
from profiling.cases import sampler_step as bench_sampler_step
from profiling.cases import student as bench_student
from profiling.cases import teacher as bench_teacher
from profiling.gpu import bench
from profiling.harness import Case, Contestant
from profiling.limits import instruction_counts as counts
from profiling.trace import demo

from ..conftest import ROOT, conditional_student, process_environment
from ..kernels.test_fused_student_gpu import on_gpu_kernels  # noqa: F401
from ..kernels.test_student_gpu import launchers  # noqa: F401

ONES = torch.ones(3, dtype=torch.float64)


PLACE = {"device": "a processor", "commit": "0123456789", "threads": 2, "versions": {"torch": "2"}, "dirty": False}


def time(seconds):
    return {"median": seconds, "p20": 0.9 * seconds, "p80": 1.2 * seconds}


def missing():
    raise ImportError("No module named 'fast'")


def a_case():
    return Case(
        "sum",
        lambda: ONES,
        1e-6,
        [
            Contestant("exact", lambda: lambda: torch.ones(3), "ours"),
            Contestant("slow", lambda: lambda: torch.ones(300, 300, 300).mean() * torch.ones(3), "peer"),
            Contestant("off", lambda: lambda: torch.full((3,), 1.1), "peer"),
            Contestant("nan", lambda: lambda: torch.full((3,), float("nan")), "peer"),
            Contestant("absent", missing, "peer"),
        ],
        images=3,
        flop=12,
        repeats=4,
    )


def test_a_case_checks_before_it_times():
    result = harness.run_case(a_case())
    exact, slow, off, nan, absent = result["contestants"]
    assert exact["parity"]["passed"] and exact["seconds"]["repeats"] == 4
    assert exact["flop_per_second"] == 12 / exact["seconds"]["median"]
    for wrong in (off, nan):
        assert not wrong["parity"]["passed"] and "seconds" not in wrong
    assert "fast" in absent["missing"] and "seconds" not in absent
    assert result["ratio"] == slow["seconds"]["median"] / exact["seconds"]["median"] > 1
    text = harness.format_case(result)
    assert "off by 1.0e-01, not timed" in text and "cannot run: ImportError" in text
    ours = Case("ours", lambda: ONES, 1, [Contestant("broken", missing, "ours")])
    with pytest.raises(ImportError):
        harness.run_case(ours)


def test_floors_are_timed_beside_and_an_oracle_may_be_a_contestants_own():
    case = a_case()
    case.contestants = [
        *case.contestants[:2],
        Contestant("nothing", lambda: lambda: None, "floor"),
        Contestant("twice", lambda: lambda: torch.ones(30, 300, 300).mean() * torch.full((3,), 2.0), "peer", lambda: 2 * ONES),
    ]
    result = harness.run_case(case)
    exact, slow, floor, twice = result["contestants"]
    assert floor["seconds"]["repeats"] == 4 and "parity" not in floor and twice["parity"]["passed"]
    others = min(slow["seconds"]["median"], twice["seconds"]["median"])
    assert result["ratio"] == others / exact["seconds"]["median"]
    case.contestants[3].oracle = None
    assert not harness.run_case(case)["contestants"][3]["parity"]["passed"]


def no_package(name):
    def prepare():
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return prepare


def test_ours_may_lack_an_optional_package_and_nothing_else(monkeypatch):
    monkeypatch.setattr(harness, "SETTLE", 0.0)
    case = a_case()
    exact = case.contestants[0]
    case.contestants = [exact, Contestant("pipeline", no_package("no_such_package.part"), "ours")]
    result = harness.run_case(case)
    assert result["contestants"][1]["absent"] == "no_such_package" and harness.is_green(result)
    assert "No module named" in result["contestants"][1]["missing"]
    # If nothing of ours runs there is no result.
    case.contestants = case.contestants[1:]
    assert not harness.is_green(harness.run_case(case))
    # A missing name, module of our own or part of an installed package is a fault.
    for broken in (missing, no_package("advkd.nothing"), no_package("torch.nothing"), no_package(None)):
        case.contestants = [exact, Contestant("pipeline", broken, "ours")]
        with pytest.raises(ImportError):
            harness.run_case(case)
        # On a GPU the others are timed all the same.
        with monkeypatch.context() as on_gpu:
            on_gpu.setattr(harness, "captures", lambda device: True)
            assert not harness.is_green(harness.run_case(case))


def test_costly_contestants_come_last_or_not_at_all(monkeypatch):
    monkeypatch.setattr(harness, "SETTLE", 0.0)
    prepared = []

    def slow(name):
        return lambda: prepared.append(name) or (lambda: torch.ones(3))

    case = a_case()
    case.contestants = [
        Contestant("engine", slow("engine"), costly=True),
        case.contestants[0],
        Contestant("peer", slow("peer")),
    ]
    partial = harness.run_case(case, costly=False)
    assert prepared == ["peer"] and harness.is_green(partial)
    engine, exact, peer = partial["contestants"]
    assert engine["pending"] and "seconds" not in engine and exact["seconds"] and peer["seconds"] and partial["ratio"]
    result = harness.run_case(case)
    assert prepared == ["peer", "peer", "engine"]
    assert all(entry["seconds"] and "pending" not in entry for entry in result["contestants"])


def test_differences_are_found_anywhere():
    found = torch.zeros(7, 4)
    wanted = torch.zeros(7, 4, dtype=torch.float64)
    assert harness.largest_difference(found, wanted) == 0
    for row in (0, 3, 6):
        found[row, 2] = -0.5
        assert harness.largest_difference(found, wanted) == 0.5
        found[row, 2] = 0
    found[1, 1] = float("nan")
    assert not harness.largest_difference(found, wanted) <= 1
    assert harness.largest_difference(torch.zeros(1, 4), wanted) == float("inf")
    assert harness.largest_difference(torch.tensor(2.0), torch.tensor(1.0)) == 1


class OnHost:
    """Stand-in for a captured graph."""

    def __init__(self, function, units=1, grad=False):
        self.function, self.grad = function, grad
        self()

    def __call__(self):
        with torch.set_grad_enabled(self.grad):
            return self.function(0)


@pytest.fixture
def graphs_on_host(monkeypatch):
    """Makes every contestant's graph available on a CPU, as calls."""
    monkeypatch.setattr(harness, "Replay", OnHost)
    for module in (harness, bench_gradient_penalty):
        monkeypatch.setattr(module, "captures", lambda device: True)
    for module in (peers, bench_conv_block, bench_student):
        monkeypatch.setattr(module, "Replay", OnHost)
    monkeypatch.setattr(harness, "SETTLE", 0.0)
    # Each case sets the switch for itself.
    before = torch.backends.cudnn.allow_tf32
    harness.set_tf32(False)
    yield
    harness.set_tf32(before)


def test_captured_contestants_stand_beside_calls(graphs_on_host):
    prepared = []
    contestants = [
        Contestant("advkd", lambda: prepared.append(1) or (lambda: torch.ones(3)), "ours"),
        Contestant("torch", lambda: lambda: torch.ones(300, 300).mean() * torch.ones(3), "baseline"),
        Contestant("host", lambda: lambda: torch.ones(3)),
        Contestant("absent", no_package("no_such_package")),
        Contestant("copy", lambda: lambda: None, "floor"),
    ]
    case = a_case()
    case.contestants = harness.with_captured(contestants, "cuda", leave=("host",))
    result = harness.run_case(case)
    entries = {entry["name"]: entry for entry in result["contestants"]}
    assert set(entries) == {c.name for c in contestants} | {f"{n}, captured" for n in ("advkd", "torch", "absent", "copy")}
    assert len(prepared) == 1 and "missing" in entries["absent, captured"]
    assert all(("captured" in entry) == name.endswith(", captured") for name, entry in entries.items())
    kinds = [entries[f"{name}, captured"]["kind"] for name in ("advkd", "torch", "copy")]
    assert kinds == ["ours", "peer", "floor"]
    times = {name: entry["seconds"]["median"] for name, entry in entries.items() if "seconds" in entry}
    assert result["ratios"]["captured"] == times["torch, captured"] / times["advkd, captured"]
    assert result["ratios"]["calls"] == min(times["torch"], times["host"]) / times["advkd"]


def test_a_cpu_captures_nothing():
    contestants = a_case().contestants
    assert harness.with_captured(contestants, "cpu") is contestants and "ratios" not in harness.run_case(a_case())
    assert harness.captures("cuda:1") and not harness.captures("cpu")


def test_results_of_graphs_are_poisoned():
    whole, part, count = torch.ones(2), torch.ones(2, requires_grad=True) * 2, torch.ones(2, dtype=torch.int64)
    harness.poison([whole, (part, None), count])
    assert whole.isnan().all() and part.isnan().all() and (count == 1).all()


def test_red_gates_fail_and_leave_nothing(tmp_path, capsys):
    passing, failing, skipping = (tmp_path / f"test_{name}.py" for name in ("green", "red", "skip"))
    passing.write_text("def test_it():\n    pass\n")
    failing.write_text("def test_it():\n    assert False\n")
    skipping.write_text("import pytest\n\n\n@pytest.mark.skip\ndef test_it():\n    pass\n")
    built = []
    for gate in (failing, skipping):
        assert not harness.run("sums", [lambda: built.append(1)], [str(gate)], tmp_path / "out")
    assert not built and not (tmp_path / "out").exists()
    assert re.search(r"FAILED \S*test_red.py::test_it", capsys.readouterr().out)
    # A contestant that fails parity makes the run fail, but the other figures are kept.
    assert not harness.run("sums", [a_case], [str(passing)], tmp_path / "out")
    stored = harness.read("sums", tmp_path / "out")
    assert stored["cases"][0]["case"] == "sum" and stored["parity_tests"] == [str(passing)]
    # Another case joins the stored ones.
    assert harness.run(
        "sums", [lambda: Case("other", lambda: ONES, 1, a_case().contestants[:1])], [str(passing)], tmp_path / "out"
    )
    stored = harness.read("sums", tmp_path / "out")
    assert [case["case"] for case in stored["cases"]] == ["sum", "other"]
    known = {"commit", "dirty", "device", "driver", "cuda", "threads", "versions"}
    assert known <= set(stored["provenance"]) and stored["provenance"]["versions"]["torch"] == torch.__version__


def test_contestants_take_turns():
    order = []
    times = timing.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=1)
    rounds = [sorted(order[i : i + 2]) for i in range(0, 8, 2)]
    assert rounds == [["a", "b"]] * 4 and len(order) == 8
    order.clear()
    timing.measure({"a": lambda: order.append("a")}, repeats=2, warmup=0, settle=1e-4)
    assert order == ["a"] * 4
    assert all(t["p20"] <= t["median"] <= t["p80"] and t["repeats"] == 3 for t in times.values())


def test_benchmarks_gate_on_tests_that_exist():
    gates = [*bench_student.PARITY_TESTS, *bench_teacher.PARITY_TESTS, *bench_sampler_step.PARITY_TESTS]
    assert len(gates) >= 5 and all((ROOT / gate).exists() for gate in gates)


def test_small_benchmark_runs(tmp_path):
    case = bench_student.case("digits", 1)
    case.contestants, case.repeats = case.contestants[:3], 2
    result = harness.run_case(case)
    assert all(entry["parity"]["passed"] for entry in result["contestants"])
    # 2 x 9 x (inputs x outputs x pixels) of the digits preset, by hand.
    maps = [(64, 96, 4), (96, 96, 4), *[(96, 96, 8)] * 4, (96, 64, 16), *[(64, 64, 16)] * 3, (64, 32, 32), *[(32, 32, 32)] * 3]
    maps += [(32, 24, 32), *[(24, 24, 32)] * 5, (24, 16, 32), *[(16, 16, 32)] * 3, (16, 1, 32)]
    assert result["flop"] == sum(18 * a * b * side * side for a, b, side in maps)


def test_the_case_of_a_student_that_is_told_classes():
    """Everybody does the whole work: flat noise and class numbers in, the embedding and the detail bands included."""
    case = bench_student.case("glyphs", 3)
    student = bench_student.plausible_student("glyphs")
    z, labels = student.latents(3, seed=1), torch.arange(3)
    with torch.no_grad():
        assert torch.equal(case.oracle(), copy.deepcopy(student).double()(z.double(), labels=labels))
        for by_hand in (False, True):
            network = bench_student.Told(student.fuse("reference", tune=False), by_hand, True)
            assert (network.double()(z.double(), labels) - case.oracle()).abs().max() <= 1e-5
    case.contestants = [c for c in case.contestants if c.name != "ncnn" and not c.name.startswith("torch.compile")]
    case.repeats = 2
    result = harness.run_case(case)
    ran = [entry for entry in result["contestants"] if "parity" in entry]
    assert [e["kind"] for e in ran[:3]] == ["ours", "baseline", "peer"] and all(e["parity"]["passed"] for e in ran)
    # 2 x 9 x (inputs x outputs x pixels): 3 channels of noise and 8 of the class first, 9 detail channels before up-sampling.
    maps = [(11, 96, 4), (96, 96, 4), (105, 96, 8), *[(96, 96, 8)] * 3, (105, 64, 16), *[(64, 64, 16)] * 3]
    maps += [
        (73, 32, 32),
        *[(32, 32, 32)] * 3,
        (32, 24, 32),
        *[(24, 24, 32)] * 5,
        (24, 16, 32),
        *[(16, 16, 32)] * 3,
        (16, 3, 32),
    ]
    assert result["flop"] == 3 * sum(18 * a * b * side * side for a, b, side in maps)
    # Results of before, which lack the case, and those with it make tables alike.
    stored = evidence.stored("bench_student")[0]
    more = {**stored, "cases": [*stored["cases"], {**result, "ratio": 1.0}]}
    before, after = (bench_student.TABLES["student"].of(found) for found in (stored, more))
    assert after[:-1] == before and after[-1].startswith("| glyphs, batch 3, float32 |")
    assert {f"glyphs, batch {n}, {dtype}" for n in (1, 16, 64) for dtype in ("float32", "bfloat16")} <= set(
        bench_student.cases("cpu")
    )


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_unknown_case_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--only", "no-such"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("profiling.cases.student", run_name="__main__")
    assert ended.value.code == 2 and "no such case" in capsys.readouterr().err


def test_a_sweep_takes_its_own_options(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "gate", lambda name, tests: True)
    plain, other = {"num": 3, "processes": 1}, {"num": 12, "processes": 1}
    for words, wanted in (([], plain), (["--num", "12"], other)):
        sweeps = {"one": harness.Sweep("one", lambda **found: found, [], options=plain)}
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), *words])
        with pytest.raises(SystemExit) as ended:
            harness.main(sweeps)
        stored = json.loads((tmp_path / "one.json").read_text())
        assert ended.value.code == 0 and {key: stored[key] for key in plain} == wanted
    assert bench_student.SWEEPS["precision"].options == {"num": 2000, "processes": 1}


RATED = {"batch": 1, "rows": {"engine": time(0.36)}}
SMALL_SWEEPS = {
    "layers": (bench_student, {"SHAPES": {"digits": (1,)}, "PLANS": 1}),
    "scaling": (
        bench_student,
        {"SHAPES": {"digits": (1,)}, "GROWN": ("digits",), "BATCHES": (1, 2), "SIZES": (32, 64), "FIRST_IMAGES": 1},
    ),
    "step_scaling": (bench_sampler_step, {"BATCHES": (1, 2), "SIZES": (8, 16)}),
    "penalty_scaling": (bench_gradient_penalty, {"BATCHES": (1, 2), "RESOLUTIONS": (8, 16), "DEPTHS": (1, 2), "PROCESSES": 1}),
    "roofline": (roofline, {"STREAM_BYTES": (2**20,), "SIDE": 8, "MATRIX": 16}),
    "billion": (billion, {"student_seconds": lambda *given: RATED, "teacher_seconds": lambda *given: {**RATED, "missing": {}}}),
}
"""Name of a sweep -> its module, and what makes it small."""


@pytest.mark.skipif(extension_gap("cpu") is not None, reason="the extension is not built")
@pytest.mark.parametrize("name", SMALL_SWEEPS)
def test_a_sweep_stores_its_figures_and_their_plot(name, tmp_path, monkeypatch):
    module, small = SMALL_SWEEPS[name]
    for key, value in small.items():
        monkeypatch.setattr(module, key, value)
    monkeypatch.setattr(roofline, "device_folder", lambda device: evidence.RESULTS / "amd-epyc-avx512")
    monkeypatch.setattr(bench_student, "THREADED", (("digits", 1),))
    monkeypatch.setattr(bench_student, "GROWN", ("digits",))
    monkeypatch.setattr(bench_gradient_penalty, "SIZES", [("narrow", 8, 2)])
    plain = lambda calls, repeats, warmup=0: timing.measure(calls, 2, warmup=1)  # noqa: E731
    for measured in (bench_student, bench_sampler_step, bench_gradient_penalty):
        monkeypatch.setattr(measured, "measure", plain)
    monkeypatch.setattr(harness, "gate", lambda name, tests: False)
    (chosen,) = [found for found in module.SWEEPS.values() if found.name == name]
    assert not chosen.run(tmp_path) and not list(tmp_path.iterdir())
    monkeypatch.setattr(harness, "gate", lambda name, tests: all((ROOT / test).exists() for test in tests))
    assert chosen.run(tmp_path)
    stored = json.loads((tmp_path / f"{name}.json").read_text())
    known, *_ = evidence.stored(name)  # of every machine
    assert set(stored) == set(known) - {"path", "changed"} | {"parity_tests"} and stored["provenance"]["kernels"]
    assert (tmp_path / f"{name}.png").exists() == (chosen.plot is not None)


def test_a_sweep_shows_its_pages_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "gate", lambda name, tests: True)
    modules = (bench_student, bench_gradient_penalty, bench_neighbours, roofline, billion)
    sweeps = [sweep for module in modules for sweep in module.SWEEPS.values()]
    assert all(sweep.tables for sweep in sweeps)
    for sweep in sweeps:
        (known,) = evidence.stored(sweep.name)
        monkeypatch.setattr(harness, "provenance", lambda device, place=known["provenance"]: place)
        assert harness.Sweep(sweep.name, lambda: known, [], sweep.tables).run(tmp_path)
        shown, page = capsys.readouterr().out, "\n".join(path.read_text() for path in [*tables.PAGES, tables.BILLION])
        rows = [line for line in shown.splitlines() if line.startswith("| ")]
        assert len(rows) > 1 and all(row in page for row in rows[1:]), sweep.name


@pytest.mark.parametrize("name", list(ablation.ROWS))
def test_every_row_of_the_ablation_is_a_recipe(name):
    program, command, *arguments = ablation.command(name, ["paths"], "out")
    assert (program, command) == ("advkd", "distill")
    values = method_command("adv-kd").make_context("distill", arguments).params
    for key in ("trajectories", "teacher", "preset", "init", "out", "config_file", "resume", "device"):
        values.pop(key)
    config = overlay(RECIPES[values.pop("recipe") or "joint"], values, "distill")
    config.validate(12, True, 8192)
    if shape := ablation.student_shape(name):
        StudentConfig(**shape)
    if config.recipe == "joint":
        assert (config.updates, config.batch_sizes) == ((400,), (32,))


def test_a_kept_row_of_an_ablation_made_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "Trajectories", lambda *folders: types.SimpleNamespace(manifests=[*folders]))
    line = " ".join(ablation.command("no EMA", ["paths"], "no-ema"))
    kept = {"name": "no EMA", "command": line, "num": 5, "student": None, "manifests": ["a"], "frechet": 1.0}
    (tmp_path / "no-ema.json").write_text(json.dumps(kept))
    ablation.run_row("no EMA", ["a"], None, tmp_path, 5)
    with pytest.raises(InputError, match="no-ema.json was made with another num, manifests: name another --out"):
        ablation.run_row("no EMA", ["b"], None, tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["no-ema.json"]


def test_pages_hold_the_results():
    """README and site equal the generator's output for the results; every table stands on one page."""
    texts = [page.read_text() for page in tables.PAGES]
    marked = [name for text in texts for name in re.findall(r"<!-- (?:table|figure): (\w+) -->", text)]
    assert {*tables.TABLES, *tables.FIGURES} == set(marked)
    twice = {name for name in marked if marked.count(name) > 1}
    assert twice == {"methods", "gpu_state"}, "README and site share these alone"
    for path, text in tables.pages().items():
        assert path.read_text() == text, f"{path}: python -m profiling.tables"
    text = (tables.SITE / "evaluation.md").read_text()
    table = text[text.index("<!-- table: evaluation -->") :]
    figure = re.search(r"\d\.\d{3}", table)[0]
    wrong = text.replace(figure, "9.999")
    assert (
        wrong != text
        and "9.999" not in tables.filled(wrong)[text.index("<!-- table: evaluation -->") :].split("<!-- end -->")[0]
    )


def test_a_figure_without_a_result_is_refused(monkeypatch):
    monkeypatch.setattr(tables, "stored", lambda name: [])
    with pytest.raises(InputError, match="a page states a figure of demo.json, which no device has: restore it"):
        tables.FIGURES["demo_seconds"]()


def test_a_figure_without_evidence_is_refused():
    """Evidence is commit, device, versions, unchanged sources and a spread, for the result and each of its cases."""
    result = {"path": "profiling/results/a/b.json", "provenance": PLACE}
    first, _ = evidence.source(result, [time(1.0), [1.0, 2.0, 3.0]])
    assert first.startswith("[`b.json`](profiling/results/a/b.json): a processor, 2 threads, torch 2; commit 01234567; ")
    assert "-30 to +35 % typically, 50 % at most" in first
    assert evidence.figure(result, [time(1.0)], "3 ms") == "[3 ms](profiling/results/a/b.json)"
    assert "in the table" in evidence.source(result, (), "intervals are in the table")[0]
    for gap in ("commit", "device", "versions"):
        without = {**result, "provenance": {**PLACE, gap: None}}
        for refused in (without, {**result, "cases": [without]}):
            with pytest.raises(InputError, match=gap):
                evidence.source(refused, [time(1.0)])
    with pytest.raises(InputError, match="changed sources"):
        evidence.figure({**result, "provenance": {**PLACE, "dirty": True}}, [time(1.0)], "3 ms")
    for times in ([], [1.0], [[1.0]], [{"median": 1.0}]):
        with pytest.raises(InputError, match="spread"):
            evidence.source(result, times)
        with pytest.raises(InputError, match="spread"):
            evidence.figure(result, times, "3 ms")


def test_the_evaluation_is_of_the_shipped_student():
    (result,) = evidence.stored("evaluation")
    assert result["student"]["weights_sha256"] == digest(Student.from_pretrained("digits").state_dict())
    assert result["extractor_sha256"] == build_extractor("digits").identity and result["known_unseen"]


def test_results_have_provenance_and_green_gates():
    paths = list(harness.RESULTS.glob("*/*.json"))
    assert len(paths) >= 4
    stored = [(path, json.loads(path.read_text())) for path in paths]
    stored += [(counts.BASELINE, result) for result in counts.stored().values()]
    for path, result in stored:
        for where in (result["provenance"], *(case["provenance"] for case in result.get("cases", []))):
            assert where["commit"] and where["device"] and where["dirty"] is False
        for case in result.get("cases", []) if path.stem != "roofline" else ():
            if path.stem == "bench_student":
                # A peer that could not run, or failed parity, would make the ratio to the fastest one worthless.
                assert len(case["contestants"]) >= 6 and all("seconds" in entry for entry in case["contestants"])
            ours = [entry for entry in case["contestants"] if entry["kind"] == "ours"]
            assert ours and all(entry["parity"]["error"] <= entry["parity"]["tolerance"] and entry["seconds"] for entry in ours)


def test_what_the_project_set_out_for_is_in_the_results():
    """On every measured machine the fused workloads beat their baselines, and a demo's time is in its networks."""
    for result in evidence.stored("compare"):
        assert not result["complaints"] and {row["workload"] for row in result["rows"]} == {"student", "teacher", "update"}
        for row in result["rows"]:
            assert row["parity"]["passed"] and row["seconds"]["fused"]["median"] < row["seconds"]["baseline"]["median"]
    for name in ("traces", "counters"):
        for result in evidence.stored(name):
            assert len({(row["workload"], row["variant"]) for row in result["rows"]}) == 6
            assert not any("error" in row for row in result["rows"])
    results = evidence.stored("demo")
    assert results and not any(demo.complaints(result) for result in results)


def test_a_result_of_older_kernels_is_stale():
    result = {"provenance": {"kernels": evidence.cpu_digests()}, "cases": []}
    assert evidence.changed("bench_norm_act", result) == []
    result["cases"] = [{"provenance": {"kernels": {**result["provenance"]["kernels"], "norm_act": "0"}}}]
    assert evidence.changed("bench_norm_act", result) == ["norm_act"] and not evidence.changed("layers", result)
    assert evidence.changed("bench_norm_act", {"provenance": {}}) == ["norm_act"]
    stale = {"path": "a/b.json", "provenance": PLACE, "changed": ["norm_act"]}
    assert evidence.source(stale, [time(1.0)])[0].startswith("**Stale**, measured before")
    # On a GPU other kernels run; a part of a whole run keeps their digests beside its provenance.
    now = evidence.gpu_digests()
    part = {"provenance": {"device": "a card"}, "kernels": now, "result": {}}
    assert evidence.changed("gpu_bench_student", part) == []
    part["kernels"] = {**now, "cuda conv_pair": "0", "triton norm_act": "0"}
    assert evidence.changed("gpu_bench_student", part) == ["cuda conv_pair"]
    assert evidence.changed("bench_norm_act_cuda", part) == ["triton norm_act"]
    assert "cuda sampler_step" in evidence.changed("traces", {"provenance": {"driver": "1", "kernels": {}}})
    # A header's change is its kernels' change.
    texts = {"csrc/cpu/a.cpp": '#include "cpu/b.h"\n', "csrc/cpu/b.h": "one"}
    before = evidence._digest(["csrc/cpu/a.cpp"], texts.get)
    assert evidence._digest(["csrc/cpu/a.cpp"], {**texts, "csrc/cpu/b.h": "two"}.get) != before
    assert set(evidence.cpu_digests()) == {name for kernels in evidence.MEASURED.values() for name in kernels}


def test_parts_name_the_modules_that_measure_them():
    known = {name: evidence.module_of(name) for name in (*bench.QUICK, *evidence.ELSEWHERE)}
    assert known["bench_student"] == "profiling.cases.student" and known["ncu"] == "profiling.trace.ncu"
    assert all(map(importlib.util.find_spec, known.values()))


def test_a_point_stands_below_the_tighter_ceiling():
    limits = {"flops": {"float32": 1e12}, "bandwidth": 1e11}
    point = {"name": "a: b", "dtype": "float32", "flop": 1e12, "moved_bytes": 1e9, "seconds": {"median": 2.0}}
    figures = {"bound": "products", "fraction": 0.5, "intensity": 1000}
    assert roofline.limited(point, limits) == {**point, **figures}
    point |= {"flop": 0, "moved_bytes": 1e11, "seconds": {"median": 4.0}}
    assert roofline.limited(point, limits) == {**point, "bound": "memory", "fraction": 0.25, "intensity": 0}


def test_the_roofline_of_stored_results(tmp_path):
    """Points of the committed benchmarks, and a plot in both formats."""
    folder = harness.RESULTS / "amd-epyc-avx512"
    limits = {"flops": {"float32": 2e11, "bfloat16": 4e11}, "bandwidth": 2e10}
    found, places = roofline.points(folder, limits["flops"])
    assert places and all(place["commit"] for place in places)
    assert {p["dtype"] for p in found} == {"float32", "bfloat16"} and len(found) > 20
    roofline.plot({"points": found, "ceilings": limits, "provenance": PLACE}, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"


def test_points_of_a_gpu_and_of_earlier_kernels(tmp_path):
    """A GPU's cases come from its own command and from the whole run's part; points of other kernels are labelled."""
    entry = {"name": "advkd", "kind": "ours", "seconds": time(0.5)}
    case = {"case": "digits, bfloat16", "flop": 8, "moved_bytes": 2, "contestants": [entry], "provenance": PLACE}
    alone = {"cases": [case], "provenance": {**PLACE, "driver": "1"}}
    items = {case["case"]: {**case, "flop": None}}
    part = {"result": {"items": items, "wanted": list(items)}, "provenance": PLACE, "kernels": evidence.gpu_digests()}
    for name, stored in (("bench_student_cuda", alone), ("gpu_bench_norm_act", part)):
        (tmp_path / f"{name}.json").write_text(json.dumps(stored))
    found, places = roofline.points(tmp_path, ["float32", "bfloat16"])
    assert [tuple(p[key] for key in ("name", "dtype", "flop", "moved_bytes")) for p in found] == [
        ("student: digits, bfloat16, earlier kernels", "bfloat16", 8, 2),
        ("norm_act: digits, bfloat16", "bfloat16", 0, 2),
    ]
    assert places == [PLACE]


def test_copies_and_ops_have_times(monkeypatch):
    """Every copy and every op with a point of its own under the roofline runs, at small sizes."""
    monkeypatch.setattr(roofline, "STREAM_BYTES", (2**20,))
    found = roofline.streams()
    assert found["copy of 1 MiB"][0] == 2**21
    if extension_gap("cpu") is None:
        moved, call = found["two of 1 MiB into a third"]
        x, m, y = call.args[0], call.args[1], call.keywords["out"]
        call()
        assert moved == 3 * 2**20 and torch.equal(y, x + m)
    monkeypatch.setattr(roofline, "SIDE", 8)
    found = roofline.op_points("cpu")
    assert len(found) == 6 and all(p["moved_bytes"] > 0 and p["seconds"]["median"] > 0 for p in found)
    monkeypatch.setattr(roofline, "MATRIX", 16)
    limits = roofline.ceilings("cpu")
    assert set(limits["flops"]) == {"float32", "bfloat16"} and limits["bandwidth"] > 0 and len(limits["samples"]) >= 3


def test_the_cost_of_a_billion_images():
    """Hours are seconds per image times a billion, dollars those times the price of all cores."""
    result = {"kind": "cpu", "provenance": {**PLACE, "threads": 4}, "student": {"batch": 8, "rows": {"s": time(0.36)}}}
    result["teacher"] = {"batch": 1, "rows": {"slow": time(20.0), "fast": time(3.6)}}
    text = billion.page([{**result, "path": "profiling/results/a/billion.json"}])
    assert "| teacher, DDIM-50 (fast) | 180 | 50,000,000 | 10,000,000 | 500.0 x |" in text
    assert "| student, s | 0.36 | 100,000 | 20,000 | 1.0 x |" in text and "No GPU has been measured yet." in text


class CountedProducts(TorchDispatchMode):
    """Multiply-adds of the convolutions and matrix products that torch runs."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        count = flop_registry.get(function._overloadpacket)
        self.total += count(*arguments, **(keywords or {}), out_val=result) // 2 if count else 0
        return result


@pytest.mark.parametrize("update", [False, True])
def test_the_work_bound_of_the_penalty_matches_torch(update):
    bench = bench_gradient_penalty
    critic, real, fake, a = bench.problem("narrow", 16, 2)
    found = []
    for backend in ("reference", "autograd"):
        with CountedProducts() as counted:
            if update:
                bench.critic_gradients(critic, real, fake, a=a, backend=backend)
            else:
                bench.penalty_only(critic, real)(backend)
        found.append(counted.total / 2)
    # Some of the last linear map's passes are not needed.
    slack = 3 * critic.tail[3].weight.numel()
    assert all(abs(count - stated) <= slack for count, stated in zip(found, bench.work(critic, 16, update)))


def test_the_penaltys_contestants_agree(monkeypatch):
    monkeypatch.setitem(bench_gradient_penalty.WIDTHS, "tiny", {"channels": 4, "max_channels": 8})
    for update in (False, True):
        case = bench_gradient_penalty.case(update, "tiny", 8, 3, "cpu")
        case.contestants = [c for c in case.contestants if "compile" not in c.name]
        case.repeats = 1
        result = harness.run_case(case)
        assert len(result["contestants"]) == 4 and all(c["parity"]["passed"] for c in result["contestants"])
        assert 1 < result["work_bound"] < 1.5


@pytest.mark.parametrize("penalised", [True, False])
def test_contestants_of_a_critic_of_pairs_agree(penalised, monkeypatch):
    monkeypatch.setattr(bench_pair_critic, "SHAPES", {"tiny": (4, 8, 3)})
    monkeypatch.setattr(bench_pair_critic, "SIZE", 8)
    case = bench_pair_critic.case("tiny", penalised, "cpu")
    case.repeats = 1
    result = harness.run_case(case)
    assert len(result["contestants"]) == 3 and all(c["parity"]["passed"] for c in result["contestants"])
    # The penalty is part of what is compared.
    given = bench_pair_critic.problem(4, 8, 3, dtype=torch.float64)
    own, plain = (torch.cat([g.flatten() for g in bench_pair_critic.update("autograd", w, *given)()]) for w in (0.75, 0.0))
    assert torch.equal(case.oracle(), (own if penalised else plain) / (own if penalised else plain).norm())


def sampler_step_case(name):
    if name in bench_sampler_step.HISTORIES:
        return bench_sampler_step.with_history("cpu", name)
    return getattr(bench_sampler_step, name)("cpu", *((2,) if name == "pooled" else ()))


def penalty_case(update):
    return bench_gradient_penalty.case(update, "tiny", 8, 3, "cpu", tf32=update)


def student_case(peers):
    return bench_student.case("digits", 1, "bfloat16", peers, device="cpu")


GPU_CASES = {
    **{
        f"sampler_step, {name}": (sampler_step_case, name)
        for name in ("deterministic", "noisy", "pooled", *bench_sampler_step.HISTORIES)
    },
    "penalty": (penalty_case, False),
    "update": (penalty_case, True),
    "norm_act": (lambda upsample: bench_norm_act.case(upsample, torch.float32, "cpu"), False),
    "norm_act, up-sampling": (lambda upsample: bench_norm_act.case(upsample, torch.bfloat16, "cpu"), True),
    "student": (student_case, "all"),
    "conv_block": (lambda name: bench_conv_block.case(name, 1, "bfloat16", device="cpu"), "one layer"),
}


@pytest.mark.parametrize("name", GPU_CASES)
def test_cases_of_a_gpu_on_the_host(name, graphs_on_host, on_gpu_kernels, monkeypatch):  # noqa: F811
    """Every benchmark's contestants for a GPU at small sizes: all are green or lack a package; TF32 is recorded."""
    monkeypatch.setattr(bench_sampler_step, "SHAPE", (2, 3, 8, 8))
    monkeypatch.setattr(bench_norm_act, "SHAPE", (2, 4, 8, 8))
    monkeypatch.setitem(bench_gradient_penalty.WIDTHS, "tiny", {"channels": 4, "max_channels": 8})
    monkeypatch.setattr(bench_conv_block, "CHAINS", {"one layer": ("digits", 7, 1)})
    monkeypatch.setattr(bench_conv_block, "sets_beyond_cache", lambda moved, device: 1)
    monkeypatch.setattr(bench_conv_block, "measure_events", lambda calls, repeats: {n: {"median": 1.0 + n} for n in calls})
    build, argument = GPU_CASES[name]
    case = build(argument)
    # Contestants that compile slowly have tests of their own.
    case.contestants, case.repeats = [c for c in case.contestants if "compile" not in c.name], 1
    result = harness.run_case(case)
    entries = result["contestants"]
    assert harness.is_green(result)
    absent = {entry["absent"] for entry in entries if "missing" in entry}
    assert absent <= {"diffusers", "cudnn", "tensorrt"} and all("absent" in e for e in entries if "missing" in e)
    assert ("diffusers" in absent) == (name.startswith("sampler_step") and importlib.util.find_spec("diffusers") is None)
    if name != "conv_block":
        sides = {(entry["kind"], "captured" in entry) for entry in entries if "seconds" in entry}
        assert {("ours", False), ("ours", True)} <= sides and ({("peer", True)} <= sides or "diffusers" in absent)
        assert {("floor", False), ("floor", True)} <= sides or name in ("penalty", "update")
    if not name.startswith("sampler_step"):
        assert result["tf32"] is torch.backends.cudnn.allow_tf32 is (name == "update")


def test_our_engines_for_a_gpu_are_told_the_classes(on_gpu_kernels, monkeypatch):  # noqa: F811
    student = conditional_student(detail_noise=True)
    monkeypatch.setattr(bench_student, "_plausible_once", lambda preset: student)
    case = bench_student.case("with classes", 2, "bfloat16", "all", device="cpu")
    case.contestants, case.repeats = [one for one in case.contestants if one.name == "advkd, cuda"], 1
    result = harness.run_case(case)
    assert harness.is_green(result) and ["seconds" in entry for entry in result["contestants"]] == [True]


WITHOUT = """
import sys
sys.modules["diffusers"] = None
import pytest
sys.exit(pytest.main(["-q", "-n0", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_gpu_benchmarks_and_tests_without_diffusers():
    """A machine without diffusers can run cases of every benchmark, and the tests of a recording."""
    chosen = ["tests/profiling/test_profiling.py::test_cases_of_a_gpu_on_the_host"]
    chosen += ["tests/system/test_teacher.py::test_a_recording_keeps_averages_of_the_path"]
    command = [sys.executable, "-c", WITHOUT, "-m", "not slow", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=process_environment(), capture_output=True, text=True, timeout=600)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    assert done.returncode == 0 and counts["passed"] >= len(GPU_CASES) + 2, done.stdout[-3000:]


def test_alpha_bars_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for scheduler in (diffusers.DDIMScheduler(), diffusers.DDPMScheduler()):
        assert torch.equal(bench_sampler_step.alpha_bars(), scheduler.alphas_cumprod)


def test_oracles_are_shared_by_the_cases_of_a_batch(on_gpu_kernels, monkeypatch):  # noqa: F811
    asked, oracle = [], bench_student._oracle
    monkeypatch.setattr(bench_student, "_oracle", lambda *given, **words: asked.append(1) or oracle(*given, **words))
    bench_student._oracle_once.cache_clear()
    cases = [bench_student.case("digits", 3, dtype, "all", device="cpu") for dtype in ("bfloat16", "float32")]
    assert len(asked) == 1 and torch.equal(cases[0].oracle(), cases[1].oracle()) and cases[0].oracle().dtype == torch.float64
    z = torch.randn(5, 7, dtype=torch.float64)
    assert torch.equal(oracle(torch.sin, z, images=2), z.sin())
    bench_student._oracle_once.cache_clear()


def test_costly_peers_come_last():
    for selection, chosen in bench_student.PEERS.items():
        costly = [peer.costly for peer in chosen]
        assert costly == sorted(costly) and len({peer.name for peer in chosen}) == len(chosen), selection


class CudnnTensor:
    """A tensor in a :class:`CudnnGraph`."""

    def __init__(self, compute=None, dim=None, stride=None):
        self.compute, self.dim, self.stride, self.output = compute, dim, stride, False

    def set_output(self, output):
        self.output = output
        return self

    def set_data_type(self, kind):
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self


class CudnnGraph:
    """Stand-in for cuDNN's graphs in PyTorch: a tensor is a function of the inputs' values."""

    made = []

    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert handle == "handle" and compute_data_type == intermediate_data_type == "float"
        self.built, self.notes = [], []
        CudnnGraph.made.append(self)

    def tensor(self, dim, stride, data_type, name):
        found = CudnnTensor(dim=dim, stride=stride)
        found.compute = lambda given: given[found].float()
        return found

    def conv_fprop(self, x, weight, padding, stride, dilation):
        assert (padding, stride, dilation) == ([1, 1], [1, 1], [1, 1])
        return CudnnTensor(lambda given: torch.conv2d(x.compute(given), weight.compute(given), padding=1))

    def conv_dgrad(self, loss, weight, padding, stride, dilation):
        assert (padding, stride, dilation) == ([1, 1], [2, 2], [1, 1])
        return CudnnTensor(lambda g: torch.conv_transpose2d(loss.compute(g), weight.compute(g), stride=2, padding=1))

    def bias(self, x, bias):
        return CudnnTensor(lambda given: x.compute(given) + bias.compute(given))

    def leaky_relu(self, x, slope):
        return CudnnTensor(lambda given: torch.nn.functional.leaky_relu(x.compute(given), slope))

    def tanh(self, x):
        return CudnnTensor(lambda given: torch.tanh(x.compute(given)))

    def validate(self):
        pass

    def build_operation_graph(self):
        pass

    def create_execution_plans(self, modes):
        assert modes == ["A", "fallback"]

    def check_support(self):
        pass

    def deselect_numeric_notes(self, notes):
        self.notes = notes

    def get_execution_plan_count(self):
        return 6

    def build_plan_at_index(self, plan):
        if plan == 0:
            raise RuntimeError("Deselecting execution plan")
        self.built.append(plan)

    def get_workspace_size_plan_at_index(self, plan):
        return 16 * plan

    def execute_plan_at_index(self, given, workspace, plan, handle):
        assert plan in self.built and workspace.nbytes == 16 * plan and handle == "handle"
        for tensor, value in given.items():
            if value.ndim == 4:
                assert tuple(tensor.dim) == value.shape and value.is_contiguous(memory_format=torch.channels_last)
                assert all(n == 1 or s == t for n, s, t in zip(tensor.dim, tensor.stride, value.stride()))
        (output,) = (tensor for tensor in given if tensor.output)
        given[output].copy_(output.compute({k: v.view(1, -1, 1, 1) if v.ndim == 1 else v for k, v in given.items()}))


@pytest.fixture
def cudnn_on_host(monkeypatch):
    """Stand-in for cuDNN's module, with PyTorch behind it; plan 2 is the fastest."""
    module, streams = types.ModuleType("cudnn"), []
    module.data_type = types.SimpleNamespace(BFLOAT16="bf16", HALF="half", FLOAT="float")
    module.heur_mode = types.SimpleNamespace(A="A", FALLBACK="fallback")
    module.numerical_note = types.SimpleNamespace(TENSOR_CORE="tensor core", DOWN_CONVERT_INPUTS="narrow")
    module.pygraph, module.set_stream = CudnnGraph, lambda handle, stream: streams.append(stream)
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(peers, "_cudnn_handle", lambda device: "handle")
    monkeypatch.setattr(peers, "_stream", lambda device: 7)
    monkeypatch.setattr(CudnnGraph, "made", [])

    def measured(calls, repeats, device):
        assert list(calls) == [1, 2, 3]
        return {plan: {"median": abs(plan - 2), "value": call()} for plan, call in calls.items()}

    monkeypatch.setattr(peers, "measure_events", measured)
    return streams


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_graph_of_cudnn_is_the_network(dtype, transposed, graphs_on_host, cudnn_on_host):
    """Layer by layer with PyTorch in cuDNN's place: shapes, strides, weights, activations; equal layers share their plan."""
    student = bench_student.plausible_student("digits")
    folded = bench_student.Folded(student.fuse("reference", tune=False), transposed, inplace=True)
    x = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = folded.double()(x.double())
    replay = peers.cudnn_graph(folded.float(), x, dtype)
    found = replay()
    assert found.dtype == dtype and set(cudnn_on_host) == {7}
    # Weights and every layer's result are rounded.
    assert (found - wanted).abs().max() <= (1e-4 if dtype == torch.float32 else 0.1)
    graphs = CudnnGraph.made
    assert len(graphs) == len(folded.convolutions) and {tuple(graph.built) for graph in graphs} == {(1, 2, 3), (2,)}
    assert all(bool(graph.notes) == (dtype == torch.float32) for graph in graphs)


def test_a_layer_without_a_plan_is_reported(graphs_on_host, cudnn_on_host, monkeypatch):
    monkeypatch.setattr(CudnnGraph, "get_execution_plan_count", lambda graph: 1)
    layer = torch.nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"no plan for \(8, 8, 3, 3\) at \(1, 8, 4, 4\): Deselecting"):
        peers.CudnnLayer(layer, torch.zeros(1, 8, 4, 4), 0.2)


@pytest.mark.gpu
def test_graphs_of_gradients():
    """A replay gives what the calls give, and writes it."""
    x = torch.randn(64, device="cuda", requires_grad=True)
    replay = harness.Replay(lambda i: torch.autograd.grad((x**3).sum(), x)[0], grad=True)
    assert replay.results[0].isnan().all()
    assert torch.allclose(replay(), 3 * x.detach() ** 2)


class Stream:
    """Stand-in for ``torch.cuda.Stream``."""

    current = None

    def wait_stream(self, other):
        pass


@contextlib.contextmanager
def failing_capture(graph, stream):
    """Stand-in for ``torch.cuda.graph`` whose capture cannot end: its own stream stays the current one."""
    Stream.current = stream
    yield
    raise RuntimeError("operation failed due to a previous error during capture")


def test_a_capture_that_fails_leaves_the_callers_stream(monkeypatch):
    caller, modes = Stream(), []
    places = {"Stream": Stream, "stream": contextlib.nullcontext, "graph": failing_capture, "CUDAGraph": object}
    places |= {"current_stream": lambda: Stream.current, "set_stream": lambda stream: setattr(Stream, "current", stream)}
    for name, place in places.items():
        monkeypatch.setattr(torch.cuda, name, place)
    monkeypatch.setattr(Stream, "current", caller)
    for grad in (False, True):
        with pytest.raises(RuntimeError, match="previous error"):
            harness.Replay(lambda i: modes.append(torch.is_grad_enabled()), grad=grad)
        assert Stream.current is caller and modes[-4:] == [grad] * 4


def timed(name, kind, milliseconds):
    return {"name": name, "kind": kind, "seconds": time(1e-3 * milliseconds)}


def test_the_readmes_speed_table(monkeypatch):
    """Our fastest against the fastest of the others, of kernels as they are before others; without a time, no figure."""

    def given(name):
        return results

    monkeypatch.setattr(front, "WORK", (("some work", "bench", "a case", given), ("other work", "bench", "b case", given)))
    contestants = [
        timed("slow", "ours", 3.0),
        timed("quick", "ours", 2.0),
        timed("peer", "peer", 5.0),
        timed("copy", "floor", 1.0),
    ]
    old = {"path": "profiling/results/a/b.json", "provenance": PLACE, "changed": ["philox"]}
    new = {"path": "profiling/results/c/b.json", "provenance": {**PLACE, "capability": "AVX2"}, "changed": []}
    slower = [timed("quick", "ours", 200.0), timed("peer", "peer", 1500.0)]
    alone = {"case": "b case", "contestants": [timed("quick", "ours", 2.0)]}
    results = [
        {**old, "cases": [{"case": "a case", "contestants": slower}, alone]},
        {**new, "cases": [{"case": "a case", "contestants": contestants}]},
    ]
    _, _, first, second = front.speed()
    assert first == "| some work | 2 | 5 (peer) | 2.50 x | [a processor, AVX2](profiling/results/c/b.json) |"
    assert second == "| other work | - | - | - | not measured yet |"
    results.pop()
    assert front.speed()[2].endswith(
        "| 200 | 1,500 (peer) | 7.50 x | [a processor (of earlier kernels)](profiling/results/a/b.json) |"
    )
    results.clear()
    assert front.speed()[2] == "| some work | - | - | - | not measured yet |"


def test_methods_without_a_result_are_not_in_the_table(monkeypatch):
    kept = front.stored
    assert any("`adv-kd`" in line for line in front.methods())
    monkeypatch.setattr(front, "stored", lambda name: [] if name == "evaluation" else kept(name))
    assert not any("`adv-kd`" in line for line in front.methods())


def test_kernels_that_have_run_are_counted(monkeypatch):
    runs = iter([{"stale": False}, {"stale": True}, None])
    monkeypatch.setattr(front, "families", lambda: range(3))
    monkeypatch.setattr(front, "last_run", lambda family: next(runs))
    assert front.gpu_state() == "1 of 3 GPU kernels have run at their current source"


def test_the_picture_of_glyphs(tmp_path, monkeypatch):
    """Rows of 32x32 at twice their size above half as many of 128x128: image i is in column i."""
    monkeypatch.setattr(pictures, "PICTURES", tmp_path)
    pictures.data_set(rows=2, columns=4)
    with Image.open(tmp_path / "glyphs.png") as picture:
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    small, large = draw_glyphs(range(8), 32)[0], draw_glyphs(range(2), 128)[0]
    assert pixels.shape == (3, 2 * 64 + 128, 4 * 64)
    assert torch.equal(pixels[:, 64:128:2, 65:128:2], small[5]) and torch.equal(pixels[:, 128:, 128:], large[1])


def test_the_first_picture(tmp_path, monkeypatch):
    """Three groups of images on a card of the house's width; times are those of the results, and marked if kernels changed."""
    monkeypatch.setattr(pictures, "PICTURES", tmp_path)
    pictures.strip(Teacher.from_pretrained("digits"), Student.from_pretrained("digits"), n=1)
    with Image.open(tmp_path / "strip.png") as picture:
        assert picture.width == 1800 and picture.height > 600
    cases = {"bench_teacher": "DDIM-50 trajectory, batch 16", "bench_student": "digits, batch 16, float32"}

    def given(name):
        case = {"case": cases[name], "images": 16, "contestants": [timed("ours", "ours", {"t": 800.0, "s": 8.0}[name[6]])]}
        places = (("a", ["philox"]), ("b", changed))
        return [
            {"path": f"r/{folder}/{name}.json", "provenance": PLACE, "changed": since, "cases": [case]}
            for folder, since in places
        ]

    monkeypatch.setattr(pictures, "stored", given)
    changed = []
    assert pictures.captions() == ("a processor, 2 threads, batch 16", "50 ms an image", "0.5 ms an image")
    changed.append("mask_mul")
    assert pictures.captions()[0].endswith("batch 16, earlier kernels")
