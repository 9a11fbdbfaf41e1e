"""Error of Diff-Instruct's score network against the exact score of its generator, by updates of the network for each update.

python -m profiling.cases.score_error

The posterior mean D* of a small generator's own images is known (:mod:`profiling.exact_generators`). The method runs in the
real trainer; every so many updates E |D_q - D*|^2 stands beside the signal that the generator follows, E |D* - D_p|^2. Both are
means over all timesteps at equal shares and over the generator's own noised images: the measure under which the method, with
constant weight and uniform levels, averages D_q - D_p. The table is ``profiling/results/<device>/score_error.json``.
"""

import argparse
import copy
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from advkd.data.draws import Draw
from advkd.data.plots import panels
from advkd.data.sources import Tensors
from advkd.diffusion.denoiser import Denoiser, noised
from advkd.diffusion.exact import GaussianTeacher, MixtureTeacher
from advkd.diffusion.exact_teacher import ExactTeacher
from advkd.methods.diff_instruct import DiffInstruct, DiffInstructConfig
from advkd.runtime.files import write_json
from advkd.runtime.timing import provenance
from advkd.training.trainer import Trainer

from ..evidence import NOTHING, checked, markdown, source, stored
from ..exact_generators import (
    NODES,
    SCHEDULE,
    Affine,
    GaussianScore,
    Perceptron,
    PerceptronScore,
    Pushforward,
    gaussian_divergence,
    gaussian_of,
    mixture_divergence,
    refinement,
)
from ..harness import device_folder

REFINED = 1e-6
"""Largest difference that twice as many nodes may make to D*."""
MEASURED_SEED = 2**40
"""Seed of the draws that errors are measured on, which no run trains on."""


@dataclass(frozen=True)
class Budget:
    """Size of the measurement.

    Attributes:
        updates: updates of the generator that all runs have in common.
        score_total: updates of the score network that all runs have in common.
        rounds: updates of the score network for each of the generator, one run each.
        seeds: runs of every setting.
        batch_size: images of an update.
        fit: updates that bring a score perceptron to the teacher's denoiser before the run.
        every: updates of the generator from one measurement to the next; five times as many beyond ``updates``.
        draws: states of a measurement at every timestep.
    """

    updates: int = 400
    score_total: int = 4000
    rounds: tuple[int, ...] = (1, 2, 5, 10)
    seeds: int = 3
    batch_size: int = 256
    fit: int = 600
    every: int = 20
    draws: int = 128

    def length(self, rounds: int) -> int:
        """Updates of the generator in a run: enough for both common numbers."""
        return max(self.updates, math.ceil(self.score_total / rounds))

    def measures(self, update: int) -> bool:
        """True at updates of the generator that end in a measurement."""
        return update % (self.every if update <= self.updates else 5 * self.every) == 0


DEFAULT = Budget()


@dataclass(frozen=True)
class Setting:
    """A generator, its data and its score network.

    Attributes:
        teacher: of the data.
        generator: function of a seed.
        score: function of a seed.
        exact: function of the generator that gives the teacher of its own images.
        divergence: function of generator and teacher.
        learning_rate: of the generator.
        score_learning_rate: of the score network.
    """

    teacher: ExactTeacher
    generator: Callable
    score: Callable
    exact: Callable
    divergence: Callable
    learning_rate: float
    score_learning_rate: float


GAUSSIAN = GaussianTeacher(torch.tensor([0.4, -1.0]), torch.tensor([0.3, 2.0]), SCHEDULE)
MIXTURE = MixtureTeacher.from_preset("two-gaussians", SCHEDULE)
AFFINE = (gaussian_of, gaussian_divergence, 0.01)
SETTINGS = {
    "affine generator, q of the exact form": Setting(
        GAUSSIAN, lambda seed: Affine(), lambda seed: GaussianScore(GAUSSIAN.mean, GAUSSIAN.covariance.diag()), *AFFINE, 0.02
    ),
    "affine generator, q a perceptron": Setting(
        GAUSSIAN, lambda seed: Affine(), lambda seed: PerceptronScore(2, 1.4, seed), *AFFINE, 0.002
    ),
    "perceptron generator, q a perceptron": Setting(
        MIXTURE,
        lambda seed: Perceptron(1, 1, 32, 1000 + seed),
        lambda seed: PerceptronScore(1, 1.05, seed),
        Pushforward,
        mixture_divergence,
        0.002,
        0.002,
    ),
}
"""Title -> setting. The learning rates stay constant, so that a run of few updates is the beginning of a longer one."""


@torch.no_grad()
def compared(generator, score, exact, teacher, draws):
    """Mean squares of D_q - D* and of D* - D_p at the generator's own noised images, all timesteps at equal shares.

    Args:
        generator: module of ``(N, ...)`` standard normal numbers.
        score: network of the teacher's prediction.
        exact: teacher of the generator's own images.
        teacher: of the data.
        draws: states at every timestep.

    Returns:
        ``{"error": , "signal": }``.
    """
    timesteps = torch.arange(len(SCHEDULE)).repeat_interleave(draws)
    draw, sigma = Draw(MEASURED_SEED, 0, len(timesteps), "cpu", torch.float64), SCHEDULE.sigma(timesteps)
    x = noised(generator(draw.normal("z", *teacher.shape)), draw.normal("noise", *teacher.shape), sigma)
    q = Denoiser(score, SCHEDULE, teacher.prediction)
    found, wanted, taught = (model.predict(x, sigma)[0] for model in (q, exact, teacher))
    return {"error": (found - wanted).square().mean().item(), "signal": (wanted - taught).square().mean().item()}


def fitted(score, teacher, updates, seed):
    """A perceptron regressed on the teacher's denoiser, the start that a copy of the teacher's network is."""
    images, numbers = teacher.data(2**13, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(score.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(updates, 1))
    q = Denoiser(score, SCHEDULE, teacher.prediction)
    for _ in range(updates):
        x0 = images[torch.randint(len(images), (256,), generator=numbers)]
        sigma = SCHEDULE.sigma(torch.randint(len(SCHEDULE), (256,), generator=numbers))
        x = noised(x0, torch.randn(x0.shape, generator=numbers, dtype=torch.float64), sigma)
        loss = (q.predict(x, sigma)[0] - teacher.predict(x, sigma)[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return score


def curves(setting, rounds, seed, budget, score):
    """One run of Diff-Instruct in the trainer: measurements along it, as lists by name."""
    config = DiffInstructConfig(
        updates=budget.length(rounds),
        batch_size=budget.batch_size,
        score_updates=rounds,
        learning_rate=setting.learning_rate,
        score_learning_rate=setting.score_learning_rate,
        final_learning_rate=1.0,
        ema=0.0,
        clip=0.0,
        seed=seed,
    )
    generator, score = setting.generator(seed), copy.deepcopy(score)
    method = DiffInstruct(config, generator, score=score)
    method.given = "none"
    found: dict[str, list] = {"updates": [], "error": [], "signal": [], "divergence": []}

    def measure(update):
        measured = compared(generator, score, setting.exact(generator), setting.teacher, budget.draws)
        measured |= {"updates": update, "divergence": setting.divergence(generator, setting.teacher)}
        for name, values in found.items():
            values.append(float(f"{measured[name]:.4g}"))

    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(method, Tensors(), setting.teacher, out, dtype=torch.float64, progress=False)
        measure(0)
        for update in range(1, config.updates + 1):
            trainer.step()
            if budget.measures(update):
                measure(update)
    return found if setting.exact is not Pushforward else found | {"refinement": refinement(generator)}


def measure(budget, progress=lambda text: None):
    """All runs.

    Args:
        budget: :class:`Budget`.
        progress: function that is told about every run.

    Returns:
        The result without its provenance.

    Raises:
        RuntimeError: twice as many nodes change D* by :data:`REFINED` or more.
    """
    runs = []
    for title, setting in SETTINGS.items():
        for seed in range(budget.seeds):
            score = setting.score(seed)
            score = fitted(score, setting.teacher, budget.fit, seed) if isinstance(score, PerceptronScore) else score
            for rounds in budget.rounds:
                progress(f"{title}: seed {seed}, {rounds} updates of q for each of g")
                runs.append({"setting": title, "seed": seed, "rounds": rounds, **curves(setting, rounds, seed, budget, score)})
    refined = max(run["refinement"] for run in runs if "refinement" in run)
    if not refined < REFINED:
        raise RuntimeError(f"twice as many nodes change D* by {refined:.1e}: take more than {NODES}")
    rates = {title: [s.learning_rate, s.score_learning_rate] for title, s in SETTINGS.items()}
    return {"runs": runs, "config": {**asdict(budget), "rounds": list(budget.rounds), "learning_rates": rates}}


def ratios(run):
    """Error of q over the signal, at every measurement of a run."""
    return [error / signal for error, signal in zip(run["error"], run["signal"], strict=True)]


def within(run, values, first, last):
    """Median of a run's values behind update ``first`` of the generator, up to ``last``."""
    return statistics.median(value for update, value in zip(run["updates"], values, strict=True) if first < update <= last)


def summary(result):
    """Rows of the table: ``{"setting", "rounds", "ratio", "error", "divergence", "late_ratio", "late_divergence"}``, by seed.

    The first three figures are medians over the generator's updates that all runs have in common, the divergence over their
    last quarter; the late ones are those of the last quarter of the common updates of q.
    """
    config, rows = result["config"], []
    for title in dict.fromkeys(run["setting"] for run in result["runs"]):
        for rounds in config["rounds"]:
            runs = [run for run in result["runs"] if run["setting"] == title and run["rounds"] == rounds]
            common, late = config["updates"], config["score_total"] / rounds
            figures = {
                "ratio": [within(run, ratios(run), 0, common) for run in runs],
                "error": [within(run, run["error"], 0, common) for run in runs],
                "divergence": [within(run, run["divergence"], 0.75 * common, common) for run in runs],
                "late_ratio": [within(run, ratios(run), 0.75 * late, late) for run in runs],
                "late_divergence": [within(run, run["divergence"], 0.75 * late, late) for run in runs],
            }
            rows.append({"setting": title, "rounds": rounds, **figures})
    return rows


def lines():
    """The table of stored results."""
    found = []
    for result in stored("score_error"):
        config = result["config"]
        found += source(result, [], f"median of {config['seeds']} seeds (least to greatest)")
        titles = ("setting", "updates of q for each of g", f"error / signal, {config['updates']:,} of g", "error of q")
        titles += ("KL, their last quarter", f"error / signal, last quarter of {config['score_total']:,} of q", "KL, likewise")
        names = ("ratio", "error", "divergence", "late_ratio", "late_divergence")
        rows = [(row["setting"], row["rounds"], *(_spread(row[name]) for name in names)) for row in summary(result)]
        found += [*markdown(titles, rows), ""]
    return found[:-1] or NOTHING


def _spread(values):
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def plot(result, path):
    """Above, error of q over the signal by updates of the generator; below, the generator's divergence by updates of q."""
    checked({"path": str(path), **result})
    config = result["config"]
    settings = list(dict.fromkeys(run["setting"] for run in result["runs"]))
    with panels(path, 6.2, 2, len(settings), sharey="row") as found:
        for axes, below, title in zip(found, found[len(settings) :], settings):
            for rounds in config["rounds"]:
                runs = [run for run in result["runs"] if run["setting"] == title and run["rounds"] == rounds]
                _line(axes, runs, [ratios(run) for run in runs], 1, config["updates"], str(rounds))
                _line(below, runs, [run["divergence"] for run in runs], rounds, config["score_total"], "")
            axes.axhline(1, color="gray", linewidth=0.8)
            axes.set(title=title.replace(", ", ",\n"), xlabel="updates of the generator", yscale="log")
            below.set(xlabel="updates of q", yscale="log")
        found[0].set_ylabel("error of q over the signal")
        found[len(settings)].set_ylabel("KL of generator and data")
        found[len(settings) - 1].legend(title="updates of q for each of the generator", loc="lower right", ncols=4)


def _line(axes, runs, values, scale, last, label):
    """Median of the seeds, in a band from the least to the greatest."""
    kept = [i for i, update in enumerate(runs[0]["updates"]) if scale * update <= last]
    x = [scale * runs[0]["updates"][i] for i in kept]
    columns = [[of_run[i] for of_run in values] for i in kept]
    (line,) = axes.plot(x, [statistics.median(column) for column in columns], label=label)
    axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=line.get_color(), alpha=0.15, linewidth=0)


def main():
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=DEFAULT.seeds, help="runs of every setting")
    parser.add_argument("--results", help="folder of score_error.json (default: profiling/results/<device>)")
    options = parser.parse_args()
    place = provenance()
    result = measure(replace(DEFAULT, seeds=options.seeds), lambda text: print(text, flush=True))
    write_json(Path(options.results or device_folder()) / "score_error.json", result | {"provenance": place})


if __name__ == "__main__":
    main()
