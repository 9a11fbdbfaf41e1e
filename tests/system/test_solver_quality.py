"""Quality of a teacher by solver: paired distances, kept shards, pictures, and the noise power of Analytic-DPM."""

import json

import pytest
import torch
from tqdm import tqdm

from advkd.data import kept_sets
from advkd.diffusion.loading import Classes
from advkd.diffusion.noise_power import FILE, NoisePower
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.solvers import METHODS, Solver
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.evaluation import kept_images, solver_quality
from advkd.evaluation.metrics import frechet_distance
from advkd.evaluation.paired import compare_paired
from advkd.evaluation.report import save_teacher_pictures
from advkd.evaluation.solver_quality import SolverEvaluationConfig, describe, evaluate_solvers
from advkd.evaluation.teacher_pictures import guided_images, read_solvers, save_guidance, save_solver_curves
from advkd.training.noise_power import estimate_noise_power

from ..conftest import tiny_teacher, tiny_unet


def test_differences_of_paired_sets_are_narrower_than_those_of_unpaired_ones():
    """One set is the other with a small shift: paired draws see the shift, unpaired ones their luck."""
    normal = torch.randn(3, 400, 4, generator=torch.Generator().manual_seed(0))
    base, other, reference = normal[0] + 0.5, normal[1] + 0.55, normal[2]
    sets = {"base": base, "shifted": base + 0.05, "other": other, "short": base[:100]}
    found = compare_paired(sets, reference, "base", resamples=60)
    for name, features in sets.items():
        assert found[name].frechet == frechet_distance(features, reference)
        low, high = found[name].frechet_interval
        assert low < found[name].frechet < high
        assert found[name].difference == found[name].frechet - frechet_distance(base[: len(features)], reference)
    assert found["base"].difference == 0 and found["base"].difference_interval == [0, 0]
    assert found["short"].difference == 0 and found["short"].num == 100

    def width(one):
        return one.difference_interval[1] - one.difference_interval[0]

    assert width(found["shifted"]) < width(found["other"]) / 3
    # Four directions, each from 0.5 to 0.55: 4 (0.55^2 - 0.5^2) = 0.21, which the paired interval tells from nothing.
    assert found["shifted"].difference == pytest.approx(0.21, abs=0.05) and found["shifted"].difference_interval[0] > 0


@pytest.mark.parametrize(
    ("sets", "baseline", "message"),
    [
        ({"a": 100}, "b", "baseline must be one of a"),
        ({"a": 100, "b": 200}, "a", "b has 200 images, more than the baseline a with 100"),
    ],
)
def test_sets_that_cannot_be_paired_are_refused(sets, baseline, message):
    with pytest.raises(InputError, match=message):
        compare_paired({name: torch.randn(n, 4) for name, n in sets.items()}, torch.randn(50, 4), baseline)


@pytest.fixture(scope="module")
def large_teacher(tmp_path_factory):
    """A tiny teacher of pictures as large as the digits."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("large")
    unet = tiny_unet()
    unet.register_to_config(sample_size=32)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder)
    return folder


SMALL = SolverEvaluationConfig("ddim,unipc,heun", (3, 4), 90, 80, seed=3, fine_steps=5, resamples=20, batch_size=20)


def test_a_killed_evaluation_draws_what_is_missing(large_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_sets, "SHARD", 40)
    drawn, sample, dies_after = [], Teacher.sample, 5

    def counted(self, *arguments, **options):
        drawn.append(arguments)
        if len(drawn) == dies_after:
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Teacher, "sample", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_solvers(large_teacher, SMALL, tmp_path / "out", cache=tmp_path / "cache", progress=False)
    # Two whole shards of two batches are kept: the fifth batch was of the third.
    first, dies_after = len(drawn), None
    result = evaluate_solvers(large_teacher, SMALL, tmp_path / "out", cache=tmp_path / "cache", progress=False)
    # 90 images are five batches of at most 20 in three shards, 80 are four in two.
    missing = 5 + (5 + 5 + 4) + (5 + 5) - 4
    assert first == 5 and len(drawn) - first == missing
    fresh = evaluate_solvers(large_teacher, SMALL, tmp_path / "new", cache=tmp_path / "other", progress=False)
    assert fresh["rows"] == result["rows"]


@pytest.mark.parametrize(
    ("solver", "folder"),
    [
        (Solver("ddim"), "solvers-7600fd0fb31ff3ef37cb59fc28c00305"),
        (Solver("heun", "karras", churn=3.0), "solvers-a5997ec3c41299a8e192e6d93daee5ed"),
    ],
)
def test_kept_sets_have_the_names_of_earlier_versions(solver, folder, tmp_path):
    """Hours of images lie in users' caches; churn_max, which is infinite, is part of a name."""

    class Model:
        shape = image_shape = (1, 2, 2)

        def identity(self, solver):
            return {"name": "anything", "weights_sha256": "00", "clip": 1.0}

        def sample(self, n, seed, solver, steps, start):
            return torch.zeros(n, *self.shape)

    run = kept_images.Run(solver, 4, 7, 3)
    kept_images.solver_set(Model(), run, 2).images(tmp_path, tqdm(disable=True))
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_rows_of_an_evaluation(large_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_sets, "SHARD", 40)
    result = evaluate_solvers(large_teacher, SMALL, tmp_path / "out", cache=tmp_path / "cache", progress=False)
    assert json.loads((tmp_path / "out" / "solvers.json").read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    found = [(row["solver"], row["steps"], row["evaluations"], row["real"]["num"]) for row in result["rows"]]
    # Heun takes two evaluations a step but the last: two steps are three evaluations, and no steps are four.
    wanted = [("ddim", 3, 3, 90), ("unipc-2", 3, 3, 90), ("heun", 2, 3, 80), ("ddim", 4, 4, 90), ("unipc-2", 4, 4, 90)]
    assert found == wanted and result["baseline"] == "ddim 4"
    zero = [row for row in result["rows"] if (row["solver"], row["evaluations"]) == ("ddim", 4)]
    assert zero[0]["real"]["difference"] == 0
    assert len(describe(result).splitlines()) == 1 + len(wanted)
    save_solver_curves(read_solvers(tmp_path / "out" / "solvers.json"), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    (tmp_path / "bad.json").write_text(json.dumps({**result, "rows": [{"solver": "ddim"}]}))
    with pytest.raises(InputError, match="evaluate --solvers"):
        read_solvers(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"solvers": "ddim,rk4"}, "solver must be one of"),
        ({"num": 0}, "num must be at least 1"),
        ({"other_num": 5000}, "other_num must be in"),
        ({"evaluations": (0,)}, "evaluations must be positive"),
        ({"resamples": 5}, "resamples must be at least 20"),
        ({"seed": 2**64 - 1}, "seed must be in"),
        ({"solvers": "analytic-ddpm", "evaluations": (3,)}, "noise power"),
        ({"solvers": "unipc-3", "evaluations": (2,)}, "evaluations"),
    ],
)
def test_bad_evaluations_are_refused_before_work(values, message, large_teacher, tmp_path):
    with pytest.raises(InputError, match=message):
        evaluate_solvers(
            large_teacher, SolverEvaluationConfig(**values), tmp_path / "out", cache=tmp_path / "c", progress=False
        )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("c/*"))


@pytest.mark.parametrize(
    ("solvers", "left_out"),
    [
        ("euler,heun,unipc-3", ["heun with 1", "unipc-3 with 1", "unipc-3 with 3"]),
        (
            "all",
            ["heun with 1", "unipc-3 with 1", "unipc-3 with 3", "ddim with 1", "analytic-ddpm with 1", "analytic-ddpm with 3"],
        ),
    ],
)
def test_what_is_left_out_is_said(solvers, left_out, large_teacher, tmp_path, monkeypatch, caplog):
    """A run below the order, and of all solvers one that cannot take the teacher; every other one is drawn."""
    runs = []

    def drawing(model, extractor, chosen, *others):
        runs.extend(chosen)
        raise KeyboardInterrupt

    monkeypatch.setattr(solver_quality, "_features", drawing)
    config = SolverEvaluationConfig(solvers, (1, 3), 90)
    with pytest.raises(KeyboardInterrupt):
        evaluate_solvers(large_teacher, config, tmp_path / "out", cache=tmp_path / "cache", progress=False)
    said = [record.getMessage().removeprefix("left out: ") for record in caplog.records]
    assert all(sum(line.startswith(f"{part} evaluations: ") for line in said) == 1 for part in left_out)
    names = [solver.name for solver in config.chosen()]
    wanted = {f"{name} {evaluations}" for name in names for evaluations in (1, 3)}
    assert {run.name for run in runs[1:]} == wanted - {line.split(" evaluations")[0].replace(" with", "") for line in said}
    assert len(said) == len(left_out) or solvers == "all"
    assert all(METHODS[line.split()[0]].least > 1 or "noise power" in line or "leading" in line for line in said)


def test_noise_power_of_a_network_that_finds_a_known_share(tmp_path):
    """A network that answers half of the state finds half of the state's mean square, whatever the level."""
    teacher = tiny_teacher(100)
    teacher.unet.forward = lambda x, t, return_dict=False: (0.5 * x,)
    images = torch.zeros(3, 1, 8, 8)
    # Pictures of a folder are bytes, of which 127.5 is the middle.
    grey = torch.tensor([127, 128], dtype=torch.uint8).repeat(32).reshape(1, 1, 8, 8)
    bytewise = estimate_noise_power(teacher, grey, levels=2, num=500, progress=False)
    assert bytewise.values[-1] == pytest.approx(0.25 * (1 - teacher.alpha_bars[-1].item()), rel=0.05)
    power = estimate_noise_power(teacher, images, levels=5, num=500, progress=False)
    assert power.timesteps[0] == 0 and power.timesteps[-1] == 99
    for t, value in zip(power.timesteps, power.values):
        # x_t of zeros is noise of variance 1 - alpha_bar; 32,000 squares have a relative deviation of 0.8 %.
        assert value == pytest.approx(0.25 * (1 - teacher.alpha_bars[t].item()), rel=0.05)
    other = estimate_noise_power(teacher, images, levels=5, num=500, batch_size=7, progress=False)
    assert other.values == pytest.approx(power.values)
    power.write(tmp_path)
    assert NoisePower.read(tmp_path, 100) == power and NoisePower.read(tmp_path / "none", 100) is None
    with pytest.raises(InputError, match="ends at timestep 99, the teacher at 49"):
        NoisePower.read(tmp_path, 50)
    schedule = Schedule.linear(100)
    for t in power.timesteps:
        assert power.at(schedule.level(float(t))) == pytest.approx(power.values[power.timesteps.index(t)])
    between = power.at(schedule.level(50.0))
    assert min(power.values) < between < max(power.values)
    teacher.noise_powers = power
    assert torch.isfinite(teacher.sample(2, solver="analytic-ddpm", steps=4)).all()


def conditional_teacher(null=3, **scheduler):
    """A tiny teacher of the classes a, b and c."""
    diffusers = pytest.importorskip("diffusers")
    classes = Classes(("a", "b", "c"), null)
    return Teacher(tiny_unet(num_class_embeds=4), diffusers.DDPMScheduler(num_train_timesteps=50, **scheduler), "tiny", classes)


def test_noise_power_is_that_of_the_null_class():
    teacher, told = conditional_teacher(), []
    forward = teacher.unet.forward
    teacher.unet.forward = lambda x, t, class_labels, **options: (
        told.append(class_labels) or forward(x, t, class_labels, **options)
    )
    estimate_noise_power(teacher, torch.zeros(3, 1, 8, 8), levels=2, num=4, progress=False)
    assert told and set(torch.cat(told).tolist()) == {3}
    with pytest.raises(InputError, match="no null class"):
        estimate_noise_power(conditional_teacher(null=None), torch.zeros(3, 1, 8, 8), levels=2, num=4, progress=False)


DAMAGED = ({"timesteps": [0, 5], "values": [1.0]}, {"timesteps": [1], "values": [1.0]}, {"timesteps": [0], "values": [-1.0]})


@pytest.mark.parametrize("content", ["[]", *(json.dumps({**damaged, "images": 1, "seed": 0}) for damaged in DAMAGED)])
def test_damaged_noise_power_is_refused(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError, match=f"{FILE}|noise power"):
        NoisePower.read(tmp_path, 1)


def test_the_embedded_teacher_has_its_noise_power():
    teacher = Teacher.from_pretrained("digits")
    for solver in ("analytic-ddpm", "analytic-ddim"):
        assert all(e.step.c_z >= 0 for e in teacher.program(solver, 10))
    # Noise is all that there is at the noisiest level, and hard to find at the cleanest.
    first, last = (teacher.noise_power(teacher.schedule.level(t)) for t in (999.0, 0.0))
    assert last < first and first == pytest.approx(1.0, abs=0.03)


def test_classes_by_guidance(tmp_path):
    teacher = conditional_teacher()
    images = guided_images(teacher, (0.0, 1.0), steps=3)
    assert images.shape == (2, 3, 1, 8, 8)
    for row, weight in enumerate((0.0, 1.0)):
        for label in range(3):
            alone = teacher.sample(1, 0, "unipc", 3, label, labels=label, guidance=weight)
            assert torch.allclose(images[row, label], alone[0], atol=1e-5)
    save_guidance(teacher, tmp_path / "classes.png")
    assert (tmp_path / "classes.png").stat().st_size > 5_000
    with pytest.raises(InputError, match="unconditional"):
        guided_images(tiny_teacher(), (0.0,))


def test_the_caption_counts_evaluations(tmp_path):
    teacher, sizes = conditional_teacher(), []
    teacher.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    counts = []
    for weight in (0.0, 1.0):
        sizes.clear()
        guided_images(teacher, (weight,))
        counts.append(sum(sizes) // 3)
    caption = save_teacher_pictures(None, teacher, tmp_path)["guidance.png"]
    assert "{} evaluations an image, {} with guidance".format(*counts) in caption


def test_every_solver_is_known_to_the_evaluation():
    assert [solver.name for solver in SolverEvaluationConfig().chosen()] == list(METHODS)
    assert SolverEvaluationConfig(solvers="deis,unipc").chosen() == [Solver("deis-3"), Solver("unipc-2")]
