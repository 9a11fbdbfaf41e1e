"""Files: links, locks, names, limits, and errors about files that cannot be read."""

import errno
import fcntl
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from advkd.errors import InputError
from advkd.runtime import files, folders

from ..conftest import fork

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2910660\n"


def test_a_link_stays_and_its_target_is_written(tmp_path):
    target, link = tmp_path / "disk" / "target.json", tmp_path / "link.json"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    files.write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}
    # A chain of relative links, and one whose target does not exist yet.
    (tmp_path / "chain.json").symlink_to("link.json")
    (tmp_path / "new.json").symlink_to("disk/new.json")
    files.write_json(tmp_path / "chain.json", {"b": 2})
    files.write_json(tmp_path / "new.json", {"c": 3})
    assert json.loads(target.read_text()) == {"b": 2} and (tmp_path / "chain.json").is_symlink()
    assert json.loads((tmp_path / "disk" / "new.json").read_text()) == {"c": 3}
    assert sorted(os.listdir(target.parent)) == ["new.json", "target.json"]


def test_a_failure_leaves_the_target_as_it_was(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    with pytest.raises(ZeroDivisionError), files.replacing(link) as temporary:
        temporary.write_text("torn")
        1 / 0
    assert target.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["link.txt", "target.txt"]


def test_an_interrupt_of_the_command_line_removes_temporary_files(tmp_path):
    lines = ["import os, signal, sys", "from advkd.runtime import files, launcher"]
    # A shell may have made this process, and with it the child, ignore interrupts.
    lines += ["signal.signal(signal.SIGINT, signal.default_int_handler)", "launcher.end_at_interrupt()"]
    lines += ["with files.replacing(sys.argv[1]):", "    os.kill(os.getpid(), signal.SIGINT)", "    signal.pause()"]
    assert fork("-c", "\n".join(lines), tmp_path / "a.png").wait(100) == 130
    assert not list(tmp_path.iterdir())


def test_a_folder_stays_held_until_its_last_holder_ends(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with folders.held(folder):
        with folders.held(folder):
            pass
        folder.rmdir()
        with pytest.raises(InputError, match="its folder has been removed"):
            files.write_json(folder / "a.json", {})
    files.write_json(folder / "a.json", {})


def test_a_held_folder_is_not_made_again_for_one_below_it(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with folders.held(folder):
        files.write_json(folder / "pictures" / "a.json", {})
        folder.rename(tmp_path / "away")
        for work in (
            lambda: files.write_json(folder / "pictures" / "b.json", {}),
            lambda: folders.require_output_folder(folder / "trajectories" / "0001"),
        ):
            with pytest.raises(InputError, match=f"{folder}/.* cannot be written: its folder has been removed"):
                work()
        assert not folder.exists()
    folders.require_output_folder(folder / "trajectories" / "0001")


def test_an_open_file_that_has_lost_its_name_is_noticed(tmp_path):
    path = tmp_path / "metrics.csv"
    with open(path, "w") as file:
        files.require_there(file, path)
        path.rename(tmp_path / "away.csv")
        for other in (False, True):
            if other:
                path.write_text("another run's")
            with pytest.raises(InputError, match="metrics.csv cannot be written: it has been removed or moved away"):
                files.require_there(file, path)


def test_threads_that_write_one_path_do_not_disturb_each_other(tmp_path):
    def write(i):
        for _ in range(100):
            files.write_json(tmp_path / "same.json", {"i": i, "long": "x" * 20_000})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert files.read_json(tmp_path / "same.json")["i"] in range(4) and os.listdir(tmp_path) == ["same.json"]


def test_an_error_of_any_class_names_the_file(tmp_path):
    class Unusual(OSError):
        def __init__(self):
            super().__init__(errno.EIO, "Input/output error")

    with pytest.raises(Unusual, match=f"{tmp_path}/a.json"), folders.writing(tmp_path / "a.json"):
        raise Unusual
    # Renaming involves two names, only one of them the user's.
    temporary = folders.temporary_path(tmp_path / "a.json")
    with pytest.raises(OSError, match="a.json'$") as raised, folders.writing(tmp_path / "a.json", temporary):
        raise OSError(errno.EIO, "Input/output error", str(temporary), None, str(tmp_path / "a.json"))
    assert ".tmp" not in str(raised.value)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EACCES, errno.EMLINK, errno.EXDEV, errno.ENOTTY])
def test_a_file_system_without_hard_links_is_written_to(code, tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    files.write_json(tmp_path / "a.json", {"a": 1}, once=True)
    assert files.read_json(tmp_path / "a.json") == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_disk_that_fails_is_not_taken_for_one_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_json(tmp_path / "a.json", {"a": 1}, once=True)
    assert not list(tmp_path.iterdir())


def test_a_planted_link_in_the_temporary_files_place_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folders.temporary_path(tmp_path / "a.json").symlink_to(victim)
    files.write_json(tmp_path / "a.json", {})
    assert victim.read_text() == "mine" and json.loads((tmp_path / "a.json").read_text()) == {}


def test_leftovers_are_removed_and_what_they_link_to_is_not(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / f".a.{folders._HOST}.4194999.tmp").symlink_to(tmp_path / "mine")
    (out / f".b.{folders._HOST}.4194999.tmp").mkdir()
    (out / f".b.{folders._HOST}.4194999-4195001.tmp").write_text("torn")
    in_use = [f".c.{folders._HOST}.{os.getpid()}.tmp", folders.temporary_path(out / "d").name]
    for name in in_use:
        (out / name).write_text("at work")
    folders.remove_leftovers(out)
    assert sorted(path.name for path in out.iterdir()) == in_use
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_names_as_long_as_a_file_system_allows(tmp_path):
    for name in ("n" * 250 + ".json", "\u00e9" * 125 + ".json"):
        files.write_json(tmp_path / name, {"a": 1})
        assert files.read_json(tmp_path / name) == {"a": 1}
    # One that is too long is refused by its own name.
    with pytest.raises(OSError, match="n" * 300) as refused:
        files.write_json(tmp_path / ("n" * 300), {})
    assert refused.value.errno == errno.ENAMETOOLONG and ".tmp" not in str(refused.value)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(code, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=f"{tmp_path}: its file system has no locks"), folders.locked(tmp_path):
        entered = True
    assert entered


def test_a_second_process_and_other_failures_are_refused(tmp_path, monkeypatch):
    with (
        folders.locked(tmp_path),
        pytest.raises(InputError, match="another process is writing there"),
        folders.locked(tmp_path),
    ):
        raise AssertionError("the folder was locked twice")

    def flock(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match=f"{tmp_path} cannot be locked .Input/output error"), folders.locked(tmp_path):
        raise AssertionError("an error of the disk was passed over")


def test_a_lock_empties_no_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with folders.locked(tmp_path):
        assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(("make", "why"), [(os.mkfifo, "not a regular file"), (os.mkdir, "cannot be opened")])
def test_a_lock_that_is_no_file_is_refused(make, why, tmp_path):
    make(tmp_path / ".lock")
    with pytest.raises(InputError, match=f"{tmp_path}: its .lock .*{why}"), folders.locked(tmp_path):
        raise AssertionError("what is no file was locked")


def test_an_optimisers_state_fits_its_parameters():
    def packed(*sizes):
        parameters = [torch.ones(size, requires_grad=True) for size in sizes]
        optimizer = torch.optim.Adam(parameters)
        sum(p.sum() for p in parameters).backward()
        optimizer.step()
        return files.pack_optimizer("adam", optimizer)

    def fresh():
        return torch.optim.Adam([torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)])

    whole = packed(3, 2)
    files.unpack_optimizer("adam", fresh(), whole)
    wrong = [packed(2, 3), packed(3, 2, 1), {**whole, "adam/0/step": torch.ones(3)}, {**whole, "adam/x/step": torch.ones(())}]
    wrong += [{name: tensor for name, tensor in whole.items() if name != gone} for gone in whole]
    for tensors in wrong:
        with pytest.raises(InputError, match="checkpoint c is damaged"), files.restoring("checkpoint", "c"):
            files.unpack_optimizer("adam", fresh(), tensors)


def test_output_links_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with pytest.raises(InputError, match=f"{tmp_path}/out is a link to {tmp_path}/disk, which does not exist"):
        folders.require_output_folder(tmp_path / "out")


def test_a_file_system_that_cannot_synchronize_is_written_to(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}


def test_damage_is_named_with_its_remedy(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    files.write_tensors(path, {"x": torch.arange(64.0)}, {"digest": ""})
    whole = path.read_bytes()
    for data, why in ((whole[:-5], ""), (b"", "it is empty"), (b"\xff" * 64, ""), (whole[:4], "")):
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"checkpoint.safetensors is damaged .*{why}.*: delete it and start again"):
            files.read_tensors(path, "checkpoint")
    path.write_text(POINTER)
    with pytest.raises(InputError, match="is damaged .*run 'git lfs pull'.$"):
        files.read_tensors(path, "checkpoint")
    with pytest.raises(InputError, match="is altered: delete it and start again, or restore a copy"):
        files.require_digest(path, {"x": torch.zeros(1)}, {"digest": "0"})


def test_digests_are_of_tensors_and_metadata(tmp_path):
    tensors, path = {"x": torch.arange(4.0)}, tmp_path / "checkpoint.safetensors"
    metadata = files.with_digest(tensors, {"update": 8, "run": {"betas": (0.0, 0.9), "name": None}})
    files.write_tensors(path, tensors, metadata)
    files.require_digest(path, *files.read_tensors(path))
    for altered in (
        ({"x": torch.arange(4.0).roll(1)}, metadata),
        (tensors, {**metadata, "update": 9}),
        (tensors, {"digest": None}),
    ):
        with pytest.raises(InputError, match="checkpoint.safetensors is altered"):
            files.require_digest(path, *altered)
    # Older files.
    files.require_digest(path, tensors, {"update": 9, "digest": files.digest(tensors)})


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "a.json"
    for text in ('{"num": 3, "num": 4}', '{"a": [{"num": 3, "x": 1, "num": 3}]}'):
        path.write_text(text)
        with pytest.raises(InputError, match="a.json is not readable JSON .the key 'num' is there twice"):
            files.read_json(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"a": ' * 100_000, "1" * 10_000, '{"a": ' + "1" * 10_000 + "}", "\udcff", "NaN", "[]", "3"],
)
def test_anything_that_is_no_json_object_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="a.json"):
        files.read_json(tmp_path / "a.json")


def test_pipes_devices_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large.json").write_bytes(b" " * (files.JSON_LIMIT + 1))
    for name, why in (
        ("pipe", "not a regular file"),
        ("zero", "not a regular file"),
        (".", "not a regular file"),
        ("loop", "cannot be read"),
        ("none", "does not exist"),
        ("a\0b", "cannot be read"),
    ):
        for read in (files.read_json, files.read_tensors):
            with pytest.raises(InputError, match=why):
                read(tmp_path / name, "thing")
    with pytest.raises(InputError, match="more than the 4,194,304"):
        files.read_json(tmp_path / "large.json")


def test_a_user_without_a_home_has_a_private_cache(tmp_path, monkeypatch):
    for name in ("ADVKD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(folders.os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = folders.cache_folder()
    assert folder.parent == tmp_path and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folders.cache_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(InputError, match="can be written by others: set ADVKD_CACHE"):
        folders.cache_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(InputError, match="set ADVKD_CACHE"):
        folders.cache_folder()
