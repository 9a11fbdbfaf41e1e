"""Recordings of conditional teachers: classes by index, guidance, the sources that read them."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from advkd.data.dataset_info import LABELLED, DatasetInfo
from advkd.data.labels import labels_in_turn
from advkd.data.shards import manifest_of
from advkd.data.sources import Recorded, RecordedPairs
from advkd.data.trajectories import Trajectories
from advkd.diffusion.guidance import class_numbers, joined
from advkd.diffusion.loading import Classes
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.methods.adv_kd import recipe
from advkd.methods.pairs import PairsConfig
from advkd.ops.latents import project
from advkd.runtime import files
from advkd.training.distillation import Distiller, distill

from ..conftest import ROOT, fork_cli, tiny_recording, tiny_student, tiny_unet
from .test_trajectories import contents

GUIDED = {"solver": "unipc-2", "classes": "c,a", "guidance": 1.5}
SMALL = recipe("joint", updates=(2,), batch_sizes=(8,), critic_channels=4, critic_max_channels=8, checkpoint_every=2)
STORED = 2**-11
"""Rounding of an image in [-1, 1] to float16."""


@pytest.fixture(scope="module")
def told(conditional):
    return Teacher.from_pretrained(conditional)


@pytest.fixture(scope="module")
def labelled(told, tmp_path_factory):
    """Samples 5 to 26, of the classes c (even indices) and a."""
    out = tmp_path_factory.mktemp("labelled")
    return record_trajectories(told, tiny_recording(num=22, start=5, **GUIDED), out, progress=False)


@pytest.fixture(scope="module")
def both(told, labelled, tmp_path_factory):
    """A data set of two folders: samples 5 to 26 and, before them, 0 to 4."""
    first = record_trajectories(told, tiny_recording(num=5, **GUIDED), tmp_path_factory.mktemp("first"), progress=False)
    return Trajectories(labelled, first)


def test_samples_are_the_teachers_of_their_classes(told, labelled):
    """Each equals the teacher's sample of its index, drawn alone; those of the padded last batch, too."""
    data = Trajectories(labelled)
    images, labels = data.images(range(22)), data.labels(range(22))
    assert labels.dtype == torch.int64 and labels.tolist() == [0, 2] * 11
    for row in (0, 1, 7, 8, 20, 21):
        condition = {"labels": [int(labels[row])], "guidance": 1.5}
        assert (images[row] - told.sample(1, 0, "unipc-2", 10, 5 + row, **condition)[0]).abs().max() <= 1e-3
        for other in ({**condition, "labels": [1]}, {**condition, "guidance": 0.0}):
            assert (images[row] - told.sample(1, 0, "unipc-2", 10, 5 + row, **other)[0]).abs().max() > 1e-2
    assert torch.equal(images, data.batch(range(22), [4])[1][4])


def test_levels_are_of_guided_paths(told, labelled):
    data = Trajectories(labelled)
    states = dict(told.path(told.noise(4, 0, 5), "unipc-2", 10, labels=[0, 2, 0, 2], guidance=1.5))
    level = data.batch(range(4), [3])[1][3]
    assert (level - states[data.info.timesteps[2]]).abs().max() <= 4e-3


def test_a_description_names_classes_and_guidance(labelled):
    info = Trajectories(labelled).info
    assert (info.classes, info.class_numbers, info.class_names, info.guidance) == ("c,a", [2, 0], ["c", "a"], 1.5)
    described = json.loads((labelled / "manifest.json").read_text())["recipe"]
    assert DatasetInfo.from_json(described).to_json() == described
    assert info.config() == tiny_recording(num=22, start=5, latent_size=2, **GUIDED)


def test_labels_are_a_function_of_the_index(told, labelled, tmp_path):
    """Neither the start nor the number, the batch or the shards change a sample's class, or its image beyond rounding."""
    changes = {"num": 9, "start": 12, "batch_size": 2, "shard_size": 6}
    other = Trajectories(record_trajectories(told, tiny_recording(**{**GUIDED, **changes}), tmp_path, progress=False))
    data = Trajectories(labelled)
    assert other.labels(range(9)).tolist() == data.labels(range(7, 16)).tolist() == [2, 0] * 4 + [2]
    images = data.images(range(7, 16))
    assert ((other.images(range(9)) - images).abs() <= 1e-4 + 2 * STORED * images.abs()).all()


def test_turns():
    assert labels_in_turn([], 0, 4) is None
    assert labels_in_turn([7, 1, 1], 2**62 + 1, 4).tolist() == [[7, 1, 1][(2**62 + 1 + i) % 3] for i in range(4)]


def test_names_of_classes(told):
    assert class_numbers(told, told.class_names, "all") == [0, 1, 2] and class_numbers(told, told.class_names, None) == []
    assert class_numbers(told, ("all", "b", "c"), "all") == [0], "a class of that name comes first"
    names = ("tench, Tinca", " b ", 'c"', "d", '"')
    for numbers in ([0], [1, 0], [3, 1, 2], [4, 3], [4], [2, 0, 4]):
        assert class_numbers(told, names, joined([names[number] for number in numbers])) == numbers
    assert joined(["a", "b c"]) == "a,b c" and class_numbers(told, names, '"tench, Tinca", d') == [0, 3]


def test_every_class_is_one_recording_however_it_is_named(told, tmp_path):
    a, b = (
        record_trajectories(told, tiny_recording(num=4, classes=classes), tmp_path / classes, progress=False)
        for classes in ("all", "a,b,c")
    )
    assert contents(a) == contents(b) and Trajectories(a).labels(range(4)).tolist() == [0, 1, 2, 0]
    record_trajectories(told, tiny_recording(num=4, classes=" a, b, c"), a, progress=False)
    with pytest.raises(InputError, match="made with another class_names, class_numbers, classes: name another folder"):
        record_trajectories(told, tiny_recording(num=4, classes="a,c,b"), a, progress=False)
    with pytest.raises(InputError, match="made with another guidance"):
        record_trajectories(told, tiny_recording(num=4, classes="all", guidance=1.0), a, progress=False)


def test_processes_and_resumption_write_the_same_bytes(conditional, tmp_path):
    command = [
        "trajectories",
        "--teacher",
        conditional,
        "--classes",
        "all",
        "--guidance",
        2,
        "--solver",
        "unipc-2",
        "--steps",
        10,
    ]
    command += ["--num", 20, "--start", 7, "--depth", 4, "--batch-size", 4, "--shard-size", 8, "--out"]
    assert fork_cli(*command, tmp_path / "one").returncode == 0
    assert fork_cli(*command, tmp_path / "two", "--processes", 2).returncode == 0
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == whole
    for name in ("manifest.json", "shard-00001.safetensors", "shard-00002.safetensors"):
        (tmp_path / "two" / name).unlink()
    assert fork_cli(*command, tmp_path / "two").returncode == 0
    assert contents(tmp_path / "two") == whole
    assert Trajectories(tmp_path / "one").labels(range(20)).tolist() == [(7 + i) % 3 for i in range(20)]


def test_no_class_is_the_null_class(told, tmp_path):
    data = Trajectories(record_trajectories(told, tiny_recording(num=4), tmp_path, progress=False))
    assert data.labels(range(4)) is None and Recorded(data).batch([0], [4], torch.device("cpu"), torch.float32).labels is None
    assert (data.images(range(4)) - told.sample(4, 0, "ddim", 10)).abs().max() <= 1e-3
    described = json.loads((tmp_path / "manifest.json").read_text())["recipe"]
    assert not {*described} & {*LABELLED}


def test_recordings_without_classes_are_described_as_before(trajectories):
    """Runs know their data by the bytes of its manifest."""
    described = json.loads((trajectories / "manifest.json").read_text())["recipe"]
    earlier = json.loads((ROOT / "tests" / "data" / "earlier" / "recording" / "manifest.json").read_text())["recipe"]
    assert described.keys() == earlier.keys()
    assert DatasetInfo.from_json(earlier).to_json() == earlier and Trajectories(trajectories).labels([0]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": 1.0}, "guidance 1.0 needs classes: name what it is towards by --classes"),
        ({"classes": "a", "guidance": -1.0}, "guidance must be at least 0"),
        ({"classes": "a", "guidance": float("nan")}, "guidance must be finite"),
        ({"classes": "d"}, "--classes: 'd' is not one of a, b, c"),
        ({"classes": " ,"}, "--classes must name a class"),
        ({"classes": ["a"]}, "classes must be a text"),
    ],
)
def test_bad_requests_are_refused_before_work(changes, message, told, tmp_path):
    with pytest.raises(InputError, match=message):
        record_trajectories(told, tiny_recording(**changes), tmp_path / "t", progress=False)
    assert not (tmp_path / "t").exists()


def test_teachers_that_do_not_suit_are_refused_before_work(teacher, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    numbered = Teacher(tiny_unet(num_class_embeds=2), diffusers.DDPMScheduler(), "t", Classes(("a", "b")))
    for model, changes, message in (
        (teacher, {"classes": "all"}, "--classes all: teacher tiny is unconditional; leave it out"),
        (numbered, {}, "teacher t has no null class: name its classes by --classes"),
        (numbered, {"classes": "all", "guidance": 1.0}, "guidance: teacher t has no null class: take guidance 0"),
    ):
        with pytest.raises(InputError, match=message):
            record_trajectories(model, tiny_recording(**changes), tmp_path / "t", progress=False)
    assert not (tmp_path / "t").exists()
    data = Trajectories(record_trajectories(numbered, tiny_recording(num=4, classes="b"), tmp_path / "t", progress=False))
    assert data.labels(range(4)).tolist() == [1] * 4 and data.info.classes == "b"


def test_shards_without_labels_are_damaged(told, labelled, tmp_path):
    shutil.copytree(labelled, tmp_path / "t")
    path = tmp_path / "t" / "shard-00001.safetensors"
    tensors, metadata = files.read_tensors(path)
    del tensors["labels"], metadata["digest"]
    files.write_tensors(path, tensors, files.with_digest(tensors, metadata))
    files.write_json(tmp_path / "t" / "manifest.json", manifest_of(tmp_path / "t", Trajectories(labelled).info))
    with pytest.raises(InputError, match="shard-00001.* is damaged .it holds other tensors than its recipe says"):
        Trajectories(tmp_path / "t").labels([8])
    with pytest.raises(InputError, match="shard-00001.* is damaged .it holds other tensors than its recipe says"):
        record_trajectories(told, tiny_recording(num=22, start=5, **GUIDED), tmp_path / "t", progress=False)


@pytest.mark.parametrize(
    "damage",
    [
        {"class_names": ["c"]},
        {"class_names": [1, 2]},
        {"class_numbers": [2, -1]},
        {"class_numbers": [], "class_names": []},
        {"class_numbers": 2},
        {"classes": ""},
        {"classes": ["c", "a"]},
        {"guidance": "1"},
        {"guidance": -1.0},
    ],
)
def test_manifests_whose_classes_cannot_be_are_damaged(damage, labelled, tmp_path):
    manifest = json.loads((labelled / "manifest.json").read_text())
    del manifest["digest"]
    manifest["recipe"] |= damage
    files.write_json(tmp_path / "manifest.json", files.with_digest({}, manifest))
    with pytest.raises(InputError, match="manifest.json is damaged"):
        Trajectories(tmp_path)


def test_folders_of_other_classes_do_not_fit(told, labelled, tmp_path):
    other = record_trajectories(told, tiny_recording(num=4, **{**GUIDED, "classes": "all"}), tmp_path, progress=False)
    with pytest.raises(InputError, match="were made with different class_names, class_numbers, classes"):
        Trajectories(labelled, other)


def test_rows_of_several_folders_in_any_order(told, both):
    """Start noise, classes and images are those of the samples' indices."""
    rows = [26, 0, 21, 22, 0, 23]
    indices = [4, 5, 26, 0, 5, 1]
    assert torch.equal(both.noise(rows), torch.cat([told.noise(1, 0, index) for index in indices]))
    assert both.labels(rows).tolist() == [[2, 0][index % 2] for index in indices]
    assert torch.equal(both.images(rows), torch.cat([both.images([row]) for row in rows]))
    assert torch.equal(both.noise(torch.tensor(rows)), both.noise(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [([0, 27], "from 0 to 26, got 0 to 27"), ([-1], "from 0 to 26, got -1 to -1"), ([0.5], "whole numbers"), (["0"], "whole")],
)
def test_rows_out_of_range_are_refused(rows, message, both):
    batches = partial(both.batch, levels=[1]), partial(both.batch, levels=[], latent=(1, True))
    for read in (both.noise, both.labels, both.images, *batches):
        with pytest.raises(InputError, match=f"rows must be .*{message}"):
            read(rows)


def test_sources_have_the_labels(told, labelled, both):
    device, rows = torch.device("cpu"), [3, 9, 10]
    places = [3, 22, 23]  # the first nine of the first folder, and what was appended later
    data = Trajectories(labelled)
    sources = Recorded(data, limit=9), RecordedPairs(data, limit=9)
    data.append(both.folders[1])
    for source in sources:
        assert len(source) == 14 and source.identity() == {"trajectories": data.manifests}
        batch = source.batch(rows, [4], device, torch.float64)
        assert torch.equal(batch.labels, both.labels(places)) and batch.labels.dtype == torch.int64
        assert torch.equal(batch.images, both.images(places).double())
    assert batch.levels == {} and batch.z.dtype == torch.float64
    assert torch.equal(batch.z, torch.cat([told.noise(1, 0, index) for index in (8, 0, 1)]).double())
    recorded = sources[0].batch(rows, [4], device, torch.float64)
    assert (recorded.z - project(batch.z.float(), 2)).abs().max() <= 2e-3 and recorded.levels.keys() == {4}


def test_pairs_of_a_solver_that_adds_noise_are_refused(unpaired, trajectories):
    with pytest.raises(InputError, match="the trajectories are unpaired.*: record with --solver ddim"):
        RecordedPairs(Trajectories(unpaired))
    assert RecordedPairs(Trajectories(trajectories)).batch([0], [], torch.device("cpu"), torch.float32).labels is None


@pytest.mark.parametrize(("method", "config"), [("pairs", PairsConfig(batch_size=2)), ("adv-kd", SMALL)])
def test_students_of_other_classes_are_refused(method, config, labelled, trajectories, tmp_path):
    for data, classes, message in (
        (labelled, (), "the trajectories have classes and the student knows none: begin with a fresh one by --preset"),
        (trajectories, ("a",), "the student has classes and the trajectories have none: record them with --classes all"),
        (labelled, ("a", "b", "c"), "the trajectories' classes are c, a, the student's a, b, c: record those of the student"),
        (labelled, ("a",), "the trajectories' classes are c, a, the student's a: "),
        (labelled, ("c", "b"), "the trajectories' classes are c, a, the student's c, b: "),
    ):
        with pytest.raises(InputError, match=message):
            distill(data, tiny_student(classes=classes), config, tmp_path / "out", method=method, progress=False)
    assert not (tmp_path / "out").exists()


def test_labels_by_the_names_of_a_student(both):
    rows = [26, 0, 21, 22]
    by_name = both.labels(rows, ("a", "b", "c")), both.labels(rows, ["c", "a"])
    assert torch.equal(by_name[0], both.labels(rows)) and torch.equal(by_name[1], (both.labels(rows) == 0).long())
    assert by_name[1].dtype == torch.int64
    with pytest.raises(InputError, match="class 'a' of the samples is not one of b, c"):
        both.labels(rows, ("b", "c"))
    assert both.labels([row for row in rows if both.labels([row]) == 2], ("b", "c")).tolist() == [1] * 3


def test_a_class_that_is_named_twice_is_one_of_the_students(told, tmp_path):
    """Naming it twice gives it two of three samples."""
    data = Trajectories(record_trajectories(told, tiny_recording(num=12, classes="c,c,a"), tmp_path / "t", progress=False))
    assert data.info.student_classes == ("c", "a") and data.info.class_names == ["c", "c", "a"]
    assert data.labels(range(6), data.info.student_classes).tolist() == [0, 0, 1] * 2
    trained = distill(data, tiny_student(classes=("c", "a")), SMALL, tmp_path / "out", progress=False)
    assert trained.class_names == ("c", "a")


def test_pairs_made_while_training_have_classes(told, labelled, tmp_path):
    """Grown samples have the recording's classes; a run that goes on behind a kill equals one that was not killed."""
    config = replace(SMALL, updates=(4,), grow=7, grow_every=2, checkpoint_every=3)
    start = {"classes": ("a", "c")}
    whole = distill(labelled, tiny_student(**start), config, tmp_path / "whole", progress=False, teacher=told)
    (grown,) = (tmp_path / "whole" / "trajectories").iterdir()
    data = Trajectories(labelled, grown)
    assert data.parts[1] == {"seed": 0, "start": 27, "num": 7} and data.info.guidance == 1.5
    assert data.labels(range(22, 29)).tolist() == [[2, 0][(27 + i) % 2] for i in range(7)]
    run = Distiller(Trajectories(labelled), tiny_student(**start), config, tmp_path / "cut", progress=False, teacher=told)
    step, done = run.step, []

    def killed():
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return step()

    run.step = killed
    with pytest.raises(KeyboardInterrupt):
        run.run()
    resumed = distill(labelled, tiny_student(**start), config, tmp_path / "cut", True, progress=False, teacher=told)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_a_students_record_has_classes_and_guidance(labelled, trajectories, tmp_path):
    distill(labelled, tiny_student(classes=("c", "a")), SMALL, tmp_path / "told", progress=False)
    distill(trajectories, tiny_student(), SMALL, tmp_path / "plain", progress=False)
    told, plain = (json.loads((tmp_path / name / "training.json").read_text())["runs"][0] for name in ("told", "plain"))
    assert (told["classes"], told["guidance"]) == ("c,a", 1.5) and not {"classes", "guidance"} & set(plain)
    assert told["cost"]["forward"] - plain["cost"]["forward"] == 22 * 2 * 10 - 24 * 10, "guided paths cost twice"
