"""Error of a score network: the exact posterior mean two ways and by Tweedie, an exact network has none, a small run."""

import json
import sys

import pytest
import torch
from torch import nn

from advkd.diffusion.denoiser import vp_weights
from profiling import evidence, exact_generators, tables
from profiling.cases import score_error
from profiling.cases.score_error import GAUSSIAN, MIXTURE, REFINED, Budget, compared
from profiling.exact_generators import (
    NODES,
    SCHEDULE,
    Affine,
    GaussianScore,
    Perceptron,
    Pushforward,
    gaussian_divergence,
    gaussian_of,
    mixture_divergence,
    refinement,
)

SMALL = Budget(updates=4, score_total=4, rounds=(1, 2), seeds=2, batch_size=16, fit=3, every=2, draws=4)
LEVELS = range(0, len(SCHEDULE), 6)


def states(n=41):
    return torch.linspace(-3, 3, n, dtype=torch.float64)[:, None]


class Steep(nn.Module):
    """A generator of two modes at -1 and 1 with a steep step between them."""

    def forward(self, z):
        return torch.tanh(4 * z) + 0.3 * z


@pytest.mark.parametrize("t", LEVELS)
def test_the_posterior_mean_by_quadrature_is_the_affine_closed_form(t):
    generator = Affine((0.7,), (-0.4,))
    sigma = SCHEDULE.sigma(float(t))
    found, wanted = (exact(generator).predict(states(), sigma)[0] for exact in (Pushforward, gaussian_of))
    assert (found - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("generator", [Steep(), Perceptron(1, 1, 32, 3)], ids=["steep", "perceptron"])
@pytest.mark.parametrize("t", LEVELS)
def test_the_posterior_mean_is_that_of_tweedies_formula(generator, t):
    """alpha D* = x + noise^2 d log q / dx, by central differences of the density, whose own error is of second order."""
    exact, sigma, x, step = Pushforward(generator), SCHEDULE.sigma(float(t)), states(), 1e-5
    alpha, noise = vp_weights(sigma)
    slope = (exact.log_density(x + step, sigma) - exact.log_density(x - step, sigma)) / (2 * step)
    wanted = (x[:, 0] + noise**2 * slope) / alpha
    assert (exact.predict(x, sigma)[0][:, 0] - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("generator", [Steep(), Perceptron(1, 1, 32, 3)], ids=["steep", "perceptron"])
def test_more_nodes_change_nothing(generator):
    assert refinement(generator) < REFINED


def test_too_few_nodes_are_seen(monkeypatch):
    monkeypatch.setattr(exact_generators, "NODES", NODES // 100)
    assert refinement(Steep()) > REFINED


def test_an_exact_score_network_has_no_error():
    generator = Affine()
    exact = gaussian_of(generator)
    score = GaussianScore(exact.mean, exact.covariance.diag())
    found = compared(generator, score, exact, GAUSSIAN, 8)
    assert found["error"] < 1e-20 and found["signal"] > 0.1


def test_the_teachers_own_network_is_as_far_as_the_signal():
    generator, score = Affine(), GaussianScore(GAUSSIAN.mean, GAUSSIAN.covariance.diag())
    found = compared(generator, score, gaussian_of(generator), GAUSSIAN, 8)
    assert found["error"] == pytest.approx(found["signal"], rel=1e-9)


def test_divergences_of_the_data_itself_vanish():
    """An affine generator by its formula; the same in one number by quadrature against a mixture of one Gaussian."""
    own = Affine(GAUSSIAN.covariance.diag().sqrt().tolist(), GAUSSIAN.mean.tolist())
    assert abs(gaussian_divergence(own, GAUSSIAN)) < 1e-12
    single = type(MIXTURE)(torch.tensor([[0.2]]), [1.0], 0.5, SCHEDULE)
    gaussian = type(GAUSSIAN)(torch.tensor([0.2]), torch.tensor([0.5]), SCHEDULE)
    for generator in (Affine((0.5**0.5,), (0.2,)), Affine((0.4,), (-0.5,))):
        wanted = gaussian_divergence(generator, gaussian)
        assert mixture_divergence(generator, single) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_a_small_run_is_stored_and_makes_table_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(score_error, "DEFAULT", SMALL)
    place = {"device": "a processor", "commit": "0123456789", "threads": 1, "versions": {"torch": "2"}, "dirty": False}
    monkeypatch.setattr(score_error, "provenance", lambda: place)
    monkeypatch.setattr(sys, "argv", ["score_error", "--results", str(tmp_path)])
    score_error.main()
    result = json.loads((tmp_path / "score_error.json").read_text())
    assert len(result["runs"]) == len(score_error.SETTINGS) * SMALL.seeds * len(SMALL.rounds)
    by_rounds = {run["rounds"]: run["updates"] for run in result["runs"]}
    assert by_rounds == {1: [0, 2, 4], 2: [0, 2, 4]} and all(len(run["error"]) == 3 for run in result["runs"])
    first = result["runs"][0]
    assert first["error"][0] == first["signal"][0] > first["error"][-1] > 0
    assert [run["refinement"] for run in result["runs"] if "refinement" in run]
    monkeypatch.setattr(score_error, "stored", lambda name: [{**result, "path": "profiling/results/x/score_error.json"}])
    text = "\n".join(tables.TABLES["score_error"]())
    assert "median of 2 seeds" in text and text.count("\n| affine") == 4 and text.count("\n| perceptron") == 2
    score_error.plot(result, tmp_path / "score-error.png")
    assert (tmp_path / "score-error.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_has_the_stored_table():
    page = evidence.ROOT / "docs" / "pages" / "methods" / "score-error.md"
    assert tables.filled(page.read_text(), page) == page.read_text()
