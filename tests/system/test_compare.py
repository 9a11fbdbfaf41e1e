"""``advkd compare``: students and solvers from one start noise, with paired differences; killed runs go on."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from advkd.diffusion.solvers import Solver
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.evaluation import compare, contestants, kept_images
from advkd.evaluation.compare import CompareConfig, compare_models
from advkd.evaluation.comparison_page import PICTURES, describe
from advkd.evaluation.contestants import parse_students, training_cost
from advkd.evaluation.features import ClassifierFeatures
from advkd.evaluation.metrics import frechet_distance
from advkd.evaluation.paired import Resampled, paired_rows, resampled_frechet
from advkd.models.shape import StudentConfig
from advkd.models.student import Student

from ..conftest import fork_cli, tiny_unet

SMALL = {"num": 140, "seed": 3, "fine_steps": 5, "resamples": 20, "batch_size": 20}


class StandIn(Teacher):
    """A denoiser student's interface over a teacher."""

    training_record = None
    sampler = SimpleNamespace(solver=Solver("ddim"), steps=4)

    def sample(self, n, seed=0, steps=None, start=0):
        return super().sample(n, seed, self.sampler.solver, steps or self.sampler.steps, start)


def record(method="progressive", **cost):
    runs = [{"method": "reparametrize", "cost": {"forward": 10, "backward": 4}}, {"method": method, "cost": cost or None}]
    return {"samples": [], "runs": runs}


@pytest.fixture(scope="module")
def pyramids(tmp_path_factory):
    """Folders of three one-pass students with other weights."""
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        student = Student(StudentConfig(image_size=32, image_channels=1, channels=(8,) * 6, latent_size=8)).eval()
        student.training_record = {**record("pairs", forward=100 + seed, backward=50), "samples": []}
        student.save_pretrained(folder := tmp_path_factory.mktemp("pyramids") / str(seed))
        folders.append(folder)
    return folders


@pytest.fixture
def denoisers(large_teacher, monkeypatch):
    """``load_student`` that gives stand-ins for ``d/...`` and reads other folders."""
    read = contestants.load_student

    def load(source, device):
        if not str(source).startswith("d/"):
            return read(source, device)
        student = StandIn.from_pretrained(large_teacher, device)
        student.training_record = record(forward=90, backward=30)
        if source == "d/other":
            with torch.no_grad():
                student.unet.conv_in.weight.mul_(1.1)
        return student

    monkeypatch.setattr(contestants, "load_student", load)


def run(teacher, folder, **values):
    config = CompareConfig(**{**SMALL, **values})
    return compare_models(teacher, config, folder / "out", cache=folder / "cache", progress=False)


def row_of(result, name):
    (found,) = [row for row in result["rows"] if row["name"] == name]
    return found


def test_a_student_that_is_a_solver_reads_the_same_distances(large_teacher, tmp_path, denoisers, pyramids):
    students = f"d/4,d/4@2,{pyramids[0]}"
    result = run(large_teacher, tmp_path, students=students, solvers="ddim,unipc-2", evaluations=(4, 2))
    names = ["d/4", "d/4@2", str(pyramids[0]), "ddim 2", "ddim 4", "unipc-2 4"]
    assert [row["name"] for row in result["rows"]] == names and result["baseline"] == "ddim 4"
    for student, solver in (("d/4", "ddim 4"), ("d/4@2", "ddim 2")):
        ours, theirs = row_of(result, student), row_of(result, solver)
        assert ours["real"] == theirs["real"] and ours["fine"] == theirs["fine"]
        assert (ours["evaluations"], ours["parameters"]) == (theirs["evaluations"], theirs["parameters"])
    none = row_of(result, "d/4")["real"]["difference"]
    assert none["value"] == 0 and none["interval"] == [0, 0]
    assert row_of(result, "ddim 2")["real"]["difference"]["value"] != 0
    assert (
        row_of(result, "d/4")["cost"] == {"forward": 100, "backward": 34} and row_of(result, "d/4")["method"] == "progressive"
    )
    assert row_of(result, str(pyramids[0]))["cost"] == {"forward": 110, "backward": 54}
    assert row_of(result, "ddim 4")["cost"] == {"forward": 0, "backward": 0}
    pairs = {(pair["row"], pair["less"]): pair for pair in result["differences"]}
    assert len(pairs) == len(names) * (len(names) - 1) // 2
    assert pairs["ddim 4", "d/4"]["frechet"] == {"value": 0, "interval": [0, 0]}
    apart = pairs["ddim 4", "ddim 2"]["at_infinity"]["value"]
    limits = [row_of(result, name)["real"]["at_infinity"]["value"] for name in ("ddim 4", "ddim 2")]
    assert apart == limits[0] - limits[1]


def test_files_of_a_comparison(large_teacher, tmp_path, denoisers, pyramids):
    result = run(large_teacher, tmp_path, students=f"d/4,{pyramids[0]}", solvers="ddim", evaluations=(2,))
    assert json.loads((tmp_path / "out/comparison.json").read_text()) == json.loads(json.dumps(result))
    page, text = ((tmp_path / "out" / f"comparison.{kind}").read_text() for kind in ("html", "md"))
    assert page.count("data:image/png;base64,") == 1 + len(result["rows"])
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for row in result["rows"]:
        assert f"<td>{row['name']}</td>" in page and f"| {row['name']} | " in text
        assert row["seconds"]["median"] > 0
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert f"x floor at N = {SMALL['num'] // 2}" in page and f"batches of {compare.TIMED}" in page
    assert len(describe(result).splitlines()) == 1 + len(result["rows"])


def test_sets_begin_at_one_start_noise(large_teacher, tmp_path, denoisers, pyramids, monkeypatch):
    """A one-pass student draws from projections of the noise that the teacher's runs begin at, in the sets' order."""
    pictures = {}
    monkeypatch.setattr(compare, "write_pages", lambda result, images, out: pictures.update(images))
    run(large_teacher, tmp_path, students=f"d/4,{pyramids[0]}", solvers="ddim", evaluations=(4,))
    teacher, student = Teacher.from_pretrained(large_teacher), Student.from_pretrained(pyramids[0])
    with torch.no_grad():
        drawn = student(student.project(teacher.noise(PICTURES, SMALL["seed"])))
    expected = ((drawn.clamp(-1, 1) + 1) * 127.5).round()
    # One step of eight bits, where another arithmetic rounds a value in the middle to the other side.
    assert (pictures[str(pyramids[0])].float() - expected).abs().max() <= 1
    assert torch.equal(pictures["d/4"], pictures["ddim 4"])


def test_trainings_of_a_row(large_teacher, tmp_path, pyramids):
    joined = "+".join(map(str, pyramids))
    each = [str(folder) for folder in pyramids]
    result = run(large_teacher, tmp_path, students=",".join([joined, *each]))
    assert result["baseline"] == joined
    for against, name in (("real", "frechet"), ("real", "at_infinity"), ("fine", "times_floor"), ("real", "precision")):
        least, middle, most = sorted(row_of(result, one)[against][name]["value"] for one in each)
        figure = row_of(result, joined)[against][name]
        assert (figure["value"], figure["spread"]) == (middle, [least, most])
    row = row_of(result, joined)
    assert [training["source"] for training in row["trainings"]] == each
    for training in row["trainings"]:
        assert training["real"]["value"] == row_of(result, training["source"])["real"]["frechet"]["value"]
        assert training["real"]["interval"] == row_of(result, training["source"])["real"]["frechet"]["interval"]
    assert row["cost"] == {"forward": 111, "backward": 54} and row["real"]["difference"]["interval"] == [0, 0]
    assert "[" in (tmp_path / "out/comparison.md").read_text()


def test_the_median_of_trainings_is_taken_draw_by_draw():
    several = [Resampled(1.0, [1.0, 5.0]), Resampled(3.0, [4.0, 2.0]), Resampled(2.0, [9.0, 3.0])]
    assert Resampled.median(several) == Resampled(2.0, [4.0, 3.0])
    assert several[1] - several[0] == Resampled(2.0, [3.0, -3.0]) and several[1] / 2 == Resampled(1.5, [2.0, 1.0])


def test_draws_of_rows_are_those_of_the_sets():
    features, reference = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    rows = paired_rows(30, 30, 4)
    found = resampled_frechet(features, reference, rows)
    assert found.value == frechet_distance(features, reference)
    assert found.draws == [frechet_distance(features[own], reference[others]) for own, others in rows]
    assert found.interval[0] < found.value < found.interval[1]


def test_a_killed_comparison_draws_nothing_twice(large_teacher, tmp_path, denoisers, pyramids, monkeypatch):
    monkeypatch.setattr(kept_images, "SHARD", 40)
    monkeypatch.setattr(compare, "_times", lambda rows, device: {row.name: {"median": 1, "p20": 1, "p80": 1} for row in rows})
    options = {"students": f"d/4,d/other,{pyramids[0]}", "solvers": "ddim", "evaluations": (4,)}
    drawn, eight_bit, dies_after = [], kept_images.eight_bit, 20

    def counted(images):
        drawn.append(len(images))
        if len(drawn) == dies_after:
            raise KeyboardInterrupt
        return eight_bit(images)

    monkeypatch.setattr(kept_images, "eight_bit", counted)
    with pytest.raises(KeyboardInterrupt):
        run(large_teacher, tmp_path, **options)
    first, dies_after = len(drawn), None
    result = run(large_teacher, tmp_path, **options)
    # A set of 140 is seven batches of 20 in three shards of 40 and one of 20; the twentieth batch was the last of a shard's two
    # (the sixth of the third set), so that its shard is drawn again whole.
    assert first == 20 and len(drawn) - first == 5 * 7 - 18
    again = len(drawn)
    measured = []
    monkeypatch.setattr("advkd.evaluation.yardstick.resampled_frechet", lambda *rows: measured.append(rows))
    monkeypatch.setattr(ClassifierFeatures, "forward", lambda *arguments: measured.append(arguments))
    kept = run(large_teacher, tmp_path, **options)
    assert len(drawn) == again and not measured and kept["rows"] == result["rows"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to compare"),
        ({"students": "nowhere/at/all"}, "nowhere/at/all"),
        ({"students": "d/4,d/4"}, "students: 'd/4' is there twice"),
        ({"students": "d/4,"}, "students: a name is empty"),
        ({"students": "d/4+d/4"}, "'d/4' is there twice"),
        ({"students": "d/4+d/4@2"}, "trainings of one row must be alike, but evaluations of d/4@2 is 2"),
        ({"students": "PYRAMID@2"}, "draws in one pass"),
        ({"solvers": "ddim,ddim"}, "solvers: 'ddim' is there twice"),
        ({"solvers": "ddim,rk4"}, "solver must be one of"),
        ({"solvers": "unipc-3", "evaluations": (2,)}, "no row is left"),
        ({"students": "d/4", "baseline": "d/5"}, "--baseline must be a row, one of d/4; got 'd/5'"),
        ({"students": "d/4", "num": 100}, "--num 100: 100 images are too few for 64 features"),
        ({"students": "d/4", "resamples": 5}, "resamples must be at least 20"),
        ({"students": "d/4", "evaluations": (0,)}, "evaluations must be positive"),
        ({"students": "d/4", "seed": 2**64 - 1}, "seed must be in"),
        ({"students": "digits", "seed": 0}, "trained on the sets' start noise, seed 0"),
        ({"students": "SMALL"}, "draws gray 8x8 images, the teacher gray 32x32 ones"),
    ],
)
def test_bad_comparisons_are_refused_before_work(values, message, large_teacher, tmp_path, denoisers, pyramids):
    if "students" in values:
        torch.manual_seed(0)
        Student(StudentConfig(image_size=8, image_channels=1, channels=(8,) * 4, latent_size=2)).save_pretrained(tmp_path / "8")
        names = {"PYRAMID": str(pyramids[0]), "SMALL": str(tmp_path / "8")}
        for short, folder in names.items():
            values = {**values, "students": values["students"].replace(short, folder)}
    with pytest.raises(InputError, match=re.escape(message)):
        run(large_teacher, tmp_path, **values)
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_students_of_classes_need_a_null_class(large_teacher, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    unet = tiny_unet(num_class_embeds=4)
    unet.register_to_config(sample_size=32)
    student = StandIn(unet, diffusers.DDPMScheduler(num_train_timesteps=100))
    monkeypatch.setattr(contestants, "load_student", lambda source, device: student)
    with pytest.raises(InputError, match="students: told has no null class"):
        run(large_teacher, tmp_path, students="told")


def test_what_a_solver_cannot_take_is_left_out(large_teacher, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(compare, "_features", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(large_teacher, tmp_path, solvers="ddim,unipc-2", evaluations=(1, 2, 4))
    said = [line.getMessage().removeprefix("left out: ").partition(" evaluations")[0] for line in caplog.records]
    assert said == ["ddim with 1", "unipc-2 with 1", "unipc-2 with 2"]


def test_names_of_students():
    assert parse_students("a/4, b@2 ,c+d@1") == {"a/4": [("a/4", 0)], "b@2": [("b", 2)], "c+d@1": [("c", 0), ("d", 1)]}
    assert parse_students("me@home/4") == {"me@home/4": [("me@home/4", 0)]} and parse_students("") == {}


@pytest.mark.parametrize(
    ("record", "cost"),
    [
        (None, None),
        ({"runs": []}, None),
        ({"runs": [{"cost": {"forward": 3, "backward": 1}}, {}]}, None),
        ({"runs": [{"cost": {"forward": 3, "backward": 1}}, {"cost": {"forward": 4, "backward": 0}}]}, (7, 1)),
    ],
)
def test_cost_of_trainings(record, cost):
    assert training_cost(record) == (cost and dict(zip(("forward", "backward"), cost)))


def test_the_command(large_teacher, tmp_path):
    options = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = ["compare", "--teacher", large_teacher, "--solvers", "ddim,heun", "--evaluations", "2,4", *options]
    done = fork_cli(*command, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    titles, *lines = done.stdout.splitlines()
    assert titles.startswith("row ") and "less ddim 4" in titles
    assert sorted(line.split("  ")[0] for line in lines) == ["ddim 2", "ddim 4", "heun 3"]
    assert "left out: heun with 2 evaluations" in done.stderr
    done = fork_cli(*command, "--baseline", "ddim 3", "--out", tmp_path / "other")
    assert done.returncode == 2 and done.stderr.count("\n") == 2 and "--baseline must be a row" in done.stderr
    assert not (tmp_path / "other").exists()
