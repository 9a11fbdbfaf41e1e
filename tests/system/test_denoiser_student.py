"""Denoiser students as files and as models: saved and loaded, as teachers, with conditions, trained, and refused."""

import dataclasses
import json
import os
import shutil

import pytest
import torch

import advkd
from advkd.diffusion.denoiser_student import DenoiserStudent, Sampler
from advkd.diffusion.loading import CONDITION
from advkd.diffusion.solvers import Solver
from advkd.diffusion.students import load_start
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.methods.pairs import PairsConfig
from advkd.methods.reparametrize import ReparametrizeConfig
from advkd.models.denoiser import ConditionConfig, ConditionEmbedding, embedding_of
from advkd.models.student import Student
from advkd.training.denoisers import distill_denoiser

from ..conftest import tiny_student as tiny_generator
from ..conftest import tiny_teacher
from ..methods.test_progressive import tiny_images, tiny_student

TRAILING = Solver("ddim", spacing="trailing")
GIVEN = Solver("ddim", alpha_bars=(0.01, 0.2, 0.5, 0.9))
SAMPLERS = [
    Sampler(),
    Sampler(TRAILING, 4),
    Sampler(GIVEN, 4),
    Sampler(Solver("heun", spacing="karras", rho=5.0, churn=3.0, churn_max=9.5), 3),
    Sampler(Solver("unipc-2"), 6, 0.5),
]


def begun(teacher, **options):
    """A student with a teacher's weights, taken for weights that give v."""
    student = DenoiserStudent.from_teacher(teacher, **options)
    student.trained_as = "v_prediction"
    return student


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student of four steps with a record of its training."""
    model = tiny_student(timesteps=100).model
    student = DenoiserStudent(model, Sampler(TRAILING, 4), {"runs": [{"method": "pairs"}], "samples": []})
    student.save_pretrained(out := tmp_path_factory.mktemp("student") / "s")
    return out


@pytest.fixture(scope="module")
def weighted(conditional, tmp_path_factory):
    """A conditional student that takes the guidance weight itself, its embedding of that not zero."""
    student = begun(Teacher.from_pretrained(conditional)).told_more(0, guidance=4.0)
    student.sampler = Sampler(TRAILING, 2, 1.5)
    torch.manual_seed(1)
    embedding = embedding_of(student.model.unet)
    torch.nn.init.normal_(embedding.guidance[-1].weight)
    student.save_pretrained(out := tmp_path_factory.mktemp("weighted") / "s")
    return out


def changed(folder, target, file, **changes):
    """A copy of a folder with keys of a JSON file changed, removed where None is given."""
    shutil.copytree(folder, target)
    values = {**json.loads((target / file).read_text()), **changes}
    (target / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return target


def test_saved_and_loaded_bit_for_bit(folder, tmp_path):
    student = advkd.load_student(folder)
    assert isinstance(student, DenoiserStudent) and student.training_record["runs"] == [{"method": "pairs"}]
    fresh = tiny_student(timesteps=100).model.unet.state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in student.model.unet.state_dict().items())
    student.save_pretrained(tmp_path / "again")
    again = DenoiserStudent.from_pretrained(tmp_path / "again")
    assert again.identity() == {**student.identity(), "name": again.model.name}
    assert torch.equal(again.sample(3, seed=2), student.sample(3, seed=2))
    for name in ("sampler.json", "training.json", "model_index.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert (student.evaluations, student.image_size, student.image_channels) == (4, 8, 1)
    assert student.num_parameters() == sum(tensor.numel() for tensor in fresh.values())


def test_images_are_functions_of_seed_and_index(folder):
    student = advkd.load_student(folder)
    images = student.sample(5, seed=3)
    assert images.shape == (5, 1, 8, 8) and images.abs().max() <= 1 and images.std() > 0.01
    assert torch.allclose(student.sample(2, seed=3, start=3), images[3:], atol=1e-5)
    assert torch.equal(student.draw(student.latents(5, 3), seed=3), images)
    assert torch.equal(student.latents(5, 3), tiny_teacher(100).noise(5, 3))
    with pytest.raises(InputError, match=r"x_T must have shape \(2, 1, 8, 8\)"):
        student.draw(torch.zeros(2, 1, 16, 16))


def test_a_student_is_a_teacher_too(folder):
    student, teacher = advkd.load_student(folder), Teacher.from_pretrained(folder)
    assert torch.equal(teacher.sample(3, 2, student.sampler.solver, 4), student.sample(3, 2))
    assert torch.equal(load_start(folder).sample(3, 2), student.sample(3, 2))
    following = DenoiserStudent.from_teacher(teacher, sampler=student.sampler)
    assert following.trained_as == "v_prediction" and torch.equal(following.sample(3, 2), student.sample(3, 2))


def test_a_student_begins_with_the_teacher_of_glyphs():
    """By the name that is the teacher's alone."""
    student, teacher = load_start("glyphs-teacher"), Teacher.from_pretrained("glyphs")
    assert isinstance(student, DenoiserStudent) and student.trained_as == teacher.prediction == "v_prediction"
    found, wanted = student.model.unet.state_dict(), teacher.unet.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert student.model.class_names == teacher.class_names


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_come_back_from_json(sampler):
    assert Sampler.from_json(json.loads(json.dumps(sampler.to_json())), "here") == sampler


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": True}, "steps must be int, got True"),
        ({"steps": 101}, "steps must be between 1 and the schedule's 100"),
        ({"steps": None}, "steps"),
        ({"solver": None}, "solver"),
        ({"guidance": -1.0}, "guidance not negative"),
        ({"guidance": 1e400}, "guidance not negative"),
        ({"guidance": "much"}, "guidance must be float"),
        ({"solver": "rk4"}, "solver must be one of"),
        ({"solver": 3}, "name must be str, got 3"),
        ({"name": "ddim"}, "unknown key 'name'"),
        ({"spacing": "wide"}, "spacing must be one of"),
        ({"solvers": "ddim"}, "unknown key 'solvers'"),
        ({"alpha_bars": [0.1, 0.2]}, "alpha_bars and spacing are two ways"),
        ({"spacing": "", "alpha_bars": [0.2, 0.1]}, "alpha_bars must rise"),
        ({"spacing": "", "alpha_bars": ["a"]}, "alpha_bars"),
    ],
)
def test_damaged_samplers_are_refused_by_name(changes, message, folder, tmp_path):
    damaged = changed(folder, tmp_path / "s", "sampler.json", **changes)
    with pytest.raises(InputError, match=message) as refusal:
        advkd.load_student(damaged)
    assert str(damaged) in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("sampler.json", "{", "sampler"),
        ("training.json", "[]", "training record"),
        ("training.json", '{"runs": []}', "training record .* samples"),
        ("training.json", '{"runs": [], "samples": [{"seed": 0}]}', "training record .* is damaged"),
    ],
)
def test_damaged_files_are_refused_by_name(file, text, message, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "s")
    (tmp_path / "s" / file).write_text(text)
    with pytest.raises(InputError, match=message):
        DenoiserStudent.from_pretrained(tmp_path / "s")


def test_levels_that_are_given_are_taken_at_equal_distances():
    model = tiny_student(timesteps=100).model
    student = DenoiserStudent(model, Sampler(GIVEN, 4))
    halved = DenoiserStudent(model, Sampler(dataclasses.replace(GIVEN, alpha_bars=GIVEN.alpha_bars[::2]), 2))
    assert torch.equal(student.sample(2, 1, steps=2), halved.sample(2, 1))
    assert not torch.equal(student.sample(2, 1, steps=2), student.sample(2, 1))
    for steps, message in ((3, "steps must divide the 4 levels that are given, got 3"), (0, "steps must be at least 1")):
        with pytest.raises(InputError, match=message):
            student.sample(2, steps=steps)
    with pytest.raises(InputError, match="steps must divide"):
        DenoiserStudent(model, Sampler(GIVEN, 3))


def test_conditional_students(conditional, tmp_path):
    """Guidance of a network that does not take the weight is that of its teacher: two evaluations."""
    student = begun(Teacher.from_pretrained(conditional), sampler=Sampler(TRAILING, 2))
    student.save_pretrained(tmp_path / "s")
    loaded, teacher = advkd.load_student(tmp_path / "s"), Teacher.from_pretrained(tmp_path / "s")
    assert loaded.model.class_names == ("a", "b", "c") and loaded.model.null_class == 3
    for options in ({"labels": [2, 0]}, {"labels": 1, "guidance": 1.5}, {}):
        assert torch.equal(loaded.sample(2, 1, **options), teacher.sample(2, 1, TRAILING, 2, **options))
    assert not torch.equal(loaded.sample(2, 1, labels=0), loaded.sample(2, 1, labels=1))
    with pytest.raises(InputError, match="guidance needs labels"):
        loaded.sample(2, guidance=1.0)


def test_a_network_that_takes_the_weight_begins_as_it_was_without(conditional):
    teacher = Teacher.from_pretrained(conditional)
    plain = begun(teacher, sampler=Sampler(TRAILING, 2))
    student = begun(teacher, sampler=Sampler(TRAILING, 2)).told_more(0, guidance=4.0)
    for weight in (0.0, 3.5):
        assert torch.equal(student.sample(2, labels=[0, 2], guidance=weight), plain.sample(2, labels=[0, 2]))
    assert torch.equal(student.sample(2), plain.sample(2))  # the null class


def test_students_that_take_the_weight(weighted):
    student = advkd.load_student(weighted)
    assert student.model.most_guidance == 4 and (weighted / "classes.json").exists()
    asked = {weight: student.sample(2, labels=[0, 2], guidance=weight) for weight in (0.0, 1.5, 4.0)}
    assert torch.equal(student.sample(2, labels=[0, 2]), asked[1.5])  # the sampler's own
    assert not torch.equal(asked[0.0], asked[1.5]) and not torch.equal(asked[1.5], asked[4.0])
    again = Teacher.from_pretrained(weighted).sample(2, 0, TRAILING, 2, labels=[0, 2], guidance=4.0)
    assert torch.equal(again, asked[4.0])
    with pytest.raises(InputError, match="guidance must be at most 4"):
        student.sample(2, labels=0, guidance=4.5)
    with pytest.raises(InputError, match="the sampler's guidance must be at most the network's 4"):
        DenoiserStudent(student.model, Sampler(guidance=5.0))
    plain = tiny_student(timesteps=100).model
    with pytest.raises(InputError, match="guidance must be at most the network's 0"):
        DenoiserStudent(plain, Sampler(guidance=1.0))


def another_width(folder):
    ConditionEmbedding(ConditionConfig(width=16, classes=4, guidance=4.0)).save_pretrained(folder / CONDITION)


def other_classes(folder):
    width = ConditionEmbedding.from_pretrained(folder / CONDITION).config.width
    ConditionEmbedding(ConditionConfig(width=width, classes=7, guidance=4.0)).save_pretrained(folder / CONDITION)


def cut(folder):
    path = folder / CONDITION / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / CONDITION), "class_embed_type 'identity'"),
        (lambda folder: (folder / CONDITION / "config.json").write_text('{"width": 32, "classes": -1}'), CONDITION),
        (lambda folder: (folder / CONDITION / "config.json").write_text('{"widths": 32}'), "unknown key 'widths'"),
        (lambda folder: (folder / CONDITION / "diffusion_pytorch_model.safetensors").unlink(), "does not exist"),
        (cut, "is damaged or of another model"),
        (another_width, "is 16 numbers wide, the network 32"),
        (other_classes, "must be 6 names"),
        (lambda folder: (folder / "classes.json").write_text('{"names": ["a"], "null": 1}'), "must be 3 names"),
    ],
)
def test_damaged_conditions_are_refused_by_name(damage, message, weighted, tmp_path):
    shutil.copytree(weighted, tmp_path / "s")
    damage(tmp_path / "s")
    with pytest.raises(InputError, match=message) as refusal:
        advkd.load_student(tmp_path / "s")
    assert str(tmp_path / "s") in str(refusal.value)


def test_an_interrupted_save_leaves_the_old_student_or_none(folder, weighted, tmp_path, monkeypatch):
    """After every move of a file in turn, the folder loads as what was there, or not at all, and the next save mends it."""
    old, new = advkd.load_student(weighted), advkd.load_student(folder)
    wanted = old.sample(2, labels=0)
    replace, moves = os.replace, 0
    for last in range(40):
        place, moves = tmp_path / str(last), 0
        shutil.copytree(weighted, place)

        def interrupted(source, target, **options):
            nonlocal moves
            moves += 1
            if moves > last:
                raise KeyboardInterrupt
            replace(source, target, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            try:
                new.save_pretrained(place)
            except KeyboardInterrupt:
                pass
            else:
                break
        if (place / "model_index.json").exists():
            assert torch.equal(advkd.load_student(place).sample(2, labels=0), wanted)
        else:
            with pytest.raises(InputError, match="student .* has no "):
                DenoiserStudent.from_pretrained(place)
        new.save_pretrained(place)
        assert torch.equal(advkd.load_student(place).sample(2), new.sample(2))
        assert sorted(os.listdir(place)) == sorted(os.listdir(folder))
    assert 5 < last < 39


def test_a_student_of_other_channels(conditional):
    teacher = Teacher.from_pretrained(conditional)
    torch.manual_seed(0)
    student = DenoiserStudent.from_teacher(teacher, channels=(16,), sampler=Sampler(TRAILING, 2))
    assert student.num_parameters() != teacher.num_parameters() and student.trained_as == "v_prediction"
    assert student.model.class_names == teacher.class_names and student.model.null_class == 3
    assert student.sample(2, labels=[0, 2]).shape == (2, 1, 8, 8)
    x, network = teacher.noise(1), student.model.unet
    low, high, other = (network(x, torch.tensor([t]), torch.tensor([c])).sample for t, c in ((5, 0), (90, 0), (5, 2)))
    assert (low - high).abs().max() > 1e-3 and (low - other).abs().max() > 1e-3
    for channels, message in (
        ((20, 20), "positive multiples of 8, got 20, 20"),
        ((8,), "channels must be at least 16 for the network to hear its timestep"),
        ((16,) * 4, "too many for"),
    ):
        with pytest.raises(InputError, match=message):
            DenoiserStudent.from_teacher(teacher, channels=channels)


def test_each_kind_of_student_names_the_other(folder, teacher_folder, tmp_path):
    with pytest.raises(InputError, match=r"is a denoiser student, not a Student: advkd\.load_student loads it"):
        Student.from_pretrained(folder)
    tiny_generator().save_pretrained(tmp_path / "generator")
    for source in ("digits", tmp_path / "generator"):
        with pytest.raises(InputError, match=r"is a generator: advkd\.load_student loads either kind"):
            DenoiserStudent.from_pretrained(source)
        assert isinstance(advkd.load_student(source), Student)
    for source in ("digits-conditional", teacher_folder):
        with pytest.raises(InputError, match=r"has no sampler\.json: it is a teacher, or no finished student"):
            DenoiserStudent.from_pretrained(source)
    with pytest.raises(InputError, match="a denoiser student needs v prediction, tiny has epsilon"):
        DenoiserStudent(tiny_teacher(), Sampler())


def test_a_student_comes_from_the_hub(weighted, monkeypatch):
    """The weights are fetched when everything small has been seen to fit."""
    import huggingface_hub

    asked = []

    def fetched(source, allow_patterns):
        assert source == "someone/student"
        asked.append(allow_patterns)
        return weighted

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    student = advkd.load_student("someone/student")
    assert torch.equal(student.sample(2, labels=0), advkd.load_student(weighted).sample(2, labels=0))
    weights = [any("safetensors" in name or name.endswith("/*") for name in patterns) for patterns in asked]
    assert weights == sorted(weights) and any(weights) and weights[:3] == [False] * 3
    assert {f"{CONDITION}/*", "unet/diffusion_pytorch_model*.safetensors"} <= {name for names in asked for name in names}


def small(kind, **changes):
    return kind(**{"updates": 2, "batch_size": 4, "ema": 0.0, **changes})


def test_records_chain_runs_and_costs(trajectories, tmp_path):
    """Network evaluations of each run, those of a recording in the first that reads it; samples once."""
    quiet, teacher = {"progress": False}, tiny_teacher()
    start = DenoiserStudent.from_teacher(teacher)
    config = small(ReparametrizeConfig)
    v = distill_denoiser("reparametrize", config, start, tmp_path / "v", teacher=teacher, data=tiny_images(), **quiet)
    start = advkd.load_student(tmp_path / "v")
    assert start.training_record == json.loads((tmp_path / "v" / "training.json").read_text()) == v.training_record
    config = small(PairsConfig)
    distill_denoiser("pairs", config, start, tmp_path / "pairs", trajectories=trajectories, **quiet)
    start = advkd.load_student(tmp_path / "pairs")
    distill_denoiser("pairs", config, start, tmp_path / "more", trajectories=trajectories, **quiet)
    record = advkd.load_student(tmp_path / "more").training_record
    assert [run["method"] for run in record["runs"]] == ["reparametrize", "pairs", "pairs"]
    taught = {"forward": 2 * 4 * 2, "backward": 2 * 4}
    recorded, again = ({"forward": recording + 2 * 4, "backward": 2 * 4} for recording in (24 * 10, 0))
    assert [run["cost"] for run in record["runs"]] == [taught, recorded, again]
    assert record["runs"][0]["teacher"] == teacher.identity() and record["runs"][1]["sampler"] == "ddim"
    assert record["samples"] == record["runs"][1]["samples"] and sum(part["num"] for part in record["samples"]) == 24
    # Entered at sigma = 1, once.
    assert start.sampler == Sampler(Solver("ddim", alpha_bars=(0.5,)), 1) and start.evaluations == 1


def test_what_does_not_fit_is_refused_before_work(trajectories, unpaired, conditional, tmp_path):
    out, images, teacher, other = (
        tmp_path / "out",
        tiny_images(),
        tiny_teacher(),
        tiny_teacher(beta_schedule="squaredcos_cap_v2"),
    )
    own, wide = begun(teacher), begun(tiny_teacher(channels=3))
    told, short = Teacher.from_pretrained(conditional), begun(tiny_teacher(100))
    labelled, big = begun(told), torch.zeros(9, 1, 16, 16)
    taught, paths = {"teacher": teacher, "data": images}, {"trajectories": trajectories}

    def refuse(message, method, student, inputs, **changes):
        config = small(ReparametrizeConfig if method == "reparametrize" else PairsConfig, **changes)
        with pytest.raises(InputError, match=message):
            distill_denoiser(method, config, student, out, progress=False, **inputs)
        assert not out.exists()

    refuse("reparametrize needs a teacher", "reparametrize", own, {"data": images})
    refuse("reparametrize needs images", "reparametrize", own, {"teacher": teacher})
    refuse("does not read trajectories", "reparametrize", own, {**taught, **paths})
    refuse("data holds images", "reparametrize", own, {"teacher": teacher, "data": big})
    refuse("the teacher draws images .1, 8, 8., the student .3, 8, 8.", "reparametrize", wide, taught)
    refuse("different noise schedules", "reparametrize", own, {"teacher": other, "data": images})
    refuse("the teacher knows 3 classes, the student 0", "reparametrize", short, {"teacher": told, "data": images})
    refuse("data has no labels", "reparametrize", labelled, {"teacher": told, "data": images})
    refuse("pairs needs pairs", "pairs", own, {})
    refuse("leave --data out", "pairs", own, {"data": images, **paths})
    refuse("unpaired", "pairs", own, {"trajectories": unpaired})
    refuse("grow adds trajectories for students that draw in one pass", "pairs", own, paths, grow=4)
    refuse("batch_size must be from 2 to the 24", "pairs", own, paths, batch_size=25)
    refuse("level must be within", "pairs", own, paths, level=0.0)
    refuse("the trajectories hold images .1, 8, 8., the student draws .3, 8, 8.", "pairs", wide, paths)
    refuse("is told classes and the trajectories have none", "pairs", labelled, paths)
    refuse("adv-kd trains a generator", "adv-kd", own, paths)
    refuse("method must be one of", "no-such", own, {})
    with pytest.raises(InputError, match="must be a ReparametrizeConfig, got PairsConfig"):
        distill_denoiser("reparametrize", small(PairsConfig), own, out, **taught)
