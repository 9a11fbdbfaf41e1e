"""The recorder: contents, kills, processes, damage."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from collections import namedtuple

import pytest
import torch

from advkd.data.dataset_info import same_teacher
from advkd.data.levels import downsample, supervising_timesteps
from advkd.data.shards import manifest_of
from advkd.data.trajectories import Trajectories
from advkd.diffusion import recorder
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.ops.latents import project
from advkd.runtime import files, folders

from ..conftest import fork, fork_cli, run_torchrun, start, start_cli, tiny_recording, tiny_teacher

CLI = ["--num", 40, "--depth", 4, "--steps", 10, "--batch-size", 4, "--shard-size", 8, "--seed", 3]


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_contents_are_the_teachers_states(teacher, trajectories):
    data = Trajectories(trajectories)
    assert len(data) == 24 and data.paired
    assert data.info.timesteps == [900, 800, 100] and data.info.resolutions == [4, 8, 8, 8]
    rows = [0, 7, 8, 23]
    z, levels = data.batch(rows, [1, 2, 3, 4])
    x_T = torch.cat([teacher.noise(1, 0, row) for row in rows])
    assert (z - project(x_T, 2)).abs().max() <= 2e-3
    states = dict(teacher.path(x_T, "ddim", 10))
    for k, t in enumerate(data.info.timesteps, 1):
        expected = downsample(states[t], data.info.resolutions[k - 1])
        assert (levels[k] - expected).abs().max() <= 4e-3
    assert (levels[4] - states[0].clamp(-1, 1)).abs().max() <= 1e-3


def test_manifest_describes_the_data(trajectories):
    manifest = json.loads((trajectories / "manifest.json").read_text())
    assert [(s["start"], s["count"]) for s in manifest["shards"]] == [(0, 8), (8, 8), (16, 8)]
    assert all(s["sha256"] == files.sha256(trajectories / s["file"]) for s in manifest["shards"])
    _, levels = Trajectories(trajectories).batch(list(range(24)), [1, 2, 3, 4])
    for k in range(1, 5):
        assert abs(manifest["standard_deviations"][k - 1] - levels[k].double().std(correction=0).item()) < 1e-6
    assert 0.9 < manifest["latent_standard_deviation"] < 1.1
    assert manifest["recipe"]["teacher"] == tiny_teacher().identity()


def test_unpaired_data(unpaired):
    data = Trajectories(unpaired)
    assert not data.paired and data.info.steps == 20
    assert data.info.timesteps[:2] == [19, 19]


def test_last_batch_is_padded(tmp_path, teacher):
    """Sample i does not depend on the number of samples."""
    few = record_trajectories(teacher, tiny_recording(num=6), tmp_path / "few", progress=False)
    many = record_trajectories(teacher, tiny_recording(num=8), tmp_path / "many", progress=False)
    a, b = (Trajectories(folder).batch([4, 5], [4])[1][4] for folder in (few, many))
    assert torch.equal(a, b)


def test_a_killed_run_goes_on_and_is_byte_identical(teacher_folder, tmp_path):
    arguments = ["trajectories", "--teacher", teacher_folder, *CLI, "--out"]
    assert fork_cli(*arguments, tmp_path / "whole").returncode == 0
    process = start_cli(*arguments, tmp_path / "killed")
    wait_for(tmp_path / "killed" / "shard-00001.safetensors", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "shard-00004.safetensors").exists(), "the run ended before it was killed"
    # Leftovers of a process killed while writing; process numbers end far below this one.
    (tmp_path / "killed" / f".shard-00003.safetensors.{folders._HOST}.4194999.tmp").write_bytes(b"torn")
    assert fork_cli(*arguments, tmp_path / "killed").returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def by_one_thread(teacher_folder, tmp_path_factory):
    """The files that one process records: a forked child, which has one thread."""
    folder = tmp_path_factory.mktemp("recorded") / "one"
    assert fork_cli("trajectories", "--teacher", teacher_folder, *CLI, "--out", folder).returncode == 0
    return contents(folder)


def test_processes_share_the_work(teacher_folder, by_one_thread, tmp_path):
    arguments = ["trajectories", "--teacher", teacher_folder, *CLI, "--out"]
    done = run_torchrun("advkd.cli", *arguments, tmp_path / "two", environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert fork_cli(*arguments, tmp_path / "local", "--processes", 3).returncode == 0
    assert by_one_thread == contents(tmp_path / "two") == contents(tmp_path / "local")


def test_another_batch_size_and_thread_count_stay_within_the_stated_tolerance(trajectories, teacher, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if before == 1 else 1)
        other = record_trajectories(teacher, tiny_recording(batch_size=8), tmp_path, progress=False)
    finally:
        torch.set_num_threads(before)
    (z, levels), (other_z, other_levels) = (Trajectories(f).batch(range(24), [1, 2, 3, 4]) for f in (trajectories, other))
    assert torch.equal(z, other_z)
    for k in levels:
        assert ((levels[k] - other_levels[k]).abs() <= 1e-4 + 2**-10 * levels[k].abs()).all()


def test_local_processes_refuse_in_one_line(teacher_folder, trajectories, tmp_path):
    arguments = ["trajectories", "--teacher", teacher_folder, *CLI, "--processes", 2, "--out"]
    for more, word in ((["--depth", 5], "depth"), (["--batch-size", 3], "shard_size"), (["--num", 10**15], "MiB are free")):
        result = fork_cli(*arguments, tmp_path / "t", *more)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1) and word in result.stderr
    result = fork_cli(*arguments, trajectories)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "another" in result.stderr


def test_local_processes_die_with_their_parent(teacher_folder, by_one_thread, tmp_path):
    """After a kill midway no process of the first run goes on writing, and a new start gives the same result."""
    arguments = ["trajectories", "--teacher", teacher_folder, *CLI, "--out", tmp_path / "killed"]
    process = fork("-m", "advkd.cli", *arguments, "--processes", 2)
    wait_for(tmp_path / "killed" / "shard-00000.safetensors", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3)
    state = contents(tmp_path / "killed")
    time.sleep(2)
    assert contents(tmp_path / "killed") == state
    assert fork_cli(*arguments).returncode == 0
    assert contents(tmp_path / "killed") == by_one_thread


def test_two_runs_into_one_folder(teacher_folder, tmp_path):
    """The second run is refused before it computes; it would mix its shards with the first one's."""
    arguments = ["trajectories", "--teacher", teacher_folder, *CLI, "--processes", 2, "--out", tmp_path / "t", "--seed"]
    runs = {seed: fork("-m", "advkd.cli", *arguments, seed) for seed in (0, 7)}
    codes = {process.wait(240): seed for seed, process in runs.items()}
    assert sorted(codes) == [0, 2]
    assert Trajectories(tmp_path / "t").info.seed == codes[0]


def test_two_launchers_runs_into_one_folder(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    info = recorder._describe(teacher, tiny_recording(seed=7))
    with recorder._shared(tmp_path, info):
        with recorder._shared(tmp_path, info), pytest.raises(InputError, match="another seed"):
            record_trajectories(teacher, tiny_recording(), tmp_path, progress=False)
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")
        with pytest.raises(InputError, match="another process is writing there"):
            record_trajectories(teacher, tiny_recording(), tmp_path, progress=False)
    assert [path.name for path in tmp_path.glob("*") if path.name != ".lock"] == [".recipe.json"]
    whole = (tmp_path / ".recipe.json").read_bytes()
    (tmp_path / ".recipe.json").write_bytes(whole[:-5])
    with pytest.raises(InputError, match=".recipe.json is not readable JSON .*: remove it if no other process writes there"):
        with recorder._shared(tmp_path, info):
            raise AssertionError("a damaged description was passed over")
    (tmp_path / ".recipe.json").write_bytes(whole)
    record_trajectories(teacher, tiny_recording(), tmp_path, progress=False)
    assert not (tmp_path / ".recipe.json").exists()


INTERRUPTED = """
import multiprocessing, sys
from advkd.data.dataset_info import TrajectoryConfig
from advkd.diffusion.recorder import record_in_processes
if __name__ == "__main__":
    config = TrajectoryConfig(steps=10, num=40000, depth=4, batch_size=4, shard_size=8)
    try:
        record_in_processes(sys.argv[1], config, sys.argv[2], 2)
    except KeyboardInterrupt:
        print(len(multiprocessing.active_children()))
"""


def interrupted(process, folder):
    """Interrupt a process group once it has recorded something; returns its end. No process of the group is left."""
    try:
        wait_for(folder / "shard-00000.safetensors", process)
        os.killpg(process.pid, signal.SIGINT)
        done, deadline = process.finish(60), time.monotonic() + 20
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "resource_tracker" not in done.stderr and "Traceback" not in done.stderr
    return done


# A shell's background jobs ignore interrupts, and so would what they start.
LISTENING = "import os, runpy, signal, sys; os.setsid(); signal.signal(signal.SIGINT, signal.default_int_handler); "


def test_an_interrupted_script_has_no_workers_left(teacher_folder, tmp_path):
    """In fresh interpreters."""
    (tmp_path / "script.py").write_text(INTERRUPTED)
    run = "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = interrupted(start("-c", LISTENING + run, tmp_path / "script.py", teacher_folder, tmp_path / "t"), tmp_path / "t")
    assert (done.returncode, done.stdout) == (0, "0\n")


@pytest.mark.parametrize("by", [fork, pytest.param(start, marks=pytest.mark.kernels)], ids=["forked", "fresh"])
def test_an_interrupted_command_leaves_no_workers(by, teacher_folder, tmp_path):
    command = ["trajectories", "--teacher", teacher_folder, *CLI, "--num", 40000, "--processes", 2, "--out", tmp_path / "t"]
    run = "runpy.run_module('advkd', run_name='__main__', alter_sys=True)"
    done = interrupted(by("-c", LISTENING + run, *command), tmp_path / "t")
    assert done.returncode == 130 and done.stderr.endswith("(with --resume where it has one) to go on\n")


def test_each_process_writes_its_own_shards(teacher, tmp_path, monkeypatch):
    written = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        record_trajectories(teacher, tiny_recording(), tmp_path, progress=False)
        written.append(sorted(p.name[:11] for p in tmp_path.glob("[!.]*")))
    assert written == [["shard-00001"], ["manifest.js", "shard-00000", "shard-00001", "shard-00002"]]


def test_another_schedule_is_another_teacher(trajectories, tmp_path):
    shutil.copytree(trajectories, tmp_path / "t")
    (tmp_path / "t" / "shard-00001.safetensors").unlink()
    with pytest.raises(InputError, match="another teacher"):
        record_trajectories(tiny_teacher(prediction_type="v_prediction"), tiny_recording(), tmp_path / "t", progress=False)


def test_damaged_shards_are_named(trajectories, teacher, tmp_path):
    for damage in ("truncated", "altered", "missing"):
        folder = tmp_path / damage
        shutil.copytree(trajectories, folder)
        shard = folder / "shard-00001.safetensors"
        data = bytearray(shard.read_bytes())
        if damage == "missing":
            shard.unlink()
        else:
            data[-20] ^= 1
            shard.write_bytes(data[:-100] if damage == "truncated" else data)
        with pytest.raises(InputError, match="shard-00001"):
            Trajectories(folder).verify()
        if damage == "missing":
            record_trajectories(teacher, tiny_recording(), folder, progress=False)
            assert contents(folder) == contents(trajectories)
        else:
            with pytest.raises(InputError, match="shard-00001"):
                record_trajectories(teacher, tiny_recording(), folder, progress=False)


def test_states_that_are_not_finite_are_refused(tmp_path):
    teacher = tiny_teacher()
    teacher.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="level_01 of teacher tiny is not finite"):
        record_trajectories(teacher, tiny_recording(), tmp_path / "t", progress=False)
    assert not list((tmp_path / "t").glob("[!.]*"))


def test_a_shard_is_written_while_the_next_one_is_made(teacher, tmp_path, monkeypatch):
    """A slow disk holds up the second shard's end, not its beginning; its failure is not lost."""
    order, real = [], recorder.write_tensors

    def slow(path, *arguments):
        time.sleep(0.5)
        order.append(f"wrote {path.stem}")
        real(path, *arguments)

    def run(*arguments):
        order.append("ran")
        return real_run(*arguments)

    real_run = recorder._run_shard
    monkeypatch.setattr(recorder, "write_tensors", slow)
    monkeypatch.setattr(recorder, "_run_shard", run)
    record_trajectories(teacher, tiny_recording(num=16), tmp_path / "t", progress=False)
    assert order == ["ran", "ran", "wrote shard-00000", "wrote shard-00001"]

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(recorder, "write_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        record_trajectories(teacher, tiny_recording(num=16), tmp_path / "u", progress=False)


def test_mixed_precision_from_the_command_line(teacher_folder, tmp_path):
    arguments = ["trajectories", "--teacher", teacher_folder, *CLI, "--out", tmp_path / "t"]
    assert fork_cli(*arguments, "--autocast", "--processes", 2).returncode == 0
    assert "autocast" in json.loads((tmp_path / "t" / "manifest.json").read_text())["recipe"]["teacher"]
    result = fork_cli(*arguments)
    assert result.returncode == 2 and "another teacher" in result.stderr
    # A teacher that continues such data adopts their precision.
    teacher = Teacher.from_pretrained(str(teacher_folder))
    recorded = Trajectories(tmp_path / "t").info.teacher
    assert not same_teacher(teacher.identity(), recorded) and same_teacher(teacher.match(recorded).identity(), recorded)


def test_another_recipe_or_an_unfinished_run_is_refused(trajectories, teacher, tmp_path):
    with pytest.raises(InputError, match="another seed"):
        record_trajectories(teacher, tiny_recording(seed=9), trajectories, progress=False)
    shutil.copytree(trajectories, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "manifest.json").unlink()
    with pytest.raises(InputError, match="unfinished"):
        Trajectories(tmp_path / "unfinished")
    with pytest.raises(InputError, match="not a folder"):
        Trajectories(tmp_path / "nothing")
    (tmp_path / "foreign").mkdir()
    manifest = json.loads((trajectories / "manifest.json").read_text())
    broken = [{**manifest, key: value} for key, value in (("recipe", {}), ("shards", []), ("standard_deviations", []))]
    for text in ("{}", "[]", "torn", *map(json.dumps, broken)):
        (tmp_path / "foreign" / "manifest.json").write_text(text)
        with pytest.raises(InputError, match="manifest.json"):
            Trajectories(tmp_path / "foreign")


def test_an_earlier_versions_manifest_stays(trajectories, teacher, tmp_path):
    """Unfinished runs identify their data by the bytes of its manifest."""
    shutil.copytree(trajectories, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    now = path.read_bytes()
    older = {key: value for key, value in json.loads(now).items() if key != "digest"}
    files.write_json(path, older)
    before = path.read_bytes()
    record_trajectories(teacher, tiny_recording(), tmp_path / "data", progress=False)
    assert path.read_bytes() == before
    for other in ({**older, "standard_deviations": []}, {**older, "digest": "0"}):
        files.write_json(path, other)
        record_trajectories(teacher, tiny_recording(), tmp_path / "data", progress=False)
        assert path.read_bytes() == now


def in_the_older_form(folder):
    """A finished recording as an earlier version wrote it: digests are of tensors alone, and the manifest has none."""
    for path in folder.glob("shard-*.safetensors"):
        tensors, metadata = files.read_tensors(path)
        files.write_tensors(path, tensors, {**metadata, "digest": files.digest(tensors)})
    manifest = manifest_of(folder, Trajectories(folder).info)
    files.write_json(folder / "manifest.json", {key: value for key, value in manifest.items() if key != "digest"})


@pytest.mark.parametrize("lost", [("shard-00000",), ("shard-00002",), ("shard-00000", "shard-00001", "shard-00002")])
def test_shards_that_an_earlier_version_lost_come_back_as_they_were(lost, trajectories, teacher, tmp_path):
    """The manifest records the shards' bytes, and runs identify their data by its own."""
    folder = tmp_path / "data"
    shutil.copytree(trajectories, folder)
    in_the_older_form(folder)
    before = contents(folder)
    for name in lost:
        (folder / f"{name}.safetensors").unlink()
    record_trajectories(teacher, tiny_recording(), folder, progress=False)
    assert contents(folder) == before != contents(trajectories)


def test_a_manifest_is_as_it_was_written(trajectories, tmp_path):
    shutil.copytree(trajectories, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    whole = json.loads(path.read_text())
    older = {key: value for key, value in whole.items() if key != "digest"}
    deviations = [2 * value for value in whole["standard_deviations"]]
    for altered in ({"standard_deviations": deviations}, {"recipe": {**whole["recipe"], "seed": 1}}):
        path.write_text(json.dumps({**whole, **altered}))
        with pytest.raises(InputError, match="manifest.json is damaged"):
            Trajectories(tmp_path / "data")
        # An older manifest has no digest, but the shards hold its recipe.
        path.write_text(json.dumps({**older, **altered}))
        data = Trajectories(tmp_path / "data")
        if "recipe" in altered:
            with pytest.raises(InputError, match="shard-00000.safetensors has another recipe than the manifest"):
                data.verify()
        else:
            data.verify()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num": 0}, "num"),
        ({"batch_size": 0}, "batch_size"),
        ({"shard_size": 6}, "shard_size"),
        ({"seed": -1}, "seed"),
        ({"start": 2**62}, "start"),
        ({"solver": "rk4"}, "solver"),
        ({"steps": 2000}, "steps"),
        ({"depth": 5}, "depth"),
        ({"depth": 2}, "depth"),
        ({"latent_size": 3}, "latent_size"),
    ],
)
def test_bad_requests_are_refused_before_work(changes, name, tmp_path):
    with pytest.raises(InputError, match=name):
        record_trajectories(tiny_teacher(), tiny_recording(**changes), tmp_path / "t", progress=False)
    assert not list(tmp_path.glob("t/*"))


def test_a_disk_too_small_is_refused_before_work(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage(1, 1, 100))
    with pytest.raises(InputError, match="MiB are free"):
        record_trajectories(tiny_teacher(), tiny_recording(), tmp_path / "t", progress=False)


def test_a_disk_that_fills_up_keeps_what_is_written(tmp_path):
    """A file-size limit stands in for the full disk: the current shard is not left as a torn file."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "import torch; from advkd.runtime.files import write_tensors\n"
        "write_tensors(sys.argv[1] + '/small.safetensors', {'x': torch.zeros(8)})\n"
        "try: write_tensors(sys.argv[1] + '/large.safetensors', {'x': torch.zeros(10000)})\n"
        "except ValueError as error: print(error)"
    )
    result = fork("-c", code, tmp_path).finish(60)
    assert "no space left to write" in result.stdout and "large.safetensors" in result.stdout, result.stderr
    assert os.listdir(tmp_path) == ["small.safetensors"]


def test_no_level_of_a_short_run_is_the_image():
    """A run of few steps ends from a high timestep: the paper's smallest ones snap to the step before it."""
    for solver, steps in (("unipc", 10), ("dpmpp-2m", 4), ("heun", 2)):
        teacher = tiny_teacher()
        timesteps = teacher.timesteps(solver, steps)
        found = supervising_timesteps(solver, 12, timesteps, 1000)
        assert timesteps[-1] not in found and set(found) <= set(timesteps)
    assert supervising_timesteps("unipc-2", 4, [999], 1000) == [999] * 3
