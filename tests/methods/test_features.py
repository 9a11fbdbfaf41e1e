"""Feature distillation: a quadratic form near its minimum, the target; affine students keep the sampler's map."""

import copy
import json
import math
import tempfile
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from advkd.cli.main import main
from advkd.data.sources import Tensors
from advkd.diffusion.denoiser_student import DenoiserStudent
from advkd.errors import InputError
from advkd.methods.features import Features, FeaturesConfig
from advkd.models.classifier import Classifier, ClassifierConfig
from advkd.training.denoisers import DenoiserDistiller, distill_denoiser
from advkd.training.trainer import Trainer

from .test_progressive import FLOAT64, TEACHER, Affine, normal, tiny_images, tiny_student, walked

PLANE = torch.tensor([[0.6, 0.0], [0.0, 0.3], [0.0, 0.0]], dtype=torch.float64)
"""Features of a plane: with (1, 1, 1), the direction that softmax does not see, its columns span all three dimensions."""


class Linear(torch.nn.Module):
    """Linear features of samples of any shape, which are the logits, too."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def features(self, x):
        return x.flatten(1) @ self.matrix.T

    def forward(self, x):
        return self.features(x)


def tiny_classifier(seed=0, **changes):
    """A classifier of 8x8 images as it begins, whose logits tell images apart."""
    torch.manual_seed(seed)
    config = ClassifierConfig(image_size=8, classes=3, channels=(4,), num_features=5)
    return Classifier(replace(config, **changes)).eval()


def saved(folder, **changes):
    """Folder of a tiny classifier."""
    tiny_classifier(**changes).save_pretrained(folder)
    return str(folder)


def tiny_config(classifier, seed=0, **changes):
    numbers = {"updates": 3, "rounds": (2, 1), "batch_size": 4, "ema": 0.5, "checkpoint_every": 2}
    return FeaturesConfig(classifier=classifier, seed=seed, **{**numbers, **changes})


def tiny_run(data, out, seed=0, weights=0, **options):
    """Two rounds of three updates; the killed run goes on within the second one, with the classifier in another folder."""
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(saved(folder), seed)
        return DenoiserDistiller("features", config, tiny_student(weights), out, None, tiny_images(), **options)


def method(phi, **changes):
    return Features(FeaturesConfig(rounds=(1,), **changes), Affine(8), TEACHER.schedule, phi)


def loss_and_gradient(method, x0, target):
    """The method's own loss of an image, and its gradient."""
    x0 = x0.clone().requires_grad_()
    loss = method.loss(x0, target, torch.ones(len(x0), dtype=torch.float64))
    return loss.item(), torch.autograd.grad(loss, x0)[0]


@pytest.mark.parametrize("tau", [0.5, 0.9, 3.0])
def test_the_gradient_is_zero_where_softmax_features_agree_and_nowhere_else(tau):
    """For phi = identity it is softmax(x0) - softmax(target / tau); a shift of all features is not seen."""
    same, target = method(Linear(torch.eye(6, dtype=torch.float64)), tau=tau), normal(4, 3, 2)
    for x0 in (target / tau, target / tau + normal(4, 1, 1, seed=1)):
        loss, gradient = loss_and_gradient(same, x0, target)
        assert abs(loss) < 1e-15 and gradient.abs().max() < 1e-15
    x0 = target + normal(4, 3, 2, seed=2)
    loss, gradient = loss_and_gradient(same, x0, target)
    ours, theirs = (x.flatten(1).softmax(dim=1) for x in (x0, target / tau))
    wanted = (ours - theirs).reshape_as(x0) / len(x0)
    assert torch.allclose(gradient, wanted, rtol=1e-12, atol=1e-15)
    assert math.isclose(loss, (theirs * (theirs / ours).log()).sum(dim=1).mean().item(), rel_tol=1e-12)
    assert loss > 0 and (gradient.flatten(1).norm(dim=1) > 1e-3).all()


def test_the_gradient_is_seen_through_the_features_alone():
    """A direction that phi does not see has no gradient, unless a part of the pixels' error is kept."""
    blind, target = Linear(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)), normal(4, 3)
    x0 = target + torch.tensor([0.3, 0.0, 0.7], dtype=torch.float64)
    _, gradient = loss_and_gradient(method(blind), x0, target)
    assert gradient[:, 0].abs().min() > 1e-4 and gradient[:, 2].abs().max() == 0
    loss, gradient = loss_and_gradient(method(blind), x0, target)
    kept, moved = loss_and_gradient(method(blind, pixels=0.25, weight="x0"), x0, target)
    assert math.isclose(kept - loss, 0.25 * (0.3**2 + 0.7**2) / 3, rel_tol=1e-12)
    assert torch.allclose(moved - gradient, 0.25 * 2 * (x0 - target) / 3 / len(x0), rtol=1e-12, atol=1e-15)


def test_near_its_minimum_the_loss_is_a_quadratic_form():
    """1/2 d^T (diag(p) - p p^T) d for a difference d of features: a tenth of d leaves a thousandth of the error."""
    matrix, target, direction = normal(5, 4, seed=1), normal(3, 2, 2), normal(3, 2, 2, seed=2)
    own, errors = method(Linear(matrix), tau=1.0), []
    p, d = own.classifier.features(target).softmax(dim=1), own.classifier.features(direction)
    form = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    for size in (1e-1, 1e-2, 1e-3):
        found, _ = loss_and_gradient(own, target + size * direction, target)
        wanted = 0.5 * size**2 * torch.einsum("ni,nij,nj->n", d, form, d).mean().item()
        errors.append(abs(found - wanted))
        assert math.isclose(found, wanted, rel_tol=10 * size)
    orders = [math.log10(larger / smaller) for larger, smaller in zip(errors, errors[1:])]
    assert all(abs(order - 3) < 0.1 for order in orders), orders


def test_entropy_falls_and_diversity_rises_by_their_weights():
    """alpha (beta H(p) - (1 - beta) H(mean of p)) by hand, on predictions of three classes."""
    logits = torch.tensor([[800.0, 0, 0], [0, 0, 0], [0, 800, 0]], dtype=torch.float64)
    mean = torch.tensor([4, 4, 1], dtype=torch.float64) / 9  # of (1, 0, 0), (1, 1, 1) / 3 and (0, 1, 0)
    each, together = math.log(3) / 3, -(mean * mean.log()).sum().item()
    own = method(Linear(torch.eye(3, dtype=torch.float64)), alpha=0.5, beta=0.75, tau=1.0)
    loss, _ = loss_and_gradient(own, logits, logits)
    assert math.isclose(loss, 0.5 * (0.75 * each - 0.25 * together), rel_tol=1e-12)
    # A step down the gradient makes each prediction surer, and all of them more different.
    near = 0.1 * normal(6, 3, seed=3)
    for beta, name, sign in ((1.0, "each", 1), (0.0, "together", -1)):
        only = method(Linear(torch.eye(3, dtype=torch.float64)), alpha=1.0, beta=beta, tau=1.0)
        loss, gradient = loss_and_gradient(only, near, near)
        p = near.softmax(dim=1)
        p = p if name == "each" else p.mean(dim=0, keepdim=True)
        assert math.isclose(loss, sign * -(p * p.log()).sum(dim=1).mean().item(), rel_tol=1e-12)
        assert loss_and_gradient(only, near - 0.01 * gradient, near - 0.01 * gradient)[0] < loss


def test_every_round_keeps_the_samplers_map(tmp_path):
    """Features that tell the plane's points apart have one minimum, progressive's target, at temperature 1."""
    config = FeaturesConfig(updates=400, rounds=(4, 2, 1), batch_size=16, learning_rate=0.05, clip=0.0, tau=1.0)
    own, rounds, x = Features(config, Affine(8), TEACHER.schedule, Linear(PLANE)), [], normal(50, 2)
    run = Trainer(
        own,
        Tensors(images=TEACHER.data(256)),
        TEACHER,
        tmp_path,
        save_stage=lambda network, out, stage: rounds.append(copy.deepcopy(network)),
        **FLOAT64,
    )
    run.run()
    wanted = walked(TEACHER.predict, x, own.sigmas)
    for steps, network in zip(config.rounds, rounds, strict=True):
        found = walked(own.denoiser(network).predict, x, own.sigmas[:: 8 // steps])
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5), (steps, (found - wanted).abs().max())
        fewer = walked(TEACHER.predict, x, own.sigmas[:: 8 // steps])
        assert (fewer - wanted).abs().max() > 0.1


def test_the_classifier_stays_as_it_was_and_is_recorded(tmp_path):
    """Its weights and its batch norm's statistics, over both rounds; every student's record names them."""
    start, out = tiny_student(), tmp_path / "out"
    config = tiny_config(saved(tmp_path / "second"), alpha=0.1, pixels=0.5)
    before = Classifier.from_pretrained(tmp_path / "second").state_dict()
    run = DenoiserDistiller("features", config, start, out, None, tiny_images(), progress=False)
    kept = run.method.classifier
    run.run()
    assert kept is run.running["classifier"].part.module and not kept.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.state_dict().items())
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    known = run.identity["classifier"]
    for steps in ("2", "1"):
        (record,) = DenoiserStudent.from_pretrained(out / steps).training_record["runs"]
        assert record["classifier_sha256"] == known and len(known) == 64 and record["method"] == "features"


def test_classifiers_that_do_not_fit_are_refused(tmp_path):
    start, out, embedded = tiny_student(), tmp_path / "out", Classifier.from_pretrained("digits")
    embedded.save_pretrained(tmp_path / "copy")
    with torch.no_grad():
        embedded.scale.mul_(2)
    embedded.save_pretrained(tmp_path / "scaled")
    remedy = "train another one: advkd classifier train --data {0} --seed 1 --num-features 48 --out second"
    measured = "that with which Frechet distances of {0} are measured: " + remedy
    for named, message in (
        ("", "classifier: none is named: " + remedy.format("digits")),
        (tmp_path / "nowhere", "classifier: there is no folder .*nowhere: " + remedy.format("digits")),
        ("digits", measured.format("digits")),
        ("glyphs", measured.format("glyphs")),
        (tmp_path / "copy", measured.format("digits")),
        (tmp_path / "scaled", measured.format("digits")),
        (saved(tmp_path / "noisy", noisy=True), "classifier: .*noisy is of noisy images: train one without --noisy"),
        (saved(tmp_path / "colour", image_channels=3), r"takes images \(3, 8, 8\), the student draws \(1, 8, 8\): train one"),
        (saved(tmp_path / "large", image_size=16, channels=(4, 4)), r"takes images \(1, 16, 16\), the student draws"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            distill_denoiser("features", tiny_config(str(named)), start, out, data=tiny_images(), progress=False)
        assert "\n" not in str(caught.value)
    assert not out.exists()


def test_the_command_names_what_is_missing(tmp_path):
    tiny_student().save_pretrained(tmp_path / "start")
    words = ["distill", "features", "--init", str(tmp_path / "start"), "--data", "digits", "--out", str(tmp_path / "out")]
    for more, message in (
        ([], "classifier: none is named: train another one: advkd classifier train"),
        (["--classifier", "digits"], "are measured: train another one"),
        (["--tau", "0"], "tau must be positive"),
    ):
        done = CliRunner().invoke(main, [*words, *more])
        assert done.exit_code and message in str(done.output) + str(done.exception)
    assert not (tmp_path / "out").exists()


def test_bad_numbers_are_refused(monkeypatch):
    infinite = float("inf")
    for name, values in {
        "tau": (0.0, -1.0, infinite, math.nan),
        "alpha": (-0.1, infinite, math.nan),
        "beta": (-0.1, 1.1, math.nan),
        "pixels": (-1.0, infinite, math.nan),
        "updates": (0,),
        "rounds": ((4, 3),),
    }.items():
        for value in values:
            with pytest.raises(InputError, match=f"^{name} must be"):
                Features(FeaturesConfig(**{name: value}), Affine(8), TEACHER.schedule, Linear(PLANE))
    for option, owner in (({"beta": 0.5}, "alpha"), ({"weight": "x0"}, "pixels")):
        with pytest.raises(InputError, match=f"{next(iter(option))} does nothing without {owner}"):
            FeaturesConfig(**option).validate()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    method(Linear(PLANE))
    with pytest.raises(InputError, match="alpha: .* start the run without a launcher, or leave alpha out"):
        method(Linear(PLANE), alpha=0.1)


def test_a_run_goes_on_with_its_own_classifier_only(tmp_path):
    """It is known by its weights: their folder may be another one."""

    def run(out, folder, resume=False, **changes):
        config, images = tiny_config(folder, **changes), tiny_images()
        return DenoiserDistiller("features", config, tiny_student(), out, None, images, resume=resume, progress=False)

    first, out = saved(tmp_path / "first"), tmp_path / "out"
    begun = run(out, first)
    begun.step()
    begun._write_checkpoint(None)
    with pytest.raises(InputError, match="holds a run with another classifier: repeat"):
        run(out, saved(tmp_path / "other", seed=1), resume=True)
    with pytest.raises(InputError, match="holds a run with another tau: repeat"):
        run(out, first, resume=True, tau=1.0)
    assert run(out, saved(tmp_path / "moved"), resume=True).done == 1
    assert json.loads(json.dumps(begun.identity)) == begun.identity and "first" not in str(begun.identity)
