"""``advkd compare``: students and solvers from one start noise, with paired differences; killed runs go on."""

import json
import re
import shutil

import pytest
import torch

from advkd.data import kept_sets
from advkd.diffusion.denoiser_student import DenoiserStudent, Sampler
from advkd.diffusion.loading import Classes
from advkd.diffusion.networks import build_unet
from advkd.diffusion.solvers import Solver
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.evaluation import compare
from advkd.evaluation.compare import CompareConfig, compare_models
from advkd.evaluation.comparison_page import PICTURES, describe
from advkd.evaluation.contestants import Setting, parse_students, solver_rows, student_rows, total_cost
from advkd.evaluation.features import ClassifierFeatures
from advkd.evaluation.metrics import frechet_distance
from advkd.evaluation.paired import Resampled, paired_rows, resampled_frechet
from advkd.models.shape import StudentConfig
from advkd.models.student import Student
from advkd.runtime.files import digest

from ..conftest import fork_cli, tiny_student, tiny_teacher

SMALL = {"num": 140, "seed": 3, "fine_steps": 5, "resamples": 20, "batch_size": 20}


def record(method="progressive", **cost):
    runs = [{"method": "reparametrize", "cost": {"forward": 10, "backward": 4}}, {"method": method, "cost": cost or None}]
    return {"samples": [], "runs": runs}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a teacher of v prediction; students of it; and students that do not fit it.

    ``four`` has the teacher's weights and takes four steps, ``other`` has other weights; ``one-0`` to ``one-2`` draw in one
    pass; ``small`` draws 8x8 images, and ``told`` is told classes and has no null class. ``free`` is told classes and has one,
    and ``weighted`` takes the weight of guidance beside. ``one-told`` and ``one-ca`` draw in one pass and are told classes.
    """
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("models")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, prediction_type="v_prediction")
    for seed, (name, classes) in enumerate({"four": 0, "other": 0, "told": 3}.items()):
        torch.manual_seed(seed)
        teacher = Teacher(build_unet(32, 1, (8, 8, 8, 8), classes), scheduler)
        student = DenoiserStudent.from_teacher(teacher, sampler=Sampler(Solver("ddim", "trailing"), 4))
        student.training_record = record(forward=90, backward=30)
        student.save_pretrained(folder / name)
        if name == "four":
            diffusers.DDPMPipeline(teacher.unet, scheduler).save_pretrained(folder / "teacher")
    teacher = Teacher(build_unet(32, 1, (8, 8, 8, 8), 4), scheduler, classes=Classes(("a", "b", "c"), 3))
    for name, most in (("free", 0.0), ("weighted", 4.0)):
        student = DenoiserStudent.from_teacher(teacher, sampler=Sampler(Solver("ddim", "trailing"), 4))
        student = student.told_more(0, guidance=most) if most else student
        for parameter in student.model.unet.parameters():
            # Embeddings of conditions may begin at zero, where weights would make no difference.
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1 if most else 0.0)
        student.save_pretrained(folder / name)
    for seed in range(3):
        torch.manual_seed(seed)
        one = Student(StudentConfig(image_size=32, image_channels=1, channels=(8,) * 6, latent_size=8)).eval()
        one.training_record = record("pairs", forward=100 + seed, backward=50)
        one.save_pretrained(folder / f"one-{seed}")
    for name, classes in (("one-told", ("a", "b", "c")), ("one-ca", ("c", "a"))):
        torch.manual_seed(5)
        shape = StudentConfig(image_size=32, image_channels=1, channels=(8,) * 6, latent_size=8, classes=classes)
        Student(shape).eval().save_pretrained(folder / name)
    tiny_student().save_pretrained(folder / "small")
    return folder


@pytest.fixture(autouse=True)
def among_models(models, monkeypatch):
    """Students by their short names; times of two images."""
    monkeypatch.chdir(models)
    monkeypatch.setattr(compare, "TIMED", 2)


def run(folder, cache=None, teacher="teacher", **values):
    spacing = {"spacing": "trailing"} if values.get("solvers") else {}
    config = CompareConfig(**{**SMALL, **spacing, **values})
    return compare_models(teacher, config, folder / "out", cache=cache or folder / "cache", progress=False)


def row_of(result, name):
    (found,) = [row for row in result["rows"] if row["name"] == name]
    return found


def test_a_student_that_is_a_solver_reads_the_same_distances(tmp_path):
    students = "four,four@2,one-0"
    result = run(tmp_path, students=students, solvers="ddim,unipc-2", evaluations=(4, 2))
    names = ["four", "four@2", "one-0", "ddim 2", "ddim 4", "unipc-2 4"]
    assert [row["name"] for row in result["rows"]] == names and result["baseline"] == "ddim 4"
    for student, solver in (("four", "ddim 4"), ("four@2", "ddim 2")):
        ours, theirs = row_of(result, student), row_of(result, solver)
        assert ours["real"] == theirs["real"] and ours["fine"] == theirs["fine"]
        assert (ours["evaluations"], ours["parameters"]) == (theirs["evaluations"], theirs["parameters"])
    none = row_of(result, "four")["real"]["difference"]
    assert none["value"] == 0 and none["interval"] == [0, 0]
    assert row_of(result, "ddim 2")["real"]["difference"]["value"] != 0
    assert (
        row_of(result, "four")["cost"] == {"forward": 100, "backward": 34} and row_of(result, "four")["method"] == "progressive"
    )
    assert row_of(result, "one-0")["cost"] == {"forward": 110, "backward": 54}
    assert row_of(result, "ddim 4")["cost"] == {"forward": 0, "backward": 0}
    pairs = {(pair["row"], pair["less"]): pair for pair in result["differences"]}
    assert len(pairs) == len(names) * (len(names) - 1) // 2
    assert pairs["ddim 4", "four"]["frechet"] == {"value": 0, "interval": [0, 0]}
    apart = pairs["ddim 4", "ddim 2"]["at_infinity"]["value"]
    limits = [row_of(result, name)["real"]["at_infinity"]["value"] for name in ("ddim 4", "ddim 2")]
    assert apart == limits[0] - limits[1]


def test_rows_of_many_evaluations_may_have_fewer_images(tmp_path):
    """Each length is what a comparison of that many images finds, and differences are of as many as both rows have."""
    options, num = {"students": "four", "solvers": "ddim", "evaluations": (4, 9)}, SMALL["num"]
    few, all_ = run(tmp_path, **options), run(tmp_path, **options, num=2 * num)
    mixed = run(tmp_path, **options, num=2 * num, num_long=num)
    assert [row["num"] for row in mixed["rows"]] == [2 * num, 2 * num, num]
    assert [(floor["num"], floor["half"]) for floor in mixed["floors"]] == [(2 * num, num), (num, num // 2)]
    for name, alone in (("four", all_), ("ddim 4", all_), ("ddim 9", few)):
        for part in ("real", "fine"):
            ours, theirs = (dict(row_of(result, name)[part]) for result in (mixed, alone))
            ours.pop("difference", None), theirs.pop("difference", None)
            assert ours == theirs
    # The baseline is the longest run, which has fewer images.
    assert mixed["baseline"] == "ddim 9"
    assert row_of(mixed, "four")["real"]["difference"] == row_of(few, "four")["real"]["difference"]
    found, wanted = ({(d["row"], d["less"]): d for d in result["differences"]} for result in (mixed, few))
    assert found["ddim 9", "four"] == wanted["ddim 9", "four"]
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "x floor at half of N" in page and f"where N is {num})" in page


def test_files_of_a_comparison(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/pictures-04.png").write_bytes(b"of an earlier, larger comparison")
    (tmp_path / "out/pictures-mine.png").write_bytes(b"of the user")
    result = run(tmp_path, students="four,one-0", solvers="ddim", evaluations=(2,))
    pictures = sorted(path.name for path in (tmp_path / "out").glob("pictures-*"))
    assert pictures == ["pictures-01.png", "pictures-02.png", "pictures-03.png", "pictures-mine.png"]
    files = [path for path in (tmp_path / "out").iterdir() if path.name != "comparison.json"]
    assert max(path.stat().st_mtime_ns for path in files) <= (tmp_path / "out/comparison.json").stat().st_mtime_ns
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


def test_sets_begin_at_one_start_noise(tmp_path, monkeypatch):
    """A one-pass student draws from projections of the noise that the teacher's runs begin at, in the sets' order."""
    pictures = {}
    monkeypatch.setattr(compare, "write_pages", lambda result, images, out: pictures.update(images))
    run(tmp_path, students="four,one-0", solvers="ddim", evaluations=(4,))
    teacher, student = Teacher.from_pretrained("teacher"), Student.from_pretrained("one-0")
    with torch.no_grad():
        drawn = student(student.project(teacher.noise(PICTURES, SMALL["seed"])))
    expected = ((drawn.clamp(-1, 1) + 1) * 127.5).round()
    # One step of eight bits, where another arithmetic rounds a value in the middle to the other side.
    assert (pictures["one-0"].float() - expected).abs().max() <= 1
    assert torch.equal(pictures["four"], pictures["ddim 4"])


def setting_of(classes="", guidance=0.0, teacher="free"):
    return Setting(Teacher.from_pretrained(teacher), 3, 140, 20, classes, guidance)


@pytest.mark.parametrize(("name", "passes"), [("free", 2), ("weighted", 1)])
def test_conditional_students_are_told_classes_and_weight(name, passes):
    """Image i takes class i mod 3, in the second batch, too; guidance by two evaluations counts them."""
    (row,) = student_rows(name, setting_of("all", 1.5), "cpu")
    (sampler,), student = row.samplers, DenoiserStudent.from_pretrained(name)
    labels = torch.arange(20, 26) % 3
    drawn = sampler.kept.draw(6, 20)
    assert torch.equal(drawn, student.sample(6, 3, None, 20, labels=labels, guidance=1.5))
    for other in (student.sample(6, 3, None, 20, labels=labels), student.sample(6, 3, None, 20)):
        assert not torch.equal(drawn, other)
    assert torch.equal(sampler.sample(3), student.sample(3, 3, labels=torch.arange(3), guidance=1.5))
    assert (sampler.classes, sampler.guidance, sampler.evaluations) == (("a", "b", "c"), 1.5, 4 * passes)
    ((alone,),) = (row.samplers for row in student_rows(name, setting_of(), "cpu"))
    assert torch.equal(alone.kept.draw(6, 20), student.sample(6, 3, None, 20))
    assert (alone.classes, alone.guidance, alone.evaluations) == ((), 0.0, 4)
    assert len(alone.kept.depends) == 4 and sampler.kept.depends[:4] == alone.kept.depends
    assert sampler.kept.depends[4:] == [{"classes": [0, 1, 2], "guidance": 1.5}]


@pytest.mark.parametrize(("classes", "labels"), [("", [0, 1, 2]), ("all", [0, 1, 2]), ("c,a,c", [2, 0, 2])])
def test_conditional_students_of_one_pass_take_classes_in_turn(classes, labels):
    """Every class, where none is named; image i takes class i mod K, in the second batch, too."""
    ((sampler,),) = (row.samplers for row in student_rows("one-told", setting_of(classes), "cpu"))
    student = Student.from_pretrained("one-told")
    told = torch.tensor([labels[i % 3] for i in range(20, 26)])
    with torch.no_grad():
        expected = student(student.project(Teacher.from_pretrained("free").noise(6, 3, 20)), labels=told)
    assert torch.allclose(sampler.kept.draw(6, 20), expected, atol=1e-5)
    assert torch.equal(sampler.sample(4), student.fuse(tune=False).sample(4, 3, 4, labels=labels))
    assert (sampler.classes, sampler.guidance) == (tuple("abc"[label] for label in labels), None)
    assert sampler.kept.depends[4:] == [labels]


def test_solvers_of_a_conditional_teacher_are_told_classes():
    setting, solver = setting_of("c,a", 1.5), Solver("ddim", "trailing")
    (row,), (left_out,) = solver_rows([solver], (1, 8), setting)
    (sampler,) = row.samplers
    assert (row.name, sampler.evaluations, sampler.classes) == ("ddim 8", 8, ("c", "a")) and "ddim with 1" in left_out
    told = setting.teacher.sample(5, 3, solver, 4, 7, labels=[0, 2, 0, 2, 0], guidance=1.5)
    assert torch.equal(sampler.kept.draw(5, 7), told)
    # An unconditional teacher draws as without classes, under the name that its shards have had.
    plain, unconditional = (solver_rows([solver], (4,), setting_of(*told, teacher="teacher")) for told in ((), ("all", 1.5)))
    assert plain[0][0].samplers[0].kept.depends == unconditional[0][0].samplers[0].kept.depends
    assert len(plain[0][0].samplers[0].kept.depends) == 5 and unconditional[0][0].samplers[0].classes is None


def test_a_comparison_of_conditional_models(tmp_path):
    classes = {"classes": "all", "guidance": 1.5}
    result = run(tmp_path, teacher="free", students="free,weighted,one-told,four", solvers="ddim", evaluations=(8,), **classes)
    assert row_of(result, "free")["real"] == row_of(result, "ddim 8")["real"]
    assert [row.get("known_unseen", "a solver") for row in result["rows"]] == [None, None, None, True, "a solver"]
    unknown = "trained on the sets' start noise: free, weighted, one-told."
    assert unknown in (tmp_path / "out/comparison.md").read_text()
    told = {row["name"]: (row["classes"], row["guidance"], row["evaluations"]) for row in result["rows"]}
    names = ("a", "b", "c")
    assert told == {
        "free": (names, 1.5, 8),
        "weighted": (names, 1.5, 4),
        "one-told": (names, None, 1),
        "four": (None, None, 4),
        "ddim 8": (names, 1.5, 8),
    }
    said = "Rows drawn with classes in turn, a, b, c, and weight 1.5 of guidance: free, weighted, ddim 8. "
    said += "Rows drawn with classes in turn, a, b, c, and guidance distilled in: one-told. All other rows"
    assert all(said in (tmp_path / "out" / f"comparison.{kind}").read_text() for kind in ("html", "md"))


def test_trainings_of_a_row(tmp_path):
    each = ["one-0", "one-1", "one-2"]
    joined = "+".join(each)
    result = run(tmp_path, students=",".join([joined, *each]))
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


def test_a_training_that_is_named_like_a_solver(models, tmp_path):
    shutil.copytree(models / "one-1", models / "ddim 4")
    result = run(tmp_path, students="one-0+ddim 4,one-1", solvers="ddim", evaluations=(4,))
    one = row_of(result, "one-0+ddim 4")["trainings"][1]
    assert one["real"]["value"] == row_of(result, "one-1")["real"]["frechet"]["value"]
    assert row_of(result, "ddim 4")["real"]["frechet"]["value"] != one["real"]["value"]


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


def test_a_killed_comparison_draws_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_sets, "SHARD", 40)
    monkeypatch.setattr(compare, "_times", lambda rows, device: {row.name: {"median": 1, "p20": 1, "p80": 1} for row in rows})
    options = {"students": "four,other,one-0", "solvers": "ddim", "evaluations": (4,)}
    drawn, eight_bit, dies_after = [], kept_sets.eight_bit, 20

    def counted(images):
        drawn.append(len(images))
        if len(drawn) == dies_after:
            raise KeyboardInterrupt
        return eight_bit(images)

    monkeypatch.setattr(kept_sets, "eight_bit", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **options)
    first, dies_after = len(drawn), None
    result = run(tmp_path, **options)
    # A set of 140 is seven batches of 20 in three shards of 40 and one of 20; the twentieth batch was the last of a shard's two
    # (the sixth of the third set), so that its shard is drawn again whole.
    assert first == 20 and len(drawn) - first == 5 * 7 - 18
    again = len(drawn)
    measured = []
    monkeypatch.setattr("advkd.evaluation.yardstick.resampled_frechet", lambda *rows: measured.append(rows))
    monkeypatch.setattr(ClassifierFeatures, "forward", lambda *arguments: measured.append(arguments))
    kept = run(tmp_path, **options)
    assert len(drawn) == again and not measured and kept["rows"] == result["rows"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to compare"),
        ({"students": "nowhere/at/all"}, "nowhere/at/all"),
        ({"students": "four,four"}, "students: 'four' is there twice"),
        ({"students": "four,"}, "students: a name is empty"),
        ({"students": "four+four"}, "'four' is there twice"),
        ({"students": "one-0 + one-0"}, "students: one-0+one-0: 'one-0' is there twice"),
        ({"students": "four+ "}, "students: four+: a name is empty"),
        ({"students": "one-0+one-1,one-0 + one-1"}, "students: 'one-0+one-1' is there twice"),
        ({"students": "one-0+./one-0"}, "students: ./one-0 and one-0 are one training"),
        ({"students": "four+four@4"}, "students: four@4 and four are one training"),
        ({"students": "four+four@2"}, "trainings of one row must be alike, but evaluations of four@2 is 2"),
        ({"students": "one-0@2"}, "draws in one pass"),
        ({"students": "four@0"}, "four@0 asks for 0 evaluations"),
        ({"students": "one-0@-1"}, "one-0@-1 asks for -1 evaluations"),
        ({"students": "four@101"}, "four by ddim cannot take 101 evaluations exactly: ask for 98 or 99 or 100"),
        ({"students": "free@5", "classes": "a", "guidance": 1.0}, "cannot take 5 evaluations exactly: ask for 2 or 4 or 6"),
        ({"solvers": "ddim,ddim"}, "solvers: 'ddim' is there twice"),
        ({"solvers": "ddim,rk4"}, "solver must be one of"),
        ({"solvers": "unipc-3", "evaluations": (2,)}, "no row is left"),
        ({"students": "four", "baseline": "five"}, "--baseline must be a row, one of four; got 'five'"),
        ({"students": "four", "num": 100}, "--num 100: 100 images are too few for 64 features"),
        ({"students": "four", "resamples": 5}, "resamples must be at least 20"),
        ({"students": "four", "num_long": 141}, "num_long must be 0, or at least 4 and at most num, 140, got 141"),
        ({"students": "four", "num_long": 100}, "--num-long 100: 100 images are too few for 64 features"),
        ({"students": "four", "evaluations": (0,)}, "evaluations must be at least 1, got 0"),
        ({"students": "four", "evaluations": (2, 2.5)}, "evaluations must be a whole number, got 2.5"),
        ({"students": "four", "evaluations": ()}, "evaluations must name a number at least"),
        ({"students": "four", "spacing": "even"}, "spacing must be one of"),
        ({"students": "four", "spacing": "trailing"}, "spacing places the levels of solvers: name some by --solvers"),
        ({"students": "four", "seed": 2**64 - 1}, "seed must be in"),
        ({"students": "digits", "seed": 0}, "was trained on the sets' start noise, seed 0"),
        ({"students": "told"}, "students: told has no null class: name its classes by --classes"),
        ({"teacher": "told", "students": "four"}, "teacher told has no null class: name its classes by --classes"),
        ({"students": "free", "guidance": 1.0}, "guidance needs classes"),
        ({"students": "free", "classes": "a", "guidance": -1.0}, "guidance must be at least 0"),
        ({"students": "free", "classes": "a,z"}, "students: free cannot be told these classes (--classes: 'z' is not one of"),
        ({"students": "weighted", "classes": "a", "guidance": 5.0}, "guidance must be at most 4"),
        ({"students": "told", "classes": "all", "guidance": 1.0}, "has no null class: take guidance 0"),
        ({"students": "four", "classes": "all"}, "the teacher and all students are unconditional"),
        ({"students": "told,free", "classes": "all"}, "classes: free draws a,b,c, told 0,1,2: name some that both have"),
        (
            {"students": "one-told", "classes": "z"},
            "students: one-told cannot be told these classes (--classes: 'z' is not one",
        ),
        ({"students": "one-told,one-ca"}, "classes: one-ca draws c,a, one-told a,b,c: name some that both have"),
        (
            {"teacher": "free", "students": "one-ca", "classes": "all"},
            "classes: one-ca draws c,a, teacher free a,b,c: name some that both have",
        ),
        ({"students": "small"}, "draws gray 8x8 images, the teacher gray 32x32 ones"),
    ],
)
def test_bad_comparisons_are_refused_before_work(values, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        run(tmp_path, **values)
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_what_a_solver_cannot_take_is_left_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(compare, "_features", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, solvers="ddim,unipc-2", evaluations=(1, 2, 4))
    said = [line.getMessage().removeprefix("left out: ").partition(" evaluations")[0] for line in caplog.records]
    assert said == ["unipc-2 with 1", "unipc-2 with 2"]


@pytest.mark.parametrize(
    ("solver", "taken", "refused", "near"),
    [
        (Solver("heun", "trailing"), {3: 2, 199: 100}, 4, "3 or 5 or 7 or 9"),
        (Solver("ddim", alpha_bars=(0.1, 0.3, 0.6, 0.9)), {1: 1, 2: 2, 4: 4}, 3, "1 or 2 or 4"),
    ],
)
def test_evaluations_asked_for_are_exact(solver, taken, refused, near, tmp_path):
    student = DenoiserStudent(DenoiserStudent.from_pretrained("four").model, Sampler(solver, 4))
    student.save_pretrained(tmp_path / "one")
    setting = setting_of(teacher="teacher")
    for evaluations, steps in taken.items():
        (row,) = student_rows(f"{tmp_path}/one@{evaluations}", setting, "cpu")
        assert row.samplers[0].evaluations == evaluations and row.samplers[0].kept.depends[1] == steps
    with pytest.raises(InputError, match=f"cannot take {refused} evaluations exactly: ask for {near}$"):
        student_rows(f"{tmp_path}/one@{refused}", setting, "cpu")


def test_names_of_students():
    assert parse_students("a/4, b@2 ,c+d@1") == {"a/4": [("a/4", None)], "b@2": [("b", 2)], "c+d@1": [("c", None), ("d", 1)]}
    assert parse_students("a + b@2 , c") == {"a+b@2": [("a", None), ("b", 2)], "c": [("c", None)]}
    assert parse_students("me@home/4") == {"me@home/4": [("me@home/4", None)]} and parse_students("") == {}


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
    assert total_cost(record) == (cost and dict(zip(("forward", "backward"), cost)))


def test_the_command(models, tmp_path):
    options = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = ["compare", "--teacher", models / "teacher", "--solvers", "ddim,heun", "--evaluations", "2,4", *options]
    command += ["--spacing", "trailing"]
    done = fork_cli(*command, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    titles, *lines = done.stdout.splitlines()
    assert titles.startswith("row ") and "less ddim 4" in titles
    assert sorted(line.split("  ")[0] for line in lines) == ["ddim 2", "ddim 4", "heun 3"]
    assert "left out: heun with 2 evaluations" in done.stderr
    done = fork_cli(*command, "--baseline", "ddim 3", "--out", tmp_path / "other")
    assert done.returncode == 2 and done.stderr.count("\n") == 2 and "--baseline must be a row" in done.stderr
    assert not (tmp_path / "other").exists()


def test_kept_images_of_students_without_classes_keep_their_name(tmp_path):
    """The name that they had before students had classes."""
    student = tiny_student()
    student.save_pretrained(tmp_path / "student")
    shape = {"image_size": 8, "image_channels": 1, "channels": [8, 8, 8, 8], "latent_size": 2, "detail_noise": False}
    depends = [digest(student.state_dict()), {**shape, "slope": 0.2}, 7, 5]
    (row,) = student_rows(str(tmp_path / "student"), Setting(tiny_teacher(), seed=7, num=4, batch_size=5), "cpu")
    assert row.samplers[0].kept.name == kept_sets.KeptSet("students", depends, 4, (1, 8, 8), 5, None).name
