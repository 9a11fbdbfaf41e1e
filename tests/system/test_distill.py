"""Distillation: both recipes, all distances, kills, processes, refusals."""

import csv
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch

from advkd.distill import Distiller, _kl, distill
from advkd.draws import DataOrder, interpolate
from advkd.errors import InputError, TrainingError
from advkd.models.student import Student
from advkd.recipes import RECIPES, recipe
from advkd.trajectories import Trajectories

from ..conftest import ROOT, TINY_STUDENT, process_environment, run_cli, tiny_student

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
    stage = run.stages[2]
    run._start_stage(stage)
    before = {k: v.clone() for k, v in run.student.state_dict().items()}
    run._train_update(stage)
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
    from dataclasses import asdict

    preset.write_text(json.dumps(asdict(TINY_STUDENT)))
    arguments = ["distill", "--trajectories", trajectories, "--preset", preset, "--recipe", name, "--batch-sizes", 8]
    arguments += ["--updates", 12 if name == "joint" else 3, "--checkpoint-every", 2]
    arguments += ["--critic-channels", 4, "--critic-max-channels", 8, "--ema", 0.9, "--out"]
    result = run_cli(*arguments, tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "advkd.cli", *map(str, arguments), str(killed)]
    process = subprocess.Popen(command, env=process_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "metrics.csv").exists() or len((killed / "metrics.csv").read_text().splitlines()) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "config.json").exists(), "the run ended before it was killed"
    refused = run_cli(*arguments, killed)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    assert run_cli(*arguments, killed, "--resume").returncode == 0
    assert weights(killed) == weights(tmp_path / "whole")
    assert (killed / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    changed = run_cli(*arguments, killed, "--resume", "--mse", 3)
    assert changed.returncode == 2 and "mse" in changed.stderr


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
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
        command = [sys.executable, *launcher, "-m", "tests.system.distill_worker"]
        command += [str(trajectories), str(out), json.dumps(overrides)]
        result = subprocess.run(command, env=process_environment(), cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr[-3000:]
        histories.append(rows(out))
    assert len(histories[0]) == len(histories[1]) == 20
    for one, two in zip(*histories):
        for name in one:
            if one[name]:
                assert abs(float(one[name]) - float(two[name])) <= 1e-6 * max(1.0, abs(float(one[name]))), name


def test_two_processes_train_in_bfloat16(trajectories, tmp_path):
    overrides = {"recipe": "joint", "updates": [2], "batch_sizes": [8], "mixed_precision": "bf16", "critic_channels": 4}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.system.distill_worker", str(trajectories), str(tmp_path), json.dumps(overrides)]
    result = subprocess.run(command, env=process_environment(), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert all(math.isfinite(float(row["loss"])) for row in rows(tmp_path))


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


def test_folders_that_must_not_be_written_to(trajectories, tmp_path):
    from advkd.files import locked

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
    real = run._next_batch

    def poisoned(stage):
        start, z, targets = real(stage)
        return start, z, {k: t * math.nan if run.update == 5 else t for k, t in targets.items()}

    monkeypatch.setattr(run, "_next_batch", poisoned)
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
        ({"latent_size": 1}, "latent_size"),
        ({"latent_size": 1, "detail_noise": True}, "latent_size"),
    ],
)
def test_a_student_that_does_not_fit_the_data_is_refused(trajectories, tmp_path, changes, name):
    from dataclasses import replace

    with pytest.raises(InputError, match=name):
        distill(trajectories, Student(replace(TINY_STUDENT, **changes)), JOINT, tmp_path / "out")


def test_data_order_is_a_permutation_per_epoch():
    order = DataOrder(10, seed=3)
    epochs = [order.rows(10 * e, 10) for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert DataOrder(10, seed=3).rows(7, 6) == epochs[0][7:] + epochs[1][:3]


def test_interpolation_is_keyed_by_the_global_row():
    real, fake = torch.ones(6, 1, 4, 4), torch.zeros(6, 1, 4, 4)
    whole = interpolate(real, fake, 1, 100, 3)
    assert torch.equal(whole[4:], interpolate(real[4:], fake[4:], 1, 104, 3))
    assert len(set(whole[:, 0, 0, 0].tolist())) == 6 and 0 <= whole.min() and whole.max() <= 1
    assert not torch.equal(whole, interpolate(real, fake, 1, 100, 4))


def test_kl_is_that_of_two_gaussians():
    floor, mse = 0.05, torch.tensor(0.3)
    log_s = torch.tensor(0.4, requires_grad=True)
    p = torch.distributions.Normal(torch.tensor(0.0), floor)
    q = torch.distributions.Normal(mse.sqrt(), log_s.exp())
    assert torch.allclose(_kl(mse, log_s, floor), torch.distributions.kl_divergence(p, q))
    # With s learned the minimum is s^2 = floor^2 + mse, not infinity.
    best = 0.5 * math.log(floor**2 + 0.3)
    values = [_kl(mse, torch.tensor(best + d), floor).item() for d in (-0.1, 0.0, 0.1)]
    assert values[1] < values[0] and values[1] < values[2]
    assert abs(_kl(torch.tensor(0.0), torch.tensor(math.log(floor)), floor).item()) < 1e-6
