"""Files of unknown origin: reading runs no code, stays in the folder, and takes no more memory than a file's size.

Every reader is given a file of each hostile kind in the place of each of its own.
"""

import json
import os
import pickle
import re
import shutil
import struct
import sys
import tomllib
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from advkd import AdvKDPipeline, FusedStudent, Student
from advkd.cli.main import main
from advkd.data.images import load_images, load_labelled, read_pictures
from advkd.data.pictures import read_metrics
from advkd.data.trajectories import Trajectories
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.evaluation.features import build_extractor, extract
from advkd.methods.adv_kd import recipe
from advkd.models.classifier import Classifier, ClassifierConfig
from advkd.runtime.files import read_tensors, with_digest, write_json, write_tensors
from advkd.runtime.folders import cache_folder, temporary_path
from advkd.training import teacher as teacher_training
from advkd.training.distillation import distill

from ..conftest import fork, tiny_recording, tiny_student, tiny_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def hostile(kind, trace, beside=None):
    """Bytes that run code when they are unpickled, as a plain pickle or in torch's archive.

    ``beside``: a file of weights, to hide the payload among tensors that the reader expects, in no fewer bytes.
    """
    state = torch.load(beside, weights_only=True) if beside is not None else {}
    if kind == "pickle":
        return pickle.dumps(Payload(trace)) + bytes(sum(tensor.nbytes for tensor in state.values()))
    path = trace.parent / "archive"
    torch.save({**state, "payload": Payload(trace)}, path, _use_new_zipfile_serialization=kind == "archive")
    return path.read_bytes()


@pytest.fixture(scope="module")
def models(tmp_path_factory, teacher_folder, trajectories):
    """One folder of each kind that has a reader."""
    folder = tmp_path_factory.mktemp("models")
    student = tiny_student()
    student.training_record = {"samples": [], "runs": []}
    student.save_pretrained(folder / "student")
    student.eval().fuse(tune=False).save_pretrained(folder / "fused")
    AdvKDPipeline(student).save_pretrained(folder / "pipeline")
    classifier = Classifier(ClassifierConfig(image_size=8, channels=(8,)))
    classifier.training_record = {"accuracy": {}}
    classifier.save_pretrained(folder / "classifier")
    shutil.copytree(teacher_folder, folder / "teacher")
    diffusers = pytest.importorskip("diffusers")
    unet, scheduler = tiny_unet(num_class_embeds=3), diffusers.DDPMScheduler(num_train_timesteps=1000)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder / "conditional")
    write_json(folder / "conditional" / "classes.json", {"names": ["a", "b"], "null": 2})
    shutil.copytree(trajectories, folder / "data")
    shutil.copytree(teacher_folder, folder / "older")
    weights = folder / "older" / "unet" / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    for name in "ab":
        (folder / "pictures" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "pictures" / name / "1.png")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teacher_training, "_save_pipeline", interrupt)
        teacher_training.train_teacher(TINY_TRAINING, folder / "unfinished", progress=False)
    distill(folder / "data", tiny_student(), TINY_RUN, folder / "run", progress=False)
    return folder


TINY_TRAINING = teacher_training.TeacherTrainingConfig(size=8, channels=(8,), steps=2, batch_size=4, checkpoint_every=1)
TINY_RUN = recipe("joint", updates=(2,), batch_sizes=(4,), critic_channels=8, checkpoint_every=1)


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def metrics(folder):
    return read_metrics(folder / "metrics.csv")


READERS = {
    "student": (Student.from_pretrained, ["config.json", WEIGHTS, "training.json"]),
    "fused": (FusedStudent.from_pretrained, ["config.json", WEIGHTS]),
    "pipeline": (AdvKDPipeline.from_pretrained, ["model_index.json", "student/config.json", f"student/{WEIGHTS}"]),
    "classifier": (Classifier.from_pretrained, ["config.json", WEIGHTS, "training.json"]),
    "teacher": (
        Teacher.from_pretrained,
        ["model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json"],
    ),
    "conditional": (Teacher.from_pretrained, ["classes.json"]),
    "older": (Teacher.from_pretrained, ["unet/diffusion_pytorch_model.bin"]),
    "data": (lambda folder: Trajectories(folder).verify(), ["manifest.json", "shard-00001.safetensors"]),
    "pictures": (load_images, ["a/1.png"]),
    "run": (
        lambda folder: distill(folder.parent / "data", tiny_student(), TINY_RUN, folder, resume=True, progress=False),
        ["checkpoint.safetensors"],
    ),
    "unfinished": (
        lambda folder: teacher_training.train_teacher(TINY_TRAINING, folder, resume=True, progress=False),
        ["checkpoint.safetensors"],
    ),
}
PLACES = [(name, file) for name, (_, files) in READERS.items() for file in files]
KINDS = ("pickle", "archive", "legacy")


@pytest.mark.parametrize("kind", KINDS)
def test_the_payload_is_one(kind, tmp_path):
    """The contents that the tests below put into files do run code when read without care."""
    (tmp_path / "file").write_bytes(hostile(kind, tmp_path / "trace"))
    if kind == "pickle":
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "file"), PLACES)
def test_pickles_are_not_read_anywhere(name, file, kind, models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    read, trace = READERS[name][0], tmp_path / "trace"
    read(tmp_path / "models" / name)
    place = tmp_path / "models" / name / file
    place.write_bytes(hostile(kind, trace, place if place.suffix == ".bin" else None))
    with pytest.raises(InputError):
        read(tmp_path / "models" / name)
    assert not trace.exists()


@pytest.mark.parametrize(("name", "file"), [place for place in PLACES if place[1].endswith("safetensors")])
def test_pickles_beside_missing_weights_are_not_read(name, file, models, tmp_path):
    """Libraries look for older files where the safetensors are missing."""
    shutil.copytree(models, tmp_path / "models")
    weights, trace = tmp_path / "models" / name / file, tmp_path / "trace"
    weights.unlink()
    for suffix in (".bin", ".pt", ".pth", ".ckpt", ".msgpack"):
        weights.with_suffix(suffix).write_bytes(hostile("archive", trace))
    (weights.parent / "pytorch_model.bin").write_bytes(hostile("archive", trace))
    with pytest.raises(InputError):
        READERS[name][0](tmp_path / "models" / name)
    assert not trace.exists()


def test_files_of_options_and_caches_are_no_pickles(models, tmp_path, capsys, monkeypatch):
    trace, bad = tmp_path / "trace", tmp_path / "bad.json"
    bad.write_bytes(hostile("pickle", trace))
    data, out = models / "data", tmp_path / "out"
    shutil.copy(bad, tmp_path / "metrics.csv")
    (tmp_path / "images").mkdir()
    shutil.copy(bad, tmp_path / "images" / "samples.json")
    for command in (
        ["distill", "--trajectories", data, "--preset", bad, "--out", out],
        ["distill", "--trajectories", data, "--preset", "digits", "--config", bad, "--out", out],
        ["report", "--evaluation", bad, "--out", out],
        ["evaluate", "--extractor", "inception", "--inception-weights", bad, "--out", out],
        ["sample", "-n", 1, "--out", tmp_path / "images"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, command)), standalone_mode=True)
        assert ended.value.code == 2 and str(bad.parent) in capsys.readouterr().err
    with pytest.raises(InputError, match="metrics.csv"):
        metrics(tmp_path)
    # Hostile cached files count as missing.
    monkeypatch.setenv("ADVKD_CACHE", str(tmp_path / "cache"))
    extractor, images = build_extractor(str(models / "classifier")), torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    wanted = extract(extractor, images, cache=cache_folder())
    Student.from_pretrained("digits").fuse()
    kept = [path for path in cache_folder().rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} == {".safetensors", ".json"}
    for path in kept:
        path.write_bytes(hostile("pickle", trace))
    assert torch.equal(extract(extractor, images, cache=cache_folder()), wanted)
    Student.from_pretrained("digits").fuse()
    assert not trace.exists()


def test_an_index_imports_nothing(models, tmp_path, monkeypatch):
    """A pipeline's index names classes: a module beside it is not imported."""
    shutil.copytree(models / "pipeline", tmp_path / "pipeline")
    (tmp_path / "planted.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\nclass StudentModel: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    index = tmp_path / "pipeline" / "model_index.json"
    whole = json.loads(index.read_text())
    for changes in ({"student": ["planted", "StudentModel"]}, {"other": ["planted", "StudentModel"]}):
        index.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(InputError, match="planted|other"):
            AdvKDPipeline.from_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "trace").exists() and "planted" not in sys.modules


@pytest.mark.parametrize(
    "place", ["../victim.safetensors", "/tmp/victim.safetensors", "sub/shard.safetensors", "..", "", 3, None]
)
def test_manifests_and_indexes_do_not_leave_their_folder(place, models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    manifest = tmp_path / "models" / "data" / "manifest.json"
    value = without_digest(manifest)
    value["shards"][0]["file"] = place
    manifest.write_text(json.dumps(value))
    with pytest.raises(InputError, match="manifest.json is damaged"):
        Trajectories(manifest.parent)
    unet = tmp_path / "models" / "teacher" / "unet"
    for name in (place, "evil.bin", "evil.gguf"):
        index = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
        (unet / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="index of weights"):
            Teacher.from_pretrained(unet.parent)


@pytest.mark.parametrize("source", ["../secret", "a/../b", "..", "/etc", "a/b/c", "~/x", "./a", "a\0/b", "-x/y", "a//b", ""])
def test_names_that_are_no_hub_ids(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (Student.from_pretrained, Teacher.from_pretrained):
        with pytest.raises(InputError):
            load(source)


@pytest.mark.parametrize(("name", "file"), PLACES)
def test_links_are_followed_to_what_is_a_file_and_nothing_else(name, file, models, tmp_path):
    """A hub's cache and larger disks are links. Reading a device or a pipe in a file's place would never end."""
    shutil.copytree(models, tmp_path / "models")
    shutil.copytree(models, tmp_path / "elsewhere")
    place = tmp_path / "models" / name / file
    place.unlink()
    place.symlink_to(tmp_path / "elsewhere" / name / file)
    READERS[name][0](tmp_path / "models" / name)
    (tmp_path / "secret.txt").write_text("the-secret = 1\n")
    os.mkfifo(tmp_path / "pipe")
    targets = [tmp_path / "secret.txt", "/dev/zero", tmp_path / "pipe", tmp_path / "nothing"]
    # Links to folders of pictures are followed.
    for target in targets if name == "pictures" else [*targets, tmp_path / "models"]:
        place.unlink(missing_ok=True)
        place.symlink_to(target)
        with pytest.raises(InputError) as refused:
            READERS[name][0](tmp_path / "models" / name)
        assert "the-secret" not in str(refused.value)


def without_digest(path):
    """A JSON file's value without the digest that would reveal a change."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "digest"}


def rewrite(path, **changes):
    """Write a checkpoint again with other metadata."""
    tensors, metadata = read_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    metadata.pop("digest")
    write_tensors(path, tensors, with_digest(tensors, {**metadata, **changes}))


def change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


LARGE = {
    "student": ("config.json", {"channels": [6000, 6000, 6000, 6000]}),
    "fused": ("config.json", {"channels": [6000, 6000, 6000, 6000]}),
    "pipeline": ("student/config.json", {"channels": [6000, 6000, 6000, 6000]}),
    "classifier": ("config.json", {"num_features": 10**8}),
    "teacher": ("unet/config.json", {"block_out_channels": [4000, 4000]}),
    "older": ("unet/config.json", {"block_out_channels": [4000, 4000]}),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_configuration_takes_no_more_memory_than_its_weights(name, models, tmp_path):
    """A few bytes that imply gigabytes are refused before any allocation."""
    shutil.copytree(models / name, tmp_path / name)
    file, changes = LARGE[name]
    change(tmp_path / name / file, **changes)
    kind = "Teacher" if name == "older" else {"fused": "FusedStudent", "pipeline": "AdvKDPipeline"}.get(name, name.capitalize())
    module = "advkd.models.classifier" if kind == "Classifier" else "advkd"
    code = (
        f"import resource, sys; from {module} import {kind}; from advkd import InputError\n"
        f"{kind}.from_pretrained(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: {kind}.from_pretrained(sys.argv[2])\n"
        "except InputError: print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = fork("-c", code, models / name, tmp_path / name).finish(100)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert int(done.stdout) < 100


@pytest.mark.parametrize(
    ("name", "file", "changes"),
    [
        ("student", "config.json", {"channels": [8] * 10_000}),
        ("student", "config.json", {"image_size": 2**4000, "channels": [8] * 8000}),
        ("classifier", "config.json", {"image_size": 2**4000}),
        ("teacher", "unet/config.json", {"block_out_channels": [8] * 100_000}),
        ("teacher", "unet/config.json", {"layers_per_block": 10**9}),
        ("teacher", "unet/config.json", {"quantization_config": {"quant_method": "torchao"}}),
        ("teacher", "scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
        ("teacher", "scheduler/scheduler_config.json", {"num_train_timesteps": "many"}),
    ],
)
def test_configurations_without_end_are_refused(name, file, changes, models, tmp_path):
    shutil.copytree(models / name, tmp_path / name)
    change(tmp_path / name / file, **changes)
    with pytest.raises(InputError):
        READERS[name][0](tmp_path / name)


ODD = [None, "x", -1, 1.5, True, 10**30, 10**400, float("inf"), float("nan"), [[8]], [None], {}]
JSON_FILES = [
    ("student", "config.json"),
    ("student", "training.json"),
    ("fused", "config.json"),
    ("pipeline", "model_index.json"),
    ("pipeline", "student/config.json"),
    ("classifier", "config.json"),
    ("teacher", "model_index.json"),
    ("teacher", "unet/config.json"),
    ("teacher", "scheduler/scheduler_config.json"),
    ("data", "manifest.json"),
]


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.kernels) for part in (1, 2, 3))])
@pytest.mark.parametrize(("name", "file"), JSON_FILES)
def test_values_of_any_kind_are_read_or_refused(name, file, part, models, tmp_path):
    """No value of a JSON file ends in another error than ours: a quarter of the values per part, others from key to key."""
    shutil.copytree(models / name, tmp_path / name)
    path, refused = tmp_path / name / file, 0
    whole = without_digest(path)
    for i, key in enumerate(whole):
        for value in ODD[(i + part) % 4 :: 4]:
            path.write_text(json.dumps({**whole, key: value}))
            try:
                read = READERS[name][0](tmp_path / name)
                if isinstance(read, Teacher):
                    assert read.sample(1, steps=2).isfinite().all()
            except InputError:
                refused += 1
    # A teacher's index is read only for the names in it.
    assert refused > 0 or (name, file) == ("teacher", "model_index.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"num": 10**15},
        {"num": 10**15, "shard_size": 1, "batch_size": 1},
        {"depth": 10**9},
        {"image_size": 2**40},
        {"num": "24"},
        {"num": -24},
        {"seed": 1.5},
        {"resolutions": [4, 8, 8, 16]},
        {"image_channels": 10**9},
        {"teacher": None},
        {"timesteps": []},
        {"timesteps": 3},
        {"timesteps": ["a", "b", "c"]},
        {"timesteps": [float("inf")] * 3},
        {"image_channels": 1.0},
        {"teacher": 3},
    ],
)
def test_recipes_that_cannot_be_are_refused(changes, models, tmp_path):
    shutil.copytree(models / "data", tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.json"
    value = without_digest(manifest)
    manifest.write_text(json.dumps({**value, "recipe": {**value["recipe"], **changes}}))
    with pytest.raises(InputError, match="manifest.json is damaged"):
        Trajectories(tmp_path / "data")


@pytest.mark.parametrize("value", ["1.5", -1.0, float("nan"), float("inf"), True, None])
def test_deviations_that_cannot_be_are_refused(value, models, tmp_path):
    shutil.copytree(models / "data", tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.json"
    whole = without_digest(manifest)
    manifest.write_text(json.dumps({**whole, "standard_deviations": [*whole["standard_deviations"][:-1], value]}))
    with pytest.raises(InputError, match="manifest.json is damaged"):
        Trajectories(tmp_path / "data")
    del whole["recipe"]["teacher"]
    manifest.write_text(json.dumps(whole))
    with pytest.raises(InputError, match="manifest.json is damaged"):
        Trajectories(tmp_path / "data")


def test_a_shard_agrees_with_its_recipe(models, tmp_path):
    from safetensors.torch import save_file

    from advkd.runtime.files import sha256

    shutil.copytree(models / "data", tmp_path / "data")
    manifest, shard = tmp_path / "data" / "manifest.json", tmp_path / "data" / "shard-00000.safetensors"
    save_file({"z": torch.zeros(1)}, shard)
    value = without_digest(manifest)
    value["shards"][0]["sha256"] = sha256(shard)
    manifest.write_text(json.dumps(value))
    with pytest.raises(InputError, match="shard-00000.safetensors is damaged .*other tensors.*: delete it and run the same"):
        Trajectories(tmp_path / "data").batch([0], [1])


class Bloated:
    """Unpickles to as many zero bytes as its number gives; weights_only allows that."""

    def __reduce__(self):
        return bytearray, (10**9,)


@pytest.mark.parametrize("archive", [True, False])
def test_weights_that_ask_for_memory_are_refused(archive, models, tmp_path):
    """Only files of plain tensors are read, in torch's older format, too."""
    shutil.copytree(models, tmp_path / "models")
    weights = tmp_path / "models" / "older" / "unet" / "diffusion_pytorch_model.bin"
    state = torch.load(weights, weights_only=True)
    torch.save(state, weights, _use_new_zipfile_serialization=archive)
    assert Teacher.from_pretrained(tmp_path / "models" / "older").image_size == 8
    torch.save({**state, "payload": Bloated()}, weights, _use_new_zipfile_serialization=archive)
    with pytest.raises(InputError, match="asks for .*bytearray, and tensors alone are read"):
        Teacher.from_pretrained(tmp_path / "models" / "older")


def renamed(path):
    """Rename a record: torch finds records whatever their letters' case."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name.replace("data.pkl", "data.PKL"), data)


def appended(path):
    """Put a file in torch's older format before the archive."""
    archive = path.read_bytes()
    torch.save({"payload": Bloated()}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + archive)


def prepended(path):
    path.write_bytes(b"PK\3\4" + path.read_bytes())


def commented(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"another directory"


def doubled(path):
    """Nest pairs of the same tuple: each level doubles the time to hash the outermost, a key."""
    levels = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    pickled = b"\x80\x02})q\x00" + levels + b"K\x01s."
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, pickled if name.endswith("/data.pkl") else data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "other records than torch.save writes"),
        (appended, "bytearray, and tensors alone are read"),
        (prepended, "other records than torch.save writes"),
        (commented, "other records than torch.save writes"),
        (doubled, "holds a tuple several times"),
    ],
)
def test_archives_that_torch_may_read_otherwise_are_refused(change, message, models, tmp_path):
    shutil.copytree(models / "older", tmp_path / "older")
    change(tmp_path / "older" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=message):
        Teacher.from_pretrained(tmp_path / "older")


def test_a_students_index_names_files_that_are_looked_through(models, tmp_path):
    shutil.copytree(models / "pipeline", tmp_path / "pipeline")
    student = tmp_path / "pipeline" / "student"
    torch.save({**load_file(student / WEIGHTS), "payload": Bloated()}, student / "other.dat")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(student / WEIGHTS), "other.dat")}
    (student / WEIGHTS).unlink()
    (student / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="may name .bin files of its own folder only"):
        AdvKDPipeline.from_pretrained(tmp_path / "pipeline", use_safetensors=False)


@pytest.mark.parametrize("archive", [True, False])
def test_a_students_older_weights_are_read_with_the_same_care(archive, models, tmp_path):
    shutil.copytree(models / "pipeline", tmp_path / "pipeline")
    weights = tmp_path / "pipeline" / "student" / WEIGHTS
    state = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    weights.unlink()
    torch.save(state, weights.with_suffix(".bin"), _use_new_zipfile_serialization=archive)
    assert AdvKDPipeline.from_pretrained(tmp_path / "pipeline", use_safetensors=False)(1, output_type="np").images.max() <= 1
    for payload in (Bloated(), Payload(tmp_path / "trace")):
        torch.save({**state, "payload": payload}, weights.with_suffix(".bin"), _use_new_zipfile_serialization=archive)
        with pytest.raises(InputError, match="and tensors alone are read"):
            AdvKDPipeline.from_pretrained(tmp_path / "pipeline", use_safetensors=False)
    torch.save({**state, "payload": [[] for _ in range(2**20)]}, weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="more than the"):
        AdvKDPipeline.from_pretrained(tmp_path / "pipeline", use_safetensors=False)
    assert not (tmp_path / "trace").exists()


def test_archives_that_unpack_to_more_than_they_hold_are_refused(models, tmp_path):
    shutil.copytree(models / "older", tmp_path / "older")
    weights = tmp_path / "older" / "unet" / "diffusion_pytorch_model.bin"
    with zipfile.ZipFile(weights) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(weights, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data if not name.endswith("/data/0") else bytes(2**27))
    assert weights.stat().st_size < 2**20
    with pytest.raises(InputError, match="unpacks to more than its size"):
        Teacher.from_pretrained(tmp_path / "older")


def test_records_that_are_not_those_of_their_checksums_are_refused(models, tmp_path):
    """torch ignores the checksums that it has written."""
    shutil.copytree(models / "older", tmp_path / "older")
    weights = tmp_path / "older" / "unet" / "diffusion_pytorch_model.bin"
    place = weights.read_bytes().index(torch.load(weights, weights_only=True)["conv_in.weight"].numpy().tobytes())
    flipped = bytearray(weights.read_bytes())
    flipped[place] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(InputError, match="diffusion_pytorch_model.bin cannot be read .its record .* is altered"):
        Teacher.from_pretrained(tmp_path / "older")


def test_archives_without_checksums_are_read(models, tmp_path):
    shutil.copytree(models / "older", tmp_path / "older")
    weights = tmp_path / "older" / "unet" / "diffusion_pytorch_model.bin"
    state, known = torch.load(weights, weights_only=True), Teacher.from_pretrained(tmp_path / "older").identity()
    # A checksum that damage has set to zero, among others, is wrong.
    with zipfile.ZipFile(weights) as archive:
        checksum = struct.pack("<I", next(r.CRC for r in archive.infolist() if r.filename.endswith("/data/0")))
    weights.write_bytes(weights.read_bytes().replace(checksum, bytes(4)))
    with pytest.raises(InputError, match="diffusion_pytorch_model.bin cannot be read .its record .* is altered"):
        Teacher.from_pretrained(tmp_path / "older")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, weights)
    finally:
        torch.serialization.set_crc32_options(True)
    assert Teacher.from_pretrained(tmp_path / "older").identity() == known


def test_safetensors_that_claim_more_than_they_hold_are_refused(models, tmp_path):
    header = json.dumps({"head.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for begin in (struct.pack("<Q", 2**60), struct.pack("<Q", len(header)) + header):
        shutil.copytree(models, tmp_path / "models", dirs_exist_ok=True)
        for name, file in PLACES:
            if file.endswith("safetensors"):
                (tmp_path / "models" / name / file).write_bytes(begin)
                with pytest.raises(InputError):
                    READERS[name][0](tmp_path / "models" / name)


@pytest.mark.parametrize(
    ("name", "file"), [(name, file) for name, file in PLACES if file.endswith(".safetensors")], ids=lambda part: part
)
def test_headers_without_end_are_refused(name, file, models, tmp_path):
    """Parsed JSON takes many times its text's memory, and the format limits a header only to 100 MB."""
    shutil.copytree(models, tmp_path / "models")
    place = tmp_path / "models" / name / file
    header = json.dumps({"__metadata__": {"advkd": "[" + "{}," * 2**21 + "{}]"}}).encode()
    place.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match=r"more than the [\d,]+ that (it|such a file) may have"):
        READERS[name][0](tmp_path / "models" / name)


def test_jpegs_of_very_many_scans_are_refused(tmp_path):
    """Every scan takes a whole picture's time but only two hundred bytes."""
    path = tmp_path / "a.jpg"
    Image.new("L", (64, 64), 128).save(path, progressive=True)
    whole = path.read_bytes()
    scan, end = whole.rindex(b"\xff\xc4"), whole.rindex(b"\xff\xd9")
    behind = b"\xff\xda" * 200
    for count, refused in ((90, False), (100, True)):
        # Neither comments nor data after the picture (films, further frames) count as scans.
        path.write_bytes(
            whole[:2] + b"\xff\xfe\x01\x92" + behind + whole[2:end] + whole[scan:end] * count + whole[end:] + behind
        )
        if refused:
            with pytest.raises(InputError, match="scans, more than the 100 that a picture may have"):
                load_images(tmp_path)
        else:
            assert load_images(tmp_path).unique().tolist() == [128]


def test_pictures_of_a_thousand_million_pixels_are_refused(models, tmp_path, monkeypatch):
    """The limit is our own: Pillow's can be disabled, and warns below it."""
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 25_000, 8, 0, 0, 0, 0))
    large = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    shutil.copytree(models / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "a" / "1.png").write_bytes(large)
    for most in (None, Image.MAX_IMAGE_PIXELS):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        for read in (load_images, load_labelled, lambda folder: read_pictures(folder, "--images")):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(InputError, match=r"1.png.* pixels"):
                    read(tmp_path / "pictures")


def test_configurations_of_options_are_small(tmp_path, capsys):
    """The memory of TOML's dotted keys grows with the square of their length."""
    (tmp_path / "a.toml").write_text(".".join(["a"] * 20_000) + " = 1")
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--trajectories", "x", "--preset", "digits", "--out", "y", "--config", str(tmp_path / "a.toml")])
    assert ended.value.code == 2 and "more than the 8,192" in capsys.readouterr().err


@pytest.mark.parametrize(
    "contents", ["fifo", "/dev/zero", b"\xff\n", b"stage,update\n1,2\n", b"version https://git-lfs\n", b""]
)
def test_metrics_of_a_run_that_goes_on(contents, models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    path = tmp_path / "models" / "run" / "metrics.csv"
    titles = path.read_text().splitlines()[0]
    path.unlink()
    for bad in (contents, titles.encode() + b"\nx" + b"," * titles.count(",") + b"\n"):
        path.unlink(missing_ok=True)
        if bad == "fifo":
            os.mkfifo(path)
        elif isinstance(bad, str):
            path.symlink_to(bad)
        else:
            path.write_bytes(bad)
        with pytest.raises(InputError, match="metrics.csv"):
            READERS["run"][0](path.parent)


@pytest.mark.parametrize("rows", [[2, 1], [1, 1, 2], [1, None, 2], [1, "x", 2], [1, "x"]], ids=str)
def test_metrics_that_are_not_whole_lose_no_row(rows, models, tmp_path):
    """Rows up to the checkpoint are kept and later ones made anew; where they cannot be told apart, nothing is touched."""
    shutil.copytree(models, tmp_path / "models")
    path = tmp_path / "models" / "run" / "metrics.csv"
    titles = path.read_text().splitlines()[0]
    cells = "," * (titles.count(",") - 1)
    path.write_text("\n".join([titles, *("1,0.5" if row is None else f"1,{row}{cells}" for row in rows)]) + "\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match="metrics.csv is damaged .*: move it away"):
        READERS["run"][0](path.parent)
    assert path.read_bytes() == before


@pytest.mark.parametrize("changes", [{"stage": 10**30}, {"stage": 0, "update": 10**30}, {"cursor": 10**30}, {"cursor": 1.5}])
@pytest.mark.parametrize("value", [None, float("inf"), -1])
def test_places_in_a_run_that_it_does_not_have(changes, value, models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    path = tmp_path / "models" / "run" / "checkpoint.safetensors"
    rewrite(path, **(changes if value is None else dict.fromkeys(changes, value)))
    with pytest.raises(InputError, match="checkpoint.safetensors is damaged .*the run has no stage"):
        READERS["run"][0](path.parent)


def test_every_dependency_of_a_plain_installation_is_pinned():
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0] for line in (root / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {re.match(r"[\w-]+", dependency)[0] for dependency in project["dependencies"]} <= pinned


def test_tables_of_any_size_are_not_read(tmp_path):
    """A sparse file of a terabyte, and one that takes a hundred times its size as lists of strings."""
    with open(tmp_path / "metrics.csv", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="more than the 268,435,456"):
        metrics(tmp_path)
    (tmp_path / "metrics.csv").write_bytes(b"stage,update,loss,critic,wasserstein,penalty\n1,1,2,,,\n" + b"\n" * 2**22)
    tracemalloc.start()
    assert metrics(tmp_path)["loss"] == [2]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("update", [-1, 10**30, 1.5, None, TINY_TRAINING.steps + 1])
def test_updates_that_a_teachers_training_does_not_have(update, models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    path = tmp_path / "models" / "unfinished" / "checkpoint.safetensors"
    rewrite(path, stage=0, update=update)
    with pytest.raises(InputError, match="checkpoint.safetensors is damaged .*the run has no stage 0, update"):
        READERS["unfinished"][0](path.parent)


def test_a_planted_link_is_not_written_through(models, tmp_path, monkeypatch):
    """The folder in which a teacher is assembled has a predictable name."""
    shutil.copytree(models / "unfinished", tmp_path / "unfinished")
    planted = temporary_path(tmp_path / "unfinished" / "pipeline")
    (tmp_path / "elsewhere").mkdir()
    planted.symlink_to(tmp_path / "elsewhere")
    READERS["unfinished"][0](tmp_path / "unfinished")
    assert Teacher.from_pretrained(tmp_path / "unfinished").image_size == 8
    assert list((tmp_path / "elsewhere").iterdir()) == [] and not os.path.lexists(planted)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_weights_of_a_teacher_are_finite(number, models, tmp_path):
    shutil.copytree(models / "teacher", tmp_path / "teacher")
    path = tmp_path / "teacher" / "unet" / WEIGHTS
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    state["conv_in.weight"].view(-1)[0] = number
    save_file(state, path, {"format": "pt"})
    with pytest.raises(InputError, match="its weights are not finite real numbers"):
        Teacher.from_pretrained(tmp_path / "teacher")


def test_recording_into_a_folder_of_pickles(models, teacher, tmp_path):
    shutil.copytree(models / "data", tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()
    (tmp_path / "data" / "shard-00001.safetensors").write_bytes(hostile("archive", tmp_path / "trace"))
    with pytest.raises(
        InputError, match="shard-00001.* is damaged .*: delete it and run the same 'advkd trajectories' command"
    ):
        record_trajectories(teacher, tiny_recording(), tmp_path / "data", progress=False)
    assert not (tmp_path / "trace").exists()
