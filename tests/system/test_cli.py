"""The command line as a user meets it: exit codes, one line per mistake, files."""

import json
import os

import click
import numpy as np
import pytest

from advkd.cli.main import main
from advkd.methods.adv_kd import RECIPES

from ..conftest import fork, fork_cli, fork_ranks, run_cli


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command line in this process."""
    try:
        main([str(a) for a in arguments], standalone_mode=True)
        code = 0
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments):
    """The one line that a refused command prints."""
    code, _, error = run(capsys, *arguments)
    assert code == 2, error
    lines = [line for line in error.splitlines() if line.startswith("advkd: ")]
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0]


def test_info_shows_every_op_and_the_reason_for_each_gap(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for op in ("conv_block", "gradient_penalty", "philox", "sampler_step"):
        assert op in out
    assert "torch" in out and "not written for this op yet" in out
    philox = out[out.index("  philox") : out.index("  sampler_step")]
    assert "cpu        yes" in philox


def described(command, *names):
    """Words of a command and its options, with those of every subcommand."""
    if not isinstance(command, click.Group):
        return [(" ".join(names), option.name, option.help) for option in command.params]
    context = click.Context(command)
    subcommands = ((name, command.get_command(context, name)) for name in command.list_commands(context))
    return [row for name, subcommand in subcommands for row in described(subcommand, *names, name)]


def test_help_that_names_the_digits_names_the_glyphs():
    texts = [row for row in described(main) if "digits" in (row[2] or "")]
    assert {"sample", "report", "evaluate", "distill adv-kd"} <= {command for command, _, _ in texts}
    assert [row for row in texts if "glyphs" not in row[2]] == []


def test_sample_to_a_picture_and_to_a_folder(capsys, tmp_path):
    from PIL import Image

    assert run(capsys, "sample", "-n", 5, "--seed", 7, "--out", tmp_path / "grid.png")[0] == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * 96
    assert run(capsys, "sample", "-n", 5, "--seed", 7, "--batch-size", 2, "--out", tmp_path / "a")[0] == 0
    assert run(capsys, "sample", "-n", 5, "--seed", 7, "--batch-size", 5, "--out", tmp_path / "b")[0] == 0
    names = [f"{i:06d}.png" for i in range(5)]
    assert sorted(os.listdir(tmp_path / "a")) == [*names, "samples.json"]
    for name in names:
        pair = [np.asarray(Image.open(tmp_path / f / name), dtype=int) for f in "ab"]
        assert pair[0].shape == (32, 32) and np.abs(pair[0] - pair[1]).max() <= 1


def test_sampling_goes_on_where_it_stopped(capsys, tmp_path):
    """Existing pictures are kept, and pictures of other origin are not touched."""
    out = tmp_path / "many"
    assert run(capsys, "sample", "-n", 7, "--batch-size", 3, "--out", out)[0] == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    times = {name: (out / name).stat().st_mtime_ns for name in before}
    (out / "000004.png").unlink()
    assert run(capsys, "sample", "-n", 9, "--batch-size", 3, "--out", out)[0] == 0
    assert len(list(out.glob("*.png"))) == 9
    assert all((out / name).read_bytes() == before[name] for name in before)
    kept = [name for name in before if (out / name).stat().st_mtime_ns == times[name]]
    assert kept == [name for name in before if name < "000003"] and len(kept) == 3
    assert "pictures of another seed: name another folder" in refused(capsys, "sample", "--seed", 5, "--out", out)
    assert "pictures of another walk" in refused(capsys, "sample", "--interpolate", "--out", out)
    (out / "samples.json").unlink()
    assert "unknown origin (no samples.json)" in refused(capsys, "sample", "--out", out)
    assert all((out / name).read_bytes() == before[name] for name in before)


def test_several_processes_share_the_work(tmp_path):
    """Two processes of a launcher draw the same pictures as one."""
    whole = fork_cli("sample", "-n", 10, "--batch-size", 2, "--out", tmp_path / "one")
    parts = fork_ranks("-m", "advkd.cli", "sample", "-n", 10, "--batch-size", 2, "--out", tmp_path / "two")
    assert [done.returncode for done in (whole, *parts)] == [0, 0, 0]
    for name in os.listdir(tmp_path / "one"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    done = fork_cli("sample", "--out", tmp_path / "x.png", environment={"RANK": "0", "WORLD_SIZE": "2"})
    assert done.returncode == 2 and "several processes draw into a folder" in done.stderr


def test_interpolation_ends_at_two_latents(capsys, tmp_path):
    from PIL import Image

    from advkd import Student

    assert run(capsys, "sample", "-n", 6, "--seed", 2, "--interpolate", "--out", tmp_path / "walk")[0] == 0
    ends = Student.from_pretrained("digits").sample(2, seed=2)
    for name, end in (("000000.png", ends[0]), ("000005.png", ends[1])):
        picture = np.asarray(Image.open(tmp_path / "walk" / name), dtype=float) / 127.5 - 1
        assert np.abs(picture - end[0].numpy()).max() <= 0.01


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["sample", "-n", 0, "--out", "x.png"], "-n"),
        (["sample", "--out", "x.gif3"], "x.gif3"),
        (["sample", "--seed", -1, "--out", "x.png"], "--seed"),
        (["sample", "--device", "gpu", "--out", "x.png"], "--device"),
        (["sample", "--dtype", "int8", "--out", "x.png"], "--dtype"),
        (["sample", "--batch-size", 0, "--out", "x.png"], "--batch-size"),
        (["sample", "--student", "nowhere", "--out", "x.png"], "nowhere"),
        (["sample", "--backend", "cuda", "--out", "x.png"], "cuda"),
        (["trajectories", "--teacher", "nowhere", "--out", "x"], "nowhere"),
        (["trajectories", "--num", "many", "--out", "x"], "num must be a whole number"),
        (["distill", "--trajectories", "nowhere", "--preset", "digits", "--out", "x"], "nowhere"),
        (["distill", "--trajectories", "nowhere", "--preset", "celeba", "--out", "x"], "celeba"),
        (["distill", "--trajectories", "x", "--preset", "digits", "--out", "y", "--recipe", "fast"], "fast"),
        (["distill", "--trajectories", "x", "--preset", "digits", "--out", "y", "--betas", "a,b"], "betas"),
        (["distill", "--trajectories", "x", "--preset", "digits", "--out", "y", "--config", "none.json"], "none.json"),
        (["teacher", "train", "--data", "nowhere", "--out", "x"], "nowhere"),
        (["teacher", "train", "--seed", 2**70, "--out", "x"], "seed"),
        (["trajectories", "--seed", 2**70, "--out", "x"], "seed"),
        (["teacher", "train", "--learning-rate", "nan", "--out", "x"], "learning_rate"),
        (["demo", "--num", 16, "--out", "x"], "batch_sizes"),
        (["demo", "--updates", 0, "--out", "x"], "updates"),
        (["sample", "--out", "/proc/none/x.png"], "/proc/none"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    assert word in refused(capsys, *arguments)


def test_configuration_files(capsys, tmp_path, trajectories):
    arguments = ["distill", "--trajectories", trajectories, "--preset", "digits", "--out", tmp_path / "out", "--config"]
    (tmp_path / "a.json").write_text(json.dumps({"recipe": "paper", "learningrate": 1}))
    assert "unknown key 'learningrate'" in refused(capsys, *arguments, tmp_path / "a.json")
    (tmp_path / "b.toml").write_text("updates = [3")
    assert "b.toml is not readable" in refused(capsys, *arguments, tmp_path / "b.toml")
    (tmp_path / "d.json").write_text('{"ema": 0.5, "ema": 0.9}')
    assert "d.json is not readable JSON or TOML (the key 'ema'" in refused(capsys, *arguments, tmp_path / "d.json")
    (tmp_path / "c.toml").write_text("updates = [3]\nbatch_sizes = [8]\nema = 2.0")
    assert "ema" in refused(capsys, *arguments, tmp_path / "c.toml")
    # The file is valid and overridden by an option: now only the student does not fit.
    assert "image_size" in refused(capsys, *arguments, tmp_path / "c.toml", "--ema", "0.5")
    (tmp_path / "student.json").write_text(json.dumps({"image_size": 8, "chanels": [8]}))
    arguments[4] = tmp_path / "student.json"
    assert "chanels" in refused(capsys, *arguments, tmp_path / "c.toml", "--ema", "0.5")
    for shape in (
        {"channels": [2**31] * 4},
        {"image_size": 2**40, "channels": [8] * 80, "latent_size": 2**38},
        {"slope": 2.0},
        {"channels": [8, 8, True, 8]},
    ):
        (tmp_path / "student.json").write_text(json.dumps({"image_size": 8, "channels": [8] * 4, "latent_size": 2} | shape))
        said = refused(capsys, *arguments, tmp_path / "c.toml", "--ema", "0.5")
        assert f"student.json: {list(shape)[0]} must be" in said


def test_configuration_file_reaches_the_run(monkeypatch, capsys, tmp_path, trajectories):
    import advkd.training.distillation

    seen = []
    monkeypatch.setattr(
        advkd.training.distillation, "distill", lambda data, student, config, *rest, **more: seen.append(config)
    )
    (tmp_path / "c.json").write_text(json.dumps({"conditional": True, "kl": 0.5, "updates": [7], "betas": [0.1, 0.2]}))
    arguments = ["distill", "--trajectories", trajectories, "--preset", "digits", "--out", tmp_path, "--config"]
    assert run(capsys, *arguments, tmp_path / "c.json")[0] == 0
    assert run(capsys, *arguments, tmp_path / "c.json", "--no-conditional", "--updates", "3,4")[0] == 0
    first, second = seen
    assert (first.conditional, first.kl, first.updates, first.betas) == (True, 0.5, (7,), (0.1, 0.2))
    assert (second.conditional, second.kl, second.updates, second.betas) == (False, 0.5, (3, 4), (0.1, 0.2))
    (tmp_path / "c.json").write_text(json.dumps({"recipe": "paper"}))
    assert run(capsys, *arguments, tmp_path / "c.json", "--recipe", "joint")[0] == 0
    assert run(capsys, *arguments, tmp_path / "c.json")[0] == 0
    assert seen[2:] == [RECIPES["joint"], RECIPES["paper"]]
    # A command without a method is that of adv-kd.
    assert run(capsys, "distill", "adv-kd", *arguments[1:], tmp_path / "c.json")[0] == 0
    assert seen.pop() == RECIPES["paper"]
    for wrong in ({"updates": [8.9]}, {"updates": [True]}, {"conditional": 1}, {"seed": 1e400}, {"recipe": ["paper"]}):
        (tmp_path / "c.json").write_text(json.dumps(wrong))
        assert next(iter(wrong)) in refused(capsys, *arguments, tmp_path / "c.json")


def test_too_little_memory_is_one_line(monkeypatch, capsys, tmp_path):
    import advkd.cli.sample

    def exhausted(*arguments, **options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    monkeypatch.setattr(advkd.cli.sample, "sample", exhausted)
    assert "not enough memory" in refused(capsys, "sample", "--out", tmp_path / "x.png")


def test_other_failures_keep_their_traceback(monkeypatch, tmp_path):
    import advkd.cli.sample

    def broken(*arguments, **options):
        raise RuntimeError("unsupported memory format option")

    monkeypatch.setattr(advkd.cli.sample, "sample", broken)
    with pytest.raises(RuntimeError, match="memory format"):
        main(["sample", "--out", str(tmp_path / "x.png")], standalone_mode=True)


def test_output_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, "trajectories", "--out", tmp_path / "file")
    assert "cannot be created" in refused(capsys, "sample", "--out", tmp_path / "file" / "below")


def test_a_fresh_process_refuses_without_a_traceback(tmp_path):
    result = run_cli("sample", "--student", "nowhere", "--out", tmp_path / "x.png")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("advkd: ") and result.stderr.count("\n") == 1


# The times in the last line are not tested.
DEMO = """
import sys
from advkd.cli.main import main
from advkd.evaluation import evaluate
from advkd.runtime import timing
evaluate.measure = lambda calls, repeats, device: timing.measure(calls, 1, 0, device)
sys.exit(main(sys.argv[1:]))
"""


def test_small_demo(tmp_path):
    from PIL import Image

    done = fork("-c", DEMO, "demo", "--out", tmp_path / "demo", "--num", 32, "--updates", 2).finish(300)
    assert done.returncode == 0 and "20 evaluations" in done.stdout and "1 evaluation" in done.stdout, done.stderr
    assert "A classifier of real digits is sure of" in done.stdout and (tmp_path / "demo" / "demo.html").exists()
    for name in ("teacher_and_student", "levels", "loss_curves", "student_samples"):
        with Image.open(tmp_path / "demo" / f"{name}.png") as picture:
            assert picture.width > 300 and len(picture.convert("L").getcolors(1 << 16)) > 10
