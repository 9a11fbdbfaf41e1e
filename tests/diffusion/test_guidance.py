"""Guidance in closed form, through the runs of exact teachers; every refusal of labels, weights and runs."""

import math

import numpy as np
import pytest
import torch

from advkd.diffusion.exact import FiniteSetTeacher, GaussianTeacher, MixtureTeacher
from advkd.diffusion.guidance import guided
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.solvers import METHODS, Solver
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError

from ..conftest import tiny_teacher, tiny_unet
from .runs import Hierarchy, double, log_snr_schedule

SCHEDULE = log_snr_schedule(-3, 3, 200)
LABELS = torch.tensor([0, 1, 1, 0, 1])


class Outputs(MixtureTeacher):
    """The same teacher as a network of another kind of output."""

    def _network(self, compiled=False):
        network = super()._network()

        def evaluate(x, place, labels=None):
            x0 = network(x, place, labels)
            eps = (x - place.alpha * x0) / place.noise
            return {"epsilon": eps, "v_prediction": place.alpha * eps - place.noise * x0}[self.prediction]

        return evaluate


def two_gaussians(prediction="sample", schedule=SCHEDULE):
    teacher = (MixtureTeacher if prediction == "sample" else Outputs).from_preset("two-gaussians", schedule)
    teacher.prediction = prediction
    return teacher


def states(teacher, solver, steps=40, **options):
    """All states of a run of five samples."""
    x_T = teacher.noise(len(LABELS), seed=3)
    return torch.stack([x for _, x in teacher.path(x_T, solver, steps, seed=4, **options)])


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", ["ddim", "heun", "unipc-3", "ddpm"])
def test_the_exact_classifier_makes_the_conditional_teacher(solver, prediction):
    """Bayes' rule: the score of a class is the data's and the classifier's gradient."""
    teacher = two_gaussians(prediction)
    found = states(teacher, solver, labels=LABELS, guidance=1.0, classifier=two_gaussians())
    wanted = states(teacher, solver, labels=LABELS)
    assert (found - wanted).abs().max() <= 1e-10
    assert (wanted - states(teacher, solver)).abs().max() > 0.1


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp-3m"])
def test_classifier_free_guidance_is_the_classifiers_with_weight_1_more(solver, weight):
    teacher = two_gaussians("epsilon")
    free = states(teacher, solver, labels=LABELS, guidance=weight)
    classified = states(teacher, solver, labels=LABELS, guidance=1 + weight, classifier=two_gaussians())
    assert (free - classified).abs().max() <= 1e-10 and (free - states(teacher, solver, labels=LABELS)).abs().max() > 1e-3


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_guided_flow_in_closed_form(weight):
    """y(sigma) goes with (v + sigma^2)^((1 + w) / 2) (v + s2 + sigma^2)^(-w / 2)."""
    v, s2 = 0.3, 0.8
    teacher, solver = Hierarchy(v, s2, SCHEDULE), Solver("unipc-3", "log_snr")
    levels = solver.levels(SCHEDULE, 200)
    found = states(teacher, solver, 200, labels=0, guidance=weight)

    def growth(sigma):
        return (v + sigma**2) ** ((1 + weight) / 2) * (v + s2 + sigma**2) ** (-weight / 2)

    first, last = levels[0], levels[-1]
    wanted = last.alpha * teacher.noise(len(LABELS), seed=3) / first.alpha * growth(last.sigma) / growth(first.sigma)
    # 199 steps of 0.03 in log-SNR; the start's error of order 3 is the largest.
    assert (found[-2] - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp-2m"])
def test_clipping_comes_after_guidance(solver):
    """The image of the combined output is clamped: as by one teacher whose own output is that combination."""
    weight, teacher = 4.0, two_gaussians()
    teacher.clip = 1.0
    found = states(teacher, solver, labels=LABELS, guidance=weight)
    combined = two_gaussians()
    combined.clip, network = 1.0, combined._network()
    null = torch.full_like(LABELS, 2)
    combined._network = lambda compiled=False: (
        lambda x, place, labels: (1 + weight) * network(x, place, LABELS) - weight * network(x, place, null)
    )
    assert (found - states(combined, solver)).abs().max() <= 1e-12
    assert found[-1].abs().max() <= 1
    teacher.clip = math.inf
    assert (states(teacher, solver, labels=LABELS, guidance=weight)[-1].abs() > 1).any()


@pytest.mark.parametrize("name", METHODS)
def test_every_solver_takes_guidance(name):
    """Classifier-free guidance of weight 0 is the conditional run bit for bit, and another weight changes it."""
    teacher, solver = two_gaussians(), Solver(name, "karras")
    conditional, guidance = (states(teacher, solver, 8, labels=LABELS, guidance=w) for w in (0.0, 2.0))
    assert torch.equal(conditional, states(teacher, solver, 8, labels=LABELS))
    assert guidance.isfinite().all() and (guidance - conditional).abs().max() > 1e-3
    classified = states(teacher, solver, 8, labels=LABELS, guidance=3.0, classifier=two_gaussians())
    assert (classified - guidance).abs().max() <= 1e-9 * guidance.abs().max()
    unguided = states(teacher, solver, 8, labels=LABELS, guidance=0.0, classifier=two_gaussians())
    assert torch.equal(unguided, states(teacher, solver, 8))


def test_one_label_for_all_and_no_label():
    teacher = two_gaussians()
    assert torch.equal(states(teacher, "ddim", labels=1), states(teacher, "ddim", labels=torch.ones(5, dtype=torch.int32)))
    assert torch.equal(states(teacher, "ddim", labels=1), states(teacher, "ddim", labels=[1] * 5))
    unconditional = MixtureTeacher.from_preset("two-gaussians", SCHEDULE)
    unconditional.num_classes, unconditional.null_class = 0, None
    assert torch.equal(states(teacher, "ddim"), states(unconditional, "ddim"))


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_a_classifier_where_no_image_is_left(prediction):
    """Pure noise says nothing of a class: the step there is unguided, and finite."""
    schedule = Schedule(torch.cat((Schedule.linear(50).alpha_bars, double([0.0]))))
    teacher, solver = two_gaussians(prediction, schedule), Solver("ddim", "trailing")
    found = states(teacher, solver, 10, labels=LABELS, guidance=2.0, classifier=two_gaussians())
    assert torch.equal(found[0], states(teacher, solver, 10)[0]) and found.isfinite().all()
    assert (found[-1] - states(teacher, solver, 10)[-1]).abs().max() > 1e-3


def test_a_kept_loop_is_of_its_labels():
    """A teacher runs the same loop again only for the same classes, however many there are and of whatever type."""
    diffusers = pytest.importorskip("diffusers")
    teacher = Teacher(tiny_unet(num_class_embeds=2), diffusers.DDPMScheduler())
    zeros = np.zeros(1200, dtype=np.int64)
    mixed = zeros.copy()
    mixed[600] = 1
    first, second = (teacher.sample(1200, solver="ddim", steps=2, labels=labels) for labels in (zeros, mixed))
    changed = (first != second).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [600]
    assert torch.equal(teacher.sample(2, steps=2, labels=range(2)), teacher.sample(2, steps=2, labels=torch.arange(2)))


def without_null():
    teacher = two_gaussians()
    teacher.null_class = None
    return teacher


GAUSSIAN = GaussianTeacher(torch.zeros(1), torch.ones(1), SCHEDULE)
THREE = FiniteSetTeacher(double([[0.0], [1.0], [2.0]]), torch.arange(3), SCHEDULE)


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (two_gaussians(), {"labels": 2}, r"labels must be in \[0, 2\), got 2 to 2"),
        (two_gaussians(), {"labels": -1}, r"labels must be in \[0, 2\), got -1"),
        (two_gaussians(), {"labels": torch.tensor([0, 1])}, "labels must be one per sample, 3, or one for all, got 2"),
        (two_gaussians(), {"labels": torch.zeros(3, 1).long()}, "labels must be whole numbers, one per sample or one for all"),
        (two_gaussians(), {"labels": torch.zeros(3)}, "labels must be whole numbers"),
        (two_gaussians(), {"labels": "cat"}, "labels must be whole numbers, one per sample or one for all, got 'cat'"),
        (two_gaussians(), {"labels": [[0], [0, 1], 0]}, "labels must be whole numbers, one per sample or one for all"),
        (two_gaussians(), {"labels": torch.zeros(3).bool()}, "labels must be whole numbers"),
        (two_gaussians(), {"labels": torch.tensor([0, 1, 2], dtype=torch.uint16)}, r"labels must be in \[0, 2\), got 0 to 2"),
        (
            two_gaussians(),
            {"labels": 0, "classifier": object()},
            "classifier must be a classifier of noisy images, got <object",
        ),
        (
            GAUSSIAN,
            {"labels": 0},
            "labels: teacher model is unconditional; leave them out, or give a classifier of noisy images",
        ),
        (two_gaussians(), {"guidance": 1.0}, "guidance needs labels: name the class of every sample"),
        (two_gaussians(), {"classifier": THREE}, "guidance needs labels"),
        (two_gaussians(), {"labels": 0, "guidance": -0.1}, r"guidance must be at least 0 \(the model itself\), got -0.1"),
        (two_gaussians(), {"labels": 0, "guidance": math.nan}, "guidance must be finite"),
        (two_gaussians(), {"labels": 0, "guidance": "much"}, "guidance must be a number, got 'much'"),
        (
            without_null(),
            {"labels": 0, "guidance": 1.0},
            "guidance: teacher model has no null class: take guidance 0, or train one",
        ),
        (without_null(), {}, "labels: teacher model has 2 classes and no null class: name one for every sample"),
        (without_null(), {"labels": 0, "guidance": 1.0, "classifier": two_gaussians()}, "^guidance: .* no null class"),
        (GAUSSIAN, {"labels": 3, "guidance": 1.0, "classifier": THREE}, r"labels must be in \[0, 3\), got 3"),
        (THREE, {"labels": 2, "guidance": 1.0, "classifier": two_gaussians()}, r"labels must be in \[0, 2\), got 2"),
    ],
)
def test_refused_guidance(teacher, options, message):
    with pytest.raises(InputError, match=message):
        teacher.sample(3, steps=4, **options)


@pytest.mark.parametrize(
    ("make", "steps", "message"),
    [
        (lambda: "dpmsolver", 4, "solver must be one of ddim, .*, got 'dpmsolver'"),
        (lambda: 3, 4, "solver must be a name or a Solver, got 3"),
        (lambda: Solver("ddim", "even"), 4, "spacing must be one of leading, .*, got 'even'"),
        (lambda: Solver("ddim", churn=1.0), 4, "churn is a number of heun; solver ddim has none: leave it out"),
        (lambda: Solver("heun", eta=1.0), 4, "eta is a number of ddim; solver heun has none"),
        (lambda: Solver("ddim", rho=3.0), 4, "rho is a number of spacing karras; solver ddim has none"),
        (lambda: Solver("unipc", snr=0.3), 4, "snr is a number of predictor-corrector; solver unipc-2 has none"),
        (lambda: Solver("ddim", eta=-1.0), 4, "eta must not be negative or infinite, got -1.0"),
        (lambda: Solver("heun", churn=math.inf), 4, "churn must not be negative or infinite"),
        (lambda: Solver("heun", churn=math.nan), 4, "churn must not be negative or infinite"),
        (lambda: Solver("heun", churn="much"), 4, "churn must be a number, got 'much'"),
        (lambda: Solver("ddim", eta=2.0), 4, "eta = 2.0 asks for more noise than the next state has"),
        (lambda: "ddim", -1, "steps must be at least 1, got -1"),
        (lambda: "unipc", 0, "steps must be at least 1, got 0"),
        (lambda: "ddim", 1, "steps must be at least 2 with spacing leading, .* take trailing"),
        (lambda: "ddim", 201, "steps must be between 1 and the schedule's 200 timesteps, got 201"),
        (lambda: "ddim", 2.5, "steps must be a whole number, got 2.5"),
        (lambda: "ddim", "ten", "steps must be a whole number, got 'ten'"),
    ],
)
def test_refused_runs(make, steps, message):
    with pytest.raises(InputError, match=message):
        two_gaussians().sample(3, solver=make(), steps=steps)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.least > 1])
def test_runs_too_short_for_their_order(name):
    least = METHODS[name].least
    message = f"steps must be at least {least} for the order of solver {name}, got {least - 1}"
    with pytest.raises(InputError, match=message):
        two_gaussians().sample(3, solver=name, steps=least - 1)


def test_refused_shapes_and_needs():
    with pytest.raises(InputError, match=r"x_T must have shape \(2, 1\), got \(2, 2\)"):
        next(two_gaussians().path(torch.zeros(2, 2)))
    with pytest.raises(InputError, match="solver analytic-ddpm needs the teacher's noise power"):
        Solver("analytic-ddpm").program(SCHEDULE, 4, "sample")
    with pytest.raises(InputError, match="labels: teacher tiny is unconditional"):
        tiny_teacher().sample(2, steps=2, labels=0)
    with pytest.raises(InputError, match="n must be at least 1, got 0"):
        tiny_teacher().sample(0)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_one_step_begins_at_the_last_timestep(spacing):
    teacher = two_gaussians()
    assert teacher.timesteps(Solver("ddim", spacing), 1) == [teacher.train_timesteps - 1]


@pytest.mark.parametrize("labels", [[3, 0], [0, -1], torch.tensor([4, 0], dtype=torch.uint8)], ids=str)
@pytest.mark.parametrize("teacher", [two_gaussians(), without_null()], ids=["null class", "none"])
def test_predictions_refuse_other_classes(teacher, labels):
    x = torch.zeros(2, 1)
    message = rf"labels must be in \[0, {2 + (teacher.null_class is not None)}\)"
    for call in (teacher.predict, teacher.score):
        with pytest.raises(InputError, match=message):
            call(x, 1.0, labels)
    with pytest.raises(InputError, match=message):
        teacher.log_probability_gradient(x, 0.5, labels)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.uint16], ids=str)
def test_predictions_take_classes_of_any_integer_type(kind):
    network = Teacher(tiny_unet(num_class_embeds=2), pytest.importorskip("diffusers").DDPMScheduler())
    for teacher in (two_gaussians(), THREE, network):
        x = torch.ones(3, *teacher.shape)
        wanted, found = (teacher.predict(x, 1.0, torch.tensor([0, 1, 1], dtype=t)) for t in (torch.int64, kind))
        assert all(map(torch.equal, found, wanted))


def test_a_network_refuses_other_classes():
    told = Teacher(tiny_unet(num_class_embeds=2), pytest.importorskip("diffusers").DDPMScheduler())
    x = torch.zeros(2, *told.shape)
    with pytest.raises(InputError, match=r"labels must be in \[0, 2\), got 0 to 2"):
        told.predict(x, 1.0, torch.tensor([0, 2]))
    with pytest.raises(InputError, match="labels: teacher tiny is unconditional; leave them out"):
        tiny_teacher().predict(x, 1.0, torch.tensor([0, 1]))
    with pytest.raises(InputError, match="sigma must be at least 0, got -1.0"):
        tiny_teacher().predict(x, -1.0)


def test_no_samples():
    teacher = two_gaussians()
    network = guided(teacher, teacher._network(), 0, torch.zeros(0, dtype=torch.int64), 0.0, None)
    assert callable(network) and teacher.sample(0, steps=4).shape == (0, 1)
