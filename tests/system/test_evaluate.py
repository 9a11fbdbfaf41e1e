"""The evaluator: its figures, its caches, its refusals."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from advkd.data.images import load_images, load_labelled, read_pictures
from advkd.data.pictures import save_image, to_pil, to_uint8
from advkd.data.trajectories import Trajectories
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.evaluation import evaluate, features
from advkd.evaluation.evaluate import EvaluationConfig, evaluate_folders, evaluate_student, table
from advkd.evaluation.features import build_extractor, extract, require_fit
from advkd.models import classifier as classifier_module
from advkd.models.classifier import Classifier, ClassifierConfig
from advkd.models.fused_student import FusedStudent
from advkd.models.student import Student
from advkd.runtime import files
from advkd.runtime.files import digest, write_json, write_tensors

from ..conftest import fork_cli, other_default, run_cli, tiny_recording, tiny_student, tiny_teacher

QUICK = {"num": 30, "resamples": 20, "real": "none"}


@pytest.fixture(scope="module")
def digits():
    """The real digits as uint8 in a seeded random order, and their classes."""
    images, labels, _ = load_labelled("digits")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(9))
    return to_uint8(images).permute(0, 3, 1, 2)[order].contiguous(), labels[order]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, teacher_folder):
    """A student, its teacher, a classifier of 4 features, and samples of the teacher: all 8x8."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny_student().save_pretrained(root / "student")
    torch.manual_seed(0)
    Classifier(ClassifierConfig("tiny", 8, 1, 3, (8,), 4)).save_pretrained(root / "classifier")
    recording = tiny_recording(num=60, seed=77)
    record_trajectories(Teacher.from_pretrained(str(teacher_folder)), recording, root / "samples", progress=False)
    return root


def save_pictures(images, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(to_pil(images.float() / 127.5 - 1)):
        save_image(picture, folder / f"{i:04d}.png")
    return folder


def distances(sets, reference, cache):
    """FD-digits of uint8 sets against a reference of the same size."""
    from advkd.evaluation.metrics import frechet_distance

    extractor = build_extractor("digits")
    wanted = extract(extractor, reference, cache=cache)
    return [frechet_distance(extract(extractor, images, cache=cache), wanted) for images in sets]


def test_the_classifier_recognises_the_digits(digits):
    images, labels = digits
    classifier = Classifier.from_pretrained("digits")
    assert classifier.accuracy(images.float() / 127.5 - 1, labels) > 0.98
    assert classifier.training_record["accuracy"]["held_out"] > 0.98
    assert abs(classifier.features(images.float() / 127.5 - 1).square().mean().item() - 1) < 0.1


def test_fd_digits_rises_with_every_damage(digits, tmp_path):
    images, labels = digits
    reference, rest = images[:800], images[800:1600]
    blurred = F.avg_pool2d(F.pad(rest.float(), (3,) * 4, mode="replicate"), 7, stride=1).round().byte()
    noise = torch.randn(rest.shape, generator=torch.Generator().manual_seed(1)) * 60
    noisy = (rest.float() + noise).clamp(0, 255).byte()
    few = images[800:][labels[800:] < 5]
    upside_down = rest.flip(2)
    floor, *damaged = distances([rest, blurred, noisy, few, upside_down], reference, tmp_path)
    assert floor > 0 and all(distance > 3 * floor for distance in damaged)


def test_a_folder_of_pictures_gives_what_the_images_give(digits, tmp_path):
    images, _ = digits
    folder = save_pictures(images[:300], tmp_path / "a")
    assert torch.equal(read_pictures(folder, "--images"), images[:300])
    config = EvaluationConfig(resamples=20)
    result = evaluate_folders(folder, "digits", config, tmp_path / "out", cache=tmp_path / "cache")
    assert result["score"] == "FD-digits" and [row["images"] for row in result["rows"]] == ["images", "other reference images"]
    assert [row["samples"] for row in result["rows"]] == [[300, 300]] * 2
    ours, other = result["rows"]
    assert 0.2 < ours["times_floor"] < 4 and ours["floor"] == other["floor"] > 0
    assert ours["frechet_interval"][0] < ours["frechet"] < ours["frechet_interval"][1]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    assert {"commit", "dirty", "device", "versions"} <= set(result["provenance"])
    assert "FD-digits" in table(result) and "300" in table(result)


def test_command_line_on_folders(digits, tmp_path):
    images, _ = digits
    a, b = save_pictures(images[:150], tmp_path / "a"), save_pictures(images[150:450], tmp_path / "b")
    done = run_cli(
        *("evaluate", "--images", a, "--reference", b, "--resamples", 20), environment={"ADVKD_CACHE": str(tmp_path / "cache")}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("images") and len(done.stdout.splitlines()) == 3
    assert len(list((tmp_path / "cache").glob("features-*.safetensors"))) == 2


def test_features_are_kept_by_content(digits, tmp_path):
    images = digits[0][:80]
    extractor = build_extractor("digits")
    calls = []
    extractor.register_forward_hook(lambda *_: calls.append(1))
    first = extract(extractor, images, cache=tmp_path)
    assert torch.equal(first, extract(extractor, images.clone(), cache=tmp_path)) and len(calls) == 1
    changed = images.clone()
    changed[0, 0, 0, 0] ^= 1
    extract(extractor, changed, cache=tmp_path)
    assert len(calls) == 2
    for path in tmp_path.glob("features-*"):
        path.write_bytes(path.read_bytes()[:-8])
    assert torch.equal(first, extract(extractor, images, cache=tmp_path)) and len(calls) == 3
    same_weights = Classifier(ClassifierConfig(slope=0.9)).eval()
    same_weights.load_state_dict(extractor.classifier.state_dict())
    assert not torch.equal(first, extract(features.ClassifierFeatures(same_weights), images, cache=tmp_path))
    other = Classifier(ClassifierConfig())
    assert not torch.equal(first, extract(features.ClassifierFeatures(other.eval()), images, cache=tmp_path))


WRONG_FEATURES = {
    "of another dtype": lambda kept: kept.double(),
    "of other images": lambda kept: kept[:-1],
    "of another extractor": lambda kept: kept[:, :-1],
    "of another shape": lambda kept: kept.flatten(),
    "not finite": lambda kept: kept.index_fill(0, torch.tensor([2]), float("nan")),
}


@pytest.mark.parametrize(
    "wrong", [*WRONG_FEATURES, "of other images", "without features", "without a digest", "huge", "a pipe", "text"]
)
def test_kept_features_that_cannot_be_those_are_made_anew(digits, tmp_path, wrong):
    """A process that can write to the cache can also write a digest that fits."""
    images, extractor = digits[0][:80], build_extractor("digits")
    first = extract(extractor, images, cache=tmp_path)
    (path,) = tmp_path.glob("features-*")
    if wrong in WRONG_FEATURES:
        kept = {"features": WRONG_FEATURES[wrong](first)}
        write_tensors(path, kept, {"digest": digest(kept)})
    elif wrong == "of other images":
        extract(extractor, images.flip(0), cache=tmp_path / "other")
        shutil.copy(next((tmp_path / "other").iterdir()), path)
    elif wrong == "without features":
        write_tensors(path, {"x": first}, {"digest": digest({"x": first})})
    elif wrong == "without a digest":
        write_tensors(path, {"features": first + 1}, {})
    elif wrong == "huge":
        kept = {"features": first + 1, "more": torch.zeros(10**6)}
        write_tensors(path, kept, {"digest": digest(kept)})
    else:
        path.unlink()
        os.mkfifo(path) if wrong == "a pipe" else path.write_text("text")
    assert torch.equal(first, extract(extractor, images, cache=tmp_path))
    # The cached file is repaired, too.
    kept, _ = files.read_tensors(path, "features")
    assert torch.equal(first, kept["features"])


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_defaults_of_torch_do_not_change_features(digits, default):
    images = digits[0][:20]
    expected = extract(build_extractor("digits"), images)
    with other_default(default):
        found = extract(build_extractor("digits"), images)
        require_fit(build_extractor("digits"), digits[0][:128], "--images")
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_classifiers_are_float32(digits):
    """Weights are float32, and those of their seed, whatever torch's default dtype is."""
    torch.manual_seed(3)
    expected = Classifier(ClassifierConfig()).state_dict()
    with other_default(torch.float64):
        torch.manual_seed(3)
        found = Classifier(ClassifierConfig()).state_dict()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items())


def test_a_classifier_looks_at_a_batch_at_a_time(digits, monkeypatch):
    """Accuracy and scale of 700 images, in [-1, 1] or of 8 bits, are those of one pass; no pass exceeds the limit of pixels."""
    monkeypatch.setattr(classifier_module, "BATCH_PIXELS", 256 * 32 * 32 + 1)
    images, labels = digits[0][:700], digits[1][:700]
    wide = images.float() / 127.5 - 1
    classifier = Classifier.from_pretrained("digits")
    with torch.no_grad():
        expected = (classifier(wide).argmax(dim=1) == labels).double().mean().item()
        scale = (classifier.features(wide) * classifier.scale).square().mean().sqrt()
    sizes = []
    classifier.trunk.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    assert classifier.accuracy(images, labels) == classifier.accuracy(wide, labels) == expected
    for form in (images, wide):
        classifier.scale.fill_(0)
        classifier.train().calibrate(form)
        assert not classifier.training and abs(classifier.scale / scale - 1) < 1e-6
    assert set(sizes) == {256, 700 - 2 * 256}
    with pytest.raises(InputError, match="images: there is none"):
        classifier.calibrate(wide[:0])
    assert abs(classifier.scale / scale - 1) < 1e-6


def test_kept_features_follow_the_classifier(tmp_path, digits):
    """After features were kept, weights change in a way that bypasses PyTorch's version counters."""
    extractor, images = build_extractor("digits"), digits[0][:4]
    before = extract(extractor, images, cache=tmp_path)
    extractor.classifier.head.weight.data.mul_(2)
    extractor.classifier.embedding[0].weight.data.mul_(0.5)
    assert torch.equal(extract(extractor, images, cache=tmp_path), extract(extractor, images))
    assert not torch.equal(extract(extractor, images, cache=tmp_path), before)


@pytest.mark.parametrize("channels", [(8.5,), ("8",), (0,)])
def test_classifier_configurations_that_cannot_work(channels):
    with pytest.raises(InputError, match="must be"):
        ClassifierConfig("tiny", 8, 1, 3, channels, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_are_gathered_as_eight_bits(tiny, dtype):
    """Images of a student and of a recording become one tensor, equal to the result of :func:`to_uint8`."""
    fused = Student.from_pretrained(tiny / "student").fuse(dtype=evaluate.DTYPES[dtype], tune=False)
    config = EvaluationConfig(num=150, seed=5)
    drawn = evaluate._draw_student(fused, config)
    assert drawn.is_contiguous() and torch.equal(drawn, to_uint8(fused.sample(150, 5)).permute(0, 3, 1, 2))
    samples = Trajectories(tiny / "samples")
    recorded = samples.batch(range(59), [4])[1][4]
    assert torch.equal(evaluate._images(samples, tiny_teacher(), 59), to_uint8(recorded).permute(0, 3, 1, 2))


def test_students_images_are_never_floats_together(tiny, teacher_folder, tmp_path, monkeypatch):
    """An evaluation holds no more than one batch of an engine's images in [-1, 1]."""

    def refuse(*_, **__):
        raise AssertionError("all images at once")

    monkeypatch.setattr(FusedStudent, "sample", refuse)
    config = EvaluationConfig(extractor=str(tiny / "classifier"), seed=77, **QUICK)
    arguments = (tiny / "student", str(teacher_folder), config, tmp_path / "out", tiny / "samples")
    assert evaluate_student(*arguments, cache=tmp_path / "cache", progress=False)["rows"]


def test_kept_samples_of_another_seed_are_refused(tiny, teacher_folder, tmp_path):
    """A folder of the cache is trusted only as far as its manifest."""
    config = EvaluationConfig(extractor=str(tiny / "classifier"), **{**QUICK, "num": 12})
    arguments = (tiny / "student", str(teacher_folder), config, tmp_path / "out")
    evaluate_student(*arguments, cache=tmp_path, progress=False)
    (folder,) = tmp_path.glob("teacher-*")
    shutil.rmtree(folder)
    shutil.copytree(tiny / "samples", folder)
    with pytest.raises(InputError, match="the cache's .* holds other samples than its name says: delete it"):
        evaluate_student(*arguments, cache=tmp_path, progress=False)


def test_student_against_its_teacher(tiny, teacher_folder, tmp_path):
    config = EvaluationConfig(extractor=str(tiny / "classifier"), seed=77, **QUICK)
    arguments = (tiny / "student", str(teacher_folder), config, tmp_path / "out", tiny / "samples")
    result = evaluate_student(*arguments, cache=tmp_path / "cache", progress=False)
    assert result["score"] == "FD-tiny" and result["num_features"] == 4
    assert [(row["images"], row["against"]) for row in result["rows"]] == [
        ("student", "teacher"),
        ("fresh teacher samples", "teacher"),
    ]
    # An untrained student is far off; the teacher's own other samples are at the floor.
    assert result["rows"][0]["times_floor"] > 3 > result["rows"][1]["times_floor"]
    assert result["rows"][1]["recall_of_other"] == 1
    models = result["models"]
    assert models["student"]["evaluations"] == 1 and models["teacher"]["evaluations"] == 10
    assert models["student"]["parameters"] == tiny_student().num_parameters(terminals=False)
    assert (
        0 < models["student"]["seconds"]["p20"] <= models["student"]["seconds"]["median"] <= models["student"]["seconds"]["p80"]
    )
    assert result["known_unseen"] is False and "is not known" in table(result)
    assert result["student"]["weights_sha256"] == digest(Student.from_pretrained(tiny / "student").state_dict())
    assert result["samples"]["parts"] == [{"seed": 77, "start": 0, "num": 60}]
    again = evaluate_student(*arguments, cache=tmp_path / "cache", progress=False)
    assert again["rows"] == result["rows"]


def test_teacher_samples_are_drawn_and_kept(tiny, teacher_folder, tmp_path):
    config = EvaluationConfig(extractor=str(tiny / "classifier"), **{**QUICK, "num": 12})
    for _ in range(2):
        evaluate_student(tiny / "student", str(teacher_folder), config, tmp_path / "out", cache=tmp_path, progress=False)
    (folder,) = tmp_path.glob("teacher-*")
    assert json.loads((folder / "manifest.json").read_text())["recipe"]["num"] == 24


def test_real_images_of_a_folder(tiny, teacher_folder, tmp_path):
    # Sorted by brightness, as real sets are sorted by class: their halves are alike all the same.
    noise = torch.randint(0, 64, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise[20:] += 190
    folder = save_pictures(noise, tmp_path / "real")
    config = EvaluationConfig(extractor=str(tiny / "classifier"), seed=77, **{**QUICK, "real": str(folder)})
    arguments = (tiny / "student", str(teacher_folder), config, tmp_path / "out", tiny / "samples")
    result = evaluate_student(*arguments, cache=tmp_path / "cache", progress=False)
    rows = [row for row in result["rows"] if row["against"] == "real"]
    assert [(row["images"], row["samples"][0]) for row in rows] == [
        ("student", 20),
        ("teacher", 20),
        ("other real images", 20),
    ]
    assert rows[2]["times_floor"] < 3


def test_samples_that_the_student_was_trained_on_are_refused(tiny, teacher_folder, tmp_path):
    student = shutil.copytree(tiny / "student", tmp_path / "student")
    write_json(student / "training.json", {"runs": [], "samples": [{"seed": 77, "start": 40, "num": 100}]})
    config = EvaluationConfig(extractor=str(tiny / "classifier"), seed=77, **QUICK)
    for samples in (tiny / "samples", None):
        with pytest.raises(InputError, match="seed 77 is that of the student's training trajectories"):
            evaluate_student(student, str(teacher_folder), config, tmp_path / "out", samples, cache=tmp_path, progress=False)
    assert not list(tmp_path.glob("teacher-*"))
    write_json(student / "training.json", {"runs": [], "samples": [{"seed": 3, "start": 0, "num": 100}]})
    arguments = (student, str(teacher_folder), config, tmp_path / "out", tiny / "samples")
    assert evaluate_student(*arguments, cache=tmp_path, progress=False)["known_unseen"]
    write_json(student / "training.json", {"x": 1})
    with pytest.raises(InputError, match="training record"):
        evaluate_student(*arguments, cache=tmp_path, progress=False)


def test_the_shipped_student_records_its_training():
    record = Student.from_pretrained("digits").training_record
    assert record["samples"] and all(part["seed"] != EvaluationConfig().seed for part in record["samples"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num": 31}, "holds 60 samples, 2 x 31 are needed"),
        ({"num": 7}, "--student with --num 7: 7 images are too few for 4 features; 8 or more"),
        ({"resamples": 19}, "resamples must be at least 20"),
        ({"real": "no-such-folder"}, "--real no-such-folder is not a folder of images"),
        ({"real": "digits"}, "--real digits holds gray 32x32 images, gray 8x8 ones are compared"),
        ({"num": 0}, "num must be at least 1"),
        ({"extractor": "digits"}, "takes gray 32x32 images, these are gray 8x8"),
        ({"extractor": "no-such"}, "--extractor must be digits, glyphs, inception or a folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_work_starts(tiny, teacher_folder, tmp_path, change, message):
    config = EvaluationConfig(**{"extractor": str(tiny / "classifier"), "seed": 77, **QUICK, **change})
    arguments = (tiny / "student", str(teacher_folder), config, tmp_path / "out", tiny / "samples")
    with pytest.raises(InputError, match=message):
        evaluate_student(*arguments, cache=tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


def test_samples_of_another_teacher_are_refused(tiny, trajectories, teacher_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny / "samples", other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["recipe"]["teacher"]["weights_sha256"] = "0"
    del manifest["digest"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    config = EvaluationConfig(extractor=str(tiny / "classifier"), **QUICK)
    with pytest.raises(InputError, match="are of another teacher"):
        evaluate_student(tiny / "student", str(teacher_folder), config, tmp_path / "out", other, progress=False)


class WrongFeatures(torch.nn.Module):
    num_features, score, shape, identity = 5, "FD-wrong", None, "wrong"

    def forward(self, images):
        return images.float().flatten(1)[:, :4]


def test_extractor_with_the_wrong_number_of_features():
    with pytest.raises(InputError, match=r"it says 5 features and gives \(20, 4\)"):
        extract(WrongFeatures(), torch.zeros(20, 1, 8, 8, dtype=torch.uint8))


def test_classifier_folder_with_the_wrong_number_of_features(tiny, tmp_path):
    folder = shutil.copytree(tiny / "classifier", tmp_path / "classifier")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "num_features": 6})
    with pytest.raises(InputError, match="is damaged or of another model"):
        build_extractor(str(folder))


@pytest.mark.parametrize("broken", ["empty", "missing", "mixed sizes", "gray and colour", "unreadable"])
def test_bad_folders_are_one_clear_line(digits, tmp_path, broken):
    good, bad = save_pictures(digits[0][:140], tmp_path / "good"), tmp_path / "bad"
    if broken != "missing":
        save_pictures(digits[0][:140], bad)
    expected = f"--images {bad}"
    if broken == "empty":
        shutil.rmtree(bad)
        bad.mkdir()
        expected = "holds no image"
    elif broken == "missing":
        expected = "is not a folder of images"
    elif broken == "mixed sizes":
        Image.new("L", (16, 32)).save(bad / "zz.png")
        expected = "0000.png is gray 32x32, zz.png is gray 16x32"
    elif broken == "gray and colour":
        Image.new("RGB", (32, 32)).save(bad / "zz.png")
        expected = "0000.png is gray 32x32, zz.png is colour 32x32"
    else:
        (bad / "zz.png").write_bytes(b"not a picture")
        expected = "zz.png cannot be read"
    done = fork_cli("evaluate", "--images", bad, "--reference", good, "--out", tmp_path / "out")
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_gray_against_colour_folders(digits, tmp_path):
    gray = save_pictures(digits[0][:140], tmp_path / "gray")
    colour = save_pictures(digits[0][:140].expand(-1, 3, -1, -1), tmp_path / "colour")
    with pytest.raises(InputError, match="are gray 32x32, --reference .* are colour 32x32"):
        evaluate_folders(gray, colour, EvaluationConfig())


def test_too_few_images_in_a_folder(digits, tmp_path):
    few, many = save_pictures(digits[0][:64], tmp_path / "few"), save_pictures(digits[0][:260], tmp_path / "many")
    with pytest.raises(InputError, match="--images .*: 64 images are too few for 64 features; 128 or more"):
        evaluate_folders(few, many, EvaluationConfig())
    with pytest.raises(InputError, match="half of --reference .*: 32 images are too few"):
        evaluate_folders(many, few, EvaluationConfig())


def test_inception_weights(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="needs --inception-weights"):
        build_extractor("inception")
    weights = tmp_path / "weights.pth"
    with pytest.raises(InputError, match="torch-fidelity's weights-inception-.*weights.pth does not exist"):
        build_extractor("inception", weights)
    with pytest.raises(InputError, match="is not a regular file"):
        build_extractor("inception", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is not a regular file"):
        build_extractor("inception", tmp_path / "pipe")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:6726825d\nsize 96\n")
    with pytest.raises(InputError, match="a git-lfs pointer is in its place: run 'git lfs pull'"):
        build_extractor("inception", weights)
    weights.write_bytes(b"")
    with pytest.raises(InputError, match="it is empty"):
        build_extractor("inception", weights)
    with open(weights, "r+b") as file:
        file.truncate(10**9)
    with pytest.raises(InputError, match="has 1,000,000,000 bytes, more than the 268,435,456"):
        build_extractor("inception", weights)
    weights.write_bytes(b"something else")
    with pytest.raises(InputError, match="has SHA-256 .*, not 6726825d"):
        build_extractor("inception", weights)
    monkeypatch.setattr(features, "INCEPTION_FILE", f"weights-{files.sha256(weights)[:8]}.pth")
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs torch-fidelity: pip install 'advkd\[inception\]'"):
        build_extractor("inception", weights)


class Network(torch.nn.Module):
    """Stand-in for the Inception-v3 network, with its constructor."""

    def __init__(self, name, features_list, path):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2048))
        self.load_state_dict(torch.load(path))

    def forward(self, images):
        return images.float().mean(dim=(1, 2, 3))[:, None] * self.weight


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """A function that builds the extractor from the file that ``write`` writes, as if its hash were right."""
    from torchmetrics.image import fid

    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(fid, "NoTrainInceptionV3", Network)

    def build(write):
        path = tmp_path / "weights.pth"
        write(path)
        monkeypatch.setattr(features, "INCEPTION_FILE", f"weights-{files.sha256(path)[:8]}.pth")
        return build_extractor("inception", path)

    return build


WEIGHTS = torch.randn(2048, generator=torch.Generator().manual_seed(0))


class Call:
    """Calls ``print`` where it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def deflated(path):
    """An archive of torch.save's with compressed records."""
    torch.save({"weight": WEIGHTS}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def truncated(path):
    torch.save({"weight": WEIGHTS}, path)
    path.write_bytes(path.read_bytes()[:-1000])


HOSTILE = {
    "a pickle that calls": (
        lambda path: path.write_bytes(pickle.dumps(Call(), protocol=2)),
        "asks for .*print, and tensors alone",
    ),
    "an archive that calls": (lambda path: torch.save({"weight": Call()}, path), "asks for .*print, and tensors alone"),
    "compressed": (deflated, "unpacks to more than its size"),
    "truncated": (truncated, "cannot be read"),
    "no dict": (lambda path: torch.save(WEIGHTS, path), "holds something else than tensors by name"),
    "no tensor": (lambda path: torch.save({"weight": 3}, path), "holds something else than tensors by name"),
    "no name": (lambda path: torch.save({3: WEIGHTS}, path), "holds something else than tensors by name"),
    "sparse": (lambda path: torch.save({"weight": WEIGHTS.to_sparse()}, path), "_rebuild_sparse_tensor, and tensors alone"),
    "on no device": (
        lambda path: torch.save({"weight": WEIGHTS.to("meta")}, path),
        "_rebuild_meta_tensor_no_storage, and tensors",
    ),
    "repeated": (lambda path: torch.save({"weight": WEIGHTS[:1].expand(10**12)}, path), "holds something else than tensors"),
    "of another network": (lambda path: torch.save({"bias": WEIGHTS}, path), "is of another network"),
    "of another shape": (lambda path: torch.save({"weight": WEIGHTS[:5]}, path), "is of another network"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_inception_weights_that_are_something_else_are_refused(name, inception, capsys):
    """The known digits of the hash are few enough to forge: nothing in the file may run or grow."""
    write, message = HOSTILE[name]
    with pytest.raises(InputError, match=message) as refused:
        inception(write)
    assert "--inception-weights" in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16, "meta"], ids=str)
def test_inception_weights_are_float32_under_other_defaults(inception, default, legacy):
    images = torch.full((2, 1, 4, 4), 3, dtype=torch.uint8)
    with other_default(default):
        extractor = inception(lambda path: torch.save({"weight": WEIGHTS}, path, _use_new_zipfile_serialization=not legacy))
        found = extract(extractor, images)
    assert found.dtype == torch.float32 and torch.equal(found, (3 * WEIGHTS).expand(2, -1))


def test_images_for_another_extractor_are_refused():
    extractor = build_extractor("digits")
    with pytest.raises(InputError, match="takes gray 32x32 images, these are colour 32x32"):
        require_fit(extractor, torch.zeros(100, 3, 32, 32, dtype=torch.uint8), "--images")
    with pytest.raises(InputError, match="must be uint8"):
        require_fit(extractor, torch.zeros(100, 1, 32, 32), "--images")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--images", "a"], "--images and --reference go together"),
        (["--images", "a", "--reference", "b", "--student", "c"], "--student does not go with --images"),
        (["--images", "a", "--reference", "b", "--num", "5"], "--num does not go with --images"),
        ([], "--out is missing"),
        (["--out", "x", "--num", "many"], "num must be a whole number"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    done = fork_cli("evaluate", *options)
    assert done.returncode == 2 and message in done.stderr


def test_classifier_of_a_folder(digits, tmp_path):
    images, labels = digits
    for label in (0, 1):
        save_pictures(images[labels == label][:40], tmp_path / "data" / str(label))
    done = fork_cli(
        *("classifier", "train", "--data", tmp_path / "data", "--out", tmp_path / "classifier"),
        *("--steps", 40, "--num-features", 8),
    )
    assert done.returncode == 0, done.stderr
    classifier = Classifier.from_pretrained(tmp_path / "classifier")
    assert classifier.config.classes == 2 and classifier.config.name == "data"
    assert classifier.training_record["accuracy"]["held_out"] > 0.9
    chosen = images[labels < 2][-60:]
    assert classifier.accuracy(chosen.float() / 127.5 - 1, labels[labels < 2][-60:]) > 0.9
    again = fork_cli("classifier", "train", "--data", tmp_path / "data", "--out", tmp_path / "classifier")
    assert again.returncode == 2 and "holds a model already" in again.stderr
    assert fork_cli("classifier", "train", "--data", tmp_path / "data" / "0", "--out", tmp_path / "no").returncode == 2


def test_student_and_teacher_of_different_sizes(tiny, tmp_path):
    config = EvaluationConfig(extractor=str(tiny / "classifier"), **QUICK)
    with pytest.raises(InputError, match="--student draws gray 8x8 images, --teacher gray 32x32 ones"):
        evaluate_student(tiny / "student", "digits", config, tmp_path)


def test_references_that_are_all_alike_are_refused(digits, tmp_path):
    images, _ = digits
    save_pictures(images[:1].expand(260, -1, -1, -1), tmp_path / "same")
    with pytest.raises(InputError, match="all alike"):
        evaluate_folders("digits", tmp_path / "same", EvaluationConfig(resamples=20), cache=tmp_path / "cache")


def test_an_unusable_cache_is_named(digits, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ("digits", "digits", EvaluationConfig())
    with pytest.raises(InputError, match="the cache"):
        evaluate_folders(*arguments, cache=tmp_path / "file")


def test_the_same_teacher_under_another_name_shares_its_samples(tiny, teacher_folder, tmp_path, monkeypatch):
    config = EvaluationConfig(extractor=str(tiny / "classifier"), **{**QUICK, "num": 12})
    monkeypatch.chdir(teacher_folder.parent)
    for name in (str(teacher_folder), teacher_folder.name):
        evaluate_student(tiny / "student", name, config, tmp_path / "out", cache=tmp_path, progress=False)
    assert len(list(tmp_path.glob("teacher-*"))) == 1


@pytest.mark.gpu
def test_features_on_a_gpu(digits):
    images = digits[0][:300]
    here, there = build_extractor("digits"), build_extractor("digits").to("cuda")
    assert (extract(here, images) - extract(there, images)).abs().max() < 1e-2


def test_real_digits_are_the_documented_set():
    images = load_images("digits")
    assert images.shape == (1797, 1, 32, 32) and images.min() == -1 and images.max() == 1


def test_inception_is_torchmetrics_own(tmp_path, monkeypatch):
    """Random weights of the right architecture, as FID's users have the real ones in a file."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as original

    with monkeypatch.context() as patch:
        patch.setattr(original, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(original.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = original.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    weights = tmp_path / "weights.pth"
    torch.save(network.state_dict(), weights)
    monkeypatch.setattr(features, "INCEPTION_FILE", f"weights-{files.sha256(weights)[:8]}.pth")
    extractor = build_extractor("inception", weights)
    images = torch.randint(0, 255, (3, 1, 32, 32), dtype=torch.uint8)
    expected = extractor.network(images.expand(-1, 3, -1, -1))
    assert extractor.score == "FID" and torch.equal(extract(extractor, images), expected)
