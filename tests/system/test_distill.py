"""Distillation: both recipes, all distances, kills, processes, refusals."""

import csv
import json
import math
import os
import signal
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from advkd.data.draws import DataOrder, shift, training_latents
from advkd.data.trajectories import Trajectories
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.teacher import Teacher
from advkd.errors import BackendUnavailableError, InputError, TrainingError
from advkd.methods.adv_kd import RECIPES, recipe
from advkd.methods.distances import kl_divergence
from advkd.models.student import Student
from advkd.training.distillation import Distiller, distill
from advkd.training.log import Board

from ..conftest import (
    ROOT,
    TINY_STUDENT,
    fork,
    fork_cli,
    fork_ranks,
    run_cli,
    run_torchrun,
    start,
    start_cli,
    tiny_recording,
    tiny_student,
    tiny_teacher,
)

SMALL = {"batch_sizes": (8,), "critic_channels": 4, "critic_max_channels": 8, "checkpoint_every": 2}
JOINT = recipe("joint", updates=(6,), **SMALL)
PAPER = recipe("paper", updates=(2,), critic_updates=2, **SMALL)
UNPAIRED = {"mse": 0.0, "kl": 0.0}


def rows(out):
    with open(out / "metrics.csv") as file:
        return list(csv.DictReader(file))


def weights(out):
    return (out / "diffusion_pytorch_model.safetensors").read_bytes()


def test_joint_training_brings_the_loss_down(trajectories, tmp_path):
    config = recipe("joint", updates=(60,), learning_rate=5e-3, **SMALL)
    student = distill(trajectories, tiny_student(), config, tmp_path, progress=False)
    history = rows(tmp_path)
    assert len(history) == 60
    first, last = (sum(float(r["mse_04"]) for r in part) / 10 for part in (history[:10], history[-10:]))
    assert last < 0.7 * first
    assert not student.training
    loaded = Student.from_pretrained(tmp_path)
    assert torch.equal(loaded(loaded.latents(2)), student(student.latents(2)))
    assert (tmp_path / "samples-stage-01.png").stat().st_size > 100
    assert any((tmp_path / "tensorboard").iterdir())


def test_paper_recipe_goes_stage_by_stage(trajectories, tmp_path):
    student = tiny_student()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    distill(trajectories, student, PAPER, tmp_path, progress=False)
    history = rows(tmp_path)
    assert [(r["stage"], r["update"]) for r in history] == [(str(k), str(u)) for k in (1, 2, 3, 4) for u in (1, 2)]
    for row in history:
        measured = [name for name in row if name.startswith("mse_") and row[name]]
        assert measured == [f"mse_{int(row['stage']):02d}"]
    assert all(not torch.equal(before[k], v) for k, v in student.state_dict().items() if "convolution" in k)
    assert [len(list(tmp_path.glob(f"samples-stage-0{k}.png"))) for k in range(1, 5)] == [1] * 4


def losses(data, out, dtype, updates, **changes):
    """Every metric of the first updates of a run that starts from one seed."""
    config = recipe("joint", updates=(updates,), learning_rate=5e-3, **{**SMALL, **changes})
    run = Distiller(Trajectories(data), tiny_student(), config, out, dtype=dtype, progress=False)
    return [run.step() for _ in range(updates)]


def test_kernels_that_cannot_run_here_are_named_before_the_folder_is_made(trajectories, tmp_path):
    with pytest.raises(BackendUnavailableError, match=r"critic_backend cuda cannot run on cpu \(.*\): take auto or autograd"):
        losses(trajectories, tmp_path / "out", torch.float32, 1, critic_backend="cuda")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("conditional", [False, True])
def test_tangent_passes_and_autograd_train_alike(trajectories, tmp_path, conditional):
    # In float32 runs part after a few updates, whatever the method: there the first update alone is compared.
    for dtype, updates, bound in ((torch.float64, 50, 1e-6), (torch.float32, 1, 1e-5)):
        ours, theirs = (
            losses(trajectories, tmp_path / f"{dtype}-{name}", dtype, updates, critic_backend=name, conditional=conditional)
            for name in ("auto", "autograd")
        )
        for row, other in zip(ours, theirs, strict=True):
            assert row.keys() == other.keys() and "penalty" in row
            assert all(abs(row[name] - other[name]) <= bound * max(1.0, abs(other[name])) for name in row)


def test_the_papers_batches():
    stages = RECIPES["paper"].stages(12)
    assert [s.batch_size for s in stages] == [64] * 8 + [32] + [16] * 3
    assert [s.levels for s in stages] == [(k,) for k in range(1, 13)]
    assert [s.trained for s in stages] == [range(1, k + 1) for k in range(1, 13)]
    config = RECIPES["paper"]
    assert (config.critic_updates, config.learning_rate, config.betas, config.gradient_penalty) == (5, 1e-4, (0.0, 0.9), 10.0)
    assert (config.wasserstein, config.mse, config.kl, config.ema, config.conditional) == (1.0, 0.0, 0.0, 0.0, False)


def test_train_scope_last_freezes_the_earlier_submodules(trajectories, tmp_path):
    config = recipe("paper", updates=(1,), train_scope="last", **SMALL)
    data = Trajectories(trajectories)
    run = Distiller(data, tiny_student(), config, tmp_path, progress=False)
    for _ in range(2):
        run.step()
    before = {k: v.clone() for k, v in run.student.state_dict().items()}
    run.step()
    changed = {k.split(".")[1] for k, v in run.student.state_dict().items() if not torch.equal(before[k], v)}
    assert changed == {"2"}


@pytest.mark.parametrize(
    "changes",
    [
        {"wasserstein": 0.0},
        {"mse": 0.0, "kl": 1.0, "wasserstein": 0.0},
        {"mse": 0.0, "wasserstein": 1.0},
        {"mse": 0.5, "kl": 0.1, "wasserstein": 0.2, "conditional": True, "clip_gradients": 0.1},
        {"critic_levels": (4,), "regression_levels": (1, 2), "ema": 0.0},
        {"mixed_precision": "bf16"},
        {"fresh": True, "augment": True},
    ],
)
def test_every_distance_and_switch_trains(trajectories, tmp_path, changes):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    student = tiny_student()
    before = student.head.weight.clone()
    distill(trajectories, student, recipe("joint", updates=(3,), **{**SMALL, **changes}), tmp_path, progress=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    history = rows(tmp_path)
    assert len(history) == 3 and all(math.isfinite(float(r["loss"])) for r in history)
    assert not torch.equal(before, student.head.weight)
    assert bool(history[0]["critic"]) == (changes.get("wasserstein") != 0.0)


def test_unpaired_data_takes_wasserstein_only(unpaired, tmp_path):
    for changes in ({}, {"mse": 0.0, "kl": 1.0}, {**UNPAIRED, "conditional": True}):
        with pytest.raises(InputError, match="unpaired"):
            distill(unpaired, tiny_student(), recipe("joint", updates=(1,), **{**SMALL, **changes}), tmp_path / "no")
    distill(unpaired, tiny_student(), recipe("joint", updates=(2,), **{**SMALL, **UNPAIRED}), tmp_path / "yes", progress=False)
    assert len(rows(tmp_path / "yes")) == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["joint", "paper"])
def test_a_killed_run_resumes_bit_for_bit(trajectories, tmp_path, name):
    """SIGKILL in the middle, at a point that is no checkpoint."""
    preset = tmp_path / "student.json"
    preset.write_text(json.dumps(asdict(TINY_STUDENT)))
    arguments = ["distill", "--trajectories", trajectories, "--preset", preset, "--recipe", name, "--batch-sizes", 8]
    arguments += ["--updates", 12 if name == "joint" else 3, "--checkpoint-every", 2]
    arguments += ["--critic-channels", 4, "--critic-max-channels", 8, "--ema", 0.9, "--out"]
    result = fork_cli(*arguments, tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    killed = tmp_path / "killed"
    # One recipe in fresh processes, the killed one and the one that goes on.
    begin, run = (start_cli, run_cli) if name == "joint" else (partial(fork, "-m", "advkd.cli"), fork_cli)
    process = begin(*arguments, killed)
    deadline = time.monotonic() + 120
    while not (killed / "metrics.csv").exists() or len((killed / "metrics.csv").read_text().splitlines()) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "config.json").exists(), "the run ended before it was killed"
    refused = fork_cli(*arguments, killed)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    assert run(*arguments, killed, "--resume").returncode == 0
    assert weights(killed) == weights(tmp_path / "whole")
    assert (killed / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    changed = fork_cli(*arguments, killed, "--resume", "--mse", 3)
    assert changed.returncode == 2 and "mse" in changed.stderr


def train_together(trajectories, out, overrides, world=2):
    for done in fork_ranks("-m", "tests.system.distill_worker", trajectories, out, json.dumps(overrides), world=world):
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "overrides",
    [
        {"recipe": "joint", "updates": [20], "batch_sizes": [8], "conditional": True, "kl": 0.1, "clip_gradients": 1.0},
        {"recipe": "paper", "updates": [5], "batch_sizes": [8], "critic_updates": 2},
    ],
)
def test_two_processes_give_the_losses_of_one(trajectories, tmp_path, overrides):
    """Float64, 20 updates, the same global batch: batch norm, gradients and draws are those of one process."""
    overrides = {**overrides, "critic_channels": 4, "critic_max_channels": 8}
    histories = []
    for world, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        train_together(trajectories, out, overrides, world)
        histories.append(rows(out))
    assert len(histories[0]) == len(histories[1]) == 20
    for one, two in zip(*histories):
        for name in one:
            if one[name]:
                assert abs(float(one[name]) - float(two[name])) <= 1e-6 * max(1.0, abs(float(one[name]))), name


def test_two_processes_train_in_bfloat16(trajectories, tmp_path):
    overrides = {"recipe": "joint", "updates": [2], "batch_sizes": [8], "mixed_precision": "bf16", "critic_channels": 4}
    train_together(trajectories, tmp_path, overrides)
    assert all(math.isfinite(float(row["loss"])) for row in rows(tmp_path))


def test_two_processes_record_growing_data_together(trajectories, tmp_path):
    overrides = {"recipe": "joint", "updates": [2], "batch_sizes": [8], "grow": 16, "grow_every": 1, "critic_channels": 4}
    train_together(trajectories, tmp_path, overrides)
    assert len(Trajectories(trajectories, tmp_path / "trajectories" / "0001")) == 40


# An exit handler that notes what is left of the process group. In a fresh interpreter it is registered before all others and
# runs last; in a forked child, whose imports are done, it runs after those of the run and before those of the imports.
LAST_HANDLER = """
import atexit, contextlib, json, os, sys
from pathlib import Path

def report():
    import torch.distributed as dist
    tasks, names = Path("/proc/self/task"), []
    for task in tasks.iterdir() if tasks.exists() else ():
        with contextlib.suppress(OSError):  # a thread that has ended since
            names.append((task / "comm").read_text())
    left = {"group": dist.is_initialized(), "threads": [name for name in names if "gloo" in name]}
    file = Path(os.environ["ENDINGS"], os.environ["RANK"])
    file.write_text(json.dumps(left))
    file.rename(file.with_suffix(".json"))
    if left["group"]:
        dist.destroy_process_group()

if "RANK" in os.environ:
    atexit.register(report)
"""

RUN_MODULE = f"""{LAST_HANDLER}
import runpy
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def endings(tmp_path):
    """Call for what each of two processes had left of its process group."""
    folder = tmp_path / "endings"
    folder.mkdir()
    return lambda: {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


GONE = {"group": False, "threads": []}


FRESH = pytest.param("twice", start, id="twice, fresh", marks=pytest.mark.kernels)


@pytest.mark.parametrize(("ending", "by"), [("twice", fork), FRESH, ("caller", fork), ("error", start), ("interrupt", fork)])
def test_a_process_group_of_ours_ends_before_the_interpreter(trajectories, tmp_path, endings, ending, by):
    """On every way out, without waiting for a process that failed; a group that existed before stays the caller's."""
    overrides = {"recipe": "joint", "updates": [3], "batch_sizes": [8], "critic_channels": 4, "ending": ending}
    worker = ("tests.system.distill_worker", trajectories, tmp_path / "out", json.dumps(overrides))
    # A forked child leaves out the interpreter's own end.
    results = fork_ranks("-c", RUN_MODULE, *worker, environment={"ENDINGS": str(tmp_path / "endings")}, by=by)
    errors, left = [done.stderr[-3000:] for done in results], endings()
    if ending in ("error", "interrupt"):
        assert all(done.returncode for done in results) and left == {0: GONE, 1: GONE}, errors
        return
    assert [done.returncode for done in results] == [0, 0], errors
    if ending == "caller":
        assert sorted(left) == [0, 1] and left[0]["group"] and left[1]["group"], errors
    else:
        assert left == {0: GONE, 1: GONE}, errors
        assert weights(tmp_path / "out") == weights(tmp_path / "out-again")


FAILING = pytest.param(("--learning-rate", 1e30), 1, "not finite", marks=pytest.mark.kernels)


@pytest.mark.parametrize(("options", "code", "message"), [((), 0, ""), FAILING])
def test_the_command_ends_its_process_group(trajectories, tmp_path, endings, options, code, message):
    """Under ``torchrun``."""
    preset = tmp_path / "student.json"
    preset.write_text(json.dumps(asdict(TINY_STUDENT)))
    arguments = ["--trajectories", trajectories, "--preset", preset, "--updates", 4, "--batch-sizes", 8, "--critic-channels", 4]
    arguments += ["--critic-max-channels", 8, *options, "--out", tmp_path / "out"]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(LAST_HANDLER)
    changes = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "ENDINGS": str(tmp_path / "endings")}
    result = run_torchrun("advkd.cli", "distill", *arguments, environment=changes)
    assert result.returncode == code and message in result.stderr, result.stderr[-3000:]
    assert endings() == {0: GONE, 1: GONE}


def test_a_finished_run_resumes_to_itself(trajectories, tmp_path):
    first = distill(trajectories, tiny_student(), JOINT, tmp_path, progress=False)
    again = distill(trajectories, tiny_student(seed=1), JOINT, tmp_path, resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert len(rows(tmp_path)) == 6


def test_torn_metrics_do_not_stop_a_resumption(trajectories, tmp_path):
    distill(trajectories, tiny_student(), JOINT, tmp_path, progress=False)
    text = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(text[: text.rindex("1,6,") + 2])
    distill(trajectories, tiny_student(), JOINT, tmp_path, resume=True, progress=False)
    assert [row["update"] for row in rows(tmp_path)] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("torn", ["x\n", "\0\0\n1,8\n", "1,7,0.5\n"])
def test_rows_torn_after_the_checkpoint_are_dropped(torn, trajectories, tmp_path):
    distill(trajectories, tiny_student(), JOINT, tmp_path, progress=False)
    before = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(before + torn)
    distill(trajectories, tiny_student(), JOINT, tmp_path, resume=True, progress=False)
    assert (tmp_path / "metrics.csv").read_text() == before


@pytest.mark.parametrize(("grow", "lost", "main"), [(8, "", True), (8, "", False), (0, "", True), (0, "metrics.csv", True)])
def test_what_is_removed_while_a_run_writes_there_stays_away(teacher, trajectories, tmp_path, monkeypatch, grow, lost, main):
    """Neither data that grow nor a checkpoint begin an output folder anew, without the rows of the updates before."""
    # The data grow before the next checkpoint.
    config = recipe("joint", updates=(8,), grow=grow, grow_every=4, **{**SMALL, "checkpoint_every": 3})
    out, teacher = tmp_path / "out", teacher if grow else None
    run = Distiller(Trajectories(trajectories), tiny_student(), config, out, progress=False, teacher=teacher)
    step = run.step

    def update():
        if run.update == 3:
            (out / lost).rename(tmp_path / "away")
        return step()

    run.step = update
    if not main:
        monkeypatch.setattr(type(run.accelerator), "is_main_process", False)
    with pytest.raises(InputError, match=f"{out}/.* cannot be written: .* removed or moved away; run the same command again"):
        run.run()
    assert out.exists() == bool(lost) and not (out / lost).is_file() and not (out / "config.json").exists()
    if main and not lost:
        (tmp_path / "away").rename(out)
        distill(trajectories, tiny_student(), config, out, resume=True, progress=False, teacher=teacher)
        assert len(rows(out)) == 8


def test_rows_are_on_the_disk_before_a_checkpoint_counts_on_them(trajectories, tmp_path, monkeypatch):
    order, fsync = [], os.fsync

    def noted(descriptor):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    distill(trajectories, tiny_student(), JOINT, tmp_path, progress=False)
    before = [earlier for earlier, name in zip(order, order[1:]) if name.startswith(".checkpoint.safetensors")]
    assert before == ["metrics.csv"] * 3


def test_two_runs_of_one_second_have_a_board_each(tmp_path, monkeypatch):
    monkeypatch.setattr("advkd.training.log.time.time", lambda: 1e9)
    for _ in range(2):
        Board(tmp_path / "tensorboard", 0).close()
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    assert first.read_bytes() == second.read_bytes() != b""


def test_folders_that_must_not_be_written_to(trajectories, tmp_path):
    from advkd.runtime.folders import locked

    with pytest.raises(InputError, match="no checkpoint"):
        distill(trajectories, tiny_student(), JOINT, tmp_path / "typo", resume=True)
    tiny_student().save_pretrained(tmp_path / "student")
    with pytest.raises(InputError, match="holds a student already"):
        distill(trajectories, tiny_student(), JOINT, tmp_path / "student")
    (tmp_path / "busy").mkdir()
    with locked(tmp_path / "busy"), pytest.raises(InputError, match="another process"):
        distill(trajectories, tiny_student(), JOINT, tmp_path / "busy", progress=False)
    (tmp_path / "foreign").mkdir()
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "foreign" / "checkpoint.safetensors")
    with pytest.raises(InputError, match="checkpoint.safetensors is not what advkd writes"):
        distill(trajectories, tiny_student(), JOINT, tmp_path / "foreign", resume=True)


def test_altered_checkpoints_and_changed_folders_are_refused(trajectories, tmp_path):
    distill(trajectories, tiny_student(), JOINT, tmp_path / "a", progress=False)
    checkpoint = tmp_path / "a" / "checkpoint.safetensors"
    data = bytearray(checkpoint.read_bytes())
    data[-100] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(InputError, match="checkpoint.safetensors is altered"):
        distill(trajectories, tiny_student(), JOINT, tmp_path / "a", resume=True)
    late = Distiller(Trajectories(trajectories), tiny_student(), JOINT, tmp_path / "b", progress=False)
    distill(trajectories, tiny_student(), JOINT, tmp_path / "b", progress=False)
    before = weights(tmp_path / "b")
    with pytest.raises(InputError, match="another process has written"):
        late.run()
    assert weights(tmp_path / "b") == before


def test_large_seeds_train(trajectories, tmp_path):
    distill(trajectories, tiny_student(), recipe("joint", updates=(1,), seed=2**63 - 1, **SMALL), tmp_path, progress=False)
    assert len(rows(tmp_path)) == 1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(trajectories, tmp_path, monkeypatch):
    run = Distiller(Trajectories(trajectories), tiny_student(), JOINT, tmp_path, progress=False)
    real = run.next_batch

    def poisoned():
        batch, draw = real()
        levels = {k: t * math.nan if run.update == 5 else t for k, t in batch.levels.items()}
        return replace(batch, levels=levels), draw

    monkeypatch.setattr(run, "next_batch", poisoned)
    with pytest.raises(TrainingError, match="not finite at stage 1, update 5; the last checkpoint is kept"):
        run.run()
    resumed = distill(trajectories, tiny_student(), JOINT, tmp_path, resume=True, progress=False)
    whole = distill(trajectories, tiny_student(), JOINT, tmp_path / "whole", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values()))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"updates": (0,)}, "updates"),
        ({"updates": ()}, "updates"),
        ({"batch_sizes": (1,)}, "batch_sizes"),
        ({"batch_sizes": (25,)}, "batch_sizes"),
        ({"recipe": "paper", "mse": 0.0, "critic_levels": (4,)}, "stage 1 has no loss"),
        ({"critic_updates": 0}, "critic_updates"),
        ({"mse": -1.0}, "mse"),
        ({"mse": 0.0, "wasserstein": 0.0}, "one of mse"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"ema": 1.0}, "ema"),
        ({"betas": (0.9,)}, "betas"),
        ({"train_scope": "first"}, "train_scope"),
        ({"mixed_precision": "fp16"}, "mixed_precision"),
        ({"critic_levels": (5,)}, "critic_levels"),
        ({"recipe": "both"}, "recipe"),
    ],
)
def test_bad_recipes_are_refused_before_work(trajectories, tmp_path, changes, name):
    import dataclasses

    with pytest.raises(InputError, match=name):
        distill(trajectories, tiny_student(), dataclasses.replace(JOINT, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"image_size": 16, "channels": (8,) * 4}, "image_size"),
        ({"image_channels": 3}, "image_channels"),
        ({"channels": (8,) * 6}, "depth"),
    ],
)
def test_a_student_that_does_not_fit_the_data_is_refused(trajectories, tmp_path, changes, name):
    with pytest.raises(InputError, match=name):
        distill(trajectories, Student(replace(TINY_STUDENT, **changes)), JOINT, tmp_path / "out")


@pytest.mark.parametrize("changes", [{"latent_size": 1}, {"latent_size": 1, "detail_noise": True}])
def test_any_latent_of_the_recorded_noise_can_be_trained_on(trajectories, tmp_path, changes):
    """z of another layout than the recorded one is made anew from x_T's counters."""
    student = Student(replace(TINY_STUDENT, **changes))
    run = Distiller(Trajectories(trajectories), student, JOINT, tmp_path, progress=False)
    batch, _ = run.next_batch()
    expected = student.project(tiny_teacher().noise(24, 0))[run.rows(0, 8)]
    assert torch.allclose(batch.z, expected, atol=1e-6)
    run.run()
    assert len(rows(tmp_path)) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"fresh": True, "conditional": True},
        {"fresh": True, "wasserstein": 0.0},
        {"pairs": 25},
        {"pairs": -1},
        {"log_every": 4},
        {"grow": 8},
    ],
)
def test_switches_that_do_not_go_together(trajectories, tmp_path, changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        distill(trajectories, tiny_student(), replace(JOINT, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fresh_latents_reach_the_critic_and_not_the_regression(trajectories, tmp_path, monkeypatch):
    config = recipe("joint", updates=(1,), fresh=True, critic_levels=(4,), **SMALL)
    run = Distiller(Trajectories(trajectories), tiny_student(), config, tmp_path, progress=False)
    seen = {}

    def watch(name, original):
        def watched(*arguments):
            seen[name] = arguments
            return original(*arguments)

        return watched

    for name in ("update_critics", "update_student"):
        monkeypatch.setattr(run.method, name, watch(name, getattr(run.method, name)))
    run.run()
    _, batch, draw, judged = seen["update_critics"]
    images, z = seen["update_student"][3], batch.z
    assert len(judged[4]) == len(images[4]) == len(batch.levels[4]) == len(z) == 8
    assert not torch.equal(judged[4], images[4])
    latents = training_latents(config.seed, draw.start, 8, z.shape[1])
    reference = tiny_student().train()
    with torch.no_grad():
        expected = reference(torch.cat((z, latents)))
    assert torch.allclose(judged[4], expected[8:], atol=1e-5) and torch.allclose(images[4], expected[:8], atol=1e-5)


def test_training_latents_are_nobodys_samples():
    student = tiny_student()
    mine = training_latents(0, 5, 3, student.latent_numel)
    assert torch.equal(mine[1:], training_latents(0, 6, 2, student.latent_numel))
    assert not torch.equal(mine, student.latents(3, 0, 5))


def test_shift_moves_images_and_gradients():
    images = torch.arange(2.0 * 16 * 16).reshape(2, 1, 16, 16).requires_grad_()
    moved = shift(images, 0, 10, 12, 1)
    assert torch.equal(moved[1:], shift(images[1:], 0, 11, 12, 1)) and not torch.equal(moved, shift(images, 0, 10, 12, 2))
    # Away from the border every pixel's value is 16 rows + columns further on: one offset per image, of at most 2 each way.
    offsets = (moved - images)[:, 0, 4:12, 4:12].flatten(1)
    assert (offsets == offsets[:, :1]).all()
    for offset in offsets[:, 0].tolist():
        assert any(offset == 16 * dy + dx for dy in range(-2, 3) for dx in range(-2, 3))
    moved.sum().backward()
    assert images.grad.sum() == moved.numel() and (images.grad >= 0).all()
    drawn = torch.cat([shift(images.detach(), seed, 0, 1, 1)[:, 0, 8, 8] - images[:, 0, 8, 8].detach() for seed in range(40)])
    assert len(drawn.unique()) > 15


def test_rows_of_the_log_average_updates(trajectories, tmp_path):
    every = recipe("joint", updates=(5,), **SMALL)
    distill(trajectories, tiny_student(), every, tmp_path / "every", progress=False)
    distill(trajectories, tiny_student(), recipe("joint", updates=(5,), log_every=2, **SMALL), tmp_path / "two", progress=False)
    fine, coarse = rows(tmp_path / "every"), rows(tmp_path / "two")
    assert [r["update"] for r in coarse] == ["2", "4", "5"]
    means = [sum(float(r["mse_04"]) for r in part) / len(part) for part in (fine[:2], fine[2:4], fine[4:])]
    assert [float(r["mse_04"]) for r in coarse] == pytest.approx(means, rel=1e-6)
    assert weights(tmp_path / "every") == weights(tmp_path / "two")


def test_two_folders_are_one_data_set(teacher, trajectories, tmp_path):
    more = record_trajectories(teacher, tiny_recording(num=12, start=24), tmp_path / "more", progress=False)
    whole = record_trajectories(teacher, tiny_recording(num=36), tmp_path / "whole", progress=False)
    joined, one = Trajectories(trajectories, more), Trajectories(whole)
    assert len(joined) == 36 and joined.parts == [{"seed": 0, "start": 0, "num": 24}, {"seed": 0, "start": 24, "num": 12}]
    for part, expected in zip(
        joined.batch([3, 23, 24, 35], [2, 4])[1].values(), one.batch([3, 23, 24, 35], [2, 4])[1].values()
    ):
        assert torch.equal(part, expected)
    assert torch.equal(joined.noise([0, 30]), teacher.noise(36)[[0, 30]])
    with pytest.raises(InputError, match="repeats samples"):
        Trajectories(trajectories, whole)
    other = record_trajectories(teacher, tiny_recording(num=8, steps=5, seed=9), tmp_path / "other", progress=False)
    with pytest.raises(InputError, match="different steps, timesteps"):
        Trajectories(trajectories, other)


def test_pairs_limits_the_data(trajectories, tmp_path):
    config = recipe("joint", updates=(6,), pairs=9, **SMALL)
    run = Distiller(Trajectories(trajectories), tiny_student(), config, tmp_path, progress=False)
    assert sorted(run.data.places(run.rows(0, 9))) == list(range(9))


def test_pairs_made_while_training(teacher, trajectories, tmp_path):
    """The data grows at fixed updates; a run that was killed in between equals one that was not."""
    config = recipe("joint", updates=(7,), pairs=16, grow=8, grow_every=2, **SMALL)
    whole = distill(trajectories, tiny_student(), config, tmp_path / "whole", progress=False, teacher=teacher)
    folders = sorted((tmp_path / "whole" / "trajectories").iterdir())
    infos = [Trajectories(folder).info for folder in folders]
    assert [(info.start, info.num) for info in infos] == [(24, 8), (32, 8), (40, 8)]
    assert json.loads((tmp_path / "whole" / "training.json").read_text())["samples"] == [
        {"seed": 0, "start": start, "num": num} for start, num in ((0, 24), (24, 8), (32, 8), (40, 8))
    ]
    run = Distiller(Trajectories(trajectories), tiny_student(), config, tmp_path / "cut", progress=False, teacher=teacher)
    original, count = run.step, []

    def killed():
        if len(count) == 5:
            raise KeyboardInterrupt
        count.append(1)
        return original()

    run.step = killed
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert sorted(run.data.places(run.rows(0, 32))) == [*range(16), *range(24, 40)]
    resumed = distill(trajectories, tiny_student(), config, tmp_path / "cut", resume=True, progress=False, teacher=teacher)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    # Resuming what is finished forgets nothing.
    record = (tmp_path / "whole" / "training.json").read_bytes()
    distill(trajectories, tiny_student(), config, tmp_path / "whole", resume=True, progress=False, teacher=teacher)
    assert (tmp_path / "whole" / "training.json").read_bytes() == record


def test_a_run_can_start_from_a_student(teacher, trajectories, tmp_path):
    """Its weights count, and its record goes on: what the first run saw is still known."""
    first = recipe("joint", updates=(2,), **SMALL)
    distill(trajectories, tiny_student(), first, tmp_path / "first", progress=False)
    more = record_trajectories(teacher, tiny_recording(num=8, seed=5), tmp_path / "more", progress=False)
    options = ["--updates", 1, "--batch-sizes", 8, "--learning-rate", 1e-12, "--ema", 0, "--wasserstein", 0]
    done = fork_cli("distill", "--trajectories", more, "--init", tmp_path / "first", "--out", tmp_path / "second", *options)
    assert done.returncode == 0, done.stderr
    one, two = (Student.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
        assert "convolution" not in name or torch.allclose(a, b, atol=1e-6)
    record = two.training_record
    assert record["samples"] == [{"seed": 0, "start": 0, "num": 24}, {"seed": 5, "start": 0, "num": 8}]
    assert [run["config"]["updates"] for run in record["runs"]] == [[2], [1]]
    two.save_pretrained(tmp_path / "copy")
    assert Student.from_pretrained(tmp_path / "copy").training_record == record
    options = [*options, "--resume", "--preset", str(tmp_path / "preset.json")]
    (tmp_path / "preset.json").write_text((tmp_path / "first" / "config.json").read_text())
    done = fork_cli("distill", "--trajectories", more, "--out", tmp_path / "second", *options)
    assert done.returncode == 2 and "a run with another init" in done.stderr
    for wrong in ([], ["--init", "digits", "--preset", "digits"]):
        done = fork_cli("distill", "--trajectories", more, "--out", tmp_path / "no", *wrong)
        assert done.returncode == 2 and "either a --preset or a student" in done.stderr


def test_the_teacher_may_have_another_name(teacher_folder, tmp_path, monkeypatch):
    """A relative path to it, say: for growing data, and for two folders of one data set."""
    monkeypatch.chdir(teacher_folder.parent)
    named = [Teacher.from_pretrained(name) for name in (str(teacher_folder), teacher_folder.name)]
    first = record_trajectories(named[0], tiny_recording(), tmp_path / "first", progress=False)
    config = recipe("joint", updates=(2,), grow=8, grow_every=1, **SMALL)
    distill(first, tiny_student(), config, tmp_path / "out", progress=False, teacher=named[1])
    second = record_trajectories(named[1], tiny_recording(start=24), tmp_path / "second", progress=False)
    assert len(Trajectories(first, second)) == 48


def test_grow_needs_the_trajectories_own_teacher(trajectories, tmp_path):
    config = recipe("joint", updates=(1,), grow=8, **SMALL)
    for teacher in (None, tiny_teacher(500)):
        with pytest.raises(InputError, match="grow 8 needs the teacher of the trajectories"):
            distill(trajectories, tiny_student(), config, tmp_path / "out", teacher=teacher)


def test_data_order_is_a_permutation_per_epoch():
    order = DataOrder(10, seed=3)
    epochs = [order.rows(10 * e, 10) for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert DataOrder(10, seed=3).rows(7, 6) == epochs[0][7:] + epochs[1][:3]


def test_kl_is_that_of_two_gaussians():
    floor, mse = 0.05, torch.tensor(0.3)
    log_s = torch.tensor(0.4, requires_grad=True)
    p = torch.distributions.Normal(torch.tensor(0.0), floor)
    q = torch.distributions.Normal(mse.sqrt(), log_s.exp())
    assert torch.allclose(kl_divergence(mse, log_s, floor), torch.distributions.kl_divergence(p, q))
    # With s learned the minimum is s^2 = floor^2 + mse, not infinity.
    best = 0.5 * math.log(floor**2 + 0.3)
    values = [kl_divergence(mse, torch.tensor(best + d), floor).item() for d in (-0.1, 0.0, 0.1)]
    assert values[1] < values[0] and values[1] < values[2]
    assert abs(kl_divergence(torch.tensor(0.0), torch.tensor(math.log(floor)), floor).item()) < 1e-6
