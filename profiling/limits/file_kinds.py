"""Every kind of file that a command or a public function reads: how it is read, and what it means.

Each reader gives something to compare. The meaning is found a second way, by a plain parse of the file as it stands, or is
none: of a file with a digest nothing but what was written may be read.
"""

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from advkd import AdvKDPipeline, FusedStudent, Student, StudentConfig
from advkd.data.images import load_images
from advkd.data.pictures import read_metrics, save_curves, save_grid
from advkd.data.trajectories import Trajectories
from advkd.diffusion.teacher import Teacher
from advkd.evaluation import report
from advkd.evaluation.features import build_extractor
from advkd.methods.adv_kd import RECIPES
from advkd.models.classifier import Classifier, ClassifierConfig
from advkd.runtime.files import sha256

from .plain import Meaningless, finite, known_fields, own_fields, parse_json, parse_safetensors, with_tensors
from .samples import FORMATS, RECORDING, RUN, TRAINING, WEIGHTS, evaluate_pictures, kept_in, run_command


@dataclass(frozen=True)
class Kind:
    """One kind of file and one way to read it.

    Attributes:
        file: its place in the folder of samples; the folder that is its first part is copied for each case.
        read: function of the copy's parent that reads it and returns something to compare.
        meaning: function of the copy's parent that finds the same by a plain parse, or None.
        sealed: the file can tell that it was altered, and means something only as another one that was written whole.
        has_other: there is another file of this kind, in the folder ``<first part>-other``.
        beside: other folders that are copied.
        named: what a refusal may say that does not name the file: an option, a field, what the file does not fit, or that the
            folder it stands in, ``{folder}``, or the one that was asked for, below ``{case}``, does not hold what was meant.
        expected: function of the samples' folder that finds the reader's result on undamaged files in another way, or None.
        written: files that the command itself writes anew where it ends well.
        costly: the command takes a tenth of a second, and has fewer cases.
        readable: the undamaged sample is read; one that is not is refused with and without damage.
    """

    file: str
    read: object
    meaning: object = None
    sealed: bool = False
    has_other: bool = True
    beside: tuple = ()
    named: tuple = ()
    written: tuple = ()
    costly: bool = False
    readable: bool = True
    expected: object = None

    @property
    def folder(self):
        """The folder that is copied."""
        return self.file.split("/")[0]

    @property
    def other(self):
        """Place of another file of this kind, or None."""
        return self.file.replace(self.folder, f"{self.folder}-other", 1) if self.has_other else None

    @property
    def form(self):
        """One of :data:`damage.STRUCTURES`."""
        suffix = Path(self.file).suffix[1:]
        forms = {**dict.fromkeys(("json", "toml", "csv", "safetensors"), suffix), "bin": "pickle", "pth": "pickle"}
        return forms.get(suffix, "image")


def _sampled(place, name="student"):
    run_command("sample", "--student", place / name, "-n", 2, "--backend", "reference", "--out", place / "grid.png")
    with Image.open(place / "grid.png") as image:
        return np.asarray(image)


def _sampled_meaning(place, name="student"):
    folder = place / name
    values = parse_json(folder / "config.json")
    student = with_tensors(Student(StudentConfig(**own_fields(values))), parse_safetensors(folder / WEIGHTS))
    images = finite(student.fuse("reference").sample(2))
    save_grid(images, place / "meant.png")
    with Image.open(place / "meant.png") as image:
        return np.asarray(image)


def _recorded(place):
    return Student.from_pretrained(place / "student").training_record


def _recorded_meaning(place):
    return parse_json(place / "student" / "training.json")


def _fused(place, name="fused"):
    engine = FusedStudent.from_pretrained(place / name, backend="cpu")
    return engine.sample(2), dataclasses.asdict(engine.config)


def _fused_meaning(place, name="fused"):
    values, tensors = parse_json(place / name / "config.json"), parse_safetensors(place / name / WEIGHTS)
    engine = with_tensors(FusedStudent(FusedStudent.config_class(**own_fields(values)), "cpu"), tensors)
    return finite(engine.sample(2)), dataclasses.asdict(engine.config)


def _piped(place):
    pipeline = AdvKDPipeline.from_pretrained(place / "pipeline")
    return pipeline.student.student.fuse("reference").sample(2)


def _piped_meaning(place):
    parse_json(place / "pipeline" / "model_index.json")
    values = {k: v for k, v in parse_json(place / "pipeline" / "student" / "config.json").items() if v is not None}
    tensors = parse_safetensors(place / "pipeline" / "student" / WEIGHTS)
    return finite(with_tensors(Student(StudentConfig(**own_fields(values))), tensors).fuse("reference").sample(2))


def _taught(name):
    """A teacher's drawings, through the command line."""

    def read(place):
        out = place / "out"
        options = ("--num", 2, "--steps", 2, "--depth", 4, "--batch-size", 2, "--shard-size", 2)
        run_command("trajectories", "--teacher", place / name, *options, "--out", out)
        return load_file(out / "shard-00000.safetensors")["level_04"]

    return read


def _taught_meaning(name):
    def meaning(place):
        folder = place / name
        parse_json(folder / "model_index.json")
        unet = diffusers.UNet2DModel(**known_fields(diffusers.UNet2DModel, parse_json(folder / "unet" / "config.json")))
        values = parse_json(folder / "scheduler" / "scheduler_config.json")
        kind = getattr(diffusers, values.get("_class_name", "DDPMScheduler"))
        tensors = {}
        for path in sorted((folder / "unet").glob("*.safetensors")):
            tensors |= parse_safetensors(path)
        unet = with_tensors(unet, tensors)
        teacher = Teacher(unet, kind(**known_fields(kind, values)), "plain")
        return finite(teacher.sample(2, steps=2)).half()

    return meaning


def _older(place):
    return Teacher.from_pretrained(place / "older").sample(2, steps=2)


def _older_meaning(place):
    tensors = torch.load(place / "older" / "unet" / "diffusion_pytorch_model.bin", weights_only=True)
    save_file(tensors, place / "older" / "unet" / WEIGHTS, {"format": "pt"})
    return _older(place)


def _distilled(place):
    """The weights of a student distilled from trajectories."""
    run_command("distill", "--init", place / "student", "--trajectories", place / "data", *RUN, "--out", place / "out")
    return load_file(place / "out" / WEIGHTS)


def _read_back(place, name="data"):
    data = Trajectories(place / name)
    data.verify()
    return data.info.to_json(), data.standard_deviations, data.batch(list(range(len(data))), [1, 2, 3, 4])


def _read_back_meaning(place, name):
    folder = place / name
    manifest, parts = parse_json(folder / "manifest.json"), []
    # A null has no meaning.
    described = _unnamed({key: value for key, value in manifest["recipe"].items() if value is not None})
    for path, entry in ((folder / entry["file"], entry) for entry in manifest["shards"]):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if sha256(path) != entry["sha256"] or _unnamed(json.loads(header["__metadata__"]["advkd"])["recipe"]) != described:
            raise Meaningless(f"{path.name} is of another recording")
        parts.append(parse_safetensors(path))
    deviations = manifest["standard_deviations"]
    if not all(type(value) in (int, float) and 0 <= value < math.inf for value in deviations):
        raise Meaningless("a deviation is none")
    whole = {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}
    told = {key: manifest["recipe"][key] for key in described}
    return told, deviations, (whole["z"], {k: whole[f"level_{k:02d}"] for k in (1, 2, 3, 4)})


def _unnamed(described):
    """A data set's description without its teacher's name, which may be another on every machine."""
    return {**described, "teacher": {**described["teacher"], "name": None}}


def _recorded_on(place):
    """The recording goes on: nothing is left to do."""
    run_command("trajectories", "--teacher", place / "teacher", "--num", 12, "--seed", 0, *RECORDING, "--out", place / "data")
    return _read_back(place)


def _resumed(place):
    data = ("--init", place / "student", "--trajectories", place / "data", "--seed", 0)
    run_command("distill", *data, *RUN, "--out", place / "run", "--resume")
    # The last row is made anew.
    rows = (place / "run" / "metrics.csv").read_text().splitlines()
    return load_file(place / "run" / WEIGHTS), rows


def _whole_run(samples):
    """The weights and rows of the same run, never interrupted."""
    return load_file(samples / "run-whole" / WEIGHTS), (samples / "run-whole" / "metrics.csv").read_text().splitlines()


def _resumed_meaning(place):
    """The rows up to the checkpoint as they stand, what comes after them made anew, and the weights of a whole run."""
    titles, *whole = (place / "damaged").read_text().split("\n")[:-1]
    try:
        places = [tuple(map(int, row.split(",")[:2])) for row in whole]
    except ValueError as error:
        raise Meaningless(error) from error
    if any(row.count(",") != titles.count(",") for row in whole) or places != sorted(set(places)):
        raise Meaningless("rows are torn or not in order")
    weights, rows = _whole_run(place.with_name("samples"))
    return weights, [titles, *(row for row, at in zip(whole, places) if at <= (1, 2)), rows[-1]]


def _trained_on(place):
    data = ("--data", place / "pictures", "--seed", 0)
    run_command("teacher", "train", *data, *TRAINING, "--out", place / "training", "--resume")
    return load_file(place / "training" / "unet" / WEIGHTS)


def _whole_training(samples):
    return load_file(samples / "training-whole" / "unet" / WEIGHTS)


def _reported(*options):
    """The page of a report, its pictures left out."""

    def read(place):
        models = ("--student", place / "student", "--teacher", place / "teacher")
        tables = place / "tables"
        given = [value for option in options for value in (f"--{option}", tables / REPORTED[option])]
        curves = []
        with (
            mock.patch(
                "advkd.evaluation.report.save_pictures", lambda teacher, student, metrics, out: curves.append(metrics) or {}
            ),
            mock.patch("advkd.evaluation.report._figure", lambda path, caption: ""),
        ):
            run_command("report", *models, "--evaluation", tables / "evaluation.json", *given, "--out", place / "out")
        if "metrics" in options:
            save_curves(curves[0], place / "out" / "curves.png")
            return read_metrics(curves[0])
        return (place / "out" / "report.html").read_text()

    return read


REPORTED = {"metrics": "metrics.csv", "ablation": "ablation.json"}


def _metrics_meaning(place):
    """Columns of a table of numbers, all rows of which are whole but for the last."""
    try:
        titles, *rows = (place / "tables" / "metrics.csv").read_text().split("\n")
        cells = [row.split(",") for row in rows[:-1] if row]
        if any(len(row) != titles.count(",") + 1 for row in cells):
            raise Meaningless("a row is torn")
        columns = [[float(word) if word else math.nan for word in column] for column in zip(*cells)]
        return dict(zip(titles.split(","), columns, strict=True))
    except ValueError as error:
        raise Meaningless(error) from error


def _page_meaning(name=""):
    """The page that the undamaged code makes of what a plain parse gives."""

    def meaning(place):
        result = parse_json(place / "tables" / "evaluation.json")
        runs = parse_json(place / "tables" / "ablation.json")["runs"] if name == "ablation" else []
        with mock.patch("advkd.evaluation.report._figure", lambda path, caption: ""):
            return report._page("advkd: one pass against many", result, runs, [("", "")])

    return meaning


def _extracted(place, name="classifier"):
    extractor = build_extractor(str(place / name))
    return extractor(load_images(place / "pictures")), extractor.score, extractor.classifier.training_record


def _extracted_meaning(place, name="classifier"):
    folder = place / name
    config = ClassifierConfig(**own_fields(parse_json(folder / "config.json")))
    classifier = with_tensors(Classifier(config), parse_safetensors(folder / WEIGHTS))
    features = finite(classifier.features(load_images(place / "pictures").float() / 127.5 - 1))
    return features, f"FD-{config.name}", parse_json(folder / "training.json")


def _evaluated_from_kept(place):
    with kept_in(place / "cache"):
        return evaluate_pictures(place, "classifier")


def _evaluated_samples(place):
    models = ("--student", place / "student", "--teacher", place / "teacher", "--teacher-samples", place / "data")
    options = ("--num", 5, "--seed", 10, "--resamples", 20, "--real", "none", "--extractor", place / "classifier")
    run_command("evaluate", *models, *options, "--out", place / "out")
    return json.loads((place / "out" / "evaluation.json").read_text())["rows"]


def _evaluated_by_inception(place):
    folders = ("--images", place / "pictures", "--reference", place / "pictures", "--extractor", "inception")
    run_command("evaluate", *folders, "--inception-weights", place / "tables" / "inception.pth", "--out", place / "out")
    return json.loads((place / "out" / "evaluation.json").read_text())["rows"]


def _planned(place):
    """Images by kept plans; other plans round otherwise."""
    with kept_in(place / "cache"):
        run_command("sample", "--student", place / "student", "-n", 2, "--backend", "cpu", "--out", place / "grid.png")
    with Image.open(place / "grid.png") as image:
        return Coarse(np.asarray(image).astype(int))


class Coarse:
    """Pixels that equal others within a level."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __eq__(self, other):
        return self.pixels.shape == other.pixels.shape and abs(self.pixels - other.pixels).max() <= 1


def _told(option, file):
    """The configuration with which the command line starts a distillation, which is left out."""

    def read(place):
        asked = []
        given = {"preset": (), "config": ("--preset", "digits")}[option]
        with mock.patch(
            "advkd.training.distillation.distill", lambda data, student, config, *_, **__: asked.append((student, config))
        ):
            told = (*given, f"--{option}", place / "tables" / file)
            run_command("distill", "--trajectories", place, *told, "--out", place / "out")
        (student, config), *_ = asked
        if option == "preset":
            return dataclasses.asdict(student.config)
        config.validate(12, True, 10**9)
        return dataclasses.asdict(config)

    return read


def _preset_meaning(place):
    values = parse_json(place / "tables" / "preset.json")
    return {**dataclasses.asdict(StudentConfig()), **own_fields(values)}


def _recipe_meaning(file):
    def meaning(place):
        path = place / "tables" / file
        try:
            values = tomllib.loads(path.read_text()) if path.suffix == ".toml" else parse_json(path)
        except ValueError as error:
            raise Meaningless(error) from error
        base = dataclasses.asdict(RECIPES[values.pop("recipe", "joint")])
        return {**base, **{key: _numbers(value, base[key]) for key, value in values.items() if value is not None}}

    return meaning


def _numbers(value, default):
    """Lists of numbers, or texts of them, as tuples; a text of a number as a number."""
    if isinstance(default, tuple):
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(float(part) if isinstance(part, str) else part for part in parts if part != "")
    return type(default)(value) if isinstance(value, str) else value


def _sampled_on(place):
    """More pictures into a folder that has some."""
    run_command("sample", "--student", place / "student", "-n", 3, "--seed", 3, "--out", f"{place / 'samples'}/")
    return [path.read_bytes() for path in sorted((place / "samples").glob("*.png"))]


def _looked_at(name):
    return lambda place: load_images(place / f"picture-{name}")


def _looked_at_meaning(name):
    """Pillow's own pixels, where they are plain ones."""

    def meaning(place):
        with Image.open(place / f"picture-{name}" / name) as image:
            if "transparency" in image.info or image.mode not in ("L", "RGB", "P"):
                return Anything()
            image.load()
            # A palette of grays is gray.
            plain = image.convert("RGB") if image.mode == "P" else image
            pixels = np.atleast_3d(np.asarray(plain))
        if image.mode == "P" and (pixels == pixels[..., :1]).all():
            pixels = pixels[..., :1]
        side = 1 << (min(pixels.shape[:2]).bit_length() - 1)
        if pixels.shape[0] != pixels.shape[1] or side != pixels.shape[0] or image.getexif().get(274, 1) != 1:
            return Anything()
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]

    return meaning


class Anything:
    """A meaning that is not looked into further."""


def _classes_read(place):
    """A picture among those that a classifier is trained on, through the command line."""
    options = ("--steps", 1, "--batch-size", 2, "--num-features", 2)
    run_command("classifier", "train", "--data", place / "classes", *options, "--out", place / "out")
    return load_file(place / "out" / WEIGHTS)


SHARD, CHECKPOINT = "shard-00001.safetensors", "checkpoint.safetensors"
PART = "diffusion_pytorch_model-00001-of-00003.safetensors"
OLDER = "older/unet/diffusion_pytorch_model.bin"
RESUMED = {"beside": ("student", "data"), "written": ("run/metrics.csv", f"run/{CHECKPOINT}"), "costly": True}
RESUMED |= {"expected": _whole_run, "named": ("{folder} holds a run with another",)}
RECORDED = {"beside": ("teacher",), "written": ("data/manifest.json",), "costly": True}
MODELS = {"beside": ("student", "teacher"), "costly": True}
SETS = {"beside": ("pictures", "classes", "classifier"), "costly": True}
EVALUATED = {"beside": ("student", "teacher", "classifier"), "costly": True}
MODEL = {"named": ("{folder} holds a", f"{WEIGHTS} is damaged or of another model", "the weights in {folder} ")}
TEACHER, SHARDED, PICKLED = (
    {"named": (f"teacher {{case}}/{name}: ", f"teacher {{case}}/{name} "), "costly": True}
    for name in ("teacher", "sharded", "older")
)
# An index may name a part that is not there, or that lacks what it should hold.
INDEX = {**SHARDED, "named": (*SHARDED["named"], "the teacher's weights {folder}/")}
SHARDS = {"named": ("shard {folder}/shard-",)}
FIELDS = tuple(field.name for field in dataclasses.fields(RECIPES["joint"]))
TAUGHT, PARTS = (_taught("teacher"), _taught_meaning("teacher")), (_taught("sharded"), _taught_meaning("sharded"))

KINDS = {
    "student's configuration": Kind("student/config.json", _sampled, _sampled_meaning, **MODEL),
    "student's weights": Kind(f"student/{WEIGHTS}", _sampled, _sampled_meaning, sealed=True),
    "student's weights without a digest": Kind(
        f"bare-student/{WEIGHTS}", partial(_sampled, name="bare-student"), partial(_sampled_meaning, name="bare-student")
    ),
    "student's training record": Kind("student/training.json", _recorded, _recorded_meaning),
    "engine's configuration": Kind("fused/config.json", _fused, _fused_meaning, **MODEL),
    "engine's weights": Kind(f"fused/{WEIGHTS}", _fused, _fused_meaning, sealed=True),
    "engine's weights without a digest": Kind(
        f"bare-fused/{WEIGHTS}", partial(_fused, name="bare-fused"), partial(_fused_meaning, name="bare-fused")
    ),
    "pipeline's index": Kind("pipeline/model_index.json", _piped, _piped_meaning),
    "pipeline's configuration": Kind("pipeline/student/config.json", _piped, _piped_meaning, **MODEL),
    "pipeline's weights": Kind(f"pipeline/student/{WEIGHTS}", _piped, _piped_meaning, **MODEL),
    "record of samples": Kind(
        "samples/samples.json", _sampled_on, beside=("student",), named=("{folder} holds pictures of another",)
    ),
    "teacher's index": Kind("teacher/model_index.json", *TAUGHT, **TEACHER),
    "teacher's configuration": Kind("teacher/unet/config.json", *TAUGHT, **TEACHER),
    "teacher's schedule": Kind("teacher/scheduler/scheduler_config.json", *TAUGHT, **TEACHER),
    "teacher's weights": Kind(f"teacher/unet/{WEIGHTS}", *TAUGHT, **TEACHER),
    "teacher's index of weights": Kind(f"sharded/unet/{WEIGHTS}.index.json", *PARTS, **INDEX),
    "teacher's part of the weights": Kind(f"sharded/unet/{PART}", *PARTS, **SHARDED),
    "teacher's pickled weights": Kind(OLDER, _older, _older_meaning, sealed=True, **PICKLED),
    "manifest, distilled": Kind("data/manifest.json", _distilled, beside=("student",), costly=True, **SHARDS),
    "manifest, evaluated": Kind("data/manifest.json", _evaluated_samples, **EVALUATED, **SHARDS),
    "manifest without a digest": Kind(
        "bare-data/manifest.json",
        partial(_read_back, name="bare-data"),
        partial(_read_back_meaning, name="bare-data"),
        **SHARDS,
    ),
    "manifest of a recording that goes on": Kind("data/manifest.json", _recorded_on, **RECORDED),
    "shard, distilled": Kind(f"data/{SHARD}", _distilled, beside=("student",), costly=True),
    "shard, read": Kind(f"data/{SHARD}", _read_back),
    "shard of a recording that goes on": Kind(
        f"data/{SHARD}", _recorded_on, named=("{folder} holds trajectories made with another",), **RECORDED
    ),
    "checkpoint of a distillation": Kind(f"run/{CHECKPOINT}", _resumed, **RESUMED),
    "metrics of a distillation that goes on": Kind("run/metrics.csv", _resumed, _resumed_meaning, **RESUMED),
    "checkpoint of a teacher": Kind(
        f"training/{CHECKPOINT}",
        _trained_on,
        beside=("pictures",),
        written=(f"training/{CHECKPOINT}",),
        costly=True,
        named=("differ from the unfinished run in {folder}",),
        expected=_whole_training,
    ),
    "evaluation": Kind("tables/evaluation.json", _reported(), _page_meaning(), **MODELS),
    "table of an ablation": Kind("tables/ablation.json", _reported("ablation"), _page_meaning("ablation"), **MODELS),
    "metrics": Kind("tables/metrics.csv", _reported("metrics"), _metrics_meaning, **MODELS),
    "preset": Kind("tables/preset.json", _told("preset", "preset.json"), _preset_meaning, named=("not enough memory",)),
    # A field that cannot work is named alone: an option of the same name may have given it.
    "recipe in JSON": Kind("tables/recipe.json", _told("config", "recipe.json"), _recipe_meaning("recipe.json"), named=FIELDS),
    "recipe in TOML": Kind("tables/recipe.toml", _told("config", "recipe.toml"), _recipe_meaning("recipe.toml"), named=FIELDS),
    # Inception's own weights are not here: the sample is a whole file of a smaller network.
    "Inception's weights": Kind("tables/inception.pth", _evaluated_by_inception, beside=("pictures",), readable=False),
    "classifier's configuration": Kind("classifier/config.json", _extracted, _extracted_meaning, beside=("pictures",), **MODEL),
    "classifier's training record": Kind("classifier/training.json", _extracted, _extracted_meaning, beside=("pictures",)),
    "classifier's weights": Kind(f"classifier/{WEIGHTS}", _extracted, _extracted_meaning, sealed=True, beside=("pictures",)),
    "classifier's weights, evaluated": Kind(
        f"classifier/{WEIGHTS}", partial(evaluate_pictures, extractor="classifier"), has_other=False, **SETS
    ),
    "classifier's weights without a digest": Kind(
        f"bare-classifier/{WEIGHTS}",
        partial(_extracted, name="bare-classifier"),
        partial(_extracted_meaning, name="bare-classifier"),
        beside=("pictures",),
    ),
    "kept features": Kind("cache/features.safetensors", _evaluated_from_kept, written=("cache",), **SETS),
    "kept plan": Kind("cache/plans/plan.json", _planned, written=("cache",), beside=("student",)),
    **{f"picture {name}": Kind(f"picture-{name}/{name}", _looked_at(name), _looked_at_meaning(name)) for name in FORMATS},
    "picture of a classifier's": Kind("classes/a/00.png", _classes_read, has_other=False),
}
"""Every kind by its name."""
