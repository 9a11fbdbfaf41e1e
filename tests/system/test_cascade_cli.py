"""Cascades from the command line: a base, super-resolution teachers and students of them, to pictures."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from advkd.cli.main import main
from advkd.diffusion.cascade import Cascade, SuperResolution
from advkd.diffusion.teacher import Teacher

from ..conftest import tiny_student as tiny_generator
from .test_cli import refused, run

SMALL = ("--channels", "8,8", "--steps", 2, "--batch-size", 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base of 8 x 8 pixels, two stages to 16 and 32, and a one-step student of the first, all made by commands."""
    root = tmp_path_factory.mktemp("cascade")
    stage = ("--prediction", "v_prediction", "--data", "digits")
    commands = [
        ("teacher", "train", "--data", "digits", "--size", 8, *SMALL, "--out", root / "base"),
        ("teacher", "train", *stage, "--size", 16, "--super-resolution", 8, *SMALL, "--out", root / "sr"),
        ("teacher", "train", *stage, "--size", 32, "--super-resolution", 16, "--truncation", 50, *SMALL, "--out", root / "sr2"),
        ("distill", "consistency", "--teacher", root / "sr", "--data", "digits", "--levels", 4, "--updates", 2)
        + ("--batch-size", 4, "--out", root / "one-step"),
    ]
    for command in commands:
        done = CliRunner().invoke(main, list(map(str, command)))
        assert done.exit_code == 0, done.output
    tiny_generator().save_pretrained(root / "generator")
    return root


def test_a_cascade_of_three_teachers(folders, capsys, tmp_path):
    """The command's pictures are the cascade's; a level of its own for the stage that was trained up to 50."""
    command = ("sample", "--teacher", folders / "base", "--cascade", folders / "sr", "--cascade", folders / "sr2")
    out = tmp_path / "x"
    code, said, error = run(capsys, *command, "--steps", 2, "-n", 3, "--seed", 4, "--batch-size", 2, "--out", f"{out}/")
    assert code == 0, error
    assert "network evaluations of the cascade: 2 at 16 pixels, 2 at 32 pixels" in said
    record = json.loads((out / "samples.json").read_text())
    assert [(stage["level"], stage["model"]["takes_low"]) for stage in record["cascade"]] == [(100, [8, 1000]), (50, [16, 50])]
    base, sr, sr2 = (Teacher.from_pretrained(folders / name) for name in ("base", "sr", "sr2"))
    cascade = Cascade(base, SuperResolution(sr, "ddim", 2), SuperResolution(sr2, "ddim", 2))
    wanted = cascade.sample(3, seed=4, solver="ddim", steps=2)
    for i, path in enumerate(sorted(out.glob("*.png"))):
        pixels = torch.tensor(list(Image.open(path).get_flattened_data()), dtype=torch.float32).reshape(32, 32)
        assert (pixels - (wanted[i, 0] + 1) * 127.5).abs().max() <= 1
    assert len(list(out.glob("*.png"))) == 3


def test_a_one_step_student_enlarges_what_students_draw(folders, capsys, tmp_path):
    """The base may be a student of either kind; a one-step stage costs one evaluation."""
    command = ("sample", "--student", folders / "generator", "--cascade", folders / "one-step", "-n", 2)
    code, said, error = run(capsys, *command, "--cascade-level", 0, "--out", tmp_path / "x.png")
    assert code == 0, error
    assert "(network evaluations of the cascade: 1 at 16 pixels)" in said
    assert Image.open(tmp_path / "x.png").size >= (32, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--teacher BASE --cascade SR2", "enlarges images of 1 x 16 x 16, the model before it draws 1 x 8 x 8"),
        ("--teacher BASE --cascade SR --cascade-level 1001", "--cascade-level: level must be at most 1000, the largest that"),
        ("--teacher BASE --cascade SR --cascade SR2 --cascade-level 51", "--cascade-level: level must be at most 50"),
        ("--teacher BASE --cascade nowhere", "--cascade: student 'nowhere' is neither a folder nor"),
        ("--teacher BASE --cascade BASE", "takes no low image: train one with 'advkd teacher train --super-resolution'"),
        ("--teacher BASE --cascade-level 3", "--cascade-level is of the images that --cascade enlarges"),
        ("--student GENERATOR --cascade SR --interpolate", "--interpolate: a cascade adds noise of its own"),
        ("--teacher SR", "enlarges low images: name it by 'advkd sample --cascade'"),
        ("--student ONE-STEP", "enlarges low images: name it by 'advkd sample --cascade'"),
    ],
)
def test_cascades_that_do_not_fit_are_refused(arguments, message, folders, capsys, tmp_path):
    named = {name.upper(): folders / name for name in ("base", "sr", "sr2", "one-step", "generator")}
    command = [named.get(word, word) for word in arguments.split()]
    assert message in refused(capsys, "sample", *command, "--out", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_trajectories_of_a_stage_are_refused(folders, capsys, tmp_path):
    message = refused(capsys, "trajectories", "--teacher", folders / "sr", "--num", 4, "--out", tmp_path / "x")
    assert "enlarges low images" in message and not (tmp_path / "x").exists()


def test_files_that_do_not_fit_each_other_are_refused(folders, tmp_path, capsys):
    """A damaged description of the low images is one line: sides, levels, and channels without a description."""
    for values, message in (
        ({"low_size": 5}, "must divide the large one's and be less, got 5 and 16"),
        ({"low_level": 2000}, "low_level must be at most its 1000 timesteps, got 2000"),
        ({"low_size": 0, "latent": 1}, "2 channels in, 1 out: a learned variance is not supported"),
    ):
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        shutil.copytree(folders / "sr", tmp_path / "t")
        path = tmp_path / "t" / "condition" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        command = ("sample", "--teacher", folders / "base", "--cascade", tmp_path / "t", "--out", tmp_path / "x.png")
        assert message in refused(capsys, *command)
