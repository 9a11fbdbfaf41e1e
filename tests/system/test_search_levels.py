"""``advkd search-levels``: golden-section search, proved on functions whose minimum is known, and the command around it."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

from advkd.data.pictures import eight_bit, to_pil
from advkd.diffusion.denoiser_student import DenoiserStudent, Sampler
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.solvers import Solver
from advkd.errors import InputError
from advkd.evaluation.compare import CompareConfig
from advkd.evaluation.features import build_extractor, extract
from advkd.evaluation.image_sets import real_images
from advkd.evaluation.metrics import frechet_distance
from advkd.evaluation.search_levels import SearchLevelsConfig, golden_section, search_levels
from advkd.models.classifier import Classifier, ClassifierConfig

from ..conftest import fork_cli
from ..conftest import tiny_student as tiny_generator
from ..diffusion.test_moments import moments
from ..methods.test_progressive import tiny_images, tiny_student

GOLDEN = (math.sqrt(5) - 1) / 2
SMALL = {"num": 12, "tries": 3, "batch_size": 5, "real": "real", "extractor": "classifier"}


@pytest.mark.parametrize("evaluations", [1, 2, 3, 8, 30])
@pytest.mark.parametrize("minimum", [-2.0, -1.9, 0.3, 1.234, 4.0])
def test_the_minimum_of_a_parabola_is_found_as_exactly_as_the_evaluations_imply(minimum, evaluations):
    """At the ends of the interval, too; 30 evaluations leave 6 g^30 = 3e-6, far above what rounding hides, 1e-8."""
    called = []

    def f(x):
        called.append(x)
        return (x - minimum) ** 2 + 5

    found = golden_section(f, -2.0, 4.0, evaluations)
    assert len(called) == evaluations == len(set(called)) and found in called
    assert all(-2 < x < 4 for x in called)
    assert abs(found - minimum) <= 6 * GOLDEN**evaluations * (1 + 1e-9)


def test_more_evaluations_than_floats_can_tell_apart_are_counted_all_the_same():
    called = []
    found = golden_section(lambda x: called.append(x) or abs(x - 1.0), 0.0, 3.0, 120)
    assert len(called) == 120 and abs(found - 1) < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_level(bad):
    first = 3 * (1 - GOLDEN)
    with pytest.raises(InputError, match=f"the distance at log sigma {first:.6g} is {bad}"):
        golden_section(lambda x: bad, 0.0, 3.0, 4)


@pytest.mark.parametrize(("low", "high", "evaluations"), [(1.0, 1.0, 3), (2.0, 1.0, 3), (0.0, math.inf, 3), (0.0, 1.0, 0)])
def test_intervals_without_a_search_are_refused(low, high, evaluations):
    with pytest.raises(InputError, match="low and high must be|evaluations must be"):
        golden_section(lambda x: x, low, high, evaluations)


@pytest.mark.parametrize("v", [0.3, 1.7])
def test_the_search_ends_at_the_best_middle_level_of_gaussian_data(v):
    """The function E[x0 | y] = v y / (v + s^2) after two evaluations has the variance v^2 (A + s^2) / (v + s^2)^2.

    A is the variance after the first evaluation. Its maximum, v^2 / 4 (v - A) < v, is at s^2 = v - 2 A: there the Frechet
    distance to the data, (sqrt(v) - sqrt(variance))^2, is least. Variances are those of the solver's own program.
    """
    schedule = Schedule.edm(40, 0.002, 20.0)
    first, (highest,) = schedule.alpha_bars[-1].item(), schedule.levels("trailing", 1)

    def denoised(weights, level, one):
        return level.alpha * v / (level.alpha**2 * v + level.noise**2) * weights

    def variance(sigmas):
        bars = (first, *(1 / (1 + sigma**2) for sigma in sigmas))
        program = Solver("consistency", sigma_data=0.0, alpha_bars=bars).program(schedule, len(bars), "sample")
        return list(moments(program, (0.0, 1.0), denoised))[-1][1]

    after_one = variance(())
    assert after_one == pytest.approx((v * highest.alpha / (highest.alpha**2 * v + highest.noise**2)) ** 2, rel=1e-12)
    middle = math.sqrt(v - 2 * after_one)
    for sigma in (0.1, middle, 3.0):
        wanted = v**2 * (after_one + sigma**2) / (v + sigma**2) ** 2
        assert variance((sigma,)) == pytest.approx(wanted, rel=1e-12)
    low, high = math.log(0.002), math.log(20.0)
    found = golden_section(lambda x: (math.sqrt(v) - math.sqrt(variance((math.exp(x),)))) ** 2, low, high, 25)
    assert abs(found - math.log(middle)) <= (high - low) * GOLDEN**25


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A consistency student, one of another solver, a conditional one and a generator; classifiers; real images."""
    folder = tmp_path_factory.mktemp("models")
    schedule = tiny_student().model.schedule
    first = schedule.alpha_bars[-1].item()
    solver = Solver("consistency", sigma_min=schedule.sigma(0.0).item(), alpha_bars=(first, 0.5))
    record = {"runs": [{"method": "consistency"}], "samples": []}
    for name, classes in (("cd", {}), ("told", {"num_class_embeds": 3})):
        student = tiny_student(**classes)
        DenoiserStudent(student.model, Sampler(solver, 2), record).save_pretrained(folder / name)
    DenoiserStudent(tiny_student(1).model, Sampler(solver, 2), record).save_pretrained(folder / "other")
    for name in ("ddim", "teacher"):
        tiny_student().save_pretrained(folder / name)
    (folder / "teacher" / "sampler.json").unlink()
    tiny_generator().save_pretrained(folder / "generator")
    torch.manual_seed(0)
    Classifier(ClassifierConfig("tiny", 8, 1, 3, (8,), 4)).eval().save_pretrained(folder / "classifier")
    Classifier(ClassifierConfig("large", 16, 1, 3, (8, 8), 4)).eval().save_pretrained(folder / "large")
    for name, num in (("real", 16), ("few", 6)):
        (folder / name).mkdir()
        for i, picture in enumerate(to_pil(tiny_images(num))):
            picture.save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(autouse=True)
def among_models(models, monkeypatch):
    monkeypatch.chdir(models)


def search(out, student="cd", **values):
    return search_levels(student, SearchLevelsConfig(**{**SMALL, **values}), out, progress=False)


@pytest.fixture(scope="module")
def found(models, tmp_path_factory):
    """Folder and result of a search of two further levels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        out = tmp_path_factory.mktemp("found") / "cd-3"
        return out, search(out, steps=3)


def test_the_student_with_the_best_levels_is_saved(found, models):
    out, result = found
    assert json.loads((out / "levels.json").read_text()) == result
    assert [len(one["sigmas"]) for one in result["candidates"]] == [1, 1, 1, 2, 2, 2]
    assert len({tuple(one["sigmas"]) for one in result["candidates"]}) == 6
    ones, twos = result["candidates"][:3], result["candidates"][3:]
    best = min(ones, key=lambda one: one["distance"])
    assert all(one["sigmas"][:1] == best["sigmas"] and one["sigmas"][1] < best["sigmas"][0] for one in twos)
    assert result["sigmas"] == min(twos, key=lambda one: one["distance"])["sigmas"]
    before, after = DenoiserStudent.from_pretrained("cd"), DenoiserStudent.from_pretrained(out)
    bars = (before.sampler.solver.alpha_bars[0], *(1 / (1 + sigma**2) for sigma in result["sigmas"]))
    wanted = dataclasses.replace(before.sampler, solver=dataclasses.replace(before.sampler.solver, alpha_bars=bars), steps=3)
    assert after.sampler == wanted and after.evaluations == 3
    for name in ("unet/diffusion_pytorch_model.safetensors", "training.json"):
        assert (out / name).read_bytes() == (models / "cd" / name).read_bytes()
    assert result["student"]["weights_sha256"] == before.identity()["weights_sha256"]
    assert result["settings"] == {**dataclasses.asdict(SearchLevelsConfig()), **SMALL, "steps": 3}


def test_distances_are_those_of_the_saved_students_images(found):
    """Of images 0 to 11 of the search's seed, in batches of 5, in eight bits."""
    out, result = found
    student, extractor = DenoiserStudent.from_pretrained(out), build_extractor("classifier")
    batches = [student.sample(count, 77, start=start) for start, count in ((0, 5), (5, 5), (10, 2))]
    features = extract(extractor, eight_bit(torch.cat(batches)))
    wanted = frechet_distance(features, extract(extractor, real_images("real", (1, 8, 8))))
    (distance,) = [one["distance"] for one in result["candidates"] if one["sigmas"] == result["sigmas"]]
    assert distance == wanted and result["score"] == "FD-tiny"


class Killed(Exception):
    pass


@pytest.mark.parametrize("passes", [0, 4, 9, 10, 17])
def test_a_killed_search_goes_on_to_the_same_file(found, tmp_path, monkeypatch, passes):
    """Killed at the first batch, within a candidate, between two of them and before the last; measured ones are kept."""
    sample, calls = DenoiserStudent.sample, []

    def killing(*arguments, **options):
        if len(calls) == passes:
            raise Killed
        calls.append(1)
        return sample(*arguments, **options)

    monkeypatch.setattr(DenoiserStudent, "sample", killing)
    with pytest.raises(Killed):
        search(tmp_path / "out", steps=3)
    kept = json.loads((tmp_path / "out/levels.json").read_text())["candidates"]
    assert len(kept) == passes // 3 and not (tmp_path / "out/model_index.json").exists()
    with pytest.raises(InputError, match=r"holds an unfinished search of other tries, seed: repeat its own command"):
        search(tmp_path / "out", steps=3, tries=4, seed=5)
    with pytest.raises(InputError, match="holds an unfinished search of other student"):
        search(tmp_path / "out", "other", steps=3)
    drawn = []
    monkeypatch.setattr(DenoiserStudent, "sample", lambda *a, **options: drawn.append(1) or sample(*a, **options))
    assert search(tmp_path / "out", steps=3) == found[1]
    assert len(drawn) == 18 - 3 * len(kept)
    assert (tmp_path / "out/levels.json").read_bytes() == (found[0] / "levels.json").read_bytes()


def test_a_search_killed_before_its_student_is_written_draws_nothing_again(found, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    shutil.copy(found[0] / "levels.json", tmp_path / "out")
    monkeypatch.setattr(DenoiserStudent, "sample", None)
    assert search(tmp_path / "out", steps=3) == found[1]
    assert DenoiserStudent.from_pretrained(tmp_path / "out").evaluations == 3


def test_a_damaged_file_is_refused(found, tmp_path, monkeypatch):
    monkeypatch.setattr(DenoiserStudent, "sample", None)
    (tmp_path / "out").mkdir()
    for change in ({"candidates": 5}, {"candidates": [{"sigmas": [1.0]}]}, {"settings": []}):
        (tmp_path / "out/levels.json").write_text(json.dumps({**found[1], **change}))
        with pytest.raises(InputError, match=r"search .*levels.json is damaged"):
            search(tmp_path / "out", steps=3)
    (tmp_path / "out/levels.json").write_text("{}")
    with pytest.raises(InputError, match="is not what advkd writes"):
        search(tmp_path / "out", steps=3)


REFUSED = {
    "generator": ({"student": "generator"}, "--student generator is a generator.* or a teacher: name a student of"),
    "teacher": ({"student": "teacher"}, "--student teacher is a generator.* or a teacher: name a student of"),
    "other solver": ({"student": "ddim"}, "--student ddim draws by the solver ddim, not consistency: name a student of"),
    "no null class": ({"student": "told"}, "--student told has no null class"),
    "steps": ({"steps": 1}, "steps must be at least 2"),
    "num": ({"num": 0}, "num must be at least 1"),
    "tries": ({"tries": 0}, "tries must be at least 1"),
    "batch size": ({"batch_size": 0}, "batch_size must be at least 1"),
    "many tries": ({"tries": 90}, "no room for the level of evaluation 2 .*: ask for fewer --tries$"),
    "few images": ({"num": 7}, "--num 7: 7 images are too few for 4 features; 8 or more are needed"),
    "other real images": ({"real": "digits"}, "--real digits holds gray 32x32 images, gray 8x8 ones are compared"),
    "few real images": ({"real": "few"}, "--real: 6 images are too few for 4 features; 8 or more are needed"),
    "compare's seed": ({"seed": 1_000_001}, "seed 1000001 .*'advkd compare'.* choose another --seed"),
    "the reference's seed": ({"seed": 1_000_002}, "seed 1000002 .*'advkd compare'.* choose another --seed"),
    "negative seed": ({"seed": -1}, "seed must be at least 0"),
    "extractor": ({"extractor": "large"}, "--extractor large takes gray 16x16 images.* name a classifier of that size"),
    "device": ({"device": "meta"}, "--device 'meta' is not available"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_drawn(case, tmp_path, monkeypatch):
    monkeypatch.setattr(DenoiserStudent, "sample", None)
    values, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        search(tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_folders_that_exist_are_refused(found, tmp_path, monkeypatch):
    monkeypatch.setattr(DenoiserStudent, "sample", None)
    with pytest.raises(InputError, match="holds the student of a finished search: name another folder"):
        search(found[0], steps=3)
    (tmp_path / "file").write_text("")
    for out in ("cd", tmp_path):
        with pytest.raises(InputError, match=f"--out {out} is not empty and holds no unfinished search: name a new folder"):
            search(out)
    with pytest.raises(InputError, match=r"--out .*file is a file; name a folder"):
        search(tmp_path / "file")


@pytest.mark.parametrize("left", [(), (".lock", ".levels.json.host.1-1.tmp")])
def test_an_empty_folder_is_taken(found, tmp_path, left):
    """Empty but for hidden files, which a search leaves that is killed before its first candidate."""
    for name in left:
        (tmp_path / name).write_text("")
    assert search(tmp_path, steps=3) == found[1]


def test_images_that_are_not_finite_are_refused_with_their_levels(found, tmp_path, monkeypatch):
    """One NaN in the second candidate's last image; the first candidate is kept, and goes into a search of finite images."""
    sample, calls = DenoiserStudent.sample, []

    def failing(*arguments, **options):
        images = sample(*arguments, **options)
        calls.append(1)
        if len(calls) == 6:
            images[-1, 0, -1, -1] = math.nan
        return images

    first, second = found[1]["candidates"][:2]
    with monkeypatch.context() as patch:
        patch.setattr(DenoiserStudent, "sample", failing)
        with pytest.raises(InputError, match=f"--student: its images with sigmas {second['sigmas'][0]:.6g} are not finite"):
            search(tmp_path / "out", steps=3)
    assert json.loads((tmp_path / "out/levels.json").read_text())["candidates"] == [first]
    assert search(tmp_path / "out", steps=3) == found[1]


def test_levels_that_come_to_the_lowest_one_leave_no_room_for_others(tmp_path, monkeypatch):
    """A distance that is least at the lowest sigma narrows every interval by g^tries, until alpha_bars would be equal."""
    bars = []

    def sample(student, n, *arguments, **options):
        bars.append(student.sampler.solver.alpha_bars[-1])
        return torch.zeros(n, 1, 8, 8)

    monkeypatch.setattr(DenoiserStudent, "sample", sample)
    monkeypatch.setattr("advkd.evaluation.search_levels.frechet_distance", lambda generated, reference: 1 - bars[-1])
    with pytest.raises(InputError, match=r"no room for the level of evaluation \d+ .*: ask for --steps \d+ in another --out"):
        search(tmp_path / "out", steps=30, tries=10)


def test_the_default_seed_is_none_of_a_comparisons():
    assert SearchLevelsConfig().seed not in (CompareConfig().seed, CompareConfig().seed + 1)


def test_the_command(models, tmp_path):
    options = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    files = [str(models / "cd"), str(tmp_path / "cd-2")]
    options = [str(models / word) if word in ("real", "classifier") else word for word in options]
    run = fork_cli("search-levels", "--student", files[0], "--out", files[1], *options)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "cd-2/levels.json").read_text())
    assert f"student in {files[1]}: sigmas {result['sigmas'][0]:.4g}, FD-tiny " in run.stdout
    assert len(result["candidates"]) == 3 and DenoiserStudent.from_pretrained(files[1]).evaluations == 2
    again = fork_cli("search-levels", "--student", files[0], "--out", files[1], *options)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "finished search" in again.stderr
