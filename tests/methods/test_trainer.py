"""The trainer with methods made for it: averages, kept modules, empty data, missing data, other data, rows of the log."""

import csv
from dataclasses import dataclass, replace

import pytest
import torch

from advkd.data.sources import Tensors
from advkd.errors import InputError
from advkd.methods.adv_kd import recipe
from advkd.methods.base import Kept, Method, Needs, Settings, Stage, Trained
from advkd.training.classifier import train_classifier
from advkd.training.distillation import distill
from advkd.training.teacher import train_teacher
from advkd.training.trainer import Trainer

from ..conftest import killed_after, tiny_student
from .test_classification import ClassifierTrainingConfig
from .test_denoising import TeacherTrainingConfig


@dataclass
class Config:
    """Numbers of the method below.

    Attributes:
        data: what the method needs.
        updates: of each of two stages.
        log_every: updates in a row.
    """

    data: str = "none"
    updates: int = 4
    log_every: int = 1


class Halving(Method):
    """A line moves towards noise; its second stage begins from the average of the first, which it keeps."""

    name, reference, Config, columns = "halving", "none", Config, ("loss", "odd")

    def __init__(self, config):
        self.config, self.line, self.seen = config, torch.nn.Linear(2, 2, bias=False), []

    def needs(self):
        return Needs(self.config.data, teacher=True)

    def settings(self):
        return Settings(seed=3, checkpoint_every=4, log_every=self.config.log_every)

    def stages(self):
        return [Stage(number, self.config.updates, 8) for number in (1, 2)]

    def build(self, stage):
        parts = {"student": Trained(self.line, 0.1, average=0.5)}
        if stage.number == 2:
            kept = torch.nn.Linear(2, 2, bias=False)
            if "student" in self.averages:
                kept.load_state_dict(self.averages["student"].state_dict())
            parts["round"] = Kept(kept)
        return parts

    def update(self, step, batch, draw):
        x = draw.normal("x", 2)
        self.seen.append((x, draw.uniform("u"), draw.integers("i", 5)))
        loss = (self.line(x) - self.teacher(x)).square().mean()
        step("student", loss)
        step.log(loss=loss)
        if len(self.seen) % 2 == 0:
            step.log(odd=loss)


def run(tmp_path, config=None, source=None, **options):
    torch.manual_seed(0)
    return Trainer(Halving(config or Config()), source or Tensors(), torch.tanh, tmp_path, progress=False, **options)


def test_draws_are_keyed_by_purpose_and_number(tmp_path):
    first = run(tmp_path / "a")
    for _ in range(8):
        first.step()
    x, u, i = (torch.cat(parts) for parts in zip(*first.method.seen))
    assert len(x) == 64 and len(x.unique(dim=0)) == 64 and len(u.unique()) == 64 and set(i.tolist()) == set(range(5))
    assert 0 <= u.min() and u.max() < 1 and abs(x.mean()) < 0.3 and abs(x.std() - 1) < 0.3


def test_what_is_kept_is_resumed(tmp_path):
    """A run that ends in its second stage goes on with the average that this stage kept."""
    whole = run(tmp_path / "whole")
    whole.run()
    cut, steps = run(tmp_path / "cut"), []

    def step(original=cut.step):
        if len(steps) == 6:
            raise KeyboardInterrupt
        steps.append(original())
        return steps[-1]

    cut.step = step
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    again = run(tmp_path / "cut", resume=True)
    assert again.done == 4 and set(again.running) == {"student", "round"}
    again.run()
    for name, part in whole.running.items():
        for key, tensor in part.tensors(name).items():
            assert torch.equal(tensor, again.running[name].tensors(name)[key]), key
    assert not torch.equal(whole.running["round"].part.module.weight, whole.result.weight)
    assert torch.equal(whole.method.averages["student"].weight, whole.result.weight)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_gradients_are_clipped_to_the_given_norm(tmp_path, clip):
    trainer, seen = run(tmp_path), []
    part = trainer.running["student"]
    part.part = replace(part.part, clip=clip)
    part.optimizer.register_step_pre_hook(lambda *_: seen.append(float(trainer.method.line.weight.grad.norm())))
    trainer.step()
    assert seen == [pytest.approx(1e-3, rel=1e-4)] if clip == 1e-3 else 1e-2 < seen[0] < 1e2


def test_rows_of_the_log_hold_what_some_updates_log(tmp_path):
    run(tmp_path, Config(log_every=4)).run()
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["update"]) for row in rows] == [("1", "4"), ("2", "4")]
    assert all(float(row["loss"]) > 0 and float(row["odd"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("config", "source", "message"),
    [
        (Config("pairs"), Tensors(z=torch.zeros(9, 2)), "halving needs images, and the data has none"),
        (Config("images"), Tensors(z=torch.zeros(9, 2)), "halving needs images"),
        (Config("levels"), Tensors(z=torch.zeros(9, 2)), "halving needs levels"),
    ],
)
def test_data_that_lacks_something_is_named(config, source, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(tmp_path, config, source).step()


def test_what_cannot_run_is_refused_before_work(tmp_path):
    with pytest.raises(InputError, match="multiple of log_every 3"):
        run(tmp_path / "out", Config(log_every=3))
    with pytest.raises(InputError, match="every stage must have an update"):
        run(tmp_path / "out", Config(updates=0))
    with pytest.raises(InputError, match="halving needs a teacher"):
        Trainer(Halving(Config()), Tensors(), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["teacher", "classifier"])
def test_an_unfinished_training_does_not_go_on_with_other_data(kind, tmp_path):
    from PIL import Image

    for place in ("a", "b"):
        for name in ("0", "1"):
            (tmp_path / place / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (8, 8), 20 * i + (place == "b")).save(tmp_path / place / name / f"{i}.png")
    train = {"teacher": train_teacher, "classifier": train_classifier}[kind]
    make = {"teacher": TeacherTrainingConfig, "classifier": ClassifierTrainingConfig}[kind]
    small = {"channels": (8,)} if kind == "teacher" else {"num_features": 4}
    configs = [make(data=str(tmp_path / place), steps=4, batch_size=2, checkpoint_every=2, **small) for place in ("a", "b")]
    with killed_after(3):
        train(configs[0], tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="another data, tensors"):
        train(configs[1], tmp_path / "out", resume=True, progress=False)
    train(configs[0], tmp_path / "out", resume=True, progress=False)


def test_one_process_trains_in_several_precisions(trajectories, tmp_path):
    small, heads, accuracies = {"batch_sizes": (8,), "updates": (3,), "critic_channels": 4}, [], []
    for i, precision in enumerate(("bf16", "no", "bf16")):
        config = recipe("joint", mixed_precision=precision, **small)
        heads.append(distill(trajectories, tiny_student(), config, tmp_path / str(i), progress=False).head.weight)
        accuracies.append(train_classifier(ClassifierTrainingConfig(steps=1, size=8), tmp_path / f"c{i}", progress=False))
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])
    assert accuracies[0] == accuracies[1] == accuracies[2]
