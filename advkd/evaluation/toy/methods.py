"""Every method on points of the plane: a row is a small function that runs the method's own update and draws the result.

A new method is a function of a :class:`~advkd.evaluation.toy.laboratory.Laboratory` and a line of :data:`ROWS`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ...data.sources import Tensors
from ...diffusion.denoiser import Denoiser
from ...diffusion.solvers import Solver
from ...methods.consistency import Consistency, ConsistencyConfig, consistency_solver
from ...methods.ddgan import DDGAN, DDGANConfig
from ...methods.diff_instruct import DiffInstruct, DiffInstructConfig
from ...methods.dpdm import DPDM, DPDMConfig
from ...methods.guided import Guided, GuidedConfig
from ...methods.pairs import Pairs, PairsConfig
from ...methods.progressive import Progressive, ProgressiveConfig
from ...methods.rectified_flow import RectifiedFlow, RectifiedFlowConfig, straightness
from ...methods.reparametrize import Reparametrize, ReparametrizeConfig
from ...methods.score_distillation import ScoreDistillation, ScoreDistillationConfig
from .laboratory import EXACT, Laboratory, Outcome, noise_errors, own_teacher, state_of
from .solvers import ANCESTRAL, ddpm_title
from .students import PointsAsImages, ToyCritic, ToyGenerator, ToyPoints, ToyScore

LEVELS = torch.logspace(-1.5, 1.0, 11, dtype=torch.float64)
"""Noise levels at which scores are compared."""
TWO_STEPS = 0.5
"""Noise level of a consistency function's second evaluation."""
ENTRY = 2.0
"""Noise level at which Diff-Instruct's generators are entered."""
LATENT = 2
"""Numbers of the latent of DDGAN's generators."""
GUIDANCE = 2.0
"""Largest weight that the guided student takes."""


@dataclass(frozen=True)
class Row:
    """A method on the page.

    Attributes:
        method: name in :data:`advkd.methods.METHODS`.
        title: heading.
        run: function that trains and draws.
        after: rows whose weights it begins with.
        beside: rows whose first samples are shown beside its own, or ``"ROW: TITLE"`` for other samples of a row.
    """

    method: str
    title: str
    run: Callable[[Laboratory], Outcome]
    after: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def reparametrize(lab: Laboratory) -> Outcome:
    """The exact teacher as a v network, which other methods begin with."""
    outcome = Outcome()
    config = ReparametrizeConfig(**lab.settings(3000, learning_rate=3e-3))
    network = lab.run(Reparametrize(config, lab.network(), lab.teacher.schedule), lab.images(), lab.teacher, outcome)
    model = lab.model(network)
    for steps in (20, 5):
        lab.draw(outcome, f"UniPC, {steps} steps", model, "unipc-2", steps)
    points = lab.teacher.data(2048, lab.seed + 1).float()
    outcome.numbers["errors"] = noise_errors(model, lab.teacher, points, LEVELS)
    outcome.numbers["straightness"] = straightness(model, lab.noise())
    outcome.weights = state_of(network)
    return outcome


def pairs(lab: Laboratory) -> Outcome:
    """Regression of a generator on the teacher's pairs."""
    outcome, generator = Outcome(), lab.drawn(ToyGenerator)
    config = PairsConfig(**lab.settings(3000, learning_rate=4e-3))
    network = lab.run(Pairs(config, generator), lab.pairs(), None, outcome)
    lab.place(outcome, "one evaluation", network(lab.noise()))
    return outcome


def progressive(lab: Laboratory) -> Outcome:
    """Eight steps of DDIM in four, in two, in one."""
    outcome, networks = Outcome(), {}
    config = ProgressiveConfig(**lab.settings(800), rounds=(4, 2, 1))
    method = Progressive(config, lab.network("reparametrize"), lab.teacher.schedule)

    def keep(network, out, stage):
        networks[method.steps(stage)] = copy.deepcopy(network)

    lab.run(method, lab.images(), lab.teacher, outcome, save_stage=keep)
    ddim = Solver("ddim", "trailing")
    lab.draw(outcome, f"{EXACT}, DDIM, steps: 8", lab.teacher, ddim, 8)
    for steps, network in networks.items():
        lab.draw(outcome, f"student, steps: {steps}", lab.model(network), ddim, steps)
    return outcome


def _consistency(lab, teacher, **numbers):
    outcome, schedule = Outcome(), lab.teacher.schedule
    config = ConsistencyConfig(**lab.settings(2500), **numbers)
    method = Consistency(config, lab.network("reparametrize"), schedule)
    model = lab.model(lab.run(method, lab.images(), teacher, outcome))
    for steps, sigmas in ((1, ()), (2, (TWO_STEPS,))):
        lab.draw(outcome, f"evaluations: {steps}", model, consistency_solver(config, schedule, sigmas), steps)
    return outcome


def consistency_distillation(lab: Laboratory) -> Outcome:
    """One image for all states of the exact teacher's paths, by its Heun steps."""
    return _consistency(lab, lab.teacher, levels=18, weight="inverse-step")


def consistency_training(lab: Laboratory) -> Outcome:
    """The same without a teacher, the levels doubled on the way."""
    return _consistency(lab, None, levels=10, final_levels=80, target=0.0, weight="inverse-step")


def rectified_flow(lab: Laboratory) -> Outcome:
    """A flow between independent noise and data."""
    return _flow(lab, lab.network(), lab.images(), "images")


def reflow(lab: Laboratory) -> Outcome:
    """A flow between the noise and the points of the first one."""
    network = lab.network("rectified-flow")
    recorded = lab.pairs(lab.model(copy.deepcopy(network)))
    return _flow(lab, network, recorded, "pairs")


def _flow(lab, network, source, given):
    outcome = Outcome()
    method = RectifiedFlow(RectifiedFlowConfig(**lab.settings(3000, learning_rate=3e-3)), network, lab.teacher.schedule)
    method.given = given
    trained = lab.run(method, source, None, outcome)
    model = lab.model(trained)
    for steps in (1, 2, 8):
        lab.draw(outcome, f"Euler steps: {steps}", model, Solver("ddim", "flow"), steps)
    outcome.numbers["straightness"] = straightness(model, lab.noise())
    outcome.weights = state_of(trained)
    return outcome


def diff_instruct(lab: Laboratory) -> Outcome:
    """A generator by two scores alone."""
    return _two_scores(lab, "none", Tensors())


def diff_instruct_with_pairs(lab: Laboratory) -> Outcome:
    """The same, held by the teacher's pairs: distribution matching distillation."""
    return _two_scores(lab, "pairs", lab.pairs(), regression=50.0)


def _two_scores(lab, given, source, **numbers):
    outcome, schedule, network = Outcome(), lab.teacher.schedule, lab.network("reparametrize")
    score = ToyScore(network, schedule)
    settings = lab.settings(700, learning_rate=5e-4, score_learning_rate=1e-3, score_updates=3)
    config = DiffInstructConfig(**settings, weight="edm", sigma_data=1.0, entry=ENTRY, **numbers)
    method = DiffInstruct(config, network, schedule, score)
    method.given = given
    trained = lab.run(method, source, lab.teacher, outcome)
    denoiser = Denoiser(trained, schedule, "v_prediction")
    with torch.no_grad():
        lab.place(outcome, "one evaluation", denoiser.predict(lab.noise(), ENTRY)[0])
        # The score network follows the student itself, not its average.
        own = Denoiser(network.eval(), schedule, "v_prediction").predict(lab.noise(3 * 2**12), ENTRY)[0]
    points, first, second = own.chunk(3)
    exact, q = own_teacher(first, lab.teacher), Denoiser(score, schedule, "sample")
    compared = {"errors": q, "floor": own_teacher(second, lab.teacher), "signal": lab.teacher}
    outcome.numbers |= {name: noise_errors(one, exact, points[:512], LEVELS) for name, one in compared.items()}
    return outcome


def dpdm(lab: Laboratory) -> Outcome:
    """Denoisers whose points are distributed as the data at every level."""
    outcome, schedule, network = Outcome(), lab.teacher.schedule, lab.network("reparametrize")
    settings = lab.settings(700, learning_rate=5e-4, score_learning_rate=1e-3, score_updates=3, weight="dmd")
    method = DPDM(DPDMConfig(**settings), network, schedule, ToyScore(network, schedule))
    model = lab.model(lab.run(method, lab.images(), lab.teacher, outcome))
    for name, one, steps in ((f"{EXACT}'s means", lab.teacher, 8), ("student", model, 8), ("student", model, 4)):
        lab.draw(outcome, f"{name}, steps: {steps}", one, "dpdm", steps)
    return outcome


def ddgan(lab: Laboratory) -> Outcome:
    """Generators of one, two and four steps against a critic of pairs."""
    outcome, schedule, points = Outcome(), lab.teacher.schedule, lab.images().tensors["images"]
    for steps in (1, 2, 4):
        # Modes are narrow, and scores have to be steep: a penalty by far below that of images.
        settings = lab.settings(3000, learning_rate=1e-3, critic_learning_rate=2e-3, ema=0.995)
        config = DDGANConfig(**settings, steps=steps, latent=LATENT, r1=0.002)
        student, critic = PointsAsImages(lab.network(latent=LATENT)), lab.drawn(partial(ToyCritic, 2 + steps))
        method = DDGAN(config, student, schedule, critic)
        network = lab.run(method, Tensors(images=points[:, :, None, None]), None, outcome).network
        sampler = method.sampler(method.stages()[0])
        lab.draw(outcome, f"student, steps: {steps}", lab.model(network, latent=LATENT), sampler.solver, steps)
    return outcome


def score_distillation(lab: Laboratory) -> Outcome:
    """Points that are optimised by the teacher's score alone."""
    outcome = Outcome()
    settings = {"num": 1024, "learning_rate": 0.03, "final_learning_rate": 0.003, "checkpoint_every": 10**6}
    config = ScoreDistillationConfig(**settings, updates=lab.updates(800), seed=lab.seed)  # type: ignore[arg-type]
    start = lab.noise(config.num)
    method = ScoreDistillation(config, ToyPoints(start.clone()), lab.teacher.schedule)
    points = lab.run(method, Tensors(), lab.teacher, outcome)(torch.arange(config.num))
    lab.place(outcome, "optimised points", points, evaluations=0)
    return outcome


def guided(lab: Laboratory) -> Outcome:
    """A student told class and weight of guidance, and then a round of progressive distillation."""
    outcome, guide, schedule = Outcome(), lab.data.guide, lab.teacher.schedule
    network = lab.network(classes=guide.num_classes + 1, guidance=GUIDANCE)
    config = GuidedConfig(**lab.settings(800), guidance=GUIDANCE, first_updates=lab.updates(1500), rounds=(8,))
    method = Guided(config, network, schedule)
    method.num_classes, method.null_class = guide.num_classes, guide.null_class
    trained = lab.run(method, lab.labelled(), guide, outcome)
    model, ddim = lab.model(trained, classes=guide.num_classes, guidance=GUIDANCE), Solver("ddim", "trailing")
    told = torch.full((lab.num,), guide.num_classes // 2)
    for name, one, steps in ((EXACT, guide, 16), ("student", model, 8)):
        for weight in (0.0, GUIDANCE):
            title = f"{name}, steps: {steps}, w = {weight:g}"
            points = one.sample(lab.num, lab.seed, ddim, steps, labels=told, guidance=weight)
            outcome.samples[title] = points.float()
            outcome.evaluations[title] = steps * (2 if one is guide and weight else 1)
            outcome.numbers[title] = (lab.data.labels(points) == told).double().mean().item()
    return outcome


V_NETWORK, TEACHER = ("reparametrize",), ("teacher",)
DDPM = tuple(f"teacher: {ddpm_title(steps)}" for steps in ANCESTRAL)

ROWS: dict[str, Row] = {
    "reparametrize": Row("reparametrize", "The teacher as a v network", reparametrize, (), TEACHER),
    "pairs": Row("pairs", "Regression on pairs", pairs, (), TEACHER),
    "progressive": Row("progressive", "Progressive distillation", progressive, V_NETWORK),
    "guided": Row("guided", "Guided distillation", guided),
    "consistency-distillation": Row("consistency", "Consistency distillation", consistency_distillation, V_NETWORK, TEACHER),
    "consistency-training": Row("consistency", "Consistency training", consistency_training, V_NETWORK, TEACHER),
    "rectified-flow": Row("rectified-flow", "First rectified flow", rectified_flow),
    "reflow": Row("rectified-flow", "Reflow, the second rectified flow", reflow, ("rectified-flow",)),
    "diff-instruct": Row("diff-instruct", "Diff-Instruct", diff_instruct, V_NETWORK, TEACHER),
    "diff-instruct-pairs": Row("diff-instruct", "Diff-Instruct with pairs", diff_instruct_with_pairs, V_NETWORK, TEACHER),
    "score-distillation": Row(
        "score-distillation",
        "Score distillation, beside Diff-Instruct",
        score_distillation,
        ("diff-instruct",),
        ("diff-instruct",),
    ),
    "dpdm": Row("dpdm", "DPDM", dpdm, V_NETWORK),
    "ddgan": Row("ddgan", "Denoising diffusion GANs", ddgan, (), DDPM),
}
"""Name of a row -> the row, in the page's order; a row comes after those that it begins with."""

LEFT_OUT: dict[str, str] = {
    "adv-kd": "its student is a pyramid of submodules, each of which learns an image of its own resolution; a point has none",
    "features": "it compares images by the features of a classifier of images; it is progressive distillation otherwise",
}
"""Methods that are not shown, and why."""
