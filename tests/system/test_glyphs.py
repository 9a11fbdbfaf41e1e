"""The data set of glyphs: what an image depends on, its ranges, its sharpness, its cache, and the commands that name it."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from advkd.data import glyph_sets, glyphs, kept_sets
from advkd.data.glyph_sets import GlyphSet, held_out_glyphs, trained_glyphs
from advkd.data.glyphs import CLASSES, FONTS, HELD_OUT, HELD_OUT_FONTS, TRAINED, draw_glyphs, glyph_labels, versions
from advkd.data.images import load_images, load_labelled
from advkd.data.pictures import save_image, to_pil
from advkd.errors import InputError
from advkd.evaluation.compare import CompareConfig, compare_models
from advkd.evaluation.evaluate import EvaluationConfig, evaluate_folders, evaluate_student
from advkd.evaluation.evaluate_likelihood import LikelihoodConfig, evaluate_likelihood
from advkd.evaluation.image_sets import read_images, real_images
from advkd.evaluation.solver_quality import SolverEvaluationConfig, evaluate_solvers
from advkd.methods.classification import ClassifierTrainingConfig
from advkd.methods.denoising import TeacherTrainingConfig
from advkd.models.student import Student
from advkd.runtime.files import digest
from advkd.training.classifier import train_classifier
from advkd.training.teacher import train_teacher

from ..conftest import TINY_STUDENT, tiny_unet
from .test_cli import refused, run

THUMBNAILS = Path(__file__).parents[1] / "data" / "glyphs.json"
"""The first 16 images of 32x32 at 8x8, as one version of FreeType draws them."""


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of this test alone, into which sets of 20 images are put already, in shards of 20."""
    monkeypatch.setenv("ADVKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(glyph_sets, "FEW", 20)
    monkeypatch.setattr(kept_sets, "SHARD", 20)
    return tmp_path / "cache"


@pytest.fixture
def drawn(monkeypatch):
    """Numbers of the images that are drawn for data sets."""
    numbers = []

    def counted(indices, *arguments):
        numbers.extend(indices)
        return draw_glyphs(indices, *arguments)

    monkeypatch.setattr(glyph_sets, "draw_glyphs", counted)
    return numbers


def test_an_image_is_a_function_of_seed_and_index():
    """Whatever the batch, the order, and the threads that draw beside each other."""
    images, labels = draw_glyphs(range(24))
    order = [23, 0, 7, 7, 11]
    again, others = draw_glyphs(order)
    assert torch.equal(again, images[order]) and torch.equal(others, labels[order])
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda index: draw_glyphs([index])[0], range(24)))
    assert torch.equal(torch.cat(alone), images)
    assert not torch.equal(draw_glyphs(range(24), seed=1)[0], images)
    assert len({image.numpy().tobytes() for image in images}) == 24


def test_one_scene_at_two_sizes():
    """Below 128 all sizes are means of one canvas.

    A product of means is no mean of products: the covariance of two coverages in [0, 1], at most 1/4, is weighted by the
    shadow's 0.35. A background moves less than 2 levels within a pixel of 64, and each image is rounded once.
    """
    small, large = (draw_glyphs(range(32), size)[0].double() for size in (32, 64))
    difference = (avg_pool2d(large, 2) - small).abs()
    assert difference.max() <= 255 * 0.35 / 4 + 2 + 1
    assert difference.mean() < 0.5
    others = (avg_pool2d(large, 2).roll(1, dims=0) - small).abs()
    assert others.mean() > 20


def test_sizes_with_other_canvases_show_the_same_scene():
    small, large = (draw_glyphs(range(8), size)[0].double() for size in (32, 256))
    # Outlines are hinted to the pixels of their canvas and may lie one of 128 elsewhere: a quarter of a pixel of 32, along
    # strokes whose edges cover less than a fifth of the image.
    assert (avg_pool2d(large, 8) - small).abs().mean() < 255 * 0.25 * 0.2


@pytest.mark.parametrize("classes", CLASSES)
def test_labels_are_uniform(classes):
    labels, count = glyph_labels(range(10**5), classes), len(CLASSES[classes])
    expected = len(labels) / count
    statistic = ((labels.bincount(minlength=count) - expected) ** 2 / expected).sum()
    # Chi-squared of count - 1 degrees of freedom has that mean and variance 2 (count - 1).
    freedom = count - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5
    assert torch.equal(labels[:9], draw_glyphs(range(9), 8, classes)[1])


def test_classes_are_places_in_one_list():
    assert CLASSES["all"] == CLASSES["letters"] + CLASSES["digits"] and len(set(CLASSES["all"])) == 51
    offset = len(CLASSES["letters"])
    digits, labels = draw_glyphs(range(10), classes="digits", labels=range(10))
    same, _ = draw_glyphs(range(10), classes="all", labels=range(offset, offset + 10))
    assert torch.equal(digits, same) and labels.tolist() == list(range(10))
    assert GlyphSet("digits").class_names == list("0123456789")


def test_nothing_held_out_is_trained_on():
    longest, reference = trained_glyphs("glyphs", num=HELD_OUT), held_out_glyphs("glyphs")
    assert longest.first + longest.num == reference.first and reference.num == 10_000
    with pytest.raises(InputError, match="images must be at least 0 and below"):
        trained_glyphs("glyphs", num=HELD_OUT + 1)
    first = {image.numpy().tobytes() for image in draw_glyphs(range(64), 8)[0]}
    assert first.isdisjoint(image.numpy().tobytes() for image in real_images("glyphs", (3, 8, 8), num=64))


def test_held_out_fonts_are_other_files():
    assert not set(FONTS) & set(HELD_OUT_FONTS)
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    contents = [(folder / f"{name}.ttf").read_bytes() for name in (*FONTS, *HELD_OUT_FONTS)]
    assert len(set(contents)) == len(FONTS) + len(HELD_OUT_FONTS)
    images, labels = draw_glyphs(range(16), fonts=HELD_OUT_FONTS)
    usual, same = draw_glyphs(range(16))
    assert torch.equal(labels, same) and all(not torch.equal(a, b) for a, b in zip(images, usual))


def thumbnails(**options):
    return avg_pool2d(draw_glyphs(range(16), **options)[0].double(), 4)


def test_other_versions_draw_alike():
    """Another FreeType may hint an outline one pixel of the canvas of 128 further.

    That is a sixteenth of a thumbnail's pixel for each of the two edges of a stroke, of up to 255 levels.
    """
    record = json.loads(THUMBNAILS.read_text())
    stored = torch.tensor(record["thumbnails"], dtype=torch.float64).reshape(16, 3, 8, 8)
    bound = 2 * 255 / 16
    assert (thumbnails() - stored).abs().max() <= bound
    for other in (thumbnails(fonts=FONTS[1:]), thumbnails(seed=1), thumbnails(labels=[0] * 16)):
        assert (other - stored).abs().max() > bound


def test_pixels_stay_what_they_are():
    """Trained models and kept images are of these pixels: with the versions of the stored digest it is the same."""
    stored, now = json.loads(THUMBNAILS.read_text())["versions"], versions()
    if any(stored[name] != now[name] for name in ("matplotlib", "pillow", "freetype")):
        pytest.skip("the stored digest is of other versions")
    assert now == stored


def steepest(images):
    """Largest step between neighbours in units of an image's contrast."""
    gray = images.double().mean(1)
    steps = [gray.diff(dim=dim).abs().amax((1, 2)) for dim in (1, 2)]
    return torch.maximum(*steps) / (gray.amax((1, 2)) - gray.amin((1, 2)))


def test_edges_are_sharp():
    """Most of an edge's contrast lies between two neighbours: the canvas is at least twice as fine as the image."""
    assert steepest(draw_glyphs(range(12), 256)[0]).min() > 0.6
    enlarged = interpolate(draw_glyphs(range(12), 64)[0].double(), scale_factor=4, mode="bicubic")
    assert steepest(enlarged).max() < 0.6


def test_data_sets_by_name(own_cache):
    wanted, labels = draw_glyphs(range(6), 8)
    assert torch.equal(load_images("glyphs", 8, num=6), wanted)
    images, found, names = load_labelled("glyphs", 8, num=6)
    assert torch.equal(images, wanted) and torch.equal(found, labels) and names == list(CLASSES["all"])
    digits, found, names = load_labelled("glyphs-digits", 8, num=6)
    assert torch.equal(digits, load_images("glyphs", 8, classes="digits", num=6)) and names == list("0123456789")
    assert torch.equal(found, draw_glyphs(range(6), 8, "digits")[1])
    assert [trained_glyphs(name).name for name in glyph_sets.NAMES] == list(glyph_sets.NAMES)
    assert trained_glyphs("glyphs").num == TRAINED == 32768 and trained_glyphs("./glyphs") is None


def test_the_held_out_reference_has_any_number(own_cache):
    images = real_images("glyphs-letters", (3, 8, 8), num=7)
    assert torch.equal(images, draw_glyphs(range(HELD_OUT, HELD_OUT + 7), 8, "letters")[0])
    assert torch.equal(real_images("glyphs-letters", (3, 8, 8), num=3), images[:3])


def test_a_killed_rendering_draws_what_is_missing(own_cache, drawn):
    glyph_set = GlyphSet(num=50)
    (done,) = [kept_sets.KeptSet("glyphs", [8, "all", 0, versions()], 50, (3, 8, 8), 50, lambda *_: None).name]
    wanted = draw_glyphs(range(50), 8)[0]
    assert torch.equal(glyph_set.images(8), wanted) and drawn == list(range(50))
    files = sorted((own_cache / done).iterdir())
    assert [path.name for path in files] == [f"images-{n}.safetensors" for n in ("0000000-020", "0000020-020", "0000040-010")]
    files[1].unlink()
    del drawn[:]
    assert torch.equal(glyph_set.images(8), wanted) and drawn == list(range(20, 40))
    del drawn[:]
    assert torch.equal(GlyphSet(num=60).images(8)[:50], wanted) and drawn == list(range(40, 60))
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    with pytest.raises(InputError, match="0000000-020.safetensors is altered: delete it, and it is drawn again"):
        glyph_set.images(8)


@pytest.mark.parametrize(("name", "value"), [("FEW", 51), ("LARGEST_KEPT", 50 * 3 * 8 * 8 - 1)])
def test_few_images_and_too_large_sets_are_not_kept(own_cache, drawn, monkeypatch, name, value):
    monkeypatch.setattr(glyph_sets, name, value)
    for _ in range(2):
        assert torch.equal(GlyphSet(num=50).images(8), draw_glyphs(range(50), 8)[0])
    assert len(drawn) == 100 and not own_cache.exists()


def test_kept_images_are_of_one_version(own_cache, drawn, monkeypatch):
    GlyphSet(num=20).images(8)
    monkeypatch.setattr(glyph_sets, "versions", lambda: {**versions(), "pillow": "0"})
    GlyphSet(num=20).images(8)
    assert len(drawn) == 40 and len(list(own_cache.iterdir())) == 2
    for other in (GlyphSet("letters", 20), GlyphSet(num=20, first=20)):
        other.images(8)
    assert len(drawn) == 80 and len(list(own_cache.iterdir())) == 4


TEACHER = ("teacher", "train", "--data", "glyphs", "--size", 8, "--classes", "digits", "--conditional", "--channels", "8,8")


def test_a_teacher_and_its_data(tmp_path, capsys):
    """Trained, recorded, refused as another's folder, given noise power, distilled, and measured."""
    arguments = (*TEACHER, "--steps", 2, "--batch-size", 4, "--images", 12, "--out", tmp_path / "teacher")
    assert run(capsys, *arguments)[0] == 0
    record = json.loads((tmp_path / "teacher" / "data.json").read_text())
    assert record == {"data": "glyphs", "classes": "digits", "first": 0, "images": 12, "versions": versions()}
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "data.json").write_text("{}")
    assert "holds a teacher already" in refused(capsys, *arguments[:-1], tmp_path / "kept")

    named = ("--teacher", tmp_path / "teacher", "--data")
    power = ("teacher", "noise-power", *named, "glyphs-digits", "--num", 3)
    assert run(capsys, *power)[0] == 0 and (tmp_path / "teacher" / "noise_power.json").exists()
    said = refused(capsys, "distill", "reparametrize", *named, "glyphs", "--out", tmp_path / "v")
    assert "--data glyphs has classes A, B" in said and "the student knows 0, 1" in said
    assert said.endswith("9: name glyphs-digits")


def test_a_method_learns_from_glyphs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(glyph_sets, "TRAINED", 12)
    teacher = TeacherTrainingConfig("glyphs", 8, "digits", steps=1, channels=(8, 8), batch_size=4, conditional=True)
    train_teacher(teacher, tmp_path / "teacher", progress=False)
    named = ("--teacher", tmp_path / "teacher", "--data", "glyphs-digits", "--updates", 1, "--batch-size", 4)
    assert run(capsys, "distill", "reparametrize", *named, "--out", tmp_path / "v")[0] == 0
    assert (tmp_path / "v" / "model_index.json").exists()


def test_a_classifier_and_its_data(tmp_path):
    config = ClassifierTrainingConfig("glyphs", 8, "letters", 60, num_features=4, steps=2, batch_size=8)
    train_classifier(config, tmp_path / "features", progress=False)
    record = json.loads((tmp_path / "features" / "training.json").read_text())
    assert record["data"] == {**GlyphSet("letters", 60).description()} and record["classes"] == list(CLASSES["letters"])
    assert json.loads((tmp_path / "features" / "config.json").read_text())["name"] == "glyphs-letters"


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """An extractor of a few features of glyphs of 8x8."""
    out = tmp_path_factory.mktemp("features") / "features"
    config = ClassifierTrainingConfig("glyphs", 8, "digits", 60, num_features=4, steps=2, batch_size=8)
    train_classifier(config, out, progress=False)
    return str(out)


def test_a_folder_against_glyphs(features, tmp_path, capsys):
    images = draw_glyphs(range(30), 8, "digits")[0]
    for i, image in enumerate(to_pil(images.permute(0, 2, 3, 1))):
        save_image(image, tmp_path / "mine" / f"{i}.png")
    config = EvaluationConfig(extractor=features, real_num=64, resamples=20)
    result = evaluate_folders(tmp_path / "mine", "glyphs-digits", config)
    assert [row["samples"] for row in result["rows"]] == [[30, 30], [30, 30]]
    said = refused(capsys, "evaluate", "--images", "glyphs", "--reference", tmp_path / "mine", "--extractor", features)
    assert "glyphs have the size of what they are compared with: name them by --reference" in said


@pytest.fixture(scope="module")
def colour_teacher(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("colour")
    diffusers.DDPMPipeline(tiny_unet(3), diffusers.DDPMScheduler(num_train_timesteps=60)).save_pretrained(folder)
    return folder


def test_a_student_against_glyphs(features, colour_teacher, tmp_path, monkeypatch):
    Student(replace(TINY_STUDENT, image_channels=3)).save_pretrained(tmp_path / "student")
    seen = []
    monkeypatch.setattr("advkd.evaluation.evaluate.real_images", lambda *a, **o: seen.append(real_images(*a, **o)) or seen[-1])
    config = EvaluationConfig(num=24, extractor=features, real="glyphs", real_num=50, resamples=20)
    result = evaluate_student(tmp_path / "student", colour_teacher, config, tmp_path / "out", progress=False)
    assert {row["samples"][0] for row in result["rows"] if row["against"] == "real"} == {24}
    assert torch.equal(seen[0], draw_glyphs(range(HELD_OUT, HELD_OUT + 50), 8)[0])


def test_solvers_against_glyphs(features, colour_teacher, tmp_path):
    common = {"solvers": "ddim", "evaluations": (2, 3), "num": 24, "fine_steps": 3, "extractor": features, "resamples": 20}
    common |= {"real": "glyphs-digits", "real_num": 30}
    wanted = digest({"images": draw_glyphs(range(HELD_OUT, HELD_OUT + 30), 8, "digits")[0]})
    for measure, kind in ((evaluate_solvers, SolverEvaluationConfig), (compare_models, CompareConfig)):
        out, cache = tmp_path / kind.__name__, tmp_path / "cache"
        result = measure(colour_teacher, kind(**common), out, cache=cache, progress=False)
        assert result["real_sha256"] == wanted and len(result["rows"]) == 2


def test_the_likelihood_of_more_glyphs_goes_on(colour_teacher, tmp_path):
    few, many = (
        evaluate_likelihood(colour_teacher, "glyphs", LikelihoodConfig(num, 4), tmp_path / str(out), progress=False)
        for num, out in ((4, 0), (40, 1))
    )
    kept = evaluate_likelihood(colour_teacher, "glyphs", LikelihoodConfig(40, 4), tmp_path / "0", progress=False)
    assert kept["likelihood"] == many["likelihood"] != few["likelihood"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": [-1]}, "indices must be at least 0"),
        ({"indices": range(-1, 2)}, "indices must be at least 0"),
        ({"indices": range(2**62 - 1, 2**62 + 1)}, "indices must be at least 0 and below"),
        ({"indices": [0.5]}, "indices must be a whole number"),
        ({"size": 24}, "size of glyphs must be 4 * 2^k from 8 to 512, got 24"),
        ({"size": 1024}, "size of glyphs must be 4 * 2^k from 8 to 512, got 1024"),
        ({"size": 4}, "size of glyphs must be"),
        ({"classes": "runes"}, "classes of glyphs must be one of digits, letters, all, got 'runes'"),
        ({"seed": -1}, "seed must be"),
        ({"fonts": ()}, "fonts must be some of DejaVuSans"),
        ({"fonts": "DejaVuSans"}, "fonts must be some of DejaVuSans"),
        ({"fonts": ("Arial",)}, "fonts must be some of DejaVuSans"),
        ({"labels": [51]}, "labels must be at least 0 and below 51"),
        ({"labels": [-1]}, "labels must be at least 0"),
        ({"classes": ["all"]}, "classes of glyphs must be one of digits, letters, all, got ['all']"),
        ({"fonts": 5}, "fonts must be some of DejaVuSans"),
        ({"labels": 5}, "labels must be a sequence of whole numbers, got 5"),
        ({"indices": 3}, "indices must be a sequence of whole numbers, got 3"),
        ({"labels": [0, 1]}, "labels must be one of each image: there are 1 images and 2 labels"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InputError) as refusal:
        draw_glyphs(**{"indices": range(1), **options})
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runes", 3), "classes of glyphs must be one of digits, letters, all, got 'runes'"),
        ((["all"], 3), "classes of glyphs must be one of"),
        (("all", -1), "num must be at least 0"),
        (("all", 1, -1), "first must be at least 0"),
        (("all", 2, 2**62 - 1), "num must be at least 0 and below 2"),
        (("letters", 3, 0, ("7",)), "chosen must be some of A, B"),
        (("letters", 3, 0, 7), "chosen must be some of A, B"),
    ],
)
def test_bad_sets(arguments, message):
    with pytest.raises(InputError) as refusal:
        GlyphSet(*arguments)
    assert message in str(refusal.value)


def test_a_set_that_does_not_fit_the_memory():
    remedy = r"need .* GiB of memory: lower their number \(--images, --real-num or --num\) or their --size"
    with pytest.raises(InputError, match=remedy):
        GlyphSet(num=2**41).images(512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "glyphs", "--classes", "runes"), "classes of glyphs must be one of digits, letters, all, got 'runes'"),
        (("--data", "glyphs", "--size", 24), "size must be 4 * 2^k"),
        (("--data", "glyphs", "--size", 1024), "size of glyphs must be 4 * 2^k from 8 to 512, got 1024"),
        (("--data", "digits", "--classes", "all"), "classes are of --data glyphs, not of digits: leave --classes out"),
        (("--data", "glyphs-digits", "--classes", "all"), "classes are of --data glyphs, not of glyphs-digits"),
        (("--data", "digits", "--images", 10), "images is a number of glyphs, and --data digits has its own"),
        (("--data", "glyphs", "--images", -1), "images must be at least 0"),
    ],
)
@pytest.mark.parametrize("command", [("teacher", "train"), ("classifier", "train")])
def test_commands_refuse_before_they_begin(command, arguments, message, capsys, tmp_path):
    assert message in refused(capsys, *command, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gray_glyphs_and_numbers_of_other_data(capsys, tmp_path, teacher_folder):
    gray = ("teacher", "train", "--data", "glyphs", "--image-channels", 1, "--out", tmp_path / "out")
    assert "glyphs are in colour: channels must be 3, got 1" in refused(capsys, *gray)
    likelihood = ("evaluate", "--likelihood", "--teacher", teacher_folder, "--images", "glyphs", "--out", tmp_path / "out")
    assert "glyphs are in colour: channels must be 3, got 1" in refused(capsys, *likelihood)
    for real, message in (("digits", "and --real digits has its own"), ("none", "name them by --real")):
        said = refused(capsys, "evaluate", "--real", real, "--real-num", 9, "--num", 200, "--out", tmp_path / "out")
        assert "real_num is a number of glyphs" in said and message in said
    with pytest.raises(InputError, match="--images glyphs: glyphs have the size"):
        read_images("glyphs", "--images")
    assert not (tmp_path / "out").exists()


def test_fonts_that_are_not_there(tmp_path, monkeypatch, capsys):
    glyphs._font.cache_clear()
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    train = ("teacher", "train", "--data", "glyphs", "--images", 4, "--out", tmp_path / "out")
    assert "the font DejaVuSans is not among matplotlib's files: install matplotlib" in refused(capsys, *train)
    folder = tmp_path / "fonts" / "ttf"
    folder.mkdir(parents=True)
    for name in FONTS:
        (folder / f"{name}.ttf").write_bytes(b"no font")
    assert "cannot be read" in refused(capsys, *train)
