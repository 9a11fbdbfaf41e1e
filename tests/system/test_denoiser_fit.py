"""Students, teachers, data and folders that do not fit each other: refused by name before a run writes anything."""

import json

import pytest
import torch

from advkd.diffusion.denoiser_student import DenoiserStudent, Sampler
from advkd.diffusion.loading import Classes
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.solvers import Solver
from advkd.diffusion.students import load_student
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.methods.guided import Guided, GuidedConfig
from advkd.methods.pairs import Pairs, PairsConfig
from advkd.methods.progressive import ProgressiveConfig
from advkd.methods.rectified_flow import RectifiedFlowConfig
from advkd.methods.reparametrize import ReparametrizeConfig
from advkd.training.denoisers import distill_denoiser

from ..conftest import tiny_recording, tiny_unet
from ..conftest import tiny_student as tiny_generator
from ..methods.test_progressive import tiny_images, tiny_student

CONFIGS = {
    "reparametrize": ReparametrizeConfig,
    "progressive": ProgressiveConfig,
    "pairs": PairsConfig,
    "rectified-flow": RectifiedFlowConfig,
    "guided": GuidedConfig,
}
LABELLED = (tiny_images(), torch.arange(20) % 3)


def told(names="abc", null=True, prediction="v_prediction"):
    """A tiny conditional teacher."""
    diffusers = pytest.importorskip("diffusers")
    unet = tiny_unet(num_class_embeds=len(names) + null)
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    return Teacher(unet, scheduler, "tiny", Classes(tuple(names), len(names) if null else None))


def begun(teacher, **options):
    return DenoiserStudent.from_teacher(teacher, sampler=Sampler(Solver("ddim", "trailing"), 2), **options)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Labelled pairs of the classes a, b and c."""
    out = tmp_path_factory.mktemp("recorded")
    return record_trajectories(told(), tiny_recording(num=8, classes="all", depth=4), out, progress=False)


def refused(message, method, student, out, **inputs):
    config = CONFIGS[method](updates=2, batch_size=4, ema=0.0)
    with pytest.raises(InputError, match=message):
        distill_denoiser(method, config, student, out, progress=False, **inputs)
    assert not out.exists() or not (out / "metrics.csv").exists()


@pytest.mark.parametrize("method", ["reparametrize", "progressive", "rectified-flow"])
def test_networks_that_take_a_weight_are_for_guided(method, tmp_path):
    student, plain = begun(told()).told_more(0, guidance=4.0), begun(told())
    teacher = {"teacher": told()} if method == "reparametrize" else {}
    refused("takes a guidance weight", method, student, tmp_path / "x", data=LABELLED, **teacher)
    if method != "rectified-flow":
        said = "--teacher takes a guidance weight itself"
        refused(said, method, plain, tmp_path / "x", data=LABELLED, teacher=student.model)


def test_classes_of_student_and_teacher_are_compared(tmp_path):
    for other in (told("cba"), told(null=False), told("ab")):
        refused("classes", "reparametrize", begun(told()), tmp_path / "x", data=LABELLED, teacher=other)
        refused("classes", "reparametrize", begun(other), tmp_path / "x", data=LABELLED, teacher=told())


def test_labels_of_pairs_are_the_students(recorded, tmp_path):
    for method in ("pairs", "rectified-flow"):
        refused("the student is told none", method, tiny_student(), tmp_path / "x", trajectories=recorded)
        for names in ("xyz", "cba", "a"):
            said = "the trajectories' classes are a, b, c"
            refused(said, method, begun(told(names)), tmp_path / "x", trajectories=recorded)


def test_images_that_cannot_be_learnt_from_are_named(tmp_path):
    plain, images = tiny_student(), tiny_images()
    for data, message in (
        (images[:0], "no image"),
        (images.log(), "finite images"),
        ((images * 9).long(), "finite images"),
        (LABELLED, "leave the labels out"),
    ):
        refused(message, "rectified-flow", plain, tmp_path / "x", data=data)
    refused("data has no labels", "rectified-flow", begun(told()), tmp_path / "x", data=images)


def test_options_that_would_do_nothing_are_refused(tmp_path):
    student, images = tiny_student(), tiny_images()

    def flow(message, data=images, teacher=None, **changes):
        config = RectifiedFlowConfig(updates=2, batch_size=4, **changes)
        with pytest.raises(InputError, match=message):
            distill_denoiser("rectified-flow", config, student, tmp_path / "x", data=data, teacher=teacher, progress=False)

    flow("pairs limits recorded pairs", pairs=5)
    flow("learns from pairs", steps=1)
    flow("leave --teacher out", teacher=tiny_student().model)
    with pytest.raises(InputError, match="level is of a denoiser student"):
        Pairs(PairsConfig(level=2.0), tiny_generator())
    for name, value in (("learning_rate", float("inf")), ("clip", float("inf"))):
        with pytest.raises(InputError, match=name):
            RectifiedFlowConfig(**{name: value}).validate()


def test_weights_of_another_prediction_begin_reparametrize_only(tmp_path):
    student = begun(told(prediction="epsilon"))
    for method in ("progressive", "rectified-flow"):
        refused("run 'advkd distill reparametrize' first", method, student, tmp_path / "x", data=LABELLED)
    with pytest.raises(InputError, match="weights are of epsilon"):
        student.save_pretrained(tmp_path / "x")


def test_each_kind_of_student_keeps_its_folder(tmp_path):
    tiny_generator().save_pretrained(tmp_path / "generator")
    tiny_student().save_pretrained(tmp_path / "denoiser")
    with pytest.raises(InputError, match="holds a student already"):
        config, inputs = RectifiedFlowConfig(updates=2, batch_size=4), {"data": tiny_images(), "progress": False}
        distill_denoiser("rectified-flow", config, tiny_student(), tmp_path / "generator", **inputs)
    with pytest.raises(InputError, match="draws in one pass: name another folder"):
        tiny_student().save_pretrained(tmp_path / "generator")
    with pytest.raises(InputError, match="holds a denoiser student: name another folder"):
        tiny_generator().save_pretrained(tmp_path / "denoiser")
    assert isinstance(load_student(tmp_path / "denoiser"), DenoiserStudent)
    (tmp_path / "rounds").mkdir()
    tiny_student().save_pretrained(tmp_path / "rounds" / "4")
    with pytest.raises(InputError, match=r"several rounds, 4: name one, .*rounds/4"):
        load_student(tmp_path / "rounds")


def test_a_run_goes_on_with_a_teacher_of_another_path_and_mends_its_files(tmp_path):
    """The teacher is known by its weights; a complete run writes its last student again."""
    config, teacher = ReparametrizeConfig(updates=2, batch_size=4, checkpoint_every=1), tiny_student(seed=1).model
    teacher.name = "here"
    inputs = {"teacher": teacher, "data": tiny_images(), "progress": False}
    first = distill_denoiser("reparametrize", config, tiny_student(), tmp_path, **inputs)
    teacher.name = "there"
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    again = distill_denoiser("reparametrize", config, tiny_student(), tmp_path, resume=True, **inputs)
    for student in (again, load_student(tmp_path)):
        assert torch.equal(student.sample(2), first.sample(2))
    other = {**inputs, "teacher": tiny_student(seed=2).model}
    with pytest.raises(InputError, match="another teacher"):
        distill_denoiser("reparametrize", config, tiny_student(), tmp_path, resume=True, **other)
    with pytest.raises(InputError, match="another init"):
        distill_denoiser("reparametrize", config, tiny_student(seed=3), tmp_path, resume=True, **inputs)


def test_every_recording_of_a_chain_is_paid_for(tmp_path):
    """Recordings of two models with one seed hold the same samples by name, and cost each."""
    config, costs = RectifiedFlowConfig(updates=2, batch_size=4), []
    student = tiny_student()
    for number in range(2):
        paths = tmp_path / f"paths-{number}"
        record_trajectories(student.model, tiny_recording(num=8, steps=3, solver="dpmpp-2m"), paths, progress=False)
        for again in range(2):
            out = tmp_path / f"flow-{number}-{again}"
            student = distill_denoiser("rectified-flow", config, student, out, trajectories=paths, progress=False)
    costs = [run["cost"] for run in json.loads((out / "training.json").read_text())["runs"]]
    assert [cost["forward"] for cost in costs] == [8 * 3 + 8, 8, 8 * 3 + 8, 8]


def test_guided_students_draw_with_their_usual_weight_and_count_two_evaluations():
    student = begun(told()).told_more(0, guidance=4.0)
    method = Guided(GuidedConfig(usual=1.5), torch.nn.Module(), student.model.schedule)
    assert method.sampler(method.stages()[0]).guidance == 1.5
    assert {method.evaluations(stage) for stage in method.stages()} == {(3, 1)}
    with pytest.raises(InputError, match=r"usual must be in \[0, 2\]"):
        GuidedConfig(guidance=2.0, usual=3.0).validate()
