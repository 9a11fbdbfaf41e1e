"""Methods by consistency, scores and critics from the command line: folders, a student that draws, and what is refused."""

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from advkd.cli.main import main
from advkd.data.pictures import to_uint8
from advkd.diffusion.students import load_student

from ..conftest import tiny_student as tiny_generator
from .test_progressive import tiny_images, tiny_student

TAUGHT = "--teacher TEACHER --init START"
RUNS = {
    "consistency": f"consistency {TAUGHT} --data IMAGES --levels 4 --solver euler",
    "consistency without a teacher": "consistency --init START --data IMAGES --levels 2 --final-levels 4",
    "diff-instruct": "diff-instruct --teacher TEACHER --init PASS --trajectories PAIRS --weight edm",
    "diff-instruct of a network": f"diff-instruct {TAUGHT} --data IMAGES --gan 0.1",
    "dpdm": f"dpdm {TAUGHT} --data IMAGES --steps 4",
    "dpdm without images": f"dpdm {TAUGHT} --inputs simulated --steps 2",
    "ddgan": "ddgan --init START --data IMAGES --steps 2 --latent 4",
    "ddgan of a fresh network": "ddgan --channels 16,16 --data IMAGES --steps 1 --latent 4",
}
SMALL = ["--updates", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def folders(teacher_folder, trajectories, tmp_path_factory):
    """Folders that a command names: a teacher, students to begin with, images and pairs."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_student().save_pretrained(folder / "start")
    tiny_generator().save_pretrained(folder / "pass")
    (folder / "images").mkdir()
    for i, image in enumerate(to_uint8(tiny_images(8))):
        Image.fromarray(image[0].numpy()).save(folder / "images" / f"{i}.png")
    named = {name.upper(): str(folder / name) for name in ("start", "pass", "images")}
    return {**named, "TEACHER": str(teacher_folder), "PAIRS": str(trajectories)}


@pytest.mark.parametrize("name", RUNS)
def test_a_command_leaves_a_student_that_draws(name, folders, tmp_path):
    words = [folders.get(word, word) for word in RUNS[name].split()]
    done = CliRunner().invoke(main, ["distill", *words, *SMALL, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert f"student saved in {tmp_path / 'out'}" in done.output
    student = load_student(str(tmp_path / "out"))
    drawn = student.sample(3, seed=1)
    assert drawn.shape == (3, 1, 8, 8) and drawn.isfinite().all() and drawn.std() > 0
    assert torch.equal(drawn, load_student(str(tmp_path / "out")).sample(3, seed=1))
    run = student.training_record["runs"][-1]
    assert run["method"] == RUNS[name].split()[0] and run["cost"]["backward"] > 0 and len(run["init"]) == 64
    assert ("images" in run) == ("IMAGES" in RUNS[name]) and ("recorded_by" in run) == ("PAIRS" in RUNS[name])
    picture = tmp_path / "picture.png"
    sampled = CliRunner().invoke(main, ["sample", "--student", str(tmp_path / "out"), "-n", "2", "--out", str(picture)])
    assert sampled.exit_code == 0 and Image.open(picture).size[0] >= 16


@pytest.mark.parametrize(
    ("name", "left_out", "more", "message"),
    [
        ("consistency", "--data", [], "consistency needs images: name them by --data"),
        ("consistency", "", ["--levels", "2000"], "levels must be at most the schedule's 1000 timesteps, got 2000"),
        ("consistency", "", ["--drop", "0.2"], "drop does nothing without a student that has a null class"),
        ("consistency without a teacher", "", ["--solver", "euler"], "solver does nothing without a teacher (--teacher)"),
        ("diff-instruct", "--teacher", [], "diff-instruct needs a teacher: name it by --teacher"),
        ("diff-instruct", "--trajectories", ["--regression", "1"], "regression does nothing without pairs (--trajectories)"),
        ("diff-instruct", "", ["--sigma-data", "1", "--weight", "dmd"], "sigma_data does nothing without weight edm"),
        ("diff-instruct", "", ["--critic-channels", "8"], "critic_channels does nothing without a critic (--gan)"),
        ("dpdm", "--data", [], "dpdm needs images: name them by --data"),
        ("dpdm", "", ["--steps", "1001"], "steps must be between 1 and the schedule's 1000 timesteps, got 1001"),
        ("ddgan", "", ["--steps", "0"], "steps must be at least 1, got 0"),
        ("ddgan", "", ["--critic-channels", "256"], "critic_channels must be at most critic_max_channels, 128, got 256"),
        ("ddgan", "--data", [], "ddgan needs images: name them by --data"),
        ("ddgan", "", ["--teacher", "TEACHER"], "--teacher: ddgan does not call one with these options"),
        ("ddgan of a fresh network", "--data", [], "name a student to start from by --init, or a --teacher whose network is"),
        ("ddgan of a fresh network", "", ["--init", "START"], "--channels are of a fresh denoiser student: leave --preset and"),
        ("dpdm without images", "", ["--level", "lognormal"], "level does nothing without inputs data"),
    ],
)
def test_a_command_that_cannot_work_says_why(name, left_out, more, message, folders, tmp_path):
    words = [folders.get(word, word) for word in RUNS[name].split()]
    if left_out:
        place = words.index(left_out)
        del words[place : place + 2]
    done = CliRunner().invoke(main, ["distill", *words, *SMALL, *more, "--out", str(tmp_path / "out")])
    said = done.output + str(done.exception)
    assert done.exit_code and message in said and not (tmp_path / "out").exists(), said
